package mimi

import (
	"crypto"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// MaxKeyMaterialClients is the largest number of clients of one user that a KeyMaterialResponse lists.
const MaxKeyMaterialClients = 1024

// KeyMaterialRequest claims a KeyPackage of each client of a user for one room, on behalf of a client of the
// requesting user (draft-ietf-mimi-protocol-06, Section 5.2). Room is empty if the request isn't about a room.
//
//	struct {
//	    Protocol protocol;
//	    IdentifierUri requestingUser;
//	    IdentifierUri targetUser;
//	    IdentifierUri roomId;
//	    select (protocol) {
//	        case mls10:
//	            CipherSuite acceptableCiphersuites<V>;
//	            RequiredCapabilities requiredCapabilities;
//	            SignaturePublicKey requesterSignatureKey;
//	            Credential requesterCredential;
//	            opaque key_material_request_signature<V>;
//	    };
//	} KeyMaterialRequest;
type KeyMaterialRequest struct {
	RequestingUser       URI
	TargetUser           URI
	Room                 URI
	CipherSuites         []mls.CipherSuite // not empty
	RequiredCapabilities mls.RequiredCapabilities
	SignatureKey         []byte
	Credential           mls.Credential
	Signature            []byte
}

const labelKeyMaterialRequest = "KeyMaterialRequestTBS"

// Sign sets SignatureKey and Signature. suite is the one whose signature scheme the signer's key is for. rand is as
// in mls.CipherSuite.SignWithLabel.
func (q *KeyMaterialRequest) Sign(rand io.Reader, suite mls.CipherSuite, signer crypto.Signer) error {
	key, err := suite.SignaturePublicKey(signer.Public())
	if err != nil {
		return fmt.Errorf("mimi: key material request: %w", err)
	}
	q.SignatureKey = key
	if q.Signature, err = suite.SignWithLabel(rand, signer, labelKeyMaterialRequest, q.tbs()); err != nil {
		return fmt.Errorf("mimi: key material request: %w", err)
	}
	return nil
}

// Verify checks the signature with SignatureKey, which is of the suite's signature scheme; that the credential is for
// that key is the caller's to check. It fails with mls.ErrSignature.
func (q *KeyMaterialRequest) Verify(suite mls.CipherSuite) error {
	if err := suite.VerifyWithLabel(q.SignatureKey, labelKeyMaterialRequest, q.tbs(), q.Signature); err != nil {
		return fmt.Errorf("mimi: key material request: %w", err)
	}
	return nil
}

func (q *KeyMaterialRequest) tbs() []byte {
	var w codec.Writer
	q.marshalTBS(&w)
	return w.Bytes()
}

func (q *KeyMaterialRequest) marshalTBS(w *codec.Writer) {
	writeProtocol(w)
	q.RequestingUser.MarshalMLS(w)
	q.TargetUser.MarshalMLS(w)
	q.Room.MarshalMLS(w)
	writeCipherSuites(w, q.CipherSuites)
	q.RequiredCapabilities.MarshalMLS(w)
	w.Opaque(q.SignatureKey)
	q.Credential.MarshalMLS(w)
}

// MarshalMLS implements codec.Marshaler.
func (q KeyMaterialRequest) MarshalMLS(w *codec.Writer) {
	q.marshalTBS(w)
	w.Opaque(q.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (q *KeyMaterialRequest) UnmarshalMLS(r *codec.Reader) {
	readProtocol(r)
	*q = KeyMaterialRequest{
		RequestingUser: readURI(r, KindUser), TargetUser: readURI(r, KindUser), Room: readOptionalURI(r, KindRoom),
		CipherSuites: readCipherSuites(r),
	}
	if r.Err() == nil && len(q.CipherSuites) == 0 {
		r.Failf("a key material request without cipher suites")
	}
	q.RequiredCapabilities.UnmarshalMLS(r)
	q.SignatureKey = r.Opaque()
	q.Credential.UnmarshalMLS(r)
	q.Signature = r.Opaque()
}

// KeyMaterialUserCode says what became of a KeyMaterialRequest.
type KeyMaterialUserCode uint8

// The codes of draft-ietf-mimi-protocol-06, Section 5.2.
const (
	KeyMaterialSuccess        KeyMaterialUserCode = 0
	KeyMaterialPartialSuccess KeyMaterialUserCode = 1
	IncompatibleProtocol      KeyMaterialUserCode = 2
	NoCompatibleMaterial      KeyMaterialUserCode = 3
	UserUnknown               KeyMaterialUserCode = 4
	NoConsent                 KeyMaterialUserCode = 5
	NoConsentForThisRoom      KeyMaterialUserCode = 6
	UserDeleted               KeyMaterialUserCode = 7
)

// String returns the code's name in the draft.
func (c KeyMaterialUserCode) String() string {
	return name(c, "success", "partialSuccess", "incompatibleProtocol", "noCompatibleMaterial", "userUnknown", "noConsent",
		"noConsentForThisRoom", "userDeleted")
}

// name returns the i-th name, or the number of a code without one.
func name[T ~uint8](i T, names ...string) string {
	if int(i) < len(names) {
		return names[i]
	}
	return fmt.Sprint(uint8(i))
}

// KeyMaterialClientCode says what became of a KeyMaterialRequest for one client.
type KeyMaterialClientCode uint8

// The codes of draft-ietf-mimi-protocol-06, Section 5.2.
const (
	ClientKeyMaterialSuccess KeyMaterialClientCode = 0
	KeyMaterialExhausted     KeyMaterialClientCode = 1
	NothingCompatible        KeyMaterialClientCode = 2
)

// String returns the code's name in the draft.
func (c KeyMaterialClientCode) String() string {
	return name(c, "success", "keyMaterialExhausted", "nothingCompatible")
}

// ClientKeyMaterial is the answer for one client.
//
//	struct {
//	    KeyMaterialClientCode clientStatus;
//	    IdentifierUri clientUri;
//	    select (protocol) {
//	        case mls10:
//	            select (clientStatus) {
//	                case success: KeyPackage keyPackage;
//	                case nothingCompatible: optional<Capabilities> clientCapabilities;
//	            };
//	    };
//	} ClientKeyMaterial;
type ClientKeyMaterial struct {
	Code         KeyMaterialClientCode
	Client       URI
	KeyPackage   *mls.KeyPackage   // set exactly if Code is ClientKeyMaterialSuccess
	Capabilities *mls.Capabilities // with NothingCompatible, or nil
}

// MarshalMLS implements codec.Marshaler.
func (c ClientKeyMaterial) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(c.Code))
	c.Client.MarshalMLS(w)
	switch c.Code {
	case ClientKeyMaterialSuccess:
		c.KeyPackage.MarshalMLS(w)
	case NothingCompatible:
		w.Optional(c.Capabilities != nil)
		if c.Capabilities != nil {
			c.Capabilities.MarshalMLS(w)
		}
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *ClientKeyMaterial) UnmarshalMLS(r *codec.Reader) {
	*c = ClientKeyMaterial{Code: KeyMaterialClientCode(r.Uint8()), Client: readURI(r, KindClient)}
	switch c.Code {
	case ClientKeyMaterialSuccess:
		c.KeyPackage = new(mls.KeyPackage)
		c.KeyPackage.UnmarshalMLS(r)
	case KeyMaterialExhausted:
	case NothingCompatible:
		if r.Optional() {
			c.Capabilities = new(mls.Capabilities)
			c.Capabilities.UnmarshalMLS(r)
		}
	default:
		r.Failf("client code %d", c.Code)
	}
}

// KeyMaterialResponse is the answer to a KeyMaterialRequest. Clients are listed only with the codes
// KeyMaterialSuccess, KeyMaterialPartialSuccess and NoCompatibleMaterial, each at most once.
//
//	struct {
//	    Protocol protocol;
//	    KeyMaterialUserCode userStatus;
//	    IdentifierUri userUri;
//	    ClientKeyMaterial clients<V>;
//	} KeyMaterialResponse;
type KeyMaterialResponse struct {
	Code    KeyMaterialUserCode
	User    URI
	Clients []ClientKeyMaterial
}

// MarshalMLS implements codec.Marshaler.
func (p KeyMaterialResponse) MarshalMLS(w *codec.Writer) {
	writeProtocol(w)
	w.Uint8(uint8(p.Code))
	p.User.MarshalMLS(w)
	codec.WriteVector(w, p.Clients, func(w *codec.Writer, c ClientKeyMaterial) { c.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *KeyMaterialResponse) UnmarshalMLS(r *codec.Reader) {
	readProtocol(r)
	*p = KeyMaterialResponse{Code: KeyMaterialUserCode(r.Uint8()), User: readURI(r, KindUser)}
	if p.Code > UserDeleted {
		r.Failf("user code %d", p.Code)
	}
	seen := make(map[URI]bool)
	p.Clients = codec.ReadVector(r, func(r *codec.Reader) ClientKeyMaterial {
		var c ClientKeyMaterial
		c.UnmarshalMLS(r)
		if seen[c.Client] {
			r.Failf("client %s is listed twice", c.Client)
		}
		if seen[c.Client] = true; len(seen) > MaxKeyMaterialClients {
			r.Failf("more than %d clients", MaxKeyMaterialClients)
		}
		return c
	})
	if r.Err() == nil && len(p.Clients) > 0 && p.Code > KeyMaterialPartialSuccess && p.Code != NoCompatibleMaterial {
		r.Failf("clients listed with user code %v", p.Code)
	}
}
