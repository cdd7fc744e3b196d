package client

import (
	"bytes"
	"context"
	"errors"
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
		f.set(func(f *faults) {
			if !f.asked {
				u.t.Error("submitted before the node was asked")
			}
		})
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
			if d.room(uri).Epoch() == epoch {
				// What it had said came from the log before the node's answer, and its ratchet has gone on with it.
				t.Log("entering anew wasn't needed")
			} else {
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

// queueSealed reopens a device that can't reach the hub, and has it encrypt a message, which stays in its outbox. It
// returns what would be submitted, and a function that brings the hub into reach; then gets the answers.
func (d *device) queueSealed(uri mimi.URI, text string) (sealed []byte, reachable func(then func(*connect.Request[api.MimiRequest], error))) {
	d.t.Helper()
	d.stop()
	c, err := Open(d.t.Context(), d.o)
	if err != nil {
		d.t.Fatal(err)
	}
	first := make(chan []byte, 1)
	f := inject(c)
	f.submit = func(_ context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
		select {
		case first <- req.Msg.Body:
		default:
		}
		return nil, errUnreachable
	}
	d.run(c)
	r := d.room(uri)
	ctx, cancel := context.WithCancel(d.t.Context())
	sent := make(chan error, 1)
	go func() {
		_, err := r.Send(ctx, []byte(text))
		sent <- err
	}()
	sealed = <-first
	cancel()
	if err := <-sent; !errors.Is(err, ErrQueued) {
		d.t.Fatal(err)
	}
	return sealed, func(then func(*connect.Request[api.MimiRequest], error)) {
		f.set(func(f *faults) {
			f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
				res, err := f.ClientServiceClient.SubmitMessage(ctx, req)
				then(req, err)
				return res, err
			}
		})
	}
}

// A copy with a ciphertext in its outbox that the original has sent.
func TestOutboxOfARestoredCopyIsSentOnce(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	for i, more := range []bool{false, true} {
		u := &used{t: t, sent: make(map[string]string)}
		d := []*device{alice, bob}[i] // at the hub and at a follower
		before := d.texts(uri)
		name := d.ID().ID()
		d.queueSealed(uri, "queued")
		copied := d.backup()
		u.reopen(d)
		want := append(before, name+": queued")
		sees(t, uri, want, alice, bob)
		if more {
			d.say(uri, "more")
			want = append(want, name+": more")
		}
		d.restore(copied)
		u.reopen(d)
		d.say(uri, "last")
		sees(t, uri, append(want, name+": last"), alice, bob)
		agree(t, uri, alice, bob)
		if r := d.room(uri); len(r.Outbox()) > 0 {
			t.Errorf("still queued: %q", r.Outbox())
		}
	}
}

// Copies of one state that have encrypted different messages with the same key.
func TestDivergedCopiesUseNoKeyTwice(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	for i, others := range [][]string{{"y"}, {"y", "z"}} {
		d, other := alice, bob
		if i == 1 {
			d, other = bob, alice
		}
		want := other.texts(uri)
		name := d.ID().ID()
		old := d.backup()
		x, _ := d.queueSealed(uri, "x")
		diverged := d.backup()
		d.restore(old)
		u := &used{t: t, sent: make(map[string]string)}
		u.reopen(d)
		for _, text := range others {
			d.say(uri, text)
			want = append(want, name+": "+text)
		}
		d.restore(diverged)
		u.reopen(d)
		sees(t, uri, append(want, name+": x"), other)
		agree(t, uri, alice, bob)
		within(t, func() error { // its own message comes back too, sooner or later
			if texts := d.texts(uri); len(texts) == 0 || texts[len(texts)-1] != name+": x" {
				return fmt.Errorf("%s reads %q", d.ID(), texts)
			}
			return nil
		})
		for pair, body := range u.sent {
			if body == string(x) {
				t.Errorf("the ciphertext with the key of %s was sent", pair)
			}
		}
		if n := len(u.sent); n != len(others)+1 {
			t.Errorf("%d keys for %d messages", n, len(others)+1)
		}
	}
}

// Neither of two processes could know of the other when it asked.
func TestTwoProcessesOfOneCopyUseNoKeyTwice(t *testing.T) {
	p := providers(t, "alpha", "beta")
	for i, others := range [][]string{{"y"}, {"y", "z"}} {
		alice := p[0].enrol(fmt.Sprint("alice", i), fmt.Sprint("alice-", i))
		bob := p[1].enrol(fmt.Sprint("bob", i), fmt.Sprint("bob-", i))
		uri := alice.create(bob.User()).URI()
		agree(t, uri, alice, bob)
		twin := &device{t: t, o: bob.o}
		twin.o.Dir = bob.backup()
		t.Cleanup(twin.stop)
		x, reachable := twin.queueSealed(uri, "x")
		bob.restart()
		var want []string
		for _, text := range others {
			bob.say(uri, text)
			want = append(want, bob.ID().ID()+": "+text)
		}
		events, refused := alice.Events(), make(chan error, 1)
		reachable(func(req *connect.Request[api.MimiRequest], err error) {
			if bytes.Equal(req.Msg.Body, x) {
				select {
				case refused <- err:
				default:
					t.Error("submitted again")
				}
			}
		})
		if err := <-refused; Code(err) != codeKeyUsed {
			t.Errorf("another message with a used key: %v", err)
		}
		sees(t, uri, append(want, bob.ID().ID()+": x"), alice)
		agree(t, uri, alice, twin)
		for read := false; !read; {
			switch e := (<-events).(type) {
			case Message:
				read = string(e.Data) == "x"
			case Discarded:
				t.Errorf("discarded: %s", e.Reason)
			}
		}
		twin.stop()
	}
}

// A message that is handed over out of band uses its key as one that is sent.
func TestSealedMessagesAreNoted(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	copied := bob.backup()
	u := &used{t: t, sent: make(map[string]string)}
	u.reopen(bob)
	sealed, err := bob.room(uri).SealMessage([]byte("sealed"))
	if err != nil {
		t.Fatal(err)
	}
	bob.restore(copied)
	u.reopen(bob)
	epoch := bob.room(uri).Epoch()
	if _, err := bob.room(uri).SealMessage([]byte("again")); !errors.Is(err, ErrRestored) {
		t.Errorf("sealed with a used key: %v", err)
	}
	handed, err := Readdress(sealed, alice.User())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := alice.SubmitRaw(t.Context(), uri, handed); err != nil {
		t.Fatal(err)
	}
	within(t, func() error { return bob.room(uri).Frozen() })
	bob.say(uri, "sent")
	if now := bob.room(uri).Epoch(); now <= epoch {
		t.Errorf("sent in epoch %d", now)
	}
	within(t, func() error {
		if got := alice.texts(uri); len(got) == 0 || got[len(got)-1] != "bob-phone: sent" {
			return fmt.Errorf("alice reads %q", got)
		}
		return nil
	})
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
