package node

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// TestAcceptedIsThereAfterACrash runs a hub on a simulated disk, takes images of it as a crash would leave it while
// clients write, and opens each: everything that was acknowledged must be in the log under its number, its repetition
// must get the first answer, and the group must go on from a consistent epoch.
func TestAcceptedIsThereAfterACrash(t *testing.T) {
	fs := vfs.NewCrashableMem()
	n := newNodeOn(t, "alpha", func(o store.Options) (*store.Pebble, error) { return store.OpenFS(fs, "/store", o) })
	alice := newClient(t, n, "alice", "alice-laptop")
	room := alice.createRoom()
	stream := alice.subscribe()
	stream.live()

	type accepted struct {
		hash, message []byte
		seq, epoch    uint64 // epoch that the room was in afterwards
	}
	var mu sync.Mutex
	var acknowledged []accepted
	random := rand.New(rand.NewPCG(7, 7))
	type image struct {
		fs       vfs.FS
		accepted []accepted
	}
	var images []image
	snapshot := func() {
		mu.Lock()
		known := append([]accepted(nil), acknowledged...)
		mu.Unlock()
		images = append(images, image{fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: random}), known})
	}
	for round := range 6 {
		var group sync.WaitGroup
		for i := range 8 {
			req := alice.seal(fmt.Sprintf("round %d message %d", round, i))
			group.Go(func() {
				resp, seq, err := alice.submit(req)
				if err != nil || resp.Code != mimi.SubmitAccepted {
					t.Errorf("submit: %+v, %v", resp, err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				acknowledged = append(acknowledged, accepted{messageHash(req.Message), codec.Marshal(req.Message), seq, alice.group.Epoch()})
			})
		}
		snapshot()
		group.Wait()
		snapshot()
		p, err := alice.group.Commit(nil, mls.CommitOptions{ForcePath: true})
		if err != nil {
			t.Fatal(err)
		}
		req := bundle(p)
		resp, seq, err := alice.update(req)
		if err != nil || resp.Code != mimi.UpdateSuccess {
			t.Fatalf("update: %+v, %v", resp, err)
		}
		mu.Lock()
		acknowledged = append(acknowledged, accepted{messageHash(req.Bundle.Message), codec.Marshal(req.Bundle.Message), seq, p.Epoch()})
		mu.Unlock()
		snapshot()
		stream.until(func() bool { return alice.seq >= seq })
	}
	n.stop()
	for i, im := range images {
		cfg := n.cfg
		cfg.Listen = "127.0.0.1:0"
		again, err := open(cfg, n.log, func(o store.Options) (*store.Pebble, error) { return store.OpenFS(im.fs, "/store", o) })
		if err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
		r, err := again.hostedRoom(room)
		if err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
		for _, a := range im.accepted {
			f, err := again.entry(room, a.seq)
			if err != nil {
				t.Fatalf("image %d: entry %d: %v", i, a.seq, err)
			}
			if !bytes.Equal(codec.Marshal(f.Message), a.message) {
				t.Errorf("image %d: entry %d is another message", i, a.seq)
			}
			if rec, err := again.answered(r, a.hash); err != nil || rec == nil || rec.seq != a.seq {
				t.Errorf("image %d: the answer for entry %d is %+v (%v)", i, a.seq, rec, err)
			}
			if r.group.Epoch() < a.epoch {
				t.Errorf("image %d: the group is in epoch %d, entry %d was accepted in %d", i, r.group.Epoch(), a.seq, a.epoch)
			}
			if r.record.last < a.seq {
				t.Errorf("image %d: the log ends at %d, entry %d was accepted", i, r.record.last, a.seq)
			}
		}
		for seq := uint64(1); seq <= r.record.last; seq++ {
			if _, err := again.entry(room, seq); err != nil {
				t.Errorf("image %d: the log has a gap at %d of %d", i, seq, r.record.last)
			}
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	}
}
