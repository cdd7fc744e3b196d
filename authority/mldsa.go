package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"

	circlsign "github.com/cloudflare/circl/sign"
	"github.com/cloudflare/circl/sign/mldsa/mldsa44"
	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
	"github.com/cloudflare/circl/sign/mldsa/mldsa87"
	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
)

// ML-DSA in X.509 (RFC 9881), which Go's crypto/x509 doesn't have: public keys, requests and private keys are encoded
// and decoded here, and certificates of such keys are issued. An authority's own keys are classical, so that a quantum
// computer could forge its certificates, but no signature of a client that holds one.

// mldsaSchemes are those of RFC 9881, Section 2, with their object identifiers. Parameters are absent.
var mldsaSchemes = []struct {
	oid    asn1.ObjectIdentifier
	scheme circlsign.Scheme
}{
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 17}, mldsa44.Scheme()},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 18}, mldsa65.Scheme()},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 19}, mldsa87.Scheme()},
}

// mldsaKey is a public key as it is encoded: the expanded one takes up to 70 kB. The cipher suites of mls know it as one
// of theirs.
type mldsaKey struct {
	scheme circlsign.Scheme
	raw    []byte
}

func (k *mldsaKey) Scheme() circlsign.Scheme       { return k.scheme }
func (k *mldsaKey) MarshalBinary() ([]byte, error) { return bytes.Clone(k.raw), nil }

func (k *mldsaKey) Equal(other crypto.PublicKey) bool {
	o := mldsaKeyOf(other)
	return o != nil && o.scheme == k.scheme && bytes.Equal(o.raw, k.raw)
}

func (k *mldsaKey) oid() asn1.ObjectIdentifier {
	for _, s := range mldsaSchemes {
		if s.scheme == k.scheme {
			return s.oid
		}
	}
	return nil
}

// mldsaKeyOf returns nil if pub is no ML-DSA key.
func mldsaKeyOf(pub crypto.PublicKey) *mldsaKey {
	key, ok := pub.(circlsign.PublicKey)
	if !ok {
		return nil
	}
	k := &mldsaKey{scheme: key.Scheme()}
	if k.oid() == nil {
		return nil
	}
	raw, err := key.MarshalBinary()
	if err != nil || len(raw) != k.scheme.PublicKeySize() {
		return nil
	}
	k.raw = raw
	return k
}

// algorithm is an AlgorithmIdentifier without parameters.
type algorithm struct{ OID asn1.ObjectIdentifier }

// keyInfo is a SubjectPublicKeyInfo (RFC 5280, Section 4.1.2.7; RFC 9881, Section 4).
type keyInfo struct {
	Algorithm algorithm
	PublicKey asn1.BitString
}

func bitString(b []byte) asn1.BitString { return asn1.BitString{Bytes: b, BitLength: 8 * len(b)} }

func (k *mldsaKey) marshal() ([]byte, error) {
	return asn1.Marshal(keyInfo{algorithm{k.oid()}, bitString(k.raw)})
}

// subjectKey returns the key of a SubjectPublicKeyInfo that Go has parsed, as far as it could. It fails with
// ErrMalformed or ErrKeyType.
func subjectKey(spki []byte, parsed crypto.PublicKey) (crypto.PublicKey, error) {
	key, err := parseMLDSAKey(spki)
	switch {
	case err != nil:
		return nil, err
	case key != nil:
		return key, nil
	case !signatureKey(parsed):
		return nil, ErrKeyType
	}
	return parsed, nil
}

// parseMLDSAKey returns nil and no error if the key isn't one of ML-DSA. It fails with ErrMalformed.
func parseMLDSAKey(spki []byte) (*mldsaKey, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}
	rest, err := asn1.Unmarshal(spki, &info)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrMalformed, err)
	}
	for _, s := range mldsaSchemes {
		if !info.Algorithm.Algorithm.Equal(s.oid) {
			continue
		}
		k := &mldsaKey{s.scheme, info.PublicKey.Bytes}
		if n := len(k.raw); n != s.scheme.PublicKeySize() {
			return nil, fmt.Errorf("%w: %s key of %d bytes", ErrMalformed, s.scheme.Name(), n)
		}
		// There is one encoding in DER of such a key, without parameters and unused bits.
		if der, err := k.marshal(); err != nil || len(rest) > 0 || !bytes.Equal(der, spki) {
			return nil, fmt.Errorf("%w: %s key with parameters, unused bits or trailing bytes", ErrMalformed, s.scheme.Name())
		}
		return k, nil
	}
	return nil, nil
}

// marshalPublicKey and parsePublicKey are for SubjectPublicKeyInfo in DER.
func marshalPublicKey(pub crypto.PublicKey) ([]byte, error) {
	if k := mldsaKeyOf(pub); k != nil {
		return k.marshal()
	}
	return x509.MarshalPKIXPublicKey(pub)
}

func parsePublicKey(der []byte) (crypto.PublicKey, error) {
	k, err := parseMLDSAKey(der)
	if err != nil {
		return nil, err
	}
	if k != nil {
		return k, nil
	}
	return x509.ParsePKIXPublicKey(der)
}

// checkMLDSAUsage allows an ML-DSA key to sign only (RFC 9881, Section 5).
func checkMLDSAUsage(leaf *x509.Certificate) error {
	const others = x509.KeyUsageKeyEncipherment | x509.KeyUsageDataEncipherment | x509.KeyUsageKeyAgreement |
		x509.KeyUsageEncipherOnly | x509.KeyUsageDecipherOnly
	if leaf.KeyUsage&others != 0 {
		return fmt.Errorf("%w: an ML-DSA key that is for more than signatures", ErrUsage)
	}
	return nil
}

// signed is a Certificate (RFC 5280, Section 4.1) or a CertificationRequest (RFC 2986, Section 4.2).
type signed struct {
	Body      asn1.RawValue
	Algorithm algorithm
	Signature asn1.BitString
}

// checkRequestSignature verifies a request's signature with its own key: by ML-DSA, or as Go does. It fails with
// ErrPossession.
func checkRequestSignature(csr *x509.CertificateRequest, pub crypto.PublicKey) error {
	key := mldsaKeyOf(pub)
	if key == nil {
		if err := csr.CheckSignature(); err != nil {
			return fmt.Errorf("%w: %w", ErrPossession, err)
		}
		return nil
	}
	der, err := asn1.Marshal(signed{asn1.RawValue{FullBytes: csr.RawTBSCertificateRequest}, algorithm{key.oid()}, bitString(csr.Signature)})
	if err != nil || !bytes.Equal(der, csr.Raw) {
		return fmt.Errorf("%w: the signature is not one of %s", ErrPossession, key.scheme.Name())
	}
	expanded, err := key.scheme.UnmarshalBinaryPublicKey(key.raw)
	if err != nil || !key.scheme.Verify(expanded, csr.RawTBSCertificateRequest, csr.Signature, nil) {
		return ErrPossession
	}
	return nil
}

// createRequest is x509.CreateCertificateRequest, for ML-DSA too.
func createRequest(rand io.Reader, template *x509.CertificateRequest, signer crypto.Signer) ([]byte, error) {
	key := mldsaKeyOf(signer.Public())
	if key == nil {
		return x509.CreateCertificateRequest(rand, template, signer)
	}
	der, err := x509.CreateCertificateRequest(rand, template, standIn)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	return resign(rand, csr.RawTBSCertificateRequest, map[int]any{2: key}, algorithm{key.oid()}, signer, 0)
}

// standIn is the key in the place of an ML-DSA key, and of its issuer's, when Go encodes what it can't sign. What it
// signs goes nowhere.
var standIn = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))

// resign replaces elements of the sequence that is signed, and signs it. An *mldsaKey stands for its encoding.
func resign(rand io.Reader, body []byte, replace map[int]any, alg algorithm, signer crypto.Signer, hash crypto.Hash) ([]byte, error) {
	var parts []asn1.RawValue
	if _, err := asn1.Unmarshal(body, &parts); err != nil {
		return nil, err
	}
	for i, v := range replace {
		var der []byte
		var err error
		if key, ok := v.(*mldsaKey); ok {
			der, err = key.marshal()
		} else {
			der, err = asn1.Marshal(v)
		}
		if err != nil {
			return nil, err
		}
		parts[i] = asn1.RawValue{FullBytes: der}
	}
	body, err := asn1.Marshal(parts)
	if err != nil {
		return nil, err
	}
	message := body
	if hash != 0 {
		h := hash.New()
		h.Write(body)
		message = h.Sum(nil)
	}
	sig, err := signer.Sign(rand, message, hash)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(signed{asn1.RawValue{FullBytes: body}, alg, bitString(sig)})
}

// issuerAlgorithm returns how a CA of this package signs (RFC 5758, Section 3.2; RFC 8410, Section 3).
func issuerAlgorithm(pub crypto.PublicKey) (algorithm, crypto.Hash, error) {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		return algorithm{asn1.ObjectIdentifier{1, 3, 101, 112}}, 0, nil
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, crypto.SHA256, nil
		case elliptic.P384():
			return algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}}, crypto.SHA384, nil
		case elliptic.P521():
			return algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 4}}, crypto.SHA512, nil
		}
	}
	return algorithm{}, 0, fmt.Errorf("%w: the authority's own", ErrKeyType)
}

// createCertificate is x509.CreateCertificate for an ML-DSA key.
func createCertificate(rand io.Reader, template, issuer *x509.Certificate, key *mldsaKey, signer crypto.Signer) (*x509.Certificate, error) {
	alg, hash, err := issuerAlgorithm(issuer.PublicKey)
	if err != nil {
		return nil, err
	}
	t, parent := *template, *issuer
	id := sha256.Sum256(key.raw)
	t.SubjectKeyId = id[:20] // RFC 7093, Section 2
	t.PublicKey, t.SignatureAlgorithm, parent.PublicKey = nil, 0, standIn.Public()
	der, err := x509.CreateCertificate(rand, &t, &parent, standIn.Public(), standIn)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if der, err = resign(rand, c.RawTBSCertificate, map[int]any{2: alg, 6: key}, alg, signer, hash); err != nil {
		return nil, err
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return c, c.CheckSignatureFrom(issuer) // as Go does, against faults
}

// certifier is smallstep's signer with one more kind of subjects' keys. All else, what is checked before and stored
// after, is as for the others.
type certifier struct{ *softcas.SoftCAS }

// CreateCertificate implements casapi.CertificateAuthorityService.
func (c certifier) CreateCertificate(req *casapi.CreateCertificateRequest) (*casapi.CreateCertificateResponse, error) {
	key := mldsaKeyOf(req.Template.PublicKey)
	if key == nil {
		return c.SoftCAS.CreateCertificate(req)
	}
	cert, err := createCertificate(rand.Reader, req.Template, c.CertificateChain[0], key, c.Signer)
	if err != nil {
		return nil, err
	}
	return &casapi.CreateCertificateResponse{Certificate: cert, CertificateChain: c.CertificateChain}, nil
}

// privateKeyInfo is a OneAsymmetricKey (RFC 5958, Section 2), in which ML-DSA has its seed (RFC 9881, Section 6); the
// expanded key, which is the other choice there, is neither written nor read.
type privateKeyInfo struct {
	Version   int
	Algorithm algorithm
	Key       []byte
}

// MarshalPrivateKey encodes the signature key of a cipher suite that has certificates: PKCS #8 in DER.
func MarshalPrivateKey(signer crypto.Signer) ([]byte, error) {
	key, ok := signer.(interface{ Seed() []byte })
	pub := mldsaKeyOf(signer.Public())
	if pub == nil || !ok {
		return x509.MarshalPKCS8PrivateKey(signer)
	}
	b, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, Bytes: key.Seed()})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(privateKeyInfo{Algorithm: algorithm{pub.oid()}, Key: b})
}

// ParsePrivateKey decodes what MarshalPrivateKey encodes. Its errors don't quote the key.
func ParsePrivateKey(der []byte) (crypto.Signer, error) {
	if rest, err := asn1.Unmarshal(der, new(asn1.RawValue)); err != nil || len(rest) > 0 {
		return nil, errors.New("authority: the private key is malformed")
	}
	var info privateKeyInfo
	if _, err := asn1.Unmarshal(der, &info); err == nil {
		for _, s := range mldsaSchemes {
			if !info.Algorithm.OID.Equal(s.oid) {
				continue
			}
			if b := info.Key; info.Version != 0 || len(b) != 2+s.scheme.SeedSize() || b[0] != 0x80 || int(b[1]) != s.scheme.SeedSize() {
				return nil, errors.New("authority: the private key is malformed")
			}
			_, key := s.scheme.DeriveKey(info.Key[2:])
			return key, nil
		}
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("authority: the private key is malformed")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("authority: a private key of type %T can't sign", key)
	}
	return signer, nil
}
