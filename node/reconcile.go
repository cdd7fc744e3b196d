package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
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

const (
	pageBytes   = 4 << 20 // of entries in one LogPage; one larger entry goes alone
	askTimeout  = 30 * time.Second
	askInterval = time.Second
)

// errSilent says that a peer can't be asked, or has taken the time that it may take.
var errSilent = errors.New("no answer in the time that there is")

// inquiry is what a restored node asks its peers.
type inquiry struct {
	n    *Node
	left map[string]time.Duration // what each peer may still take; another isn't asked
	log  func(ctx context.Context, peer string, room mimi.URI, req *federation.LogRequest) (*federation.LogPage, error)
}

// lateRooms are rooms that are followed of which the hub hasn't been asked yet what was lost here, or there.
type lateRooms struct {
	mu     sync.Mutex
	rooms  map[mimi.URI]bool // guarded by mu
	asking sync.Mutex        // held while a hub is asked
}

func lateKey(room mimi.URI) []byte { return append([]byte(prefixLate), room...) }

// reconcile asks the peers what came after the backup that the store was restored from, if it was.
func (n *Node) reconcile(ctx context.Context) error {
	if !n.restored.Load() {
		return nil
	}
	n.log.Warn("this node was restored from a backup: asking peers what came after")
	var rooms []*room
	partners := make(map[string]bool) // who is waited for
	var bad error
	if err := store.ScanPrefix(n.store, []byte(prefixRoom), func(k, _ []byte) bool {
		var r *room
		if r, bad = n.openRoom(mimi.URI(k)); bad != nil {
			return false
		}
		rooms = append(rooms, r)
		return true
	}); err != nil || bad != nil {
		return errors.Join(err, bad)
	}
	for _, r := range rooms {
		if !r.hosted {
			partners[r.uri.Domain()] = true
			continue
		}
		peers, err := r.followers()
		if err != nil {
			return err
		}
		for p := range peers {
			partners[p] = true
		}
	}
	q, err := n.inquire(ctx, partners)
	if err != nil {
		return err
	}
	for _, r := range rooms {
		if r.hosted {
			err = q.hosted(ctx, r)
		} else if err = q.followed(ctx, r); errors.Is(err, errSilent) {
			n.log.Warn("the hub of a room is silent, and is asked later what came after the backup", "room", r.uri)
			err = n.postpone(r.uri)
		}
		if err != nil {
			return fmt.Errorf("reconciling %s: %w", r.uri, err)
		}
	}
	if _, err := n.store.Commit(map[string][]byte{keyRestored: nil}, nil); err != nil {
		return err
	}
	n.restored.Store(false)
	n.log.Info("reconciled", "rooms", len(rooms))
	return nil
}

// followers returns the providers that take part in a room hosted here.
func (r *room) followers() (map[string]struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	who, err := r.who()
	if err != nil {
		return nil, err
	}
	return who.peers, nil
}

// inquire asks every peer what it knows of this node, and waits for partners until they can be asked, or the time is over.
func (n *Node) inquire(ctx context.Context, partners map[string]bool) (*inquiry, error) {
	q := &inquiry{n: n, left: make(map[string]time.Duration), log: n.federation.Log}
	deadline := time.Now().Add(n.cfg.restoreWait())
	var mu sync.Mutex // of what follows
	var failed error
	var asking sync.WaitGroup
	for _, p := range n.trust.Peers() {
		asking.Go(func() {
			known, err := n.known(ctx, p.Domain, partners[p.Domain], deadline)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				n.log.Warn("a peer can't be asked what came after the backup", "peer", p.Domain, "shares rooms", partners[p.Domain], "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			q.left[p.Domain] = n.cfg.restoreWait()
			if err := n.learn(ctx, p.Domain, known); err != nil {
				if reason(err) == nil && !errors.Is(err, authority.ErrBundle) {
					failed = errors.Join(failed, err)
				}
				n.log.Warn("what a peer knows of this node is wrong", "peer", p.Domain, "err", err)
			}
		})
	}
	asking.Wait()
	return q, errors.Join(failed, ctx.Err())
}

// known asks a peer what it knows of this node, until the deadline if that is worth waiting for.
func (n *Node) known(ctx context.Context, peer string, wait bool, deadline time.Time) (*federation.Known, error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	for {
		asking, cancel := context.WithTimeout(ctx, askTimeout)
		known, err := n.federation.Known(asking, peer)
		cancel()
		if err == nil || federation.Permanent(err) || !wait || ctx.Err() != nil || time.Now().Add(askInterval).After(deadline) {
			return known, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(askInterval):
		}
	}
}

// learn takes what a peer knows of this node.
func (n *Node) learn(ctx context.Context, peer string, known *federation.Known) error {
	if err := n.checkSuperseded(peer, known.Head); err != nil {
		return err
	}
	if len(known.Bundle) == 0 {
		return nil
	}
	b, err := authority.ParseBundle(known.Bundle)
	if err != nil {
		return err
	}
	changed, err := n.embedded.Resume(ctx, b)
	if changed {
		n.log.Info("the trust bundle goes on from what a peer has of it", "peer", peer, "sequence", n.ownBundle.Load().Sequence())
	}
	return err
}

// ask asks a peer for a page of a log, as often as it may take. It fails with errSilent if the peer can't say anything, else
// with its refusal.
func (q *inquiry) ask(ctx context.Context, peer string, room mimi.URI, req *federation.LogRequest) (*federation.LogPage, error) {
	err := error(errSilent)
	for q.left[peer] > 0 {
		began := time.Now()
		asking, cancel := context.WithTimeout(ctx, min(askTimeout, q.left[peer]))
		page, bad := q.log(asking, peer, room, req)
		cancel()
		if bad == nil {
			q.left[peer] -= time.Since(began)
			return page, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !federation.Unavailable(bad) {
			return nil, bad
		}
		err = fmt.Errorf("%w: %w", errSilent, bad)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(min(askInterval, q.left[peer])):
		}
		q.left[peer] -= time.Since(began)
	}
	return nil, err
}

// history is what a follower shows of a room hosted here: a chain from the own log to a head of the own key.
type history struct {
	peer string
	*chain.Signed
	at map[uint64]chain.Hash // of the ends of its pages
}

// better says whether a history is of a later incarnation, or a longer one of the same.
func (h *history) better(than *history) bool {
	return than == nil || h.Incarnation > than.Incarnation || h.Incarnation == than.Incarnation && h.Seq > than.Seq
}

// hosted takes what followers have of a room's log.
func (q *inquiry) hosted(ctx context.Context, r *room) error {
	n := q.n
	peers, err := r.followers()
	if err != nil {
		return err
	}
	last := r.durable.Load()
	own, err := n.head(r, last)
	if rf := reason(err); rf != nil {
		n.log.Warn("a head can't be signed", "room", r.uri, "reason", rf.detail)
		return nil
	}
	if err != nil {
		return err
	}
	best, err := q.best(ctx, r, own, peers)
	if err == nil && best != nil {
		err = q.take(ctx, r, own, best)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		n.log.Error("what followers have of a room isn't taken, or not all of it", "room", r.uri, "err", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil {
		return r.broken
	}
	var b store.Batch
	if _, err := n.lose(&b, r.uri, r.record.last+1); err != nil {
		return err
	}
	wait, err := n.store.Apply(&b)
	if err != nil {
		return err
	}
	n.log.Info("reconciled a room", "room", r.uri, "entries", last, "taken", r.record.last-last)
	return wait()
}

// best returns the longest history that a follower shows of the last incarnation of which one does, nil if none shows more
// than is here. It fails if another one isn't on the way to it.
func (q *inquiry) best(ctx context.Context, r *room, own *head, peers map[string]struct{}) (*history, error) {
	var all []*history
	var best *history
	for _, peer := range slices.Sorted(maps.Keys(peers)) {
		h, err := q.history(ctx, r, own, peer, 0)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			q.n.log.Warn("a follower doesn't show what it has of a room", "room", r.uri, "peer", peer, "err", err)
			continue
		}
		if h == nil {
			continue
		}
		if all = append(all, h); h.better(best) {
			best = h
		}
	}
	for _, h := range all {
		if h == best || h.Incarnation < best.Incarnation {
			continue
		}
		way, err := q.history(ctx, r, own, best.peer, h.Seq)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		if way == nil || way.at[h.Seq] != h.Chain {
			return nil, refuse("notAllowed", "%s and %s have different histories", best.peer, h.peer)
		}
	}
	return best, nil
}

// history reads through what a follower has beyond the own log; nil if there is nothing. The chain at stop is among those
// that are returned, unless that is 0.
func (q *inquiry) history(ctx context.Context, r *room, own *head, peer string, stop uint64) (*history, error) {
	h := &history{peer: peer, at: map[uint64]chain.Hash{own.Seq: own.Chain}}
	seq, at := own.Seq, own.Chain
	for {
		page, err := q.ask(ctx, peer, r.uri, &federation.LogRequest{After: seq, Head: own.encoded})
		if err != nil {
			return nil, err
		}
		if h.Signed == nil {
			if h.Signed, err = q.n.shown(r.uri, page.Head); err != nil {
				return nil, err
			}
			if h.Signed == nil || h.Seq <= own.Seq {
				return nil, nil // it has nothing that isn't here
			}
		}
		for _, e := range page.Entries {
			if e.Seq != seq+1 || seq >= h.Seq {
				return nil, refuse("malformed", "entry %d after entry %d, with a head at %d", e.Seq, seq, h.Seq)
			}
			seq, at = e.Seq, at.Next(e.Seq, chain.NewLink(e.Fanout, e.Context))
			if seq == stop {
				h.at[seq] = at
			}
		}
		h.at[seq] = at
		if seq == h.Seq {
			if at != h.Chain {
				return nil, refuse("malformed", "the entries don't lead to the head %d", h.Seq)
			}
			return h, nil
		}
		if len(page.Entries) == 0 {
			return nil, refuse("malformed", "the log ends with %d, before the head %d", seq, h.Seq)
		}
	}
}

// shown reads the head that a follower shows of a room hosted here: one of an incarnation before, nil if there is none.
func (n *Node) shown(room mimi.URI, b []byte) (*chain.Signed, error) {
	if len(b) == 0 {
		return nil, nil
	}
	s := new(chain.Signed)
	if err := decode(b, s); err != nil {
		return nil, err
	}
	if s.Seq > federation.MaxSeq {
		return nil, refuse("malformed", "a head at entry %d", s.Seq)
	}
	if err := n.verifyOwn(room, s); err != nil {
		return nil, refuse("malformed", "a head that this node hasn't signed: %v", err)
	}
	if s.Incarnation >= n.incarnation {
		return nil, nil // its hub was heard of again already
	}
	return s, nil
}

// verifyOwn says whether a head is one that this node has signed for a room.
func (n *Node) verifyOwn(room mimi.URI, s *chain.Signed) error {
	if s.Room != room {
		return refuse("malformed", "a head of another room")
	}
	_, sender, err := n.keys.hub(s.Suite)
	if err != nil {
		return err
	}
	return s.Verify(sender.SignatureKey)
}

// take fetches a history once more and makes it the room's log.
func (q *inquiry) take(ctx context.Context, r *room, own *head, h *history) error {
	for seq, at := own.Seq, own.Chain; seq < h.Seq; {
		page, err := q.ask(ctx, h.peer, r.uri, &federation.LogRequest{After: seq, Head: own.encoded})
		if err != nil {
			return err
		}
		next := seq
		for _, e := range page.Entries {
			next++
			at = at.Next(next, chain.NewLink(e.Fanout, e.Context))
		}
		if want, ok := h.at[next]; next == seq || !ok || want != at {
			return refuse("malformed", "another log than before after entry %d", seq)
		}
		for i := range page.Entries {
			seq++
			if err := q.n.run(r, func() (*change, error) { return q.n.orderAgain(r, seq, &page.Entries[i]) }); err != nil {
				return fmt.Errorf("entry %d: %w", seq, err)
			}
		}
	}
	return nil
}

// orderAgain fills the change with an entry that this hub has ordered before and lost. r.mu is held.
func (n *Node) orderAgain(r *room, seq uint64, e *federation.LogEntry) (*change, error) {
	if seq != r.record.last+1 {
		return nil, fmt.Errorf("the log ends with entry %d", r.record.last)
	}
	f := new(mimi.FanoutMessage)
	if err := decode(e.Fanout, f); err != nil {
		return nil, err
	}
	if err := checkFanout(r.uri, f); err != nil {
		return nil, err
	}
	before, err := r.who()
	if err != nil {
		return nil, err
	}
	peers := make(map[string]struct{})
	for p := range before.peers {
		peers[p] = struct{}{}
	}
	c := n.begin(r, peers)
	state := c.batch.Prefixed(key(prefixGroup, r.uri))
	var answer codec.Marshaler = &mimi.UpdateRoomResponse{Code: mimi.UpdateSuccess, AcceptedTimestamp: f.Timestamp}
	var info *mls.StagedInfo
	switch m := f.Message; {
	case m.Private != nil:
		answer = &mimi.SubmitMessageResponse{Code: mimi.SubmitAccepted, AcceptedTimestamp: f.Timestamp, Frank: f.Frank}
	case commits(f):
		staged, err := r.group.CheckCommit(m.Public)
		if err != nil {
			return nil, err
		}
		if err := r.group.Apply(state, staged, nil); err != nil {
			return nil, err
		}
		info, c.record.pending = staged.Info(), nil
		after, err := r.who()
		if err != nil {
			r.broken = err
			return nil, err
		}
		for p := range after.peers {
			c.peers[p] = struct{}{}
		}
	}
	if !commits(f) && f.Message.Public != nil || len(f.ExternalProposals) > 0 {
		for _, m := range proposalsOf(f) {
			if m.Public == nil {
				r.broken = errRecord
				return nil, refuse("malformed", "a proposal that isn't a PublicMessage")
			}
			s, err := r.group.CheckProposal(m.Public)
			if err == nil {
				err = r.group.ApplyProposal(state, s)
			}
			if err != nil {
				r.broken = err // the group in memory may be ahead of the store
				return nil, err
			}
		}
		c.pend(seq)
	}
	c.log(e.Fanout)
	if c.link.context != e.Context {
		r.broken = errRecord
		return nil, errors.New("it leads to another epoch than it did")
	}
	if info != nil {
		after, err := r.who()
		if err != nil {
			return nil, err
		}
		c.noteRenewed(info)
		n.noteMembers(c, info, before.list, after.list, seq)
		for _, m := range info.Added {
			if info.External {
				break // noteMembers has it
			}
			user, client, err := n.verifier.IdentityOf(m.Leaf.Credential)
			if err == nil && client.Domain() == n.cfg.Domain {
				setMember(&c.batch, client, user, r.uri, seq) // it may have had its Welcome
			}
		}
	}
	c.answer(messageHash(f.Message), seq, f.Timestamp, answer)
	return c, nil
}

// lose marks the local clients of a room, and returns them: those who have stored entries from a number on have what isn't
// in the log.
func (n *Node) lose(b *store.Batch, room mimi.URI, from uint64) (clients []mimi.URI, err error) {
	var bad error
	err = store.ScanPrefix(n.store, []byte(prefixMember), func(k, v []byte) bool {
		client, uri, ok := bytes.Cut(k, []byte{0})
		if !ok || string(uri) != string(room) {
			return true
		}
		var m memberRecord
		if bad = decodeRecord(v, &m, "membership"); bad != nil {
			return false
		}
		clients = append(clients, mimi.URI(client))
		if m.anew == 0 || from < m.anew {
			m.anew = from
			b.Set(key(prefixMember, mimi.URI(client), uri), codec.Marshal(m))
			b.Delete(key(prefixAcked, mimi.URI(client), uri)) // which may be of entries that are lost
		}
		return true
	})
	return clients, errors.Join(err, bad)
}

// followed asks the hub of a room for the entries after the last one that is here. It fails with errSilent if the hub says
// nothing; if it refuses, or what it says is wrong, they are lost.
func (q *inquiry) followed(ctx context.Context, r *room) error {
	n, hub := q.n, r.uri.Domain()
	for {
		h := r.heads.last.Load()
		if h == nil {
			return nil // a hub that keeps no chain, or has sent nothing yet
		}
		last := r.durable.Load()
		page, err := q.ask(ctx, hub, r.uri, &federation.LogRequest{After: last, Head: h.encoded})
		if errors.Is(err, errSilent) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			n.log.Warn("a hub doesn't say what came in a room", "room", r.uri, "after", last, "err", err)
			return nil
		}
		if len(page.Entries) == 0 {
			err := n.endsAt(ctx, r, page.Head)
			if reason(err) != nil {
				n.log.Warn("a hub's head can't be taken", "room", r.uri, "err", err)
				return nil
			}
			return err
		}
		msgs := make([]federation.Sequenced, len(page.Entries))
		for i, e := range page.Entries {
			msgs[i] = federation.Sequenced{Seq: e.Seq, Fanout: e.Fanout}
		}
		msgs[len(msgs)-1].Head = page.Head
		if err := n.notify(hub, r.uri, msgs); err != nil {
			if reason(err) == nil {
				return err
			}
			n.log.Warn("a hub's log can't be taken", "room", r.uri, "err", err)
			return nil
		}
		if r.durable.Load() <= last {
			return nil
		}
	}
}

// endsAt drops what a hub has lost, as the head of its whole log shows that it has signed in a later incarnation.
func (n *Node) endsAt(ctx context.Context, r *room, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s := new(chain.Signed)
	if err := decode(b, s); err != nil {
		return err
	}
	if err := n.verifyHead(ctx, r.uri, s); err != nil {
		return err
	}
	if err := n.fence(s); err != nil {
		return err
	}
	return n.run(r, func() (*change, error) {
		own := r.heads.last.Load()
		if own == nil || s.Incarnation <= own.Incarnation || s.Seq >= r.record.last {
			return nil, nil
		}
		if l, err := n.linkAt(r.uri, s.Seq); err != nil || l == nil || l.chain != s.Chain {
			return nil, err // it has others, which come
		}
		c := n.begin(r, nil)
		c.head = newHead(s)
		c.batch.Set(headKey(r.uri), c.head.encoded)
		return c, c.cutOff(s.Seq + 1)
	})
}

// heardOf has the rooms of a hub asked for whose incarnation is later than that of any head that is known.
func (n *Node) heardOf(hub string, incarnation uint64) error {
	last, err := n.latestOf(hub)
	if err != nil || last == nil || last.Incarnation >= incarnation {
		return err
	}
	provider, err := mimi.ProviderURI(hub)
	if err != nil {
		return err
	}
	var rooms []mimi.URI
	if err := store.ScanPrefix(n.store, []byte(prefixRoom+provider+"/"), func(k, _ []byte) bool {
		rooms = append(rooms, provider+"/"+mimi.URI(k))
		return true
	}); err != nil {
		return err
	}
	for _, uri := range rooms {
		if n.late.has(uri) {
			continue
		}
		r, err := n.openRoom(uri)
		if err != nil {
			return err
		}
		if h := r.heads.last.Load(); h == nil || h.Incarnation >= incarnation {
			continue
		}
		if err := n.postpone(uri); err != nil {
			return err
		}
	}
	return nil
}

// postpone has the hub of a room asked when it can be.
func (n *Node) postpone(room mimi.URI) error {
	if _, err := n.store.Commit(map[string][]byte{string(lateKey(room)): {}}, nil); err != nil {
		return err
	}
	n.late.mu.Lock()
	defer n.late.mu.Unlock()
	n.late.rooms[room] = true
	return nil
}

func (l *lateRooms) has(room mimi.URI) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rooms[room]
}

// of returns the rooms of a hub.
func (l *lateRooms) of(hub string) []mimi.URI {
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []mimi.URI
	for room := range l.rooms {
		if room.Domain() == hub {
			list = append(list, room)
		}
	}
	return list
}

// catchUp asks the hub of a room what was lost, if that is still to be done.
func (n *Node) catchUp(ctx context.Context, room mimi.URI) error {
	if !n.late.has(room) {
		return nil
	}
	n.late.asking.Lock()
	defer n.late.asking.Unlock()
	if !n.late.has(room) {
		return nil
	}
	r, err := n.openRoom(room)
	if err != nil {
		return err
	}
	q := &inquiry{n: n, left: map[string]time.Duration{room.Domain(): askTimeout}, log: n.federation.Log}
	if err := q.followed(ctx, r); errors.Is(err, errSilent) {
		return refuse("unavailable", "%s has to say first what came before", room.Domain())
	} else if err != nil {
		return err
	}
	if _, err := n.store.Commit(map[string][]byte{string(lateKey(room)): nil}, nil); err != nil {
		return err
	}
	n.late.mu.Lock()
	defer n.late.mu.Unlock()
	delete(n.late.rooms, room)
	return nil
}

// tellLog answers a peer that was restored from a backup.
func (n *Node) tellLog(ctx context.Context, from string, uri mimi.URI, req *federation.LogRequest) (*federation.LogPage, error) {
	if req.After >= federation.MaxSeq {
		return nil, refuse("malformed", "no such entry")
	}
	s := new(chain.Signed)
	if err := decode(req.Head, s); err != nil {
		return nil, err
	}
	r, err := n.openRoom(uri)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, refuse("notFound", "there is no room %s", uri)
	}
	page := new(federation.LogPage)
	if r.hosted {
		if err := n.settled(); err != nil {
			return nil, err
		}
		if err := n.verifyOwn(uri, s); err != nil {
			return nil, refuse("notAllowed", "the head isn't one of %s", n.cfg.Domain)
		}
		r.mu.Lock()
		err := r.takesPart(submitter{domain: from})
		r.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if req.After < s.Seq {
			return nil, refuse("notAllowed", "who has had entry %d needs none before", s.Seq)
		}
	} else {
		if uri.Domain() != from {
			return nil, refuse("notAllowed", "%s isn't the hub of %s", from, uri)
		}
		if err := n.verifyHead(ctx, uri, s); err != nil {
			return nil, err
		}
		if err := n.fence(s); err != nil {
			return nil, err
		}
		if h := r.heads.last.Load(); h != nil {
			page.Head = h.encoded
		}
	}
	size := 0
	var bad error
	if err := n.store.Scan(key(prefixLog, uri, be64(req.After+1)), key(prefixLog, uri, be64(r.durable.Load()+1)), func(k, v []byte) bool {
		seq := binary.BigEndian.Uint64(k[len(k)-8:])
		if seq != req.After+1+uint64(len(page.Entries)) {
			return false
		}
		l, err := n.linkAt(uri, seq)
		if err != nil || l == nil {
			bad = err
			return false
		}
		if size += len(v); size > pageBytes && len(page.Entries) > 0 {
			return false
		}
		page.Entries = append(page.Entries, federation.LogEntry{Seq: seq, Fanout: bytes.Clone(v), Context: l.context})
		return len(page.Entries) < federation.MaxLogEntries
	}); err != nil || bad != nil {
		return nil, errors.Join(err, bad)
	}
	if r.hosted && len(page.Entries) == 0 {
		h, err := n.head(r, r.durable.Load())
		if err != nil {
			return nil, err
		}
		page.Head = h.encoded
	} else if r.hosted {
		var fanouts [][]byte
		for _, e := range page.Entries {
			fanouts = append(fanouts, e.Fanout)
		}
		if page.Head, err = n.notice(uri, req.After+1, fanouts); err != nil {
			return nil, err
		}
	}
	return page, nil
}
