package mls_test

import (
	"crypto/rand"
	"fmt"

	"github.com/parley-mls/parley/mls"
)

// A group moves to another cipher suite: a ReInit ends it, and a successor with the same members is made.
func ExampleGroup_NewSuccessor() {
	cfg := mls.Config{Verifier: acceptAll{}}
	const next = mls.P256_AES128GCM_SHA256_P256
	aliceKey := must(suite.GenerateSignatureKey(rand.Reader))
	bobKey := must(suite.GenerateSignatureKey(rand.Reader))
	aliceStore, bobStore, aliceNext, bobNext := batch{}, batch{}, batch{}, batch{}
	alice := must(mls.NewGroup(cfg, aliceStore, mls.GroupOptions{
		GroupID: []byte("old"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey,
	}))
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey,
	})
	check(err)
	add := must(alice.Commit(aliceStore, mls.CommitOptions{
		Proposals: []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}}, TreeInWelcome: true,
	}))
	check(alice.Confirm(aliceStore))
	bob := must(mls.JoinGroup(cfg, bobStore, bobKey, add.Welcome(), kp, secrets, nil))

	end := must(alice.Commit(aliceStore, mls.CommitOptions{Proposals: []mls.Proposal{{
		Type: mls.ProposalReInit, ReInit: &mls.ReInit{GroupID: []byte("new"), Version: mls.MLS10, CipherSuite: next},
	}}}))
	check(alice.Confirm(aliceStore))
	if s, ok := must(bob.Receive(bobStore, end.Message())).(*mls.StagedCommit); ok {
		check(bob.Apply(bobStore, s))
	}
	_, err = bob.Encrypt(bobStore, nil, []byte("hello"))
	fmt.Println(err)

	// Both have keys for the new suite; bob sends alice a KeyPackage.
	aliceKey, bobKey = must(next.GenerateSignatureKey(rand.Reader)), must(next.GenerateSignatureKey(rand.Reader))
	kp, secrets, err = mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: bob.ReInit().CipherSuite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey,
	})
	check(err)
	newAlice, welcome, err := alice.NewSuccessor(aliceNext, mls.LinkOptions{
		KeyPackages: []*mls.KeyPackage{kp}, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey, TreeInWelcome: true,
	})
	check(err)
	newBob := must(bob.JoinSuccessor(bobNext, bobKey, welcome, kp, secrets, nil))
	fmt.Printf("%s: %v\n", newBob.GroupID(), newBob.Suite())
	fmt.Println(string(newAlice.EpochAuthenticator()) == string(newBob.EpochAuthenticator()))
	// Output:
	// mls: encrypt: mls: group has ended
	// new: MLS_128_DHKEMP256_AES128GCM_SHA256_P256
	// true
}

// Some members of a group branch off.
func ExampleGroup_NewBranch() {
	cfg := mls.Config{Verifier: acceptAll{}}
	aliceKey := must(suite.GenerateSignatureKey(rand.Reader))
	bobKey := must(suite.GenerateSignatureKey(rand.Reader))
	aliceStore, bobStore, aliceBranch, bobBranch := batch{}, batch{}, batch{}, batch{}
	alice := must(mls.NewGroup(cfg, aliceStore, mls.GroupOptions{
		GroupID: []byte("all"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey,
	}))
	keyPackage := mls.KeyPackageOptions{Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey}
	kp, secrets, err := mls.NewKeyPackage(keyPackage)
	check(err)
	add := must(alice.Commit(aliceStore, mls.CommitOptions{
		Proposals: []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}}, TreeInWelcome: true,
	}))
	check(alice.Confirm(aliceStore))
	bob := must(mls.JoinGroup(cfg, bobStore, bobKey, add.Welcome(), kp, secrets, nil))

	kp, secrets, err = mls.NewKeyPackage(keyPackage)
	check(err)
	_, welcome, err := alice.NewBranch(aliceBranch, []byte("some"), nil, mls.LinkOptions{
		KeyPackages: []*mls.KeyPackage{kp}, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey, TreeInWelcome: true,
	})
	check(err)
	branch := must(bob.JoinBranch(bobBranch, bobKey, welcome, kp, secrets, nil))
	fmt.Printf("%s, epoch %d\n", branch.GroupID(), branch.Epoch())
	// Output: some, epoch 1
}
