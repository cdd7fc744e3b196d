package authority

import (
	"errors"
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
)

// Why a certificate, or a chain of them, is refused. Verify and its relatives wrap exactly one of these.
var (
	// ErrMalformed: not a chain of DER certificates, or one beyond the bounds.
	ErrMalformed = errors.New("malformed certificate chain")
	// ErrName: the names aren't exactly those that the purpose wants, each in canonical form.
	ErrName = errors.New("the certificate's names are not allowed")
	// ErrForeignName: the certificate names another provider than its issuer speaks for.
	ErrForeignName = errors.New("the certificate names another provider than its issuer's")
	// ErrUsage: key usage or extended key usage don't fit the purpose (RFC 9734 for clients and hubs).
	ErrUsage = errors.New("the certificate is for another use")
	// ErrBroken: the chain's certificates don't vouch for each other.
	ErrBroken = errors.New("broken certificate chain")
	// ErrSuite: the key's type isn't the cipher suite's.
	ErrSuite = errors.New("the certificate's key doesn't fit the cipher suite")
	// ErrKeyMismatch: the certificate is for another key.
	ErrKeyMismatch = errors.New("the certificate is for another key")
	// ErrUnknownProvider: there is no trust bundle of the provider that the certificate names.
	ErrUnknownProvider = errors.New("unknown provider")
	// ErrUntrusted: the chain doesn't end in a root of the provider that the certificate names.
	ErrUntrusted = errors.New("the certificate's issuer is not the provider's")
	// ErrExpired and ErrNotYetValid: a certificate of the chain is past or before its time.
	ErrExpired     = errors.New("the certificate has expired")
	ErrNotYetValid = errors.New("the certificate is not valid yet")
	// ErrRevoked: the provider has revoked a certificate of the chain.
	ErrRevoked = errors.New("the certificate was revoked")
)

// Why the service refuses a request.
var (
	// ErrRequest: a malformed request: a CSR, a time-out, an argument.
	ErrRequest = errors.New("malformed request")
	// ErrPossession: the CSR isn't signed with the key that it is for.
	ErrPossession = errors.New("the request is not signed with its own key")
	// ErrKeyType: a key that no cipher suite of Parley signs with.
	ErrKeyType = errors.New("the key is neither Ed25519 nor ML-DSA nor of P-256, P-384 or P-521")
	// ErrTokenUnknown, ErrTokenUsed, ErrTokenExpired and ErrTokenName: the invitation doesn't exist, has served, is
	// too old, or is for another user.
	ErrTokenUnknown = errors.New("unknown invitation")
	ErrTokenUsed    = errors.New("the invitation was used before")
	ErrTokenExpired = errors.New("the invitation has expired")
	ErrTokenName    = errors.New("the invitation is for another user")
	// ErrClientTaken: the client belongs to another user.
	ErrClientTaken = errors.New("the client belongs to another user")
	// ErrNotFound: no certificate is for that name or serial number.
	ErrNotFound = errors.New("no such certificate")
	// ErrExists: Init found an authority in its way.
	ErrExists = errors.New("there is an authority already")
	// ErrPassphrase: the root key's passphrase is wrong or too short.
	ErrPassphrase = errors.New("the passphrase is wrong or too short")
)

// Why the trust store refuses a bundle or a peer.
var (
	// ErrBundle: the bundle is malformed or contradicts itself.
	ErrBundle = errors.New("malformed trust bundle")
	// ErrStale: the bundle is older than the one that is known.
	ErrStale = errors.New("the trust bundle is older than the one known")
	// ErrUnapproved: the peer is not approved. The error is an *UnapprovedError where something is known of the peer.
	ErrUnapproved = errors.New("the provider is not approved")
)

// UnapprovedError tells an operator whom to approve. It is ErrUnapproved.
type UnapprovedError struct {
	Domain      string      // what the peer claims to be
	Fingerprint Fingerprint // of the root that it shows
}

func (e *UnapprovedError) Error() string {
	return fmt.Sprintf("%s with root %s: %v", e.Domain, e.Fingerprint, ErrUnapproved)
}

// Is says that this is ErrUnapproved.
func (e *UnapprovedError) Is(target error) bool { return target == ErrUnapproved }

// TimeVariant says whether a refusal depends on when and by whom it is judged: expiry, revocation, approval. A client
// flags such a leaf and doesn't reject the commit that holds it, for another member may see it otherwise.
func TimeVariant(err error) bool {
	for _, e := range []error{ErrExpired, ErrNotYetValid, ErrRevoked, ErrUnknownProvider, ErrUntrusted, ErrUnapproved} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// coded are the errors that cross the admin socket and the client API, by their code.
var coded = []struct {
	code string
	err  error
}{
	{"malformed", ErrMalformed},
	{"name", ErrName},
	{"foreignName", ErrForeignName},
	{"usage", ErrUsage},
	{"broken", ErrBroken},
	{"suite", ErrSuite},
	{"keyMismatch", ErrKeyMismatch},
	{"unknownProvider", ErrUnknownProvider},
	{"untrusted", ErrUntrusted},
	{"expired", ErrExpired},
	{"notYetValid", ErrNotYetValid},
	{"revoked", ErrRevoked},
	{"request", ErrRequest},
	{"possession", ErrPossession},
	{"keyType", ErrKeyType},
	{"tokenUnknown", ErrTokenUnknown},
	{"tokenUsed", ErrTokenUsed},
	{"tokenExpired", ErrTokenExpired},
	{"tokenName", ErrTokenName},
	{"clientTaken", ErrClientTaken},
	{"notFound", ErrNotFound},
	{"exists", ErrExists},
	{"passphrase", ErrPassphrase},
	{"bundle", ErrBundle},
	{"stale", ErrStale},
	{"unapproved", ErrUnapproved},
}

// Code returns the short stable name of the refusal that err wraps, "" if it wraps none of this package's.
func Code(err error) string {
	for _, c := range coded {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return ""
}

// codedError is an error that came over a wire: it reads as it did there, and is the sentinel of its code.
type codedError struct {
	err    error
	detail string
}

func (e *codedError) Error() string { return e.detail }
func (e *codedError) Unwrap() error { return e.err }

// ErrorOfCode returns the error that Code had named, with the text detail; without a known code it is just the text.
func ErrorOfCode(code, detail string) error {
	for _, c := range coded {
		if c.code == code {
			return &codedError{err: c.err, detail: detail}
		}
	}
	return errors.New(detail)
}

// checkURI fails with ErrRequest unless u is of that kind and domain. A URI may come from a conversion, so it is
// parsed again.
func checkURI(u mimi.URI, kind byte, domain string) error {
	p, err := mimi.ParseURI(string(u))
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrRequest, err)
	case p.Kind() != kind:
		return fmt.Errorf("%w: %s is not a URI of kind %q", ErrRequest, u, kind)
	case p.Domain() != domain:
		return fmt.Errorf("%w: %s is not of %s", ErrForeignName, u, domain)
	}
	return nil
}
