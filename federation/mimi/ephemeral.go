package mimi

import (
	"errors"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// ComponentEphemeral marks the authenticated data of ephemeral messages. It is in the range for private use.
const ComponentEphemeral mls.ComponentID = 0xfa02

// EphemeralAAD is the authenticated data of every ephemeral message, and of no other: so none can be taken for a message of
// a room's log, nor the other way round. It is a SafeAAD (draft-ietf-mls-extensions, Section 4.9).
var EphemeralAAD = string(codec.Marshal(mls.SafeAAD(nil).Set(ComponentEphemeral, nil)))

// EphemeralKind is what an Ephemeral tells.
type EphemeralKind uint8

// The kinds of Ephemeral.
const (
	EphemeralTyping  EphemeralKind = 1 // the sender is writing
	EphemeralPause   EphemeralKind = 2 // not any more
	EphemeralReceipt EphemeralKind = 3 // the sender has shown everything up to the entry Seq
)

// ephemeralType is the media type of Ephemeral. No room has it for its log.
var ephemeralType = mls.MediaType{Type: "application/vnd.parley.ephemeral"}

// EphemeralData is the application data with an Ephemeral: an ApplicationFraming (draft-ietf-mls-extensions, Section 6.2).
func EphemeralData(e Ephemeral) []byte {
	return codec.Marshal(mls.ApplicationFraming{MediaType: ephemeralType, Content: codec.Marshal(e)})
}

// ParseEphemeral reads what EphemeralData has made.
func ParseEphemeral(data []byte) (Ephemeral, error) {
	var f mls.ApplicationFraming
	var e Ephemeral
	if err := codec.Unmarshal(data, &f); err != nil {
		return e, err
	}
	if !f.MediaType.Equal(ephemeralType) {
		return e, errors.New("mimi: application data of another type than that of ephemeral messages")
	}
	return e, codec.Unmarshal(f.Content, &e)
}

// Ephemeral is what a PrivateMessage tells that is passed on to who is connected, and kept by nobody. It isn't
// of the draft.
//
//	struct {
//	    uint8 kind;
//	    uint64 seq;   /* of the room's log; 0 unless the kind is 3 */
//	} Ephemeral;
type Ephemeral struct {
	Kind EphemeralKind
	Seq  uint64
}

// MarshalMLS implements codec.Marshaler.
func (e Ephemeral) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(e.Kind))
	w.Uint64(e.Seq)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *Ephemeral) UnmarshalMLS(r *codec.Reader) {
	e.Kind, e.Seq = EphemeralKind(r.Uint8()), r.Uint64()
	if r.Err() == nil && (e.Kind < EphemeralTyping || e.Kind > EphemeralReceipt || (e.Seq != 0) != (e.Kind == EphemeralReceipt)) {
		r.Failf("ephemeral message of kind %d about entry %d", e.Kind, e.Seq)
	}
}
