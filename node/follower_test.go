package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// twoNodes is a room of alice's at alpha with bob at beta in it.
func twoNodes(t *testing.T) (alpha, beta *testNode, alice, bob *testClient, alices, bobs *events) {
	t.Helper()
	alpha, beta = newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, bob = newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	bob.publish(3)
	bobs = bob.subscribe()
	bobs.live()
	alice.createRoom()
	alices = alice.subscribe()
	alices.live()
	seq := alice.commit(alice.adding(bob.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.group != nil })
	return alpha, beta, alice, bob, alices, bobs
}

func TestFollowerCatchesUpAfterItsRestart(t *testing.T) {
	_, beta, alice, bob, alices, bobs := twoNodes(t)
	alice.send("before")
	bobs.until(func() bool { return slices.Contains(bob.texts, "before") })
	beta.stop()
	var want []string
	for i := range 5 {
		text := fmt.Sprint("while beta is down ", i)
		alice.send(text)
		want = append(want, text)
	}
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	alice.send("in the next epoch")
	want = append([]string{"before"}, append(want, "in the next epoch")...)
	beta.start()
	bob.authenticate()
	bobs = bob.subscribe()
	bobs.until(func() bool { return len(bob.texts) >= len(want) })
	if !slices.Equal(bob.texts, want) {
		t.Errorf("bob reads %q, want %q", bob.texts, want)
	}
	agree(t, alice, bob)
}

func TestFollowerResumesAfterHubRestart(t *testing.T) {
	alpha, _, alice, bob, _, bobs := twoNodes(t)
	message := bob.seal("while alpha is down")
	alpha.stop()
	if _, _, err := bob.submit(message); code(err) != "hubUnreachable" {
		t.Fatalf("with the hub down: %v", err)
	}
	alpha.start()
	alice.authenticate()
	alices := alice.subscribe()
	var seq uint64
	eventually(t, func() error {
		resp, s, err := bob.submit(message) // the same bytes
		if err != nil {
			return err
		}
		if resp.Code != mimi.SubmitAccepted {
			return fmt.Errorf("the hub answers %v", resp.Code)
		}
		seq = s
		return nil
	})
	alices.until(func() bool { return slices.Contains(alice.texts, "while alpha is down") })
	bobs.until(func() bool { return bob.seq >= seq })
	if _, again, err := bob.submit(message); err != nil || again != seq {
		t.Errorf("the same bytes again: %d, %v, want %d", again, err, seq)
	}
}

func TestNewDeviceOfAFollowersUserJoinsByExternalCommit(t *testing.T) {
	_, beta, alice, bob, alices, bobs := twoNodes(t)
	tablet := newClient(t, beta, "bob", "bob-tablet")
	rooms := must(tablet.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})))(t).Msg.Rooms
	if len(rooms) != 1 || rooms[0].Room != string(alice.room) || rooms[0].Joined {
		t.Fatalf("the tablet may join %v", rooms)
	}
	tablet.room = alice.room
	stream := tablet.subscribe()
	stream.live()
	seq := tablet.externalJoin()
	tablet.seq = seq - 1
	bobs.until(func() bool { return bob.seq >= seq })
	alices.until(func() bool { return alice.seq >= seq })
	agree(t, alice, bob, tablet)
	alice.send("hello tablet")
	stream.until(func() bool { return slices.Contains(tablet.texts, "hello tablet") })
	tablet.send("hello from the tablet")
	alices.until(func() bool { return slices.Contains(alice.texts, "hello from the tablet") })
	bobs.until(func() bool { return slices.Contains(bob.texts, "hello from the tablet") })
}

// groupInfo fetches and opens the GroupInfo of the client's room, with a joining code if there is one.
func (c *testClient) groupInfo(joining ...byte) (*mimi.GroupInfoResponse, *mimi.GroupInfoRatchetTree, error) {
	pub, private, err := testSuite.GenerateHPKEKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	req := &mimi.GroupInfoRequest{
		CipherSuite: testSuite, SignatureKey: must(testSuite.SignaturePublicKey(c.signer.Public()))(c.t),
		Credential: mls.X509Credential(c.chain), GroupInfoPublicKey: pub,
		JoiningCode: joining,
	}
	if err := req.Sign(rand.Reader, c.signer); err != nil {
		return nil, nil, err
	}
	resp, err := c.api.GroupInfo(c.t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(c.room), Body: codec.Marshal(req)}))
	if err != nil {
		return nil, nil, err
	}
	var out mimi.GroupInfoResponse
	if err := codec.Unmarshal(resp.Msg.Body, &out); err != nil {
		return nil, nil, err
	}
	if out.Code != mimi.GroupInfoSuccess {
		return &out, nil, nil
	}
	plain, err := out.Open(c.room, private)
	return &out, plain, err
}

// externalJoin joins the client's room and returns the commit's number.
func (c *testClient) externalJoin(props ...mls.Proposal) uint64 {
	c.t.Helper()
	p, resp, seq := c.tryExternalJoin(nil, props...)
	if resp.Code != mimi.UpdateSuccess {
		c.t.Fatalf("external commit: %+v", resp)
	}
	c.group = must(p.Confirm(nil))(c.t)
	return seq
}

// tryExternalJoin is externalJoin with a joining code for the GroupInfo, and with what the hub answers.
func (c *testClient) tryExternalJoin(joining []byte, props ...mls.Proposal) (*mls.PendingJoin, *mimi.UpdateRoomResponse, uint64) {
	c.t.Helper()
	return c.joinWith(joining, func(o *mls.ExternalJoinOptions) { o.Proposals = props })
}

// joinWith sends an external commit that edit has changed, with the SelfRemoves that are pending.
func (c *testClient) joinWith(joining []byte, edit func(*mls.ExternalJoinOptions)) (*mls.PendingJoin, *mimi.UpdateRoomResponse, uint64) {
	c.t.Helper()
	_, plain, err := c.groupInfo(joining...)
	if err != nil || plain == nil {
		c.t.Fatalf("group info: %v", err)
	}
	o := mls.ExternalJoinOptions{
		GroupInfo: plain.GroupInfo, Tree: plain.RatchetTree.Tree, Credential: mls.X509Credential(c.chain), Signer: c.signer,
		LeafExtensions: mimi.LeafExtensions(), SelfRemoves: plain.SelfRemoves(),
	}
	edit(&o)
	p, err := mls.ExternalJoin(c.config(), o)
	if err != nil {
		c.t.Fatal(err)
	}
	resp, seq, err := c.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
		Message: p.Message(), GroupInfo: mimi.FullGroupInfo(p.GroupInfo()), RatchetTree: mimi.FullRatchetTree(p.Tree()),
	}})
	if err != nil {
		c.t.Fatalf("external commit: %v", err)
	}
	return p, resp, seq
}

func TestOnlyParticipantsGetTheGroupInfo(t *testing.T) {
	_, beta, alice, _, _, _ := twoNodes(t)
	eve := newClient(t, beta, "eve", "eve-laptop")
	eve.room = alice.room
	if resp, _, err := eve.groupInfo(); err != nil || resp.Code != mimi.GroupInfoNotAuthorized {
		t.Errorf("somebody else gets %+v, %v", resp, err)
	}
	eve.room = "mimi://alpha.example/r/unknown"
	if resp, _, err := eve.groupInfo(); err != nil || resp.Code != mimi.GroupInfoNoSuchRoom {
		t.Errorf("of an unknown room: %+v, %v", resp, err)
	}
}

func TestRevocationOfAFollowersClientReachesTheHub(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	tablet := newClient(t, beta, "bob", "bob-tablet")
	tablet.room = alice.room
	seq := tablet.externalJoin()
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	staged, err := tablet.group.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := beta.service.Revoke(t.Context(), string(tablet.uri), "stolen"); err != nil {
		t.Fatal(err)
	}
	alices.until(func() bool { return len(alice.group.Pending()) > 0 })
	bobs.until(func() bool { return len(bob.group.Pending()) > 0 })
	resp, _, err := alice.update(bundle(staged))
	if err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("its commit, carried by alice: %+v, %v", resp, err)
	}
	// An external commit doesn't save it: the hub proposes the removal anew, in the same entry.
	phone := newClient(t, alpha, "alice", "alice-phone")
	phone.room = alice.room
	phones := phone.subscribe()
	joined := phone.externalJoin()
	phone.seq = joined - 1
	alices.until(func() bool { return alice.seq >= joined })
	phones.until(func() bool { return phone.seq >= joined })
	if len(alice.group.Pending()) != 1 || len(phone.group.Pending()) != 1 {
		t.Errorf("with the external commit come %d and %d proposals", len(alice.group.Pending()), len(phone.group.Pending()))
	}
	seq = phone.commit()
	phones.until(func() bool { return phone.seq >= seq })
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	agree(t, alice, bob, phone)
	if _, ok := alice.leafOf(tablet.uri); ok {
		t.Error("the revoked client is still a member")
	}
}

func TestRemovalsAreProposedThatACrashCutOff(t *testing.T) {
	alpha, beta, alice, bob, _, bobs := twoNodes(t)
	alpha.stop()
	if _, err := beta.service.Revoke(t.Context(), string(bob.uri), "stolen"); err != nil {
		t.Fatal(err)
	}
	if err := bobs.ended(); code(err) != "revoked" {
		t.Errorf("bob's stream ended with %v", err)
	}
	alpha.start()
	alice.authenticate()
	alices := alice.subscribe()
	alices.until(func() bool { return len(alice.group.Pending()) > 0 })
}

func TestLeavingIsProposedAndCommittedByOthers(t *testing.T) {
	_, _, alice, bob, alices, bobs := twoNodes(t)
	leaf, _ := bob.leafOf(bob.uri)
	first, err := bob.group.Propose(nil, nil, removeLeaf(leaf))
	if err != nil {
		t.Fatal(err)
	}
	second, err := bob.group.Propose(nil, nil, listUpdate(mimi.ParticipantListUpdate{Removed: []uint32{1}}))
	if err != nil {
		t.Fatal(err)
	}
	resp, seq, err := bob.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: first, MoreProposals: []*mls.MLSMessage{second}}})
	if err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatalf("the proposals: %+v, %v", resp, err)
	}
	alices.until(func() bool { return alice.seq >= seq })
	seq = alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	if bob.group.Active() {
		t.Error("bob's client doesn't know that it was removed")
	}
	if _, ok := alice.leafOf(bob.uri); ok {
		t.Error("bob is still there")
	}
	if _, err := bob.api.Acknowledge(t.Context(), connect.NewRequest(&api.AcknowledgeRequest{Welcome: bob.welcome, Left: []string{string(bob.room)}})); err != nil {
		t.Fatal(err)
	}
	if rooms := must(bob.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})))(t).Msg.Rooms; len(rooms) != 0 {
		t.Errorf("bob's node still lists %v", rooms)
	}
	if resp, _, err := bob.submit(&mimi.SubmitMessageRequest{Message: alice.seal("x").Message, Sender: bob.user}); err != nil || resp.Code != mimi.SubmitNotAllowed {
		t.Errorf("bob submits after he left: %+v, %v", resp, err)
	}
}

func TestRepeatedNotificationsChangeNothing(t *testing.T) {
	_, beta, alice, bob, _, bobs := twoNodes(t)
	seq := alice.send("once")
	bobs.until(func() bool { return bob.seq >= seq })
	f := must(beta.entry(alice.room, seq))(t)
	before := dump(t, beta.Node)
	p := provider{beta.Node}
	encoded := codec.Marshal(f)
	for range 2 {
		if err := p.Notify(t.Context(), "alpha.example", alice.room, []federation.Sequenced{{Seq: seq, Fanout: encoded}}); err != nil {
			t.Error(err)
		}
	}
	for k, v := range dump(t, beta.Node) {
		if before[k] != v {
			t.Errorf("a repetition changed %q", k)
		}
	}
	// A hub that numbers nothing is known by the bytes. It is one of plain MIMI, without heads.
	f.Timestamp++
	other := codec.Marshal(f)
	r := must(beta.openRoom(alice.room))(t)
	r.heads.last.Store(nil)
	for range 2 {
		if err := p.Notify(t.Context(), "alpha.example", alice.room, []federation.Sequenced{{Fanout: other}}); err != nil {
			t.Error(err)
		}
	}
	if r.record.last != seq+1 {
		t.Errorf("the log ends at %d, want %d", r.record.last, seq+1)
	}
}

func TestIdentifierQueryFindsExactHandlesOnlyWithoutAProfile(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice := newClient(t, alpha, "alice", "alice-laptop")
	newClient(t, beta, "bob", "bob-phone")
	query := func(domain string, kind mimi.SearchIdentifierType, value string) (*mimi.IdentifierResponse, error) {
		body := codec.Marshal(&mimi.IdentifierRequest{Elements: []mimi.QueryElement{{Type: kind, Value: []byte(value)}}})
		resp, err := alice.api.Query(t.Context(), connect.NewRequest(&api.QueryRequest{Domain: domain, Body: body}))
		if err != nil {
			return nil, err
		}
		out := new(mimi.IdentifierResponse)
		return out, codec.Unmarshal(resp.Msg.Body, out)
	}
	for _, c := range []struct {
		domain, value string
		kind          mimi.SearchIdentifierType
		code          mimi.IdentifierQueryCode
	}{
		{"beta.example", "bob@beta.example", mimi.SearchHandle, mimi.IdentifierSuccess},
		{"beta.example", "im:bob@beta.example", mimi.SearchHandle, mimi.IdentifierSuccess},
		{"alpha.example", "alice@alpha.example", mimi.SearchHandle, mimi.IdentifierSuccess},
		{"beta.example", "bo@beta.example", mimi.SearchHandle, mimi.IdentifierNotFound},
		{"beta.example", "alice@alpha.example", mimi.SearchHandle, mimi.IdentifierNotFound},
		{"beta.example", "bob", mimi.SearchPartialName, mimi.IdentifierNotFound},
	} {
		resp, err := query(c.domain, c.kind, c.value)
		if err != nil || resp.Code != c.code {
			t.Errorf("%s at %s: %+v, %v, want %v", c.value, c.domain, resp, err, c.code)
		}
	}
	if _, err := query("gamma.example", mimi.SearchHandle, "x@gamma.example"); code(err) != "unapprovedPeer" {
		t.Errorf("at a provider that isn't approved: %v", err)
	}
	beta.stop()
	if _, err := query("beta.example", mimi.SearchHandle, "bob@beta.example"); code(err) != "hubUnreachable" {
		t.Errorf("at a node that is down: %v", err)
	}
}

func TestUnapprovedPeersGetNoConnection(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	if err := DialAdmin(alpha.cfg.Socket()).ApprovePeer(t.Context(), "beta.example", beta.root, beta.cfg.Listen); err != nil {
		t.Fatal(err)
	}
	if _, err := alpha.federation.FetchBundle(t.Context(), "beta.example"); err == nil {
		t.Error("beta gave its bundle to a node that it hasn't approved")
	}
	if err := DialAdmin(beta.cfg.Socket()).ApprovePeer(t.Context(), "alpha.example", alpha.root, alpha.cfg.Listen); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, err := alpha.federation.FetchBundle(t.Context(), "beta.example")
		return err
	})
	if err := DialAdmin(beta.cfg.Socket()).RemovePeer(t.Context(), "alpha.example"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if _, err := alpha.federation.FetchBundle(t.Context(), "beta.example"); err == nil {
			return errors.New("beta still serves a node whose approval was taken back")
		}
		return nil
	})
}
