package client

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// MaxText is the length in bytes of the longest message.
const MaxText = 256 << 10

// maxContent is the length of the longest MIMI content message, in bytes.
const maxContent = MaxText + 4<<10

// outgoing is a message in the outbox.
type outgoing struct {
	number    uint64
	text      []byte
	content   []byte            // MIMI content message; nil if the text wasn't put into one yet
	history   *givenHistory     // instead of a message, history for a device
	submit    []byte            // SubmitMessageRequest; nil if it isn't encrypted yet
	key       *uint32           // generation of the key that encrypted it; nil if an earlier release did
	hash      [sha256.Size]byte // of the MLSMessage in it
	ready     bool              // durable, so that it may leave
	notBefore uint64            // epoch from which on it can be sent
	done      chan result       // has room for one
}

type result struct {
	seq uint64
	err error
}

// finish tells who waits, once.
func (o *outgoing) finish(seq uint64, err error) {
	select {
	case o.done <- result{seq, err}:
	default:
	}
}

// MarshalMLS implements codec.Marshaler, for the store.
func (o outgoing) MarshalMLS(w *codec.Writer) {
	w.Opaque(o.text)
	w.Opaque(o.submit)
	w.Raw(o.hash[:])
	w.Optional(o.key != nil)
	if o.key != nil {
		w.Uint32(*o.key)
	}
	w.Opaque(o.content)
	w.Optional(o.history != nil)
	if o.history != nil {
		o.history.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (o *outgoing) UnmarshalMLS(r *codec.Reader) {
	o.text = r.Opaque()
	if b := r.Opaque(); len(b) > 0 {
		o.submit = b
	}
	copy(o.hash[:], r.Raw(len(o.hash)))
	if !r.Empty() && r.Optional() { // the first format ends before
		generation := r.Uint32()
		o.key = &generation
	}
	if !r.Empty() { // the second format ends before
		if b := r.Opaque(); len(b) > 0 {
			o.content = b
		}
	}
	if !r.Empty() && r.Optional() { // the third format ends before
		o.history = new(givenHistory)
		o.history.UnmarshalMLS(r)
	}
}

func (r *Room) loadOutbox() error {
	var bad error
	err := store.ScanPrefix(r.c.db, r.key(roomOutbox), func(key, value []byte) bool {
		o := &outgoing{ready: true, done: make(chan result, 1)}
		if bad = codec.Unmarshal(value, o); bad != nil || len(key) != 8 {
			bad = fmt.Errorf("outbox: entry %x: %w", key, bad)
			return false
		}
		o.number = binary.BigEndian.Uint64(key)
		r.nextOut = o.number + 1
		r.outbox = append(r.outbox, o)
		return true
	})
	return errors.Join(err, bad)
}

// Send sends a message of at most MaxText bytes to the room and returns its number in the room's log when the hub has
// it durably. The message is in the outbox before it leaves: if ctx ends first, the error wraps ErrQueued, and the
// message is sent as soon as it can be, also after a restart. Messages leave in the order of the calls. While the
// credential of a member isn't good (see Member) they wait until the member is removed or good again. ErrDiskFull says that the
// message isn't in the outbox.
func (r *Room) Send(ctx context.Context, text []byte) (seq uint64, err error) {
	if len(text) > MaxText {
		return 0, fmt.Errorf("client: a message of %d bytes is longer than %d", len(text), MaxText)
	}
	return r.send(ctx, &outgoing{text: append([]byte{}, text...)})
}

func (r *Room) send(ctx context.Context, o *outgoing) (seq uint64, err error) {
	if err := r.c.roomy(); err != nil {
		return 0, err
	}
	var w waits
	r.mu.Lock()
	err = r.queue(&w, o)
	r.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if err := w.wait(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	o.ready = true
	r.touch()
	r.mu.Unlock()
	select {
	case res := <-o.done:
		return res.seq, res.err
	case <-ctx.Done():
		return 0, fmt.Errorf("client: send to %s: %w: %w", r.uri, ErrQueued, ctx.Err())
	}
}

// queue puts a message into the outbox, encrypted if it can leave at once. mu is held.
func (r *Room) queue(w *waits, o *outgoing) error {
	if err := r.usable(); err != nil {
		return err
	}
	if o.content == nil { // checkContent asks for what has content
		if _, err := r.permits(r.c.User(), nil); err != nil {
			return fmt.Errorf("client: send to %s: %w", r.uri, err)
		}
	}
	o.number, o.done = r.nextOut, make(chan result, 1)
	b := new(store.Batch)
	if len(r.outbox) == 0 && r.staged == nil && !r.held() && r.fresh {
		if err := r.seal(b, o); err != nil {
			return err
		}
	}
	b.Set(r.key64(roomOutbox, o.number), codec.Marshal(o))
	if err := w.apply(r.c, b); err != nil {
		return err
	}
	r.nextOut++
	r.outbox = append(r.outbox, o)
	return nil
}

// seal encrypts a message; its application data is kept for when the ciphertext comes back in the log. mu is held, and
// the room is fresh.
func (r *Room) seal(b *store.Batch, o *outgoing) error {
	data, aad, err := r.applicationData(o)
	if err != nil {
		return fmt.Errorf("client: send to %s: %w", r.uri, err)
	}
	generation := r.group.Generation()
	m, err := r.group.Encrypt(b.Prefixed(r.key(roomGroup)), aad, data)
	if err != nil {
		return fmt.Errorf("client: encrypt for %s: %w", r.uri, err)
	}
	r.spent = true
	o.key = &generation
	o.hash = sha256.Sum256(codec.Marshal(m))
	o.submit = codec.Marshal(&mimi.SubmitMessageRequest{Message: m, Sender: r.c.User()})
	b.Set(r.key(roomSealed, o.hash[:]...), data)
	return nil
}

// unseal gives up a ciphertext: the message is to be encrypted anew. mu is held.
func (r *Room) unseal(b *store.Batch, o *outgoing) {
	b.Delete(r.key(roomSealed, o.hash[:]...))
	o.submit, o.key = nil, nil
	b.Set(r.key64(roomOutbox, o.number), codec.Marshal(o))
}

// sendMessage submits the first message of the outbox, the same bytes until the hub answers.
func (r *Room) sendMessage(ctx context.Context) error {
	r.mu.Lock()
	if len(r.outbox) == 0 || r.usable() != nil {
		r.mu.Unlock()
		return nil
	}
	o := r.outbox[0]
	var w waits
	if !r.fresh {
		r.mu.Unlock()
		return nil
	}
	if o.submit == nil {
		b := new(store.Batch)
		err := r.seal(b, o)
		if err == nil {
			b.Set(r.key64(roomOutbox, o.number), codec.Marshal(o))
			err = w.apply(r.c, b)
		} else if o.history != nil {
			err = r.withdraw(&w, err)
			r.mu.Unlock()
			return errors.Join(err, w.wait())
		}
		if err != nil {
			r.mu.Unlock()
			return errors.Join(err, w.wait())
		}
	}
	submit, hash, generation := o.submit, o.hash, o.key
	r.mu.Unlock()
	if err := w.wait(); err != nil {
		return err
	}
	res, seq, err := r.c.submit(ctx, r.uri, submit, generation)
	if Code(err) == codeKeyUsed {
		r.askAgain()
		return nil
	}
	if err != nil && !permanent(err) {
		return err
	}
	r.mu.Lock()
	err = r.submitted(&w, hash, res, seq, err)
	r.touch()
	r.mu.Unlock()
	// The next message needn't wait for the disk: if this is lost in a crash, the same bytes get the same answer.
	r.c.workers.Go(func() {
		if err := w.wait(); err != nil {
			r.c.log.Error("syncing the outbox failed", "room", r.uri, "err", err)
		}
	})
	return err
}

// submitted takes the hub's answer to a message. mu is held.
func (r *Room) submitted(w *waits, hash [sha256.Size]byte, res *mimi.SubmitMessageResponse, seq uint64, err error) error {
	if len(r.outbox) == 0 || r.outbox[0].hash != hash {
		return nil // the log was faster
	}
	o := r.outbox[0]
	b := new(store.Batch)
	switch {
	case err == nil && res.Code == mimi.SubmitAccepted:
		r.sent(b, hash, seq)
		return w.apply(r.c, b)
	case err == nil && res.Code == mimi.SubmitEpochTooOld && res.CurrentEpoch > epochOf(o.submit):
		// These bytes are in no log and never will be: encrypt anew in the epoch that the hub is in.
		o.notBefore = res.CurrentEpoch
		r.unseal(b, o)
		return w.apply(r.c, b)
	case err == nil:
		err = &Refused{Code: res.Code.String()}
	}
	b.Delete(r.key(roomSealed, hash[:]...))
	b.Delete(r.key64(roomOutbox, o.number))
	r.outbox = r.outbox[1:]
	o.finish(0, fmt.Errorf("client: send to %s: %w", r.uri, err))
	return w.apply(r.c, b)
}

// epochOf returns the epoch in which a SubmitMessageRequest of this client was encrypted.
func epochOf(submit []byte) uint64 {
	var req mimi.SubmitMessageRequest
	if err := codec.Unmarshal(submit, &req); err != nil || req.Message == nil || req.Message.Private == nil {
		return 0
	}
	return req.Message.Private.Epoch
}

// sent takes a message that the hub has out of the outbox. mu is held.
func (r *Room) sent(b *store.Batch, hash [sha256.Size]byte, seq uint64) {
	for i, o := range r.outbox {
		if o.submit != nil && o.hash == hash {
			b.Delete(r.key64(roomOutbox, o.number))
			r.outbox = append(r.outbox[:i:i], r.outbox[i+1:]...)
			o.finish(seq, nil)
			return
		}
	}
}

// submit sends a SubmitMessageRequest to a room's hub, through the own node.
func (c *Client) submit(ctx context.Context, room mimi.URI, request []byte, generation *uint32) (*mimi.SubmitMessageResponse, uint64, error) {
	res, err := call(ctx, c.session, c.session.service.SubmitMessage, &api.MimiRequest{Room: string(room), Body: request, Generation: generation})
	if err != nil {
		return nil, 0, fmt.Errorf("client: submit to %s: %w", room, err)
	}
	answer := new(mimi.SubmitMessageResponse)
	if err := codec.Unmarshal(res.Body, answer); err != nil {
		return nil, 0, fmt.Errorf("client: the hub's answer to a message to %s: %w", room, err)
	}
	c.hearAnswer(room, answer.Code == mimi.SubmitAccepted, res.Head)
	return answer, res.Seq, nil
}

// Outbox returns the messages that the hub hasn't confirmed yet, oldest first.
func (r *Room) Outbox() [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	var texts [][]byte
	for _, o := range r.outbox {
		if o.history == nil {
			texts = append(texts, o.text)
		}
	}
	return texts
}

// Messages returns the room's messages that this client has, own ones too and without those that have expired, in the
// order of the room's log. Posts shows what edits, deletions and reactions make of them. It reads all of them; LastMessages
// and MessagesAfter read a part.
func (r *Room) Messages() []Message {
	expired, err := r.expired()
	var out []Message
	if err == nil {
		out, err = r.between(0, ^uint64(0), 0, expired)
	}
	if err != nil {
		r.c.log.Error("reading messages failed", "room", r.uri, "err", err)
	}
	return out
}

// SealMessage encrypts a message without sending it, and returns the SubmitMessageRequest that would be sent, for
// SubmitRaw of whomever. The node has noted by then that its key is used. When it turns up in the room's log it is
// delivered like any own message. It fails while a message of Send is under way.
func (r *Room) SealMessage(text []byte) (submit []byte, err error) {
	ctx := context.Background()
	if err = r.c.roomy(); err == nil {
		err = r.ask(ctx)
	}
	o := &outgoing{text: append([]byte{}, text...)}
	var w waits
	r.mu.Lock()
	if err == nil {
		err = r.usable()
	}
	switch {
	case err != nil:
	case !r.fresh:
		err = errors.New("this client has just entered the room anew")
	case r.sealedOut() != nil: // messages are submitted in the order of their keys
		err = errors.New("another message is under way")
	default:
		b := new(store.Batch)
		if err = r.seal(b, o); err == nil {
			err = w.apply(r.c, b)
		}
	}
	r.mu.Unlock()
	if e := w.wait(); err == nil {
		err = e
	}
	if err == nil {
		err = r.noteSent(ctx, o)
	}
	if err != nil {
		return nil, fmt.Errorf("client: encrypt for %s: %w", r.uri, err)
	}
	return o.submit, nil
}

// OpenRaw tries to decrypt a SubmitMessageRequest that was handed over out of band, and changes nothing. It fails with
// mls.ErrRemoved for a former member.
func (r *Room) OpenRaw(submit []byte) ([]byte, error) {
	var req mimi.SubmitMessageRequest
	if err := codec.Unmarshal(submit, &req); err != nil {
		return nil, fmt.Errorf("client: open a message: %w", err)
	}
	r.mu.Lock()
	g, err := r.copyGroup()
	r.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("client: open a message: %w", err)
	}
	received, err := g.Receive(nil, req.Message)
	if err != nil {
		return nil, fmt.Errorf("client: open a message: %w", err)
	}
	x, ok := received.(*mls.ApplicationMessage)
	if !ok {
		return nil, errors.New("client: open a message: not an application message")
	}
	r.mu.Lock()
	form := r.formOf(x.Data)
	r.mu.Unlock()
	m := Message{Room: r.uri}
	if err := m.read(form, x.Data); err != nil {
		return nil, fmt.Errorf("client: open a message: %w", err)
	}
	return m.Data, nil
}

// StageUpdate makes a commit with fresh keys of this client without sending it, and returns the UpdateRequest that
// would be sent, for UpdateRaw. The next change of the room by this client drops it.
func (r *Room) StageUpdate(ctx context.Context) (update []byte, err error) {
	if err := r.c.roomy(); err != nil {
		return nil, err
	}
	if err := r.await(ctx, func() bool { return r.staged == nil || r.staged.hold || r.usable() != nil }); err != nil {
		return nil, err
	}
	var w waits
	r.mu.Lock()
	if r.staged != nil && !r.staged.hold {
		err = errors.New("client: another change of the room is under way")
	} else {
		var s *staged
		if s, err = r.stage(&w, &job{build: buildUpdate, done: make(chan error, 1)}, true); err == nil {
			update = s.request
		}
	}
	r.mu.Unlock()
	if e := w.wait(); err == nil {
		err = e
	}
	return update, err
}

// SubmitRaw submits a SubmitMessageRequest, of whomever, to a room's hub through this client's node. It says nothing of
// the key, which SealMessage has had noted where the message was encrypted.
func (c *Client) SubmitRaw(ctx context.Context, room mimi.URI, body []byte) (*mimi.SubmitMessageResponse, error) {
	res, _, err := c.submit(ctx, room, body, nil)
	return res, err
}

// UpdateRaw submits an UpdateRequest, of whomever, to a room's hub through this client's node.
func (c *Client) UpdateRaw(ctx context.Context, room mimi.URI, body []byte) (*mimi.UpdateRoomResponse, error) {
	res, _, err := c.update(ctx, room, body)
	return res, err
}

// Readdress returns a SubmitMessageRequest with the same ciphertext and another sender towards the hub.
func Readdress(submit []byte, sender mimi.URI) ([]byte, error) {
	var req mimi.SubmitMessageRequest
	if err := codec.Unmarshal(submit, &req); err != nil {
		return nil, fmt.Errorf("client: readdress a message: %w", err)
	}
	req.Sender = sender
	return codec.Marshal(&req), nil
}
