package tsmls

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls"
)

// kind says whose client a party is.
type kind string

const (
	ours   kind = "go"
	theirs kind = "ts"
)

func (k kind) other() kind {
	if k == ours {
		return theirs
	}
	return ours
}

// room is a group with members of both kinds, and with a PublicGroup that follows what can be followed.
type room struct {
	t       *testing.T
	node    *node
	id      string
	options options // of all clients, without the identity
	count   int     // of clients
	members []party
	gone    []party // were removed
	outside int     // clients that couldn't join, see mistaken
	server  *mls.PublicGroup
	blind   bool        // a proposal of the epoch was private
	private func() bool // whether a new client's handshakes are
}

func newRoom(t *testing.T, n *node, id string, creator kind, o options, ext mls.Extensions) *room {
	t.Helper()
	r := &room{t: t, node: n, id: id, options: o}
	p, _ := r.client(creator)
	r.must(p, "create", p.create([]byte(id), ext))
	r.members = []party{p}
	r.follow(p.groupInfo(false))
	r.check()
	return r
}

func (r *room) must(p party, action string, err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatalf("%s: %s: %v", p.name(), action, err)
	}
}

// client makes a client with its KeyPackage.
func (r *room) client(k kind) (party, []byte) {
	r.t.Helper()
	r.count++
	return r.named(k, fmt.Sprintf("%s%d", k, r.count))
}

func (r *room) named(k kind, identity string) (party, []byte) {
	r.t.Helper()
	id := r.id + " " + identity
	var p party = &ourClient{id: id}
	if k == theirs {
		p = &tsClient{id: id, node: r.node}
	}
	o := r.options
	o.identity = identity
	if r.private != nil {
		o.private = r.private()
	}
	kp, err := p.keyPackage(o)
	r.must(p, "key package", err)
	return p, kp
}

// follow begins to follow the group at the epoch of a GroupInfo.
func (r *room) follow(info, tree []byte, err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
	m, t := r.parse(info, tree)
	cfg := mls.PublicConfig{Verifier: everyone{}, NewMemberProposals: true}
	if r.server, err = mls.NewPublicGroup(cfg, nil, m.GroupInfo, t); err != nil {
		r.t.Fatalf("following: %v", err)
	}
}

func (r *room) parse(message, tree []byte) (*mls.MLSMessage, *mls.RatchetTree) {
	r.t.Helper()
	m, err := parseMessage(message)
	if err != nil {
		r.t.Fatal(err)
	}
	t, err := parseTree(tree)
	if err != nil {
		r.t.Fatal(err)
	}
	return m, t
}

// commit has a member make a commit that all apply, and gives it back with the members in agreement.
func (r *room) commit(by party, o commitOptions) *commit {
	r.t.Helper()
	c, err := by.commit(o)
	r.must(by, "commit", err)
	r.accept(by, c)
	return c
}

func (r *room) accept(by party, c *commit) {
	r.t.Helper()
	if m, t := r.parse(c.message, c.tree); m.Public != nil && !r.blind {
		gi, _ := r.parse(c.groupInfo, nil)
		s, err := r.server.CheckCommit(m.Public)
		r.must(by, "commit at the server", err)
		r.must(by, "GroupInfo at the server", s.CheckGroupInfo(gi.GroupInfo))
		r.must(by, "tree at the server", s.CheckTree(t))
		r.must(by, "server", r.server.Apply(nil, s, gi.GroupInfo))
	} else {
		r.follow(c.groupInfo, c.tree, nil)
		r.blind = false
	}
	for _, p := range r.members {
		if p == by {
			continue
		}
		got, _, err := p.process(c.message)
		r.must(p, "commit of "+by.name(), err)
		if got != committed {
			r.t.Fatalf("%s: commit of %s processed as %s", p.name(), by.name(), got)
		}
	}
	r.must(by, "confirm", by.confirm())
	r.members = slices.DeleteFunc(r.members, func(p party) bool {
		removed := !r.status(p).active
		if removed {
			r.gone = append(r.gone, p)
		}
		return removed
	})
	if !slices.Contains(r.members, by) {
		r.members = append(r.members, by)
	}
	r.check()
}

// add has a member add new clients in one commit, and lets them join.
func (r *room) add(by party, treeInWelcome bool, kinds ...kind) []party {
	r.t.Helper()
	var joiners []party
	o := commitOptions{treeInWelcome: treeInWelcome}
	for _, k := range kinds {
		p, kp := r.client(k)
		joiners = append(joiners, p)
		o.proposals = append(o.proposals, *add(kp))
	}
	r.welcome(r.commit(by, o), treeInWelcome, joiners...)
	return joiners
}

func (r *room) welcome(c *commit, treeInWelcome bool, joiners ...party) {
	r.t.Helper()
	if treeInWelcome {
		c.tree = nil
	}
	for _, p := range joiners {
		err := p.join(c.welcome, c.tree)
		if r.mistaken(p, err) {
			continue
		}
		r.must(p, "join", err)
		r.members = append(r.members, p)
	}
	r.check()
}

// join lets a new client join by external commit, with a GroupInfo of another member.
func (r *room) join(k kind, from party, treeInGroupInfo bool) party {
	r.t.Helper()
	p, _ := r.client(k)
	r.external(p, from, treeInGroupInfo, false)
	return p
}

// resync lets a member replace itself by an external commit.
func (r *room) resync(p, from party) {
	r.t.Helper()
	before := r.members
	r.members = slices.DeleteFunc(slices.Clone(before), func(o party) bool { return o == p })
	if !r.external(p, from, false, true) {
		r.members = before
	}
}

func (r *room) external(p, from party, treeInGroupInfo, resync bool) (joined bool) {
	r.t.Helper()
	info, tree, err := from.groupInfo(treeInGroupInfo)
	r.must(from, "GroupInfo", err)
	if treeInGroupInfo {
		tree = nil
	}
	c, err := p.externalJoin(info, tree, resync)
	if r.mistaken(p, err) {
		return false
	}
	r.must(p, "external join", err)
	r.accept(p, c)
	return true
}

// mistaken says whether a joiner that is ts-mls's refuses a valid tree: an unmerged leaf of a node has to be in the lists
// of the nodes between the two (RFC 9420, Section 12.4.3.1), and ts-mls wants it in those above the node as well, which
// somebody's path may have replaced. That we take the tree is checked, and the client stays outside.
func (r *room) mistaken(p party, err error) bool {
	var ts tsError
	if !errors.As(err, &ts) || !strings.Contains(string(ts), "non-blank intermediate node must list leaf node in its unmerged_leaves") {
		return false
	}
	r.follow(r.members[0].groupInfo(false))
	r.outside++
	return true
}

// propose has a member propose, an Update if p is nil, and hands it to all others.
func (r *room) propose(by party, p *mls.Proposal) {
	r.t.Helper()
	message, err := by.propose(p)
	r.must(by, "propose", err)
	r.proposed(by, message)
}

// proposeFromOutside has a client that isn't a member propose, as the external sender of that index or, if p is nil, to
// be added.
func (r *room) proposeFromOutside(by party, index uint32, p *mls.Proposal) {
	r.t.Helper()
	info, _, err := r.members[0].groupInfo(true)
	r.must(r.members[0], "GroupInfo", err)
	message, err := by.proposeFromOutside(info, index, p)
	r.must(by, "propose", err)
	r.proposed(by, message)
}

func (r *room) proposed(by party, message []byte) {
	r.t.Helper()
	if m, _ := r.parse(message, nil); m.Public != nil {
		s, err := r.server.CheckProposal(m.Public)
		r.must(by, "proposal at the server", err)
		r.must(by, "server", r.server.ApplyProposal(nil, s))
	} else {
		r.blind = true
	}
	for _, p := range r.members {
		if p == by {
			continue
		}
		got, _, err := p.process(message)
		r.must(p, "proposal of "+by.name(), err)
		if got != proposal {
			r.t.Fatalf("%s: proposal of %s processed as %s", p.name(), by.name(), got)
		}
	}
}

func (r *room) status(p party) *status {
	r.t.Helper()
	s, err := p.status()
	if our, ok := p.(*ourClient); ok && !our.Active() {
		return &status{} // it has no secrets any more
	}
	r.must(p, "status", err)
	return s
}

// check compares what the members and the server have of the epoch.
func (r *room) check() {
	r.t.Helper()
	var first *status
	for _, p := range r.members {
		s := r.status(p)
		if first == nil {
			first = s
		}
		if !bytes.Equal(s.context, first.context) || !bytes.Equal(s.authenticator, first.authenticator) || !bytes.Equal(s.exported, first.exported) {
			r.t.Fatalf("%s disagrees with %s in epoch %d", p.name(), r.members[0].name(), r.server.Epoch())
		}
	}
	if !bytes.Equal(encodedContext(r.server), first.context) {
		r.t.Fatalf("the server at epoch %d disagrees with %s", r.server.Epoch(), r.members[0].name())
	}
}

// talk has every member say something.
func (r *room) talk() {
	r.t.Helper()
	for _, p := range r.members {
		r.say(p)
	}
}

// say has a member send two messages, which all others read in the wrong order, and former members can't.
func (r *room) say(from party) {
	r.t.Helper()
	var text [2]string
	var messages [2][]byte
	for i := range messages {
		var err error
		text[i] = fmt.Sprintf("%s in %d: %d", from.name(), r.server.Epoch(), i)
		messages[i], err = from.send([]byte("aad"), []byte(text[i]))
		r.must(from, "send", err)
	}
	r.read(from, messages[1], text[1])
	r.read(from, messages[0], text[0])
}

func (r *room) read(from party, message []byte, want string) {
	r.t.Helper()
	for _, to := range r.members {
		if to == from {
			continue
		}
		got, data, err := to.process(message)
		r.must(to, "message of "+from.name(), err)
		if got != application || string(data) != want {
			r.t.Fatalf("%s: %s %q, want %q", to.name(), got, data, want)
		}
		if _, _, err := to.process(message); err == nil {
			r.t.Fatalf("%s reads a message of %s twice", to.name(), from.name())
		}
	}
	for _, p := range r.gone {
		if _, _, err := p.process(message); err == nil {
			r.t.Fatalf("%s was removed and reads a message of %s", p.name(), from.name())
		}
	}
}

// next has a member make a group that follows from r's, and the others join it: a branch of those in among, or if that is
// nil the successor.
func (r *room) next(by party, o options, among []party) *room {
	r.t.Helper()
	next := &room{t: r.t, node: r.node, id: r.id + " next", options: o, count: r.count}
	var id []byte
	if among != nil {
		id = []byte(next.id)
	} else {
		among = r.members
	}
	var leader party
	var kps [][]byte
	olds := make(map[party]party)
	for _, old := range among {
		k := ours
		if _, ok := old.(*tsClient); ok {
			k = theirs
		}
		p, kp := next.named(k, strings.TrimPrefix(old.name(), r.id+" "))
		olds[p] = old
		if old == by {
			leader = p
			next.members = slices.Insert(next.members, 0, p)
		} else {
			kps = append(kps, kp)
			next.members = append(next.members, p)
		}
	}
	welcome, tree, err := leader.lead(by, id, kps)
	next.must(leader, "lead", err)
	for _, p := range next.members[1:] {
		next.must(p, "follow", p.follow(olds[p], id != nil, welcome, tree))
	}
	next.follow(leader.groupInfo(false))
	next.check()
	next.talk()
	return next
}

func (r *room) leaf(p party) mls.LeafIndex { return r.status(p).leaf }
