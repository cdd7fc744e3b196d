package client

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// last waits for the n-th message of a room and returns it.
func (d *device) last(room mimi.URI, n int) Message {
	d.t.Helper()
	var list []Message
	within(d.t, func() error {
		r, err := d.Room(room)
		if err != nil {
			return err
		}
		if list = r.Messages(); len(list) < n {
			return fmt.Errorf("%s has %d messages, want %d", d.ID(), len(list), n)
		}
		return nil
	})
	return list[n-1]
}

func TestFranksAreVerifiedAcrossProviders(t *testing.T) {
	p := providers(t, "alpha", "beta", "gamma")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[2].enrol("carol", "carol-pc")
	uri := alice.create(bob.User(), carol.User()).URI()
	agree(t, uri, alice, bob, carol)
	bob.say(uri, "from a follower")
	alice.say(uri, "at the hub")
	for _, d := range []*device{alice, bob, carol} {
		for i, sender := range []mimi.URI{bob.User(), alice.User()} {
			m := d.last(uri, i+1)
			if m.Frank == nil || m.FrankFault != "" || m.User != sender || m.Content == nil || m.Content.Sender != sender || m.Content.Room != uri {
				t.Errorf("%s, message %d: %+v", d.ID(), i, m)
			}
		}
	}
	carol.restart()
	if m := carol.last(uri, 1); m.Frank == nil || m.ID != alice.last(uri, 1).ID || string(m.Data) != "from a follower" {
		t.Errorf("after a restart: %+v", m)
	}
}

// paused is a device with its state open and nothing coming in but what a test hands it.
func (d *device) paused(room mimi.URI) *Room {
	d.t.Helper()
	d.stop()
	c, err := Open(d.t.Context(), d.o)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			d.t.Error(err)
		}
	})
	r, err := c.Room(room)
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

// take hands a room its next entry, and returns what it tells.
func (r *Room) take(t *testing.T, f *mimi.FanoutMessage) Event {
	t.Helper()
	var w waits
	events, err := r.receive(&w, &api.LogEntry{Seq: r.Seq() + 1, Fanout: codec.Marshal(f)})
	if err := errors.Join(err, w.wait()); err != nil || len(events) != 1 {
		t.Fatalf("%v, %v", events, err)
	}
	return events[0]
}

// encrypt makes an application message of this client as it would have any, and sends it nowhere.
func (d *device) encrypt(room mimi.URI, aad, data []byte) *mls.MLSMessage {
	d.t.Helper()
	r := d.room(room)
	r.mu.Lock()
	defer r.mu.Unlock()
	b := new(store.Batch)
	m, err := r.group.Encrypt(b.Prefixed(r.key(roomGroup)), aad, data)
	if err == nil {
		var w waits
		err = errors.Join(w.apply(r.c, b), w.wait())
	}
	if err != nil {
		d.t.Fatal(err)
	}
	return m
}

// submitted has the hub order a message of this client.
func (d *device) submitted(room mimi.URI, m *mls.MLSMessage) *mimi.FanoutMessage {
	d.t.Helper()
	res, err := d.SubmitRaw(d.t.Context(), room, codec.Marshal(&mimi.SubmitMessageRequest{Message: m, Sender: d.User()}))
	if err != nil || res.Code != mimi.SubmitAccepted {
		d.t.Fatalf("%+v, %v", res, err)
	}
	return &mimi.FanoutMessage{Timestamp: res.AcceptedTimestamp, Message: m, Frank: res.Frank}
}

func framed(t *testing.T, m *content.Message) []byte {
	t.Helper()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return codec.Marshal(mls.ApplicationFraming{Content: b}) // of the room's first media type
}

func tagged(m *content.Message, data []byte) []byte {
	return mimi.TaggedAAD(mimi.FrankingTag(m.Salt[:], data))
}

// What is wrong with a frank doesn't lose the message, and shows.
func TestWrongFranksShow(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := bob.create(alice.User()) // of beta
	uri := room.URI()
	other := bob.create(alice.User()).URI()
	agree(t, uri, alice, bob)
	agree(t, other, alice, bob)
	reader := alice.paused(uri)
	elsewhere := bob.room(other)
	for _, c := range []struct {
		name   string
		change func(m *content.Message)      // of what is sent
		aad    func(aad, data []byte) []byte // of what is authenticated
		spoil  func(f *mimi.FanoutMessage)   // of what comes
		want   string
	}{
		{"nothing wrong", nil, nil, nil, ""},
		{"no tag", nil, func(_, _ []byte) []byte { return codec.Marshal(mls.SafeAAD{}) }, nil, "no franking tag"},
		{"tag of another salt", nil, func(_, data []byte) []byte { return mimi.TaggedAAD(mimi.FrankingTag(make([]byte, 16), data)) }, nil, "other content"},
		{"tag of other content", nil, func(_, _ []byte) []byte { return mimi.TaggedAAD(mimi.FrankAAD{}) }, nil, "other content"},
		{"another sender", func(m *content.Message) { m.Sender = alice.User() }, nil, nil, "as its sender"},
		{"no sender", func(m *content.Message) { m.Sender = "" }, nil, nil, "as its sender"},
		{"another room", func(m *content.Message) { m.Room = other }, nil, nil, "for the room"},
		{"no frank", nil, nil, func(f *mimi.FanoutMessage) { f.Frank = nil }, "the hub gave no frank"},
		{"another time", nil, nil, func(f *mimi.FanoutMessage) { f.Timestamp++ }, "does not verify"},
		{"another suite", nil, nil, func(f *mimi.FanoutMessage) { f.Frank.CipherSuite = mls.P256_AES128GCM_SHA256_P256 }, "cipher suite"},
		{"a changed server frank", nil, nil, func(f *mimi.FanoutMessage) { f.Frank.ServerFrank[0] ^= 1 }, "does not verify"},
		{"a changed signature", nil, nil, func(f *mimi.FanoutMessage) { f.Frank.Signature[0] ^= 1 }, "does not verify"},
		{"the frank of another room", nil, nil, func(f *mimi.FanoutMessage) {
			m := elsewhere.Compose(content.Text("there"))
			data := framed(t, m)
			f.Frank = bob.submitted(other, bob.encrypt(other, tagged(m, data), data)).Frank
		}, "does not verify"},
	} {
		m := room.Compose(content.Text(c.name))
		if c.change != nil {
			c.change(m)
		}
		data := framed(t, m)
		aad := tagged(m, data)
		if c.aad != nil {
			aad = c.aad(aad, data)
		}
		f := bob.submitted(uri, bob.encrypt(uri, aad, data))
		if c.spoil != nil {
			c.spoil(f)
		}
		got, ok := reader.take(t, f).(Message)
		if !ok || string(got.Data) != c.name || (got.Frank != nil) != (c.want == "") || !strings.Contains(got.FrankFault, c.want) {
			t.Errorf("%s: %+v, want %q", c.name, got, c.want)
		}
		list := reader.Messages()
		if stored := list[len(list)-1]; stored.FrankFault != got.FrankFault || (stored.Frank == nil) != (got.Frank == nil) || !bytes.Equal(stored.Data, got.Data) {
			t.Errorf("%s: stored as %+v", c.name, stored)
		}
	}
}

func TestContentThatNobodyMaySendIsDiscarded(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	alice.say(uri, "mine")
	first := bob.last(uri, 1)
	seen := alice.last(uri, 1)
	reader := alice.paused(uri)
	compose := func(change func(m *content.Message)) []byte {
		m := bob.room(uri).Compose(content.Text("x"))
		change(m)
		return framed(t, m)
	}
	again := compose(func(*content.Message) {})
	for _, c := range []struct {
		name, want string
		data       []byte
	}{
		{"a good message", "", again},
		{"the same message once more", "has the ID of message", again},
		{"an edit of another's message", "replaces a message of " + string(alice.User()), compose(func(m *content.Message) { m.Replaces = first.ID })},
		{"a deletion of another's message", "deletes a message of " + string(alice.User()), compose(func(m *content.Message) { m.Replaces, m.Body = first.ID, content.Part{} })},
		{"an expiry in ten years", "expires a year", compose(func(m *content.Message) { m.Expires = &content.Expiration{Relative: true, Time: 1 << 29} })},
		{"what has expired", "expired before it came", compose(func(m *content.Message) { m.Expires = &content.Expiration{Time: uint32(time.Now().Unix()) - 5} })},
		{"what isn't CBOR", "not a MIMI content message", codec.Marshal(mls.ApplicationFraming{Content: []byte("plain")})},
		{"CBOR in another encoding", "not a MIMI content message", codec.Marshal(mls.ApplicationFraming{Content: []byte{0x9f, 0xff}})},
	} {
		f := bob.submitted(uri, bob.encrypt(uri, nil, c.data))
		switch e := reader.take(t, f).(type) {
		case Message:
			if c.want != "" {
				t.Errorf("%s: delivered", c.name)
			}
		case Discarded:
			if c.want == "" || !strings.Contains(e.Reason, c.want) {
				t.Errorf("%s: discarded: %s", c.name, e.Reason)
			}
		default:
			t.Errorf("%s: %T", c.name, e)
		}
	}
	if m, ok := reader.Find(seen.ID); !ok || string(m.Data) != "mine" {
		t.Errorf("the first message is now %+v", m)
	}
	// Other media types are delivered as they are.
	f := bob.submitted(uri, bob.encrypt(uri, nil, codec.Marshal(mls.ApplicationFraming{MediaType: mls.MediaType{Type: "text/x"}, Content: []byte("other")})))
	if m, ok := reader.take(t, f).(Message); !ok || string(m.Data) != "other" || m.Content != nil {
		t.Errorf("another media type: %+v", m)
	}
}

func TestContentArrivesAsItWasSent(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	send := func(d *device, body content.Part, change func(m *content.Message)) Message {
		t.Helper()
		r := d.room(uri)
		m := r.Compose(body)
		if change != nil {
			change(m)
		}
		seq, err := r.SendContent(t.Context(), m)
		if err == nil {
			err = r.WaitSeq(t.Context(), seq)
		}
		if err != nil {
			t.Fatal(err)
		}
		list := r.Messages()
		got := list[len(list)-1]
		b, err := m.Encode()
		if err != nil || got.ID != content.ID(d.User(), uri, b, m.Salt) {
			t.Fatalf("sent %+v, stored %+v", m, got)
		}
		return got
	}
	first := send(alice, content.Text("helo"), func(m *content.Message) { m.Topic = []byte("t") })
	bob.last(uri, 1)
	reply := send(bob, content.Single(content.Render, content.Markdown, []byte("hello, <"+alice.User()+">")), func(m *content.Message) { m.InReplyTo = first.ID })
	like := send(bob, content.React("\u2764"), func(m *content.Message) { m.InReplyTo = first.ID })
	alice.last(uri, 3)
	send(alice, content.Text("hello"), func(m *content.Message) { m.Replaces = first.ID })
	bob.last(uri, 4)
	send(bob, content.Part{Disposition: content.Reaction}, func(m *content.Message) { m.Replaces, m.InReplyTo = like.ID, first.ID })
	send(bob, content.Part{Disposition: content.Attachment, Cardinality: content.ExternalPart, ContentType: "image/png", External: &content.External{
		URL: "https://beta.example/a", Size: 5, EncAlg: 1, Key: make([]byte, 16), Nonce: make([]byte, 12), HashAlg: 1, ContentHash: make([]byte, 32), Description: "a picture",
	}}, func(m *content.Message) { m.Expires = &content.Expiration{Relative: true, Time: 60} })
	for _, d := range []*device{alice, bob} {
		d.last(uri, 6)
		list := d.room(uri).Messages()
		if m := list[0]; m.ID != first.ID || string(m.Content.Topic) != "t" {
			t.Errorf("%s: %+v", d.ID(), m)
		}
		if m := list[1]; m.ID != reply.ID || m.Content.InReplyTo != first.ID || m.Content.Body.Mentions()[0] != alice.User() {
			t.Errorf("%s: reply %+v", d.ID(), m.Content)
		}
		if m := list[2]; !m.Content.Reaction() || string(m.Data) != "\u2764" {
			t.Errorf("%s: reaction %+v", d.ID(), m.Content)
		}
		if m := list[3]; m.Content.Replaces != first.ID || m.Content.Deletes() || string(m.Data) != "hello" {
			t.Errorf("%s: edit %+v", d.ID(), m.Content)
		}
		if m := list[4]; m.Content.Replaces != like.ID || !m.Content.Deletes() {
			t.Errorf("%s: deletion %+v", d.ID(), m.Content)
		}
		if m := list[5]; m.Content.Body.External == nil || m.Content.Body.External.URL != "https://beta.example/a" || m.Content.Expires == nil || string(m.Data) != "a picture" {
			t.Errorf("%s: attachment %+v", d.ID(), m.Content)
		}
	}
	theirs := room.Compose(content.Text("not mine"))
	theirs.Replaces = reply.ID
	wrong := room.Compose(content.Text("x"))
	wrong.Sender = bob.User()
	long := room.Compose(content.Text(strings.Repeat("x", MaxText+8<<10)))
	for what, m := range map[string]*content.Message{"an edit of another's": theirs, "another's name": wrong, "a long one": long} {
		if _, err := room.SendContent(t.Context(), m); err == nil {
			t.Errorf("%s was sent", what)
		}
	}
}

// A room of an earlier release has bytes as its messages; its tests of what is saved show that they are still read.
func TestRoomsOfBytesStayThat(t *testing.T) {
	alice, _ := openSaved(t, "alice-laptop")
	r := alice.Rooms()[0]
	if _, err := r.SendContent(t.Context(), r.Compose(content.Text("x"))); !errors.Is(err, ErrPlain) {
		t.Errorf("content in a room of bytes: %v", err)
	}
	for _, m := range r.Messages() {
		if m.Content != nil || m.Frank != nil || m.FrankFault != "" || len(m.Data) == 0 {
			t.Errorf("%+v", m)
		}
	}
}

// A hub can let a room begin with any franking agent; nobody enters it unless the agent is the hub.
func TestFrankingAgentIsTheHub(t *testing.T) {
	p := providers(t, "alpha")
	bob := p[0].enrol("bob", "bob-phone")
	uri := mimi.URI("mimi://alpha.example/r/lunch")
	hub := func(domain string) mls.ExternalSender {
		pub, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := embedded(t, domain).IssueHub(t.Context(), pub)
		if err != nil {
			t.Fatal(err)
		}
		return mls.ExternalSender{SignatureKey: []byte(pub), Credential: mls.X509Credential(chain)}
	}
	own := hub("alpha.example")
	good := mimi.FrankingAgentData(own)
	with := func(change func(a *mimi.FrankingAgentData)) []byte {
		a := good
		change(&a)
		return codec.Marshal(a)
	}
	for name, c := range map[string]struct {
		agent []byte
		want  string
	}{
		"the hub":                   {codec.Marshal(good), ""},
		"none":                      {nil, ""},
		"another provider":          {codec.Marshal(mimi.FrankingAgentData(hub("beta.example"))), "is for beta.example"},
		"a client":                  {with(func(a *mimi.FrankingAgentData) { a.Credential = bob.credential() }), "is for alpha.example"},
		"a key of somebody":         {with(func(a *mimi.FrankingAgentData) { a.SignatureKey = hub("alpha.example").SignatureKey }), "another key"},
		"what names nobody":         {with(func(a *mimi.FrankingAgentData) { a.Credential = mls.BasicCredential([]byte("hub")) }), "credential"},
		"something that is no data": {[]byte("x"), "franking agent"},
	} {
		ext := roomExtensions(uri, "lunch", mimi.Participant{User: bob.User(), Role: mimi.RoleAdmin}, own, new(mimi.Rules))
		data, _ := ext.Find(mls.ExtensionAppDataDictionary)
		var d mls.AppDataDictionary
		if err := codec.Unmarshal(data, &d); err != nil {
			t.Fatal(err)
		}
		if d = d.Remove(mimi.ComponentFrankingAgent); c.agent != nil {
			d = d.Set(mimi.ComponentFrankingAgent, c.agent)
		}
		g, err := mls.NewGroup(bob.config, nil, mls.GroupOptions{
			GroupID: []byte(uri.Group()), Suite: defaultSuite, Credential: bob.credential(), Signer: bob.signer,
			Extensions: ext.Set(mls.ExtensionAppDataDictionary, codec.Marshal(d)), LeafExtensions: mimi.LeafExtensions(),
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := bob.checkRoom(uri, g); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// A device of an earlier release has KeyPackages published that new rooms can't take: it replaces them once.
func TestOutdatedKeyPackagesAreReplaced(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	refs := func() map[string]bool {
		found := make(map[string]bool)
		if err := store.ScanPrefix(bob.db, []byte(prefixKeyPackage), func(key, _ []byte) bool { found[string(key)] = true; return true }); err != nil {
			t.Fatal(err)
		}
		return found
	}
	before := refs()
	bob.stop()
	c, err := Open(t.Context(), bob.o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.db.Commit(map[string][]byte{string(keyOffered): nil}, nil); err != nil {
		t.Fatal(err)
	}
	bob.run(c)
	if err := c.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := refs()
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	used := ""
	for ref := range after {
		if b, err := bob.db.Get([]byte(prefixKeyPackage + ref)); err == nil && b == nil {
			used = ref
		}
	}
	if len(after) != 2*len(before) || used == "" || before[used] {
		t.Errorf("%d key packages, then %d; an old one was used: %v", len(before), len(after), before[used])
	}
	bob.restart()
	if err := bob.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again := refs(); len(again) >= len(after)+len(before) {
		t.Errorf("replaced again: %d key packages", len(again))
	}
}
