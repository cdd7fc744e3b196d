package mls

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net/url"
	"sync"
	"time"

	circlsign "github.com/cloudflare/circl/sign"
	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
)

// issuer is a certificate authority: a root and an intermediate, both of ECDSA with P-256.
type issuer struct {
	root, intermediate *x509.Certificate
	key                crypto.Signer
}

var benchIssuer = sync.OnceValue(func() *issuer {
	is, err := newIssuer()
	if err != nil {
		panic(err)
	}
	return is
})

func newIssuer() (*issuer, error) {
	rand := seededRand(1)
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand)
	if err != nil {
		return nil, err
	}
	is := &issuer{key: key}
	der, err := x509.CreateCertificate(rand, template("Root"), template("Root"), rootKey.Public(), rootKey)
	if err != nil {
		return nil, err
	}
	if is.root, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if der, err = x509.CreateCertificate(rand, template("Intermediate"), is.root, key.Public(), rootKey); err != nil {
		return nil, err
	}
	is.intermediate, err = x509.ParseCertificate(der)
	return is, err
}

func (is *issuer) certify(rand io.Reader, number int, id string, pub crypto.PublicKey) (Credential, error) {
	uri, err := url.Parse(id)
	if err != nil {
		return Credential{}, err
	}
	var mldsa []byte // the SubjectPublicKeyInfo of a key that package x509 doesn't know
	if key, ok := pub.(circlsign.PublicKey); ok {
		if mldsa, err = mldsaInfo(key); err != nil {
			return Credential{}, err
		}
		pub = is.key.Public()
	}
	der, err := x509.CreateCertificate(rand, &x509.Certificate{SerialNumber: big.NewInt(int64(number)),
		Subject: pkix.Name{CommonName: id}, URIs: []*url.URL{uri}, NotBefore: is.root.NotBefore, NotAfter: is.root.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature}, is.intermediate, pub, is.key)
	if err == nil && mldsa != nil {
		der, err = is.withKey(rand, der, mldsa)
	}
	return X509Credential([][]byte{der, is.intermediate.Raw}), err
}

var oidMLDSA65 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 18}

// mldsaKeyInfo is the SubjectPublicKeyInfo of RFC 9881, Section 4.
type mldsaKeyInfo struct {
	Algorithm pkix.AlgorithmIdentifier
	Key       asn1.BitString
}

func mldsaInfo(key circlsign.PublicKey) ([]byte, error) {
	if key.Scheme() != mldsa65.Scheme() {
		return nil, errors.New("not a key of ML-DSA-65")
	}
	b, err := key.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(mldsaKeyInfo{pkix.AlgorithmIdentifier{Algorithm: oidMLDSA65}, asn1.BitString{Bytes: b, BitLength: 8 * len(b)}})
}

// publicKeyOf returns a certificate's key, of ML-DSA-65 too.
func publicKeyOf(c *x509.Certificate) (crypto.PublicKey, error) {
	if c.PublicKey != nil {
		return c.PublicKey, nil
	}
	var info mldsaKeyInfo
	if _, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &info); err != nil {
		return nil, err
	}
	if !info.Algorithm.Algorithm.Equal(oidMLDSA65) {
		return nil, errors.New("certificate for a key of an unknown kind")
	}
	return mldsa65.Scheme().UnmarshalBinaryPublicKey(info.Key.Bytes)
}

// withKey issues a certificate again with another key.
func (is *issuer) withKey(rand io.Reader, der, keyInfo []byte) ([]byte, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	var tbs asn1.RawValue
	if _, err := asn1.Unmarshal(c.RawTBSCertificate, &tbs); err != nil {
		return nil, err
	}
	tbs.FullBytes, tbs.Bytes = nil, bytes.Replace(tbs.Bytes, c.RawSubjectPublicKeyInfo, keyInfo, 1)
	signed, err := asn1.Marshal(tbs)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(signed)
	sig, err := is.key.Sign(rand, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: signed}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}},
		asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}})
}

// chainVerifier verifies chains of a certificate and the intermediate that issued it. It remembers, as package
// authority does, the chains that were sound and the intermediates that a root vouched for: so a chain costs one
// signature when it is new, and a hash when it isn't.
type chainVerifier struct {
	root *x509.Certificate

	mu     sync.Mutex
	chains map[[sha256.Size]byte]*x509.Certificate
	links  map[[sha256.Size]byte]bool
}

func (is *issuer) verifier() *chainVerifier {
	return &chainVerifier{root: is.root, chains: make(map[[sha256.Size]byte]*x509.Certificate), links: make(map[[sha256.Size]byte]bool)}
}

func (v *chainVerifier) sound(c Credential) (*x509.Certificate, error) {
	if c.Type != CredentialX509 || len(c.Certificates) != 2 {
		return nil, errors.New("not a chain of two")
	}
	h := sha256.New()
	h.Write(c.Certificates[0])
	h.Write(c.Certificates[1])
	key := [sha256.Size]byte(h.Sum(nil))
	link := sha256.Sum256(c.Certificates[1])
	v.mu.Lock()
	known, linked := v.chains[key], v.links[link]
	v.mu.Unlock()
	if known != nil {
		return known, nil
	}
	leaf, err1 := x509.ParseCertificate(c.Certificates[0])
	ca, err2 := x509.ParseCertificate(c.Certificates[1])
	if err := cmp.Or(err1, err2); err != nil {
		return nil, err
	}
	if !linked {
		if err := ca.CheckSignatureFrom(v.root); err != nil {
			return nil, err
		}
	}
	if err := leaf.CheckSignatureFrom(ca); err != nil {
		return nil, err
	}
	if len(leaf.URIs) != 1 {
		return nil, errors.New("names no client")
	}
	v.mu.Lock()
	v.chains[key], v.links[link] = leaf, true
	v.mu.Unlock()
	return leaf, nil
}

func (v *chainVerifier) VerifyCredential(c Credential, key []byte, cs CipherSuite) error {
	leaf, err := v.sound(c)
	if err != nil {
		return err
	}
	pub, err := publicKeyOf(leaf)
	if err != nil {
		return err
	}
	own, err := cs.SignaturePublicKey(pub)
	if err != nil {
		return err
	}
	if string(own) != string(key) {
		return errors.New("certificate for another key")
	}
	now := time.Now()
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return errors.New("expired")
	}
	return nil
}

func (v *chainVerifier) ValidSuccessor(_, _ Credential) error { return nil }

func (v *chainVerifier) Identity(c Credential) ([]byte, error) {
	leaf, err := v.sound(c)
	if err != nil {
		return nil, err
	}
	return []byte(leaf.URIs[0].String()), nil
}
