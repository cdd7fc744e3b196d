package mimi

import (
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// The roles of rooms without a roles_list, as all were before there was one: a member sends and reads, an administrator
// also changes the room, a moderator has no more rights than a member. The first two mean the same in every room.
const (
	RoleNone      uint32 = 0 // not a participant; never in a list
	RoleBanned    uint32 = 1 // in the list, and may have no client in the room
	RoleMember    uint32 = 2
	RoleModerator uint32 = 3
	RoleAdmin     uint32 = 4
)

// Capability is something that a role may do (draft-ietf-mimi-room-policy-03, Section 8).
type Capability uint16

// The capabilities of draft-ietf-mimi-room-policy-03, Section 10.2. What governs none of a room's operations here is kept
// as it comes.
const (
	CanAddParticipant             Capability = 0x0000
	CanRemoveParticipant          Capability = 0x0001
	CanAddOwnClient               Capability = 0x0002
	CanRemoveOwnClient            Capability = 0x0003
	CanOpenJoin                   Capability = 0x0004
	CanJoinIfPreauthorized        Capability = 0x0005
	CanRemoveSelf                 Capability = 0x0006
	CanCreateJoinCode             Capability = 0x0007
	CanDeleteJoinCode             Capability = 0x0008
	CanUseJoinCode                Capability = 0x0009
	CanBan                        Capability = 0x000a
	CanUnban                      Capability = 0x000b
	CanKick                       Capability = 0x000c
	CanChangeUserRole             Capability = 0x000f
	CanChangeOwnRole              Capability = 0x0010
	CanSendMessage                Capability = 0x0100
	CanReceiveMessage             Capability = 0x0101
	CanCopyMessage                Capability = 0x0102
	CanReportAbuse                Capability = 0x0103
	CanReplyToMessage             Capability = 0x0104
	CanReactToMessage             Capability = 0x0105
	CanEditReaction               Capability = 0x0106
	CanDeleteOwnReaction          Capability = 0x0107
	CanDeleteOtherReaction        Capability = 0x0108
	CanEditOwnMessage             Capability = 0x0109
	CanDeleteOwnMessage           Capability = 0x010a
	CanDeleteOtherMessage         Capability = 0x010b
	CanStartTopic                 Capability = 0x010c
	CanReplyInTopic               Capability = 0x010d
	CanEditOwnTopic               Capability = 0x010e
	CanEditOtherTopic             Capability = 0x010f
	CanUploadImage                Capability = 0x0200
	CanUploadAudio                Capability = 0x0201
	CanUploadVideo                Capability = 0x0202
	CanUploadAttachment           Capability = 0x0203
	CanDownloadImage              Capability = 0x0204
	CanDownloadAudio              Capability = 0x0205
	CanDownloadVideo              Capability = 0x0206
	CanDownloadAttachment         Capability = 0x0207
	CanSendLink                   Capability = 0x0208
	CanSendLinkPreview            Capability = 0x0209
	CanFollowLink                 Capability = 0x020a
	CanCopyLink                   Capability = 0x020b
	CanChangeRoomName             Capability = 0x0300
	CanChangeRoomDescription      Capability = 0x0301
	CanChangeRoomAvatar           Capability = 0x0302
	CanChangeRoomSubject          Capability = 0x0303
	CanChangeRoomMood             Capability = 0x0304
	CanChangeOwnName              Capability = 0x0380
	CanChangeOwnPresence          Capability = 0x0381
	CanChangeOwnMood              Capability = 0x0382
	CanChangeOwnAvatar            Capability = 0x0383
	CanDestroyRoom                Capability = 0x0501
	CanChangeRoomMembershipStyle  Capability = 0x0502
	CanChangeRoleDefinitions      Capability = 0x0503
	CanChangePreauthorizedUsers   Capability = 0x0504
	CanChangeOtherPolicyAttribute Capability = 0x0505
	CanChangeOperationalPolicies  Capability = 0x0600
	CanSendReinitProposal         Capability = 0x0601

	// What rooms without a roles_list allow beyond the draft's capabilities; of its range for private use.
	canAddAnyClient  Capability = 0xf000 // of whoever is a participant
	canChooseOwnRole Capability = 0xf001 // among its role changes
)

var capabilityNames = map[Capability]string{
	CanAddParticipant: "canAddParticipant", CanRemoveParticipant: "canRemoveParticipant",
	CanAddOwnClient: "canAddOwnClient", CanRemoveOwnClient: "canRemoveOwnClient", CanOpenJoin: "canOpenJoin",
	CanJoinIfPreauthorized: "canJoinIfPreauthorized", CanRemoveSelf: "canRemoveSelf",
	CanCreateJoinCode: "canCreateJoinCode", CanDeleteJoinCode: "canDeleteJoinCode", CanUseJoinCode: "canUseJoinCode",
	CanBan: "canBan", CanUnban: "canUnBan", CanKick: "canKick", CanChangeUserRole: "canChangeUserRole",
	CanChangeOwnRole: "canChangeOwnRole", CanSendMessage: "canSendMessage", CanReceiveMessage: "canReceiveMessage",
	CanCopyMessage: "canCopyMessage", CanReportAbuse: "canReportAbuse", CanReplyToMessage: "canReplyToMessage",
	CanReactToMessage: "canReactToMessage", CanEditReaction: "canEditReaction",
	CanDeleteOwnReaction: "canDeleteOwnReaction", CanDeleteOtherReaction: "canDeleteOtherReaction",
	CanEditOwnMessage: "canEditOwnMessage", CanDeleteOwnMessage: "canDeleteOwnMessage",
	CanDeleteOtherMessage: "canDeleteOtherMessage", CanStartTopic: "canStartTopic", CanReplyInTopic: "canReplyInTopic",
	CanEditOwnTopic: "canEditOwnTopic", CanEditOtherTopic: "canEditOtherTopic", CanUploadImage: "canUploadImage",
	CanUploadAudio: "canUploadAudio", CanUploadVideo: "canUploadVideo", CanUploadAttachment: "canUploadAttachment",
	CanDownloadImage: "canDownloadImage", CanDownloadAudio: "canDownloadAudio", CanDownloadVideo: "canDownloadVideo",
	CanDownloadAttachment: "canDownloadAttachment", CanSendLink: "canSendLink", CanSendLinkPreview: "canSendLinkPreview",
	CanFollowLink: "canFollowLink", CanCopyLink: "canCopyLink", CanChangeRoomName: "canChangeRoomName",
	CanChangeRoomDescription: "canChangeRoomDescription", CanChangeRoomAvatar: "canChangeRoomAvatar",
	CanChangeRoomSubject: "canChangeRoomSubject", CanChangeRoomMood: "canChangeRoomMood",
	CanChangeOwnName: "canChangeOwnName", CanChangeOwnPresence: "canChangeOwnPresence",
	CanChangeOwnMood: "canChangeOwnMood", CanChangeOwnAvatar: "canChangeOwnAvatar", CanDestroyRoom: "canDestroyRoom",
	CanChangeRoomMembershipStyle: "canChangeRoomMembershipStyle", CanChangeRoleDefinitions: "canChangeRoleDefinitions",
	CanChangePreauthorizedUsers:   "canChangePreauthorizedUserList",
	CanChangeOtherPolicyAttribute: "canChangeOtherPolicyAttribute",
	CanChangeOperationalPolicies:  "canChangeMlsOperationalPolicies", CanSendReinitProposal: "canSendMLSReinitProposal",
}

// String returns the capability's name in draft-ietf-mimi-room-policy-03, Section 10.2, or its number.
func (c Capability) String() string {
	if n, ok := capabilityNames[c]; ok {
		return n
	}
	return fmt.Sprintf("%#04x", uint16(c))
}

// Bounds of a roles_list.
const (
	MaxRoles        = 64
	maxCapabilities = 256
)

// Role is what the participants who have it may do (draft-ietf-mimi-room-policy-03, Section 3). Participants are active
// while they have clients in the room. Texts are UTF-8 without nulls.
//
//	struct {
//	    uint32 role_index;
//	    opaque role_name<V>;
//	    opaque role_description<V>;
//	    CapabilityType role_capabilities<V>;
//	    uint32 minimum_participants_constraint;
//	    optional uint32 maximum_participants_constraint;
//	    uint32 minimum_active_participants_constraint;
//	    optional uint32 maximum_active_participants_constraint;
//	    SingleSourceRoleChangeTargets authorized_role_changes<V>;
//	} Role;
type Role struct {
	Index           uint32
	Name            string
	Description     string
	Capabilities    []Capability
	MinParticipants uint32
	MaxParticipants *uint32 // nil: as many as there may be
	MinActive       uint32
	MaxActive       *uint32
	Changes         []RoleChanges
}

// RoleChanges are the roles that one who has From may get from somebody with the Role that has the RoleChanges.
//
//	struct {
//	    uint32 from_role_index;
//	    uint32 target_role_indexes<V>;
//	} SingleSourceRoleChangeTargets;
type RoleChanges struct {
	From uint32
	To   []uint32
}

// May says whether the role has a capability.
func (r *Role) May(c Capability) bool { return r != nil && slices.Contains(r.Capabilities, c) }

// moves says whether who has the role may move somebody from one role to another.
func (r *Role) moves(from, to uint32) bool {
	return r != nil && slices.ContainsFunc(r.Changes, func(c RoleChanges) bool { return c.From == from && slices.Contains(c.To, to) })
}

// Active says whether participants with the role may have clients in the room.
func (r *Role) Active() bool {
	return r != nil && r.Index != RoleNone && r.Index != RoleBanned && (r.MaxActive == nil || *r.MaxActive > 0)
}

// Speaks says whether participants with the role may send any messages. Of which kind they are, only clients see.
func (r *Role) Speaks() bool {
	return r.Active() && slices.ContainsFunc(r.Capabilities, func(c Capability) bool {
		switch c {
		case CanSendMessage, CanReplyToMessage, CanReplyInTopic, CanReactToMessage, CanEditReaction, CanDeleteOwnReaction,
			CanDeleteOtherReaction, CanEditOwnMessage, CanDeleteOwnMessage, CanDeleteOtherMessage, CanStartTopic:
			return true
		}
		return false
	})
}

// Claims says whether participants with the role may have reason to claim KeyPackages of others, or of their own clients.
func (r *Role) Claims(own bool) bool {
	return r.Active() && (r.May(canAddAnyClient) || r.May(CanAddParticipant) || own && r.May(CanAddOwnClient))
}

// MarshalMLS implements codec.Marshaler.
func (r Role) MarshalMLS(w *codec.Writer) {
	w.Uint32(r.Index)
	w.Opaque([]byte(r.Name))
	w.Opaque([]byte(r.Description))
	codec.WriteVector(w, r.Capabilities, func(w *codec.Writer, c Capability) { w.Uint16(uint16(c)) })
	w.Uint32(r.MinParticipants)
	writeOptional32(w, r.MaxParticipants)
	w.Uint32(r.MinActive)
	writeOptional32(w, r.MaxActive)
	codec.WriteVector(w, r.Changes, func(w *codec.Writer, c RoleChanges) {
		w.Uint32(c.From)
		codec.WriteVector(w, c.To, func(w *codec.Writer, to uint32) { w.Uint32(to) })
	})
}

// UnmarshalMLS implements codec.Unmarshaler.
func (r *Role) UnmarshalMLS(rd *codec.Reader) {
	*r = Role{Index: rd.Uint32(), Name: readText(rd, MaxText), Description: readText(rd, MaxText)}
	r.Capabilities = readAtMost(rd, maxCapabilities, func(rd *codec.Reader) Capability { return Capability(rd.Uint16()) })
	r.MinParticipants, r.MaxParticipants = rd.Uint32(), readOptional32(rd)
	r.MinActive, r.MaxActive = rd.Uint32(), readOptional32(rd)
	r.Changes = readAtMost(rd, MaxRoles, func(rd *codec.Reader) RoleChanges {
		return RoleChanges{rd.Uint32(), readAtMost(rd, MaxRoles, func(rd *codec.Reader) uint32 { return rd.Uint32() })}
	})
}

func writeOptional32(w *codec.Writer, n *uint32) {
	w.Optional(n != nil)
	if n != nil {
		w.Uint32(*n)
	}
}

func readOptional32(r *codec.Reader) *uint32 {
	if !r.Optional() {
		return nil
	}
	n := r.Uint32()
	return &n
}

// readAtMost is a vector of at most limit elements.
func readAtMost[T any](r *codec.Reader, limit int, read func(*codec.Reader) T) []T {
	n := 0
	return codec.ReadVector(r, func(r *codec.Reader) T {
		if n++; n > limit {
			r.Failf("more than %d elements", limit)
		}
		return read(r)
	})
}

// RoleList is the roles_list component of a room's GroupContext, and its update, which replaces it: a room's roles. A
// list that decodes has no index twice, and can_open_join in role 0 only.
//
//	struct {
//	    Role roles<V>;
//	} RoleData;
type RoleList []Role

// MarshalMLS implements codec.Marshaler.
func (l RoleList) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, r Role) { r.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *RoleList) UnmarshalMLS(r *codec.Reader) {
	*l = readAtMost(r, MaxRoles, func(r *codec.Reader) (role Role) {
		role.UnmarshalMLS(r)
		return role
	})
	if r.Err() == nil {
		if err := l.check(); err != nil {
			r.Fail(fmt.Errorf("%w: %w", codec.ErrValue, err))
		}
	}
}

func (l RoleList) check() error {
	for i := range l {
		r := &l[i]
		switch {
		case l.Find(r.Index) != r:
			return fmt.Errorf("mimi: two roles with index %d", r.Index)
		case r.Index != RoleNone && r.May(CanOpenJoin):
			return fmt.Errorf("mimi: role %d lets strangers join", r.Index)
		case r.MaxParticipants != nil && *r.MaxParticipants < r.MinParticipants, r.MaxActive != nil && *r.MaxActive < r.MinActive:
			return fmt.Errorf("mimi: role %d has a lower maximum than minimum", r.Index)
		}
	}
	return nil
}

// Find returns the role of an index, nil if there is none.
func (l RoleList) Find(index uint32) *Role {
	for i := range l {
		if l[i].Index == index {
			return &l[i]
		}
	}
	return nil
}

// Named returns the role of a name, nil if there is none.
func (l RoleList) Named(name string) *Role {
	for i := range l {
		if l[i].Name == name {
			return &l[i]
		}
	}
	return nil
}

// ByLink returns the first role that somebody gets by a link, RoleNone if nobody does.
func (l RoleList) ByLink() uint32 {
	if zero := l.Find(RoleNone); zero.May(CanUseJoinCode) {
		for i := range l {
			if zero.moves(RoleNone, l[i].Index) && l[i].Active() {
				return l[i].Index
			}
		}
	}
	return RoleNone
}

// RolesOf returns the roles of a room with that app_data_dictionary; if it has no roles_list, those that all rooms had
// before.
func RolesOf(d mls.AppDataDictionary) (RoleList, error) {
	b, ok := d.Get(ComponentRoles)
	if !ok {
		return basicRoles, nil
	}
	var l RoleList
	if err := codec.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("mimi: roles: %w", err)
	}
	return l, nil
}

// basicRoles are the roles of rooms without a roles_list.
var basicRoles = func() RoleList {
	zero := uint32(0)
	member := []Capability{
		canAddAnyClient, CanAddOwnClient, CanRemoveOwnClient, CanRemoveSelf,
		CanSendMessage, CanReceiveMessage, CanCopyMessage, CanReportAbuse, CanReplyToMessage, CanReactToMessage,
		CanEditReaction, CanDeleteOwnReaction, CanEditOwnMessage, CanDeleteOwnMessage, CanStartTopic, CanReplyInTopic, CanEditOwnTopic,
		CanUploadImage, CanUploadAudio, CanUploadVideo, CanUploadAttachment,
		CanDownloadImage, CanDownloadAudio, CanDownloadVideo, CanDownloadAttachment,
		CanSendLink, CanSendLinkPreview, CanFollowLink, CanCopyLink,
	}
	admin := append(slices.Clone(member),
		CanAddParticipant, CanRemoveParticipant, CanKick, CanBan, CanUnban, CanChangeUserRole, canChooseOwnRole,
		CanChangeRoomName, CanChangeRoomDescription, CanChangeRoomAvatar, CanChangeRoomSubject, CanChangeRoomMood,
		CanChangeOperationalPolicies)
	all := []uint32{RoleNone, RoleBanned, RoleMember, RoleModerator, RoleAdmin}
	var any []RoleChanges
	for _, from := range all {
		any = append(any, RoleChanges{from, all})
	}
	return RoleList{
		{Index: RoleBanned, Name: "banned", MaxActive: &zero},
		{Index: RoleMember, Name: "member", Capabilities: member, Changes: []RoleChanges{{RoleMember, []uint32{RoleNone}}}},
		{Index: RoleModerator, Name: "moderator", Capabilities: member, Changes: []RoleChanges{{RoleModerator, []uint32{RoleNone}}}},
		{Index: RoleAdmin, Name: "admin", Capabilities: admin, Changes: any},
	}
}()
