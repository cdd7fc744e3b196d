package authority

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"
)

func listOf(tb testing.TB, h *hierarchy, number int64, revoked ...*x509.Certificate) *x509.RevocationList {
	tb.Helper()
	t := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range revoked {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, h.intermediate, h.key)
	ok(tb, err)
	l, err := x509.ParseRevocationList(der)
	ok(tb, err)
	return l
}

func TestBundleRoundTrip(t *testing.T) {
	for _, kind := range []KeyType{KeyP256, KeyEd25519, KeyP384, KeyP521} {
		h, err := newHierarchy(InitOptions{Domain: "alpha.example", KeyType: kind, Rand: rand.Reader, Time: time.Now})
		ok(t, err)
		other := hierarchyOf(t, "alpha.example")
		b, err := newBundle(bundleParts{domain: "alpha.example", sequence: 7, refresh: time.Hour,
			roots: []*x509.Certificate{h.root, other.root}, intermediates: []*x509.Certificate{h.intermediate},
			successors: []Fingerprint{{1}, {2}}, lists: []*x509.RevocationList{listOf(t, h, 3, h.intermediate)}})
		ok(t, err)
		again, err := ParseBundle(b.JSON())
		ok(t, err)
		if !bytes.Equal(again.JSON(), b.JSON()) || again.Sequence() != 7 || again.Refresh() != time.Hour || again.Domain() != "alpha.example" ||
			!slices.Equal(again.Fingerprints(), b.Fingerprints()) || !slices.Equal(again.Successors(), b.Successors()) ||
			!again.Revoked(serialString(h.intermediate.SerialNumber)) || again.Revoked(serialString(h.root.SerialNumber)) {
			t.Errorf("%s: came back as %s", kind, again.JSON())
		}
	}
}

func TestParseBundleRefuses(t *testing.T) {
	alpha, beta := hierarchyOf(t, "alpha.example"), hierarchyOf(t, "beta.example")
	good := bundleOf2(t, alpha, 1, alpha.intermediate).JSON()
	edit := func(fn func(*bundleJSON)) []byte {
		var j bundleJSON
		ok(t, json.Unmarshal(good, &j))
		fn(&j)
		out, err := json.Marshal(j)
		ok(t, err)
		return out
	}
	betaKey, err := newJWK(beta.root)
	ok(t, err)
	for name, doc := range map[string][]byte{
		"empty":                        nil,
		"no object":                    []byte("[]"),
		"trailing bytes":               append(bytes.Clone(good), '{'),
		"too long":                     make([]byte, MaxBundle+1),
		"no domain":                    edit(func(j *bundleJSON) { j.Domain = "" }),
		"domain in upper case":         edit(func(j *bundleJSON) { j.Domain = "Alpha.example" }),
		"sequence 0":                   edit(func(j *bundleJSON) { j.Sequence = 0 }),
		"negative refresh hint":        edit(func(j *bundleJSON) { j.RefreshHint = -1 }),
		"endless refresh hint":         edit(func(j *bundleJSON) { j.RefreshHint = 1 << 62 }),
		"no roots":                     edit(func(j *bundleJSON) { j.Keys = nil }),
		"the same root twice":          edit(func(j *bundleJSON) { j.Keys = append(j.Keys, j.Keys[0]) }),
		"a key without certificate":    edit(func(j *bundleJSON) { j.Keys[0].X5C = nil }),
		"a key of another certificate": edit(func(j *bundleJSON) { j.Keys[0].X = betaKey.X }),
		"an intermediate as root":      edit(func(j *bundleJSON) { j.Keys[0].X5C[0] = alpha.intermediate.Raw }),
		"a foreign intermediate":       edit(func(j *bundleJSON) { j.Intermediates = append(j.Intermediates, beta.intermediate.Raw) }),
		"a list of another issuer":     edit(func(j *bundleJSON) { j.Lists[0] = listOf(t, beta, 1).Raw }),
		"a list that was changed":      edit(func(j *bundleJSON) { j.Lists[0][len(j.Lists[0])-1] ^= 1 }),
		"a list without its issuer":    edit(func(j *bundleJSON) { j.Intermediates = nil }),
		"nine roots": edit(func(j *bundleJSON) {
			for range 8 {
				j.Keys = append(j.Keys, betaKey)
			}
		}),
	} {
		if _, err := ParseBundle(doc); !errors.Is(err, ErrBundle) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFingerprintForms(t *testing.T) {
	f := Fingerprint{0xab, 0xcd, 31: 0xef}
	colons := strings.ToUpper(f.String()[:2])
	for i := 2; i < 64; i += 2 {
		colons += ":" + f.String()[i:i+2]
	}
	for _, s := range []string{f.String(), strings.ToUpper(f.String()), colons} {
		got, err := ParseFingerprint(s)
		ok(t, err)
		if got != f {
			t.Errorf("%s became %s", s, got)
		}
	}
	for _, s := range []string{"", "ab", f.String() + "00", f.String()[:63] + "g", strings.Replace(colons, ":", "", 1), f.String()[:62] + ":0"} {
		_, err := ParseFingerprint(s)
		wantErr(t, err, ErrRequest)
	}
}

func FuzzParseBundle(f *testing.F) {
	alpha := hierarchyOf(f, "alpha.example")
	f.Add(bundleOf(f, "alpha.example", 1, alpha).JSON())
	f.Add(bundleOf2(f, alpha, 2, alpha.intermediate).JSON())
	f.Add([]byte(`{"keys":[],"spiffe_sequence":1,"parley_domain":"alpha.example"}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		b, err := ParseBundle(doc)
		if err != nil {
			return
		}
		again, err := ParseBundle(b.JSON())
		if err != nil || !bytes.Equal(again.JSON(), b.JSON()) {
			t.Errorf("%q came back as %v", b.JSON(), err)
		}
	})
}
