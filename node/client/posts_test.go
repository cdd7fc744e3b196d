package client

import (
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"reflect"
	"slices"
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

// pages reads a room by pages of n, from the end.
func (d *device) pages(room mimi.URI, n int) (posts []Post, messages []Message) {
	d.t.Helper()
	r := d.room(room)
	for before := uint64(0); ; {
		page, err := r.LastPosts(before, n)
		if err != nil {
			d.t.Fatal(err)
		}
		if len(page) > n {
			d.t.Errorf("a page of %d posts, want %d at most", len(page), n)
		}
		if posts = append(page, posts...); len(page) < n {
			break
		}
		before = page[0].Seq
	}
	for before := uint64(0); ; {
		page, err := r.LastMessages(before, n)
		if err != nil {
			d.t.Fatal(err)
		}
		if messages = append(page, messages...); len(page) < n {
			break
		}
		before = page[0].Seq
	}
	var forth []Message
	for after := uint64(0); ; {
		page, err := r.MessagesAfter(after, n)
		if err != nil {
			d.t.Fatal(err)
		}
		if forth = append(forth, page...); len(page) < n {
			break
		}
		after = page[n-1].Seq
	}
	if !reflect.DeepEqual(forth, messages) {
		d.t.Errorf("pages of %d from the beginning have %d messages, those from the end %d", n, len(forth), len(messages))
	}
	return posts, messages
}

// TestPagesShowWhatTheWholeRoomShows lets users write anything about anything, and some of it expire.
func TestPagesShowWhatTheWholeRoomShows(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	var ahead atomic.Int64 // s
	bob.o.Time = func() time.Time { return time.Now().Add(time.Duration(ahead.Load()) * time.Second) }
	bob.restart()
	random := mathrand.New(mathrand.NewPCG(5, 6))
	unknown := content.MessageID{1, 2, 3}
	ids := []content.MessageID{unknown}
	var own []content.MessageID
	for i := range 60 {
		about := ids[random.IntN(len(ids))]
		what := random.IntN(7)
		body := content.Text(fmt.Sprint("message ", i))
		m := alice.post(uri, body, func(c *content.Message) {
			switch {
			case what < 2:
				c.InReplyTo, c.Body = about, content.React("+")
			case what < 4 && len(own) > 0:
				c.Replaces = own[random.IntN(len(own))]
			case what < 5 && len(own) > 0:
				c.Replaces, c.Body = own[random.IntN(len(own))], content.Part{}
			case what < 6:
				c.Replaces = unknown
			default:
				c.Expires = &content.Expiration{Time: uint32(time.Now().Unix()) + 3600}
			}
		})
		ids, own = append(ids, m.ID), append(own, m.ID)
	}
	last := alice.room(uri).Seq()
	if err := bob.room(uri).WaitSeq(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	check := func(when string, d *device) {
		t.Helper()
		r := d.room(uri)
		wantPosts, wantMessages := r.Posts(), r.Messages()
		for _, n := range []int{1, 3, 1000} {
			posts, messages := d.pages(uri, n)
			if !reflect.DeepEqual(posts, wantPosts) {
				t.Errorf("%s: pages of %d have %d posts, the room has %d", when, n, len(posts), len(wantPosts))
			}
			if !reflect.DeepEqual(messages, wantMessages) {
				t.Errorf("%s: pages of %d have %d messages, the room has %d", when, n, len(messages), len(wantMessages))
			}
		}
	}
	check("at first", bob)
	before := len(bob.room(uri).Messages())
	ahead.Store(4000)
	check("when some have expired", bob)
	after := len(bob.room(uri).Messages())
	if after == before || after == 0 {
		t.Errorf("of %d messages %d are left", before, after)
	}
	bob.restart()
	check("when they are deleted", bob)
	if n := len(bob.room(uri).Messages()); n != after {
		t.Errorf("%d messages after a restart, %d before", n, after)
	}
	// An earlier release has no indexes.
	alice.stop()
	o := alice.o
	if err := o.fill(); err != nil {
		t.Fatal(err)
	}
	db, err := openStore(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Delete(keyIndexed); err != nil {
		t.Fatal(err)
	}
	for _, prefix := range [][]byte{[]byte(prefixDue), append(roomPrefix(uri), roomPart), append(roomPrefix(uri), roomPlace), append(roomPrefix(uri), roomStandIn)} {
		n := 0
		if err := store.ScanPrefix(db, prefix, func(k, _ []byte) bool {
			n++
			err = db.Delete(append(slices.Clone(prefix), k...))
			return err == nil
		}); err != nil || n == 0 {
			t.Fatalf("%d under %q: %v", n, prefix, err)
		}
	}
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	alice.o.Time = bob.o.Time
	alice.reopen()
	check("with indexes made anew", alice)
	if !reflect.DeepEqual(seqsOf(alice.room(uri).Messages()), seqsOf(bob.room(uri).Messages())) {
		t.Errorf("alice has %v, bob %v", seqsOf(alice.room(uri).Messages()), seqsOf(bob.room(uri).Messages()))
	}
}

func seqsOf(list []Message) (seqs []uint64) {
	for _, m := range list {
		seqs = append(seqs, m.Seq)
	}
	return seqs
}
