package mls

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// tally counts the members of a tree, and what they use and support.
type tally struct {
	members     int
	uses        map[CredentialType]int // leaves whose credential is of the type
	credentials map[CredentialType]int // leaves that support the type
	extensions  map[ExtensionType]int
	proposals   map[ProposalType]int
}

func newTally() tally {
	return tally{
		uses: make(map[CredentialType]int), credentials: make(map[CredentialType]int),
		extensions: make(map[ExtensionType]int), proposals: make(map[ProposalType]int),
	}
}

// roster is what must be unique among a tree's nodes and what all members must support, so that a commit is judged by what
// it changes (RFC 9420, Sections 7.3 and 12.2).
type roster struct {
	tally
	signature  keySet // signature keys of leaves
	encryption keySet // encryption keys of leaves and parents
	identity   keySet // clients, as the authentication service names them
}

// rosterChange is what a commit adds to a roster, counted, and takes from it.
type rosterChange struct {
	tally
	signature, encryption, identity map[keyID]int32
}

// keyID stands for a key or a name of any length: 64 bits of its SHA-256 with idSalt. Without the salt somebody could look
// for two keys of one ID, whose commit members that compare whole keys would accept and others refuse. It shows in nothing
// that is sent or stored.
type keyID uint64

var idSalt = func() (salt [16]byte) {
	rand.Read(salt[:])
	return salt
}()

func idOf(key []byte) keyID {
	var buf [256]byte // most keys fit, without an allocation
	h := sha256.Sum256(append(append(buf[:0], idSalt[:]...), key...))
	return keyID(binary.BigEndian.Uint64(h[:]))
}

// keySet has keys in ascending order: 8 bytes each, a fraction of what a map takes.
type keySet []keyID

func (s keySet) has(k keyID) bool {
	_, ok := slices.BinarySearch(s, k)
	return ok
}

// merge takes out the keys that d counts below zero, and puts in those above. It moves the keys between them at once.
func (s keySet) merge(d map[keyID]int32) keySet {
	var in, out []keyID
	for k, n := range d {
		switch {
		case n > 0:
			in = append(in, k)
		case n < 0:
			out = append(out, k)
		}
	}
	slices.Sort(in)
	slices.Sort(out)
	from, to := 0, 0
	for _, k := range out {
		at, found := slices.BinarySearch(s[from:], k)
		to += copy(s[to:], s[from:from+at])
		if from += at; found {
			from++
		}
	}
	s = s[:to+copy(s[to:], s[from:])]
	from = len(s)
	s = slices.Grow(s, len(in))[:from+len(in)]
	to = len(s)
	for _, k := range slices.Backward(in) {
		at, _ := slices.BinarySearch(s[:from], k)
		copy(s[to-(from-at):], s[at:from])
		to -= from - at + 1
		s[to], from = k, at
	}
	return s
}

// rosterOf counts a whole tree, as the change from an empty one.
func rosterOf(t *RatchetTree, v CredentialVerifier) (*rosterChange, error) {
	d := &rosterChange{encryption: make(map[keyID]int32)}
	for n := NodeIndex(0); uint32(n) < t.nodeWidth(); n++ {
		if key := t.publicKey(n); key != nil {
			d.encryption[idOf(key)]++
		}
	}
	for i, l := range t.Leaves() {
		if err := d.countLeaf(l, v, 1); err != nil {
			return nil, fmt.Errorf("mls: leaf %d: %w", i, err)
		}
	}
	return d, nil
}

// changedRoster counts what differs from one tree to another, a changed clone of it.
func changedRoster(from, to *RatchetTree, v CredentialVerifier) (*rosterChange, error) {
	dirty := to.dirtyNodes()
	r := &rosterChange{encryption: make(map[keyID]int32, 2*len(dirty))}
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

func (r *rosterChange) countLeaf(l *LeafNode, v CredentialVerifier, d int) error {
	id, err := v.Identity(l.Credential)
	if err != nil {
		return invalid("5.3.1", "credential names no client", err)
	}
	r.count(l, id, d)
	return nil
}

func (r *rosterChange) count(l *LeafNode, id []byte, d int) {
	if r.signature == nil {
		r.tally, r.signature, r.identity = newTally(), make(map[keyID]int32), make(map[keyID]int32)
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

// merge makes the change d.
func (r *roster) merge(d *rosterChange) {
	r.signature = r.signature.merge(d.signature)
	r.encryption = r.encryption.merge(d.encryption)
	r.identity = r.identity.merge(d.identity)
	r.members += d.members
	mergeCounts(r.uses, d.uses)
	mergeCounts(r.credentials, d.credentials)
	mergeCounts(r.extensions, d.extensions)
	mergeCounts(r.proposals, d.proposals)
}

func mergeCounts[T comparable](m, d map[T]int) {
	for k, n := range d {
		if m[k] += n; m[k] == 0 {
			delete(m, k)
		}
	}
}

// checkChange says whether r with the change d fits a group whose new extensions are those of cr.
func (r *roster) checkChange(d *rosterChange, cr *contextRules) error {
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

// repeated says whether a key that the change brings in occurs twice.
func repeated(s keySet, d map[keyID]int32) bool {
	for k, n := range d {
		if n > 1 || n > 0 && s.has(k) {
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
