package client

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"

	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls/codec"
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
// one from before it joined, stands by itself. It reads all messages; LastPosts reads a part.
func (r *Room) Posts() []Post { return postsOf(r.Messages()) }

// postsOf makes posts of messages in the order of the log.
func postsOf(list []Message) []Post {
	type place struct{ post, reaction int } // reaction is -1 for the post itself
	var posts []Post
	places := make(map[content.MessageID]place)
	for _, m := range list {
		c := m.Content
		if c == nil {
			posts = append(posts, Post{Message: m})
			continue
		}
		// Edits name the first version; one that names another edit is taken for the same message.
		if at, ok := places[c.Replaces]; ok && !c.Replaces.IsZero() {
			places[m.ID] = at
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
			} // else of a message that is gone, or of somebody else's that this client never had
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

// place is where a message is shown.
type place struct {
	post     uint64 // the number of the message that it is shown with
	reaction bool   // as a reaction to it, or a later version of one
}

// MarshalMLS implements codec.Marshaler, for the store.
func (p place) MarshalMLS(w *codec.Writer) {
	w.Uint64(p.post)
	w.Optional(p.reaction)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *place) UnmarshalMLS(r *codec.Reader) {
	p.post = r.Uint64()
	p.reaction = r.Optional()
}

// placeAt returns where the message of a number is shown, if that isn't by itself.
func (r *Room) placeAt(seq uint64) (*place, error) {
	b, err := r.c.db.Get(r.key64(roomPlace, seq))
	if err != nil || b == nil {
		return nil, err
	}
	p := new(place)
	return p, codec.Unmarshal(b, p)
}

// placeOf returns where the message of an ID is shown, nil if it isn't here.
func (r *Room) placeOf(id content.MessageID) (*place, error) {
	seq, err := r.seqOf(id)
	if err == nil && seq == 0 {
		var b []byte
		if b, err = r.c.db.Get(r.key(roomStandIn, id[:]...)); len(b) == 8 {
			seq = binary.BigEndian.Uint64(b)
		}
	}
	if err != nil || seq == 0 {
		return nil, err
	}
	p, err := r.placeAt(seq)
	if err != nil {
		return nil, err
	}
	if p == nil {
		p = &place{post: seq}
	}
	if b, err := r.c.db.Get(r.key64(roomMessage, p.post)); err != nil || b == nil { // it has expired
		return nil, err
	}
	return p, nil
}

// index notes in a batch with which message m is shown, as Posts does it.
func (r *Room) index(b *store.Batch, m *Message) error {
	c := m.Content
	var at *place
	if !c.Replaces.IsZero() {
		var err error
		if at, err = r.placeOf(c.Replaces); err != nil {
			return err
		}
	}
	if at == nil && c.Reaction() {
		to, err := r.placeOf(c.InReplyTo)
		if err != nil {
			return err
		}
		if to != nil && !to.reaction {
			at = &place{to.post, true}
		}
	}
	switch {
	case at != nil && at.post == m.Seq: // it was indexed before
	case at != nil:
		before, err := r.placeAt(m.Seq) // until what it is for was given
		if err != nil {
			return err
		}
		if before != nil && before.post != at.post {
			b.Delete(r.partKey(before.post, m.Seq))
		}
		b.Set(r.key64(roomPlace, m.Seq), codec.Marshal(at))
		b.Set(r.partKey(at.post, m.Seq), nil)
	case !c.Replaces.IsZero():
		b.Set(r.key(roomStandIn, c.Replaces[:]...), binary.BigEndian.AppendUint64(nil, m.Seq))
	}
	return nil
}

func (r *Room) partKey(post, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(r.key64(roomPart, post), seq)
}

// parts returns the numbers of the messages that are shown with one.
func (r *Room) parts(post uint64) (seqs []uint64, err error) {
	err = store.ScanPrefix(r.c.db, r.key64(roomPart, post), func(key, _ []byte) bool {
		if len(key) == 8 {
			seqs = append(seqs, binary.BigEndian.Uint64(key))
		}
		return true
	})
	return seqs, err
}

// between returns the messages from one number to another, but for those that are in expired, at most n of them; n is no
// bound if it is 0.
func (r *Room) between(from, to uint64, n int, expired map[uint64]bool) (list []Message, err error) {
	end := r.key64(roomMessage, to+1)
	if to+1 == 0 {
		end = store.PrefixEnd(r.key(roomMessage))
	}
	prefix := len(r.key(roomMessage))
	err = r.c.db.Scan(r.key64(roomMessage, from), end, func(key, value []byte) bool {
		if len(key) != prefix+8 {
			return true
		}
		seq := binary.BigEndian.Uint64(key[prefix:])
		if expired[seq] {
			return true
		}
		m, err := r.message(seq, value)
		if err != nil {
			r.c.log.Error("stored message is damaged", "room", r.uri, "seq", seq, "err", err)
			return true
		}
		list = append(list, m)
		return n == 0 || len(list) < n
	})
	return list, err
}

// back collects the last n messages before a number (0: the end) that pick takes, the oldest first. It reads windows of the
// log that grow as long as they have too few, so that it costs what it finds and not the room's size.
func (r *Room) back(before uint64, n int, expired map[uint64]bool, pick func(*Message) (bool, error)) ([]Message, error) {
	if last := r.Seq() + 1; before == 0 || before > last {
		before = last
	}
	var found []Message
	for window := uint64(2 * max(n, 8)); before > 1 && len(found) < n; window *= 2 {
		from := uint64(1)
		if before > window {
			from = before - window
		}
		list, err := r.between(from, before-1, 0, expired)
		if err != nil {
			return nil, err
		}
		for _, m := range slices.Backward(list) {
			ok, err := pick(&m)
			if err != nil {
				return nil, err
			}
			if ok {
				found = append(found, m)
			}
			if len(found) == n {
				break
			}
		}
		before = from
	}
	slices.Reverse(found)
	return found, nil
}

// LastMessages returns the last n messages before a number, or of all if that is 0, in the order of the log: pages of
// Messages, from the end. The next page ends before the number of this page's first message.
func (r *Room) LastMessages(before uint64, n int) ([]Message, error) {
	expired, err := r.expired()
	if err != nil {
		return nil, err
	}
	return r.back(before, n, expired, func(*Message) (bool, error) { return true, nil })
}

// MessagesAfter returns the first n messages after a number: pages of Messages, from the beginning.
func (r *Room) MessagesAfter(after uint64, n int) ([]Message, error) {
	if n < 1 || after+1 == 0 {
		return nil, nil
	}
	expired, err := r.expired()
	if err != nil {
		return nil, err
	}
	return r.between(after+1, ^uint64(0), n, expired)
}

// LastPosts returns the last n posts before a number, or of all if that is 0: pages of Posts, from the end. An edit, or a
// reaction, is with its post however much later it came. The next page ends before the number of this page's first post.
func (r *Room) LastPosts(before uint64, n int) ([]Post, error) {
	expired, err := r.expired()
	if err != nil {
		return nil, err
	}
	list, err := r.back(before, n, expired, func(m *Message) (bool, error) {
		at, err := r.placeAt(m.Seq)
		return at == nil, err
	})
	if err != nil {
		return nil, err
	}
	for _, m := range slices.Clone(list) {
		parts, err := r.parts(m.Seq)
		if err != nil {
			return nil, err
		}
		for _, seq := range parts {
			if expired[seq] {
				continue
			}
			part, err := r.between(seq, seq, 0, nil)
			if err != nil {
				return nil, err
			}
			list = append(list, part...)
		}
	}
	slices.SortFunc(list, func(a, b Message) int { return cmp.Compare(a.Seq, b.Seq) })
	return postsOf(list), nil
}

// indexMessages makes the indexes of messages that an earlier release has stored. What a crash cuts off is done again.
func (c *Client) indexMessages() error {
	if have, err := c.db.Get(keyIndexed); err != nil || have != nil {
		return err
	}
	for _, r := range c.Rooms() {
		if err := r.indexAll(); err != nil {
			return err
		}
	}
	var w waits
	b := new(store.Batch)
	b.Set(keyIndexed, nil)
	return errors.Join(w.apply(c, b), w.wait())
}

// pageOfLog is how many messages are read at once when all are.
const pageOfLog = 256

// indexAll makes the indexes of all messages of the room, as if they came again.
func (r *Room) indexAll() error {
	for after := uint64(0); ; {
		var w waits
		r.mu.Lock()
		last, n, err := r.indexPage(&w, after)
		r.mu.Unlock()
		if err := errors.Join(err, w.wait()); err != nil || n == 0 {
			return err
		}
		after = last
	}
}

// indexPage is indexAll for the messages after a number, up to the last one that it returns. mu is held.
func (r *Room) indexPage(w *waits, after uint64) (last uint64, n int, err error) {
	page, err := r.between(after+1, ^uint64(0), pageOfLog, nil)
	for i := range page {
		m := &page[i]
		last = m.Seq
		if m.Content == nil {
			continue
		}
		b := new(store.Batch) // what comes next looks for it
		if err := r.index(b, m); err != nil {
			return last, 0, err
		}
		due, err := r.due(m.Seq)
		if err != nil {
			return last, 0, err
		}
		if due != 0 && due != unread {
			b.Set(r.dueKey(due, m.Seq), nil)
		}
		if b.Len() > 0 {
			if err := w.apply(r.c, b); err != nil {
				return last, 0, err
			}
		}
	}
	return last, len(page), err
}
