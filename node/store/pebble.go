package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Options of a Pebble store; the zero value has defaults fit for a node on a small machine.
type Options struct {
	// CacheBytes is the size of the block cache; 0 means 16 MiB. Pebble takes the memtables' memory off it, so that it must
	// be larger than two of them: the first block of every read came from the file otherwise.
	CacheBytes int64
	// MemTableBytes is the size of one memtable, of which there are up to two; 0 means 4 MiB.
	MemTableBytes uint64
	// Log gets Pebble's errors; nil discards them.
	Log *slog.Logger
	// ReadOnly opens a store that exists, and changes nothing of it. Commit and Apply fail.
	ReadOnly bool
	// BallastBytes is the size of the file that Refill makes, to be given back when the disk is full; 0: there is none.
	BallastBytes int64
	// Full, if not nil, is called after the ballast was given back. All writes wait for it.
	Full func()
	// Failed is called once when the store can't go on, because the write-ahead log, for instance, can't be written. From
	// then on every call fails with ErrFailed, and the directory may stay locked until the process ends. What was
	// acknowledged is on disk, and the next start recovers it. nil: a log line, and the process ends with status 1.
	Failed func(error)
}

// Pebble is a Store in a local directory.
type Pebble struct {
	db   *pebble.DB
	lock *pebble.Lock
	fs   vfs.FS // gives no ballast back
	dir  string
	o    Options

	opened      atomic.Bool
	checkpoints atomic.Int32          // being written
	failed      atomic.Pointer[error] // why the store can't go on, nil while it does; Pebble may hold locks for ever then
	ended       chan struct{}         // closed when failed is set

	// closing is held for reading by every call; Close holds it for writing and sets closed.
	closing sync.RWMutex
	closed  bool

	// scans are the iterators that are open. They aren't open under closing, since fn of Scan may call the store;
	// Close waits for them after it has set closed.
	scans sync.WaitGroup

	// order is held for writing while a compare-and-swap reads and applies, and for reading by blind writes, which may
	// pass each other. Nobody holds it across a sync.
	order sync.RWMutex
}

// Open opens the store in dir and makes it, with mode 0700, if there is none. The error wraps ErrInUse if another
// process has it open.
func Open(dir string, o Options) (*Pebble, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the store's directory: %w", err)
	}
	return OpenFS(vfs.Default, dir, o)
}

// OpenFS is Open on another file system than the machine's; tests use it to simulate crashes.
func OpenFS(fs vfs.FS, dir string, o Options) (*Pebble, error) {
	if o.CacheBytes == 0 {
		o.CacheBytes = 16 << 20
	}
	if o.MemTableBytes == 0 {
		o.MemTableBytes = 4 << 20
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the store's directory: %w", err)
	}
	lock, err := pebble.LockDirectory(dir, fs)
	if err != nil {
		return nil, fmt.Errorf("locking the store in %s: %w (%v)", dir, ErrInUse, err)
	}
	p := &Pebble{lock: lock, fs: fs, dir: dir, o: o, ended: make(chan struct{})}
	options := &pebble.Options{
		FS:                 guardedFS{vfs.OnDiskFull(fs, p.full), p},
		Lock:               lock,
		FormatMajorVersion: pebble.FormatNewest,
		CacheSize:          o.CacheBytes,
		MemTableSize:       o.MemTableBytes,
		Logger:             pebbleLog{p},
		ReadOnly:           o.ReadOnly,
	}
	for i := range options.Levels {
		options.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	if p.db, err = openPebble(dir, options); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the store in %s: %w", dir, err), lock.Close())
	}
	p.opened.Store(true)
	return p, nil
}

// usable says why nothing can be done; closing is held.
func (p *Pebble) usable() error {
	if p.closed {
		return ErrClosed
	}
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// apply makes a batch visible without waiting for the disk. Pebble panics if its log couldn't be written.
func (p *Pebble) apply(batch *pebble.Batch, o *pebble.WriteOptions) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case runtime.Error:
			panic(r)
		case error:
			err = p.fail(r)
		default:
			panic(r)
		}
	}()
	if o.Sync {
		return p.db.ApplyNoSyncWait(batch, o)
	}
	return p.db.Apply(batch, o)
}

// Get is as in Store.
func (p *Pebble) Get(key []byte) ([]byte, error) {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if err := p.usable(); err != nil {
		return nil, err
	}
	return p.get(key)
}

func (p *Pebble) get(key []byte) ([]byte, error) {
	value, closer, err := p.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading from the store: %w", err)
	}
	v := make([]byte, len(value))
	copy(v, value)
	return v, closer.Close()
}

// Has is as in Store. An iterator asks the bloom filters of all levels, of which Get leaves out the last and largest.
func (p *Pebble) Has(key []byte) (bool, error) {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if p.closed {
		return false, ErrClosed
	}
	it, err := p.db.NewIter(&pebble.IterOptions{UseL6Filters: true})
	if err != nil {
		return false, fmt.Errorf("reading from the store: %w", err)
	}
	has := it.SeekPrefixGE(key)
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return false, fmt.Errorf("reading from the store: %w", err)
	}
	return has, nil
}

// Scan is as in Store. fn may call the store.
func (p *Pebble) Scan(start, end []byte, fn func(key, value []byte) bool) error {
	p.closing.RLock()
	if err := p.usable(); err != nil {
		p.closing.RUnlock()
		return err
	}
	p.scans.Add(1)
	defer p.scans.Done()
	it, err := p.db.NewIter(&pebble.IterOptions{LowerBound: slices.Clone(start), UpperBound: slices.Clone(end)})
	p.closing.RUnlock()
	if err != nil {
		return fmt.Errorf("reading from the store: %w", err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return errors.Join(fmt.Errorf("reading from the store: %w", err), it.Close())
		}
		if !fn(it.Key(), value) {
			break
		}
	}
	if err := it.Error(); err != nil {
		return errors.Join(fmt.Errorf("reading from the store: %w", err), it.Close())
	}
	return it.Close()
}

// Commit is as in Store.
func (p *Pebble) Commit(changes, expect map[string][]byte) (bool, error) {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if err := p.usable(); err != nil {
		return false, err
	}
	batch := p.db.NewBatch()
	for key, value := range changes {
		var err error
		if value == nil {
			err = batch.Delete([]byte(key), nil)
		} else {
			err = batch.Set([]byte(key), value, nil)
		}
		if err != nil {
			return false, errors.Join(fmt.Errorf("filling a batch: %w", err), batch.Close())
		}
	}
	ok, err := p.swap(batch, expect)
	if err != nil || !ok {
		return false, errors.Join(err, batch.Close())
	}
	if batch.Empty() {
		return true, batch.Close()
	}
	if err := p.sync(batch); err != nil {
		return false, err
	}
	return true, nil
}

// swap applies the batch, without waiting for the disk, if expect holds.
func (p *Pebble) swap(batch *pebble.Batch, expect map[string][]byte) (bool, error) {
	if len(expect) == 0 {
		p.order.RLock()
		defer p.order.RUnlock()
	} else {
		p.order.Lock()
		defer p.order.Unlock()
	}
	for key, want := range expect {
		have, err := p.get([]byte(key))
		if err != nil {
			return false, err
		}
		if (have == nil) != (want == nil) || !bytes.Equal(have, want) {
			return false, nil
		}
	}
	if batch.Empty() {
		return true, nil
	}
	if err := p.apply(batch, pebble.Sync); err != nil {
		return false, fmt.Errorf("writing to the store: %w", err)
	}
	return true, nil
}

// Apply is as in Store.
func (p *Pebble) Apply(b *Batch) (func() error, error) {
	p.closing.RLock()
	if err := p.usable(); err != nil {
		p.closing.RUnlock()
		return nil, err
	}
	batch := p.db.NewBatchWithSize(b.size + 16*len(b.changes) + 64)
	for _, c := range b.changes {
		var err error
		if c.span {
			err = batch.DeleteRange(c.key, c.value, nil)
		} else if c.remove {
			err = batch.Delete(c.key, nil)
		} else {
			err = batch.Set(c.key, c.value, nil)
		}
		if err != nil {
			p.closing.RUnlock()
			return nil, errors.Join(fmt.Errorf("filling a batch: %w", err), batch.Close())
		}
	}
	// An empty batch would not be synced, and what was applied before must be durable when wait returns.
	if batch.Empty() {
		if err := batch.LogData(nil, nil); err != nil {
			p.closing.RUnlock()
			return nil, errors.Join(fmt.Errorf("filling a batch: %w", err), batch.Close())
		}
	}
	p.order.RLock()
	err := p.apply(batch, pebble.Sync)
	p.order.RUnlock()
	p.closing.RUnlock()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("writing to the store: %w", err), batch.Close())
	}
	return func() error { return p.sync(batch) }, nil
}

// Delete is as in Store.
func (p *Pebble) Delete(keys ...[]byte) error {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if err := p.usable(); err != nil {
		return err
	}
	batch := p.db.NewBatch()
	for _, k := range keys {
		if err := batch.Delete(k, nil); err != nil {
			return errors.Join(fmt.Errorf("filling a batch: %w", err), batch.Close())
		}
	}
	p.order.RLock()
	err := p.apply(batch, pebble.NoSync)
	p.order.RUnlock()
	if err != nil {
		return errors.Join(fmt.Errorf("writing to the store: %w", err), batch.Close())
	}
	return batch.Close()
}

// sync waits until an applied batch is on disk.
func (p *Pebble) sync(batch *pebble.Batch) error {
	if err := batch.SyncWait(); err != nil {
		return fmt.Errorf("syncing the store: %w", p.fail(err))
	}
	return batch.Close()
}

// Checkpoint is as in Store; files are linked rather than copied where the file system can.
func (p *Pebble) Checkpoint(dir string) (err error) {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if err := p.usable(); err != nil {
		return err
	}
	p.checkpoints.Add(1)
	defer p.checkpoints.Add(-1)
	defer func() { // Pebble holds no lock when the directory of a checkpoint can't be synced
		switch r := recover().(type) {
		case nil:
		case runtime.Error:
			panic(r)
		case error:
			err = fmt.Errorf("writing a checkpoint of the store: %w", r)
		default:
			panic(r)
		}
	}()
	if err := p.db.Checkpoint(dir, pebble.WithFlushedWAL()); err != nil {
		return fmt.Errorf("writing a checkpoint of the store: %w", err)
	}
	return nil
}

// Compact rewrites the store's files: what was overwritten or deleted is in none of them any more once the store is
// closed.
func (p *Pebble) Compact(ctx context.Context) error {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if err := p.usable(); err != nil {
		return err
	}
	err := p.db.Flush()
	if err == nil {
		err = p.db.Compact(ctx, nil, bytes.Repeat([]byte{0xff}, 64), false)
	}
	if err != nil {
		return fmt.Errorf("compacting the store: %w", err)
	}
	return nil
}

// Close is as in Store. A second Close does nothing. A store that has failed isn't released before the process ends.
func (p *Pebble) Close() error {
	done := make(chan error, 1)
	go func() { done <- p.close() }()
	select {
	case err := <-done:
		return err
	case <-p.ended: // who holds closing may never return, nor Pebble
		return *p.failed.Load()
	}
}

func (p *Pebble) close() error {
	p.closing.Lock()
	closed := p.closed
	p.closed = true
	p.closing.Unlock()
	if closed {
		return nil
	}
	p.scans.Wait()
	err := p.db.Close()
	if err := errors.Join(err, p.lock.Close()); err != nil {
		return fmt.Errorf("closing the store: %w", err)
	}
	return nil
}
