package node

import (
	"maps"
	"slices"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// change is what happens to a room in one step: a batch for the store, with the entries that the log gets and to whom
// they go. It is filled and applied under the room's lock, and finished without it.
type change struct {
	n      *Node
	r      *room
	batch  store.Batch
	record roomRecord
	link   *linkRecord         // of record.last; nil if there is no chain
	peers  map[string]struct{} // the providers that get the entries, this one excepted
	mark   *mark               // of the message that is logged, nil if there is none

	cuts        int               // of the room when the change was applied
	cut         *uint64           // what is left of the log before the change adds to it, if that isn't all
	head        *head             // of a room that is followed: the last one of its hub, nil if it is as before
	accusations []*chain.Evidence // against the hub

	entries  []logged              // what the log gets
	members  map[mimi.URI]struct{} // local clients whose membership changes
	welcomes []queuedWelcome       // for local clients
	welcomed map[mimi.URI]struct{} // local clients with a new Welcome
	joined   map[mimi.URI]struct{} // local clients that joined by themselves
	queued   map[string]struct{}   // peers with something new in the outbox
}

// begin starts a change; r.mu is held until it is applied or given up.
func (n *Node) begin(r *room, peers map[string]struct{}) *change {
	return &change{
		n: n, r: r, record: r.record, link: r.link, peers: peers, cuts: r.cuts,
		members: make(map[mimi.URI]struct{}), welcomed: make(map[mimi.URI]struct{}), joined: make(map[mimi.URI]struct{}), queued: make(map[string]struct{}),
	}
}

// log appends an entry to the room's log, and to the outbox of every peer that takes part.
func (c *change) log(fanout []byte) (seq uint64) {
	c.record.last++
	c.append(fanout)
	context := c.r.contextHash()
	c.extend(c.record.last, c.link.chain.Next(c.record.last, chain.NewLink(fanout, context)), context)
	for _, p := range slices.Sorted(maps.Keys(c.peers)) {
		c.send(p, outboxEntry(c.r.uri, c.record.last))
	}
	return c.record.last
}

// append puts an entry into the log, as its last.
func (c *change) append(fanout []byte) {
	c.batch.Set(key(prefixLog, c.r.uri, be64(c.record.last)), fanout)
	c.entries = append(c.entries, logged{c.record.last, fanout})
}

// extend notes the chain at the log's last entry.
func (c *change) extend(seq uint64, h, context chain.Hash) {
	c.link = &linkRecord{context: context, chain: h}
	c.batch.Set(linkKey(c.r.uri, seq), codec.Marshal(c.link))
}

// send puts a reference into a peer's outbox.
func (c *change) send(peer string, ref []byte) {
	k, v := c.n.outbox.Entry(peer, ref)
	c.batch.Set(k, v)
	c.queued[peer] = struct{}{}
}

// answer keeps the answer to the message of that hash.
func (c *change) answer(hash []byte, seq, time uint64, response codec.Marshaler) {
	c.batch.Set(key(prefixAnswer, c.r.uri, hash), codec.Marshal(answerRecord{seq: seq, time: time, response: codec.Marshal(response)}))
}

// apply makes the change visible in the store. r.mu is held; the caller releases it and calls finish.
func (c *change) apply() (wait func() error, err error) {
	c.batch.Set(roomKey(c.r.uri), codec.Marshal(c.record))
	defer c.number()()
	unlock, err := c.n.raise(&c.batch, c.mark)
	if err != nil {
		return nil, err // a message has changed nothing in memory
	}
	wait, err = c.n.store.Apply(&c.batch)
	unlock()
	if err != nil {
		// The group in memory may be ahead of the store.
		c.r.broken = err
		return nil, err
	}
	c.n.disk.wrote(c.batch.Size())
	c.r.record, c.r.link = c.record, c.link
	for client := range c.members { // before there is another entry
		c.n.listeners.member(client, c.r.uri)
	}
	if c.cut != nil {
		c.r.cuts++
		c.cuts = c.r.cuts
		c.r.durable.Store(min(c.r.durable.Load(), *c.cut))
		c.n.recent.cut(c.r.uri, *c.cut)
	}
	return wait, nil
}

// finish waits until the change is on disk, and lets it be seen.
func (c *change) finish(wait func() error) error {
	if err := wait(); err != nil {
		c.r.mu.Lock()
		c.r.broken = err
		c.r.mu.Unlock()
		return err
	}
	if c.head != nil {
		c.r.heads.replace(c.head)
	}
	c.show()
	for _, e := range c.accusations {
		c.n.metrics.evidence.Inc()
		c.n.log.Error("a hub has signed two histories of a room", "room", c.r.uri, "first", e.First.Seq, "second", e.Second.Seq)
	}
	for client := range c.joined {
		c.n.listeners.joined(client, c.r.uri)
	}
	for client := range c.welcomed {
		c.n.listeners.welcome(client)
		c.n.push.client(client)
	}
	c.n.listeners.room(c.r.uri)
	c.n.push.room(c.r.uri)
	for peer := range c.queued {
		c.n.outbox.Wake(peer)
	}
	return nil
}

// show lets the entries be read, unless they were cut off while they were on their way to the disk.
func (c *change) show() {
	if !c.r.hosted {
		c.r.mu.Lock()
		defer c.r.mu.Unlock()
		if c.r.cuts != c.cuts {
			return
		}
	}
	c.n.recent.add(c.r.uri, c.entries)
	c.r.advance(c.record.last)
}

// run does one step under the room's lock: fill checks and fills the change, and returns false if there is nothing to
// do. The change is durable when run returns nil.
func (n *Node) run(r *room, fill func() (*change, error)) error {
	r.mu.Lock()
	if r.broken != nil {
		defer r.mu.Unlock()
		return r.usable()
	}
	c, err := fill()
	if err != nil || c == nil {
		r.mu.Unlock()
		return err
	}
	wait, err := c.apply()
	r.mu.Unlock()
	if err != nil {
		return err
	}
	return c.finish(wait)
}
