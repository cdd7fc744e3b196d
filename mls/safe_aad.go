package mls

import (
	"bytes"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// SafeAAD is the authenticated data of all messages of a group whose GroupContext has the safe_aad component: what
// components have to say, sorted by them (draft-ietf-mls-extensions, Section 4.9). It is built with Set and encoded with
// codec.Marshal.
//
//	struct {
//	    ComponentID component_id;
//	    opaque aad_item_data<V>;
//	} SafeAADItem;
//
//	struct {
//	    SafeAADItem aad_items<V>;
//	} SafeAAD;
type SafeAAD AppDataDictionary

// ParseSafeAAD decodes authenticated data, for example the AAD of an ApplicationMessage. It fails if that has another
// form.
func ParseSafeAAD(aad []byte) (SafeAAD, error) {
	var a SafeAAD
	if err := codec.Unmarshal(aad, &a); err != nil {
		return nil, fmt.Errorf("mls: safe AAD: %w", err)
	}
	return a, nil
}

// Get returns a component's item, and whether there is one.
func (a SafeAAD) Get(id ComponentID) ([]byte, bool) { return AppDataDictionary(a).Get(id) }

// Set returns a copy with the component's item replaced or inserted at its place.
func (a SafeAAD) Set(id ComponentID, data []byte) SafeAAD {
	return SafeAAD(AppDataDictionary(a).Set(id, data))
}

// MarshalMLS implements codec.Marshaler.
func (a SafeAAD) MarshalMLS(w *codec.Writer) { AppDataDictionary(a).MarshalMLS(w) }

// UnmarshalMLS implements codec.Unmarshaler. Items out of order and repeated ones are refused.
func (a *SafeAAD) UnmarshalMLS(r *codec.Reader) { (*AppDataDictionary)(a).UnmarshalMLS(r) }

// SafeAAD says whether the group's authenticated data has to be a SafeAAD. Where nothing is given for a message of this
// client, that is an empty one.
func (g *Group) SafeAAD() bool {
	p := g.public()
	cr, err := p.contextRules()
	return err == nil && cr.terms.framedAAD
}

// checkAAD says whether authenticated data has the form that the group wants.
func (cr *contextRules) checkAAD(aad []byte) error {
	if !cr.terms.framedAAD {
		return nil
	}
	if err := codec.Unmarshal(aad, new(SafeAAD)); err != nil {
		return invalidBy(sectionSafeAAD, "authenticated data", err)
	}
	return nil
}

// frameAAD returns the authenticated data of an own message.
func (p *publicState) frameAAD(aad []byte) ([]byte, error) {
	cr, err := p.contextRules()
	if err != nil {
		return nil, err
	}
	if cr.terms.framedAAD && len(aad) == 0 {
		return codec.Marshal(SafeAAD{}), nil
	}
	return bytes.Clone(aad), cr.checkAAD(aad)
}
