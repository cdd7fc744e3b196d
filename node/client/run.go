package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

const (
	// refreshTrust and renewal are looked at this often while the stream is up.
	housekeeping = 10 * time.Minute
	// ackDelay is how long acknowledgements are collected before they are sent.
	ackDelay = 200 * time.Millisecond
	// maxReconnect bounds the delay before the next attempt to connect.
	maxReconnect = 5 * time.Second
)

// Run keeps the client connected: authenticated, its KeyPackages published, subscribed. It processes what arrives, in
// order, and sends what waits. It returns when ctx ends, with its error, with ErrRevoked if the device was revoked, and
// if the state can't be written: the client has to be opened again then, with store.ErrFailed in another process. All else
// it tries again, and waits while there is too little space.
func (c *Client) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.mu.Lock()
	if c.running != nil {
		c.mu.Unlock()
		return fmt.Errorf("client: %w", ErrRunning)
	}
	c.running = ctx
	for _, r := range c.rooms {
		c.workers.Go(func() { r.work(ctx) })
	}
	c.mu.Unlock()
	c.workers.Go(func() { c.acknowledge(ctx) })
	c.workers.Go(func() { c.expireInTime(ctx) })
	c.workers.Go(func() {
		select {
		case err := <-c.db.failed:
			c.giveUp(fmt.Errorf("client: write the state: %w", err))
		case <-ctx.Done():
		}
	})
	defer func() {
		cancel()
		c.mu.Lock()
		c.running = nil
		c.mu.Unlock()
		c.workers.Wait()
	}()

	var delay time.Duration
	for {
		began := time.Now()
		again, err := c.connect(ctx)
		switch {
		case ended(ctx):
			return ctx.Err()
		case c.gone() != nil:
			c.abandon(c.gone())
			return c.gone()
		case revoked(err):
			c.log.Error("this device was revoked", "client", c.ID())
			err = fmt.Errorf("client: %w: %w", ErrRevoked, err)
			c.abandon(err)
			return err
		case again:
			delay = 0
			continue
		}
		if time.Since(began) > maxReconnect {
			delay = 0
		}
		delay = min(max(2*delay, 25*time.Millisecond, RetryAfter(err)), maxReconnect)
		c.log.Info("not connected", "delay", delay, "err", err)
		c.pause(ctx, delay, nil)
	}
}

// connect gets what is needed, subscribes and processes events until the stream ends. again says that the end was
// wanted, by resubscribe.
func (c *Client) connect(ctx context.Context) (again bool, err error) {
	stream, cancel := context.WithCancel(ctx)
	defer cancel()
	c.mu.Lock()
	c.restart = cancel
	c.mu.Unlock()
	if err := c.gone(); err != nil { // before restart was there to end this
		return false, err
	}
	defer func() {
		if c.isLive() && c.gone() == nil {
			var w waits
			err = errors.Join(err, c.noteCurrent(&w), w.wait())
		}
		c.mu.Lock()
		select {
		case <-c.live:
			c.live = make(chan struct{})
		default:
		}
		c.mu.Unlock()
		again = stream.Err() != nil
	}()
	if err := c.roomy(); err != nil {
		return false, err
	}
	if err := c.db.Refill(); err != nil {
		c.log.Warn("no ballast", "err", err)
	}
	if err := c.refreshTrust(stream); err != nil {
		return false, err
	}
	if err := c.resumeJoins(ctx); err != nil {
		return false, err
	}
	c.keepHouse(stream)
	return false, c.subscribe(stream)
}

// isLive says whether the subscription has given all that there was when it began.
func (c *Client) isLive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.live:
		return true
	default:
		return false
	}
}

// resubscribe ends the present stream; Run begins another one at once.
func (c *Client) resubscribe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.restart != nil {
		c.restart()
	}
}

// keepHouse renews the credential and publishes KeyPackages if it is time, has the rooms follow, and erases used keys.
// Failing isn't the end of the connection.
func (c *Client) keepHouse(ctx context.Context) {
	due, err := c.renewalDue()
	if err == nil && due {
		err = c.renew(ctx)
	}
	if err != nil && !ended(ctx) {
		c.log.Warn("renewing the credential failed", "err", err)
	}
	c.renewLeaves()
	if err := c.publishKeyPackages(ctx, false); err != nil && !ended(ctx) {
		c.log.Warn("publishing key packages failed", "err", err)
	}
	if err := c.reseal(); err != nil && !ended(ctx) {
		c.log.Warn("resealing the state failed", "err", err)
	}
}

// reseal erases the keys of messages that were sent and read since the last time, as far as the present epochs hold
// them.
func (c *Client) reseal() error {
	var w waits
	for _, r := range c.Rooms() {
		b := new(store.Batch)
		r.mu.Lock()
		err := r.reseal(b)
		if err == nil && b.Len() > 0 {
			err = w.apply(c, b)
		}
		r.mu.Unlock()
		if err != nil {
			return errors.Join(err, w.wait())
		}
	}
	return w.wait()
}

func (c *Client) subscribe(ctx context.Context) error {
	req := &api.SubscribeRequest{}
	for _, r := range c.Rooms() {
		r.newStream()
		r.mu.Lock()
		if !r.header.left {
			req.Cursors = append(req.Cursors, &api.Cursor{Room: string(r.uri), Seq: r.header.cursor})
		}
		r.mu.Unlock()
	}
	c.mu.Lock()
	req.Welcome = c.welcome
	c.mu.Unlock()
	stream, err := c.session.subscribe(ctx, req)
	if err != nil {
		return err
	}
	defer stream.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.workers.Go(func() { c.tick(ctx) })
	for stream.Receive() {
		if err := c.handle(ctx, stream.Msg().Events); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errors.New("the node ended the subscription")
}

// tick does the housekeeping of a stream that lasts.
func (c *Client) tick(ctx context.Context) {
	t := time.NewTicker(housekeeping)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := c.refreshTrust(ctx); err != nil && !ended(ctx) {
				c.log.Warn("refreshing trust failed", "err", err)
			}
			c.keepHouse(ctx)
			var w waits
			if err := errors.Join(c.noteCurrent(&w), w.wait()); err != nil { // the client gives up
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// handle processes a batch of events in order, and tells of them when they are durable.
func (c *Client) handle(ctx context.Context, events []*api.Event) error {
	if err := c.roomy(); err != nil {
		return err // the node keeps what isn't acknowledged
	}
	var w waits
	var told []Event
	err := c.process(ctx, &w, events, &told)
	if e := c.check(&w, events, &told); err == nil {
		err = e
	}
	if e := w.wait(); e != nil {
		return e
	}
	c.events.send(told)
	c.acknowledgeSoon()
	return err
}

func (c *Client) process(ctx context.Context, w *waits, events []*api.Event, told *[]Event) error {
	for _, ev := range events {
		var more []Event
		var err error
		switch {
		case ev.GetEntry() != nil:
			more, err = c.entry(w, ev.GetEntry())
		case ev.GetWelcome() != nil:
			x := ev.GetWelcome()
			if more, err = c.welcomed(w, x.Number, x.Room, x.Seq, x.Fanout); err == nil {
				c.publishMore(ctx)
			}
		case ev.GetEphemeral() != nil:
			more, err = c.ephemeral(w, ev.GetEphemeral().Room, ev.GetEphemeral().Fanout)
		case ev.GetKeyPackages() != nil:
			if c.few(ev.GetKeyPackages()) {
				c.publishMore(ctx)
			}
		case ev.GetTrust() != nil:
			// Before anything else is processed: what comes after the news is judged by it.
			if err = c.refreshTrust(ctx); err == nil {
				more = []Event{TrustChanged{Domain: ev.GetTrust().Domain}}
			}
		case ev.GetConsent() != nil:
			if v, bad := c.consent(ev.GetConsent()); bad != nil {
				c.log.Warn("event of a consent", "err", bad)
			} else {
				more = []Event{ConsentChanged{v}}
			}
		case ev.GetBehind() != nil:
			more = c.fallBehind(ev.GetBehind())
		case ev.GetCommitWanted() != nil:
			c.commitFor(mimi.URI(ev.GetCommitWanted().Room))
		case ev.GetLive() != nil:
			err = c.noteCurrent(w)
			c.mu.Lock()
			select {
			case <-c.live:
			default:
				close(c.live)
			}
			c.mu.Unlock()
		}
		*told = append(*told, more...)
		if err != nil {
			return err
		}
	}
	return nil
}

// check compares what a batch of events has brought with what the rooms' hubs have signed.
func (c *Client) check(w *waits, events []*api.Event, told *[]Event) error {
	rooms := make(map[mimi.URI]bool)
	live := false
	for _, ev := range events {
		if x := ev.GetEntry(); x != nil {
			rooms[mimi.URI(x.Room)] = true
		}
		live = live || ev.GetLive() != nil
	}
	for _, r := range c.Rooms() {
		if !live && !rooms[r.uri] {
			continue
		}
		at := ifContradicted
		if live {
			at = atLive
		}
		more, err := r.check(w, at)
		*told = append(*told, more...)
		if err != nil {
			return err
		}
	}
	return nil
}

// publishMore fills KeyPackages up in the background.
func (c *Client) publishMore(ctx context.Context) {
	c.workers.Go(func() {
		if err := c.publishKeyPackages(ctx, false); err != nil && !ended(ctx) {
			c.log.Warn("publishing key packages failed", "err", err)
		}
	})
}

func (c *Client) entry(w *waits, x *api.LogEntry) ([]Event, error) {
	r, err := c.Room(mimi.URI(x.Room))
	if err != nil {
		c.log.Debug("entry of an unknown room", "room", x.Room, "seq", x.Seq) // one that is being joined
		return nil, nil
	}
	return r.receive(w, x)
}

// acks is what the node is to be told next.
type acks struct {
	due  chan struct{} // has room for one
	sent map[mimi.URI]uint64
}

func newAcks() acks { return acks{due: make(chan struct{}, 1), sent: make(map[mimi.URI]uint64)} }

// acknowledgeSoon has the node told how far this client is.
func (c *Client) acknowledgeSoon() {
	select {
	case c.acks.due <- struct{}{}:
	default:
	}
}

// acknowledge tells the node how far the client has stored what it got, collected over ackDelay.
func (c *Client) acknowledge(ctx context.Context) {
	for {
		select {
		case <-c.acks.due:
		case <-ctx.Done():
			return
		}
		t := time.NewTimer(ackDelay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if err := c.sendAcks(ctx); err != nil && !ended(ctx) {
			c.log.Debug("acknowledging failed", "err", err)
		}
	}
}

func (c *Client) sendAcks(ctx context.Context) error {
	if err := c.checkHeads(); err != nil {
		return err
	}
	c.mu.Lock()
	req := &api.AcknowledgeRequest{Welcome: c.welcome}
	c.mu.Unlock()
	var left []*Room
	now := make(map[mimi.URI]uint64)
	for _, r := range c.Rooms() {
		r.mu.Lock()
		cursor, gone, told := r.header.cursor, r.header.left, r.header.told
		r.mu.Unlock()
		switch {
		case gone && !told:
			left = append(left, r)
			req.Left = append(req.Left, string(r.uri))
		case !gone && c.acks.sent[r.uri] != cursor:
			now[r.uri] = cursor
			req.Cursors = append(req.Cursors, &api.Cursor{Room: string(r.uri), Seq: cursor})
		}
	}
	if _, err := call(ctx, c.session, c.session.service.Acknowledge, req); err != nil {
		return err
	}
	for uri, cursor := range now {
		c.acks.sent[uri] = cursor
	}
	var w waits
	for _, r := range left {
		if err := r.noteTold(&w); err != nil {
			return err
		}
	}
	return w.wait()
}

// checkHeads verifies the heads that came since the last time.
func (c *Client) checkHeads() error {
	var w waits
	var told []Event
	for _, r := range c.Rooms() {
		more, err := r.check(&w, always)
		if err != nil {
			return err
		}
		told = append(told, more...)
	}
	if err := w.wait(); err != nil {
		return err
	}
	c.events.send(told)
	return nil
}

// noteTold notes that the node knows that this client left, unless it is back meanwhile. The header is written under
// the lock, so that it doesn't replace a later one.
func (r *Room) noteTold(w *waits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.header.left {
		return nil
	}
	r.header.told = true
	b := new(store.Batch)
	r.saveHeader(b)
	return w.apply(r.c, b)
}
