package authority

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// Peer is an approved provider.
type Peer struct {
	Domain      string      `json:"domain"`
	Fingerprint Fingerprint `json:"fingerprint"`       // of the root that the operator approved
	Address     string      `json:"address,omitempty"` // host:port, if the operator gave one
	Approved    time.Time   `json:"approved"`
	Sequence    uint64      `json:"sequence,omitempty"` // of its bundle; 0: none has arrived
	Updated     time.Time   `json:"updated,omitzero"`   // when that bundle arrived
}

// TrustStore holds the approved peers and their bundles, under TrustPrefix of a store. Approval is the operator's:
// nothing that arrives from the network adds a peer. Its methods may be called by several goroutines at once; what
// they return as done is durable.
type TrustStore struct {
	// Time is the clock; nil means time.Now. Set it before use.
	Time func() time.Time

	store    Store
	own      string
	verifier Verifier

	mu        sync.Mutex // for changing peers, never held over a commit
	peers     atomic.Pointer[map[string]*peerState]
	ownBundle atomic.Pointer[Bundle]
}

// peerState is immutable.
type peerState struct {
	Peer
	trusted []Fingerprint // the approved root, and successors that bundles announced and then held
	bundle  *Bundle       // nil until one has arrived
}

// peerRow is the stored form.
type peerRow struct {
	Peer
	Trusted []Fingerprint   `json:"trusted"`
	Bundle  json.RawMessage `json:"bundle,omitempty"`
}

// OpenTrust loads the approved peers. own is the provider whose store this is, "" if it is nobody's: a client's.
func OpenTrust(store Store, own string) (*TrustStore, error) {
	t := &TrustStore{store: store, own: own}
	t.verifier.Bundles, t.verifier.Time = t.Bundle, t.now
	peers := make(map[string]*peerState)
	var bad error
	err := store.Scan([]byte(TrustPrefix), prefixEnd(TrustPrefix), func(key, value []byte) bool {
		p, err := parsePeer(bytes.Clone(value))
		if err != nil {
			bad = fmt.Errorf("stored peer %s: %w", key[len(TrustPrefix):], err)
			return false
		}
		peers[p.Domain] = p
		return true
	})
	if err := errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("authority: open the trust store: %w", err)
	}
	t.peers.Store(&peers)
	return t, nil
}

func (t *TrustStore) now() time.Time {
	if t.Time != nil {
		return t.Time()
	}
	return time.Now()
}

func parsePeer(value []byte) (*peerState, error) {
	var row peerRow
	if err := json.Unmarshal(value, &row); err != nil {
		return nil, err
	}
	p := &peerState{Peer: row.Peer, trusted: row.Trusted}
	if len(row.Bundle) == 0 {
		return p, nil
	}
	var err error
	p.bundle, err = ParseBundle(row.Bundle)
	return p, err
}

func (p *peerState) encode() ([]byte, error) {
	row := peerRow{Peer: p.Peer, Trusted: p.trusted}
	if p.bundle != nil {
		row.Bundle = p.bundle.JSON()
	}
	return json.Marshal(row)
}

// change replaces a peer's row by what edit makes of it: nil for no peer. Several may try at once; edit is called again
// then. What is in memory afterwards is read back from the store, so that no later change is lost.
func (t *TrustStore) change(domain string, edit func(*peerState) (*peerState, error)) error {
	key := TrustPrefix + domain
	for range maxAttempts {
		row, err := t.store.Get([]byte(key))
		if err != nil {
			return err
		}
		var old *peerState
		if row != nil {
			if old, err = parsePeer(row); err != nil {
				return fmt.Errorf("stored peer: %w", err)
			}
		}
		next, err := edit(old)
		if err != nil {
			return err
		}
		var value []byte
		if next != nil {
			if value, err = next.encode(); err != nil {
				return err
			}
		}
		ok, err := t.store.Commit(map[string][]byte{key: value}, map[string][]byte{key: row})
		if err != nil {
			return err
		}
		if ok {
			return t.load(domain)
		}
	}
	return errConflict
}

func (t *TrustStore) load(domain string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	row, err := t.store.Get([]byte(TrustPrefix + domain))
	if err != nil {
		return err
	}
	peers := maps.Clone(*t.peers.Load())
	if row == nil {
		delete(peers, domain)
	} else {
		p, err := parsePeer(row)
		if err != nil {
			return fmt.Errorf("stored peer: %w", err)
		}
		// The same bundle stays the same object, by which the verifier remembers what it has anchored.
		if old := peers[domain]; old != nil && old.bundle != nil && p.bundle != nil && bytes.Equal(old.bundle.JSON(), p.bundle.JSON()) {
			p.bundle = old.bundle
		}
		peers[domain] = p
	}
	t.peers.Store(&peers)
	return nil
}

// Approve approves a provider by its root's fingerprint. The address is where its node is reached; without one, the
// known one stays, else gossip will find it. Another fingerprint than before replaces the approval and drops the bundle.
func (t *TrustStore) Approve(_ context.Context, domain string, f Fingerprint, address string) error {
	if err := t.approve(domain, f, address); err != nil {
		return fmt.Errorf("authority: approve %.300s: %w", domain, err)
	}
	return nil
}

func (t *TrustStore) approve(domain string, f Fingerprint, address string) error {
	if err := mimi.ValidDomain(domain); err != nil {
		return fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if domain == t.own {
		return fmt.Errorf("%w: it is this provider itself", ErrRequest)
	}
	if f.IsZero() {
		return fmt.Errorf("%w: no fingerprint", ErrRequest)
	}
	if err := checkAddress(address); err != nil {
		return err
	}
	return t.change(domain, func(old *peerState) (*peerState, error) {
		if old == nil || !slices.ContainsFunc(old.trusted, f.Equal) {
			p := &peerState{Peer: Peer{Domain: domain, Fingerprint: f, Address: address, Approved: t.now().UTC().Truncate(time.Second)}, trusted: []Fingerprint{f}}
			if old != nil && address == "" {
				p.Address = old.Address
			}
			return p, nil
		}
		p := *old
		p.Fingerprint = f
		if address != "" {
			p.Address = address
		}
		return &p, nil
	})
}

func checkAddress(address string) error {
	if address == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if n, e := strconv.ParseUint(port, 10, 16); err != nil || e != nil || n == 0 || host == "" || len(address) > maxAddress || strings.ContainsAny(host, " /") {
		return fmt.Errorf("%w: address %.300q is not host:port", ErrRequest, address)
	}
	return nil
}

// Remove withdraws an approval, and forgets the bundle. It fails with ErrUnapproved if there is none.
func (t *TrustStore) Remove(domain string) error {
	err := t.change(domain, func(old *peerState) (*peerState, error) {
		if old == nil {
			return nil, ErrUnapproved
		}
		return nil, nil
	})
	if err != nil {
		return fmt.Errorf("authority: remove %.300s: %w", domain, err)
	}
	return nil
}

// Peers returns the approved peers by domain.
func (t *TrustStore) Peers() []Peer {
	peers := *t.peers.Load()
	out := make([]Peer, 0, len(peers))
	for _, p := range peers {
		out = append(out, p.Peer)
	}
	slices.SortFunc(out, func(a, b Peer) int { return strings.Compare(a.Domain, b.Domain) })
	return out
}

// Peer returns an approved peer.
func (t *TrustStore) Peer(domain string) (Peer, bool) {
	p := (*t.peers.Load())[domain]
	if p == nil {
		return Peer{}, false
	}
	return p.Peer, true
}

// SetOwn sets the own provider's bundle, which is not stored here.
func (t *TrustStore) SetOwn(b *Bundle) { t.ownBundle.Store(b) }

// Bundle returns the current bundle of an approved peer, or the own one; nil if there is none.
func (t *TrustStore) Bundle(domain string) *Bundle {
	if b := t.ownBundle.Load(); b != nil && b.domain == domain {
		return b
	}
	if p := (*t.peers.Load())[domain]; p != nil {
		return p.bundle
	}
	return nil
}

// Bundles returns all bundles, the own one first, the others by domain.
func (t *TrustStore) Bundles() []*Bundle {
	var out []*Bundle
	if b := t.ownBundle.Load(); b != nil {
		out = append(out, b)
	}
	for _, p := range t.Peers() {
		if b := t.Bundle(p.Domain); b != nil && b != t.ownBundle.Load() {
			out = append(out, b)
		}
	}
	return out
}

// PutBundle takes a bundle that came from the provider itself. One of its roots must be approved, or have been announced
// as a successor by the bundle before. It returns whether the bundle is another than the one known. It fails with
// ErrUnapproved, ErrUntrusted, ErrStale or ErrBundle.
func (t *TrustStore) PutBundle(domain string, b *Bundle) (changed bool, err error) {
	if b == nil || b.domain != domain {
		return false, fmt.Errorf("authority: bundle of %.300s: %w: it is another provider's", domain, ErrBundle)
	}
	// What is known already needs no commit.
	if p := (*t.peers.Load())[domain]; p != nil && p.bundle != nil && bytes.Equal(p.bundle.JSON(), b.JSON()) {
		return false, nil
	}
	err = t.change(domain, func(old *peerState) (*peerState, error) {
		next, err := old.accept(b)
		if err != nil {
			return nil, err
		}
		changed = old.bundle == nil || !bytes.Equal(old.bundle.JSON(), b.JSON())
		next.Updated = t.now().UTC().Truncate(time.Second)
		return next, nil
	})
	if err != nil {
		return false, fmt.Errorf("authority: bundle of %s: %w", domain, err)
	}
	return changed, nil
}

// accept returns the peer with bundle b, if it may have it.
func (p *peerState) accept(b *Bundle) (*peerState, error) {
	if p == nil {
		return nil, ErrUnapproved
	}
	var announced []Fingerprint
	if p.bundle != nil {
		if err := b.supersedes(p.bundle); err != nil {
			return nil, err
		}
		announced = p.bundle.successors
	}
	next := *p
	next.trusted = slices.Clone(p.trusted)
	for _, f := range b.Fingerprints() {
		if slices.ContainsFunc(announced, f.Equal) && !slices.ContainsFunc(next.trusted, f.Equal) {
			next.trusted = append(next.trusted, f)
		}
	}
	if !slices.ContainsFunc(b.Fingerprints(), func(f Fingerprint) bool { return slices.ContainsFunc(next.trusted, f.Equal) }) {
		return nil, fmt.Errorf("%w: no root of the bundle is approved or was announced", ErrUntrusted)
	}
	next.bundle, next.Sequence = b, b.sequence
	return &next, nil
}

// VerifyNode judges the chain that a node showed in a TLS handshake, root included: it is a node's, ends in an approved
// root of the provider that it names, is valid now and not revoked. It needs no bundle yet. It returns the provider's
// domain. An *UnapprovedError says whom to approve; other errors are this package's.
func (t *TrustStore) VerifyNode(certs []*x509.Certificate) (domain string, err error) {
	if len(certs) == 0 || len(certs) > maxChain {
		return "", fmt.Errorf("authority: verify node: %w: %d certificates", ErrMalformed, len(certs))
	}
	raw := make([][]byte, len(certs))
	for i, c := range certs {
		raw[i] = c.Raw
	}
	ch, err := t.verifier.sound(raw)
	if err != nil {
		return "", fmt.Errorf("authority: verify node: %w", err)
	}
	if err := t.verifyNode(ch); err != nil {
		return "", fmt.Errorf("authority: verify node of %s: %w", ch.id.Domain, err)
	}
	return ch.id.Domain, nil
}

func (t *TrustStore) verifyNode(ch *cachedChain) error {
	if err := ch.fits(PurposeNode); err != nil {
		return err
	}
	root := ch.certs[len(ch.certs)-1]
	if len(ch.certs) < 2 || !bytes.Equal(root.RawSubject, root.RawIssuer) {
		return fmt.Errorf("%w: the chain doesn't end in a root", ErrBroken)
	}
	f, b := FingerprintOf(root), t.Bundle(ch.id.Domain)
	// An announced root may show here first: the bundle that holds it comes over this very connection.
	approved := b != nil && (slices.ContainsFunc(b.Fingerprints(), f.Equal) || slices.ContainsFunc(b.successors, f.Equal))
	if p := (*t.peers.Load())[ch.id.Domain]; p != nil {
		approved = approved || slices.ContainsFunc(p.trusted, f.Equal)
	}
	if !approved {
		return &UnapprovedError{Domain: ch.id.Domain, Fingerprint: f}
	}
	if err := ch.covers(t.now()); err != nil {
		return err
	}
	if b != nil {
		return b.revokes(ch.chain)
	}
	return nil
}

// Verifier returns the verifier over these bundles. It is the same one each time.
func (t *TrustStore) Verifier() *Verifier { return &t.verifier }

// LogValue implements slog.LogValuer.
func (p Peer) LogValue() slog.Value {
	return slog.GroupValue(slog.String("domain", p.Domain), slog.Any("fingerprint", p.Fingerprint), slog.String("address", p.Address), slog.Uint64("sequence", p.Sequence))
}
