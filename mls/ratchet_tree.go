package mls

import (
	"fmt"
	"iter"
	"slices"
	"sync/atomic"

	"github.com/parley-mls/parley/mls/codec"
)

// ParentNode is an inner node of the tree that has a key (RFC 9420, Section 7.1). Once in a tree it isn't changed,
// only replaced.
//
//	struct {
//	    HPKEPublicKey encryption_key;
//	    opaque parent_hash<V>;
//	    uint32 unmerged_leaves<V>;
//	} ParentNode;
type ParentNode struct {
	EncryptionKey  HPKEPublicKey
	ParentHash     []byte
	UnmergedLeaves []LeafIndex // ascending
}

// MarshalMLS implements codec.Marshaler.
func (p *ParentNode) MarshalMLS(w *codec.Writer) { p.marshalWith(w, p.UnmergedLeaves) }

func (p *ParentNode) marshalWith(w *codec.Writer, unmerged []LeafIndex) {
	w.Opaque(p.EncryptionKey)
	w.Opaque(p.ParentHash)
	w.Length(4 * len(unmerged))
	for _, l := range unmerged {
		w.Uint32(uint32(l))
	}
}

// UnmarshalMLS implements codec.Unmarshaler. Unmerged leaves that don't ascend are refused.
func (p *ParentNode) UnmarshalMLS(r *codec.Reader) {
	*p = ParentNode{EncryptionKey: r.Opaque(), ParentHash: r.Opaque()}
	p.UnmergedLeaves = codec.ReadVector(r, func(r *codec.Reader) LeafIndex { return LeafIndex(r.Uint32()) })
	for i := 1; i < len(p.UnmergedLeaves); i++ {
		if p.UnmergedLeaves[i] <= p.UnmergedLeaves[i-1] {
			r.Failf("unmerged leaf %d after %d", p.UnmergedLeaves[i], p.UnmergedLeaves[i-1])
			return
		}
	}
}

// maxLeafSlots bounds a tree: at most so many leaves, blank ones included.
const maxLeafSlots = 1 << 18

const (
	nodeTypeLeaf   = 1
	nodeTypeParent = 2
)

// packedLeaf is a leaf as it is encoded, which takes half of the memory of a LeafNode.
type packedLeaf struct{ encoded []byte }

func packLeaf(l *LeafNode) *packedLeaf {
	if l == nil {
		return nil
	}
	return &packedLeaf{codec.Marshal(l)}
}

// unpack returns a LeafNode whose fields are parts of the encoding.
func (p *packedLeaf) unpack() *LeafNode {
	if p == nil {
		return nil
	}
	l := new(LeafNode)
	l.UnmarshalMLS(codec.NewAliasing(p.encoded)) // doesn't fail: it was decoded or encoded before
	return l
}

// keys returns the leaf's encryption and signature keys.
func (p *packedLeaf) keys() (encryption HPKEPublicKey, signature []byte) {
	r := codec.NewReader(p.encoded)
	return r.View(), r.View()
}

// treeSlot is a node of the tree, blank if neither leaf nor parent is set.
type treeSlot struct {
	leaf   *packedLeaf
	parent *ParentNode
}

// treeOwner marks the pages that a tree may write to.
type treeOwner struct{ _ byte }

const (
	pageBits = 5
	pageSize = 1 << pageBits
)

// treePage has pageSize nodes and their tree hashes.
type treePage struct {
	owner  *treeOwner
	slots  [pageSize]treeSlot
	hashed uint32 // which nodes' hashes are known: nothing in their subtrees changed since they were computed
	hashes []byte // one after the other
}

// pageLevels are enough for a tree of maxLeafSlots.
const pageLevels = 4

// place says where a node is. A page has a subtree of five levels, and in its last slot nothing: the nodes above such
// subtrees are, in the same way, in pages of the next level. So there are few pages on a path.
func place(n NodeIndex) (level int, page, slot uint32) {
	for n%pageSize == pageSize-1 {
		n >>= pageBits
		level++
	}
	return level, uint32(n) >> pageBits, uint32(n) % pageSize
}

// RatchetTree is the public state of TreeKEM (RFC 9420, Section 7). A tree that this package returns doesn't change.
//
// Its nodes lie in pages that clones share until one of them writes, so that staging a commit costs the pages along a
// few paths and not the tree.
type RatchetTree struct {
	slots      uint32 // leaf slots, a power of two
	count      int    // members
	firstBlank LeafIndex
	end        LeafIndex               // past the last member; nothing but blank nodes is below a node whose leaves are past it
	pages      [pageLevels][]*treePage // nil pages are blank
	owner      atomic.Pointer[treeOwner]
	dirty      []NodeIndex // changed since the tree was cloned or dirty was cleared; in any order, some more than once
}

func newRatchetTree(first *LeafNode) *RatchetTree {
	t := new(RatchetTree)
	t.resize(1)
	t.setLeaf(0, first)
	return t
}

// emptyRatchetTree returns a blank tree to be filled by decodeNode.
func emptyRatchetTree(slots uint32) (*RatchetTree, error) {
	if slots == 0 || slots > maxLeafSlots || slots&(slots-1) != 0 {
		return nil, fmt.Errorf("%w: tree of %d leaves", ErrMalformed, slots)
	}
	t := new(RatchetTree)
	t.resize(slots)
	return t, nil
}

// ParseRatchetTree decodes the data of a ratchet_tree extension (RFC 9420, Section 12.4.3.3). The tree isn't validated.
func ParseRatchetTree(b []byte) (*RatchetTree, error) {
	t := new(RatchetTree)
	if err := codec.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("mls: ratchet tree: %w", err)
	}
	return t, nil
}

// Size returns the number of leaf slots, blank ones included: a power of two.
func (t *RatchetTree) Size() uint32 { return t.slots }

// Count returns the number of members.
func (t *RatchetTree) Count() int { return t.count }

func (t *RatchetTree) nodeWidth() uint32 { return 2*t.slots - 1 }
func (t *RatchetTree) root() NodeIndex   { return rootOf(t.slots) }

func (t *RatchetTree) slot(n NodeIndex) treeSlot {
	if uint32(n) >= t.nodeWidth() {
		return treeSlot{}
	}
	level, page, at := place(n)
	if p := t.pages[level][page]; p != nil {
		return p.slots[at]
	}
	return treeSlot{}
}

// writable returns a node's page, which t owns, and its place there.
func (t *RatchetTree) writable(n NodeIndex) (p *treePage, at uint32) {
	owner := t.owner.Load()
	if owner == nil {
		owner = new(treeOwner)
		t.owner.Store(owner)
	}
	level, page, at := place(n)
	switch p = t.pages[level][page]; {
	case p == nil:
		p = &treePage{owner: owner}
	case p.owner != owner:
		p = &treePage{owner: owner, slots: p.slots, hashed: p.hashed, hashes: slices.Clone(p.hashes)}
	default:
		return p, at
	}
	t.pages[level][page] = p
	return p, at
}

// knownHash returns a node's tree hash, nil if something in the subtree changed since it was computed. It is valid until
// the node's hash changes.
func (t *RatchetTree) knownHash(n NodeIndex) []byte {
	level, page, at := place(n)
	p := t.pages[level][page]
	if p == nil || p.hashed&(1<<at) == 0 {
		return nil
	}
	size := uint32(len(p.hashes) / pageSize)
	return p.hashes[at*size:][:size:size]
}

// setHash notes a node's tree hash and returns it as knownHash does.
func (t *RatchetTree) setHash(n NodeIndex, hash []byte) []byte {
	p, at := t.writable(n)
	if p.hashes == nil {
		p.hashes = make([]byte, pageSize*len(hash))
	}
	p.hashed |= 1 << at
	known := t.knownHash(n)
	copy(known, hash)
	return known
}

func (t *RatchetTree) forgetHash(n NodeIndex) {
	p, at := t.writable(n)
	p.hashed &^= 1 << at
}

// clone returns a tree that can be changed while t is read. t may be cloned and read by several goroutines at once.
// The clone's nodes count as unchanged.
func (t *RatchetTree) clone() *RatchetTree {
	t.owner.Store(nil)
	c := &RatchetTree{slots: t.slots, count: t.count, firstBlank: t.firstBlank, end: t.end}
	for level, pages := range t.pages {
		c.pages[level] = slices.Clone(pages)
	}
	return c
}

// touch notes that a node changed, and forgets the hashes above it.
func (t *RatchetTree) touch(n NodeIndex) {
	t.dirty = append(t.dirty, n)
	for t.knownHash(n) != nil { // a node whose hash isn't known has no ancestor whose hash is
		t.forgetHash(n)
		if n == t.root() {
			return
		}
		n = n.parent()
	}
}

// dirtyNodes returns the nodes that changed, ascending; those beyond the tree are to be deleted where they are stored.
func (t *RatchetTree) dirtyNodes() []NodeIndex {
	slices.Sort(t.dirty)
	t.dirty = slices.Compact(t.dirty)
	return t.dirty
}

func (t *RatchetTree) clearDirty() { t.dirty = nil }

// resize extends or truncates the tree (RFC 9420, Section 7.7).
func (t *RatchetTree) resize(slots uint32) {
	if slots < t.slots {
		for n := NodeIndex(2*slots - 1); uint32(n) < t.nodeWidth(); n++ {
			if s := t.slot(n); s.leaf != nil || s.parent != nil {
				t.touch(n)
				p, at := t.writable(n)
				p.slots[at] = treeSlot{}
			} else if t.knownHash(n) != nil {
				t.forgetHash(n)
			}
		}
	}
	t.slots = slots
	for level := range t.pages {
		n := (int(2*slots)>>(level*pageBits) + pageSize - 1) / pageSize
		if p := t.pages[level]; n <= len(p) {
			t.pages[level] = p[:n:n]
		} else {
			t.pages[level] = append(p, make([]*treePage, n-len(p))...)
		}
	}
}

// Leaf returns a member's leaf, which mustn't be changed, or nil if the slot is blank or there is none.
func (t *RatchetTree) Leaf(i LeafIndex) *LeafNode {
	if uint32(i) >= t.slots {
		return nil
	}
	return t.slot(i.node()).leaf.unpack()
}

// occupied says whether there is a member at the leaf.
func (t *RatchetTree) occupied(i LeafIndex) bool {
	return uint32(i) < t.slots && t.slot(i.node()).leaf != nil
}

// signatureKey returns a member's signature key, nil if there is none.
func (t *RatchetTree) signatureKey(i LeafIndex) []byte {
	if !t.occupied(i) {
		return nil
	}
	_, key := t.slot(i.node()).leaf.keys()
	return key
}

// Leaves returns the members from left to right. The leaves mustn't be changed.
func (t *RatchetTree) Leaves() iter.Seq2[LeafIndex, *LeafNode] {
	return func(yield func(LeafIndex, *LeafNode) bool) {
		for i := range LeafIndex(t.slots) {
			if l := t.slot(i.node()).leaf; l != nil && !yield(i, l.unpack()) {
				return
			}
		}
	}
}

func (t *RatchetTree) blank(n NodeIndex) bool {
	s := t.slot(n)
	return s.leaf == nil && s.parent == nil
}

// publicKey returns a node's encryption key, nil if it is blank.
func (t *RatchetTree) publicKey(n NodeIndex) HPKEPublicKey {
	switch s := t.slot(n); {
	case s.leaf != nil:
		key, _ := s.leaf.keys()
		return key
	case s.parent != nil:
		return s.parent.EncryptionKey
	}
	return nil
}

// setLeaf replaces a leaf and leaves its path as it is; nil blanks it.
func (t *RatchetTree) setLeaf(i LeafIndex, l *LeafNode) {
	switch had := t.occupied(i); {
	case !had && l != nil:
		t.count++
	case had && l == nil:
		t.count--
		t.firstBlank = min(t.firstBlank, i)
	}
	p, at := t.writable(i.node())
	p.slots[at].leaf = packLeaf(l)
	t.touch(i.node())
	if l != nil {
		t.end = max(t.end, i+1)
	}
	for t.end > 0 && !t.occupied(t.end-1) {
		t.end--
	}
}

func (t *RatchetTree) setParent(n NodeIndex, p *ParentNode) {
	page, at := t.writable(n)
	page.slots[at].parent = p
	t.touch(n)
}

// blankPath blanks the nodes above a leaf.
func (t *RatchetTree) blankPath(i LeafIndex) {
	for n := i.node(); n != t.root(); {
		n = n.parent()
		if t.slot(n).parent != nil {
			t.setParent(n, nil)
		}
	}
}

// addLeaf is addLeaves of one.
func (t *RatchetTree) addLeaf(l *LeafNode) LeafIndex { return t.addLeaves([]*LeafNode{l})[0] }

// addLeaves puts each leaf into the leftmost blank one, and extends the tree where there is none (RFC 9420, Section
// 12.1.1). It panics past maxLeafSlots members; callers ask hasRoom first. The indices ascend.
func (t *RatchetTree) addLeaves(leaves []*LeafNode) []LeafIndex {
	added := make([]LeafIndex, len(leaves))
	i := t.firstBlank
	for k, l := range leaves {
		for uint32(i) < t.slots && t.occupied(i) {
			i++
		}
		if uint32(i) == t.slots {
			if !t.hasRoom(1) {
				panic("mls: ratchet tree is full")
			}
			t.resize(2 * t.slots)
		}
		t.setLeaf(i, l)
		added[k] = i
		i++
	}
	t.firstBlank = i
	t.addUnmerged(t.root(), added)
	return added
}

// addUnmerged notes new leaves, which ascend, at the parents above them that are at or below n: each parent's list is
// written once, however many they are.
func (t *RatchetTree) addUnmerged(n NodeIndex, added []LeafIndex) {
	added = within(added, n)
	if n.isLeaf() || len(added) == 0 {
		return
	}
	if p := t.slot(n).parent; p != nil {
		c := *p
		c.UnmergedLeaves = slices.Concat(p.UnmergedLeaves, added)
		slices.Sort(c.UnmergedLeaves)
		c.UnmergedLeaves = slices.Compact(c.UnmergedLeaves)
		t.setParent(n, &c)
	}
	t.addUnmerged(n.left(), added)
	t.addUnmerged(n.right(), added)
}

// hasRoom says whether so many members can be added.
func (t *RatchetTree) hasRoom(n int) bool { return t.count+n <= maxLeafSlots }

// errFull is for a commit that adds a member to a full tree.
func errFull() error {
	return invalid("7.7", "tree of more than %d leaves", maxLeafSlots, ErrUnsupported)
}

// updateLeaf replaces a leaf and blanks the path above it (RFC 9420, Section 12.1.2).
func (t *RatchetTree) updateLeaf(i LeafIndex, l *LeafNode) {
	t.setLeaf(i, l)
	t.blankPath(i)
}

// removeLeaf blanks a leaf and the path above it, and truncates the tree (RFC 9420, Section 12.1.3).
func (t *RatchetTree) removeLeaf(i LeafIndex) {
	t.setLeaf(i, nil)
	t.blankPath(i)
	if slots := slotsFor(uint32(t.end)); slots != t.slots {
		t.resize(slots)
		t.firstBlank = min(t.firstBlank, LeafIndex(slots))
	}
}

// resolution returns the nodes that together cover a subtree (RFC 9420, Section 4.1.1).
func (t *RatchetTree) resolution(n NodeIndex) []NodeIndex { return t.appendResolution(nil, n) }

func (t *RatchetTree) appendResolution(out []NodeIndex, n NodeIndex) []NodeIndex {
	s := t.slot(n)
	switch {
	case s.leaf != nil:
		return append(out, n)
	case s.parent != nil:
		out = append(out, n)
		for _, l := range s.parent.UnmergedLeaves {
			out = append(out, l.node())
		}
		return out
	case n.isLeaf() || n.first() >= t.end:
		return out
	}
	return t.appendResolution(t.appendResolution(out, n.left()), n.right())
}

func (t *RatchetTree) resolutionEmpty(n NodeIndex) bool {
	if !t.blank(n) {
		return false
	}
	return n.isLeaf() || n.first() >= t.end || t.resolutionEmpty(n.left()) && t.resolutionEmpty(n.right())
}

// filteredDirectPath returns the nodes above a leaf whose child on the copath isn't empty, and those children, from
// the leaf up (RFC 9420, Section 4.1.2).
func (t *RatchetTree) filteredDirectPath(i LeafIndex) (path, copath []NodeIndex) {
	for n := i.node(); n != t.root(); n = n.parent() {
		if s := n.sibling(); !t.resolutionEmpty(s) {
			path = append(path, n.parent())
			copath = append(copath, s)
		}
	}
	return path, copath
}

// marshalNode writes optional<Node>.
//
//	struct {
//	    NodeType node_type;
//	    select (Node.node_type) {
//	        case leaf:   LeafNode leaf_node;
//	        case parent: ParentNode parent_node;
//	    };
//	} Node;
func (s treeSlot) marshalNode(w *codec.Writer) {
	w.Optional(s.leaf != nil || s.parent != nil)
	switch {
	case s.leaf != nil:
		w.Uint8(nodeTypeLeaf)
		w.Raw(s.leaf.encoded)
	case s.parent != nil:
		w.Uint8(nodeTypeParent)
		s.parent.MarshalMLS(w)
	}
}

func readNode(r *codec.Reader, n NodeIndex) (s treeSlot) {
	if !r.Optional() {
		return s
	}
	switch typ := r.Uint8(); {
	case typ == nodeTypeLeaf && n.isLeaf():
		a := codec.NewAliasing(r.Rest())
		new(LeafNode).UnmarshalMLS(a)
		if err := a.Err(); err != nil {
			r.Fail(err)
			return s
		}
		s.leaf = &packedLeaf{r.Raw(r.Len() - a.Len())}
	case typ == nodeTypeParent && !n.isLeaf():
		s.parent = new(ParentNode)
		s.parent.UnmarshalMLS(r)
	default:
		r.Failf("node %d of type %d", n, typ)
	}
	return s
}

// encodeNode returns a node for the store, nil if it is blank or beyond the tree.
func (t *RatchetTree) encodeNode(n NodeIndex) []byte {
	s := t.slot(n)
	if s.leaf == nil && s.parent == nil {
		return nil
	}
	return codec.Encode(s.marshalNode)
}

// decodeNode sets a node from the store. It doesn't count as changed.
func (t *RatchetTree) decodeNode(n NodeIndex, b []byte) error {
	if uint32(n) >= t.nodeWidth() {
		return fmt.Errorf("%w: node %d in a tree of %d leaves", ErrMalformed, n, t.slots)
	}
	r := codec.NewReader(b)
	s := readNode(r, n)
	if err := r.Finish(); err != nil {
		return fmt.Errorf("mls: node %d: %w", n, err)
	}
	t.load(n, s)
	return nil
}

// load sets a node of a tree whose hashes aren't computed.
func (t *RatchetTree) load(n NodeIndex, s treeSlot) {
	p, at := t.writable(n)
	if p.slots[at].leaf != nil {
		t.count--
	}
	if s.leaf != nil {
		t.count++
		t.end = max(t.end, n.leaf()+1)
	}
	p.slots[at] = s
}

// MarshalMLS implements codec.Marshaler: optional<Node> ratchet_tree<V> without the blank nodes at the right end.
func (t *RatchetTree) MarshalMLS(w *codec.Writer) {
	width := t.nodeWidth()
	for width > 0 && t.blank(NodeIndex(width-1)) {
		width--
	}
	w.Vector(func(w *codec.Writer) {
		for n := range NodeIndex(width) {
			t.slot(n).marshalNode(w)
		}
	})
}

// UnmarshalMLS implements codec.Unmarshaler. An empty tree, a blank node at the right end and more than 2^18 leaf
// slots are refused.
func (t *RatchetTree) UnmarshalMLS(r *codec.Reader) {
	var nodes []treeSlot
	r.Vector(func(r *codec.Reader) {
		if len(nodes) == 2*maxLeafSlots-1 {
			r.Failf("tree of more than %d leaves", maxLeafSlots)
			return
		}
		nodes = append(nodes, readNode(r, NodeIndex(len(nodes))))
	})
	if r.Err() != nil {
		return
	}
	if n := len(nodes); n == 0 || nodes[n-1].leaf == nil && nodes[n-1].parent == nil {
		r.Failf("tree of %d nodes is empty or ends with a blank node", n)
		return
	}
	t.slots, t.count, t.firstBlank, t.end, t.pages, t.dirty = 0, 0, 0, 0, [pageLevels][]*treePage{}, nil
	t.owner.Store(nil)
	t.resize(slotsFor(uint32(len(nodes)+2) / 2))
	for n, s := range nodes {
		if s.leaf != nil || s.parent != nil {
			t.load(NodeIndex(n), s)
		}
	}
}
