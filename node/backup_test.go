package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// backUp has a node write a backup, which must be whole.
func (n *testNode) backUp() (dir string, b *Backup) {
	n.t.Helper()
	dir = filepath.Join(n.t.TempDir(), "backup")
	if _, err := DialAdmin(n.cfg.Socket()).Backup(n.t.Context(), dir); err != nil {
		n.t.Fatal(err)
	}
	return dir, must(VerifyBackup(dir))(n.t)
}

func TestABackupHasWhatWasAcknowledgedBefore(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	asset := path.Base(alice.uploadAll([]byte("a picture")))
	alice.send("before")
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })

	// Others write meanwhile.
	var writing sync.WaitGroup
	stop := make(chan struct{})
	requests := make(chan *mimi.SubmitMessageRequest)
	for range 2 {
		writing.Go(func() {
			for req := range requests {
				if _, _, err := alice.submit(req); err != nil {
					t.Error(err)
				}
			}
		})
	}
	go func() {
		defer close(requests)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case requests <- alice.seal(fmt.Sprint("meanwhile ", i)):
			}
		}
	}()
	dir, b := alpha.backUp()
	close(stop)
	writing.Wait()

	if b.Rooms != 1 || b.Entries < int(seq) || b.Domain != "alpha.example" || b.Incarnation != alpha.incarnation {
		t.Errorf("the backup has %+v after %d entries", b, seq)
	}
	if got, err := os.ReadFile(filepath.Join(assetsDir(dir), asset)); err != nil || string(got) != "a picture" {
		t.Errorf("the asset is %q (%v)", got, err)
	}
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// Verifying makes the lock, under the command's umask.
		if info, err := d.Info(); err != nil || info.Mode().Perm()&0o077 != 0 && d.Name() != "LOCK" {
			t.Errorf("%s has mode %v (%v)", path, info.Mode(), err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := DialAdmin(alpha.cfg.Socket()).Backup(t.Context(), dir); err == nil {
		t.Error("a second backup to the same directory")
	}
	if _, err := DialAdmin(alpha.cfg.Socket()).Backup(t.Context(), "backup"); err == nil {
		t.Error("a backup to a relative path")
	}
	_, followed := beta.backUp()
	if followed.Entries < int(seq)-1 { // from the Welcome on
		t.Errorf("the follower's backup has %+v", followed)
	}
}

func TestADamagedBackupIsRefused(t *testing.T) {
	alpha, _, alice, _, _, _ := twoNodes(t)
	for i := range 4 {
		alice.send(fmt.Sprint(i))
	}
	room := alice.room
	for name, c := range map[string]struct {
		change map[string][]byte
		want   string
	}{
		"missing entry":     {map[string][]byte{string(key(prefixLog, room, be64(3))): nil}, "entry 4 follows entry 2"},
		"missing last":      {map[string][]byte{string(key(prefixLog, room, be64(5))): nil}, "ends with entry 4"},
		"another link":      {map[string][]byte{string(linkKey(room, 3)): codec.Marshal(linkRecord{chain: chain.Hash{1}})}, "chain breaks at entry 3"},
		"another context":   {map[string][]byte{string(linkKey(room, 5)): codec.Marshal(linkRecord{context: chain.Hash{1}})}, "chain breaks at entry 5"},
		"malformed record":  {map[string][]byte{string(key(prefixMember, alice.uri, []byte(room))): {1}}, "damaged record"},
		"malformed entry":   {map[string][]byte{string(key(prefixLog, room, be64(2))): {1}}, "damaged record"},
		"malformed cursor":  {map[string][]byte{string(key(prefixAcked, alice.uri, []byte(room))): {1}}, "1 bytes"},
		"malformed fence":   {map[string][]byte{string(latestKey("beta.example")): {1}}, "damaged record"},
		"another format":    {map[string][]byte{keyVersion: {1}}, "format"},
		"group left behind": {map[string][]byte{string(key(prefixGroup, room)): nil}, ""}, // filled in below
	} {
		dir, _ := alpha.backUp()
		s := must(store.Open(StoreDir(dir), store.Options{}))(t)
		if name == "group left behind" {
			if err := store.ScanPrefix(s, key(prefixGroup, room), func(k, _ []byte) bool {
				c.change[string(key(prefixGroup, room, k))] = nil
				return true
			}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Commit(c.change, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyBackup(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	asset := path.Base(alice.uploadAll([]byte("a picture")))
	for name, damage := range map[string]func(file string) error{
		"has the hash": func(file string) error { return os.WriteFile(file, []byte("a painting"), 0o600) },
		"is missing":   os.Remove,
		"the asset x":  func(file string) error { return os.WriteFile(filepath.Join(filepath.Dir(file), "x"), nil, 0o600) },
	} {
		dir, b := alpha.backUp()
		file := filepath.Join(assetsDir(dir), asset)
		if b.Assets != 1 {
			t.Errorf("the backup has %d assets", b.Assets)
		}
		copied := filepath.Join(t.TempDir(), asset) // the node has the same file
		if err := errors.Join(copyFile(file, copied), os.Remove(file), os.Rename(copied, file), damage(file)); err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyBackup(dir); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%q: %v", name, err)
		}
	}
	dir, _ := alpha.backUp()
	tables := must(filepath.Glob(filepath.Join(StoreDir(dir), "*.sst")))(t)
	logs := must(filepath.Glob(filepath.Join(StoreDir(dir), "*.log")))(t)
	if files := slices.Concat(tables, logs); len(files) == 0 {
		t.Error("no files in the store of a backup")
	}
	if err := os.Remove(filepath.Join(dir, backupFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyBackup(dir); err == nil || !strings.Contains(err.Error(), "wasn't finished") {
		t.Errorf("a backup that wasn't finished: %v", err)
	}
}
