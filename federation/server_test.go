package federation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/transport"
)

const (
	ownRoom   = mimi.URI("mimi://alpha.example/r/room")
	theirRoom = mimi.URI("mimi://beta.example/r/room")
	ownUser   = mimi.URI("mimi://alpha.example/u/alice")
	theirUser = mimi.URI("mimi://beta.example/u/bob")
)

// testProvider is alpha.example. It notes what it is asked, and answers err if that is set.
type testProvider struct {
	mu    sync.Mutex
	calls []string // method, peer and room or user
	msgs  []Sequenced
	body  []byte
	err   error
}

func (p *testProvider) note(method, from string, about any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, fmt.Sprint(method, " ", from, " ", about))
	return p.err
}

func (p *testProvider) keep(body []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.body = body
}

func (p *testProvider) KeyMaterial(_ context.Context, from string, req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	return &mimi.KeyMaterialResponse{Code: mimi.UserUnknown, User: req.TargetUser}, p.note("keyMaterial", from, req.TargetUser)
}

func (p *testProvider) Update(_ context.Context, from string, room mimi.URI, body []byte) (*mimi.UpdateRoomResponse, uint64, error) {
	p.keep(body)
	return &mimi.UpdateRoomResponse{AcceptedTimestamp: 5}, 17, p.note("update", from, room)
}

func (p *testProvider) SubmitMessage(_ context.Context, from string, room mimi.URI, body []byte) (*mimi.SubmitMessageResponse, uint64, error) {
	p.keep(body)
	return &mimi.SubmitMessageResponse{Code: mimi.SubmitEpochTooOld, CurrentEpoch: 9}, 0, p.note("submitMessage", from, room)
}

func (p *testProvider) Notify(_ context.Context, from string, room mimi.URI, msgs []Sequenced) error {
	p.msgs = msgs
	return p.note("notify", from, room)
}

func (p *testProvider) GroupInfo(_ context.Context, from string, room mimi.URI, _ *mimi.GroupInfoRequest) (*mimi.GroupInfoResponse, error) {
	return &mimi.GroupInfoResponse{Room: room, Code: mimi.GroupInfoNotAuthorized}, p.note("groupInfo", from, room)
}

func (p *testProvider) IdentifierQuery(_ context.Context, from string, req *mimi.IdentifierRequest) (*mimi.IdentifierResponse, error) {
	return &mimi.IdentifierResponse{URIs: []mimi.URI{ownUser}}, p.note("identifierQuery", from, string(req.Elements[0].Value))
}

func (p *testProvider) ReportAbuse(_ context.Context, from string, room mimi.URI, body []byte) error {
	p.keep(body)
	return p.note("reportAbuse", from, room)
}

func (p *testProvider) RequestConsent(_ context.Context, from string, e *mimi.ConsentEntry) error {
	return p.note("requestConsent", from, e.Scope.Target)
}

func (p *testProvider) UpdateConsent(_ context.Context, from string, e *mimi.ConsentEntry) error {
	return p.note("updateConsent", from, e.Scope.Requester)
}

func (p *testProvider) ProxyDownload(_ context.Context, from, downloadURL string) (*Asset, error) {
	return testAsset(5), p.note("proxyDownload", from, downloadURL)
}

func (p *testProvider) Asset(_ context.Context, from string, hash [sha256.Size]byte, part Part) (*Asset, error) {
	a := testAsset(int64(hash[0]))
	if part.Length > 0 {
		a.Size, a.Whole = 5, part.Offset+5
	}
	return a, p.note("asset", from, hash[0])
}

func (p *testProvider) Oblivious(_ context.Context, from string, request []byte) ([]byte, error) {
	return append([]byte("answer to "), request...), p.note("oblivious", from, string(request))
}

func (p *testProvider) GatewayKeys(suite mls.CipherSuite) (*mimi.GatewayKeys, error) {
	return &mimi.GatewayKeys{Hub: ownUser.Provider(), NotAfter: uint64(suite), Keys: []byte("keys")}, p.err
}

// testAsset has five bytes, whatever it says.
func testAsset(size int64) *Asset {
	return &Asset{Size: size, ReadCloser: io.NopCloser(strings.NewReader("bytes"))}
}

func (p *testProvider) Ephemeral(_ context.Context, from string, room mimi.URI, body []byte) error {
	p.keep(body)
	return p.note("ephemeral", from, room)
}

func (p *testProvider) Head(room mimi.URI) []byte { return []byte("head of " + room) }

func (p *testProvider) Log(_ context.Context, from string, room mimi.URI, req *LogRequest) (*LogPage, error) {
	return &LogPage{Head: req.Head, Entries: []LogEntry{{Seq: req.After + 1, Fanout: []byte("entry")}}}, p.note("log", from, room)
}

func (p *testProvider) Known(from string) (*Known, error) {
	return &Known{Head: []byte("head of " + from), Bundle: p.Bundle()}, nil
}

func (p *testProvider) HubSender(suite mls.CipherSuite) ([]byte, error) {
	return codec.Marshal(mls.ExternalSender{SignatureKey: []byte{byte(suite)}, Credential: mls.X509Credential([][]byte{{1}})}), nil
}

func (p *testProvider) Bundle() []byte { return []byte(`{"keys":[]}`) }

func (p *testProvider) ReceiveBundle(_ context.Context, from string, bundle []byte) error {
	return p.note("receiveBundle", from, string(bundle))
}

// observed collects what a handler tells its observer.
type observed struct {
	mu   sync.Mutex
	list []string
}

func (o *observed) observe(endpoint, code string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = append(o.list, endpoint+":"+code)
}

func newTestHandler() (http.Handler, *testProvider, *observed) {
	p, o := new(testProvider), new(observed)
	return NewHandler("alpha.example", p, transport.PeerDomain, slog.New(slog.DiscardHandler), o.observe, nil), p, o
}

// inProcess carries requests to a handler as a connection does on which a peer has proved its domain.
type inProcess struct {
	handler http.Handler
	peer    string
}

func (t inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	in := httptest.NewRequest(r.Method, r.URL.String(), r.Body)
	in.Host, in.ContentLength, in.Header = r.Host, r.ContentLength, r.Header
	w := httptest.NewRecorder()
	t.handler.ServeHTTP(w, in.WithContext(transport.WithPeerDomain(r.Context(), t.peer)))
	return w.Result(), nil
}

func fanoutBytes(t testing.TB, text string) []byte {
	t.Helper()
	return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: application(text)})
}

// application is a PrivateMessage that nobody can decrypt.
func application(text string) *mls.MLSMessage {
	return mls.NewMLSMessage(&mls.PrivateMessage{
		GroupID: []byte("mimi://alpha.example/g/room"), ContentType: mls.ContentApplication, Ciphertext: []byte(text),
	})
}

func keyMaterialRequest() *mimi.KeyMaterialRequest {
	return &mimi.KeyMaterialRequest{
		RequestingUser: theirUser, TargetUser: ownUser, Room: theirRoom, CipherSuites: []mls.CipherSuite{1}, Credential: mls.BasicCredential(nil),
	}
}

func groupInfoRequest() *mimi.GroupInfoRequest {
	return &mimi.GroupInfoRequest{CipherSuite: 1, Credential: mls.BasicCredential(nil)}
}

// consentEntry goes from beta.example to alpha.example.
func consentEntry(op mimi.ConsentOperation) *mimi.ConsentEntry {
	if op == mimi.ConsentGrant || op == mimi.ConsentRevoke {
		return &mimi.ConsentEntry{Operation: op, Scope: mimi.ConsentScope{Requester: ownUser, Target: theirUser, Room: ownRoom}}
	}
	return &mimi.ConsentEntry{Operation: op, Scope: mimi.ConsentScope{Requester: theirUser, Target: ownUser}}
}

func TestClientReachesEveryEndpoint(t *testing.T) {
	h, p, o := newTestHandler()
	c := NewClient("beta.example", func(_ context.Context, peer string) (http.RoundTripper, error) {
		if peer != "alpha.example" {
			t.Errorf("request to %s", peer)
		}
		return inProcess{h, "beta.example"}, nil
	})
	var heads []string
	c.OnHead = func(peer string, room mimi.URI, head []byte) error {
		heads = append(heads, peer+" "+string(head))
		return nil
	}
	ctx := t.Context()
	const peer = "alpha.example"

	if resp, err := c.KeyMaterial(ctx, peer, keyMaterialRequest()); err != nil || resp.Code != mimi.UserUnknown {
		t.Errorf("key material: %+v, %v", resp, err)
	}
	if resp, seq, err := c.Update(ctx, peer, ownRoom, []byte("update")); err != nil || resp.AcceptedTimestamp != 5 || seq != 17 || string(p.body) != "update" {
		t.Errorf("update: %+v, %d, %v, body %q", resp, seq, err, p.body)
	}
	if resp, seq, err := c.SubmitMessage(ctx, peer, ownRoom, []byte("message")); err != nil || resp.CurrentEpoch != 9 || seq != 0 || string(p.body) != "message" {
		t.Errorf("submit: %+v, %d, %v, body %q", resp, seq, err, p.body)
	}
	msgs := []Sequenced{{Seq: 3, Fanout: fanoutBytes(t, "a")}, {Fanout: fanoutBytes(t, "bb")}, {Seq: MaxSeq, Fanout: fanoutBytes(t, "c"), Head: []byte("head")}}
	if err := c.Notify(ctx, peer, theirRoom, msgs); err != nil || !reflect.DeepEqual(p.msgs, msgs) {
		t.Errorf("notify: %v, got %v", err, p.msgs)
	}
	unnumbered := []Sequenced{{Fanout: fanoutBytes(t, "a")}}
	if err := c.Notify(ctx, peer, theirRoom, unnumbered); err != nil || !reflect.DeepEqual(p.msgs, unnumbered) {
		t.Errorf("notify without numbers: %v, got %v", err, p.msgs)
	}
	if resp, err := c.GroupInfo(ctx, peer, ownRoom, groupInfoRequest()); err != nil || resp.Code != mimi.GroupInfoNotAuthorized {
		t.Errorf("group info: %+v, %v", resp, err)
	}
	query := &mimi.IdentifierRequest{Elements: []mimi.QueryElement{{Type: mimi.SearchHandle, Value: []byte("alice")}}}
	if resp, err := c.IdentifierQuery(ctx, peer, query); err != nil || len(resp.URIs) != 1 || resp.URIs[0] != ownUser {
		t.Errorf("query: %+v, %v", resp, err)
	}
	if err := c.ReportAbuse(ctx, peer, ownRoom, []byte("report")); err != nil || string(p.body) != "report" {
		t.Errorf("report: %v, body %q", err, p.body)
	}
	if err := c.Ephemeral(ctx, peer, ownRoom, []byte("typing")); err != nil || string(p.body) != "typing" {
		t.Errorf("ephemeral message: %v, body %q", err, p.body)
	}
	if err := c.Consent(ctx, peer, consentEntry(mimi.ConsentRequest)); err != nil {
		t.Errorf("request of consent: %v", err)
	}
	if err := c.Consent(ctx, peer, consentEntry(mimi.ConsentGrant)); err != nil {
		t.Errorf("grant: %v", err)
	}
	if sender, err := c.HubSender(ctx, peer, 3); err != nil || !bytes.Equal(sender.SignatureKey, []byte{3}) {
		t.Errorf("key of the hub: %+v, %v", sender, err)
	}
	if keys, err := c.GatewayKeys(ctx, peer, 3); err != nil || keys.NotAfter != 3 || keys.Hub != ownUser.Provider() {
		t.Errorf("keys of the gateway: %+v, %v", keys, err)
	}
	if b, err := c.Oblivious(ctx, peer, []byte("sealed")); err != nil || string(b) != "answer to sealed" {
		t.Errorf("through the gateway: %q, %v", b, err)
	}
	request := &LogRequest{After: 7, Head: []byte("head")}
	for _, room := range []mimi.URI{ownRoom, theirRoom} {
		if page, err := c.Log(ctx, peer, room, request); err != nil || string(page.Head) != "head" || len(page.Entries) != 1 || page.Entries[0].Seq != 8 {
			t.Errorf("log of %s: %+v, %v", room, page, err)
		}
	}
	if known, err := c.Known(ctx, peer); err != nil || string(known.Head) != "head of beta.example" || string(known.Bundle) != `{"keys":[]}` {
		t.Errorf("known: %+v, %v", known, err)
	}
	// A refusal of group info tells nothing of the room.
	if want := []string{"alpha.example head of mimi://alpha.example/r/room", "alpha.example head of mimi://alpha.example/r/room"}; !reflect.DeepEqual(heads, want) {
		t.Errorf("heads: %q, want %q", heads, want)
	}
	if b, err := c.FetchBundle(ctx, peer); err != nil || string(b) != `{"keys":[]}` {
		t.Errorf("bundle: %s, %v", b, err)
	}
	if err := c.PushBundle(ctx, peer, []byte(`{"x":1}`)); err != nil {
		t.Errorf("push: %v", err)
	}

	want := []string{
		"keyMaterial beta.example " + string(ownUser), "update beta.example " + string(ownRoom), "submitMessage beta.example " + string(ownRoom),
		"notify beta.example " + string(theirRoom), "notify beta.example " + string(theirRoom), "groupInfo beta.example " + string(ownRoom),
		"identifierQuery beta.example alice", "reportAbuse beta.example " + string(ownRoom), "ephemeral beta.example " + string(ownRoom),
		"requestConsent beta.example " + string(ownUser), "updateConsent beta.example " + string(ownUser), "oblivious beta.example sealed",
		"log beta.example " + string(ownRoom), "log beta.example " + string(theirRoom), `receiveBundle beta.example {"x":1}`,
	}
	if !reflect.DeepEqual(p.calls, want) {
		t.Errorf("the provider was asked\n%s\nwant\n%s", strings.Join(p.calls, "\n"), strings.Join(want, "\n"))
	}
	wantSeen := []string{"directory:", "keyMaterial:", "update:", "submitMessage:", "notify:", "notify:", "groupInfo:", "identifierQuery:", "reportAbuse:", "ephemeral:", "requestConsent:", "updateConsent:", "hub:", "gatewayKeys:", "ohttpGateway:", "log:", "log:", "known:", "bundle:", "bundle:"}
	if !reflect.DeepEqual(o.list, wantSeen) {
		t.Errorf("observed %v, want %v (the directory once)", o.list, wantSeen)
	}
}

// endsEarly is a body that its sender stops sending.
type endsEarly struct{ r io.Reader }

func (e endsEarly) Read(b []byte) (int, error) {
	n, err := e.r.Read(b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func TestAnotherProtocolThanMLSIsIncompatible(t *testing.T) {
	h, p, _ := newTestHandler()
	body := codec.Marshal(keyMaterialRequest())
	body[0] = 2
	body = append(body, "what that protocol has"...)
	r := httptest.NewRequest("POST", "https://alpha.example/mimi/v1/keyMaterial/"+url.PathEscape(string(ownUser)), bytes.NewReader(body))
	r.Header.Set("From", "mimi@beta.example")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), "beta.example")))
	var resp mimi.KeyMaterialResponse
	if err := codec.Unmarshal(w.Body.Bytes(), &resp); err != nil || resp.Code != mimi.IncompatibleProtocol || resp.User != ownUser || len(p.calls) > 0 {
		t.Errorf("status %d, %+v, %v, calls %v", w.Code, resp, err, p.calls)
	}
}

func TestBadRequestsAreRefusedWithTheirCause(t *testing.T) {
	path := func(endpoint, param string) string {
		u, err := mimi.Expand("/mimi/v1/"+endpoint+"/{x}", param)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	notify := path("notify", string(theirRoom))
	one := fanoutBytes(t, "a")
	for _, c := range []struct {
		name   string
		method string // POST if empty
		path   string
		body   []byte
		change func(*http.Request)
		peer   string // beta.example if empty, - for none
		status int
		code   string
	}{
		{name: "no peer", path: notify, body: one, peer: "-", status: 401, code: CodeUnauthenticated},
		{name: "no From", path: notify, body: one, change: func(r *http.Request) { r.Header.Del("From") }, status: 401, code: CodeUnauthenticated},
		{name: "From of another", path: notify, body: one, change: func(r *http.Request) { r.Header.Set("From", "mimi@gamma.example") }, status: 401, code: CodeUnauthenticated},
		{name: "From of another user", path: notify, body: one, change: func(r *http.Request) { r.Header.Set("From", "bob@beta.example") }, status: 401, code: CodeUnauthenticated},
		{name: "two From", path: notify, body: one, change: func(r *http.Request) { r.Header.Add("From", "mimi@beta.example") }, status: 401, code: CodeUnauthenticated},
		{name: "host of another", path: notify, body: one, change: func(r *http.Request) { r.Host = "gamma.example" }, status: 421, code: CodeWrongProvider},
		{name: "unknown endpoint", path: "/mimi/v1/reportSpam/x", status: 404, code: CodeNotFound},
		{name: "unknown path", path: "/", status: 404, code: CodeNotFound},
		{name: "wrong method", method: "GET", path: notify, status: 404, code: CodeNotFound},
		{name: "download that is posted", path: path("proxyDownload", "https://gamma.example/x"), status: 404, code: CodeNotFound},
		{name: "asset that has no such name", method: "GET", path: AssetPath + "..%2f..%2fstore", status: 404, code: CodeNotFound},
		{name: "log of a third provider's room", path: LogPath + url.PathEscape("mimi://gamma.example/r/room"), body: codec.Marshal(LogRequest{After: 1}), status: 403, code: CodeNotAllowed},
		{name: "log of no room", path: LogPath + url.PathEscape(string(ownUser)), body: codec.Marshal(LogRequest{After: 1}), status: 400, code: CodeMalformed},
		{name: "log without a request", path: LogPath + url.PathEscape(string(ownRoom)), body: []byte{1}, status: 400, code: CodeMalformed},
		{name: "keys of no suite", method: "GET", path: GatewayKeysPath + "0", status: 400, code: CodeMalformed},
		{name: "a large request for the gateway", path: GatewayPath, body: make([]byte, MaxOblivious+1), change: func(r *http.Request) { r.Header.Set("Content-Type", ohttp.RequestType) }, status: 413, code: CodeTooLarge},
		{name: "another type for the gateway", path: GatewayPath, body: []byte("x"), change: func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, status: 415, code: CodeMalformed},
		{name: "no room in the path", path: "/mimi/v1/notify/", body: one, status: 400, code: CodeMalformed},
		{name: "room that isn't encoded", path: "/mimi/v1/notify/beta.example/r/room", body: one, status: 400, code: CodeMalformed},
		{name: "a user as room", path: path("notify", string(theirUser)), body: one, status: 400, code: CodeMalformed},
		{name: "notify about a room of ours", path: path("notify", string(ownRoom)), body: one, status: 403, code: CodeNotAllowed},
		{name: "notify about a third party's room", path: path("notify", "mimi://gamma.example/r/room"), body: one, status: 403, code: CodeNotAllowed},
		{name: "update of a room of theirs", path: path("update", string(theirRoom)), body: []byte("x"), status: 421, code: CodeWrongProvider},
		{name: "message for a room of theirs", path: path("submitMessage", string(theirRoom)), body: []byte("x"), status: 421, code: CodeWrongProvider},
		{name: "group info of a room of theirs", path: path("groupInfo", string(theirRoom)), body: codec.Marshal(groupInfoRequest()), status: 421, code: CodeWrongProvider},
		{name: "report about a room of theirs", path: path("reportAbuse", string(theirRoom)), body: []byte("x"), status: 421, code: CodeWrongProvider},
		{name: "report too large", path: path("reportAbuse", string(ownRoom)), body: []byte("x"), change: func(r *http.Request) { r.ContentLength = MaxReportAbuse + 1 }, status: 413, code: CodeTooLarge},
		{name: "grant as a request", path: path("requestConsent", string(ownUser)), body: codec.Marshal(consentEntry(mimi.ConsentGrant)), status: 400, code: CodeMalformed},
		{name: "request as an update", path: path("updateConsent", string(ownUser)), body: codec.Marshal(consentEntry(mimi.ConsentRequest)), status: 400, code: CodeMalformed},
		{name: "request of a third party's user", path: path("requestConsent", string(ownUser)), body: codec.Marshal(consentEntry(mimi.ConsentRequest)), peer: "gamma.example",
			change: func(r *http.Request) { r.Header.Set("From", "mimi@gamma.example") }, status: 403, code: CodeNotAllowed},
		{name: "grant of a third party's user", path: path("updateConsent", string(ownUser)), body: codec.Marshal(consentEntry(mimi.ConsentGrant)), peer: "gamma.example",
			change: func(r *http.Request) { r.Header.Set("From", "mimi@gamma.example") }, status: 403, code: CodeNotAllowed},
		{name: "request of a third party's consent", path: path("requestConsent", "mimi://gamma.example/u/carol"),
			body: codec.Marshal(&mimi.ConsentEntry{Operation: mimi.ConsentRequest, Scope: mimi.ConsentScope{Requester: theirUser, Target: "mimi://gamma.example/u/carol"}}), status: 421, code: CodeWrongProvider},
		{name: "request of another user than the path's", path: path("requestConsent", "mimi://alpha.example/u/carol"), body: codec.Marshal(consentEntry(mimi.ConsentRequest)), status: 400, code: CodeMalformed},
		{name: "request of garbage", path: path("requestConsent", string(ownUser)), body: []byte{9}, status: 400, code: CodeMalformed},
		{name: "request too large", path: path("requestConsent", string(ownUser)), body: []byte("x"), change: func(r *http.Request) { r.ContentLength = MaxRequestConsent + 1 }, status: 413, code: CodeTooLarge},
		{name: "query of another", path: path("identifierQuery", "gamma.example"), body: []byte{0, 0}, status: 421, code: CodeWrongProvider},
		{name: "notify without messages", path: notify, status: 400, code: CodeMalformed},
		{name: "notify of garbage", path: notify, body: []byte("garbage that is no message"), status: 400, code: CodeMalformed},
		{name: "notify of half a message", path: notify, body: append(append([]byte(nil), one...), one[:len(one)/2]...), status: 400, code: CodeMalformed},
		{name: "fewer numbers than messages", path: notify, body: append(append([]byte(nil), one...), one...), change: func(r *http.Request) { r.Header.Set(SeqField, "1") }, status: 400, code: CodeMalformed},
		{name: "a number to count no further from", path: notify, body: one, change: func(r *http.Request) { r.Header.Set(SeqField, "18446744073709551615") }, status: 400, code: CodeMalformed},
		{name: "numbers that are none", path: notify, body: one, change: func(r *http.Request) { r.Header.Set(SeqField, "-1") }, status: 400, code: CodeMalformed},
		{name: "too many messages", path: notify, body: bytes.Repeat(one, MaxNotifyMessages+1), status: 400, code: CodeMalformed},
		{name: "key material of garbage", path: path("keyMaterial", string(ownUser)), body: []byte("\x01garbage"), status: 400, code: CodeMalformed},
		{name: "key material with a byte too many", path: path("keyMaterial", string(ownUser)), body: append(codec.Marshal(keyMaterialRequest()), 0), status: 400, code: CodeMalformed},
		{name: "key material of another user than the path's", path: path("keyMaterial", "mimi://alpha.example/u/carol"), body: codec.Marshal(keyMaterialRequest()), status: 400, code: CodeMalformed},
		{name: "group info of garbage", path: path("groupInfo", string(ownRoom)), body: []byte{9}, status: 400, code: CodeMalformed},
		{name: "query of garbage", path: path("identifierQuery", "alpha.example"), body: []byte{9}, status: 400, code: CodeMalformed},
		{name: "body that ends early", path: path("update", string(ownRoom)), body: []byte("x"), change: func(r *http.Request) { r.Body, r.ContentLength = io.NopCloser(endsEarly{r.Body}), 10 }, status: 400, code: CodeMalformed},
		{name: "declared too large", path: path("submitMessage", string(ownRoom)), body: []byte("x"), change: func(r *http.Request) { r.ContentLength = MaxSubmitMessage + 1 }, status: 413, code: CodeTooLarge},
		{name: "too large without saying so", path: path("submitMessage", string(ownRoom)), body: make([]byte, MaxSubmitMessage+1), change: func(r *http.Request) { r.ContentLength = -1 }, status: 413, code: CodeTooLarge},
		{name: "bundle too large", path: BundlePath, body: make([]byte, MaxBundle+1), change: func(r *http.Request) { r.Header.Set("Content-Type", "application/json") }, status: 413, code: CodeTooLarge},
		{name: "another content type", path: path("update", string(ownRoom)), body: []byte("x"), change: func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, status: 415, code: CodeMalformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, p, o := newTestHandler()
			r := httptest.NewRequest(cmpOr(c.method, "POST"), "https://alpha.example"+c.path, bytes.NewReader(c.body))
			r.Header.Set("From", "mimi@beta.example")
			if c.change != nil {
				c.change(r)
			}
			if c.peer != "-" {
				r = r.WithContext(transport.WithPeerDomain(r.Context(), cmpOr(c.peer, "beta.example")))
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			var doc struct{ Type, Title, Code, Detail string }
			if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil {
				t.Fatalf("status %d, body %q: %v", w.Code, w.Body, err)
			}
			if w.Code != c.status || doc.Code != c.code || doc.Type != "about:blank" || doc.Title == "" || doc.Detail == "" {
				t.Errorf("got status %d, %+v, want %d, %s", w.Code, doc, c.status, c.code)
			}
			if ct := w.Header().Get("Content-Type"); ct != "application/problem+json" {
				t.Errorf("content type %s", ct)
			}
			if len(p.calls) > 0 {
				t.Errorf("the provider was asked: %v", p.calls)
			}
			if len(o.list) != 1 || !strings.HasSuffix(o.list[0], ":"+c.code) {
				t.Errorf("observed %v", o.list)
			}
		})
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func TestHostWithPortIsTheSameProvider(t *testing.T) {
	h, _, _ := newTestHandler()
	r := httptest.NewRequest("GET", "https://alpha.example:7000"+mimi.DirectoryPath, nil)
	r.Header.Set("From", "mimi@beta.example")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), "beta.example")))
	if w.Code != http.StatusOK {
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
}

func TestRefusalsOfTheProviderReachThePeerAndFailuresDoNot(t *testing.T) {
	h, p, o := newTestHandler()
	c := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) { return inProcess{h, "beta.example"}, nil })
	p.err = fmt.Errorf("wrapped: %w", &Error{Code: CodeBusy, Detail: "later", RetryAfter: 2500 * 1e6})
	_, _, err := c.Update(t.Context(), "alpha.example", ownRoom, []byte("x"))
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Status != 429 || e.Code != CodeBusy || e.Detail != "later" || e.RetryAfter.Seconds() != 3 || !Unavailable(err) {
		t.Errorf("got %+v, %v", e, err)
	}
	p.err = errors.New("open /secret/path: no such file")
	err = c.Notify(t.Context(), "alpha.example", theirRoom, []Sequenced{{Seq: 1, Fanout: fanoutBytes(t, "a")}})
	e, ok = errors.AsType[*Error](err)
	if !ok || e.Status != 500 || e.Code != CodeInternal || strings.Contains(err.Error(), "secret") || Permanent(err) {
		t.Errorf("got %+v, %v", e, err)
	}
	if want := []string{"directory:", "update:busy", "notify:internal"}; !reflect.DeepEqual(o.list, want) {
		t.Errorf("observed %v, want %v", o.list, want)
	}
}

func TestPeerCannotHoldMoreMemoryThanItsShare(t *testing.T) {
	h, p, _ := newTestHandler()
	post := func(peer string, body io.Reader, length int64) int {
		u, err := mimi.Expand("https://alpha.example/mimi/v1/update/{x}", string(ownRoom))
		if err != nil {
			t.Error(err)
		}
		r := httptest.NewRequest("POST", u, body)
		r.ContentLength = length
		r.Header.Set("From", "mimi@"+peer)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), peer)))
		return w.Code
	}
	var held sync.WaitGroup
	var ends []*io.PipeWriter
	for range maxInFlight / MaxUpdate {
		r, w := io.Pipe()
		ends = append(ends, w)
		held.Go(func() { post("beta.example", r, MaxUpdate) })
		if _, err := w.Write([]byte("x")); err != nil { // returns when the handler reads
			t.Fatal(err)
		}
	}
	if code := post("beta.example", strings.NewReader("x"), 1); code != http.StatusTooManyRequests {
		t.Errorf("status %d past the share", code)
	}
	if code := post("gamma.example", strings.NewReader("x"), 1); code != http.StatusOK {
		t.Errorf("status %d for another peer", code)
	}
	for _, w := range ends {
		w.Close()
	}
	held.Wait()
	if code := post("beta.example", strings.NewReader("x"), 1); code != http.StatusOK {
		t.Errorf("status %d after the bodies were read", code)
	}
	if n := len(h.(*handler).shares); n != 0 {
		t.Errorf("%d peers still hold something", n)
	}
	if len(p.calls) == 0 {
		t.Error("the provider was never asked")
	}
}

func TestPeerCannotTakeMoreRequestsThanItsShare(t *testing.T) {
	h := &handler{shares: make(map[string]share)}
	for i := range maxRequests {
		if !h.reserve("beta.example", 1, 0) {
			t.Fatalf("request %d is refused", i)
		}
	}
	if h.reserve("beta.example", 1, 0) {
		t.Error("one more than its share is taken")
	}
	if !h.reserve("gamma.example", 1, 0) {
		t.Error("another peer's is refused")
	}
	h.reserve("beta.example", -1, 0)
	if !h.reserve("beta.example", 1, 0) {
		t.Error("it is refused after another one has ended")
	}
}

func TestRequestsThatAreNotAdmittedReachNobody(t *testing.T) {
	_, p, o := newTestHandler()
	h := NewHandler("alpha.example", p, transport.PeerDomain, nil, o.observe, func(peer string, bytes int64) error {
		if peer == "beta.example" && bytes == 3 {
			return nil
		}
		return &Error{Code: CodeBusy, RetryAfter: 90 * time.Second}
	})
	post := func(peer, body string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("POST", "https://alpha.example"+BundlePath, strings.NewReader(body))
		r.Header.Set("From", "mimi@"+peer)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), peer)))
		return w
	}
	if w := post("beta.example", "{} "); w.Code != http.StatusNoContent || len(p.calls) != 1 {
		t.Errorf("what is admitted: %d, %v", w.Code, p.calls)
	}
	for _, w := range []*httptest.ResponseRecorder{post("beta.example", "{}"), post("gamma.example", "{} ")} {
		if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "90" || len(p.calls) != 1 {
			t.Errorf("what isn't: %d, after %q, %v", w.Code, w.Header().Get("Retry-After"), p.calls)
		}
	}
}

// answering is a peer that answers what a test says.
type answering func(*http.Request) *http.Response

func (f answering) RoundTrip(r *http.Request) (*http.Response, error) {
	if resp := f(r); resp != nil {
		return resp, nil
	}
	return nil, errors.New("connection lost")
}

func response(status int, contentType string, body []byte) *http.Response {
	return &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {contentType}}, Body: io.NopCloser(bytes.NewReader(body))}
}

func TestClientTellsRefusalsFromUnreachablePeersAndBadAnswers(t *testing.T) {
	directory, err := json.Marshal(mimi.NewDirectory("alpha.example"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name        string
		answer      func() *http.Response
		code        string // of the *Error, "" if it is none
		unavailable bool
		permanent   bool
	}{
		{"no answer", func() *http.Response { return nil }, "", true, false},
		{"not an answer of this endpoint", func() *http.Response { return response(200, contentType, []byte("x")) }, "", false, false},
		{"redirect", func() *http.Response { return response(302, "", nil) }, "", false, false},
		{"too much", func() *http.Response { return response(200, contentType, make([]byte, maxAnswer+1)) }, "", false, false},
		{"cut off", func() *http.Response {
			r := response(200, contentType, nil)
			r.Body = io.NopCloser(endsEarly{strings.NewReader("x")})
			return r
		}, "", true, false},
		{"a number that is none", func() *http.Response {
			r := response(200, contentType, codec.Marshal(&mimi.UpdateRoomResponse{}))
			r.Header.Set(SeqField, "x")
			return r
		}, "", false, false},
		{"refusal", func() *http.Response {
			return response(404, problemType, []byte(`{"code":"notFound","detail":"no room"}`))
		}, CodeNotFound, false, true},
		{"own code", func() *http.Response { return response(409, problemType, []byte(`{"code":"alreadyExists"}`)) }, "alreadyExists", false, false},
		{"code that is none", func() *http.Response { return response(400, problemType, []byte(`{"code":"x\ny"}`)) }, CodeMalformed, false, true},
		{"no document", func() *http.Response { return response(413, "text/html", []byte("<html>")) }, CodeTooLarge, false, true},
		{"busy", func() *http.Response { return response(429, "", nil) }, CodeBusy, true, false},
		{"gateway", func() *http.Response { return response(502, "", nil) }, CodeInternal, true, false},
		{"not approved", func() *http.Response { return response(403, problemType, []byte(`{"code":"unapproved"}`)) }, CodeUnapproved, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) {
				return answering(func(r *http.Request) *http.Response {
					if r.URL.Path == mimi.DirectoryPath {
						return response(200, "application/json", directory)
					}
					return c.answer()
				}), nil
			})
			_, _, err := client.Update(t.Context(), "alpha.example", ownRoom, []byte("x"))
			if err == nil {
				t.Fatal("no error")
			}
			e, ok := errors.AsType[*Error](err)
			if ok != (c.code != "") || ok && e.Code != c.code {
				t.Errorf("got %v, want code %q", err, c.code)
			}
			if Unavailable(err) != c.unavailable || Permanent(err) != c.permanent {
				t.Errorf("%v: unavailable %v, permanent %v", err, Unavailable(err), Permanent(err))
			}
		})
	}
}

func TestClientRefusesAnswersAboutSomethingElse(t *testing.T) {
	directory, err := json.Marshal(mimi.NewDirectory("alpha.example"))
	if err != nil {
		t.Fatal(err)
	}
	var answer codec.Marshaler
	client := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) {
		return answering(func(r *http.Request) *http.Response {
			if r.URL.Path == mimi.DirectoryPath {
				return response(200, "application/json", directory)
			}
			return response(200, contentType, codec.Marshal(answer))
		}), nil
	})
	answer = &mimi.KeyMaterialResponse{User: theirUser}
	if _, err := client.KeyMaterial(t.Context(), "alpha.example", keyMaterialRequest()); err == nil {
		t.Error("key material of another user is accepted")
	}
	answer = &mimi.GroupInfoResponse{Room: theirRoom, Code: mimi.GroupInfoNoSuchRoom}
	if _, err := client.GroupInfo(t.Context(), "alpha.example", ownRoom, groupInfoRequest()); err == nil {
		t.Error("an answer about another room is accepted")
	}
	answer = &mimi.IdentifierResponse{URIs: []mimi.URI{theirUser}}
	if _, err := client.IdentifierQuery(t.Context(), "alpha.example", new(mimi.IdentifierRequest)); err == nil {
		t.Error("a user of another provider is accepted")
	}
}

func TestPeerWithoutAnAddressIsUnavailable(t *testing.T) {
	client := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) { return nil, errors.New("no address") })
	if _, err := client.FetchBundle(t.Context(), "alpha.example"); !Unavailable(err) {
		t.Errorf("got %v", err)
	}
}

func TestDirectoryThatLeadsElsewhereIsNotFollowed(t *testing.T) {
	var asked []string
	client := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) {
		return answering(func(r *http.Request) *http.Response {
			asked = append(asked, r.URL.Host)
			return response(200, "application/json", []byte(`{"update":"https://gamma.example/{roomId}"}`))
		}), nil
	})
	if _, _, err := client.Update(t.Context(), "alpha.example", ownRoom, nil); err == nil || len(asked) != 1 {
		t.Errorf("got %v, asked %v", err, asked)
	}
}

func TestNewAddressesOfARestartedPeerAreLearnt(t *testing.T) {
	path, directories := "old", 0
	client := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) {
		return answering(func(r *http.Request) *http.Response {
			switch {
			case r.URL.Path == mimi.DirectoryPath:
				directories++
				return response(200, "application/json", []byte(`{"notify":"https://alpha.example/`+path+`/{roomId}"}`))
			case strings.HasPrefix(r.URL.Path, "/"+path+"/"):
				return response(201, "", nil)
			}
			return response(404, "", nil)
		}), nil
	})
	msgs := []Sequenced{{Seq: 1, Fanout: fanoutBytes(t, "a")}}
	for range 3 {
		if err := client.Notify(t.Context(), "alpha.example", theirRoom, msgs); err != nil {
			t.Fatal(err)
		}
	}
	path = "new"
	if err := client.Notify(t.Context(), "alpha.example", theirRoom, msgs); err != nil || directories != 2 {
		t.Errorf("%v, directory asked for %d times", err, directories)
	}
}

func FuzzHandler(f *testing.F) {
	f.Add("POST", "/mimi/v1/notify/mimi%3A%2F%2Fbeta.example%2Fr%2Froom", "1", fanoutBytes(f, "a"))
	f.Add("POST", "/mimi/v1/keyMaterial/mimi%3A%2F%2Falpha.example%2Fu%2Falice", "", codec.Marshal(keyMaterialRequest()))
	f.Add("POST", "/mimi/v1/groupInfo/mimi%3A%2F%2Falpha.example%2Fr%2Froom", "", codec.Marshal(groupInfoRequest()))
	f.Add("GET", BundlePath, "", []byte(nil))
	f.Add("POST", LogPath+"mimi%3A%2F%2Falpha.example%2Fr%2Froom", "", codec.Marshal(LogRequest{After: 7, Head: []byte("head")}))
	f.Add("GET", KnownPath, "", []byte(nil))
	f.Fuzz(func(t *testing.T, method, path, seqs string, body []byte) {
		r, err := http.NewRequest(method, "https://alpha.example", bytes.NewReader(body))
		if err != nil || !strings.HasPrefix(path, "/") {
			return
		}
		if r.URL, err = r.URL.Parse(path); err != nil || r.URL.Host != "alpha.example" {
			return
		}
		r.Header.Set("From", "mimi@beta.example")
		r.Header.Set(SeqField, seqs)
		h, p, _ := newTestHandler()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r.WithContext(transport.WithPeerDomain(r.Context(), "beta.example")))
		if w.Code == http.StatusInternalServerError {
			t.Fatalf("%s %s fails: %s", method, path, w.Body)
		}
		if w.Code >= 400 && len(p.calls) > 0 {
			t.Fatalf("the provider was asked %v before status %d", p.calls, w.Code)
		}
	})
}

func TestHeadsAreOneBoundedByteSequence(t *testing.T) {
	for _, b := range [][]byte{{1}, []byte("head"), make([]byte, MaxHead)} {
		if got, err := parseHead(http.Header{HeadField: {formatHead(b)}}); err != nil || !bytes.Equal(got, b) {
			t.Errorf("a head of %d bytes is read as one of %d, %v", len(b), len(got), err)
		}
	}
	if b, err := parseHead(http.Header{}); b != nil || err != nil {
		t.Errorf("no field: %q, %v", b, err)
	}
	for _, v := range [][]string{
		{""}, {":"}, {"::"}, {"aGVhZA=="}, {":aGVhZA==:x"}, {":aGVhZA:"}, {":aGVhZB==:"}, {":a b:"}, {":aGVhZA==:", ":aGVhZA==:"},
		{formatHead(make([]byte, MaxHead+1))}, {formatHead(make([]byte, 2*MaxHead))},
	} {
		if b, err := parseHead(http.Header{HeadField: v}); err == nil {
			t.Errorf("%.40q is read as %d bytes", v, len(b))
		}
	}
}

func FuzzParseHead(f *testing.F) {
	f.Add(":aGVhZA==:")
	f.Add("::")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := parseHead(http.Header{HeadField: {s}})
		if err != nil {
			return
		}
		if again, err := parseHead(http.Header{HeadField: {formatHead(b)}}); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is read as %x, then as %x, %v", s, b, again, err)
		}
	})
}
