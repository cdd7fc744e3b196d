package federation

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/parley-mls/parley/federation/ohttp"
)

// The codes of an Error.
const (
	CodeMalformed       = "malformed"       // 400: the request can't be read, or contradicts itself
	CodeUnauthenticated = "unauthenticated" // 401: the request doesn't come from whom it says
	CodeUnapproved      = "unapproved"      // 403: the peer isn't approved
	CodeNotAllowed      = "notAllowed"      // 403: the peer may not do this
	CodeNotFound        = "notFound"        // 404: there is no such room, user or endpoint
	CodeTooLarge        = "tooLarge"        // 413: the body is larger than the endpoint takes
	CodeWrongProvider   = "wrongProvider"   // 421: this is another provider's
	CodeBusy            = "busy"            // 429: later
	CodeGatewayKey      = "gatewayKey"      // 400: the request isn't for a key of the oblivious gateway
	CodeInternal        = "internal"        // 500: the provider failed; its log says why
	CodeUnavailable     = "unavailable"     // 503: the provider can't do this now
)

var statuses = map[string]int{
	CodeMalformed: http.StatusBadRequest, CodeUnauthenticated: http.StatusUnauthorized, CodeUnapproved: http.StatusForbidden,
	CodeNotAllowed: http.StatusForbidden, CodeNotFound: http.StatusNotFound, CodeTooLarge: http.StatusRequestEntityTooLarge,
	CodeWrongProvider: http.StatusMisdirectedRequest, CodeBusy: http.StatusTooManyRequests, CodeGatewayKey: http.StatusBadRequest,
	CodeInternal: http.StatusInternalServerError, CodeUnavailable: http.StatusServiceUnavailable,
}

// Error is the refusal of a request, as it crosses the wire: an HTTP status and a problem document (RFC 9457) with a
// code for programs and a detail for people.
type Error struct {
	Status     int           // of HTTP; 0: that of the code
	Code       string        // one of those above, or another of up to 32 letters
	Detail     string        // up to 1,024 bytes are sent
	RetryAfter time.Duration // if the peer said when to try again
}

// Error returns the code and the detail.
func (e *Error) Error() string {
	if e.Detail == "" {
		return "federation: " + e.Code
	}
	return "federation: " + e.Code + ": " + e.Detail
}

func (e *Error) status() int {
	if e.Status >= 400 && e.Status <= 599 {
		return e.Status
	}
	if s, ok := statuses[e.Code]; ok {
		return s
	}
	return http.StatusInternalServerError
}

func refusal(code, format string, args ...any) *Error {
	return &Error{Status: statuses[code], Code: code, Detail: fmt.Sprintf(format, args...)}
}

// noAnswer marks errors of an exchange that got no answer.
type noAnswer struct{ err error }

func (u *noAnswer) Error() string { return u.err.Error() }
func (u *noAnswer) Unwrap() error { return u.err }

// Unavailable says whether a request failed because the peer couldn't be reached, or answered that it can't serve now:
// the same request may succeed later.
func Unavailable(err error) bool {
	if e, ok := errors.AsType[*Error](err); ok {
		switch e.Status {
		case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
		return false
	}
	_, ok := errors.AsType[*noAnswer](err)
	return ok
}

// Permanent says whether sending the same again has no prospect: the peer understood the request and refused it, for a
// reason that doesn't lie in the peer's state or opinion of this node.
func Permanent(err error) bool {
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Status < 400 || e.Status > 499 {
		return false
	}
	switch e.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusRequestTimeout, http.StatusConflict, http.StatusTooManyRequests:
		return false
	}
	return true
}

const (
	problemType = "application/problem+json"
	maxProblem  = 16 << 10 // bytes of a problem document
	maxDetail   = 1024
	maxRetry    = time.Hour // longest Retry-After that is heeded
)

// problem is RFC 9457's document with the member "code".
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Code   string `json:"code"`
	Detail string `json:"detail,omitempty"`
}

func writeError(w http.ResponseWriter, e *Error) {
	status := e.status()
	kind := "about:blank"
	if e.Code == CodeGatewayKey {
		kind = ohttp.KeyProblem
	}
	b, err := json.Marshal(problem{Type: kind, Title: http.StatusText(status), Code: e.Code, Detail: clip(e.Detail)})
	if err != nil {
		b = nil // strings always encode
	}
	w.Header().Set("Content-Type", problemType)
	if e.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((e.RetryAfter+time.Second-1)/time.Second)))
	}
	w.WriteHeader(status)
	w.Write(b)
}

// readError turns a refusal of a peer into an Error. What isn't a problem document has the code of its status.
func readError(resp *http.Response) *Error {
	e := &Error{Status: resp.StatusCode, Code: CodeInternal}
	for code, status := range statuses {
		if status == resp.StatusCode && code != CodeUnapproved && code != CodeGatewayKey {
			e.Code = code
		}
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		e.RetryAfter = min(time.Duration(min(n, 1<<20))*time.Second, maxRetry)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	if err != nil {
		return e
	}
	var p problem
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&p); err == nil {
		switch {
		case validCode(p.Code):
			e.Code = p.Code
		case p.Type == ohttp.KeyProblem:
			e.Code = CodeGatewayKey
		}
		e.Detail = clip(p.Detail)
	}
	return e
}

func validCode(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= 32
}

// clip cuts a detail at a character's boundary.
func clip(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	n := maxDetail
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
