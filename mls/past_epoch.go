package mls

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"maps"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// pastEpoch is what is kept of an epoch after a commit ended it: enough to decrypt late messages, to know its
// resumption key, and to recognise the commit that ended it.
type pastEpoch struct {
	redact
	context    GroupContext
	rules      *contextRules // made when first needed
	extEpoch   uint64
	slots      uint32
	senderData secret
	resumption secret
	commit     [sha256.Size]byte // SHA-256 of the MLSMessage that ended the epoch
	ended      uint64            // seconds since 1970
	undated    bool              // its end isn't in the store, which is of format 1
	// authenticator is the SHA-256 of the epoch authenticator, nil if the epoch was saved in format 1.
	authenticator []byte
	tree          *secretTree
	// replaced has the epoch's leaves that the commit which ended it changed; nil if there was none. What it doesn't
	// have is in a later epoch's, or in the current tree.
	replaced map[LeafIndex]*LeafNode
}

// MarshalMLS implements codec.Marshaler, for the store.
func (e *pastEpoch) MarshalMLS(w *codec.Writer) {
	ctx := e.context
	ctx.Extensions = nil
	ctx.MarshalMLS(w)
	w.Uint64(e.extEpoch)
	w.Uint32(e.slots)
	w.Opaque(e.senderData)
	w.Opaque(e.resumption)
	w.Raw(e.commit[:])
	if !e.undated {
		w.Uint64(e.ended)
		w.Opaque(e.authenticator)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *pastEpoch) UnmarshalMLS(r *codec.Reader) {
	e.context.UnmarshalMLS(r)
	e.extEpoch = r.Uint64()
	e.slots = r.Uint32()
	e.senderData = r.Opaque()
	e.resumption = r.Opaque()
	copy(e.commit[:], r.Raw(sha256.Size))
	if e.undated = r.Len() == 0; !e.undated {
		e.ended = r.Uint64()
		if b := r.Opaque(); len(b) > 0 {
			e.authenticator = b
		}
	}
}

// retire makes the current epoch a past one, before the state moves on to next, and forgets the oldest.
func (g *Group) retire(b Batch, next *evolution, commit [sha256.Size]byte) {
	limit := g.cfg.pastEpochs()
	e := &pastEpoch{
		context: g.state.context, rules: g.state.rules, extEpoch: g.state.extEpoch, slots: g.state.tree.Size(),
		senderData: slices.Clone(g.secrets.senderData), resumption: slices.Clone(g.secrets.resumption), commit: commit,
		tree: g.messages, replaced: make(map[LeafIndex]*LeafNode), ended: uint64(g.cfg.now().Unix()),
		authenticator: authenticatorHash(g.secrets.authenticator),
	}
	if limit > 0 {
		epoch := e.context.Epoch
		for _, n := range next.tree.dirtyNodes() {
			if !n.isLeaf() || uint32(n.leaf()) >= e.slots {
				continue
			}
			i := n.leaf()
			old := g.state.tree.Leaf(i)
			e.replaced[i] = old
			var enc []byte
			if old != nil {
				enc = codec.Marshal(old)
			}
			b.Set(keyLeaf(epoch, i), enc)
		}
		g.savePast(b, e)
		g.past = append(g.past, e)
	} else {
		deleteSecrets(b, e.context.Epoch, e.tree)
	}
	g.forgetOldest(b, limit)
}

// forgetOldest forgets past epochs that are more than so many, and those that are too old.
func (g *Group) forgetOldest(b Batch, limit int) {
	for len(g.past) > 0 && (len(g.past) > limit || g.cfg.expired(g.past[0].ended)) {
		g.forget(b, g.past[0])
		g.past = slices.Clone(g.past[1:])
	}
}

// Expire forgets the past epochs that are older than MaxPastAge, with what they have of keys. Every change of epoch and
// every message received does so too: this is for clients that wait. What is too old isn't used before either.
func (g *Group) Expire(b Batch) {
	g.op.Lock()
	defer g.done()
	g.expire(orDiscard(b))
}

func (g *Group) expire(b Batch) {
	for _, e := range g.past {
		if e.undated {
			e.undated = false
			g.savePast(b, e)
		}
	}
	if len(g.past) > 0 && g.cfg.expired(g.past[0].ended) {
		before := g.extensionEpochs()
		g.forgetOldest(b, len(g.past))
		g.dropExtensions(b, before)
	}
}

// dropExtensions deletes GroupContext extensions that only epochs had which are forgotten since.
func (g *Group) dropExtensions(b Batch, before map[uint64]bool) {
	after := g.extensionEpochs()
	for epoch := range before {
		if !after[epoch] {
			b.Delete(key64(keyExtensions, epoch))
		}
	}
}

// savePast writes what is kept of a past epoch besides its secret tree and leaves.
func (g *Group) savePast(b Batch, e *pastEpoch) {
	e.tree.sealer.seal(b).Set(key64(keyPast, e.context.Epoch), codec.Marshal(e))
}

// forget deletes a past epoch from the store, except for its GroupContext extensions, which others may share.
func (g *Group) forget(b Batch, e *pastEpoch) {
	epoch := e.context.Epoch
	deleteSecrets(b, epoch, e.tree)
	e.senderData.erase()
	for _, i := range slices.Sorted(maps.Keys(e.replaced)) {
		b.Delete(keyLeaf(epoch, i))
	}
	b.Delete(key64(keyPast, epoch))
}

// extensionEpochs are the epochs whose GroupContext extensions the store must have.
func (g *Group) extensionEpochs() map[uint64]bool {
	m := map[uint64]bool{g.state.extEpoch: true}
	for _, e := range g.past {
		m[e.extEpoch] = true
	}
	return m
}

func (g *Group) pastEpoch(epoch uint64) *pastEpoch {
	return findPast(&g.cfg, g.past, epoch)
}

// findPast returns an epoch that is kept and not too old, nil if there is none.
func findPast(c *Config, past []*pastEpoch, epoch uint64) *pastEpoch {
	i := slices.IndexFunc(past, func(e *pastEpoch) bool { return e.context.Epoch == epoch })
	if i < 0 || c.expired(past[i].ended) {
		return nil
	}
	return past[i]
}

// leafAt returns a leaf as it was in a past epoch.
func (g *Group) leafAt(e *pastEpoch, i LeafIndex) *LeafNode {
	if uint32(i) >= e.slots {
		return nil
	}
	for _, p := range g.past {
		if p.context.Epoch < e.context.Epoch {
			continue
		}
		if l, ok := p.replaced[i]; ok {
			return l
		}
	}
	return g.state.tree.Leaf(i)
}

func (e *pastEpoch) contextRules() (*contextRules, error) {
	if e.rules == nil {
		cr, err := parseContextRules(e.context.Extensions)
		if err != nil {
			return nil, err
		}
		e.rules = cr
	}
	return e.rules, nil
}

// endedBy says whether the message with this hash is the commit that ended the epoch.
func (e *pastEpoch) endedBy(hash [sha256.Size]byte) bool {
	return subtle.ConstantTimeCompare(e.commit[:], hash[:]) == 1
}

// loadPast rebuilds the past epochs.
func (g *Group) loadPast(in *entries) error {
	for _, epoch := range slices.Sorted(maps.Keys(in.past)) {
		e := &pastEpoch{replaced: in.leaves[epoch]}
		if err := codec.Unmarshal(in.past[epoch], e); err != nil {
			return fmt.Errorf("mls: load state: epoch %d: %w", epoch, err)
		}
		ext, ok := in.extensions[e.extEpoch]
		if !ok || e.context.Epoch != epoch || e.context.CipherSuite != g.suite() {
			return fmt.Errorf("%w: epoch %d", errState, epoch)
		}
		e.context.Extensions = ext
		if e.undated {
			e.ended = uint64(g.cfg.now().Unix())
		}
		if e.replaced == nil {
			e.replaced = make(map[LeafIndex]*LeafNode)
		}
		var err error
		if e.tree, err = in.secretTree(e.context.CipherSuite, epoch, e.slots); err != nil {
			return fmt.Errorf("mls: load state: secrets of epoch %d: %w", epoch, err)
		}
		g.past = append(g.past, e)
	}
	return nil
}
