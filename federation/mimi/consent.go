package mimi

import (
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// ConsentOperation is what a ConsentEntry does (draft-ietf-mimi-protocol-06, Section 5.7).
type ConsentOperation uint8

// The operations of draft-ietf-mimi-protocol-06. The first two are for requestConsent, the others for updateConsent.
const (
	ConsentCancel  ConsentOperation = 0
	ConsentRequest ConsentOperation = 1
	ConsentGrant   ConsentOperation = 2
	ConsentRevoke  ConsentOperation = 3
)

// ConsentScope is what a consent is about: who may add whom, and to which room; an empty Room is any.
//
//	struct {
//	    IdentifierUri requesterUri;
//	    IdentifierUri targetUri;
//	    optional<RoomId> roomId;
//	} ConsentScope;
type ConsentScope struct {
	Requester URI
	Target    URI
	Room      URI
}

// MarshalMLS implements codec.Marshaler.
func (s ConsentScope) MarshalMLS(w *codec.Writer) {
	s.Requester.MarshalMLS(w)
	s.Target.MarshalMLS(w)
	w.Optional(s.Room != "")
	if s.Room != "" {
		s.Room.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *ConsentScope) UnmarshalMLS(r *codec.Reader) {
	*s = ConsentScope{Requester: readURI(r, KindUser), Target: readURI(r, KindUser)}
	if r.Optional() {
		s.Room = readURI(r, KindRoom)
	}
}

// ConsentEntry asks for consent or tells about it.
//
//	struct {
//	    ConsentOperation consentOperation;
//	    IdentifierUri requesterUri;
//	    IdentifierUri targetUri;
//	    optional<RoomId> roomId;
//	    select (consentOperation) {
//	        case grant: KeyPackage clientKeyPackages<V>;
//	    };
//	    AppDataDictionary consent_extensions;
//	} ConsentEntry;
type ConsentEntry struct {
	Operation   ConsentOperation
	Scope       ConsentScope
	KeyPackages []mls.KeyPackage // grant
	Extensions  mls.AppDataDictionary
}

// MarshalMLS implements codec.Marshaler.
func (e ConsentEntry) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(e.Operation))
	e.Scope.MarshalMLS(w)
	if e.Operation == ConsentGrant {
		codec.WriteVector(w, e.KeyPackages, func(w *codec.Writer, k mls.KeyPackage) { k.MarshalMLS(w) })
	}
	e.Extensions.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *ConsentEntry) UnmarshalMLS(r *codec.Reader) {
	*e = ConsentEntry{Operation: ConsentOperation(r.Uint8())}
	if e.Operation > ConsentRevoke {
		r.Failf("consent operation %d", e.Operation)
	}
	e.Scope.UnmarshalMLS(r)
	if e.Operation == ConsentGrant {
		e.KeyPackages = codec.ReadVector(r, func(r *codec.Reader) mls.KeyPackage {
			var k mls.KeyPackage
			k.UnmarshalMLS(r)
			return k
		})
		if len(e.KeyPackages) > MaxKeyMaterialClients {
			r.Failf("more than %d KeyPackages", MaxKeyMaterialClients)
		}
	}
	e.Extensions.UnmarshalMLS(r)
}
