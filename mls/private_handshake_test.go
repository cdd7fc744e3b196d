package mls

import (
	"crypto/rand"
	"errors"
	"testing"
)

func TestPrivateProposalsAreReadOnce(t *testing.T) {
	f := newForgery(t)
	prop := appData(0x8001, "+")
	ac := f.sign(f.carol, FramedContent{Sender: Sender{Type: SenderMember, Leaf: f.carol.OwnLeaf()}, ContentType: ContentProposal, Proposal: &prop})
	first, again := f.encrypt(f.carol, ac), f.encrypt(f.carol, ac)
	for _, m := range []*MLSMessage{first, again} {
		got, err := f.bob.Receive(f.bob.store, wire(t, m))
		f.must(err)
		if _, ok := got.(*ReceivedProposal); !ok {
			t.Fatalf("proposal received as %T", got)
		}
		if _, err := f.bob.Receive(f.bob.store, wire(t, m)); !errors.Is(err, ErrGeneration) {
			t.Errorf("replayed: got %v, want ErrGeneration", err)
		}
	}
	if n := len(f.bob.Pending()); n != 1 {
		t.Errorf("%d proposals pending, want 1", n)
	}
	sameState(t, "bob", f.bob.store.m, dump(f.bob.Group))
}

func TestPrivateCommitsCostTheirKeyWhenApplied(t *testing.T) {
	f := newForgery(t)
	bad := f.commit(forged{private: true, props: []Proposal{remove(0)}})
	m := f.commit(forged{private: true})
	for _, c := range []*client{f.bob, f.dave} {
		before := dump(c.Group)
		if _, err := c.Receive(c.store, bad); err == nil {
			t.Errorf("%s accepts a commit that removes its committer", c.name)
		}
		var staged *StagedCommit
		for range 2 { // what was staged and not applied can be staged again
			got, err := c.Receive(c.store, wire(t, m))
			f.must(err)
			staged = got.(*StagedCommit)
		}
		sameState(t, c.name+" before", c.store.m, before)
		f.must(c.Apply(c.store, staged))
		past := c.past[len(c.past)-1]
		for g := range uint32(2) {
			_, err := past.tree.peek(f.alice.OwnLeaf(), handshakeRatchet, g, ratchetLimits{})
			if used := g == 1; errors.Is(err, ErrGeneration) != used {
				t.Errorf("%s: key %d: %v, want it deleted: %v", c.name, g, err, used)
			}
		}
		sameState(t, c.name, c.store.m, dump(c.Group))
		c.reload(t)
		if got, err := c.Receive(c.store, wire(t, m)); err != nil {
			t.Error(err)
		} else if _, ok := got.(*Duplicate); !ok {
			t.Errorf("%s: applied commit received as %T", c.name, got)
		}
	}
}

func TestNobodyEncryptsForAnother(t *testing.T) {
	f := newForgery(t)
	for leaf, want := range map[LeafIndex]error{f.carol.OwnLeaf(): ErrSignature, f.bob.OwnLeaf(): ErrSignature} {
		before := dump(f.bob.Group)
		m := f.encrypt(f.alice, f.sign(f.alice, FramedContent{
			Sender: Sender{Type: SenderMember, Leaf: leaf}, ContentType: ContentApplication, ApplicationData: []byte("x")}))
		if _, err := f.bob.Receive(f.bob.store, m); !errors.Is(err, want) {
			t.Errorf("as leaf %d: got %v, want %v", leaf, err, want)
		}
		sameState(t, "bob in memory", dump(f.bob.Group), before)
		sameState(t, "bob stored", f.bob.store.m, before)
	}
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf())}})
	m := f.encrypt(f.alice, f.sign(f.alice, FramedContent{
		Sender: Sender{Type: SenderMember, Leaf: 2}, ContentType: ContentApplication, ApplicationData: []byte("x")}))
	var ve *ValidationError
	if _, err := f.bob.Receive(f.bob.store, m); !errors.As(err, &ve) || ve.Section != "6.3.2" {
		t.Errorf("as a blank leaf: got %v, want a violation of 6.3.2", err)
	}
	public := f.proposal(f.alice, remove(1))
	public.Public.Content.ContentType, public.Public.Content.Proposal = ContentApplication, nil
	if _, err := f.bob.Receive(f.bob.store, public); !errors.Is(err, ErrMalformed) {
		t.Errorf("application data in the clear: got %v, want ErrMalformed", err)
	}
}

func TestOwnMessagesThatCannotBeReadAreToldApart(t *testing.T) {
	f := newForgery(t)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{})
	f.must(err)
	f.must(f.alice.Drop(f.alice.store))
	if _, err := f.alice.Receive(f.alice.store, c.Message()); !errors.Is(err, ErrOwnMessage) {
		t.Errorf("dropped commit: got %v, want ErrOwnMessage", err)
	}
	f.room.propose(f.bob.ProposeUpdate(f.bob.store, UpdateOptions{}))
	f.bob.state.pending[0].private = nil // as if it was sent by a copy of this client
	c, err = f.alice.Commit(f.alice.store, CommitOptions{})
	f.must(err)
	if _, err := f.bob.Receive(nil, c.Message()); !errors.Is(err, ErrOwnMessage) {
		t.Errorf("update without its key: got %v, want ErrOwnMessage", err)
	}
}

func TestMessagesStayInTheirGroup(t *testing.T) {
	f := newForgery(t)
	m, err := f.alice.Encrypt(f.alice.store, nil, []byte("x"))
	f.must(err)
	m.Private.GroupID = []byte("other")
	if _, err := f.bob.Receive(nil, m); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v, want ErrMalformed", err)
	}
}

func TestFormerMembersApplyNothing(t *testing.T) {
	f := newForgery(t)
	var staged []*StagedCommit
	for _, m := range []*MLSMessage{f.commit(forged{}), f.commit(forged{props: []Proposal{remove(f.bob.OwnLeaf())}})} {
		got, err := f.bob.Receive(f.bob.store, m)
		f.must(err)
		staged = append(staged, got.(*StagedCommit))
	}
	f.must(f.bob.Apply(f.bob.store, staged[1]))
	if err := f.bob.Apply(f.bob.store, staged[0]); !errors.Is(err, ErrRemoved) {
		t.Errorf("got %v, want ErrRemoved", err)
	}
}

func TestPrivateHandshakesOfMembers(t *testing.T) {
	r := newRoom(t, testSuite, nil).whispers()
	alice := r.members[0]
	joined := r.add(alice, "bob", "carol")
	bob, carol := joined[0], joined[1]
	r.propose(bob.ProposeUpdate(bob.store, UpdateOptions{AAD: []byte("update")}))
	m, err := carol.Propose(carol.store, []byte("why"), sharedPSK())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := alice.Receive(nil, wire(t, m)); err != nil {
		t.Fatal(err)
	} else if p := got.(*ReceivedProposal); string(p.AAD) != "why" || p.Sender.Leaf != carol.OwnLeaf() {
		t.Errorf("proposal with %q of leaf %d", p.AAD, p.Sender.Leaf)
	}
	alice.reload(t)
	r.propose(m, nil)
	c := r.commit(alice, CommitOptions{AAD: []byte("because"), Proposals: []Proposal{appData(0x8001, "x")}})
	if m := c.Message().Private; m == nil || string(m.AuthenticatedData) != "because" || len(c.Info().Proposals) != 3 {
		t.Errorf("commit of %d proposals in format %d", len(c.Info().Proposals), c.Message().WireFormat)
	}
	r.check()
	r.talk()
	r.join("dave")
	r.commit(r.members[3], CommitOptions{Proposals: []Proposal{remove(bob.OwnLeaf())}})
	r.check()
	r.talk()
	r.checkStores()
}

func TestHandshakesArePadded(t *testing.T) {
	r := newRoom(t, testSuite, nil).whispers()
	alice := r.members[0]
	alice.cfg.Padding = func(int) int { return 4096 }
	c, err := alice.Commit(nil, CommitOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := alice.Propose(nil, nil, sharedPSK())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*MLSMessage{c.Message(), p} {
		if n := len(m.Private.Ciphertext); n != 4096+16 {
			t.Errorf("%d bytes of ciphertext", n)
		}
	}
}

// TestKeysOfDroppedPrivateCommitsStayUsed: a commit that was refused may have been seen, so that nothing else is
// encrypted with its key, restart or not.
func TestKeysOfDroppedPrivateCommitsStayUsed(t *testing.T) {
	for _, restart := range []bool{false, true} {
		r := newRoom(t, testSuite, nil).whispers()
		alice := r.members[0]
		bob := r.add(alice, "bob")[0]
		before := dump(alice.Group)
		var sent []*MLSMessage
		for range 2 {
			c, err := alice.Commit(alice.store, CommitOptions{})
			if err != nil {
				t.Fatal(err)
			}
			sent = append(sent, c.Message())
			if restart {
				alice.reload(t)
			}
			own := alice.PendingCommit()
			if got, err := alice.Receive(alice.store, wire(t, own.Message())); err != nil {
				t.Fatal(err)
			} else if o, ok := got.(*OwnCommit); !ok || o.Commit != own {
				t.Fatalf("own commit received as %T", got)
			}
			if err := alice.Drop(alice.store); err != nil {
				t.Fatal(err)
			}
			if _, err := alice.Receive(alice.store, wire(t, own.Message())); !errors.Is(err, ErrOwnMessage) {
				t.Errorf("dropped commit: got %v, want ErrOwnMessage", err)
			}
			if restart {
				alice.reload(t)
			}
		}
		m, err := alice.Propose(alice.store, nil, sharedPSK())
		if err != nil {
			t.Fatal(err)
		}
		for want, m := range append(sent, m) {
			d, err := m.Private.sender(testSuite, alice.secrets.senderData)
			if err != nil {
				t.Fatal(err)
			}
			if d.generation != uint32(want) {
				t.Errorf("message %d was encrypted with key %d", want, d.generation)
			}
		}
		after := dump(alice.Group)
		for k, v := range before {
			if k[0] != keySecret && after[k] != v {
				t.Errorf("entry %q is not as before the commits", k)
			}
		}
		r.propose(m, nil)
		c := r.commit(bob, CommitOptions{})
		if len(c.Info().Proposals) != 1 {
			t.Errorf("%d proposals committed, want 1", len(c.Info().Proposals))
		}
		r.commit(alice, CommitOptions{})
		for range 2 {
			if got, err := alice.Receive(nil, r.commit(alice, CommitOptions{}).Message()); err != nil {
				t.Fatal(err)
			} else if _, ok := got.(*Duplicate); !ok {
				t.Errorf("confirmed commit received as %T", got)
			}
		}
		r.check()
		r.checkStores()
	}
}

// TestStagedPrivateCommitSurvivesRestart confirms it after one.
func TestStagedPrivateCommitSurvivesRestart(t *testing.T) {
	r := newRoom(t, testSuite, nil).whispers()
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	r.propose(bob.ProposeUpdate(bob.store, UpdateOptions{}))
	if _, err := alice.Commit(alice.store, CommitOptions{Proposals: []Proposal{appData(0x8001, "x")}}); err != nil {
		t.Fatal(err)
	}
	r.checkStores()
	alice.reload(t)
	r.checkStores()
	m := alice.PendingCommit().Message()
	if err := alice.Confirm(alice.store); err != nil {
		t.Fatal(err)
	}
	r.distribute(m, alice)
	r.check()
	r.checkStores()
}

func TestHandshakesInNoFormatAreNotSent(t *testing.T) {
	f := newForgery(t)
	before := dump(f.alice.Group)
	f.alice.cfg.HandshakeFormat = WireFormatWelcome
	for what, err := range map[string]error{"commit": second(f.alice.Commit(f.alice.store, CommitOptions{})),
		"proposal": second(f.alice.Propose(f.alice.store, nil, remove(1)))} {
		if !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: got %v, want ErrUnsupported", what, err)
		}
	}
	sameState(t, "alice", dump(f.alice.Group), before)
}

// failing is randomness that ends after some bytes.
type failing struct{ left int }

func (r *failing) Read(p []byte) (int, error) {
	if r.left -= len(p); r.left < 0 {
		return 0, errors.New("no randomness left")
	}
	return rand.Read(p)
}

func TestFailedPrivateHandshakesUseNoKey(t *testing.T) {
	r := newRoom(t, testSuite, nil).whispers()
	alice := r.members[0]
	r.add(alice, "bob")
	before, stored := dump(alice.Group), alice.store.clone()
	for what, try := range map[string]func() error{
		"commit":   func() error { return second(alice.Commit(alice.store, CommitOptions{})) },
		"proposal": func() error { return second(alice.Propose(alice.store, nil, sharedPSK())) },
	} {
		failed := 0
		for ; failed < 1000; failed++ {
			alice.cfg.Rand = &failing{left: failed}
			if try() == nil {
				break
			}
			sameState(t, what, dump(alice.Group), before)
			sameState(t, what+" stored", alice.store.m, before)
		}
		if failed == 0 || failed == 1000 {
			t.Errorf("%s: failed with up to %d bytes of randomness", what, failed)
		}
		alice.store = stored.clone()
		alice.reload(t)
	}
}
