package mls

import (
	"fmt"
	"strings"
	"testing"
)

// goneSecrets are values that a client's store mustn't have any more, by name.
type goneSecrets map[string]secret

func (gone goneSecrets) check(t *testing.T, who string, s *memStore) {
	t.Helper()
	for name, v := range gone {
		if len(v) == 0 {
			t.Fatalf("%s: no %s to look for", who, name)
		}
		for k, stored := range unsealed(s.m) {
			if strings.Contains(stored, string(v)) {
				t.Errorf("%s: %s is still in entry %q", who, name, k)
			}
		}
	}
}

// ofEpoch returns the secrets of the current epoch that nobody needs after it.
func ofEpoch(c *client) goneSecrets {
	e := c.secrets
	return goneSecrets{"init secret": e.init, "confirmation key": e.confirmation, "membership key": e.membership,
		"exporter secret": e.exporter, "external secret": e.external, "epoch authenticator": e.authenticator}
}

// TestUsedSecretsAreDeleted follows RFC 9420, Sections 7.5 and 9.2, in the members' stores.
func TestUsedSecretsAreDeleted(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.commit(f.bob, CommitOptions{})
	all := func(what string, gone goneSecrets) {
		t.Helper()
		for _, c := range r.members {
			gone.check(t, what+", "+c.name, c.store)
		}
	}

	// A message's key, and the ratchet secret before it.
	step, err := f.alice.messages.peek(f.alice.OwnLeaf(), applicationRatchet, 0, ratchetLimits{})
	f.must(err)
	used := goneSecrets{"message key": step.key, "nonce": step.nonce, "ratchet secret": step.fresh[applicationRatchet].secret}
	r.talk()
	all("read", used)

	// An epoch's secrets, and the keys of leaves and nodes that a commit replaces.
	r.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))
	epoch := ofEpoch(f.alice)
	first := goneSecrets{"sender data secret": f.alice.secrets.senderData, "resumption secret": f.alice.secrets.resumption}
	type key struct {
		member int
		node   NodeIndex
	}
	private, public := make(map[key]HPKEPrivateKey), make(map[NodeIndex]HPKEPublicKey)
	for i, c := range r.members {
		for n, k := range c.private.keys {
			private[key{i, n}], public[n] = k, f.alice.Tree().publicKey(n)
		}
	}
	c := r.commit(f.alice, CommitOptions{ForcePath: true})
	if c.secrets.encryption != nil || f.bob.secrets.encryption != nil {
		t.Error("the encryption secret is kept beside the secret tree")
	}
	all("epoch", epoch)
	replaced := 0
	for k, v := range private {
		if string(f.alice.Tree().publicKey(k.node)) == string(public[k.node]) {
			continue
		}
		replaced++
		all("replaced", goneSecrets{fmt.Sprintf("private key of node %d", k.node): secret(v)})
	}
	if replaced < 6 { // alice's and carol's leaves, and the nodes above
		t.Errorf("the commit replaced %d keys", replaced)
	}

	// What is kept of a past epoch goes with it.
	for range defaultPastEpochs {
		r.commit(f.bob, CommitOptions{})
	}
	all("forgotten epoch", first)

	// A joiner has neither the init key nor the commit's staged secrets.
	joiner, kp, secrets := keyPackage(t, testSuite, "joiner")
	c = r.commit(f.alice, CommitOptions{Proposals: []Proposal{add(kp)}, TreeInWelcome: true})
	f.must(second(JoinGroup(testConfig(), joiner.store, joiner.signer, c.Welcome(), kp, secrets, nil)))
	goneSecrets{"init key": secret(secrets.InitKey)}.check(t, "joiner", joiner.store)
}

func TestNoPastEpochsAreKeptIfNoneAreWanted(t *testing.T) {
	f := newForgery(t)
	f.bob.cfg.MaxPastEpochs = -1
	m, err := f.alice.Encrypt(f.alice.store, nil, []byte("late"))
	f.must(err)
	f.room.commit(f.carol, CommitOptions{})
	if len(f.bob.past) != 0 {
		t.Errorf("%d past epochs", len(f.bob.past))
	}
	for k := range f.bob.store.m {
		if k[0] == keyPast || k[0] == keyPastLeaf || k[0] == keySecret && !strings.HasPrefix(k, string(key64(keySecret, f.bob.Epoch()))) {
			t.Errorf("entry %q is left", k)
		}
	}
	if _, err := f.bob.Receive(f.bob.store, m); err == nil {
		t.Error("a message of a past epoch is read")
	}
	sameState(t, "bob", f.bob.store.m, dump(f.bob.Group))
}
