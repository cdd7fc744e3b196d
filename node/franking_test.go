package node

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// franked edits the extensions of a new room so that the hub franks its messages.
func franked(t testing.TB, change func(mls.AppDataDictionary, *mimi.FrankingAgentData) mls.AppDataDictionary) func(*mls.Extensions) {
	return func(ext *mls.Extensions) {
		data, _ := ext.Find(mls.ExtensionExternalSenders)
		var senders mls.ExternalSenders
		if err := codec.Unmarshal(data, &senders); err != nil {
			t.Fatal(err)
		}
		data, _ = ext.Find(mls.ExtensionAppDataDictionary)
		var d mls.AppDataDictionary
		if err := codec.Unmarshal(data, &d); err != nil {
			t.Fatal(err)
		}
		agent := mimi.FrankingAgentData(senders[hubSender])
		d = mimi.FrankedRoom(d, agent)
		if change != nil {
			d = change(d, &agent)
		}
		*ext = ext.Set(mls.ExtensionAppDataDictionary, codec.Marshal(d))
	}
}

func (c *testClient) createFranked() {
	c.t.Helper()
	room := must(mimi.RoomURI(c.node.cfg.Domain, strings.ToLower(rand.Text())))(c.t)
	g := c.newGroup(room, franked(c.t, nil))
	if err := c.tryCreate(room, g); err != nil {
		c.t.Fatal(err)
	}
	c.room, c.group = room, g
}

// sealContent encrypts content of this client with its franking tag.
func (c *testClient) sealContent(text string) (data []byte, tag mimi.FrankAAD, q *mimi.SubmitMessageRequest) {
	c.t.Helper()
	m := content.New(c.user, c.room, content.Text(text))
	data = codec.Marshal(mls.ApplicationFraming{MediaType: mimi.ContentType(), Content: must(m.Encode())(c.t)})
	tag = mimi.FrankingTag(m.Salt[:], data)
	return data, tag, &mimi.SubmitMessageRequest{Message: must(c.group.Encrypt(nil, mimi.TaggedAAD(tag), data))(c.t), Sender: c.user}
}

func TestHubFranksWhatIsTagged(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createFranked()
	_, tag, q := alice.sealContent("hello")
	resp, seq, err := alice.submit(q)
	if err != nil || resp.Frank == nil {
		t.Fatalf("%+v, %v", resp, err)
	}
	_, own, err := n.keys.hub(testSuite)
	if err != nil {
		t.Fatal(err)
	}
	c := mimi.ServerFrankingContext{Sender: alice.user, Room: alice.room, AcceptedTimestamp: resp.AcceptedTimestamp}
	check := func(f *mimi.Frank) {
		t.Helper()
		if f == nil || f.Verify(testSuite, own.SignatureKey, c) != nil || f.VerifyReported(n.keys.franking[:], tag, c) != nil {
			t.Errorf("the frank %+v doesn't verify", f)
		}
	}
	check(resp.Frank)
	entry := must(n.entry(alice.room, seq))(t)
	check(entry.Frank)
	again, _, err := alice.submit(q)
	if err != nil || !bytes.Equal(codec.Marshal(again), codec.Marshal(resp)) {
		t.Errorf("submitted again: %+v, %v, want %+v", again, err, resp)
	}

	untagged := &mimi.SubmitMessageRequest{Sender: alice.user, Message: must(alice.group.Encrypt(nil, nil, codec.Marshal(mls.ApplicationFraming{})))(t)}
	if resp, _, err := alice.submit(untagged); err != nil || resp.Code != mimi.SubmitAccepted || resp.Frank != nil {
		t.Errorf("a message without a tag: %+v, %v", resp, err)
	}
	for what, aad := range map[string][]byte{
		"a short tag": codec.Marshal(mls.SafeAAD(nil).Set(mimi.ComponentFrankAAD, []byte("x"))),
		"no SafeAAD":  []byte("\x05x"),
		"nothing":     {},
	} {
		_, _, q := alice.sealContent(what)
		q.Message.Private.AuthenticatedData = aad
		if _, _, err := alice.submit(q); code(err) != "malformed" {
			t.Errorf("%s: %v", what, err)
		}
	}

	r := must(n.hostedRoom(alice.room))(t)
	for what, ro := range map[string]*roster{"no agent": {}, "a key that the hub doesn't have": {agent: []byte("another")}} {
		if f, err := n.frank(r, ro, q.Message.Private, c); f != nil || err != nil {
			t.Errorf("a frank in a room with %s: %+v, %v", what, f, err)
		}
	}

	// The secret survives: what was stamped before is known after a restart.
	n.stop()
	n.start()
	check(resp.Frank)

	bob := newClient(t, n, "bob", "bob-phone")
	bob.createRoom()
	if resp, _, err := bob.submit(bob.seal("plain")); err != nil || resp.Frank != nil {
		t.Errorf("a room without an agent: %+v, %v", resp, err)
	}
}

func TestFrankingAgentOfANewRoomIsItsHub(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	room := must(mimi.RoomURI("alpha.example", "lunch"))(t)
	set := func(d mls.AppDataDictionary, a *mimi.FrankingAgentData) mls.AppDataDictionary {
		return d.Set(mimi.ComponentFrankingAgent, codec.Marshal(a))
	}
	for what, change := range map[string]func(mls.AppDataDictionary, *mimi.FrankingAgentData) mls.AppDataDictionary{
		"a key of the creator's": func(d mls.AppDataDictionary, a *mimi.FrankingAgentData) mls.AppDataDictionary {
			a.SignatureKey = must(testSuite.SignaturePublicKey(alice.signer.Public()))(t)
			return set(d, a)
		},
		"the creator's credential": func(d mls.AppDataDictionary, a *mimi.FrankingAgentData) mls.AppDataDictionary {
			a.Credential = mls.X509Credential(alice.chain)
			return set(d, a)
		},
		"an agent that doesn't decode": func(d mls.AppDataDictionary, _ *mimi.FrankingAgentData) mls.AppDataDictionary {
			return d.Set(mimi.ComponentFrankingAgent, []byte("x"))
		},
		"tags that have no place": func(d mls.AppDataDictionary, _ *mimi.FrankingAgentData) mls.AppDataDictionary {
			return d.Remove(mls.ComponentSafeAAD)
		},
	} {
		if err := alice.tryCreate(room, alice.newGroup(room, franked(t, change))); code(err) != "malformed" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := alice.tryCreate(room, alice.newGroup(room, franked(t, nil))); err != nil {
		t.Error(err)
	}
}

func TestFrankingSecretIsWhole(t *testing.T) {
	path := t.TempDir() + "/franking.key"
	first := must(readSecret(path, 32))(t)
	if again := must(readSecret(path, 32))(t); !bytes.Equal(first, again) || bytes.Equal(first, make([]byte, 32)) {
		t.Errorf("%x and then %x", first, again)
	}
	if err := writeFile(path, first[:31]); err != nil {
		t.Fatal(err)
	}
	if _, err := readSecret(path, 32); err == nil || errors.Is(err, errRecord) {
		t.Errorf("a short secret: %v", err)
	}
}
