package transport

import (
	"net"
	"net/netip"
	"sync"
)

// Network is the part of a host:port that one customer of a network has: the address of IPv4, the first 64 bits of
// IPv6, in which everybody has as many addresses as he wants.
func Network(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if ip = ip.Unmap(); ip.Is4() {
		return ip.String()
	}
	prefix, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return host
	}
	return prefix.String()
}

// networks counts connections by the network that they come from. The zero value is ready for use.
type networks struct {
	mu   sync.Mutex
	open map[string]int // guarded by mu
}

// enter counts a connection from an address and says whether it may stay: there are at most max from its network.
func (n *networks) enter(address string, max int) bool {
	k := Network(address)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[k] >= max {
		return false
	}
	if n.open == nil {
		n.open = make(map[string]int)
	}
	n.open[k]++
	return true
}

// leave takes back what enter has counted for the same address.
func (n *networks) leave(address string) {
	k := Network(address)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[k]--; n.open[k] == 0 {
		delete(n.open, k)
	}
}
