package node

import (
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// pushService is a push service on loopback.
type pushService struct {
	*httptest.Server
	mu     sync.Mutex
	got    []string // what requests carried
	status int
}

func newPushService(t *testing.T) *pushService {
	s := &pushService{status: http.StatusCreated}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.got = append(s.got, fmt.Sprintf("%s %s %q ttl %s", r.Method, r.URL, body, r.Header.Get("TTL")))
		if s.status == http.StatusFound {
			w.Header().Set("Location", "/elsewhere")
		}
		w.WriteHeader(s.status)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *pushService) answer(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = status
}

func (s *pushService) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string{}, s.got...)
}

// newPushing is a node that uses the service, with alice and bob in a room.
func newPushing(t *testing.T, s *pushService, push string) (n *testNode, alice, bob *testClient, bobs *events) {
	t.Helper()
	n = newNode(t, "alpha")
	n.stop()
	n.cfg.Push, n.cfg.pushRoots, n.cfg.pushDelay, n.cfg.pushRetry = push, x509.NewCertPool(), 20*time.Millisecond, 20*time.Millisecond
	n.cfg.pushRoots.AddCert(s.Certificate())
	n.start()
	alice, bob = newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	bob.publish(2)
	bobs = bob.subscribe()
	bobs.live()
	alice.createRoom()
	alices := alice.subscribe()
	alices.live()
	seq := alice.commit(alice.adding(bob.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.group != nil })
	return n, alice, bob, bobs
}

func (c *testClient) registerPush(endpoint string) error {
	_, err := c.api.RegisterPush(c.t.Context(), connect.NewRequest(&api.RegisterPushRequest{Endpoint: endpoint}))
	return err
}

// away ends the client's stream once it has said that it has everything.
func (e *events) away() {
	e.c.t.Helper()
	must(e.c.api.Acknowledge(e.c.t.Context(), connect.NewRequest(&api.AcknowledgeRequest{
		Welcome: e.c.welcome, Cursors: []*api.Cursor{{Room: string(e.c.room), Seq: e.c.seq}},
	})))(e.c.t)
	e.cancel()
	eventually(e.c.t, func() error {
		if e.c.node.listeners.connected(e.c.uri) {
			return fmt.Errorf("%s is still connected", e.c.uri)
		}
		return nil
	})
}

// asleep waits until the node watches the client's rooms.
func (n *testNode) asleep(c *testClient) {
	n.t.Helper()
	eventually(n.t, func() error {
		n.push.mu.Lock()
		defer n.push.mu.Unlock()
		if s := n.push.clients[c.uri]; s == nil || !s.asleep {
			return fmt.Errorf("%s isn't known to sleep", c.uri)
		}
		return nil
	})
}

func wakeUps(t *testing.T, s *pushService, n int) {
	t.Helper()
	eventually(t, func() error {
		if got := s.requests(); len(got) < n {
			return fmt.Errorf("%d wake-ups, want %d", len(got), n)
		}
		return nil
	})
	if got := s.requests(); len(got) != n {
		t.Errorf("%d wake-ups, want %d: %q", len(got), n, got)
	}
}

func TestASleepingClientIsWokenOnceByWhatWaits(t *testing.T) {
	s := newPushService(t)
	n, alice, bob, bobs := newPushing(t, s, PushPrivate)
	if err := bob.registerPush(s.URL + "/bob"); err != nil {
		t.Fatal(err)
	}
	last := alice.send("while bob is connected")
	bobs.until(func() bool { return bob.seq >= last })
	bobs.away()
	n.asleep(bob)
	for range 5 {
		last = alice.send("while bob is away")
	}
	wakeUps(t, s, 1)
	if got, want := s.requests()[0], `POST /bob "" ttl 86400`; got != want {
		t.Errorf("the request is %s, want %s", got, want)
	}
	alice.send("he was woken already")

	bobs = bob.subscribe()
	bobs.until(func() bool { return bob.seq >= last+1 })
	bobs.away()
	n.stop()
	n.start() // the endpoint is kept
	alice.connect()
	alice.authenticate()
	bob.connect()
	bob.authenticate()
	n.asleep(bob)
	wakeUps(t, s, 1)
	last = alice.send("after he was here")
	wakeUps(t, s, 2)

	// Who went away without having got everything doesn't wait for the next message.
	bobs = bob.subscribe()
	bobs.until(func() bool { return bob.seq >= last })
	bobs.cancel()
	wakeUps(t, s, 3)

	bobs = bob.subscribe()
	bobs.live()
	if err := bob.registerPush(""); err != nil {
		t.Fatal(err)
	}
	bobs.away()
	alice.send("nobody is woken")
	if b := must(n.store.Get(key(prefixPush, bob.uri)))(t); b != nil {
		t.Errorf("the endpoint is still there: %s", b)
	}
	wakeUps(t, s, 3)
}

func TestPushServicesThatFailAreLeftAlone(t *testing.T) {
	s := newPushService(t)
	n, alice, bob, bobs := newPushing(t, s, PushPrivate)
	if err := bob.registerPush(s.URL + "/bob"); err != nil {
		t.Fatal(err)
	}
	s.answer(http.StatusInternalServerError)
	bobs.away()
	n.asleep(bob)
	alice.send("one")
	settled := func() error {
		n.push.mu.Lock()
		defer n.push.mu.Unlock()
		if x := n.push.clients[bob.uri]; x == nil || x.notUntil.IsZero() {
			return fmt.Errorf("it isn't given up yet: %+v", x)
		}
		return nil
	}
	eventually(t, settled)
	wakeUps(t, s, maxPushTries)

	again := func(last uint64) {
		bobs = bob.subscribe()
		bobs.until(func() bool { return bob.seq >= last })
		bobs.away()
		n.asleep(bob)
	}
	// A redirect isn't followed, nor tried again.
	s.answer(http.StatusFound)
	again(bob.seq + 1)
	last := alice.send("two")
	eventually(t, settled)
	wakeUps(t, s, maxPushTries+1)

	s.answer(http.StatusGone)
	again(last)
	alice.send("three")
	eventually(t, func() error {
		if b, err := n.store.Get(key(prefixPush, bob.uri)); err != nil || b != nil {
			return fmt.Errorf("the endpoint is still there: %s, %v", b, err)
		}
		return nil
	})
	wakeUps(t, s, maxPushTries+2)
	text := must(DialAdmin(n.cfg.Socket()).Metrics(t.Context()))(t)
	if want := fmt.Sprintf(`parley_pushed_total{result="refused"} %d`, maxPushTries+2); !strings.Contains(text, want) {
		t.Errorf("the metrics have no line %s", want)
	}
}

// TestEndpointsLeadToTheInternetOnly has a name lead to this machine.
func TestEndpointsLeadToTheInternetOnly(t *testing.T) {
	s := newPushService(t)
	n, alice, bob, bobs := newPushing(t, s, PushPublic)
	for _, u := range []string{
		"http://push.example/x", "https://", "ftp://push.example/x", "https://user@push.example/x", "https://push.example/x#y", "push.example", "https://%zz",
	} {
		if err := bob.registerPush(u); code(err) != "malformed" {
			t.Errorf("%s: %v", u, err)
		}
	}
	if err := bob.registerPush("https://push.example/" + strings.Repeat("x", maxPushEndpoint)); code(err) != "tooLarge" {
		t.Errorf("a long one: %v", err)
	}
	for _, u := range []string{s.URL, "https://10.0.0.1/x", "https://[::1]:7440/x", "https://169.254.169.254/latest"} {
		if err := bob.registerPush(u); code(err) != "notAllowed" {
			t.Errorf("%s: %v", u, err)
		}
	}
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "https://"), ":")
	if err := bob.registerPush("https://localhost:" + port + "/x"); err != nil {
		t.Fatal(err)
	}
	bobs.away()
	n.asleep(bob)
	alice.send("one")
	eventually(t, func() error {
		text := must(DialAdmin(n.cfg.Socket()).Metrics(t.Context()))(t)
		if want := fmt.Sprintf(`parley_pushed_total{result="unreachable"} %d`, maxPushTries); !strings.Contains(text, want) {
			return fmt.Errorf("the metrics have no line %s", want)
		}
		return nil
	})
	if got := s.requests(); len(got) != 0 {
		t.Errorf("requests reached this machine: %q", got)
	}
	for _, a := range []string{
		"127.0.0.1:1", "10.1.2.3:1", "192.168.0.1:1", "172.16.0.1:1", "169.254.169.254:1", "0.0.0.0:1", "100.64.0.1:1", "224.0.0.1:1", "255.255.255.255:1",
		"[::]:1", "[::1]:1", "[fe80::1%eth0]:1", "[fd00::1]:1", "[::ffff:127.0.0.1]:1", "[64:ff9b::7f00:1]:1", "[2002:7f00:1::]:1", "[ff02::1]:1", "nonsense",
	} {
		if publicAddress(a) == nil {
			t.Errorf("%s counts as public", a)
		}
	}
	for _, a := range []string{"192.0.2.1:443", "8.8.8.8:443", "[2606:4700::1]:443"} {
		if err := publicAddress(a); err != nil {
			t.Error(err)
		}
	}
	n.stop()
	n.cfg.Push = PushOff
	n.start()
	bob.connect()
	bob.authenticate()
	if err := bob.registerPush("https://push.example/x"); code(err) != "notAllowed" {
		t.Errorf("at a node that wakes nobody: %v", err)
	}
}

// TestSleepersTakeALimitedAmountOfMemory has more to be woken than there may be.
func TestSleepersTakeALimitedAmountOfMemory(t *testing.T) {
	p := newPush(&Node{cfg: Config{Push: PushPrivate}, listeners: newListeners(), store: must(store.Open(t.TempDir(), store.Options{}))(t)})
	t.Cleanup(func() { p.n.store.Close() })
	const clients = maxPushDue + 100
	for i := range clients {
		if err := p.set(mimi.URI(fmt.Sprintf("mimi://alpha.example/d/c%d", i)), "https://push.example/x"); err != nil {
			t.Fatal(err)
		}
	}
	for c := range p.clients {
		p.client(c)
	}
	if len(p.due) != maxPushDue {
		t.Errorf("%d are due, at most %d", len(p.due), maxPushDue)
	}
	const c = mimi.URI("mimi://alpha.example/d/c0")
	p.wakes(c)
	p.size = maxPushRooms
	var b store.Batch
	setMember(&b, c, "mimi://alpha.example/u/c", "mimi://alpha.example/r/room", 0)
	if wait, err := p.n.store.Apply(&b); err != nil || wait() != nil {
		t.Fatal(err)
	}
	clear(p.due)
	if err := p.sleeps(c, false); err != nil {
		t.Fatal(err)
	}
	if _, woken := p.due[p.clients[c]]; !woken || len(p.rooms) != 0 {
		t.Errorf("past what is kept it isn't woken at once; %d rooms are watched", len(p.rooms))
	}
}
