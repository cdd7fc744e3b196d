package authority

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// chain is a chain of certificates that is sound in itself: each vouches for the one before it, the names are exact and
// the usages fit the names. Everything here is the same whoever looks, and whenever; trust and time come on top.
type chain struct {
	id        *Identity
	purpose   Purpose
	certs     []*x509.Certificate
	notBefore time.Time // the latest of all certificates
	notAfter  time.Time // the earliest of all certificates
}

// checkChain makes a chain of certificates. It fails with ErrMalformed, ErrName, ErrUsage, ErrForeignName or ErrBroken.
func checkChain(certs []*x509.Certificate, links *linkCache) (*chain, error) {
	leaf := certs[0]
	id, purpose, err := identify(leaf)
	if err != nil {
		return nil, err
	}
	if err := checkUsage(leaf, purpose); err != nil {
		return nil, err
	}
	if mldsaKeyOf(id.PublicKey) != nil {
		if err := checkMLDSAUsage(leaf); err != nil {
			return nil, err
		}
	}
	ch := &chain{id: id, purpose: purpose, certs: certs, notBefore: leaf.NotBefore, notAfter: leaf.NotAfter}
	for i, c := range certs {
		if len(c.UnhandledCriticalExtensions) > 0 {
			return nil, fmt.Errorf("%w: critical extension %v", ErrUsage, c.UnhandledCriticalExtensions[0])
		}
		if c.NotBefore.After(ch.notBefore) {
			ch.notBefore = c.NotBefore
		}
		if c.NotAfter.Before(ch.notAfter) {
			ch.notAfter = c.NotAfter
		}
		if i > 0 {
			if err := checkIssuer(c, i-1, id.Domain, purpose); err != nil {
				return nil, err
			}
		}
	}
	for i, c := range certs[:len(certs)-1] {
		if err := links.check(c, certs[i+1]); err != nil {
			return nil, err
		}
	}
	if last := certs[len(certs)-1]; len(certs) > 1 && bytes.Equal(last.RawSubject, last.RawIssuer) {
		if err := links.check(last, last); err != nil {
			return nil, err
		}
	}
	return ch, nil
}

// checkUsage asks for the usages of a leaf (RFC 5280, Sections 4.2.1.3, 4.2.1.9 and 4.2.1.12; RFC 9734).
func checkUsage(leaf *x509.Certificate, p Purpose) error {
	if leaf.IsCA || leaf.KeyUsage&x509.KeyUsageCertSign != 0 {
		return fmt.Errorf("%w: it may issue certificates", ErrUsage)
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return fmt.Errorf("%w: no digital signatures", ErrUsage)
	}
	if slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return fmt.Errorf("%w: any extended use", ErrUsage)
	}
	im := false
	for _, oid := range leaf.UnknownExtKeyUsage {
		im = im || oid.Equal(oidEKUIMURI)
	}
	server := slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	client := slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	switch {
	case p == PurposeNode && !(server && client):
		return fmt.Errorf("%w: a node's is for server and client authentication", ErrUsage)
	case p != PurposeNode && !im:
		return fmt.Errorf("%w: no id-kp-imUri", ErrUsage)
	}
	return nil
}

// checkIssuer asks whether a CA certificate, with below other CAs between it and the leaf, allows this chain
// (RFC 5280, Sections 4.2.1.3, 4.2.1.9, 4.2.1.10 and 4.2.1.12).
func checkIssuer(c *x509.Certificate, below int, domain string, p Purpose) error {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("%w: %q may not issue certificates", ErrBroken, c.Subject)
	case (c.MaxPathLen > 0 || c.MaxPathLenZero) && below > c.MaxPathLen:
		return fmt.Errorf("%w: the chain below %q is too long", ErrBroken, c.Subject)
	case !issuerKey(c.PublicKey):
		return fmt.Errorf("%w: the key of %q is of no allowed type", ErrBroken, c.Subject)
	}
	if err := issuerUsage(c, p); err != nil {
		return err
	}
	// The only names are the domain and URIs with the domain as host. Constraints of URIs let no subdomain through
	// (Section 4.2.1.10), and for a provider those of DNS names don't either: its domain is one name.
	if len(c.PermittedURIDomains) > 0 && !slices.Contains(c.PermittedURIDomains, domain) {
		return fmt.Errorf("%w: %q is for URIs of %s", ErrForeignName, c.Subject, strings.Join(c.PermittedURIDomains, ", "))
	}
	if p == PurposeNode && len(c.PermittedDNSDomains) > 0 && !slices.Contains(c.PermittedDNSDomains, domain) {
		return fmt.Errorf("%w: %q is for %s", ErrForeignName, c.Subject, strings.Join(c.PermittedDNSDomains, ", "))
	}
	for _, x := range append(slices.Clone(c.ExcludedURIDomains), c.ExcludedDNSDomains...) {
		if x = strings.TrimPrefix(x, "."); domain == x || strings.HasSuffix(domain, "."+x) {
			return fmt.Errorf("%w: %q is not for %s", ErrForeignName, c.Subject, x)
		}
	}
	return nil
}

// issuerUsage applies the custom that a CA's extended key usages bound those of what it issues.
func issuerUsage(c *x509.Certificate, p Purpose) error {
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return nil
	}
	if p == PurposeNode {
		if slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
			return nil
		}
	} else {
		for _, oid := range c.UnknownExtKeyUsage {
			if oid.Equal(oidEKUIMURI) {
				return nil
			}
		}
	}
	return fmt.Errorf("%w: %q doesn't issue for a %v", ErrUsage, c.Subject, p)
}

// covers says whether now is in the lifetime of every certificate. It fails with ErrExpired or ErrNotYetValid.
func (ch *chain) covers(now time.Time) error {
	switch {
	case now.After(ch.notAfter):
		return fmt.Errorf("%w on %s", ErrExpired, ch.notAfter.UTC().Format(time.RFC3339))
	case now.Before(ch.notBefore):
		return fmt.Errorf("%w: before %s", ErrNotYetValid, ch.notBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// anchor finds the root among roots in which the chain ends. It fails with ErrUntrusted.
func (ch *chain) anchor(roots []*x509.Certificate, links *linkCache) (*x509.Certificate, error) {
	last := ch.certs[len(ch.certs)-1]
	for _, root := range roots {
		if len(ch.certs) > 1 && bytes.Equal(last.Raw, root.Raw) {
			return root, nil
		}
		if !bytes.Equal(last.RawIssuer, root.RawSubject) || checkIssuer(root, len(ch.certs)-1, ch.id.Domain, ch.purpose) != nil {
			continue
		}
		if links.check(last, root) == nil {
			return root, nil
		}
	}
	return nil, fmt.Errorf("%w: %q is not issued by a root of %s", ErrUntrusted, last.Subject, ch.id.Domain)
}

// fits says whether p is what the chain's names and usages are for.
func (ch *chain) fits(p Purpose) error {
	if ch.purpose != p {
		return fmt.Errorf("%w: it is a %v's, not a %v's", ErrUsage, ch.purpose, p)
	}
	return nil
}

// linkCache remembers which CA certificates vouch for which: an intermediate's signature is verified once and not
// with every leaf. The zero value is ready for use.
type linkCache struct {
	mu    sync.Mutex
	known map[[2 * sha256.Size]byte]struct{}
}

// maxLinks bounds the cache; past it, it starts anew.
const maxLinks = 1024

// check fails with ErrBroken unless issuer signed c.
func (l *linkCache) check(c, issuer *x509.Certificate) error {
	if !bytes.Equal(c.RawIssuer, issuer.RawSubject) {
		return fmt.Errorf("%w: %q is issued by %q and not by %q", ErrBroken, c.Subject, c.Issuer, issuer.Subject)
	}
	if !c.IsCA {
		return verifyLink(c, issuer)
	}
	var key [2 * sha256.Size]byte
	child, parent := sha256.Sum256(c.Raw), sha256.Sum256(issuer.Raw)
	copy(key[:], child[:])
	copy(key[sha256.Size:], parent[:])
	l.mu.Lock()
	_, ok := l.known[key]
	l.mu.Unlock()
	if ok {
		return nil
	}
	if err := verifyLink(c, issuer); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known == nil || len(l.known) >= maxLinks {
		l.known = make(map[[2 * sha256.Size]byte]struct{})
	}
	l.known[key] = struct{}{}
	return nil
}

func verifyLink(c, issuer *x509.Certificate) error {
	if err := c.CheckSignatureFrom(issuer); err != nil {
		return fmt.Errorf("%w: %q is not signed by %q", ErrBroken, c.Subject, issuer.Subject)
	}
	return nil
}
