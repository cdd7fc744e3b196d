package mls_test

import (
	"crypto/rand"
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// A server follows a group whose handshakes nobody else outside of it can read.
func ExampleSemiPrivateMessage() {
	public, private, err := suite.GenerateHPKEKey(rand.Reader)
	check(err)
	receiver := mls.ExternalReceiver{PublicKey: public, Credential: mls.BasicCredential([]byte("server"))}
	dictionary := mls.AppDataDictionary(nil).Set(mls.ComponentExternalReceivers, codec.Marshal(mls.ExternalReceivers{receiver}))
	formats := codec.Marshal(mls.WireFormats{mls.WireFormatSemiPrivateMessage})

	aliceStore, serverStore := batch{}, batch{}
	alice := must(mls.NewGroup(mls.Config{Verifier: acceptAll{}, HandshakeFormat: mls.WireFormatSemiPrivateMessage}, aliceStore, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")),
		Signer:         must(suite.GenerateSignatureKey(rand.Reader)),
		LeafExtensions: mls.Extensions{{Type: mls.ExtensionSupportedWireFormats, Data: formats}},
		Extensions: mls.Extensions{
			{Type: mls.ExtensionRequiredWireFormats, Data: formats},
			{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(dictionary)},
		},
	}))
	server := must(mls.NewPublicGroup(mls.PublicConfig{Verifier: acceptAll{}}, serverStore, must(alice.GroupInfo(true, true)), nil))

	commit := must(alice.Commit(aliceStore, mls.CommitOptions{}))
	opened := must(commit.Message().SemiPrivate.Open(suite, &receiver, private))
	staged := must(server.CheckSemiPrivateCommit(opened))
	check(staged.CheckGroupInfo(commit.GroupInfo()))
	check(server.Apply(serverStore, staged, commit.GroupInfo()))
	check(alice.Confirm(aliceStore))
	fmt.Println("epoch", server.Epoch())
	// Output: epoch 1
}
