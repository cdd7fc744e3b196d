package mls_test

import (
	"crypto/rand"
	"fmt"

	"github.com/parley-mls/parley/mls"
)

// Alice leaves: her proposal removes her in whatever commit comes next, here that of carol, who joins.
func ExampleGroup_ProposeSelfRemove() {
	cfg := mls.Config{Verifier: acceptAll{}}
	aliceStore, bobStore, carolStore := batch{}, batch{}, batch{}
	alice := must(mls.NewGroup(cfg, aliceStore, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")),
		Signer: must(suite.GenerateSignatureKey(rand.Reader)),
	}))
	bobKey := must(suite.GenerateSignatureKey(rand.Reader))
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey})
	check(err)
	commit := must(alice.Commit(aliceStore, mls.CommitOptions{
		Proposals: []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}}, TreeInWelcome: true,
	}))
	check(alice.Confirm(aliceStore))
	bob := must(mls.JoinGroup(cfg, bobStore, bobKey, commit.Welcome(), kp, secrets, nil))

	goodbye := must(alice.ProposeSelfRemove(aliceStore))
	must(bob.Receive(bobStore, goodbye))

	join := must(mls.ExternalJoin(cfg, mls.ExternalJoinOptions{
		GroupInfo: must(bob.GroupInfo(true, true)), SelfRemoves: bob.SelfRemoves(),
		Credential: mls.BasicCredential([]byte("carol")), Signer: must(suite.GenerateSignatureKey(rand.Reader)),
	}))
	carol := must(join.Confirm(carolStore))
	for store, g := range map[*batch]*mls.Group{&aliceStore: alice, &bobStore: bob} {
		if s, ok := must(g.Receive(*store, join.Message())).(*mls.StagedCommit); ok {
			check(g.Apply(*store, s))
		}
	}
	for m := range carol.Members() {
		fmt.Printf("%s\n", m.Leaf.Credential.Identity)
	}
	fmt.Println("alice is a member:", alice.Active())
	// Output:
	// carol
	// bob
	// alice is a member: false
}
