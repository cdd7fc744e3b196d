package mls

import (
	"fmt"
	"iter"
	"math"
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
func (p *ParentNode) MarshalMLS(w *codec.Writer) {
	w.Opaque(p.EncryptionKey)
	w.Opaque(p.ParentHash)
	w.Length(4 * len(p.UnmergedLeaves))
	for _, l := range p.UnmergedLeaves {
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

// packedNode is a node of the tree as it is encoded, a LeafNode at an even index and a ParentNode at an odd one, which
// takes half of the memory; empty if the node is blank. It isn't changed.
type packedNode []byte

func packLeaf(l *LeafNode) packedNode {
	if l == nil {
		return nil
	}
	return codec.Marshal(l)
}

func packParent(p *ParentNode) packedNode {
	if p == nil {
		return nil
	}
	return codec.Marshal(p)
}

// leaf returns a LeafNode whose fields are parts of the encoding, nil if the node is blank.
func (p packedNode) leaf() *LeafNode {
	if len(p) == 0 {
		return nil
	}
	l := new(LeafNode)
	l.UnmarshalMLS(codec.NewAliasing(p)) // doesn't fail: it was decoded or encoded before
	return l
}

// parent is leaf for a ParentNode.
func (p packedNode) parent() *ParentNode {
	if len(p) == 0 {
		return nil
	}
	n := new(ParentNode)
	n.UnmarshalMLS(codec.NewAliasing(p))
	return n
}

// keys returns a leaf's encryption and signature keys; of a parent the first one only.
func (p packedNode) keys() (encryption HPKEPublicKey, signature []byte) {
	r := codec.NewReader(p)
	return r.View(), r.View()
}

// treeOwner marks the pages that a tree may write to.
type treeOwner struct{ _ byte }

const (
	pageBits = 5
	pageSize = 1 << pageBits
)

// treePage has pageSize nodes, and the tree hashes of those that are parents: every second one.
type treePage struct {
	owner   *treeOwner
	encoded []byte           // the nodes, one after the other; it isn't changed, only replaced
	ends    [pageSize]uint32 // of each node in encoded
	hashed  uint32           // which nodes' hashes are known: nothing in their subtrees changed since they were computed
	hashes  []byte           // one after the other
}

func (p *treePage) node(at uint32) packedNode {
	start := uint32(0)
	if at > 0 {
		start = p.ends[at-1]
	}
	return packedNode(p.encoded[start:p.ends[at]:p.ends[at]])
}

// set replaces a node.
func (p *treePage) set(at uint32, n packedNode) {
	old := p.node(at)
	start := p.ends[at] - uint32(len(old))
	p.encoded = slices.Concat(p.encoded[:start], n, p.encoded[p.ends[at]:])
	for i := at; i < pageSize; i++ {
		p.ends[i] += uint32(len(n)) - uint32(len(old))
	}
}

// setSome replaces those nodes whose bits are set.
func (p *treePage) setSome(nodes *[pageSize]packedNode, set uint32) {
	old := *p
	size := 0
	for at := range uint32(pageSize) {
		if set&(1<<at) == 0 {
			nodes[at] = old.node(at)
		}
		size += len(nodes[at])
	}
	p.encoded = make([]byte, 0, size)
	for at, n := range nodes {
		p.encoded = append(p.encoded, n...)
		p.ends[at] = uint32(len(p.encoded))
	}
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

// nodeAt is the inverse of place, out of any tree for a page's last slot.
func nodeAt(level int, page, slot uint32) NodeIndex {
	if slot == pageSize-1 {
		return math.MaxUint32
	}
	n := page<<pageBits | slot
	for range level {
		n = n<<pageBits | (pageSize - 1)
	}
	return NodeIndex(n)
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

// emptyRatchetTree returns a blank tree to be filled by decodeNodes.
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

// node returns a node, empty if it is blank or beyond the tree.
func (t *RatchetTree) node(n NodeIndex) packedNode {
	if uint32(n) >= t.nodeWidth() {
		return nil
	}
	level, page, at := place(n)
	if p := t.pages[level][page]; p != nil {
		return p.node(at)
	}
	return nil
}

// parentNode returns a parent, nil if it is blank.
func (t *RatchetTree) parentNode(n NodeIndex) *ParentNode { return t.node(n).parent() }

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
		p = &treePage{owner: owner, encoded: p.encoded, ends: p.ends, hashed: p.hashed, hashes: slices.Clone(p.hashes)}
	default:
		return p, at
	}
	t.pages[level][page] = p
	return p, at
}

// hashPlace is where a parent's hash is in its page. At level 0 leaves and parents take turns; above all are parents.
func hashPlace(level int, at uint32) uint32 {
	if level == 0 {
		return at / 2
	}
	return at
}

// knownHash returns a parent's tree hash, nil if something in the subtree changed since it was computed. It is valid until
// the node's hash changes. Hashes of leaves aren't kept: those of their parents are.
func (t *RatchetTree) knownHash(n NodeIndex) []byte {
	level, page, at := place(n)
	p := t.pages[level][page]
	if n.isLeaf() || p == nil || p.hashed&(1<<at) == 0 {
		return nil
	}
	size := uint32(len(p.hashes)) / (hashPlace(level, pageSize-1) + 1)
	return p.hashes[hashPlace(level, at)*size:][:size:size]
}

// setHash notes a parent's tree hash and returns it as knownHash does.
func (t *RatchetTree) setHash(n NodeIndex, hash []byte) []byte {
	p, at := t.writable(n)
	if p.hashes == nil {
		level, _, _ := place(n)
		p.hashes = make([]byte, int(hashPlace(level, pageSize-1)+1)*len(hash))
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
	if n.isLeaf() && n != t.root() {
		n = n.parent()
	}
	for t.knownHash(n) != nil { // a parent whose hash isn't known has no ancestor whose hash is
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
			if !t.blank(n) {
				t.touch(n)
				p, at := t.writable(n)
				p.set(at, nil)
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
	return t.node(i.node()).leaf()
}

// occupied says whether there is a member at the leaf.
func (t *RatchetTree) occupied(i LeafIndex) bool {
	return uint32(i) < t.slots && !t.blank(i.node())
}

// signatureKey returns a member's signature key, nil if there is none.
func (t *RatchetTree) signatureKey(i LeafIndex) []byte {
	if !t.occupied(i) {
		return nil
	}
	_, key := t.node(i.node()).keys()
	return key
}

// Leaves returns the members from left to right. The leaves mustn't be changed.
func (t *RatchetTree) Leaves() iter.Seq2[LeafIndex, *LeafNode] {
	return func(yield func(LeafIndex, *LeafNode) bool) {
		for i := range LeafIndex(t.slots) {
			if l := t.node(i.node()).leaf(); l != nil && !yield(i, l) {
				return
			}
		}
	}
}

func (t *RatchetTree) blank(n NodeIndex) bool {
	return len(t.node(n)) == 0
}

// publicKey returns a node's encryption key, nil if it is blank.
func (t *RatchetTree) publicKey(n NodeIndex) HPKEPublicKey {
	if t.blank(n) {
		return nil
	}
	key, _ := t.node(n).keys()
	return key
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
	p.set(at, packLeaf(l))
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
	page.set(at, packParent(p))
	t.touch(n)
}

// blankPath blanks the nodes above a leaf.
func (t *RatchetTree) blankPath(i LeafIndex) { t.setParents(i, nil) }

// setParents sets the nodes above a leaf that are in parents and blanks the others. Each page is written once.
func (t *RatchetTree) setParents(i LeafIndex, parents map[NodeIndex]packedNode) {
	var (
		page  *treePage
		nodes [pageSize]packedNode
		set   uint32 // which of them are to be written
	)
	write := func() {
		if set != 0 {
			page.setSome(&nodes, set)
			set = 0
		}
	}
	for n := i.node(); n != t.root(); {
		n = n.parent()
		if len(parents[n]) == 0 && t.blank(n) {
			continue
		}
		p, at := t.writable(n)
		if p != page {
			write()
			page = p
		}
		nodes[at] = parents[n]
		set |= 1 << at
		t.touch(n)
	}
	write()
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
	if p := t.parentNode(n); p != nil {
		p.UnmergedLeaves = append(p.UnmergedLeaves, added...)
		slices.Sort(p.UnmergedLeaves)
		p.UnmergedLeaves = slices.Compact(p.UnmergedLeaves)
		t.setParent(n, p)
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
	switch node := t.node(n); {
	case len(node) > 0 && n.isLeaf():
		return append(out, n)
	case len(node) > 0:
		out = append(out, n)
		for _, l := range node.parent().UnmergedLeaves {
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
func (p packedNode) marshalNode(w *codec.Writer, n NodeIndex) {
	w.Optional(len(p) > 0)
	if len(p) == 0 {
		return
	}
	if n.isLeaf() {
		w.Uint8(nodeTypeLeaf)
	} else {
		w.Uint8(nodeTypeParent)
	}
	w.Raw(p)
}

// viewNode reads an optional<Node>. What it returns is part of what r reads.
func viewNode(r *codec.Reader, n NodeIndex) packedNode {
	if !r.Optional() {
		return nil
	}
	var node codec.Unmarshaler
	switch typ := r.Uint8(); {
	case typ == nodeTypeLeaf && n.isLeaf():
		node = new(LeafNode)
	case typ == nodeTypeParent && !n.isLeaf():
		node = new(ParentNode)
	default:
		r.Failf("node %d of type %d", n, typ)
		return nil
	}
	a := codec.NewAliasing(r.Rest())
	node.UnmarshalMLS(a)
	if err := a.Err(); err != nil {
		r.Fail(err)
		return nil
	}
	return r.ViewRaw(r.Len() - a.Len())
}

// encodeNode returns a node for the store, nil if it is blank or beyond the tree.
func (t *RatchetTree) encodeNode(n NodeIndex) []byte {
	if t.blank(n) {
		return nil
	}
	return codec.Encode(func(w *codec.Writer) { t.node(n).marshalNode(w, n) })
}

// decodeNodes sets the nodes of a blank tree from the store. They don't count as changed.
func (t *RatchetTree) decodeNodes(stored map[NodeIndex][]byte) error {
	nodes := make([]packedNode, t.nodeWidth())
	for n, b := range stored {
		if uint32(n) >= t.nodeWidth() {
			return fmt.Errorf("%w: node %d in a tree of %d leaves", ErrMalformed, n, t.slots)
		}
		r := codec.NewReader(b)
		nodes[n] = viewNode(r, n)
		if err := r.Finish(); err != nil {
			return fmt.Errorf("mls: node %d: %w", n, err)
		}
	}
	t.fill(nodes)
	return nil
}

// fill sets the nodes of a blank tree, copies of those given.
func (t *RatchetTree) fill(nodes []packedNode) {
	sizes := make(map[*treePage]int)
	for n, node := range nodes {
		if len(node) == 0 {
			continue
		}
		p, _ := t.writable(NodeIndex(n))
		sizes[p] += len(node)
		if NodeIndex(n).isLeaf() {
			t.count++
			t.end = max(t.end, NodeIndex(n).leaf()+1)
		}
	}
	for level, pages := range t.pages {
		for i, p := range pages {
			if p == nil {
				continue
			}
			p.encoded = make([]byte, 0, sizes[p])
			for at := range uint32(pageSize) {
				if n := nodeAt(level, uint32(i), at); uint32(n) < uint32(len(nodes)) {
					p.encoded = append(p.encoded, nodes[n]...)
				}
				p.ends[at] = uint32(len(p.encoded))
			}
		}
	}
}

// MarshalMLS implements codec.Marshaler: optional<Node> ratchet_tree<V> without the blank nodes at the right end.
func (t *RatchetTree) MarshalMLS(w *codec.Writer) {
	width := t.nodeWidth()
	for width > 0 && t.blank(NodeIndex(width-1)) {
		width--
	}
	w.Vector(func(w *codec.Writer) {
		for n := range NodeIndex(width) {
			t.node(n).marshalNode(w, n)
		}
	})
}

// UnmarshalMLS implements codec.Unmarshaler. An empty tree, a blank node at the right end and more than 2^18 leaf
// slots are refused.
func (t *RatchetTree) UnmarshalMLS(r *codec.Reader) {
	var nodes []packedNode
	r.Vector(func(r *codec.Reader) {
		if len(nodes) == 2*maxLeafSlots-1 {
			r.Failf("tree of more than %d leaves", maxLeafSlots)
			return
		}
		nodes = append(nodes, viewNode(r, NodeIndex(len(nodes))))
	})
	if r.Err() != nil {
		return
	}
	if n := len(nodes); n == 0 || len(nodes[n-1]) == 0 {
		r.Failf("tree of %d nodes is empty or ends with a blank node", n)
		return
	}
	t.slots, t.count, t.firstBlank, t.end, t.pages, t.dirty = 0, 0, 0, 0, [pageLevels][]*treePage{}, nil
	t.owner.Store(nil)
	t.resize(slotsFor(uint32(len(nodes)+2) / 2))
	t.fill(nodes)
}
