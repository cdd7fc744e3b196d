package mls

import (
	"crypto/rand"
	"errors"
	"testing"
)

func TestClientIsAddedAtItsOwnRequest(t *testing.T) {
	for _, cs := range []CipherSuite{testSuite, X448_CHACHA20POLY1305_SHA512_Ed448} {
		r := newRoom(t, cs, nil)
		alice := r.members[0]
		bob := r.add(alice, "bob")[0]
		eve, kp, secrets := keyPackage(t, cs, "eve")
		m, err := NewMemberProposal(rand.Reader, eve.signer, kp, r.server.GroupID(), r.server.Epoch(), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.propose(m, nil)
		if p := r.server.Pending(); len(p) != 1 || p[0].Sender.Type != SenderNewMemberProposal {
			t.Fatalf("pending at the server: %+v", p)
		}
		alice.reload(t)
		bob.reload(t)
		if r.server, err = LoadPublicGroup(publicConfig(), r.store.all()); err != nil {
			t.Fatal(err)
		}
		r.propose(m, nil) // again: it is known
		_, again, _ := keyPackage(t, cs, "eve")
		r.propose(bob.Propose(bob.store, nil, add(again))) // does not go together with her own
		c := r.commit(bob, CommitOptions{TreeInWelcome: true})
		added := c.Info().Added
		if len(added) != 1 || c.Welcome() == nil || !c.Welcome().Find(kp.Ref()) && !c.Welcome().Find(again.Ref()) {
			t.Fatalf("added %d, want eve once", len(added))
		}
		if !c.Welcome().Find(kp.Ref()) {
			t.Fatal("the later proposal was taken")
		}
		if s := c.Info().Proposals[0].Sender; s.Type != SenderNewMemberProposal {
			t.Errorf("the policy sees sender type %d", s.Type)
		}
		if eve.Group, err = JoinGroup(testConfig(), eve.store, eve.signer, c.Welcome(), kp, secrets, nil); err != nil {
			t.Fatal(err)
		}
		r.members = append(r.members, eve)
		r.check()
		r.talk()
		r.checkStores()
	}
}

func TestNewMembersProposeOnlyWhereAllowed(t *testing.T) {
	f := newForgery(t)
	m := withRequest(func(*KeyPackage) {})(f)
	f.bob.cfg.NewMemberProposals, f.server.rules.newMembers = false, false
	_, member := f.bob.Receive(f.bob.store, m)
	_, server := f.server.CheckProposal(m.Public)
	for who, err := range map[string]error{"member": member, "server": server} {
		var v *ValidationError
		if !errors.As(err, &v) || v.Section != "12.1.8" || !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: got %v, want a violation of 12.1.8", who, err)
		}
	}
}

func TestRequestToBeAddedNeedsTheKeyOfItsKeyPackage(t *testing.T) {
	eve, kp, _ := keyPackage(t, testSuite, "eve")
	if _, err := NewMemberProposal(rand.Reader, newSigner(t, testSuite), kp, []byte("group"), 1, nil); !errors.Is(err, ErrSigner) {
		t.Errorf("another key: got %v, want ErrSigner", err)
	}
	if _, err := NewMemberProposal(rand.Reader, newSigner(t, P256_AES128GCM_SHA256_P256), kp, []byte("group"), 1, nil); err == nil {
		t.Error("key of another suite accepted")
	}
	kp.CipherSuite = 99
	if _, err := NewMemberProposal(rand.Reader, eve.signer, kp, []byte("group"), 1, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("unknown suite: got %v, want ErrUnsupported", err)
	}
}
