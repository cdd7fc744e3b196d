package mls

import (
	"errors"
	"fmt"
	"log/slog"
)

// The errors that callers tell apart. They come wrapped with the action that failed.
var (
	// ErrSignature: a signature doesn't verify with the key that the message names.
	ErrSignature = errors.New("mls: signature does not verify")
	// ErrDecrypt: an AEAD or HPKE ciphertext doesn't open.
	ErrDecrypt = errors.New("mls: decryption failed")
	// ErrEpoch: the message belongs to an epoch for which there are no keys (any more, or yet), or a GroupInfo, a
	// Welcome or something staged to one that isn't the next.
	ErrEpoch = errors.New("mls: message of another epoch")
	// ErrConfirmationTag: the sender and this client disagree on the state of the group.
	ErrConfirmationTag = errors.New("mls: confirmation tag does not match")
	// ErrMembershipTag: the sender of a PublicMessage doesn't know the epoch's secrets.
	ErrMembershipTag = errors.New("mls: membership tag does not match")
	// ErrGeneration: the key of a PrivateMessage was used and deleted, or lies too far ahead.
	ErrGeneration = errors.New("mls: message key used before or too far ahead")
	// ErrUnsupported: a value that the specifications allow and this package doesn't handle.
	ErrUnsupported = errors.New("mls: unsupported")
	// ErrMalformed: a structure or an argument breaks a rule on its form, or belongs to another group.
	ErrMalformed = errors.New("mls: malformed")
	// ErrRemoved: this client isn't a member of the group any more.
	ErrRemoved = errors.New("mls: not a member of the group")
	// ErrEnded: a ReInit has ended the group, and only its successor can be made.
	ErrEnded = errors.New("mls: group has ended")
	// ErrExported: a component's secret of the epoch was exported before, and deleted.
	ErrExported = errors.New("mls: secret exported before")
	// ErrFork: another member's state of the same epoch differs from this client's.
	ErrFork = errors.New("mls: the group has forked")
	// ErrResync: the group's state is about to be replaced by an external commit, which is to be confirmed or dropped.
	ErrResync = errors.New("mls: a resync waits")
	// ErrPending: application data may be sent only after the epoch's proposals were committed.
	ErrPending = errors.New("mls: proposals are to be committed first")
)

// ValidationError says which rule a structure breaks. Every receiver finds the same error, because only agreed data is
// judged; errors.As finds it.
type ValidationError struct {
	Rule    string // what is wrong, e.g. "RFC 9420 12.2: two removes of leaf 3"
	Section string // the rule's section in RFC 9420, e.g. "12.2", or the draft and section
	Err     error  // the cause, may be nil
}

// Error returns the rule and the cause.
func (e *ValidationError) Error() string {
	if e.Err != nil {
		return "mls: " + e.Rule + ": " + e.Err.Error()
	}
	return "mls: " + e.Rule
}

// Unwrap returns the cause.
func (e *ValidationError) Unwrap() error { return e.Err }

// invalid returns a ValidationError for a section of RFC 9420. An error at the end of the arguments becomes the cause,
// and the format doesn't mention it.
func invalid(section, format string, args ...any) *ValidationError {
	e := invalidBy("RFC 9420 "+section, format, args...)
	e.Section = section
	return e
}

// invalidBy is invalid for a section with the name of its document.
func invalidBy(section, format string, args ...any) *ValidationError {
	e := &ValidationError{Section: section}
	if n := len(args); n > 0 {
		if err, ok := args[n-1].(error); ok {
			e.Err, args = err, args[:n-1]
		}
	}
	e.Rule = section + ": " + fmt.Sprintf(format, args...)
	return e
}

// The sections of draft-ietf-mls-extensions-10 whose rules this package checks.
const (
	sectionAppData     = "draft-ietf-mls-extensions 4.7"
	sectionEphemeral   = "draft-ietf-mls-extensions 4.8"
	sectionSafeAAD     = "draft-ietf-mls-extensions 4.9"
	sectionNegotiation = "draft-ietf-mls-extensions 5"
	sectionMediaTypes  = "draft-ietf-mls-extensions 6.2"
	sectionSelfRemove  = "draft-ietf-mls-extensions 6.3"
)

const redacted = "[redacted]"

var errGob = errors.New("mls: secrets have no encoding but MarshalMLS")

// secret is key material. It doesn't show itself in formatted output, in logs, or in JSON and other text, and gob
// refuses it.
type secret []byte

// erase overwrites the secret in memory. The runtime may have moved it or left copies on stacks, and ciphers keep their
// key schedules: those go when the memory is used again.
func (s secret) erase() { clear(s) }

func (secret) String() string               { return redacted }
func (secret) GoString() string             { return redacted }
func (secret) Format(s fmt.State, _ rune)   { _, _ = s.Write([]byte(redacted)) }
func (secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (secret) GobEncode() ([]byte, error)   { return nil, errGob }

// redact is embedded in structs with secrets in unexported fields: fmt reads those without asking their methods. It is
// embedded in options with a Signer too, which may be a private key.
type redact struct{}

// Format hides the struct's contents, and so do String, GoString, LogValue, MarshalJSON and MarshalText; GobEncode fails.
func (redact) Format(s fmt.State, _ rune)   { _, _ = s.Write([]byte(redacted)) }
func (redact) String() string               { return redacted }
func (redact) GoString() string             { return redacted }
func (redact) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (redact) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (redact) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (redact) GobEncode() ([]byte, error)   { return nil, errGob }
