// Package authoritytest makes authorities for tests. To encrypt a root key takes longer than most tests of a node, and no
// test of a node needs the root key.
package authoritytest

import (
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/parley-mls/parley/authority"
)

// made is an authority that authority.Init has made: the files in its directory.
type made struct {
	root  authority.Fingerprint
	files map[string]file
}

type file struct {
	data []byte
	mode fs.FileMode
}

var (
	mu    sync.Mutex
	cache = make(map[string][]*made)            // by domain; guarded by mu
	used  = make(map[testing.TB]map[string]int) // how many of each domain a test has; guarded by mu
)

// Init does what authority.Init does for a domain, with files that it has made for an earlier test if there are any. Two
// authorities of one test, or of a test and its subtests, are never the same.
func Init(t testing.TB, dir, domain string) authority.Fingerprint {
	t.Helper()
	mu.Lock()
	defer mu.Unlock()
	if used[t] == nil {
		used[t] = make(map[string]int)
		t.Cleanup(func() {
			mu.Lock()
			defer mu.Unlock()
			delete(used, t)
		})
	}
	n := 0 // of all tests under way: a subtest's are beside those of its parent
	for _, of := range used {
		n += of[domain]
	}
	used[t][domain]++
	if n == len(cache[domain]) {
		cache[domain] = append(cache[domain], generate(t, domain))
	}
	m := cache[domain][n]
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, f := range m.files {
		if err := os.WriteFile(filepath.Join(dir, name), f.data, f.mode); err != nil {
			t.Fatal(err)
		}
	}
	return m.root
}

func generate(t testing.TB, domain string) *made {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "authority")
	root, err := authority.Init(dir, authority.InitOptions{Domain: domain, Passphrase: []byte("a passphrase for tests")})
	if err != nil {
		t.Fatal(err)
	}
	m := &made{root: root, files: make(map[string]file)}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		m.files[e.Name()] = file{data, info.Mode().Perm()}
	}
	return m
}
