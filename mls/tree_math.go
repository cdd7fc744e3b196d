package mls

import "math/bits"

// Trees as arrays (RFC 9420, Appendix C). A tree has a power of two of leaf slots; leaves have even node indices.

// LeafIndex numbers a group's leaves from the left, from 0.
type LeafIndex uint32

// NodeIndex numbers a tree's nodes from the left: leaf i is node 2i (RFC 9420, Appendix C).
type NodeIndex uint32

func (l LeafIndex) node() NodeIndex { return NodeIndex(l) * 2 }

func (n NodeIndex) isLeaf() bool { return n&1 == 0 }

// leaf is the index of a leaf's node.
func (n NodeIndex) leaf() LeafIndex { return LeafIndex(n / 2) }

// level is 0 for leaves and one more than its children's for a parent.
func (n NodeIndex) level() int { return bits.TrailingZeros32(^uint32(n)) }

// left, right are meant for parents.
func (n NodeIndex) left() NodeIndex  { return n ^ 1<<(n.level()-1) }
func (n NodeIndex) right() NodeIndex { return n ^ 3<<(n.level()-1) }

// parent is the node above, in a tree that is large enough.
func (n NodeIndex) parent() NodeIndex {
	k := n.level()
	return (n | 1<<k) &^ (1 << (k + 1))
}

// sibling is the other child of the node's parent.
func (n NodeIndex) sibling() NodeIndex {
	p := n.parent()
	if n < p {
		return p.right()
	}
	return p.left()
}

// first and last are the leaves at the ends of the node's subtree.
func (n NodeIndex) first() LeafIndex { return (n + 1 - 1<<n.level()).leaf() }
func (n NodeIndex) last() LeafIndex  { return (n - 1 + 1<<n.level()).leaf() }

// covers says whether the leaf is in the node's subtree.
func (n NodeIndex) covers(l LeafIndex) bool { return n.first() <= l && l <= n.last() }

// rootOf is the root of a tree of so many leaf slots, a power of two.
func rootOf(slots uint32) NodeIndex { return NodeIndex(slots - 1) }

// slotsFor is the smallest power of two that is at least n.
func slotsFor(n uint32) uint32 {
	if n <= 1 {
		return 1
	}
	return 1 << bits.Len32(n-1)
}

// commonAncestor is the lowest node above both leaves.
func commonAncestor(a, b LeafIndex) NodeIndex {
	if a == b {
		return a.node()
	}
	k := bits.Len32(uint32(a ^ b)) // the level at which the paths meet
	return NodeIndex(a >> k << k).span(k)
}

// span is the node of a level whose subtree starts at leaf number n.
func (n NodeIndex) span(level int) NodeIndex { return 2*n + 1<<level - 1 }
