package mimi

import (
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// The application components of MIMI (draft-ietf-mimi-protocol-06, Section 10).
const (
	ComponentFrankAAD        mls.ComponentID = 0x20
	ComponentFrankingAgent   mls.ComponentID = 0x21
	ComponentParticipantList mls.ComponentID = 0x22
	ComponentRoomMetadata    mls.ComponentID = 0x23
)

// ErrFrank: a frank isn't the hub's, or is of another message, sender, room or time.
var ErrFrank = errors.New("mimi: frank does not verify")

// Frank is a hub's stamp on an application message (draft-ietf-mimi-protocol-06, Section 5.4).
//
//	struct {
//	    uint8 server_frank[32];
//	    CipherSuite franking_signature_ciphersuite;
//	    opaque franking_integrity_signature<V>;
//	} Frank;
type Frank struct {
	ServerFrank [32]byte
	CipherSuite mls.CipherSuite
	Signature   []byte
}

// MarshalMLS implements codec.Marshaler.
func (f Frank) MarshalMLS(w *codec.Writer) {
	w.Raw(f.ServerFrank[:])
	w.Uint16(uint16(f.CipherSuite))
	w.Opaque(f.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (f *Frank) UnmarshalMLS(r *codec.Reader) {
	*f = Frank{}
	copy(f.ServerFrank[:], r.Raw(len(f.ServerFrank)))
	f.CipherSuite = mls.CipherSuite(r.Uint16())
	f.Signature = r.Opaque()
}

func writeFrank(w *codec.Writer, f *Frank) {
	w.Optional(f != nil)
	if f != nil {
		f.MarshalMLS(w)
	}
}

func readFrank(r *codec.Reader) *Frank {
	if !r.Optional() {
		return nil
	}
	f := new(Frank)
	f.UnmarshalMLS(r)
	return f
}

// FrankAAD is the frank_aad component, which the sender puts into the authenticated data of a message.
//
//	struct { uint8 franking_tag[32]; } FrankAAD;
type FrankAAD struct{ Tag [32]byte }

// MarshalMLS implements codec.Marshaler.
func (f FrankAAD) MarshalMLS(w *codec.Writer) { w.Raw(f.Tag[:]) }

// UnmarshalMLS implements codec.Unmarshaler.
func (f *FrankAAD) UnmarshalMLS(r *codec.Reader) { copy(f.Tag[:], r.Raw(len(f.Tag))) }

// FrankingTag commits a sender to application data: HMAC-SHA256 under the salt of the content.
func FrankingTag(salt, applicationData []byte) FrankAAD {
	h := hmac.New(sha256.New, salt)
	h.Write(applicationData)
	return FrankAAD{Tag: [32]byte(h.Sum(nil))}
}

// FrankingAgentData is the franking_agent component of the GroupContext, and its update: the key with which the hub
// signs franks, of the signature scheme of the group's cipher suite.
//
//	struct {
//	    SignaturePublicKey franking_signature_key;
//	    Credential credential;
//	} FrankingAgentData;
type FrankingAgentData struct {
	SignatureKey []byte
	Credential   mls.Credential
}

// MarshalMLS implements codec.Marshaler.
func (d FrankingAgentData) MarshalMLS(w *codec.Writer) {
	w.Opaque(d.SignatureKey)
	d.Credential.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (d *FrankingAgentData) UnmarshalMLS(r *codec.Reader) {
	*d = FrankingAgentData{SignatureKey: r.Opaque()}
	d.Credential.UnmarshalMLS(r)
}

// FrankedRoom completes the app_data_dictionary of a new room for messages of ContentType that the hub franks: members
// frame application data and authenticated data, know franking tags, and agree on the hub's key.
func FrankedRoom(d mls.AppDataDictionary, agent FrankingAgentData) mls.AppDataDictionary {
	return d.
		Set(mls.ComponentAppComponents, codec.Marshal(append(mls.ComponentsList{ComponentFrankingAgent}, RoomComponents()...))).
		Set(mls.ComponentSafeAAD, codec.Marshal(mls.ComponentsList{ComponentFrankAAD})).
		Set(mls.ComponentMediaTypes, codec.Marshal(mls.MediaTypeList{ContentType()})).
		Set(ComponentFrankingAgent, codec.Marshal(agent))
}

// FrankingAgent returns the franking agent of a room's dictionary, nil if it has none.
func FrankingAgent(d mls.AppDataDictionary) (*FrankingAgentData, error) {
	data, ok := d.Get(ComponentFrankingAgent)
	if !ok {
		return nil, nil
	}
	a := new(FrankingAgentData)
	if err := codec.Unmarshal(data, a); err != nil {
		return nil, fmt.Errorf("mimi: franking agent: %w", err)
	}
	return a, nil
}

// TagOf returns the franking tag in the authenticated data of a message, nil if it has none.
func TagOf(aad []byte) (*FrankAAD, error) {
	items, err := mls.ParseSafeAAD(aad)
	if err != nil {
		return nil, err
	}
	data, ok := items.Get(ComponentFrankAAD)
	if !ok {
		return nil, nil
	}
	tag := new(FrankAAD)
	if err := codec.Unmarshal(data, tag); err != nil {
		return nil, fmt.Errorf("mimi: franking tag: %w", err)
	}
	return tag, nil
}

// TaggedAAD is authenticated data with a franking tag.
func TaggedAAD(tag FrankAAD) []byte {
	return codec.Marshal(mls.SafeAAD(nil).Set(ComponentFrankAAD, codec.Marshal(tag)))
}

// ServerFrankingContext is what a hub vouches for beside the franking tag.
//
//	struct {
//	    IdentifierUri sender_uri;
//	    IdentifierUri room_uri;
//	    uint64 accepted_timestamp;
//	} ServerFrankingContext;
type ServerFrankingContext struct {
	Sender            URI
	Room              URI
	AcceptedTimestamp uint64 // milliseconds since 1970-01-01T00:00:00Z
}

// MarshalMLS implements codec.Marshaler.
func (c ServerFrankingContext) MarshalMLS(w *codec.Writer) {
	c.Sender.MarshalMLS(w)
	c.Room.MarshalMLS(w)
	w.Uint64(c.AcceptedTimestamp)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *ServerFrankingContext) UnmarshalMLS(r *codec.Reader) {
	*c = ServerFrankingContext{Sender: readURI(r, KindUser), Room: readURI(r, KindRoom), AcceptedTimestamp: r.Uint64()}
}

const labelFrankingIntegrity = "FrankingIntegrityTBS"

func frankingIntegrityTBS(serverFrank [32]byte, suite mls.CipherSuite, c ServerFrankingContext) []byte {
	var w codec.Writer
	w.Raw(serverFrank[:])
	w.Uint16(uint16(suite))
	c.MarshalMLS(&w)
	return w.Bytes()
}

func serverFrank(hubKey []byte, tag FrankAAD, c ServerFrankingContext) [32]byte {
	h := hmac.New(sha256.New, hubKey)
	h.Write(tag.Tag[:])
	h.Write(codec.Marshal(c))
	return [32]byte(h.Sum(nil))
}

// NewFrank stamps a message whose franking tag is tag. hubKey is a secret of the hub's own, and signer the key of the
// group's FrankingAgentData.
func NewFrank(rand io.Reader, suite mls.CipherSuite, signer crypto.Signer, hubKey []byte, tag FrankAAD, c ServerFrankingContext) (*Frank, error) {
	f := &Frank{ServerFrank: serverFrank(hubKey, tag, c), CipherSuite: suite}
	var err error
	if f.Signature, err = suite.SignWithLabel(rand, signer, labelFrankingIntegrity, frankingIntegrityTBS(f.ServerFrank, suite, c)); err != nil {
		return nil, fmt.Errorf("mimi: sign a frank: %w", err)
	}
	return f, nil
}

// Verify checks, at a receiver, that the frank was made by the holder of the franking signature key for c. The suite is
// that of the group; a frank of another one is refused. It fails with ErrFrank.
func (f *Frank) Verify(suite mls.CipherSuite, frankingSignatureKey []byte, c ServerFrankingContext) error {
	if f.CipherSuite != suite {
		return fmt.Errorf("%w: cipher suite %v, the group's is %v", ErrFrank, f.CipherSuite, suite)
	}
	if err := suite.VerifyWithLabel(frankingSignatureKey, labelFrankingIntegrity, frankingIntegrityTBS(f.ServerFrank, suite, c), f.Signature); err != nil {
		return fmt.Errorf("%w: %w", ErrFrank, err)
	}
	return nil
}

// VerifyReported checks, at the hub, that the frank is one of hubKey for a message with the franking tag. It fails with
// ErrFrank.
func (f *Frank) VerifyReported(hubKey []byte, tag FrankAAD, c ServerFrankingContext) error {
	if want := serverFrank(hubKey, tag, c); subtle.ConstantTimeCompare(want[:], f.ServerFrank[:]) != 1 {
		return ErrFrank
	}
	return nil
}
