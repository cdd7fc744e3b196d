package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// A follower's side of package chain. What a hub says of a room that is followed here is compared with what it has said
// before: the chain through the entries that it sends must lead to the head that it signs, and begin where the log ends.
//
//   - A request to notify without a head is refused once the hub has signed one for the room: else it could do without
//     at will. A hub that never signs is one of plain MIMI, and nothing is asked of it. So is refused what contradicts
//     itself or isn't signed by the hub, and heads of an incarnation that has ended.
//   - Two signed heads that contradict each other are kept as evidence, counted and logged. The entries that came with
//     the second are taken nevertheless: clients compare for themselves, and people decide what a hub is worth to them.
//   - A later incarnation begins anew: the node was restored from an older copy, and says so. Where it gives numbers again
//     the later entries are the log's, and clients that have stored others have to enter the room anew.

const (
	maxHubKeys     = 16 // of one hub
	maxEvidence    = 16 // about one room
	hubKeyTimeout  = 5 * time.Second
	hubKeyInterval = 10 * time.Second // between requests to a hub for a key that isn't known
)

// hubKeys are the keys with which other hubs sign heads, as their certificates say. One that was good once stays known:
// a hub can't take back what it has signed.
type hubKeys struct {
	mu    sync.Mutex
	known map[string][]*mls.ExternalSender // by domain, from the store; guarded by mu
	asked map[string]time.Time             // by domain; guarded by mu
}

// of returns the keys of a hub that are known. mu is held.
func (k *hubKeys) of(s store.Store, domain string) ([]*mls.ExternalSender, error) {
	if list, ok := k.known[domain]; ok {
		return list, nil
	}
	var list []*mls.ExternalSender
	var bad error
	err := store.ScanPrefix(s, key(prefixHubKey, mimi.URI(domain)), func(_, v []byte) bool {
		sender := new(mls.ExternalSender)
		bad = decodeRecord(v, sender, "key of a hub")
		list = append(list, sender)
		return bad == nil
	})
	if err := errors.Join(err, bad); err != nil {
		return nil, err
	}
	if k.known == nil {
		k.known, k.asked = make(map[string][]*mls.ExternalSender), make(map[string]time.Time)
	}
	k.known[domain] = list
	return list, nil
}

// signerOf returns the key of those that signed a head, nil if none did.
func signerOf(list []*mls.ExternalSender, s *chain.Signed) *mls.ExternalSender {
	for _, sender := range list {
		if s.Verify(sender.SignatureKey) == nil {
			return sender
		}
	}
	return nil
}

// verifyHead says whether a head is about a room and signed by the room's hub, which is asked for its key if it isn't
// known.
func (n *Node) verifyHead(ctx context.Context, room mimi.URI, s *chain.Signed) error {
	domain := room.Domain()
	if s.Room != room || s.Seq > federation.MaxSeq {
		return refuse("malformed", "a head of another room")
	}
	if !s.Suite.Supported() {
		return refuse("malformed", "a head of cipher suite %d, which isn't supported", s.Suite)
	}
	if known, err := n.knowsHead(room, s); err != nil || known {
		return err
	}
	k := &n.hubKeys
	k.mu.Lock()
	list, err := k.of(n.store, domain)
	asked := k.asked[domain]
	k.mu.Unlock()
	if err != nil {
		return err
	}
	if signerOf(list, s) != nil {
		return nil
	}
	unsigned := refuse("malformed", "the head isn't signed by %s", domain)
	if len(list) >= maxHubKeys || len(list) > 0 && time.Since(asked) < hubKeyInterval {
		return unsigned
	}
	ctx, cancel := context.WithTimeout(ctx, hubKeyTimeout)
	defer cancel()
	sender, err := n.federation.HubSender(ctx, domain, s.Suite)
	if err != nil {
		return refuse("unavailable", "%s can't be asked for its key", domain)
	}
	id, err := n.verifier.VerifyKey(sender.Credential.Certificates, s.Suite, sender.SignatureKey, authority.PurposeHub)
	if err != nil {
		return err
	}
	if id.Domain != domain {
		return refuse("notAllowed", "the key of %s is certified for %s", domain, id.Domain)
	}
	hash := sha256.Sum256(sender.SignatureKey)
	if _, err := n.store.Commit(map[string][]byte{string(key(prefixHubKey, mimi.URI(domain), hash[:])): codec.Marshal(sender)}, nil); err != nil {
		return err
	}
	k.mu.Lock()
	delete(k.known, domain) // to be read again
	k.asked[domain] = time.Now()
	k.mu.Unlock()
	if s.Verify(sender.SignatureKey) != nil {
		return unsigned
	}
	return nil
}

// knowsHead says whether a head was verified before: the same goes with the answer to a message and with the request to
// notify of it.
func (n *Node) knowsHead(room mimi.URI, s *chain.Signed) (bool, error) {
	r, err := n.openRoom(room)
	if err != nil || r == nil {
		return false, err
	}
	r.mu.Lock()
	ahead := r.heads.ahead
	r.mu.Unlock()
	for _, h := range []*head{ahead, r.heads.last.Load()} {
		if h != nil && h.Head == s.Head && bytes.Equal(h.Signature, s.Signature) {
			return true, nil
		}
	}
	return false, nil
}

// told is what came with one request to notify: the links of its entries from first on, and the head that they lead to.
type told struct {
	chain.Notice
	head   *head
	first  uint64
	links  []chain.Link
	chains []chain.Hash // from the entry before first on
}

// at returns the chain at entry seq in the history that was told, from the entry before first on.
func (t *told) at(seq uint64) chain.Hash { return t.chains[seq-(t.first-1)] }

func (t *told) link(seq uint64) chain.Link { return t.links[seq-t.first] }

// after returns the links after entry seq.
func (t *told) after(seq uint64) []chain.Link { return t.links[seq-(t.first-1):] }

// readNotice reads and verifies what a hub says of the entries that it sends, nil if it says nothing.
func (n *Node) readNotice(ctx context.Context, room mimi.URI, msgs []federation.Sequenced, fanouts []*mimi.FanoutMessage) (*told, error) {
	b := msgs[len(msgs)-1].Head
	if b == nil {
		return nil, nil
	}
	t := new(told)
	if err := decode(b, &t.Notice); err != nil {
		return nil, err
	}
	var encoded [][]byte
	var commit []bool
	for i, m := range msgs {
		if fanouts[i].Message.Welcome != nil {
			continue
		}
		if len(encoded) == 0 {
			t.first = m.Seq
		}
		if m.Seq == 0 || m.Seq != t.first+uint64(len(encoded)) {
			return nil, refuse("malformed", "a head for entries that don't follow one another")
		}
		encoded, commit = append(encoded, m.Fanout), append(commit, commits(fanouts[i]))
	}
	if len(encoded) == 0 || t.Seq != t.first+uint64(len(encoded))-1 {
		return nil, refuse("malformed", "a head for other entries")
	}
	if err := n.verifyHead(ctx, room, &t.Signed); err != nil {
		return nil, err
	}
	var err error
	if t.links, err = t.Links(encoded, func(i int) bool { return commit[i] }); err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	t.chains = []chain.Hash{t.Previous}
	for i, l := range t.links {
		t.chains = append(t.chains, t.chains[i].Next(t.first+uint64(i), l))
	}
	t.head = newHead(&t.Signed)
	return t, nil
}

// compare compares what a hub has told with what it had said before, notes what doesn't fit, and has the change end with
// the new head. r.mu is held, and nothing of what was told is in the log yet that wasn't there before.
func (c *change) compare(t *told) error {
	own := c.r.heads.last.Load()
	again := own != nil && t.Incarnation == own.Incarnation && t.Seq <= own.Seq
	if own != nil && t.Incarnation == own.Incarnation {
		switch {
		case again:
			if err := c.contradicted(&t.Signed, own); err != nil {
				return err
			}
		case t.first-1 <= own.Seq:
			c.accuse(own.Signed, &t.Signed, t.at(own.Seq), t.after(own.Seq))
		}
	}
	if a := c.r.heads.ahead; a != nil && a.Seq <= t.Seq {
		if a.Incarnation == t.Incarnation && t.first-1 <= a.Seq {
			c.accuse(a.Signed, &t.Signed, t.at(a.Seq), t.after(a.Seq))
		}
		c.r.heads.ahead = nil
	}
	if again {
		return nil
	}
	if own != nil && t.Incarnation > own.Incarnation {
		c.n.log.Warn("the hub was restored from an older copy", "room", c.r.uri, "incarnation", t.Incarnation, "before", own.Incarnation)
	}
	c.head = t.head
	c.batch.Set(headKey(c.r.uri), c.head.encoded)
	return nil
}

// rewind drops the entries of the log, of an incarnation that has ended, in whose place a restored hub has ordered others.
// r.mu is held.
func (c *change) rewind(t *told) error {
	own, from := c.r.heads.last.Load(), t.first
	if own == nil {
		return nil
	}
	if own.Incarnation == t.Incarnation {
		from = max(from, own.Seq+1) // what came before is of this incarnation
	}
	for seq := from; seq <= min(t.Seq, c.record.last); seq++ {
		l, err := c.n.linkAt(c.r.uri, seq)
		if err != nil {
			return err
		}
		if l != nil && l.chain == t.at(seq) {
			continue
		}
		return c.cutOff(seq)
	}
	return nil
}

// cutOff drops the entries of the log from seq on, which a restored hub has lost. r.mu is held.
func (c *change) cutOff(seq uint64) error {
	c.n.log.Error("a restored hub has lost entries", "room", c.r.uri, "from", seq, "had", c.record.last)
	c.batch.DeleteRange(key(prefixLog, c.r.uri, be64(seq)), key(prefixLog, c.r.uri, be64(c.record.last+1)))
	c.batch.DeleteRange(linkKey(c.r.uri, seq), linkKey(c.r.uri, c.record.last+1))
	clients, err := c.n.lose(&c.batch, c.r.uri, seq)
	if err != nil {
		return err
	}
	for _, client := range clients { // their streams look at it
		c.members[client] = struct{}{}
	}
	cut, err := cutOf(c.n.store, c.r.uri)
	if err != nil {
		return err
	}
	cut.rewind(seq)
	c.batch.Set(cutKey(c.r.uri), codec.Marshal(cut))
	c.record.last = seq - 1
	kept := c.record.last
	c.cut = &kept
	return nil
}

// contradicted accuses the hub if a head up to own, of the same incarnation, isn't of own's history. Should the log have
// another history there, from before the hub was restored, its links don't lead to own and show nothing. r.mu is held.
func (c *change) contradicted(s *chain.Signed, own *head) error {
	l, err := c.n.linkAt(c.r.uri, s.Seq)
	if err != nil || l == nil || l.chain == s.Chain {
		return err
	}
	links, err := c.n.links(c.r.uri, s.Seq, own.Seq)
	if err != nil || links == nil && s.Seq != own.Seq {
		return err
	}
	c.accuse(s, own.Signed, l.chain, links)
	return nil
}

// links returns the links of the stored entries after one up to another; nil if there are too many, or one isn't there.
func (n *Node) links(room mimi.URI, after, to uint64) ([]chain.Link, error) {
	if to < after || to-after > chain.MaxLinks {
		return nil, nil
	}
	var links []chain.Link
	for seq := after + 1; seq <= to; seq++ {
		fanout, err := n.store.Get(key(prefixLog, room, be64(seq)))
		if err != nil {
			return nil, err
		}
		l, err := n.linkAt(room, seq)
		if err != nil || l == nil || fanout == nil {
			return nil, err
		}
		links = append(links, chain.NewLink(fanout, l.context))
	}
	return links, nil
}

// accuse keeps the evidence that first can't be extended to second, if that is what start and links show.
func (c *change) accuse(first, second *chain.Signed, start chain.Hash, links []chain.Link) {
	e := chain.Contradict(first, second, start, slices.Clone(links))
	if e == nil {
		return
	}
	c.accusations = append(c.accusations, e)
	if err := c.keepEvidence(e); err != nil {
		c.n.log.Error("keeping evidence", "room", c.r.uri, "err", err)
	}
}

func (c *change) keepEvidence(e *chain.Evidence) error {
	domain := c.r.uri.Domain()
	k := &c.n.hubKeys
	k.mu.Lock()
	list, err := k.of(c.n.store, domain)
	k.mu.Unlock()
	if err != nil {
		return err
	}
	for _, s := range []*chain.Signed{&e.First, &e.Second} {
		if by := signerOf(list, s); by != nil && !slices.ContainsFunc(e.Hubs, func(o mls.ExternalSender) bool { return slices.Equal(o.SignatureKey, by.SignatureKey) }) {
			e.Hubs = append(e.Hubs, *by)
		}
	}
	bundle := c.n.trust.Bundle(domain)
	if bundle == nil {
		return fmt.Errorf("no trust bundle of %s", domain)
	}
	e.Bundle = bundle.JSON()
	have := 0
	if err := store.ScanPrefix(c.n.store, key(prefixEvidence, c.r.uri), func(_, _ []byte) bool { have++; return true }); err != nil {
		return err
	}
	if have+len(c.accusations) > maxEvidence {
		return nil // more of the same
	}
	b := codec.Marshal(e)
	hash := sha256.Sum256(b)
	c.batch.Set(key(prefixEvidence, c.r.uri, hash[:]), b)
	return nil
}

// sawHead takes the head in an answer of a hub. What a hub answers that has been superseded doesn't count.
func (n *Node) sawHead(peer string, room mimi.URI, b []byte) error {
	s := new(chain.Signed)
	err := decode(b, s)
	if err == nil && room.Domain() != peer {
		err = fmt.Errorf("%s isn't the hub", peer)
	}
	if err == nil {
		err = n.verifyHead(n.ctx, room, s)
	}
	if err != nil {
		n.log.Info("head refused", "room", room, "peer", peer, "err", err)
		n.metrics.refused.WithLabelValues("head", "malformed").Inc()
		return nil
	}
	if err := n.fence(s); reason(err) != nil {
		n.log.Warn("the answer of a hub that was superseded is refused", "room", room, "incarnation", s.Incarnation)
		return refuse("unavailable", "%s answers as it was before it was restored from a backup", peer)
	} else if err != nil {
		return err
	}
	r, err := n.openRoom(room)
	if err != nil || r == nil || r.hosted {
		return err
	}
	if err := n.run(r, func() (*change, error) {
		c := n.begin(r, nil)
		own, ahead := r.heads.last.Load(), r.heads.ahead
		switch {
		case own != nil && s.Incarnation == own.Incarnation && s.Seq <= own.Seq:
			if err := c.contradicted(s, own); err != nil {
				return nil, err
			}
		case ahead != nil && ahead.Incarnation == s.Incarnation && ahead.Seq == s.Seq:
			c.accuse(ahead.Signed, s, s.Chain, nil)
		case ahead == nil || ahead.Incarnation < s.Incarnation || ahead.Incarnation == s.Incarnation && ahead.Seq < s.Seq:
			r.heads.ahead = newHead(s)
		}
		if c.batch.Len() == 0 {
			return nil, nil
		}
		return c, nil
	}); err != nil {
		n.log.Error("comparing a head", "room", room, "err", err)
	}
	return nil
}

// EvidenceStatus is evidence that the node has against the hub of a room.
type EvidenceStatus struct {
	ID          string   `json:"id"` // SHA-256 in hexadecimal
	Room        mimi.URI `json:"room"`
	Incarnation uint64   `json:"incarnation"`
	First       uint64   `json:"first"`  // the number of the entry up to which the hub has signed one history
	Second      uint64   `json:"second"` // and another
	File        []byte   `json:"file"`   // as chain.ParseFile reads it
}

// listEvidence returns the evidence against hubs, by room.
func (n *Node) listEvidence() ([]EvidenceStatus, error) {
	list := []EvidenceStatus{}
	var bad error
	err := store.ScanPrefix(n.store, []byte(prefixEvidence), func(_, v []byte) bool {
		e := new(chain.Evidence)
		if bad = decodeRecord(v, e, "evidence"); bad != nil {
			return false
		}
		list = append(list, EvidenceStatus{
			ID: fmt.Sprintf("%x", sha256.Sum256(v)), Room: e.First.Room, Incarnation: e.First.Incarnation,
			First: e.First.Seq, Second: e.Second.Seq, File: e.File(),
		})
		return true
	})
	return list, errors.Join(err, bad)
}
