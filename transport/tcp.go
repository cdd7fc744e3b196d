package transport

import (
	"crypto/tls"
	"net"
	"sync"
)

// clientsTLS is the configuration of the TCP listener: server authentication only.
func clientsTLS(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: certificate,
		NextProtos:     []string{"h2", "http/1.1"},
	}
}

// crowd is a listener that closes what comes from a network that has MaxAddressConnections open.
type crowd struct {
	net.Listener
	e *Endpoint
}

// Accept implements net.Listener.
func (l crowd) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		address := c.RemoteAddr().String()
		if l.e.byTCP.enter(address, l.e.cfg.MaxAddressConnections) {
			return &counted{Conn: c, leave: func() { l.e.byTCP.leave(address) }}, nil
		}
		l.e.cfg.OnBusy()
		_ = c.Close()
	}
}

// counted is a connection that makes room for another one when it is closed.
type counted struct {
	net.Conn
	leave func()
	once  sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	c.once.Do(c.leave)
	return c.Conn.Close()
}
