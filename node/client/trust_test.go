package client

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// forgedCommit is a log entry with a commit of the room that its members must refuse: its membership tag is wrong,
// which the hub can't see.
func forgedCommit(t *testing.T, by, at *Room) []byte {
	t.Helper()
	update, err := by.StageUpdate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var req mimi.UpdateRequest
	if err := codec.Unmarshal(update, &req); err != nil {
		t.Fatal(err)
	}
	req.Bundle.Message.Public.MembershipTag[0] ^= 1
	return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: req.Bundle.Message})
}

func TestRevokedDeviceIsShutOut(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, phone, tablet := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("bob", "bob-tablet")
	// Nobody commits the removal before the test has seen what happens until then.
	for _, d := range []*device{alice, phone, tablet} {
		d.stop()
		d.o.CommitDelay = func() time.Duration { return 2 * time.Second }
		d.restart()
	}
	room := alice.create(phone.User())
	agree(t, room.URI(), alice, phone, tablet)
	stolen := tablet.room(room.URI())
	message, err := stolen.SealMessage([]byte("from the thief"))
	if err != nil {
		t.Fatal(err)
	}
	commit, err := stolen.StageUpdate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	events := phone.Events()
	if _, err := authority.DialAdmin(p[1].config.Socket()).Revoke(t.Context(), string(tablet.ID()), "stolen"); err != nil {
		t.Fatal(err)
	}
	if _, err := tablet.Find(t.Context(), "alice@alpha.example"); Code(err) != "revoked" {
		t.Errorf("the node answers the tablet with %v", err)
	}
	if err := <-tablet.ended; !errors.Is(err, ErrRevoked) {
		t.Errorf("Run of the tablet ends with %v", err)
	}
	tablet.ended <- nil
	for _, d := range []*device{alice, phone} {
		within(t, func() error {
			for _, u := range d.room(room.URI()).Participants() {
				for _, m := range u.Clients {
					if m.Client == tablet.ID() && m.Flag == "revoked" {
						return nil
					}
				}
			}
			return fmt.Errorf("%s doesn't flag the tablet", d.ID())
		})
	}
	if res, err := alice.UpdateRaw(t.Context(), room.URI(), commit); err != nil || res.Code != mimi.UpdateNotAllowed {
		t.Errorf("the tablet's commit: %+v, %v", res, err)
	}
	message, err = Readdress(message, alice.User())
	if err != nil {
		t.Fatal(err)
	}
	if res, err := alice.SubmitRaw(t.Context(), room.URI(), message); err != nil || res.Code != mimi.SubmitAccepted {
		t.Fatalf("the tablet's message: %+v, %v", res, err)
	}
	deadline := time.After(patience)
	for found := false; !found; {
		select {
		case e := <-events:
			d, ok := e.(Discarded)
			found = ok && d.Client == tablet.ID()
		case <-deadline:
			t.Fatal("the message wasn't discarded")
		}
	}
	// A message waits until the tablet is out, and has it put out.
	began := room.Epoch()
	alice.say(room.URI(), "only for us")
	if room.Epoch() == began {
		t.Error("sent while a revoked client was a member")
	}
	agree(t, room.URI(), alice, phone)
	sees(t, room.URI(), []string{"alice-laptop: only for us"}, alice, phone)
}

func TestCredentialIsRenewedInTheRooms(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	before := alice.credential()
	id, err := authority.ParseIdentity(before.Certificates)
	if err != nil {
		t.Fatal(err)
	}
	alice.stop()
	lifetime := id.NotAfter.Sub(id.NotBefore)
	for at, want := range map[time.Time]bool{id.NotBefore.Add(lifetime / 2): false, id.NotBefore.Add(lifetime * 3 / 4): true} {
		o := alice.o
		o.Time = func() time.Time { return at }
		c, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if due, err := c.renewalDue(); err != nil || due != want {
			t.Errorf("renewal due at %v: %v, %v", at, due, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	c, err := Open(t.Context(), alice.o)
	if err != nil {
		t.Fatal(err)
	}
	alice.run(c)
	if err := c.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	renewed := alice.credential()
	if renewed.Equal(before) {
		t.Fatal("the credential is the same")
	}
	within(t, func() error {
		r := bob.room(room.URI())
		r.mu.Lock()
		defer r.mu.Unlock()
		for m := range r.group.Members() {
			if m.Leaf.Credential.Equal(renewed) {
				return nil
			}
		}
		return errors.New("bob doesn't see the new credential")
	})
	agree(t, room.URI(), alice, bob)
}

func TestBundleWithUnknownRootIsRefused(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice := p[0].enrol("alice", "alice-laptop")
	bob := p[1].enrol("bob", "bob-phone")
	foreign := bob.trust.bundle("beta.example")
	tr := newTrust("beta.example", alice.profile.Root, time.Now)
	if err := tr.anchored(foreign); err == nil {
		t.Error("a bundle without the invitation's root was taken")
	}
	if err := alice.trust.put(alice.db, []*authority.Bundle{foreign}, [][]byte{foreign.JSON()}); err == nil {
		t.Error("the own provider's bundle may be missing")
	}
	if alice.trust.bundle("alpha.example") == nil {
		t.Error("the own provider's bundle is gone")
	}
	if f := alice.trust.flag(mls.BasicCredential([]byte("bob"))); f != flagDistrust {
		t.Errorf("a basic credential is flagged %q", f)
	}
}
