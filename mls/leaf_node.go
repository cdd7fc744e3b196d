package mls

import (
	"crypto"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// ProtocolVersion is a version of MLS (RFC 9420, Section 6).
type ProtocolVersion uint16

// MLS10 is the protocol of RFC 9420.
const MLS10 ProtocolVersion = 1

// LeafNodeSource says how a leaf came into the tree (RFC 9420, Section 7.2).
type LeafNodeSource uint8

// The sources of RFC 9420.
const (
	LeafNodeKeyPackage LeafNodeSource = 1
	LeafNodeUpdate     LeafNodeSource = 2
	LeafNodeCommit     LeafNodeSource = 3
)

// Capabilities lists what a client supports; default proposal and extension types aren't listed
// (RFC 9420, Section 7.2).
type Capabilities struct {
	Versions     []ProtocolVersion
	CipherSuites []CipherSuite
	Extensions   []ExtensionType
	Proposals    []ProposalType
	Credentials  []CredentialType
}

// DefaultCapabilities lists all that this package supports, the post-quantum suites among it: they take 22 bytes in each
// leaf, by which a group sees whom it could take along to such a suite.
func DefaultCapabilities() Capabilities {
	return Capabilities{
		Versions:     []ProtocolVersion{MLS10},
		CipherSuites: CipherSuites(),
		Extensions:   []ExtensionType{ExtensionAppDataDictionary, ExtensionSupportedWireFormats, ExtensionRequiredWireFormats},
		Proposals:    []ProposalType{ProposalAppDataUpdate, ProposalAppEphemeral, ProposalSelfRemove},
		Credentials:  []CredentialType{CredentialBasic, CredentialX509},
	}
}

// defaultCapabilities has the suite too if it is one by a second number, which everybody else needs not know.
func defaultCapabilities(cs CipherSuite) Capabilities {
	c := DefaultCapabilities()
	if !c.supportsSuite(cs) {
		c.CipherSuites = append(c.CipherSuites, cs)
	}
	return c
}

func (c Capabilities) isZero() bool {
	return c.Versions == nil && c.CipherSuites == nil && c.Extensions == nil && c.Proposals == nil && c.Credentials == nil
}

func (c Capabilities) clone() Capabilities {
	return Capabilities{slices.Clone(c.Versions), slices.Clone(c.CipherSuites), slices.Clone(c.Extensions),
		slices.Clone(c.Proposals), slices.Clone(c.Credentials)}
}

func (c Capabilities) supportsExtension(t ExtensionType) bool {
	return t.isDefault() || slices.Contains(c.Extensions, t)
}

func (c Capabilities) supportsProposal(t ProposalType) bool {
	return t.isDefault() || slices.Contains(c.Proposals, t)
}

func (c Capabilities) supportsCredential(t CredentialType) bool {
	return slices.Contains(c.Credentials, t)
}

func (c Capabilities) supportsSuite(cs CipherSuite) bool { return slices.Contains(c.CipherSuites, cs) }

// supportsRequired checks a required_capabilities extension (RFC 9420, Section 11.1).
func (c Capabilities) supportsRequired(req RequiredCapabilities) error {
	for _, t := range req.Extensions {
		if !c.supportsExtension(t) {
			return invalid("11.1", "required extension type %d not supported", t)
		}
	}
	for _, t := range req.Proposals {
		if !c.supportsProposal(t) {
			return invalid("11.1", "required proposal type %d not supported", t)
		}
	}
	for _, t := range req.Credentials {
		if !c.supportsCredential(t) {
			return invalid("11.1", "required credential type %d not supported", t)
		}
	}
	return nil
}

// grease adds one random reserved value to each list that may have them (RFC 9420, Section 13.5).
func (c Capabilities) grease(rand io.Reader) (Capabilities, error) {
	var b [4]byte
	if _, err := io.ReadFull(rand, b[:]); err != nil {
		return c, fmt.Errorf("mls: read randomness: %w", err)
	}
	value := func(b byte) uint16 { return uint16(b%15)*0x1010 + 0x0a0a }
	c = c.clone()
	c.CipherSuites = append(c.CipherSuites, CipherSuite(value(b[0])))
	c.Extensions = append(c.Extensions, ExtensionType(value(b[1])))
	c.Proposals = append(c.Proposals, ProposalType(value(b[2])))
	c.Credentials = append(c.Credentials, CredentialType(value(b[3])))
	return c, nil
}

// MarshalMLS implements codec.Marshaler.
func (c Capabilities) MarshalMLS(w *codec.Writer) {
	writeUint16s(w, c.Versions)
	writeUint16s(w, c.CipherSuites)
	writeUint16s(w, c.Extensions)
	writeUint16s(w, c.Proposals)
	writeUint16s(w, c.Credentials)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *Capabilities) UnmarshalMLS(r *codec.Reader) {
	c.Versions = readUint16s[ProtocolVersion](r)
	c.CipherSuites = readUint16s[CipherSuite](r)
	c.Extensions = readUint16s[ExtensionType](r)
	c.Proposals = readUint16s[ProposalType](r)
	c.Credentials = readUint16s[CredentialType](r)
}

// Lifetime is when a KeyPackage's leaf is valid (RFC 9420, Section 7.2): seconds since 1970-01-01T00:00:00Z, both ends
// included.
type Lifetime struct{ NotBefore, NotAfter uint64 }

// LifetimeFrom returns the lifetime of length d that starts at t, with an hour before it for clocks that differ.
func LifetimeFrom(t time.Time, d time.Duration) Lifetime {
	return Lifetime{NotBefore: uint64(max(0, t.Add(-time.Hour).Unix())), NotAfter: uint64(max(0, t.Add(d).Unix()))}
}

// Contains says whether t is within the lifetime.
func (l Lifetime) Contains(t time.Time) bool {
	s := t.Unix()
	return s >= 0 && l.NotBefore <= uint64(s) && uint64(s) <= l.NotAfter
}

// LeafNode describes a client in a group (RFC 9420, Section 7.2). Once in a tree it isn't changed, only replaced.
//
//	struct {
//	    HPKEPublicKey encryption_key;
//	    SignaturePublicKey signature_key;
//	    Credential credential;
//	    Capabilities capabilities;
//	    LeafNodeSource leaf_node_source;
//	    select (LeafNode.leaf_node_source) {
//	        case key_package: Lifetime lifetime;
//	        case update:      struct{};
//	        case commit:      opaque parent_hash<V>;
//	    };
//	    Extension extensions<V>;
//	    opaque signature<V>;
//	} LeafNode;
type LeafNode struct {
	EncryptionKey HPKEPublicKey
	SignatureKey  []byte
	Credential    Credential
	Capabilities  Capabilities
	Source        LeafNodeSource
	Lifetime      Lifetime // key_package
	ParentHash    []byte   // commit
	Extensions    Extensions
	Signature     []byte
}

func (l *LeafNode) marshalUnsigned(w *codec.Writer) {
	w.Opaque(l.EncryptionKey)
	w.Opaque(l.SignatureKey)
	l.Credential.MarshalMLS(w)
	l.Capabilities.MarshalMLS(w)
	w.Uint8(uint8(l.Source))
	switch l.Source {
	case LeafNodeKeyPackage:
		w.Uint64(l.Lifetime.NotBefore)
		w.Uint64(l.Lifetime.NotAfter)
	case LeafNodeCommit:
		w.Opaque(l.ParentHash)
	}
	l.Extensions.MarshalMLS(w)
}

// MarshalMLS implements codec.Marshaler.
func (l LeafNode) MarshalMLS(w *codec.Writer) {
	l.marshalUnsigned(w)
	w.Opaque(l.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *LeafNode) UnmarshalMLS(r *codec.Reader) {
	*l = LeafNode{}
	l.EncryptionKey = r.Opaque()
	l.SignatureKey = r.Opaque()
	l.Credential.UnmarshalMLS(r)
	l.Capabilities.UnmarshalMLS(r)
	l.Source = LeafNodeSource(r.Uint8())
	switch l.Source {
	case LeafNodeKeyPackage:
		l.Lifetime.NotBefore = r.Uint64()
		l.Lifetime.NotAfter = r.Uint64()
	case LeafNodeUpdate:
	case LeafNodeCommit:
		l.ParentHash = r.Opaque()
	default:
		r.Failf("leaf node source %d", l.Source)
	}
	l.Extensions.UnmarshalMLS(r)
	l.Signature = r.Opaque()
}

// tbs writes LeafNodeTBS: the group and the leaf's place are signed too unless the leaf comes from a KeyPackage.
func (l *LeafNode) tbs(groupID []byte, i LeafIndex) func(w *codec.Writer) {
	return func(w *codec.Writer) {
		l.marshalUnsigned(w)
		if l.Source != LeafNodeKeyPackage {
			w.Opaque(groupID)
			w.Uint32(uint32(i))
		}
	}
}

const labelLeafNode = "LeafNodeTBS"

func (l *LeafNode) sign(cs CipherSuite, rand io.Reader, signer crypto.Signer, groupID []byte, i LeafIndex) error {
	sig, err := cs.sign(rand, signer, labelLeafNode, l.tbs(groupID, i))
	if err != nil {
		return fmt.Errorf("mls: sign leaf node: %w", err)
	}
	l.Signature = sig
	return nil
}

func (l *LeafNode) verifySignature(cs CipherSuite, groupID []byte, i LeafIndex) error {
	return cs.verify(l.SignatureKey, labelLeafNode, l.tbs(groupID, i), l.Signature)
}

// clone returns a copy whose fields can be replaced, and whose capabilities and extensions can be changed.
func (l *LeafNode) clone() *LeafNode {
	c := *l
	c.Capabilities = l.Capabilities.clone()
	c.Extensions = slices.Clone(l.Extensions)
	return &c
}

// validateStatic checks what Section 7.3 of RFC 9420 asks of a leaf by itself.
func (l *LeafNode) validateStatic() error {
	if !slices.Contains(l.Capabilities.Versions, MLS10) {
		return invalid("7.2", "leaf node does not list mls10 among its versions")
	}
	if !l.Capabilities.supportsCredential(l.Credential.Type) {
		return invalid("7.2", "credential type %d not listed in the leaf node's capabilities", l.Credential.Type)
	}
	for _, e := range l.Extensions {
		if !l.Capabilities.supportsExtension(e.Type) {
			return invalid("7.3", "extension type %d not listed in the leaf node's capabilities", e.Type)
		}
	}
	return l.Extensions.validate()
}
