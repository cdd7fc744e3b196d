package node

import (
	"crypto/sha256"
	"errors"
	"fmt"
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

// leave has so many bytes free on the node's disk, and waits until the node has seen it.
func (n *testNode) leave(free uint64) {
	n.t.Helper()
	n.used.Store(plenty - free)
	kick(n.disk.look)
	eventually(n.t, func() error {
		if have := n.disk.last.Load(); have != free {
			return fmt.Errorf("%s sees %d bytes free, not %d", n.cfg.Domain, have, free)
		}
		return nil
	})
}

// TestANodeIsReadOnlyWhileItsDiskIsNearlyFull fills the disk of a hub and that of a follower. They refuse, in a way that is
// worth another attempt, everything that needs space, do what gives space back, and go on by themselves when there is
// space again. Nothing that was acknowledged, or that the hub had ordered, is lost.
func TestANodeIsReadOnlyWhileItsDiskIsNearlyFull(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	reserve := alpha.disk.reserve
	alice.publish(3)
	url := alice.uploadAll([]byte("an asset"))
	asset := sha256.Sum256([]byte("an asset"))
	alice.send("before")
	bobs.until(func() bool { return slices.Contains(bob.texts, "before") })
	refused := func(what string, err error) {
		t.Helper()
		var ce *connect.Error
		if code(err) != "unavailable" || !strings.Contains(err.Error(), "disk is nearly full") || !errors.As(err, &ce) || ce.Meta().Get("Retry-After") != "5" {
			t.Errorf("%s, while the disk is nearly full: %v", what, err)
		}
	}
	again := alice.seal("known")
	if resp, _, err := alice.submit(again); err != nil || resp.Code != mimi.SubmitAccepted {
		t.Fatal(resp, err)
	}

	alpha.leave(reserve - 1)
	if s := must(DialAdmin(alpha.cfg.Socket()).Status(t.Context()))(t); !s.ReadOnly || s.DiskFree != reserve-1 {
		t.Errorf("status: %+v", s)
	}
	if !strings.Contains(must(DialAdmin(alpha.cfg.Socket()).Metrics(t.Context()))(t), "\nparley_read_only 1\n") {
		t.Error("the metrics don't say that the node is read-only")
	}
	waiting, fromBob := alice.seal("waiting"), bob.seal("from bob")
	_, _, err := alice.submit(waiting)
	refused("a message", err)
	_, _, err = bob.submit(fromBob)
	refused("a message through another node", err)
	commit := must(bob.group.Commit(nil, mls.CommitOptions{ForcePath: true}))(t)
	_, _, err = bob.update(bundle(commit))
	refused("a commit through another node", err)
	refused("a room", alice.tryCreate(must(mimi.RoomURI("alpha.example", "new"))(t), alice.newGroup("mimi://alpha.example/r/new", nil)))
	_, err = alice.api.PublishKeyPackages(t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{KeyPackages: alice.keyPackages(1)}))
	refused("KeyPackages", err)
	sum := sha256.Sum256([]byte("another"))
	_, err = alice.upload(sum[:], 7, 0, []byte("another"))
	refused("an upload", err)
	_, err = alice.api.SetProfile(t.Context(), connect.NewRequest(&api.Profile{Hidden: true}))
	refused("a profile", err)
	refused("a request for consent", alice.consent(mimi.ConsentRequest, alice.user, bob.user, ""))
	inv := must(alpha.service.Invite(t.Context(), "mimi://alpha.example/u/dave", time.Hour))(t)
	_, err = alice.enrol.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: inv.Token, Csr: alice.csr()}))
	refused("an enrolment", err)
	_, err = alice.api.NoteSent(t.Context(), connect.NewRequest(&api.NoteSentRequest{Message: codec.Marshal(waiting.Message)}))
	refused("a mark", err)
	_, err = alice.claim(bob.user)
	refused("a claim at another provider", err)

	if resp, _, err := alice.submit(again); err != nil || resp.Code != mimi.SubmitAccepted {
		t.Errorf("the answer to what was accepted before: %+v, %v", resp, err)
	}
	if _, err := alice.api.Acknowledge(t.Context(), connect.NewRequest(&api.AcknowledgeRequest{Cursors: []*api.Cursor{{Room: string(alice.room), Seq: 1}}})); err != nil {
		t.Errorf("acknowledging: %v", err)
	}
	if resp, err := alice.claim(alice.user); err != nil || resp.Code != mimi.KeyMaterialSuccess {
		t.Errorf("claiming: %+v, %v", resp, err)
	}
	if got, err := alice.fetch(alice.room, url); err != nil || string(got) != "an asset" {
		t.Errorf("reading an asset: %q, %v", got, err)
	}
	if _, err := alice.api.DeleteAsset(t.Context(), connect.NewRequest(&api.DeleteAssetRequest{Hash: asset[:]})); err != nil {
		t.Errorf("deleting an asset: %v", err)
	}
	if err := alice.consent(mimi.ConsentRevoke, bob.user, alice.user, ""); err != nil {
		t.Errorf("revoking consent: %v", err)
	}
	if err := alpha.sweep(); err != nil {
		t.Errorf("sweeping: %v", err)
	}

	// A little more isn't enough: the node would be at its end again at once.
	alpha.leave(reserve + reserve/8)
	_, _, err = alice.submit(waiting)
	refused("a message", err)
	alpha.leave(2 * reserve)
	beta.leave(reserve - 1)
	if resp, _, err := alice.submit(waiting); err != nil || resp.Code != mimi.SubmitAccepted {
		t.Fatalf("with space again: %+v, %v", resp, err)
	}
	_, _, err = bob.submit(fromBob)
	refused("a message at a follower", err)
	eventually(t, func() error { // beta doesn't take it, and alpha keeps it
		if !strings.Contains(must(DialAdmin(beta.cfg.Socket()).Metrics(t.Context()))(t), `parley_refused_total{code="unavailable",endpoint="notify"}`) {
			return errors.New("beta has refused nothing yet")
		}
		return nil
	})
	if n := alpha.outbox.Depth("beta.example"); n == 0 {
		t.Error("alpha's outbox is empty")
	}
	beta.leave(2 * reserve)
	alpha.outbox.Kick("beta.example")
	bobs.until(func() bool { return slices.Contains(bob.texts, "waiting") })
	if resp, _, err := bob.submit(fromBob); err != nil || resp.Code != mimi.SubmitAccepted {
		t.Fatalf("with space again: %+v, %v", resp, err)
	}
	alices.until(func() bool { return slices.Contains(alice.texts, "from bob") })
	resp, seq, err := bob.update(bundle(commit))
	if err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatalf("the same commit with space again: %+v, %v", resp, err)
	}
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	agree(t, alice, bob)
	if want := []string{"before", "known", "waiting", "from bob"}; !slices.Equal(bob.texts, []string{"before", "known", "waiting"}) || !slices.Equal(alice.texts, want[3:]) {
		t.Errorf("bob reads %q, alice %q", bob.texts, alice.texts)
	}
	if !strings.Contains(must(DialAdmin(alpha.cfg.Socket()).Metrics(t.Context()))(t), "\nparley_read_only 0\n") {
		t.Error("the metrics say that the node is read-only")
	}
}
