package mimi

import (
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// MaxParticipants is the largest number of users in a room's list.
const MaxParticipants = 1 << 16

// Participant is a user of a room (draft-ietf-mimi-protocol-06, Section 7.5).
//
//	struct {
//	    opaque user<V>;
//	    uint32 role_index;
//	} UserRolePair;
type Participant struct {
	User URI
	Role uint32
}

// MarshalMLS implements codec.Marshaler.
func (p Participant) MarshalMLS(w *codec.Writer) {
	p.User.MarshalMLS(w)
	w.Uint32(p.Role)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *Participant) UnmarshalMLS(r *codec.Reader) {
	*p = Participant{User: readURI(r, KindUser), Role: r.Uint32()}
}

// ParticipantList is the participant_list component of a room's GroupContext: the room's users with their roles. Updates
// name users by their index in it. A list that decodes names nobody twice and has nobody with RoleNone; that the room has
// their roles is for RoomPolicy to check.
//
//	struct {
//	    UserRolePair participants<V>;
//	} ParticipantListData;
type ParticipantList []Participant

// MarshalMLS implements codec.Marshaler.
func (l ParticipantList) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, p Participant) { p.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *ParticipantList) UnmarshalMLS(r *codec.Reader) {
	*l = readParticipants(r)
	if r.Err() == nil {
		if err := l.check(); err != nil {
			r.Fail(fmt.Errorf("%w: %w", codec.ErrValue, err))
		}
	}
}

func readParticipants(r *codec.Reader) []Participant {
	n := 0
	return codec.ReadVector(r, func(r *codec.Reader) Participant {
		var p Participant
		if p.UnmarshalMLS(r); n >= MaxParticipants {
			r.Failf("more than %d participants", MaxParticipants)
		}
		n++
		return p
	})
}

func (l ParticipantList) check() error {
	if len(l) > MaxParticipants {
		return fmt.Errorf("mimi: participant list of %d users, at most %d", len(l), MaxParticipants)
	}
	seen := make(map[URI]bool, len(l))
	for _, p := range l {
		if p.Role == RoleNone {
			return fmt.Errorf("mimi: %s is in the participant list without a role", p.User)
		}
		if seen[p.User] {
			return fmt.Errorf("mimi: %s is in the participant list twice", p.User)
		}
		seen[p.User] = true
	}
	return nil
}

// Find returns a user's index and role, and whether the user is in the list, which a banned user is too.
func (l ParticipantList) Find(user URI) (index int, role uint32, ok bool) {
	for i, p := range l {
		if p.User == user {
			return i, p.Role, true
		}
	}
	return 0, RoleNone, false
}

// RoleChange gives the user at Index of the present list another role.
//
//	struct {
//	    uint32 user_index;
//	    uint32 role_index;
//	} UserindexRolePair;
type RoleChange struct{ Index, Role uint32 }

// ParticipantListUpdate is the content of an AppDataUpdate for the participant list. Indexes are those of the list
// before the commit.
//
//	struct {
//	    UserindexRolePair changedRoleParticipants<V>;
//	    uint32 removedIndices<V>;
//	    UserRolePair addedParticipants<V>;
//	} ParticipantListUpdate;
type ParticipantListUpdate struct {
	Changed []RoleChange
	Removed []uint32
	Added   []Participant
}

// MarshalMLS implements codec.Marshaler.
func (u ParticipantListUpdate) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, u.Changed, func(w *codec.Writer, c RoleChange) {
		w.Uint32(c.Index)
		w.Uint32(c.Role)
	})
	codec.WriteVector(w, u.Removed, func(w *codec.Writer, i uint32) { w.Uint32(i) })
	codec.WriteVector(w, u.Added, func(w *codec.Writer, p Participant) { p.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (u *ParticipantListUpdate) UnmarshalMLS(r *codec.Reader) {
	*u = ParticipantListUpdate{
		Changed: codec.ReadVector(r, func(r *codec.Reader) RoleChange { return RoleChange{r.Uint32(), r.Uint32()} }),
		Removed: codec.ReadVector(r, func(r *codec.Reader) uint32 { return r.Uint32() }),
		Added:   readParticipants(r),
	}
}

// Apply returns the list that an update leads to. It fails if the update names an index that isn't there, a user more
// than once, a user to add who is in the list, or a role that doesn't exist.
func (l ParticipantList) Apply(u ParticipantListUpdate) (ParticipantList, error) {
	return l.apply([]ParticipantListUpdate{u})
}

// apply applies the updates of one commit, which all refer to l: roles change, users are removed, and users are added
// at the end in the order of the updates (draft-ietf-mimi-protocol-06, Section 7.5).
func (l ParticipantList) apply(updates []ParticipantListUpdate) (ParticipantList, error) {
	next := append(ParticipantList(nil), l...)
	touched := make(map[URI]bool)
	touch := func(user URI) error {
		if touched[user] {
			return fmt.Errorf("mimi: participant list update: %s is changed twice in one commit", user)
		}
		touched[user] = true
		return nil
	}
	at := func(i uint32) error {
		if uint64(i) >= uint64(len(l)) {
			return fmt.Errorf("mimi: participant list update: no user at index %d of %d", i, len(l))
		}
		return touch(l[i].User)
	}
	for _, u := range updates {
		for _, c := range u.Changed {
			if err := at(c.Index); err != nil {
				return nil, err
			}
			next[c.Index].Role = c.Role
		}
		for _, i := range u.Removed {
			if err := at(i); err != nil {
				return nil, err
			}
			next[i].User = ""
		}
	}
	kept := next[:0]
	for _, p := range next {
		if p.User != "" {
			kept = append(kept, p)
		}
	}
	for _, u := range updates {
		for _, p := range u.Added {
			if err := touch(p.User); err != nil {
				return nil, err
			}
			kept = append(kept, p)
		}
	}
	if err := kept.check(); err != nil {
		return nil, err
	}
	return kept, nil
}

// Components is the logic of a room's components for mls.Config and mls.PublicConfig.
func Components() map[mls.ComponentID]mls.Component {
	m := map[mls.ComponentID]mls.Component{
		ComponentParticipantList: participantComponent{},
		ComponentRoomMetadata:    metadataComponent{},
		ComponentJoinLinks:       joinLinksComponent{},
	}
	for id, decoder := range policies {
		m[id] = policyComponent{decoder}
	}
	return m
}

// RoomComponents are the components that every member of a room has to support.
func RoomComponents() mls.ComponentsList {
	return mls.ComponentsList{ComponentParticipantList, ComponentRoomMetadata}
}

// RoomDictionary is the app_data_dictionary with which a room begins.
func RoomDictionary(list ParticipantList, metadata RoomMetadata) mls.AppDataDictionary {
	return mls.AppDataDictionary(nil).
		Set(mls.ComponentAppComponents, codec.Marshal(RoomComponents())).
		Set(ComponentParticipantList, codec.Marshal(list)).
		Set(ComponentRoomMetadata, codec.Marshal(metadata))
}

// LeafExtensions is what clients say of themselves in their leaves: which components they support, in authenticated data
// too, and which media types (draft-ietf-mls-extensions, "Negotiating Extensions and Components").
func LeafExtensions() mls.Extensions {
	supported := append(mls.ComponentsList{
		mls.ComponentAppComponents, mls.ComponentSafeAAD, mls.ComponentMediaTypes, ComponentFrankingAgent,
	}, append(RoomComponents(), PolicyComponents()...)...)
	dictionary := mls.AppDataDictionary(nil).
		Set(mls.ComponentAppComponents, codec.Marshal(supported)).
		Set(mls.ComponentSafeAAD, codec.Marshal(mls.ComponentsList{ComponentFrankAAD})).
		Set(mls.ComponentMediaTypes, codec.Marshal(MediaTypes()))
	return mls.Extensions{{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(dictionary)}}
}

type participantComponent struct{}

// Update implements mls.Component.
func (participantComponent) Update(current []byte, updates [][]byte) ([]byte, error) {
	if current == nil {
		return nil, fmt.Errorf("mimi: the group has no participant list")
	}
	var list ParticipantList
	if err := codec.Unmarshal(current, &list); err != nil {
		return nil, fmt.Errorf("mimi: participant list: %w", err)
	}
	decoded := make([]ParticipantListUpdate, len(updates))
	for i, b := range updates {
		if err := codec.Unmarshal(b, &decoded[i]); err != nil {
			return nil, fmt.Errorf("mimi: participant list update: %w", err)
		}
	}
	next, err := list.apply(decoded)
	if err != nil {
		return nil, err
	}
	return codec.Marshal(next), nil
}
