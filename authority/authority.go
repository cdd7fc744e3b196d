// Package authority is Parley's authentication service (RFC 9420, Section 5.3.1; RFC 9750, Section 4): it says which
// key belongs to which user and client of a provider, by X.509 certificates (RFC 5280) whose subject alternative names
// are MIMI URIs, and by the list of those that were revoked.
//
// A provider's authority is made once with Init, and opened by the node with Open; the certificates come from an
// embedded smallstep authority. Service is what it does. Its own keys are classical; those of clients and hubs may be
// ML-DSA's (RFC 9881), whose binding to names is then no better than the authority's signature. What a provider
// publishes of it, roots and revocations, is its Bundle. Verifier is the one function by which clients, hubs and
// commands judge a certificate; TrustStore holds the bundles of the approved peers.
package authority

import (
	"context"
	"crypto"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// The prefixes of this package's keys in a store.
const (
	StorePrefix = "authority/" // Embedded
	TrustPrefix = "trust/"     // TrustStore
)

// Store is the durable, ordered key-value state that the authority and the trust store need; the node's store
// satisfies it.
type Store interface {
	// Get returns a key's value, or nil and no error if there is none.
	Get(key []byte) ([]byte, error)

	// Scan calls fn for the keys in [start, end), ascending, until it returns false. The slices are valid during the
	// call only.
	Scan(start, end []byte, fn func(key, value []byte) bool) error

	// Commit writes changes as one batch, durable on return; a nil value deletes. If a key of expect has another
	// value (nil: if it is present), nothing is done and ok is false.
	Commit(changes, expect map[string][]byte) (ok bool, err error)
}

// Service is what a provider's authority does. What it refuses, it refuses with one of this package's errors. A chain
// is DER certificates, leaf first, without the root unless said otherwise. A CSR is PKCS #10 in DER (RFC 2986).
type Service interface {
	// Domain returns the provider's domain.
	Domain() string

	// Invite makes a one-time invitation for a user to enrol one client. It expires after ttl; 0 means a day, the
	// longest is MaxInvitation.
	Invite(ctx context.Context, user mimi.URI, ttl time.Duration) (Invitation, error)

	// Enrol issues a client's first certificate. The CSR has exactly two names, the invitation's user and one client
	// of this provider that belongs to no other user, and is signed with its own key: Ed25519, P-256, P-384, P-521 or
	// ML-DSA (NewRequest makes one). The token serves once; the same CSR again gets the same certificate, so that a
	// lost answer costs nothing.
	Enrol(ctx context.Context, token string, csr []byte) (chain [][]byte, err error)

	// Issue is Enrol without an invitation, for administrators.
	Issue(ctx context.Context, csr []byte) (chain [][]byte, err error)

	// Renew issues a certificate to the holder of a valid one for the same names, for the key that signed the CSR.
	Renew(ctx context.Context, chain [][]byte, csr []byte) ([][]byte, error)

	// Revoke revokes all valid certificates of a client or a user (a URI), or one (a serial number in hexadecimal).
	// It returns the newest of them, once all are durably revoked and in the bundle. Revoking again is no error: it
	// repeats what follows from it.
	Revoke(ctx context.Context, clientOrSerial string, reason string) (*Certificate, error)

	// List returns the issued certificates that pass the filter, oldest first.
	List(ctx context.Context, f Filter) ([]Certificate, error)

	// Bundle returns the provider's trust bundle.
	Bundle(ctx context.Context) (*Bundle, error)

	// IssueNode issues the certificate of a node's TLS key: for the domain as a DNS name and as mimi://domain. The
	// chain includes the root, whose fingerprint peers approve.
	IssueNode(ctx context.Context, pub crypto.PublicKey) ([][]byte, error)

	// IssueHub issues the certificate of a key with which the node's hub signs in MLS groups: for mimi://domain.
	IssueHub(ctx context.Context, pub crypto.PublicKey) ([][]byte, error)
}

// Certificate is what the authority knows of a certificate that it issued.
type Certificate struct {
	Serial    string    `json:"serial"`           // hexadecimal, lower case
	User      mimi.URI  `json:"user,omitempty"`   // empty for the node's and the hub's
	Client    mimi.URI  `json:"client,omitempty"` // empty for the node's and the hub's
	Node      bool      `json:"node,omitempty"`   // the node's or the hub's
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Revoked   time.Time `json:"revoked,omitzero"` // zero: it is not
	Reason    string    `json:"reason,omitempty"`
}

// Filter selects certificates; the zero value selects all.
type Filter struct {
	User    mimi.URI  // of this user
	Client  mimi.URI  // of this client
	Serial  string    // this one
	ValidAt time.Time // neither expired nor revoked at this time
	Revoked bool      // only revoked ones
}

func (f Filter) match(c *Certificate) bool {
	switch {
	case f.User != "" && f.User != c.User,
		f.Client != "" && f.Client != c.Client,
		f.Serial != "" && f.Serial != c.Serial,
		f.Revoked && c.Revoked.IsZero():
		return false
	case f.ValidAt.IsZero():
		return true
	}
	return c.Revoked.IsZero() && !f.ValidAt.Before(c.NotBefore) && !f.ValidAt.After(c.NotAfter)
}
