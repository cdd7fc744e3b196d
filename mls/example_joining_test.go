package mls_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// A client makes a group of which it is the only member.
func ExampleNewGroup() {
	store := batch{}
	g := must(mls.NewGroup(mls.Config{Verifier: acceptAll{}}, store, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")),
		Signer: must(suite.GenerateSignatureKey(rand.Reader)),
	}))
	fmt.Printf("epoch %d, %d member\n", g.Epoch(), g.Tree().Count())
	// Output: epoch 0, 1 member
}

// A member invites clients, who may be offline, by their KeyPackages. The commit is for the members, the Welcome for
// the invited.
func ExampleGroup_Commit_invite() {
	cfg := mls.Config{Verifier: acceptAll{}}
	alice := must(mls.NewGroup(cfg, nil, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")),
		Signer: must(suite.GenerateSignatureKey(rand.Reader)),
	}))
	var adds []mls.Proposal
	for _, name := range []string{"bob", "carol"} {
		kp, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{
			Suite: suite, Credential: mls.BasicCredential([]byte(name)), Signer: must(suite.GenerateSignatureKey(rand.Reader)),
		})
		check(err)
		check(kp.Validate(time.Now(), cfg.Verifier))
		adds = append(adds, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}})
	}
	commit := must(alice.Commit(nil, mls.CommitOptions{Proposals: adds}))
	// Here the commit goes to whoever orders the group's messages, and the Welcome waits for its answer.
	check(alice.Confirm(nil))
	fmt.Printf("%d members, a Welcome for %d\n", alice.Tree().Count(), len(commit.Welcome().KeyPackageRefs()))
	// Output: 3 members, a Welcome for 2
}

// A client joins by the Welcome for its KeyPackage, here with the ratchet tree from elsewhere, for example from the
// server, which needn't be trusted with it: the tree's hash is checked.
func ExampleJoinGroup() {
	cfg := mls.Config{Verifier: acceptAll{}}
	alice := must(mls.NewGroup(cfg, nil, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")),
		Signer: must(suite.GenerateSignatureKey(rand.Reader)),
	}))
	key := must(suite.GenerateSignatureKey(rand.Reader))
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: key})
	check(err)
	commit := must(alice.Commit(nil, mls.CommitOptions{
		Proposals: []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}},
	}))
	check(alice.Confirm(nil))
	welcome, tree := codec.Marshal(mls.NewMLSMessage(commit.Welcome())), codec.Marshal(commit.Tree())

	var m mls.MLSMessage
	check(codec.Unmarshal(welcome, &m))
	store := batch{}
	bob := must(mls.JoinGroup(cfg, store, key, m.Welcome, kp, secrets, must(mls.ParseRatchetTree(tree))))
	secrets.Erase() // once the store has the group
	for m := range bob.Members() {
		fmt.Printf("%d %s\n", m.Index, m.Leaf.Credential.Identity)
	}
	// Output:
	// 0 alice
	// 1 bob
}

// A client joins without an invitation, by the GroupInfo that the group published.
func ExampleExternalJoin() {
	cfg := mls.Config{Verifier: acceptAll{}}
	alice, bob, _ := pair(cfg)
	join := must(mls.ExternalJoin(cfg, mls.ExternalJoinOptions{
		GroupInfo: must(alice.GroupInfo(true, true)), Credential: mls.BasicCredential([]byte("carol")),
		Signer: must(suite.GenerateSignatureKey(rand.Reader)),
	}))
	// Here the external commit goes to whoever orders the group's messages. Accepted, it reaches the members.
	for _, g := range []*mls.Group{alice, bob} {
		for _, m := range follow(g, join.Message()).Added {
			fmt.Printf("%s has joined\n", m.Leaf.Credential.Identity)
		}
	}
	carol := must(join.Confirm(nil))
	fmt.Println(bytes.Equal(carol.EpochAuthenticator(), alice.EpochAuthenticator()))
	// Output:
	// carol has joined
	// carol has joined
	// true
}
