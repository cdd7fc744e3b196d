package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// The defaults of ClientOptions.
const (
	DefaultQUICBound       = 2 * time.Second
	DefaultQUICRetry       = 5 * time.Minute
	DefaultClientKeepAlive = 5 * time.Second
)

// ClientOptions says how a client reaches its provider's node. Address, Domain and VerifyServer are required.
type ClientOptions struct {
	Address string // host:port of the node, the same for UDP and TCP
	Domain  string // the provider's domain, named in the TLS server name

	// VerifyServer is the whole check of the node's certificate; the chain is never empty.
	VerifyServer func(chain []*x509.Certificate) error

	TCPOnly   bool          // never try QUIC
	QUICBound time.Duration // how long QUIC may take to connect before TCP is used (2 s)
	QUICRetry time.Duration // how long TCP is then used before QUIC is tried again (5 min)
	KeepAlive time.Duration // how often a connection is probed, and so how soon a restarted node is noticed (5 s)
}

// ClientRoundTripper returns what carries a client's requests to its node, whatever host their URLs name: HTTP/3 if
// QUIC connects, else HTTP/2 over TCP. The Closer ends all connections.
func ClientRoundTripper(o ClientOptions) (http.RoundTripper, io.Closer, error) {
	if _, _, err := net.SplitHostPort(o.Address); err != nil {
		return nil, nil, fmt.Errorf("address of the node: %w", err)
	}
	if o.Domain == "" || o.VerifyServer == nil {
		return nil, nil, errors.New("transport: client without Domain or VerifyServer")
	}
	setDefault(&o.QUICBound, DefaultQUICBound)
	setDefault(&o.QUICRetry, DefaultQUICRetry)
	setDefault(&o.KeepAlive, DefaultClientKeepAlive)
	c := &client{o: o, tcpConns: make(map[*tcpConn]struct{})}
	c.tcp = &http.Transport{
		DialContext:         c.dialTCP,
		TLSClientConfig:     c.tls("h2", "http/1.1"),
		ForceAttemptHTTP2:   true,
		TLSHandshakeTimeout: 10 * time.Second,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: o.KeepAlive, PingTimeout: 2 * o.KeepAlive},
	}
	c.quic.endpoint = c
	return c, c, nil
}

// client chooses between QUIC and TCP.
type client struct {
	o    ClientOptions
	tcp  *http.Transport
	quic clientQUIC

	mu       sync.Mutex
	tcpUntil time.Time             // guarded by mu; QUIC isn't tried before
	tcpConns map[*tcpConn]struct{} // guarded by mu; nil once closed
}

// tcpConn is a TCP connection that Close can end, busy or not.
type tcpConn struct {
	net.Conn
	client *client
}

// Close implements net.Conn.
func (t *tcpConn) Close() error {
	t.client.mu.Lock()
	delete(t.client.tcpConns, t)
	t.client.mu.Unlock()
	return t.Conn.Close()
}

func (c *client) dialTCP(ctx context.Context, network, _ string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, c.o.Address)
	if err != nil {
		return nil, err
	}
	t := &tcpConn{Conn: conn, client: c}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tcpConns == nil {
		return nil, errors.Join(ErrClosed, conn.Close())
	}
	c.tcpConns[t] = struct{}{}
	return t, nil
}

func (c *client) tls(protos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         c.o.Domain,
		NextProtos:         protos,
		InsecureSkipVerify: true, // VerifyServer is the check: the provider's roots aren't the system's
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 || len(cs.PeerCertificates) > maxChain {
				return fmt.Errorf("%w: a chain of %d certificates", ErrRefused, len(cs.PeerCertificates))
			}
			if err := c.o.VerifyServer(cs.PeerCertificates); err != nil {
				return fmt.Errorf("%w: %w", ErrRefused, err)
			}
			return nil
		},
	}
}

// RoundTrip implements http.RoundTripper.
func (c *client) RoundTrip(req *http.Request) (*http.Response, error) {
	c.mu.Lock()
	useTCP := c.o.TCPOnly || time.Now().Before(c.tcpUntil)
	c.mu.Unlock()
	if useTCP {
		return c.tcp.RoundTrip(req)
	}
	for {
		conn, fresh, err := c.quic.connection(req.Context())
		if err != nil {
			if req.Context().Err() != nil || errors.Is(err, ErrRefused) || errors.Is(err, ErrClosed) {
				closeBody(req)
				return nil, err
			}
			return c.overTCP(req, err)
		}
		resp, err := conn.RoundTrip(req)
		if err == nil {
			return resp, nil
		}
		again, ok := rewind(req)
		if fresh || !ok || !goneAway(err) || req.Context().Err() != nil {
			return nil, fmt.Errorf("request to %s: %w", c.o.Domain, err)
		}
		c.quic.forget(conn)
		req = again
	}
}

// overTCP sends a request that QUIC couldn't carry because of quicErr, and remembers if TCP could.
func (c *client) overTCP(req *http.Request, quicErr error) (*http.Response, error) {
	resp, err := c.tcp.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w; without QUIC: %w", c.o.Domain, quicErr, err)
	}
	c.mu.Lock()
	c.tcpUntil = time.Now().Add(c.o.QUICRetry)
	c.mu.Unlock()
	return resp, nil
}

// Close implements io.Closer.
func (c *client) Close() error {
	c.mu.Lock()
	conns := slices.Collect(maps.Keys(c.tcpConns))
	c.tcpConns = nil
	c.mu.Unlock()
	for _, t := range conns {
		_ = t.Conn.Close()
	}
	c.tcp.CloseIdleConnections()
	return c.quic.close()
}

// clientQUIC is the client's one QUIC connection and the socket under it.
type clientQUIC struct {
	endpoint *client

	mu      sync.Mutex
	h3      *http3.Transport  // guarded by mu
	udp     *quic.Transport   // guarded by mu; made at the first dial
	conn    *http3.ClientConn // guarded by mu
	dialing *dialing          // guarded by mu
	closed  bool              // guarded by mu
}

func (q *clientQUIC) connection(ctx context.Context) (c *http3.ClientConn, fresh bool, err error) {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return nil, false, ErrClosed
	}
	if q.conn != nil && q.conn.Context().Err() == nil {
		defer q.mu.Unlock()
		return q.conn, false, nil
	}
	d := q.dialing
	if d == nil {
		d = &dialing{done: make(chan struct{})}
		q.dialing = d
		go q.dial(d)
	}
	q.mu.Unlock()
	select {
	case <-d.done:
		return d.conn, true, d.err
	case <-ctx.Done():
		return nil, false, fmt.Errorf("connecting to %s: %w", q.endpoint.o.Domain, ctx.Err())
	}
}

func (q *clientQUIC) dial(d *dialing) {
	ctx, cancel := context.WithTimeout(context.Background(), q.endpoint.o.QUICBound)
	defer cancel()
	c, err := q.connect(ctx)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dialing = nil
	if err == nil && q.closed {
		_ = c.CloseWithError(codeDone, "")
		err = ErrClosed
	}
	if d.err = err; err == nil {
		d.conn = q.h3.NewClientConn(c)
		q.conn = d.conn
	}
	close(d.done)
}

func (q *clientQUIC) connect(ctx context.Context) (*quic.Conn, error) {
	udp, err := q.socket()
	if err != nil {
		return nil, err
	}
	o := q.endpoint.o
	addr, err := resolveOne(ctx, o.Address)
	if err != nil {
		return nil, err
	}
	conf := &quic.Config{
		HandshakeIdleTimeout: o.QUICBound,
		MaxIdleTimeout:       max(DefaultIdleTimeout, 2*o.KeepAlive),
		KeepAlivePeriod:      o.KeepAlive,
		EnableDatagrams:      true,
	}
	var refusal error // written during the handshake, read after it
	tlsConf := q.endpoint.tls(ALPNHTTP3)
	verify := tlsConf.VerifyConnection
	tlsConf.VerifyConnection = func(cs tls.ConnectionState) error {
		refusal = verify(cs)
		return refusal
	}
	c, err := udp.Dial(ctx, addr, tlsConf, conf)
	if err != nil && ctx.Err() == nil && refusal != nil {
		err = refusal
	}
	if err == nil {
		go probe(c, o.KeepAlive, func() bool { return true }) // also when the client only listens
	}
	return c, err
}

func (q *clientQUIC) socket() (*quic.Transport, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, ErrClosed
	}
	if q.udp == nil {
		udp, err := net.ListenUDP("udp", nil)
		if err != nil {
			return nil, fmt.Errorf("opening a UDP socket: %w", err)
		}
		q.udp = &quic.Transport{Conn: udp}
		q.h3 = &http3.Transport{DisableCompression: true}
	}
	return q.udp, nil
}

func (q *clientQUIC) forget(c *http3.ClientConn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.conn == c {
		q.conn = nil
	}
}

func (q *clientQUIC) close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	if q.udp == nil {
		return nil
	}
	if q.conn != nil {
		_ = q.conn.CloseWithError(codeDone, "")
	}
	_ = q.udp.Close()
	return q.udp.Conn.Close()
}

func resolveOne(ctx context.Context, address string) (*net.UDPAddr, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	return net.ResolveUDPAddr("udp", net.JoinHostPort(ips[0].Unmap().String(), port))
}
