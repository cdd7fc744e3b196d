package mls

import (
	"crypto/cipher"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// eraser holds on to the secrets that a client's group refers to, and looks at them when the group has dropped them.
type eraser struct {
	*client
	held map[*byte]heldSecret
}

type heldSecret struct {
	path  string
	bytes []byte
}

func erased(b []byte) bool { return !slices.ContainsFunc(b, func(x byte) bool { return x != 0 }) }

// hold takes note of the secrets in a value. Signers are their owner's.
func (e *eraser) hold(v any) {
	eachSecret(v, func(path string, b []byte) {
		if len(b) > 0 && !strings.Contains(path, ".signer") {
			e.held[&b[0]] = heldSecret{path, b}
		}
	})
}

// handOver is for a secret that isn't the group's any more, but its user's.
func (e *eraser) handOver(b []byte) { delete(e.held, &b[0]) }

// check wants all to be zero that the group has dropped since the last call, and returns how many secrets that are.
func (e *eraser) check(t *testing.T, what string) int {
	t.Helper()
	now := &eraser{held: make(map[*byte]heldSecret)}
	now.hold(e.Group)
	for _, s := range now.held {
		if erased(s.bytes) {
			t.Errorf("%s: %s erased %s and still has it", what, e.name, s.path)
		}
	}
	n := 0
	for p, s := range e.held {
		if _, ok := now.held[p]; ok {
			continue
		}
		if n++; !erased(s.bytes) {
			t.Errorf("%s: %s dropped %s and left it in memory", what, e.name, s.path)
		}
	}
	e.held = now.held
	return n
}

// erasers watches the members of a room.
type erasers []*eraser

func watch(members ...*client) (all erasers) {
	for _, c := range members {
		e := &eraser{client: c, held: make(map[*byte]heldSecret)}
		e.hold(c.Group)
		all = append(all, e)
	}
	return all
}

// check wants each member to have dropped at least so many secrets.
func (all erasers) check(t *testing.T, what string, atLeast int) {
	t.Helper()
	for _, e := range all {
		if n := e.check(t, what); n < atLeast {
			t.Errorf("%s: %s dropped %d secrets, want %d or more", what, e.name, n, atLeast)
		}
	}
}

// TestDroppedSecretsAreOverwritten watches the memory of the members through the life of a group: whatever secret a
// group doesn't refer to any more is zero.
func TestDroppedSecretsAreOverwritten(t *testing.T) {
	f := newForgery(t)
	now := time.Now()
	for _, c := range f.members {
		c.cfg.MaxSkippedKeys, c.cfg.MaxPastEpochs = 2, 2
		c.cfg.Time = func() time.Time { return now }
	}
	all := watch(f.members...)

	// Keys of messages: used, skipped and used later, skipped and dropped.
	for range 2 {
		f.room.talk()
		all.check(t, "messages", 1)
	}
	var late []*MLSMessage
	for range 5 {
		m, err := f.alice.Encrypt(f.alice.store, nil, []byte("late"))
		f.must(err)
		late = append(late, m)
	}
	for _, x := range []struct{ message, dropped int }{
		{1, 1}, // the ratchet's secret; the key of 0 is kept
		{4, 3}, // another, and the key and nonce of 0, which are one too many with those of 2 and 3
		{2, 2},
	} {
		f.must(second(f.bob.Receive(f.bob.store, late[x.message])))
		if n := all[1].check(t, "late messages"); n != x.dropped {
			t.Errorf("bob dropped %d secrets with message %d, want %d", n, x.message, x.dropped)
		}
	}

	// A component's secret is its own.
	s, err := f.bob.SafeExport(f.bob.store, 0x8001)
	f.must(err)
	all[1].handOver(s)
	all[1].check(t, "component's secret")

	// The ends of epochs, of updates, and of commits that are confirmed, dropped, or overtaken.
	epochSecrets := len(new(epochSecrets).fields()) - 3 // a past epoch has two, and the secret tree replaces one
	f.room.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))
	f.room.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{})) // supersedes the first
	for _, e := range all {
		e.hold(e.Group)
	}
	f.room.commit(f.alice, CommitOptions{ForcePath: true})
	all.check(t, "epoch", epochSecrets)
	c, err := f.bob.Commit(f.bob.store, CommitOptions{ForcePath: true})
	f.must(err)
	all[1].hold(c)
	f.must(f.bob.Drop(f.bob.store))
	if n := all[1].check(t, "dropped commit"); n < epochSecrets {
		t.Errorf("bob dropped %d secrets with the commit", n)
	}
	c, err = f.bob.Commit(f.bob.store, CommitOptions{ForcePath: true})
	f.must(err)
	all[1].hold(c)
	f.room.commit(f.dave, CommitOptions{})
	all.check(t, "overtaken commit", epochSecrets)
	for range 3 {
		f.room.commit(f.alice, CommitOptions{})
		all.check(t, "past epoch", epochSecrets+2)
	}
	now = now.Add(8 * 24 * time.Hour)
	for _, e := range all {
		e.Expire(e.store)
	}
	all.check(t, "too old", 4)
	for _, e := range all {
		f.must(e.Reseal(e.store))
	}
	all.check(t, "seals", 2)

	// External commits, of others and to replace the own state.
	f.join("eve")
	all.check(t, "external commit", epochSecrets)
	for _, drop := range []bool{true, false} {
		p, err := f.carol.Resync(f.carol.store, f.resyncOptions())
		f.must(err)
		all[2].hold(p)
		if drop {
			f.must(f.carol.Drop(f.carol.store))
			f.room.commit(f.alice, CommitOptions{})
		} else {
			f.acceptResync(p)
		}
		all.check(t, "resync", epochSecrets)
	}

	f.bob.cfg.MaxPastEpochs = -1
	f.room.commit(f.alice, CommitOptions{})
	all.check(t, "no past epochs", epochSecrets)
	if len(f.bob.past) > 0 {
		t.Errorf("bob keeps %d past epochs", len(f.bob.past))
	}

	// Nothing is left of who was removed.
	f.room.propose(f.dave.ProposeUpdate(f.dave.store, UpdateOptions{}))
	all[3].hold(f.dave.Group)
	c, err = f.dave.Commit(f.dave.store, CommitOptions{ForcePath: true})
	f.must(err)
	all[3].hold(c)
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.dave.OwnLeaf())}})
	all.check(t, "removed", epochSecrets)
	for p := range secretsIn(f.dave.Group) {
		t.Errorf("a former member has %s", p)
	}
}

// TestKeysOfCiphersAreOverwritten sees each key with which something is encrypted: messages of all formats, sender data,
// Welcomes, path secrets. None is left when the operation that used it is over.
func TestKeysOfCiphersAreOverwritten(t *testing.T) {
	p := testSuite.params()
	former := p.newAEAD
	defer func() { p.newAEAD = former }()
	var mu sync.Mutex
	var keys [][]byte
	p.newAEAD = func(key []byte) (cipher.AEAD, error) {
		mu.Lock()
		defer mu.Unlock()
		if erased(key) {
			t.Error("a key is zero before its use")
		}
		keys = append(keys, key)
		return former(key)
	}
	check := func(what string, atLeast int) {
		t.Helper()
		if len(keys) < atLeast {
			t.Errorf("%s: %d keys, want %d or more", what, len(keys), atLeast)
		}
		for i, k := range keys {
			if !erased(k) {
				t.Errorf("%s: key %d of %d is left", what, i, len(keys))
			}
		}
		keys = nil
	}
	f := makeForgery(t)
	check("Welcomes and paths", 20)
	f.room.talk()
	check("application messages", 4*2*4)
	for name, r := range map[string]*room{"private": newRoom(t, testSuite, nil).whispers(), "semi-private": newSemiRoom(t, testSuite).room} {
		r.add(r.members[0], "frank")
		r.join("eve")
		keys = nil
		r.propose(r.members[1].ProposeUpdate(r.members[1].store, UpdateOptions{}))
		check(name+" proposal", 3)
		r.commit(r.members[0], CommitOptions{Proposals: []Proposal{sharedPSK()}})
		check(name+" commit", 5)
	}
}
