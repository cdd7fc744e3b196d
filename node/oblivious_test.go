package node

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

const obliviousSuite = mls.X25519_AES128GCM_SHA256_Ed25519

// gatewayKeys are the keys of a room's hub as a client gets them.
func (c *testClient) gatewayKeys(room mimi.URI) *mimi.GatewayKeys {
	c.t.Helper()
	keys := new(mimi.GatewayKeys)
	resp := must(c.api.GatewayKeys(c.t.Context(), connect.NewRequest(&api.GatewayKeysRequest{Room: string(room), CipherSuite: uint32(obliviousSuite)})))(c.t)
	if err := codec.Unmarshal(resp.Msg.Keys, keys); err != nil {
		c.t.Fatal(err)
	}
	return keys
}

// oblivious sends a request to a room's hub.
func (c *testClient) oblivious(room mimi.URI, request []byte) (*ohttp.Response, error) {
	c.t.Helper()
	sealed, pending, err := must(ohttp.ParseKeys(c.gatewayKeys(room).Keys))(c.t).Seal(request)
	if err != nil {
		c.t.Fatal(err)
	}
	return c.relayed(room, sealed, pending)
}

func (c *testClient) relayed(room mimi.URI, sealed []byte, pending *ohttp.Pending) (*ohttp.Response, error) {
	c.t.Helper()
	resp, err := c.api.Oblivious(c.t.Context(), connect.NewRequest(&api.ObliviousRequest{Room: string(room), Request: sealed}))
	if err != nil {
		return nil, err
	}
	if n := len(resp.Msg.Response); n%obliviousPadding != 16+16 {
		c.t.Errorf("an answer of %d bytes isn't padded", n)
	}
	return ohttp.ParseResponse(must(pending.Open(resp.Msg.Response))(c.t))
}

func getRequest(domain string, hash [32]byte, part federation.Part) *ohttp.Request {
	return &ohttp.Request{Method: "GET", Scheme: "https", Authority: domain, Path: federation.AssetURL("", hash)[len("https://"):],
		Fields: []ohttp.Field{{Name: "range", Value: part.String()}}}
}

func TestHubsFetchWhatRelaysCannotSee(t *testing.T) {
	alpha, beta, gamma, delta := newNode(t, "alpha"), newNode(t, "beta"), newNode(t, "gamma"), newNode(t, "delta")
	federate(t, alpha, beta)
	federate(t, alpha, gamma)
	federate(t, gamma, delta) // beta and gamma have nothing to do with each other
	bob, carol := newClient(t, beta, "bob", "bob-phone"), newClient(t, gamma, "carol", "carol-phone")
	b, hash := randomBytes(federation.MaxPart + 100)
	bob.uploadAll(b)
	const room = mimi.URI("mimi://alpha.example/r/x")
	if err := carol.gatewayKeys(room).Verify(obliviousSuite, hubKeyOf(t, alpha), "mimi://alpha.example", uint64(time.Now().Unix())); err != nil {
		t.Error(err)
	}
	for _, part := range []federation.Part{{Length: federation.MaxPart}, {Offset: federation.MaxPart, Length: federation.MaxPart}, {Offset: 3, Length: 1}} {
		want := b[part.Offset:min(part.Offset+part.Length, int64(len(b)))]
		p, err := carol.oblivious(room, getRequest("beta.example", hash, part).Marshal(512))
		if err != nil || p.Status != 206 || !bytes.Equal(p.Content, want) || ohttp.Get(p.Fields, "content-range") != part.ContentRange(&federation.Asset{Size: int64(len(want)), Whole: int64(len(b))}) {
			t.Fatalf("%s: %d bytes, %v", part, len(p.Content), err)
		}
	}
	own, ownHash := randomBytes(100)
	alice := newClient(t, alpha, "alice", "alice-phone")
	alice.uploadAll(own)
	for _, c := range []*testClient{alice, carol} { // the hub's own users' assets, and its own users
		if p, err := c.oblivious(room, getRequest("alpha.example", ownHash, federation.Part{Length: 100}).Marshal(0)); err != nil || !bytes.Equal(p.Content, own) {
			t.Errorf("%s: %+v, %v", c.user, p, err)
		}
	}

	small := federation.Part{Length: 10}
	for _, x := range []struct {
		name   string
		change func(*ohttp.Request)
		status int
	}{
		{"a provider that isn't the hub's peer", func(q *ohttp.Request) { q.Authority = "delta.example" }, 403},
		{"this machine", func(q *ohttp.Request) { q.Authority = "127.0.0.1" }, 403},
		{"a port", func(q *ohttp.Request) { q.Authority += ":22" }, 403},
		{"another endpoint", func(q *ohttp.Request) { q.Path = federation.BundlePath }, 403},
		{"another scheme", func(q *ohttp.Request) { q.Scheme = "http" }, 403},
		{"another method", func(q *ohttp.Request) { q.Method = "DELETE" }, 403},
		{"content", func(q *ohttp.Request) { q.Content = []byte("x") }, 403},
		{"no such asset", func(q *ohttp.Request) { q.Path = q.Path[:len(q.Path)-1] + "x" }, 403},
		{"one that isn't there", func(q *ohttp.Request) { q.Path = federation.AssetURL("", [32]byte{1})[len("https://"):] }, 404},
		{"all of it", func(q *ohttp.Request) { q.Fields = nil }, 413},
		{"too much of it", func(q *ohttp.Request) {
			q.Fields[0].Value = federation.Part{Length: federation.MaxPart + 1}.String()
		}, 413},
		{"what is behind its end", func(q *ohttp.Request) {
			q.Fields[0].Value = federation.Part{Offset: int64(len(b)), Length: 1}.String()
		}, 400},
	} {
		q := getRequest("beta.example", hash, small)
		x.change(q)
		if p, err := carol.oblivious(room, q.Marshal(512)); err != nil || p.Status != x.status {
			t.Errorf("%s: %+v, %v", x.name, p, err)
		}
	}
	if p, err := carol.oblivious(room, []byte("no request")); err != nil || p.Status != 400 {
		t.Errorf("what isn't a request: %+v, %v", p, err)
	}
	if _, err := carol.relayed(room, make([]byte, 100), nil); code(err) != "gatewayKey" {
		t.Errorf("what isn't sealed: %v", err)
	}
	if _, err := carol.relayed(room, make([]byte, federation.MaxOblivious+1), nil); code(err) != "tooLarge" {
		t.Errorf("a large request: %v", err)
	}
	if _, err := carol.relayed("mimi://omega.example/r/x", make([]byte, 100), nil); code(err) != "unapprovedPeer" {
		t.Errorf("through an unknown hub: %v", err)
	}
}

// hubKeyOf is the key with which a node signs in rooms.
func hubKeyOf(t *testing.T, n *testNode) []byte {
	_, sender, err := n.keys.hub(obliviousSuite)
	if err != nil {
		t.Fatal(err)
	}
	return sender.SignatureKey
}

// A hub that was started anew has other keys; the relay learns it from the refusal of the old one.
func TestRelaysForgetKeysThatHubsHaveForgotten(t *testing.T) {
	alpha, gamma := newNode(t, "alpha"), newNode(t, "gamma")
	federate(t, alpha, gamma)
	carol := newClient(t, gamma, "carol", "carol-phone")
	const room = mimi.URI("mimi://alpha.example/r/x")
	old := carol.gatewayKeys(room)
	sealed, pending, err := must(ohttp.ParseKeys(old.Keys))(t).Seal(getRequest("alpha.example", [32]byte{1}, federation.Part{Length: 1}).Marshal(0))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := carol.relayed(room, sealed, pending); err != nil || p.Status != 404 {
		t.Fatalf("%+v, %v", p, err)
	}
	alpha.stop()
	alpha.start()
	eventually(t, func() error {
		if _, err := carol.relayed(room, sealed, pending); code(err) != "gatewayKey" {
			return fmt.Errorf("sealed for an old key: %v", err)
		}
		return nil
	})
	if keys := carol.gatewayKeys(room); bytes.Equal(keys.Keys, old.Keys) {
		t.Error("the relay hands on keys that the hub has forgotten")
	}
}

func TestOneWhoRelaysTooMuchIsRefused(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.Limits.Downloads = 1
	n.start()
	for range partsOfAsset {
		if _, err := n.relay(context.Background(), "mimi://alpha.example/u/alice", "alpha.example", []byte("x")); reason(err).code != "gatewayKey" {
			t.Fatal(err)
		}
	}
	if _, err := n.relay(context.Background(), "mimi://alpha.example/u/alice", "alpha.example", []byte("x")); reason(err).code != "busy" {
		t.Errorf("one too many: %v", err)
	}
	if _, err := n.relay(context.Background(), "mimi://alpha.example/u/bob", "alpha.example", []byte("x")); reason(err).code != "gatewayKey" {
		t.Errorf("another user: %v", err)
	}
}
