package client

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// errGap says that the node left out an entry of a room's log.
var errGap = errors.New("an entry of the room's log is missing")

// receive processes one entry of the room's log: its effects, the cursor and what it settles are one atomic batch.
// Entries that were processed before change nothing. What it returns may be told once w is durable.
func (r *Room) receive(w *waits, x *api.LogEntry) ([]Event, error) {
	seq := x.Seq
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.usable() != nil || seq <= r.header.cursor {
		return nil, nil
	}
	if seq != r.header.cursor+1 {
		if r.stray++; r.stray < 3 {
			return nil, fmt.Errorf("client: %w: %s: got %d after %d", errGap, r.uri, seq, r.header.cursor)
		}
		return r.freeze(seq, fmt.Errorf("%w: got %d after %d", errGap, seq, r.header.cursor)), nil
	}
	r.stray = 0
	e := entry{room: r, seq: seq, state: new(store.Batch)}
	e.group = e.state.Prefixed(r.key(roomGroup))
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(x.Fanout, &f); err != nil {
		e.discard("", fmt.Errorf("malformed: %w", err))
	} else if err := e.process(&f); err != nil {
		return r.freeze(seq, err), nil
	}
	r.header.cursor = seq
	e.extend(x)
	r.saveHeader(e.state)
	if err := w.apply(r.c, e.state); err != nil {
		return nil, err
	}
	if e.expires {
		r.c.expireSoon()
	}
	r.schedule()
	r.touch()
	return e.events, nil
}

// freeze stops the room before the entry seq. mu is held.
func (r *Room) freeze(seq uint64, err error) []Event {
	r.frozen = fmt.Errorf("client: %w: %s, entry %d: %w", ErrFrozen, r.uri, seq, err)
	r.behind = errors.Is(err, mls.ErrOwnMessage) // a commit of this client's that it doesn't know
	r.c.log.Error("room frozen", "room", r.uri, "seq", seq, "err", err)
	r.touch()
	return []Event{Frozen{Room: r.uri, Seq: seq, Err: r.frozen}}
}

// entry is one entry of a room's log while it is processed. The room's mu is held.
type entry struct {
	room   *Room
	seq    uint64
	state  *store.Batch
	group  store.PrefixedBatch
	events []Event
	time   time.Time             // when the hub accepted it
	made   []mls.PendingProposal // proposals of it that are pending now

	expires   bool // it is a message that does
	elsewhere bool // it led to an epoch that this client wasn't in
}

func (e *entry) discard(client mimi.URI, reason error) {
	e.events = append(e.events, Discarded{Room: e.room.uri, Seq: e.seq, Client: client, Reason: reason.Error()})
}

// process fails if the room has to be frozen: the hub ordered a commit that this client can't follow.
func (e *entry) process(f *mimi.FanoutMessage) error {
	m := f.Message
	e.time = time.UnixMilli(int64(min(f.Timestamp, 1<<53)))
	switch {
	case m == nil:
		e.discard("", errors.New("no message"))
	case m.Private != nil:
		return e.application(f)
	case m.Public != nil && m.Public.Content.ContentType == mls.ContentCommit:
		if err := e.commit(m); err != nil {
			return err
		}
		// The hub's Removes that an external commit invalidated, made anew for the new epoch.
		for _, p := range f.ExternalProposals {
			e.proposal(p)
		}
		e.proposed()
	case m.Public != nil:
		e.proposal(m)
		for _, p := range f.MoreProposals {
			e.proposal(p)
		}
		e.proposed()
	default:
		e.discard("", fmt.Errorf("wire format %d in a room's log", m.WireFormat))
	}
	return nil
}

// proposal notes a proposal. One that isn't valid has no effect: whoever commits leaves it out.
func (e *entry) proposal(m *mls.MLSMessage) {
	r := e.room
	if !r.group.Active() {
		return
	}
	received, err := r.group.Receive(e.group, m)
	if err != nil {
		e.discard("", fmt.Errorf("proposal: %w", err))
		return
	}
	if p, ok := received.(*mls.ReceivedProposal); ok {
		e.made = append(e.made, p.PendingProposal)
	}
}

// commit applies a commit.
func (e *entry) commit(m *mls.MLSMessage) error {
	r := e.room
	received, err := r.group.Receive(e.group, m)
	if errors.Is(err, mls.ErrEpoch) && m.Public.Content.Sender.Type == mls.SenderNewMemberCommit && m.Public.Content.Epoch+1 == r.group.Epoch() {
		return nil // the one with which this client has joined
	}
	if errors.Is(err, mls.ErrEpoch) && m.Public.Content.Epoch < r.group.Epoch() {
		e.discard("", err) // of an epoch that this client joined after
		e.elsewhere = true
		return nil
	}
	if err != nil {
		return err
	}
	switch x := received.(type) {
	case *mls.OwnCommit:
		info := x.Commit.Info()
		if err := r.group.Confirm(e.group); err != nil {
			return err
		}
		e.changed(info)
		r.settled(e.state, true)
	case *mls.StagedCommit:
		info := x.Info()
		if err := r.group.Apply(e.group, x); err != nil {
			return err
		}
		e.changed(info)
		r.settled(e.state, false)
		if info.SelfRemoved {
			e.removed()
		}
	case *mls.Duplicate:
	}
	return nil
}

// changed notes what a commit did to the membership.
func (e *entry) changed(info *mls.StagedInfo) {
	r := e.room
	r.commitAt = time.Time{}
	e.noteRenewed(info)
	if !info.External {
		r.forgetLeavers(e.state)
	}
	if l := r.leaving; l != nil && l.accepted && l.epoch+1 == info.Epoch && !info.SelfRemoved && (l.self || !info.External) {
		e.events = append(e.events, HubFault{Room: r.uri, Seq: e.seq, Reason: faultLeave})
	}
	begun := Committed{Room: r.uri, Seq: e.seq, Epoch: info.Epoch, Authenticator: r.group.EpochAuthenticator()}
	if m, ok := r.group.Member(info.Committer); ok {
		begun.User, begun.Client, _ = r.c.identity(m.Leaf) // known, for the policy has passed the commit
	}
	e.events = append(e.events, begun)
	for _, m := range info.Removed {
		if user, id, err := r.c.identity(m.Leaf); err == nil {
			delete(r.flags, id)
			e.events = append(e.events, MemberRemoved{Room: r.uri, Epoch: info.Epoch, User: user, Client: id})
		}
	}
	for _, m := range info.Added {
		r.judgeLeaf(m.Leaf)
		if user, id, err := r.c.identity(m.Leaf); err == nil {
			external := info.External && m.Index == info.Committer
			e.events = append(e.events, MemberAdded{Room: r.uri, Epoch: info.Epoch, User: user, Client: id, External: external})
		}
	}
	for _, u := range info.Updated {
		r.judgeLeaf(u.New)
	}
}

// removed ends this client's membership.
func (e *entry) removed() {
	r := e.room
	r.header.left, r.header.told, r.header.leaving = true, false, false
	e.state.Delete(r.key(roomLeave))
	if l := r.leaving; l != nil {
		l.finish(nil)
		r.leaving = nil
	}
	err := fmt.Errorf("client: %w: %s", ErrNotMember, r.uri)
	r.failAll(err)
	for _, o := range r.outbox {
		e.state.Delete(r.key64(roomOutbox, o.number))
	}
	r.outbox = nil
	clear(r.flags)
	e.events = append(e.events, Removed{Room: r.uri})
}

// application delivers a message. A message that was sent from here is known by its hash, since the key that could
// decrypt it is gone.
func (e *entry) application(f *mimi.FanoutMessage) error {
	r, m := e.room, f.Message
	msg := Message{Room: r.uri, Seq: e.seq, Time: time.UnixMilli(int64(f.Timestamp))}
	hash := sha256.Sum256(codec.Marshal(m))
	data, err := r.c.db.Get(r.key(roomSealed, hash[:]...))
	if err != nil {
		return fmt.Errorf("read the outbox: %w", err)
	}
	if data != nil {
		msg.User, msg.Client = r.c.User(), r.c.ID()
		e.state.Delete(r.key(roomSealed, hash[:]...))
		e.deliver(msg, f, m.Private.AuthenticatedData, data)
		r.sent(e.state, hash, e.seq)
		return nil
	}
	received, err := r.group.Receive(e.group, m)
	if err != nil {
		e.discard("", err)
		return nil
	}
	r.spent = true
	x, ok := received.(*mls.ApplicationMessage)
	if !ok {
		e.discard("", errors.New("a handshake in a private message"))
		return nil
	}
	if string(x.AAD) == mimi.EphemeralAAD {
		e.discard("", errors.New("an ephemeral message in the log"))
		return nil
	}
	if msg.User, msg.Client, err = r.c.identity(x.Leaf); err != nil {
		e.discard("", err)
		return nil
	}
	if msg.Flag = r.c.trust.flag(x.Leaf.Credential); msg.Flag == flagRevoked {
		e.discard(msg.Client, errors.New("the sender is revoked"))
		return nil
	}
	r.hear(msg.Client, x.AAD, e.seq)
	e.deliver(msg, f, x.AAD, x.Data)
	return nil
}

// deliver keeps and tells a message of that application data, unless it is to be discarded.
func (e *entry) deliver(m Message, f *mimi.FanoutMessage, aad, application []byte) {
	form := e.room.formOf(application)
	if form == formHistory {
		if err := e.offered(m, application); err != nil {
			e.discard(m.Client, err)
		}
		return
	}
	if err := e.accept(&m, form, application); err != nil {
		e.discard(m.Client, err)
		return
	}
	e.room.takeFrank(&m, aad, f.Frank, f.Timestamp)
	e.state.Set(e.room.key64(roomMessage, m.Seq), codec.Marshal(message(m)))
	e.events = append(e.events, m)
}

// message is a Message as it is stored.
type message Message

// MarshalMLS implements codec.Marshaler, for the store.
func (m message) MarshalMLS(w *codec.Writer) {
	w.Opaque([]byte(m.User))
	w.Opaque([]byte(m.Client))
	w.Uint64(uint64(m.Time.UnixMilli()))
	w.Opaque(m.application)
	w.Opaque([]byte(m.Flag))
	w.Uint8(m.form)
	w.Opaque([]byte(m.FrankFault))
	w.Optional(m.Frank != nil)
	if m.Frank != nil {
		m.Frank.MarshalMLS(w)
	}
	w.Optional(m.moderates)
	w.Opaque([]byte(m.GivenBy))
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *message) UnmarshalMLS(r *codec.Reader) {
	m.User = mimi.URI(r.Opaque())
	m.Client = mimi.URI(r.Opaque())
	m.Time = time.UnixMilli(int64(r.Uint64()))
	m.application = r.Opaque()
	m.Flag = string(r.Opaque())
	if r.Empty() { // the first format ends here
		m.form = formBytes
		return
	}
	m.form = r.Uint8()
	m.FrankFault = string(r.Opaque())
	if r.Optional() {
		m.Frank = new(mimi.Frank)
		m.Frank.UnmarshalMLS(r)
	}
	if !r.Empty() { // the second format ends before
		m.moderates = r.Optional()
		m.GivenBy = mimi.URI(r.Opaque())
	}
}
