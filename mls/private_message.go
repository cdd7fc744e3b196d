package mls

import (
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls/codec"
)

// PrivateMessage is a message that is authenticated and encrypted (RFC 9420, Section 6.3).
//
//	struct {
//	    opaque group_id<V>;
//	    uint64 epoch;
//	    ContentType content_type;
//	    opaque authenticated_data<V>;
//	    opaque encrypted_sender_data<V>;
//	    opaque ciphertext<V>;
//	} PrivateMessage;
type PrivateMessage struct {
	GroupID             []byte
	Epoch               uint64
	ContentType         ContentType
	AuthenticatedData   []byte
	EncryptedSenderData []byte
	Ciphertext          []byte
}

// MarshalMLS implements codec.Marshaler.
func (m PrivateMessage) MarshalMLS(w *codec.Writer) {
	m.marshalAAD(w)
	w.Opaque(m.EncryptedSenderData)
	w.Opaque(m.Ciphertext)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *PrivateMessage) UnmarshalMLS(r *codec.Reader) {
	*m = PrivateMessage{GroupID: r.Opaque(), Epoch: r.Uint64(), ContentType: ContentType(r.Uint8())}
	if m.ContentType < ContentApplication || m.ContentType > ContentCommit {
		r.Failf("content type %d", m.ContentType)
	}
	m.AuthenticatedData = r.Opaque()
	m.EncryptedSenderData = r.Opaque()
	m.Ciphertext = r.Opaque()
}

// marshalAAD writes PrivateContentAAD, which is also how a PrivateMessage begins.
func (m *PrivateMessage) marshalAAD(w *codec.Writer) {
	m.marshalSenderDataAAD(w)
	w.Opaque(m.AuthenticatedData)
}

func (m *PrivateMessage) contentAAD() []byte { return codec.Encode(m.marshalAAD) }

func (m *PrivateMessage) senderDataAAD() []byte { return codec.Encode(m.marshalSenderDataAAD) }

func (m *PrivateMessage) marshalSenderDataAAD(w *codec.Writer) {
	w.Opaque(m.GroupID)
	w.Uint64(m.Epoch)
	w.Uint8(uint8(m.ContentType))
}

// senderData says which key encrypts a message (RFC 9420, Section 6.3.2).
type senderData struct {
	leaf       LeafIndex
	generation uint32
	reuseGuard [4]byte
}

// MarshalMLS implements codec.Marshaler.
func (d senderData) MarshalMLS(w *codec.Writer) {
	w.Uint32(uint32(d.leaf))
	w.Uint32(d.generation)
	w.Raw(d.reuseGuard[:])
}

// UnmarshalMLS implements codec.Unmarshaler.
func (d *senderData) UnmarshalMLS(r *codec.Reader) {
	d.leaf = LeafIndex(r.Uint32())
	d.generation = r.Uint32()
	copy(d.reuseGuard[:], r.Raw(4))
}

// senderDataKey derives the key and nonce of the sender data from a sample of the ciphertext.
func senderDataKey(cs CipherSuite, senderDataSecret secret, ciphertext []byte) (key, nonce secret) {
	sample := ciphertext[:min(len(ciphertext), cs.HashSize())]
	return cs.expandWithLabel(senderDataSecret, "key", sample, cs.aeadKeySize()),
		cs.expandWithLabel(senderDataSecret, "nonce", sample, cs.aeadNonceSize())
}

func guardNonce(nonce secret, guard [4]byte) secret {
	out := append(secret(nil), nonce...)
	for i, b := range guard {
		out[i] ^= b
	}
	return out
}

func kindOf(t ContentType) ratchetKind {
	if t == ContentApplication {
		return applicationRatchet
	}
	return handshakeRatchet
}

// protectPrivate encrypts ac, whose sender is the member that owns st's ratchets, and returns the generation that it
// used. padding gets the length of the content in bytes and returns the length to pad it to; nil pads nothing.
func protectPrivate(cs CipherSuite, rand io.Reader, st *secretTree, senderDataSecret secret, ac *AuthenticatedContent, padding func(int) int) (*PrivateMessage, uint32, error) {
	c := &ac.Content
	if ac.WireFormat != WireFormatPrivateMessage || c.Sender.Type != SenderMember {
		return nil, 0, fmt.Errorf("mls: encrypt message: %w: only members encrypt, what they signed for it", ErrMalformed)
	}
	d := senderData{leaf: c.Sender.Leaf}
	if _, err := io.ReadFull(rand, d.reuseGuard[:]); err != nil {
		return nil, 0, fmt.Errorf("mls: read randomness: %w", err)
	}
	w := codec.Scratch()
	defer w.Free()
	ac.marshalPadded(w, padding)
	generation, key, nonce, err := st.next(c.Sender.Leaf, kindOf(c.ContentType))
	if err != nil {
		return nil, 0, fmt.Errorf("mls: encrypt message: %w", err)
	}
	d.generation = generation
	m := &PrivateMessage{GroupID: c.GroupID, Epoch: c.Epoch, ContentType: c.ContentType, AuthenticatedData: c.AuthenticatedData}
	defer key.erase()
	defer nonce.erase()
	if m.Ciphertext, err = cs.aeadSeal(key, guardNonce(nonce, d.reuseGuard), m.contentAAD(), w.Bytes()); err != nil {
		return nil, 0, fmt.Errorf("mls: encrypt message: %w", err)
	}
	sdKey, sdNonce := senderDataKey(cs, senderDataSecret, m.Ciphertext)
	defer sdKey.erase()
	if m.EncryptedSenderData, err = cs.aeadSeal(sdKey, sdNonce, m.senderDataAAD(), codec.Marshal(d)); err != nil {
		return nil, 0, fmt.Errorf("mls: encrypt sender data: %w", err)
	}
	return m, generation, nil
}

// marshalPadded writes PrivateMessageContent into a Writer that has nothing else.
func (ac *AuthenticatedContent) marshalPadded(w *codec.Writer, padding func(int) int) {
	ac.Content.marshalBody(w)
	marshalAuth(w, ac.Content.ContentType, ac.Signature, ac.ConfirmationTag)
	if n := len(w.Bytes()); padding != nil {
		if to := padding(n); to > n {
			w.Raw(make([]byte, to-n))
		}
	}
}

// unmarshalPadded reads what marshalPadded wrote of the content's type.
func (ac *AuthenticatedContent) unmarshalPadded(plain []byte) error {
	r := codec.NewReader(plain)
	ac.Content.unmarshalBody(r)
	ac.Signature, ac.ConfirmationTag = unmarshalAuth(r, ac.Content.ContentType)
	if err := r.Err(); err != nil {
		return fmt.Errorf("mls: message content: %w", err)
	}
	for _, b := range r.Rest() {
		if b != 0 {
			return fmt.Errorf("mls: message content: %w: padding is not zero", ErrMalformed)
		}
	}
	return nil
}

// sender decrypts the sender data.
func (m *PrivateMessage) sender(cs CipherSuite, senderDataSecret secret) (senderData, error) {
	var d senderData
	key, nonce := senderDataKey(cs, senderDataSecret, m.Ciphertext)
	defer key.erase()
	b, err := cs.aeadOpen(key, nonce, m.senderDataAAD(), m.EncryptedSenderData)
	if err != nil {
		return d, fmt.Errorf("mls: sender data: %w", err)
	}
	if err := codec.Unmarshal(b, &d); err != nil {
		return d, fmt.Errorf("mls: sender data: %w", err)
	}
	return d, nil
}

// unprotectPrivate decrypts m. st isn't changed: the caller verifies the signature and then consumes the step, so
// that a forged message costs no key.
func unprotectPrivate(cs CipherSuite, st *secretTree, senderDataSecret secret, m *PrivateMessage, lim ratchetLimits) (*AuthenticatedContent, *ratchetStep, error) {
	d, err := m.sender(cs, senderDataSecret)
	if err != nil {
		return nil, nil, err
	}
	step, err := st.peek(d.leaf, kindOf(m.ContentType), d.generation, lim)
	if err != nil {
		return nil, nil, err
	}
	plain, err := cs.aeadOpen(step.key, guardNonce(step.nonce, d.reuseGuard), m.contentAAD(), m.Ciphertext)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: message content: %w", err)
	}
	ac := &AuthenticatedContent{WireFormat: WireFormatPrivateMessage, Content: FramedContent{
		GroupID:           m.GroupID,
		Epoch:             m.Epoch,
		Sender:            Sender{Type: SenderMember, Leaf: d.leaf},
		AuthenticatedData: m.AuthenticatedData,
		ContentType:       m.ContentType,
	}}
	if err := ac.unmarshalPadded(plain); err != nil {
		return nil, nil, err
	}
	return ac, step, nil
}
