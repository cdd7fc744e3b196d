package transport

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// RoundTripper returns what carries HTTP/3 requests to the node of domain at address. All callers share one
// connection per domain, which is made again after a loss; asking with another address drops the old connection. The
// error says why there is no connection now.
//
// A request that reached a node which had restarted in the meantime (it answers with a stateless reset), or one that
// was going away, is sent once more if its body can be had again (http.Request.GetBody), whatever its method: requests
// between nodes may be repeated.
func (e *Endpoint) RoundTripper(ctx context.Context, address, domain string) (http.RoundTripper, error) {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil, ErrClosed
	}
	p := e.peers[domain]
	if p == nil || p.address != address {
		if p != nil {
			p.drop()
		}
		p = &peer{endpoint: e, address: address, domain: domain}
		e.peers[domain] = p
	}
	e.mu.Unlock()
	if _, _, err := p.connection(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// peer is the shared HTTP/3 connection to one address of one domain.
type peer struct {
	endpoint        *Endpoint
	address, domain string

	mu      sync.Mutex
	conn    *http3.ClientConn // guarded by mu; nil before the first connection
	quic    *quic.Conn        // guarded by mu; under conn
	dialing *dialing          // guarded by mu; nil unless a dial is under way
	dropped bool              // guarded by mu; another address has replaced this one

	waiting atomic.Int64 // requests without an answer
}

// dialing is a dial that all who want the connection wait for.
type dialing struct {
	done chan struct{}
	conn *http3.ClientConn // set before done is closed
	err  error
}

// connection returns a live connection, and whether it was made for this call.
func (p *peer) connection(ctx context.Context) (c *http3.ClientConn, fresh bool, err error) {
	p.mu.Lock()
	if p.conn != nil && p.conn.Context().Err() == nil {
		defer p.mu.Unlock()
		return p.conn, false, nil
	}
	d := p.dialing
	if d == nil {
		d = &dialing{done: make(chan struct{})}
		p.dialing = d
		go p.dial(d)
	}
	p.mu.Unlock()
	select {
	case <-d.done:
		return d.conn, true, d.err
	case <-ctx.Done():
		return nil, false, fmt.Errorf("connecting to %s: %w", p.domain, ctx.Err())
	}
}

// dial is bounded by the Endpoint's life and the handshake time-outs, not by the context of the first who asked.
func (p *peer) dial(d *dialing) {
	c, err := p.endpoint.Dial(p.endpoint.ctx, p.address, p.domain, ALPNFederation)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialing = nil
	if d.err = err; err == nil {
		d.conn = p.endpoint.h3.NewClientConn(c.Conn)
		p.conn, p.quic = d.conn, c.Conn
		go probe(c.Conn, probeEvery, func() bool { return p.waiting.Load() > 0 })
		if p.dropped {
			_ = c.CloseWithError(codeDone, "")
		}
	}
	close(d.done)
}

// Poke sends a packet on the shared connection with domain, if there is one. A healthy connection takes no notice. If
// the peer has restarted since, it answers with a stateless reset, and requests that have been waiting are sent again
// at once, instead of at the next retransmission, whose intervals double. Whoever learns that a peer is back calls it.
func (e *Endpoint) Poke(domain string) {
	e.mu.Lock()
	p := e.peers[domain]
	e.mu.Unlock()
	if p == nil {
		return
	}
	p.mu.Lock()
	c := p.quic
	p.mu.Unlock()
	if c != nil {
		go poke(c)
	}
}

// probeEvery is how soon requests that wait go on when a peer that was cut off can be reached again.
const probeEvery = time.Second

const maxUnanswered = 3

// probe pokes a connection from time to time until it ends, whenever wanted is true. An answer to it has everything sent
// again at once that was lost before. And it may be that nothing else would be answered with a stateless reset: the packets
// that keep a QUIC connection alive are too small.
//
// A connection with a process that has ended before it confirmed the handshake (RFC 9001, Section 4.1.2) has neither: what
// is lost isn't sent again before, and the packets of the handshake are answered with no reset. If nothing has come on it
// after maxUnanswered pokes it is given up.
func probe(c *quic.Conn, every time.Duration, wanted func() bool) {
	t := time.NewTicker(every)
	defer t.Stop()
	handshake := c.ConnectionStats().PacketsReceived
	confirmed, unanswered := false, 0
	for {
		select {
		case <-t.C:
			if !wanted() {
				continue
			}
			confirmed = confirmed || c.ConnectionStats().PacketsReceived > handshake
			if unanswered++; !confirmed && unanswered > maxUnanswered {
				_ = c.CloseWithError(codeUnconfirmed, "")
				return
			}
			poke(c)
		case <-c.Context().Done():
			return
		}
	}
}

// poke sends a packet that is large enough to be answered with a stateless reset if the peer doesn't know the connection
// any more (RFC 9000, Section 10.3.3). HTTP/3 ignores datagrams unless both sides have said otherwise (RFC 9297). Sending
// waits if many are queued.
func poke(c *quic.Conn) { _ = c.SendDatagram(make([]byte, 64)) }

// drop closes the connection; requests that hold the peer still dial again.
func (p *peer) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropped = true
	if p.conn != nil {
		_ = p.conn.CloseWithError(codeDone, "")
	}
}

// RoundTrip implements http.RoundTripper.
func (p *peer) RoundTrip(req *http.Request) (*http.Response, error) {
	p.waiting.Add(1)
	defer p.waiting.Add(-1)
	for {
		c, fresh, err := p.connection(req.Context())
		if err != nil {
			closeBody(req)
			return nil, err
		}
		resp, err := c.RoundTrip(req)
		if err == nil {
			return resp, nil
		}
		if fresh || !goneAway(err) || req.Context().Err() != nil {
			return nil, fmt.Errorf("request to %s: %w", p.domain, explain(err))
		}
		again, ok := rewind(req)
		if !ok {
			return nil, fmt.Errorf("request to %s: %w", p.domain, explain(err))
		}
		p.forget(c)
		req = again
	}
}

// forget makes sure that c isn't used again.
func (p *peer) forget(c *http3.ClientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == c {
		p.conn = nil
	}
}

// unusable is how http3 begins the error of a request that it hasn't sent because the connection takes no more, above all
// after GOAWAY. It exports no error for that.
const unusable = "http3: conn unusable: "

// goneAway says whether a request failed because the process at the other end of its connection has ended or is
// ending. The connection may still carry requests that were there before.
func goneAway(err error) bool {
	if strings.HasPrefix(err.Error(), unusable) {
		return true
	}
	if _, ok := errors.AsType[*quic.StatelessResetError](err); ok {
		return true
	}
	if ae, ok := errors.AsType[*quic.ApplicationError](err); ok {
		return ae.Remote && (ae.ErrorCode == codeShutdown || ae.ErrorCode == codeDone) || !ae.Remote && ae.ErrorCode == codeUnconfirmed
	}
	he, ok := errors.AsType[*http3.Error](err)
	return ok && he.Remote && (he.ErrorCode == http3.ErrCodeRequestRejected || he.ErrorCode == http3.ErrCodeNoError)
}

// rewind returns a copy of req with its body at the start, if that can be had.
func rewind(req *http.Request) (*http.Request, bool) {
	if req.Body == nil || req.Body == http.NoBody {
		return req.Clone(req.Context()), true
	}
	if req.GetBody == nil {
		return nil, false
	}
	body, err := req.GetBody()
	if err != nil {
		return nil, false
	}
	again := req.Clone(req.Context())
	again.Body = body
	return again, true
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}
