package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// A directory that was restored from an old copy holds ratchets that have moved on since. Encrypting with them again
// would use keys twice (RFC 9420, Section 6.3.1), and nothing in the directory says so. The node says it: before the
// first message that a process encrypts or sends in a room, it asks for the last message that the client has submitted
// there. If its epoch and generation are ahead, the group's state is given up and the room entered anew by an external
// commit, which also removes the leaf with the old keys (RFC 9420, Section 12.4.3.2).
//
// A ciphertext in the outbox may have been submitted before, by this directory or by the one that it is a copy of: then
// the same bytes get the same answer. Or two copies have encrypted different messages with one key. So the room's log
// comes first, which has every message that was accepted. What isn't in it is sent if the node knows of no message with
// that key or a later one, or if the last one that it knows is this one; else it is encrypted anew.
//
// Of two processes that go on from the same copy at the same time, the node refuses the second message with a key, and
// that process enters the room anew. All of this takes a node that tells the truth. A handshake is a PublicMessage
// here and needs no key of a ratchet.

// codeKeyUsed is the node's answer to another message with a key that was used, or with one before it.
const codeKeyUsed = "keyUsed"

// ask compares the room's state with what the node knows, once per process and group.
func (r *Room) ask(ctx context.Context) error {
	r.mu.Lock()
	if err := r.usable(); err != nil || r.fresh {
		r.mu.Unlock()
		return err
	}
	if r.sealedOut() != nil {
		r.mu.Unlock()
		if err := r.c.WaitLive(ctx); err != nil {
			return err
		}
		r.mu.Lock()
	}
	group := r.group
	id := append([]byte{}, group.GroupID()...)
	r.mu.Unlock()
	last, err := call(ctx, r.c.session, r.c.session.service.LastSent, &api.LastSentRequest{Group: id})
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		last, err = new(api.LastSentResponse), nil // a node of an earlier release
	}
	if err != nil {
		return fmt.Errorf("client: ask for the last message to %s: %w", r.uri, err)
	}
	r.mu.Lock()
	var w waits
	if r.group == group && r.usable() == nil { // else to be asked again
		err = r.compare(&w, last)
		r.touch()
	}
	r.mu.Unlock()
	return errors.Join(err, w.wait())
}

// sealedOut returns the message in the outbox that is encrypted, nil if there is none: only the first one can be. mu is
// held.
func (r *Room) sealedOut() *outgoing {
	if len(r.outbox) == 0 || r.outbox[0].submit == nil {
		return nil
	}
	return r.outbox[0]
}

// compare judges the state and the outbox by the last message that the node knows. mu is held.
func (r *Room) compare(w *waits, last *api.LastSentResponse) error {
	used := func(epoch uint64, generation uint32) bool {
		return last.Known && (last.Epoch > epoch || last.Epoch == epoch && last.Generation >= generation)
	}
	if o := r.sealedOut(); o != nil {
		epoch, generation := epochOf(o.submit), uint32(0)
		if o.key != nil {
			generation = *o.key
		}
		same := last.Epoch == epoch && (len(last.Hash) == 0 || bytes.Equal(last.Hash, o.hash[:])) && last.Generation == generation
		if used(epoch, generation) && !same {
			b := new(store.Batch)
			r.unseal(b, o)
			if err := w.apply(r.c, b); err != nil {
				return err
			}
		}
	}
	epoch, next := r.group.Epoch(), r.group.Generation()
	if !used(epoch, next) {
		r.fresh = true
		return nil
	}
	r.frozen = fmt.Errorf("client: %w: %s: %w: in epoch %d with message %d as the next, after message %d of epoch %d was sent",
		ErrFrozen, r.uri, ErrRestored, epoch, next, last.Generation, last.Epoch)
	r.behind = true
	r.c.log.Warn("the room's state is an old copy", "room", r.uri, "epoch", epoch, "next", next,
		"sent epoch", last.Epoch, "sent", last.Generation)
	return nil
}

// enterAnew joins the room by an external commit.
func (r *Room) enterAnew(ctx context.Context) error {
	if !r.anew.Allow() {
		return errTooOften
	}
	trimmed := r.c.trimmed(r.uri)
	_, err := r.c.join(ctx, r.uri, nil)
	if err == nil {
		return nil
	}
	refused, ok := errors.AsType[*Refused](err)
	if trimmed && (errors.Is(err, errRemoved) || ok && (refused.Code == mimi.GroupInfoNotAuthorized.String() || refused.Code == mimi.GroupInfoNoSuchRoom.String())) {
		return r.out()
	}
	if !permanent(err) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.behind = false // it stays frozen
	r.touch()
	return err
}

// commitFor commits in a room whose hub has no GroupInfo of the present epoch, unless somebody else was faster.
func (c *Client) commitFor(room mimi.URI) {
	r, err := c.Room(room)
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.usable() != nil {
		return
	}
	epoch := r.group.Epoch()
	r.jobs = append(r.jobs, &job{
		notBefore: time.Now().Add(c.o.CommitDelay()), done: make(chan error, 1),
		build: func(g *mls.Group) (mls.CommitOptions, error) {
			if g.Epoch() != epoch {
				return mls.CommitOptions{}, errDone
			}
			return mls.CommitOptions{ForcePath: true}, nil
		},
	})
	r.touch()
}

// askAgain has the node asked before anything else is sent.
func (r *Room) askAgain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fresh = false
	r.touch()
}

// noteSent tells the node of a message that will leave some other way than by submit.
func (r *Room) noteSent(ctx context.Context, o *outgoing) error {
	var req mimi.SubmitMessageRequest
	if err := codec.Unmarshal(o.submit, &req); err != nil {
		return err
	}
	_, err := call(ctx, r.c.session, r.c.session.service.NoteSent, &api.NoteSentRequest{Message: codec.Marshal(req.Message), Generation: *o.key})
	switch {
	case connect.CodeOf(err) == connect.CodeUnimplemented: // a node of an earlier release
		return nil
	case Code(err) == codeKeyUsed:
		r.askAgain()
	}
	return err
}
