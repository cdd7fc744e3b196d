package client

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
)

// lossy lets every second request pass, and loses every answer but each fourth one.
func lossy(real unary) unary {
	var n atomic.Int64
	return func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
		i := n.Add(1)
		if i%2 == 0 {
			return nil, errUnreachable
		}
		res, err := real(ctx, req)
		if i%4 == 1 {
			return nil, errUnreachable
		}
		return res, err
	}
}

func TestLostAnswersChangeNothing(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	carol, f := p[1].enrolFaulty("carol", "carol-phone")
	room := alice.create(bob.User(), carol.User())
	agree(t, room.URI(), alice, bob, carol)
	f.set(func(f *faults) {
		f.update, f.submit = lossy(f.ClientServiceClient.Update), lossy(f.ClientServiceClient.SubmitMessage)
	})
	var want []string
	for i := range 6 {
		carol.say(room.URI(), fmt.Sprint("message ", i))
		want = append(want, fmt.Sprint("carol-phone: message ", i))
		if i%2 == 1 {
			before := room.Epoch()
			if err := carol.room(room.URI()).UpdateKeys(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := room.WaitEpoch(t.Context(), before+1); err != nil {
				t.Fatal(err)
			}
			if got := room.Epoch(); got != before+1 {
				t.Errorf("epoch %d after one commit in epoch %d", got, before)
			}
		}
	}
	sees(t, room.URI(), want, alice, bob, carol)
	agree(t, room.URI(), alice, bob, carol)
}

// A crash between sending and the answer: the hub has the message and the commit, the client doesn't know.
func TestCrashBeforeTheAnswer(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice := p[0].enrol("alice", "alice-laptop")
	bob, f := p[1].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)

	// The answers get lost, and so does what the log brings: the subscription is over before.
	reached := make(chan struct{}, 16)
	ordered := func(real unary) unary {
		return func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			_, err := real(context.WithoutCancel(ctx), req)
			if err != nil {
				return nil, err
			}
			reached <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	}
	f.set(func(f *faults) { f.submit = ordered(f.ClientServiceClient.SubmitMessage) })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sent := make(chan error, 1)
	go func() {
		_, err := bob.room(room.URI()).Send(ctx, []byte("once"))
		sent <- err
	}()
	<-reached
	cancel()
	<-sent
	bob.restart()
	sees(t, room.URI(), []string{"bob-phone: once"}, alice, bob)

	bob.stop()
	c, err := Open(t.Context(), bob.o)
	if err != nil {
		t.Fatal(err)
	}
	f = inject(c)
	f.update = ordered(f.ClientServiceClient.Update)
	bob.run(c)
	before := room.Epoch()
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go func() { sent <- bob.room(room.URI()).UpdateKeys(ctx) }()
	<-reached
	cancel()
	<-sent
	bob.restart()
	if err := room.WaitEpoch(t.Context(), before+1); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice, bob)
	if got := room.Epoch(); got != before+1 {
		t.Errorf("epoch %d after one commit in epoch %d", got, before)
	}
	bob.say(room.URI(), "twice")
	sees(t, room.URI(), []string{"bob-phone: once", "bob-phone: twice"}, alice, bob)
}

// Messages written while the hub is out of reach are sent later, in their order, also by the next process.
func TestOutboxSurvivesARestart(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice := p[0].enrol("alice", "alice-laptop")
	bob, f := p[1].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	f.set(func(f *faults) {
		f.submit = func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			return nil, errUnreachable
		}
	})
	r := bob.room(room.URI())
	var want []string
	for i := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := r.Send(ctx, []byte(fmt.Sprint(i)))
		cancel()
		if !errors.Is(err, ErrQueued) {
			t.Fatalf("send: %v", err)
		}
		want = append(want, fmt.Sprint("bob-phone: ", i))
	}
	if got := r.Outbox(); len(got) != 3 {
		t.Fatalf("%d messages in the outbox", len(got))
	}
	bob.restart()
	sees(t, room.URI(), want, alice, bob)
	if got := bob.room(room.URI()).Outbox(); len(got) != 0 {
		t.Errorf("%q still in the outbox", got)
	}
}

// A message that reaches the hub after a commit isn't accepted as it is; it arrives once, encrypted anew.
func TestMessageOvertakenByACommitIsEncryptedAnew(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice := p[0].enrol("alice", "alice-laptop")
	bob, f := p[1].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	arrived, proceed := make(chan struct{}, 16), make(chan struct{})
	f.set(func(f *faults) {
		f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			arrived <- struct{}{}
			<-proceed
			return f.ClientServiceClient.SubmitMessage(ctx, req)
		}
	})
	sent := make(chan error, 1)
	go func() {
		_, err := bob.room(room.URI()).Send(t.Context(), []byte("late"))
		sent <- err
	}()
	<-arrived
	if err := room.UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(proceed)
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	sees(t, room.URI(), []string{"bob-phone: late"}, alice, bob)
}

func TestFollowersClientResumesAfterItsNodeRestarted(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	p[1].stop()
	var want []string
	for i := range 5 {
		alice.say(room.URI(), fmt.Sprint(i))
		want = append(want, fmt.Sprint("alice-laptop: ", i))
	}
	p[1].start()
	sees(t, room.URI(), want, alice, bob)
	bob.say(room.URI(), "here again")
	sees(t, room.URI(), append(want, "bob-phone: here again"), alice, bob)
}

func TestHubRestartLosesNothing(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	p[0].stop()
	sent := make(chan error, 1)
	go func() {
		_, err := bob.room(room.URI()).Send(t.Context(), []byte("to a hub that is down"))
		sent <- err
	}()
	within(t, func() error {
		if len(bob.room(room.URI()).Outbox()) != 1 {
			return errors.New("not in the outbox")
		}
		return nil
	})
	p[0].start()
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	sees(t, room.URI(), []string{"bob-phone: to a hub that is down"}, alice, bob)
}

// A commit that nobody can follow freezes the room where it was, and Join brings the device back.
func TestUnacceptableCommitFreezesTheRoom(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	theirs := bob.room(room.URI())
	events := bob.Events()
	fanout := forgedCommit(t, room, theirs)
	var w waits
	told, err := theirs.receive(&w, &api.LogEntry{Seq: theirs.Seq() + 1, Fanout: fanout})
	if err != nil || w.wait() != nil {
		t.Fatal(err)
	}
	bob.events.send(told)
	for e := range events {
		if f, ok := e.(Frozen); ok {
			if !errors.Is(f.Err, mls.ErrMembershipTag) {
				t.Errorf("told %v", f.Err)
			}
			break
		}
	}
	if err := theirs.Frozen(); !errors.Is(err, ErrFrozen) {
		t.Fatalf("frozen: %v", err)
	}
	if _, err := theirs.Send(t.Context(), []byte("x")); !errors.Is(err, ErrFrozen) {
		t.Errorf("send: %v", err)
	}
	again, err := bob.Join(t.Context(), room.URI())
	if err != nil {
		t.Fatal(err)
	}
	if again.Frozen() != nil {
		t.Error("frozen after the join")
	}
	agree(t, room.URI(), alice, bob)
	bob.say(room.URI(), "back")
	sees(t, room.URI(), []string{"bob-phone: back"}, alice, bob)
}

func TestEntriesThatRepeatOrSkipChangeNothing(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	alice.say(room.URI(), "once")
	sees(t, room.URI(), []string{"alice-laptop: once"}, bob)
	theirs := bob.room(room.URI())
	var w waits
	if told, err := theirs.receive(&w, &api.LogEntry{Seq: theirs.Seq(), Fanout: []byte("anything")}); err != nil || len(told) > 0 {
		t.Errorf("a repeated entry: %v, %v", told, err)
	}
	if told, err := theirs.receive(&w, &api.LogEntry{Seq: theirs.Seq() + 2, Fanout: []byte("anything")}); !errors.Is(err, errGap) || len(told) > 0 {
		t.Errorf("an entry too far: %v, %v", told, err)
	}
	seq := theirs.Seq()
	told, err := theirs.receive(&w, &api.LogEntry{Seq: seq + 1, Fanout: []byte("not a FanoutMessage")})
	if err != nil || len(told) != 1 {
		t.Fatalf("a malformed entry: %v, %v", told, err)
	}
	if _, ok := told[0].(Discarded); !ok || theirs.Seq() != seq+1 || theirs.Frozen() != nil {
		t.Errorf("a malformed entry: %v, at %d, %v", told, theirs.Seq(), theirs.Frozen())
	}
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
}

// A crash between an external commit and its answer: the next process finds out that it has joined.
func TestJoinSurvivesACrashBeforeTheAnswer(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, phone := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	room := alice.create(phone.User())
	agree(t, room.URI(), alice, phone)
	tablet, f := p[1].enrolFaulty("bob", "bob-tablet")
	reached := make(chan struct{}, 16)
	f.set(func(f *faults) {
		f.update = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			if _, err := f.ClientServiceClient.Update(context.WithoutCancel(ctx), req); err != nil {
				return nil, err
			}
			reached <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	joined := make(chan error, 1)
	go func() {
		_, err := tablet.Join(ctx, room.URI())
		joined <- err
	}()
	<-reached
	cancel()
	if err := <-joined; !errors.Is(err, context.Canceled) {
		t.Errorf("join: %v", err)
	}
	alice.say(room.URI(), "is anybody there")
	tablet.restart()
	agree(t, room.URI(), alice, phone, tablet)
	tablet.say(room.URI(), "I am")
	want := []string{"alice-laptop: is anybody there", "bob-tablet: I am"}
	sees(t, room.URI(), want, alice, phone, tablet)
}

// The answer to the enrolment got lost: the same invitation brings the same device in at the second attempt.
func TestEnrolmentGoesOnAfterALostAnswer(t *testing.T) {
	p := providers(t, "alpha")
	o := Options{Dir: t.TempDir(), KeyPackages: 4, Log: testLog(t, "alice")}
	inv := p[0].invite("alice")
	if err := o.fill(); err != nil {
		t.Fatal(err)
	}
	db, err := openStore(o)
	if err != nil {
		t.Fatal(err)
	}
	first, err := newProfile(o, inv, "mimi://alpha.example/d/alice-laptop")
	if err != nil {
		t.Fatal(err)
	}
	c, err := newClient(o, db, first)
	if err != nil {
		t.Fatal(err)
	}
	if first.CSR, err = c.csr(first); err != nil {
		t.Fatal(err)
	}
	if err := first.save(db); err != nil {
		t.Fatal(err)
	}
	if _, err := c.session.enrolment.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: inv.Token, Csr: first.CSR})); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if c, err := Open(t.Context(), o); !errors.Is(err, ErrNotEnrolled) {
		t.Fatalf("opened half an enrolment: %v, %v", c, err)
	}
	again, err := Enrol(t.Context(), o, inv, "alice-laptop")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if string(again.profile.Key) != string(first.Key) {
		t.Error("the second attempt made another key")
	}
}
