package mls

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// Received is what a message turned out to be: *ApplicationMessage, *ReceivedProposal, *StagedCommit, *OwnCommit or
// *Duplicate.
type Received interface{ received() }

// ApplicationMessage is decrypted application data. Its key is deleted.
type ApplicationMessage struct {
	Sender     LeafIndex
	Leaf       *LeafNode // the sender's leaf in the message's epoch
	Epoch      uint64
	Generation uint32 // the sender's count of its messages in the epoch, from 0
	AAD, Data  []byte
	// Framing is what Data holds in a group with media types (see Group.MediaTypes), with the media type that is meant if
	// none is named; nil in others.
	Framing *ApplicationFraming
}

// ReceivedProposal is a proposal that is pending now.
type ReceivedProposal struct {
	PendingProposal
	AAD []byte
}

// StagedCommit is another's commit that was checked and can be applied, or dropped by not doing so.
type StagedCommit struct {
	redact
	evolution *evolution
	secrets   *epochSecrets // nil if the commit removes this client
	private   *treePrivate
	hash      [sha256.Size]byte
	aad       []byte
	applied   bool
	step      *ratchetStep // the message key, deleted when the commit is applied; nil if it came as a PublicMessage
}

// OwnCommit says that the message is the staged own commit: Confirm applies it.
type OwnCommit struct{ Commit *PendingCommit }

// Duplicate says that the message is a commit that was applied before, in one of the epochs that MaxPastEpochs keeps;
// there is nothing to do.
type Duplicate struct{}

func (*ApplicationMessage) received() {}
func (*ReceivedProposal) received()   {}
func (*StagedCommit) received()       {}
func (*OwnCommit) received()          {}
func (*Duplicate) received()          {}

// Info says what the commit does.
func (s *StagedCommit) Info() *StagedInfo { return &s.evolution.info }

// AAD returns the data that the committer authenticated with the commit.
func (s *StagedCommit) AAD() []byte { return s.aad }

// Receive checks one message of the group. Application messages and proposals are applied by that; a commit is staged
// and applied by Apply, Confirm in the case of an own one.
//
// It fails with ErrEpoch for another epoch than the current one (for application messages: one from which no keys are
// kept), ErrGeneration for an application message that was read before, ErrOwnMessage for own messages that can't be
// read, ErrRemoved for a former member, ErrEnded after a ReInit, ErrMalformed for what isn't a message of this group,
// ErrSignature, ErrDecrypt, ErrMembershipTag and ErrConfirmationTag. A ValidationError names the rule that a handshake
// message breaks. Whatever the error is, the group stays as it was.
func (g *Group) Receive(b Batch, m *MLSMessage) (Received, error) {
	g.op.Lock()
	defer g.done()
	if !g.active {
		return nil, fmt.Errorf("mls: receive: %w", ErrRemoved)
	}
	var r Received
	var err error
	switch {
	case m.Public != nil && m.WireFormat == WireFormatPublicMessage:
		r, err = g.receivePublic(orDiscard(b), m)
	case m.Private != nil && m.WireFormat == WireFormatPrivateMessage:
		r, err = g.receivePrivate(orDiscard(b), m)
	case m.SemiPrivate != nil && m.WireFormat == WireFormatSemiPrivateMessage:
		r, err = g.receiveSemiPrivate(orDiscard(b), m)
	default:
		err = fmt.Errorf("%w: wire format %d is not a group's", ErrMalformed, m.WireFormat)
	}
	if err != nil {
		return nil, fmt.Errorf("mls: receive: %w", err)
	}
	g.expire(orDiscard(b))
	return r, nil
}

func (g *Group) receivePublic(b Batch, m *MLSMessage) (Received, error) {
	c := &m.Public.Content
	if c.ContentType == ContentApplication {
		return nil, fmt.Errorf("%w: application data in a public message", ErrMalformed)
	}
	var hash [sha256.Size]byte
	if c.ContentType == ContentCommit {
		hash = messageHash(m)
		if e := g.pastEpoch(c.Epoch); e != nil && bytes.Equal(c.GroupID, g.state.context.GroupID) && e.endedBy(hash) {
			return &Duplicate{}, nil
		}
	}
	if err := g.state.checkPlace(c.GroupID, c.Epoch); err != nil {
		return nil, err
	}
	if c.ContentType == ContentCommit && g.staged != nil && g.staged.hash == hash {
		return &OwnCommit{Commit: g.staged}, nil
	}
	ac := m.Public.authenticated()
	if c.ContentType == ContentProposal {
		if e := g.state.findPending(ac.ref(g.suite())); e != nil {
			return &ReceivedProposal{PendingProposal: e.PendingProposal, AAD: c.AuthenticatedData}, nil
		}
	}
	if err := m.Public.verifyMembershipTag(g.suite(), g.secrets.membership, g.state.encoded); err != nil {
		return nil, err
	}
	r := g.cfg.rules()
	if err := g.state.verifyContent(&r, ac); err != nil {
		return nil, err
	}
	return g.receiveHandshake(b, ac, m.Public.MembershipTag, hash, nil)
}

// receiveHandshake goes on with a proposal or commit whose sender is verified. tag is the membership tag of a
// PublicMessage. step is the key of a PrivateMessage, which is deleted when the message is applied, and not if it isn't
// valid.
func (g *Group) receiveHandshake(b Batch, ac *AuthenticatedContent, tag []byte, hash [sha256.Size]byte, step *ratchetStep) (Received, error) {
	c := &ac.Content
	if c.ContentType == ContentCommit {
		s, err := g.stageCommit(ac, hash)
		if err != nil {
			return nil, err
		}
		s.step = step
		return s, nil
	}
	ref := ac.ref(g.suite())
	if e := g.state.findPending(ref); e != nil {
		g.deleteKey(b, step)
		return &ReceivedProposal{PendingProposal: e.PendingProposal, AAD: c.AuthenticatedData}, nil
	}
	if len(g.state.pending) >= maxPending {
		return nil, fmt.Errorf("%w: %d proposals pending", ErrMalformed, maxPending)
	}
	r := g.cfg.rules()
	p := PendingProposal{Ref: ref, Sender: c.Sender, Proposal: *c.Proposal}
	if err := g.state.checkProposal(&r, &resolved{PendingProposal: p}); err != nil {
		return nil, err
	}
	e := &pendingEntry{PendingProposal: p}
	if err := e.keepMessage(ac, tag); err != nil {
		return nil, err
	}
	g.deleteKey(b, step)
	g.state.addPending(g.sealer.seal(b), e)
	return &ReceivedProposal{PendingProposal: p, AAD: c.AuthenticatedData}, nil
}

// deleteKey deletes the key of a handshake message of the current epoch; nil for a PublicMessage.
func (g *Group) deleteKey(b Batch, step *ratchetStep) {
	if step != nil {
		g.messages.consume(step)
		step.erase()
		saveSecrets(b, g.state.context.Epoch, g.messages)
	}
}

func (g *Group) receivePrivate(b Batch, msg *MLSMessage) (Received, error) {
	m := msg.Private
	if !bytes.Equal(m.GroupID, g.state.context.GroupID) {
		return nil, fmt.Errorf("%w: message for another group", ErrMalformed)
	}
	st, senderData, encoded := g.messages, g.secrets.senderData, g.state.encoded
	leaf, contextRules := g.state.tree.Leaf, g.state.contextRules
	var hash [sha256.Size]byte
	if m.ContentType == ContentCommit {
		hash = messageHash(msg)
	}
	if m.Epoch != g.state.context.Epoch {
		past := g.pastEpoch(m.Epoch)
		if past != nil && m.ContentType == ContentCommit && past.endedBy(hash) {
			return &Duplicate{}, nil
		}
		if past == nil || m.ContentType != ContentApplication {
			return nil, fmt.Errorf("%w: got %d, want %d", ErrEpoch, m.Epoch, g.state.context.Epoch)
		}
		st, senderData, encoded = past.tree, past.senderData, codec.Marshal(past.context)
		leaf, contextRules = func(i LeafIndex) *LeafNode { return g.leafAt(past, i) }, past.contextRules
	} else if g.state.reinit != nil {
		return nil, ErrEnded
	} else if m.ContentType == ContentCommit && g.staged != nil && g.staged.hash == hash {
		return &OwnCommit{Commit: g.staged}, nil
	}
	ac, step, err := unprotectPrivate(g.suite(), st, senderData, m, g.cfg.limits())
	if err != nil {
		if d, e := m.sender(g.suite(), senderData); e == nil && d.leaf == g.own && errors.Is(err, ErrGeneration) {
			return nil, ErrOwnMessage // its key was deleted when it was sent
		}
		return nil, err
	}
	sender := ac.Content.Sender.Leaf
	l := leaf(sender)
	if l == nil {
		return nil, invalid("6.3.2", "sender %d is not a member", sender)
	}
	if err := ac.verifySignature(g.suite(), l.SignatureKey, encoded); err != nil {
		return nil, err
	}
	cr, err := contextRules()
	if err != nil {
		return nil, err
	}
	if err := cr.checkAAD(m.AuthenticatedData); err != nil {
		return nil, err
	}
	if m.ContentType != ContentApplication {
		return g.receiveHandshake(b, ac, nil, hash, step)
	}
	framing, err := cr.unframe(ac.Content.ApplicationData)
	if err != nil {
		return nil, err
	}
	st.consume(step)
	step.erase()
	saveSecrets(b, m.Epoch, st)
	return &ApplicationMessage{
		Sender: sender, Leaf: l, Epoch: m.Epoch, Generation: step.generation,
		AAD: m.AuthenticatedData, Data: ac.Content.ApplicationData, Framing: framing,
	}, nil
}

// receiveSemiPrivate is for SemiPrivateMessages, which hold handshakes of the current epoch.
func (g *Group) receiveSemiPrivate(b Batch, msg *MLSMessage) (Received, error) {
	m := msg.SemiPrivate
	var hash [sha256.Size]byte
	if m.ContentType == ContentCommit {
		hash = sha256.Sum256(codec.Marshal(msg))
		if e := g.pastEpoch(m.Epoch); e != nil && bytes.Equal(m.GroupID, g.state.context.GroupID) && e.endedBy(hash) {
			return &Duplicate{}, nil
		}
	}
	if err := g.state.checkPlace(m.GroupID, m.Epoch); err != nil {
		return nil, err
	}
	if m.ContentType == ContentCommit && g.staged != nil && g.staged.hash == hash {
		return &OwnCommit{Commit: g.staged}, nil
	}
	ac, step, err := unprotectSemiPrivate(g.suite(), g.messages, g.secrets.senderData, m, g.cfg.limits())
	if err != nil {
		if d, e := m.private().sender(g.suite(), g.secrets.senderData); e == nil && d.leaf == g.own && errors.Is(err, ErrGeneration) {
			return nil, ErrOwnMessage // its key was deleted when it was sent
		}
		return nil, err
	}
	if err := g.state.checkSemiPrivate(ac, m.Keys, m.FramedContentTBSHash); err != nil {
		return nil, err
	}
	r := g.cfg.rules()
	if err := g.state.verifyContent(&r, ac); err != nil {
		return nil, err
	}
	return g.receiveHandshake(b, ac, nil, hash, step)
}

// stageCommit is RFC 9420, Section 12.4.2.
func (g *Group) stageCommit(ac *AuthenticatedContent, hash [sha256.Size]byte) (*StagedCommit, error) {
	cs, commit := g.suite(), ac.Content.Commit
	if s := ac.Content.Sender; s.Type == SenderMember && s.Leaf == g.own && commit.Path != nil {
		return nil, fmt.Errorf("%w: a commit that isn't staged", ErrOwnMessage)
	}
	r := g.cfg.rules()
	e, err := g.state.stage(&r, ac)
	if err != nil {
		return nil, err
	}
	s := &StagedCommit{evolution: e, hash: hash, aad: ac.Content.AuthenticatedData}
	for _, rm := range e.info.Removed {
		e.info.SelfRemoved = e.info.SelfRemoved || rm.Index == g.own
	}
	if e.info.SelfRemoved {
		if err := g.state.seal(&r, e, ac.ConfirmationTag); err != nil {
			return nil, err
		}
		return s, nil
	}
	private := g.private.clone()
	var kemOutput []byte
	for i := range e.list {
		p := &e.list[i].Proposal
		if p.Update != nil && e.list[i].Sender.Leaf == g.own {
			if e.list[i].private == nil {
				return nil, fmt.Errorf("%w: an update whose key isn't here", ErrOwnMessage)
			}
			private.keys[g.own.node()] = e.list[i].private
		}
		if p.ExternalInit != nil {
			kemOutput = p.ExternalInit.KEMOutput
		}
	}
	private.prune(e.tree)
	psk, _, err := g.pskSecret(e.list)
	if err != nil {
		return nil, err
	}
	defer psk.erase()
	init, commitSecret := g.secrets.init, cs.zeroSecret()
	if e.external {
		if init, err = cs.externalInitReceive(g.secrets.external, kemOutput); err != nil {
			return nil, invalid("8.3", "external init", err)
		}
	}
	if commit.Path != nil {
		provisional := e.context
		provisional.ConfirmedTranscriptHash = g.state.context.ConfirmedTranscriptHash
		commitSecret, private, err = e.tree.decryptPath(cs, private, e.committer, commit.Path, e.added, codec.Marshal(provisional))
		if err != nil {
			return nil, err
		}
	}
	s.private = private
	joiner := cs.joinerSecret(init, commitSecret, e.encoded)
	commitSecret.erase()
	if e.external {
		init.erase()
	}
	s.secrets = cs.epochSecrets(joiner, psk, e.encoded)
	joiner.erase()
	if err := s.secrets.verifyConfirmationTag(cs, e.context.ConfirmedTranscriptHash, ac.ConfirmationTag); err != nil {
		return nil, err
	}
	if err := g.state.seal(&r, e, ac.ConfirmationTag); err != nil {
		return nil, err
	}
	return s, nil
}

// Apply moves the group to the epoch of a commit that Receive staged. A staged own commit is dropped by that. If the
// commit removes this client, the group isn't active afterwards and its secrets are deleted. It fails with ErrEpoch if
// the group has moved on since, with ErrStaged if the commit was applied before (its secrets are the group's), with
// ErrResync while a Resync waits, and with ErrRemoved for a former member.
func (g *Group) Apply(b Batch, s *StagedCommit) error {
	g.op.Lock()
	defer g.done()
	if !g.active {
		return fmt.Errorf("mls: apply: %w", ErrRemoved)
	}
	if g.entrance.resync != nil {
		return fmt.Errorf("mls: apply: %w", ErrResync)
	}
	if err := s.evolution.fits(&g.state); err != nil {
		return fmt.Errorf("mls: apply: %w", err)
	}
	if s.applied {
		return fmt.Errorf("mls: apply: %w: applied before", ErrStaged)
	}
	sealers, err := g.cfg.newSealers()
	if err != nil {
		return fmt.Errorf("mls: apply: %w", err)
	}
	s.applied = true
	b = orDiscard(b)
	g.deleteKey(b, s.step)
	if s.evolution.info.SelfRemoved {
		g.leave(b, s.evolution)
		return nil
	}
	g.advance(b, s.evolution, s.secrets, s.private, s.hash, sealers)
	return nil
}

// leave deletes all secrets and keeps the public state of the epoch that this client was removed in.
func (g *Group) leave(b Batch, e *evolution) {
	g.deleteMember(b)
	g.state.adopt(e)
	g.active = false
	clear(g.signers)
	saveNodes(b, g.state.tree)
	g.state.saveExtensions(b)
	g.saveEpoch(b)
}

// deleteMember deletes what only a member has, from the store too, and the GroupContext's extensions.
func (g *Group) deleteMember(b Batch) {
	deleteSecrets(b, g.state.context.Epoch, g.messages)
	for epoch := range g.extensionEpochs() {
		b.Delete(key64(keyExtensions, epoch))
	}
	for _, p := range g.past {
		g.forget(b, p)
	}
	for _, p := range g.state.pending {
		b.Delete(key32(keyPending, p.number))
		secret(p.private).erase()
	}
	b.Delete(key1(keyStaged))
	b.Delete(key1(keyPrivate))
	none := new(treePrivate)
	if g.staged != nil {
		g.staged.erase(none)
	}
	if p := g.entrance.resync; p != nil {
		p.erase()
	}
	g.private.erase(none)
	g.exports.drop(b)
	if g.sealer != nil {
		b.Delete(key1(keyStateSeal))
		g.sealer.erase()
	}
	g.entrance.resync = nil
	g.staged, g.past, g.secrets, g.messages, g.exports, g.private, g.sealer = nil, nil, nil, nil, nil, nil, nil
}
