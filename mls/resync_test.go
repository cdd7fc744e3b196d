package mls

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// fork makes carol's group another one than the server's and the other members': she takes a commit for accepted that
// wasn't. All are in the same epoch.
func fork(t *testing.T) *forgery {
	t.Helper()
	f := newForgery(t)
	f.room.talk()
	lost, err := f.carol.Commit(f.carol.store, CommitOptions{})
	f.must(err)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{})
	f.must(err)
	f.room.accept(c.Message(), c.GroupInfo(), c.Tree())
	f.must(f.alice.Confirm(f.alice.store))
	for _, m := range []*client{f.bob, f.dave} {
		got, err := m.Receive(m.store, c.Message())
		f.must(err)
		f.must(m.Apply(m.store, got.(*StagedCommit)))
	}
	if f.carol.PendingCommit() != lost {
		t.Fatal("carol has no commit to mistake")
	}
	f.must(f.carol.Confirm(f.carol.store))
	f.room.members = slices.DeleteFunc(f.room.members, func(c *client) bool { return c == f.carol })
	return f
}

// resyncOptions are those for the group as the server has it.
func (f *forgery) resyncOptions() ResyncOptions {
	return ResyncOptions{GroupInfo: f.server.GroupInfo(), Tree: fresh(f.TB, f.server.Tree())}
}

// acceptResync orders a resync, has the others follow, and confirms it.
func (f *forgery) acceptResync(p *PendingJoin) {
	f.TB.Helper()
	f.room.accept(p.Message(), p.GroupInfo(), p.Tree())
	f.room.distribute(p.Message(), f.carol)
	f.must(f.carol.Confirm(f.carol.store))
}

// together checks that carol is in the group of the others, once, and that her store has nothing else.
func (f *forgery) together(t *testing.T) {
	t.Helper()
	sameState(t, "carol", f.carol.store.m, dump(f.carol.Group))
	if !slices.Contains(f.room.members, f.carol) {
		f.room.members = append(f.room.members, f.carol)
	}
	n := 0
	for m := range f.alice.Members() {
		if bytes.HasPrefix(m.Leaf.Credential.Identity, f.carol.Tree().Leaf(f.carol.OwnLeaf()).Credential.Identity) {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d leaves of carol", n)
	}
	for _, c := range f.room.members {
		f.must(c.CheckAuthenticator(f.alice.Epoch(), f.alice.EpochAuthenticator()))
	}
	f.room.talk()
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func TestForkIsDetected(t *testing.T) {
	f := fork(t)
	epoch, former := f.alice.Epoch(), f.alice.EpochAuthenticator()
	wantError(t, "before the next", f.carol.CheckAuthenticator(epoch, former), ErrFork)
	f.room.commit(f.alice, CommitOptions{})
	f.must(second(f.carol.Commit(f.carol.store, CommitOptions{})))
	f.must(f.carol.Confirm(f.carol.store))
	epoch++
	for _, reload := range []bool{false, true} {
		if reload {
			f.carol.reload(t)
			f.bob.reload(t)
		}
		wantError(t, "another member's", f.carol.CheckAuthenticator(epoch, f.alice.EpochAuthenticator()), ErrFork)
		wantError(t, "a short one", f.carol.CheckAuthenticator(epoch, nil), ErrFork)
		f.must(f.bob.CheckAuthenticator(epoch, f.alice.EpochAuthenticator()))
		f.must(f.bob.CheckAuthenticator(epoch-1, former))
		wantError(t, "past epoch", f.carol.CheckAuthenticator(epoch-1, former), ErrFork)
		wantError(t, "epoch to come", f.carol.CheckAuthenticator(epoch+1, f.alice.EpochAuthenticator()), ErrEpoch)
	}
}

func TestResyncReplacesTheState(t *testing.T) {
	f := fork(t)
	old := dump(f.carol.Group)
	p, err := f.carol.Resync(f.carol.store, f.resyncOptions())
	f.must(err)
	for _, restart := range []bool{false, true} {
		if restart {
			f.carol.reload(t)
			if !bytes.Equal(codec.Marshal(f.carol.PendingResync().Message()), codec.Marshal(p.Message())) {
				t.Fatal("another commit after the restart")
			}
		}
		before := whole(f.carol.Group)
		_, err = f.carol.Encrypt(f.carol.store, nil, nil)
		wantError(t, "encrypt", err, ErrResync)
		_, err = f.carol.Commit(f.carol.store, CommitOptions{})
		wantError(t, "commit", err, ErrResync)
		_, err = f.carol.Propose(f.carol.store, nil, remove(1))
		wantError(t, "propose", err, ErrResync)
		_, err = f.carol.Resync(f.carol.store, f.resyncOptions())
		wantError(t, "second resync", err, ErrResync)
		_, err = f.carol.PendingResync().Confirm(newMemStore())
		wantError(t, "confirmed on its own", err, ErrResync)
		unchanged(t, "carol", whole(f.carol.Group), before)
		sameState(t, "carol", f.carol.store.m, dump(f.carol.Group))
	}
	f.acceptResync(p)
	for k, v := range f.carol.store.m {
		if old[k] == v {
			switch k[0] {
			case keyNode, keyExtensions: // public, and the same in both
			default:
				t.Errorf("entry %q is of the old state", k)
			}
		}
	}
	f.together(t)
	f.carol.reload(t)
	f.together(t)
	f.room.commit(f.carol, CommitOptions{})
	f.together(t)
}

func TestResyncCanNotBeDoneTwice(t *testing.T) {
	f := fork(t)
	stale := f.resyncOptions()
	again := func(what string) {
		t.Helper()
		stale.Tree = fresh(t, stale.Tree)
		before := whole(f.carol.Group)
		_, err := f.carol.Resync(f.carol.store, stale)
		wantError(t, what, err, ErrEpoch)
		unchanged(t, what, whole(f.carol.Group), before)
		sameState(t, what, f.carol.store.m, dump(f.carol.Group))
	}
	refused, err := f.carol.Resync(f.carol.store, f.resyncOptions())
	f.must(err)
	f.room.commit(f.alice, CommitOptions{}) // goes first
	if _, err := f.server.CheckCommit(refused.Message().Public); !errors.Is(err, ErrEpoch) {
		t.Errorf("the server takes a late resync: %v", err)
	}
	f.must(f.carol.Drop(f.carol.store))
	again("after a drop")
	f.carol.reload(t)
	again("after a drop and a restart")

	p, err := f.carol.Resync(f.carol.store, f.resyncOptions())
	f.must(err)
	used := f.resyncOptions()
	f.acceptResync(p)
	f.together(t)
	stale = used
	again("after it was accepted")
	f.carol.reload(t)
	again("after it was accepted and a restart")
	for _, c := range f.room.members {
		if got, err := c.Receive(c.store, p.Message()); err == nil {
			if _, ok := got.(*Duplicate); !ok {
				t.Errorf("%s takes the same resync again: %T", c.name, got)
			}
		}
	}
	if _, err := f.server.CheckCommit(p.Message().Public); !errors.Is(err, ErrEpoch) {
		t.Errorf("the server takes the same resync again: %v", err)
	}
	f.together(t)
}

func TestResyncProvesMembershipAndChangesTheSigner(t *testing.T) {
	f := fork(t)
	o := f.resyncOptions()
	signer := newSigner(t, testSuite)
	o.Signer = signer
	o.Proposals = []Proposal{psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageApplication, GroupID: f.carol.GroupID(), Epoch: f.carol.Epoch() - 1})}
	p, err := f.carol.Resync(f.carol.store, o)
	f.must(err)
	g, err := LoadGroup(f.carol.cfg, f.carol.signer, f.carol.store.all())
	f.must(err)
	wantError(t, "confirmed without the signer", g.Confirm(f.carol.store), ErrSigner)
	f.must(g.AddSigner(signer))
	f.carol.Group, f.carol.signer = g, signer
	f.acceptResync(p)
	f.together(t)
}

func TestResyncIsForMembers(t *testing.T) {
	f := fork(t)
	other := f.resyncOptions()
	gi := *other.GroupInfo
	gi.GroupContext.GroupID = []byte("other")
	other.GroupInfo = &gi
	_, err := f.carol.Resync(f.carol.store, other)
	wantError(t, "another group", err, ErrMalformed)
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf())}})
	_, err = f.carol.Resync(f.carol.store, f.resyncOptions())
	wantError(t, "after a removal", err, ErrRemoved)
	f.must(second(f.carol.Commit(nil, CommitOptions{})))
	_, err = f.carol.Resync(f.carol.store, f.resyncOptions())
	wantError(t, "with a commit staged", err, ErrStaged)
}

// TestRejoinAfterRemovalAndAddition has a member remove and add carol in one commit.
func TestRejoinAfterRemovalAndAddition(t *testing.T) {
	f := fork(t)
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Signer: newSigner(t, testSuite),
		Credential: f.carol.Tree().Leaf(f.carol.OwnLeaf()).Credential})
	f.must(err)
	_, err = f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{add(kp)}})
	var invalid *ValidationError
	if !errors.As(err, &invalid) || invalid.Section != "12.2" {
		t.Errorf("carol is added twice: %v", err)
	}
	_, kp, secrets = sameClient(t, f.carol)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf()), add(kp)}})
	f.must(err)
	f.room.accept(c.Message(), c.GroupInfo(), c.Tree())
	f.must(f.alice.Confirm(f.alice.store))
	f.room.distribute(c.Message(), f.alice)

	rejoin := func() error {
		return f.carol.Rejoin(f.carol.store, f.carol.signer, c.Welcome(), kp, secrets, fresh(t, c.Tree()))
	}
	f.must(second(f.carol.Resync(f.carol.store, ResyncOptions{GroupInfo: f.server.GroupInfo(), Tree: fresh(t, f.server.Tree())})))
	f.must(rejoin()) // and the resync is forgotten
	f.together(t)
	for _, restart := range []bool{false, true} {
		if restart {
			f.carol.reload(t)
		}
		before := whole(f.carol.Group)
		wantError(t, "the same welcome again", rejoin(), ErrEpoch)
		unchanged(t, "carol", whole(f.carol.Group), before)
	}
	_, err = f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{add(kp)}})
	if !errors.As(err, &invalid) {
		t.Errorf("a key package is added twice: %v", err)
	}
	f.together(t)
}

// TestOthersWelcomesAndLeavesAreRefused: a client re-enters the same group, in place of the one leaf that is its own.
func TestOthersWelcomesAndLeavesAreRefused(t *testing.T) {
	f := newForgery(t)
	g, err := NewGroup(testConfig(), nil, GroupOptions{GroupID: []byte("another"), Suite: testSuite, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite)})
	f.must(err)
	_, kp, secrets := sameClient(t, f.carol)
	c, err := g.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})
	f.must(err)
	before := whole(f.carol.Group)
	wantError(t, "welcome to another group", f.carol.Rejoin(f.carol.store, f.carol.signer, c.Welcome(), kp, secrets, fresh(t, c.Tree())), ErrMalformed)
	unchanged(t, "carol", whole(f.carol.Group), before)

	tree := f.carol.Tree().clone()
	for _, i := range []LeafIndex{f.carol.OwnLeaf(), f.dave.OwnLeaf()} { // two of one credential, with other keys
		l := f.carol.Tree().Leaf(f.carol.OwnLeaf()).clone()
		l.SignatureKey = []byte{byte(i)}
		tree.setLeaf(i, l)
	}
	if _, err := f.carol.formerLeaf(tree); !section(err, "12.2") {
		t.Errorf("two leaves of the client: got %v, want a violation of 12.2", err)
	}
}

// TestFormerMemberRejoins joins in place of what a removal has left.
func TestFormerMemberRejoins(t *testing.T) {
	f := newForgery(t)
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf())}})
	_, kp, secrets := sameClient(t, f.carol)
	c := f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{add(kp)}, TreeInWelcome: true})
	f.must(f.carol.Rejoin(f.carol.store, f.carol.signer, c.Welcome(), kp, secrets, nil))
	f.together(t)
	f.carol.reload(t)
	f.together(t)
}

// sameClient makes a KeyPackage of a client with its signer.
func sameClient(t *testing.T, c *client) (*client, *KeyPackage, *KeyPackageSecrets) {
	t.Helper()
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Signer: c.signer, Credential: BasicCredential([]byte(c.name))})
	if err != nil {
		t.Fatal(err)
	}
	return c, kp, secrets
}

func TestFormerMembersNeitherCompareNorResync(t *testing.T) {
	f := newForgery(t)
	gone := f.dave
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(gone.OwnLeaf())}})
	if gone.Active() {
		t.Fatal("still a member")
	}
	wantError(t, "authenticator", gone.CheckAuthenticator(gone.Epoch(), []byte("x")), ErrRemoved)
	_, err := gone.Resync(gone.store, f.resyncOptions())
	wantError(t, "resync", err, ErrRemoved)
}

func TestResyncIsIntoTheSameGroupAndLater(t *testing.T) {
	f := newForgery(t)
	bob := f.bob
	other := f.resyncOptions()
	gi := *other.GroupInfo
	gi.GroupContext.CipherSuite = X25519_CHACHA20POLY1305_SHA256_Ed25519
	other.GroupInfo = &gi
	_, err := bob.Resync(bob.store, other)
	wantError(t, "another suite", err, ErrMalformed)

	before := f.resyncOptions()
	p, err := f.carol.Resync(f.carol.store, f.resyncOptions())
	f.must(err)
	f.acceptResync(p)
	f.carol.entrance.tried = 0 // as if another client's attempt had brought it in
	_, err = f.carol.Resync(f.carol.store, before)
	wantError(t, "group info from before it came in", err, ErrEpoch)
}

func TestCommitsAreAppliedOnceAndNotDuringAResync(t *testing.T) {
	f := newForgery(t)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{})
	f.must(err)
	r, err := f.carol.Receive(f.carol.store, c.Message())
	f.must(err)
	_, err = f.carol.Resync(f.carol.store, f.resyncOptions())
	f.must(err)
	wantError(t, "during a resync", f.carol.Apply(f.carol.store, r.(*StagedCommit)), ErrResync)
	f.must(f.carol.Drop(f.carol.store))
	staged := r.(*StagedCommit)
	staged.applied = true
	wantError(t, "a second time", f.carol.Apply(f.carol.store, staged), ErrStaged)
	staged.applied = false
	f.must(f.carol.Apply(f.carol.store, staged))
}
