package store_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/node/store"
	"github.com/parley-mls/parley/node/store/storetest"
)

func TestPebbleConforms(t *testing.T) {
	storetest.Test(t, func(t *testing.T, dir string) store.Store {
		s, err := store.Open(dir, store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(dir, store.Options{}); !errors.Is(err, store.ErrInUse) {
		t.Errorf("opening a store twice: %v", err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the store's directory has mode %v (%v)", info.Mode().Perm(), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatalf("opening after Close: %v", err)
	}
	again.Close()
}

// TestNothingAcknowledgedIsLostInACrash takes images of the disk as a crash would leave it while several writers
// commit, and checks that each has everything that was acknowledged before it was taken, and only whole batches.
func TestNothingAcknowledgedIsLostInACrash(t *testing.T) {
	for _, unsynced := range []int{0, 50} {
		t.Run(fmt.Sprintf("unsynced %d percent", unsynced), func(t *testing.T) {
			fs := vfs.NewCrashableMem()
			s, err := store.OpenFS(memory{fs}, "/store", store.Options{MemTableBytes: 64 << 10})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			const writers, each = 4, 150
			var mu sync.Mutex
			acknowledged := make([]int, writers)
			var group sync.WaitGroup
			for w := range writers {
				group.Go(func() {
					for i := range each {
						a, b := fmt.Sprintf("a/%d/%04d", w, i), fmt.Sprintf("b/%d/%04d", w, i)
						value := make([]byte, 200)
						if i%2 == 0 {
							var batch store.Batch
							batch.Set([]byte(a), value)
							batch.Set([]byte(b), value)
							wait, err := s.Apply(&batch)
							if err != nil || wait() != nil {
								t.Error("a write failed")
								return
							}
						} else if ok, err := s.Commit(map[string][]byte{a: value, b: value}, map[string][]byte{a: nil}); !ok || err != nil {
							t.Error("a swap failed")
							return
						}
						mu.Lock()
						acknowledged[w] = i + 1
						mu.Unlock()
					}
				})
			}
			finished := make(chan struct{})
			go func() { group.Wait(); close(finished) }()
			random := rand.New(rand.NewPCG(1, uint64(unsynced)))
			for running := true; running; {
				select {
				case <-finished:
					running = false
				default:
				}
				mu.Lock()
				before := append([]int(nil), acknowledged...)
				mu.Unlock()
				image := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced, RNG: random})
				checkImage(t, image, before)
				if t.Failed() {
					return
				}
			}
		})
	}
}

func checkImage(t *testing.T, image vfs.FS, acknowledged []int) {
	t.Helper()
	s, err := store.OpenFS(image, "/store", store.Options{})
	if err != nil {
		t.Fatalf("opening after a crash: %v", err)
	}
	defer s.Close()
	have := map[string]bool{}
	if err := s.Scan(nil, nil, func(key, _ []byte) bool { have[string(key)] = true; return true }); err != nil {
		t.Fatal(err)
	}
	for w, n := range acknowledged {
		for i := range n {
			if !have[fmt.Sprintf("a/%d/%04d", w, i)] {
				t.Fatalf("write %d of writer %d was acknowledged and is lost", i, w)
			}
		}
	}
	for key := range have {
		if key[0] == 'a' && !have["b"+key[1:]] || key[0] == 'b' && !have["a"+key[1:]] {
			t.Fatalf("half of a batch is there: %s", key)
		}
	}
}

func BenchmarkCommit(b *testing.B) {
	for _, writers := range []int{1, 16, 128} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s, err := store.Open(b.TempDir(), store.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			value := make([]byte, 1024)
			b.SetParallelism(max(1, writers/2))
			b.SetBytes(int64(len(value)))
			b.RunParallel(func(pb *testing.PB) {
				key := fmt.Appendf(nil, "%x", rand.Uint64())
				for pb.Next() {
					var batch store.Batch
					batch.Set(key, value)
					wait, err := s.Apply(&batch)
					if err != nil || wait() != nil {
						b.Error("write failed")
						return
					}
				}
			})
		})
	}
}

func TestCloseWaitsForScans(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	changes := make(map[string][]byte)
	for i := range 1000 {
		changes[fmt.Sprintf("%04d", i)] = make([]byte, 1000)
	}
	if _, err := s.Commit(changes, nil); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	seen := 0
	if err := s.Scan(nil, nil, func(_, _ []byte) bool {
		if seen++; seen == 1 {
			go func() { closed <- s.Close() }()
			for { // until Close has begun
				if _, err := s.Get([]byte("0000")); errors.Is(err, store.ErrClosed) {
					break
				}
			}
		}
		select {
		case err := <-closed:
			t.Fatalf("Close returned during a Scan: %v", err)
		default:
		}
		return true
	}); err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil || seen != 1000 {
		t.Errorf("%v after %d pairs", err, seen)
	}
}
