package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	circlsign "github.com/cloudflare/circl/sign"

	"github.com/parley-mls/parley/mls"
)

var mldsaSuites = []mls.CipherSuite{mls.MLKEM768X25519_CHACHA20POLY1305_SHA384_MLDSA44, mls.MLKEM768_AES256GCM_SHA384_MLDSA65,
	mls.MLKEM1024_AES256GCM_SHA384_MLDSA87}

// forgeKey signs, with a hierarchy's intermediate, a leaf that has spki as SubjectPublicKeyInfo, whatever that is.
func forgeKey(f *forge, spki []byte) [][]byte {
	f.tb.Helper()
	der := f.chain()[0]
	c, err := x509.ParseCertificate(der)
	ok(f.tb, err)
	alg, hash, err := issuerAlgorithm(f.signer.Public())
	ok(f.tb, err)
	der, err = resign(rand.Reader, c.RawTBSCertificate, map[int]any{6: asn1.RawValue{FullBytes: spki}}, alg, f.signer, hash)
	ok(f.tb, err)
	return append([][]byte{der}, f.extra...)
}

func marshal(tb testing.TB, v any) []byte {
	tb.Helper()
	der, err := asn1.Marshal(v)
	ok(tb, err)
	return der
}

func TestForgedMLDSAKeysAreRefused(t *testing.T) {
	h := hierarchyOf(t, "alpha.example")
	v := verifierOf(bundleOf(t, "alpha.example", 1, h))
	for i, suite := range mldsaSuites {
		signer, err := suite.GenerateSignatureKey(rand.Reader)
		ok(t, err)
		pub, err := suite.SignaturePublicKey(signer.Public())
		ok(t, err)
		other, err := mldsaSuites[(i+1)%3].GenerateSignatureKey(rand.Reader)
		ok(t, err)
		otherPub, err := mldsaSuites[(i+1)%3].SignaturePublicKey(other.Public())
		ok(t, err)
		oid := mldsaSchemes[i].oid
		type withParameters struct {
			Algorithm pkix.AlgorithmIdentifier
			PublicKey asn1.BitString
		}
		info := func(oid asn1.ObjectIdentifier, key []byte) []byte {
			return marshal(t, keyInfo{algorithm{oid}, bitString(key)})
		}
		good := info(oid, pub)
		last := func(n int) asn1.ObjectIdentifier { return append(oid[:len(oid)-1:len(oid)-1], n) }
		unused := bitString(append(pub[:len(pub)-1:len(pub)-1], pub[len(pub)-1]&0xfe))
		unused.BitLength--
		nested := bytes.Clone(good)
		nested[3]++ // the sequence claims one byte more
		for _, tt := range []struct {
			name string
			spki []byte
			want error
		}{
			{"sound", good, nil},
			{"unknown algorithm", info(last(20), pub), ErrKeyType},
			{"prehashed ML-DSA", info(last(32+i), pub), ErrKeyType},
			{"another parameter set", info(mldsaSchemes[(i+1)%3].oid, pub), ErrMalformed},
			{"another set's key", info(oid, otherPub), ErrMalformed},
			{"NULL parameters", marshal(t, withParameters{pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.NullRawValue}, bitString(pub)}), ErrMalformed},
			{"parameters", marshal(t, withParameters{pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.RawValue{FullBytes: marshal(t, oid)}}, bitString(pub)}), ErrMalformed},
			{"short key", info(oid, pub[1:]), ErrMalformed},
			{"long key", info(oid, append(pub[:len(pub):len(pub)], 0)), ErrMalformed},
			{"no key", info(oid, nil), ErrMalformed},
			{"key in an OCTET STRING in it", info(oid, marshal(t, pub)), ErrMalformed},
			{"unused bits", marshal(t, keyInfo{algorithm{oid}, unused}), ErrMalformed},
			{"trailing element", marshal(t, struct {
				A algorithm
				K asn1.BitString
				N int
			}{algorithm{oid}, bitString(pub), 1}), ErrMalformed},
		} {
			t.Run(fmt.Sprintf("%v/%s", suite, tt.name), func(t *testing.T) {
				f := newForge(t, h)
				_, err := v.VerifyKey(forgeKey(f, tt.spki), suite, pub, PurposeClient)
				if tt.want == nil {
					ok(t, err)
					return
				}
				wantErr(t, err, tt.want)
				wantErr(t, err, ErrMalformed)
				if _, err := ParseIdentity(forgeKey(f, tt.spki)); !errors.Is(err, ErrMalformed) {
					t.Errorf("ParseIdentity: %v", err)
				}
			})
		}
		t.Run(suite.String(), func(t *testing.T) {
			f := newForge(t, h)
			chain := forgeKey(f, good)
			_, err := v.VerifyKey(chain, mldsaSuites[(i+1)%3], otherPub, PurposeClient)
			wantErr(t, err, ErrSuite)
			_, err = v.VerifyKey(chain, mls.X25519_AES128GCM_SHA256_Ed25519, pub[:32], PurposeClient)
			wantErr(t, err, ErrSuite)
			changed := bytes.Clone(pub)
			changed[0] ^= 1
			_, err = v.VerifyKey(chain, suite, changed, PurposeClient)
			wantErr(t, err, ErrKeyMismatch)
			_, err = v.VerifyKey(append([][]byte{bytes.Replace(chain[0], pub, changed, 1)}, f.extra...), suite, changed, PurposeClient)
			wantErr(t, err, ErrBroken)
			if _, err := parseMLDSAKey(append(good[:len(good):len(good)], 0)); !errors.Is(err, ErrMalformed) {
				t.Errorf("trailing byte: %v", err)
			}
			if _, err := parseMLDSAKey(nested); !errors.Is(err, ErrMalformed) {
				t.Errorf("wrong length: %v", err)
			}
			for _, usage := range []x509.KeyUsage{x509.KeyUsageKeyEncipherment, x509.KeyUsageDataEncipherment, x509.KeyUsageKeyAgreement,
				x509.KeyUsageEncipherOnly, x509.KeyUsageDecipherOnly} {
				f := newForge(t, h)
				f.edit = func(c *x509.Certificate) { c.KeyUsage |= usage }
				_, err := v.VerifyKey(forgeKey(f, good), suite, pub, PurposeClient)
				wantErr(t, err, ErrUsage)
			}
		})
	}
}

// TestAnMLDSACertificateIssuesNothing: an ML-DSA key can't be an issuer's, whatever its certificate says.
func TestAnMLDSACertificateIssuesNothing(t *testing.T) {
	h := hierarchyOf(t, "alpha.example")
	v := verifierOf(bundleOf(t, "alpha.example", 1, h))
	signer, err := mldsaSuites[1].GenerateSignatureKey(rand.Reader)
	ok(t, err)
	between, _ := issuer(t, h, func(*x509.Certificate) {})
	alg, hash, err := issuerAlgorithm(h.rootKey.Public())
	ok(t, err)
	der, err := resign(rand.Reader, between.RawTBSCertificate, map[int]any{6: mldsaKeyOf(signer.Public())}, alg, h.rootKey, hash)
	ok(t, err)
	f := newForge(t, h)
	leaf, err := x509.ParseCertificate(f.chain()[0])
	ok(t, err)
	key := mldsaKeyOf(signer.Public())
	leafDER, err := resign(rand.Reader, leaf.RawTBSCertificate, map[int]any{2: algorithm{key.oid()}, 3: asn1.RawValue{FullBytes: between.RawSubject}},
		algorithm{key.oid()}, signer, 0)
	ok(t, err)
	_, err = v.Verify([][]byte{leafDER, der}, PurposeClient)
	wantErr(t, err, ErrBroken)
}

func TestForgedMLDSARequestsAreRefused(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDeviceOf(t, "alpha.example", "alice", "alice-laptop", mldsaSuites[1])
	good := d.csr(t)
	csr, err := x509.ParseCertificateRequest(good)
	ok(t, err)
	key, scheme := mldsaKeyOf(d.key.Public()), mldsaSchemes[1].scheme
	tbs := asn1.RawValue{FullBytes: csr.RawTBSCertificateRequest}
	with := func(alg any, sig []byte) []byte {
		return marshal(t, struct {
			Body      asn1.RawValue
			Algorithm any
			Signature asn1.BitString
		}{tbs, alg, bitString(sig)})
	}
	own := algorithm{key.oid()}
	inContext := scheme.Sign(d.key.(circlsign.PrivateKey), csr.RawTBSCertificateRequest, &circlsign.SignatureOpts{Context: "x"})
	stranger := newDeviceOf(t, "alpha.example", "alice", "alice-laptop", mldsaSuites[1])
	strangers, err := stranger.key.Sign(rand.Reader, csr.RawTBSCertificateRequest, crypto.Hash(0))
	ok(t, err)
	badKey, err := resign(rand.Reader, csr.RawTBSCertificateRequest, map[int]any{2: keyInfo{own, bitString(key.raw[1:])}}, own, d.key, 0)
	ok(t, err)
	withNull, err := resign(rand.Reader, csr.RawTBSCertificateRequest, map[int]any{2: struct {
		A pkix.AlgorithmIdentifier
		K asn1.BitString
	}{pkix.AlgorithmIdentifier{Algorithm: key.oid(), Parameters: asn1.NullRawValue}, bitString(key.raw)}}, own, d.key, 0)
	ok(t, err)
	unknown, err := resign(rand.Reader, csr.RawTBSCertificateRequest, map[int]any{2: keyInfo{algorithm{asn1.ObjectIdentifier{1, 2, 3}}, bitString(key.raw)}}, own, d.key, 0)
	ok(t, err)
	before := len(f.store.snapshot())
	for _, tt := range []struct {
		name string
		csr  []byte
		want error
	}{
		{"signed by another key", with(own, strangers), ErrPossession},
		{"signed in a context", with(own, inContext), ErrPossession},
		{"signature cut", with(own, csr.Signature[1:]), ErrPossession},
		{"signature too long", with(own, append(bytes.Clone(csr.Signature), 0)), ErrPossession},
		{"no signature", with(own, nil), ErrPossession},
		{"another algorithm named", with(algorithm{mldsaSchemes[0].oid}, csr.Signature), ErrPossession},
		{"ECDSA named", with(algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, csr.Signature), ErrPossession},
		{"parameters of the algorithm", with(pkix.AlgorithmIdentifier{Algorithm: key.oid(), Parameters: asn1.NullRawValue}, csr.Signature), ErrPossession},
		{"short key", badKey, ErrRequest},
		{"parameters of the key", withNull, ErrRequest},
		{"unknown key", unknown, ErrKeyType},
		{"trailing byte", append(bytes.Clone(good), 0), ErrRequest},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.Issue(t.Context(), tt.csr)
			wantErr(t, err, tt.want)
		})
	}
	if after := len(f.store.snapshot()); after != before {
		t.Errorf("refused requests left %d rows", after-before)
	}
	_, err = f.Issue(t.Context(), good)
	ok(t, err)
}

// TestMLDSACertificatesAreLikeAllOthers takes one through its life beside one of Ed25519.
func TestMLDSACertificatesAreLikeAllOthers(t *testing.T) {
	f := newFixture(t, "alpha.example")
	classical := newDevice(t, "alpha.example", "alice", "alice-laptop")
	d := newDeviceOf(t, "alpha.example", "alice", "alice-phone", mldsaSuites[2])
	theirs, err := x509.ParseCertificate(f.enrol(t, classical)[0])
	ok(t, err)
	chain := f.enrol(t, d)
	c, err := x509.ParseCertificate(chain[0])
	ok(t, err)
	if len(c.Extensions) != len(theirs.Extensions) {
		t.Errorf("%d extensions, not %d", len(c.Extensions), len(theirs.Extensions))
	}
	for i, e := range c.Extensions {
		o := theirs.Extensions[i]
		if !e.Id.Equal(o.Id) || e.Critical != o.Critical || !slices.ContainsFunc([]asn1.ObjectIdentifier{oidSubjectAltName, {2, 5, 29, 14}}, e.Id.Equal) && !bytes.Equal(e.Value, o.Value) {
			t.Errorf("extension %v %v %x, not %v %v %x", e.Id, e.Critical, e.Value, o.Id, o.Critical, o.Value)
		}
	}
	if c.NotAfter.Sub(c.NotBefore) != theirs.NotAfter.Sub(theirs.NotBefore) || c.SignatureAlgorithm != theirs.SignatureAlgorithm || c.SerialNumber.BitLen() < 64 {
		t.Errorf("lifetime %v, signature %v, serial %v", c.NotAfter.Sub(c.NotBefore), c.SignatureAlgorithm, c.SerialNumber)
	}
	list, err := f.List(t.Context(), Filter{Client: d.client})
	ok(t, err)
	if len(list) != 1 || list[0].Serial != serialString(c.SerialNumber) || list[0].User != d.user {
		t.Fatalf("recorded: %+v", list)
	}

	// A renewal may bring another key, and another scheme.
	for _, suite := range []mls.CipherSuite{d.suite, mldsaSuites[0], classical.suite, mldsaSuites[1]} {
		d.suite = suite
		if d.key, err = suite.GenerateSignatureKey(rand.Reader); err != nil {
			t.Fatal(err)
		}
		if chain, err = f.Renew(t.Context(), chain, d.csr(t)); err != nil {
			t.Fatal(err)
		}
		_, err = f.Verifier().VerifyKey(chain, suite, d.public(t), PurposeClient)
		ok(t, err)
	}
	f.reopen(t)
	_, err = f.Verifier().VerifyKey(chain, d.suite, d.public(t), PurposeClient)
	ok(t, err)
	_, err = f.Revoke(t.Context(), string(d.client), "lost")
	ok(t, err)
	_, err = f.Verifier().VerifyKey(chain, d.suite, d.public(t), PurposeClient)
	wantErr(t, err, ErrRevoked)
	_, err = f.Renew(t.Context(), chain, d.csr(t))
	wantErr(t, err, ErrRevoked)
}

func TestHubsMayHaveMLDSAKeysAndNodesNot(t *testing.T) {
	f := newFixture(t, "alpha.example")
	for _, suite := range mldsaSuites {
		signer, err := suite.GenerateSignatureKey(rand.Reader)
		ok(t, err)
		chain, err := f.IssueHub(t.Context(), signer.Public())
		ok(t, err)
		pub, err := suite.SignaturePublicKey(signer.Public())
		ok(t, err)
		_, err = f.Verifier().VerifyKey(chain, suite, pub, PurposeHub)
		ok(t, err)
		_, err = f.IssueNode(t.Context(), signer.Public())
		wantErr(t, err, ErrKeyType)
		der, err := marshalPublicKey(signer.Public())
		ok(t, err)
		again, err := parsePublicKey(der)
		ok(t, err)
		if b, err := suite.SignaturePublicKey(again); err != nil || !bytes.Equal(b, pub) {
			t.Errorf("public key changed: %v", err)
		}
	}
}

func TestPrivateKeysComeBack(t *testing.T) {
	for _, suite := range mls.CipherSuites() {
		if !suite.X509() {
			continue
		}
		signer, err := suite.GenerateSignatureKey(rand.Reader)
		ok(t, err)
		der, err := MarshalPrivateKey(signer)
		ok(t, err)
		again, err := ParsePrivateKey(der)
		ok(t, err)
		a, _ := suite.SignaturePublicKey(signer.Public())
		if b, err := suite.SignaturePublicKey(again.Public()); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%v: another key: %v", suite, err)
		}
		for _, bad := range [][]byte{nil, der[1:], der[:len(der)-1], append(bytes.Clone(der), 0)} {
			if _, err := ParsePrivateKey(bad); err == nil {
				t.Errorf("%v: a damaged key is read", suite)
			}
		}
	}
	seed := bytes.Repeat([]byte{7}, 32)
	for _, inner := range [][]byte{seed, append([]byte{0x04, 32}, seed...), append([]byte{0x80, 31}, seed[1:]...), nil} {
		der := marshal(t, privateKeyInfo{Algorithm: algorithm{mldsaSchemes[0].oid}, Key: inner})
		if _, err := ParsePrivateKey(der); err == nil || bytes.Contains([]byte(err.Error()), seed) {
			t.Errorf("private key %x: %v", inner, err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	if _, _, err := issuerAlgorithm(key.Public()); err != nil {
		t.Error(err)
	}
	if _, _, err := issuerAlgorithm(mldsaKeyOf(mustKey(t).Public())); !errors.Is(err, ErrKeyType) {
		t.Errorf("an ML-DSA authority: %v", err)
	}
}

func mustKey(t *testing.T) crypto.Signer {
	key, err := mldsaSuites[0].GenerateSignatureKey(rand.Reader)
	ok(t, err)
	return key
}

// TestChainsOfMLDSAKeysStaySmallInMemory: what is cached of a chain is about its encoding, and no expanded key.
func TestChainsOfMLDSAKeysStaySmallInMemory(t *testing.T) {
	h := hierarchyOf(t, "alpha.example")
	f := newForge(t, h)
	key := mldsaKeyOf(mustKey(t).Public())
	spki, err := key.marshal()
	ok(t, err)
	id, err := ParseIdentity(forgeKey(f, spki))
	ok(t, err)
	if _, isOwn := id.PublicKey.(*mldsaKey); !isOwn {
		t.Errorf("identity keeps a %T", id.PublicKey)
	}
	if id.NotAfter.Before(time.Now()) {
		t.Error("expired")
	}
}
