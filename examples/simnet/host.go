//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

// The clients of an organisation are in one process, a host, so that they can be killed. It takes orders on its standard
// input and states facts on its standard output, a JSON object a line each. A fact is stated after what it states.

// An order is what a host is to do. It is answered by a fact "done" with its ID.
type order struct {
	ID int    `json:"id"`
	Do string `json:"do"`

	Invitation string `json:"invitation,omitempty"` // enrol: with it
	Device     string `json:"device,omitempty"`     // enrol: its name

	Client  string   `json:"client,omitempty"` // room: who makes it
	Name    string   `json:"name,omitempty"`   // room
	Users   []string `json:"users,omitempty"`  // room: whom to add
	Seed    uint64   `json:"seed,omitempty"`   // talk
	Rate    float64  `json:"rate,omitempty"`   // talk: messages per second of each client
	Commits float64  `json:"commits,omitempty"`
	Guests  []string `json:"guests,omitempty"` // talk: users who are added to rooms and removed
}

// A fact is something that happened to a client.
type fact struct {
	Is     string `json:"is"`
	ID     int    `json:"id,omitempty"`
	Err    string `json:"err,omitempty"`
	Client string `json:"client,omitempty"`
	Room   string `json:"room,omitempty"`
	Seq    uint64 `json:"seq,omitempty"`
	Number uint64 `json:"number,omitempty"`
	Epoch  uint64 `json:"epoch,omitempty"`
	Time   int64  `json:"time,omitempty"` // told: the hub's stamp, ms since 1970

	Message *message `json:"message,omitempty"`
	Commit  *commit  `json:"commit,omitempty"`
	View    *view    `json:"view,omitempty"`
}

const (
	sendPatience   = 3 * time.Second // after which a message is left to the outbox
	commitPatience = 10 * time.Second
	lifeNumbers    = 1_000_000 // messages of one process's life, and more
)

// host is the process of an organisation's clients.
type host struct {
	dir  string
	life uint64 // how often the process was started before
	keep int    // KeyPackages of a client
	log  *slog.Logger

	outMu sync.Mutex
	out   *json.Encoder // guarded by outMu

	ctx     context.Context
	running sync.WaitGroup // clients' Run and the readers of their events

	mu      sync.Mutex
	clients []*client.Client       // guarded by mu
	spots   map[*client.Room]*spot // guarded by mu
	hush    context.CancelFunc     // guarded by mu: ends the talk
	talkers *sync.WaitGroup        // guarded by mu
}

// spot is where a client stands in a room.
type spot struct {
	sync.Mutex // held while the client sends in the room
	number     uint64
}

// hosted says whether the program's arguments are those of a host's process, and is that process then.
func hosted(args []string) (code int, ok bool) {
	if len(args) != 6 || args[1] != "host" {
		return 0, false
	}
	life, err1 := strconv.ParseUint(args[3], 10, 32)
	keep, err2 := strconv.Atoi(args[4])
	var level slog.Level
	if err := errors.Join(err1, err2, level.UnmarshalText([]byte(args[5]))); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2, true
	}
	ctx, stop := context.WithCancel(context.Background())
	h := &host{
		dir: args[2], life: life, keep: keep, log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), out: json.NewEncoder(os.Stdout),
		ctx: ctx, spots: make(map[*client.Room]*spot), hush: func() {}, talkers: new(sync.WaitGroup),
	}
	err := h.run(os.Stdin)
	stop()
	h.running.Wait()
	for _, c := range h.clients {
		err = errors.Join(err, c.Close())
	}
	if err != nil {
		h.log.Error("host", "err", err)
		return 1, true
	}
	return 0, true
}

func (h *host) state(f fact) {
	h.outMu.Lock()
	defer h.outMu.Unlock()
	if err := h.out.Encode(f); err != nil {
		os.Exit(1) // nobody listens any more
	}
}

// run opens the devices that are there and does what is ordered until the input ends.
func (h *host) run(in io.Reader) error {
	names, err := os.ReadDir(h.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		c, err := client.Open(h.ctx, h.options(n.Name()))
		if err != nil {
			return fmt.Errorf("open %s: %w", n.Name(), err)
		}
		h.start(c)
	}
	h.state(fact{Is: "up"})
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var o order
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			return fmt.Errorf("order %q: %w", lines.Bytes(), err)
		}
		go func() {
			f := fact{Is: "done", ID: o.ID}
			if err := h.obey(o, &f); err != nil {
				f.Err = err.Error()
			}
			h.state(f)
		}()
	}
	return lines.Err()
}

func (h *host) options(device string) client.Options {
	return client.Options{Dir: filepath.Join(h.dir, device), Log: h.log.With("device", device), KeyPackages: h.keep}
}

// start runs a client, and states how far it is and what it is told from there.
func (h *host) start(c *client.Client) {
	events := c.Events()
	for _, r := range c.Rooms() {
		h.state(fact{Is: "at", Client: string(c.ID()), Room: string(r.URI()), Seq: r.Seq()})
	}
	h.running.Go(func() { h.listen(string(c.ID()), events) })
	h.running.Go(func() {
		if err := c.Run(h.ctx); err != nil && h.ctx.Err() == nil {
			h.state(fact{Is: "ended", Client: string(c.ID()), Err: err.Error()})
		}
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clients = append(h.clients, c)
}

func (h *host) listen(id string, events <-chan client.Event) {
	for {
		var e client.Event
		var ok bool
		select {
		case e, ok = <-events:
		case <-h.ctx.Done():
			return
		}
		if !ok {
			h.state(fact{Is: "ended", Client: id, Err: "its events ended"})
			return
		}
		switch e := e.(type) {
		case client.Message:
			m := messageOf(e)
			h.state(fact{Is: "told", Client: id, Room: string(e.Room), Message: &m, Time: e.Time.UnixMilli()})
		case client.Committed:
			h.state(fact{Is: "commit", Client: id, Room: string(e.Room), Commit: &commit{
				Seq: e.Seq, Epoch: e.Epoch, By: string(e.Client), Authenticator: e.Authenticator,
			}})
		case client.Discarded:
			h.state(fact{Is: "discarded", Client: id, Room: string(e.Room), Seq: e.Seq, Err: e.Reason})
		case client.Frozen:
			h.state(fact{Is: "frozen", Client: id, Room: string(e.Room), Seq: e.Seq, Err: e.Err.Error()})
		case client.Joined:
			h.state(fact{Is: "joined", Client: id, Room: string(e.Room)})
		case client.HubFault:
			h.state(fact{Is: "accused", Client: id, Room: string(e.Room), Seq: e.Seq, Err: e.Reason})
		case client.HubRestored:
			h.state(fact{Is: "accused", Client: id, Room: string(e.Room), Seq: e.Seq, Err: "an older copy of the store"})
		}
	}
}

// messageOf is a message as the checker knows it. A text that isn't one of ours has number 0, which nobody sends.
func messageOf(m client.Message) message {
	digits, _, _ := strings.Cut(string(m.Data), " ")
	n, _ := strconv.ParseUint(digits, 10, 64)
	return message{Seq: m.Seq, Client: string(m.Client), Number: n}
}

func (h *host) obey(o order, f *fact) error {
	switch o.Do {
	case "enrol":
		inv, err := authority.ParseInvitation(o.Invitation)
		if err != nil {
			return err
		}
		c, err := client.Enrol(h.ctx, h.options(o.Device), inv, o.Device)
		if err != nil {
			return err
		}
		h.start(c)
		f.Client = string(c.ID())
		return nil
	case "room":
		c, err := h.client(o.Client)
		if err != nil {
			return err
		}
		r, err := c.CreateRoom(h.ctx, o.Name)
		if err != nil {
			return err
		}
		f.Room = string(r.URI())
		var users []mimi.URI
		for _, u := range o.Users {
			users = append(users, mimi.URI(u))
		}
		return r.Add(h.ctx, users...)
	case "talk":
		h.talk(o)
		return nil
	case "hush":
		h.mu.Lock()
		hush, talkers := h.hush, h.talkers
		h.mu.Unlock()
		hush()
		talkers.Wait()
		return nil
	case "status", "view":
		for _, c := range h.all() {
			for _, r := range c.Rooms() {
				v := viewOf(r, o.Do == "view")
				h.state(fact{Is: o.Do, Client: string(c.ID()), Room: string(r.URI()), View: &v})
			}
		}
		return nil
	}
	return fmt.Errorf("an order to %q", o.Do)
}

func (h *host) all() []*client.Client {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]*client.Client(nil), h.clients...)
}

func (h *host) client(id string) (*client.Client, error) {
	for _, c := range h.all() {
		if string(c.ID()) == id {
			return c, nil
		}
	}
	return nil, fmt.Errorf("no client %s here", id)
}

func viewOf(r *client.Room, messages bool) view {
	v := view{Seq: r.Seq(), Epoch: r.Epoch(), Authenticator: r.EpochAuthenticator(), Outbox: len(r.Outbox())}
	if err := r.Frozen(); err != nil {
		v.Frozen = err.Error()
	}
	v.Member = r.Active()
	for _, p := range r.Participants() {
		for _, m := range p.Clients {
			if isGuest(string(m.Client)) {
				v.Guests = append(v.Guests, string(m.Client))
			}
		}
	}
	if messages {
		for _, m := range r.Messages() {
			v.Messages = append(v.Messages, messageOf(m))
		}
	}
	return v
}

// talk has every client send messages and commits in rooms at random, until hush.
func (h *host) talk(o order) {
	ctx, hush := context.WithCancel(h.ctx)
	talkers := new(sync.WaitGroup)
	h.mu.Lock()
	h.hush, h.talkers = hush, talkers
	h.mu.Unlock()
	for i, c := range h.all() {
		if isGuest(string(c.ID())) {
			continue
		}
		rng := rand.New(rand.NewPCG(o.Seed, uint64(i)))
		pick := func() *client.Room {
			rooms := c.Rooms()
			if len(rooms) == 0 {
				return nil
			}
			return rooms[rng.IntN(len(rooms))]
		}
		talkers.Go(func() {
			send, change := ticks(o.Rate, rng), ticks(o.Commits, rng)
			for {
				select {
				case <-send():
					if r := pick(); r != nil {
						h.say(talkers, string(c.ID()), r)
					}
				case <-change():
					r := pick()
					if r == nil {
						continue
					}
					if made(c, r) && len(o.Guests) > 0 {
						guest := mimi.URI(o.Guests[rng.IntN(len(o.Guests))])
						talkers.Go(func() { h.invite(ctx, c, r, guest) })
					} else {
						talkers.Go(func() { h.change(ctx, string(c.ID()), r) })
					}
				case <-ctx.Done():
					return
				}
			}
		})
	}
}

// ticks returns a function that returns a channel, the same until it has ticked: rate times per second, at random.
func ticks(rate float64, rng *rand.Rand) func() <-chan time.Time {
	var due time.Time
	return func() <-chan time.Time {
		if rate <= 0 {
			return nil
		}
		if now := time.Now(); due.Before(now) {
			due = now.Add(time.Duration(rng.ExpFloat64() / rate * float64(time.Second)))
		}
		return time.After(time.Until(due))
	}
}

// say sends a message unless the last one in that room is still under way.
func (h *host) say(talkers *sync.WaitGroup, id string, r *client.Room) {
	h.mu.Lock()
	s := h.spots[r]
	if s == nil {
		s = &spot{number: h.life * lifeNumbers}
		h.spots[r] = s
	}
	h.mu.Unlock()
	if !s.TryLock() {
		return
	}
	s.number++
	f := fact{Client: id, Room: string(r.URI()), Number: s.number}
	f.Is = "sending"
	h.state(f)
	talkers.Go(func() {
		defer s.Unlock()
		ctx, cancel := context.WithTimeout(h.ctx, sendPatience)
		defer cancel()
		seq, err := r.Send(ctx, fmt.Appendf(nil, "%d %s", f.Number, filler))
		switch {
		case err == nil:
			f.Is, f.Seq = "acked", seq
		case errors.Is(err, client.ErrQueued):
			f.Is = "queued"
		default:
			f.Is, f.Err = "refused", err.Error()
		}
		h.state(f)
	})
}

// filler makes messages as long as those of people.
var filler = strings.Repeat("and so on ", 10)

// made says whether it was this client's user who made a room, and so may add and remove.
func made(c *client.Client, r *client.Room) bool {
	for _, p := range r.Participants() {
		if p.User == c.User() {
			return p.Role == mimi.RoleAdmin
		}
	}
	return false
}

// invite adds a guest to a room, or removes a guest who is there.
func (h *host) invite(ctx context.Context, c *client.Client, r *client.Room, guest mimi.URI) {
	ctx, cancel := context.WithTimeout(ctx, commitPatience)
	defer cancel()
	there := false
	for _, p := range r.Participants() {
		there = there || p.User == guest
	}
	f := fact{Is: "added", Client: string(c.ID()), Room: string(r.URI())}
	var err error
	if there {
		f.Is = "removed"
		err = r.Remove(ctx, guest)
	} else {
		err = r.Add(ctx, guest)
	}
	if err != nil {
		f.Is, f.Err = "unchanged", err.Error()
	}
	h.state(f)
}

// change replaces a client's keys in a room.
func (h *host) change(ctx context.Context, id string, r *client.Room) {
	ctx, cancel := context.WithTimeout(ctx, commitPatience)
	defer cancel()
	f := fact{Is: "changed", Client: id, Room: string(r.URI())}
	if err := r.UpdateKeys(ctx); err != nil {
		f.Is, f.Err = "unchanged", err.Error()
	}
	f.Epoch = r.Epoch()
	h.state(f)
}
