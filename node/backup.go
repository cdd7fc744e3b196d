package node

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// A backup is a directory of mode 0700 that a running node writes: a checkpoint of the store, whose files are linked
// where the file system can, the authority's files and the node's keys as copies, and links to the assets. All of the
// store is of one moment, and everything that was acknowledged before is in it. The file backup.json is written last: a
// directory without it is no backup.

// backupFile says what a backup is of.
const backupFile = "backup.json"

func assetsDir(data string) string { return filepath.Join(data, wholeDir) }

// Backup is what a backup says of itself, and what VerifyBackup has counted in it.
type Backup struct {
	Domain      string    `json:"domain"`
	Time        time.Time `json:"time"`
	Format      int       `json:"format"` // of the store
	Incarnation uint64    `json:"incarnation"`
	Version     string    `json:"version"` // of the node
	Rooms       int       `json:"rooms,omitempty"`
	Entries     int       `json:"entries,omitempty"` // of logs
	Records     int       `json:"records,omitempty"`
	Assets      int       `json:"assets,omitempty"` // files
}

// backup writes a backup to a directory that doesn't exist yet.
func (n *Node) backup(dir string) (b *Backup, err error) {
	if !filepath.IsAbs(dir) {
		return nil, refuse("malformed", "%s isn't an absolute path", dir)
	}
	if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, refuse("alreadyExists", "%s exists", dir)
	} else if err != nil {
		return nil, fmt.Errorf("making the backup's directory: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	b = &Backup{Domain: n.cfg.Domain, Time: time.Now().UTC(), Format: formatVersion, Incarnation: n.incarnation, Version: Version()}
	// Assets come and go meanwhile, but not during the checkpoint: what is whole then is in the backup.
	if err := copyTree(assetsDir(n.cfg.Data), assetsDir(dir), true); err != nil {
		return nil, err
	}
	n.assets.names.Lock()
	err = errors.Join(n.store.Checkpoint(StoreDir(dir)), copyTree(assetsDir(n.cfg.Data), assetsDir(dir), true))
	n.assets.names.Unlock()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		copyTree(AuthorityDir(n.cfg.Data), AuthorityDir(dir), false),
		copyTree(keysDir(n.cfg.Data), keysDir(dir), false),
		tighten(StoreDir(dir)),
	); err != nil {
		return nil, err
	}
	j, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := writeFile(filepath.Join(dir, backupFile), j); err != nil {
		return nil, err
	}
	n.log.Info("backup written", "dir", dir)
	return b, nil
}

// copyTree copies the regular files of a directory, which needn't exist, as hard links if link is set and the file
// system can. What exists already stays, what vanishes meanwhile is left out.
func copyTree(from, to string, link bool) error {
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o700)
		case !d.Type().IsRegular():
			return nil
		}
		if link {
			if err := os.Link(path, target); err == nil || errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
		}
		return copyFile(path, target)
	})
	if err == nil {
		err = syncDirs(to)
	}
	if err != nil {
		return fmt.Errorf("copying %s: %w", from, err)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}

// syncDirs makes the names of files durable, in a directory that needn't exist and those in it.
func syncDirs(dir string) error {
	return walkDirs(dir, func(path string, d fs.DirEntry) error {
		if !d.IsDir() {
			return nil
		}
		return syncDir(path)
	})
}

// syncDir makes the names of a directory durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// tighten lets nobody but the owner at files.
func tighten(dir string) error {
	return walkDirs(dir, func(path string, d fs.DirEntry) error {
		if d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
}

func walkDirs(dir string, fn func(path string, d fs.DirEntry) error) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(path, d)
	})
}

// readBackup reads what a backup says of itself.
func readBackup(dir string) (*Backup, error) {
	j, err := os.ReadFile(filepath.Join(dir, backupFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is no backup, or one that wasn't finished: it has no %s", dir, backupFile)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the backup: %w", err)
	}
	b := new(Backup)
	if err := json.Unmarshal(j, b); err != nil {
		return nil, fmt.Errorf("reading %s: %w", filepath.Join(dir, backupFile), err)
	}
	if b.Format < 1 || b.Format > formatVersion {
		return nil, fmt.Errorf("the backup has format %d, this program knows %d", b.Format, formatVersion)
	}
	return b, nil
}

// VerifyBackup reads all of a backup, which stays as it is: every record must decode, every log of a room hosted here be
// whole and lead to the group's epoch, every chain be that of its log, every asset have its hash, and that of each record
// be there.
func VerifyBackup(dir string) (*Backup, error) {
	b, err := readBackup(dir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(AuthorityDir(dir)); err != nil {
		return nil, fmt.Errorf("the authority's files: %w", err)
	}
	s, err := store.Open(StoreDir(dir), store.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(b.verify(s, assetsDir(dir)), s.Close()); err != nil {
		return nil, err
	}
	return b, nil
}

// verifyAssets hashes the files of assets, and returns their sizes by their hashes.
func verifyAssets(dir string) (map[string]uint64, error) {
	sizes := make(map[string]uint64)
	err := walkDirs(dir, func(path string, d fs.DirEntry) error {
		if d.IsDir() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		n, err := io.Copy(h, f)
		if err != nil {
			return err
		}
		hash := h.Sum(nil)
		if hex.EncodeToString(hash) != d.Name() {
			return fmt.Errorf("the asset %s has the hash %x", d.Name(), hash)
		}
		sizes[string(hash)] = uint64(n)
		return nil
	})
	return sizes, err
}

// verify reads the store of a backup, and its assets.
func (b *Backup) verify(s store.Store, assets string) error {
	sizes, err := verifyAssets(assets)
	if err != nil {
		return fmt.Errorf("reading the assets: %w", err)
	}
	b.Assets = len(sizes)
	version, err := s.Get([]byte(keyVersion))
	if err != nil {
		return err
	}
	if len(version) != 1 || int(version[0]) != b.Format {
		return fmt.Errorf("the store has format %x, the backup says %d", version, b.Format)
	}
	var rooms []mimi.URI
	var records []roomRecord
	var bad error
	if err := s.Scan(nil, nil, func(k, v []byte) bool {
		b.Records++
		if bad = checkRecord(k, v); bad != nil {
			return false
		}
		if uri, ok := bytes.CutPrefix(k, []byte(prefixRoom)); ok {
			var rec roomRecord
			bad = decodeRecord(v, &rec, "room")
			rooms, records = append(rooms, mimi.URI(uri)), append(records, rec)
		}
		if id, ok := bytes.CutPrefix(k, []byte(prefixAsset)); ok && bad == nil {
			user, hash, _ := bytes.Cut(id, []byte{0})
			var rec assetRecord
			if bad = decodeRecord(v, &rec, "asset"); bad == nil && rec.whole && sizes[string(hash)] != rec.size {
				bad = fmt.Errorf("the asset %x of %s is missing, or hasn't %d bytes", hash, user, rec.size)
			}
		}
		return bad == nil
	}); err != nil || bad != nil {
		return errors.Join(err, bad)
	}
	for i, uri := range rooms {
		entries, err := verifyLog(s, uri, records[i])
		if err == nil && records[i].hosted {
			err = verifyGroup(s, uri, records[i].last)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", uri, err)
		}
		b.Rooms++
		b.Entries += entries
	}
	return nil
}

// verifyLog follows the chain of a room's log, and returns how many entries there are. That of a room that another node
// hosts may have gaps.
func verifyLog(s store.Store, uri mimi.URI, rec roomRecord) (entries int, err error) {
	n := &Node{store: s}
	cut, err := cutOf(s, uri)
	if err != nil {
		return 0, err
	}
	var before *linkRecord // of the entry last
	var last uint64
	var bad error
	err = store.ScanPrefix(s, key(prefixLog, uri), func(k, v []byte) bool {
		seq := binary.BigEndian.Uint64(k)
		l, err := n.linkAt(uri, seq)
		if err != nil {
			bad = err
			return false
		}
		if entries == 0 {
			last = seq - 1
			if rec.hosted && seq != cut.first {
				bad = fmt.Errorf("%w: the log begins with entry %d instead of %d", errRecord, seq, cut.first)
				return false
			}
			if before, bad = n.linkAt(uri, last); bad != nil {
				return false
			}
		}
		switch {
		case seq != last+1 && rec.hosted:
			bad = fmt.Errorf("%w: entry %d follows entry %d", errRecord, seq, last)
		case seq != last+1 || before == nil || l == nil:
		case before.chain.Next(seq, chain.NewLink(v, l.context)) != l.chain:
			bad = fmt.Errorf("%w: the chain breaks at entry %d", errRecord, seq)
		}
		before, last = l, seq
		entries++
		return bad == nil
	})
	if err := errors.Join(err, bad); err != nil {
		return 0, err
	}
	if rec.hosted && last != rec.last || last > rec.last {
		return 0, fmt.Errorf("%w: the log ends with entry %d instead of %d", errRecord, last, rec.last)
	}
	if rec.hosted && before == nil && entries > 0 {
		return 0, fmt.Errorf("%w: no chain at entry %d", errRecord, last)
	}
	return entries, nil
}

// verifyGroup loads the group of a room hosted here, which must be in the epoch that the log leads to.
func verifyGroup(s store.Store, uri mimi.URI, last uint64) error {
	n := &Node{store: s}
	var bad error
	g, err := mls.LoadPublicGroup(mls.PublicConfig{Components: mimi.Components()}, func(yield func(k, v []byte) bool) {
		bad = store.ScanPrefix(s, key(prefixGroup, uri), yield)
	})
	if err := errors.Join(bad, err); err != nil {
		return err
	}
	l, err := n.linkAt(uri, last)
	if err != nil {
		return err
	}
	if last > 0 && l != nil && l.context != (chain.Hash{}) && l.context != chain.ContextOf(g.Context()) {
		return fmt.Errorf("%w: the group isn't in the epoch that the log leads to", errRecord)
	}
	return nil
}

// checkRecord says whether a record of the node's own decodes. What has another owner, or no structure, passes.
func checkRecord(k, v []byte) error {
	if string(k) == keyIncarnation || string(k) == keyWelcomes {
		return checkLength(k, v, 8)
	}
	if len(k) < len(prefixRoom) {
		return nil
	}
	var u codec.Unmarshaler
	switch prefix := string(k[:len(prefixRoom)]); prefix {
	case prefixRoom:
		u = new(roomRecord)
	case prefixLog, prefixFanout:
		i := bytes.IndexByte(k, 0)
		if i < 0 || len(k) < i+9 || prefix == prefixLog && len(k) != i+9 {
			return fmt.Errorf("%w: key %q", errRecord, k)
		}
		u = new(mimi.FanoutMessage)
	case prefixLink:
		u = new(linkRecord)
	case prefixCut:
		u = new(cutRecord)
	case prefixHead, prefixLatest:
		u = new(chain.Signed)
	case prefixEvidence:
		u = new(chain.Evidence)
	case prefixHubKey:
		u = new(mls.ExternalSender)
	case prefixAnswer:
		u = new(answerRecord)
	case prefixWelcome:
		u = new(welcomeRecord)
	case prefixMember:
		u = new(memberRecord)
	case prefixAcked:
		return checkLength(k, v, 8)
	case prefixSent:
		u = new(sentRecord)
	case prefixKeyPackage:
		if len(v) < 8 {
			return checkLength(k, v, 8)
		}
		u, v = new(mls.KeyPackage), v[8:]
	case prefixLastResort:
		return checkLength(k, v, 1)
	case prefixOwnRef, prefixClaimedRef:
		u = new(refRecord)
	case prefixReport:
		u = new(reportRecord)
	case prefixConsent, prefixConsentOf:
		u = new(consentRecord)
	case prefixGranted:
		u = new(grantedRecord)
	case prefixProfile:
		u = new(profileRecord)
	case prefixAsset:
		u = new(assetRecord)
	case prefixAssetRef, prefixLate:
		return checkLength(k, v, 0)
	case prefixOutbox:
		if len(v) == 1 && v[0] == outboxKindBundle {
			return nil
		}
		_, _, _, _, err := parseReference(v)
		return err
	default:
		return nil
	}
	return decodeRecord(v, u, strings.ToValidUTF8(string(k), "?"))
}

func checkLength(k, v []byte, want int) error {
	if len(v) != want {
		return fmt.Errorf("%w: %d bytes under %q", errRecord, len(v), k)
	}
	return nil
}
