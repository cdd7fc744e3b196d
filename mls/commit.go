package mls

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// CommitOptions says what a commit contains.
type CommitOptions struct {
	redact
	// Proposals are committed by value, after the pending ones, or alone if one of them is a ReInit. A PreSharedKey
	// without a nonce gets a fresh one. A Remove of a member whose SelfRemove is pending is left out.
	Proposals []Proposal
	// SkipPending leaves the pending proposals out; else all that are valid together, and aren't disregarded, are committed by
	// reference.
	SkipPending bool
	// ForcePath gives the commit a path even if its proposals need none.
	ForcePath bool
	// Credential and Signer replace those of the own leaf; either makes a path necessary.
	Credential *Credential
	Signer     crypto.Signer
	// TreeInWelcome puts the ratchet tree into the Welcome's GroupInfo.
	TreeInWelcome bool
	// NoExternalPub leaves the key for external commits out of the GroupInfo.
	NoExternalPub bool
	// AAD is authenticated with the commit, in the clear.
	AAD []byte
}

// PendingCommit is an own commit that was made and not yet accepted by whoever orders the group's messages.
type PendingCommit struct {
	redact
	message   *MLSMessage
	content   *AuthenticatedContent // of the message
	hash      [sha256.Size]byte     // of the encoded message
	welcome   *Welcome
	groupInfo *GroupInfo
	evolution *evolution
	secrets   *epochSecrets // of the new epoch
	private   *treePrivate
	signer    crypto.Signer // nil if it stays
}

// Message returns the commit, in the format of Config.HandshakeFormat.
func (c *PendingCommit) Message() *MLSMessage { return c.message }

// Welcome returns what the new members need, nil if there are none.
func (c *PendingCommit) Welcome() *Welcome { return c.welcome }

// GroupInfo returns the description of the new epoch, without the ratchet tree.
func (c *PendingCommit) GroupInfo() *GroupInfo { return c.groupInfo }

// Tree returns the ratchet tree of the new epoch.
func (c *PendingCommit) Tree() *RatchetTree { return c.evolution.tree }

// Info says what the commit does.
func (c *PendingCommit) Info() *StagedInfo { return &c.evolution.info }

// Epoch returns the number of the new epoch.
func (c *PendingCommit) Epoch() uint64 { return c.evolution.context.Epoch }

// PendingCommit returns the staged own commit, nil if there is none.
func (g *Group) PendingCommit() *PendingCommit {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.staged
}

// Commit makes a commit and stages it: the group stays as it is until Confirm or Drop (RFC 9420, Section 12.4.1). The
// staged commit is in the Batch, so that it survives a restart. It fails with ErrStaged if one is staged already, with
// a ValidationError if o.Proposals can't be committed, and with ErrRemoved, ErrEnded, ErrResync and ErrSigner. Pending
// proposals that don't go with the others are left out.
func (g *Group) Commit(b Batch, o CommitOptions) (*PendingCommit, error) {
	g.op.Lock()
	defer g.done()
	b = orDiscard(b)
	c, err := g.commit(b, o)
	if err != nil {
		return nil, fmt.Errorf("mls: commit: %w", err)
	}
	g.staged = c
	g.saveStaged(b)
	if c.signer != nil {
		g.signers[string(c.evolution.info.PathLeaf.SignatureKey)] = c.signer
	}
	return c, nil
}

func (g *Group) saveStaged(b Batch) {
	g.sealer.seal(b).Set(key1(keyStaged), codec.Marshal(g.staged))
}

func (g *Group) commit(b Batch, o CommitOptions) (*PendingCommit, error) {
	if err := g.live(); err != nil {
		return nil, err
	}
	if g.staged != nil {
		return nil, fmt.Errorf("%w: another one waits", ErrStaged)
	}
	signer, err := g.signer()
	if err != nil {
		return nil, err
	}
	r := g.sendingRules()
	e, refs, err := g.prepare(&r, o)
	if err != nil {
		return nil, err
	}
	cs, rand := g.suite(), g.cfg.rand()
	psk, ids, err := g.pskSecret(e.list)
	if err != nil {
		return nil, err
	}
	defer psk.erase()
	c := &PendingCommit{evolution: e, signer: o.Signer}
	newSigner := signer
	commit := &Commit{Proposals: refs}
	commitSecret := cs.zeroSecret()
	var path *newPath
	c.private = g.private.clone()
	if o.ForcePath || o.Credential != nil || o.Signer != nil || pathRequired(e.list) {
		old := e.tree.Leaf(g.own)
		template, s, err := g.nextLeaf(o.Credential, o.Signer)
		if err != nil {
			return nil, err
		}
		newSigner = s
		if path, err = e.tree.generatePath(cs, rand, g.own, template, g.state.context.GroupID, s); err != nil {
			return nil, err
		}
		if err := checkLeafFits(template, e.rules); err != nil {
			return nil, err
		}
		if err := r.checkCredential(cs, path.leaf, old); err != nil {
			return nil, err
		}
		e.setPathLeaf(old)
		defer path.erase()
		c.private, commitSecret = path.private, path.commitSecret
	}
	c.private.prune(e.tree)
	if err := g.state.checkTree(&r, e); err != nil {
		return nil, err
	}
	if path != nil {
		if commit.Path, err = path.encrypt(rand, e.tree, e.added, e.provisional()); err != nil {
			return nil, err
		}
	}
	ac, err := g.signHandshake(signer, o.AAD, FramedContent{ContentType: ContentCommit, Commit: commit})
	if err != nil {
		return nil, err
	}
	g.state.advance(e, ac)
	joiner := cs.joinerSecret(g.secrets.init, commitSecret, e.encoded)
	defer joiner.erase()
	c.secrets = cs.epochSecrets(joiner, psk, e.encoded)
	ac.ConfirmationTag = c.secrets.confirmationTag(cs, e.context.ConfirmedTranscriptHash)
	if err := g.state.seal(&r, e, ac.ConfirmationTag); err != nil {
		return nil, err
	}
	if err := c.describe(g.cfg, o, newSigner, path, joiner, psk, ids); err != nil {
		return nil, err
	}
	m, err := g.frame(b, ac) // last, since it may use a key up
	if err != nil {
		return nil, err
	}
	c.setMessage(m, ac)
	return c, nil
}

func (c *PendingCommit) setMessage(m *MLSMessage, ac *AuthenticatedContent) {
	c.message, c.content, c.hash = m, ac, messageHash(m)
}

// messageHash names a commit.
func messageHash(m *MLSMessage) [sha256.Size]byte {
	w := codec.Scratch()
	defer w.Free()
	m.MarshalMLS(w)
	return sha256.Sum256(w.Bytes())
}

// describe makes the GroupInfo of the new epoch, and the Welcome if there are new members.
func (c *PendingCommit) describe(cfg Config, o CommitOptions, signer crypto.Signer, path *newPath, joiner, psk secret, ids []PreSharedKeyID) error {
	e, cs := c.evolution, c.evolution.context.CipherSuite
	gi := &GroupInfo{GroupContext: e.context, ConfirmationTag: e.tag, Signer: e.committer}
	if !o.NoExternalPub {
		var err error
		if gi.Extensions, err = setExternalPub(nil, cs, c.secrets); err != nil {
			return err
		}
	}
	if err := gi.sign(cfg.rand(), signer); err != nil {
		return err
	}
	c.groupInfo = gi
	if len(e.adds) == 0 {
		return nil
	}
	if o.TreeInWelcome {
		full := *gi
		full.Extensions = gi.Extensions.Set(ExtensionRatchetTree, codec.Marshal(e.tree))
		if err := full.sign(cfg.rand(), signer); err != nil {
			return err
		}
		gi = &full
	}
	members := make([]welcomeMember, len(e.adds))
	for i, kp := range e.adds {
		members[i].kp = kp
		if path != nil {
			members[i].pathSecret = path.secretFor(e.added[i])
		}
	}
	w, err := newWelcome(cs, cfg.rand(), gi, joiner, psk, members, ids)
	if err != nil {
		return err
	}
	c.welcome = w
	return nil
}

// prepare chooses the proposals and applies them.
func (g *Group) prepare(r *rules, o CommitOptions) (*evolution, []ProposalOrRef, error) {
	sender := Sender{Type: SenderMember, Leaf: g.own}
	values := make([]resolved, 0, len(o.Proposals))
	var leaving []LeafIndex
	for _, prop := range o.Proposals {
		if rm := prop.Remove; rm != nil && !o.SkipPending && rm.Removed != g.own && g.state.selfRemoveOf(rm.Removed) != nil {
			leaving = append(leaving, rm.Removed)
			continue
		}
		prop, err := fillNonce(g.suite(), g.cfg.rand(), prop)
		if err != nil {
			return nil, nil, err
		}
		values = append(values, resolved{PendingProposal: PendingProposal{Sender: sender, Proposal: prop}})
	}
	var pending []resolved
	if !o.SkipPending && !slices.ContainsFunc(o.Proposals, func(p Proposal) bool { return p.Type == ProposalReInit }) {
		pending = g.candidates(values)
	}
	e, err := g.try(r, slices.Concat(pending, values))
	if err != nil && len(pending) > 0 {
		if e, err = g.try(r, values); err != nil {
			return nil, nil, err
		}
		for i := range values {
			values[i].verified = true
		}
		e = g.takeValid(r, e, pending, values)
	}
	if err != nil {
		return nil, nil, err
	}
	for _, i := range leaving {
		if bytes.Equal(e.tree.node(i.node()), e.info.TreeBefore.node(i.node())) {
			return nil, nil, invalidBy(sectionSelfRemove, "leaf %d removes itself by a proposal that can't be committed", i)
		}
	}
	return e, proposalOrRefs(e.list), nil
}

func proposalOrRefs(list []resolved) []ProposalOrRef {
	refs := make([]ProposalOrRef, len(list))
	for i := range list {
		if list[i].Ref != nil {
			refs[i].Reference = list[i].Ref
		} else {
			refs[i].Proposal = &list[i].Proposal
		}
	}
	return refs
}

// maxTried bounds how many proposals, counted each time, a committer tries whether they go together: a flood of them
// takes about a second. Any number of bad ones among few good ones is found.
const maxTried = 1 << 18

// takeValid is for pending proposals that don't all go together. It takes as many as it finds to, in their order: halves
// of the list that don't go with what was taken are halved again.
func (g *Group) takeValid(r *rules, e *evolution, pending, values []resolved) *evolution {
	var taken []resolved
	var take func(part []resolved)
	tried := 0
	take = func(part []resolved) {
		if tried += len(taken) + len(part) + len(values); tried > maxTried {
			return
		}
		next := slices.Concat(taken, part)
		if more, err := g.try(r, slices.Concat(next, values)); err == nil {
			taken, e = next, more
		} else if n := len(part) / 2; n > 0 {
			take(part[:n])
			take(part[n:])
		}
	}
	half := len(pending) / 2
	take(pending[:half])
	take(pending[half:])
	return e
}

// try applies a list of proposals, and says whether a commit of them would be valid but for its path.
func (g *Group) try(r *rules, list []resolved) (*evolution, error) {
	e, err := g.state.applyProposals(r, list, g.own, false)
	if err != nil {
		return nil, err
	}
	psk, _, err := g.pskSecret(list)
	if err != nil {
		return nil, err
	}
	psk.erase()
	before, err := g.state.contextRules()
	if err != nil {
		return nil, err
	}
	if err := e.checkMediaTypes(&before.terms); err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return e, nil
	}
	if err := g.state.checkTree(r, e); err != nil {
		return nil, err
	}
	if r.policy != nil {
		if err := r.policy(&e.info); err != nil {
			return nil, fmt.Errorf("mls: policy: %w", err)
		}
	}
	return e, nil
}

// candidates are the pending proposals that this client may commit, without those that others supersede: a SelfRemove
// goes before a Remove of the same leaf, a Remove before an Update, a later Update before an earlier one, and anything
// before a ReInit (RFC 9420, Section 12.2; draft-ietf-mls-extensions, Section 6.3).
func (g *Group) candidates(values []resolved) []resolved {
	removed := make(map[LeafIndex]bool)
	for i := range values {
		if rm := values[i].Proposal.Remove; rm != nil {
			removed[rm.Removed] = true
		}
	}
	pending := g.due()
	drop := make(map[int]bool)
	for i, e := range pending {
		if e.Proposal.Type == ProposalSelfRemove {
			drop[i] = e.Sender.Leaf == g.own || removed[e.Sender.Leaf]
			removed[e.Sender.Leaf] = true
		}
	}
	last := make(map[LeafIndex]int)
	for i, e := range pending {
		switch e.Proposal.Type {
		case ProposalRemove:
			at := e.Proposal.Remove.Removed
			drop[i] = at == g.own || removed[at]
			removed[at] = true
		case ProposalUpdate:
			if before, ok := last[e.Sender.Leaf]; ok {
				drop[before] = true
			}
			last[e.Sender.Leaf] = i
			drop[i] = e.Sender.Leaf == g.own
		}
	}
	var out, reinits []resolved
	for i, e := range pending {
		if drop[i] || e.Proposal.Type == ProposalUpdate && removed[e.Sender.Leaf] {
			continue
		}
		entry := resolved{PendingProposal: e.PendingProposal, verified: true, private: e.private}
		if e.Proposal.Type == ProposalReInit {
			reinits = append(reinits, entry)
		} else {
			out = append(out, entry)
		}
	}
	if len(out)+len(values) == 0 && len(reinits) > 0 {
		return reinits[:1]
	}
	return out
}

// due are the pending proposals without those that the application disregards.
func (g *Group) due() []*pendingEntry {
	if g.disregard == nil {
		return g.state.pending
	}
	return slices.DeleteFunc(slices.Clone(g.state.pending), func(e *pendingEntry) bool { return g.disregard(e.PendingProposal) })
}

// pskSecret finds the keys of a commit's PreSharedKey proposals, in their order.
func (g *Group) pskSecret(list []resolved) (secret, []PreSharedKeyID, error) {
	var ids []PreSharedKeyID
	for i := range list {
		if p := list[i].Proposal.PSK; p != nil {
			ids = append(ids, p.PSK)
		}
	}
	psk, err := derivePSK(g.cfg, g.suite(), ids, g.resumption)
	return psk, ids, err
}

// resumption finds a resumption key of this group, or of the one that it follows from.
func (g *Group) resumption(id PreSharedKeyID) secret {
	if g.link != nil && id.linked() {
		return g.link.parent.resumption(id)
	}
	g.mu.RLock() // another group's change may ask
	defer g.mu.RUnlock()
	v := &g.view
	if !v.active || !bytes.Equal(id.GroupID, v.state.context.GroupID) {
		return nil
	}
	if id.Epoch == v.state.context.Epoch {
		return bytes.Clone(v.secrets.resumption)
	}
	if e := findPast(&g.cfg, v.past, id.Epoch); e != nil {
		return bytes.Clone(e.resumption)
	}
	return nil
}

// derivePSK computes the psk_secret (RFC 9420, Section 8.4).
func derivePSK(cfg Config, cs CipherSuite, ids []PreSharedKeyID, resumption func(PreSharedKeyID) secret) (secret, error) {
	in := make([]pskInput, len(ids))
	for i, id := range ids {
		in[i].id = id
		if id.Type == PSKResumption && resumption != nil {
			in[i].psk = resumption(id)
		}
		if id.Type == PSKResumption && id.Usage == UsageApplication && in[i].psk == nil && cfg.Group != nil {
			if other := cfg.Group(id.GroupID); other != nil {
				in[i].psk = other.resumption(id)
			}
		}
		if in[i].psk != nil {
			defer in[i].psk.erase()
			continue
		}
		if cfg.PSK == nil {
			return nil, invalid("12.4.2", "pre-shared key is not available")
		}
		psk, err := cfg.PSK(id)
		if err != nil {
			return nil, invalid("12.4.2", "pre-shared key is not available", err)
		}
		in[i].psk = psk
	}
	return cs.pskSecret(in)
}

// MarshalMLS implements codec.Marshaler, for the store. The public state that the commit leads to is computed anew
// when it is loaded, from the message's content; of a PrivateMessage, whose key is deleted, that is stored too.
func (c *PendingCommit) MarshalMLS(w *codec.Writer) {
	c.message.MarshalMLS(w)
	if c.message.Public == nil {
		c.content.MarshalMLS(w)
	}
	w.Optional(c.welcome != nil)
	if c.welcome != nil {
		c.welcome.MarshalMLS(w)
	}
	c.groupInfo.MarshalMLS(w)
	c.secrets.MarshalMLS(w)
	c.private.MarshalMLS(w)
	if c.secrets.applicationExport != nil {
		w.Opaque(c.secrets.applicationExport)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *PendingCommit) UnmarshalMLS(r *codec.Reader) {
	m := new(MLSMessage)
	m.UnmarshalMLS(r)
	ac := new(AuthenticatedContent)
	switch {
	case r.Err() != nil:
		return
	case m.Public != nil:
		ac = m.Public.authenticated()
	case m.Private != nil, m.SemiPrivate != nil:
		ac.UnmarshalMLS(r)
	}
	if r.Err() == nil && ac.Content.Commit == nil {
		r.Fail(errState)
		return
	}
	if r.Optional() {
		c.welcome = new(Welcome)
		c.welcome.UnmarshalMLS(r)
	}
	c.groupInfo = new(GroupInfo)
	c.groupInfo.UnmarshalMLS(r)
	c.secrets = new(epochSecrets)
	c.secrets.UnmarshalMLS(r)
	c.private = new(treePrivate)
	c.private.UnmarshalMLS(r)
	if r.Len() > 0 { // format 1 has none
		c.secrets.applicationExport = r.Opaque()
	}
	if r.Err() == nil {
		c.setMessage(m, ac)
	}
}

func (g *Group) loadPendingCommit(b []byte) (*PendingCommit, error) {
	c := new(PendingCommit)
	if err := codec.Unmarshal(b, c); err != nil {
		return nil, err
	}
	r := g.cfg.rules()
	r.replay = true
	ac := c.content
	e, err := g.state.stage(&r, ac)
	if err != nil {
		return nil, err
	}
	if err := g.state.seal(&r, e, ac.ConfirmationTag); err != nil {
		return nil, err
	}
	if !bytes.Equal(e.encoded, codec.Marshal(c.groupInfo.GroupContext)) {
		return nil, errors.New("leads to another epoch than when it was made")
	}
	c.evolution = e
	return c, nil
}

// Confirm applies the staged own commit or Resync, after it was accepted. It fails with ErrStaged if there is none, and
// a Resync with ErrSigner if the new leaf's signer isn't there (see AddSigner).
func (g *Group) Confirm(b Batch) error {
	g.op.Lock()
	defer g.done()
	if g.entrance.resync != nil {
		if err := g.confirmResync(orDiscard(b)); err != nil {
			return fmt.Errorf("mls: confirm: %w", err)
		}
		return nil
	}
	c := g.staged
	if c == nil {
		return fmt.Errorf("mls: confirm: %w: there is none", ErrStaged)
	}
	if err := c.evolution.fits(&g.state); err != nil {
		return fmt.Errorf("mls: confirm: %w", err)
	}
	sealers, err := g.cfg.newSealers()
	if err != nil {
		return fmt.Errorf("mls: confirm: %w", err)
	}
	g.advance(orDiscard(b), c.evolution, c.secrets, c.private, c.hash, sealers)
	return nil
}

// Drop forgets the staged own commit, after it was refused: the group is as before Commit, except that the key of a
// PrivateMessage stays used. Without one it does nothing.
func (g *Group) Drop(b Batch) error {
	g.op.Lock()
	defer g.done()
	if g.entrance.resync != nil {
		if key := g.entrance.resync.newLeaf().SignatureKey; !bytes.Equal(key, g.state.tree.Leaf(g.own).SignatureKey) {
			delete(g.signers, string(key))
		}
		g.entrance.resync.erase()
		g.entrance.resync = nil
		g.entrance.save(g.sealer.seal(orDiscard(b)))
		return nil
	}
	if g.staged == nil {
		return nil
	}
	orDiscard(b).Delete(key1(keyStaged))
	if s := g.staged.evolution.info.PathLeaf; s != nil && !bytes.Equal(s.SignatureKey, g.state.tree.signatureKey(g.own)) {
		delete(g.signers, string(s.SignatureKey))
	}
	g.staged.erase(g.private)
	g.staged = nil
	return nil
}

// erase overwrites in memory the secrets of a commit that won't be confirmed.
func (c *PendingCommit) erase(keep *treePrivate) {
	c.private.erase(keep)
	c.secrets.erase()
}

// advance moves the group to the next epoch and writes what changes.
func (g *Group) advance(b Batch, e *evolution, es *epochSecrets, private *treePrivate, commit [sha256.Size]byte, sealers epochSealers) {
	before := g.extensionEpochs()
	g.retire(b, e, commit)
	for _, p := range g.state.pending {
		b.Delete(key32(keyPending, p.number))
		if own := private.keys[g.own.node()]; len(p.private) > 0 && (len(own) == 0 || &own[0] != &p.private[0]) {
			secret(p.private).erase() // of an Update that the commit didn't take
		}
	}
	if g.staged != nil {
		b.Delete(key1(keyStaged))
		if g.staged.private != private {
			g.staged.erase(private)
		}
		g.staged = nil
	}
	g.state.adopt(e)
	g.state.saveReInit(b)
	g.private.erase(private)
	g.private = private
	g.exports.drop(b)
	g.sealer.erase()
	g.start(es, sealers)
	saveNodes(b, g.state.tree)
	if !before[g.state.extEpoch] {
		g.state.saveExtensions(b)
	}
	g.dropExtensions(b, before)
	g.saveEpoch(b)
	own := string(g.state.tree.signatureKey(g.own))
	for key := range g.signers {
		if key != own && g.signers[own] != nil {
			delete(g.signers, key)
		}
	}
}
