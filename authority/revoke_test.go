package authority

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

func TestRevokedClientIsInTheBundle(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d, other := newDevice(t, "alpha.example", "alice", "alice-laptop"), newDevice(t, "alpha.example", "alice", "alice-phone")
	chain, otherChain := f.enrol(t, d), f.enrol(t, other)
	renewed, err := f.Renew(t.Context(), chain, d.csr(t))
	ok(t, err)
	before, err := f.Bundle(t.Context())
	ok(t, err)

	var seen []Certificate
	var pushed []uint64
	f.OnRevoke(func(c *Certificate) {
		if b, _ := f.Bundle(context.Background()); !b.Revoked(c.Serial) {
			t.Errorf("%s was announced before the bundle has it", c.Serial)
		}
		seen = append(seen, *c)
	})
	f.OnBundle(func(b *Bundle) { pushed = append(pushed, b.Sequence()) })
	c, err := f.Revoke(t.Context(), string(d.client), "keyCompromise")
	ok(t, err)
	if c.Client != d.client || c.Revoked.IsZero() || c.Reason != "keyCompromise" || len(seen) != 2 {
		t.Errorf("revoked %+v, seen %d", c, len(seen))
	}
	b, err := f.Bundle(t.Context())
	ok(t, err)
	if b.Sequence() <= before.Sequence() || len(pushed) != 1 || pushed[0] != b.Sequence() {
		t.Errorf("sequence %d after %d, pushed %v", b.Sequence(), before.Sequence(), pushed)
	}
	elsewhere, err := ParseBundle(b.JSON()) // as a peer gets it
	ok(t, err)
	v := verifierOf(elsewhere)
	for _, old := range [][][]byte{chain, renewed} {
		_, err = v.Verify(old, PurposeClient)
		wantErr(t, err, ErrRevoked)
	}
	_, err = v.Verify(otherChain, PurposeClient)
	ok(t, err)
	_, err = f.Renew(t.Context(), renewed, d.csr(t))
	wantErr(t, err, ErrRevoked)

	// Revoking again repeats what follows, and makes no other bundle.
	_, err = f.Revoke(t.Context(), string(d.client), "again")
	ok(t, err)
	if len(seen) != 4 || len(pushed) != 1 {
		t.Errorf("seen %d, pushed %d", len(seen), len(pushed))
	}
	// The same user may enrol the client anew.
	again := f.enrol(t, d)
	_, err = f.Verifier().Verify(again, PurposeClient)
	ok(t, err)
}

func TestRevocationSurvivesRestart(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	chain := f.enrol(t, d)
	_, err := f.Revoke(t.Context(), string(d.client), "")
	ok(t, err)
	b, err := f.Bundle(t.Context())
	ok(t, err)
	f.reopen(t)
	again, err := f.Bundle(t.Context())
	ok(t, err)
	if string(again.JSON()) != string(b.JSON()) {
		t.Error("a restart changed the bundle")
	}
	_, err = f.Verifier().Verify(chain, PurposeClient)
	wantErr(t, err, ErrRevoked)
}

// A crash after the revocation and before the list is made good at the next start.
func TestInterruptedRevocationIsCompletedAtStart(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	chain := f.enrol(t, d)
	crash := errors.New("power cut")
	f.store.before = func(changes map[string][]byte) error {
		if _, list := changes[bundleKey]; list {
			return crash
		}
		return nil
	}
	if _, err := f.Revoke(t.Context(), string(d.client), ""); err == nil {
		t.Fatal("a revocation was acknowledged that isn't in the bundle")
	}
	f.store.before = nil
	f.reopen(t)
	_, err := f.Verifier().Verify(chain, PurposeClient)
	wantErr(t, err, ErrRevoked)
}

// A thief who renews while the owner revokes must not end with a valid certificate.
func TestRevocationWinsAgainstRenewal(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	chain := f.enrol(t, d)
	csr := d.csr(t)
	inside := false
	f.store.before = func(changes map[string][]byte) error {
		for k := range changes {
			if !inside && strings.HasPrefix(k, tableKey(revokedTable, "")) { // revoking is under way
				inside = true
				if _, err := f.Renew(context.Background(), chain, csr); err != nil {
					t.Errorf("renewal before the revocation: %v", err)
				}
			}
		}
		return nil
	}
	_, err := f.Revoke(t.Context(), string(d.client), "stolen")
	ok(t, err)
	valid, err := f.List(t.Context(), Filter{Client: d.client, ValidAt: f.clock.Now()})
	ok(t, err)
	if len(valid) != 0 || !inside {
		t.Errorf("%d certificates are left", len(valid))
	}

	// And the other way round: the revocation comes between checking and storing the renewal.
	e := newDevice(t, "alpha.example", "alice", "alice-phone")
	chain, csr, inside = f.enrol(t, e), e.csr(t), false
	f.store.before = func(changes map[string][]byte) error {
		for k := range changes {
			if !inside && strings.HasPrefix(k, indexKeys) {
				inside = true
				if _, err := f.Revoke(context.Background(), string(e.client), "stolen"); err != nil {
					t.Errorf("revocation: %v", err)
				}
			}
		}
		return nil
	}
	_, err = f.Renew(t.Context(), chain, csr)
	wantErr(t, err, ErrRevoked)
}

func TestRenewRefuses(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	chain := f.enrol(t, d)
	_, err := f.Renew(t.Context(), chain, newDevice(t, "alpha.example", "alice", "alice-phone").csr(t))
	wantErr(t, err, ErrName)
	_, err = f.Renew(t.Context(), chain, newDevice(t, "alpha.example", "boss", "alice-laptop").csr(t))
	wantErr(t, err, ErrName)
	_, err = f.Renew(t.Context(), newForge(t, f.h).chain(), d.csr(t))
	ok(t, err) // a certificate that the intermediate signed, though the store has never seen it
	_, err = f.Renew(t.Context(), newForge(t, hierarchyOf(t, "alpha.example")).chain(), d.csr(t))
	wantErr(t, err, ErrUntrusted)
	f.clock.Advance(ClientLifetime + time.Minute)
	_, err = f.Renew(t.Context(), chain, d.csr(t))
	wantErr(t, err, ErrExpired)
}

func TestRevokingAUser(t *testing.T) {
	f := newFixture(t, "alpha.example")
	laptop, phone := newDevice(t, "alpha.example", "alice", "alice-laptop"), newDevice(t, "alpha.example", "alice", "alice-phone")
	bob := newDevice(t, "alpha.example", "bob", "bob-phone")
	chains := [][][]byte{f.enrol(t, laptop), f.enrol(t, phone)}
	bobs := f.enrol(t, bob)
	open, err := f.Invite(t.Context(), laptop.user, time.Hour)
	ok(t, err)
	_, err = f.Revoke(t.Context(), string(laptop.user), "left")
	ok(t, err)
	for _, c := range chains {
		_, err = f.Verifier().Verify(c, PurposeClient)
		wantErr(t, err, ErrRevoked)
	}
	_, err = f.Verifier().Verify(bobs, PurposeClient)
	ok(t, err)
	_, err = f.Enrol(t.Context(), open.Token, newDevice(t, "alpha.example", "alice", "alice-tablet").csr(t))
	wantErr(t, err, ErrTokenUnknown)
}

func TestRevokeRefuses(t *testing.T) {
	f := newFixture(t, "alpha.example")
	for name, want := range map[string]error{
		"": ErrRequest, "xyz": ErrRequest, "00": ErrRequest, "0A": ErrRequest, "mimi://alpha.example": ErrRequest, "mimi://alpha.example/r/room": ErrRequest,
		"ab": ErrNotFound, "mimi://alpha.example/d/nobody": ErrNotFound, "mimi://alpha.example/u/nobody": ErrNotFound,
		"mimi://beta.example/d/x": ErrForeignName,
	} {
		_, err := f.Revoke(t.Context(), name, "")
		wantErr(t, err, want)
	}
	_, err := f.Revoke(t.Context(), "ab", strings.Repeat("x", maxReason+1))
	wantErr(t, err, ErrRequest)
}

func TestListFilters(t *testing.T) {
	f := newFixture(t, "alpha.example")
	a, b := newDevice(t, "alpha.example", "alice", "alice-laptop"), newDevice(t, "alpha.example", "bob", "bob-phone")
	f.enrol(t, a)
	f.enrol(t, b)
	key := newDevice(t, "alpha.example", "x", "x").key
	_, err := f.IssueHub(t.Context(), key.Public())
	ok(t, err)
	revoked, err := f.Revoke(t.Context(), string(b.client), "lost")
	ok(t, err)
	for _, tt := range []struct {
		name string
		f    Filter
		want int
	}{
		{"all", Filter{}, 3}, {"user", Filter{User: a.user}, 1}, {"client", Filter{Client: b.client}, 1},
		{"client of another user", Filter{Client: b.client, User: a.user}, 0},
		{"serial", Filter{Serial: revoked.Serial}, 1}, {"revoked", Filter{Revoked: true}, 1},
		{"valid", Filter{ValidAt: f.clock.Now()}, 2}, {"valid later", Filter{ValidAt: f.clock.Now().Add(2 * HubLifetime)}, 0},
	} {
		got, err := f.List(t.Context(), tt.f)
		ok(t, err)
		if len(got) != tt.want {
			t.Errorf("%s: %d certificates, want %d", tt.name, len(got), tt.want)
		}
	}
	_, err = f.List(t.Context(), Filter{Serial: "!"})
	wantErr(t, err, ErrRequest)
}

func TestPurgeForgetsWhatExpiredLongAgo(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	f.enrol(t, d)
	_, err := f.Revoke(t.Context(), string(d.client), "")
	ok(t, err)
	_, err = f.Invite(t.Context(), d.user, 0)
	ok(t, err)
	f.clock.Advance(ClientLifetime + retention/2)
	ok(t, f.purge())
	certs, err := f.List(t.Context(), Filter{})
	ok(t, err)
	if len(certs) != 1 {
		t.Fatalf("%d certificates within retention", len(certs))
	}
	f.clock.Advance(retention)
	ok(t, f.purge())
	for k := range f.store.snapshot() {
		if k != bundleKey && k != clientKeys+"alice-laptop" && k != tableKey(listTable, "crl") {
			t.Errorf("row %s is left", k)
		}
	}
	// The name stays its owner's.
	_, err = f.Issue(t.Context(), newDevice(t, "alpha.example", "mallory", "alice-laptop").csr(t))
	wantErr(t, err, ErrClientTaken)
}

func TestListIsRenewedInTime(t *testing.T) {
	f := newFixture(t, "alpha.example")
	ok(t, f.freshen()) // nothing was revoked: no list to renew
	first, err := f.Bundle(t.Context())
	ok(t, err)
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	f.enrol(t, d)
	_, err = f.Revoke(t.Context(), string(d.client), "")
	ok(t, err)
	f.clock.Advance(listLifetime/2 + time.Minute)
	ok(t, f.freshen())
	last, err := f.Bundle(t.Context())
	ok(t, err)
	if last.Sequence() != first.Sequence()+2 || last.Revocations() != 1 {
		t.Errorf("sequence %d after %d, %d revocations", last.Sequence(), first.Sequence(), last.Revocations())
	}
	ok(t, last.supersedes(first))
}

func TestNodeAndHubCertificates(t *testing.T) {
	f := newFixture(t, "alpha.example")
	for _, kind := range []KeyType{KeyP256, KeyEd25519, KeyP384, KeyP521} {
		key, err := kind.generate(f.rand)
		ok(t, err)
		node, err := f.IssueNode(t.Context(), key.Public())
		ok(t, err)
		id, err := f.Verifier().Verify(node, PurposeNode)
		ok(t, err)
		if len(node) != 3 || string(node[2]) != string(f.h.root.Raw) || !id.Node || id.User != mimi.URI("") {
			t.Errorf("%d certificates, %+v", len(node), id)
		}
		hub, err := f.IssueHub(t.Context(), key.Public())
		ok(t, err)
		if _, err = f.Verifier().Verify(hub, PurposeHub); err != nil || len(hub) != 2 {
			t.Errorf("%d certificates, %v", len(hub), err)
		}
		_, err = f.Verifier().Verify(hub, PurposeNode)
		wantErr(t, err, ErrUsage)
	}
	_, err := f.IssueNode(t.Context(), "no key")
	wantErr(t, err, ErrKeyType)
}

func TestCloseTwice(t *testing.T) {
	f := newFixture(t, "alpha.example")
	ok(t, f.Close())
	ok(t, f.Close())
}

func BenchmarkIssue(b *testing.B) {
	f := newFixture(b, "alpha.example")
	d := newDevice(b, "alpha.example", "alice", "alice-laptop")
	csr := d.csr(b)
	b.Run("issue", func(b *testing.B) {
		for b.Loop() {
			if _, err := f.Issue(b.Context(), csr); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("invite-enrol", func(b *testing.B) {
		for b.Loop() {
			i, err := f.Invite(b.Context(), d.user, 0)
			ok(b, err)
			if _, err := f.Enrol(b.Context(), i.Token, csr); err != nil {
				b.Fatal(err)
			}
		}
	})
}
