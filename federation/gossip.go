package federation

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/transport"
)

// Seed is an approved peer, and where the operator said that it may be reached.
type Seed struct {
	Domain  string
	Address string // host:port; empty if only records can tell
}

// State is what gossip makes of a peer. It is a hint: nothing waits for it.
type State string

// The states of a peer.
const (
	StateAlive   State = "alive"
	StateDead    State = "dead"
	StateLeft    State = "left"    // the peer said that it was stopping
	StateUnknown State = "unknown" // not heard of since the start
)

// Member is an approved peer as gossip sees it.
type Member struct {
	Domain  string
	Address string // host:port; empty if not known
	Version string // of its software, as its record says; empty if not known
	State   State
	Since   time.Time // of the state
}

// GossipConfig configures a Gossip. Endpoint, Domain, Advertise, Certificate, Verify and Store are required.
type GossipConfig struct {
	Endpoint    *transport.Endpoint
	Domain      string                           // own domain
	Advertise   string                           // host:port where peers reach this node
	Version     string                           // of the software, for the own record
	Certificate func() (*tls.Certificate, error) // the node's, with its chain including the root

	// Verify approves a node's chain and says whose it is, as transport.Config.VerifyPeer does.
	Verify func(chain []*x509.Certificate) (domain string, err error)

	Seeds func() []Seed // the approved peers
	Store Store         // keys under "g/"

	// OnPeer is told when a peer came, came again, or went. It must not block. It may be told the same twice.
	OnPeer func(domain, address string, alive bool)

	// OnUnapproved is told of each new record of a node that isn't approved. It must not block.
	OnUnapproved func(Record)

	Log     *slog.Logger
	Profile string // "lan" (the default), "wan", or "local" for loopback and tests
}

// profile is how eager gossip is.
type profile struct {
	members                *memberlist.Config
	minBackoff, maxBackoff time.Duration // between attempts to reach a lost peer
	sync                   time.Duration // between comparisons of records with one peer
	leave                  time.Duration // how long the good-bye may take
}

func newProfile(name string) (p profile, err error) {
	switch name {
	case "", "lan":
		p = profile{memberlist.DefaultLANConfig(), 200 * time.Millisecond, 5 * time.Second, 30 * time.Second, time.Second}
	case "wan":
		p = profile{memberlist.DefaultWANConfig(), 500 * time.Millisecond, 30 * time.Second, time.Minute, 2 * time.Second}
	case "local":
		p = profile{memberlist.DefaultLocalConfig(), 50 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second, 300 * time.Millisecond}
		p.members.ProbeInterval = 500 * time.Millisecond
		p.members.GossipInterval = 50 * time.Millisecond
		p.members.PushPullInterval = 5 * time.Second
		p.members.SuspicionMaxTimeoutMult = 2
		return p, nil
	default:
		return p, fmt.Errorf("gossip profile %q: not one of local, lan, wan", name)
	}
	// The filter lets no peer confirm a suspicion in another's name, so confirmations are fewer than memberlist counts on.
	p.members.SuspicionMaxTimeoutMult = 3
	return p, nil
}

// Gossip keeps nodes that approve each other informed of each other's addresses and liveness. It introduces, and
// never authorises: what it learns about nodes that aren't approved is for the operator to see.
type Gossip struct {
	cfg      GossipConfig
	log      *slog.Logger
	profile  profile
	filter   *filter
	member   memberTransport
	ready    chan struct{} // closed when Run has begun
	resign   chan struct{} // asks Run for a new own record
	drops    atomic.Uint64
	outgrown atomic.Uint64  // the highest own incarnation that peers have shown, from before the store was lost
	tasks    sync.WaitGroup // goroutines of Run

	mu         sync.Mutex
	run        context.Context           // guarded by mu; nil before Run
	over       bool                      // guarded by mu; Run is ending, nothing starts any more
	members    *memberlist.Memberlist    // guarded by mu; nil before Run and after
	own        Record                    // guarded by mu
	peers      map[string]*gossipPeer    // guarded by mu; approved peers by domain
	unapproved map[recordID]*heardRecord // guarded by mu
	alive      map[string]bool           // guarded by mu; the domains that memberlist holds alive, approved or not
	changed    map[string]struct{}       // guarded by mu; peers that OnPeer is to be told of
	tell       chan struct{}             // signals changed
}

// NewGossip loads what is known of peers, signs the node's record under a new incarnation, and registers with the
// Endpoint, so it comes before Endpoint.Serve.
func NewGossip(cfg GossipConfig) (*Gossip, error) {
	if cfg.Endpoint == nil || cfg.Certificate == nil || cfg.Verify == nil || cfg.Store == nil {
		return nil, errors.New("gossip: Endpoint, Certificate, Verify or Store is missing")
	}
	if !validDomain(cfg.Domain) {
		return nil, fmt.Errorf("gossip: domain %q", cfg.Domain)
	}
	if err := checkAddress(cfg.Advertise); err != nil {
		return nil, fmt.Errorf("gossip: advertised %w", err)
	}
	p, err := newProfile(cfg.Profile)
	if err != nil {
		return nil, err
	}
	if cfg.Seeds == nil {
		cfg.Seeds = func() []Seed { return nil }
	}
	if cfg.OnPeer == nil {
		cfg.OnPeer = func(string, string, bool) {}
	}
	if cfg.OnUnapproved == nil {
		cfg.OnUnapproved = func(Record) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g := &Gossip{
		cfg:        cfg,
		log:        cfg.Log,
		profile:    p,
		filter:     newFilter(cfg.Domain),
		ready:      make(chan struct{}),
		resign:     make(chan struct{}, 1),
		peers:      make(map[string]*gossipPeer),
		unapproved: make(map[recordID]*heardRecord),
		alive:      make(map[string]bool),
		changed:    make(map[string]struct{}),
		tell:       make(chan struct{}, 1),
	}
	g.filter.dropped = func(peer, reason string) {
		g.drops.Add(1)
		g.log.Debug("gossip message dropped", "peer", peer, "reason", reason)
	}
	g.filter.exhausted = func() {
		select {
		case g.resign <- struct{}{}:
		default:
		}
	}
	g.member = memberTransport{g: g, packets: make(chan *memberlist.Packet, 256), streams: make(chan net.Conn, 16)}
	if err := g.signRecord(0); err != nil {
		return nil, err
	}
	if err := g.loadRecords(); err != nil {
		return nil, err
	}
	g.Refresh()
	cfg.Endpoint.Handle(transport.ALPNGossip, g.accepted)
	return g, nil
}

// signRecord makes a new own record, with an incarnation above all earlier ones and atLeast. The incarnation is
// durable before it is used.
func (g *Gossip) signRecord(atLeast uint64) error {
	cert, err := g.cfg.Certificate()
	if err != nil {
		return fmt.Errorf("gossip: certificate for the node record: %w", err)
	}
	key, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return fmt.Errorf("gossip: private key of type %T can't sign", cert.PrivateKey)
	}
	stored, err := g.cfg.Store.Get([]byte(keyIncarnation))
	if err != nil {
		return fmt.Errorf("gossip: reading the incarnation: %w", err)
	}
	var last uint64
	if len(stored) == 8 {
		last = binary.BigEndian.Uint64(stored)
	} else if stored != nil {
		return fmt.Errorf("gossip: incarnation of %d bytes in the store", len(stored))
	}
	next := max(last, atLeast) + 1
	if err := g.put(keyIncarnation, binary.BigEndian.AppendUint64(nil, next)); err != nil {
		return err
	}
	r := Record{
		Domain: g.cfg.Domain, Address: g.cfg.Advertise, Incarnation: next, Issued: time.Now().UTC().Truncate(time.Second),
		Version: g.cfg.Version, Chain: cert.Certificate,
	}
	if err := r.Sign(key); err != nil {
		return err
	}
	if err := r.CheckConsistent(); err != nil {
		return fmt.Errorf("gossip: own record: %w", err)
	}
	if _, err := ParseRecord(codec.Marshal(&r)); err != nil {
		return fmt.Errorf("gossip: own record: %w", err)
	}
	g.mu.Lock()
	g.own = r
	g.mu.Unlock()
	g.filter.approve(g.cfg.Domain, next)
	return nil
}

// Run gossips until ctx ends, then says good-bye and closes the connections. It returns nil unless memberlist refuses
// to start. It is called once.
func (g *Gossip) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conf := g.profile.members
	conf.Name = g.cfg.Domain
	conf.Transport = &g.member
	conf.RequireNodeNames = true
	conf.UDPBufferSize = 1200 // fits a QUIC datagram before the path's MTU is known
	conf.EnableCompression = false
	conf.DisableTcpPings = true
	conf.Events = memberEvents{g}
	injected := make(chan struct{}, 1)
	conf.Alive = aliveCheck{g: g, injected: injected}
	conf.Logger = log.New(memberLog{g.log}, "", 0)
	members, err := memberlist.Create(conf)
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	// The connections outlive ctx, so that the good-bye gets through.
	links, closeLinks := context.WithCancel(context.WithoutCancel(ctx))
	defer closeLinks()
	if err := g.renewIncarnation(ctx, members, injected); err != nil {
		if ctx.Err() != nil {
			err = nil
		}
		return errors.Join(members.Shutdown(), err)
	}
	g.mu.Lock()
	g.run, g.members = links, members
	for _, p := range g.peers {
		g.keepLocked(p)
	}
	g.mu.Unlock()
	close(g.ready)
	g.spawn(func() { g.tellLoop(links) })

	g.maintain(ctx, members, injected)

	if err := members.Leave(g.profile.leave); err != nil {
		g.log.Debug("gossip good-bye", "err", err)
	}
	g.mu.Lock()
	g.members, g.over = nil, true
	g.mu.Unlock()
	err = members.Shutdown()
	closeLinks()
	g.tasks.Wait()
	return err
}

// maintain does what is due from time to time, until ctx ends.
func (g *Gossip) maintain(ctx context.Context, members *memberlist.Memberlist, injected chan struct{}) {
	sync := time.NewTicker(g.profile.sync)
	defer sync.Stop()
	renewal := time.NewTicker(time.Minute)
	defer renewal.Stop()
	for {
		again := false
		select {
		case <-ctx.Done():
			return
		case <-sync.C:
			if l := g.randomLink(); l != nil {
				g.spawn(func() { l.compare() })
			}
		case <-g.resign:
			again = true
		case <-renewal.C:
			cert, err := g.cfg.Certificate()
			g.mu.Lock()
			again = err == nil && len(cert.Certificate) > 0 && !bytes.Equal(cert.Certificate[0], g.own.Chain[0])
			g.mu.Unlock()
		}
		if !again {
			continue
		}
		g.mu.Lock()
		seen := g.own.Incarnation
		g.mu.Unlock()
		if err := g.signRecord(max(seen, g.outgrown.Load())); err != nil {
			g.log.Error("node record can't be renewed", "err", err)
			continue
		}
		g.mu.Lock()
		own := g.own
		g.mu.Unlock()
		g.push(own, "")
		if err := g.renewIncarnation(ctx, members, injected); err != nil {
			return
		}
	}
}

// renewMeta marks the message by which renewIncarnation speaks to the own memberlist. The filter lets no metadata
// through, so nobody else can send it.
const renewMeta = "renew"

// renewIncarnation takes memberlist's own incarnation to the first one of the own record, by telling it that somebody
// holds it alive there: it refutes with the next one.
func (g *Gossip) renewIncarnation(ctx context.Context, members *memberlist.Memberlist, injected chan struct{}) error {
	g.mu.Lock()
	incarnation := incarnationOf(g.own.Incarnation)
	g.mu.Unlock()
	b, err := encodeGossip(msgAlive, &wireAlive{
		Incarnation: incarnation, Node: g.cfg.Domain, Addr: memberIP(g.cfg.Domain), Port: memberPort, Meta: []byte(renewMeta), Vsn: memberVersion,
	})
	if err != nil {
		return err
	}
	for done := false; !done; {
		select {
		case g.member.packets <- &memberlist.Packet{Buf: b, From: memberAddr(g.cfg.Domain), Timestamp: time.Now()}:
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-injected:
			done = true
		case <-time.After(time.Second): // memberlist drops messages when it has too many
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	members.NumMembers() // waits for the lock that memberlist holds while it refutes
	return nil
}

// aliveCheck is memberlist's last question before it takes a node in.
type aliveCheck struct {
	g        *Gossip
	injected chan struct{}
}

// NotifyAlive implements memberlist.AliveDelegate.
func (a aliveCheck) NotifyAlive(n *memberlist.Node) error {
	if n.Name == a.g.cfg.Domain {
		if string(n.Meta) == renewMeta {
			select {
			case a.injected <- struct{}{}:
			default:
			}
		}
		return nil
	}
	if !a.g.filter.knows(n.Name, n.Addr, n.Port) {
		return fmt.Errorf("no approved record of %s", n.Name)
	}
	return nil
}

// memberEvents takes memberlist's news. memberlist holds its lock meanwhile.
type memberEvents struct{ g *Gossip }

// NotifyJoin implements memberlist.EventDelegate.
func (e memberEvents) NotifyJoin(n *memberlist.Node) { e.g.memberState(n.Name, StateAlive) }

// NotifyLeave implements memberlist.EventDelegate.
func (e memberEvents) NotifyLeave(n *memberlist.Node) {
	s := StateDead
	if e.g.filter.hasLeft(n.Name) {
		s = StateLeft
	}
	e.g.memberState(n.Name, s)
}

// NotifyUpdate implements memberlist.EventDelegate.
func (e memberEvents) NotifyUpdate(*memberlist.Node) {}

func (g *Gossip) memberState(domain string, s State) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if domain == g.cfg.Domain {
		return
	}
	if g.alive[domain] = s == StateAlive; s != StateAlive {
		delete(g.alive, domain)
	}
	if p := g.peers[domain]; p != nil && !(s == StateDead && p.state == StateLeft) {
		g.setStateLocked(p, s)
	}
}

// setStateLocked notes a peer's state and has OnPeer told, also if it is the same: the peer may have restarted.
func (g *Gossip) setStateLocked(p *gossipPeer, s State) {
	if p.state != s {
		p.state, p.since = s, time.Now()
	}
	g.changed[p.domain] = struct{}{}
	select {
	case g.tell <- struct{}{}:
	default:
	}
}

// tellLoop calls OnPeer, without any lock.
func (g *Gossip) tellLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.tell:
		}
		var told []Member
		g.mu.Lock()
		for domain := range g.changed {
			if p := g.peers[domain]; p != nil {
				told = append(told, p.asMember())
			}
		}
		clear(g.changed)
		g.mu.Unlock()
		for _, m := range told {
			if m.State == StateAlive {
				g.cfg.Endpoint.Poke(m.Domain)
			}
			g.cfg.OnPeer(m.Domain, m.Address, m.State == StateAlive)
		}
	}
}

// memberLog turns memberlist's log lines into debug records.
type memberLog struct{ log *slog.Logger }

// Write implements io.Writer.
func (l memberLog) Write(b []byte) (int, error) {
	l.log.Debug("memberlist", "line", strings.TrimSpace(string(b)))
	return len(b), nil
}

// Members returns the approved peers, by domain.
func (g *Gossip) Members() []Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]Member, 0, len(g.peers))
	for _, p := range g.peers {
		all = append(all, p.asMember())
	}
	slices.SortFunc(all, func(a, b Member) int { return cmp.Compare(a.Domain, b.Domain) })
	return all
}

// Address returns where an approved peer is reached: where it was reached last, also before a restart, unless it has
// announced another address since; else what its record says, else the operator.
func (g *Gossip) Address(domain string) (string, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[domain]
	if p == nil {
		return "", false
	}
	a := p.address()
	return a, a != ""
}

// Unapproved returns the newest records heard of nodes that aren't approved, by domain; several of one domain if
// several roots claim it. Their signatures are good in themselves, which says nothing about who made them.
func (g *Gossip) Unapproved() []Record {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]Record, 0, len(g.unapproved))
	for _, h := range g.unapproved {
		all = append(all, h.Record)
	}
	slices.SortFunc(all, func(a, b Record) int { return cmp.Compare(a.Domain, b.Domain) })
	return all
}

// Dropped returns how many messages and records of peers were refused since the start.
func (g *Gossip) Dropped() uint64 { return g.drops.Load() }

// randomLink returns a live connection, nil if there is none.
func (g *Gossip) randomLink() *link {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []*link
	for _, p := range g.peers {
		if l := p.link(); l != nil {
			all = append(all, l)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[rand.IntN(len(all))]
}
