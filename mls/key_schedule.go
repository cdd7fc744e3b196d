package mls

import (
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// The key schedule (RFC 9420, Section 8).

// GroupContext summarizes the state of a group in an epoch (RFC 9420, Section 8.1).
//
//	struct {
//	    ProtocolVersion version = mls10;
//	    CipherSuite cipher_suite;
//	    opaque group_id<V>;
//	    uint64 epoch;
//	    opaque tree_hash<V>;
//	    opaque confirmed_transcript_hash<V>;
//	    Extension extensions<V>;
//	} GroupContext;
type GroupContext struct {
	Version                 ProtocolVersion
	CipherSuite             CipherSuite
	GroupID                 []byte
	Epoch                   uint64
	TreeHash                []byte
	ConfirmedTranscriptHash []byte
	Extensions              Extensions
}

// MarshalMLS implements codec.Marshaler.
func (c GroupContext) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(c.Version))
	w.Uint16(uint16(c.CipherSuite))
	w.Opaque(c.GroupID)
	w.Uint64(c.Epoch)
	w.Opaque(c.TreeHash)
	w.Opaque(c.ConfirmedTranscriptHash)
	c.Extensions.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler. Other versions than mls10 are refused.
func (c *GroupContext) UnmarshalMLS(r *codec.Reader) {
	*c = GroupContext{Version: ProtocolVersion(r.Uint16()), CipherSuite: CipherSuite(r.Uint16())}
	if r.Err() == nil && c.Version != MLS10 {
		r.Fail(fmt.Errorf("%w: protocol version %d", ErrUnsupported, c.Version))
		return
	}
	c.GroupID = r.Opaque()
	c.Epoch = r.Uint64()
	c.TreeHash = r.Opaque()
	c.ConfirmedTranscriptHash = r.Opaque()
	c.Extensions.UnmarshalMLS(r)
}

// PSKType says how a pre-shared key was provisioned (RFC 9420, Section 8.4).
type PSKType uint8

// The types of RFC 9420 and draft-ietf-mls-extensions.
const (
	PSKExternal    PSKType = 1
	PSKResumption  PSKType = 2
	PSKApplication PSKType = 3
)

// ResumptionUsage says what a resumption PSK is used for (RFC 9420, Section 8.4).
type ResumptionUsage uint8

// The usages of RFC 9420, Section 8.4.
const (
	UsageApplication ResumptionUsage = 1
	UsageReInit      ResumptionUsage = 2
	UsageBranch      ResumptionUsage = 3
)

// PreSharedKeyID names a pre-shared key (RFC 9420, Section 8.4).
//
//	struct {
//	    PSKType psktype;
//	    select (PreSharedKeyID.psktype) {
//	        case external:    opaque psk_id<V>;
//	        case resumption:  ResumptionPSKUsage usage; opaque psk_group_id<V>; uint64 psk_epoch;
//	        case application: ComponentID component_id; opaque psk_id<V>;
//	    };
//	    opaque psk_nonce<V>;
//	} PreSharedKeyID;
type PreSharedKeyID struct {
	Type      PSKType
	ID        []byte          // external, application
	Component ComponentID     // application
	Usage     ResumptionUsage // resumption
	GroupID   []byte          // resumption
	Epoch     uint64          // resumption
	Nonce     []byte
}

// MarshalMLS implements codec.Marshaler.
func (id PreSharedKeyID) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(id.Type))
	switch id.Type {
	case PSKExternal:
		w.Opaque(id.ID)
	case PSKResumption:
		w.Uint8(uint8(id.Usage))
		w.Opaque(id.GroupID)
		w.Uint64(id.Epoch)
	case PSKApplication:
		w.Uint16(uint16(id.Component))
		w.Opaque(id.ID)
	}
	w.Opaque(id.Nonce)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (id *PreSharedKeyID) UnmarshalMLS(r *codec.Reader) {
	*id = PreSharedKeyID{Type: PSKType(r.Uint8())}
	switch id.Type {
	case PSKExternal:
		id.ID = r.Opaque()
	case PSKResumption:
		id.Usage = ResumptionUsage(r.Uint8())
		if id.Usage < UsageApplication || id.Usage > UsageBranch {
			r.Failf("resumption PSK usage %d", id.Usage)
		}
		id.GroupID = r.Opaque()
		id.Epoch = r.Uint64()
	case PSKApplication:
		id.Component = ComponentID(r.Uint16())
		id.ID = r.Opaque()
	default:
		r.Failf("PSK type %d", id.Type)
	}
	id.Nonce = r.Opaque()
}

// pskInput is a pre-shared key with its name.
type pskInput struct {
	redact
	id  PreSharedKeyID
	psk secret
}

// pskSecret combines pre-shared keys in their order (RFC 9420, Section 8.4); none give the zero secret.
func (cs CipherSuite) pskSecret(in []pskInput) (secret, error) {
	if len(in) > 1<<16-1 {
		return nil, fmt.Errorf("%w: %d pre-shared keys", ErrMalformed, len(in))
	}
	out := cs.zeroSecret()
	for i, p := range in {
		var label codec.Writer
		p.id.MarshalMLS(&label)
		label.Uint16(uint16(i))
		label.Uint16(uint16(len(in)))
		extracted := cs.extract(cs.zeroSecret(), p.psk)
		input := cs.expandWithLabel(extracted, "derived psk", label.Bytes(), cs.HashSize())
		before := out
		out = cs.extract(input, before)
		extracted.erase()
		input.erase()
		before.erase()
	}
	return out, nil
}

// joinerSecret is the first half of the key schedule; ctx is the new epoch's GroupContext.
func (cs CipherSuite) joinerSecret(init, commit secret, ctx []byte) secret {
	s := cs.extract(init, commit)
	defer s.erase()
	return cs.expandWithLabel(s, "joiner", ctx, cs.HashSize())
}

func (cs CipherSuite) welcomeSecret(joiner, psk secret) secret {
	s := cs.extract(joiner, psk)
	defer s.erase()
	return cs.deriveSecret(s, "welcome")
}

// epochSecrets derives an epoch's secrets from the joiner secret; ctx is the epoch's GroupContext.
func (cs CipherSuite) epochSecrets(joiner, psk secret, ctx []byte) *epochSecrets {
	member := cs.extract(joiner, psk)
	defer member.erase()
	s := cs.expandWithLabel(member, "epoch", ctx, cs.HashSize())
	defer s.erase()
	return cs.epochSecretsFrom(s)
}

// epochSecretsFrom derives an epoch's secrets from its epoch_secret, which a group's creator samples (RFC 9420,
// Section 11).
func (cs CipherSuite) epochSecretsFrom(epochSecret secret) *epochSecrets {
	return &epochSecrets{
		senderData:    cs.deriveSecret(epochSecret, "sender data"),
		encryption:    cs.deriveSecret(epochSecret, "encryption"),
		exporter:      cs.deriveSecret(epochSecret, "exporter"),
		external:      cs.deriveSecret(epochSecret, "external"),
		confirmation:  cs.deriveSecret(epochSecret, "confirm"),
		membership:    cs.deriveSecret(epochSecret, "membership"),
		resumption:    cs.deriveSecret(epochSecret, "resumption"),
		authenticator: cs.deriveSecret(epochSecret, "authentication"),
		init:          cs.deriveSecret(epochSecret, "init"),

		applicationExport: cs.deriveSecret(epochSecret, "application_export"),
	}
}

// epochSecrets are the secrets of an epoch (RFC 9420, Section 8, Table 4). encryption is the root of the secret tree
// and is cleared once that exists. So is applicationExport, the root of the exporter tree (draft-ietf-mls-extensions,
// Section 4.4), which isn't among the stored fields and nil in what format 1 stored.
type epochSecrets struct {
	redact
	senderData, encryption, exporter, external, confirmation, membership, resumption, authenticator, init secret

	applicationExport secret
}

func (e *epochSecrets) fields() []*secret {
	return []*secret{&e.senderData, &e.encryption, &e.exporter, &e.external, &e.confirmation, &e.membership,
		&e.resumption, &e.authenticator, &e.init}
}

// erase overwrites the secrets in memory.
func (e *epochSecrets) erase() {
	for _, s := range e.fields() {
		s.erase()
	}
	e.applicationExport.erase()
}

// clone copies the secrets, so that erasing the ones leaves the others.
func (e *epochSecrets) clone() *epochSecrets {
	c := new(epochSecrets)
	for i, s := range e.fields() {
		*c.fields()[i] = slices.Clone(*s)
	}
	c.applicationExport = slices.Clone(e.applicationExport)
	return c
}

// MarshalMLS implements codec.Marshaler, for the client's encrypted store.
func (e *epochSecrets) MarshalMLS(w *codec.Writer) {
	for _, s := range e.fields() {
		w.Opaque(*s)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *epochSecrets) UnmarshalMLS(r *codec.Reader) {
	for _, s := range e.fields() {
		*s = r.Opaque()
	}
}

// confirmationTag confirms the group's state (RFC 9420, Section 6.1).
func (e *epochSecrets) confirmationTag(cs CipherSuite, confirmedTranscriptHash []byte) []byte {
	return cs.mac(e.confirmation, confirmedTranscriptHash)
}

func (e *epochSecrets) verifyConfirmationTag(cs CipherSuite, confirmedTranscriptHash, tag []byte) error {
	if !cs.verifyMAC(e.confirmation, confirmedTranscriptHash, tag) {
		return ErrConfirmationTag
	}
	return nil
}

// export is MLS-Exporter (RFC 9420, Section 8.5). n is at most 255 times the size of the hash.
func (e *epochSecrets) export(cs CipherSuite, label string, context []byte, n int) []byte {
	s := cs.deriveSecret(e.exporter, label)
	defer s.erase()
	return cs.expandWithLabel(s, "exported", cs.Hash(context), n)
}

// confirmedTranscriptHash is the running hash up to the commit in ac (RFC 9420, Section 8.2).
func (cs CipherSuite) confirmedTranscriptHash(interimBefore []byte, ac *AuthenticatedContent) []byte {
	return cs.hashOf(func(w *codec.Writer) {
		w.Raw(interimBefore)
		w.Uint16(uint16(ac.WireFormat))
		ac.Content.MarshalMLS(w)
		w.Opaque(ac.Signature)
	})
}

// interimTranscriptHash adds the commit's confirmation tag to the running hash.
func (cs CipherSuite) interimTranscriptHash(confirmed, confirmationTag []byte) []byte {
	return cs.hashOf(func(w *codec.Writer) {
		w.Raw(confirmed)
		w.Opaque(confirmationTag)
	})
}
