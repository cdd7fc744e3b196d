package client

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/api/apiconnect"
	"github.com/parley-mls/parley/transport"
)

// maxResponse bounds what the node may send in one message: a room's ratchet tree with many members, and room.
const maxResponse = 64 << 20

// keepAlive is how often an idle connection is probed, and so how soon a restarted node is noticed.
const keepAlive = 2 * time.Second

// session is the client's connection to its node: the transport, and the token that proves who the client is.
type session struct {
	c         *Client
	domain    string
	closer    io.Closer
	enrolment apiconnect.EnrolmentServiceClient
	service   apiconnect.ClientServiceClient

	auth chan struct{} // taken while authenticating, so that it is done once

	mu      sync.Mutex
	token   string    // guarded by mu
	expires time.Time // guarded by mu
}

func newSession(c *Client, p profile) (*session, error) {
	rt, closer, err := transport.ClientRoundTripper(transport.ClientOptions{
		Address: p.Address, Domain: p.Domain, TCPOnly: c.o.TCPOnly, KeepAlive: keepAlive,
		VerifyServer: func(chain []*x509.Certificate) error { return c.trust.verifyNode(chain) },
	})
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	h := &http.Client{Transport: rt}
	base := "https://" + p.Domain
	options := []connect.ClientOption{
		connect.WithReadMaxBytes(maxResponse),
		connect.WithAcceptCompression("gzip", nil, nil), // what travels is ciphertext
		connect.WithInterceptors(new(backoff)),
	}
	return &session{
		c: c, domain: p.Domain, closer: closer, auth: make(chan struct{}, 1),
		enrolment: apiconnect.NewEnrolmentServiceClient(h, base, options...),
		service:   apiconnect.NewClientServiceClient(h, base, options...),
	}, nil
}

func (s *session) close() error { return s.closer.Close() }

// open1 calls a method that needs no token.
func open1[Req, Res any](ctx context.Context, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), msg *Req) (*Res, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	res, err := f(ctx, connect.NewRequest(msg))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// call calls a method of the ClientService; a token that the node doesn't know any more is replaced once.
func call[Req, Res any](ctx context.Context, s *session, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), msg *Req) (*Res, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	for attempt := 0; ; attempt++ {
		token, err := s.authenticate(ctx)
		if err != nil {
			return nil, err
		}
		req := connect.NewRequest(msg)
		req.Header().Set("Authorization", "Bearer "+token)
		res, err := f(ctx, req)
		if err == nil {
			return res.Msg, nil
		}
		if attempt > 0 || connect.CodeOf(err) != connect.CodeUnauthenticated || Code(err) == "revoked" {
			return nil, err
		}
		s.forget(token)
	}
}

// subscribe opens the stream of events. It ends with ctx.
func (s *session) subscribe(ctx context.Context, msg *api.SubscribeRequest) (*connect.ServerStreamForClient[api.SubscribeResponse], error) {
	token, err := s.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	req := connect.NewRequest(msg)
	req.Header().Set("Authorization", "Bearer "+token)
	stream, err := s.service.Subscribe(ctx, req)
	if connect.CodeOf(err) == connect.CodeUnauthenticated {
		s.forget(token)
	}
	return stream, err
}

func (s *session) forget(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token == token {
		s.token = ""
	}
}

// valid returns the token, empty if there is none that is still good.
func (s *session) valid() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c.o.Time().Before(s.expires) {
		return s.token
	}
	return ""
}

// authenticate returns a token; if there is no valid one, it proves possession of the credential's key first.
func (s *session) authenticate(ctx context.Context) (string, error) {
	if token := s.valid(); token != "" {
		return token, nil
	}
	select {
	case s.auth <- struct{}{}:
		defer func() { <-s.auth }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if token := s.valid(); token != "" {
		return token, nil
	}
	ch, err := s.enrolment.Challenge(ctx, connect.NewRequest(&api.ChallengeRequest{}))
	if err != nil {
		return "", err
	}
	if n := len(ch.Msg.Nonce); n < 16 || n > 256 {
		return "", fmt.Errorf("client: the node's challenge has %d bytes", n)
	}
	c := s.c
	c.mu.Lock()
	p := c.profile
	c.mu.Unlock()
	sig, err := p.Suite.SignWithLabel(c.o.Rand, c.signer, "ParleyAuthenticate", slices.Concat(ch.Msg.Nonce, []byte(s.domain)))
	if err != nil {
		return "", fmt.Errorf("client: sign the node's challenge: %w", err)
	}
	res, err := s.enrolment.Authenticate(ctx, connect.NewRequest(&api.AuthenticateRequest{
		Nonce: ch.Msg.Nonce, Chain: p.Chain, CipherSuite: uint32(p.Suite), Signature: sig,
	}))
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = res.Msg.Token
	s.expires = time.Unix(res.Msg.ExpiresUnix, 0).Add(-time.Minute)
	return s.token, nil
}
