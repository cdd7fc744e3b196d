package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// The messages of a room are MIMI content (draft-ietf-mimi-content) if its GroupContext lists that media type, as that of
// every new room does. Those of older rooms are bytes, without IDs: nothing can refer to them.

// ErrPlain says that a room's messages are bytes, and can't be replied to, edited or deleted.
var ErrPlain = errors.New("the room's messages have no format")

// Compose returns a message of this user for the room: with a body, and nothing else set.
func (r *Room) Compose(body content.Part) *content.Message {
	return content.New(r.c.User(), r.uri, body)
}

// SendContent sends a message that Compose made, like Send. It fails with ErrPlain in a room whose messages are bytes. A
// message that replaces another names the first version of it. What the user's role doesn't allow isn't sent. Assets
// are such as the room's policy and the user's role allow; the error wraps a *mimi.PolicyError if they aren't. Where the
// room's policy has messages expire, one that doesn't say when is made to.
func (r *Room) SendContent(ctx context.Context, m *content.Message) (seq uint64, err error) {
	b, err := r.checkContent(m)
	if err != nil {
		return 0, fmt.Errorf("client: send to %s: %w", r.uri, err)
	}
	text, _ := m.Body.Text()
	return r.send(ctx, &outgoing{text: []byte(text), content: b})
}

func (r *Room) checkContent(m *content.Message) ([]byte, error) {
	r.mu.Lock()
	err := r.fitExpiry(m)
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	b, err := m.Encode()
	switch {
	case err != nil:
		return nil, err
	case len(b) > maxContent:
		return nil, fmt.Errorf("a message of %d bytes is longer than %d", len(b), maxContent)
	case m.Sender != r.c.User() || m.Room != r.uri:
		return nil, errors.New("the message was composed by another user or for another room")
	}
	if err := m.CheckExpiry(r.c.o.Time()); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.usable(); err != nil {
		return nil, err
	}
	if len(r.group.MediaTypes()) == 0 {
		return nil, ErrPlain
	}
	if err := mayUpload(r.group.Dictionary(), m); err != nil {
		return nil, err
	}
	if _, err := r.permits(r.c.User(), m); err != nil {
		return nil, err
	}
	return b, r.mayReplace(m)
}

// mayReplace refuses an edit of a message that was here and is gone.
func (r *Room) mayReplace(m *content.Message) error {
	if m.Replaces.IsZero() || m.Deletes() {
		return nil
	}
	_, ok := r.Find(m.Replaces)
	seq, err := r.seqOf(m.Replaces)
	if err == nil && !ok && seq != 0 {
		err = errors.New("replaces a message that has expired")
	}
	return err
}

// Find returns the message of an ID, and whether this client has it.
func (r *Room) Find(id content.MessageID) (Message, bool) {
	seq, err := r.seqOf(id)
	if err != nil || seq == 0 {
		return Message{}, false
	}
	b, err := r.c.db.Get(r.key64(roomMessage, seq))
	if err != nil || b == nil {
		return Message{}, false
	}
	at, err := r.placeAt(seq)
	if err != nil {
		return Message{}, false
	}
	if at == nil {
		at = &place{post: seq}
	}
	for _, s := range []uint64{seq, at.post} {
		if due, err := r.due(s); err != nil || due != 0 && due <= uint64(r.c.o.Time().Unix()) {
			return Message{}, false
		}
	}
	m, err := r.message(seq, b)
	return m, err == nil
}

// seqOf returns the number of the message of an ID, 0 if there is none.
func (r *Room) seqOf(id content.MessageID) (uint64, error) {
	b, err := r.c.db.Get(r.key(roomMessageID, id[:]...))
	if err != nil || len(b) != 8 {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// applicationData is what is encrypted of a message, and the authenticated data that goes with it: a franking tag if the
// room has an agent, and a claim of the log's head. mu is held.
func (r *Room) applicationData(o *outgoing) (data, aad []byte, err error) {
	types := r.group.MediaTypes()
	switch {
	case len(types) == 0 && (o.content != nil || o.history != nil):
		return nil, nil, ErrPlain
	case len(types) == 0:
		aad, err = r.claimed(nil)
		return o.text, aad, err
	case !types.Has(mimi.ContentType()):
		return nil, nil, errors.New("the room doesn't have the messages of this client")
	case o.history != nil:
		if data, err = r.sealHistory(o.history); err == nil {
			aad, err = r.claimed(nil)
		}
		return data, aad, err
	}
	if o.content == nil {
		m := r.Compose(content.Body(o.text))
		if err := r.fitExpiry(m); err != nil {
			return nil, nil, err
		}
		if o.content, err = m.Encode(); err != nil {
			return nil, nil, err
		}
	}
	data = codec.Marshal(mls.ApplicationFraming{MediaType: mimi.ContentType(), Content: o.content})
	if r.frankingAgent() == nil {
		aad, err = r.claimed(nil)
		return data, aad, err
	}
	m, err := content.Parse(o.content)
	if err != nil {
		return nil, nil, err
	}
	aad, err = r.claimed(mimi.TaggedAAD(mimi.FrankingTag(m.Salt[:], data)))
	return data, aad, err
}

// The forms of application data.
const (
	formBytes   = 0 // of a room without media types
	formFramed  = 1 // an mls.ApplicationFraming of another media type
	formContent = 2 // an mls.ApplicationFraming of mimi.ContentType
	formHistory = 3 // an mls.ApplicationFraming of mimi.HistoryType; never stored
)

// read fills what follows from a message's application data. It fails if that doesn't decode.
func (m *Message) read(form uint8, application []byte) error {
	m.form, m.application = form, application
	if form == formBytes {
		m.Data = application
		return nil
	}
	var f mls.ApplicationFraming
	if err := codec.Unmarshal(application, &f); err != nil {
		return err
	}
	if form == formFramed {
		m.Data = f.Content
		return nil
	}
	c, err := content.Parse(f.Content)
	if err != nil {
		return err
	}
	m.Content = c
	m.ID = content.ID(m.User, m.Room, f.Content, c.Salt)
	if m.Data = c.Body.Content; c.Body.Cardinality != content.SinglePart {
		text, _ := c.Body.Text()
		m.Data = []byte(text)
	}
	return nil
}

// formOf tells the form of application data in the present group. mu is held.
func (r *Room) formOf(application []byte) uint8 {
	types := r.group.MediaTypes()
	var f mls.ApplicationFraming
	switch {
	case len(types) == 0:
		return formBytes
	case codec.Unmarshal(application, &f) != nil:
		return formFramed
	case f.MediaType.Type == "":
		f.MediaType = types[0]
	}
	switch {
	case f.MediaType.Equal(mimi.ContentType()):
		return formContent
	case f.MediaType.Equal(mimi.HistoryType()):
		return formHistory
	}
	return formFramed
}

// accept reads a message's application data and judges what it says. What fails isn't shown.
func (e *entry) accept(m *Message, form uint8, application []byte) error {
	r := e.room
	if err := m.read(form, application); err != nil {
		return err
	}
	var err error
	if m.moderates, err = r.permits(m.User, m.Content); err != nil {
		return err
	}
	if m.Content == nil {
		return nil
	}
	if seq, err := r.seqOf(m.ID); err != nil {
		return err
	} else if seq != 0 {
		return fmt.Errorf("has the ID of message %d", seq)
	}
	if err := m.Content.CheckExpiry(m.Time); err != nil {
		return err
	}
	policy, err := r.expirationPolicy()
	if err != nil {
		return err
	}
	due := dueBy(policy, m.Content.Expires, m.Time)
	if due != 0 && due <= uint64(r.c.o.Time().Unix()) {
		return errors.New("expired before it came")
	}
	if err := r.mayReplace(m.Content); err != nil {
		return err
	}
	if refused, ok := errors.AsType[*mimi.PolicyError](mayUpload(r.group.Dictionary(), m.Content)); ok {
		return refused
	}
	e.state.Set(r.key(roomMessageID, m.ID[:]...), binary.BigEndian.AppendUint64(nil, m.Seq))
	if due != 0 {
		r.setDue(e.state, m.Seq, 0, due)
		e.expires = true
	}
	return r.index(e.state, m)
}

// message reads a stored message.
func (r *Room) message(seq uint64, b []byte) (Message, error) {
	s := message{Room: r.uri, Seq: seq}
	if err := codec.Unmarshal(b, &s); err != nil {
		return Message{}, err
	}
	m := Message(s)
	return m, m.read(m.form, m.application)
}
