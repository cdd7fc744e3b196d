package mls

import (
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// AppEphemeral attaches a component's data to a commit, and changes nothing else (draft-ietf-mls-extensions,
// Section 4.8).
//
//	struct {
//	    ComponentID component_id;
//	    opaque data<V>;
//	} AppEphemeral;
type AppEphemeral struct {
	Component ComponentID
	Data      []byte
}

// MarshalMLS implements codec.Marshaler.
func (p *AppEphemeral) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(p.Component))
	w.Opaque(p.Data)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *AppEphemeral) UnmarshalMLS(r *codec.Reader) {
	*p = AppEphemeral{Component: ComponentID(r.Uint16()), Data: r.Opaque()}
}

func checkEphemeral(r *rules, p *AppEphemeral) error {
	c, ok := r.components[p.Component]
	if !ok {
		return invalidBy(sectionEphemeral, "component %d is not known", p.Component)
	}
	ephemeral, ok := c.(EphemeralComponent)
	if !ok {
		return invalidBy(sectionEphemeral, "component %d takes no ephemeral data", p.Component)
	}
	if err := ephemeral.CheckEphemeral(p.Data); err != nil {
		return invalidBy(sectionEphemeral, "data for component %d", p.Component, err)
	}
	return nil
}

// MessageRange is a span of a member's application messages in an epoch, both ends included (draft-ietf-mls-extensions,
// Section 6.1).
//
//	struct {
//	    uint32 sender;
//	    uint32 first_generation;
//	    uint32 last_generation;
//	} MessageRange;
type MessageRange struct {
	Sender      LeafIndex
	First, Last uint32
}

// MarshalMLS implements codec.Marshaler.
func (m MessageRange) MarshalMLS(w *codec.Writer) {
	w.Uint32(uint32(m.Sender))
	w.Uint32(m.First)
	w.Uint32(m.Last)
}

// UnmarshalMLS implements codec.Unmarshaler. A range that ends before it begins is refused.
func (m *MessageRange) UnmarshalMLS(r *codec.Reader) {
	*m = MessageRange{Sender: LeafIndex(r.Uint32()), First: r.Uint32(), Last: r.Uint32()}
	if m.First > m.Last {
		r.Failf("messages from %d to %d", m.First, m.Last)
	}
}

// AppAck tells the group which application messages of the epoch its sender has received, so that others see what was
// withheld (draft-ietf-mls-extensions, Section 6.1). Its ranges come from the Sender and Generation of
// ApplicationMessage.
//
//	struct {
//	    MessageRange received_ranges<V>;
//	} AppAck;
type AppAck []MessageRange

// MarshalMLS implements codec.Marshaler.
func (a AppAck) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, a, func(w *codec.Writer, m MessageRange) { m.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (a *AppAck) UnmarshalMLS(r *codec.Reader) {
	*a = codec.ReadVector(r, func(r *codec.Reader) (m MessageRange) { m.UnmarshalMLS(r); return m })
}

// AppAckComponent is the Component for ComponentAppAck: its AppEphemeral proposals have an AppAck. It has no data in the
// GroupContext.
type AppAckComponent struct{}

// Update implements Component. It fails.
func (AppAckComponent) Update([]byte, [][]byte) ([]byte, error) {
	return nil, fmt.Errorf("%w: app_ack in the group context", ErrMalformed)
}

// CheckEphemeral implements EphemeralComponent.
func (AppAckComponent) CheckEphemeral(data []byte) error { return codec.Unmarshal(data, new(AppAck)) }
