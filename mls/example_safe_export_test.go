package mls_test

import (
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/mls"
)

// A component takes its secret of the epoch, once.
func ExampleGroup_SafeExport() {
	const component mls.ComponentID = 0x8001
	store := batch{}
	key := must(suite.GenerateSignatureKey(rand.Reader))
	cfg := mls.Config{Verifier: acceptAll{}}
	g := must(mls.NewGroup(cfg, store, mls.GroupOptions{
		GroupID: []byte("a group"), Suite: suite, Credential: mls.BasicCredential([]byte("alice")), Signer: key,
	}))
	secret := must(g.SafeExport(store, component))
	fmt.Println(len(secret), "bytes")

	g = must(mls.LoadGroup(cfg, key, store.all))
	_, err := g.SafeExport(store, component)
	fmt.Println(errors.Is(err, mls.ErrExported))
	// Output:
	// 32 bytes
	// true
}
