package mls

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
)

// secretEntries are the kinds of entries that are sealed.
const secretEntries = "hkcpsea"

// allSealed says whether a store has no secret entry that isn't sealed under a key of the store's.
func allSealed(s *memStore) bool {
	plain := unsealed(s.m)
	for k, v := range s.m {
		if strings.IndexByte(secretEntries, k[0]) >= 0 && (plain[k] == v || k[0] == keyHeader && plain[k] == v[2:]) {
			return false
		}
	}
	return true
}

// keeper is a store that keeps all that was ever written, except for the keys that are erased for good.
type keeper struct {
	*memStore
	kept []entry
}

func (k *keeper) Set(key, value []byte) {
	k.memStore.Set(key, value)
	if !Erasable(key) {
		k.kept = append(k.kept, entry{bytes.Clone(key), bytes.Clone(value)})
	}
}

// opened returns what the kept entries hold, as far as their keys are still there, or in the clear.
func (k *keeper) opened() []string {
	var sealers []*sealer
	for key, v := range k.m {
		if Erasable([]byte(key)) {
			s, err := sealerOf(secret(v))
			if err != nil {
				panic(err)
			}
			sealers = append(sealers, s)
		}
	}
	var out []string
	for _, x := range k.kept {
		out = append(out, string(x.value))
		for _, s := range sealers {
			if plain, err := s.open(x.key, x.value); err == nil {
				out = append(out, string(plain))
			}
		}
	}
	return out
}

func (k *keeper) has(s secret) bool {
	if len(s) == 0 {
		panic("nothing to look for")
	}
	return slices.ContainsFunc(k.opened(), func(v string) bool { return strings.Contains(v, string(s)) })
}

// TestErasedKeysTakeWhatTheySealedWithThem has a store that keeps everything, and looks for secrets whose time is over.
func TestErasedKeysTakeWhatTheySealedWithThem(t *testing.T) {
	f := newForgery(t)
	bob := f.bob
	k := &keeper{memStore: bob.store}
	must := func(err error) {
		t.Helper()
		f.must(err)
	}
	must(bob.Reseal(k))
	current := func() goneSecrets {
		gone := ofEpoch(bob)
		for n, key := range bob.private.keys {
			gone[string(rune('a'+n))+" private key"] = secret(bytes.Clone(key))
		}
		for name, s := range gone {
			gone[name] = bytes.Clone(s)
		}
		return gone
	}
	expect := func(what string, secrets goneSecrets, there bool) {
		t.Helper()
		for name, s := range secrets {
			if k.has(s) != there {
				t.Errorf("%s: %s in the store: %v", what, name, !there)
			}
		}
	}
	receive := func(from *client, data string) (used goneSecrets) {
		t.Helper()
		m, err := from.Encrypt(from.store, nil, []byte(data))
		must(err)
		id := ratchetID{from.OwnLeaf(), applicationRatchet}
		if r := bob.messages.ratchets[id]; r != nil {
			used = goneSecrets{"ratchet secret": bytes.Clone(r.secret)}
		}
		must(second(bob.Receive(k, m)))
		return used
	}

	// Within the epoch its key opens what was used. Reseal ends that, without a commit.
	receive(f.alice, "one")
	used := receive(f.alice, "two")
	expect("used", used, true)
	receive(f.carol, "three")
	must(bob.Reseal(k))
	expect("resealed", used, false)
	expect("resealed", current(), true)

	// A staged commit that is dropped, and an Update, go with the epoch.
	must(second(bob.ProposeUpdate(k, UpdateOptions{})))
	update := goneSecrets{"update's key": secret(bytes.Clone(bob.state.pending[0].private))}
	must(second(bob.Commit(k, CommitOptions{ForcePath: true})))
	staged := goneSecrets{"staged secret": bytes.Clone(bob.staged.secrets.init), "staged key": secret(bytes.Clone(bob.staged.private.keys[bob.OwnLeaf().node()]))}
	expect("staged", staged, true)
	must(bob.Drop(k))
	old := current()
	messages := goneSecrets{"sender data secret": bytes.Clone(bob.secrets.senderData),
		"ratchet": bytes.Clone(bob.messages.ratchets[ratchetID{f.alice.OwnLeaf(), applicationRatchet}].secret)}
	late, err := f.alice.Encrypt(f.alice.store, nil, []byte("late"))
	must(err)
	next := func() {
		t.Helper()
		c, err := f.alice.Commit(f.alice.store, CommitOptions{ForcePath: true})
		must(err)
		must(f.alice.Confirm(f.alice.store))
		for _, m := range []*client{bob, f.carol, f.dave} {
			got, err := m.Receive(nil, c.Message())
			must(err)
			b := Batch(m.store)
			if m == bob {
				b = k
			}
			must(m.Apply(b, got.(*StagedCommit)))
		}
	}
	// Keys of nodes that stay in use are in the next epoch's state too.
	next()
	for name := range old {
		for _, key := range bob.private.keys {
			if bytes.Equal(old[name], key) {
				delete(old, name)
			}
		}
	}
	if len(old) < 8 {
		t.Fatalf("only %d secrets of the epoch ended with it", len(old))
	}
	expect("after the epoch", old, false)
	expect("after the epoch", staged, false)
	expect("after the epoch", update, false)
	expect("after the epoch", messages, true)
	must(second(bob.Receive(k, late)))
	for range defaultPastEpochs {
		next()
	}
	expect("forgotten", messages, false)
	bob.reload(t)
	sameState(t, "bob", bob.store.m, dump(bob.Group))
}

func TestEntriesCannotTakeEachOthersPlace(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	r.add(alice, "bob")
	r.talk()
	swapped := 0
	for k := range alice.store.m {
		for l := range alice.store.m {
			if k >= l || strings.IndexByte(secretEntries, k[0]) < 0 || strings.IndexByte(secretEntries, l[0]) < 0 {
				continue
			}
			s := alice.store.clone()
			s.m[k], s.m[l] = s.m[l], s.m[k]
			_, err := LoadGroup(testConfig(), alice.signer, s.all())
			if header := k == "h" || l == "h"; !errors.Is(err, errState) && !(header && errors.Is(err, ErrUnsupported)) {
				t.Errorf("%q and %q exchanged: %v", k, l, err)
			}
			swapped++
		}
	}
	if swapped < 10 {
		t.Errorf("%d exchanges", swapped)
	}
}

// failingRand gives out what it has and then fails.
type failingRand struct{}

func (failingRand) Read([]byte) (int, error) { return 0, errors.New("no randomness") }

func TestNothingChangesWithoutASealingKey(t *testing.T) {
	f := newForgery(t)
	must := f.must
	c, err := f.alice.Commit(f.alice.store, CommitOptions{ForcePath: true})
	must(err)
	got, err := f.bob.Receive(f.bob.store, c.Message())
	must(err)
	for _, x := range []struct {
		what string
		c    *client
		do   func(*client) error
	}{
		{"confirm", f.alice, func(c *client) error { return c.Confirm(c.store) }},
		{"apply", f.bob, func(c *client) error { return c.Apply(c.store, got.(*StagedCommit)) }},
		{"reseal", f.carol, func(c *client) error { return c.Reseal(c.store) }},
	} {
		before, stored := dump(x.c.Group), maps.Clone(x.c.store.m)
		x.c.cfg.Rand = failingRand{}
		if err := x.do(x.c); err == nil {
			t.Errorf("%s succeeds without randomness", x.what)
		}
		x.c.cfg.Rand = nil
		if !maps.Equal(before, dump(x.c.Group)) || !maps.Equal(stored, x.c.store.m) {
			t.Errorf("%s that fails changes the state", x.what)
		}
		must(x.do(x.c))
	}
}
