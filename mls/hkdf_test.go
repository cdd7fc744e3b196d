package mls

import (
	"bytes"
	"crypto"
	"crypto/hkdf"
	"crypto/hmac"
	"testing"
)

func TestHMACAndHKDFAreGos(t *testing.T) {
	rand := seededRand(1)
	read := func(n int) []byte {
		b := make([]byte, n)
		_, _ = rand.Read(b)
		return b
	}
	for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		for _, keySize := range []int{0, 1, 32, 63, 64, 65, 127, 128, 129, 300} {
			key := read(keySize)
			for _, size := range []int{0, 1, 55, 64, 447, 511, 512, 513} {
				msg := read(size)
				m := hmac.New(h.New, key)
				m.Write(msg)
				if got := hmacSum(h, nil, key, msg[:size/3], nil, msg[size/3:]); !bytes.Equal(got, m.Sum(nil)) {
					t.Fatalf("%v: HMAC of %d bytes with a key of %d", h, size, keySize)
				}
				for _, n := range []int{0, 1, h.Size(), h.Size() + 1, 255 * h.Size()} {
					want, err := hkdf.Expand(h.New, key, string(msg), n)
					if err != nil {
						t.Fatal(err)
					}
					if got := hkdfExpand(h, key, n, msg[:size/2], msg[size/2:]); !bytes.Equal(got, want) {
						t.Fatalf("%v: HKDF-Expand with %d bytes to %d", h, size, n)
					}
				}
			}
		}
	}
}
