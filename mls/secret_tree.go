package mls

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"slices"
)

// The secret tree (RFC 9420, Section 9): from an epoch's encryption secret to the key of each message.

// ratchetKind tells the two ratchets of a leaf apart.
type ratchetKind uint8

const (
	handshakeRatchet   ratchetKind = 0
	applicationRatchet ratchetKind = 1
)

func (k ratchetKind) label() string {
	if k == handshakeRatchet {
		return "handshake"
	}
	return "application"
}

// ratchetLimits bound what a message can make a receiver do (RFC 9420, Section 15.3).
type ratchetLimits struct {
	maxForward uint32 // how far ahead of the ratchet a generation may be
	maxSkipped int    // how many keys of one ratchet are kept for messages that come late; the oldest go first
}

type ratchetID struct {
	leaf LeafIndex
	kind ratchetKind
}

// messageKey is a key that was skipped.
type messageKey struct {
	redact
	generation uint32
	key, nonce secret
}

// ratchet is a sender's hash ratchet (RFC 9420, Section 9.1).
type ratchet struct {
	redact
	generation uint32 // the next one
	secret     secret
	exhausted  bool         // generation 2^32-1 was used
	skipped    []messageKey // ascending
}

// secretTree holds the secrets that aren't used up yet. Nodes are expanded when a leaf below them is first needed, and
// deleted in the same step.
type secretTree struct {
	redact
	cs       CipherSuite
	slots    uint32
	nodes    map[NodeIndex]secret
	ratchets map[ratchetID]*ratchet
	version  uint64 // counts the changes, so that a step knows whether it was computed from this state
	dirty    map[string]struct{}
	sealer   *sealer // seals the stored form; nil in a state of format 1
}

// newSecretTree starts a secret tree for a ratchet tree of so many leaf slots.
func newSecretTree(cs CipherSuite, slots uint32, encryption secret) *secretTree {
	s := &secretTree{cs: cs, slots: slots, nodes: map[NodeIndex]secret{rootOf(slots): slices.Clone(encryption)},
		ratchets: make(map[ratchetID]*ratchet), dirty: make(map[string]struct{})}
	s.dirty[nodeKey(rootOf(slots))] = struct{}{}
	return s
}

// ratchetStep is one key and the state in which the tree is once the key is used.
type ratchetStep struct {
	redact
	leaf       LeafIndex
	kind       ratchetKind
	generation uint32
	key, nonce secret

	version  uint64
	expanded map[NodeIndex]secret // new nodes
	used     []NodeIndex          // nodes to delete
	fresh    map[ratchetKind]*ratchet
	next     *ratchet // the ratchet after the step
}

// next returns the next key of a ratchet for sending and deletes it.
func (s *secretTree) next(l LeafIndex, k ratchetKind) (generation uint32, key, nonce secret, err error) {
	step, err := s.peekNext(l, k)
	if err != nil {
		return 0, nil, nil, err
	}
	s.consume(step)
	return step.generation, step.key, step.nonce, nil
}

// peekNext returns the next key of a ratchet for sending and changes nothing.
func (s *secretTree) peekNext(l LeafIndex, k ratchetKind) (*ratchetStep, error) {
	var generation uint32
	if r := s.ratchets[ratchetID{l, k}]; r != nil {
		generation = r.generation
	}
	return s.peek(l, k, generation, ratchetLimits{})
}

// peek returns the key of a generation and changes nothing. It fails with ErrGeneration if the key was used, was
// dropped, or lies past the limit. A step's key works as long as the step isn't consumed.
func (s *secretTree) peek(l LeafIndex, k ratchetKind, generation uint32, lim ratchetLimits) (*ratchetStep, error) {
	if uint32(l) >= s.slots {
		return nil, fmt.Errorf("%w: no leaf %d", ErrMalformed, l)
	}
	step := &ratchetStep{leaf: l, kind: k, generation: generation, version: s.version}
	r := s.ratchets[ratchetID{l, k}]
	if r == nil {
		if err := s.expand(step); err != nil {
			return nil, err
		}
		r = step.fresh[k]
	}
	if generation < r.generation || r.exhausted {
		i, ok := slices.BinarySearchFunc(r.skipped, generation, func(m messageKey, g uint32) int {
			return int(int64(m.generation) - int64(g))
		})
		if !ok {
			return nil, fmt.Errorf("%w: generation %d of leaf %d is gone", ErrGeneration, generation, l)
		}
		step.key, step.nonce = r.skipped[i].key, r.skipped[i].nonce
		step.next = &ratchet{generation: r.generation, secret: r.secret, exhausted: r.exhausted,
			skipped: slices.Delete(slices.Clone(r.skipped), i, i+1)}
		return step, nil
	}
	if generation-r.generation > lim.maxForward {
		return nil, fmt.Errorf("%w: generation %d of leaf %d, %d expected", ErrGeneration, generation, l, r.generation)
	}
	n := &ratchet{generation: r.generation, secret: slices.Clone(r.secret), skipped: slices.Clone(r.skipped)}
	for n.generation < generation {
		if int64(generation-n.generation) <= int64(lim.maxSkipped) {
			key, nonce := s.messageKey(n)
			n.skipped = append(n.skipped, messageKey{generation: n.generation, key: key, nonce: nonce})
		}
		s.advance(n)
	}
	step.key, step.nonce = s.messageKey(n)
	s.advance(n)
	if lim.maxSkipped > 0 && len(n.skipped) > lim.maxSkipped {
		n.skipped = slices.Clone(n.skipped[len(n.skipped)-lim.maxSkipped:])
	}
	step.next = n
	return step, nil
}

func (s *secretTree) messageKey(r *ratchet) (key, nonce secret) {
	return s.cs.deriveTreeSecret(r.secret, "key", r.generation, s.cs.aeadKeySize()),
		s.cs.deriveTreeSecret(r.secret, "nonce", r.generation, s.cs.aeadNonceSize())
}

// advance erases the former secret, which is r's alone.
func (s *secretTree) advance(r *ratchet) {
	old := r.secret
	defer old.erase()
	if r.generation == math.MaxUint32 {
		r.exhausted, r.secret = true, nil
		return
	}
	r.secret = s.cs.deriveTreeSecret(old, "secret", r.generation, s.cs.HashSize())
	r.generation++
}

// expand derives the leaf's ratchets from the lowest node above it whose secret is left.
func (s *secretTree) expand(step *ratchetStep) error {
	n := step.leaf.node()
	for s.nodes[n] == nil {
		if n == rootOf(s.slots) {
			return fmt.Errorf("%w: secrets of leaf %d are gone", ErrGeneration, step.leaf)
		}
		n = n.parent()
	}
	step.expanded = make(map[NodeIndex]secret)
	sec := slices.Clone(s.nodes[n])
	step.used = append(step.used, n)
	for !n.isLeaf() {
		left := s.cs.expandWithLabel(sec, "tree", []byte("left"), s.cs.HashSize())
		right := s.cs.expandWithLabel(sec, "tree", []byte("right"), s.cs.HashSize())
		sec.erase()
		if step.leaf.node() < n {
			step.expanded[n.right()] = right
			n, sec = n.left(), left
		} else {
			step.expanded[n.left()] = left
			n, sec = n.right(), right
		}
	}
	step.fresh = make(map[ratchetKind]*ratchet)
	for _, k := range []ratchetKind{handshakeRatchet, applicationRatchet} {
		step.fresh[k] = &ratchet{secret: s.cs.expandWithLabel(sec, k.label(), nil, s.cs.HashSize())}
	}
	sec.erase()
	return nil
}

// consume deletes the step's key and all that led to it. Call it only after the message was found authentic.
func (s *secretTree) consume(step *ratchetStep) {
	if step.version != s.version {
		again, err := s.peek(step.leaf, step.kind, step.generation, ratchetLimits{math.MaxUint32, math.MaxInt})
		if err != nil {
			return // consumed before
		}
		step = again
	}
	s.version++
	for _, n := range step.used {
		s.nodes[n].erase()
		delete(s.nodes, n)
		s.dirty[nodeKey(n)] = struct{}{}
	}
	for n, sec := range step.expanded {
		s.nodes[n] = sec
		s.dirty[nodeKey(n)] = struct{}{}
	}
	for k, r := range step.fresh {
		s.ratchets[ratchetID{step.leaf, k}] = r
		s.dirty[ratchetKey(step.leaf, k)] = struct{}{}
	}
	id := ratchetID{step.leaf, step.kind}
	before := s.ratchets[id]
	s.markSkipped(id, before, step)
	if before.generation != step.next.generation || step.next.exhausted && !before.exhausted {
		before.secret.erase() // else it is the next one's too
	}
	s.ratchets[id] = step.next
	s.dirty[ratchetKey(step.leaf, step.kind)] = struct{}{}
}

// erase overwrites the key in memory, after the step was consumed.
func (t *ratchetStep) erase() {
	t.key.erase()
	t.nonce.erase()
}

// erase overwrites all secrets in memory, when the tree isn't used any more.
func (s *secretTree) erase() {
	for _, sec := range s.nodes {
		sec.erase()
	}
	for _, r := range s.ratchets {
		r.secret.erase()
		for _, m := range r.skipped {
			m.key.erase()
			m.nonce.erase()
		}
	}
}

// markSkipped notes the skipped keys in which two states of a ratchet differ. It erases those that are
// too many; the one that the step is about is for it to erase.
func (s *secretTree) markSkipped(id ratchetID, before *ratchet, step *ratchetStep) {
	a, b := before.skipped, step.next.skipped
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].generation < b[0].generation:
			s.dirty[skippedKey(id.leaf, id.kind, a[0].generation)] = struct{}{}
			if a[0].generation != step.generation {
				a[0].key.erase()
				a[0].nonce.erase()
			}
			a = a[1:]
		case len(a) == 0 || b[0].generation < a[0].generation:
			s.dirty[skippedKey(id.leaf, id.kind, b[0].generation)] = struct{}{}
			b = b[1:]
		default:
			a, b = a[1:], b[1:]
		}
	}
}

// Keys of the stored form, relative to the secret tree: "n" node, "r" leaf kind, "s" leaf kind generation.

func nodeKey(n NodeIndex) string {
	return string(binary.BigEndian.AppendUint32([]byte{'n'}, uint32(n)))
}

func ratchetKey(l LeafIndex, k ratchetKind) string {
	return string(append(binary.BigEndian.AppendUint32([]byte{'r'}, uint32(l)), byte(k)))
}

func skippedKey(l LeafIndex, k ratchetKind, generation uint32) string {
	b := append(binary.BigEndian.AppendUint32([]byte{'s'}, uint32(l)), byte(k))
	return string(binary.BigEndian.AppendUint32(b, generation))
}

// entry returns the value stored under a key, nil if there is none (any more).
func (s *secretTree) entry(key string) []byte {
	n := binary.BigEndian.Uint32([]byte(key[1:]))
	if key[0] == 'n' {
		return s.nodes[NodeIndex(n)]
	}
	r := s.ratchets[ratchetID{LeafIndex(n), ratchetKind(key[5])}]
	if r == nil {
		return nil
	}
	if key[0] == 'r' {
		exhausted := byte(0)
		if r.exhausted {
			exhausted = 1
		}
		return append(append(binary.BigEndian.AppendUint32(nil, r.generation), exhausted), r.secret...)
	}
	g := binary.BigEndian.Uint32([]byte(key[6:]))
	for _, m := range r.skipped {
		if m.generation == g {
			return slices.Concat(m.key, m.nonce)
		}
	}
	return nil
}

// drain reports what changed since the last drain, or since the tree was made; a loaded tree hasn't changed.
func (s *secretTree) drain(set func(k, v []byte), del func(k []byte)) {
	for key := range s.dirty {
		if v := s.entry(key); v != nil {
			set([]byte(key), v)
		} else {
			del([]byte(key))
		}
	}
	clear(s.dirty)
}

// keys returns all keys under which the tree may be stored.
func (s *secretTree) keys() [][]byte {
	var keys [][]byte
	for n := range s.nodes {
		keys = append(keys, []byte(nodeKey(n)))
	}
	for id, r := range s.ratchets {
		keys = append(keys, []byte(ratchetKey(id.leaf, id.kind)))
		for _, m := range r.skipped {
			keys = append(keys, []byte(skippedKey(id.leaf, id.kind, m.generation)))
		}
	}
	for key := range s.dirty {
		if s.entry(key) == nil {
			keys = append(keys, []byte(key))
		}
	}
	return keys
}

// loadSecretTree rebuilds a tree from what drain reported.
func loadSecretTree(cs CipherSuite, slots uint32, entries iter.Seq2[[]byte, []byte]) (*secretTree, error) {
	s := &secretTree{cs: cs, slots: slots, nodes: make(map[NodeIndex]secret), ratchets: make(map[ratchetID]*ratchet),
		dirty: make(map[string]struct{})}
	at := func(id ratchetID) *ratchet {
		if s.ratchets[id] == nil {
			s.ratchets[id] = new(ratchet)
		}
		return s.ratchets[id]
	}
	keySize, nonceSize := cs.aeadKeySize(), cs.aeadNonceSize()
	for k, v := range entries {
		switch {
		case len(k) == 5 && k[0] == 'n' && len(v) == cs.HashSize():
			s.nodes[NodeIndex(binary.BigEndian.Uint32(k[1:]))] = slices.Clone(v)
		case len(k) == 6 && k[0] == 'r' && (len(v) == 5+cs.HashSize() || len(v) == 5 && v[4] == 1):
			r := at(ratchetID{LeafIndex(binary.BigEndian.Uint32(k[1:])), ratchetKind(k[5])})
			r.generation = binary.BigEndian.Uint32(v)
			r.exhausted = v[4] == 1
			r.secret = slices.Clone(v[5:])
		case len(k) == 10 && k[0] == 's' && len(v) == keySize+nonceSize:
			r := at(ratchetID{LeafIndex(binary.BigEndian.Uint32(k[1:])), ratchetKind(k[5])})
			r.skipped = append(r.skipped, messageKey{generation: binary.BigEndian.Uint32(k[6:]),
				key: slices.Clone(v[:keySize]), nonce: slices.Clone(v[keySize:])})
		default:
			return nil, fmt.Errorf("mls: load secret tree: %w: entry %q", ErrMalformed, k)
		}
	}
	for id, r := range s.ratchets {
		if r.secret == nil && !r.exhausted {
			return nil, fmt.Errorf("mls: load secret tree: %w: ratchet of leaf %d is missing", ErrMalformed, id.leaf)
		}
		slices.SortFunc(r.skipped, func(a, b messageKey) int { return int(int64(a.generation) - int64(b.generation)) })
	}
	return s, nil
}
