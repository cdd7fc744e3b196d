package mls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// A group's state is a set of key/value pairs. An operation writes what it changes into the caller's Batch, and
// nothing if it fails; the caller makes the batch durable before it lets a message out. The keys are at most 64 bytes
// and relative to the group: the caller puts its own prefix before them.
//
//	h  y               header: format, GroupContext without its extensions, confirmation tag, own leaf, epoch secrets
//	k  y               private keys of the ratchet tree
//	c  y               the staged own commit
//	g                  PublicGroup: the GroupInfo
//	t node             a node of the ratchet tree
//	p number  y        a pending proposal
//	x epoch            GroupContext extensions, by the epoch that brought them
//	s epoch key  z     an entry of an epoch's secret tree
//	e epoch  z         a past epoch
//	a node  y          a node of the exporter tree
//	l epoch leaf       a past epoch's leaf that the current tree doesn't have any more
//	j  y               how this client came in, and the external commit by which it will anew
//	r                  the ReInit that ended the group
//	y                  the key that seals a member's entries marked y
//	z epoch            the key that seals the epoch's entries marked z
//
// Nothing is sealed in the state of a PublicGroup or of a former member, which has no secrets, nor in format 1, which
// has neither y nor z; see seal.go.
const (
	keyHeader     = 'h'
	keyPrivate    = 'k'
	keyStaged     = 'c'
	keyGroupInfo  = 'g'
	keyNode       = 't'
	keyPending    = 'p'
	keyExtensions = 'x'
	keySecret     = 's'
	keyPast       = 'e'
	keyExport     = 'a'
	keyPastLeaf   = 'l'
	keyStateSeal  = 'y'
	keyEpochSeal  = 'z'
	keyReInit     = 'r'
	keyEntrance   = 'j'
)

// stateFormat is the version of the format above, the first field of the header. Format 1 differs in that nothing is
// sealed, there is no exporter tree, and past epochs have neither end nor authenticator.
const stateFormat = 2

func knownFormat(f uint16) bool { return f == 1 || f == stateFormat }

// The kinds of state, the header's second field.
const (
	kindGroup       = 1
	kindPublicGroup = 2
)

// Batch collects the changes of an operation, which have to become durable all or none, in the order of the operations.
// Keys are of 1 to 64 bytes and the same for every group: the caller puts its own prefix before them. A value is set as
// a whole; a message sent or received sets O(log n) bytes in a group of n members. Set and Delete may keep neither key
// nor value, nor change them, after they return. Erasable names the entries whose deletion has to be real.
type Batch interface {
	Set(key, value []byte)
	Delete(key []byte)
}

// errState says that stored state doesn't have the form that this package writes.
var errState = errors.New("mls: state is damaged")

func key1(kind byte) []byte { return []byte{kind} }

func key32(kind byte, n uint32) []byte { return binary.BigEndian.AppendUint32([]byte{kind}, n) }

func key64(kind byte, n uint64) []byte { return binary.BigEndian.AppendUint64([]byte{kind}, n) }

func keyLeaf(epoch uint64, i LeafIndex) []byte {
	return binary.BigEndian.AppendUint32(key64(keyPastLeaf, epoch), uint32(i))
}

// discard is the Batch of an operation whose changes nobody keeps.
type discard struct{}

func (discard) Set(_, _ []byte) {}
func (discard) Delete([]byte)   {}

func orDiscard(b Batch) Batch {
	if b == nil {
		return discard{}
	}
	return b
}

// header is the value of keyHeader.
type header struct {
	redact
	kind            uint8
	slots           uint32       // leaves of the tree, blank ones included
	context         GroupContext // without extensions
	extEpoch        uint64
	confirmationTag []byte

	// The rest is a Group's.
	own     LeafIndex
	active  bool
	secrets *epochSecrets
}

// MarshalMLS implements codec.Marshaler.
func (h *header) MarshalMLS(w *codec.Writer) {
	w.Uint16(stateFormat)
	w.Uint8(h.kind)
	w.Uint32(h.slots)
	ctx := h.context
	ctx.Extensions = nil
	ctx.MarshalMLS(w)
	w.Uint64(h.extEpoch)
	w.Opaque(h.confirmationTag)
	if h.kind == kindGroup {
		w.Uint32(uint32(h.own))
		w.Optional(h.active)
		if h.active {
			h.secrets.MarshalMLS(w)
		}
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (h *header) UnmarshalMLS(r *codec.Reader) {
	r.Uint16() // the format, which the sealer has looked at
	h.kind = r.Uint8()
	h.slots = r.Uint32()
	h.context.UnmarshalMLS(r)
	h.extEpoch = r.Uint64()
	h.confirmationTag = r.Opaque()
	if h.kind == kindGroup {
		h.own = LeafIndex(r.Uint32())
		if h.active = r.Optional(); h.active {
			h.secrets = new(epochSecrets)
			h.secrets.UnmarshalMLS(r)
		}
	}
}

// saveNodes writes the nodes of the tree that changed since the tree it was cloned from.
func saveNodes(b Batch, t *RatchetTree) {
	for _, n := range t.dirtyNodes() {
		if enc := t.encodeNode(n); enc != nil {
			b.Set(key32(keyNode, uint32(n)), enc)
		} else {
			b.Delete(key32(keyNode, uint32(n)))
		}
	}
	t.clearDirty()
}

// saveTree writes all nodes.
func saveTree(b Batch, t *RatchetTree) {
	for n := NodeIndex(0); uint32(n) < t.nodeWidth(); n++ {
		if enc := t.encodeNode(n); enc != nil {
			b.Set(key32(keyNode, uint32(n)), enc)
		}
	}
	t.clearDirty()
}

func (p *publicState) saveExtensions(b Batch) {
	b.Set(key64(keyExtensions, p.extEpoch), codec.Marshal(p.context.Extensions))
}

func (p *publicState) saveReInit(b Batch) {
	if p.reinit != nil {
		b.Set(key1(keyReInit), codec.Marshal(p.reinit))
	}
}

func (p *publicState) savePending(b Batch, e *pendingEntry) {
	b.Set(key32(keyPending, e.number), codec.Marshal(e))
}

// addPending notes a proposal and writes it.
func (p *publicState) addPending(b Batch, e *pendingEntry) {
	e.number = p.next
	p.next++
	p.pending = append(p.pending, e)
	p.savePending(b, e)
}

// entries is a group's state as read from the store, sorted into kinds.
type entries struct {
	header     *header
	private    []byte
	staged     []byte
	entrance   []byte
	groupInfo  []byte
	nodes      map[NodeIndex][]byte
	pending    []*pendingEntry
	extensions map[uint64]Extensions
	secrets    map[uint64][][2][]byte
	past       map[uint64][]byte
	leaves     map[uint64]map[LeafIndex]*LeafNode // nil: blank
	exports    *exporterTree
	reinit     *ReInit
	stateSeal  *sealer
	epochSeals map[uint64]*sealer
}

type entry struct{ key, value []byte }

func readEntries(state iter.Seq2[[]byte, []byte]) (*entries, error) {
	e := &entries{
		nodes: make(map[NodeIndex][]byte), extensions: make(map[uint64]Extensions), secrets: make(map[uint64][][2][]byte),
		past: make(map[uint64][]byte), leaves: make(map[uint64]map[LeafIndex]*LeafNode), epochSeals: make(map[uint64]*sealer),
	}
	var sealed []entry // until the keys are known
	for k, v := range state {
		if len(k) == 0 {
			return nil, fmt.Errorf("%w: empty key", errState)
		}
		if want, ok := keyLength[k[0]]; !ok || len(k)-1 < want || len(k)-1 > want && k[0] != keySecret {
			return nil, fmt.Errorf("mls: load state: entry %x: %w: key", k, errState)
		}
		switch k[0] {
		case keyHeader, keyPrivate, keyStaged, keyPending, keySecret, keyPast, keyExport, keyEntrance:
			sealed = append(sealed, entry{slices.Clone(k), slices.Clone(v)})
			continue
		}
		if err := e.add(k[0], k[1:], v); err != nil {
			return nil, fmt.Errorf("mls: load state: entry %x: %w", k, err)
		}
	}
	if err := e.unseal(sealed); err != nil {
		return nil, err
	}
	if e.header == nil {
		return nil, fmt.Errorf("%w: no header", errState)
	}
	slices.SortFunc(e.pending, func(a, b *pendingEntry) int { return int(int64(a.number) - int64(b.number)) })
	return e, nil
}

// keyLength is how many bytes follow the first one in the keys of a kind; at least that many for the secret tree's.
var keyLength = map[byte]int{keyHeader: 0, keyPrivate: 0, keyStaged: 0, keyGroupInfo: 0, keyNode: 4, keyPending: 4,
	keyExtensions: 8, keySecret: 8, keyPast: 8, keyExport: 4, keyPastLeaf: 12, keyStateSeal: 0, keyEpochSeal: 8,
	keyReInit: 0, keyEntrance: 0}

func (e *entries) add(kind byte, k, v []byte) error {
	var err error
	switch kind {
	case keyHeader:
		e.header = new(header)
		return codec.Unmarshal(v, e.header)
	case keyPrivate:
		e.private = slices.Clone(v)
	case keyStaged:
		e.staged = slices.Clone(v)
	case keyEntrance:
		e.entrance = slices.Clone(v)
	case keyGroupInfo:
		e.groupInfo = slices.Clone(v)
	case keyNode:
		e.nodes[NodeIndex(binary.BigEndian.Uint32(k))] = slices.Clone(v)
	case keyPending:
		p := &pendingEntry{number: binary.BigEndian.Uint32(k)}
		e.pending = append(e.pending, p)
		return codec.Unmarshal(v, p)
	case keyExtensions:
		var x Extensions
		if err := codec.Unmarshal(v, &x); err != nil {
			return err
		}
		e.extensions[binary.BigEndian.Uint64(k)] = x
	case keySecret:
		epoch := binary.BigEndian.Uint64(k)
		e.secrets[epoch] = append(e.secrets[epoch], [2][]byte{slices.Clone(k[8:]), slices.Clone(v)})
	case keyPast:
		e.past[binary.BigEndian.Uint64(k)] = slices.Clone(v)
	case keyExport:
		return e.addExport(k, v)
	case keyPastLeaf:
		epoch, i := binary.BigEndian.Uint64(k), LeafIndex(binary.BigEndian.Uint32(k[8:]))
		if e.leaves[epoch] == nil {
			e.leaves[epoch] = make(map[LeafIndex]*LeafNode)
		}
		var leaf *LeafNode
		if len(v) > 0 {
			leaf = new(LeafNode)
			if err := codec.Unmarshal(v, leaf); err != nil {
				return err
			}
		}
		e.leaves[epoch][i] = leaf
	case keyReInit:
		e.reinit = new(ReInit)
		return codec.Unmarshal(v, e.reinit)
	case keyStateSeal:
		e.stateSeal, err = sealerOf(slices.Clone(v))
	case keyEpochSeal:
		e.epochSeals[binary.BigEndian.Uint64(k)], err = sealerOf(slices.Clone(v))
	}
	return err
}

// publicState rebuilds the public part.
func (e *entries) publicState() (publicState, error) {
	h := e.header
	ext, ok := e.extensions[h.extEpoch]
	if !ok {
		return publicState{}, fmt.Errorf("%w: no extensions of epoch %d", errState, h.extEpoch)
	}
	if !h.context.CipherSuite.Supported() {
		return publicState{}, fmt.Errorf("mls: load state: %w: %v", ErrUnsupported, h.context.CipherSuite)
	}
	ctx := h.context
	ctx.Extensions = ext
	tree, err := emptyRatchetTree(h.slots)
	if err != nil {
		return publicState{}, fmt.Errorf("mls: load state: tree: %w", err)
	}
	if err := tree.decodeNodes(e.nodes); err != nil {
		return publicState{}, fmt.Errorf("mls: load state: %w", err)
	}
	if !bytes.Equal(tree.Hash(ctx.CipherSuite), ctx.TreeHash) {
		return publicState{}, fmt.Errorf("%w: the tree is not that of the epoch", errState)
	}
	p := newPublicState(ctx, tree, h.confirmationTag)
	p.extEpoch, p.pending, p.reinit = h.extEpoch, e.pending, e.reinit
	if n := len(e.pending); n > 0 {
		p.next = e.pending[n-1].number + 1
	}
	return p, nil
}

func (e *entries) secretTree(cs CipherSuite, epoch uint64, slots uint32) (*secretTree, error) {
	st, err := loadSecretTree(cs, slots, func(yield func(k, v []byte) bool) {
		for _, kv := range e.secrets[epoch] {
			if !yield(kv[0], kv[1]) {
				return
			}
		}
	})
	if err != nil {
		return nil, err
	}
	st.sealer = e.epochSeals[epoch]
	return st, nil
}

// saveSecrets writes what changed in an epoch's secret tree.
func saveSecrets(b Batch, epoch uint64, st *secretTree) {
	prefix := key64(keySecret, epoch)
	b = st.sealer.seal(b)
	st.drain(
		func(k, v []byte) { b.Set(append(slices.Clip(prefix), k...), v) },
		func(k []byte) { b.Delete(append(slices.Clip(prefix), k...)) },
	)
}

// deleteSecrets deletes an epoch's secret tree and the key that seals it.
func deleteSecrets(b Batch, epoch uint64, st *secretTree) {
	prefix := key64(keySecret, epoch)
	for _, k := range st.keys() {
		b.Delete(append(slices.Clip(prefix), k...))
	}
	st.erase()
	if st.sealer != nil {
		b.Delete(key64(keyEpochSeal, epoch))
		st.sealer.erase()
	}
}
