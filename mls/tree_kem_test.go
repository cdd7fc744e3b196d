package mls

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// commitToAll lets i commit with a path, after adding so many members, and lets every other member process it.
func (tt *testTree) commitToAll(t *testing.T, i LeafIndex, adds int) {
	t.Helper()
	before := tt.RatchetTree
	tt.RatchetTree = before.clone()
	var joiners []LeafIndex
	for range adds {
		joiners = append(joiners, tt.add(t))
	}
	proposed := tt.clone()
	np := tt.commit(t, i)
	ctx := tt.Hash(tt.cs)
	up, err := np.encrypt(tt.rand, tt.RatchetTree, joiners, ctx)
	if err != nil {
		t.Fatal(err)
	}
	var received UpdatePath
	decode(t, codec.Marshal(up), &received)
	if err := proposed.applyPath(tt.cs, i, &received); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, "tree hash after the received path", proposed.Hash(tt.cs), ctx)
	for l := range tt.Leaves() {
		switch {
		case l == i:
		case slices.Contains(joiners, l):
			if err := proposed.installPathSecret(tt.cs, tt.private[l], i, np.secretFor(l)); err != nil {
				t.Fatalf("joiner %d of committer %d: %v", l, i, err)
			}
		default:
			commit, next, err := proposed.decryptPath(tt.cs, tt.private[l], i, &received, joiners, ctx)
			if err != nil {
				t.Fatalf("leaf %d from committer %d: %v", l, i, err)
			}
			wantBytes(t, "commit secret", commit, np.commitSecret)
			tt.private[l] = next
		}
	}
	tt.checkPrivate(t)
}

// checkPrivate checks the tree invariant (RFC 9420, Section 4.2): a member knows the private key of each node above
// it, unless it is unmerged there.
func (tt *testTree) checkPrivate(t *testing.T) {
	t.Helper()
	for l := range tt.Leaves() {
		p := tt.private[l]
		for n := l.node(); ; n = n.parent() {
			unmerged := !n.isLeaf() && !tt.blank(n) && slices.Contains(tt.parentNode(n).UnmergedLeaves, l)
			key, ok := p.keys[n]
			if ok != (!tt.blank(n) && !unmerged) {
				t.Fatalf("leaf %d knows the key of node %d: %v", l, n, ok)
			}
			if ok {
				if pub, err := tt.cs.hpkePublicOf(key); err != nil || !bytes.Equal(pub, tt.publicKey(n)) {
					t.Fatalf("leaf %d has another key for node %d", l, n)
				}
			}
			if n == tt.root() {
				break
			}
		}
		for n := range p.keys {
			if !n.covers(l) {
				t.Fatalf("leaf %d knows the key of node %d, which is not above it", l, n)
			}
		}
	}
}

func TestMembersKeepTheTreeInvariant(t *testing.T) {
	seeds := uint64(6)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			tt := newTestTree(t, testSuite, 1+r.IntN(6))
			for range 25 {
				var members []LeafIndex
				for i := range tt.Leaves() {
					members = append(members, i)
				}
				if len(members) > 2 && r.IntN(3) == 0 {
					gone := members[r.IntN(len(members))]
					tt.RatchetTree = tt.clone()
					tt.removeLeaf(gone)
					delete(tt.private, gone)
					for _, p := range tt.private {
						p.prune(tt.RatchetTree)
					}
					members = slices.DeleteFunc(members, func(l LeafIndex) bool { return l == gone })
				}
				tt.commitToAll(t, members[r.IntN(len(members))], r.IntN(4))
			}
		})
	}
}

func TestPathsThatDoNotFitAreRefused(t *testing.T) {
	tt := newTestTree(t, testSuite, 8)
	for i := range LeafIndex(8) {
		tt.commitToAll(t, i, 0)
	}
	before := tt.clone()
	np := tt.commit(t, 2)
	ctx := tt.Hash(testSuite)
	good, err := np.encrypt(tt.rand, tt.RatchetTree, nil, ctx)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(p *UpdatePath){
		"node missing":           func(p *UpdatePath) { p.Nodes = p.Nodes[:2] },
		"node too many":          func(p *UpdatePath) { p.Nodes = append(p.Nodes, p.Nodes[0]) },
		"other key":              func(p *UpdatePath) { p.Nodes[1].EncryptionKey = p.Nodes[0].EncryptionKey },
		"malformed key":          func(p *UpdatePath) { p.Nodes[1].EncryptionKey = []byte{1} },
		"other parent hash":      func(p *UpdatePath) { p.LeafNode.ParentHash = make([]byte, 32) },
		"leaf from an update":    func(p *UpdatePath) { p.LeafNode.Source = LeafNodeUpdate },
		"leaf without its hash":  func(p *UpdatePath) { p.LeafNode.ParentHash = nil },
		"nodes in another order": func(p *UpdatePath) { p.Nodes[0], p.Nodes[1] = p.Nodes[1], p.Nodes[0] },
	} {
		var p UpdatePath
		decode(t, codec.Marshal(good), &p)
		change(&p)
		var v *ValidationError
		if err := before.clone().applyPath(testSuite, 2, &p); !errors.As(err, &v) {
			t.Errorf("%s: got %v, want a ValidationError", what, err)
		}
	}
	if err := before.clone().applyPath(testSuite, 100, good); err == nil {
		t.Error("path of a leaf beyond the tree accepted")
	}

	after := before.clone()
	if err := after.applyPath(testSuite, 2, good); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(p *UpdatePath){
		"path secret missing":       func(p *UpdatePath) { p.Nodes[0].Secrets = nil },
		"path secret too many":      func(p *UpdatePath) { p.Nodes[0].Secrets = append(p.Nodes[0].Secrets, p.Nodes[0].Secrets...) },
		"path secret of another":    func(p *UpdatePath) { p.Nodes[0].Secrets = p.Nodes[1].Secrets },
		"nodes missing":             func(p *UpdatePath) { p.Nodes = nil },
		"path secret of other keys": func(p *UpdatePath) { p.Nodes[0].Secrets[0] = seal(t, tt, before, 3, ctx) },
	} {
		var p UpdatePath
		decode(t, codec.Marshal(good), &p)
		change(&p)
		held := codec.Marshal(tt.private[3])
		if _, _, err := after.decryptPath(testSuite, tt.private[3], 2, &p, nil, ctx); err == nil {
			t.Errorf("%s: accepted", what)
		}
		wantBytes(t, "private keys after "+what, codec.Marshal(tt.private[3]), held)
	}
	if _, _, err := after.decryptPath(testSuite, tt.private[3], 2, good, nil, append(ctx, 0)); !errors.Is(err, ErrDecrypt) {
		t.Errorf("other group context: got %v, want ErrDecrypt", err)
	}
}

// seal encrypts a path secret that has nothing to do with the path to a leaf.
func seal(t *testing.T, tt *testTree, tree *RatchetTree, to LeafIndex, ctx []byte) HPKECiphertext {
	t.Helper()
	ct, err := testSuite.EncryptWithLabel(tt.rand, tree.publicKey(to.node()), labelUpdatePathNode, ctx, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	return ct
}

func TestPrivateKeysAreSavedWhole(t *testing.T) {
	tt := newTestTree(t, testSuite, 9)
	tt.commitToAll(t, 4, 2)
	for l, p := range tt.private {
		var again treePrivate
		decode(t, codec.Marshal(p), &again)
		if again.leaf != l || len(again.keys) != len(p.keys) {
			t.Errorf("leaf %d: %d keys of leaf %d", l, len(again.keys), again.leaf)
		}
		for n, key := range p.keys {
			wantBytes(t, "key", again.keys[n], key)
		}
	}
}

func TestPrivateKeysOutOfOrderAreRefused(t *testing.T) {
	saved := func(nodes ...uint32) []byte {
		return codec.Encode(func(w *codec.Writer) {
			w.Uint32(0)
			codec.WriteVector(w, nodes, func(w *codec.Writer, n uint32) {
				w.Uint32(n)
				w.Opaque([]byte("key"))
			})
		})
	}
	if err := codec.Unmarshal(saved(0, 1, 3), new(treePrivate)); err != nil {
		t.Fatal(err)
	}
	for _, nodes := range [][]uint32{{1, 0}, {3, 3}} {
		if err := codec.Unmarshal(saved(nodes...), new(treePrivate)); err == nil {
			t.Errorf("keys of the nodes %d are accepted", nodes)
		}
	}
}

func TestGivenRandomnessDecidesPaths(t *testing.T) {
	var first []byte
	for range 2 {
		tt := newTestTree(t, testSuite, 40)
		np := tt.commit(t, 0)
		up, err := np.encrypt(tt.rand, tt.RatchetTree, nil, []byte("context"))
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = codec.Marshal(up)
		}
		wantBytes(t, "path to 39 members", codec.Marshal(up), first)
	}
}

func BenchmarkFirstPath(b *testing.B) {
	tt := newTestTree(b, testSuite, 1000)
	np := tt.commit(b, 0)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := np.encrypt(tt.rand, tt.RatchetTree, nil, make([]byte, 300)); err != nil {
			b.Fatal(err)
		}
	}
}

// No vector of the working group has such a tree.
func TestCommitSecretFollowsTheLastNodeOfAFilteredPath(t *testing.T) {
	tt := newTestTree(t, testSuite, 8)
	for i := range LeafIndex(4) {
		tt.removeLeaf(i)
	}
	np := tt.commit(t, 4)
	// The root isn't on it: nobody is left below its other child (RFC 9420, Sections 4.1.2 and 12.4.1).
	if want := []NodeIndex{9, 11}; !slices.Equal(np.path, want) {
		t.Fatalf("filtered direct path %d, want %d", np.path, want)
	}
	wantBytes(t, "commit secret", np.commitSecret, testSuite.deriveSecret(np.pathSecrets[1], "path"))
}
