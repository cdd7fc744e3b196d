package federation

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// outboxWorld is a store, an outbox on it, and peers that take or refuse what it sends. Tests run it in a bubble, so
// pauses take no time.
type outboxWorld struct {
	t     *testing.T
	store *memStore
	box   *Outbox
	stop  func()

	mu      sync.Mutex
	refuse  func(peer string, items []OutboxItem) error // nil: take all
	got     map[string][]string                         // refs by peer, in the order of their arrival
	batches map[string][]int                            // sizes
	tries   []time.Duration                             // when Send was called
	begin   time.Time
	dropped []string
	gone    map[string]bool // refs for which there is nothing to send
	hangs   string          // the peer that never answers
	bound   int
}

func newOutboxWorld(t *testing.T) *outboxWorld {
	w := &outboxWorld{
		t: t, store: &memStore{m: make(map[string][]byte)}, got: make(map[string][]string), batches: make(map[string][]int),
		gone: make(map[string]bool), begin: time.Now(),
	}
	w.open()
	return w
}

// open makes an outbox on what is in the store.
func (w *outboxWorld) open() {
	w.t.Helper()
	box, err := NewOutbox(OutboxConfig{
		Store: w.store, Prefix: "o/", Load: w.load, Send: w.send, MaxBatchItems: 4, MaxBatchBytes: 100,
		Bound: w.bound, Share: func(ref []byte) string { share, _, _ := strings.Cut(string(ref), "/"); return share },
		OnDrop: func(peer string, ref []byte, _ error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.dropped = append(w.dropped, peer+" "+string(ref))
		},
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.box = box
}

func (w *outboxWorld) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.box.Run(ctx); err != nil {
			w.t.Error(err)
		}
	}()
	w.stop = func() {
		cancel()
		<-done
	}
}

func (w *outboxWorld) load(ref []byte) (OutboxItem, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gone[string(ref)] {
		return OutboxItem{}, fmt.Errorf("%w: %s", ErrNoItem, ref)
	}
	item := OutboxItem{Ref: ref, Fanout: bytes.Repeat([]byte("x"), 10)}
	if room, _, ok := strings.Cut(string(ref), "/"); ok {
		item.Room = mimi.URI(room)
	}
	return item, nil
}

// send takes each room's items in one run.
func (w *outboxWorld) send(ctx context.Context, peer string, items []OutboxItem) []error {
	if peer == w.hangs {
		<-ctx.Done()
		return slices.Repeat([]error{ctx.Err()}, len(items))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tries = append(w.tries, time.Since(w.begin))
	errs := make([]error, len(items))
	rooms := make(map[mimi.URI][]int)
	for i, item := range items {
		rooms[item.Room] = append(rooms[item.Room], i)
	}
	for _, room := range slices.Sorted(maps.Keys(rooms)) {
		list := rooms[room]
		var own []OutboxItem
		for _, i := range list {
			own = append(own, items[i])
		}
		for i, err := range SendRuns(own, func(items []OutboxItem) int { return len(items) }, func(run []OutboxItem) error {
			if w.refuse != nil {
				if err := w.refuse(peer, run); err != nil {
					return err
				}
			}
			for _, item := range run {
				w.got[peer] = append(w.got[peer], string(item.Ref))
			}
			w.batches[peer] = append(w.batches[peer], len(run))
			return nil
		}) {
			errs[list[i]] = err
		}
	}
	return errs
}

// put queues refs for a peer, as a caller does in its own batch.
func (w *outboxWorld) put(peer string, refs ...string) {
	w.t.Helper()
	changes := make(map[string][]byte)
	for _, r := range refs {
		k, v := w.box.Entry(peer, []byte(r))
		changes[string(k)] = v
	}
	if ok, err := w.store.Commit(changes, nil); !ok || err != nil {
		w.t.Fatal(err)
	}
	w.box.Wake(peer)
}

func (w *outboxWorld) wantGot(peer string, want ...string) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !reflect.DeepEqual(w.got[peer], want) {
		w.t.Errorf("%s got %v, want %v", peer, w.got[peer], want)
	}
}

func (w *outboxWorld) wantEmpty() {
	w.t.Helper()
	synctest.Wait()
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	if n := len(w.store.m); n != 0 {
		w.t.Errorf("%d entries are left in the store", n)
	}
	for p := range w.box.peers {
		if n := w.box.Depth(p); n != 0 {
			w.t.Errorf("depth of %s is %d", p, n)
		}
	}
}

func (w *outboxWorld) setRefuse(f func(peer string, items []OutboxItem) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refuse = f
}

func refs(from, to int) []string {
	var list []string
	for i := from; i < to; i++ {
		list = append(list, fmt.Sprintf("m%03d", i))
	}
	return list
}

func TestOutboxDeliversInOrderInBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.put("beta.example", refs(0, 6)...)
		w.put("gamma.example", "g")
		if d := w.box.Depth("beta.example"); d != 6 {
			t.Errorf("depth %d, want 6", d)
		}
		synctest.Wait()
		if len(w.tries) > 0 {
			t.Error("something was sent before Run")
		}
		w.run()
		synctest.Wait()
		w.put("beta.example", refs(6, 300)...)
		synctest.Wait()
		w.wantGot("beta.example", refs(0, 300)...)
		w.wantGot("gamma.example", "g")
		for _, n := range w.batches["beta.example"] {
			if n > 4 {
				t.Errorf("a batch of %d items, at most 4 wanted", n)
			}
		}
		w.wantEmpty()
		w.stop()
	})
}

func TestAPeerThatHangsHoldsUpNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.hangs = "beta.example"
		w.run()
		w.put("beta.example", refs(0, 300)...)
		synctest.Wait() // beta's first request hangs
		w.put("gamma.example", refs(0, 300)...)
		w.wantGot("gamma.example", refs(0, 300)...) // no time has passed
		w.wantGot("beta.example")
		if d := w.box.Depth("beta.example"); d != 300 {
			t.Errorf("%d items wait for the peer that hangs, want 300", d)
		}
		w.stop()
	})
}

func TestOutboxBoundsTheBytesOfABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.box.cfg.MaxBatchItems = 1000
		w.put("beta.example", refs(0, 25)...)
		w.run()
		synctest.Wait()
		if want := []int{10, 10, 5}; !reflect.DeepEqual(w.batches["beta.example"], want) {
			t.Errorf("batches of %v items of 10 bytes, want %v", w.batches["beta.example"], want)
		}
		w.stop()
		w.box.cfg.MaxBatchBytes = 1
		if items, _, _, err := w.box.load([]stored{{1, []byte("large")}}); err != nil || len(items) != 1 {
			t.Errorf("an item larger than a batch: %v, %v", items, err)
		}
	})
}

func TestOutboxRetriesWithGrowingPausesUntilThePeerIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.setRefuse(func(peer string, _ []OutboxItem) error {
			if peer == "beta.example" {
				return errors.New("no route")
			}
			return nil
		})
		w.run()
		w.put("beta.example", refs(0, 3)...)
		w.put("gamma.example", "g")
		synctest.Wait()
		w.wantGot("gamma.example", "g") // one peer's trouble isn't another's
		time.Sleep(10 * time.Minute)
		w.mu.Lock()
		tries := w.tries
		w.mu.Unlock()
		if n := len(tries); n < 20 || n > 50 {
			t.Errorf("%d tries in 10 minutes", n)
		}
		last := tries[len(tries)-1] - tries[len(tries)-2]
		if last < 15*time.Second || last > 30*time.Second {
			t.Errorf("the last pause was %v, want 15 to 30 s", last)
		}
		w.setRefuse(nil)
		time.Sleep(31 * time.Second)
		w.wantGot("beta.example", refs(0, 3)...)
		w.wantEmpty()
		w.stop()
	})
}

func TestKickEndsThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.setRefuse(func(string, []OutboxItem) error { return errors.New("no route") })
		w.run()
		w.put("beta.example", "m")
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		w.setRefuse(nil)
		before := time.Now()
		w.box.Kick("beta.example")
		w.box.Kick("unknown.example")
		synctest.Wait()
		w.wantGot("beta.example", "m")
		if d := time.Since(before); d != 0 {
			t.Errorf("it took %v", d)
		}
		w.stop()
	})
}

func TestOutboxHeedsRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.setRefuse(func(string, []OutboxItem) error {
			w.refuse = nil
			return &Error{Status: 429, Code: CodeBusy, RetryAfter: 9 * time.Second}
		})
		w.run()
		w.put("beta.example", "m")
		time.Sleep(8 * time.Second)
		w.wantGot("beta.example")
		time.Sleep(2 * time.Second)
		w.wantGot("beta.example", "m")
		w.stop()
	})
}

func TestOutboxResumesAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.setRefuse(func(string, []OutboxItem) error { return errors.New("no route") })
		w.run()
		w.put("beta.example", refs(0, 10)...)
		time.Sleep(time.Second)
		w.stop()

		w.setRefuse(nil)
		w.open()
		if d := w.box.Depth("beta.example"); d != 10 {
			t.Errorf("depth %d after the restart, want 10", d)
		}
		w.put("beta.example", refs(10, 12)...) // before Run
		w.run()
		synctest.Wait()
		w.wantGot("beta.example", refs(0, 12)...)
		w.wantEmpty()
		w.stop()
	})
}

// failingStore doesn't delete, as a crash between sending and deleting doesn't.
type failingStore struct {
	*memStore
	fail bool
}

func (s *failingStore) Delete(keys ...[]byte) error {
	if s.fail {
		return errors.New("disk failed")
	}
	return s.memStore.Delete(keys...)
}

func TestWhatWasSentAndNotDeletedIsSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.box.cfg.Store = &failingStore{w.store, true}
		w.run()
		w.put("beta.example", "a", "b")
		synctest.Wait()
		w.wantGot("beta.example", "a", "b")
		w.stop()
		w.open()
		w.run()
		synctest.Wait()
		w.wantGot("beta.example", "a", "b", "a", "b")
		w.wantEmpty()
		w.stop()
	})
}

func TestPoisonItemIsDroppedAndDoesNotBlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.setRefuse(func(_ string, items []OutboxItem) error {
			for _, i := range items {
				if string(i.Ref) == "m005" {
					return fmt.Errorf("send: %w", &Error{Status: 400, Code: CodeMalformed})
				}
			}
			return nil
		})
		w.put("beta.example", refs(0, 12)...)
		w.run()
		synctest.Wait()
		w.wantGot("beta.example", append(refs(0, 5), refs(6, 12)...)...)
		if want := []string{"beta.example m005"}; !reflect.DeepEqual(w.dropped, want) {
			t.Errorf("dropped %v, want %v", w.dropped, want)
		}
		if want := []int{4, 1, 1, 1, 4}; !reflect.DeepEqual(w.batches["beta.example"], want) {
			t.Errorf("batches of %v, want %v: one by one around the bad item only", w.batches["beta.example"], want)
		}
		w.wantEmpty()
		w.stop()
	})
}

func TestARoomThatIsNotTakenDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		bad := true
		w.setRefuse(func(_ string, items []OutboxItem) error {
			for _, i := range items {
				if bad && (string(i.Ref) == "b/1" || string(i.Ref) == "b/3") {
					return &Error{Status: 500, Code: CodeInternal}
				}
			}
			return nil
		})
		w.put("beta.example", "a/1", "b/1", "b/2", "c/1", "b/3", "a/2", "b/4", "c/2", "a/3", "c/3")
		w.run()
		time.Sleep(time.Minute)
		w.wantGot("beta.example", "a/1", "c/1", "a/2", "c/2", "a/3", "c/3")
		if d := w.box.Depth("beta.example"); d != 4 || len(w.dropped) > 0 {
			t.Errorf("depth %d, want 4; dropped %v", d, w.dropped)
		}
		w.put("beta.example", "b/5", "a/4")
		time.Sleep(time.Minute)
		w.setRefuse(nil)
		time.Sleep(time.Minute)
		w.wantGot("beta.example", "a/1", "c/1", "a/2", "c/2", "a/3", "c/3", "a/4", "b/1", "b/2", "b/3", "b/4", "b/5")
		w.wantEmpty()
		w.stop()
	})
}

func TestRefusalsThatMayPassAreNotPoison(t *testing.T) {
	for _, status := range []int{401, 403, 408, 409, 429, 500, 503} {
		synctest.Test(t, func(t *testing.T) {
			w := newOutboxWorld(t)
			w.setRefuse(func(string, []OutboxItem) error { return &Error{Status: status} })
			w.run()
			w.put("beta.example", "m")
			time.Sleep(time.Minute)
			synctest.Wait()
			if len(w.dropped) > 0 || w.box.Depth("beta.example") != 1 {
				t.Errorf("status %d: dropped %v", status, w.dropped)
			}
			w.stop()
		})
	}
}

func TestReferencesToNothingAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		for _, r := range []string{"m000", "m002", "m003", "m004", "m005", "m006", "m011"} {
			w.gone[r] = true
		}
		w.put("beta.example", refs(0, 12)...)
		w.run()
		synctest.Wait()
		w.wantGot("beta.example", "m001", "m007", "m008", "m009", "m010")
		if len(w.dropped) != 7 {
			t.Errorf("dropped %v", w.dropped)
		}
		w.wantEmpty()
		w.stop()
	})
}

func TestEntriesWhoseBatchComesLaterAreSentLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.run()
		late, value := w.box.Entry("beta.example", []byte("late"))
		never, _ := w.box.Entry("beta.example", []byte("never"))
		w.put("beta.example", "a", "b")
		synctest.Wait()
		w.wantGot("beta.example", "a", "b")
		if _, err := w.store.Commit(map[string][]byte{string(late): value}, nil); err != nil {
			t.Fatal(err)
		}
		w.box.Wake("beta.example")
		synctest.Wait()
		w.wantGot("beta.example", "a", "b", "late")
		if len(w.store.m) > 0 || bytes.Equal(late, never) {
			t.Errorf("the store has %v", w.store.m)
		}
		w.stop()
	})
}

func TestClosedOutboxSendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.run()
		synctest.Wait()
		w.box.Close()
		w.put("beta.example", "m")
		synctest.Wait()
		w.wantGot("beta.example")
		if err := w.box.Run(t.Context()); err == nil {
			t.Error("a closed outbox runs")
		}
		w.stop()
	})
}

func TestOutboxRefusesForeignKeysAndBadConfiguration(t *testing.T) {
	ok := OutboxConfig{
		Store: &memStore{m: map[string][]byte{"o/beta.example": nil}}, Prefix: "o/",
		Load: func([]byte) (OutboxItem, error) { return OutboxItem{}, nil },
		Send: func(context.Context, string, []OutboxItem) []error { return nil },
	}
	if _, err := NewOutbox(ok); err == nil || !strings.Contains(err.Error(), "isn't one of the outbox") {
		t.Errorf("foreign key: %v", err)
	}
	ok.Prefix = ""
	if _, err := NewOutbox(ok); err == nil {
		t.Error("no prefix is accepted")
	}
}

func TestConcurrentWritersLoseNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.box.cfg.MaxBatchItems, w.box.cfg.MaxBatchBytes = 256, 1<<20
		w.run()
		var writers sync.WaitGroup
		for g := range 8 {
			writers.Go(func() {
				for i := range 100 {
					w.put("beta.example", fmt.Sprintf("%d/%03d", g, i))
				}
			})
		}
		writers.Wait()
		synctest.Wait()
		last := make(map[string]string)
		if n := len(w.got["beta.example"]); n != 800 {
			t.Errorf("%d items arrived, want 800", n)
		}
		for _, r := range w.got["beta.example"] {
			if r <= last[r[:1]] {
				t.Errorf("%s came after %s of the same writer", r, last[r[:1]])
			}
			last[r[:1]] = r
		}
		w.wantEmpty()
		w.stop()
	})
}
