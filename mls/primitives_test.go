package mls

import (
	"crypto/ecdh"
	"crypto/ed25519"
	gohpke "crypto/hpke"
	"crypto/rand"
	"testing"

	"github.com/cloudflare/circl/dh/x25519"
	"github.com/cloudflare/circl/dh/x448"
	circlhpke "github.com/cloudflare/circl/hpke"
	circled "github.com/cloudflare/circl/sign/ed25519"
	"github.com/cloudflare/circl/sign/ed448"
)

// BenchmarkPrimitives compares circl with Go's crypto for each primitive where both have one; cipher_suite.go and
// kem.go use the faster: circl for X25519, Go for the rest. circl has no ECDSA, and its P-384 isn't constant-time. X448
// and Ed448 are circl's, as Go has neither.
// The HPKE of this package is compared with both as a whole.
func BenchmarkPrimitives(b *testing.B) {
	run := func(name string, f func(b *testing.B)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f(b)
			}
		})
	}
	check := func(b *testing.B, err error) {
		if err != nil {
			b.Fatal(err)
		}
	}

	goKey, _ := ecdh.X25519().GenerateKey(rand.Reader)
	goPeer, _ := ecdh.X25519().GenerateKey(rand.Reader)
	var key, peer, shared x25519.Key
	copy(key[:], goKey.Bytes())
	copy(peer[:], goPeer.PublicKey().Bytes())
	run("X25519/DH/go", func(b *testing.B) {
		_, err := goKey.ECDH(goPeer.PublicKey())
		check(b, err)
	})
	run("X25519/DH/circl", func(b *testing.B) {
		if !x25519.Shared(&shared, &key, &peer) {
			b.Fatal("no shared key")
		}
	})
	run("X25519/PublicKey/go", func(b *testing.B) {
		k, err := ecdh.X25519().NewPrivateKey(key[:])
		check(b, err)
		k.PublicKey()
	})
	run("X25519/PublicKey/circl", func(b *testing.B) { x25519.KeyGen(&shared, &key) })

	msg := make([]byte, 300)
	pub, priv, _ := ed25519.GenerateKey(rand.Reader)
	sig := ed25519.Sign(priv, msg)
	run("Ed25519/Sign/go", func(*testing.B) { ed25519.Sign(priv, msg) })
	run("Ed25519/Sign/circl", func(*testing.B) { circled.Sign(circled.PrivateKey(priv), msg) })
	run("Ed25519/Verify/go", func(b *testing.B) {
		if !ed25519.Verify(pub, msg, sig) {
			b.Fatal("signature")
		}
	})
	run("Ed25519/Verify/circl", func(b *testing.B) {
		if !circled.Verify(circled.PublicKey(pub), msg, sig) {
			b.Fatal("signature")
		}
	})

	var key448, peer448, shared448 x448.Key
	_, _ = rand.Read(key448[:])
	x448.KeyGen(&peer448, &key448)
	run("X448/DH/circl", func(b *testing.B) {
		if !x448.Shared(&shared448, &key448, &peer448) {
			b.Fatal("no shared key")
		}
	})
	run("X448/PublicKey/circl", func(*testing.B) { x448.KeyGen(&shared448, &key448) })
	pub448, priv448, _ := ed448.GenerateKey(rand.Reader)
	sig448 := ed448.Sign(priv448, msg, "")
	run("Ed448/Sign/circl", func(*testing.B) { ed448.Sign(priv448, msg, "") })
	run("Ed448/Verify/circl", func(b *testing.B) {
		if !ed448.Verify(pub448, msg, sig448, "") {
			b.Fatal("signature")
		}
	})

	info, plain := make([]byte, 200), make([]byte, 32)
	for _, c := range []struct {
		name  string
		suite CipherSuite
		kem   gohpke.KEM // nil: Go has none
		kdf   gohpke.KDF
		aead  gohpke.AEAD
		circl circlhpke.Suite
		ckem  circlhpke.KEM
	}{
		{"X25519", 1, gohpke.DHKEM(ecdh.X25519()), gohpke.HKDFSHA256(), gohpke.AES128GCM(),
			circlhpke.NewSuite(circlhpke.KEM_X25519_HKDF_SHA256, circlhpke.KDF_HKDF_SHA256, circlhpke.AEAD_AES128GCM), circlhpke.KEM_X25519_HKDF_SHA256},
		{"P256", 2, gohpke.DHKEM(ecdh.P256()), gohpke.HKDFSHA256(), gohpke.AES128GCM(),
			circlhpke.NewSuite(circlhpke.KEM_P256_HKDF_SHA256, circlhpke.KDF_HKDF_SHA256, circlhpke.AEAD_AES128GCM), circlhpke.KEM_P256_HKDF_SHA256},
		{"P384", 7, gohpke.DHKEM(ecdh.P384()), gohpke.HKDFSHA384(), gohpke.AES256GCM(),
			circlhpke.NewSuite(circlhpke.KEM_P384_HKDF_SHA384, circlhpke.KDF_HKDF_SHA384, circlhpke.AEAD_AES256GCM), circlhpke.KEM_P384_HKDF_SHA384},
		{"X448", 4, nil, nil, nil,
			circlhpke.NewSuite(circlhpke.KEM_X448_HKDF_SHA512, circlhpke.KDF_HKDF_SHA512, circlhpke.AEAD_AES256GCM), circlhpke.KEM_X448_HKDF_SHA512},
	} {
		pub, priv, err := c.suite.GenerateHPKEKey(rand.Reader)
		check(b, err)
		prepared := c.suite.hpkeRawInfo(info)
		ct, err := c.suite.hpkeSeal(rand.Reader, pub, prepared, plain)
		check(b, err)
		run("HPKE/"+c.name+"/Seal/own", func(b *testing.B) {
			_, err := c.suite.hpkeSeal(rand.Reader, pub, prepared, plain)
			check(b, err)
		})
		if c.kem != nil {
			run("HPKE/"+c.name+"/Seal/go", func(b *testing.B) {
				pk, err := c.kem.NewPublicKey(pub)
				check(b, err)
				_, err = gohpke.Seal(pk, c.kdf, c.aead, info, plain)
				check(b, err)
			})
		}
		run("HPKE/"+c.name+"/Seal/circl", func(b *testing.B) {
			pk, err := c.ckem.Scheme().UnmarshalBinaryPublicKey(pub)
			check(b, err)
			s, err := c.circl.NewSender(pk, info)
			check(b, err)
			_, sealer, err := s.Setup(rand.Reader)
			check(b, err)
			_, err = sealer.Seal(plain, nil)
			check(b, err)
		})
		run("HPKE/"+c.name+"/Open/own", func(b *testing.B) {
			_, err := c.suite.hpkeOpen(priv, pub, prepared, ct)
			check(b, err)
		})
		if c.kem != nil {
			run("HPKE/"+c.name+"/Open/go", func(b *testing.B) {
				sk, err := c.kem.NewPrivateKey(priv)
				check(b, err)
				r, err := gohpke.NewRecipient(ct.KEMOutput, sk, c.kdf, c.aead, info)
				check(b, err)
				_, err = r.Open(nil, ct.Ciphertext)
				check(b, err)
			})
		}
		run("HPKE/"+c.name+"/Open/circl", func(b *testing.B) {
			sk, err := c.ckem.Scheme().UnmarshalBinaryPrivateKey(priv)
			check(b, err)
			r, err := c.circl.NewReceiver(sk, info)
			check(b, err)
			o, err := r.Setup(ct.KEMOutput)
			check(b, err)
			_, err = o.Open(ct.Ciphertext, nil)
			check(b, err)
		})
	}
}
