package mimi

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

const suite = mls.X25519_AES128GCM_SHA256_Ed25519

// named is an authentication service of basic credentials "user client", which lets every leaf follow every other.
type named struct{}

func (named) VerifyCredential(mls.Credential, []byte, mls.CipherSuite) error { return nil }
func (named) ValidSuccessor(_, _ mls.Credential) error                       { return nil }
func (named) Identity(c mls.Credential) ([]byte, error)                      { return c.Identity, nil }

func identityOf(c mls.Credential) (user, client URI, err error) {
	u, d, ok := bytes.Cut(c.Identity, []byte(" "))
	if !ok {
		return "", "", errors.New("no client in the credential")
	}
	return URI(u), URI(d), nil
}

// user and client are those of a device name such as bob1.
func user(device string) URI {
	return URI("mimi://a.example/u/" + strings.TrimRight(device, "0123456789"))
}
func client(device string) URI { return URI("mimi://a.example/d/" + device) }

func credential(device string) mls.Credential {
	return mls.BasicCredential([]byte(user(device) + " " + client(device)))
}

// testRoom is a room of alice, the administrator, bob with two clients, and carol. dave is a participant without a
// client, eve is banned. Its members check no policy, the hub does.
type testRoom struct {
	t       testing.TB
	members map[string]*mls.Group
	signers map[string]crypto.Signer
	hub     *mls.PublicGroup
	hubKey  crypto.Signer
	second  crypto.Signer // external sender 1
}

var testConfig = mls.Config{Verifier: named{}, Components: Components()}

func newSigner(t testing.TB) crypto.Signer {
	t.Helper()
	s, err := suite.GenerateSignatureKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func externalSender(t testing.TB, s crypto.Signer) mls.ExternalSender {
	t.Helper()
	pub, err := suite.SignaturePublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return mls.ExternalSender{SignatureKey: pub, Credential: mls.BasicCredential([]byte("hub"))}
}

func newTestRoom(t testing.TB) *testRoom {
	t.Helper()
	list := ParticipantList{
		{user("alice"), RoleAdmin}, {user("bob"), RoleMember}, {user("carol"), RoleModerator}, {user("dave"), RoleMember}, {user("eve"), RoleBanned},
	}
	dictionary := mls.AppDataDictionary(nil).Set(ComponentParticipantList, codec.Marshal(list)).Set(ComponentRoomMetadata, codec.Marshal(RoomMetadata{}))
	return newRoomOf(t, dictionary, "bob1", "bob2", "carol1")
}

// newRoomOf is a room with that app_data_dictionary of alice with those devices.
func newRoomOf(t testing.TB, dictionary mls.AppDataDictionary, devices ...string) *testRoom {
	t.Helper()
	r := &testRoom{
		t: t, members: make(map[string]*mls.Group), signers: make(map[string]crypto.Signer),
		hubKey: newSigner(t), second: newSigner(t),
	}
	r.signers["alice1"] = newSigner(t)
	alice, err := mls.NewGroup(testConfig, nil, mls.GroupOptions{
		GroupID: []byte("mimi://a.example/g/room"), Suite: suite, Credential: credential("alice1"), Signer: r.signers["alice1"],
		LeafExtensions: LeafExtensions(), Extensions: mls.Extensions{
			{Type: mls.ExtensionRequiredCapabilities, Data: codec.Marshal(required())},
			{Type: mls.ExtensionExternalSenders, Data: codec.Marshal(mls.ExternalSenders{externalSender(t, r.hubKey), externalSender(t, r.second)})},
			{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(dictionary)},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.members["alice1"] = alice
	r.add(devices...)
	r.look()
	return r
}

// look makes the hub begin with the epoch that alice is in.
func (r *testRoom) look() {
	r.t.Helper()
	gi, err := r.members["alice1"].GroupInfo(true, true)
	if err != nil {
		r.t.Fatal(err)
	}
	r.hub, err = mls.NewPublicGroup(mls.PublicConfig{Verifier: named{}, Components: Components(), Policy: RoomPolicy(identityOf)}, nil, gi, nil)
	if err != nil {
		r.t.Fatal(err)
	}
}

func required() mls.RequiredCapabilities {
	return mls.RequiredCapabilities{
		Extensions: []mls.ExtensionType{mls.ExtensionAppDataDictionary}, Proposals: []mls.ProposalType{mls.ProposalAppDataUpdate},
	}
}

func (r *testRoom) keyPackage(device string) (*mls.KeyPackage, *mls.KeyPackageSecrets) {
	r.t.Helper()
	r.signers[device] = newSigner(r.t)
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: suite, Credential: credential(device), Signer: r.signers[device], LeafExtensions: LeafExtensions()})
	if err != nil {
		r.t.Fatal(err)
	}
	return kp, secrets
}

// add lets alice add devices before the hub looks.
func (r *testRoom) add(devices ...string) {
	r.t.Helper()
	alice := r.members["alice1"]
	var proposals []mls.Proposal
	packages := make([]*mls.KeyPackage, len(devices))
	secrets := make([]*mls.KeyPackageSecrets, len(devices))
	for i, d := range devices {
		packages[i], secrets[i] = r.keyPackage(d)
		proposals = append(proposals, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *packages[i]}})
	}
	c, err := alice.Commit(nil, mls.CommitOptions{Proposals: proposals})
	if err != nil {
		r.t.Fatal(err)
	}
	for i, d := range devices {
		tree := clone(r.t, c.Tree())
		if r.members[d], err = mls.JoinGroup(testConfig, nil, r.signers[d], c.Welcome(), packages[i], secrets[i], tree); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := alice.Confirm(nil); err != nil {
		r.t.Fatal(err)
	}
}

func clone(t testing.TB, tree *mls.RatchetTree) *mls.RatchetTree {
	t.Helper()
	c, err := mls.ParseRatchetTree(codec.Marshal(tree))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (r *testRoom) leaf(device string) mls.LeafIndex { return r.members[device].OwnLeaf() }

func (r *testRoom) remove(device string) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: r.leaf(device)}}
}

func (r *testRoom) addProposal(device string) mls.Proposal {
	kp, _ := r.keyPackage(device)
	return mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}
}

func listUpdate(u ParticipantListUpdate) mls.Proposal {
	return appData(ComponentParticipantList, codec.Marshal(u))
}

func appData(id mls.ComponentID, update []byte) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{Component: id, Op: mls.AppDataOpUpdate, Update: update}}
}

func (r *testRoom) extensions(change func(mls.Extensions) mls.Extensions) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalGroupContextExtensions, GroupContextExtensions: &mls.GroupContextExtensions{
		Extensions: change(r.hub.Context().Extensions),
	}}
}

// commit is a commit of proposals by value, and of all pending ones.
func (r *testRoom) commit(device string, proposals ...mls.Proposal) *mls.MLSMessage {
	r.t.Helper()
	c, err := r.members[device].Commit(nil, mls.CommitOptions{Proposals: proposals})
	if err != nil {
		r.t.Fatal(err)
	}
	return c.Message()
}

// deliver gives a proposal to the hub and to all members but its sender.
func (r *testRoom) deliver(m *mls.MLSMessage, sender string) {
	r.t.Helper()
	s, err := r.hub.CheckProposal(m.Public)
	if err == nil {
		err = r.hub.ApplyProposal(nil, s)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	for d, g := range r.members {
		if d != sender {
			if _, err := g.Receive(nil, m); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

func (r *testRoom) propose(device string, proposals ...mls.Proposal) {
	r.t.Helper()
	for _, p := range proposals {
		m, err := r.members[device].Propose(nil, nil, p)
		if err != nil {
			r.t.Fatal(err)
		}
		r.deliver(m, device)
	}
}

func (r *testRoom) proposeExternally(signer crypto.Signer, index uint32, p mls.Proposal) {
	r.t.Helper()
	m, err := mls.ExternalProposal(suite, rand.Reader, signer, index, r.hub.GroupID(), r.hub.Epoch(), nil, p)
	if err != nil {
		r.t.Fatal(err)
	}
	r.deliver(m, "")
}

func (r *testRoom) join(device string, proposals ...mls.Proposal) *mls.MLSMessage {
	r.t.Helper()
	gi, err := r.members["alice1"].GroupInfo(true, true)
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := mls.ExternalJoin(testConfig, mls.ExternalJoinOptions{
		GroupInfo: gi, Credential: credential(device), Signer: newSigner(r.t), Proposals: proposals, LeafExtensions: LeafExtensions(),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return p.Message()
}

func TestRoomPolicy(t *testing.T) {
	addUser := func(name string) mls.Proposal {
		return listUpdate(ParticipantListUpdate{Added: []Participant{{user(name), RoleMember}}})
	}
	for _, c := range []struct {
		name string
		make func(r *testRoom) *mls.MLSMessage
		rule string // part of the rule that is broken, "" if the commit is allowed
	}{
		{"a member renews its keys", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1") }, ""},
		{"an administrator adds a user with a client", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", addUser("frank"), r.addProposal("frank1"))
		}, ""},
		{"an administrator adds a user without a client", func(r *testRoom) *mls.MLSMessage { return r.commit("alice1", addUser("frank")) }, ""},
		{"a member adds a client of a participant", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.addProposal("dave1")) }, ""},
		{"a member adds its own second client", func(r *testRoom) *mls.MLSMessage { return r.commit("carol1", r.addProposal("carol2")) }, ""},
		{"a member removes its other client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.remove("bob2")) }, ""},
		{"a user leaves, another commits", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", r.remove("bob1"), r.remove("bob2"), listUpdate(ParticipantListUpdate{Removed: []uint32{1}}))
			return r.commit("carol1")
		}, ""},
		{"a user leaves, another removes its clients", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", listUpdate(ParticipantListUpdate{Removed: []uint32{1}}))
			return r.commit("carol1", r.remove("bob1"), r.remove("bob2"))
		}, ""},
		{"an administrator bans a user and removes its clients", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", listUpdate(ParticipantListUpdate{Changed: []RoleChange{{1, RoleBanned}}}), r.remove("bob1"), r.remove("bob2"))
		}, ""},
		{"an administrator removes another's client", func(r *testRoom) *mls.MLSMessage { return r.commit("alice1", r.remove("carol1")) }, ""},
		{"an administrator changes roles", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", listUpdate(ParticipantListUpdate{Changed: []RoleChange{{1, RoleAdmin}, {4, RoleMember}}}))
		}, ""},
		{"the hub proposes a removal", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, r.remove("bob2"))
			return r.commit("carol1")
		}, ""},
		{"a new client of a participant joins", func(r *testRoom) *mls.MLSMessage { return r.join("dave1") }, ""},
		{"a client joins again in place of its leaf", func(r *testRoom) *mls.MLSMessage { return r.join("bob1", r.remove("bob1")) }, ""},
		{"an administrator changes the metadata", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", appData(ComponentRoomMetadata, codec.Marshal(RoomMetadata{RoomName: "Room"})))
		}, ""},
		{"an administrator drops external sender 1", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", r.extensions(func(e mls.Extensions) mls.Extensions {
				return e.Set(mls.ExtensionExternalSenders, codec.Marshal(mls.ExternalSenders{externalSender(r.t, r.hubKey)}))
			}))
		}, ""},

		{"a member adds a user", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", addUser("frank"), r.addProposal("frank1"))
		}, "changes the participant list"},
		{"a moderator adds a user", func(r *testRoom) *mls.MLSMessage { return r.commit("carol1", addUser("frank")) }, "changes the participant list"},
		{"a client of a stranger is added", func(r *testRoom) *mls.MLSMessage { return r.commit("alice1", r.addProposal("frank1")) }, "isn't a participant"},
		{"a client of a banned user is added", func(r *testRoom) *mls.MLSMessage { return r.commit("alice1", r.addProposal("eve1")) }, "isn't a participant"},
		{"a banned user's client stays", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", listUpdate(ParticipantListUpdate{Changed: []RoleChange{{1, RoleBanned}}}), r.remove("bob1"))
		}, "bob2 stays"},
		{"a user leaves and its clients stay", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", listUpdate(ParticipantListUpdate{Removed: []uint32{1}}))
			return r.commit("carol1")
		}, "stays"},
		{"a committer leaves", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", listUpdate(ParticipantListUpdate{Removed: []uint32{1}}), r.remove("bob2"))
		}, "before and after"},
		{"a member removes another's client", func(r *testRoom) *mls.MLSMessage { return r.commit("bob1", r.remove("carol1")) }, "removes a client of"},
		{"a member proposes to remove another's client", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", r.remove("carol1"))
			return r.commit("alice1")
		}, "removes a client of"},
		{"a member takes another off the list", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", listUpdate(ParticipantListUpdate{Removed: []uint32{3}}))
		}, "changes the participant list"},
		{"a member makes itself administrator", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", listUpdate(ParticipantListUpdate{Changed: []RoleChange{{1, RoleAdmin}}}))
		}, "changes the participant list"},
		{"a member leaves and adds a friend", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", r.remove("bob1"), r.remove("bob2"), listUpdate(ParticipantListUpdate{Removed: []uint32{1}, Added: []Participant{{user("frank"), RoleAdmin}}}))
			return r.commit("carol1")
		}, "changes the participant list"},
		{"a member leaves and promotes a friend", func(r *testRoom) *mls.MLSMessage {
			r.propose("bob1", r.remove("bob1"), r.remove("bob2"), listUpdate(ParticipantListUpdate{Removed: []uint32{1}, Changed: []RoleChange{{2, RoleAdmin}}}))
			return r.commit("carol1")
		}, "changes the participant list"},
		{"a stranger who is in the group already proposes", func(r *testRoom) *mls.MLSMessage {
			for _, d := range []string{"bob1", "bob2", "carol1"} {
				delete(r.members, d)
			}
			r.add("frank1")
			r.look()
			r.propose("frank1", r.remove("frank1"))
			return r.commit("alice1")
		}, "isn't a participant"},
		{"a member changes the metadata", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", appData(ComponentRoomMetadata, codec.Marshal(RoomMetadata{RoomName: "Mine"})))
		}, "room's metadata"},
		{"a member changes the extensions", func(r *testRoom) *mls.MLSMessage {
			return r.commit("bob1", r.extensions(func(e mls.Extensions) mls.Extensions { return e }))
		}, "group's extensions"},
		{"an administrator replaces the hub", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", r.extensions(func(e mls.Extensions) mls.Extensions {
				return e.Set(mls.ExtensionExternalSenders, codec.Marshal(mls.ExternalSenders{externalSender(r.t, r.second)}))
			}))
		}, "external sender 0 is replaced"},
		{"an administrator drops the hub", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", r.extensions(func(e mls.Extensions) mls.Extensions { return e.Remove(mls.ExtensionExternalSenders) }))
		}, "external senders"},
		{"an administrator drops a requirement", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", r.extensions(func(e mls.Extensions) mls.Extensions {
				return e.Set(mls.ExtensionRequiredCapabilities, codec.Marshal(mls.RequiredCapabilities{Extensions: required().Extensions}))
			}))
		}, "isn't required"},
		{"an administrator removes the participant list", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{Component: ComponentParticipantList, Op: mls.AppDataOpRemove}})
		}, "participant list"},
		{"an administrator gives a role that doesn't exist", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", listUpdate(ParticipantListUpdate{Changed: []RoleChange{{1, 5}}}))
		}, "which doesn't exist"},
		{"an administrator makes roles", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", appData(ComponentRoles, codec.Marshal(basicRoles)))
		}, "update of component 37"},
		{"an administrator has leaves renewed in a room without roles", func(r *testRoom) *mls.MLSMessage {
			return r.commit("alice1", appData(ComponentLeafRenewal, codec.Marshal(LeafRenewal{1})))
		}, "update of component"},
		{"external sender 1 proposes a removal", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.second, 1, r.remove("bob2"))
			return r.commit("carol1")
		}, "external sender 1"},
		{"the hub proposes a user", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, addUser("frank"))
			return r.commit("carol1")
		}, "external sender 0"},
		{"the hub proposes a client", func(r *testRoom) *mls.MLSMessage {
			r.proposeExternally(r.hubKey, 0, r.addProposal("dave1"))
			return r.commit("carol1")
		}, "external sender 0"},
		{"a stranger joins", func(r *testRoom) *mls.MLSMessage { return r.join("frank1") }, "isn't a participant"},
		{"a banned user joins", func(r *testRoom) *mls.MLSMessage { return r.join("eve1") }, "isn't a participant"},
		{"a stranger joins and adds itself to the list", func(r *testRoom) *mls.MLSMessage { return r.join("frank1", addUser("frank")) }, "external commit"},
		{"an administrator's new client joins and adds a user", func(r *testRoom) *mls.MLSMessage { return r.join("alice2", addUser("frank")) }, "external commit"},
		{"a client joins and removes another", func(r *testRoom) *mls.MLSMessage { return r.join("dave1", r.remove("carol1")) }, "joins and removes"},
		{"a client joins and removes its user's other client", func(r *testRoom) *mls.MLSMessage { return r.join("bob3", r.remove("bob2")) }, "joins and removes"},
		{"a client takes another name", func(r *testRoom) *mls.MLSMessage {
			cred := credential("dave1")
			c, err := r.members["bob1"].Commit(nil, mls.CommitOptions{Credential: &cred, ForcePath: true})
			if err != nil {
				r.t.Fatal(err)
			}
			return c.Message()
		}, "takes the leaf"},
		{"a client without a name is added", func(r *testRoom) *mls.MLSMessage {
			signer := newSigner(r.t)
			kp, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: suite, Credential: mls.BasicCredential([]byte("nobody")), Signer: signer})
			if err != nil {
				r.t.Fatal(err)
			}
			return r.commit("alice1", mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}})
		}, "names nobody"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newTestRoom(t)
			m := c.make(r)
			_, err := r.hub.CheckCommit(m.Public)
			if c.rule == "" {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				return
			}
			var p *PolicyError
			if !errors.As(err, &p) || !strings.Contains(p.Rule, c.rule) {
				t.Fatalf("got %v, want a policy error with %q", err, c.rule)
			}
		})
	}
}

// Hub and members decide alike: a member with the policy refuses to make what the hub refuses.
func TestMemberRefusesToCommitWhatThePolicyForbids(t *testing.T) {
	r := newTestRoom(t)
	cfg := testConfig
	cfg.Policy = RoomPolicy(identityOf)
	store := make(recorder)
	gi, err := r.members["alice1"].GroupInfo(true, true)
	if err != nil {
		t.Fatal(err)
	}
	signer := newSigner(t)
	p, err := mls.ExternalJoin(cfg, mls.ExternalJoinOptions{GroupInfo: gi, Credential: credential("dave1"), Signer: signer})
	if err != nil {
		t.Fatal(err)
	}
	dave, err := p.Confirm(store)
	if err != nil {
		t.Fatal(err)
	}
	var policy *PolicyError
	if _, err := dave.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{r.remove("carol1")}}); !errors.As(err, &policy) {
		t.Errorf("got %v, want a policy error", err)
	}
	if _, err := mls.ExternalJoin(cfg, mls.ExternalJoinOptions{GroupInfo: gi, Credential: credential("eve1"), Signer: signer}); !errors.As(err, &policy) {
		t.Errorf("banned user: got %v, want a policy error", err)
	}
}

type recorder map[string][]byte

func (r recorder) Set(key, value []byte) { r[string(key)] = bytes.Clone(value) }
func (r recorder) Delete(key []byte)     { delete(r, string(key)) }

func TestPolicyOfManyMembersCostsLittleWithoutListChanges(t *testing.T) {
	calls := 0
	policy := RoomPolicy(func(c mls.Credential) (URI, URI, error) {
		calls++
		return identityOf(c)
	})
	r := newTestRoom(t)
	hub, err := mls.NewPublicGroup(mls.PublicConfig{Verifier: named{}, Components: Components(), Policy: policy}, nil, mustInfo(t, r.members["alice1"]), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hub.CheckCommit(r.commit("bob1").Public); err != nil {
		t.Fatal(err)
	}
	if calls > 3 {
		t.Errorf("%d credentials were looked at for an update of one leaf", calls)
	}
}

func mustInfo(t *testing.T, g *mls.Group) *mls.GroupInfo {
	t.Helper()
	gi, err := g.GroupInfo(true, true)
	if err != nil {
		t.Fatal(err)
	}
	return gi
}

func TestParticipantListUpdates(t *testing.T) {
	list := ParticipantList{{"mimi://a.example/u/alice", RoleAdmin}, {"mimi://b.example/u/bob", RoleMember}, {"mimi://c.example/u/cathy", RoleMember}}
	for _, c := range []struct {
		name    string
		updates []ParticipantListUpdate
		want    string // users and roles, or "" if refused
	}{
		{"nothing", []ParticipantListUpdate{{}}, "alice4 bob2 cathy2"},
		{"role", []ParticipantListUpdate{{Changed: []RoleChange{{2, RoleBanned}}}}, "alice4 bob2 cathy1"},
		{"remove", []ParticipantListUpdate{{Removed: []uint32{1}}}, "alice4 cathy2"},
		{"add", []ParticipantListUpdate{{Added: []Participant{{"mimi://d.example/u/diana", RoleModerator}}}}, "alice4 bob2 cathy2 diana3"},
		{"all in one", []ParticipantListUpdate{{
			Changed: []RoleChange{{2, RoleAdmin}}, Removed: []uint32{0}, Added: []Participant{{"mimi://d.example/u/diana", RoleMember}},
		}}, "bob2 cathy4 diana2"},
		{"two that refer to the same list", []ParticipantListUpdate{
			{Removed: []uint32{0}, Added: []Participant{{"mimi://d.example/u/diana", RoleMember}}}, {Removed: []uint32{1}},
		}, "cathy2 diana2"},
		{"index past the end", []ParticipantListUpdate{{Removed: []uint32{3}}}, ""},
		{"index of one who is being added", []ParticipantListUpdate{{Changed: []RoleChange{{3, 2}}, Added: []Participant{{"mimi://d.example/u/diana", 2}}}}, ""},
		{"huge index", []ParticipantListUpdate{{Changed: []RoleChange{{1<<32 - 1, 2}}}}, ""},
		{"removed twice", []ParticipantListUpdate{{Removed: []uint32{1, 1}}}, ""},
		{"removed and changed", []ParticipantListUpdate{{Removed: []uint32{1}, Changed: []RoleChange{{1, 1}}}}, ""},
		{"changed by two updates", []ParticipantListUpdate{{Changed: []RoleChange{{1, 1}}}, {Changed: []RoleChange{{1, 3}}}}, ""},
		{"removed and added again", []ParticipantListUpdate{{Removed: []uint32{1}, Added: []Participant{{"mimi://b.example/u/bob", 4}}}}, ""},
		{"added though there", []ParticipantListUpdate{{Added: []Participant{{"mimi://b.example/u/bob", 2}}}}, ""},
		{"added twice", []ParticipantListUpdate{{Added: []Participant{{"mimi://d.example/u/diana", 2}}}, {Added: []Participant{{"mimi://d.example/u/diana", 2}}}}, ""},
		{"role none", []ParticipantListUpdate{{Changed: []RoleChange{{1, RoleNone}}}}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := codec.Marshal(list)
			updates := make([][]byte, len(c.updates))
			for i, u := range c.updates {
				updates[i] = codec.Marshal(u)
			}
			b, err := Components()[ComponentParticipantList].Update(before, updates)
			if !bytes.Equal(before, codec.Marshal(list)) {
				t.Error("the list that was updated has changed")
			}
			if (err == nil) != (c.want != "") {
				t.Fatalf("error %v, want list %q", err, c.want)
			}
			if err != nil {
				return
			}
			var next ParticipantList
			if err := codec.Unmarshal(b, &next); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range next {
				got = append(got, fmt.Sprint(p.User.ID(), p.Role))
			}
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("got %s, want %s", s, c.want)
			}
			if len(c.updates) == 1 {
				if one, err := list.Apply(c.updates[0]); err != nil || !bytes.Equal(codec.Marshal(one), b) {
					t.Errorf("Apply gives %v, %v", one, err)
				}
			}
		})
	}
}

func TestParticipantsAreFoundWithTheirRole(t *testing.T) {
	list := ParticipantList{{"mimi://a.example/u/alice", RoleAdmin}, {"mimi://b.example/u/bob", RoleBanned}}
	if i, role, ok := list.Find("mimi://b.example/u/bob"); i != 1 || role != RoleBanned || !ok {
		t.Errorf("bob: %d %d %v", i, role, ok)
	}
	if _, role, ok := list.Find("mimi://b.example/u/alice"); role != RoleNone || ok {
		t.Errorf("another alice: %d %v", role, ok)
	}
}

func TestRoomMetadataIsReplacedByOneUpdate(t *testing.T) {
	c := Components()[ComponentRoomMetadata]
	next := codec.Marshal(RoomMetadata{RoomURI: "mimi://a.example/r/x", RoomName: "Ünter uns", Avatar: "https://a.example/x.png"})
	if b, err := c.Update([]byte("old"), [][]byte{next}); err != nil || !bytes.Equal(b, next) {
		t.Errorf("got %x, %v", b, err)
	}
	if _, err := c.Update(nil, [][]byte{next, next}); err == nil {
		t.Error("two updates in one commit are accepted")
	}
	for _, m := range []RoomMetadata{{Avatar: "http://a.example/x.png"}, {RoomURI: "room"}, {RoomName: "a\x00b"}, {Subject: "\xff"}} {
		if _, err := c.Update(nil, [][]byte{codec.Marshal(m)}); err == nil {
			t.Errorf("%+v is accepted", m)
		}
	}
}

func BenchmarkRoomPolicy(b *testing.B) {
	r := newTestRoom(b)
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprintf("participants=%d", n), func(b *testing.B) {
			list := ParticipantList{{user("alice"), RoleAdmin}}
			for i := range n - 1 {
				list = append(list, Participant{URI(fmt.Sprintf("mimi://a.example/u/u%d", i)), RoleMember})
			}
			context := r.hub.Context()
			d := mls.AppDataDictionary(nil).Set(ComponentParticipantList, codec.Marshal(list))
			context.Extensions = context.Extensions.Set(mls.ExtensionAppDataDictionary, codec.Marshal(d))
			info := &mls.StagedInfo{Before: context, After: context, TreeBefore: r.hub.Tree(), TreeAfter: r.hub.Tree()}
			policy := RoomPolicy(identityOf)
			for b.Loop() {
				if err := policy(info); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
