package mimi

import (
	"fmt"
	"slices"
	"time"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// The components of a room's policy (draft-ietf-mimi-room-policy-03, Section 10.1), and one of Parley's own.
const (
	ComponentRoles          mls.ComponentID = 0x25
	ComponentPreauthorized  mls.ComponentID = 0x26
	ComponentBasePolicy     mls.ComponentID = 0x27
	ComponentJoinLinkPolicy mls.ComponentID = 0x29
	ComponentJoinLinks      mls.ComponentID = 0x2a
	ComponentAssets         mls.ComponentID = 0x2c
	ComponentHistory        mls.ComponentID = 0x2e
	ComponentBots           mls.ComponentID = 0x2f
	ComponentExpiration     mls.ComponentID = 0x30
	ComponentLeafRenewal    mls.ComponentID = 0xf100
)

// MinRetention is how long a hub keeps an entry of a room's log, at least, that hasn't reached a member's client or a
// provider yet, whatever the room's policy says. draft-ietf-mimi-room-policy-03 leaves it to providers.
const MinRetention = 24 * time.Hour

// policies are the components whose update replaces their data, with a decoder each.
var policies = map[mls.ComponentID]func() codec.Unmarshaler{
	ComponentRoles:          func() codec.Unmarshaler { return new(RoleList) },
	ComponentPreauthorized:  func() codec.Unmarshaler { return new(Preauthorized) },
	ComponentBasePolicy:     func() codec.Unmarshaler { return new(BasePolicy) },
	ComponentJoinLinkPolicy: func() codec.Unmarshaler { return new(JoinLinkPolicy) },
	ComponentAssets:         func() codec.Unmarshaler { return new(AssetPolicy) },
	ComponentHistory:        func() codec.Unmarshaler { return new(HistoryPolicy) },
	ComponentBots:           func() codec.Unmarshaler { return new(BotPolicy) },
	ComponentExpiration:     func() codec.Unmarshaler { return new(MessageExpiration) },
	ComponentLeafRenewal:    func() codec.Unmarshaler { return new(LeafRenewal) },
}

// PolicyComponents are the components that every member of a room with a roles_list has to support.
func PolicyComponents() mls.ComponentsList {
	return mls.ComponentsList{
		ComponentRoles, ComponentPreauthorized, ComponentBasePolicy, ComponentJoinLinkPolicy, ComponentJoinLinks,
		ComponentAssets, ComponentHistory, ComponentBots, ComponentExpiration, ComponentLeafRenewal,
	}
}

// policyComponent is the logic of one of the policies.
type policyComponent struct{ decoder func() codec.Unmarshaler }

// Update implements mls.Component. The update replaces the data; there may be one per commit.
func (c policyComponent) Update(_ []byte, updates [][]byte) ([]byte, error) {
	if len(updates) != 1 {
		return nil, fmt.Errorf("mimi: %d updates of one policy in one commit", len(updates))
	}
	v := c.decoder()
	if err := codec.Unmarshal(updates[0], v); err != nil {
		return nil, fmt.Errorf("mimi: policy update: %T: %w", v, err)
	}
	return updates[0], nil
}

// policyOf decodes a component into v, and returns false if the room hasn't got it.
func policyOf(d mls.AppDataDictionary, id mls.ComponentID, v codec.Unmarshaler) (bool, error) {
	b, ok := d.Get(id)
	if !ok {
		return false, nil
	}
	if err := codec.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("mimi: %T: %w", v, err)
	}
	return true, nil
}

// Optionality says whether something is allowed (draft-ietf-mimi-room-policy-03, Section 6.1).
type Optionality uint8

// The values of draft-ietf-mimi-room-policy-03.
const (
	Optional  Optionality = 0
	Required  Optionality = 1
	Forbidden Optionality = 2
)

func readOptionality(r *codec.Reader) Optionality {
	o := Optionality(r.Uint8())
	if o > Forbidden {
		r.Failf("optionality %d", o)
	}
	return o
}

// The claims that a preauthorization may ask for: of an X.509 credential, by the encoded OID of an extension.
// draft-ietf-mimi-room-policy-03 leaves open what a claim's value is (a TODO of its Section 4); here it is a MIMI URI.
var (
	claimSubject = []byte{0x06, 0x03, 0x55, 0x1d, 0x11} // subjectAltName: the user, the client, or the node's provider
	claimIssuer  = []byte{0x06, 0x03, 0x55, 0x1d, 0x12} // issuerAltName: the user's provider
)

// Claim is something that a credential must say (draft-ietf-mimi-room-policy-03, Section 4).
//
//	struct {
//	    CredentialType credential_type;
//	    opaque id<V>;
//	} ClaimId;
//
//	struct {
//	    ClaimId claim_id;
//	    opaque claim_value<V>;
//	} Claim;
type Claim struct {
	Type  mls.CredentialType
	ID    []byte
	Value []byte
}

// SubjectClaim is that of a credential which names a user, a client, or the provider of a node.
func SubjectClaim(u URI) Claim { return Claim{mls.CredentialX509, claimSubject, []byte(u)} }

// ProviderClaim is that of the credentials of a provider's users.
func ProviderClaim(provider URI) Claim {
	return Claim{mls.CredentialX509, claimIssuer, []byte(provider)}
}

// holds says whether one whose credential names these URIs and is from that provider makes the claim.
func (c *Claim) holds(provider URI, names ...URI) bool {
	switch value := URI(c.Value); {
	case c.Type != mls.CredentialX509:
		return false
	case string(c.ID) == string(claimSubject):
		return slices.Contains(names, value)
	case string(c.ID) == string(claimIssuer):
		return provider != "" && value == provider
	}
	return false
}

// PreauthorizedRole is a role for those whose credentials make all claims. The draft's syntax has a whole Role as
// target_role, where its text means a role of the room; it is the index of one here.
//
//	struct {
//	    Claim claimset<V>;
//	    uint32 target_role_index;
//	} PreAuthRoleEntry;
type PreauthorizedRole struct {
	Claims []Claim
	Role   uint32
}

// Preauthorized is the preauth_list component: who gets which role without being in the participant list (
// draft-ietf-mimi-room-policy-03, Section 4). The first entry that matches decides. The room's hub is external sender 0
// and matches SubjectClaim of its provider.
//
//	struct {
//	    PreAuthRoleEntry preauthorized_entries<V>;
//	} PreAuthData;
type Preauthorized []PreauthorizedRole

const maxPreauthorized = 1024

// MarshalMLS implements codec.Marshaler.
func (p Preauthorized) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, p, func(w *codec.Writer, e PreauthorizedRole) {
		codec.WriteVector(w, e.Claims, func(w *codec.Writer, c Claim) {
			w.Uint16(uint16(c.Type))
			w.Opaque(c.ID)
			w.Opaque(c.Value)
		})
		w.Uint32(e.Role)
	})
}

// UnmarshalMLS implements codec.Unmarshaler. An entry without claims is refused: it would match everybody.
func (p *Preauthorized) UnmarshalMLS(r *codec.Reader) {
	*p = readAtMost(r, maxPreauthorized, func(r *codec.Reader) (e PreauthorizedRole) {
		e.Claims = readAtMost(r, 16, func(r *codec.Reader) Claim {
			return Claim{mls.CredentialType(r.Uint16()), r.OpaqueMax(64), r.OpaqueMax(1024)}
		})
		if e.Role = r.Uint32(); len(e.Claims) == 0 || e.Role <= RoleBanned {
			r.Failf("a preauthorization without claims or role")
		}
		return e
	})
}

// role returns the role that the first matching entry gives, RoleNone if none matches.
func (p Preauthorized) role(provider URI, names ...URI) uint32 {
	for _, e := range p {
		if !slices.ContainsFunc(e.Claims, func(c Claim) bool { return !c.holds(provider, names...) }) {
			return e.Role
		}
	}
	return RoleNone
}

// BasePolicy is the base_room_policy component (draft-ietf-mimi-room-policy-03, Section 5). Of it, RoomPolicy enforces
// FixedMembership, MultiDevice, MaxClients and MaxUsers. Rooms that depend on another one aren't supported: they don't
// decode.
//
//	struct {
//	    bool fixed_membership;
//	    bool parent_dependant;
//	    Uri parent_room<V>;
//	    bool multi_device;
//	    optional uint32 max_clients;
//	    optional uint32 max_users;
//	    bool pseudonyms_allowed;
//	    bool persistent_room;
//	    bool discoverable;
//	    Component policy_component_ids<V>;
//	} BaseRoomPolicy;
type BasePolicy struct {
	FixedMembership bool
	MultiDevice     bool // if not, no user has more than one client in the room
	MaxClients      *uint32
	MaxUsers        *uint32 // who aren't banned
	Pseudonyms      bool
	Persistent      bool
	Discoverable    bool
	Components      mls.ComponentsList
}

// MarshalMLS implements codec.Marshaler.
func (p BasePolicy) MarshalMLS(w *codec.Writer) {
	w.Optional(p.FixedMembership)
	w.Optional(false)
	w.Opaque(nil)
	w.Optional(p.MultiDevice)
	writeOptional32(w, p.MaxClients)
	writeOptional32(w, p.MaxUsers)
	w.Optional(p.Pseudonyms)
	w.Optional(p.Persistent)
	w.Optional(p.Discoverable)
	p.Components.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *BasePolicy) UnmarshalMLS(r *codec.Reader) {
	*p = BasePolicy{FixedMembership: r.Optional()}
	if parent := r.Optional(); parent || len(r.OpaqueMax(MaxURI)) > 0 {
		r.Failf("a room that depends on another one")
	}
	p.MultiDevice = r.Optional()
	p.MaxClients, p.MaxUsers = readOptional32(r), readOptional32(r)
	p.Pseudonyms, p.Persistent, p.Discoverable = r.Optional(), r.Optional(), r.Optional()
	p.Components.UnmarshalMLS(r)
}

// HistoryPolicy is the chat_history_policy component: who may give new participants what was said before (
// draft-ietf-mimi-room-policy-03, Section 6.6). Members keep it, see ShareHistory.
//
//	struct {
//	    Optionality history_sharing;
//	    select (history_sharing) {
//	        case required, optional:
//	            uint32 roles_that_can_share<V>;
//	            bool automatically_share;
//	            uint32 max_time_period;
//	    };
//	} HistoryPolicy;
type HistoryPolicy struct {
	Sharing   Optionality
	Roles     []uint32 // that can share
	Automatic bool     // without the user doing anything
	MaxPeriod uint32   // s; 0 is no history
}

// MarshalMLS implements codec.Marshaler.
func (p HistoryPolicy) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(p.Sharing))
	if p.Sharing == Forbidden {
		return
	}
	codec.WriteVector(w, p.Roles, func(w *codec.Writer, r uint32) { w.Uint32(r) })
	w.Optional(p.Automatic)
	w.Uint32(p.MaxPeriod)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *HistoryPolicy) UnmarshalMLS(r *codec.Reader) {
	*p = HistoryPolicy{Sharing: readOptionality(r)}
	if p.Sharing == Forbidden {
		return
	}
	p.Roles = readAtMost(r, MaxRoles, func(r *codec.Reader) uint32 { return r.Uint32() })
	p.Automatic, p.MaxPeriod = r.Optional(), r.Uint32()
	if slices.Contains(p.Roles, RoleNone) || slices.Contains(p.Roles, RoleBanned) {
		r.Failf("strangers or the banned share the history")
	}
}

// ShareHistory says whether a user may share the history of a room with that app_data_dictionary, and how much of it; a
// room without a policy leaves it to its participants, without a bound (0). own is for the sharing between the devices
// of one user, which needs no role but isn't allowed either where sharing is forbidden.
func ShareHistory(d mls.AppDataDictionary, user URI, own bool) (ok bool, period time.Duration, err error) {
	role, err := RoleOf(d, user)
	if err != nil || !role.Active() {
		return false, 0, err
	}
	var p HistoryPolicy
	have, err := policyOf(d, ComponentHistory, &p)
	switch {
	case err != nil:
		return false, 0, err
	case !have:
		return true, 0, nil
	case p.Sharing == Forbidden || p.MaxPeriod == 0 || !own && !slices.Contains(p.Roles, role.Index):
		return false, 0, nil
	}
	return true, time.Duration(p.MaxPeriod) * time.Second, nil
}

// RoleOf returns the role that a user has in a room with that app_data_dictionary; nil for who isn't in its participant
// list.
func RoleOf(d mls.AppDataDictionary, user URI) (*Role, error) {
	roles, err := RolesOf(d)
	if err != nil {
		return nil, err
	}
	var list ParticipantList
	if _, err := policyOf(d, ComponentParticipantList, &list); err != nil {
		return nil, err
	}
	_, role, ok := list.Find(user)
	if !ok {
		return nil, nil
	}
	return roles.Find(role), nil
}

// Bot is a program that may take part (draft-ietf-mimi-room-policy-03, Section 6.7). Texts are UTF-8 without nulls.
//
//	struct {
//	    opaque name<V>;
//	    opaque description<V>;
//	    Uri homepage;
//	    bool local_client_bot;
//	    uint32 bot_role_index;
//	    bool can_target_message_in_group;
//	    bool per_user_content;
//	} Bot;
type Bot struct {
	Name, Description, Homepage string
	Local                       bool   // part of a user's client, without a role
	Role                        uint32 // 0 if it isn't a participant
	Targets                     bool   // may send messages to single users
	PerUser                     bool   // may tell each user something else
}

// BotPolicy is the bot_policy component: the bots that a room has. The draft doesn't say how a bot is known, so a participant
// is taken for one if it has a bot's role (BotsOf), and a room that wants to tell bots and people apart gives bots roles of
// their own. Their capabilities and MaxParticipants bound what bots do and how many there are; hub and clients hold them to
// that like anybody, and to it that a bot's role is one that may have clients. A bot in a user's client is nobody in the
// room. What a bot with Targets or PerUser may send to single users doesn't go through the room, in which every message is for
// all: nothing there enforces these two.
//
//	struct {
//	    Bot allowed_bots<V>;
//	} BotPolicy;
type BotPolicy []Bot

// MarshalMLS implements codec.Marshaler.
func (p BotPolicy) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, p, func(w *codec.Writer, b Bot) {
		w.Opaque([]byte(b.Name))
		w.Opaque([]byte(b.Description))
		w.Opaque([]byte(b.Homepage))
		w.Optional(b.Local)
		w.Uint32(b.Role)
		w.Optional(b.Targets)
		w.Optional(b.PerUser)
	})
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *BotPolicy) UnmarshalMLS(r *codec.Reader) {
	*p = readAtMost(r, 256, func(r *codec.Reader) Bot {
		b := Bot{Name: readText(r, MaxText), Description: readText(r, MaxText), Homepage: readText(r, MaxText)}
		b.Local, b.Role = r.Optional(), r.Uint32()
		b.Targets, b.PerUser = r.Optional(), r.Optional()
		if b.Local && b.Role != RoleNone {
			r.Failf("a bot of a user's client with a role")
		}
		return b
	})
}

// BotsOf returns the bots that the policy of a room with that app_data_dictionary has for a role.
func BotsOf(d mls.AppDataDictionary, role uint32) []Bot {
	var p BotPolicy
	if _, err := policyOf(d, ComponentBots, &p); err != nil || role == RoleNone {
		return nil
	}
	return slices.DeleteFunc(p, func(b Bot) bool { return b.Role != role })
}

// checkNamedRoles says whether the roles that the policies for history and bots name are ones that may have clients
// (draft-ietf-mimi-room-policy-03, Sections 6.6 and 6.7). RoleNone is that of bots which don't take part.
func checkNamedRoles(d mls.AppDataDictionary, roles RoleList) error {
	var h HistoryPolicy
	var bots BotPolicy
	if _, err := policyOf(d, ComponentHistory, &h); err != nil {
		return forbidden("%v", err)
	}
	if _, err := policyOf(d, ComponentBots, &bots); err != nil {
		return forbidden("%v", err)
	}
	for _, index := range h.Roles {
		if !roles.Find(index).Active() {
			return forbidden("role %d, which may not have clients, shares history", index)
		}
	}
	for _, b := range bots {
		if b.Role != RoleNone && !roles.Find(b.Role).Active() {
			return forbidden("the bot %q has role %d, which may not have clients", b.Name, b.Role)
		}
	}
	return nil
}

// MessageExpiration is the message_expiration_policy component: how long messages last (draft-ietf-mimi-room-policy-03,
// Section 6.8). Durations are in s, from when the hub accepted a message. Only clients see when a message expires: package
// client sends none that doesn't keep to the policy, and deletes what others send as if it did.
//
//	struct {
//	    Optionality expiring_messages;
//	    select (expiring_messages) {
//	        case required, optional:
//	            uint32 min_expiration_duration;
//	            uint32 max_expiration_duration;
//	            optional uint32 default_expiration_duration;
//	    };
//	} MessageExpiration;
type MessageExpiration struct {
	Expiring Optionality
	Min, Max uint32
	Default  *uint32
}

// MarshalMLS implements codec.Marshaler.
func (p MessageExpiration) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(p.Expiring))
	if p.Expiring != Forbidden {
		w.Uint32(p.Min)
		w.Uint32(p.Max)
		writeOptional32(w, p.Default)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *MessageExpiration) UnmarshalMLS(r *codec.Reader) {
	*p = MessageExpiration{Expiring: readOptionality(r)}
	if p.Expiring == Forbidden {
		return
	}
	p.Min, p.Max, p.Default = r.Uint32(), r.Uint32(), readOptional32(r)
	if p.Min > p.Max || p.Default != nil && (*p.Default < p.Min || *p.Default > p.Max) {
		r.Failf("expiry after %d to %d s", p.Min, p.Max)
	}
}

// ExpirationOf returns how a room's messages may expire, nil if it has no policy.
func ExpirationOf(d mls.AppDataDictionary) (*MessageExpiration, error) {
	e := new(MessageExpiration)
	if have, err := policyOf(d, ComponentExpiration, e); err != nil || !have {
		return nil, err
	}
	return e, nil
}

// Retention returns for how long a room with that app_data_dictionary wants its log kept: at most until all messages have
// expired, if they all do, but no less than MinRetention, and at least as long as its history may be shared. 0 leaves it to
// the provider. That the policies say something of ciphertexts, which draft-ietf-mimi-room-policy-03 doesn't mention, is a
// choice of Parley.
func Retention(d mls.AppDataDictionary) (most, least time.Duration, err error) {
	var e MessageExpiration
	have, err := policyOf(d, ComponentExpiration, &e)
	if err != nil {
		return 0, 0, err
	}
	if have && e.Expiring == Required {
		most = max(time.Duration(e.Max)*time.Second, MinRetention)
	}
	var h HistoryPolicy
	if have, err = policyOf(d, ComponentHistory, &h); err != nil {
		return 0, 0, err
	}
	if have && h.Sharing != Forbidden {
		least = time.Duration(h.MaxPeriod) * time.Second
	}
	return most, least, nil
}

// LeafRenewal is a policy that members replace their leaves, keys included, within that many days (RFC 9750, Section
// 8.2). The hub proposes to remove those who are late.
// draft-ietf-mimi-room-policy-03 has it as one of the many operational parameters of its Section 7, the rest of which isn't
// supported.
//
//	struct { uint16 days; } LeafRenewal;
type LeafRenewal struct{ Days uint16 }

// MarshalMLS implements codec.Marshaler.
func (p LeafRenewal) MarshalMLS(w *codec.Writer) { w.Uint16(p.Days) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *LeafRenewal) UnmarshalMLS(r *codec.Reader) {
	if p.Days = r.Uint16(); p.Days == 0 {
		r.Failf("leaves are renewed within 0 days")
	}
}

// RenewalDays returns the days that a room with that app_data_dictionary gives its members to renew their leaves, 0 if they
// needn't.
func RenewalDays(d mls.AppDataDictionary) (uint16, error) {
	var p LeafRenewal
	_, err := policyOf(d, ComponentLeafRenewal, &p)
	return p.Days, err
}
