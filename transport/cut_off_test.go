package transport

import (
	"net"
	"strings"
	"testing"
	"time"
)

// By itself QUIC asks again after an interruption has lasted about as long again.
func TestARequestGoesOnSoonAfterAnInterruption(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for seconds")
	}
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	server := listen(t, alpha, approve(beta), nil, func(e *Endpoint) { e.HandleHTTP(ALPNFederation, whoami) })
	client := listen(t, beta, approve(alpha), nil, nil)
	w := newWire(t, server.Addr())
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, w.front.LocalAddr().String(), "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := post(ctx, rt, "alpha.example", "before"); err != nil {
		t.Fatal(err)
	}
	w.cut.Store(true)
	answer := make(chan error, 1)
	go func() { _, err := post(ctx, rt, "alpha.example", "meanwhile"); answer <- err }()
	time.Sleep(4700 * time.Millisecond)
	w.cut.Store(false)
	began := time.Now()
	if err := <-answer; err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 1500*time.Millisecond {
		t.Errorf("the request went on %v after the interruption", d)
	}
}

// A node that ends may have taken a connection whose handshake it hasn't confirmed. Requests fill it at once, so that
// nothing more is sent on it.
func TestAConnectionWhoseHandshakeIsntConfirmedIsGivenUp(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for seconds")
	}
	alpha, beta := newProvider(t, "alpha.example"), newProvider(t, "beta.example")
	address, kill, start := restartable(t, alpha, beta)
	client := listen(t, beta, approve(alpha), nil, nil)
	server, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	w := newWire(t, server)
	w.hello.Store(true)
	ctx := testContext(t)
	rt, err := client.RoundTripper(ctx, w.front.LocalAddr().String(), "alpha.example")
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	began := time.Now()
	go func() {
		_, err := post(ctx, rt, "alpha.example", strings.Repeat("x", 1<<18))
		answer <- err
	}()
	within(t, "the connection is nearly full", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.held >= 16
	})
	kill()
	start()
	w.hello.Store(false)
	if err := <-answer; err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("the request was answered after %v", d)
	}
}
