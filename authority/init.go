package authority

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/parley-mls/parley/federation/mimi"
)

// The files of an authority's directory. The root's key is needed only to issue another intermediate: it is kept
// apart, best on another machine.
const (
	rootFile            = "root.crt"         // the root, and after it others that are trusted beside it
	rootKeyFile         = "root.key"         // encrypted PKCS #8, unless it was put elsewhere
	intermediateFile    = "intermediate.crt" // the issuer
	intermediateKeyFile = "intermediate.key" // PKCS #8
	configFile          = "authority.json"
)

const (
	configFormat  = 1
	minPassphrase = 8 // bytes
)

// configuration is authority.json.
type configuration struct {
	Format  int         `json:"format"`
	Domain  string      `json:"domain"`
	Root    Fingerprint `json:"root"`
	Created time.Time   `json:"created"`
}

// InitOptions say what authority Init creates.
type InitOptions struct {
	Domain      string
	Passphrase  []byte           // encrypts the root's key; 8 bytes at least
	RootKeyPath string           // where the root's key goes; empty: root.key in the directory
	KeyType     KeyType          // of root and intermediate; empty: P-256
	Rand        io.Reader        // nil: crypto/rand
	Time        func() time.Time // nil: time.Now
}

// Init creates an authority in a directory that doesn't exist yet, or is empty: a root whose key is encrypted, and an
// intermediate that issues for the domain only. Either all files are there when it returns, or none. It returns the
// root's fingerprint. It fails with ErrExists, ErrPassphrase or ErrRequest.
func Init(dir string, o InitOptions) (Fingerprint, error) {
	f, err := initialise(dir, o)
	if err != nil {
		return Fingerprint{}, fmt.Errorf("authority: init: %w", err)
	}
	return f, nil
}

func initialise(dir string, o InitOptions) (Fingerprint, error) {
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Time == nil {
		o.Time = time.Now
	}
	if err := mimi.ValidDomain(o.Domain); err != nil {
		return Fingerprint{}, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if len(o.Passphrase) < minPassphrase {
		return Fingerprint{}, fmt.Errorf("%w: %d bytes at least", ErrPassphrase, minPassphrase)
	}
	if err := vacant(dir, o.RootKeyPath); err != nil {
		return Fingerprint{}, err
	}
	h, err := newHierarchy(o)
	if err != nil {
		return Fingerprint{}, err
	}
	rootKey, err := pemutil.Serialize(h.rootKey, pemutil.WithPKCS8(true), pemutil.WithPassword(o.Passphrase))
	if err != nil {
		return Fingerprint{}, fmt.Errorf("encrypt the root key: %w", err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(h.key)
	if err != nil {
		return Fingerprint{}, fmt.Errorf("encode the intermediate key: %w", err)
	}
	f := FingerprintOf(h.root)
	config, err := json.MarshalIndent(configuration{Format: configFormat, Domain: o.Domain, Root: f, Created: o.Time().UTC().Truncate(time.Second)}, "", "  ")
	if err != nil {
		return Fingerprint{}, fmt.Errorf("encode %s: %w", configFile, err)
	}

	parent := filepath.Dir(filepath.Clean(dir))
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return Fingerprint{}, err
	}
	made, err := os.MkdirTemp(parent, ".authority-")
	if err != nil {
		return Fingerprint{}, err
	}
	defer os.RemoveAll(made)
	files := []struct {
		path string
		data []byte
		mode fs.FileMode
	}{
		{filepath.Join(made, rootFile), certificatePEM(h.root), 0o644},
		{filepath.Join(made, intermediateFile), certificatePEM(h.intermediate), 0o644},
		{filepath.Join(made, intermediateKeyFile), keyPEM(key), 0o600},
		{filepath.Join(made, configFile), append(config, '\n'), 0o644},
		{filepath.Join(made, rootKeyFile), pem.EncodeToMemory(rootKey), 0o600},
	}
	if o.RootKeyPath != "" {
		files[4].path = o.RootKeyPath
	}
	for _, file := range files {
		if err = writeNew(file.path, file.data, file.mode); err != nil {
			break
		}
	}
	if err == nil {
		if err = errors.Join(syncDir(made), syncDir(filepath.Dir(files[4].path))); err == nil {
			err = os.Rename(made, dir) // replaces an empty directory
		}
	}
	if err != nil {
		if o.RootKeyPath != "" && !errors.Is(err, fs.ErrExist) {
			os.Remove(o.RootKeyPath)
		}
		return Fingerprint{}, err
	}
	return f, syncDir(parent)
}

// vacant fails with ErrExists if Init would overwrite something.
func vacant(dir, rootKeyPath string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("%w: %s is not empty", ErrExists, dir)
	}
	if rootKeyPath == "" {
		return nil
	}
	if _, err := os.Lstat(rootKeyPath); err == nil {
		return fmt.Errorf("%w: %s exists", ErrExists, rootKeyPath)
	}
	return nil
}

// hierarchy is a root and the intermediate that it issued.
type hierarchy struct {
	root, intermediate *x509.Certificate
	rootKey, key       crypto.Signer
}

func newHierarchy(o InitOptions) (*hierarchy, error) {
	h, now := &hierarchy{}, o.Time()
	var err error
	if h.rootKey, err = o.KeyType.generate(o.Rand); err != nil {
		return nil, fmt.Errorf("generate the root key: %w", err)
	}
	if h.key, err = o.KeyType.generate(o.Rand); err != nil {
		return nil, fmt.Errorf("generate the intermediate key: %w", err)
	}
	serial, err := newSerial(o.Rand)
	if err != nil {
		return nil, err
	}
	t := rootTemplate(o.Domain, serial, now)
	if h.root, err = signIssuer(o.Rand, t, t, h.rootKey.Public(), h.rootKey); err != nil {
		return nil, fmt.Errorf("sign the root: %w", err)
	}
	if serial, err = newSerial(o.Rand); err != nil {
		return nil, err
	}
	if h.intermediate, err = signIssuer(o.Rand, intermediateTemplate(o.Domain, serial, now), h.root, h.key.Public(), h.rootKey); err != nil {
		return nil, fmt.Errorf("sign the intermediate: %w", err)
	}
	return h, nil
}

func signIssuer(rand io.Reader, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand, template, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func certificatePEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// keyPEM takes PKCS #8.
func keyPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// writeNew writes a file that doesn't exist yet, durably.
func writeNew(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// files are what Open reads of an authority's directory.
type files struct {
	domain       string
	roots        []*x509.Certificate
	intermediate *x509.Certificate
	key          crypto.Signer
}

// readFiles reads the directory and checks that its files belong together.
func readFiles(dir string) (*files, error) {
	raw, err := os.ReadFile(filepath.Join(dir, configFile))
	if err != nil {
		return nil, err
	}
	var c configuration
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, fmt.Errorf("%s: %w", configFile, err)
	}
	if c.Format != configFormat {
		return nil, fmt.Errorf("%s: format %d, this program reads %d", configFile, c.Format, configFormat)
	}
	f := &files{domain: c.Domain}
	if err := mimi.ValidDomain(c.Domain); err != nil {
		return nil, fmt.Errorf("%s: %w", configFile, err)
	}
	if f.roots, err = pemutil.ReadCertificateBundle(filepath.Join(dir, rootFile)); err != nil {
		return nil, fmt.Errorf("%s: %w", rootFile, err)
	}
	if len(f.roots) == 0 || FingerprintOf(f.roots[0]) != c.Root {
		return nil, fmt.Errorf("%s doesn't begin with the root of %s", rootFile, configFile)
	}
	if f.intermediate, err = pemutil.ReadCertificate(filepath.Join(dir, intermediateFile)); err != nil {
		return nil, fmt.Errorf("%s: %w", intermediateFile, err)
	}
	if !issuedBy(f.intermediate, f.roots) {
		return nil, fmt.Errorf("%s is not issued by %s", intermediateFile, rootFile)
	}
	for _, p := range []Purpose{PurposeClient, PurposeNode} {
		if err := checkIssuer(f.intermediate, 0, f.domain, p); err != nil {
			return nil, fmt.Errorf("%s: %w", intermediateFile, err)
		}
	}
	path := filepath.Join(dir, intermediateKeyFile)
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s may be read by others (mode %o): chmod 600 it", path, info.Mode().Perm())
	}
	raw, err = os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := pemutil.ParseKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%s is not a key", intermediateKeyFile)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s is not a private key", intermediateKeyFile)
	}
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil || !bytes.Equal(spki, f.intermediate.RawSubjectPublicKeyInfo) {
		return nil, fmt.Errorf("%s is not the key of %s", intermediateKeyFile, intermediateFile)
	}
	f.key = signer
	return f, nil
}
