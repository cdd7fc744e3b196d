package mls

import "slices"

// validate checks a tree that came from someone else (RFC 9420, Section 12.4.3.1): unmerged leaves, unique keys,
// parent hashes, leaf signatures, and each leaf with checkLeaf unless that is nil. checkLeaf is called by several
// goroutines at once. That the tree hash is the GroupContext's is the caller's to check, first.
func (t *RatchetTree) validate(cs CipherSuite, groupID []byte, checkLeaf func(LeafIndex, *LeafNode) error) error {
	if t.count == 0 {
		return invalid("12.4.3.1", "ratchet tree without members")
	}
	if err := t.checkUnmergedLeaves(); err != nil {
		return err
	}
	if err := t.checkUniqueKeys(); err != nil {
		return err
	}
	for n := range NodeIndex(t.nodeWidth()) {
		if key := t.publicKey(n); key != nil {
			if err := cs.checkHPKEPublicKey(key); err != nil {
				return invalid("7.1", "encryption key of node %d", n, err)
			}
		}
	}
	t.Hash(cs)
	if err := t.verifyParentHashes(cs); err != nil {
		return err
	}
	leaves := make([]LeafIndex, 0, t.count)
	for i := range LeafIndex(t.slots) {
		if t.occupied(i) {
			leaves = append(leaves, i)
		}
	}
	// Ed25519 signatures are verified one by one, by the equation without the cofactor, as Go does everywhere else. Batches
	// need the one with it: in a random sum of equations an error of small order cancels with a chance of up to one half.
	// That one accepts more (RFC 8032, Section 5.1.7), so a member could sign a leaf which only those accept who joined.
	return parallel(len(leaves), func(k int) error {
		i := leaves[k]
		l := t.Leaf(i)
		if err := l.verifySignature(cs, groupID, i); err != nil {
			return invalid("7.3", "signature of leaf %d", i, err)
		}
		if checkLeaf != nil {
			return checkLeaf(i, l)
		}
		return nil
	})
}

// checkUnmergedLeaves checks that unmerged leaves are members below their node and unmerged at each node between: at the
// next one, which is checked in its turn.
func (t *RatchetTree) checkUnmergedLeaves() error {
	for n := NodeIndex(1); uint32(n) < t.nodeWidth(); n += 2 {
		p := t.parentNode(n)
		if p == nil {
			continue
		}
		for _, l := range p.UnmergedLeaves {
			if !n.covers(l) || !t.occupied(l) {
				return invalid("12.4.3.1", "unmerged leaf %d of node %d is not a member below it", l, n)
			}
			if at := t.nextParent(n, l); at != n {
				if _, ok := slices.BinarySearch(t.parentNode(at).UnmergedLeaves, l); !ok {
					return invalid("12.4.3.1", "leaf %d is unmerged at node %d and not at node %d below", l, n, at)
				}
			}
		}
	}
	return nil
}

// nextParent returns the highest node between n and leaf l below it that isn't blank, n if there is none.
func (t *RatchetTree) nextParent(n NodeIndex, l LeafIndex) NodeIndex {
	for at := n; ; {
		if l.node() < at {
			at = at.left()
		} else {
			at = at.right()
		}
		switch {
		case at.isLeaf():
			return n
		case !t.blank(at):
			return at
		}
	}
}

// checkUniqueKeys checks that no two nodes have the same encryption key and no two leaves the same signature key.
func (t *RatchetTree) checkUniqueKeys() error {
	encryption := make(map[string]NodeIndex, t.count*2)
	signature := make(map[string]LeafIndex, t.count)
	for n := range NodeIndex(t.nodeWidth()) {
		key := t.publicKey(n)
		if key == nil {
			continue
		}
		if other, ok := encryption[string(key)]; ok {
			return invalid("7.3", "nodes %d and %d have the same encryption key", other, n)
		}
		encryption[string(key)] = n
		if n.isLeaf() {
			key := t.signatureKey(n.leaf())
			if other, ok := signature[string(key)]; ok {
				return invalid("7.3", "leaves %d and %d have the same signature key", other, n.leaf())
			}
			signature[string(key)] = n.leaf()
		}
	}
	return nil
}
