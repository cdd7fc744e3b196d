package authority

import (
	"crypto"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.step.sm/crypto/pemutil"
)

func TestInitMakesAnAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data", "authority")
	rootKey := filepath.Join(t.TempDir(), "root.key")
	f, err := Init(dir, InitOptions{Domain: "alpha.example", Passphrase: []byte(passphrase), RootKeyPath: rootKey})
	ok(t, err)
	for path, mode := range map[string]fs.FileMode{
		filepath.Join(dir, rootFile): 0o644, filepath.Join(dir, intermediateFile): 0o644, filepath.Join(dir, configFile): 0o644,
		filepath.Join(dir, intermediateKeyFile): 0o600, rootKey: 0o600, dir: 0o700,
	} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, rootKeyFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the root's key is in the directory too")
	}
	pem, err := os.ReadFile(rootKey)
	ok(t, err)
	if !strings.Contains(string(pem), "ENCRYPTED PRIVATE KEY") {
		t.Error("the root's key is not encrypted")
	}
	if _, err := pemutil.ParseKey(pem, pemutil.WithPassword([]byte("wrong passphrase"))); err == nil {
		t.Error("any passphrase opens the root's key")
	}
	key, err := pemutil.ParseKey(pem, pemutil.WithPassword([]byte(passphrase)))
	ok(t, err)
	if _, signs := key.(crypto.Signer); !signs {
		t.Errorf("the root's key is a %T", key)
	}
	e, err := Open(dir, newMemory(), nil)
	ok(t, err)
	defer e.Close()
	if e.Domain() != "alpha.example" || e.Root() != f {
		t.Errorf("opened %s with root %v", e.Domain(), e.Root())
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestInitOverwritesNothing(t *testing.T) {
	dir, _ := testDir(t, "alpha.example", KeyP256)
	o := InitOptions{Domain: "alpha.example", Passphrase: []byte(passphrase)}
	_, err := Init(dir, o)
	wantErr(t, err, ErrExists)

	// A root key from before stays, and nothing half-made appears.
	o.RootKeyPath = filepath.Join(t.TempDir(), "root.key")
	ok(t, os.WriteFile(o.RootKeyPath, []byte("precious"), 0o600))
	dir = filepath.Join(t.TempDir(), "authority")
	_, err = Init(dir, o)
	wantErr(t, err, ErrExists)
	if b, err := os.ReadFile(o.RootKeyPath); err != nil || string(b) != "precious" {
		t.Errorf("the old root key is %q, %v", b, err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a directory was made")
	}
	// And where the root key can't be written.
	o.RootKeyPath = filepath.Join(t.TempDir(), "missing", "root.key")
	if _, err = Init(dir, o); err == nil {
		t.Fatal("no error")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a directory was made")
	}
}

func TestInitRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "authority")
	for want, list := range map[error][]InitOptions{
		ErrRequest: {{Domain: "", Passphrase: []byte(passphrase)}, {Domain: "Alpha", Passphrase: []byte(passphrase)},
			{Domain: "alpha.example", Passphrase: []byte(passphrase), KeyType: "rsa"}},
		ErrPassphrase: {{Domain: "alpha.example"}, {Domain: "alpha.example", Passphrase: []byte("short")}},
	} {
		for _, o := range list {
			_, err := Init(dir, o)
			wantErr(t, err, want)
		}
	}
}

func TestOpenRefusesFilesThatDoNotBelongTogether(t *testing.T) {
	other, _ := testDir(t, "alpha.example", KeyP256)
	foreign, _ := testDir(t, "beta.example", KeyP256)
	tests := map[string]func(dir string) error{
		"missing config":       func(dir string) error { return os.Remove(filepath.Join(dir, configFile)) },
		"missing key":          func(dir string) error { return os.Remove(filepath.Join(dir, intermediateKeyFile)) },
		"another root":         func(dir string) error { return copyFile(other, dir, rootFile) },
		"another intermediate": func(dir string) error { return copyFile(other, dir, intermediateFile) },
		"another key":          func(dir string) error { return copyFile(other, dir, intermediateKeyFile) },
		"key for all to read":  func(dir string) error { return os.Chmod(filepath.Join(dir, intermediateKeyFile), 0o644) },
		"another provider's authority": func(dir string) error {
			return errors.Join(copyFile(foreign, dir, rootFile), copyFile(foreign, dir, intermediateFile), copyFile(foreign, dir, intermediateKeyFile),
				rewrite(foreign, dir, configFile, "beta.example", "alpha.example"))
		},
		"another format": func(dir string) error { return rewrite(dir, dir, configFile, `"format":1`, `"format":2`) },
		"no domain":      func(dir string) error { return rewrite(dir, dir, configFile, "alpha.example", "") },
	}
	for name, damage := range tests {
		dir, _ := testDir(t, "alpha.example", KeyP256)
		ok(t, damage(dir))
		if e, err := Open(dir, newMemory(), nil); err == nil {
			e.Close()
			t.Errorf("%s: opened", name)
		}
	}
	_, err := Open(filepath.Join(t.TempDir(), "none"), newMemory(), nil)
	wantErr(t, err, fs.ErrNotExist)
}

func copyFile(from, to, name string) error { return rewrite(from, to, name, "", "") }

func rewrite(from, to, name, old, new string) error {
	b, err := os.ReadFile(filepath.Join(from, name))
	if err != nil {
		return err
	}
	if old != "" {
		b = []byte(strings.Replace(string(b), old, new, 1))
	}
	return os.WriteFile(filepath.Join(to, name), b, 0o600)
}

// A new intermediate, or root, takes over on the old one's state: its certificates stay good, and can be revoked.
func TestIssuerIsReplaced(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	old := f.enrol(t, d)
	first, err := f.Bundle(t.Context())
	ok(t, err)
	ok(t, f.SetAddress("127.0.0.1:7441"))

	c, key := issuer(t, f.h, func(*x509.Certificate) {})
	f.dir = writeDir(t, "alpha.example", &hierarchy{root: f.h.root, rootKey: f.h.rootKey, intermediate: c, key: key})
	f.reopen(t)
	b, err := f.Bundle(t.Context())
	ok(t, err)
	if b.Sequence() != first.Sequence()+1 || len(b.intermediates) != 2 {
		t.Fatalf("sequence %d after %d, %d intermediates", b.Sequence(), first.Sequence(), len(b.intermediates))
	}
	_, err = f.Verifier().Verify(old, PurposeClient)
	ok(t, err)
	_, err = f.Revoke(t.Context(), string(d.client), "")
	ok(t, err)
	_, err = f.Verifier().Verify(old, PurposeClient)
	wantErr(t, err, ErrRevoked)
	inv, err := f.Invite(t.Context(), d.user, 0)
	if err != nil || inv.Address != "127.0.0.1:7441" {
		t.Errorf("invitation to %q, %v", inv.Address, err)
	}
}
