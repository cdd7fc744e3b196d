// Package storetest checks that a store.Store keeps the interface's promises.
package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/parley-mls/parley/node/store"
)

// Test runs the whole suite. open opens the store in a directory, which holds what an earlier store that was closed
// had written there.
func Test(t *testing.T, open func(t *testing.T, dir string) store.Store) {
	for _, c := range []struct {
		name string
		fn   func(t *testing.T, open func(dir string) store.Store)
	}{
		{"GetDistinguishesAbsentFromEmpty", testAbsent},
		{"ScanIsOrderedAndBounded", testScan},
		{"ScanSeesOneMoment", testScanMoment},
		{"CommitIsAllOrNothing", testCommit},
		{"CommitComparesAbsentAndEmpty", testCompare},
		{"OneOfManyConcurrentSwapsWins", testContention},
		{"SwapsDoNotLoseIncrements", testIncrements},
		{"ApplyIsVisibleBeforeWait", testApply},
		{"DeletedKeysStayDeleted", testDelete},
		{"LaterChangeInABatchWins", testBatchOrder},
		{"RangesAreDeletedInOrder", testDeleteRange},
		{"ArgumentsAreNotKept", testAliasing},
		{"AcknowledgedSurvivesReopen", testReopen},
		{"CheckpointIsAStore", testCheckpoint},
		{"ClosedStoreRefuses", testClosed},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.fn(t, func(dir string) store.Store {
				s := open(t, dir)
				t.Cleanup(func() { s.Close() })
				return s
			})
		})
	}
}

// get returns the value of a key, once Has has said the same.
func get(t *testing.T, s store.Store, key string) []byte {
	t.Helper()
	v, err := s.Get([]byte(key))
	if err != nil {
		t.Fatalf("Get(%q): %v", key, err)
	}
	if has, err := s.Has([]byte(key)); err != nil || has != (v != nil) {
		t.Fatalf("Has(%q) = %v, %v, and its value is %q", key, has, err, v)
	}
	return v
}

func commit(t *testing.T, s store.Store, changes, expect map[string][]byte) bool {
	t.Helper()
	ok, err := s.Commit(changes, expect)
	if err != nil {
		t.Fatalf("Commit: %v", err)
	}
	return ok
}

func apply(t *testing.T, s store.Store, b *store.Batch) {
	t.Helper()
	wait, err := s.Apply(b)
	if err != nil {
		t.Fatalf("Apply: %v", err)
	}
	if err := wait(); err != nil {
		t.Fatalf("wait: %v", err)
	}
}

func keys(t *testing.T, s store.Store, start, end []byte) string {
	t.Helper()
	var out []byte
	if err := s.Scan(start, end, func(k, v []byte) bool {
		out = append(append(append(append(out, k...), '='), v...), ' ')
		return true
	}); err != nil {
		t.Fatalf("Scan: %v", err)
	}
	return string(out)
}

func testAbsent(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	if v := get(t, s, "a"); v != nil {
		t.Errorf("absent key has value %q", v)
	}
	commit(t, s, map[string][]byte{"a": {}}, nil)
	if v := get(t, s, "a"); v == nil || len(v) != 0 {
		t.Errorf("empty value reads as %#v", v)
	}
	commit(t, s, map[string][]byte{"a": nil, "never": nil}, nil)
	if v := get(t, s, "a"); v != nil {
		t.Errorf("deleted key has value %q", v)
	}
}

func testScan(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	commit(t, s, map[string][]byte{"b": []byte("2"), "a": []byte("1"), "c": []byte("3"), "a\x00": []byte("x"), "\xff\xff": []byte("end")}, nil)
	for _, c := range []struct {
		start, end []byte
		want       string
	}{
		{nil, nil, "a=1 a\x00=x b=2 c=3 \xff\xff=end "},
		{[]byte("a"), []byte("c"), "a=1 a\x00=x b=2 "},
		{[]byte("a\x00"), []byte("b"), "a\x00=x "},
		{[]byte("d"), []byte("e"), ""},
		{[]byte("\xff"), store.PrefixEnd([]byte("\xff")), "\xff\xff=end "},
	} {
		if got := keys(t, s, c.start, c.end); got != c.want {
			t.Errorf("Scan(%q, %q) = %q, want %q", c.start, c.end, got, c.want)
		}
	}
	n := 0
	if err := s.Scan(nil, nil, func(_, _ []byte) bool { n++; return n < 2 }); err != nil || n != 2 {
		t.Errorf("Scan went on to %d pairs after fn said stop (%v)", n, err)
	}
	var got []byte
	if err := store.ScanPrefix(s, []byte("a"), func(k, v []byte) bool { got = append(append(got, k...), v...); return true }); err != nil {
		t.Fatal(err)
	}
	if string(got) != "1\x00x" {
		t.Errorf("ScanPrefix gave %q", got)
	}
}

func testScanMoment(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	commit(t, s, map[string][]byte{"a": []byte("1"), "b": []byte("1")}, nil)
	var got []byte
	if err := s.Scan(nil, nil, func(k, v []byte) bool {
		if string(k) == "a" {
			commit(t, s, map[string][]byte{"b": []byte("2"), "c": []byte("2")}, nil)
		}
		got = append(append(got, k...), v...)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if string(got) != "a1b1" {
		t.Errorf("a scan saw a write made after it began: %q", got)
	}
}

func testCommit(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	commit(t, s, map[string][]byte{"x": []byte("1")}, nil)
	if commit(t, s, map[string][]byte{"x": []byte("2"), "y": []byte("2")}, map[string][]byte{"x": []byte("1"), "y": []byte("?")}) {
		t.Error("a swap with a false expectation was made")
	}
	if got := keys(t, s, nil, nil); got != "x=1 " {
		t.Errorf("a refused swap left %q", got)
	}
	if !commit(t, s, map[string][]byte{"x": []byte("2"), "y": []byte("2")}, map[string][]byte{"x": []byte("1"), "y": nil}) {
		t.Error("a swap whose expectations hold was refused")
	}
	if got := keys(t, s, nil, nil); got != "x=2 y=2 " {
		t.Errorf("a swap left %q", got)
	}
	if !commit(t, s, nil, map[string][]byte{"x": []byte("2")}) || commit(t, s, nil, map[string][]byte{"x": []byte("1")}) {
		t.Error("a comparison without changes has the wrong result")
	}
}

func testCompare(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	set := map[string][]byte{"x": []byte("1")}
	if commit(t, s, set, map[string][]byte{"e": {}}) {
		t.Error("an absent key was taken for an empty one")
	}
	commit(t, s, map[string][]byte{"e": {}}, nil)
	if commit(t, s, set, map[string][]byte{"e": nil}) {
		t.Error("an empty key was taken for an absent one")
	}
	if !commit(t, s, set, map[string][]byte{"e": {}}) {
		t.Error("an empty key doesn't compare equal to an empty value")
	}
}

func testContention(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	for round := range 20 {
		key := fmt.Sprintf("token-%d", round)
		commit(t, s, map[string][]byte{key: []byte("unused")}, nil)
		var wins atomic.Int32
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				ok, err := s.Commit(map[string][]byte{key: nil, fmt.Sprintf("%s-user-%d", key, i): {1}}, map[string][]byte{key: []byte("unused")})
				if err != nil {
					t.Error(err)
				}
				if ok {
					wins.Add(1)
				}
			})
		}
		group.Wait()
		if wins.Load() != 1 {
			t.Fatalf("%d of 8 concurrent swaps won", wins.Load())
		}
	}
}

func testIncrements(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	var group sync.WaitGroup
	const workers, each = 4, 25
	for range workers {
		group.Go(func() {
			for done := 0; done < each; {
				v, err := s.Get([]byte("n"))
				if err != nil {
					t.Error(err)
					return
				}
				next := append(bytes.Clone(v), 'x')
				ok, err := s.Commit(map[string][]byte{"n": next}, map[string][]byte{"n": v})
				if err != nil {
					t.Error(err)
					return
				}
				if ok {
					done++
				}
			}
		})
	}
	group.Wait()
	if n := len(get(t, s, "n")); n != workers*each {
		t.Errorf("%d of %d increments are there", n, workers*each)
	}
}

func testDelete(t *testing.T, open func(string) store.Store) {
	dir := t.TempDir()
	s := open(dir)
	commit(t, s, map[string][]byte{"a": []byte("1"), "b": []byte("2"), "c": []byte("3")}, nil)
	if err := s.Delete([]byte("a"), []byte("c"), []byte("never")); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, s, nil, nil); got != "b=2 " {
		t.Errorf("after Delete there is %q", got)
	}
	commit(t, s, map[string][]byte{"d": []byte("4")}, map[string][]byte{"a": nil}) // later, and durable
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, open(dir), nil, nil); got != "b=2 d=4 " {
		t.Errorf("after a restart there is %q", got)
	}
}

func testApply(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	var b store.Batch
	b.Set([]byte("a"), []byte("1"))
	view := b.Prefixed([]byte("g/"))
	view.Set([]byte("k"), []byte("2"))
	view.Set([]byte("gone"), []byte("3"))
	view.Delete([]byte("gone"))
	wait, err := s.Apply(&b)
	if err != nil {
		t.Fatal(err)
	}
	if got := keys(t, s, nil, nil); got != "a=1 g/k=2 " {
		t.Errorf("before the wait %q is visible", got)
	}
	if err := wait(); err != nil {
		t.Fatal(err)
	}
	apply(t, s, new(store.Batch))
	if b.Len() != 4 {
		t.Errorf("the batch has %d changes after Apply, want the 4 it had", b.Len())
	}
}

func testBatchOrder(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	var b store.Batch
	b.Set([]byte("a"), []byte("1"))
	b.Delete([]byte("a"))
	b.Set([]byte("a"), []byte("2"))
	b.Set([]byte("b"), nil)
	apply(t, s, &b)
	if got := keys(t, s, nil, nil); got != "a=2 b= " {
		t.Errorf("the batch left %q", got)
	}
}

func testDeleteRange(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	commit(t, s, map[string][]byte{"a": []byte("1"), "b": []byte("2"), "b\x00": []byte("3"), "c": []byte("4"), "d": []byte("5")}, nil)
	var b store.Batch
	b.Set([]byte("bb"), []byte("before"))
	b.DeleteRange([]byte("b"), []byte("d"))
	b.Set([]byte("c"), []byte("after"))
	apply(t, s, &b)
	if got, want := keys(t, s, nil, nil), "a=1 c=after d=5 "; got != want {
		t.Errorf("after a range was deleted: %q, want %q", got, want)
	}
	b.Reset()
	b.DeleteRange([]byte("x"), []byte("z"))
	b.DeleteRange([]byte("d"), []byte("d"))
	apply(t, s, &b)
	if got, want := keys(t, s, nil, nil), "a=1 c=after d=5 "; got != want {
		t.Errorf("after empty ranges were deleted: %q, want %q", got, want)
	}
}

func testAliasing(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	key, value := []byte("key"), []byte("value")
	var b store.Batch
	b.Set(key, value)
	key[0], value[0] = 'X', 'X'
	apply(t, s, &b)
	if got := get(t, s, "key"); string(got) != "value" {
		t.Errorf("the batch followed its caller's slices: %q", got)
	}
	got := get(t, s, "key")
	got[0] = 'Y'
	if got := get(t, s, "key"); string(got) != "value" {
		t.Errorf("writing to a value that Get returned changed the store: %q", got)
	}
}

func testReopen(t *testing.T, open func(string) store.Store) {
	dir := t.TempDir()
	s := open(dir)
	commit(t, s, map[string][]byte{"a": []byte("1"), "b": []byte("1")}, nil)
	var b store.Batch
	b.Set([]byte("c"), []byte("2"))
	b.Delete([]byte("b"))
	apply(t, s, &b)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, open(dir), nil, nil); got != "a=1 c=2 " {
		t.Errorf("after opening again the store has %q", got)
	}
}

func testCheckpoint(t *testing.T, open func(string) store.Store) {
	dir := t.TempDir()
	s := open(filepath.Join(dir, "store"))
	commit(t, s, map[string][]byte{"a": []byte("1")}, nil)
	if err := s.Checkpoint(filepath.Join(dir, "copy")); err != nil {
		t.Fatal(err)
	}
	commit(t, s, map[string][]byte{"a": []byte("2")}, nil)
	if got := keys(t, open(filepath.Join(dir, "copy")), nil, nil); got != "a=1 " {
		t.Errorf("the checkpoint has %q", got)
	}
}

func testClosed(t *testing.T, open func(string) store.Store) {
	s := open(t.TempDir())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
	if _, err := s.Get([]byte("a")); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Get: %v", err)
	}
	if _, err := s.Has([]byte("a")); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Has: %v", err)
	}
	if err := s.Scan(nil, nil, func(_, _ []byte) bool { return true }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Scan: %v", err)
	}
	if _, err := s.Commit(map[string][]byte{"a": {1}}, nil); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Commit: %v", err)
	}
	if _, err := s.Apply(new(store.Batch)); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Apply: %v", err)
	}
}
