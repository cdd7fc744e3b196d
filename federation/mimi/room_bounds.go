package mimi

import (
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// How many participants and clients a room may have: the minimums and maximums of its roles and of its base policy.

// bounds checks how many participants and clients there are afterwards, in a tree without the removed leaves. moved says
// that leaves come or go.
func (c *check) bounds(tree *mls.RatchetTree, removed map[mls.LeafIndex]bool, moved bool) error {
	if !c.listed || !c.changed && !moved {
		return nil
	}
	base, err := c.base()
	if err != nil {
		return err
	}
	counted := !base.MultiDevice || base.MaxClients != nil
	for _, r := range c.rolesAfter {
		counted = counted || r.MinActive > 0 || r.MaxActive != nil && *r.MaxActive > 0
	}
	var clientsBefore, clientsAfter map[URI]int
	if counted {
		if clientsBefore, err = c.clients(c.tree, nil); err != nil {
			return err
		}
		if clientsAfter, err = c.clients(tree, removed); err != nil {
			return err
		}
	}
	expelled, err := c.expelled()
	if err != nil {
		return err
	}
	for _, r := range c.rolesAfter {
		total, active := c.count(r.Index, clientsBefore, clientsAfter, expelled)
		if err := total.within(r.MinParticipants, r.MaxParticipants); err != nil {
			return forbidden("participants with role %d: %v", r.Index, err)
		}
		if err := active.within(r.MinActive, r.MaxActive); err != nil && r.Active() {
			return forbidden("active participants with role %d: %v", r.Index, err)
		}
	}
	var users, devices span
	for user, role := range c.before {
		users.before += one(role != RoleBanned)
		devices.before += clientsBefore[user]
	}
	for user, role := range c.after {
		users.after += one(role != RoleBanned)
		devices.after += clientsAfter[user]
		if !base.MultiDevice && clientsAfter[user] > max(1, clientsBefore[user]) {
			return forbidden("%s has %d clients, and one is allowed", user, clientsAfter[user])
		}
	}
	if err := users.within(0, base.MaxUsers); err != nil {
		return forbidden("users: %v", err)
	}
	if err := devices.within(0, base.MaxClients); err != nil {
		return forbidden("clients: %v", err)
	}
	return nil
}

// count counts the participants of a role, and those of them that are active, without those who were expelled before.
func (c *check) count(role uint32, clientsBefore, clientsAfter map[URI]int, expelled map[URI]bool) (total, active span) {
	for user, r := range c.before {
		if now, ok := c.after[user]; r == role && !(expelled[user] && (!ok || now != r)) {
			total.before++
		}
		if r == role && clientsBefore[user] > 0 && !(expelled[user] && clientsAfter[user] == 0) {
			active.before++
		}
	}
	for user, r := range c.after {
		if r == role {
			total.after++
			active.after += one(clientsAfter[user] > 0)
		}
	}
	return total, active
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// span is a number before and after a commit.
type span struct{ before, after int }

// within says whether a commit leaves a number within its bounds, or doesn't take it further away from them.
func (s span) within(least uint32, most *uint32) error {
	switch {
	case s.after < s.before && int64(s.after) < int64(least):
		return fmt.Errorf("%d, at least %d", s.after, least)
	case most != nil && s.after > s.before && int64(s.after) > int64(*most):
		return fmt.Errorf("%d, at most %d", s.after, *most)
	}
	return nil
}

// clients counts the clients of each user in a tree without the removed leaves.
func (c *check) clients(tree *mls.RatchetTree, removed map[mls.LeafIndex]bool) (map[URI]int, error) {
	m := make(map[URI]int)
	for i, leaf := range tree.Leaves() {
		if removed[i] {
			continue
		}
		user, _, err := c.who(leaf)
		if err != nil {
			return nil, err
		}
		m[user]++
	}
	return m, nil
}

// expelled are the users whom the hub removes, or clients of theirs: no minimum keeps them in.
func (c *check) expelled() (map[URI]bool, error) {
	m := make(map[URI]bool)
	for i := range c.proposals {
		p := &c.proposals[i]
		if p.Sender.Type != mls.SenderExternal {
			continue
		}
		if p.Proposal.Remove != nil {
			user, _, err := c.who(c.tree.Leaf(p.Proposal.Remove.Removed))
			if err != nil {
				return nil, err
			}
			m[user] = true
		}
		if u := p.Proposal.AppDataUpdate; u != nil && u.Component == ComponentParticipantList {
			var list ParticipantListUpdate
			if codec.Unmarshal(u.Update, &list) == nil {
				for _, i := range list.Removed {
					if uint64(i) < uint64(len(c.list)) {
						m[c.list[i].User] = true
					}
				}
			}
		}
	}
	return m, nil
}
