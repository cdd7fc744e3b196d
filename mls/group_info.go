package mls

import (
	"crypto"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls/codec"
)

// GroupInfo describes a group's epoch to those who join (RFC 9420, Section 12.4.3).
//
//	struct {
//	    GroupContext group_context;
//	    Extension extensions<V>;
//	    MAC confirmation_tag;
//	    uint32 signer;
//	    opaque signature<V>;
//	} GroupInfo;
type GroupInfo struct {
	GroupContext    GroupContext
	Extensions      Extensions
	ConfirmationTag []byte
	Signer          LeafIndex
	Signature       []byte
}

func (gi *GroupInfo) marshalUnsigned(w *codec.Writer) {
	gi.GroupContext.MarshalMLS(w)
	gi.Extensions.MarshalMLS(w)
	w.Opaque(gi.ConfirmationTag)
	w.Uint32(uint32(gi.Signer))
}

// MarshalMLS implements codec.Marshaler.
func (gi GroupInfo) MarshalMLS(w *codec.Writer) {
	gi.marshalUnsigned(w)
	w.Opaque(gi.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (gi *GroupInfo) UnmarshalMLS(r *codec.Reader) {
	*gi = GroupInfo{}
	gi.GroupContext.UnmarshalMLS(r)
	gi.Extensions.UnmarshalMLS(r)
	gi.ConfirmationTag = r.Opaque()
	gi.Signer = LeafIndex(r.Uint32())
	gi.Signature = r.Opaque()
}

const labelGroupInfo = "GroupInfoTBS"

func (gi *GroupInfo) sign(rand io.Reader, signer crypto.Signer) error {
	sig, err := gi.GroupContext.CipherSuite.sign(rand, signer, labelGroupInfo, gi.marshalUnsigned)
	if err != nil {
		return fmt.Errorf("mls: sign group info: %w", err)
	}
	gi.Signature = sig
	return nil
}

// Verify checks the signature with pub, the signature key of the leaf that Signer names. It fails with ErrSignature.
func (gi *GroupInfo) Verify(pub []byte) error {
	if err := gi.GroupContext.CipherSuite.verify(pub, labelGroupInfo, gi.marshalUnsigned, gi.Signature); err != nil {
		return fmt.Errorf("mls: verify group info: %w", err)
	}
	return nil
}

// ExternalPub returns the key to which an external commit encrypts its init secret, and whether there is one
// (RFC 9420, Section 8.3).
func (gi *GroupInfo) ExternalPub() (HPKEPublicKey, bool) {
	data, ok := gi.Extensions.Find(ExtensionExternalPub)
	if !ok {
		return nil, false
	}
	r := codec.NewReader(data)
	pub := r.Opaque()
	return pub, r.Finish() == nil
}

// RatchetTree returns the tree of the ratchet_tree extension, or nil if there is none (RFC 9420, Section 12.4.3.3).
func (gi *GroupInfo) RatchetTree() (*RatchetTree, error) {
	data, ok := gi.Extensions.Find(ExtensionRatchetTree)
	if !ok {
		return nil, nil
	}
	return ParseRatchetTree(data)
}
