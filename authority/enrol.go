package authority

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// tokenRecord is what is stored of an invitation: never the token itself.
type tokenRecord struct {
	User    mimi.URI  `json:"user"`
	Expires time.Time `json:"expires"`
	Serial  string    `json:"serial,omitempty"`  // decimal, of the certificate for which it was used; empty: unused
	Request []byte    `json:"request,omitempty"` // SHA-256 of the CSR for which it was used
}

func tokenKey(token string) string {
	h := sha256.Sum256([]byte(token))
	return tokenKeys + hex.EncodeToString(h[:])
}

// tokenAlphabet has 32 letters and digits, none of which looks like another.
const tokenAlphabet = "abcdefghjkmnpqrstuvwxyz123456789"

// tokenLength gives 160 random bits.
const tokenLength = 32

func newToken(rand io.Reader) (string, error) {
	b := make([]byte, tokenLength)
	if _, err := io.ReadFull(rand, b); err != nil {
		return "", fmt.Errorf("draw a token: %w", err)
	}
	for i := range b {
		b[i] = tokenAlphabet[b[i]%32]
	}
	return string(b), nil
}

const defaultInvitation = 24 * time.Hour

// Invite implements Service.
func (e *Embedded) Invite(ctx context.Context, user mimi.URI, ttl time.Duration) (Invitation, error) {
	i, err := e.invite(user, ttl)
	if err != nil {
		return Invitation{}, fmt.Errorf("authority: invite: %w", err)
	}
	return i, nil
}

func (e *Embedded) invite(user mimi.URI, ttl time.Duration) (Invitation, error) {
	if err := checkURI(user, 'u', e.domain); err != nil {
		return Invitation{}, err
	}
	if ttl == 0 {
		ttl = defaultInvitation
	}
	if ttl < time.Second || ttl > MaxInvitation {
		return Invitation{}, fmt.Errorf("%w: invitation for %v, at least a second and at most %v", ErrRequest, ttl, MaxInvitation)
	}
	address, err := e.Address()
	if err != nil {
		return Invitation{}, fmt.Errorf("read the node's address: %w", err)
	}
	token, err := newToken(e.rand)
	if err != nil {
		return Invitation{}, err
	}
	i := Invitation{Domain: e.domain, Address: address, Root: e.Root(), User: user, Token: token, Expires: e.time().Add(ttl).UTC().Truncate(time.Second)}
	row, err := json.Marshal(tokenRecord{User: user, Expires: i.Expires})
	if err != nil {
		return Invitation{}, fmt.Errorf("encode the invitation: %w", err)
	}
	key := tokenKey(token)
	ok, err := e.store.Commit(map[string][]byte{key: row}, map[string][]byte{key: nil})
	if err != nil {
		return Invitation{}, fmt.Errorf("store the invitation: %w", err)
	}
	if !ok {
		return Invitation{}, errors.New("the source of randomness repeats itself")
	}
	return i, nil
}

// Enrol implements Service.
func (e *Embedded) Enrol(ctx context.Context, token string, der []byte) ([][]byte, error) {
	chain, err := e.enrol(ctx, token, der)
	if err != nil {
		return nil, fmt.Errorf("authority: enrol: %w", err)
	}
	return chain, nil
}

func (e *Embedded) enrol(ctx context.Context, token string, der []byte) ([][]byte, error) {
	if len(token) > maxToken {
		return nil, ErrTokenUnknown
	}
	// The token comes first: without one, nobody has the authority parse and verify anything.
	key := tokenKey(token)
	rec, _, err := e.readToken(key)
	if err != nil {
		return nil, err
	}
	request := sha256.Sum256(der)
	if rec.Serial != "" {
		return e.enrolledBefore(rec, request[:])
	}
	if e.time().After(rec.Expires) {
		return nil, ErrTokenExpired
	}
	csr, s, err := parseRequest(e.domain, der)
	if err != nil {
		return nil, err
	}
	if s.user != rec.User {
		return nil, fmt.Errorf("%w: not for %s", ErrTokenName, s.user)
	}
	var used *tokenRecord
	chain, err := e.issueClient(ctx, csr, s, func(p *issuance, serial string) error {
		rec, row, err := e.readToken(key)
		if err != nil {
			return err
		}
		if rec.Serial != "" {
			used = rec
			return ErrTokenUsed
		}
		rec.Serial, rec.Request = serial, request[:]
		next, err := json.Marshal(rec)
		if err != nil {
			return fmt.Errorf("encode the invitation: %w", err)
		}
		p.changes[key], p.expect[key] = next, row
		return nil
	})
	if used != nil {
		return e.enrolledBefore(used, request[:])
	}
	return chain, err
}

// enrolledBefore gives the one who used the token the same certificate again, and refuses everyone else.
func (e *Embedded) enrolledBefore(rec *tokenRecord, request []byte) ([][]byte, error) {
	if !bytes.Equal(rec.Request, request) {
		return nil, ErrTokenUsed
	}
	leaf, err := e.store.Get([]byte(tableKey(certificateTable, rec.Serial)))
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	if leaf == nil {
		return nil, ErrTokenUsed
	}
	chain := [][]byte{leaf, e.intermediate.Raw}
	if _, err := e.verifier.Verify(chain, PurposeClient); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTokenUsed, err)
	}
	return chain, nil
}

// readToken returns an invitation's record and its row. It fails with ErrTokenUnknown.
func (e *Embedded) readToken(key string) (*tokenRecord, []byte, error) {
	row, err := e.store.Get([]byte(key))
	if err != nil {
		return nil, nil, fmt.Errorf("read the invitation: %w", err)
	}
	if row == nil {
		return nil, nil, ErrTokenUnknown
	}
	var rec tokenRecord
	if err := json.Unmarshal(row, &rec); err != nil {
		return nil, nil, fmt.Errorf("stored invitation: %w", err)
	}
	return &rec, row, nil
}
