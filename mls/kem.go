package mls

import (
	"crypto/ecdh"
	"errors"
	"fmt"

	"github.com/cloudflare/circl/dh/x25519"
	"github.com/cloudflare/circl/dh/x448"
)

// The Diffie-Hellman of HPKE's KEMs (RFC 9180, Section 7.1): circl's X25519, which takes half to two thirds of the time
// of Go's (BenchmarkPrimitives), and X448, which Go doesn't have; Go's NIST curves, which are faster than circl's or,
// on P-384, the constant-time ones.

// KEM identifiers of RFC 9180, Section 7.1.
const (
	kemP256   = 0x0010
	kemP384   = 0x0011
	kemP521   = 0x0012
	kemX25519 = 0x0020
	kemX448   = 0x0021
)

// kemKey is a private key of a KEM.
type kemKey interface {
	private() HPKEPrivateKey
	public() HPKEPublicKey
	// dh fails if pub isn't a point of the curve, or if the shared secret would be zero (RFC 9180, Section 7.1.4).
	dh(pub []byte) ([]byte, error)
}

var (
	errPrivateKey = errors.New("mls: HPKE private key is malformed")
	errPublicKey  = fmt.Errorf("%w: HPKE public key", ErrMalformed)
)

func (p *suiteParams) newKEMKey(b []byte) (kemKey, error) {
	if len(b) != p.kemKeySize {
		return nil, errPrivateKey
	}
	switch p.kemID {
	case kemX25519:
		k := x25519Key(b)
		return &k, nil
	case kemX448:
		k := x448Key(b)
		return &k, nil
	}
	k, err := p.kem.NewPrivateKey(b)
	if err != nil {
		return nil, errPrivateKey // without the cause, which may quote the key
	}
	return (*nistKey)(k), nil
}

// checkHPKEPublicKey says whether one can encrypt to pub: a point of the suite's KEM, of large order. A member whose key
// isn't would keep everybody else from committing.
func (cs CipherSuite) checkHPKEPublicKey(pub HPKEPublicKey) error {
	p := cs.params()
	var ok bool
	switch p.kemID {
	case kemX25519:
		ok = len(pub) == x25519.Size && !x25519LowOrder(pub)
	case kemX448:
		ok = len(pub) == x448.Size && !x448LowOrder(pub)
	default:
		_, err := p.kem.NewPublicKey(pub)
		ok = err == nil
	}
	if !ok {
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
