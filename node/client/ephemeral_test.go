package client

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/store"
)

// next returns the next event of a kind.
func next[E Event](t *testing.T, events <-chan Event) (e E) {
	t.Helper()
	within(t, func() error {
		for {
			select {
			case ev := <-events:
				if got, ok := ev.(E); ok {
					e = got
					return nil
				}
			default:
				return fmt.Errorf("no %T", e)
			}
		}
	})
	return e
}

// TestTypingAndReceiptsReachWhoIsConnectedAndAreNotKept looks for them in the files of nodes and devices.
func TestTypingAndReceiptsReachWhoIsConnectedAndAreNotKept(t *testing.T) {
	all := providers(t, "alpha", "beta")
	alpha, beta := all[0], all[1]
	alice, bob, carol := alpha.enrol("alice", "alice-laptop"), beta.enrol("bob", "bob-phone"), alpha.enrol("carol", "carol-pc")
	room := alice.create(bob.User(), carol.User()).URI()
	bob.room(room)
	carol.room(room)
	alice.say(room, "hello")
	bobs, carols, alices := bob.Events(), carol.Events(), alice.Events()
	sees(t, room, []string{"alice-laptop: hello"}, alice, bob, carol)

	if err := alice.room(room).Typing(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	want := Typing{Room: room, User: alice.User(), Client: alice.ID(), On: true}
	if got := next[Typing](t, bobs); got != want {
		t.Errorf("bob learns %+v", got)
	}
	if got := next[Typing](t, carols); got != want {
		t.Errorf("carol learns %+v", got)
	}
	// Through the other node.
	const seq = 0x1122334455667788
	if err := bob.room(room).Receipt(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
	if got, want := next[Receipt](t, alices), (Receipt{Room: room, User: bob.User(), Client: bob.ID(), Seq: seq}); got != want {
		t.Errorf("alice learns %+v", got)
	}
	// Who isn't there misses them, and can read what comes after.
	bob.stop()
	for range 10 {
		if err := alice.room(room).Typing(t.Context(), false); err != nil {
			t.Fatal(err)
		}
	}
	alice.say(room, "bye")
	bob.restart()
	sees(t, room, []string{"alice-laptop: hello", "alice-laptop: bye"}, alice, bob, carol)
	bob.say(room, "bye")
	sees(t, room, []string{"alice-laptop: hello", "alice-laptop: bye", "bob-phone: bye"}, alice, bob, carol)

	needle := binary.BigEndian.AppendUint64(nil, seq)
	for _, d := range []*device{alice, bob, carol} {
		d.stop()
		search(t, filepath.Join(d.o.Dir, storeDir), needle)
	}
	for _, p := range all {
		p.stop()
		search(t, node.StoreDir(p.config.Data), needle)
		s, err := store.Open(node.StoreDir(p.config.Data), store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		entries := 0
		if err := store.ScanPrefix(s, []byte("n/l/"), func(_, v []byte) bool {
			entries++
			if bytes.Contains(v, []byte(mimi.EphemeralAAD)) {
				t.Error("an ephemeral message is in a log")
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if entries == 0 {
			t.Error("the log is empty")
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// search looks for something in all files below a directory.
func search(t *testing.T, dir string, needle []byte) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, needle) {
			t.Errorf("%s has it", path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestNoEphemeralMessageIsSentWhileOthersWait: their keys are used in order.
func TestNoEphemeralMessageIsSentWhileOthersWait(t *testing.T) {
	alpha := providers(t, "alpha")[0]
	alice := alpha.enrol("alice", "alice-laptop")
	r := alice.create()
	alice.say(r.URI(), "x")
	var w waits
	r.mu.Lock()
	r.outbox = append(r.outbox, &outgoing{})
	submit, _, err := r.sealEphemeral(&w, mimi.Ephemeral{Kind: mimi.EphemeralTyping})
	r.outbox = nil
	r.mu.Unlock()
	if submit != nil || err != nil {
		t.Errorf("while a message waits: %x, %v", submit, err)
	}
	r.mu.Lock()
	r.ephemeral.epoch, r.ephemeral.count = r.group.Epoch(), maxEphemeral
	submit, _, err = r.sealEphemeral(&w, mimi.Ephemeral{Kind: mimi.EphemeralTyping})
	r.mu.Unlock()
	if submit != nil || err != nil {
		t.Errorf("after as many as an epoch has: %x, %v", submit, err)
	}
}
