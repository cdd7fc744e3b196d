package mls

import (
	"crypto"
	"crypto/sha256"
	"crypto/sha512"
)

// HMAC (RFC 2104) and HKDF (RFC 5869) over whole hashes of a buffer on the stack. The inputs of MLS's key schedule and
// of HPKE's are short; Go's crypto/hmac, which keeps two hash states on the heap for each key, takes several times as
// long. What is done depends on lengths only, so it takes the same time for all keys of a length.

// sum appends the hash of b.
func sum(h crypto.Hash, out, b []byte) []byte {
	switch h {
	case crypto.SHA256:
		s := sha256.Sum256(b)
		return append(out, s[:]...)
	case crypto.SHA384:
		s := sha512.Sum384(b)
		return append(out, s[:]...)
	default:
		s := sha512.Sum512(b)
		return append(out, s[:]...)
	}
}

func blockSize(h crypto.Hash) int {
	if h == crypto.SHA256 {
		return sha256.BlockSize
	}
	return sha512.BlockSize
}

// hmacSum appends the HMAC of the parts of a message, one after the other.
func hmacSum(h crypto.Hash, out, key []byte, parts ...[]byte) []byte {
	var buf [sha512.BlockSize + 512]byte
	in := buf[:blockSize(h)]
	if len(key) > len(in) {
		sum(h, in[:0], key)
	} else {
		copy(in, key)
	}
	for i := range in {
		in[i] ^= 0x36
	}
	for _, p := range parts {
		in = append(in, p...) // to the heap if it is long
	}
	var digest [sha512.Size]byte
	inner := sum(h, digest[:0], in)
	in = in[:blockSize(h)]
	for i := range in {
		in[i] ^= 0x36 ^ 0x5c
	}
	return sum(h, out, append(in, inner...))
}

// hkdfExtract is HKDF-Extract of key material in parts.
func hkdfExtract(h crypto.Hash, salt []byte, ikm ...[]byte) []byte {
	return hmacSum(h, make([]byte, 0, h.Size()), salt, ikm...)
}

// hkdfExpand is HKDF-Expand for an info in parts; n is at most 255 hashes.
func hkdfExpand(h crypto.Hash, prk []byte, n int, info ...[]byte) []byte {
	parts := make([][]byte, 0, 8)
	parts = append(append(append(parts, nil), info...), nil)
	out := make([]byte, 0, (n+h.Size()-1)/h.Size()*h.Size())
	for counter := byte(1); len(out) < n; counter++ {
		parts[len(parts)-1] = []byte{counter}
		start := len(out)
		out = hmacSum(h, out, prk, parts...)
		parts[0] = out[start:]
	}
	return out[:n:n]
}
