package mls

import (
	"fmt"
	"io"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// Negotiation of what Capabilities and required_capabilities have no fields for (draft-ietf-mls-extensions, Section 5).

// WireFormats is the data of the supported_wire_formats extension of a leaf and of the required_wire_formats extension
// of a GroupContext (draft-ietf-mls-extensions, Section 5): wire formats other than those of RFC 9420.
//
//	struct {
//	    WireFormat wire_formats<V>;
//	} WireFormats;
type WireFormats []WireFormat

// MarshalMLS implements codec.Marshaler.
func (f WireFormats) MarshalMLS(w *codec.Writer) { writeUint16s(w, f) }

// UnmarshalMLS implements codec.Unmarshaler.
func (f *WireFormats) UnmarshalMLS(r *codec.Reader) { *f = readUint16s[WireFormat](r) }

// isDefault says whether every client supports the wire format without listing it.
func (f WireFormat) isDefault() bool {
	return f >= WireFormatPublicMessage && f <= WireFormatKeyPackage
}

// terms are what a GroupContext asks of its members, or what a leaf offers.
type terms struct {
	components  ComponentsList
	safeAAD     ComponentsList
	mediaTypes  MediaTypeList
	wireFormats WireFormats
	framedAAD   bool // there is a safe_aad, maybe an empty one
}

// parseTerms reads the terms in extensions, those of a GroupContext or of a leaf.
func parseTerms(ext Extensions) (terms, error) {
	var t terms
	for _, e := range ext {
		var err error
		switch e.Type {
		case ExtensionSupportedWireFormats, ExtensionRequiredWireFormats:
			err = codec.Unmarshal(e.Data, &t.wireFormats)
		case ExtensionAppDataDictionary:
			err = t.parseDictionary(ext)
		}
		if err != nil {
			return t, fmt.Errorf("extension type %d: %w", e.Type, err)
		}
	}
	return t, nil
}

func (t *terms) parseDictionary(ext Extensions) error {
	d, err := dictionaryOf(ext)
	if err != nil {
		return err
	}
	_, t.framedAAD = d.Get(ComponentSafeAAD)
	for _, c := range []struct {
		id   ComponentID
		into codec.Unmarshaler
	}{{ComponentAppComponents, &t.components}, {ComponentSafeAAD, &t.safeAAD}, {ComponentMediaTypes, &t.mediaTypes}} {
		if data, ok := d.Get(c.id); ok {
			if err := codec.Unmarshal(data, c.into); err != nil {
				return fmt.Errorf("component %d: %w", c.id, err)
			}
		}
	}
	return nil
}

// missing names what t asks for and has doesn't offer, apart from media types; nothing is the empty string.
func (t *terms) missing(has *terms) string {
	for _, id := range t.components {
		if !slices.Contains(has.components, id) {
			return fmt.Sprintf("component %d", id)
		}
	}
	for _, id := range t.safeAAD {
		if !slices.Contains(has.safeAAD, id) {
			return fmt.Sprintf("component %d in authenticated data", id)
		}
	}
	for _, f := range t.wireFormats {
		if !f.isDefault() && !slices.Contains(has.wireFormats, f) {
			return fmt.Sprintf("wire format %d", f)
		}
	}
	return ""
}

// checkLeaf says whether a leaf offers what t asks for, apart from media types.
func (t *terms) checkLeaf(l *LeafNode) error {
	if len(t.components)+len(t.safeAAD)+len(t.wireFormats) == 0 {
		return nil
	}
	has, err := parseTerms(l.Extensions)
	if err != nil {
		return invalidBy(sectionNegotiation, "leaf node", err)
	}
	if what := t.missing(&has); what != "" {
		return invalidBy(sectionNegotiation, "leaf node does not support %s, which the group requires", what)
	}
	return nil
}

// checkAllLeaves holds the leaves that a commit doesn't replace to what the GroupContext asks for by it and didn't
// before.
func (t *terms) checkAllLeaves(before *terms, tree *RatchetTree) error {
	if t.missing(before) == "" {
		return nil
	}
	for i, l := range tree.Leaves() {
		if err := t.checkLeaf(l); err != nil {
			return fmt.Errorf("mls: leaf %d: %w", i, err)
		}
	}
	return nil
}

// ReplacingComponent is a Component whose data an update replaces as a whole. It fits the components of this package
// that a GroupContext may have: app_components, safe_aad, content_media_types and external_receivers. That their data is
// well-formed is checked anyway.
type ReplacingComponent struct{}

// Update implements Component.
func (ReplacingComponent) Update(_ []byte, updates [][]byte) ([]byte, error) {
	return updates[len(updates)-1], nil
}

// describeClient completes the extensions of an own leaf. Who supports app_data_dictionary says that it understands
// app_components and safe_aad. With grease, the lists and the dictionary get random reserved values, which others have
// to ignore (draft-ietf-mls-extensions, Section 5.1).
func describeClient(rand io.Reader, c Capabilities, ext Extensions, grease bool) (Extensions, error) {
	if !c.supportsExtension(ExtensionAppDataDictionary) {
		return ext, nil
	}
	d, err := dictionaryOf(ext)
	if err != nil {
		return nil, err
	}
	var t terms
	if err := t.parseDictionary(ext); err != nil {
		return nil, fmt.Errorf("mls: application data dictionary: %w", err)
	}
	for i, id := range []ComponentID{ComponentAppComponents, ComponentSafeAAD} {
		if !slices.Contains(t.components, id) {
			t.components = slices.Insert(slices.Clone(t.components), min(i, len(t.components)), id)
		}
	}
	if grease {
		values, err := greaseComponents(rand, 2)
		if err != nil {
			return nil, err
		}
		t.components = append(t.components, values[0])
		if t.framedAAD {
			d = d.Set(ComponentSafeAAD, codec.Marshal(append(slices.Clone(t.safeAAD), values[1])))
		}
	}
	d = d.Set(ComponentAppComponents, codec.Marshal(t.components))
	ext = ext.Set(ExtensionAppDataDictionary, codec.Marshal(d))
	if grease {
		return greaseDictionary(rand, ext)
	}
	return ext, nil
}

// greaseDictionary adds an entry of a random reserved component to the app_data_dictionary, if there is one.
func greaseDictionary(rand io.Reader, ext Extensions) (Extensions, error) {
	d, err := dictionaryOf(ext)
	if err != nil || d == nil {
		return ext, err
	}
	values, err := greaseComponents(rand, 1)
	if err != nil {
		return nil, err
	}
	if _, ok := d.Get(values[0]); ok {
		return ext, nil
	}
	return ext.withComponent(values[0], nil)
}

// greaseComponents returns n reserved component identifiers (draft-ietf-mls-extensions, Section 7.6).
func greaseComponents(rand io.Reader, n int) ([]ComponentID, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(rand, b); err != nil {
		return nil, fmt.Errorf("mls: read randomness: %w", err)
	}
	ids := make([]ComponentID, n)
	for i, v := range b {
		ids[i] = ComponentID(v%8)*0x1010 + 0x0a0a
	}
	return ids, nil
}
