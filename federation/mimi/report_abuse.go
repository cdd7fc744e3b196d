package mimi

import (
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// MaxAbusiveMessages is the largest number of messages in an AbuseReport.
const MaxAbusiveMessages = 64

// AbusiveMessage is a message that somebody reports, with the hub's frank on it (draft-ietf-mimi-protocol-06,
// Section 5.9).
//
//	struct {
//	    opaque message_content<V>;
//	    Frank frank;
//	    uint64 accepted_timestamp;
//	} AbusiveMessage;
type AbusiveMessage struct {
	Content           []byte // application data, see the package's documentation
	Frank             Frank
	AcceptedTimestamp uint64 // milliseconds since 1970-01-01T00:00:00Z
}

// MarshalMLS implements codec.Marshaler.
func (m AbusiveMessage) MarshalMLS(w *codec.Writer) {
	w.Opaque(m.Content)
	m.Frank.MarshalMLS(w)
	w.Uint64(m.AcceptedTimestamp)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *AbusiveMessage) UnmarshalMLS(r *codec.Reader) {
	*m = AbusiveMessage{Content: r.Opaque()}
	m.Frank.UnmarshalMLS(r)
	m.AcceptedTimestamp = r.Uint64()
}

// AbuseReport tells a hub of abuse in a room. The draft registers no reason codes yet; ReasonCode is kept as it came.
//
//	struct {
//	    IdentifierUri reportingUser;
//	    IdentifierUri allegedAbuserUri;
//	    AbuseType reasonCode;
//	    opaque note<V>;
//	    AbusiveMessage messages<V>;
//	    AppDataDictionary abuse_extensions;
//	} AbuseReport;
type AbuseReport struct {
	ReportingUser URI // empty if the reporter isn't named
	AllegedAbuser URI
	ReasonCode    uint8
	Note          string
	Messages      []AbusiveMessage
	Extensions    mls.AppDataDictionary
}

// MarshalMLS implements codec.Marshaler.
func (a AbuseReport) MarshalMLS(w *codec.Writer) {
	a.ReportingUser.MarshalMLS(w)
	a.AllegedAbuser.MarshalMLS(w)
	w.Uint8(a.ReasonCode)
	w.Opaque([]byte(a.Note))
	codec.WriteVector(w, a.Messages, func(w *codec.Writer, m AbusiveMessage) { m.MarshalMLS(w) })
	a.Extensions.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (a *AbuseReport) UnmarshalMLS(r *codec.Reader) {
	*a = AbuseReport{
		ReportingUser: readOptionalURI(r, KindUser), AllegedAbuser: readURI(r, KindUser), ReasonCode: r.Uint8(),
		Note: readText(r, MaxText),
	}
	n := 0
	a.Messages = codec.ReadVector(r, func(r *codec.Reader) AbusiveMessage {
		var m AbusiveMessage
		if m.UnmarshalMLS(r); n >= MaxAbusiveMessages {
			r.Failf("more than %d messages", MaxAbusiveMessages)
		}
		n++
		return m
	})
	a.Extensions.UnmarshalMLS(r)
}
