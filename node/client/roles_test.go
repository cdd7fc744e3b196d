package client

import (
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
)

func TestRolesAreWhatARoomsRulesSay(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[0].enrol("carol", "carol-pc")
	room, err := alice.CreateRoomWith(t.Context(), "lunch", mimi.StrictRoom)
	if err != nil {
		t.Fatal(err)
	}
	uri := room.URI()
	if err := room.Add(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob)
	roles, err := bob.room(uri).Roles()
	if err != nil {
		t.Fatal(err)
	}
	user, admin := roles.Named("ordinary_user"), roles.Named("group_admin")
	role := func() uint32 {
		for _, p := range room.Participants() {
			if p.User == bob.User() {
				return p.Role
			}
		}
		return 0
	}
	if user == nil || admin == nil || role() != user.Index {
		t.Fatalf("bob has role %d of %v", role(), roles)
	}
	if err := bob.room(uri).Add(t.Context(), carol.User()); err == nil {
		t.Error("an ordinary user adds somebody")
	}
	if err := bob.room(uri).SetRole(t.Context(), bob.User(), admin.Index); err == nil {
		t.Error("an ordinary user becomes an administrator")
	}
	bob.say(uri, "hello")
	if err := room.SetRole(t.Context(), bob.User(), admin.Index); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob)
	if err := bob.room(uri).Add(t.Context(), carol.User()); err != nil {
		t.Errorf("an administrator adds: %v", err)
	}
	agree(t, uri, alice, bob, carol)
	if err := room.SetRole(t.Context(), bob.User(), 77); err == nil {
		t.Error("a role that the room hasn't got is given")
	}
	if err := room.SetRole(t.Context(), "mimi://beta.example/u/nobody", admin.Index); err == nil {
		t.Error("somebody who isn't there gets a role")
	}
	sees(t, uri, []string{"bob-phone: hello"}, alice, bob)
}
