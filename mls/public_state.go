package mls

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// rules are what the application adds to the judgement of handshake messages.
type rules struct {
	verifier   CredentialVerifier
	components map[ComponentID]Component
	policy     func(*StagedInfo) error
	now        func() time.Time // nil: lifetimes aren't compared with the time
	link       ResumptionUsage  // of the key that links the group with the one it follows from, while it is made
	newMembers bool             // may propose their own Add
	// maxLifetime is the longest total lifetime of a new member's leaf.
	maxLifetime time.Duration
	// replay is set when what was judged before is computed again from the store: signatures, credentials and the
	// policy are left out, since what varies in time may have changed.
	replay bool
}

// contextRules is what the GroupContext's extensions ask for.
type contextRules struct {
	required  RequiredCapabilities
	terms     terms
	senders   ExternalSenders
	receivers ExternalReceivers
	types     []ExtensionType
}

func parseContextRules(ext Extensions) (*contextRules, error) {
	if err := ext.validate(); err != nil {
		return nil, err
	}
	cr := new(contextRules)
	for _, e := range ext {
		cr.types = append(cr.types, e.Type)
		var err error
		switch e.Type {
		case ExtensionRequiredCapabilities:
			err = codec.Unmarshal(e.Data, &cr.required)
		case ExtensionExternalSenders:
			err = codec.Unmarshal(e.Data, &cr.senders)
		}
		if err != nil {
			return nil, invalid("13.4", "extension type %d of the GroupContext", e.Type, err)
		}
	}
	var err error
	if cr.terms, err = parseTerms(ext); err != nil {
		return nil, invalid("13.4", "extensions of the GroupContext", err)
	}
	if cr.receivers, err = externalReceivers(ext); err != nil {
		return nil, invalid("13.4", "external receivers of the GroupContext", err)
	}
	return cr, nil
}

// publicState is the part of a group that its public messages show; Group and PublicGroup both have one.
type publicState struct {
	context         GroupContext
	encoded         []byte // the context's encoding
	confirmationTag []byte
	interim         []byte // interim transcript hash
	tree            *RatchetTree
	pending         []*pendingEntry // in the order of arrival
	next            uint32          // number of the next pending proposal
	reinit          *ReInit         // that ended the group; nil if it goes on
	extEpoch        uint64          // the epoch that brought the context's extensions; they are stored under it

	rules  *contextRules // made when first needed
	counts *roster       // made when first needed
}

// PendingProposal is a proposal of the current epoch that no commit has applied yet.
type PendingProposal struct {
	Ref      []byte // ProposalRef; nil if the proposal is part of a commit
	Sender   Sender
	Proposal Proposal
}

// pendingEntry is a proposal whose signature, and credential if it brings one, were verified on arrival.
type pendingEntry struct {
	redact
	PendingProposal
	number  uint32
	private HPKEPrivateKey // of an own Update: the new leaf's key
	message *PublicMessage // of a SelfRemove, for those who join
}

// MarshalMLS implements codec.Marshaler, for the store.
func (e pendingEntry) MarshalMLS(w *codec.Writer) {
	w.Opaque(e.Ref)
	e.Sender.MarshalMLS(w)
	e.Proposal.MarshalMLS(w)
	w.Opaque(e.private)
	if e.message != nil {
		e.message.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *pendingEntry) UnmarshalMLS(r *codec.Reader) {
	e.Ref = r.Opaque()
	e.Sender.UnmarshalMLS(r)
	e.Proposal.UnmarshalMLS(r)
	if b := r.Opaque(); len(b) > 0 {
		e.private = b
	}
	if e.Proposal.Type == ProposalSelfRemove && r.Err() == nil {
		e.message = new(PublicMessage)
		e.message.UnmarshalMLS(r)
	}
}

func newPublicState(ctx GroupContext, tree *RatchetTree, confirmationTag []byte) publicState {
	return publicState{
		context: ctx, encoded: codec.Marshal(ctx), tree: tree, confirmationTag: confirmationTag, extEpoch: ctx.Epoch,
		interim: ctx.CipherSuite.interimTranscriptHash(ctx.ConfirmedTranscriptHash, confirmationTag),
	}
}

func (p *publicState) suite() CipherSuite { return p.context.CipherSuite }

func (p *publicState) contextRules() (*contextRules, error) {
	if p.rules == nil {
		cr, err := parseContextRules(p.context.Extensions)
		if err != nil {
			return nil, err
		}
		p.rules = cr
	}
	return p.rules, nil
}

func (p *publicState) roster(v CredentialVerifier) (*roster, error) {
	if p.counts == nil {
		all, err := rosterOf(p.tree, v)
		if err != nil {
			return nil, err
		}
		p.counts = &roster{tally: newTally()}
		p.counts.merge(all)
	}
	return p.counts, nil
}

func (p publicState) pendingList() []PendingProposal {
	list := make([]PendingProposal, len(p.pending))
	for i, e := range p.pending {
		list[i] = e.PendingProposal
	}
	return list
}

func (p *publicState) findPending(ref []byte) *pendingEntry {
	i := slices.IndexFunc(p.pending, func(e *pendingEntry) bool { return bytes.Equal(e.Ref, ref) })
	if i < 0 {
		return nil
	}
	return p.pending[i]
}

// maxPending bounds the proposals that wait for a commit.
const maxPending = 4096

// resolve replaces a commit's references by the proposals that they stand for.
func (p *publicState) resolve(c *Commit, sender Sender) ([]resolved, error) {
	list := make([]resolved, len(c.Proposals))
	for i, por := range c.Proposals {
		if por.Proposal != nil {
			list[i] = resolved{PendingProposal: PendingProposal{Sender: sender, Proposal: *por.Proposal}}
			continue
		}
		e := p.findPending(por.Reference)
		if e == nil {
			return nil, invalid("12.4", "commit of a proposal that is not known")
		}
		if sender.Type == SenderNewMemberCommit && e.Proposal.Type != ProposalSelfRemove {
			return nil, invalid("12.4.3.2", "external commit with proposal type %d by reference", e.Proposal.Type)
		}
		list[i] = resolved{PendingProposal: e.PendingProposal, verified: true, private: e.private}
	}
	return list, nil
}

// resolved is one proposal of a commit.
type resolved struct {
	redact
	PendingProposal
	verified bool           // its signatures and credential were verified when it arrived
	private  HPKEPrivateKey // of an own Update
}

// removes returns the leaf that a Remove or SelfRemove removes, and whether the proposal is one of them.
func (e *resolved) removes() (LeafIndex, bool) {
	switch e.Proposal.Type {
	case ProposalRemove:
		return e.Proposal.Remove.Removed, true
	case ProposalSelfRemove:
		return e.Sender.Leaf, true
	}
	return 0, false
}

// checkPlace says whether a handshake message is for this group and epoch.
func (p *publicState) checkPlace(groupID []byte, epoch uint64) error {
	if !bytes.Equal(groupID, p.context.GroupID) {
		return fmt.Errorf("%w: message for another group", ErrMalformed)
	}
	if epoch != p.context.Epoch {
		return fmt.Errorf("%w: got %d, want %d", ErrEpoch, epoch, p.context.Epoch)
	}
	if p.reinit != nil {
		return ErrEnded
	}
	return nil
}

// verifyContent checks the signature of a handshake message with the key of its sender (RFC 9420, Section 6.1).
func (p *publicState) verifyContent(r *rules, ac *AuthenticatedContent) error {
	var key []byte
	c := &ac.Content
	cr, err := p.contextRules()
	if err != nil {
		return err
	}
	switch c.Sender.Type {
	case SenderMember:
		if key = p.tree.signatureKey(c.Sender.Leaf); key == nil {
			return invalid("6.1", "sender %d is not a member", c.Sender.Leaf)
		}
	case SenderExternal:
		if c.ContentType != ContentProposal {
			return invalid("6.1", "external sender of content type %d", c.ContentType)
		}
		if uint64(c.Sender.Index) >= uint64(len(cr.senders)) {
			return invalid("6.1", "external sender %d of %d", c.Sender.Index, len(cr.senders))
		}
		key = cr.senders[c.Sender.Index].SignatureKey
	case SenderNewMemberCommit:
		if c.ContentType != ContentCommit || c.Commit.Path == nil {
			return invalid("12.4.3.2", "new member's message is not a commit with a path")
		}
		key = c.Commit.Path.LeafNode.SignatureKey
	case SenderNewMemberProposal:
		if !r.newMembers {
			return invalid("12.1.8", "proposals of new members are not accepted", ErrUnsupported)
		}
		if c.ContentType != ContentProposal || c.Proposal.Add == nil {
			return invalid("6.1", "new member's message is not the proposal of an add")
		}
		key = c.Proposal.Add.KeyPackage.LeafNode.SignatureKey
	default:
		return invalid("6.1", "sender type %d", c.Sender.Type)
	}
	if err := ac.verifySignature(p.suite(), key, p.encoded); err != nil {
		return err
	}
	return cr.checkAAD(c.AuthenticatedData)
}
