package mimi

import (
	"fmt"
	"io"
	"time"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// History that one device of a user gives to another.

const (
	// MaxHistoryPages is how many pages an offer has at most.
	MaxHistoryPages = 64
	// MaxHistoryPage is the length of the longest page in bytes, before it is encrypted.
	MaxHistoryPage = 4 << 20

	maxHistoryMessages = MaxHistoryPage / 32
	labelHistory       = "history"
)

// HistoryType is the media type of a HistoryOffer in an mls.ApplicationFraming.
func HistoryType() mls.MediaType { return mls.MediaType{Type: "application/vnd.parley.history"} }

// HistoryOffer is an application message by which a client lets another one of its user have history. To whom it isn't,
// it says nothing else: Sealed is SafeEncryptWithLabel of HistoryPages to the leaf, for ComponentHistory.
//
//	struct {
//	    uint32 receiver_leaf_index;
//	    HPKECiphertext sealed_pages;
//	} HistoryOffer;
type HistoryOffer struct {
	To     mls.LeafIndex // in the epoch of the message
	Sealed mls.HPKECiphertext
}

// MarshalMLS implements codec.Marshaler.
func (o HistoryOffer) MarshalMLS(w *codec.Writer) {
	w.Uint32(uint32(o.To))
	o.Sealed.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (o *HistoryOffer) UnmarshalMLS(r *codec.Reader) {
	o.To = mls.LeafIndex(r.Uint32())
	o.Sealed.UnmarshalMLS(r)
}

// historyContext binds what is sealed to the epoch, and to who seals it for whom: in a message of anybody else it doesn't
// open.
//
//	struct {
//	    opaque group_id<V>;
//	    uint64 epoch;
//	    Uri sender_client;
//	    uint32 receiver_leaf_index;
//	} HistoryContext;
func historyContext(g *mls.Group, from URI, to mls.LeafIndex) []byte {
	var w codec.Writer
	w.Opaque(g.GroupID())
	w.Uint64(g.Epoch())
	from.MarshalMLS(&w)
	w.Uint32(uint32(to))
	return w.Bytes()
}

// OfferHistory seals pages to a member of the group, in the name of a client. The offer is for a message of this epoch.
func OfferHistory(rand io.Reader, g *mls.Group, from URI, to mls.Member, pages HistoryPages) (*HistoryOffer, error) {
	sealed, err := g.Suite().SafeEncryptWithLabel(rand, to.Leaf.EncryptionKey, ComponentHistory, labelHistory,
		historyContext(g, from, to.Index), codec.Marshal(pages))
	if err != nil {
		return nil, fmt.Errorf("mimi: seal an offer of history: %w", err)
	}
	return &HistoryOffer{To: to.Index, Sealed: sealed}, nil
}

// Open opens an offer to the group's own leaf that a client has made in the present epoch.
func (o *HistoryOffer) Open(g *mls.Group, from URI) (HistoryPages, error) {
	b, err := g.SafeDecrypt(ComponentHistory, labelHistory, historyContext(g, from, o.To), o.Sealed)
	if err != nil {
		return nil, fmt.Errorf("mimi: open an offer of history: %w", err)
	}
	var pages HistoryPages
	if err := codec.Unmarshal(b, &pages); err != nil {
		return nil, fmt.Errorf("mimi: open an offer of history: %w", err)
	}
	return pages, nil
}

// HistoryPages are assets of the user's provider that have HistoryMessages each, encrypted with AES-128-GCM; oldest
// first, 1 to MaxHistoryPages.
//
//	struct {
//	    uint8 hash[32];
//	    uint32 size;
//	    uint8 key[16];
//	    uint8 nonce[12];
//	} HistoryPage;
//
//	HistoryPage pages<V>;
type HistoryPages []HistoryPage

// HistoryPage is one of them. Formatted, it doesn't show its key.
type HistoryPage struct {
	Hash  [32]byte // SHA-256 of the ciphertext
	Size  uint32   // of the ciphertext in bytes
	Key   [16]byte
	Nonce [12]byte
}

// String names the page by its hash.
func (p HistoryPage) String() string { return fmt.Sprintf("page %x", p.Hash[:4]) }

// GoString is String.
func (p HistoryPage) GoString() string { return p.String() }

// MarshalMLS implements codec.Marshaler.
func (l HistoryPages) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, p HistoryPage) {
		w.Raw(p.Hash[:])
		w.Uint32(p.Size)
		w.Raw(p.Key[:])
		w.Raw(p.Nonce[:])
	})
}

// UnmarshalMLS implements codec.Unmarshaler. A page beyond MaxHistoryPage is refused, and a list without any.
func (l *HistoryPages) UnmarshalMLS(r *codec.Reader) {
	*l = readAtMost(r, MaxHistoryPages, func(r *codec.Reader) (p HistoryPage) {
		copy(p.Hash[:], r.Raw(len(p.Hash)))
		if p.Size = r.Uint32(); p.Size > MaxHistoryPage+16 {
			r.Failf("a page of history of %d bytes", p.Size)
		}
		copy(p.Key[:], r.Raw(len(p.Key)))
		copy(p.Nonce[:], r.Raw(len(p.Nonce)))
		return p
	})
	if len(*l) == 0 {
		r.Failf("no page of history")
	}
}

// HistoryMessages are what a page has: ascending by their numbers.
//
//	HistoryMessage messages<V>;
type HistoryMessages []HistoryMessage

// HistoryMessage is an application message of a room as another device has it.
//
//	struct {
//	    uint64 seq;
//	    IdentifierUri sender;
//	    IdentifierUri sender_client;
//	    uint64 accepted_timestamp;
//	    uint64 expires;
//	    bool moderates;
//	    opaque application_data<V>;
//	    optional Frank frank;
//	} HistoryMessage;
type HistoryMessage struct {
	Seq          uint64 // number in the room's log
	User, Client URI    // of the sender
	Time         uint64 // when the hub accepted it, ms since 1970-01-01T00:00:00Z
	Expires      uint64 // when it is to be deleted, s since then; 0: as its content says
	Moderates    bool   // it deletes, and its sender could delete what others have sent
	Application  []byte // an mls.ApplicationFraming
	Frank        *Frank
}

// MarshalMLS implements codec.Marshaler.
func (l HistoryMessages) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, m HistoryMessage) {
		w.Uint64(m.Seq)
		m.User.MarshalMLS(w)
		m.Client.MarshalMLS(w)
		w.Uint64(m.Time)
		w.Uint64(m.Expires)
		w.Optional(m.Moderates)
		w.Opaque(m.Application)
		writeFrank(w, m.Frank)
	})
}

// maxTime bounds times in ms: they are within what a time.Time has.
const maxTime = uint64(1<<53 - 1)

// UnmarshalMLS implements codec.Unmarshaler. Messages that don't ascend are refused, and a client of another provider than
// its user.
func (l *HistoryMessages) UnmarshalMLS(r *codec.Reader) {
	last := uint64(0)
	*l = readAtMost(r, maxHistoryMessages, func(r *codec.Reader) HistoryMessage {
		m := HistoryMessage{
			Seq: r.Uint64(), User: readURI(r, KindUser), Client: readURI(r, KindClient), Time: r.Uint64(), Expires: r.Uint64(),
			Moderates: r.Optional(), Application: r.Opaque(), Frank: readFrank(r),
		}
		switch {
		case r.Err() != nil:
		case m.Seq <= last:
			r.Failf("message %d of the history after %d", m.Seq, last)
		case m.User.Domain() != m.Client.Domain():
			r.Failf("%q is no client of %q", m.Client, m.User)
		case m.Time > maxTime:
			r.Failf("a message of the year 280000")
		}
		last = m.Seq
		return m
	})
}

// TooOld says whether a message of that time is left out of history that is given at now, by a policy with that period;
// 0 is one without a bound.
func TooOld(t, now time.Time, period time.Duration) bool { return period > 0 && now.Sub(t) > period }
