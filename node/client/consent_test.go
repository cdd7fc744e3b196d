package client

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node"
)

// consentOf waits until a device hears of a consent that want accepts.
func (d *device) consentOf(events <-chan Event, want func(Consent) bool) Consent {
	d.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case e := <-events:
			if c, ok := e.(ConsentChanged); ok && want(c.Consent) {
				return c.Consent
			}
		case <-deadline:
			d.t.Fatalf("%s hears of no such consent", d.ID())
		}
	}
}

func granted(c Consent) bool { return c.Decision == mimi.ConsentGrant }

// demanding starts alpha and beta, whose users are added with their consent only.
func demanding(t *testing.T) []*provider {
	t.Helper()
	p := providers(t, "alpha", "beta")
	p[1].stop()
	p[1].config.Consent = node.ConsentExplicit
	p[1].start()
	within(t, func() error { return p[0].knows("beta.example") })
	return p
}

func TestPeopleAreAddedWhenTheyConsent(t *testing.T) {
	p := demanding(t)
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("carol", "carol-phone")
	alices, bobs := alice.Events(), bob.Events()
	if err := errors.Join(alice.WaitLive(t.Context()), bob.WaitLive(t.Context())); err != nil {
		t.Fatal(err)
	}
	room := alice.create()
	if err := room.Add(t.Context(), bob.User()); !errors.Is(err, ErrNoConsent) {
		t.Fatalf("added without consent: %v", err)
	}
	if err := alice.RequestConsent(t.Context(), bob.User(), ""); err != nil {
		t.Fatal(err)
	}
	asked := bob.consentOf(bobs, Consent.Open)
	if asked.Requester != alice.User() || asked.Target != bob.User() || asked.Room != "" || asked.Decision != 0 {
		t.Errorf("bob is asked %+v", asked)
	}
	if err := bob.GrantConsent(t.Context(), alice.User(), "", false); err != nil {
		t.Fatal(err)
	}
	alice.consentOf(alices, func(c Consent) bool { return granted(c) && !c.Open() })
	if err := room.Add(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice, bob)
	if err := room.Add(t.Context(), carol.User()); !errors.Is(err, ErrNoConsent) {
		t.Errorf("carol is added with bob's consent: %v", err)
	}
	if err := bob.RevokeConsent(t.Context(), alice.User(), ""); err != nil {
		t.Fatal(err)
	}
	alice.consentOf(alices, func(c Consent) bool { return c.Decision == mimi.ConsentRevoke })
	if err := alice.create().Add(t.Context(), bob.User()); !errors.Is(err, ErrNoConsent) {
		t.Errorf("added after the consent was revoked: %v", err)
	}
	// Carol is a colleague.
	if err := carol.create().Add(t.Context(), bob.User()); err != nil {
		t.Errorf("a user of the same provider: %v", err)
	}
}

// TestAGrantWithKeyPackagesNeedsNoFurtherAnswer has the granting provider go away before the requester uses them.
func TestAGrantWithKeyPackagesNeedsNoFurtherAnswer(t *testing.T) {
	p := demanding(t)
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	alices := alice.Events()
	if err := errors.Join(alice.WaitLive(t.Context()), bob.WaitLive(t.Context())); err != nil {
		t.Fatal(err)
	}
	first := alice.create()
	if err := bob.GrantConsent(t.Context(), alice.User(), "", true); err != nil {
		t.Fatal(err)
	}
	alice.consentOf(alices, granted)
	p[1].stop()
	if err := first.Add(t.Context(), bob.User()); err != nil {
		t.Fatalf("with bob's provider out of reach: %v", err)
	}
	p[1].start()
	bob.room(first.URI())
	agree(t, first.URI(), alice, bob)
	alice.say(first.URI(), "there you are")
	sees(t, first.URI(), []string{"alice-laptop: there you are"}, bob)
}

func TestRequestsForConsentWaitForAnUnreachablePeer(t *testing.T) {
	p := demanding(t)
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	alices := alice.Events()
	if err := alice.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	room := alice.create()
	other := alice.create()
	p[1].stop()
	for _, r := range []mimi.URI{room.URI(), other.URI(), ""} {
		for range 2 { // asked twice is asked once
			if err := alice.RequestConsent(t.Context(), bob.User(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := alice.CancelConsent(t.Context(), bob.User(), ""); err != nil {
		t.Fatal(err)
	}
	p[0].stop()
	p[0].start()
	p[1].start()
	open := func(want int) {
		t.Helper()
		within(t, func() error {
			list, err := bob.Consents(t.Context())
			n := 0
			for _, c := range list {
				if c.Open() {
					n++
				}
			}
			if err == nil && n != want {
				err = fmt.Errorf("%d requests wait, want %d: %+v", n, want, list)
			}
			return err
		})
	}
	open(2)
	if err := alice.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := bob.GrantConsent(t.Context(), alice.User(), room.URI(), false); err != nil {
		t.Fatal(err)
	}
	open(1)
	if c := alice.consentOf(alices, granted); c.Room != room.URI() {
		t.Errorf("alice hears of %+v", c)
	}
	if err := room.Add(t.Context(), bob.User()); err != nil {
		t.Errorf("in the room of the grant: %v", err)
	}
	if err := other.Add(t.Context(), bob.User()); !errors.Is(err, ErrNoConsent) {
		t.Errorf("in another room: %v", err)
	}
	// A decision about any room replaces those about rooms, and answers their requests.
	if err := bob.RevokeConsent(t.Context(), alice.User(), ""); err != nil {
		t.Fatal(err)
	}
	open(0)
	list, err := bob.Consents(t.Context())
	if err != nil || len(list) != 1 || list[0].Decision != mimi.ConsentRevoke || list[0].Room != "" {
		t.Errorf("bob has %+v, %v", list, err)
	}
	if err := alice.RequestConsent(t.Context(), bob.User(), other.URI()); err != nil {
		t.Fatal(err)
	}
}
