package node

import (
	"crypto/ed25519"
	"crypto/rand"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

func TestStrangersBringNothingButTheirOwnJoining(t *testing.T) {
	alpha, beta, gamma := newNode(t, "alpha"), newNode(t, "beta"), newNode(t, "gamma")
	federate(t, alpha, beta)
	federate(t, alpha, gamma)
	alice, dave, mallory := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, alpha, "dave", "dave-pc"), newClient(t, alpha, "mallory", "mallory-pc")
	bob, eve := newClient(t, beta, "bob", "bob-phone"), newClient(t, beta, "eve", "eve-phone")
	_, link, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	create := func(name string, open bool) (mimi.URI, *mls.Group) {
		room := must(mimi.RoomURI("alpha.example", name))(t)
		rules := mimi.StrictRoom(must(mimi.ProviderURI("alpha.example"))(t))
		g := alice.newGroup(room, func(e *mls.Extensions) {
			data, _ := e.Find(mls.ExtensionAppDataDictionary)
			var d mls.AppDataDictionary
			if err := codec.Unmarshal(data, &d); err != nil {
				t.Fatal(err)
			}
			if open {
				d = rules.Dictionary(d).Set(mimi.ComponentJoinLinks, codec.Marshal(mimi.JoinLinks{{Key: link.Public().(ed25519.PublicKey), Role: 2, MultiUser: true}}))
			}
			*e = e.Set(mls.ExtensionAppDataDictionary, codec.Marshal(d))
		})
		if err := alice.tryCreate(room, g); err != nil {
			t.Fatal(err)
		}
		return room, g
	}
	open, g := create("open", true)
	closed, shut := create("closed", false)

	// joins is a client's external commit to a group.
	joins := func(c *testClient, room mimi.URI, g *mls.Group) *mimi.UpdateRequest {
		p, err := mls.ExternalJoin(c.config(), mls.ExternalJoinOptions{
			GroupInfo: must(g.GroupInfo(true, true))(t), Credential: mls.X509Credential(c.chain), Signer: c.signer, LeafExtensions: mimi.LeafExtensions(),
			Proposals: []mls.Proposal{
				listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: c.user, Role: 2}}}),
				{Type: mls.ProposalAppEphemeral, AppEphemeral: &mls.AppEphemeral{Component: mimi.ComponentJoinLinks,
					Data: codec.Marshal(mimi.NewJoiningCode(link, room, c.uri))}},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return &mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
			Message: p.Message(), GroupInfo: mimi.FullGroupInfo(p.GroupInfo()), RatchetTree: mimi.FullRatchetTree(p.Tree()),
		}}
	}
	refused := func(what string, resp *mimi.UpdateRoomResponse, err error) {
		t.Helper()
		if err != nil && code(err) == "notAllowed" || err == nil && resp.Code == mimi.UpdateNotAllowed {
			return
		}
		t.Errorf("%s: %+v, %v", what, resp, err)
	}
	for _, c := range []*testClient{bob, eve, dave, mallory} {
		c.room = open
	}
	resp, _, err := eve.update(joins(bob, open, g))
	refused("through its node, a colleague's joining", resp, err)
	resp, _, err = mallory.update(joins(dave, open, g))
	refused("at the hub, a colleague's joining", resp, err)
	resp, _, err = gamma.federation.Update(t.Context(), "alpha.example", open, codec.Marshal(joins(bob, open, g)))
	refused("another provider's user's joining", resp, err)
	p, err := g.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	resp, _, err = bob.update(bundle(p))
	refused("a member's commit", resp, err)
	if err := g.Drop(nil); err != nil {
		t.Fatal(err)
	}
	// Of a room that isn't open strangers don't even learn the epoch.
	alice.room, alice.group = closed, shut
	old := must(shut.GroupInfo(true, true))(t)
	p, err = shut.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	if resp, _, err := alice.update(bundle(p)); err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatalf("%+v, %v", resp, err)
	}
	unbound := dave.config()
	unbound.Policy = nil
	late, err := mls.ExternalJoin(unbound, mls.ExternalJoinOptions{
		GroupInfo: old, Credential: mls.X509Credential(dave.chain), Signer: dave.signer, LeafExtensions: mimi.LeafExtensions(),
	})
	if err != nil {
		t.Fatal(err)
	}
	dave.room = closed
	resp, _, err = dave.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
		Message: late.Message(), GroupInfo: mimi.FullGroupInfo(late.GroupInfo()), RatchetTree: mimi.FullRatchetTree(late.Tree()),
	}})
	refused("joining what isn't open", resp, err)
	if resp, _, err := bob.update(joins(bob, open, g)); err != nil || resp.Code != mimi.UpdateSuccess {
		t.Errorf("bob can't join: %+v, %v", resp, err)
	}
}
