package mls

import (
	"crypto/ecdh"
	"crypto/ed25519"
	gohpke "crypto/hpke"
	"crypto/mlkem"
	"crypto/rand"
	"encoding/binary"
	"testing"

	"github.com/cloudflare/circl/dh/x25519"
	"github.com/cloudflare/circl/dh/x448"
	circlhpke "github.com/cloudflare/circl/hpke"
	circled "github.com/cloudflare/circl/sign/ed25519"
	"github.com/cloudflare/circl/sign/ed448"
)

// BenchmarkPrimitives compares circl with Go's crypto for each primitive where both have one; kem.go, kem_pq.go and
// signature.go use the faster: circl for X25519 and ML-KEM, Go for the rest. circl has no ECDSA, and its P-384 isn't
// constant-time. X448, Ed448 and ML-DSA are circl's, as Go has none of them.
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

	seed := make([]byte, mlkem.SeedSize)
	_, _ = rand.Read(seed)
	decapsulation, _ := mlkem.NewDecapsulationKey768(seed)
	encapsulation := decapsulation.EncapsulationKey().Bytes()
	_, encapsulated := decapsulation.EncapsulationKey().Encapsulate()
	run("ML-KEM-768/PublicKey/go", func(b *testing.B) {
		k, err := mlkem.NewDecapsulationKey768(seed)
		check(b, err)
		k.EncapsulationKey().Bytes()
	})
	run("ML-KEM-768/PublicKey/circl", func(b *testing.B) {
		_, err := mlkem768KEM.public(seed)
		check(b, err)
	})
	run("ML-KEM-768/Encapsulate/go", func(b *testing.B) {
		k, err := mlkem.NewEncapsulationKey768(encapsulation)
		check(b, err)
		k.Encapsulate()
	})
	run("ML-KEM-768/Encapsulate/circl", func(b *testing.B) {
		_, _, err := mlkem768KEM.encap(seed[:32], encapsulation)
		check(b, err)
	})
	run("ML-KEM-768/Decapsulate/go", func(b *testing.B) {
		k, err := mlkem.NewDecapsulationKey768(seed)
		check(b, err)
		_, err = k.Decapsulate(encapsulated)
		check(b, err)
	})
	run("ML-KEM-768/Decapsulate/circl", func(b *testing.B) {
		_, err := mlkem768KEM.decap(seed, nil, encapsulated)
		check(b, err)
	})
	for _, scheme := range []circlScheme{mlDSA44, mlDSA65, mlDSA87} {
		signer, err := scheme.generate(rand.Reader)
		check(b, err)
		pub, err := scheme.encode(signer.Public())
		check(b, err)
		n := 0
		run(scheme.Name()+"/Sign/circl", func(b *testing.B) { // how long it takes depends on the message
			n++
			binary.BigEndian.PutUint32(msg, uint32(n))
			_, err := scheme.sign(nil, signer, msg)
			check(b, err)
		})
		sig, err := scheme.sign(nil, signer, msg)
		check(b, err)
		run(scheme.Name()+"/Verify/circl", func(b *testing.B) {
			k, err := scheme.parse(pub)
			check(b, err)
			if !scheme.verify(k, msg, sig) {
				b.Fatal("signature")
			}
		})
	}

	info, plain := make([]byte, 200), make([]byte, 32)
	for _, c := range []struct {
		name  string
		suite CipherSuite
		kem   gohpke.KEM // nil: Go has none
		kdf   gohpke.KDF
		aead  gohpke.AEAD
		circl circlhpke.Suite
		ckem  circlhpke.KEM // 0: circl has none
	}{
		{"X25519", 1, gohpke.DHKEM(ecdh.X25519()), gohpke.HKDFSHA256(), gohpke.AES128GCM(),
			circlhpke.NewSuite(circlhpke.KEM_X25519_HKDF_SHA256, circlhpke.KDF_HKDF_SHA256, circlhpke.AEAD_AES128GCM), circlhpke.KEM_X25519_HKDF_SHA256},
		{"P256", 2, gohpke.DHKEM(ecdh.P256()), gohpke.HKDFSHA256(), gohpke.AES128GCM(),
			circlhpke.NewSuite(circlhpke.KEM_P256_HKDF_SHA256, circlhpke.KDF_HKDF_SHA256, circlhpke.AEAD_AES128GCM), circlhpke.KEM_P256_HKDF_SHA256},
		{"P384", 7, gohpke.DHKEM(ecdh.P384()), gohpke.HKDFSHA384(), gohpke.AES256GCM(),
			circlhpke.NewSuite(circlhpke.KEM_P384_HKDF_SHA384, circlhpke.KDF_HKDF_SHA384, circlhpke.AEAD_AES256GCM), circlhpke.KEM_P384_HKDF_SHA384},
		{"X-Wing", MLKEM768X25519_AES128GCM_SHA256_Ed25519, gohpke.MLKEM768X25519(), gohpke.HKDFSHA256(), gohpke.AES128GCM(),
			circlhpke.NewSuite(circlhpke.KEM_XWING, circlhpke.KDF_HKDF_SHA256, circlhpke.AEAD_AES128GCM), circlhpke.KEM_XWING},
		{"MLKEM768-P256", MLKEM768P256_AES128GCM_SHA256_P256, gohpke.MLKEM768P256(), gohpke.HKDFSHA256(), gohpke.AES128GCM(), circlhpke.Suite{}, 0},
		{"MLKEM1024-P384", MLKEM1024P384_AES256GCM_SHA384_P384, gohpke.MLKEM1024P384(), gohpke.HKDFSHA384(), gohpke.AES256GCM(), circlhpke.Suite{}, 0},
		{"ML-KEM-768", MLKEM768_AES256GCM_SHA384_Ed25519, gohpke.MLKEM768(), gohpke.HKDFSHA384(), gohpke.AES256GCM(), circlhpke.Suite{}, 0},
		{"ML-KEM-1024", MLKEM1024_AES256GCM_SHA384_P384, gohpke.MLKEM1024(), gohpke.HKDFSHA384(), gohpke.AES256GCM(), circlhpke.Suite{}, 0},
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
		if c.ckem != 0 {
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
		}
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
		if c.ckem != 0 {
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
}
