package node

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/transport"
)

// newLimited is newNode with limits.
func newLimited(t testing.TB, name string, limits Limits) *testNode {
	t.Helper()
	n := newNode(t, name)
	n.stop()
	n.cfg.Limits = limits
	n.start()
	return n
}

// asPeer sends a request to an endpoint of the node, as a peer's connection brings it.
func (n *testNode) asPeer(h http.Handler, peer, endpoint, param string, body []byte) *httptest.ResponseRecorder {
	n.t.Helper()
	return n.asPeerAt(h, peer, "https://"+n.cfg.Domain+"/mimi/v1/"+endpoint+"/", param, body)
}

// asPeerAt is asPeer for what has another address.
func (n *testNode) asPeerAt(h http.Handler, peer, address, param string, body []byte) *httptest.ResponseRecorder {
	n.t.Helper()
	u := must(mimi.Expand(address+"{x}", param))(n.t)
	r := httptest.NewRequest(http.MethodPost, u, bytes.NewReader(body))
	r.Header.Set("From", "mimi@"+peer)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), peer)))
	return w
}

func (n *testNode) peerHandler() http.Handler {
	return federation.NewHandler(n.cfg.Domain, provider{n.Node}, transport.PeerDomain, n.log, nil, n.admitPeer)
}

func TestAFloodingPeerTakesNothingFromOthers(t *testing.T) {
	n := newLimited(t, "alpha", Limits{PeerRequestsPerSecond: 40, PeerBytesPerSecond: 1000})
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createRoom()
	h := n.peerHandler()
	const flood, few = 2000, 30
	var refused, served int
	var flooding sync.WaitGroup
	begun := make(chan struct{})
	flooding.Go(func() {
		for i := range flood {
			w := n.asPeer(h, "beta.example", "submitMessage", string(alice.room), nil)
			switch {
			case w.Code == http.StatusTooManyRequests:
				if after, err := strconv.Atoi(w.Header().Get("Retry-After")); err != nil || after < 1 {
					t.Errorf("the refusal says to retry after %q", w.Header().Get("Retry-After"))
				}
				refused++
			default:
				served++
			}
			if i == flood/10 {
				close(begun)
			}
		}
	})
	<-begun
	for i := range few {
		if w := n.asPeer(h, "gamma.example", "submitMessage", string(alice.room), nil); w.Code == http.StatusTooManyRequests {
			t.Fatalf("request %d of another peer was refused: %s", i, w.Body)
		}
	}
	flooding.Wait()
	if served < 80 || refused < flood/2 {
		t.Errorf("of the flood %d requests were served, %d refused", served, refused)
	}

	large := make([]byte, 5000)
	if w := n.asPeer(h, "delta.example", "submitMessage", string(alice.room), large); w.Code == http.StatusTooManyRequests {
		t.Errorf("the first large request: %s", w.Body)
	}
	if w := n.asPeer(h, "delta.example", "submitMessage", string(alice.room), nil); w.Code != http.StatusTooManyRequests {
		t.Errorf("a request after more bytes than there may be: %d", w.Code)
	}
	if w := n.asPeer(h, "gamma.example", "submitMessage", string(alice.room), nil); w.Code == http.StatusTooManyRequests {
		t.Errorf("of another peer: %s", w.Body)
	}
}

func TestAFloodingClientTakesNothingFromOthers(t *testing.T) {
	n := newLimited(t, "alpha", Limits{RequestsPerSecond: 40})
	alice, eve := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "eve", "eve-laptop")
	alice.createRoom()
	e := alice.subscribe()
	e.live()
	const flood, few = 1000, 20
	refused := 0
	var flooding sync.WaitGroup
	begun := make(chan struct{})
	flooding.Go(func() {
		for i := range flood {
			_, err := eve.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{}))
			if code(err) == "busy" {
				refused++
				var ce *connect.Error
				if errors.As(err, &ce); ce.Meta().Get("Retry-After") == "" {
					t.Error("the refusal doesn't say when to come back")
				}
			} else if err != nil {
				t.Error(err)
			}
			if i == flood/10 {
				close(begun)
			}
		}
	})
	<-begun
	var last uint64
	for range few {
		last = alice.send("x") // fails the test if it is refused
	}
	e.until(func() bool { return alice.seq >= last })
	flooding.Wait()
	if refused < flood/2 {
		t.Errorf("%d of %d requests of the flood were refused", refused, flood)
	}
	text := must(DialAdmin(n.cfg.Socket()).Metrics(t.Context()))(t)
	if want := fmt.Sprintf(`parley_refused_total{code="busy",endpoint="unread"} %d`, refused); !strings.Contains(text, want) {
		t.Errorf("the metrics have no line %s", want)
	}
}

// TestRequestsAndBytesAreCountedByClientAndUser has the clock in its hands.
func TestRequestsAndBytesAreCountedByClientAndUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuth("alpha.example", nil, Limits{RequestsPerSecond: 5, BytesPerSecond: 1000})
		device := func(user, client string) *session {
			return &session{user: must(mimi.UserURI("alpha.example", user))(t), client: must(mimi.ClientURI("alpha.example", client))(t)}
		}
		granted := func(s *session) (n int) {
			for a.admit(s) == nil {
				n++
			}
			return n
		}
		total := 0
		for i := range 6 {
			total += granted(device("alice", fmt.Sprint("alice-", i)))
		}
		if total != 40 {
			t.Errorf("six clients of a user had %d requests at once, want 40", total)
		}
		if n := granted(device("bob", "bob-1")); n != 10 {
			t.Errorf("a client of another user had %d, want 10", n)
		}
		time.Sleep(time.Second)
		if n := granted(device("bob", "bob-1")); n != 5 {
			t.Errorf("a second later it had %d, want 5", n)
		}
		time.Sleep(time.Minute)
		bob := device("bob", "bob-1")
		a.bytes.Charge(bob.client, 4000, a.limits.bytes(1))
		err := reason(a.admit(bob))
		if err == nil || err.code != "busy" || err.retry != 2*time.Second {
			t.Errorf("after 4000 bytes: %+v", err)
		}
		if err := a.admit(device("bob", "bob-2")); err != nil {
			t.Errorf("another client of the user: %v", err)
		}
		time.Sleep(2 * time.Second)
		if err := a.admit(bob); err != nil {
			t.Errorf("two seconds later: %v", err)
		}
	})
}

func TestAClientHoldsALimitedAmountOfMemory(t *testing.T) {
	n := newLimited(t, "alpha", Limits{BytesInFlight: 1 << 20, BytesPerSecond: 1 << 20})
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-laptop")
	large := func(c *testClient, size int) error {
		_, err := c.api.NoteSent(t.Context(), connect.NewRequest(&api.NoteSentRequest{Message: make([]byte, size)}))
		return err
	}
	if err := large(alice, 2<<20); code(err) != "busy" {
		t.Errorf("more than there may be at a time: %v", err)
	}
	s := must(n.auth.find(alice.token))(t)
	eventually(t, func() error {
		if b := s.inFlight.Load(); b != 0 {
			return fmt.Errorf("%d bytes are still counted", b)
		}
		return nil
	})
	if err := large(bob, 1<<19); code(err) != "malformed" {
		t.Errorf("half of it: %v", err)
	}
	// What was sent counts in time as well, for this client only.
	for range 6 {
		if err := large(bob, 1<<19); code(err) == "busy" {
			break
		}
	}
	if err := large(bob, 1); code(err) != "busy" {
		t.Errorf("after more than there may be in a second: %v", err)
	}
	if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); err != nil {
		t.Errorf("another client: %v", err)
	}
}

func TestAUserCreatesALimitedNumberOfRooms(t *testing.T) {
	n := newLimited(t, "alpha", Limits{Rooms: 2})
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-laptop")
	phone := newClient(t, n, "alice", "alice-phone")
	alice.createRoom()
	first, group := alice.room, alice.group
	alice.createRoom()
	third := must(mimi.RoomURI("alpha.example", "third"))(t)
	for range 2 {
		if err := phone.tryCreate(third, phone.newGroup(third, nil)); code(err) != "busy" {
			t.Errorf("a third room: %v", err)
		}
		if err := alice.tryCreate(first, group); err != nil {
			t.Errorf("the first one once more: %v", err)
		}
		n.stop()
		n.start() // they are counted in the store
		for _, c := range []*testClient{alice, phone, bob} {
			c.connect()
			c.authenticate()
		}
	}
	bob.createRoom()
}

func TestARoomHasALimitedNumberOfMembers(t *testing.T) {
	n := newLimited(t, "alpha", Limits{Members: 2})
	alice := newClient(t, n, "alice", "alice-laptop")
	phone, tablet, bob := newClient(t, n, "alice", "alice-phone"), newClient(t, n, "alice", "alice-tablet"), newClient(t, n, "bob", "bob-phone")
	phone.publish(1)
	bob.publish(1)
	alice.createRoom()
	e := alice.subscribe()
	e.live()
	try := func(props ...mls.Proposal) mimi.UpdateResponseCode {
		t.Helper()
		p := must(alice.group.Commit(nil, mls.CommitOptions{Proposals: props, ForcePath: true}))(t)
		resp, seq, err := alice.update(bundle(p))
		if err != nil {
			t.Fatal(err)
		}
		if resp.Code == mimi.UpdateSuccess {
			e.until(func() bool { return alice.seq >= seq })
		} else if err := alice.group.Drop(nil); err != nil {
			t.Fatal(err)
		}
		return resp.Code
	}
	both := append(alice.adding(bob.user), mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *must(alice.claim(alice.user))(t).Clients[0].KeyPackage}})
	if c := try(both...); c != mimi.UpdateNotAllowed {
		t.Errorf("three clients: %v", c)
	}
	if c := try(both[2]); c != mimi.UpdateSuccess {
		t.Errorf("two clients: %v", c)
	}
	tablet.publish(1)
	if c := try(removeLeafOf(t, alice, phone.uri), mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *must(alice.claim(alice.user))(t).Clients[1].KeyPackage}}); c != mimi.UpdateSuccess {
		t.Errorf("one in the place of another: %v", c)
	}
	var many []mimi.Participant
	for i := range 2 {
		many = append(many, mimi.Participant{User: must(mimi.UserURI("alpha.example", fmt.Sprint("user-", i)))(t), Role: mimi.RoleMember})
	}
	if c := try(listUpdate(mimi.ParticipantListUpdate{Added: many})); c != mimi.UpdateNotAllowed {
		t.Errorf("three users: %v", c)
	}
	if c := try(); c != mimi.UpdateSuccess {
		t.Errorf("a commit that adds nobody: %v", c)
	}
}

// TestForgedReportsAreLimited: each costs the hub a check, however little comes of it.
func TestForgedReportsAreLimited(t *testing.T) {
	n := newLimited(t, "alpha", Limits{Reports: 10})
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-laptop")
	alice.createFranked()
	good := alice.abuse("you fool")
	forged := good
	forged.AcceptedTimestamp++
	report := func(user mimi.URI, m ...mimi.AbusiveMessage) mimi.AbuseReport {
		return mimi.AbuseReport{ReportingUser: user, AllegedAbuser: alice.user, Messages: m}
	}
	if err := bob.report(alice.room, report(bob.user, make([]mimi.AbusiveMessage, 10)...)); code(err) != "tooLarge" {
		t.Errorf("a report of more messages than there may be: %v", err)
	}
	for range 5 {
		if err := bob.report(alice.room, report(bob.user, forged)); code(err) != "notAllowed" {
			t.Fatalf("a forged report: %v", err)
		}
	}
	if err := bob.report(alice.room, report(bob.user, good)); code(err) != "busy" {
		t.Errorf("after five of them: %v", err)
	}
	if err := alice.report(alice.room, report(alice.user, good)); err != nil {
		t.Errorf("another user's: %v", err)
	}
	// Of a peer's: its users together, named or not, and each that it names.
	h := n.peerHandler()
	send := func(peer string, user mimi.URI) int {
		return n.asPeer(h, peer, "reportAbuse", string(alice.room), codec.Marshal(report(user, forged))).Code
	}
	served := 0
	for range 600 {
		if send("beta.example", "") != http.StatusTooManyRequests {
			served++
		}
	}
	if served < 500 || served > 550 { // ten a second are added
		t.Errorf("%d reports of a peer were checked, want 500", served)
	}
	named := 0
	for range 20 {
		if send("gamma.example", "mimi://gamma.example/u/eve") != http.StatusTooManyRequests {
			named++
		}
	}
	if named != 5 {
		t.Errorf("%d reports of a peer's user were checked, want 5", named)
	}
	if c := send("gamma.example", "mimi://gamma.example/u/frank"); c != http.StatusForbidden {
		t.Errorf("of another user of the peer: %d", c)
	}
}

func TestRequestsForGroupInfosAreLimited(t *testing.T) {
	n := newLimited(t, "alpha", Limits{GroupInfos: 2})
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-laptop")
	alice.createRoom()
	ask := func(c *testClient) error {
		_, err := c.api.GroupInfo(t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(alice.room), Body: codec.Marshal(&mimi.GroupInfoRequest{
			CipherSuite: testSuite, Credential: mls.X509Credential(c.chain),
		})}))
		return err
	}
	for range 2 {
		if err := ask(alice); code(err) == "busy" {
			t.Fatal(err)
		}
	}
	if err := ask(alice); code(err) != "busy" {
		t.Errorf("the third one: %v", err)
	}
	if err := ask(bob); code(err) == "busy" {
		t.Errorf("another user's: %v", err)
	}
	p, served := provider{n.Node}, 0
	for range 300 {
		_, err := p.GroupInfo(t.Context(), "beta.example", alice.room, new(mimi.GroupInfoRequest))
		if e := reason(err); e == nil || e.code != "busy" {
			served++
		} else if e.retry == 0 {
			t.Error("the refusal doesn't say when to come back")
		}
	}
	if served < 200 || served > 220 {
		t.Errorf("%d requests of a peer were served, want 200", served)
	}
}

// TestBodiesWithoutALengthAreCounted has a peer declare nothing.
func TestBodiesWithoutALengthAreCounted(t *testing.T) {
	n := newLimited(t, "alpha", Limits{PeerBytesPerSecond: 1000})
	h := n.peerHandler()
	post := func() int {
		r := httptest.NewRequest(http.MethodPost, "https://alpha.example"+federation.BundlePath, io.MultiReader(strings.NewReader(strings.Repeat("x", 10_000))))
		r.ContentLength = -1
		r.Header.Set("From", "mimi@beta.example")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), "beta.example")))
		return w.Code
	}
	if c := post(); c == http.StatusTooManyRequests {
		t.Errorf("the first request: %d", c)
	}
	if c := post(); c != http.StatusTooManyRequests {
		t.Errorf("the next one: %d", c)
	}
}

func TestRequestsHaveALargestSize(t *testing.T) {
	n := newLimited(t, "alpha", Limits{RequestBytes: 1 << 18})
	alice := newClient(t, n, "alice", "alice-laptop")
	for size, want := range map[int]string{1 << 17: "malformed", 1 << 19: "tooLarge"} {
		if _, err := alice.api.NoteSent(t.Context(), connect.NewRequest(&api.NoteSentRequest{Message: make([]byte, size)})); code(err) != want {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestAClientHasALimitedNumberOfStreams(t *testing.T) {
	n := newLimited(t, "alpha", Limits{Streams: 2})
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-laptop")
	first, second := alice.subscribe(), alice.subscribe()
	first.live()
	second.live()
	if err := alice.subscribe().ended(); code(err) != "busy" {
		t.Errorf("a third stream: %v", err)
	}
	bob.subscribe().live()
	first.cancel()
	eventually(t, func() error {
		if s := n.listeners.count(); s != 2 {
			return fmt.Errorf("%d streams are open", s)
		}
		return nil
	})
	alice.subscribe().live()
}

func TestOneAddressTriesLittleWithoutAToken(t *testing.T) {
	n := newLimited(t, "alpha", Limits{AnonymousPerSecond: 2})
	alice := newClient(t, n, "alice", "alice-laptop")
	refused := 0
	for range 20 {
		if _, err := alice.enrol.Challenge(t.Context(), connect.NewRequest(&api.ChallengeRequest{})); code(err) == "busy" {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused < 8 {
		t.Errorf("%d of 20 requests without a token were refused", refused)
	}
	if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); err != nil {
		t.Errorf("with a token: %v", err)
	}
}

// TestEveryLimitHasATest reads the table in limits.go: it has every limit of the configuration, and the tests are there.
func TestEveryLimitHasATest(t *testing.T) {
	source := string(must(os.ReadFile("limits.go"))(t))
	tests := ""
	for _, dir := range []string{".", "../transport"} {
		for _, name := range must(filepath.Glob(filepath.Join(dir, "*_test.go")))(t) {
			tests += string(must(os.ReadFile(name))(t))
		}
	}
	rows := make(map[string]string)
	for _, m := range regexp.MustCompile(`(?m)^//\t([a-z_]+) +([a-z]+(?:, [a-z]+)*) +(Test\w+)$`).FindAllStringSubmatch(source, -1) {
		rows[m[1]] = m[3]
	}
	limits := reflect.TypeFor[Limits]()
	for i := range limits.NumField() {
		name := limits.Field(i).Tag.Get("yaml")
		test, ok := rows[name]
		if !ok || !strings.Contains(tests, "\nfunc "+test+"(t *testing.T) {\n") {
			t.Errorf("the table has the test %q for %s", test, name)
		}
		delete(rows, name)
	}
	if len(rows) > 0 {
		t.Errorf("the table has what is no limit: %v", rows)
	}
}
