//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/parley-mls/parley/examples/internal/org"
	"github.com/parley-mls/parley/node"
)

var names = []string{"alpha", "beta", "gamma"}

// A world is the three organisations: their nodes and their clients' hosts, each a process in its organisation's
// namespace, and everything that is known of them.
type world struct {
	o      options
	dir    string
	rand   *rand.Rand // of the acts
	net    *network
	orgs   []*org.Org
	hosts  []*hostProcess
	clocks []*clock // nil without stepped clocks
	next   int      // which node is restarted next
	guests []string // users
	tell   func(format string, args ...any)

	mu      sync.Mutex
	record  *record                    // guarded by mu
	reached map[place]uint64           // guarded by mu: the last entry that a client is known to have
	newest  map[string]uint64          // guarded by mu: the last entry that was acknowledged, by room
	status  map[place]view             // guarded by mu: of the last "status"
	stamps  map[string]time.Duration   // guarded by mu: by how much the newest stamp of a hub differs from our clock
	counts  map[string]int             // guarded by mu: facts by what they are
	heals   map[string][]time.Duration // guarded by mu: by what healed
	broken  []string                   // guarded by mu: what should never be said by a host
}

// hostProcess is a host seen from here.
type hostProcess struct {
	world *world
	name  string
	dir   string
	site  *site
	log   string
	life  int
	seed  uint64

	cmd   *exec.Cmd
	in    io.WriteCloser
	ended chan struct{}

	mu      sync.Mutex
	next    int               // guarded by mu
	waiting map[int]chan fact // guarded by mu; nil when the process has ended
}

func newWorld(ctx context.Context, o options, tell func(string, ...any)) (_ *world, err error) {
	w := &world{
		o: o, rand: rand.New(rand.NewPCG(o.seed, 0)), tell: tell, record: newRecord(), reached: make(map[place]uint64),
		newest: make(map[string]uint64), status: make(map[place]view), stamps: make(map[string]time.Duration),
		counts: make(map[string]int), heals: make(map[string][]time.Duration),
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.dir = o.dir; w.dir == "" {
		if w.dir, err = os.MkdirTemp("", "parley-simnet-"); err != nil {
			return nil, err
		}
	} else if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return nil, err
	}
	if w.net, err = newNetwork(names, o.seed); err != nil {
		return nil, err
	}
	for i, name := range names {
		s, dir := w.net.sites[i], filepath.Join(w.dir, name)
		w.orgs = append(w.orgs, &org.Org{
			Domain: name + ".example", Dir: dir, Address: s.outer, Listen: s.inner, Gossip: "lan", Program: o.node, Spawn: s.spawn,
		})
		h := &hostProcess{world: w, name: name, dir: filepath.Join(dir, "devices"), site: s, log: filepath.Join(dir, "host.log"), seed: o.seed + uint64(i)}
		if err := os.MkdirAll(h.dir, 0o700); err != nil {
			return nil, err
		}
		w.hosts = append(w.hosts, h)
	}
	if o.stepped {
		if err := w.stepClocks(); err != nil {
			return nil, err
		}
	}
	return w, w.found(ctx)
}

// limits of the nodes: above what three clients at one address ask for.
const limits = "limits: {anonymous_per_second: 1000, requests_per_second: 10000, claims_per_target: 10000}\n"

// level is how much nodes and clients log.
func (o options) level() string {
	if o.verbose {
		return "debug"
	}
	return "info"
}

// found starts everything: nodes that approve each other, devices, rooms with everybody in them.
func (w *world) found(ctx context.Context) error {
	var g errgroup.Group
	for i := range w.orgs {
		g.Go(func() error {
			if err := w.orgs[i].Init(limits + "log: {level: " + w.o.level() + "}\n"); err != nil {
				return err
			}
			return errors.Join(w.orgs[i].Start(ctx), w.hosts[i].start(ctx))
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, a := range w.orgs {
		for _, b := range w.orgs {
			if a != b {
				if err := a.Approve(ctx, b, b.Fingerprint, b.Address); err != nil {
					return fmt.Errorf("%s approves %s: %w", a.Domain, b.Domain, err)
				}
			}
		}
	}
	var users, first []string
	for i, o := range w.orgs {
		if err := o.WaitPeers(ctx, len(w.orgs)-1, 30*time.Second); err != nil {
			return err
		}
		people := []string{"guest"}
		for n := range w.o.clients / len(w.orgs) {
			people = append(people, "user"+strconv.Itoa(n+1))
		}
		for n, user := range people {
			inv, err := o.Invite(ctx, user)
			if err != nil {
				return err
			}
			inv.Address = w.net.sites[i].inner
			f, err := w.hosts[i].call(ctx, order{Do: "enrol", Invitation: inv.String(), Device: user + "-" + names[i]})
			if err != nil {
				return fmt.Errorf("enrol %s at %s: %w", user, o.Domain, err)
			}
			if n == 0 {
				w.guests = append(w.guests, string(inv.User))
				continue
			}
			if users = append(users, string(inv.User)); n == 1 {
				first = append(first, f.Client)
			}
		}
	}
	for i := range w.hosts {
		g.Go(func() error {
			creator := users[i*w.o.clients/len(w.orgs)]
			var others []string
			for _, u := range users {
				if u != creator {
					others = append(others, u)
				}
			}
			for n := i; n < w.o.rooms; n += len(w.hosts) {
				if _, err := w.hosts[i].call(ctx, order{Do: "room", Client: first[i], Name: fmt.Sprintf("room %d", n), Users: others}); err != nil {
					return fmt.Errorf("room %d: %w", n, err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if slow := w.settle(ctx, time.Minute); slow != nil {
		return fmt.Errorf("the rooms: %s", slow[0])
	}
	return nil
}

// close ends all processes and the network, and removes what was temporary.
func (w *world) close() {
	for _, h := range w.hosts {
		h.kill()
	}
	for _, o := range w.orgs {
		o.Terminate()
	}
	if w.net != nil {
		w.net.close()
	}
	for _, c := range w.clocks {
		c.close()
	}
	if w.o.dir == "" && w.dir != "" {
		os.RemoveAll(w.dir)
	}
}

// start starts the process and waits until its clients are open.
func (h *hostProcess) start(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	log, err := os.OpenFile(h.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(self, "host", h.dir, strconv.Itoa(h.life), strconv.Itoa(h.world.o.rooms+10), h.world.o.level())
	h.life++
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err == nil {
		h.in, err = cmd.StdinPipe()
	}
	if err == nil {
		err = h.site.spawn(cmd)
	}
	if err != nil {
		return fmt.Errorf("start the clients of %s: %w", h.name, err)
	}
	h.mu.Lock()
	h.waiting = map[int]chan fact{0: make(chan fact, 1)}
	up := h.waiting[0]
	h.mu.Unlock()
	h.cmd, h.ended = cmd, make(chan struct{})
	go h.read(out, cmd, h.ended)
	select {
	case <-up:
		return nil
	case <-h.ended:
		return fmt.Errorf("the clients of %s ended at their start; see %s", h.name, h.log)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read takes facts until the process has ended, and everything that it said before.
func (h *hostProcess) read(out io.Reader, cmd *exec.Cmd, ended chan struct{}) {
	defer close(ended)
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 256<<20)
	for lines.Scan() {
		var f fact
		if json.Unmarshal(lines.Bytes(), &f) != nil {
			continue // cut off by its end
		}
		if f.Is == "done" || f.Is == "up" {
			h.mu.Lock()
			ch := h.waiting[f.ID]
			delete(h.waiting, f.ID)
			h.mu.Unlock()
			if ch != nil {
				ch <- f
			}
			continue
		}
		h.world.take(f)
	}
	cmd.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting = nil
}

// call gives an order and returns when it is done.
func (h *hostProcess) call(ctx context.Context, o order) (fact, error) {
	h.mu.Lock()
	if h.waiting == nil {
		h.mu.Unlock()
		return fact{}, fmt.Errorf("the clients of %s are down", h.name)
	}
	h.next++
	o.ID = h.next
	done := make(chan fact, 1)
	h.waiting[o.ID] = done
	b, err := json.Marshal(o)
	if err == nil {
		_, err = h.in.Write(append(b, '\n'))
	}
	h.mu.Unlock()
	if err != nil {
		return fact{}, err
	}
	select {
	case f := <-done:
		if f.Err != "" {
			return f, errors.New(f.Err)
		}
		return f, nil
	case <-h.ended:
		return fact{}, fmt.Errorf("the clients of %s have ended", h.name)
	case <-ctx.Done():
		return fact{}, ctx.Err()
	}
}

// kill ends the process with SIGKILL.
func (h *hostProcess) kill() {
	if h.cmd == nil {
		return
	}
	h.cmd.Process.Kill()
	<-h.ended
	h.cmd = nil
}

// talk has the host's clients talk.
func (h *hostProcess) talk(ctx context.Context) error {
	h.seed += uint64(len(names))
	n := float64(h.world.o.clients)
	_, err := h.call(ctx, order{Do: "talk", Guests: h.world.guests, Seed: h.seed, Rate: h.world.o.rate / n, Commits: h.world.o.commits / n})
	return err
}

// take notes a fact.
func (w *world) take(f fact) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts[f.Is]++
	p, n := place{f.Client, f.Room}, name{f.Client, f.Room, f.Number}
	if f.Is == "joined" {
		w.record.joined[p] = len(w.record.told[p])
	}
	switch f.Is {
	case "sending":
		w.record.sending[n] = true
	case "acked":
		w.record.acked[n] = f.Seq
		delete(w.record.queued, n)
		w.newest[f.Room] = max(w.newest[f.Room], f.Seq)
	case "queued":
		w.record.queued[n] = true
	case "changed":
		w.record.commits[p] = append(w.record.commits[p], f.Epoch)
	case "at":
		w.reach(p, f.Seq)
	case "told":
		w.record.told[p] = append(w.record.told[p], *f.Message)
		w.reach(p, f.Message.Seq)
		if hub := roomHost(f.Room); f.Message.Seq >= w.newest[f.Room] {
			w.stamps[hub] = time.Until(time.UnixMilli(f.Time))
		}
	case "commit":
		w.record.applied[p] = append(w.record.applied[p], *f.Commit)
		w.reach(p, f.Commit.Seq)
	case "discarded":
		w.reach(p, f.Seq)
		w.tell("         %s discards entry %d of %s: %s", f.Client, f.Seq, f.Room, f.Err)
	case "accused":
		w.record.accused = append(w.record.accused, fmt.Sprintf("%s, of the hub of %s: entry %d: %s", f.Client, f.Room, f.Seq, f.Err))
		w.tell("         %s accuses the hub of %s: entry %d: %s", f.Client, f.Room, f.Seq, f.Err)
	case "refused", "frozen", "ended":
		w.broken = append(w.broken, fmt.Sprintf("%s %s %s: %s", f.Is, f.Client, f.Room, f.Err))
		w.tell("         %s: %s %s: %s", f.Is, f.Client, f.Room, f.Err)
	case "status":
		w.status[p] = *f.View
	case "view":
		w.record.views[p] = *f.View
	}
}

// reach notes how far a client is in a room. mu is held.
func (w *world) reach(p place, seq uint64) {
	if !isGuest(p.Client) {
		w.reached[p] = max(w.reached[p], seq)
	}
}

// behind says which place hasn't everything that was acknowledged in the rooms of want, "" if none.
func (w *world) behind(want map[string]uint64) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for p, seq := range w.reached {
		if seq < want[p.Room] {
			return fmt.Sprintf("%s has entry %d of %s, %d is acknowledged", p.Client, seq, p.Room, want[p.Room])
		}
	}
	return ""
}

// heal waits until every client has everything that was acknowledged until now, and notes how long it took since began.
func (w *world) heal(ctx context.Context, what string, began time.Time) {
	w.mu.Lock()
	want := make(map[string]uint64)
	for room, seq := range w.newest {
		want[room] = seq
	}
	w.mu.Unlock()
	deadline := time.Now().Add(w.o.patience)
	for {
		slow := w.behind(want)
		took := time.Since(began)
		if slow == "" {
			w.mu.Lock()
			w.heals[what] = append(w.heals[what], took)
			w.mu.Unlock()
			w.tell("all have everything %.2f s after", took.Seconds())
			return
		}
		if ctx.Err() != nil {
			return // settle sees to the rest
		}
		if time.Now().After(deadline) {
			w.tell("not everybody has everything after %v: %s", w.o.patience, slow)
			w.mu.Lock()
			w.record.late = append(w.record.late, what+": "+slow)
			w.mu.Unlock()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// settle waits until nothing waits any more and all clients are equally far, and returns who isn't by then.
func (w *world) settle(ctx context.Context, patience time.Duration) []string {
	deadline := time.Now().Add(patience)
	var calm time.Time // since when
	for {
		w.mu.Lock()
		clear(w.status)
		w.mu.Unlock()
		var slow []string
		for _, h := range w.hosts {
			if _, err := h.call(ctx, order{Do: "status"}); err != nil {
				slow = append(slow, err.Error())
			}
		}
		slow = append(slow, w.unsettled()...)
		switch now := time.Now(); {
		case len(slow) > 0:
			calm = time.Time{}
		case calm.IsZero():
			calm = now
		case now.Sub(calm) > 500*time.Millisecond:
			return nil
		}
		if len(slow) > 0 && (time.Now().After(deadline) || ctx.Err() != nil) {
			return slow
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (w *world) unsettled() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var slow []string
	most := make(map[string]view)
	members := 0
	for p, v := range w.status {
		if isGuest(p.Client) {
			continue
		}
		if members++; v.Seq >= most[p.Room].Seq {
			most[p.Room] = v
		}
	}
	if n := w.o.rooms * w.o.clients; members != n {
		slow = append(slow, fmt.Sprintf("%d clients are in rooms, want %d", members, n))
	}
	for room, m := range most {
		for _, guest := range m.Guests {
			if !w.status[place{guest, room}].Member {
				slow = append(slow, fmt.Sprintf("%s isn't in %s yet", guest, room))
			}
		}
	}
	for p, v := range w.status {
		m := most[p.Room]
		if isGuest(p.Client) {
			if v.Member != slices.Contains(m.Guests, p.Client) {
				slow = append(slow, fmt.Sprintf("%s is a member of %s: %v", p.Client, p.Room, v.Member))
			}
			if !v.Member {
				continue
			}
		}
		switch {
		case v.Outbox > 0:
			slow = append(slow, fmt.Sprintf("%s has %d messages for %s in its outbox", p.Client, v.Outbox, p.Room))
		case v.Seq != m.Seq || m.Seq < w.newest[p.Room]:
			slow = append(slow, fmt.Sprintf("%s has entry %d of %s, not %d", p.Client, v.Seq, p.Room, max(m.Seq, w.newest[p.Room])))
		case v.Epoch != m.Epoch:
			slow = append(slow, fmt.Sprintf("%s is in epoch %d of %s, not %d", p.Client, v.Epoch, p.Room, m.Epoch))
		}
	}
	return slow
}

// judge reads every client's view and checks the record.
func (w *world) judge(ctx context.Context) ([]fault, error) {
	for _, h := range w.hosts {
		if _, err := h.call(ctx, order{Do: "view"}); err != nil {
			return nil, fmt.Errorf("read the clients of %s: %w", h.name, err)
		}
	}
	var accused []string
	for _, o := range w.orgs {
		list, err := node.DialAdmin(o.Socket()).Evidence(ctx)
		if err != nil {
			return nil, fmt.Errorf("ask %s for evidence: %w", o.Domain, err)
		}
		for _, e := range list {
			accused = append(accused, fmt.Sprintf("%s has evidence %.12s against the hub of %s", o.Domain, e.ID, e.Room))
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.record.evidence = accused
	return check(w.record), nil
}
