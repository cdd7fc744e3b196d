package federation

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// The largest bodies in bytes. What has a ratchet tree in it may be large: a leaf with a chain of three certificates
// takes some 2 KiB.
const (
	MaxKeyMaterialRequest  = 256 << 10
	MaxKeyMaterialResponse = 16 << 20
	MaxUpdate              = 64 << 20
	MaxSubmitMessage       = 1 << 20
	MaxNotify              = 64 << 20
	MaxGroupInfoRequest    = 64 << 10
	MaxGroupInfoResponse   = 64 << 20
	MaxIdentifierQuery     = 64 << 10
	MaxIdentifierResponse  = 1 << 20
	MaxReportAbuse         = 4 << 20
	MaxRequestConsent      = 64 << 10
	MaxUpdateConsent       = 4 << 20
	MaxBundle              = 1 << 20
	MaxEphemeral           = 4 << 10
	MaxOblivious           = 4 << 10
	MaxObliviousResponse   = MaxPart + 64<<10
	maxAnswer              = 256 << 10 // to an update or a message

	// MaxNotifyMessages is the largest number of FanoutMessages in one request.
	MaxNotifyMessages = 4096

	// maxInFlight bounds what the bodies of one peer's requests, as they are declared, may take at a time, and maxRequests
	// how many requests there are.
	maxInFlight = 192 << 20
	maxRequests = 2048
)

// SeqField is the HTTP field with the numbers that a hub has given to messages in the room's log. A request to notify
// has one for each message, separated by commas, 0 for none; the answer to an update or message has one. A MIMI
// provider that isn't Parley doesn't send the field.
const SeqField = "Parley-Seq"

// HeadField is the HTTP field with which a hub answers for a room's log: a Byte Sequence (RFC 9651, Section 3.3.5) of at
// most MaxHead bytes, whose meaning is package chain's. In a request to notify it belongs to the messages of the body, in
// an answer to an update, message or request for group info it tells how far the log is. A MIMI provider that isn't Parley
// doesn't send the field.
const HeadField = "Parley-Head"

// MaxHead is the largest content of a HeadField in bytes.
const MaxHead = 48 << 10

// HubPath, followed by the number of a cipher suite, is where a node has the key of that suite with which it signs heads,
// and its credential (GET): an ExternalSender (RFC 9420, Section 12.1.8.1).
const HubPath = "/parley/v1/hub/"

// EphemeralPath, followed by a room, is where a node takes messages that are passed on and not kept (POST).
const EphemeralPath = "/parley/v1/ephemeral/"

// MaxSeq is the largest number of an entry that is taken from a peer: far beyond what a hub can count to, and small
// enough to count on from.
const MaxSeq = 1<<62 - 1

// BundlePath is where a node has its own trust bundle (GET) and takes that of a peer (POST): JSON.
const BundlePath = "/parley/v1/bundle"

const (
	apiPrefix   = "/mimi/v1/"
	contentType = "application/octet-stream"
)

// Sequenced is one FanoutMessage, encoded, with its number in the room's log; 0 if the hub gave none.
type Sequenced struct {
	Seq    uint64
	Fanout []byte
	Head   []byte // with the last one of a request: the content of its HeadField, nil if there was none
}

// Provider is what a node does for its peers. from is the domain that the peer's certificate proved. A method that
// returns an *Error refuses the request with it; any other error becomes CodeInternal and a log line. Rooms are of the
// kind room; those of Update, SubmitMessage, GroupInfo and ReportAbuse are of the own domain, that of Notify is of from.
type Provider interface {
	// KeyMaterial claims KeyPackages, as hub of the room or as provider of the user.
	KeyMaterial(ctx context.Context, from string, req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error)

	// Update orders a handshake; body is a mimi.UpdateRequest. seq is its number in the room's log, 0 if it has none.
	Update(ctx context.Context, from string, room mimi.URI, body []byte) (resp *mimi.UpdateRoomResponse, seq uint64, err error)

	// SubmitMessage orders an application message; body is a mimi.SubmitMessageRequest. seq is as in Update.
	SubmitMessage(ctx context.Context, from string, room mimi.URI, body []byte) (resp *mimi.SubmitMessageResponse, seq uint64, err error)

	// Notify takes what a hub has ordered, in its order. The messages decode, and are durable on return.
	Notify(ctx context.Context, from string, room mimi.URI, msgs []Sequenced) error

	// GroupInfo tells a client what it needs to join by an external commit.
	GroupInfo(ctx context.Context, from string, room mimi.URI, req *mimi.GroupInfoRequest) (*mimi.GroupInfoResponse, error)

	// IdentifierQuery finds users of the own domain.
	IdentifierQuery(ctx context.Context, from string, req *mimi.IdentifierRequest) (*mimi.IdentifierResponse, error)

	// ReportAbuse takes a report about a room; body is a mimi.AbuseReport. It is durable on return.
	ReportAbuse(ctx context.Context, from string, room mimi.URI, body []byte) error

	// RequestConsent takes what a user of from asks of one of the own domain, or takes back. It is durable on return,
	// unless the provider ignores it: the peer isn't told which.
	RequestConsent(ctx context.Context, from string, entry *mimi.ConsentEntry) error

	// UpdateConsent takes what a user of from grants one of the own domain, or revokes. It is as durable as that of
	// RequestConsent.
	UpdateConsent(ctx context.Context, from string, entry *mimi.ConsentEntry) error

	// ProxyDownload fetches an asset for a peer, as the hub of some room: one of the own users', or of those of another
	// peer. The caller closes it.
	ProxyDownload(ctx context.Context, from, downloadURL string) (*Asset, error)

	// Asset opens an asset of an own user, or a part of one. The caller closes it.
	Asset(ctx context.Context, from string, hash [sha256.Size]byte, part Part) (*Asset, error)

	// Oblivious answers an encapsulated request (package ohttp) that a peer relays for a client: for an asset, as
	// ProxyDownload. The answer is encapsulated too.
	Oblivious(ctx context.Context, from string, request []byte) ([]byte, error)

	// GatewayKeys returns the keys for which Oblivious takes requests, signed as hub of rooms of a suite; not signed if suite
	// is 0.
	GatewayKeys(suite mls.CipherSuite) (*mimi.GatewayKeys, error)

	// Ephemeral passes a message on that is kept nowhere. In a room of the own domain body is a mimi.SubmitMessageRequest,
	// and it goes to all who take part; in one of from's it is a mimi.FanoutMessage, for own clients. What can't be passed
	// on at once is lost.
	Ephemeral(ctx context.Context, from string, room mimi.URI, body []byte) error

	// Head returns the content of the HeadField of answers about a room of the own domain to who takes part in it, nil if
	// there is none.
	Head(room mimi.URI) []byte

	// Log returns entries of a room's log to a peer that has lost them, to the hub as one who follows the room, and to one
	// who takes part as the hub.
	Log(ctx context.Context, from string, room mimi.URI, req *LogRequest) (*LogPage, error)

	// Known returns what is known of a peer.
	Known(from string) (*Known, error)

	// HubSender returns the key and credential with which the hub signs in rooms of a suite, an ExternalSender.
	HubSender(suite mls.CipherSuite) ([]byte, error)

	// Bundle returns the own trust bundle, JSON.
	Bundle() []byte

	// ReceiveBundle takes the trust bundle that a peer sent: roots and revocations, JSON.
	ReceiveBundle(ctx context.Context, from string, bundle []byte) error
}

// NewHandler serves p to peers: the MIMI endpoints (draft-ietf-mimi-protocol-06, Section 5), the directory of them, and
// the trust bundle. peer tells the domain that a request's connection has proved; the field From must name the same
// provider, and the Host be domain (Section 4.1). observe, if not nil, is called after each request with the endpoint's
// name and the code of the refusal, "" if there was none. admit, if not nil, is asked before anything is read of a
// request whether the peer may make it, with a body of so many bytes; once more, for its body, if the peer didn't declare
// that. Besides that a peer has a share of memory and of requests at a time, which no other peer can use up.
func NewHandler(domain string, p Provider, peer func(*http.Request) (domain string, ok bool), log *slog.Logger, observe func(endpoint, code string), admit func(peer string, bytes int64) error) http.Handler {
	if admit == nil {
		admit = func(string, int64) error { return nil }
	}
	if observe == nil {
		observe = func(string, string) {}
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	directory, err := json.Marshal(mimi.NewDirectory(domain))
	if err != nil {
		directory = nil // strings always encode
	}
	return &handler{domain: domain, provider: p, peer: peer, log: log, observe: observe, admit: admit, directory: directory, shares: make(map[string]share)}
}

type handler struct {
	domain    string
	provider  Provider
	peer      func(*http.Request) (string, bool)
	log       *slog.Logger
	observe   func(endpoint, code string)
	admit     func(peer string, bytes int64) error
	directory []byte

	mu     sync.Mutex
	shares map[string]share // by peer; guarded by mu
}

// share is what the requests take that a peer has under way.
type share struct {
	requests int
	bytes    int64 // of their bodies, as they are declared
}

// answer is what a request that isn't refused gets.
type answer struct {
	status      int
	contentType string
	body        []byte
	seq         uint64
	head        []byte
	asset       *Asset // in the place of body

	contentRange string
}

// call is one request, as its endpoint sees it.
type call struct {
	h     *handler
	r     *http.Request
	w     http.ResponseWriter
	from  string
	param string
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	endpoint, param, serve := h.route(r)
	c := &call{h: h, r: r, w: w, param: param}
	a, err := c.run(serve)
	if err == nil {
		h.observe(endpoint, "")
		if a.seq > 0 {
			w.Header().Set(SeqField, strconv.FormatUint(a.seq, 10))
		}
		if len(a.head) > 0 {
			w.Header().Set(HeadField, formatHead(a.head))
		}
		if a.contentType != "" {
			w.Header().Set("Content-Type", a.contentType)
		}
		if a.contentRange != "" {
			w.Header().Set("Content-Range", a.contentRange)
		}
		if a.asset != nil {
			w.Header().Set("Content-Length", strconv.FormatInt(a.asset.Size, 10))
		}
		w.WriteHeader(a.status)
		if a.asset == nil {
			w.Write(a.body)
		} else if err := a.asset.stream(w); err != nil {
			h.log.Info("an asset was cut off", "endpoint", endpoint, "peer", c.from, "err", err)
		}
		return
	}
	e, ok := errors.AsType[*Error](err)
	switch {
	case ok:
		h.log.Info("peer refused", "endpoint", endpoint, "peer", c.from, "code", e.Code, "reason", e.Detail)
	case r.Context().Err() != nil:
		e = refusal(CodeUnavailable, "the request was given up")
		h.log.Info("peer gave up", "endpoint", endpoint, "peer", c.from, "err", err)
	default:
		e = refusal(CodeInternal, "")
		h.log.Error("request of a peer failed", "endpoint", endpoint, "peer", c.from, "err", err)
	}
	h.observe(endpoint, e.Code)
	writeError(w, e)
}

// route finds a request's endpoint and the decoded variable of its path; serve is nil if there is none.
func (h *handler) route(r *http.Request) (endpoint, param string, serve func(*call) (*answer, error)) {
	path := r.URL.EscapedPath()
	switch {
	case path == mimi.DirectoryPath && r.Method == http.MethodGet:
		return "directory", "", (*call).getDirectory
	case path == BundlePath && r.Method == http.MethodGet:
		return "bundle", "", (*call).getBundle
	case path == BundlePath && r.Method == http.MethodPost:
		return "bundle", "", (*call).postBundle
	case path == KnownPath && r.Method == http.MethodGet:
		return "known", "", (*call).known
	case strings.HasPrefix(path, LogPath) && r.Method == http.MethodPost:
		param, err := url.PathUnescape(strings.TrimPrefix(path, LogPath))
		if err != nil {
			return "unknown", "", nil
		}
		return "log", param, (*call).log
	case strings.HasPrefix(path, HubPath) && r.Method == http.MethodGet:
		return "hub", strings.TrimPrefix(path, HubPath), (*call).getHub
	case path == GatewayPath && r.Method == http.MethodGet:
		return "ohttpGateway", "", (*call).getGateway
	case path == GatewayPath && r.Method == http.MethodPost:
		return "ohttpGateway", "", (*call).postGateway
	case strings.HasPrefix(path, GatewayKeysPath) && r.Method == http.MethodGet:
		return "gatewayKeys", strings.TrimPrefix(path, GatewayKeysPath), (*call).getGatewayKeys
	case strings.HasPrefix(path, AssetPath) && r.Method == http.MethodGet:
		return "asset", strings.TrimPrefix(path, AssetPath), (*call).getAsset
	}
	if rest, ok := strings.CutPrefix(path, EphemeralPath); ok && r.Method == http.MethodPost {
		if room, err := url.PathUnescape(rest); err == nil {
			return "ephemeral", room, (*call).ephemeral
		}
	}
	rest, ok := strings.CutPrefix(path, apiPrefix)
	endpoint, escaped, ok2 := strings.Cut(rest, "/")
	param, err := url.PathUnescape(escaped)
	method := http.MethodPost
	if endpoint == "proxyDownload" {
		method = http.MethodGet
	}
	if !ok || !ok2 || err != nil || r.Method != method {
		return "unknown", "", nil
	}
	switch endpoint {
	case "keyMaterial":
		return endpoint, param, (*call).keyMaterial
	case "update":
		return endpoint, param, (*call).update
	case "submitMessage":
		return endpoint, param, (*call).submitMessage
	case "notify":
		return endpoint, param, (*call).notify
	case "groupInfo":
		return endpoint, param, (*call).groupInfo
	case "identifierQuery":
		return endpoint, param, (*call).identifierQuery
	case "reportAbuse":
		return endpoint, param, (*call).reportAbuse
	case "requestConsent":
		return endpoint, param, (*call).requestConsent
	case "updateConsent":
		return endpoint, param, (*call).updateConsent
	case "proxyDownload":
		return endpoint, param, (*call).proxyDownload
	}
	return "unknown", "", nil
}

// run checks who asks and whom, and serves the request.
func (c *call) run(serve func(*call) (*answer, error)) (*answer, error) {
	from, ok := c.h.peer(c.r)
	if !ok {
		return nil, refusal(CodeUnauthenticated, "the connection names no provider")
	}
	c.from = from
	if v := c.r.Header.Values("From"); len(v) != 1 || v[0] != "mimi@"+from {
		return nil, refusal(CodeUnauthenticated, "the field From isn't mimi@%s", from)
	}
	host := c.r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if host != c.h.domain {
		return nil, refusal(CodeWrongProvider, "this is %s", c.h.domain)
	}
	if !c.h.reserve(from, 1, 0) {
		return nil, &Error{Code: CodeBusy, Detail: "too many requests at a time", RetryAfter: time.Second}
	}
	defer c.h.reserve(from, -1, 0)
	if err := c.h.admit(from, max(0, c.r.ContentLength)); err != nil {
		return nil, err
	}
	if serve == nil {
		return nil, refusal(CodeNotFound, "no such endpoint: %s %s", c.r.Method, c.r.URL.EscapedPath())
	}
	return serve(c)
}

// body reads the request's body, of at most max bytes, and calls f with it.
func (c *call) body(max int64, want string, f func(body []byte) (*answer, error)) (*answer, error) {
	if v := c.r.Header.Get("Content-Type"); v != "" {
		if t, _, err := mime.ParseMediaType(v); err != nil || t != want {
			return nil, &Error{Status: http.StatusUnsupportedMediaType, Code: CodeMalformed, Detail: "the body isn't " + want}
		}
	}
	declared := c.r.ContentLength
	if declared > max {
		return nil, refusal(CodeTooLarge, "a body of %d bytes, at most %d", declared, max)
	}
	if declared < 0 {
		declared = max
	}
	if !c.h.reserve(c.from, 0, declared) {
		return nil, &Error{Code: CodeBusy, Detail: "too much at a time", RetryAfter: time.Second}
	}
	defer c.h.reserve(c.from, 0, -declared)
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, max))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return nil, refusal(CodeTooLarge, "a body of more than %d bytes", max)
		}
		return nil, refusal(CodeMalformed, "the body ends early")
	}
	if c.r.ContentLength < 0 {
		if err := c.h.admit(c.from, int64(len(body))); err != nil {
			return nil, err
		}
	}
	return f(body)
}

// reserve notes that a peer takes so much more, or less if that is negative; false if that is too much.
func (h *handler) reserve(peer string, requests int, bytes int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.shares[peer]
	now.requests += requests
	now.bytes += bytes
	if requests > 0 && now.requests > maxRequests || bytes > 0 && now.bytes > maxInFlight {
		return false
	}
	if h.shares[peer] = now; now == (share{}) {
		delete(h.shares, peer)
	}
	return true
}

// room is the room that the path names, which must be one of domain.
func (c *call) room(domain, code string) (mimi.URI, error) {
	room, err := mimi.ParseURI(c.param)
	if err != nil || room.Kind() != mimi.KindRoom {
		return "", refusal(CodeMalformed, "the path names no room")
	}
	if room.Domain() != domain {
		return "", refusal(code, "%s is not the hub of %s", domain, room)
	}
	return room, nil
}

// decode reads a body that is to be one structure.
func decode(body []byte, v codec.Unmarshaler) error {
	if err := codec.Unmarshal(body, v); err != nil {
		return refusal(CodeMalformed, "the body doesn't decode: %v", err)
	}
	return nil
}

func encoded(m codec.Marshaler, seq uint64) *answer {
	return &answer{status: http.StatusOK, contentType: contentType, body: codec.Marshal(m), seq: seq}
}

// withHead adds the room's head to an answer, unless the answer is a refusal, which tells nothing of the room.
func (c *call) withHead(a *answer, room mimi.URI, served bool) *answer {
	if served {
		a.head = c.h.provider.Head(room)
	}
	return a
}

func (c *call) getDirectory() (*answer, error) {
	return &answer{status: http.StatusOK, contentType: "application/json", body: c.h.directory}, nil
}

func (c *call) getBundle() (*answer, error) {
	return &answer{status: http.StatusOK, contentType: "application/json", body: c.h.provider.Bundle()}, nil
}

// suite is the cipher suite that the path names.
func (c *call) suite() (mls.CipherSuite, error) {
	suite, err := strconv.ParseUint(c.param, 10, 16)
	if err != nil || suite == 0 {
		return 0, refusal(CodeMalformed, "the path names no cipher suite")
	}
	return mls.CipherSuite(suite), nil
}

func (c *call) getHub() (*answer, error) {
	suite, err := c.suite()
	if err != nil {
		return nil, err
	}
	sender, err := c.h.provider.HubSender(suite)
	if err != nil {
		return nil, err
	}
	return &answer{status: http.StatusOK, contentType: contentType, body: sender}, nil
}

func (c *call) postBundle() (*answer, error) {
	return c.body(MaxBundle, "application/json", func(body []byte) (*answer, error) {
		if err := c.h.provider.ReceiveBundle(c.r.Context(), c.from, body); err != nil {
			return nil, err
		}
		return &answer{status: http.StatusNoContent}, nil
	})
}

func (c *call) keyMaterial() (*answer, error) {
	return c.body(MaxKeyMaterialRequest, contentType, func(body []byte) (*answer, error) {
		var req mimi.KeyMaterialRequest
		if err := codec.Unmarshal(body, &req); errors.Is(err, mimi.ErrProtocol) {
			if user, err := mimi.ParseURI(c.param); err == nil && user.Kind() == mimi.KindUser {
				return encoded(&mimi.KeyMaterialResponse{Code: mimi.IncompatibleProtocol, User: user}, 0), nil
			}
		}
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		if string(req.TargetUser) != c.param {
			return nil, refusal(CodeMalformed, "the path and the request name different users")
		}
		resp, err := c.h.provider.KeyMaterial(c.r.Context(), c.from, &req)
		if err != nil {
			return nil, err
		}
		return encoded(resp, 0), nil
	})
}

func (c *call) update() (*answer, error) {
	room, err := c.room(c.h.domain, CodeWrongProvider)
	if err != nil {
		return nil, err
	}
	return c.body(MaxUpdate, contentType, func(body []byte) (*answer, error) {
		resp, seq, err := c.h.provider.Update(c.r.Context(), c.from, room, body)
		if err != nil {
			return nil, err
		}
		return c.withHead(encoded(resp, seq), room, resp.Code == mimi.UpdateSuccess || resp.Code == mimi.UpdateWrongEpoch), nil
	})
}

func (c *call) submitMessage() (*answer, error) {
	room, err := c.room(c.h.domain, CodeWrongProvider)
	if err != nil {
		return nil, err
	}
	return c.body(MaxSubmitMessage, contentType, func(body []byte) (*answer, error) {
		resp, seq, err := c.h.provider.SubmitMessage(c.r.Context(), c.from, room, body)
		if err != nil {
			return nil, err
		}
		return c.withHead(encoded(resp, seq), room, resp.Code == mimi.SubmitAccepted || resp.Code == mimi.SubmitEpochTooOld), nil
	})
}

func (c *call) notify() (*answer, error) {
	room, err := c.room(c.from, CodeNotAllowed)
	if err != nil {
		return nil, err
	}
	return c.body(MaxNotify, contentType, func(body []byte) (*answer, error) {
		list, err := mimi.SplitFanout(body, MaxNotifyMessages)
		if err != nil {
			return nil, refusal(CodeMalformed, "%v", err)
		}
		seqs, err := parseSeqs(c.r.Header, len(list))
		if err != nil {
			return nil, err
		}
		msgs := make([]Sequenced, len(list))
		for i := range list {
			msgs[i] = Sequenced{Seq: seqs[i], Fanout: list[i]}
		}
		if msgs[len(msgs)-1].Head, err = parseHead(c.r.Header); err != nil {
			return nil, refusal(CodeMalformed, "%v", err)
		}
		if err := c.h.provider.Notify(c.r.Context(), c.from, room, msgs); err != nil {
			return nil, err
		}
		return &answer{status: http.StatusCreated}, nil
	})
}

func (c *call) groupInfo() (*answer, error) {
	room, err := c.room(c.h.domain, CodeWrongProvider)
	if err != nil {
		return nil, err
	}
	return c.body(MaxGroupInfoRequest, contentType, func(body []byte) (*answer, error) {
		var req mimi.GroupInfoRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		resp, err := c.h.provider.GroupInfo(c.r.Context(), c.from, room, &req)
		if err != nil {
			return nil, err
		}
		return c.withHead(encoded(resp, 0), room, resp.Code == mimi.GroupInfoSuccess), nil
	})
}

func (c *call) identifierQuery() (*answer, error) {
	if c.param != c.h.domain {
		return nil, refusal(CodeWrongProvider, "this is %s", c.h.domain)
	}
	return c.body(MaxIdentifierQuery, contentType, func(body []byte) (*answer, error) {
		var req mimi.IdentifierRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		resp, err := c.h.provider.IdentifierQuery(c.r.Context(), c.from, &req)
		if err != nil {
			return nil, err
		}
		return encoded(resp, 0), nil
	})
}

func (c *call) reportAbuse() (*answer, error) {
	room, err := c.room(c.h.domain, CodeWrongProvider)
	if err != nil {
		return nil, err
	}
	return c.body(MaxReportAbuse, contentType, func(body []byte) (*answer, error) {
		if err := c.h.provider.ReportAbuse(c.r.Context(), c.from, room, body); err != nil {
			return nil, err
		}
		return &answer{status: http.StatusOK}, nil
	})
}

func (c *call) ephemeral() (*answer, error) {
	room, err := mimi.ParseURI(c.param)
	if err != nil || room.Kind() != mimi.KindRoom {
		return nil, refusal(CodeMalformed, "the path names no room")
	}
	return c.body(MaxEphemeral, contentType, func(body []byte) (*answer, error) {
		if err := c.h.provider.Ephemeral(c.r.Context(), c.from, room, body); err != nil {
			return nil, err
		}
		return &answer{status: http.StatusNoContent}, nil
	})
}

func (c *call) requestConsent() (*answer, error) {
	return c.consent(MaxRequestConsent, func(e *mimi.ConsentEntry) error {
		if e.Operation != mimi.ConsentRequest && e.Operation != mimi.ConsentCancel {
			return refusal(CodeMalformed, "a request for consent is a request or a cancellation")
		}
		if err := c.between(e.Scope.Requester, e.Scope.Target); err != nil {
			return err
		}
		return c.h.provider.RequestConsent(c.r.Context(), c.from, e)
	})
}

func (c *call) updateConsent() (*answer, error) {
	return c.consent(MaxUpdateConsent, func(e *mimi.ConsentEntry) error {
		if e.Operation != mimi.ConsentGrant && e.Operation != mimi.ConsentRevoke {
			return refusal(CodeMalformed, "an update of consent is a grant or a revocation")
		}
		if err := c.between(e.Scope.Target, e.Scope.Requester); err != nil {
			return err
		}
		return c.h.provider.UpdateConsent(c.r.Context(), c.from, e)
	})
}

func (c *call) consent(max int64, take func(*mimi.ConsentEntry) error) (*answer, error) {
	return c.body(max, contentType, func(body []byte) (*answer, error) {
		var e mimi.ConsentEntry
		if err := decode(body, &e); err != nil {
			return nil, err
		}
		if err := take(&e); err != nil {
			return nil, err
		}
		return &answer{status: http.StatusCreated}, nil
	})
}

// between checks that an entry goes from a user of the peer to one of the own domain. The path names the latter, as the
// draft's directory has it, or the domain, as its text has it.
func (c *call) between(theirs, ours mimi.URI) error {
	if theirs.Domain() != c.from {
		return refusal(CodeNotAllowed, "%s doesn't speak for %s", c.from, theirs)
	}
	if ours.Domain() != c.h.domain {
		return refusal(CodeWrongProvider, "%s is not the provider of %s", c.h.domain, ours)
	}
	if c.param != string(ours) && c.param != c.h.domain {
		return refusal(CodeMalformed, "the path and the entry name different users")
	}
	return nil
}

// parseSeqs reads the numbers of n messages, all 0 if the field is absent.
func parseSeqs(header http.Header, n int) ([]uint64, error) {
	seqs := make([]uint64, n)
	values := header.Values(SeqField)
	if len(values) == 0 {
		return seqs, nil
	}
	fields := strings.Split(strings.Join(values, ","), ",")
	if len(fields) != n {
		return nil, refusal(CodeMalformed, "%d numbers for %d messages in %s", len(fields), n, SeqField)
	}
	for i, s := range fields {
		var err error
		if seqs[i], err = parseSeq(strings.TrimSpace(s)); err != nil {
			return nil, refusal(CodeMalformed, "%s isn't a list of numbers up to %d", SeqField, uint64(MaxSeq))
		}
	}
	return seqs, nil
}

// parseHead reads a HeadField, nil if there is none.
func parseHead(header http.Header) ([]byte, error) {
	values := header.Values(HeadField)
	if len(values) == 0 {
		return nil, nil
	}
	v := strings.Trim(values[0], " ")
	if len(values) > 1 || len(v) < 2 || v[0] != ':' || v[len(v)-1] != ':' || base64.StdEncoding.DecodedLen(len(v)-2) > MaxHead+2 {
		return nil, fmt.Errorf("%s isn't one sequence of at most %d bytes", HeadField, MaxHead)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(v[1 : len(v)-1])
	if err != nil || len(b) == 0 || len(b) > MaxHead {
		return nil, fmt.Errorf("%s isn't one sequence of 1 to %d bytes", HeadField, MaxHead)
	}
	return b, nil
}

func formatHead(b []byte) string { return ":" + base64.StdEncoding.EncodeToString(b) + ":" }

// parseSeq reads a number of at most MaxSeq.
func parseSeq(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err == nil && n > MaxSeq {
		err = strconv.ErrRange
	}
	return n, err
}

// formatSeqs is the inverse of parseSeqs, "" if no message has a number.
func formatSeqs(msgs []Sequenced) string {
	var b []byte
	any := false
	for i, m := range msgs {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, m.Seq, 10)
		any = any || m.Seq > 0
	}
	if !any {
		return ""
	}
	return string(b)
}
