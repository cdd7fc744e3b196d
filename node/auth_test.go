package node

import (
	"crypto/rand"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
)

func TestAuthenticationAsksForTheCredentialsKey(t *testing.T) {
	n := newNode(t, "alpha")
	alice, eve := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "eve", "eve-laptop")
	challenge := func() []byte {
		return must(alice.enrol.Challenge(t.Context(), connect.NewRequest(&api.ChallengeRequest{})))(t).Msg.Nonce
	}
	sign := func(c *testClient, label string, content []byte) []byte {
		return must(testSuite.SignWithLabel(rand.Reader, c.signer, label, content))(t)
	}
	used := challenge()
	for _, c := range []struct {
		name string
		req  func(nonce []byte) *api.AuthenticateRequest
		code string
	}{
		{"right", func(nonce []byte) *api.AuthenticateRequest {
			copy(used, nonce)
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 1, Signature: sign(alice, AuthenticateLabel, append(nonce, "alpha.example"...))}
		}, ""},
		{"nonce used before", func([]byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: used, Chain: alice.chain, CipherSuite: 1, Signature: sign(alice, AuthenticateLabel, append(used, "alpha.example"...))}
		}, "unauthenticated"},
		{"own nonce", func([]byte) *api.AuthenticateRequest {
			nonce := make([]byte, 32)
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 1, Signature: sign(alice, AuthenticateLabel, append(nonce, "alpha.example"...))}
		}, "unauthenticated"},
		{"another's key", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 1, Signature: sign(eve, AuthenticateLabel, append(nonce, "alpha.example"...))}
		}, "unauthenticated"},
		{"signed for another node", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 1, Signature: sign(alice, AuthenticateLabel, append(nonce, "beta.example"...))}
		}, "unauthenticated"},
		{"another label", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 1, Signature: sign(alice, "KeyPackageTBS", append(nonce, "alpha.example"...))}
		}, "unauthenticated"},
		{"no chain", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, CipherSuite: 1}
		}, "malformed"},
		{"garbage for a chain", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, Chain: [][]byte{{1, 2, 3}}, CipherSuite: 1}
		}, "malformed"},
		{"another suite than the key's", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 2}
		}, "malformed"},
		{"unknown suite", func(nonce []byte) *api.AuthenticateRequest {
			return &api.AuthenticateRequest{Nonce: nonce, Chain: alice.chain, CipherSuite: 1 << 20}
		}, "malformed"},
	} {
		_, err := alice.enrol.Authenticate(t.Context(), connect.NewRequest(c.req(challenge())))
		if got := code(err); got != c.code {
			t.Errorf("%s: %q, want %q (%v)", c.name, got, c.code, err)
		}
	}
}

func TestRequestsNeedAToken(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	token := alice.token
	for _, bad := range []string{"", "x", token + "x"} {
		alice.token = bad
		if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); code(err) != "unauthenticated" {
			t.Errorf("token %q: %v", bad, err)
		}
	}
	alice.token = token
	n.stop()
	n.start()
	if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); code(err) != "unauthenticated" {
		t.Errorf("a token of before the restart: %v", err)
	}
}

func TestExpiredTokensAreRefused(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	n.auth.mu.Lock()
	for token, s := range n.auth.sessions { // a copy: who answered the login may still read it
		over := *s
		over.expires = time.Now().Add(-time.Second)
		n.auth.sessions[token] = &over
	}
	n.auth.mu.Unlock()
	if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); code(err) != "unauthenticated" {
		t.Errorf("an expired token: %v", err)
	}
}

func TestInvitationsAreUsedOnce(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	inv := must(n.service.Invite(t.Context(), alice.user, time.Hour))(t)
	first, second := *alice, *alice
	first.uri, second.uri = "mimi://alpha.example/d/alice-1", "mimi://alpha.example/d/alice-2"
	first.signer = must(testSuite.GenerateSignatureKey(rand.Reader))(t)
	second.signer = must(testSuite.GenerateSignatureKey(rand.Reader))(t)
	if _, err := first.enrol.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: inv.Token, Csr: first.csr()})); err != nil {
		t.Fatal(err)
	}
	if _, err := second.enrol.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: inv.Token, Csr: second.csr()})); code(err) != "tokenUsed" {
		t.Errorf("the invitation again: %v", err)
	}
	if _, err := second.enrol.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: "nonsense", Csr: second.csr()})); code(err) != "tokenUnknown" {
		t.Errorf("an unknown invitation: %v", err)
	}
}

func TestClientsAreLimitedToTheirRate(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.Limits.RequestsPerSecond = 5
	n.start()
	alice := newClient(t, n, "alice", "alice-laptop")
	other := newClient(t, n, "alice", "alice-phone")
	busy := 0
	for range 30 {
		if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); code(err) == "busy" {
			busy++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if busy < 10 {
		t.Errorf("%d of 30 requests were refused", busy)
	}
	if _, err := other.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); err != nil {
		t.Errorf("another client: %v", err)
	}
}

func TestARevokedClientIsShutOutAtOnce(t *testing.T) {
	n, laptop, phone, laptops, phones := twoDevices(t)
	phone.publish(3)
	if _, err := n.service.Revoke(t.Context(), string(phone.uri), "stolen"); err != nil {
		t.Fatal(err)
	}
	if _, err := phone.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); code(err) != "revoked" {
		t.Errorf("its token: %v", err)
	}
	if err := phones.ended(); code(err) != "revoked" {
		t.Errorf("its stream ended with %v", err)
	}
	if err := phone.tryAuthenticate(); code(err) != "revoked" {
		t.Errorf("it authenticates: %v", err)
	}
	resp := must(laptop.claim(laptop.user))(t)
	for _, c := range resp.Clients {
		if c.Client == phone.uri {
			t.Errorf("its KeyPackages are still handed out: %v", c.Code)
		}
	}

	// The hub proposes its removal, and takes no commit that leaves the proposal out, or that it makes itself.
	trust := false
	for !trust || len(laptop.group.Pending()) == 0 {
		ev := laptops.next()
		trust = trust || ev.GetTrust() != nil
		laptop.process(ev)
	}
	leaf, _ := laptop.leafOf(phone.uri)
	pending := laptop.group.Pending()
	if pending[0].Proposal.Remove == nil || pending[0].Proposal.Remove.Removed != leaf || pending[0].Sender.Type != mls.SenderExternal {
		t.Fatalf("the hub proposes %+v", pending[0])
	}
	without, err := laptop.group.Commit(nil, mls.CommitOptions{SkipPending: true, ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	refused, _, err := laptop.update(bundle(without))
	if err != nil || refused.Code != 2 {
		t.Errorf("a commit without the pending Remove: %+v, %v", refused, err)
	}
	if err := laptop.group.Drop(nil); err != nil {
		t.Fatal(err)
	}
	theirs, err := phone.group.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	refused, _, err = laptop.update(bundle(theirs)) // carried by another client
	if err != nil || refused.Code != 2 {
		t.Errorf("the revoked client's commit: %+v, %v", refused, err)
	}
	seq := laptop.commit()
	laptops.until(func() bool { return laptop.seq >= seq })
	if _, ok := laptop.leafOf(phone.uri); ok {
		t.Error("the revoked client is still a member")
	}
}

func TestAStreamEndsWhenItsOwnCertificateIsRevoked(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	stream := alice.subscribe()
	stream.live()
	old := must(n.service.List(t.Context(), authority.Filter{Client: alice.uri}))(t)
	resp := must(alice.api.Renew(t.Context(), connect.NewRequest(&api.RenewRequest{Csr: alice.csr()})))(t)
	renewed := *alice
	renewed.chain = resp.Msg.Chain
	renewed.authenticate()
	if len(old) != 1 {
		t.Fatalf("alice has %d certificates", len(old))
	}
	if _, err := n.service.Revoke(t.Context(), old[0].Serial, "superseded"); err != nil {
		t.Fatal(err)
	}
	if err := stream.ended(); code(err) != "revoked" {
		t.Errorf("the old certificate's stream ended with %v", err)
	}
	if err := renewed.tryAuthenticate(); err != nil {
		t.Errorf("with the new one: %v", err)
	}
}

func TestAClientHasAFewTokensOnly(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	first := alice.token
	for range maxTokens {
		alice.authenticate()
	}
	n.auth.mu.Lock()
	sessions := len(n.auth.sessions)
	n.auth.mu.Unlock()
	if sessions != maxTokens {
		t.Errorf("%d tokens, want %d", sessions, maxTokens)
	}
	if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); err != nil {
		t.Errorf("the newest token: %v", err)
	}
	alice.token = first
	if _, err := alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})); code(err) != "unauthenticated" {
		t.Errorf("the oldest token: %v", err)
	}
}
