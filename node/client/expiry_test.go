package client

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node/store"
)

func TestPolicyOfTheRoomSaysWhenMessagesExpire(t *testing.T) {
	at := time.Unix(1_000_000, 0)
	ten := uint32(10)
	after := func(s uint32) *content.Expiration { return &content.Expiration{Time: 1_000_000 + s} }
	read := &content.Expiration{Relative: true, Time: 30}
	policy := func(o mimi.Optionality, standard *uint32) *mimi.MessageExpiration {
		return &mimi.MessageExpiration{Expiring: o, Min: 5, Max: 60, Default: standard}
	}
	for _, c := range []struct {
		name   string
		policy *mimi.MessageExpiration
		says   *content.Expiration
		want   uint64 // s after it was accepted, 0: never, unread
	}{
		{"no policy", nil, nil, 0},
		{"no policy, it says", nil, after(7), 7},
		{"no policy, when read", nil, read, unread},
		{"optional", policy(mimi.Optional, &ten), nil, 0},
		{"optional, it says", policy(mimi.Optional, nil), after(7), 7},
		{"optional, too soon", policy(mimi.Optional, nil), after(1), 5},
		{"optional, too late", policy(mimi.Optional, nil), after(100), 60},
		{"optional, when read", policy(mimi.Optional, nil), read, unread},
		{"required, it doesn't say", policy(mimi.Required, nil), nil, 60},
		{"required, the standard time", policy(mimi.Required, &ten), nil, 10},
		{"required, it says", policy(mimi.Required, &ten), after(20), 20},
		{"required, too late", policy(mimi.Required, &ten), after(100), 60},
		{"required, nobody reads it", policy(mimi.Required, &ten), read, 60},
		{"forbidden", &mimi.MessageExpiration{Expiring: mimi.Forbidden}, after(7), 0},
	} {
		want := c.want
		if want != 0 && want != unread {
			want += uint64(at.Unix())
		}
		if got := dueBy(c.policy, c.says, at); got != want {
			t.Errorf("%s: due at %d, want %d", c.name, got, want)
		}
	}
}

// expiring are the rules of a room in which messages last from five minutes to an hour, and ten minutes if they don't say.
func expiring(hub mimi.URI) mimi.Rules {
	rules := mimi.StrictRoom(hub)
	standard := uint32(600)
	rules.Expiration = &mimi.MessageExpiration{Expiring: mimi.Required, Min: 300, Max: 3600, Default: &standard}
	return rules
}

func TestMessagesGoWhenTheRoomsPolicySays(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	r, err := alice.CreateRoomWith(t.Context(), "soon gone", expiring)
	if err == nil {
		err = r.Add(t.Context(), bob.User())
	}
	if err != nil {
		t.Fatal(err)
	}
	uri := r.URI()
	var ahead atomic.Int64 // s
	clock := func() time.Time { return time.Now().Add(time.Duration(ahead.Load()) * time.Second) }
	alice.o.Time, bob.o.Time = clock, clock
	alice.restart()
	bob.restart()
	alice.say(uri, "ten minutes")
	m := alice.post(uri, content.Text("an hour, when read"), func(m *content.Message) { m.Expires = &content.Expiration{Relative: true, Time: 3600} })
	if m.Content.Expires == nil {
		t.Error("a message without its expiration")
	}
	alice.post(uri, content.Text("half an hour"), func(m *content.Message) { m.Expires = &content.Expiration{Time: uint32(clock().Unix()) + 1800} })
	for _, e := range []content.Expiration{{Relative: true, Time: 7200}, {Time: uint32(clock().Unix()) + 4000}, {Relative: true}} {
		c := alice.room(uri).Compose(content.Text("not so"))
		c.Expires = &e
		if _, err := alice.room(uri).SendContent(t.Context(), c); !errors.Is(err, errExpiry) {
			t.Errorf("expires %+v: %v", e, err)
		}
	}
	shows(t, uri, "alice: ten minutes|alice: an hour, when read|alice: half an hour", alice, bob)
	for _, d := range []*device{alice, bob} {
		list := d.room(uri).Messages()
		if x := list[0].Content.Expires; x == nil || x.Relative || x.Time < uint32(clock().Unix())+590 || x.Time > uint32(clock().Unix())+600 {
			t.Errorf("%s: a message of the standard time expires %+v", d.ID(), x)
		}
	}
	events := bob.Events()
	ahead.Store(700)
	bob.expireSoon() // as when the clock is looked at again
	if e := next[Expired](t, events); e.Room != uri {
		t.Errorf("%+v", e)
	}
	stored := func(d *device) (n int) {
		t.Helper()
		if err := store.ScanPrefix(d.db, d.room(uri).key(roomMessage), func([]byte, []byte) bool { n++; return true }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := stored(bob); n != 2 {
		t.Errorf("bob stores %d messages when one of three has expired", n)
	}
	shows(t, uri, "alice: an hour, when read|alice: half an hour", alice, bob)
	ahead.Store(3700) // nobody has read the second one
	shows(t, uri, "", alice, bob)
	alice.restart()
	if n := stored(alice); n != 0 {
		t.Errorf("%d messages are stored after a restart", n)
	}
}

// A timer deletes what expires while the device runs, and again after a restart.
func TestMessagesAreDeletedInTime(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	uri := alice.create().URI()
	for i := range 2 {
		alice.post(uri, content.Text("soon"), func(m *content.Message) { m.Expires = &content.Expiration{Time: uint32(time.Now().Unix()) + 2} })
		read := alice.post(uri, content.Text("when read"), func(m *content.Message) { m.Expires = &content.Expiration{Relative: true, Time: 1} })
		if err := alice.room(uri).MarkRead(read); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			alice.restart()
		}
		within(t, func() error {
			n := 0
			err := store.ScanPrefix(alice.db, alice.room(uri).key(roomMessage), func([]byte, []byte) bool { n++; return true })
			if err == nil && n > 0 {
				err = fmt.Errorf("%d messages are stored", n)
			}
			return err
		})
		if posts, err := alice.room(uri).LastPosts(0, 5); err != nil || len(posts) != 0 {
			t.Errorf("%d posts, %v", len(posts), err)
		}
	}
}
