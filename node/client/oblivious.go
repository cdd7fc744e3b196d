package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// Downloads by Oblivious HTTP (draft-ietf-mimi-protocol-06, Section 5.10.3): the own node relays what only the room's hub
// can read, a request for each part of an asset. The hub's keys come by the own node too, and are signed by the key that
// the group has in its external_senders.

const (
	requestPadding = 512       // requests have a multiple of so many bytes: names have many lengths
	keysAtMost     = time.Hour // how long keys are used before they are asked for again
)

// errNoGateway: the room's hub has no oblivious gateway.
var errNoGateway = errors.New("the hub has no oblivious gateway")

// gateway is what is known of the gateway of a room's hub.
type gateway struct {
	keys  *ohttp.Keys
	until time.Time
}

// gatewayKeys returns the keys of the hub's gateway.
func (r *Room) gatewayKeys(ctx context.Context) (*ohttp.Keys, error) {
	now := time.Now()
	r.mu.Lock()
	have, suite := r.gateway, r.group.Suite()
	hub, err := r.hubSender()
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if now.Before(have.until) {
		return have.keys, nil
	}
	res, err := call(ctx, r.c.session, r.c.session.service.GatewayKeys, &api.GatewayKeysRequest{Room: string(r.uri), CipherSuite: uint32(suite)})
	if Code(err) == "notFound" {
		return nil, errNoGateway
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the keys of the gateway: %w", err)
	}
	var signed mimi.GatewayKeys
	if err := codec.Unmarshal(res.Keys, &signed); err != nil {
		return nil, fmt.Errorf("keys of the gateway: %w", err)
	}
	if err := signed.Verify(suite, hub.SignatureKey, r.uri.Provider(), uint64(now.Unix())); err != nil {
		return nil, err
	}
	keys, err := ohttp.ParseKeys(signed.Keys)
	if err != nil {
		return nil, err
	}
	until := now.Add(keysAtMost)
	if end := int64(min(signed.NotAfter, 1<<40)); until.Unix() > end {
		until = time.Unix(end, 0)
	}
	r.setGateway(gateway{keys, until})
	return keys, nil
}

func (r *Room) setGateway(g gateway) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gateway = g
}

// pullOblivious fetches the bytes of an asset without the own node learning which: as many as the message says, if it says
// so.
func (r *Room) pullOblivious(ctx context.Context, url string, size uint64) ([]byte, error) {
	limit := int64(MaxAsset + gcmOverhead)
	if size != 0 {
		limit = int64(size)
	}
	b, whole, err := r.part(ctx, url, 0)
	if err != nil {
		return nil, err
	}
	if whole > limit || size != 0 && whole != limit {
		return nil, fmt.Errorf("the asset has %d bytes instead of %d", whole, limit)
	}
	for int64(len(b)) < whole {
		more, again, err := r.part(ctx, url, int64(len(b)))
		if err != nil {
			return nil, err
		}
		if again != whole {
			return nil, fmt.Errorf("the asset had %d bytes and has %d", whole, again)
		}
		b = append(b, more...)
	}
	return b, nil
}

// part fetches the next bytes of an asset, and tells how many there are in all.
func (r *Room) part(ctx context.Context, url string, offset int64) (b []byte, whole int64, err error) {
	host, path, _ := strings.Cut(strings.TrimPrefix(url, "https://"), "/")
	part := federation.Part{Offset: offset, Length: federation.MaxPart}
	q := ohttp.Request{Method: http.MethodGet, Scheme: "https", Authority: host, Path: "/" + path, Fields: []ohttp.Field{{Name: "range", Value: part.String()}}}
	p, err := r.query(ctx, q.Marshal(requestPadding))
	if Code(err) == "gatewayKey" { // the hub has others by now
		r.setGateway(gateway{})
		p, err = r.query(ctx, q.Marshal(requestPadding))
	}
	if err != nil {
		return nil, 0, err
	}
	if p.Status != http.StatusPartialContent {
		return nil, 0, fmt.Errorf("the hub answers with status %d: %.200q", p.Status, p.Content)
	}
	size, whole, err := part.Answers(ohttp.Get(p.Fields, "content-range"))
	if err != nil {
		return nil, 0, err
	}
	if int64(len(p.Content)) != size {
		return nil, 0, fmt.Errorf("%d bytes of %d came", len(p.Content), size)
	}
	return p.Content, whole, nil
}

// query has the own node relay a request to the gateway.
func (r *Room) query(ctx context.Context, request []byte) (*ohttp.Response, error) {
	keys, err := r.gatewayKeys(ctx)
	if err != nil {
		return nil, err
	}
	sealed, pending, err := keys.Seal(request)
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, r.c.session, r.c.session.service.Oblivious, &api.ObliviousRequest{Room: string(r.uri), Request: sealed})
	if err != nil {
		return nil, err
	}
	answer, err := pending.Open(res.Response)
	if err != nil {
		return nil, err
	}
	return ohttp.ParseResponse(answer)
}
