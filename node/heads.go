package node

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// The hub's side of package chain: an entry of a log and its link are one batch, and heads are signed of what is on disk
// only. Whoever needs a head shares the last one that was signed, if it reaches as far: requests that waited for one sync
// cost one signature.

// heads are the signed heads of a room that are at hand.
type heads struct {
	last atomic.Pointer[head] // the hub's last one of what is on disk; nil if there is none

	signing sync.Mutex // held while the hub signs
	ahead   *head      // guarded by room.mu; of a room that is followed: the head of an answer, beyond the log
}

// replace makes h the last head, unless it is an earlier one: changes that queue up for a sync end in any order.
func (hs *heads) replace(h *head) {
	for {
		have := hs.last.Load()
		if have != nil && (have.Incarnation > h.Incarnation || have.Incarnation == h.Incarnation && have.Seq > h.Seq) || hs.last.CompareAndSwap(have, h) {
			return
		}
	}
}

// head is a signed head with its encoding.
type head struct {
	*chain.Signed
	encoded []byte
}

func newHead(s *chain.Signed) *head { return &head{s, codec.Marshal(s)} }

func linkKey(room mimi.URI, seq uint64) []byte { return key(prefixLink, room, be64(seq)) }

func headKey(room mimi.URI) []byte { return append([]byte(prefixHead), room...) }

// openIncarnation returns the incarnation of the node whose store it is.
func openIncarnation(s store.Store) (uint64, error) {
	b, err := s.Get([]byte(keyIncarnation))
	switch {
	case err != nil:
		return 0, err
	case b == nil:
		return renewIncarnation(s)
	case len(b) != 8:
		return 0, fmt.Errorf("%w: incarnation", errRecord)
	}
	return binary.BigEndian.Uint64(b), nil
}

// renewIncarnation begins another incarnation, as has to be done with a store that was restored from an older copy before
// a node serves it: heads of the old incarnation may have been signed that the copy has nothing of. An incarnation is
// the time in ms since 1970, times 2^16, and a random part; it is later than the one before.
func renewIncarnation(s store.Store) (uint64, error) {
	var random [2]byte
	rand.Read(random[:])
	next := uint64(time.Now().UnixMilli())<<16 | uint64(binary.BigEndian.Uint16(random[:]))
	have, err := s.Get([]byte(keyIncarnation))
	if err != nil {
		return 0, err
	}
	if len(have) == 8 {
		next = max(next, binary.BigEndian.Uint64(have)+1)
	}
	if _, err := s.Commit(map[string][]byte{keyIncarnation: be64(next)}, nil); err != nil {
		return 0, fmt.Errorf("beginning an incarnation: %w", err)
	}
	return next, nil
}

// chainLogs computes the chains of logs from before there were any, of rooms hosted here. The contexts of their entries
// aren't known any more, and count as zero.
func chainLogs(s store.Store) error {
	type hosted struct {
		uri  mimi.URI
		last uint64
	}
	var rooms []hosted
	var bad error
	err := store.ScanPrefix(s, []byte(prefixRoom), func(k, v []byte) bool {
		var rec roomRecord
		if bad = decodeRecord(v, &rec, "room"); bad == nil && rec.hosted && rec.last > 0 {
			rooms = append(rooms, hosted{mimi.URI(k), rec.last})
		}
		return bad == nil
	})
	if bad != nil {
		err = bad
	}
	if err != nil {
		return err
	}
	for _, r := range rooms {
		l := linkRecord{chain: chain.Start(r.uri)}
		if err := store.ScanPrefix(s, key(prefixLog, r.uri), func(k, v []byte) bool {
			if len(k) == 8 {
				l.chain = l.chain.Next(binary.BigEndian.Uint64(k), chain.NewLink(v, chain.Hash{}))
			}
			return true
		}); err != nil {
			return err
		}
		if _, err := s.Commit(map[string][]byte{string(linkKey(r.uri, r.last)): codec.Marshal(l)}, nil); err != nil {
			return err
		}
	}
	return nil
}

// linkAt returns the chain at an entry, nil if there is none.
func (n *Node) linkAt(room mimi.URI, seq uint64) (*linkRecord, error) {
	if seq == 0 {
		return &linkRecord{chain: chain.Start(room)}, nil
	}
	b, err := n.store.Get(linkKey(room, seq))
	if err != nil || b == nil {
		return nil, err
	}
	l := new(linkRecord)
	return l, decodeRecord(b, l, "link")
}

// loadChain finds where the chain of a room is that is being opened.
func (n *Node) loadChain(r *room) (err error) {
	if !r.hosted {
		b, err := n.store.Get(headKey(r.uri))
		if err != nil || b == nil {
			return err
		}
		s := new(chain.Signed)
		if err := decodeRecord(b, s, "head"); err != nil {
			return err
		}
		r.heads.last.Store(newHead(s))
	}
	r.link, err = n.linkAt(r.uri, r.record.last)
	if err == nil && r.link == nil && r.hosted {
		err = fmt.Errorf("%w: no chain at entry %d", errRecord, r.record.last)
	}
	return err
}

// contextHash returns the hash of the present GroupContext of a hosted room; mu is held.
func (r *room) contextHash() chain.Hash {
	if r.roster != nil && r.roster.epoch == r.group.Epoch() {
		return r.roster.context
	}
	return chain.ContextOf(r.group.Context())
}

// head returns a signed head of a hosted room that reaches to entry seq at least, which is on disk.
func (n *Node) head(r *room, seq uint64) (*head, error) {
	if h := r.heads.last.Load(); h != nil && h.Seq >= seq {
		return h, nil
	}
	r.heads.signing.Lock()
	defer r.heads.signing.Unlock()
	if h := r.heads.last.Load(); h != nil && h.Seq >= seq {
		return h, nil
	}
	h, err := n.sign(r, max(seq, r.durable.Load()))
	if err == nil {
		r.heads.last.Store(h)
	}
	return h, err
}

// headAt is head for the entry seq and no other.
func (n *Node) headAt(r *room, seq uint64) (*head, error) {
	h, err := n.head(r, seq)
	if err != nil || h.Seq == seq {
		return h, err
	}
	return n.sign(r, seq)
}

func (n *Node) sign(r *room, seq uint64) (*head, error) {
	l, err := n.linkAt(r.uri, seq)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return nil, fmt.Errorf("%w: no chain of %s at entry %d", errRecord, r.uri, seq)
	}
	suite := r.group.Suite()
	signer, _, err := n.keys.hub(suite)
	if err != nil {
		return nil, err
	}
	s, err := chain.Sign(rand.Reader, signer, chain.Head{
		Room: r.uri, Suite: suite, Place: chain.Place{Incarnation: n.incarnation, Seq: seq, Chain: l.chain},
	})
	if err != nil {
		return nil, err
	}
	return newHead(s), nil
}

// lastHead returns the encoded head of a room that goes with an answer: one that reaches as far as the log is on disk, or
// of a room that is followed the last that is known. It is nil if there is none. That it fails is no reason not to answer.
func (n *Node) lastHead(uri mimi.URI) []byte {
	r, err := n.openRoom(uri)
	if err != nil || r == nil {
		return nil
	}
	if r.hosted {
		h, err := n.head(r, r.durable.Load())
		if err != nil {
			n.log.Error("signing a head", "room", uri, "err", err)
			return nil
		}
		return h.encoded
	}
	r.mu.Lock()
	h := r.heads.ahead
	r.mu.Unlock()
	if h == nil {
		h = r.heads.last.Load()
	}
	if h == nil {
		return nil
	}
	return h.encoded
}

// headFor returns a head for a stream that is about to send the entries of a room up to seq: one at an entry of those, or
// a later one, which goes with an entry to come. It is nil if there is none.
func (n *Node) headFor(r *room, seq uint64) *head {
	h := r.heads.last.Load()
	if !r.hosted || h != nil && h.Seq >= seq {
		return h
	}
	h, err := n.head(r, seq)
	if err != nil {
		n.log.Error("signing a head", "room", r.uri, "err", err)
		return nil
	}
	return h
}

// notice returns what goes with entries of a hosted room's log, from first to last, to a peer; nil if the chain begins
// later. contexts are computed from the links: commits are entries that change them.
func (n *Node) notice(uri mimi.URI, first uint64, fanouts [][]byte) ([]byte, error) {
	r, err := n.hostedRoom(uri)
	if err != nil {
		return nil, err
	}
	last := first + uint64(len(fanouts)) - 1
	before, err := n.linkAt(r.uri, first-1)
	if err != nil || before == nil {
		return nil, err
	}
	if l, err := n.linkAt(r.uri, last); err != nil || l == nil {
		return nil, err
	}
	h, err := n.headAt(r, last)
	if rf := reason(err); rf != nil { // there is no key any more for rooms of that suite
		n.log.Warn("a head can't be signed", "room", r.uri, "reason", rf.detail)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	notice := chain.Notice{Signed: *h.Signed, Previous: before.chain}
	for i, b := range fanouts {
		commit := isCommit(b)
		if i > 0 && !commit {
			continue
		}
		l, err := n.linkAt(r.uri, first+uint64(i))
		if err != nil || l == nil {
			return nil, err
		}
		if i == 0 && commit {
			notice.Contexts = append(notice.Contexts, before.context) // of use for nothing but the rule
		}
		notice.Contexts = append(notice.Contexts, l.context)
	}
	return codec.Marshal(notice), nil
}

// isCommit says whether an encoded FanoutMessage is of a commit. Most are application messages, as their wire format
// shows, which follows the time and the version.
func isCommit(fanout []byte) bool {
	r := codec.NewReader(fanout)
	r.Uint64()
	r.Uint16()
	if mls.WireFormat(r.Uint16()) != mls.WireFormatPublicMessage {
		return false
	}
	var f mimi.FanoutMessage
	return codec.Unmarshal(fanout, &f) == nil && commits(&f)
}

func commits(f *mimi.FanoutMessage) bool {
	return f.Message.Public != nil && f.Message.Public.Content.ContentType == mls.ContentCommit
}
