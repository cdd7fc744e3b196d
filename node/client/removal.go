package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// A hub may propose to remove clients, and to take users off the participant list. Members commit that only if they see
// what it is for: the client is revoked or expired, or of a provider that isn't known here; its user is no participant, or
// has asked to leave; it is late to renew its leaf; or the room gives the hub a role that may do so. A proposal without a
// reason is told as Discarded and holds nothing up; but the hub may refuse commits that leave it out. It is looked at again
// when the trust bundles or the time have changed. A commit of it that others make is applied all the same: they may know
// more.
//
// Two things are taken from the hub: who had asked to leave before this client joined by itself, in the epoch that began
// with that, and when the leaves were renewed that this client hasn't seen change.

var errUnfounded = errors.New("the hub proposes a removal, and nothing that this client knows speaks for it")

// founded fails with errUnfounded if a pending proposal is the hub's and nothing speaks for it. mu is held.
func (r *Room) founded(p mls.PendingProposal) error {
	u := p.Proposal.AppDataUpdate
	if p.Sender.Type != mls.SenderExternal || p.Proposal.Remove == nil && (u == nil || u.Component != mimi.ComponentParticipantList) {
		return nil
	}
	list, err := participants(r.group)
	if err != nil {
		return err
	}
	if role, err := mimi.HubRole(r.group.Dictionary(), r.uri); err != nil || role.May(mimi.CanRemoveParticipant) ||
		role.May(mimi.CanBan) || p.Proposal.Remove != nil && role.May(mimi.CanKick) {
		return err
	}
	if p.Proposal.Remove != nil {
		m, ok := r.group.Member(p.Proposal.Remove.Removed)
		if ok && !r.goes(list, m) {
			return fmt.Errorf("%w: leaf %d", errUnfounded, m.Index)
		}
		return nil
	}
	for _, i := range removedUsers(u) {
		if int(i) >= len(list) || r.isLeaving(list, list[i].User) {
			continue
		}
		for m := range r.group.Members() {
			if user, _, err := r.c.identity(m.Leaf); err == nil && user == list[i].User && !r.goes(list, m) {
				return fmt.Errorf("%w: %s", errUnfounded, user)
			}
		}
	}
	return nil
}

func (r *Room) unfounded(p mls.PendingProposal) bool { return r.founded(p) != nil }

// goes says whether there is a reason to remove a member. mu is held.
func (r *Room) goes(list mimi.ParticipantList, m mls.Member) bool {
	user, id, err := r.c.identity(m.Leaf)
	if err != nil {
		return true
	}
	if flag := r.flags[id]; flag != "" && flag != flagEarly || r.isLeaving(list, user) || r.late(m.Index) {
		return true
	}
	roles, err := mimi.RolesOf(r.group.Dictionary())
	_, role, ok := list.Find(user)
	return err == nil && (!ok || !roles.Find(role).Active())
}

// isLeaving says whether a user has asked to leave, or may have done so before this client joined. mu is held.
func (r *Room) isLeaving(list mimi.ParticipantList, user mimi.URI) bool {
	return r.leavers[user] || r.entered == r.group.Epoch() && r.takenOff(list, user)
}

// takenOff says whether the hub proposes to take a user off the list. mu is held.
func (r *Room) takenOff(list mimi.ParticipantList, user mimi.URI) bool {
	return slices.ContainsFunc(r.group.Pending(), func(p mls.PendingProposal) bool {
		u := p.Proposal.AppDataUpdate
		return u != nil && p.Sender.Type == mls.SenderExternal && u.Component == mimi.ComponentParticipantList &&
			slices.ContainsFunc(removedUsers(u), func(i uint32) bool { return int(i) < len(list) && list[i].User == user })
	})
}

// removedUsers are the indexes of those whom an update takes off the participant list.
func removedUsers(u *mls.AppDataUpdate) []uint32 {
	var update mimi.ParticipantListUpdate
	if codec.Unmarshal(u.Update, &update) != nil {
		return nil
	}
	return update.Removed
}

// toCommit says whether there are pending proposals that this client would commit. mu is held.
func (r *Room) toCommit() bool {
	return slices.ContainsFunc(r.group.Pending(), func(p mls.PendingProposal) bool { return !r.unfounded(p) })
}

// proposed notes what the entry's proposals say about who leaves, and tells of those that are unfounded.
func (e *entry) proposed() {
	r := e.room
	for i := range e.made {
		if user := r.leaver(&e.made[i]); user != "" {
			e.noteLeaver(user)
		}
	}
	for i := range e.made {
		p := e.made[i]
		err := r.founded(p)
		if err == nil {
			continue
		}
		var client mimi.URI
		if p.Proposal.Remove != nil {
			if m, ok := r.group.Member(p.Proposal.Remove.Removed); ok {
				_, client, _ = r.c.identity(m.Leaf)
			}
		}
		e.discard(client, err)
	}
	if len(e.made) > 0 {
		for _, j := range r.jobs {
			j.notBefore = time.Time{} // the hub may have refused it for want of these
		}
	}
	if r.leavers[r.c.User()] && r.alone() {
		e.removed() // there is nobody who could commit that
	}
}

// leaver returns the user that asks to leave by a proposal, "" if nobody does. mu is held.
func (r *Room) leaver(p *mls.PendingProposal) mimi.URI {
	u := p.Proposal.AppDataUpdate
	if u == nil || u.Component != mimi.ComponentParticipantList || p.Sender.Type != mls.SenderMember {
		return ""
	}
	m, ok := r.group.Member(p.Sender.Leaf)
	list, err := participants(r.group)
	if !ok || err != nil {
		return ""
	}
	user, _, err := r.c.identity(m.Leaf)
	if i, _, ok := list.Find(user); err == nil && ok && slices.Contains(removedUsers(u), uint32(i)) {
		return user
	}
	return ""
}

func (e *entry) noteLeaver(user mimi.URI) {
	r := e.room
	if r.leavers == nil {
		r.leavers = make(map[mimi.URI]bool)
	}
	r.leavers[user] = true
	e.state.Set(r.key(roomLeaver, []byte(user)...), nil)
}

// forgetLeavers is for a commit that had to do what they asked for.
func (r *Room) forgetLeavers(b *store.Batch) {
	for user := range r.leavers {
		b.Delete(r.key(roomLeaver, []byte(user)...))
	}
	r.leavers = nil
}

func (r *Room) loadLeavers() error {
	return store.ScanPrefix(r.c.db, r.key(roomLeaver), func(user, _ []byte) bool {
		if r.leavers == nil {
			r.leavers = make(map[mimi.URI]bool)
		}
		r.leavers[mimi.URI(user)] = true
		return true
	})
}

// renewalDays returns the days that the room gives its members to renew their leaves, 0 if they needn't. mu is held.
func (r *Room) renewalDays() time.Duration {
	days, err := mimi.RenewalDays(r.group.Dictionary())
	if err != nil {
		return 0
	}
	return time.Duration(days) * 24 * time.Hour
}

func (r *Room) renewedKey(leaf mls.LeafIndex) []byte {
	return r.key(roomRenewed, binary.BigEndian.AppendUint32(nil, uint32(leaf))...)
}

// noteRenewed notes which leaves a commit has renewed, in a room that asks for it.
func (e *entry) noteRenewed(info *mls.StagedInfo) {
	r := e.room
	for _, m := range info.Removed {
		e.state.Delete(r.renewedKey(m.Index))
	}
	if r.renewalDays() == 0 {
		return
	}
	at := binary.BigEndian.AppendUint64(nil, uint64(min(e.time.Unix(), r.c.o.Time().Unix())))
	for _, m := range info.Added {
		e.state.Set(r.renewedKey(m.Index), at)
	}
	for _, u := range info.Updated {
		e.state.Set(r.renewedKey(u.Index), at)
	}
}

// noteOwnRenewal notes that the own leaf is new. mu is held.
func (r *Room) noteOwnRenewal(b *store.Batch) {
	if r.renewalDays() > 0 {
		b.Set(r.renewedKey(r.group.OwnLeaf()), binary.BigEndian.AppendUint64(nil, uint64(r.c.o.Time().Unix())))
	}
}

// renewed returns when a leaf was last renewed, zero if that isn't known. mu is held.
func (r *Room) renewed(leaf mls.LeafIndex) time.Time {
	b, err := r.c.db.Get(r.renewedKey(leaf))
	if err != nil || len(b) != 8 {
		return time.Time{}
	}
	return time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
}

// late says whether a leaf should have been renewed before, as far as this client knows. mu is held.
func (r *Room) late(leaf mls.LeafIndex) bool {
	days := r.renewalDays()
	return days > 0 && r.c.o.Time().Sub(r.renewed(leaf)) >= days
}

// renewalAt is when this client renews its leaf: when from half to three quarters of the days are over, in each room at
// another time. Zero if the room doesn't ask for it. mu is held.
func (r *Room) renewalAt() time.Time {
	days := r.renewalDays()
	if days == 0 {
		return time.Time{}
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(string(r.uri) + string(r.c.ID())))
	return r.renewed(r.group.OwnLeaf()).Add(days/2 + days/4*time.Duration(h.Sum32()%1024)/1024)
}
