package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node/store"
)

// A message is deleted from the store when it expires, with its edits, deletions and reactions; until then, and should the
// device have been off, it isn't shown any more. When that is says the message (draft-ietf-mimi-content, "Expiration"), within
// what the room's policy allows (draft-ietf-mimi-room-policy-03, Section 6.8), which counts from when the hub accepted the
// message:
//
//   - Where messages have to expire, one that doesn't say when does after the policy's standard time, or else its longest;
//     one that counts from when it is read does after the longest time though nobody reads it.
//   - What says less than the shortest time, or more than the longest, expires then.
//   - Where messages mustn't expire, none does.
//
// Messages are sent as the policy wants them, and what doesn't fit is refused. The bodies stay nowhere; the numbers of IDs do, so
// that nobody sends such a message again, or an edit of it.

// unread is when a message expires that counts from when it is read.
const unread = math.MaxUint64

const (
	longest = 365 * 24 * 3600 // s after which content expires at the latest
	slack   = 60              // s that a message may be composed before it is sent
)

// errExpiry says that a message expires otherwise than the room's policy allows.
var errExpiry = errors.New("the room's policy has messages expire otherwise")

// expirationPolicy returns the room's policy, nil if it has none. mu is held.
func (r *Room) expirationPolicy() (*mimi.MessageExpiration, error) {
	x := &r.expiration
	if x.group != r.group || x.epoch != r.group.Epoch() {
		policy, err := mimi.ExpirationOf(r.group.Dictionary())
		if err != nil {
			return nil, err
		}
		x.group, x.epoch, x.policy = r.group, r.group.Epoch(), policy
	}
	return x.policy, nil
}

// dueBy returns when a message is to be deleted that the hub accepted at a time, in s since 1970; 0 if it isn't to be.
func dueBy(p *mimi.MessageExpiration, e *content.Expiration, accepted time.Time) uint64 {
	at := uint64(max(accepted.Unix(), 0))
	var due uint64
	switch {
	case e == nil:
	case e.Relative:
		due = unread
	default:
		due = uint64(e.Time)
	}
	if p == nil {
		return due
	}
	switch {
	case p.Expiring == mimi.Forbidden:
		return 0
	case due == 0 && p.Expiring == mimi.Optional:
		return 0
	case due == 0 && p.Default != nil:
		return at + uint64(*p.Default)
	case due == 0 || due == unread && p.Expiring == mimi.Required:
		return at + uint64(p.Max)
	case due == unread:
		return unread
	}
	return min(max(due, at+uint64(p.Min)), at+uint64(p.Max))
}

// fitExpiry gives a message that is to be sent the expiration that the room's policy wants, or refuses the one that it has. mu
// is held.
func (r *Room) fitExpiry(m *content.Message) error {
	p, err := r.expirationPolicy()
	if err != nil || p == nil {
		return err
	}
	if m.Expires == nil {
		if p.Expiring == mimi.Forbidden || p.Expiring == mimi.Optional && p.Default == nil {
			return nil
		}
		after := p.Max
		if p.Default != nil {
			after = *p.Default
		}
		at := r.c.o.Time().Unix() + min(int64(after), longest)
		m.Expires = &content.Expiration{Time: uint32(min(max(at, 0), math.MaxUint32))}
		return nil
	}
	if p.Expiring == mimi.Forbidden {
		return fmt.Errorf("%w: not at all", errExpiry)
	}
	after := int64(m.Expires.Time)
	if !m.Expires.Relative {
		after -= r.c.o.Time().Unix()
	}
	if after < int64(p.Min)-slack || after > int64(p.Max) {
		return fmt.Errorf("%w: after %d to %d s, not %d", errExpiry, p.Min, p.Max, after)
	}
	return nil
}

// dueKey is where a message stands in the order in which they expire.
func (r *Room) dueKey(due, seq uint64) []byte {
	k := binary.BigEndian.AppendUint64([]byte(prefixDue), due)
	k = append(append(k, r.uri...), 0)
	return binary.BigEndian.AppendUint64(k, seq)
}

// parseDue reads what dueKey writes.
func parseDue(key []byte) (due uint64, room mimi.URI, seq uint64, ok bool) {
	rest := key[len(prefixDue):]
	if len(rest) < 17 || rest[len(rest)-9] != 0 {
		return 0, "", 0, false
	}
	return binary.BigEndian.Uint64(rest), mimi.URI(rest[8 : len(rest)-9]), binary.BigEndian.Uint64(rest[len(rest)-8:]), true
}

// due returns when the message of a number expires, 0 if it doesn't.
func (r *Room) due(seq uint64) (uint64, error) {
	b, err := r.c.db.Get(r.key64(roomExpiry, seq))
	if err != nil || len(b) != 8 {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// setDue has a message expire at a time instead of another one, 0 if it had none. When it is applied expireSoon has to be
// called. mu is held.
func (r *Room) setDue(b *store.Batch, seq, before, due uint64) {
	if before != 0 && before != unread {
		b.Delete(r.dueKey(before, seq))
	}
	b.Set(r.key64(roomExpiry, seq), binary.BigEndian.AppendUint64(nil, due))
	if due != unread {
		b.Set(r.dueKey(due, seq), nil)
	}
}

// MarkRead says that the user has read a message, durably: from now on its expiration counts, if it is one that begins
// then.
func (r *Room) MarkRead(m Message) error {
	if m.Content == nil || m.Content.Expires == nil || !m.Content.Expires.Relative {
		return nil
	}
	var w waits
	r.mu.Lock()
	err := r.c.gone()
	if err == nil {
		var before uint64
		due := uint64(r.c.o.Time().Unix()) + uint64(m.Content.Expires.Time)
		if before, err = r.due(m.Seq); err == nil && due < before { // the first time counts
			b := new(store.Batch)
			r.setDue(b, m.Seq, before, due)
			err = w.apply(r.c, b)
			r.c.expireSoon()
		}
	}
	r.mu.Unlock()
	if err != nil {
		return fmt.Errorf("client: mark a message as read: %w", err)
	}
	return w.wait()
}

// over calls fn with what has expired and is still here, in that order, until it returns false.
func (c *Client) over(fn func(room mimi.URI, seq, due uint64) bool) error {
	end := binary.BigEndian.AppendUint64([]byte(prefixDue), uint64(max(c.o.Time().Unix(), 0))+1)
	return c.db.Scan([]byte(prefixDue), end, func(key, _ []byte) bool {
		due, room, seq, ok := parseDue(key)
		return !ok || fn(room, seq, due)
	})
}

// expired returns the numbers of the room's messages that have expired and are still here, and of those that are shown with
// them.
func (r *Room) expired() (map[uint64]bool, error) {
	found := make(map[uint64]bool)
	if err := r.c.over(func(room mimi.URI, seq, _ uint64) bool {
		if room == r.uri {
			found[seq] = true
		}
		return true
	}); err != nil {
		return nil, fmt.Errorf("client: read what has expired: %w", err)
	}
	var posts []uint64
	for seq := range found {
		posts = append(posts, seq)
	}
	for _, seq := range posts {
		parts, err := r.parts(seq)
		if err != nil {
			return nil, fmt.Errorf("client: read what has expired: %w", err)
		}
		for _, part := range parts {
			found[part] = true
		}
	}
	return found, nil
}

// erase deletes a message and what is shown with it. mu is held.
func (r *Room) erase(b *store.Batch, seq uint64) error {
	parts, err := r.parts(seq)
	if err != nil {
		return err
	}
	at, err := r.placeAt(seq)
	if err != nil {
		return err
	}
	if at != nil {
		b.Delete(r.partKey(at.post, seq))
	}
	for _, s := range append(parts, seq) {
		due, err := r.due(s)
		if err != nil {
			return err
		}
		if due != 0 && due != unread {
			b.Delete(r.dueKey(due, s))
		}
		b.Delete(r.key64(roomExpiry, s))
		b.Delete(r.key64(roomMessage, s))
		b.Delete(r.key64(roomPlace, s))
		if s != seq {
			b.Delete(r.partKey(seq, s))
		}
	}
	return nil
}

// maxExpired bounds how many messages are deleted in one step.
const maxExpired = 256

// expire deletes what has expired in all rooms.
func (c *Client) expire() error {
	for {
		type item struct {
			room     mimi.URI
			seq, due uint64
		}
		var list []item
		if err := c.over(func(room mimi.URI, seq, due uint64) bool {
			list = append(list, item{room, seq, due})
			return len(list) < maxExpired
		}); err != nil {
			return err
		}
		var w waits
		var events []Event
		for _, x := range list {
			r, err := c.Room(x.room)
			if err != nil {
				return err
			}
			b := new(store.Batch)
			r.mu.Lock() // an edit that comes meanwhile finds the message, or that it is gone
			b.Delete(r.dueKey(x.due, x.seq))
			due, err := r.due(x.seq)
			if err == nil && due == x.due {
				err = r.erase(b, x.seq)
			}
			if err == nil {
				err = w.apply(c, b)
			}
			r.mu.Unlock()
			if err != nil {
				return errors.Join(fmt.Errorf("client: delete expired messages of %s: %w", x.room, err), w.wait())
			}
			if due == x.due {
				events = append(events, Expired{Room: x.room, Seq: x.seq})
			}
		}
		if err := w.wait(); err != nil {
			return err
		}
		c.events.send(events)
		if len(list) < maxExpired {
			return nil
		}
	}
}

// nextDue returns when the next message expires, false if none does.
func (c *Client) nextDue() (at time.Time, ok bool, err error) {
	err = c.db.Scan([]byte(prefixDue), store.PrefixEnd([]byte(prefixDue)), func(key, _ []byte) bool {
		var due uint64
		if due, _, _, ok = parseDue(bytes.Clone(key)); ok {
			at = time.Unix(int64(min(due, math.MaxInt64/2)), 0)
		}
		return !ok
	})
	return at, ok, err
}

// expireSoon has it looked at anew when the next message expires.
func (c *Client) expireSoon() {
	select {
	case c.expiring <- struct{}{}:
	default:
	}
}

// expireInTime deletes messages as they expire. The clock is looked at again after housekeeping, for it may be set.
func (c *Client) expireInTime(ctx context.Context) {
	for {
		if err := c.expire(); err != nil {
			if c.gone() != nil {
				return
			}
			c.log.Warn("deleting expired messages failed", "err", err)
		}
		wait := housekeeping
		at, ok, err := c.nextDue()
		if err != nil {
			c.log.Warn("reading when messages expire failed", "err", err)
		} else if ok {
			wait = max(min(wait, at.Sub(c.o.Time())), 10*time.Millisecond)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-c.expiring:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}
