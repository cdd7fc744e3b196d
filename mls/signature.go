package mls

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"errors"
	"fmt"
	"io"

	circlsign "github.com/cloudflare/circl/sign"
	"github.com/cloudflare/circl/sign/ed448"
	"github.com/cloudflare/circl/sign/mldsa/mldsa44"
	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
	"github.com/cloudflare/circl/sign/mldsa/mldsa87"

	"github.com/parley-mls/parley/mls/codec"
)

// signatureScheme is a suite's signature scheme (RFC 9420, Section 5.1.2).
type signatureScheme interface {
	generate(rand io.Reader) (crypto.Signer, error)
	// encode returns nil and no error if pub is not a key of the scheme.
	encode(pub crypto.PublicKey) ([]byte, error)
	parse(b []byte) (crypto.PublicKey, error)
	// fits says whether the signer's key is of the scheme.
	fits(signer crypto.Signer) bool
	sign(rand io.Reader, signer crypto.Signer, message []byte) ([]byte, error)
	// verify takes a key that parse returned.
	verify(pub crypto.PublicKey, message, signature []byte) bool
}

var (
	ecdsaP256 = ecdsaScheme{elliptic.P256(), crypto.SHA256}
	ecdsaP384 = ecdsaScheme{elliptic.P384(), crypto.SHA384}
	ecdsaP521 = ecdsaScheme{elliptic.P521(), crypto.SHA512}
	pureEd448 = circlScheme{ed448.Scheme()}
	mlDSA44   = circlScheme{mldsa44.Scheme()}
	mlDSA65   = circlScheme{mldsa65.Scheme()}
	mlDSA87   = circlScheme{mldsa87.Scheme()}
)

func readSeed(rand io.Reader, n int) (secret, error) {
	seed := make(secret, n)
	if _, err := io.ReadFull(rand, seed); err != nil {
		return nil, fmt.Errorf("mls: generate signature key: %w", err)
	}
	return seed, nil
}

type ed25519Scheme struct{}

func (ed25519Scheme) generate(rand io.Reader) (crypto.Signer, error) {
	seed, err := readSeed(rand, ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

func (ed25519Scheme) encode(pub crypto.PublicKey) ([]byte, error) {
	key, ok := pub.(ed25519.PublicKey)
	if !ok || len(key) != ed25519.PublicKeySize {
		return nil, nil
	}
	return append([]byte(nil), key...), nil
}

func (ed25519Scheme) parse(b []byte) (crypto.PublicKey, error) {
	if len(b) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: Ed25519 key of %d bytes", ErrMalformed, len(b))
	}
	return ed25519.PublicKey(append([]byte(nil), b...)), nil
}

func (ed25519Scheme) fits(signer crypto.Signer) bool {
	key, ok := signer.Public().(ed25519.PublicKey)
	return ok && len(key) == ed25519.PublicKeySize
}

func (ed25519Scheme) sign(rand io.Reader, signer crypto.Signer, message []byte) ([]byte, error) {
	return signer.Sign(rand, message, crypto.Hash(0))
}

func (ed25519Scheme) verify(pub crypto.PublicKey, message, signature []byte) bool {
	return ed25519.Verify(pub.(ed25519.PublicKey), message, signature)
}

// ecdsaScheme hashes as TLS does with the curve (RFC 8446, Section 4.2.3), which is not always the suite's hash.
type ecdsaScheme struct {
	curve elliptic.Curve
	hash  crypto.Hash
}

func (s ecdsaScheme) digest(message []byte) []byte { return sum(s.hash, nil, message) }

func (s ecdsaScheme) generate(rand io.Reader) (crypto.Signer, error) {
	for range 256 { // a candidate is out of range with a chance below one half
		b, err := readSeed(rand, (s.curve.Params().BitSize+7)/8)
		if err != nil {
			return nil, err
		}
		if s.curve == elliptic.P521() {
			b[0] &= 1
		}
		if key, err := ecdsa.ParseRawPrivateKey(s.curve, b); err == nil {
			return key, nil
		}
	}
	return nil, errors.New("mls: generate signature key: the source of randomness repeats itself")
}

func (s ecdsaScheme) encode(pub crypto.PublicKey) ([]byte, error) {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key.Curve != s.curve {
		return nil, nil
	}
	return key.Bytes()
}

func (s ecdsaScheme) parse(b []byte) (crypto.PublicKey, error) {
	pub, err := ecdsa.ParseUncompressedPublicKey(s.curve, b)
	if err != nil {
		return nil, fmt.Errorf("%w: signature key: %w", ErrMalformed, err)
	}
	return pub, nil
}

func (s ecdsaScheme) fits(signer crypto.Signer) bool {
	key, ok := signer.Public().(*ecdsa.PublicKey)
	return ok && key.Curve == s.curve
}

func (s ecdsaScheme) sign(rand io.Reader, signer crypto.Signer, message []byte) ([]byte, error) {
	return signer.Sign(rand, s.digest(message), s.hash)
}

func (s ecdsaScheme) verify(pub crypto.PublicKey, message, signature []byte) bool {
	return ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), s.digest(message), signature)
}

// circlScheme is Ed448 (RFC 8032, Section 5.2) or ML-DSA (FIPS 204), both the pure ones with an empty context, as TLS
// has them. circl's ML-DSA takes a fifth to a half of the time of filippo.io/mldsa, which is Go's (BenchmarkPrimitives);
// its signatures are the deterministic ones.
type circlScheme struct{ circlsign.Scheme }

func (s circlScheme) generate(rand io.Reader) (crypto.Signer, error) {
	seed, err := readSeed(rand, s.SeedSize())
	if err != nil {
		return nil, err
	}
	_, key := s.DeriveKey(seed)
	return key, nil
}

func (s circlScheme) encode(pub crypto.PublicKey) ([]byte, error) {
	key, ok := pub.(circlsign.PublicKey)
	if !ok || key.Scheme() != s.Scheme {
		return nil, nil
	}
	b, err := key.MarshalBinary()
	if err != nil || len(b) != s.PublicKeySize() {
		return nil, err
	}
	return b, nil
}

func (s circlScheme) parse(b []byte) (crypto.PublicKey, error) {
	key, err := s.UnmarshalBinaryPublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %s key of %d bytes", ErrMalformed, s.Name(), len(b))
	}
	return key, nil
}

func (s circlScheme) fits(signer crypto.Signer) bool {
	if key, ok := signer.(circlsign.PrivateKey); ok { // from which it would take a while to compute the public one
		return key.Scheme() == s.Scheme
	}
	key, ok := signer.Public().(circlsign.PublicKey)
	return ok && key.Scheme() == s.Scheme
}

func (s circlScheme) sign(rand io.Reader, signer crypto.Signer, message []byte) ([]byte, error) {
	return signer.Sign(rand, message, crypto.Hash(0))
}

func (s circlScheme) verify(pub crypto.PublicKey, message, signature []byte) bool {
	return s.Verify(pub.(circlsign.PublicKey), message, signature, nil)
}

// GenerateSignatureKey makes a key of the suite: an ed25519.PrivateKey, an *ecdsa.PrivateKey, or circl's
// ed448.PrivateKey or *mldsa44.PrivateKey, *mldsa65.PrivateKey or *mldsa87.PrivateKey.
func (cs CipherSuite) GenerateSignatureKey(rand io.Reader) (crypto.Signer, error) {
	return cs.params().sig.generate(rand)
}

// SignaturePublicKey encodes a public key for MLS: 32 bytes for Ed25519, 57 for Ed448, an uncompressed point for ECDSA
// (RFC 9420, Section 5.1.1), 1312, 1952 or 2592 bytes for ML-DSA-44, 65 and 87 (FIPS 204, Section 4). It fails if the
// key isn't of the suite's type.
func (cs CipherSuite) SignaturePublicKey(pub crypto.PublicKey) ([]byte, error) {
	b, err := cs.params().sig.encode(pub)
	if err != nil {
		return nil, fmt.Errorf("mls: encode signature key: %w", err)
	}
	if b == nil {
		return nil, cs.otherKey(pub)
	}
	return b, nil
}

func (cs CipherSuite) otherKey(key any) error {
	return fmt.Errorf("mls: a key of type %T is not one of %v", key, cs)
}

// ParseSignaturePublicKey decodes what SignaturePublicKey encodes. It fails with ErrMalformed.
func (cs CipherSuite) ParseSignaturePublicKey(b []byte) (crypto.PublicKey, error) {
	return cs.params().sig.parse(b)
}

// labelled is SignContent and EncryptContext (RFC 9420, Sections 5.1.2 and 5.1.3).
//
//	struct {
//	    opaque label<V>;
//	    opaque content<V>;
//	} SignContent;
func labelled(label string, content func(w *codec.Writer)) *codec.Writer {
	w := codec.Scratch()
	w.Length(len(labelPrefix) + len(label))
	w.String(labelPrefix)
	w.String(label)
	w.Vector(content)
	return w
}

// SignWithLabel signs content under a label (RFC 9420, Section 5.1.2). It fails if the signer's key isn't of the suite
// or the signer fails. Ed448 and ML-DSA are the pure ones with an empty context. ECDSA signatures are ASN.1 DER; Go's
// take their randomness from the system, whatever rand is.
func (cs CipherSuite) SignWithLabel(rand io.Reader, signer crypto.Signer, label string, content []byte) ([]byte, error) {
	return cs.sign(rand, signer, label, func(w *codec.Writer) { w.Raw(content) })
}

// sign is SignWithLabel of what content writes.
func (cs CipherSuite) sign(rand io.Reader, signer crypto.Signer, label string, content func(w *codec.Writer)) ([]byte, error) {
	p := cs.params()
	if !p.sig.fits(signer) {
		return nil, cs.otherKey(signer)
	}
	w := labelled(label, content)
	defer w.Free()
	sig, err := p.sig.sign(rand, signer, w.Bytes())
	if err != nil {
		return nil, fmt.Errorf("mls: sign: %w", err)
	}
	return sig, nil
}

// VerifyWithLabel checks what SignWithLabel signed. It fails with ErrSignature, ErrMalformed for a bad key, or
// ErrUnsupported for a suite that isn't supported.
func (cs CipherSuite) VerifyWithLabel(publicKey []byte, label string, content, signature []byte) error {
	return cs.verify(publicKey, label, func(w *codec.Writer) { w.Raw(content) }, signature)
}

// verify is VerifyWithLabel of what content writes.
func (cs CipherSuite) verify(publicKey []byte, label string, content func(w *codec.Writer), signature []byte) error {
	p := cs.lookup()
	if p == nil {
		return fmt.Errorf("%w: %v", ErrUnsupported, cs)
	}
	pub, err := p.sig.parse(publicKey)
	if err != nil {
		return err
	}
	w := labelled(label, content)
	defer w.Free()
	if !p.sig.verify(pub, w.Bytes(), signature) {
		return ErrSignature
	}
	return nil
}
