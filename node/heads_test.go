package node

import (
	"bytes"
	"slices"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

func TestLogsOfTheFirstFormatGetTheirChain(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const ours, empty, theirs = mimi.URI("mimi://alpha.example/r/ours"), mimi.URI("mimi://alpha.example/r/empty"), mimi.URI("mimi://beta.example/r/theirs")
	old := map[string][]byte{
		keyVersion:                              {1},
		string(roomKey(ours)):                   codec.Marshal(roomRecord{hosted: true, last: 2}),
		string(roomKey(empty)):                  codec.Marshal(roomRecord{hosted: true}),
		string(roomKey(theirs)):                 codec.Marshal(roomRecord{last: 1}),
		string(key(prefixLog, ours, be64(1))):   []byte("one"),
		string(key(prefixLog, ours, be64(2))):   []byte("two"),
		string(key(prefixLog, theirs, be64(1))): []byte("one"),
	}
	if _, err := s.Commit(old, nil); err != nil {
		t.Fatal(err)
	}
	want := codec.Marshal(linkRecord{chain: chain.Start(ours).Fold(0, []chain.Link{chain.NewLink([]byte("one"), chain.Hash{}), chain.NewLink([]byte("two"), chain.Hash{})})})
	for range 2 { // the second time as after a crash before the last step
		if err := checkFormat(s); err != nil {
			t.Fatal(err)
		}
		if v := must(s.Get([]byte(keyVersion)))(t); !bytes.Equal(v, []byte{formatVersion}) {
			t.Errorf("the store has format %x", v)
		}
		links := make(map[string][]byte)
		if err := store.ScanPrefix(s, []byte(prefixLink), func(k, v []byte) bool {
			links[prefixLink+string(k)] = bytes.Clone(v)
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if len(links) != 1 || !bytes.Equal(links[string(linkKey(ours, 2))], want) {
			t.Errorf("links %x", links)
		}
		if _, err := s.Commit(map[string][]byte{keyVersion: {1}}, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnIncarnationLastsUntilItIsRenewed(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	first := must(openIncarnation(s))(t)
	if again := must(openIncarnation(s))(t); first == 0 || again != first {
		t.Errorf("incarnation %d, then %d", first, again)
	}
	// A clock that was put back makes no earlier one.
	if _, err := s.Commit(map[string][]byte{keyIncarnation: be64(first + 1<<50)}, nil); err != nil {
		t.Fatal(err)
	}
	if next := must(renewIncarnation(s))(t); next != first+1<<50+1 || must(openIncarnation(s))(t) != next {
		t.Errorf("incarnation %d after %d", next, first+1<<50)
	}
}

// tracker computes the chain of a room as a client does, from what a stream gives, and verifies the heads in it.
type tracker struct {
	t     *testing.T
	c     *testClient
	key   []byte
	seq   uint64
	chain chain.Hash
	heads []*chain.Signed
	begun []uint64 // entries with the chain before them
}

func (k *tracker) verified(b []byte) *chain.Signed {
	k.t.Helper()
	s := new(chain.Signed)
	if err := codec.Unmarshal(b, s); err != nil {
		k.t.Fatal(err)
	}
	if err := s.Verify(k.key); err != nil {
		k.t.Fatal(err)
	}
	if s.Room != k.c.room || s.Suite != testSuite {
		k.t.Errorf("a head of %s, %v", s.Room, s.Suite)
	}
	return s
}

// event is testClient.process with the chain.
func (k *tracker) event(ev *api.Event) {
	k.t.Helper()
	k.c.process(ev)
	e := ev.GetEntry()
	if e == nil {
		return
	}
	if e.Previous != nil {
		if k.begun = append(k.begun, e.Seq); !bytes.Equal(e.Previous, k.chain[:]) {
			k.t.Errorf("before entry %d the chain is %x, not %x", e.Seq, k.chain, e.Previous)
		}
	}
	k.seq++
	k.chain = k.chain.Next(e.Seq, chain.NewLink(e.Fanout, chain.ContextOf(k.c.group.Context())))
	if e.Head == nil {
		return
	}
	s := k.verified(e.Head)
	k.heads = append(k.heads, s)
	if s.Seq != k.seq || s.Chain != k.chain {
		k.t.Errorf("head %d with %x, computed %d with %x", s.Seq, s.Chain, k.seq, k.chain)
	}
}

func TestAHubSignsTheHeadOfItsLog(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	room := alice.createRoom()
	_, sender, err := n.keys.hub(testSuite)
	if err != nil {
		t.Fatal(err)
	}
	k := &tracker{t: t, c: alice, key: sender.SignatureKey, chain: chain.Start(room)}
	stream := alice.subscribe()
	until := func(seq uint64) {
		for k.seq < seq {
			k.event(stream.next())
		}
	}
	submit := func(req *mimi.SubmitMessageRequest) (head *chain.Signed, seq uint64) {
		resp, err := alice.api.SubmitMessage(t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(room), Body: codec.Marshal(req)}))
		if err != nil {
			t.Fatal(err)
		}
		return k.verified(resp.Msg.Head), resp.Msg.Seq
	}
	for range 3 {
		sealed := alice.seal("text")
		head, seq := submit(sealed)
		until(seq)
		if head.Seq != seq || head.Chain != k.chain || head.Incarnation != n.incarnation {
			t.Errorf("the answer to message %d has head %+v", seq, head)
		}
		if again, _ := submit(sealed); again.Place != head.Place {
			t.Errorf("the same message again has head %+v", again)
		}
	}
	seq := alice.commit()
	until(seq)
	proposal := must(alice.group.Propose(nil, nil, listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: "mimi://alpha.example/u/bob", Role: mimi.RoleMember}}})))(t)
	resp, seq, err := alice.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: proposal}})
	if err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatal(resp, err)
	}
	until(seq)
	if len(k.heads) != 5 || k.heads[4].Seq != seq {
		t.Errorf("%d heads with %d entries", len(k.heads), seq)
	}

	// The chain goes on after a restart, in the same incarnation.
	incarnation := n.incarnation
	n.stop()
	n.start()
	if n.incarnation != incarnation {
		t.Errorf("incarnation %d, then %d", incarnation, n.incarnation)
	}
	alice.authenticate()
	stream = alice.subscribe()
	seq = alice.commit()
	until(seq)
	if !slices.Equal(k.begun, []uint64{1, seq}) {
		t.Errorf("the chain before the entries %v", k.begun)
	}
	if last := k.heads[len(k.heads)-1]; last.Seq != seq || last.Incarnation != incarnation {
		t.Errorf("the last head is %+v", last)
	}
}

func TestRefusalsHaveNoHead(t *testing.T) {
	n, laptop, _, _, _ := twoDevices(t)
	eve := newClient(t, n, "eve", "eve-laptop")
	message := laptop.seal("x")
	message.Sender = eve.user
	resp, err := eve.api.SubmitMessage(t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(laptop.room), Body: codec.Marshal(message)}))
	if err != nil || resp.Msg.Head != nil {
		t.Errorf("head %x, %v", resp.Msg.Head, err)
	}
}

// TestRequestsOfOneSyncShareASignature: heads cost by syncs, not by messages.
func TestRequestsOfOneSyncShareASignature(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createRoom()
	for range 5 {
		alice.send("x")
	}
	r := must(n.hostedRoom(alice.room))(t)
	first := must(n.head(r, 3))(t)
	if first.Seq != 5 {
		t.Errorf("the head for entry 3 is at %d, the log is on disk up to 5", first.Seq)
	}
	for seq := range uint64(5) {
		if h := must(n.head(r, seq+1))(t); h != first {
			t.Errorf("another signature for entry %d", seq+1)
		}
	}
	if h := must(n.headAt(r, 2))(t); h.Seq != 2 {
		t.Errorf("the head of entry 2 is at %d", h.Seq)
	}
}

// TestAStreamKeepsAHeadUntilItsEntryIsSent: under load there is always a later one.
func TestAStreamKeepsAHeadUntilItsEntryIsSent(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createRoom()
	for range 5 {
		alice.send("x")
	}
	st := &stream{n: n.Node, cursors: map[mimi.URI]*cursor{alice.room: {next: 1, end: 3}}}
	for range 2 { // the second time with more entries, and a head at the last of them
		if err := st.sendRoom(t.Context(), alice.room); err != nil {
			t.Fatal(err)
		}
		alice.send("y")
		st.cursors[alice.room].end = 6
	}
	var headed []uint64
	for _, ev := range st.batch {
		if e := ev.GetEntry(); e.Head != nil {
			headed = append(headed, e.Seq)
		}
	}
	if len(st.batch) != 6 || !slices.Equal(headed, []uint64{5}) {
		t.Errorf("%d entries, heads with %v", len(st.batch), headed)
	}
}
