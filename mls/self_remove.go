package mls

import (
	"fmt"
	"slices"
)

// SelfRemove (draft-ietf-mls-extensions, Section 6.3): a member asks to be removed, and even who joins by an external
// commit can do that.

// ProposeSelfRemove asks the group to remove this client, by a PublicMessage. The commit that does so, of another
// member or of a new one, is received and applied as any other, and the group isn't active afterwards. If a commit
// leaves the proposal out, it has to be made anew. All members must support it, else it fails with a ValidationError.
// There may be one in an epoch.
func (g *Group) ProposeSelfRemove(b Batch) (*MLSMessage, error) {
	g.op.Lock()
	defer g.done()
	return g.propose(b, nil, Proposal{Type: ProposalSelfRemove}, nil)
}

// SelfRemoves returns the members' pending proposals to be removed, each as it was sent. Who joins by an external
// commit needs them with the GroupInfo (see ExternalJoinOptions).
func (g *Group) SelfRemoves() []*MLSMessage { return g.public().selfRemoves() }

// SelfRemoves returns the members' pending proposals to be removed, each as it was sent. Who joins by an external
// commit needs them with the GroupInfo (see ExternalJoinOptions).
func (g *PublicGroup) SelfRemoves() []*MLSMessage { return g.public().selfRemoves() }

func (p publicState) selfRemoves() []*MLSMessage {
	var list []*MLSMessage
	for _, e := range p.pending {
		if e.message != nil {
			list = append(list, NewMLSMessage(e.message))
		}
	}
	return list
}

// selfRemoveOf returns the pending SelfRemove of a member, nil if there is none.
func (p *publicState) selfRemoveOf(l LeafIndex) *pendingEntry {
	i := slices.IndexFunc(p.pending, func(e *pendingEntry) bool {
		return e.Proposal.Type == ProposalSelfRemove && e.Sender.Leaf == l
	})
	if i < 0 {
		return nil
	}
	return p.pending[i]
}

// checkSelfRemove checks a SelfRemove by itself.
func (p *publicState) checkSelfRemove(r *rules, e *resolved) error {
	if e.Sender.Type != SenderMember || !p.tree.occupied(e.Sender.Leaf) {
		return invalidBy(sectionSelfRemove, "self_remove of someone who is not a member")
	}
	return p.checkSupport(r, nil, ProposalSelfRemove)
}

// keepMessage gives a pending SelfRemove the message that brought it, which has to be a PublicMessage.
func (e *pendingEntry) keepMessage(ac *AuthenticatedContent, tag []byte) error {
	if e.Proposal.Type != ProposalSelfRemove {
		return nil
	}
	if ac.WireFormat != WireFormatPublicMessage {
		return invalidBy(sectionSelfRemove, "self_remove that is not a public message")
	}
	e.message = &PublicMessage{Content: ac.Content, Signature: ac.Signature, MembershipTag: tag}
	return nil
}

// takeSelfRemoves makes the SelfRemoves that a joiner was given pending, after it has checked all but their membership
// tags.
func (p *publicState) takeSelfRemoves(r *rules, messages []*MLSMessage) error {
	for _, m := range messages {
		if m.Public == nil || m.Public.Content.ContentType != ContentProposal || m.Public.Content.Proposal.Type != ProposalSelfRemove {
			return fmt.Errorf("%w: not a public message with a self_remove", ErrMalformed)
		}
		c := &m.Public.Content
		if err := p.checkPlace(c.GroupID, c.Epoch); err != nil {
			return err
		}
		ac := m.Public.authenticated()
		if err := p.verifyContent(r, ac); err != nil {
			return err
		}
		e := &pendingEntry{PendingProposal: PendingProposal{Ref: ac.ref(p.suite()), Sender: c.Sender, Proposal: *c.Proposal}}
		if err := p.checkAlone(r, &resolved{PendingProposal: e.PendingProposal}); err != nil {
			return err
		}
		p.addPending(discard{}, e)
	}
	return nil
}
