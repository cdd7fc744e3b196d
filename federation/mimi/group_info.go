package mimi

import (
	"crypto"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// GroupInfoRequest asks a hub for what an external commit needs (draft-ietf-mimi-protocol-06, Section 5.6). The answer
// is signed and encrypted by the algorithms of CipherSuite. The draft's TBS has an optional joining code where the
// request has a plain one; here both have the plain one, empty if there is none.
//
//	struct {
//	    Protocol protocol;
//	    select (protocol) {
//	        case mls10:
//	            CipherSuite cipher_suite;
//	            SignaturePublicKey requestingSignatureKey;
//	            Credential requestingCredential;
//	            HPKEPublicKey groupInfoPublicKey;
//	            opaque joiningCode<V>;
//	            opaque signature<V>;
//	    };
//	} GroupInfoRequest;
type GroupInfoRequest struct {
	CipherSuite        mls.CipherSuite
	SignatureKey       []byte
	Credential         mls.Credential
	GroupInfoPublicKey mls.HPKEPublicKey
	JoiningCode        []byte
	Signature          []byte
}

// The labels of RFC 9420, Sections 5.1.2 and 5.1.3, for this exchange.
const (
	labelGroupInfoRequest  = "GroupInfoRequestTBS"
	labelGroupInfoResponse = "GroupInfoResponseTBS"
	labelGroupInfoTree     = "GroupInfo and ratchet_tree encryption"
)

// Sign sets SignatureKey and Signature. The signer's key is of CipherSuite's signature scheme.
func (q *GroupInfoRequest) Sign(rand io.Reader, signer crypto.Signer) error {
	key, err := q.CipherSuite.SignaturePublicKey(signer.Public())
	if err != nil {
		return fmt.Errorf("mimi: group info request: %w", err)
	}
	q.SignatureKey = key
	if q.Signature, err = q.CipherSuite.SignWithLabel(rand, signer, labelGroupInfoRequest, q.tbs()); err != nil {
		return fmt.Errorf("mimi: group info request: %w", err)
	}
	return nil
}

// Verify checks the signature with SignatureKey; that the credential is for that key is the caller's to check. It
// fails with mls.ErrSignature.
func (q *GroupInfoRequest) Verify() error {
	if err := q.CipherSuite.VerifyWithLabel(q.SignatureKey, labelGroupInfoRequest, q.tbs(), q.Signature); err != nil {
		return fmt.Errorf("mimi: group info request: %w", err)
	}
	return nil
}

func (q *GroupInfoRequest) tbs() []byte {
	var w codec.Writer
	q.marshalTBS(&w)
	return w.Bytes()
}

func (q *GroupInfoRequest) marshalTBS(w *codec.Writer) {
	writeProtocol(w)
	w.Uint16(uint16(q.CipherSuite))
	w.Opaque(q.SignatureKey)
	q.Credential.MarshalMLS(w)
	w.Opaque(q.GroupInfoPublicKey)
	w.Opaque(q.JoiningCode)
}

// MarshalMLS implements codec.Marshaler.
func (q GroupInfoRequest) MarshalMLS(w *codec.Writer) {
	q.marshalTBS(w)
	w.Opaque(q.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (q *GroupInfoRequest) UnmarshalMLS(r *codec.Reader) {
	readProtocol(r)
	*q = GroupInfoRequest{CipherSuite: mls.CipherSuite(r.Uint16()), SignatureKey: r.Opaque()}
	q.Credential.UnmarshalMLS(r)
	q.GroupInfoPublicKey = r.Opaque()
	q.JoiningCode = r.OpaqueMax(MaxText)
	q.Signature = r.Opaque()
}

// GroupInfoCode says what became of a GroupInfoRequest.
type GroupInfoCode uint8

// The codes of draft-ietf-mimi-protocol-06, Section 5.6.
const (
	GroupInfoSuccess       GroupInfoCode = 1
	GroupInfoNotAuthorized GroupInfoCode = 2
	GroupInfoNoSuchRoom    GroupInfoCode = 3
)

// String returns the code's name in the draft.
func (c GroupInfoCode) String() string {
	return name(c, "reserved", "success", "notAuthorized", "noSuchRoom")
}

// PendingProposal is a proposal that the hub accepted in the current epoch.
//
//	struct {
//	    MLSMessage proposal;
//	    uint64 hub_accepted_time;
//	} PendingProposal;
type PendingProposal struct {
	Proposal     *mls.MLSMessage
	AcceptedTime uint64 // milliseconds since 1970-01-01T00:00:00Z
}

// MarshalMLS implements codec.Marshaler.
func (p PendingProposal) MarshalMLS(w *codec.Writer) {
	p.Proposal.MarshalMLS(w)
	w.Uint64(p.AcceptedTime)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *PendingProposal) UnmarshalMLS(r *codec.Reader) {
	*p = PendingProposal{Proposal: readMessage(r)}
	if r.Err() == nil && (p.Proposal.Public == nil || p.Proposal.Public.Content.ContentType != mls.ContentProposal) {
		r.Failf("a pending proposal that is no proposal")
	}
	p.AcceptedTime = r.Uint64()
}

// GroupInfoRatchetTree is what a GroupInfoResponse encrypts. GroupInfo has no ratchet_tree extension.
//
//	struct {
//	    GroupInfo groupInfo;
//	    RatchetTreeOption ratchetTreeOption;
//	    PendingProposal pending_proposals<V>;
//	} GroupInfoRatchetTreeTBE;
type GroupInfoRatchetTree struct {
	GroupInfo   *mls.GroupInfo
	RatchetTree RatchetTreeOption
	Pending     []PendingProposal
}

// MarshalMLS implements codec.Marshaler.
func (t GroupInfoRatchetTree) MarshalMLS(w *codec.Writer) {
	t.GroupInfo.MarshalMLS(w)
	t.RatchetTree.MarshalMLS(w)
	codec.WriteVector(w, t.Pending, func(w *codec.Writer, p PendingProposal) { p.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (t *GroupInfoRatchetTree) UnmarshalMLS(r *codec.Reader) {
	*t = GroupInfoRatchetTree{GroupInfo: new(mls.GroupInfo)}
	t.GroupInfo.UnmarshalMLS(r)
	t.RatchetTree.UnmarshalMLS(r)
	n := 0
	t.Pending = codec.ReadVector(r, func(r *codec.Reader) PendingProposal {
		var p PendingProposal
		if p.UnmarshalMLS(r); n >= MaxMoreMessages {
			r.Failf("more than %d pending proposals", MaxMoreMessages)
		}
		n++
		return p
	})
}

// SelfRemoves are the pending proposals that whoever joins by an external commit has to commit
// (draft-ietf-mls-extensions, Section 6.3).
func (t *GroupInfoRatchetTree) SelfRemoves() []*mls.MLSMessage {
	var list []*mls.MLSMessage
	for _, p := range t.Pending {
		if p.Proposal.Public.Content.Proposal.Type == mls.ProposalSelfRemove {
			list = append(list, p.Proposal)
		}
	}
	return list
}

// GroupInfoResponse is the answer to a GroupInfoRequest. All from CipherSuite on is there only with GroupInfoSuccess.
//
//	struct {
//	    Protocol version;
//	    opaque room_id<V>;
//	    GroupInfoCode status;
//	    select (status) {
//	        case success:
//	            select (protocol) {
//	                case mls10:
//	                    CipherSuite cipher_suite;
//	                    ExternalSender hub_sender;
//	                    HPKECiphertext encrypted_groupinfo_and_tree;
//	                    opaque signature<V>;
//	            };
//	        default: struct{};
//	    };
//	} GroupInfoResponse;
type GroupInfoResponse struct {
	Room        URI
	Code        GroupInfoCode
	CipherSuite mls.CipherSuite
	HubSender   mls.ExternalSender
	Encrypted   mls.HPKECiphertext
	Signature   []byte
}

func (p *GroupInfoResponse) marshalTBS(w *codec.Writer) {
	writeProtocol(w)
	p.Room.MarshalMLS(w)
	w.Uint8(uint8(p.Code))
	if p.Code == GroupInfoSuccess {
		w.Uint16(uint16(p.CipherSuite))
		p.HubSender.MarshalMLS(w)
		p.Encrypted.MarshalMLS(w)
	}
}

// MarshalMLS implements codec.Marshaler.
func (p GroupInfoResponse) MarshalMLS(w *codec.Writer) {
	p.marshalTBS(w)
	if p.Code == GroupInfoSuccess {
		w.Opaque(p.Signature)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *GroupInfoResponse) UnmarshalMLS(r *codec.Reader) {
	readProtocol(r)
	*p = GroupInfoResponse{Room: readURI(r, KindRoom), Code: GroupInfoCode(r.Uint8())}
	switch p.Code {
	case GroupInfoSuccess:
		p.CipherSuite = mls.CipherSuite(r.Uint16())
		p.HubSender.UnmarshalMLS(r)
		p.Encrypted.UnmarshalMLS(r)
		p.Signature = r.Opaque()
	case GroupInfoNotAuthorized, GroupInfoNoSuchRoom:
	default:
		r.Failf("group info code %d", p.Code)
	}
}

// SealGroupInfo answers q with GroupInfoSuccess: plain is encrypted to q's key for the room, and the whole signed by
// signer, whose public key and credential sender has. Everything is done with q's cipher suite.
func SealGroupInfo(rand io.Reader, room URI, q *GroupInfoRequest, plain *GroupInfoRatchetTree, signer crypto.Signer, sender mls.ExternalSender) (*GroupInfoResponse, error) {
	if !q.CipherSuite.Supported() {
		return nil, fmt.Errorf("mimi: seal a group info: %w: cipher suite %d", mls.ErrUnsupported, q.CipherSuite)
	}
	sealed, err := q.CipherSuite.EncryptWithLabel(rand, q.GroupInfoPublicKey, labelGroupInfoTree, []byte(room), codec.Marshal(plain))
	if err != nil {
		return nil, fmt.Errorf("mimi: seal a group info: %w", err)
	}
	p := &GroupInfoResponse{Room: room, Code: GroupInfoSuccess, CipherSuite: q.CipherSuite, HubSender: sender, Encrypted: sealed}
	var w codec.Writer
	p.marshalTBS(&w)
	if p.Signature, err = p.CipherSuite.SignWithLabel(rand, signer, labelGroupInfoResponse, w.Bytes()); err != nil {
		return nil, fmt.Errorf("mimi: sign a group info: %w", err)
	}
	return p, nil
}

// Open checks that the answer is about the room and signed by HubSender's key, and decrypts it with the private key of
// the request's GroupInfoPublicKey. Before that, the caller checks that CipherSuite is the request's and that HubSender
// is the room's hub. It fails with mls.ErrSignature or mls.ErrDecrypt.
func (p *GroupInfoResponse) Open(room URI, private mls.HPKEPrivateKey) (*GroupInfoRatchetTree, error) {
	if p.Code != GroupInfoSuccess {
		return nil, fmt.Errorf("mimi: group info of %s: the hub answers %v", room, p.Code)
	}
	if p.Room != room {
		return nil, fmt.Errorf("mimi: group info of %s: the answer is about %s", room, p.Room)
	}
	var w codec.Writer
	p.marshalTBS(&w)
	if err := p.CipherSuite.VerifyWithLabel(p.HubSender.SignatureKey, labelGroupInfoResponse, w.Bytes(), p.Signature); err != nil {
		return nil, fmt.Errorf("mimi: group info of %s: %w", room, err)
	}
	b, err := p.CipherSuite.DecryptWithLabel(private, labelGroupInfoTree, []byte(room), p.Encrypted)
	if err != nil {
		return nil, fmt.Errorf("mimi: group info of %s: %w", room, err)
	}
	t := new(GroupInfoRatchetTree)
	if err := codec.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("mimi: group info of %s: %w", room, err)
	}
	return t, nil
}
