package mls

import (
	"bytes"
	"fmt"
	"iter"
	"sync"

	"github.com/parley-mls/parley/mls/codec"
)

// PublicGroup is what a server that orders a group's messages knows of it (RFC 9750, Section 5): the tree, the
// GroupContext and the proposals, and no secret. It checks of a handshake message all but the membership tag, the
// confirmation tag, path secrets and Welcomes. A nil Batch keeps changes in memory only.
//
// Its methods may be called by several goroutines at once. Those that check or apply something take turns; the others
// see the group as the last change left it and don't wait. Order of Batches and callbacks are as for a Group.
type PublicGroup struct {
	op   sync.Mutex   // held throughout a check or a change; guards all but view
	mu   sync.RWMutex // guards view
	view publicView

	rules rules
	state publicState
	info  *GroupInfo
}

// publicView is what a PublicGroup's reading methods see: the state as the last change left it.
type publicView struct {
	state publicState // of which rules and counts aren't for readers
	info  *GroupInfo
}

// done ends a check or change.
func (g *PublicGroup) done() {
	g.publish()
	g.op.Unlock()
}

func (g *PublicGroup) publish() {
	g.mu.Lock()
	g.view = publicView{state: g.state, info: g.info}
	g.mu.Unlock()
}

func (g *PublicGroup) public() publicState {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.state
}

// NewPublicGroup begins with the epoch that gi describes, after it has validated gi's signature and the whole tree (RFC
// 9420, Section 12.4.3.1). tree may be nil if gi carries it; it belongs to the PublicGroup from then on. It fails with
// ErrSignature, ErrUnsupported for another version or suite, or a ValidationError.
func NewPublicGroup(cfg PublicConfig, b Batch, gi *GroupInfo, tree *RatchetTree) (*PublicGroup, error) {
	r := cfg.rules()
	state, err := checkGroupInfo(&r, gi, tree)
	if err != nil {
		return nil, fmt.Errorf("mls: new public group: %w", err)
	}
	g := &PublicGroup{rules: r, state: *state}
	b = orDiscard(b)
	saveTree(b, state.tree)
	g.state.saveExtensions(b)
	g.saveEpoch(b, gi)
	g.publish()
	return g, nil
}

// saveEpoch writes what every epoch has anew.
func (g *PublicGroup) saveEpoch(b Batch, gi *GroupInfo) {
	g.info = gi
	b.Set(key1(keyHeader), codec.Marshal(&header{
		kind: kindPublicGroup, slots: g.state.tree.Size(), context: g.state.context, extEpoch: g.state.extEpoch,
		confirmationTag: g.state.confirmationTag,
	}))
	if gi == nil {
		b.Delete(key1(keyGroupInfo))
		return
	}
	b.Set(key1(keyGroupInfo), codec.Marshal(gi))
}

// LoadPublicGroup restores a group from what its operations wrote, as LoadGroup does.
func LoadPublicGroup(cfg PublicConfig, state iter.Seq2[[]byte, []byte]) (*PublicGroup, error) {
	in, err := readEntries(state)
	if err != nil {
		return nil, err
	}
	if in.header.kind != kindPublicGroup {
		return nil, fmt.Errorf("%w: not a public group", errState)
	}
	g := &PublicGroup{rules: cfg.rules()}
	if g.state, err = in.publicState(); err != nil {
		return nil, err
	}
	if in.groupInfo != nil {
		g.info = new(GroupInfo)
		if err := codec.Unmarshal(in.groupInfo, g.info); err != nil {
			return nil, fmt.Errorf("mls: load state: group info: %w", err)
		}
	}
	g.publish()
	return g, nil
}

// GroupID returns the group's identifier, which may not be changed.
func (g *PublicGroup) GroupID() []byte { return g.public().context.GroupID }

// Epoch returns the number of the current epoch.
func (g *PublicGroup) Epoch() uint64 { return g.public().context.Epoch }

// Suite returns the cipher suite.
func (g *PublicGroup) Suite() CipherSuite { return g.public().context.CipherSuite }

// Context returns the GroupContext of the current epoch, whose fields may not be changed.
func (g *PublicGroup) Context() GroupContext { return g.public().context }

// ConfirmationTag returns the confirmation tag of the commit that began the epoch.
func (g *PublicGroup) ConfirmationTag() []byte { return g.public().confirmationTag }

// Members returns the members in the order of their leaves.
func (g *PublicGroup) Members() iter.Seq[Member] { return g.public().members() }

// Member returns the member at a leaf.
func (g *PublicGroup) Member(i LeafIndex) (Member, bool) { return g.public().member(i) }

// Tree returns the ratchet tree of the current epoch. It stays as it is when the group moves on.
func (g *PublicGroup) Tree() *RatchetTree { return g.public().tree }

// Dictionary returns the GroupContext's application data, which may not be changed.
func (g *PublicGroup) Dictionary() AppDataDictionary { return g.public().dictionary() }

// Extension returns the data of an extension of the GroupContext, and whether there is one.
func (g *PublicGroup) Extension(t ExtensionType) ([]byte, bool) {
	return g.public().context.Extensions.Find(t)
}

// Pending returns the proposals of this epoch that no commit has applied.
func (g *PublicGroup) Pending() []PendingProposal { return g.public().pendingList() }

// GroupInfo returns the current epoch's GroupInfo as its committer signed it, for external joiners. The ratchet tree
// is in it only if it came with it.
func (g *PublicGroup) GroupInfo() *GroupInfo {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.info
}

// StagedProposal is a proposal that was checked.
type StagedProposal struct {
	epoch uint64
	entry *pendingEntry
	known bool
}

// Proposal returns the proposal with its reference and sender.
func (s *StagedProposal) Proposal() PendingProposal { return s.entry.PendingProposal }

// Known says that the proposal is pending already.
func (s *StagedProposal) Known() bool { return s.known }

// CheckProposal checks a proposal of a member, of an external sender or, if the configuration allows it, of a new
// member, and changes nothing (RFC 9420, Sections 12.1 and 12.1.8). It fails with ErrEpoch, ErrEnded, ErrSignature,
// ErrMalformed for what isn't a proposal to this group, and a ValidationError that names the rule it breaks.
func (g *PublicGroup) CheckProposal(m *PublicMessage) (*StagedProposal, error) {
	g.op.Lock()
	defer g.done()
	s, err := g.checkProposal(m.authenticated(), m.MembershipTag)
	if err != nil {
		return nil, fmt.Errorf("mls: check proposal: %w", err)
	}
	return s, nil
}

func (g *PublicGroup) checkProposal(ac *AuthenticatedContent, tag []byte) (*StagedProposal, error) {
	c := &ac.Content
	if c.ContentType != ContentProposal || c.Proposal == nil {
		return nil, fmt.Errorf("%w: content type %d", ErrMalformed, c.ContentType)
	}
	if err := g.state.checkPlace(c.GroupID, c.Epoch); err != nil {
		return nil, err
	}
	ref := ac.ref(g.state.suite())
	if e := g.state.findPending(ref); e != nil {
		return &StagedProposal{epoch: g.state.context.Epoch, entry: e, known: true}, nil
	}
	if len(g.state.pending) >= maxPending {
		return nil, fmt.Errorf("%w: %d proposals pending", ErrMalformed, maxPending)
	}
	if err := g.state.verifyContent(&g.rules, ac); err != nil {
		return nil, err
	}
	p := PendingProposal{Ref: ref, Sender: c.Sender, Proposal: *c.Proposal}
	if err := g.state.checkAlone(&g.rules, &resolved{PendingProposal: p}); err != nil {
		return nil, err
	}
	e := &pendingEntry{PendingProposal: p}
	if err := e.keepMessage(ac, tag); err != nil {
		return nil, err
	}
	return &StagedProposal{epoch: g.state.context.Epoch, entry: e}, nil
}

// ApplyProposal notes a checked proposal as pending. It fails with ErrEpoch if the group has moved on since.
func (g *PublicGroup) ApplyProposal(b Batch, s *StagedProposal) error {
	g.op.Lock()
	defer g.done()
	if s.epoch != g.state.context.Epoch {
		return fmt.Errorf("mls: apply proposal: %w: got %d, want %d", ErrEpoch, s.epoch, g.state.context.Epoch)
	}
	if s.known || g.state.findPending(s.entry.Ref) != nil {
		return nil
	}
	g.state.addPending(orDiscard(b), s.entry)
	return nil
}

// StagedPublic is a commit that was checked.
type StagedPublic struct {
	evolution *evolution
}

// Info says what the commit does.
func (s *StagedPublic) Info() *StagedInfo { return &s.evolution.info }

// Tree returns the ratchet tree to which the commit leads.
func (s *StagedPublic) Tree() *RatchetTree { return s.evolution.tree }

// CheckCommit checks a commit as far as public data shows, and changes nothing (RFC 9420, Sections 12.2, 12.4.2 and
// 12.4.3.2). It fails with ErrEpoch, ErrEnded, ErrSignature, ErrMalformed for what isn't a commit to this group, and a
// ValidationError that names the rule it breaks.
func (g *PublicGroup) CheckCommit(m *PublicMessage) (*StagedPublic, error) {
	g.op.Lock()
	defer g.done()
	s, err := g.checkCommit(m.authenticated())
	if err != nil {
		return nil, fmt.Errorf("mls: check commit: %w", err)
	}
	return s, nil
}

func (g *PublicGroup) checkCommit(ac *AuthenticatedContent) (*StagedPublic, error) {
	c := &ac.Content
	if c.ContentType != ContentCommit || c.Commit == nil {
		return nil, fmt.Errorf("%w: content type %d", ErrMalformed, c.ContentType)
	}
	if err := g.state.checkPlace(c.GroupID, c.Epoch); err != nil {
		return nil, err
	}
	if err := g.state.verifyContent(&g.rules, ac); err != nil {
		return nil, err
	}
	e, err := g.state.stage(&g.rules, ac)
	if err != nil {
		return nil, err
	}
	if err := g.state.seal(&g.rules, e, ac.ConfirmationTag); err != nil {
		return nil, err
	}
	return &StagedPublic{evolution: e}, nil
}

// GroupInfo returns the GroupInfo of the epoch to which the commit leads, with what only the committer knows of it. It is to
// be checked with CheckGroupInfo.
func (s *StagedPublic) GroupInfo(extensions Extensions, signature []byte) *GroupInfo {
	e := s.evolution
	return &GroupInfo{
		GroupContext: e.context, Extensions: extensions, ConfirmationTag: e.tag, Signer: e.info.Committer, Signature: signature,
	}
}

// CheckGroupInfo checks the GroupInfo that the committer sends with the commit: its context, its confirmation tag and
// its ratchet tree, if there is one, must be those that the commit leads to, and its signature the committer's new
// leaf's. That its key for external commits is the epoch's can't be seen from outside.
func (s *StagedPublic) CheckGroupInfo(gi *GroupInfo) error {
	e := s.evolution
	if !bytes.Equal(codec.Marshal(gi.GroupContext), e.encoded) {
		return fmt.Errorf("mls: check group info: %w", invalid("12.4.3", "group context differs from the commit's"))
	}
	if !bytes.Equal(gi.ConfirmationTag, e.tag) {
		return fmt.Errorf("mls: check group info: %w", ErrConfirmationTag)
	}
	if gi.Signer != e.info.Committer {
		return fmt.Errorf("mls: check group info: %w", invalid("12.4.3", "signed by leaf %d, committer is %d", gi.Signer, e.info.Committer))
	}
	if err := gi.Extensions.validate(); err != nil {
		return fmt.Errorf("mls: check group info: %w", err)
	}
	if err := gi.Verify(e.tree.signatureKey(gi.Signer)); err != nil {
		return fmt.Errorf("mls: check group info: %w", err)
	}
	if _, ok := gi.Extensions.Find(ExtensionExternalPub); ok {
		pub, _ := gi.ExternalPub()
		if err := e.context.CipherSuite.checkHPKEPublicKey(pub); err != nil {
			return fmt.Errorf("mls: check group info: %w", invalid("12.4.3.2", "key for external commits", err))
		}
	}
	tree, err := gi.RatchetTree()
	if err != nil {
		return fmt.Errorf("mls: check group info: %w", invalid("12.4.3.3", "ratchet tree", err))
	}
	if tree != nil {
		return s.CheckTree(tree)
	}
	return nil
}

// CheckTree says whether t is the ratchet tree to which the commit leads.
func (s *StagedPublic) CheckTree(t *RatchetTree) error {
	if !bytes.Equal(t.Hash(s.evolution.context.CipherSuite), s.evolution.context.TreeHash) {
		return fmt.Errorf("mls: check tree: %w", invalid("12.4.3", "tree differs from the commit's"))
	}
	return nil
}

// Apply moves the group to the commit's epoch, writes what changed, and keeps gi, which CheckGroupInfo has accepted,
// for external joiners. Without gi, which may be nil, nobody can join by an external commit in this epoch. It fails with
// ErrEpoch if the group has moved on since the commit was checked.
func (g *PublicGroup) Apply(b Batch, s *StagedPublic, gi *GroupInfo) error {
	g.op.Lock()
	defer g.done()
	e := s.evolution
	if err := e.fits(&g.state); err != nil {
		return fmt.Errorf("mls: apply: %w", err)
	}
	b = orDiscard(b)
	for _, p := range g.state.pending {
		b.Delete(key32(keyPending, p.number))
	}
	before := g.state.extEpoch
	g.state.adopt(e)
	g.state.saveReInit(b)
	saveNodes(b, g.state.tree)
	if g.state.extEpoch != before {
		b.Delete(key64(keyExtensions, before))
		g.state.saveExtensions(b)
	}
	g.saveEpoch(b, gi)
	return nil
}
