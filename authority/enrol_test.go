package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
)

func TestEnrolledCertificateVerifies(t *testing.T) {
	for _, issuer := range []KeyType{KeyP256, KeyP384, KeyP521, KeyEd25519} {
		dir, h := testDir(t, "alpha.example", issuer)
		e, err := Open(dir, newMemory(), nil)
		ok(t, err)
		defer e.Close()
		for i, suite := range mls.CipherSuites() {
			if !suite.X509() {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", issuer, suite), func(t *testing.T) {
				d := newDeviceOf(t, "alpha.example", "alice", fmt.Sprintf("alice-%d", i), suite)
				inv, err := e.Invite(t.Context(), d.user, 0)
				ok(t, err)
				if inv.Root != FingerprintOf(h.root) {
					t.Error("the invitation has another root")
				}
				chain, err := e.Enrol(t.Context(), inv.Token, d.csr(t))
				ok(t, err)
				id, err := e.Verifier().VerifyKey(chain, suite, d.public(t), PurposeClient)
				ok(t, err)
				if id.User != d.user || id.Client != d.client || id.Domain != "alpha.example" || id.Node {
					t.Errorf("identity %+v", id)
				}
				// Go's own path validation agrees.
				leaf, err := x509.ParseCertificate(chain[0])
				ok(t, err)
				roots, between := x509.NewCertPool(), x509.NewCertPool()
				roots.AddCert(h.root)
				between.AddCert(h.intermediate)
				_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
				ok(t, err)
			})
		}
	}
}

func TestInvitationServesOnce(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	inv, err := f.Invite(t.Context(), d.user, time.Hour)
	ok(t, err)
	csr := d.csr(t)
	chain, err := f.Enrol(t.Context(), inv.Token, csr)
	ok(t, err)

	again, err := f.Enrol(t.Context(), inv.Token, csr)
	ok(t, err)
	if !bytes.Equal(again[0], chain[0]) {
		t.Error("the same request got another certificate")
	}
	_, err = f.Enrol(t.Context(), inv.Token, newDevice(t, "alpha.example", "alice", "alice-phone").csr(t))
	wantErr(t, err, ErrTokenUsed)

	f.reopen(t)
	_, err = f.Enrol(t.Context(), inv.Token, newDevice(t, "alpha.example", "alice", "alice-phone").csr(t))
	wantErr(t, err, ErrTokenUsed)

	_, err = f.Revoke(t.Context(), string(d.client), "stolen")
	ok(t, err)
	_, err = f.Enrol(t.Context(), inv.Token, csr)
	wantErr(t, err, ErrTokenUsed)
}

func TestTokenIsNotStored(t *testing.T) {
	f := newFixture(t, "alpha.example")
	inv, err := f.Invite(t.Context(), "mimi://alpha.example/u/alice", time.Hour)
	ok(t, err)
	for k, v := range f.store.snapshot() {
		if strings.Contains(k, inv.Token) || bytes.Contains(v, []byte(inv.Token)) {
			t.Errorf("the token is in row %s", k)
		}
	}
}

func TestEnrolRefuses(t *testing.T) {
	f := newFixture(t, "alpha.example")
	key, err := mls.X25519_AES128GCM_SHA256_Ed25519.GenerateSignatureKey(rand.Reader)
	ok(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	ok(t, err)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	ok(t, err)
	taken := newDevice(t, "alpha.example", "bob", "bob-phone")
	f.enrol(t, taken)

	const user, client = "mimi://alpha.example/u/alice", "mimi://alpha.example/d/alice-laptop"
	forged := bytes.Clone(csrOf(t, key, uriName(user), uriName(client)))
	forged[len(forged)-1] ^= 1
	with := func(names ...name) []byte { return csrOf(t, key, names...) }
	tests := []struct {
		name string
		csr  []byte
		want error
	}{
		{"no DER", []byte("hello"), ErrRequest},
		{"empty", nil, ErrRequest},
		{"too long", make([]byte, maxRequest+1), ErrRequest},
		{"signed with another key", forged, ErrPossession},
		{"RSA key", csrOf(t, rsaKey, uriName(user), uriName(client)), ErrKeyType},
		{"P-224 key", csrOf(t, p224, uriName(user), uriName(client)), ErrKeyType},
		{"no names", noNames(t, key), ErrName},
		{"user only", with(uriName(user)), ErrName},
		{"client only", with(uriName(client)), ErrName},
		{"two users", with(uriName(user), uriName("mimi://alpha.example/u/boss")), ErrName},
		{"user, client and one more client", with(uriName(user), uriName(client), uriName("mimi://alpha.example/d/x")), ErrName},
		{"extra DNS name", with(uriName(user), uriName(client), dnsName("alpha.example")), ErrName},
		{"extra mail address", with(uriName(user), uriName(client), name{1, "alice@alpha.example"}), ErrName},
		{"extra address", with(uriName(user), uriName(client), name{7, "\x7f\x00\x00\x01"}), ErrName},
		{"mail addresses only", with(name{1, "alice@alpha.example"}, name{1, "laptop@alpha.example"}), ErrName},
		{"room", with(uriName(user), uriName("mimi://alpha.example/r/room")), ErrName},
		{"another user", with(uriName("mimi://alpha.example/u/boss"), uriName(client)), ErrTokenName},
		{"another provider", with(uriName("mimi://beta.example/u/alice"), uriName("mimi://beta.example/d/alice-laptop")), ErrForeignName},
		{"user of another provider", with(uriName("mimi://beta.example/u/alice"), uriName(client)), ErrName},
		{"client of another provider", with(uriName(user), uriName("mimi://beta.example/d/alice-laptop")), ErrName},
		{"subdomain", with(uriName("mimi://x.alpha.example/u/alice"), uriName("mimi://x.alpha.example/d/alice-laptop")), ErrForeignName},
		{"look-alike suffix", with(uriName("mimi://alpha.example.evil.example/u/alice"), uriName("mimi://alpha.example.evil.example/d/a")), ErrForeignName},
		{"look-alike letter", with(uriName("mimi://a1pha.example/u/alice"), uriName("mimi://a1pha.example/d/a")), ErrForeignName},
		{"another client's name", with(uriName(user), uriName(string(taken.client))), ErrClientTaken},
	}
	for _, bad := range []string{
		"mimi://alpha.example:443/u/alice", "mimi://alice@alpha.example/u/alice", "mimi://ALPHA.example/u/alice",
		"MIMI://alpha.example/u/alice", "mimi://*.example/u/alice", "mimi://alpha.example./u/alice", "mimi://alpha.example/u/%61lice",
		"mimi://alpha.example/u/Alice", "mimi://alpha.example/u/alice?x=1", "mimi://alpha.example/u/alice#x", "mimi://alpha.example/u/",
		"mimi://alpha.example/u/alice/", "mimi://alpha.example/u/../u/alice", "https://alpha.example/u/alice", "mimi:alpha.example/u/alice",
		"mimi://127.0.0.1/u/alice", "mimi://[::1]/u/alice", "mimi://аlpha.example/u/alice", "mimi://alpha.example/u/alice\x00",
	} {
		tests = append(tests, struct {
			name string
			csr  []byte
			want error
		}{"user " + bad, with(uriName(bad), uriName(client)), nil})
	}
	inv, err := f.Invite(t.Context(), user, time.Hour)
	ok(t, err)
	before := f.store.snapshot()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.Enrol(t.Context(), inv.Token, tt.csr)
			if tt.want == nil { // what Go's parser refuses already is a malformed request
				if !errors.Is(err, ErrName) && !errors.Is(err, ErrRequest) {
					t.Fatalf("got %v", err)
				}
				return
			}
			wantErr(t, err, tt.want)
			if tt.want == ErrTokenName { // an administrator needs no invitation
				return
			}
			_, err = f.Issue(t.Context(), tt.csr)
			if tt.name != "another client's name" || !errors.Is(err, ErrClientTaken) {
				wantErr(t, err, tt.want)
			}
		})
	}
	if after := f.store.snapshot(); len(after) != len(before) {
		t.Errorf("refused requests left %d rows", len(after)-len(before))
	}
	// After all this, the invitation still serves.
	_, err = f.Enrol(t.Context(), inv.Token, with(uriName(user), uriName(client)))
	ok(t, err)
}

func noNames(t *testing.T, key crypto.Signer) []byte {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	ok(t, err)
	return der
}

func TestTokenRefusals(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	_, err := f.Enrol(t.Context(), "guessed", d.csr(t))
	wantErr(t, err, ErrTokenUnknown)
	_, err = f.Enrol(t.Context(), strings.Repeat("x", 1<<20), d.csr(t))
	wantErr(t, err, ErrTokenUnknown)

	inv, err := f.Invite(t.Context(), d.user, time.Hour)
	ok(t, err)
	f.clock.Advance(time.Hour + time.Second)
	_, err = f.Enrol(t.Context(), inv.Token, d.csr(t))
	wantErr(t, err, ErrTokenExpired)

	for _, bad := range []mimi.URI{"", "mimi://alpha.example", "mimi://alpha.example/d/x", "mimi://alpha.example/u/A"} {
		_, err = f.Invite(t.Context(), bad, time.Hour)
		wantErr(t, err, ErrRequest)
	}
	_, err = f.Invite(t.Context(), "mimi://beta.example/u/alice", time.Hour)
	wantErr(t, err, ErrForeignName)
	for _, ttl := range []time.Duration{-1, time.Millisecond, MaxInvitation + time.Second} {
		_, err = f.Invite(t.Context(), d.user, ttl)
		wantErr(t, err, ErrRequest)
	}
}

func TestOneOfConcurrentEnrolmentsWins(t *testing.T) {
	f := newFixture(t, "alpha.example")
	inv, err := f.Invite(t.Context(), "mimi://alpha.example/u/alice", time.Hour)
	ok(t, err)
	const n = 16
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		csr := newDevice(t, "alpha.example", "alice", fmt.Sprintf("device%d", i)).csr(t)
		wg.Go(func() { _, errs[i] = f.Enrol(context.Background(), inv.Token, csr) })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.Is(err, ErrTokenUsed) {
			t.Errorf("loser got %v", err)
		}
	}
	certs, err := f.List(t.Context(), Filter{})
	ok(t, err)
	if won != 1 || len(certs) != 1 {
		t.Errorf("%d enrolments won, %d certificates exist", won, len(certs))
	}
}

func TestClientNameGoesToOneUserOnly(t *testing.T) {
	f := newFixture(t, "alpha.example")
	const n = 8
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		d := newDevice(t, "alpha.example", fmt.Sprintf("user%d", i), "phone")
		csr := d.csr(t)
		wg.Go(func() { _, errs[i] = f.Issue(context.Background(), csr) })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.Is(err, ErrClientTaken) {
			t.Errorf("loser got %v", err)
		}
	}
	if won != 1 {
		t.Errorf("%d users got the client's name", won)
	}
}

// A crash between signing and storing must lose the certificate, not the record of it.
func TestNoCertificateLeavesThatTheStoreDoesNotKnow(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	inv, err := f.Invite(t.Context(), d.user, time.Hour)
	ok(t, err)
	crash := errors.New("power cut")
	f.store.before = func(changes map[string][]byte) error { return crash }
	chain, err := f.Enrol(t.Context(), inv.Token, d.csr(t))
	if err == nil || chain != nil {
		t.Fatalf("got %d certificates, error %v", len(chain), err)
	}
	f.store.before = nil
	f.reopen(t)
	certs, err := f.List(t.Context(), Filter{})
	ok(t, err)
	if len(certs) != 0 {
		t.Errorf("%d certificates are stored", len(certs))
	}
	// The token was not used up by it, and a certificate and its token's use are one step.
	steps := 0
	f.store.before = func(changes map[string][]byte) error { steps++; return nil }
	_, err = f.Enrol(t.Context(), inv.Token, d.csr(t))
	ok(t, err)
	if steps != 1 {
		t.Errorf("enrolling took %d commits", steps)
	}
}

func TestRequestedExtrasAreLeftOut(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	template := &x509.CertificateRequest{}
	template.Subject.CommonName = "root"
	template.ExtraExtensions = append(template.ExtraExtensions, sanExtension(t, uriName(string(d.user)), uriName(string(d.client))))
	template.ExtraExtensions = append(template.ExtraExtensions, caExtension())
	der, err := x509.CreateCertificateRequest(rand.Reader, template, d.key)
	ok(t, err)
	chain, err := f.Issue(t.Context(), der)
	ok(t, err)
	leaf, err := x509.ParseCertificate(chain[0])
	ok(t, err)
	if leaf.IsCA || leaf.Subject.CommonName != "alice-laptop" {
		t.Errorf("CA %v, subject %v", leaf.IsCA, leaf.Subject)
	}
}
