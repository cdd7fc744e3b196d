package node

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// What a hub takes out of its rooms by proposals of its own, as external sender: clients that
//
//   - were revoked, as those are that their provider has deleted (draft-ietf-mimi-protocol-06, Section 5.5);
//   - have had no valid certificate for the time of grace (Limits.GraceDays);
//   - belong to nobody in the participant list;
//   - belong to a user who has asked to leave, by proposals that an external commit has voided, see leavers;
//   - haven't renewed their leaves in the days that the room's policy gives, and the time of grace.
//
// Members commit what is pending, and the hub takes no commit without it. It is in the store with the group. After an
// external commit the hub proposes anew what is still due, stapled to that commit; who joins by it must have committed the
// pending SelfRemoves itself. Clients check whether they see what a proposal of the hub is for (package client).
//
// The days in which a leaf is to be renewed count while the node runs, by the monotonic clock: members can't renew where
// no hub is, and a wrong clock throws nobody out.

// maxProposed is how many proposals a hub makes for a room at a time.
const maxProposed = 512

// uptime is how long a node has run on its store, in s.
type uptime struct {
	before atomic.Uint64 // up to the start of this process
	since  time.Time     // its start
	saved  atomic.Uint64
}

// openUptime reads how long the node has run before.
func (n *Node) openUptime() error {
	b, err := n.store.Get([]byte(keyUptime))
	if err != nil {
		return err
	}
	if b != nil {
		if len(b) != 8 {
			return fmt.Errorf("%w: uptime", errRecord)
		}
		n.uptime.before.Store(binary.BigEndian.Uint64(b))
	}
	n.uptime.since = time.Now()
	n.uptime.saved.Store(n.uptime.before.Load())
	return nil
}

func (u *uptime) seconds() uint64 {
	return u.before.Load() + uint64(max(0, time.Since(u.since))/time.Second)
}

// saveUptime keeps it. What a crash takes of it is to the favour of those who are late.
func (n *Node) saveUptime() error {
	s := n.uptime.seconds()
	if n.uptime.since.IsZero() || s == n.uptime.saved.Load() {
		return nil
	}
	if _, err := n.store.Commit(map[string][]byte{keyUptime: be64(s)}, nil); err != nil {
		return fmt.Errorf("writing the uptime: %w", err)
	}
	n.uptime.saved.Store(s)
	return nil
}

func renewedKey(room mimi.URI, leaf mls.LeafIndex) []byte {
	return key(prefixRenewed, room, binary.BigEndian.AppendUint32(nil, uint32(leaf)))
}

// noteRenewed notes which leaves a commit has renewed.
func (c *change) noteRenewed(info *mls.StagedInfo) {
	at := be64(c.n.uptime.seconds())
	for _, m := range info.Removed {
		c.batch.Delete(renewedKey(c.r.uri, m.Index))
	}
	for _, m := range info.Added {
		c.batch.Set(renewedKey(c.r.uri, m.Index), at)
	}
	for _, u := range info.Updated {
		c.batch.Set(renewedKey(c.r.uri, u.Index), at)
	}
}

// late says whether a leaf should have been renewed before. Where it isn't known since when it is there, that is from now
// on.
func (c *change) late(days uint16, leaf mls.LeafIndex) (bool, error) {
	b, err := c.n.store.Get(renewedKey(c.r.uri, leaf))
	if err != nil {
		return false, err
	}
	now := c.n.uptime.seconds()
	if len(b) != 8 {
		c.batch.Set(renewedKey(c.r.uri, leaf), be64(now))
		return false, nil
	}
	at, allowed := binary.BigEndian.Uint64(b), uint64(days)*24*60*60+uint64(c.n.grace()/time.Second)
	return now > at && now-at > allowed, nil
}

func (n *Node) grace() time.Duration { return time.Duration(n.cfg.Limits.GraceDays) * 24 * time.Hour }

// now is the time by which credentials are judged.
func (n *Node) now() time.Time {
	if n.cfg.Time != nil {
		return n.cfg.Time()
	}
	return time.Now()
}

// dues says whose removal is due in a room's present epoch, and why. room.mu is held.
type dues struct {
	c       *change
	who     *roster
	leaving map[mimi.URI]bool // users who have asked for it
	renewal uint16            // days in which leaves are to be renewed; 0: they needn't, or it isn't asked
}

// dues looks at whether leaves were renewed only if told to: that costs a look into the store for each of them.
func (c *change) dues(leaving map[mimi.URI]bool, renewal bool) (*dues, error) {
	who, err := c.r.who()
	if err != nil {
		return nil, err
	}
	d := &dues{c: c, who: who, leaving: leaving}
	if renewal {
		d.renewal = who.renewal
	}
	return d, nil
}

// of returns why a member's removal is due, "" if it isn't.
func (d *dues) of(m mls.Member) (string, error) {
	n := d.c.n
	user, _, err := n.verifier.IdentityOf(m.Leaf.Credential)
	if err != nil {
		return "", nil // no commit brings such a leaf
	}
	switch {
	case d.leaving[user]:
		return "leaving", nil
	case !d.who.role(user).Active():
		return "no participant", nil
	}
	switch err := n.judge(d.c.r, m.Leaf); {
	case errors.Is(err, authority.ErrRevoked):
		return "revoked", nil
	case errors.Is(err, authority.ErrExpired):
		id, err := authority.ParseIdentity(m.Leaf.Credential.Certificates)
		if err != nil {
			break
		}
		if b := n.trust.Bundle(id.Domain); b != nil && b.Revoked(id.Serial) {
			return "revoked", nil
		}
		if n.now().After(id.NotAfter.Add(n.grace())) {
			return "expired", nil
		}
	}
	if d.renewal > 0 {
		if late, err := d.c.late(d.renewal, m.Index); err != nil || late {
			return "not renewed", err
		}
	}
	return "", nil
}

// leavers are the users whose removal from the participant list is pending, by a proposal of their own or of the hub.
func (r *room) leavers() (map[mimi.URI]bool, error) {
	var users map[mimi.URI]bool
	for _, p := range r.group.Pending() {
		list, err := r.takenOff(&p)
		if err != nil {
			return nil, err
		}
		for _, user := range list {
			if users == nil {
				users = make(map[mimi.URI]bool)
			}
			users[user] = true
		}
	}
	return users, nil
}

// takenOff are the users whom a pending proposal takes off the participant list on their own behalf: the hub's, and the
// sender itself.
func (r *room) takenOff(p *mls.PendingProposal) ([]mimi.URI, error) {
	u := p.Proposal.AppDataUpdate
	if u == nil || u.Component != mimi.ComponentParticipantList {
		return nil, nil
	}
	who, err := r.who()
	if err != nil {
		return nil, err
	}
	var update mimi.ParticipantListUpdate
	if err := codec.Unmarshal(u.Update, &update); err != nil {
		return nil, nil // no such proposal is pending
	}
	var self mimi.URI
	if m, ok := r.group.Member(p.Sender.Leaf); ok && p.Sender.Type == mls.SenderMember {
		self, _, _ = authority.IdentityOf(m.Leaf.Credential)
	}
	var users []mimi.URI
	for _, i := range update.Removed {
		if int(i) < len(who.list) && (p.Sender.Type == mls.SenderExternal || who.list[i].User == self) {
			users = append(users, who.list[i].User)
		}
	}
	return users, nil
}

// removedBy returns the leaf that a proposal removes.
func removedBy(p *mls.PendingProposal) (mls.LeafIndex, bool) {
	switch {
	case p.Proposal.Remove != nil:
		return p.Proposal.Remove.Removed, true
	case p.Proposal.Type == mls.ProposalSelfRemove:
		return p.Sender.Leaf, true
	}
	return 0, false
}

// checkPending refuses commits that don't do what is pending: removals of clients, and of users who leave. after is the
// participant list that the commit leads to. What the hub has proposed counts as long as it is due. Who joins by an
// external commit can't commit more than SelfRemoves.
func (n *Node) checkPending(r *room, info *mls.StagedInfo, after mimi.ParticipantList) error {
	gone := make(map[mls.LeafIndex]bool, len(info.Removed))
	for _, m := range info.Removed {
		gone[m.Index] = true
	}
	pending := r.group.Pending()
	if len(pending) == 0 {
		return nil
	}
	leaving, err := r.leavers()
	if err != nil {
		return err
	}
	d, err := n.begin(r, nil).dues(leaving, true)
	if err != nil {
		return err
	}
	for i := range pending {
		p := &pending[i]
		if info.External && p.Proposal.Type != mls.ProposalSelfRemove {
			continue
		}
		if users, err := r.takenOff(p); err != nil {
			return err
		} else {
			for _, user := range users {
				if _, _, ok := after.Find(user); ok {
					return refuse("notAllowed", "the commit leaves %s in the participant list, whose removal is pending", user)
				}
			}
		}
		leaf, ok := removedBy(p)
		if !ok || gone[leaf] || !info.External && leaf == info.Committer {
			continue
		}
		if p.Sender.Type == mls.SenderExternal {
			m, ok := r.group.Member(leaf)
			if !ok {
				continue
			}
			if why, err := d.of(m); err != nil {
				return err
			} else if why == "" {
				continue
			}
		}
		return refuse("notAllowed", "the commit leaves out a pending Remove (of leaf %d)", leaf)
	}
	return nil
}

// hubAAD is the authenticated data of the hub's proposals: a SafeAAD, as rooms with franking ask of all handshakes.
var hubAAD = codec.Marshal(mls.SafeAAD{})

// propose makes the hub's proposals that are due in the present epoch and not pending, and makes them pending; the room's
// lock is held. leaving are users to be taken out. What was made before an error stands.
func (c *change) propose(leaving map[mimi.URI]bool, renewal bool) ([]*mls.MLSMessage, error) {
	g := c.r.group
	pending := make(map[mls.LeafIndex]bool)
	for _, p := range g.Pending() {
		if leaf, ok := removedBy(&p); ok {
			pending[leaf] = true
		}
	}
	d, err := c.dues(leaving, renewal)
	if err != nil {
		return nil, err
	}
	var made []*mls.MLSMessage
	var failed error
	for m := range g.Members() {
		if pending[m.Index] || len(made) == maxProposed {
			continue
		}
		why, err := d.of(m)
		if err != nil {
			return made, err
		}
		if why == "" {
			continue
		}
		msg, err := c.proposeOne(mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: m.Index}})
		if err != nil {
			failed = fmt.Errorf("proposing to remove leaf %d: %w", m.Index, err)
			continue
		}
		made = append(made, msg)
		_, client, _ := authority.IdentityOf(m.Leaf.Credential)
		c.n.log.Info("removal proposed", "room", c.r.uri, "client", client, "reason", why)
	}
	already, err := c.r.leavers()
	if err != nil {
		return made, err
	}
	var update mimi.ParticipantListUpdate
	for i, p := range d.who.list {
		if leaving[p.User] && !already[p.User] {
			update.Removed = append(update.Removed, uint32(i))
		}
	}
	if len(update.Removed) > 0 {
		msg, err := c.proposeOne(mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{
			Component: mimi.ComponentParticipantList, Op: mls.AppDataOpUpdate, Update: codec.Marshal(update),
		}})
		if err != nil {
			return made, fmt.Errorf("proposing to take users off the list: %w", err)
		}
		made = append(made, msg)
	}
	return made, failed
}

// proposeOne signs a proposal of the hub and makes it pending.
func (c *change) proposeOne(p mls.Proposal) (*mls.MLSMessage, error) {
	g := c.r.group
	signer, _, err := c.n.keys.hub(g.Suite())
	if err != nil {
		return nil, err
	}
	msg, err := mls.ExternalProposal(g.Suite(), rand.Reader, signer, hubSender, g.GroupID(), g.Epoch(), hubAAD, p)
	if err != nil {
		return nil, err
	}
	staged, err := g.CheckProposal(msg.Public)
	if err != nil {
		return nil, err
	}
	if err := mimi.CheckPending(c.n.verifier.IdentityOf, g, staged.Proposal()); err != nil {
		return nil, err
	}
	return msg, g.ApplyProposal(c.batch.Prefixed(key(prefixGroup, c.r.uri)), staged)
}

// logProposals logs proposals of the hub as one entry.
func (c *change) logProposals(made []*mls.MLSMessage) {
	if len(made) == 0 {
		return
	}
	c.pend(c.log(codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: made[0], MoreProposals: made[1:]})))
}

// pend notes that an entry has proposals that are pending.
func (c *change) pend(seq uint64) {
	c.record.pending = append(c.record.pending[:len(c.record.pending):len(c.record.pending)], seq)
}

// proposalsOf returns the proposals that an entry of a log has made pending.
func proposalsOf(f *mimi.FanoutMessage) []*mls.MLSMessage {
	if commits(f) {
		return f.ExternalProposals
	}
	return append([]*mls.MLSMessage{f.Message}, f.MoreProposals...)
}

// proposeAll proposes what is due in every room hosted here.
func (n *Node) proposeAll() error {
	if err := n.disk.grow(); err != nil {
		return err // nobody could commit them either
	}
	uris, err := n.hostedRooms()
	if err != nil {
		return err
	}
	var failed error
	for _, uri := range uris {
		failed = errors.Join(failed, n.proposeIn(uri))
	}
	return failed
}

func (n *Node) proposeIn(uri mimi.URI) error {
	r, err := n.hostedRoom(uri)
	if err != nil {
		return err
	}
	var incomplete error
	err = n.run(r, func() (*change, error) {
		who, err := r.who()
		if err != nil {
			return nil, err
		}
		c := n.begin(r, who.peers)
		made, err := c.propose(nil, true)
		c.logProposals(made)
		incomplete = err // what was proposed before that stands
		if len(made) == maxProposed {
			n.kickRemovals()
		}
		if c.batch.Len() == 0 {
			return nil, nil
		}
		return c, nil
	})
	return errors.Join(err, incomplete)
}
