package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// A new device can't read what was said in a room before it joined; another device of its user can give it that, as far as
// the room's chat_history_policy allows (draft-ietf-mimi-room-policy-03, Section 6.6). It puts what it has into encrypted
// assets of the own node and tells the new device their keys, in a message to the room that only that device can open
// (mimi.HistoryOffer). Everybody in the room learns that a device was given history, nobody else what.
//
// Both sides want it: the user gives it with ShareHistory, also where the policy would have it done without asking
// (automatically_share allows that and doesn't demand it), and takes it with TakeHistory. A device takes nothing but what it
// can't have: entries of the log from before it joined, or between two joinings, and that only from a device that was there
// when it joined. Whoever gets a device enrolled in a user's name, as the user's provider could, can't tell older devices
// what was said. Users don't give history to other users: the policy's roles_that_can_share isn't used.
//
// The hub can't see what is in a message and has nothing to enforce here.

// historyBound is how much is given at once: of more than that the oldest is left out.
type historyBound struct{ page, pages int }

// ShareHistory gives another device of this user, a member of the room, the messages of the room that this one has, as far as
// the room's policy allows: those since a time, and of more than 256 MiB the newest. It returns how many they are when the
// hub has the offer durably, or fails with ErrQueued like Send. The other device's TakeHistory has to be called before the
// own node deletes the assets, see Upload.
func (r *Room) ShareHistory(ctx context.Context, device mimi.URI, since time.Time) (messages int, err error) {
	n, err := r.shareHistory(ctx, device, since, historyBound{mimi.MaxHistoryPage, mimi.MaxHistoryPages})
	if err != nil {
		return 0, fmt.Errorf("client: give history of %s to %s: %w", r.uri, device, err)
	}
	return n, nil
}

func (r *Room) shareHistory(ctx context.Context, device mimi.URI, since time.Time, bound historyBound) (int, error) {
	r.mu.Lock()
	err := r.usable()
	var period time.Duration
	if err == nil {
		_, period, err = r.historyFor(device)
	}
	r.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if now := r.c.o.Time(); period > 0 && since.Before(now.Add(-period)) {
		since = now.Add(-period)
	}
	numbers, err := r.historySince(since, bound)
	if err != nil {
		return 0, err
	}
	if len(numbers) == 0 {
		return 0, errors.New("this device has nothing to give")
	}
	o := &outgoing{history: &givenHistory{device: device}}
	n := 0
	for _, page := range numbers {
		var list mimi.HistoryMessages
		if list, err = r.historyPage(page); err != nil {
			break
		}
		var part content.Part
		if part, err = r.c.upload(ctx, bytes.NewReader(codec.Marshal(list)), content.Bytes, ""); err != nil {
			break
		}
		o.history.pages = append(o.history.pages, pageOf(part.External))
		n += len(list)
	}
	if err == nil {
		_, err = r.send(ctx, o)
	}
	if err != nil && !errors.Is(err, ErrQueued) {
		r.c.deleteHistory(ctx, o.history.pages)
	}
	return n, err
}

// historyFor returns the member that is a device of this user, and for how long back it may be given what was said; 0 is for
// ever. mu is held.
func (r *Room) historyFor(device mimi.URI) (m mls.Member, period time.Duration, err error) {
	if len(r.group.MediaTypes()) == 0 {
		return m, 0, ErrPlain // the offer would be shown
	}
	ok, period, err := mimi.ShareHistory(r.group.Dictionary(), r.c.User(), true)
	switch {
	case err != nil:
		return m, 0, err
	case !ok:
		return m, 0, errHistoryForbidden
	}
	for m := range r.group.Members() {
		user, id, err := r.c.identity(m.Leaf)
		if err != nil || id != device {
			continue
		}
		switch {
		case user != r.c.User():
			return m, 0, fmt.Errorf("%s is a device of %s", device, user)
		case m.Index == r.group.OwnLeaf():
			return m, 0, errors.New("that is this device")
		}
		return m, period, nil
	}
	return m, 0, fmt.Errorf("%s isn't a member of the room", device)
}

var errHistoryForbidden = errors.New("the room's policy forbids to share history")

// historySince returns the numbers of the messages to be given, page by page.
func (r *Room) historySince(since time.Time, bound historyBound) ([][]uint64, error) {
	type sized struct {
		seq  uint64
		size int
	}
	var all []sized
	for after := uint64(0); ; {
		list, err := r.MessagesAfter(after, pageOfLog)
		if err != nil {
			return nil, err
		}
		for _, m := range list {
			if after = m.Seq; m.form != formBytes && !m.Time.Before(since) {
				all = append(all, sized{m.Seq, len(codec.Marshal(mimi.HistoryMessages{r.historyMessage(m)}))})
			}
		}
		if len(list) < pageOfLog {
			break
		}
	}
	var pages [][]uint64
	room := 0
	for _, m := range slices.Backward(all) {
		if room -= m.size; room < 0 {
			if len(pages) == bound.pages {
				break
			}
			pages, room = append(pages, nil), bound.page-headOfVector-m.size
		}
		pages[len(pages)-1] = append(pages[len(pages)-1], m.seq)
	}
	for _, page := range pages {
		slices.Reverse(page)
	}
	slices.Reverse(pages)
	return pages, nil
}

// headOfVector is the length of the longest length of a vector (RFC 9420, Section 2.1.2).
const headOfVector = 4

func (r *Room) historyMessage(m Message) mimi.HistoryMessage {
	return mimi.HistoryMessage{
		Seq: m.Seq, User: m.User, Client: m.Client, Time: uint64(m.Time.UnixMilli()), Moderates: m.moderates,
		Application: m.application, Frank: m.Frank,
	}
}

// historyPage reads messages, apart from those that have expired meanwhile.
func (r *Room) historyPage(numbers []uint64) (list mimi.HistoryMessages, err error) {
	for _, seq := range numbers {
		b, err := r.c.db.Get(r.key64(roomMessage, seq))
		if err != nil {
			return nil, err
		}
		if b == nil {
			continue
		}
		m, err := r.message(seq, b)
		if err != nil {
			return nil, err
		}
		h := r.historyMessage(m)
		due, err := r.due(seq)
		if err != nil {
			return nil, err
		}
		if due != unread {
			h.Expires = due
		}
		list = append(list, h)
	}
	return list, nil
}

// deleteHistory deletes assets, as far as that can be done now; the node does it later.
func (c *Client) deleteHistory(ctx context.Context, pages mimi.HistoryPages) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), maxRetry)
	defer cancel()
	for _, p := range pages {
		if _, err := call(ctx, c.session, c.session.service.DeleteAsset, &api.DeleteAssetRequest{Hash: p.Hash[:]}); err != nil {
			c.log.Warn("an asset of history isn't deleted", "hash", fmt.Sprintf("%x", p.Hash[:4]), "err", err)
		}
	}
}

// givenHistory is history for a device, as it is in the outbox.
type givenHistory struct {
	device mimi.URI
	pages  mimi.HistoryPages
}

// MarshalMLS implements codec.Marshaler, for the store.
func (h givenHistory) MarshalMLS(w *codec.Writer) {
	h.device.MarshalMLS(w)
	h.pages.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (h *givenHistory) UnmarshalMLS(r *codec.Reader) {
	h.device.UnmarshalMLS(r)
	h.pages.UnmarshalMLS(r)
}

// sealHistory returns the application data by which history is offered in this epoch. mu is held.
func (r *Room) sealHistory(h *givenHistory) ([]byte, error) {
	m, _, err := r.historyFor(h.device)
	if err != nil {
		return nil, err
	}
	offer, err := mimi.OfferHistory(r.c.o.Rand, r.group, r.c.ID(), m, h.pages)
	if err != nil {
		return nil, err
	}
	return codec.Marshal(mls.ApplicationFraming{MediaType: mimi.HistoryType(), Content: codec.Marshal(offer)}), nil
}

// withdraw takes history that can't be given any more out of the outbox, whose first entry it is. mu is held.
func (r *Room) withdraw(w *waits, reason error) error {
	o := r.outbox[0]
	b := new(store.Batch)
	b.Delete(r.key64(roomOutbox, o.number))
	r.outbox = r.outbox[1:]
	o.finish(0, reason)
	return w.apply(r.c, b)
}

// pageOf is what is told of an asset that Upload has made.
func pageOf(e *content.External) mimi.HistoryPage {
	return mimi.HistoryPage{
		Hash: [32]byte(e.ContentHash), Size: uint32(e.Size), Key: [16]byte(e.Key), Nonce: [12]byte(e.Nonce),
	}
}

// historyAsset fetches a page from the own node, checks and decrypts it.
func (r *Room) historyAsset(ctx context.Context, p mimi.HistoryPage) ([]byte, error) {
	part := &content.Part{Cardinality: content.ExternalPart, External: &content.External{
		URL: federation.AssetURL(r.c.User().Domain(), p.Hash), Size: uint64(p.Size), EncAlg: aeadAES128GCM, Key: p.Key[:], Nonce: p.Nonce[:],
		HashAlg: namedSHA256, ContentHash: p.Hash[:],
	}}
	return openAsset(part, func(url string, size uint64) ([]byte, error) {
		return r.c.pull(ctx, &api.DownloadAssetRequest{Room: string(r.uri), Url: url}, size)
	})
}

// historyRecord is what a client knows of a room's history that it doesn't have.
type historyRecord struct {
	gaps  []gap      // ascending
	from  []mimi.URI // other clients of this user that were members when this one joined
	offer *historyOffer
}

// gap is entries of a room's log that this client didn't get, from after+1 to upTo.
type gap struct{ after, upTo uint64 }

// historyOffer is an offer that isn't wholly taken yet.
type historyOffer struct {
	client mimi.URI
	seq    uint64 // number of the offer in the room's log
	time   uint64 // when the hub accepted it, ms since 1970
	next   uint32 // page to be taken next
	pages  mimi.HistoryPages
}

const (
	historyFormat = 1
	maxGaps       = 64 // of more than that the oldest is forgotten
)

// MarshalMLS implements codec.Marshaler, for the store.
func (h historyRecord) MarshalMLS(w *codec.Writer) {
	w.Uint8(historyFormat)
	codec.WriteVector(w, h.gaps, func(w *codec.Writer, g gap) {
		w.Uint64(g.after)
		w.Uint64(g.upTo)
	})
	codec.WriteVector(w, h.from, func(w *codec.Writer, u mimi.URI) { u.MarshalMLS(w) })
	w.Optional(h.offer != nil)
	if o := h.offer; o != nil {
		o.client.MarshalMLS(w)
		w.Uint64(o.seq)
		w.Uint64(o.time)
		w.Uint32(o.next)
		o.pages.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (h *historyRecord) UnmarshalMLS(r *codec.Reader) {
	if f := r.Uint8(); r.Err() == nil && f != historyFormat {
		r.Failf("record of history of format %d", f)
	}
	h.gaps = codec.ReadVector(r, func(r *codec.Reader) gap { return gap{r.Uint64(), r.Uint64()} })
	h.from = codec.ReadVector(r, func(r *codec.Reader) (u mimi.URI) { u.UnmarshalMLS(r); return u })
	if r.Optional() {
		o := new(historyOffer)
		o.client.UnmarshalMLS(r)
		o.seq, o.time, o.next = r.Uint64(), r.Uint64(), r.Uint32()
		o.pages.UnmarshalMLS(r)
		h.offer = o
	}
}

// history reads the record; that of a room which was entered before there were any has no gaps. mu is held.
func (r *Room) history() (h historyRecord, err error) {
	b, err := r.c.db.Get(r.key(roomHistory))
	if err == nil && b != nil {
		err = codec.Unmarshal(b, &h)
	}
	if err != nil {
		return h, fmt.Errorf("record of history: %w", err)
	}
	return h, nil
}

// noteGap notes that this client enters the room at an entry of its log: what is before, others of this user can give it.
// mu is held, and the header is that of before.
func (r *Room) noteGap(b *store.Batch, g *mls.Group, seq uint64) error {
	h, err := r.history()
	if err != nil {
		return err
	}
	if seq > r.header.cursor {
		h.gaps = append(h.gaps, gap{r.header.cursor, seq})
		h.gaps = h.gaps[max(0, len(h.gaps)-maxGaps):]
	}
	h.from = nil
	for m := range g.Members() {
		if user, id, err := r.c.identity(m.Leaf); err == nil && user == r.c.User() && id != r.c.ID() {
			h.from = append(h.from, id)
		}
	}
	b.Set(r.key(roomHistory), codec.Marshal(h))
	return nil
}

// offered notes an offer of history, if it is for this client; it is nothing that is shown.
func (e *entry) offered(m Message, application []byte) error {
	r := e.room
	var f mls.ApplicationFraming
	var o mimi.HistoryOffer
	if err := codec.Unmarshal(application, &f); err != nil {
		return err
	}
	if err := codec.Unmarshal(f.Content, &o); err != nil {
		return fmt.Errorf("offer of history: %w", err)
	}
	if m.Client == r.c.ID() || o.To != r.group.OwnLeaf() {
		return nil
	}
	ok, _, err := mimi.ShareHistory(r.group.Dictionary(), r.c.User(), true)
	if err != nil {
		return err
	}
	h, err := r.history()
	switch {
	case err != nil:
		return err
	case m.User != r.c.User():
		return errors.New("another user offers history")
	case !ok:
		return errHistoryForbidden
	case !slices.Contains(h.from, m.Client):
		return errors.New("a device that wasn't here before this one offers history")
	}
	pages, err := o.Open(r.group, m.Client)
	if err != nil {
		return err
	}
	h.offer = &historyOffer{client: m.Client, seq: e.seq, time: uint64(m.Time.UnixMilli()), pages: pages}
	e.state.Set(r.key(roomHistory), codec.Marshal(h))
	e.events = append(e.events, HistoryOffered{Room: r.uri, Client: m.Client})
	return nil
}

// HistoryOffer returns the device that offers history of the room which isn't wholly taken yet; "" if there is none.
func (r *Room) HistoryOffer() mimi.URI {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, err := r.history()
	switch {
	case err != nil:
		r.c.log.Error("reading an offer of history failed", "room", r.uri, "err", err)
	case h.offer != nil:
		return h.offer.client
	}
	return ""
}

// TakeHistory fetches what another device of this user has given to this one with ShareHistory, and returns how many
// messages are new here. They are among those of Messages and Posts, with Message.GivenBy, without events of their own.
// What this client has received itself stays as it is, and is what it has deleted. It fails with ErrNoHistory if there is no
// offer. What was fetched before it failed is kept, also over a restart; the next call goes on after that. Of several offers
// the last counts.
func (r *Room) TakeHistory(ctx context.Context) (messages int, err error) {
	n, err := r.takeHistory(ctx)
	if err != nil {
		return n, fmt.Errorf("client: take history of %s: %w", r.uri, err)
	}
	return n, nil
}

func (r *Room) takeHistory(ctx context.Context) (n int, err error) {
	r.mu.Lock()
	h, err := r.history()
	if gone := r.usable(); gone != nil {
		err = gone
	}
	r.mu.Unlock()
	if err != nil {
		return 0, err
	}
	o := h.offer
	if o == nil {
		return 0, ErrNoHistory
	}
	for ; int(o.next) < len(o.pages); o.next++ {
		b, err := r.historyAsset(ctx, o.pages[o.next])
		if err != nil {
			return n, err
		}
		var list mimi.HistoryMessages
		if err := codec.Unmarshal(b, &list); err != nil {
			return n, fmt.Errorf("page %d: %w", o.next+1, err)
		}
		took, err := r.takePage(o, list)
		if err != nil {
			return n, fmt.Errorf("page %d: %w", o.next+1, err)
		}
		n += took
	}
	if err := r.indexAll(); err != nil { // what came here belongs to what was given now
		return n, err
	}
	r.c.deleteHistory(ctx, o.pages)
	return n, r.settleOffer(o)
}

// takePage keeps the messages of a page of an offer, durably.
func (r *Room) takePage(o *historyOffer, list mimi.HistoryMessages) (n int, err error) {
	b := new(store.Batch)
	var w waits
	r.mu.Lock()
	h, err := r.presentOffer(o)
	if err == nil {
		n, err = r.importAll(b, h, list)
	}
	if err == nil {
		h.offer.next++
		b.Set(r.key(roomHistory), codec.Marshal(h))
		err = w.apply(r.c, b)
		r.c.expireSoon()
	}
	r.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return n, w.wait()
}

// presentOffer reads the record again, which must have the offer as it was. mu is held.
func (r *Room) presentOffer(o *historyOffer) (historyRecord, error) {
	h, err := r.history()
	switch {
	case err != nil:
	case r.usable() != nil:
		err = r.usable()
	case h.offer == nil || h.offer.seq != o.seq || h.offer.next != o.next:
		err = errors.New("another offer came, or this one is taken twice at once")
	}
	return h, err
}

// settleOffer forgets an offer of which all was taken.
func (r *Room) settleOffer(o *historyOffer) error {
	b := new(store.Batch)
	var w waits
	r.mu.Lock()
	h, err := r.presentOffer(o)
	if err == nil {
		h.offer = nil
		b.Set(r.key(roomHistory), codec.Marshal(h))
		err = w.apply(r.c, b)
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	return w.wait()
}

// importAll judges messages that another device has given. What is malformed has the whole page refused; what this client
// isn't to have, or has, is passed over. mu is held.
func (r *Room) importAll(b *store.Batch, h historyRecord, list mimi.HistoryMessages) (n int, err error) {
	ok, period, err := mimi.ShareHistory(r.group.Dictionary(), r.c.User(), true)
	switch {
	case err != nil:
		return 0, err
	case !ok:
		return 0, errHistoryForbidden
	}
	policy, err := r.expirationPolicy()
	if err != nil {
		return 0, err
	}
	ids := make(map[content.MessageID]bool)
	for i := range list {
		x := &list[i]
		m := Message{
			Room: r.uri, Seq: x.Seq, User: x.User, Client: x.Client, Time: time.UnixMilli(int64(x.Time)), GivenBy: h.offer.client,
			moderates: x.Moderates,
		}
		if !h.lacks(x.Seq) || mimi.TooOld(m.Time, time.UnixMilli(int64(h.offer.time)), period) {
			continue
		}
		if have, err := r.c.db.Get(r.key64(roomMessage, x.Seq)); err != nil {
			return 0, err
		} else if have != nil {
			continue
		}
		form := r.formOf(x.Application)
		if form != formFramed && form != formContent {
			return 0, fmt.Errorf("message %d is none", x.Seq)
		}
		if err := m.read(form, x.Application); err != nil {
			return 0, fmt.Errorf("message %d: %w", x.Seq, err)
		}
		due := x.Expires
		if m.Content != nil {
			seq, err := r.seqOf(m.ID)
			if err != nil {
				return 0, err
			}
			if seq != 0 || ids[m.ID] {
				continue
			}
			if err := m.Content.CheckExpiry(m.Time); err != nil {
				return 0, fmt.Errorf("message %d: %w", x.Seq, err)
			}
			if d := dueBy(policy, m.Content.Expires, m.Time); due == 0 || d != 0 && d < due {
				due = d
			}
		}
		if due != 0 && due <= uint64(r.c.o.Time().Unix()) {
			continue
		}
		if m.Content != nil {
			ids[m.ID] = true
			b.Set(r.key(roomMessageID, m.ID[:]...), binary.BigEndian.AppendUint64(nil, m.Seq))
		}
		if due != 0 {
			r.setDue(b, m.Seq, 0, due)
		}
		r.takeGivenFrank(&m, x.Frank)
		b.Set(r.key64(roomMessage, m.Seq), codec.Marshal(message(m)))
		n++
	}
	return n, nil
}

// lacks says whether an entry of the log is one that this client couldn't get itself.
func (h *historyRecord) lacks(seq uint64) bool {
	return slices.ContainsFunc(h.gaps, func(g gap) bool { return seq > g.after && seq <= g.upTo })
}
