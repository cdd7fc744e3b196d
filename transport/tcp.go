package transport

import (
	"crypto/tls"
	"net"

	"golang.org/x/net/netutil"
)

// clientsTLS is the configuration of the TCP listener: server authentication only.
func clientsTLS(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: certificate,
		NextProtos:     []string{"h2", "http/1.1"},
	}
}

// limitListener accepts no more than n connections at a time.
func limitListener(l net.Listener, n int) net.Listener { return netutil.LimitListener(l, n) }
