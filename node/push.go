package node

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"syscall"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/store"
)

// Push: a client that isn't connected is woken when a message waits for it, by an empty request to the endpoint that it has
// registered (UnifiedPush; RFC 8030, Section 5). The push service learns when, and nothing else. A wake-up may be lost, or
// be for nothing; another one comes with the first message after pushAgain.

const (
	maxPushEndpoint = 1000    // bytes of an endpoint's URL
	maxPushRooms    = 200_000 // memberships of sleeping clients that are kept; more clients are woken at once instead
	maxPushDue      = 10_000  // clients that wait to be woken
	maxPushing      = 16      // requests at a time
	maxPushingHost  = 2       // of them, to one host
	maxPushTries    = 3

	pushDelay   = 2 * time.Second // from a message to the wake-up: the client may be on its way
	pushAgain   = 10 * time.Minute
	pushRetry   = 10 * time.Second // after the first failure, twice as long after the next one
	pushTimeout = 10 * time.Second
)

// push wakes clients. Its zero value isn't ready: newPush makes one.
type push struct {
	n     *Node
	http  *http.Client
	delay time.Duration // pushDelay
	retry time.Duration // pushRetry
	kick  chan struct{} // has a value if there is something to look at

	mu       sync.Mutex
	clients  map[mimi.URI]*sleeper              // guarded by mu; those that have an endpoint
	rooms    map[mimi.URI]map[*sleeper]struct{} // guarded by mu; of clients that sleep
	size     int                                // guarded by mu; memberships in rooms
	dirty    map[mimi.URI]struct{}              // guarded by mu; rooms that have got something
	due      map[*sleeper]struct{}              // guarded by mu; to be woken
	pushing  int                                // guarded by mu
	perHost  map[string]int                     // guarded by mu
	requests sync.WaitGroup
}

// sleeper is a client that has an endpoint.
type sleeper struct {
	client   mimi.URI
	endpoint string
	host     string
	rooms    []mimi.URI // where it is in push.rooms
	asleep   bool       // it isn't connected
	notUntil time.Time  // it was woken; not again before
	at       time.Time  // when it is to be woken
	tries    int
}

func newPush(n *Node) *push {
	p := &push{
		n: n, delay: cmp.Or(n.cfg.pushDelay, pushDelay), retry: cmp.Or(n.cfg.pushRetry, pushRetry), kick: make(chan struct{}, 1), clients: make(map[mimi.URI]*sleeper), rooms: make(map[mimi.URI]map[*sleeper]struct{}),
		dirty: make(map[mimi.URI]struct{}), due: make(map[*sleeper]struct{}), perHost: make(map[string]int),
	}
	dialer := &net.Dialer{Timeout: pushTimeout}
	if n.cfg.Push != PushPrivate {
		dialer.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error { return publicAddress(address) }
	}
	p.http = &http.Client{
		Timeout: pushTimeout,
		Transport: &http.Transport{
			DialContext: dialer.DialContext, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: n.cfg.pushRoots},
			TLSHandshakeTimeout: pushTimeout, ResponseHeaderTimeout: pushTimeout, MaxResponseHeaderBytes: 16 << 10, DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return p
}

// notPublic are the networks beside those that package netip knows to which no endpoint on the Internet belongs, and those
// that lead to an IPv4 address.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("fec0::/10"),
}

// publicAddress refuses an address, host:port as it is dialled, that isn't one on the Internet. It judges what a name has
// led to, so that no name leads to this machine or its neighbours.
func publicAddress(address string) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := a.Addr().Unmap()
	bad := !ip.IsGlobalUnicast() || ip.IsPrivate()
	for _, p := range notPublic {
		bad = bad || p.Contains(ip.WithZone(""))
	}
	if bad {
		return fmt.Errorf("%s isn't a public address", ip)
	}
	return nil
}

// parseEndpoint checks the URL of an endpoint and returns its host.
func parseEndpoint(endpoint string) (host string, err error) {
	if len(endpoint) > maxPushEndpoint {
		return "", refuse("tooLarge", "an endpoint of %d bytes, at most %d", len(endpoint), maxPushEndpoint)
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		return "", refuse("malformed", "an endpoint is an https URL")
	}
	return u.Hostname(), nil
}

// register notes, durably, where a client is woken; nowhere if endpoint is empty.
func (n *Node) registerPush(client mimi.URI, endpoint string) error {
	if endpoint != "" {
		if err := n.disk.grow(); err != nil {
			return err
		}
		if n.cfg.Push == PushOff {
			return refuse("notAllowed", "this node wakes nobody")
		}
		host, err := parseEndpoint(endpoint)
		if err != nil {
			return err
		}
		if ip, err := netip.ParseAddr(host); err == nil && n.cfg.Push != PushPrivate {
			if err := publicAddress(netip.AddrPortFrom(ip, 443).String()); err != nil {
				return refuse("notAllowed", "the endpoint: %v", err)
			}
		}
	}
	var value []byte
	if endpoint != "" {
		value = []byte(endpoint)
	}
	if _, err := n.store.Commit(map[string][]byte{string(key(prefixPush, client)): value}, nil); err != nil {
		return err
	}
	return n.push.set(client, endpoint)
}

// set takes another endpoint of a client into account.
func (p *push) set(client mimi.URI, endpoint string) error {
	p.mu.Lock()
	if s := p.clients[client]; s != nil {
		p.awake(s)
		delete(p.clients, client)
	}
	if endpoint != "" {
		host, err := parseEndpoint(endpoint)
		if err != nil {
			p.mu.Unlock()
			return err
		}
		p.clients[client] = &sleeper{client: client, endpoint: endpoint, host: host}
	}
	p.mu.Unlock()
	if endpoint == "" || p.n.listeners.connected(client) {
		return nil
	}
	return p.sleeps(client, false)
}

// load reads the endpoints from the store; everybody sleeps.
func (p *push) load() error {
	var list []*sleeper
	if err := store.ScanPrefix(p.n.store, []byte(prefixPush), func(k, v []byte) bool {
		if len(k) > 0 {
			list = append(list, &sleeper{client: mimi.URI(k[:len(k)-1]), endpoint: string(v)})
		}
		return true
	}); err != nil {
		return err
	}
	for _, s := range list {
		if err := p.set(s.client, s.endpoint); err != nil {
			p.n.log.Warn("a client's push endpoint can't be used", "client", s.client, "err", err)
		}
	}
	return nil
}

// wakes notes that a client is connected.
func (p *push) wakes(client mimi.URI) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.clients[client]; s != nil {
		p.awake(s)
		s.notUntil = time.Time{}
	}
}

// awake takes a client out of what is watched; mu is held.
func (p *push) awake(s *sleeper) {
	for _, r := range s.rooms {
		if delete(p.rooms[r], s); len(p.rooms[r]) == 0 {
			delete(p.rooms, r)
			delete(p.dirty, r)
		}
	}
	p.size -= len(s.rooms)
	s.rooms, s.asleep, s.tries = nil, false, 0
	delete(p.due, s)
}

// sleeps notes that a client isn't connected: its rooms are watched. If it was until now, it is woken at once where it
// hasn't got everything: what was sent to it may not have arrived.
func (p *push) sleeps(client mimi.URI, until bool) error {
	p.mu.Lock()
	_, ok := p.clients[client]
	p.mu.Unlock()
	if !ok {
		return nil
	}
	members, err := p.n.members(client)
	if err != nil {
		return err
	}
	waits := false
	for uri, m := range members {
		if until && !waits && m.end == 0 {
			if waits, err = p.n.waits(client, uri); err != nil {
				return err
			}
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.clients[client]
	if s == nil || s.asleep || p.n.listeners.connected(client) {
		return nil
	}
	s.asleep = true
	if waits {
		p.want(s)
		p.look()
	}
	if p.size+len(members) > maxPushRooms {
		p.want(s)
		p.look()
		return nil
	}
	for uri, m := range members {
		if m.end != 0 {
			continue
		}
		if p.rooms[uri] == nil {
			p.rooms[uri] = make(map[*sleeper]struct{})
		}
		p.rooms[uri][s] = struct{}{}
		s.rooms = append(s.rooms, uri)
	}
	p.size += len(s.rooms)
	return nil
}

// waits says whether a room's log has more than a client said that it has.
func (n *Node) waits(client, uri mimi.URI) (bool, error) {
	r, err := n.openRoom(uri)
	if err != nil || r == nil {
		return false, err
	}
	acked, err := n.acked(client, uri)
	return acked < r.durable.Load(), err
}

// room says that a room's log has grown. It costs the same however many sleep.
func (p *push) room(uri mimi.URI) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, already := p.dirty[uri]; !already && p.rooms[uri] != nil {
		p.dirty[uri] = struct{}{}
		p.look()
	}
}

// client says that something other than an entry of a log waits for a client.
func (p *push) client(client mimi.URI) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.clients[client]; s != nil && s.asleep {
		p.want(s)
		p.look()
	}
}

func (p *push) look() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// want has a client woken soon, unless it was lately or too many are to be; mu is held.
func (p *push) want(s *sleeper) {
	if _, already := p.due[s]; already || len(p.due) >= maxPushDue || time.Now().Before(s.notUntil) {
		return
	}
	s.at, s.tries = time.Now().Add(p.delay), 0
	p.due[s] = struct{}{}
}

// run wakes clients until ctx ends.
func (p *push) run(ctx context.Context) error {
	if err := p.load(); err != nil {
		return err
	}
	defer p.requests.Wait()
	for {
		timer := time.NewTimer(p.next(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-p.kick:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// next begins the requests that are due and possible, and returns when to look again at the latest.
func (p *push) next(ctx context.Context) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uri := range p.dirty {
		for s := range p.rooms[uri] {
			p.want(s)
		}
	}
	clear(p.dirty)
	now, wait := time.Now(), time.Hour
	for s := range p.due {
		if left := s.at.Sub(now); left > 0 {
			wait = min(wait, left)
			continue
		}
		if p.pushing >= maxPushing || p.perHost[s.host] >= maxPushingHost {
			continue // the end of a request has this looked at again
		}
		delete(p.due, s)
		p.pushing++
		p.perHost[s.host]++
		p.requests.Go(func() { p.wake(ctx, s, s.endpoint) })
	}
	return wait
}

// wake sends one wake-up.
func (p *push) wake(ctx context.Context, s *sleeper, endpoint string) {
	status, err := p.post(ctx, endpoint)
	p.n.metrics.pushed.WithLabelValues(pushResult(status, err)).Inc()
	gone := status == http.StatusNotFound || status == http.StatusGone
	if gone {
		if err := p.forget(s); err != nil {
			p.n.log.Error("forgetting a push endpoint", "client", s.client, "err", err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.look()
	p.pushing--
	if p.perHost[s.host]--; p.perHost[s.host] == 0 {
		delete(p.perHost, s.host)
	}
	if !s.asleep || gone {
		return
	}
	s.tries++
	passing := err != nil || status >= 500 || status == http.StatusTooManyRequests
	if passing && s.tries < maxPushTries && len(p.due) < maxPushDue {
		pause := p.retry << (s.tries - 1)
		s.at = time.Now().Add(pause + rand.N(pause/2))
		p.due[s] = struct{}{}
		return
	}
	s.notUntil = time.Now().Add(pushAgain)
}

// pushResult is a metric's label.
func pushResult(status int, err error) string {
	switch {
	case err != nil:
		return "unreachable"
	case status >= 200 && status < 300:
		return "sent"
	}
	return "refused"
}

// post sends an empty request and returns the answer's status.
func (p *push) post(ctx context.Context, endpoint string) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("TTL", "86400") // s for which the push service keeps it (RFC 8030, Section 5.2)
	req.Header.Set("Urgency", "high")
	resp, err := p.http.Do(req)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10))
	return resp.StatusCode, errors.Join(err, resp.Body.Close())
}

// forget deletes an endpoint that its push service doesn't know any more, unless the client has a new one.
func (p *push) forget(s *sleeper) error {
	p.mu.Lock()
	if p.clients[s.client] == s {
		p.awake(s)
		delete(p.clients, s.client)
	}
	p.mu.Unlock()
	k := string(key(prefixPush, s.client))
	_, err := p.n.store.Commit(map[string][]byte{k: nil}, map[string][]byte{k: []byte(s.endpoint)})
	return err
}
