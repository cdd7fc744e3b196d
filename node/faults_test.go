package node

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// everyFault has the tests of faults try every operation of the file system, and not a sample of them.
var everyFault = flag.Bool("faults", false, "crash, and inject an error, at every operation of the file system")

// step is a request to a node, always with the same bytes.
type step struct {
	name string
	do   func(n *Node) (answer, error)
	// another says that a repetition gets another answer: a KeyPackage, that nobody else has got. either says that it may:
	// another provider gives the answer.
	another, either bool
}

// answer is what a request was acknowledged with: a number, or references of KeyPackages.
type answer struct {
	seq  uint64
	refs string
}

// story is what clients and peers ask of a node, one request after the other.
type story struct {
	t     *testing.T
	node  *testNode
	base  *vfs.MemFS // the node's store at the beginning
	steps []step
	// check looks for contradictions in a node after the first steps have been answered; others may have been taken.
	check func(n *Node, done []answer) error
}

// open opens the story's node on a disk. Its memtables are so small that the requests fill several.
func (s *story) open(fs vfs.FS, failed func(error)) *Node {
	s.t.Helper()
	cfg := s.node.cfg
	cfg.Listen, cfg.Advertise, cfg.diskFree = "127.0.0.1:0", "", nil
	return must(open(cfg, s.node.log, func(o store.Options) (*store.Pebble, error) {
		o.MemTableBytes, o.Failed = 16<<10, failed
		return store.OpenFS(fs, "/store", o)
	}))(s.t)
}

// memory is a MemFS of which images can be taken at any time: its own ReuseForWrite locks twice, and would wait for ever
// for one that is taken in between.
type memory struct{ *vfs.MemFS }

// ReuseForWrite implements vfs.FS.
func (m memory) ReuseForWrite(oldname, newname string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if err := m.Rename(oldname, newname); err != nil {
		return nil, err
	}
	return m.OpenReadWrite(newname, category)
}

func cloned(fs *vfs.MemFS, unsynced int) *vfs.MemFS {
	return fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced, RNG: rand.New(rand.NewPCG(5, 6))})
}

// play asks everything until something isn't acknowledged. done counts the answers as they come.
func (s *story) play(n *Node, done *atomic.Pointer[[]answer]) error {
	var answers []answer
	for _, st := range s.steps {
		a, err := st.do(n)
		if err != nil {
			return fmt.Errorf("%s: %w", st.name, err)
		}
		answers = append(answers, a)
		list := slices.Clone(answers)
		done.Store(&list)
	}
	return nil
}

// judge opens what a crash has left, looks whether what was answered is there, asks everything again, and looks again.
func (s *story) judge(what string, fs *vfs.MemFS, done []answer) {
	s.t.Helper()
	n := s.open(fs, nil)
	defer n.Close()
	if err := s.check(n, done); err != nil {
		s.t.Fatalf("%s, after %d answers: %v", what, len(done), err)
	}
	var again []answer
	given := make(map[string]bool)
	for i, st := range s.steps {
		a, err := st.do(n)
		if err != nil {
			s.t.Fatalf("%s, after %d answers: %s again: %v", what, len(done), st.name, err)
		}
		if again = append(again, a); i < len(done) && !st.either && (a == done[i]) == st.another {
			s.t.Fatalf("%s, after %d answers: %s got %+v and then %+v", what, len(done), st.name, done[i], a)
		}
		if !st.another {
			continue
		}
		for _, list := range [][]answer{done[min(i, len(done)):min(i+1, len(done))], {a}} {
			for _, a := range list {
				if given[a.refs] {
					s.t.Fatalf("%s, after %d answers: a KeyPackage was handed out twice", what, len(done))
				}
				given[a.refs] = true
			}
		}
	}
	if err := s.check(n, again); err != nil {
		s.t.Fatalf("%s, after all was asked again: %v", what, err)
	}
}

// tell plays the story on a disk on which everything goes well, takes images of it before each change as a crash at that
// moment would leave it, and judges them. Then the story is played again for each change, which fails.
func (s *story) tell() {
	type image struct {
		op       string
		fs       [2]*vfs.MemFS
		answered []answer
	}
	var images []image
	var mu sync.Mutex
	var armed atomic.Bool
	var done atomic.Pointer[[]answer]
	none := []answer{}
	begin := func() { done.Store(&none) }
	begin()
	disk := cloned(s.base, 100)
	n := s.open(errorfs.Wrap(memory{disk}, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsRead || !armed.Load() {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		known := *done.Load()
		images = append(images, image{fmt.Sprint(op.Kind, " ", op.Path), [2]*vfs.MemFS{cloned(disk, 0), cloned(disk, 50)}, known})
		return nil
	})), nil)
	armed.Store(true)
	if err := s.play(n, &done); err != nil {
		s.t.Fatal(err)
	}
	armed.Store(false)
	all := *done.Load()
	s.judgeAll(n, all)
	stride := 1
	if !*everyFault {
		stride = max(1, len(images)/8)
	}
	for i := 0; i < len(images); i += stride {
		for j, fs := range images[i].fs {
			s.judge(fmt.Sprintf("crash %d before operation %d of %d, %s", j, i, len(images), images[i].op), fs, images[i].answered)
		}
	}
	went, failed := 0, 0
	for at := 1; at <= len(images); at += stride {
		begin()
		var count atomic.Int64
		armed.Store(false)
		disk := cloned(s.base, 100)
		ended := make(chan error, 1)
		var op atomic.Value
		n := s.open(errorfs.Wrap(memory{disk}, errorfs.InjectorFunc(func(o errorfs.Op) error {
			if o.Kind.ReadOrWrite() == errorfs.OpIsRead || !armed.Load() || count.Add(1) != int64(at) {
				return nil
			}
			op.Store(fmt.Sprint(o.Kind, " ", o.Path))
			return errorfs.ErrInjected
		})), func(err error) { ended <- err })
		armed.Store(true)
		played := make(chan error, 1)
		go func() { played <- s.play(n, &done) }()
		var err error
		select {
		case err = <-played:
		case err = <-ended: // some requests may never return
		}
		armed.Store(false)
		what := fmt.Sprintf("error at operation %d of %d, %v", at, len(images), op.Load())
		if err == nil {
			went++
		} else if failed++; !errors.Is(err, store.ErrFailed) {
			s.t.Errorf("%s: %v", what, err)
		}
		s.judge(what, cloned(disk, 0), *done.Load())
		if err == nil {
			n.Close()
		}
	}
	s.t.Logf("%d operations of the file system; the node went on after %d errors and ended with %d", len(images), went, failed)
	if *everyFault && (went == 0 || failed == 0) {
		s.t.Error("the errors had all the same outcome")
	}
}

func (s *story) judgeAll(n *Node, all []answer) {
	s.t.Helper()
	if len(all) != len(s.steps) {
		s.t.Fatalf("%d answers to %d requests", len(all), len(s.steps))
	}
	if err := errors.Join(s.check(n, all), n.Close()); err != nil {
		s.t.Fatal(err)
	}
}

// logOf returns how often each message is in a room's log, which must have no gap after entry from, and whose chain must hold.
func logOf(n *Node, room mimi.URI, from uint64) (map[string][]uint64, *roomRecord, error) {
	b, err := n.store.Get(roomKey(room))
	if err != nil {
		return nil, nil, err
	}
	rec := new(roomRecord)
	if err := decodeRecord(b, rec, "room"); err != nil {
		return nil, nil, err
	}
	link, err := n.linkAt(room, from)
	if err != nil || link == nil {
		return nil, nil, fmt.Errorf("no chain at entry %d: %w", from, err)
	}
	found := make(map[string][]uint64)
	h := link.chain
	for seq := from + 1; seq <= rec.last; seq++ {
		fanout, err := n.store.Get(key(prefixLog, room, be64(seq)))
		if err != nil || fanout == nil {
			return nil, nil, fmt.Errorf("the log has a gap at %d of %d (%w)", seq, rec.last, err)
		}
		var f mimi.FanoutMessage
		if err := decode(fanout, &f); err != nil {
			return nil, nil, err
		}
		hash := string(messageHash(f.Message))
		found[hash] = append(found[hash], seq)
		link, err := n.linkAt(room, seq)
		if err != nil || link == nil {
			return nil, nil, fmt.Errorf("no chain at entry %d (%w)", seq, err)
		}
		if h = h.Next(seq, chain.NewLink(fanout, link.context)); h != link.chain {
			return nil, nil, fmt.Errorf("the chain is broken at entry %d", seq)
		}
	}
	if beyond, err := n.store.Get(key(prefixLog, room, be64(rec.last+1))); err != nil || beyond != nil {
		return nil, nil, fmt.Errorf("there is an entry after the last one, %d (%w)", rec.last, err)
	}
	return found, rec, nil
}

// countKeys counts the records under a prefix.
func countKeys(n *Node, prefix []byte) (int, error) {
	total := 0
	err := store.ScanPrefix(n.store, prefix, func(_, _ []byte) bool { total++; return true })
	return total, err
}

// queued returns the references in the outbox for a peer, with how often each is there.
func queued(n *Node, peer string) (map[string]int, [][]byte, error) {
	refs := make(map[string]int)
	var list [][]byte
	err := store.ScanPrefix(n.store, append([]byte(prefixOutbox+peer), 0), func(_, v []byte) bool {
		if v[0] != outboxKindBundle {
			refs[string(v)]++
			list = append(list, bytes.Clone(v))
		}
		return true
	})
	return refs, list, err
}

// faultStories is a hub and a follower with what they are asked: messages of the hub's own client and of a peer's, a commit
// with Welcomes for clients of both, claims of KeyPackages by own users and by hubs, notifications, and other things that
// clients have them keep.
func faultStories(t *testing.T) (hub, follower *story) {
	disks := []*vfs.MemFS{vfs.NewCrashableMem(), vfs.NewCrashableMem()}
	var nodes []*testNode
	for i, name := range []string{"alpha", "beta"} {
		nodes = append(nodes, newNodeOn(t, name, func(o store.Options) (*store.Pebble, error) { return store.OpenFS(disks[i], "/store", o) }))
	}
	alpha, beta := nodes[0], nodes[1]
	federate(t, alpha, beta)
	alice, bob := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	bob.publish(1)
	bobs := bob.subscribe()
	bobs.live()
	room := alice.createRoom()
	alices := alice.subscribe()
	alices.live()
	seq := alice.commit(alice.adding(bob.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.group != nil })
	carol, dave, laptop := newClient(t, alpha, "carol", "carol-pc"), newClient(t, alpha, "dave", "dave-pc"), newClient(t, beta, "bob", "bob-laptop")
	carol.publish(1)
	dave.publish(8)
	laptop.publish(8)
	adds := alice.adding(carol.user)
	for _, k := range must(alice.claim(bob.user))(t).Clients {
		if k.Client == laptop.uri {
			adds = append(adds, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *k.KeyPackage}})
		}
	}
	last := alice.send("the last one before the faults")
	bobs.until(func() bool { return bob.seq >= last })
	eventually(t, func() error {
		if n := alpha.outbox.Depth("beta.example"); n > 0 {
			return fmt.Errorf("%d items wait for beta", n)
		}
		return nil
	})
	alpha.stop()
	beta.stop()
	bases := []*vfs.MemFS{cloned(disks[0], 100), cloned(disks[1], 100)}
	beta.cfg.Limits.ClaimsPerTarget = 10_000
	beta.start() // for the hub's claims
	laptop.authenticate()
	laptop.publishThese(laptop.lastResort())
	epoch := alice.group.Epoch()

	hub = &story{t: t, node: alpha, base: bases[0]}
	hashes := make(map[int][]byte) // of the messages, by the number of the step
	var committed int              // the step
	message := func(c *testClient, by submitter) {
		generation := c.group.Generation()
		req := c.seal(string(bytes.Repeat([]byte("long "), 500)))
		body := codec.Marshal(req)
		if by.client != "" {
			by.generation = &generation
		}
		hashes[len(hub.steps)] = messageHash(req.Message)
		hub.steps = append(hub.steps, step{name: "a message of " + by.name(), do: func(n *Node) (answer, error) {
			resp, seq, err := n.submitMessage(by, room, body)
			if err == nil && resp.Code != mimi.SubmitAccepted {
				err = fmt.Errorf("%v", resp.Code)
			}
			return answer{seq: seq}, err
		}})
	}
	claim := func(s *story, from string, user mimi.URI) {
		req := must(alice.claimRequest(user, nil))(t)
		s.steps = append(s.steps, step{name: "a claim", another: true, do: func(n *Node) (answer, error) {
			resp, err := n.keyMaterial(t.Context(), from, req)
			if err != nil {
				return answer{}, err
			}
			var a answer
			for _, k := range resp.Clients {
				if k.KeyPackage != nil {
					a.refs += string(k.KeyPackage.Ref())
				}
			}
			if a.refs == "" {
				return a, errors.New("no KeyPackage")
			}
			return a, nil
		}})
	}
	own := submitter{domain: "alpha.example", user: alice.user, client: alice.uri}
	message(alice, own)
	message(bob, submitter{domain: "beta.example"})
	claim(hub, "alpha.example", dave.user)
	message(alice, own)
	p := must(alice.group.Commit(nil, mls.CommitOptions{Proposals: adds, ForcePath: true}))(t)
	update := bundle(p)
	committed = len(hub.steps)
	hashes[committed] = messageHash(update.Bundle.Message)
	hub.steps = append(hub.steps, step{name: "a commit", do: func(n *Node) (answer, error) {
		resp, seq, err := n.update(own, room, codec.Marshal(update))
		if err == nil && resp.Code != mimi.UpdateSuccess {
			err = fmt.Errorf("%v: %s", resp.Code, resp.Description)
		}
		return answer{seq: seq}, err
	}})
	if err := alice.group.Confirm(nil); err != nil {
		t.Fatal(err)
	}
	claim(hub, "alpha.example", dave.user)
	message(alice, own)
	message(alice, own)
	more := dave.keyPackages(2)
	published := len(hub.steps)
	hub.steps = append(hub.steps, step{name: "KeyPackages", do: func(n *Node) (answer, error) {
		_, err := n.publish(submitter{user: dave.user, client: dave.uri}, more, false)
		return answer{}, err
	}})
	message(alice, own)
	claim(hub, "alpha.example", dave.user)
	foreign := len(hub.steps)
	claim(hub, "alpha.example", bob.user)
	hub.steps[foreign].another, hub.steps[foreign].either = false, true

	hub.check = func(n *Node, done []answer) error {
		found, rec, err := logOf(n, room, last)
		if err != nil {
			return err
		}
		refs, _, err := queued(n, "beta.example")
		if err != nil {
			return err
		}
		r, err := n.hostedRoom(room)
		if err != nil {
			return err
		}
		for i, hash := range hashes {
			seqs := found[string(hash)]
			a, err := n.answered(r, hash)
			switch {
			case err != nil:
				return err
			case len(seqs) > 1:
				return fmt.Errorf("%s is in the log at %v", hub.steps[i].name, seqs)
			case len(seqs) == 0 && i < len(done):
				return fmt.Errorf("%s was acknowledged as %d and is lost", hub.steps[i].name, done[i].seq)
			case len(seqs) == 0:
				continue
			case i < len(done) && seqs[0] != done[i].seq:
				return fmt.Errorf("%s was acknowledged as %d and is in the log at %d", hub.steps[i].name, done[i].seq, seqs[0])
			case a == nil || a.seq != seqs[0]:
				return fmt.Errorf("the answer to %s is lost: %+v", hub.steps[i].name, a)
			}
		}
		commits := len(found[string(hashes[committed])])
		if n := len(refs); n != int(rec.last-last)+commits {
			return fmt.Errorf("%d references for beta to %d entries and %d Welcomes", n, rec.last-last, commits)
		}
		for ref, times := range refs {
			if _, err := n.load([]byte(ref)); err != nil || times != 1 {
				return fmt.Errorf("beta is to get %q %d times (%w)", ref, times, err)
			}
		}
		if at := r.group.Epoch(); at != epoch+uint64(commits) {
			return fmt.Errorf("the group is in epoch %d after %d commits", at, commits)
		}
		welcomes, err := countKeys(n, key(prefixWelcome, carol.uri))
		if err != nil || welcomes != commits {
			return fmt.Errorf("%d Welcomes wait after %d commits (%w)", welcomes, commits, err)
		}
		member, err := n.member(carol.uri, room)
		if err != nil || (member != nil) != (commits == 1) {
			return fmt.Errorf("the added client is a member: %v (%w)", member, err)
		}
		if foreign < len(done) {
			for ref := range slices.Chunk([]byte(done[foreign].refs), 32) {
				if known, err := n.store.Get(refKey(prefixClaimedRef, ref)); err != nil || known == nil {
					return fmt.Errorf("whose a claimed KeyPackage is was forgotten (%w)", err)
				}
			}
		}
		for _, e := range more {
			var kp mls.KeyPackage
			if err := decode(e, &kp); err != nil {
				return err
			}
			if known, err := n.store.Get(refKey(prefixOwnRef, kp.Ref())); err != nil || known == nil && published < len(done) {
				return fmt.Errorf("a published KeyPackage is lost (%w)", err)
			}
		}
		return nil
	}

	// What the hub sends when all has gone well is what the follower gets.
	follower = &story{t: t, node: beta, base: bases[1]}
	n := hub.open(cloned(hub.base, 100), nil)
	defer n.Close()
	if err := hub.play(n, new(atomic.Pointer[[]answer])); err != nil {
		t.Fatal(err)
	}
	_, refs, err := queued(n, "beta.example")
	if err != nil {
		t.Fatal(err)
	}
	entries := make(map[int]uint64) // by the number of the step
	logged := make(map[uint64][]byte)
	var welcome int // the step
	for i, ref := range refs {
		item := must(n.load(ref))(t)
		msg := federation.Sequenced{Seq: item.Seq, Fanout: item.Fanout}
		if ref[0] == outboxKindEntry {
			msg.Head = must(n.notice(room, item.Seq, [][]byte{item.Fanout}))(t)
			entries[len(follower.steps)], logged[item.Seq] = item.Seq, item.Fanout
		} else {
			welcome = len(follower.steps)
		}
		follower.steps = append(follower.steps, step{name: fmt.Sprintf("notification %d", i), do: func(n *Node) (answer, error) {
			return answer{}, n.notify("alpha.example", room, []federation.Sequenced{msg})
		}})
		if i%3 == 1 {
			claim(follower, "alpha.example", bob.user)
		}
	}
	follower.check = func(n *Node, done []answer) error {
		_, rec, err := logOf(n, room, last)
		if err != nil {
			return err
		}
		for i, seq := range entries {
			fanout, err := n.store.Get(key(prefixLog, room, be64(seq)))
			switch {
			case err != nil:
				return err
			case fanout == nil && i < len(done):
				return fmt.Errorf("entry %d was acknowledged and is lost", seq)
			case fanout != nil && !bytes.Equal(fanout, logged[seq]):
				return fmt.Errorf("entry %d is another one", seq)
			case (fanout != nil) != (seq <= rec.last):
				return fmt.Errorf("the log ends at %d, entry %d is there: %v", rec.last, seq, fanout != nil)
			}
		}
		welcomes, err := countKeys(n, key(prefixWelcome, laptop.uri))
		if err != nil || welcomes > 1 || welcomes == 0 && welcome < len(done) {
			return fmt.Errorf("%d Welcomes wait (%w)", welcomes, err)
		}
		return nil
	}
	return hub, follower
}

// TestNoFaultOfTheDiskUndoesWhatWasAcknowledged crashes a hub and a follower before every change of the disk while they
// take messages, a commit with Welcomes, KeyPackages and claims, and has every change fail. What was acknowledged is there
// once when the node is opened again, no KeyPackage is handed out twice, and every request can be repeated. A sample of the
// changes, all with -faults.
func TestNoFaultOfTheDiskUndoesWhatWasAcknowledged(t *testing.T) {
	hub, follower := faultStories(t)
	t.Run("hub", func(t *testing.T) { hub.t = t; hub.tell() })
	t.Run("follower", func(t *testing.T) {
		follower.node.stop()
		follower.t = t
		follower.tell()
	})
}
