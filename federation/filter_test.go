package federation

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/memberlist"
	"github.com/parley-mls/parley/transport"

	mls "github.com/parley-mls/parley/mls/codec"
)

// testFilter is alpha's, with beta (record 5) and gamma (record 9) approved. mallory is the TLS peer gamma.
func testFilter(t testing.TB) (f *filter, reasons *[]string) {
	f = newFilter("alpha.example")
	reasons = new([]string)
	f.dropped = func(_, reason string) { *reasons = append(*reasons, reason) }
	f.approve("alpha.example", 3)
	f.approve("beta.example", 5)
	f.approve("gamma.example", 9)
	return f, reasons
}

func encode(t testing.TB, kind byte, m any) []byte {
	t.Helper()
	b, err := encodeGossip(kind, m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func aliveOf(domain string, record uint64, refutes uint32) *wireAlive {
	return &wireAlive{
		Incarnation: incarnationOf(record) + refutes, Node: domain, Addr: memberIP(domain), Port: memberPort, Vsn: memberVersion,
	}
}

func TestFilterJudgesPacketsOfAnAuthenticatedPeer(t *testing.T) {
	const peer = "gamma.example"
	beta, gamma, self := incarnationOf(5), incarnationOf(9), incarnationOf(3)
	change := func(a *wireAlive, f func(*wireAlive)) *wireAlive { f(a); return a }
	for name, tt := range map[string]struct {
		kind byte
		m    any
		ok   bool
	}{
		"alive of itself":                        {msgAlive, aliveOf(peer, 9, 1), true},
		"alive of itself far ahead":              {msgAlive, aliveOf(peer, 9, 2000), true},
		"alive relayed":                          {msgAlive, aliveOf("beta.example", 5, 1), true},
		"alive of a stranger":                    {msgAlive, aliveOf("delta.example", 1, 1), false},
		"alive under a record never signed":      {msgAlive, aliveOf("beta.example", 6, 1), false},
		"alive under an old record":              {msgAlive, aliveOf("beta.example", 4, 1), false},
		"alive at the highest incarnation":       {msgAlive, change(aliveOf("beta.example", 5, 0), func(a *wireAlive) { a.Incarnation = 1<<32 - 1 }), false},
		"alive at the record's last incarnation": {msgAlive, aliveOf("beta.example", 5, refuteMask), false},
		"address takeover":                       {msgAlive, change(aliveOf("beta.example", 5, 1), func(a *wireAlive) { a.Addr = memberIP(peer) }), false},
		"port takeover":                          {msgAlive, change(aliveOf("beta.example", 5, 1), func(a *wireAlive) { a.Port = 4443 }), false},
		"alive with metadata":                    {msgAlive, change(aliveOf("alpha.example", 3, 1), func(a *wireAlive) { a.Meta = []byte(renewMeta) }), false},
		"alive of incompatible version":          {msgAlive, change(aliveOf("beta.example", 5, 1), func(a *wireAlive) { a.Vsn = []uint8{9, 9, 9, 0, 0, 0} }), false},
		"alive without version":                  {msgAlive, change(aliveOf("beta.example", 5, 1), func(a *wireAlive) { a.Vsn = nil }), false},
		"alive of this node, echoed":             {msgAlive, aliveOf("alpha.example", 3, 1), true},
		"alive of this node, ahead":              {msgAlive, aliveOf("alpha.example", 3, 2), false},

		"removal":                               {msgDead, &wireDead{beta, "beta.example", peer}, false},
		"removal for good":                      {msgDead, &wireDead{1<<32 - 1, "beta.example", peer}, false},
		"removal in the victim's name":          {msgDead, &wireDead{beta, "beta.example", "beta.example"}, false},
		"removal of this node, to be refuted":   {msgDead, &wireDead{self + 1, "alpha.example", peer}, true},
		"removal of this node for good":         {msgDead, &wireDead{1<<32 - 1, "alpha.example", peer}, false},
		"good-bye":                              {msgDead, &wireDead{gamma, peer, peer}, true},
		"good-bye under another record":         {msgDead, &wireDead{incarnationOf(10), peer, peer}, false},
		"good-bye in another's name":            {msgDead, &wireDead{gamma, peer, "beta.example"}, false},
		"suspicion":                             {msgSuspect, &wireDead{beta, "beta.example", peer}, true},
		"suspicion ahead of what was heard":     {msgSuspect, &wireDead{beta + 1, "beta.example", peer}, false},
		"suspicion in another's name":           {msgSuspect, &wireDead{beta, "beta.example", "delta.example"}, false},
		"suspicion of a stranger":               {msgSuspect, &wireDead{0, "delta.example", peer}, false},
		"suspicion of this node, relayed":       {msgSuspect, &wireDead{self + 1, "alpha.example", "beta.example"}, true},
		"suspicion of this node, ahead":         {msgSuspect, &wireDead{self + 2, "alpha.example", peer}, false},
		"ping":                                  {msgPing, &wirePing{SeqNo: 7, Node: "alpha.example", SourceNode: peer}, true},
		"ping of another":                       {msgPing, &wirePing{SeqNo: 7, Node: "beta.example", SourceNode: peer}, false},
		"ping with replies to a third":          {msgPing, &wirePing{SeqNo: 7, Node: "alpha.example", SourceNode: "beta.example"}, false},
		"ping without a name":                   {msgPing, &wirePing{SeqNo: 7, Node: "alpha.example"}, false},
		"indirect ping":                         {msgIndirectPing, &wireIndirectPing{SeqNo: 7, Node: "beta.example", SourceNode: peer}, true},
		"indirect ping of a stranger":           {msgIndirectPing, &wireIndirectPing{SeqNo: 7, Node: "delta.example", SourceNode: peer}, false},
		"indirect ping with replies to a third": {msgIndirectPing, &wireIndirectPing{SeqNo: 7, Node: "beta.example", SourceNode: "beta.example"}, false},
		"ack":                                   {msgAck, &wireAck{SeqNo: 7, Payload: []byte("x")}, true},
		"nack":                                  {msgNack, &wireNack{SeqNo: 7}, true},
		"user message":                          {8, &wireNack{}, false},
		"compressed":                            {9, &wireNack{}, false},
		"encrypted":                             {10, &wireNack{}, false},
		"labelled":                              {244, &wireNack{}, false},
		"nested compound":                       {msgCompound, &wireNack{}, false},
	} {
		f, reasons := testFilter(t)
		b := encode(t, tt.kind, tt.m)
		crc := binary.BigEndian.AppendUint32([]byte{msgCRC}, crc32.ChecksumIEEE(b))
		out := [][]byte{f.packet(peer, joinCompound([][]byte{b}))}
		if tt.kind != msgCompound {
			f2, _ := testFilter(t)
			f3, _ := testFilter(t)
			out = append(out, f2.packet(peer, b), f3.packet(peer, append(crc, b...)))
		}
		for i, o := range out {
			if (o != nil) != tt.ok {
				t.Errorf("%s, form %d: passed %t, want %t: %v", name, i, o != nil, tt.ok, *reasons)
			}
		}
	}
}

func TestFilterDirectsRepliesToTheSender(t *testing.T) {
	f, _ := testFilter(t)
	b := f.packet("gamma.example", encode(t, msgPing, &wirePing{
		SeqNo: 7, Node: "alpha.example", SourceNode: "gamma.example", SourceAddr: []byte{192, 0, 2, 1}, SourcePort: 53,
	}))
	var p wirePing
	if err := codec.NewDecoderBytes(b[1:], new(codec.MsgpackHandle)).Decode(&p); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p.SourceAddr, memberIP("gamma.example")) || p.SourcePort != memberPort || p.SeqNo != 7 {
		t.Errorf("the reply would go to %v:%d", p.SourceAddr, p.SourcePort)
	}
}

func TestFilterKeepsTheGoodPartsOfACompound(t *testing.T) {
	f, reasons := testFilter(t)
	good := encode(t, msgAlive, aliveOf("beta.example", 5, 1))
	bad := encode(t, msgDead, &wireDead{incarnationOf(5), "beta.example", "gamma.example"})
	out := f.packet("gamma.example", joinCompound([][]byte{bad, good, bad}))
	if want := joinCompound([][]byte{good}); !bytes.Equal(out, want) {
		t.Errorf("got %x, want %x", out, want)
	}
	if len(*reasons) != 2 {
		t.Errorf("dropped %v", *reasons)
	}
	for name, b := range map[string][]byte{
		"empty":          {},
		"no count":       {msgCompound},
		"short lengths":  {msgCompound, 2, 0, 1},
		"short part":     {msgCompound, 1, 0, 9, msgNack},
		"empty part":     {msgCompound, 1, 0, 0},
		"wrong checksum": append([]byte{msgCRC, 1, 2, 3, 4}, good...),
		"nothing inside": {msgCRC, 0, 0, 0, 0},
	} {
		if out := f.packet("gamma.example", b); out != nil {
			t.Errorf("%s: %x passed", name, out)
		}
	}
}

func TestThirdPartiesAdvanceAnIncarnationInSmallSteps(t *testing.T) {
	f, _ := testFilter(t)
	pass := func(peer string, m *wireAlive) bool { return f.packet(peer, encode(t, msgAlive, m)) != nil }
	if !pass("gamma.example", aliveOf("beta.example", 5, maxJump)) || pass("gamma.example", aliveOf("beta.example", 5, 2*maxJump+1)) {
		t.Error("steps of a third party aren't bounded")
	}
	if !pass("beta.example", aliveOf("beta.example", 5, 1000)) || !pass("gamma.example", aliveOf("beta.example", 5, 1001)) {
		t.Error("the node's own word doesn't count")
	}
	// A new record starts anew, and ends the old one's.
	f.approve("beta.example", 6)
	if !pass("gamma.example", aliveOf("beta.example", 6, 1)) || pass("beta.example", aliveOf("beta.example", 5, 1002)) {
		t.Error("the new record isn't followed")
	}
}

func TestAccusationsAreRationedAndLeadToANewRecord(t *testing.T) {
	f, _ := testFilter(t)
	asked := 0
	f.exhausted = func() { asked++ }
	passed := uint32(0)
	for range 10 * wordsBurst {
		if f.packet("gamma.example", encode(t, msgSuspect, &wireDead{incarnationOf(3) + passed + 1, "alpha.example", "gamma.example"})) != nil {
			passed++
		}
	}
	if passed < wordsBurst || passed > wordsBurst+wordsPerSecond*5 {
		t.Errorf("%d accusations passed, want about %d", passed, wordsBurst)
	}
	if asked != 0 {
		t.Error("a new record was asked for too early")
	}
	f.mu.Lock()
	f.nodes["alpha.example"].heard = incarnationOf(3) + maxRefutes - 1
	f.mu.Unlock()
	if f.packet("beta.example", encode(t, msgSuspect, &wireDead{incarnationOf(3) + maxRefutes, "alpha.example", "beta.example"})) == nil || asked != 1 {
		t.Errorf("a new record was asked for %d times, want once", asked)
	}
}

// pushPull encodes a push/pull as memberlist does.
func pushPull(t testing.TB, states ...wireState) []byte {
	b := encode(t, msgPushPull, &wirePushPull{Nodes: len(states)})
	for i := range states {
		b = append(b, encode(t, 0, &states[i])[1:]...)
	}
	return b
}

func stateOf(domain string, record uint64, s memberlist.NodeStateType) wireState {
	return wireState{Name: domain, Addr: memberIP(domain), Port: memberPort, Incarnation: incarnationOf(record), State: s, Vsn: memberVersion}
}

func TestFilterJudgesPushPull(t *testing.T) {
	const peer = "gamma.example"
	moved := stateOf("beta.example", 5, memberlist.StateAlive)
	moved.Addr = memberIP(peer)
	ahead := stateOf("beta.example", 5, memberlist.StateLeft)
	ahead.Incarnation = 1<<32 - 1
	for name, tt := range map[string]struct {
		s    wireState
		want memberlist.NodeStateType // of what passes
		ok   bool
	}{
		"alive":                  {stateOf("beta.example", 5, memberlist.StateAlive), memberlist.StateAlive, true},
		"takeover":               {moved, 0, false},
		"stranger":               {stateOf("delta.example", 1, memberlist.StateAlive), 0, false},
		"left, of another":       {stateOf("beta.example", 5, memberlist.StateLeft), 0, false},
		"left for good":          {ahead, 0, false},
		"left, of itself":        {stateOf(peer, 9, memberlist.StateLeft), memberlist.StateLeft, true},
		"dead becomes suspicion": {stateOf("beta.example", 5, memberlist.StateDead), memberlist.StateSuspect, true},
		"dead, of this node":     {stateOf("alpha.example", 3, memberlist.StateDead), memberlist.StateSuspect, true},
		"unknown state":          {stateOf("beta.example", 5, 17), 0, false},
	} {
		f, reasons := testFilter(t)
		out, err := f.stream(peer, bytes.NewReader(pushPull(t, tt.s)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := pushPull(t)
		if tt.ok {
			tt.s.State = tt.want
			want = pushPull(t, tt.s)
		}
		if !bytes.Equal(out, want) {
			t.Errorf("%s: got %q, want %q, dropped %v", name, out, want, *reasons)
		}
	}
	f, _ := testFilter(t)
	for name, b := range map[string][]byte{
		"empty":          nil,
		"user message":   {8, 0x80},
		"ping":           encode(t, msgPing, &wirePing{Node: "alpha.example", SourceNode: peer}),
		"too many nodes": encode(t, msgPushPull, &wirePushPull{Nodes: maxGossipNodes + 1}),
		"negative nodes": encode(t, msgPushPull, &wirePushPull{Nodes: -1}),
		"user state":     encode(t, msgPushPull, &wirePushPull{UserStateLen: 1 << 30}),
		"truncated":      encode(t, msgPushPull, &wirePushPull{Nodes: 1}),
		"endless":        append([]byte{msgPushPull}, bytes.Repeat([]byte{0x91}, 2*maxGossipStream)...),
	} {
		if out, err := f.stream(peer, bytes.NewReader(b)); err == nil {
			t.Errorf("%s: %q passed", name, out)
		}
	}
}

// attacker is an approved peer that speaks gossip's protocols its own way.
type attacker struct {
	*testNode
	conn *transport.Conn
}

func (a *attacker) packet(kind byte, m any) {
	a.t.Helper()
	if err := a.conn.SendDatagram(encode(a.t, kind, m)); err != nil {
		a.t.Fatal(err)
	}
}

// pushPull sends a push/pull and waits for the victim's.
func (a *attacker) pushPull(states ...wireState) {
	a.t.Helper()
	s, err := a.conn.OpenStreamSync(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	defer s.Close()
	s.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := s.Write(append([]byte{streamMembers}, pushPull(a.t, states...)...)); err != nil {
		a.t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 1)); err != nil {
		a.t.Fatal(err)
	}
}

// infiltrate starts alpha and beta, and a third, approved by both, that has introduced itself to alpha.
func infiltrate(t *testing.T) (alpha, beta *testNode, mallory *attacker) {
	alpha, beta = newTestNode(t, "alpha.example"), newTestNode(t, "beta.example")
	mallory = &attacker{testNode: newTestNode(t, "mallory.example")}
	alpha.start()
	beta.start()
	e, err := transport.Listen(transport.Config{
		Address: "127.0.0.1:0", Domain: "mallory.example", VerifyPeer: mallory.trust.verify, Certificate: mallory.certificate,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Shutdown(t.Context()) })
	mallory.endpoint, mallory.address = e, e.Addr().String()
	mallory.approve(alpha, "")
	alpha.approve(beta, beta.address)
	beta.approve(alpha, alpha.address)
	alpha.approve(mallory.testNode, "")
	beta.approve(mallory.testNode, "")
	within(t, 10*time.Second, "alpha and beta see each other", converged(alpha, beta))
	if mallory.conn, err = e.Dial(t.Context(), alpha.address, "alpha.example", transport.ALPNGossip); err != nil {
		t.Fatal(err)
	}
	r := mallory.record(1)
	s, err := mallory.conn.OpenUniStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.Write(append([]byte{streamRecords}, mls.Marshal(&news{records: []Record{r}})...))
	s.Close()
	within(t, 5*time.Second, "alpha has mallory's record", func() bool { return alpha.recordOf(mallory.testNode) == 1 })
	return alpha, beta, mallory
}

func (n *testNode) record(incarnation uint64) Record {
	n.t.Helper()
	r := Record{
		Domain: n.ca.domain, Address: n.address, Incarnation: incarnation, Issued: time.Unix(time.Now().Unix(), 0).UTC(), Version: "test",
		Chain: n.cert.Certificate,
	}
	signRecord(n.t, &r, n.cert)
	return r
}

// unharmed checks that alpha and beta hold each other alive at the right address, and that beta's own word still
// counts, which it wouldn't if its incarnation had been driven out of reach.
func unharmed(t *testing.T, alpha, beta *testNode) {
	t.Helper()
	if a, ok := alpha.gossip.Address("beta.example"); !ok || a != beta.address {
		t.Errorf("alpha has beta at %q, want %q", a, beta.address)
	}
	if !converged(alpha, beta)() {
		t.Error("alpha and beta don't hold each other alive")
	}
	beta.stop()
	within(t, 5*time.Second, "beta's good-bye is believed", func() bool { return !alpha.sees(beta) })
	beta.start()
	within(t, 5*time.Second, "beta is back", converged(alpha, beta))
}

func TestAuthenticatedPeerCannotTakeOverAnAddress(t *testing.T) {
	alpha, beta, mallory := infiltrate(t)
	before := alpha.gossip.Dropped()
	record := alpha.recordOf(beta)
	takeover := aliveOf("beta.example", record, 5)
	takeover.Addr = memberIP("mallory.example")
	mallory.packet(msgAlive, takeover)
	takeover.Incarnation = 1<<32 - 1
	mallory.packet(msgAlive, takeover)
	s := stateOf("beta.example", record, memberlist.StateAlive)
	s.Addr, s.Incarnation = memberIP("mallory.example"), incarnationOf(record)+9
	mallory.pushPull(s)
	// A record is worth nothing without the victim's key, and an old one of the victim's is no news.
	forged := mallory.record(record + 10)
	forged.Domain = "beta.example"
	signRecord(t, &forged, mallory.cert)
	stream, err := mallory.conn.OpenUniStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Write(append([]byte{streamRecords}, mls.Marshal(&news{records: []Record{forged}})...))
	stream.Close()
	within(t, 5*time.Second, "all four attempts are refused", func() bool { return alpha.gossip.Dropped() >= before+4 })
	unharmed(t, alpha, beta)
}

func TestAuthenticatedPeerCannotRemoveAnother(t *testing.T) {
	alpha, beta, mallory := infiltrate(t)
	before := alpha.gossip.Dropped()
	record := alpha.recordOf(beta)
	for _, from := range []string{"mallory.example", "beta.example", "alpha.example"} {
		for _, incarnation := range []uint32{incarnationOf(record) + 1, incarnationOf(record) | refuteMask, 1<<32 - 1} {
			mallory.packet(msgDead, &wireDead{incarnation, "beta.example", from})
		}
	}
	for _, state := range []memberlist.NodeStateType{memberlist.StateLeft, memberlist.StateDead, memberlist.StateSuspect} {
		s := stateOf("beta.example", record, state)
		s.Incarnation = 1<<32 - 1
		mallory.pushPull(s)
	}
	within(t, 5*time.Second, "all twelve attempts are refused", func() bool { return alpha.gossip.Dropped() >= before+12 })
	// A suspicion is let through, and refuted.
	mallory.packet(msgSuspect, &wireDead{incarnationOf(record) + 1, "beta.example", "mallory.example"})
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if !alpha.sees(beta) {
			t.Fatal("alpha took beta for dead")
		}
	}
	unharmed(t, alpha, beta)
}

func TestAuthenticatedPeerCannotExpelTheNodeItTalksTo(t *testing.T) {
	alpha, beta, mallory := infiltrate(t)
	own := func() uint64 {
		alpha.gossip.mu.Lock()
		defer alpha.gossip.mu.Unlock()
		return alpha.gossip.own.Incarnation
	}
	first := own()
	for i := range uint32(5000) {
		mallory.packet(msgSuspect, &wireDead{incarnationOf(first) + i, "alpha.example", "mallory.example"})
		if i%100 == 99 {
			time.Sleep(5 * time.Millisecond) // datagrams are dropped past a queue of 32
		}
	}
	mallory.packet(msgSuspect, &wireDead{1<<32 - 1, "alpha.example", "mallory.example"})
	if own() != first {
		t.Errorf("the flood brought alpha from record %d to %d", first, own())
	}
	unharmed(t, alpha, beta)
}

func FuzzFilterPacket(f *testing.F) {
	f.Add(encode(f, msgAlive, aliveOf("beta.example", 5, 1)))
	f.Add(encode(f, msgPing, &wirePing{SeqNo: 7, Node: "alpha.example", SourceNode: "gamma.example"}))
	f.Add(joinCompound([][]byte{encode(f, msgSuspect, &wireDead{incarnationOf(5), "beta.example", "gamma.example"}), {msgNack, 0x80}}))
	f.Add([]byte{msgCRC, 0, 0, 0, 0, msgAck})
	f.Fuzz(func(t *testing.T, b []byte) {
		filter, _ := testFilter(t)
		out := filter.packet("gamma.example", b)
		if out == nil {
			return
		}
		// What passed passes again unchanged: it has the filter's own encoding.
		if again := filter.packet("gamma.example", out); !bytes.Equal(again, out) {
			t.Errorf("%x became %x", out, again)
		}
		if bytes.Contains(out, []byte("delta.example")) && strings.Contains(string(out), "Node") {
			t.Errorf("a stranger passed: %q", out)
		}
	})
}

func FuzzFilterStream(f *testing.F) {
	f.Add(pushPull(f, stateOf("beta.example", 5, memberlist.StateAlive), stateOf("gamma.example", 9, memberlist.StateLeft)))
	f.Add(encode(f, msgErr, &wireErr{Error: "no"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		filter, _ := testFilter(t)
		out, err := filter.stream("gamma.example", bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := filter.stream("gamma.example", bytes.NewReader(out))
		if err != nil || !bytes.Equal(again, out) {
			t.Errorf("%q became %q, %v", out, again, err)
		}
	})
}
