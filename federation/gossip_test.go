package federation

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/parley-mls/parley/transport"
)

// memStore is a Store in memory. It survives the restarts of a testNode.
type memStore struct {
	mu sync.Mutex
	m  map[string][]byte
}

func (s *memStore) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.m[string(key)]), nil
}

func (s *memStore) Scan(start, end []byte, fn func(key, value []byte) bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range slices.Sorted(maps.Keys(s.m)) {
		if k >= string(start) && k < string(end) && !fn([]byte(k), s.m[k]) {
			break
		}
	}
	return nil
}

func (s *memStore) Commit(changes, expect map[string][]byte) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, v := range expect {
		if have, ok := s.m[k]; ok != (v != nil) || !bytes.Equal(have, v) {
			return false, nil
		}
	}
	for k, v := range changes {
		if v == nil {
			delete(s.m, k)
		} else {
			s.m[k] = bytes.Clone(v)
		}
	}
	return true, nil
}

func (s *memStore) Delete(keys ...[]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		delete(s.m, string(k))
	}
	return nil
}

// testCA issues the node certificates of one domain.
type testCA struct {
	domain string
	root   *x509.Certificate
	key    *ecdsa.PrivateKey
}

func newTestCA(t testing.TB, domain string) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain + " root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{domain: domain, root: root, key: key}
}

func (ca *testCA) issue(t testing.TB) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{ca.domain}, NotBefore: ca.root.NotBefore, NotAfter: ca.root.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca.root, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, ca.root.Raw}, PrivateKey: key}
}

// testTrust is what one provider approves: roots, and addresses where the operator gave one.
type testTrust struct {
	mu    sync.Mutex
	roots map[[32]byte]string
	seeds map[string]string
}

func (tr *testTrust) verify(chain []*x509.Certificate) (string, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	root := chain[len(chain)-1]
	domain, ok := tr.roots[sha256.Sum256(root.Raw)]
	if !ok {
		return "", errors.New("root not approved")
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: domain, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return "", err
	}
	return domain, nil
}

func (tr *testTrust) list() (all []Seed) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for d, a := range tr.seeds {
		all = append(all, Seed{Domain: d, Address: a})
	}
	return all
}

// testNode is a node's transport and gossip on loopback.
type testNode struct {
	t        testing.TB
	ca       *testCA
	cert     *tls.Certificate
	trust    *testTrust
	store    *memStore
	address  string // after the first start
	endpoint *transport.Endpoint
	gossip   *Gossip
	came     chan string // domains that OnPeer said are alive
	heard    chan Record // OnUnapproved
	kill     func()
	stop     func()
}

func newTestNode(t testing.TB, domain string) *testNode {
	n := &testNode{
		t: t, ca: newTestCA(t, domain), store: &memStore{m: make(map[string][]byte)},
		trust: &testTrust{roots: make(map[[32]byte]string), seeds: make(map[string]string)},
		came:  make(chan string, 1024), heard: make(chan Record, 1024),
	}
	n.cert = n.ca.issue(t)
	return n
}

// start runs the node, at its old address if it ran before.
func (n *testNode) start() {
	n.t.Helper()
	address := n.address
	if address == "" {
		address = "127.0.0.1:0"
	}
	e, err := transport.Listen(transport.Config{
		Address: address, Domain: n.ca.domain, VerifyPeer: n.trust.verify,
		Certificate:       func() (*tls.Certificate, error) { return n.cert, nil },
		StatelessResetKey: sha256.Sum256([]byte("reset " + n.ca.domain)), TokenKey: sha256.Sum256([]byte("token " + n.ca.domain)),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.address, n.endpoint = e.Addr().String(), e
	n.gossip, err = NewGossip(GossipConfig{
		Endpoint: e, Domain: n.ca.domain, Advertise: n.address, Version: "test", Profile: "local",
		Certificate: func() (*tls.Certificate, error) { return n.cert, nil },
		Verify:      n.trust.verify, Seeds: n.trust.list, Store: n.store,
		OnPeer: func(domain, _ string, alive bool) {
			if alive {
				n.came <- domain
			}
		},
		OnUnapproved: func(r Record) { n.heard <- r },
	})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := e.Serve(ctx); err != nil {
			n.t.Error(err)
		}
	})
	wg.Go(func() {
		if err := n.gossip.Run(ctx); err != nil {
			n.t.Error(err)
		}
	})
	var once sync.Once
	down := func(silently bool) func() {
		return func() {
			once.Do(func() {
				bound, done := context.WithTimeout(context.Background(), 5*time.Second)
				defer done()
				if silently {
					expired, end := context.WithCancel(bound)
					end()
					e.Shutdown(expired) // the port is gone before gossip can say good-bye
				}
				cancel()
				wg.Wait()
				if err := e.Shutdown(bound); err != nil {
					n.t.Error(err)
				}
			})
		}
	}
	n.kill, n.stop = down(true), down(false)
	n.t.Cleanup(n.stop)
}

// approve has n approve a peer, with its address or without.
func (n *testNode) approve(peer *testNode, address string) {
	n.trust.mu.Lock()
	n.trust.roots[sha256.Sum256(peer.ca.root.Raw)] = peer.ca.domain
	n.trust.seeds[peer.ca.domain] = address
	n.trust.mu.Unlock()
	if n.gossip != nil {
		n.gossip.Refresh()
	}
}

func (n *testNode) remove(peer *testNode) {
	n.trust.mu.Lock()
	delete(n.trust.roots, sha256.Sum256(peer.ca.root.Raw))
	delete(n.trust.seeds, peer.ca.domain)
	n.trust.mu.Unlock()
	n.gossip.Refresh()
}

// sees says whether n holds peer alive, by memberlist and by state, and knows its address.
func (n *testNode) sees(peer *testNode) bool {
	n.gossip.mu.Lock()
	defer n.gossip.mu.Unlock()
	p := n.gossip.peers[peer.ca.domain]
	return p != nil && n.gossip.alive[p.domain] && p.state == StateAlive && p.record != nil && p.record.Address == peer.address
}

// within polls for what has no event, and returns how long it took.
func within(t testing.TB, bound time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !ok() {
		if time.Since(begin) > bound {
			t.Fatalf("not within %v: %s", bound, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return time.Since(begin)
}

func converged(nodes ...*testNode) func() bool {
	return func() bool {
		for _, a := range nodes {
			for _, b := range nodes {
				if a != b && !a.sees(b) {
					return false
				}
			}
		}
		return true
	}
}

// trio starts three nodes that approve each other, each knowing the address of alpha alone.
func trio(t testing.TB) (alpha, beta, gamma *testNode) {
	alpha, beta, gamma = newTestNode(t, "alpha.example"), newTestNode(t, "beta.example"), newTestNode(t, "gamma.example")
	nodes := []*testNode{alpha, beta, gamma}
	for _, n := range nodes {
		n.start()
	}
	for _, n := range nodes {
		for _, p := range nodes {
			address := ""
			if p == alpha {
				address = alpha.address
			}
			if n != p {
				n.approve(p, address)
			}
		}
	}
	d := within(t, 10*time.Second, "three nodes see each other", converged(nodes...))
	t.Logf("converged in %v", d)
	return alpha, beta, gamma
}

func TestThreeNodesConvergeFromOneAddress(t *testing.T) {
	alpha, beta, gamma := trio(t)
	// beta and gamma found each other's address in the records that alpha relayed.
	if a, ok := beta.gossip.Address("gamma.example"); !ok || a != gamma.address {
		t.Errorf("beta reaches gamma at %q, %t", a, ok)
	}
	members := alpha.gossip.Members()
	if len(members) != 2 || members[0].Domain != "beta.example" || members[0].State != StateAlive || members[0].Version != "test" ||
		members[1].Domain != "gamma.example" {
		t.Errorf("members of alpha: %+v", members)
	}
}

func TestKilledNodeIsNoticedWhenItReturns(t *testing.T) {
	alpha, beta, gamma := trio(t)
	beta.kill()
	drain(alpha.came)
	drain(gamma.came)
	within(t, 20*time.Second, "beta is found dead", func() bool { return !alpha.sees(beta) && !gamma.sees(beta) })
	if a, ok := alpha.gossip.Address("beta.example"); !ok || a != beta.address {
		t.Errorf("alpha forgot beta's address: %q", a)
	}
	beta.start()
	begin := time.Now()
	for _, n := range []*testNode{alpha, gamma} {
		await(t, n.came, "beta.example")
	}
	t.Logf("noticed in %v", time.Since(begin))
	d := within(t, 5*time.Second, "all see each other again", converged(alpha, beta, gamma))
	t.Logf("converged again in %v", d)
}

func TestQuickRestartIsNoticed(t *testing.T) {
	alpha, beta, gamma := trio(t)
	time.Sleep(50 * time.Millisecond) // let the first news settle, so that what comes is about the restart
	beta.kill()
	drain(alpha.came)
	drain(gamma.came)
	beta.start()
	begin := time.Now()
	await(t, alpha.came, "beta.example")
	await(t, gamma.came, "beta.example")
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("noticed after %v", d)
	}
	within(t, 5*time.Second, "all see each other again", converged(alpha, beta, gamma))
}

func drain[T any](c chan T) {
	for {
		select {
		case <-c:
		default:
			return
		}
	}
}

func await(t testing.TB, c chan string, want string) {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case got := <-c:
			if got == want {
				return
			}
		case <-timeout:
			t.Fatalf("no news of %s", want)
		}
	}
}

func TestGoodByeIsTakenAsLeaving(t *testing.T) {
	alpha, beta, _ := trio(t)
	beta.stop()
	within(t, 5*time.Second, "alpha knows that beta left", func() bool {
		return slices.ContainsFunc(alpha.gossip.Members(), func(m Member) bool { return m.Domain == "beta.example" && m.State == StateLeft })
	})
}

func TestRestartedNodeFindsPeersWithoutSeeds(t *testing.T) {
	alpha, beta, _ := trio(t)
	beta.stop()
	beta.trust.mu.Lock()
	beta.trust.seeds["alpha.example"] = ""
	beta.trust.mu.Unlock()
	// alpha can't help: it has lost beta's address with everything else.
	alpha.stop()
	alpha.store = &memStore{m: make(map[string][]byte)}
	alpha.trust.mu.Lock()
	clear(alpha.trust.seeds)
	alpha.trust.mu.Unlock()
	alpha.start()
	beta.start()
	within(t, 10*time.Second, "beta finds alpha", func() bool { return beta.sees(alpha) && alpha.sees(beta) })
}

func TestNodeThatLostItsStoreOutgrowsItsOldRecord(t *testing.T) {
	alpha, beta, gamma := trio(t)
	for range 2 { // so that the old incarnation is well ahead
		beta.stop()
		beta.start()
		within(t, 10*time.Second, "beta is back", converged(alpha, beta, gamma))
	}
	beta.stop()
	beta.store = &memStore{m: make(map[string][]byte)}
	beta.start()
	within(t, 10*time.Second, "the amnesiac is seen by all", func() bool {
		alpha.gossip.mu.Lock()
		p := alpha.gossip.peers["beta.example"]
		renewed := p != nil && p.record != nil && p.record.Incarnation > 3
		alpha.gossip.mu.Unlock()
		return renewed && converged(alpha, beta, gamma)()
	})
}

func TestUnapprovedNodeIsListedAndNeverAMember(t *testing.T) {
	alpha, beta, gamma := newTestNode(t, "alpha.example"), newTestNode(t, "beta.example"), newTestNode(t, "gamma.example")
	for _, n := range []*testNode{alpha, beta, gamma} {
		n.start()
	}
	alpha.approve(beta, beta.address)
	alpha.approve(gamma, gamma.address)
	beta.approve(alpha, "")
	gamma.approve(alpha, "")
	within(t, 10*time.Second, "pairs converge", func() bool { return converged(alpha, beta)() && converged(alpha, gamma)() })
	select {
	case r := <-beta.heard:
		if r.Domain != "gamma.example" || r.Address != gamma.address || !bytes.Equal(r.Chain[len(r.Chain)-1], gamma.ca.root.Raw) {
			t.Errorf("beta heard of %s at %s", r.Domain, r.Address)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("beta didn't hear of gamma")
	}
	if u := beta.gossip.Unapproved(); len(u) != 1 || u[0].Domain != "gamma.example" {
		t.Errorf("unapproved at beta: %v", u)
	}
	if _, ok := beta.gossip.Address("gamma.example"); ok {
		t.Error("beta has an address of a node that it doesn't approve")
	}
	for _, m := range beta.memberNames() {
		if m == "gamma.example" {
			t.Error("an unapproved node got into memberlist")
		}
	}

	// Approval by fingerprint alone: the address is in the record that alpha relayed.
	gamma.approve(beta, "")
	beta.approve(gamma, "")
	d := within(t, 5*time.Second, "beta and gamma see each other", converged(alpha, beta, gamma))
	t.Logf("converged in %v after the second approval", d)
	if u := beta.gossip.Unapproved(); len(u) != 0 {
		t.Errorf("still unapproved at beta: %v", u)
	}
}

func (n *testNode) memberNames() (names []string) {
	n.gossip.mu.Lock()
	members := n.gossip.members
	n.gossip.mu.Unlock()
	for _, m := range members.Members() {
		names = append(names, m.Name)
	}
	return names
}

func TestRemovedPeerIsCutOff(t *testing.T) {
	alpha, beta, gamma := trio(t)
	alpha.remove(beta)
	if _, ok := alpha.gossip.Address("beta.example"); ok {
		t.Error("alpha still has beta's address")
	}
	within(t, 5*time.Second, "no connection between alpha and beta", func() bool {
		return alpha.gossip.link("beta.example") == nil && beta.gossip.link("alpha.example") == nil
	})
	if _, err := beta.endpoint.Dial(t.Context(), alpha.address, "alpha.example", transport.ALPNGossip); err == nil {
		within(t, 5*time.Second, "beta is refused", func() bool { return beta.gossip.link("alpha.example") == nil })
	}
	if !gamma.sees(alpha) || !alpha.sees(gamma) {
		t.Error("gamma suffers from what alpha did to beta")
	}
	// And back again.
	alpha.approve(beta, "")
	within(t, 10*time.Second, "beta is back", converged(alpha, beta, gamma))
}

func TestRenewedCertificateMakesNewRecord(t *testing.T) {
	alpha, beta, gamma := trio(t)
	before := beta.recordOf(alpha)
	alpha.gossip.mu.Lock()
	alpha.gossip.own.Chain = [][]byte{alpha.ca.issue(t).Certificate[0], alpha.ca.root.Raw} // as if the certificate were another since
	alpha.gossip.mu.Unlock()
	alpha.gossip.filter.exhausted() // the timer's or the filter's request
	within(t, 5*time.Second, "beta and gamma have alpha's new record", func() bool {
		return beta.recordOf(alpha) > before && gamma.recordOf(alpha) > before
	})
	within(t, 5*time.Second, "all see each other under the new incarnation", converged(alpha, beta, gamma))
	// memberlist's incarnation followed: a good-bye under the new record is believed.
	alpha.stop()
	within(t, 5*time.Second, "beta knows that alpha left", func() bool {
		return slices.ContainsFunc(beta.gossip.Members(), func(m Member) bool { return m.Domain == "alpha.example" && m.State == StateLeft })
	})
}

func (n *testNode) recordOf(peer *testNode) uint64 {
	n.gossip.mu.Lock()
	defer n.gossip.mu.Unlock()
	if p := n.gossip.peers[peer.ca.domain]; p != nil && p.record != nil {
		return p.record.Incarnation
	}
	return 0
}

func TestPeerCannotFillTheListOfUnapproved(t *testing.T) {
	g := &Gossip{filter: newFilter("alpha.example"), unapproved: make(map[recordID]*heardRecord)}
	g.cfg.OnUnapproved = func(Record) {}
	g.log = slog.New(slog.DiscardHandler)
	for i := range 3 * maxUnapprovedPerPeer {
		g.keepUnapproved(Record{Domain: fmt.Sprintf("n%d.example", i), Incarnation: 1}, "beta.example")
	}
	g.keepUnapproved(Record{Domain: "gamma.example", Incarnation: 1}, "delta.example")
	if got := len(g.Unapproved()); got != maxUnapprovedPerPeer+1 {
		t.Errorf("%d records are held, want %d", got, maxUnapprovedPerPeer+1)
	}
	if g.Dropped() != 2*maxUnapprovedPerPeer {
		t.Errorf("%d dropped", g.Dropped())
	}
}

func TestGossipRefusesBadConfiguration(t *testing.T) {
	n := newTestNode(t, "alpha.example")
	n.start()
	good := n.gossip.cfg
	for name, change := range map[string]func(*GossipConfig){
		"no store":              func(c *GossipConfig) { c.Store = nil },
		"domain":                func(c *GossipConfig) { c.Domain = "Alpha.example" },
		"advertised port":       func(c *GossipConfig) { c.Advertise = "alpha.example:0" },
		"advertised host":       func(c *GossipConfig) { c.Advertise = "0.0.0.0:4443" },
		"profile":               func(c *GossipConfig) { c.Profile = "moon" },
		"another's certificate": func(c *GossipConfig) { c.Domain = "beta.example" },
	} {
		cfg := good
		change(&cfg)
		if _, err := NewGossip(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
