package mls

import (
	"crypto"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls/codec"
)

// WireFormat says what an MLSMessage holds (RFC 9420, Section 17.2).
type WireFormat uint16

// The wire formats of RFC 9420.
const (
	WireFormatPublicMessage  WireFormat = 1
	WireFormatPrivateMessage WireFormat = 2
	WireFormatWelcome        WireFormat = 3
	WireFormatGroupInfo      WireFormat = 4
	WireFormatKeyPackage     WireFormat = 5
)

// WireFormatSemiPrivateMessage is mls_semiprivate_message, for which draft-mahy-mls-semiprivatemessage-07 has no number
// yet (TBD1): this one is of the range for private use.
const WireFormatSemiPrivateMessage WireFormat = 0xf001

// ContentType says what a FramedContent holds (RFC 9420, Section 6).
type ContentType uint8

// The content types of RFC 9420.
const (
	ContentApplication ContentType = 1
	ContentProposal    ContentType = 2
	ContentCommit      ContentType = 3
)

// SenderType says in what capacity a message was sent (RFC 9420, Section 6).
type SenderType uint8

// The sender types of RFC 9420.
const (
	SenderMember            SenderType = 1
	SenderExternal          SenderType = 2
	SenderNewMemberProposal SenderType = 3
	SenderNewMemberCommit   SenderType = 4
)

// Sender is who sent a message (RFC 9420, Section 6).
//
//	struct {
//	    SenderType sender_type;
//	    select (Sender.sender_type) {
//	        case member:   uint32 leaf_index;
//	        case external: uint32 sender_index;
//	        case new_member_commit:
//	        case new_member_proposal: struct{};
//	    };
//	} Sender;
type Sender struct {
	Type  SenderType
	Leaf  LeafIndex // member
	Index uint32    // external: which of the external_senders
}

// MarshalMLS implements codec.Marshaler.
func (s Sender) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(s.Type))
	switch s.Type {
	case SenderMember:
		w.Uint32(uint32(s.Leaf))
	case SenderExternal:
		w.Uint32(s.Index)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *Sender) UnmarshalMLS(r *codec.Reader) {
	*s = Sender{Type: SenderType(r.Uint8())}
	switch s.Type {
	case SenderMember:
		s.Leaf = LeafIndex(r.Uint32())
	case SenderExternal:
		s.Index = r.Uint32()
	case SenderNewMemberProposal, SenderNewMemberCommit:
	default:
		r.Failf("sender type %d", s.Type)
	}
}

// FramedContent is the content of a message with its place in the group (RFC 9420, Section 6).
//
//	struct {
//	    opaque group_id<V>;
//	    uint64 epoch;
//	    Sender sender;
//	    opaque authenticated_data<V>;
//	    ContentType content_type;
//	    select (FramedContent.content_type) {
//	        case application: opaque application_data<V>;
//	        case proposal:    Proposal proposal;
//	        case commit:      Commit commit;
//	    };
//	} FramedContent;
type FramedContent struct {
	GroupID           []byte
	Epoch             uint64
	Sender            Sender
	AuthenticatedData []byte
	ContentType       ContentType
	ApplicationData   []byte
	Proposal          *Proposal
	Commit            *Commit
}

func (c *FramedContent) marshalBody(w *codec.Writer) {
	switch c.ContentType {
	case ContentApplication:
		w.Opaque(c.ApplicationData)
	case ContentProposal:
		c.Proposal.MarshalMLS(w)
	case ContentCommit:
		c.Commit.MarshalMLS(w)
	}
}

func (c *FramedContent) unmarshalBody(r *codec.Reader) {
	switch c.ContentType {
	case ContentApplication:
		c.ApplicationData = r.Opaque()
	case ContentProposal:
		c.Proposal = new(Proposal)
		c.Proposal.UnmarshalMLS(r)
	case ContentCommit:
		c.Commit = new(Commit)
		c.Commit.UnmarshalMLS(r)
	default:
		r.Failf("content type %d", c.ContentType)
	}
}

// MarshalMLS implements codec.Marshaler.
func (c FramedContent) MarshalMLS(w *codec.Writer) {
	w.Opaque(c.GroupID)
	w.Uint64(c.Epoch)
	c.Sender.MarshalMLS(w)
	w.Opaque(c.AuthenticatedData)
	w.Uint8(uint8(c.ContentType))
	c.marshalBody(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *FramedContent) UnmarshalMLS(r *codec.Reader) {
	*c = FramedContent{GroupID: r.Opaque(), Epoch: r.Uint64()}
	c.Sender.UnmarshalMLS(r)
	c.AuthenticatedData = r.Opaque()
	c.ContentType = ContentType(r.Uint8())
	c.unmarshalBody(r)
}

// AuthenticatedContent is a FramedContent with what authenticates it (RFC 9420, Section 6).
type AuthenticatedContent struct {
	WireFormat      WireFormat
	Content         FramedContent
	Signature       []byte
	ConfirmationTag []byte // commits only
}

// marshalAuth writes FramedContentAuthData (RFC 9420, Section 6.1).
func marshalAuth(w *codec.Writer, t ContentType, signature, confirmationTag []byte) {
	w.Opaque(signature)
	if t == ContentCommit {
		w.Opaque(confirmationTag)
	}
}

func unmarshalAuth(r *codec.Reader, t ContentType) (signature, confirmationTag []byte) {
	signature = r.Opaque()
	if t == ContentCommit {
		confirmationTag = r.Opaque()
	}
	return signature, confirmationTag
}

// MarshalMLS implements codec.Marshaler.
func (ac AuthenticatedContent) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(ac.WireFormat))
	ac.Content.MarshalMLS(w)
	marshalAuth(w, ac.Content.ContentType, ac.Signature, ac.ConfirmationTag)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (ac *AuthenticatedContent) UnmarshalMLS(r *codec.Reader) {
	ac.WireFormat = WireFormat(r.Uint16())
	switch ac.WireFormat {
	case WireFormatPublicMessage, WireFormatPrivateMessage, WireFormatSemiPrivateMessage:
	default:
		r.Failf("authenticated content of wire format %d", ac.WireFormat)
	}
	ac.Content.UnmarshalMLS(r)
	ac.Signature, ac.ConfirmationTag = unmarshalAuth(r, ac.Content.ContentType)
}

// marshalTBS writes FramedContentTBS; ctx is the encoded GroupContext (RFC 9420, Section 6.1).
func (ac *AuthenticatedContent) marshalTBS(w *codec.Writer, ctx []byte) {
	w.Uint16(uint16(MLS10))
	w.Uint16(uint16(ac.WireFormat))
	ac.Content.MarshalMLS(w)
	if t := ac.Content.Sender.Type; t == SenderMember || t == SenderNewMemberCommit {
		w.Raw(ctx)
	}
}

const labelFramedContent = "FramedContentTBS"

// signContent signs c for the wire format. For a commit the caller adds the confirmation tag.
func signContent(cs CipherSuite, rand io.Reader, signer crypto.Signer, wf WireFormat, c FramedContent, ctx []byte) (*AuthenticatedContent, error) {
	ac := &AuthenticatedContent{WireFormat: wf, Content: c}
	sig, err := cs.sign(rand, signer, labelFramedContent, func(w *codec.Writer) { ac.marshalTBS(w, ctx) })
	if err != nil {
		return nil, fmt.Errorf("mls: sign content: %w", err)
	}
	ac.Signature = sig
	return ac, nil
}

// verifySignature checks the signature with the key that belongs to the sender.
func (ac *AuthenticatedContent) verifySignature(cs CipherSuite, pub, ctx []byte) error {
	tbs := func(w *codec.Writer) { ac.marshalTBS(w, ctx) }
	if err := cs.verify(pub, labelFramedContent, tbs, ac.Signature); err != nil {
		return fmt.Errorf("mls: verify content: %w", err)
	}
	return nil
}

// ref returns the ProposalRef of a proposal (RFC 9420, Section 5.2).
func (ac *AuthenticatedContent) ref(cs CipherSuite) []byte {
	return cs.refHash("MLS 1.0 Proposal Reference", ac.MarshalMLS)
}

// MLSMessage is what travels outside of a group's own structures (RFC 9420, Section 6); the field that WireFormat
// names is set.
//
//	struct {
//	    ProtocolVersion version = mls10;
//	    WireFormat wire_format;
//	    select (MLSMessage.wire_format) {
//	        case mls_public_message:  PublicMessage public_message;
//	        case mls_private_message: PrivateMessage private_message;
//	        case mls_welcome:         Welcome welcome;
//	        case mls_group_info:      GroupInfo group_info;
//	        case mls_key_package:     KeyPackage key_package;
//	        case mls_semiprivate_message: SemiPrivateMessage semiprivate_message;
//	    };
//	} MLSMessage;
type MLSMessage struct {
	Version     ProtocolVersion
	WireFormat  WireFormat
	Public      *PublicMessage
	Private     *PrivateMessage
	Welcome     *Welcome
	GroupInfo   *GroupInfo
	KeyPackage  *KeyPackage
	SemiPrivate *SemiPrivateMessage
}

// NewMLSMessage wraps a message for the wire.
func NewMLSMessage[T PublicMessage | PrivateMessage | Welcome | GroupInfo | KeyPackage | SemiPrivateMessage](body *T) *MLSMessage {
	m := &MLSMessage{Version: MLS10}
	switch b := any(body).(type) {
	case *PublicMessage:
		m.WireFormat, m.Public = WireFormatPublicMessage, b
	case *PrivateMessage:
		m.WireFormat, m.Private = WireFormatPrivateMessage, b
	case *Welcome:
		m.WireFormat, m.Welcome = WireFormatWelcome, b
	case *GroupInfo:
		m.WireFormat, m.GroupInfo = WireFormatGroupInfo, b
	case *KeyPackage:
		m.WireFormat, m.KeyPackage = WireFormatKeyPackage, b
	case *SemiPrivateMessage:
		m.WireFormat, m.SemiPrivate = WireFormatSemiPrivateMessage, b
	}
	return m
}

// MarshalMLS implements codec.Marshaler.
func (m MLSMessage) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(m.Version))
	w.Uint16(uint16(m.WireFormat))
	switch m.WireFormat {
	case WireFormatPublicMessage:
		m.Public.MarshalMLS(w)
	case WireFormatPrivateMessage:
		m.Private.MarshalMLS(w)
	case WireFormatWelcome:
		m.Welcome.MarshalMLS(w)
	case WireFormatGroupInfo:
		m.GroupInfo.MarshalMLS(w)
	case WireFormatKeyPackage:
		m.KeyPackage.MarshalMLS(w)
	case WireFormatSemiPrivateMessage:
		m.SemiPrivate.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler. Other versions than mls10 are refused.
func (m *MLSMessage) UnmarshalMLS(r *codec.Reader) {
	*m = MLSMessage{Version: ProtocolVersion(r.Uint16()), WireFormat: WireFormat(r.Uint16())}
	if r.Err() == nil && m.Version != MLS10 {
		r.Fail(fmt.Errorf("%w: protocol version %d", ErrUnsupported, m.Version))
		return
	}
	switch m.WireFormat {
	case WireFormatPublicMessage:
		m.Public = new(PublicMessage)
		m.Public.UnmarshalMLS(r)
	case WireFormatPrivateMessage:
		m.Private = new(PrivateMessage)
		m.Private.UnmarshalMLS(r)
	case WireFormatWelcome:
		m.Welcome = new(Welcome)
		m.Welcome.UnmarshalMLS(r)
	case WireFormatGroupInfo:
		m.GroupInfo = new(GroupInfo)
		m.GroupInfo.UnmarshalMLS(r)
	case WireFormatKeyPackage:
		m.KeyPackage = new(KeyPackage)
		m.KeyPackage.UnmarshalMLS(r)
	case WireFormatSemiPrivateMessage:
		m.SemiPrivate = new(SemiPrivateMessage)
		m.SemiPrivate.UnmarshalMLS(r)
	default:
		r.Fail(fmt.Errorf("%w: wire format %d", ErrUnsupported, m.WireFormat))
	}
}
