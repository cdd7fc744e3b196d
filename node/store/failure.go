package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// What becomes of a store whose disk fails. Pebble tries again what it does in the background, but can't go on without its
// write-ahead log: it returns errors to those who wait, panics for those who write next, with locks released that others
// hold, or ends the process. Here one of these is the end of all: no call succeeds any more.

// fail has every later call fail, since what was applied before may never be durable, and returns what it fails with.
func (p *Pebble) fail(cause error) error {
	err := cause
	if !errors.Is(cause, ErrFailed) {
		err = fmt.Errorf("%w: %w", ErrFailed, cause)
	}
	if p.failed.CompareAndSwap(nil, &err) {
		close(p.ended)
		p.o.Log.Error("store failed", "err", cause)
		if p.o.Failed == nil {
			os.Exit(1)
		}
		p.o.Failed(err)
	}
	return *p.failed.Load()
}

// stop is fail for a goroutine that Pebble mustn't get back.
func (p *Pebble) stop(cause error) {
	p.fail(cause)
	select {}
}

// guardedFS is the file system that Pebble sees. What it takes as the end, it doesn't see, once it is open: it is stopped
// before.
type guardedFS struct {
	vfs.FS
	p *Pebble
}

// own says whether a file is the store's; those of checkpoints aren't.
func (g guardedFS) own(name string) bool { return g.PathDir(name) == g.p.dir }

// Unwrap has Pebble find the file system below.
func (g guardedFS) Unwrap() vfs.FS { return g.FS }

// Create implements vfs.FS.
func (g guardedFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.Create(name, category)
	return g.guard(name, f, err)
}

// ReuseForWrite implements vfs.FS.
func (g guardedFS) ReuseForWrite(oldname, newname string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.ReuseForWrite(oldname, newname, category)
	return g.guard(newname, f, err)
}

func (g guardedFS) guard(name string, f vfs.File, err error) (vfs.File, error) {
	if !g.own(name) || !strings.HasSuffix(name, ".log") {
		return f, err
	}
	if err != nil {
		if g.p.opened.Load() {
			g.p.stop(err)
		}
		return nil, err
	}
	return guardedFile{f, g.p}, nil
}

// OpenDir implements vfs.FS.
func (g guardedFS) OpenDir(name string) (vfs.File, error) {
	f, err := g.FS.OpenDir(name)
	if err != nil || name != g.p.dir {
		return f, err
	}
	return guardedDir{f, g.p}, nil
}

// guardedFile is a write-ahead log.
type guardedFile struct {
	vfs.File
	p *Pebble
}

func (f guardedFile) check(err error) error {
	if err != nil && f.p.opened.Load() {
		return f.p.fail(err)
	}
	return err
}

// Write implements vfs.File.
func (f guardedFile) Write(b []byte) (int, error) {
	n, err := f.File.Write(b)
	return n, f.check(err)
}

// Sync implements vfs.File.
func (f guardedFile) Sync() error { return f.check(f.File.Sync()) }

// SyncData implements vfs.File.
func (f guardedFile) SyncData() error { return f.check(f.File.SyncData()) }

// SyncTo implements vfs.File.
func (f guardedFile) SyncTo(length int64) (bool, error) {
	full, err := f.File.SyncTo(length)
	return full, f.check(err)
}

// Close implements vfs.File. Pebble closes a log when it begins the next one, and would crash if anything about it had gone
// wrong.
func (f guardedFile) Close() error {
	err := f.check(f.File.Close())
	if f.p.failed.Load() != nil {
		select {}
	}
	return err
}

// guardedDir is a directory.
type guardedDir struct {
	vfs.File
	p *Pebble
}

// Sync implements vfs.File.
func (d guardedDir) Sync() error {
	err := d.File.Sync()
	if err != nil && d.p.opened.Load() {
		d.p.stop(err)
	}
	return err
}

// openPebble is pebble.Open, which says by pebbleLog.Fatalf that it can't go on.
func openPebble(dir string, o *pebble.Options) (db *pebble.DB, err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case fatal:
			err = r
		default:
			panic(r)
		}
	}()
	return pebble.Open(dir, o)
}

// pebbleLog passes Pebble's errors on and drops its running commentary.
type pebbleLog struct{ p *Pebble }

func (pebbleLog) Infof(string, ...any) {}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.p.o.Log.Error("store error", "err", fmt.Sprintf(format, args...))
}

// Fatalf doesn't return: Pebble may hold locks, and can't go on.
func (l pebbleLog) Fatalf(format string, args ...any) {
	err := fatal(fmt.Sprintf(format, args...))
	if !l.p.opened.Load() && l.p.o.Failed != nil {
		panic(err)
	}
	l.p.stop(err)
}

// fatal is why Pebble can't go on.
type fatal string

func (f fatal) Error() string { return string(f) }

// ballastFile is the name of the ballast in the store's directory.
const ballastFile = "BALLAST"

// full gives the ballast back.
func (p *Pebble) full() {
	if free, err := p.Free(); p.checkpoints.Load() > 0 && err == nil && free > uint64(p.o.BallastBytes) {
		return // it is the disk of the checkpoint
	}
	name := p.fs.PathJoin(p.dir, ballastFile)
	if err := p.fs.Remove(name); err == nil {
		p.o.Log.Error("the disk is full; the ballast is given back", "dir", p.dir)
	}
	if p.o.Full != nil {
		p.o.Full()
	}
}

// Free returns how many bytes this process could write to the file system of the store's directory. The error wraps
// errors.ErrUnsupported where nobody can tell.
func (p *Pebble) Free() (uint64, error) {
	u, err := p.fs.GetDiskUsage(p.dir)
	if errors.Is(err, vfs.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	if err != nil {
		return 0, fmt.Errorf("asking for free space: %w", err)
	}
	return u.AvailBytes, nil
}

// Refill makes the ballast unless it is there. It takes its space from the disk at once.
func (p *Pebble) Refill() error {
	name, size := p.fs.PathJoin(p.dir, ballastFile), p.o.BallastBytes
	if size == 0 {
		return nil
	}
	if info, err := p.fs.Stat(name); err == nil && info.Size() == size {
		return nil
	}
	f, err := p.fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("making the ballast: %w", err)
	}
	if err = errors.Join(fill(f, size), f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("making the ballast: %w", err), p.fs.Remove(name))
	}
	return nil
}

// fill makes a file of that size whose bytes take their place on the disk.
func fill(f vfs.File, size int64) error {
	if runtime.GOOS == "linux" && f.Preallocate(0, size) == nil {
		_, err := f.WriteAt([]byte{0}, size-1)
		return err
	}
	random := rand.NewChaCha8([32]byte{}) // nothing that a file system could compress
	chunk := make([]byte, 1<<20)
	for at := int64(0); at < size; {
		part := chunk[:min(int64(len(chunk)), size-at)]
		random.Read(part)
		n, err := f.Write(part)
		if err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}
