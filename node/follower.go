package node

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// What a follower can't see: a commit removes leaves by their index or by reference to proposals, and only the hub has
// the tree that says whose they are. So a follower goes on serving a room's entries to a client of its own that a commit
// has removed, until the client says that it has left. They are ciphertexts of epochs that the client has no keys of, and
// handshakes, which show who is in the room. A provider without users in the room gets nothing more from the hub, and a
// revoked client nothing from anybody.

// notify takes what a room's hub has ordered into this node's copy of the room's log. It is durable on return, and a
// repetition changes nothing. Only the hub of a room may notify about it, and only of rooms that a client of this
// node is in or joins.
func (n *Node) notify(from string, uri mimi.URI, msgs []federation.Sequenced) error {
	if uri.Kind() != mimi.KindRoom || uri.Domain() != from || from == n.cfg.Domain {
		return refuse("notAllowed", "%s isn't the hub of %s", from, uri)
	}
	if err := n.disk.grow(); err != nil {
		return err // the hub keeps it
	}
	fanouts := make([]*mimi.FanoutMessage, len(msgs))
	for i, s := range msgs {
		f := new(mimi.FanoutMessage)
		if err := decode(s.Fanout, f); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
		if err := checkFanout(uri, f); err != nil {
			return err
		}
		fanouts[i] = f
	}
	told, err := n.readNotice(n.ctx, uri, msgs, fanouts)
	if err != nil {
		return err
	}
	if told != nil {
		if err := n.fence(&told.Signed); err != nil {
			return err
		}
	}
	r, err := n.openRoom(uri)
	if err != nil {
		return err
	}
	if r == nil {
		if known, err := n.awaited(from, fanouts); err != nil {
			return err
		} else if !known {
			return refuse("notFound", "no client of %s is in %s", n.cfg.Domain, uri)
		}
		if r, err = n.followRoom(uri); err != nil {
			return err
		}
	}
	added := 0
	err = n.run(r, func() (*change, error) {
		c := n.begin(r, nil)
		if told != nil {
			if err := c.compare(told); err != nil {
				return nil, err
			}
			if err := c.rewind(told); err != nil {
				return nil, err
			}
		}
		for i, f := range fanouts {
			ok, err := c.follow(msgs[i], f)
			if err != nil {
				return nil, err
			}
			if !ok {
				continue
			}
			added++
			if f.Message.Welcome != nil {
				continue
			}
			if c.link = nil; told != nil {
				c.extend(msgs[i].Seq, told.at(msgs[i].Seq), told.link(msgs[i].Seq).Context)
			} else if r.heads.last.Load() != nil {
				return nil, refuse("notAllowed", "%s has signed heads of %s and doesn't any more", from, uri)
			}
		}
		if c.batch.Len() == 0 {
			return nil, nil
		}
		return c, nil
	})
	if err != nil {
		return err
	}
	n.metrics.followed.Add(float64(added))
	r.mu.Lock()
	last := r.record.last
	r.mu.Unlock()
	return n.settle(r, last) // what was repeated may not have been on disk yet
}

// checkFanout refuses what doesn't belong into a room's log.
func checkFanout(uri mimi.URI, f *mimi.FanoutMessage) error {
	var group []byte
	switch m := f.Message; {
	case m == nil:
		return refuse("malformed", "no message")
	case m.Welcome != nil:
		return nil
	case m.Public != nil:
		group = m.Public.Content.GroupID
	case m.Private != nil:
		group = m.Private.GroupID
	default:
		return refuse("malformed", "neither a handshake, an application message nor a Welcome")
	}
	g, err := mimi.ParseURI(string(group))
	if err != nil || g.Room() != uri {
		return refuse("notAllowed", "a message of the group %q in %s", group, uri)
	}
	return nil
}

// awaited says whether a Welcome for a client of this node is among the messages of a hub.
func (n *Node) awaited(hub string, fanouts []*mimi.FanoutMessage) (bool, error) {
	for _, f := range fanouts {
		if f.Message.Welcome == nil {
			continue
		}
		for _, ref := range f.Message.Welcome.KeyPackageRefs() {
			if rec, err := n.refOwner(ref); err != nil || (rec != nil && rec.claimedBy(hub)) {
				return err == nil, err
			}
		}
	}
	return false, nil
}

// follow takes one message of the hub into the change; false if it was there already. A hub that numbers its entries
// numbers them upwards, with gaps where this provider didn't take part, or was away for longer than the hub keeps entries:
// streams don't go beyond a gap. Where it gives no number, the bytes decide
// (draft-ietf-mimi-protocol-06, Section 5.5).
func (c *change) follow(s federation.Sequenced, f *mimi.FanoutMessage) (bool, error) {
	hash := sha256.Sum256(s.Fanout)
	if f.Message.Welcome != nil {
		seq := s.Seq
		if seq == 0 {
			seq = c.record.last
		}
		return c.followWelcome(f.Message.Welcome, seq, s.Fanout)
	}
	if s.Seq != 0 {
		if s.Seq <= c.record.last {
			return false, nil
		}
		if c.record.last != 0 && s.Seq > c.record.last+1 {
			c.n.log.Info("entries of a room are missing here: nobody took part, or its hub has let go of them", "room", c.r.uri, "after", c.record.last, "next", s.Seq)
		}
		c.record.last = s.Seq
	} else {
		k := key(prefixAnswer, c.r.uri, hash[:])
		if have, err := c.n.store.Get(k); err != nil || have != nil {
			return false, err
		}
		c.record.last++
		c.batch.Set(k, codec.Marshal(answerRecord{seq: c.record.last, time: now()}))
	}
	c.append(slices.Clone(s.Fanout)) // the request that it came with may be large
	return true, nil
}

// followWelcome queues a Welcome for those of this node's clients whom it is for.
func (c *change) followWelcome(w *mls.Welcome, seq uint64, fanout []byte) (bool, error) {
	rest := fanoutKey(seq, fanout)
	k := key(prefixFanout, c.r.uri, rest)
	if have, err := c.n.store.Get(k); err != nil || have != nil {
		return false, err
	}
	found := false
	for _, ref := range w.KeyPackageRefs() {
		rec, err := c.n.refOwner(ref)
		if err != nil {
			return false, err
		}
		if rec != nil && rec.claimedBy(c.r.uri.Domain()) {
			c.queueWelcome(rec, seq, rest)
			found = true
			// A KeyPackage is for one Welcome: with more of them the hub could fill the client's queue.
			used := *rec
			used.unclaim(c.r.uri.Domain())
			c.batch.Set(refKey(prefixOwnRef, ref), codec.Marshal(used))
		}
	}
	if found {
		c.batch.Set(k, fanout)
	}
	return found, nil
}

// claimedBy says whether a KeyPackage is of a client of this node, and a hub of that provider has claimed it. Others see
// the references of KeyPackages as well, in the Welcomes and Adds of rooms, and could send the client Welcomes that lead
// nowhere before the right one is here.
func (v *refRecord) claimedBy(hub string) bool {
	return v.client != "" && slices.Contains(strings.Fields(v.provider), hub)
}

// unclaim takes one claim of a hub's provider back.
func (v *refRecord) unclaim(hub string) {
	list := strings.Fields(v.provider)
	if i := slices.Index(list, hub); i >= 0 {
		v.provider = strings.Join(slices.Delete(list, i, i+1), " ")
	}
}

// fanoutKey is the end of the key of a FanoutMessage with a Welcome.
func fanoutKey(seq uint64, fanout []byte) []byte {
	h := sha256.Sum256(fanout)
	return append(be64(seq), h[:]...)
}

// queueWelcome puts a Welcome into the queue of a local client, who is a member of the room from then on.
func (c *change) queueWelcome(to *refRecord, seq uint64, rest []byte) {
	c.welcomes = append(c.welcomes, queuedWelcome{to.client, welcomeRecord{room: c.r.uri, seq: seq, fanout: slices.Clone(rest)}})
	setMember(&c.batch, to.client, to.user, c.r.uri, seq)
	c.members[to.client] = struct{}{}
	c.welcomed[to.client] = struct{}{}
}

// numbers gives the entries of each client's queue of Welcomes their growing numbers: the time in µs, or one more than
// the last one of all, also if the clock is put back. A client that says it has had a higher one, before the store was
// restored, goes on from there.
type numbers struct {
	mu   sync.Mutex
	last map[mimi.URI]uint64 // guarded by mu
	high uint64              // guarded by mu: the last number that was given
}

// openNumbers reads how far the numbers of Welcomes were.
func openNumbers(s store.Store) (*numbers, error) {
	ns := &numbers{last: make(map[mimi.URI]uint64)}
	b, err := s.Get([]byte(keyWelcomes))
	if err == nil && b != nil {
		if len(b) != 8 {
			return nil, fmt.Errorf("%w: number of Welcomes", errRecord)
		}
		ns.high = binary.BigEndian.Uint64(b)
	}
	return ns, err
}

// queuedWelcome is a Welcome on its way into the queue of a client.
type queuedWelcome struct {
	client  mimi.URI
	welcome welcomeRecord
}

// number gives a change's Welcomes their numbers. unlock comes after the change is applied: a stream that saw a higher
// number first would never look for the lower one.
func (c *change) number() (unlock func()) {
	if len(c.welcomes) == 0 {
		return func() {}
	}
	ns := c.n.welcomeNumbers
	ns.mu.Lock()
	for _, q := range c.welcomes {
		n := max(ns.last[q.client]+1, ns.high+1, uint64(time.Now().UnixMicro()))
		ns.last[q.client], ns.high = n, n
		c.batch.Set(key(prefixWelcome, q.client, be64(n)), codec.Marshal(q.welcome))
	}
	c.batch.Set([]byte(keyWelcomes), be64(ns.high))
	return ns.mu.Unlock
}

func (ns *numbers) seen(client mimi.URI, number uint64) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	// A number from far in the future would use the range up.
	if number < uint64(time.Now().AddDate(10, 0, 0).UnixMicro()) {
		ns.last[client] = max(ns.last[client], number)
	}
}
