// Package content has the messages that people write to each other, as draft-ietf-mimi-content has them: text, replies,
// edits, deletions, reactions, attachments, in one container of CBOR. Parse reads one, Message.Encode makes one, and ID
// names it.
//
// Decoding is strict and bounded: a message has one encoding, the deterministic one (RFC 8949, Section 4.2.1), and what
// doesn't encode to the same bytes again is refused. Of CBOR, bignums and the simple value undefined aren't taken in
// extensions. Limits are those of the draft (Security Considerations), and MaxSize, MaxExtensions.
//
// Delivery notifications and read receipts are not part of the draft, which leaves them to another one.
package content

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// Limits of a message.
const (
	MaxSize       = 512 << 10 // bytes of a message
	MaxParts      = 1024      // parts of a message, nested ones too
	MaxDepth      = 4         // levels of nested parts, and of CBOR in extensions, the map itself included
	MaxTopic      = 4096      // bytes of a topic
	MaxExtensions = 256       // extensions of a message
	MaxExtension  = 4095      // bytes of an extension's value
	MaxName       = 255       // bytes of an extension's name
	maxKey        = 1<<53 - 1 // of integers that are keys
)

// ErrMalformed is what Parse and Encode wrap.
var ErrMalformed = errors.New("not a MIMI content message")

func malformed(format string, args ...any) error {
	return fmt.Errorf("content: %w: "+format, append([]any{ErrMalformed}, args...)...)
}

// hashSHA256 is the algorithm of message IDs, by its number in the registry of named information (RFC 6920).
const hashSHA256 = 0x01

// MessageID names a message: a hash over its content, its sender and its room. The zero value names none.
type MessageID [32]byte

// IsZero says whether the ID names no message.
func (id MessageID) IsZero() bool { return id == MessageID{} }

// String returns the ID in hexadecimal.
func (id MessageID) String() string { return hex.EncodeToString(id[:]) }

// ParseMessageID reads what String returns.
func ParseMessageID(s string) (MessageID, error) {
	var id MessageID
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) || b[0] != hashSHA256 {
		return id, malformed("%.80q is no message ID", s)
	}
	copy(id[:], b)
	return id, nil
}

// ID returns the ID of an encoded message with that salt (draft-ietf-mimi-content, "Message ID"). The sender is the user
// as the MLS credential names it, not as the message claims.
func ID(sender, room mimi.URI, encoded []byte, salt [16]byte) MessageID {
	h := sha256.New()
	for _, u := range []mimi.URI{sender, room} {
		h.Write(binary.BigEndian.AppendUint16(nil, uint16(len(u))))
		h.Write([]byte(u))
	}
	h.Write(encoded)
	h.Write(salt[:])
	id := MessageID{hashSHA256}
	copy(id[1:], h.Sum(nil))
	return id
}

// Message is a MIMI content message.
//
//	mimiContent = [
//	  salt: bstr .size 16,
//	  replaces: null / MessageId,
//	  topicId: bstr,
//	  expires: null / Expiration,
//	  inReplyTo: null / MessageId,
//	  mimiExtensions: extensions,
//	  nestedPart: NestedPart
//	]
type Message struct {
	Salt      [16]byte
	Replaces  MessageID // the first version of the message that this one edits or, with a null part, deletes; zero: none
	Topic     []byte    // what the message belongs to; empty: nothing
	Expires   *Expiration
	InReplyTo MessageID // zero: none
	// Sender and Room are what the sender claims, which franking needs; "" if the extension isn't there.
	Sender, Room mimi.URI
	Extensions   map[ExtensionKey][]byte // all others: encoded CBOR values
	Body         Part
}

// New returns a message of that body with a fresh salt, sent by a user in a room.
func New(sender, room mimi.URI, body Part) *Message {
	m := &Message{Sender: sender, Room: room, Body: body}
	_, _ = rand.Read(m.Salt[:]) // never fails
	return m
}

// Deletes says whether the message retracts the one that it replaces.
func (m *Message) Deletes() bool { return !m.Replaces.IsZero() && m.Body.Cardinality == NullPart }

// Reaction says whether the message is a reaction to the one that it is in reply to.
func (m *Message) Reaction() bool {
	return !m.InReplyTo.IsZero() && m.Body.Disposition == Reaction && m.Body.Cardinality != NullPart
}

// ExtensionKey is the key of an extension: a text of 1 to MaxName bytes, or if that is empty an integer.
type ExtensionKey struct {
	Text string
	Int  int64
}

// The registered extensions, which Message has as Sender and Room.
const (
	extensionSender = 1
	extensionRoom   = 2
)

// Expiration says when a message is to be deleted.
//
//	Expiration = [
//	    relative: bool,
//	    time: uint .size 4
//	]
type Expiration struct {
	Relative bool
	Time     uint32 // s after the message was read, or since 1970-01-01T00:00:00Z
}

// maxExpiration is how far from when a message is accepted it may expire.
const maxExpiration = 366 * 24 * time.Hour

// CheckExpiry refuses a message which the hub accepted at that time and which expires a year before or after.
func (m *Message) CheckExpiry(accepted time.Time) error {
	if m.Expires == nil {
		return nil
	}
	after := time.Duration(m.Expires.Time) * time.Second
	if !m.Expires.Relative {
		after = time.Unix(int64(m.Expires.Time), 0).Sub(accepted)
	}
	if after < -maxExpiration || after > maxExpiration {
		return malformed("expires a year before or after it was sent")
	}
	return nil
}
