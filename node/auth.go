package node

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/transport"
	"github.com/parley-mls/parley/transport/pace"
)

const (
	nonceLifetime = time.Minute
	tokenLifetime = time.Hour
	maxNonces     = 100_000
	maxSessions   = 1_000_000
	maxTokens     = 32 // of one client; one more ends the oldest

	// AuthenticateLabel is the label of SignWithLabel under which a client signs nonce || domain (RFC 9420, Section
	// 5.1.2).
	AuthenticateLabel = "ParleyAuthenticate"
)

// session is an authenticated client. The token is kept as its SHA-256 only.
type session struct {
	client, user mimi.URI
	chain        [][]byte
	expires      time.Time
	revoked      bool          // guarded by auth.mu
	inFlight     *atomic.Int64 // bytes of requests that the client's sessions are in the midst of
}

// String returns the client, for the log.
func (s *session) String() string { return string(s.client) }

func (s *session) submitter() submitter {
	return submitter{domain: s.client.Domain(), user: s.user, client: s.client}
}

// auth knows who may use the client API. All of it is in memory: after a restart clients authenticate again.
type auth struct {
	domain   string
	verifier *authority.Verifier
	limits   Limits

	mu       sync.Mutex
	nonces   map[[32]byte]time.Time      // guarded by mu; when each expires
	sessions map[[32]byte]*session       // guarded by mu; by SHA-256 of the token
	clients  map[mimi.URI]*authenticated // guarded by mu
	swept    time.Time                   // guarded by mu

	requests pace.Limiter[mimi.URI] // by client, and by user
	bytes    pace.Limiter[mimi.URI] // by client, and by user
	remotes  pace.Limiter[string]   // by address
}

// authenticated is a client that has tokens.
type authenticated struct {
	inFlight atomic.Int64
	tokens   [][32]byte // SHA-256 of its tokens, the oldest first; some may have expired
}

func newAuth(domain string, v *authority.Verifier, limits Limits) *auth {
	return &auth{
		domain: domain, verifier: v, limits: limits,
		nonces: make(map[[32]byte]time.Time), sessions: make(map[[32]byte]*session),
		clients: make(map[mimi.URI]*authenticated),
	}
}

// challenge returns a fresh nonce.
func (a *auth) challenge() ([]byte, error) {
	var nonce [32]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, fmt.Errorf("making a nonce: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sweep()
	if len(a.nonces) >= maxNonces {
		return nil, refuse("busy", "too many challenges are open")
	}
	a.nonces[nonce] = time.Now().Add(nonceLifetime)
	return nonce[:], nil
}

// authenticate gives a token for a signed nonce. The nonce is used up, whatever comes of it.
func (a *auth) authenticate(req *api.AuthenticateRequest) (token string, s *session, err error) {
	if len(req.Nonce) != 32 || !a.useNonce([32]byte(req.Nonce)) {
		return "", nil, refuse("unauthenticated", "the challenge is unknown, used or too old")
	}
	suite := mls.CipherSuite(req.CipherSuite)
	if req.CipherSuite > 0xffff || !suite.Supported() {
		return "", nil, refuse("malformed", "cipher suite %d is not supported", req.CipherSuite)
	}
	id, err := authority.ParseIdentity(req.Chain)
	if err != nil {
		return "", nil, err
	}
	if id.Domain != a.domain {
		return "", nil, refuse("wrongProvider", "this is the node of %s, not of %s", a.domain, id.Domain)
	}
	pub, err := suite.SignaturePublicKey(id.PublicKey)
	if err != nil {
		return "", nil, refuse("malformed", "the credential's key isn't of cipher suite %d", suite)
	}
	if _, err := a.verifier.VerifyKey(req.Chain, suite, pub, authority.PurposeClient); err != nil {
		return "", nil, err
	}
	if err := suite.VerifyWithLabel(pub, AuthenticateLabel, append(req.Nonce[:32:32], a.domain...), req.Signature); err != nil {
		return "", nil, refuse("unauthenticated", "the signature isn't of the credential's key")
	}
	var secret [32]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return "", nil, fmt.Errorf("making a token: %w", err)
	}
	token = base64.RawURLEncoding.EncodeToString(secret[:])
	s = &session{client: id.Client, user: id.User, chain: req.Chain, expires: time.Now().Add(tokenLifetime)}
	if id.NotAfter.Before(s.expires) {
		s.expires = id.NotAfter
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sweep()
	if len(a.sessions) >= maxSessions {
		return "", nil, refuse("busy", "too many clients are authenticated")
	}
	c := a.clients[id.Client]
	if c == nil {
		c = new(authenticated)
		a.clients[id.Client] = c
	}
	if len(c.tokens) >= maxTokens {
		delete(a.sessions, c.tokens[0])
		c.tokens = append(c.tokens[:0], c.tokens[1:]...)
	}
	s.inFlight = &c.inFlight
	// A revocation after the first look has not seen this session if it came before the insertion, so look again.
	hash := sha256.Sum256([]byte(token))
	c.tokens = append(c.tokens, hash)
	a.sessions[hash] = s
	if _, err := a.verifier.Verify(req.Chain, authority.PurposeClient); err != nil {
		s.revoked = true
		return "", nil, err
	}
	return token, s, nil
}

func (a *auth) useNonce(nonce [32]byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	expires, ok := a.nonces[nonce]
	delete(a.nonces, nonce)
	return ok && time.Now().Before(expires)
}

// session returns whose token a request carries.
func (a *auth) session(header http.Header) (*session, error) {
	token, ok := strings.CutPrefix(header.Get("Authorization"), "Bearer ")
	if !ok {
		return nil, refuse("unauthenticated", "no token")
	}
	s, err := a.find(token)
	if err != nil {
		return nil, err
	}
	return s, a.admit(s)
}

func (a *auth) find(token string) (*session, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.sessions[sha256.Sum256([]byte(token))]
	switch {
	case s == nil:
		return nil, refuse("unauthenticated", "the token is unknown; authenticate again")
	case s.revoked:
		return nil, refuse("revoked", "%s was revoked", s.client)
	case !time.Now().Before(s.expires):
		return nil, refuse("unauthenticated", "the token has expired; authenticate again")
	}
	return s, nil
}

// revoke makes those of a client's tokens say so whose credential isn't good any more.
func (a *auth) revoke(client mimi.URI) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.sessions {
		if s.client == client {
			_, err := a.verifier.Verify(s.chain, authority.PurposeClient)
			s.revoked = s.revoked || err != nil
		}
	}
}

// check says whether a session may go on: it may have been revoked since the request began.
func (a *auth) check(s *session) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s.revoked {
		return refuse("revoked", "%s was revoked", s.client)
	}
	return nil
}

// remote limits how often an address may ask before it is authenticated.
func (a *auth) remote(address string) error {
	if wait := a.remotes.Take(transport.Network(address), 1, a.limits.address()); wait > 0 {
		return busy(wait, "more than %d requests per second", a.limits.AnonymousPerSecond)
	}
	return nil
}

// sweep forgets what has expired, at most every ten seconds; mu is held.
func (a *auth) sweep() {
	now := time.Now()
	if now.Sub(a.swept) < 10*time.Second {
		return
	}
	a.swept = now
	for k, expires := range a.nonces {
		if now.After(expires) {
			delete(a.nonces, k)
		}
	}
	live := make(map[mimi.URI]bool)
	for k, s := range a.sessions {
		if now.After(s.expires) {
			delete(a.sessions, k)
		} else {
			live[s.client] = true
		}
	}
	for c := range a.clients {
		if !live[c] {
			delete(a.clients, c)
		}
	}
}

type sessionKey struct{}

func sessionOf(ctx context.Context) *session { return ctx.Value(sessionKey{}).(*session) }

// gate stands in front of both services: before authenticates clients and limits rates, the interceptor measures and
// turns errors into what the client is told.
type gate struct {
	n    *Node
	open bool // for EnrolmentService, which asks for no token
}

type anonymous string

func (a anonymous) String() string { return string(a) }

// before refuses a request without its body being read: of a client without a good token, at too high a rate, or that
// says it is larger than max bytes.
func (g gate) before(max int, next http.Handler) http.Handler {
	answer := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var who fmt.Stringer = anonymous(r.RemoteAddr)
		err := g.n.settled()
		if err != nil {
		} else if g.open {
			err = g.n.auth.remote(r.RemoteAddr)
		} else if s, bad := g.n.auth.session(r.Header); bad != nil {
			err = bad
		} else {
			who, r = s, r.WithContext(context.WithValue(r.Context(), sessionKey{}, s))
			body := &countedBody{ReadCloser: r.Body, g: g, s: s}
			defer body.release()
			r.Body = body
		}
		if err == nil && r.ContentLength > int64(max) {
			err = refuse("tooLarge", "a request of %d bytes, at most %d", r.ContentLength, max)
		}
		if err != nil {
			_ = answer.Write(w, r, g.n.clientError("unread", who, err)) // who hung up isn't told
			return
		}
		next.ServeHTTP(w, r)
	})
}

// who names the client of a request that before has let in.
func (g gate) who(ctx context.Context, peer string) fmt.Stringer {
	if g.open {
		return anonymous(peer)
	}
	return sessionOf(ctx)
}

// WrapUnary implements connect.Interceptor.
func (g gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		began := time.Now()
		endpoint := procedure(req.Spec())
		resp, err := next(ctx, req)
		g.n.metrics.requests.WithLabelValues(endpoint).Observe(time.Since(began).Seconds())
		if err != nil {
			return nil, g.n.clientError(endpoint, g.who(ctx, req.Peer().Addr), err)
		}
		return resp, nil
	}
}

// WrapStreamingHandler implements connect.Interceptor.
func (g gate) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := next(ctx, conn); err != nil {
			return g.n.clientError(procedure(conn.Spec()), g.who(ctx, conn.Peer().Addr), err)
		}
		return nil
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (g gate) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// procedure is the method's name.
func procedure(s connect.Spec) string { return s.Procedure[strings.LastIndexByte(s.Procedure, '/')+1:] }
