package mls

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// Content advertisement (draft-ietf-mls-extensions, Section 6.2).

// MediaType is an IANA media type with its parameters (draft-ietf-mls-extensions, Section 6.2.2).
//
//	struct {
//	    opaque parameter_name<V>;
//	    opaque parameter_value<V>;
//	} Parameter;
//
//	struct {
//	    opaque type<V>;
//	    Parameter parameters<V>;
//	} MediaType;
type MediaType struct {
	Type       string // "image/png"
	Parameters []MediaParameter
}

// MediaParameter is a parameter of a media type, without what quotes or escapes its value in text.
type MediaParameter struct{ Name, Value string }

// Equal compares the type and the names of parameters without regard to case, values and order exactly.
func (m MediaType) Equal(o MediaType) bool {
	return bytes.EqualFold([]byte(m.Type), []byte(o.Type)) && slices.EqualFunc(m.Parameters, o.Parameters, func(a, b MediaParameter) bool {
		return bytes.EqualFold([]byte(a.Name), []byte(b.Name)) && a.Value == b.Value
	})
}

// MarshalMLS implements codec.Marshaler.
func (m MediaType) MarshalMLS(w *codec.Writer) {
	w.Opaque([]byte(m.Type))
	codec.WriteVector(w, m.Parameters, func(w *codec.Writer, p MediaParameter) {
		w.Opaque([]byte(p.Name))
		w.Opaque([]byte(p.Value))
	})
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *MediaType) UnmarshalMLS(r *codec.Reader) {
	m.Type = string(r.Opaque())
	m.Parameters = codec.ReadVector(r, func(r *codec.Reader) MediaParameter {
		return MediaParameter{Name: string(r.Opaque()), Value: string(r.Opaque())}
	})
}

// MediaTypeList is the data of ComponentMediaTypes (draft-ietf-mls-extensions, Section 6.2.2): 1 to 256 types.
//
//	struct {
//	    MediaType media_type_list<V>;
//	} MediaTypeList;
type MediaTypeList []MediaType

// Has says whether the list has a media type that is equal to m.
func (l MediaTypeList) Has(m MediaType) bool { return slices.ContainsFunc(l, m.Equal) }

// MarshalMLS implements codec.Marshaler.
func (l MediaTypeList) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, m MediaType) { m.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler. An empty list is refused, and one of more than 256 types: comparing two
// takes time in proportion to the product of their lengths.
func (l *MediaTypeList) UnmarshalMLS(r *codec.Reader) {
	*l = codec.ReadVector(r, func(r *codec.Reader) (m MediaType) { m.UnmarshalMLS(r); return m })
	if n := len(*l); r.Err() == nil && (n == 0 || n > maxValues) {
		r.Failf("list of %d media types", n)
		*l = nil
	}
}

// ApplicationFraming is the application data of a group whose GroupContext has ComponentMediaTypes
// (draft-ietf-mls-extensions, Section 6.2.4).
//
//	struct {
//	    MediaType media_type;
//	    opaque inner_application_content<V>;
//	} ApplicationFraming;
type ApplicationFraming struct {
	MediaType MediaType // without a Type: the first of the GroupContext's list
	Content   []byte
}

// MarshalMLS implements codec.Marshaler.
func (a ApplicationFraming) MarshalMLS(w *codec.Writer) {
	a.MediaType.MarshalMLS(w)
	w.Opaque(a.Content)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (a *ApplicationFraming) UnmarshalMLS(r *codec.Reader) {
	a.MediaType.UnmarshalMLS(r)
	a.Content = r.Opaque()
}

// MediaTypes returns the media types that every member of the group is expected to read, nil if it has no such list and
// its application data no framing. Encrypt refuses data that isn't an ApplicationFraming in a group with one.
func (g *Group) MediaTypes() MediaTypeList {
	p := g.public()
	cr, err := p.contextRules()
	if err != nil {
		return nil
	}
	return cr.terms.mediaTypes
}

// unframe decodes the application data of a group with media types; in others it returns nil. The media type is the one
// that is meant if none is named.
func (cr *contextRules) unframe(data []byte) (*ApplicationFraming, error) {
	if len(cr.terms.mediaTypes) == 0 {
		return nil, nil
	}
	a := new(ApplicationFraming)
	if err := codec.Unmarshal(data, a); err != nil {
		return nil, invalidBy(sectionMediaTypes, "application data", err)
	}
	if a.MediaType.Type == "" {
		a.MediaType = cr.terms.mediaTypes[0]
	}
	return a, nil
}

// checkMediaTypes says whether a leaf reads what the group requires. That binds those who add it or commit, and not
// those who receive the commit: they may know that the client does without saying so.
func (t *terms) checkMediaTypes(l *LeafNode) error {
	if len(t.mediaTypes) == 0 {
		return nil
	}
	has, err := parseTerms(l.Extensions)
	if err != nil {
		return invalidBy(sectionMediaTypes, "leaf node", err)
	}
	for _, m := range t.mediaTypes {
		if !has.mediaTypes.Has(m) {
			return invalidBy(sectionMediaTypes, "leaf node does not list the media type %q, which the group requires", m.Type)
		}
	}
	return nil
}

// checkMediaTypes holds what a commit of this client adds to the group's media types, and all members to new ones.
func (e *evolution) checkMediaTypes(before *terms) error {
	t := &e.rules.terms
	for _, m := range e.info.Added {
		if err := t.checkMediaTypes(m.Leaf); err != nil {
			return err
		}
	}
	if !slices.ContainsFunc(t.mediaTypes, func(m MediaType) bool { return !before.mediaTypes.Has(m) }) {
		return nil
	}
	for i, l := range e.tree.Leaves() {
		if err := t.checkMediaTypes(l); err != nil {
			return fmt.Errorf("leaf %d: %w", i, err)
		}
	}
	return nil
}
