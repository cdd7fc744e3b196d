package mls

import (
	"crypto/ecdh"
	"crypto/sha3"
	"encoding/binary"
	"errors"
	"fmt"

	circlkem "github.com/cloudflare/circl/kem"
	"github.com/cloudflare/circl/kem/mlkem/mlkem1024"
	"github.com/cloudflare/circl/kem/mlkem/mlkem768"
)

// The post-quantum KEMs of draft-ietf-hpke-pq. ML-KEM (FIPS 203) is circl's, which takes a quarter to two thirds of the
// time of Go's (BenchmarkPrimitives) and the caller's randomness. Private keys are seeds, expanded at each use.

// mlKEM is ML-KEM as a KEM of HPKE (draft-ietf-hpke-pq, Section 3).
type mlKEM struct {
	kemID uint16
	circlkem.Scheme
}

var (
	mlkem768KEM  = mlKEM{0x0041, mlkem768.Scheme()}
	mlkem1024KEM = mlKEM{0x0042, mlkem1024.Scheme()}
)

func (k mlKEM) id() uint16                  { return k.kemID }
func (k mlKEM) seedSizes() (key, encap int) { return k.SeedSize(), k.EncapsulationSeedSize() }

func (k mlKEM) derive(ikm []byte) (HPKEPublicKey, HPKEPrivateKey, error) {
	priv := HPKEPrivateKey(deriveSeed(k.kemID, ikm, k.SeedSize()))
	pub, err := k.public(priv)
	return pub, priv, err
}

func (k mlKEM) public(priv HPKEPrivateKey) (HPKEPublicKey, error) {
	if len(priv) != k.SeedSize() {
		return nil, errPrivateKey
	}
	pub, _ := k.DeriveKeyPair(priv)
	return pub.MarshalBinary()
}

// check makes the encapsulation key check (FIPS 203, Section 7.2): the length, and that each coefficient is below the
// modulus.
func (k mlKEM) check(pub HPKEPublicKey) error {
	_, err := k.parse(pub)
	return err
}

func (k mlKEM) parse(pub HPKEPublicKey) (circlkem.PublicKey, error) {
	key, err := k.UnmarshalBinaryPublicKey(pub)
	if err != nil {
		return nil, errPublicKey
	}
	return key, nil
}

func (k mlKEM) encap(seed []byte, pub HPKEPublicKey) (shared, enc []byte, err error) {
	key, err := k.parse(pub)
	if err != nil {
		return nil, nil, err
	}
	enc, shared, err = k.EncapsulateDeterministically(key, seed)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: encapsulate: %w", err)
	}
	return shared, enc, nil
}

// decap makes the ciphertext check (FIPS 203, Section 7.3), which is of the length; other changes give another shared
// secret.
func (k mlKEM) decap(priv HPKEPrivateKey, _ HPKEPublicKey, enc []byte) ([]byte, error) {
	if len(priv) != k.SeedSize() {
		return nil, errPrivateKey
	}
	_, key := k.DeriveKeyPair(priv)
	shared, err := k.Decapsulate(key, enc)
	if err != nil {
		return nil, errKEMOutput
	}
	return shared, nil
}

// hybridKEM combines ML-KEM with a Diffie-Hellman group (draft-ietf-hpke-pq, Section 4; the constructions are those of
// draft-irtf-cfrg-concrete-hybrid-kems). Public keys and ciphertexts are ML-KEM's, then the group's.
type hybridKEM struct {
	kemID      uint16
	label      string
	pq         mlKEM
	t          dhGroup
	candidates int // of a private key of t in a seed; all but one are out of range, if any
}

const hybridSeedSize = 32

var (
	mlkem768P256   = &hybridKEM{0x0050, "MLKEM768-P256", mlkem768KEM, nistGroup{ecdh.P256(), 32}, 4}
	mlkem1024P384  = &hybridKEM{0x0051, "MLKEM1024-P384", mlkem1024KEM, nistGroup{ecdh.P384(), 48}, 1}
	mlkem768X25519 = &hybridKEM{0x647a, `\.//^\`, mlkem768KEM, x25519Group{}, 1} // X-Wing
)

func (k *hybridKEM) id() uint16 { return k.kemID }

func (k *hybridKEM) seedSizes() (key, encap int) {
	return hybridSeedSize, k.pq.EncapsulationSeedSize() + k.candidates*k.t.size()
}

func (k *hybridKEM) derive(ikm []byte) (HPKEPublicKey, HPKEPrivateKey, error) {
	priv := HPKEPrivateKey(deriveSeed(k.kemID, ikm, hybridSeedSize))
	pub, err := k.public(priv)
	return pub, priv, err
}

// expand makes the private keys of both parts from a seed.
func (k *hybridKEM) expand(priv HPKEPrivateKey) (pq HPKEPrivateKey, t dhKey, err error) {
	if len(priv) != hybridSeedSize {
		return nil, nil, errPrivateKey
	}
	n := k.pq.SeedSize()
	b := sha3.SumSHAKE256(priv, n+k.candidates*k.t.size())
	if t, err = k.dhKey(b[n:]); err != nil {
		return nil, nil, err
	}
	return b[:n], t, nil
}

// dhKey takes the first candidate in range: RandomScalar.
func (k *hybridKEM) dhKey(candidates []byte) (dhKey, error) {
	for ; len(candidates) > 0; candidates = candidates[k.t.size():] {
		if key, err := k.t.key(candidates[:k.t.size()]); err == nil {
			return key, nil
		}
	}
	return nil, errors.New("mls: derive HPKE key: no candidate in range")
}

func (k *hybridKEM) public(priv HPKEPrivateKey) (HPKEPublicKey, error) {
	pq, t, err := k.expand(priv)
	if err != nil {
		return nil, err
	}
	pub, err := k.pq.public(pq)
	if err != nil {
		return nil, err
	}
	return append(pub, t.public()...), nil
}

// check is that of both parts.
func (k *hybridKEM) check(pub HPKEPublicKey) error {
	n := k.pq.PublicKeySize()
	if len(pub) < n {
		return errPublicKey
	}
	if err := k.t.check(pub[n:]); err != nil {
		return err
	}
	return k.pq.check(pub[:n])
}

func (k *hybridKEM) encap(seed []byte, pub HPKEPublicKey) (shared, enc []byte, err error) {
	n, m := k.pq.PublicKeySize(), k.pq.EncapsulationSeedSize()
	if len(pub) < n {
		return nil, nil, errPublicKey
	}
	ephemeral, err := k.dhKey(seed[m:])
	if err != nil {
		return nil, nil, err
	}
	sharedT, err := ephemeral.dh(pub[n:])
	if err != nil {
		return nil, nil, err
	}
	sharedPQ, enc, err := k.pq.encap(seed[:m], pub[:n])
	if err != nil {
		return nil, nil, err
	}
	encT := ephemeral.public()
	return k.combine(sharedPQ, sharedT, encT, pub[n:]), append(enc, encT...), nil
}

func (k *hybridKEM) decap(priv HPKEPrivateKey, _ HPKEPublicKey, enc []byte) ([]byte, error) {
	pq, t, err := k.expand(priv)
	if err != nil {
		return nil, err
	}
	n := k.pq.CiphertextSize()
	if len(enc) < n {
		return nil, errKEMOutput
	}
	sharedT, err := t.dh(enc[n:])
	if err != nil {
		return nil, errKEMOutput
	}
	sharedPQ, err := k.pq.decap(pq, nil, enc[:n])
	if err != nil {
		return nil, err
	}
	return k.combine(sharedPQ, sharedT, enc[n:], t.public()), nil
}

func (k *hybridKEM) combine(sharedPQ, sharedT, encT, pubT []byte) []byte {
	h := sha3.New256()
	for _, b := range [][]byte{sharedPQ, sharedT, encT, pubT, []byte(k.label)} {
		h.Write(b)
	}
	return h.Sum(nil)
}

// deriveSeed is SHAKE256.LabeledDerive(ikm, "DeriveKeyPair", "", n) of a KEM (draft-ietf-hpke-pq, Sections 3 and 4).
func deriveSeed(kemID uint16, ikm []byte, n int) []byte {
	const label = "DeriveKeyPair"
	b := append([]byte(nil), ikm...)
	b = append(b, "HPKE-v1"...)
	b = append(b, kemSuiteID(kemID)...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(label)))
	b = append(b, label...)
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	return sha3.SumSHAKE256(b, n)
}
