package mls

import (
	"crypto"
	"crypto/rand"
	"slices"
	"sync"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// forgery is a room whose members can send what they shouldn't: every message has the signatures and tags that an
// insider can make, so that it fails at the broken rule and not before.
type forgery struct {
	testing.TB
	*room
	alice, bob, carol, dave *client
	hub                     crypto.Signer // the external sender
}

// firstForgery is made once; every test has a copy, which takes a thirtieth of the time.
var firstForgery struct {
	sync.Mutex
	*forgery
}

func newForgery(t testing.TB) *forgery {
	t.Helper()
	firstForgery.Lock()
	defer firstForgery.Unlock()
	if firstForgery.forgery == nil {
		firstForgery.forgery = makeForgery(t)
	}
	first := firstForgery.forgery
	f := &forgery{TB: t, room: &room{t: t, cs: first.cs, store: first.room.store.clone()}, hub: first.hub}
	for _, c := range first.members {
		c = &client{name: c.name, signer: c.signer, store: c.store.clone()}
		c.reload(t)
		f.members = append(f.members, c)
	}
	f.alice, f.bob, f.carol, f.dave = f.members[0], f.members[1], f.members[2], f.members[3]
	var err error
	f.server, err = LoadPublicGroup(publicConfig(), f.room.store.all())
	f.must(err)
	return f
}

func makeForgery(t testing.TB) *forgery {
	t.Helper()
	hub := newSigner(t, testSuite)
	key, err := testSuite.SignaturePublicKey(hub.Public())
	if err != nil {
		t.Fatal(err)
	}
	r := newRoom(t, testSuite, Extensions{
		{Type: ExtensionExternalSenders, Data: codec.Marshal(ExternalSenders{{SignatureKey: key, Credential: BasicCredential([]byte("hub"))}})},
		{Type: ExtensionRequiredCapabilities, Data: codec.Marshal(RequiredCapabilities{
			Extensions: []ExtensionType{ExtensionAppDataDictionary}, Proposals: []ProposalType{ProposalAppDataUpdate}})},
	})
	f := &forgery{TB: t, room: r, hub: hub, alice: r.members[0]}
	joined := r.add(f.alice, "bob", "carol", "dave")
	f.bob, f.carol, f.dave = joined[0], joined[1], joined[2]
	r.commit(f.alice, CommitOptions{ForcePath: true, Proposals: []Proposal{appData(0x8001, "data")}})
	r.commit(f.carol, CommitOptions{})
	return f
}

func (f *forgery) must(err error) {
	f.TB.Helper()
	if err != nil {
		f.TB.Fatal(err)
	}
}

// keyPackage makes a KeyPackage that edit may change before it is signed, by signer if there is one.
func (f *forgery) keyPackage(name string, signer crypto.Signer, edit func(*KeyPackage)) Proposal {
	f.TB.Helper()
	if signer == nil {
		signer = newSigner(f.TB, testSuite)
	}
	kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte(name)), Signer: signer})
	f.must(err)
	if edit != nil {
		edit(kp)
		f.must(kp.LeafNode.sign(testSuite, rand.Reader, signer, nil, 0))
		var w codec.Writer
		kp.marshalUnsigned(&w)
		kp.Signature, err = testSuite.SignWithLabel(rand.Reader, signer, labelKeyPackage, w.Bytes())
		f.must(err)
	}
	return add(kp)
}

// proposal frames a proposal of a member.
func (f *forgery) proposal(by *client, prop Proposal) *MLSMessage {
	f.TB.Helper()
	return f.proposalWith(by, prop, nil)
}

func (f *forgery) proposalWith(by *client, prop Proposal, aad []byte) *MLSMessage {
	f.TB.Helper()
	c := FramedContent{GroupID: by.GroupID(), Epoch: by.Epoch(), Sender: Sender{Type: SenderMember, Leaf: by.OwnLeaf()},
		AuthenticatedData: aad, ContentType: ContentProposal, Proposal: &prop}
	ac, err := signContent(testSuite, rand.Reader, by.signer, WireFormatPublicMessage, c, by.state.encoded)
	f.must(err)
	m, err := protectPublic(testSuite, ac, by.secrets.membership, by.state.encoded)
	f.must(err)
	return NewMLSMessage(m)
}

// request makes a new member's proposal of itself, signed by signer.
func (f *forgery) request(signer crypto.Signer, prop Proposal) *MLSMessage {
	f.TB.Helper()
	m, err := proposeFromOutside(testSuite, rand.Reader, signer, Sender{Type: SenderNewMemberProposal}, f.alice.GroupID(), f.alice.Epoch(), nil, prop)
	f.must(err)
	return m
}

// update makes an Update of a member that edit may change before it is signed, by signer if there is one.
func (f *forgery) update(by *client, signer crypto.Signer, edit func(*LeafNode)) Proposal {
	f.TB.Helper()
	pub, _, err := testSuite.GenerateHPKEKey(rand.Reader)
	f.must(err)
	l := by.state.tree.Leaf(by.OwnLeaf()).clone()
	l.Source, l.EncryptionKey = LeafNodeUpdate, pub
	if edit != nil {
		edit(l)
	}
	if signer == nil {
		signer = by.signer
	}
	f.must(l.sign(testSuite, rand.Reader, signer, by.GroupID(), by.OwnLeaf()))
	return Proposal{Type: ProposalUpdate, Update: &Update{LeafNode: *l}}
}

// forged is a commit with something wrong.
type forged struct {
	by       *client // nil: alice
	props    []Proposal
	refs     [][]byte
	noPath   bool
	template func(*LeafNode)             // changes the path's leaf before it is made
	leaf     func(*LeafNode)             // changes the path's leaf; it is signed again
	keys     func([]HPKEPublicKey)       // changes the keys of the path's nodes, whose parent hashes follow
	path     func(*UpdatePath)           // changes the path
	content  func(*FramedContent)        // before signing
	signed   func(*AuthenticatedContent) // after signing, before the tags
	framed   func(*PublicMessage)
	signer   crypto.Signer
	// external makes it an external commit of a client of that name. The props have to have the external_init.
	external string
	leafKey  crypto.Signer // of the path's leaf, if not the signer
	private  bool          // as a PrivateMessage; framed isn't called
}

// tagged gives a message of a member a membership tag that fits.
func (f *forgery) tagged(by *client, m *MLSMessage) *MLSMessage {
	f.TB.Helper()
	p, err := protectPublic(testSuite, m.Public.authenticated(), by.secrets.membership, by.state.encoded)
	f.must(err)
	return NewMLSMessage(p)
}

// pend makes a proposal pending everywhere and returns its reference.
func (f *forgery) pend(m *MLSMessage) []byte {
	f.TB.Helper()
	f.room.propose(m, nil)
	return m.Public.authenticated().ref(testSuite)
}

// private frames a member's handshake message as a PrivateMessage instead; nil if it can't be. A commit that doesn't
// fail before has no confirmation tag then.
func (f *forgery) private(m *MLSMessage) *MLSMessage {
	f.TB.Helper()
	c := m.Public.Content
	for _, by := range f.members {
		if c.Sender != (Sender{Type: SenderMember, Leaf: by.OwnLeaf()}) || c.ContentType == ContentApplication {
			continue
		}
		ac, err := signContent(testSuite, rand.Reader, by.signer, WireFormatPrivateMessage, c, by.state.encoded)
		f.must(err)
		if c.ContentType == ContentCommit {
			ac.ConfirmationTag = make([]byte, testSuite.HashSize())
		}
		return f.encrypt(by, ac)
	}
	return nil
}

// externalInit makes an external_init proposal for the current epoch.
func (f *forgery) externalInit() Proposal {
	f.TB.Helper()
	pub, _ := f.server.GroupInfo().ExternalPub()
	kem, _, err := testSuite.externalInitSend(rand.Reader, pub)
	f.must(err)
	return Proposal{Type: ProposalExternalInit, ExternalInit: &ExternalInit{KEMOutput: kem}}
}

// commit makes the message. Proposals are applied to the path's tree as far as they can be.
func (f *forgery) commit(o forged) *MLSMessage {
	f.TB.Helper()
	by := o.by
	if by == nil {
		by = f.alice
	}
	state := &by.state
	signer, sender, at := by.signer, Sender{Type: SenderMember, Leaf: by.OwnLeaf()}, by.OwnLeaf()
	if o.external != "" {
		signer, sender = newSigner(f.TB, testSuite), Sender{Type: SenderNewMemberCommit}
	}
	if o.signer != nil {
		signer = o.signer
	}
	leafKey := signer
	if o.leafKey != nil {
		leafKey = o.leafKey
	}
	commit := &Commit{}
	for _, ref := range o.refs {
		commit.Proposals = append(commit.Proposals, ProposalOrRef{Reference: ref})
	}
	next := state.context
	next.Epoch++
	tree := state.tree.clone()
	for _, ref := range o.refs {
		switch e := state.findPending(ref); {
		case e == nil || e.Sender.Leaf == at || tree.Leaf(e.Sender.Leaf) == nil:
		case e.Proposal.Type == ProposalSelfRemove:
			tree.removeLeaf(e.Sender.Leaf)
		case e.Proposal.Update != nil:
			tree.updateLeaf(e.Sender.Leaf, &e.Proposal.Update.LeafNode)
		}
	}
	var added []LeafIndex
	var ids []PreSharedKeyID
	for i := range o.props {
		p, err := fillNonce(testSuite, rand.Reader, o.props[i])
		f.must(err)
		commit.Proposals = append(commit.Proposals, ProposalOrRef{Proposal: &p})
		switch {
		case p.Remove != nil && tree.Leaf(p.Remove.Removed) != nil && p.Remove.Removed != at:
			tree.removeLeaf(p.Remove.Removed)
		case p.Add != nil:
			added = append(added, tree.addLeaf(&p.Add.KeyPackage.LeafNode))
		case p.GroupContextExtensions != nil:
			next.Extensions = p.GroupContextExtensions.Extensions
		case p.PSK != nil:
			ids = append(ids, p.PSK.PSK)
		}
	}
	e := &evolution{context: next}
	for i := range o.props {
		e.list = append(e.list, resolved{PendingProposal: PendingProposal{Proposal: o.props[i]}})
	}
	r := by.cfg.rules()
	if !slices.ContainsFunc(o.props, func(p Proposal) bool { return p.AppDataUpdate != nil && r.components[p.AppDataUpdate.Component] == nil }) {
		if e.applyExtensions(&r) == nil {
			next = e.context
		}
	}
	commitSecret := testSuite.zeroSecret()
	if !o.noPath {
		template := state.tree.Leaf(at).clone()
		if o.external != "" {
			key, err := testSuite.SignaturePublicKey(leafKey.Public())
			f.must(err)
			template = &LeafNode{SignatureKey: key, Credential: BasicCredential([]byte(o.external)), Capabilities: DefaultCapabilities()}
		}
		if o.template != nil {
			o.template(template)
		}
		if o.external != "" {
			at = tree.addLeaf(template)
		}
		np, err := tree.generatePath(testSuite, rand.Reader, at, template, by.GroupID(), leafKey)
		f.must(err)
		if o.keys != nil {
			o.keys(np.keys)
			parentHash := tree.setPath(testSuite, at, np.path, np.copath, np.keys)
			o.leaf = func(l *LeafNode) { l.ParentHash = parentHash }
		}
		if o.leaf != nil {
			np.leaf = np.leaf.clone()
			o.leaf(np.leaf)
			f.must(np.leaf.sign(testSuite, rand.Reader, leafKey, by.GroupID(), at))
			tree.setLeaf(at, np.leaf)
		}
		next.TreeHash = tree.Hash(testSuite)
		commit.Path, err = np.encrypt(rand.Reader, tree, added, codec.Marshal(next))
		f.must(err)
		commitSecret = np.commitSecret
		if o.path != nil {
			o.path(commit.Path)
		}
	}
	next.TreeHash = tree.Hash(testSuite)
	c := FramedContent{GroupID: by.GroupID(), Epoch: by.Epoch(), Sender: sender, ContentType: ContentCommit, Commit: commit}
	if o.content != nil {
		o.content(&c)
	}
	format := WireFormatPublicMessage
	if o.private {
		format = WireFormatPrivateMessage
	}
	ac, err := signContent(testSuite, rand.Reader, signer, format, c, state.encoded)
	f.must(err)
	if o.signed != nil {
		o.signed(ac)
	}
	next.ConfirmedTranscriptHash = testSuite.confirmedTranscriptHash(state.interim, ac)
	psk, err := derivePSK(testConfig(), testSuite, ids, by.resumption)
	if err != nil {
		psk = testSuite.zeroSecret()
	}
	ctx := codec.Marshal(next)
	es := testSuite.epochSecrets(testSuite.joinerSecret(by.secrets.init, commitSecret, ctx), psk, ctx)
	ac.ConfirmationTag = es.confirmationTag(testSuite, next.ConfirmedTranscriptHash)
	if o.private {
		return f.encrypt(by, ac)
	}
	m, err := protectPublic(testSuite, ac, by.secrets.membership, state.encoded)
	f.must(err)
	if o.framed != nil {
		o.framed(m)
	}
	return NewMLSMessage(m)
}

// sign signs content as a PrivateMessage's, in whosever name it is.
func (f *forgery) sign(by *client, c FramedContent) *AuthenticatedContent {
	f.TB.Helper()
	c.GroupID, c.Epoch = by.GroupID(), by.Epoch()
	ac, err := signContent(testSuite, rand.Reader, by.signer, WireFormatPrivateMessage, c, by.state.encoded)
	f.must(err)
	return ac
}

// encrypt frames content as a PrivateMessage with the next key of its sender, whoever that is.
func (f *forgery) encrypt(by *client, ac *AuthenticatedContent) *MLSMessage {
	f.TB.Helper()
	m, _, err := protectPrivate(testSuite, rand.Reader, by.messages, by.secrets.senderData, ac, nil)
	f.must(err)
	saveSecrets(by.store, by.Epoch(), by.messages)
	return NewMLSMessage(m)
}
