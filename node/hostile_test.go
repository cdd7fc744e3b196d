package node

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// entriesFrom returns the numbers of the entries that a stream from a cursor begins with.
func entriesFrom(t *testing.T, c *testClient, seq uint64) []uint64 {
	t.Helper()
	c.seq = seq
	e := c.subscribe()
	defer e.cancel()
	var got []uint64
	for {
		ev := e.next()
		if ev.GetLive() != nil {
			return got
		}
		if ev.GetEntry() != nil {
			got = append(got, ev.GetEntry().Seq)
		}
	}
}

func TestNoCursorLeadsBeforeTheClientsMembership(t *testing.T) {
	_, laptop, phone, _, _ := twoDevices(t) // entry 1 adds the phone
	last := laptop.send("after")
	if got := entriesFrom(t, phone, math.MaxUint64); len(got) != 0 {
		t.Errorf("a cursor beyond all numbers gives the entries %v", got)
	}
	if _, err := phone.api.Acknowledge(t.Context(), connect.NewRequest(&api.AcknowledgeRequest{
		Cursors: []*api.Cursor{{Room: string(phone.room), Seq: math.MaxUint64}},
	})); err != nil {
		t.Fatal(err)
	}
	if got := must(phone.node.acked(phone.uri, phone.room))(t); got != last {
		t.Errorf("the node believes that entry %d is stored, the log ends with %d", got, last)
	}
	next := laptop.send("later")
	room := phone.room
	phone.room = "" // no cursor of its own
	if got := entriesFrom(t, phone, 0); !slices.Equal(got, []uint64{next}) {
		t.Errorf("after the acknowledgement the stream has %v, want %d", got, next)
	}
	phone.room = room
}

// TestAWelcomeBeforeItsCommitHidesNothing has a hub's Welcome come in a batch of its own, as a large one does.
func TestAWelcomeBeforeItsCommitHidesNothing(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	carol := newClient(t, beta, "carol", "carol-phone")
	carol.publish(1)
	carols := carol.subscribe()
	carols.live()
	staged, err := alice.group.Commit(nil, mls.CommitOptions{Proposals: alice.adding(carol.user), ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	seq := bob.seq + 1
	p := provider{beta.Node}
	welcome := codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: mls.NewMLSMessage(staged.Welcome()), RatchetTree: mimi.FullRatchetTree(staged.Tree())})
	if err := p.Notify(t.Context(), alpha.cfg.Domain, alice.room, []federation.Sequenced{{Seq: seq, Fanout: welcome}}); err != nil {
		t.Fatal(err)
	}
	carols.until(func() bool { return carol.group != nil })
	r := must(beta.openRoom(alice.room))(t)
	if r.durable.Load() >= seq {
		t.Errorf("entry %d counts as stored before it came", seq)
	}
	resp, got, err := alice.update(bundle(staged))
	if err != nil || resp.Code != mimi.UpdateSuccess || got != seq {
		t.Fatalf("the commit: %+v, %d, %v, want %d", resp, got, err, seq)
	}
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	agree(t, alice, bob, carol)
}

func TestAClientThatIsRemovedAndAddedInOneCommitStays(t *testing.T) {
	_, laptop, phone, laptops, phones := twoDevices(t)
	leaf, _ := laptop.leafOf(phone.uri)
	resp := must(laptop.claim(phone.user))(t)
	phone.group = nil
	seq := laptop.commit(removeLeaf(leaf), mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *resp.Clients[0].KeyPackage}})
	laptops.until(func() bool { return laptop.seq >= seq })
	for phone.group == nil {
		if ev := phones.next(); ev.GetWelcome() != nil {
			phone.process(ev)
		}
	}
	laptop.send("welcome back")
	phones.until(func() bool { return slices.Contains(phone.texts, "welcome back") })
	agree(t, laptop, phone)
}

func TestUsersOfProvidersThatNobodyApprovedAreNotAdded(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createRoom()
	var many []mimi.Participant
	for i := range 50 {
		many = append(many, mimi.Participant{User: mimi.URI(fmt.Sprintf("mimi://p%d.example/u/x", i)), Role: mimi.RoleMember})
	}
	staged, err := alice.group.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{listUpdate(mimi.ParticipantListUpdate{Added: many})}, ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	resp, _, err := alice.update(bundle(staged))
	if err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("the commit: %+v, %v", resp, err)
	}
	for _, p := range many {
		if d := n.outbox.Depth(p.User.Domain()); d != 0 {
			t.Errorf("%d items wait for %s", d, p.User.Domain())
		}
	}
}

func TestOutsidersLearnNothingOfARoom(t *testing.T) {
	n, laptop, phone, laptops, _ := twoDevices(t)
	old := phone.seal("of an old epoch")
	stale, err := phone.group.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	seq := laptop.commit()
	laptops.until(func() bool { return laptop.seq >= seq })

	// A peer without users in the room.
	p := provider{n.Node}
	update, _, err := p.Update(t.Context(), "beta.example", laptop.room, codec.Marshal(bundle(stale)))
	if err != nil || update.Code != mimi.UpdateNotAllowed || update.CurrentEpoch != 0 {
		t.Errorf("its handshake: %+v, %v", update, err)
	}
	old.Sender = "mimi://beta.example/u/eve"
	message, _, err := p.SubmitMessage(t.Context(), "beta.example", laptop.room, codec.Marshal(old))
	if err != nil || message.Code != mimi.SubmitNotAllowed || message.CurrentEpoch != 0 {
		t.Errorf("its message: %+v, %v", message, err)
	}

	// A client of this node whose user isn't a participant.
	eve := newClient(t, n, "eve", "eve-laptop")
	eve.room = laptop.room
	update, _, err = eve.update(bundle(stale))
	if err != nil || update.Code != mimi.UpdateNotAllowed || update.CurrentEpoch != 0 {
		t.Errorf("eve's handshake: %+v, %v", update, err)
	}
	old.Sender = eve.user
	message, _, err = eve.submit(old)
	if err != nil || message.Code != mimi.SubmitNotAllowed || message.CurrentEpoch != 0 {
		t.Errorf("eve's message: %+v, %v", message, err)
	}
}

// TestWelcomesComeFromTheHubThatClaimedTheKeyPackage has a third provider, which saw the KeyPackage in a room, send a
// Welcome to a room of its own.
func TestWelcomesComeFromTheHubThatClaimedTheKeyPackage(t *testing.T) {
	alpha, beta, alice, bob, _, _ := twoNodes(t)
	resp := must(alice.claim(bob.user))(t)
	staged, err := alice.group.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{
		removeLeafOf(t, alice, bob.uri), {Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *resp.Clients[0].KeyPackage}},
	}, ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	welcome := codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: mls.NewMLSMessage(staged.Welcome()), RatchetTree: mimi.FullRatchetTree(staged.Tree())})
	before := dump(t, beta.Node)
	p := provider{beta.Node}
	err = p.Notify(t.Context(), "gamma.example", "mimi://gamma.example/r/trap", []federation.Sequenced{{Seq: 1, Fanout: welcome}})
	if e := reason(err); e == nil || e.code != "notFound" {
		t.Errorf("a Welcome of another hub: %v", err)
	}
	after := dump(t, beta.Node)
	for k, v := range after {
		if before[k] != v {
			t.Errorf("it changed %q", k)
		}
	}
	if err := p.Notify(t.Context(), alpha.cfg.Domain, alice.room, []federation.Sequenced{{Seq: 9, Fanout: welcome}}); err != nil {
		t.Errorf("the Welcome of the right hub: %v", err)
	}
	again := codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: mls.NewMLSMessage(staged.Welcome()), RatchetTree: mimi.FullRatchetTree(staged.Tree())})
	waiting := func() (n int) {
		for k := range dump(t, beta.Node) {
			if strings.HasPrefix("n/"+k, string(key(prefixWelcome, bob.uri))) { // dump leaves n/ out
				n++
			}
		}
		return n
	}
	have := waiting()
	if err := p.Notify(t.Context(), alpha.cfg.Domain, alice.room, []federation.Sequenced{{Seq: 9, Fanout: again}}); err != nil || have == 0 || waiting() != have {
		t.Errorf("another Welcome for the same KeyPackage: %v, %d wait after %d", err, waiting(), have)
	}
	hash := sha256.Sum256(welcome)
	if stored := must(beta.store.Get(key(prefixFanout, alice.room, be64(9), hash[:])))(t); !bytes.Equal(stored, welcome) {
		t.Error("the Welcome of the right hub isn't stored")
	}
}

func removeLeafOf(t *testing.T, c *testClient, client mimi.URI) mls.Proposal {
	t.Helper()
	leaf, ok := c.leafOf(client)
	if !ok {
		t.Fatalf("%s isn't a member", client)
	}
	return removeLeaf(leaf)
}

func TestNobodyCanUseUpSomebodysKeyPackages(t *testing.T) {
	var c claims
	limits := Limits{ClaimsPerRequester: 300, ClaimsPerTarget: 100}
	granted := func(from string, requester, target mimi.URI) (n int) {
		for range 1000 {
			if c.allow("alpha.example", from, &mimi.KeyMaterialRequest{RequestingUser: requester, TargetUser: target}, limits) == nil {
				n++
			}
		}
		return n
	}
	about := func(name string, got, want int) {
		t.Helper()
		if got < want || got > want+5 {
			t.Errorf("%s: %d claims at once are granted, want %d", name, got, want)
		}
	}
	const alice, bob = mimi.URI("mimi://alpha.example/u/alice"), mimi.URI("mimi://alpha.example/u/bob")
	about("a provider", granted("evil.example", "mimi://evil.example/u/a", alice), 100)
	about("with another of its users", granted("evil.example", "mimi://evil.example/u/b", alice), 0)
	about("of another user", granted("evil.example", "mimi://evil.example/u/a", bob), 100)
	about("another provider", granted("good.example", "mimi://good.example/u/a", alice), 100)
	about("a user through another hub", granted("other.example", "mimi://evil.example/u/a", alice), 0)
	about("an own user", granted("alpha.example", bob, alice), 100)
	about("another own user", granted("alpha.example", "mimi://alpha.example/u/carol", alice), 100)
	for i := range 3 {
		granted("alpha.example", "mimi://alpha.example/u/dave", mimi.URI(fmt.Sprintf("mimi://alpha.example/u/x%d", i)))
	}
	about("who has claimed a lot", granted("alpha.example", "mimi://alpha.example/u/dave", alice), 0)
}

// TestOversizedSubmissionsAreRefused: the hub would take them, followers or clients wouldn't.
func TestOversizedSubmissionsAreRefused(t *testing.T) {
	n, laptop, _, _, _ := twoDevices(t)
	before := dump(t, n.Node)
	p := provider{n.Node}
	message := laptop.seal("x")
	message.Message.Private.Ciphertext = make([]byte, federation.MaxSubmitMessage)
	_, _, err := laptop.submit(message)
	if code(err) != "tooLarge" {
		t.Errorf("a message of an own client: %v", err)
	}
	proposal := must(laptop.group.Propose(nil, nil, removeLeaf(1)))(t)
	proposal.Public.Content.AuthenticatedData = make([]byte, maxHandshake)
	_, _, err = p.Update(t.Context(), "beta.example", laptop.room, codec.Marshal(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: proposal}}))
	if e := reason(err); e == nil || e.code != "tooLarge" {
		t.Errorf("a handshake: %v", err)
	}
	for k, v := range dump(t, n.Node) {
		if before[k] != v {
			t.Errorf("it changed %q", k)
		}
	}
}

// TestAProviderAnswersClaimsWithItsUsersKeyPackagesOnly: others' would have the Welcome go to the wrong provider.
func TestAProviderAnswersClaimsWithItsUsersKeyPackagesOnly(t *testing.T) {
	alpha, beta, alice, bob, _, _ := twoNodes(t)
	const carol = mimi.URI("mimi://beta.example/u/carol")
	// Beta says that bob's client is carol's.
	if _, err := beta.store.Commit(map[string][]byte{string(key(prefixDevice, carol, []byte(bob.uri))): {}}, nil); err != nil {
		t.Fatal(err)
	}
	before := dump(t, alpha.Node)
	if resp, err := alice.claim(carol); code(err) != "unavailable" {
		t.Errorf("the answer %+v, %v", resp, err)
	}
	for k, v := range dump(t, alpha.Node) {
		if before[k] != v {
			t.Errorf("it changed %q", k)
		}
	}
}

func TestAKeyPackagePublishedTwiceAtOnceIsHandedOutOnce(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	alice.createRoom()
	seen := make(map[string]int)
	for range 10 {
		packages := bob.keyPackages(5)
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				_, err := bob.api.PublishKeyPackages(t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{KeyPackages: packages}))
				if err != nil && code(err) != "busy" {
					t.Error(err)
				}
			})
		}
		done := make(chan struct{})
		go func() { group.Wait(); close(done) }()
		for running := true; running; {
			select {
			case <-done:
				running = false
			default:
			}
			resp, err := alice.claim(bob.user)
			if code(err) == "busy" {
				continue // on a slow machine there are more claims than one user may be the target of
			}
			for _, c := range must(resp, err)(t).Clients {
				if c.KeyPackage != nil {
					seen[string(c.KeyPackage.Ref())]++
				}
			}
		}
	}
	for ref, times := range seen {
		if times != 1 {
			t.Errorf("KeyPackage %x was handed out %d times", ref, times)
		}
	}
	if len(seen) == 0 {
		t.Error("nothing was claimed")
	}
}

// TestWelcomesAreForThoseWhomACommitAdds has commits without the Welcome that they need, and with one that nobody needs.
func TestWelcomesAreForThoseWhomACommitAdds(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	bob.publish(1)
	alice.createRoom()
	adding := must(alice.group.Commit(nil, mls.CommitOptions{Proposals: alice.adding(bob.user), ForcePath: true}))(t)
	without := bundle(adding)
	welcome := without.Bundle.Welcome
	without.Bundle.Welcome = nil
	if resp, _, err := alice.update(without); err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("a commit that adds somebody, without a Welcome: %+v, %v", resp, err)
	}
	if err := alice.group.Drop(nil); err != nil {
		t.Fatal(err)
	}
	with := bundle(must(alice.group.Commit(nil, mls.CommitOptions{ForcePath: true}))(t))
	with.Bundle.Welcome = welcome
	if resp, _, err := alice.update(with); err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("a commit that adds nobody, with a Welcome: %+v, %v", resp, err)
	}
}

func TestPeersClaimKeyPackagesForTheirOwnUsers(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	bob.publish(1)
	alice.createRoom()
	req := &mimi.KeyMaterialRequest{
		RequestingUser: alice.user, TargetUser: bob.user, Room: alice.room, CipherSuites: []mls.CipherSuite{testSuite},
		SignatureKey: must(testSuite.SignaturePublicKey(alice.signer.Public()))(t), Credential: mls.X509Credential(alice.chain),
	}
	if err := req.Sign(rand.Reader, testSuite, alice.signer); err != nil {
		t.Fatal(err)
	}
	p := provider{n.Node}
	resp, err := p.KeyMaterial(t.Context(), "beta.example", req)
	if e := reason(err); e == nil || e.code != "notAllowed" {
		t.Errorf("a peer with a request of a user of this node: %+v, %v", resp, err)
	}
}
