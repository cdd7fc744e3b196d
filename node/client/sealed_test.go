package client

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/node/store"
)

// openSealed opens a store with a key file in dir.
func openSealed(t *testing.T, dir string) (*sealedStore, error) {
	t.Helper()
	o := Options{Dir: dir}
	if err := o.fill(); err != nil {
		t.Fatal(err)
	}
	return openStore(o)
}

// write applies changes of sealed entries, nil deletes, and waits.
func write(t *testing.T, s *sealedStore, changes map[string][]byte) {
	t.Helper()
	b := new(store.Batch)
	for k, v := range changes {
		if v == nil {
			b.Delete([]byte(k))
		} else {
			b.Set([]byte(k), v)
		}
	}
	wait, err := s.Apply(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != nil {
		t.Fatal(err)
	}
}

func contents(s *sealedStore) (map[string]string, error) {
	all := make(map[string]string)
	err := s.Scan(nil, nil, func(key, value []byte) bool {
		all[string(key)] = string(value)
		return true
	})
	return all, err
}

func TestDroppedKeysAreOverwrittenInPlace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, keyFileName)
	s, err := openSealed(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, map[string][]byte{"k1": []byte("one"), "k2": []byte("two"), "b.example": []byte("public")})
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if before.Mode().Perm() != 0o600 {
		t.Errorf("the key file has mode %v", before.Mode().Perm())
	}
	keyOf := func(entry string) []byte {
		key, err := s.keys.key(s.refs[entry])
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	inFile := func(key []byte) bool {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(b, key)
	}
	one, two := keyOf("k1"), keyOf("k2")
	raw, err := s.Pebble.Get([]byte("k1"))
	if err != nil || bytes.Contains(raw, []byte("one")) {
		t.Errorf("the store has %q, %v", raw, err)
	}
	if !inFile(one) || !inFile(two) {
		t.Fatal("a key in use isn't in the file")
	}
	write(t, s, map[string][]byte{"k1": nil, "k2": []byte("two anew"), "b.example": nil})
	if inFile(one) || inFile(two) {
		t.Error("a key that was dropped is in the file")
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) || after.Size() != before.Size() {
		t.Errorf("the file was replaced or grew: %v", err)
	}
	for range 3 * growth { // one entry again and again needs no more slots than two
		write(t, s, map[string][]byte{"k2": []byte("and again")})
	}
	if after, _ := os.Stat(path); after.Size() != before.Size() {
		t.Errorf("the file grew from %d to %d bytes", before.Size(), after.Size())
	}
	for i := range growth + 1 {
		write(t, s, map[string][]byte{fmt.Sprintf("k%03d", i): []byte("more")})
	}
	want, err := contents(s)
	if err != nil || len(want) != growth+2 {
		t.Fatalf("%d entries, %v", len(want), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = openSealed(t, dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got, err := contents(s); err != nil || !maps.Equal(got, want) {
		t.Errorf("opened again: %d entries, want %d, %v", len(got), len(want), err)
	}
}

func TestEntriesOfTheFirstFormatAreSealedOnOpening(t *testing.T) {
	dir := t.TempDir()
	db, err := store.Open(filepath.Join(dir, storeDir), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Commit(map[string][]byte{"k1": {0, 1, 2, 3}, "jmimi://a.example/r/x": {0, 1, 4}}, nil); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s, err := openSealed(t, dir)
		if err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string][]byte{"k1": {0, 1, 2, 3}, "jmimi://a.example/r/x": {0, 1, 4}} {
			raw, err := s.Pebble.Get([]byte(key))
			if err != nil || bytes.Contains(raw[sealedPrefix:], want) || raw[0] != sealedMark {
				t.Errorf("%s is stored as %x, %v", key, raw, err)
			}
			if got, err := s.Get([]byte(key)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %x, %v", key, got, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMissingAndDamagedKeysAreErrors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, keyFileName)
	s, err := openSealed(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, map[string][]byte{"k1": []byte("one")})
	used := int64(s.refs["k1"].number+1) * slotSize
	unused := used + 5*slotSize
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(at int64, b ...byte) []byte {
		bad := bytes.Clone(good)
		copy(bad[at:], b)
		return bad
	}
	zeros := make([]byte, slotSize)
	for what, x := range map[string]struct {
		file []byte
		fine bool
	}{
		"as it was":               {good, true},
		"a torn slot":             {change(unused+8, 1, 2, 3, 4), true},
		"a zero slot":             {change(unused, zeros...), true},
		"torn growth":             {append(bytes.Clone(good), 1, 2, 3), true},
		"zero growth":             {append(bytes.Clone(good), zeros...), true},
		"a torn key in use":       {change(used+8, 1, 2, 3, 4), false},
		"a zero key in use":       {change(used, zeros...), false},
		"another key in use":      {change(used, good[unused:unused+slotSize]...), false},
		"cut before a key in use": {good[:used], false},
		"only a header":           {good[:slotSize], false},
		"no header":               {good[slotSize:], false},
		"a format to come":        {change(9, 2), false},
		"empty":                   {nil, false},
	} {
		if err := os.WriteFile(path, x.file, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openSealed(t, dir)
		if x.fine && err != nil || !x.fine && !errors.Is(err, ErrKeys) {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil {
			continue
		}
		if v, err := s.Get([]byte("k1")); err != nil || string(v) != "one" {
			t.Errorf("%s: read %q, %v", what, v, err)
		}
		write(t, s, map[string][]byte{"k2": []byte("two"), "k3": []byte("three")})
		write(t, s, map[string][]byte{"k2": nil, "k3": nil})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := openSealed(t, dir); !errors.Is(err, ErrKeys) {
		t.Errorf("without the file: %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a new key file took the place of the missing one")
	}
}

// crashFile is a key file in memory that knows what a crash would leave of it. Each step is told before and after.
type crashFile struct {
	now, synced []byte
	pending     []int // ends of the bytes written since the last sync, in pairs with their beginnings
	step        func()
	fail        func(b []byte) (int, error) // if set, decides how much of a write gets through
}

func (f *crashFile) ReadAt(b []byte, at int64) (int, error) {
	return bytes.NewReader(f.now).ReadAt(b, at)
}
func (f *crashFile) Close() error { return nil }

func (f *crashFile) WriteAt(b []byte, at int64) (int, error) {
	f.step()
	n, err := len(b), error(nil)
	if f.fail != nil {
		n, err = f.fail(b)
	}
	if more := int(at) + n - len(f.now); more > 0 {
		f.now = append(f.now, make([]byte, more)...)
	}
	copy(f.now[at:], b[:n])
	f.pending = append(f.pending, int(at), int(at)+n)
	f.step()
	return n, err
}

func (f *crashFile) Sync() error {
	f.step()
	f.synced, f.pending = bytes.Clone(f.now), nil
	f.step()
	return nil
}

// images are contents that a crash may leave: what was written since the last sync arrived not at all, whole, or up to
// somewhere.
func (f *crashFile) images(random *mathrand.Rand) [][]byte {
	torn := bytes.Clone(f.synced)
	for i := 0; i < len(f.pending); i += 2 {
		from, to := f.pending[i], f.pending[i+1]
		to = from + random.IntN(to-from+1)
		if to > len(torn) {
			torn = append(torn, make([]byte, to-len(torn))...)
		}
		copy(torn[from:to], f.now[from:to])
	}
	return [][]byte{bytes.Clone(f.synced), bytes.Clone(f.now), torn}
}

func (f *crashFile) open(used map[slotRef]bool) (*keyFile, error) {
	return loadKeyFile(f, int64(len(f.now)), rand.Reader, used)
}

// TestCrashesLeaveEveryEntryReadable changes sealed entries and takes images of both disks at every step. Each of them
// must open, with the entries before or after the batch that was under way.
func TestCrashesLeaveEveryEntryReadable(t *testing.T) {
	fs := vfs.NewCrashableMem()
	db, err := store.OpenFS(fs, "/store", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	random := mathrand.New(mathrand.NewPCG(1, 2))
	var before, after map[string]string
	images := 0
	check := func(disk *vfs.MemFS, file []byte) {
		t.Helper()
		images++
		db, err := store.OpenFS(disk, "/store", store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		f := &crashFile{now: file, step: func() {}}
		s, err := newSealedStore(db, f.open)
		if err != nil {
			t.Fatalf("after a crash between %v and %v: %v", before, after, err)
		}
		defer s.Close()
		got, err := contents(s)
		if err != nil || !maps.Equal(got, before) && !maps.Equal(got, after) {
			t.Fatalf("after a crash between %v and %v: %v, %v", before, after, got, err)
		}
		for n := range s.keys.slots {
			if s.keys.slots[n].key == nil {
				t.Error("a damaged slot is left")
			}
		}
	}
	f := &crashFile{now: keyFileHeader(), synced: keyFileHeader()}
	f.step = func() {
		for _, file := range f.images(random) {
			check(fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: []int{0, 50, 100}[random.IntN(3)], RNG: random}), file)
		}
	}
	after = make(map[string]string)
	s, err := newSealedStore(db, f.open)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 25 {
		before, after = after, maps.Clone(after)
		b := new(store.Batch)
		for range 1 + random.IntN(4) {
			key := fmt.Sprintf("k%d", random.IntN(6))
			if random.IntN(3) == 0 {
				b.Delete([]byte(key))
				delete(after, key)
			} else {
				after[key] = fmt.Sprint(key, " in step ", i)
				b.Set([]byte(key), []byte(after[key]))
			}
		}
		wait, err := s.Apply(b)
		if err != nil {
			t.Fatal(err)
		}
		f.step()
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		before = after
		f.step()
		if n := len(s.keys.slots) - len(s.keys.free); n != len(after) {
			t.Fatalf("%d slots in use for %d entries", n, len(after))
		}
	}
	if images < 100 {
		t.Errorf("only %d images", images)
	}
}

func TestFailedWritesOfTheKeyFileChangeNothing(t *testing.T) {
	db, err := store.OpenFS(vfs.NewMem(), "/store", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f := &crashFile{now: keyFileHeader(), step: func() {}}
	s, err := newSealedStore(db, f.open)
	if err != nil {
		t.Fatal(err)
	}
	short := func(b []byte) (int, error) { return len(b) / 3, io.ErrShortWrite }
	set := func() (func() error, error) {
		b := new(store.Batch)
		b.Set([]byte("k1"), []byte("one"))
		return s.Apply(b)
	}
	f.fail = short
	if _, err := set(); !errors.Is(err, io.ErrShortWrite) {
		t.Fatalf("no new key could be written: %v", err)
	}
	if v, err := db.Get([]byte("k1")); err != nil || v != nil {
		t.Errorf("the store has %x, %v", v, err)
	}
	f.fail = nil
	write(t, s, map[string][]byte{"k1": []byte("one")})
	f.fail = short
	wait, err := set()
	if err != nil {
		t.Fatal(err)
	}
	if err := wait(); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("a key couldn't be erased: %v", err)
	}
	f.fail = nil
	if s, err = newSealedStore(db, f.open); err != nil {
		t.Fatal(err)
	}
	if v, err := s.Get([]byte("k1")); err != nil || string(v) != "one" {
		t.Errorf("read %q, %v", v, err)
	}
}
