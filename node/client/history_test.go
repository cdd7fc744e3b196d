package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// joins has a device join a room by itself.
func (d *device) joins(room mimi.URI) *Room {
	d.t.Helper()
	r, err := d.Join(d.t.Context(), room)
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

// offered waits until a device has an offer of history.
func (d *device) offered(room, from mimi.URI) {
	d.t.Helper()
	within(d.t, func() error {
		if got := d.room(room).HistoryOffer(); got != from {
			return fmt.Errorf("%s has an offer of %q, want %q", d.ID(), got, from)
		}
		return nil
	})
}

func (d *device) takes(room mimi.URI, want int) {
	d.t.Helper()
	if n, err := d.room(room).TakeHistory(d.t.Context()); err != nil || n != want {
		d.t.Fatalf("%s takes %d messages, want %d: %v", d.ID(), n, want, err)
	}
}

func TestANewDeviceIsGivenHistoryByTheUsersOtherOne(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, laptop := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-laptop")
	uri := alice.create(laptop.User()).URI()
	agree(t, uri, alice, laptop)
	one := alice.post(uri, content.Text("one"), nil)
	alice.post(uri, content.Text("uno"), func(m *content.Message) { m.Replaces = one.ID })
	laptop.last(uri, 2)
	laptop.post(uri, content.React("+"), func(m *content.Message) { m.InReplyTo = one.ID })
	two := laptop.post(uri, content.Text("two"), nil)
	laptop.post(uri, content.Part{}, func(m *content.Message) { m.Replaces = two.ID })
	before := len(laptop.room(uri).Messages())

	phone := p[1].enrol("bob", "bob-phone")
	phone.joins(uri)
	agree(t, uri, alice, laptop, phone)
	alice.post(uri, content.Text("dos"), func(m *content.Message) { m.Replaces = one.ID })
	phone.last(uri, 1)
	if _, err := phone.room(uri).TakeHistory(t.Context()); !errors.Is(err, ErrNoHistory) {
		t.Errorf("without an offer: %v", err)
	}
	events := phone.Events()
	if n, err := laptop.room(uri).shareHistory(t.Context(), phone.ID(), time.Time{}, historyBound{1 << 10, 8}); err != nil || n != before+1 {
		t.Fatalf("gave %d messages, %v", n, err)
	}
	phone.offered(uri, laptop.ID())
	within(t, func() error {
		select {
		case e := <-events:
			if o, ok := e.(HistoryOffered); ok && o.Room == uri && o.Client == laptop.ID() {
				return nil
			}
		default:
		}
		return errors.New("no event")
	})
	phone.takes(uri, before)
	want := "alice: dos (edited) [bob +]|bob: (deleted)"
	shows(t, uri, want, alice, laptop, phone)
	mine, theirs := phone.room(uri).Messages(), laptop.room(uri).Messages()
	for i, m := range mine {
		o := theirs[i]
		if m.Seq != o.Seq || m.ID != o.ID || m.User != o.User || m.Client != o.Client || !m.Time.Equal(o.Time) || m.Frank == nil || string(m.application) != string(o.application) {
			t.Errorf("message %d is %+v, was given as %+v", m.Seq, m, o)
		}
		if given := i < before; given && m.GivenBy != laptop.ID() || !given && m.GivenBy != "" {
			t.Errorf("message %d is given by %q", m.Seq, m.GivenBy)
		}
	}
	if _, err := phone.room(uri).TakeHistory(t.Context()); !errors.Is(err, ErrNoHistory) {
		t.Errorf("a second time: %v", err)
	}
	for _, d := range []*device{laptop, phone} { // what came before what it is for is found with it
		if list, err := d.room(uri).LastPosts(0, 9); err != nil || len(list) != 2 || string(list[0].Data) != "dos" || len(list[0].Reactions) != 1 {
			t.Errorf("%s: the last posts are %+v, %v", d.ID(), list, err)
		}
	}
	phone.restart()
	shows(t, uri, want, phone)
	// Again: nothing of it is new. And the offers are nothing to be shown.
	if _, err := laptop.room(uri).ShareHistory(t.Context(), phone.ID(), time.Time{}); err != nil {
		t.Fatal(err)
	}
	phone.offered(uri, laptop.ID())
	phone.takes(uri, 0)
	alice.say(uri, "three")
	shows(t, uri, want+"|alice: three", alice, laptop, phone)
	if err := phone.room(uri).Report(t.Context(), alice.User(), Report{Messages: mine[:1]}); err != nil {
		t.Errorf("a message that was given can't be reported: %v", err)
	}
	if texts := strings.Join(phone.texts(uri), "|"); strings.Contains(texts, "parley") {
		t.Error(texts)
	}
}

// offerOf has a device offer pages, whatever they are, to a client of anybody, and returns when the hub has it.
func (d *device) offerOf(room, to mimi.URI, change func(o *mimi.HistoryOffer), pages mimi.HistoryPages) {
	d.t.Helper()
	r := d.room(room)
	r.mu.Lock()
	var offer *mimi.HistoryOffer
	for m := range r.group.Members() {
		if _, id, err := r.c.identity(m.Leaf); err == nil && id == to {
			var err error
			if offer, err = mimi.OfferHistory(rand.Reader, r.group, d.ID(), m, pages); err != nil {
				d.t.Error(err)
			}
		}
	}
	r.mu.Unlock()
	if offer == nil {
		d.t.Fatalf("%s is no member", to)
	}
	if change != nil {
		change(offer)
	}
	d.sendFramed(room, mimi.HistoryType(), codec.Marshal(offer))
}

// sendFramed sends application data of any media type.
func (d *device) sendFramed(room mimi.URI, media mls.MediaType, b []byte) {
	d.t.Helper()
	d.submitted(room, d.encrypt(room, nil, codec.Marshal(mls.ApplicationFraming{MediaType: media, Content: b})))
}

// pageWith uploads a page of those bytes.
func (d *device) pageWith(b []byte) mimi.HistoryPage {
	d.t.Helper()
	part, err := d.Upload(d.t.Context(), bytes.NewReader(b), content.Bytes, "")
	if err != nil {
		d.t.Fatal(err)
	}
	return pageOf(part.External)
}

// discards waits for what a device says of a message that it doesn't show.
func discards(t *testing.T, events <-chan Event) Discarded {
	t.Helper()
	for {
		select {
		case e := <-events:
			switch e := e.(type) {
			case Discarded:
				return e
			case HistoryOffered:
				t.Fatalf("%s is believed to offer history", e.Client)
			}
		case <-time.After(patience):
			t.Fatal("nothing was discarded")
		}
	}
}

func TestHistoryIsTakenFromOldDevicesOfTheSameUserOnly(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, laptop := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-laptop")
	uri := alice.create(laptop.User()).URI()
	agree(t, uri, alice, laptop)
	alice.say(uri, "one")
	laptop.last(uri, 1)
	phone, tablet := p[1].enrol("bob", "bob-phone"), p[1].enrol("bob", "bob-tablet")
	phone.joins(uri)
	tablet.joins(uri)
	agree(t, uri, alice, laptop, phone, tablet)
	page := laptop.pageWith(codec.Marshal(mimi.HistoryMessages{}))
	var copied mimi.HistoryOffer
	for _, c := range []struct {
		what   string
		from   *device
		act    func()
		reason string
	}{
		{"another user", alice, func() { alice.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{page}) }, "another user"},
		{"a device that came later", tablet, func() { tablet.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{page}) }, "wasn't here before"},
		{"an older device, for whom it can't be opened", laptop, func() {
			laptop.offerOf(uri, alice.ID(), func(o *mimi.HistoryOffer) { o.To = phone.room(uri).group.OwnLeaf() }, mimi.HistoryPages{page})
		}, "open an offer"},
		{"an older device, with too large a page", laptop, func() {
			laptop.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{{Size: mimi.MaxHistoryPage + 17}})
		}, "a page of history of"},
		{"an older device, without pages", laptop, func() { laptop.offerOf(uri, phone.ID(), nil, nil) }, "no page"},
		{"an older device, with what is no offer", laptop, func() { laptop.sendFramed(uri, mimi.HistoryType(), []byte("x")) }, "offer of history"},
		{"an older device, copied from another epoch", laptop, func() {
			laptop.offerOf(uri, phone.ID(), func(o *mimi.HistoryOffer) { copied = *o; o.To = 1 << 20 }, mimi.HistoryPages{page})
			if err := alice.room(uri).UpdateKeys(t.Context()); err != nil {
				t.Fatal(err)
			}
			agree(t, uri, alice, laptop, phone, tablet)
			laptop.sendFramed(uri, mimi.HistoryType(), codec.Marshal(copied))
		}, "open an offer"},
	} {
		events := phone.Events()
		c.act()
		if d := discards(t, events); d.Client != c.from.ID() || !strings.Contains(d.Reason, c.reason) {
			t.Errorf("%s: discarded %q of %s, want %q of %s", c.what, d.Reason, d.Client, c.reason, c.from.ID())
		}
		if got := phone.room(uri).HistoryOffer(); got != "" {
			t.Errorf("%s: %s offers history", c.what, got)
		}
	}
	// Of a device that gives another one history, others notice nothing.
	events := alice.Events()
	laptop.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{page})
	laptop.say(uri, "two")
	for e := range events {
		if m, ok := e.(Message); ok && string(m.Data) == "two" {
			break
		}
		if _, ok := e.(Committed); !ok {
			t.Errorf("alice is told %+v", e)
		}
	}
	sees(t, uri, []string{"alice-laptop: one", "bob-laptop: two"}, alice, laptop)
	phone.takes(uri, 0)

	for to, reason := range map[mimi.URI]string{
		alice.ID(): "is a device of", laptop.ID(): "that is this device", "mimi://beta.example/d/bob-watch": "isn't a member",
	} {
		if _, err := laptop.room(uri).ShareHistory(t.Context(), to, time.Time{}); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("history for %s: %v, want %q", to, err, reason)
		}
	}
}

func TestGivenHistoryIsChecked(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, laptop := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-laptop")
	uri := alice.create(laptop.User()).URI()
	agree(t, uri, alice, laptop)
	for _, s := range []string{"one", "two", "three"} {
		alice.say(uri, s)
	}
	given := laptop.room(uri).historyMessage(laptop.last(uri, 1))
	other := laptop.room(uri).historyMessage(laptop.last(uri, 2))
	laptop.last(uri, 3)
	phone := p[1].enrol("bob", "bob-phone")
	joined := phone.joins(uri).Seq()
	agree(t, uri, alice, laptop, phone)
	alice.say(uri, "four")
	own := phone.last(uri, 1)

	changed := func(change func(m *mimi.HistoryMessage)) []byte {
		m := given
		change(&m)
		return codec.Marshal(mimi.HistoryMessages{m})
	}
	as := func(media mls.MediaType, b []byte) []byte {
		return codec.Marshal(mls.ApplicationFraming{MediaType: media, Content: b})
	}
	expiring := phone.room(uri).Compose(content.Text("over"))
	expiring.Expires = &content.Expiration{Time: uint32(time.Now().Unix() - 5)}
	years := phone.room(uri).Compose(content.Text("over"))
	years.Expires = &content.Expiration{Time: uint32(time.Now().Add(3 * maxAge).Unix())}
	for _, c := range []struct {
		what, fails string
		page        []byte
	}{
		{"one that this client has", "", changed(func(m *mimi.HistoryMessage) { m.Seq = own.Seq })},
		{"one at an entry that it has seen", "", changed(func(m *mimi.HistoryMessage) { m.Seq = joined + 1 })},
		{"one that the log doesn't have yet", "", changed(func(m *mimi.HistoryMessage) { m.Seq = own.Seq + 5 })},
		{"one that has expired", "", changed(func(m *mimi.HistoryMessage) { m.Application = framed(t, expiring) })},
		{"one that has expired where it was", "", changed(func(m *mimi.HistoryMessage) { m.Expires = 1 })},
		{"one with the ID of one that it has", "", changed(func(m *mimi.HistoryMessage) { m.Application = own.application })},
		{"one that expires in years", "a year before or after", changed(func(m *mimi.HistoryMessage) { m.Application = framed(t, years) })},
		{"bytes", "is none", changed(func(m *mimi.HistoryMessage) { m.Application = as(mimi.HistoryType(), []byte("x")) })},
		{"no framing", "message 3", changed(func(m *mimi.HistoryMessage) { m.Seq, m.Application = 3, []byte("x") })},
		{"no content", "not a MIMI content message", changed(func(m *mimi.HistoryMessage) { m.Application = as(mimi.ContentType(), []byte("x")) })},
		{"of a client of another provider", "is no client of", changed(func(m *mimi.HistoryMessage) { m.Client = laptop.ID() })},
		{"out of order", "after", codec.Marshal(mimi.HistoryMessages{other, given})},
		{"with bytes behind", "page 1", append(codec.Marshal(mimi.HistoryMessages{given}), 0)},
		{"truncated", "page 1", codec.Marshal(mimi.HistoryMessages{given})[:40]},
	} {
		laptop.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{laptop.pageWith(c.page)})
		phone.offered(uri, laptop.ID())
		n, err := phone.room(uri).TakeHistory(t.Context())
		switch {
		case c.fails == "" && err != nil, c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)):
			t.Errorf("%s: %v, want %q", c.what, err, c.fails)
		case n != 0:
			t.Errorf("%s: %d messages taken", c.what, n)
		}
		if got := phone.shown(uri); got != "alice: four" {
			t.Fatalf("%s: %q is shown", c.what, got)
		}
		phone.room(uri).forgetOffer(t)
	}

	// A page twice in an offer, and a message under two numbers.
	twin := given
	twin.Seq = other.Seq
	pages := mimi.HistoryPages{laptop.pageWith(codec.Marshal(mimi.HistoryMessages{given, twin})), laptop.pageWith(codec.Marshal(mimi.HistoryMessages{given, other}))}
	laptop.offerOf(uri, phone.ID(), nil, pages)
	phone.offered(uri, laptop.ID())
	phone.takes(uri, 2)
	shows(t, uri, "alice: one|alice: two|alice: four", phone)
	if m, ok := phone.room(uri).Find(own.ID); !ok || m.GivenBy != "" {
		t.Errorf("the message that came here is now %+v", m)
	}
	// A frank of another message at another time isn't kept.
	forged := given
	forged.Seq, forged.Application = given.Seq-1, framed(t, content.New(alice.User(), uri, content.Text("zero")))
	forged.Time++
	laptop.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{laptop.pageWith(codec.Marshal(mimi.HistoryMessages{forged}))})
	phone.offered(uri, laptop.ID())
	phone.takes(uri, 1)
	if m := phone.last(uri, 1); m.Frank != nil || m.FrankFault == "" || m.GivenBy != laptop.ID() {
		t.Errorf("forged: %+v", m)
	}
}

const maxAge = 366 * 24 * time.Hour

// forgetOffer drops an offer that can't be taken.
func (r *Room) forgetOffer(t *testing.T) {
	t.Helper()
	var w waits
	r.mu.Lock()
	h, err := r.history()
	h.offer = nil
	b := new(store.Batch)
	b.Set(r.key(roomHistory), codec.Marshal(h))
	err = errors.Join(err, w.apply(r.c, b))
	r.mu.Unlock()
	if err := errors.Join(err, w.wait()); err != nil {
		t.Fatal(err)
	}
}

// assetFile is the file that the node of a provider has of a page.
func (p *provider) assetFile(page mimi.HistoryPage) string {
	return filepath.Join(p.config.Data, "assets", hex.EncodeToString(page.Hash[:]))
}

func TestHistoryComesWholeOrItsRestLater(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, laptop := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-laptop")
	uri := alice.create(laptop.User()).URI()
	agree(t, uri, alice, laptop)
	var said []string
	for i := range 9 {
		alice.say(uri, fmt.Sprint(i))
		said = append(said, fmt.Sprint("alice: ", i))
	}
	laptop.last(uri, len(said))
	phone := p[1].enrol("bob", "bob-phone")
	phone.joins(uri)
	agree(t, uri, alice, laptop, phone)

	// Two pages of two messages: the newest.
	size := len(codec.Marshal(mimi.HistoryMessages{laptop.room(uri).historyMessage(laptop.last(uri, 1))}))
	bound := historyBound{2*size + headOfVector, 2}
	if n, err := laptop.room(uri).shareHistory(t.Context(), phone.ID(), time.Time{}, bound); err != nil || n != 4 {
		t.Fatalf("gave %d, %v", n, err)
	}
	phone.offered(uri, laptop.ID())
	phone.takes(uri, 4)
	shows(t, uri, strings.Join(said[5:], "|"), phone)

	// What the other device has in its outbox when it ends is given nevertheless.
	p[1].stop()
	ctx, cancel := context.WithCancel(t.Context())
	gave := make(chan error, 1)
	r := laptop.room(uri)
	p[1].start()
	within(t, func() error { return p[1].knows(p[0].domain) })
	p[0].stop() // the hub
	bound.pages = 9
	go func() {
		_, err := r.shareHistory(ctx, phone.ID(), time.Time{}, bound)
		gave <- err
	}()
	within(t, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.outbox) != 1 {
			return errors.New("nothing in the outbox")
		}
		return nil
	})
	if list := r.Outbox(); len(list) != 0 {
		t.Errorf("%q is in the outbox", list)
	}
	cancel()
	if err := <-gave; !errors.Is(err, ErrQueued) {
		t.Errorf("without the hub: %v", err)
	}
	laptop.restart()
	p[0].start()
	phone.offered(uri, laptop.ID())
	h, err := phone.room(uri).history()
	if err != nil || len(h.offer.pages) != 5 {
		t.Fatalf("%+v, %v", h.offer, err)
	}
	pages := h.offer.pages

	// The second page isn't what it was: the first is taken.
	file := p[1].assetFile(pages[1])
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	swapped, err := os.ReadFile(p[1].assetFile(pages[0]))
	if err != nil || len(swapped) == 0 {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[0]++
	for what, c := range map[string]struct {
		bytes []byte
		fails string
	}{
		"another asset": {swapped, "bytes"}, "truncated": {good[:len(good)-1], "bytes of"}, "changed": {flipped, "another hash"},
		"longer": {append(bytes.Clone(good), 0), "more than"},
	} {
		if err := os.WriteFile(file, c.bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := phone.room(uri).TakeHistory(t.Context()); err == nil || !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %v, want %q", what, err, c.fails)
		}
		shows(t, uri, strings.Join(append([]string{said[0]}, said[5:]...), "|"), phone)
	}
	phone.restart()
	if got := phone.room(uri).HistoryOffer(); got != laptop.ID() {
		t.Fatalf("after a restart %q offers history", got)
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	phone.takes(uri, 4)
	shows(t, uri, strings.Join(said, "|"), phone, laptop)
	for _, page := range pages {
		if _, err := phone.room(uri).historyAsset(t.Context(), page); Code(err) != "notFound" {
			t.Errorf("an asset is still there: %v", err)
		}
	}

	// A device that missed a part of the log is given that.
	phone.stop()
	c, err := Open(t.Context(), phone.o)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := c.Room(uri)
	if err != nil {
		t.Fatal(err)
	}
	alice.say(uri, "missed")
	gone.frozen = fmt.Errorf("%w, by the test", ErrFrozen)
	phone.run(c)
	phone.joins(uri)
	alice.say(uri, "seen")
	phone.last(uri, len(said)+1)
	if _, err := laptop.room(uri).ShareHistory(t.Context(), phone.ID(), time.Time{}); err != nil {
		t.Fatal(err)
	}
	phone.offered(uri, laptop.ID())
	phone.takes(uri, 1)
	shows(t, uri, strings.Join(append(said, "alice: missed", "alice: seen"), "|"), phone, laptop)
}

func TestHistoryIsGivenAndTakenAsTheRoomsPolicySays(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, laptop := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-laptop")
	rules := func(hub mimi.URI) mimi.Rules {
		r := mimi.CooperativeRoom(hub)
		r.Roles[r.Creator].Capabilities = append(r.Roles[r.Creator].Capabilities, mimi.CanChangeOtherPolicyAttribute)
		r.History = &mimi.HistoryPolicy{MaxPeriod: 3600}
		r.Bots = mimi.BotPolicy{{Name: "menu", Role: 3}}
		return r
	}
	room, err := alice.CreateRoomWith(t.Context(), "lunch", rules)
	if err != nil {
		t.Fatal(err)
	}
	uri := room.URI()
	if err := room.Add(t.Context(), laptop.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, laptop)
	alice.say(uri, "one")
	laptop.last(uri, 1)
	phone := p[1].enrol("bob", "bob-phone")
	phone.joins(uri)
	agree(t, uri, alice, laptop, phone)
	if err := room.SetRole(t.Context(), laptop.User(), 3); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, laptop, phone)
	for _, p := range phone.room(uri).Participants() {
		if bot := len(p.Bots) == 1 && p.Bots[0].Name == "menu"; bot != (p.User == laptop.User()) {
			t.Errorf("%s has the role of %v", p.User, p.Bots)
		}
	}
	given := laptop.room(uri).historyMessage(laptop.last(uri, 1))
	old := given
	old.Time -= 2 * 3600_000
	offer := func(m mimi.HistoryMessage) {
		t.Helper()
		laptop.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{laptop.pageWith(codec.Marshal(mimi.HistoryMessages{m}))})
		phone.offered(uri, laptop.ID())
	}
	offer(old)
	phone.takes(uri, 0)
	laptop.o.Time = func() time.Time { return time.Now().Add(2 * time.Hour) }
	laptop.restart()
	if _, err := laptop.room(uri).ShareHistory(t.Context(), phone.ID(), time.Time{}); err == nil || !strings.Contains(err.Error(), "nothing to give") {
		t.Errorf("what is too old is given: %v", err)
	}
	laptop.o.Time = nil
	laptop.restart()

	offer(given)
	forbid := mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{
		Component: mimi.ComponentHistory, Op: mls.AppDataOpUpdate, Update: codec.Marshal(mimi.HistoryPolicy{Sharing: mimi.Forbidden}),
	}}
	err = room.change(t.Context(), func(*mls.Group) (mls.CommitOptions, error) {
		return mls.CommitOptions{Proposals: []mls.Proposal{forbid}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, laptop, phone)
	if _, err := laptop.room(uri).ShareHistory(t.Context(), phone.ID(), time.Time{}); !errors.Is(err, errHistoryForbidden) {
		t.Errorf("given though the room forbids it: %v", err)
	}
	if n, err := phone.room(uri).TakeHistory(t.Context()); !errors.Is(err, errHistoryForbidden) || n != 0 {
		t.Errorf("an offer from before is taken: %d, %v", n, err)
	}
	phone.room(uri).forgetOffer(t)
	events := phone.Events()
	laptop.offerOf(uri, phone.ID(), nil, mimi.HistoryPages{laptop.pageWith(codec.Marshal(mimi.HistoryMessages{given}))})
	if d := discards(t, events); !strings.Contains(d.Reason, "forbids") {
		t.Errorf("discarded: %s", d.Reason)
	}
	if got := phone.texts(uri); len(got) != 0 {
		t.Errorf("%q", got)
	}
	// History that waits for the hub isn't sent any more either.
	r := laptop.room(uri)
	r.mu.Lock()
	o := &outgoing{number: r.nextOut, history: &givenHistory{device: phone.ID(), pages: mimi.HistoryPages{{}}}, ready: true, done: make(chan result, 1)}
	r.nextOut++
	r.outbox = append(r.outbox, o)
	r.touch()
	r.mu.Unlock()
	if res := <-o.done; !errors.Is(res.err, errHistoryForbidden) {
		t.Errorf("what waited: %v", res.err)
	}
	laptop.say(uri, "two")
}
