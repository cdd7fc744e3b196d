package mimi

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

const (
	testHub   URI = "mimi://a.example"
	testOther URI = "mimi://b.example"
	testThird URI = "mimi://c.example"
)

// act is something that somebody tries in a room.
type act struct {
	name string
	make func(r *testRoom) *mls.MLSMessage
	rule string // part of the rule that is broken, "" if it is allowed
}

// played tries each act in a room of its own. The participants have the roles of the list in that order: alice, bob with
// two clients, carol, dave without a client, eve, who is banned; and role 0 is nobody.
func played(t *testing.T, rules Rules, roles [4]uint32, acts []act) {
	t.Helper()
	for _, a := range acts {
		t.Run(a.name, func(t *testing.T) {
			r := newRoomOf(t, ruled(rules, roles), "bob1", "bob2", "carol1")
			_, err := r.hub.CheckCommit(a.make(r).Public)
			var p *PolicyError
			switch {
			case a.rule == "" && err != nil:
				t.Fatalf("refused: %v", err)
			case a.rule != "" && (!errors.As(err, &p) || !strings.Contains(p.Rule, a.rule)):
				t.Fatalf("got %v, want a policy error with %q", err, a.rule)
			}
		})
	}
}

func ruled(rules Rules, roles [4]uint32) mls.AppDataDictionary {
	list := ParticipantList{{user("alice"), roles[0]}, {user("bob"), roles[1]}, {user("carol"), roles[2]}, {user("dave"), roles[3]}, {user("eve"), RoleBanned}}
	d := RoomDictionary(list, RoomMetadata{RoomURI: "mimi://a.example/r/room", RoomName: "Room"})
	return rules.Dictionary(d)
}

func adds(name string, role uint32) mls.Proposal {
	return listUpdate(ParticipantListUpdate{Added: []Participant{{user(name), role}}})
}

func takesOff(index uint32) mls.Proposal {
	return listUpdate(ParticipantListUpdate{Removed: []uint32{index}})
}

func gives(index, role uint32) mls.Proposal {
	return listUpdate(ParticipantListUpdate{Changed: []RoleChange{{index, role}}})
}

func metadata(edit func(m *RoomMetadata)) mls.Proposal {
	m := RoomMetadata{RoomURI: "mimi://a.example/r/room", RoomName: "Room"}
	edit(&m)
	return appData(ComponentRoomMetadata, codec.Marshal(m))
}

// commits is a commit of a device.
func commits(device string, proposals ...mls.Proposal) func(r *testRoom) *mls.MLSMessage {
	return func(r *testRoom) *mls.MLSMessage { return r.commit(device, proposals...) }
}

// The order of the participants in these rooms.
const (
	alice uint32 = iota
	bob
	carol
	dave
	eve
)

func TestCooperativeRoom(t *testing.T) {
	played(t, CooperativeRoom(testHub), [4]uint32{4, 2, 3, 2}, []act{
		{"a user adds a friend", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", adds("frank", 2), r.addProposal("frank1"))
		}, ""},
		{"a user removes another", commits("bob1", takesOff(dave)), ""},
		{"a user adds its own client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.addProposal("bob3")) }, ""},
		{"a user adds a client of another of its role", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.addProposal("dave1")) }, ""},
		{"a user names the room", commits("bob1", metadata(func(m *RoomMetadata) { m.RoomName = "Ours" })), ""},
		{"a user sets subject, mood and avatar", commits("bob1", metadata(func(m *RoomMetadata) { m.Subject, m.Mood, m.Avatar = "s", "m", "https://a.example/x" })), ""},
		{"a user's other client joins", func(r *testRoom) *mls.MLSMessage { return r.join("dave1") }, ""},
		{"an admin bans", func(r *testRoom) *mls.MLSMessage {
			return r.commit("carol1", gives(bob, RoleBanned), r.remove("bob1"), r.remove("bob2"))
		}, ""},
		{"an admin unbans", commits("carol1", gives(eve, 2)), ""},
		{"an admin makes another one", commits("carol1", gives(bob, 3)), ""},
		{"an admin kicks", func(r *testRoom) *mls.MLSMessage { return r.commit("carol1", r.remove("bob1"), r.remove("bob2")) }, ""},
		{"an admin describes the room", commits("carol1", metadata(func(m *RoomMetadata) { m.Descriptions = []RichDescription{{Content: []byte("x")}} })), ""},
		{"a super admin preauthorizes", commits("alice1", appData(ComponentPreauthorized, codec.Marshal(Preauthorized{{Claims: []Claim{ProviderClaim(testOther)}, Role: 2}}))), ""},
		{"the hub removes a user", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, takesOff(dave))
			return r.commit("bob1")
		}, ""},
		{"the hub bans a user", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, gives(dave, RoleBanned))
			return r.commit("bob1")
		}, ""},

		{"a user adds an admin", commits("bob1", adds("frank", 3)), "changes the participant list"},
		{"a user removes an admin", commits("bob1", takesOff(carol)), "changes the participant list"},
		{"a user removes an admin's client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.remove("carol1")) }, "removes a client of"},
		{"a user adds an admin's client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.addProposal("carol2")) }, "a client of"},
		{"a user makes itself an admin", commits("bob1", gives(bob, 3)), "changes the participant list"},
		{"a user unbans", commits("bob1", gives(eve, 2)), "changes the participant list"},
		{"a user bans", commits("bob1", gives(dave, RoleBanned)), "changes the participant list"},
		{"a user changes nothing, with an update", commits("bob1", listUpdate(ParticipantListUpdate{})), "changes the participant list"},
		{"a user describes the room", commits("bob1", metadata(func(m *RoomMetadata) { m.Descriptions = []RichDescription{{Content: []byte("x")}} })), "metadata"},
		{"a user moves the room", commits("bob1", metadata(func(m *RoomMetadata) { m.RoomURI = "mimi://b.example/r/x" })), "metadata"},
		{"a user removes the metadata", commits("bob1", mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{Component: ComponentRoomMetadata, Op: mls.AppDataOpRemove}}), "metadata"},
		{"a banned user is added again", commits("bob1", takesOff(eve)), "changes the participant list"},
		{"a banned user's client joins", func(r *testRoom) *mls.MLSMessage { return r.join("eve1") }, "isn't a participant"},
		{"an admin makes a super admin", commits("carol1", gives(bob, 4)), "changes the participant list"},
		{"an admin removes a super admin", commits("carol1", takesOff(alice)), "changes the participant list"},
		{"an admin makes a user a policy enforcer", commits("carol1", gives(bob, 5)), "changes the participant list"},
		{"an admin preauthorizes", commits("carol1", appData(ComponentPreauthorized, codec.Marshal(Preauthorized{}))), "changes policy"},
		{"a super admin changes the roles", commits("alice1", appData(ComponentRoles, codec.Marshal(basicRoles))), "changes policy"},
		{"a super admin changes the extensions", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", r.extensions(func(e mls.Extensions) mls.Extensions { return e }))
		}, "group's extensions"},
		{"the last admin is demoted", commits("alice1", gives(carol, 2)), "at least 1"},
		{"a super admin preauthorizes and adds at once", commits("alice1", appData(ComponentPreauthorized, codec.Marshal(Preauthorized{})), adds("frank", 2)), "together with"},
		{"a stranger joins", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", adds("frank", 2)) }, "joins with role 2"},
		{"a stranger joins with an update of the policy", func(r *testRoom) *mls.MLSMessage {
			return r.join("dave1", appData(ComponentPreauthorized, codec.Marshal(Preauthorized{})))
		}, "joins and updates component"},
		{"the hub adds a user", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, adds("frank", 2))
			return r.commit("bob1")
		}, "changes the participant list"},
		{"the hub makes an admin", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, gives(bob, 3))
			return r.commit("bob1")
		}, "changes the participant list"},
		{"the hub unbans", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, gives(eve, 2))
			return r.commit("bob1")
		}, "changes the participant list"},
		{"external sender 1 removes a user", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.second, 1, takesOff(dave))
			return r.commit("bob1")
		}, "external sender 1"},
	})
}

// linked is a strictly administered or moderated room with links of which the private keys are known.
func linked(t *testing.T, rules Rules, roles [4]uint32, links ...JoinLink) (*testRoom, []ed25519.PrivateKey) {
	t.Helper()
	var keys []ed25519.PrivateKey
	for i := range links {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		links[i].Key = key.Public().(ed25519.PublicKey)
		keys = append(keys, key)
	}
	d := ruled(rules, roles).Set(ComponentJoinLinks, codec.Marshal(JoinLinks(links)))
	return newRoomOf(t, d, "bob1", "bob2", "carol1"), keys
}

func withCode(key ed25519.PrivateKey, device string) mls.Proposal {
	code := NewJoiningCode(key, "mimi://a.example/r/room", client(device))
	return mls.Proposal{Type: mls.ProposalAppEphemeral, AppEphemeral: &mls.AppEphemeral{Component: ComponentJoinLinks, Data: codec.Marshal(code)}}
}

func uses(i uint32) mls.Proposal {
	return appData(ComponentJoinLinks, codec.Marshal(JoinLinksUpdate{Removed: []uint32{i}}))
}

func TestLinksAdmitThoseWhoHaveTheirKeys(t *testing.T) {
	key := make([]byte, 32)
	for _, c := range []struct {
		name string
		make func(r *testRoom, keys []ed25519.PrivateKey) *mls.MLSMessage
		rule string
	}{
		{"by a link for many", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[0], "frank1"))
		}, ""},
		{"by a link for one, which goes", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[1], "frank1"), uses(1))
		}, ""},
		{"an admin makes a link", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage {
			return r.commit("carol1", appData(ComponentJoinLinks, codec.Marshal(JoinLinksUpdate{Added: JoinLinks{{Key: key, Role: 2}}})))
		}, ""},
		{"an admin removes a link", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage { return r.commit("carol1", uses(0)) }, ""},

		{"by a link for one, which stays", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[1], "frank1"))
		}, "use up"},
		{"by a link for many, which goes", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[0], "frank1"), uses(0))
		}, "use up"},
		{"by one link, and another goes", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[1], "frank1"), uses(0))
		}, "use up"},
		{"to a role that the link isn't for", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 3), withCode(k[0], "frank1"))
		}, "joins with role 3"},
		{"to a role that links may not be for", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 3), withCode(k[2], "frank1"))
		}, "joins with role 3"},
		{"with somebody else's code", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[0], "grace1"))
		}, "no joining code"},
		{"with a code of no link", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(ed25519.NewKeyFromSeed(make([]byte, 32)), "frank1"))
		}, "no joining code"},
		{"without a code", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage { return r.join("frank1", adds("frank", 2)) }, "joins with role 2"},
		{"without a code, and a link goes", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), uses(1))
		}, "removes a link"},
		{"with a friend", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", listUpdate(ParticipantListUpdate{Added: []Participant{{user("frank"), 2}, {user("grace"), 2}}}), withCode(k[0], "frank1"))
		}, "joins and changes the participant list"},
		{"a friend instead", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("grace", 2), withCode(k[0], "frank1"))
		}, "joins and changes the participant list"},
		{"and makes a link", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("frank1", adds("frank", 2), withCode(k[1], "frank1"),
				appData(ComponentJoinLinks, codec.Marshal(JoinLinksUpdate{Removed: []uint32{1}, Added: JoinLinks{{Key: key, Role: 2}}})))
		}, "joins and changes the links"},
		{"the banned", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.join("eve1", withCode(k[0], "eve1"))
		}, "isn't added by it"},
		{"a user makes a link", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage {
			return r.commit("bob1", appData(ComponentJoinLinks, codec.Marshal(JoinLinksUpdate{Added: JoinLinks{{Key: key, Role: 2}}})))
		}, "makes a link"},
		{"a user removes a link", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage { return r.commit("bob1", uses(0)) }, "removes links"},
		{"an admin makes a link to a role that it can't give", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage {
			return r.commit("carol1", appData(ComponentJoinLinks, codec.Marshal(JoinLinksUpdate{Added: JoinLinks{{Key: key, Role: 4}}})))
		}, "makes a link to role 4"},
		{"an admin makes a link for many where none may be", func(r *testRoom, _ []ed25519.PrivateKey) *mls.MLSMessage {
			return r.commit("carol1", appData(ComponentJoinLinks, codec.Marshal(JoinLinksUpdate{Added: JoinLinks{{Key: key, Role: 2, MultiUser: true}}})))
		}, "makes a link to role 2"},
		{"a member brings a code", func(r *testRoom, k []ed25519.PrivateKey) *mls.MLSMessage {
			return r.commit("bob1", withCode(k[0], "bob1"))
		}, "proposal of type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules := StrictRoom(testHub)
			rules.JoinLinks = &JoinLinkPolicy{Expiration: 60}
			r, keys := linked(t, rules, [4]uint32{4, 2, 3, 2}, JoinLink{Role: 2, MultiUser: true}, JoinLink{Role: 2}, JoinLink{Role: 3, MultiUser: true})
			_, err := r.hub.CheckCommit(c.make(r, keys).Public)
			var p *PolicyError
			switch {
			case c.rule == "" && err != nil:
				t.Fatalf("refused: %v", err)
			case c.rule != "" && (!errors.As(err, &p) || !strings.Contains(p.Rule, c.rule)):
				t.Fatalf("got %v, want a policy error with %q", err, c.rule)
			}
		})
	}
}

func TestGroupInfoIsForThoseWhoCouldJoin(t *testing.T) {
	const room = URI("mimi://a.example/r/room")
	r, keys := linked(t, StrictRoom(testHub), [4]uint32{4, 2, 3, 2}, JoinLink{Role: 2, MultiUser: true}, JoinLink{Role: 2, MultiUser: true, Expires: 100})
	d := r.hub.Dictionary()
	code := func(k ed25519.PrivateKey, device string) []byte {
		return codec.Marshal(NewJoiningCode(k, room, client(device)))
	}
	for _, c := range []struct {
		name, device string
		code         []byte
		now          uint64
		rule         string // "" if it may
	}{
		{"a participant", "dave1", nil, 100, ""},
		{"by a link", "frank1", code(keys[0], "frank1"), 100, ""},
		{"by a link that hasn't expired", "frank1", code(keys[1], "frank1"), 99, ""},
		{"by a link that has expired", "frank1", code(keys[1], "frank1"), 100, "expired"},
		{"by somebody else's code", "frank1", code(keys[0], "grace1"), 99, "no joining code"},
		{"by a code of no link", "frank1", code(ed25519.NewKeyFromSeed(make([]byte, 32)), "frank1"), 99, "no joining code"},
		{"without a code", "frank1", nil, 99, "isn't a participant"},
		{"the banned", "eve1", code(keys[0], "eve1"), 99, "isn't a participant"},
	} {
		err := MayAsk(d, room, user(c.device), client(c.device), c.code, c.now)
		if (err == nil) != (c.rule == "") || err != nil && !strings.Contains(err.Error(), c.rule) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestStrictRoom(t *testing.T) {
	rules := StrictRoom(testHub)
	rules.Preauthorized = append(rules.Preauthorized, PreauthorizedRole{[]Claim{SubjectClaim(user("frank"))}, 2}, PreauthorizedRole{[]Claim{SubjectClaim(user("grace"))}, 3})
	played(t, rules, [4]uint32{4, 2, 3, 2}, []act{
		{"an admin adds a user", func(r *testRoom) *mls.MLSMessage {
			return r.commit("carol1", adds("frank", 2), r.addProposal("frank1"))
		}, ""},
		{"an admin removes a user", commits("carol1", takesOff(dave)), ""},
		{"a user leaves", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", r.remove("bob1"), r.remove("bob2"), takesOff(bob))
			return r.commit("carol1")
		}, ""},
		{"who is preauthorized joins", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", adds("frank", 2)) }, ""},
		{"a user's other client joins", func(r *testRoom) *mls.MLSMessage { return r.join("bob3") }, ""},
		{"an admin names the room", commits("carol1", metadata(func(m *RoomMetadata) { m.RoomName = "Ours" })), ""},
		{"a super admin changes the roles", commits("alice1", appData(ComponentRoles, codec.Marshal(StrictRoom(testHub).Roles))), ""},

		{"a user adds a friend", commits("bob1", adds("frank", 2)), "changes the participant list"},
		{"a user removes another", commits("bob1", takesOff(dave)), "changes the participant list"},
		{"a user adds another's client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.addProposal("dave1")) }, "a client of"},
		{"a user names the room", commits("bob1", metadata(func(m *RoomMetadata) { m.RoomName = "Mine" })), "metadata"},
		{"who is preauthorized joins with another role", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", adds("frank", 3)) }, "joins with role 3"},
		{"who is preauthorized joins with a role of more", func(r *testRoom) *mls.MLSMessage { return r.join("heidi1", adds("heidi", 2)) }, "joins with role 2"},
		{"an admin changes the roles", commits("carol1", appData(ComponentRoles, codec.Marshal(StrictRoom(testHub).Roles))), "changes policy"},
		{"a super admin changes the roles and a role", commits("alice1", appData(ComponentRoles, codec.Marshal(StrictRoom(testHub).Roles)), gives(bob, 3)), "together with"},
		{"a super admin takes the roles away", commits("alice1", mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{Component: ComponentRoles, Op: mls.AppDataOpRemove}}), "removes the roles"},
		{"a super admin drops a role that is held", commits("alice1", appData(ComponentRoles, codec.Marshal(StrictRoom(testHub).Roles[:4]))), "doesn't exist"},
		{"a super admin changes the history policy", commits("alice1", appData(ComponentHistory, codec.Marshal(HistoryPolicy{}))), "changes policy"},
	})
}

func TestOwnRoleIsThePreauthorizedOne(t *testing.T) {
	rules := StrictRoom(testHub)
	rules.Preauthorized = append(rules.Preauthorized, PreauthorizedRole{[]Claim{SubjectClaim(user("bob"))}, 3})
	played(t, rules, [4]uint32{4, 2, 3, 2}, []act{
		{"to that one", commits("bob1", gives(bob, 3)), ""},
		{"to another one", commits("bob1", gives(bob, 4)), "changes the participant list"},
		{"another's", commits("bob1", gives(dave, 3)), "changes the participant list"},
	})
}

func TestModeratedRoom(t *testing.T) {
	rules := ModeratedRoom(testHub)
	played(t, rules, [4]uint32{6, 2, 5, 3}, []act{
		{"a moderator lets a guest speak", commits("carol1", gives(bob, 4)), ""},
		{"a moderator adds a guest", func(r *testRoom) *mls.MLSMessage {
			return r.commit("carol1", adds("frank", 2), r.addProposal("frank1"))
		}, ""},
		{"a moderator kicks a guest", func(r *testRoom) *mls.MLSMessage { return r.commit("carol1", r.remove("bob1")) }, ""},
		{"an attendee's client joins", func(r *testRoom) *mls.MLSMessage { return r.join("dave1") }, ""},
		{"a guest's client joins in place of its leaf", func(r *testRoom) *mls.MLSMessage { return r.join("bob1", r.remove("bob1")) }, ""},
		{"a guest leaves", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", takesOff(bob), r.remove("bob1"), r.remove("bob2"))
			return r.commit("carol1")
		}, ""},
		{"a moderator sets the subject", commits("carol1", metadata(func(m *RoomMetadata) { m.Subject = "s" })), ""},
		{"a super admin describes the room", commits("alice1", metadata(func(m *RoomMetadata) { m.Descriptions = []RichDescription{{Content: []byte("x")}} })), ""},

		{"a guest's second client joins", func(r *testRoom) *mls.MLSMessage { return r.join("bob3") }, "a client of its own"},
		{"a guest adds its own client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.addProposal("bob3")) }, "a client of"},
		{"a guest removes its own client and stays", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.remove("bob2")) }, "removes a client of"},
		{"a guest makes itself a speaker", commits("bob1", gives(bob, 4)), "changes the participant list"},
		{"a guest sets the subject", commits("bob1", metadata(func(m *RoomMetadata) { m.Subject = "s" })), "metadata"},
		{"a moderator describes the room", commits("carol1", metadata(func(m *RoomMetadata) { m.Descriptions = []RichDescription{{Content: []byte("x")}} })), "metadata"},
		{"a moderator removes the super admin", commits("carol1", takesOff(alice)), "changes the participant list"},
		{"a moderator makes a super admin", commits("carol1", gives(bob, 6)), "changes the participant list"},
	})
	for role, want := range map[string]bool{"no_role": false, "banned": false, "guest": true, "attendee": true, "speaker": true, "policy_enforcer": false} {
		if got := rules.Roles.Named(role).Speaks(); got != want {
			t.Errorf("%s speaks: %v", role, got)
		}
	}
	if rules.Roles.Named("guest").May(CanSendMessage) || !rules.Roles.Named("speaker").May(CanSendMessage) {
		t.Error("guests may send messages, or speakers not")
	}
}

func TestMultiOrganizationRoom(t *testing.T) {
	rules := MultiOrganizationRoom(testHub, testOther, testThird)
	for i, want := range []string{"no_role", "banned", "a.example user", "b.example user", "c.example user", "a.example admin", "b.example admin", "c.example admin", "super_admin", "policy_enforcer"} {
		if r := rules.Roles.Find(uint32(i)); r == nil || r.Name != want {
			t.Errorf("role %d is %v, want %s", i, r, want)
		}
	}
	played(t, rules, [4]uint32{8, 6, 7, 3}, []act{
		{"an admin adds a user of its own", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", adds("frank", 3), r.addProposal("frank1"))
		}, ""},
		{"an admin makes another one", commits("bob1", gives(dave, 6)), ""},
		{"an admin bans a user of its own", commits("bob1", gives(dave, RoleBanned)), ""},
		{"a user of the hub's organisation joins", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", adds("frank", 2)) }, ""},
		{"a super admin unbans", commits("alice1", gives(eve, 3)), ""},
		{"a super admin adds an admin", commits("alice1", adds("frank", 7)), ""},
		{"an admin adds a user of the other's role", commits("bob1", adds("frank", 4)), "changes the participant list"},
		{"an admin removes the other's admin", commits("bob1", takesOff(carol)), "changes the participant list"},
		{"an admin removes a user of the other's", commits("carol1", takesOff(dave)), "changes the participant list"},
		{"an admin unbans", commits("bob1", gives(eve, 3)), "changes the participant list"},
		{"an admin names the room", commits("bob1", metadata(func(m *RoomMetadata) { m.RoomName = "Mine" })), "metadata"},
		{"a user of the hub's organisation joins as admin", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", adds("frank", 5)) }, "joins with role 5"},
		{"a user joins as one of another organisation", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", adds("frank", 3)) }, "joins with role 3"},
		{"the last admin of an organisation is removed", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", gives(carol, 4))
		}, "at least 1"},
		{"the last admin of an organisation leaves with its clients", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", r.remove("bob1"), r.remove("bob2"))
			return r.commit("alice1")
		}, "active participants with role 6"},
		{"the hub removes the last admin of an organisation, whose client is revoked", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, r.remove("carol1"))
			return r.commit("alice1")
		}, ""},
		{"a fourth admin", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", listUpdate(ParticipantListUpdate{Added: []Participant{{user("frank"), 6}, {user("grace"), 6}, {user("heidi"), 6}}}))
		}, "at most 3"},
	})
}

func TestBasePolicyBoundsTheRoom(t *testing.T) {
	based := func(edit func(p *BasePolicy)) Rules {
		rules := CooperativeRoom(testHub)
		rules.Base = &BasePolicy{MultiDevice: true}
		edit(rules.Base)
		return rules
	}
	roles := [4]uint32{4, 2, 3, 2}
	played(t, based(func(p *BasePolicy) { p.FixedMembership = true }), roles, []act{
		{"an admin adds to a fixed membership", commits("alice1", adds("frank", 2)), "changes the participant list"},
		{"an admin removes from a fixed membership", commits("alice1", takesOff(dave)), "changes the participant list"},
		{"a client joins a fixed membership", func(r *testRoom) *mls.MLSMessage { return r.join("dave1") }, ""},
	})
	played(t, based(func(p *BasePolicy) { p.MultiDevice = false }), roles, []act{
		{"a second client", func(r *testRoom) *mls.MLSMessage { return r.join("carol2") }, "one is allowed"},
		{"a first client", func(r *testRoom) *mls.MLSMessage { return r.join("dave1") }, ""},
	})
	played(t, based(func(p *BasePolicy) { p.MaxUsers = most(4) }), roles, []act{
		{"a fifth user", commits("alice1", adds("frank", 2)), "users: 5, at most 4"},
		{"a banned one more", commits("alice1", adds("frank", RoleBanned)), ""},
	})
	played(t, based(func(p *BasePolicy) { p.MaxClients = most(4) }), roles, []act{
		{"a fifth client", func(r *testRoom) *mls.MLSMessage { return r.join("dave1") }, "clients: 5, at most 4"},
		{"a client in place of its leaf", func(r *testRoom) *mls.MLSMessage { return r.join("bob1", r.remove("bob1")) }, ""},
	})
}

// What several may commit later has to go together, and with what they could commit.
func TestPendingProposalsGoTogether(t *testing.T) {
	r := newRoomOf(t, ruled(MultiOrganizationRoom(testHub, testOther, testThird), [4]uint32{8, 6, 6, 3}), "bob1", "bob2", "carol1")
	check := func(device string, p mls.Proposal) error {
		m := mls.Sender{Type: mls.SenderMember, Leaf: r.leaf(device)}
		return CheckPending(identityOf, r.hub, mls.PendingProposal{Sender: m, Proposal: p})
	}
	if err := check("carol1", takesOff(carol)); err != nil {
		t.Fatal(err)
	}
	r.propose("bob1", takesOff(bob))
	var p *PolicyError
	if err := check("carol1", takesOff(carol)); !errors.As(err, &p) || !strings.Contains(p.Rule, "at least 1") {
		t.Errorf("the last admin but one and the last leave: %v", err)
	}
	if err := check("bob2", takesOff(bob)); !errors.As(err, &p) || !strings.Contains(p.Rule, "twice") {
		t.Errorf("a user leaves twice: %v", err)
	}
	if err := check("alice1", takesOff(dave)); err != nil {
		t.Errorf("what goes with the rest: %v", err)
	}
	if err := check("carol1", r.addProposal("carol2")); !errors.As(err, &p) {
		t.Errorf("an Add by reference: %v", err)
	}
	if err := check("alice1", mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{Component: 0x9999, Op: mls.AppDataOpUpdate}}); !errors.As(err, &p) {
		t.Errorf("an update of an unknown component: %v", err)
	}
}

func TestNewRoomsHaveWhatTheirRolesNeed(t *testing.T) {
	list := ParticipantList{{user("alice"), 4}}
	good := CooperativeRoom(testHub)
	d := good.Dictionary(RoomDictionary(list, RoomMetadata{}))
	if err := CheckNewRoom(d, "mimi://a.example/r/room"); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]mls.AppDataDictionary{
		"two participants":             d.Set(ComponentParticipantList, codec.Marshal(append(slices.Clone(list), Participant{user("bob"), 2}))),
		"a creator that is banned":     d.Set(ComponentParticipantList, codec.Marshal(ParticipantList{{user("alice"), RoleBanned}})),
		"a role that doesn't exist":    d.Set(ComponentParticipantList, codec.Marshal(ParticipantList{{user("alice"), 9}})),
		"policies nobody must support": d.Set(mls.ComponentAppComponents, codec.Marshal(RoomComponents())),
		"a policy that is broken":      d.Set(ComponentHistory, []byte{9}),
		"links that are broken":        d.Set(ComponentJoinLinks, []byte{9}),
		"a bot of a role nobody has":   d.Set(ComponentBots, codec.Marshal(BotPolicy{{Role: 9}})),
	} {
		if err := CheckNewRoom(bad, "mimi://a.example/r/room"); err == nil {
			t.Errorf("a new room with %s is accepted", name)
		}
	}
}

func TestHistoryIsSharedAsThePolicySays(t *testing.T) {
	rules := StrictRoom(testHub)
	for _, c := range []struct {
		policy *HistoryPolicy
		user   URI
		own    bool
		ok     bool
		period float64 // s
	}{
		{nil, user("bob"), false, true, 0},
		{nil, user("eve"), false, false, 0},
		{nil, user("frank"), false, false, 0},
		{&HistoryPolicy{Roles: []uint32{3}, MaxPeriod: 60}, user("carol"), false, true, 60},
		{&HistoryPolicy{Roles: []uint32{3}, MaxPeriod: 60}, user("bob"), false, false, 0},
		{&HistoryPolicy{Roles: []uint32{3}, MaxPeriod: 60}, user("bob"), true, true, 60},
		{&HistoryPolicy{Sharing: Forbidden}, user("carol"), true, false, 0},
		{&HistoryPolicy{Roles: []uint32{3}}, user("carol"), true, false, 0}, // 0 s of it
	} {
		rules.History = c.policy
		ok, period, err := ShareHistory(ruled(rules, [4]uint32{4, 2, 3, 2}), c.user, c.own)
		if err != nil || ok != c.ok || period.Seconds() != c.period {
			t.Errorf("%s under %+v (own %v): %v, %v, %v", c.user, c.policy, c.own, ok, period, err)
		}
	}
}

func TestRulesOfARoomAreThoseThatItBeganWith(t *testing.T) {
	rules := StrictRoom(testHub)
	rules.Base, rules.JoinLinks = &BasePolicy{MultiDevice: true, MaxUsers: most(9)}, &JoinLinkPolicy{Expiration: 60}
	rules.History, rules.Bots = &HistoryPolicy{Roles: []uint32{3}, MaxPeriod: 60}, BotPolicy{{Name: "clock", Local: true}}
	rules.Expiration, rules.RenewalDays = &MessageExpiration{Max: 60}, 30
	for name, r := range map[string]Rules{"all policies": rules, "roles only": CooperativeRoom(testHub)} {
		d := r.Dictionary(nil)
		got, err := RulesOf(d)
		if err != nil || !bytes.Equal(codec.Marshal(got.Dictionary(nil)), codec.Marshal(d)) {
			t.Errorf("%s are read otherwise: %v", name, err)
		}
		if got, err := RulesOf(d.Set(ComponentHistory, []byte{9})); err == nil {
			t.Errorf("%s: a policy that is broken: %+v", name, got)
		}
	}
}

func TestBotsAndHistoryAreOfRolesThatMayHaveClients(t *testing.T) {
	rules := StrictRoom(testHub)
	super := rules.Roles.Find(rules.Creator)
	super.Capabilities = with(super.Capabilities, CanChangeOtherPolicyAttribute)
	rules.Bots = BotPolicy{{Name: "poker", Role: 3}, {Name: "spell", Local: true}}
	without := slices.DeleteFunc(slices.Clone(rules.Roles), func(r Role) bool { return r.Index == 3 })
	played(t, rules, [4]uint32{4, 2, 2, 2}, []act{
		{"other bots", commits("alice1", appData(ComponentBots, codec.Marshal(BotPolicy{{Role: 2, Targets: true}, {}}))), ""},
		{"another history", commits("alice1", appData(ComponentHistory, codec.Marshal(HistoryPolicy{Roles: []uint32{3, 4}, MaxPeriod: 1}))), ""},
		{"a bot of a role that doesn't exist", commits("alice1", appData(ComponentBots, codec.Marshal(BotPolicy{{Name: "x", Role: 9}}))), "the bot"},
		{"a banned bot", commits("alice1", appData(ComponentBots, codec.Marshal(BotPolicy{{Role: RoleBanned}}))), "the bot"},
		{"a bot of the hub's role", commits("alice1", appData(ComponentBots, codec.Marshal(BotPolicy{{Role: 5}}))), "the bot"},
		{"a bot's role is dropped", commits("alice1", appData(ComponentRoles, codec.Marshal(without))), "the bot"},
		{"history of a role without clients", commits("alice1", appData(ComponentHistory, codec.Marshal(HistoryPolicy{Roles: []uint32{5}}))), "shares history"},
		{"a user adds a bot", commits("bob1", appData(ComponentBots, codec.Marshal(BotPolicy{}))), "changes policy"},
	})
	d := ruled(rules, [4]uint32{4, 2, 3, 2})
	if bots := BotsOf(d, 3); len(bots) != 1 || bots[0].Name != "poker" {
		t.Errorf("bots of role 3: %+v", bots)
	}
	if bots := append(BotsOf(d, RoleNone), BotsOf(d, 2)...); len(bots) != 0 {
		t.Errorf("bots of others' roles: %+v", bots)
	}
}
