package mls_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/parley-mls/parley/mls"
)

// splitStore keeps a group's state in a database that may never forget what was overwritten, and the entries that
// Erasable names in slots of a file that is overwritten in place. The database's entry of these is the slot's number.
type splitStore struct {
	db    batch
	slots *os.File
	owner map[uint32]string // the used slots
}

const slotSize = 32

// change is a Batch: what an operation sets, nil for what it deletes.
type change map[string][]byte

func (c change) Set(k, v []byte) { c[string(k)] = append([]byte{}, v...) }
func (c change) Delete(k []byte) { c[string(k)] = nil }

// apply makes a change durable: new keys first, then all else at once, then the end of the former keys. What a crash
// leaves between these steps is slots without an owner, which are cleared when the store is opened.
func (s *splitStore) apply(c change) {
	var former []uint32
	for k, v := range c {
		if !mls.Erasable([]byte(k)) {
			continue
		}
		if n, ok := s.db[k]; ok {
			former = append(former, binary.BigEndian.Uint32(n))
		}
		if v != nil {
			n := s.free()
			s.owner[n] = k
			must(s.slots.WriteAt(v, int64(n)*slotSize))
			c[k] = binary.BigEndian.AppendUint32(nil, n)
		}
	}
	check(s.slots.Sync())
	for k, v := range c { // one atomic and synced batch of the database
		if v != nil {
			s.db.Set([]byte(k), v)
		} else {
			s.db.Delete([]byte(k))
		}
	}
	for _, n := range former {
		must(s.slots.WriteAt(make([]byte, slotSize), int64(n)*slotSize))
		delete(s.owner, n)
	}
	check(s.slots.Sync())
}

func (s *splitStore) free() (n uint32) {
	for s.owner[n] != "" {
		n++
	}
	return n
}

// all is what LoadGroup reads.
func (s *splitStore) all(yield func(k, v []byte) bool) {
	for k, v := range s.db {
		if mls.Erasable([]byte(k)) {
			n := binary.BigEndian.Uint32(v)
			v = make([]byte, slotSize)
			must(s.slots.ReadAt(v, int64(n)*slotSize))
		}
		if !yield([]byte(k), v) {
			return
		}
	}
}

// An application keeps the few entries that hold keys where overwriting is real.
func ExampleErasable() {
	dir := must(os.MkdirTemp("", "mls"))
	defer os.RemoveAll(dir)
	file := must(os.OpenFile(filepath.Join(dir, "keys"), os.O_RDWR|os.O_CREATE, 0o600))
	defer file.Close()
	store := &splitStore{db: batch{}, slots: file, owner: make(map[uint32]string)}

	cfg := mls.Config{Verifier: acceptAll{}}
	key := must(suite.GenerateSignatureKey(rand.Reader))
	created := change{}
	g := must(mls.NewGroup(cfg, created, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: key,
	}))
	store.apply(created)
	first := must(os.ReadFile(file.Name()))

	for range 6 { // past epochs are kept for late messages, with their keys
		next := change{}
		must(g.Commit(next, mls.CommitOptions{}))
		check(g.Confirm(next))
		store.apply(next)
	}
	now := must(os.ReadFile(file.Name()))
	for i := 0; i < len(first); i += slotSize {
		fmt.Println("a key of the first epoch is left:", bytes.Contains(now, first[i:i+slotSize]))
	}
	g = must(mls.LoadGroup(cfg, key, store.all))
	fmt.Println("epoch", g.Epoch())
	// Output:
	// a key of the first epoch is left: false
	// a key of the first epoch is left: false
	// epoch 6
}
