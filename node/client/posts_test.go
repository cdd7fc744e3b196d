package client

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node/store"
)

// post sends content and waits until it is in the own log.
func (d *device) post(room mimi.URI, body content.Part, change func(m *content.Message)) Message {
	d.t.Helper()
	r := d.room(room)
	m := r.Compose(body)
	if change != nil {
		change(m)
	}
	seq, err := r.SendContent(d.t.Context(), m)
	if err == nil {
		err = r.WaitSeq(d.t.Context(), seq)
	}
	if err != nil {
		d.t.Fatal(err)
	}
	b, err := m.Encode()
	if err != nil {
		d.t.Fatal(err)
	}
	got, ok := r.Find(content.ID(d.User(), room, b, m.Salt))
	if !ok || got.Seq != seq {
		d.t.Fatalf("sent %+v, found %+v, %v", m, got, ok)
	}
	return got
}

// shown is what a reader sees of a room.
func (d *device) shown(room mimi.URI) string {
	var lines []string
	for _, p := range d.room(room).Posts() {
		line := p.User.ID() + ": " + string(p.Data)
		if p.Edited {
			line += " (edited)"
		}
		if p.Deleted {
			line += "(deleted)"
		}
		for _, m := range p.Reactions {
			line += fmt.Sprintf(" [%s %s]", m.User.ID(), m.Data)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "|")
}

func shows(t *testing.T, room mimi.URI, want string, devices ...*device) {
	t.Helper()
	for _, d := range devices {
		within(t, func() error {
			if got := d.shown(room); got != want {
				return fmt.Errorf("%s sees %q, want %q", d.ID(), got, want)
			}
			return nil
		})
	}
}

func TestPostsShowEditsDeletionsAndReactions(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	replaces := func(m Message) func(*content.Message) {
		return func(c *content.Message) { c.Replaces = m.ID }
	}
	to := func(m Message) func(*content.Message) {
		return func(c *content.Message) { c.InReplyTo = m.ID }
	}
	first := alice.post(uri, content.Text("helo"), nil)
	second := alice.post(uri, content.Text("oops"), nil)
	shows(t, uri, "alice: helo|alice: oops", alice, bob)
	like := bob.post(uri, content.React("+"), to(first))
	bob.post(uri, content.React("?"), to(second))
	reply := bob.post(uri, content.Text("hi"), to(first))
	shows(t, uri, "alice: helo [bob +]|alice: oops [bob ?]|bob: hi", alice, bob)
	edit := alice.post(uri, content.Text("hello"), replaces(first))
	alice.post(uri, content.Part{}, replaces(second))
	shows(t, uri, "alice: hello (edited) [bob +]|alice: (deleted) [bob ?]|bob: hi", alice, bob)
	bob.post(uri, content.React("!"), replaces(like))
	alice.post(uri, content.Text("hello all"), replaces(edit)) // of an edit, not of the first
	alice.post(uri, content.Text("back"), replaces(second))    // of what is deleted
	alice.post(uri, content.React("-"), to(reply))
	shows(t, uri, "alice: hello all (edited) [bob !]|alice: (deleted) [bob ?]|bob: hi [alice -]", alice, bob)
	bob.post(uri, content.Part{Disposition: content.Reaction}, replaces(like))
	shows(t, uri, "alice: hello all (edited)|alice: (deleted) [bob ?]|bob: hi [alice -]", alice, bob)

	// Who joined late has the edits without what they edit, and takes none of them for another's.
	carol := p[0].enrol("carol", "carol-pc")
	if err := alice.room(uri).Add(t.Context(), carol.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, carol)
	alice.post(uri, content.Text("hello everybody"), replaces(first))
	alice.post(uri, content.Text("hello everybody!"), replaces(first))
	bob.post(uri, content.React("late"), to(reply))
	shows(t, uri, "alice: hello everybody! (edited)|bob: late", carol)
	b := carol.room(uri).Compose(content.Text("not mine to edit"))
	b.Replaces = first.ID // carol can't know whose it is
	data := framed(t, b)
	carol.submitted(uri, carol.encrypt(uri, tagged(b, data), data))
	alice.say(uri, "end")
	shows(t, uri, "alice: hello everybody! (edited)|alice: (deleted) [bob ?]|bob: hi [alice -] [bob late]|alice: end", alice, bob)
}

func TestExpiredMessagesGo(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	uri := alice.create().URI()
	var ahead atomic.Int64 // s
	alice.o.Time = func() time.Time { return time.Now().Add(time.Duration(ahead.Load()) * time.Second) }
	alice.restart()
	expires := func(relative bool, s uint32) func(*content.Message) {
		return func(c *content.Message) {
			if c.Expires = (&content.Expiration{Relative: relative, Time: s}); !relative {
				c.Expires.Time += uint32(time.Now().Unix())
			}
		}
	}
	stays := alice.post(uri, content.Text("stays"), nil)
	hour := alice.post(uri, content.Text("an hour"), expires(false, 3600))
	alice.post(uri, content.Text("an hour, edited"), func(c *content.Message) { c.Replaces = hour.ID })
	read := alice.post(uri, content.Text("when read"), expires(true, 60))
	alice.post(uri, content.Text("unread"), expires(true, 60))
	shows(t, uri, "alice: stays|alice: an hour, edited (edited)|alice: when read|alice: unread", alice)
	for _, m := range []Message{stays, hour, read, read} {
		if err := alice.room(uri).MarkRead(m); err != nil {
			t.Fatal(err)
		}
	}
	ahead.Store(120)
	shows(t, uri, "alice: stays|alice: an hour, edited (edited)|alice: unread", alice)
	if err := alice.room(uri).MarkRead(read); err != nil { // once more begins nothing anew
		t.Fatal(err)
	}
	ahead.Store(4000)
	shows(t, uri, "alice: stays|alice: unread", alice)
	if _, ok := alice.room(uri).Find(hour.ID); ok {
		t.Error("an expired message is found")
	}
	alice.restart() // which deletes them
	within(t, func() error {
		n := 0
		err := store.ScanPrefix(alice.db, alice.room(uri).key(roomMessage), func([]byte, []byte) bool { n++; return true })
		if err == nil && n != 2 {
			err = fmt.Errorf("%d messages are stored", n)
		}
		return err
	})
	ahead.Store(0) // an expired message doesn't come back with the clock
	shows(t, uri, "alice: stays|alice: unread", alice)
	r := alice.room(uri)
	late := r.Compose(content.Text("an edit of what is gone"))
	late.Replaces = hour.ID
	if _, err := r.SendContent(t.Context(), late); err == nil || errors.Is(err, ErrQueued) {
		t.Errorf("an edit of an expired message: %v", err)
	}
}
