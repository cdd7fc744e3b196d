package mls

import (
	"crypto"
	"crypto/ecdh"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cloudflare/circl/dh/x25519"
	"github.com/cloudflare/circl/dh/x448"
)

// kem is a key encapsulation mechanism of HPKE (RFC 9180, Section 4). Its randomness is the caller's.
type kem interface {
	id() uint16
	// seedSizes are the bytes of randomness of a new key, which go through derive, and of an encapsulation.
	seedSizes() (key, encap int)
	// derive is DeriveKeyPair.
	derive(ikm []byte) (HPKEPublicKey, HPKEPrivateKey, error)
	// public returns the public key of a private one. It fails with errPrivateKey.
	public(priv HPKEPrivateKey) (HPKEPublicKey, error)
	// check says whether one can encapsulate to pub, at less cost than encap. It fails with errPublicKey.
	check(pub HPKEPublicKey) error
	// encap is Encap. It fails with errPublicKey.
	encap(seed []byte, pub HPKEPublicKey) (shared, enc []byte, err error)
	// decap is Decap. It fails with errPrivateKey or errKEMOutput. pub belongs to priv; nil computes it.
	decap(priv HPKEPrivateKey, pub HPKEPublicKey, enc []byte) (shared []byte, err error)
}

var (
	errPrivateKey = errors.New("mls: HPKE private key is malformed")
	errPublicKey  = fmt.Errorf("%w: HPKE public key", ErrMalformed)
	errKEMOutput  = fmt.Errorf("%w: KEM output is malformed", ErrDecrypt)
)

func kemSuiteID(id uint16) []byte { return binary.BigEndian.AppendUint16([]byte("KEM"), id) }

// dhKEM is DHKEM (RFC 9180, Section 4.1).
type dhKEM struct {
	kemID uint16
	dhGroup
	hash crypto.Hash
}

// The KEMs of RFC 9180, Section 7.1.
var (
	dhkemP256   = &dhKEM{0x0010, nistGroup{ecdh.P256(), 32}, crypto.SHA256}
	dhkemP384   = &dhKEM{0x0011, nistGroup{ecdh.P384(), 48}, crypto.SHA384}
	dhkemP521   = &dhKEM{0x0012, nistGroup{ecdh.P521(), 66}, crypto.SHA512}
	dhkemX25519 = &dhKEM{0x0020, x25519Group{}, crypto.SHA256}
	dhkemX448   = &dhKEM{0x0021, x448Group{}, crypto.SHA512}
)

func (k *dhKEM) id() uint16                  { return k.kemID }
func (k *dhKEM) seedSizes() (key, encap int) { return k.size(), k.size() }

func (k *dhKEM) derive(ikm []byte) (HPKEPublicKey, HPKEPrivateKey, error) {
	key, err := k.deriveKey(ikm)
	if err != nil {
		return nil, nil, err
	}
	return key.public(), key.private(), nil
}

func (k *dhKEM) deriveKey(ikm []byte) (dhKey, error) {
	id := kemSuiteID(k.kemID)
	prk := labeledExtract(k.hash, id, nil, "dkp_prk", ikm)
	nist, ok := k.dhGroup.(nistGroup)
	if !ok {
		return k.key(labeledExpand(k.hash, prk, id, "sk", nil, k.size()))
	}
	for counter := range 256 {
		b := labeledExpand(k.hash, prk, id, "candidate", []byte{byte(counter)}, k.size())
		if nist.curve == ecdh.P521() {
			b[0] &= 1
		}
		if key, err := k.key(b); err == nil {
			return key, nil
		}
	}
	return nil, errors.New("mls: derive HPKE key: no candidate in range")
}

func (k *dhKEM) public(priv HPKEPrivateKey) (HPKEPublicKey, error) {
	key, err := k.key(priv)
	if err != nil {
		return nil, err
	}
	return key.public(), nil
}

func (k *dhKEM) encap(seed []byte, pub HPKEPublicKey) (shared, enc []byte, err error) {
	ephemeral, err := k.deriveKey(seed)
	if err != nil {
		return nil, nil, err
	}
	dh, err := ephemeral.dh(pub)
	if err != nil {
		return nil, nil, err
	}
	enc = ephemeral.public()
	return k.shared(dh, enc, pub), enc, nil
}

func (k *dhKEM) decap(priv HPKEPrivateKey, pub HPKEPublicKey, enc []byte) ([]byte, error) {
	key, err := k.key(priv)
	if err != nil {
		return nil, err
	}
	dh, err := key.dh(enc)
	if err != nil {
		return nil, errKEMOutput
	}
	if pub == nil {
		pub = key.public()
	}
	return k.shared(dh, enc, pub), nil
}

// shared is ExtractAndExpand.
func (k *dhKEM) shared(dh, enc, pub []byte) []byte {
	id := kemSuiteID(k.kemID)
	prk := labeledExtract(k.hash, id, nil, "eae_prk", dh)
	kemContext := append(append(make([]byte, 0, len(enc)+len(pub)), enc...), pub...)
	return labeledExpand(k.hash, prk, id, "shared_secret", kemContext, k.hash.Size())
}

// dhGroup is a Diffie-Hellman group: circl's X25519, which takes half to two thirds of the time of Go's
// (BenchmarkPrimitives), and X448, which Go doesn't have; Go's NIST curves, which are faster than circl's or, on P-384,
// the constant-time ones.
type dhGroup interface {
	size() int // of a private key
	// key fails with errPrivateKey.
	key(private []byte) (dhKey, error)
	// check fails with errPublicKey unless pub is a point of the group, of large order. A member whose key isn't would
	// keep everybody else from committing.
	check(pub HPKEPublicKey) error
}

// dhKey is a private key of a dhGroup.
type dhKey interface {
	private() HPKEPrivateKey
	public() HPKEPublicKey
	// dh fails with errPublicKey if pub isn't a point of the group, or if the shared secret would be zero (RFC 9180,
	// Section 7.1.4).
	dh(pub []byte) ([]byte, error)
}

type nistGroup struct {
	curve  ecdh.Curve
	scalar int
}

func (g nistGroup) size() int { return g.scalar }

func (g nistGroup) key(b []byte) (dhKey, error) {
	k, err := g.curve.NewPrivateKey(b)
	if err != nil {
		return nil, errPrivateKey // without the cause, which may quote the key
	}
	return (*nistKey)(k), nil
}

func (g nistGroup) check(pub HPKEPublicKey) error {
	if _, err := g.curve.NewPublicKey(pub); err != nil {
		return errPublicKey
	}
	return nil
}

type nistKey ecdh.PrivateKey

func (k *nistKey) private() HPKEPrivateKey { return (*ecdh.PrivateKey)(k).Bytes() }
func (k *nistKey) public() HPKEPublicKey   { return (*ecdh.PrivateKey)(k).PublicKey().Bytes() }

func (k *nistKey) dh(pub []byte) ([]byte, error) {
	own := (*ecdh.PrivateKey)(k)
	pk, err := own.Curve().NewPublicKey(pub)
	if err != nil {
		return nil, errPublicKey
	}
	return own.ECDH(pk)
}

type x25519Group struct{}

func (x25519Group) size() int { return x25519.Size }

func (x25519Group) key(b []byte) (dhKey, error) {
	if len(b) != x25519.Size {
		return nil, errPrivateKey
	}
	k := x25519Key(b)
	return &k, nil
}

func (x25519Group) check(pub HPKEPublicKey) error {
	if len(pub) != x25519.Size || x25519LowOrder(pub) {
		return errPublicKey
	}
	return nil
}

type x25519Key x25519.Key

func (k *x25519Key) private() HPKEPrivateKey { return k[:] }

func (k *x25519Key) public() HPKEPublicKey {
	var pub x25519.Key
	x25519.KeyGen(&pub, (*x25519.Key)(k))
	return pub[:]
}

func (k *x25519Key) dh(pub []byte) ([]byte, error) {
	if len(pub) != x25519.Size {
		return nil, errPublicKey
	}
	var shared x25519.Key
	peer := x25519.Key(pub)
	if !x25519.Shared(&shared, (*x25519.Key)(k), &peer) {
		return nil, errPublicKey
	}
	return shared[:], nil
}

// x25519LowOrder says whether a public key is one of the points with which every shared secret is zero (RFC 7748,
// Section 6.1): 0, 1, the two of order 8, and p-1, p and p+1. X25519 ignores the highest bit.
func x25519LowOrder(pub []byte) bool {
	b := [x25519.Size]byte(pub)
	b[31] &= 0x7f
	switch string(b[:]) {
	case "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"\xe0\xeb\x7a\x7c\x3b\x41\xb8\xae\x16\x56\xe3\xfa\xf1\x9f\xc4\x6a\xda\x09\x8d\xeb\x9c\x32\xb1\xfd\x86\x62\x05\x16\x5f\x49\xb8\x00",
		"\x5f\x9c\x95\xbc\xa3\x50\x8c\x24\xb1\xd0\xb1\x55\x9c\x83\xef\x5b\x04\x44\x5c\xc4\x58\x1c\x8e\x86\xd8\x22\x4e\xdd\xd0\x9f\x11\x57",
		"\xec\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
		"\xed\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
		"\xee\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f":
		return true
	}
	return false
}

type x448Group struct{}

func (x448Group) size() int { return x448.Size }

func (x448Group) key(b []byte) (dhKey, error) {
	if len(b) != x448.Size {
		return nil, errPrivateKey
	}
	k := x448Key(b)
	return &k, nil
}

func (x448Group) check(pub HPKEPublicKey) error {
	if len(pub) != x448.Size || x448LowOrder(pub) {
		return errPublicKey
	}
	return nil
}

type x448Key x448.Key

func (k *x448Key) private() HPKEPrivateKey { return k[:] }

func (k *x448Key) public() HPKEPublicKey {
	var pub x448.Key
	x448.KeyGen(&pub, (*x448.Key)(k))
	return pub[:]
}

func (k *x448Key) dh(pub []byte) ([]byte, error) {
	if len(pub) != x448.Size {
		return nil, errPublicKey
	}
	var shared x448.Key
	peer := x448.Key(pub)
	if !x448.Shared(&shared, (*x448.Key)(k), &peer) {
		return nil, errPublicKey
	}
	return shared[:], nil
}

// x448LowOrder says whether a public key is one of the points with which every shared secret is zero (RFC 7748,
// Section 6.2): 0, 1, p-1, p and p+1, where p is 2^448 - 2^224 - 1. X448 uses all bits.
func x448LowOrder(pub []byte) bool {
	const (
		zeros = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // 27
		ones  = "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"
	)
	switch string(pub) {
	case "\x00" + zeros + "\x00" + zeros, "\x01" + zeros + "\x00" + zeros,
		"\xfe" + ones + "\xfe" + ones, "\xff" + ones + "\xfe" + ones, "\x00" + zeros + "\xff" + ones:
		return true
	}
	return false
}
