package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"

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
}

func (e *refusal) Error() string { return e.code + ": " + e.detail }

func refuse(code, format string, args ...any) error {
	return &refusal{code: code, detail: fmt.Sprintf(format, args...)}
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
			return &refusal{e.Code, e.Detail}
		}
		return &refusal{"unavailable", "the other provider answered " + e.Code + ": " + e.Detail}
	}
	switch code := authority.Code(err); code {
	case "":
	case "unknownProvider", "unapproved":
		return &refusal{"unapprovedPeer", err.Error()}
	case "notFound":
		return &refusal{"notFound", err.Error()}
	default:
		if _, known := statuses[code]; known {
			return &refusal{code, err.Error()}
		}
		return &refusal{"malformed", err.Error()}
	}
	switch {
	case errors.Is(err, mls.ErrMalformed), errors.Is(err, mls.ErrUnsupported):
		return &refusal{"malformed", err.Error()}
	case errors.Is(err, mls.ErrSignature):
		return &refusal{"notAllowed", err.Error()}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return &refusal{"unavailable", "the request took too long or was given up"}
	}
	return nil
}

// clientError is the Connect error of an API call that failed: code and detail for the client, a count and a log line
// here.
func (n *Node) clientError(endpoint string, who fmt.Stringer, err error) error {
	r := reason(err)
	if r == nil {
		n.log.Error("request failed", "endpoint", endpoint, "client", who, "err", err)
		r = &refusal{"internal", "the node failed; its log says why"}
	} else {
		n.log.Info("request refused", "endpoint", endpoint, "client", who, "code", r.code, "reason", r.detail)
	}
	n.metrics.refused.WithLabelValues(endpoint, r.code).Inc()
	e := connect.NewError(statuses[r.code].connect, errors.New(r.Error()))
	if d, err := connect.NewErrorDetail(&api.ErrorInfo{Code: r.code, Detail: r.detail}); err == nil {
		e.AddDetail(d)
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
	return &federation.Error{Status: statuses[r.code].http, Code: r.code, Detail: r.detail}
}
