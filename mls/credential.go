package mls

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// CredentialType says how a Credential names a client (RFC 9420, Sections 5.3 and 17.5).
type CredentialType uint16

// The credential types that this package encodes.
const (
	CredentialBasic CredentialType = 1
	CredentialX509  CredentialType = 2
)

// Credential binds an identity to a leaf's signature key (RFC 9420, Section 5.3).
//
//	struct {
//	    CredentialType credential_type;
//	    select (Credential.credential_type) {
//	        case basic: opaque identity<V>;
//	        case x509:  Certificate certificates<V>;
//	    };
//	} Credential;
type Credential struct {
	Type         CredentialType
	Identity     []byte   // basic
	Certificates [][]byte // x509: DER, the leaf's certificate first
}

// BasicCredential returns a credential that asserts id.
func BasicCredential(id []byte) Credential { return Credential{Type: CredentialBasic, Identity: id} }

// X509Credential returns a credential of a chain of DER certificates, the end-entity's first.
func X509Credential(chain [][]byte) Credential {
	return Credential{Type: CredentialX509, Certificates: chain}
}

// Equal says whether both have the same encoding.
func (c Credential) Equal(o Credential) bool {
	return c.Type == o.Type && bytes.Equal(c.Identity, o.Identity) &&
		slices.EqualFunc(c.Certificates, o.Certificates, bytes.Equal)
}

// MarshalMLS implements codec.Marshaler.
func (c Credential) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(c.Type))
	switch c.Type {
	case CredentialBasic:
		w.Opaque(c.Identity)
	case CredentialX509:
		codec.WriteVector(w, c.Certificates, (*codec.Writer).Opaque)
	}
}

// UnmarshalMLS implements codec.Unmarshaler. Other types than basic and x509 are refused: their length is unknown.
func (c *Credential) UnmarshalMLS(r *codec.Reader) {
	*c = Credential{Type: CredentialType(r.Uint16())}
	switch c.Type {
	case CredentialBasic:
		c.Identity = r.Opaque()
	case CredentialX509:
		c.Certificates = codec.ReadVector(r, (*codec.Reader).Opaque)
	default:
		r.Fail(fmt.Errorf("%w: credential type %d", ErrUnsupported, c.Type))
	}
}

// CredentialVerifier is the authentication service as MLS sees it (RFC 9420, Section 5.3.1). Its methods may be
// called by several goroutines at once.
type CredentialVerifier interface {
	// VerifyCredential says whether cred is valid and speaks for signatureKey, which is in the suite's encoding.
	VerifyCredential(cred Credential, signatureKey []byte, suite CipherSuite) error
	// ValidSuccessor says whether new may replace old in a leaf.
	ValidSuccessor(old, new Credential) error
	// Identity names the client: two leaves of a group may not have the same. Nil means no such check.
	Identity(cred Credential) ([]byte, error)
}
