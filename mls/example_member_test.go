package mls_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/mls"
)

// pair makes a group of alice and bob, for the examples of what members do.
func pair(cfg mls.Config) (alice, bob *mls.Group, bobKey crypto.Signer) {
	aliceKey := must(suite.GenerateSignatureKey(rand.Reader))
	bobKey = must(suite.GenerateSignatureKey(rand.Reader))
	alice = must(mls.NewGroup(cfg, nil, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey,
	}))
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey,
	})
	check(err)
	commit := must(alice.Commit(nil, mls.CommitOptions{
		Proposals:     []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}},
		TreeInWelcome: true,
	}))
	check(alice.Confirm(nil))
	bob = must(mls.JoinGroup(cfg, nil, bobKey, commit.Welcome(), kp, secrets, nil))
	return alice, bob, bobKey
}

// follow has a member process another's commit.
func follow(g *mls.Group, commit *mls.MLSMessage) *mls.StagedInfo {
	staged, ok := must(g.Receive(nil, commit)).(*mls.StagedCommit)
	if !ok {
		panic("not a commit")
	}
	check(g.Apply(nil, staged))
	return staged.Info()
}

// A member sends a message. What the operation wrote, the deletion of the key among it, is durable before the message
// goes out, so that no crash makes the same key encrypt another one.
func ExampleGroup_Encrypt() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}})
	store := batch{}
	message := must(alice.Encrypt(store, []byte("seen by servers"), []byte("hello")))
	if m, ok := must(bob.Receive(nil, message)).(*mls.ApplicationMessage); ok {
		fmt.Printf("%s (%s), number %d of leaf %d\n", m.Data, m.AAD, m.Generation, m.Sender)
	}
	// Output: hello (seen by servers), number 0 of leaf 0
}

// A member receives whatever the group's members send.
func ExampleGroup_Receive() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}})
	first := must(alice.Encrypt(nil, nil, []byte("hello")))
	update := must(alice.ProposeUpdate(nil, mls.UpdateOptions{}))
	store := batch{}
	receive := func(m *mls.MLSMessage) {
		switch r := must(bob.Receive(store, m)).(type) {
		case *mls.ApplicationMessage:
			fmt.Printf("%s: %s\n", r.Leaf.Credential.Identity, r.Data)
		case *mls.ReceivedProposal:
			fmt.Printf("proposal of leaf %d\n", r.Sender.Leaf)
		case *mls.StagedCommit: // which may still be looked at and dropped
			check(bob.Apply(store, r))
			fmt.Printf("epoch %d\n", bob.Epoch())
		case *mls.OwnCommit:
			check(bob.Confirm(store))
			fmt.Printf("epoch %d by an own commit\n", bob.Epoch())
		case *mls.Duplicate:
			fmt.Println("nothing new")
		}
	}
	receive(first)
	receive(update)
	own := must(bob.Commit(store, mls.CommitOptions{}))
	receive(own.Message())
	receive(own.Message())
	follow(alice, own.Message())

	next := must(alice.Commit(nil, mls.CommitOptions{}))
	check(alice.Confirm(nil))
	receive(next.Message())
	_, err := bob.Receive(store, first)
	fmt.Println("read before:", errors.Is(err, mls.ErrGeneration))
	// Output:
	// alice: hello
	// proposal of leaf 0
	// epoch 2 by an own commit
	// nothing new
	// epoch 3
	// read before: true
}

// A member replaces its keys by a commit; a proposal does so by the commit of another.
func ExampleGroup_Commit_update() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}})
	commit := must(alice.Commit(nil, mls.CommitOptions{ForcePath: true}))
	check(alice.Confirm(nil))
	follow(bob, commit.Message())

	update := must(bob.ProposeUpdate(nil, mls.UpdateOptions{}))
	must(alice.Receive(nil, update))
	commit = must(alice.Commit(nil, mls.CommitOptions{}))
	check(alice.Confirm(nil))
	for _, u := range follow(bob, commit.Message()).Updated {
		fmt.Printf("%s has new keys\n", u.New.Credential.Identity)
	}
	// Output:
	// bob has new keys
	// alice has new keys
}

// A member removes another, who can't read on.
func ExampleGroup_Commit_remove() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}})
	commit := must(alice.Commit(nil, mls.CommitOptions{
		Proposals: []mls.Proposal{{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: bob.OwnLeaf()}}},
	}))
	check(alice.Confirm(nil))
	follow(bob, commit.Message())
	_, err := bob.Receive(nil, must(alice.Encrypt(nil, nil, []byte("hello"))))
	fmt.Println(bob.Active(), errors.Is(err, mls.ErrRemoved))
	// Output: false true
}

// A commit mixes in a key that the members have from elsewhere.
func ExampleConfig_psk() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}, PSK: func(id mls.PreSharedKeyID) ([]byte, error) {
		if string(id.ID) != "from the meeting" {
			return nil, errors.New("unknown key")
		}
		return []byte("a secret of 32 bytes, or longer."), nil
	}})
	id := mls.PreSharedKeyID{Type: mls.PSKExternal, ID: []byte("from the meeting")}
	commit := must(alice.Commit(nil, mls.CommitOptions{
		Proposals: []mls.Proposal{{Type: mls.ProposalPSK, PSK: &mls.PreSharedKey{PSK: id}}},
	}))
	check(alice.Confirm(nil))
	follow(bob, commit.Message())
	fmt.Println(bytes.Equal(alice.EpochAuthenticator(), bob.EpochAuthenticator()))
	// Output: true
}

// Members take keys for other uses from the group.
func ExampleGroup_Export() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}})
	a := must(alice.Export("call", []byte("room 5"), 32))
	b := must(bob.Export("call", []byte("room 5"), 32))
	fmt.Println(len(a), bytes.Equal(a, b))
	// Output: 32 true
}

// Bob takes a commit for accepted that wasn't, finds that he has forked from the group, and comes back.
func ExampleGroup_Resync() {
	alice, bob, _ := pair(mls.Config{Verifier: acceptAll{}})
	must(bob.Commit(nil, mls.CommitOptions{}))
	check(bob.Confirm(nil))
	must(alice.Commit(nil, mls.CommitOptions{}))
	check(alice.Confirm(nil))
	err := bob.CheckAuthenticator(alice.Epoch(), alice.EpochAuthenticator())
	fmt.Println("forked:", errors.Is(err, mls.ErrFork))

	join := must(bob.Resync(nil, mls.ResyncOptions{GroupInfo: must(alice.GroupInfo(true, true))}))
	follow(alice, join.Message()) // it was accepted
	check(bob.Confirm(nil))
	fmt.Println("mended:", bob.CheckAuthenticator(alice.Epoch(), alice.EpochAuthenticator()) == nil)
	// Output:
	// forked: true
	// mended: true
}
