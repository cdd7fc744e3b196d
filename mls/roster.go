package mls

import (
	"crypto/sha256"
	"fmt"
	"maps"
)

// roster counts what must be unique among a tree's nodes and what all members must support, so that a commit is
// judged by what it changes (RFC 9420, Sections 7.3 and 12.2). A commit's own roster holds differences, which are
// added to the group's when it is applied.
type roster struct {
	members    int
	signature  map[keyID]int32 // signature keys of leaves
	encryption map[keyID]int32 // encryption keys of leaves and parents
	identity   map[keyID]int32 // clients, as the authentication service names them

	uses        map[CredentialType]int // leaves whose credential is of the type
	credentials map[CredentialType]int // leaves that support the type
	extensions  map[ExtensionType]int
	proposals   map[ProposalType]int
}

// keyID stands for a key or a name of any length: half of its SHA-256, of which nobody finds two that are equal.
type keyID [sha256.Size / 2]byte

func idOf(key []byte) keyID {
	h := sha256.Sum256(key)
	return keyID(h[:])
}

func newRoster() *roster {
	return &roster{
		signature: make(map[keyID]int32), encryption: make(map[keyID]int32), identity: make(map[keyID]int32),
		uses: make(map[CredentialType]int), credentials: make(map[CredentialType]int),
		extensions: make(map[ExtensionType]int), proposals: make(map[ProposalType]int),
	}
}

// rosterOf counts a whole tree.
func rosterOf(t *RatchetTree, v CredentialVerifier) (*roster, error) {
	r := newRoster()
	for n := NodeIndex(0); uint32(n) < t.nodeWidth(); n++ {
		if key := t.publicKey(n); key != nil {
			r.encryption[idOf(key)]++
		}
	}
	for i, l := range t.Leaves() {
		if err := r.countLeaf(l, v, 1); err != nil {
			return nil, fmt.Errorf("mls: leaf %d: %w", i, err)
		}
	}
	return r, nil
}

// rosterChange counts what differs from one tree to another, a changed clone of it.
func rosterChange(from, to *RatchetTree, v CredentialVerifier) (*roster, error) {
	dirty := to.dirtyNodes()
	r := &roster{encryption: make(map[keyID]int32, 2*len(dirty))}
	for _, n := range dirty {
		if key := from.publicKey(n); key != nil {
			r.encryption[idOf(key)]--
		}
		if key := to.publicKey(n); key != nil {
			r.encryption[idOf(key)]++
		}
		if !n.isLeaf() {
			continue
		}
		before, after := from.Leaf(n.leaf()), to.Leaf(n.leaf())
		if before != nil && after != nil && before.Credential.Equal(after.Credential) {
			r.count(before, nil, -1)
			r.count(after, nil, 1)
			continue
		}
		if before != nil {
			if err := r.countLeaf(before, v, -1); err != nil {
				return nil, err
			}
		}
		if after != nil {
			if err := r.countLeaf(after, v, 1); err != nil {
				return nil, err
			}
		}
	}
	return r, nil
}

func (r *roster) countLeaf(l *LeafNode, v CredentialVerifier, d int) error {
	id, err := v.Identity(l.Credential)
	if err != nil {
		return invalid("5.3.1", "credential names no client", err)
	}
	r.count(l, id, d)
	return nil
}

func (r *roster) count(l *LeafNode, id []byte, d int) {
	if r.signature == nil {
		n := newRoster()
		n.encryption = r.encryption
		*r = *n
	}
	r.members += d
	r.signature[idOf(l.SignatureKey)] += int32(d)
	if id != nil {
		r.identity[idOf(id)] += int32(d)
	}
	r.uses[l.Credential.Type] += d
	countOnce(r.credentials, l.Capabilities.Credentials, d)
	countOnce(r.extensions, l.Capabilities.Extensions, d)
	countOnce(r.proposals, l.Capabilities.Proposals, d)
}

// countOnce counts each value of a list once, however often a client repeats it.
func countOnce[T comparable](m map[T]int, list []T, d int) {
	for i, t := range list {
		seen := false
		for _, u := range list[:i] {
			seen = seen || u == t
		}
		if !seen {
			m[t] += d
		}
	}
}

// merge adds the differences d.
func (r *roster) merge(d *roster) {
	r.members += d.members
	mergeCounts(r.signature, d.signature)
	mergeCounts(r.encryption, d.encryption)
	mergeCounts(r.identity, d.identity)
	mergeCounts(r.uses, d.uses)
	mergeCounts(r.credentials, d.credentials)
	mergeCounts(r.extensions, d.extensions)
	mergeCounts(r.proposals, d.proposals)
}

func mergeCounts[T comparable, N int | int32](m, d map[T]N) {
	for k, n := range d {
		if m[k] += n; m[k] == 0 {
			delete(m, k)
		}
	}
}

// checkChange says whether r with the differences d fits a group whose new extensions are those of cr.
func (r *roster) checkChange(d *roster, cr *contextRules) error {
	if repeated(r.signature, d.signature) {
		return invalid("7.3", "two leaves with one signature key")
	}
	if repeated(r.encryption, d.encryption) {
		return invalid("7.3", "two nodes with one encryption key")
	}
	if repeated(r.identity, d.identity) {
		return invalid("12.2", "two leaves of one client")
	}
	all := r.members + d.members
	for t := range mergedKeys(r.uses, d.uses) {
		if r.uses[t]+d.uses[t] > 0 && r.credentials[t]+d.credentials[t] != all {
			return invalid("7.3", "credential type %d in use and not supported by all members", t)
		}
	}
	for _, t := range cr.required.Credentials {
		if r.credentials[t]+d.credentials[t] != all {
			return invalid("12.1.7", "required credential type %d not supported by all members", t)
		}
	}
	for _, t := range cr.required.Extensions {
		if !t.isDefault() && r.extensions[t]+d.extensions[t] != all {
			return invalid("12.1.7", "required extension type %d not supported by all members", t)
		}
	}
	for _, t := range cr.required.Proposals {
		if !t.isDefault() && r.proposals[t]+d.proposals[t] != all {
			return invalid("12.1.7", "required proposal type %d not supported by all members", t)
		}
	}
	for _, t := range cr.types {
		if !t.isDefault() && r.extensions[t]+d.extensions[t] != all {
			return invalid("13.4", "extension type %d of the GroupContext not supported by all members", t)
		}
	}
	return nil
}

// repeated says whether a key that the differences bring in occurs twice.
func repeated(m, d map[keyID]int32) bool {
	for k, n := range d {
		if n > 0 && m[k]+n > 1 {
			return true
		}
	}
	return false
}

func mergedKeys[T comparable](a, b map[T]int) map[T]int {
	m := maps.Clone(a)
	maps.Copy(m, b)
	return m
}
