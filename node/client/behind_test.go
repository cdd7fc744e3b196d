package client

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// letGo has a node forget what a room's log has before an entry, as it would be after that room's retention.
func (p *provider) letGo(room mimi.URI, first uint64) {
	p.t.Helper()
	p.stop()
	db, err := store.Open(node.StoreDir(p.config.Data), store.Options{})
	if err != nil {
		p.t.Fatal(err)
	}
	for prefix, below := range map[string]uint64{"n/l/": first, "n/L/": first - 1} {
		prefix += string(room) + "\x00"
		if err := store.ScanPrefix(db, []byte(prefix), func(k, _ []byte) bool {
			if binary.BigEndian.Uint64(k) < below {
				err = db.Delete(append([]byte(prefix), k...))
			}
			return err == nil
		}); err != nil {
			p.t.Fatal(err)
		}
	}
	if err := errors.Join(err, db.Close()); err != nil {
		p.t.Fatal(err)
	}
	p.start()
}

// reopen opens a device that is stopped again and returns its events.
func (d *device) reopen() <-chan Event {
	d.t.Helper()
	c, err := Open(d.t.Context(), d.o)
	if err != nil {
		d.t.Fatal(err)
	}
	events := c.Events()
	d.run(c)
	return events
}

func TestClientBehindTheRetentionRejoinsAndShowsTheGap(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[0].enrol("carol", "carol-pc")
	r := alice.create(bob.User(), carol.User())
	uri := r.URI()
	agree(t, uri, alice, bob, carol)
	alice.say(uri, "before")
	sees(t, uri, []string{"alice-laptop: before"}, bob, carol)
	after := r.Seq()
	bob.stop()
	carol.stop()
	for _, text := range []string{"one", "two", "three"} {
		alice.say(uri, text)
	}
	within(t, func() error { return r.WaitSeq(t.Context(), after+3) })
	alice.stop()
	for _, n := range p {
		n.letGo(uri, after+3)
	}
	alice.reopen()
	for i, d := range []*device{bob, carol} {
		d.o.Time = func() time.Time { return time.Now().Add(2 * mimi.MinRetention) } // since it was connected
		if i == 1 {
			d.o.Time = nil // it was connected a moment ago: that log was cut too early
		}
		withheld := false
		for e := range d.reopen() {
			if f, ok := e.(HubFault); ok && f.Reason == faultWithheld && f.Seq == after+1 {
				withheld = true
			}
			if g, ok := e.(Gap); ok {
				if g.Room != uri || g.After != after || g.Next <= after+4 {
					t.Errorf("%s: gap %+v, after %d", d.ID(), g, after)
				}
				break
			}
		}
		if withheld != (i == 1) {
			t.Errorf("%s: told that entries are withheld: %v", d.ID(), withheld)
		}
		if fault := d.room(uri).HubFault(); (fault == faultWithheld) != withheld {
			t.Errorf("%s: fault %q", d.ID(), fault)
		}
	}
	agree(t, uri, alice, bob, carol)
	alice.say(uri, "after")
	bob.say(uri, "bob is back")
	sees(t, uri, []string{"alice-laptop: before", "alice-laptop: after", "bob-phone: bob is back"}, bob, carol)
	sees(t, uri, []string{
		"alice-laptop: before", "alice-laptop: one", "alice-laptop: two", "alice-laptop: three", "alice-laptop: after", "bob-phone: bob is back",
	}, alice)
	bob.stop()
	bob.reopen()
	gaps, err := bob.room(uri).Gaps()
	if err != nil || len(gaps) != 1 || gaps[0].After != after || gaps[0].Room != uri {
		t.Errorf("gaps after a restart: %+v, %v", gaps, err)
	}
}

// A client that was removed in what is missing doesn't come back by itself, whether its user still takes part or not.
func TestWhoWasRemovedMeanwhileDoesNotRejoin(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	tablet := p[0].enrol("alice", "alice-tablet")
	r := alice.create(bob.User())
	uri := r.URI()
	agree(t, uri, alice, bob, tablet)
	bob.stop()
	tablet.stop()
	err := r.change(t.Context(), func(g *mls.Group) (o mls.CommitOptions, err error) {
		for m := range g.Members() { // alice stays with one device
			if _, id, err := r.c.identity(m.Leaf); err == nil && id == tablet.ID() {
				o.Proposals = append(o.Proposals, mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: m.Index}})
			}
		}
		return o, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	alice.say(uri, "without them")
	alice.say(uri, "and again")
	last := r.Seq()
	if err := r.WaitSeq(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	alice.stop()
	p[0].letGo(uri, last)
	p[1].letGo(uri, 1<<40) // but for the last one that came here, it is so for real
	alice.reopen()
	for _, d := range []*device{tablet, bob} {
		if e := next[Removed](t, d.reopen()); e.Room != uri {
			t.Errorf("%s: %+v", d.ID(), e)
		}
		if again, err := d.Room(uri); err != nil || again.Active() || again.Frozen() != nil {
			t.Errorf("%s is in the room: %v", d.ID(), err)
		}
	}
	agree(t, uri, alice) // nobody has come back
	tablet.restart()
	if again, err := tablet.Room(uri); err != nil || again.Active() || again.Frozen() != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// The gap is known though the device went off before it had the hub's answer to the commit with which it came back.
func TestGapOutlastsACrashWhileRejoining(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	bob := p[0].enrol("bob", "bob-phone")
	r := alice.create(bob.User())
	uri := r.URI()
	agree(t, uri, alice, bob)
	after := bob.room(uri).Seq()
	bob.stop()
	alice.say(uri, "one")
	alice.say(uri, "two")
	alice.stop()
	p[0].letGo(uri, after+2)
	alice.reopen()
	c, err := Open(t.Context(), bob.o)
	if err != nil {
		t.Fatal(err)
	}
	f := inject(c)
	committed := make(chan struct{}, 100)
	f.update = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
		if _, err := f.ClientServiceClient.Update(ctx, req); err != nil {
			return nil, err
		}
		committed <- struct{}{}
		return nil, errUnreachable
	}
	bob.run(c)
	<-committed
	bob.stop()
	gap := next[Gap](t, bob.reopen())
	if gap.After != after || gap.Next != after+4 {
		t.Errorf("%+v, want after %d and next %d", gap, after, after+4)
	}
	agree(t, uri, alice, bob)
	alice.say(uri, "three")
	sees(t, uri, []string{"alice-laptop: three"}, bob)
}

func TestRoomIsNotEnteredAnewOverAndOver(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	r := alice.create()
	events := alice.Events()
	behind := func() {
		alice.events.send(alice.fallBehind(&api.Behind{Room: string(r.URI()), Last: r.Seq() + 7})) // as a node might say at any time
	}
	for range anewBurst {
		behind()
		next[Joined](t, events)
	}
	behind()
	within(t, func() error {
		if r.anew.Tokens() >= 1 {
			return errors.New("it may be entered anew")
		}
		return nil
	})
	if err := r.enterAnew(t.Context()); !errors.Is(err, errTooOften) || r.Frozen() == nil {
		t.Errorf("entered anew once more: %v, frozen: %v", err, r.Frozen())
	}
	r.anew.SetBurst(2 * anewBurst)
	r.anew.SetLimit(rate.Inf)
	next[Joined](t, events)
	agree(t, r.URI(), alice)
}
