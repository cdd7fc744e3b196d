package node

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// ageing is a node whose logs age as the test says.
type ageing struct {
	*testNode
	now time.Time
}

// ages gives nodes other bounds and has them begin to age.
func ages(t *testing.T, most, stored time.Duration, nodes ...*testNode) []*ageing {
	t.Helper()
	var all []*ageing
	for _, n := range nodes {
		eventually(t, func() error { // it has swept when it started
			if b := must(n.store.Get([]byte(keyServed)))(t); b == nil {
				return errors.New("not swept yet")
			}
			return nil
		})
		n.trimming.Lock()
		n.Node.cfg.retainMost, n.Node.cfg.retainStored = most, stored
		n.cfg.retainMost, n.cfg.retainStored = most, stored
		n.trimming.Unlock()
		a := &ageing{n, time.Now()}
		a.pass(0)
		all = append(all, a)
	}
	return all
}

// pass lets time pass, an hour at a time, and sweeps logs.
func (a *ageing) pass(d time.Duration) {
	a.t.Helper()
	for {
		step := min(d, time.Hour)
		a.now = a.now.Add(step)
		if err := a.trimLogs(a.now); err != nil {
			a.t.Fatal(err)
		}
		if d -= step; d == 0 {
			return
		}
	}
}

// log returns the numbers of the entries that a room's log has, which must be a log by all that a backup's must be.
func (a *ageing) log(room mimi.URI) []uint64 {
	a.t.Helper()
	var seqs []uint64
	if err := store.ScanPrefix(a.store, key(prefixLog, room), func(k, _ []byte) bool {
		seqs = append(seqs, slices.Clone(uint64s(k))...)
		return true
	}); err != nil {
		a.t.Fatal(err)
	}
	var rec roomRecord
	if err := decodeRecord(must(a.store.Get(roomKey(room)))(a.t), &rec, "room"); err != nil {
		a.t.Fatal(err)
	}
	if _, err := verifyLog(a.store, room, rec); err != nil {
		a.t.Fatal(err)
	}
	return seqs
}

func uint64s(k []byte) []uint64 {
	var n uint64
	for _, b := range k {
		n = n<<8 | uint64(b)
	}
	return []uint64{n}
}

// from says that a log has the entries from first to last and no others.
func (a *ageing) from(what string, room mimi.URI, first, last uint64) {
	a.t.Helper()
	got := a.log(room)
	if len(got) == 0 || got[0] != first || got[len(got)-1] != last || uint64(len(got)) != last-first+1 {
		a.t.Errorf("%s, %s: the log has %v, want %d to %d", what, a.cfg.Domain, got, first, last)
	}
	for _, seq := range []uint64{first - 1, last} { // what heads and notices need
		if l, err := a.linkAt(room, seq); err != nil || l == nil {
			a.t.Errorf("%s, %s: no link at %d: %v", what, a.cfg.Domain, seq, err)
		}
	}
	if l, err := a.linkAt(room, first-2); first > 2 && (err != nil || l != nil) {
		a.t.Errorf("%s, %s: the link at %d is still there: %v", what, a.cfg.Domain, first-2, err)
	}
}

// ack says what a client has stored.
func (c *testClient) ack(seq uint64) {
	c.t.Helper()
	must(c.api.Acknowledge(c.t.Context(), connect.NewRequest(&api.AcknowledgeRequest{Cursors: []*api.Cursor{{Room: string(c.room), Seq: seq}}})))(c.t)
}

func TestLogGoesWithTheSlowestCursorAndTheBound(t *testing.T) {
	alphaNode, betaNode, alice, bob, alices, bobs := twoNodes(t)
	carol := newClient(t, alphaNode, "carol", "carol-pc")
	carol.publish(1)
	carols := carol.subscribe()
	carols.live()
	seq := alice.commit(alice.adding(carol.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	carols.until(func() bool { return carol.group != nil })
	all := ages(t, 16*time.Hour, 2*time.Hour, alphaNode, betaNode)
	alpha, beta := all[0], all[1]
	for range 3 {
		seq = alice.send("x")
	}
	for _, w := range []struct {
		c *testClient
		e *events
	}{{alice, alices}, {bob, bobs}, {carol, carols}} {
		w.e.until(func() bool { return w.c.seq >= seq })
	}
	alice.ack(seq)
	bob.ack(seq)
	carol.ack(seq - 2)
	for _, a := range all {
		a.pass(time.Hour)
		a.from("an hour old", alice.room, a.log(alice.room)[0], seq)
	}
	alpha.pass(2 * time.Hour)
	beta.pass(2 * time.Hour)
	alpha.from("carol hasn't got all", alice.room, seq-1, seq)
	beta.from("bob has got all", alice.room, seq, seq)
	carol.ack(seq)
	alpha.pass(0)
	alpha.from("all have got all", alice.room, seq, seq)

	// What nobody fetches goes with the bound; a peer that is away holds it as long.
	betaNode.stop()
	first := seq
	for range 70 {
		seq = alice.send("x")
	}
	alices.until(func() bool { return alice.seq >= seq })
	alice.ack(seq)
	carol.ack(seq)
	alpha.pass(time.Hour)
	alpha.pass(14 * time.Hour)
	alpha.from("beta is away", alice.room, first+1, seq)
	alpha.pass(4 * time.Hour)
	alpha.from("beta is away for too long", alice.room, seq, seq)

	// The follower learns the gap from what is left, and serves on; its client enters the room anew.
	betaNode.start()
	bob.authenticate()
	eventually(t, func() error {
		if r := must(betaNode.openRoom(alice.room))(t); r.durable.Load() < seq {
			return fmt.Errorf("beta has %d of %d", r.durable.Load(), seq)
		}
		return nil
	})
	bobs = bob.subscribe()
	for ev := bobs.next(); ev.GetBehind() == nil; ev = bobs.next() {
		if ev.GetLive() != nil || ev.GetEntry() != nil && ev.GetEntry().Seq == seq { // some may have been under way to beta
			t.Fatalf("bob is not told that he is behind but gets %v", ev)
		}
	}
	leaf, _ := bob.leafOf(bob.uri)
	bob.seq = bob.externalJoin(removeLeaf(leaf)) - 1
	seq = bob.send("back")
	bobs.until(func() bool { return bob.seq >= seq })
	carols.until(func() bool { return carol.seq >= seq })
}

func TestPolicyOfTheRoomBoundsItsLog(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	a := ages(t, 72*time.Hour, 2*time.Hour, n)[0]
	for i, c := range []struct {
		name   string
		id     mls.ComponentID
		policy codec.Marshaler
		acked  bool
		kept   time.Duration // and a third longer not
	}{
		{"no policy", 0, nil, false, 72 * time.Hour},
		{"no policy, all have it", 0, nil, true, 2 * time.Hour},
		{"messages expire", mimi.ComponentExpiration, mimi.MessageExpiration{Expiring: mimi.Required, Max: 30 * 3600}, false, 30 * time.Hour},
		{"messages expire soon", mimi.ComponentExpiration, mimi.MessageExpiration{Expiring: mimi.Required, Max: 60}, false, mimi.MinRetention},
		{"messages may expire", mimi.ComponentExpiration, mimi.MessageExpiration{Max: 60}, false, 72 * time.Hour},
		{"history is shared", mimi.ComponentHistory, mimi.HistoryPolicy{Roles: []uint32{mimi.RoleMember}, MaxPeriod: 20 * 3600}, true, 20 * time.Hour},
		{"no history is shared", mimi.ComponentHistory, mimi.HistoryPolicy{Sharing: mimi.Forbidden}, true, 2 * time.Hour},
	} {
		room := must(mimi.RoomURI(n.cfg.Domain, fmt.Sprint("r", i)))(t)
		g := alice.newGroup(room, func(x *mls.Extensions) {
			if c.policy == nil {
				return
			}
			for i, e := range *x {
				var d mls.AppDataDictionary
				if e.Type != mls.ExtensionAppDataDictionary {
					continue
				}
				if err := codec.Unmarshal(e.Data, &d); err != nil {
					t.Fatal(err)
				}
				d = d.Set(c.id, codec.Marshal(c.policy))
				(*x)[i].Data = codec.Marshal(d)
			}
		})
		if err := alice.tryCreate(room, g); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		alice.room, alice.group = room, g
		for range 3 {
			alice.send("x")
		}
		if c.acked {
			alice.ack(3)
		}
		a.pass(0)
		a.pass(c.kept - time.Hour)
		a.from(c.name+", before", room, 1, 3)
		n.stop() // a room that isn't loaded
		n.start()
		alice.authenticate()
		a.pass(time.Hour + c.kept/3)
		a.from(c.name+", after", room, 3, 3)
	}
}

// A proposal that is pending has to be there for whoever joins by an external commit, however old it is.
func TestPendingProposalsStayInTheLog(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	room := alice.createRoom()
	a := ages(t, 10*time.Hour, time.Hour, n)[0]
	alice.send("before")
	var after []*mimi.SubmitMessageRequest // a client that knows of the proposal sends nothing
	for range 2 {
		after = append(after, alice.seal("after"))
	}
	proposal := must(alice.group.Propose(nil, nil, listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: "mimi://alpha.example/u/bob", Role: mimi.RoleMember}}})))(t)
	resp, seq, err := alice.update(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: proposal}})
	if err != nil || resp.Code != mimi.UpdateSuccess {
		t.Fatalf("a proposal: %+v, %v", resp, err)
	}
	for _, m := range after {
		if resp, _, err := alice.submit(m); err != nil || resp.Code != mimi.SubmitAccepted {
			t.Fatalf("a message: %+v, %v", resp, err)
		}
	}
	a.pass(0)
	a.pass(20 * time.Hour)
	a.from("a proposal is pending", room, seq, seq+2)
	if _, info, err := alice.groupInfo(); err != nil || info == nil {
		t.Errorf("the group info of a room with a pending proposal: %v", err)
	}
}

// TestNeededEntriesStayWhateverHappens lets things happen in any order, and looks after each step whether what somebody
// may still ask for is there.
func TestNeededEntriesStayWhateverHappens(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	room := alice.createRoom()
	const most, stored = 10 * time.Hour, 2 * time.Hour
	a := ages(t, most, stored, n)[0]
	random := rand.New(rand.NewPCG(1, 2))
	type reader struct{ has, end uint64 } // end: 0 if there is none
	readers := map[mimi.URI]*reader{alice.uri: {}}
	var born []time.Time // of entries
	queue := make(map[string]uint64)
	set := func(k []byte, v []byte) {
		if _, err := n.store.Commit(map[string][]byte{string(k): v}, nil); err != nil {
			t.Fatal(err)
		}
	}
	pick := func() mimi.URI {
		list := make([]mimi.URI, 0, len(readers))
		for c := range readers {
			list = append(list, c)
		}
		slices.Sort(list)
		return list[random.IntN(len(list))]
	}
	for step := range 400 {
		last := uint64(len(born))
		switch what := random.IntN(10); {
		case what < 3: // a message
			for range 1 + random.IntN(3) {
				seq := alice.send("x")
				born = append(born, a.now)
				if random.IntN(4) == 0 { // a peer is to get it, which is slow
					k, v := n.outbox.Entry("beta.example", outboxEntry(room, seq))
					set(k, v)
					queue[string(k)] = seq
				}
			}
		case what < 5: // somebody has stored some of it
			c := pick()
			r := readers[c]
			if r.has = min(last, r.has+uint64(random.IntN(6))); random.IntN(2) == 0 {
				r.has = last
			}
			set(key(prefixAcked, c, []byte(room)), be64(r.has))
		case what < 6 && len(readers) < 8: // somebody comes
			c := must(mimi.ClientURI(n.cfg.Domain, fmt.Sprint("c", step)))(t)
			readers[c] = &reader{has: last}
			set(key(prefixMember, c, []byte(room)), codec.Marshal(memberRecord{start: last}))
		case what < 7: // somebody is removed, or gone
			c := pick()
			if r := readers[c]; c != alice.uri && r.end == 0 && last > 0 {
				r.end = last
				set(key(prefixMember, c, []byte(room)), codec.Marshal(memberRecord{end: last}))
			} else if c != alice.uri {
				delete(readers, c)
				set(key(prefixMember, c, []byte(room)), nil)
				set(key(prefixAcked, c, []byte(room)), nil)
			}
		case what < 8: // the peer gets the next one
			var next string
			for k := range queue {
				if next == "" || k < next {
					next = k
				}
			}
			if next != "" {
				delete(queue, next)
				set([]byte(next), nil)
			}
		default:
			a.pass(time.Duration(random.IntN(int(3 * time.Hour))))
		}
		if len(born) == 0 {
			continue
		}
		log := a.log(room)
		have := func(seq uint64) bool { return slices.Contains(log, seq) }
		if !have(uint64(len(born))) {
			t.Fatalf("step %d: the last entry is gone", step)
		}
		needed := func(from, to uint64, who string) {
			for seq := from; seq <= to; seq++ {
				if a.now.Sub(born[seq-1]) < most && !have(seq) {
					t.Fatalf("step %d: entry %d is gone, which %s hasn't got", step, seq, who)
				}
			}
		}
		for c, r := range readers {
			to := uint64(len(born))
			if r.end != 0 {
				to = r.end
			}
			needed(r.has+1, to, string(c))
		}
		for _, seq := range queue {
			needed(seq, seq, "beta")
		}
		for seq, at := range born { // nor does anything stay for ever
			if a.now.Sub(at) > 2*most && have(uint64(seq+1)) && seq+1 != len(born) {
				a.pass(0)
				if log = a.log(room); have(uint64(seq + 1)) {
					t.Fatalf("step %d: entry %d is there after %v", step, seq+1, a.now.Sub(at))
				}
			}
		}
	}
	if log := a.log(room); log[0] == 1 {
		t.Error("nothing has gone")
	}
}

// TestCrashWhileLogsAreTrimmed takes images of a disk as a crash would leave it while logs are trimmed.
func TestCrashWhileLogsAreTrimmed(t *testing.T) {
	before := pointwise
	pointwise = 50 // so that the second cut is a range
	t.Cleanup(func() { pointwise = before })
	fs := vfs.NewCrashableMem()
	n := newNodeOn(t, "alpha", func(o store.Options) (*store.Pebble, error) { return store.OpenFS(fs, "/store", o) })
	alice := newClient(t, n, "alice", "alice-laptop")
	a := ages(t, 10*time.Hour, time.Hour, n)[0]
	type image struct {
		fs  vfs.FS
		cut uint64 // acknowledged as trimmed
	}
	random := rand.New(rand.NewPCG(3, 4))
	var images []image
	var rooms []mimi.URI
	var acked uint64
	for range 2 {
		rooms = append(rooms, alice.createRoom())
		for range 100 {
			acked = alice.send("x")
		}
		alice.ack(40)
	}
	a.pass(0)
	for _, step := range []time.Duration{2 * time.Hour, 10 * time.Hour} { // up to the cursor, then up to the end
		var sweeping sync.WaitGroup
		ready := make(chan struct{})
		sweeping.Go(func() {
			close(ready)
			a.pass(step)
		})
		<-ready
		for range 8 {
			images = append(images, image{fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: random}), 0})
		}
		sweeping.Wait()
		cut := must(cutOf(n.store, rooms[0]))(t)
		images = append(images, image{fs.CrashClone(vfs.CrashCloneCfg{RNG: random}), cut.first})
	}
	n.stop()
	if got := images[len(images)-1].cut; got != acked {
		t.Errorf("cut at %d, want %d", got, acked)
	}
	for i, im := range images {
		db := must(store.OpenFS(im.fs, "/store", store.Options{}))(t)
		for _, room := range rooms {
			var rec roomRecord
			if err := decodeRecord(must(db.Get(roomKey(room)))(t), &rec, "room"); err != nil {
				t.Fatal(err)
			}
			c := must(cutOf(db, room))(t)
			entries, err := verifyLog(db, room, rec)
			if err != nil || rec.last != acked || uint64(entries) != rec.last-c.first+1 || c.first < im.cut {
				t.Errorf("image %d: %d entries from %d to %d, was %d: %v", i, entries, c.first, rec.last, im.cut, err)
			}
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestStreamBelowTheCutIsToldOnce(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	var seqs []uint64
	for _, text := range []string{"one", "two", "three"} {
		seqs = append(seqs, alice.send(text))
	}
	bobs.until(func() bool { return bob.seq >= seqs[2] })
	alices.until(func() bool { return alice.seq >= seqs[2] })
	for _, n := range []*testNode{alpha, beta} { // a hole, of entries that never came
		if err := n.store.Delete(key(prefixLog, alice.room, be64(seqs[1]))); err != nil {
			t.Fatal(err)
		}
		n.recent.forget(map[mimi.URI]uint64{alice.room: seqs[2] + 1})
	}
	for _, c := range []*testClient{alice, bob} {
		c.seq, c.texts = seqs[0], nil
		s := c.subscribe()
		behind := 0
		for ev := s.next(); ev.GetLive() == nil; ev = s.next() {
			if ev.GetEntry() != nil {
				t.Errorf("%s gets entry %d after %d", c.uri, ev.GetEntry().Seq, seqs[0])
			}
			if b := ev.GetBehind(); b != nil {
				if behind++; b.Room != string(c.room) || b.Last != seqs[2] {
					t.Errorf("%s: %+v", c.uri, b)
				}
			}
		}
		if behind != 1 {
			t.Errorf("%s was told %d times that it is behind", c.uri, behind)
		}
		if c == bob {
			leaf, _ := bob.leafOf(bob.uri)
			bob.seq = bob.externalJoin(removeLeaf(leaf))
			seq := bob.send("back")
			for ev := s.next(); ev.GetEntry() == nil || ev.GetEntry().Seq != seq; ev = s.next() {
				if ev.GetBehind() != nil || ev.GetEntry() != nil && ev.GetEntry().Seq != bob.seq {
					t.Fatalf("bob is in the room again and gets %v", ev)
				}
			}
		}
	}
}
