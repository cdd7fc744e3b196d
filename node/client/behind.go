package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// A node lets go of a log's old entries. It tells a client that has stored less than where the log begins so, and the
// client enters the room anew by an external commit. What was said in between is a Gap, which is kept with the room. So it
// is when the hub was restored from a backup, as a head shows, and has lost entries that the client has.
//
// What hasn't reached a member yet stays in a log for mimi.MinRetention at least. So a client that had everything that its
// node had less than that time ago, and is told to be behind, is told by a hub or a node that withholds entries: a HubFault. A
// node that was cut off from the room's hub until the hub let go of entries looks alike.

// Who was removed in the meantime doesn't come back like that: a client that isn't in the group any more, or whose user may
// not be, is out of the room, as it would be with the entry that did it.

// A hub, or a node, that has clients enter a room anew over and over costs the room a commit each time: after anewBurst of
// them one follows the other after anewInterval.
const (
	anewBurst    = 4
	anewInterval = 30 * time.Second
)

var (
	errTooOften = errors.New("client: the room has to be entered anew too often")
	// errLost says that the room's log doesn't go on from what this client has of it.
	errLost = errors.New("the node has no entry that follows the last one that was processed")
	// errTrimmed is errLost for a log that goes on beyond what this client has.
	errTrimmed = fmt.Errorf("%w, but later ones", errLost)
	// errRemoved says that this client was removed meanwhile.
	errRemoved = errors.New("this client isn't in the group any more")
)

const faultWithheld = "entries are withheld that the log has had since this client was last connected"

// fallBehind has a room entered anew whose log doesn't go on from what this client has.
func (c *Client) fallBehind(x *api.Behind) []Event {
	r, err := c.Room(mimi.URI(x.Room))
	if err != nil {
		return nil
	}
	recent := c.o.Time().Sub(c.lastCurrent()) < mimi.MinRetention
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.header.left || r.behind {
		return nil
	}
	next := r.header.cursor + 1
	restored, why := r.restored(x.Head), errLost
	if restored == nil && x.Last >= next {
		why = errTrimmed
	}
	events := append(restored, r.freeze(next, fmt.Errorf("%w: it has %d, the log ends with %d", why, r.header.cursor, x.Last))...)
	r.behind = true
	if recent && why == errTrimmed {
		r.ledger.fault, r.ledger.dirty = faultWithheld, true
		events = append(events, HubFault{Room: r.uri, Seq: next, Reason: faultWithheld})
		r.c.log.Error("a hub or a node withholds entries", "room", r.uri, "seq", next)
	}
	return events
}

// restored says that a head shows that the hub was restored from a backup, without some of what this client has. mu is held.
func (r *Room) restored(head []byte) []Event {
	s, before := r.readHead(head), r.ledger.verified
	if s == nil || before == nil || s.Incarnation <= before.Incarnation {
		return nil
	}
	hub, err := r.hubSender()
	if err != nil || s.Verify(hub.SignatureKey) != nil {
		return nil
	}
	// It isn't written before the room is entered anew: a process that begins in between is to judge alike.
	r.ledger.verified, r.ledger.proven = s, false
	return []Event{HubRestored{Room: r.uri, Seq: s.Seq, Lost: true}}
}

// trimmed says whether this client's place in a room is in question: entries are missing that may have removed it.
func (c *Client) trimmed(room mimi.URI) bool {
	r, err := c.Room(room)
	if err != nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Is(r.frozen, errTrimmed)
}

// out ends the membership of a client that was removed in what is missing here.
func (r *Room) out() error {
	var w waits
	r.mu.Lock()
	e := entry{room: r, state: new(store.Batch)}
	r.frozen, r.behind = nil, false
	e.removed()
	r.saveHeader(e.state)
	err := w.apply(r.c, e.state)
	r.touch()
	r.mu.Unlock()
	if err := errors.Join(err, w.wait()); err != nil {
		return err
	}
	r.c.events.send(e.events)
	r.c.acknowledgeSoon() // which says that this client has left
	return nil
}

// Gaps returns the gaps in what this client has of the room, in the order of the log.
func (r *Room) Gaps() ([]Gap, error) {
	var gaps []Gap
	err := store.ScanPrefix(r.c.db, r.key(roomGap), func(key, value []byte) bool {
		if len(key) == 8 && len(value) == 8 {
			gaps = append(gaps, Gap{Room: r.uri, After: binary.BigEndian.Uint64(value), Next: binary.BigEndian.Uint64(key)})
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("client: read the gaps of %s: %w", r.uri, err)
	}
	return gaps, nil
}

// gap returns what is missing of a room that is entered anew by the entry seq, nil if nothing is. mu is held.
func (r *Room) gap(seq uint64) *Gap {
	if r.header.left || seq == r.header.cursor+1 && !errors.Is(r.frozen, errLost) {
		return nil
	}
	return &Gap{Room: r.uri, After: r.header.cursor, Next: seq + 1}
}

// noteCurrent notes that this client has everything that its node has.
func (c *Client) noteCurrent(w *waits) error {
	now := c.o.Time()
	c.mu.Lock()
	c.current = now
	c.mu.Unlock()
	b := new(store.Batch)
	b.Set(keyCurrent, binary.BigEndian.AppendUint64(nil, uint64(max(now.Unix(), 0))))
	return w.apply(c, b)
}

// lastCurrent returns when this client had everything that its node had.
func (c *Client) lastCurrent() time.Time {
	if c.isLive() {
		return c.o.Time()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current
}

func loadCurrent(db store.Store) (time.Time, error) {
	b, err := db.Get(keyCurrent)
	if err != nil || len(b) != 8 {
		return time.Time{}, err
	}
	return time.Unix(int64(binary.BigEndian.Uint64(b)), 0), nil
}
