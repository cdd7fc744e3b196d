package mls

import (
	"bytes"
	"cmp"
	"crypto"
	"errors"
	"fmt"
	"iter"
	"sync"

	"github.com/parley-mls/parley/mls/codec"
)

// ErrOwnMessage: the message is this client's own, for which it has no keys (any more).
var ErrOwnMessage = errors.New("mls: own message")

// ErrStaged: an own commit is staged, or none is.
var ErrStaged = errors.New("mls: staged commit")

// ErrSigner: the signer for the own leaf's signature key isn't there.
var ErrSigner = errors.New("mls: no signer for the own leaf's signature key")

// Group is a client's state in a group. Its methods that take a Batch write to it what they change, and if they fail
// change nothing; the caller makes the Batch durable before it acts on the result. If it can't, the Group in memory is
// ahead of the store, and has to be loaded again. A nil Batch keeps the changes in memory only.
//
// Its methods may be called by several goroutines at once. Those that change it or prepare a change, which are those
// with a Batch and AddSigner, take turns. All others see the group as the last finished one left it and don't wait for
// one that is under way. A Batch is written to within its method's turn: Batches of one group must become durable in
// that order, and who calls from several goroutines and gives each call a Batch of its own has to see to that.
//
// What is called in the course of a change (Config's functions, the CredentialVerifier, Components, Signers, the Batch)
// may call the group's methods that don't change it, and no others: those would wait for themselves.
type Group struct {
	redact
	op   sync.Mutex   // held throughout a change; guards all but view
	mu   sync.RWMutex // guards view
	view groupView

	cfg      Config
	state    publicState
	own      LeafIndex
	active   bool
	private  *treePrivate
	secrets  *epochSecrets // without the encryption secret, which the secret tree replaces
	messages *secretTree
	exports  *exporterTree // nil if the epoch was saved in format 1
	past     []*pastEpoch  // oldest first
	staged   *PendingCommit
	entrance entrance
	sealer   *sealer                  // seals the epoch's stored state; nil if it is of format 1
	link     *link                    // while the group is made that follows from another one
	signers  map[string]crypto.Signer // by signature key: the own leaf's, and one that will replace it

	disregard func(PendingProposal) bool // nil: none
}

// groupView is what a Group's reading methods see: the state as the last change left it. Nothing in it changes, apart
// from what readers don't touch: the public state's rules and counts.
type groupView struct {
	redact
	state   publicState
	own     LeafIndex
	active  bool
	secrets *epochSecrets
	staged  *PendingCommit
	resync  *PendingJoin
	past    []*pastEpoch
	signer  crypto.Signer // nil if there is none for the own leaf

	generation uint32 // of the next application message
}

// done ends a change, whether it succeeded or not.
func (g *Group) done() {
	g.publish()
	g.op.Unlock()
}

// publish shows the state to the reading methods.
func (g *Group) publish() {
	v := groupView{state: g.state, own: g.own, active: g.active, secrets: g.secrets, staged: g.staged,
		resync: g.entrance.resync, past: g.past}
	if g.active {
		v.signer, _ = g.signer()
	}
	if g.messages != nil {
		if r := g.messages.ratchets[ratchetID{g.own, applicationRatchet}]; r != nil {
			v.generation = r.generation
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.view
	g.view = v
	if old.secrets != nil && old.secrets != v.secrets { // no reader has them any more
		old.secrets.erase()
	}
	for _, e := range old.past {
		if len(v.past) > 0 && e == v.past[0] {
			break
		}
		e.resumption.erase()
	}
}

// public returns what readers see of the public state.
func (g *Group) public() publicState {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.state
}

// GroupOptions says what a new group is.
type GroupOptions struct {
	redact
	GroupID        []byte // should be unique (RFC 9420, Section 11)
	Suite          CipherSuite
	Credential     Credential
	Signer         crypto.Signer
	Capabilities   Capabilities // zero: DefaultCapabilities and random reserved values (RFC 9420, Section 13.5)
	Extensions     Extensions   // of the GroupContext
	Lifetime       Lifetime     // zero: DefaultLifetime from now
	LeafExtensions Extensions
}

// NewGroup makes a group with this client as its only member, in epoch 0 (RFC 9420, Section 11). It fails with
// ErrUnsupported for a suite that isn't, and with a ValidationError if the options break a rule on the leaf or on the
// GroupContext's extensions.
func NewGroup(cfg Config, b Batch, o GroupOptions) (*Group, error) {
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{
		Rand: cfg.rand(), Time: cfg.now, Suite: o.Suite, Credential: o.Credential, Signer: o.Signer,
		Capabilities: o.Capabilities, Lifetime: o.Lifetime, LeafExtensions: o.LeafExtensions,
	})
	if err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	leaf := &kp.LeafNode
	tree := newRatchetTree(leaf)
	ctx := GroupContext{
		Version: MLS10, CipherSuite: o.Suite, GroupID: bytes.Clone(o.GroupID), TreeHash: tree.Hash(o.Suite),
		ConfirmedTranscriptHash: []byte{}, Extensions: o.Extensions,
	}
	cr, err := parseContextRules(o.Extensions)
	if err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	if err := cr.receivers.check(o.Suite); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	r := cfg.rules()
	if err := checkLeafFits(leaf, cr); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	if err := cr.terms.checkMediaTypes(leaf); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	if err := leaf.checkLifetimeLength(r.maxLifetime); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	if err := r.checkCredential(o.Suite, leaf, nil); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	if err := r.checkSenders(o.Suite, cr.senders, nil); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	epochSecret, err := o.Suite.randomSecret(cfg.rand())
	if err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	es := o.Suite.epochSecretsFrom(epochSecret)
	epochSecret.erase()
	secret(secrets.InitKey).erase() // nobody will add this client by it
	tag := es.confirmationTag(o.Suite, ctx.ConfirmedTranscriptHash)
	g := &Group{
		cfg: cfg, state: newPublicState(ctx, tree, tag), active: true,
		private: newTreePrivate(0, secrets.EncryptionKey), signers: make(map[string]crypto.Signer),
	}
	sealers, err := cfg.newSealers()
	if err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	g.start(es, sealers)
	if _, err := g.state.roster(cfg.Verifier); err != nil { // the credential names no client
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	if err := g.AddSigner(o.Signer); err != nil {
		return nil, fmt.Errorf("mls: new group: %w", err)
	}
	g.saveAll(orDiscard(b))
	return g, nil
}

// start takes the secrets of the epoch that the public state is in, and what seals them in the store.
func (g *Group) start(es *epochSecrets, s epochSealers) {
	g.messages = newSecretTree(g.suite(), g.state.tree.Size(), es.encryption)
	g.messages.sealer, g.sealer = s.messages, s.state
	g.exports = newExporterTree(es.applicationExport)
	es.encryption.erase() // the tree has a copy
	es.encryption, es.applicationExport = nil, nil
	g.secrets = es
}

// saveAll writes the whole state of a group that has no past, and shows it to readers.
func (g *Group) saveAll(b Batch) {
	saveTree(b, g.state.tree)
	g.state.saveExtensions(b)
	g.saveEpoch(b)
	g.publish()
}

// saveEpoch writes what every epoch has anew.
func (g *Group) saveEpoch(b Batch) {
	state := g.sealer.seal(b)
	state.Set(key1(keyHeader), codec.Marshal(&header{
		kind: kindGroup, slots: g.state.tree.Size(), context: g.state.context, extEpoch: g.state.extEpoch,
		confirmationTag: g.state.confirmationTag, own: g.own, active: g.active, secrets: g.secrets,
	}))
	g.entrance.save(state)
	if g.active {
		g.sealer.save(b, key1(keyStateSeal))
		g.messages.sealer.save(b, key64(keyEpochSeal, g.state.context.Epoch))
		state.Set(key1(keyPrivate), codec.Marshal(g.private))
		g.exports.save(state)
		saveSecrets(b, g.state.context.Epoch, g.messages)
	}
}

// LoadGroup restores a group from what its operations wrote: state yields every entry once, in any order, with the keys
// that the Batch got. signer is for the own leaf's signature key, or for the one that a staged commit brings, or nil
// until AddSigner. It fails with ErrUnsupported for a state of a later format, and if an entry is damaged or missing.
func LoadGroup(cfg Config, signer crypto.Signer, state iter.Seq2[[]byte, []byte]) (*Group, error) {
	in, err := readEntries(state)
	if err != nil {
		return nil, err
	}
	if in.header.kind != kindGroup {
		return nil, fmt.Errorf("%w: not a client's group", errState)
	}
	g := &Group{cfg: cfg, own: in.header.own, active: in.header.active, signers: make(map[string]crypto.Signer)}
	if g.state, err = in.publicState(); err != nil {
		return nil, err
	}
	if g.entrance, err = loadEntrance(cfg, in.entrance); err != nil {
		return nil, err
	}
	if !g.active {
		g.publish()
		return g, nil
	}
	g.secrets, g.exports, g.sealer = in.header.secrets, in.exports, in.stateSeal
	g.private = new(treePrivate)
	if err := codec.Unmarshal(in.private, g.private); err != nil {
		return nil, fmt.Errorf("mls: load state: private keys: %w", err)
	}
	if !g.state.tree.occupied(g.own) || g.private.leaf != g.own {
		return nil, fmt.Errorf("%w: own leaf %d", errState, g.own)
	}
	if g.messages, err = in.secretTree(g.suite(), g.state.context.Epoch, g.state.tree.Size()); err != nil {
		return nil, fmt.Errorf("mls: load state: secrets: %w", err)
	}
	if err := g.loadPast(in); err != nil {
		return nil, err
	}
	if signer != nil {
		if err := g.AddSigner(signer); err != nil {
			return nil, fmt.Errorf("mls: load state: %w", err)
		}
	}
	if in.staged != nil {
		if g.staged, err = g.loadPendingCommit(in.staged); err != nil {
			return nil, fmt.Errorf("mls: load state: staged commit: %w", err)
		}
	}
	g.publish()
	return g, nil
}

// AddSigner gives the group a signer, of the group's suite. A group uses the one whose public key is in its own leaf,
// so that a commit with a new signature key can be confirmed or dropped after a restart.
func (g *Group) AddSigner(s crypto.Signer) error {
	g.op.Lock()
	defer g.done()
	pub, err := g.suite().SignaturePublicKey(s.Public())
	if err != nil {
		return fmt.Errorf("mls: signer: %w", err)
	}
	g.signers[string(pub)] = s
	return nil
}

func (g *Group) signer() (crypto.Signer, error) {
	s, ok := g.signers[string(g.state.tree.signatureKey(g.own))]
	if !ok {
		return nil, ErrSigner
	}
	return s, nil
}

func (g *Group) suite() CipherSuite { return g.state.context.CipherSuite }

// GroupID returns the group's identifier, which may not be changed.
func (g *Group) GroupID() []byte { return g.public().context.GroupID }

// Epoch returns the number of the current epoch.
func (g *Group) Epoch() uint64 { return g.public().context.Epoch }

// Suite returns the cipher suite.
func (g *Group) Suite() CipherSuite { return g.public().context.CipherSuite }

// OwnLeaf returns the index of this client's leaf.
func (g *Group) OwnLeaf() LeafIndex {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.own
}

// Active says whether this client is a member. After its removal it isn't, and its secrets are deleted.
func (g *Group) Active() bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.active
}

// live says whether this client may send to the group.
func (g *Group) live() error {
	switch {
	case !g.active:
		return ErrRemoved
	case g.state.reinit != nil:
		return ErrEnded
	case g.entrance.resync != nil:
		return ErrResync
	}
	return nil
}

// Context returns the GroupContext of the current epoch, whose fields may not be changed.
func (g *Group) Context() GroupContext { return g.public().context }

// ConfirmationTag returns the confirmation tag of the commit that began the epoch.
func (g *Group) ConfirmationTag() []byte { return g.public().confirmationTag }

// EpochAuthenticator returns a value that two members have in common only if they agree on the group's state (RFC
// 9420, Section 8.7). It is nil for a former member.
func (g *Group) EpochAuthenticator() []byte {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if !g.view.active {
		return nil
	}
	return bytes.Clone(g.view.secrets.authenticator)
}

// Export returns n bytes of key material for the application (RFC 9420, Section 8.5), the same for all members in this
// epoch. It fails with ErrMalformed if n is negative or more than 255 times HashSize, and with ErrRemoved for a former
// member.
func (g *Group) Export(label string, context []byte, n int) ([]byte, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if !g.view.active {
		return nil, fmt.Errorf("mls: export: %w", ErrRemoved)
	}
	cs := g.view.state.context.CipherSuite
	if n < 0 || n > 255*cs.HashSize() {
		return nil, fmt.Errorf("mls: export: %w: %d bytes", ErrMalformed, n)
	}
	return g.view.secrets.export(cs, label, context, n), nil
}

// Members returns the members in the order of their leaves.
func (g *Group) Members() iter.Seq[Member] { return g.public().members() }

// Member returns the member at a leaf.
func (g *Group) Member(i LeafIndex) (Member, bool) { return g.public().member(i) }

// Tree returns the ratchet tree of the current epoch. It stays as it is when the group moves on.
func (g *Group) Tree() *RatchetTree { return g.public().tree }

// Dictionary returns the GroupContext's application data, which may not be changed.
func (g *Group) Dictionary() AppDataDictionary { return g.public().dictionary() }

// Extension returns the data of an extension of the GroupContext, and whether there is one.
func (g *Group) Extension(t ExtensionType) ([]byte, bool) {
	return g.public().context.Extensions.Find(t)
}

// Pending returns the proposals of this epoch that were sent or received and not committed, in that order.
func (g *Group) Pending() []PendingProposal { return g.public().pendingList() }

func (p publicState) members() iter.Seq[Member] {
	t := p.tree
	return func(yield func(Member) bool) {
		for i, l := range t.Leaves() {
			if !yield(Member{Index: i, Leaf: l}) {
				return
			}
		}
	}
}

func (p publicState) member(i LeafIndex) (Member, bool) {
	l := p.tree.Leaf(i)
	return Member{Index: i, Leaf: l}, l != nil
}

func (p publicState) dictionary() AppDataDictionary {
	d, err := dictionaryOf(p.context.Extensions)
	if err != nil {
		return nil // a context with a damaged dictionary was refused
	}
	return d
}

// GroupInfo returns the signed description of the current epoch (RFC 9420, Section 12.4.3), with the ratchet tree and
// with the key for external commits if wanted. It fails with ErrRemoved for a former member, with ErrEnded after a
// ReInit, and with ErrSigner.
func (g *Group) GroupInfo(withTree, externalPub bool) (*GroupInfo, error) {
	gi, tree, signer, err := g.describe(externalPub)
	if err != nil {
		return nil, fmt.Errorf("mls: group info: %w", err)
	}
	if withTree {
		gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, codec.Marshal(tree))
	}
	if err := gi.sign(g.cfg.rand(), signer); err != nil {
		return nil, fmt.Errorf("mls: group info: %w", err)
	}
	return gi, nil
}

// describe is the part of GroupInfo for which the secrets must stay.
func (g *Group) describe(externalPub bool) (*GroupInfo, *RatchetTree, crypto.Signer, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	v := &g.view
	switch {
	case !v.active:
		return nil, nil, nil, ErrRemoved
	case v.state.reinit != nil:
		return nil, nil, nil, ErrEnded
	case v.signer == nil:
		return nil, nil, nil, ErrSigner
	}
	gi := &GroupInfo{GroupContext: v.state.context, ConfirmationTag: v.state.confirmationTag, Signer: v.own}
	if externalPub {
		var err error
		if gi.Extensions, err = setExternalPub(nil, v.state.suite(), v.secrets); err != nil {
			return nil, nil, nil, err
		}
	}
	return gi, v.state.tree, v.signer, nil
}

func setExternalPub(ext Extensions, cs CipherSuite, es *epochSecrets) (Extensions, error) {
	pub, err := cs.externalPub(es.external)
	if err != nil {
		return nil, fmt.Errorf("external key: %w", err)
	}
	var w codec.Writer
	w.Opaque(pub)
	return ext.Set(ExtensionExternalPub, w.Bytes()), nil
}

// signHandshake signs a proposal or commit as this client's, for the format in which it will be sent.
func (g *Group) signHandshake(signer crypto.Signer, aad []byte, c FramedContent) (*AuthenticatedContent, error) {
	format := cmp.Or(g.cfg.HandshakeFormat, WireFormatPublicMessage)
	if c.Proposal != nil && c.Proposal.Type == ProposalSelfRemove {
		format = WireFormatPublicMessage // so that a joiner can commit it
	}
	switch format {
	case WireFormatPublicMessage, WireFormatPrivateMessage:
	case WireFormatSemiPrivateMessage:
		cr, err := g.state.contextRules()
		if err != nil {
			return nil, err
		}
		if err := cr.semiPrivate(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: handshakes of wire format %d", ErrUnsupported, format)
	}
	aad, err := g.state.frameAAD(aad)
	if err != nil {
		return nil, err
	}
	c.GroupID, c.Epoch, c.Sender = g.state.context.GroupID, g.state.context.Epoch, Sender{Type: SenderMember, Leaf: g.own}
	c.AuthenticatedData = aad
	return signContent(g.suite(), g.cfg.rand(), signer, format, c, g.state.encoded)
}

// frame makes the message of what this client signed, in the format that it was signed for. The key that encrypts a
// PrivateMessage or SemiPrivateMessage is deleted, also from the store; if frame fails, nothing changes.
func (g *Group) frame(b Batch, ac *AuthenticatedContent) (*MLSMessage, error) {
	switch ac.WireFormat {
	case WireFormatPublicMessage:
		m, err := protectPublic(g.suite(), ac, g.secrets.membership, g.state.encoded)
		if err != nil {
			return nil, err
		}
		return NewMLSMessage(m), nil
	case WireFormatSemiPrivateMessage:
		cr, err := g.state.contextRules()
		if err != nil {
			return nil, err
		}
		m, err := protectSemiPrivate(g.suite(), g.cfg.rand(), g.messages, g.secrets.senderData, ac, g.state.encoded, cr.receivers, g.cfg.padded)
		if err != nil {
			return nil, err
		}
		saveSecrets(b, g.state.context.Epoch, g.messages)
		return NewMLSMessage(m), nil
	}
	m, _, err := protectPrivate(g.suite(), g.cfg.rand(), g.messages, g.secrets.senderData, ac, g.cfg.padded)
	if err != nil {
		return nil, err
	}
	saveSecrets(b, g.state.context.Epoch, g.messages)
	return NewMLSMessage(m), nil
}

// Generation returns the generation of the key that Encrypt uses next (RFC 9420, Section 9.1): the number of application
// messages that this client has encrypted in the epoch. It is 0 for a former member.
func (g *Group) Generation() uint32 {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.generation
}

// Disregard has Commit and Encrypt pass over the pending proposals that unfounded says so of: valid ones for which the
// application sees no reason. They stay pending, since others may commit them. nil disregards none, which is how every group
// begins, one from LoadGroup too. unfounded may call the methods of the Group that only read.
func (g *Group) Disregard(unfounded func(PendingProposal) bool) {
	g.op.Lock()
	defer g.done()
	g.disregard = unfounded
}

// Encrypt makes a message of application data (RFC 9420, Section 15). aad is authenticated and not encrypted, a SafeAAD
// where Group.SafeAAD says so; data is an ApplicationFraming where Group.MediaTypes has some. It fails with ErrPending
// while there are proposals that no commit has applied, so that nobody reads on whose removal was proposed (Section
// 12.4) but for those that are disregarded, with ErrRemoved for a former member, with ErrEnded after a ReInit, with
// ErrResync while a Resync waits, and with ErrSigner.
func (g *Group) Encrypt(b Batch, aad, data []byte) (*MLSMessage, error) {
	g.op.Lock()
	defer g.done()
	if err := g.live(); err != nil {
		return nil, fmt.Errorf("mls: encrypt: %w", err)
	}
	if n := len(g.due()); n > 0 {
		return nil, fmt.Errorf("mls: encrypt: %w: %d", ErrPending, n)
	}
	signer, err := g.signer()
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt: %w", err)
	}
	if aad, err = g.state.frameAAD(aad); err != nil {
		return nil, fmt.Errorf("mls: encrypt: %w", err)
	}
	cr, err := g.state.contextRules()
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt: %w", err)
	}
	if _, err := cr.unframe(data); err != nil {
		return nil, fmt.Errorf("mls: encrypt: %w", err)
	}
	ac, err := signContent(g.suite(), g.cfg.rand(), signer, WireFormatPrivateMessage, FramedContent{
		GroupID: g.state.context.GroupID, Epoch: g.state.context.Epoch, Sender: Sender{Type: SenderMember, Leaf: g.own},
		AuthenticatedData: aad, ContentType: ContentApplication, ApplicationData: data,
	}, g.state.encoded)
	if err != nil {
		return nil, err
	}
	return g.frame(orDiscard(b), ac)
}
