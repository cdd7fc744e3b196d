package authority

import (
	"encoding/json"
	"testing"
	"time"
)

func TestARestoredAuthorityGoesOnFromWhatPeersHave(t *testing.T) {
	f := newFixture(t, "alpha.example")
	laptop, phone, tablet := newDevice(t, "alpha.example", "alice", "alice-laptop"), newDevice(t, "alpha.example", "alice", "alice-phone"), newDevice(t, "alpha.example", "alice", "alice-tablet")
	revoked, valid := f.enrol(t, laptop), f.enrol(t, phone)
	backup := f.store.snapshot()
	unknown := f.enrol(t, tablet)
	for _, d := range []*device{tablet, laptop} {
		_, err := f.Revoke(t.Context(), string(d.client), "keyCompromise")
		ok(t, err)
	}
	ok(t, f.Announce(t.Context(), []Fingerprint{{1}}))
	doc := f.bundle.Load().JSON()
	known, err := ParseBundle(doc)
	ok(t, err)

	f.store.rows = backup
	f.reopen(t)
	before := f.bundle.Load().Sequence()
	if before >= known.Sequence() {
		t.Fatalf("the backup has sequence %d, peers %d", before, known.Sequence())
	}
	forged := func(edit func(*bundleJSON)) *Bundle {
		var j bundleJSON
		ok(t, json.Unmarshal(doc, &j))
		edit(&j)
		out, err := json.Marshal(j)
		ok(t, err)
		b, err := ParseBundle(out)
		ok(t, err)
		return b
	}
	for name, b := range map[string]*Bundle{
		"of other roots":    bundleOf2(t, hierarchyOf(t, "alpha.example"), int64(known.Sequence())),
		"of another domain": forged(func(j *bundleJSON) { j.Domain = "beta.example" }),
		"far ahead":         forged(func(j *bundleJSON) { j.Sequence = 1 << 60 }),
	} {
		if changed, err := f.Resume(t.Context(), b); changed || err == nil {
			t.Errorf("a bundle %s: %v, %v", name, changed, err)
		}
	}
	if now := f.bundle.Load().Sequence(); now != before {
		t.Errorf("sequence %d instead of %d", now, before)
	}

	var told []string
	f.OnRevoke(func(c *Certificate) { told = append(told, string(c.Client)) })
	changed, err := f.Resume(t.Context(), known)
	ok(t, err)
	if len(told) != 1 || told[0] != string(laptop.client) {
		t.Errorf("told of the revocation of %q", told)
	}
	b := f.bundle.Load()
	if !changed || b.Sequence() <= known.Sequence() {
		t.Errorf("sequence %d after %d", b.Sequence(), known.Sequence())
	}
	ok(t, b.supersedes(known))
	for _, chain := range [][][]byte{revoked, unknown} {
		_, err = f.Verifier().Verify(chain, PurposeClient)
		wantErr(t, err, ErrRevoked)
	}
	_, err = f.Verifier().Verify(valid, PurposeClient)
	ok(t, err)
	if changed, err = f.Resume(t.Context(), known); changed || err != nil {
		t.Errorf("the same again: %v, %v", changed, err)
	}
	// What was learnt is in every list from then on.
	f.reopen(t)
	_, err = f.Revoke(t.Context(), string(phone.client), "superseded")
	ok(t, err)
	ok(t, f.bundle.Load().supersedes(b))
	for _, chain := range [][][]byte{revoked, unknown, valid} {
		_, err = f.Verifier().Verify(chain, PurposeClient)
		wantErr(t, err, ErrRevoked)
	}
}

func TestInvitationsOfABackupAreWithdrawn(t *testing.T) {
	f := newFixture(t, "alpha.example")
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	chain := f.enrol(t, d)
	inv, err := f.Invite(t.Context(), d.user, time.Hour)
	ok(t, err)
	ok(t, WithdrawInvitations(f.store))
	f.reopen(t)
	phone := newDevice(t, "alpha.example", "alice", "alice-phone")
	if _, err := f.Enrol(t.Context(), inv.Token, phone.csr(t)); err == nil {
		t.Error("an invitation of the backup is good")
	}
	_, err = f.Verifier().Verify(chain, PurposeClient)
	ok(t, err)
}
