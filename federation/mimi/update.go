package mimi

import (
	"fmt"
	"strings"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// HandshakeBundle is a commit with what goes with it, or a list of proposals (draft-ietf-mimi-protocol-06,
// Section 5.3). Message is a PublicMessage; SemiPrivateMessages are refused.
//
//	struct {
//	    MLSMessage proposalOrCommit;
//	    select (proposalOrCommit.content.content_type) {
//	        case commit:
//	            optional<Welcome> welcome;
//	            GroupInfoOption groupInfoOption;
//	            RatchetTreeOption ratchetTreeOption;
//	        case proposal:
//	            MLSMessage moreProposals<V>;
//	    };
//	} HandshakeBundle;
type HandshakeBundle struct {
	Message       *mls.MLSMessage
	Welcome       *mls.Welcome      // commit; nil if it adds nobody
	GroupInfo     GroupInfoOption   // commit
	RatchetTree   RatchetTreeOption // commit
	MoreProposals []*mls.MLSMessage // proposal
}

// isCommit tells which of its two shapes a structure around m has.
func isCommit(m *mls.MLSMessage) bool {
	return m.Public != nil && m.Public.Content.ContentType == mls.ContentCommit
}

// MarshalMLS implements codec.Marshaler.
func (b HandshakeBundle) MarshalMLS(w *codec.Writer) {
	b.Message.MarshalMLS(w)
	if !isCommit(b.Message) {
		writeMessages(w, b.MoreProposals)
		return
	}
	w.Optional(b.Welcome != nil)
	if b.Welcome != nil {
		b.Welcome.MarshalMLS(w)
	}
	b.GroupInfo.MarshalMLS(w)
	b.RatchetTree.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (b *HandshakeBundle) UnmarshalMLS(r *codec.Reader) {
	*b = HandshakeBundle{Message: new(mls.MLSMessage)}
	b.Message.UnmarshalMLS(r)
	if r.Err() != nil {
		return
	}
	switch {
	case b.Message.Public == nil:
		r.Failf("handshake of wire format %d", b.Message.WireFormat)
	case isCommit(b.Message):
		if r.Optional() {
			b.Welcome = new(mls.Welcome)
			b.Welcome.UnmarshalMLS(r)
		}
		b.GroupInfo.UnmarshalMLS(r)
		b.RatchetTree.UnmarshalMLS(r)
	case b.Message.Public.Content.ContentType == mls.ContentProposal:
		b.MoreProposals = readMessages(r, mls.ContentProposal)
	default:
		r.Failf("handshake of content type %d", b.Message.Public.Content.ContentType)
	}
}

// UpdateRequest asks a hub to order a handshake. There is no field for the protocol: it is the room's.
//
//	struct {
//	    select (room.protocol) {
//	        case mls10: HandshakeBundle bundle;
//	    };
//	} UpdateRequest;
type UpdateRequest struct{ Bundle HandshakeBundle }

// MarshalMLS implements codec.Marshaler.
func (q UpdateRequest) MarshalMLS(w *codec.Writer) { q.Bundle.MarshalMLS(w) }

// UnmarshalMLS implements codec.Unmarshaler.
func (q *UpdateRequest) UnmarshalMLS(r *codec.Reader) { q.Bundle.UnmarshalMLS(r) }

// UpdateResponseCode says what became of an UpdateRequest.
type UpdateResponseCode uint8

// The codes of draft-ietf-mimi-protocol-06, Section 5.3.
const (
	UpdateSuccess         UpdateResponseCode = 0
	UpdateWrongEpoch      UpdateResponseCode = 1
	UpdateNotAllowed      UpdateResponseCode = 2
	UpdateInvalidProposal UpdateResponseCode = 3
)

// String returns the code's name in the draft.
func (c UpdateResponseCode) String() string {
	return name(c, "success", "wrongEpoch", "notAllowed", "invalidProposal")
}

// UpdateRoomResponse is the answer to an UpdateRequest.
//
//	struct {
//	    UpdateResponseCode responseCode;
//	    string errorDescription;
//	    select (responseCode) {
//	        case success:         uint64 accepted_timestamp;
//	        case wrongEpoch:      uint64 currentEpoch;
//	        case invalidProposal: ProposalRef invalidProposals<V>;
//	    };
//	} UpdateRoomResponse;
type UpdateRoomResponse struct {
	Code              UpdateResponseCode
	Description       string   // UTF-8; encoding cuts it at MaxDescription bytes
	AcceptedTimestamp uint64   // success: milliseconds since 1970-01-01T00:00:00Z
	CurrentEpoch      uint64   // wrongEpoch
	InvalidProposals  [][]byte // invalidProposal
}

// MarshalMLS implements codec.Marshaler.
func (p UpdateRoomResponse) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(p.Code))
	w.Opaque([]byte(plainText(p.Description)))
	switch p.Code {
	case UpdateSuccess:
		w.Uint64(p.AcceptedTimestamp)
	case UpdateWrongEpoch:
		w.Uint64(p.CurrentEpoch)
	case UpdateInvalidProposal:
		codec.WriteVector(w, p.InvalidProposals, func(w *codec.Writer, ref []byte) { w.Opaque(ref) })
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *UpdateRoomResponse) UnmarshalMLS(r *codec.Reader) {
	*p = UpdateRoomResponse{Code: UpdateResponseCode(r.Uint8()), Description: readText(r, MaxDescription)}
	switch p.Code {
	case UpdateSuccess:
		p.AcceptedTimestamp = r.Uint64()
	case UpdateWrongEpoch:
		p.CurrentEpoch = r.Uint64()
	case UpdateNotAllowed:
	case UpdateInvalidProposal:
		p.InvalidProposals = codec.ReadVector(r, func(r *codec.Reader) []byte { return r.OpaqueMax(255) })
	default:
		r.Failf("update response code %d", p.Code)
	}
}

// plainText makes a description, which may quote a stranger's bytes, something that decodes.
func plainText(s string) string {
	s = strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "")
	if len(s) > MaxDescription {
		s = strings.ToValidUTF8(s[:MaxDescription], "")
	}
	return s
}

// Err is nil if the request was accepted, and otherwise says what the hub answered.
func (p *UpdateRoomResponse) Err() error {
	if p.Code == UpdateSuccess {
		return nil
	}
	return fmt.Errorf("mimi: update: %v: %s", p.Code, plainText(p.Description))
}
