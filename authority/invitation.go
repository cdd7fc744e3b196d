package authority

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
)

// Invitation lets a user enrol one client: where the provider's node is, which root to trust, and a one-time token.
// Whoever has it can enrol as that user, so it is a secret: it belongs on a channel that only the user reads.
type Invitation struct {
	Domain  string
	Address string      // host:port of the provider's node; empty if the authority didn't know it
	Root    Fingerprint // of the provider's root
	User    mimi.URI
	Token   string
	Expires time.Time // in whole seconds
}

// MaxInvitation is the longest time that an invitation may be open.
const MaxInvitation = 30 * 24 * time.Hour

// The bounds of an invitation's parts in bytes.
const (
	maxInvitation = 1024 // of the line
	maxAddress    = 260
	maxURI        = 512
	maxToken      = 64
	maxDomain     = 253
)

const (
	invitationScheme  = "parley:"
	invitationVersion = 1
	invitationCheck   = 4 // bytes of the checksum
)

// String returns the invitation as one line to be pasted, token included. It is base64url of
//
//	struct {
//	    uint8 version = 1;
//	    opaque domain<V>;
//	    opaque address<V>;
//	    opaque root[32];
//	    opaque user<V>;
//	    opaque token<V>;
//	    uint64 expires;     /* seconds since the Unix epoch */
//	    opaque check[4];    /* of SHA-256 over the rest: shows that all of the line was copied */
//	} Invitation;
func (i Invitation) String() string {
	var w codec.Writer
	w.Uint8(invitationVersion)
	w.Opaque([]byte(i.Domain))
	w.Opaque([]byte(i.Address))
	w.Raw(i.Root[:])
	w.Opaque([]byte(i.User))
	w.Opaque([]byte(i.Token))
	w.Uint64(uint64(i.Expires.Unix()))
	check := sha256.Sum256(w.Bytes())
	w.Raw(check[:invitationCheck])
	return invitationScheme + base64.RawURLEncoding.EncodeToString(w.Bytes())
}

// ParseInvitation reads what String writes; white space around it doesn't matter. It fails with ErrRequest, without the
// invitation in the text.
func ParseInvitation(s string) (Invitation, error) {
	s = strings.TrimSpace(s)
	data, ok := strings.CutPrefix(s, invitationScheme)
	if !ok || len(s) > maxInvitation {
		return Invitation{}, fmt.Errorf("%w: not an invitation, which begins with %q", ErrRequest, invitationScheme)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(data)
	if err != nil || len(b) < invitationCheck {
		return Invitation{}, fmt.Errorf("%w: the invitation was not copied as a whole", ErrRequest)
	}
	body := b[:len(b)-invitationCheck]
	if check := sha256.Sum256(body); string(check[:invitationCheck]) != string(b[len(body):]) {
		return Invitation{}, fmt.Errorf("%w: the invitation was not copied as a whole", ErrRequest)
	}
	r := codec.NewReader(body)
	if v := r.Uint8(); v != invitationVersion {
		return Invitation{}, fmt.Errorf("%w: invitation of version %d", ErrRequest, v)
	}
	i := Invitation{Domain: string(r.OpaqueMax(maxDomain)), Address: string(r.OpaqueMax(maxAddress))}
	copy(i.Root[:], r.Raw(len(i.Root)))
	user, token := string(r.OpaqueMax(maxURI)), string(r.OpaqueMax(maxToken))
	expires := r.Uint64()
	if err := r.Finish(); err != nil {
		return Invitation{}, fmt.Errorf("%w: invitation: %w", ErrRequest, err)
	}
	if expires > math.MaxInt32*16 {
		return Invitation{}, fmt.Errorf("%w: invitation: expires %d seconds after the epoch", ErrRequest, expires)
	}
	i.Token, i.Expires = token, time.Unix(int64(expires), 0).UTC()
	if err := mimi.ValidDomain(i.Domain); err != nil {
		return Invitation{}, fmt.Errorf("%w: invitation: %w", ErrRequest, err)
	}
	for _, c := range []byte(i.Address + token) {
		if c <= ' ' || c > '~' { // both are shown or sent as they are
			return Invitation{}, fmt.Errorf("%w: invitation: address or token with byte %#x", ErrRequest, c)
		}
	}
	if i.User, err = mimi.ParseURI(user); err != nil {
		return Invitation{}, fmt.Errorf("%w: invitation: %w", ErrRequest, err)
	}
	if err := checkURI(i.User, 'u', i.Domain); err != nil {
		return Invitation{}, fmt.Errorf("invitation: %w", err)
	}
	return i, nil
}

// MarshalText implements encoding.TextMarshaler as String does, token included.
func (i Invitation) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (i *Invitation) UnmarshalText(b []byte) (err error) {
	*i, err = ParseInvitation(string(b))
	return err
}

// LogValue implements slog.LogValuer, without the token.
func (i Invitation) LogValue() slog.Value {
	return slog.GroupValue(slog.String("user", string(i.User)), slog.String("address", i.Address), slog.Time("expires", i.Expires))
}
