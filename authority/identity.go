package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// Identity is whom a certificate names. It is no statement of trust.
type Identity struct {
	Domain    string
	User      mimi.URI // empty for a node or hub
	Client    mimi.URI // empty for a node or hub
	Serial    string   // hexadecimal, lower case
	NotBefore time.Time
	NotAfter  time.Time
	PublicKey crypto.PublicKey // ed25519.PublicKey, *ecdsa.PublicKey, or one that CipherSuite.SignaturePublicKey takes for ML-DSA
	Node      bool             // a node's or a hub's certificate
}

// Purpose is what a certificate is presented for.
type Purpose int

// The purposes. A client's certificate names a user and a client, a node's the provider's domain as DNS name and
// provider URI, a hub's the provider URI only.
const (
	PurposeClient Purpose = iota + 1 // the credential of an MLS leaf
	PurposeNode                      // TLS between nodes, and towards clients
	PurposeHub                       // the credential of an MLS external sender, and of requests that a hub signs
)

func (p Purpose) String() string {
	switch p {
	case PurposeClient:
		return "client"
	case PurposeNode:
		return "node"
	case PurposeHub:
		return "hub"
	}
	return fmt.Sprintf("Purpose(%d)", int(p))
}

// The bounds of a chain.
const (
	maxChain       = 6       // certificates
	maxCertificate = 8 << 10 // bytes of one
)

// Object identifiers of RFC 5280 and RFC 9734 (id-kp-imUri).
var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidEKUIMURI       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 40}
)

// ParseIdentity reads the names of a chain's leaf. They are in canonical form and fit one purpose; nothing else is
// checked, so all who parse the same chain agree. It fails with ErrMalformed or ErrName.
func ParseIdentity(chain [][]byte) (*Identity, error) {
	certs, err := parseChain(chain)
	if err != nil {
		return nil, err
	}
	id, _, err := identify(certs[0])
	return id, err
}

// parseChain parses every certificate within the bounds.
func parseChain(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("%w: %d certificates", ErrMalformed, len(chain))
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		if len(der) > maxCertificate {
			return nil, fmt.Errorf("%w: certificate %d has %d bytes", ErrMalformed, i, len(der))
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %w", ErrMalformed, i, err)
		}
		certs[i] = c
	}
	return certs, nil
}

// identify reads a leaf's names and says what they are for.
func identify(leaf *x509.Certificate) (*Identity, Purpose, error) {
	uris, dns, err := altNames(leaf)
	if err != nil {
		return nil, 0, err
	}
	key, err := subjectKey(leaf.RawSubjectPublicKeyInfo, leaf.PublicKey)
	if errors.Is(err, ErrKeyType) {
		return nil, 0, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err != nil {
		return nil, 0, err
	}
	id := &Identity{Serial: serialString(leaf.SerialNumber), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, PublicKey: key}
	switch {
	case len(uris) == 2 && len(dns) == 0:
		if id.User, id.Client, err = clientNames(uris); err != nil {
			return nil, 0, err
		}
		id.Domain = id.User.Domain()
		return id, PurposeClient, nil
	case len(uris) == 1 && uris[0].Kind() == 0 && len(dns) <= 1:
		id.Node, id.Domain = true, uris[0].Domain()
		if len(dns) == 0 {
			return id, PurposeHub, nil
		}
		if dns[0] != id.Domain {
			return nil, 0, fmt.Errorf("%w: DNS name %q beside %s", ErrName, dns[0], uris[0])
		}
		return id, PurposeNode, nil
	}
	return nil, 0, fmt.Errorf("%w: %d URIs and %d DNS names are neither a client's, a node's nor a hub's", ErrName, len(uris), len(dns))
}

// clientNames takes the URIs of one user and one client of one domain, in either order.
func clientNames(uris []mimi.URI) (user, client mimi.URI, err error) {
	user, client = uris[0], uris[1]
	if user.Kind() == 'd' {
		user, client = client, user
	}
	switch {
	case user.Kind() != 'u' || client.Kind() != 'd':
		return "", "", fmt.Errorf("%w: %s and %s are not one user and one client", ErrName, uris[0], uris[1])
	case user.Domain() != client.Domain():
		return "", "", fmt.Errorf("%w: %s and %s are of different providers", ErrName, user, client)
	}
	return user, client, nil
}

// altNames reads the subject alternative names as they are encoded: Go's parsed URLs don't show, for example, that
// a scheme was in upper case. Other kinds of names than URIs and DNS names are refused.
func altNames(leaf *x509.Certificate) (uris []mimi.URI, dns []string, err error) {
	for _, ext := range leaf.Extensions {
		if ext.Id.Equal(oidSubjectAltName) {
			return parseAltNames(ext.Value)
		}
	}
	return nil, nil, fmt.Errorf("%w: no subject alternative names", ErrName)
}

// The tags of GeneralName (RFC 5280, Section 4.2.1.6).
const (
	tagDNSName = 2
	tagURI     = 6
)

func parseAltNames(der []byte) (uris []mimi.URI, dns []string, err error) {
	var names asn1.RawValue
	rest, err := asn1.Unmarshal(der, &names)
	if err != nil || len(rest) > 0 || names.Class != asn1.ClassUniversal || names.Tag != asn1.TagSequence || !names.IsCompound {
		return nil, nil, fmt.Errorf("%w: subject alternative names are not a sequence", ErrMalformed)
	}
	for rest = names.Bytes; len(rest) > 0; {
		var name asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &name); err != nil {
			return nil, nil, fmt.Errorf("%w: subject alternative name: %w", ErrMalformed, err)
		}
		if len(uris)+len(dns) == 2 {
			return nil, nil, fmt.Errorf("%w: more than two", ErrName)
		}
		switch {
		case name.Class == asn1.ClassContextSpecific && name.Tag == tagURI:
			u, err := mimi.ParseURI(string(name.Bytes))
			if err != nil {
				return nil, nil, fmt.Errorf("%w: %w", ErrName, err)
			}
			uris = append(uris, u)
		case name.Class == asn1.ClassContextSpecific && name.Tag == tagDNSName:
			if err := mimi.ValidDomain(string(name.Bytes)); err != nil {
				return nil, nil, fmt.Errorf("%w: %w", ErrName, err)
			}
			dns = append(dns, string(name.Bytes))
		default:
			return nil, nil, fmt.Errorf("%w: a name of another kind (tag %d)", ErrName, name.Tag)
		}
	}
	return uris, dns, nil
}

// signatureKey says whether some cipher suite signs with keys of this type, which is one of Go's. ML-DSA is apart.
func signatureKey(pub crypto.PublicKey) bool {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		return len(k) == ed25519.PublicKeySize
	case *ecdsa.PublicKey:
		return k.Curve == elliptic.P256() || k.Curve == elliptic.P384() || k.Curve == elliptic.P521()
	}
	return false
}

// issuerKey says whether a CA may have such a key: RSA is for authorities that exist already.
func issuerKey(pub crypto.PublicKey) bool {
	if k, ok := pub.(*rsa.PublicKey); ok {
		return k.N.BitLen() >= 2048 && k.N.BitLen() <= 4096
	}
	return signatureKey(pub)
}

func serialString(n *big.Int) string { return fmt.Sprintf("%x", n) }

// parseSerial reads what serialString writes.
func parseSerial(s string) (*big.Int, bool) {
	if len(s) == 0 || len(s) > 40 {
		return nil, false
	}
	n, ok := new(big.Int).SetString(s, 16)
	return n, ok && n.Sign() > 0 && serialString(n) == s
}
