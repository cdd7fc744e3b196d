package node

import (
	"errors"
	"slices"
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

// lastResort makes a KeyPackage of last resort.
func (c *testClient) lastResort() *mls.KeyPackage {
	c.t.Helper()
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: testSuite, Credential: mls.X509Credential(c.chain), Signer: c.signer, LeafExtensions: mimi.LeafExtensions(), LastResort: true,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.kps, c.secrets = append(c.kps, kp), append(c.secrets, secrets)
	return kp
}

func (c *testClient) publishThese(list ...*mls.KeyPackage) *api.PublishKeyPackagesResponse {
	c.t.Helper()
	req := &api.PublishKeyPackagesRequest{}
	for _, kp := range list {
		req.KeyPackages = append(req.KeyPackages, codec.Marshal(kp))
	}
	return must(c.api.PublishKeyPackages(c.t.Context(), connect.NewRequest(req)))(c.t).Msg
}

// TestKeyMaterialCodes has a test of noConsent and noConsentForThisRoom with those of consent, and of incompatibleProtocol
// with those of package federation.
func TestKeyMaterialCodes(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice := newClient(t, alpha, "alice", "alice-laptop")
	alice.createRoom()
	phone, tablet := newClient(t, beta, "bob", "bob-phone"), newClient(t, beta, "bob", "bob-tablet")
	idle := newClient(t, beta, "idle", "idle-phone")
	gone := newClient(t, beta, "gone", "gone-phone")
	gone.publish(1)
	must(beta.service.Revoke(t.Context(), string(gone.uri), "left"))(t)
	check := func(name string, user mimi.URI, edit func(*mimi.KeyMaterialRequest), want mimi.KeyMaterialUserCode, clients ...mimi.KeyMaterialClientCode) *mimi.KeyMaterialResponse {
		t.Helper()
		resp, err := alice.claimWith(user, edit)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var got []mimi.KeyMaterialClientCode
		for _, c := range resp.Clients {
			got = append(got, c.Code)
		}
		if resp.Code != want || !slices.Equal(got, clients) {
			t.Errorf("%s: %v with %v, want %v with %v", name, resp.Code, got, want, clients)
		}
		return resp
	}
	const ok, exhausted, incompatible = mimi.ClientKeyMaterialSuccess, mimi.KeyMaterialExhausted, mimi.NothingCompatible
	phone.publish(3)
	tablet.publish(1)
	otherSuite := func(r *mimi.KeyMaterialRequest) { r.CipherSuites = []mls.CipherSuite{mls.P256_AES128GCM_SHA256_P256} }
	otherExtension := func(r *mimi.KeyMaterialRequest) {
		r.RequiredCapabilities.Extensions = append(r.RequiredCapabilities.Extensions, 0xff01)
	}
	resp := check("a suite that nobody has", phone.user, otherSuite, mimi.NoCompatibleMaterial, incompatible, incompatible)
	for _, c := range resp.Clients {
		if c.Capabilities == nil || !slices.Contains(c.Capabilities.CipherSuites, testSuite) {
			t.Errorf("%s has the capabilities %+v", c.Client, c.Capabilities)
		}
	}
	check("an extension that nobody has", phone.user, otherExtension, mimi.NoCompatibleMaterial, incompatible, incompatible)
	check("both", phone.user, nil, mimi.KeyMaterialSuccess, ok, ok)
	check("the tablet's only one is gone", phone.user, nil, mimi.KeyMaterialPartialSuccess, ok, exhausted)
	check("one fits, one is exhausted", phone.user, otherExtension, mimi.NoCompatibleMaterial, incompatible, exhausted)
	check("the last", phone.user, nil, mimi.KeyMaterialPartialSuccess, ok, exhausted)
	check("nothing left", phone.user, nil, mimi.NoCompatibleMaterial, exhausted, exhausted)
	check("nothing ever", idle.user, nil, mimi.NoCompatibleMaterial)
	check("nobody", "mimi://beta.example/u/nobody", nil, mimi.UserUnknown)
	check("who was deleted", gone.user, nil, mimi.UserDeleted)
}

func TestExpiredKeyPackagesAreNotHandedOut(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	alice.createRoom()
	short, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: testSuite, Credential: mls.X509Credential(bob.chain), Signer: bob.signer, LeafExtensions: mimi.LeafExtensions(),
		Lifetime: mls.LifetimeFrom(time.Now(), time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	if have := bob.publishThese(short); have.Available != 1 {
		t.Fatalf("published: %+v", have)
	}
	eventually(t, func() error {
		if have := bob.publishThese(); have.Available != 0 {
			return errors.New("it counts")
		}
		return nil
	})
	if resp, err := alice.claim(bob.user); err != nil || resp.Code != mimi.NoCompatibleMaterial || resp.Clients[0].Code != mimi.KeyMaterialExhausted {
		t.Errorf("claim: %+v, %v", resp, err)
	}
	if got := storedUnder(t, n, prefixKeyPackage); got != 0 {
		t.Errorf("%d KeyPackages are left", got)
	}
}

func TestKeyPackagesAreValidForALimitedTime(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.Limits.KeyPackageDays = 30
	n.start()
	alice := newClient(t, n, "alice", "alice-laptop")
	for days, want := range map[int]string{29: "", 31: "notAllowed"} {
		kp, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{
			Suite: testSuite, Credential: mls.X509Credential(alice.chain), Signer: alice.signer,
			Lifetime: mls.LifetimeFrom(time.Now(), time.Duration(days)*24*time.Hour),
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = alice.api.PublishKeyPackages(t.Context(), connect.NewRequest(&api.PublishKeyPackagesRequest{KeyPackages: [][]byte{codec.Marshal(kp)}}))
		if code(err) != want {
			t.Errorf("%d days: %v, want %q", days, err, want)
		}
	}
	if have := alice.publishThese(); have.MaxLifetime != 30*24*3600 {
		t.Errorf("the longest is %d seconds", have.MaxLifetime)
	}
}

func TestALastResortIsReusedWhenAllOthersAreGone(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, carol := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "carol", "carol-laptop")
	bob := newClient(t, beta, "bob", "bob-phone")
	alice.createRoom()
	carol.createRoom()
	bobs := bob.subscribe()
	bobs.live()
	last := bob.lastResort()
	if have := bob.publishThese(last); have.Available != 0 || !have.LastResort {
		t.Errorf("published: %+v", have)
	}
	bob.publish(2)
	seen := make(map[string]bool)
	for range 2 {
		kp := must(alice.claim(bob.user))(t).Clients[0].KeyPackage
		if kp.LastResort() || seen[string(kp.Ref())] {
			t.Errorf("claimed %x", kp.Ref())
		}
		seen[string(kp.Ref())] = true
	}
	if have := bob.publishThese(); !have.LastResort {
		t.Error("the last resort counts as handed out")
	}
	for range 2 {
		for _, c := range []*testClient{alice, carol} {
			resp := must(c.claim(bob.user))(t)
			if resp.Code != mimi.KeyMaterialSuccess || string(resp.Clients[0].KeyPackage.Ref()) != string(last.Ref()) {
				t.Errorf("claimed %+v", resp)
			}
		}
	}
	told := false
	for !told { // bob is told that it is time for more
		if x := bobs.next().GetKeyPackages(); x != nil {
			told = x.Available == 0 && !x.LastResort
		}
	}
	// Each of the hubs can send Welcomes for it, one for each claim.
	rec := must(beta.refOwner(last.Ref()))(t)
	if !rec.claimedBy("alpha.example") || rec.claimedBy("gamma.example") {
		t.Errorf("it is claimed by %q", rec.provider)
	}
	for range 2 {
		if rec.unclaim("alpha.example"); rec.claimedBy("beta.example") {
			t.Errorf("an own hub is among %q", rec.provider)
		}
	}
	if rec.claimedBy("alpha.example") {
		t.Errorf("after two Welcomes: %q", rec.provider)
	}
	// Welcomes of both lead into their rooms.
	seq := alice.commit(alice.adding(bob.user)...)
	bobs.until(func() bool { return bob.group != nil })
	if bob.room != alice.room || bob.seq != seq {
		t.Errorf("bob is in %s", bob.room)
	}
	bob.group = nil
	carol.commit(carol.adding(bob.user)...)
	bobs.until(func() bool { return bob.group != nil })
	if bob.room != carol.room {
		t.Errorf("bob is in %s", bob.room)
	}
	next := bob.lastResort()
	if have := bob.publishThese(next); !have.LastResort {
		t.Errorf("after its replacement: %+v", have)
	}
	if kp := must(alice.claim(bob.user))(t).Clients[0].KeyPackage; string(kp.Ref()) != string(next.Ref()) {
		t.Error("the former last resort is handed out")
	}
	if got := storedUnder(t, beta, prefixLastResort); got != 1 {
		t.Errorf("%d last resorts are stored", got)
	}
}

func TestARefusedClaimTakesNothing(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.Limits.ClaimsPerTarget = 3
	n.start()
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	alice.createRoom()
	bob.publish(10)
	refused := 0
	for range 10 {
		if _, err := alice.claim(bob.user); code(err) == "busy" {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if have := bob.publishThese(); refused != 7 || have.Available != 7 {
		t.Errorf("%d claims were refused, %d KeyPackages are left, want 7 and 7", refused, have.Available)
	}
}

// TestAHubTakesAKeyPackageOnceFromItsProvider has a provider hand one out twice.
func TestAHubTakesAKeyPackageOnceFromItsProvider(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, bob := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	alice.createRoom()
	bob.publish(1)
	kp := must(alice.claim(bob.user))(t).Clients[0].KeyPackage
	if _, err := beta.store.Commit(map[string][]byte{
		string(key(prefixKeyPackage, bob.uri, kp.Ref())): append(be64(uint64(expiry(kp))), codec.Marshal(kp)...),
	}, nil); err != nil {
		t.Fatal(err)
	}
	if resp, err := alice.claim(bob.user); code(err) != "unavailable" {
		t.Errorf("claimed again: %+v, %v", resp, err)
	}
}
