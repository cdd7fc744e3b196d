package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// refusal is an error that its cause may read: a stable code and a sentence. Everything else that goes wrong is
// "internal" to the other side and a line in the log here.
type refusal struct {
	code   string
	detail string
	retry  time.Duration // after which the same may succeed, 0 if nobody knows
}

func (e *refusal) Error() string { return e.code + ": " + e.detail }

func refuse(code, format string, args ...any) error {
	return &refusal{code: code, detail: fmt.Sprintf(format, args...)}
}

// maxRetry is the longest time after which anybody is told to come back.
const maxRetry = time.Hour

// busy refuses what is beyond a limit until so much time has passed.
func busy(wait time.Duration, format string, args ...any) error {
	return &refusal{code: "busy", detail: fmt.Sprintf(format, args...), retry: min(wait, maxRetry)}
}

// statuses are the codes of refusals with the Connect code and the HTTP status that go with them.
var statuses = map[string]struct {
	connect connect.Code
	http    int
}{
	"malformed":       {connect.CodeInvalidArgument, http.StatusBadRequest},
	"tooLarge":        {connect.CodeResourceExhausted, http.StatusRequestEntityTooLarge},
	"unauthenticated": {connect.CodeUnauthenticated, http.StatusUnauthorized},
	"revoked":         {connect.CodeUnauthenticated, http.StatusForbidden},
	"expired":         {connect.CodeUnauthenticated, http.StatusForbidden},
	"notYetValid":     {connect.CodeUnauthenticated, http.StatusForbidden},
	"untrusted":       {connect.CodePermissionDenied, http.StatusForbidden},
	"foreignName":     {connect.CodePermissionDenied, http.StatusForbidden},
	"clientTaken":     {connect.CodeAlreadyExists, http.StatusConflict},
	"unapproved":      {connect.CodePermissionDenied, http.StatusForbidden},
	"unapprovedPeer":  {connect.CodeFailedPrecondition, http.StatusBadGateway},
	"wrongProvider":   {connect.CodeInvalidArgument, http.StatusMisdirectedRequest},
	"notFound":        {connect.CodeNotFound, http.StatusNotFound},
	"notAllowed":      {connect.CodePermissionDenied, http.StatusForbidden},
	"keyUsed":         {connect.CodeAlreadyExists, http.StatusConflict},
	"alreadyExists":   {connect.CodeAlreadyExists, http.StatusConflict},
	"tokenUnknown":    {connect.CodePermissionDenied, http.StatusForbidden},
	"tokenUsed":       {connect.CodePermissionDenied, http.StatusForbidden},
	"tokenExpired":    {connect.CodePermissionDenied, http.StatusForbidden},
	"tokenName":       {connect.CodePermissionDenied, http.StatusForbidden},
	"gatewayKey":      {connect.CodeFailedPrecondition, http.StatusBadRequest},
	"busy":            {connect.CodeResourceExhausted, http.StatusTooManyRequests},
	"quotaExceeded":   {connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	"hubUnreachable":  {connect.CodeUnavailable, http.StatusBadGateway},
	"unavailable":     {connect.CodeUnavailable, http.StatusServiceUnavailable},
	"internal":        {connect.CodeInternal, http.StatusInternalServerError},
}

// reason finds the refusal in an error, or nil if it is internal.
func reason(err error) *refusal {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r
	}
	if e, ok := errors.AsType[*federation.Error](err); ok {
		if _, known := statuses[e.Code]; known {
			return &refusal{e.Code, e.Detail, e.RetryAfter}
		}
		return &refusal{"unavailable", "the other provider answered " + e.Code + ": " + e.Detail, e.RetryAfter}
	}
	switch code := authority.Code(err); code {
	case "":
	case "unknownProvider", "unapproved":
		return &refusal{code: "unapprovedPeer", detail: err.Error()}
	case "notFound":
		return &refusal{code: "notFound", detail: err.Error()}
	default:
		if _, known := statuses[code]; known {
			return &refusal{code: code, detail: err.Error()}
		}
		return &refusal{code: "malformed", detail: err.Error()}
	}
	switch {
	case errors.Is(err, mls.ErrMalformed), errors.Is(err, mls.ErrUnsupported):
		return &refusal{code: "malformed", detail: err.Error()}
	case errors.Is(err, mls.ErrSignature):
		return &refusal{code: "notAllowed", detail: err.Error()}
	case errors.Is(err, syscall.ENOSPC):
		return &refusal{code: "unavailable", detail: "the node's disk is full", retry: retryDisk}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return &refusal{code: "unavailable", detail: "the request took too long or was given up"}
	}
	return nil
}

// clientError is the Connect error of an API call that failed: code and detail for the client, a count and a log line
// here.
func (n *Node) clientError(endpoint string, who fmt.Stringer, err error) error {
	r := reason(err)
	if r == nil {
		n.log.Error("request failed", "endpoint", endpoint, "client", who, "err", err)
		r = &refusal{code: "internal", detail: "the node failed; its log says why"}
	} else {
		n.log.Info("request refused", "endpoint", endpoint, "client", who, "code", r.code, "reason", r.detail)
	}
	n.metrics.refused.WithLabelValues(endpoint, r.code).Inc()
	e := connect.NewError(statuses[r.code].connect, errors.New(r.Error()))
	if d, err := connect.NewErrorDetail(&api.ErrorInfo{Code: r.code, Detail: r.detail, RetryAfterMs: uint64(r.retry.Milliseconds())}); err == nil {
		e.AddDetail(d)
	}
	if r.retry > 0 {
		e.Meta().Set("Retry-After", strconv.FormatInt(int64((r.retry+time.Second-1)/time.Second), 10))
	}
	return e
}

// decode reads what came over a wire.
func decode(b []byte, u codec.Unmarshaler) error {
	if err := codec.Unmarshal(b, u); err != nil {
		return refuse("malformed", "%v", err)
	}
	return nil
}

// peerError is what a peer is told of a request that failed; the federation handler counts and logs it.
func peerError(err error) error {
	r := reason(err)
	if r == nil {
		return err
	}
	return &federation.Error{Status: statuses[r.code].http, Code: r.code, Detail: r.detail, RetryAfter: r.retry}
}
