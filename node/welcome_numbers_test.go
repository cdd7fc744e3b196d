package node

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/store"
)

// A client asks for Welcomes after the last one that it has. With a lower number the next one would never reach it.
func TestNumbersOfWelcomesGrowThoughTheClockIsPutBack(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	bob.publish(2)
	var numbers []uint64
	welcome := func() {
		alice.createRoom()
		alice.commit(alice.adding(bob.user)...)
		if err := store.ScanPrefix(n.store, key(prefixWelcome, bob.uri), func(k, _ []byte) bool {
			numbers = append(numbers, binary.BigEndian.Uint64(k))
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
	ahead := uint64(time.Now().AddDate(0, 0, 1).UnixMicro())
	n.welcomeNumbers.high = ahead // as with a clock that is a day ahead
	welcome()
	if len(numbers) != 1 || numbers[0] <= ahead {
		t.Fatalf("the first Welcome's number is %v", numbers)
	}
	changes := map[string][]byte{string(key(prefixWelcome, bob.uri, be64(numbers[0]))): nil} // bob has it
	if _, err := n.store.Commit(changes, nil); err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.start()
	alice.connect()
	alice.authenticate()
	if welcome(); len(numbers) != 2 || numbers[1] <= numbers[0] {
		t.Errorf("the Welcomes' numbers are %v", numbers)
	}
}

// Rooms don't wait for each other, and a stream that has seen a Welcome looks for those with higher numbers only.
func TestNumbersOfWelcomesGrowInTheOrderInWhichTheyAreSeen(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	first, second := must(n.openRoom(alice.createRoom()))(t), must(n.openRoom(alice.createRoom()))(t)
	var changes []*change
	for _, r := range []*room{first, second} {
		c := n.begin(r, nil)
		c.queueWelcome(&refRecord{client: bob.uri, user: bob.user}, 1, nil)
		changes = append(changes, c)
	}
	var seen []mimi.URI
	for _, c := range []*change{changes[1], changes[0]} {
		wait, err := c.apply()
		if err != nil {
			t.Fatal(err)
		}
		if err := wait(); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.ScanPrefix(n.store, key(prefixWelcome, bob.uri), func(_, v []byte) bool {
		var w welcomeRecord
		err := decodeRecord(v, &w, "Welcome")
		seen = append(seen, w.room)
		return err == nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(seen, []mimi.URI{second.uri, first.uri}) {
		t.Errorf("the queue is %v, want the room that was applied first at the front", seen)
	}
}
