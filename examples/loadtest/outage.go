package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

const (
	outageRate     = 60 // messages per second, of one sender per organisation together
	outageClients  = 3  // per organisation
	outagePatience = time.Minute
)

// outage kills the node of each organisation in turn, for as long as messages are sent in the other workloads, while
// clients go on sending to a room on alpha. They are devices as people have them, with package client and a store on disk
// each: a message is given to Send once, at its time, whatever is up. Everything is judged by what each of them then has.
func outage(ctx context.Context, o options, r *report) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return err
	}
	defer n.close()
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	var people []*person
	defer func() {
		stop()
		running.Wait()
		for _, p := range people {
			p.Close()
		}
	}()
	for i := range outageClients * len(n.orgs) {
		name := fmt.Sprintf("person-%d", i)
		inv, err := n.orgs[i/outageClients].Invite(ctx, name)
		if err != nil {
			return err
		}
		c, err := client.Enrol(ctx, client.Options{Dir: filepath.Join(n.dir, "devices", name)}, inv, name)
		if err != nil {
			return err
		}
		p := &person{Client: c, at: make(map[int]time.Time)}
		people = append(people, p)
		events := c.Events()
		running.Go(func() { c.Run(ctx) })
		running.Go(func() { p.listen(ctx, events) })
	}
	room, err := people[0].CreateRoom(ctx, "outage")
	if err != nil {
		return err
	}
	var users []mimi.URI
	for _, p := range people[1:] {
		users = append(users, p.User())
	}
	if err := room.Add(ctx, users...); err != nil {
		return err
	}
	for _, p := range people {
		if err := p.enter(ctx, room.URI()); err != nil {
			return err
		}
	}
	sent := 0
	for i, killed := range n.orgs {
		scale := killed.Domain
		fmt.Fprintf(o.verbose, "outage: %s for %v\n", scale, o.seconds)
		first := sent
		var started time.Time
		before, after := 0, 0 // how many messages were sent when the node was killed, and when it was started
		s := sender{people: people, next: sent}
		talking, hush := context.WithCancel(ctx)
		g, gctx := errgroup.WithContext(talking)
		g.Go(func() error { return s.talk(gctx) })
		g.Go(func() error {
			defer hush()
			pause(gctx, o.seconds/5)
			before = s.count()
			if err := killed.Kill(); err != nil {
				return err
			}
			pause(gctx, o.seconds)
			after, started = s.count(), time.Now()
			if err := killed.Start(ctx); err != nil {
				return err
			}
			pause(gctx, o.seconds/5)
			return nil
		})
		err := g.Wait()
		hush()
		if err := errors.Join(err, s.wait(ctx)); err != nil {
			return fmt.Errorf("%s: %w", scale, err)
		}
		sent = s.count()
		for _, p := range people {
			p.await(ctx, sent)
		}
		var own, all time.Duration // until the killed node's clients, and everybody, had what was sent before its start
		wrong, lost := 0, 0
		for j, p := range people {
			a, l, w := p.judge(first, sent, after, s.acked)
			if lost, wrong = lost+l, wrong+w; j/outageClients == i {
				own = max(own, a.Sub(started))
			}
			all = max(all, a.Sub(started))
		}
		r.add("outage", scale, "messages sent", float64(sent-first), "")
		r.add("outage", scale, "of these while it was down", float64(after-before), "")
		r.add("outage", scale, "lost, of all deliveries", float64(lost), "")
		r.add("outage", scale, "lost order or came twice", float64(wrong), "")
		r.add("outage", scale, "its clients have everything after", own.Seconds(), "s")
		r.add("outage", scale, "all clients have everything after", all.Seconds(), "s")
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// person is a device and when it was told what.
type person struct {
	*client.Client
	room *client.Room

	mu    sync.Mutex
	at    map[int]time.Time // guarded by mu: of the message with that number
	twice int               // guarded by mu
}

func (p *person) listen(ctx context.Context, events <-chan client.Event) {
	for {
		select {
		case e := <-events:
			if m, ok := e.(client.Message); ok {
				p.mu.Lock()
				k := numberOf(m)
				if _, ok := p.at[k]; ok {
					p.twice++
				}
				p.at[k] = time.Now()
				p.mu.Unlock()
			}
		case <-ctx.Done():
			return
		}
	}
}

// numberOf is the number with which a message begins.
func numberOf(m client.Message) int {
	digits, _, _ := strings.Cut(string(m.Data), " ")
	n, err := strconv.Atoi(digits)
	if err != nil {
		return -1
	}
	return n
}

// enter waits until the device is in the room.
func (p *person) enter(ctx context.Context, room mimi.URI) error {
	ctx, cancel := context.WithTimeout(ctx, outagePatience)
	defer cancel()
	for {
		var err error
		if p.room, err = p.Room(room); err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", p.ID(), err)
		}
		pause(ctx, 10*time.Millisecond)
	}
}

// await waits until the device has been told so many messages, and not longer than patience lasts.
func (p *person) await(ctx context.Context, messages int) {
	ctx, cancel := context.WithTimeout(ctx, outagePatience)
	defer cancel()
	for ctx.Err() == nil {
		p.mu.Lock()
		n := len(p.at)
		p.mu.Unlock()
		if n >= messages {
			return
		}
		pause(ctx, 5*time.Millisecond)
	}
}

// judge compares what the device has of the messages from first to end with what the senders were answered, and returns
// when it was told the last of those before the number sent.
func (p *person) judge(first, end, sent int, acked map[int]uint64) (last time.Time, lost, wrong int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wrong, p.twice = p.twice, 0
	for k := first; k < sent; k++ {
		if at := p.at[k]; at.After(last) {
			last = at
		}
	}
	has := make(map[int]bool)
	var seq uint64
	for _, m := range p.room.Messages() {
		k := numberOf(m)
		if k < first || k >= end {
			continue
		}
		if has[k] || m.Seq <= seq || m.Seq != acked[k] {
			wrong++
		}
		has[k], seq = true, m.Seq
	}
	return last, end - first - len(has), wrong
}

// sender gives messages to one device of each organisation by turns, at their time.
type sender struct {
	people  []*person
	sending errgroup.Group

	mu    sync.Mutex
	next  int            // guarded by mu: number of the next message
	acked map[int]uint64 // guarded by mu: numbers in the log
}

func (s *sender) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next
}

// talk sends until ctx ends.
func (s *sender) talk(ctx context.Context) error {
	s.acked = make(map[int]uint64)
	tick := time.NewTicker(time.Second / outageRate)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		s.mu.Lock()
		k := s.next
		s.next++
		s.mu.Unlock()
		p := s.people[k%3*outageClients]
		s.sending.Go(func() error {
			text := make([]byte, messageBytes)
			copy(text, fmt.Sprintf("%d ", k))
			seq, err := p.room.Send(context.WithoutCancel(ctx), text)
			if err != nil {
				return fmt.Errorf("message %d: %w", k, err)
			}
			s.mu.Lock()
			s.acked[k] = seq
			s.mu.Unlock()
			return nil
		})
	}
}

// wait returns when every message is acknowledged.
func (s *sender) wait(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- s.sending.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(outagePatience):
		return fmt.Errorf("%d of %d messages are acknowledged after %v", len(s.acked), s.next, outagePatience)
	case <-ctx.Done():
		return ctx.Err()
	}
}
