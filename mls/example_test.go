package mls_test

import (
	"crypto/rand"
	"fmt"
	"log"

	"github.com/parley-mls/parley/mls"
)

// acceptAll is an authentication service that trusts everybody; real ones verify certificates.
type acceptAll struct{}

func (acceptAll) VerifyCredential(mls.Credential, []byte, mls.CipherSuite) error { return nil }
func (acceptAll) ValidSuccessor(_, _ mls.Credential) error                       { return nil }
func (acceptAll) Identity(c mls.Credential) ([]byte, error)                      { return c.Identity, nil }

// batch is a store in memory that makes every change durable at once.
type batch map[string][]byte

func (b batch) Set(k, v []byte) { b[string(k)] = append([]byte(nil), v...) }
func (b batch) Delete(k []byte) { delete(b, string(k)) }

func (b batch) all(yield func(k, v []byte) bool) {
	for k, v := range b {
		if !yield([]byte(k), v) {
			return
		}
	}
}

const suite = mls.X25519_AES128GCM_SHA256_Ed25519

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

// Alice makes a group, adds bob, and sends him a message.
func Example() {
	cfg := mls.Config{Verifier: acceptAll{}}
	aliceKey := must(suite.GenerateSignatureKey(rand.Reader))
	bobKey := must(suite.GenerateSignatureKey(rand.Reader))
	aliceStore, bobStore := batch{}, batch{}

	alice := must(mls.NewGroup(cfg, aliceStore, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey,
	}))
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey,
	})
	check(err)

	commit := must(alice.Commit(aliceStore, mls.CommitOptions{
		Proposals:     []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}},
		TreeInWelcome: true,
	}))
	// Here the commit goes to whoever orders the group's messages. It accepts:
	check(alice.Confirm(aliceStore))
	bob := must(mls.JoinGroup(cfg, bobStore, bobKey, commit.Welcome(), kp, secrets, nil))

	message := must(alice.Encrypt(aliceStore, nil, []byte("hello bob")))
	switch m := must(bob.Receive(bobStore, message)).(type) {
	case *mls.ApplicationMessage:
		fmt.Printf("%s: %s\n", m.Leaf.Credential.Identity, m.Data)
	}
	// Output: alice: hello bob
}

// A server follows a group by its public messages, and lets in a client by external commit.
func ExamplePublicGroup() {
	cfg := mls.Config{Verifier: acceptAll{}}
	aliceKey := must(suite.GenerateSignatureKey(rand.Reader))
	aliceStore, serverStore, bobStore := batch{}, batch{}, batch{}
	alice := must(mls.NewGroup(cfg, aliceStore, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey,
	}))
	server := must(mls.NewPublicGroup(mls.PublicConfig{Verifier: acceptAll{}}, serverStore, must(alice.GroupInfo(true, true)), nil))

	bobKey := must(suite.GenerateSignatureKey(rand.Reader))
	join := must(mls.ExternalJoin(cfg, mls.ExternalJoinOptions{
		GroupInfo: server.GroupInfo(), Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey,
	}))
	staged := must(server.CheckCommit(join.Message().Public))
	check(staged.CheckGroupInfo(join.GroupInfo()))
	check(server.Apply(serverStore, staged, join.GroupInfo()))

	bob := must(join.Confirm(bobStore))
	if s, ok := must(alice.Receive(aliceStore, join.Message())).(*mls.StagedCommit); ok {
		check(alice.Apply(aliceStore, s))
	}
	for m := range server.Members() {
		fmt.Printf("%d %s\n", m.Index, m.Leaf.Credential.Identity)
	}
	fmt.Println(string(alice.EpochAuthenticator()) == string(bob.EpochAuthenticator()))
	// Output:
	// 0 alice
	// 1 bob
	// true
}

// A client asks to be added, and a member's next commit does so.
func ExampleNewMemberProposal() {
	cfg := mls.Config{Verifier: acceptAll{}, NewMemberProposals: true}
	aliceKey := must(suite.GenerateSignatureKey(rand.Reader))
	bobKey := must(suite.GenerateSignatureKey(rand.Reader))
	aliceStore, bobStore := batch{}, batch{}
	alice := must(mls.NewGroup(cfg, aliceStore, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: aliceKey,
	}))
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: suite, Credential: mls.BasicCredential([]byte("bob")), Signer: bobKey,
	})
	check(err)
	request := must(mls.NewMemberProposal(rand.Reader, bobKey, kp, alice.GroupID(), alice.Epoch(), nil))

	if p, ok := must(alice.Receive(aliceStore, request)).(*mls.ReceivedProposal); ok {
		fmt.Printf("%s asks to be added\n", p.Proposal.Add.KeyPackage.LeafNode.Credential.Identity)
	}
	commit := must(alice.Commit(aliceStore, mls.CommitOptions{TreeInWelcome: true}))
	check(alice.Confirm(aliceStore))
	bob := must(mls.JoinGroup(cfg, bobStore, bobKey, commit.Welcome(), kp, secrets, nil))
	fmt.Println("bob is in epoch", bob.Epoch())
	// Output:
	// bob asks to be added
	// bob is in epoch 1
}

// A group is restored from what its operations wrote.
func ExampleLoadGroup() {
	cfg := mls.Config{Verifier: acceptAll{}}
	key := must(suite.GenerateSignatureKey(rand.Reader))
	store := batch{}
	g := must(mls.NewGroup(cfg, store, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: key,
	}))
	must(g.Commit(store, mls.CommitOptions{}))

	g = must(mls.LoadGroup(cfg, key, store.all))
	fmt.Println("epoch", g.Epoch(), "staged", g.PendingCommit().Epoch())
	check(g.Confirm(store))
	fmt.Println("epoch", g.Epoch())
	// Output:
	// epoch 0 staged 1
	// epoch 1
}
