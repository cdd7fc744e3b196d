package mls

import (
	"bytes"
	"crypto/rand"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// section says whether an error is a violation of a section.
func section(err error, want string) bool {
	var v *ValidationError
	return errors.As(err, &v) && v.Section == want
}

func TestExportedKeysAreBounded(t *testing.T) {
	f := newForgery(t)
	most := 255 * testSuite.HashSize()
	for n, ok := range map[int]bool{-1: false, 0: true, most: true, most + 1: false} {
		func() {
			defer func() {
				if r := recover(); r != nil {
					t.Errorf("%d bytes: %v", n, r)
				}
			}()
			if b, err := f.alice.Export("x", nil, n); (err == nil) != ok || ok && len(b) != n {
				t.Errorf("%d bytes: got %d, %v", n, len(b), err)
			} else if !ok && !errors.Is(err, ErrMalformed) {
				t.Errorf("%d bytes: got %v, want ErrMalformed", n, err)
			}
		}()
	}
}

// TestStagedCommitsFitTheStateTheyWereStagedFor: another group, another epoch, another branch of the same epoch.
func TestStagedCommitsFitTheStateTheyWereStagedFor(t *testing.T) {
	f := newForgery(t)
	got, err := f.bob.Receive(nil, f.commit(forged{}))
	f.must(err)
	staged := got.(*StagedCommit)
	public, err := f.server.CheckCommit(f.commit(forged{}).Public)
	f.must(err)
	proposal, err := f.server.CheckProposal(f.proposal(f.carol, remove(1)).Public)
	f.must(err)
	for what, change := range map[string]func(ctx *GroupContext){
		"another group":  func(ctx *GroupContext) { ctx.GroupID = []byte("another") },
		"another epoch":  func(ctx *GroupContext) { ctx.Epoch++ },
		"another branch": func(ctx *GroupContext) { ctx.ConfirmedTranscriptHash = flip(ctx.ConfirmedTranscriptHash) },
	} {
		bob, err := LoadGroup(testConfig(), f.bob.signer, f.bob.store.all())
		f.must(err)
		server, err := LoadPublicGroup(publicConfig(), f.store.all())
		f.must(err)
		change(&bob.state.context)
		change(&server.state.context)
		if err := bob.Apply(nil, staged); !errors.Is(err, ErrEpoch) {
			t.Errorf("%s: got %v, want ErrEpoch", what, err)
		}
		if err := server.Apply(nil, public, nil); !errors.Is(err, ErrEpoch) {
			t.Errorf("%s, server: got %v, want ErrEpoch", what, err)
		}
	}
	f.room.commit(f.carol, CommitOptions{})
	for what, apply := range map[string]func() error{
		"member after another commit":  func() error { return f.bob.Apply(nil, staged) },
		"server after another commit":  func() error { return f.server.Apply(nil, public, nil) },
		"proposal of the epoch before": func() error { return f.server.ApplyProposal(nil, proposal) },
	} {
		if err := apply(); !errors.Is(err, ErrEpoch) {
			t.Errorf("%s: got %v, want ErrEpoch", what, err)
		}
	}
}

// TestOwnCommitsKeepTheRules: a committer refuses what the others would.
func TestOwnCommitsKeepTheRules(t *testing.T) {
	for _, v := range []struct {
		section, rule string
		options       func(f *forgery) CommitOptions
	}{
		{"5.3.1", "credential", func(*forgery) CommitOptions {
			c := BasicCredential([]byte("bad"))
			return CommitOptions{Credential: &c}
		}},
		{"5.3.1", "successor", func(*forgery) CommitOptions {
			c := BasicCredential([]byte("bob"))
			return CommitOptions{Credential: &c}
		}},
		{"7.3", "signature key of a member", func(f *forgery) CommitOptions { return CommitOptions{Signer: f.bob.signer} }},
		{"12.1.7", "required capability", func(f *forgery) CommitOptions {
			return CommitOptions{Proposals: []Proposal{extensions(f, func(e Extensions) Extensions {
				return e.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{Credentials: []CredentialType{0xf00d}}))
			})}}
		}},
		{"12.1.3", "remove of nobody", func(*forgery) CommitOptions { return CommitOptions{Proposals: []Proposal{remove(9)}} }},
		{"12.2", "remove of itself", func(*forgery) CommitOptions { return CommitOptions{Proposals: []Proposal{remove(0)}} }},
		{"12.4.2", "unknown pre-shared key", func(*forgery) CommitOptions {
			return CommitOptions{Proposals: []Proposal{psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("other")})}}
		}},
	} {
		t.Run(v.rule, func(t *testing.T) {
			f := newForgery(t)
			before := whole(f.alice.Group)
			if _, err := f.alice.Commit(f.alice.store, v.options(f)); !section(err, v.section) {
				t.Errorf("got %v, want a violation of %s", err, v.section)
			}
			unchanged(t, "alice", whole(f.alice.Group), before)
		})
	}
}

func TestOwnLeavesFitWhatTheCommitAsksFor(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	dictionary := codec.Marshal(AppDataDictionary{{ComponentAppComponents, codec.Marshal(ComponentsList{0x8001})}})
	_, err := r.members[0].Commit(nil, CommitOptions{Proposals: []Proposal{{Type: ProposalGroupContextExtensions,
		GroupContextExtensions: &GroupContextExtensions{Extensions: Extensions{{ExtensionAppDataDictionary, dictionary}}}}}})
	if !section(err, sectionNegotiation) {
		t.Errorf("got %v, want a violation of %s", err, sectionNegotiation)
	}
}

// TestExternalCommitsKeepTheRules is the same for who joins by an external commit.
func TestExternalCommitsKeepTheRules(t *testing.T) {
	f := newForgery(t)
	gi, err := f.alice.GroupInfo(true, true)
	f.must(err)
	bare, err := f.alice.GroupInfo(true, false)
	f.must(err)
	without := func(edit func(*Capabilities)) func(o *ExternalJoinOptions) {
		return func(o *ExternalJoinOptions) {
			o.Capabilities = DefaultCapabilities()
			edit(&o.Capabilities)
		}
	}
	for _, v := range []struct {
		section, rule string
		edit          func(o *ExternalJoinOptions)
	}{
		{"12.4.3.2", "no key for external commits", func(o *ExternalJoinOptions) { o.GroupInfo = bare }},
		{"5.3.1", "credential", func(o *ExternalJoinOptions) { o.Credential = BasicCredential([]byte("bad")) }},
		{"12.2", "client that is a member", func(o *ExternalJoinOptions) { o.Credential = BasicCredential([]byte("bob")) }},
		{"7.3", "signature key of a member", func(o *ExternalJoinOptions) { o.Signer = f.bob.signer }},
		{"7.2", "credential type not listed", without(func(c *Capabilities) { c.Credentials = nil })},
		{"11.1", "required capability", without(func(c *Capabilities) { c.Proposals = nil })},
		{"7.3", "extension not listed", func(o *ExternalJoinOptions) { o.LeafExtensions = Extensions{{Type: 0xf00d}} }},
		{"12.4.2", "unknown pre-shared key", func(o *ExternalJoinOptions) {
			o.Proposals = []Proposal{psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("other")})}
		}},
		{"12.2", "add", func(o *ExternalJoinOptions) { o.Proposals = []Proposal{f.keyPackage("new", nil, nil)} }},
		{"5.3.1", "remove of another", func(o *ExternalJoinOptions) { o.Proposals = []Proposal{remove(1)} }},
	} {
		t.Run(v.rule, func(t *testing.T) {
			o := ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite)}
			v.edit(&o)
			if _, err := ExternalJoin(testConfig(), o); !section(err, v.section) {
				t.Errorf("got %v, want a violation of %s", err, v.section)
			}
		})
	}
}

func TestFullTreesTakeNobody(t *testing.T) {
	f := newForgery(t)
	gi, err := f.alice.GroupInfo(false, true)
	f.must(err)
	tree := fresh(t, f.alice.Tree())
	tree.count = maxLeafSlots
	_, err = ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: gi, Tree: tree, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite)})
	if !section(err, "7.7") || !errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want a violation of 7.7", err)
	}
}

func TestServerTellsContentTypesApart(t *testing.T) {
	f := newForgery(t)
	proposal, commit := f.proposal(f.carol, remove(1)).Public, f.commit(forged{}).Public
	empty := func(m *PublicMessage, typ ContentType) *PublicMessage {
		c := *m
		c.Content.ContentType, c.Content.Commit, c.Content.Proposal = typ, nil, nil
		return &c
	}
	both := func(typ ContentType) *PublicMessage {
		c := *commit
		c.Content.ContentType, c.Content.Proposal = typ, proposal.Content.Proposal
		return &c
	}
	for what, err := range map[string]error{
		"proposal as commit":        second(f.server.CheckCommit(proposal)),
		"commit as proposal":        second(f.server.CheckProposal(commit)),
		"commit without a body":     second(f.server.CheckCommit(empty(commit, ContentCommit))),
		"proposal without a body":   second(f.server.CheckProposal(empty(proposal, ContentProposal))),
		"proposal with a commit":    second(f.server.CheckCommit(both(ContentProposal))),
		"commit with a proposal":    second(f.server.CheckProposal(both(ContentCommit))),
		"application data":          second(f.server.CheckProposal(empty(proposal, ContentApplication))),
		"application data, applied": second(f.server.CheckCommit(empty(commit, ContentApplication))),
	} {
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", what, err)
		}
	}
	for what, m := range map[string]*MLSMessage{
		"key package": NewMLSMessage(&f.keyPackage("new", nil, nil).Add.KeyPackage),
		"nothing":     {Version: MLS10, WireFormat: WireFormatPublicMessage},
		"mismatch":    {Version: MLS10, WireFormat: WireFormatPrivateMessage, Public: proposal},
	} {
		if _, err := f.bob.Receive(nil, m); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", what, err)
		}
	}
}

// TestWithoutTheFunctionThereAreNoPreSharedKeys: members whose application has no keys refuse, and don't fail.
func TestWithoutTheFunctionThereAreNoPreSharedKeys(t *testing.T) {
	f := newForgery(t)
	m := f.commit(forged{props: []Proposal{sharedPSK()}})
	f.bob.cfg.PSK = nil
	if _, err := f.bob.Receive(f.bob.store, m); !section(err, "12.4.2") {
		t.Errorf("receiver: got %v, want a violation of 12.4.2", err)
	}
	if _, err := f.bob.Commit(nil, CommitOptions{Proposals: []Proposal{sharedPSK()}}); !section(err, "12.4.2") {
		t.Errorf("committer: got %v, want a violation of 12.4.2", err)
	}
}

func TestOnlyWhatIsSignedForAFormatIsFramedInIt(t *testing.T) {
	f := newForgery(t)
	prop := remove(1)
	c := FramedContent{GroupID: f.alice.GroupID(), Epoch: f.alice.Epoch(), Sender: Sender{Type: SenderMember}, ContentType: ContentProposal, Proposal: &prop}
	sign := func(format WireFormat, edit func(*FramedContent)) *AuthenticatedContent {
		c := c
		edit(&c)
		ac, err := signContent(testSuite, rand.Reader, f.alice.signer, format, c, f.alice.state.encoded)
		f.must(err)
		return ac
	}
	same := func(*FramedContent) {}
	public := func(ac *AuthenticatedContent) error {
		return second(protectPublic(testSuite, ac, f.alice.secrets.membership, f.alice.state.encoded))
	}
	private := func(ac *AuthenticatedContent) error {
		_, _, err := protectPrivate(testSuite, rand.Reader, f.alice.messages, f.alice.secrets.senderData, ac, nil)
		return err
	}
	for what, err := range map[string]error{
		"signed for a private message": public(sign(WireFormatPrivateMessage, same)),
		"application data": public(sign(WireFormatPublicMessage, func(c *FramedContent) {
			c.ContentType, c.Proposal = ContentApplication, nil
		})),
		"signed for a public message": private(sign(WireFormatPublicMessage, same)),
		"by an external sender": private(sign(WireFormatPrivateMessage, func(c *FramedContent) {
			c.Sender = Sender{Type: SenderExternal}
		})),
	} {
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", what, err)
		}
	}
}

// TestPrivateContentsAreDecodedStrictly: the sender's key is not used up by what an insider sends in its name.
func TestPrivateContentsAreDecodedStrictly(t *testing.T) {
	f := newForgery(t)
	ac := f.sign(f.alice, FramedContent{Sender: Sender{Type: SenderMember}, ContentType: ContentApplication, ApplicationData: []byte("x")})
	var w codec.Writer
	w.Opaque([]byte("x"))
	w.Opaque(ac.Signature)
	sound := w.Bytes()
	for what, content := range map[string][]byte{
		"nothing": {}, "no signature": sound[:2], "half a signature": sound[:20], "padding": append(slices.Clone(sound), 0, 0, 1),
	} {
		before := whole(f.bob.Group)
		m := sealed(t, f.alice, ContentApplication, 0, content)
		if _, err := f.bob.Receive(f.bob.store, m); err == nil {
			t.Errorf("%s: accepted", what)
		} else if errors.Is(err, ErrSignature) {
			t.Errorf("%s: only the signature is found to be wrong", what)
		}
		unchanged(t, what, whole(f.bob.Group), before)
	}
	m := sealed(t, f.alice, ContentApplication, 0, sound)
	k, n := senderDataKey(testSuite, f.alice.secrets.senderData, m.Private.Ciphertext)
	var err error
	m.Private.EncryptedSenderData, err = testSuite.aeadSeal(k, n, m.Private.senderDataAAD(), append(codec.Marshal(senderData{}), 0))
	f.must(err)
	if _, err := f.bob.Receive(f.bob.store, m); !errors.Is(err, codec.ErrTrailing) {
		t.Errorf("sender data with a byte too many: got %v, want ErrTrailing", err)
	}
	got, err := f.bob.Receive(f.bob.store, sealed(t, f.alice, ContentApplication, 0, append(sound, 0, 0)))
	f.must(err)
	if a := got.(*ApplicationMessage); !bytes.Equal(a.Data, []byte("x")) {
		t.Errorf("got %q", a.Data)
	}
}

// TestHandshakesOfPastEpochsAreRefused: only application messages come late.
func TestHandshakesOfPastEpochsAreRefused(t *testing.T) {
	f := newForgery(t)
	prop := appData(0x8001, "+")
	m := f.encrypt(f.carol, f.sign(f.carol, FramedContent{Sender: Sender{Type: SenderMember, Leaf: f.carol.OwnLeaf()}, ContentType: ContentProposal, Proposal: &prop}))
	f.room.commit(f.alice, CommitOptions{})
	before := whole(f.bob.Group)
	if _, err := f.bob.Receive(f.bob.store, m); !errors.Is(err, ErrEpoch) {
		t.Errorf("got %v, want ErrEpoch", err)
	}
	unchanged(t, "bob", whole(f.bob.Group), before)
}

func TestKeyPackagesOfUnknownSuitesAreNotMade(t *testing.T) {
	_, _, err := NewKeyPackage(KeyPackageOptions{Suite: 0x0a0a, Credential: BasicCredential([]byte("a")), Signer: newSigner(t, testSuite)})
	if !errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

func TestLifetimesEndAfterTheyBegin(t *testing.T) {
	l := LeafNode{Source: LeafNodeKeyPackage, Lifetime: Lifetime{NotBefore: 2, NotAfter: 1}}
	for _, longest := range []time.Duration{time.Hour, -1} {
		if err := l.checkLifetimeLength(longest); !section(err, "7.2") {
			t.Errorf("longest %v: got %v, want a violation of 7.2", longest, err)
		}
	}
}

func TestUpdatesAreProposedByTheirOwnMethod(t *testing.T) {
	f := newForgery(t)
	if _, err := f.alice.Propose(nil, nil, f.update(f.alice, nil, nil)); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v, want ErrMalformed", err)
	}
}

// TestJoinersTakeOnlySelfRemoves: what comes with a GroupInfo is held to the rules of proposals.
func TestJoinersTakeOnlySelfRemoves(t *testing.T) {
	f := newForgery(t)
	gi, err := f.alice.GroupInfo(true, true)
	f.must(err)
	commit := f.commit(forged{})
	commit.Public.Content.Proposal = &Proposal{Type: ProposalSelfRemove}
	stranger := f.proposal(f.carol, selfRemove())
	stranger.Public.Content.Sender.Leaf = 9
	for what, m := range map[string]*MLSMessage{
		"key package":  NewMLSMessage(&f.keyPackage("new", nil, nil).Add.KeyPackage),
		"commit":       commit,
		"remove":       f.proposal(f.carol, remove(1)),
		"not a member": stranger,
	} {
		o := ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite), SelfRemoves: []*MLSMessage{m}}
		if _, err := ExternalJoin(testConfig(), o); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	twice := []*MLSMessage{f.proposalWith(f.carol, selfRemove(), []byte("1")), f.proposalWith(f.carol, selfRemove(), []byte("2"))}
	_, err = ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite), SelfRemoves: twice})
	if !section(err, sectionSelfRemove) {
		t.Errorf("two of one member: got %v, want a violation of %s", err, sectionSelfRemove)
	}
}

func TestPreSharedKeysAreCounted(t *testing.T) {
	if _, err := testSuite.pskSecret(make([]pskInput, 1<<16)); !errors.Is(err, ErrMalformed) {
		t.Errorf("65,536 keys: got %v, want ErrMalformed", err)
	}
}

// TestPathsNeedTheirKeys: who has no private key for a path, or isn't below it, refuses it.
func TestPathsNeedTheirKeys(t *testing.T) {
	tt := newTestTree(t, testSuite, 4)
	np := tt.commit(t, 0)
	path, err := np.encrypt(rand.Reader, tt.RatchetTree, nil, []byte("context"))
	if err != nil {
		t.Fatal(err)
	}
	for what, p := range map[string]*treePrivate{
		"no key":        {leaf: 2, keys: map[NodeIndex]HPKEPrivateKey{}},
		"the committer": {leaf: 0, keys: tt.private[0].keys},
	} {
		func() {
			defer func() {
				if r := recover(); r != nil {
					t.Errorf("%s: %v", what, r)
				}
			}()
			if _, _, err := tt.decryptPath(testSuite, p, 0, path, nil, []byte("context")); err == nil {
				t.Errorf("%s: accepted", what)
			}
		}()
	}
}

func TestTreesHaveMembers(t *testing.T) {
	tt := newTestTree(t, testSuite, 2)
	tt.commit(t, 0)
	tree := fresh(t, tt.RatchetTree)
	tree.setLeaf(0, nil)
	tree.setLeaf(1, nil)
	if err := tree.validate(testSuite, tt.groupID, nil); !section(err, "12.4.3.1") {
		t.Errorf("got %v, want a violation of 12.4.3.1", err)
	}
}

func TestDictionariesOfLeavesAreWellFormed(t *testing.T) {
	cr := &contextRules{terms: terms{components: ComponentsList{0x8001}}}
	for rule, data := range map[string][]byte{
		"application data dictionary: codec": {9},
		"component 1: codec":                 codec.Marshal(AppDataDictionary{{ComponentAppComponents, []byte{9}}}),
		"does not support component":         codec.Marshal(AppDataDictionary{{ComponentAppComponents, codec.Marshal(ComponentsList{0x8002})}}),
	} {
		l := &LeafNode{Extensions: Extensions{{ExtensionAppDataDictionary, data}}, Capabilities: DefaultCapabilities()}
		if err := checkLeafFits(l, cr); !section(err, sectionNegotiation) || !strings.Contains(err.Error(), rule) {
			t.Errorf("got %v, want %q", err, rule)
		}
	}
}

// TestSecretTreesRunOut: a ratchet has 2^32 generations, and what was deleted isn't derived again.
func TestSecretTreesRunOut(t *testing.T) {
	st := newSecretTree(testSuite, 4, make(secret, 32))
	if _, _, _, err := st.next(0, applicationRatchet); err != nil {
		t.Fatal(err)
	}
	r := st.ratchets[ratchetID{0, applicationRatchet}]
	r.generation = math.MaxUint32
	if _, _, _, err := st.next(0, applicationRatchet); err != nil {
		t.Errorf("the last generation: %v", err)
	}
	if g, key, _, err := st.next(0, applicationRatchet); !errors.Is(err, ErrGeneration) || key != nil {
		t.Errorf("after the last generation: got %d, %v, want ErrGeneration", g, err)
	}
	clear(st.nodes)
	if _, err := st.peek(3, applicationRatchet, 0, ratchetLimits{}); !errors.Is(err, ErrGeneration) {
		t.Errorf("without the secrets of a leaf: got %v, want ErrGeneration", err)
	}
}

// stuck is a source of randomness that gives nothing but ones, which is out of range for the curves.
type stuck struct{}

func (stuck) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 0xff
	}
	return len(b), nil
}

func TestStuckRandomnessMakesNoKeys(t *testing.T) {
	for _, cs := range []CipherSuite{P256_AES128GCM_SHA256_P256, P384_AES256GCM_SHA384_P384, P521_AES256GCM_SHA512_P521} {
		if _, err := cs.GenerateSignatureKey(stuck{}); err == nil {
			t.Errorf("%v: a key", cs)
		}
	}
}

func TestAppAckHasNoStateInTheGroup(t *testing.T) {
	if _, err := (AppAckComponent{}).Update(nil, [][]byte{{0}}); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v, want ErrMalformed", err)
	}
}

func TestKEMOutputsOfAnotherLengthAreRefused(t *testing.T) {
	for _, cs := range CipherSuites() {
		pub, priv, err := cs.GenerateHPKEKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ct, err := cs.EncryptWithLabel(rand.Reader, pub, "l", nil, []byte("p"))
		if err != nil {
			t.Fatal(err)
		}
		k := cs.params().kem
		for _, enc := range [][]byte{nil, ct.KEMOutput[1:], append(slices.Clone(ct.KEMOutput), 0)} {
			if shared, err := k.decap(priv, nil, enc); !errors.Is(err, ErrDecrypt) {
				t.Errorf("%v: output of %d bytes: got %d bytes, %v, want ErrDecrypt", cs, len(enc), len(shared), err)
			}
		}
		if _, err := k.public(priv[1:]); err == nil {
			t.Errorf("%v: private key of %d bytes is accepted", cs, len(priv)-1)
		}
		if _, err := k.decap(priv[1:], nil, ct.KEMOutput); err == nil {
			t.Errorf("%v: decapsulation with a private key of %d bytes", cs, len(priv)-1)
		}
	}
}

// strangers finds no client in dave's credential.
type strangers struct{ testVerifier }

func (v strangers) Identity(c Credential) ([]byte, error) {
	if string(c.Identity) == "dave" {
		return nil, errors.New("no name")
	}
	return v.testVerifier.Identity(c)
}

// TestGroupsFollowMembersWithNames: who are the members of a group is known by their names.
func TestGroupsFollowMembersWithNames(t *testing.T) {
	f := newForgery(t)
	f.bob.cfg.Verifier = strangers{}
	o := LinkOptions{Credential: BasicCredential([]byte("bob")), Signer: f.bob.signer}
	if _, _, err := f.bob.NewBranch(nil, []byte("branch"), nil, o); !section(err, "5.3.1") {
		t.Errorf("branch: got %v, want a violation of 5.3.1", err)
	}
	f.bob.cfg.Verifier = testVerifier{}
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.dave.OwnLeaf())}})
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{{Type: ProposalReInit,
		ReInit: &ReInit{GroupID: []byte("next"), Version: MLS10, CipherSuite: testSuite, Extensions: f.alice.Context().Extensions}}}})
	f.bob.cfg.Verifier = nameless{}
	if _, _, err := f.bob.NewSuccessor(nil, o); !section(err, "5.3.1") {
		t.Errorf("successor: got %v, want a violation of 5.3.1", err)
	}
	if _, _, err := f.dave.NewSuccessor(nil, o); !errors.Is(err, ErrRemoved) {
		t.Errorf("successor by a former member: got %v, want ErrRemoved", err)
	}
}

// TestWithoutItsSignerAGroupOnlyReads: nothing is signed with another key than the leaf's.
func TestWithoutItsSignerAGroupOnlyReads(t *testing.T) {
	f := newForgery(t)
	m, err := f.alice.Encrypt(nil, nil, []byte("x"))
	f.must(err)
	g, err := LoadGroup(testConfig(), nil, f.bob.store.all())
	f.must(err)
	before := whole(g)
	for what, err := range map[string]error{
		"message": second(g.Encrypt(nil, nil, nil)), "proposal": second(g.Propose(nil, nil, sharedPSK())),
		"update": second(g.ProposeUpdate(nil, UpdateOptions{})), "commit": second(g.Commit(nil, CommitOptions{})),
		"group info": second(g.GroupInfo(true, true)),
	} {
		if !errors.Is(err, ErrSigner) {
			t.Errorf("%s: got %v, want ErrSigner", what, err)
		}
	}
	unchanged(t, "bob", whole(g), before)
	f.must(second(g.Receive(nil, m)))
}

// TestPendingProposalsOfNobodyAreLeftOut: a stored proposal isn't believed to be a member's.
func TestPendingProposalsOfNobodyAreLeftOut(t *testing.T) {
	f := newForgery(t)
	p := f.update(f.carol, nil, nil)
	f.alice.state.addPending(discard{}, &pendingEntry{PendingProposal: PendingProposal{Ref: []byte("ref"), Sender: Sender{Type: SenderMember, Leaf: 9}, Proposal: p}})
	c, err := f.alice.Commit(nil, CommitOptions{})
	f.must(err)
	if n := len(c.Info().Proposals); n != 0 {
		t.Errorf("%d proposals committed, want none", n)
	}
}
