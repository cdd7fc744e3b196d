package node

import (
	"errors"
	"fmt"
	"slices"
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

const day = 24 * time.Hour

// pendingOf returns the leaves whose removal is pending at the hub.
func pendingOf(t *testing.T, n *testNode, uri mimi.URI) (leaves []mls.LeafIndex) {
	t.Helper()
	r := must(n.hostedRoom(uri))(t)
	for _, p := range r.group.Pending() {
		if leaf, ok := removedBy(&p); ok {
			leaves = append(leaves, leaf)
		}
	}
	return leaves
}

// without is a commit that leaves out what skip says, and isn't kept; nil for all that is pending.
func (c *testClient) without(skip func(p *mls.PendingProposal) bool) *mimi.UpdateRequest {
	c.t.Helper()
	c.group.Disregard(func(p mls.PendingProposal) bool { return skip == nil || skip(&p) })
	defer c.group.Disregard(nil)
	p, err := c.group.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.group.Drop(nil); err != nil {
		c.t.Fatal(err)
	}
	return bundle(p)
}

// The certificates of beta's users end in an hour, those of alpha's don't.
func TestHubProposesToRemoveWhoIsExpiredOrLate(t *testing.T) {
	alpha := newNode(t, "alpha")
	beta := makeNode(t, "beta", func() time.Time { return time.Now().Add(time.Hour - authority.IntermediateLifetime) })
	beta.start()
	t.Cleanup(beta.stop)
	federate(t, alpha, beta)
	var ahead atomic.Int64
	alpha.stop()
	alpha.cfg.Time = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	alpha.start()
	alice, bob := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	bob.publish(1)
	bobs := bob.subscribe()
	room := mimi.URI("mimi://alpha.example/r/renewing")
	group := alice.newGroup(room, func(e *mls.Extensions) {
		var d mls.AppDataDictionary
		data, _ := e.Find(mls.ExtensionAppDataDictionary)
		if err := codec.Unmarshal(data, &d); err != nil {
			t.Fatal(err)
		}
		*e = e.Set(mls.ExtensionAppDataDictionary, codec.Marshal(d.Set(mimi.ComponentLeafRenewal, codec.Marshal(mimi.LeafRenewal{Days: 30}))))
	})
	if err := alice.tryCreate(room, group); err != nil {
		t.Fatal(err)
	}
	alice.room, alice.group = room, group
	alices := alice.subscribe()
	seq := alice.commit(alice.adding(bob.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.group != nil })
	leaf, _ := alice.leafOf(bob.uri)
	own, _ := alice.leafOf(alice.uri)

	step := func(by time.Duration) {
		t.Helper()
		ahead.Store(int64(by))
		if err := alpha.proposeAll(); err != nil {
			t.Fatal(err)
		}
	}
	step(6 * day)
	if got := pendingOf(t, alpha, room); got != nil {
		t.Errorf("in the time of grace: %v", got)
	}
	step(8 * day)
	alices.until(func() bool { return len(alice.group.Pending()) > 0 })
	omitting := alice.without(nil)
	if resp, _, err := alice.update(omitting); err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("a commit without the pending Remove: %+v, %v", resp, err)
	}
	alpha.stop()
	alpha.start()
	alice.authenticate()
	if got := pendingOf(t, alpha, room); !slices.Equal(got, []mls.LeafIndex{leaf}) {
		t.Errorf("after a restart of the hub: %v", got)
	}
	// The hub's clock was wrong: nobody has to commit what isn't due any more.
	ahead.Store(0)
	resp, seq, err := alice.update(omitting)
	if err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatalf("a commit without the removal of somebody who hasn't expired: %+v, %v", resp, err)
	}
	if got := pendingOf(t, alpha, room); got != nil {
		t.Errorf("in the next epoch: %v", got)
	}
	bobs.until(func() bool { return bob.seq >= seq })

	// Leaves are late by the time for which the hub has run.
	ahead.Store(int64(-365 * day))
	alpha.uptime.before.Store(uint64((36 * day).Seconds()))
	step(0)
	if got := pendingOf(t, alpha, room); got != nil {
		t.Errorf("within the days that the room gives, and the grace: %v", got)
	}
	r := must(alpha.hostedRoom(room))(t)
	c := alpha.begin(r, nil)
	c.noteRenewed(&mls.StagedInfo{Added: []mls.Member{{Index: own}}}) // alice has renewed hers
	if wait, err := alpha.store.Apply(&c.batch); err != nil || wait() != nil {
		t.Fatal(err)
	}
	alpha.uptime.before.Store(uint64((38 * day).Seconds()))
	step(0)
	if got := pendingOf(t, alpha, room); !slices.Equal(got, []mls.LeafIndex{leaf}) {
		t.Errorf("late is %d: %v", leaf, got)
	}
	bobs.until(func() bool { return len(bob.group.Pending()) > 0 })
	alpha.stop() // the time is kept
	alpha.start()
	if got := alpha.uptime.seconds(); got < uint64((38 * day).Seconds()) {
		t.Errorf("it has run for %d s", got)
	}
	// A peer says of its own clients only that they are revoked or deleted.
	if err := alpha.receiveBundle("beta.example", alpha.ownBundle.Load().JSON()); !errors.Is(err, authority.ErrBundle) {
		t.Errorf("beta gives a bundle of alpha: %v", err)
	}
	// Who is late stays by renewing its leaf, which a commit of its own does.
	seq = bob.commit()
	bobs.until(func() bool { return bob.seq >= seq })
	if err := alpha.proposeAll(); err != nil || pendingOf(t, alpha, room) != nil {
		t.Errorf("after its commit: %v, %v", pendingOf(t, alpha, room), err)
	}
	// That it has expired as well doesn't keep a revoked client in.
	ahead.Store(int64(2 * day))
	if _, err := beta.service.Revoke(t.Context(), string(bob.uri), "stolen"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got := pendingOf(t, alpha, room); !slices.Equal(got, []mls.LeafIndex{leaf}) {
			return fmt.Errorf("pending are %v", got)
		}
		return nil
	})
}

// The proposals to leave that an external commit voids are the hub's from then on.
func TestLeaversGoThoughOthersJoinByThemselves(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	tablet := newClient(t, beta, "bob", "bob-tablet")
	tablet.room = alice.room
	tablet.externalJoin()
	joined := func(name string) (*testClient, uint64) {
		c := newClient(t, alpha, "alice", name)
		c.room = alice.room
		return c, c.externalJoin()
	}
	bobs.until(func() bool { return bob.seq >= 2 })
	alices.until(func() bool { return alice.seq >= 2 })
	leaf, _ := bob.leafOf(tablet.uri)
	self, err := bob.group.ProposeSelfRemove(nil)
	if err != nil {
		t.Fatal(err)
	}
	var more []*mls.MLSMessage
	for _, p := range []mls.Proposal{removeLeaf(leaf), listUpdate(mimi.ParticipantListUpdate{Removed: []uint32{1}})} {
		m, err := bob.group.Propose(nil, nil, p)
		if err != nil {
			t.Fatal(err)
		}
		more = append(more, m)
	}
	resp, seq, err := bob.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: self, MoreProposals: more}})
	if err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatalf("the proposals: %+v, %v", resp, err)
	}
	alices.until(func() bool { return alice.seq >= seq })
	if resp, _, err := alice.update(alice.without(nil)); err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("a commit without the SelfRemove: %+v, %v", resp, err)
	}
	partly := alice.without(func(p *mls.PendingProposal) bool { _, ok := removedBy(p); return !ok })
	if resp, _, err := alice.update(partly); err != nil || resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("a commit with the Removes only: %+v, %v", resp, err)
	}
	stranger := newClient(t, alpha, "alice", "alice-old")
	stranger.room = alice.room
	if _, resp, _ := stranger.joinWith(nil, func(o *mls.ExternalJoinOptions) { o.SelfRemoves = nil }); resp.Code != mimi.UpdateNotAllowed {
		t.Errorf("an external commit without the SelfRemove: %+v", resp)
	}

	_, seq = joined("alice-phone")
	alices.until(func() bool { return alice.seq >= seq })
	if _, ok := alice.leafOf(bob.uri); ok {
		t.Error("who joins has left the SelfRemove out")
	}
	check := func() {
		t.Helper()
		pending := alice.group.Pending()
		if len(pending) != 2 || pending[0].Sender.Type != mls.SenderExternal || pending[0].Proposal.Remove == nil || pending[0].Proposal.Remove.Removed != leaf ||
			pending[1].Proposal.AppDataUpdate == nil {
			t.Errorf("with the external commit come %+v", pending)
		}
	}
	check()
	alpha.stop()
	alpha.start()
	alice.authenticate()
	alices = alice.subscribe()
	last, seq := joined("alice-pad")
	alices.until(func() bool { return alice.seq >= seq })
	check()

	// Who has joined knows of them too.
	last.seq = seq - 1
	lasts := last.subscribe()
	lasts.until(func() bool { return last.seq >= seq })
	seq = last.commit()
	lasts.until(func() bool { return last.seq >= seq })
	alices.until(func() bool { return alice.seq >= seq })
	agree(t, alice, last)
	who, err := must(alpha.hostedRoom(alice.room))(t).who()
	if err != nil || len(who.list) != 1 || who.members != 3 {
		t.Errorf("the room has %+v, %v", who, err)
	}
}

func TestAUserDeletesItsOwnDevicesOnly(t *testing.T) {
	n := newNode(t, "alpha")
	laptop, phone, mallory := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "alice", "alice-phone"), newClient(t, n, "mallory", "mallory-pc")
	phone.publish(1)
	remove := func(c *testClient, name mimi.URI) error {
		_, err := c.api.DeleteClient(t.Context(), connect.NewRequest(&api.DeleteClientRequest{Client: string(name)}))
		return err
	}
	for name, want := range map[mimi.URI]string{
		phone.uri: "notFound", "mimi://alpha.example/d/nobody": "notFound", "mimi://beta.example/d/bob-phone": "foreignName",
		phone.user: "malformed", "": "malformed",
	} {
		if err := remove(mallory, name); code(err) != want {
			t.Errorf("mallory deletes %q: %v", name, err)
		}
	}
	if err := phone.tryAuthenticate(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := remove(laptop, phone.uri); err != nil {
			t.Error(err)
		}
	}
	if err := phone.tryAuthenticate(); code(err) != "revoked" {
		t.Errorf("the deleted device authenticates: %v", err)
	}
	if list := must(n.stored(phone.uri))(t); len(list) > 0 {
		t.Errorf("it has %d KeyPackages", len(list))
	}
}
