package client

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// Ephemeral messages use keys of the sender's ratchet like those of the log, with a generation each, which is durable
// before the message leaves. Who misses one keeps its key until the epoch ends, as for a message that comes late (RFC 9420,
// Section 9.2); of such keys mls.Config bounds the number. So an epoch has a limited number of them.
const maxEphemeral = 1000 // of this client in an epoch, each process

// Typing says that a member is writing, or isn't any more. It isn't kept: whoever isn't connected never learns of it.
type Typing struct {
	Room         mimi.URI
	User, Client mimi.URI
	On           bool
}

// Receipt says that a member has shown everything up to the message of a number. It isn't kept, like Typing.
type Receipt struct {
	Room         mimi.URI
	User, Client mimi.URI
	Seq          uint64
}

func (Typing) event()  {}
func (Receipt) event() {}

// Typing tells the members who are connected that this user is writing, or isn't any more. It isn't sent at all while
// something else of this client waits for the hub.
func (r *Room) Typing(ctx context.Context, on bool) error {
	kind := mimi.EphemeralPause
	if on {
		kind = mimi.EphemeralTyping
	}
	return r.sendEphemeral(ctx, mimi.Ephemeral{Kind: kind})
}

// Receipt tells the members who are connected that this user has seen everything up to the message of that number. Like
// Typing it may not be sent; the next one tells as much.
func (r *Room) Receipt(ctx context.Context, seq uint64) error {
	if seq == 0 {
		return errors.New("client: a receipt is for a message")
	}
	return r.sendEphemeral(ctx, mimi.Ephemeral{Kind: mimi.EphemeralReceipt, Seq: seq})
}

func (r *Room) sendEphemeral(ctx context.Context, e mimi.Ephemeral) error {
	if err := r.ask(ctx); err != nil {
		return err
	}
	var w waits
	r.mu.Lock()
	submit, generation, err := r.sealEphemeral(&w, e)
	r.mu.Unlock()
	if err := errors.Join(err, w.wait()); err != nil {
		return fmt.Errorf("client: ephemeral message to %s: %w", r.uri, err)
	}
	if submit == nil {
		return nil
	}
	_, err = call(ctx, r.c.session, r.c.session.service.SendEphemeral, &api.MimiRequest{Room: string(r.uri), Body: submit, Generation: &generation})
	if Code(err) == codeKeyUsed {
		r.askAgain() // another message was faster, or another copy of this client has sent one
		return nil
	}
	if err != nil {
		return fmt.Errorf("client: ephemeral message to %s: %w", r.uri, err)
	}
	return nil
}

// sealEphemeral encrypts a message unless that could get in the way of others: then it returns nil. mu is held.
func (r *Room) sealEphemeral(w *waits, e mimi.Ephemeral) (submit []byte, generation uint32, err error) {
	if err := r.usable(); err != nil {
		return nil, 0, err
	}
	if r.ephemeral.epoch != r.group.Epoch() {
		r.ephemeral.epoch, r.ephemeral.count = r.group.Epoch(), 0
	}
	// Messages are submitted in the order of their keys.
	if !r.fresh || len(r.outbox) > 0 || r.staged != nil || r.held() || r.ephemeral.count >= maxEphemeral {
		return nil, 0, nil
	}
	r.ephemeral.count++
	b := new(store.Batch)
	generation = r.group.Generation()
	m, err := r.group.Encrypt(b.Prefixed(r.key(roomGroup)), []byte(mimi.EphemeralAAD), mimi.EphemeralData(e))
	if err != nil {
		return nil, 0, err
	}
	r.spent = true
	if err := w.apply(r.c, b); err != nil {
		return nil, 0, err
	}
	return codec.Marshal(&mimi.SubmitMessageRequest{Message: m, Sender: r.c.User()}), generation, nil
}

// ephemeral processes a message that is in no log. One that can't be read is lost: it may be of an epoch that this client
// isn't in yet, or any more, or its own.
func (c *Client) ephemeral(w *waits, room string, fanout []byte) ([]Event, error) {
	r, err := c.Room(mimi.URI(room))
	if err != nil {
		return nil, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.usable() != nil {
		return nil, nil
	}
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(fanout, &f); err != nil || f.Message == nil || f.Message.Private == nil {
		return nil, nil
	}
	m := f.Message.Private
	if string(m.AuthenticatedData) != mimi.EphemeralAAD || m.Epoch != r.group.Epoch() {
		return nil, nil
	}
	b := new(store.Batch)
	ev, err := r.openEphemeral(b, f.Message)
	if err != nil {
		hash := sha256.Sum256(codec.Marshal(f.Message))
		c.log.Debug("ephemeral message discarded", "room", r.uri, "hash", fmt.Sprintf("%x", hash[:4]), "err", err)
	}
	if err := w.apply(c, b); err != nil || ev == nil {
		return nil, err
	}
	return []Event{ev}, nil
}

// openEphemeral decrypts a message and says what it tells. mu is held.
func (r *Room) openEphemeral(b *store.Batch, m *mls.MLSMessage) (Event, error) {
	received, err := r.group.Receive(b.Prefixed(r.key(roomGroup)), m)
	if err != nil {
		return nil, err
	}
	r.spent = true
	x, ok := received.(*mls.ApplicationMessage)
	if !ok {
		return nil, errors.New("not an application message")
	}
	user, client, err := r.c.identity(x.Leaf)
	if err != nil {
		return nil, err
	}
	if r.c.trust.flag(x.Leaf.Credential) == flagRevoked {
		return nil, errors.New("the sender is revoked")
	}
	e, err := mimi.ParseEphemeral(x.Data)
	if err != nil {
		return nil, err
	}
	if e.Kind == mimi.EphemeralReceipt {
		return Receipt{Room: r.uri, User: user, Client: client, Seq: e.Seq}, nil
	}
	return Typing{Room: r.uri, User: user, Client: client, On: e.Kind == mimi.EphemeralTyping}, nil
}
