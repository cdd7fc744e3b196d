package mls

import (
	"errors"
	"testing"
	"time"
)

// TestPastEpochsAreForgottenWithTime moves a clock past MaxPastAge.
func TestPastEpochsAreForgottenWithTime(t *testing.T) {
	f := newForgery(t)
	now := time.Now().Truncate(time.Second)
	f.bob.cfg.Time = func() time.Time { return now }
	f.bob.cfg.MaxPastAge = time.Hour
	cfg := f.bob.cfg
	send := func() *MLSMessage {
		m, err := f.alice.Encrypt(f.alice.store, nil, []byte("late"))
		f.must(err)
		return m
	}
	var late []*MLSMessage
	for _, minutes := range []time.Duration{35, 26, 0} { // until the next epoch ends
		late = append(late, send(), send())
		f.room.commit(f.alice, CommitOptions{})
		now = now.Add(minutes * time.Minute)
	}
	first := f.alice.Epoch() - 3
	f.bob.reload(t)
	f.bob.cfg = cfg
	if len(f.bob.past) != 2 {
		t.Fatalf("%d past epochs after a commit", len(f.bob.past))
	}
	if _, err := f.bob.Receive(f.bob.store, late[0]); !errors.Is(err, ErrEpoch) {
		t.Errorf("message of an epoch that ended 61 minutes ago: %v", err)
	}
	f.must(second(f.bob.Receive(f.bob.store, late[2])))

	now = now.Add(35 * time.Minute) // the second is too old to be used, though not deleted
	before, stored := whole(f.bob.Group), f.bob.store.clone()
	if _, err := f.bob.Receive(f.bob.store, late[3]); !errors.Is(err, ErrEpoch) {
		t.Errorf("message of an epoch that ended 61 minutes ago: %v", err)
	}
	if f.bob.resumption(PreSharedKeyID{Type: PSKResumption, GroupID: f.bob.GroupID(), Epoch: first + 1}) != nil {
		t.Error("its resumption key is there")
	}
	unchanged(t, "bob in memory", whole(f.bob.Group), before)
	unchanged(t, "bob stored", f.bob.store.m, stored.m)
	f.must(second(f.bob.Receive(f.bob.store, late[4])))
	if len(f.bob.past) != 1 {
		t.Errorf("%d past epochs after a message", len(f.bob.past))
	}
	sameState(t, "bob", f.bob.store.m, dump(f.bob.Group))

	now = now.Add(time.Hour)
	f.bob.Expire(f.bob.store)
	if len(f.bob.past) != 0 {
		t.Errorf("%d past epochs after Expire", len(f.bob.past))
	}
	sameState(t, "bob", f.bob.store.m, dump(f.bob.Group))
	for k := range f.bob.store.m {
		if k[0] == keyPast || k[0] == keyPastLeaf {
			t.Errorf("entry %q is left", k)
		}
	}
	f.room.talk()
}

func TestPastEpochsHaveNoAgeIfThatIsWanted(t *testing.T) {
	f := newForgery(t)
	now := time.Now()
	f.bob.cfg.Time = func() time.Time { return now }
	f.bob.cfg.MaxPastAge = -1
	f.room.commit(f.alice, CommitOptions{})
	now = now.Add(1000 * 24 * time.Hour)
	f.bob.Expire(f.bob.store)
	if len(f.bob.past) == 0 {
		t.Error("the past epoch is gone")
	}
}

// TestUndatedPastEpochsEndWhenTheyAreLoaded is about states of format 1.
func TestUndatedPastEpochsEndWhenTheyAreLoaded(t *testing.T) {
	s := make(saved)
	s.read(t, savedState(1), "bob")
	now := time.Now()
	cfg := testConfig()
	cfg.Time = func() time.Time { return now }
	load := func() *Group {
		g, err := LoadGroup(cfg, nil, s["bob"].all())
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	g := load()
	n := len(g.past)
	if n == 0 {
		t.Fatal("the saved state has no past epoch")
	}
	now = now.Add(6 * 24 * time.Hour)
	if g.Expire(s["bob"]); len(g.past) != n { // and the date of loading is saved
		t.Errorf("%d past epochs of %d after six days", len(g.past), n)
	}
	sameState(t, "bob", s["bob"].m, dump(g))
	now = now.Add(25 * time.Hour)
	g = load()
	if g.Expire(s["bob"]); len(g.past) != 0 {
		t.Errorf("%d past epochs after a week", len(g.past))
	}
	sameState(t, "bob", s["bob"].m, dump(g))
}
