package transport

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// provider is a test CA with one node certificate.
type provider struct {
	domain string
	root   *x509.Certificate
	cert   tls.Certificate
}

func newProvider(t testing.TB, domain string) *provider {
	t.Helper()
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain + " root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, template, template, rootKey.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(rootDER)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{domain}, NotBefore: template.NotBefore, NotAfter: template.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return &provider{domain: domain, root: root, cert: tls.Certificate{Certificate: [][]byte{leafDER, rootDER}, PrivateKey: key}}
}

// approvals is a set of root fingerprints.
type approvals struct {
	mu    sync.Mutex
	roots map[[32]byte]bool
}

func approve(ps ...*provider) *approvals {
	a := &approvals{roots: make(map[[32]byte]bool)}
	for _, p := range ps {
		a.set(p, true)
	}
	return a
}

func (a *approvals) set(p *provider, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.roots[sha256.Sum256(p.root.Raw)] = ok
}

func (a *approvals) verify(chain []*x509.Certificate) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	root := chain[len(chain)-1]
	if !a.roots[sha256.Sum256(root.Raw)] {
		return "", errors.New("root not approved")
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return "", err
	}
	return chain[0].DNSNames[0], nil
}

// listen starts an endpoint on loopback. prepare may change the configuration, register adds handlers.
func listen(t testing.TB, p *provider, a *approvals, prepare func(*Config), register func(*Endpoint)) *Endpoint {
	t.Helper()
	cfg := Config{
		Address:           "127.0.0.1:0",
		Domain:            p.domain,
		Certificate:       func() (*tls.Certificate, error) { return &p.cert, nil },
		VerifyPeer:        a.verify,
		StatelessResetKey: sha256.Sum256([]byte("reset " + p.domain)),
		TokenKey:          sha256.Sum256([]byte("token " + p.domain)),
	}
	if prepare != nil {
		prepare(&cfg)
	}
	e, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if register != nil {
		register(e)
	}
	served := make(chan error, 1)
	go func() { served <- e.Serve(context.Background()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := e.Shutdown(ctx); err != nil {
			t.Errorf("shutting %s down: %v", p.domain, err)
		}
		if err := <-served; err != nil {
			t.Errorf("serving %s: %v", p.domain, err)
		}
	})
	return e
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// whoami answers with the peer's domain and the request's body.
var whoami = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	domain, ok := PeerDomain(r)
	fmt.Fprintf(w, "%s %t %s %s", domain, ok, r.Proto, body)
})

func post(ctx context.Context, rt http.RoundTripper, domain, body string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+domain+"/", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestHandlerLearnsPeerDomainFromCertificate(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	server := listen(t, alpha, approve(beta), nil, func(e *Endpoint) { e.HandleHTTP(ALPNFederation, whoami) })
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, server.Addr().String(), "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	got, err := post(ctx, rt, "alpha.example", "hello")
	if want := "beta.example true HTTP/3.0 hello"; err != nil || got != want {
		t.Fatalf("got %q, %v, want %q", got, err, want)
	}
}

func TestUnapprovedPeerIsRefusedAndReported(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	refused := make(chan []*x509.Certificate, 8)
	server := listen(t, alpha, approve(), func(c *Config) {
		c.OnRefused = func(_ net.Addr, chain []*x509.Certificate, err error) {
			if errors.Is(err, ErrRefused) {
				refused <- chain
			}
		}
	}, func(e *Endpoint) {
		e.HandleHTTP(ALPNFederation, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request came through") }))
	})
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, server.Addr().String(), "alpha.example")
	if err == nil {
		_, err = post(ctx, rt, "alpha.example", "hello")
	}
	if !errors.Is(err, ErrRefused) {
		t.Fatalf("the refused side sees %v, want ErrRefused", err)
	}
	select {
	case chain := <-refused:
		if !bytes.Equal(chain[len(chain)-1].Raw, beta.root.Raw) {
			t.Error("the observer got another chain")
		}
	case <-ctx.Done():
		t.Fatal("the refusal wasn't reported")
	}
}

func TestDialRefusesUnapprovedAndForeignServers(t *testing.T) {
	alpha, beta, gamma := newProvider(t, "alpha.example"), newProvider(t, "beta.example"), newProvider(t, "gamma.example")
	handle := func(e *Endpoint) { e.Handle(ALPNGossip, func(ctx context.Context, _ *Conn) { <-ctx.Done() }) }
	server := listen(t, alpha, approve(beta, gamma), nil, handle)
	ctx := testContext(t)
	unapproving := listen(t, beta, approve(gamma), nil, nil)
	if _, err := unapproving.Dial(ctx, server.Addr().String(), "alpha.example", ALPNGossip); !errors.Is(err, ErrRefused) {
		t.Errorf("dialling an unapproved node: %v, want ErrRefused", err)
	}
	// A node of gamma that answers to alpha's name has gamma's certificate, approved though it is.
	impostor := listen(t, gamma, approve(beta), func(c *Config) { c.Domain = "alpha.example" }, handle)
	approving := listen(t, beta, approve(alpha, gamma), nil, nil)
	if _, err := approving.Dial(ctx, impostor.Addr().String(), "alpha.example", ALPNGossip); !errors.Is(err, ErrRefused) {
		t.Errorf("dialling alpha and finding gamma: %v, want ErrRefused", err)
	}
	if c, err := approving.Dial(ctx, server.Addr().String(), "alpha.example", ALPNGossip); err != nil || c.Domain != "alpha.example" || !c.Dialed {
		t.Errorf("dialling alpha: %+v, %v", c, err)
	}
}

func TestPolicyFollowsALPN(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	server := listen(t, alpha, approve(beta), func(c *Config) { c.Clients = whoami }, func(e *Endpoint) { e.HandleHTTP(ALPNFederation, whoami) })
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	bare := func(change func(*tls.Config)) error {
		conf := &tls.Config{
			MinVersion: tls.VersionTLS13, ServerName: "alpha.example", NextProtos: []string{ALPNFederation}, InsecureSkipVerify: true,
			Certificates: []tls.Certificate{beta.cert},
		}
		change(conf)
		c, err := client.quic.Dial(ctx, server.Addr(), conf, nil)
		if err != nil {
			return err
		}
		defer c.CloseWithError(0, "")
		_, err = c.AcceptUniStream(ctx) // the server's control stream, or its refusal
		return err
	}
	for name, tt := range map[string]struct {
		change func(*tls.Config)
		ok     bool
	}{
		"federation with a certificate":       {func(*tls.Config) {}, true},
		"federation without a certificate":    {func(c *tls.Config) { c.Certificates = nil }, false},
		"federation under another name":       {func(c *tls.Config) { c.ServerName = "gamma.example" }, false},
		"a protocol that nobody handles":      {func(c *tls.Config) { c.NextProtos = []string{ALPNGossip} }, false},
		"an unknown protocol":                 {func(c *tls.Config) { c.NextProtos = []string{"smtp"} }, false},
		"clients without a certificate":       {func(c *tls.Config) { c.NextProtos = []string{ALPNHTTP3}; c.Certificates = nil }, true},
		"both, without a certificate":         {func(c *tls.Config) { c.NextProtos = []string{ALPNHTTP3, ALPNFederation}; c.Certificates = nil }, false},
		"an unhandled one beside the clients": {func(c *tls.Config) { c.NextProtos = []string{ALPNHTTP3, ALPNGossip}; c.Certificates = nil }, false},
	} {
		if err := bare(tt.change); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClientOverEachProtocol(t *testing.T) {
	alpha := newProvider(t, "alpha.example")
	server := listen(t, alpha, approve(), func(c *Config) { c.Clients = whoami }, nil)
	ctx := testContext(t)
	options := ClientOptions{
		Address: server.Addr().String(), Domain: "alpha.example",
		VerifyServer: func(chain []*x509.Certificate) error { _, err := approve(alpha).verify(chain); return err },
	}
	check := func(rt http.RoundTripper, want string) {
		t.Helper()
		if got, err := post(ctx, rt, "alpha.example", "x"); err != nil || got != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	rt, closer, err := ClientRoundTripper(options)
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	check(rt, " false HTTP/3.0 x")

	options.TCPOnly = true
	rt2, closer2, err := ClientRoundTripper(options)
	if err != nil {
		t.Fatal(err)
	}
	defer closer2.Close()
	check(rt2, " false HTTP/2.0 x")

	pool := x509.NewCertPool()
	pool.AddCert(alpha.root)
	old := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "alpha.example", NextProtos: []string{"http/1.1"}},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, server.Addr().String())
		},
	}
	defer old.CloseIdleConnections()
	check(old, " false HTTP/1.1 x")
}

func TestClientFallsBackToTCPAndRemembers(t *testing.T) {
	alpha := newProvider(t, "alpha.example")
	// TCP at a port where nothing answers UDP.
	udp, tcp, err := bind("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	srv := &http.Server{Handler: whoami, TLSConfig: clientsTLS(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &alpha.cert, nil })}
	go srv.ServeTLS(tcp, "", "")
	defer srv.Close()
	rt, closer, err := ClientRoundTripper(ClientOptions{
		Address: tcp.Addr().String(), Domain: "alpha.example", QUICBound: 300 * time.Millisecond,
		VerifyServer: func(chain []*x509.Certificate) error { _, err := approve(alpha).verify(chain); return err },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	ctx := testContext(t)
	for i := range 3 {
		start := time.Now()
		if got, err := post(ctx, rt, "alpha.example", "x"); err != nil || got != " false HTTP/2.0 x" {
			t.Fatalf("request %d: %q, %v", i, got, err)
		}
		if d := time.Since(start); i > 0 && d > 250*time.Millisecond {
			t.Errorf("request %d took %v: QUIC was tried again", i, d)
		}
	}
}

func TestClientRefusesServerOverEachProtocol(t *testing.T) {
	alpha := newProvider(t, "alpha.example")
	server := listen(t, alpha, approve(), func(c *Config) { c.Clients = whoami }, nil)
	for _, tcpOnly := range []bool{false, true} {
		rt, closer, err := ClientRoundTripper(ClientOptions{
			Address: server.Addr().String(), Domain: "alpha.example", TCPOnly: tcpOnly,
			VerifyServer: func([]*x509.Certificate) error { return errors.New("not my provider") },
		})
		if err != nil {
			t.Fatal(err)
		}
		defer closer.Close()
		if _, err := post(testContext(t), rt, "alpha.example", "secret"); !errors.Is(err, ErrRefused) {
			t.Errorf("tcp only %t: %v, want ErrRefused", tcpOnly, err)
		}
	}
}

// restartable starts a node that can be killed and started again at its address, with the same keys.
func restartable(t *testing.T, p, peer *provider) (address string, kill, start func()) {
	var e *Endpoint
	start = func() {
		var err error
		e, err = Listen(Config{
			Address: cmp.Or(address, "127.0.0.1:0"), Domain: p.domain, VerifyPeer: approve(peer).verify,
			Certificate:       func() (*tls.Certificate, error) { return &p.cert, nil },
			StatelessResetKey: sha256.Sum256([]byte("reset")), TokenKey: sha256.Sum256([]byte("token")),
		})
		if err != nil {
			t.Fatal(err)
		}
		address = e.Addr().String()
		e.HandleHTTP(ALPNFederation, whoami)
		go e.Serve(context.Background())
	}
	// A killed process says nothing: the socket goes first.
	kill = func() {
		e.udp.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		e.Shutdown(ctx)
	}
	start()
	t.Cleanup(func() { kill() })
	return address, kill, start
}

func TestRequestReachesRestartedNode(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	address, kill, start := restartable(t, alpha, beta)
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, address, "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := post(ctx, rt, "alpha.example", "before"); err != nil {
		t.Fatal(err)
	}
	kill()
	start()
	begin := time.Now()
	got, err := post(ctx, rt, "alpha.example", "after")
	if want := "beta.example true HTTP/3.0 after"; err != nil || got != want {
		t.Fatalf("got %q, %v, want %q", got, err, want)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("the restart was noticed after %v", d)
	}
}

func TestPokeWakesRequestsThatWaitForARestartedNode(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	address, kill, start := restartable(t, alpha, beta)
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, address, "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := post(ctx, rt, "alpha.example", "before"); err != nil {
		t.Fatal(err)
	}
	client.Poke("alpha.example")
	client.Poke("gamma.example")
	if _, err := post(ctx, rt, "alpha.example", "poked"); err != nil {
		t.Fatalf("poking a healthy connection: %v", err)
	}
	kill()
	answer := make(chan error, 1)
	go func() { _, err := post(ctx, rt, "alpha.example", "meanwhile"); answer <- err }()
	time.Sleep(1500 * time.Millisecond) // until retransmissions have become rare
	start()
	client.Poke("alpha.example")
	begin := time.Now()
	if err := <-answer; err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 500*time.Millisecond {
		t.Errorf("answered %v after the poke", d)
	}
}

func TestChangedAddressDropsTheOldConnection(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	var mu sync.Mutex
	hits := map[string]int{}
	count := func(name string) func(*Endpoint) {
		return func(e *Endpoint) {
			e.HandleHTTP(ALPNFederation, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { mu.Lock(); hits[name]++; mu.Unlock() }))
		}
	}
	first := listen(t, alpha, approve(beta), nil, count("first"))
	second := listen(t, alpha, approve(beta), nil, count("second"))
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	for _, e := range []*Endpoint{first, second, second} {
		rt, err := client.RoundTripper(ctx, e.Addr().String(), "alpha.example")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := post(ctx, rt, "alpha.example", ""); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "one connection left", func() bool {
		client.mu.Lock()
		defer client.mu.Unlock()
		return len(client.conns) == 1
	})
	mu.Lock()
	defer mu.Unlock()
	if hits["first"] != 1 || hits["second"] != 2 {
		t.Errorf("requests went to %v", hits)
	}
}

// within polls for what has no event.
func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestRecheckClosesConnectionsOfRemovedPeers(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	trust := approve(beta)
	server := listen(t, alpha, trust, nil, func(e *Endpoint) {
		e.Handle(ALPNGossip, func(ctx context.Context, _ *Conn) { <-ctx.Done() })
	})
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	c, err := client.Dial(ctx, server.Addr().String(), "alpha.example", ALPNGossip)
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the connection accepted", func() bool { server.mu.Lock(); defer server.mu.Unlock(); return len(server.conns) == 1 })
	server.Recheck()
	if c.Context().Err() != nil {
		t.Fatal("an approved peer was cut off")
	}
	trust.set(beta, false)
	server.Recheck()
	select {
	case <-c.Context().Done():
		if err := explain(context.Cause(c.Context())); !errors.Is(err, ErrRefused) {
			t.Errorf("closed with %v, want ErrRefused", err)
		}
	case <-ctx.Done():
		t.Fatal("the connection of a removed peer goes on")
	}
}

func TestShutdownLetsRunningRequestsFinish(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	started, release := make(chan struct{}, 2), make(chan struct{})
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		started <- struct{}{}
		<-release
		io.WriteString(w, "done")
	})
	server := listen(t, alpha, approve(beta), func(c *Config) { c.Clients = slow }, func(e *Endpoint) { e.HandleHTTP(ALPNFederation, slow) })
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, server.Addr().String(), "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	user, closer, err := ClientRoundTripper(ClientOptions{Address: server.Addr().String(), Domain: "alpha.example", VerifyServer: func([]*x509.Certificate) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	type answer struct {
		body string
		err  error
	}
	answers := make(chan answer, 2)
	for _, rt := range []http.RoundTripper{rt, user} {
		go func() { b, err := post(ctx, rt, "alpha.example", ""); answers <- answer{b, err} }()
		<-started
	}
	down := make(chan error, 1)
	go func() { down <- server.Shutdown(ctx) }()
	within(t, "the shutdown under way", func() bool { server.mu.Lock(); defer server.mu.Unlock(); return server.closed })
	close(release)
	for range 2 {
		if a := <-answers; a.err != nil || a.body != "done" {
			t.Errorf("a running request ended with %q, %v", a.body, a.err)
		}
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
}

func TestManyStreamsPastTheQUICDefault(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	const n = 300 // quic-go's own limit is 100, and the next request would wait silently
	var arrived sync.WaitGroup
	arrived.Add(n)
	server := listen(t, alpha, approve(beta), nil, func(e *Endpoint) {
		e.HandleHTTP(ALPNFederation, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			arrived.Done()
			arrived.Wait()
		}))
	})
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, server.Addr().String(), "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, n)
	for range n {
		go func() { _, err := post(ctx, rt, "alpha.example", ""); errs <- err }()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

func TestBlockedHandlersDontBlockAccepting(t *testing.T) {
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	const n = 80 // quic-go's accept queue holds 32
	var arrived sync.WaitGroup
	arrived.Add(n)
	server := listen(t, alpha, approve(beta), func(c *Config) { c.HandshakesPerSecond = 5 }, func(e *Endpoint) {
		e.Handle(ALPNGossip, func(context.Context, *Conn) { arrived.Done(); arrived.Wait() })
	})
	client := listen(t, beta, approve(alpha), nil, nil)
	ctx := testContext(t)
	for range n { // most of them come with a Retry first
		if _, err := client.Dial(ctx, server.Addr().String(), "alpha.example", ALPNGossip); err != nil {
			t.Fatal(err)
		}
	}
	arrived.Wait()
}

func TestAPeerTakesNoConnectionsFromOthers(t *testing.T) {
	alpha, beta, gamma := newProvider(t, "alpha.example"), newProvider(t, "beta.example"), newProvider(t, "gamma.example")
	server := listen(t, alpha, approve(beta, gamma), func(c *Config) {
		c.MaxConnections, c.MaxPeerConnections, c.Clients = 1, 2, whoami
	}, func(e *Endpoint) {
		e.Handle(ALPNGossip, func(ctx context.Context, c *Conn) { <-ctx.Done() })
	})
	address := server.Addr().String()
	ctx := testContext(t)
	open := func(domain string) int {
		server.mu.Lock()
		defer server.mu.Unlock()
		return server.accepting[domain]
	}

	// A client that holds the only place of clients.
	tlsConfig := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPNHTTP3}, ServerName: alpha.domain}
	client, err := quic.DialAddr(ctx, address, tlsConfig, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseWithError(0, "")
	within(t, "the client accepted", func() bool { return len(server.slots) == 1 })

	hostile := listen(t, beta, approve(alpha), nil, nil)
	var conns []*Conn
	for range 3 {
		c, err := hostile.Dial(ctx, address, alpha.domain, ALPNGossip)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		within(t, "the connection accepted or not", func() bool { return open(beta.domain) == min(len(conns), 2) })
	}
	select {
	case <-conns[2].Context().Done():
	case <-ctx.Done():
		t.Fatal("the third connection is kept")
	}
	if conns[0].Context().Err() != nil || conns[1].Context().Err() != nil {
		t.Error("an earlier connection was ended")
	}
	other := listen(t, gamma, approve(alpha), nil, nil)
	if _, err := other.Dial(ctx, address, alpha.domain, ALPNGossip); err != nil {
		t.Fatal(err)
	}
	within(t, "another peer accepted", func() bool { return open(gamma.domain) == 1 })

	conns[0].CloseWithError(0, "")
	within(t, "a free place", func() bool { return open(beta.domain) == 1 })
	c, err := hostile.Dial(ctx, address, alpha.domain, ALPNGossip)
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the place taken", func() bool { return open(beta.domain) == 2 })
	if c.Context().Err() != nil {
		t.Error("the free place wasn't given")
	}
}

func TestClosedClientEndsItsStreams(t *testing.T) {
	alpha := newProvider(t, "alpha.example")
	server := listen(t, alpha, approve(), func(c *Config) {
		c.Clients = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		})
	}, nil)
	for _, tcpOnly := range []bool{false, true} {
		rt, closer, err := ClientRoundTripper(ClientOptions{
			Address: server.Addr().String(), Domain: "alpha.example", TCPOnly: tcpOnly, VerifyServer: func([]*x509.Certificate) error { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(testContext(t), http.MethodGet, "https://alpha.example/", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := rt.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		closer.Close()
		if _, err := io.ReadAll(resp.Body); err == nil || req.Context().Err() != nil {
			t.Errorf("tcp only %t: the stream ended with %v, context %v", tcpOnly, err, req.Context().Err())
		}
		resp.Body.Close()
		if _, err := post(testContext(t), rt, "alpha.example", ""); err == nil {
			t.Errorf("tcp only %t: a closed client sends requests", tcpOnly)
		}
	}
}

func BenchmarkHandshake(b *testing.B) {
	alpha, beta := newProvider(b, "alpha.example"), newProvider(b, "beta.example")
	server := listen(b, alpha, approve(beta), nil, func(e *Endpoint) { e.Handle(ALPNGossip, func(ctx context.Context, _ *Conn) { <-ctx.Done() }) })
	client := listen(b, beta, approve(alpha), nil, nil)
	for b.Loop() {
		c, err := client.Dial(context.Background(), server.Addr().String(), "alpha.example", ALPNGossip)
		if err != nil {
			b.Fatal(err)
		}
		c.CloseWithError(0, "")
	}
}

func BenchmarkPost1KiB(b *testing.B) {
	alpha, beta := newProvider(b, "alpha.example"), newProvider(b, "beta.example")
	server := listen(b, alpha, approve(beta), nil, func(e *Endpoint) {
		e.HandleHTTP(ALPNFederation, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) }))
	})
	client := listen(b, beta, approve(alpha), nil, nil)
	rt, err := client.RoundTripper(context.Background(), server.Addr().String(), "alpha.example")
	if err != nil {
		b.Fatal(err)
	}
	body := strings.Repeat("x", 1024)
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := post(context.Background(), rt, "alpha.example", body); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
