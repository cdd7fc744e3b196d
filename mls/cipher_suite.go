package mls

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/parley-mls/parley/mls/codec"
)

// CipherSuite names the primitives of a group (RFC 9420, Section 17.1).
type CipherSuite uint16

// The cipher suites of RFC 9420.
const (
	X25519_AES128GCM_SHA256_Ed25519        CipherSuite = 1
	P256_AES128GCM_SHA256_P256             CipherSuite = 2
	X25519_CHACHA20POLY1305_SHA256_Ed25519 CipherSuite = 3
	X448_AES256GCM_SHA512_Ed448            CipherSuite = 4
	P521_AES256GCM_SHA512_P521             CipherSuite = 5
	X448_CHACHA20POLY1305_SHA512_Ed448     CipherSuite = 6
	P384_AES256GCM_SHA384_P384             CipherSuite = 7
)

// The post-quantum cipher suites of draft-ietf-mls-pq-ciphersuites-06: their key encapsulation withstands quantum
// computers, and so do the signatures of the last three. IANA has assigned no code points yet; these are of the block for
// private use (RFC 9420, Section 17.1), in the draft's order, and will change. Groups can't change their suite, so the
// numbers below become aliases then.
const (
	MLKEM768X25519_AES128GCM_SHA256_Ed25519        CipherSuite = 0xF001
	MLKEM768X25519_AES256GCM_SHA384_Ed25519        CipherSuite = 0xF002
	MLKEM768P256_AES128GCM_SHA256_P256             CipherSuite = 0xF003
	MLKEM768P256_AES256GCM_SHA384_P256             CipherSuite = 0xF004
	MLKEM1024P384_AES256GCM_SHA384_P384            CipherSuite = 0xF005
	MLKEM768_AES256GCM_SHA384_Ed25519              CipherSuite = 0xF006
	MLKEM768_AES256GCM_SHA384_P256                 CipherSuite = 0xF007
	MLKEM1024_AES256GCM_SHA384_P384                CipherSuite = 0xF008
	MLKEM768X25519_CHACHA20POLY1305_SHA384_MLDSA44 CipherSuite = 0xF009
	MLKEM768_AES256GCM_SHA384_MLDSA65              CipherSuite = 0xF00A
	MLKEM1024_AES256GCM_SHA384_MLDSA87             CipherSuite = 0xF00B
)

// suiteParams are a suite's primitives.
type suiteParams struct {
	suite CipherSuite
	name  string // registered
	kem
	kdf
	aead
	sig signatureScheme
}

// kdf is HKDF with a hash, which is the suite's (RFC 9180, Section 7.2).
type kdf struct {
	kdfID    uint16
	hash     crypto.Hash
	hashSize int
}

// aead is an AEAD (RFC 9180, Section 7.3).
type aead struct {
	aeadID  uint16
	keySize int
	newAEAD func(key []byte) (cipher.AEAD, error)
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
	hkdfSHA256 = kdf{1, crypto.SHA256, 32}
	hkdfSHA384 = kdf{2, crypto.SHA384, 48}
	hkdfSHA512 = kdf{3, crypto.SHA512, 64}

	aes128GCM        = aead{1, 16, newGCM}
	aes256GCM        = aead{2, 32, newGCM}
	chaCha20Poly1305 = aead{3, chacha20poly1305.KeySize, chacha20poly1305.New}
)

var suites = [...]suiteParams{
	{X25519_AES128GCM_SHA256_Ed25519, "MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519", dhkemX25519, hkdfSHA256, aes128GCM, ed25519Scheme{}},
	{P256_AES128GCM_SHA256_P256, "MLS_128_DHKEMP256_AES128GCM_SHA256_P256", dhkemP256, hkdfSHA256, aes128GCM, ecdsaP256},
	{X25519_CHACHA20POLY1305_SHA256_Ed25519, "MLS_128_DHKEMX25519_CHACHA20POLY1305_SHA256_Ed25519", dhkemX25519, hkdfSHA256, chaCha20Poly1305, ed25519Scheme{}},
	{X448_AES256GCM_SHA512_Ed448, "MLS_256_DHKEMX448_AES256GCM_SHA512_Ed448", dhkemX448, hkdfSHA512, aes256GCM, pureEd448},
	{P521_AES256GCM_SHA512_P521, "MLS_256_DHKEMP521_AES256GCM_SHA512_P521", dhkemP521, hkdfSHA512, aes256GCM, ecdsaP521},
	{X448_CHACHA20POLY1305_SHA512_Ed448, "MLS_256_DHKEMX448_CHACHA20POLY1305_SHA512_Ed448", dhkemX448, hkdfSHA512, chaCha20Poly1305, pureEd448},
	{P384_AES256GCM_SHA384_P384, "MLS_256_DHKEMP384_AES256GCM_SHA384_P384", dhkemP384, hkdfSHA384, aes256GCM, ecdsaP384},

	{MLKEM768X25519_AES128GCM_SHA256_Ed25519, "MLS_128_MLKEM768X25519_AES128GCM_SHA256_Ed25519", mlkem768X25519, hkdfSHA256, aes128GCM, ed25519Scheme{}},
	{MLKEM768X25519_AES256GCM_SHA384_Ed25519, "MLS_128_MLKEM768X25519_AES256GCM_SHA384_Ed25519", mlkem768X25519, hkdfSHA384, aes256GCM, ed25519Scheme{}},
	{MLKEM768P256_AES128GCM_SHA256_P256, "MLS_128_MLKEM768P256_AES128GCM_SHA256_P256", mlkem768P256, hkdfSHA256, aes128GCM, ecdsaP256},
	{MLKEM768P256_AES256GCM_SHA384_P256, "MLS_128_MLKEM768P256_AES256GCM_SHA384_P256", mlkem768P256, hkdfSHA384, aes256GCM, ecdsaP256},
	{MLKEM1024P384_AES256GCM_SHA384_P384, "MLS_192_MLKEM1024P384_AES256GCM_SHA384_P384", mlkem1024P384, hkdfSHA384, aes256GCM, ecdsaP384},
	{MLKEM768_AES256GCM_SHA384_Ed25519, "MLS_128_MLKEM768_AES256GCM_SHA384_Ed25519", mlkem768KEM, hkdfSHA384, aes256GCM, ed25519Scheme{}},
	{MLKEM768_AES256GCM_SHA384_P256, "MLS_128_MLKEM768_AES256GCM_SHA384_P256", mlkem768KEM, hkdfSHA384, aes256GCM, ecdsaP256},
	{MLKEM1024_AES256GCM_SHA384_P384, "MLS_192_MLKEM1024_AES256GCM_SHA384_P384", mlkem1024KEM, hkdfSHA384, aes256GCM, ecdsaP384},
	{MLKEM768X25519_CHACHA20POLY1305_SHA384_MLDSA44, "MLS_128_MLKEM768X25519_CHACHA20POLY1305_SHA384_MLDSA44", mlkem768X25519, hkdfSHA384, chaCha20Poly1305, mlDSA44},
	{MLKEM768_AES256GCM_SHA384_MLDSA65, "MLS_192_MLKEM768_AES256GCM_SHA384_MLDSA65", mlkem768KEM, hkdfSHA384, aes256GCM, mlDSA65},
	{MLKEM1024_AES256GCM_SHA384_MLDSA87, "MLS_256_MLKEM1024_AES256GCM_SHA384_MLDSA87", mlkem1024KEM, hkdfSHA384, aes256GCM, mlDSA87},
}

// suiteAliases are other numbers for suites of the table, with the same primitives: 0x0008 to 0x000a are what MLS++ has
// for three. 0x004d is none of the table's: OpenMLS means X-Wing, ChaCha20-Poly1305 and SHA-256 with Ed25519 by it,
// ts-mls 1 ML-KEM-512. Nor are the numbers up to 0x0058, about which those two differ.
var suiteAliases = map[CipherSuite]CipherSuite{
	0x0008: MLKEM768X25519_AES256GCM_SHA384_Ed25519,
	0x0009: MLKEM768P256_AES256GCM_SHA384_P256,
	0x000a: MLKEM1024P384_AES256GCM_SHA384_P384,
}

// suiteRows has the rows of suites, counted from 1, by number.
var suiteRows = func() (rows [1 << 16]uint8) {
	for i := range suites {
		rows[suites[i].suite] = uint8(i + 1)
	}
	for alias, cs := range suiteAliases {
		rows[alias] = rows[cs]
	}
	return rows
}()

func (cs CipherSuite) lookup() *suiteParams {
	if row := suiteRows[cs]; row > 0 {
		return &suites[row-1]
	}
	return nil
}

// CipherSuites returns the suites that this package implements: the seven of RFC 9420 and the eleven post-quantum ones.
func CipherSuites() []CipherSuite {
	all := make([]CipherSuite, len(suites))
	for i := range suites {
		all[i] = suites[i].suite
	}
	return all
}

// params panics for a suite that isn't supported; where a suite comes in, Supported is asked.
func (cs CipherSuite) params() *suiteParams {
	p := cs.lookup()
	if p == nil {
		panic("mls: cipher suite not supported: " + cs.String())
	}
	return p
}

// Supported says whether this package implements the suite: one of CipherSuites, or 0x0008, 0x0009 or 0x000a, which are
// second numbers of three of them. The other methods panic if it doesn't, except String and VerifyWithLabel.
func (cs CipherSuite) Supported() bool { return cs.lookup() != nil }

// X509 says whether certificates can have the suite's signature keys. There are none of Ed448 in Go; those of ML-DSA (RFC
// 9881) are the authentication service's to decode, since crypto/x509 leaves their public key out.
func (cs CipherSuite) X509() bool { return cs.params().sig != signatureScheme(pureEd448) }

// SignatureScheme names the suite's signature scheme as the names of suites do: "Ed25519", "P256", "MLDSA44" and so on.
// Suites of the same scheme have the same keys and signatures.
func (cs CipherSuite) SignatureScheme() string {
	name := cs.params().name
	return name[strings.LastIndexByte(name, '_')+1:]
}

// String returns the suite's registered name; with its number, if that isn't the suite's own.
func (cs CipherSuite) String() string {
	switch p := cs.lookup(); {
	case p == nil:
		return fmt.Sprintf("CipherSuite(%d)", uint16(cs))
	case p.suite != cs:
		return fmt.Sprintf("%s (%#04x)", p.name, uint16(cs))
	default:
		return p.name
	}
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

// HPKEPublicKey is an encoded public key of the suite's KEM (RFC 9420, Section 5.1.1; RFC 9180, Section 7.1.1;
// draft-ietf-hpke-pq).
type HPKEPublicKey []byte

// HPKEPrivateKey is an encoded private key of the suite's KEM (RFC 9180, Section 7.1.2); of the post-quantum KEMs its seed
// (draft-ietf-hpke-pq). It doesn't show itself in formatted output, in logs, or in JSON and other text, and gob refuses it.
type HPKEPrivateKey []byte

// String hides the key, and so do GoString, Format, LogValue, MarshalJSON and MarshalText; GobEncode fails.
func (HPKEPrivateKey) String() string               { return redacted }
func (HPKEPrivateKey) GoString() string             { return redacted }
func (HPKEPrivateKey) Format(s fmt.State, _ rune)   { _, _ = s.Write([]byte(redacted)) }
func (HPKEPrivateKey) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (HPKEPrivateKey) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (HPKEPrivateKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (HPKEPrivateKey) GobEncode() ([]byte, error)   { return nil, errGob }

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
