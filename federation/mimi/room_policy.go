package mimi

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// PolicyError is a commit that a room's policy forbids. Hub and members find the same, because only agreed data is
// judged.
type PolicyError struct {
	Rule string // what the commit does against which rule
}

// Error returns the rule.
func (e *PolicyError) Error() string { return "mimi: room policy: " + e.Rule }

func forbidden(format string, args ...any) error {
	return &PolicyError{Rule: fmt.Sprintf(format, args...)}
}

// RoomPolicy returns what the hub and all clients of a room check of every commit, for mls.Config and
// mls.PublicConfig. identity gives the user and client that a leaf's credential names; it mustn't depend on time or on
// who asks. Errors are *PolicyError.
//
//   - Every leaf belongs to a participant with a higher role than RoleBanned. A leaf is replaced only by one of the same
//     client. (That no client has two leaves is checked by package mls.)
//   - An administrator may change the participant list in all ways, others may only take their own user off it.
//   - Members may add clients of whoever is a participant after the commit. A client joins by an external commit if its
//     user is a participant; with it, it changes nothing but the removal of its own former leaf.
//   - Leaves of the proposer's own user may be removed, those of others by administrators and by the hub, which is
//     external sender 0 and proposes nothing else. Leaves of a user whom the commit takes off the list or bans may be
//     removed by anyone, and must be.
//   - The room's metadata and the GroupContext's extensions are for administrators to change. The participant list stays,
//     external sender 0 keeps its key, and app_data_dictionary and AppDataUpdate stay required.
func RoomPolicy(identity func(mls.Credential) (user, client URI, err error)) func(*mls.StagedInfo) error {
	return func(info *mls.StagedInfo) error {
		c := check{identity: identity, info: info}
		var err error
		if c.before, err = participants(info.Before); err != nil {
			return err
		}
		if c.after = c.before; !info.After.Extensions.Equal(info.Before.Extensions) {
			if c.after, err = participants(info.After); err != nil {
				return err
			}
		}
		for i := range info.Proposals {
			if err := c.proposal(&info.Proposals[i]); err != nil {
				return err
			}
		}
		if err := c.committer(); err != nil {
			return err
		}
		return c.leaves()
	}
}

// check is the judgement of one commit.
type check struct {
	identity      func(mls.Credential) (user, client URI, err error)
	info          *mls.StagedInfo
	before, after map[URI]participation
}

// participation is a user's place in the list.
type participation struct {
	index uint32
	role  uint32
}

// participants returns the participant list of a GroupContext by user.
func participants(context mls.GroupContext) (map[URI]participation, error) {
	d, err := dictionary(context.Extensions)
	if err != nil {
		return nil, err
	}
	b, ok := d.Get(ComponentParticipantList)
	if !ok {
		return nil, forbidden("a room has a participant list")
	}
	var list ParticipantList
	if err := codec.Unmarshal(b, &list); err != nil {
		return nil, forbidden("the participant list doesn't decode: %v", err)
	}
	m := make(map[URI]participation, len(list))
	for i, p := range list {
		m[p.User] = participation{uint32(i), p.Role}
	}
	return m, nil
}

func dictionary(e mls.Extensions) (mls.AppDataDictionary, error) {
	b, ok := e.Find(mls.ExtensionAppDataDictionary)
	if !ok {
		return nil, forbidden("a room has an app_data_dictionary")
	}
	var d mls.AppDataDictionary
	if err := codec.Unmarshal(b, &d); err != nil {
		return nil, forbidden("the app_data_dictionary doesn't decode: %v", err)
	}
	return d, nil
}

// standing says whether a user may have clients in the room.
func standing(m map[URI]participation, user URI) bool { return m[user].role > RoleBanned }

func (c *check) who(l *mls.LeafNode) (user, client URI, err error) {
	if l == nil {
		return "", "", forbidden("a leaf that is blank")
	}
	if user, client, err = c.identity(l.Credential); err != nil {
		return "", "", forbidden("a leaf's credential names nobody: %v", err)
	}
	return user, client, nil
}

// proposal checks that whoever made a proposal may make it.
func (c *check) proposal(p *mls.PendingProposal) error {
	var user URI
	switch p.Sender.Type {
	case mls.SenderExternal:
		if p.Sender.Index != 0 || p.Proposal.Remove == nil {
			return forbidden("external sender %d proposes type %d", p.Sender.Index, p.Proposal.Type)
		}
		return nil
	case mls.SenderNewMemberCommit:
		return c.external(p)
	case mls.SenderMember:
		var err error
		if user, _, err = c.who(c.info.TreeBefore.Leaf(p.Sender.Leaf)); err != nil {
			return err
		}
	default:
		return forbidden("proposal of sender type %d", p.Sender.Type)
	}
	if !standing(c.before, user) {
		return forbidden("%s proposes and isn't a participant", user)
	}
	admin := c.before[user].role == RoleAdmin
	switch p.Proposal.Type {
	case mls.ProposalAdd, mls.ProposalUpdate, mls.ProposalPSK, mls.ProposalSelfRemove:
		return nil // the leaves are checked as they are afterwards
	case mls.ProposalRemove:
		owner, _, err := c.who(c.info.TreeBefore.Leaf(p.Proposal.Remove.Removed))
		if err != nil {
			return err
		}
		if !admin && owner != user && standing(c.after, owner) {
			return forbidden("%s removes a client of %s", user, owner)
		}
		return nil
	case mls.ProposalAppDataUpdate:
		return c.appData(user, admin, p.Proposal.AppDataUpdate)
	case mls.ProposalGroupContextExtensions:
		if !admin {
			return forbidden("%s changes the group's extensions", user)
		}
		return c.extensions(p.Proposal.GroupContextExtensions.Extensions)
	}
	return forbidden("proposal of type %d", p.Proposal.Type)
}

// external checks a proposal in an external commit.
func (c *check) external(p *mls.PendingProposal) error {
	switch p.Proposal.Type {
	case mls.ProposalExternalInit, mls.ProposalPSK:
		return nil
	case mls.ProposalRemove:
		_, old, err := c.who(c.info.TreeBefore.Leaf(p.Proposal.Remove.Removed))
		if err != nil {
			return err
		}
		_, own, err := c.who(c.info.PathLeaf)
		if err != nil {
			return err
		}
		if old != own {
			return forbidden("%s joins and removes %s", own, old)
		}
		return nil
	}
	return forbidden("external commit with a proposal of type %d", p.Proposal.Type)
}

// appData checks an AppDataUpdate of a member. The removal of the participant list shows in the list afterwards.
func (c *check) appData(user URI, admin bool, u *mls.AppDataUpdate) error {
	switch {
	case u.Component == ComponentRoomMetadata && admin:
		return nil
	case u.Component == ComponentRoomMetadata:
		return forbidden("%s changes the room's metadata", user)
	case u.Component != ComponentParticipantList:
		return forbidden("update of component %d", u.Component)
	case admin:
		return nil
	}
	var list ParticipantListUpdate
	if err := codec.Unmarshal(u.Update, &list); err != nil {
		return forbidden("participant list update: %v", err)
	}
	if len(list.Changed) == 0 && len(list.Added) == 0 && len(list.Removed) == 1 && list.Removed[0] == c.before[user].index {
		return nil
	}
	return forbidden("%s changes the participant list", user)
}

// extensions checks the extensions that an administrator proposes. Package mls checks that the app_data_dictionary is
// left as it is.
func (c *check) extensions(next mls.Extensions) error {
	hub, err := externalSenders(c.info.Before.Extensions)
	if err != nil {
		return err
	}
	proposed, err := externalSenders(next)
	if err != nil {
		return err
	}
	if !bytes.Equal(hub[0].SignatureKey, proposed[0].SignatureKey) {
		return forbidden("external sender 0 is replaced")
	}
	b, ok := next.Find(mls.ExtensionRequiredCapabilities)
	var required mls.RequiredCapabilities
	if !ok || codec.Unmarshal(b, &required) != nil ||
		!slices.Contains(required.Extensions, mls.ExtensionAppDataDictionary) || !slices.Contains(required.Proposals, mls.ProposalAppDataUpdate) {
		return forbidden("app_data_dictionary or AppDataUpdate isn't required any more")
	}
	return nil
}

func externalSenders(e mls.Extensions) (mls.ExternalSenders, error) {
	b, ok := e.Find(mls.ExtensionExternalSenders)
	var s mls.ExternalSenders
	if !ok || codec.Unmarshal(b, &s) != nil || len(s) == 0 {
		return nil, forbidden("a room has external senders")
	}
	return s, nil
}

// committer checks that the member who commits is a participant; an external committer's leaf is checked as one that
// was added.
func (c *check) committer() error {
	if c.info.External {
		return nil
	}
	user, _, err := c.who(c.info.TreeBefore.Leaf(c.info.Committer))
	if err != nil {
		return err
	}
	if !standing(c.before, user) || !standing(c.after, user) {
		return forbidden("%s commits and isn't a participant before and after", user)
	}
	return nil
}

// leaves checks the leaves that the commit brings, and those that it should have removed.
func (c *check) leaves() error {
	for _, m := range c.info.Added {
		user, client, err := c.who(m.Leaf)
		if err != nil {
			return err
		}
		if !standing(c.after, user) {
			return forbidden("%s joins and %s isn't a participant", client, user)
		}
	}
	for _, u := range c.info.Updated {
		user, client, err := c.who(u.New)
		if err != nil {
			return err
		}
		oldUser, oldClient, err := c.who(u.Old)
		if err != nil {
			return err
		}
		if user != oldUser || client != oldClient {
			return forbidden("%s takes the leaf of %s", client, oldClient)
		}
	}
	left := false
	for user := range c.before {
		left = left || standing(c.before, user) && !standing(c.after, user)
	}
	if !left {
		return nil
	}
	for _, leaf := range c.info.TreeAfter.Leaves() {
		user, client, err := c.who(leaf)
		if err != nil {
			return err
		}
		if !standing(c.after, user) {
			return forbidden("%s isn't a participant any more and %s stays", user, client)
		}
	}
	return nil
}
