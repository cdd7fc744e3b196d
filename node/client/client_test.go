package client

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

func TestPeopleOfTwoProvidersTalk(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	found, err := alice.Find(t.Context(), "bob@beta.example")
	if err != nil {
		t.Fatal(err)
	}
	if found != bob.User() {
		t.Fatalf("found %s, want %s", found, bob.User())
	}
	if u, err := alice.Find(t.Context(), "nobody@beta.example"); err == nil {
		t.Errorf("found %s", u)
	}
	room := alice.create(found)
	if name := bob.room(room.URI()).Name(); name != "test" {
		t.Errorf("the room's name is %q", name)
	}
	agree(t, room.URI(), alice, bob)
	alice.say(room.URI(), "one")
	sees(t, room.URI(), []string{"alice-laptop: one"}, bob)
	bob.say(room.URI(), "two")
	bob.say(room.URI(), "three")
	want := []string{"alice-laptop: one", "bob-phone: two", "bob-phone: three"}
	sees(t, room.URI(), want, alice, bob)

	alice.restart()
	bob.restart()
	sees(t, room.URI(), want, alice, bob)
	alice.say(room.URI(), "four")
	sees(t, room.URI(), append(want, "alice-laptop: four"), alice, bob)
	agree(t, room.URI(), alice, bob)
}

func TestFurtherDevicesAreAddedAndJoin(t *testing.T) {
	p := providers(t, "alpha", "beta")
	laptop, phone := p[0].enrol("alice", "alice-laptop"), p[0].enrol("alice", "alice-phone")
	bob := p[1].enrol("bob", "bob-phone")
	room := laptop.create(bob.User())
	agree(t, room.URI(), laptop, phone, bob)

	tablet := p[1].enrol("bob", "bob-tablet")
	rooms, err := tablet.Joinable(t.Context())
	if err != nil || !slices.Equal(rooms, []mimi.URI{room.URI()}) {
		t.Fatalf("joinable: %v, %v", rooms, err)
	}
	events := laptop.Events()
	if _, err := tablet.Join(t.Context(), room.URI()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), laptop, phone, bob, tablet)
	for e := range events {
		if m, ok := e.(MemberAdded); ok && m.Client == tablet.ID() { // those before may be told of yet
			if m.User != bob.User() || !m.External {
				t.Errorf("the others are told %+v", m)
			}
			break
		}
	}
	tablet.say(room.URI(), "from the tablet")
	phone.say(room.URI(), "from the phone")
	sees(t, room.URI(), []string{"bob-tablet: from the tablet", "alice-phone: from the phone"}, laptop, phone, bob, tablet)
	if rooms, err := tablet.Joinable(t.Context()); err != nil || len(rooms) > 0 {
		t.Errorf("joinable after the join: %v, %v", rooms, err)
	}
}

func TestStrangersCannotJoin(t *testing.T) {
	p := providers(t, "alpha")
	alice, mallory := p[0].enrol("alice", "alice-laptop"), p[0].enrol("mallory", "mallory-pc")
	room := alice.create()
	if _, err := mallory.Join(t.Context(), room.URI()); err == nil {
		t.Error("mallory joined")
	}
	alice.say(room.URI(), "still alone")
	agree(t, room.URI(), alice)
}

func TestRemovedClientCannotRead(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("carol", "carol-phone")
	room := alice.create(bob.User(), carol.User())
	agree(t, room.URI(), alice, bob, carol)
	theirs := bob.room(room.URI())
	open, err := room.SealMessage([]byte("before"))
	if err != nil {
		t.Fatal(err)
	}
	if text, err := theirs.OpenRaw(open); err != nil || string(text) != "before" {
		t.Fatalf("a member opens %q, %v", text, err)
	}
	if err := room.Remove(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	sealed, err := room.SealMessage([]byte("after"))
	if err != nil {
		t.Fatal(err)
	}
	if res, err := alice.SubmitRaw(t.Context(), room.URI(), sealed); err != nil || res.Code != mimi.SubmitAccepted {
		t.Fatalf("submit: %v, %v", res, err)
	}
	sees(t, room.URI(), []string{"alice-laptop: after"}, alice, carol)
	within(t, func() error {
		if theirs.Active() {
			return errors.New("bob doesn't know that he was removed")
		}
		return nil
	})
	if text, err := theirs.OpenRaw(sealed); !errors.Is(err, mls.ErrRemoved) {
		t.Errorf("bob opens %q, %v", text, err)
	}
	if _, err := theirs.Send(t.Context(), []byte("let me in")); !errors.Is(err, ErrNotMember) {
		t.Errorf("bob sends: %v", err)
	}
	bob.restart()
	if got := bob.texts(room.URI()); len(got) > 0 {
		t.Errorf("bob has %q", got)
	}

	// He can be added again, and goes on from there.
	if err := room.Add(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice, carol, bob)
	alice.say(room.URI(), "welcome back")
	sees(t, room.URI(), []string{"alice-laptop: welcome back"}, bob)
}

func TestLeaverIsRemovedByAnother(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, phone, tablet := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("bob", "bob-tablet")
	room := alice.create(phone.User())
	agree(t, room.URI(), alice, phone, tablet)
	if err := phone.room(room.URI()).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice)
	for _, d := range []*device{phone, tablet} {
		within(t, func() error {
			if r, err := d.Room(room.URI()); err != nil || r.Active() {
				return errors.New("still a member")
			}
			return nil
		})
	}
	if list := room.Participants(); len(list) != 1 || list[0].User != alice.User() {
		t.Errorf("participants: %v", list)
	}
	alice.say(room.URI(), "alone again")
}

func TestBothDevicesOfALeaverLeave(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, phone, tablet := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[1].enrol("bob", "bob-tablet")
	alice.stop() // nobody commits before both have left
	alice.o.CommitDelay = func() time.Duration { return 2 * time.Second }
	alice.restart()
	uri := alice.create(phone.User()).URI()
	agree(t, uri, alice, phone, tablet)
	if err := phone.room(uri).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := tablet.room(uri)
	within(t, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.group.Pending()) < 3 {
			return errors.New("the proposals aren't there")
		}
		return nil
	})
	if err := r.Leave(t.Context()); err != nil {
		t.Errorf("the second device: %v", err)
	}
	agree(t, uri, alice)
}

func TestConcurrentChangesBothLand(t *testing.T) {
	p := providers(t, "alpha", "beta")
	laptop, phone := p[0].enrol("alice", "alice-laptop"), p[0].enrol("alice", "alice-phone")
	bob, carol := p[1].enrol("bob", "bob-phone"), p[1].enrol("carol", "carol-phone")
	room := laptop.create()
	agree(t, room.URI(), laptop, phone)
	other := phone.room(room.URI())
	errs := make(chan error)
	changes := []func() error{
		func() error { return room.Add(t.Context(), bob.User()) },
		func() error { return other.Add(t.Context(), carol.User()) },
		func() error { return room.UpdateKeys(t.Context()) },
		func() error { return other.UpdateKeys(t.Context()) },
	}
	before := room.Epoch()
	for _, change := range changes {
		go func() { errs <- change() }()
	}
	for range changes {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	agree(t, room.URI(), laptop, phone, bob, carol)
	if got := room.Epoch() - before; got != uint64(len(changes)) {
		t.Errorf("%d epochs for %d changes", got, len(changes))
	}
	bob.say(room.URI(), "all there")
	sees(t, room.URI(), []string{"bob-phone: all there"}, laptop, phone, bob, carol)
}

func TestSecondEnrolmentAndUnknownDirectoryAreRefused(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	alice.stop()
	if _, err := Enrol(t.Context(), alice.o, p[0].invite("alice"), "alice-phone"); !errors.Is(err, ErrEnrolled) {
		t.Errorf("enrolling again: %v", err)
	}
	if _, err := Open(t.Context(), Options{Dir: t.TempDir()}); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("opening an empty directory: %v", err)
	}
	inv := p[0].invite("bob")
	inv.Root[0] ^= 1
	if _, err := Enrol(t.Context(), Options{Dir: t.TempDir(), Log: testLog(t, "bob")}, inv, "bob-phone"); err == nil {
		t.Error("enrolled at a node with another root than the invitation's")
	}
	info, err := os.Stat(alice.o.Dir + "/store")
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the state's directory: %v, %v", info, err)
	}
	// Without QUIC it works as well.
	alice.o.TCPOnly = true
	c, err := Open(t.Context(), alice.o)
	if err != nil {
		t.Fatal(err)
	}
	alice.run(c)
	alice.say(alice.create().URI(), "over TCP")
}

// The node of the user who is asked for hands out somebody else's KeyPackages: nobody is added.
func TestForeignKeyPackagesAreRefused(t *testing.T) {
	p := providers(t, "alpha")
	alice, f := p[0].enrolFaulty("alice", "alice-laptop")
	bob, mallory := p[0].enrol("bob", "bob-phone"), p[0].enrol("mallory", "mallory-pc")
	room := alice.create()
	f.set(func(f *faults) {
		f.claim = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			var claim mimi.KeyMaterialRequest
			if err := codec.Unmarshal(req.Msg.Body, &claim); err != nil {
				return nil, err
			}
			claim.TargetUser = mallory.User()
			suite := mls.X25519_AES128GCM_SHA256_Ed25519
			if err := claim.Sign(alice.Client.o.Rand, suite, alice.signer); err != nil {
				return nil, err
			}
			again := connect.NewRequest(&api.MimiRequest{Room: req.Msg.Room, Body: codec.Marshal(&claim)})
			again.Header().Set("Authorization", req.Header().Get("Authorization"))
			res, err := f.ClientServiceClient.ClaimKeyPackages(ctx, again)
			if err != nil {
				return nil, err
			}
			var answer mimi.KeyMaterialResponse
			if err := codec.Unmarshal(res.Msg.Body, &answer); err != nil {
				return nil, err
			}
			answer.User = bob.User()
			for i := range answer.Clients {
				answer.Clients[i].Client = bob.ID()
			}
			return connect.NewResponse(&api.MimiResponse{Body: codec.Marshal(&answer)}), nil
		}
	})
	if err := room.Add(t.Context(), bob.User()); err == nil || !strings.Contains(err.Error(), "belongs to mimi://alpha.example/d/mallory-pc") {
		t.Errorf("mallory's KeyPackage handed out as bob's: %v", err)
	}
	agree(t, room.URI(), alice)
}
