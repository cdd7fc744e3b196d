package client

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/parley-mls/parley/node"
)

// backUp writes a backup of a node.
func (p *provider) backUp() (dir string) {
	p.t.Helper()
	dir = filepath.Join(p.t.TempDir(), "backup")
	if _, err := node.DialAdmin(p.config.Socket()).Backup(p.t.Context(), dir); err != nil {
		p.t.Fatal(err)
	}
	return dir
}

// restore stops the node and starts one from a backup in its place.
func (p *provider) restore(backup string) {
	p.t.Helper()
	p.stop()
	data := filepath.Join(p.t.TempDir(), "restored")
	if _, err := node.Restore(backup, data); err != nil {
		p.t.Fatal(err)
	}
	p.config.Data = data
	p.start()
}

func TestNothingThatAFollowerHasIsLostWithTheHub(t *testing.T) {
	p := providers(t, "alpha", "beta", "gamma")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[2].enrol("carol", "carol-phone")
	uri := alice.create(bob.User(), carol.User()).URI()
	agree(t, uri, alice, bob, carol)
	alice.say(uri, "before")
	want := []string{"alice-laptop: before"}
	sees(t, uri, want, alice, bob, carol)

	backup := p[0].backUp()
	tablet := p[0].enrol("alice", "alice-tablet") // not in the backup
	for _, d := range []*device{alice, bob, carol, bob} {
		d.say(uri, "after")
		want = append(want, d.ID().ID()+": after")
		if err := d.room(uri).UpdateKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	sees(t, uri, want, alice, bob, carol)
	tablet.stop()
	p[0].restore(backup)

	for _, d := range []*device{carol, alice, bob} {
		d.say(uri, "again")
		want = append(want, d.ID().ID()+": again")
	}
	sees(t, uri, want, alice, bob, carol)
	agree(t, uri, alice, bob, carol)
	// The clients were asked for a commit, so that others can join again.
	phone := p[1].enrol("bob", "bob-tablet")
	within(t, func() error {
		_, err := phone.Join(t.Context(), uri)
		return err
	})
	agree(t, uri, alice, bob, carol, phone)
	alice.say(uri, "welcome")
	want = append(want, "alice-laptop: welcome")
	sees(t, uri, want, alice, bob, carol)
	sees(t, uri, want[len(want)-1:], phone)
}

func TestWhatNobodyElseHasIsLostAndTheRoomGoesOn(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	carol := p[1].enrol("carol", "carol-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	alice.say(uri, "before")
	sees(t, uri, []string{"alice-laptop: before"}, alice, bob)

	backup := p[0].backUp()
	for range 3 {
		bob.say(uri, "lost")
		if err := alice.room(uri).UpdateKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	agree(t, uri, alice, bob)
	events := bob.Events()
	p[0].restore(backup)

	var gap Gap
	told := false
	for found := false; !found; {
		select {
		case e := <-events:
			switch e := e.(type) {
			case HubFault:
				t.Errorf("a hub that says that it was restored is accused: %+v", e)
			case HubRestored:
				told = told || e.Lost
			case Gap:
				gap, found = e, true
			}
		case <-time.After(patience):
			t.Fatal("no gap is told")
		}
	}
	if !told {
		t.Error("nobody says that the hub was restored")
	}
	if gap.Room != uri || gap.After == 0 || gap.Next > gap.After {
		t.Errorf("the gap is %+v", gap)
	}
	within(t, func() error {
		_, err := alice.room(uri).Send(t.Context(), []byte("after"))
		return err
	})
	agree(t, uri, alice, bob)
	// What bob has of the numbers that were given again stays, apart.
	for range 8 {
		alice.say(uri, "again")
	}
	for range 2 {
		within(t, func() error {
			lost, err := bob.room(uri).Lost()
			if err != nil {
				return err
			}
			var all []string
			for _, m := range lost {
				all = append(all, m.Client.ID()+": "+string(m.Data))
			}
			all = append(all, bob.texts(uri)...)
			counts := make(map[string]int)
			for _, text := range all {
				counts[text]++
			}
			if len(lost) == 0 || counts["bob-phone: lost"] != 3 || counts["alice-laptop: again"] != 8 || counts["alice-laptop: before"] != 1 {
				return fmt.Errorf("bob reads %d that are lost of %q", len(lost), all)
			}
			return nil
		})
		bob.restart()
	}
	// KeyPackages are there again.
	if err := alice.room(uri).Add(t.Context(), carol.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, carol)
}

func TestARestoredFollowerGetsWhatItMissesFromTheHub(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	alice.say(uri, "before")
	want := []string{"alice-laptop: before"}
	sees(t, uri, want, bob)
	backup := p[1].backUp()
	bob.stop()
	for range 3 {
		alice.say(uri, "after")
		want = append(want, "alice-laptop: after")
		if err := alice.room(uri).UpdateKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	within(t, func() error { // beta has it, and loses it
		s, err := node.DialAdmin(p[0].config.Socket()).Status(t.Context())
		if err == nil && s.Waiting > 0 {
			err = fmt.Errorf("%d wait", s.Waiting)
		}
		return err
	})
	p[1].restore(backup)
	bob.restart()
	sees(t, uri, want, alice, bob)
	bob.say(uri, "again")
	sees(t, uri, append(want, "bob-phone: again"), alice, bob)
}

func TestRoomsThatARestoredNodeHasForgottenAreEnteredAnew(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	backup := p[1].backUp()
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	alice.say(uri, "before")
	sees(t, uri, []string{"alice-laptop: before"}, bob)
	p[1].restore(backup)
	within(t, func() error {
		if r := bob.room(uri); r.Epoch() < 2 {
			return fmt.Errorf("epoch %d, frozen: %v", r.Epoch(), r.Frozen())
		}
		return nil
	})
	agree(t, uri, alice, bob)
	alice.say(uri, "after")
	sees(t, uri, []string{"alice-laptop: before", "alice-laptop: after"}, bob)
}
