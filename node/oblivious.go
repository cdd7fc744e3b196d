package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/mls"
)

// Downloads by Oblivious HTTP (draft-ietf-mimi-protocol-06, Section 5.10.3): a client's own node is the relay, the room's
// hub the gateway, which asks the asset's provider. The relay knows who asks and not for what, the hub and the provider
// for what and not who. An asset comes in parts, a request each, so that nobody has more than that of it in memory; how many
// there are the relay sees.

const (
	obliviousPadding = 16 << 10         // responses have a multiple of so many bytes
	keysLifetime     = 10 * time.Minute // how long a relay hands on the same keys of a hub
)

// gatewayKeys returns the keys of the own gateway, signed as in rooms of a suite; unsigned if that is 0.
func (n *Node) gatewayKeys(suite mls.CipherSuite) (*mimi.GatewayKeys, error) {
	list, until, err := n.gateway.Keys()
	if err != nil {
		return nil, err
	}
	hub, err := mimi.ProviderURI(n.cfg.Domain)
	if err != nil {
		return nil, err
	}
	keys := &mimi.GatewayKeys{Hub: hub, NotAfter: uint64(until.Unix()), Keys: list}
	if suite == 0 {
		return keys, nil
	}
	signer, _, err := n.keys.hub(suite)
	if err != nil {
		return nil, err
	}
	return keys, keys.Sign(rand.Reader, suite, signer)
}

// oblivious answers a request that a peer relays, or this node itself. Only what can't be opened is refused in the open.
func (n *Node) oblivious(ctx context.Context, from string, request []byte) ([]byte, error) {
	b, reply, err := n.gateway.Open(request)
	if errors.Is(err, ohttp.ErrKey) {
		return nil, refuse("gatewayKey", "the request isn't for a key of this gateway")
	}
	if err != nil {
		return nil, err
	}
	resp, err := n.target(ctx, from, b)
	if err != nil {
		e, ok := errors.AsType[*federation.Error](peerError(err))
		if !ok {
			n.log.Error("request to the gateway failed", "peer", from, "err", err)
			e = &federation.Error{Status: http.StatusInternalServerError, Code: federation.CodeInternal}
		}
		doc, err := json.Marshal(map[string]string{"code": e.Code, "detail": e.Detail})
		if err != nil {
			return nil, err
		}
		n.metrics.refused.WithLabelValues("ohttpGateway", e.Code).Inc()
		resp = &ohttp.Response{Status: cmp.Or(e.Status, http.StatusInternalServerError), Content: doc,
			Fields: []ohttp.Field{{Name: "content-type", Value: "application/problem+json"}}}
		if s := int(e.RetryAfter.Seconds()); s > 0 {
			resp.Fields = append(resp.Fields, ohttp.Field{Name: "retry-after", Value: strconv.Itoa(s)})
		}
	}
	return reply.Seal(resp.Marshal(obliviousPadding))
}

// target does what a request to the gateway asks for: a part of an asset of an approved peer's user, or of an own one.
func (n *Node) target(ctx context.Context, from string, b []byte) (*ohttp.Response, error) {
	q, err := ohttp.ParseRequest(b)
	if err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	if q.Method != http.MethodGet || len(q.Content) > 0 {
		return nil, refuse("notAllowed", "the gateway is for downloads")
	}
	domain, hash, err := federation.ParseAssetURL(q.Scheme + "://" + q.Authority + q.Path)
	if err != nil {
		return nil, refuse("notAllowed", "%v", err)
	}
	part := federation.ParsePart(ohttp.Get(q.Fields, "range"))
	if part.Length == 0 || part.Length > federation.MaxPart {
		return nil, refuse("tooLarge", "the gateway gives %d bytes at a time, and the request has to ask for a range of them", federation.MaxPart)
	}
	a, err := n.downloadForPeer(from, part, func() (*federation.Asset, error) { return n.fetchAsset(ctx, domain, hash, part) })
	if err != nil {
		return nil, err
	}
	defer a.Close()
	content := make([]byte, a.Size)
	if _, err := io.ReadFull(a, content); err != nil {
		return nil, n.unreachable(domain, err)
	}
	return &ohttp.Response{Status: http.StatusPartialContent, Content: content,
		Fields: []ohttp.Field{{Name: "content-range", Value: part.ContentRange(a)}}}, nil
}

// relay passes a client's request on to the gateway of a hub, which doesn't learn whose it is.
func (n *Node) relay(ctx context.Context, user mimi.URI, hub string, request []byte) ([]byte, error) {
	if len(request) > federation.MaxOblivious {
		return nil, refuse("tooLarge", "a request of %d bytes, at most %d", len(request), federation.MaxOblivious)
	}
	release, err := n.beginDownload(string(user), 1, maxUserDownloads, n.cfg.Limits.Downloads)
	if err != nil {
		return nil, err
	}
	defer release()
	if hub == n.cfg.Domain {
		return n.oblivious(ctx, hub, request)
	}
	b, err := n.federation.Oblivious(ctx, hub, request)
	if err != nil {
		if e, ok := errors.AsType[*federation.Error](err); ok && e.Code == federation.CodeGatewayKey {
			n.relayed.forget(hub)
		}
		return nil, n.unreachable(hub, err)
	}
	return b, nil
}

// relayedKeys are the keys of hubs' gateways that were handed on lately: all clients get the same. The zero value is ready
// for use.
type relayedKeys struct {
	mu   sync.Mutex
	keys map[gatewaySuite]*mimi.GatewayKeys // guarded by mu
	had  map[gatewaySuite]time.Time         // guarded by mu; when they came
}

type gatewaySuite struct {
	hub   string
	suite mls.CipherSuite
}

func (r *relayedKeys) get(id gatewaySuite) *mimi.GatewayKeys {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.had[id]) >= keysLifetime {
		return nil
	}
	return r.keys[id]
}

func (r *relayedKeys) put(id gatewaySuite, keys *mimi.GatewayKeys) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keys == nil {
		r.keys, r.had = make(map[gatewaySuite]*mimi.GatewayKeys), make(map[gatewaySuite]time.Time)
	}
	r.keys[id], r.had[id] = keys, time.Now()
}

func (r *relayedKeys) forget(hub string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.keys {
		if id.hub == hub {
			delete(r.keys, id)
			delete(r.had, id)
		}
	}
}

// keysOfGateway returns the keys of a hub's gateway for a client, who verifies them.
func (n *Node) keysOfGateway(ctx context.Context, hub string, suite mls.CipherSuite) (*mimi.GatewayKeys, error) {
	if !suite.Supported() || !suite.X509() {
		return nil, refuse("malformed", "no rooms have cipher suite %d", suite)
	}
	if hub == n.cfg.Domain {
		return n.gatewayKeys(suite)
	}
	id := gatewaySuite{hub, suite}
	if keys := n.relayed.get(id); keys != nil {
		return keys, nil
	}
	keys, err := n.federation.GatewayKeys(ctx, hub, suite)
	if err != nil {
		return nil, n.unreachable(hub, err)
	}
	n.relayed.put(id, keys)
	return keys, nil
}
