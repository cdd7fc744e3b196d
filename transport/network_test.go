package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/quic-go/quic-go"
)

func TestAddressesOfOneNetworkShareALimit(t *testing.T) {
	for _, c := range []struct{ a, b string }{
		{"192.0.2.1:1", "192.0.2.1:2"},
		{"192.0.2.1:1", "[::ffff:192.0.2.1]:1"},
		{"[2001:db8:1:2::3]:1", "[2001:db8:1:2:ffff::9]:1"},
		{"[fe80::1%eth0]:1", "[fe80::2%eth1]:1"},
	} {
		if Network(c.a) != Network(c.b) {
			t.Errorf("%s and %s are %s and %s", c.a, c.b, Network(c.a), Network(c.b))
		}
	}
	if Network("192.0.2.1:1") == Network("192.0.2.2:1") || Network("[2001:db8:1:2::3]:1") == Network("[2001:db8:1:3::3]:1") {
		t.Error("two networks share a limit")
	}
}

// wire stands between a client and the server's port, and counts what the server sends. Each client has a socket of its
// own towards the server.
type wire struct {
	t      *testing.T
	front  *net.UDPConn
	server *net.UDPAddr
	cut    atomic.Bool // nothing passes
	hello  atomic.Bool // of the clients' nothing passes once the server has answered

	mu      sync.Mutex
	back    map[string]*net.UDPConn // by client
	retries int                     // Retry packets of the server
	answers int                     // bytes of the server
	held    int                     // packets of clients with keys of a connection that is up, which hello has held back
}

func newWire(t *testing.T, server *net.UDPAddr) *wire {
	front, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{t: t, front: front, server: server, back: make(map[string]*net.UDPConn)}
	var group sync.WaitGroup
	group.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := front.ReadFromUDP(b)
			if err != nil {
				return
			}
			w.mu.Lock()
			c := w.back[from.String()]
			if c == nil {
				if c, err = net.DialUDP("udp", nil, server); err != nil {
					t.Error(err)
					w.mu.Unlock()
					return
				}
				w.back[from.String()] = c
				group.Go(func() { w.answer(c, from) })
			}
			hold := w.hello.Load() && w.answers > 0
			if hold && b[0]&0x80 == 0 { // a short header (RFC 9000, Section 17.3)
				w.held++
			}
			w.mu.Unlock()
			if !w.cut.Load() && !hold {
				_, _ = c.Write(b[:n])
			}
		}
	})
	t.Cleanup(func() {
		front.Close()
		w.mu.Lock()
		for _, c := range w.back {
			c.Close()
		}
		w.mu.Unlock()
		group.Wait()
	})
	return w
}

func (w *wire) answer(c *net.UDPConn, to *net.UDPAddr) {
	b := make([]byte, 1500)
	for {
		n, err := c.Read(b)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // the server's port is closed
		}
		w.mu.Lock()
		w.answers += n
		if b[0]&0xf0 == 0xf0 { // a long header of the type Retry (RFC 9000, Section 17.2.5)
			w.retries++
		}
		w.mu.Unlock()
		if !w.cut.Load() {
			_, _ = w.front.WriteToUDP(b[:n], to)
		}
	}
}

func (w *wire) seen() (retries, answers int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.retries, w.answers
}

// TestAddressesAreProvedUnderLoad: past so many handshakes a second, a connection begins with a Retry, and whoever doesn't
// answer it gets nothing else.
func TestAddressesAreProvedUnderLoad(t *testing.T) {
	alpha := newProvider(t, "alpha.example")
	server := listen(t, alpha, approve(), func(c *Config) { c.Clients, c.HandshakesPerSecond = whoami, 1 }, nil)
	w := newWire(t, server.Addr())
	ctx := testContext(t)
	tlsConfig := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPNHTTP3}, ServerName: alpha.domain}
	dial := func() {
		t.Helper()
		c, err := quic.DialAddr(ctx, w.front.LocalAddr().String(), tlsConfig, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.CloseWithError(0, "") })
	}
	dial()
	if retries, _ := w.seen(); retries != 0 {
		t.Errorf("%d Retries without load", retries)
	}
	for range 10 {
		dial() // the client answers the Retry, and is let in
	}
	retries, _ := w.seen()
	if retries < 5 {
		t.Errorf("%d Retries among ten handshakes at once", retries)
	}

	// Forged addresses: first packets whose senders never hear the answer.
	silent := newWire(t, server.Addr())
	within(t, "the clients accepted", func() bool { return len(server.slots) == 11 })
	const forged = 30
	sent := 0
	for range forged {
		sent += forge(t, silent.front.LocalAddr().(*net.UDPAddr), tlsConfig)
	}
	within(t, "a Retry for nearly each packet", func() bool { retries, _ := silent.seen(); return retries >= forged*2/3 })
	if _, answers := silent.seen(); answers > sent {
		t.Errorf("%d bytes were answered to %d", answers, sent)
	}
	if n := len(server.slots); n != 11 {
		t.Errorf("%d connections after it, 11 before", n)
	}
}

// forge sends the first packet of a QUIC connection, and returns its size.
func forge(t *testing.T, to *net.UDPAddr, tlsConfig *tls.Config) int {
	t.Helper()
	sniffed, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer sniffed.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var dialling sync.WaitGroup
	dialling.Go(func() { _, _ = quic.DialAddr(ctx, sniffed.LocalAddr().String(), tlsConfig, nil) })
	b := make([]byte, 1500)
	n, err := sniffed.Read(b)
	cancel()
	dialling.Wait()
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.Write(b[:n]); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestAnUnapprovedPeerGetsAHandshakeAndNothingElse knocks under every protocol between nodes, with all that it could send
// early, and again and again.
func TestAnUnapprovedPeerGetsAHandshakeAndNothingElse(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	var refused, crowded atomic.Int64
	server := listen(t, alpha, approve(), func(c *Config) {
		c.Clients = whoami
		c.HandshakesPerSecond = 10_000
		c.OnRefused = func(net.Addr, []*x509.Certificate, error) { refused.Add(1) }
		c.OnBusy = func() { crowded.Add(1) }
	}, func(e *Endpoint) {
		e.HandleHTTP(ALPNFederation, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request came through") }))
		e.Handle(ALPNGossip, func(context.Context, *Conn) { t.Error("a connection came through") })
	})
	w := newWire(t, server.Addr())
	knock := func(alpn string) error {
		c, err := quic.DialAddr(testContext(t), w.front.LocalAddr().String(), &tls.Config{
			InsecureSkipVerify: true, NextProtos: []string{alpn}, ServerName: alpha.domain, Certificates: []tls.Certificate{beta.cert},
		}, &quic.Config{EnableDatagrams: true})
		if err != nil {
			return err
		}
		// TLS 1.3: this end is done before the other one has judged it.
		_ = c.SendDatagram([]byte("hello"))
		if s, err := c.OpenStream(); err == nil {
			_, _ = s.Write(make([]byte, 1000))
			_, err := io.ReadAll(s)
			if err == nil {
				t.Error("the stream was answered")
			}
		}
		<-c.Context().Done()
		return context.Cause(c.Context())
	}
	for _, alpn := range []string{ALPNFederation, ALPNGossip} {
		_, before := w.seen()
		if err := knock(alpn); !remoteRefusal(err) {
			t.Errorf("%s ends with %v", alpn, err)
		}
		if _, after := w.seen(); after-before > 10_000 {
			t.Errorf("%s: the refused peer got %d bytes", alpn, after-before)
		}
	}
	server.mu.Lock()
	if len(server.conns)+len(server.accepting)+len(server.peers) != 0 {
		t.Errorf("the server keeps %d connections, counts %v, %d peers", len(server.conns), server.accepting, len(server.peers))
	}
	server.mu.Unlock()

	// It may do that so often; then its address isn't let as far as the check.
	if refused.Load() != 2 {
		t.Errorf("%d refusals, want 2", refused.Load())
	}
	server.refused.Charge(Network("127.0.0.1:1"), 100*refusals.Burst, refusals)
	if err := knock(ALPNFederation); err == nil || remoteRefusal(err) {
		t.Errorf("after too many: %v", err)
	}
	if refused.Load() != 2 || crowded.Load() == 0 {
		t.Errorf("%d refusals, %d connections that were turned away", refused.Load(), crowded.Load())
	}
	if retries, _ := w.seen(); retries == 0 {
		t.Error("the address wasn't proved")
	}
}

func TestOneAddressDoesNotTakeAllConnections(t *testing.T) {
	alpha := newProvider(t, "alpha.example")
	var crowded atomic.Int64
	server := listen(t, alpha, approve(), func(c *Config) {
		c.Clients, c.MaxAddressConnections = whoami, 2
		c.OnBusy = func() { crowded.Add(1) }
	}, nil)
	ctx := testContext(t)
	address := server.Addr().String()
	quicConn := func() *quic.Conn {
		t.Helper()
		c, err := quic.DialAddr(ctx, address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPNHTTP3}, ServerName: alpha.domain}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	open := func(n *networks) int {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.open["127.0.0.1"]
	}
	first := quicConn()
	second := quicConn()
	defer second.CloseWithError(0, "")
	within(t, "two connections", func() bool { return open(&server.byQUIC) == 2 })
	third := quicConn()
	select {
	case <-third.Context().Done():
	case <-ctx.Done():
		t.Fatal("the third QUIC connection is kept")
	}
	first.CloseWithError(0, "")
	within(t, "a free place", func() bool { return open(&server.byQUIC) == 1 })
	fourth := quicConn()
	defer fourth.CloseWithError(0, "")
	within(t, "the place taken", func() bool { return open(&server.byQUIC) == 2 })

	tcpConn := func() (net.Conn, error) { return net.Dial("tcp", address) }
	var conns []net.Conn
	for range 2 {
		c, err := tcpConn()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	within(t, "two TCP connections", func() bool { return open(&server.byTCP) == 2 })
	c, err := tcpConn()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the third TCP connection is kept")
	}
	conns[0].Close()
	within(t, "a free TCP place", func() bool { return open(&server.byTCP) == 1 })
	if crowded.Load() != 2 {
		t.Errorf("%d connections were reported as too many, want 2", crowded.Load())
	}
}
