package client

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/chain"
)

// ledgerOf returns how far a device has followed the hub's heads of a room, and whether it has told of a fault.
func ledgerOf(d *device, room mimi.URI) (known bool, at linkRecord, verified *chain.Signed) {
	r := d.room(room)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ledger.known, linkRecord{chain: r.ledger.chain}, r.ledger.verified
}

// verifies waits until the devices have one chain of the room, up to a head at its end, and nothing against the hub.
func verifies(t testing.TB, room mimi.URI, devices ...*device) {
	t.Helper()
	within(t, func() error {
		var first chain.Hash
		for i, d := range devices {
			known, at, v := ledgerOf(d, room)
			r := d.room(room)
			switch {
			case !known || v == nil || v.Seq != r.Seq() || v.Chain != at.chain:
				return fmt.Errorf("%s: chain %v %x at %d, head %+v", d.ID(), known, at.chain, r.Seq(), v)
			case i > 0 && at.chain != first:
				return fmt.Errorf("%s has another chain than %s", d.ID(), devices[0].ID())
			case r.HubFault() != "":
				t.Fatalf("%s accuses an honest hub: %s", d.ID(), r.HubFault())
			}
			first = at.chain
		}
		return nil
	})
}

func TestClientsFollowTheHeadsOfAnHonestHub(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	bob.say(uri, "one")
	alice.say(uri, "two")
	if err := bob.room(uri).UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	bob.say(uri, "three")
	sees(t, uri, []string{"bob-phone: one", "alice-laptop: two", "bob-phone: three"}, alice, bob)
	verifies(t, uri, alice, bob)
	for _, d := range []*device{alice, bob} {
		r := d.room(uri)
		r.mu.Lock()
		if r.ledger.claimed.Seq == 0 {
			t.Errorf("%s has claimed no head", d.ID())
		}
		r.mu.Unlock()
	}
	// Who is added again gets the chain anew.
	if err := room.Remove(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	within(t, func() error {
		if bob.Rooms()[0].Active() {
			return errors.New("bob is still in")
		}
		return nil
	})
	alice.say(uri, "without bob")
	if err := room.Add(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob)
	alice.say(uri, "with bob")
	verifies(t, uri, alice, bob)
	// A second device by an external commit, and both ends after restarts.
	bob.stop()
	alice.say(uri, "four")
	phone := p[0].enrol("alice", "alice-phone")
	if _, err := phone.Join(t.Context(), uri); err != nil {
		t.Fatal(err)
	}
	bob.restart()
	alice.restart()
	phone.say(uri, "five")
	bob.say(uri, "six")
	sees(t, uri, []string{"alice-phone: five", "bob-phone: six"}, phone)
	agree(t, uri, alice, bob, phone)
	verifies(t, uri, alice, bob, phone)
	for _, d := range []*device{alice, bob, phone} {
		if list, err := d.Evidence(); err != nil || len(list) > 0 {
			t.Errorf("%s has evidence %v, %v", d.ID(), list, err)
		}
	}
}

// hub is alpha's under the test's control: it has the key, and tells each device its own history of a room. The devices
// don't run; they get what the hub tells as a stream's batches.
type hub struct {
	t           testing.TB
	uri         mimi.URI
	signer      crypto.Signer
	root        authority.Fingerprint
	incarnation uint64
	alice, bob  *told
	count       int
}

// told is what a device was told.
type told struct {
	*device
	hub   *hub
	seq   uint64
	chain chain.Hash
}

// lyingHub is a room of alice and bob that they have verified; both have made a claim in it.
func lyingHub(t testing.TB) *hub {
	t.Helper()
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	alice.say(uri, "one")
	bob.say(uri, "two")
	sees(t, uri, []string{"alice-laptop: one", "bob-phone: two"}, alice, bob)
	verifies(t, uri, alice, bob)
	b, err := os.ReadFile(filepath.Join(p[0].config.Data, "keys", "hub-ed25519.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	h := &hub{t: t, uri: uri, root: p[0].root}
	if h.signer, err = authority.ParsePrivateKey(block.Bytes); err != nil {
		t.Fatal(err)
	}
	h.alice, h.bob = h.of(alice), h.of(bob)
	return h
}

func (h *hub) of(d *device) *told {
	x := &told{device: d, hub: h}
	x.reopen()
	known, at, v := ledgerOf(d, h.uri)
	if !known || v == nil {
		h.t.Fatal("nothing was verified")
	}
	x.seq, x.chain, h.incarnation = d.room(h.uri).Seq(), at.chain, v.Incarnation
	return x
}

// reopen has the device begin anew from its directory, without a stream.
func (x *told) reopen() {
	x.t.Helper()
	x.stop()
	c, err := Open(x.t.Context(), x.o)
	if err != nil {
		x.t.Fatal(err)
	}
	x.Client = c
	x.cancel, x.ended = func() {}, make(chan error, 1)
	x.ended <- nil
}

func (x *told) r() *Room { return x.room(x.hub.uri) }

// invent makes an entry that isn't of anybody.
func (h *hub) invent() []byte {
	h.count++
	r := h.alice.r()
	return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: mls.NewMLSMessage(&mls.PrivateMessage{
		GroupID: []byte(h.uri.Group()), Epoch: r.Epoch(), ContentType: mls.ContentApplication, EncryptedSenderData: []byte("x"), Ciphertext: fmt.Appendf(nil, "%d", h.count),
	})})
}

func (h *hub) sign(seq uint64, c chain.Hash) *chain.Signed {
	h.t.Helper()
	s, err := chain.Sign(rand.Reader, h.signer, chain.Head{Room: h.uri, Suite: defaultSuite, Place: chain.Place{Incarnation: h.incarnation, Seq: seq, Chain: c}})
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// next adds an entry to a device's history, without a head.
func (x *told) next(fanout []byte) *api.LogEntry {
	r := x.r()
	r.mu.Lock()
	link := chain.NewLink(fanout, r.contextHash())
	r.mu.Unlock()
	x.seq++
	x.chain = x.chain.Next(x.seq, link)
	return &api.LogEntry{Room: string(x.hub.uri), Seq: x.seq, Fanout: fanout}
}

// headed is next with the head that belongs to it.
func (x *told) headed(fanout []byte) *api.LogEntry {
	e := x.next(fanout)
	e.Head = codec.Marshal(x.hub.sign(x.seq, x.chain))
	return e
}

func live() *api.Event { return &api.Event{Event: &api.Event_Live{Live: new(api.Live)}} }

// handled has the device process a batch, and returns what it tells of the hub.
func (x *told) handled(entries ...*api.LogEntry) []Event {
	x.t.Helper()
	var events []*api.Event
	for _, e := range entries {
		events = append(events, &api.Event{Event: &api.Event_Entry{Entry: e}})
	}
	return x.events(events...)
}

func (x *told) events(events ...*api.Event) (told []Event) {
	x.t.Helper()
	var w waits
	var all []Event
	err := errors.Join(x.process(x.t.Context(), &w, events, &all), x.check(&w, events, &all))
	more, e := x.r().check(&w, always)
	if err := errors.Join(err, e, w.wait()); err != nil {
		x.t.Fatal(err)
	}
	all = append(all, more...)
	for _, e := range all {
		switch e.(type) {
		case HubFault, HubRestored:
			told = append(told, e)
		}
	}
	return told
}

// quiet fails the test if something was told.
func (x *told) quiet(told []Event) {
	x.t.Helper()
	if len(told) > 0 {
		x.t.Errorf("%s tells %+v", x.ID(), told)
	}
}

// sealed is a message of the device, as the hub orders it.
func (x *told) sealed(text string) []byte {
	x.t.Helper()
	b, err := x.r().SealMessage([]byte(text))
	if err != nil {
		x.t.Fatal(err)
	}
	var req mimi.SubmitMessageRequest
	if err := codec.Unmarshal(b, &req); err != nil {
		x.t.Fatal(err)
	}
	return codec.Marshal(&mimi.FanoutMessage{Timestamp: uint64(time.Now().UnixMilli()), Message: req.Message})
}

// claims is a message of the device with a claim of the test's.
func (x *told) claims(c chain.Claim) []byte {
	x.t.Helper()
	r := x.r()
	r.mu.Lock()
	defer r.mu.Unlock()
	m, err := r.group.Encrypt(nil, codec.Marshal(mls.SafeAAD(nil).Set(chain.ComponentClaim, codec.Marshal(c))),
		codec.Marshal(mls.ApplicationFraming{MediaType: mimi.ContentType(), Content: []byte("x")}))
	if err != nil {
		x.t.Fatal(err)
	}
	return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: m})
}

// due has the next message of the device make a claim.
func (x *told) due() {
	r := x.r()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledger.claimedAt = time.Time{}
}

// claimIn returns the claim in an entry.
func claimIn(t *testing.T, fanout []byte) *chain.Claim {
	t.Helper()
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(fanout, &f); err != nil {
		t.Fatal(err)
	}
	return chain.ClaimOf(f.Message.Private.AuthenticatedData)
}

// faults returns the one HubFault that was told.
func (x *told) fault(told []Event, reason string) HubFault {
	x.t.Helper()
	if len(told) != 1 {
		x.t.Fatalf("%s tells %+v", x.ID(), told)
	}
	f, ok := told[0].(HubFault)
	if !ok || f.Reason != reason || f.Room != x.hub.uri || x.r().HubFault() != reason {
		x.t.Fatalf("%s tells %+v, and then %q", x.ID(), told[0], x.r().HubFault())
	}
	return f
}

// proves fails the test unless a fault has evidence that a third party believes.
func (x *told) proves(f HubFault, first, second uint64) {
	x.t.Helper()
	e, err := chain.ParseFile(f.Evidence)
	if err != nil {
		x.t.Fatal(err)
	}
	b, err := e.Verify()
	if err != nil {
		x.t.Fatal(err)
	}
	if b.Fingerprints()[0] != x.hub.root || e.First.Room != x.hub.uri || e.First.Seq != first || e.Second.Seq != second {
		x.t.Errorf("evidence about %s, entries %d and %d, root %s", e.First.Room, e.First.Seq, e.Second.Seq, b.Fingerprints()[0])
	}
	list, err := x.Evidence()
	if err != nil || len(list) != 1 || !bytes.Equal(list[0].File, f.Evidence) || list[0].First != first || list[0].Second != second || list[0].Room != x.hub.uri {
		x.t.Errorf("kept %+v, %v", list, err)
	}
}

// A hub shows two devices different histories, each signed and whole. Their messages, which are in both, tell.
func TestTwoHistoriesAreFoundByMessages(t *testing.T) {
	h := lyingHub(t)
	first := h.alice.seq + 1
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	h.bob.quiet(h.bob.handled(h.bob.headed(h.invent())))
	h.alice.due()
	m := h.alice.sealed("hello")
	h.alice.quiet(h.alice.handled(h.alice.headed(m)))
	f := h.bob.fault(h.bob.handled(h.bob.headed(m)), faultOther)
	if f.Client != h.alice.ID() || f.Seq != first {
		t.Errorf("told %+v", f)
	}
	h.bob.proves(f, first, first+1)

	// The device that knows says it with every message, and more of the same is nothing new.
	m = h.bob.sealed("what do you see?")
	h.bob.quiet(h.bob.handled(h.bob.headed(m)))
	h.alice.proves(h.alice.fault(h.alice.handled(h.alice.headed(m)), faultOther), first+1, first+2)
	for range 2 {
		m = h.alice.sealed("something else")
		if c := claimIn(t, m); c == nil || len(c.Signature) == 0 {
			t.Errorf("after a contradiction the claim is %+v", c)
		}
		h.alice.quiet(h.alice.handled(h.alice.headed(m)))
		h.bob.quiet(h.bob.handled(h.bob.headed(m)))
	}
	h.bob.reopen()
	if list, err := h.bob.Evidence(); err != nil || len(list) != 1 || h.bob.r().HubFault() != faultOther {
		t.Errorf("after a restart: %v, %v, %q", list, err, h.bob.r().HubFault())
	}
	m = h.alice.sealed("after that")
	h.bob.quiet(h.bob.handled(h.bob.headed(m)))
}

// The node of a device changes what comes from an honest hub. Its heads are those of the hub.
func TestANodeThatChangesTheLogIsFoundByTheHubsHeads(t *testing.T) {
	h := lyingHub(t)
	for name, change := range map[string]func(a, b, c *api.LogEntry) []*api.LogEntry{
		"an entry rewritten": func(a, b, c *api.LogEntry) []*api.LogEntry {
			b.Fanout = h.invent()
			return []*api.LogEntry{a, b, c}
		},
		"entries in another order": func(a, b, c *api.LogEntry) []*api.LogEntry {
			a.Fanout, b.Fanout = b.Fanout, a.Fanout
			return []*api.LogEntry{a, b, c}
		},
		"an entry left out": func(a, b, c *api.LogEntry) []*api.LogEntry {
			a.Fanout, b.Fanout, b.Head = b.Fanout, c.Fanout, c.Head
			return []*api.LogEntry{a, b} // a head at another number than the entry's is none, but the next one comes
		},
	} {
		h.alice.reopen()
		a, b, c, d := h.alice.next(h.invent()), h.alice.next(h.invent()), h.alice.headed(h.invent()), h.invent()
		var told []Event
		for _, e := range change(a, b, c) {
			told = append(told, h.alice.handled(e)...)
		}
		if len(told) == 0 { // what was left out is missed with the next entry
			e := h.alice.headed(d)
			e.Seq--
			told = h.alice.handled(e)
			s := new(chain.Signed)
			if err := codec.Unmarshal(c.Head, s); err != nil {
				t.Fatal(err)
			}
			e = &api.LogEntry{Room: string(h.uri), Seq: e.Seq + 1, Fanout: d, Head: e.Head}
			told = append(told, h.alice.handled(e)...)
		}
		if f := h.alice.fault(told, faultOther); f.Evidence != nil || f.Client != "" {
			t.Errorf("%s: told %+v", name, f)
		}
		// The heads go on from what the hub has signed.
		h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
		h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	}
}

// A node leaves entries out and keeps the hub's heads back. Messages of others say how long the log is.
func TestANodeThatShortensTheLogIsFoundByMessages(t *testing.T) {
	h := lyingHub(t)
	h.alice.handled(h.alice.headed(h.invent()), h.alice.headed(h.invent()))
	h.alice.due()
	m := h.alice.sealed("hello")
	f := h.bob.fault(h.bob.handled(h.bob.headed(m)), faultOther)
	if f.Client != h.alice.ID() || f.Evidence != nil {
		t.Errorf("told %+v", f)
	}
	// The hub signs the shorter log as well.
	h.bob.proves(h.bob.fault(h.bob.handled(h.bob.headed(h.invent())), faultOther), h.bob.seq, h.bob.seq)
}

func TestAHubThatSignsNoMoreIsTold(t *testing.T) {
	h := lyingHub(t)
	entry := func(e *api.LogEntry) *api.Event { return &api.Event{Event: &api.Event_Entry{Entry: e}} }
	forged := func(x *told) *api.LogEntry {
		e := x.headed(h.invent())
		e.Head[len(e.Head)-1]++
		return e
	}
	for name, events := range map[string]func(x *told) []*api.Event{
		"no heads":      func(x *told) []*api.Event { return []*api.Event{entry(x.next(h.invent())), live()} },
		"a forged head": func(x *told) []*api.Event { return []*api.Event{entry(forged(x)), live()} },
		"nothing that reads": func(x *told) []*api.Event {
			e := x.next(h.invent())
			e.Head = []byte("x")
			return []*api.Event{entry(e), live()}
		},
		"a head of another room": func(x *told) []*api.Event {
			e := x.next(h.invent())
			other := *h
			other.uri += "2"
			e.Head = codec.Marshal(other.sign(x.seq, x.chain))
			return []*api.Event{entry(e), live()}
		},
		"a head at another entry": func(x *told) []*api.Event {
			e, f := x.headed(h.invent()), x.next(h.invent())
			e.Head, f.Head = nil, e.Head
			return []*api.Event{entry(e), entry(f), live()}
		},
	} {
		h.alice.reopen()
		if f := h.alice.fault(h.alice.events(events(h.alice)...), faultUnsigned); f.Evidence != nil {
			t.Errorf("%s: %+v", name, f)
		}
		h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	}
	h.alice.reopen()
	h.alice.quiet(h.alice.events(live())) // there was nothing to sign
	// A later batch of the stream needs none.
	h.alice.quiet(h.alice.events(entry(h.alice.headed(h.invent())), live()))
	h.alice.quiet(h.alice.handled(h.alice.next(h.invent())))

	// Answers.
	head := codec.Marshal(h.sign(h.alice.seq, h.alice.chain))
	h.alice.hearAnswer(h.uri, true, head)
	h.alice.hearAnswer(h.uri, false, nil)
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	h.alice.hearAnswer(h.uri, true, nil)
	h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultUnsigned)
}

// A hub signs, in its answer to a message, another log than it shows then.
func TestAnAnswerThatTheLogContradictsIsEvidence(t *testing.T) {
	h := lyingHub(t)
	seq := h.alice.seq + 2
	h.alice.hearAnswer(h.uri, true, codec.Marshal(h.sign(seq, chain.Hash{1})))
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	h.alice.proves(h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultOther), seq, seq)

	// A head that isn't the hub's proves nothing.
	forged := h.sign(h.bob.seq+1, chain.Hash{1})
	forged.Signature[0]++
	h.bob.hearAnswer(h.uri, true, codec.Marshal(forged))
	h.bob.quiet(h.bob.handled(h.bob.headed(h.invent())))
}

// A hub goes on from another log when a device comes back.
func TestAHubThatGoesOnFromAnotherLogIsAccused(t *testing.T) {
	h := lyingHub(t)
	first := h.alice.seq
	h.alice.r().newStream()
	h.alice.chain = chain.Hash{1}
	e := h.alice.headed(h.invent())
	e.Previous = bytes.Repeat([]byte{0}, 32)
	e.Previous[0] = 1
	h.alice.proves(h.alice.fault(h.alice.handled(e), faultOther), first, first+1)

	// And again: more of the same.
	h.alice.r().newStream()
	h.alice.chain = chain.Hash{2}
	e = h.alice.headed(h.invent())
	e.Previous = bytes.Repeat([]byte{0}, 32)
	e.Previous[0] = 2
	h.alice.quiet(h.alice.handled(e))
	if list, err := h.alice.Evidence(); err != nil || len(list) != 1 {
		t.Errorf("%d pieces of evidence, %v", len(list), err)
	}
}

// What nobody else could verify is told, and isn't evidence.
func TestEvidenceNeedsTheHubsRoot(t *testing.T) {
	another := bundleOf(t, embedded(t, "alpha.example"))
	for name, bundle := range map[string]*authority.Bundle{"unknown": nil, "another": another} {
		h := lyingHub(t)
		h.alice.trust.mu.Lock()
		h.alice.trust.bundles["alpha.example"] = bundle
		h.alice.trust.mu.Unlock()
		h.alice.hearAnswer(h.uri, true, codec.Marshal(h.sign(h.alice.seq+1, chain.Hash{1})))
		if f := h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultOther); f.Evidence != nil {
			t.Errorf("%s: told %+v", name, f)
		}
	}
}

func TestARestoredHubIsToldAndNotAccused(t *testing.T) {
	h := lyingHub(t)
	restored := func(told []Event, lost bool) {
		t.Helper()
		if len(told) != 1 || told[0] != (HubRestored{Room: h.uri, Seq: h.alice.seq, Lost: lost}) {
			t.Errorf("told %+v", told)
		}
	}
	h.incarnation++
	restored(h.alice.handled(h.alice.headed(h.invent())), false)
	h.incarnation++
	h.alice.chain = chain.Hash{1}
	restored(h.alice.handled(h.alice.headed(h.invent())), true)
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	if h.alice.r().HubFault() != "" {
		t.Error("accused")
	}
	// Who still is in the old incarnation claims what isn't compared.
	h.alice.quiet(h.alice.handled(h.alice.headed(h.bob.claims(chain.Claim{Place: chain.Place{Incarnation: h.incarnation - 2, Seq: h.alice.seq, Chain: chain.Hash{2}}}))))
	// It goes on as before.
	h.incarnation--
	h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultIncarnation)
}

// A hub shows one device that it was restored, and another one not.
func TestAnIncarnationThatOthersHaveSeenEndIsTold(t *testing.T) {
	h := lyingHub(t)
	h.incarnation++
	s := h.sign(h.bob.seq, chain.Hash{1})
	h.incarnation--
	forged := chain.Claim{Place: s.Place, Signature: []byte("x")}
	h.alice.quiet(h.alice.handled(h.alice.headed(h.bob.claims(forged))))
	h.alice.quiet(h.alice.handled(h.alice.next(h.bob.claims(chain.Claim{Place: s.Place, Signature: s.Signature}))))
	if f := h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultIncarnation); f.Client != h.bob.ID() {
		t.Errorf("told %+v", f)
	}
}

// What a member says isn't the hub's word.
func TestClaimsWithoutTheHubsSignatureProveNothing(t *testing.T) {
	h := lyingHub(t)
	say := func(c chain.Claim) []Event { return h.alice.handled(h.alice.headed(h.bob.claims(c))) }
	wrong := chain.Place{Incarnation: h.incarnation, Seq: h.alice.seq, Chain: chain.Hash{1}}
	h.alice.sealed("x") // claims, since a restart forgets the last time
	h.alice.quiet(say(chain.Claim{Place: wrong, Signature: []byte("not the hub's")}))
	if claimIn(t, h.alice.sealed("x")) != nil {
		t.Error("the device claims as after a contradiction")
	}
	doubt := "a member says that the hub has shown another log"
	if f := h.alice.fault(say(chain.Claim{Place: wrong}), doubt); f.Evidence != nil || f.Client != h.bob.ID() {
		t.Errorf("told %+v", f)
	}
	h.alice.quiet(say(chain.Claim{Place: wrong})) // once
	if c := claimIn(t, h.alice.sealed("x")); c == nil || len(c.Signature) == 0 {
		t.Errorf("after a doubt the claim is %+v", c)
	}
}

// A claim of a member waits for the log, the last one of each client.
func TestClaimsWaitForTheLog(t *testing.T) {
	h := lyingHub(t)
	seq := h.alice.seq + 3
	// The message is the first of three, so that its claim is of what comes later.
	s := h.sign(seq, chain.Hash{1})
	r := h.alice.r()
	r.mu.Lock()
	r.note(h.bob.ID(), &heard{Claim: chain.Claim{Place: s.Place, Signature: s.Signature}, at: seq + 1})
	r.mu.Unlock()
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent()), h.alice.headed(h.invent())))
	h.alice.proves(h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultOther), seq, seq)

	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range 2 * maxHeard {
		r.note(mimi.URI(fmt.Sprintf("mimi://alpha.example/d/%d", i)), new(heard))
	}
	if len(r.ledger.heard) != maxHeard {
		t.Errorf("%d claims wait, want %d", len(r.ledger.heard), maxHeard)
	}
}

// Messages grow by what the comment at the top says.
func TestClaimsAreFewAndSmall(t *testing.T) {
	h := lyingHub(t)
	size := func(b []byte) int {
		var f mimi.FanoutMessage
		if err := codec.Unmarshal(b, &f); err != nil {
			t.Fatal(err)
		}
		return len(codec.Marshal(f.Message))
	}
	without := h.alice.sealed("text") // both have claimed a moment ago, before a restart that forgot it
	if claimIn(t, without) == nil {
		t.Fatal("no claim after a restart")
	}
	without = h.alice.sealed("text")
	if claimIn(t, without) != nil {
		t.Error("a head is claimed at once again")
	}
	h.alice.due()
	if claimIn(t, h.alice.sealed("text")) != nil {
		t.Error("the same head is claimed twice")
	}
	var claimed []uint64
	for range 3 * claimEvery {
		m := h.alice.sealed("text")
		h.alice.handled(h.alice.headed(m))
		c := claimIn(t, m)
		if c == nil {
			continue
		}
		if claimed = append(claimed, h.alice.seq); size(m)-size(without) != 120 {
			t.Errorf("a claim has %d bytes", size(m)-size(without))
		}
	}
	if len(claimed) != 3 || claimed[1]-claimed[0] != claimEvery || claimed[2]-claimed[1] != claimEvery {
		t.Errorf("claims in the messages %v", claimed)
	}
	h.alice.due()
	if claimIn(t, h.alice.sealed("text")) == nil {
		t.Error("no claim after a while")
	}
	// The hub's key is one of ML-DSA.
	r := h.alice.r()
	r.mu.Lock()
	v := *r.ledger.verified
	v.Signature, v.Seq = make([]byte, 2420), v.Seq+claimEvery
	r.ledger.verified = &v
	r.mu.Unlock()
	h.alice.due()
	if m := h.alice.sealed("text"); claimIn(t, m) == nil || size(m)-size(without) != 54 {
		t.Errorf("a claim without signature has %d bytes", size(m)-size(without))
	}
}

// A hub that contradicts itself in each of many incarnations fills no store.
func TestEvidenceIsBounded(t *testing.T) {
	h := lyingHub(t)
	for range maxEvidence + 2 {
		h.alice.hearAnswer(h.uri, true, codec.Marshal(h.sign(h.alice.seq+1, chain.Hash{1})))
		if told := h.alice.handled(h.alice.headed(h.invent())); len(told) == 0 {
			t.Fatal("nothing was told")
		}
		h.incarnation++
		if told := h.alice.handled(h.alice.headed(h.invent())); len(told) != 1 {
			t.Fatalf("a new incarnation: %+v", told)
		}
	}
	if list, err := h.alice.Evidence(); err != nil || len(list) != maxEvidence {
		t.Errorf("%d pieces of evidence, %v", len(list), err)
	}
}

// The context that an entry of another epoch led to isn't known to who joined later, and so the chain begins anew.
func TestAnEntryOfAnEarlierEpochIsNoContradiction(t *testing.T) {
	h := lyingHub(t)
	update, err := h.alice.r().StageUpdate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var late, won mimi.UpdateRequest
	if err := codec.Unmarshal(update, &late); err != nil {
		t.Fatal(err)
	}
	if update, err = h.bob.r().StageUpdate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := codec.Unmarshal(update, &won); err != nil {
		t.Fatal(err)
	}
	for i, m := range []*mls.MLSMessage{won.Bundle.Message, late.Bundle.Message} {
		e := &api.LogEntry{Room: string(h.uri), Seq: h.alice.seq + 1 + uint64(i), Fanout: codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: m})}
		h.alice.quiet(h.alice.handled(e))
	}
	h.alice.seq += 2
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	if known, at, _ := ledgerOf(h.alice.device, h.uri); !known || at.chain != h.alice.chain {
		t.Errorf("the chain is %x", at.chain)
	}
}

// A message that is sent before the heads that came are verified has the last of them verified, or none.
func TestAClaimIsVerifiedBeforeItIsMade(t *testing.T) {
	h := lyingHub(t)
	come := func(e *api.LogEntry) *chain.Claim {
		t.Helper()
		var w waits
		var all []Event
		events := []*api.Event{{Event: &api.Event_Entry{Entry: e}}}
		if err := errors.Join(h.alice.process(t.Context(), &w, events, &all), h.alice.check(&w, events, &all), w.wait()); err != nil {
			t.Fatal(err)
		}
		h.alice.due()
		return claimIn(t, h.alice.sealed("text"))
	}
	e := h.alice.headed(h.invent())
	e.Head[len(e.Head)-1]++
	if c := come(e); c == nil || c.Seq >= e.Seq {
		t.Errorf("after a forged head the claim is %+v", c)
	}
	e = h.alice.headed(h.invent())
	if c := come(e); c == nil || c.Seq != e.Seq || c.Chain != h.alice.chain {
		t.Errorf("after a head the claim is %+v", c)
	}
}

// Nothing is asked of a hub that never signs.
func TestAHubWithoutHeadsIsTolerated(t *testing.T) {
	h := lyingHub(t)
	r := h.alice.r()
	r.mu.Lock()
	r.ledger.verified = nil
	r.mu.Unlock()
	h.alice.quiet(h.alice.events(&api.Event{Event: &api.Event_Entry{Entry: h.alice.next(h.invent())}}, live()))
	h.alice.hearAnswer(h.uri, true, nil)
	h.alice.quiet(h.alice.handled(h.alice.next(h.invent())))
	if m := h.alice.sealed("x"); claimIn(t, m) != nil {
		t.Error("a claim of nothing")
	}
	// The first head that comes has to fit what came before.
	r.mu.Lock()
	r.ledger.chain[0]++
	r.mu.Unlock()
	h.alice.fault(h.alice.handled(h.alice.headed(h.invent())), faultOther)
}

// A device that doesn't know the chain, such as one of an earlier release, begins with what the node says of it, which the
// next head proves, or with that head.
func TestAChainBeginsWithTheFirstEntryOfAStream(t *testing.T) {
	h := lyingHub(t)
	r := h.alice.r()
	forget := func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.forgetChain()
		r.ledger.verified = nil
	}
	forget()
	previous := h.alice.chain
	e := h.alice.next(h.invent())
	e.Previous = previous[:]
	h.alice.quiet(h.alice.handled(e, h.alice.headed(h.invent())))
	if known, at, v := ledgerOf(h.alice.device, h.uri); !known || v == nil || v.Seq != h.alice.seq || at.chain != h.alice.chain {
		t.Errorf("the chain is %x, the head %+v", at.chain, v)
	}
	forget()
	h.alice.quiet(h.alice.handled(h.alice.next(h.invent()), h.alice.headed(h.invent())))
	h.alice.quiet(h.alice.handled(h.alice.headed(h.invent())))
	if known, at, v := ledgerOf(h.alice.device, h.uri); !known || v == nil || v.Seq != h.alice.seq || at.chain != h.alice.chain {
		t.Errorf("from a head on, the chain is %x, the head %+v", at.chain, v)
	}
	forget()
	e = h.alice.headed(h.invent())
	e.Previous = make([]byte, 32)
	h.alice.fault(h.alice.handled(e), faultOther)
}

// A node whose live stream has no heads for long has to show one when the stream begins anew.
func TestAStreamWithoutHeadsIsBegunAnew(t *testing.T) {
	h := lyingHub(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.alice.mu.Lock()
	h.alice.Client.restart = cancel
	h.alice.mu.Unlock()
	r := h.alice.r()
	r.mu.Lock()
	r.ledger.unsigned = maxUnsigned - 1
	r.mu.Unlock()
	h.alice.handled(h.alice.next(h.invent()))
	if ctx.Err() != nil {
		t.Error("before it is live")
	}
	close(h.alice.live)
	h.alice.handled(h.alice.next(h.invent()))
	if ctx.Err() == nil {
		t.Error("the stream goes on")
	}
}

// An answer's head reaches the room.
func TestHeadsOfAnswersAreHeard(t *testing.T) {
	p := providers(t, "alpha")
	alice, f := p[0].enrolFaulty("alice", "alice-laptop")
	room := alice.create()
	alice.say(room.URI(), "one")
	verifies(t, room.URI(), alice)
	events := alice.Events()
	f.set(func(f *faults) {
		f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			resp, err := f.ClientServiceClient.SubmitMessage(ctx, req)
			if err == nil {
				resp.Msg.Head = nil
			}
			return resp, err
		}
	})
	alice.say(room.URI(), "two")
	alice.say(room.URI(), "three")
	for e := range events {
		if f, ok := e.(HubFault); ok {
			if f.Reason != faultUnsigned {
				t.Errorf("told %+v", f)
			}
			return
		}
	}
}
