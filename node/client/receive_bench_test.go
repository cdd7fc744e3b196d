package client

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// BenchmarkReceive measures a device that gets messages of 1,024 bytes: decrypted, checked and stored, one at a time as
// they come or 64 as after a while away, without a chain, with one, and with a head for each batch.
func BenchmarkReceive(b *testing.B) {
	for _, batch := range []int{1, 64} {
		for _, heads := range []string{"plain", "chain", "heads"} {
			b.Run(fmt.Sprintf("%s-%d", heads, batch), func(b *testing.B) { benchmarkReceive(b, batch, heads) })
		}
	}
}

func benchmarkReceive(b *testing.B, batch int, heads string) {
	h := lyingHub(b)
	r := h.alice.r()
	entries := make([]*api.Event, b.N)
	for i := range entries {
		o := &outgoing{text: bytes.Repeat([]byte("x"), 1024)}
		r.mu.Lock()
		err := r.seal(new(store.Batch), o)
		r.mu.Unlock()
		var req mimi.SubmitMessageRequest
		if err := errors.Join(err, codec.Unmarshal(o.submit, &req)); err != nil {
			b.Fatal(err)
		}
		e := h.bob.next(codec.Marshal(&mimi.FanoutMessage{Timestamp: uint64(time.Now().UnixMilli()), Message: req.Message}))
		if heads == "heads" && (i%batch == batch-1 || i == b.N-1) {
			e.Head = codec.Marshal(h.sign(h.bob.seq, h.bob.chain))
		}
		entries[i] = &api.Event{Event: &api.Event_Entry{Entry: e}}
	}
	if heads == "plain" {
		r := h.bob.r()
		r.mu.Lock()
		r.forgetChain()
		r.ledger.verified = nil
		r.mu.Unlock()
	}
	b.ResetTimer()
	for i := 0; i < b.N; i += batch {
		var w waits
		var all []Event
		events := entries[i:min(i+batch, b.N)]
		if err := errors.Join(h.bob.process(b.Context(), &w, events, &all), h.bob.check(&w, events, &all)); err != nil || len(all) != len(events) {
			b.Fatal(err, all)
		}
		if err := w.wait(); err != nil {
			b.Fatal(err)
		}
		if i%256 == 0 {
			if err := h.bob.checkHeads(); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N), "µs/message")
}
