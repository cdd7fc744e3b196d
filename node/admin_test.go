package node

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

func TestAdminSocketIsTheOperatorsOnly(t *testing.T) {
	n := newNode(t, "alpha")
	eventually(t, func() error { _, err := DialAdmin(n.cfg.Socket()).Status(t.Context()); return err })
	for path, mode := range map[string]os.FileMode{
		n.cfg.Socket(): 0o600, keysDir(n.cfg.Data): 0o700, StoreDir(n.cfg.Data): 0o700, keysDir(n.cfg.Data) + "/node.key": 0o600,
		keysDir(n.cfg.Data) + "/quic.key": 0o600, keysDir(n.cfg.Data) + "/hub-ed25519.key": 0o600,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v (%v), want %v", path, info.Mode().Perm(), err, mode)
		}
	}
}

func TestAdminShowsStatusPeersRoomsAndMetrics(t *testing.T) {
	alpha, _, alice, bob, _, _ := twoNodes(t)
	a := DialAdmin(alpha.cfg.Socket())
	s := must(a.Status(t.Context()))(t)
	if s.Domain != "alpha.example" || s.Address != alpha.cfg.Listen || s.Rooms != 1 || s.Peers != 1 || s.Fingerprint != alpha.root {
		t.Errorf("the status is %+v", s)
	}
	rooms := must(a.Rooms(t.Context()))(t)
	if len(rooms) != 1 || rooms[0].Room != alice.room || rooms[0].Epoch != 1 || len(rooms[0].Participants) != 2 || len(rooms[0].Clients) != 2 || rooms[0].Clients[1] != bob.uri {
		t.Errorf("the rooms are %+v", rooms)
	}
	eventually(t, func() error {
		peers, err := a.Peers(t.Context())
		if err != nil {
			return err
		}
		if len(peers) != 1 || peers[0].Domain != "beta.example" || !peers[0].Approved || !peers[0].Alive || peers[0].Waiting != 0 {
			return errors.New("the peers aren't as they should be")
		}
		return nil
	})
	text := must(a.Metrics(t.Context()))(t)
	for _, want := range []string{`parley_accepted_total{kind="commit"} 1`, `parley_peer_alive{peer="beta.example"} 1`, "parley_streams 1"} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if err := a.ApprovePeer(t.Context(), "alpha.example", alpha.root, ""); err == nil {
		t.Error("a node approved itself")
	}
	if err := a.ApprovePeer(t.Context(), "Gamma", alpha.root, ""); err == nil {
		t.Error("a malformed domain was approved")
	}
	if err := a.RemovePeer(t.Context(), "gamma.example"); err == nil {
		t.Error("a peer was removed that isn't there")
	}
}

func TestOfflineAdministersTheStoreOfANodeThatIsDown(t *testing.T) {
	n := newNode(t, "alpha")
	if _, err := OpenOffline(n.cfg.Data); !errors.Is(err, store.ErrInUse) {
		t.Errorf("while the node runs: %v", err)
	}
	n.stop()
	if _, err := DialAdmin(n.cfg.Socket()).Status(t.Context()); !errors.Is(err, ErrNoNode) {
		t.Errorf("the socket of a node that is down: %v", err)
	}
	o := must(OpenOffline(n.cfg.Data))(t)
	if err := o.ApprovePeer(t.Context(), "beta.example", authority.Fingerprint{1}, "127.0.0.1:1"); err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	n.start()
	if p, ok := n.trust.Peer("beta.example"); !ok || p.Address != "127.0.0.1:1" {
		t.Errorf("after the start the peer is %+v", p)
	}
}

func TestANodeOfAnotherDomainIsNotOpened(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	cfg := n.cfg
	cfg.Domain = "beta.example"
	if _, err := Open(cfg, nil); err == nil || !strings.Contains(err.Error(), "alpha.example") {
		t.Errorf("opening it: %v", err)
	}
	cfg.Data = t.TempDir()
	if _, err := Open(cfg, nil); err == nil || !strings.Contains(err.Error(), "parley-authority init") {
		t.Errorf("opening a directory without an authority: %v", err)
	}
	if _, err := n.store.Get(nil); !errors.Is(err, store.ErrClosed) {
		t.Errorf("the store of a stopped node: %v", err)
	}
}

func TestSweepForgetsWhatIsOld(t *testing.T) {
	n := newNode(t, "alpha")
	old, fresh := uint64(1), now()
	room := "mimi://alpha.example/r/x"
	changes := map[string][]byte{
		prefixAnswer + room + "\x00old":      codec.Marshal(answerRecord{seq: 1, time: old}),
		prefixAnswer + room + "\x00fresh":    codec.Marshal(answerRecord{seq: 1, time: fresh}),
		prefixOwnRef + "old":                 codec.Marshal(refRecord{expires: 1}),
		prefixOwnRef + "fresh":               codec.Marshal(refRecord{expires: fresh / 1000}),
		prefixClaimedRef + "old":             codec.Marshal(refRecord{expires: 1}),
		prefixClaimedRef + "fresh":           codec.Marshal(refRecord{expires: fresh}),
		prefixFanout + room + "\x00oldoldol": append(be64(old), 1, 2, 3),
		prefixFanout + room + "\x00freshfre": append(be64(fresh), 1, 2, 3),
	}
	if _, err := n.store.Commit(changes, nil); err != nil {
		t.Fatal(err)
	}
	if err := n.sweep(); err != nil {
		t.Fatal(err)
	}
	for k := range changes {
		v, err := n.store.Get([]byte(k))
		if err != nil || (v != nil) != strings.Contains(k, "fresh") {
			t.Errorf("%q is there: %v (%v)", k, v != nil, err)
		}
	}
}
