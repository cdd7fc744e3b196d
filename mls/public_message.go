package mls

import (
	"crypto/hmac"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// PublicMessage is a message that is authenticated and not encrypted (RFC 9420, Section 6.2).
//
//	struct {
//	    FramedContent content;
//	    FramedContentAuthData auth;
//	    select (PublicMessage.content.sender.sender_type) {
//	        case member: MAC membership_tag;
//	        case external:
//	        case new_member_commit:
//	        case new_member_proposal: struct{};
//	    };
//	} PublicMessage;
type PublicMessage struct {
	Content         FramedContent
	Signature       []byte
	ConfirmationTag []byte
	MembershipTag   []byte
}

// MarshalMLS implements codec.Marshaler.
func (m PublicMessage) MarshalMLS(w *codec.Writer) {
	m.Content.MarshalMLS(w)
	marshalAuth(w, m.Content.ContentType, m.Signature, m.ConfirmationTag)
	if m.Content.Sender.Type == SenderMember {
		w.Opaque(m.MembershipTag)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *PublicMessage) UnmarshalMLS(r *codec.Reader) {
	*m = PublicMessage{}
	m.Content.UnmarshalMLS(r)
	m.Signature, m.ConfirmationTag = unmarshalAuth(r, m.Content.ContentType)
	if m.Content.Sender.Type == SenderMember {
		m.MembershipTag = r.Opaque()
	}
}

// authenticated returns the message's content. Nothing is verified by that.
func (m *PublicMessage) authenticated() *AuthenticatedContent {
	return &AuthenticatedContent{WireFormat: WireFormatPublicMessage, Content: m.Content,
		Signature: m.Signature, ConfirmationTag: m.ConfirmationTag}
}

// membershipTag is the MAC of AuthenticatedContentTBM (RFC 9420, Section 6.2).
func membershipTag(cs CipherSuite, ac *AuthenticatedContent, membershipKey secret, ctx []byte) []byte {
	w := codec.Scratch()
	defer w.Free()
	ac.marshalTBS(w, ctx)
	marshalAuth(w, ac.Content.ContentType, ac.Signature, ac.ConfirmationTag)
	return cs.mac(membershipKey, w.Bytes())
}

// protectPublic frames ac as a PublicMessage. Application data is refused (RFC 9420, Section 6.2); the membership key
// is used for members only.
func protectPublic(cs CipherSuite, ac *AuthenticatedContent, membershipKey secret, ctx []byte) (*PublicMessage, error) {
	if ac.WireFormat != WireFormatPublicMessage {
		return nil, fmt.Errorf("mls: frame public message: %w: signed for wire format %d", ErrMalformed, ac.WireFormat)
	}
	if ac.Content.ContentType == ContentApplication {
		return nil, fmt.Errorf("mls: frame public message: %w: application data must be encrypted", ErrMalformed)
	}
	m := &PublicMessage{Content: ac.Content, Signature: ac.Signature, ConfirmationTag: ac.ConfirmationTag}
	if ac.Content.Sender.Type == SenderMember {
		m.MembershipTag = membershipTag(cs, ac, membershipKey, ctx)
	}
	return m, nil
}

// verifyMembershipTag checks the tag of a member's message; other senders have none.
func (m *PublicMessage) verifyMembershipTag(cs CipherSuite, membershipKey secret, ctx []byte) error {
	if m.Content.Sender.Type != SenderMember {
		return nil
	}
	if !hmac.Equal(membershipTag(cs, m.authenticated(), membershipKey, ctx), m.MembershipTag) {
		return ErrMembershipTag
	}
	return nil
}
