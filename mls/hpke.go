package mls

import (
	"crypto"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls/codec"
)

// HPKE in base mode (RFC 9180). Go's crypto/hpke draws its own randomness, hashes the info for each recipient and
// derives an exporter that MLS uses in one place; here the caller owns the randomness, and the info of an update path
// or a Welcome, which is the same for all recipients, is hashed once.

// hpkeInfo is a hashed info parameter: key_schedule_context of RFC 9180, Section 5.1.
type hpkeInfo struct{ context []byte }

// hpkeInfo prepares the info of EncryptWithLabel (RFC 9420, Section 5.1.3).
func (cs CipherSuite) hpkeInfo(label string, context []byte) hpkeInfo {
	w := labelled(label, func(w *codec.Writer) { w.Raw(context) })
	defer w.Free()
	return cs.hpkeRawInfo(w.Bytes())
}

func (cs CipherSuite) hpkeRawInfo(info []byte) hpkeInfo {
	p, id := cs.params(), cs.hpkeSuiteID()
	c := []byte{0} // mode_base
	c = append(c, labeledExtract(p.hash, id, nil, "psk_id_hash", nil)...)
	c = append(c, labeledExtract(p.hash, id, nil, "info_hash", info)...)
	return hpkeInfo{c}
}

func (cs CipherSuite) hpkeSuiteID() []byte {
	p := cs.params()
	id := binary.BigEndian.AppendUint16([]byte("HPKE"), p.id())
	id = binary.BigEndian.AppendUint16(id, p.kdfID)
	return binary.BigEndian.AppendUint16(id, p.aeadID)
}

// labeledExtract and labeledExpand are RFC 9180, Section 4.
func labeledExtract(h crypto.Hash, suiteID, salt []byte, label string, ikm []byte) []byte {
	return hkdfExtract(h, salt, []byte("HPKE-v1"), suiteID, []byte(label), ikm)
}

func labeledExpand(h crypto.Hash, prk, suiteID []byte, label string, info []byte, n int) []byte {
	return hkdfExpand(h, prk, n, []byte{byte(n >> 8), byte(n)}, []byte("HPKE-v1"), suiteID, []byte(label), info)
}

// GenerateHPKEKey makes a key pair of the suite's KEM with randomness from rand, and fails only if that does.
func (cs CipherSuite) GenerateHPKEKey(rand io.Reader) (HPKEPublicKey, HPKEPrivateKey, error) {
	size, _ := cs.params().seedSizes()
	ikm := make(secret, size)
	defer ikm.erase()
	if _, err := io.ReadFull(rand, ikm); err != nil {
		return nil, nil, fmt.Errorf("mls: generate HPKE key: %w", err)
	}
	return cs.DeriveHPKEKey(ikm)
}

// DeriveHPKEKey is KEM.DeriveKeyPair (RFC 9180, Section 7.1.3; draft-ietf-hpke-pq): the same key pair for the same
// secret, which should have HashSize bytes at least.
func (cs CipherSuite) DeriveHPKEKey(ikm []byte) (HPKEPublicKey, HPKEPrivateKey, error) {
	return cs.params().derive(ikm)
}

// hpkePublicOf returns the public key of a private one.
func (cs CipherSuite) hpkePublicOf(priv HPKEPrivateKey) (HPKEPublicKey, error) {
	return cs.params().public(priv)
}

// checkHPKEPublicKey says whether one can encrypt to pub. A member whose key isn't sound would keep everybody else from
// committing.
func (cs CipherSuite) checkHPKEPublicKey(pub HPKEPublicKey) error { return cs.params().check(pub) }

func (cs CipherSuite) encap(rand io.Reader, pub HPKEPublicKey) (shared, enc []byte, err error) {
	p := cs.params()
	_, size := p.seedSizes()
	seed := make(secret, size)
	defer seed.erase()
	if _, err := io.ReadFull(rand, seed); err != nil {
		return nil, nil, fmt.Errorf("mls: encapsulate: %w", err)
	}
	return p.encap(seed, pub)
}

// hpkeKey derives the key and the first nonce (RFC 9180, Section 5.1). The shared secret is erased.
func (cs CipherSuite) hpkeKey(shared secret, info hpkeInfo) (key, nonce secret) {
	defer shared.erase()
	p, id := cs.params(), cs.hpkeSuiteID()
	s := secret(labeledExtract(p.hash, id, shared, "secret", nil))
	defer s.erase()
	return labeledExpand(p.hash, s, id, "key", info.context, p.keySize),
		labeledExpand(p.hash, s, id, "base_nonce", info.context, aeadNonceSize)
}

// hpkeExport derives an exported secret (RFC 9180, Section 5.3). The shared secret is erased.
func (cs CipherSuite) hpkeExport(shared secret, info hpkeInfo, context string, n int) secret {
	defer shared.erase()
	p, id := cs.params(), cs.hpkeSuiteID()
	s := secret(labeledExtract(p.hash, id, shared, "secret", nil))
	defer s.erase()
	exporter := secret(labeledExpand(p.hash, s, id, "exp", info.context, p.hashSize))
	defer exporter.erase()
	return labeledExpand(p.hash, exporter, id, "sec", []byte(context), n)
}

func (cs CipherSuite) hpkeSeal(rand io.Reader, pub HPKEPublicKey, info hpkeInfo, plaintext []byte) (HPKECiphertext, error) {
	shared, enc, err := cs.encap(rand, pub)
	if err != nil {
		return HPKECiphertext{}, err
	}
	key, nonce := cs.hpkeKey(shared, info)
	defer key.erase()
	ct, err := cs.aeadSeal(key, nonce, nil, plaintext)
	if err != nil {
		return HPKECiphertext{}, err
	}
	return HPKECiphertext{KEMOutput: enc, Ciphertext: ct}, nil
}

// hpkeOpen takes the private key's public one too, if the caller has it; nil computes it.
func (cs CipherSuite) hpkeOpen(priv HPKEPrivateKey, pub HPKEPublicKey, info hpkeInfo, ct HPKECiphertext) ([]byte, error) {
	shared, err := cs.params().decap(priv, pub, ct.KEMOutput)
	if err != nil {
		return nil, err
	}
	key, nonce := cs.hpkeKey(shared, info)
	defer key.erase()
	return cs.aeadOpen(key, nonce, nil, ct.Ciphertext)
}

// EncryptWithLabel encrypts to a public key of the suite (RFC 9420, Section 5.1.3), with randomness from rand. It fails
// with ErrMalformed for a bad key.
func (cs CipherSuite) EncryptWithLabel(rand io.Reader, publicKey HPKEPublicKey, label string, context, plaintext []byte) (HPKECiphertext, error) {
	return cs.hpkeSeal(rand, publicKey, cs.hpkeInfo(label, context), plaintext)
}

// DecryptWithLabel opens what EncryptWithLabel sealed. It fails with ErrDecrypt.
func (cs CipherSuite) DecryptWithLabel(privateKey HPKEPrivateKey, label string, context []byte, ct HPKECiphertext) ([]byte, error) {
	return cs.hpkeOpen(privateKey, nil, cs.hpkeInfo(label, context), ct)
}

const externalInitContext = "MLS 1.0 external init secret"

// externalPub returns the public key for external commits (RFC 9420, Section 8.3).
func (cs CipherSuite) externalPub(externalSecret secret) (HPKEPublicKey, error) {
	pub, priv, err := cs.DeriveHPKEKey(externalSecret)
	secret(priv).erase()
	return pub, err
}

// externalInitSend makes the init secret of an external commit (RFC 9420, Section 8.3).
func (cs CipherSuite) externalInitSend(rand io.Reader, externalPub HPKEPublicKey) (kemOutput []byte, initSecret secret, err error) {
	shared, enc, err := cs.encap(rand, externalPub)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: external init: %w", err)
	}
	return enc, cs.hpkeExport(shared, cs.hpkeRawInfo(nil), externalInitContext, cs.HashSize()), nil
}

// externalInitReceive computes the init secret that a joiner made.
func (cs CipherSuite) externalInitReceive(externalSecret secret, kemOutput []byte) (secret, error) {
	pub, priv, err := cs.DeriveHPKEKey(externalSecret)
	if err != nil {
		return nil, err
	}
	defer secret(priv).erase()
	shared, err := cs.params().decap(priv, pub, kemOutput)
	if err != nil {
		return nil, fmt.Errorf("mls: external init: %w", err)
	}
	return cs.hpkeExport(shared, cs.hpkeRawInfo(nil), externalInitContext, cs.HashSize()), nil
}
