package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls"
)

func caExtension() pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}
}

// forge signs whatever a test wants with a hierarchy's intermediate.
type forge struct {
	tb     testing.TB
	h      *hierarchy
	parent *x509.Certificate
	signer crypto.Signer
	key    crypto.Signer // the subject's
	names  []name
	edit   func(*x509.Certificate)
	extra  [][]byte // certificates after the leaf
}

func newForge(tb testing.TB, h *hierarchy) *forge {
	key, err := mls.X25519_AES128GCM_SHA256_Ed25519.GenerateSignatureKey(rand.Reader)
	ok(tb, err)
	return &forge{tb: tb, h: h, parent: h.intermediate, signer: h.key, key: key, extra: [][]byte{h.intermediate.Raw},
		names: []name{uriName("mimi://alpha.example/u/alice"), uriName("mimi://alpha.example/d/alice-laptop")}, edit: func(*x509.Certificate) {}}
}

func (f *forge) chain() [][]byte {
	f.tb.Helper()
	serial, err := newSerial(rand.Reader)
	ok(f.tb, err)
	t := &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, UnknownExtKeyUsage: []asn1.ObjectIdentifier{oidEKUIMURI}, BasicConstraintsValid: true}
	if f.names != nil {
		t.ExtraExtensions = []pkix.Extension{sanExtension(f.tb, f.names...)}
	}
	f.edit(t)
	der, err := x509.CreateCertificate(rand.Reader, t, f.parent, f.key.Public(), f.signer)
	ok(f.tb, err)
	return append([][]byte{der}, f.extra...)
}

// issuer makes a CA certificate below a root.
func issuer(tb testing.TB, h *hierarchy, edit func(*x509.Certificate)) (*x509.Certificate, crypto.Signer) {
	tb.Helper()
	key, err := KeyP256.generate(rand.Reader)
	ok(tb, err)
	serial, err := newSerial(rand.Reader)
	ok(tb, err)
	t := intermediateTemplate("alpha.example", serial, time.Now())
	edit(t)
	c, err := signIssuer(rand.Reader, t, h.root, key.Public(), h.rootKey)
	ok(tb, err)
	return c, key
}

func bundleOf(tb testing.TB, domain string, sequence uint64, hs ...*hierarchy) *Bundle {
	tb.Helper()
	p := bundleParts{domain: domain, sequence: sequence}
	for _, h := range hs {
		p.roots = append(p.roots, h.root)
		p.intermediates = append(p.intermediates, h.intermediate)
	}
	b, err := newBundle(p)
	ok(tb, err)
	return b
}

func hierarchyOf(tb testing.TB, domain string) *hierarchy {
	tb.Helper()
	h, err := newHierarchy(InitOptions{Domain: domain, Rand: rand.Reader, Time: time.Now})
	ok(tb, err)
	return h
}

func verifierOf(bundles ...*Bundle) *Verifier {
	return &Verifier{Bundles: func(domain string) *Bundle {
		for _, b := range bundles {
			if b.Domain() == domain {
				return b
			}
		}
		return nil
	}}
}

func TestVerify(t *testing.T) {
	alpha, beta := hierarchyOf(t, "alpha.example"), hierarchyOf(t, "beta.example")
	v := verifierOf(bundleOf(t, "alpha.example", 1, alpha), bundleOf(t, "beta.example", 1, beta))
	nodeUse := func(c *x509.Certificate) {
		c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	// reissue replaces the intermediate by another of the same root.
	reissue := func(f *forge, edit func(*x509.Certificate)) {
		c, key := issuer(t, f.h, edit)
		f.parent, f.signer, f.extra = c, key, [][]byte{c.Raw}
	}
	provider, dns := uriName("mimi://alpha.example"), dnsName("alpha.example")
	tests := []struct {
		name   string
		p      Purpose
		edit   func(*forge)
		want   error // nil: verifies
		client bool  // a member refuses it too, whatever it trusts
	}{
		{"client", PurposeClient, func(*forge) {}, nil, false},
		{"client, names in the other order", PurposeClient, func(f *forge) { f.names[0], f.names[1] = f.names[1], f.names[0] }, nil, false},
		{"client, with root", PurposeClient, func(f *forge) { f.extra = append(f.extra, alpha.root.Raw) }, nil, false},
		{"hub", PurposeHub, func(f *forge) { f.names = []name{provider} }, nil, false},
		{"node", PurposeNode, func(f *forge) { f.names, f.edit = []name{dns, provider}, nodeUse }, nil, true},
		{"issued by the root itself", PurposeClient, func(f *forge) { f.parent, f.signer, f.extra = alpha.root, alpha.rootKey, nil }, nil, false},

		{"hub as client", PurposeClient, func(f *forge) { f.names = []name{provider} }, ErrUsage, false},
		{"client as hub", PurposeHub, func(*forge) {}, ErrUsage, false},
		{"client as node", PurposeNode, func(*forge) {}, ErrUsage, false},
		{"client without id-kp-imUri", PurposeClient, func(f *forge) { f.edit = func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil } }, ErrUsage, true},
		{"client for TLS", PurposeClient, func(f *forge) { f.edit = nodeUse }, ErrUsage, true},
		{"hub for TLS", PurposeHub, func(f *forge) { f.names, f.edit = []name{provider}, nodeUse }, ErrUsage, true},
		{"node for messaging", PurposeNode, func(f *forge) { f.names = []name{dns, provider} }, ErrUsage, true},
		{"node for servers only", PurposeNode, func(f *forge) {
			f.names = []name{dns, provider}
			f.edit = func(c *x509.Certificate) {
				c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			}
		}, ErrUsage, true},
		{"any extended use", PurposeClient, func(f *forge) {
			f.edit = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }
		}, ErrUsage, true},
		{"no digital signatures", PurposeClient, func(f *forge) {
			f.edit = func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }
		}, ErrUsage, true},
		{"a CA's certificate", PurposeClient, func(f *forge) { f.edit = func(c *x509.Certificate) { c.IsCA = true } }, ErrUsage, true},
		{"unknown critical extension", PurposeClient, func(f *forge) {
			f.edit = func(c *x509.Certificate) {
				c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
			}
		}, ErrUsage, true},

		{"no names", PurposeClient, func(f *forge) { f.names = nil }, ErrName, true},
		{"three names", PurposeClient, func(f *forge) { f.names = append(f.names, uriName("mimi://alpha.example/d/other")) }, ErrName, true},
		{"a mail address too", PurposeClient, func(f *forge) { f.names = append(f.names, name{1, "alice@alpha.example"}) }, ErrName, true},
		{"two users", PurposeClient, func(f *forge) { f.names[1] = uriName("mimi://alpha.example/u/boss") }, ErrName, true},
		{"names of two providers", PurposeClient, func(f *forge) { f.names[1] = uriName("mimi://beta.example/d/x") }, ErrName, true},
		{"scheme in upper case", PurposeClient, func(f *forge) { f.names[0] = uriName("MIMI://alpha.example/u/alice") }, ErrName, true},
		{"host in upper case", PurposeClient, func(f *forge) { f.names[0] = uriName("mimi://Alpha.example/u/alice") }, ErrName, true},
		{"port", PurposeClient, func(f *forge) { f.names[0] = uriName("mimi://alpha.example:7441/u/alice") }, ErrName, true},
		{"user information", PurposeClient, func(f *forge) { f.names[0] = uriName("mimi://root@alpha.example/u/alice") }, ErrName, true},
		{"percent-encoding", PurposeClient, func(f *forge) { f.names[0] = uriName("mimi://alpha.example/u/%61lice") }, ErrName, true},
		{"another scheme", PurposeClient, func(f *forge) { f.names[0] = uriName("https://alpha.example/u/alice") }, ErrName, true},
		{"node with another DNS name", PurposeNode, func(f *forge) { f.names, f.edit = []name{dnsName("beta.example"), provider}, nodeUse }, ErrName, true},
		{"node with a wildcard", PurposeNode, func(f *forge) { f.names, f.edit = []name{dnsName("*.alpha.example"), provider}, nodeUse }, ErrName, true},
		{"node without provider URI", PurposeNode, func(f *forge) { f.names, f.edit = []name{dns}, nodeUse }, ErrName, true},

		{"a subdomain, which Go's constraints let through", PurposeClient, func(f *forge) {
			f.names = []name{uriName("mimi://x.alpha.example/u/alice"), uriName("mimi://x.alpha.example/d/a")}
		}, ErrForeignName, true},
		{"a node of a subdomain", PurposeNode, func(f *forge) {
			f.names, f.edit = []name{dnsName("x.alpha.example"), uriName("mimi://x.alpha.example")}, nodeUse
		}, ErrForeignName, true},
		{"another provider's name", PurposeClient, func(f *forge) {
			f.names = []name{uriName("mimi://beta.example/u/alice"), uriName("mimi://beta.example/d/a")}
		}, ErrForeignName, true},
		{"another provider's name, issuer unconstrained", PurposeClient, func(f *forge) {
			f.names = []name{uriName("mimi://beta.example/u/alice"), uriName("mimi://beta.example/d/a")}
			reissue(f, func(c *x509.Certificate) {
				c.PermittedDNSDomains, c.PermittedURIDomains, c.PermittedDNSDomainsCritical = nil, nil, false
			})
		}, ErrUntrusted, false},
		{"issuer constrained to DNS names only", PurposeClient, func(f *forge) {
			reissue(f, func(c *x509.Certificate) { c.PermittedURIDomains = nil })
		}, nil, false},
		{"name excluded", PurposeClient, func(f *forge) {
			reissue(f, func(c *x509.Certificate) { c.PermittedURIDomains, c.ExcludedURIDomains = nil, []string{"example"} })
		}, ErrForeignName, true},

		{"issuer is no CA", PurposeClient, func(f *forge) {
			reissue(f, func(c *x509.Certificate) {
				c.IsCA, c.MaxPathLenZero, c.KeyUsage = false, false, x509.KeyUsageDigitalSignature
			})
		}, ErrBroken, true},
		{"issuer may not sign certificates", PurposeClient, func(f *forge) {
			reissue(f, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
		}, ErrBroken, true},
		{"issuer for servers only", PurposeClient, func(f *forge) {
			reissue(f, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
		}, ErrUsage, true},
		{"path too long", PurposeClient, func(f *forge) {
			key, err := KeyP256.generate(rand.Reader)
			ok(t, err)
			serial, err := newSerial(rand.Reader)
			ok(t, err)
			c, err := signIssuer(rand.Reader, intermediateTemplate("alpha.example", serial, time.Now()), alpha.intermediate, key.Public(), alpha.key)
			ok(t, err)
			f.parent, f.signer, f.extra = c, key, [][]byte{c.Raw, alpha.intermediate.Raw}
		}, ErrBroken, true},
		{"signed with another key", PurposeClient, func(f *forge) {
			f.signer = beta.key
			f.parent = &x509.Certificate{RawSubject: alpha.intermediate.RawSubject, SubjectKeyId: alpha.intermediate.SubjectKeyId, PublicKey: beta.key.Public()}
		}, ErrBroken, true},
		{"certificates out of order", PurposeClient, func(f *forge) { f.extra = [][]byte{alpha.root.Raw, alpha.intermediate.Raw} }, ErrBroken, true},
		{"certificate that doesn't belong", PurposeClient, func(f *forge) { f.extra = append(f.extra, beta.root.Raw) }, ErrBroken, true},
		{"intermediate missing", PurposeClient, func(f *forge) { f.extra = nil }, ErrUntrusted, false},
		{"issued by another provider", PurposeClient, func(f *forge) {
			c, key := issuer(t, beta, func(*x509.Certificate) {}) // beta's root vouches for an issuer for alpha
			f.parent, f.signer, f.extra = c, key, [][]byte{c.Raw}
		}, ErrUntrusted, false},
		{"unknown provider", PurposeClient, func(f *forge) {
			gamma := hierarchyOf(t, "gamma.example")
			f.parent, f.signer, f.extra = gamma.intermediate, gamma.key, [][]byte{gamma.intermediate.Raw}
			f.names = []name{uriName("mimi://gamma.example/u/g"), uriName("mimi://gamma.example/d/g")}
		}, ErrUnknownProvider, false},

		{"expired", PurposeClient, func(f *forge) {
			f.edit = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }
		}, ErrExpired, false},
		{"not valid yet", PurposeClient, func(f *forge) {
			f.edit = func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }
		}, ErrNotYetValid, false},
		{"issuer expired", PurposeClient, func(f *forge) {
			reissue(f, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
		}, ErrExpired, false},
		{"P-224 key", PurposeClient, func(f *forge) {
			key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
			ok(t, err)
			f.key = key
		}, ErrMalformed, true},
		{"too many certificates", PurposeClient, func(f *forge) {
			for range maxChain {
				f.extra = append(f.extra, alpha.root.Raw)
			}
		}, ErrMalformed, true},
		{"garbage after the leaf", PurposeClient, func(f *forge) { f.extra = [][]byte{[]byte("garbage")} }, ErrMalformed, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newForge(t, alpha)
			tt.edit(f)
			chain := f.chain()
			for _, round := range []string{"cold", "cached"} {
				id, err := v.Verify(chain, tt.p)
				if tt.want != nil {
					wantErr(t, err, tt.want)
				} else if err != nil || id.Domain != "alpha.example" {
					t.Fatalf("%s: %v, %+v", round, err, id)
				}
			}
			// The adapters: the hub refuses what Verify refuses, the member what all members refuse alike.
			cred := mls.X509Credential(chain)
			key, suite := encodedKey(f.key)
			hub, member := v.ForHub().VerifyCredential(cred, key, suite), v.ForClient().VerifyCredential(cred, key, suite)
			if tt.want != nil && tt.p == PurposeClient && tt.want != ErrUsage {
				wantErr(t, hub, tt.want)
			}
			if (member != nil) != tt.client {
				t.Errorf("a member says %v", member)
			}
			if _, err := v.Verify(chain, tt.p); TimeVariant(err) && tt.client {
				t.Errorf("members refuse %v, which they may see differently", err)
			}
		})
	}
}

// encodedKey returns an Ed25519 key and a suite for it, or any suite for other keys.
func encodedKey(key crypto.Signer) ([]byte, mls.CipherSuite) {
	if pub, ok := key.Public().(ed25519.PublicKey); ok {
		return pub, mls.X25519_AES128GCM_SHA256_Ed25519
	}
	return nil, mls.X25519_AES128GCM_SHA256_Ed25519
}

func TestVerifyKeyWantsTheCertificatesKey(t *testing.T) {
	alpha := hierarchyOf(t, "alpha.example")
	v := verifierOf(bundleOf(t, "alpha.example", 1, alpha))
	f := newForge(t, alpha)
	chain, suite := f.chain(), mls.X25519_AES128GCM_SHA256_Ed25519
	key, _ := encodedKey(f.key)
	_, err := v.VerifyKey(chain, suite, key, PurposeClient)
	ok(t, err)
	_, err = v.VerifyKey(chain, mls.P256_AES128GCM_SHA256_P256, key, PurposeClient)
	wantErr(t, err, ErrSuite)
	_, err = v.VerifyKey(chain, mls.CipherSuite(77), key, PurposeClient)
	wantErr(t, err, ErrSuite)
	other, _ := encodedKey(newForge(t, alpha).key)
	_, err = v.VerifyKey(chain, suite, other, PurposeClient)
	wantErr(t, err, ErrKeyMismatch)
	wantErr(t, v.ForClient().VerifyCredential(mls.X509Credential(chain), other, suite), ErrKeyMismatch)
	wantErr(t, v.ForClient().VerifyCredential(mls.BasicCredential([]byte("alice")), other, suite), ErrMalformed)
}

func TestSuccessorIsTheSameClient(t *testing.T) {
	alpha := hierarchyOf(t, "alpha.example")
	v := verifierOf(bundleOf(t, "alpha.example", 1, alpha))
	cred := func(user, client string) mls.Credential {
		f := newForge(t, alpha)
		f.names = []name{uriName("mimi://alpha.example/u/" + user), uriName("mimi://alpha.example/d/" + client)}
		return mls.X509Credential(f.chain())
	}
	c := v.ForClient()
	ok(t, c.ValidSuccessor(cred("alice", "laptop"), cred("alice", "laptop")))
	wantErr(t, c.ValidSuccessor(cred("alice", "laptop"), cred("alice", "phone")), ErrName)
	wantErr(t, c.ValidSuccessor(cred("alice", "laptop"), cred("boss", "laptop")), ErrName)
	id, err := c.Identity(cred("alice", "laptop"))
	ok(t, err)
	if string(id) != "mimi://alpha.example/d/laptop" {
		t.Errorf("identity %s", id)
	}
	f := newForge(t, alpha)
	f.names = []name{uriName("mimi://alpha.example")}
	hub := mls.X509Credential(f.chain())
	if _, err := c.Identity(hub); err == nil {
		t.Error("a hub's certificate names a member")
	}
	user, client, err := v.IdentityOf(cred("alice", "laptop"))
	if err != nil || user != "mimi://alpha.example/u/alice" || client != "mimi://alpha.example/d/laptop" {
		t.Errorf("%s %s %v", user, client, err)
	}
}

func TestCacheForgetsNothingThatMatters(t *testing.T) {
	alpha := hierarchyOf(t, "alpha.example")
	first := bundleOf(t, "alpha.example", 1, alpha)
	current, now := first, time.Now()
	v := &Verifier{Bundles: func(string) *Bundle { return current }, Time: func() time.Time { return now }}
	chain := newForge(t, alpha).chain()
	_, err := v.Verify(chain, PurposeClient)
	ok(t, err)

	now = now.Add(2 * time.Hour)
	_, err = v.Verify(chain, PurposeClient)
	wantErr(t, err, ErrExpired)
	now = now.Add(-2 * time.Hour)

	leaf, err := x509.ParseCertificate(chain[0])
	ok(t, err)
	current = bundleOf2(t, alpha, 2, leaf)
	_, err = v.Verify(chain, PurposeClient)
	wantErr(t, err, ErrRevoked)

	current = bundleOf(t, "alpha.example", 3, hierarchyOf(t, "alpha.example"))
	_, err = v.Verify(chain, PurposeClient)
	wantErr(t, err, ErrUntrusted)

	current = bundleOf2(t, alpha, 4, alpha.intermediate)
	_, err = v.Verify(chain, PurposeClient)
	wantErr(t, err, ErrRevoked)

	current = nil
	_, err = v.Verify(chain, PurposeClient)
	wantErr(t, err, ErrUnknownProvider)
}

// bundleOf2 is a bundle that revokes certificates, with the sequence as the list's number.
func bundleOf2(tb testing.TB, h *hierarchy, sequence int64, revoked ...*x509.Certificate) *Bundle {
	tb.Helper()
	b, err := newBundle(bundleParts{domain: "alpha.example", sequence: uint64(sequence), roots: []*x509.Certificate{h.root},
		intermediates: []*x509.Certificate{h.intermediate}, lists: []*x509.RevocationList{listOf(tb, h, sequence, revoked...)}})
	ok(tb, err)
	return b
}

func TestChainCacheIsBounded(t *testing.T) {
	c := chainCache{capacity: 4}
	for i := range 100 {
		c.put([32]byte{byte(i)}, &cachedChain{chain: &chain{}})
	}
	if n := len(c.young) + len(c.old); n > 8 {
		t.Errorf("%d entries", n)
	}
	if c.get([32]byte{99}) == nil || c.get([32]byte{0}) != nil {
		t.Error("the cache doesn't keep the latest")
	}
	// Large chains are as bounded as many.
	c = chainCache{}
	large := &cachedChain{chain: &chain{certs: []*x509.Certificate{{Raw: make([]byte, maxCachedBytes/8)}}}}
	for i := range 100 {
		c.put([32]byte{byte(i)}, large)
	}
	if n := len(c.young) + len(c.old); n > 16 {
		t.Errorf("%d large entries", n)
	}
}

func BenchmarkVerify(b *testing.B) {
	for _, suite := range []mls.CipherSuite{mls.X25519_AES128GCM_SHA256_Ed25519, mls.P256_AES128GCM_SHA256_P256} {
		alpha := hierarchyOf(b, "alpha.example")
		v := verifierOf(bundleOf(b, "alpha.example", 1, alpha))
		f := newForge(b, alpha)
		key, err := suite.GenerateSignatureKey(rand.Reader)
		ok(b, err)
		f.key = key
		pub, err := suite.SignaturePublicKey(key.Public())
		ok(b, err)
		chain := f.chain()
		b.Run(fmt.Sprintf("cold/%v", suite), func(b *testing.B) {
			for b.Loop() {
				fresh := &Verifier{Bundles: v.Bundles}
				if _, err := fresh.VerifyKey(chain, suite, pub, PurposeClient); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("issuer-known/%v", suite), func(b *testing.B) {
			for b.Loop() {
				v.chains = chainCache{}
				if _, err := v.VerifyKey(chain, suite, pub, PurposeClient); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("cached/%v", suite), func(b *testing.B) {
			for b.Loop() {
				if _, err := v.VerifyKey(chain, suite, pub, PurposeClient); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
