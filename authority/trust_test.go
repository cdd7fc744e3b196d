package authority

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

func openTrust(tb testing.TB, store Store) *TrustStore {
	tb.Helper()
	trust, err := OpenTrust(store, "own.example")
	ok(tb, err)
	return trust
}

// nodeChain returns what the node of f's provider shows in a handshake.
func nodeChain(tb testing.TB, f *fixture) []*x509.Certificate {
	tb.Helper()
	key, err := KeyP256.generate(f.rand)
	ok(tb, err)
	raw, err := f.IssueNode(tb.Context(), key.Public())
	ok(tb, err)
	certs, err := parseChain(raw)
	ok(tb, err)
	return certs
}

func TestApprovedPeerIsVerifiedBeforeItsBundleArrives(t *testing.T) {
	alpha := newFixture(t, "alpha.example")
	chain := nodeChain(t, alpha)
	store := newMemory()
	trust := openTrust(t, store)

	_, err := trust.VerifyNode(chain)
	wantErr(t, err, ErrUnapproved)
	u, isUnapproved := errors.AsType[*UnapprovedError](err)
	if !isUnapproved || u.Domain != "alpha.example" || u.Fingerprint != alpha.Root() {
		t.Fatalf("%v doesn't say whom to approve", err)
	}
	ok(t, trust.Approve(t.Context(), u.Domain, u.Fingerprint, "127.0.0.1:7441"))
	for range 2 {
		domain, err := trust.VerifyNode(chain)
		if err != nil || domain != "alpha.example" {
			t.Fatalf("%s, %v", domain, err)
		}
		trust = openTrust(t, store) // after a restart too
	}
	ok(t, trust.Remove("alpha.example"))
	_, err = trust.VerifyNode(chain)
	wantErr(t, err, ErrUnapproved)
	wantErr(t, trust.Remove("alpha.example"), ErrUnapproved)
}

func TestVerifyNodeRefuses(t *testing.T) {
	alpha := hierarchyOf(t, "alpha.example")
	trust := openTrust(t, newMemory())
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(alpha.root), ""))
	node := func(edit func(*forge)) []*x509.Certificate {
		f := newForge(t, alpha)
		f.names, f.extra = []name{dnsName("alpha.example"), uriName("mimi://alpha.example")}, [][]byte{alpha.intermediate.Raw, alpha.root.Raw}
		use := func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		}
		f.edit = use
		edit(f)
		certs, err := parseChain(f.chain())
		ok(t, err)
		return certs
	}
	if _, err := trust.VerifyNode(node(func(*forge) {})); err != nil {
		t.Fatal(err)
	}
	evil := hierarchyOf(t, "alpha.example")
	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		want  error
	}{
		{"nothing", nil, ErrMalformed},
		{"without root", node(func(f *forge) { f.extra = f.extra[:1] }), ErrBroken},
		{"another root", node(func(f *forge) {
			f.parent, f.signer, f.extra = evil.intermediate, evil.key, [][]byte{evil.intermediate.Raw, evil.root.Raw}
		}), ErrUnapproved},
		{"approved root appended to another chain", node(func(f *forge) {
			f.parent, f.signer, f.extra = evil.intermediate, evil.key, [][]byte{evil.intermediate.Raw, alpha.root.Raw}
		}), ErrBroken},
		{"another provider's name under an approved root", node(func(f *forge) {
			f.names = []name{dnsName("beta.example"), uriName("mimi://beta.example")}
		}), ErrForeignName},
		{"subdomain", node(func(f *forge) {
			f.names = []name{dnsName("x.alpha.example"), uriName("mimi://x.alpha.example")}
		}), ErrForeignName},
		{"two DNS names", node(func(f *forge) {
			f.names = append(f.names, dnsName("alpha.example"))
		}), ErrName},
		{"a client", node(func(f *forge) { *f = *newForge(t, alpha); f.extra = append(f.extra, alpha.root.Raw) }), ErrUsage},
		{"expired", node(func(f *forge) {
			use := f.edit
			f.edit = func(c *x509.Certificate) { use(c); c.NotAfter = time.Now().Add(-time.Second) }
		}), ErrExpired},
	} {
		_, err := trust.VerifyNode(tt.chain)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	revoked := node(func(*forge) {})
	_, err := trust.PutBundle("alpha.example", bundleOf2(t, alpha, 1, revoked[0]))
	ok(t, err)
	_, err = trust.VerifyNode(revoked)
	wantErr(t, err, ErrRevoked)
}

func TestBundleOfAPeer(t *testing.T) {
	alpha := hierarchyOf(t, "alpha.example")
	store := newMemory()
	trust := openTrust(t, store)
	_, err := trust.PutBundle("alpha.example", bundleOf(t, "alpha.example", 1, alpha))
	wantErr(t, err, ErrUnapproved)
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(alpha.root), ""))
	if trust.Bundle("alpha.example") != nil {
		t.Error("a bundle before one arrived")
	}

	put := func(b *Bundle) bool {
		t.Helper()
		changed, err := trust.PutBundle("alpha.example", b)
		ok(t, err)
		return changed
	}
	refuse := func(b *Bundle, want error) {
		t.Helper()
		kept := trust.Bundle("alpha.example")
		_, err := trust.PutBundle("alpha.example", b)
		wantErr(t, err, want)
		if trust.Bundle("alpha.example") != kept {
			t.Error("a refused bundle replaced the known one")
		}
	}
	refuse(bundleOf(t, "alpha.example", 1, hierarchyOf(t, "alpha.example")), ErrUntrusted)
	refuse(bundleOf(t, "beta.example", 1, alpha), ErrBundle)
	refuse(nil, ErrBundle)
	leaf, err := x509.ParseCertificate(newForge(t, alpha).chain()[0])
	ok(t, err)
	five := bundleOf2(t, alpha, 5, leaf)
	if !put(five) || put(five) {
		t.Error("changed is wrong")
	}
	refuse(bundleOf2(t, alpha, 4, leaf), ErrStale)
	refuse(bundleOf2(t, alpha, 5), ErrStale) // the same number, another content

	// A list may not go back, even in a later bundle.
	b, err := newBundle(bundleParts{domain: "alpha.example", sequence: 6, roots: []*x509.Certificate{alpha.root},
		intermediates: []*x509.Certificate{alpha.intermediate}, lists: []*x509.RevocationList{listOf(t, alpha, 4)}})
	ok(t, err)
	refuse(b, ErrStale)

	trust = openTrust(t, store)
	if p, _ := trust.Peer("alpha.example"); p.Sequence != 5 || p.Updated.IsZero() || !trust.Bundle("alpha.example").Revoked(serialString(leaf.SerialNumber)) {
		t.Errorf("after a restart: %+v", p)
	}
}

func TestRootsRollOverByAnnouncement(t *testing.T) {
	first, second, third := hierarchyOf(t, "alpha.example"), hierarchyOf(t, "alpha.example"), hierarchyOf(t, "alpha.example")
	trust := openTrust(t, newMemory())
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(first.root), ""))
	bundle := func(sequence uint64, successor *hierarchy, hs ...*hierarchy) *Bundle {
		p := bundleParts{domain: "alpha.example", sequence: sequence}
		for _, h := range hs {
			p.roots, p.intermediates = append(p.roots, h.root), append(p.intermediates, h.intermediate)
		}
		if successor != nil {
			p.successors = []Fingerprint{FingerprintOf(successor.root)}
		}
		b, err := newBundle(p)
		ok(t, err)
		return b
	}
	put := func(b *Bundle, want error) {
		t.Helper()
		_, err := trust.PutBundle("alpha.example", b)
		if !errors.Is(err, want) {
			t.Fatalf("got %v, want %v", err, want)
		}
	}
	put(bundle(1, nil, first), nil)
	put(bundle(2, nil, second), ErrUntrusted) // not announced
	node := func(h *hierarchy) []*x509.Certificate {
		f := newForge(t, h)
		f.names, f.extra = []name{dnsName("alpha.example"), uriName("mimi://alpha.example")}, [][]byte{h.intermediate.Raw, h.root.Raw}
		f.edit = func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		}
		certs, err := parseChain(f.chain())
		ok(t, err)
		return certs
	}
	_, err := trust.VerifyNode(node(second))
	wantErr(t, err, ErrUnapproved)
	put(bundle(2, second, first), nil)
	// A peer that was away while both were in use has to get the next bundle from a node that shows the new root.
	_, err = trust.VerifyNode(node(second))
	ok(t, err)
	put(bundle(3, nil, first, second), nil)
	put(bundle(4, nil, second), nil)
	put(bundle(5, nil, third), ErrUntrusted)
	chain := newForge(t, second).chain()
	if _, err := trust.Verifier().Verify(chain, PurposeClient); err != nil {
		t.Error(err)
	}
	if _, err := trust.Verifier().Verify(newForge(t, first).chain(), PurposeClient); !errors.Is(err, ErrUntrusted) {
		t.Errorf("the root that was given up: %v", err)
	}
}

func TestApproveRefuses(t *testing.T) {
	trust := openTrust(t, newMemory())
	f := Fingerprint{1}
	for _, tt := range []struct {
		domain, address string
		f               Fingerprint
	}{
		{"own.example", "", f}, {"", "", f}, {"Alpha.example", "", f}, {"alpha.example:1", "", f}, {"alpha.example", "", Fingerprint{}},
		{"alpha.example", "nowhere", f}, {"alpha.example", ":7441", f}, {"alpha.example", "host:0", f}, {"alpha.example", "host:99999", f},
		{"alpha.example", "host:http", f}, {"alpha.example", "a b:1", f},
	} {
		err := trust.Approve(t.Context(), tt.domain, tt.f, tt.address)
		if !errors.Is(err, ErrRequest) {
			t.Errorf("%+v: %v", tt, err)
		}
	}
	if len(trust.Peers()) != 0 {
		t.Error("a refused peer is stored")
	}
}

func TestApprovingAgain(t *testing.T) {
	alpha, other := hierarchyOf(t, "alpha.example"), hierarchyOf(t, "alpha.example")
	trust := openTrust(t, newMemory())
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(alpha.root), "a:1"))
	_, err := trust.PutBundle("alpha.example", bundleOf(t, "alpha.example", 9, alpha))
	ok(t, err)
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(alpha.root), "b:2"))
	if p, _ := trust.Peer("alpha.example"); p.Address != "b:2" || p.Sequence != 9 {
		t.Errorf("another address: %+v", p)
	}
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(other.root), ""))
	if p, _ := trust.Peer("alpha.example"); p.Address != "b:2" || p.Sequence != 0 || trust.Bundle("alpha.example") != nil {
		t.Errorf("another root: %+v", p)
	}
}

func TestConcurrentChangesOfPeersAllHappen(t *testing.T) {
	store := newMemory()
	trust := openTrust(t, store)
	var wg sync.WaitGroup
	h := hierarchyOf(t, "alpha.example")
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(h.root), ""))
	for i := range 8 {
		b := bundleOf(t, "alpha.example", uint64(i+1), h)
		wg.Go(func() {
			if err := trust.Approve(context.Background(), fmt.Sprintf("p%d.example", i), Fingerprint{byte(i + 1)}, ""); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if _, err := trust.PutBundle("alpha.example", b); err != nil && !errors.Is(err, ErrStale) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	stored := openTrust(t, store)
	if len(trust.Peers()) != 9 || !slices.EqualFunc(trust.Peers(), stored.Peers(), func(a, b Peer) bool { return a.Domain == b.Domain && a.Sequence == b.Sequence }) {
		t.Errorf("in memory %+v, stored %+v", trust.Peers(), stored.Peers())
	}
	if p, _ := trust.Peer("alpha.example"); p.Sequence != 8 {
		t.Errorf("sequence %d", p.Sequence)
	}
}

func TestOwnBundleIsAmongTheBundles(t *testing.T) {
	own, alpha := newFixture(t, "own.example"), hierarchyOf(t, "alpha.example")
	trust := openTrust(t, newMemory())
	b, err := own.Bundle(t.Context())
	ok(t, err)
	trust.SetOwn(b)
	ok(t, trust.Approve(t.Context(), "alpha.example", FingerprintOf(alpha.root), ""))
	_, err = trust.PutBundle("alpha.example", bundleOf(t, "alpha.example", 1, alpha))
	ok(t, err)
	var domains []string
	for _, b := range trust.Bundles() {
		domains = append(domains, b.Domain())
	}
	if !slices.Equal(domains, []string{"own.example", "alpha.example"}) {
		t.Errorf("bundles of %v", domains)
	}
	d := newDevice(t, "own.example", "me", "me-laptop")
	_, err = trust.Verifier().Verify(own.enrol(t, d), PurposeClient)
	ok(t, err)
	if domain, err := trust.VerifyNode(nodeChain(t, own)); err != nil || domain != "own.example" {
		t.Errorf("the own node: %s, %v", domain, err)
	}
}
