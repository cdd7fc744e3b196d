package client

import (
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
