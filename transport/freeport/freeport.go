// Package freeport finds ports for nodes that tests and examples start on loopback.
package freeport

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
)

// Ports are taken from below those that systems give to outgoing connections (RFC 6335, Section 6, and Linux's default):
// one of those could be in use again before the node binds it.
const first, last = 20000, 32767

// Address returns a loopback address, host:port, whose port is free for UDP and TCP alike.
func Address() (string, error) {
	for range 1000 {
		address := fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(last-first+1))
		u, err := net.ListenPacket("udp", address)
		if err != nil {
			continue
		}
		t, err := net.Listen("tcp", address)
		u.Close()
		if err == nil {
			t.Close()
			return address, nil
		}
	}
	return "", errors.New("no port is free for UDP and TCP alike")
}
