package mimi

import (
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// SubmitMessageRequest asks a hub to order an application message (draft-ietf-mimi-protocol-06, Section 5.4). Message
// is a PrivateMessage of application data; Sender is the user who sends it.
//
//	struct {
//	    Protocol protocol;
//	    select (protocol) {
//	        case mls10:
//	            MLSMessage appMessage;
//	            IdentifierURI sendingUri;
//	    };
//	} SubmitMessageRequest;
type SubmitMessageRequest struct {
	Message *mls.MLSMessage
	Sender  URI
}

// MarshalMLS implements codec.Marshaler.
func (q SubmitMessageRequest) MarshalMLS(w *codec.Writer) {
	writeProtocol(w)
	q.Message.MarshalMLS(w)
	q.Sender.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (q *SubmitMessageRequest) UnmarshalMLS(r *codec.Reader) {
	readProtocol(r)
	*q = SubmitMessageRequest{Message: readMessage(r)}
	if r.Err() == nil && !isApplication(q.Message) {
		r.Failf("a submitted message that isn't a PrivateMessage of application data")
	}
	q.Sender = readURI(r, KindUser)
}

func readMessage(r *codec.Reader) *mls.MLSMessage {
	m := new(mls.MLSMessage)
	m.UnmarshalMLS(r)
	return m
}

func isApplication(m *mls.MLSMessage) bool {
	return m.Private != nil && m.Private.ContentType == mls.ContentApplication
}

// SubmitResponseCode says what became of a SubmitMessageRequest.
type SubmitResponseCode uint8

// The codes of draft-ietf-mimi-protocol-06, Section 5.4.
const (
	SubmitAccepted    SubmitResponseCode = 0
	SubmitNotAllowed  SubmitResponseCode = 1
	SubmitEpochTooOld SubmitResponseCode = 2
)

// String returns the code's name in the draft.
func (c SubmitResponseCode) String() string { return name(c, "accepted", "notAllowed", "epochTooOld") }

// SubmitMessageResponse is the answer to a SubmitMessageRequest.
//
//	struct {
//	    Protocol protocol;
//	    select (protocol) {
//	        case mls10:
//	            SubmitResponseCode statusCode;
//	            select (statusCode) {
//	                case success:     uint64 accepted_timestamp; optional<Frank> frank;
//	                case epochTooOld: uint64 currentEpoch;
//	            };
//	    };
//	} SubmitMessageResponse;
type SubmitMessageResponse struct {
	Code              SubmitResponseCode
	AcceptedTimestamp uint64 // accepted: milliseconds since 1970-01-01T00:00:00Z
	Frank             *Frank // accepted; nil if there is none
	CurrentEpoch      uint64 // epochTooOld
}

// MarshalMLS implements codec.Marshaler.
func (p SubmitMessageResponse) MarshalMLS(w *codec.Writer) {
	writeProtocol(w)
	w.Uint8(uint8(p.Code))
	switch p.Code {
	case SubmitAccepted:
		w.Uint64(p.AcceptedTimestamp)
		writeFrank(w, p.Frank)
	case SubmitEpochTooOld:
		w.Uint64(p.CurrentEpoch)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *SubmitMessageResponse) UnmarshalMLS(r *codec.Reader) {
	readProtocol(r)
	*p = SubmitMessageResponse{Code: SubmitResponseCode(r.Uint8())}
	switch p.Code {
	case SubmitAccepted:
		p.AcceptedTimestamp = r.Uint64()
		p.Frank = readFrank(r)
	case SubmitNotAllowed:
	case SubmitEpochTooOld:
		p.CurrentEpoch = r.Uint64()
	default:
		r.Failf("submit response code %d", p.Code)
	}
}
