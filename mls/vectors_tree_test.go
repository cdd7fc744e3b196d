package mls

import (
	"bytes"
	"crypto/rand"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func TestVectorsTreeOperations(t *testing.T) {
	type vector struct {
		CipherSuite    CipherSuite `json:"cipher_suite"`
		TreeBefore     hexBytes    `json:"tree_before"`
		Proposal       hexBytes    `json:"proposal"`
		ProposalSender LeafIndex   `json:"proposal_sender"`
		TreeHashBefore hexBytes    `json:"tree_hash_before"`
		TreeAfter      hexBytes    `json:"tree_after"`
		TreeHashAfter  hexBytes    `json:"tree_hash_after"`
	}
	suites := []CipherSuite{X25519_AES128GCM_SHA256_Ed25519}
	forSuites(t, "tree-operations", suites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		before, err := ParseRatchetTree(v.TreeBefore)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "tree hash before", before.Hash(cs), v.TreeHashBefore)
		after := before.clone()
		var p Proposal
		decode(t, v.Proposal, &p)
		switch p.Type {
		case ProposalAdd:
			after.addLeaf(&p.Add.KeyPackage.LeafNode)
		case ProposalUpdate:
			after.updateLeaf(v.ProposalSender, &p.Update.LeafNode)
		case ProposalRemove:
			after.removeLeaf(p.Remove.Removed)
		default:
			t.Fatalf("proposal type %d", p.Type)
		}
		wantBytes(t, "tree after", codec.Marshal(after), v.TreeAfter)
		wantBytes(t, "tree hash after", after.Hash(cs), v.TreeHashAfter)
		wantBytes(t, "the tree that was cloned", codec.Marshal(before), v.TreeBefore)
		wantBytes(t, "its hash", before.Hash(cs), v.TreeHashBefore)
	})
}

func TestVectorsTreeValidation(t *testing.T) {
	type vector struct {
		CipherSuite CipherSuite   `json:"cipher_suite"`
		Tree        hexBytes      `json:"tree"`
		GroupID     hexBytes      `json:"group_id"`
		Resolutions [][]NodeIndex `json:"resolutions"`
		TreeHashes  []hexBytes    `json:"tree_hashes"`
	}
	forSuites(t, "tree-validation", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		tree, err := ParseRatchetTree(v.Tree)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "tree", codec.Marshal(tree), v.Tree)
		if int(tree.nodeWidth()) != len(v.TreeHashes) {
			t.Fatalf("%d nodes, want %d", tree.nodeWidth(), len(v.TreeHashes))
		}
		for n := range NodeIndex(tree.nodeWidth()) {
			if got := tree.resolution(n); !slices.Equal(got, v.Resolutions[n]) {
				t.Errorf("resolution of node %d: got %v, want %v", n, got, v.Resolutions[n])
			}
			wantBytes(t, "tree hash", tree.hash(v.CipherSuite, n), v.TreeHashes[n])
		}
		if err := tree.validate(v.CipherSuite, v.GroupID, nil); err != nil {
			t.Error(err)
		}
		if err := tree.validate(v.CipherSuite, append(v.GroupID, 0), nil); err == nil && hasCommitLeaf(tree) {
			t.Error("leaf signatures verify for another group")
		}
	})
}

func hasCommitLeaf(t *RatchetTree) bool {
	for _, l := range t.Leaves() {
		if l.Source != LeafNodeKeyPackage {
			return true
		}
	}
	return false
}

func TestVectorsTreeKEM(t *testing.T) {
	type vector struct {
		CipherSuite             CipherSuite `json:"cipher_suite"`
		GroupID                 hexBytes    `json:"group_id"`
		Epoch                   uint64      `json:"epoch"`
		ConfirmedTranscriptHash hexBytes    `json:"confirmed_transcript_hash"`
		RatchetTree             hexBytes    `json:"ratchet_tree"`
		LeavesPrivate           []struct {
			Index          LeafIndex
			EncryptionPriv hexBytes `json:"encryption_priv"`
			SignaturePriv  hexBytes `json:"signature_priv"`
			PathSecrets    []struct {
				Node       NodeIndex
				PathSecret hexBytes `json:"path_secret"`
			} `json:"path_secrets"`
		} `json:"leaves_private"`
		UpdatePaths []struct {
			Sender        LeafIndex
			UpdatePath    hexBytes   `json:"update_path"`
			PathSecrets   []hexBytes `json:"path_secrets"`
			CommitSecret  hexBytes   `json:"commit_secret"`
			TreeHashAfter hexBytes   `json:"tree_hash_after"`
		} `json:"update_paths"`
	}
	forSuites(t, "treekem", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		tree, err := ParseRatchetTree(v.RatchetTree)
		if err != nil {
			t.Fatal(err)
		}
		tree.Hash(cs)
		private := make(map[LeafIndex]*treePrivate)
		signature := make(map[LeafIndex]hexBytes)
		for _, l := range v.LeavesPrivate {
			p := newTreePrivate(l.Index, HPKEPrivateKey(l.EncryptionPriv))
			for _, s := range l.PathSecrets {
				if _, p.keys[s.Node], err = cs.nodeKeys(secret(s.PathSecret)); err != nil {
					t.Fatal(err)
				}
			}
			for n, key := range p.keys {
				pub, err := cs.hpkePublicOf(key)
				if err != nil {
					t.Fatal(err)
				}
				wantBytes(t, "public key of a private one", pub, tree.publicKey(n))
			}
			private[l.Index] = p
			signature[l.Index] = l.SignaturePriv
		}
		context := func(tree *RatchetTree) []byte {
			return codec.Marshal(GroupContext{Version: MLS10, CipherSuite: cs, GroupID: v.GroupID, Epoch: v.Epoch,
				TreeHash: tree.Hash(cs), ConfirmedTranscriptHash: v.ConfirmedTranscriptHash})
		}
		for _, u := range v.UpdatePaths {
			var path UpdatePath
			decode(t, u.UpdatePath, &path)
			after := tree.clone()
			if err := after.applyPath(cs, u.Sender, &path); err != nil {
				t.Fatal(err)
			}
			if err := path.LeafNode.verifySignature(cs, v.GroupID, u.Sender); err != nil {
				t.Error(err)
			}
			wantBytes(t, "tree hash after", after.Hash(cs), u.TreeHashAfter)
			if err := after.verifyParentHashes(cs); err != nil {
				t.Error(err)
			}
			bad := path
			bad.LeafNode.ParentHash = append(bytes.Clone(path.LeafNode.ParentHash), 0)
			if err := tree.clone().applyPath(cs, u.Sender, &bad); err == nil {
				t.Error("path with another parent hash accepted")
			}
			for l := range tree.Leaves() {
				if l == u.Sender {
					continue
				}
				commit, next, err := after.decryptPath(cs, private[l], u.Sender, &path, nil, context(after))
				if err != nil {
					t.Fatalf("leaf %d: %v", l, err)
				}
				wantBytes(t, "commit secret", commit, u.CommitSecret)
				_, key, _ := cs.nodeKeys(secret(u.PathSecrets[l]))
				wantBytes(t, "key of the path secret", next.keys[commonAncestor(l, u.Sender)], key)
			}

			own := tree.clone()
			np, err := own.generatePath(cs, rand.Reader, u.Sender, tree.Leaf(u.Sender), v.GroupID, signerFrom(t, cs, signature[u.Sender]))
			if err != nil {
				t.Fatal(err)
			}
			up, err := np.encrypt(rand.Reader, own, nil, context(own))
			if err != nil {
				t.Fatal(err)
			}
			merged := tree.clone()
			if err := merged.applyPath(cs, u.Sender, up); err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "tree with own path", codec.Marshal(merged), codec.Marshal(own))
			for l := range tree.Leaves() {
				if l == u.Sender {
					continue
				}
				commit, next, err := merged.decryptPath(cs, private[l], u.Sender, up, nil, context(merged))
				if err != nil {
					t.Fatalf("leaf %d: %v", l, err)
				}
				wantBytes(t, "own commit secret", commit, np.commitSecret)
				joiner := newTreePrivate(l, private[l].keys[l.node()])
				if err := merged.installPathSecret(cs, joiner, u.Sender, np.secretFor(l)); err != nil {
					t.Error(err)
				}
				for n, key := range joiner.keys {
					wantBytes(t, "key from the path secret", next.keys[n], key)
				}
			}
		}
		wantBytes(t, "the tree that was cloned", codec.Marshal(tree), v.RatchetTree)
	})
}
