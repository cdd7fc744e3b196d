package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/authority/authoritytest"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/api/apiconnect"
	"github.com/parley-mls/parley/node/store"
	"github.com/parley-mls/parley/transport"
	"github.com/parley-mls/parley/transport/freeport"
)

const testSuite = mls.X25519_AES128GCM_SHA256_Ed25519

// testNode is a node with its own authority on loopback, which can be stopped and started again.
type testNode struct {
	t    testing.TB
	cfg  Config
	root authority.Fingerprint
	log  *slog.Logger

	openStore func(store.Options) (*store.Pebble, error)
	used      atomic.Uint64 // bytes of a disk of plenty that aren't free, for nodes with a store in the data directory

	*Node
	cancel context.CancelFunc
	done   chan error
}

// testLog logs to the test if PARLEY_TEST_LOG is set.
func testLog(name string) *slog.Logger {
	if os.Getenv("PARLEY_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", name)
}

// newNode makes an authority and starts a node of name.example.
func newNode(t testing.TB, name string) *testNode {
	t.Helper()
	return newNodeOn(t, name, nil)
}

// newNodeOn is newNode with another store than the one in the data directory, unless openStore is nil.
func newNodeOn(t testing.TB, name string, openStore func(store.Options) (*store.Pebble, error)) *testNode {
	t.Helper()
	n := makeNode(t, name, nil)
	if n.openStore = openStore; openStore == nil {
		n.cfg.diskFree = func() (uint64, error) { return plenty - n.used.Load(), nil }
	}
	n.start()
	t.Cleanup(n.stop)
	return n
}

// makeNode makes a node that doesn't run yet, and its authority, by that clock if it isn't nil.
func makeNode(t testing.TB, name string, clock func() time.Time) *testNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "parley") // unix socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	domain := name + ".example"
	root := initAuthority(t, AuthorityDir(dir), domain, clock)
	address, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	return &testNode{
		t: t, root: root, log: testLog(name),
		cfg: Config{Domain: domain, Data: dir, Listen: address, Gossip: "local", Suites: []mls.CipherSuite{testSuite}},
	}
}

// initAuthority makes an authority, by that clock if it isn't nil.
func initAuthority(t testing.TB, dir, domain string, clock func() time.Time) authority.Fingerprint {
	t.Helper()
	if clock == nil {
		return authoritytest.Init(t, dir, domain)
	}
	return must(authority.Init(dir, authority.InitOptions{Domain: domain, Passphrase: []byte("correct horse"), Time: clock}))(t)
}

const plenty = 1 << 40

func (n *testNode) start() {
	n.t.Helper()
	var node *Node
	var err error
	if n.openStore != nil {
		node, err = open(n.cfg, n.log, n.openStore)
	} else {
		node, err = Open(n.cfg, n.log)
	}
	if err != nil {
		n.t.Fatalf("opening %s: %v", n.cfg.Domain, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.Node, n.cancel, n.done = node, cancel, make(chan error, 1)
	go func() { n.done <- node.Run(ctx) }()
}

func (n *testNode) stop() {
	if n.cancel == nil {
		return
	}
	n.cancel()
	n.cancel = nil
	select {
	case err := <-n.done:
		if err != nil {
			n.t.Errorf("%s: %v", n.cfg.Domain, err)
		}
	case <-time.After(30 * time.Second):
		n.t.Errorf("%s doesn't stop", n.cfg.Domain)
	}
}

// federate has nodes approve each other.
func federate(t testing.TB, nodes ...*testNode) {
	t.Helper()
	for _, a := range nodes {
		for _, b := range nodes {
			if a != b {
				if err := DialAdmin(a.cfg.Socket()).ApprovePeer(t.Context(), b.cfg.Domain, b.root, b.cfg.Listen); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, a := range nodes {
		eventually(t, func() error {
			for _, b := range nodes {
				if a.trust.Bundle(b.cfg.Domain) == nil {
					return fmt.Errorf("%s has no bundle of %s", a.cfg.Domain, b.cfg.Domain)
				}
			}
			return nil
		})
	}
}

// eventually polls until check succeeds or ten seconds have passed.
func eventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// testClient is a client of a node: the MLS side is package mls, the node's side is the API as it is on the wire.
type testClient struct {
	t       testing.TB
	node    *testNode
	user    mimi.URI
	uri     mimi.URI
	signer  crypto.Signer
	chain   [][]byte
	enrol   apiconnect.EnrolmentServiceClient
	api     apiconnect.ClientServiceClient
	token   string
	kps     []*mls.KeyPackage
	secrets []*mls.KeyPackageSecrets

	room    mimi.URI
	group   *mls.Group
	seq     uint64 // the last entry processed
	welcome uint64 // the last Welcome processed
	texts   []string
}

// newClient invites a user, enrols a device and authenticates.
func newClient(t testing.TB, n *testNode, user, device string) *testClient {
	t.Helper()
	c := &testClient{t: t, node: n, user: must(mimi.UserURI(n.cfg.Domain, user))(t), uri: must(mimi.ClientURI(n.cfg.Domain, device))(t)}
	c.signer = must(testSuite.GenerateSignatureKey(rand.Reader))(t)
	c.connect()
	inv := must(n.service.Invite(t.Context(), c.user, time.Hour))(t)
	resp := must(c.enrol.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: inv.Token, Csr: c.csr()})))(t)
	c.chain = resp.Msg.Chain
	c.authenticate()
	return c
}

// must unwraps a result, failing the test on an error.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (c *testClient) csr() []byte {
	c.t.Helper()
	template := &x509.CertificateRequest{}
	for _, u := range []mimi.URI{c.user, c.uri} {
		template.URIs = append(template.URIs, must(url.Parse(string(u)))(c.t))
	}
	return must(x509.CreateCertificateRequest(rand.Reader, template, c.signer))(c.t)
}

func (c *testClient) connect() {
	c.t.Helper()
	rt, closer, err := transport.ClientRoundTripper(transport.ClientOptions{
		Address: c.node.cfg.Listen, Domain: c.node.cfg.Domain,
		VerifyServer: func(chain []*x509.Certificate) error {
			if authority.FingerprintOf(chain[len(chain)-1]) != c.node.root {
				return errors.New("another root")
			}
			return nil
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { closer.Close() })
	base := "https://" + c.node.cfg.Domain
	c.enrol = apiconnect.NewEnrolmentServiceClient(&http.Client{Transport: rt}, base)
	c.api = apiconnect.NewClientServiceClient(&http.Client{Transport: rt}, base, connect.WithInterceptors(bearer{c}))
}

// bearer adds the client's token to its requests.
type bearer struct{ c *testClient }

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		req.Header().Set("Authorization", "Bearer "+b.c.token)
		return next(ctx, req)
	}
}

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		conn.RequestHeader().Set("Authorization", "Bearer "+b.c.token)
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func (c *testClient) tryAuthenticate() error {
	ch, err := c.enrol.Challenge(context.Background(), connect.NewRequest(&api.ChallengeRequest{}))
	if err != nil {
		return err
	}
	sig, err := testSuite.SignWithLabel(rand.Reader, c.signer, AuthenticateLabel, append(ch.Msg.Nonce, c.node.cfg.Domain...))
	if err != nil {
		return err
	}
	resp, err := c.enrol.Authenticate(context.Background(), connect.NewRequest(&api.AuthenticateRequest{
		Nonce: ch.Msg.Nonce, Chain: c.chain, CipherSuite: uint32(testSuite), Signature: sig,
	}))
	if err != nil {
		return err
	}
	c.token = resp.Msg.Token
	return nil
}

func (c *testClient) authenticate() {
	c.t.Helper()
	if err := c.tryAuthenticate(); err != nil {
		c.t.Fatal(err)
	}
}

// code is the stable code of an API error.
func code(err error) string {
	var e *connect.Error
	if !errors.As(err, &e) {
		return ""
	}
	for _, d := range e.Details() {
		if v, err := d.Value(); err == nil {
			if info, ok := v.(*api.ErrorInfo); ok {
				return info.Code
			}
		}
	}
	return ""
}

func (c *testClient) keyPackages(n int) [][]byte {
	c.t.Helper()
	var out [][]byte
	for range n {
		kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: testSuite, Credential: mls.X509Credential(c.chain), Signer: c.signer, LeafExtensions: mimi.LeafExtensions()})
		if err != nil {
			c.t.Fatal(err)
		}
		c.kps, c.secrets = append(c.kps, kp), append(c.secrets, secrets)
		out = append(out, codec.Marshal(kp))
	}
	return out
}

func (c *testClient) publish(n int) {
	c.t.Helper()
	must(c.api.PublishKeyPackages(c.t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{KeyPackages: c.keyPackages(n)})))(c.t)
}

func (c *testClient) config() mls.Config {
	return mls.Config{
		Verifier: c.node.verifier.ForClient(), Components: mimi.Components(), Policy: mimi.RoomPolicy(authority.IdentityOf),
	}
}

// newGroup makes the group of a new room, as the hub wants it; edit may change its extensions.
func (c *testClient) newGroup(room mimi.URI, edit func(*mls.Extensions)) *mls.Group {
	c.t.Helper()
	resp := must(c.api.HubSender(c.t.Context(), connect.NewRequest(&api.HubSenderRequest{CipherSuite: uint32(testSuite)})))(c.t)
	var hub mls.ExternalSender
	if err := codec.Unmarshal(resp.Msg.ExternalSender, &hub); err != nil {
		c.t.Fatal(err)
	}
	list := mimi.ParticipantList{{User: c.user, Role: mimi.RoleAdmin}}
	ext := mls.Extensions{
		{Type: mls.ExtensionRequiredCapabilities, Data: codec.Marshal(mls.RequiredCapabilities{
			Extensions: []mls.ExtensionType{mls.ExtensionAppDataDictionary}, Proposals: []mls.ProposalType{mls.ProposalAppDataUpdate},
			Credentials: []mls.CredentialType{mls.CredentialX509},
		})},
		{Type: mls.ExtensionExternalSenders, Data: codec.Marshal(mls.ExternalSenders{hub})},
		{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(mimi.RoomDictionary(list, mimi.RoomMetadata{RoomURI: string(room)}))},
	}
	if edit != nil {
		edit(&ext)
	}
	g, err := mls.NewGroup(c.config(), nil, mls.GroupOptions{
		GroupID: []byte(room.Group()), Suite: testSuite, Credential: mls.X509Credential(c.chain), Signer: c.signer, Extensions: ext,
		LeafExtensions: mimi.LeafExtensions(),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return g
}

func (c *testClient) tryCreate(room mimi.URI, g *mls.Group) error {
	gi, err := g.GroupInfo(false, true)
	if err != nil {
		return err
	}
	_, err = c.api.CreateRoom(c.t.Context(), connect.NewRequest(&api.CreateRoomRequest{
		Room: string(room), GroupInfo: codec.Marshal(gi), RatchetTree: codec.Marshal(mimi.FullRatchetTree(g.Tree())),
	}))
	return err
}

// createRoom makes a room on the client's own node.
func (c *testClient) createRoom() mimi.URI {
	c.t.Helper()
	room := must(mimi.RoomURI(c.node.cfg.Domain, strings.ToLower(rand.Text())))(c.t)
	g := c.newGroup(room, nil)
	if err := c.tryCreate(room, g); err != nil {
		c.t.Fatal(err)
	}
	c.room, c.group = room, g
	return room
}

// claim claims KeyPackages of a user for the client's room.
func (c *testClient) claim(user mimi.URI) (*mimi.KeyMaterialResponse, error) {
	return c.claimWith(user, nil)
}

// claimWith is claim with a request that edit, if not nil, has changed.
func (c *testClient) claimWith(user mimi.URI, edit func(*mimi.KeyMaterialRequest)) (*mimi.KeyMaterialResponse, error) {
	req, err := c.claimRequest(user, edit)
	if err != nil {
		return nil, err
	}
	resp, err := c.api.ClaimKeyPackages(c.t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(c.room), Body: codec.Marshal(req)}))
	if err != nil {
		return nil, err
	}
	out := new(mimi.KeyMaterialResponse)
	return out, codec.Unmarshal(resp.Msg.Body, out)
}

// claimRequest is the request of claimWith.
func (c *testClient) claimRequest(user mimi.URI, edit func(*mimi.KeyMaterialRequest)) (*mimi.KeyMaterialRequest, error) {
	req := &mimi.KeyMaterialRequest{
		RequestingUser: c.user, TargetUser: user, Room: c.room, CipherSuites: []mls.CipherSuite{testSuite},
		RequiredCapabilities: mls.RequiredCapabilities{Extensions: []mls.ExtensionType{mls.ExtensionAppDataDictionary}},
		SignatureKey:         must(testSuite.SignaturePublicKey(c.signer.Public()))(c.t), Credential: mls.X509Credential(c.chain),
	}
	if edit != nil {
		edit(req)
	}
	return req, req.Sign(rand.Reader, testSuite, c.signer)
}

func listUpdate(u mimi.ParticipantListUpdate) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{
		Component: mimi.ComponentParticipantList, Op: mls.AppDataOpUpdate, Update: codec.Marshal(u),
	}}
}

func removeLeaf(i mls.LeafIndex) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: i}}
}

// adding returns the proposals that add a user with all clients.
func (c *testClient) adding(user mimi.URI) []mls.Proposal {
	c.t.Helper()
	resp, err := c.claim(user)
	if err != nil {
		c.t.Fatalf("claiming KeyPackages of %s: %v", user, err)
	}
	if resp.Code != mimi.KeyMaterialSuccess {
		c.t.Fatalf("claiming KeyPackages of %s: %v", user, resp.Code)
	}
	props := []mls.Proposal{listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: user, Role: mimi.RoleMember}}})}
	for _, k := range resp.Clients {
		props = append(props, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *k.KeyPackage}})
	}
	return props
}

// bundle is the UpdateRequest of a staged commit.
func bundle(p *mls.PendingCommit) *mimi.UpdateRequest {
	return &mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
		Message: p.Message(), Welcome: p.Welcome(), GroupInfo: mimi.FullGroupInfo(p.GroupInfo()), RatchetTree: mimi.FullRatchetTree(p.Tree()),
	}}
}

func (c *testClient) update(req *mimi.UpdateRequest) (*mimi.UpdateRoomResponse, uint64, error) {
	resp, err := c.api.Update(c.t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(c.room), Body: codec.Marshal(req)}))
	if err != nil {
		return nil, 0, err
	}
	out := new(mimi.UpdateRoomResponse)
	return out, resp.Msg.Seq, codec.Unmarshal(resp.Msg.Body, out)
}

// commit stages a commit, submits it, and fails the test unless the hub accepts it. It is applied when it comes in the
// log.
func (c *testClient) commit(props ...mls.Proposal) uint64 {
	c.t.Helper()
	p, err := c.group.Commit(nil, mls.CommitOptions{Proposals: props, ForcePath: true})
	if err != nil {
		c.t.Fatal(err)
	}
	resp, seq, err := c.update(bundle(p))
	if err != nil {
		c.t.Fatalf("update: %v (%s)", err, code(err))
	}
	if resp.Code != mimi.UpdateSuccess {
		c.t.Fatalf("update: %v: %s", resp.Code, resp.Description)
	}
	return seq
}

func (c *testClient) seal(text string) *mimi.SubmitMessageRequest {
	c.t.Helper()
	m, err := c.group.Encrypt(nil, nil, []byte(text))
	if err != nil {
		c.t.Fatal(err)
	}
	return &mimi.SubmitMessageRequest{Message: m, Sender: c.user}
}

func (c *testClient) submit(req *mimi.SubmitMessageRequest) (*mimi.SubmitMessageResponse, uint64, error) {
	resp, err := c.api.SubmitMessage(c.t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(c.room), Body: codec.Marshal(req)}))
	if err != nil {
		return nil, 0, err
	}
	out := new(mimi.SubmitMessageResponse)
	return out, resp.Msg.Seq, codec.Unmarshal(resp.Msg.Body, out)
}

// send sends a message and fails the test unless the hub accepts it.
func (c *testClient) send(text string) uint64 {
	c.t.Helper()
	resp, seq, err := c.submit(c.seal(text))
	if err != nil {
		c.t.Fatalf("submit: %v (%s)", err, code(err))
	}
	if resp.Code != mimi.SubmitAccepted {
		c.t.Fatalf("submit: %v", resp.Code)
	}
	return seq
}

// events is an open stream.
type events struct {
	c      *testClient
	ch     chan *api.Event
	cancel context.CancelFunc
	mu     sync.Mutex
	err    error
}

// subscribe opens a stream from the client's cursor.
func (c *testClient) subscribe() *events {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req := &api.SubscribeRequest{}
	if c.room != "" {
		req.Cursors = []*api.Cursor{{Room: string(c.room), Seq: c.seq}}
	}
	s, err := c.api.Subscribe(ctx, connect.NewRequest(req))
	if err != nil {
		c.t.Fatal(err)
	}
	e := &events{c: c, ch: make(chan *api.Event, 10_000), cancel: cancel}
	c.t.Cleanup(cancel)
	go func() {
		for s.Receive() {
			for _, ev := range s.Msg().Events {
				e.ch <- ev
			}
		}
		e.mu.Lock()
		e.err = s.Err()
		e.mu.Unlock()
		close(e.ch)
	}()
	return e
}

// next returns the next event.
func (e *events) next() *api.Event {
	e.c.t.Helper()
	select {
	case ev, ok := <-e.ch:
		if !ok {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.c.t.Fatalf("%s: the stream ended: %v", e.c.uri, e.err)
		}
		return ev
	case <-time.After(10 * time.Second):
		e.c.t.Fatalf("%s: no event (seq %d)", e.c.uri, e.c.seq)
		return nil
	}
}

// ended waits for the stream's end and returns why.
func (e *events) ended() error {
	e.c.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case _, ok := <-e.ch:
			if !ok {
				e.mu.Lock()
				defer e.mu.Unlock()
				return e.err
			}
		case <-deadline:
			e.c.t.Fatal("the stream doesn't end")
		}
	}
}

// until processes events until done.
func (e *events) until(done func() bool) {
	e.c.t.Helper()
	for !done() {
		e.c.process(e.next())
	}
}

// live processes events until the live marker.
func (e *events) live() {
	e.c.t.Helper()
	for {
		ev := e.next()
		if ev.GetLive() != nil {
			return
		}
		e.c.process(ev)
	}
}

// process does with an event what a client does.
func (c *testClient) process(ev *api.Event) {
	c.t.Helper()
	switch {
	case ev.GetWelcome() != nil:
		c.join(ev.GetWelcome())
	case ev.GetEntry() != nil:
		c.entry(ev.GetEntry())
	}
}

func (c *testClient) join(w *api.Welcome) {
	c.t.Helper()
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(w.Fanout, &f); err != nil {
		c.t.Fatal(err)
	}
	for i, kp := range c.kps {
		if !f.Message.Welcome.Find(kp.Ref()) {
			continue
		}
		g, err := mls.JoinGroup(c.config(), nil, c.signer, f.Message.Welcome, kp, c.secrets[i], f.RatchetTree.Tree)
		if err != nil {
			c.t.Fatalf("%s joins: %v", c.uri, err)
		}
		c.room, c.group, c.seq, c.welcome = mimi.URI(w.Room), g, w.Seq, w.Number
		return
	}
	c.t.Fatalf("%s has no KeyPackage for a Welcome", c.uri)
}

func (c *testClient) entry(e *api.LogEntry) {
	c.t.Helper()
	if mimi.URI(e.Room) != c.room {
		return
	}
	if e.Seq <= c.seq {
		c.t.Fatalf("%s: entry %d after %d", c.uri, e.Seq, c.seq)
	}
	c.seq = e.Seq
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(e.Fanout, &f); err != nil {
		c.t.Fatal(err)
	}
	for _, m := range slices.Concat([]*mls.MLSMessage{f.Message}, f.MoreProposals, f.ExternalProposals) {
		got, err := c.group.Receive(nil, m)
		if errors.Is(err, mls.ErrOwnMessage) || errors.Is(err, mls.ErrEpoch) && m.Public.Content.Sender.Type == mls.SenderNewMemberCommit {
			continue // the latter is the external commit with which it has joined
		}
		if err != nil {
			c.t.Fatalf("%s: entry %d: %v", c.uri, e.Seq, err)
		}
		switch got := got.(type) {
		case *mls.ApplicationMessage:
			c.texts = append(c.texts, string(got.Data))
		case *mls.OwnCommit:
			if err := c.group.Confirm(nil); err != nil {
				c.t.Fatal(err)
			}
		case *mls.StagedCommit:
			if err := c.group.Apply(nil, got); err != nil {
				c.t.Fatal(err)
			}
		}
	}
}

// leafOf returns a client's leaf in this client's group.
func (c *testClient) leafOf(client mimi.URI) (mls.LeafIndex, bool) {
	for m := range c.group.Members() {
		if _, uri, err := authority.IdentityOf(m.Leaf.Credential); err == nil && uri == client {
			return m.Index, true
		}
	}
	return 0, false
}
