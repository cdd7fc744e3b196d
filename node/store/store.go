// Package store is the durable state of a node and of a client: ordered keys, atomic batches and compare-and-swap,
// with one process as the owner. Store is the interface, Pebble the implementation that keeps everything on the local
// disk; package storetest holds the checks that every implementation must pass.
//
// What a call acknowledges has been synced: it survives a crash of the process and of the machine.
package store

import (
	"errors"
	"slices"
)

// ErrInUse says that another process has the store open.
var ErrInUse = errors.New("the store is in use by another process")

// ErrClosed says that the store was closed.
var ErrClosed = errors.New("the store is closed")

// ErrFailed says that the store couldn't write what it has to, and can't go on until the next start of the process.
var ErrFailed = errors.New("the store has failed")

// Store is an ordered key-value store. Its methods may be called from several goroutines at once. Keys and values
// that are passed in aren't kept; what is returned belongs to the caller.
type Store interface {
	// Get returns the value of a key, nil if there is none. An empty value isn't nil.
	Get(key []byte) ([]byte, error)
	// Has says whether a key has a value. It is made for keys that mostly have none, of which it says so at a quarter
	// of what Get costs.
	Has(key []byte) (bool, error)
	// Scan calls fn with the pairs from start (included) to end (excluded, nil: no end) in ascending order of keys,
	// all of one moment, until fn returns false. The slices are valid during the call only.
	Scan(start, end []byte, fn func(key, value []byte) bool) error
	// Commit makes changes as one atomic and durable step if each key of expect has the value given there; nil means
	// absent. It returns false, with nothing done, if one has not. A nil value in changes deletes the key.
	Commit(changes, expect map[string][]byte) (ok bool, err error)
	// Apply makes the changes of a batch visible, all at once and after those of every call that returned before,
	// and returns. They are durable when wait returns nil, and so is everything that was applied before. wait
	// may be called once at most, from any goroutine, and never while holding a lock: a sync takes long. The batch
	// may be used again after Apply.
	Apply(b *Batch) (wait func() error, err error)
	// Delete removes keys, visibly when it returns, and durably once anything is durable that was applied later.
	Delete(keys ...[]byte) error
	// Checkpoint writes a consistent copy of the whole store to a directory that doesn't exist yet.
	Checkpoint(dir string) error
	// Close waits for calls under way and releases the store.
	Close() error
}

// Batch collects changes for one Apply. A later change of a key wins over an earlier one. The zero value is ready for
// use. It serves one goroutine.
type Batch struct {
	changes []change
	size    int
}

type change struct {
	key, value []byte // value: the end of a span
	remove     bool
	span       bool
}

// Set sets a key's value.
func (b *Batch) Set(key, value []byte) { b.put(nil, key, value) }

// Delete removes a key; it needn't exist.
func (b *Batch) Delete(key []byte) { b.remove(nil, key) }

// DeleteRange removes all keys from start (included) to end (excluded), whatever their number in constant space.
func (b *Batch) DeleteRange(start, end []byte) {
	b.changes = append(b.changes, change{key: slices.Clone(start), value: slices.Clone(end), remove: true, span: true})
	b.size += len(start) + len(end)
}

// Len returns the number of changes.
func (b *Batch) Len() int { return len(b.changes) }

// Size returns the bytes of all keys and values.
func (b *Batch) Size() int { return b.size }

// Reset empties the batch.
func (b *Batch) Reset() { *b = Batch{} }

// Changes calls fn with each change in order, but for DeleteRange; a nil value deletes the key.
func (b *Batch) Changes(fn func(key, value []byte)) {
	for _, c := range b.changes {
		if c.span {
			continue
		}
		if c.remove {
			fn(c.key, nil)
		} else {
			fn(c.key, c.value)
		}
	}
}

// Prefixed returns a view of the batch that puts prefix before every key: the state of one group, for example.
func (b *Batch) Prefixed(prefix []byte) PrefixedBatch {
	return PrefixedBatch{b: b, prefix: slices.Clone(prefix)}
}

func (b *Batch) put(prefix, key, value []byte) {
	v := make([]byte, len(value)) // not nil, though empty
	copy(v, value)
	b.changes = append(b.changes, change{key: slices.Concat(prefix, key), value: v})
	b.size += len(prefix) + len(key) + len(value)
}

func (b *Batch) remove(prefix, key []byte) {
	b.changes = append(b.changes, change{key: slices.Concat(prefix, key), remove: true})
	b.size += len(prefix) + len(key)
}

// PrefixedBatch is a view of a Batch in which every key has the same prefix.
type PrefixedBatch struct {
	b      *Batch
	prefix []byte
}

// Set sets the value of prefix || key.
func (p PrefixedBatch) Set(key, value []byte) { p.b.put(p.prefix, key, value) }

// Delete removes prefix || key.
func (p PrefixedBatch) Delete(key []byte) { p.b.remove(p.prefix, key) }

// PrefixEnd returns the first key after all keys that begin with prefix, nil if there is none: the end of a Scan.
func PrefixEnd(prefix []byte) []byte {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] != 0xff {
			end := slices.Clone(prefix[:i+1])
			end[i]++
			return end
		}
	}
	return nil
}

// ScanPrefix is Scan over all keys that begin with prefix; fn gets the keys without it.
func ScanPrefix(s Store, prefix []byte, fn func(key, value []byte) bool) error {
	return s.Scan(prefix, PrefixEnd(prefix), func(key, value []byte) bool {
		return fn(key[len(prefix):], value)
	})
}
