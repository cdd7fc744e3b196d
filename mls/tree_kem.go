package mls

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// TreeKEM (RFC 9420, Sections 7.4 to 7.6).

// UpdatePathNode is the new key of a node on the committer's filtered direct path, and the node's path secret for
// those below its other child.
type UpdatePathNode struct {
	EncryptionKey HPKEPublicKey
	Secrets       []HPKECiphertext
}

// MarshalMLS implements codec.Marshaler.
func (n UpdatePathNode) MarshalMLS(w *codec.Writer) {
	w.Opaque(n.EncryptionKey)
	codec.WriteVector(w, n.Secrets, func(w *codec.Writer, c HPKECiphertext) { c.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (n *UpdatePathNode) UnmarshalMLS(r *codec.Reader) {
	n.EncryptionKey = r.Opaque()
	n.Secrets = codec.ReadVector(r, func(r *codec.Reader) (c HPKECiphertext) { c.UnmarshalMLS(r); return c })
}

// UpdatePath replaces the committer's leaf and the keys above it (RFC 9420, Section 7.6).
//
//	struct {
//	    HPKEPublicKey encryption_key;
//	    HPKECiphertext encrypted_path_secret<V>;
//	} UpdatePathNode;
//
//	struct {
//	    LeafNode leaf_node;
//	    UpdatePathNode nodes<V>;
//	} UpdatePath;
type UpdatePath struct {
	LeafNode LeafNode
	Nodes    []UpdatePathNode
}

// MarshalMLS implements codec.Marshaler.
func (p *UpdatePath) MarshalMLS(w *codec.Writer) {
	p.LeafNode.MarshalMLS(w)
	codec.WriteVector(w, p.Nodes, func(w *codec.Writer, n UpdatePathNode) { n.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *UpdatePath) UnmarshalMLS(r *codec.Reader) {
	p.LeafNode.UnmarshalMLS(r)
	p.Nodes = codec.ReadVector(r, func(r *codec.Reader) (n UpdatePathNode) { n.UnmarshalMLS(r); return n })
}

// treePrivate holds a member's private keys: its leaf's and those it knows on the way to the root.
type treePrivate struct {
	redact
	leaf LeafIndex
	keys map[NodeIndex]HPKEPrivateKey
}

func newTreePrivate(leaf LeafIndex, key HPKEPrivateKey) *treePrivate {
	return &treePrivate{leaf: leaf, keys: map[NodeIndex]HPKEPrivateKey{leaf.node(): key}}
}

func (p *treePrivate) clone() *treePrivate {
	return &treePrivate{leaf: p.leaf, keys: maps.Clone(p.keys)}
}

// copy copies the keys too, so that erasing the ones leaves the others.
func (p *treePrivate) copy() *treePrivate {
	c := p.clone()
	for n, k := range c.keys {
		c.keys[n] = bytes.Clone(k)
	}
	return c
}

// erase overwrites the keys in memory that keep doesn't share.
func (p *treePrivate) erase(keep *treePrivate) {
	for n, k := range p.keys {
		if other := keep.keys[n]; len(k) > 0 && (len(other) == 0 || &other[0] != &k[0]) {
			secret(k).erase()
		}
	}
}

// prune drops the keys of nodes that are blank or gone.
func (p *treePrivate) prune(t *RatchetTree) {
	maps.DeleteFunc(p.keys, func(n NodeIndex, _ HPKEPrivateKey) bool { return t.blank(n) })
}

// MarshalMLS implements codec.Marshaler, for the client's encrypted store.
func (p *treePrivate) MarshalMLS(w *codec.Writer) {
	w.Uint32(uint32(p.leaf))
	codec.WriteVector(w, slices.Sorted(maps.Keys(p.keys)), func(w *codec.Writer, n NodeIndex) {
		w.Uint32(uint32(n))
		w.Opaque(p.keys[n])
	})
}

// UnmarshalMLS implements codec.Unmarshaler. Nodes that don't ascend are refused.
func (p *treePrivate) UnmarshalMLS(r *codec.Reader) {
	p.leaf = LeafIndex(r.Uint32())
	p.keys = make(map[NodeIndex]HPKEPrivateKey)
	next := uint64(0)
	r.Vector(func(r *codec.Reader) {
		n := r.Uint32()
		if uint64(n) < next {
			r.Failf("key of node %d out of order", n)
			return
		}
		next = uint64(n) + 1
		p.keys[NodeIndex(n)] = r.Opaque()
	})
}

// nodeKeys derives a node's key pair from its path secret (RFC 9420, Section 7.4).
func (cs CipherSuite) nodeKeys(pathSecret secret) (HPKEPublicKey, HPKEPrivateKey, error) {
	s := cs.deriveSecret(pathSecret, "node")
	defer s.erase()
	return cs.DeriveHPKEKey(s)
}

// newPath is an update path whose secrets aren't encrypted yet: that needs the tree hash with the path in it.
type newPath struct {
	redact
	cs           CipherSuite
	leaf         *LeafNode
	path, copath []NodeIndex
	pathSecrets  []secret // per node of path
	keys         []HPKEPublicKey
	commitSecret secret
	private      *treePrivate // all keys that the committer knows from now on
}

// generatePath gives the member at i a new leaf and new keys on its filtered direct path, and puts them into t
// (RFC 9420, Section 7.5). template has the leaf's credential, signature key, capabilities and extensions.
func (t *RatchetTree) generatePath(cs CipherSuite, rand io.Reader, i LeafIndex, template *LeafNode, groupID []byte, signer crypto.Signer) (*newPath, error) {
	pub, priv, err := cs.GenerateHPKEKey(rand)
	if err != nil {
		return nil, fmt.Errorf("mls: new path: %w", err)
	}
	np := &newPath{cs: cs, private: newTreePrivate(i, priv)}
	np.path, np.copath = t.filteredDirectPath(i)
	s, err := cs.randomSecret(rand)
	if err != nil {
		return nil, err
	}
	for _, n := range np.path {
		nodePub, nodePriv, err := cs.nodeKeys(s)
		if err != nil {
			return nil, fmt.Errorf("mls: new path: %w", err)
		}
		np.pathSecrets = append(np.pathSecrets, s)
		np.keys = append(np.keys, nodePub)
		np.private.keys[n] = nodePriv
		s = cs.deriveSecret(s, "path")
	}
	np.commitSecret = s
	parentHash := t.setPath(cs, i, np.path, np.copath, np.keys)
	np.leaf = template.clone()
	np.leaf.EncryptionKey = pub
	np.leaf.Source = LeafNodeCommit
	np.leaf.Lifetime = Lifetime{}
	np.leaf.ParentHash = parentHash
	if err := np.leaf.sign(cs, rand, signer, groupID, i); err != nil {
		return nil, err
	}
	t.setLeaf(i, np.leaf)
	return np, nil
}

const labelUpdatePathNode = "UpdatePathNode"

// encrypt encrypts the path secrets to the members of t, which has the path in it, without those in exclude, which
// the same commit adds. ctx is the new GroupContext with the old transcript hash (RFC 9420, Section 12.4.1).
func (np *newPath) encrypt(rand io.Reader, t *RatchetTree, exclude []LeafIndex, ctx []byte) (*UpdatePath, error) {
	type job struct {
		node int
		to   HPKEPublicKey
	}
	var jobs []job
	counts := make([]int, len(np.path))
	for k := range np.path {
		for _, n := range t.recipients(np.copath[k], exclude) {
			jobs = append(jobs, job{k, t.publicKey(n)})
			counts[k]++
		}
	}
	sealed, err := np.cs.sealAll(rand, len(jobs), np.cs.hpkeInfo(labelUpdatePathNode, ctx), func(i int) (HPKEPublicKey, []byte) {
		return jobs[i].to, np.pathSecrets[jobs[i].node]
	})
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt path secrets: %w", err)
	}
	up := &UpdatePath{LeafNode: *np.leaf, Nodes: make([]UpdatePathNode, len(np.path))}
	for k, count := range counts {
		up.Nodes[k] = UpdatePathNode{EncryptionKey: np.keys[k], Secrets: sealed[:count:count]}
		sealed = sealed[count:]
	}
	return up, nil
}

// recipients is the resolution of a copath node without new members, who learn the secret from their Welcome.
func (t *RatchetTree) recipients(n NodeIndex, exclude []LeafIndex) []NodeIndex {
	res := t.resolution(n)
	if len(exclude) == 0 {
		return res
	}
	excluded := make(map[NodeIndex]bool, len(exclude))
	for _, l := range exclude {
		excluded[l.node()] = true
	}
	return slices.DeleteFunc(res, func(n NodeIndex) bool { return excluded[n] })
}

// erase overwrites the path secrets and the commit secret in memory, after the last use.
func (np *newPath) erase() {
	if np == nil {
		return
	}
	for _, s := range np.pathSecrets {
		s.erase()
	}
	np.commitSecret.erase()
}

// secretFor returns the path secret of the lowest node above both the committer and a joiner.
func (np *newPath) secretFor(joiner LeafIndex) secret {
	if i := slices.Index(np.path, commonAncestor(np.private.leaf, joiner)); i >= 0 {
		return np.pathSecrets[i]
	}
	return nil
}

// applyPath merges the public part of a received path into t, which has the commit's proposals applied (RFC 9420,
// Section 7.5), and checks the leaf's parent hash. The leaf's signature and contents, and the nodes' keys, are the
// caller's to check.
func (t *RatchetTree) applyPath(cs CipherSuite, sender LeafIndex, p *UpdatePath) error {
	if uint32(sender) >= t.slots {
		return invalid("12.4.2", "no leaf %d for the path", sender)
	}
	path, copath := t.filteredDirectPath(sender)
	if len(p.Nodes) != len(path) {
		return invalid("12.4.2", "path of %d nodes, the filtered direct path of leaf %d has %d", len(p.Nodes), sender, len(path))
	}
	keys := make([]HPKEPublicKey, len(path))
	for k := range path {
		keys[k] = p.Nodes[k].EncryptionKey
	}
	parentHash := t.setPath(cs, sender, path, copath, keys)
	if p.LeafNode.Source != LeafNodeCommit || !bytes.Equal(p.LeafNode.ParentHash, parentHash) {
		return invalid("7.9.2", "parent hash of the path's leaf does not match")
	}
	t.setLeaf(sender, &p.LeafNode)
	return nil
}

// decryptPath finds the path secret meant for priv's owner, and returns the commit secret and the private keys after
// the path (RFC 9420, Section 7.5). t has the path merged; exclude and ctx are as in encrypt; priv isn't changed.
func (t *RatchetTree) decryptPath(cs CipherSuite, priv *treePrivate, sender LeafIndex, p *UpdatePath, exclude []LeafIndex, ctx []byte) (secret, *treePrivate, error) {
	path, copath := t.filteredDirectPath(sender)
	if len(p.Nodes) != len(path) {
		return nil, nil, invalid("12.4.2", "path of %d nodes, the filtered direct path of leaf %d has %d", len(p.Nodes), sender, len(path))
	}
	k := slices.Index(path, commonAncestor(sender, priv.leaf))
	if k < 0 {
		return nil, nil, errors.New("mls: path: this member is not below the path")
	}
	to := t.recipients(copath[k], exclude)
	if len(p.Nodes[k].Secrets) != len(to) {
		return nil, nil, invalid("7.6", "%d encrypted path secrets for %d nodes", len(p.Nodes[k].Secrets), len(to))
	}
	at := slices.IndexFunc(to, func(n NodeIndex) bool { _, ok := priv.keys[n]; return ok })
	if at < 0 {
		return nil, nil, errors.New("mls: path: no private key for it")
	}
	s, err := cs.hpkeOpen(priv.keys[to[at]], t.publicKey(to[at]), cs.hpkeInfo(labelUpdatePathNode, ctx), p.Nodes[k].Secrets[at])
	if err != nil {
		return nil, nil, fmt.Errorf("mls: path secret: %w", err)
	}
	next := priv.clone()
	next.prune(t)
	commit, err := t.deriveUp(cs, next, path[k:], s)
	if err != nil {
		return nil, nil, err
	}
	return commit, next, nil
}

// deriveUp stores the private keys of the nodes in path, the first of which has path secret s, and returns the commit
// secret. The keys must match the tree's. The path secrets are erased.
func (t *RatchetTree) deriveUp(cs CipherSuite, priv *treePrivate, path []NodeIndex, s secret) (secret, error) {
	for _, n := range path {
		defer s.erase()
		pub, key, err := cs.nodeKeys(s)
		if err != nil {
			return nil, fmt.Errorf("mls: path: %w", err)
		}
		if !bytes.Equal(pub, t.publicKey(n)) {
			return nil, invalid("7.5", "key of node %d does not follow from its path secret", n)
		}
		priv.keys[n] = key
		s = cs.deriveSecret(s, "path")
	}
	return s, nil
}

// installPathSecret gives a joiner the keys from the common ancestor with the Welcome's signer up (RFC 9420,
// Section 12.4.3.1).
func (t *RatchetTree) installPathSecret(cs CipherSuite, priv *treePrivate, signer LeafIndex, pathSecret secret) error {
	path, _ := t.filteredDirectPath(signer)
	k := slices.Index(path, commonAncestor(signer, priv.leaf))
	if k < 0 {
		return invalid("12.4.3.1", "path secret for a node that leaf %d does not have on its path", signer)
	}
	_, err := t.deriveUp(cs, priv, path[k:], slices.Clone(pathSecret))
	return err
}
