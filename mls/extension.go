package mls

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// ExtensionType identifies an extension (RFC 9420, Section 17.3; draft-ietf-mls-extensions, Section 7.1).
type ExtensionType uint16

// The extension types that this package knows.
const (
	ExtensionApplicationID        ExtensionType = 1
	ExtensionRatchetTree          ExtensionType = 2
	ExtensionRequiredCapabilities ExtensionType = 3
	ExtensionExternalPub          ExtensionType = 4
	ExtensionExternalSenders      ExtensionType = 5
	ExtensionAppDataDictionary    ExtensionType = 6
	ExtensionSupportedWireFormats ExtensionType = 7
	ExtensionRequiredWireFormats  ExtensionType = 8
)

// isDefault says whether every client supports the type without listing it (RFC 9420, Section 7.2).
func (t ExtensionType) isDefault() bool {
	return t >= ExtensionApplicationID && t <= ExtensionExternalSenders
}

// Extension is one entry of a list of extensions (RFC 9420, Section 7.2).
//
//	struct {
//	    ExtensionType extension_type;
//	    opaque extension_data<V>;
//	} Extension;
type Extension struct {
	Type ExtensionType
	Data []byte
}

// MarshalMLS implements codec.Marshaler.
func (e Extension) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(e.Type))
	w.Opaque(e.Data)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *Extension) UnmarshalMLS(r *codec.Reader) {
	e.Type = ExtensionType(r.Uint16())
	e.Data = r.Opaque()
}

// Extensions is a list of extensions, each type at most once (RFC 9420, Section 13.4) and not more than 256.
type Extensions []Extension

// Find returns the data of an extension, and whether there is one.
func (e Extensions) Find(t ExtensionType) ([]byte, bool) {
	for i := range e {
		if e[i].Type == t {
			return e[i].Data, true
		}
	}
	return nil, false
}

// Set returns a copy of the list with t's data replaced in its place, or appended.
func (e Extensions) Set(t ExtensionType, data []byte) Extensions {
	out := slices.Clone(e)
	for i := range out {
		if out[i].Type == t {
			out[i].Data = data
			return out
		}
	}
	return append(out, Extension{Type: t, Data: data})
}

// Remove returns a copy of the list without t.
func (e Extensions) Remove(t ExtensionType) Extensions {
	return slices.DeleteFunc(slices.Clone(e), func(x Extension) bool { return x.Type == t })
}

// Equal says whether both lists have the same encoding.
func (e Extensions) Equal(o Extensions) bool {
	return slices.EqualFunc(e, o, func(a, b Extension) bool { return a.Type == b.Type && bytes.Equal(a.Data, b.Data) })
}

// validate refuses two extensions of one type (RFC 9420, Section 13.4).
func (e Extensions) validate() error {
	for i := range e {
		for j := range i {
			if e[i].Type == e[j].Type {
				return invalid("13.4", "two extensions of type %d", e[i].Type)
			}
		}
	}
	return nil
}

// maxExtensions bounds a list of extensions: more than the defined types and every GREASE value.
const maxExtensions = 256

// MarshalMLS implements codec.Marshaler.
func (e Extensions) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, e, func(w *codec.Writer, x Extension) { x.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler. A type that occurs twice is refused.
func (e *Extensions) UnmarshalMLS(r *codec.Reader) {
	*e = nil
	r.Vector(func(r *codec.Reader) {
		var x Extension
		x.UnmarshalMLS(r)
		if len(*e) == maxExtensions {
			r.Failf("more than %d extensions", maxExtensions)
			return
		}
		*e = append(*e, x)
	})
	if r.Err() != nil {
		*e = nil
	} else if err := e.validate(); err != nil {
		r.Fail(err)
	}
}

// RequiredCapabilities lists what every member must support (RFC 9420, Section 11.1).
type RequiredCapabilities struct {
	Extensions  []ExtensionType
	Proposals   []ProposalType
	Credentials []CredentialType
}

// MarshalMLS implements codec.Marshaler.
func (c RequiredCapabilities) MarshalMLS(w *codec.Writer) {
	writeUint16s(w, c.Extensions)
	writeUint16s(w, c.Proposals)
	writeUint16s(w, c.Credentials)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *RequiredCapabilities) UnmarshalMLS(r *codec.Reader) {
	c.Extensions = readUint16s[ExtensionType](r)
	c.Proposals = readUint16s[ProposalType](r)
	c.Credentials = readUint16s[CredentialType](r)
}

func writeUint16s[T ~uint16](w *codec.Writer, s []T) {
	w.Length(2 * len(s))
	for _, v := range s {
		w.Uint16(uint16(v))
	}
}

// maxValues bounds a list of types: comparing such lists takes time in proportion to the product of their lengths.
const maxValues = 256

func readUint16s[T ~uint16](r *codec.Reader) []T {
	b := r.View()
	switch n := len(b) / 2; {
	case len(b) == 0:
		return nil
	case len(b)%2 != 0:
		r.Fail(codec.ErrTruncated)
		return nil
	case n > maxValues:
		r.Failf("list of %d types, %d allowed", n, maxValues)
		return nil
	}
	s := make([]T, len(b)/2)
	for i := range s {
		s[i] = T(binary.BigEndian.Uint16(b[2*i:]))
	}
	return s
}

// ExternalSender may send proposals without being a member (RFC 9420, Section 12.1.8.1).
type ExternalSender struct {
	SignatureKey []byte
	Credential   Credential
}

// MarshalMLS implements codec.Marshaler.
func (s ExternalSender) MarshalMLS(w *codec.Writer) {
	w.Opaque(s.SignatureKey)
	s.Credential.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *ExternalSender) UnmarshalMLS(r *codec.Reader) {
	s.SignatureKey = r.Opaque()
	s.Credential.UnmarshalMLS(r)
}

// ExternalSenders is the data of the external_senders extension (RFC 9420, Section 12.1.8.1); a Sender's Index points
// into it.
type ExternalSenders []ExternalSender

// MarshalMLS implements codec.Marshaler.
func (s ExternalSenders) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, s, func(w *codec.Writer, x ExternalSender) { x.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *ExternalSenders) UnmarshalMLS(r *codec.Reader) {
	*s = codec.ReadVector(r, func(r *codec.Reader) (x ExternalSender) { x.UnmarshalMLS(r); return x })
}

// ComponentID identifies an application component (draft-ietf-mls-extensions, Section 4.1): 0x8000 and up are for
// private use.
type ComponentID uint16

// The components that this package knows (draft-ietf-mls-extensions, Section 7.5).
const (
	// ComponentAppComponents has a ComponentsList: in a leaf of the components that the client supports, in the
	// GroupContext of those that every member has to support.
	ComponentAppComponents ComponentID = 1
	// ComponentSafeAAD has a ComponentsList: in a leaf of the components that the client understands in authenticated
	// data, in the GroupContext of those that every member has to. There it also says that all authenticated data is a
	// SafeAAD.
	ComponentSafeAAD ComponentID = 2
	// ComponentMediaTypes has a MediaTypeList: in a leaf of the formats of application data that the client reads, in the
	// GroupContext of those that every member has to. There it also says that application data is an ApplicationFraming.
	ComponentMediaTypes ComponentID = 3
	// ComponentLastResort, without data, marks a KeyPackage that may be used more than once.
	ComponentLastResort ComponentID = 4
	// ComponentAppAck has an AppAck, in AppEphemeral proposals.
	ComponentAppAck ComponentID = 5
	// ComponentExternalReceivers has the ExternalReceivers of a GroupContext. The number is the one that
	// draft-mahy-mls-semiprivatemessage-07 suggests.
	ComponentExternalReceivers ComponentID = 8
)

// ComponentsList is a list of components (draft-ietf-mls-extensions, Section 5). Unknown ones in it are ignored.
type ComponentsList []ComponentID

// MarshalMLS implements codec.Marshaler.
func (l ComponentsList) MarshalMLS(w *codec.Writer) { writeUint16s(w, l) }

// UnmarshalMLS implements codec.Unmarshaler.
func (l *ComponentsList) UnmarshalMLS(r *codec.Reader) { *l = readUint16s[ComponentID](r) }

// ComponentData is the data of one component.
type ComponentData struct {
	ID   ComponentID
	Data []byte
}

// AppDataDictionary is the data of the app_data_dictionary extension, sorted by component (draft-ietf-mls-extensions,
// Section 4.6).
type AppDataDictionary []ComponentData

func (d AppDataDictionary) find(id ComponentID) (int, bool) {
	return slices.BinarySearchFunc(d, id, func(c ComponentData, id ComponentID) int { return int(c.ID) - int(id) })
}

// Get returns the data of a component, and whether there is an entry.
func (d AppDataDictionary) Get(id ComponentID) ([]byte, bool) {
	i, ok := d.find(id)
	if !ok {
		return nil, false
	}
	return d[i].Data, true
}

// Set returns a copy with the component's data replaced or inserted at its place.
func (d AppDataDictionary) Set(id ComponentID, data []byte) AppDataDictionary {
	out := slices.Clone(d)
	i, ok := out.find(id)
	if ok {
		out[i].Data = data
		return out
	}
	return slices.Insert(out, i, ComponentData{ID: id, Data: data})
}

// Remove returns a copy without the component.
func (d AppDataDictionary) Remove(id ComponentID) AppDataDictionary {
	out := slices.Clone(d)
	if i, ok := out.find(id); ok {
		out = slices.Delete(out, i, i+1)
	}
	return out
}

// dictionaryOf decodes the app_data_dictionary; without one it is empty.
func dictionaryOf(ext Extensions) (AppDataDictionary, error) {
	var d AppDataDictionary
	data, ok := ext.Find(ExtensionAppDataDictionary)
	if !ok {
		return nil, nil
	}
	if err := codec.Unmarshal(data, &d); err != nil {
		return nil, fmt.Errorf("mls: application data dictionary: %w", err)
	}
	return d, nil
}

// withComponent returns a copy of the list with a component's data in the app_data_dictionary, which it makes if there
// is none.
func (e Extensions) withComponent(id ComponentID, data []byte) (Extensions, error) {
	d, err := dictionaryOf(e)
	if err != nil {
		return nil, err
	}
	return e.Set(ExtensionAppDataDictionary, codec.Marshal(d.Set(id, data))), nil
}

// MarshalMLS implements codec.Marshaler.
func (d AppDataDictionary) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, d, func(w *codec.Writer, c ComponentData) {
		w.Uint16(uint16(c.ID))
		w.Opaque(c.Data)
	})
}

// UnmarshalMLS implements codec.Unmarshaler. Entries out of order and repeated ones are refused.
func (d *AppDataDictionary) UnmarshalMLS(r *codec.Reader) {
	last := -1
	*d = codec.ReadVector(r, func(r *codec.Reader) ComponentData {
		c := ComponentData{ID: ComponentID(r.Uint16())}
		c.Data = r.Opaque()
		if int(c.ID) <= last {
			r.Fail(fmt.Errorf("%w: component %d after %d in a dictionary", ErrMalformed, c.ID, last))
		}
		last = int(c.ID)
		return c
	})
}
