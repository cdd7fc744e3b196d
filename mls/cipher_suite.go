// Package mls is the Messaging Layer Security protocol of RFC 9420 as a library: bytes in, bytes out, without I/O of
// its own. Clients start at NewGroup, JoinGroup and ExternalJoin and keep a Group; servers that order a group's
// handshakes keep a PublicGroup, which checks all that public data shows. A Group writes each change of its state into
// a Batch of the caller's, who makes it durable before a message goes out.
//
// Randomness and time come from Config and the options; their zero values are crypto/rand and time.Now. The
// app_data_dictionary extension and the AppDataUpdate proposal are those of draft-ietf-mls-extensions.
//
// What was received is decoded, checked and applied in separate steps. Decoding is strict, trees and leaves that were
// decoded aren't changed, and a check that fails leaves no trace.
package mls

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/cloudflare/circl/sign/ed448"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/parley-mls/parley/mls/codec"
)

// CipherSuite names the primitives of a group (RFC 9420, Section 17.1).
type CipherSuite uint16

// The cipher suites of RFC 9420, all of which this package implements. Suites 4 and 6 go with basic credentials only:
// they sign with Ed448, which Go's X.509 doesn't have.
const (
	X25519_AES128GCM_SHA256_Ed25519        CipherSuite = 1
	P256_AES128GCM_SHA256_P256             CipherSuite = 2
	X25519_CHACHA20POLY1305_SHA256_Ed25519 CipherSuite = 3
	X448_AES256GCM_SHA512_Ed448            CipherSuite = 4
	P521_AES256GCM_SHA512_P521             CipherSuite = 5
	X448_CHACHA20POLY1305_SHA512_Ed448     CipherSuite = 6
	P384_AES256GCM_SHA384_P384             CipherSuite = 7
)

// CipherSuites returns the suites that this package implements.
func CipherSuites() []CipherSuite {
	return []CipherSuite{X25519_AES128GCM_SHA256_Ed25519, P256_AES128GCM_SHA256_P256,
		X25519_CHACHA20POLY1305_SHA256_Ed25519, X448_AES256GCM_SHA512_Ed448, P521_AES256GCM_SHA512_P521,
		X448_CHACHA20POLY1305_SHA512_Ed448, P384_AES256GCM_SHA384_P384}
}

// suiteParams are a suite's primitives. HPKE's identifiers are those of RFC 9180, Section 7.
type suiteParams struct {
	name              string
	kemID             uint16
	kdfID             uint16
	aeadID            uint16
	kem               ecdh.Curve // nil: X25519 or X448
	kemKeySize        int        // Nsk
	kemHash           crypto.Hash
	hash              crypto.Hash
	hashSize, keySize int
	curve             elliptic.Curve // of ECDSA; nil: Ed25519 or Ed448
	ed448             bool
	newAEAD           func(key []byte) (cipher.AEAD, error)
}

const aeadNonceSize = 12

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

var (
	suite1 = suiteParams{"MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519", kemX25519, 1, 1, nil, 32, crypto.SHA256,
		crypto.SHA256, 32, 16, nil, false, newGCM}
	suite2 = suiteParams{"MLS_128_DHKEMP256_AES128GCM_SHA256_P256", kemP256, 1, 1, ecdh.P256(), 32, crypto.SHA256,
		crypto.SHA256, 32, 16, elliptic.P256(), false, newGCM}
	suite3 = suiteParams{"MLS_128_DHKEMX25519_CHACHA20POLY1305_SHA256_Ed25519", kemX25519, 1, 3, nil, 32, crypto.SHA256,
		crypto.SHA256, 32, 32, nil, false, chacha20poly1305.New}
	suite4 = suiteParams{"MLS_256_DHKEMX448_AES256GCM_SHA512_Ed448", kemX448, 3, 2, nil, 56, crypto.SHA512,
		crypto.SHA512, 64, 32, nil, true, newGCM}
	suite5 = suiteParams{"MLS_256_DHKEMP521_AES256GCM_SHA512_P521", kemP521, 3, 2, ecdh.P521(), 66, crypto.SHA512,
		crypto.SHA512, 64, 32, elliptic.P521(), false, newGCM}
	suite6 = suiteParams{"MLS_256_DHKEMX448_CHACHA20POLY1305_SHA512_Ed448", kemX448, 3, 3, nil, 56, crypto.SHA512,
		crypto.SHA512, 64, 32, nil, true, chacha20poly1305.New}
	suite7 = suiteParams{"MLS_256_DHKEMP384_AES256GCM_SHA384_P384", kemP384, 2, 2, ecdh.P384(), 48, crypto.SHA384,
		crypto.SHA384, 48, 32, elliptic.P384(), false, newGCM}
)

func (cs CipherSuite) lookup() *suiteParams {
	switch cs {
	case X25519_AES128GCM_SHA256_Ed25519:
		return &suite1
	case P256_AES128GCM_SHA256_P256:
		return &suite2
	case X25519_CHACHA20POLY1305_SHA256_Ed25519:
		return &suite3
	case X448_AES256GCM_SHA512_Ed448:
		return &suite4
	case P521_AES256GCM_SHA512_P521:
		return &suite5
	case X448_CHACHA20POLY1305_SHA512_Ed448:
		return &suite6
	case P384_AES256GCM_SHA384_P384:
		return &suite7
	}
	return nil
}

// params panics for a suite that isn't supported; where a suite comes in, Supported is asked.
func (cs CipherSuite) params() *suiteParams {
	p := cs.lookup()
	if p == nil {
		panic("mls: cipher suite not supported: " + cs.String())
	}
	return p
}

// Supported says whether this package implements the suite. The other methods panic if it doesn't, except String and
// VerifyWithLabel.
func (cs CipherSuite) Supported() bool { return cs.lookup() != nil }

// X509 says whether certificates can have the suite's signature keys: Go's crypto/x509 has no Ed448.
func (cs CipherSuite) X509() bool { return !cs.params().ed448 }

// String returns the suite's registered name.
func (cs CipherSuite) String() string {
	if p := cs.lookup(); p != nil {
		return p.name
	}
	return fmt.Sprintf("CipherSuite(%d)", uint16(cs))
}

// HashSize returns the size in bytes of the suite's hash, which is KDF.Nh too.
func (cs CipherSuite) HashSize() int { return cs.params().hashSize }

// Hash returns the suite's hash of b.
func (cs CipherSuite) Hash(b []byte) []byte {
	p := cs.params()
	return sum(p.hash, make([]byte, 0, p.hashSize), b)
}

// RefHash names value by its hash (RFC 9420, Section 5.2). The label is used as it is.
func (cs CipherSuite) RefHash(label string, value []byte) []byte {
	return cs.refHash(label, func(w *codec.Writer) { w.Raw(value) })
}

func (cs CipherSuite) refHash(label string, value func(w *codec.Writer)) []byte {
	return cs.hashOf(func(w *codec.Writer) {
		w.Length(len(label))
		w.String(label)
		w.Vector(value)
	})
}

// hashOf returns the hash of what write writes.
func (cs CipherSuite) hashOf(write func(w *codec.Writer)) []byte {
	w := codec.Scratch()
	defer w.Free()
	write(w)
	return cs.Hash(w.Bytes())
}

func (cs CipherSuite) mac(key secret, data []byte) []byte {
	p := cs.params()
	return hmacSum(p.hash, make([]byte, 0, p.hashSize), key, data)
}

func (cs CipherSuite) verifyMAC(key secret, data, tag []byte) bool {
	return hmac.Equal(cs.mac(key, data), tag)
}

// extract is KDF.Extract, the extract step of HKDF.
func (cs CipherSuite) extract(salt, ikm []byte) secret {
	return hkdfExtract(cs.params().hash, salt, ikm)
}

// expandWithLabel is ExpandWithLabel (RFC 9420, Section 8).
//
//	struct {
//	    uint16 length;
//	    opaque label<V>;
//	    opaque context<V>;
//	} KDFLabel;
func (cs CipherSuite) expandWithLabel(s secret, label string, context []byte, n int) secret {
	b := binary.BigEndian.AppendUint16(make([]byte, 0, 64), uint16(n))
	b = codec.AppendLength(b, len(labelPrefix)+len(label))
	b = append(append(b, labelPrefix...), label...)
	b = codec.AppendLength(b, len(context))
	return hkdfExpand(cs.params().hash, s, n, b, context)
}

const labelPrefix = "MLS 1.0 "

func (cs CipherSuite) deriveSecret(s secret, label string) secret {
	return cs.expandWithLabel(s, label, nil, cs.HashSize())
}

// deriveTreeSecret is DeriveTreeSecret (RFC 9420, Section 9).
func (cs CipherSuite) deriveTreeSecret(s secret, label string, generation uint32, n int) secret {
	return cs.expandWithLabel(s, label, []byte{byte(generation >> 24), byte(generation >> 16), byte(generation >> 8), byte(generation)}, n)
}

func (cs CipherSuite) zeroSecret() secret { return make(secret, cs.HashSize()) }

func (cs CipherSuite) randomSecret(rand io.Reader) (secret, error) {
	s := cs.zeroSecret()
	if _, err := io.ReadFull(rand, s); err != nil {
		return nil, fmt.Errorf("mls: read randomness: %w", err)
	}
	return s, nil
}

func (cs CipherSuite) aeadKeySize() int   { return cs.params().keySize }
func (cs CipherSuite) aeadNonceSize() int { return aeadNonceSize }

func (cs CipherSuite) aeadSeal(key, nonce secret, aad, plaintext []byte) ([]byte, error) {
	a, err := cs.params().newAEAD(key)
	if err != nil {
		return nil, fmt.Errorf("mls: AEAD key: %w", err)
	}
	return a.Seal(nil, nonce, plaintext, aad), nil
}

// aeadOpen fails with ErrDecrypt.
func (cs CipherSuite) aeadOpen(key, nonce secret, aad, ciphertext []byte) ([]byte, error) {
	a, err := cs.params().newAEAD(key)
	if err != nil {
		return nil, fmt.Errorf("mls: AEAD key: %w", err)
	}
	plain, err := a.Open(nil, nonce, ciphertext, aad)
	if err != nil {
		return nil, ErrDecrypt
	}
	return plain, nil
}

// GenerateSignatureKey makes a key of the suite: an ed25519.PrivateKey, an ed448.PrivateKey of circl or an
// *ecdsa.PrivateKey.
func (cs CipherSuite) GenerateSignatureKey(rand io.Reader) (crypto.Signer, error) {
	p := cs.params()
	if p.curve == nil {
		size := ed25519.SeedSize
		if p.ed448 {
			size = ed448.SeedSize
		}
		seed := make([]byte, size)
		if _, err := io.ReadFull(rand, seed); err != nil {
			return nil, fmt.Errorf("mls: generate signature key: %w", err)
		}
		if p.ed448 {
			return ed448.NewKeyFromSeed(seed), nil
		}
		return ed25519.NewKeyFromSeed(seed), nil
	}
	b := make([]byte, (p.curve.Params().BitSize+7)/8)
	for range 256 { // a candidate is out of range with a chance below one half
		if _, err := io.ReadFull(rand, b); err != nil {
			return nil, fmt.Errorf("mls: generate signature key: %w", err)
		}
		if p.curve == elliptic.P521() {
			b[0] &= 1
		}
		if key, err := ecdsa.ParseRawPrivateKey(p.curve, b); err == nil {
			return key, nil
		}
	}
	return nil, errors.New("mls: generate signature key: the source of randomness repeats itself")
}

// SignaturePublicKey encodes a public key for MLS: 32 bytes for Ed25519, 57 for Ed448, an uncompressed
// point for ECDSA (RFC 9420, Section 5.1.1). It fails if the key isn't of the suite's type.
func (cs CipherSuite) SignaturePublicKey(pub crypto.PublicKey) ([]byte, error) {
	p := cs.params()
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		if p.curve == nil && !p.ed448 && len(pub) == ed25519.PublicKeySize {
			return append([]byte(nil), pub...), nil
		}
	case ed448.PublicKey:
		if p.ed448 && len(pub) == ed448.PublicKeySize {
			return append([]byte(nil), pub...), nil
		}
	case *ecdsa.PublicKey:
		if p.curve != nil && pub.Curve == p.curve {
			b, err := pub.Bytes()
			if err != nil {
				return nil, fmt.Errorf("mls: encode signature key: %w", err)
			}
			return b, nil
		}
	}
	return nil, fmt.Errorf("mls: a key of type %T is not one of %v", pub, cs)
}

// ParseSignaturePublicKey decodes what SignaturePublicKey encodes.
func (cs CipherSuite) ParseSignaturePublicKey(b []byte) (crypto.PublicKey, error) {
	p := cs.params()
	if p.ed448 {
		if len(b) != ed448.PublicKeySize {
			return nil, fmt.Errorf("%w: Ed448 key of %d bytes", ErrMalformed, len(b))
		}
		return ed448.PublicKey(append([]byte(nil), b...)), nil
	}
	if p.curve == nil {
		if len(b) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("%w: Ed25519 key of %d bytes", ErrMalformed, len(b))
		}
		return ed25519.PublicKey(append([]byte(nil), b...)), nil
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(p.curve, b)
	if err != nil {
		return nil, fmt.Errorf("%w: signature key: %w", ErrMalformed, err)
	}
	return pub, nil
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

// SignWithLabel signs content under a label (RFC 9420, Section 5.1.2). The signer's key must be of the suite. Ed448
// is the pure one with an empty context (RFC 8032, Section 5.2). ECDSA signatures are ASN.1 DER; Go's take their
// randomness from the system, whatever rand is.
func (cs CipherSuite) SignWithLabel(rand io.Reader, signer crypto.Signer, label string, content []byte) ([]byte, error) {
	return cs.sign(rand, signer, label, func(w *codec.Writer) { w.Raw(content) })
}

// sign is SignWithLabel of what content writes.
func (cs CipherSuite) sign(rand io.Reader, signer crypto.Signer, label string, content func(w *codec.Writer)) ([]byte, error) {
	if _, err := cs.SignaturePublicKey(signer.Public()); err != nil {
		return nil, err
	}
	w := labelled(label, content)
	defer w.Free()
	p, msg := cs.params(), w.Bytes()
	opts := crypto.Hash(0)
	if p.curve != nil {
		msg, opts = cs.Hash(msg), p.hash
	}
	sig, err := signer.Sign(rand, msg, opts)
	if err != nil {
		return nil, fmt.Errorf("mls: sign: %w", err)
	}
	return sig, nil
}

// VerifyWithLabel checks what SignWithLabel signed. It fails with ErrSignature, or ErrMalformed for a bad key.
func (cs CipherSuite) VerifyWithLabel(publicKey []byte, label string, content, signature []byte) error {
	return cs.verify(publicKey, label, func(w *codec.Writer) { w.Raw(content) }, signature)
}

// verify is VerifyWithLabel of what content writes.
func (cs CipherSuite) verify(publicKey []byte, label string, content func(w *codec.Writer), signature []byte) error {
	if !cs.Supported() {
		return fmt.Errorf("%w: %v", ErrUnsupported, cs)
	}
	pub, err := cs.ParseSignaturePublicKey(publicKey)
	if err != nil {
		return err
	}
	w := labelled(label, content)
	defer w.Free()
	msg := w.Bytes()
	var ok bool
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, msg, signature)
	case ed448.PublicKey:
		ok = ed448.Verify(pub, msg, signature, "")
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, cs.Hash(msg), signature)
	}
	if !ok {
		return ErrSignature
	}
	return nil
}

// HPKEPublicKey is an encoded public key of the suite's KEM.
type HPKEPublicKey []byte

// HPKEPrivateKey is an encoded private key of the suite's KEM. It doesn't show itself in formatted output, logs or
// JSON.
type HPKEPrivateKey []byte

// String hides the key, and so do GoString, Format, LogValue and MarshalJSON.
func (HPKEPrivateKey) String() string               { return redacted }
func (HPKEPrivateKey) GoString() string             { return redacted }
func (HPKEPrivateKey) Format(s fmt.State, _ rune)   { _, _ = s.Write([]byte(redacted)) }
func (HPKEPrivateKey) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (HPKEPrivateKey) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// HPKECiphertext is the output of EncryptWithLabel (RFC 9420, Section 7.6).
type HPKECiphertext struct{ KEMOutput, Ciphertext []byte }

// MarshalMLS implements codec.Marshaler.
func (c HPKECiphertext) MarshalMLS(w *codec.Writer) {
	w.Opaque(c.KEMOutput)
	w.Opaque(c.Ciphertext)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *HPKECiphertext) UnmarshalMLS(r *codec.Reader) {
	c.KEMOutput = r.Opaque()
	c.Ciphertext = r.Opaque()
}
