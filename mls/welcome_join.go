package mls

import (
	"bytes"
	"crypto"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// JoinGroup joins by a Welcome (RFC 9420, Section 12.4.3.1). kp is the KeyPackage that the Welcome names, secrets its
// private keys, signer its signature key. tree is the ratchet tree if the Welcome's GroupInfo doesn't carry it, nil
// otherwise; it belongs to the group from then on. The caller makes sure that it isn't in a group of that identifier
// already, and deletes secrets once the group is durable, unless kp is a last-resort KeyPackage (see
// KeyPackage.LastResort), which another Welcome may use. The Welcome to a group that follows from another one is for
// that one's JoinSuccessor or JoinBranch.
//
// It fails with ErrMalformed if the Welcome isn't for kp, ErrDecrypt if it doesn't open, ErrSignature and
// ErrConfirmationTag if the GroupInfo isn't right, ErrSigner for another signer, and a ValidationError for what else
// the Welcome, the GroupInfo or the tree breaks.
func JoinGroup(cfg Config, b Batch, signer crypto.Signer, w *Welcome, kp *KeyPackage, secrets *KeyPackageSecrets, tree *RatchetTree) (*Group, error) {
	g, err := joinGroup(cfg, signer, w, kp, secrets, tree, nil)
	if err != nil {
		return nil, fmt.Errorf("mls: join: %w", err)
	}
	g.saveAll(orDiscard(b))
	return g, nil
}

func joinGroup(cfg Config, signer crypto.Signer, w *Welcome, kp *KeyPackage, keys *KeyPackageSecrets, tree *RatchetTree, l *link) (*Group, error) {
	if kp.CipherSuite != w.CipherSuite {
		return nil, invalid("12.4.3.1", "welcome of suite %d, key package of suite %d", uint16(w.CipherSuite), uint16(kp.CipherSuite))
	}
	gs, err := w.decryptSecrets(kp.Ref(), keys.InitKey)
	if err != nil {
		return nil, err
	}
	defer gs.JoinerSecret.erase()
	defer gs.PathSecret.erase()
	for _, id := range gs.PSKs {
		if l == nil && id.linked() {
			return nil, invalid("12.4.3.1", "welcome to a group that follows from another one", ErrUnsupported)
		}
		if len(id.Nonce) != w.CipherSuite.HashSize() {
			return nil, invalid("8.4", "nonce of %d bytes", len(id.Nonce))
		}
	}
	var resumption func(PreSharedKeyID) secret
	if l != nil {
		if err := l.checkWelcome(gs.PSKs); err != nil {
			return nil, err
		}
		resumption = l.parent.resumption
	}
	psk, err := derivePSK(cfg, w.CipherSuite, gs.PSKs, resumption)
	if err != nil {
		return nil, err
	}
	defer psk.erase()
	gi, err := w.decryptGroupInfo(gs.JoinerSecret, psk)
	if err != nil {
		return nil, err
	}
	if gi.GroupContext.CipherSuite != kp.CipherSuite {
		return nil, invalid("12.4.3.1", "group of suite %d, key package of suite %d", uint16(gi.GroupContext.CipherSuite), uint16(kp.CipherSuite))
	}
	r := cfg.rules()
	state, err := checkGroupInfo(&r, gi, tree)
	if err != nil {
		return nil, err
	}
	tree = state.tree
	if l != nil {
		if err := l.check(&gi.GroupContext, tree); err != nil {
			return nil, err
		}
	}
	own, err := findLeaf(tree, &kp.LeafNode)
	if err != nil {
		return nil, err
	}
	if own == gi.Signer {
		return nil, invalid("12.4.3.1", "group info signed by the new member's own leaf")
	}
	cs := kp.CipherSuite
	private := newTreePrivate(own, bytes.Clone(keys.EncryptionKey))
	if gs.PathSecret != nil {
		if err := tree.installPathSecret(cs, private, gi.Signer, gs.PathSecret); err != nil {
			return nil, err
		}
	}
	es := cs.epochSecrets(gs.JoinerSecret, psk, codec.Marshal(gi.GroupContext))
	if err := es.verifyConfirmationTag(cs, gi.GroupContext.ConfirmedTranscriptHash, gi.ConfirmationTag); err != nil {
		return nil, err
	}
	g := &Group{
		cfg: cfg, state: *state, own: own, active: true,
		private: private, signers: make(map[string]crypto.Signer), entrance: entrance{joined: gi.GroupContext.Epoch},
	}
	sealers, err := cfg.newSealers()
	if err != nil {
		return nil, err
	}
	g.start(es, sealers)
	if err := g.AddSigner(signer); err != nil {
		return nil, err
	}
	if _, err := g.signer(); err != nil {
		return nil, err
	}
	return g, nil
}

func findLeaf(t *RatchetTree, l *LeafNode) (LeafIndex, error) {
	enc := codec.Marshal(l)
	for i := range LeafIndex(t.slots) {
		if bytes.Equal(t.node(i.node()), enc) {
			return i, nil
		}
	}
	return 0, invalid("12.4.3.1", "the key package's leaf is not in the tree")
}

// checkGroupInfo checks a GroupInfo and the ratchet tree that belongs to it, the extension's or else the one given, and
// returns the public state that they describe (RFC 9420, Section 12.4.3.1).
func checkGroupInfo(r *rules, gi *GroupInfo, tree *RatchetTree) (*publicState, error) {
	ctx := &gi.GroupContext
	if ctx.Version != MLS10 || !ctx.CipherSuite.Supported() {
		return nil, fmt.Errorf("%w: group of version %d, %v", ErrUnsupported, ctx.Version, ctx.CipherSuite)
	}
	if err := gi.Extensions.validate(); err != nil {
		return nil, err
	}
	inside, err := gi.RatchetTree()
	if err != nil {
		return nil, invalid("12.4.3.3", "ratchet tree", err)
	}
	if inside != nil {
		tree = inside
	}
	if tree == nil {
		return nil, invalid("12.4.3.3", "no ratchet tree")
	}
	if !bytes.Equal(tree.Hash(ctx.CipherSuite), ctx.TreeHash) {
		return nil, invalid("12.4.3.1", "tree hash differs from the group context's")
	}
	signer := tree.Leaf(gi.Signer)
	if signer == nil {
		return nil, invalid("12.4.3.1", "signer %d of the group info is not a member", gi.Signer)
	}
	if err := gi.Verify(signer.SignatureKey); err != nil {
		return nil, err
	}
	cr, err := parseContextRules(ctx.Extensions)
	if err != nil {
		return nil, err
	}
	if err := cr.receivers.check(ctx.CipherSuite); err != nil {
		return nil, err
	}
	if err := tree.validate(ctx.CipherSuite, ctx.GroupID, func(i LeafIndex, l *LeafNode) error {
		if err := l.validateStatic(); err != nil {
			return err
		}
		if !l.Capabilities.supportsSuite(ctx.CipherSuite) {
			return invalid("7.2", "capabilities of leaf %d do not list the group's cipher suite", i)
		}
		if err := l.checkLifetimeLength(r.maxLifetime); err != nil {
			return err
		}
		if err := checkLeafFits(l, cr); err != nil {
			return err
		}
		return r.checkCredential(ctx.CipherSuite, l, nil)
	}); err != nil {
		return nil, err
	}
	all, err := rosterOf(tree, r.verifier)
	if err != nil {
		return nil, err
	}
	counts := &roster{tally: newTally()}
	if err := counts.checkChange(all, cr); err != nil {
		return nil, err
	}
	counts.merge(all)
	if err := r.checkSenders(ctx.CipherSuite, cr.senders, nil); err != nil {
		return nil, err
	}
	p := newPublicState(*ctx, tree, gi.ConfirmationTag)
	p.rules, p.counts = cr, counts
	return &p, nil
}
