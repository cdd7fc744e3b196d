package authority

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// Fingerprint is the SHA-256 of a root certificate's DER: what operators tell each other to approve a peer.
type Fingerprint [sha256.Size]byte

// FingerprintOf returns the fingerprint of a certificate.
func FingerprintOf(c *x509.Certificate) Fingerprint { return sha256.Sum256(c.Raw) }

// String returns 64 hexadecimal digits in lower case.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// IsZero says whether the fingerprint was never set.
func (f Fingerprint) IsZero() bool { return f == Fingerprint{} }

// Equal compares in constant time.
func (f Fingerprint) Equal(o Fingerprint) bool { return subtle.ConstantTimeCompare(f[:], o[:]) == 1 }

// MarshalText implements encoding.TextMarshaler.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *Fingerprint) UnmarshalText(b []byte) (err error) {
	*f, err = ParseFingerprint(string(b))
	return err
}

// LogValue implements slog.LogValuer.
func (f Fingerprint) LogValue() slog.Value { return slog.StringValue(f.String()) }

// ParseFingerprint reads 64 hexadecimal digits of either case, with colons between the bytes or without. It fails with
// ErrRequest.
func ParseFingerprint(s string) (f Fingerprint, err error) {
	plain := s
	if strings.Contains(s, ":") {
		parts := strings.Split(s, ":")
		for _, p := range parts {
			if len(p) != 2 {
				return f, fmt.Errorf("%w: fingerprint %q: colons stand between bytes", ErrRequest, s)
			}
		}
		plain = strings.Join(parts, "")
	}
	if len(plain) != hex.EncodedLen(len(f)) {
		return f, fmt.Errorf("%w: fingerprint of %d hexadecimal digits, not %d", ErrRequest, len(plain), hex.EncodedLen(len(f)))
	}
	if _, err := hex.Decode(f[:], []byte(plain)); err != nil {
		return Fingerprint{}, fmt.Errorf("%w: fingerprint %q: %w", ErrRequest, s, err)
	}
	return f, nil
}

// Bundle is what a provider publishes of its authority: the roots that speak for its domain, the intermediates, the
// revocation lists that these signed, a sequence number that grows with every change, and the fingerprints of roots that
// it will use in future. A Bundle is sound in itself: intermediates are issued by its roots, lists signed by its
// issuers. It is immutable.
type Bundle struct {
	domain        string
	sequence      uint64
	refresh       time.Duration
	roots         []*x509.Certificate
	intermediates []*x509.Certificate
	successors    []Fingerprint
	lists         []*x509.RevocationList
	listIssuers   []int // of lists: indexes in intermediates, roots behind them

	// revoked has the entries of all lists, by serial number: an issuer's last list covers what its predecessors
	// issued, for serial numbers are random and never the same.
	revoked map[string]time.Time
	encode  func() []byte
}

// The bounds of a Bundle.
const (
	MaxBundle     = 4 << 20 // bytes of the JSON document: room for about 60,000 revocations
	maxRoots      = 8
	maxIssuers    = 16
	maxLists      = 16
	maxSuccessors = 8
	maxRefresh    = 30 * 24 * time.Hour
	// DefaultRefresh is how often a peer should ask for the bundle, though changes are pushed to it.
	DefaultRefresh = time.Hour
)

// bundleJSON is the wire form: a JWK set (RFC 7517) with the parameters of SPIFFE's federation bundles and our own.
type bundleJSON struct {
	Keys          []jwk         `json:"keys"`
	Sequence      uint64        `json:"spiffe_sequence"`
	RefreshHint   int64         `json:"spiffe_refresh_hint"` // seconds
	Domain        string        `json:"parley_domain"`
	Intermediates [][]byte      `json:"parley_intermediates,omitempty"` // DER in base64
	Successors    []Fingerprint `json:"parley_successors,omitempty"`
	Lists         [][]byte      `json:"parley_crl,omitempty"` // DER in base64
}

// jwk is a root as a JSON Web Key (RFC 7517, RFC 7518, RFC 8037).
type jwk struct {
	Use   string   `json:"use"`
	Type  string   `json:"kty"`
	Curve string   `json:"crv,omitempty"`
	X     string   `json:"x,omitempty"`
	Y     string   `json:"y,omitempty"`
	N     string   `json:"n,omitempty"`
	E     string   `json:"e,omitempty"`
	X5C   [][]byte `json:"x5c"` // one root, DER in base64
}

const jwkUse = "x509-svid" // SPIFFE's name for a root of X.509 identities

// newJWK describes a root's key.
func newJWK(root *x509.Certificate) (jwk, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	k := jwk{Use: jwkUse, X5C: [][]byte{root.Raw}}
	switch pub := root.PublicKey.(type) {
	case ed25519.PublicKey:
		k.Type, k.Curve, k.X = "OKP", "Ed25519", b64(pub)
	case *ecdsa.PublicKey:
		point, err := pub.Bytes()
		if err != nil {
			return k, fmt.Errorf("%w: key of root %q: %w", ErrBundle, root.Subject, err)
		}
		size := (len(point) - 1) / 2
		k.Type, k.Curve, k.X, k.Y = "EC", pub.Curve.Params().Name, b64(point[1:1+size]), b64(point[1+size:])
	case *rsa.PublicKey:
		k.Type, k.N, k.E = "RSA", b64(pub.N.Bytes()), b64(big.NewInt(int64(pub.E)).Bytes())
	default:
		return k, fmt.Errorf("%w: key of root %q is of type %T", ErrBundle, root.Subject, pub)
	}
	return k, nil
}

func (k jwk) equal(o jwk) bool {
	return k.Use == o.Use && k.Type == o.Type && k.Curve == o.Curve && k.X == o.X && k.Y == o.Y && k.N == o.N && k.E == o.E
}

// bundleParts are the parts from which newBundle makes a Bundle.
type bundleParts struct {
	domain        string
	sequence      uint64
	refresh       time.Duration
	roots         []*x509.Certificate
	intermediates []*x509.Certificate
	successors    []Fingerprint
	lists         []*x509.RevocationList
}

// newBundle checks that the parts are sound together. It fails with ErrBundle.
func newBundle(p bundleParts) (*Bundle, error) {
	if err := mimi.ValidDomain(p.domain); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	switch {
	case p.sequence == 0:
		return nil, fmt.Errorf("%w: sequence 0", ErrBundle)
	case p.refresh < 0 || p.refresh > maxRefresh:
		return nil, fmt.Errorf("%w: refresh hint of %v", ErrBundle, p.refresh)
	case len(p.roots) == 0 || len(p.roots) > maxRoots:
		return nil, fmt.Errorf("%w: %d roots", ErrBundle, len(p.roots))
	case len(p.intermediates) > maxIssuers || len(p.lists) > maxLists || len(p.successors) > maxSuccessors:
		return nil, fmt.Errorf("%w: too many intermediates, lists or successors", ErrBundle)
	}
	b := &Bundle{domain: p.domain, sequence: p.sequence, refresh: p.refresh, roots: p.roots, intermediates: p.intermediates,
		successors: p.successors, lists: p.lists, revoked: make(map[string]time.Time)}
	for i, r := range p.roots {
		if !issuerKey(r.PublicKey) || !r.IsCA || !r.BasicConstraintsValid || r.KeyUsage&x509.KeyUsageCertSign == 0 ||
			!bytes.Equal(r.RawSubject, r.RawIssuer) || r.CheckSignatureFrom(r) != nil {
			return nil, fmt.Errorf("%w: %q is not a self-signed root", ErrBundle, r.Subject)
		}
		for _, o := range p.roots[:i] {
			if bytes.Equal(o.Raw, r.Raw) {
				return nil, fmt.Errorf("%w: root %q twice", ErrBundle, r.Subject)
			}
		}
	}
	for _, c := range p.intermediates {
		if !issuerKey(c.PublicKey) || !issuedBy(c, p.roots) || !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("%w: intermediate %q is not issued by a root of it", ErrBundle, c.Subject)
		}
	}
	for _, l := range p.lists {
		issuer, err := listIssuer(l, slices.Concat(p.intermediates, p.roots))
		if err != nil {
			return nil, err
		}
		b.listIssuers = append(b.listIssuers, issuer)
		for _, e := range l.RevokedCertificateEntries {
			b.revoked[string(e.SerialNumber.Bytes())] = e.RevocationTime
		}
	}
	doc := bundleJSON{Sequence: b.sequence, RefreshHint: int64(b.refresh / time.Second), Domain: b.domain, Successors: b.successors}
	for _, r := range b.roots {
		k, err := newJWK(r)
		if err != nil {
			return nil, err
		}
		doc.Keys = append(doc.Keys, k)
	}
	for _, c := range b.intermediates {
		doc.Intermediates = append(doc.Intermediates, c.Raw)
	}
	for _, l := range b.lists {
		doc.Lists = append(doc.Lists, l.Raw)
	}
	b.encode = sync.OnceValue(func() []byte {
		out, err := json.Marshal(doc)
		if err != nil {
			panic(err) // strings, numbers and bytes only
		}
		return out
	})
	return b, nil
}

func issuedBy(c *x509.Certificate, issuers []*x509.Certificate) bool {
	for _, i := range issuers {
		if bytes.Equal(c.RawIssuer, i.RawSubject) && c.CheckSignatureFrom(i) == nil {
			return true
		}
	}
	return false
}

func listIssuer(l *x509.RevocationList, issuers []*x509.Certificate) (int, error) {
	for i, c := range issuers {
		if bytes.Equal(l.RawIssuer, c.RawSubject) && l.CheckSignatureFrom(c) == nil {
			return i, nil
		}
	}
	return 0, fmt.Errorf("%w: a revocation list is not signed by an issuer of it", ErrBundle)
}

// ParseBundle reads a bundle of at most MaxBundle bytes and checks that it is sound in itself; whether its roots are
// to be trusted is not decided here. It fails with ErrBundle.
func ParseBundle(doc []byte) (*Bundle, error) {
	if len(doc) > MaxBundle {
		return nil, fmt.Errorf("%w: %d bytes", ErrBundle, len(doc))
	}
	var j bundleJSON
	d := json.NewDecoder(bytes.NewReader(doc))
	if err := d.Decode(&j); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: trailing bytes", ErrBundle)
	}
	if len(j.Keys) > maxRoots || len(j.Intermediates) > maxIssuers || len(j.Lists) > maxLists {
		return nil, fmt.Errorf("%w: too many roots, intermediates or lists", ErrBundle)
	}
	if j.RefreshHint < 0 || j.RefreshHint > int64(maxRefresh/time.Second) {
		return nil, fmt.Errorf("%w: refresh hint of %d seconds", ErrBundle, j.RefreshHint)
	}
	p := bundleParts{domain: j.Domain, sequence: j.Sequence, refresh: time.Duration(j.RefreshHint) * time.Second, successors: j.Successors}
	for i, k := range j.Keys {
		if len(k.X5C) != 1 {
			return nil, fmt.Errorf("%w: key %d has %d certificates", ErrBundle, i, len(k.X5C))
		}
		root, err := parseOne(k.X5C[0])
		if err != nil {
			return nil, err
		}
		want, err := newJWK(root)
		if err != nil {
			return nil, err
		}
		if !k.equal(want) {
			return nil, fmt.Errorf("%w: key %d isn't its certificate's", ErrBundle, i)
		}
		p.roots = append(p.roots, root)
	}
	for _, der := range j.Intermediates {
		c, err := parseOne(der)
		if err != nil {
			return nil, err
		}
		p.intermediates = append(p.intermediates, c)
	}
	for _, der := range j.Lists {
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("%w: revocation list: %w", ErrBundle, err)
		}
		p.lists = append(p.lists, l)
	}
	return newBundle(p)
}

func parseOne(der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("%w: certificate of %d bytes", ErrBundle, len(der))
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	return c, nil
}

// JSON returns the bundle's document; equal bundles give equal bytes. The caller must not change it.
func (b *Bundle) JSON() []byte { return b.encode() }

// Domain returns the provider that the bundle is of.
func (b *Bundle) Domain() string { return b.domain }

// Sequence returns the number that grows with every change of the bundle. It begins with 1.
func (b *Bundle) Sequence() uint64 { return b.sequence }

// Refresh returns how long the provider suggests to wait before asking for the bundle again; 0 if it doesn't.
func (b *Bundle) Refresh() time.Duration { return b.refresh }

// Roots returns the roots' certificates.
func (b *Bundle) Roots() []*x509.Certificate { return slices.Clone(b.roots) }

// Fingerprints returns those of the roots.
func (b *Bundle) Fingerprints() []Fingerprint {
	out := make([]Fingerprint, len(b.roots))
	for i, r := range b.roots {
		out[i] = FingerprintOf(r)
	}
	return out
}

// Successors returns the fingerprints of roots that the provider announces for the future.
func (b *Bundle) Successors() []Fingerprint { return slices.Clone(b.successors) }

// Revocations returns how many certificates the bundle's lists revoke.
func (b *Bundle) Revocations() int { return len(b.revoked) }

// Revoked says whether the bundle revokes a serial number (hexadecimal, as in Identity and Certificate).
func (b *Bundle) Revoked(serial string) bool {
	n, ok := parseSerial(serial)
	if !ok {
		return false
	}
	_, ok = b.revoked[string(n.Bytes())]
	return ok
}

// LogValue implements slog.LogValuer.
func (b *Bundle) LogValue() slog.Value {
	return slog.GroupValue(slog.String("domain", b.domain), slog.Uint64("sequence", b.sequence), slog.Int("revocations", b.Revocations()))
}

// revokes fails with ErrRevoked if a certificate of the chain is revoked.
func (b *Bundle) revokes(ch *chain) error {
	for _, c := range ch.certs {
		if at, ok := b.revoked[string(c.SerialNumber.Bytes())]; ok {
			return fmt.Errorf("%w at %s", ErrRevoked, at.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// supersedes fails with ErrStale if b may not replace old: its sequence is lower, or the same with another content, or
// a revocation list is older than the one that the same issuer had.
func (b *Bundle) supersedes(old *Bundle) error {
	switch {
	case b.sequence < old.sequence:
		return fmt.Errorf("%w: sequence %d after %d", ErrStale, b.sequence, old.sequence)
	case b.sequence == old.sequence && !bytes.Equal(b.JSON(), old.JSON()):
		return fmt.Errorf("%w: sequence %d again, with another content", ErrStale, b.sequence)
	}
	for i, l := range old.lists {
		for k, n := range b.lists {
			if bytes.Equal(b.issuer(k).RawSubjectPublicKeyInfo, old.issuer(i).RawSubjectPublicKeyInfo) && l.Number != nil && (n.Number == nil || n.Number.Cmp(l.Number) < 0) {
				return fmt.Errorf("%w: revocation list %v after %v", ErrStale, n.Number, l.Number)
			}
		}
	}
	return nil
}

// issuer returns the certificate that signed list i.
func (b *Bundle) issuer(i int) *x509.Certificate {
	n := b.listIssuers[i]
	if n < len(b.intermediates) {
		return b.intermediates[n]
	}
	return b.roots[n-len(b.intermediates)]
}
