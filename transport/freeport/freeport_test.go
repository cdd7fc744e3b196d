package freeport

import (
	"net"
	"testing"
)

func TestAnAddressCanBeBound(t *testing.T) {
	seen := make(map[string]bool)
	for range 20 {
		address, err := Address()
		if err != nil {
			t.Fatal(err)
		}
		if seen[address] {
			t.Errorf("%s is given twice, though it is bound", address)
		}
		seen[address] = true
		u, err := net.ListenPacket("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
}
