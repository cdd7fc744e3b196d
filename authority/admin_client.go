package authority

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// AdminClient is the Service of a running node, through its admin socket.
type AdminClient struct {
	http http.Client

	mu     sync.Mutex
	domain string // once known; guarded by mu
}

var _ Service = (*AdminClient)(nil)

// maxAdminResponse bounds an answer: a list of all certificates.
const maxAdminResponse = 256 << 20

// DialAdmin returns the Service behind a node's admin socket. Nothing is dialled before the first call, whose error
// says if no node answers.
func DialAdmin(socket string) *AdminClient {
	return &AdminClient{http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}}
}

func (c *AdminClient) call(ctx context.Context, method string, req adminRequest) (*adminResponse, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("authority: %s: %w", method, err)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://admin"+adminPath+method, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("authority: %s: %w", method, err)
	}
	r.Header.Set("Content-Type", "application/json")
	answer, err := c.http.Do(r)
	if err != nil {
		return nil, fmt.Errorf("authority: %s: the node doesn't answer: %w", method, err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxAdminResponse))
	if err != nil {
		return nil, fmt.Errorf("authority: %s: read the node's answer: %w", method, err)
	}
	var resp adminResponse
	if err := json.Unmarshal(data, &resp); err != nil {
		return nil, fmt.Errorf("authority: %s: the node answered %s, which is no JSON: %w", method, answer.Status, err)
	}
	if resp.Error != "" {
		return nil, ErrorOfCode(resp.Code, resp.Error)
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("authority: %s: the node answered %s", method, answer.Status)
	}
	return &resp, nil
}

// Ping says whether a node answers.
func (c *AdminClient) Ping(ctx context.Context) error {
	resp, err := c.call(ctx, "domain", adminRequest{})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.domain = resp.Domain
	return nil
}

// Domain implements Service; it is empty if the node doesn't answer.
func (c *AdminClient) Domain() string {
	c.mu.Lock()
	domain := c.domain
	c.mu.Unlock()
	if domain == "" {
		if err := c.Ping(context.Background()); err != nil {
			return ""
		}
		c.mu.Lock()
		domain = c.domain
		c.mu.Unlock()
	}
	return domain
}

// Invite implements Service.
func (c *AdminClient) Invite(ctx context.Context, user mimi.URI, ttl time.Duration) (Invitation, error) {
	resp, err := c.call(ctx, "invite", adminRequest{User: user, TTL: ttl})
	if err != nil {
		return Invitation{}, err
	}
	if resp.Invitation == nil {
		return Invitation{}, fmt.Errorf("authority: invite: the node's answer has no invitation")
	}
	return *resp.Invitation, nil
}

// Enrol implements Service.
func (c *AdminClient) Enrol(ctx context.Context, token string, csr []byte) ([][]byte, error) {
	return chainOf(c.call(ctx, "enrol", adminRequest{Token: token, CSR: csr}))
}

// Issue implements Service.
func (c *AdminClient) Issue(ctx context.Context, csr []byte) ([][]byte, error) {
	return chainOf(c.call(ctx, "issue", adminRequest{CSR: csr}))
}

// Renew implements Service.
func (c *AdminClient) Renew(ctx context.Context, chain [][]byte, csr []byte) ([][]byte, error) {
	return chainOf(c.call(ctx, "renew", adminRequest{Chain: chain, CSR: csr}))
}

// Revoke implements Service.
func (c *AdminClient) Revoke(ctx context.Context, clientOrSerial string, reason string) (*Certificate, error) {
	resp, err := c.call(ctx, "revoke", adminRequest{Name: clientOrSerial, Reason: reason})
	if err != nil {
		return nil, err
	}
	if resp.Certificate == nil {
		return nil, fmt.Errorf("authority: revoke: the node's answer has no certificate")
	}
	return resp.Certificate, nil
}

// List implements Service.
func (c *AdminClient) List(ctx context.Context, f Filter) ([]Certificate, error) {
	resp, err := c.call(ctx, "list", adminRequest{Filter: &f})
	if err != nil {
		return nil, err
	}
	return resp.Certificates, nil
}

// Bundle implements Service.
func (c *AdminClient) Bundle(ctx context.Context) (*Bundle, error) {
	resp, err := c.call(ctx, "bundle", adminRequest{})
	if err != nil {
		return nil, err
	}
	return ParseBundle(resp.Bundle)
}

// IssueNode implements Service.
func (c *AdminClient) IssueNode(ctx context.Context, pub crypto.PublicKey) ([][]byte, error) {
	return c.issueFor(ctx, "issueNode", pub)
}

// IssueHub implements Service.
func (c *AdminClient) IssueHub(ctx context.Context, pub crypto.PublicKey) ([][]byte, error) {
	return c.issueFor(ctx, "issueHub", pub)
}

func (c *AdminClient) issueFor(ctx context.Context, method string, pub crypto.PublicKey) ([][]byte, error) {
	key, err := marshalPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("authority: %s: %w: %w", method, ErrKeyType, err)
	}
	return chainOf(c.call(ctx, method, adminRequest{Key: key}))
}

func chainOf(resp *adminResponse, err error) ([][]byte, error) {
	if err != nil {
		return nil, err
	}
	return resp.Chain, nil
}
