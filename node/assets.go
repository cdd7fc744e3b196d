package node

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// Assets (draft-ietf-mimi-protocol-06, Section 5.10) are files that users have encrypted. The bytes are in files in the
// data directory, beside the store: a whole asset in "assets" under the hexadecimal SHA-256 of its bytes, however many
// users have uploaded it, and never written to again; what is uploaded of one in "uploads" under the hash of its record's
// key. The store has a record for each user's asset; a file is there as long as a record refers to it.
//
// The order in which both change: the bytes of a part are on disk before the record says that they are there, for a crash may
// leave more of a file than that, with anything in it. The name of a whole asset is on disk before the record says that it
// is whole, and the name of the upload is deleted last. What a crash leaves of either without the other is deleted at the
// start.

const (
	maxChunk       = 1 << 20        // bytes of one request
	maxUserAssets  = 10_000         // of a user, uploads included
	uploadLifetime = 24 * time.Hour // how long an upload may take
	wholeDir       = "assets"
	partialDir     = "uploads"
)

// assetDir is where the files are: the data directory or, in a test, a disk that loses what isn't synced.
type assetDir interface {
	Mkdir(name string, perm fs.FileMode) error
	Open(name string) (file, error)
	OpenFile(name string, flag int, perm fs.FileMode) (file, error)
	Link(from, to string) error
	Remove(name string) error
	Stat(name string) (fs.FileInfo, error)
	Close() error
}

type file interface {
	io.ReadSeekCloser
	io.WriterAt
	Truncate(size int64) error
	ReadDir(n int) ([]fs.DirEntry, error)
	Stat() (fs.FileInfo, error)
	Sync() error
}

// root is a directory of the file system.
type root struct{ *os.Root }

// Open implements assetDir.
func (r root) Open(name string) (file, error) { return r.OpenFile(name, os.O_RDONLY, 0) }

// OpenFile implements assetDir.
func (r root) OpenFile(name string, flag int, perm fs.FileMode) (file, error) {
	f, err := r.Root.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// assets are the files.
type assets struct {
	dir   assetDir
	names sync.Mutex // held while whole assets come and go, from reading the references to applying what changes them

	mu        sync.Mutex
	busy      map[string]bool // guarded by mu; uploads, by their records' keys, that a request is writing to
	downloads map[string]int  // guarded by mu; under way, by user or peer
}

func openAssets(data string) (*assets, error) {
	dir, err := os.OpenRoot(data)
	if err != nil {
		return nil, fmt.Errorf("opening the data directory: %w", err)
	}
	return newAssets(root{dir})
}

func newAssets(dir assetDir) (*assets, error) {
	a := &assets{dir: dir, busy: make(map[string]bool), downloads: make(map[string]int)}
	for _, name := range []string{wholeDir, partialDir} {
		if err := dir.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, errors.Join(fmt.Errorf("making the directory of %s: %w", name, err), dir.Close())
		}
	}
	if err := a.sync("."); err != nil {
		return nil, errors.Join(fmt.Errorf("making the directories of assets: %w", err), dir.Close())
	}
	return a, nil
}

// sync makes what happened to the names in a directory durable.
func (a *assets) sync(dir string) error {
	f, err := a.dir.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// remove deletes a file, which needn't exist.
func (a *assets) remove(name string) error {
	if err := a.dir.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func partialName(k []byte) string {
	sum := sha256.Sum256(k)
	return partialDir + "/" + hex.EncodeToString(sum[:])
}

func wholeName(hash []byte) string { return wholeDir + "/" + hex.EncodeToString(hash) }

func assetRefKey(hash []byte, user mimi.URI) []byte {
	return append(append([]byte(prefixAssetRef), hash...), user...)
}

// upload is how far an asset is.
type upload struct {
	offset  uint64
	whole   bool
	expires uint64 // s since 1970
}

// uploadAsset takes data of an asset that belongs at offset; none begins the upload, or tells how far it is. What it
// returns is durable.
func (n *Node) uploadAsset(user mimi.URI, hash []byte, size, offset uint64, data []byte) (*upload, error) {
	a := n.assets
	switch limit := uint64(n.cfg.Limits.AssetMiB) << 20; {
	case len(hash) != sha256.Size:
		return nil, refuse("malformed", "a hash of %d bytes, not %d", len(hash), sha256.Size)
	case size == 0 || size > limit:
		return nil, refuse("tooLarge", "an asset of %d bytes, not 1 to %d", size, limit)
	case len(data) > maxChunk:
		return nil, refuse("tooLarge", "%d bytes at a time, at most %d", len(data), maxChunk)
	}
	if err := n.disk.grow(); err != nil {
		return nil, err
	}
	k := key(prefixAsset, user, hash)
	if !a.begin(string(k)) {
		return nil, refuse("busy", "another request writes to the same upload")
	}
	defer a.end(string(k))
	rec, err := n.asset(k)
	switch {
	case err != nil:
		return nil, err
	case rec == nil || rec.whole && rec.size == size:
		if rec, err = n.noteAsset(user, hash, size, rec); err != nil {
			return nil, err
		}
	case rec.size != size:
		return nil, refuse("malformed", "the asset has %d bytes, not %d", rec.size, size)
	}
	if rec.whole {
		return &upload{size, true, rec.expires}, nil
	}
	have, err := a.partial(k, rec.offset)
	if err != nil {
		return nil, err
	}
	if offset == have && have < size && len(data) > 0 {
		if uint64(len(data)) > size-have {
			return nil, refuse("malformed", "more bytes than the %d of the asset", size)
		}
		if err := a.write(k, have, data); err != nil {
			return nil, fmt.Errorf("writing an upload: %w", err)
		}
		n.disk.wrote(len(data))
		have += uint64(len(data))
		if have < size {
			rec.offset = have
			if err := n.putAsset(k, rec); err != nil {
				return nil, err
			}
		}
	}
	if have < size {
		return &upload{have, false, rec.expires}, nil
	}
	return n.finishAsset(user, hash, size)
}

// begin has one request at a time write to an upload.
func (a *assets) begin(k string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.busy[k] {
		return false
	}
	a.busy[k] = true
	return true
}

func (a *assets) end(k string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.busy, k)
}

func (n *Node) asset(k []byte) (*assetRecord, error) {
	b, err := n.store.Get(k)
	if err != nil || b == nil {
		return nil, err
	}
	rec := new(assetRecord)
	return rec, decodeRecord(b, rec, "asset")
}

// putAsset writes a record, durably.
func (n *Node) putAsset(k []byte, rec *assetRecord) error {
	var b store.Batch
	b.Set(k, codec.Marshal(rec))
	wait, err := n.store.Apply(&b)
	if err != nil {
		return err
	}
	return wait()
}

// noteAsset makes the record of a new upload, if the user may have one more, or puts off the end of a whole asset.
func (n *Node) noteAsset(user mimi.URI, hash []byte, size uint64, rec *assetRecord) (*assetRecord, error) {
	now := uint64(time.Now().Unix())
	n.assets.names.Lock()
	if rec == nil {
		rec = &assetRecord{size: size, expires: now + uint64(uploadLifetime/time.Second)}
		if err := n.mayUpload(user, size); err != nil {
			n.assets.names.Unlock()
			return nil, err
		}
	} else {
		rec.expires = now + n.assetLifetime()
	}
	var b store.Batch
	b.Set(key(prefixAsset, user, hash), codec.Marshal(rec))
	wait, err := n.store.Apply(&b)
	n.assets.names.Unlock()
	if err == nil {
		err = wait()
	}
	return rec, err
}

func (n *Node) assetLifetime() uint64 { return uint64(n.cfg.Limits.AssetDays) * 24 * 60 * 60 }

// mayUpload refuses an upload beyond the user's quota. Uploads count as if they were whole. assets.names is held.
func (n *Node) mayUpload(user mimi.URI, size uint64) error {
	used, count := size, 0
	var bad error
	err := store.ScanPrefix(n.store, key(prefixAsset, user), func(_, v []byte) bool {
		var rec assetRecord
		bad = decodeRecord(v, &rec, "asset")
		used, count = used+rec.size, count+1
		return bad == nil
	})
	quota := uint64(n.cfg.Limits.AssetQuotaMiB) << 20
	switch {
	case cmp.Or(err, bad) != nil:
		return cmp.Or(err, bad)
	case used > quota:
		return refuse("quotaExceeded", "the assets of %s would take %d bytes, at most %d", user, used, quota)
	case count >= maxUserAssets:
		return refuse("quotaExceeded", "%s has %d assets", user, count)
	}
	return nil
}

// partial returns how much of an upload is there, of what is on disk for certain.
func (a *assets) partial(k []byte, synced uint64) (uint64, error) {
	info, err := a.dir.Stat(partialName(k))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return min(synced, uint64(info.Size())), nil
}

// write adds to an upload, durably, or changes nothing.
func (a *assets) write(k []byte, have uint64, data []byte) error {
	f, err := a.dir.OpenFile(partialName(k), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, int64(have))
	if err = errors.Join(err, f.Sync()); err != nil {
		err = errors.Join(err, f.Truncate(int64(have)))
	}
	err = errors.Join(err, f.Close())
	if err == nil && have == 0 {
		err = a.sync(partialDir)
	}
	return err
}

// finishAsset makes an upload of which all bytes are there a whole asset, if they have the hash.
func (n *Node) finishAsset(user mimi.URI, hash []byte, size uint64) (*upload, error) {
	a, k := n.assets, key(prefixAsset, user, hash)
	sum, err := a.sum(partialName(k))
	if err != nil {
		return nil, fmt.Errorf("reading an upload: %w", err)
	}
	if !bytes.Equal(sum, hash) {
		if err := n.dropAsset(user, hash); err != nil {
			return nil, err
		}
		return nil, refuse("malformed", "the bytes have another hash")
	}
	rec := &assetRecord{whole: true, size: size, expires: uint64(time.Now().Unix()) + n.assetLifetime()}
	var b store.Batch
	b.Set(k, codec.Marshal(rec))
	b.Set(assetRefKey(hash, user), []byte{})
	a.names.Lock()
	var wait func() error
	if err = a.dir.Link(partialName(k), wholeName(hash)); err == nil || errors.Is(err, fs.ErrExist) { // of another user
		err = a.sync(wholeDir)
	}
	if err == nil {
		wait, err = n.store.Apply(&b)
	}
	a.names.Unlock()
	if err == nil {
		err = wait()
	}
	if err == nil {
		err = a.remove(partialName(k))
	}
	if err != nil {
		return nil, fmt.Errorf("keeping an asset: %w", err)
	}
	return &upload{size, true, rec.expires}, nil
}

func (a *assets) sum(name string) ([]byte, error) {
	f, err := a.dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return h.Sum(nil), err
}

// deleteAsset gives up a user's asset, durably, if it expires before a time in s since 1970.
func (n *Node) deleteAsset(user mimi.URI, hash []byte, before uint64) error {
	if len(hash) != sha256.Size {
		return refuse("malformed", "a hash of %d bytes, not %d", len(hash), sha256.Size)
	}
	k := key(prefixAsset, user, hash)
	if !n.assets.begin(string(k)) {
		return refuse("busy", "a request writes to the upload")
	}
	defer n.assets.end(string(k))
	rec, err := n.asset(k)
	if err != nil || rec == nil || rec.expires >= before {
		return err
	}
	return n.dropAsset(user, hash)
}

// dropAsset deletes the record of a user's asset, and the file if nobody else has it. No other request writes to it.
func (n *Node) dropAsset(user mimi.URI, hash []byte) error {
	a, k := n.assets, key(prefixAsset, user, hash)
	var b store.Batch
	b.Delete(k)
	b.Delete(assetRefKey(hash, user))
	a.names.Lock()
	wait, err := n.store.Apply(&b)
	if err == nil {
		kept := false
		err = store.ScanPrefix(n.store, append([]byte(prefixAssetRef), hash...), func(_, _ []byte) bool {
			kept = true
			return false
		})
		if err == nil && !kept {
			err = a.remove(wholeName(hash))
		}
		err = errors.Join(err, a.remove(partialName(k)))
	}
	a.names.Unlock()
	if wait != nil {
		err = errors.Join(err, wait())
	}
	if err != nil {
		return fmt.Errorf("deleting an asset: %w", err)
	}
	return nil
}

// sweepAssets deletes what has expired.
func (n *Node) sweepAssets() error {
	var expired []string
	var bad error
	now := uint64(time.Now().Unix())
	err := store.ScanPrefix(n.store, []byte(prefixAsset), func(k, v []byte) bool {
		var rec assetRecord
		if bad = decodeRecord(v, &rec, "asset"); bad == nil && rec.expires < now {
			expired = append(expired, string(k))
		}
		return bad == nil
	})
	errs := []error{err, bad}
	for _, k := range expired {
		user, hash, _ := strings.Cut(k, "\x00")
		err := n.deleteAsset(mimi.URI(user), []byte(hash), now)
		if r, ok := errors.AsType[*refusal](err); !ok || r.code != "busy" {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// settleAssets deletes what a crash has left of files without records and of records without files. Nothing else uses
// them yet.
func (n *Node) settleAssets() error {
	a := n.assets
	names := make(map[string]bool) // of files; true: nobody's
	for _, dir := range []string{wholeDir, partialDir} {
		if err := a.list(dir, names); err != nil {
			return fmt.Errorf("reading the directory of assets: %w", err)
		}
	}
	var b store.Batch
	var bad error
	err := store.ScanPrefix(n.store, []byte(prefixAsset), func(k, v []byte) bool {
		user, hash, _ := strings.Cut(string(k), "\x00")
		var rec assetRecord
		if bad = decodeRecord(v, &rec, "asset"); bad != nil {
			return false
		}
		name := wholeName([]byte(hash))
		if !rec.whole {
			name = partialName(append([]byte(prefixAsset), k...))
		}
		if _, there := names[name]; there {
			names[name] = false
		} else if rec.whole {
			n.log.Warn("the file of an asset is missing", "user", user, "asset", name)
			b.Delete(append([]byte(prefixAsset), k...))
			b.Delete(assetRefKey([]byte(hash), mimi.URI(user)))
		}
		return true
	})
	if err := cmp.Or(err, bad); err != nil {
		return err
	}
	for name, orphan := range names {
		if !orphan {
			continue
		}
		n.log.Info("deleting a file that no asset refers to", "name", name)
		if err := a.remove(name); err != nil {
			return fmt.Errorf("deleting what is left of an asset: %w", err)
		}
	}
	if b.Len() == 0 {
		return nil
	}
	wait, err := n.store.Apply(&b)
	if err != nil {
		return err
	}
	return wait()
}

// list adds the names of the files in a directory.
func (a *assets) list(dir string, names map[string]bool) error {
	f, err := a.dir.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		entries, err := f.ReadDir(1000)
		for _, e := range entries {
			if !e.IsDir() {
				names[path.Join(dir, e.Name())] = true
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
