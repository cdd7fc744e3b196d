package node

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// A node whose disk fills up stops before the end, which would be a write-ahead log that can't be written. While less
// than the reserve is free it takes in nothing that makes its store larger: no message, handshake, new room, KeyPackage,
// upload, report or profile, no enrolment, and nothing from other hubs. Clients keep these in their outboxes and peers in
// theirs, and send them again. What there is can be read, and what makes the store smaller goes on: acknowledgements,
// deletions, claims, revocations, sweeping. When there is space again, it goes on by itself.
//
// Should the disk be full all the same, since others write to it, the store's ballast is given back, and the node is
// read-only until it could make another.

const (
	diskEvery  = time.Second     // how often the free space is looked at, at least
	retryDisk  = 5 * time.Second // after which who was refused comes again
	alarmEvery = time.Minute
)

// disk is the watch over the space that the data directory has.
type disk struct {
	reserve uint64
	ballast uint64
	free    func() (uint64, error) // bytes
	refill  func() error           // makes the ballast unless it is there

	full    atomic.Bool   // nothing that needs space is taken
	last    atomic.Uint64 // what was free when it was last looked at
	written atomic.Int64  // since then
	look    chan struct{} // has a value if it is to be looked at soon
	sweep   chan struct{} // has a value if what isn't needed should be deleted soon
	alarm   rate.Sometimes
}

func newDisk(c DiskConfig) *disk {
	return &disk{
		reserve: uint64(c.ReserveMiB) << 20, ballast: uint64(c.BallastMiB) << 20, look: make(chan struct{}, 1), sweep: make(chan struct{}, 1),
		alarm: rate.Sometimes{Interval: alarmEvery},
	}
}

// grow refuses what needs space that isn't there.
func (d *disk) grow() error {
	if !d.full.Load() {
		return nil
	}
	return &refusal{code: "unavailable", detail: "the node's disk is nearly full; it takes nothing new until there is space", retry: retryDisk}
}

// wrote notes that so many bytes were written. Many have the free space looked at.
func (d *disk) wrote(bytes int) {
	if uint64(d.written.Add(int64(bytes))) > d.reserve/16 {
		d.written.Store(0)
		kick(d.look)
	}
}

// ranOut is for when a write has failed for want of space. It is called while all writes wait.
func (d *disk) ranOut() {
	d.full.Store(true)
	kick(d.look)
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// checkDisk judges by the free space whether the node takes in anything.
func (n *Node) checkDisk() error {
	d := n.disk
	d.written.Store(0)
	free, err := d.free()
	was := d.full.Load()
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		if !was {
			return nil
		}
		free = math.MaxUint64 // as much as the ballast takes, or the ballast can't be made
	case err != nil:
		return fmt.Errorf("looking at the disk: %w", err)
	}
	d.last.Store(free)
	switch {
	case free < d.reserve:
		d.full.Store(true)
		if !was {
			kick(d.sweep)
		}
	case was && free < d.reserve+d.reserve/4+d.ballast: // what the ballast takes must not bring the end back
	default:
		if err := d.refill(); err != nil {
			d.full.Store(true)
			n.log.Error("no ballast", "err", err)
		} else if d.full.CompareAndSwap(true, false) {
			n.log.Warn("there is space on the disk again: the node takes in messages", "data", n.cfg.Data, "free", free)
			d.alarm = rate.Sometimes{Interval: alarmEvery}
		}
	}
	if d.full.Load() {
		d.alarm.Do(func() {
			n.log.Error("the disk is nearly full: the node is read-only", "data", n.cfg.Data, "free", free, "reserve", d.reserve)
		})
	}
	return nil
}

// watchDisk looks at the disk at intervals, and after much was written.
func (n *Node) watchDisk(ctx context.Context) error {
	tick := time.NewTicker(diskEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-n.disk.look:
		}
		if err := n.checkDisk(); err != nil {
			n.log.Error("the disk's space is unknown", "err", err)
		}
	}
}
