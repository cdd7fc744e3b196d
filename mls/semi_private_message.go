package mls

import (
	"bytes"
	"fmt"
	"io"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// Handshakes that are encrypted to the group and to receivers outside of it, whom the GroupContext names
// (draft-mahy-mls-semiprivatemessage-07). Where the draft leaves something open, it is done as follows. Its wire format
// has no number yet: WireFormatSemiPrivateMessage is of the private range. It calls external_receivers an extension, and
// its IANA section a component of the suggested number 8; as an extension, 8 is required_wire_formats, so it is a
// component here. partial_context_hash is over the four bytes of the leaf index and the nonce as the ratchet gives it.
// The plaintext of the ciphertext is SemiPrivateMessageContent.

const sectionSemiPrivate = "draft-mahy-mls-semiprivatemessage 3"

// ExternalReceiver reads a group's SemiPrivateMessages without being a member (draft-mahy-mls-semiprivatemessage, Section
// 3).
//
//	struct {
//	    HPKEPublicKey external_receiver_public_key;
//	    Credential credential;
//	} ExternalReceiver;
type ExternalReceiver struct {
	PublicKey  HPKEPublicKey
	Credential Credential
}

// MarshalMLS implements codec.Marshaler.
func (x ExternalReceiver) MarshalMLS(w *codec.Writer) {
	w.Opaque(x.PublicKey)
	x.Credential.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (x *ExternalReceiver) UnmarshalMLS(r *codec.Reader) {
	x.PublicKey = r.Opaque()
	x.Credential.UnmarshalMLS(r)
}

// ref is ExternalReceiverRef.
func (x *ExternalReceiver) ref(cs CipherSuite) []byte { return cs.Hash(codec.Marshal(x)) }

// ExternalReceivers is the data of ComponentExternalReceivers in a GroupContext.
type ExternalReceivers []ExternalReceiver

// MarshalMLS implements codec.Marshaler.
func (l ExternalReceivers) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, x ExternalReceiver) { x.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler. More than 256 receivers are refused.
func (l *ExternalReceivers) UnmarshalMLS(r *codec.Reader) {
	*l = codec.ReadVector(r, func(r *codec.Reader) (x ExternalReceiver) { x.UnmarshalMLS(r); return x })
	if len(*l) > maxValues {
		r.Failf("%d external receivers, %d allowed", len(*l), maxValues)
		*l = nil
	}
}

// externalReceivers returns the external receivers that a GroupContext names: the one place that knows where it does.
func externalReceivers(ext Extensions) (ExternalReceivers, error) {
	d, err := dictionaryOf(ext)
	if err != nil {
		return nil, err
	}
	data, ok := d.Get(ComponentExternalReceivers)
	if !ok {
		return nil, nil
	}
	var l ExternalReceivers
	return l, codec.Unmarshal(data, &l)
}

// check refuses keys that aren't and receivers that are the same.
func (l ExternalReceivers) check(cs CipherSuite) error {
	for i := range l {
		if err := cs.checkHPKEPublicKey(l[i].PublicKey); err != nil {
			return invalidBy(sectionSemiPrivate, "key of external receiver %d", i, err)
		}
		for j := range i {
			if bytes.Equal(l[i].PublicKey, l[j].PublicKey) && l[i].Credential.Equal(l[j].Credential) {
				return invalidBy(sectionSemiPrivate, "external receivers %d and %d are the same", j, i)
			}
		}
	}
	return nil
}

// KeyForExternalReceiver is the key of a SemiPrivateMessage for one external receiver
// (draft-mahy-mls-semiprivatemessage, Section 3).
//
//	struct {
//	    ExternalReceiverRef external_receiver_ref;
//	    HPKECiphertext encrypted_keys_and_nonces;
//	} KeyForExternalReceiver;
type KeyForExternalReceiver struct {
	Ref       []byte
	Encrypted HPKECiphertext
}

// MarshalMLS implements codec.Marshaler.
func (k KeyForExternalReceiver) MarshalMLS(w *codec.Writer) {
	w.Opaque(k.Ref)
	k.Encrypted.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (k *KeyForExternalReceiver) UnmarshalMLS(r *codec.Reader) {
	k.Ref = r.OpaqueMax(64)
	k.Encrypted.UnmarshalMLS(r)
}

// SemiPrivateMessage is a proposal or commit that is encrypted to the group and its external receivers
// (draft-mahy-mls-semiprivatemessage, Section 3).
//
//	struct {
//	    opaque group_id<V>;
//	    uint64 epoch;
//	    ContentType content_type;
//	    opaque authenticated_data<V>;
//	    opaque partial_context_hash<V>;
//	    KeyForExternalReceiver keys_for_external_receivers<V>;
//	    opaque framed_content_tbs_hash<V>;
//	    opaque encrypted_sender_data<V>;
//	    opaque ciphertext<V>;
//	} SemiPrivateMessage;
type SemiPrivateMessage struct {
	GroupID              []byte
	Epoch                uint64
	ContentType          ContentType
	AuthenticatedData    []byte
	PartialContextHash   []byte
	Keys                 []KeyForExternalReceiver
	FramedContentTBSHash []byte
	EncryptedSenderData  []byte
	Ciphertext           []byte
}

// marshalAAD writes SemiPrivateContentAAD, which is also how a SemiPrivateMessage begins.
func (m *SemiPrivateMessage) marshalAAD(w *codec.Writer) {
	w.Opaque(m.GroupID)
	w.Uint64(m.Epoch)
	w.Uint8(uint8(m.ContentType))
	w.Opaque(m.AuthenticatedData)
	w.Opaque(m.PartialContextHash)
	codec.WriteVector(w, m.Keys, func(w *codec.Writer, k KeyForExternalReceiver) { k.MarshalMLS(w) })
	w.Opaque(m.FramedContentTBSHash)
}

func (m *SemiPrivateMessage) contentAAD() []byte {
	var w codec.Writer
	m.marshalAAD(&w)
	return w.Bytes()
}

// MarshalMLS implements codec.Marshaler.
func (m SemiPrivateMessage) MarshalMLS(w *codec.Writer) {
	m.marshalAAD(w)
	w.Opaque(m.EncryptedSenderData)
	w.Opaque(m.Ciphertext)
}

// UnmarshalMLS implements codec.Unmarshaler. Application data is refused.
func (m *SemiPrivateMessage) UnmarshalMLS(r *codec.Reader) {
	*m = SemiPrivateMessage{GroupID: r.Opaque(), Epoch: r.Uint64(), ContentType: ContentType(r.Uint8())}
	if m.ContentType != ContentProposal && m.ContentType != ContentCommit {
		r.Failf("semi-private message of content type %d", m.ContentType)
	}
	m.AuthenticatedData = r.Opaque()
	m.PartialContextHash = r.OpaqueMax(64)
	m.Keys = codec.ReadVector(r, func(r *codec.Reader) (k KeyForExternalReceiver) { k.UnmarshalMLS(r); return k })
	m.FramedContentTBSHash = r.OpaqueMax(64)
	m.EncryptedSenderData = r.Opaque()
	m.Ciphertext = r.Opaque()
}

// private is the part that a PrivateMessage has too, for the sender data.
func (m *SemiPrivateMessage) private() *PrivateMessage {
	return &PrivateMessage{GroupID: m.GroupID, Epoch: m.Epoch, ContentType: m.ContentType,
		EncryptedSenderData: m.EncryptedSenderData, Ciphertext: m.Ciphertext}
}

// messageKeys are PerMessageKeyAndNonces.
//
//	struct {
//	    opaque key<V>;
//	    opaque nonce<V>;
//	    opaque reuse_guard[4];
//	    uint32 sender_leaf_index;
//	} PerMessageKeyAndNonces;
type messageKeys struct {
	redact
	key, nonce secret
	reuseGuard [4]byte
	sender     LeafIndex
}

// MarshalMLS implements codec.Marshaler.
func (k *messageKeys) MarshalMLS(w *codec.Writer) {
	w.Opaque(k.key)
	w.Opaque(k.nonce)
	w.Raw(k.reuseGuard[:])
	w.Uint32(uint32(k.sender))
}

// UnmarshalMLS implements codec.Unmarshaler.
func (k *messageKeys) UnmarshalMLS(r *codec.Reader) {
	k.key = r.OpaqueMax(64)
	k.nonce = r.OpaqueMax(64)
	copy(k.reuseGuard[:], r.Raw(4))
	k.sender = LeafIndex(r.Uint32())
}

// erase overwrites the key in memory, after the last use.
func (k *messageKeys) erase() { k.key.erase() }

func (k *messageKeys) partialContextHash(cs CipherSuite) []byte {
	var w codec.Writer
	w.Uint32(uint32(k.sender))
	w.Raw(k.nonce)
	return cs.Hash(w.Bytes())
}

// receiverContext is SemiPrivateMessageContext.
func (m *SemiPrivateMessage) receiverContext() []byte {
	var w codec.Writer
	w.Opaque(m.GroupID)
	w.Uint64(m.Epoch)
	w.Opaque(m.PartialContextHash)
	return w.Bytes()
}

const labelSemiPrivate = "SemiPrivateMessageReceiver"

func (ac *AuthenticatedContent) tbsHash(cs CipherSuite, ctx []byte) []byte {
	var w codec.Writer
	ac.marshalTBS(&w, ctx)
	return cs.Hash(w.Bytes())
}

// semiPrivate says whether the group has SemiPrivateMessages: its members have to know them, and somebody is there to
// receive them.
func (cr *contextRules) semiPrivate() error {
	if !slices.Contains(cr.terms.wireFormats, WireFormatSemiPrivateMessage) {
		return invalidBy(sectionSemiPrivate, "the group does not require mls_semiprivate_message")
	}
	if len(cr.receivers) == 0 {
		return invalidBy(sectionSemiPrivate, "the group has no external receivers")
	}
	return nil
}

// checkKeys says whether a message has a key for each external receiver of the group and for nobody else. (That the
// keys open it is for the receivers to see.)
func (cr *contextRules) checkKeys(cs CipherSuite, keys []KeyForExternalReceiver) error {
	if err := cr.semiPrivate(); err != nil {
		return err
	}
	if len(keys) != len(cr.receivers) {
		return invalidBy(sectionSemiPrivate, "message with keys for %d of %d external receivers", len(keys), len(cr.receivers))
	}
	for i := range cr.receivers {
		ref := cr.receivers[i].ref(cs)
		if !slices.ContainsFunc(keys, func(k KeyForExternalReceiver) bool { return bytes.Equal(k.Ref, ref) }) {
			return invalidBy(sectionSemiPrivate, "message without a key for external receiver %d", i)
		}
	}
	return nil
}

// protectSemiPrivate encrypts ac, whose sender is the member that owns st's ratchets. ctx is the encoded GroupContext.
// If it fails, no key is used up.
func protectSemiPrivate(cs CipherSuite, rand io.Reader, st *secretTree, senderDataSecret secret, ac *AuthenticatedContent, ctx []byte, receivers ExternalReceivers, padding func(int) int) (*SemiPrivateMessage, error) {
	c := &ac.Content
	step, err := st.peekNext(c.Sender.Leaf, handshakeRatchet)
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt message: %w", err)
	}
	k := &messageKeys{key: step.key, nonce: step.nonce, sender: c.Sender.Leaf}
	if _, err := io.ReadFull(rand, k.reuseGuard[:]); err != nil {
		return nil, fmt.Errorf("mls: read randomness: %w", err)
	}
	m := &SemiPrivateMessage{GroupID: c.GroupID, Epoch: c.Epoch, ContentType: c.ContentType, AuthenticatedData: c.AuthenticatedData,
		PartialContextHash: k.partialContextHash(cs), FramedContentTBSHash: ac.tbsHash(cs, ctx)}
	plain := codec.Marshal(k)
	defer clear(plain)
	sealed, err := cs.sealAll(rand, len(receivers), cs.hpkeInfo(labelSemiPrivate, m.receiverContext()), func(i int) (HPKEPublicKey, []byte) {
		return receivers[i].PublicKey, plain
	})
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt to external receivers: %w", err)
	}
	for i := range receivers {
		m.Keys = append(m.Keys, KeyForExternalReceiver{Ref: receivers[i].ref(cs), Encrypted: sealed[i]})
	}
	var w codec.Writer
	ac.marshalPadded(&w, padding)
	if m.Ciphertext, err = cs.aeadSeal(k.key, guardNonce(k.nonce, k.reuseGuard), m.contentAAD(), w.Bytes()); err != nil {
		return nil, fmt.Errorf("mls: encrypt message: %w", err)
	}
	d := senderData{leaf: c.Sender.Leaf, generation: step.generation, reuseGuard: k.reuseGuard}
	key, nonce := senderDataKey(cs, senderDataSecret, m.Ciphertext)
	defer key.erase()
	if m.EncryptedSenderData, err = cs.aeadSeal(key, nonce, m.private().senderDataAAD(), codec.Marshal(d)); err != nil {
		return nil, fmt.Errorf("mls: encrypt sender data: %w", err)
	}
	st.consume(step)
	step.erase()
	return m, nil
}

// open decrypts the content. Its signature and its hash are the caller's to check.
func (m *SemiPrivateMessage) open(cs CipherSuite, k *messageKeys) (*AuthenticatedContent, error) {
	if m.ContentType != ContentProposal && m.ContentType != ContentCommit {
		return nil, fmt.Errorf("%w: semi-private message of content type %d", ErrMalformed, m.ContentType)
	}
	if !bytes.Equal(m.PartialContextHash, k.partialContextHash(cs)) {
		return nil, invalidBy(sectionSemiPrivate, "partial_context_hash")
	}
	plain, err := cs.aeadOpen(k.key, guardNonce(k.nonce, k.reuseGuard), m.contentAAD(), m.Ciphertext)
	if err != nil {
		return nil, fmt.Errorf("mls: message content: %w", err)
	}
	ac := &AuthenticatedContent{WireFormat: WireFormatSemiPrivateMessage, Content: FramedContent{
		GroupID: m.GroupID, Epoch: m.Epoch, Sender: Sender{Type: SenderMember, Leaf: k.sender},
		AuthenticatedData: m.AuthenticatedData, ContentType: m.ContentType,
	}}
	return ac, ac.unmarshalPadded(plain)
}

// unprotectSemiPrivate decrypts m as a member, like unprotectPrivate.
func unprotectSemiPrivate(cs CipherSuite, st *secretTree, senderDataSecret secret, m *SemiPrivateMessage, lim ratchetLimits) (*AuthenticatedContent, *ratchetStep, error) {
	d, err := m.private().sender(cs, senderDataSecret)
	if err != nil {
		return nil, nil, err
	}
	step, err := st.peek(d.leaf, handshakeRatchet, d.generation, lim)
	if err != nil {
		return nil, nil, err
	}
	ac, err := m.open(cs, &messageKeys{key: step.key, nonce: step.nonce, reuseGuard: d.reuseGuard, sender: d.leaf})
	return ac, step, err
}

// SemiPrivateContent is what an external receiver decrypted of a SemiPrivateMessage. A PublicGroup checks it.
type SemiPrivateContent struct {
	content *AuthenticatedContent
	keys    []KeyForExternalReceiver
	tbsHash []byte
}

// Content returns the proposal or commit, which nobody has verified yet.
func (c *SemiPrivateContent) Content() *FramedContent { return &c.content.Content }

// Open decrypts a message for an external receiver, whose entry in the GroupContext and whose private key are given. It
// fails with ErrDecrypt if it doesn't open, with ErrMalformed if there is no key for the receiver, and with a
// ValidationError if its hash of the sender and nonce is wrong. The PublicGroup that is at the message's epoch verifies
// the rest (CheckSemiPrivateProposal, CheckSemiPrivateCommit).
func (m *SemiPrivateMessage) Open(cs CipherSuite, receiver *ExternalReceiver, private HPKEPrivateKey) (*SemiPrivateContent, error) {
	c, err := m.openFor(cs, receiver, private)
	if err != nil {
		return nil, fmt.Errorf("mls: open semi-private message: %w", err)
	}
	return c, nil
}

func (m *SemiPrivateMessage) openFor(cs CipherSuite, receiver *ExternalReceiver, private HPKEPrivateKey) (*SemiPrivateContent, error) {
	ref := receiver.ref(cs)
	i := slices.IndexFunc(m.Keys, func(k KeyForExternalReceiver) bool { return bytes.Equal(k.Ref, ref) })
	if i < 0 {
		return nil, fmt.Errorf("%w: no key for this receiver", ErrMalformed)
	}
	plain, err := cs.DecryptWithLabel(private, labelSemiPrivate, m.receiverContext(), m.Keys[i].Encrypted)
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	defer clear(plain)
	k := new(messageKeys)
	defer k.erase()
	if err := codec.Unmarshal(plain, k); err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	if len(k.key) != cs.aeadKeySize() || len(k.nonce) != cs.aeadNonceSize() {
		return nil, fmt.Errorf("%w: key of %d bytes, nonce of %d", ErrMalformed, len(k.key), len(k.nonce))
	}
	ac, err := m.open(cs, k)
	if err != nil {
		return nil, err
	}
	return &SemiPrivateContent{content: ac, keys: m.Keys, tbsHash: m.FramedContentTBSHash}, nil
}

// checkSemiPrivate checks what the signature doesn't cover.
func (p *publicState) checkSemiPrivate(ac *AuthenticatedContent, keys []KeyForExternalReceiver, tbsHash []byte) error {
	cr, err := p.contextRules()
	if err != nil {
		return err
	}
	if err := cr.checkKeys(p.suite(), keys); err != nil {
		return err
	}
	if !bytes.Equal(tbsHash, ac.tbsHash(p.suite(), p.encoded)) {
		return invalidBy(sectionSemiPrivate, "framed_content_tbs_hash")
	}
	return nil
}

// CheckSemiPrivateProposal is CheckProposal for what was opened of a SemiPrivateMessage.
func (g *PublicGroup) CheckSemiPrivateProposal(c *SemiPrivateContent) (*StagedProposal, error) {
	g.op.Lock()
	defer g.done()
	if err := g.checkSemiPrivate(c); err != nil {
		return nil, fmt.Errorf("mls: check proposal: %w", err)
	}
	s, err := g.checkProposal(c.content, nil)
	if err != nil {
		return nil, fmt.Errorf("mls: check proposal: %w", err)
	}
	return s, nil
}

// CheckSemiPrivateCommit is CheckCommit for what was opened of a SemiPrivateMessage. The hash by which the draft binds
// what members and receivers see covers neither the signature nor the confirmation tag, which a committer can make
// differ: CheckGroupInfo shows whether the epoch is that of its GroupInfo.
func (g *PublicGroup) CheckSemiPrivateCommit(c *SemiPrivateContent) (*StagedPublic, error) {
	g.op.Lock()
	defer g.done()
	if err := g.checkSemiPrivate(c); err != nil {
		return nil, fmt.Errorf("mls: check commit: %w", err)
	}
	s, err := g.checkCommit(c.content)
	if err != nil {
		return nil, fmt.Errorf("mls: check commit: %w", err)
	}
	return s, nil
}

func (g *PublicGroup) checkSemiPrivate(c *SemiPrivateContent) error {
	if err := g.state.checkPlace(c.content.Content.GroupID, c.content.Content.Epoch); err != nil {
		return err
	}
	return g.state.checkSemiPrivate(c.content, c.keys, c.tbsHash)
}
