package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
)

// maxDialed bounds the addresses of a host that are tried.
const maxDialed = 4

// Dial connects to the node of domain at address (host:port) under alpn, from the Endpoint's own UDP port. It fails,
// with ErrRefused, unless the other end proves to be domain's and is approved. The other side's opinion of us arrives
// later, as an error of the connection.
func (e *Endpoint) Dial(ctx context.Context, address, domain, alpn string) (*Conn, error) {
	addrs, err := e.resolve(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("dialling %s: %w", domain, err)
	}
	conf := e.quicConfig()
	conf.KeepAlivePeriod = e.cfg.KeepAlive
	var errs []error
	for _, addr := range addrs {
		var refusal error // written during the handshake, read after it
		c, err := e.quic.Dial(ctx, addr, e.clientTLS(domain, alpn, func(err error) { refusal = err }), conf)
		if err == nil {
			pc := &Conn{Conn: c, Domain: domain, Dialed: true}
			if !e.track(pc) {
				return nil, fmt.Errorf("dialling %s: %w", domain, ErrClosed)
			}
			return pc, nil
		}
		if ctx.Err() == nil && refusal != nil {
			err = refusal
		}
		errs = append(errs, fmt.Errorf("dialling %s at %s: %w", domain, addr, explain(err)))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// resolve returns the addresses of a host:port that the Endpoint's socket can reach.
func (e *Endpoint) resolve(ctx context.Context, address string) ([]*net.UDPAddr, error) {
	host, portName, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(portName, 10, 16)
	if err != nil || port == 0 {
		return nil, fmt.Errorf("address %q has no port", address)
	}
	network := "ip"
	if own := e.Addr().IP; own.To4() != nil {
		network = "ip4"
	} else if !own.IsUnspecified() {
		network = "ip6"
	}
	var ips []netip.Addr
	if ip, err := netip.ParseAddr(host); err == nil {
		ips = []netip.Addr{ip}
	} else if ips, err = net.DefaultResolver.LookupNetIP(ctx, network, host); err != nil {
		return nil, err
	}
	addrs := make([]*net.UDPAddr, 0, maxDialed)
	for _, ip := range ips[:min(len(ips), maxDialed)] {
		addrs = append(addrs, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip.Unmap(), uint16(port))))
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%s has no address", host)
	}
	return addrs, nil
}
