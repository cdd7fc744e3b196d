package transport

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/netutil"
)

// maxHeaderBytes bounds the header section of a request or response, in bytes.
const maxHeaderBytes = 64 << 10

// flushTime is how long Shutdown leaves the last answers on their way after the last handler has returned.
const flushTime = 200 * time.Millisecond

// Handle has h serve the connections that peers open under alpn, a protocol between nodes. h owns the connection,
// which is closed when it returns; ctx ends with the connection or with the Endpoint. Handle comes before Serve, and
// a protocol that nobody handles isn't negotiated.
func (e *Endpoint) Handle(alpn string, h func(ctx context.Context, c *Conn)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.serving || alpn == ALPNHTTP3 || e.handlers[alpn] != nil {
		panic("transport: Handle of " + alpn + " twice, after Serve, or of the clients' protocol")
	}
	e.handlers[alpn] = h
}

// HandleHTTP has h serve HTTP/3 under alpn, a protocol between nodes. PeerDomain says who asks. HandleHTTP comes
// before Serve.
func (e *Endpoint) HandleHTTP(alpn string, h http.Handler) {
	s := newHTTPServer(h)
	s.h3.ConnContext = func(ctx context.Context, c *quic.Conn) context.Context {
		if info, ok := c.Context().Value(handshakeKey{}).(*handshake); ok {
			ctx = WithPeerDomain(ctx, info.domain)
		}
		return ctx
	}
	e.Handle(alpn, func(_ context.Context, c *Conn) { s.serve(c.Conn) })
	e.servers = append(e.servers, s)
}

// httpServer is an HTTP/3 server that counts the requests in its handler.
type httpServer struct {
	h3       *http3.Server
	inFlight atomic.Int64
}

func newHTTPServer(h http.Handler) *httpServer {
	s := new(httpServer)
	s.h3 = &http3.Server{
		MaxHeaderBytes: maxHeaderBytes,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.inFlight.Add(1)
			defer s.inFlight.Add(-1)
			h.ServeHTTP(w, r)
		}),
	}
	return s
}

// serve returns when the connection or the server has ended, and sees to it that the connection has.
func (s *httpServer) serve(c *quic.Conn) {
	err := s.h3.ServeQUICConn(c)
	code := codeDone
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		code = quic.ApplicationErrorCode(http3.ErrCodeGeneralProtocolError)
	}
	_ = c.CloseWithError(code, "")
}

// shutdown ends the server gracefully: GOAWAY, then the running requests to their end, then time for the peers to take
// the answers in and leave.
func (s *httpServer) shutdown(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.h3.Shutdown(ctx) }()
	var flush <-chan time.Time
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		select {
		case err := <-done:
			if s.inFlight.Load() == 0 {
				err = nil // peers that hadn't left were only idle
			}
			return err
		case <-flush:
			cancel()
		case <-poll.C:
			if flush == nil && s.inFlight.Load() == 0 {
				flush = time.After(flushTime)
			}
		}
	}
}

func (e *Endpoint) mutualProtocols() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Keys(e.handlers))
}

// Serve accepts connections until ctx ends or Shutdown is called, and then returns nil. Connections that are being
// served go on until Shutdown.
func (e *Endpoint) Serve(ctx context.Context) error {
	e.mu.Lock()
	if e.closed || e.serving {
		e.mu.Unlock()
		return ErrClosed
	}
	e.serving = true
	e.mu.Unlock()

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(e.ctx, stop)()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	tcpErr := make(chan error, 1)
	if e.tcpHTTP != nil {
		wg.Go(func() {
			if err := e.tcpHTTP.ServeTLS(e.tcp, "", ""); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				tcpErr <- fmt.Errorf("accepting TCP connections: %w", err)
				stop()
			}
		})
		defer e.tcp.Close()
	}
	wg.Go(func() { e.recheckLoop(ctx) })
	for {
		c, err := e.ln.Accept(ctx)
		if err == nil {
			e.accepted(c)
			continue
		}
		if ctx.Err() != nil || errors.Is(err, quic.ErrServerClosed) || errors.Is(err, quic.ErrTransportClosed) {
			select {
			case err := <-tcpErr:
				return err
			default:
				return nil
			}
		}
		return fmt.Errorf("accepting QUIC connections: %w", err)
	}
}

// accepted hands a connection to its protocol, without blocking: quic-go queues no more than 32.
func (e *Endpoint) accepted(c *quic.Conn) {
	alpn := c.ConnectionState().TLS.NegotiatedProtocol
	if alpn == ALPNHTTP3 && e.clients != nil {
		address := c.RemoteAddr().String()
		if !e.byQUIC.enter(address, e.cfg.MaxAddressConnections) {
			e.crowded(c)
			return
		}
		select {
		case e.slots <- struct{}{}:
		default:
			e.byQUIC.leave(address)
			e.crowded(c)
			return
		}
		e.serve(c, func() { e.clients.serve(c) }, func() { <-e.slots; e.byQUIC.leave(address) })
		return
	}
	info, ok := c.Context().Value(handshakeKey{}).(*handshake)
	h := e.handlers[alpn]
	if h == nil || !ok || info.domain == "" {
		_ = c.CloseWithError(codeDone, "")
		return
	}
	if !e.admit(info.domain) {
		e.crowded(c)
		return
	}
	e.serve(c, func() {
		pc := &Conn{Conn: c, Domain: info.domain}
		if !e.track(pc) {
			return
		}
		ctx, cancel := context.WithCancel(c.Context())
		defer cancel()
		defer context.AfterFunc(e.ctx, cancel)()
		h(ctx, pc)
		_ = c.CloseWithError(codeDone, "")
	}, func() { e.release(info.domain) })
}

// serve has a connection served, for which Shutdown waits, and calls leave in the end. Once Shutdown is called it closes the
// connection instead.
func (e *Endpoint) serve(c *quic.Conn, serve, leave func()) {
	e.mu.Lock()
	closed := e.closed
	if !closed {
		e.active.Go(func() {
			defer leave()
			serve()
		})
	}
	e.mu.Unlock()
	if closed {
		_ = c.CloseWithError(codeShutdown, "shutting down")
		leave()
	}
}

// crowded refuses a connection.
func (e *Endpoint) crowded(c *quic.Conn) {
	e.cfg.OnBusy()
	_ = c.CloseWithError(codeBusy, "too many connections")
}

// admit counts a connection that a peer opened, and says whether the peer may have it. Clients, and other peers, can't
// use up what is there for one.
func (e *Endpoint) admit(domain string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.accepting[domain] >= e.cfg.MaxPeerConnections {
		return false
	}
	e.accepting[domain]++
	return true
}

func (e *Endpoint) release(domain string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.accepting[domain]--; e.accepting[domain] == 0 {
		delete(e.accepting, domain)
	}
}

// track remembers a connection with a peer until it ends, for Recheck and Shutdown. It closes the connection and
// returns false if the Endpoint is closed.
func (e *Endpoint) track(c *Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		_ = c.CloseWithError(codeShutdown, "shutting down")
		return false
	}
	e.conns[c] = struct{}{}
	context.AfterFunc(c.Context(), func() {
		e.mu.Lock()
		delete(e.conns, c)
		e.mu.Unlock()
	})
	return true
}

// Recheck verifies the peers of all live connections again and closes those that are no longer approved. Serve does
// so from time to time; whoever removes an approval or learns of a revocation calls it at once.
func (e *Endpoint) Recheck() {
	e.mu.Lock()
	conns := make([]*Conn, 0, len(e.conns))
	for c := range e.conns {
		conns = append(conns, c)
	}
	e.mu.Unlock()
	for _, c := range conns {
		chain := c.ConnectionState().TLS.PeerCertificates
		if domain, err := e.verify(chain); err != nil || domain != c.Domain {
			e.cfg.Log.Info("closing the connection of a peer that is no longer approved", "peer", c.Domain, "err", err)
			_ = c.CloseWithError(codeRevoked, "no longer approved")
		}
	}
}

func (e *Endpoint) recheckLoop(ctx context.Context) {
	t := time.NewTicker(e.cfg.RecheckInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			e.Recheck()
		}
	}
}

// serveClients prepares the servers of Config.Clients.
func (e *Endpoint) serveClients() {
	e.clients = newHTTPServer(e.cfg.Clients)
	e.servers = append(e.servers, e.clients)
	altSvc := fmt.Sprintf(`h3=":%d"; ma=3600`, e.Addr().Port)
	e.tcp = netutil.LimitListener(crowd{e.tcp, e}, e.cfg.MaxConnections)
	e.tcpHTTP = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Alt-Svc", altSvc)
			e.cfg.Clients.ServeHTTP(w, r)
		}),
		TLSConfig:         clientsTLS(e.certificate),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeaderBytes,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: int(min(e.cfg.MaxPeerStreams, 1<<20))},
		ErrorLog:          slog.NewLogLogger(e.cfg.Log.Handler(), slog.LevelDebug),
	}
}

// Shutdown stops accepting, lets running requests finish while ctx lasts, then ends every connection and frees the
// port. It returns ctx's error if requests had to be cut off.
func (e *Endpoint) Shutdown(ctx context.Context) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()

	_ = e.ln.Close()
	errs := make([]error, len(e.servers)+1)
	var wg sync.WaitGroup
	for i, s := range e.servers {
		wg.Go(func() { errs[i] = s.shutdown(ctx) })
	}
	if e.tcpHTTP != nil {
		wg.Go(func() {
			// Serve may have closed the listener before.
			if err := e.tcpHTTP.Shutdown(ctx); err != nil && !errors.Is(err, net.ErrClosed) {
				errs[len(e.servers)] = err
				_ = e.tcpHTTP.Close()
			}
		})
	}
	wg.Wait()
	e.cancel()
	e.mu.Lock()
	conns := make([]*Conn, 0, len(e.conns))
	for c := range e.conns {
		conns = append(conns, c)
	}
	e.mu.Unlock()
	for _, c := range conns {
		_ = c.CloseWithError(codeShutdown, "shutting down")
	}
	ended := make(chan struct{})
	go func() { e.active.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-ctx.Done():
		errs = append(errs, ctx.Err())
	}
	_ = e.h3.Close()
	_ = e.quic.Close()
	_ = e.tcp.Close()
	if err := e.udp.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
