package federation

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/quic-go/quic-go"
)

// memberTransport carries memberlist over the gossip connections: packets as QUIC datagrams (RFC 9221), push/pulls as
// streams. Nodes are addressed by name; the addresses that memberlist knows mean nothing.
type memberTransport struct {
	g       *Gossip
	packets chan *memberlist.Packet
	streams chan net.Conn
}

var _ memberlist.NodeAwareTransport = (*memberTransport)(nil)

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *memberTransport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return memberIP(t.g.cfg.Domain), memberPort, nil
}

// WriteTo implements memberlist.Transport. Without a name there is no peer.
func (t *memberTransport) WriteTo([]byte, string) (time.Time, error) {
	return time.Time{}, unreachable(errors.New("no node name"))
}

// WriteToAddress implements memberlist.NodeAwareTransport. It never blocks.
func (t *memberTransport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	l := t.g.link(a.Name)
	if l == nil {
		return time.Time{}, unreachable(errors.New("not connected"))
	}
	select {
	case l.packets <- bytes.Clone(b):
	default: // congested: as good as lost on the way
	}
	return time.Now(), nil
}

// unreachable is the form of error that memberlist takes for the peer's failure, not ours.
func unreachable(err error) error { return &net.OpError{Op: "write", Net: "udp", Err: err} }

// PacketCh implements memberlist.Transport.
func (t *memberTransport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *memberTransport) StreamCh() <-chan net.Conn { return t.streams }

// DialTimeout implements memberlist.Transport. Without a name there is no peer.
func (t *memberTransport) DialTimeout(string, time.Duration) (net.Conn, error) {
	return nil, unreachable(errors.New("no node name"))
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *memberTransport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	l := t.g.link(a.Name)
	if l == nil {
		return nil, unreachable(errors.New("not connected"))
	}
	ctx, cancel := context.WithTimeout(l.conn.Context(), timeout)
	defer cancel()
	s, err := l.openStream(ctx, streamMembers)
	if err != nil {
		return nil, unreachable(err)
	}
	return &memberStream{Stream: s, link: l}, nil
}

// Shutdown implements memberlist.Transport. The connections end with Gossip.Run.
func (t *memberTransport) Shutdown() error { return nil }

// memberStream is a stream as memberlist sees it: what it reads is the peer's one message, filtered.
type memberStream struct {
	*quic.Stream
	link *link
	in   io.Reader // nil until the message was read
}

// Read implements net.Conn.
func (s *memberStream) Read(p []byte) (int, error) {
	if s.in == nil {
		b, err := s.link.g.filter.stream(s.link.conn.Domain, s.Stream)
		if err != nil {
			return 0, err
		}
		s.in = bytes.NewReader(b)
	}
	return s.in.Read(p)
}

// Close implements net.Conn. A QUIC stream has two ends to close.
func (s *memberStream) Close() error {
	s.CancelRead(0)
	return s.Stream.Close()
}

// LocalAddr implements net.Conn.
func (s *memberStream) LocalAddr() net.Addr { return memberAddr(s.link.g.cfg.Domain) }

// RemoteAddr implements net.Conn.
func (s *memberStream) RemoteAddr() net.Addr { return memberAddr(s.link.conn.Domain) }

func memberAddr(domain string) net.Addr { return &net.UDPAddr{IP: memberIP(domain), Port: memberPort} }
