package client

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// carol's node relays her downloads, and tries to learn from what she asks for or to give her something else.
func TestRelayLearnsNothingAndChangesNothing(t *testing.T) {
	p := providers(t, "alpha", "beta", "gamma")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	carol, f := p[2].enrolFaulty("carol", "carol-pc")
	room := alice.create(bob.User(), carol.User())
	agree(t, room.URI(), alice, bob, carol)
	file := make([]byte, federation.MaxPart+17)
	rand.Read(file)
	part, err := bob.Upload(t.Context(), bytes.NewReader(file), content.Bytes, "")
	if err != nil {
		t.Fatal(err)
	}
	r := carol.room(room.URI())
	fetch := func() error {
		b, err := r.fetch(t.Context(), bob.User(), &part)
		if err == nil && !bytes.Equal(b, file) {
			t.Errorf("%d other bytes came", len(b))
		}
		return err
	}
	first := func(url string) (int, int64, error) {
		b, whole, err := r.part(t.Context(), url, 0)
		return len(b), whole, err
	}
	n, whole, err := first(part.External.URL)
	if err != nil || n != federation.MaxPart || whole != int64(part.External.Size) {
		t.Fatalf("%d of %d, %v", n, whole, err)
	}
	if err := fetch(); err != nil {
		t.Fatal(err)
	}

	// Keys of the relay's own.
	var own ohttp.Gateway
	list, until, err := own.Keys()
	if err != nil {
		t.Fatal(err)
	}
	mallory, err := mls.X25519_AES128GCM_SHA256_Ed25519.GenerateSignatureKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*mimi.GatewayKeys){
		"keys under the hub's signature": func(k *mimi.GatewayKeys) { k.Keys = list },
		"keys under another's": func(k *mimi.GatewayKeys) {
			k.Keys, k.NotAfter = list, uint64(until.Unix())
			if err := k.Sign(rand.Reader, r.group.Suite(), mallory); err != nil {
				t.Error(err)
			}
		},
		"keys that the hub has forgotten": func(k *mimi.GatewayKeys) { k.NotAfter = 1 },
	} {
		r.setGateway(gateway{})
		f.set(func(f *faults) {
			f.keys = func(res *api.GatewayKeysResponse) error {
				var k mimi.GatewayKeys
				err := codec.Unmarshal(res.Keys, &k)
				change(&k)
				res.Keys = codec.Marshal(&k)
				return err
			}
			f.relay = func(*api.ObliviousResponse) { t.Errorf("%s: a request was sent", name) }
		})
		if err := fetch(); err == nil {
			t.Errorf("%s are used", name)
		}
	}
	f.set(func(f *faults) { f.keys, f.relay = nil, func(res *api.ObliviousResponse) { res.Response[20] ^= 1 } })
	if err := fetch(); !errors.Is(err, ohttp.ErrResponse) {
		t.Errorf("an answer that was changed: %v", err)
	}
	var last []byte
	f.set(func(f *faults) {
		f.relay = func(res *api.ObliviousResponse) {
			if last != nil {
				res.Response = last
			}
			last = res.Response
		}
	})
	if err := fetch(); !errors.Is(err, ohttp.ErrResponse) {
		t.Errorf("the answer to another request: %v", err)
	}
	f.set(func(f *faults) { f.relay = nil })

	// The hub is started anew, and has other keys.
	p[0].stop()
	p[0].start()
	within(t, fetch)
	// A hub that has no gateway is asked for a download.
	r.setGateway(gateway{})
	gone := connect.NewError(connect.CodeNotFound, errors.New("no such endpoint"))
	if d, err := connect.NewErrorDetail(&api.ErrorInfo{Code: "notFound"}); err == nil {
		gone.AddDetail(d)
	}
	f.set(func(f *faults) {
		f.keys = func(*api.GatewayKeysResponse) error { return gone }
		f.relay = func(*api.ObliviousResponse) { t.Error("there is no gateway, and it was asked") }
	})
	if err := fetch(); err != nil {
		t.Errorf("from a hub without a gateway: %v", err)
	}
}
