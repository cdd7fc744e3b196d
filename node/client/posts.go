package client

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node/store"
)

// Post is a message as it is to be shown: with what later messages have made of it.
type Post struct {
	Message             // as it was sent first; but Data is that of the last edit, nil after a deletion
	Edited    bool      // shown differently than it was when others replied and reacted
	Deleted   bool      // by its sender, or by one who may
	Reactions []Message // that weren't taken back, oldest first
}

// Posts returns the room's messages with edits, deletions and reactions applied to those that they are for, in the order
// of the room's log. Edits change the body and nothing else. What is for a message that this client doesn't have, maybe
// one from before it joined, stands by itself.
func (r *Room) Posts() []Post {
	type place struct{ post, reaction int } // reaction is -1 for the post itself
	var posts []Post
	places := make(map[content.MessageID]place)
	for _, m := range r.Messages() {
		c := m.Content
		if c == nil {
			posts = append(posts, Post{Message: m})
			continue
		}
		// Edits name the first version; one that names another edit is taken for the same message.
		if at, ok := places[c.Replaces]; ok && !c.Replaces.IsZero() {
			p := &posts[at.post]
			// One who may delete what others have sent says whether it is a reaction.
			other := c.Deletes() && m.moderates && (c.Body.Disposition == content.Reaction) == (at.reaction >= 0)
			switch {
			case at.reaction >= 0 && (other || p.Reactions[at.reaction].User == m.User):
				if p.Reactions[at.reaction].Data = m.Data; c.Deletes() {
					p.Reactions[at.reaction].Data = nil
				}
			case at.reaction < 0 && (other || p.User == m.User) && !p.Deleted:
				if p.Data, p.Edited = m.Data, true; c.Deletes() {
					p.Data, p.Edited, p.Deleted = nil, false, true
				}
			default:
				continue // of a message that is gone, or of somebody else's that this client never had
			}
			places[m.ID] = at
			continue
		}
		if at, ok := places[c.InReplyTo]; ok && c.Reaction() && at.reaction < 0 {
			p := &posts[at.post]
			places[m.ID] = place{at.post, len(p.Reactions)}
			p.Reactions = append(p.Reactions, m)
			continue
		}
		at := place{len(posts), -1}
		places[m.ID] = at
		p := Post{Message: m, Edited: !c.Replaces.IsZero() && !c.Deletes(), Deleted: c.Deletes()}
		if !c.Replaces.IsZero() {
			places[c.Replaces] = at // later versions of what isn't here
		}
		posts = append(posts, p)
	}
	for i := range posts {
		var kept []Message
		for _, m := range posts[i].Reactions {
			if m.Data != nil {
				kept = append(kept, m)
			}
		}
		posts[i].Reactions = kept
	}
	return posts
}

// unread is when a message expires that counts from when it is read.
const unread = math.MaxUint64

// expiry returns when a message is to be deleted that has an expiration, in s since 1970.
func expiry(e *content.Expiration) uint64 {
	if e.Relative {
		return unread
	}
	return uint64(e.Time)
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
		var due []byte
		if due, err = r.c.db.Get(r.key64(roomExpiry, m.Seq)); err == nil && len(due) == 8 && binary.BigEndian.Uint64(due) == unread {
			b := new(store.Batch)
			b.Set(r.key64(roomExpiry, m.Seq), binary.BigEndian.AppendUint64(nil, uint64(r.c.o.Time().Unix())+uint64(m.Content.Expires.Time)))
			err = w.apply(r.c, b)
		}
	}
	r.mu.Unlock()
	if err != nil {
		return fmt.Errorf("client: mark a message as read: %w", err)
	}
	return w.wait()
}

// expired returns the numbers of the messages that have expired and are still here, without edits of them.
func (r *Room) expired() (map[uint64]bool, error) {
	now := uint64(r.c.o.Time().Unix())
	found := make(map[uint64]bool)
	err := store.ScanPrefix(r.c.db, r.key(roomExpiry), func(key, value []byte) bool {
		if len(key) == 8 && len(value) == 8 && binary.BigEndian.Uint64(value) <= now {
			found[binary.BigEndian.Uint64(key)] = true
		}
		return true
	})
	return found, err
}

// scan tells of every stored message whether it has expired: by itself, or with the message that it edits.
func (r *Room) scan(expired map[uint64]bool, f func(m Message, expired bool)) error {
	gone := make(map[content.MessageID]bool)
	return store.ScanPrefix(r.c.db, r.key(roomMessage), func(key, value []byte) bool {
		if len(key) != 8 {
			return true
		}
		seq := binary.BigEndian.Uint64(key)
		m, err := r.message(seq, value)
		if err != nil {
			r.c.log.Error("stored message is damaged", "room", r.uri, "seq", seq, "err", err)
			return true
		}
		over := expired[seq]
		if c := m.Content; c != nil {
			if over = over || gone[c.Replaces]; over {
				gone[m.ID] = true
			}
		}
		f(m, over)
		return true
	})
}

// expire deletes what has expired. The IDs stay, so that nobody sends it again, or an edit of it.
func (r *Room) expire(b *store.Batch) error {
	expired, err := r.expired()
	if err == nil && len(expired) > 0 {
		err = r.scan(expired, func(m Message, expired bool) {
			if expired {
				b.Delete(r.key64(roomMessage, m.Seq))
				b.Delete(r.key64(roomExpiry, m.Seq))
			}
		})
	}
	if err != nil {
		return fmt.Errorf("client: delete expired messages of %s: %w", r.uri, err)
	}
	return nil
}

// expire deletes what has expired in all rooms.
func (c *Client) expire() error {
	b := new(store.Batch)
	for _, r := range c.Rooms() {
		if err := r.expire(b); err != nil {
			return err
		}
	}
	if b.Len() == 0 {
		return nil
	}
	var w waits
	if err := w.apply(c, b); err != nil {
		return err
	}
	return w.wait()
}
