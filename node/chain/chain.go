// Package chain makes a hub answer for what it says: a room's log is a hash chain, whose heads the hub signs.
//
// With SHA-256, be64 as eight bytes big-endian, and || as concatenation:
//
//	chain(0) = SHA-256("Parley log" || 00 || room's URI)
//	chain(n) = SHA-256(chain(n-1) || be64(n) || SHA-256(FanoutMessage n) || context(n))
//
// context(n) is the SHA-256 of the GroupContext (RFC 9420, Section 8.1) of the epoch that entry n leads to: the new one
// after a commit, else the present one. What a hub had logged before it kept a chain has 32 zero bytes there.
//
// A Head says that a node, in one incarnation, has ordered the room's log up to a number in one way. The hub signs it
// with the key that the room has in its external_senders, and only when all of it is on disk. A node keeps its
// incarnation until its store is restored from an older copy, so that two heads of one incarnation of which neither
// extends the other show that the hub lies to somebody.
//
// Who compares what:
//   - A hub sends a Signed with its answers to update, submitMessage and groupInfo, and a Notice with notify, both in the
//     HTTP field Parley-Head (package federation).
//   - A follower computes the chain from what it gets with each Notice and compares it with the signed head, with what it
//     has stored before, and with the heads of answers. It passes heads on to its clients beside the log.
//   - A client computes the chain with its own group's contexts and compares it with the heads that it gets. What it has
//     verified it says inside of the group: a Claim in the authenticated data of messages, which no server can change
//     without breaking the message. Every receiver compares it with its own chain. Package client says how often that
//     is, and what it costs.
//
// Two heads that contradict one another become Evidence, which anybody can verify without asking anyone.
package chain

import (
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Hash is a SHA-256.
type Hash [sha256.Size]byte

// Start returns chain(0) of a room.
func Start(room mimi.URI) Hash { return sha256.Sum256([]byte("Parley log\x00" + string(room))) }

// Link is what an entry of a log adds to the chain beside its number.
//
//	struct { uint8 message[32]; uint8 context[32]; } Link;
type Link struct{ Message, Context Hash }

// NewLink returns the link of a FanoutMessage, as it is stored.
func NewLink(fanout []byte, context Hash) Link { return Link{sha256.Sum256(fanout), context} }

// ContextOf returns the hash of a GroupContext.
func ContextOf(c mls.GroupContext) Hash { return sha256.Sum256(codec.Marshal(c)) }

// Next returns chain(seq), h being chain(seq-1).
func (h Hash) Next(seq uint64, l Link) Hash {
	var b [4 * 32]byte
	out := append(b[:0], h[:]...)
	out = binary.BigEndian.AppendUint64(out, seq)
	out = append(out, l.Message[:]...)
	return sha256.Sum256(append(out, l.Context[:]...))
}

// Fold returns the chain after the links that follow entry seq, h being chain(seq).
func (h Hash) Fold(seq uint64, links []Link) Hash {
	for _, l := range links {
		seq++
		h = h.Next(seq, l)
	}
	return h
}

// MarshalMLS implements codec.Marshaler.
func (l Link) MarshalMLS(w *codec.Writer) {
	w.Raw(l.Message[:])
	w.Raw(l.Context[:])
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *Link) UnmarshalMLS(r *codec.Reader) { *l = Link{readHash(r), readHash(r)} }

func readHash(r *codec.Reader) (h Hash) {
	copy(h[:], r.Raw(len(h)))
	return h
}

// Place is a point in a log, as one incarnation of its hub has ordered it.
type Place struct {
	Incarnation uint64
	Seq         uint64
	Chain       Hash // chain(Seq)
}

func (p Place) write(w *codec.Writer) {
	w.Uint64(p.Incarnation)
	w.Uint64(p.Seq)
	w.Raw(p.Chain[:])
}

func readPlace(r *codec.Reader) Place { return Place{r.Uint64(), r.Uint64(), readHash(r)} }

// Head says how far a hub has ordered a room's log, and how.
//
//	struct {
//	    opaque room<V>;
//	    CipherSuite cipher_suite;
//	    uint64 incarnation;
//	    uint64 seq;
//	    uint8 chain[32];
//	} Head;
type Head struct {
	Room  mimi.URI
	Suite mls.CipherSuite // of the room, whose signature scheme the hub's key has
	Place
}

// MarshalMLS implements codec.Marshaler.
func (h Head) MarshalMLS(w *codec.Writer) {
	w.Opaque([]byte(h.Room))
	w.Uint16(uint16(h.Suite))
	h.Place.write(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (h *Head) UnmarshalMLS(r *codec.Reader) {
	*h = Head{}
	h.Room.UnmarshalMLS(r)
	h.Suite = mls.CipherSuite(r.Uint16())
	h.Place = readPlace(r)
	if r.Err() == nil && h.Room.Kind() != mimi.KindRoom {
		r.Failf("head of %s, which is no room", h.Room)
	}
}

// headLabel is that of SignWithLabel (RFC 9420, Section 5.1.2).
const headLabel = "ParleyHead"

// Signed is a Head with the hub's signature: SignWithLabel(hub's key, "ParleyHead", Head).
//
//	struct { Head head; opaque signature<V>; } Signed;
type Signed struct {
	Head
	Signature []byte
}

// Sign signs a head.
func Sign(rand io.Reader, signer crypto.Signer, h Head) (*Signed, error) {
	sig, err := h.Suite.SignWithLabel(rand, signer, headLabel, codec.Marshal(h))
	if err != nil {
		return nil, fmt.Errorf("chain: sign a head: %w", err)
	}
	return &Signed{h, sig}, nil
}

// Verify says whether the signature is by that key, encoded for the head's suite. It fails with an error of package mls.
func (s *Signed) Verify(key []byte) error {
	if err := s.Suite.VerifyWithLabel(key, headLabel, codec.Marshal(s.Head), s.Signature); err != nil {
		return fmt.Errorf("chain: head of %s: %w", s.Room, err)
	}
	return nil
}

// MarshalMLS implements codec.Marshaler.
func (s Signed) MarshalMLS(w *codec.Writer) {
	s.Head.MarshalMLS(w)
	w.Opaque(s.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *Signed) UnmarshalMLS(r *codec.Reader) {
	s.Head.UnmarshalMLS(r)
	s.Signature = r.OpaqueMax(maxSignature)
}

// maxSignature is the length in bytes of the longest signature: that of ML-DSA-87 has 4,627.
const maxSignature = 8 << 10

// MaxContexts is how many there are in a Notice at most.
const MaxContexts = 1024

// Notice goes with the entries of one request to notify, which follow one another without a gap. With it whoever gets
// them computes the chain from the entry before to the head, which is at the last of them.
//
//	struct {
//	    Signed head;
//	    uint8 previous[32];
//	    opaque contexts<V>;
//	} Notice;
type Notice struct {
	Signed
	Previous Hash   // chain before the first entry
	Contexts []Hash // in force before the first entry, then of each commit, 32 bytes each
}

// MarshalMLS implements codec.Marshaler.
func (n Notice) MarshalMLS(w *codec.Writer) {
	n.Signed.MarshalMLS(w)
	w.Raw(n.Previous[:])
	w.Vector(func(w *codec.Writer) {
		for _, c := range n.Contexts {
			w.Raw(c[:])
		}
	})
}

// UnmarshalMLS implements codec.Unmarshaler.
func (n *Notice) UnmarshalMLS(r *codec.Reader) {
	n.Signed.UnmarshalMLS(r)
	n.Previous, n.Contexts = readHash(r), nil
	b := r.OpaqueMax(MaxContexts * len(Hash{}))
	if len(b)%len(Hash{}) != 0 || len(b) == 0 && r.Err() == nil {
		r.Failf("contexts of %d bytes", len(b))
		return
	}
	for ; len(b) > 0; b = b[len(Hash{}):] {
		n.Contexts = append(n.Contexts, Hash(b[:len(Hash{})]))
	}
}

// Links returns the links of the entries that came with the notice. It fails if there isn't a context for each commit
// and one before, or if the chain through them doesn't end in the head.
func (n *Notice) Links(fanouts [][]byte, commit func(i int) bool) ([]Link, error) {
	links := make([]Link, len(fanouts))
	next := 0
	for i, f := range fanouts {
		if commit(i) {
			next++
		}
		if next >= len(n.Contexts) {
			return nil, fmt.Errorf("chain: %d contexts for more commits", len(n.Contexts))
		}
		links[i] = NewLink(f, n.Contexts[next])
	}
	if next != len(n.Contexts)-1 {
		return nil, fmt.Errorf("chain: %d contexts for %d commits", len(n.Contexts), next)
	}
	if count := uint64(len(fanouts)); count > n.Seq || n.Previous.Fold(n.Seq-count, links) != n.Chain {
		return nil, fmt.Errorf("chain: the messages don't lead to the head %d", n.Seq)
	}
	return links, nil
}

// ComponentClaim is the component of a Claim among the authenticated data of messages (SafeAAD, draft-ietf-mls-extensions,
// Section 4.9). It is one of those for private use.
const ComponentClaim mls.ComponentID = 0xfa01

// Claim is what a member says inside of the group: the last head that it has verified. The signature is the hub's, with
// which two claims that contradict each other prove it. A long one (ML-DSA) is there only once members have seen
// different heads.
//
//	struct {
//	    uint64 incarnation;
//	    uint64 seq;
//	    uint8 chain[32];
//	    opaque signature<V>;
//	} Claim;
type Claim struct {
	Place
	Signature []byte
}

// MarshalMLS implements codec.Marshaler.
func (c Claim) MarshalMLS(w *codec.Writer) {
	c.Place.write(w)
	w.Opaque(c.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *Claim) UnmarshalMLS(r *codec.Reader) { *c = Claim{readPlace(r), r.OpaqueMax(maxSignature)} }

// ClaimOf returns the claim in a message's authenticated data, nil if there is none that can be read: members needn't
// make one.
func ClaimOf(aad []byte) *Claim {
	items, err := mls.ParseSafeAAD(aad)
	if err != nil {
		return nil
	}
	b, ok := items.Get(ComponentClaim)
	c := new(Claim)
	if !ok || codec.Unmarshal(b, c) != nil {
		return nil
	}
	return c
}
