package mls

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// TestJoinersRefuseWhatIsWrong covers RFC 9420, Sections 12.4.3.1 and 12.4.3.2, for the joiner and for a server.
func TestJoinersRefuseWhatIsWrong(t *testing.T) {
	f := newForgery(t)
	sound, err := f.alice.GroupInfo(true, true)
	f.must(err)
	withTree := func(gi *GroupInfo, edit func(*RatchetTree) *RatchetTree) {
		tree, err := gi.RatchetTree()
		f.must(err)
		tree = edit(tree)
		gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, codec.Marshal(tree))
		gi.GroupContext.TreeHash = tree.Hash(testSuite)
	}
	signed := func(gi *GroupInfo) { f.must(gi.sign(f.alice.cfg.rand(), f.alice.signer)) }
	withCarol := func(edit func(*LeafNode)) func(*GroupInfo) { // the last committer's leaf, which no parent hash covers
		return func(gi *GroupInfo) {
			withTree(gi, func(tree *RatchetTree) *RatchetTree {
				l := tree.Leaf(2).clone()
				edit(l)
				f.must(l.sign(testSuite, f.alice.cfg.rand(), f.carol.signer, f.alice.GroupID(), 2))
				tree.setLeaf(2, l)
				return tree
			})
			signed(gi)
		}
	}
	join := func(gi *GroupInfo) error {
		_, err := ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite)})
		return err
	}
	serve := func(gi *GroupInfo) error {
		s := newMemStore()
		_, err := NewPublicGroup(publicConfig(), s, gi, nil)
		if err != nil && len(s.m) > 0 {
			t.Error("refused state was written")
		}
		return err
	}
	f.must(join(sound))
	f.must(serve(sound))
	for _, v := range []struct {
		section, rule string
		edit          func(gi *GroupInfo)
	}{
		{"12.4.3.1", "tree hash", func(gi *GroupInfo) { gi.GroupContext.TreeHash = flip(gi.GroupContext.TreeHash); signed(gi) }},
		{"13.4", "extension of the group info twice", func(gi *GroupInfo) { gi.Extensions = append(gi.Extensions, gi.Extensions[0]); signed(gi) }},
		{"11.1", "required capability that members lack", func(gi *GroupInfo) {
			gi.GroupContext.Extensions = gi.GroupContext.Extensions.Set(ExtensionRequiredCapabilities,
				codec.Marshal(RequiredCapabilities{Extensions: []ExtensionType{0xf00d}}))
			signed(gi)
		}},
		{sectionSemiPrivate, "key of an external receiver", func(gi *GroupInfo) {
			gi.GroupContext.Extensions = gi.GroupContext.Extensions.Set(ExtensionAppDataDictionary, codec.Marshal(
				AppDataDictionary(nil).Set(ComponentExternalReceivers, codec.Marshal(ExternalReceivers{{[]byte("short"), BasicCredential([]byte("hub"))}}))))
			signed(gi)
		}},
		{"12.4.3.1", "blank signer", func(gi *GroupInfo) { gi.Signer = 9; signed(gi) }},
		{"", "signature", func(gi *GroupInfo) { gi.Signature = flip(gi.Signature) }},
		{"", "signature by another", func(gi *GroupInfo) { gi.Signer = 1; signed(gi) }},
		{"12.4.3.3", "no tree", func(gi *GroupInfo) { gi.Extensions = gi.Extensions.Remove(ExtensionRatchetTree); signed(gi) }},
		{"7.9.2", "parent hash", withCarol(func(l *LeafNode) { l.ParentHash = flip(l.ParentHash) })},
		{"7.3", "leaf's signature", func(gi *GroupInfo) {
			withTree(gi, func(tree *RatchetTree) *RatchetTree {
				l := tree.Leaf(2).clone() // the last committer's, which no parent hash covers
				l.Signature = flip(l.Signature)
				tree.setLeaf(2, l)
				return tree
			})
			signed(gi)
		}},
		{"7.1", "leaf's encryption key", withCarol(func(l *LeafNode) { l.EncryptionKey = make(HPKEPublicKey, 32) })},
		{"7.2", "leaf's suites", withCarol(func(l *LeafNode) { l.Capabilities.CipherSuites = nil })},
		{"7.2", "leaf's versions", withCarol(func(l *LeafNode) { l.Capabilities.Versions = nil })},
		{"5.3.1", "leaf's credential", withCarol(func(l *LeafNode) { l.Credential = BasicCredential([]byte("bad")) })},
		{"12.2", "two leaves of one client", withCarol(func(l *LeafNode) { l.Credential = BasicCredential([]byte("bob")) })},
		{"12.4.3.3", "tree that isn't one", func(gi *GroupInfo) {
			gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, []byte{9})
			signed(gi)
		}},
		{"13.4", "extension that members don't support", func(gi *GroupInfo) {
			gi.GroupContext.Extensions = gi.GroupContext.Extensions.Set(0xf00d, nil)
			signed(gi)
		}},
		{"5.3.1", "external sender's credential", func(gi *GroupInfo) {
			gi.GroupContext.Extensions = gi.GroupContext.Extensions.Set(ExtensionExternalSenders,
				codec.Marshal(ExternalSenders{{SignatureKey: []byte("x"), Credential: BasicCredential([]byte("bad"))}}))
			signed(gi)
		}},
	} {
		gi := *sound
		gi.Extensions = slices.Clone(gi.Extensions)
		v.edit(&gi)
		for who, err := range map[string]error{"joiner": join(&gi), "server": serve(&gi)} {
			var ve *ValidationError
			switch {
			case err == nil:
				t.Errorf("%s: %s accepts it", v.rule, who)
			case v.section == "" && !errors.Is(err, ErrSignature):
				t.Errorf("%s: %s: got %v, want ErrSignature", v.rule, who, err)
			case v.section != "" && (!errors.As(err, &ve) || ve.Section != v.section):
				t.Errorf("%s: %s: got %v, want a violation of %s", v.rule, who, err, v.section)
			}
		}
	}
	bare, err := f.alice.GroupInfo(true, false)
	f.must(err)
	if err := join(bare); err == nil {
		t.Error("external join without the key for it")
	}
}

func TestGroupsThatCannotBeJoinedAreRefused(t *testing.T) {
	f := newForgery(t)
	sound, err := f.alice.GroupInfo(true, true)
	f.must(err)
	tree, bare := fresh(t, f.alice.Tree()), *sound
	bare.Extensions = sound.Extensions.Set(ExtensionRatchetTree, []byte{9})
	f.must(bare.sign(f.alice.cfg.rand(), f.alice.signer))
	version, suite := *sound, *sound
	version.GroupContext.Version = 2
	suite.GroupContext.CipherSuite = 0x0a0a
	alone := create(t, testSuite, "alone", nil)
	fromKeyPackage, err := alone.GroupInfo(true, true)
	f.must(err)
	short, shortPublic := testConfig(), publicConfig()
	short.MaxLifetime, shortPublic.MaxLifetime = time.Hour, time.Hour
	for _, v := range []struct {
		what    string
		info    *GroupInfo
		tree    *RatchetTree
		section string
		is      error
	}{
		{"version", &version, nil, "", ErrUnsupported},
		{"suite", &suite, nil, "", ErrUnsupported},
		{"a tree that isn't one beside one that is", &bare, tree, "12.4.3.3", nil},
		{"lifetime of a leaf", fromKeyPackage, nil, "7.2", nil},
	} {
		o := ExternalJoinOptions{GroupInfo: v.info, Tree: v.tree, Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite)}
		s := newMemStore()
		for who, err := range map[string]error{
			"joiner": second(ExternalJoin(short, o)), "server": second(NewPublicGroup(shortPublic, s, v.info, v.tree)),
		} {
			(&violation{section: v.section, is: v.is}).check(t, v.what+": "+who, err)
		}
		if len(s.m) > 0 {
			t.Errorf("%s: refused state was written", v.what)
		}
	}
}

// TestWelcomesAreDecodedStrictly has a committer encrypt what isn't well formed.
func TestWelcomesAreDecodedStrictly(t *testing.T) {
	f := newForgery(t)
	joiner, kp, secrets := keyPackage(t, testSuite, "eve")
	c, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})
	f.must(err)
	random := f.alice.cfg.rand()
	joinerSecret, psk := make(secret, testSuite.HashSize()), testSuite.zeroSecret()
	for what, extra := range map[string][2][]byte{"group secrets": {{0}, nil}, "group info": {nil, {0}}} {
		key, nonce := welcomeKey(testSuite, joinerSecret, psk)
		w := &Welcome{CipherSuite: testSuite}
		w.EncryptedGroupInfo, err = testSuite.aeadSeal(key, nonce, nil, append(codec.Marshal(c.GroupInfo()), extra[1]...))
		f.must(err)
		sealed, err := testSuite.EncryptWithLabel(random, kp.InitKey, labelWelcome, w.EncryptedGroupInfo,
			append(codec.Marshal(GroupSecrets{JoinerSecret: joinerSecret}), extra[0]...))
		f.must(err)
		w.Secrets = []EncryptedGroupSecrets{{NewMember: kp.Ref(), Secrets: sealed}}
		if _, err := JoinGroup(testConfig(), nil, joiner.signer, w, kp, secrets, fresh(t, c.Tree())); !errors.Is(err, codec.ErrTrailing) {
			t.Errorf("%s: got %v, want ErrTrailing", what, err)
		}
	}
	w, unknown := *c.Welcome(), *kp
	w.CipherSuite, unknown.CipherSuite = 0x0a0a, 0x0a0a
	if _, err := JoinGroup(testConfig(), nil, joiner.signer, &w, &unknown, secrets, fresh(t, c.Tree())); !errors.Is(err, ErrUnsupported) {
		t.Errorf("suite: got %v, want ErrUnsupported", err)
	}
}

func TestWelcomeIsRefused(t *testing.T) {
	f := newForgery(t)
	joiner, kp, secrets := keyPackage(t, testSuite, "eve")
	_, otherKP, otherSecrets := keyPackage(t, testSuite, "mallory")
	c, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{add(kp)}, ForcePath: true})
	f.must(err)
	w := c.Welcome()
	tree := func(t *RatchetTree) *RatchetTree { return fresh(f.TB, t) }
	if !w.Find(kp.Ref()) || w.Find(otherKP.Ref()) {
		t.Error("the welcome names other key packages than the one added")
	}
	broken := *w
	broken.EncryptedGroupInfo = flip(w.EncryptedGroupInfo)
	badCfg := testConfig()
	badCfg.Verifier = refuseAll{}
	for rule, try := range map[string]func(s *memStore) error{
		"another key package": func(s *memStore) error {
			return second(JoinGroup(testConfig(), s, joiner.signer, w, otherKP, otherSecrets, tree(c.Tree())))
		},
		"other private keys": func(s *memStore) error {
			return second(JoinGroup(testConfig(), s, joiner.signer, w, kp, otherSecrets, tree(c.Tree())))
		},
		"another signer": func(s *memStore) error {
			return second(JoinGroup(testConfig(), s, newSigner(t, testSuite), w, kp, secrets, tree(c.Tree())))
		},
		"no tree": func(s *memStore) error { return second(JoinGroup(testConfig(), s, joiner.signer, w, kp, secrets, nil)) },
		"the old tree": func(s *memStore) error {
			return second(JoinGroup(testConfig(), s, joiner.signer, w, kp, secrets, tree(f.alice.Tree())))
		},
		"group info": func(s *memStore) error {
			return second(JoinGroup(testConfig(), s, joiner.signer, &broken, kp, secrets, tree(c.Tree())))
		},
		"credentials": func(s *memStore) error {
			return second(JoinGroup(badCfg, s, joiner.signer, w, kp, secrets, tree(c.Tree())))
		},
	} {
		s := newMemStore()
		if err := try(s); err == nil {
			t.Errorf("%s: accepted", rule)
		}
		if len(s.m) > 0 {
			t.Errorf("%s: state was written", rule)
		}
	}
	s := newMemStore()
	g, err := JoinGroup(testConfig(), s, joiner.signer, w, kp, secrets, tree(c.Tree()))
	f.must(err)
	sameState(t, "joined", s.m, dump(g))
}

type refuseAll struct{ testVerifier }

func (refuseAll) VerifyCredential(Credential, []byte, CipherSuite) error {
	return errors.New("refused")
}
