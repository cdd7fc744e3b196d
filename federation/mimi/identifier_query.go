package mimi

import (
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Limits of an identifier query, in elements and bytes.
const (
	MaxQueryElements = 16
	MaxQueryValue    = 1024
	MaxQueryResults  = 256
)

// SearchIdentifierType says what a QueryElement compares (draft-ietf-mimi-protocol-06, Section 5.8).
type SearchIdentifierType uint8

// The types of draft-ietf-mimi-protocol-06.
const (
	SearchHandle       SearchIdentifierType = 1
	SearchNick         SearchIdentifierType = 2
	SearchEmail        SearchIdentifierType = 3
	SearchPhone        SearchIdentifierType = 4
	SearchPartialName  SearchIdentifierType = 5
	SearchWholeProfile SearchIdentifierType = 6
	SearchOIDCStdClaim SearchIdentifierType = 7
	SearchVCardField   SearchIdentifierType = 8
)

// QueryElement is one condition of a query.
//
//	struct {
//	    SearchIdentifierType searchType;
//	    select (type) {
//	        case oidcStdClaim: opaque claimName<V>;
//	        case vcardField:   opaque propertyName<V>;
//	    };
//	    opaque searchValue<V>;
//	} QueryElement;
type QueryElement struct {
	Type  SearchIdentifierType
	Name  string // of the claim or property
	Value []byte // UTF-8
}

// MarshalMLS implements codec.Marshaler.
func (e QueryElement) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(e.Type))
	if e.Type == SearchOIDCStdClaim || e.Type == SearchVCardField {
		w.Opaque([]byte(e.Name))
	}
	w.Opaque(e.Value)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *QueryElement) UnmarshalMLS(r *codec.Reader) {
	*e = QueryElement{Type: SearchIdentifierType(r.Uint8())}
	switch {
	case e.Type == SearchOIDCStdClaim, e.Type == SearchVCardField:
		e.Name = readText(r, MaxQueryValue)
	case e.Type == 0 || e.Type > SearchVCardField:
		r.Failf("search type %d", e.Type)
	}
	e.Value = []byte(readText(r, MaxQueryValue))
}

// IdentifierRequest asks a provider for users that match all elements.
//
//	struct {
//	    QueryElement query_elements<V>;
//	    AppDataDictionary id_request_extensions;
//	} IdentifierRequest;
type IdentifierRequest struct {
	Elements   []QueryElement
	Extensions mls.AppDataDictionary
}

// MarshalMLS implements codec.Marshaler.
func (q IdentifierRequest) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, q.Elements, func(w *codec.Writer, e QueryElement) { e.MarshalMLS(w) })
	q.Extensions.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (q *IdentifierRequest) UnmarshalMLS(r *codec.Reader) {
	n := 0
	*q = IdentifierRequest{Elements: codec.ReadVector(r, func(r *codec.Reader) QueryElement {
		var e QueryElement
		if e.UnmarshalMLS(r); n >= MaxQueryElements {
			r.Failf("more than %d query elements", MaxQueryElements)
		}
		n++
		return e
	})}
	q.Extensions.UnmarshalMLS(r)
}

// IdentifierQueryCode says what became of an IdentifierRequest.
type IdentifierQueryCode uint8

// The codes of draft-ietf-mimi-protocol-06, Section 5.8.
const (
	IdentifierSuccess          IdentifierQueryCode = 0
	IdentifierNotFound         IdentifierQueryCode = 1
	IdentifierAmbiguous        IdentifierQueryCode = 2
	IdentifierForbidden        IdentifierQueryCode = 3
	IdentifierUnsupportedField IdentifierQueryCode = 4
)

// String returns the code's name in the draft.
func (c IdentifierQueryCode) String() string {
	return name(c, "success", "notFound", "ambiguous", "forbidden", "unsupportedField")
}

// FieldSource says which vocabulary a ProfileField's name is from.
type FieldSource uint8

// The sources of draft-ietf-mimi-protocol-06.
const (
	FieldOIDCStdClaim FieldSource = 7
	FieldVCard        FieldSource = 8
)

// ProfileField is what a user shows of itself.
//
//	struct {
//	    FieldSource fieldSource;
//	    string fieldName;
//	    opaque fieldValue<V>;
//	} ProfileField;
type ProfileField struct {
	Source FieldSource
	Name   string
	Value  []byte
}

// MarshalMLS implements codec.Marshaler.
func (f ProfileField) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(f.Source))
	w.Opaque([]byte(f.Name))
	w.Opaque(f.Value)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (f *ProfileField) UnmarshalMLS(r *codec.Reader) {
	*f = ProfileField{Source: FieldSource(r.Uint8()), Name: readText(r, MaxQueryValue), Value: r.OpaqueMax(MaxText)}
	if f.Source != FieldOIDCStdClaim && f.Source != FieldVCard {
		r.Failf("field source %d", f.Source)
	}
}

// UserProfile is a user that was found.
//
//	struct {
//	    IdentifierUri stableUri;
//	    ProfileField fields<V>;
//	} UserProfile;
type UserProfile struct {
	User   URI
	Fields []ProfileField
}

// MarshalMLS implements codec.Marshaler.
func (p UserProfile) MarshalMLS(w *codec.Writer) {
	p.User.MarshalMLS(w)
	codec.WriteVector(w, p.Fields, func(w *codec.Writer, f ProfileField) { f.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *UserProfile) UnmarshalMLS(r *codec.Reader) {
	*p = UserProfile{User: readURI(r, KindUser), Fields: codec.ReadVector(r, func(r *codec.Reader) ProfileField {
		var f ProfileField
		f.UnmarshalMLS(r)
		return f
	})}
}

// IdentifierResponse is the answer to an IdentifierRequest.
//
//	struct {
//	    IdentifierQueryCode responseCode;
//	    IdentifierUri uri<V>;
//	    UserProfile foundProfiles<V>;
//	    AppDataDictionary id_response_extensions;
//	} IdentifierResponse;
type IdentifierResponse struct {
	Code       IdentifierQueryCode
	URIs       []URI
	Profiles   []UserProfile
	Extensions mls.AppDataDictionary
}

// MarshalMLS implements codec.Marshaler.
func (p IdentifierResponse) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(p.Code))
	codec.WriteVector(w, p.URIs, func(w *codec.Writer, u URI) { u.MarshalMLS(w) })
	codec.WriteVector(w, p.Profiles, func(w *codec.Writer, u UserProfile) { u.MarshalMLS(w) })
	p.Extensions.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *IdentifierResponse) UnmarshalMLS(r *codec.Reader) {
	*p = IdentifierResponse{Code: IdentifierQueryCode(r.Uint8())}
	if p.Code > IdentifierUnsupportedField {
		r.Failf("identifier query code %d", p.Code)
	}
	n := 0
	count := func(r *codec.Reader) {
		if n++; n > MaxQueryResults {
			r.Failf("more than %d results", MaxQueryResults)
		}
	}
	p.URIs = codec.ReadVector(r, func(r *codec.Reader) URI {
		count(r)
		return readURI(r, KindUser)
	})
	p.Profiles = codec.ReadVector(r, func(r *codec.Reader) UserProfile {
		count(r)
		var u UserProfile
		u.UnmarshalMLS(r)
		return u
	})
	p.Extensions.UnmarshalMLS(r)
}
