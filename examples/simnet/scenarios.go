//go:build linux

package main

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// A scenario does things to the world until ctx ends. What it breaks it repairs, or mend does.
type scenario struct {
	name string
	does string
	play func(ctx context.Context, w *world) error
}

var scenarios = []scenario{
	{"kill", "kill -9 of nodes and of clients, one or two at a time", again(kill, 500*time.Millisecond, 3*time.Second)},
	{"hang", "nodes stopped by SIGSTOP for a while", again(hang, 500*time.Millisecond, 3*time.Second)},
	{"partition", "the link of one organisation down for a while", again(partition, 500*time.Millisecond, 3*time.Second)},
	{"weather", "5 % of packets lost, 100 ms delay, reordering", playWeather},
	{"absent", "one organisation's node stopped from the beginning to the end", playAbsent},
	{"restart", "nodes restarted one after the other", again(restart, 200*time.Millisecond, time.Second)},
	{"mixed", "in bad weather: kills, stops, partitions and restarts", playMixed},
	{"clock", "nodes' clocks stepped, to and fro", again(step, 500*time.Millisecond, 2*time.Second)},
}

// again does an act again and again, with pauses from low to high.
func again(act func(context.Context, *world) error, low, high time.Duration) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		for wait(ctx, w.between(low, high)) {
			if err := act(ctx, w); err != nil {
				return err
			}
		}
		return nil
	}
}

var storm = weather{loss: 0.05, delay: 100 * time.Millisecond, reorder: 0.1, shuffle: 40 * time.Millisecond}

// between is a random time from low to high, shorter in short runs.
func (w *world) between(low, high time.Duration) time.Duration {
	d := low + time.Duration(w.rand.Int64N(int64(high-low)))
	return min(d, w.o.duration/4)
}

// wait waits, and says whether the scenario goes on.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// A victim is a process that can be killed.
type victim struct {
	what  string
	kill  func() error
	start func(ctx context.Context) error
}

func (w *world) victims() []victim {
	var all []victim
	for i, o := range w.orgs {
		h := w.hosts[i]
		all = append(all,
			victim{"the node of " + names[i], o.Kill, o.Start},
			victim{"the clients of " + names[i], func() error { h.kill(); return nil }, func(ctx context.Context) error {
				return errors.Join(h.start(ctx), h.talk(ctx))
			}})
	}
	return all
}

func (w *world) act(kind string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts[kind]++
}

func kill(ctx context.Context, w *world) error {
	all := w.victims()
	w.rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	chosen := all[:1+w.rand.IntN(2)]
	for _, v := range chosen {
		w.tell("kill -9 %s", v.what)
		if err := v.kill(); err != nil {
			return err
		}
		w.act("kill")
		wait(ctx, w.between(0, time.Second))
	}
	wait(ctx, w.between(0, 3*time.Second))
	var began time.Time
	for _, v := range chosen {
		began = time.Now()
		if err := v.start(context.WithoutCancel(ctx)); err != nil {
			return err
		}
		w.tell("start %s", v.what)
	}
	w.heal(ctx, "kill", began)
	return nil
}

// hang stops a node that its peers and clients then still take for running.
func hang(ctx context.Context, w *world) error {
	i := w.rand.IntN(len(names))
	w.tell("stop the process of the node of %s", names[i])
	if err := syscall.Kill(w.orgs[i].PID(), syscall.SIGSTOP); err != nil {
		return err
	}
	w.act("hang")
	wait(ctx, w.between(time.Second, 15*time.Second))
	if err := syscall.Kill(w.orgs[i].PID(), syscall.SIGCONT); err != nil {
		return err
	}
	w.tell("the node of %s goes on", names[i])
	w.heal(ctx, "hang", time.Now())
	return nil
}

func partition(ctx context.Context, w *world) error {
	i := w.rand.IntN(len(names))
	w.tell("link of %s down", names[i])
	if err := w.net.sites[i].setLink(false); err != nil {
		return err
	}
	w.act("partition")
	wait(ctx, w.between(time.Second, 15*time.Second))
	if err := w.net.sites[i].setLink(true); err != nil {
		return err
	}
	w.tell("link of %s up", names[i])
	w.heal(ctx, "partition", time.Now())
	return nil
}

func playWeather(ctx context.Context, w *world) error {
	w.tell("%.0f %% lost, %v delay, %.0f %% held back up to %v", 100*storm.loss, storm.delay, 100*storm.reorder, storm.shuffle)
	w.net.weather(storm)
	w.act("weather")
	<-ctx.Done()
	w.net.weather(weather{})
	w.tell("the weather is fine")
	return nil
}

func playAbsent(ctx context.Context, w *world) error {
	i := w.rand.IntN(len(names))
	w.tell("stop the node of %s", names[i])
	w.orgs[i].Terminate()
	w.act("absence")
	<-ctx.Done()
	began := time.Now()
	ctx = context.WithoutCancel(ctx)
	if err := w.orgs[i].Start(ctx); err != nil {
		return err
	}
	w.tell("start the node of %s", names[i])
	w.heal(ctx, "absence", began)
	return nil
}

func restart(ctx context.Context, w *world) error {
	i := w.next % len(names)
	w.next++
	w.tell("restart the node of %s", names[i])
	began := time.Now()
	w.orgs[i].Terminate()
	if err := w.orgs[i].Start(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	w.act("restart")
	w.heal(ctx, "restart", began)
	return nil
}

func playMixed(ctx context.Context, w *world) error {
	w.net.weather(storm)
	acts := []func(context.Context, *world) error{kill, hang, partition, restart}
	for wait(ctx, w.between(500*time.Millisecond, 3*time.Second)) {
		if err := acts[w.rand.IntN(len(acts))](ctx, w); err != nil {
			return err
		}
	}
	return nil
}

var steps = []time.Duration{time.Second, 30 * time.Second, 5 * time.Minute, time.Hour, 26 * time.Hour}

func step(ctx context.Context, w *world) error {
	i, d := w.rand.IntN(len(names)), steps[w.rand.IntN(len(steps))]
	if w.rand.IntN(2) == 0 {
		d = -d
	}
	w.tell("clock of %s stepped by %v", names[i], d)
	if err := w.clocks[i].step(d); err != nil {
		return err
	}
	w.act("step")
	if w.rand.IntN(3) == 0 {
		w.tell("restart the node of %s", names[i])
		w.orgs[i].Terminate()
		if err := w.orgs[i].Start(context.WithoutCancel(ctx)); err != nil {
			return err
		}
		w.act("restart")
	}
	if wait(ctx, max(time.Second, w.between(2*time.Second, 10*time.Second))) {
		w.stamped(names[i]+".example", d)
	}
	if err := w.clocks[i].step(0); err != nil {
		return err
	}
	w.tell("clock of %s right again", names[i])
	w.heal(ctx, "step", time.Now())
	return nil
}

// stamped counts the steps that messages show: by the hub's stamp of its newest one.
func (w *world) stamped(hub string, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if off := w.stamps[hub] - d; off.Abs() < d.Abs()/2 || off.Abs() < 500*time.Millisecond {
		w.counts["step seen"]++
	}
}

// mend repairs everything that a scenario may have left.
func (w *world) mend(ctx context.Context) error {
	w.net.weather(weather{})
	for _, c := range w.clocks {
		if err := c.step(0); err != nil {
			return err
		}
	}
	for i, s := range w.net.sites {
		if err := s.setLink(true); err != nil {
			return err
		}
		if w.orgs[i].PID() == 0 {
			if err := w.orgs[i].Start(ctx); err != nil {
				return err
			}
		}
		if w.hosts[i].cmd == nil {
			if err := w.hosts[i].start(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// roomHost is the domain of a room's hub.
func roomHost(room string) string { return mimi.URI(room).Domain() }

// run plays a scenario, has everything come to rest, and returns what the checker finds.
func (w *world) run(ctx context.Context, s scenario) ([]fault, error) {
	w.mu.Lock()
	clear(w.counts)
	clear(w.heals)
	w.record.late, w.broken = nil, nil
	w.mu.Unlock()
	w.tell("%s: %s", s.name, s.does)
	for _, h := range w.hosts {
		if err := h.talk(ctx); err != nil {
			return nil, err
		}
	}
	acts, cancel := context.WithTimeout(ctx, w.o.duration)
	err := s.play(acts, w)
	cancel()
	if err = errors.Join(err, ctx.Err()); err != nil {
		return nil, err
	}
	if err := w.mend(ctx); err != nil {
		return nil, err
	}
	for _, h := range w.hosts {
		if _, err := h.call(ctx, order{Do: "hush"}); err != nil {
			return nil, err
		}
	}
	w.tell("nobody talks any more")
	began := time.Now()
	slow := w.settle(ctx, 2*w.o.patience)
	w.mu.Lock()
	w.heals["rest"] = append(w.heals["rest"], time.Since(began))
	w.record.late = append(w.record.late, slow...)
	for _, b := range w.broken {
		if !strings.HasPrefix(b, "frozen") { // the views say that
			w.record.late = append(w.record.late, b)
		}
	}
	w.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return w.judge(ctx)
}
