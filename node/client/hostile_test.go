package client

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
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
	"github.com/parley-mls/parley/node/store"
)

// What couldn't be made durable doesn't leave before a restart has read it back, and the client doesn't go on with what it
// has in memory.
func TestFailedSyncStopsTheClient(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	bob.stop()
	c, err := Open(t.Context(), bob.o)
	if err != nil {
		t.Fatal(err)
	}
	f := inject(c)
	var submitted atomic.Int64
	f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
		submitted.Add(1)
		return f.ClientServiceClient.SubmitMessage(ctx, req)
	}
	broken := errors.New("the disk is broken, by the test")
	var failing atomic.Bool
	c.apply = func(b *store.Batch) (func() error, error) {
		wait, err := c.db.Apply(b)
		if failing.Load() {
			return func() error { return errors.Join(wait(), broken) }, err
		}
		return wait, err
	}
	bob.run(c)
	if err := c.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := bob.room(room.URI())
	// In the outbox and not encrypted yet: it is the worker whose write fails.
	r.mu.Lock()
	o := &outgoing{number: r.nextOut, text: []byte("kept"), ready: true, done: make(chan result, 1)}
	r.nextOut++
	r.outbox = append(r.outbox, o)
	failing.Store(true)
	r.touch()
	r.mu.Unlock()
	if err := <-bob.ended; !errors.Is(err, broken) {
		t.Errorf("Run ends with %v", err)
	}
	bob.ended <- nil
	if res := <-o.done; !errors.Is(res.err, broken) {
		t.Errorf("the message: %v", res.err)
	}
	failing.Store(false)
	if _, err := r.Send(t.Context(), []byte("x")); !errors.Is(err, broken) {
		t.Errorf("send: %v", err)
	}
	if n := submitted.Load(); n != 0 {
		t.Errorf("%d messages left", n)
	}
	bob.restart()
	bob.say(room.URI(), "here")
	sees(t, room.URI(), []string{"bob-phone: kept", "bob-phone: here"}, alice)
}

func TestCloseEndsWhatWaits(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	room := alice.create()
	alice.stop()
	c, err := Open(t.Context(), alice.o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Room(room.URI())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 3)
	go func() { ended <- r.UpdateKeys(context.Background()) }()
	go func() { ended <- r.WaitEpoch(context.Background(), 1000) }()
	go func() {
		_, err := r.Send(context.Background(), []byte("x"))
		ended <- err
	}()
	within(t, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.jobs) != 1 || len(r.outbox) != 1 || !r.outbox[0].ready {
			return errors.New("not waiting yet")
		}
		return nil
	})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		select {
		case err := <-ended:
			if !errors.Is(err, ErrClosed) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(patience):
			t.Fatal("still waiting")
		}
	}
}

// A hub that refuses proposals to leave doesn't have them, and so the room goes on as before.
func TestRefusedLeaveLeavesTheRoomUsable(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	bob, f := p[0].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	f.set(func(f *faults) {
		f.update = func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			return connect.NewResponse(&api.MimiResponse{Body: codec.Marshal(&mimi.UpdateRoomResponse{Code: mimi.UpdateNotAllowed})}), nil
		}
	})
	theirs := bob.room(room.URI())
	if _, ok := errors.AsType[*Refused](theirs.Leave(t.Context())); !ok {
		t.Fatal("the leave wasn't refused")
	}
	f.set(func(f *faults) { f.update = nil })
	bob.say(room.URI(), "still here")
	if err := theirs.UpdateKeys(t.Context()); err != nil {
		t.Error(err)
	}
	agree(t, room.URI(), alice, bob)
	sees(t, room.URI(), []string{"bob-phone: still here"}, alice, bob)
	bob.restart()
	bob.say(room.URI(), "and after a restart")
}

// The process ends between the renewal and what the rooms learn of it.
func TestRenewalReachesTheRoomsAfterARestart(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	csr, err := alice.csr(alice.profile)
	if err != nil {
		t.Fatal(err)
	}
	res, err := call(t.Context(), alice.session, alice.session.service.Renew, &api.RenewRequest{Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	if err := alice.adopt(res.Chain); err != nil {
		t.Fatal(err)
	}
	alice.restart()
	renewed := alice.credential()
	within(t, func() error {
		r := bob.room(room.URI())
		r.mu.Lock()
		defer r.mu.Unlock()
		for m := range r.group.Members() {
			if m.Leaf.Credential.Equal(renewed) {
				return nil
			}
		}
		return errors.New("bob doesn't see the new credential")
	})
}

// An external commit whose hub is out of reach concerns its room only.
func TestInterruptedJoinHoldsNothingUp(t *testing.T) {
	p := providers(t, "alpha")
	phone := p[0].enrol("bob", "bob-phone")
	room := phone.create()
	tablet, f := p[0].enrolFaulty("bob", "bob-tablet")
	unreachable := func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
		return nil, errUnreachable
	}
	f.set(func(f *faults) { f.update = unreachable })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := tablet.Join(ctx, room.URI()); err == nil {
		t.Fatal("joined")
	}
	tablet.stop()
	c, err := Open(t.Context(), tablet.o)
	if err != nil {
		t.Fatal(err)
	}
	f = inject(c)
	f.update = unreachable
	tablet.run(c)
	ctx, cancel = context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := c.WaitLive(ctx); err != nil {
		t.Fatal(err)
	}
	f.set(func(f *faults) { f.update = nil })
	agree(t, room.URI(), phone, tablet)
}

// An external commit is confirmed once: a second time would begin with keys that were used.
func TestConfirmedJoinIsNotConfirmedAgain(t *testing.T) {
	p := providers(t, "alpha")
	phone := p[0].enrol("bob", "bob-phone")
	room := phone.create()
	tablet := p[0].enrol("bob", "bob-tablet")
	pending, err := tablet.prepareJoin(t.Context(), room.URI(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tablet.finishJoin(t.Context(), room.URI(), pending); err != nil {
		t.Fatal(err)
	}
	tablet.say(room.URI(), "one")
	r := tablet.room(room.URI())
	group := r.group
	if _, err := tablet.finishJoin(t.Context(), room.URI(), pending); err != nil {
		t.Fatal(err)
	}
	if r.group != group {
		t.Error("the group began anew")
	}
}

// embedded is an authority without a node.
func embedded(t *testing.T, domain string) *authority.Embedded {
	t.Helper()
	dir := t.TempDir()
	authoritytest.Init(t, filepath.Join(dir, "authority"), domain)
	db, err := store.Open(filepath.Join(dir, "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	e, err := authority.Open(filepath.Join(dir, "authority"), db, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(e.Close(), db.Close()); err != nil {
			t.Error(err)
		}
	})
	return e
}

func bundleOf(t *testing.T, e *authority.Embedded) *authority.Bundle {
	t.Helper()
	b, err := e.Bundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A peer that began anew with another root, which the operator approved, doesn't lock out who knew the old one; an older
// bundle of the same root has no effect.
func TestBundlesOfPeersGoForwardUnlessTheRootIsAnother(t *testing.T) {
	own, beta, again := embedded(t, "alpha.example"), embedded(t, "beta.example"), embedded(t, "beta.example")
	first := bundleOf(t, beta)
	if err := beta.Announce(t.Context(), []authority.Fingerprint{{1}}); err != nil {
		t.Fatal(err)
	}
	second := bundleOf(t, beta)
	db, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	root := own.Root()
	tr := newTrust("alpha.example", root[:], time.Now)
	for i, step := range []struct{ given, want *authority.Bundle }{
		{second, second}, {first, second}, {bundleOf(t, again), bundleOf(t, again)},
	} {
		ours := bundleOf(t, own)
		if err := tr.put(db, []*authority.Bundle{ours, step.given}, [][]byte{ours.JSON(), step.given.JSON()}); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		stored, err := db.Get([]byte(prefixBundle + "beta.example"))
		if err != nil || !bytes.Equal(stored, step.want.JSON()) || !bytes.Equal(tr.bundle("beta.example").JSON(), step.want.JSON()) {
			t.Errorf("step %d: another bundle, %v", i, err)
		}
	}
}

func TestRevokedNodeIsRefused(t *testing.T) {
	own := embedded(t, "alpha.example")
	root := own.Root()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := own.IssueNode(t.Context(), pub)
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range raw {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	tr := newTrust("alpha.example", root[:], time.Now)
	tr.bundles["alpha.example"] = bundleOf(t, own)
	if err := tr.verifyNode(chain); err != nil {
		t.Fatal(err)
	}
	if _, err := own.Revoke(t.Context(), fmt.Sprintf("%x", chain[0].SerialNumber), "keyCompromise"); err != nil {
		t.Fatal(err)
	}
	tr.bundles["alpha.example"] = bundleOf(t, own)
	if err := tr.verifyNode(chain); !errors.Is(err, authority.ErrRevoked) {
		t.Errorf("a revoked node: %v", err)
	}
}

// A node forges a room whose members' certificates it made itself, in the name of people whom the victim knows.
func TestWelcomeIntoAForgedRoomIsRefused(t *testing.T) {
	p := providers(t, "alpha")
	bob := p[0].enrol("bob", "bob-phone")
	forger := embedded(t, "alpha.example")
	pub, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	alice := mimi.URI("mimi://alpha.example/u/alice")
	var names []*url.URL
	for _, n := range []string{string(alice), "mimi://alpha.example/d/alice-laptop"} {
		u, err := url.Parse(n)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, u)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: names}, private)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := forger.Issue(t.Context(), csr)
	if err != nil {
		t.Fatal(err)
	}
	hub, err := forger.IssueHub(t.Context(), pub)
	if err != nil {
		t.Fatal(err)
	}
	uri := mimi.URI("mimi://alpha.example/r/secret")
	g, err := mls.NewGroup(bob.config, nil, mls.GroupOptions{
		GroupID: []byte(uri.Group()), Suite: defaultSuite, Credential: mls.X509Credential(chain), Signer: private,
		Extensions: roomExtensions(uri, "secret", mimi.Participant{User: alice, Role: mimi.RoleAdmin}, mls.ExternalSender{
			SignatureKey: []byte(pub), Credential: mls.X509Credential(hub),
		}, new(mimi.Rules)),
		LeafExtensions: mimi.LeafExtensions(),
	})
	if err != nil {
		t.Fatal(err)
	}
	var kp ownKeyPackage
	err = store.ScanPrefix(bob.db, []byte(prefixKeyPackage), func(_, value []byte) bool {
		err = codec.Unmarshal(bytes.Clone(value), &kp)
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	pc, err := g.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{
		participantProposal(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: bob.User(), Role: mimi.RoleMember}}}),
		{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: kp.keyPackage}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	fanout := codec.Marshal(&mimi.FanoutMessage{
		Timestamp: 1, Message: mls.NewMLSMessage(pc.Welcome()), RatchetTree: mimi.FullRatchetTree(pc.Tree()),
	})
	var w waits
	if _, err := bob.enter(&w, new(store.Batch), uri, 1, fanout); !errors.Is(err, authority.ErrUntrusted) {
		t.Errorf("the forged room: %v", err)
	}
	if _, err := bob.Room(uri); !errors.Is(err, ErrUnknownRoom) {
		t.Errorf("the room is known: %v", err)
	}
}

// A hub that calls a message too old for the epoch that the room is in contradicts itself.
func TestEpochTooOldForTheSameEpochIsARefusal(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	bob, f := p[0].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	f.set(func(f *faults) {
		f.submit = func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			return connect.NewResponse(&api.MimiResponse{Body: codec.Marshal(&mimi.SubmitMessageResponse{
				Code: mimi.SubmitEpochTooOld, CurrentEpoch: room.Epoch(),
			})}), nil
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := bob.room(room.URI()).Send(ctx, []byte("x"))
	if refused, ok := errors.AsType[*Refused](err); !ok || refused.Code != "epochTooOld" {
		t.Errorf("send: %v", err)
	}
}

// A member who is who she says she is, with a hub that helps her, invites into groups that aren't the room's.
func TestForgedRoomsAreNotEntered(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	hub := func(d *device) (s mls.ExternalSender) {
		res, err := call(t.Context(), d.session, d.session.service.HubSender, &api.HubSenderRequest{CipherSuite: uint32(defaultSuite)})
		if err == nil {
			err = codec.Unmarshal(res.ExternalSender, &s)
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	own, other := hub(alice), hub(bob)
	const uri = mimi.URI("mimi://alpha.example/r/secret")
	admin := mimi.Participant{User: alice.User(), Role: mimi.RoleAdmin}
	for _, c := range []struct {
		name  string
		group mimi.URI
		ext   mls.Extensions
		want  string
	}{
		{"another room's group", "mimi://alpha.example/g/other", roomExtensions(uri, "x", admin, own, new(mimi.Rules)), "is not of room"},
		{"another provider's room's", "mimi://beta.example/g/secret", roomExtensions(uri, "x", admin, own, new(mimi.Rules)), "is not of room"},
		{"a group that isn't a room's", "mimi://alpha.example/r/secret", roomExtensions(uri, "x", admin, own, new(mimi.Rules)), "is not of room"},
		{"one without her user", uri.Group(), roomExtensions(uri, "x", mimi.Participant{User: bob.User(), Role: mimi.RoleAdmin}, own, new(mimi.Rules)), "is a member and its user"},
		{"one in which she is banned", uri.Group(), roomExtensions(uri, "x", mimi.Participant{User: alice.User(), Role: mimi.RoleBanned}, own, new(mimi.Rules)), "is a member and its user"},
		{"one of another hub", uri.Group(), roomExtensions(uri, "x", admin, other, new(mimi.Rules)), "credential of the hub is for"},
		{"one without a hub", uri.Group(), slices.DeleteFunc(roomExtensions(uri, "x", admin, own, new(mimi.Rules)), func(e mls.Extension) bool {
			return e.Type == mls.ExtensionExternalSenders
		}), "no external sender"},
		{"the room's", uri.Group(), roomExtensions(uri, "x", admin, own, new(mimi.Rules)), ""},
	} {
		config := alice.config
		config.Policy = nil
		g, err := mls.NewGroup(config, nil, mls.GroupOptions{
			GroupID: []byte(c.group), Suite: defaultSuite, Credential: alice.credential(), Signer: alice.signer,
			Extensions: c.ext, LeafExtensions: mimi.LeafExtensions(),
		})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if err := alice.checkRoom(uri, g); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}

	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	second, f := p[0].enrolFaulty("alice", "alice-phone")
	for name, c := range map[string]struct {
		change func(*mimi.GroupInfoResponse)
		want   string
	}{
		"of another room":                  {func(r *mimi.GroupInfoResponse) { r.Room = uri }, `group info of "`},
		"that another hub has signed":      {func(r *mimi.GroupInfoResponse) { r.HubSender = other }, "credential of the hub is for"},
		"under a key of another than that": {func(r *mimi.GroupInfoResponse) { r.HubSender.SignatureKey = other.SignatureKey }, "credential of the hub"},
	} {
		f.set(func(f *faults) {
			f.info = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
				res, err := f.ClientServiceClient.GroupInfo(ctx, req)
				if err != nil {
					return nil, err
				}
				var r mimi.GroupInfoResponse
				if err := codec.Unmarshal(res.Msg.Body, &r); err != nil {
					return nil, err
				}
				c.change(&r)
				res.Msg.Body = codec.Marshal(&r)
				return res, nil
			}
		})
		if _, err := second.Join(t.Context(), room.URI()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("a group info %s: %v", name, err)
		}
	}
	f.set(func(f *faults) { f.info = nil })
	if _, err := second.Join(t.Context(), room.URI()); err != nil {
		t.Error(err)
	}
}
