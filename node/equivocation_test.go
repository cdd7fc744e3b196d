package node

import (
	"context"
	"crypto/rand"
	"path/filepath"
	"testing"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/client"
)

// person is a user's device with the SDK.
type person struct {
	*client.Client
	t    *testing.T
	room *client.Room
	told <-chan client.Event
}

func newPerson(t *testing.T, n *testNode, name string) *person {
	t.Helper()
	user := must(mimi.UserURI(n.cfg.Domain, name))(t)
	inv := must(authority.DialAdmin(n.cfg.Socket()).Invite(t.Context(), user, time.Hour))(t)
	dir := filepath.Join(t.TempDir(), name)
	c := must(client.Enrol(t.Context(), client.Options{Dir: dir, KeyPackages: 2}, inv, name+"-laptop"))(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-ended
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return &person{Client: c, t: t, told: c.Events()}
}

// enters waits until the device is in a room.
func (p *person) enters(room mimi.URI) {
	p.t.Helper()
	eventually(p.t, func() (err error) {
		p.room, err = p.Room(room)
		return err
	})
}

// tells waits for the next event about the hub.
func (p *person) tells() client.Event { return p.until(0) }

// reads waits until a message of that number was read, or couldn't be, and fails the test if something is told of the hub
// before that.
func (p *person) reads(seq uint64) {
	p.t.Helper()
	if v := p.until(seq); v != nil {
		p.t.Fatalf("%s tells %+v", p.ID(), v)
	}
}

func (p *person) until(seq uint64) client.Event {
	p.t.Helper()
	for {
		read := uint64(0)
		select {
		case e := <-p.told:
			switch e := e.(type) {
			case client.HubFault, client.HubRestored:
				return e
			case client.Discarded:
				read = e.Seq
			case client.Message:
				read = e.Seq
			}
		case <-time.After(10 * time.Second):
			p.t.Fatalf("%s: nothing comes, at %d of %d", p.ID(), p.room.Seq(), seq)
		}
		if seq > 0 && read >= seq {
			return nil
		}
	}
}

// TestAHubThatShowsEachFollowerItsOwnHistoryIsFoundByTheirClients has a hub tell beta and gamma different histories, each
// signed and without a fault of its own, so that neither follower sees one. The messages of their clients are in both.
func TestAHubThatShowsEachFollowerItsOwnHistoryIsFoundByTheirClients(t *testing.T) {
	alpha, beta, gamma := newNode(t, "alpha"), newNode(t, "beta"), newNode(t, "gamma")
	federate(t, alpha, beta, gamma)
	alice, bob, carol := newPerson(t, alpha, "alice"), newPerson(t, beta, "bob"), newPerson(t, gamma, "carol")
	alice.room = must(alice.CreateRoom(t.Context(), "lunch"))(t)
	room := alice.room.URI()
	if err := alice.room.Add(t.Context(), bob.User(), carol.User()); err != nil {
		t.Fatal(err)
	}
	bob.enters(room)
	carol.enters(room)
	last := must(alice.room.Send(t.Context(), []byte("the last that all agree on")))(t)
	for _, p := range []*person{bob, carol} {
		p.reads(last)
	}

	lies := map[*person]*liar{
		bob:   {t: t, alpha: alpha, beta: beta, room: room, incarnation: alpha.incarnation, last: last},
		carol: {t: t, alpha: alpha, beta: gamma, room: room, incarnation: alpha.incarnation, last: last, texts: 1000},
	}
	next, ends := last, map[*person]chain.Hash{bob: lies[bob].chainAt(last).chain, carol: lies[carol].chainAt(last).chain}
	tell := func(fanout func(l *liar) []byte) {
		t.Helper()
		next++
		for p, l := range lies {
			msgs, end := l.tell(next, ends[p], fanout(l))
			l.notified(msgs, end)
			ends[p] = end
		}
	}
	message := func(from *person) {
		t.Helper()
		var req mimi.SubmitMessageRequest
		if err := codec.Unmarshal(must(from.room.SealMessage([]byte("hello")))(t), &req); err != nil {
			t.Fatal(err)
		}
		b := codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: req.Message})
		tell(func(*liar) []byte { return b })
	}
	found := func(by, from *person, first, second uint64) {
		t.Helper()
		f, ok := by.tells().(client.HubFault)
		if !ok || f.Room != room || f.Client != from.ID() || by.room.HubFault() != f.Reason {
			t.Fatalf("%s tells %+v", by.ID(), f)
		}
		e := must(chain.ParseFile(f.Evidence))(t)
		b := must(e.Verify())(t)
		if b.Fingerprints()[0] != alpha.root || e.First.Seq != first || e.Second.Seq != second {
			t.Errorf("%s: evidence of %d and %d, root %s", by.ID(), e.First.Seq, e.Second.Seq, b.Fingerprints()[0])
		}
		if list := must(by.Evidence())(t); len(list) != 1 || string(list[0].File) != string(f.Evidence) {
			t.Errorf("%s keeps %+v", by.ID(), list)
		}
	}
	tell((*liar).invent)
	for _, p := range []*person{bob, carol} {
		p.reads(next)
	}
	message(carol)
	found(bob, carol, last+1, last+2)
	carol.reads(next)
	message(bob)
	found(carol, bob, last+2, last+3)
	for _, n := range []*testNode{beta, gamma} {
		if list := must(n.listEvidence())(t); len(list) != 0 {
			t.Errorf("%s, which saw one history, has evidence %+v", n.cfg.Domain, list)
		}
	}
}

// TestClientsOfAFollowerAreToldOfARestoredHub: a new incarnation, first with the log as it was, then with another one.
func TestClientsOfAFollowerAreToldOfARestoredHub(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, bob := newPerson(t, alpha, "alice"), newPerson(t, beta, "bob")
	alice.room = must(alice.CreateRoom(t.Context(), "lunch"))(t)
	if err := alice.room.Add(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	bob.enters(alice.room.URI())
	last := must(alice.room.Send(t.Context(), []byte("x")))(t)
	bob.reads(last)
	l := &liar{t: t, alpha: alpha, beta: beta, room: alice.room.URI(), incarnation: alpha.incarnation + 1, last: last}
	l.notified(l.tell(last+1, l.chainAt(last).chain, l.invent()))
	if v := bob.tells(); v != (client.HubRestored{Room: l.room, Seq: last + 1}) {
		t.Errorf("told %+v", v)
	}
	l.incarnation++
	var other chain.Hash
	rand.Read(other[:])
	l.notified(l.tell(last+2, other, l.invent()))
	if v := bob.tells(); v != (client.HubRestored{Room: l.room, Seq: last + 2, Lost: true}) {
		t.Errorf("told %+v", v)
	}
	if f := bob.room.HubFault(); f != "" {
		t.Errorf("accused: %s", f)
	}
}
