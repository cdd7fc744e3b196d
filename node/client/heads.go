package client

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// A client's side of package chain. The chain of a room's log is computed with each entry, with the contexts of the own
// group, and compared with the heads that the hub has signed: those that come with entries and with answers, through the
// own node, and those that members of the room claim inside of it, which no node can change.
//
//   - Heads are compared as they come. Of those that fit the last one's signature is verified, five times a second at
//     most, when what came is acknowledged; one that doesn't fit is verified at once, and a fault only if it is the hub's.
//     The log is taken as the node gives it; people decide what it is worth.
//   - A message has the last head that its sender has verified, with the hub's signature, if that is new and the sender
//     has made no such claim for claimEvery entries or claimInterval. That adds 120 bytes to the message where the hub has an
//     Ed25519 key, and at most 195 with ECDSA; signatures of ML-DSA are left out, which leaves 54. A client that has seen a
//     contradiction claims with every message, and always with the signature. Where the room's authenticated data isn't a
//     SafeAAD, nothing is claimed.
//   - A claim is compared when the log has come to its number, the last one of each client. A member's word alone proves
//     nothing: without the hub's signature it is told as what it is, with a wrong one it is passed over.
//   - What contradicts is a HubFault. Two heads of the hub that contradict each other become evidence, which Evidence
//     lists. A head of a later incarnation is a HubRestored, and what came before isn't compared with it.
//   - A hub that has never signed is one of plain MIMI, and nothing is asked of it. Once it has, there has to be a head
//     with each answer, and with the entries that a stream begins with; a stream that goes on without is begun anew.

const (
	keptLinks        = 1024 // of a room, to compare claims and to prove
	claimEvery       = 16   // entries
	claimInterval    = time.Minute
	maxClaimed       = 144  // bytes of a signature in a claim, unless there is a contradiction
	maxHeard         = 256  // clients of a room whose claims wait
	maxEvidence      = 16   // about one room
	maxUnsigned      = 4096 // entries after which a stream has to show that the hub still signs
	faultUnsigned    = "the hub has signed its log before, and what comes now is not signed"
	faultIncarnation = "the hub goes on as it was before its store was restored"
	faultOther       = "the hub has signed another log than the one that came here"
)

// ledger is what a client knows of how a hub has ordered a room's log. Room.mu guards it.
type ledger struct {
	hubRecord
	dirty bool       // the hubRecord isn't in the store yet: it goes there with the next entry, or when the client is closed
	known bool       // chain is
	chain chain.Hash // at the room's cursor
	group *mls.Group // whose context hash is that of epoch
	epoch uint64
	hash  chain.Hash
	said  *said // what the node says of the chain before the first entry of the stream, if it isn't the one here

	fits, differs *chain.Signed // the last heads that came since the last check, as they compare with the chain
	heard         map[mimi.URI]*heard
	told          map[string]bool // faults that were told of, by client and reason
	disputed      bool            // somebody has another history
	unsigned      int             // entries since the last head
	headed        bool            // a head came in this stream
	mute          bool            // an answer had no head

	claimed   chain.Place // the last own claim
	claimedAt time.Time
}

type said struct {
	seq   uint64
	chain chain.Hash
}

// heard is a head that somebody says the hub has signed.
type heard struct {
	chain.Claim
	at   uint64 // the number of the message with it
	told bool   // that it contradicts what is known
}

// hubRecord is what is stored of a hub's heads of a room.
type hubRecord struct {
	verified *chain.Signed // the last head whose signature was verified; nil if there is none
	fault    string        // the last HubFault; "" if there is none
	proven   bool          // there is evidence against the present incarnation
}

// MarshalMLS implements codec.Marshaler, for the store.
func (h hubRecord) MarshalMLS(w *codec.Writer) {
	w.Optional(h.verified != nil)
	if h.verified != nil {
		h.verified.MarshalMLS(w)
	}
	w.Opaque([]byte(h.fault))
	w.Optional(h.proven)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (h *hubRecord) UnmarshalMLS(r *codec.Reader) {
	*h = hubRecord{}
	if r.Optional() {
		h.verified = new(chain.Signed)
		h.verified.UnmarshalMLS(r)
	}
	h.fault = string(r.Opaque())
	h.proven = r.Optional()
}

// linkRecord is the chain at an entry of a log, and the link that led there; none at the entry before the first one.
type linkRecord struct {
	link  chain.Link
	chain chain.Hash
}

// MarshalMLS implements codec.Marshaler, for the store.
func (l linkRecord) MarshalMLS(w *codec.Writer) {
	l.link.MarshalMLS(w)
	w.Raw(l.chain[:])
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *linkRecord) UnmarshalMLS(r *codec.Reader) {
	l.link.UnmarshalMLS(r)
	copy(l.chain[:], r.Raw(len(l.chain)))
}

// linkAt returns the chain at an entry, nil if it isn't known.
func (r *Room) linkAt(seq uint64) (*linkRecord, error) {
	if seq == 0 {
		return &linkRecord{chain: chain.Start(r.uri)}, nil
	}
	b, err := r.c.db.Get(r.key64(roomLink, seq))
	if err != nil || b == nil {
		return nil, err
	}
	l := new(linkRecord)
	if err := codec.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("link %d: %w", seq, err)
	}
	return l, nil
}

// loadLedger finds where the chain of a room is that is being opened.
func (r *Room) loadLedger() error {
	b, err := r.c.db.Get(r.key(roomHub))
	if err != nil {
		return err
	}
	if b != nil {
		if err := codec.Unmarshal(b, &r.ledger.hubRecord); err != nil {
			return fmt.Errorf("hub: %w", err)
		}
	}
	l, err := r.linkAt(r.header.cursor)
	if err == nil && l != nil {
		r.ledger.known, r.ledger.chain = true, l.chain
	}
	return err
}

// forgetChain has the chain begin anew with what comes next. mu is held.
func (r *Room) forgetChain() {
	l := &r.ledger
	l.known, l.said, l.fits, l.differs, l.heard = false, nil, nil, nil, nil
}

// contextHash returns the hash of the present GroupContext. mu is held.
func (r *Room) contextHash() chain.Hash {
	l := &r.ledger
	if l.group != r.group || l.epoch != r.group.Epoch() {
		l.group, l.epoch, l.hash = r.group, r.group.Epoch(), chain.ContextOf(r.group.Context())
	}
	return l.hash
}

// extend brings the chain to the entry that was just processed, unless the context that it leads to isn't known. mu is
// held.
func (e *entry) extend(x *api.LogEntry) {
	r := e.room
	l := &r.ledger
	if len(x.Previous) == len(chain.Hash{}) {
		before := chain.Hash(x.Previous)
		l.said = nil
		switch {
		case !l.known:
			l.known, l.chain = true, before
			r.setLink(e.state, e.seq-1, linkRecord{chain: before})
		case before != l.chain:
			l.said = &said{e.seq - 1, before}
		}
	}
	l.unsigned++
	if e.elsewhere || !r.group.Active() {
		l.known = false
		return
	}
	if l.dirty {
		r.saveHub(e.state)
	}
	if l.known {
		link := chain.NewLink(x.Fanout, r.contextHash())
		l.chain = l.chain.Next(e.seq, link)
		r.setLink(e.state, e.seq, linkRecord{link, l.chain})
		if e.seq > keptLinks {
			e.state.Delete(r.key64(roomLink, e.seq-keptLinks))
		}
	}
	if s := r.readHead(x.Head); s != nil && s.Seq == e.seq {
		if !l.known || s.Chain == l.chain {
			l.fits = s
		} else {
			l.differs = s
		}
	}
}

func (r *Room) setLink(b *store.Batch, seq uint64, l linkRecord) {
	b.Set(r.key64(roomLink, seq), codec.Marshal(l))
}

// readHead reads a head of the room, whose signature may still be wrong. What can't be one is as good as none. mu is held.
func (r *Room) readHead(b []byte) *chain.Signed {
	s := new(chain.Signed)
	if len(b) == 0 || codec.Unmarshal(b, s) != nil || s.Room != r.uri || s.Suite != r.group.Suite() {
		return nil
	}
	return s
}

// hear notes a head that a client claims in a message. mu is held.
func (r *Room) hear(client mimi.URI, aad []byte, seq uint64) {
	if c := chain.ClaimOf(aad); c != nil {
		r.note(client, &heard{Claim: *c, at: seq})
	}
}

func (r *Room) note(client mimi.URI, h *heard) {
	l := &r.ledger
	if l.heard == nil {
		l.heard = make(map[mimi.URI]*heard)
	}
	if l.heard[client] != nil || len(l.heard) < maxHeard {
		l.heard[client] = h
	}
}

// hearAnswer notes the head that came with the hub's answer to a request about a room, if the hub accepted it.
func (c *Client) hearAnswer(room mimi.URI, accepted bool, head []byte) {
	r, err := c.Room(room)
	if err != nil || !accepted {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.readHead(head)
	if s == nil {
		r.ledger.mute = true
		return
	}
	r.note("", &heard{Claim: chain.Claim{Place: s.Place, Signature: s.Signature}, at: math.MaxUint64})
}

// claim returns what the next message has to say of the log, nil if nothing. mu is held.
func (r *Room) claim() *chain.Claim {
	l := &r.ledger
	now, disputed := r.c.o.Time(), l.disputed || l.proven
	if l.verified == nil && l.fits == nil || !r.group.SafeAAD() ||
		!disputed && r.header.cursor-l.claimed.Seq < claimEvery && now.Sub(l.claimedAt) < claimInterval {
		return nil
	}
	if s := l.fits; s != nil && l.differs == nil && (l.verified == nil || s.Incarnation == l.verified.Incarnation) {
		if hub, err := r.hubSender(); err == nil && s.Verify(hub.SignatureKey) == nil {
			l.verified, l.fits, l.dirty, l.unsigned, l.headed = s, nil, true, 0, true
		}
	}
	v := l.verified
	if v == nil || v.Place == l.claimed {
		return nil
	}
	l.claimed, l.claimedAt = v.Place, now
	c := &chain.Claim{Place: v.Place}
	if disputed || len(v.Signature) <= maxClaimed {
		c.Signature = v.Signature
	}
	return c
}

// claimed adds the room's claim to the authenticated data of a message. mu is held.
func (r *Room) claimed(aad []byte) ([]byte, error) {
	c := r.claim()
	if c == nil {
		return aad, nil
	}
	var items mls.SafeAAD
	if len(aad) > 0 {
		var err error
		if items, err = mls.ParseSafeAAD(aad); err != nil {
			return nil, err
		}
	}
	return codec.Marshal(items.Set(chain.ComponentClaim, codec.Marshal(*c))), nil
}

// hubSender is the hub in the group, as external sender. mu is held.
func (r *Room) hubSender() (*mls.ExternalSender, error) {
	b, _ := r.group.Extension(mls.ExtensionExternalSenders)
	var senders mls.ExternalSenders
	if err := codec.Unmarshal(b, &senders); err != nil {
		return nil, err
	}
	if len(senders) == 0 {
		return nil, errors.New("the hub is no external sender of the group")
	}
	return &senders[0], nil
}

// When a check has to be made.
type when int

const (
	ifContradicted when = iota // what fits can wait
	always
	atLive // the stream has given all that there was when it began: there has to have been a head
)

// check verifies the heads that came, and judges claims that the log has come to. What it returns may be told once w is
// durable.
func (r *Room) check(w *waits, at when) ([]Event, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := &r.ledger
	if r.usable() != nil {
		r.forgetChain()
		return nil, nil
	}
	if l.verified != nil && l.unsigned >= maxUnsigned && l.fits == nil && l.differs == nil && r.c.isLive() {
		l.unsigned = 0
		r.c.resubscribe()
	}
	contradicted, err := r.contradicted()
	if err != nil || at == ifContradicted && !contradicted {
		return nil, err
	}
	hub, err := r.hubSender()
	if err != nil {
		return nil, nil // checkRoom has seen one, and mimi.RoomPolicy keeps it
	}
	k := &checking{room: r, hub: hub, batch: new(store.Batch)}
	first := l.verified == nil
	heads := []*chain.Signed{l.fits, l.differs}
	if l.fits != nil && l.differs != nil && l.differs.Seq < l.fits.Seq {
		slices.Reverse(heads)
	}
	for _, s := range heads {
		if s == nil {
			continue
		}
		if err := s.Verify(hub.SignatureKey); err != nil {
			r.c.log.Warn("head refused", "room", r.uri, "seq", s.Seq, "err", err)
			continue
		}
		if err := k.take(s, s == l.differs); err != nil {
			return nil, err
		}
	}
	l.fits, l.differs = nil, nil
	for _, client := range slices.Sorted(maps.Keys(l.heard)) {
		done, err := k.judge(client, l.heard[client])
		if err != nil {
			return nil, err
		}
		if done {
			delete(l.heard, client)
		}
	}
	if l.mute || at == atLive && l.unsigned > 0 && !l.headed {
		l.mute = false
		k.silent()
	}
	if len(k.events) > 0 || first && l.verified != nil {
		r.saveHub(k.batch)
	}
	if k.batch.Len() == 0 {
		return nil, nil
	}
	return k.events, w.apply(r.c, k.batch)
}

// contradicted says whether something that came doesn't fit the chain. Claims that fit are forgotten. mu is held.
func (r *Room) contradicted() (bool, error) {
	l := &r.ledger
	found := l.differs != nil || l.mute
	for client, h := range l.heard {
		if h.Seq > r.header.cursor {
			found = found || h.at <= r.header.cursor && !h.told
			continue
		}
		own, err := r.linkAt(h.Seq)
		if err != nil {
			return false, err
		}
		if l.verified != nil && h.Incarnation == l.verified.Incarnation && own != nil && own.chain == h.Chain {
			delete(l.heard, client)
		} else {
			found = true
		}
	}
	return found, nil
}

// saveHub puts the hubRecord into a batch. mu is held.
func (r *Room) saveHub(b *store.Batch) {
	b.Set(r.key(roomHub), codec.Marshal(r.ledger.hubRecord))
	r.ledger.dirty = false
}

// newStream notes that a stream of entries begins.
func (r *Room) newStream() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledger.unsigned, r.ledger.headed, r.ledger.said = 0, false, nil
}

// saveHubs writes what is known of hubs and isn't in the store yet. A crash loses of it what the next head brings again.
func (c *Client) saveHubs() error {
	b := new(store.Batch)
	for _, r := range c.Rooms() {
		r.mu.Lock()
		if r.ledger.dirty {
			r.saveHub(b)
		}
		r.mu.Unlock()
	}
	if b.Len() == 0 {
		return nil
	}
	wait, err := c.apply(b)
	if err == nil {
		err = wait()
	}
	if err != nil {
		return fmt.Errorf("client: write the state: %w", err)
	}
	return nil
}

// checking is one check of a room's hub. The room's mu is held.
type checking struct {
	room   *Room
	hub    *mls.ExternalSender
	batch  *store.Batch
	events []Event
}

// fault notes that something contradicts, and keeps the evidence if there is some. The same again, or more of what is
// proven, is told once.
func (k *checking) fault(seq uint64, client mimi.URI, reason string, e *chain.Evidence) error {
	r := k.room
	l := &r.ledger
	if l.proven {
		e = nil
	}
	if key := string(client) + " " + reason; e == nil && l.told[key] {
		return nil
	} else if l.told == nil {
		l.told = map[string]bool{key: true}
	} else {
		l.told[key] = true
	}
	v := HubFault{Room: r.uri, Seq: seq, Client: client, Reason: reason}
	if e != nil {
		v.Evidence = e.File()
		if err := k.keep(e); err != nil {
			return err
		}
		l.proven = true
	}
	l.fault = reason
	k.events = append(k.events, v)
	r.c.log.Error("a hub contradicts itself, or a node changed what it has sent", "room", r.uri, "seq", seq, "client", client, "reason", reason, "proven", e != nil)
	return nil
}

// silent notes that a hub signs no more.
func (k *checking) silent() {
	l := &k.room.ledger
	if l.verified != nil {
		_ = k.fault(k.room.header.cursor, "", faultUnsigned, nil) // fails for evidence only
	}
}

// take takes a verified head at an entry of the log.
func (k *checking) take(s *chain.Signed, differs bool) error {
	r := k.room
	l := &r.ledger
	before := l.verified
	l.unsigned, l.headed = 0, true
	switch {
	case before == nil && differs:
		if err := k.fault(s.Seq, "", faultOther, nil); err != nil {
			return err
		}
	case before == nil:
	case s.Incarnation < before.Incarnation:
		return k.fault(s.Seq, "", faultIncarnation, nil)
	case s.Incarnation > before.Incarnation:
		k.events = append(k.events, HubRestored{Room: r.uri, Seq: s.Seq, Lost: differs})
		l.proven = false
	case differs:
		var e *chain.Evidence
		if o := l.said; o != nil && o.seq == before.Seq {
			links, err := r.links(o.seq, s.Seq)
			if err != nil {
				return err
			}
			e = k.complete(chain.Contradict(before, s, o.chain, links))
		}
		if err := k.fault(s.Seq, "", faultOther, e); err != nil {
			return err
		}
	}
	l.verified, l.dirty = s, true
	if differs || !l.known {
		return k.begin(s)
	}
	return nil
}

// begin has the chain begin at a head, and go on with what came after.
func (k *checking) begin(s *chain.Signed) error {
	r := k.room
	l := &r.ledger
	if !l.known && s.Seq != r.header.cursor {
		return nil // the links after it aren't known either
	}
	links, err := r.links(s.Seq, r.header.cursor)
	if err != nil {
		return err
	}
	err = store.ScanPrefix(r.c.db, r.key(roomLink), func(key, _ []byte) bool {
		k.batch.Delete(r.key(roomLink, key...))
		return true
	})
	if err != nil {
		return fmt.Errorf("read the chain: %w", err)
	}
	l.known, l.chain, l.said = true, s.Chain, nil
	r.setLink(k.batch, s.Seq, linkRecord{chain: s.Chain})
	for i, link := range links {
		seq := s.Seq + uint64(i) + 1
		l.chain = l.chain.Next(seq, link)
		r.setLink(k.batch, seq, linkRecord{link, l.chain})
	}
	return nil
}

// links returns the links of the entries after one up to another; nil if one of them isn't known. mu is held.
func (r *Room) links(after, to uint64) ([]chain.Link, error) {
	if to < after || to-after > keptLinks {
		return nil, nil
	}
	var links []chain.Link
	for seq := after + 1; seq <= to; seq++ {
		l, err := r.linkAt(seq)
		if err != nil || l == nil {
			return nil, err
		}
		links = append(links, l.link)
	}
	return links, nil
}

// judge compares a head that was heard of with the chain. It is done with it unless that has to wait.
func (k *checking) judge(client mimi.URI, h *heard) (done bool, err error) {
	r := k.room
	l := &r.ledger
	v := l.verified
	switch {
	case v == nil:
		return false, nil
	case h.Incarnation < v.Incarnation:
		return true, nil
	case h.Incarnation > v.Incarnation:
		// The message with it was ordered in that incarnation, and so is all that follows.
		if v.Seq < h.at {
			return false, nil
		}
		if k.signed(h) != nil {
			err = k.fault(v.Seq, client, faultIncarnation, nil)
		}
		return true, err
	case h.Seq > r.header.cursor && (h.told || v.Seq < h.at):
		return false, nil
	}
	own, err := r.linkAt(h.Seq)
	switch {
	case err != nil:
		return true, err
	case h.Seq > r.header.cursor: // a message comes after the head that is in it
	case own == nil || own.chain == h.Chain:
		return true, nil
	}
	if l.proven {
		return true, nil
	}
	if len(h.Signature) == 0 {
		l.disputed = true
		return true, k.fault(h.Seq, client, "a member says that the hub has shown another log", nil)
	}
	s := k.signed(h)
	if s == nil {
		return true, nil
	}
	l.disputed = true
	if h.Seq > v.Seq { // what comes next may prove it
		if h.told {
			return false, nil
		}
		h.told = true
		return false, k.fault(h.Seq, client, faultOther, nil)
	}
	links, err := r.links(h.Seq, v.Seq)
	if err != nil {
		return true, err
	}
	return true, k.fault(h.Seq, client, faultOther, k.complete(chain.Contradict(s, v, own.chain, links)))
}

// signed returns the head that was heard of, nil if the hub hasn't signed it.
func (k *checking) signed(h *heard) *chain.Signed {
	r := k.room
	s := &chain.Signed{Head: chain.Head{Room: r.uri, Suite: r.group.Suite(), Place: h.Place}, Signature: h.Signature}
	if err := s.Verify(k.hub.SignatureKey); err != nil {
		r.c.log.Warn("claim of a head refused", "room", r.uri, "seq", h.Seq, "err", err)
		return nil
	}
	return s
}

// complete makes evidence one that others can verify; nil if that isn't possible.
func (k *checking) complete(e *chain.Evidence) *chain.Evidence {
	bundle := k.room.c.trust.bundle(k.room.uri.Domain())
	if e == nil || bundle == nil {
		return nil
	}
	e.Hubs, e.Bundle = []mls.ExternalSender{*k.hub}, bundle.JSON()
	if _, err := e.Verify(); err != nil {
		k.room.c.log.Warn("evidence that doesn't verify", "room", k.room.uri, "err", err)
		return nil
	}
	return e
}

// keep puts evidence into the batch, unless there is enough.
func (k *checking) keep(e *chain.Evidence) error {
	have := 0
	prefix := evidencePrefix(k.room.uri)
	if err := store.ScanPrefix(k.room.c.db, prefix, func(_, _ []byte) bool { have++; return true }); err != nil {
		return fmt.Errorf("read evidence: %w", err)
	}
	if have < maxEvidence {
		b := codec.Marshal(e)
		hash := sha256.Sum256(b)
		k.batch.Set(append(prefix, hash[:]...), b)
	}
	return nil
}

// Evidence shows that a hub has signed two histories of a room.
type Evidence struct {
	ID            string // SHA-256 in hexadecimal
	Room          mimi.URI
	First, Second uint64 // the numbers of the entries up to which the hub has signed one history, and another
	File          []byte // what "parley-node evidence verify" judges anywhere
}

// Evidence returns what this client has against hubs, by room.
func (c *Client) Evidence() ([]Evidence, error) {
	var list []Evidence
	var bad error
	err := store.ScanPrefix(c.db, []byte(prefixEvidence), func(_, value []byte) bool {
		e := new(chain.Evidence)
		if bad = codec.Unmarshal(value, e); bad == nil {
			list = append(list, Evidence{
				ID: fmt.Sprintf("%x", sha256.Sum256(value)), Room: e.First.Room, First: e.First.Seq, Second: e.Second.Seq, File: e.File(),
			})
		}
		return bad == nil
	})
	if err := errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("client: read evidence: %w", err)
	}
	return list, nil
}

// HubFault returns the last contradiction in what the hub has shown of the room, as the event says it; "" if there was
// none.
func (r *Room) HubFault() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ledger.fault
}
