package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/examples/internal/org"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/api/apiconnect"
	"github.com/parley-mls/parley/transport"
)

const suite = mls.X25519_AES128GCM_SHA256_Ed25519

// maxResponse bounds one message from the node: a Welcome brings a tree.
const maxResponse = 64 << 20

// device is a client with its own connection to its node that keeps nothing on disk. It costs the node what a device of
// package client costs it, and this process much less.
type device struct {
	org       *org.Org
	user, uri mimi.URI
	signer    crypto.Signer
	chain     [][]byte
	trust     *trust
	closer    io.Closer
	enrolment apiconnect.EnrolmentServiceClient
	service   apiconnect.ClientServiceClient
	token     string

	kp      *mls.KeyPackage
	secrets *mls.KeyPackageSecrets
	group   *mls.Group // of a device that has joined
}

// trust is what devices of one organisation know of providers, and how they reach their own.
type trust struct {
	tcp      bool
	verifier *authority.Verifier
	mu       sync.Mutex
	bundles  map[string]*authority.Bundle // guarded by mu
}

func newTrust(tcp bool) *trust {
	t := &trust{tcp: tcp, bundles: make(map[string]*authority.Bundle)}
	t.verifier = &authority.Verifier{Bundles: func(domain string) *authority.Bundle {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.bundles[domain]
	}}
	return t
}

// enrol makes a device of a new user, whose KeyPackage is published.
func enrol(ctx context.Context, o *org.Org, name string, t *trust) (*device, error) {
	inv, err := o.Invite(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("invite %s: %w", name, err)
	}
	d := &device{org: o, user: inv.User, trust: t}
	if d.uri, err = mimi.ClientURI(o.Domain, name); err != nil {
		return nil, err
	}
	if d.signer, err = suite.GenerateSignatureKey(rand.Reader); err != nil {
		return nil, err
	}
	var rt http.RoundTripper
	rt, d.closer, err = transport.ClientRoundTripper(transport.ClientOptions{
		Address: o.Address, Domain: o.Domain, TCPOnly: t.tcp, KeepAlive: 10 * time.Second,
		VerifyServer: func(chain []*x509.Certificate) error {
			if authority.FingerprintOf(chain[len(chain)-1]) != inv.Root {
				return errors.New("another root")
			}
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	h := &http.Client{Transport: rt}
	base := "https://" + o.Domain
	d.enrolment = apiconnect.NewEnrolmentServiceClient(h, base)
	d.service = apiconnect.NewClientServiceClient(h, base,
		connect.WithReadMaxBytes(maxResponse), connect.WithAcceptCompression("gzip", nil, nil))

	if err := d.start(ctx, inv.Token); err != nil {
		d.close()
		return nil, fmt.Errorf("enrol %s at %s: %w", name, o.Domain, err)
	}
	return d, nil
}

func (d *device) close() {
	if d != nil && d.closer != nil {
		d.closer.Close()
	}
}

func (d *device) start(ctx context.Context, token string) error {
	csr, err := authority.NewRequest(rand.Reader, d.user, d.uri, d.signer)
	if err != nil {
		return err
	}
	enrolled, err := d.enrolment.Enrol(ctx, connect.NewRequest(&api.EnrolRequest{Token: token, Csr: csr}))
	if err != nil {
		return err
	}
	d.chain = enrolled.Msg.Chain
	if err := d.authenticate(ctx); err != nil {
		return err
	}
	if err := d.learn(ctx); err != nil {
		return err
	}
	list, err := d.keyPackages(1)
	if err != nil {
		return err
	}
	d.kp, d.secrets = list[0].kp, list[0].secrets
	return d.publish(ctx, list)
}

// authenticate gets a token; a node that was started again has none of before.
func (d *device) authenticate(ctx context.Context) error {
	challenge, err := d.enrolment.Challenge(ctx, connect.NewRequest(&api.ChallengeRequest{}))
	if err != nil {
		return err
	}
	sig, err := suite.SignWithLabel(rand.Reader, d.signer, node.AuthenticateLabel, append(challenge.Msg.Nonce, d.org.Domain...))
	if err != nil {
		return err
	}
	auth, err := d.enrolment.Authenticate(ctx, connect.NewRequest(&api.AuthenticateRequest{
		Nonce: challenge.Msg.Nonce, Chain: d.chain, CipherSuite: uint32(suite), Signature: sig,
	}))
	if err != nil {
		return err
	}
	d.token = auth.Msg.Token
	return nil
}

// learn asks for the trust bundles, once for all devices of the organisation.
func (d *device) learn(ctx context.Context) error {
	d.trust.mu.Lock()
	defer d.trust.mu.Unlock()
	if len(d.trust.bundles) > 0 {
		return nil
	}
	res, err := call(ctx, d, d.service.Bundles, &api.BundlesRequest{})
	if err != nil {
		return err
	}
	for _, raw := range res.Bundles {
		b, err := authority.ParseBundle(raw)
		if err != nil {
			return err
		}
		d.trust.bundles[b.Domain()] = b
	}
	return nil
}

type keyPackage struct {
	kp      *mls.KeyPackage
	secrets *mls.KeyPackageSecrets
}

func (d *device) keyPackages(n int) ([]keyPackage, error) {
	list := make([]keyPackage, n)
	for i := range list {
		var err error
		list[i].kp, list[i].secrets, err = mls.NewKeyPackage(mls.KeyPackageOptions{
			Suite: suite, Credential: mls.X509Credential(d.chain), Signer: d.signer, LeafExtensions: mimi.LeafExtensions(),
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (d *device) publish(ctx context.Context, list []keyPackage) error {
	req := new(api.PublishKeyPackagesRequest)
	for _, k := range list {
		req.KeyPackages = append(req.KeyPackages, codec.Marshal(k.kp))
	}
	_, err := call(ctx, d, d.service.PublishKeyPackages, req)
	return err
}

// call calls a method of the ClientService.
func call[Req, Res any](ctx context.Context, d *device, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), msg *Req) (*Res, error) {
	req := connect.NewRequest(msg)
	req.Header().Set("Authorization", "Bearer "+d.token)
	res, err := f(ctx, req)
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (d *device) config() mls.Config {
	return mls.Config{Verifier: d.trust.verifier.ForClient(), Components: mimi.Components(), Policy: mimi.RoomPolicy(authority.IdentityOf)}
}

// createRoom makes a room on the device's node with itself and the users of others, each with one device, in it.
func (d *device) createRoom(ctx context.Context, name string, others []*device) (mimi.URI, error) {
	room, err := mimi.RoomURI(d.org.Domain, name)
	if err != nil {
		return "", err
	}
	sender, err := call(ctx, d, d.service.HubSender, &api.HubSenderRequest{CipherSuite: uint32(suite)})
	if err != nil {
		return "", err
	}
	var hub mls.ExternalSender
	if err := codec.Unmarshal(sender.ExternalSender, &hub); err != nil {
		return "", err
	}
	list := mimi.ParticipantList{{User: d.user, Role: mimi.RoleAdmin}}
	d.group, err = mls.NewGroup(d.config(), nil, mls.GroupOptions{
		GroupID: []byte(room.Group()), Suite: suite, Credential: mls.X509Credential(d.chain), Signer: d.signer,
		LeafExtensions: mimi.LeafExtensions(),
		Extensions: mls.Extensions{
			{Type: mls.ExtensionRequiredCapabilities, Data: codec.Marshal(mls.RequiredCapabilities{
				Extensions: []mls.ExtensionType{mls.ExtensionAppDataDictionary}, Proposals: []mls.ProposalType{mls.ProposalAppDataUpdate},
				Credentials: []mls.CredentialType{mls.CredentialX509},
			})},
			{Type: mls.ExtensionExternalSenders, Data: codec.Marshal(mls.ExternalSenders{hub})},
			{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(mimi.RoomDictionary(list, mimi.RoomMetadata{RoomURI: string(room)}))},
		},
	})
	if err != nil {
		return "", err
	}
	gi, err := d.group.GroupInfo(false, true)
	if err != nil {
		return "", err
	}
	if _, err := call(ctx, d, d.service.CreateRoom, &api.CreateRoomRequest{
		Room: string(room), GroupInfo: codec.Marshal(gi), RatchetTree: codec.Marshal(mimi.FullRatchetTree(d.group.Tree())),
	}); err != nil {
		return "", err
	}
	return room, d.add(ctx, room, others)
}

// claim claims the KeyPackages of a user for a room.
func (d *device) claim(ctx context.Context, room, user mimi.URI) (*mimi.KeyMaterialResponse, error) {
	pub, err := suite.SignaturePublicKey(d.signer.Public())
	if err != nil {
		return nil, err
	}
	req := &mimi.KeyMaterialRequest{
		RequestingUser: d.user, TargetUser: user, Room: room, CipherSuites: []mls.CipherSuite{suite},
		RequiredCapabilities: mls.RequiredCapabilities{Extensions: []mls.ExtensionType{mls.ExtensionAppDataDictionary}},
		SignatureKey:         pub, Credential: mls.X509Credential(d.chain),
	}
	if err := req.Sign(rand.Reader, suite, d.signer); err != nil {
		return nil, err
	}
	res, err := call(ctx, d, d.service.ClaimKeyPackages, &api.MimiRequest{Room: string(room), Body: codec.Marshal(req)})
	if err != nil {
		return nil, err
	}
	out := new(mimi.KeyMaterialResponse)
	return out, codec.Unmarshal(res.Body, out)
}

// add adds others to the room, in one commit.
func (d *device) add(ctx context.Context, room mimi.URI, others []*device) error {
	var update mimi.ParticipantListUpdate
	proposals := make([]mls.Proposal, 1)
	for _, o := range others {
		res, err := d.claim(ctx, room, o.user)
		if err != nil {
			return err
		}
		if res.Code != mimi.KeyMaterialSuccess || len(res.Clients) != 1 {
			return fmt.Errorf("claim a KeyPackage of %s: %v", o.user, res.Code)
		}
		update.Added = append(update.Added, mimi.Participant{User: o.user, Role: mimi.RoleMember})
		proposals = append(proposals, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *res.Clients[0].KeyPackage}})
	}
	proposals[0] = mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{
		Component: mimi.ComponentParticipantList, Op: mls.AppDataOpUpdate, Update: codec.Marshal(update),
	}}
	p, err := d.group.Commit(nil, mls.CommitOptions{Proposals: proposals, ForcePath: true})
	if err != nil {
		return err
	}
	res, err := call(ctx, d, d.service.Update, &api.MimiRequest{Room: string(room), Body: codec.Marshal(&mimi.UpdateRequest{
		Bundle: mimi.HandshakeBundle{
			Message: p.Message(), Welcome: p.Welcome(), GroupInfo: mimi.SmallGroupInfo(p.GroupInfo()), RatchetTree: mimi.HubRatchetTree(),
		},
	})})
	if err != nil {
		return err
	}
	var answer mimi.UpdateRoomResponse
	if err := codec.Unmarshal(res.Body, &answer); err != nil {
		return err
	}
	if answer.Code != mimi.UpdateSuccess {
		return fmt.Errorf("the commit that adds members: %v: %s", answer.Code, answer.Description)
	}
	return d.group.Confirm(nil)
}

// join processes the Welcome of an event.
func (d *device) join(w *api.Welcome) error {
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(w.Fanout, &f); err != nil {
		return err
	}
	var err error
	d.group, err = mls.JoinGroup(d.config(), nil, d.signer, f.Message.Welcome, d.kp, d.secrets, f.RatchetTree.Tree)
	return err
}

// seal makes the request that submits a message.
func (d *device) seal(room mimi.URI, data []byte) (*api.MimiRequest, error) {
	m, err := d.group.Encrypt(nil, nil, data)
	if err != nil {
		return nil, err
	}
	return &api.MimiRequest{Room: string(room), Body: codec.Marshal(&mimi.SubmitMessageRequest{Message: m, Sender: d.user})}, nil
}

// submit returns the message's number in the log, once the hub has it durably.
func (d *device) submit(ctx context.Context, req *api.MimiRequest) (uint64, error) {
	res, err := call(ctx, d, d.service.SubmitMessage, req)
	if err != nil {
		return 0, err
	}
	var answer mimi.SubmitMessageResponse
	if err := codec.Unmarshal(res.Body, &answer); err != nil {
		return 0, err
	}
	if answer.Code != mimi.SubmitAccepted {
		return 0, fmt.Errorf("a message gets the answer %v", answer.Code)
	}
	return res.Seq, nil
}

// open decrypts an application message of the log.
func (d *device) open(fanout []byte) ([]byte, error) {
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(fanout, &f); err != nil {
		return nil, err
	}
	got, err := d.group.Receive(nil, f.Message)
	if err != nil {
		return nil, err
	}
	m, ok := got.(*mls.ApplicationMessage)
	if !ok {
		return nil, fmt.Errorf("a %T where an application message is due", got)
	}
	return m.Data, nil
}

// follow subscribes; it returns once the device has everything that there was, and has joined if it is to be a member.
// From the first on entry gets each entry of the log. The returned function waits for the stream's end, which is that of
// ctx.
func (d *device) follow(ctx context.Context, member bool, entry func(*api.LogEntry) error) (wait func() error, err error) {
	req := connect.NewRequest(&api.SubscribeRequest{})
	req.Header().Set("Authorization", "Bearer "+d.token)
	stream, err := d.service.Subscribe(ctx, req)
	if err != nil {
		return nil, err
	}
	live := make(chan struct{}) // closed when the device is ready
	ended := make(chan error, 1)
	go func() {
		seen, ready := false, false
		for stream.Receive() {
			for _, ev := range stream.Msg().Events {
				var err error
				switch {
				case ev.GetEntry() != nil && seen:
					err = entry(ev.GetEntry())
				case ev.GetWelcome() != nil && member:
					err = d.join(ev.GetWelcome())
				case ev.GetLive() != nil:
					seen = true
				}
				if err != nil {
					ended <- fmt.Errorf("%s: %w", d.uri, err)
					return
				}
				if !ready && seen && (!member || d.group != nil) {
					ready = true
					close(live)
				}
			}
		}
		if ctx.Err() != nil {
			ended <- nil
			return
		}
		ended <- fmt.Errorf("%s: the stream ended: %w", d.uri, stream.Err())
	}()
	select {
	case <-live:
		return func() error { return <-ended }, nil
	case err := <-ended:
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ignore is for follow.
func ignore(*api.LogEntry) error { return nil }

// count subscribes from the beginning and returns how many entries with messages of a room came once there are want.
func (d *device) count(ctx context.Context, rm *room, want int) (int, error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	req := connect.NewRequest(&api.SubscribeRequest{Cursors: []*api.Cursor{{Room: string(rm.uri), Seq: firstMessage - 1}}})
	req.Header().Set("Authorization", "Bearer "+d.token)
	stream, err := d.service.Subscribe(ctx, req)
	if err != nil {
		return 0, err
	}
	next := uint64(firstMessage)
	for stream.Receive() {
		for _, ev := range stream.Msg().Events {
			e := ev.GetEntry()
			if e == nil || e.Room != string(rm.uri) {
				continue
			}
			if e.Seq != next {
				return 0, fmt.Errorf("%s: entry %d where %d is due", d.uri, e.Seq, next)
			}
			if next++; next == firstMessage+uint64(want) {
				return want, nil
			}
		}
	}
	return 0, fmt.Errorf("%s: the stream ended after %d entries: %w", d.uri, next-firstMessage, stream.Err())
}
