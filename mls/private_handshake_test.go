package mls

import (
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
