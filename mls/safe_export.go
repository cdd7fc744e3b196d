package mls

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// Exported secrets (draft-ietf-mls-extensions, Section 4.4): one for each component and epoch, deleted when it was
// taken.

// exportLeaves is the number of leaves of the exporter tree, one for each ComponentID.
const exportLeaves = 1 << 16

// SafeExport returns the secret of this epoch for a component, the same for all members, HashSize bytes long. It is
// deleted by that, in the Batch too: a second call fails with ErrExported. An epoch that was saved in format 1 has no
// such secrets; for it the error is ErrUnsupported. For a former member it is ErrRemoved.
func (g *Group) SafeExport(b Batch, id ComponentID) ([]byte, error) {
	g.op.Lock()
	defer g.done()
	if !g.active {
		return nil, fmt.Errorf("mls: safe export: %w", ErrRemoved)
	}
	if g.exports == nil {
		return nil, fmt.Errorf("mls: safe export: %w: the epoch was saved without exported secrets", ErrUnsupported)
	}
	s, err := g.exports.take(g.suite(), id, g.sealer.seal(orDiscard(b)))
	if err != nil {
		return nil, fmt.Errorf("mls: safe export: %w", err)
	}
	return s, nil
}

// exporterTree holds the secrets of the exporter tree that aren't used up yet.
type exporterTree struct {
	redact
	nodes map[NodeIndex]secret
}

// newExporterTree starts the tree of an epoch; without a root there is none.
func newExporterTree(root secret) *exporterTree {
	if root == nil {
		return nil
	}
	return &exporterTree{nodes: map[NodeIndex]secret{rootOf(exportLeaves): root}}
}

// take returns a component's secret and deletes all that leads to it.
func (t *exporterTree) take(cs CipherSuite, id ComponentID, b Batch) (secret, error) {
	n := LeafIndex(id).node()
	for t.nodes[n] == nil {
		if n == rootOf(exportLeaves) {
			return nil, fmt.Errorf("%w: component %d", ErrExported, id)
		}
		n = n.parent()
	}
	s := t.nodes[n]
	delete(t.nodes, n)
	b.Delete(key32(keyExport, uint32(n)))
	for !n.isLeaf() {
		left := cs.expandWithLabel(s, "tree", []byte("left"), cs.HashSize())
		right := cs.expandWithLabel(s, "tree", []byte("right"), cs.HashSize())
		s.erase()
		other, keep := n.right(), right
		if LeafIndex(id).node() < n {
			n, s = n.left(), left
		} else {
			other, keep = n.left(), left
			n, s = n.right(), right
		}
		t.nodes[other] = keep
		b.Set(key32(keyExport, uint32(other)), keep)
	}
	return s, nil
}

// save writes the whole tree; nil has nothing to write.
func (t *exporterTree) save(b Batch) {
	if t == nil {
		return
	}
	for _, n := range slices.Sorted(maps.Keys(t.nodes)) {
		b.Set(key32(keyExport, uint32(n)), t.nodes[n])
	}
}

// drop deletes the tree when its epoch ends.
func (t *exporterTree) drop(b Batch) {
	if t == nil {
		return
	}
	for _, n := range slices.Sorted(maps.Keys(t.nodes)) {
		b.Delete(key32(keyExport, uint32(n)))
		t.nodes[n].erase()
	}
	clear(t.nodes)
}

// addExport reads an entry of the tree.
func (e *entries) addExport(k, v []byte) error {
	n := NodeIndex(binary.BigEndian.Uint32(k))
	if n > 2*(exportLeaves-1) {
		return fmt.Errorf("%w: node %d of the exporter tree", errState, n)
	}
	if e.exports == nil {
		e.exports = &exporterTree{nodes: make(map[NodeIndex]secret)}
	}
	e.exports.nodes[n] = slices.Clone(v)
	return nil
}
