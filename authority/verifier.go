package authority

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/parley-mls/parley/mls"
)

// Verifier judges certificates by the trust bundles that Bundles knows. It remembers the chains that were sound, so
// that a known one costs a hash; names, times, trust and revocation are judged anew each time. A Verifier may be used
// by several goroutines at once and must not be copied.
type Verifier struct {
	// Bundles returns the current bundle of a domain, nil if there is none.
	Bundles func(domain string) *Bundle
	// Time is the clock; nil means time.Now.
	Time func() time.Time

	links  linkCache
	chains chainCache
}

// Verify says whether a chain, leaf first, with the root or without, is good for a purpose now: it is sound in itself,
// ends in a root of the provider that it names, nothing of it has expired or was revoked. A revocation list beyond its
// nextUpdate still counts, for a provider out of reach must not lock its people out. It fails with one of the errors of
// this package.
func (v *Verifier) Verify(certs [][]byte, p Purpose) (*Identity, error) {
	ch, err := v.verify(certs, p)
	if err != nil {
		return nil, err
	}
	return ch.identity(), nil
}

// VerifyKey is Verify and says too whether the certificate is for that public key, in the encoding of the suite. It
// fails with ErrSuite or ErrKeyMismatch if it isn't.
func (v *Verifier) VerifyKey(certs [][]byte, suite mls.CipherSuite, key []byte, p Purpose) (*Identity, error) {
	ch, err := v.sound(certs)
	if err != nil {
		return nil, err
	}
	if err := checkKey(ch.id.PublicKey, suite, key); err != nil {
		return nil, err
	}
	if err := v.judge(ch, p); err != nil {
		return nil, err
	}
	return ch.identity(), nil
}

// identity returns a copy that the caller may keep.
func (ch *cachedChain) identity() *Identity {
	id := *ch.id
	return &id
}

func (v *Verifier) verify(certs [][]byte, p Purpose) (*cachedChain, error) {
	ch, err := v.sound(certs)
	if err != nil {
		return nil, err
	}
	if err := v.judge(ch, p); err != nil {
		return nil, err
	}
	return ch, nil
}

// sound says whether the chain is sound in itself.
func (v *Verifier) sound(certs [][]byte) (*cachedChain, error) {
	if len(certs) == 0 || len(certs) > maxChain {
		return nil, fmt.Errorf("%w: %d certificates", ErrMalformed, len(certs))
	}
	key := chainKey(certs)
	if ch := v.chains.get(key); ch != nil {
		return ch, nil
	}
	parsed, err := parseChain(certs)
	if err != nil {
		return nil, err
	}
	ch, err := checkChain(parsed, &v.links)
	if err != nil {
		return nil, err
	}
	cached := &cachedChain{chain: ch}
	v.chains.put(key, cached)
	return cached, nil
}

// judge decides what depends on trust and time.
func (v *Verifier) judge(ch *cachedChain, p Purpose) error {
	if err := ch.fits(p); err != nil {
		return err
	}
	var b *Bundle
	if v.Bundles != nil {
		b = v.Bundles(ch.id.Domain)
	}
	if b == nil || b.domain != ch.id.Domain {
		return fmt.Errorf("%w: %s", ErrUnknownProvider, ch.id.Domain)
	}
	root, err := ch.anchorIn(b, &v.links)
	if err != nil {
		return err
	}
	now := v.now()
	if err := ch.covers(now); err != nil {
		return err
	}
	if now.After(root.NotAfter) || now.Before(root.NotBefore) {
		return fmt.Errorf("%w: the root %q, on %s", ErrExpired, root.Subject, root.NotAfter.UTC().Format(time.RFC3339))
	}
	return b.revokes(ch.chain)
}

func (v *Verifier) now() time.Time {
	if v.Time != nil {
		return v.Time()
	}
	return time.Now()
}

// checkKey says whether pub, encoded for the suite, is key.
func checkKey(pub crypto.PublicKey, suite mls.CipherSuite, key []byte) error {
	if !suite.Supported() {
		return fmt.Errorf("%w: %v", ErrSuite, suite)
	}
	own, err := suite.SignaturePublicKey(pub)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSuite, err)
	}
	if !bytes.Equal(own, key) {
		return ErrKeyMismatch
	}
	return nil
}

// cachedChain is a sound chain and the bundle in which it was last found to end.
type cachedChain struct {
	*chain
	mu     sync.Mutex
	bundle *Bundle
	root   *x509.Certificate
}

func (ch *cachedChain) anchorIn(b *Bundle, links *linkCache) (*x509.Certificate, error) {
	ch.mu.Lock()
	known, root := ch.bundle == b, ch.root
	ch.mu.Unlock()
	if known {
		return root, nil
	}
	root, err := ch.anchor(b.roots, links)
	if err != nil {
		return nil, err
	}
	ch.mu.Lock()
	ch.bundle, ch.root = b, root
	ch.mu.Unlock()
	return root, nil
}

// chainKey hashes a chain; the lengths set certificates apart.
func chainKey(certs [][]byte) (key [sha256.Size]byte) {
	h := sha256.New()
	for _, c := range certs {
		n := len(c)
		h.Write([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		h.Write(c)
	}
	h.Sum(key[:0])
	return key
}

// chainCache keeps at least the chains that were asked for last, within the bounds of a generation. The zero value is ready for use.
type chainCache struct {
	mu       sync.Mutex
	young    map[[sha256.Size]byte]*cachedChain // used since the last turn
	old      map[[sha256.Size]byte]*cachedChain // used before
	size     int                                // of the chains of young, bytes
	capacity int                                // of one generation; 0: maxCached
}

// The bounds of a generation. Anybody can make sound chains, and large ones.
const (
	maxCached      = 8192
	maxCachedBytes = 16 << 20
)

func (c *chainCache) get(key [sha256.Size]byte) *cachedChain {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch := c.young[key]; ch != nil {
		return ch
	}
	ch := c.old[key]
	if ch != nil {
		c.add(key, ch)
	}
	return ch
}

func (c *chainCache) put(key [sha256.Size]byte, ch *cachedChain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(key, ch)
}

func (c *chainCache) add(key [sha256.Size]byte, ch *cachedChain) {
	capacity := c.capacity
	if capacity == 0 {
		capacity = maxCached
	}
	if c.young == nil || len(c.young) >= capacity || c.size >= maxCachedBytes {
		c.old, c.young, c.size = c.young, make(map[[sha256.Size]byte]*cachedChain), 0
	}
	if c.young[key] == nil {
		for _, cert := range ch.certs {
			c.size += len(cert.Raw)
		}
	}
	c.young[key] = ch
}
