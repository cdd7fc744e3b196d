package client

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
)

func TestEveryReaderGetsEveryEventInOrder(t *testing.T) {
	var b broadcast
	first, second := b.subscribe(), b.subscribe()
	const n = 1000
	go func() {
		for i := range n {
			b.send([]Event{Message{Seq: uint64(i)}})
		}
	}()
	for _, r := range []<-chan Event{first, second} {
		for i := range n {
			if m := (<-r).(Message); m.Seq != uint64(i) {
				t.Fatalf("got %d, want %d", m.Seq, i)
			}
		}
	}
	b.close()
	if _, ok := <-first; ok {
		t.Error("an event after the end")
	}
	if _, ok := <-b.subscribe(); ok {
		t.Error("an event for a reader that came after the end")
	}
}

func TestReaderThatStopsIsGivenUp(t *testing.T) {
	var b broadcast
	slow := b.subscribe()
	batch := make([]Event, 1024)
	for i := range batch {
		batch[i] = Joined{Room: mimi.URI("mimi://alpha.example/r/x")}
	}
	for range 2*maxBacklog/len(batch) + 1 {
		b.send(batch) // doesn't block
	}
	b.pumps.Wait()
	n := 0
	for range slow {
		n++
	}
	if n > maxBacklog {
		t.Errorf("%d events were kept", n)
	}
}

func TestEveryMemberIsToldOfACommitWithTheSameAuthenticator(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	var told [2]Committed
	events := []<-chan Event{alice.Events(), bob.Events()}
	if err := room.UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, ch := range events {
		within(t, func() error {
			select {
			case e := <-ch:
				told[i], _ = e.(Committed)
			default:
			}
			if told[i].Epoch != room.Epoch() { // also told of: the commit that added bob
				return errors.New("the update wasn't told of")
			}
			return nil
		})
	}
	if !reflect.DeepEqual(told[0], told[1]) {
		t.Errorf("%+v and %+v", told[0], told[1])
	}
	c := told[1]
	if c.Client != alice.ID() || c.User != alice.User() || c.Epoch != room.Epoch() || c.Seq != room.Seq() || !bytes.Equal(c.Authenticator, room.EpochAuthenticator()) {
		t.Errorf("bob was told %+v; alice is in epoch %d, entry %d", c, room.Epoch(), room.Seq())
	}
}
