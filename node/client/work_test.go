package client

import (
	"context"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// Clients send a hub the part of a GroupInfo that it can't compute, and all of it if that is what it takes.
func TestAHubOfAnEarlierReleaseGetsTheWholeGroupInfo(t *testing.T) {
	p := providers(t, "alpha")
	alice, old := p[0].enrolFaulty("alice", "alice-laptop")
	bob := p[0].enrol("bob", "bob-phone")
	room := alice.create(bob.User())
	agree(t, room.URI(), alice, bob)
	var parts, wholes atomic.Int32
	old.set(func(f *faults) {
		f.update = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
			var q mimi.UpdateRequest
			if err := codec.Unmarshal(req.Msg.Body, &q); err != nil {
				return nil, err
			}
			if q.Bundle.GroupInfo.Partial == nil && q.Bundle.RatchetTree.Tree != nil {
				wholes.Add(1)
				return f.ClientServiceClient.Update(ctx, req)
			}
			parts.Add(1)
			malformed := connect.NewError(connect.CodeInvalidArgument, nil)
			if d, err := connect.NewErrorDetail(&api.ErrorInfo{Code: codeMalformed}); err == nil {
				malformed.AddDetail(d)
			}
			return nil, malformed
		}
	})
	if err := room.UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice, bob)
	room.mu.Lock()
	room.frozen = ErrFrozen
	room.mu.Unlock()
	if _, err := alice.Join(t.Context(), room.URI()); err != nil {
		t.Fatal(err)
	}
	agree(t, room.URI(), alice, bob)
	if parts.Load() != 2 || wholes.Load() != 2 {
		t.Errorf("%d requests with a part and %d with all, want 2 of each", parts.Load(), wholes.Load())
	}
}
