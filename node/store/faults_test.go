package store_test

import (
	"errors"
	"flag"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/parley-mls/parley/node/store"
)

// everyFault has the tests of faults try every operation of the file system, and not a sample of them.
var everyFault = flag.Bool("faults", false, "inject a fault at every operation of the file system")

// faulty is a simulated disk of which one changing operation fails, or several from one on.
type faulty struct {
	*vfs.MemFS
	at, until int64 // the first operation that fails, and the first after it that doesn't; the first of all is 1
	count     atomic.Int64
}

func (f *faulty) fs() vfs.FS {
	return errorfs.Wrap(memory{f.MemFS}, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsRead {
			return nil
		}
		if n := f.count.Add(1); n >= f.at && n < f.until {
			return errorfs.ErrInjected
		}
		return nil
	}))
}

// memory is a MemFS of which images can be taken at any time: its own ReuseForWrite locks twice, and would wait for ever
// for one that is taken in between.
type memory struct{ *vfs.MemFS }

// ReuseForWrite implements vfs.FS.
func (m memory) ReuseForWrite(oldname, newname string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if err := m.Rename(oldname, newname); err != nil {
		return nil, err
	}
	return m.OpenReadWrite(newname, category)
}

// write writes so many pairs, and stops at an error. acknowledged counts those that were written.
func write(s store.Store, pairs int, acknowledged *atomic.Int64) error {
	value := make([]byte, 4000)
	for i := range pairs {
		a, b := fmt.Sprintf("a/0/%04d", i), fmt.Sprintf("b/0/%04d", i)
		switch i % 3 {
		case 0:
			var batch store.Batch
			batch.Set([]byte(a), value)
			batch.Set([]byte(b), value)
			wait, err := s.Apply(&batch)
			if err != nil {
				return err
			}
			if err := wait(); err != nil {
				return err
			}
		default:
			ok, err := s.Commit(map[string][]byte{a: value, b: value}, map[string][]byte{a: nil})
			if err != nil || !ok {
				return fmt.Errorf("a swap: %v, %w", ok, err)
			}
		}
		acknowledged.Store(int64(i) + 1)
		if err := s.Delete([]byte("nothing")); err != nil {
			return err
		}
	}
	return nil
}

// TestAFaultOfTheDiskLosesNothingAcknowledged has operations of the disk fail, alone and with some after them. The store goes
// on or fails for good, with an error that says so, and what a crash leaves then has everything that was acknowledged.
func TestAFaultOfTheDiskLosesNothingAcknowledged(t *testing.T) {
	const pairs = 40 // several memtables, and a compaction
	small := store.Options{MemTableBytes: 64 << 10}
	never := &faulty{MemFS: vfs.NewCrashableMem()}
	s, err := store.OpenFS(never.fs(), "/store", small)
	if err != nil {
		t.Fatal(err)
	}
	begin := never.count.Load() + 1
	if err := write(s, pairs, new(atomic.Int64)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	end := never.count.Load()
	step := int64(11)
	if *everyFault {
		step = 1
	}
	went, failed := 0, 0
	for at := begin; at <= end; at += step {
		for _, until := range []int64{at + 1, at + 20} {
			f := &faulty{MemFS: vfs.NewCrashableMem(), at: at, until: until}
			ended := make(chan error, 1)
			o := small
			o.Failed = func(err error) { ended <- err }
			s, err := store.OpenFS(f.fs(), "/store", o)
			if err != nil {
				t.Fatal(err)
			}
			var acknowledged atomic.Int64
			done := make(chan error, 1)
			go func() { done <- write(s, pairs, &acknowledged) }()
			// Who writes may be held up for ever in a store that has failed.
			select {
			case err = <-done:
			case err = <-ended:
			}
			if err == nil {
				went++
			} else {
				failed++
				if !errors.Is(err, store.ErrFailed) {
					t.Errorf("operation %d fails: %v", at, err)
				}
				if _, err := s.Get([]byte("a")); !errors.Is(err, store.ErrFailed) {
					t.Errorf("operation %d failed, and the store goes on: %v", at, err)
				}
			}
			n := int(acknowledged.Load())
			if checkImage(t, f.CrashClone(vfs.CrashCloneCfg{}), []int{n}); t.Failed() {
				t.Fatalf("operation %d of %d", at, end)
			}
			s.Close() // not whole, if it has failed
		}
	}
	t.Logf("operations %d to %d: the store went on after %d faults and failed after %d", begin, end, went, failed)
	if went == 0 || failed == 0 {
		t.Error("the faults had all the same outcome")
	}
}

// TestEachAcknowledgementIsSynced drops every unsynced byte after each acknowledgement.
func TestEachAcknowledgementIsSynced(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s, err := store.OpenFS(memory{fs}, "/store", store.Options{MemTableBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 30 {
		a, b := fmt.Sprintf("a/0/%04d", i), fmt.Sprintf("b/0/%04d", i)
		if _, err := s.Commit(map[string][]byte{a: make([]byte, 2000), b: make([]byte, 2000)}, nil); err != nil {
			t.Fatal(err)
		}
		if checkImage(t, fs.CrashClone(vfs.CrashCloneCfg{}), []int{i + 1}); t.Failed() {
			return
		}
	}
}

// fullDisk has no space as long as the ballast is there.
type fullDisk struct {
	*vfs.MemFS
	full atomic.Bool
}

func (f *fullDisk) fs() vfs.FS {
	return errorfs.Wrap(memory{f.MemFS}, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if _, err := f.Stat("/store/BALLAST"); f.full.Load() && err == nil && op.Kind == errorfs.OpFileWrite {
			return syscall.ENOSPC
		}
		return nil
	}))
}

func TestTheBallastIsGivenBackWhenTheDiskIsFull(t *testing.T) {
	f := &fullDisk{MemFS: vfs.NewCrashableMem()}
	told := 0
	o := store.Options{BallastBytes: 1 << 16, Full: func() { told++ }}
	s, err := store.OpenFS(f.fs(), "/store", o)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Refill(); err != nil {
		t.Fatal(err)
	}
	if info, err := f.Stat("/store/BALLAST"); err != nil || info.Size() != o.BallastBytes {
		t.Fatal(info, err)
	}
	f.full.Store(true)
	var acknowledged atomic.Int64
	if err := write(s, 3, &acknowledged); err != nil || told != 1 {
		t.Errorf("writing to a full disk: %v, told %d times", err, told)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// Also when the store is opened.
	f.full.Store(false)
	if s, err = store.OpenFS(f.fs(), "/store", o); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Refill(), s.Close()); err != nil {
		t.Fatal(err)
	}
	f.full.Store(true)
	if s, err = store.OpenFS(f.fs(), "/store", o); err != nil || told != 2 {
		t.Fatalf("opening on a full disk: %v, told %d times", err, told)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	checkImage(t, f.MemFS, []int{int(acknowledged.Load())})
}

func TestFreeSpaceIsThatOfTheDisk(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if free, err := s.Free(); err != nil && !errors.Is(err, errors.ErrUnsupported) || err == nil && free < 1<<10 {
		t.Errorf("%d bytes, %v", free, err)
	}
	simulated, err := store.OpenFS(vfs.NewMem(), "/store", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer simulated.Close()
	if _, err := simulated.Free(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("free space of nothing: %v", err)
	}
}

// TestAFailedCheckpointLeavesTheStoreAlone writes checkpoints to a disk on which everything fails, and to one that is full.
func TestAFailedCheckpointLeavesTheStoreAlone(t *testing.T) {
	for _, cause := range []error{errorfs.ErrInjected, syscall.ENOSPC} {
		for at := int64(1); ; at++ {
			fs := vfs.NewCrashableMem()
			fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 1 << 30})
			var count, full atomic.Int64
			s, err := store.OpenFS(errorfs.Wrap(memory{fs}, errorfs.InjectorFunc(func(op errorfs.Op) error {
				if strings.HasPrefix(op.Path, "/backup") && op.Kind.ReadOrWrite() == errorfs.OpIsWrite && count.Add(1) >= at {
					return cause
				}
				return nil
			})), "/store", store.Options{BallastBytes: 1 << 10, Full: func() { full.Add(1) }, Failed: func(err error) { t.Errorf("operation %d: %v", at, err) }})
			if err != nil {
				t.Fatal(err)
			}
			if err := write(s, 3, new(atomic.Int64)); err != nil {
				t.Fatal(err)
			}
			err = s.Checkpoint("/backup")
			done := count.Load() < at
			if done != (err == nil) || full.Load() > 0 {
				t.Errorf("a checkpoint whose operation %d of %d fails: %v; the disk was full %d times", at, count.Load(), err, full.Load())
			}
			if _, err := s.Commit(map[string][]byte{"after": {1}}, nil); err != nil {
				t.Errorf("after a checkpoint that failed: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if done || t.Failed() {
				break
			}
		}
	}
}
