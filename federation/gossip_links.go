package federation

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/parley-mls/parley/transport"
	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"
)

// The first byte of a stream says what it is for.
const (
	streamMembers = 1 // memberlist's, both ways
	streamSync    = 2 // a comparison of records, request and answer
	streamRecords = 3 // news, one way
)

const (
	streamTime       = 10 * time.Second // that a stream may take
	maxLinkStreams   = 32               // served at a time on a connection
	recordsPerSecond = 50               // that a peer may have us verify, after a first recordsBurst
	recordsBurst     = 2000
	packetsPerSecond = 1000
	maxQueuedPackets = 128
	codeDone         = quic.ApplicationErrorCode(0x100)
	codeReplaced     = quic.ApplicationErrorCode(0x1003)
	codeGoodBye      = quic.ApplicationErrorCode(0x1004)
	codeNotApproved  = quic.ApplicationErrorCode(0x1001)
	dialTime         = 10 * time.Second
)

// gossipPeer is an approved peer. Gossip.mu guards all of it.
type gossipPeer struct {
	domain string
	seed   string  // address given by the operator, if any
	good   string  // address where it was last reached, if any
	record *Record // its newest record, nil before the first
	loaded bool    // good has been looked up in the store
	state  State
	since  time.Time
	in     *link // the newest connection that it opened, nil if none is live
	out    *link // the one that this node opened, nil if none is live
	kick   chan struct{}
	stop   context.CancelFunc // ends keep; nil unless it runs
}

func (p *gossipPeer) address() string {
	switch {
	case p.good != "":
		return p.good
	case p.record != nil:
		return p.record.Address
	}
	return p.seed
}

func (p *gossipPeer) asMember() Member {
	m := Member{Domain: p.domain, Address: p.address(), State: p.state, Since: p.since}
	if p.record != nil {
		m.Version = p.record.Version
	}
	return m
}

// link returns the newest live connection, nil if there is none.
func (p *gossipPeer) link() *link {
	if p.in == nil || (p.out != nil && p.out.since.After(p.in.since)) {
		return p.out
	}
	return p.in
}

// addresses returns where to dial, best first.
func (p *gossipPeer) addresses() []string {
	var all []string
	add := func(a string) {
		if a != "" && !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	add(p.good)
	if p.record != nil {
		add(p.record.Address)
	}
	add(p.seed)
	return all
}

// link is one gossip connection with an approved peer.
type link struct {
	g       *Gossip
	conn    *transport.Conn
	since   time.Time
	packets chan []byte // to the peer
	budget  *rate.Limiter
	joining atomic.Bool
}

// link returns a live connection with domain, nil if there is none.
func (g *Gossip) link(domain string) *link {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[domain]; p != nil {
		return p.link()
	}
	return nil
}

// peerLocked returns the peer of an approved domain, made if need be.
func (g *Gossip) peerLocked(domain string) *gossipPeer {
	p := g.peers[domain]
	if p == nil {
		p = &gossipPeer{domain: domain, state: StateUnknown, since: time.Now(), kick: make(chan struct{}, 1)}
		g.peers[domain] = p
		g.keepLocked(p)
	}
	return p
}

func (p *gossipPeer) kickLocked() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// keepLocked has a goroutine keep the connection with p, if Run has begun.
func (g *Gossip) keepLocked(p *gossipPeer) {
	if g.run == nil || g.over || p.stop != nil {
		return
	}
	ctx, stop := context.WithCancel(g.run)
	p.stop = stop
	g.spawnLocked(func() { g.keep(ctx, p) })
}

// keep dials p whenever there is no connection with it, for ever, with growing pauses.
func (g *Gossip) keep(ctx context.Context, p *gossipPeer) {
	backoff := g.profile.minBackoff
	for ctx.Err() == nil {
		g.mu.Lock()
		l := p.link()
		addresses := p.addresses()
		g.mu.Unlock()
		if l == nil && g.dialPeer(ctx, p, addresses) {
			continue
		}
		if l != nil {
			select {
			case <-ctx.Done():
				return
			case <-p.kick:
				continue
			case <-l.conn.Context().Done():
			}
			g.unlink(p, l)
			if time.Since(l.since) > g.profile.maxBackoff {
				backoff = g.profile.minBackoff
				continue
			}
		}
		pause := time.NewTimer(backoff/2 + rand.N(backoff))
		select {
		case <-ctx.Done():
		case <-pause.C:
			backoff = min(2*backoff, g.profile.maxBackoff)
		case <-p.kick:
			backoff = g.profile.minBackoff
		}
		pause.Stop()
	}
}

// spawnLocked starts a goroutine that Run waits for, unless Run hasn't begun or is over.
func (g *Gossip) spawnLocked(f func()) bool {
	if g.run == nil || g.over {
		return false
	}
	g.tasks.Go(f)
	return true
}

func (g *Gossip) spawn(f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.spawnLocked(f)
}

// dialPeer tries the addresses in turn, and says whether there is a connection now.
func (g *Gossip) dialPeer(ctx context.Context, p *gossipPeer, addresses []string) bool {
	for _, a := range addresses {
		dial, cancel := context.WithTimeout(ctx, dialTime)
		c, err := g.cfg.Endpoint.Dial(dial, a, p.domain, transport.ALPNGossip)
		cancel()
		if err != nil {
			g.log.Debug("peer not reached", "peer", p.domain, "address", a, "err", err)
			continue
		}
		l := g.addLink(c)
		if l == nil {
			return false
		}
		if !g.spawn(func() { l.serve(ctx) }) {
			_ = c.CloseWithError(codeGoodBye, "")
			return false
		}
		// The peer's view of our certificate shows only now: an answer means that it approves.
		if err := l.compare(); err != nil {
			g.log.Debug("peer doesn't answer", "peer", p.domain, "address", a, "err", err)
			_ = c.CloseWithError(codeDone, "")
			g.unlink(p, l)
			continue
		}
		g.reached(p, a)
		l.join()
		return true
	}
	return false
}

// reached remembers an address that works.
func (g *Gossip) reached(p *gossipPeer, address string) {
	g.mu.Lock()
	known := p.good == address
	p.good = address
	g.setStateLocked(p, StateAlive)
	g.mu.Unlock()
	if known {
		return
	}
	if err := g.put(keyAddress+p.domain, []byte(address)); err != nil {
		g.log.Error("address of a peer can't be kept", "peer", p.domain, "err", err)
	}
}

// accepted serves a connection that a peer opened.
func (g *Gossip) accepted(ctx context.Context, c *transport.Conn) {
	select {
	case <-g.ready:
	case <-ctx.Done():
		return
	}
	done := make(chan struct{})
	if g.spawn(func() {
		defer close(done)
		if l := g.addLink(c); l != nil {
			l.serve(ctx)
		}
	}) {
		<-done
	}
}

// addLink makes a connection the peer's newest. It replaces an older one of the same direction: a node that
// restarted comes back on a new one.
func (g *Gossip) addLink(c *transport.Conn) *link {
	l := &link{
		g: g, conn: c, since: time.Now(), packets: make(chan []byte, maxQueuedPackets),
		budget: rate.NewLimiter(recordsPerSecond, recordsBurst),
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.Domain == g.cfg.Domain || g.over {
		_ = c.CloseWithError(codeDone, "")
		return nil
	}
	p := g.peerLocked(c.Domain)
	slot := &p.in
	if c.Dialed {
		slot = &p.out
	}
	if *slot != nil {
		_ = (*slot).conn.CloseWithError(codeReplaced, "")
	}
	*slot = l
	if !c.Dialed {
		g.setStateLocked(p, StateAlive)
		p.kickLocked() // stop dialling
	}
	return l
}

// unlink forgets a connection that has ended.
func (g *Gossip) unlink(p *gossipPeer, l *link) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.in == l {
		p.in = nil
	}
	if p.out == l {
		p.out = nil
	}
	if p.link() != nil || p.state != StateAlive {
		return
	}
	ae, ok := errors.AsType[*quic.ApplicationError](context.Cause(l.conn.Context()))
	switch {
	case ok && ae.Remote && ae.ErrorCode == codeGoodBye:
		g.setStateLocked(p, StateLeft)
	case !g.alive[p.domain]: // else memberlist follows the peer and says when it is gone
		g.setStateLocked(p, StateDead)
	}
}

// serve carries the connection until it ends or Run or ctx does.
func (l *link) serve(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.conn.Context(), cancel)()
	l.g.mu.Lock()
	run, p := l.g.run, l.g.peers[l.conn.Domain]
	l.g.mu.Unlock()
	defer context.AfterFunc(run, cancel)()
	done := make(chan struct{}, 4)
	for _, f := range []func(context.Context){l.sendPackets, l.receivePackets, l.acceptStreams, l.acceptNews} {
		go func() { f(ctx); cancel(); done <- struct{}{} }()
	}
	<-ctx.Done()
	code := codeDone
	if run.Err() != nil {
		code = codeGoodBye
	}
	_ = l.conn.CloseWithError(code, "")
	for range cap(done) {
		<-done
	}
	if p != nil {
		l.g.unlink(p, l)
	}
}

func (l *link) sendPackets(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-l.packets:
			if err := l.conn.SendDatagram(b); err != nil {
				if _, ok := errors.AsType[*quic.DatagramTooLargeError](err); ok {
					l.g.log.Debug("gossip packet too large", "peer", l.conn.Domain, "bytes", len(b))
					continue
				}
				return
			}
		}
	}
}

func (l *link) receivePackets(ctx context.Context) {
	from := memberAddr(l.conn.Domain)
	budget := rate.NewLimiter(packetsPerSecond, packetsPerSecond)
	for {
		b, err := l.conn.ReceiveDatagram(ctx)
		if err != nil {
			return
		}
		if !budget.Allow() {
			l.g.filter.dropped(l.conn.Domain, "too many packets")
			continue
		}
		if b = l.g.filter.packet(l.conn.Domain, b); b == nil {
			continue
		}
		select {
		case l.g.member.packets <- &memberlist.Packet{Buf: b, From: from, Timestamp: time.Now()}:
		case <-ctx.Done():
			return
		}
	}
}

func (l *link) acceptStreams(ctx context.Context) {
	slots := make(chan struct{}, maxLinkStreams)
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		s, err := l.conn.AcceptStream(ctx)
		if err != nil {
			return
		}
		serving.Go(func() {
			defer func() { <-slots }()
			l.serveStream(ctx, s)
		})
	}
}

func (l *link) serveStream(ctx context.Context, s *quic.Stream) {
	_ = s.SetDeadline(time.Now().Add(streamTime))
	var kind [1]byte
	if _, err := io.ReadFull(s, kind[:]); err != nil {
		s.CancelRead(0)
		s.CancelWrite(0)
		return
	}
	switch kind[0] {
	case streamMembers:
		select {
		case l.g.member.streams <- &memberStream{Stream: s, link: l}: // memberlist closes it
			return
		case <-ctx.Done():
		}
	case streamSync:
		if err := l.answerSync(s); err != nil {
			l.g.refuse(l.conn.Domain, err)
			s.CancelWrite(0)
		}
	default:
		l.g.refuse(l.conn.Domain, fmt.Errorf("stream of kind %d", kind[0]))
		s.CancelWrite(0)
	}
	s.CancelRead(0)
	_ = s.Close()
}

func (l *link) acceptNews(ctx context.Context) {
	for {
		s, err := l.conn.AcceptUniStream(ctx)
		if err != nil {
			return
		}
		_ = s.SetReadDeadline(time.Now().Add(streamTime))
		if err := l.readNews(s); err != nil {
			l.g.refuse(l.conn.Domain, err)
		}
		s.CancelRead(0)
	}
}

func (l *link) openStream(ctx context.Context, kind byte) (*quic.Stream, error) {
	s, err := l.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	_ = s.SetDeadline(time.Now().Add(streamTime))
	if _, err := s.Write([]byte{kind}); err != nil {
		s.CancelRead(0)
		return nil, err
	}
	return s, nil
}

// join has memberlist exchange its state with the peer.
func (l *link) join() {
	if !l.joining.CompareAndSwap(false, true) {
		return
	}
	l.g.mu.Lock()
	members := l.g.members
	l.g.mu.Unlock()
	if members == nil {
		l.joining.Store(false)
		return
	}
	l.g.spawn(func() {
		defer l.joining.Store(false)
		if _, err := members.Join([]string{l.conn.Domain + "/" + memberAddr(l.conn.Domain).String()}); err != nil {
			l.g.log.Debug("memberlist join", "peer", l.conn.Domain, "err", err)
		}
	})
}

// refuse counts and logs what a peer sent in vain.
func (g *Gossip) refuse(peer string, err error) {
	g.drops.Add(1)
	g.log.Debug("gossip refused", "peer", peer, "err", err)
}

// put stores one key durably.
func (g *Gossip) put(key string, value []byte) error {
	ok, err := g.cfg.Store.Commit(map[string][]byte{key: value}, nil)
	if err == nil && !ok {
		err = errors.New("the store refused an unconditional batch")
	}
	if err != nil {
		return fmt.Errorf("gossip: storing %s: %w", bytes.ToValidUTF8([]byte(key), nil), err)
	}
	return nil
}
