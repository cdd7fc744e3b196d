package client

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node"
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
