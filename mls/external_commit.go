package mls

import (
	"bytes"
	"crypto"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// ExternalJoinOptions says how to join by an external commit.
type ExternalJoinOptions struct {
	redact
	GroupInfo *GroupInfo   // must have the key for external commits
	Tree      *RatchetTree // nil if the GroupInfo carries it; belongs to the group from then on

	Credential     Credential
	Signer         crypto.Signer
	Capabilities   Capabilities // zero: DefaultCapabilities and random reserved values (RFC 9420, Section 13.5)
	LeafExtensions Extensions
	// Proposals are committed by value: at most one Remove, of this client's former leaf, and any PreSharedKey and
	// AppDataUpdate.
	Proposals []Proposal
	// SelfRemoves are the epoch's pending ones, from whom the GroupInfo comes. They are checked but for their membership
	// tags and committed by reference (draft-ietf-mls-extensions, Section 6.3). A Remove of such a member is left out.
	SelfRemoves []*MLSMessage
	AAD         []byte
}

// PendingJoin is an external commit that was made and not yet accepted. The group exists once it was: Confirm gives
// it. Its encoding, which LoadPendingJoin reads, holds secrets: it belongs where its deletion erases it, see Erasable.
type PendingJoin struct {
	redact
	cfg     Config
	signer  crypto.Signer
	message *MLSMessage
	info    *GroupInfo
	tree    *RatchetTree
	secrets *epochSecrets
	private *treePrivate
	staged  *StagedInfo // nil after LoadPendingJoin
	resync  bool        // it replaces a Group's state, and is confirmed by that
}

// Message returns the external commit, a PublicMessage.
func (p *PendingJoin) Message() *MLSMessage { return p.message }

// GroupInfo returns the description of the new epoch, without the ratchet tree.
func (p *PendingJoin) GroupInfo() *GroupInfo { return p.info }

// Tree returns the ratchet tree of the new epoch.
func (p *PendingJoin) Tree() *RatchetTree { return p.tree }

// Info says what the commit does; nil after LoadPendingJoin.
func (p *PendingJoin) Info() *StagedInfo { return p.staged }

// Epoch returns the number of the new epoch.
func (p *PendingJoin) Epoch() uint64 { return p.info.GroupContext.Epoch }

// ExternalJoin makes an external commit (RFC 9420, Section 12.4.3.2). It fails with ErrSignature if the GroupInfo's
// doesn't verify, and with a ValidationError for what else it, the tree or the options break; o.GroupInfo isn't
// changed.
func ExternalJoin(cfg Config, o ExternalJoinOptions) (*PendingJoin, error) {
	p, err := externalJoin(cfg, o, nil)
	if err != nil {
		return nil, fmt.Errorf("mls: external join: %w", err)
	}
	return p, nil
}

// externalJoin makes an external commit, and if a state is given that it replaces, with a Remove of that client.
func externalJoin(cfg Config, o ExternalJoinOptions, former *Group) (*PendingJoin, error) {
	r := cfg.rules()
	r.now = cfg.now
	state, err := checkGroupInfo(&r, o.GroupInfo, o.Tree)
	if err != nil {
		return nil, err
	}
	var resumption func(PreSharedKeyID) secret
	if former != nil {
		resumption = former.resumption
		i, err := former.formerLeaf(state.tree)
		if err != nil {
			return nil, err
		}
		o.Proposals = append([]Proposal{{Type: ProposalRemove, Remove: &Remove{Removed: i}}}, o.Proposals...)
	}
	ctx := o.GroupInfo.GroupContext
	cs, rand := ctx.CipherSuite, cfg.rand()
	externalPub, ok := o.GroupInfo.ExternalPub()
	if !ok {
		return nil, invalid("12.4.3.2", "group info without a key for external commits")
	}
	kemOutput, init, err := cs.externalInitSend(rand, externalPub)
	if err != nil {
		return nil, err
	}
	if err := state.takeSelfRemoves(&r, o.SelfRemoves); err != nil {
		return nil, fmt.Errorf("self_remove: %w", err)
	}
	sender := Sender{Type: SenderNewMemberCommit}
	var list []resolved
	for _, e := range state.pending {
		list = append(list, resolved{PendingProposal: e.PendingProposal, verified: true})
	}
	var ids []PreSharedKeyID
	for _, prop := range append([]Proposal{{Type: ProposalExternalInit, ExternalInit: &ExternalInit{KEMOutput: kemOutput}}}, o.Proposals...) {
		if rm := prop.Remove; rm != nil && state.selfRemoveOf(rm.Removed) != nil {
			continue
		}
		if prop, err = fillNonce(cs, rand, prop); err != nil {
			return nil, err
		}
		list = append(list, resolved{PendingProposal: PendingProposal{Sender: sender, Proposal: prop}})
		if prop.PSK != nil {
			ids = append(ids, prop.PSK.PSK)
		}
	}
	commit := &Commit{Proposals: proposalOrRefs(list)}
	e, err := state.applyProposals(&r, list, 0, true)
	if err != nil {
		return nil, err
	}
	psk, err := derivePSK(cfg, cs, ids, resumption)
	if err != nil {
		return nil, err
	}
	defer psk.erase()
	signatureKey, err := cs.SignaturePublicKey(o.Signer.Public())
	if err != nil {
		return nil, err
	}
	grease := o.Capabilities.isZero()
	if grease {
		if o.Capabilities, err = defaultCapabilities(cs).grease(rand); err != nil {
			return nil, err
		}
	}
	if o.LeafExtensions, err = describeClient(rand, o.Capabilities, o.LeafExtensions, grease); err != nil {
		return nil, err
	}
	aad, err := state.frameAAD(o.AAD)
	if err != nil {
		return nil, err
	}
	template := &LeafNode{
		SignatureKey: signatureKey, Credential: o.Credential, Capabilities: o.Capabilities, Extensions: o.LeafExtensions,
		EncryptionKey: HPKEPublicKey{}, Source: LeafNodeCommit,
	}
	if err := template.validateStatic(); err != nil {
		return nil, err
	}
	if err := checkLeafFits(template, e.rules); err != nil {
		return nil, err
	}
	if err := e.rules.terms.checkMediaTypes(template); err != nil {
		return nil, err
	}
	old := e.replaced()
	if err := r.checkCredential(cs, template, old); err != nil {
		return nil, err
	}
	if !e.tree.hasRoom(1) {
		return nil, errFull()
	}
	e.committer = e.tree.addLeaf(template)
	path, err := e.tree.generatePath(cs, rand, e.committer, template, ctx.GroupID, o.Signer)
	if err != nil {
		return nil, err
	}
	e.setPathLeaf(old)
	if err := state.checkTree(&r, e); err != nil {
		return nil, err
	}
	if commit.Path, err = path.encrypt(rand, e.tree, nil, e.provisional()); err != nil {
		return nil, err
	}
	ac, err := signContent(cs, rand, o.Signer, WireFormatPublicMessage, FramedContent{
		GroupID: ctx.GroupID, Epoch: ctx.Epoch, Sender: sender, AuthenticatedData: aad,
		ContentType: ContentCommit, Commit: commit,
	}, state.encoded)
	if err != nil {
		return nil, err
	}
	state.advance(e, ac)
	defer path.erase()
	joiner := cs.joinerSecret(init, path.commitSecret, e.encoded)
	init.erase()
	es := cs.epochSecrets(joiner, psk, e.encoded)
	joiner.erase()
	ac.ConfirmationTag = es.confirmationTag(cs, e.context.ConfirmedTranscriptHash)
	if err := state.seal(&r, e, ac.ConfirmationTag); err != nil {
		return nil, err
	}
	m, err := protectPublic(cs, ac, nil, state.encoded)
	if err != nil {
		return nil, err
	}
	gi := &GroupInfo{GroupContext: e.context, ConfirmationTag: e.tag, Signer: e.committer}
	if gi.Extensions, err = setExternalPub(nil, cs, es); err != nil {
		return nil, err
	}
	if err := gi.sign(rand, o.Signer); err != nil {
		return nil, err
	}
	return &PendingJoin{
		cfg: cfg, signer: o.Signer, message: NewMLSMessage(m), info: gi, tree: e.tree, secrets: es,
		private: path.private, staged: &e.info, resync: former != nil,
	}, nil
}

// newLeaf returns the joiner's leaf in the new epoch.
func (p *PendingJoin) newLeaf() *LeafNode { return p.tree.Leaf(p.private.leaf) }

// Confirm returns the group, after the commit was accepted, and writes its state. It is called again only if what it
// wrote couldn't be made durable. It fails with ErrSigner for another signer than the new leaf's. A Resync is confirmed
// by its group: here the error is ErrResync.
func (p *PendingJoin) Confirm(b Batch) (*Group, error) {
	if p.resync {
		return nil, fmt.Errorf("mls: confirm join: %w: the group confirms it", ErrResync)
	}
	g, err := p.group(p.signer)
	if err != nil {
		return nil, fmt.Errorf("mls: confirm join: %w", err)
	}
	g.saveAll(orDiscard(b))
	return g, nil
}

// group is the group in its first epoch for this client.
func (p *PendingJoin) group(signer crypto.Signer) (*Group, error) {
	g := &Group{
		cfg: p.cfg, state: newPublicState(p.info.GroupContext, p.tree, p.info.ConfirmationTag),
		own: p.private.leaf, active: true, private: p.private.copy(), signers: make(map[string]crypto.Signer),
		entrance: entrance{joined: p.Epoch()},
	}
	if err := g.AddSigner(signer); err != nil {
		return nil, err
	}
	if _, err := g.signer(); err != nil {
		return nil, err
	}
	sealers, err := p.cfg.newSealers()
	if err != nil {
		return nil, err
	}
	g.start(p.secrets.clone(), sealers)
	return g, nil
}

// erase overwrites its secrets in memory, of which the group has copies.
func (p *PendingJoin) erase() {
	p.private.erase(new(treePrivate))
	p.secrets.erase()
}

// MarshalMLS implements codec.Marshaler, for the store.
func (p *PendingJoin) MarshalMLS(w *codec.Writer) {
	w.Uint16(stateFormat)
	p.message.MarshalMLS(w)
	p.info.MarshalMLS(w)
	p.tree.MarshalMLS(w)
	p.secrets.MarshalMLS(w)
	p.private.MarshalMLS(w)
	if p.secrets.applicationExport != nil {
		w.Opaque(p.secrets.applicationExport)
	}
}

// LoadPendingJoin restores a PendingJoin from its encoding. signer is that of the new leaf.
func LoadPendingJoin(cfg Config, signer crypto.Signer, b []byte) (*PendingJoin, error) {
	p := &PendingJoin{
		cfg: cfg, signer: signer, message: new(MLSMessage), info: new(GroupInfo), tree: new(RatchetTree),
		secrets: new(epochSecrets), private: new(treePrivate),
	}
	r := codec.NewReader(b)
	if f := r.Uint16(); r.Err() == nil && !knownFormat(f) {
		return nil, fmt.Errorf("mls: load pending join: %w: state format %d", ErrUnsupported, f)
	}
	p.message.UnmarshalMLS(r)
	p.info.UnmarshalMLS(r)
	p.tree.UnmarshalMLS(r)
	p.secrets.UnmarshalMLS(r)
	p.private.UnmarshalMLS(r)
	if r.Len() > 0 { // format 1 has none
		p.secrets.applicationExport = r.Opaque()
	}
	if err := r.Finish(); err != nil {
		return nil, fmt.Errorf("mls: load pending join: %w", err)
	}
	if ctx := &p.info.GroupContext; !p.tree.occupied(p.private.leaf) || !ctx.CipherSuite.Supported() ||
		!bytes.Equal(p.tree.Hash(ctx.CipherSuite), ctx.TreeHash) {
		return nil, fmt.Errorf("mls: load pending join: %w", errState)
	}
	return p, nil
}
