package mimi

import (
	"cmp"
	"slices"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Rules are what a room with a roles_list begins with besides its participants, and what it has of that later. Policies that
// are nil or 0 are left out.
type Rules struct {
	Roles         RoleList
	Creator       uint32 // the role of who creates the room; RoleNone later
	Preauthorized Preauthorized
	Base          *BasePolicy
	JoinLinks     *JoinLinkPolicy
	Assets        *AssetPolicy
	History       *HistoryPolicy
	Bots          BotPolicy
	Expiration    *MessageExpiration
	RenewalDays   uint16 // see LeafRenewal
}

// Dictionary puts the rules into the app_data_dictionary with which a room begins, and has members support what they say.
func (r *Rules) Dictionary(d mls.AppDataDictionary) mls.AppDataDictionary {
	required := PolicyComponents()
	if b, ok := d.Get(mls.ComponentAppComponents); ok {
		var have mls.ComponentsList
		if codec.Unmarshal(b, &have) == nil {
			required = append(have, required...)
		}
	}
	d = d.Set(mls.ComponentAppComponents, codec.Marshal(required)).Set(ComponentRoles, codec.Marshal(r.Roles))
	if len(r.Preauthorized) > 0 {
		d = d.Set(ComponentPreauthorized, codec.Marshal(r.Preauthorized))
	}
	if r.Base != nil {
		d = d.Set(ComponentBasePolicy, codec.Marshal(r.Base))
	}
	if r.JoinLinks != nil {
		d = d.Set(ComponentJoinLinkPolicy, codec.Marshal(r.JoinLinks))
	}
	if r.Assets != nil {
		d = d.Set(ComponentAssets, codec.Marshal(r.Assets))
	}
	if r.History != nil {
		d = d.Set(ComponentHistory, codec.Marshal(r.History))
	}
	if len(r.Bots) > 0 {
		d = d.Set(ComponentBots, codec.Marshal(r.Bots))
	}
	if r.Expiration != nil {
		d = d.Set(ComponentExpiration, codec.Marshal(r.Expiration))
	}
	if r.RenewalDays > 0 {
		d = d.Set(ComponentLeafRenewal, codec.Marshal(LeafRenewal{r.RenewalDays}))
	}
	return d
}

// RulesOf returns the rules of a room with that app_data_dictionary. Those of a room without a roles_list are the roles that
// RolesOf returns.
func RulesOf(d mls.AppDataDictionary) (r Rules, err error) {
	take := func(id mls.ComponentID, into codec.Unmarshaler) bool {
		ok, e := policyOf(d, id, into)
		err = cmp.Or(err, e)
		return ok
	}
	r.Roles, err = RolesOf(d)
	take(ComponentPreauthorized, &r.Preauthorized)
	if p := new(BasePolicy); take(ComponentBasePolicy, p) {
		r.Base = p
	}
	if p := new(JoinLinkPolicy); take(ComponentJoinLinkPolicy, p) {
		r.JoinLinks = p
	}
	if p := new(AssetPolicy); take(ComponentAssets, p) {
		r.Assets = p
	}
	if p := new(HistoryPolicy); take(ComponentHistory, p) {
		r.History = p
	}
	take(ComponentBots, &r.Bots)
	if p := new(MessageExpiration); take(ComponentExpiration, p) {
		r.Expiration = p
	}
	if p := new(LeafRenewal); take(ComponentLeafRenewal, p) {
		r.RenewalDays = p.Days
	}
	return r, err
}

// The four example rooms of draft-ietf-mimi-room-policy-03, Appendix A. What its lists name that Section 10.2 doesn't
// register (canRevokeVoice, canGrantVoice) is left out. The hub, by its provider's URI, is preauthorized as
// policy_enforcer; nobody in the participant list has that role.

func most(n uint32) *uint32 { return &n }

func noRole(capabilities []Capability, to ...uint32) Role {
	r := Role{Index: RoleNone, Name: "no_role", Capabilities: capabilities, MaxActive: most(0)}
	if len(to) > 0 {
		r.Changes = []RoleChanges{{RoleNone, to}}
	}
	return r
}

func banned() Role { return Role{Index: RoleBanned, Name: "banned", MaxActive: most(0)} }

// leaves is a role whose holders may come and go, and no more.
func leaves(index uint32, name string, capabilities []Capability) Role {
	return Role{
		Index: index, Name: name, Capabilities: capabilities,
		Changes: []RoleChanges{{RoleNone, []uint32{index}}, {index, []uint32{RoleNone}}},
	}
}

// upTo are the changes from every role up to last to every other one; the last three levels of the examples have them.
func upTo(last uint32) []RoleChanges {
	var changes []RoleChanges
	for from := range last + 1 {
		c := RoleChanges{From: from}
		for to := range last + 1 {
			if to != from {
				c.To = append(c.To, to)
			}
		}
		changes = append(changes, c)
	}
	return changes
}

// enforcer is the role of the hub: it removes and bans those with roles up to last, and gives nobody another role.
func enforcer(index uint32, from ...uint32) Role {
	r := Role{
		Index: index, Name: "policy_enforcer", MinParticipants: 1, MaxParticipants: most(2), MaxActive: most(0),
		Capabilities: []Capability{
			CanRemoveParticipant, CanChangeUserRole, CanBan, CanUnban, CanChangeRoleDefinitions, CanChangePreauthorizedUsers,
			CanChangeOperationalPolicies, CanDestroyRoom, CanSendReinitProposal,
		},
		Changes: []RoleChanges{{RoleNone, []uint32{RoleBanned}}, {RoleBanned, []uint32{RoleNone}}},
	}
	for _, f := range from {
		r.Changes = append(r.Changes, RoleChanges{f, []uint32{RoleNone, RoleBanned}})
	}
	return r
}

func hubEnforces(hub URI, role uint32) Preauthorized {
	return Preauthorized{{Claims: []Claim{SubjectClaim(hub)}, Role: role}}
}

func with(capabilities []Capability, more ...Capability) []Capability {
	return append(slices.Clone(capabilities), more...)
}

// CooperativeRoom is for friends and small groups: whoever is in it adds and removes others. Its roles are ordinary_user
// (2), group_admin (3) and super_admin (4), the creator's.
func CooperativeRoom(hub URI) Rules {
	user := []Capability{
		CanAddParticipant, CanRemoveParticipant, CanAddOwnClient, CanRemoveOwnClient, CanRemoveSelf,
		CanSendMessage, CanReceiveMessage, CanCopyMessage, CanReportAbuse, CanReplyToMessage, CanReactToMessage,
		CanDeleteOwnReaction, CanEditOwnMessage, CanDeleteOwnMessage, CanStartTopic, CanReplyInTopic, CanEditOwnTopic,
		CanUploadImage, CanUploadVideo, CanUploadAudio, CanUploadAttachment,
		CanDownloadImage, CanDownloadVideo, CanDownloadAudio, CanDownloadAttachment,
		CanSendLink, CanSendLinkPreview, CanFollowLink, CanCopyLink,
		CanChangeRoomName, CanChangeRoomAvatar, CanChangeRoomSubject, CanChangeRoomMood,
		CanChangeOwnName, CanChangeOwnPresence, CanChangeOwnMood, CanChangeOwnAvatar,
	}
	admin := with(user, CanBan, CanUnban, CanKick, CanChangeUserRole, CanDeleteOtherMessage, CanEditOtherTopic, CanChangeRoomDescription)
	super := with(admin, CanChangeRoomMembershipStyle, CanChangePreauthorizedUsers, CanDestroyRoom)
	return Rules{
		Roles: RoleList{
			noRole(nil), banned(), leaves(2, "ordinary_user", user),
			{Index: 3, Name: "group_admin", Capabilities: admin, MinParticipants: 1, Changes: upTo(3)},
			{Index: 4, Name: "super_admin", Capabilities: super, Changes: upTo(4)},
			enforcer(5, 2, 3, 4),
		},
		Creator: 4, Preauthorized: hubEnforces(hub, 5),
	}
}

// StrictRoom is administered: only a group_admin (3) or super_admin (4, the creator's) adds and removes others. Links and
// preauthorizations make ordinary_users (2).
func StrictRoom(hub URI) Rules {
	user := []Capability{
		CanAddOwnClient, CanJoinIfPreauthorized, CanRemoveOwnClient, CanRemoveSelf, CanChangeOwnRole,
		CanSendMessage, CanReceiveMessage, CanCopyMessage, CanReportAbuse, CanReactToMessage, CanDeleteOwnReaction,
		CanEditOwnMessage, CanDeleteOwnMessage, CanStartTopic, CanReplyInTopic,
		CanUploadImage, CanUploadVideo, CanUploadAudio, CanUploadAttachment,
		CanDownloadImage, CanDownloadVideo, CanDownloadAudio, CanDownloadAttachment,
		CanSendLink, CanSendLinkPreview, CanFollowLink, CanCopyLink,
		CanChangeOwnName, CanChangeOwnPresence, CanChangeOwnMood, CanChangeOwnAvatar,
	}
	admin := with(user,
		CanAddParticipant, CanRemoveParticipant, CanBan, CanUnban, CanKick, CanChangeUserRole, CanCreateJoinCode, CanDeleteJoinCode,
		CanDeleteOtherReaction, CanDeleteOtherMessage, CanEditOwnTopic, CanEditOtherTopic,
		CanChangeRoomDescription, CanChangeRoomName, CanChangeRoomAvatar, CanChangeRoomSubject, CanChangeRoomMood)
	super := with(admin, CanChangeRoomMembershipStyle, CanChangeRoleDefinitions, CanChangePreauthorizedUsers, CanDestroyRoom, CanSendReinitProposal)
	return Rules{
		Roles: RoleList{
			noRole([]Capability{CanUseJoinCode}, 2), banned(), leaves(2, "ordinary_user", user),
			{Index: 3, Name: "group_admin", Capabilities: admin, MinParticipants: 1, Changes: upTo(3)},
			{Index: 4, Name: "super_admin", Capabilities: super, Changes: upTo(4)},
			enforcer(5, 2, 3, 4),
		},
		Creator: 4, Preauthorized: hubEnforces(hub, 5),
	}
}

// ModeratedRoom is for events: guests (2) and attendees (3) listen, speakers (4) speak, moderators (5) and the
// super_admin (6, the creator's) say who is what.
func ModeratedRoom(hub URI) Rules {
	guest := []Capability{
		CanRemoveSelf, CanReceiveMessage, CanCopyMessage, CanReactToMessage, CanDeleteOwnReaction, CanFollowLink, CanCopyLink,
		CanDownloadImage, CanDownloadVideo, CanDownloadAudio,
	}
	attendee := with(guest,
		CanAddOwnClient, CanJoinIfPreauthorized, CanRemoveOwnClient, CanChangeOwnRole, CanReportAbuse, CanReplyInTopic,
		CanDownloadAttachment, CanChangeOwnName, CanChangeOwnPresence, CanChangeOwnAvatar)
	speaker := with(attendee,
		CanSendMessage, CanEditOwnMessage, CanDeleteOwnMessage, CanStartTopic, CanUploadImage, CanUploadVideo, CanUploadAudio,
		CanUploadAttachment, CanSendLink, CanSendLinkPreview)
	moderator := with(speaker,
		CanAddParticipant, CanRemoveParticipant, CanBan, CanUnban, CanKick, CanChangeUserRole, CanCreateJoinCode, CanDeleteJoinCode,
		CanDeleteOtherReaction, CanDeleteOtherMessage, CanEditOwnTopic, CanEditOtherTopic,
		CanChangeRoomName, CanChangeRoomAvatar, CanChangeRoomSubject, CanChangeRoomMood)
	super := with(moderator,
		CanChangeRoomDescription, CanChangeRoomMembershipStyle, CanChangeRoleDefinitions, CanChangePreauthorizedUsers,
		CanDestroyRoom, CanSendReinitProposal)
	none := noRole([]Capability{CanUseJoinCode}, 2, 3)
	none.MaxActive = nil
	return Rules{
		Roles: RoleList{
			none, banned(), leaves(2, "guest", guest), leaves(3, "attendee", attendee), leaves(4, "speaker", speaker),
			{Index: 5, Name: "moderator", Capabilities: moderator, MinParticipants: 1, Changes: upTo(5)},
			{Index: 6, Name: "super_admin", Capabilities: super, Changes: upTo(6)},
			enforcer(7, 2, 3, 4, 5, 6),
		},
		Creator: 6, Preauthorized: hubEnforces(hub, 7),
	}
}

// MultiOrganizationRoom is one in which each organisation has its users and its admins, three at most, who move only
// their own: with two others besides the hub's, users have the roles 2 to 4, admins 5 to 7, the super_admin, the
// creator's, 8. Users of the hub's organisation may join by themselves. The roles are named after the domains.
func MultiOrganizationRoom(hub URI, others ...URI) Rules {
	user := []Capability{
		CanRemoveSelf, CanAddOwnClient, CanRemoveOwnClient, CanSendMessage, CanReceiveMessage, CanCopyMessage, CanReportAbuse,
		CanReplyInTopic, CanReactToMessage, CanDeleteOwnReaction, CanEditOwnMessage, CanSendLink, CanSendLinkPreview,
		CanFollowLink, CanCopyLink, CanDownloadImage, CanDownloadVideo, CanDownloadAudio, CanDownloadAttachment,
		CanChangeOwnName, CanChangeOwnPresence, CanChangeOwnAvatar,
	}
	admin := with(user,
		CanDeleteOwnMessage, CanStartTopic, CanUploadImage, CanUploadVideo, CanUploadAudio, CanUploadAttachment,
		CanAddParticipant, CanRemoveParticipant, CanBan, CanKick, CanChangeUserRole)
	orgs := append([]URI{hub}, others...)
	n := uint32(len(orgs))
	userOf, adminOf := func(org uint32) uint32 { return 2 + org }, func(org uint32) uint32 { return 2 + n + org }
	super, hubRole := 2+2*n, 3+2*n
	rules := Rules{Roles: RoleList{noRole(nil), banned()}, Creator: super}
	var all []uint32 // roles of users, then of admins, then super
	var changes []RoleChanges
	for org := range n {
		u, a := userOf(org), adminOf(org)
		r := leaves(u, orgs[org].Domain()+" user", user)
		if org == 0 {
			r.Capabilities = with(user, CanChangeOwnRole, CanJoinIfPreauthorized)
		}
		rules.Roles = append(rules.Roles, r)
		changes = append(changes, RoleChanges{u, []uint32{RoleNone, RoleBanned, a}})
	}
	for org := range n {
		u, a := userOf(org), adminOf(org)
		r := Role{
			Index: a, Name: orgs[org].Domain() + " admin", Capabilities: admin, MinParticipants: 1, MaxParticipants: most(3), MinActive: 1,
			Changes: []RoleChanges{{RoleNone, []uint32{u, a}}, {u, []uint32{RoleNone, RoleBanned, a}}, {a, []uint32{RoleNone, RoleBanned, u}}},
		}
		if org == 0 {
			r.Capabilities = with(admin, CanChangeOwnRole, CanJoinIfPreauthorized)
			r.MinParticipants, r.MaxParticipants, r.MinActive = 0, nil, 0
		}
		rules.Roles = append(rules.Roles, r)
		changes = append(changes, RoleChanges{a, []uint32{RoleNone, RoleBanned, u}})
	}
	for role := uint32(2); role <= super; role++ {
		all = append(all, role)
	}
	changes[0].To = append(changes[0].To, super)
	changes[n].To = append(changes[n].To, super)
	changes = append(changes,
		RoleChanges{RoleNone, append([]uint32{RoleBanned}, all...)}, RoleChanges{RoleBanned, append([]uint32{RoleNone}, all...)},
		RoleChanges{super, []uint32{RoleNone, RoleBanned, userOf(0), adminOf(0)}})
	rules.Roles = append(rules.Roles, Role{
		Index: super, Name: "super_admin", MinParticipants: 1, MinActive: 1, Changes: changes,
		Capabilities: with(admin, CanChangeOwnRole, CanJoinIfPreauthorized, CanUnban,
			CanDeleteOtherReaction, CanDeleteOtherMessage, CanEditOwnTopic, CanEditOtherTopic,
			CanChangeRoomDescription, CanChangeRoomName, CanChangeRoomAvatar, CanChangeRoomSubject, CanChangeRoomMood,
			CanChangeRoomMembershipStyle, CanChangeRoleDefinitions, CanChangePreauthorizedUsers, CanDestroyRoom, CanSendReinitProposal),
	}, enforcer(hubRole, all[1:]...))
	rules.Preauthorized = append(hubEnforces(hub, hubRole), PreauthorizedRole{Claims: []Claim{ProviderClaim(hub)}, Role: userOf(0)})
	return rules
}
