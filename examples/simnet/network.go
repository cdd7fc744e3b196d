//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
)

// A namespace is a network namespace (network_namespaces(7)). It has no name: it is held by a thread of this program and
// by the processes in it, so nothing of it outlives them, however they end.
type namespace struct {
	work chan func()
	path string // for ip(8)
}

func newNamespace() (*namespace, error) {
	n := &namespace{work: make(chan func())}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with this goroutine
		err := syscall.Unshare(syscall.CLONE_NEWNET)
		n.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), syscall.Gettid())
		made <- err
		for f := range n.work {
			f()
		}
	}()
	if err := <-made; err != nil {
		close(n.work)
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return n, n.ip("link", "set", "lo", "up")
}

// do runs f in the namespace: the sockets and the processes that it makes belong there.
func (n *namespace) do(f func() error) error {
	done := make(chan error)
	n.work <- func() { done <- f() }
	return <-done
}

// spawn starts a process in the namespace. It is killed when the namespace is closed or this program ends.
func (n *namespace) spawn(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return n.do(cmd.Start)
}

// close ends the namespace and what still runs in it.
func (n *namespace) close() {
	if n != nil {
		close(n.work)
	}
}

// ip runs ip(8) in the namespace.
func (n *namespace) ip(args ...string) error {
	return n.do(func() error {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}

// unsupported says why there can be no namespaces here, nil if there can.
func unsupported() error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces take root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		return errors.New("there is no ip command (iproute2)")
	}
	n, err := newNamespace()
	if err == nil {
		err = n.ip("link", "add", "name", "one", "type", "veth", "peer", "name", "other")
	}
	n.close()
	return err
}

// The network: in the middle a router, which is this program, and a link from it to each organisation. Nodes reach each
// other at addresses of the router only, where a relay for each listens; there is no other way between them. The clients of
// an organisation are in its namespace.
type network struct {
	router *namespace
	sites  []*site
}

// A site is the namespace of an organisation's node and clients.
type site struct {
	*namespace
	net   *network
	link  string // the router's end
	inner string // host:port of the node, inside
	outer string // host:port at which peers reach it: the relay
	relay *relay
}

const nodePort = 7441

func newNetwork(names []string, seed uint64) (_ *network, err error) {
	n := new(network)
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if n.router, err = newNamespace(); err != nil {
		return nil, err
	}
	for i, name := range names {
		s := &site{net: n, link: "up-" + name}
		if s.namespace, err = newNamespace(); err != nil {
			return nil, err
		}
		n.sites = append(n.sites, s)
		// Addresses for benchmarks (RFC 2544); they are nowhere outside these namespaces.
		node, gateway, public := fmt.Sprintf("198.18.%d.2", i), fmt.Sprintf("198.18.%d.1", i), fmt.Sprintf("198.19.%d.1", i)
		s.inner, s.outer = fmt.Sprintf("%s:%d", node, nodePort), fmt.Sprintf("%s:%d", public, nodePort)
		for _, step := range []struct {
			in   *namespace
			args string
		}{
			{n.router, "link add name " + s.link + " type veth peer name uplink netns " + s.path},
			{n.router, "addr add " + gateway + "/24 dev " + s.link},
			{n.router, "addr add " + public + "/32 dev lo"},
			{n.router, "link set " + s.link + " up"},
			{s.namespace, "addr add " + node + "/24 dev uplink"},
			{s.namespace, "link set uplink up"},
			{s.namespace, "route add default via " + gateway},
		} {
			if err = step.in.ip(strings.Fields(step.args)...); err != nil {
				return nil, err
			}
		}
		if s.relay, err = newRelay(n.router, s.outer, s.inner, seed+uint64(i)); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// setLink takes the link between a site and everybody else down, or up again.
func (s *site) setLink(up bool) error {
	state := "down"
	if up {
		state = "up"
	}
	return s.net.router.ip("link", "set", s.link, state)
}

// weather sets what the relays do to packets.
func (n *network) weather(w weather) {
	for _, s := range n.sites {
		s.relay.weather.Store(&w)
	}
}

func (n *network) close() {
	for _, s := range n.sites {
		s.namespace.close()
		s.relay.close()
	}
	n.router.close()
}

// listenUDP opens a UDP socket in the namespace.
func (n *namespace) listenUDP(address string) (conn *net.UDPConn, err error) {
	a, err := net.ResolveUDPAddr("udp4", address)
	if err != nil {
		return nil, err
	}
	err = n.do(func() error {
		conn, err = net.ListenUDP("udp4", a)
		return err
	})
	return conn, err
}
