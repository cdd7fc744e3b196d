package federation

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// directoryLifetime is how long a peer's directory document is used before it is asked for again.
const directoryLifetime = time.Hour

// Client asks peers. Its methods are safe for concurrent use. They fail with an *Error if the peer refused, and with an
// error that Unavailable recognises if there was no answer; an answer that doesn't decode is neither.
type Client struct {
	domain string
	rt     func(ctx context.Context, peer string) (http.RoundTripper, error)

	// OnHead, if not nil, gets the content of the HeadField in a hub's answer about a room, before the answer is returned; an
	// error takes the answer's place. It is set before the Client is used.
	OnHead func(peer string, room mimi.URI, head []byte) error

	mu          sync.Mutex
	directories map[string]cachedDirectory // by peer; guarded by mu
}

type cachedDirectory struct {
	doc   *mimi.Directory
	until time.Time
}

// NewClient returns a Client that speaks for domain. rt gives what carries requests to a peer, and to nobody else,
// whatever host their URLs name.
func NewClient(domain string, rt func(ctx context.Context, peer string) (http.RoundTripper, error)) *Client {
	return &Client{domain: domain, rt: rt, directories: make(map[string]cachedDirectory)}
}

// exchange is one request to a peer.
type exchange struct {
	method      string
	url         string
	contentType string
	body        []byte
	seqs        string
	part        string // a field Range
	head        []byte
	want        int   // status of success
	max         int64 // bytes of the answer
}

// send sends a request and returns the answer, which the caller closes, if its status is that of success.
func (c *Client) send(ctx context.Context, peer string, x exchange) (*http.Response, error) {
	rt, err := c.rt(ctx, peer)
	if err != nil {
		return nil, &noAnswer{fmt.Errorf("reach %s: %w", peer, err)}
	}
	req, err := http.NewRequestWithContext(ctx, x.method, x.url, bytes.NewReader(x.body))
	if err != nil {
		return nil, fmt.Errorf("federation: request to %s: %w", peer, err)
	}
	req.Host = peer
	req.Header.Set("From", "mimi@"+c.domain)
	if x.contentType != "" {
		req.Header.Set("Content-Type", x.contentType)
	}
	if x.seqs != "" {
		req.Header.Set(SeqField, x.seqs)
	}
	if x.part != "" {
		req.Header.Set("Range", x.part)
	}
	if len(x.head) > 0 {
		req.Header.Set(HeadField, formatHead(x.head))
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, &noAnswer{fmt.Errorf("ask %s: %w", peer, err)}
	}
	if resp.StatusCode != x.want {
		defer resp.Body.Close()
		if resp.StatusCode >= 400 {
			return nil, readError(resp)
		}
		return nil, fmt.Errorf("federation: %s answers with status %d, want %d", peer, resp.StatusCode, x.want)
	}
	return resp, nil
}

// do sends a request and returns the answer's body and header.
func (c *Client) do(ctx context.Context, peer string, x exchange) ([]byte, http.Header, error) {
	resp, err := c.send(ctx, peer, x)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, x.max+1))
	if err != nil {
		return nil, nil, &noAnswer{fmt.Errorf("answer of %s: %w", peer, err)}
	}
	if int64(len(body)) > x.max {
		return nil, nil, fmt.Errorf("federation: %s answers with more than %d bytes", peer, x.max)
	}
	return body, resp.Header, nil
}

// directory returns a peer's directory document, and whether it was asked for just now.
func (c *Client) directory(ctx context.Context, peer string) (doc *mimi.Directory, fresh bool, err error) {
	c.mu.Lock()
	d, ok := c.directories[peer]
	c.mu.Unlock()
	if ok && time.Now().Before(d.until) {
		return d.doc, false, nil
	}
	body, _, err := c.do(ctx, peer, exchange{
		method: http.MethodGet, url: "https://" + peer + mimi.DirectoryPath, want: http.StatusOK, max: mimi.MaxDirectory,
	})
	if err != nil {
		return nil, false, err
	}
	if doc, err = mimi.ParseDirectory(peer, body); err != nil {
		return nil, false, err
	}
	c.mu.Lock()
	c.directories[peer] = cachedDirectory{doc, time.Now().Add(directoryLifetime)}
	c.mu.Unlock()
	return doc, true, nil
}

// post sends a body to an endpoint of a peer's directory.
func (c *Client) post(ctx context.Context, peer string, template func(*mimi.Directory) string, value string, x exchange) (body []byte, header http.Header, err error) {
	x.method, x.contentType, x.want = http.MethodPost, contentType, cmp.Or(x.want, http.StatusOK)
	err = c.locate(ctx, peer, template, value, func(url string) (err error) {
		x.url = url
		body, header, err = c.do(ctx, peer, x)
		return err
	})
	return body, header, err
}

// locate calls ask with the address of an endpoint of a peer's directory. If it leads nowhere the directory is asked for
// again, and a new address tried.
func (c *Client) locate(ctx context.Context, peer string, template func(*mimi.Directory) string, value string, ask func(url string) error) error {
	d, fresh, err := c.directory(ctx, peer)
	if err != nil {
		return err
	}
	for {
		url, err := mimi.Expand(template(d), value)
		if err != nil {
			return fmt.Errorf("%s: %w", peer, err)
		}
		err = ask(url)
		e, refused := errors.AsType[*Error](err)
		if fresh || !refused || e.Status != http.StatusNotFound && e.Status != http.StatusMethodNotAllowed && e.Status != http.StatusGone {
			return err
		}
		c.mu.Lock()
		delete(c.directories, peer)
		c.mu.Unlock()
		old := template(d)
		if d, fresh, err = c.directory(ctx, peer); err != nil {
			return err
		}
		if template(d) == old {
			return e
		}
	}
}

// seqOf reads the number that a hub gave to what was sent; 0 if it gave none.
func seqOf(peer string, header http.Header) (uint64, error) {
	v := header.Get(SeqField)
	if v == "" {
		return 0, nil
	}
	seq, err := parseSeq(v)
	if err != nil {
		return 0, fmt.Errorf("federation: %s in the answer of %s: %w", SeqField, peer, err)
	}
	return seq, nil
}

// sawHead passes a hub's head on. One that can't be read is as good as none.
func (c *Client) sawHead(peer string, room mimi.URI, header http.Header) error {
	if c.OnHead == nil {
		return nil
	}
	if b, err := parseHead(header); err == nil && b != nil {
		return c.OnHead(peer, room, b)
	}
	return nil
}

// decodeAnswer reads the body of an answer.
func decodeAnswer(peer string, body []byte, v codec.Unmarshaler) error {
	if err := codec.Unmarshal(body, v); err != nil {
		return fmt.Errorf("federation: answer of %s: %w", peer, err)
	}
	return nil
}

// KeyMaterial claims KeyPackages at a peer, the hub of req.Room or the provider of req.TargetUser.
func (c *Client) KeyMaterial(ctx context.Context, peer string, req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	body, _, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.KeyMaterial }, string(req.TargetUser),
		exchange{body: codec.Marshal(req), max: MaxKeyMaterialResponse})
	if err != nil {
		return nil, err
	}
	resp := new(mimi.KeyMaterialResponse)
	if err := decodeAnswer(peer, body, resp); err != nil {
		return nil, err
	}
	if resp.User != req.TargetUser {
		return nil, fmt.Errorf("federation: %s was asked for key material of %s and answers for %s", peer, req.TargetUser, resp.User)
	}
	return resp, nil
}

// Update sends a mimi.UpdateRequest to the hub of a room. seq is the number of the handshake in the room's log, 0 if
// the hub gave none.
func (c *Client) Update(ctx context.Context, peer string, room mimi.URI, body []byte) (*mimi.UpdateRoomResponse, uint64, error) {
	b, header, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.Update }, string(room), exchange{body: body, max: maxAnswer})
	if err != nil {
		return nil, 0, err
	}
	resp := new(mimi.UpdateRoomResponse)
	if err := decodeAnswer(peer, b, resp); err != nil {
		return nil, 0, err
	}
	if err := c.sawHead(peer, room, header); err != nil {
		return nil, 0, err
	}
	seq, err := seqOf(peer, header)
	return resp, seq, err
}

// SubmitMessage sends a mimi.SubmitMessageRequest to the hub of a room. seq is as in Update.
func (c *Client) SubmitMessage(ctx context.Context, peer string, room mimi.URI, body []byte) (*mimi.SubmitMessageResponse, uint64, error) {
	b, header, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.SubmitMessage }, string(room), exchange{body: body, max: maxAnswer})
	if err != nil {
		return nil, 0, err
	}
	resp := new(mimi.SubmitMessageResponse)
	if err := decodeAnswer(peer, b, resp); err != nil {
		return nil, 0, err
	}
	if err := c.sawHead(peer, room, header); err != nil {
		return nil, 0, err
	}
	seq, err := seqOf(peer, header)
	return resp, seq, err
}

// Notify sends entries of a room's log, in their order, to a peer that takes part. The peer has them durably when it
// returns nil. There are at most MaxNotifyMessages.
func (c *Client) Notify(ctx context.Context, peer string, room mimi.URI, msgs []Sequenced) error {
	var body []byte
	for _, m := range msgs {
		body = append(body, m.Fanout...)
	}
	_, _, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.Notify }, string(room),
		exchange{body: body, seqs: formatSeqs(msgs), head: msgs[len(msgs)-1].Head, want: http.StatusCreated, max: maxAnswer})
	return err
}

// GroupInfo asks the hub of a room for what an external commit needs.
func (c *Client) GroupInfo(ctx context.Context, peer string, room mimi.URI, req *mimi.GroupInfoRequest) (*mimi.GroupInfoResponse, error) {
	body, header, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.GroupInfo }, string(room),
		exchange{body: codec.Marshal(req), max: MaxGroupInfoResponse})
	if err != nil {
		return nil, err
	}
	resp := new(mimi.GroupInfoResponse)
	if err := decodeAnswer(peer, body, resp); err != nil {
		return nil, err
	}
	if resp.Room != room {
		return nil, fmt.Errorf("federation: %s was asked about %s and answers about %s", peer, room, resp.Room)
	}
	return resp, c.sawHead(peer, room, header)
}

// IdentifierQuery asks a peer for users of its own.
func (c *Client) IdentifierQuery(ctx context.Context, peer string, req *mimi.IdentifierRequest) (*mimi.IdentifierResponse, error) {
	body, _, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.IdentifierQuery }, peer,
		exchange{body: codec.Marshal(req), max: MaxIdentifierResponse})
	if err != nil {
		return nil, err
	}
	resp := new(mimi.IdentifierResponse)
	if err := decodeAnswer(peer, body, resp); err != nil {
		return nil, err
	}
	for _, u := range resp.URIs {
		if u.Domain() != peer {
			return nil, fmt.Errorf("federation: %s answers with %s", peer, u)
		}
	}
	for _, p := range resp.Profiles {
		if !slices.Contains(resp.URIs, p.User) {
			return nil, fmt.Errorf("federation: %s answers with a profile of %s, who isn't among those found", peer, p.User)
		}
	}
	return resp, nil
}

// Ephemeral sends a message that isn't kept: to the hub of a room, or from it to a peer that takes part.
func (c *Client) Ephemeral(ctx context.Context, peer string, room mimi.URI, body []byte) error {
	_, _, err := c.do(ctx, peer, exchange{
		method: http.MethodPost, url: "https://" + peer + EphemeralPath + url.PathEscape(string(room)), contentType: contentType, body: body,
		want: http.StatusNoContent, max: maxAnswer,
	})
	return err
}

// ReportAbuse sends a mimi.AbuseReport to the hub of a room. The hub has it durably when it returns nil.
func (c *Client) ReportAbuse(ctx context.Context, peer string, room mimi.URI, body []byte) error {
	_, _, err := c.post(ctx, peer, func(d *mimi.Directory) string { return d.ReportAbuse }, string(room), exchange{body: body, max: maxAnswer})
	return err
}

// Consent tells a peer what a user of the own domain asks of one of the peer's, takes back, grants or revokes. The peer
// has it when it returns nil, and may have chosen to ignore it.
func (c *Client) Consent(ctx context.Context, peer string, entry *mimi.ConsentEntry) error {
	template, to := func(d *mimi.Directory) string { return d.RequestConsent }, entry.Scope.Target
	if entry.Operation == mimi.ConsentGrant || entry.Operation == mimi.ConsentRevoke {
		template, to = func(d *mimi.Directory) string { return d.UpdateConsent }, entry.Scope.Requester
	}
	_, _, err := c.post(ctx, peer, template, string(to), exchange{body: codec.Marshal(entry), want: http.StatusCreated, max: maxAnswer})
	return err
}

// HubSender returns the key and credential with which a peer signs heads of rooms of a suite.
func (c *Client) HubSender(ctx context.Context, peer string, suite mls.CipherSuite) (*mls.ExternalSender, error) {
	body, _, err := c.do(ctx, peer, exchange{
		method: http.MethodGet, url: "https://" + peer + HubPath + strconv.Itoa(int(suite)), want: http.StatusOK, max: maxAnswer,
	})
	if err != nil {
		return nil, err
	}
	s := new(mls.ExternalSender)
	return s, decodeAnswer(peer, body, s)
}

// FetchBundle returns a peer's trust bundle, JSON of at most MaxBundle bytes.
func (c *Client) FetchBundle(ctx context.Context, peer string) ([]byte, error) {
	body, _, err := c.do(ctx, peer, exchange{method: http.MethodGet, url: "https://" + peer + BundlePath, want: http.StatusOK, max: MaxBundle})
	return body, err
}

// PushBundle sends the own trust bundle to a peer.
func (c *Client) PushBundle(ctx context.Context, peer string, bundle []byte) error {
	_, _, err := c.do(ctx, peer, exchange{
		method: http.MethodPost, url: "https://" + peer + BundlePath, contentType: "application/json", body: bundle,
		want: http.StatusNoContent, max: maxAnswer,
	})
	return err
}
