//go:build linux

package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// What a fault is. The checker finds each of them; see check.
const (
	lost       = "lost"       // a message that was acknowledged, promised or delivered elsewhere isn't in a client's view
	duplicated = "duplicated" // a message is twice in a view, or was told twice
	reordered  = "reordered"  // views differ in their order, or one differs from the hub's numbers or from its sender's order
	invented   = "invented"   // a message that nobody sent
	undone     = "undone"     // a commit that was acknowledged isn't in the history of the room
	diverged   = "diverged"   // two clients have different authenticators of one epoch, or end in different epochs
	frozen     = "frozen"     // a client has stopped following a room
	stuck      = "stuck"      // a message still waits in an outbox, a client is behind, or something didn't heal in time
	accused    = "accused"    // a node holds evidence against a hub, though every hub is honest
)

// A place is a client in a room.
type place struct{ Client, Room string }

// A name says which message it is: the text of every message begins with its number, and numbers grow with every call
// of Send of one client in one room.
type name struct {
	Client, Room string
	Number       uint64
}

// A message is one that a client has or was told: its number in the room's log, and what it is.
type message struct {
	Seq    uint64 `json:"seq"`
	Client string `json:"client"` // of the sender
	Number uint64 `json:"number"`
}

// A commit is one that a client has applied.
type commit struct {
	Seq           uint64 `json:"seq"`
	Epoch         uint64 `json:"epoch"` // that it began
	By            string `json:"by"`    // the client whose it is
	Authenticator []byte `json:"authenticator"`
}

// A view is what a client has of a room at the end.
type view struct {
	Seq           uint64    `json:"seq"`
	Epoch         uint64    `json:"epoch"`
	Authenticator []byte    `json:"authenticator"`
	Outbox        int       `json:"outbox"`
	Member        bool      `json:"member"`
	Guests        []string  `json:"guests,omitempty"` // clients of guests that it takes for members
	Frozen        string    `json:"frozen,omitempty"`
	Messages      []message `json:"messages"`
}

// A record is what the checker judges: what the clients did and were answered, what they were told as it happened, and
// what they have at the end.
type record struct {
	sending map[name]bool       // what was given to Send
	acked   map[name]uint64     // what Send returned with a number
	queued  map[name]bool       // what Send said is durable and waits
	commits map[place][]uint64  // for each commit that was acknowledged, the epoch in which the client then was or a later one
	told    map[place][]message // in the order of telling
	joined  map[place]int       // of guests: how many of the told came before they last became a member
	applied map[place][]commit  // in the order of telling
	views   map[place]view
	late    []string // what didn't heal or settle in time

	accused  []string // what clients said against hubs
	evidence []string // what nodes have against hubs
}

func newRecord() *record {
	return &record{
		sending: make(map[name]bool), acked: make(map[name]uint64), queued: make(map[name]bool),
		commits: make(map[place][]uint64), told: make(map[place][]message), joined: make(map[place]int), applied: make(map[place][]commit), views: make(map[place]view),
	}
}

// A fault is something that must not be.
type fault struct{ kind, room, client, what string }

func (f fault) String() string {
	return fmt.Sprintf("%-10s %s %s: %s", f.kind, f.room, f.client, f.what)
}

// check returns every fault of a record, by room.
func check(r *record) []fault {
	c := checker{record: r, rooms: make(map[string]*roomCheck)}
	for p := range r.views {
		if rc := c.room(p.Room); isGuest(p.Client) {
			rc.guests = append(rc.guests, p.Client)
		} else {
			rc.clients = append(rc.clients, p.Client)
		}
	}
	for _, room := range slices.Sorted(maps.Keys(c.rooms)) {
		c.order(c.rooms[room])
	}
	c.answers()
	c.tellings()
	for _, room := range slices.Sorted(maps.Keys(c.rooms)) {
		c.history(c.rooms[room])
	}
	c.acknowledgedCommits()
	for _, room := range slices.Sorted(maps.Keys(c.rooms)) {
		c.guests(c.rooms[room])
	}
	for _, s := range r.late {
		c.add(stuck, "", "", "%s", s)
	}
	for _, s := range slices.Concat(r.accused, r.evidence) {
		c.add(accused, "", "", "%s", s)
	}
	slices.SortStableFunc(c.faults, func(a, b fault) int { return cmp.Compare(a.room, b.room) })
	return c.faults
}

type checker struct {
	record *record
	rooms  map[string]*roomCheck
	faults []fault
}

// roomCheck is what is known of a room by all views together.
type roomCheck struct {
	uri     string
	clients []string                   // that are members all the time
	guests  []string                   // that are members from time to time
	seqs    map[name]uint64            // where the first view has a message
	has     map[string]map[name]uint64 // by client
	epochs  map[uint64]commit
}

func (c *checker) room(uri string) *roomCheck {
	if c.rooms[uri] == nil {
		c.rooms[uri] = &roomCheck{
			uri: uri, seqs: make(map[name]uint64), has: make(map[string]map[name]uint64), epochs: make(map[uint64]commit),
		}
	}
	return c.rooms[uri]
}

func (c *checker) add(kind, room, client, format string, args ...any) {
	c.faults = append(c.faults, fault{kind, room, client, fmt.Sprintf(format, args...)})
}

// order compares the views of a room: the same messages, each once, at the same numbers, each sender's in its order.
func (c *checker) order(rc *roomCheck) {
	slices.Sort(rc.clients)
	slices.Sort(rc.guests)
	at := make(map[uint64]name)
	for _, client := range slices.Concat(rc.clients, rc.guests) {
		v := c.record.views[place{client, rc.uri}]
		if v.Frozen != "" {
			c.add(frozen, rc.uri, client, "%s", v.Frozen)
		}
		if v.Outbox > 0 {
			c.add(stuck, rc.uri, client, "%d messages wait in its outbox", v.Outbox)
		}
		has := make(map[name]uint64)
		var last uint64
		for _, m := range v.Messages {
			n := name{m.Client, rc.uri, m.Number}
			if !c.record.sending[n] {
				c.add(invented, rc.uri, client, "entry %d is %d of %s, which was never sent", m.Seq, m.Number, m.Client)
			}
			if before, ok := has[n]; ok {
				c.add(duplicated, rc.uri, client, "%d of %s is entry %d and entry %d", m.Number, m.Client, before, m.Seq)
				continue
			}
			if has[n] = m.Seq; m.Seq <= last {
				c.add(reordered, rc.uri, client, "entry %d comes after entry %d", m.Seq, last)
			}
			last = m.Seq
			if other, ok := at[m.Seq]; ok && other != n {
				c.add(reordered, rc.uri, client, "entry %d is %d of %s, elsewhere it is %d of %s", m.Seq, m.Number, m.Client, other.Number, other.Client)
			}
			at[m.Seq] = n
			if _, ok := rc.seqs[n]; !ok {
				rc.seqs[n] = m.Seq
			}
		}
		rc.has[client] = has
	}
	last := make(map[string]name)
	for _, seq := range slices.Sorted(maps.Keys(at)) {
		n := at[seq]
		if before := last[n.Client]; before.Number > n.Number {
			c.add(reordered, rc.uri, n.Client, "its message %d comes after its message %d", n.Number, before.Number)
		}
		last[n.Client] = n
	}
}

// answers holds the views against what senders were answered.
func (c *checker) answers() {
	for n, seq := range c.record.acked {
		rc := c.room(n.Room)
		for _, client := range rc.clients {
			switch have, ok := rc.has[client][n]; {
			case !ok:
				c.add(lost, n.Room, client, "%d of %s, acknowledged as entry %d", n.Number, n.Client, seq)
			case have != seq:
				c.add(reordered, n.Room, client, "%d of %s, acknowledged as entry %d, is entry %d", n.Number, n.Client, seq, have)
			}
		}
	}
	for _, rc := range c.rooms {
		for n, seq := range rc.seqs {
			if _, ok := c.record.acked[n]; ok {
				continue
			}
			for _, client := range rc.clients {
				switch have, ok := rc.has[client][n]; {
				case !ok:
					c.add(lost, n.Room, client, "%d of %s, which others have as entry %d", n.Number, n.Client, seq)
				case have != seq:
					c.add(reordered, n.Room, client, "%d of %s, which others have as entry %d, is entry %d", n.Number, n.Client, seq, have)
				}
			}
		}
	}
	for n := range c.record.queued {
		if _, ok := c.room(n.Room).seqs[n]; !ok {
			c.add(lost, n.Room, n.Client, "its message %d, which waited durably in its outbox, is in nobody's view", n.Number)
		}
	}
}

// tellings holds what clients were told as it happened against their views.
func (c *checker) tellings() {
	for p, told := range c.record.told {
		seen := make(map[name]bool)
		var last uint64
		for _, m := range told {
			n := name{m.Client, p.Room, m.Number}
			switch {
			case seen[n]:
				c.add(duplicated, p.Room, p.Client, "was told %d of %s twice", m.Number, m.Client)
			case m.Seq <= last:
				c.add(reordered, p.Room, p.Client, "was told entry %d after entry %d", m.Seq, last)
			}
			seen[n], last = true, m.Seq
			if v, ok := c.record.views[p]; ok && c.room(p.Room).has[p.Client][n] == 0 && v.Frozen == "" {
				c.add(lost, p.Room, p.Client, "was told %d of %s as entry %d and hasn't kept it", m.Number, m.Client, m.Seq)
			}
		}
	}
}

// history compares the epochs of a room.
func (c *checker) history(rc *roomCheck) {
	for _, client := range slices.Concat(rc.clients, rc.guests) {
		var last commit
		for _, k := range c.record.applied[place{client, rc.uri}] {
			if k.Epoch <= last.Epoch || k.Seq <= last.Seq {
				c.add(undone, rc.uri, client, "epoch %d (entry %d) follows epoch %d (entry %d)", k.Epoch, k.Seq, last.Epoch, last.Seq)
			}
			if last = k; len(k.Authenticator) > 0 { // else it is the one that removed this client
				c.epoch(rc, client, k)
			}
		}
	}
	for _, client := range rc.clients {
		v := c.record.views[place{client, rc.uri}]
		if !v.Member {
			c.add(frozen, rc.uri, client, "isn't a member any more")
		}
		if len(v.Authenticator) > 0 {
			if known, ok := rc.epochs[v.Epoch]; ok {
				known.Authenticator = v.Authenticator
				c.epoch(rc, client, known)
			}
		}
		first := c.record.views[place{rc.clients[0], rc.uri}]
		switch {
		case v.Epoch != first.Epoch:
			c.add(diverged, rc.uri, client, "ends in epoch %d, %s in %d", v.Epoch, rc.clients[0], first.Epoch)
		case string(v.Authenticator) != string(first.Authenticator):
			c.add(diverged, rc.uri, client, "ends with authenticator %.8x, %s with %.8x", v.Authenticator, rc.clients[0], first.Authenticator)
		}
		if v.Seq != first.Seq {
			c.add(stuck, rc.uri, client, "ends at entry %d, %s at %d", v.Seq, rc.clients[0], first.Seq)
		}
	}
}

// epoch holds a commit against what is known of its epoch.
func (c *checker) epoch(rc *roomCheck, client string, k commit) {
	known, ok := rc.epochs[k.Epoch]
	switch {
	case !ok:
		rc.epochs[k.Epoch] = k
	case known.Seq != k.Seq || known.By != k.By:
		c.add(undone, rc.uri, client, "epoch %d is by %s (entry %d), elsewhere by %s (entry %d)", k.Epoch, k.By, k.Seq, known.By, known.Seq)
	case string(known.Authenticator) != string(k.Authenticator):
		c.add(diverged, rc.uri, client, "epoch %d has authenticator %.8x, elsewhere %.8x", k.Epoch, k.Authenticator, known.Authenticator)
	}
}

// acknowledgedCommits sees that the k-th commit that a client had acknowledged is in the history: k commits of it are, at
// or before the epoch in which it was then, and every view has reached that epoch.
func (c *checker) acknowledgedCommits() {
	for p, epochs := range c.record.commits {
		rc := c.room(p.Room)
		slices.Sort(epochs)
		var own []uint64
		for _, e := range slices.Sorted(maps.Keys(rc.epochs)) {
			if rc.epochs[e].By == p.Client {
				own = append(own, e)
			}
		}
		for i, e := range epochs {
			if i >= len(own) || own[i] > e {
				c.add(undone, p.Room, p.Client, "its commit number %d, acknowledged by epoch %d, isn't in the history", i+1, e)
				break
			}
		}
		for _, client := range rc.clients {
			if v := c.record.views[place{client, p.Room}]; len(epochs) > 0 && v.Epoch < epochs[len(epochs)-1] {
				c.add(undone, p.Room, client, "ends in epoch %d, a commit of %s was acknowledged in %d", v.Epoch, p.Client, epochs[len(epochs)-1])
			}
		}
	}
}

// guests compares what guests have with what they should: who is a member, by everybody's word, is one, has the epoch of
// all, and every message from the first that it was told since it last became one.
func (c *checker) guests(rc *roomCheck) {
	if len(rc.clients) == 0 {
		return
	}
	first := c.record.views[place{rc.clients[0], rc.uri}]
	for _, guest := range first.Guests {
		if !slices.Contains(rc.guests, guest) {
			c.add(stuck, rc.uri, guest, "doesn't know of the room, of which %s takes it for a member", rc.clients[0])
		}
	}
	for _, guest := range rc.guests {
		p := place{guest, rc.uri}
		v := c.record.views[p]
		switch {
		case v.Member != slices.Contains(first.Guests, guest):
			c.add(stuck, rc.uri, guest, "is a member: %v, by the word of %s: %v", v.Member, rc.clients[0], !v.Member)
			continue
		case !v.Member:
			continue
		case v.Epoch != first.Epoch || string(v.Authenticator) != string(first.Authenticator):
			c.add(diverged, rc.uri, guest, "ends in epoch %d with authenticator %.8x, %s in %d with %.8x",
				v.Epoch, v.Authenticator, rc.clients[0], first.Epoch, first.Authenticator)
		case v.Seq != first.Seq:
			c.add(stuck, rc.uri, guest, "ends at entry %d, %s at %d", v.Seq, rc.clients[0], first.Seq)
		}
		told := c.record.told[p]
		if told = told[min(c.record.joined[p], len(told)):]; len(told) == 0 {
			continue
		}
		for n, seq := range rc.seqs {
			if _, ok := rc.has[guest][n]; !ok && seq > told[0].Seq {
				c.add(lost, rc.uri, guest, "%d of %s, which others have as entry %d", n.Number, n.Client, seq)
			}
		}
	}
}

// isGuest says whether a client is a guest's, by its name.
func isGuest(client string) bool { return strings.Contains(client, "/d/guest") }
