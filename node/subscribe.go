package node

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// Bounds of one SubscribeResponse; an entry larger than that goes alone.
const (
	maxEvents     = 256
	maxEventBytes = 1 << 20
)

// stream is one Subscribe call: cursors over the logs of the client's rooms.
type stream struct {
	n       *Node
	s       *session
	l       *listener
	out     *connect.ServerStream[api.SubscribeResponse]
	cursors map[mimi.URI]*cursor
	welcome uint64 // the last Welcome that was sent

	batch []*api.Event
	bytes int
}

// cursor is where a stream is in a room's log.
type cursor struct {
	next    uint64 // the first entry that wasn't sent
	end     uint64 // the last entry that the client gets, 0 if there is no end yet
	chained bool   // the client knows the chain at the entry before next
	head    *head  // goes with an entry to come, or went with one

	behind bool // the client has to enter the room anew before it gets anything more
	told   bool // that
	lost   bool // it is behind because the hub was restored, and has lost what the client has
}

// lose has a client be behind that has stored what a restored hub has lost.
func (c *cursor) lose(m *memberRecord) {
	if m.anew != 0 && c.next > m.anew {
		c.behind, c.lost = true, true
	}
}

// Subscribe streams what is new for the client until an error ends it.
func (a clientAPI) Subscribe(ctx context.Context, req *connect.Request[api.SubscribeRequest], out *connect.ServerStream[api.SubscribeResponse]) error {
	s := sessionOf(ctx)
	l := a.n.listeners.add(s.client, s.user, a.n.cfg.Limits.Streams)
	if l == nil {
		return refuse("busy", "%s has %d streams open", s.client, a.n.cfg.Limits.Streams)
	}
	a.n.push.wakes(s.client)
	defer func() {
		a.n.listeners.remove(l)
		if err := a.n.push.sleeps(s.client, true); err != nil {
			a.n.log.Error("watching the rooms of a client that went away", "client", s.client, "err", err)
		}
	}()
	if err := a.n.auth.check(s); err != nil {
		return err
	}
	st := &stream{n: a.n, s: s, l: l, out: out, cursors: make(map[mimi.URI]*cursor), welcome: req.Msg.Welcome}
	a.n.welcomeNumbers.seen(s.client, req.Msg.Welcome)
	given := make(map[mimi.URI]uint64)
	for _, c := range req.Msg.Cursors {
		uri, err := roomURI(c.Room)
		if err != nil {
			return err
		}
		given[uri] = c.Seq
	}
	members, err := a.n.members(s.client)
	if err != nil {
		return err
	}
	for uri, m := range members {
		after, ok := given[uri]
		if !ok {
			if after, err = a.n.acked(s.client, uri); err != nil {
				return err
			}
		}
		c := &cursor{next: max(m.start, min(after, federation.MaxSeq)) + 1, end: m.end}
		if c.lose(&m); m.anew != 0 && !c.lost {
			if err := a.n.keepsUp(s.client, uri, m); err != nil {
				return err
			}
		}
		st.cursors[uri] = c
		a.n.listeners.listen(l, uri)
	}
	for _, uri := range slices.Sorted(maps.Keys(given)) {
		if _, ok := members[uri]; !ok { // it was forgotten with what came after a backup
			if err := st.add(&api.Event{Event: &api.Event_Behind{Behind: &api.Behind{Room: string(uri)}}}, 0); err != nil {
				return err
			}
		}
	}
	if err := st.run(ctx); err != nil {
		if ctx.Err() != nil {
			return nil // the client went away
		}
		return err
	}
	return nil
}

// run sends what there is, the live marker, and then what comes.
func (st *stream) run(ctx context.Context) error {
	if err := st.sendWelcomes(); err != nil {
		return err
	}
	for _, uri := range slices.Sorted(maps.Keys(st.cursors)) {
		if err := st.sendRoom(ctx, uri); err != nil {
			return err
		}
		if err := st.askCommit(uri); err != nil {
			return err
		}
	}
	if err := st.add(&api.Event{Event: &api.Event_Live{Live: new(api.Live)}}, 0); err != nil {
		return err
	}
	if err := st.flush(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-st.l.wake:
		}
		news := st.l.take()
		if err := cmp.Or(news.ended, st.n.auth.check(st.s)); err != nil {
			return err
		}
		for _, domain := range slices.Sorted(maps.Keys(news.trust)) {
			if err := st.add(&api.Event{Event: &api.Event_Trust{Trust: &api.TrustChange{Domain: domain}}}, 0); err != nil {
				return err
			}
		}
		if err := st.sendConsents(news.consents); err != nil {
			return err
		}
		if news.claimed {
			if err := st.sendPublished(); err != nil {
				return err
			}
		}
		if news.welcomes {
			if err := st.sendWelcomes(); err != nil {
				return err
			}
		}
		for _, uri := range news.sortedRooms() {
			if news.rooms[uri] || st.cursors[uri] == nil {
				if err := st.refreshCursor(uri); err != nil {
					return err
				}
			}
			if err := st.sendRoom(ctx, uri); err != nil {
				return err
			}
		}
		if err := st.sendEphemerals(news.ephemeral); err != nil {
			return err
		}
		if err := st.flush(); err != nil {
			return err
		}
	}
}

// refreshCursor looks at the client's membership anew: it may have begun, or ended.
func (st *stream) refreshCursor(uri mimi.URI) error {
	m, err := st.n.member(st.s.client, uri)
	if err != nil {
		return err
	}
	if m == nil {
		delete(st.cursors, uri)
		return nil
	}
	c := st.cursors[uri]
	if c == nil || c.lost && m.anew == 0 {
		st.cursors[uri] = &cursor{next: m.start + 1, end: m.end}
		return nil
	}
	if c.behind && c.next <= m.start {
		c.behind, c.told, c.chained = false, false, false
	}
	c.next, c.end = max(c.next, m.start+1), m.end
	c.lose(m)
	return nil
}

// sendWelcomes sends the Welcomes that wait for the client, and has the stream follow their rooms.
func (st *stream) sendWelcomes() error {
	type waiting struct {
		number uint64
		rec    welcomeRecord
	}
	var list []waiting
	var bad error
	prefix := key(prefixWelcome, st.s.client)
	err := st.n.store.Scan(append(slices.Clone(prefix), be64(st.welcome+1)...), store.PrefixEnd(prefix), func(k, v []byte) bool {
		w := waiting{number: binary.BigEndian.Uint64(k[len(k)-8:])}
		if bad = decodeRecord(v, &w.rec, "Welcome"); bad != nil {
			return false
		}
		list = append(list, w)
		return true
	})
	if err := errors.Join(err, bad); err != nil {
		return err
	}
	for _, w := range list {
		r, err := st.n.openRoom(w.rec.room)
		if err != nil {
			return err
		}
		if r != nil {
			// It may have been applied and not be on disk yet.
			if err := st.n.settle(r, w.rec.seq); err != nil {
				return err
			}
		}
		fanout, err := st.n.store.Get(key(prefixFanout, w.rec.room, w.rec.fanout))
		if err != nil {
			return err
		}
		st.welcome = w.number
		if fanout == nil {
			continue // it waited longer than retention; the client can join by an external commit
		}
		if err := st.add(&api.Event{Event: &api.Event_Welcome{Welcome: &api.Welcome{
			Number: w.number, Room: string(w.rec.room), Seq: w.rec.seq, Fanout: fanout,
		}}}, len(fanout)); err != nil {
			return err
		}
		st.n.listeners.listen(st.l, w.rec.room)
		if err := st.refreshCursor(w.rec.room); err != nil {
			return err
		}
		if c := st.cursors[w.rec.room]; c != nil {
			c.chained = false // the client begins anew
		}
		st.l.tell(func(n *news) { n.addRoom(w.rec.room, true) })
	}
	return nil
}

// sendPublished says how many KeyPackages of the client are left.
func (st *stream) sendPublished() error {
	have, err := st.n.publish(st.s.submitter(), nil, false)
	if err != nil {
		return err
	}
	return st.add(&api.Event{Event: &api.Event_KeyPackages{KeyPackages: st.n.published(have)}}, 0)
}

// sendRoom sends the entries of a room's log that are on disk and that the stream hasn't sent.
func (st *stream) sendRoom(ctx context.Context, uri mimi.URI) error {
	c := st.cursors[uri]
	if c == nil {
		return nil
	}
	r, err := st.n.openRoom(uri)
	if err != nil || r == nil {
		return err
	}
	for {
		if c.behind {
			return st.sendBehind(r, c)
		}
		last := r.durable.Load()
		if c.end != 0 {
			last = min(last, c.end)
		}
		if c.next > last {
			return nil
		}
		list, err := st.n.entries(uri, c.next, last)
		if err != nil {
			return err
		}
		// Nothing is passed over in silence: the log begins later, or a part of it never came here.
		sound := 0
		for sound < len(list) && list[sound].seq == c.next+uint64(sound) {
			sound++
		}
		if c.behind = sound == 0; c.behind {
			continue
		}
		list = list[:sound]
		// A head beyond the list is kept until its entry is sent, however many later ones are signed meanwhile.
		if c.head == nil || c.head.Seq < list[0].seq {
			if c.head = st.n.headFor(r, list[len(list)-1].seq); c.head != nil {
				r.advance(c.head.Seq) // it is of what is on disk, and may have come a moment before its entry is known to be
			}
		}
		for _, e := range list {
			entry := &api.LogEntry{Room: string(uri), Seq: e.seq, Fanout: e.fanout}
			if c.head != nil && c.head.Seq == e.seq {
				entry.Head = c.head.encoded
			}
			if !c.chained && c.head != nil {
				l, err := st.n.linkAt(uri, e.seq-1)
				if err != nil {
					return err
				}
				if c.chained = l != nil; c.chained {
					entry.Previous = l.chain[:]
				}
			}
			if err := st.add(&api.Event{Event: &api.Event_Entry{Entry: entry}}, len(e.fanout)); err != nil {
				return err
			}
			c.next = e.seq + 1
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// sendBehind tells the client, once, that the log doesn't go on from what it has.
func (st *stream) sendBehind(r *room, c *cursor) error {
	if c.told {
		return nil
	}
	c.told = true
	behind := &api.Behind{Room: string(r.uri), Last: r.durable.Load()}
	if h := st.n.headFor(r, behind.Last); h != nil {
		behind.Head = h.encoded
	}
	st.n.log.Info("a client is behind the log", "room", r.uri, "client", st.s.client, "next", c.next, "last", behind.Last, "lost", c.lost)
	return st.add(&api.Event{Event: &api.Event_Behind{Behind: behind}}, 0)
}

// entries returns the entries of a room's log from one number to another, or the first of them: what goes into one
// response. No iterator stays open while a slow client reads.
func (n *Node) entries(room mimi.URI, from, to uint64) ([]logged, error) {
	if list := n.recent.get(room, from, to); list != nil {
		return list, nil
	}
	var list []logged
	size := 0
	err := n.store.Scan(key(prefixLog, room, be64(from)), key(prefixLog, room, be64(to+1)), func(k, v []byte) bool {
		list = append(list, logged{binary.BigEndian.Uint64(k[len(k)-8:]), slices.Clone(v)})
		size += len(v)
		return len(list) < maxEvents && size < maxEventBytes
	})
	return list, err
}

// askCommit asks for a commit in a room hosted here that nobody could join by an external commit.
func (st *stream) askCommit(uri mimi.URI) error {
	r, err := st.n.openRoom(uri)
	if err != nil || r == nil || !r.hosted {
		return err
	}
	r.mu.Lock()
	wanted := r.group.GroupInfo() == nil
	r.mu.Unlock()
	if !wanted {
		return nil
	}
	return st.add(&api.Event{Event: &api.Event_CommitWanted{CommitWanted: &api.CommitWanted{Room: string(uri)}}}, 0)
}

// add puts an event into the batch, which is sent before it grows past its bounds.
func (st *stream) add(e *api.Event, size int) error {
	if len(st.batch) == maxEvents || (len(st.batch) > 0 && st.bytes+size > maxEventBytes) {
		if err := st.flush(); err != nil {
			return err
		}
	}
	st.batch = append(st.batch, e)
	st.bytes += size
	return nil
}

// flush sends the batch. A client that was revoked in the meantime gets nothing more.
func (st *stream) flush() error {
	if len(st.batch) == 0 {
		return nil
	}
	if err := cmp.Or(st.l.endedWith(), st.n.auth.check(st.s)); err != nil {
		return err
	}
	if err := st.out.Send(&api.SubscribeResponse{Events: st.batch}); err != nil {
		return refuse("unavailable", "the stream broke off")
	}
	st.n.metrics.delivered.Add(float64(len(st.batch)))
	st.batch, st.bytes = nil, 0
	return nil
}

// keepsUp notes that a client has stored nothing of what a restored hub has lost.
func (n *Node) keepsUp(client, room mimi.URI, m memberRecord) error {
	k, had := string(key(prefixMember, client, []byte(room))), codec.Marshal(m)
	m.anew = 0
	_, err := n.store.Commit(map[string][]byte{k: codec.Marshal(m)}, map[string][]byte{k: had})
	return err
}

// acked returns the last entry of a room that a client said it has stored.
func (n *Node) acked(client, room mimi.URI) (uint64, error) {
	b, err := n.store.Get(key(prefixAcked, client, []byte(room)))
	if err != nil || b == nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("%w: cursor", errRecord)
	}
	return binary.BigEndian.Uint64(b), nil
}

// acknowledge deletes Welcomes that the client has stored, moves its cursors, and ends memberships.
func (n *Node) acknowledge(s *session, req *api.AcknowledgeRequest) error {
	changes := make(map[string][]byte)
	prefix := key(prefixWelcome, s.client)
	waiting := make(map[mimi.URI]bool) // rooms of Welcomes that the client hasn't stored
	var bad error
	if err := store.ScanPrefix(n.store, prefix, func(k, v []byte) bool {
		if len(k) == 8 && binary.BigEndian.Uint64(k) <= req.Welcome {
			changes[string(prefix)+string(k)] = nil
			return true
		}
		var rec welcomeRecord
		bad = decodeRecord(v, &rec, "Welcome")
		waiting[rec.room] = true
		return bad == nil
	}); err != nil || bad != nil {
		return errors.Join(err, bad)
	}
	for _, c := range req.Cursors {
		uri, err := roomURI(c.Room)
		if err != nil {
			return err
		}
		m, err := n.member(s.client, uri)
		if err != nil {
			return err
		}
		if m == nil {
			continue
		}
		r, err := n.openRoom(uri)
		if err != nil {
			return err
		}
		if r != nil { // nobody has what isn't in the log yet
			changes[string(key(prefixAcked, s.client, []byte(uri)))] = be64(min(c.Seq, r.durable.Load()))
		}
	}
	if len(changes) > 0 {
		if _, err := n.store.Commit(changes, nil); err != nil {
			return fmt.Errorf("acknowledging: %w", err)
		}
	}
	for _, room := range req.Left {
		uri, err := roomURI(room)
		if err != nil {
			return err
		}
		if waiting[uri] {
			continue // it was added again in the meantime
		}
		if err := n.leave(s, uri); err != nil {
			return err
		}
	}
	return nil
}

// leave ends a client's membership, and with the last client of a user the user's interest in the room. A membership
// that changes at the same moment stays.
func (n *Node) leave(s *session, uri mimi.URI) error {
	k := string(key(prefixMember, s.client, []byte(uri)))
	have, err := n.store.Get([]byte(k))
	if err != nil || have == nil {
		return err
	}
	changes := map[string][]byte{k: nil, string(key(prefixAcked, s.client, []byte(uri))): nil}
	if uri.Domain() != n.cfg.Domain { // else the participant list says who takes part
		others := false
		var failed error
		err := store.ScanPrefix(n.store, key(prefixDevice, s.user), func(k, _ []byte) bool {
			if client := mimi.URI(k); client != s.client {
				var m *memberRecord
				m, failed = n.member(client, uri)
				others = others || m != nil
			}
			return failed == nil
		})
		if err := errors.Join(err, failed); err != nil {
			return err
		}
		if !others {
			changes[string(key(prefixUserRoom, s.user, []byte(uri)))] = nil
		}
	}
	_, err = n.store.Commit(changes, map[string][]byte{k: have})
	n.listeners.member(s.client, uri)
	return err
}
