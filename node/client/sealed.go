package client

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/store"
)

// sealedStore is the client's store. Entries whose deletion has to be real are sealed, each under a key of its own from
// the key file: the private keys of KeyPackages, external commits that wait for their answer, and of a group's state
// the keys with which package mls seals the rest of it. The value in the store is
//
//	struct {
//	    uint8 sealed = 1;            0 begins the values of the first format, which weren't sealed
//	    uint32 slot;
//	    uint64 id;                   of the key in the slot
//	    opaque nonce[12], ciphertext[], tag[16];    AES-256-GCM, the entry's key as associated data
//	} Sealed;
//
// A key that a batch uses is on disk before the batch; a key that a batch makes useless is erased after the batch is on
// disk, before wait returns. Whatever a crash leaves over is erased when the store is opened again. Only what drops keys,
// a new epoch above all, waits for the key file; a message doesn't.
type sealedStore struct {
	*store.Pebble
	keys *keyFile

	failed <-chan error // has a value once the store can't go on

	mu   sync.Mutex
	refs map[string]slotRef // guarded by mu: the key of each sealed entry
}

const (
	sealedMark   = 1
	sealedPrefix = 1 + 4 + 8
)

// erasable says whether an entry's deletion has to be real.
func erasable(key []byte) bool {
	if len(key) == 0 {
		return false
	}
	switch string(key[:1]) {
	case prefixKeyPackage, prefixJoin:
		return true
	case prefixRoom:
		i := bytes.IndexByte(key, 0)
		return i >= 0 && len(key) > i+1 && key[i+1] == roomGroup && mls.Erasable(key[i+2:])
	}
	return false
}

// newSealedStore puts the client's key file before its store; open gets the keys that the store refers to. What isn't
// sealed yet is sealed.
func newSealedStore(db *store.Pebble, open func(used map[slotRef]bool) (*keyFile, error)) (*sealedStore, error) {
	s := &sealedStore{Pebble: db, refs: make(map[string]slotRef)}
	used := make(map[slotRef]bool)
	plain := new(store.Batch)
	rooms, err := roomURIs(db)
	if err != nil {
		return nil, err
	}
	prefixes := []string{prefixKeyPackage, prefixJoin}
	for _, uri := range rooms {
		prefixes = append(prefixes, string(roomPrefix(uri))+string(roomGroup))
	}
	for _, p := range prefixes {
		err := db.Scan([]byte(p), store.PrefixEnd([]byte(p)), func(key, value []byte) bool {
			if !erasable(key) {
				return true
			}
			if ref, ok := refOf(value); ok {
				s.refs[string(key)] = ref
				used[ref] = true
			} else {
				plain.Set(key, value)
			}
			return true
		})
		if err != nil {
			return nil, fmt.Errorf("client: look for sealed entries: %w", err)
		}
	}
	if s.keys, err = open(used); err != nil {
		return nil, err
	}
	if plain.Len() > 0 {
		plain.Set(keyCompact, nil)
		wait, err := s.Apply(plain)
		if err == nil {
			err = wait()
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("client: seal the state: %w", err), s.keys.close())
		}
	}
	return s, nil
}

func refOf(value []byte) (slotRef, bool) {
	if len(value) < sealedPrefix || value[0] != sealedMark {
		return slotRef{}, false
	}
	return slotRef{binary.BigEndian.Uint32(value[1:]), binary.BigEndian.Uint64(value[5:])}, true
}

func slotCipher(key secretBytes) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// seal returns the value as it is stored, and the key that it needs.
func (s *sealedStore) seal(key, value []byte) ([]byte, slotRef, error) {
	ref, k, err := s.keys.take()
	if err != nil {
		return nil, ref, err
	}
	defer clear(k)
	aead, err := slotCipher(k)
	if err != nil {
		return nil, ref, err
	}
	out := binary.BigEndian.AppendUint32([]byte{sealedMark}, ref.number)
	out = binary.BigEndian.AppendUint64(out, ref.id)
	return aead.Seal(out, nil, value, key), ref, nil
}

// open is the opposite of seal; values of the first format it returns as they are.
func (s *sealedStore) open(key, value []byte) ([]byte, error) {
	ref, ok := refOf(value)
	if !ok {
		return value, nil
	}
	k, err := s.keys.key(ref)
	if err != nil {
		return nil, err
	}
	defer clear(k)
	aead, err := slotCipher(k)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nil, value[sealedPrefix:], key)
	if err != nil {
		return nil, fmt.Errorf("%w: the seal of an entry doesn't open with the key in slot %d", ErrKeys, ref.number)
	}
	return plain, nil
}

// Apply implements store.Store.
func (s *sealedStore) Apply(b *store.Batch) (func() error, error) {
	out := b
	change := false
	b.Changes(func(key, _ []byte) { change = change || erasable(key) })
	var useless []uint32
	if change {
		var err error
		if out, useless, err = s.sealBatch(b); err != nil {
			return nil, err
		}
	}
	wait, err := s.Pebble.Apply(out)
	if err != nil || len(useless) == 0 {
		return wait, err
	}
	return func() error {
		if err := wait(); err != nil {
			return err
		}
		return s.keys.erase(useless)
	}, nil
}

// sealBatch returns the batch for the store and the slots of the keys that are useless once it is on disk.
func (s *sealedStore) sealBatch(b *store.Batch) (*store.Batch, []uint32, error) {
	out := new(store.Batch)
	var useless []uint32
	var bad error
	s.mu.Lock()
	defer s.mu.Unlock()
	b.Changes(func(key, value []byte) {
		switch {
		case bad != nil:
			return
		case !erasable(key):
			if value == nil {
				out.Delete(key)
			} else {
				out.Set(key, value)
			}
			return
		}
		if old, ok := s.refs[string(key)]; ok {
			useless = append(useless, old.number)
			delete(s.refs, string(key))
		}
		if value == nil {
			out.Delete(key)
			return
		}
		sealed, ref, err := s.seal(key, value)
		if err != nil {
			bad = err
			return
		}
		s.refs[string(key)] = ref
		out.Set(key, sealed)
	})
	return out, useless, bad
}

// Commit implements store.Store, for entries that aren't sealed.
func (s *sealedStore) Commit(changes, expect map[string][]byte) (bool, error) {
	for key := range changes {
		if erasable([]byte(key)) {
			return false, errors.New("client: sealed entries are changed by Apply")
		}
	}
	return s.Pebble.Commit(changes, expect)
}

// replaced says whether an entry has another value by now than this one.
func (s *sealedStore) replaced(key, value []byte) bool {
	ref, _ := refOf(value)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refs[string(key)] != ref
}

// Get implements store.Store.
func (s *sealedStore) Get(key []byte) ([]byte, error) {
	for {
		v, err := s.Pebble.Get(key)
		if err != nil || v == nil || !erasable(key) {
			return v, err
		}
		plain, err := s.open(key, v)
		if err == nil || !s.replaced(key, v) {
			return plain, err
		}
	}
}

// Scan implements store.Store. An entry whose key is erased while the scan goes on is left out.
func (s *sealedStore) Scan(start, end []byte, fn func(key, value []byte) bool) error {
	var bad error
	err := s.Pebble.Scan(start, end, func(key, value []byte) bool {
		if erasable(key) {
			plain, err := s.open(key, value)
			if err != nil && s.replaced(key, value) {
				return true
			}
			if err != nil {
				bad = err
				return false
			}
			value = plain
		}
		return fn(key, value)
	})
	return errors.Join(bad, err)
}

// purge rewrites the store's files if they have what wasn't sealed when it was written.
func (s *sealedStore) purge(ctx context.Context) error {
	due, err := s.Get(keyCompact)
	if err != nil || due == nil {
		return err
	}
	if err := s.Compact(ctx); err != nil {
		return err
	}
	_, err = s.Pebble.Commit(map[string][]byte{string(keyCompact): nil}, nil)
	return err
}

// Close implements store.Store.
func (s *sealedStore) Close() error { return errors.Join(s.Pebble.Close(), s.keys.close()) }
