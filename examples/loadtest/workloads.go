package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/api"
)

// messageBytes is the application data of a message.
const messageBytes = 1024

// workloads in their order. Each starts nodes of its own, so that none sees what another left.
var workloads = []struct {
	name string
	run  func(context.Context, options, *report) error
}{
	{"latency", each(latency)},
	{"saturation", each(saturation)},
	{"rooms", rooms},
	{"scale", scale},
	{"claims", claims},
	{"outage", outage},
	{"away", away},
	{"limits", rawLimits},
}

// each runs a workload once for every number of clients per organisation.
func each(run func(context.Context, options, *report, int) error) func(context.Context, options, *report) error {
	return func(ctx context.Context, o options, r *report) error {
		for _, u := range o.perOrg {
			if err := run(ctx, o, r, u); err != nil {
				return err
			}
		}
		return nil
	}
}

// room is a room with its members; those of alpha come first, and the first of them has created it.
type room struct {
	uri     mimi.URI
	members []*device
	perOrg  int
}

// ofOrg returns the i-th member of an organisation, 0 to 2.
func (r *room) ofOrg(org, i int) *device { return r.members[org*r.perOrg+i] }

func (r *room) close() {
	for _, d := range r.members {
		d.close()
	}
}

// newRoom makes a room with perOrg members of each organisation.
func (n *network) newRoom(ctx context.Context, name string, perOrg int) (*room, error) {
	members, err := n.devices(ctx, name, perOrg)
	if err != nil {
		return nil, err
	}
	r := &room{members: members, perOrg: perOrg}
	if r.uri, err = members[0].createRoom(ctx, name, members[1:]); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// latency sends at a fixed rate from beta and measures from the time at which a message was due to its receipt by the
// clients of alpha and gamma. Three clients of each organisation decrypt, the others only receive.
func latency(ctx context.Context, o options, r *report, u int) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return err
	}
	defer n.close()
	fmt.Fprintf(o.verbose, "latency: a room of %d\n", 3*u)
	rm, err := n.newRoom(ctx, "latency", u)
	if err != nil {
		return err
	}
	defer rm.close()

	total := max(1, int(o.seconds.Seconds()*float64(o.rate)))
	sender := rm.ofOrg(1, 0)
	g, gctx := errgroup.WithContext(ctx)
	var received sync.WaitGroup
	times := make([][]time.Time, len(rm.members)) // of the receipt, by member and message
	var first atomic.Uint64                       // number of the first message in the log
	for i, d := range rm.members {
		times[i] = make([]time.Time, total)
		decrypts := i%u < 3
		joins := decrypts && i != 0
		left := total
		received.Add(1)
		wait, err := d.follow(gctx, joins, func(e *api.LogEntry) error {
			if left == 0 || e.Room != string(rm.uri) {
				return nil
			}
			if decrypts && d != sender {
				if _, err := d.open(e.Fanout); err != nil {
					return err
				}
			}
			at := time.Now()
			first.CompareAndSwap(0, e.Seq)
			k := e.Seq - first.Load()
			if k >= uint64(total) || !times[i][k].IsZero() {
				return fmt.Errorf("entry %d is out of place", e.Seq)
			}
			times[i][k] = at
			if left--; left == 0 {
				received.Done()
			}
			return nil
		})
		if err != nil {
			return err
		}
		g.Go(wait)
	}
	before, err := n.used()
	if err != nil {
		return err
	}
	due := make([]time.Time, total)
	began := time.Now().Add(10 * time.Millisecond)
	for k := range total {
		due[k] = began.Add(time.Duration(k) * time.Second / time.Duration(o.rate))
		time.Sleep(time.Until(due[k]))
		req, err := sender.seal(rm.uri, make([]byte, messageBytes))
		if err != nil {
			return err
		}
		if _, err := sender.submit(gctx, req); err != nil {
			return errors.Join(err, context.Cause(gctx))
		}
	}
	if err := waitAll(gctx, &received); err != nil {
		stop()
		return errors.Join(err, g.Wait())
	}
	took := time.Since(began)
	after, err := n.used()
	if err != nil {
		return err
	}
	stop()
	if err := g.Wait(); err != nil {
		return err
	}
	var opened, all []time.Duration
	for i := range rm.members {
		if i/u == 1 {
			continue // of the sender's organisation
		}
		for k, at := range times[i] {
			all = append(all, at.Sub(due[k]))
			if i%u < 3 {
				opened = append(opened, at.Sub(due[k]))
			}
		}
	}
	scale := fmt.Sprintf("U=%d", u)
	r.percentiles("latency", scale, "decrypted", opened)
	r.percentiles("latency", scale, "received", all)
	r.add("latency", scale, "deliveries/s", float64(total*len(rm.members))/took.Seconds(), "/s")
	usage(r, "latency", scale, before, after, total*len(rm.members))
	return nil
}

func usage(r *report, workload, scale string, before, after used, deliveries int) {
	r.add(workload, scale, "CPU of the nodes per 1,000 deliveries", (after.cpu-before.cpu).Seconds()/float64(deliveries)*1000, "s")
	r.memory(workload, scale, after)
}

func waitAll(ctx context.Context, wg *sync.WaitGroup) error {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tracker counts who has what of a room's log. A message is done when its sender has the answer and every member has
// the message; then its sender may send another one.
type tracker struct {
	first   uint64 // number of the first message
	need    int32
	have    []atomic.Int32
	owner   []atomic.Int32 // the sender of each
	done    atomic.Int64
	all     chan struct{}   // closed when all are done
	senders []chan struct{} // what each may still send
}

func newTracker(first uint64, messages, members, senders, window int) *tracker {
	t := &tracker{
		first: first, need: int32(members) + 1, have: make([]atomic.Int32, messages), owner: make([]atomic.Int32, messages),
		all: make(chan struct{}),
	}
	for range senders {
		w := make(chan struct{}, window)
		for range window {
			w <- struct{}{}
		}
		t.senders = append(t.senders, w)
	}
	return t
}

func (t *tracker) answered(seq uint64, sender int) error {
	if seq-t.first >= uint64(len(t.have)) {
		return fmt.Errorf("a message gets the number %d", seq)
	}
	t.owner[seq-t.first].Store(int32(sender))
	t.count(seq)
	return nil
}

func (t *tracker) count(seq uint64) {
	k := seq - t.first
	if t.have[k].Add(1) != t.need {
		return
	}
	t.senders[t.owner[k].Load()] <- struct{}{}
	if t.done.Add(1) == int64(len(t.have)) {
		close(t.all)
	}
}

// received counts an entry that a member has got; next is the one that it must be.
func (t *tracker) received(seq uint64, next *uint64) error {
	if seq != *next || seq-t.first >= uint64(len(t.have)) {
		return fmt.Errorf("entry %d where %d is due", seq, *next)
	}
	*next++
	t.count(seq)
	return nil
}

// load is a room in which senders send what was sealed before.
type load struct {
	room    *room
	senders []*device
	sealed  [][]*api.MimiRequest // by sender
	tracker *tracker
}

// firstMessage is the number of a room's first message: its log begins with the commit that adds the members.
const firstMessage = 2

// prepare has the room's members follow it and seals total messages, spread over the senders.
func (rm *room) prepare(ctx context.Context, g *errgroup.Group, senders []*device, total, window int) (*load, error) {
	l := &load{room: rm, senders: senders, sealed: make([][]*api.MimiRequest, len(senders))}
	l.tracker = newTracker(firstMessage, total, len(rm.members), len(senders), window)
	joins := make(map[*device]bool)
	for _, d := range senders {
		joins[d] = d != rm.members[0]
	}
	for _, d := range rm.members {
		next := uint64(firstMessage)
		wait, err := d.follow(ctx, joins[d], func(e *api.LogEntry) error { return l.tracker.received(e.Seq, &next) })
		if err != nil {
			return nil, err
		}
		g.Go(wait)
	}
	data := make([]byte, messageBytes)
	for k := range total {
		i := k % len(senders)
		binary.BigEndian.PutUint64(data, uint64(k))
		req, err := senders[i].seal(rm.uri, data)
		if err != nil {
			return nil, err
		}
		l.sealed[i] = append(l.sealed[i], req)
	}
	return l, nil
}

// run sends everything; it returns when every member has it all.
func (l *load) run(ctx context.Context, g *errgroup.Group) error {
	for i, d := range l.senders {
		var next atomic.Int64
		for range min(cap(l.tracker.senders[i]), len(l.sealed[i])) {
			g.Go(func() error {
				for {
					k := next.Add(1) - 1
					if k >= int64(len(l.sealed[i])) {
						return nil
					}
					select {
					case <-l.tracker.senders[i]:
					case <-ctx.Done():
						return nil
					}
					seq, err := d.submit(ctx, l.sealed[i][k])
					if err != nil {
						return fmt.Errorf("%s: %w", d.uri, err)
					}
					if err := l.tracker.answered(seq, i); err != nil {
						return err
					}
				}
			})
		}
	}
	select {
	case <-l.tracker.all:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// saturation sends from one client of each organisation as fast as a window of outstanding messages lets them. The
// messages are sealed before, and nobody decrypts.
func saturation(ctx context.Context, o options, r *report, u int) error {
	// The number of messages is what the machine does in about o.seconds, by a short run before.
	least := min(1000, int(o.seconds.Seconds()*1000))
	rate, _, _, err := saturate(ctx, o, u, least)
	if err != nil {
		return err
	}
	total := max(least, int(rate*o.seconds.Seconds()))
	rate, before, after, err := saturate(ctx, o, u, total)
	if err != nil {
		return err
	}
	scale := fmt.Sprintf("U=%d", u)
	r.add("saturation", scale, "messages/s", rate, "/s")
	r.add("saturation", scale, "deliveries/s", rate*float64(3*u), "/s")
	usage(r, "saturation", scale, before, after, total*3*u)
	return nil
}

func saturate(ctx context.Context, o options, u, total int) (rate float64, before, after used, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return 0, before, after, err
	}
	defer n.close()
	rm, err := n.newRoom(ctx, "saturation", u)
	if err != nil {
		return 0, before, after, err
	}
	defer rm.close()
	g, gctx := errgroup.WithContext(ctx)
	l, err := rm.prepare(gctx, g, []*device{rm.ofOrg(0, 0), rm.ofOrg(1, 0), rm.ofOrg(2, 0)}, total, o.window)
	if err != nil {
		return 0, before, after, err
	}
	runtime.GC()
	fmt.Fprintf(o.verbose, "saturation: %d messages to %d clients\n", total, 3*u)
	return timed(gctx, n, g, stop, []*load{l}, total)
}

// timed runs loads at once and returns their messages per second.
func timed(ctx context.Context, n *network, g *errgroup.Group, stop context.CancelFunc, loads []*load, total int) (rate float64, before, after used, err error) {
	if before, err = n.used(); err != nil {
		return 0, before, after, err
	}
	began := time.Now()
	var running errgroup.Group
	for _, l := range loads {
		running.Go(func() error { return l.run(ctx, g) })
	}
	err = running.Wait()
	took := time.Since(began)
	if err == nil {
		after, err = n.used()
	}
	stop()
	return float64(total) / took.Seconds(), before, after, errors.Join(err, g.Wait())
}

// rooms has many rooms of nine clients, three of each organisation, with one sender each, by turns of each organisation.
func rooms(ctx context.Context, o options, r *report) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return err
	}
	defer n.close()
	g, gctx := errgroup.WithContext(ctx)
	perRoom := max(10, int(o.seconds.Seconds()*4000)/o.rooms)
	loads := make([]*load, o.rooms)
	for i := range loads {
		rm, err := n.newRoom(gctx, fmt.Sprintf("room-%d", i), 3)
		if err != nil {
			return err
		}
		defer rm.close()
		if loads[i], err = rm.prepare(gctx, g, []*device{rm.ofOrg(i%3, 0)}, perRoom, max(1, o.window/16)); err != nil {
			return err
		}
	}
	runtime.GC()
	total := perRoom * o.rooms
	fmt.Fprintf(o.verbose, "rooms: %d messages in %d rooms\n", total, o.rooms)
	rate, before, after, err := timed(gctx, n, g, stop, loads, total)
	if err != nil {
		return err
	}
	scale := fmt.Sprintf("%d rooms", o.rooms)
	r.add("rooms", scale, "messages/s", rate, "/s")
	r.add("rooms", scale, "deliveries/s", rate*9, "/s")
	usage(r, "rooms", scale, before, after, total*9)
	return nil
}

// claims claims KeyPackages of one client of alpha, by a client of alpha and by one of beta, whose node asks the hub.
// Each must be handed out once.
func claims(ctx context.Context, o options, r *report) error {
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return err
	}
	defer n.close()
	rm, err := n.newRoom(ctx, "claims", 1)
	if err != nil {
		return err
	}
	defer rm.close()
	const perTarget, atOnce = 100, 16
	for _, w := range []struct {
		scale string
		by    int
	}{{"local", 0}, {"through a hub", 1}} {
		targets := make([]*device, (o.claims+perTarget-1)/perTarget)
		for i := range targets {
			if targets[i], err = enrol(ctx, n.orgs[w.by*2], fmt.Sprintf("target-%d-%d", w.by, i), newTrust(o.tcp)); err != nil {
				return err
			}
			defer targets[i].close()
			list, err := targets[i].keyPackages(perTarget - 1)
			if err != nil {
				return err
			}
			if err := targets[i].publish(ctx, list); err != nil {
				return err
			}
		}
		var mu sync.Mutex
		seen := make(map[string]bool) // guarded by mu
		by := rm.ofOrg(w.by, 0)
		before, err := n.used()
		if err != nil {
			return err
		}
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(atOnce)
		began := time.Now()
		for i := range o.claims {
			g.Go(func() error {
				res, err := by.claim(gctx, rm.uri, targets[i%len(targets)].user)
				if err != nil {
					return err
				}
				if res.Code != mimi.KeyMaterialSuccess || len(res.Clients) != 1 {
					return fmt.Errorf("claim %d: %v", i, res.Code)
				}
				ref := string(res.Clients[0].KeyPackage.Ref())
				mu.Lock()
				defer mu.Unlock()
				if seen[ref] {
					return fmt.Errorf("a KeyPackage of %s was handed out twice", targets[i%len(targets)].user)
				}
				seen[ref] = true
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		took := time.Since(began)
		after, err := n.used()
		if err != nil {
			return err
		}
		r.add("claims", w.scale, "claims/s", float64(o.claims)/took.Seconds(), "/s")
		r.add("claims", w.scale, "CPU of the nodes per 1,000 claims", (after.cpu-before.cpu).Seconds()/float64(o.claims)*1000, "s")
	}
	return nil
}
