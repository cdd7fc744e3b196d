package client

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls"
)

// TestPeopleOfTwoProvidersTalkInAPostQuantumRoom uses the suite of the largest keys, certificates and signatures from
// the enrolment on: hubs and clients have certificates of ML-DSA keys.
func TestPeopleOfTwoProvidersTalkInAPostQuantumRoom(t *testing.T) {
	const suite = mls.MLKEM1024_AES256GCM_SHA384_MLDSA87
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrolIn(suite, "alice", "alice-laptop"), p[1].enrolIn(suite, "bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	room.mu.Lock()
	got := room.group.Suite()
	room.mu.Unlock()
	if got != suite {
		t.Errorf("the room's suite is %v", got)
	}
	alice.say(room.URI(), "one")
	bob.say(room.URI(), "two")
	want := []string{"alice-laptop: one", "bob-phone: two"}
	sees(t, room.URI(), want, alice, bob)

	tablet := p[1].enrolIn(suite, "bob", "bob-tablet")
	if _, err := tablet.Join(t.Context(), room.URI()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice, bob, tablet)
	alice.restart()
	bob.restart()
	if err := bob.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	within(t, func() error {
		r := bob.room(room.URI())
		r.mu.Lock()
		m, _ := r.group.Member(r.group.OwnLeaf())
		r.mu.Unlock()
		if !m.Leaf.Credential.Equal(bob.credential()) {
			return errors.New("the room has the former credential")
		}
		return nil
	})
	agree(t, room.URI(), alice, bob, tablet)
	tablet.say(room.URI(), "three")
	sees(t, room.URI(), append(want, "bob-tablet: three"), alice, bob)

	// A client of another suite has no KeyPackage for the room.
	carol := p[1].enrol("carol", "carol-phone")
	if err := alice.room(room.URI()).Add(t.Context(), carol.User()); err == nil {
		t.Error("a client without the suite was added")
	}
	if err := alice.room(room.URI()).Remove(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice)
}
