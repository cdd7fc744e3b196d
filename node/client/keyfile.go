package client

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
)

// keyFile is a file of keys that can be erased: each lies in a slot of its own, which a fresh random key overwrites in
// place. The store, which is log-structured, can't erase anything; what it keeps under one of these keys is gone with
// the key. A slot that nothing refers to holds a key too, ready for the next use: so one write erases an old key and
// makes a new one durable long before it is needed, and nobody waits for the disk when an epoch begins.
//
// Overwriting in place reaches as far as the disk lets it: a copy-on-write file system, the wear levelling of an SSD, a
// snapshot and a backup keep former contents, and against those only an encrypted disk helps.
//
//	struct {
//	    opaque magic[8] = "parley-k";
//	    uint16 format = 1;
//	    opaque zero[54 - 16];
//	    opaque sum[16];             first bytes of SHA-256 of what is before
//	} Header;                       the file's first 64 bytes
//
//	struct {
//	    uint64 id;                  random: tells a key from those that were in the slot before it
//	    opaque key[32];
//	    opaque zero[8];
//	    opaque sum[16];             first bytes of SHA-256 of the slot's number and what is before
//	} Slot;                         64 bytes, within one sector of the disk
type keyFile struct {
	f    slotFile
	rand io.Reader

	mu    sync.Mutex
	slots []slot // guarded by mu, by number
	free  []uint32
	grow  sync.Mutex // held while the file grows
}

// slotFile is what a keyFile needs of an os.File.
type slotFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
}

// slot is a slot's key. The zero value is one that was damaged.
type slot struct {
	id  uint64
	key secretBytes
}

// slotRef names a key: the slot and which of the keys that the slot had.
type slotRef struct {
	number uint32
	id     uint64
}

const (
	keyFileName   = "keys"
	keyFileMagic  = "parley-k"
	keyFileFormat = 1
	slotSize      = 64
	slotSum       = 48 // where its checksum begins
	keySize       = 32
	growth        = 64 // slots
)

// ErrKeys: the store and the key file of a device don't belong together, or a key that is needed is damaged or erased.
var ErrKeys = errors.New("keys of the state are missing")

// openKeyFile opens dir's key file, or makes one if there is none and nothing is in use. Keys that aren't in use are
// erased: they may have been meant to be when the process ended.
func openKeyFile(dir string, rand io.Reader, used map[slotRef]bool) (*keyFile, error) {
	path := filepath.Join(dir, keyFileName)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		if len(used) > 0 {
			return nil, fmt.Errorf("client: %w: there is no %s", ErrKeys, path)
		}
		if err = newKeyFile(path); err == nil {
			f, err = os.OpenFile(path, os.O_RDWR, 0)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("client: open the key file: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("client: open the key file: %w", err), f.Close())
	}
	k, err := loadKeyFile(f, info.Size(), rand, used)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("client: key file %s: %w", path, err), f.Close())
	}
	return k, nil
}

// newKeyFile makes a file without slots; a crash leaves the whole file or none.
func newKeyFile(path string) error {
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(keyFileHeader())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func keyFileHeader() []byte {
	b := binary.BigEndian.AppendUint16([]byte(keyFileMagic), keyFileFormat)
	b = append(b, make([]byte, slotSum-len(b))...)
	sum := sha256.Sum256(b)
	return append(b, sum[:slotSize-slotSum]...)
}

// loadKeyFile reads a file of so many bytes.
func loadKeyFile(f slotFile, size int64, rand io.Reader, used map[slotRef]bool) (*keyFile, error) {
	const most = 1 << 30
	if size > most {
		return nil, fmt.Errorf("%d bytes are too many", size)
	}
	all := make([]byte, size)
	if n, err := f.ReadAt(all, 0); err != nil && !(errors.Is(err, io.EOF) && n == len(all)) {
		return nil, err
	}
	if len(all) < slotSize || !bytes.Equal(all[:slotSize], keyFileHeader()) {
		if len(all) >= slotSize && bytes.HasPrefix(all, []byte(keyFileMagic)) {
			return nil, fmt.Errorf("%w: format %d or damaged, this program knows format %d", ErrKeys,
				binary.BigEndian.Uint16(all[len(keyFileMagic):]), keyFileFormat)
		}
		return nil, fmt.Errorf("%w: not a key file", ErrKeys)
	}
	defer clear(all)
	k := &keyFile{f: f, rand: rand}
	for at := slotSize; at+slotSize <= len(all); at += slotSize {
		k.slots = append(k.slots, decodeSlot(uint32(len(k.slots)), all[at:at+slotSize]))
	}
	inUse := make(map[uint32]bool)
	for ref := range used {
		if err := k.check(ref); err != nil {
			return nil, err
		}
		inUse[ref.number] = true
	}
	var unused []uint32
	for n := range k.slots {
		if !inUse[uint32(n)] {
			unused = append(unused, uint32(n))
		}
	}
	if err := k.erase(unused); err != nil {
		return nil, err
	}
	return k, nil
}

func decodeSlot(n uint32, b []byte) slot {
	if sum := slotChecksum(n, b); !bytes.Equal(sum, b[slotSum:]) {
		return slot{}
	}
	return slot{id: binary.BigEndian.Uint64(b), key: slices.Clone(b[8 : 8+keySize])}
}

func (s slot) encode(n uint32) []byte {
	b := binary.BigEndian.AppendUint64(nil, s.id)
	b = append(b, s.key...)
	b = append(b, make([]byte, slotSum-len(b))...)
	return append(b, slotChecksum(n, b)...)
}

func slotChecksum(n uint32, b []byte) []byte {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint32(nil, n))
	h.Write(b[:slotSum])
	return h.Sum(nil)[:slotSize-slotSum]
}

// check says what is wrong with a key that the store refers to. mu is held, or nobody else has k yet.
func (k *keyFile) check(ref slotRef) error {
	switch {
	case int64(ref.number) >= int64(len(k.slots)):
		return fmt.Errorf("%w: slot %d of %d", ErrKeys, ref.number, len(k.slots))
	case k.slots[ref.number].key == nil:
		return fmt.Errorf("%w: slot %d is damaged", ErrKeys, ref.number)
	case k.slots[ref.number].id != ref.id:
		return fmt.Errorf("%w: the key in slot %d was erased", ErrKeys, ref.number)
	}
	return nil
}

// take returns a key that nothing uses and that is on disk.
func (k *keyFile) take() (slotRef, secretBytes, error) {
	for {
		k.mu.Lock()
		if n := len(k.free); n > 0 {
			number := k.free[n-1]
			k.free = k.free[:n-1]
			s := k.slots[number]
			k.mu.Unlock()
			return slotRef{number, s.id}, slices.Clone(s.key), nil
		}
		k.mu.Unlock()
		if err := k.more(); err != nil {
			return slotRef{}, nil, err
		}
	}
}

// more adds slots if none is free.
func (k *keyFile) more() error {
	k.grow.Lock()
	defer k.grow.Unlock()
	k.mu.Lock()
	first, enough := len(k.slots), len(k.free) > 0
	k.mu.Unlock()
	if enough {
		return nil
	}
	fresh := make([]slot, growth)
	var b []byte
	for i := range fresh {
		var err error
		if fresh[i], err = k.fresh(); err != nil {
			return err
		}
		b = append(b, fresh[i].encode(uint32(first+i))...)
	}
	defer clear(b)
	if _, err := k.f.WriteAt(b, int64(first+1)*slotSize); err != nil {
		return fmt.Errorf("write the key file: %w", err)
	}
	if err := k.f.Sync(); err != nil {
		return fmt.Errorf("sync the key file: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.slots = append(k.slots, fresh...)
	for i := range fresh {
		k.free = append(k.free, uint32(first+growth-1-i))
	}
	return nil
}

func (k *keyFile) fresh() (slot, error) {
	b := make([]byte, 8+keySize)
	if _, err := io.ReadFull(k.rand, b); err != nil {
		return slot{}, fmt.Errorf("read randomness: %w", err)
	}
	return slot{id: binary.BigEndian.Uint64(b), key: b[8:]}, nil
}

// key returns a key that take returned, in this or an earlier process.
func (k *keyFile) key(ref slotRef) (secretBytes, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.check(ref); err != nil {
		return nil, err
	}
	return slices.Clone(k.slots[ref.number].key), nil
}

// erase overwrites keys that nothing refers to any more. They are gone from the file when it returns, and the slots are
// free again.
func (k *keyFile) erase(numbers []uint32) error {
	if len(numbers) == 0 {
		return nil
	}
	fresh := make([]slot, len(numbers))
	for i, n := range numbers {
		var err error
		if fresh[i], err = k.fresh(); err != nil {
			return err
		}
		b := fresh[i].encode(n)
		_, err = k.f.WriteAt(b, int64(n+1)*slotSize)
		clear(b)
		if err != nil {
			return fmt.Errorf("write the key file: %w", err)
		}
	}
	if err := k.f.Sync(); err != nil {
		return fmt.Errorf("sync the key file: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, n := range numbers {
		clear(k.slots[n].key)
		k.slots[n] = fresh[i]
		k.free = append(k.free, n)
	}
	return nil
}

func (k *keyFile) close() error {
	k.mu.Lock()
	for i := range k.slots {
		clear(k.slots[i].key)
	}
	k.slots, k.free = nil, nil
	k.mu.Unlock()
	return k.f.Close()
}
