package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/time/rate"

	"github.com/parley-mls/parley/transport/pace"
)

// wantedUDPBuffer is what one UDP socket needs for the traffic of many connections: 7.5 MB. Stock Linux grants 208 KiB.
const wantedUDPBuffer = 7_500_000

// Endpoint is a bound port. Its methods may be called from several goroutines, except that Handle and HandleHTTP
// come before Serve.
type Endpoint struct {
	cfg  Config
	udp  *net.UDPConn
	tcp  net.Listener
	quic *quic.Transport
	ln   *quic.Listener

	// Set before Serve, read afterwards.
	handlers map[string]func(ctx context.Context, c *Conn) // by mutual ALPN
	servers  []*httpServer                                 // every HTTP/3 server, the clients' included
	clients  *httpServer                                   // nil without Config.Clients
	tcpHTTP  *http.Server                                  // nil without Config.Clients

	ctx    context.Context // ends when handlers must give up
	cancel context.CancelFunc
	active sync.WaitGroup // accepted connections being served
	slots  chan struct{}  // one element per QUIC connection with a client
	byQUIC networks       // of those
	byTCP  networks

	refused pace.Limiter[string] // handshakes that VerifyPeer has refused, by Network

	mu        sync.Mutex
	serving   bool               // guarded by mu
	closed    bool               // guarded by mu
	conns     map[*Conn]struct{} // guarded by mu; live connections with peers, both ways
	accepting map[string]int     // guarded by mu; connections that peers opened, by domain
	peers     map[string]*peer   // guarded by mu; by domain
	h3        *http3.Transport   // makes the client side of HTTP/3 connections
}

// Listen binds the port. Connections are accepted once Serve is called; Dial works at once.
func Listen(cfg Config) (*Endpoint, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	udp, tcp, err := bind(cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("binding %s: %w", cfg.Address, err)
	}
	if read, write := growBuffers(udp); read < wantedUDPBuffer || write < wantedUDPBuffer {
		cfg.Log.Warn("udp buffers are small, packets may be lost under load; raise net.core.rmem_max and net.core.wmem_max",
			"read_bytes", read, "write_bytes", write, "wanted_bytes", wantedUDPBuffer)
	}
	e := &Endpoint{
		cfg:       cfg,
		udp:       udp,
		tcp:       tcp,
		handlers:  make(map[string]func(context.Context, *Conn)),
		slots:     make(chan struct{}, cfg.MaxConnections),
		conns:     make(map[*Conn]struct{}),
		accepting: make(map[string]int),
		peers:     make(map[string]*peer),
		h3:        &http3.Transport{DisableCompression: true, MaxResponseHeaderBytes: maxHeaderBytes},
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	resetKey, tokenKey := quic.StatelessResetKey(cfg.StatelessResetKey), quic.TokenGeneratorKey(cfg.TokenKey)
	limiter := rate.NewLimiter(rate.Limit(cfg.HandshakesPerSecond), 2*cfg.HandshakesPerSecond)
	e.quic = &quic.Transport{
		Conn:                udp,
		ConnectionIDLength:  8,
		StatelessResetKey:   &resetKey,
		TokenGeneratorKey:   &tokenKey,
		ConnContext:         e.begin,
		VerifySourceAddress: func(a net.Addr) bool { return !limiter.Allow() || e.refused.Owes(Network(a.String()), refusals) > 0 },
	}
	if e.ln, err = e.quic.Listen(e.serverTLS(), e.quicConfig()); err != nil {
		return nil, errors.Join(fmt.Errorf("listening for QUIC: %w", err), tcp.Close(), udp.Close())
	}
	if cfg.Clients != nil {
		e.serveClients()
	}
	return e, nil
}

// refusals is how many handshakes of an address may be refused. Beyond that it has to prove the address, and then gets no
// further than that: a refused handshake costs a few signatures.
var refusals = pace.Rate{PerSecond: 5, Burst: 100}

// begin gives a connection that comes in its context, or refuses it.
func (e *Endpoint) begin(ctx context.Context, c *quic.ClientInfo) (context.Context, error) {
	if c.AddrVerified && e.refused.Owes(Network(c.RemoteAddr.String()), refusals) > 0 {
		e.cfg.OnBusy()
		return nil, errors.New("transport: handshakes of this address were refused too often")
	}
	return context.WithValue(ctx, handshakeKey{}, new(handshake)), nil
}

// quicConfig is the configuration of accepted connections; those that are dialled add KeepAlivePeriod.
func (e *Endpoint) quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:       e.cfg.HandshakeTimeout,
		MaxIdleTimeout:             e.cfg.IdleTimeout,
		MaxStreamReceiveWindow:     4 << 20,
		MaxConnectionReceiveWindow: 8 << 20,
		MaxIncomingStreams:         e.cfg.MaxPeerStreams,
		MaxIncomingUniStreams:      e.cfg.MaxPeerStreams,
		EnableDatagrams:            true,
	}
}

// bind binds UDP and TCP at the same port. For port 0 the kernel's choice for UDP may be taken for TCP, hence the
// attempts.
func bind(address string) (*net.UDPConn, net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, nil, err
	}
	attempts := 1
	if port == "0" {
		attempts = 16
	}
	for range attempts {
		var addr *net.UDPAddr
		if addr, err = net.ResolveUDPAddr("udp", address); err != nil {
			return nil, nil, err
		}
		var udp *net.UDPConn
		if udp, err = net.ListenUDP("udp", addr); err != nil {
			return nil, nil, err
		}
		bound := strconv.Itoa(udp.LocalAddr().(*net.UDPAddr).Port)
		var tcp net.Listener
		if tcp, err = net.Listen("tcp", net.JoinHostPort(host, bound)); err == nil {
			return udp, tcp, nil
		}
		err = errors.Join(err, udp.Close())
	}
	return nil, nil, err
}

// Addr returns the bound UDP address. TCP has the same port.
func (e *Endpoint) Addr() *net.UDPAddr { return e.udp.LocalAddr().(*net.UDPAddr) }
