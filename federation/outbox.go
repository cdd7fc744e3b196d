package federation

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// ErrNoItem: what a reference in the outbox names isn't there to be sent any more. Load returns it, and the reference
// is dropped.
var ErrNoItem = errors.New("federation: nothing to send")

// OutboxConfig says where an Outbox keeps its queues and how it sends.
type OutboxConfig struct {
	Store  Store
	Prefix string // of all keys

	// Load turns a reference into what is sent, so that a message is stored once, however many peers get it. After an
	// error other than ErrNoItem it is called again later.
	Load func(ref []byte) (OutboxItem, error)

	// Send delivers items to a peer and returns what became of each: nil if the peer has it durably. Those of one room
	// arrive in their order, and none after one that failed; rooms don't wait for each other. Items may be sent again
	// that were delivered before. It heeds ctx.
	Send func(ctx context.Context, peer string, items []OutboxItem) []error

	MinBackoff    time.Duration // pause after the first failure, doubled with each; 100 ms
	MaxBackoff    time.Duration // longest pause; 30 s
	SendTimeout   time.Duration // of one call of Send; 1 min
	MaxBatchItems int           // items in one call of Send; 256
	MaxBatchBytes int           // bytes of them, but for a single larger one; 1 MiB

	// Bound is how many items may wait for a peer, 0 for any number. When there are more, the oldest are dropped of the
	// shares that have the most; Share says of an item to which it counts, such as its room, "" for one that stays.
	Bound int
	Share func(ref []byte) string

	OnDrop func(peer string, ref []byte, err error) // if not nil: an item was dropped, undelivered
	Log    *slog.Logger
}

// OutboxItem is something to send to a peer: an entry of a room's log, or the own trust bundle.
type OutboxItem struct {
	Ref    []byte
	Room   mimi.URI
	Seq    uint64 // in the room's log
	Fanout []byte // what is sent
	Bundle bool   // Fanout is the trust bundle, there is no room
}

// Outbox holds what has to reach peers, durably, in one queue per peer. What is in a queue is sent again and again,
// with growing pauses, until the peer takes it; an unreachable peer delays nothing but its own queue, and a room that
// it doesn't take delays no other. A queue may have a bound, beyond which the oldest is dropped. An item that the peer
// refuses for good is dropped, with a log line, so that it doesn't block those after it.
//
// A key is the prefix, the peer, a zero byte and the item's number in the queue, eight bytes big-endian; the value is the
// reference.
type Outbox struct {
	cfg OutboxConfig

	mu      sync.Mutex
	peers   map[string]*queue // guarded by mu
	ctx     context.Context   // set while running; guarded by mu
	closed  bool              // guarded by mu
	stop    context.CancelFunc
	workers sync.WaitGroup
}

// queue is what is known of a peer's queue without reading it. Outbox.mu guards all but kick.
type queue struct {
	peer    string
	next    uint64              // number of the next entry
	from    uint64              // below it there are only numbers in missing
	known   uint64              // numbers below it that aren't in the store never will be
	missing map[uint64]struct{} // handed out, below from, and not delivered: of a batch that isn't in the store yet, or failed
	depth   int
	uncut   int  // up to which depth nothing is cut anew
	dropped int  // by cuts
	dirty   bool // Wake was called since the last look into the store
	working bool // a goroutine serves the queue
	kick    chan struct{}
}

// NewOutbox finds the queues that are in the store. Nothing is sent before Run.
func NewOutbox(cfg OutboxConfig) (*Outbox, error) {
	if cfg.Store == nil || cfg.Load == nil || cfg.Send == nil || cfg.Prefix == "" || cfg.Bound > 0 && cfg.Share == nil {
		return nil, errors.New("federation: outbox without store, prefix, Load, Send, or Share of a Bound")
	}
	cfg.MinBackoff = cmp.Or(cfg.MinBackoff, 100*time.Millisecond)
	cfg.MaxBackoff = cmp.Or(cfg.MaxBackoff, 30*time.Second)
	cfg.SendTimeout = cmp.Or(cfg.SendTimeout, time.Minute)
	cfg.MaxBatchItems = cmp.Or(cfg.MaxBatchItems, 256)
	cfg.MaxBatchBytes = cmp.Or(cfg.MaxBatchBytes, 1<<20)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	o := &Outbox{cfg: cfg, peers: make(map[string]*queue)}
	var bad error
	err := cfg.Store.Scan([]byte(cfg.Prefix), after([]byte(cfg.Prefix)), func(key, _ []byte) bool {
		peer, n, err := o.parseKey(key)
		if err != nil {
			bad = err
			return false
		}
		q := o.queue(peer)
		if q.depth == 0 {
			q.from = n
		}
		q.depth++
		q.next, q.known, q.dirty = n+1, n+1, true
		return true
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("federation: open the outbox: %w", err)
	}
	return o, nil
}

// after is the first key that doesn't start with prefix.
func after(prefix []byte) []byte {
	end := append([]byte(nil), prefix...)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i]++; end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

func (o *Outbox) key(peer string, n uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte(o.cfg.Prefix+peer+"\x00"), n)
}

func (o *Outbox) parseKey(key []byte) (peer string, n uint64, err error) {
	rest := string(key[len(o.cfg.Prefix):])
	peer, number, ok := strings.Cut(rest, "\x00")
	if !ok || len(number) != 8 {
		return "", 0, fmt.Errorf("key %q isn't one of the outbox", key)
	}
	return peer, binary.BigEndian.Uint64([]byte(number)), nil
}

// queue returns a peer's queue; o.mu is held, or nobody else knows o yet.
func (o *Outbox) queue(peer string) *queue {
	q := o.peers[peer]
	if q == nil {
		q = &queue{peer: peer, missing: make(map[uint64]struct{}), kick: make(chan struct{}, 1)}
		o.peers[peer] = q
	}
	return q
}

// Entry returns what the caller writes into its own atomic batch to have ref's item sent to a peer. Items are sent in
// the order of the calls, if the batches become visible in that order too. The caller calls Wake when the batch is
// durable.
func (o *Outbox) Entry(peer string, ref []byte) (key, value []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	q := o.queue(peer)
	n := q.next
	q.next++
	q.depth++
	return o.key(peer, n), append([]byte(nil), ref...)
}

// Wake says that there is something new in a peer's queue.
func (o *Outbox) Wake(peer string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	q := o.queue(peer)
	q.dirty = true
	o.work(q)
}

// Kick says that a peer was seen alive: what waits for it is sent now, whatever pause its queue is in.
func (o *Outbox) Kick(peer string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	q := o.peers[peer]
	if q == nil {
		return
	}
	select {
	case q.kick <- struct{}{}:
	default:
	}
}

// Depth returns how many items wait for a peer, those whose batch isn't durable yet among them. One whose batch was
// given up counts until the store is opened again.
func (o *Outbox) Depth(peer string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	if q := o.peers[peer]; q != nil {
		return q.depth
	}
	return 0
}

// Run sends until ctx ends or Close is called, and returns when nothing is being sent any more. It is called once.
func (o *Outbox) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o.mu.Lock()
	if o.closed || o.ctx != nil {
		o.mu.Unlock()
		return errors.New("federation: the outbox runs already, or is closed")
	}
	o.ctx, o.stop = ctx, cancel
	for _, q := range o.peers {
		if q.dirty {
			o.work(q)
		}
	}
	o.mu.Unlock()
	<-ctx.Done()
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.workers.Wait()
	return nil
}

// Close ends Run and waits until nothing is being sent any more.
func (o *Outbox) Close() {
	o.mu.Lock()
	o.closed = true
	stop := o.stop
	o.mu.Unlock()
	if stop != nil {
		stop()
	}
	o.workers.Wait()
}

// work starts the queue's goroutine if there is none; o.mu is held.
func (o *Outbox) work(q *queue) {
	if q.working || o.ctx == nil || o.closed {
		return
	}
	q.working = true
	o.workers.Add(1)
	ctx := o.ctx
	go func() {
		defer o.workers.Done()
		o.drain(ctx, q)
	}()
}

// stored is an item of a queue as it is in the store.
type stored struct {
	number uint64
	ref    []byte
}

// round is one way through a queue, from its first entry to its last.
type round struct {
	held map[mimi.URI]struct{} // rooms that the peer didn't take something of
	kept map[uint64]struct{}   // that, and what comes after it in these rooms: entries that wait for the next round
	err  error                 // why, for the first of them
}

// drain sends a queue until it is empty or ctx ends. A peer that can't be reached, or serve, gets a pause, and so does one
// that hasn't taken everything in a round.
func (o *Outbox) drain(ctx context.Context, q *queue) {
	failures := 0
	r := new(round)
	for ctx.Err() == nil {
		var list []stored
		err := o.cut(q)
		if err == nil {
			list, err = o.read(q, r.kept)
		}
		if err == nil && len(list) > 0 {
			var sent bool
			if sent, err = o.deliver(ctx, q, r, list); sent {
				failures = 0
			}
			if err == nil {
				continue
			}
		}
		if err == nil && r.err == nil {
			if o.rest(q) {
				return
			}
			continue
		}
		if ctx.Err() != nil {
			break
		}
		err = cmp.Or(err, r.err)
		r = new(round)
		pause := o.backoff(failures, err)
		failures++
		o.cfg.Log.Debug("sending to a peer failed", "peer", q.peer, "failures", failures, "pause", pause, "err", err)
		if o.sleep(ctx, q, pause) {
			failures = 0
		}
	}
	o.mu.Lock()
	q.working = false
	o.mu.Unlock()
}

// deliver sends the first items of list, as many as fit in a batch, and says whether anything was delivered. The error is
// one that keeps the peer from getting anything now.
func (o *Outbox) deliver(ctx context.Context, q *queue, r *round, list []stored) (sent bool, err error) {
	items, loaded, gone, err := o.load(list)
	if len(gone) > 0 {
		o.cfg.Log.Warn("dropped from the outbox", "peer", q.peer, "items", len(gone), "err", ErrNoItem)
	}
	for _, s := range gone {
		if o.cfg.OnDrop != nil {
			o.cfg.OnDrop(q.peer, s.ref, ErrNoItem)
		}
	}
	done, kept := gone, []stored(nil)
	if err == nil {
		var sending []OutboxItem
		var entries []stored
		for i, item := range items {
			if _, held := r.held[item.Room]; held {
				kept = append(kept, loaded[i])
			} else {
				sending, entries = append(sending, item), append(entries, loaded[i])
			}
		}
		for i, e := range o.send(ctx, q.peer, sending) {
			switch {
			case e == nil:
				done, sent = append(done, entries[i]), true
			case Permanent(e):
				o.dropped(q.peer, entries[i].ref, e)
				done = append(done, entries[i])
			default:
				kept = append(kept, entries[i])
				if r.held == nil {
					r.held, r.kept, r.err = make(map[mimi.URI]struct{}), make(map[uint64]struct{}), e
				}
				r.held[sending[i].Room] = struct{}{}
				if refused, ok := errors.AsType[*Error](e); !ok || Unavailable(e) || refused.Code == CodeUnapproved {
					err = cmp.Or(err, e)
				}
			}
		}
	}
	for _, s := range kept {
		r.kept[s.number] = struct{}{}
	}
	return sent, cmp.Or(o.remove(q, done, kept), err)
}

func (o *Outbox) send(ctx context.Context, peer string, items []OutboxItem) []error {
	if len(items) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, o.cfg.SendTimeout)
	defer cancel()
	return o.cfg.Send(ctx, peer, items)
}

// SendRuns delivers items, all of one room or of none, as OutboxConfig.Send has to: one run after the other, length says
// how many items the next run has. A run that the peer refuses for good is sent again item by item, so that it costs no
// other than the one that is refused.
func SendRuns(items []OutboxItem, length func([]OutboxItem) int, send func([]OutboxItem) error) []error {
	errs := make([]error, len(items))
	single := 0 // so many items are still sent one by one
	for i := 0; i < len(items); {
		n := 1
		if single == 0 {
			n = length(items[i:])
		}
		err := send(items[i : i+n])
		if Permanent(err) && n > 1 {
			single = n
			continue
		}
		if err != nil && !Permanent(err) {
			for ; i < len(errs); i++ {
				errs[i] = err
			}
			return errs
		}
		errs[i] = err // of a run of several it is nil
		i, single = i+n, max(0, single-n)
	}
	return errs
}

func (o *Outbox) dropped(peer string, ref []byte, err error) {
	o.cfg.Log.Warn("dropped from the outbox", "peer", peer, "err", err)
	if o.cfg.OnDrop != nil {
		o.cfg.OnDrop(peer, ref, err)
	}
}

// rest ends the queue's goroutine unless something has come since the store was read.
func (o *Outbox) rest(q *queue) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if q.dirty {
		return false
	}
	q.working = false
	return true
}

// read returns the first items of a queue but those in skip, as many as a batch may have.
func (o *Outbox) read(q *queue, skip map[uint64]struct{}) ([]stored, error) {
	o.mu.Lock()
	q.dirty = false
	first := q.from
	for n := range q.missing {
		first = min(first, n)
	}
	o.mu.Unlock()
	var list []stored
	err := o.cfg.Store.Scan(o.key(q.peer, first), after([]byte(o.cfg.Prefix+q.peer+"\x00")), func(key, value []byte) bool {
		n := binary.BigEndian.Uint64(key[len(key)-8:])
		if _, ok := skip[n]; !ok {
			list = append(list, stored{n, append([]byte(nil), value...)})
		}
		return len(list) < o.cfg.MaxBatchItems
	})
	if err != nil {
		return nil, fmt.Errorf("read the outbox: %w", err)
	}
	return list, nil
}

// load turns the first of list into items, as many as fit in a batch. done are the entries of the items, gone those
// before the last of them that have nothing to send any more.
func (o *Outbox) load(list []stored) (items []OutboxItem, done, gone []stored, err error) {
	size := 0
	for _, s := range list {
		item, err := o.cfg.Load(s.ref)
		if errors.Is(err, ErrNoItem) {
			gone = append(gone, s)
			continue
		}
		if err != nil && len(items) == 0 {
			return nil, nil, gone, fmt.Errorf("load an item of the outbox: %w", err)
		}
		size += len(item.Fanout)
		if err != nil || (len(items) > 0 && size > o.cfg.MaxBatchBytes) {
			break // it is the first one next time
		}
		items, done = append(items, item), append(done, s)
	}
	return items, done, gone, nil
}

// remove deletes entries that were delivered or dropped, and has those that are kept read again. Should the machine fail
// before the next sync, they are sent again.
func (o *Outbox) remove(q *queue, done, kept []stored) error {
	if len(done) > 0 {
		keys := make([][]byte, len(done))
		for i, s := range done {
			keys[i] = o.key(q.peer, s.number)
		}
		if err := o.cfg.Store.Delete(keys...); err != nil {
			return fmt.Errorf("clear the outbox: %w", err)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range done {
		delete(q.missing, s.number)
		for q.from < s.number {
			if q.from >= q.known {
				q.missing[q.from] = struct{}{}
			}
			q.from++
		}
		q.from = max(q.from, s.number+1)
	}
	for _, s := range kept {
		if s.number < q.from {
			q.missing[s.number] = struct{}{}
		}
	}
	q.depth = max(0, q.depth-len(done))
	return nil
}

// backoff is how long to wait after so many failures: half of it and a random part, so that nodes don't retry in step.
func (o *Outbox) backoff(failures int, err error) time.Duration {
	d := o.cfg.MaxBackoff
	if failures < 30 {
		d = min(d, o.cfg.MinBackoff<<failures)
	}
	d = d/2 + rand.N(d/2+1)
	if e, ok := errors.AsType[*Error](err); ok {
		d = max(d, min(e.RetryAfter, o.cfg.MaxBackoff))
	}
	return d
}

// sleep waits, and says whether a Kick ended it.
func (o *Outbox) sleep(ctx context.Context, q *queue, d time.Duration) (kicked bool) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-q.kick:
		return true
	}
	return false
}
