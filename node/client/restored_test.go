package client

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// used collects the keys that a device's messages were encrypted with.
type used struct {
	t    *testing.T
	mu   sync.Mutex
	sent map[string]string // message by epoch and generation
}

func (u *used) pair(epoch uint64, generation uint32) string {
	return fmt.Sprint(epoch, "/", generation)
}

// watch notes what a device submits.
func (u *used) watch(c *Client) {
	f := inject(c)
	f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
		var m mimi.SubmitMessageRequest
		if err := codec.Unmarshal(req.Msg.Body, &m); err != nil || req.Msg.Generation == nil {
			u.t.Errorf("submitted without its generation: %v", err)
			return f.ClientServiceClient.SubmitMessage(ctx, req)
		}
		u.mu.Lock()
		pair := u.pair(m.Message.Private.Epoch, *req.Msg.Generation)
		if before, ok := u.sent[pair]; ok && before != string(req.Msg.Body) {
			u.t.Errorf("the key of %s is used for two messages", pair)
		}
		u.sent[pair] = string(req.Msg.Body)
		u.mu.Unlock()
		return f.ClientServiceClient.SubmitMessage(ctx, req)
	}
}

// reopen opens a device again, and has its messages watched.
func (u *used) reopen(d *device) {
	d.t.Helper()
	c, err := Open(d.t.Context(), d.o)
	if err != nil {
		d.t.Fatal(err)
	}
	u.watch(c)
	d.run(c)
}

// backup returns a copy of the directory of a device, which is stopped for it.
func (d *device) backup() string {
	d.t.Helper()
	d.stop()
	copied := d.t.TempDir() + "/copy"
	if err := os.CopyFS(copied, os.DirFS(d.o.Dir)); err != nil {
		d.t.Fatal(err)
	}
	return copied
}

// restore puts a copy in the place of the directory of a device, which is stopped for it.
func (d *device) restore(copied string) {
	d.t.Helper()
	d.stop()
	if err := os.RemoveAll(d.o.Dir); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Rename(copied, d.o.Dir); err != nil {
		d.t.Fatal(err)
	}
}

func TestRestoredCopyUsesNoKeyTwice(t *testing.T) {
	p := providers(t, "alpha", "beta")
	for i, where := range []string{"at the hub", "at a follower"} {
		t.Run(where, func(t *testing.T) {
			other := p[1-i].enrol(fmt.Sprint("alice", i), fmt.Sprintf("alice-%d", i))
			d := p[i].enrol(fmt.Sprint("bob", i), fmt.Sprintf("bob-%d", i))
			creator, added := other, d
			if i == 0 {
				creator, added = d, other
			}
			uri := creator.create(added.User()).URI()
			agree(t, uri, other, d)
			u := &used{t: t, sent: make(map[string]string)}
			copied := d.backup()
			u.reopen(d)
			d.say(uri, "one")
			d.say(uri, "two")
			name := d.ID().ID()
			want := []string{name + ": one", name + ": two"}
			sees(t, uri, want, other)
			d.restore(copied)
			c, err := Open(t.Context(), d.o)
			if err != nil {
				t.Fatal(err)
			}
			u.watch(c)
			d.Client = c
			r, err := c.Room(uri)
			if err != nil {
				t.Fatal(err)
			}
			epoch, leaf := r.Epoch(), r.group.OwnLeaf()
			if u.sent[u.pair(epoch, r.group.Generation())] == "" {
				t.Fatal("the copy wouldn't use a key twice anyway")
			}
			events := other.Events()
			d.run(c)
			d.say(uri, "three")
			sees(t, uri, append(want, name+": three"), other)
			agree(t, uri, other, d)
			var removed, joined uint64
			for removed == 0 || joined == 0 {
				switch e := (<-events).(type) {
				case MemberRemoved:
					removed = e.Epoch
				case MemberAdded:
					joined = e.Epoch
				}
			}
			if removed != joined || joined <= epoch {
				t.Errorf("the old leaf %d went in epoch %d, the new one came in %d", leaf, removed, joined)
			}
			if n := len(u.sent); n != 3 {
				t.Errorf("%d keys for three messages", n)
			}
			d.stop()
			u.reopen(d)
			d.say(uri, "four")
			sees(t, uri, append(want, name+": three", name+": four"), other)
		})
	}
}

// The original has replaced its keys since: the copy finds a commit of its own in the log that it doesn't know.
func TestRestoredCopyOfAnEarlierEpochEntersAnew(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	u := &used{t: t, sent: make(map[string]string)}
	copied := bob.backup()
	u.reopen(bob)
	if err := bob.room(uri).UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	bob.say(uri, "one")
	bob.restore(copied)
	u.reopen(bob)
	within(t, func() error {
		r, err := bob.Room(uri)
		if err != nil || r.Epoch() < 3 {
			return fmt.Errorf("not back: %v, %v", r.Frozen(), err)
		}
		return r.Frozen()
	})
	bob.say(uri, "two")
	sees(t, uri, []string{"bob-phone: one", "bob-phone: two"}, alice)
	agree(t, uri, alice, bob)
}

// A state that is as far as the node knows goes on as it is, and so does one of which the node knows nothing.
func TestStateThatIsNoCopyGoesOn(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	for i := range 3 {
		alice.say(room.URI(), fmt.Sprint(i))
		alice.restart()
		if r := alice.room(room.URI()); r.fresh {
			t.Error("nobody asked, and the state is taken for the last one")
		}
	}
	if got := alice.room(room.URI()).Epoch(); got != 1 {
		t.Errorf("epoch %d after one commit", got)
	}
	sees(t, room.URI(), []string{"alice-laptop: 0", "alice-laptop: 1", "alice-laptop: 2"}, alice, bob)
}
