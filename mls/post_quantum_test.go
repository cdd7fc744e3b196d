package mls

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	circlsign "github.com/cloudflare/circl/sign"
	"github.com/cloudflare/circl/sign/mldsa/mldsa65"

	"github.com/parley-mls/parley/mls/codec"
)

// TestPostQuantumSizes holds the suites to the sizes of FIPS 203 and 204 and of draft-ietf-hpke-pq.
func TestPostQuantumSizes(t *testing.T) {
	for cs, want := range map[CipherSuite]struct{ pub, priv, enc, sigKey, sig int }{
		MLKEM768X25519_AES128GCM_SHA256_Ed25519:        {1216, 32, 1120, 32, 64},
		MLKEM768P256_AES256GCM_SHA384_P256:             {1249, 32, 1153, 65, 0},
		MLKEM1024P384_AES256GCM_SHA384_P384:            {1665, 32, 1665, 97, 0},
		MLKEM768_AES256GCM_SHA384_Ed25519:              {1184, 64, 1088, 32, 64},
		MLKEM1024_AES256GCM_SHA384_P384:                {1568, 64, 1568, 97, 0},
		MLKEM768X25519_CHACHA20POLY1305_SHA384_MLDSA44: {1216, 32, 1120, 1312, 2420},
		MLKEM768_AES256GCM_SHA384_MLDSA65:              {1184, 64, 1088, 1952, 3309},
		MLKEM1024_AES256GCM_SHA384_MLDSA87:             {1568, 64, 1568, 2592, 4627},
	} {
		pub, priv, err := cs.GenerateHPKEKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ct, err := cs.EncryptWithLabel(rand.Reader, pub, "l", nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		signer := newSigner(t, cs)
		key, err := cs.SignaturePublicKey(signer.Public())
		if err != nil {
			t.Fatal(err)
		}
		sig, err := cs.SignWithLabel(rand.Reader, signer, "l", nil)
		if err != nil {
			t.Fatal(err)
		}
		if want.sig == 0 { // ECDSA, in DER
			want.sig = len(sig)
		}
		if len(pub) != want.pub || len(priv) != want.priv || len(ct.KEMOutput) != want.enc || len(key) != want.sigKey || len(sig) != want.sig {
			t.Errorf("%v: public key %d, private key %d, KEM output %d, signature key %d, signature %d bytes; want %v",
				cs, len(pub), len(priv), len(ct.KEMOutput), len(key), len(sig), want)
		}
	}
}

func TestMLDSAIsPureWithoutContext(t *testing.T) {
	const cs = MLKEM768_AES256GCM_SHA384_MLDSA65
	signer := newSigner(t, cs)
	key := signer.(*mldsa65.PrivateKey)
	pub, _ := cs.SignaturePublicKey(signer.Public())
	msg := labelled("label", func(w *codec.Writer) { w.Raw([]byte("content")) }).Bytes()
	sign := func(context string, msg []byte) []byte {
		sig := make([]byte, mldsa65.SignatureSize)
		if err := mldsa65.SignTo(key, msg, []byte(context), true, sig); err != nil {
			t.Fatal(err)
		}
		return sig
	}
	if err := cs.VerifyWithLabel(pub, "label", []byte("content"), sign("", msg)); err != nil {
		t.Errorf("randomized signature: %v", err)
	}
	good, err := cs.SignWithLabel(rand.Reader, signer, "label", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	for what, other := range map[string][]byte{"with a context": sign("context", msg), "of a hash": sign("", cs.Hash(msg)),
		"cut": good[1:], "too short": good[:len(good)-1], "too long": append(good[:len(good):len(good)], 0), "empty": nil} {
		if err := cs.VerifyWithLabel(pub, "label", []byte("content"), other); !errors.Is(err, ErrSignature) {
			t.Errorf("signature %s: got %v, want ErrSignature", what, err)
		}
	}
	if err := cs.VerifyWithLabel(pub[:len(pub)-1], "label", []byte("content"), good); !errors.Is(err, ErrMalformed) {
		t.Errorf("short key: got %v, want ErrMalformed", err)
	}
}

// TestSignersMayHideTheirKey signs with what implements crypto.Signer and no more, as a key in hardware would.
func TestSignersMayHideTheirKey(t *testing.T) {
	for _, cs := range CipherSuites() {
		hidden := struct{ crypto.Signer }{newSigner(t, cs)}
		if _, ok := hidden.Signer.(circlsign.PrivateKey); ok {
			if _, ok := any(hidden).(circlsign.PrivateKey); ok {
				t.Fatal("the key shows")
			}
		}
		sig, err := cs.SignWithLabel(rand.Reader, hidden, "label", nil)
		if err != nil {
			t.Fatal(err)
		}
		pub, _ := cs.SignaturePublicKey(hidden.Public())
		if err := cs.VerifyWithLabel(pub, "label", nil, sig); err != nil {
			t.Errorf("%v: %v", cs, err)
		}
	}
}

// TestKEMOutputsOfAnotherKeyAreRejectedImplicitly: ML-KEM tells nobody that a KEM output was changed; the AEAD does.
func TestKEMOutputsOfAnotherKeyAreRejectedImplicitly(t *testing.T) {
	for _, k := range []kem{mlkem768KEM, mlkem1024KEM, mlkem768X25519, mlkem768P256, mlkem1024P384} {
		key, seed := k.seedSizes()
		pub, priv, err := k.derive(make([]byte, key))
		if err != nil {
			t.Fatal(err)
		}
		shared, enc, err := k.encap(bytes.Repeat([]byte{1}, seed), pub)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := k.decap(priv, nil, enc); err != nil || !bytes.Equal(got, shared) {
			t.Errorf("%#x: shared secrets differ: %v", k.id(), err)
		}
		enc[0] ^= 1
		if got, err := k.decap(priv, nil, enc); err != nil || bytes.Equal(got, shared) {
			t.Errorf("%#x: changed KEM output gives the same secret, or %v", k.id(), err)
		}
	}
}

// TestScalarsOutOfRangeAreRejected: of the candidates for a private key, the first in range is taken.
func TestScalarsOutOfRangeAreRejected(t *testing.T) {
	for _, k := range []*hybridKEM{mlkem768P256, mlkem1024P384} {
		_, n := k.seedSizes()
		pub, _, err := k.derive(make([]byte, hybridSeedSize))
		if err != nil {
			t.Fatal(err)
		}
		seed := bytes.Repeat([]byte{0xff}, n)
		if _, _, err := k.encap(seed, pub); err == nil {
			t.Errorf("%#x: a key without a candidate in range", k.kemID)
		}
		seed[n-k.t.size()] = 0x7f
		_, enc, err := k.encap(seed, pub)
		if err != nil {
			t.Fatal(err)
		}
		last, err := k.t.key(seed[n-k.t.size():])
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "ephemeral key", enc[k.pq.CiphertextSize():], last.public())
	}
}

func TestSuitesWithASecondNumber(t *testing.T) {
	for alias, own := range map[CipherSuite]CipherSuite{
		8: MLKEM768X25519_AES256GCM_SHA384_Ed25519, 9: MLKEM768P256_AES256GCM_SHA384_P256, 10: MLKEM1024P384_AES256GCM_SHA384_P384,
	} {
		if alias.params() != own.params() || alias.String() != fmt.Sprintf("%v (%#04x)", own, uint16(alias)) {
			t.Errorf("%v is not %v", alias, own)
		}
		r := newRoom(t, alias, nil)
		r.add(r.members[0], "bob", "carol")
		r.commit(r.members[1], CommitOptions{})
		r.join("dave")
		r.check()
		r.talk()
		// The number is part of what everybody signs and hashes: a KeyPackage of the other number is of another suite.
		_, kp, _ := keyPackage(t, own, "eve")
		var invalid *ValidationError
		if _, err := r.members[0].Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}}); !errors.As(err, &invalid) {
			t.Errorf("%v: KeyPackage of %v: got %v, want a ValidationError", alias, own, err)
		}
		_, kp, _ = keyPackage(t, alias, "eve")
		if err := kp.Validate(time.Now(), trustAll{}); err != nil {
			t.Errorf("%v: %v", alias, err)
		}
	}
	for _, cs := range []CipherSuite{0, 11, 0x4d, 0x4e, 0x4f, 0x50, 0x51, 0x52, 0x0a0a, 0xF000, 0xF00C, 0xFFFF} {
		if cs.Supported() {
			t.Errorf("%#04x is supported", uint16(cs))
		}
	}
	seen := make(map[string]bool)
	for _, cs := range CipherSuites() {
		if cs > P384_AES256GCM_SHA384_P384 && cs < 0xF000 || seen[cs.String()] || cs.lookup().suite != cs {
			t.Errorf("%v has number %#04x", cs, uint16(cs))
		}
		seen[cs.String()] = true
	}
}
