package node

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
)

// liar is a hub under the test's control: alpha's, with its keys, beside what alpha's node does by itself.
type liar struct {
	t           *testing.T
	alpha, beta *testNode
	room        mimi.URI
	incarnation uint64
	last        uint64 // the number of the last entry that both know
	texts       int
}

// lying is a room of alpha's with some entries, which beta follows.
func lying(t *testing.T) *liar {
	t.Helper()
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	l := &liar{t: t, alpha: alpha, beta: beta, room: alice.room, incarnation: alpha.incarnation}
	for range 3 {
		l.last = alice.send("x")
	}
	alices.until(func() bool { return alice.seq >= l.last })
	bobs.until(func() bool { return bob.seq >= l.last })
	return l
}

// chainAt is the chain that alpha has at an entry.
func (l *liar) chainAt(seq uint64) linkRecord {
	l.t.Helper()
	k := must(l.alpha.linkAt(l.room, seq))(l.t)
	if k == nil {
		l.t.Fatalf("alpha has no chain at %d", seq)
	}
	return *k
}

// invent makes a message that isn't in any log.
func (l *liar) invent() []byte {
	l.texts++
	return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: mls.NewMLSMessage(&mls.PrivateMessage{
		GroupID: []byte(l.room.Group()), Epoch: 1, ContentType: mls.ContentApplication, EncryptedSenderData: []byte("x"), Ciphertext: fmt.Appendf(nil, "%d", l.texts),
	})})
}

func (l *liar) sign(seq uint64, h chain.Hash) *chain.Signed {
	l.t.Helper()
	signer, _, err := l.alpha.keys.hub(testSuite)
	if err != nil {
		l.t.Fatal(err)
	}
	return must(chain.Sign(rand.Reader, signer, chain.Head{Room: l.room, Suite: testSuite, Place: chain.Place{Incarnation: l.incarnation, Seq: seq, Chain: h}}))(l.t)
}

// tell makes a request to notify of entries from first on, which follow previous, and returns the chain at their end.
func (l *liar) tell(first uint64, previous chain.Hash, fanouts ...[]byte) ([]federation.Sequenced, chain.Hash) {
	l.t.Helper()
	context := l.chainAt(l.last).context
	var msgs []federation.Sequenced
	var links []chain.Link
	for i, f := range fanouts {
		msgs = append(msgs, federation.Sequenced{Seq: first + uint64(i), Fanout: f})
		links = append(links, chain.NewLink(f, context))
	}
	end := previous.Fold(first-1, links)
	n := chain.Notice{Signed: *l.sign(first+uint64(len(fanouts))-1, end), Previous: previous, Contexts: []chain.Hash{context}}
	msgs[len(msgs)-1].Head = codec.Marshal(n)
	return msgs, end
}

func (l *liar) notify(msgs []federation.Sequenced) error {
	return provider{l.beta.Node}.Notify(l.t.Context(), l.alpha.cfg.Domain, l.room, msgs)
}

// notified fails the test unless beta takes it.
func (l *liar) notified(msgs []federation.Sequenced, _ chain.Hash) {
	l.t.Helper()
	if err := l.notify(msgs); err != nil {
		l.t.Fatal(err)
	}
}

// refused fails the test unless beta refuses it with that code and nothing changes.
func (l *liar) refused(what string, msgs []federation.Sequenced, code string) {
	l.t.Helper()
	before := dump(l.t, l.beta.Node)
	if e := reason(l.notify(msgs)); e == nil || e.code != code {
		l.t.Errorf("%s: %v", what, e)
	}
	for k, v := range dump(l.t, l.beta.Node) {
		if before[k] != v {
			l.t.Errorf("%s: it changed %q", what, k)
		}
	}
}

// evidence returns what beta has, verified as a third party does.
func (l *liar) evidence() []*chain.Evidence {
	l.t.Helper()
	list, err := DialAdmin(l.beta.cfg.Socket()).Evidence(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	var out []*chain.Evidence
	for _, s := range list {
		e := must(chain.ParseFile(s.File))(l.t)
		b, err := e.Verify()
		if err != nil {
			l.t.Fatal(err)
		}
		if b.Fingerprints()[0] != l.alpha.root || e.First.Room != l.room {
			l.t.Errorf("evidence about %s of the root %s", e.First.Room, b.Fingerprints()[0])
		}
		out = append(out, e)
	}
	return out
}

func (l *liar) accused(first, second uint64) {
	l.t.Helper()
	list := l.evidence()
	if len(list) != 1 || list[0].First.Seq != first || list[0].Second.Seq != second {
		l.t.Errorf("evidence %+v, want that of %d and %d", list, first, second)
	}
	text := must(DialAdmin(l.beta.cfg.Socket()).Metrics(l.t.Context()))(l.t)
	if !strings.Contains(text, "parley_evidence_total 1") {
		l.t.Error("the contradiction isn't counted once")
	}
}

func (l *liar) restart() {
	l.t.Helper()
	l.beta.stop()
	l.beta.start()
}

func TestAFollowerHasTheChainOfTheHub(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	alice.send("one")
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	bob.send("two")
	proposal := must(alice.group.Propose(nil, nil, listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: "mimi://alpha.example/u/carol", Role: mimi.RoleMember}}})))(t)
	_, seq, err := alice.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: proposal}})
	if err != nil {
		t.Fatal(err)
	}
	alices.until(func() bool { return alice.seq >= seq })
	// Several commits in one request, after a while without the follower.
	beta.stop()
	for range 3 {
		seq = alice.commit()
		alices.until(func() bool { return alice.seq >= seq })
		seq = alice.send("while beta is down")
	}
	beta.start()
	r := must(beta.openRoom(alice.room))(t)
	eventually(t, func() error {
		if d := r.durable.Load(); d < seq {
			return fmt.Errorf("beta has %d of %d entries", d, seq)
		}
		return nil
	})
	first := uint64(0)
	for s := uint64(1); s <= seq; s++ {
		ours, theirs := must(alpha.linkAt(alice.room, s))(t), must(beta.linkAt(alice.room, s))(t)
		if theirs == nil {
			continue
		}
		if first = max(first, 1); *ours != *theirs {
			t.Errorf("entry %d: the hub has %x, the follower %x", s, *ours, *theirs)
		}
	}
	if h := r.heads.last.Load(); first == 0 || h == nil || h.Seq != seq {
		t.Errorf("the follower's head is %+v", h)
	}
	if list := must(beta.listEvidence())(t); len(list) != 0 {
		t.Errorf("an honest hub is accused: %+v", list)
	}
}

// A client that connects is given the log up to a head, or it would have to think that the hub signs no more.
func TestAStreamBeginsWithAHeadThoughItsEntryHasJustCome(t *testing.T) {
	_, beta, alice, bob, _, bobs := twoNodes(t)
	alice.send("one")
	seq := alice.send("two")
	bobs.until(func() bool { return bob.seq >= seq })
	r := must(beta.openRoom(alice.room))(t)
	r.durable.Store(seq - 1) // as between the two steps that make a change seen
	st := &stream{n: beta.Node, cursors: map[mimi.URI]*cursor{alice.room: {next: seq - 1}}}
	if err := st.sendRoom(t.Context(), alice.room); err != nil {
		t.Fatal(err)
	}
	if n := len(st.batch); n != 2 || st.batch[n-1].GetEntry().Head == nil {
		t.Errorf("%d entries, want 2 of which the last one has a head", n)
	}
}

func TestAHubThatRewritesAnEntryIsAccused(t *testing.T) {
	l := lying(t)
	seq := l.last - 1
	before := must(l.beta.entry(l.room, seq))(t)
	l.notified(l.tell(seq, l.chainAt(seq-1).chain, l.invent()))
	l.accused(seq, l.last)
	if after := must(l.beta.entry(l.room, seq))(t); after.Timestamp != before.Timestamp {
		t.Error("the entry was replaced")
	}
}

// TestAHubThatShowsAnotherHistoryIsAccused has a hub go on from a log with another last entry than the follower's.
func TestAHubThatShowsAnotherHistoryIsAccused(t *testing.T) {
	l := lying(t)
	l.restart() // what the follower knows is in its store
	other := l.chainAt(l.last-1).chain.Next(l.last, chain.NewLink(l.invent(), chain.Hash{}))
	msgs, end := l.tell(l.last+1, other, l.invent(), l.invent())
	l.notified(msgs, end)
	l.accused(l.last, l.last+2)
	// The fork is one contradiction, however long it goes on.
	l.notified(l.tell(l.last+3, end, l.invent()))
	l.accused(l.last, l.last+2)
}

// TestAHubThatRollsBackIsAccused has the answer to a request say that the log is shorter, and another.
func TestAHubThatRollsBackIsAccused(t *testing.T) {
	l := lying(t)
	h := l.chainAt(l.last-2).chain.Next(l.last-1, chain.NewLink(l.invent(), chain.Hash{}))
	l.beta.sawHead(l.alpha.cfg.Domain, l.room, codec.Marshal(l.sign(l.last-1, h)))
	l.accused(l.last-1, l.last)
	// A shorter log that is the beginning of the longer one contradicts nothing.
	l.beta.sawHead(l.alpha.cfg.Domain, l.room, codec.Marshal(l.sign(l.last-2, l.chainAt(l.last-2).chain)))
	l.accused(l.last-1, l.last)
}

func TestAHubWhoseAnswerAndLogDifferIsAccused(t *testing.T) {
	l := lying(t)
	previous := l.chainAt(l.last).chain
	l.beta.sawHead(l.alpha.cfg.Domain, l.room, codec.Marshal(l.sign(l.last+1, chain.Hash{1})))
	if len(l.evidence()) != 0 {
		t.Fatal("accused before the entry came")
	}
	msgs, end := l.tell(l.last+1, previous, l.invent(), l.invent())
	l.notified(msgs, end)
	l.accused(l.last+1, l.last+2)

	// Two answers at one number.
	m := lying(t)
	for i := range byte(2) {
		m.beta.sawHead(m.alpha.cfg.Domain, m.room, codec.Marshal(m.sign(m.last+5, chain.Hash{i})))
	}
	m.accused(m.last+5, m.last+5)
}

// TestARestoredHubIsNotAccused has the hub go on from an older copy, in a new incarnation; the old one is fenced.
func TestARestoredHubIsNotAccused(t *testing.T) {
	l := lying(t)
	old := *l
	l.incarnation++
	first, end := l.tell(l.last, l.chainAt(l.last-1).chain, l.invent())
	l.notified(first, end)
	anew := end
	second, end := l.tell(l.last+1, end, l.invent())
	l.notified(second, end)
	third, end := l.tell(l.last+2, end, l.invent())
	l.notified(third, end)
	// The entry of the new incarnation took the place of the one from before.
	l.beta.sawHead(l.alpha.cfg.Domain, l.room, codec.Marshal(l.sign(l.last, anew)))
	if c := must(l.beta.linkAt(l.room, l.last))(t).chain; c != anew {
		t.Errorf("the chain at entry %d is that of the time before", l.last)
	}
	if list := l.evidence(); len(list) != 0 {
		t.Errorf("accused: %+v", list)
	}
	msgs, _ := old.tell(l.last+3, end, old.invent())
	l.refused("a head of the old incarnation", msgs, "notAllowed")
	if e := reason(l.beta.sawHead(l.alpha.cfg.Domain, l.room, codec.Marshal(old.sign(l.last+3, chain.Hash{1})))); e == nil || e.code != "unavailable" {
		t.Errorf("an answer of the old incarnation: %v", e)
	}
	// From there on it is held to its word again, also about the numbers that it has given again.
	l.beta.sawHead(l.alpha.cfg.Domain, l.room, codec.Marshal(l.sign(l.last, chain.Hash{1})))
	l.accused(l.last, l.last+2)
}

// TestTheSameLogInANewIncarnationGoesOn has a restored hub that has lost nothing.
func TestTheSameLogInANewIncarnationGoesOn(t *testing.T) {
	l := lying(t)
	l.incarnation++
	msgs, end := l.tell(l.last+1, l.chainAt(l.last).chain, l.invent())
	l.notified(msgs, end)
	if list := l.evidence(); len(list) != 0 {
		t.Errorf("accused: %+v", list)
	}
	l.notified(l.tell(l.last-1, l.chainAt(l.last-2).chain, l.invent()))
	l.accused(l.last-1, l.last+1)
}

func TestHeadsThatDoNotFitTheirRequestAreRefused(t *testing.T) {
	l := lying(t)
	previous := l.chainAt(l.last).chain
	notice := func(edit func(n *chain.Notice)) []federation.Sequenced {
		msgs, _ := l.tell(l.last+1, previous, l.invent(), l.invent())
		n := new(chain.Notice)
		if err := codec.Unmarshal(msgs[1].Head, n); err != nil {
			t.Fatal(err)
		}
		edit(n)
		msgs[1].Head = codec.Marshal(n)
		return msgs
	}
	another := must(testSuite.GenerateSignatureKey(rand.Reader))(t)
	for name, tt := range map[string]struct {
		msgs []federation.Sequenced
		code string
	}{
		"no head":               {[]federation.Sequenced{{Seq: l.last + 1, Fanout: l.invent()}}, "notAllowed"},
		"no head and no number": {[]federation.Sequenced{{Fanout: l.invent()}}, "notAllowed"},
		"no notice":             {[]federation.Sequenced{{Seq: l.last + 1, Fanout: l.invent(), Head: []byte("x")}}, "malformed"},
		"another chain":         {notice(func(n *chain.Notice) { n.Signed = *l.sign(n.Seq, chain.Hash{}) }), "malformed"},
		"another number":        {notice(func(n *chain.Notice) { n.Signed = *l.sign(n.Seq+1, n.Chain) }), "malformed"},
		"another start":         {notice(func(n *chain.Notice) { n.Previous[0]++ }), "malformed"},
		"another context":       {notice(func(n *chain.Notice) { n.Contexts[0][0]++ }), "malformed"},
		"a context too many":    {notice(func(n *chain.Notice) { n.Contexts = append(n.Contexts, chain.Hash{}) }), "malformed"},
		"a changed signature":   {notice(func(n *chain.Notice) { n.Signature[0]++ }), "malformed"},
		"another room": {notice(func(n *chain.Notice) {
			h := n.Head
			h.Room += "2"
			signer, _, _ := l.alpha.keys.hub(testSuite)
			n.Signed = *must(chain.Sign(rand.Reader, signer, h))(t)
		}), "malformed"},
		"another key":           {notice(func(n *chain.Notice) { n.Signed = *must(chain.Sign(rand.Reader, another, n.Head))(t) }), "malformed"},
		"a suite without a key": {notice(func(n *chain.Notice) { n.Suite = 0xffff }), "malformed"},
		"an entry left out": {func() []federation.Sequenced {
			msgs := notice(func(*chain.Notice) {})
			msgs[0].Seq--
			return msgs
		}(), "malformed"},
		"a number out of order": {func() []federation.Sequenced {
			msgs := notice(func(*chain.Notice) {})
			msgs[1].Seq += 3
			return msgs
		}(), "malformed"},
		"entries without numbers": {func() []federation.Sequenced {
			msgs := notice(func(*chain.Notice) {})
			msgs[0].Seq, msgs[1].Seq = 0, 0
			return msgs
		}(), "malformed"},
	} {
		l.refused(name, tt.msgs, tt.code)
	}
	// What is refused doesn't stand in the way of what is right.
	l.notified(l.tell(l.last+1, previous, l.invent()))
	if list := l.evidence(); len(list) != 0 {
		t.Errorf("accused: %+v", list)
	}
}

// TestAHeadOfAnUnknownKeyWaitsForTheHub: what can't be verified is refused for now, and comes again.
func TestAHeadOfAnUnknownKeyWaitsForTheHub(t *testing.T) {
	l := lying(t)
	hash := sha256.Sum256(must(l.beta.hubKeys.of(l.beta.store, l.alpha.cfg.Domain))(t)[0].SignatureKey)
	if _, err := l.beta.store.Commit(map[string][]byte{string(key(prefixHubKey, mimi.URI(l.alpha.cfg.Domain), hash[:])): nil}, nil); err != nil {
		t.Fatal(err)
	}
	l.beta.hubKeys.mu.Lock()
	clear(l.beta.hubKeys.known)
	l.beta.hubKeys.mu.Unlock()
	msgs, _ := l.tell(l.last+1, l.chainAt(l.last).chain, l.invent())
	l.alpha.stop()
	l.refused("with the hub down", msgs, "unavailable")
	l.alpha.start()
	eventually(t, func() error { return l.notify(msgs) })
}

// TestEvidenceIsBounded has a hub contradict itself many times.
func TestEvidenceIsBounded(t *testing.T) {
	l := lying(t)
	for range maxEvidence + 4 {
		l.notified(l.tell(l.last, l.chainAt(l.last-1).chain, l.invent()))
	}
	if n := len(l.evidence()); n != maxEvidence {
		t.Errorf("%d pieces of evidence, want %d", n, maxEvidence)
	}
}
