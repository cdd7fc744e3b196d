package mls

import (
	"crypto"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// seededRand is reproducible randomness.
func seededRand(seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

// testTree is a ratchet tree with the private parts of all its members.
type testTree struct {
	cs      CipherSuite
	rand    io.Reader
	groupID []byte
	*RatchetTree
	signers map[LeafIndex]crypto.Signer
	private map[LeafIndex]*treePrivate
}

// newTestTree makes a tree of n members of which nobody committed yet.
func newTestTree(t testing.TB, cs CipherSuite, n int) *testTree {
	tt := &testTree{cs: cs, rand: seededRand(uint64(n)), groupID: []byte("group"),
		signers: make(map[LeafIndex]crypto.Signer), private: make(map[LeafIndex]*treePrivate)}
	for range n {
		tt.add(t)
	}
	return tt
}

func (tt *testTree) keyPackage(t testing.TB) (*KeyPackage, *KeyPackageSecrets, crypto.Signer) {
	t.Helper()
	signer, err := tt.cs.GenerateSignatureKey(tt.rand)
	if err != nil {
		t.Fatal(err)
	}
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{Rand: tt.rand, Suite: tt.cs, Credential: BasicCredential([]byte("member")),
		Signer: signer, Lifetime: Lifetime{NotAfter: 1000}})
	if err != nil {
		t.Fatal(err)
	}
	return kp, secrets, signer
}

func (tt *testTree) add(t testing.TB) LeafIndex {
	t.Helper()
	kp, secrets, signer := tt.keyPackage(t)
	var i LeafIndex
	if tt.RatchetTree == nil {
		tt.RatchetTree = newRatchetTree(&kp.LeafNode)
	} else {
		i = tt.addLeaf(&kp.LeafNode)
	}
	tt.signers[i] = signer
	tt.private[i] = newTreePrivate(i, secrets.EncryptionKey)
	return i
}

// commit puts a new path above i without telling anyone.
func (tt *testTree) commit(t testing.TB, i LeafIndex) *newPath {
	t.Helper()
	np, err := tt.generatePath(tt.cs, tt.rand, i, tt.Leaf(i), tt.groupID, tt.signers[i])
	if err != nil {
		t.Fatal(err)
	}
	tt.private[i] = np.private
	return np
}

// fresh decodes the tree anew, so that it has no cached hash.
func fresh(t testing.TB, tree *RatchetTree) *RatchetTree {
	t.Helper()
	again, err := ParseRatchetTree(codec.Marshal(tree))
	if err != nil {
		t.Fatal(err)
	}
	return again
}
