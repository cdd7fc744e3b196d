package authority

import (
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
)

// ForHub returns the authentication service as a hub sees it when it accepts a handshake: it refuses whatever
// Verify refuses. Credentials are those of clients and, for external senders, of hubs.
func (v *Verifier) ForHub() mls.CredentialVerifier { return credentials{v: v, judge: true} }

// ForClient returns the authentication service as a member sees it: it refuses what every member refuses alike, which
// is a chain that isn't sound in itself or is for another key. Trust, expiry and revocation differ among members and
// in time; they are for Verify, afterwards, and a leaf that fails there is flagged.
func (v *Verifier) ForClient() mls.CredentialVerifier { return credentials{v: v} }

// credentials implements mls.CredentialVerifier.
type credentials struct {
	v     *Verifier
	judge bool
}

// VerifyCredential implements mls.CredentialVerifier.
func (c credentials) VerifyCredential(cred mls.Credential, signatureKey []byte, suite mls.CipherSuite) error {
	ch, err := c.sound(cred)
	if err != nil {
		return err
	}
	if err := checkKey(ch.id.PublicKey, suite, signatureKey); err != nil {
		return fmt.Errorf("authority: credential: %w", err)
	}
	if !c.judge {
		return nil
	}
	if err := c.v.judge(ch, ch.purpose); err != nil {
		return fmt.Errorf("authority: credential: %w", err)
	}
	return nil
}

// ValidSuccessor implements mls.CredentialVerifier: the same user's same client.
func (c credentials) ValidSuccessor(old, new mls.Credential) error {
	a, err := c.sound(old)
	if err != nil {
		return err
	}
	b, err := c.sound(new)
	if err != nil {
		return err
	}
	if a.purpose != PurposeClient || a.id.User != b.id.User || a.id.Client != b.id.Client {
		return fmt.Errorf("authority: credential: %w: %s of %s can't follow %s of %s", ErrName, b.id.Client, b.id.User, a.id.Client, a.id.User)
	}
	return nil
}

// Identity implements mls.CredentialVerifier: the client's URI.
func (c credentials) Identity(cred mls.Credential) ([]byte, error) {
	ch, err := c.sound(cred)
	if err != nil {
		return nil, err
	}
	if ch.purpose != PurposeClient {
		return nil, fmt.Errorf("authority: credential: %w: a %v's is not a member's", ErrUsage, ch.purpose)
	}
	return []byte(ch.id.Client), nil
}

func (c credentials) sound(cred mls.Credential) (*cachedChain, error) {
	if cred.Type != mls.CredentialX509 {
		return nil, fmt.Errorf("authority: credential: %w: type %d is not x509", ErrMalformed, cred.Type)
	}
	ch, err := c.v.sound(cred.Certificates)
	if err != nil {
		return nil, fmt.Errorf("authority: credential: %w", err)
	}
	if ch.purpose == PurposeNode {
		return nil, fmt.Errorf("authority: credential: %w: a node's certificate", ErrUsage)
	}
	return ch, nil
}

// IdentityOf returns the user and the client that a credential names; nothing is verified. It fails with ErrMalformed
// or ErrName.
func IdentityOf(c mls.Credential) (user, client mimi.URI, err error) {
	if c.Type != mls.CredentialX509 {
		return "", "", fmt.Errorf("authority: credential: %w: type %d is not x509", ErrMalformed, c.Type)
	}
	id, err := ParseIdentity(c.Certificates)
	if err != nil {
		return "", "", fmt.Errorf("authority: credential: %w", err)
	}
	if id.Node {
		return "", "", fmt.Errorf("authority: credential: %w: a node's or hub's is not a member's", ErrName)
	}
	return id.User, id.Client, nil
}

// IdentityOf is the function IdentityOf for credentials that are seen again and again, as those of a room's members
// are: a chain that was sound before costs a hash. Chains that aren't sound in themselves are refused.
func (v *Verifier) IdentityOf(c mls.Credential) (user, client mimi.URI, err error) {
	ch, err := credentials{v: v}.sound(c)
	if err != nil {
		return "", "", err
	}
	if ch.purpose != PurposeClient {
		return "", "", fmt.Errorf("authority: credential: %w: a %v's is not a member's", ErrName, ch.purpose)
	}
	return ch.id.User, ch.id.Client, nil
}
