package client

import (
	"context"
	"errors"
	mathrand "math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// TestADeviceWaitsWhileItsDiskIsNearlyFull has too little space on the disk of a device: it refuses to send, loses nothing
// of what is in its outbox or on its way, and goes on by itself.
func TestADeviceWaitsWhileItsDiskIsNearlyFull(t *testing.T) {
	p := providers(t, "alpha")[0]
	alice, bob := p.enrol("alice", "alice-laptop"), p.enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	bob.say(uri, "before")
	sees(t, uri, []string{"bob-phone: before"}, bob)
	bob.stop()
	var free atomic.Uint64
	free.Store(1 << 40)
	c, err := Open(t.Context(), bob.o)
	if err != nil {
		t.Fatal(err)
	}
	c.free = func() (uint64, error) { return free.Load(), nil }
	r, err := c.Room(uri)
	if err != nil {
		t.Fatal(err)
	}
	none, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Send(none, []byte("queued")); !errors.Is(err, ErrQueued) { // it doesn't run yet
		t.Fatal(err)
	}
	free.Store(diskReserve - 1)
	bob.run(c)
	if _, err := r.Send(t.Context(), []byte("no space")); !errors.Is(err, ErrDiskFull) {
		t.Errorf("sending: %v", err)
	}
	if err := r.UpdateKeys(t.Context()); !errors.Is(err, ErrDiskFull) {
		t.Errorf("changing the room: %v", err)
	}
	if _, err := c.CreateRoom(t.Context(), "another"); !errors.Is(err, ErrDiskFull) {
		t.Errorf("creating a room: %v", err)
	}
	alice.say(uri, "meanwhile")
	if got := bob.texts(uri); strings.Join(got, "|") != "bob-phone: before" || len(r.Outbox()) != 1 {
		t.Errorf("bob reads %q, and has %q in the outbox", got, r.Outbox())
	}
	free.Store(1 << 40)
	want := []string{"bob-phone: before", "alice-laptop: meanwhile", "bob-phone: queued"}
	sees(t, uri, want, alice, bob)
	bob.say(uri, "after")
	sees(t, uri, append(want, "bob-phone: after"), alice, bob)
}

// TestADeviceWhoseStateCantBeWrittenEnds has the write-ahead log of a device fail while a message is sent. Send and Run end
// with an error that says so, and what a crash leaves has the message at most once.
func TestADeviceWhoseStateCantBeWrittenEnds(t *testing.T) {
	p := providers(t, "alpha")[0]
	alice := p.enrol("alice", "alice-laptop")
	on := newDisk()
	bob := p.enrolOn(on, "bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	bob.stop()
	var fails atomic.Bool
	failed := make(chan error, 1)
	db, err := store.OpenFS(errorfs.Wrap(on.fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if fails.Load() && strings.HasSuffix(op.Path, ".log") && op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			return errorfs.ErrInjected
		}
		return nil
	})), "/store", store.Options{Failed: func(err error) { failed <- err }})
	if err != nil {
		t.Fatal(err)
	}
	s, err := on.seal(db)
	if err != nil {
		t.Fatal(err)
	}
	s.failed = failed
	c, err := open(bob.o, s)
	if err != nil {
		t.Fatal(err)
	}
	bob.run(c)
	bob.say(uri, "before")
	fails.Store(true)
	if _, err := bob.room(uri).Send(t.Context(), []byte("lost")); !errors.Is(err, store.ErrFailed) {
		t.Errorf("sending: %v", err)
	}
	select {
	case err := <-bob.ended:
		if !errors.Is(err, store.ErrFailed) {
			t.Errorf("Run ends with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("Run doesn't end")
	}
	if err := c.Close(); !errors.Is(err, store.ErrFailed) {
		t.Errorf("Close: %v", err)
	}
	bob.cancel = nil
	if c, err = open(bob.o, on.crash(0, mathrand.New(mathrand.NewPCG(1, 2))).open(t)); err != nil {
		t.Fatal(err)
	}
	bob.run(c)
	bob.say(uri, "after")
	sees(t, uri, []string{"bob-phone: before", "bob-phone: after"}, alice, bob)
}

// TestMessagesWaitWhileTheNodesDiskIsNearlyFull has a node that is read-only for want of space.
func TestMessagesWaitWhileTheNodesDiskIsNearlyFull(t *testing.T) {
	p := providers(t, "alpha")[0]
	alice, f := p.enrolFaulty("alice", "alice-laptop")
	bob := p.enrol("bob", "bob-phone")
	r := alice.create(bob.User())
	uri := r.URI()
	agree(t, uri, alice, bob)
	restart := func(reserve int) {
		t.Helper()
		p.stop()
		p.config.Disk.ReserveMiB = reserve
		p.start()
	}
	refused := make(chan error, 1)
	f.set(func(f *faults) {
		f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			res, err := f.ClientServiceClient.SubmitMessage(ctx, req)
			if Code(err) == "unavailable" && strings.Contains(err.Error(), "disk") {
				select {
				case refused <- err:
				default:
				}
			}
			return res, err
		}
	})
	restart(1 << 30)
	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan error, 1)
	go func() {
		_, err := r.Send(ctx, []byte("waiting"))
		sent <- err
	}()
	select {
	case <-refused:
	case <-time.After(patience):
		t.Fatal("the node refuses nothing")
	}
	cancel()
	if err := <-sent; !errors.Is(err, ErrQueued) || len(r.Outbox()) != 1 {
		t.Errorf("sending: %v; the outbox has %q", err, r.Outbox())
	}
	restart(0)
	sees(t, uri, []string{"alice-laptop: waiting"}, alice, bob)
}
