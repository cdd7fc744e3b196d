package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// A room's log is let go of from its beginning, by the sweeper:
//
//   - An entry that a client of this node hasn't said it has stored, or that waits for a peer, is kept for
//     Config.Retention.Days. Where the room's policy has all messages expire sooner, a hub keeps it as long as they last, but no
//     less than mimi.MinRetention.
//   - What all have stored goes after Config.Retention.StoredDays, which is for a peer that was restored from a backup, or
//     at a hub when the time is over for which the room's policy lets its history be shared, if that is longer. Followers
//     don't know a room's policy.
//   - A log's last entry always stays, so that a follower which was away learns from its number that others are gone, and
//     so do proposals that are pending.
//
// Ages are of the time that the node has run: clients can't come to a node that is down, nor does a step of its clock make
// anything old. They come from marks, how far a log was at some time, and not from what entries say, which another hub
// may have made up. An entry goes up to an eighth of its time too late, and never too early.
//
// One step looks at all rooms with something old; memory is taken for these alone. A room's entries, links and cutRecord
// change in one batch. Nothing that comes meanwhile is touched: what goes was there before cursors and outboxes were read, and a
// client that joins later has no use for it.

const (
	sweepPage = 1024              // keys that are read in one go
	maxMarks  = 256               // of a room
	maxServed = 2 * maintainEvery // that a step counts since the one before
	maxWaits  = 64                // rooms that are trimmed before the disk is waited for
)

// pointwise is how many entries of a log are deleted one by one and not as a range, which costs every read until the store's
// memory is flushed. Tests have less.
var pointwise uint64 = 1024

// cutRecord is where a room's log begins, and how old it is.
type cutRecord struct {
	first uint64 // the first entry that is kept
	asOf  uint64 // the last entry when the policy was read; 0 if it wasn't yet
	// The room's policy, in ms: for how long a hub keeps what hasn't reached all, and what has; 0: as the node does.
	expiry, history uint64
	stands          []standing // oldest first, both numbers growing
}

// standing says that a log had the entries up to seq when the node had run for at ms.
type standing struct{ at, seq uint64 }

func (c cutRecord) MarshalMLS(w *codec.Writer) {
	w.Uint64(c.first)
	w.Uint64(c.asOf)
	w.Uint64(c.expiry)
	w.Uint64(c.history)
	codec.WriteVector(w, c.stands, func(w *codec.Writer, m standing) {
		w.Uint64(m.at)
		w.Uint64(m.seq)
	})
}

func (c *cutRecord) UnmarshalMLS(r *codec.Reader) {
	*c = cutRecord{first: r.Uint64(), asOf: r.Uint64(), expiry: r.Uint64(), history: r.Uint64()}
	c.stands = codec.ReadVector(r, func(r *codec.Reader) standing { return standing{r.Uint64(), r.Uint64()} })
}

// note notes that the log has the entries up to last, unless it was noted less than step ms ago. Of the marks, those go
// without which the others are dense enough for their age.
func (c *cutRecord) note(now, last, step uint64) bool {
	if n := len(c.stands); n > 0 && (last <= c.stands[n-1].seq || now < c.stands[n-1].at+step) {
		return false
	}
	c.stands = append(c.stands, standing{now, last})
	for i := len(c.stands) - 2; i > 0; i-- {
		if before, after := c.stands[i-1].at, c.stands[i+1].at; after-before < (now-before)/8 || len(c.stands) > maxMarks {
			c.stands = slices.Delete(c.stands, i, i+1)
		}
	}
	return true
}

// older returns the last entry that is at least age ms old, 0 if none is.
func (c *cutRecord) older(now, age uint64) uint64 {
	var seq uint64
	for _, m := range c.stands {
		if m.at+age <= now {
			seq = m.seq
		}
	}
	return seq
}

// cut drops what is before first.
func (c *cutRecord) cut(first uint64) {
	c.first = first
	c.stands = slices.DeleteFunc(c.stands, func(m standing) bool { return m.seq < first })
}

// rewind forgets what is from seq on, in whose place there will be others.
func (c *cutRecord) rewind(seq uint64) {
	c.first = min(c.first, seq)
	c.stands = slices.DeleteFunc(c.stands, func(m standing) bool { return m.seq >= seq })
}

func cutKey(room mimi.URI) []byte { return append([]byte(prefixCut), room...) }

func cutOf(s store.Store, room mimi.URI) (*cutRecord, error) {
	b, err := s.Get(cutKey(room))
	if err != nil || b == nil {
		return &cutRecord{first: 1}, err
	}
	c := new(cutRecord)
	return c, decodeRecord(b, c, "cut")
}

// pages calls fn with all pairs under a prefix, without it, from short scans: no iterator is open for long, and fn may
// change what is there. It ends with the node.
func (n *Node) pages(prefix []byte, fn func(k, v []byte) error) error {
	type pair struct{ key, value []byte }
	start, end := slices.Clone(prefix), store.PrefixEnd(prefix)
	for {
		var page []pair
		if err := n.store.Scan(start, end, func(k, v []byte) bool {
			page = append(page, pair{slices.Clone(k), slices.Clone(v)})
			return len(page) < sweepPage
		}); err != nil {
			return err
		}
		for _, p := range page {
			if err := fn(p.key[len(prefix):], p.value); err != nil {
				return err
			}
		}
		if len(page) < sweepPage {
			return nil
		}
		if err := n.ctx.Err(); err != nil {
			return err
		}
		start = append(page[len(page)-1].key, 0)
	}
}

// retain are the bounds of this node, in ms.
func (c *Config) retain() (most, stored uint64) {
	days := func(n int, test time.Duration) uint64 {
		if test != 0 {
			return uint64(test.Milliseconds())
		}
		return uint64(n) * uint64((24 * time.Hour).Milliseconds())
	}
	return days(c.Retention.Days, c.retainMost), days(c.Retention.StoredDays, c.retainStored)
}

// served returns for how many ms the node has run, all incarnations together.
func (n *Node) served(now time.Time) (uint64, error) {
	b, err := n.store.Get([]byte(keyServed))
	if err != nil {
		return 0, err
	}
	if b != nil && len(b) != 16 {
		return 0, fmt.Errorf("%w: time served", errRecord)
	}
	wall := uint64(now.UnixMilli())
	var sum uint64
	if b != nil {
		sum = binary.BigEndian.Uint64(b)
		if before := binary.BigEndian.Uint64(b[8:]); wall > before {
			sum += min(wall-before, uint64(maxServed.Milliseconds()))
		}
	}
	_, err = n.store.Commit(map[string][]byte{keyServed: slices.Concat(be64(sum), be64(wall))}, nil)
	return sum, err
}

// trimLogs lets go of the beginnings of logs.
func (n *Node) trimLogs(wall time.Time) error {
	n.trimming.Lock()
	defer n.trimming.Unlock()
	now, err := n.served(wall)
	if err != nil {
		return err
	}
	_, stored := n.cfg.retain()
	soon := min(stored, uint64(mimi.MinRetention.Milliseconds())) // nothing goes sooner

	// needed are the last entries that nobody needs any more, of rooms with something old.
	needed := make(map[mimi.URI]uint64)
	var b store.Batch
	if err := n.pages([]byte(prefixRoom), func(k, v []byte) error {
		var rec roomRecord
		if err := decodeRecord(v, &rec, "room"); err != nil || rec.last == 0 {
			return err
		}
		uri := mimi.URI(k)
		c, err := cutOf(n.store, uri)
		if err != nil {
			return err
		}
		if c.note(now, rec.last, soon/8) {
			b.Set(cutKey(uri), codec.Marshal(c))
		}
		if c.older(now, soon) >= c.first {
			needed[uri] = math.MaxUint64
		}
		if b.Len() < sweepPage {
			return nil
		}
		return n.flush(&b)
	}); err != nil {
		return err
	}
	if err := n.flush(&b); err != nil || len(needed) == 0 {
		return err
	}
	if err := n.findNeeded(needed); err != nil {
		return err
	}
	var failed error
	t := trimmer{n: n, cuts: make(map[mimi.URI]uint64)}
	for uri, free := range needed {
		if err := t.trim(uri, now, free); err != nil { // the others are trimmed nevertheless
			failed = errors.Join(failed, fmt.Errorf("letting go of entries of %s: %w", uri, err))
		}
		if err := n.ctx.Err(); err != nil {
			break
		}
	}
	return errors.Join(failed, t.flush(), n.ctx.Err())
}

// flush writes a batch and empties it.
func (n *Node) flush(b *store.Batch) error {
	if b.Len() == 0 {
		return nil
	}
	wait, err := n.store.Apply(b)
	if err != nil {
		return err
	}
	b.Reset()
	return wait()
}

// findNeeded lowers what nobody needs to what clients of this node have stored and peers have got.
func (n *Node) findNeeded(needed map[mimi.URI]uint64) error {
	if err := n.pages([]byte(prefixMember), func(k, v []byte) error {
		i := slices.Index(k, 0)
		if i < 0 {
			return fmt.Errorf("%w: membership of %q", errRecord, k)
		}
		client, room := mimi.URI(k[:i]), mimi.URI(k[i+1:])
		free, ok := needed[room]
		if !ok {
			return nil
		}
		var m memberRecord
		if err := decodeRecord(v, &m, "membership"); err != nil {
			return err
		}
		acked, err := n.acked(client, room)
		if err != nil {
			return err
		}
		if has := max(m.start, acked); m.end == 0 || has < m.end {
			needed[room] = min(free, has)
		}
		return nil
	}); err != nil {
		return err
	}
	return n.pages([]byte(prefixOutbox), func(_, v []byte) error {
		kind, room, seq, _, err := parseReference(v)
		if free, ok := needed[room]; err == nil && ok && kind == outboxKindEntry {
			needed[room] = min(free, seq-1)
		}
		return nil // others than entries are no references of rooms
	})
}

// trimmer lets go of the beginnings of logs, those of several rooms before it waits for the disk.
type trimmer struct {
	n     *Node
	batch store.Batch // of hosted rooms
	waits []func() error
	cuts  map[mimi.URI]uint64 // where logs begin
}

// flush makes durable what was done.
func (t *trimmer) flush() error {
	err := t.n.flush(&t.batch)
	for _, wait := range t.waits {
		err = errors.Join(err, wait())
	}
	t.n.recent.forget(t.cuts)
	t.waits = nil
	clear(t.cuts)
	return err
}

// trim lets go of a log's beginning: of what nobody needs beyond free, and of what is too old for anybody.
func (t *trimmer) trim(uri mimi.URI, now, free uint64) error {
	b, err := t.n.store.Get(roomKey(uri))
	if err != nil {
		return err
	}
	var rec roomRecord
	if err := decodeRecord(b, &rec, "room"); err != nil {
		return err
	}
	if rec.hosted {
		err = t.cut(&t.batch, uri, rec, now, free)
	} else { // a hub may take numbers back, and nothing of its new entries may go
		var r *room
		if r, err = t.n.openRoom(uri); err != nil {
			return err
		}
		var b store.Batch
		var wait func() error
		r.mu.Lock()
		if err = t.cut(&b, uri, r.record, now, free); err == nil && b.Len() > 0 {
			wait, err = t.n.store.Apply(&b)
		}
		r.mu.Unlock()
		if wait != nil {
			t.waits = append(t.waits, wait)
		}
	}
	if err == nil && (t.batch.Len() >= sweepPage || len(t.waits) >= maxWaits) {
		err = t.flush()
	}
	return err
}

// cut fills a batch with what trim does. The log grows at its end only meanwhile.
func (t *trimmer) cut(b *store.Batch, uri mimi.URI, rec roomRecord, now, free uint64) error {
	n := t.n
	c, err := cutOf(n.store, uri)
	if err != nil {
		return err
	}
	if rec.hosted && c.asOf != rec.last {
		if err := n.readPolicy(uri, c); err != nil {
			return err
		}
		c.asOf = rec.last
		b.Set(cutKey(uri), codec.Marshal(c))
	}
	most, stored := n.cfg.retain()
	stored = max(stored, c.history)
	if c.expiry != 0 {
		most = min(most, c.expiry)
	}
	end := max(c.older(now, most), min(c.older(now, min(stored, most)), free))
	end = min(end, rec.last-1)
	for _, seq := range rec.pending {
		end = min(end, seq-1)
	}
	if end < c.first {
		return nil
	}
	from := c.first
	c.cut(end + 1)
	b.Set(cutKey(uri), codec.Marshal(c))
	if end-from < pointwise {
		for seq := from; seq <= end; seq++ {
			b.Delete(key(prefixLog, uri, be64(seq)))
			b.Delete(linkKey(uri, seq-1)) // the link before the first entry stays
		}
	} else {
		b.DeleteRange(key(prefixLog, uri), key(prefixLog, uri, be64(end+1)))
		b.DeleteRange(key(prefixLink, uri), linkKey(uri, end))
	}
	t.cuts[uri] = end + 1
	n.metrics.trimmed.Add(float64(end - from + 1))
	n.log.Debug("log trimmed", "room", uri, "first", end+1, "last", rec.last)
	return nil
}

// readPolicy reads what a hosted room's policy says of its log. A room that isn't loaded stays so.
func (n *Node) readPolicy(uri mimi.URI, c *cutRecord) error {
	n.roomsMu.Lock()
	r := n.rooms[uri]
	n.roomsMu.Unlock()
	var d mls.AppDataDictionary
	if r != nil {
		r.mu.Lock()
		d = r.group.Dictionary()
		r.mu.Unlock()
	} else {
		g, err := mls.LoadPublicGroup(n.publicConfig(), n.groupState(uri))
		if err != nil {
			return err
		}
		d = g.Dictionary()
	}
	expiry, history, err := mimi.Retention(d)
	c.expiry, c.history = uint64(expiry.Milliseconds()), uint64(history.Milliseconds())
	return err
}
