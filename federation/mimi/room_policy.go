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
// Who may do what is said by the roles in the room's roles_list, by the capabilities of draft-ietf-mimi-room-policy-03,
// Section 8; rooms without one have those that RolesOf returns. Beyond that:
//
//   - Every leaf belongs to a participant whose role may have clients. A leaf is replaced only by one of the same client,
//     also by who joins with an external commit. (That no client has two leaves is checked by package mls.)
//   - Who may add a user with a role may also add clients of those who have it already.
//   - Leaves of a user whom the commit takes off the list or bans may be removed by anyone, and must be.
//   - The hub is external sender 0 and may propose to remove leaves, and to take users off the participant list, unless
//     membership is fixed: who asked to leave goes even if external commits void the proposals. Whether it has a reason
//     is for each member to see before it commits that. Besides, the hub has the role that it is preauthorized for. It
//     keeps its key. app_data_dictionary and AppDataUpdate stay required. Other changes of the GroupContext's
//     extensions, and the renewal of leaves, are operational policies.
//   - A commit doesn't bring the participants of a role below the role's minimum, or above its maximum; where they are
//     already, as they may be in a new room, it doesn't make that worse. What the hub removes isn't counted.
//   - The policies for history and bots name no role that may not have clients.
//   - A room's URI is changed by who may change all its metadata; nobody reinitialises or destroys a room.
func RoomPolicy(identity func(mls.Credential) (user, client URI, err error)) func(*mls.StagedInfo) error {
	return func(info *mls.StagedInfo) error {
		c, err := newCheck(identity, info.Before, info.TreeBefore, info.Proposals)
		if err != nil {
			return err
		}
		if !info.After.Extensions.Equal(info.Before.Extensions) {
			d, err := dictionary(info.After.Extensions)
			if err != nil {
				return err
			}
			if err := c.leadsTo(d); err != nil {
				return err
			}
		}
		for i := range info.Proposals {
			if err := c.proposal(&info.Proposals[i], info.PathLeaf); err != nil {
				return err
			}
		}
		if info.External {
			err = c.join(info.PathLeaf)
		} else {
			err = c.committer(info.Committer)
		}
		if err != nil {
			return err
		}
		if err := c.leaves(info); err != nil {
			return err
		}
		return c.bounds(info.TreeAfter, nil, len(info.Added)+len(info.Removed) > 0)
	}
}

// CheckPending checks proposals that are to be committed by reference, by whoever commits next, together with those that
// are pending already, as RoomPolicy does. Only an Update, Remove, SelfRemove or AppDataUpdate is for others to commit.
// Errors are *PolicyError.
func CheckPending(identity func(mls.Credential) (user, client URI, err error), g *mls.PublicGroup, next ...mls.PendingProposal) error {
	all := append(g.Pending(), next...)
	c, err := newCheck(identity, g.Context(), g.Tree(), all)
	if err != nil {
		return err
	}
	updates := make(map[mls.ComponentID][][]byte)
	removed := make(map[mls.LeafIndex]bool)
	for i := range all {
		switch p := &all[i].Proposal; {
		case p.Remove != nil:
			removed[p.Remove.Removed] = true
		case p.Type == mls.ProposalSelfRemove:
			removed[all[i].Sender.Leaf] = true
		case p.AppDataUpdate != nil && p.AppDataUpdate.Op == mls.AppDataOpUpdate:
			u := p.AppDataUpdate
			updates[u.Component] = append(updates[u.Component], u.Update)
		}
	}
	d := c.dictionary
	for id, list := range updates {
		component, ok := Components()[id]
		if !ok {
			return forbidden("update of component %d", id)
		}
		current, _ := d.Get(id)
		b, err := component.Update(current, list)
		if err != nil {
			return forbidden("%v", err)
		}
		d = d.Set(id, b)
	}
	if err := c.leadsTo(d); err != nil {
		return err
	}
	for i := range next {
		switch p := &next[i]; p.Proposal.Type {
		case mls.ProposalUpdate, mls.ProposalRemove, mls.ProposalSelfRemove, mls.ProposalAppDataUpdate:
			if err := c.proposal(p, nil); err != nil {
				return err
			}
		default:
			return forbidden("proposal of type %d by reference", p.Proposal.Type)
		}
	}
	return c.bounds(c.tree, removed, len(removed) > 0)
}

// CheckNewRoom checks the app_data_dictionary with which a room with a roles_list begins: that it decodes, that members
// have to support all of it, and that the only participant, its creator, may have clients.
func CheckNewRoom(d mls.AppDataDictionary, room URI) error {
	roles, err := RolesOf(d)
	if err != nil {
		return err
	}
	var list ParticipantList
	if _, err := policyOf(d, ComponentParticipantList, &list); err != nil {
		return err
	}
	if len(list) != 1 || !roles.Find(list[0].Role).Active() {
		return forbidden("a new room has its creator as only participant, with a role that may have clients")
	}
	if _, ok := d.Get(ComponentRoles); !ok {
		if list[0].Role != RoleAdmin {
			return forbidden("a new room's creator is its administrator")
		}
		return nil
	}
	var required mls.ComponentsList
	if _, err := policyOf(d, mls.ComponentAppComponents, &required); err != nil {
		return err
	}
	for _, id := range PolicyComponents() {
		if !slices.Contains(required, id) {
			return forbidden("a new room with roles doesn't require component %d", id)
		}
	}
	for id, decoder := range policies {
		if _, err := policyOf(d, id, decoder()); err != nil {
			return err
		}
	}
	if _, err = JoinLinksOf(d); err != nil {
		return err
	}
	if err := checkNamedRoles(d, roles); err != nil {
		return err
	}
	return checkAssets(d, room)
}

// checkAssets checks the asset policy of a room.
func checkAssets(d mls.AppDataDictionary, room URI) error {
	p, err := AssetPolicyOf(d)
	if err != nil {
		return forbidden("%v", err)
	}
	if p == nil {
		return nil
	}
	return p.checkHub(room)
}

// MayAsk says whether a client may have what an external commit to a room needs: its user is a participant, or could
// become one by that commit, with the joining code if there is one. now is in s since 1970: an expired link admits nobody.
func MayAsk(d mls.AppDataDictionary, room, user, client URI, code []byte, now uint64) error {
	c := check{room: room, dictionary: d}
	var err error
	if c.roles, err = RolesOf(d); err != nil {
		return err
	}
	if _, err := policyOf(d, ComponentParticipantList, &c.list); err != nil {
		return err
	}
	if _, role, ok := c.list.Find(user); ok {
		if !c.roles.Find(role).Active() {
			return forbidden("%s isn't a participant", user)
		}
		return nil
	}
	if len(code) > 0 {
		links, err := JoinLinksOf(d)
		if err != nil {
			return err
		}
		l, _, err := links.Open(code, room, client)
		switch {
		case err != nil:
			return err
		case l.Expired(now):
			return forbidden("the link to %s has expired", room)
		}
		return c.admits(user, client, l.Role, l)
	}
	_, err = c.openRole(user, client)
	return err
}

// OpenRole returns the role with which a user who isn't a participant of a room may become one by itself, without a link.
// It fails with a *PolicyError if there is none.
func OpenRole(d mls.AppDataDictionary, room, user, client URI) (uint32, error) {
	c := check{room: room, dictionary: d}
	var err error
	if c.roles, err = RolesOf(d); err != nil {
		return RoleNone, err
	}
	return c.openRole(user, client)
}

func (c *check) openRole(user, client URI) (uint32, error) {
	for i := range c.roles {
		if index := c.roles[i].Index; c.admits(user, client, index, nil) == nil {
			return index, nil
		}
	}
	return RoleNone, forbidden("%s isn't a participant", user)
}

// HubRole returns the role that a room gives its hub by a preauthorization, nil if it gives it none.
func HubRole(d mls.AppDataDictionary, room URI) (*Role, error) {
	roles, err := RolesOf(d)
	if err != nil {
		return nil, err
	}
	c := check{room: room, dictionary: d, roles: roles}
	return c.preauthorized("", room.Provider())
}

// OpenToStrangers says whether users who aren't participants may become so by an external commit at all.
func OpenToStrangers(d mls.AppDataDictionary) bool {
	roles, err := RolesOf(d)
	zero := roles.Find(RoleNone)
	return err == nil && (zero.May(CanOpenJoin) || zero.May(CanUseJoinCode) ||
		slices.ContainsFunc(roles, func(r Role) bool { return r.May(CanJoinIfPreauthorized) }))
}

// UsedLink returns the link that an external commit was made with, nil if it was made without. RoomPolicy has checked it.
func UsedLink(info *mls.StagedInfo) (*JoinLink, error) {
	for _, p := range info.Ephemeral {
		if e := p.Proposal.AppEphemeral; e != nil && e.Component == ComponentJoinLinks {
			d, err := dictionary(info.Before.Extensions)
			if err != nil {
				return nil, err
			}
			links, err := JoinLinksOf(d)
			if err != nil {
				return nil, err
			}
			var c JoiningCode
			if err := codec.Unmarshal(e.Data, &c); err != nil {
				return nil, err
			}
			if i := links.find(c.Key); i >= 0 {
				return &links[i], nil
			}
		}
	}
	return nil, nil
}

// check is the judgement of one commit, or of proposals that are to be in one.
type check struct {
	identity   func(mls.Credential) (user, client URI, err error)
	room       URI // "" if the group isn't one of a room
	extensions mls.Extensions
	dictionary mls.AppDataDictionary // before
	tree       *mls.RatchetTree      // before
	proposals  []mls.PendingProposal

	listed            bool // there is a roles_list
	roles, rolesAfter RoleList
	list              ParticipantList // before
	before, after     map[URI]uint32  // roles by user
	changed           bool            // after isn't before
}

func newCheck(identity func(mls.Credential) (user, client URI, err error), context mls.GroupContext, tree *mls.RatchetTree, proposals []mls.PendingProposal) (*check, error) {
	c := &check{identity: identity, extensions: context.Extensions, tree: tree, proposals: proposals}
	if g, err := ParseURI(string(context.GroupID)); err == nil && g.Kind() == KindGroup {
		c.room = g.Room()
	}
	var err error
	if c.dictionary, err = dictionary(context.Extensions); err != nil {
		return nil, err
	}
	if c.list, c.roles, err = participants(c.dictionary); err != nil {
		return nil, err
	}
	_, c.listed = c.dictionary.Get(ComponentRoles)
	c.before = make(map[URI]uint32, len(c.list))
	for _, p := range c.list {
		c.before[p.User] = p.Role
	}
	c.after, c.rolesAfter = c.before, c.roles
	return c, nil
}

// leadsTo takes the app_data_dictionary that the commit leads to.
func (c *check) leadsTo(d mls.AppDataDictionary) error {
	list, roles, err := participants(d)
	if err != nil {
		return err
	}
	c.rolesAfter, c.changed = roles, true
	c.after = make(map[URI]uint32, len(list))
	for _, p := range list {
		c.after[p.User] = p.Role
		if roles.Find(p.Role) == nil {
			return forbidden("%s has role %d, which doesn't exist", p.User, p.Role)
		}
	}
	if err := checkNamedRoles(d, roles); err != nil {
		return err
	}
	return checkAssets(d, c.room)
}

// participants returns the participant list and the roles of a room.
func participants(d mls.AppDataDictionary) (list ParticipantList, roles RoleList, err error) {
	b, ok := d.Get(ComponentParticipantList)
	if !ok {
		return nil, nil, forbidden("a room has a participant list")
	}
	if err := codec.Unmarshal(b, &list); err != nil {
		return nil, nil, forbidden("the participant list doesn't decode: %v", err)
	}
	if roles, err = RolesOf(d); err != nil {
		return nil, nil, forbidden("%v", err)
	}
	return list, roles, nil
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

// stood and stands say whether a user may have clients in the room, before and after.
func (c *check) stood(user URI) bool  { return c.roles.Find(c.before[user]).Active() }
func (c *check) stands(user URI) bool { return c.rolesAfter.Find(c.after[user]).Active() }

func (c *check) who(l *mls.LeafNode) (user, client URI, err error) {
	if l == nil {
		return "", "", forbidden("a leaf that is blank")
	}
	if user, client, err = c.identity(l.Credential); err != nil {
		return "", "", forbidden("a leaf's credential names nobody: %v", err)
	}
	return user, client, nil
}

// proposal checks that whoever made a proposal may make it. joiner is the leaf of an external commit.
func (c *check) proposal(p *mls.PendingProposal, joiner *mls.LeafNode) error {
	switch p.Sender.Type {
	case mls.SenderExternal:
		u := p.Proposal.AppDataUpdate
		switch {
		case p.Sender.Index == 0 && (p.Proposal.Remove != nil || u != nil && c.takesOff(u)):
			return nil
		case p.Sender.Index == 0 && u != nil && c.listed:
			role, err := c.preauthorized("", c.room.Provider())
			if err != nil {
				return err
			}
			return c.appData(c.room.Provider(), role, u)
		}
		return forbidden("external sender %d proposes type %d", p.Sender.Index, p.Proposal.Type)
	case mls.SenderNewMemberCommit:
		return c.external(p, joiner)
	case mls.SenderMember:
	default:
		return forbidden("proposal of sender type %d", p.Sender.Type)
	}
	user, _, err := c.who(c.tree.Leaf(p.Sender.Leaf))
	if err != nil {
		return err
	}
	role := c.roles.Find(c.before[user])
	if !role.Active() {
		return forbidden("%s proposes and isn't a participant", user)
	}
	switch p.Proposal.Type {
	case mls.ProposalUpdate, mls.ProposalPSK:
		return nil // the leaves are checked as they are afterwards
	case mls.ProposalAdd:
		return c.add(user, role, &p.Proposal.Add.KeyPackage.LeafNode)
	case mls.ProposalSelfRemove:
		if role.May(CanRemoveOwnClient) || role.May(CanRemoveSelf) {
			return nil
		}
		return forbidden("%s removes its own client", user)
	case mls.ProposalRemove:
		return c.remove(user, role, p.Proposal.Remove.Removed)
	case mls.ProposalAppDataUpdate:
		return c.appData(user, role, p.Proposal.AppDataUpdate)
	case mls.ProposalGroupContextExtensions:
		if !role.May(CanChangeOperationalPolicies) {
			return forbidden("%s changes the group's extensions", user)
		}
		return c.checkExtensions(p.Proposal.GroupContextExtensions.Extensions)
	}
	return forbidden("proposal of type %d", p.Proposal.Type)
}

// takesOff says whether an update takes users off the participant list and does nothing else.
func (c *check) takesOff(u *mls.AppDataUpdate) bool {
	var list ParticipantListUpdate
	if u.Component != ComponentParticipantList || u.Op != mls.AppDataOpUpdate || codec.Unmarshal(u.Update, &list) != nil {
		return false
	}
	base, err := c.base()
	return err == nil && !base.FixedMembership && len(list.Removed) > 0 && len(list.Added)+len(list.Changed) == 0
}

// preauthorized returns the role for one whose credential names these URIs, nil if there is none.
func (c *check) preauthorized(provider URI, names ...URI) (*Role, error) {
	var p Preauthorized
	if _, err := policyOf(c.dictionary, ComponentPreauthorized, &p); err != nil {
		return nil, forbidden("%v", err)
	}
	role := p.role(provider, names...)
	if role == RoleNone {
		return nil, nil
	}
	return c.roles.Find(role), nil
}

// add checks who adds a client. That its user is a participant is checked with the leaves.
func (c *check) add(user URI, role *Role, leaf *mls.LeafNode) error {
	owner, client, err := c.who(leaf)
	if err != nil {
		return err
	}
	switch {
	case role.May(canAddAnyClient), owner == user && role.May(CanAddOwnClient), !c.stands(owner):
		return nil
	case owner != user && role.May(CanAddParticipant) && role.moves(RoleNone, c.after[owner]):
		return nil
	}
	return forbidden("%s adds %s, a client of %s", user, client, owner)
}

// remove checks who removes a client.
func (c *check) remove(user URI, role *Role, leaf mls.LeafIndex) error {
	owner, _, err := c.who(c.tree.Leaf(leaf))
	if err != nil {
		return err
	}
	switch {
	case owner == user && (role.May(CanRemoveOwnClient) || role.May(CanRemoveSelf) && !c.stands(owner)):
		return nil
	case owner != user && (role.May(CanKick) || !c.stands(owner)):
		return nil
	}
	return forbidden("%s removes a client of %s", user, owner)
}

// external checks a proposal in an external commit, apart from those that make its user a participant, see join.
func (c *check) external(p *mls.PendingProposal, joiner *mls.LeafNode) error {
	switch {
	case p.Proposal.Type == mls.ProposalExternalInit, p.Proposal.Type == mls.ProposalPSK:
		return nil
	case p.Proposal.Remove != nil:
		_, old, err := c.who(c.tree.Leaf(p.Proposal.Remove.Removed))
		if err != nil {
			return err
		}
		_, own, err := c.who(joiner)
		if err != nil {
			return err
		}
		if old != own {
			return forbidden("%s joins and removes %s", own, old)
		}
		return nil
	case p.Proposal.AppDataUpdate != nil && c.listed, p.Proposal.AppEphemeral != nil && c.listed:
		return nil
	}
	return forbidden("external commit with a proposal of type %d", p.Proposal.Type)
}

// join checks that who joins by an external commit may, and what it changes of the room with that: a user who isn't a
// participant gets on the list, by itself and for a role that is open to it, and a link that is for one user is used up.
func (c *check) join(leaf *mls.LeafNode) error {
	user, client, err := c.who(leaf)
	if err != nil {
		return err
	}
	var added *Participant
	var code []byte
	var used []uint32
	resync := false
	for i := range c.proposals {
		p := &c.proposals[i]
		removed := p.Proposal.Remove
		if p.Proposal.Type == mls.ProposalSelfRemove {
			removed = &mls.Remove{Removed: p.Sender.Leaf}
		}
		if removed != nil {
			_, old, err := c.who(c.tree.Leaf(removed.Removed))
			if err != nil {
				return err
			}
			resync = resync || old == client
		}
		if p.Sender.Type != mls.SenderNewMemberCommit {
			continue
		}
		switch u := p.Proposal.AppDataUpdate; {
		case u == nil:
		case u.Component == ComponentParticipantList && added == nil:
			var list ParticipantListUpdate
			if codec.Unmarshal(u.Update, &list) != nil || len(list.Added) != 1 || len(list.Changed)+len(list.Removed) > 0 || list.Added[0].User != user {
				return forbidden("%s joins and changes the participant list", user)
			}
			added = &list.Added[0]
		case u.Component == ComponentJoinLinks && used == nil:
			var links JoinLinksUpdate
			if codec.Unmarshal(u.Update, &links) != nil || len(links.Removed) != 1 || len(links.Added) > 0 {
				return forbidden("%s joins and changes the links", user)
			}
			used = links.Removed
		default:
			return forbidden("%s joins and updates component %d", user, u.Component)
		}
		if e := p.Proposal.AppEphemeral; e != nil {
			if e.Component != ComponentJoinLinks || code != nil {
				return forbidden("%s joins with data of component %d", user, e.Component)
			}
			code = e.Data
		}
	}
	switch _, known := c.before[user]; {
	case added == nil && (code != nil || used != nil):
		return forbidden("%s joins with a code and isn't added by it", user)
	case added == nil && known && c.stood(user) && !resync && !c.roles.Find(c.before[user]).May(CanAddOwnClient):
		return forbidden("%s adds %s, a client of its own", user, client)
	case added == nil:
		return nil
	}
	var link *JoinLink
	if code != nil {
		links, err := JoinLinksOf(c.dictionary)
		if err != nil {
			return forbidden("%v", err)
		}
		i := 0
		if link, i, err = links.Open(code, c.room, client); err != nil {
			return err
		}
		if gone := slices.Equal(used, []uint32{uint32(i)}); gone == link.MultiUser {
			return forbidden("%s joins and doesn't use up the link that it is for, or does and the link is for many", user)
		}
	} else if used != nil {
		return forbidden("%s joins and removes a link", user)
	}
	return c.admits(user, client, added.Role, link)
}

// admits says whether a user who isn't in the list may get on it by itself with a role; link is that of its code.
func (c *check) admits(user, client URI, index uint32, link *JoinLink) error {
	zero, role := c.roles.Find(RoleNone), c.roles.Find(index)
	base, err := c.base()
	if err != nil {
		return err
	}
	preauthorized, err := c.preauthorized(user.Provider(), user, client)
	if err != nil {
		return err
	}
	switch {
	case !role.Active(), base.FixedMembership:
	case link != nil && link.Role == index && zero.May(CanUseJoinCode) && zero.moves(RoleNone, index),
		link == nil && zero.May(CanOpenJoin) && zero.moves(RoleNone, index),
		link == nil && role == preauthorized && role.May(CanJoinIfPreauthorized):
		return nil
	}
	return forbidden("%s joins with role %d", user, index)
}

// base returns the room's base policy, by default one without bounds.
func (c *check) base() (BasePolicy, error) {
	p := BasePolicy{MultiDevice: true}
	if _, err := policyOf(c.dictionary, ComponentBasePolicy, &p); err != nil {
		return p, forbidden("%v", err)
	}
	return p, nil
}

// appData checks an AppDataUpdate of a user, or of the hub. The removal of the participant list shows in the list
// afterwards.
func (c *check) appData(user URI, role *Role, u *mls.AppDataUpdate) error {
	switch u.Component {
	case ComponentRoomMetadata:
		return c.metadata(user, role, u)
	case ComponentParticipantList:
		return c.listUpdate(user, role, u.Update)
	}
	if !c.listed {
		return forbidden("update of component %d", u.Component)
	}
	needs := CanChangeOtherPolicyAttribute
	switch u.Component {
	case ComponentJoinLinks:
		return c.links(user, role, u)
	case ComponentRoles:
		if needs = CanChangeRoleDefinitions; u.Op != mls.AppDataOpUpdate || c.touchesList(false) {
			return forbidden("%s removes the roles, or changes them together with the participant list", user)
		}
	case ComponentPreauthorized:
		if needs = CanChangePreauthorizedUsers; c.touchesList(true) {
			return forbidden("%s changes who is preauthorized together with the participant list", user)
		}
	case ComponentBasePolicy:
		needs = CanChangeRoomMembershipStyle
	case ComponentLeafRenewal:
		needs = CanChangeOperationalPolicies
	case ComponentJoinLinkPolicy, ComponentAssets, ComponentHistory, ComponentBots, ComponentExpiration:
	default:
		return forbidden("update of component %d", u.Component)
	}
	if !role.May(needs) {
		return forbidden("%s changes policy %d", user, u.Component)
	}
	return nil
}

// touchesList says whether a participant list update is among the proposals; one that only removes users doesn't count if
// removals are allowed.
func (c *check) touchesList(removals bool) bool {
	return slices.ContainsFunc(c.proposals, func(p mls.PendingProposal) bool {
		u := p.Proposal.AppDataUpdate
		if u == nil || u.Component != ComponentParticipantList {
			return false
		}
		var list ParticipantListUpdate
		return !removals || codec.Unmarshal(u.Update, &list) != nil || len(list.Added)+len(list.Changed) > 0
	})
}

// metadata checks an update of the room's metadata field by field.
func (c *check) metadata(user URI, role *Role, u *mls.AppDataUpdate) error {
	var next RoomMetadata
	old, err := MetadataOf(c.dictionary)
	if err != nil {
		return forbidden("the room's metadata doesn't decode: %v", err)
	}
	if u.Op == mls.AppDataOpUpdate {
		if err := codec.Unmarshal(u.Update, &next); err != nil {
			return forbidden("room metadata update: %v", err)
		}
	}
	all := []Capability{CanChangeRoomName, CanChangeRoomDescription, CanChangeRoomAvatar, CanChangeRoomSubject, CanChangeRoomMood}
	changed := []bool{
		old.RoomName != next.RoomName,
		!slices.EqualFunc(old.Descriptions, next.Descriptions, func(a, b RichDescription) bool {
			return a.MediaType == b.MediaType && a.LanguageTag == b.LanguageTag && bytes.Equal(a.Content, b.Content)
		}),
		old.Avatar != next.Avatar, old.Subject != next.Subject, old.Mood != next.Mood,
	}
	some := false
	for i, capability := range all {
		may := role.May(capability)
		if some = some || may; !may && (changed[i] || old.RoomURI != next.RoomURI) {
			return forbidden("%s changes the room's metadata", user)
		}
	}
	if !some {
		return forbidden("%s changes the room's metadata", user)
	}
	return nil
}

// listUpdate checks each change in a participant list update. Of those that don't go together the component finds.
func (c *check) listUpdate(user URI, role *Role, update []byte) error {
	var u ParticipantListUpdate
	if err := codec.Unmarshal(update, &u); err != nil {
		return forbidden("participant list update: %v", err)
	}
	base, err := c.base()
	if err != nil {
		return err
	}
	refused := forbidden("%s changes the participant list", user)
	if len(u.Added)+len(u.Changed)+len(u.Removed) == 0 && !role.May(CanChangeUserRole) {
		return refused
	}
	for _, p := range u.Added {
		if base.FixedMembership || p.User == user || !role.May(CanAddParticipant) || !role.moves(RoleNone, p.Role) {
			return refused
		}
	}
	at := func(i uint32) (Participant, bool) {
		if uint64(i) >= uint64(len(c.list)) {
			return Participant{}, false
		}
		return c.list[i], true
	}
	for _, i := range u.Removed {
		p, ok := at(i)
		needs := CanRemoveParticipant
		if p.User == user {
			needs = CanRemoveSelf
		}
		if !ok || base.FixedMembership || !role.May(needs) || !role.moves(p.Role, RoleNone) {
			return refused
		}
	}
	for _, change := range u.Changed {
		p, ok := at(change.Index)
		if !ok || !c.changesRole(user, role, p, change.Role) {
			return refused
		}
	}
	return nil
}

// changesRole says whether a user with a role may give a participant, perhaps itself, another role.
func (c *check) changesRole(user URI, role *Role, p Participant, to uint32) bool {
	if p.User == user {
		if role.May(canChooseOwnRole) && role.moves(p.Role, to) {
			return true
		}
		next, err := c.preauthorized(user.Provider(), user)
		return err == nil && next != nil && next.Index == to && role.May(CanChangeOwnRole)
	}
	if !role.moves(p.Role, to) {
		return false
	}
	banned := c.roles.Find(RoleBanned)
	named := banned != nil && banned.Name == "banned"
	return role.May(CanChangeUserRole) || to == RoleBanned && named && role.May(CanBan) ||
		p.Role == RoleBanned && named && role.May(CanUnban)
}

// links checks an update of the room's links. When new ones expire is for the hub to check.
func (c *check) links(user URI, role *Role, u *mls.AppDataUpdate) error {
	var update JoinLinksUpdate
	if u.Op != mls.AppDataOpUpdate || codec.Unmarshal(u.Update, &update) != nil {
		return forbidden("%s removes all links, or the update doesn't decode", user)
	}
	have, err := JoinLinksOf(c.dictionary)
	if err != nil {
		return forbidden("%v", err)
	}
	policy := JoinLinkPolicy{MultiUser: true}
	if _, err := policyOf(c.dictionary, ComponentJoinLinkPolicy, &policy); err != nil {
		return forbidden("%v", err)
	}
	if len(update.Removed) > 0 && !role.May(CanDeleteJoinCode) || len(update.Removed)+len(update.Added) == 0 {
		return forbidden("%s removes links", user)
	}
	for _, l := range update.Added {
		if !role.May(CanCreateJoinCode) || !role.moves(RoleNone, l.Role) || l.MultiUser && !policy.MultiUser {
			return forbidden("%s makes a link to role %d", user, l.Role)
		}
	}
	if policy.OnRequest && len(update.Added) > 0 && len(have)-len(update.Removed)+len(update.Added) > 1 {
		return forbidden("%s makes a second link", user)
	}
	return nil
}

// checkExtensions checks the extensions that somebody proposes who may. Package mls checks that the app_data_dictionary is
// left as it is.
func (c *check) checkExtensions(next mls.Extensions) error {
	hub, err := externalSenders(c.extensions)
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
func (c *check) committer(leaf mls.LeafIndex) error {
	user, _, err := c.who(c.tree.Leaf(leaf))
	if err != nil {
		return err
	}
	if !c.stood(user) || !c.stands(user) {
		return forbidden("%s commits and isn't a participant before and after", user)
	}
	return nil
}

// leaves checks the leaves that the commit brings, and those that it should have removed.
func (c *check) leaves(info *mls.StagedInfo) error {
	for _, m := range info.Added {
		user, client, err := c.who(m.Leaf)
		if err != nil {
			return err
		}
		if !c.stands(user) {
			return forbidden("%s joins and %s isn't a participant", client, user)
		}
	}
	for _, u := range info.Updated {
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
		left = left || c.stood(user) && !c.stands(user)
	}
	if !left {
		return nil
	}
	for _, leaf := range info.TreeAfter.Leaves() {
		user, client, err := c.who(leaf)
		if err != nil {
			return err
		}
		if !c.stands(user) {
			return forbidden("%s isn't a participant any more and %s stays", user, client)
		}
	}
	return nil
}
