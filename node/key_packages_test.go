package node

import (
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

func TestAKeyPackageIsHandedOutOnce(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	alice.createRoom()
	const packages, claims = 30, 40
	bob.publish(packages)
	var mu sync.Mutex
	seen := make(map[string]int)
	exhausted := 0
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range claims / 4 {
				resp, err := alice.claim(bob.user)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if kp := resp.Clients[0].KeyPackage; kp != nil {
					seen[string(kp.Ref())]++
				} else if resp.Code == mimi.NoCompatibleMaterial && resp.Clients[0].Code == mimi.KeyMaterialExhausted {
					exhausted++
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	for ref, times := range seen {
		if times != 1 {
			t.Errorf("KeyPackage %x was handed out %d times", ref, times)
		}
	}
	if len(seen) != packages || exhausted != claims-packages {
		t.Errorf("%d KeyPackages and %d refusals, want %d and %d", len(seen), exhausted, packages, claims-packages)
	}
	// Publishing one again doesn't bring it back.
	resp := must(bob.api.PublishKeyPackages(t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{
		KeyPackages: [][]byte{codec.Marshal(bob.kps[0])},
	})))(t)
	if resp.Msg.Available != 0 {
		t.Errorf("%d KeyPackages are available", resp.Msg.Available)
	}
}

func TestKeyPackagesThatCannotBeUsedAreNotPublished(t *testing.T) {
	n := newNode(t, "alpha")
	alice, eve := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "eve", "eve-laptop")
	good := alice.keyPackages(1)[0]
	tampered := append([]byte{}, good...)
	tampered[len(tampered)-1] ^= 1
	expired, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: testSuite, Credential: mls.X509Credential(alice.chain), Signer: alice.signer,
		Lifetime: mls.LifetimeFrom(time.Now().Add(-48*time.Hour), time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		kp   []byte
		code string
	}{
		{"garbage", []byte("garbage"), "malformed"},
		{"truncated", good[:len(good)-3], "malformed"},
		{"bad signature", tampered, "malformed"},
		{"another client's", eve.keyPackages(1)[0], "notAllowed"},
		{"expired", codec.Marshal(expired), "malformed"},
	} {
		_, err := alice.api.PublishKeyPackages(t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{KeyPackages: [][]byte{good, c.kp}}))
		if got := code(err); got != c.code {
			t.Errorf("%s: %q, want %q", c.name, got, c.code)
		}
	}
	count := func(req *api.PublishKeyPackagesRequest) uint32 {
		return must(alice.api.PublishKeyPackages(t.Context(), connect.NewRequest(req)))(t).Msg.Available
	}
	if got := count(&api.PublishKeyPackagesRequest{}); got != 0 {
		t.Errorf("after refusals %d KeyPackages are there", got)
	}
	if got := count(&api.PublishKeyPackagesRequest{KeyPackages: alice.keyPackages(5)}); got != 5 {
		t.Errorf("%d KeyPackages, want 5", got)
	}
	if got := count(&api.PublishKeyPackagesRequest{KeyPackages: alice.keyPackages(2), Replace: true}); got != 2 {
		t.Errorf("%d KeyPackages after replacing, want 2", got)
	}
	if _, err := alice.api.PublishKeyPackages(t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{KeyPackages: alice.keyPackages(n.Node.cfg.Limits.KeyPackages)})); code(err) != "busy" {
		t.Errorf("more than the limit: %v", err)
	}
}

func TestOnlyParticipantsClaimKeyPackages(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob, eve := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone"), newClient(t, n, "eve", "eve-laptop")
	bob.publish(1)
	eve.room = alice.createRoom()
	if _, err := eve.claim(bob.user); code(err) != "notAllowed" {
		t.Errorf("somebody who isn't in the room: %v", err)
	}
	forged := *eve
	forged.user = alice.user // says that she is alice
	if _, err := forged.claim(bob.user); code(err) != "notAllowed" {
		t.Errorf("under another name: %v", err)
	}
	if resp, err := alice.claim("mimi://alpha.example/u/nobody"); err != nil || resp.Code != mimi.UserUnknown {
		t.Errorf("an unknown user: %+v, %v", resp, err)
	}
	if resp, err := alice.claim(bob.user); err != nil || resp.Code != mimi.KeyMaterialSuccess {
		t.Errorf("the participant: %+v, %v", resp, err)
	}
}
