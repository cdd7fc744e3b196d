package mls

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	gohpke "crypto/hpke"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	circlhpke "github.com/cloudflare/circl/hpke"
	"github.com/cloudflare/circl/sign/ed448"

	"github.com/parley-mls/parley/mls/codec"
)

func TestHPKEAgreesWithTheStandardLibrary(t *testing.T) {
	info, plain := []byte("info"), []byte("plaintext")
	for _, c := range []struct {
		cs   CipherSuite
		kem  gohpke.KEM
		kdf  gohpke.KDF
		aead gohpke.AEAD
	}{
		{1, gohpke.DHKEM(ecdh.X25519()), gohpke.HKDFSHA256(), gohpke.AES128GCM()},
		{2, gohpke.DHKEM(ecdh.P256()), gohpke.HKDFSHA256(), gohpke.AES128GCM()},
		{3, gohpke.DHKEM(ecdh.X25519()), gohpke.HKDFSHA256(), gohpke.ChaCha20Poly1305()},
		{5, gohpke.DHKEM(ecdh.P521()), gohpke.HKDFSHA512(), gohpke.AES256GCM()},
		{7, gohpke.DHKEM(ecdh.P384()), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM768X25519_AES128GCM_SHA256_Ed25519, gohpke.MLKEM768X25519(), gohpke.HKDFSHA256(), gohpke.AES128GCM()},
		{MLKEM768X25519_AES256GCM_SHA384_Ed25519, gohpke.MLKEM768X25519(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM768P256_AES128GCM_SHA256_P256, gohpke.MLKEM768P256(), gohpke.HKDFSHA256(), gohpke.AES128GCM()},
		{MLKEM768P256_AES256GCM_SHA384_P256, gohpke.MLKEM768P256(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM1024P384_AES256GCM_SHA384_P384, gohpke.MLKEM1024P384(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM768_AES256GCM_SHA384_Ed25519, gohpke.MLKEM768(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM768_AES256GCM_SHA384_P256, gohpke.MLKEM768(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM1024_AES256GCM_SHA384_P384, gohpke.MLKEM1024(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM768X25519_CHACHA20POLY1305_SHA384_MLDSA44, gohpke.MLKEM768X25519(), gohpke.HKDFSHA384(), gohpke.ChaCha20Poly1305()},
		{MLKEM768_AES256GCM_SHA384_MLDSA65, gohpke.MLKEM768(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
		{MLKEM1024_AES256GCM_SHA384_MLDSA87, gohpke.MLKEM1024(), gohpke.HKDFSHA384(), gohpke.AES256GCM()},
	} {
		ikm := bytes.Repeat([]byte{byte(c.cs)}, 66)
		pub, priv, err := c.cs.DeriveHPKEKey(ikm)
		if err != nil {
			t.Fatal(err)
		}
		sk, err := c.kem.DeriveKeyPair(ikm)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "derived public key", pub, sk.PublicKey().Bytes())
		if c.cs != X25519_AES128GCM_SHA256_Ed25519 && c.cs != X25519_CHACHA20POLY1305_SHA256_Ed25519 { // Go clamps these
			b, err := sk.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "derived private key", priv, b)
		}

		ct, err := c.cs.hpkeSeal(rand.Reader, pub, c.cs.hpkeRawInfo(info), plain)
		if err != nil {
			t.Fatal(err)
		}
		got, err := gohpke.Open(sk, c.kdf, c.aead, info, append(ct.KEMOutput, ct.Ciphertext...))
		if err != nil {
			t.Fatalf("%v: %v", c.cs, err)
		}
		wantBytes(t, "opened by the standard library", got, plain)

		enc, sender, err := gohpke.NewSender(sk.PublicKey(), c.kdf, c.aead, info)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := sender.Seal(nil, plain)
		if err != nil {
			t.Fatal(err)
		}
		if got, err = c.cs.hpkeOpen(priv, nil, c.cs.hpkeRawInfo(info), HPKECiphertext{enc, sealed}); err != nil {
			t.Fatalf("%v: %v", c.cs, err)
		}
		wantBytes(t, "sealed by the standard library", got, plain)

		external := secret(ikm)
		enc, sender, err = gohpke.NewSender(sk.PublicKey(), c.kdf, c.aead, nil)
		if err != nil {
			t.Fatal(err)
		}
		want, err := sender.Export(externalInitContext, c.cs.HashSize())
		if err != nil {
			t.Fatal(err)
		}
		init, err := c.cs.externalInitReceive(external, enc)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "external init secret", init, want)
		enc, sent, err := c.cs.externalInitSend(rand.Reader, pub)
		if err != nil {
			t.Fatal(err)
		}
		if init, err = c.cs.externalInitReceive(external, enc); err != nil || !bytes.Equal(init, sent) {
			t.Errorf("%v: joiner and member have different init secrets: %v", c.cs, err)
		}
	}
}

// TestHPKEOverX448AgreesWithCircl is the same against circl, as the standard library has no X448.
func TestHPKEOverX448AgreesWithCircl(t *testing.T) {
	info, plain := []byte("info"), []byte("plaintext")
	for cs, aead := range map[CipherSuite]circlhpke.AEAD{4: circlhpke.AEAD_AES256GCM, 6: circlhpke.AEAD_ChaCha20Poly1305} {
		kem := circlhpke.KEM_X448_HKDF_SHA512.Scheme()
		suite := circlhpke.NewSuite(circlhpke.KEM_X448_HKDF_SHA512, circlhpke.KDF_HKDF_SHA512, aead)
		ikm := bytes.Repeat([]byte{byte(cs)}, kem.SeedSize())
		pub, priv, err := cs.DeriveHPKEKey(ikm)
		if err != nil {
			t.Fatal(err)
		}
		pk, sk := kem.DeriveKeyPair(ikm)
		b, _ := pk.MarshalBinary()
		wantBytes(t, "derived public key", pub, b)
		b, _ = sk.MarshalBinary()
		wantBytes(t, "derived private key", priv, b)

		receive := func(info, enc []byte) circlhpke.Opener {
			r, err := suite.NewReceiver(sk, info)
			if err != nil {
				t.Fatal(err)
			}
			o, err := r.Setup(enc)
			if err != nil {
				t.Fatal(err)
			}
			return o
		}
		ct, err := cs.hpkeSeal(rand.Reader, pub, cs.hpkeRawInfo(info), plain)
		if err != nil {
			t.Fatal(err)
		}
		got, err := receive(info, ct.KEMOutput).Open(ct.Ciphertext, nil)
		if err != nil {
			t.Fatalf("%v: %v", cs, err)
		}
		wantBytes(t, "opened by circl", got, plain)

		sender, err := suite.NewSender(pk, info)
		if err != nil {
			t.Fatal(err)
		}
		enc, sealer, err := sender.Setup(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := sealer.Seal(plain, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err = cs.hpkeOpen(priv, nil, cs.hpkeRawInfo(info), HPKECiphertext{enc, sealed}); err != nil {
			t.Fatalf("%v: %v", cs, err)
		}
		wantBytes(t, "sealed by circl", got, plain)

		enc, sent, err := cs.externalInitSend(rand.Reader, pub)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "external init secret", sent, receive(nil, enc).Export([]byte(externalInitContext), uint(cs.HashSize())))
		if init, err := cs.externalInitReceive(ikm, enc); err != nil || !bytes.Equal(init, sent) {
			t.Errorf("%v: joiner and member have different init secrets: %v", cs, err)
		}
	}
}

func TestBadHPKEKeysAreRefused(t *testing.T) {
	for _, cs := range CipherSuites() {
		pub, priv, err := cs.GenerateHPKEKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ct, err := cs.EncryptWithLabel(rand.Reader, pub, "x", nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		for what, bad := range malformations(cs, pub, true) {
			if err := cs.checkHPKEPublicKey(bad); !errors.Is(err, ErrMalformed) {
				t.Errorf("%v: check of a public key %s: got %v, want ErrMalformed", cs, what, err)
			}
			if _, err := cs.EncryptWithLabel(rand.Reader, bad, "x", nil, nil); !errors.Is(err, ErrMalformed) {
				t.Errorf("%v: public key %s: got %v, want ErrMalformed", cs, what, err)
			}
		}
		for what, bad := range malformations(cs, ct.KEMOutput, false) {
			if _, err := cs.params().decap(priv, nil, bad); err != errKEMOutput {
				t.Errorf("%v: decapsulation of a KEM output %s: got %v", cs, what, err)
			}
			if _, err := cs.DecryptWithLabel(priv, "x", nil, HPKECiphertext{bad, ct.Ciphertext}); !errors.Is(err, ErrDecrypt) {
				t.Errorf("%v: KEM output %s: got %v, want ErrDecrypt", cs, what, err)
			}
		}
		for _, bad := range []HPKEPrivateKey{nil, priv[1:], append(priv[:len(priv):len(priv)], 0)} {
			if _, err := cs.DecryptWithLabel(bad, "x", nil, ct); err == nil || errors.Is(err, ErrDecrypt) {
				t.Errorf("%v: private key of %d bytes: %v", cs, len(bad), err)
			}
			if _, err := cs.hpkePublicOf(bad); err != errPrivateKey {
				t.Errorf("%v: public key of a private key of %d bytes: %v", cs, len(bad), err)
			}
		}
		if err := cs.checkHPKEPublicKey(pub); err != nil {
			t.Error(err)
		}
	}
}

// malformations are variants of a sound public key or KEM output of the suite that are neither.
func malformations(cs CipherSuite, good []byte, isKey bool) map[string][]byte {
	bad := map[string][]byte{"missing": nil, "too short": good[1:], "cut": good[:len(good)-1], "too long": append(good[:len(good):len(good)], 0)}
	pq := 0 // length of the part of ML-KEM
	switch k := cs.params().kem.(type) {
	case mlKEM:
		pq = len(good)
	case *hybridKEM:
		pq = len(good) - map[dhGroup]int{k.t: 32, nistGroup{ecdh.P256(), 32}: 65, nistGroup{ecdh.P384(), 48}: 97}[k.t]
	}
	if pq < len(good) { // zero is of no group, or of small order
		bad["with a bad point"] = append(bytes.Clone(good[:pq]), make([]byte, len(good)-pq)...)
	}
	if pq > 0 && isKey { // ciphertexts are all in range
		for i, at := range []int{0, 3 * (pq - 32) / 6, pq - 35} {
			b := bytes.Clone(good)
			b[at], b[at+1] = 0x01, b[at+1]&0xf0|0x0d // 3329, the modulus, in the first of two coefficients
			bad[fmt.Sprint("with the modulus as coefficient ", i)] = b
		}
	}
	return bad
}

func TestKeysThatNobodyCanEncryptToAreRefused(t *testing.T) {
	const cs = testSuite
	refused := 0
	check := func(pub HPKEPublicKey) {
		t.Helper()
		_, err := cs.EncryptWithLabel(rand.Reader, pub, "x", nil, nil)
		if (cs.checkHPKEPublicKey(pub) == nil) != (err == nil) {
			t.Errorf("%x: check says %v, encryption %v", []byte(pub), cs.checkHPKEPublicKey(pub), err)
		}
		if err != nil {
			refused++
		}
	}
	orderEight, _ := hex.DecodeString("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
	orderEightToo, _ := hex.DecodeString("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157")
	for _, top := range []byte{0, 0x80} {
		for low := range 256 {
			small, large := make(HPKEPublicKey, 32), bytes.Repeat(HPKEPublicKey{0xff}, 32)
			small[0], small[31] = byte(low), top
			large[0], large[31] = byte(low), 0x7f|top
			check(small)
			check(large)
		}
		for _, p := range [][]byte{orderEight, orderEightToo} {
			p = bytes.Clone(p)
			p[31] |= top
			check(p)
		}
	}
	if refused != 14 {
		t.Errorf("%d encodings refused, want 7 with the highest bit off and on", refused)
	}
}

func TestX448KeysThatNobodyCanEncryptToAreRefused(t *testing.T) {
	const cs = X448_AES256GCM_SHA512_Ed448
	refused := make(map[string]bool)
	check := func(pub HPKEPublicKey) {
		t.Helper()
		_, err := cs.EncryptWithLabel(rand.Reader, pub, "x", nil, nil)
		if (cs.checkHPKEPublicKey(pub) == nil) != (err == nil) {
			t.Errorf("%x: check says %v, encryption %v", []byte(pub), cs.checkHPKEPublicKey(pub), err)
		}
		if err != nil {
			refused[string(pub)] = true
		}
	}
	for low := range 256 {
		if testing.Short() && low%16 > 1 && low < 0xfd {
			continue
		}
		for _, middle := range []byte{0xfe, 0xff} { // about the prime 2^448 - 2^224 - 1
			p := bytes.Repeat(HPKEPublicKey{0xff}, 56)
			p[0], p[28] = byte(low), middle
			check(p)
		}
		for _, middle := range []byte{0, 1} {
			p := make(HPKEPublicKey, 56)
			p[0], p[28] = byte(low), middle
			check(p)
		}
		p := bytes.Repeat(HPKEPublicKey{0xff}, 56) // 2^448 - 2^224 and what follows
		clear(p[:28])
		p[0] = byte(low)
		check(p)
	}
	if len(refused) != 5 {
		t.Errorf("%d encodings refused, want 0, 1, p-1, p and p+1", len(refused))
	}
}

func TestEd448IsPureWithoutContext(t *testing.T) {
	const cs = X448_CHACHA20POLY1305_SHA512_Ed448
	signer, err := cs.GenerateSignatureKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := signer.(ed448.PrivateKey)
	pub, _ := cs.SignaturePublicKey(signer.Public())
	msg := labelled("label", func(w *codec.Writer) { w.String("content") }).Bytes()
	sig, err := cs.SignWithLabel(rand.Reader, signer, "label", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	wantBytes(t, "signature", sig, ed448.Sign(key, msg, ""))
	for what, other := range map[string][]byte{"with a context": ed448.Sign(key, msg, "context"), "prehashed": ed448.SignPh(key, msg, ""), "cut": sig[1:]} {
		if err := cs.VerifyWithLabel(pub, "label", []byte("content"), other); !errors.Is(err, ErrSignature) {
			t.Errorf("signature %s: got %v, want ErrSignature", what, err)
		}
	}
}

func TestOnlyEd448HasNoCertificates(t *testing.T) {
	for _, cs := range CipherSuites() {
		if want := cs.SignatureScheme() != "Ed448"; cs.X509() != want {
			t.Errorf("%v: X509 says %v", cs, cs.X509())
		}
	}
}

func TestSignatureKeysBelongToTheirSuite(t *testing.T) {
	for _, cs := range CipherSuites() {
		signer, err := cs.GenerateSignatureKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := cs.SignaturePublicKey(signer.Public())
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := cs.ParseSignaturePublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := cs.SignaturePublicKey(parsed); err != nil || !bytes.Equal(again, pub) {
			t.Errorf("%v: parsed key encodes as %x: %v", cs, again, err)
		}
		sig, err := cs.SignWithLabel(rand.Reader, signer, "label", []byte("content"))
		if err != nil {
			t.Fatal(err)
		}
		if err := cs.VerifyWithLabel(pub, "label", []byte("content"), sig); err != nil {
			t.Error(err)
		}
		if err := cs.VerifyWithLabel(pub, "other", []byte("content"), sig); !errors.Is(err, ErrSignature) {
			t.Errorf("%v: other label: got %v, want ErrSignature", cs, err)
		}
		if err := cs.VerifyWithLabel(pub[1:], "label", []byte("content"), sig); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v: short key: got %v, want ErrMalformed", cs, err)
		}
		for _, other := range CipherSuites() {
			same := other.SignatureScheme() == cs.SignatureScheme()
			if _, err := other.SignaturePublicKey(signer.Public()); (err == nil) != same {
				t.Errorf("key of %v as one of %v: %v", cs, other, err)
			}
			if _, err := other.SignWithLabel(rand.Reader, signer, "label", nil); (err == nil) != same {
				t.Errorf("key of %v signs for %v: %v", cs, other, err)
			}
		}
	}
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if _, err := P256_AES128GCM_SHA256_P256.SignaturePublicKey(&p224.PublicKey); err == nil {
		t.Error("P-224 key accepted")
	}
	if err := CipherSuite(11).VerifyWithLabel(nil, "", nil, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("suite 11: got %v, want ErrUnsupported", err)
	}
}

func TestGivenRandomnessDecidesKeys(t *testing.T) {
	for _, cs := range CipherSuites() {
		one, err := cs.GenerateSignatureKey(seededRand(1))
		if err != nil {
			t.Fatal(err)
		}
		two, _ := cs.GenerateSignatureKey(seededRand(1))
		a, _ := cs.SignaturePublicKey(one.Public())
		b, _ := cs.SignaturePublicKey(two.Public())
		wantBytes(t, "signature key", a, b)
		pub1, _, err := cs.GenerateHPKEKey(seededRand(2))
		if err != nil {
			t.Fatal(err)
		}
		pub2, _, _ := cs.GenerateHPKEKey(seededRand(2))
		wantBytes(t, "HPKE key", pub1, pub2)
		if _, _, err := cs.GenerateHPKEKey(strings.NewReader("short")); err == nil {
			t.Error("key from too little randomness")
		}
	}
}

func TestSecretsDoNotShowThemselves(t *testing.T) {
	key := bytes.Repeat([]byte("K"), 32)
	values := []any{secret(key), HPKEPrivateKey(key), KeyPackageSecrets{InitKey: key, EncryptionKey: key}, &KeyPackageSecrets{InitKey: key, EncryptionKey: key},
		newTreePrivate(0, key), &GroupSecrets{JoinerSecret: key, PathSecret: key}, &epochSecrets{senderData: key, init: key},
		&ratchet{secret: key}, &newPath{commitSecret: key, pathSecrets: []secret{key}, private: newTreePrivate(1, key)}}
	for _, v := range values {
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "v", v)
		j, _ := json.Marshal(v)
		for _, shown := range []string{fmt.Sprint(v), fmt.Sprintf("%+v %#v %x %X %q %d %s", v, v, v, v, v, v, v), log.String(), string(j)} {
			for _, leak := range []string{"KKKK", "4b4b4b", "4B4B4B", "75 75", "75, 75", "0x4b, 0x4b", "S0tLS"} {
				if strings.Contains(shown, leak) {
					t.Errorf("%T shows itself: %s", v, shown)
				}
			}
		}
	}
}
