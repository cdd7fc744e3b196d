package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/api"
)

var (
	// ErrEnrolled: the directory holds an enrolled device already.
	ErrEnrolled = errors.New("the device is enrolled already")
	// ErrNotEnrolled: the directory holds no enrolled device.
	ErrNotEnrolled = errors.New("no device is enrolled here")
	// ErrRevoked: the provider has revoked this device's credential. Nothing brings it back.
	ErrRevoked = errors.New("this device was revoked")
	// ErrUnknownRoom: this client never was a member of the room.
	ErrUnknownRoom = errors.New("unknown room")
	// ErrNotMember: this client isn't a member of the room any more.
	ErrNotMember = errors.New("not a member of the room")
	// ErrFrozen: the hub ordered something that this client can't accept; its view of the room stays as it was.
	ErrFrozen = errors.New("the room is frozen")
	// ErrRestored: the state of the room is older than what this client has sent: the directory was restored from an old
	// copy. The client enters the room anew.
	ErrRestored = errors.New("the state is an old copy")
	// ErrQueued: the hub hasn't answered yet. The message is in the outbox and will be sent.
	ErrQueued = errors.New("the message waits in the outbox")
	// ErrDiskFull: there is too little space for the device's state. What is in the outbox stays there, what others send
	// stays at the node, and all goes on once there is space.
	ErrDiskFull = errors.New("the disk is nearly full")
	// ErrRunning: another Run of the same Client is under way.
	ErrRunning = errors.New("the client runs already")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the client is closed")
	// ErrNoRight: the user's role in the room doesn't have the right. What changes the room fails with a *mimi.PolicyError.
	ErrNoRight = errors.New("the room doesn't give the right")
	// ErrNoKeyPackages: no device of the user has a KeyPackage that fits.
	ErrNoKeyPackages = errors.New("no device of the user can be added")
	// ErrNoHistory: no other device of the user offers history of the room.
	ErrNoHistory = errors.New("no device offers history")
	// ErrNoConsent: the user, or the user's provider, doesn't allow to be added. RequestConsent asks for it.
	ErrNoConsent = errors.New("the user hasn't consented")
)

// Refused is the hub's answer to a handshake or message that it doesn't accept.
type Refused struct {
	Code        string // the MIMI response code, such as notAllowed
	Description string // the hub's words, may be empty
}

// Error returns the code and the description.
func (r *Refused) Error() string {
	if r.Description == "" {
		return "the hub refuses: " + r.Code
	}
	return fmt.Sprintf("the hub refuses: %s: %s", r.Code, r.Description)
}

// The codes of what is beyond a limit at present, and of what the node can't read.
const (
	codeBusy      = "busy"
	codeMalformed = "malformed"
)

// Code returns the stable code that the node gave for an error, such as "revoked" or "hubUnreachable"; "" if the error
// isn't a node's.
func Code(err error) string {
	if info := infoOf(err); info != nil {
		return info.Code
	}
	return ""
}

// RetryAfter returns after which time the node expects that what it refused as "busy" may succeed, 0 if it doesn't say.
func RetryAfter(err error) time.Duration {
	if info := infoOf(err); info != nil {
		return time.Duration(min(info.RetryAfterMs, uint64(time.Hour.Milliseconds()))) * time.Millisecond
	}
	return 0
}

func infoOf(err error) *api.ErrorInfo {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return nil
	}
	for _, d := range ce.Details() {
		v, err := d.Value()
		if err != nil {
			continue
		}
		if info, ok := v.(*api.ErrorInfo); ok {
			return info
		}
	}
	return nil
}

// permanent says whether the same request would fail again, however often it is sent. All else, above all an
// unreachable node or hub, is worth another attempt.
func permanent(err error) bool {
	switch Code(err) {
	case "revoked", "tooLarge":
		return true
	}
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument, connect.CodeNotFound, connect.CodePermissionDenied, connect.CodeAlreadyExists,
		connect.CodeFailedPrecondition, connect.CodeOutOfRange, connect.CodeUnimplemented:
		return true
	}
	return false
}

// revoked says whether the node refuses this client for good.
func revoked(err error) bool { return errors.Is(err, ErrRevoked) || Code(err) == "revoked" }

// refusedUpdate is the error for an answer other than success.
func refusedUpdate(res *mimi.UpdateRoomResponse) error {
	return &Refused{Code: res.Code.String(), Description: res.Description}
}

// ended says whether an error is the end of the context and not of what was tried.
func ended(ctx context.Context) bool { return ctx.Err() != nil }
