package node

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
)

// Timeouts of what is sent to peers. Whoever waits for the answer of a proxied request is a client.
const (
	proxyTimeout  = 20 * time.Second
	bundleTimeout = 10 * time.Second
	bundleRefresh = 5 * time.Minute // how often peers' bundles are fetched, beside being pushed
)

// PeerStatus is what the node knows of another provider's node.
type PeerStatus struct {
	Domain      string                `json:"domain"`
	Fingerprint authority.Fingerprint `json:"fingerprint"`
	Address     string                `json:"address,omitempty"`
	Approved    bool                  `json:"approved"`
	Alive       bool                  `json:"alive"`              // as gossip has it, a hint
	Waiting     int                   `json:"waiting"`            // items in the outbox
	Dropped     int                   `json:"dropped,omitempty"`  // of it, since the node started, because too many waited
	Sequence    uint64                `json:"sequence,omitempty"` // of its trust bundle
	Version     string                `json:"version,omitempty"`
}

// peers returns the approved peers, then those that gossip has introduced and nobody has approved.
func (n *Node) peers() []PeerStatus {
	var list []PeerStatus
	states := make(map[string]federation.Member)
	for _, m := range n.gossip.Members() {
		states[m.Domain] = m
	}
	for _, p := range n.trust.Peers() {
		s := PeerStatus{Domain: p.Domain, Fingerprint: p.Fingerprint, Address: p.Address, Approved: true, Waiting: n.outbox.Depth(p.Domain), Dropped: n.outbox.Dropped(p.Domain), Sequence: p.Sequence}
		if m, ok := states[p.Domain]; ok {
			s.Alive, s.Version = m.State == federation.StateAlive, m.Version
			if m.Address != "" {
				s.Address = m.Address
			}
		}
		list = append(list, s)
	}
	for _, r := range n.gossip.Unapproved() {
		s := PeerStatus{Domain: r.Domain, Address: r.Address, Version: r.Version}
		if len(r.Chain) > 0 {
			s.Fingerprint = sha256.Sum256(r.Chain[len(r.Chain)-1])
		}
		list = append(list, s)
	}
	return list
}

// approve approves a peer, tells gossip, and fetches the peer's bundle as soon as it can be reached.
func (n *Node) approve(ctx context.Context, domain string, f authority.Fingerprint, address string) error {
	if domain == n.cfg.Domain {
		return refuse("malformed", "%s is this node's own domain", domain)
	}
	if address != "" {
		if err := checkAddress(address, false); err != nil {
			return refuse("malformed", "address: %v", err)
		}
	}
	if err := n.trust.Approve(ctx, domain, f, address); err != nil {
		return err
	}
	n.log.Info("peer approved", "peer", domain, "fingerprint", f)
	n.gossip.Refresh()
	n.greet(domain)
	return nil
}

// removePeer takes an approval back. Its connections end, and its clients' leaves are judged as of an unknown provider.
func (n *Node) removePeer(domain string) error {
	if _, ok := n.trust.Peer(domain); !ok {
		return refuse("notFound", "%s isn't an approved peer", domain)
	}
	if err := n.trust.Remove(domain); err != nil {
		return err
	}
	n.log.Info("peer removed", "peer", domain)
	n.gossip.Refresh()
	n.trustChanged(domain)
	return nil
}

// peerSeen is told by gossip that a peer came, came again, or went. It doesn't block.
func (n *Node) peerSeen(domain, address string, alive bool) {
	if n.presence.change(domain, alive) {
		n.log.Info("peer", "peer", domain, "address", address, "alive", alive)
	}
	if alive {
		n.outbox.Kick(domain)
		n.consentOut.Kick(domain)
		n.greet(domain)
	}
}

// greet has bundles exchanged with a peer in the background, once at a time.
func (n *Node) greet(domain string) {
	if !n.presence.begin(domain) {
		return
	}
	started := n.background.Go(func() {
		defer n.presence.end(domain)
		if err := n.exchange(n.ctx, domain); err != nil {
			n.log.Debug("exchanging bundles", "peer", domain, "err", err)
		}
	})
	if !started {
		n.presence.end(domain)
	}
}

// presence is what was last heard of peers.
type presence struct {
	mu       sync.Mutex
	alive    map[string]bool // guarded by mu
	greeting map[string]bool // guarded by mu; bundles are being exchanged
}

// change notes a peer's state and says whether it is another than before.
func (p *presence) change(domain string, alive bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.alive[domain] == alive {
		return false
	}
	p.alive[domain] = alive
	return true
}

func (p *presence) begin(domain string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.greeting[domain] {
		return false
	}
	p.greeting[domain] = true
	return true
}

func (p *presence) end(domain string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.greeting, domain)
}

// exchange fetches a peer's bundle and gives it the own one.
func (n *Node) exchange(ctx context.Context, domain string) error {
	ctx, cancel := context.WithTimeout(ctx, bundleTimeout)
	defer cancel()
	b, err := n.federation.FetchBundle(ctx, domain)
	if err != nil {
		return err
	}
	if err := n.receiveBundle(domain, b); err != nil {
		return err
	}
	known, err := n.federation.Known(ctx, domain)
	if err == nil {
		err = errors.Join(n.checkSuperseded(domain, known.Head), n.heardOf(domain, known.Incarnation))
	}
	if err != nil {
		n.log.Debug("asking what a peer knows", "peer", domain, "err", err)
	}
	for _, room := range n.late.of(domain) {
		if err := n.catchUp(n.ctx, room); err != nil {
			n.log.Warn("asking a hub what came after the backup", "room", room, "err", err)
		}
	}
	if n.settled() != nil {
		return nil // the own one may not go on yet from what peers have
	}
	return n.federation.PushBundle(ctx, domain, n.ownBundle.Load().JSON())
}

// refreshBundles fetches the bundles of all peers from time to time: a push may have been lost with a peer's disk.
func (n *Node) refreshBundles(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(bundleRefresh):
		}
		for _, p := range n.trust.Peers() {
			n.greet(p.Domain)
		}
	}
}

// roundTripper finds a peer: where the operator said that it is, or where gossip has it.
func (n *Node) roundTripper(ctx context.Context, peer string) (http.RoundTripper, error) {
	p, ok := n.trust.Peer(peer)
	if !ok {
		return nil, refuse("unapprovedPeer", "%s hasn't approved %s", n.cfg.Domain, peer)
	}
	address, ok := n.gossip.Address(peer)
	if !ok {
		address = p.Address
	}
	if address == "" {
		return nil, fmt.Errorf("no address of %s is known yet", peer)
	}
	return n.endpoint.RoundTripper(ctx, address, peer)
}

// unreachable says that a peer couldn't be asked. A refusal by the peer stays what it is.
func (n *Node) unreachable(peer string, err error) error {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r // it was this node that didn't ask
	}
	if e, ok := errors.AsType[*federation.Error](err); ok && e.Code == federation.CodeUnavailable && e.Detail != "" {
		return &refusal{code: "unavailable", detail: peer + ": " + e.Detail, retry: e.RetryAfter} // it says why
	}
	if federation.Unavailable(err) {
		n.log.Info("peer unreachable", "peer", peer, "err", err)
		return refuse("hubUnreachable", "%s can't be reached", peer)
	}
	return err
}

// What the outbox holds for a peer are references; the kind is the first byte.
const (
	outboxKindEntry   = 'e' // room 00 seq
	outboxKindWelcome = 'w' // room 00, the end of the key under prefixFanout
	outboxKindBundle  = 'b'
)

func outboxEntry(room mimi.URI, seq uint64) []byte {
	return key(string(outboxKindEntry), room, be64(seq))
}

func outboxWelcome(room mimi.URI, rest []byte) []byte {
	return key(string(outboxKindWelcome), room, rest)
}

// parseReference reads what outboxEntry and outboxWelcome write. rest is the end of the key in the store, which begins
// with seq.
func parseReference(ref []byte) (kind byte, room mimi.URI, seq uint64, rest []byte, err error) {
	i := slices.Index(ref, 0)
	if i < 1 || (ref[0] != outboxKindEntry && ref[0] != outboxKindWelcome) {
		return 0, "", 0, nil, fmt.Errorf("%w: %w: reference %x in the outbox", federation.ErrNoItem, errRecord, ref)
	}
	room, err = mimi.ParseURI(string(ref[1:i]))
	rest = ref[i+1:]
	if err != nil || len(rest) < 8 || (ref[0] == outboxKindEntry && len(rest) != 8) {
		return 0, "", 0, nil, fmt.Errorf("%w: %w: reference %x in the outbox", federation.ErrNoItem, errRecord, ref)
	}
	return ref[0], room, binary.BigEndian.Uint64(rest), rest, nil
}

// shareOf is the room to which an entry in the outbox belongs. When too much waits for a peer, the rooms with the most lose
// their oldest entries. Welcomes stay: there are no more than KeyPackages that the peer has given away.
func shareOf(ref []byte) string {
	switch kind, room, _, _, err := parseReference(ref); {
	case err != nil: // a trust bundle, of which the last is enough
		return "bundles"
	case kind == outboxKindWelcome:
		return ""
	default:
		return string(room)
	}
}

// load turns a reference into what is sent. It waits until that is on disk: nothing leaves the node before.
func (n *Node) load(ref []byte) (federation.OutboxItem, error) {
	item := federation.OutboxItem{Ref: ref}
	if len(ref) == 1 && ref[0] == outboxKindBundle {
		item.Bundle, item.Fanout = true, n.ownBundle.Load().JSON()
		return item, nil
	}
	kind, room, seq, rest, err := parseReference(ref)
	if err != nil {
		return item, err
	}
	item.Room, item.Seq = room, seq
	r, err := n.openRoom(item.Room)
	if err != nil {
		return item, err
	}
	if r == nil {
		return item, fmt.Errorf("%w: %w: unknown room %s in the outbox", federation.ErrNoItem, errRecord, item.Room)
	}
	if err := n.settle(r, item.Seq); err != nil {
		return item, err
	}
	prefix := prefixFanout
	if kind == outboxKindEntry {
		if list := n.recent.get(room, seq, seq); list != nil {
			item.Fanout = list[0].fanout
			return item, nil
		}
		prefix = prefixLog
	}
	item.Fanout, err = n.store.Get(key(prefix, item.Room, rest))
	if err == nil && item.Fanout == nil {
		err = federation.ErrNoItem // it was older than retention
	}
	return item, err
}

// maxNotifies bounds the requests to notify that a peer gets at once, each of another room.
const maxNotifies = 32

// send delivers items to a peer: rooms at the same time, what is of one room in its order. What comes after a trust bundle
// may need it, and waits.
func (n *Node) send(ctx context.Context, peer string, items []federation.OutboxItem) []error {
	errs := make([]error, len(items))
	for at := 0; at < len(items); {
		if items[at].Bundle {
			if errs[at] = n.federation.PushBundle(ctx, peer, items[at].Fanout); errs[at] != nil && !federation.Permanent(errs[at]) {
				for i := at + 1; i < len(errs); i++ {
					errs[i] = errs[at]
				}
				return errs
			}
			at++
			continue
		}
		rooms := make(map[mimi.URI][]int) // positions in items
		for ; at < len(items) && !items[at].Bundle; at++ {
			rooms[items[at].Room] = append(rooms[items[at].Room], at)
		}
		var g errgroup.Group
		g.SetLimit(maxNotifies)
		for room, list := range rooms {
			g.Go(func() error {
				own := make([]federation.OutboxItem, len(list))
				for i, k := range list {
					own[i] = items[k]
				}
				for i, err := range federation.SendRuns(own, notifyLength, func(run []federation.OutboxItem) error {
					return n.sendRun(ctx, peer, room, run)
				}) {
					errs[list[i]] = err
				}
				return nil
			})
		}
		g.Wait()
	}
	return errs
}

// notifyLength says how many of a room's items go into one request: as long as no entry is missing between them, for the
// room's head goes with them. After a gap the peer took no part for a while.
func notifyLength(items []federation.OutboxItem) int {
	var next uint64
	for i, item := range items {
		if item.Ref[0] != outboxKindEntry {
			continue
		}
		if next != 0 && item.Seq != next {
			return i
		}
		next = item.Seq + 1
	}
	return len(items)
}

// sendRun sends items of a room in one request.
func (n *Node) sendRun(ctx context.Context, peer string, room mimi.URI, items []federation.OutboxItem) error {
	msgs := make([]federation.Sequenced, len(items))
	var entries [][]byte
	var first uint64
	for i, item := range items {
		msgs[i] = federation.Sequenced{Seq: item.Seq, Fanout: item.Fanout}
		if item.Ref[0] == outboxKindEntry {
			if len(entries) == 0 {
				first = item.Seq
			}
			entries = append(entries, item.Fanout)
		}
	}
	if len(entries) > 0 {
		head, err := n.notice(room, first, entries)
		if err != nil {
			return err
		}
		msgs[len(msgs)-1].Head = head
	}
	return n.federation.Notify(ctx, peer, room, msgs)
}

// pushBundle puts the own bundle into every peer's outbox.
func (n *Node) pushBundle() {
	changes := make(map[string][]byte)
	peers := n.trust.Peers()
	for _, p := range peers {
		k, v := n.outbox.Entry(p.Domain, []byte{outboxKindBundle})
		changes[string(k)] = v
	}
	if len(changes) == 0 {
		return
	}
	if _, err := n.store.Commit(changes, nil); err != nil {
		n.log.Error("queueing the own trust bundle", "err", err)
		return
	}
	for _, p := range peers {
		n.outbox.Wake(p.Domain)
	}
}

// tasks are goroutines that end with the node.
type tasks struct {
	mu     sync.Mutex
	closed bool // guarded by mu
	group  sync.WaitGroup
}

// Go runs f unless the node is closing, and says whether it does.
func (t *tasks) Go(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.group.Go(f)
	return true
}

func (t *tasks) wait() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.group.Wait()
}
