package federation

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"sync"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/memberlist"
	"golang.org/x/time/rate"
)

// memberlist believes whoever is let in: any member may give another a new address, or declare it dead at the highest
// incarnation there is, which it can never refute. So everything that reaches memberlist goes through a filter that
// knows who sent it (the TLS peer) and what the nodes have signed (their records):
//
//   - A node is spoken of only if we hold its record and approve it. Its memberlist address is derived from its
//     domain; real addresses come from signed records alone, so there is nothing to take over.
//   - memberlist's incarnation of a node is bound to the record: the upper bits are the record's incarnation, the
//     lower ones count refutations. Others can push it up only within what the node has signed, in small steps, and
//     the node signs a new record before they run out.
//   - "Dead" and "left" are accepted from the node itself only. Who else thinks so may say that it suspects, and the
//     node gets the chance to refute.
//   - Replies go to the peer that asked, over its own connection.
//
// Messages are decoded, judged, and encoded anew. What isn't understood is dropped.

// The message types of memberlist's protocol that occur here.
const (
	msgPing         = 0
	msgIndirectPing = 1
	msgAck          = 2
	msgSuspect      = 3
	msgAlive        = 4
	msgDead         = 5
	msgPushPull     = 6
	msgCompound     = 7
	msgNack         = 11
	msgCRC          = 12
	msgErr          = 13
)

// memberlist's messages; the field names are the protocol.
type (
	wirePing struct {
		SeqNo      uint32
		Node       string
		SourceAddr []byte
		SourcePort uint16
		SourceNode string
	}
	wireIndirectPing struct {
		SeqNo      uint32
		Target     []byte
		Port       uint16
		Node       string
		Nack       bool
		SourceAddr []byte
		SourcePort uint16
		SourceNode string
	}
	wireAck struct {
		SeqNo   uint32
		Payload []byte
	}
	wireNack struct{ SeqNo uint32 }
	wireErr  struct{ Error string }
	wireDead struct { // and suspect
		Incarnation uint32
		Node        string
		From        string
	}
	wireAlive struct {
		Incarnation uint32
		Node        string
		Addr        []byte
		Port        uint16
		Meta        []byte
		Vsn         []uint8
	}
	wirePushPull struct {
		Nodes        int
		UserStateLen int
		Join         bool
	}
	wireState struct {
		Name        string
		Addr        []byte
		Port        uint16
		Meta        []byte
		Incarnation uint32
		State       memberlist.NodeStateType
		Vsn         []uint8
	}
)

const (
	// refuteBits is how many of the 32 bits of a memberlist incarnation count refutations; the others are the lower
	// bits of the record's incarnation.
	refuteBits = 12
	refuteMask = 1<<refuteBits - 1
	epochMask  = 1<<(32-refuteBits) - 1

	// maxRefutes is how many refutations a record lasts for before its node signs another.
	maxRefutes = 1 << (refuteBits - 1)

	// maxJump is how far a third party's word can advance a node's incarnation at a time.
	maxJump = 64

	// wordsPerSecond and wordsBurst ration the words of a peer that make this node refute.
	wordsPerSecond = 5
	wordsBurst     = 50

	maxGossipNodes  = 4096
	maxGossipStream = 1 << 20 // bytes of a push/pull
)

// memberVersion is the range and choice of memberlist's protocol versions, as every message carries them.
var memberVersion = []uint8{memberlist.ProtocolVersionMin, memberlist.ProtocolVersionMax, memberlist.ProtocolVersion2Compatible, 0, 0, 0}

// memberIP is the address by which memberlist knows a node, a unique local one (RFC 4193) that is never dialled.
// Port memberPort goes with it.
func memberIP(domain string) net.IP {
	sum := sha256.Sum256([]byte("Parley member " + domain))
	return append(net.IP{0xfd}, sum[:15]...)
}

const memberPort = 1

// incarnationOf is the first memberlist incarnation under a record's.
func incarnationOf(record uint64) uint32 { return uint32(record&epochMask) << refuteBits }

// filter judges what peers send to memberlist.
type filter struct {
	self      string
	exhausted func()                    // the own record's refutations run out; called with mu held, must not block
	dropped   func(peer, reason string) // must not block
	mu        sync.Mutex
	nodes     map[string]*filteredNode // guarded by mu; approved nodes by domain, and self
}

type filteredNode struct {
	base  uint32        // incarnationOf its record
	heard uint32        // the highest incarnation accepted, at least base
	left  bool          // its last word was that it goes
	words *rate.Limiter // what it may say about this node
}

func newFilter(self string) *filter {
	return &filter{
		self:      self,
		exhausted: func() {},
		dropped:   func(string, string) {},
		nodes:     make(map[string]*filteredNode),
	}
}

// approve lets domain be spoken of, under its record's incarnation.
func (f *filter) approve(domain string, record uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.nodes[domain]; n != nil && n.base == incarnationOf(record) {
		return
	}
	base := incarnationOf(record)
	words := rate.NewLimiter(wordsPerSecond, wordsBurst)
	if n := f.nodes[domain]; n != nil {
		words = n.words
	}
	f.nodes[domain] = &filteredNode{base: base, heard: base, words: words}
}

func (f *filter) remove(domain string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.nodes, domain)
}

// knows says whether memberlist may hold a node of that name and address.
func (f *filter) knows(domain string, ip net.IP, port uint16) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.nodes[domain] != nil && port == memberPort && ip.Equal(memberIP(domain))
}

// hasLeft says whether a node's last word was that it goes.
func (f *filter) hasLeft(domain string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[domain]
	return n != nil && n.left
}

var errDropped = errors.New("dropped")

func drop(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errDropped, fmt.Sprintf(format, args...))
}

// packet returns what of a packet from peer may reach memberlist, nil if nothing.
func (f *filter) packet(peer string, b []byte) []byte {
	if len(b) >= 5 && b[0] == msgCRC {
		if crc32.ChecksumIEEE(b[5:]) != binary.BigEndian.Uint32(b[1:5]) {
			f.dropped(peer, "wrong checksum")
			return nil
		}
		b = b[5:]
	}
	if len(b) == 0 {
		f.dropped(peer, "empty packet")
		return nil
	}
	if b[0] != msgCompound {
		out, err := f.message(peer, b)
		if err != nil {
			f.dropped(peer, err.Error())
			return nil
		}
		return out
	}
	parts, err := splitCompound(b[1:])
	if err != nil {
		f.dropped(peer, err.Error())
		return nil
	}
	var kept [][]byte
	for _, p := range parts {
		out, err := f.message(peer, p)
		if err != nil {
			f.dropped(peer, err.Error())
			continue
		}
		kept = append(kept, out)
	}
	if len(kept) == 0 {
		return nil
	}
	return joinCompound(kept)
}

// splitCompound splits memberlist's compound message: a count, a 16-bit length for each part, the parts.
func splitCompound(b []byte) ([][]byte, error) {
	if len(b) == 0 || len(b) < 1+2*int(b[0]) {
		return nil, drop("truncated compound message")
	}
	n := int(b[0])
	lengths, rest := b[1:1+2*n], b[1+2*n:]
	parts := make([][]byte, 0, n)
	for i := range n {
		l := int(binary.BigEndian.Uint16(lengths[2*i:]))
		if l > len(rest) {
			return nil, drop("truncated part of a compound message")
		}
		parts = append(parts, rest[:l])
		rest = rest[l:]
	}
	return parts, nil
}

func joinCompound(parts [][]byte) []byte {
	b := []byte{msgCompound, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	return append(b, bytes.Join(parts, nil)...)
}

// message judges one message of a packet and returns it encoded anew.
func (f *filter) message(peer string, b []byte) ([]byte, error) {
	if len(b) == 0 {
		return nil, drop("empty message")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch b[0] {
	case msgPing:
		return judge(b, func(p *wirePing) error {
			if p.Node != f.self || p.SourceNode != peer {
				return drop("ping of %q from %q", p.Node, p.SourceNode)
			}
			p.SourceAddr, p.SourcePort = memberIP(peer), memberPort
			return nil
		})
	case msgIndirectPing:
		return judge(b, func(p *wireIndirectPing) error {
			if p.SourceNode != peer || p.Node == f.self || p.Node == peer || f.nodes[p.Node] == nil {
				return drop("indirect ping of %q from %q", p.Node, p.SourceNode)
			}
			p.SourceAddr, p.SourcePort = memberIP(peer), memberPort
			p.Target, p.Port = memberIP(p.Node), memberPort
			return nil
		})
	case msgAck:
		return judge(b, func(a *wireAck) error { a.Payload = nil; return nil })
	case msgNack:
		return judge(b, func(*wireNack) error { return nil })
	case msgSuspect:
		return judge(b, func(s *wireDead) error { return f.suspect(peer, s) })
	case msgAlive:
		return judge(b, func(a *wireAlive) error { return f.alive(peer, a) })
	case msgDead:
		return judge(b, func(d *wireDead) error { return f.dead(peer, d) })
	}
	return nil, drop("message of type %d", b[0])
}

// judge decodes a message, has ok judge and correct it, and encodes it.
func judge[T any](b []byte, ok func(*T) error) ([]byte, error) {
	var m T
	if err := codec.NewDecoderBytes(b[1:], new(codec.MsgpackHandle)).Decode(&m); err != nil {
		return nil, drop("malformed message of type %d", b[0])
	}
	if err := ok(&m); err != nil {
		return nil, err
	}
	return encodeGossip(b[0], &m)
}

func encodeGossip(kind byte, m any) ([]byte, error) {
	out := bytes.NewBuffer([]byte{kind})
	if err := codec.NewEncoder(out, new(codec.MsgpackHandle)).Encode(m); err != nil {
		return nil, fmt.Errorf("encoding a gossip message: %w", err)
	}
	return out.Bytes(), nil
}

// alive judges that a node is alive; mu is held.
func (f *filter) alive(peer string, a *wireAlive) error {
	n := f.nodes[a.Node]
	switch {
	case n == nil:
		return drop("%q alive, whose record isn't approved here", a.Node)
	case !net.IP(a.Addr).Equal(memberIP(a.Node)) || a.Port != memberPort || len(a.Meta) != 0:
		return drop("%s alive at a foreign address", a.Node)
	case a.Incarnation&^refuteMask != n.base:
		return drop("%s alive under another record", a.Node)
	case !compatible(a.Vsn):
		return drop("%s alive with protocol versions %v", a.Node, a.Vsn)
	}
	a.Addr, a.Vsn = memberIP(a.Node), memberVersion
	if a.Node == f.self {
		return f.aboutSelf(peer, a.Incarnation)
	}
	if a.Incarnation > n.heard && a.Incarnation-n.heard > maxJump && peer != a.Node {
		return drop("%s alive, %d incarnations ahead", a.Node, a.Incarnation-n.heard)
	}
	if a.Incarnation > n.heard {
		n.heard, n.left = a.Incarnation, false
	}
	return nil
}

// compatible says whether protocol versions are such that memberlist can speak with their node.
func compatible(v []uint8) bool {
	return len(v) == 6 && v[0] > 0 && v[0] <= memberVersion[2] && v[1] >= memberVersion[2] && v[2] == memberVersion[2] &&
		v[3] == 0 && v[4] == 0 && v[5] == 0
}

// aboutSelf judges an incarnation at which a peer has this node alive, suspected or dead, to which memberlist answers
// with the next one. Nobody can have heard of a later one than that; so running out of them takes many messages, and
// those are rationed.
func (f *filter) aboutSelf(peer string, incarnation uint32) error {
	n := f.nodes[f.self]
	switch {
	case n == nil || incarnation&^refuteMask != n.base:
		return drop("a word about this node under another record")
	case incarnation > n.heard+1:
		return drop("a word about this node at incarnation %d, ahead of %d", incarnation, n.heard)
	case incarnation == n.heard+1:
		if p := f.nodes[peer]; p == nil || !p.words.Allow() {
			return drop("too many words about this node")
		}
		if n.heard = incarnation; n.heard&refuteMask >= maxRefutes {
			f.exhausted()
		}
	}
	return nil
}

// suspect judges a suspicion; mu is held. A peer speaks for itself, except that this node hears of all suspicions
// against it, in order to refute them.
func (f *filter) suspect(peer string, s *wireDead) error {
	n := f.nodes[s.Node]
	switch {
	case n == nil:
		return drop("%q suspected, whose record isn't approved here", s.Node)
	case s.Node == f.self:
		s.From = peer
		return f.aboutSelf(peer, s.Incarnation)
	case s.From != peer:
		return drop("%s suspected by %q, as %s says", s.Node, s.From, peer)
	case s.Incarnation&^refuteMask != n.base || s.Incarnation > n.heard:
		return drop("%s suspected at incarnation %d, ahead of %d", s.Node, s.Incarnation, n.heard)
	}
	return nil
}

// dead judges that a node is gone; mu is held. Only a node itself can say so; what is said of this node, it refutes.
func (f *filter) dead(peer string, d *wireDead) error {
	n := f.nodes[d.Node]
	switch {
	case n != nil && d.Node == f.self:
		d.From = peer
		return f.aboutSelf(peer, d.Incarnation)
	case n == nil || d.Node != peer || d.From != peer:
		return drop("%q dead, as %s says", d.Node, peer)
	case d.Incarnation&^refuteMask != n.base || (d.Incarnation > n.heard && d.Incarnation-n.heard > maxJump):
		return drop("%s dead at incarnation %d, ahead of %d", d.Node, d.Incarnation, n.heard)
	}
	n.heard, n.left = max(n.heard, d.Incarnation), true
	return nil
}

// stream reads the one message that a peer sends on a stream of memberlist's, and returns what memberlist may read.
func (f *filter) stream(peer string, r io.Reader) ([]byte, error) {
	br := bufio.NewReader(io.LimitReader(r, maxGossipStream))
	kind, err := br.ReadByte()
	if err != nil {
		return nil, err
	}
	dec := codec.NewDecoder(br, new(codec.MsgpackHandle))
	switch kind {
	case msgErr:
		var e wireErr
		if err := dec.Decode(&e); err != nil {
			return nil, fmt.Errorf("reading a gossip error: %w", err)
		}
		return encodeGossip(kind, &wireErr{Error: e.Error[:min(len(e.Error), 200)]})
	case msgPushPull:
		return f.pushPull(peer, dec)
	}
	f.dropped(peer, fmt.Sprintf("stream of type %d", kind))
	return nil, drop("stream of type %d", kind)
}

func (f *filter) pushPull(peer string, dec *codec.Decoder) ([]byte, error) {
	var h wirePushPull
	if err := dec.Decode(&h); err != nil {
		return nil, fmt.Errorf("reading a push/pull: %w", err)
	}
	if h.Nodes < 0 || h.Nodes > maxGossipNodes || h.UserStateLen != 0 {
		f.dropped(peer, "push/pull out of bounds")
		return nil, drop("push/pull of %d nodes and %d bytes", h.Nodes, h.UserStateLen)
	}
	var kept []wireState
	for range h.Nodes {
		var s wireState
		if err := dec.Decode(&s); err != nil {
			return nil, fmt.Errorf("reading a push/pull: %w", err)
		}
		if err := f.state(peer, &s); err != nil {
			f.dropped(peer, err.Error())
			continue
		}
		kept = append(kept, s)
	}
	out, err := encodeGossip(msgPushPull, &wirePushPull{Nodes: len(kept), Join: h.Join})
	if err != nil {
		return nil, err
	}
	for i := range kept {
		b, err := encodeGossip(0, &kept[i])
		if err != nil {
			return nil, err
		}
		out = append(out, b[1:]...)
	}
	return out, nil
}

// state judges one entry of a push/pull by the rules of the message that memberlist makes of it.
func (f *filter) state(peer string, s *wireState) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s.State {
	case memberlist.StateAlive:
		a := wireAlive{Incarnation: s.Incarnation, Node: s.Name, Addr: s.Addr, Port: s.Port, Meta: s.Meta, Vsn: s.Vsn}
		if err := f.alive(peer, &a); err != nil {
			return err
		}
	case memberlist.StateLeft:
		if err := f.dead(peer, &wireDead{Incarnation: s.Incarnation, Node: s.Name, From: s.Name}); err != nil {
			return err
		}
	case memberlist.StateSuspect, memberlist.StateDead:
		if err := f.suspect(peer, &wireDead{Incarnation: s.Incarnation, Node: s.Name, From: peer}); err != nil {
			return err
		}
		s.State = memberlist.StateSuspect
	default:
		return drop("%q in state %d", s.Name, s.State)
	}
	s.Addr, s.Port, s.Meta, s.Vsn = memberIP(s.Name), memberPort, nil, memberVersion
	return nil
}
