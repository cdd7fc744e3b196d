package client

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// Everything that a room sends is sent by one goroutine, its worker: own commits first, then messages. What is under
// way is in the store, so that the worker goes on after a crash with the same bytes; the hub answers the same bytes
// the same way. The subscription is the other side: what comes back in the log settles what was sent.

// job is a change of the room that this client wants to commit. It is built anew for each epoch until a commit of
// it wins.
type job struct {
	ctx       context.Context // nil: nobody waits
	build     func(g *mls.Group) (mls.CommitOptions, error)
	done      chan error // has room for one
	attempts  int
	notBefore time.Time
	renewal   bool // of the own leaf
}

// finish tells who waits, once.
func (j *job) finish(err error) {
	select {
	case j.done <- err:
	default:
	}
}

// errDone says that a job has nothing left to do.
var errDone = errors.New("nothing to commit")

// maxAttempts bounds how often a job is built anew after other commits won.
const maxAttempts = 32

// maxRefusals bounds how often it is built anew after the hub refused it: it may have seen a proposal that this client
// hasn't yet.
const maxRefusals = 4

// staged is the own commit that waits for its place in the log.
type staged struct {
	request  []byte // UpdateRequest
	hold     bool   // made by StageUpdate and not sent from here
	answered bool   // the hub has given its answer, and the log will show the outcome
	job      *job   // nil after a restart
}

// enqueue gives the worker a job.
func (r *Room) enqueue(j *job) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.jobs = append(r.jobs, j)
	r.touch()
}

// change runs a job to its end. If ctx ends before a commit was made, nothing happens; if it ends later, the commit
// that is under way may still be accepted.
func (r *Room) change(ctx context.Context, build func(g *mls.Group) (mls.CommitOptions, error)) error {
	if err := r.c.roomy(); err != nil {
		return err
	}
	r.mu.Lock()
	err := r.usable()
	r.mu.Unlock()
	if err != nil {
		return err
	}
	j := &job{ctx: ctx, build: build, done: make(chan error, 1)}
	r.enqueue(j)
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// work is the room's worker.
func (r *Room) work(ctx context.Context) {
	var delay time.Duration
	for ctx.Err() == nil {
		step, at := r.next()
		if step == nil {
			r.idle(ctx, at)
			continue
		}
		err := r.c.roomy()
		if err == nil {
			err = step(ctx)
		}
		if err == nil {
			delay = 0
			continue
		}
		if ended(ctx) {
			return
		}
		delay = min(max(2*delay, minRetry), maxRetry)
		r.c.log.Debug("room waits", "room", r.uri, "delay", delay, "err", err)
		r.c.pause(ctx, delay, r.wake) // something in the log, for instance, says that the hub is there again
	}
}

const (
	minRetry = 25 * time.Millisecond
	maxRetry = 5 * time.Second
)

// pause waits about d, or until the node is there again, or until wake, if it isn't nil, has a value.
func (c *Client) pause(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	c.mu.Lock()
	live := c.live
	c.mu.Unlock()
	select {
	case <-live: // it is there already: an interruption isn't what went wrong
		live = nil
	default:
	}
	t := time.NewTimer(d/2 + mathrand.N(d))
	defer t.Stop()
	select {
	case <-live:
	case <-wake:
	case <-t.C:
	case <-ctx.Done():
	}
}

// idle waits until something changes, or until at if it isn't zero.
func (r *Room) idle(ctx context.Context, at time.Time) {
	var timer <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(max(0, time.Until(at)))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-r.wake:
	case <-timer:
	case <-ctx.Done():
	}
}

// next returns what is to be done now, or when to look again at the latest; zero if only a change brings something.
func (r *Room) next() (step func(context.Context) error, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.behind && r.c.gone() == nil {
		r.failAll(r.frozen)
		return r.enterAnew, time.Time{}
	}
	if err := r.usable(); err != nil {
		r.failAll(err)
		return nil, time.Time{}
	}
	if s := r.staged; s != nil && !s.hold {
		if s.answered {
			return nil, time.Time{}
		}
		return r.sendStaged, time.Time{}
	}
	if r.leaveDue() {
		return r.sendLeave, time.Time{}
	}
	now := time.Now()
	r.jobs = slices.DeleteFunc(r.jobs, func(j *job) bool { return j.ctx != nil && j.ctx.Err() != nil })
	if len(r.jobs) > 0 {
		if j := r.jobs[0]; j.notBefore.After(now) {
			return nil, j.notBefore
		}
		return r.stageJob, time.Time{}
	}
	waiting := len(r.outbox) > 0 && r.outbox[0].ready
	if !r.commitAt.IsZero() && (!r.commitAt.After(now) || waiting && r.held()) {
		return r.settle, time.Time{}
	}
	if waiting && !r.held() && r.outbox[0].notBefore <= r.group.Epoch() {
		if !r.fresh {
			return r.ask, time.Time{}
		}
		return r.sendMessage, time.Time{}
	}
	return nil, r.commitAt
}

// failAll ends what waits in a room in which nothing can be done. mu is held.
func (r *Room) failAll(err error) {
	for _, j := range r.jobs {
		j.finish(err)
	}
	r.jobs = nil
	if r.staged != nil && r.staged.job != nil {
		r.staged.job.finish(err)
		r.staged.job = nil
	}
	if r.leaving != nil {
		r.leaving.finish(err)
	}
	if r.frozen != nil && r.c.gone() == nil {
		return // the outbox stays: Join may bring the room back
	}
	for _, o := range r.outbox {
		o.finish(0, err)
	}
}

// settle makes a job of what others proposed.
func (r *Room) settle(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.commitAt = time.Time{}
	r.jobs = append(r.jobs, &job{build: r.buildPending, done: make(chan error, 1)})
	return nil
}

// buildPending commits the pending proposals and nothing else.
func (r *Room) buildPending(g *mls.Group) (mls.CommitOptions, error) {
	if !r.toCommit() {
		return mls.CommitOptions{}, errDone
	}
	return mls.CommitOptions{}, nil
}

// stageJob makes a commit of the first job.
func (r *Room) stageJob(context.Context) error {
	r.mu.Lock()
	if len(r.jobs) == 0 || r.staged != nil && !r.staged.hold {
		r.mu.Unlock()
		return nil
	}
	j := r.jobs[0]
	r.jobs = r.jobs[1:]
	var w waits
	_, err := r.stage(&w, j, false)
	if errors.Is(err, errDone) {
		err = nil
		j.finish(nil)
	} else if err != nil {
		j.finish(err)
	}
	r.touch()
	r.mu.Unlock()
	if e := w.wait(); e != nil {
		return e
	}
	if err != nil {
		r.c.log.Debug("commit failed", "room", r.uri, "err", err)
	}
	return nil
}

// stage makes a commit of a job and stores it with the bytes that will be sent. mu is held.
func (r *Room) stage(w *waits, j *job, hold bool) (*staged, error) {
	if err := r.usable(); err != nil {
		return nil, err
	}
	if r.removalPending() && (!j.renewal || r.leavePending()) { // a renewal may be what it takes to stay
		return nil, fmt.Errorf("client: %w: this client is about to be removed from %s", ErrNotMember, r.uri)
	}
	o, err := j.build(r.group)
	if err != nil {
		return nil, err
	}
	b := new(store.Batch)
	state := b.Prefixed(r.key(roomGroup))
	if err := r.group.Drop(state); err != nil { // one that StageUpdate made
		return nil, err
	}
	r.staged = nil
	pc, err := r.group.Commit(state, o)
	if err != nil {
		return nil, err
	}
	s := &staged{request: updateRequest(pc.Message(), pc.Welcome(), pc.GroupInfo()), hold: hold, job: j}
	b.Set(r.key(roomStaged), codec.Marshal(s))
	r.staged = s
	return s, w.apply(r.c, b)
}

// updateRequest is the UpdateRequest of a commit. Of its GroupInfo and ratchet tree it has what the hub can't compute.
func updateRequest(commit *mls.MLSMessage, w *mls.Welcome, gi *mls.GroupInfo) []byte {
	return codec.Marshal(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
		Message: commit, Welcome: w, GroupInfo: mimi.SmallGroupInfo(gi), RatchetTree: mimi.HubRatchetTree(),
	}})
}

// commit sends what updateRequest has made of a commit. A hub of an earlier release takes it only with all of GroupInfo and
// ratchet tree, which whole returns, nil if it isn't known any more.
func (c *Client) commit(ctx context.Context, room mimi.URI, request []byte, whole func() (*mls.GroupInfo, *mls.RatchetTree)) (*mimi.UpdateRoomResponse, uint64, error) {
	res, seq, err := c.update(ctx, room, request)
	if Code(err) != codeMalformed {
		return res, seq, err
	}
	gi, tree := whole()
	var q mimi.UpdateRequest
	if gi == nil || codec.Unmarshal(request, &q) != nil {
		return res, seq, err
	}
	q.Bundle.GroupInfo, q.Bundle.RatchetTree = mimi.FullGroupInfo(gi), mimi.FullRatchetTree(tree)
	return c.update(ctx, room, codec.Marshal(q))
}

// MarshalMLS implements codec.Marshaler, for the store.
func (s staged) MarshalMLS(w *codec.Writer) {
	w.Optional(s.hold)
	w.Opaque(s.request)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *staged) UnmarshalMLS(r *codec.Reader) {
	s.hold = r.Optional()
	s.request = r.Opaque()
}

func (r *Room) loadStaged() error {
	b, err := r.c.db.Get(r.key(roomStaged))
	if err != nil || b == nil {
		return err
	}
	s := new(staged)
	if err := codec.Unmarshal(b, s); err != nil {
		return fmt.Errorf("staged commit: %w", err)
	}
	if r.group.PendingCommit() != nil {
		r.staged = s
	}
	return nil
}

// sendStaged sends the staged commit, the same bytes at every attempt, and takes the hub's answer.
func (r *Room) sendStaged(ctx context.Context) error {
	r.mu.Lock()
	s := r.staged
	r.mu.Unlock()
	if s == nil {
		return nil
	}
	res, seq, err := r.c.commit(ctx, r.uri, s.request, func() (*mls.GroupInfo, *mls.RatchetTree) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if pc := r.group.PendingCommit(); pc != nil && r.staged == s {
			return pc.GroupInfo(), pc.Tree()
		}
		return nil, nil
	})
	if err != nil && !permanent(err) {
		return err
	}
	r.mu.Lock()
	var w waits
	err = r.answered(&w, s, res, err)
	r.touch()
	r.mu.Unlock()
	r.c.log.Debug("commit sent", "room", r.uri, "seq", seq)
	return errors.Join(err, w.wait())
}

// answered takes the hub's answer to a staged commit. mu is held.
func (r *Room) answered(w *waits, s *staged, res *mimi.UpdateRoomResponse, err error) error {
	if r.staged != s {
		return nil // the log was faster
	}
	switch {
	case err != nil:
	case res.Code == mimi.UpdateSuccess, res.Code == mimi.UpdateWrongEpoch && res.CurrentEpoch > r.group.Epoch():
		s.answered = true
		return nil
	default:
		err = refusedUpdate(res)
	}
	b := new(store.Batch)
	if e := r.group.Drop(b.Prefixed(r.key(roomGroup))); e != nil {
		return e
	}
	b.Delete(r.key(roomStaged))
	r.staged = nil
	if e := w.apply(r.c, b); e != nil {
		return e
	}
	r.schedule()
	j := s.job
	switch {
	case j == nil:
	case res == nil || j.attempts >= maxRefusals:
		j.finish(fmt.Errorf("client: change %s: %w", r.uri, err))
	default:
		j.attempts++
		j.notBefore = time.Now().Add(50 * time.Millisecond << j.attempts)
		r.jobs = slices.Insert(r.jobs, 0, j)
	}
	return nil
}

// settled ends the staged commit, which the log has shown to be confirmed or lost. mu is held; the batch is the one
// that the entry of the log is written with.
func (r *Room) settled(b *store.Batch, confirmed bool) {
	s := r.staged
	if s == nil {
		return
	}
	b.Delete(r.key(roomStaged))
	r.staged = nil
	j := s.job
	switch {
	case j == nil:
	case confirmed:
		j.finish(nil)
	case s.hold:
	case j.attempts >= maxAttempts:
		j.finish(fmt.Errorf("client: change %s: other commits came first %d times", r.uri, j.attempts))
	default:
		j.attempts++
		r.jobs = slices.Insert(r.jobs, 0, j)
	}
}

// update sends an UpdateRequest to a room's hub, through the own node.
func (c *Client) update(ctx context.Context, room mimi.URI, request []byte) (*mimi.UpdateRoomResponse, uint64, error) {
	res, err := call(ctx, c.session, c.session.service.Update, &api.MimiRequest{Room: string(room), Body: request})
	if err != nil {
		return nil, 0, fmt.Errorf("client: update %s: %w", room, err)
	}
	answer := new(mimi.UpdateRoomResponse)
	if err := codec.Unmarshal(res.Body, answer); err != nil {
		return nil, 0, fmt.Errorf("client: the hub's answer to an update of %s: %w", room, err)
	}
	c.hearAnswer(room, answer.Code == mimi.UpdateSuccess, res.Head)
	return answer, res.Seq, nil
}
