package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/parley-mls/parley/node/store"
)

// A node that was restored from a backup has forgotten what came after it, and goes on from there as another incarnation:
//
//   - What it has ordered and acknowledged since is lost, and what came from other hubs: nobody is asked for it. Where it
//     gives the numbers of lost entries again, those who follow a room keep the entries that they have; clients are told
//     (HubRestored).
//   - The store that was superseded must not be served any more. Peers refuse heads of its incarnation for a room once they
//     have had one of the later incarnation (watch.go).
//   - KeyPackages of the backup may have been handed out since. All for one use are dropped, and so are those that came
//     with consents; clients publish new ones when they connect. A last-resort one stays, and counts as handed out.

// Restore makes a data directory, which must be empty or not exist, of a backup, which must be whole and stays as it is.
// The node that is started there is another incarnation.
func Restore(backup, data string) (b *Backup, err error) {
	if list, err := os.ReadDir(data); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking into the data directory: %w", err)
	} else if len(list) > 0 {
		return nil, fmt.Errorf("%s isn't empty", data)
	}
	if b, err = VerifyBackup(backup); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b, err = nil, errors.Join(err, os.RemoveAll(data))
		}
	}()
	if err := errors.Join(
		copyTree(StoreDir(backup), StoreDir(data), false),
		copyTree(keysDir(backup), keysDir(data), false),
		copyTree(assetsDir(backup), assetsDir(data), false),
	); err != nil {
		return nil, err
	}
	s, err := store.Open(StoreDir(data), store.Options{})
	if err != nil {
		return nil, err
	}
	if err = checkFormat(s); err == nil {
		err = beginAnew(s)
	}
	if err := errors.Join(err, s.Close()); err != nil {
		return nil, err
	}
	// No node starts without the authority: a copy that isn't finished can't be served.
	whole := AuthorityDir(data)
	if err := errors.Join(copyTree(AuthorityDir(backup), whole+".new", false), syncDirs(data)); err != nil {
		return nil, err
	}
	if err := os.Rename(whole+".new", whole); err != nil {
		return nil, fmt.Errorf("finishing the data directory: %w", err)
	}
	return b, errors.Join(syncDir(data), syncDir(filepath.Dir(filepath.Clean(data))))
}

// beginAnew makes the store of a backup that of another incarnation.
func beginAnew(s store.Store) error {
	var b store.Batch
	last := make(map[string]bool) // ends of the keys of last-resort KeyPackages
	if err := store.ScanPrefix(s, []byte(prefixLastResort), func(k, _ []byte) bool {
		last[string(k)] = true
		b.Set([]byte(prefixLastResort+string(k)), []byte{1})
		return true
	}); err != nil {
		return err
	}
	for _, prefix := range []string{prefixKeyPackage, prefixGranted} {
		if err := store.ScanPrefix(s, []byte(prefix), func(k, _ []byte) bool {
			if prefix != prefixKeyPackage || !last[string(k)] {
				b.Delete([]byte(prefix + string(k)))
			}
			return true
		}); err != nil {
			return err
		}
	}
	wait, err := s.Apply(&b)
	if err != nil {
		return err
	}
	if err := wait(); err != nil {
		return err
	}
	_, err = renewIncarnation(s)
	return err
}
