package client

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// published is what the node has of the device's KeyPackages.
func (d *device) published() (*api.PublishKeyPackagesResponse, error) {
	return call(d.t.Context(), d.session, d.session.service.PublishKeyPackages, &api.PublishKeyPackagesRequest{})
}

// refilled waits until there are enough KeyPackages, and a last-resort one.
func (d *device) refilled() {
	d.t.Helper()
	within(d.t, func() error {
		have, err := d.published()
		if err == nil && d.few(have) {
			err = fmt.Errorf("published are %v", have)
		}
		return err
	})
}

func TestClaimedKeyPackagesAreReplacedWithoutAWelcome(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	if err := bob.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	room := alice.create()
	for range 3 {
		for range 4 {
			if _, err := alice.claim(t.Context(), room, bob.User()); err != nil {
				t.Fatal(err)
			}
		}
		bob.refilled()
	}
}

func TestADeviceThatIsAwayJoinsByItsLastResort(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	bob.refilled()
	bob.stop()
	first := alice.create()
	for last := false; !last; {
		a, err := alice.claim(t.Context(), first, bob.User())
		if err != nil {
			t.Fatal(err)
		}
		last = a.keyPackages[0].keyPackage.LastResort()
	}
	second := alice.create()
	for _, r := range []*Room{first, second} {
		if err := r.Add(t.Context(), bob.User()); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Open(context.Background(), bob.o)
	if err != nil {
		t.Fatal(err)
	}
	bob.run(c)
	for _, r := range []*Room{first, second} {
		bob.room(r.URI())
		agree(t, r.URI(), alice, bob)
	}
	bob.refilled()
	if n := bob.lastResorts(); n != 2 {
		t.Errorf("%d last resorts are kept, want the published one and the one before", n)
	}
	// However often it is replaced, few are kept.
	for range 2 * keptLastResorts {
		if err := bob.publishKeyPackages(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	}
	if n := bob.lastResorts(); n > keptLastResorts {
		t.Errorf("%d last resorts are kept, want %d at most", n, keptLastResorts)
	}
}

// lastResorts counts the last-resort KeyPackages whose private keys the device has.
func (d *device) lastResorts() (n int) {
	d.t.Helper()
	var bad error
	err := store.ScanPrefix(d.db, []byte(prefixKeyPackage), func(_, value []byte) bool {
		var k ownKeyPackage
		if bad = codec.Unmarshal(value, &k); bad == nil && k.keyPackage.LastResort() {
			n++
		}
		return bad == nil
	})
	if err := errors.Join(err, bad); err != nil {
		d.t.Fatal(err)
	}
	return n
}
