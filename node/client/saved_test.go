package client

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/api/apiconnect"
	"github.com/parley-mls/parley/node/store"
)

// update writes the saved devices anew. Those that a release has written stay as they are: a new format gets a new folder,
// and this test goes on reading the old ones.
var update = flag.Bool("update", false, "write the saved devices of the present formats anew")

const savedDevices = "testdata/devices-v1"

// writeSavedDevices saves the directories of three devices whose stores have an entry of every kind: alice-laptop and
// bob-phone in a room, one with a message in its outbox and the other with keys of messages that never came, and
// bob-tablet, which has made an external commit.
func writeSavedDevices(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	uri := room.URI()
	agree(t, uri, alice, bob)
	alice.say(uri, "one")
	bob.say(uri, "two")
	if err := room.UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	late, err := room.SealMessage([]byte("late"))
	if err != nil {
		t.Fatal(err)
	}
	alice.say(uri, "three")
	sees(t, uri, []string{"alice-laptop: one", "bob-phone: two", "alice-laptop: three"}, alice, bob)
	tablet := p[0].enrol("bob", "bob-tablet")
	tablet.stop() // Run would send it
	c, err := Open(t.Context(), tablet.o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.prepareJoin(t.Context(), uri, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	alice.queueSealed(uri, "four")
	if err := os.RemoveAll(savedDevices); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*device{alice, bob, tablet} {
		if err := os.CopyFS(filepath.Join(savedDevices, d.ID().ID()), os.DirFS(d.backup())); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now().UTC().Format(time.RFC3339)
	for name, b := range map[string][]byte{"late": late, "time": []byte(now + "\n")} {
		if err := os.WriteFile(filepath.Join(savedDevices, name), b, 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// stub is a node that accepts everything.
type stub struct {
	apiconnect.ClientServiceClient
	submitted, updated chan []byte
	seq                uint64 // of what is accepted
}

func (*stub) LastSent(context.Context, *connect.Request[api.LastSentRequest]) (*connect.Response[api.LastSentResponse], error) {
	return connect.NewResponse(new(api.LastSentResponse)), nil
}

func (*stub) NoteSent(context.Context, *connect.Request[api.NoteSentRequest]) (*connect.Response[api.NoteSentResponse], error) {
	return connect.NewResponse(new(api.NoteSentResponse)), nil
}

func (s *stub) SubmitMessage(_ context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	s.submitted <- req.Msg.Body
	return connect.NewResponse(&api.MimiResponse{Seq: s.seq, Body: codec.Marshal(&mimi.SubmitMessageResponse{Code: mimi.SubmitAccepted})}), nil
}

func (s *stub) Update(_ context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	s.updated <- req.Msg.Body
	return connect.NewResponse(&api.MimiResponse{Seq: s.seq, Body: codec.Marshal(&mimi.UpdateRoomResponse{Code: mimi.UpdateSuccess})}), nil
}

// openSaved opens a copy of a saved device at the time when it was saved, with a node that isn't there.
func openSaved(t *testing.T, name string) (*Client, *stub) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(savedDevices, "time"))
	if err != nil {
		t.Fatal(err)
	}
	now, err := time.Parse(time.RFC3339, string(bytes.TrimSpace(b)))
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Dir: filepath.Join(t.TempDir(), name), Time: func() time.Time { return now }, Log: testLog(t, name)}
	if err := os.CopyFS(o.Dir, os.DirFS(filepath.Join(savedDevices, name))); err != nil {
		t.Fatal(err)
	}
	c, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.workers.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &stub{submitted: make(chan []byte, 1), updated: make(chan []byte, 1)}
	c.session.service, c.session.token, c.session.expires = s, "token", now.Add(time.Hour)
	close(c.live)
	return c, s
}

// TestDevicesOfReleasesGoOn opens devices as releases have left them: nothing that they need was lost.
func TestDevicesOfReleasesGoOn(t *testing.T) {
	if *update {
		writeSavedDevices(t)
	}
	alice, hub := openSaved(t, "alice-laptop")
	bob, _ := openSaved(t, "bob-phone")
	tablet, join := openSaved(t, "bob-tablet")
	all := []*Client{alice, bob}
	uri := alice.Rooms()[0].URI()
	room := func(c *Client) *Room {
		r, err := c.Room(uri)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	var want []string
	check := func(when string) {
		t.Helper()
		for _, c := range all {
			var texts []string
			for _, m := range room(c).Messages() {
				texts = append(texts, string(m.Data))
			}
			texts = texts[max(0, len(texts)-len(want)):]
			if r := room(c); !slices.Equal(texts, want) || r.Frozen() != nil || clients(r) != len(all) ||
				!bytes.Equal(r.EpochAuthenticator(), room(alice).EpochAuthenticator()) {
				t.Fatalf("%s: %s reads %q, %d members, epoch %d, %v", when, c.ID(), texts, clients(r), r.Epoch(), r.Frozen())
			}
		}
	}
	order := func(m *mls.MLSMessage) {
		t.Helper()
		for _, c := range all {
			var w waits
			r := room(c)
			if _, err := r.receive(&w, &api.LogEntry{Seq: r.Seq() + 1, Fanout: codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: m})}); err != nil {
				t.Fatal(err)
			}
			if err := w.wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
	message := func(submit []byte) *mls.MLSMessage {
		t.Helper()
		var req mimi.SubmitMessageRequest
		if err := codec.Unmarshal(submit, &req); err != nil {
			t.Fatal(err)
		}
		return req.Message
	}
	say := func(c *Client, text string) {
		t.Helper()
		sealed, err := room(c).SealMessage([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		order(message(sealed))
		want = append(want, text)
		check(text)
	}

	want = []string{"one", "two", "three"}
	check("as they were")
	if got := room(alice).Outbox(); len(got) != 1 || string(got[0]) != "four" {
		t.Fatalf("the outbox has %q", got)
	}
	late, err := os.ReadFile(filepath.Join(savedDevices, "late"))
	if err != nil {
		t.Fatal(err)
	}
	order(message(late))
	want = append(want, "late")
	check("a message that was under way")

	r := room(alice)
	for range 2 { // the first time for the node to be asked
		step, _ := r.next()
		if err := step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	alice.workers.Wait()
	order(message(<-hub.submitted))
	want = append(want, "four")
	check("a message in the outbox")
	if got := r.Outbox(); len(got) != 0 {
		t.Errorf("the outbox has %q", got)
	}
	say(bob, "five")

	// The external commit that waits.
	join.seq = room(alice).Seq() + 1
	if err := tablet.resumeJoins(t.Context()); err != nil {
		t.Fatal(err)
	}
	tablet.workers.Wait()
	var u mimi.UpdateRequest
	if err := codec.Unmarshal(<-join.updated, &u); err != nil {
		t.Fatal(err)
	}
	order(u.Bundle.Message)
	all, want = append(all, tablet), nil
	check("the third device")
	say(tablet, "six")
	say(alice, "seven")

	for _, c := range all {
		b, err := room(c).StageUpdate(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := codec.Unmarshal(b, &u); err != nil {
			t.Fatal(err)
		}
		epoch := room(c).Epoch()
		order(u.Bundle.Message)
		if got := room(c).Epoch(); got != epoch+1 {
			t.Errorf("epoch %d after a commit in %d", got, epoch)
		}
		say(c, fmt.Sprint("of ", c.ID()))
	}
	for _, c := range all {
		n := 0
		if err := c.db.Scan([]byte(prefixKeyPackage), []byte(prefixKeyPackage+"\xff"), func(_, value []byte) bool {
			kp := new(ownKeyPackage)
			if err := codec.Unmarshal(value, kp); err != nil {
				t.Error(err)
			}
			n++
			return true
		}); err != nil || n == 0 {
			t.Errorf("%s has %d key packages, %v", c.ID(), n, err)
		}
	}
}

// writeFirstFormat makes the directory of a device with a room whose state package mls has written before it sealed any:
// that which mls keeps as its test data. Only what the room's state needs is real.
func writeFirstFormat(t *testing.T, o Options, uri mimi.URI) {
	t.Helper()
	read := func(name string) map[string][]byte {
		b, err := os.ReadFile(filepath.Join("../../mls/testdata/state-v1", name+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		all := make(map[string][]byte)
		for line := range strings.Lines(string(b)) {
			var k, v []byte
			if _, err := fmt.Sscanf(line, "%x %x", &k, &v); err != nil {
				t.Fatal(err)
			}
			all[string(k)] = v
		}
		return all
	}
	signer := ed25519.NewKeyFromSeed(read("more")["seed bob"])
	key, err := authority.MarshalPrivateKey(signer)
	if err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(filepath.Join(o.Dir, storeDir), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := profile{Format: profileFormat, Domain: "a.example", Address: "127.0.0.1:1", User: "mimi://a.example/u/alice",
		Client: "mimi://a.example/d/a", Suite: defaultSuite, Key: key, Chain: [][]byte{{0}}}
	if err := p.save(db); err != nil {
		t.Fatal(err)
	}
	r := &Room{uri: uri}
	changes := map[string][]byte{string(r.key(roomHeader)): codec.Marshal(header{})}
	for k, v := range read("bob") {
		changes[string(r.key(roomGroup, []byte(k)...))] = v
	}
	if _, err := db.Commit(changes, nil); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestRoomsOfTheFirstFormatAreSealedOnOpening(t *testing.T) {
	d := &device{t: t, o: Options{Dir: filepath.Join(t.TempDir(), "alice")}}
	uri := mimi.URI("mimi://a.example/r/x")
	writeFirstFormat(t, d.o, uri)
	files := func() (all [][]byte) {
		err := filepath.WalkDir(d.o.Dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			all = append(all, b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	before := files()
	c, err := Open(t.Context(), d.o)
	if err != nil {
		t.Fatal(err)
	}
	w := &witness{t: t, secrets: make(map[string]string), keys: make(map[string][]byte)}
	w.follow(c) // says what isn't sealed
	epoch := c.Rooms()[0].Epoch()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	were := w.found(before, nil)
	for _, what := range []string{"secret of an epoch", "private key of a node", "secret of the secret tree", "ratchet secret"} {
		if were[what] == 0 {
			t.Errorf("no %s was there before: %v", what, were)
		}
	}
	if n := w.found(files(), nil); len(n) > 0 {
		t.Errorf("in the clear on disk: %v", n)
	}
	if c, err = Open(t.Context(), d.o); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.Rooms()[0].Epoch(); got != epoch {
		t.Errorf("epoch %d, %d before", got, epoch)
	}
}
