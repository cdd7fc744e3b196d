//go:build linux

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A weather is what a relay does to the packets that pass it, in both directions.
type weather struct {
	loss    float64       // share of packets that are dropped
	delay   time.Duration // one way
	reorder float64       // share of packets that are held back, for up to shuffle longer, and overtaken
	shuffle time.Duration
}

// A relay passes the UDP packets to a node on, and its answers back.
type relay struct {
	router  *namespace
	to      netip.AddrPort
	conn    *net.UDPConn // where peers send to
	weather atomic.Pointer[weather]
	done    chan struct{} // closed by close

	passed, dropped, delayed, overtaken atomic.Int64 // packets

	mu    sync.Mutex
	rand  *rand.Rand // guarded by mu
	flows map[netip.AddrPort]*flow
}

// A flow is what one peer sends through a relay: the node sees it at an address of its own.
type flow struct {
	node        *net.UDPConn
	there, back path
}

const (
	maxPacket = 64 << 10
	maxQueue  = 8192 // packets under way in one direction of a flow
	maxFlows  = 256
)

func newRelay(router *namespace, listen, to string, seed uint64) (*relay, error) {
	r := &relay{router: router, rand: rand.New(rand.NewPCG(seed, 1)), done: make(chan struct{}), flows: make(map[netip.AddrPort]*flow)}
	r.weather.Store(new(weather))
	var err error
	if r.to, err = netip.ParseAddrPort(to); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	if r.conn, err = router.listenUDP(listen); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	go r.run()
	return r, nil
}

func (r *relay) close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.done)
	r.conn.Close()
	for _, f := range r.flows {
		f.node.Close()
	}
}

func (r *relay) run() {
	b := make([]byte, maxPacket)
	for {
		n, from, err := r.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // of a packet sent before: the link is down, nobody listens
		}
		f, err := r.flow(from)
		if err != nil {
			continue
		}
		r.pass(f.there, b[:n])
	}
}

func (r *relay) flow(from netip.AddrPort) (*flow, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.flows[from]; f != nil {
		return f, nil
	}
	select {
	case <-r.done: // and the router may be gone
		return nil, net.ErrClosed
	default:
	}
	if len(r.flows) >= maxFlows {
		return nil, fmt.Errorf("relay: more than %d flows", maxFlows)
	}
	node, err := r.router.listenUDP("0.0.0.0:0")
	if err != nil {
		return nil, err
	}
	f := &flow{node: node}
	f.there = r.newPath(func(b []byte) { node.WriteToUDPAddrPort(b, r.to) })
	f.back = r.newPath(func(b []byte) { r.conn.WriteToUDPAddrPort(b, from) })
	r.flows[from] = f
	go func() {
		b := make([]byte, maxPacket)
		for {
			n, _, err := node.ReadFromUDPAddrPort(b)
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				continue
			}
			r.pass(f.back, b[:n])
		}
	}()
	return f, nil
}

// pass does to a packet what the weather wants.
func (r *relay) pass(p path, b []byte) {
	w := r.weather.Load()
	if *w == (weather{}) {
		r.passed.Add(1)
		p.send(b)
		return
	}
	r.mu.Lock()
	drop, hold := r.rand.Float64() < w.loss, r.rand.Float64() < w.reorder
	var more time.Duration
	if hold {
		more = time.Duration(r.rand.Float64() * float64(w.shuffle))
	}
	r.mu.Unlock()
	if drop {
		r.dropped.Add(1)
		return
	}
	r.passed.Add(1)
	r.delayed.Add(1)
	packet := append([]byte{}, b...)
	if hold {
		r.overtaken.Add(1)
		time.AfterFunc(w.delay+more, func() { p.send(packet) })
		return
	}
	select {
	case p.queue <- delayed{time.Now().Add(w.delay), packet}:
	default:
		r.dropped.Add(1)
	}
}

// A path is one direction of a flow: packets arrive in the order in which they left.
type path struct {
	send  func([]byte)
	queue chan delayed
}

type delayed struct {
	due    time.Time
	packet []byte
}

func (r *relay) newPath(send func([]byte)) path {
	p := path{send: send, queue: make(chan delayed, maxQueue)}
	go func() {
		for {
			select {
			case d := <-p.queue:
				time.Sleep(time.Until(d.due))
				p.send(d.packet)
			case <-r.done:
				return
			}
		}
	}()
	return p
}
