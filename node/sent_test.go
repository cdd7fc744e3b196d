package node

import (
	"crypto/sha256"
	"errors"
	"runtime"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// submitWith submits a message with the generation of its key.
func (c *testClient) submitWith(req *mimi.SubmitMessageRequest, generation uint32) (*mimi.SubmitMessageResponse, uint64, error) {
	resp, err := c.api.SubmitMessage(c.t.Context(), connect.NewRequest(&api.MimiRequest{
		Room: string(c.room), Body: codec.Marshal(req), Generation: &generation,
	}))
	if err != nil {
		return nil, 0, err
	}
	out := new(mimi.SubmitMessageResponse)
	return out, resp.Msg.Seq, codec.Unmarshal(resp.Msg.Body, out)
}

// last asks for the client's mark.
func (c *testClient) last() *api.LastSentResponse {
	c.t.Helper()
	return must(c.api.LastSent(c.t.Context(), connect.NewRequest(&api.LastSentRequest{Group: c.group.GroupID()})))(c.t).Msg
}

// slowReads is a store in which others get far between a read and what is made of it.
type slowReads struct{ store.Store }

func (s slowReads) Get(key []byte) ([]byte, error) {
	v, err := s.Store.Get(key)
	for range 100 {
		runtime.Gosched()
	}
	return v, err
}

func TestMarksOnlyRise(t *testing.T) {
	db, err := store.OpenFS(vfs.NewMem(), "/store", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	n := &Node{store: slowReads{db}}
	const submitters, each = 16, 50
	client, group := mimi.URI("mimi://alpha.example/d/x"), sha256.Sum256([]byte("group"))
	var all sync.WaitGroup
	for i := range submitters {
		all.Go(func() {
			for j := range each {
				// Each submitter goes up through the keys, and all of them at once.
				m := &mark{client, group, sentRecord{epoch: uint64(j / 10), generation: uint32(j%10*submitters + i), hash: make([]byte, 32)}}
				err := n.note(m)
				if err != nil && !errors.Is(err, errKeyUsed) {
					t.Error(err)
				}
				last, err := n.lastSent(client, group)
				if err != nil || last.before(m.epoch, m.generation) {
					t.Errorf("the mark is %+v (%v) after %+v was noted", last, err, m)
					return
				}
			}
		})
	}
	all.Wait()
	last, err := n.lastSent(client, group)
	if err != nil || last.epoch != each/10-1 || last.generation != 9*submitters+submitters-1 {
		t.Errorf("the mark is %+v, %v at last", last, err)
	}
}

// Messages that are ordered and such that are too old move the same mark, in different ways.
func TestMarksOnlyRiseAtTheHub(t *testing.T) {
	_, alice, _, alices, _ := twoDevices(t)
	const n = 40
	var old, now []*mimi.SubmitMessageRequest
	for range n {
		old = append(old, alice.seal("old"))
	}
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	for range n {
		now = append(now, alice.seal("now"))
	}
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			if resp, _, err := alice.submitWith(old[i], uint32(i)); err != nil || resp.Code != mimi.SubmitEpochTooOld {
				t.Errorf("%+v, %v", resp, err)
			}
		})
		all.Go(func() {
			resp, _, err := alice.submitWith(now[i], uint32(i))
			if code(err) != "keyUsed" && (err != nil || resp.Code != mimi.SubmitAccepted) {
				t.Errorf("%+v, %v", resp, err)
			}
			if last := alice.last(); last.Epoch != alice.group.Epoch() || last.Generation < uint32(i) {
				t.Errorf("the mark is %v after %d", last, i)
			}
		})
	}
	all.Wait()
}

func TestAMessageWithAUsedKeyIsRefused(t *testing.T) {
	_, _, alice, bob, alices, bobs := twoNodes(t)
	for _, c := range []*testClient{alice, bob} { // at the hub and at a follower
		first, second, other, later := c.seal("0"), c.seal("1"), c.seal("another"), c.seal("2")
		for generation, m := range []*mimi.SubmitMessageRequest{first, second} {
			if resp, _, err := c.submitWith(m, uint32(generation)); err != nil || resp.Code != mimi.SubmitAccepted {
				t.Fatalf("%s, message %d: %+v, %v", c.uri, generation, resp, err)
			}
		}
		last := c.last()
		for generation := range uint32(2) {
			if resp, _, err := c.submitWith(other, generation); code(err) != "keyUsed" {
				t.Errorf("%s, another message with key %d: %+v, %v", c.uri, generation, resp, err)
			}
			_, err := c.api.NoteSent(t.Context(), connect.NewRequest(&api.NoteSentRequest{Message: codec.Marshal(other.Message), Generation: generation}))
			if code(err) != "keyUsed" {
				t.Errorf("%s, another message noted with key %d: %v", c.uri, generation, err)
			}
		}
		if resp, _, err := c.submitWith(second, 1); err != nil || resp.Code != mimi.SubmitAccepted {
			t.Errorf("%s, the same message again: %+v, %v", c.uri, resp, err)
		}
		if now := c.last(); now.Generation != last.Generation || string(now.Hash) != string(messageHash(second.Message)) {
			t.Errorf("%s, the mark moved from %v to %v", c.uri, last, now)
		}
		if resp, _, err := c.submitWith(later, 2); err != nil || resp.Code != mimi.SubmitAccepted {
			t.Errorf("%s, a message with the next key: %+v, %v", c.uri, resp, err)
		}
	}
	alices.until(func() bool { return len(alice.texts) == 3 })
	bobs.until(func() bool { return len(bob.texts) == 3 })
	if want := "012"; alice.texts[0]+alice.texts[1]+alice.texts[2] != want || bob.texts[0]+bob.texts[1]+bob.texts[2] != want {
		t.Errorf("alice reads %q, bob %q", alice.texts, bob.texts)
	}
}

// The message of a mark that is applied and not yet on disk may leave before one with an earlier key: then the mark must
// be on disk.
func TestANotedMarkIsOnDisk(t *testing.T) {
	fs := vfs.NewCrashableMem()
	n := newNodeOn(t, "alpha", func(o store.Options) (*store.Pebble, error) { return store.OpenFS(fs, "/store", o) })
	client, group := mimi.URI("mimi://alpha.example/d/x"), sha256.Sum256([]byte("group"))
	for i, same := range []bool{true, false} {
		high := &mark{client, group, sentRecord{epoch: 7, generation: uint32(9 * (i + 1)), hash: make([]byte, 32)}}
		var b store.Batch
		unlock, err := n.raise(&b, high)
		if err != nil {
			t.Fatal(err)
		}
		wait, err := n.store.Apply(&b)
		unlock()
		if err != nil {
			t.Fatal(err)
		}
		next := &mark{client, group, sentRecord{epoch: 7, generation: 3}}
		if same {
			next = high
		}
		if err := n.note(next); same && err != nil || !same && !errors.Is(err, errKeyUsed) {
			t.Fatal(err)
		}
		db, err := store.OpenFS(fs.CrashClone(vfs.CrashCloneCfg{}), "/store", store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		got := new(sentRecord)
		v, err := db.Get(sentKey(client, group))
		if err != nil || codec.Unmarshal(v, got) != nil || got.generation != high.generation {
			t.Errorf("the disk has %x, %v", v, err)
		}
		if err := errors.Join(wait(), db.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
