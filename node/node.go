// Package node is a provider's node: the delivery service of MIMI rooms (draft-ietf-mimi-protocol-06) and of MLS (RFC
// 9750, Section 5), the API of the provider's clients, and the federation with other providers' nodes.
//
// Open starts everything that a Config describes, Run serves until its context ends. The parts: a room's hub orders
// what happens in it (hub.go), followers keep a copy of the log for their own clients (follower.go), clients read logs
// by cursors (subscribe.go), peers get their share through a durable outbox (peers.go), logs are let go of from their
// beginnings (retention.go), and revocations are followed up (revocation.go). All state is in one store, whose keys
// layout.go lists, but for users' assets, which are files (assets.go) and leave through a proxy (downloads.go,
// oblivious.go). A node whose disk fills up becomes read-only before the end (disk.go).
package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/node/store"
	"github.com/parley-mls/parley/transport"
	"github.com/parley-mls/parley/transport/pace"
)

const (
	shutdownTimeout = 5 * time.Second
	maintainEvery   = time.Hour // renewal of own certificates, sweeping, and removals from rooms
	retryRemovals   = 10 * time.Second
)

// Node is a provider's node.
type Node struct {
	cfg      Config
	log      *slog.Logger
	store    store.Store
	embedded *authority.Embedded
	service  authority.Service
	trust    *authority.TrustStore
	verifier *authority.Verifier
	keys     *nodeKeys
	metrics  *metrics

	incarnation uint64      // of the store; see heads.go
	restored    atomic.Bool // until the rooms are reconciled; see restore.go
	superseded  atomic.Bool // the node ends
	late        lateRooms
	ends        chan error // has what Run is to end with

	fences sync.Mutex        // held from reading a fence to raising it
	fenced map[string]uint64 // the last incarnations of hubs, by domain; guarded by fences

	uptime uptime

	endpoint   *transport.Endpoint
	gossip     *federation.Gossip
	outbox     *federation.Outbox
	consentOut *federation.Outbox
	federation *federation.Client
	admin      net.Listener

	auth           *auth
	listeners      *listeners
	welcomeNumbers *numbers
	claims         claims
	hubKeys        hubKeys
	reports        reports
	marks          marks
	recent         recent
	consentMu      sync.Mutex // held from reading consents to applying what changes them
	consentPace    pace.Limiter[string]
	queryPace      pace.Limiter[string]
	reportPace     pace.Limiter[string] // by user and by peer
	infoPace       pace.Limiter[string] // by user and by peer
	downloadPace   pace.Limiter[string]
	gateway        ohttp.Gateway
	relayed        relayedKeys
	peerRequests   pace.Limiter[string]
	peerBytes      pace.Limiter[string]
	created        createdRooms
	ephemerals     ephemerals
	push           *push
	profileMu      sync.Mutex // held from reading a profile to applying what changes it
	assets         *assets
	disk           *disk
	searching      chan struct{} // has a value while all profiles are searched
	ownBundle      atomic.Pointer[authority.Bundle]
	removals       chan struct{} // has a value if rooms are to be searched for clients to be removed

	trimming sync.Mutex // held while logs are trimmed

	roomsMu sync.Mutex
	rooms   map[mimi.URI]*room // guarded by roomsMu

	ctx        context.Context // of background work, ends with Run or Close
	cancel     context.CancelFunc
	background tasks
	presence   presence
	refusals   rate.Sometimes // how often refused peers are logged
	closed     sync.Once
}

// Open opens the node's store and authority, binds its port and its admin socket. The error says what to do if there is
// no authority yet. Whoever opens a node calls Run or Close.
func Open(cfg Config, log *slog.Logger) (*Node, error) {
	return open(cfg, log, func(o store.Options) (*store.Pebble, error) { return store.Open(StoreDir(cfg.Data), o) })
}

func open(cfg Config, log *slog.Logger, openStore func(store.Options) (*store.Pebble, error)) (*Node, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if _, err := os.Stat(AuthorityDir(cfg.Data)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no authority in %s: run parley-authority init -domain %s -data %s", cfg.Data, cfg.Domain, cfg.Data)
	}
	n := &Node{
		cfg: cfg, log: log, listeners: newListeners(), removals: make(chan struct{}, 1), ends: make(chan error, 1), searching: make(chan struct{}, 1),
		rooms:    make(map[mimi.URI]*room),
		presence: presence{alive: make(map[string]bool), greeting: make(map[string]bool)},
		refusals: rate.Sometimes{First: 5, Interval: 10 * time.Second},
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.disk = newDisk(cfg.Disk)
	db, err := openStore(store.Options{Log: log, BallastBytes: int64(n.disk.ballast), Full: n.disk.ranOut})
	if err == nil {
		n.store = db
		if n.disk.free, n.disk.refill = cfg.diskFree, db.Refill; n.disk.free == nil {
			n.disk.free = db.Free
		}
		err = n.open()
	}
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Node) open() error {
	var err error
	if err := n.checkDisk(); err != nil {
		return err
	}
	if err := checkFormat(n.store); err != nil {
		return err
	}
	if n.incarnation, err = openIncarnation(n.store); err != nil {
		return err
	}
	if err := n.openRestored(); err != nil {
		return err
	}
	if n.welcomeNumbers, err = openNumbers(n.store); err != nil {
		return err
	}
	if err := n.openUptime(); err != nil {
		return err
	}
	if n.embedded, err = authority.Open(AuthorityDir(n.cfg.Data), n.store, n.log); err != nil {
		return err
	}
	if n.embedded.Domain() != n.cfg.Domain {
		return fmt.Errorf("the authority in %s is that of %s, the configuration says %s", n.cfg.Data, n.embedded.Domain(), n.cfg.Domain)
	}
	n.service = n.embedded
	if n.trust, err = authority.OpenTrust(n.store, n.cfg.Domain); err != nil {
		return err
	}
	n.verifier = &authority.Verifier{Bundles: n.trust.Bundle, Time: n.now}
	if err := n.refreshOwn(n.ctx); err != nil {
		return err
	}
	for _, p := range n.cfg.Peers {
		f, err := p.fingerprint()
		if err != nil {
			return err
		}
		if err := n.trust.Approve(n.ctx, p.Domain, f, p.Address); err != nil {
			return err
		}
	}
	if n.keys, err = openKeys(n.ctx, keysDir(n.cfg.Data), n.cfg.Suites, n.service); err != nil {
		return err
	}
	if n.assets, err = openAssets(n.cfg.Data); err != nil {
		return err
	}
	if err := n.settleAssets(); err != nil {
		return err
	}
	n.auth = newAuth(n.cfg.Domain, n.verifier, n.cfg.Limits)
	n.metrics = newMetrics(n)
	n.push = newPush(n)
	if err := n.listen(); err != nil {
		return err
	}
	n.embedded.OnRevoke(n.revoked)
	n.embedded.OnBundle(func(*authority.Bundle) { n.bundleChanged() })
	return nil
}

// listen binds the ports and puts the handlers behind them.
func (n *Node) listen() error {
	certificate := func() (*tls.Certificate, error) { return n.keys.tls.Load(), nil }
	var err error
	n.endpoint, err = transport.Listen(transport.Config{
		Address: n.cfg.Listen, Domain: n.cfg.Domain, Certificate: certificate, VerifyPeer: n.trust.VerifyNode,
		OnRefused: n.refusedPeer, OnBusy: func() { n.metrics.refused.WithLabelValues("port", "busy").Inc() },
		StatelessResetKey: n.keys.reset, TokenKey: n.keys.token, Clients: n.clientHandler(), Log: n.log,
		MaxConnections: n.cfg.Limits.Connections, MaxAddressConnections: n.cfg.Limits.AddressConnections,
		HandshakesPerSecond: n.cfg.Limits.HandshakesPerSecond,
	})
	if err != nil {
		return err
	}
	if n.cfg.Advertise == "" {
		n.cfg.Advertise = n.endpoint.Addr().String()
	}
	if err := n.embedded.SetAddress(n.cfg.Advertise); err != nil {
		return err
	}
	n.federation = federation.NewClient(n.cfg.Domain, n.roundTripper)
	n.federation.OnHead = n.sawHead
	n.outbox, err = federation.NewOutbox(federation.OutboxConfig{
		Store: n.store, Prefix: prefixOutbox, Load: n.load, Send: n.send, Log: n.log,
		Bound: n.cfg.Limits.PeerQueue, Share: shareOf,
	})
	if err != nil {
		return err
	}
	n.consentOut, err = federation.NewOutbox(federation.OutboxConfig{
		Store: n.store, Prefix: prefixConsentOut, Load: n.loadConsent, Send: n.sendConsents, Log: n.log,
	})
	if err != nil {
		return err
	}
	observe := func(endpoint, code string) {
		if code != "" {
			n.metrics.refused.WithLabelValues(endpoint, code).Inc()
		}
	}
	n.endpoint.HandleHTTP(transport.ALPNFederation, federation.NewHandler(n.cfg.Domain, provider{n}, transport.PeerDomain, n.log, observe, n.admitPeer))
	n.gossip, err = federation.NewGossip(federation.GossipConfig{
		Endpoint: n.endpoint, Domain: n.cfg.Domain, Advertise: n.cfg.Advertise, Version: Version(), Certificate: certificate,
		Verify: n.trust.VerifyNode, Seeds: n.seeds, Store: n.store, OnPeer: n.peerSeen, OnUnapproved: n.unapprovedRecord,
		Log: n.log, Profile: n.cfg.Gossip,
	})
	if err != nil {
		return err
	}
	n.admin, err = listenAdmin(n.cfg.Socket())
	return err
}

func (n *Node) seeds() []federation.Seed {
	var seeds []federation.Seed
	for _, p := range n.trust.Peers() {
		seeds = append(seeds, federation.Seed{Domain: p.Domain, Address: p.Address})
	}
	return seeds
}

func (n *Node) refusedPeer(addr net.Addr, _ []*x509.Certificate, err error) {
	n.metrics.refused.WithLabelValues("tls", "unapproved").Inc()
	n.refusals.Do(func() { n.log.Warn("peer refused", "address", addr.String(), "err", err) })
}

func (n *Node) unapprovedRecord(r federation.Record) {
	n.log.Info("gossip introduces a node that isn't approved", "peer", r.Domain, "address", r.Address)
}

// Address returns the host:port at which peers and clients reach the node.
func (n *Node) Address() string { return n.cfg.Advertise }

// Domain returns the provider's domain.
func (n *Node) Domain() string { return n.cfg.Domain }

// Run serves until ctx ends, then lets requests that are under way finish for a few seconds, and closes the node.
func (n *Node) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var serving, gossiping sync.WaitGroup
	start := func(group *sync.WaitGroup, what string, f func(context.Context) error) {
		group.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				stop(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	start(&serving, "port", n.endpoint.Serve)
	start(&gossiping, "gossip", n.gossip.Run)
	settled := make(chan struct{})
	after := func(f func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			select {
			case <-settled:
				return f(ctx)
			case <-ctx.Done():
				return nil
			}
		}
	}
	start(&serving, "reconciling", func(ctx context.Context) error {
		if err := n.reconcile(ctx); err != nil {
			return err
		}
		close(settled)
		return nil
	})
	// What is sent has heads of the new incarnation, which would take the place of those that peers are asked for.
	start(&serving, "outbox", after(n.outbox.Run))
	start(&serving, "incarnation", func(ctx context.Context) error {
		select {
		case err := <-n.ends:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	start(&serving, "outbox of consents", after(n.consentOut.Run))
	start(&serving, "admin socket", n.serveAdmin)
	start(&serving, "maintenance", n.maintain)
	start(&serving, "bundles", n.refreshBundles)
	start(&serving, "push", n.push.run)
	start(&serving, "removals", after(n.serveRemovals))
	start(&serving, "disk", n.watchDisk)
	n.kickRemovals() // what a crash may have cut off
	n.pushBundle()
	n.log.Info("node runs", "domain", n.cfg.Domain, "listen", n.endpoint.Addr().String(), "advertise", n.cfg.Advertise,
		"fingerprint", n.embedded.Root(), "version", Version())

	<-ctx.Done()
	n.log.Info("node stops")
	n.listeners.end("", refuse("unavailable", "the node is stopping"))
	n.cancel()
	gossiping.Wait() // its good-bye needs the port
	limited, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := n.endpoint.Shutdown(limited); err != nil {
		n.log.Info("requests were cut off", "err", err)
	}
	serving.Wait()
	err := n.Close()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return errors.Join(cause, err)
	}
	return err
}

// Close releases a node that doesn't run. Run closes it itself.
func (n *Node) Close() error {
	var errs []error
	n.closed.Do(func() {
		n.cancel()
		n.background.wait()
		if n.admin != nil {
			if err := n.admin.Close(); !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
		if n.endpoint != nil {
			ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
			defer cancel()
			if err := n.endpoint.Shutdown(ctx); !errors.Is(err, transport.ErrClosed) {
				errs = append(errs, err)
			}
		}
		if n.embedded != nil {
			errs = append(errs, n.embedded.Close())
		}
		if n.assets != nil {
			errs = append(errs, n.assets.dir.Close())
		}
		if n.store != nil {
			if err := n.saveUptime(); err != nil {
				n.log.Info("the uptime isn't kept", "err", err)
			}
			errs = append(errs, n.store.Close())
		}
	})
	return errors.Join(errs...)
}

// maintain renews the node's own certificates and sweeps the store from time to time.
func (n *Node) maintain(ctx context.Context) error {
	for {
		if err := n.keys.renew(ctx); err != nil {
			n.log.Error("renewing certificates", "err", err)
		}
		if err := n.sweep(); err != nil {
			n.log.Error("sweeping the store", "err", err)
		}
		if err := n.saveUptime(); err != nil {
			n.log.Error("keeping the uptime", "err", err)
		}
		n.kickRemovals() // of who has expired, or is late
		select {
		case <-ctx.Done():
			return nil
		case <-n.disk.sweep:
		case <-time.After(maintainEvery):
		}
	}
}

// serveRemovals searches the hosted rooms for clients to be removed whenever trust has changed, and from time to time.
func (n *Node) serveRemovals(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.removals:
		}
		began := time.Now()
		err := n.proposeAll()
		// A peer that changes its bundle all the time doesn't keep the rooms locked all the time.
		pause := time.Since(began)
		if err != nil {
			n.log.Error("proposing removals", "err", err)
			n.kickRemovals()
			pause = retryRemovals
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// serveAdmin serves the admin socket.
func (n *Node) serveAdmin(ctx context.Context) error {
	s := &http.Server{Handler: n.adminHandler(), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		limited, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		if err := s.Shutdown(limited); err != nil {
			s.Close()
		}
	}()
	err := s.Serve(n.admin)
	if errors.Is(err, http.ErrServerClosed) {
		<-done
		return nil
	}
	return err
}

// Version returns the version that the program was built as.
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
