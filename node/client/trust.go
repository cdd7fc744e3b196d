package client

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// trust is what the client believes about providers: the own one is anchored in the fingerprint of its root, which
// the invitation brought; that of a peer comes from the own node, which is to say that the own organisation approves it.
type trust struct {
	domain   string
	root     []byte // SHA-256 of the own provider's root
	now      func() time.Time
	verifier *authority.Verifier

	putting sync.Mutex // held while bundles are replaced, so that an older answer never comes after a newer one
	mu      sync.RWMutex
	bundles map[string]*authority.Bundle // guarded by mu, by domain
}

func newTrust(domain string, root []byte, now func() time.Time) *trust {
	t := &trust{domain: domain, root: root, now: now, bundles: make(map[string]*authority.Bundle)}
	t.verifier = &authority.Verifier{Bundles: t.bundle, Time: now}
	return t
}

func (t *trust) bundle(domain string) *authority.Bundle {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.bundles[domain]
}

// load restores the bundles from the store.
func (t *trust) load(db store.Store) error {
	var bad error
	err := store.ScanPrefix(db, []byte(prefixBundle), func(key, value []byte) bool {
		b, err := authority.ParseBundle(value)
		if err != nil {
			bad = fmt.Errorf("client: stored trust bundle of %s: %w", key, err)
			return false
		}
		t.bundles[string(key)] = b
		return true
	})
	return errors.Join(err, bad)
}

// anchored says whether a bundle of the own provider may be used: one of its roots is known from the invitation or
// from the bundle before, which announces successors, and its number doesn't shrink.
func (t *trust) anchored(b *authority.Bundle) error {
	if b.Domain() != t.domain {
		return fmt.Errorf("client: the node's trust bundle is for %s, not for %s", b.Domain(), t.domain)
	}
	known := [][]byte{t.root}
	if old := t.bundle(t.domain); old != nil {
		if b.Sequence() < old.Sequence() {
			return fmt.Errorf("client: the node's trust bundle has number %d, after %d", b.Sequence(), old.Sequence())
		}
		for _, f := range slices.Concat(old.Fingerprints(), old.Successors()) {
			known = append(known, f[:])
		}
	}
	for _, f := range b.Fingerprints() {
		if slices.ContainsFunc(known, func(k []byte) bool { return string(k) == string(f[:]) }) {
			return nil
		}
	}
	return errors.New("client: the node's trust bundle has none of the roots that are known of the provider")
}

// putOwn takes the first bundle of the own provider.
func (t *trust) putOwn(db store.Store, raw []byte) error {
	b, err := authority.ParseBundle(raw)
	if err != nil {
		return fmt.Errorf("client: trust bundle of the provider: %w", err)
	}
	return t.put(db, []*authority.Bundle{b}, [][]byte{raw})
}

// put replaces all bundles; the first error leaves them as they were. A bundle of a peer that isn't given any more is
// forgotten: the operator has withdrawn the approval.
func (t *trust) put(db store.Store, bundles []*authority.Bundle, raw [][]byte) error {
	t.putting.Lock()
	defer t.putting.Unlock()
	next := make(map[string]*authority.Bundle)
	changes := make(map[string][]byte)
	for i, b := range bundles {
		domain := b.Domain()
		if domain == t.domain {
			if err := t.anchored(b); err != nil {
				return err
			}
		} else if old := t.bundle(domain); old != nil && b.Sequence() < old.Sequence() && sharesRoot(b, old) {
			next[domain] = old // numbers begin anew only with another root, which the operator has approved instead
			continue
		}
		next[domain] = b
		changes[prefixBundle+domain] = raw[i]
	}
	if next[t.domain] == nil {
		return errors.New("client: the node gives no trust bundle of its own provider")
	}
	t.mu.RLock()
	for domain := range maps.Keys(t.bundles) {
		if next[domain] == nil {
			changes[prefixBundle+domain] = nil
		}
	}
	t.mu.RUnlock()
	if _, err := db.Commit(changes, nil); err != nil {
		return fmt.Errorf("client: write the trust bundles: %w", err)
	}
	t.mu.Lock()
	t.bundles = next
	t.mu.Unlock()
	return nil
}

func sharesRoot(a, b *authority.Bundle) bool {
	known := b.Fingerprints()
	return slices.ContainsFunc(a.Fingerprints(), func(f authority.Fingerprint) bool { return slices.Contains(known, f) })
}

// verifyNode is the check of the node's TLS certificate: its chain ends in a root of the own provider, and it is for
// the provider's domain.
func (t *trust) verifyNode(chain []*x509.Certificate) error {
	known := [][]byte{t.root}
	if b := t.bundle(t.domain); b != nil {
		for _, f := range b.Fingerprints() {
			known = append(known, f[:])
		}
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range chain[1:] {
		f := sha256.Sum256(c.Raw)
		if slices.ContainsFunc(known, func(k []byte) bool { return string(k) == string(f[:]) }) {
			roots.AddCert(c)
		} else {
			between.AddCert(c)
		}
	}
	if b := t.bundle(t.domain); b != nil {
		for _, c := range b.Roots() {
			roots.AddCert(c)
		}
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		DNSName: t.domain, Roots: roots, Intermediates: between, CurrentTime: t.now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("certificate of the node of %s: %w", t.domain, err)
	}
	if b := t.bundle(t.domain); b != nil {
		for _, c := range chain {
			if b.Revoked(fmt.Sprintf("%x", c.SerialNumber)) {
				return fmt.Errorf("certificate of the node of %s: %w", t.domain, authority.ErrRevoked)
			}
		}
	}
	return nil
}

// The flags of a member whose credential isn't good at present.
const (
	flagRevoked  = "revoked"
	flagExpired  = "expired"
	flagEarly    = "not yet valid"
	flagUnknown  = "unknown provider"
	flagDistrust = "untrusted"
)

// flag says what is wrong with a member's credential at present; "" if nothing is.
func (t *trust) flag(cred mls.Credential) string {
	_, err := t.verifier.Verify(cred.Certificates, authority.PurposeClient)
	return flagOf(err)
}

func flagOf(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, authority.ErrRevoked):
		return flagRevoked
	case errors.Is(err, authority.ErrExpired):
		return flagExpired
	case errors.Is(err, authority.ErrNotYetValid):
		return flagEarly
	case errors.Is(err, authority.ErrUnknownProvider):
		return flagUnknown
	}
	return flagDistrust
}

// judged runs a check of a certificate; if it fails by what the trust bundles say, it is run again with new ones: a
// provider may have been approved, or a root replaced, since they were fetched.
func (c *Client) judged(ctx context.Context, check func() error) error {
	err := check()
	if err == nil || !authority.TimeVariant(err) || errors.Is(err, authority.ErrRevoked) {
		return err
	}
	if e := c.refreshTrust(ctx); e != nil {
		return errors.Join(err, e)
	}
	return check()
}

// refreshTrust fetches the trust bundles and judges the members of all rooms anew.
func (c *Client) refreshTrust(ctx context.Context) error {
	res, err := call(ctx, c.session, c.session.service.Bundles, &api.BundlesRequest{})
	if err != nil {
		return fmt.Errorf("client: fetch trust bundles: %w", err)
	}
	var bundles []*authority.Bundle
	var raw [][]byte
	for _, b := range res.Bundles {
		parsed, err := authority.ParseBundle(b)
		if err != nil {
			c.log.Warn("trust bundle refused", "err", err)
			continue
		}
		bundles, raw = append(bundles, parsed), append(raw, b)
	}
	if err := c.trust.put(c.db, bundles, raw); err != nil {
		return err
	}
	for _, r := range c.Rooms() {
		r.judge()
	}
	return nil
}
