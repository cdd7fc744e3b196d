package mls

import (
	"bytes"
	"crypto"
	"fmt"
	"io"
)

// Propose makes the message of a proposal to the group and notes it as pending (RFC 9420, Section 12.1). aad is
// authenticated and not encrypted. For an Update see ProposeUpdate, for a SelfRemove ProposeSelfRemove. A PreSharedKey
// without a nonce gets a fresh one. It fails with a ValidationError if the proposal isn't valid by itself, and with
// ErrRemoved, ErrEnded, ErrResync and ErrSigner.
func (g *Group) Propose(b Batch, aad []byte, prop Proposal) (*MLSMessage, error) {
	g.op.Lock()
	defer g.done()
	if prop.Type == ProposalUpdate {
		return nil, fmt.Errorf("mls: propose: %w: an update is made by ProposeUpdate", ErrMalformed)
	}
	return g.propose(b, aad, prop, nil)
}

// UpdateOptions says what an Update changes apart from the encryption key.
type UpdateOptions struct {
	redact
	Credential   *Credential   // nil: the present one
	Signer       crypto.Signer // nil: the present one
	Capabilities *Capabilities // nil: the present ones
	AAD          []byte        // authenticated and not encrypted
}

// ProposeUpdate proposes a new leaf for this client with a fresh encryption key, which is kept until a commit applies
// or ends the epoch (RFC 9420, Section 12.1.2). It fails as Propose does.
func (g *Group) ProposeUpdate(b Batch, o UpdateOptions) (*MLSMessage, error) {
	g.op.Lock()
	defer g.done()
	if err := g.live(); err != nil {
		return nil, fmt.Errorf("mls: propose update: %w", err)
	}
	leaf, signer, err := g.nextLeaf(o.Credential, o.Signer)
	if err != nil {
		return nil, fmt.Errorf("mls: propose update: %w", err)
	}
	if o.Capabilities != nil {
		leaf.Capabilities = o.Capabilities.clone()
	}
	pub, private, err := g.suite().GenerateHPKEKey(g.cfg.rand())
	if err != nil {
		return nil, fmt.Errorf("mls: propose update: %w", err)
	}
	leaf.Source, leaf.EncryptionKey = LeafNodeUpdate, pub
	leaf.Lifetime, leaf.ParentHash = Lifetime{}, nil
	if err := leaf.sign(g.suite(), g.cfg.rand(), signer, g.state.context.GroupID, g.own); err != nil {
		return nil, err
	}
	m, err := g.propose(b, o.AAD, Proposal{Type: ProposalUpdate, Update: &Update{LeafNode: *leaf}}, private)
	if err != nil {
		return nil, err
	}
	g.signers[string(leaf.SignatureKey)] = signer
	return m, nil
}

// nextLeaf returns a copy of the own leaf with the credential and signer that are to replace the present ones.
func (g *Group) nextLeaf(cred *Credential, signer crypto.Signer) (*LeafNode, crypto.Signer, error) {
	leaf := g.state.tree.Leaf(g.own).clone()
	if cred != nil {
		leaf.Credential = *cred
	}
	if signer == nil {
		s, err := g.signer()
		return leaf, s, err
	}
	pub, err := g.suite().SignaturePublicKey(signer.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("mls: signer: %w", err)
	}
	leaf.SignatureKey = pub
	return leaf, signer, nil
}

func (g *Group) propose(b Batch, aad []byte, prop Proposal, private HPKEPrivateKey) (*MLSMessage, error) {
	if err := g.live(); err != nil {
		return nil, fmt.Errorf("mls: propose: %w", err)
	}
	if len(g.state.pending) >= maxPending {
		return nil, fmt.Errorf("mls: propose: %w: %d proposals pending", ErrMalformed, maxPending)
	}
	signer, err := g.signer()
	if err != nil {
		return nil, fmt.Errorf("mls: propose: %w", err)
	}
	if prop, err = fillNonce(g.suite(), g.cfg.rand(), prop); err != nil {
		return nil, fmt.Errorf("mls: propose: %w", err)
	}
	sender := Sender{Type: SenderMember, Leaf: g.own}
	r := g.sendingRules()
	if err := g.state.checkAlone(&r, &resolved{PendingProposal: PendingProposal{Sender: sender, Proposal: prop}}); err != nil {
		return nil, fmt.Errorf("mls: propose: %w", err)
	}
	if prop.Add != nil {
		cr, err := g.state.contextRules()
		if err != nil {
			return nil, fmt.Errorf("mls: propose: %w", err)
		}
		if err := cr.terms.checkMediaTypes(&prop.Add.KeyPackage.LeafNode); err != nil {
			return nil, fmt.Errorf("mls: propose: %w", err)
		}
	}
	ac, err := g.signHandshake(signer, aad, FramedContent{ContentType: ContentProposal, Proposal: &prop})
	if err != nil {
		return nil, err
	}
	b = orDiscard(b)
	m, err := g.frame(b, ac)
	if err != nil {
		return nil, err
	}
	e := &pendingEntry{PendingProposal: PendingProposal{Ref: ac.ref(g.suite()), Sender: sender, Proposal: prop}, private: private}
	if m.Public != nil {
		if err := e.keepMessage(ac, m.Public.MembershipTag); err != nil {
			return nil, err
		}
	}
	g.state.addPending(g.sealer.seal(b), e)
	return m, nil
}

// sendingRules are those for what this client sends, where lifetimes must be checked (RFC 9420, Section 7.3).
func (g *Group) sendingRules() rules {
	r := g.cfg.rules()
	r.now = g.cfg.now
	if g.link != nil {
		r.link = g.link.usage
	}
	return r
}

// fillNonce gives a PreSharedKey proposal a fresh nonce if it has none.
func fillNonce(cs CipherSuite, rand io.Reader, prop Proposal) (Proposal, error) {
	if prop.Type != ProposalPSK || prop.PSK == nil || len(prop.PSK.PSK.Nonce) > 0 {
		return prop, nil
	}
	nonce := make([]byte, cs.HashSize())
	if _, err := io.ReadFull(rand, nonce); err != nil {
		return prop, fmt.Errorf("read randomness: %w", err)
	}
	psk := *prop.PSK
	psk.PSK.Nonce = nonce
	prop.PSK = &psk
	return prop, nil
}

// ExternalProposal makes a proposal of an external sender, the group's external sender number senderIndex (RFC 9420,
// Section 12.1.8). Group members and the PublicGroup check whether it may propose this. aad is authenticated with it, in
// the clear; a group with the safe_aad component wants a SafeAAD.
func ExternalProposal(suite CipherSuite, rand io.Reader, signer crypto.Signer, senderIndex uint32, groupID []byte, epoch uint64, aad []byte, p Proposal) (*MLSMessage, error) {
	if p.missing() {
		return nil, fmt.Errorf("mls: external proposal: %w: no body", ErrMalformed)
	}
	p, err := fillNonce(suite, rand, p)
	if err != nil {
		return nil, fmt.Errorf("mls: external proposal: %w", err)
	}
	return proposeFromOutside(suite, rand, signer, Sender{Type: SenderExternal, Index: senderIndex}, groupID, epoch, aad, p)
}

// NewMemberProposal asks a group to add the client of a KeyPackage, which joins by the Welcome of the commit that does
// (RFC 9420, Section 12.1.8). signer has the key of the KeyPackage's leaf; it fails with ErrSigner if it hasn't. The
// group must accept such proposals, see Config.NewMemberProposals. aad is as in ExternalProposal.
func NewMemberProposal(rand io.Reader, signer crypto.Signer, kp *KeyPackage, groupID []byte, epoch uint64, aad []byte) (*MLSMessage, error) {
	if !kp.CipherSuite.Supported() {
		return nil, fmt.Errorf("mls: new member's proposal: %w: %v", ErrUnsupported, kp.CipherSuite)
	}
	pub, err := kp.CipherSuite.SignaturePublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("mls: new member's proposal: signer: %w", err)
	}
	if !bytes.Equal(pub, kp.LeafNode.SignatureKey) {
		return nil, fmt.Errorf("mls: new member's proposal: %w", ErrSigner)
	}
	return proposeFromOutside(kp.CipherSuite, rand, signer, Sender{Type: SenderNewMemberProposal}, groupID, epoch, aad,
		Proposal{Type: ProposalAdd, Add: &Add{KeyPackage: *kp}})
}

func proposeFromOutside(suite CipherSuite, rand io.Reader, signer crypto.Signer, sender Sender, groupID []byte, epoch uint64, aad []byte, p Proposal) (*MLSMessage, error) {
	ac, err := signContent(suite, rand, signer, WireFormatPublicMessage, FramedContent{
		GroupID: bytes.Clone(groupID), Epoch: epoch, Sender: sender, AuthenticatedData: bytes.Clone(aad),
		ContentType: ContentProposal, Proposal: &p,
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("mls: external proposal: %w", err)
	}
	m, err := protectPublic(suite, ac, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("mls: external proposal: %w", err)
	}
	return NewMLSMessage(m), nil
}
