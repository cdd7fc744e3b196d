package node

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// whisper makes an ephemeral message of the client.
func (c *testClient) whisper() *mimi.SubmitMessageRequest {
	c.t.Helper()
	m := must(c.group.Encrypt(nil, []byte(mimi.EphemeralAAD), mimi.EphemeralData(mimi.Ephemeral{Kind: mimi.EphemeralTyping})))(c.t)
	return &mimi.SubmitMessageRequest{Message: m, Sender: c.user}
}

func (c *testClient) sendEphemeral(req *mimi.SubmitMessageRequest, generation uint32) error {
	_, err := c.api.SendEphemeral(c.t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(c.room), Body: codec.Marshal(req), Generation: &generation}))
	return err
}

// hears waits for an ephemeral message.
func (e *events) hears() *api.Ephemeral {
	e.c.t.Helper()
	for {
		ev := e.next()
		if got := ev.GetEphemeral(); got != nil {
			return got
		}
		e.c.process(ev)
	}
}

func TestEphemeralMessagesLeaveNothingInTheStores(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	before, after := dump(t, alpha.Node), dump(t, beta.Node)
	if err := alice.sendEphemeral(alice.whisper(), 0); err != nil {
		t.Fatal(err)
	}
	got := bobs.hears()
	if err := bob.sendEphemeral(bob.whisper(), 0); err != nil {
		t.Fatal(err)
	}
	alices.hears()
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(got.Fanout, &f); err != nil || mimi.URI(got.Room) != alice.room {
		t.Errorf("bob gets %+v, %v", got, err)
	}
	for _, s := range []struct {
		n   *testNode
		was map[string]string
	}{{alpha, before}, {beta, after}} {
		for k, v := range dump(t, s.n.Node) {
			if s.was[k] == v {
				continue
			}
			if !strings.HasPrefix("n/"+k, prefixSent) {
				t.Errorf("%s: it changed %q", s.n.cfg.Domain, k)
			}
			if strings.Contains(v, string(f.Message.Private.Ciphertext)) {
				t.Errorf("%s: %q has the message", s.n.cfg.Domain, k)
			}
		}
	}
}

func TestEphemeralMessagesAreCheckedLikeOthers(t *testing.T) {
	alpha, beta, alice, bob, _, _ := twoNodes(t)
	eve := newClient(t, alpha, "eve", "eve-laptop")
	h := alpha.peerHandler()
	peer := func(domain string, body []byte) int {
		u := "https://alpha.example" + federation.EphemeralPath
		return alpha.asPeerAt(h, domain, u, string(alice.room), body).Code
	}
	good := bob.whisper()
	old := alice.whisper()
	old.Message.Private.Epoch--
	foreign := alice.whisper()
	foreign.Message.Private.GroupID = append(foreign.Message.Private.GroupID, 'x')
	large := alice.whisper()
	large.Message.Private.Ciphertext = make([]byte, federation.MaxEphemeral)
	logged := alice.seal("for the log")
	eve.room = alice.room
	stranger := alice.whisper()
	stranger.Sender = eve.user
	for what, tt := range map[string]struct {
		err  error
		code string
	}{
		"another's name":  {alice.sendEphemeral(good, 100), "notAllowed"},
		"an old epoch":    {alice.sendEphemeral(old, 101), "notAllowed"},
		"another group":   {alice.sendEphemeral(foreign, 102), "notAllowed"},
		"a large one":     {alice.sendEphemeral(large, 103), "tooLarge"},
		"one for the log": {alice.sendEphemeral(logged, 104), "malformed"},
		"a colleague's":   {eve.sendEphemeral(alice.whisper(), 2), "notAllowed"},
		"of a stranger":   {eve.sendEphemeral(stranger, 1), "notAllowed"},
	} {
		if code(tt.err) != tt.code {
			t.Errorf("%s: %v, want %s", what, tt.err, tt.code)
		}
	}
	if err := alice.sendEphemeral(alice.whisper(), 60); err != nil {
		t.Errorf("a good one: %v", err)
	}
	if err := alice.sendEphemeral(alice.whisper(), 50); code(err) != "keyUsed" {
		t.Errorf("one with a key before the last: %v", err)
	}
	if _, err := alice.api.SendEphemeral(t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(alice.room), Body: codec.Marshal(alice.whisper())})); code(err) != "malformed" {
		t.Errorf("one without a generation: %v", err)
	}
	if c := peer("gamma.example", codec.Marshal(good)); c != http.StatusForbidden {
		t.Errorf("a peer that doesn't speak for the sender: %d", c)
	}
	if c := peer("beta.example", codec.Marshal(good)); c != http.StatusNoContent {
		t.Errorf("the right peer: %d", c)
	}
	// At a follower.
	p := provider{beta.Node}
	fanout := func(q *mimi.SubmitMessageRequest) []byte {
		return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: q.Message})
	}
	for what, tt := range map[string]struct {
		from string
		room mimi.URI
		body []byte
		code string
	}{
		"of another hub":  {"gamma.example", alice.room, fanout(alice.whisper()), "notAllowed"},
		"unknown room":    {"alpha.example", "mimi://alpha.example/r/other", fanout(alice.whisper()), "notAllowed"},
		"one for the log": {"alpha.example", alice.room, fanout(logged), "malformed"},
		"garbage":         {"alpha.example", alice.room, []byte("x"), "malformed"},
	} {
		if e := reason(p.Ephemeral(t.Context(), tt.from, tt.room, tt.body)); e == nil || e.code != tt.code {
			t.Errorf("%s: %v, want %s", what, e, tt.code)
		}
	}
	if err := p.Ephemeral(t.Context(), "alpha.example", alice.room, fanout(alice.whisper())); err != nil {
		t.Errorf("the right hub: %v", err)
	}
}

func TestEphemeralMessagesAreLimited(t *testing.T) {
	n := newLimited(t, "alpha", Limits{EphemeralPerSecond: 1})
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createRoom()
	sent := 0
	for i := range 10 {
		if err := alice.sendEphemeral(alice.whisper(), uint32(i)); err == nil {
			sent++
		} else if code(err) != "busy" {
			t.Fatal(err)
		}
	}
	if sent < 2 || sent > 8 {
		t.Errorf("%d of 10 were sent", sent)
	}
	p, named := provider{n.Node}, codec.Marshal(&mimi.SubmitMessageRequest{Message: alice.whisper().Message, Sender: "mimi://beta.example/u/bob"})
	busy := 0
	for range 10 {
		if e := reason(p.Ephemeral(t.Context(), "beta.example", alice.room, named)); e != nil && e.code == "busy" {
			busy++
		}
	}
	if busy == 0 {
		t.Error("a peer's user has no limit")
	}
}

// TestEphemeralMessagesDoNotPileUp has neither the stream nor the peer take any.
func TestEphemeralMessagesDoNotPileUp(t *testing.T) {
	n := newNode(t, "alpha")
	l := n.listeners.add("mimi://alpha.example/d/slow", "mimi://alpha.example/u/slow", 1)
	const room = mimi.URI("mimi://alpha.example/r/room")
	n.listeners.listen(l, room)
	n.ephemerals.mu.Lock()
	n.ephemerals.queues = map[string][]ephemeral{"beta.example": {}} // it is being sent to
	n.ephemerals.mu.Unlock()
	for i := range 1000 {
		n.listeners.ephemeral(room, "", fmt.Append(nil, i))
		n.queueEphemeral("beta.example", ephemeral{room, nil})
	}
	if got := len(l.take().ephemeral); got != maxWaiting {
		t.Errorf("%d wait for a stream", got)
	}
	n.ephemerals.mu.Lock()
	defer n.ephemerals.mu.Unlock()
	if got := len(n.ephemerals.queues["beta.example"]); got != maxPeerWaiting {
		t.Errorf("%d wait for a peer", got)
	}
}
