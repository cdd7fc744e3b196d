package federation

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

func (n *testNode) certificate() (*tls.Certificate, error) { return n.cert, nil }

func signRecord(t testing.TB, r *Record, cert *tls.Certificate) {
	t.Helper()
	if err := r.Sign(cert.PrivateKey.(crypto.Signer)); err != nil {
		t.Fatal(err)
	}
}

func TestRecordEncoding(t *testing.T) {
	r := Record{
		Domain: "a.example", Address: "192.0.2.1:4443", Incarnation: 2, Issued: time.Unix(1700000000, 0).UTC(), Version: "1.0",
		Chain: [][]byte{{1, 2}, {3}}, Signature: []byte{9, 8, 7},
	}
	want := "09" + hex.EncodeToString([]byte("a.example")) + "0e" + hex.EncodeToString([]byte("192.0.2.1:4443")) +
		"0000000000000002" + "000000006553f100" + "03" + hex.EncodeToString([]byte("1.0")) + "05" + "020102" + "0103" + "03090807"
	if got := hex.EncodeToString(codec.Marshal(&r)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	b, _ := hex.DecodeString(want)
	back, err := ParseRecord(b)
	if err != nil || !bytes.Equal(codec.Marshal(&back), b) || back.Domain != r.Domain || !back.Issued.Equal(r.Issued) || len(back.Chain) != 2 {
		t.Errorf("decoded %+v, %v", back, err)
	}
	for name, b := range map[string][]byte{
		"trailing":       append(bytes.Clone(b), 0),
		"truncated":      b[:len(b)-1],
		"long domain":    append([]byte{0x40, 0xff}, make([]byte, 600)...),
		"long chain":     bytes.Replace(b, []byte{5, 2, 1, 2, 1, 3}, []byte{7, 0, 0, 0, 0, 0, 0, 0}, 1),
		"far in time":    bytes.Replace(b, []byte{0, 0, 0, 0, 0x65, 0x53}, []byte{0x80, 0, 0, 0, 0x65, 0x53}, 1),
		"larger than 16": make([]byte, maxRecord+1),
	} {
		if _, err := ParseRecord(b); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v, want ErrRecord", name, err)
		}
	}
}

func TestRecordVerification(t *testing.T) {
	n := newTestNode(t, "alpha.example")
	n.address = "192.0.2.1:4443"
	other := newTestNode(t, "beta.example")
	trust := func(domain string, err error) func([]*x509.Certificate) (string, error) {
		return func([]*x509.Certificate) (string, error) { return domain, err }
	}
	r := n.record(1)
	if err := r.Verify(trust("alpha.example", nil)); err != nil {
		t.Fatal(err)
	}
	refusal := errors.New("not approved")
	if err := r.Verify(trust("", refusal)); !errors.Is(err, refusal) || errors.Is(err, ErrRecord) {
		t.Errorf("unapproved: %v", err)
	}
	if err := r.Verify(trust("beta.example", nil)); !errors.Is(err, ErrRecord) {
		t.Errorf("another's chain: %v", err)
	}
	for name, change := range map[string]func(*Record){
		"address":          func(r *Record) { r.Address = "192.0.2.2:4443" },
		"domain":           func(r *Record) { r.Domain = "beta.example" },
		"incarnation":      func(r *Record) { r.Incarnation++ },
		"issued":           func(r *Record) { r.Issued = r.Issued.Add(time.Second) },
		"version":          func(r *Record) { r.Version = "other" },
		"signature":        func(r *Record) { r.Signature[len(r.Signature)-1] ^= 1 },
		"no signature":     func(r *Record) { r.Signature = nil },
		"root":             func(r *Record) { r.Chain[1] = other.ca.root.Raw },
		"no root":          func(r *Record) { r.Chain = nil },
		"another's leaf":   func(r *Record) { r.Chain[0] = other.cert.Certificate[0] },
		"not certificates": func(r *Record) { r.Chain[0] = []byte{1} },
	} {
		r := n.record(1)
		r.Chain = [][]byte{r.Chain[0], r.Chain[1]}
		change(&r)
		if err := r.CheckConsistent(); !errors.Is(err, ErrRecord) {
			t.Errorf("changed %s: %v, want ErrRecord", name, err)
		}
	}
	for name, change := range map[string]func(*Record){
		"another's domain":   func(r *Record) { r.Domain = "beta.example" },
		"subdomain":          func(r *Record) { r.Domain = "x.alpha.example" },
		"upper case":         func(r *Record) { r.Domain = "Alpha.example" },
		"incarnation 0":      func(r *Record) { r.Incarnation = 0 },
		"no port":            func(r *Record) { r.Address = "192.0.2.1" },
		"port 0":             func(r *Record) { r.Address = "192.0.2.1:0" },
		"every address":      func(r *Record) { r.Address = "[::]:4443" },
		"no host":            func(r *Record) { r.Address = ":4443" },
		"a line in the host": func(r *Record) { r.Address = "a\nb:4443" },
		"control character":  func(r *Record) { r.Version = "1\x1b[2J" },
	} {
		r := n.record(1)
		change(&r)
		signRecord(t, &r, n.cert)
		if err := r.CheckConsistent(); !errors.Is(err, ErrRecord) {
			t.Errorf("signed with %s: %v, want ErrRecord", name, err)
		}
	}
}

func TestRecordSignedByEachKindOfKey(t *testing.T) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	keys := []crypto.Signer{ed}
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	ca := newTestCA(t, "alpha.example")
	for _, k := range keys {
		leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{ca.domain}, NotBefore: ca.root.NotBefore, NotAfter: ca.root.NotAfter}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca.root, k.Public(), ca.key)
		if err != nil {
			t.Fatal(err)
		}
		r := Record{Domain: ca.domain, Address: "a.example:1", Incarnation: 1, Issued: time.Unix(1, 0), Chain: [][]byte{der, ca.root.Raw}}
		if err := r.Sign(k); err != nil {
			t.Errorf("%T: %v", k, err)
		}
		if err := r.CheckConsistent(); err != nil {
			t.Errorf("%T: %v", k, err)
		}
		r.Incarnation++
		if err := r.CheckConsistent(); !errors.Is(err, ErrRecord) {
			t.Errorf("%T, changed: %v", k, err)
		}
	}
}

func TestValidDomain(t *testing.T) {
	for s, ok := range map[string]bool{
		"alpha.example": true, "a": true, "xn--bcher-kva.example": true, "a-b.c3": true,
		"": false, ".": false, "a.": false, ".a": false, "a..b": false, "A.example": false, "-a.b": false, "a-.b": false, "a_b": false, "a/b": false, "a:1": false,
		strings.Repeat("a", 64): false, strings.Repeat("a.", 127): false,
	} {
		if validDomain(s) != ok {
			t.Errorf("validDomain(%q) = %t", s, !ok)
		}
	}
}

func FuzzRecord(f *testing.F) {
	n := newTestNode(f, "alpha.example")
	n.address = "192.0.2.1:4443"
	r := n.record(1)
	f.Add(codec.Marshal(&r))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRecord(b)
		if err != nil {
			return
		}
		if got := codec.Marshal(&r); !bytes.Equal(got, b) {
			t.Errorf("%x became %x", b, got)
		}
		_ = r.CheckConsistent()
	})
}

func FuzzSyncMessages(f *testing.F) {
	n := newTestNode(f, "alpha.example")
	n.address = "192.0.2.1:4443"
	r := n.record(1)
	f.Add(codec.Marshal(&syncRequest{have: map[recordID]uint64{{1}: 2, {2}: 1}, own: r}))
	f.Add(codec.Marshal(&syncAnswer{newer: []Record{r}, wanted: map[recordID]uint64{{1}: 2}}))
	f.Add(codec.Marshal(&news{records: []Record{r, r}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, m := range []interface {
			codec.Marshaler
			codec.Unmarshaler
		}{new(syncRequest), new(syncAnswer), new(news)} {
			if codec.Unmarshal(b, m) == nil && !bytes.Equal(codec.Marshal(m), b) {
				t.Errorf("%T: %x became %x", m, b, codec.Marshal(m))
			}
		}
	})
}
