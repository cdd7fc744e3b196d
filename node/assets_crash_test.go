package node

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/store"
)

// memDisk is a disk whose images can be taken as a crash would leave it. before is called before each change, which its
// error replaces.
type memDisk struct {
	fs     *vfs.MemFS
	before func() error
}

const memData = "/data"

func (d memDisk) changes() error {
	if d.before == nil {
		return nil
	}
	return d.before()
}

func (d memDisk) Mkdir(name string, perm fs.FileMode) error {
	if _, err := d.Stat(name); err == nil {
		return fs.ErrExist
	}
	if err := d.changes(); err != nil {
		return err
	}
	return d.fs.MkdirAll(path.Join(memData, name), perm)
}

func (d memDisk) Stat(name string) (fs.FileInfo, error) {
	info, err := d.fs.Stat(path.Join(memData, name))
	if err != nil {
		return nil, err
	}
	return info, nil
}

func (d memDisk) Open(name string) (file, error) { return d.OpenFile(name, os.O_RDONLY, 0) }

func (d memDisk) OpenFile(name string, flag int, _ fs.FileMode) (file, error) {
	full := path.Join(memData, name)
	f, err := d.fs.Open(full)
	if flag&os.O_WRONLY != 0 {
		if err := d.changes(); err != nil {
			return nil, err
		}
		if err == nil {
			f.Close()
			f, err = d.fs.OpenReadWrite(full, vfs.WriteCategoryUnspecified)
		} else {
			f, err = d.fs.Create(full, vfs.WriteCategoryUnspecified)
		}
	}
	if err != nil {
		return nil, err
	}
	return &memFile{File: f, d: d, name: full}, nil
}

func (d memDisk) Link(from, to string) error {
	if err := d.changes(); err != nil {
		return err
	}
	return d.fs.Link(path.Join(memData, from), path.Join(memData, to))
}

func (d memDisk) Remove(name string) error {
	if err := d.changes(); err != nil {
		return err
	}
	return d.fs.Remove(path.Join(memData, name))
}

func (d memDisk) Close() error { return nil }

type memFile struct {
	vfs.File
	d    memDisk
	name string
	at   int64
}

func (f *memFile) WriteAt(p []byte, at int64) (int, error) {
	if err := f.d.changes(); err != nil {
		return 0, err
	}
	n, err := f.File.WriteAt(bytes.Clone(p), at)
	return n, errors.Join(err, f.d.changes())
}

func (f *memFile) Sync() error {
	if err := f.d.changes(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *memFile) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.at)
	if f.at += int64(n); n > 0 {
		err = nil
	}
	return n, err
}

func (f *memFile) Seek(at int64, _ int) (int64, error) { f.at = at; return at, nil }

func (f *memFile) Truncate(int64) error { return errors.ErrUnsupported }

func (f *memFile) Stat() (fs.FileInfo, error) { return f.File.Stat() }

// ReadDir gives all entries at once.
func (f *memFile) ReadDir(int) ([]fs.DirEntry, error) {
	names, err := f.d.fs.List(f.name)
	if err != nil {
		return nil, err
	}
	var list []fs.DirEntry
	for _, name := range names {
		info, err := f.d.fs.Stat(path.Join(f.name, name))
		if err != nil {
			return nil, err
		}
		list = append(list, fs.FileInfoToDirEntry(info))
	}
	return list, io.EOF
}

// format makes the data directory.
func (d memDisk) format(t *testing.T) {
	t.Helper()
	if err := d.fs.MkdirAll(memData, 0o700); err != nil {
		t.Fatal(err)
	}
	top := must(d.fs.OpenDir("/"))(t)
	if err := errors.Join(top.Sync(), top.Close()); err != nil {
		t.Fatal(err)
	}
}

// assetNode is what of a node has to do with assets, on a disk. It is as after its start.
func assetNode(t *testing.T, d memDisk) (n *Node, stop func()) {
	t.Helper()
	s := must(store.OpenFS(d.fs, memData+"/store", store.Options{}))(t)
	cfg := Config{Domain: "alpha.example", Data: memData, Listen: "127.0.0.1:0"}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	n = &Node{cfg: cfg, store: s, log: slog.New(slog.DiscardHandler), disk: newDisk(cfg.Disk), assets: must(newAssets(d))(t)}
	if err := n.settleAssets(); err != nil {
		t.Fatal(err)
	}
	return n, func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Images are taken before every change of the disk and after every answer, each with nothing and with some of what wasn't
// synced. On each a node starts that has all bytes that were acknowledged, and goes on with them.
func TestAcknowledgedPartsOfAssetsAreThereAfterACrash(t *testing.T) {
	const alice, bob = mimi.URI("mimi://alpha.example/u/alice"), mimi.URI("mimi://alpha.example/u/bob")
	const part = 9000 // more than two blocks of the disk
	type image struct {
		fs      *vfs.MemFS
		offsets map[mimi.URI]uint64 // acknowledged, and not deleted since
	}
	var images []image
	acknowledged := make(map[mimi.URI]uint64)
	random := rand.New(rand.NewPCG(5, 5))
	d := memDisk{fs: vfs.NewCrashableMem()}
	take := func() error {
		for _, percent := range []int{0, 50} {
			known := make(map[mimi.URI]uint64)
			for user, n := range acknowledged {
				known[user] = n
			}
			images = append(images, image{d.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: random}), known})
		}
		return nil
	}
	d.before = take
	d.format(t)
	b, hash := randomBytes(3*part + 100)
	upload := func(n *Node, user mimi.URI, at uint64) *upload {
		t.Helper()
		return must(n.uploadAsset(user, hash[:], uint64(len(b)), at, b[at:min(at+part, uint64(len(b)))]))(t)
	}
	n, stop := assetNode(t, d)
	for _, user := range []mimi.URI{alice, bob} {
		for at := uint64(0); at < uint64(len(b)); {
			at = upload(n, user, at).offset
			acknowledged[user] = at
			take()
		}
	}
	delete(acknowledged, alice)
	if err := n.deleteAsset(alice, hash[:], 1<<62); err != nil {
		t.Fatal(err)
	}
	take()
	stop()

	if len(images) < 60 {
		t.Errorf("%d images", len(images))
	}
	for i, im := range images {
		n, stop := assetNode(t, memDisk{fs: im.fs})
		for user, want := range im.offsets {
			what := fmt.Sprintf("image %d of %d: %s after %d bytes", i, len(images), user, want)
			u := must(n.uploadAsset(user, hash[:], uint64(len(b)), 0, nil))(t)
			if u.offset < want || u.whole != (u.offset == uint64(len(b))) {
				t.Fatalf("%s: %+v", what, u)
			}
			for at := u.offset; !u.whole; at = u.offset {
				if u = upload(n, user, at); u.offset <= at {
					t.Fatalf("%s: %+v", what, u)
				}
			}
			a := must(n.openAsset(hash, federation.Part{}))(t)
			if got, err := io.ReadAll(a); err != nil || sha256.Sum256(got) != hash {
				t.Errorf("%s: %d bytes, %v", what, len(got), err)
			}
			a.Close()
		}
		names := make(map[string]bool)
		if err := errors.Join(n.assets.list(wholeDir, names), n.assets.list(partialDir, names)); err != nil || len(names) > 2 {
			t.Errorf("image %d: files %v, %v", i, names, err)
		}
		stop()
	}
}

// Each change of the disk in turn fails while an asset is uploaded and another one is deleted. The request isn't
// acknowledged; the node goes on, the same request succeeds, and what a crash leaves has all that was acknowledged.
func TestAFailedWriteUndoesNothingOfAnAsset(t *testing.T) {
	const alice = mimi.URI("mimi://alpha.example/u/alice")
	const part = 5000
	b, hash := randomBytes(2*part + 100)
	other, otherHash := randomBytes(100)
	for at, all := 1, false; !all; at++ {
		d := memDisk{fs: vfs.NewCrashableMem()}
		d.format(t)
		n, stop := assetNode(t, d)
		count := 0
		n.assets.dir = memDisk{d.fs, func() error {
			if count++; count == at {
				return errors.New("the test fails this")
			}
			return nil
		}}
		var acknowledged uint64
		deleted, failures := false, 0
		check := func(n *Node, after string) {
			t.Helper()
			have := must(n.asset(key(prefixAsset, alice, hash[:])))(t)
			if acknowledged > 0 && (have == nil || !have.whole && (have.offset < acknowledged || acknowledged == uint64(len(b)))) {
				t.Fatalf("change %d, %s, after %d bytes: %+v", at, after, acknowledged, have)
			}
			if gone := must(n.asset(key(prefixAsset, alice, otherHash[:])))(t); deleted && gone != nil {
				t.Fatalf("change %d, %s: what was deleted is there: %+v", at, after, gone)
			}
		}
		try := func(do func() error) {
			t.Helper()
			err := do()
			if err != nil {
				failures++
				check(n, "at once")
				again, stopped := assetNode(t, memDisk{fs: d.fs.CrashClone(vfs.CrashCloneCfg{})})
				check(again, "after a crash")
				stopped()
				err = do()
			}
			if err != nil {
				t.Fatalf("change %d: the same again: %v", at, err)
			}
		}
		put := func(b []byte, hash [32]byte, offset uint64) (u *upload) {
			t.Helper()
			try(func() (err error) {
				u, err = n.uploadAsset(alice, hash[:], uint64(len(b)), offset, b[offset:min(offset+part, uint64(len(b)))])
				return err
			})
			return u
		}
		put(other, otherHash, 0)
		for acknowledged < uint64(len(b)) {
			u := put(b, hash, acknowledged)
			if u.offset <= acknowledged {
				t.Fatalf("change %d: the upload is at %d after %d", at, u.offset, acknowledged)
			}
			acknowledged = u.offset
		}
		try(func() error { return n.deleteAsset(alice, otherHash[:], 1<<62) })
		deleted = true
		after, stopped := assetNode(t, memDisk{fs: d.fs.CrashClone(vfs.CrashCloneCfg{})})
		check(after, "after a crash at the end")
		a := must(after.openAsset(hash, federation.Part{}))(t)
		if got, err := io.ReadAll(a); err != nil || sha256.Sum256(got) != hash {
			t.Errorf("change %d: %d bytes, %v", at, len(got), err)
		}
		a.Close()
		stopped()
		stop()
		if all = count < at; all == (failures > 0) {
			t.Errorf("change %d of %d: %d failures", at, count, failures)
		}
	}
}
