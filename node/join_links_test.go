package node

import (
	"crypto/ed25519"
	"crypto/rand"
	"slices"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

func TestALinkLetsAStrangerJoinUntilItExpires(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, bob := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	room := must(mimi.RoomURI("alpha.example", "club"))(t)
	rules := mimi.StrictRoom(must(mimi.ProviderURI("alpha.example"))(t))
	rules.JoinLinks = &mimi.JoinLinkPolicy{MultiUser: true, Expiration: 600}
	g := alice.newGroup(room, func(e *mls.Extensions) {
		data, _ := e.Find(mls.ExtensionAppDataDictionary)
		var d mls.AppDataDictionary
		if err := codec.Unmarshal(data, &d); err != nil {
			t.Fatal(err)
		}
		*e = e.Set(mls.ExtensionAppDataDictionary, codec.Marshal(rules.Dictionary(d)))
	})
	if err := alice.tryCreate(room, g); err != nil {
		t.Fatal(err)
	}
	alice.room, alice.group, bob.room = room, g, room
	alices, bobs := alice.subscribe(), bob.subscribe()
	alices.live()
	bobs.live()

	makes := func(links ...mimi.JoinLink) mls.Proposal {
		return mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{
			Component: mimi.ComponentJoinLinks, Op: mls.AppDataOpUpdate, Update: codec.Marshal(mimi.JoinLinksUpdate{Added: links}),
		}}
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, old, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	link := func(of ed25519.PrivateKey, expires uint64) mimi.JoinLink {
		return mimi.JoinLink{Key: of.Public().(ed25519.PublicKey), Role: 2, MultiUser: true, Expires: expires}
	}
	for name, expires := range map[string]uint64{"for ever": 0, "longer than links may": unixNow() + 3600} {
		p, err := alice.group.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{makes(link(key, expires))}})
		if err != nil {
			t.Fatal(err)
		}
		if resp, _, err := alice.update(bundle(p)); err != nil || resp.Code != mimi.UpdateNotAllowed {
			t.Errorf("a link that lasts %s: %+v, %v", name, resp, err)
		}
		if err := alice.group.Drop(nil); err != nil {
			t.Fatal(err)
		}
	}
	seq := alice.commit(makes(link(key, unixNow()+500), link(old, unixNow()-1)))
	alices.until(func() bool { return alice.seq >= seq })

	code := func(key ed25519.PrivateKey, client mimi.URI) []byte {
		return codec.Marshal(mimi.NewJoiningCode(key, room, client))
	}
	for name, joining := range map[string][]byte{
		"no code": nil, "one that has expired": code(old, bob.uri), "somebody else's": code(key, alice.uri), "what is no code": []byte("x"),
	} {
		if resp, _, err := bob.groupInfo(joining...); err != nil || resp.Code != mimi.GroupInfoNotAuthorized {
			t.Errorf("with %s: %+v, %v", name, resp, err)
		}
	}
	with := func(joining []byte) []mls.Proposal {
		return []mls.Proposal{
			listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: bob.user, Role: 2}}}),
			{Type: mls.ProposalAppEphemeral, AppEphemeral: &mls.AppEphemeral{Component: mimi.ComponentJoinLinks, Data: joining}},
		}
	}
	good := code(key, bob.uri)
	if _, resp, _ := bob.tryExternalJoin(good, with(code(old, bob.uri))...); resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("joining by a link that has expired: %+v", resp)
	}
	p, resp, seq := bob.tryExternalJoin(good, with(good)...)
	if resp.Code != mimi.UpdateSuccess {
		t.Fatalf("joining by a link: %+v", resp)
	}
	bob.group, bob.seq = must(p.Confirm(nil))(t), seq-1
	alices.until(func() bool { return alice.seq >= seq })
	agree(t, alice, bob)
	alice.send("welcome")
	bobs.until(func() bool { return slices.Contains(bob.texts, "welcome") })
	bob.send("thanks")
	alices.until(func() bool { return slices.Contains(alice.texts, "thanks") })
}
