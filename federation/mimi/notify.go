package mimi

import (
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// FanoutMessage is an entry of a room's log, or a Welcome, on its way from the hub (draft-ietf-mimi-protocol-06,
// Section 5.5). The draft selects by a protocol for which the structure has no field: none is encoded, the protocol is
// the room's. It also selects by the wire format values application, welcome, proposal and commit; here these mean a
// PrivateMessage, which holds application data, a Welcome, and a PublicMessage of a proposal or a commit.
//
//	struct {
//	    uint64 timestamp;
//	    MLSMessage message;
//	    select (message) {
//	        case application: optional<Frank> frank;
//	        case welcome:     RatchetTreeOption ratchetTreeOption;
//	        case proposal:    MLSMessage moreProposals<V>;
//	        case commit:      MLSMessage externalProposals<V>;
//	    };
//	} FanoutMessage;
type FanoutMessage struct {
	Timestamp         uint64 // when the hub accepted it: milliseconds since 1970-01-01T00:00:00Z
	Message           *mls.MLSMessage
	Frank             *Frank            // application; nil if there is none
	RatchetTree       RatchetTreeOption // welcome
	MoreProposals     []*mls.MLSMessage // proposal
	ExternalProposals []*mls.MLSMessage // commit: the hub's proposals of the new epoch, for those that it invalidated
}

// MarshalMLS implements codec.Marshaler.
func (f FanoutMessage) MarshalMLS(w *codec.Writer) {
	w.Uint64(f.Timestamp)
	f.Message.MarshalMLS(w)
	switch {
	case f.Message.Private != nil:
		writeFrank(w, f.Frank)
	case f.Message.Welcome != nil:
		f.RatchetTree.MarshalMLS(w)
	case isCommit(f.Message):
		writeMessages(w, f.ExternalProposals)
	default:
		writeMessages(w, f.MoreProposals)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (f *FanoutMessage) UnmarshalMLS(r *codec.Reader) {
	*f = FanoutMessage{Timestamp: r.Uint64(), Message: readMessage(r)}
	if r.Err() != nil {
		return
	}
	switch {
	case isApplication(f.Message):
		f.Frank = readFrank(r)
	case f.Message.Welcome != nil:
		f.RatchetTree.UnmarshalMLS(r)
	case isCommit(f.Message):
		f.ExternalProposals = readMessages(r, mls.ContentProposal)
	case f.Message.Public != nil && f.Message.Public.Content.ContentType == mls.ContentProposal:
		f.MoreProposals = readMessages(r, mls.ContentProposal)
	default:
		r.Failf("fanned out message of wire format %d", f.Message.WireFormat)
	}
}

// SplitFanout divides a /notify body, which is FanoutMessages one after another, into at most max of them, and checks
// that each decodes. The slices alias body.
func SplitFanout(body []byte, max int) ([][]byte, error) {
	var list [][]byte
	for r := codec.NewReader(body); !r.Empty(); {
		if len(list) == max {
			return nil, fmt.Errorf("mimi: notify: %w: more than %d messages", codec.ErrLength, max)
		}
		before := r.Rest()
		new(FanoutMessage).UnmarshalMLS(r)
		if err := r.Err(); err != nil {
			return nil, fmt.Errorf("mimi: notify: message %d: %w", len(list), err)
		}
		n := len(before) - r.Len()
		list = append(list, before[:n:n])
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("mimi: notify: %w: no message", codec.ErrTruncated)
	}
	return list, nil
}
