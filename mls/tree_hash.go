package mls

import (
	"bytes"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// Tree hashes (RFC 9420, Section 7.8).

// Hash returns the tree hash of the root. Only what changed since the last call is hashed anew. The first call on a
// tree writes to it; trees that a Group or PublicGroup hands out are hashed already.
func (t *RatchetTree) Hash(cs CipherSuite) []byte { return bytes.Clone(t.hash(cs, t.root())) }

// hash returns the tree hash of a node.
//
//	struct {
//	    NodeType node_type;
//	    select (TreeHashInput.node_type) {
//	        case leaf:   uint32 leaf_index; optional<LeafNode> leaf_node;
//	        case parent: optional<ParentNode> parent_node; opaque left_hash<V>; opaque right_hash<V>;
//	    };
//	} TreeHashInput;
func (t *RatchetTree) hash(cs CipherSuite, n NodeIndex) []byte {
	if h := t.knownHash(n); h != nil {
		return h
	}
	if n.isLeaf() {
		return leafHash(cs, n.leaf(), t.node(n))
	}
	left, right := t.hash(cs, n.left()), t.hash(cs, n.right())
	return t.setHash(n, parentNodeHash(cs, t.node(n), left, right))
}

func leafHash(cs CipherSuite, i LeafIndex, l packedNode) []byte {
	return cs.hashOf(func(w *codec.Writer) {
		w.Uint8(nodeTypeLeaf)
		w.Uint32(uint32(i))
		w.Optional(len(l) > 0)
		w.Raw(l)
	})
}

func parentNodeHash(cs CipherSuite, p packedNode, left, right []byte) []byte {
	return cs.hashOf(func(w *codec.Writer) {
		w.Uint8(nodeTypeParent)
		w.Optional(len(p) > 0)
		w.Raw(p)
		w.Opaque(left)
		w.Opaque(right)
	})
}

// originalHash returns the tree hash that n would have without the leaves in removed, which ascend: they are blanked
// and taken out of all unmerged leaves (RFC 9420, Section 7.9). Subtrees without any of them keep their hash, so the
// cost is that of the paths to the removed leaves.
func (t *RatchetTree) originalHash(cs CipherSuite, n NodeIndex, removed []LeafIndex) []byte {
	removed = within(removed, n)
	if len(removed) == 0 {
		return t.hash(cs, n)
	}
	if n.isLeaf() {
		return leafHash(cs, n.leaf(), nil)
	}
	left, right := t.originalHash(cs, n.left(), removed), t.originalHash(cs, n.right(), removed)
	p := t.node(n)
	if parent := p.parent(); parent != nil && len(parent.UnmergedLeaves) > 0 {
		parent.UnmergedLeaves = without(parent.UnmergedLeaves, removed)
		p = packParent(parent)
	}
	return parentNodeHash(cs, p, left, right)
}

// within returns the part of leaves, which ascend, that is in n's subtree.
func within(leaves []LeafIndex, n NodeIndex) []LeafIndex {
	from, _ := slices.BinarySearch(leaves, n.first())
	to, _ := slices.BinarySearch(leaves, n.last()+1)
	return leaves[from:to]
}

// without returns the leaves that aren't among removed; both ascend.
func without(leaves, removed []LeafIndex) []LeafIndex {
	out := make([]LeafIndex, 0, len(leaves))
	for _, l := range leaves {
		for len(removed) > 0 && removed[0] < l {
			removed = removed[1:]
		}
		if len(removed) == 0 || removed[0] != l {
			out = append(out, l)
		}
	}
	return out
}
