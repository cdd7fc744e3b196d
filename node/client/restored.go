package client

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/node/api"
)

// A directory that was restored from an old copy holds ratchets that have moved on since. Encrypting with them again
// would use keys twice (RFC 9420, Section 6.3.1), and nothing in the directory says so. The node says it: before the
// first message that a process encrypts in a room, it asks for the last epoch and generation that the client has
// submitted there. If those are ahead, the group's state is given up and the room entered anew by an external commit,
// which also removes the leaf with the old keys (RFC 9420, Section 12.4.3.2). Ciphertexts in the outbox may be submitted
// before: the same bytes as the first time.
//
// This doesn't help against two processes that go on from the same copy at the same time, nor against a node that
// doesn't tell the truth. A handshake is a PublicMessage here and needs no key of a ratchet.

// ask compares the room's state with what the node knows, once per process and group.
func (r *Room) ask(ctx context.Context) error {
	r.mu.Lock()
	if err := r.usable(); err != nil || r.fresh {
		r.mu.Unlock()
		return err
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
	defer r.mu.Unlock()
	if r.group != group || r.usable() != nil {
		return nil // to be asked again
	}
	defer r.touch()
	epoch, next := group.Epoch(), group.Generation()
	if !last.Known || last.Epoch < epoch || last.Epoch == epoch && last.Generation < next {
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
	_, err := r.c.Join(ctx, r.uri)
	if err == nil || !permanent(err) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.behind = false // it stays frozen
	r.touch()
	return err
}
