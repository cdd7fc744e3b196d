package mls

import (
	"errors"
	"slices"
	"testing"
)

func TestMembersRemoveThemselves(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.propose(f.dave.ProposeUpdate(f.dave.store, UpdateOptions{}))
	r.propose(f.dave.ProposeSelfRemove(f.dave.store)) // supersedes the Update,
	r.propose(f.bob.Propose(f.bob.store, nil, remove(f.dave.OwnLeaf())))
	if _, err := f.dave.ProposeSelfRemove(f.dave.store); err == nil {
		t.Error("a second one in an epoch")
	}
	for _, c := range r.members {
		c.reload(t)
	}
	c := r.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.dave.OwnLeaf())}}) // and all Removes
	if n := len(c.Info().Proposals); n != 1 || c.Info().Proposals[0].Proposal.Type != ProposalSelfRemove {
		t.Errorf("committed %v", c.Info().Proposals)
	}
	if f.dave.Active() {
		t.Error("dave is still a member")
	}
	r.check()
	r.talk()
	r.checkStores()

	// A commit of who wants to go leaves the wish open.
	r.propose(f.carol.ProposeSelfRemove(f.carol.store))
	r.commit(f.carol, CommitOptions{})
	if len(r.members) != 3 {
		t.Error("carol has removed herself")
	}
	r.check()
}

func TestDisregardedProposalsAreNotCommittedAndHoldNothingUp(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.propose(f.bob.Propose(f.bob.store, nil, remove(f.dave.OwnLeaf())))
	if _, err := f.alice.Encrypt(f.alice.store, nil, []byte("too early")); !errors.Is(err, ErrPending) {
		t.Errorf("with a proposal: %v", err)
	}
	f.alice.Disregard(func(p PendingProposal) bool {
		return p.Proposal.Remove != nil && p.Proposal.Remove.Removed == f.dave.OwnLeaf() && len(f.alice.Pending()) > 0
	})
	if _, err := f.alice.Encrypt(f.alice.store, nil, []byte("it is disregarded")); err != nil {
		t.Error(err)
	}
	r.propose(f.carol.Propose(f.carol.store, nil, remove(f.bob.OwnLeaf())))
	c := r.commit(f.alice, CommitOptions{})
	if list := c.Info().Removed; len(list) != 1 || list[0].Index != f.bob.OwnLeaf() {
		t.Errorf("removed: %v", list)
	}
	r.propose(f.carol.Propose(f.carol.store, nil, remove(f.dave.OwnLeaf())))
	r.commit(f.carol, CommitOptions{}) // which alice follows
	r.check()
}

func TestNewMembersCommitSelfRemoves(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+"))) // not for new members
	r.propose(f.carol.ProposeSelfRemove(f.carol.store))
	r.propose(f.dave.ProposeSelfRemove(f.dave.store))
	r.checkStores()
	if a, b := f.alice.SelfRemoves(), r.server.SelfRemoves(); len(a) != 2 || !slices.EqualFunc(a, b, func(x, y *MLSMessage) bool {
		return string(x.Public.MembershipTag) == string(y.Public.MembershipTag)
	}) {
		t.Errorf("alice hands out %d messages, the server %d", len(a), len(b))
	}
	tree := fresh(t, r.server.Tree())
	join := func(edit func([]*MLSMessage) []*MLSMessage) error {
		var list []*MLSMessage
		for _, m := range r.server.SelfRemoves() {
			list = append(list, wire(t, m))
		}
		_, err := ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: r.server.GroupInfo(), Tree: fresh(t, tree),
			Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite), SelfRemoves: edit(list)})
		return err
	}
	for name, c := range map[string]struct {
		edit func([]*MLSMessage) []*MLSMessage
		is   error
	}{
		"signature":      {func(l []*MLSMessage) []*MLSMessage { l[0].Public.Signature = flip(l[0].Public.Signature); return l }, ErrSignature},
		"another sender": {func(l []*MLSMessage) []*MLSMessage { l[0].Public.Content.Sender.Leaf = 1; return l }, ErrSignature},
		"another epoch":  {func(l []*MLSMessage) []*MLSMessage { l[0].Public.Content.Epoch--; return l }, ErrEpoch},
		"twice":          {func(l []*MLSMessage) []*MLSMessage { return append(l, l[0]) }, nil},
		"another proposal": {func(l []*MLSMessage) []*MLSMessage {
			return append(l, f.proposal(f.bob, remove(f.carol.OwnLeaf())))
		}, ErrMalformed},
	} {
		if err := join(c.edit); err == nil || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := join(func(l []*MLSMessage) []*MLSMessage {
		l[0].Public.MembershipTag = nil // who joins can't check it
		return l
	}); err != nil {
		t.Error(err)
	}
	r.join("carol", remove(f.carol.OwnLeaf())) // who comes back in the place of the client that goes
	if len(r.members) != 3 || f.carol.Active() || f.dave.Active() {
		t.Error("who wanted to go is still there")
	}
	r.check()
	r.talk()
	r.checkStores()
}

func TestSelfRemovesAreNotPrivate(t *testing.T) {
	f := newForgery(t)
	p := selfRemove()
	m := f.encrypt(f.carol, f.sign(f.carol, FramedContent{Sender: Sender{Type: SenderMember, Leaf: f.carol.OwnLeaf()},
		ContentType: ContentProposal, Proposal: &p}))
	before := dump(f.bob.Group)
	var ve *ValidationError
	if _, err := f.bob.Receive(f.bob.store, m); !errors.As(err, &ve) || ve.Section != sectionSelfRemove {
		t.Errorf("got %v, want a violation of %s", err, sectionSelfRemove)
	}
	sameState(t, "bob", dump(f.bob.Group), before)
}

// A Remove that a SelfRemove makes needless isn't lost when that can't be committed.
func TestRemovesAreNotReplacedByWhatThePolicyRefuses(t *testing.T) {
	f := newForgery(t)
	f.room.propose(f.carol.ProposeSelfRemove(f.carol.store))
	f.alice.cfg.Policy = func(info *StagedInfo) error {
		if slices.ContainsFunc(info.Proposals, func(p PendingProposal) bool { return p.Proposal.Type == ProposalSelfRemove }) {
			return errors.New("no")
		}
		return nil
	}
	o := CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf())}}
	if _, err := f.alice.Commit(nil, o); err == nil {
		t.Error("a commit without the remove")
	}
	o.SkipPending = true
	if _, err := f.alice.Commit(nil, o); err != nil {
		t.Error(err)
	}
}

func TestManyRemoveThemselvesAfterARestart(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	leaving := r.add(alice, "b", "c", "d", "e", "f", "g", "h", "i", "j")
	for _, c := range leaving {
		r.propose(c.ProposeSelfRemove(c.store))
	}
	r.reload() // nothing is computed yet of what a check needs
	r.commit(alice, CommitOptions{})
	if n := alice.Tree().Count(); n != 1 {
		t.Errorf("%d members, 1 wanted", n)
	}
	r.check()
}
