package mls

import (
	"crypto/subtle"

	"github.com/parley-mls/parley/mls/codec"
)

// Parent hashes (RFC 9420, Section 7.9).

// parentHash returns the parent hash of parent p with copath child s.
//
//	struct {
//	    HPKEPublicKey encryption_key;
//	    opaque parent_hash<V>;
//	    opaque original_sibling_tree_hash<V>;
//	} ParentHashInput;
func (t *RatchetTree) parentHash(cs CipherSuite, p *ParentNode, s NodeIndex) []byte {
	sibling := t.originalHash(cs, s, p.UnmergedLeaves)
	return cs.hashOf(func(w *codec.Writer) {
		w.Opaque(p.EncryptionKey)
		w.Opaque(p.ParentHash)
		w.Opaque(sibling)
	})
}

// setPath puts keys on a leaf's filtered direct path, blanks the rest of its direct path, and returns the parent hash
// that the leaf must have. Parent hashes are chained from the root down.
func (t *RatchetTree) setPath(cs CipherSuite, i LeafIndex, path, copath []NodeIndex, keys []HPKEPublicKey) []byte {
	parents := make(map[NodeIndex]packedNode, len(path))
	parentHash := []byte{}
	for k := len(path) - 1; k >= 0; k-- {
		p := &ParentNode{EncryptionKey: keys[k], ParentHash: parentHash}
		parents[path[k]] = packParent(p)
		parentHash = t.parentHash(cs, p, copath[k]) // of nodes that aren't on the path
	}
	t.setParents(i, parents)
	return parentHash
}

// parentHashOf returns the parent hash that a node carries, nil if it is blank or a leaf that no commit made.
func (t *RatchetTree) parentHashOf(n NodeIndex) []byte {
	switch {
	case t.blank(n):
		return nil
	case n.isLeaf():
		return t.node(n).leaf().ParentHash // nil unless a commit made the leaf
	}
	return t.parentNode(n).ParentHash
}

// verifyParentHashes checks that every parent is parent-hash valid (RFC 9420, Section 7.9.2), top down: exactly one
// descendant carries the parent's hash. That descendant is what remains of a child's resolution without the parent's
// unmerged leaves, so there is one candidate on each side.
func (t *RatchetTree) verifyParentHashes(cs CipherSuite) error {
	for n := NodeIndex(1); uint32(n) < t.nodeWidth(); n += 2 {
		p := t.parentNode(n)
		if p == nil {
			continue
		}
		valid := 0
		for _, c := range [2]NodeIndex{n.left(), n.right()} {
			d, ok := t.updatedWith(p, c)
			if !ok {
				continue
			}
			if h := t.parentHashOf(d); h != nil && subtle.ConstantTimeCompare(h, t.parentHash(cs, p, c.sibling())) == 1 {
				valid++
			}
		}
		if valid != 1 {
			return invalid("7.9.2", "node %d is not parent-hash valid", n)
		}
	}
	return nil
}

// updatedWith returns the node in the resolution of c, a child of p, that p's unmerged leaves don't account for, if
// they account for all others and for nothing else.
func (t *RatchetTree) updatedWith(p *ParentNode, c NodeIndex) (NodeIndex, bool) {
	unmerged := within(p.UnmergedLeaves, c)
	var (
		d      NodeIndex
		others int
		count  int
	)
	for _, r := range t.resolution(c) {
		count++
		if r.isLeaf() && len(within(unmerged, r)) == 1 {
			continue
		}
		d = r
		others++
	}
	return d, others == 1 && count == len(unmerged)+1
}
