package client

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// leaving is the user's wish to leave, as far as it got.
type leaving struct {
	epoch    uint64 // in which the proposals were made
	request  []byte // UpdateRequest; nil if they have to be made
	answered bool   // the hub has answered in this epoch
	accepted bool   // and has taken them
	self     bool   // one is a SelfRemove
	done     []chan error
}

// faultLeave is a HubFault.
const faultLeave = "the hub took the proposals to leave, and then a commit without them"

// Leave proposes to remove the user with all clients from the room: this one by a SelfRemove, which even who joins by
// an external commit commits (draft-ietf-mls-extensions, Section 6.3), if all members support that. It returns when the
// hub has the proposals. Another member commits them, since nobody can remove itself (draft-ietf-mimi-protocol, Section
// 3.5); until then this client stays a member. A hub that takes the proposals and then a commit without them is told as
// HubFault. If nobody but the user is there, its clients just forget that they were members.
func (r *Room) Leave(ctx context.Context) error {
	done := make(chan error, 1)
	r.mu.Lock()
	if err := r.usable(); err != nil {
		r.mu.Unlock()
		return err
	}
	var w waits
	b := new(store.Batch)
	alone := r.alone() && r.only()
	if alone {
		r.header.left = true
		done <- nil
	} else {
		r.header.leaving = true
		if r.leaving == nil {
			r.leaving = new(leaving)
		}
		if r.leaving.accepted && r.leaving.epoch == r.group.Epoch() {
			done <- nil
		} else {
			r.leaving.done = append(r.leaving.done, done)
		}
	}
	r.saveHeader(b)
	err := w.apply(r.c, b)
	r.touch()
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if err := w.wait(); err != nil {
		return err
	}
	if alone {
		r.c.events.send([]Event{Removed{Room: r.uri}})
		r.c.acknowledgeSoon()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// only says whether this client is the only member. mu is held.
func (r *Room) only() bool {
	n := 0
	for range r.group.Members() {
		n++
	}
	return n == 1
}

// alone says whether all members are clients of this user. mu is held.
func (r *Room) alone() bool {
	self := r.c.User()
	for m := range r.group.Members() {
		if user, _, err := r.c.identity(m.Leaf); err != nil || user != self {
			return false
		}
	}
	return true
}

// leaveDue says whether there are proposals to leave to be made or sent. mu is held.
func (r *Room) leaveDue() bool {
	if !r.header.leaving {
		return false
	}
	if r.leaving == nil {
		r.leaving = new(leaving)
	}
	return !r.leaving.answered || r.leaving.epoch != r.group.Epoch()
}

// leavePending says whether proposals to leave were made in this epoch and not refused: the hub may have them. mu is held.
func (r *Room) leavePending() bool {
	return r.leaving != nil && r.leaving.request != nil && r.leaving.epoch == r.group.Epoch()
}

// sendLeave sends the proposals, the same bytes at every attempt within an epoch.
func (r *Room) sendLeave(ctx context.Context) error {
	r.mu.Lock()
	l := r.leaving
	var w waits
	var err error
	if l.request == nil || l.epoch != r.group.Epoch() {
		err = r.proposeLeave(&w, l)
	}
	request := l.request
	r.mu.Unlock()
	if e := w.wait(); e != nil {
		return e
	}
	if request == nil && err == nil {
		return nil
	}
	var res *mimi.UpdateRoomResponse
	if err == nil {
		if res, _, err = r.c.update(ctx, r.uri, request); err != nil && !permanent(err) {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leaving != l {
		return nil // a commit was faster
	}
	defer r.touch()
	switch {
	case err != nil:
	case res.Code == mimi.UpdateSuccess:
		l.answered, l.accepted = true, true
	case res.Code == mimi.UpdateWrongEpoch && res.CurrentEpoch > l.epoch:
		l.answered = true // the next epoch brings new proposals
		return nil
	default:
		err = refusedUpdate(res)
	}
	if err != nil {
		r.header.leaving, r.leaving = false, nil
		r.schedule()
		b := new(store.Batch)
		b.Delete(r.key(roomLeave))
		r.saveHeader(b)
		if e := w.apply(r.c, b); e != nil {
			return e
		}
		err = fmt.Errorf("client: leave %s: %w", r.uri, err)
	}
	l.finish(err)
	return nil
}

// finish tells who waits. The room's mu is held.
func (l *leaving) finish(err error) {
	for _, done := range l.done {
		done <- err
	}
	l.done = nil
}

// proposeLeave makes the proposals for the present epoch. The room's group doesn't note them before they come in the log:
// nothing takes pending proposals back if the hub refuses them. mu is held.
func (r *Room) proposeLeave(w *waits, l *leaving) error {
	props, err := r.c.removal(r.group, r.c.User())
	if err != nil {
		return err
	}
	// What another device of the user has proposed is there already.
	pending := r.group.Pending()
	props = slices.DeleteFunc(props, func(p mls.Proposal) bool {
		return slices.ContainsFunc(pending, func(q mls.PendingProposal) bool { return r.c.sameRemoval(r.group, p, q, r.c.User()) })
	})
	if len(props) == 0 {
		l.epoch, l.request, l.answered, l.accepted = r.group.Epoch(), nil, true, true
		l.finish(nil)
		return nil
	}
	g, err := r.copyGroup()
	if err != nil {
		return err
	}
	var messages []*mls.MLSMessage
	l.self = false
	for _, p := range props {
		var m *mls.MLSMessage
		if p.Remove != nil && p.Remove.Removed == g.OwnLeaf() {
			m, err = g.ProposeSelfRemove(nil)
			l.self = err == nil
		}
		if m == nil { // of another leaf, or not everybody supports the other
			m, err = g.Propose(nil, nil, p)
		}
		if err != nil {
			return err
		}
		messages = append(messages, m)
	}
	l.request = codec.Marshal(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
		Message: messages[0], MoreProposals: messages[1:],
	}})
	l.epoch, l.answered, l.accepted = r.group.Epoch(), false, false
	b := new(store.Batch)
	b.Set(r.key(roomLeave), slices.Concat(binary.BigEndian.AppendUint64(nil, l.epoch), l.request))
	r.schedule()
	return w.apply(r.c, b)
}

// loadLeaving restores proposals to leave of the present epoch, to be sent again as they were.
func (r *Room) loadLeaving() error {
	b, err := r.c.db.Get(r.key(roomLeave))
	if err != nil || len(b) < 8 || !r.header.leaving {
		return err
	}
	if epoch := binary.BigEndian.Uint64(b); epoch == r.group.Epoch() {
		r.leaving = &leaving{epoch: epoch, request: b[8:]}
	}
	return nil
}
