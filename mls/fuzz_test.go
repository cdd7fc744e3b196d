package mls

import (
	"bytes"
	"crypto/rand"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// seeds are one small group's messages and structures, encoded.
type seeds struct {
	tree                                 *testTree
	keyPackage                           *KeyPackage
	leafKeyPackage, leafUpdate, leafPath []byte
	path                                 *UpdatePath
	context                              GroupContext
	groupInfo                            *GroupInfo
	welcome                              *Welcome
	groupSecrets                         [][]byte
	proposals, commits                   [][]byte
	authenticated, framed                [][]byte
	public, private, whole               [][]byte
	psks                                 []PreSharedKeyID
}

func newSeeds(f testing.TB) *seeds {
	fatal := func(err error) {
		if err != nil {
			f.Helper()
			f.Fatal(err)
		}
	}
	const cs = testSuite
	s := &seeds{tree: newTestTree(f, cs, 3)}
	s.tree.commit(f, 0)
	s.tree.add(f)
	kp, _, _ := s.tree.keyPackage(f)
	s.keyPackage = kp
	update := kp.LeafNode.clone()
	update.Source = LeafNodeUpdate
	s.leafKeyPackage, s.leafUpdate = codec.Marshal(kp.LeafNode), codec.Marshal(update)
	np := s.tree.commit(f, 1)
	s.leafPath = codec.Marshal(np.leaf)
	required := codec.Marshal(RequiredCapabilities{Extensions: []ExtensionType{6}, Proposals: []ProposalType{8}, Credentials: []CredentialType{2}})
	s.context = GroupContext{Version: MLS10, CipherSuite: cs, GroupID: s.tree.groupID, Epoch: 7, TreeHash: s.tree.Hash(cs),
		ConfirmedTranscriptHash: make([]byte, 32), Extensions: Extensions{{ExtensionRequiredCapabilities, required}}}
	ctx := codec.Marshal(s.context)
	var err error
	s.path, err = np.encrypt(s.tree.rand, s.tree.RatchetTree, nil, ctx)
	fatal(err)
	s.psks = []PreSharedKeyID{{Type: PSKExternal, ID: []byte("psk"), Nonce: make([]byte, 32)},
		{Type: PSKResumption, Usage: UsageApplication, GroupID: []byte("g"), Epoch: 3, Nonce: make([]byte, 32)},
		{Type: PSKApplication, Component: 9, ID: []byte("psk"), Nonce: make([]byte, 32)}}
	secrets := []GroupSecrets{{JoinerSecret: make([]byte, 32)}, {JoinerSecret: make([]byte, 32), PathSecret: make([]byte, 32), PSKs: s.psks}}
	for _, g := range secrets {
		s.groupSecrets = append(s.groupSecrets, codec.Marshal(g))
	}
	s.groupInfo = &GroupInfo{GroupContext: s.context, Extensions: Extensions{{ExtensionRatchetTree, codec.Marshal(s.tree.RatchetTree)}},
		ConfirmationTag: make([]byte, 32), Signer: 1}
	fatal(s.groupInfo.sign(s.tree.rand, s.tree.signers[1]))
	s.welcome, err = newWelcome(cs, s.tree.rand, s.groupInfo, make(secret, 32), make(secret, 32), []welcomeMember{{kp: kp}}, nil)
	fatal(err)

	all := []Proposal{
		{Type: ProposalAdd, Add: &Add{*kp}},
		{Type: ProposalUpdate, Update: &Update{*update}},
		{Type: ProposalRemove, Remove: &Remove{2}},
		{Type: ProposalPSK, PSK: &PreSharedKey{s.psks[0]}},
		{Type: ProposalReInit, ReInit: &ReInit{GroupID: []byte("next"), Version: MLS10, CipherSuite: cs}},
		{Type: ProposalExternalInit, ExternalInit: &ExternalInit{make([]byte, 32)}},
		{Type: ProposalGroupContextExtensions, GroupContextExtensions: &GroupContextExtensions{s.context.Extensions}},
		{Type: ProposalAppDataUpdate, AppDataUpdate: &AppDataUpdate{Component: 5, Op: AppDataOpUpdate, Update: []byte("x")}},
		{Type: ProposalAppDataUpdate, AppDataUpdate: &AppDataUpdate{Component: 5, Op: AppDataOpRemove}},
		{Type: ProposalAppEphemeral, AppEphemeral: &AppEphemeral{Component: 5, Data: []byte("x")}},
		{Type: ProposalSelfRemove},
	}
	commit := &Commit{Path: s.path}
	for i := range all {
		s.proposals = append(s.proposals, codec.Marshal(all[i]))
		commit.Proposals = append(commit.Proposals, ProposalOrRef{Proposal: &all[i]})
	}
	commit.Proposals = append(commit.Proposals, ProposalOrRef{Reference: make([]byte, 32)})
	s.commits = [][]byte{codec.Marshal(Commit{}), codec.Marshal(commit)}

	st := newSecretTree(cs, 4, make(secret, 32))
	for _, sender := range []Sender{{Type: SenderMember, Leaf: 1}, {Type: SenderExternal, Index: 2}, {Type: SenderNewMemberProposal}, {Type: SenderNewMemberCommit}} {
		for _, c := range []FramedContent{
			{ContentType: ContentApplication, ApplicationData: []byte("data")},
			{ContentType: ContentProposal, Proposal: &all[2]},
			{ContentType: ContentCommit, Commit: commit},
		} {
			c.GroupID, c.Epoch, c.Sender, c.AuthenticatedData = s.tree.groupID, 7, sender, []byte("aad")
			sign := func(wf WireFormat) *AuthenticatedContent {
				ac, err := signContent(cs, s.tree.rand, s.tree.signers[1], wf, c, ctx)
				fatal(err)
				if c.ContentType == ContentCommit {
					ac.ConfirmationTag = make([]byte, 32)
				}
				s.authenticated, s.framed = append(s.authenticated, codec.Marshal(ac)), append(s.framed, codec.Marshal(ac.Content))
				return ac
			}
			if c.ContentType != ContentApplication {
				m, err := protectPublic(cs, sign(WireFormatPublicMessage), make(secret, 32), ctx)
				fatal(err)
				s.public = append(s.public, codec.Marshal(m))
				s.whole = append(s.whole, codec.Marshal(NewMLSMessage(m)))
			}
			if sender.Type == SenderMember {
				m, _, err := protectPrivate(cs, s.tree.rand, st, make(secret, 32), sign(WireFormatPrivateMessage), nil)
				fatal(err)
				s.private = append(s.private, codec.Marshal(m))
				s.whole = append(s.whole, codec.Marshal(NewMLSMessage(m)))
			}
		}
	}
	s.whole = append(s.whole, codec.Marshal(NewMLSMessage(s.welcome)), codec.Marshal(NewMLSMessage(s.groupInfo)), codec.Marshal(NewMLSMessage(kp)))
	return s
}

// FuzzTree runs on hostile trees what a joiner runs before it knows that a tree is sound, and merges hostile paths into
// a sound tree and decrypts them.
func FuzzTree(f *testing.F) {
	s := newSeeds(f)
	f.Add(codec.Marshal(s.tree.RatchetTree), []byte{}, uint32(0))
	f.Add(codec.Marshal(newTestTree(f, testSuite, 5).RatchetTree), []byte{}, uint32(0))
	f.Add([]byte{}, codec.Marshal(s.path), uint32(1))
	f.Fuzz(func(t *testing.T, tree, path []byte, sender uint32) {
		fuzzTree(t, s, tree)
		var p UpdatePath
		if codec.Unmarshal(path, &p) != nil {
			return
		}
		c := s.tree.clone()
		if c.applyPath(testSuite, LeafIndex(sender), &p) != nil || sender == 3 {
			return
		}
		_, _, _ = c.decryptPath(testSuite, s.tree.private[3], LeafIndex(sender), &p, nil, codec.Marshal(s.context))
		c.Hash(testSuite)
	})
}

func fuzzTree(t *testing.T, s *seeds, in []byte) {
	tree, err := ParseRatchetTree(in)
	if err != nil || tree.Size() > 1<<10 {
		return
	}
	hash := tree.Hash(testSuite)
	valid := tree.validate(testSuite, s.tree.groupID, nil) == nil
	c := tree.clone()
	for i := range c.Leaves() {
		c.filteredDirectPath(i)
		c.removeLeaf(i)
		c.addLeaf(tree.Leaf(i))
		c.Hash(testSuite)
		if valid {
			if err := fresh(t, c).checkUnmergedLeaves(); err != nil {
				t.Error(err)
			}
		}
		break
	}
	if !bytes.Equal(tree.Hash(testSuite), hash) {
		t.Error("a clone changed the tree")
	}
}

func TestHostileCiphertextsFail(t *testing.T) {
	for _, cs := range CipherSuites() {
		pub, priv, err := cs.GenerateHPKEKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ct, err := cs.EncryptWithLabel(rand.Reader, pub, "l", nil, []byte("p"))
		if err != nil {
			t.Fatal(err)
		}
		for i := range ct.Ciphertext {
			bad := HPKECiphertext{ct.KEMOutput, bytes.Clone(ct.Ciphertext)}
			bad.Ciphertext[i] ^= 1
			if _, err := cs.DecryptWithLabel(priv, "l", nil, bad); err == nil {
				t.Errorf("%v: ciphertext with byte %d changed opens", cs, i)
			}
		}
	}
}
