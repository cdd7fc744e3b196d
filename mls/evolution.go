package mls

import (
	"bytes"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// Member is a leaf of the tree that isn't blank.
type Member struct {
	Index LeafIndex
	Leaf  *LeafNode // not to be changed
}

// LeafChange is a member whose leaf a commit replaces.
type LeafChange struct {
	Index    LeafIndex
	Old, New *LeafNode
}

// StagedInfo says what a commit does. Nothing in it may be changed.
type StagedInfo struct {
	// Epoch is the new epoch.
	Epoch uint64
	// Committer is the committer's leaf; if External, the leaf at which it joins.
	Committer LeafIndex
	External  bool
	// Added are the new members with their leaves in the new tree, an external committer among them; Removed the
	// former members with their old leaves; Updated those whose leaf was replaced, a committer with a path among them.
	Added   []Member
	Removed []Member
	Updated []LeafChange
	// Proposals are the commit's, in its order; Ephemeral those of them that bring application data (AppEphemeral) which
	// is to be processed with the commit, in the order in which it is.
	Proposals []PendingProposal
	Ephemeral []PendingProposal
	// Before and After are the GroupContexts that the commit leads from and to. While a commit is being made, After
	// lacks the tree hash and confirmed transcript hash when Policy sees it first.
	Before, After GroupContext
	// TreeBefore and TreeAfter are the ratchet trees that the commit leads from and to.
	TreeBefore, TreeAfter *RatchetTree
	// PathLeaf is the committer's new leaf, nil if the commit has no path.
	PathLeaf *LeafNode
	// SelfRemoved says that the commit removes this client, by whatever proposal; never set for a PublicGroup.
	SelfRemoved bool
}

// evolution is an epoch in the making: the state to which a commit leads, apart from the secrets.
type evolution struct {
	info      StagedInfo
	list      []resolved
	committer LeafIndex
	external  bool
	former    *LeafNode // that an external committer removes: its own of before

	tree    *RatchetTree
	rules   *contextRules
	context GroupContext // complete after seal
	encoded []byte
	change  *rosterChange
	interim []byte
	tag     []byte
	added   []LeafIndex // by Add proposals: their leaves get no path secrets from the path
	adds    []*KeyPackage
	reinit  *ReInit // with which the commit ends the group
}

// applyProposals checks a commit's proposals and applies them to a clone of the tree (RFC 9420, Sections 12.2
// and 12.3). committer is meant if the commit isn't external.
func (p *publicState) applyProposals(r *rules, list []resolved, committer LeafIndex, external bool) (*evolution, error) {
	if p.context.Epoch == 1<<64-1 {
		return nil, fmt.Errorf("%w: no epoch after this one", ErrEpoch)
	}
	if err := p.checkList(r, list, committer, external); err != nil {
		return nil, err
	}
	p.tree.Hash(p.suite()) // so that the clone has the hashes of what doesn't change
	e := &evolution{list: list, committer: committer, external: external, tree: p.tree.clone(), context: p.context}
	e.context.Epoch++
	if err := e.applyExtensions(r); err != nil {
		return nil, err
	}
	var err error
	if e.rules, err = parseContextRules(e.context.Extensions); err != nil {
		return nil, err
	}
	if err := e.rules.receivers.check(p.suite()); err != nil {
		return nil, err
	}
	e.info = StagedInfo{
		Epoch: e.context.Epoch, Committer: committer, External: external,
		Before: p.context, TreeBefore: p.tree, TreeAfter: e.tree,
	}
	if len(list) == 1 {
		e.reinit = list[0].Proposal.ReInit
	}
	e.info.Proposals = make([]PendingProposal, len(list))
	for i := range list {
		e.info.Proposals[i] = list[i].PendingProposal
		if list[i].Proposal.Type == ProposalAppEphemeral {
			e.info.Ephemeral = append(e.info.Ephemeral, list[i].PendingProposal)
		}
	}
	for i := range list {
		if u := list[i].Proposal.Update; u != nil {
			leaf, at := &u.LeafNode, list[i].Sender.Leaf
			if err := checkLeafFits(leaf, e.rules); err != nil {
				return nil, err
			}
			e.info.Updated = append(e.info.Updated, LeafChange{Index: at, Old: e.tree.Leaf(at), New: leaf})
			e.tree.updateLeaf(at, leaf)
		}
	}
	for _, t := range []ProposalType{ProposalSelfRemove, ProposalRemove} {
		for i := range list {
			if list[i].Proposal.Type != t {
				continue
			}
			at, _ := list[i].removes()
			leaf := e.tree.Leaf(at)
			if t == ProposalRemove && external {
				e.former = leaf
			}
			e.info.Removed = append(e.info.Removed, Member{Index: at, Leaf: leaf})
			e.tree.removeLeaf(at)
		}
	}
	var leaves []*LeafNode
	for i := range list {
		if a := list[i].Proposal.Add; a != nil {
			if err := checkLeafFits(&a.KeyPackage.LeafNode, e.rules); err != nil {
				return nil, err
			}
			leaves = append(leaves, &a.KeyPackage.LeafNode)
			e.adds = append(e.adds, &a.KeyPackage)
		}
	}
	if !e.tree.hasRoom(len(leaves)) {
		return nil, errFull()
	}
	e.added = e.tree.addLeaves(leaves)
	for i, at := range e.added {
		e.info.Added = append(e.info.Added, Member{Index: at, Leaf: leaves[i]})
	}
	e.info.After = e.context
	return e, nil
}

// applyExtensions applies the GroupContextExtensions proposal and then the AppDataUpdates (draft-ietf-mls-extensions,
// Section 4.7).
func (e *evolution) applyExtensions(r *rules) error {
	for i := range e.list {
		if x := e.list[i].Proposal.GroupContextExtensions; x != nil {
			e.context.Extensions = x.Extensions
		}
	}
	var order []ComponentID
	updates := make(map[ComponentID][][]byte)
	removes := make(map[ComponentID]bool)
	for i := range e.list {
		u := e.list[i].Proposal.AppDataUpdate
		if u == nil {
			continue
		}
		if _, seen := updates[u.Component]; !seen {
			order = append(order, u.Component)
			updates[u.Component] = nil
		}
		if u.Op == AppDataOpRemove {
			removes[u.Component] = true
		} else {
			updates[u.Component] = append(updates[u.Component], u.Update)
		}
	}
	if len(order) == 0 {
		return nil
	}
	d, err := dictionaryOf(e.context.Extensions)
	if err != nil {
		return err
	}
	for _, id := range order {
		current, ok := d.Get(id)
		if removes[id] {
			if !ok {
				return invalidBy(sectionAppData, "removal of component %d, which has no data", id)
			}
			d = d.Remove(id)
			continue
		}
		next, err := r.components[id].Update(bytes.Clone(current), updates[id])
		if err != nil {
			return invalidBy(sectionAppData, "update of component %d", id, err)
		}
		d = d.Set(id, next)
	}
	e.context.Extensions = e.context.Extensions.Set(ExtensionAppDataDictionary, codec.Marshal(d))
	return nil
}

// replaced is the leaf to whose rules a path's leaf is held: the committer's present one, or the one that an external
// committer removes; nil if there is none.
func (e *evolution) replaced() *LeafNode {
	if !e.external {
		return e.tree.Leaf(e.committer)
	}
	return e.former
}

// setPathLeaf notes the committer's new leaf, which is in the tree already.
func (e *evolution) setPathLeaf(old *LeafNode) {
	leaf := e.tree.Leaf(e.committer)
	e.info.PathLeaf, e.info.Committer = leaf, e.committer
	if e.external {
		e.info.Added = append(e.info.Added, Member{Index: e.committer, Leaf: leaf})
	} else {
		e.info.Updated = append(e.info.Updated, LeafChange{Index: e.committer, Old: old, New: leaf})
	}
}

// applyPath checks the public part of a path and merges it into the tree (RFC 9420, Section 12.4.2).
func (p *publicState) applyPath(r *rules, e *evolution, path *UpdatePath) error {
	if path == nil {
		if pathRequired(e.list) {
			return invalid("12.4", "commit without a path")
		}
		return nil
	}
	counts, err := p.roster(r.verifier)
	if err != nil {
		return err
	}
	change, err := changedRoster(p.tree, e.tree, r.verifier)
	if err != nil {
		return err
	}
	used := func(key HPKEPublicKey) bool {
		id := idOf(key)
		return counts.encryption.has(id) && change.encryption[id] >= 0 || change.encryption[id] > 0
	}
	leaf := &path.LeafNode
	old := e.replaced()
	if e.external {
		if !e.tree.hasRoom(1) {
			return errFull()
		}
		e.committer = e.tree.addLeaf(leaf)
	}
	if err := checkLeafFits(leaf, e.rules); err != nil {
		return err
	}
	if err := r.checkLeaf(&e.context, leaf, old, LeafNodeCommit, e.committer); err != nil {
		return err
	}
	if used(leaf.EncryptionKey) {
		return invalid("12.4.2", "key of the path's leaf is in the tree already")
	}
	for i := range path.Nodes {
		if used(path.Nodes[i].EncryptionKey) {
			return invalid("12.4.2", "key %d of the path is in the tree already", i)
		}
		if err := p.suite().checkHPKEPublicKey(path.Nodes[i].EncryptionKey); err != nil {
			return invalid("12.4.2", "key %d of the path", i, err)
		}
	}
	if err := e.tree.applyPath(p.suite(), e.committer, path); err != nil {
		return err
	}
	if err := e.checkRecipients(path); err != nil {
		return err
	}
	e.setPathLeaf(old)
	return nil
}

// checkRecipients compares the number of encrypted path secrets with that of their recipients (RFC 9420,
// Section 7.6).
func (e *evolution) checkRecipients(path *UpdatePath) error {
	_, copath := e.tree.filteredDirectPath(e.committer)
	for i, n := range copath {
		if want := len(e.tree.recipients(n, e.added)); want != len(path.Nodes[i].Secrets) {
			return invalid("7.6", "node %d of the path has %d encrypted secrets, want %d", i, len(path.Nodes[i].Secrets), want)
		}
	}
	return nil
}

// checkTree checks the tree that a commit leads to and computes its hash (RFC 9420, Section 12.2, last rule).
func (p *publicState) checkTree(r *rules, e *evolution) error {
	counts, err := p.roster(r.verifier)
	if err != nil {
		return err
	}
	if e.change, err = changedRoster(p.tree, e.tree, r.verifier); err != nil {
		return err
	}
	if err := counts.checkChange(e.change, e.rules); err != nil {
		return err
	}
	before, err := p.contextRules()
	if err != nil {
		return err
	}
	if err := e.rules.terms.checkAllLeaves(&before.terms, e.tree); err != nil {
		return err
	}
	e.context.TreeHash = e.tree.Hash(p.suite())
	return nil
}

// provisional returns the encoding of the provisional GroupContext: the new one with the old confirmed transcript
// hash (RFC 9420, Section 12.4.1).
func (e *evolution) provisional() []byte { return codec.Marshal(e.context) }

// advance computes the transcript hash that the signed commit leads to, and with it the new GroupContext.
func (p *publicState) advance(e *evolution, ac *AuthenticatedContent) {
	e.context.ConfirmedTranscriptHash = p.suite().confirmedTranscriptHash(p.interim, ac)
	e.encoded = codec.Marshal(e.context)
	e.info.After = e.context
}

// seal completes the evolution with the confirmation tag and asks the application's policy.
func (p *publicState) seal(r *rules, e *evolution, tag []byte) error {
	e.tag = tag
	e.interim = p.suite().interimTranscriptHash(e.context.ConfirmedTranscriptHash, tag)
	if r.policy != nil && !r.replay {
		if err := r.policy(&e.info); err != nil {
			return fmt.Errorf("mls: policy: %w", err)
		}
	}
	return nil
}

// stage checks a commit whose signature was verified and computes the public state that it leads to. p isn't changed.
func (p *publicState) stage(r *rules, ac *AuthenticatedContent) (*evolution, error) {
	c := &ac.Content
	external := c.Sender.Type == SenderNewMemberCommit
	if !external && c.Sender.Type != SenderMember {
		return nil, invalid("6.1", "commit of sender type %d", c.Sender.Type)
	}
	list, err := p.resolve(c.Commit, c.Sender)
	if err != nil {
		return nil, err
	}
	e, err := p.applyProposals(r, list, c.Sender.Leaf, external)
	if err != nil {
		return nil, err
	}
	if err := p.applyPath(r, e, c.Commit.Path); err != nil {
		return nil, err
	}
	if err := p.checkTree(r, e); err != nil {
		return nil, err
	}
	p.advance(e, ac)
	return e, nil
}

// adopt makes the evolution the state.
func (p *publicState) adopt(e *evolution) {
	if p.counts != nil && e.change != nil {
		p.counts.merge(e.change)
	}
	if !e.context.Extensions.Equal(p.context.Extensions) {
		p.extEpoch = e.context.Epoch
	}
	p.context, p.encoded, p.tree = e.context, e.encoded, e.tree
	p.confirmationTag, p.interim = e.tag, e.interim
	p.rules, p.reinit = e.rules, e.reinit
	p.pending, p.next = nil, 0
}

// fits says whether p is the state for which the evolution was staged.
func (e *evolution) fits(p *publicState) error {
	if e.context.Epoch != p.context.Epoch+1 || !bytes.Equal(e.context.GroupID, p.context.GroupID) ||
		!bytes.Equal(e.info.Before.ConfirmedTranscriptHash, p.context.ConfirmedTranscriptHash) {
		return fmt.Errorf("%w: staged for epoch %d, group is at %d", ErrEpoch, e.info.Before.Epoch, p.context.Epoch)
	}
	return nil
}
