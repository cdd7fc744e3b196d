package node

import (
	"crypto/rand"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

func (c *testClient) consent(op mimi.ConsentOperation, requester, target, room mimi.URI) error {
	_, err := c.api.UpdateConsent(c.t.Context(), connect.NewRequest(&api.UpdateConsentRequest{
		Entry: codec.Marshal(&mimi.ConsentEntry{Operation: op, Scope: mimi.ConsentScope{Requester: requester, Target: target, Room: room}}),
	}))
	return err
}

func (c *testClient) consents() []*api.Consent {
	c.t.Helper()
	return must(c.api.Consents(c.t.Context(), connect.NewRequest(&api.ConsentsRequest{})))(c.t).Msg.Consents
}

func request(requester, target, room mimi.URI) *mimi.ConsentEntry {
	return &mimi.ConsentEntry{Operation: mimi.ConsentRequest, Scope: mimi.ConsentScope{Requester: requester, Target: target, Room: room}}
}

// demand has a node give out KeyPackages with consent only.
func (n *testNode) demand() {
	n.t.Helper()
	n.stop()
	n.cfg.Consent = ConsentExplicit
	n.start()
}

// storedUnder counts the keys with a prefix.
func storedUnder(t *testing.T, n *testNode, prefix string) (count int) {
	t.Helper()
	for k := range dump(t, n.Node) {
		if strings.HasPrefix("n/"+k, prefix) { // dump leaves n/ out
			count++
		}
	}
	return count
}

func TestOneSpeaksForOneselfAboutConsent(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob, eve := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone"), newClient(t, n, "eve", "eve-laptop")
	for _, c := range []struct {
		name              string
		op                mimi.ConsentOperation
		requester, target mimi.URI
		code              string
	}{
		{"a request of another", mimi.ConsentRequest, alice.user, bob.user, "notAllowed"},
		{"a cancellation of another", mimi.ConsentCancel, alice.user, bob.user, "notAllowed"},
		{"a grant of another", mimi.ConsentGrant, eve.user, bob.user, "notAllowed"},
		{"a denial of another", mimi.ConsentRevoke, alice.user, bob.user, "notAllowed"},
		{"of oneself", mimi.ConsentGrant, eve.user, eve.user, "malformed"},
		{"of a stranger's provider", mimi.ConsentRequest, eve.user, "mimi://gamma.example/u/carol", "unapprovedPeer"},
	} {
		if err := eve.consent(c.op, c.requester, c.target, ""); code(err) != c.code {
			t.Errorf("%s: %v, want %s", c.name, err, c.code)
		}
	}
	if got := storedUnder(t, n, prefixConsent) + storedUnder(t, n, prefixConsentOf); got != 0 {
		t.Errorf("%d records are left of it", got)
	}
}

func TestADenialBindsColleaguesAndIsNotTold(t *testing.T) {
	n := newNode(t, "alpha") // which asks for nobody's consent
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	bob.publish(5)
	first := alice.createRoom()
	want := func(code mimi.KeyMaterialUserCode) {
		t.Helper()
		if resp, err := alice.claim(bob.user); err != nil || resp.Code != code || (code != mimi.KeyMaterialSuccess && len(resp.Clients) > 0) {
			t.Errorf("claim: %+v, %v, want %v", resp, err, code)
		}
	}
	want(mimi.KeyMaterialSuccess)
	if err := alice.consent(mimi.ConsentRequest, alice.user, bob.user, ""); err != nil {
		t.Fatal(err)
	}
	if err := bob.consent(mimi.ConsentRevoke, alice.user, bob.user, ""); err != nil {
		t.Fatal(err)
	}
	want(mimi.NoConsent)
	if list := alice.consents(); len(list) != 1 || list[0].Asked == 0 || list[0].Decision != 0 {
		t.Errorf("alice learns %v", list)
	}
	if err := bob.consent(mimi.ConsentGrant, alice.user, bob.user, first); err != nil {
		t.Fatal(err)
	}
	want(mimi.KeyMaterialSuccess)
	alice.createRoom()
	want(mimi.NoConsentForThisRoom)
	// What was granted and is taken back is told.
	if err := bob.consent(mimi.ConsentRevoke, alice.user, bob.user, ""); err != nil {
		t.Fatal(err)
	}
	if list := alice.consents(); len(list) != 1 || mimi.ConsentOperation(list[0].Decision) != mimi.ConsentRevoke {
		t.Errorf("alice learns %v", list)
	}
}

// TestConsentIsThatOfTheUserWhoSigns has a hub ask with the name of somebody who has consent.
func TestConsentIsThatOfTheUserWhoSigns(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	beta.demand()
	alice, eve := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, alpha, "eve", "eve-laptop")
	bob := newClient(t, beta, "bob", "bob-phone")
	bob.publish(2)
	if err := bob.consent(mimi.ConsentGrant, alice.user, bob.user, ""); err != nil {
		t.Fatal(err)
	}
	ask := func(as, signer *testClient) (*mimi.KeyMaterialResponse, error) {
		req := &mimi.KeyMaterialRequest{
			RequestingUser: as.user, TargetUser: bob.user, Room: "mimi://alpha.example/r/lunch", CipherSuites: []mls.CipherSuite{testSuite},
			SignatureKey: must(testSuite.SignaturePublicKey(signer.signer.Public()))(t), Credential: mls.X509Credential(signer.chain),
		}
		if err := req.Sign(rand.Reader, testSuite, signer.signer); err != nil {
			t.Fatal(err)
		}
		return provider{beta.Node}.KeyMaterial(t.Context(), "alpha.example", req)
	}
	if resp, err := ask(alice, eve); err == nil {
		t.Errorf("eve as alice gets %+v", resp)
	}
	if resp, err := ask(eve, eve); err != nil || resp.Code != mimi.NoConsent {
		t.Errorf("eve gets %+v, %v", resp, err)
	}
	if got := storedUnder(t, beta, prefixKeyPackage); got != 2 {
		t.Errorf("%d KeyPackages are left, want 2", got)
	}
	if resp, err := ask(alice, alice); err != nil || resp.Code != mimi.KeyMaterialSuccess {
		t.Errorf("alice gets %+v, %v", resp, err)
	}
}

func TestFloodsOfRequestsForConsentAreBounded(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	p := provider{n.Node}
	open := func() int { return len(alice.consents()) }
	// One requester with a room each time.
	for i := range 2 * maxOpenOfRequester {
		if err := p.RequestConsent(t.Context(), "evil.example", request("mimi://evil.example/u/eve", alice.user, mimi.URI(fmt.Sprintf("mimi://evil.example/r/%d", i)))); err != nil {
			t.Fatal(err)
		}
	}
	if got := open(); got != maxOpenOfRequester {
		t.Errorf("%d requests of one requester wait, want %d", got, maxOpenOfRequester)
	}
	// All users of a provider together.
	for i := range 2 * maxOpenOfProvider {
		if err := p.RequestConsent(t.Context(), "evil.example", request(mimi.URI(fmt.Sprintf("mimi://evil.example/u/x%d", i)), alice.user, "")); err != nil {
			t.Fatal(err)
		}
	}
	if got := open(); got != maxOpenOfProvider {
		t.Errorf("%d requests of one provider's users wait, want %d", got, maxOpenOfProvider)
	}
	if err := p.RequestConsent(t.Context(), "good.example", request("mimi://good.example/u/bob", alice.user, "")); err != nil || open() != maxOpenOfProvider+1 {
		t.Errorf("another provider's user pays for it: %v, %d wait", err, open())
	}
	// Decisions that nobody asked for.
	for i := range maxTold + 10 {
		e := &mimi.ConsentEntry{Operation: mimi.ConsentGrant, Scope: mimi.ConsentScope{Requester: alice.user, Target: mimi.URI(fmt.Sprintf("mimi://evil.example/u/y%d", i))}}
		if err := p.UpdateConsent(t.Context(), "evil.example", e); err != nil {
			t.Fatal(err)
		}
	}
	if got := storedUnder(t, n, prefixConsentOf); got != maxTold {
		t.Errorf("%d decisions are kept, want %d", got, maxTold)
	}
	// At too high a rate.
	var err error
	for i := 0; i < 2*n.Node.cfg.Limits.Consents && err == nil; i++ {
		err = p.RequestConsent(t.Context(), "evil.example", request("mimi://evil.example/u/fast", alice.user, ""))
	}
	if r := reason(err); r == nil || r.code != "busy" {
		t.Errorf("a flood of one user: %v", err)
	}
	for i := 0; i < 2*n.Node.cfg.Limits.Consents && code(err) != "busy"; i++ {
		err = alice.consent(mimi.ConsentRevoke, "mimi://alpha.example/u/bob", alice.user, "")
	}
	if code(err) != "busy" {
		t.Errorf("a flood of an own user: %v", err)
	}
}

func TestAPeerDoesNotLearnWhoExistsOrIsDenied(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	p := provider{n.Node}
	const eve = mimi.URI("mimi://evil.example/u/eve")
	if err := p.RequestConsent(t.Context(), "evil.example", request(eve, "mimi://alpha.example/u/nobody", "")); err != nil {
		t.Errorf("of an unknown user: %v", err)
	}
	if got := storedUnder(t, n, prefixConsent); got != 0 {
		t.Errorf("%d records of an unknown user", got)
	}
	n.trust.Approve(t.Context(), "evil.example", n.root, "127.0.0.1:1")
	if err := alice.consent(mimi.ConsentRevoke, eve, alice.user, ""); err != nil {
		t.Fatal(err)
	}
	if err := p.RequestConsent(t.Context(), "evil.example", request(eve, alice.user, "")); err != nil {
		t.Errorf("of a user who denied it: %v", err)
	}
	if list := alice.consents(); len(list) != 1 || list[0].Asked != 0 {
		t.Errorf("alice is asked again: %v", list)
	}
	if d := n.consentOut.Depth("evil.example"); d != 0 {
		t.Errorf("the peer is told of the denial: %d entries wait", d)
	}
}

func TestGrantedKeyPackagesAreTheTargetsAndUsedOnce(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice := newClient(t, alpha, "alice", "alice-laptop")
	bob, carol := newClient(t, beta, "bob", "bob-phone"), newClient(t, beta, "carol", "carol-phone")
	grant := func(by, with *testClient) *mimi.ConsentEntry {
		e := &mimi.ConsentEntry{Operation: mimi.ConsentGrant, Scope: mimi.ConsentScope{Requester: alice.user, Target: by.user}}
		with.keyPackages(1)
		e.KeyPackages = append(e.KeyPackages, *with.kps[len(with.kps)-1])
		return e
	}
	p := provider{alpha.Node}
	if err := p.UpdateConsent(t.Context(), "beta.example", grant(bob, carol)); err == nil || storedUnder(t, alpha, prefixGranted) != 0 {
		t.Errorf("bob grants with carol's KeyPackage: %v", err)
	}
	good := grant(bob, bob)
	twice := *good
	twice.KeyPackages = append(twice.KeyPackages, grant(bob, bob).KeyPackages...)
	if err := p.UpdateConsent(t.Context(), "beta.example", &twice); err == nil {
		t.Error("two KeyPackages of one client are taken")
	}
	if err := p.UpdateConsent(t.Context(), "beta.example", good); err != nil {
		t.Fatal(err)
	}
	alice.createRoom()
	resp, err := alice.claim(bob.user)
	if err != nil || resp.Code != mimi.KeyMaterialSuccess || string(resp.Clients[0].KeyPackage.Ref()) != string(good.KeyPackages[0].Ref()) {
		t.Fatalf("claim: %+v, %v", resp, err)
	}
	if err := p.UpdateConsent(t.Context(), "beta.example", good); err != nil { // delivered again
		t.Fatal(err)
	}
	if resp, err := alice.claim(bob.user); err != nil || resp.Code == mimi.KeyMaterialSuccess {
		t.Errorf("the KeyPackage is handed out again: %+v, %v", resp, err)
	}
	// A revocation takes them along.
	if err := p.UpdateConsent(t.Context(), "beta.example", grant(bob, bob)); err != nil || storedUnder(t, alpha, prefixGranted) != 1 {
		t.Fatalf("another grant: %v", err)
	}
	revoke := &mimi.ConsentEntry{Operation: mimi.ConsentRevoke, Scope: good.Scope}
	if err := p.UpdateConsent(t.Context(), "beta.example", revoke); err != nil || storedUnder(t, alpha, prefixGranted) != 0 {
		t.Errorf("the revocation: %v, %d grants are left", err, storedUnder(t, alpha, prefixGranted))
	}
}
