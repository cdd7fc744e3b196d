package authority

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
)

// The lifetimes of certificates. A renewal is due at two thirds.
const (
	RootLifetime         = 20 * 365 * 24 * time.Hour
	IntermediateLifetime = 10 * 365 * 24 * time.Hour
	ClientLifetime       = 90 * 24 * time.Hour
	NodeLifetime         = 90 * 24 * time.Hour
	HubLifetime          = 365 * 24 * time.Hour

	backdate       = 5 * time.Minute // for peers whose clocks are late
	issuerBackdate = time.Hour
)

// KeyType is the signature algorithm of an authority's keys. Any of them issues for all kinds of clients' keys.
type KeyType string

// The key types of roots and intermediates.
const (
	KeyP256    KeyType = "p256" // the default
	KeyP384    KeyType = "p384"
	KeyP521    KeyType = "p521"
	KeyEd25519 KeyType = "ed25519"
)

func (t KeyType) generate(rand io.Reader) (crypto.Signer, error) {
	suite, ok := map[KeyType]mls.CipherSuite{
		"": mls.P256_AES128GCM_SHA256_P256, KeyP256: mls.P256_AES128GCM_SHA256_P256, KeyP384: mls.P384_AES256GCM_SHA384_P384,
		KeyP521: mls.P521_AES256GCM_SHA512_P521, KeyEd25519: mls.X25519_AES128GCM_SHA256_Ed25519,
	}[t]
	if !ok {
		return nil, fmt.Errorf("%w: key type %q is none of p256, p384, p521, ed25519", ErrRequest, t)
	}
	return suite.GenerateSignatureKey(rand)
}

// newSerial draws a serial number of 127 random bits.
func newSerial(rand io.Reader) (*big.Int, error) {
	var b [16]byte
	if _, err := io.ReadFull(rand, b[:]); err != nil {
		return nil, fmt.Errorf("draw a serial number: %w", err)
	}
	b[0] &= 0x7f
	b[15] |= 1 // never zero
	return new(big.Int).SetBytes(b[:]), nil
}

// rootTemplate is a root's certificate before signing.
func rootTemplate(domain string, serial *big.Int, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Parley root of " + domain},
		NotBefore:             now.Add(-issuerBackdate).Truncate(time.Second),
		NotAfter:              now.Add(RootLifetime).Truncate(time.Second),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            1,
	}
}

// intermediateTemplate is an intermediate's certificate before signing. The names are constrained to the domain
// (RFC 5280, Section 4.2.1.10): the URI constraint is to the very host, the DNS one can't but let subdomains
// through, which is why everyone checks the names exactly as well.
func intermediateTemplate(domain string, serial *big.Int, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:                serial,
		Subject:                     pkix.Name{CommonName: "Parley authority of " + domain},
		NotBefore:                   now.Add(-issuerBackdate).Truncate(time.Second),
		NotAfter:                    now.Add(IntermediateLifetime).Truncate(time.Second),
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid:       true,
		IsCA:                        true,
		MaxPathLenZero:              true,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         []string{domain},
		PermittedURIDomains:         []string{domain},
	}
}

// subject is what a certificate is issued for. Only this package makes one, after checking what it holds, and issue
// takes nothing else.
type subject struct {
	purpose Purpose
	domain  string
	user    mimi.URI
	client  mimi.URI
	key     crypto.PublicKey
}

// template is the certificate of s before signing, bound in time by its issuer's.
func (s *subject) template(serial *big.Int, now time.Time, issuer *x509.Certificate) (*x509.Certificate, error) {
	t := &x509.Certificate{
		SerialNumber:          serial,
		PublicKey:             s.key,
		NotBefore:             now.Add(-backdate).Truncate(time.Second),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
	}
	provider, err := mimi.ProviderURI(s.domain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	var names []mimi.URI
	var lifetime time.Duration
	switch s.purpose {
	case PurposeClient:
		names, lifetime = []mimi.URI{s.user, s.client}, ClientLifetime
		t.Subject.CommonName = s.client.ID()
		t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidEKUIMURI}
	case PurposeHub:
		names, lifetime = []mimi.URI{provider}, HubLifetime
		t.Subject.CommonName = "hub"
		t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidEKUIMURI}
	case PurposeNode:
		names, lifetime = []mimi.URI{provider}, NodeLifetime
		t.Subject.CommonName = "node"
		t.DNSNames = []string{s.domain}
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	default:
		return nil, fmt.Errorf("%w: purpose %v", ErrRequest, s.purpose)
	}
	for _, n := range names {
		u, err := url.Parse(string(n))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRequest, err)
		}
		t.URIs = append(t.URIs, u)
	}
	t.NotAfter = now.Add(lifetime).Truncate(time.Second)
	if t.NotAfter.After(issuer.NotAfter) {
		t.NotAfter = issuer.NotAfter
	}
	if !t.NotAfter.After(now) {
		return nil, fmt.Errorf("%w: the authority's own certificate, on %s", ErrExpired, issuer.NotAfter.Format(time.RFC3339))
	}
	return t, nil
}
