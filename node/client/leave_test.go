package client

import (
	"context"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// never keeps a device from committing what others propose by itself.
func (d *device) never() {
	d.stop()
	d.o.CommitDelay = func() time.Duration { return time.Hour }
	d.restart()
}

// restartAt is restart with a clock that is ahead.
func (d *device) restartAt(ahead time.Duration) {
	d.stop()
	d.o.Time = func() time.Time { return time.Now().Add(ahead) }
	d.restart()
}

// gone waits until a device isn't a member of a room any more.
func gone(t *testing.T, uri mimi.URI, devices ...*device) {
	t.Helper()
	for _, d := range devices {
		within(t, func() error {
			if r, err := d.Room(uri); err != nil || r.Active() {
				return errors.New(d.ID().ID() + " is still a member")
			}
			return nil
		})
	}
}

func pendingIn(r *Room) []mls.PendingProposal {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.group.Pending()
}

// Nobody commits the proposals before a new device joins by itself: it commits the SelfRemove, and the hub proposes the
// rest anew.
func TestLeaverGoesWhileItIsAwayAndOthersJoin(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, phone, tablet := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("bob", "bob-tablet")
	alice.never()
	room := alice.create(phone.User())
	uri := room.URI()
	agree(t, uri, alice, phone, tablet)
	if err := phone.room(uri).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	phone.stop()
	within(t, func() error {
		if n := len(pendingIn(room)); n != 3 {
			return errors.New("the proposals aren't there")
		}
		return nil
	})
	if list := pendingIn(room); list[0].Proposal.Type != mls.ProposalSelfRemove || list[1].Proposal.Remove == nil || list[2].Proposal.AppDataUpdate == nil {
		t.Errorf("bob proposes %+v", list)
	}
	old := p[0].enrol("alice", "alice-pad")
	old.never()
	if _, err := old.Join(t.Context(), uri); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, old, tablet)
	for _, r := range []*Room{room, old.room(uri)} {
		within(t, func() error {
			list := pendingIn(r)
			if len(list) != 2 || list[0].Sender.Type != mls.SenderExternal || list[1].Sender.Type != mls.SenderExternal {
				return errors.New("the hub doesn't propose the rest")
			}
			return nil
		})
	}
	alice.stop()
	alice.restart() // what it knows of who leaves is in its store
	room = alice.room(uri)
	room.mu.Lock()
	if !room.toCommit() || !room.leavers[phone.User()] {
		t.Error("alice doesn't see why")
	}
	room.mu.Unlock()
	if err := room.UpdateKeys(t.Context()); err != nil { // with what is pending
		t.Fatal(err)
	}
	agree(t, uri, alice, old)
	phone.restart()
	gone(t, uri, phone, tablet)
	if list := room.Participants(); len(list) != 1 || list[0].User != alice.User() {
		t.Errorf("participants: %v", list)
	}
	alice.say(uri, "alone again")
	sees(t, uri, []string{"alice-laptop: alone again"}, old)
}

func TestADeletedDeviceIsRemovedFromItsRooms(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, phone, tablet := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("bob", "bob-tablet")
	mallory := p[1].enrol("mallory", "mallory-pc")
	room := alice.create(phone.User())
	agree(t, room.URI(), alice, phone, tablet)
	for _, id := range []mimi.URI{tablet.ID(), alice.ID(), phone.User()} {
		if err := mallory.DeleteDevice(t.Context(), id); err == nil {
			t.Errorf("mallory deletes %s", id)
		}
	}
	if err := phone.DeleteDevice(t.Context(), tablet.ID()); err != nil {
		t.Fatal(err)
	}
	if err := <-tablet.ended; !errors.Is(err, ErrRevoked) {
		t.Errorf("the deleted device ended with %v", err)
	}
	tablet.ended <- nil // for stop
	agree(t, room.URI(), alice, phone)
	if list := room.Participants(); len(list) != 2 {
		t.Errorf("the user isn't a participant any more: %v", list)
	}
}

func TestAUsersDevicesLeaveARoomThatNobodyElseIsIn(t *testing.T) {
	p := providers(t, "alpha")
	phone, tablet := p[0].enrol("bob", "bob-phone"), p[0].enrol("bob", "bob-tablet")
	uri := phone.create().URI()
	if err := phone.room(uri).Add(t.Context(), phone.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, phone, tablet)
	if err := phone.room(uri).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	gone(t, uri, phone, tablet)
}

func TestTheLastAdministratorLeavesAfterAnother(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("carol", "carol-pc")
	room, err := alice.CreateRoomWith(t.Context(), "lunch", mimi.StrictRoom)
	if err != nil {
		t.Fatal(err)
	}
	uri := room.URI()
	if err := room.Add(t.Context(), bob.User(), carol.User()); err != nil {
		t.Fatal(err)
	}
	roles, err := room.Roles()
	if err != nil {
		t.Fatal(err)
	}
	admin := roles.Named("group_admin").Index // there has to be one, once there is
	if err := room.SetRole(t.Context(), bob.User(), admin); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, carol)
	if rf, ok := errors.AsType[*Refused](bob.room(uri).Leave(t.Context())); !ok || rf.Code != mimi.UpdateNotAllowed.String() {
		t.Errorf("the only administrator leaves: %v", rf)
	}
	if err := room.SetRole(t.Context(), carol.User(), admin); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, carol)
	if err := bob.room(uri).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	gone(t, uri, bob)
	agree(t, uri, alice, carol)
}

// The hub, or a node on the way to it, says that it has the proposals to leave, and hasn't.
func TestALeaverSeesThatItsProposalsAreWithheld(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	bob, f := p[0].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	events := bob.Events()
	f.set(func(f *faults) {
		f.update = func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			return connect.NewResponse(&api.MimiResponse{Body: codec.Marshal(&mimi.UpdateRoomResponse{Code: mimi.UpdateSuccess})}), nil
		}
	})
	if err := bob.room(room.URI()).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.set(func(f *faults) { f.update = nil })
	if err := room.UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	for ev := range events {
		if fault, ok := ev.(HubFault); ok && fault.Reason == faultLeave {
			break
		}
	}
	gone(t, room.URI(), bob) // by proposals of the next epoch
	agree(t, room.URI(), alice)
}

// The certificates of beta's users end in an hour. The hub's clock is ahead.
func TestUnfoundedRemovalsOfTheHubAreNotCommitted(t *testing.T) {
	p := providersSince(t, map[string]func() time.Time{
		"beta": func() time.Time { return time.Now().Add(time.Hour - authority.IntermediateLifetime) },
	}, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	events := alice.Events()
	var ahead atomic.Int64
	p[0].stop()
	p[0].config.Time = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	ahead.Store(int64(10 * 24 * time.Hour))
	p[0].start()
	for ev := range events {
		if d, ok := ev.(Discarded); ok && d.Client == bob.ID() && strings.Contains(d.Reason, errUnfounded.Error()) {
			break
		}
	}
	room.mu.Lock()
	if len(room.group.Pending()) != 1 || room.held() || !room.commitAt.IsZero() {
		t.Error("alice would commit it, or waits for it")
	}
	room.mu.Unlock()
	alice.say(uri, "still here")
	sees(t, uri, []string{"alice-laptop: still here"}, alice, bob)
	if err := room.UpdateKeys(t.Context()); err == nil {
		t.Error("the hub takes a commit without the Remove that is due by its clock")
	}
	ahead.Store(0)
	if err := room.UpdateKeys(t.Context()); err != nil {
		t.Errorf("with the hub's clock right again: %v", err)
	}
	agree(t, uri, alice, bob)

	// Where alice's clock says the same, the removal is what has to be done.
	ahead.Store(int64(10 * 24 * time.Hour))
	alice.restartAt(10 * 24 * time.Hour)
	p[0].stop()
	p[0].start()
	agree(t, uri, alice)
	if list := alice.room(uri).Participants(); len(list) != 2 {
		t.Errorf("the user stays a participant: %v", list)
	}
}

// A hub with nothing to say for it proposes to take bob off the list, and out.
func TestWhoIsTakenOffTheListByTheHubHasToHaveAReason(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	alice.never()
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	b, err := os.ReadFile(filepath.Join(p[0].config.Data, "keys", "hub-ed25519.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	hub, err := authority.ParsePrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	room.mu.Lock()
	list, _ := participants(room.group)
	i, _, _ := list.Find(bob.User())
	props, err := alice.removal(room.group, bob.User())
	epoch, suite := room.group.Epoch(), room.group.Suite()
	room.mu.Unlock()
	if err != nil || len(props) != 2 || i != 1 {
		t.Fatal(props, err)
	}
	for n, prop := range []mls.Proposal{props[1], props[0]} {
		m, err := mls.ExternalProposal(suite, rand.Reader, hub, 0, []byte(uri.Group()), epoch, codec.Marshal(mls.SafeAAD{}), prop)
		if err != nil {
			t.Fatal(err)
		}
		var w waits
		events, err := room.receive(&w, &api.LogEntry{Room: string(uri), Seq: room.Seq() + 1, Fanout: codec.Marshal(&mimi.FanoutMessage{Message: m})})
		if err != nil || w.wait() != nil {
			t.Fatal(err)
		}
		if d, ok := events[0].(Discarded); len(events) != 1 || !ok || !strings.Contains(d.Reason, errUnfounded.Error()) {
			t.Errorf("proposal %d: %+v", n, events)
		}
	}
	room.mu.Lock()
	defer room.mu.Unlock()
	if len(room.group.Pending()) != 2 || room.toCommit() {
		t.Error("alice would commit it")
	}
	room.entered = room.group.Epoch() // she can't know what was before
	if !room.toCommit() {
		t.Error("alice would not commit it if she had just joined")
	}
	room.entered = 0
	room.leavers = map[mimi.URI]bool{bob.User(): true}
	if !room.toCommit() {
		t.Error("alice would not commit it if bob had asked for it")
	}
}

func TestLeavesAreRenewedWhereARoomAsksForIt(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	rooms := make([]*Room, 2)
	for i, days := range []uint16{20, 0} {
		r, err := alice.CreateRoomWith(t.Context(), "lunch", func(hub mimi.URI) mimi.Rules {
			rules := mimi.StrictRoom(hub)
			rules.RenewalDays = days
			return rules
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Add(t.Context(), bob.User()); err != nil {
			t.Fatal(err)
		}
		agree(t, r.URI(), alice, bob)
		rooms[i] = r
	}
	key := func(d *device, i int) []byte {
		r := alice.room(rooms[i].URI())
		r.mu.Lock()
		defer r.mu.Unlock()
		for m := range r.group.Members() {
			if _, id, err := alice.identity(m.Leaf); err == nil && id == d.ID() {
				return slices.Clone(m.Leaf.EncryptionKey)
			}
		}
		return nil
	}
	renewed := func(d *device, i int, before []byte) {
		t.Helper()
		within(t, func() error {
			if slices.Equal(key(d, i), before) {
				return errors.New("not yet")
			}
			return nil
		})
	}
	first, other, bobs := key(alice, 0), key(alice, 1), key(bob, 0)
	alice.restartAt(9 * 24 * time.Hour)
	alice.say(rooms[0].URI(), "nothing is due") // the housekeeping of the start is over
	if !slices.Equal(key(alice, 0), first) {
		t.Error("renewed before half of the time")
	}
	alice.restartAt(16 * 24 * time.Hour)
	renewed(alice, 0, first)
	bob.restartAt(16 * 24 * time.Hour) // who was asleep until then as well
	renewed(bob, 0, bobs)
	agree(t, rooms[0].URI(), alice, bob)
	if !slices.Equal(key(alice, 1), other) {
		t.Error("renewed in a room that doesn't ask for it")
	}
	r := alice.room(rooms[0].URI())
	r.mu.Lock()
	defer r.mu.Unlock()
	for m := range r.group.Members() {
		if _, id, _ := alice.identity(m.Leaf); id == bob.ID() && r.late(m.Index) {
			t.Error("alice takes a renewed leaf for a late one")
		}
	}
}
