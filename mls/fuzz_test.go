package mls

import (
	"bytes"
	"crypto/rand"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// wireType is a pointer to a type that crosses a wire or is stored.
type wireType[T any] interface {
	*T
	codec.Marshaler
	codec.Unmarshaler
}

// fuzzCodec feeds seeds and mutations of them to a decoder: what decodes must encode to the same bytes.
func fuzzCodec[T any, P wireType[T]](f *testing.F, seeds ...[]byte) {
	for _, s := range seeds {
		f.Add(s)
		if err := codec.Unmarshal(s, P(new(T))); err != nil {
			f.Fatalf("seed %x of %T: %v", s, new(T), err)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		v := P(new(T))
		if codec.Unmarshal(in, v) != nil {
			return
		}
		if out := codec.Marshal(v); !bytes.Equal(out, in) {
			t.Errorf("%T: %x decoded and encoded gives %x", v, in, out)
		}
	})
}

// seeds are one small group's messages and structures, encoded.
type seeds struct {
	tree                                  *testTree
	keyPackage                            *KeyPackage
	leafKeyPackage, leafUpdate, leafPath  []byte
	path                                  *UpdatePath
	context                               GroupContext
	groupInfo                             *GroupInfo
	welcome                               *Welcome
	groupSecrets                          [][]byte
	proposals, commits                    [][]byte
	authenticated, public, private, whole [][]byte
	psks                                  []PreSharedKeyID
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
				s.authenticated = append(s.authenticated, codec.Marshal(ac))
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

func FuzzMLSMessage(f *testing.F)     { fuzzCodec[MLSMessage](f, newSeeds(f).whole...) }
func FuzzPublicMessage(f *testing.F)  { fuzzCodec[PublicMessage](f, newSeeds(f).public...) }
func FuzzPrivateMessage(f *testing.F) { fuzzCodec[PrivateMessage](f, newSeeds(f).private...) }
func FuzzAuthenticatedContent(f *testing.F) {
	fuzzCodec[AuthenticatedContent](f, newSeeds(f).authenticated...)
}
func FuzzProposal(f *testing.F) { fuzzCodec[Proposal](f, newSeeds(f).proposals...) }
func FuzzCommit(f *testing.F)   { fuzzCodec[Commit](f, newSeeds(f).commits...) }
func FuzzKeyPackage(f *testing.F) {
	fuzzCodec[KeyPackage](f, codec.Marshal(newSeeds(f).keyPackage))
}
func FuzzLeafNode(f *testing.F) {
	s := newSeeds(f)
	fuzzCodec[LeafNode](f, s.leafKeyPackage, s.leafUpdate, s.leafPath)
}
func FuzzUpdatePath(f *testing.F) { fuzzCodec[UpdatePath](f, codec.Marshal(newSeeds(f).path)) }
func FuzzGroupContext(f *testing.F) {
	fuzzCodec[GroupContext](f, codec.Marshal(newSeeds(f).context))
}
func FuzzGroupInfo(f *testing.F)    { fuzzCodec[GroupInfo](f, codec.Marshal(newSeeds(f).groupInfo)) }
func FuzzWelcome(f *testing.F)      { fuzzCodec[Welcome](f, codec.Marshal(newSeeds(f).welcome)) }
func FuzzGroupSecrets(f *testing.F) { fuzzCodec[GroupSecrets](f, newSeeds(f).groupSecrets...) }
func FuzzPreSharedKeyID(f *testing.F) {
	for _, id := range newSeeds(f).psks {
		f.Add(codec.Marshal(id))
	}
	fuzzCodec[PreSharedKeyID](f)
}
func FuzzCredential(f *testing.F) {
	fuzzCodec[Credential](f, codec.Marshal(BasicCredential([]byte("id"))), codec.Marshal(X509Credential([][]byte{{1, 2}, {3}})))
}
func FuzzExtensions(f *testing.F) {
	fuzzCodec[Extensions](f, codec.Marshal(Extensions{}), codec.Marshal(Extensions{{1, []byte("x")}, {0x0a0a, nil}}))
}
func FuzzRequiredCapabilities(f *testing.F) {
	fuzzCodec[RequiredCapabilities](f, []byte{0, 0, 0}, []byte{2, 0, 6, 2, 0, 8, 4, 0, 1, 0, 2})
}
func FuzzExternalSenders(f *testing.F) {
	fuzzCodec[ExternalSenders](f, codec.Marshal(ExternalSenders{{[]byte("key"), BasicCredential([]byte("hub"))}}))
}
func FuzzAppDataDictionary(f *testing.F) {
	fuzzCodec[AppDataDictionary](f, codec.Marshal(AppDataDictionary{{1, []byte("a")}, {7, nil}}))
}
func FuzzTreePrivate(f *testing.F) {
	f.Add(codec.Marshal(newSeeds(f).tree.private[1]))
	f.Fuzz(func(t *testing.T, in []byte) {
		p := new(treePrivate)
		if codec.Unmarshal(in, p) == nil {
			codec.Marshal(p)
		}
	})
}

// FuzzRatchetTree also runs on hostile trees what a joiner runs before it knows that a tree is sound.
func FuzzRatchetTree(f *testing.F) {
	s := newSeeds(f)
	f.Add(codec.Marshal(s.tree.RatchetTree))
	f.Add(codec.Marshal(newTestTree(f, testSuite, 5).RatchetTree))
	f.Fuzz(func(t *testing.T, in []byte) {
		tree, err := ParseRatchetTree(in)
		if err != nil || tree.Size() > 1<<10 {
			return
		}
		if out := codec.Marshal(tree); !bytes.Equal(out, in) {
			t.Errorf("%x decoded and encoded gives %x", in, out)
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
	})
}

// FuzzPrivateMessageContent decrypts contents that an insider framed at will.
func FuzzPrivateMessageContent(f *testing.F) {
	for _, p := range newSeeds(f).proposals {
		f.Add(byte(ContentProposal), append(bytes.Clone(p), 1, 7, 0, 0, 0))
	}
	f.Add(byte(ContentApplication), []byte{1, 2, 1, 7, 0, 0})
	f.Add(byte(ContentCommit), []byte{0, 0, 1, 7, 1, 9, 0})
	f.Fuzz(func(t *testing.T, typ byte, content []byte) {
		const cs = testSuite
		senderSecret := make(secret, 32)
		st := newSecretTree(cs, 4, make(secret, 32))
		_, key, nonce, err := st.next(1, kindOf(ContentType(typ)))
		if err != nil {
			t.Fatal(err)
		}
		m := &PrivateMessage{GroupID: []byte("g"), ContentType: ContentType(typ)}
		if m.Ciphertext, err = cs.aeadSeal(key, nonce, m.contentAAD(), content); err != nil {
			t.Fatal(err)
		}
		k, n := senderDataKey(cs, senderSecret, m.Ciphertext)
		if m.EncryptedSenderData, err = cs.aeadSeal(k, n, m.senderDataAAD(), codec.Marshal(senderData{leaf: 1})); err != nil {
			t.Fatal(err)
		}
		ac, step, err := unprotectPrivate(cs, newSecretTree(cs, 4, make(secret, 32)), senderSecret, m, ratchetLimits{})
		if err != nil {
			return
		}
		if step.generation != 0 || ac.Content.Sender != (Sender{Type: SenderMember, Leaf: 1}) {
			t.Errorf("sender %+v generation %d", ac.Content.Sender, step.generation)
		}
		var w codec.Writer
		ac.Content.marshalBody(&w)
		marshalAuth(&w, ac.Content.ContentType, ac.Signature, ac.ConfirmationTag)
		if !bytes.Equal(append(w.Bytes(), make([]byte, len(content)-len(w.Bytes()))...), content) {
			t.Errorf("%x decoded and encoded gives %x", content, w.Bytes())
		}
	})
}

// FuzzApplyPath merges hostile paths into a sound tree and decrypts them.
func FuzzApplyPath(f *testing.F) {
	s := newSeeds(f)
	f.Add(uint32(1), codec.Marshal(s.path))
	f.Fuzz(func(t *testing.T, sender uint32, in []byte) {
		var p UpdatePath
		if codec.Unmarshal(in, &p) != nil {
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
