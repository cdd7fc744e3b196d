package mls

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

const testSuite = X25519_AES128GCM_SHA256_Ed25519

// mutate does one random operation.
func (tt *testTree) mutate(t testing.TB, r *rand.Rand) {
	t.Helper()
	var members []LeafIndex
	for i := range tt.Leaves() {
		members = append(members, i)
	}
	pick := members[r.IntN(len(members))]
	switch op := r.IntN(10); {
	case op < 4:
		tt.add(t)
	case op < 6 && len(members) > 1:
		tt.removeLeaf(pick)
	case op < 7:
		l := tt.Leaf(pick).clone()
		l.Source = LeafNodeUpdate
		pub, priv, err := tt.cs.GenerateHPKEKey(tt.rand)
		if err != nil {
			t.Fatal(err)
		}
		l.EncryptionKey = pub
		if err := l.sign(tt.cs, tt.rand, tt.signers[pick], tt.groupID, pick); err != nil {
			t.Fatal(err)
		}
		tt.updateLeaf(pick, l)
		tt.private[pick] = newTreePrivate(pick, priv)
	default:
		tt.commit(t, pick)
	}
}

func TestTreeStaysValidUnderRandomOperations(t *testing.T) {
	seeds := uint64(8)
	if testing.Short() {
		seeds = 3
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 0))
		tt := newTestTree(t, testSuite, 1+int(seed))
		store := make(map[NodeIndex][]byte)
		for step := range 60 {
			before := tt.RatchetTree
			encoded, hash := codec.Marshal(before), before.Hash(testSuite)
			if step > 0 {
				tt.RatchetTree = before.clone()
			}
			tt.mutate(t, r)
			again := fresh(t, tt.RatchetTree)
			wantBytes(t, "cached tree hash", tt.Hash(testSuite), again.Hash(testSuite))
			if again.Count() != tt.Count() || again.Size() != tt.Size() {
				t.Fatalf("step %d: %d members in %d slots, decoded %d in %d", step, tt.Count(), tt.Size(), again.Count(), again.Size())
			}
			if again.end != tt.end || !tt.occupied(tt.end-1) {
				t.Fatalf("step %d: members end before %d, decoded %d", step, tt.end, again.end)
			}
			if err := again.validate(testSuite, tt.groupID, nil); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
			if step > 0 {
				wantBytes(t, "the tree that was cloned", codec.Marshal(before), encoded)
				wantBytes(t, "its hash", before.Hash(testSuite), hash)
			}

			for _, n := range tt.dirtyNodes() {
				if b := tt.encodeNode(n); b != nil {
					store[n] = b
				} else {
					delete(store, n)
				}
			}
			tt.clearDirty()
			loaded, err := emptyRatchetTree(tt.Size())
			if err != nil {
				t.Fatal(err)
			}
			if err := loaded.decodeNodes(store); err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "tree from the saved nodes", codec.Marshal(loaded), codec.Marshal(tt.RatchetTree))
			if t.Failed() {
				return
			}
		}
	}
}

func TestSavedNodesOfACommitAreThoseOfItsPath(t *testing.T) {
	tt := newTestTree(t, testSuite, 64)
	for i := range LeafIndex(64) {
		tt.commit(t, i)
	}
	tt.RatchetTree = tt.clone()
	tt.commit(t, 5)
	if got := len(tt.dirtyNodes()); got != 7 {
		t.Errorf("%d nodes to save after a commit among 64 members, want a leaf and 6 above", got)
	}
}

func TestRemovalTruncatesTree(t *testing.T) {
	tt := newTestTree(t, testSuite, 9)
	tt.commit(t, 8)
	if tt.Size() != 16 {
		t.Fatalf("%d slots for 9 members", tt.Size())
	}
	tt.removeLeaf(8)
	if tt.Size() != 8 {
		t.Errorf("%d slots after the ninth member left, want 8", tt.Size())
	}
	for i := LeafIndex(1); i < 8; i++ {
		tt.removeLeaf(i)
	}
	if tt.Size() != 1 || tt.Count() != 1 {
		t.Errorf("%d members in %d slots, want 1 in 1", tt.Count(), tt.Size())
	}
	if i := tt.add(t); i != 1 || tt.Size() != 2 {
		t.Errorf("new member at leaf %d of %d slots, want 1 of 2", i, tt.Size())
	}
}

func TestAddTakesLeftmostBlankLeaf(t *testing.T) {
	tt := newTestTree(t, testSuite, 7)
	tt.commit(t, 0)
	tt.removeLeaf(4)
	tt.removeLeaf(2)
	tt.commit(t, 0)
	for _, want := range []LeafIndex{2, 4, 7, 8} {
		if got := tt.add(t); got != want {
			t.Errorf("member added at leaf %d, want %d", got, want)
		}
	}
	if p := tt.parentNode(rootOf(8)); p == nil || !slices.Equal(p.UnmergedLeaves, []LeafIndex{2, 4, 7}) {
		t.Errorf("unmerged leaves of the old root: %v", p)
	}
}

func TestSnapshotCanBeReadWhileClonesChange(t *testing.T) {
	tt := newTestTree(t, testSuite, 40)
	tt.commit(t, 3)
	tt.Hash(testSuite)
	snapshot := tt.RatchetTree
	want := codec.Marshal(snapshot)
	leaf := snapshot.Leaf(1).clone()
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			for i := range 20 {
				c := snapshot.clone()
				c.updateLeaf(LeafIndex(k*5+i%5), leaf)
				c.addLeaf(leaf)
				c.Hash(testSuite)
				if !bytes.Equal(codec.Marshal(snapshot), want) || snapshot.Hash(testSuite) == nil {
					t.Error("the snapshot changed")
				}
			}
		})
	}
	wg.Wait()
}

func TestTreeDecoderRefusesWrongForms(t *testing.T) {
	tt := newTestTree(t, testSuite, 2)
	tt.commit(t, 0)
	nodes := func(list ...[]byte) []byte {
		var w codec.Writer
		w.Vector(func(w *codec.Writer) { w.Raw(slices.Concat(list...)) })
		return w.Bytes()
	}
	leaf, parent, blank := tt.encodeNode(0), tt.encodeNode(1), []byte{0}
	unmerged := func(leaves ...LeafIndex) []byte {
		p := packParent(&ParentNode{EncryptionKey: tt.publicKey(1), UnmergedLeaves: leaves})
		return codec.Encode(func(w *codec.Writer) { p.marshalNode(w, 1) })
	}
	disorder, twice := unmerged(1, 0), unmerged(1, 1)
	cut := append([]byte{nodeTypeLeaf}, make([]byte, 5)...)
	for what, b := range map[string][]byte{
		"no nodes":                     nodes(),
		"blank node at the right end":  nodes(leaf, blank),
		"only blank nodes":             nodes(blank, blank, blank),
		"parent in a leaf's place":     nodes(parent, parent, leaf),
		"leaf in a parent's place":     nodes(leaf, leaf, leaf),
		"leaf that is cut off":         append([]byte{1 + byte(len(cut))}, append([]byte{1}, cut...)...),
		"unmerged leaves out of order": nodes(leaf, disorder, leaf),
		"unmerged leaf twice":          nodes(leaf, twice, leaf),
		"too many slots":               nodes(make([]byte, 2*maxLeafSlots), leaf),
	} {
		if _, err := ParseRatchetTree(b); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if _, err := ParseRatchetTree(nodes(leaf, parent, leaf)); err != nil {
		t.Error(err)
	}
}

func TestValidationFindsBrokenTrees(t *testing.T) {
	build := func() *testTree {
		tt := newTestTree(t, testSuite, 8)
		for i := range LeafIndex(8) {
			tt.commit(t, i)
		}
		tt.removeLeaf(5)
		tt.commit(t, 0)
		tt.add(t) // leaf 5, unmerged above
		return tt
	}
	change := func(tt *testTree, n NodeIndex, f func(p *ParentNode)) {
		p := *tt.parentNode(n)
		p.UnmergedLeaves = slices.Clone(p.UnmergedLeaves)
		f(&p)
		tt.setParent(n, &p)
	}
	if err := fresh(t, build().RatchetTree).validate(testSuite, []byte("group"), nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what, section string
		f             func(tt *testTree)
	}{
		{"other key in a parent", "7.9.2", func(tt *testTree) {
			change(tt, 3, func(p *ParentNode) { p.EncryptionKey = append(slices.Clone(p.EncryptionKey[:31]), 1) })
		}},
		{"other parent hash in a parent", "7.9.2", func(tt *testTree) {
			change(tt, 3, func(p *ParentNode) { p.ParentHash = make([]byte, 32) })
		}},
		{"unmerged leaf left out", "7.9.2", func(tt *testTree) {
			change(tt, 7, func(p *ParentNode) { p.UnmergedLeaves = nil })
		}},
		{"leaf in a committed subtree replaced", "7.9.2", func(tt *testTree) {
			kp, _, _ := tt.keyPackage(t)
			tt.setLeaf(3, &kp.LeafNode)
		}},
		{"unmerged leaf that is blank", "12.4.3.1", func(tt *testTree) { tt.setLeaf(5, nil) }},
		{"unmerged leaf elsewhere in the tree", "12.4.3.1", func(tt *testTree) {
			change(tt, 3, func(p *ParentNode) { p.UnmergedLeaves = []LeafIndex{5} })
		}},
		{"unmerged leaf beyond the tree", "12.4.3.1", func(tt *testTree) {
			change(tt, 7, func(p *ParentNode) { p.UnmergedLeaves = []LeafIndex{5, 9} })
		}},
		{"unmerged leaf merged below", "12.4.3.1", func(tt *testTree) {
			change(tt, 7, func(p *ParentNode) { p.UnmergedLeaves = []LeafIndex{1, 5} })
		}},
		{"key used twice", "7.3", func(tt *testTree) {
			change(tt, 3, func(p *ParentNode) { p.EncryptionKey = tt.publicKey(8) })
		}},
		{"signature key used twice", "7.3", func(tt *testTree) {
			l := tt.Leaf(5).clone()
			l.SignatureKey = tt.Leaf(4).SignatureKey
			if err := l.sign(testSuite, tt.rand, tt.signers[4], tt.groupID, 5); err != nil {
				t.Fatal(err)
			}
			tt.setLeaf(5, l)
		}},
		{"leaf changed after signing", "7.3", func(tt *testTree) {
			l := tt.Leaf(5).clone()
			l.Lifetime.NotAfter++
			tt.setLeaf(5, l)
		}},
	} {
		tt := build()
		c.f(tt)
		err := tt.validate(testSuite, tt.groupID, nil)
		if v, ok := err.(*ValidationError); !ok || v.Section != c.section {
			t.Errorf("%s: got %v, want a ValidationError of section %s", c.what, err, c.section)
		}
	}
}

func TestUnmergedLeavesAreBelowTheirNode(t *testing.T) {
	tt := newTestTree(t, testSuite, 8)
	tt.commit(t, 0)
	tree := fresh(t, tt.RatchetTree)
	p := *tree.parentNode(1)
	p.UnmergedLeaves = []LeafIndex{2} // whose own ancestors say nothing against it
	tree.setParent(1, &p)
	if err := tree.checkUnmergedLeaves(); !section(err, "12.4.3.1") || !strings.Contains(err.Error(), "unmerged leaf 2 of node 1 is not a member below it") {
		t.Errorf("got %v, want a violation of 12.4.3.1 that names leaf 2", err)
	}
}

func TestValidationGivesEveryLeafToTheCheck(t *testing.T) {
	tt := newTestTree(t, testSuite, 33)
	tt.removeLeaf(7)
	var mu sync.Mutex
	seen := make(map[LeafIndex]int)
	if err := tt.validate(testSuite, tt.groupID, func(i LeafIndex, l *LeafNode) error {
		mu.Lock()
		defer mu.Unlock()
		seen[i]++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 32 || seen[7] != 0 {
		t.Errorf("leaves checked: %v", seen)
	}
	refuse := fmt.Errorf("no")
	if err := tt.validate(testSuite, tt.groupID, func(i LeafIndex, _ *LeafNode) error {
		if i == 20 {
			return refuse
		}
		return nil
	}); err != refuse {
		t.Errorf("got %v, want the check's error", err)
	}
}

// bigTree is a tree of n members, every eighth of which committed.
func bigTree(b *testing.B, n int) *testTree {
	tt := newTestTree(b, testSuite, n)
	for i := 0; i < n; i += 8 {
		tt.commit(b, LeafIndex(i))
	}
	tt.Hash(testSuite)
	return tt
}

func BenchmarkTree(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000} {
		tt := bigTree(b, n)
		encoded := codec.Marshal(tt.RatchetTree)
		run := func(name string, f func()) {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					f()
				}
			})
		}
		ctx := make([]byte, 300)
		run("Clone", func() { tt.clone() })
		run("StageUpdate", func() {
			c := tt.clone()
			c.updateLeaf(LeafIndex(n/2), tt.Leaf(LeafIndex(n/2)))
			c.Hash(testSuite)
		})
		run("StageAdd", func() {
			c := tt.clone()
			c.addLeaf(tt.Leaf(0))
			c.Hash(testSuite)
		})
		run("GeneratePath", func() {
			c := tt.clone()
			if _, err := c.generatePath(testSuite, tt.rand, 8, tt.Leaf(8), tt.groupID, tt.signers[8]); err != nil {
				b.Fatal(err)
			}
			c.Hash(testSuite)
		})
		after := &testTree{cs: tt.cs, rand: tt.rand, groupID: tt.groupID, RatchetTree: tt.clone(), signers: tt.signers, private: make(map[LeafIndex]*treePrivate)}
		np := after.commit(b, 8)
		up, err := np.encrypt(tt.rand, after.RatchetTree, nil, ctx)
		if err != nil {
			b.Fatal(err)
		}
		run("EncryptPath", func() {
			if _, err := np.encrypt(tt.rand, after.RatchetTree, nil, ctx); err != nil {
				b.Fatal(err)
			}
		})
		run("ApplyPath", func() {
			c := tt.clone()
			if err := c.applyPath(testSuite, 8, up); err != nil {
				b.Fatal(err)
			}
			c.Hash(testSuite)
		})
		run("DecryptPath", func() {
			if _, _, err := after.decryptPath(testSuite, tt.private[9], 8, up, nil, ctx); err != nil {
				b.Fatal(err)
			}
		})
		run("Parse", func() {
			if _, err := ParseRatchetTree(encoded); err != nil {
				b.Fatal(err)
			}
		})
		run("HashAll", func() { fresh(b, tt.RatchetTree).Hash(testSuite) })
		run("ParentHashes", func() {
			if err := tt.verifyParentHashes(testSuite); err != nil {
				b.Fatal(err)
			}
		})
		run("Validate", func() {
			if err := fresh(b, tt.RatchetTree).validate(testSuite, tt.groupID, nil); err != nil {
				b.Fatal(err)
			}
		})
	}
}
