// Package transport is the one network port of a node: QUIC on UDP, and TLS over TCP at the same port number for
// clients that have no QUIC.
//
// Protocols are told apart by ALPN (RFC 7301). Under the protocols between nodes, ALPNFederation and ALPNGossip, both
// sides present the certificate of their provider and check the other's with Config.VerifyPeer; under "h3", "h2" and
// "http/1.1" clients are served, without client certificates. A peer that isn't approved costs a handshake and
// nothing else. TLS is 1.3 throughout.
//
// Start with Listen; Endpoint.HandleHTTP and Endpoint.RoundTripper carry HTTP/3 between nodes, Endpoint.Handle and
// Endpoint.Dial bare QUIC connections, and ClientRoundTripper is the clients' side.
package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/quic-go/quic-go"
)

// The protocols that an Endpoint tells apart (ALPN protocol names).
const (
	ALPNFederation = "mimi-h3/1"       // MIMI over HTTP/3 between nodes, mutual TLS
	ALPNGossip     = "parley-gossip/1" // membership between nodes, mutual TLS
	ALPNHTTP3      = "h3"              // clients over QUIC (RFC 9114)
)

// The defaults of Config.
const (
	DefaultMaxPeerStreams        = 1024
	DefaultMaxConnections        = 16384
	DefaultMaxAddressConnections = 4096
	DefaultMaxPeerConnections    = 128
	DefaultHandshakesPerSecond   = 100
	DefaultKeepAlive             = 10 * time.Second
	DefaultIdleTimeout           = 30 * time.Second
	DefaultHandshakeTimeout      = 5 * time.Second
	DefaultRecheckInterval       = 10 * time.Minute
)

// ErrRefused is wrapped by the errors of connections that a certificate check ended, be it ours or the peer's: trying
// again helps only after somebody has approved somebody.
var ErrRefused = errors.New("peer not approved")

// ErrClosed is returned by an Endpoint that has been shut down.
var ErrClosed = errors.New("endpoint closed")

// Config configures an Endpoint. Address, Domain, Certificate and VerifyPeer are required.
type Config struct {
	// Address is the host:port to bind, for UDP and TCP alike. Port 0 finds a port that is free for both.
	Address string

	// Domain is the own provider domain. Peers name it in the TLS server name; a handshake between nodes that names
	// another one is refused.
	Domain string

	// Certificate returns the node's certificate, with its chain including the root, by whose fingerprint peers
	// approve. It is called for every handshake, so that a renewed certificate takes effect at once.
	Certificate func() (*tls.Certificate, error)

	// VerifyPeer decides whether the chain (leaf first, never empty) belongs to an approved node, and says of which
	// domain. It is the whole check, and it is called for every handshake in both directions and, on live
	// connections, by Recheck.
	VerifyPeer func(chain []*x509.Certificate) (domain string, err error)

	// OnRefused is told of each peer that asked in and was refused by VerifyPeer, for the operator. The chain is what
	// the peer showed; it hasn't proved yet that it has the key. OnRefused must not block, and bounds what it does by
	// itself: anybody can knock.
	OnRefused func(addr net.Addr, chain []*x509.Certificate, err error)

	// OnBusy is told of each connection that isn't served since there are too many, or since handshakes from its address
	// were refused too often. It must not block.
	OnBusy func()

	// StatelessResetKey lets peers notice a restart at their next packet instead of at the idle time-out (RFC 9000,
	// Section 10.3), and TokenKey keeps address validation tokens valid; both must survive restarts and stay secret.
	StatelessResetKey, TokenKey [32]byte

	// Clients serves the clients' requests. Nil refuses clients.
	Clients http.Handler

	// Log receives warnings about the port; nil discards them.
	Log *slog.Logger

	MaxPeerStreams        int64 // concurrent streams a connection's other end may open each way; long ones count (1024)
	MaxConnections        int   // clients' connections accepted at a time, for QUIC and TCP each (16384)
	MaxAddressConnections int   // of those, from one Network (4096)

	MaxPeerConnections  int           // connections accepted at a time from one peer; clients take nothing from them (128)
	HandshakesPerSecond int           // beyond these, whoever connects by QUIC must first prove the address with a Retry (100)
	KeepAlive           time.Duration // how often an idle connection to a peer is kept alive by its dialler (10 s)
	IdleTimeout         time.Duration // silence after which a connection counts as lost (30 s)
	HandshakeTimeout    time.Duration // silence after which a dialled address counts as unreachable (5 s)
	RecheckInterval     time.Duration // how often the peers of live connections are verified again (10 min)
}

func (c *Config) setDefaults() error {
	switch {
	case c.Address == "":
		return errors.New("transport: no address")
	case c.Domain == "":
		return errors.New("transport: no domain")
	case c.Certificate == nil:
		return errors.New("transport: no certificate")
	case c.VerifyPeer == nil:
		return errors.New("transport: no VerifyPeer")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.OnBusy == nil {
		c.OnBusy = func() {}
	}
	if c.OnRefused == nil {
		c.OnRefused = func(net.Addr, []*x509.Certificate, error) {}
	}
	setDefault(&c.MaxPeerStreams, DefaultMaxPeerStreams)
	setDefault(&c.MaxConnections, DefaultMaxConnections)
	setDefault(&c.MaxAddressConnections, DefaultMaxAddressConnections)
	setDefault(&c.MaxPeerConnections, DefaultMaxPeerConnections)
	setDefault(&c.HandshakesPerSecond, DefaultHandshakesPerSecond)
	setDefault(&c.KeepAlive, DefaultKeepAlive)
	setDefault(&c.IdleTimeout, DefaultIdleTimeout)
	setDefault(&c.HandshakeTimeout, DefaultHandshakeTimeout)
	setDefault(&c.RecheckInterval, DefaultRecheckInterval)
	return nil
}

func setDefault[T int | int64 | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Conn is a connection with an approved node, dialled or accepted.
type Conn struct {
	*quic.Conn
	Domain string // the peer's provider domain, as its certificate proves it
	Dialed bool   // this end opened the connection
}

// The application error codes with which an Endpoint closes a connection under ALPNGossip or one that it can't serve.
// HTTP/3 connections use RFC 9114's.
const (
	codeDone     quic.ApplicationErrorCode = 0x100 // H3_NO_ERROR, or the end of a gossip connection
	codeBusy     quic.ApplicationErrorCode = 0x107 // H3_EXCESSIVE_LOAD
	codeRevoked  quic.ApplicationErrorCode = 0x1001
	codeShutdown quic.ApplicationErrorCode = 0x1002

	codeUnconfirmed quic.ApplicationErrorCode = 0x1003 // that nobody hears
)

type peerKey struct{}

// PeerDomain returns the domain that the peer's certificate proved on the connection that brought r. It is false for
// requests that didn't come through HandleHTTP.
func PeerDomain(r *http.Request) (domain string, ok bool) {
	domain, ok = r.Context().Value(peerKey{}).(string)
	return domain, ok
}

// WithPeerDomain returns a context that PeerDomain finds domain in; tests of handlers use it.
func WithPeerDomain(ctx context.Context, domain string) context.Context {
	return context.WithValue(ctx, peerKey{}, domain)
}
