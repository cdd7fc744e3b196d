package authority

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
)

// memory is a Store in memory whose Commit a test can watch.
type memory struct {
	mu     sync.Mutex
	rows   map[string][]byte
	before func(changes map[string][]byte) error // called before each Commit; an error fails it
}

func newMemory() *memory { return &memory{rows: make(map[string][]byte)} }

func (m *memory) Get(key []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.rows[string(key)]), nil
}

func (m *memory) Scan(start, end []byte, fn func(key, value []byte) bool) error {
	m.mu.Lock()
	rows := maps.Clone(m.rows)
	m.mu.Unlock()
	for _, k := range slices.Sorted(maps.Keys(rows)) {
		if k >= string(start) && (end == nil || k < string(end)) && !fn([]byte(k), rows[k]) {
			return nil
		}
	}
	return nil
}

func (m *memory) Commit(changes, expect map[string][]byte) (bool, error) {
	if m.before != nil {
		if err := m.before(changes); err != nil {
			return false, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, v := range expect {
		have, ok := m.rows[k]
		if ok != (v != nil) || !bytes.Equal(have, v) {
			return false, nil
		}
	}
	for k, v := range changes {
		if v == nil {
			delete(m.rows, k)
		} else {
			m.rows[k] = append([]byte{}, v...)
		}
	}
	return true, nil
}

func (m *memory) snapshot() map[string][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.rows)
}

// clock is a time that a test moves. It begins now, for smallstep's lists are dated by the real clock.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

const passphrase = "correct horse battery"

// testDir makes an authority's directory without the cost of encrypting the root's key.
func testDir(tb testing.TB, domain string, kind KeyType) (dir string, h *hierarchy) {
	tb.Helper()
	h, err := newHierarchy(InitOptions{Domain: domain, KeyType: kind, Rand: rand.Reader, Time: time.Now})
	if err != nil {
		tb.Fatal(err)
	}
	return writeDir(tb, domain, h), h
}

func writeDir(tb testing.TB, domain string, h *hierarchy) string {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "authority")
	key, err := x509.MarshalPKCS8PrivateKey(h.key)
	if err != nil {
		tb.Fatal(err)
	}
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	write(rootFile, certificatePEM(h.root))
	write(intermediateFile, certificatePEM(h.intermediate))
	write(intermediateKeyFile, keyPEM(key))
	write(configFile, []byte(`{"format":1,"domain":"`+domain+`","root":"`+FingerprintOf(h.root).String()+`"}`))
	return dir
}

// fixture is an open authority, with all that it rests on in a test's hands.
type fixture struct {
	*Embedded
	h     *hierarchy
	dir   string
	store *memory
	clock *clock
}

func newFixture(tb testing.TB, domain string) *fixture {
	tb.Helper()
	dir, h := testDir(tb, domain, KeyP256)
	f := &fixture{h: h, dir: dir, store: newMemory(), clock: newClock()}
	f.reopen(tb)
	tb.Cleanup(func() { f.Close() })
	return f
}

// reopen opens the authority anew on the same store, as a restart does.
func (f *fixture) reopen(tb testing.TB) {
	tb.Helper()
	if f.Embedded != nil {
		f.Close()
	}
	e, err := open(f.dir, f.store, slog.New(slog.DiscardHandler), settings{rand: rand.Reader, time: f.clock.Now})
	if err != nil {
		tb.Fatal(err)
	}
	f.Embedded = e
}

// device is a client's key and names.
type device struct {
	user, client mimi.URI
	suite        mls.CipherSuite
	key          crypto.Signer
}

func newDevice(tb testing.TB, domain, user, client string) *device {
	tb.Helper()
	return newDeviceOf(tb, domain, user, client, mls.X25519_AES128GCM_SHA256_Ed25519)
}

func newDeviceOf(tb testing.TB, domain, user, client string, suite mls.CipherSuite) *device {
	tb.Helper()
	d := &device{suite: suite}
	var err error
	if d.key, err = suite.GenerateSignatureKey(rand.Reader); err != nil {
		tb.Fatal(err)
	}
	if d.user, err = mimi.UserURI(domain, user); err != nil {
		tb.Fatal(err)
	}
	if d.client, err = mimi.ClientURI(domain, client); err != nil {
		tb.Fatal(err)
	}
	return d
}

func (d *device) csr(tb testing.TB) []byte {
	tb.Helper()
	return csrOf(tb, d.key, uriName(string(d.user)), uriName(string(d.client)))
}

func (d *device) public(tb testing.TB) []byte {
	tb.Helper()
	pub, err := d.suite.SignaturePublicKey(d.key.Public())
	if err != nil {
		tb.Fatal(err)
	}
	return pub
}

// name is a GeneralName as it is encoded, whatever it holds.
type name struct {
	tag   int
	value string
}

func uriName(s string) name { return name{tagURI, s} }
func dnsName(s string) name { return name{tagDNSName, s} }

func sanExtension(tb testing.TB, names ...name) pkix.Extension {
	tb.Helper()
	var raw []asn1.RawValue
	for _, n := range names {
		raw = append(raw, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: n.tag, Bytes: []byte(n.value)})
	}
	der, err := asn1.Marshal(raw)
	if err != nil {
		tb.Fatal(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Value: der}
}

func csrOf(tb testing.TB, key crypto.Signer, names ...name) []byte {
	tb.Helper()
	der, err := createRequest(rand.Reader, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{sanExtension(tb, names...)}}, key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

// enrol invites and enrols a device.
func (f *fixture) enrol(tb testing.TB, d *device) [][]byte {
	tb.Helper()
	i, err := f.Invite(tb.Context(), d.user, 0)
	if err != nil {
		tb.Fatal(err)
	}
	chain, err := f.Enrol(tb.Context(), i.Token, d.csr(tb))
	if err != nil {
		tb.Fatal(err)
	}
	return chain
}

func wantErr(tb testing.TB, err, want error) {
	tb.Helper()
	if !errors.Is(err, want) {
		tb.Fatalf("got error %v, want %v", err, want)
	}
}

func ok(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
