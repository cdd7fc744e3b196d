package mls

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// semiRoom is a forgery whose handshakes a server follows as the first of two external receivers.
type semiRoom struct {
	*forgery
	receivers ExternalReceivers
	keys      []HPKEPrivateKey
}

func newSemiRoom(t testing.TB, cs CipherSuite) *semiRoom {
	t.Helper()
	s := &semiRoom{}
	for _, name := range []string{"hub", "auditor"} {
		pub, key, err := cs.GenerateHPKEKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s.receivers = append(s.receivers, ExternalReceiver{pub, BasicCredential([]byte(name))})
		s.keys = append(s.keys, key)
	}
	leaf := Extensions{{ExtensionSupportedWireFormats, codec.Marshal(WireFormats{WireFormatSemiPrivateMessage})}}
	alice := &client{name: "alice", signer: newSigner(t, cs), store: newMemStore()}
	cfg := testConfig()
	cfg.HandshakeFormat = WireFormatSemiPrivateMessage
	f := &forgery{TB: t, alice: alice, room: &room{t: t, cs: cs, members: []*client{alice}, store: newMemStore(), leaf: leaf}}
	s.forgery = f
	var err error
	alice.Group, err = NewGroup(cfg, alice.store, GroupOptions{GroupID: []byte("group"), Suite: cs, Credential: BasicCredential([]byte("alice")),
		Signer: alice.signer, LeafExtensions: leaf, Extensions: Extensions{
			{ExtensionRequiredWireFormats, codec.Marshal(WireFormats{WireFormatSemiPrivateMessage})},
			{ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary(nil).Set(ComponentExternalReceivers, codec.Marshal(s.receivers)))},
		}})
	f.must(err)
	gi, err := alice.GroupInfo(true, true)
	f.must(err)
	f.room.server, err = NewPublicGroup(publicConfig(), f.room.store, gi, nil)
	f.must(err)
	f.room.receive = func(m *SemiPrivateMessage) (*SemiPrivateContent, error) {
		return m.Open(cs, &s.receivers[0], s.keys[0])
	}
	joined := f.room.add(alice, "bob", "carol", "dave")
	f.bob, f.carol, f.dave = joined[0], joined[1], joined[2]
	return s
}

func TestServersFollowSemiPrivateHandshakes(t *testing.T) {
	for _, cs := range []CipherSuite{testSuite, P256_AES128GCM_SHA256_P256} {
		s := newSemiRoom(t, cs)
		f, r := s.forgery, s.forgery.room
		r.propose(f.bob.ProposeUpdate(f.bob.store, UpdateOptions{}))
		m, err := f.carol.Propose(f.carol.store, []byte("aad"), appData(0x8001, "x"))
		r.propose(m, err)
		if m.SemiPrivate == nil {
			t.Fatalf("proposal of wire format %x", m.WireFormat)
		}
		if _, err := f.bob.Receive(f.bob.store, wire(t, m)); !errors.Is(err, ErrGeneration) {
			t.Errorf("replayed: got %v, want ErrGeneration", err)
		}
		c, err := f.alice.Commit(f.alice.store, CommitOptions{})
		f.must(err)
		if c.Message().SemiPrivate == nil || len(c.Info().Proposals) != 2 {
			t.Errorf("commit of wire format %x with %d proposals", c.Message().WireFormat, len(c.Info().Proposals))
		}
		f.alice.reload(t)
		c = f.alice.PendingCommit()
		if got, err := f.alice.Receive(f.alice.store, wire(t, c.Message())); err != nil {
			t.Error(err)
		} else if _, ok := got.(*OwnCommit); !ok {
			t.Errorf("own commit received as %T", got)
		}
		r.accept(c.Message(), c.GroupInfo(), c.Tree())
		f.must(f.alice.Confirm(f.alice.store))
		r.distribute(c.Message(), f.alice)
		for _, by := range []*client{f.alice, f.bob} {
			if got, err := by.Receive(by.store, wire(t, c.Message())); err != nil {
				t.Error(err)
			} else if _, ok := got.(*Duplicate); !ok {
				t.Errorf("applied commit received as %T", got)
			}
		}
		r.check()
		r.checkStores()
		r.propose(f.dave.ProposeSelfRemove(f.dave.store)) // in the clear, so that eve can commit it
		r.join("eve")
		f.must(f.bob.Drop(f.bob.store))
		r.commit(f.bob, CommitOptions{ForcePath: true})
		c, err = f.carol.Commit(f.carol.store, CommitOptions{})
		f.must(err)
		f.must(f.carol.Drop(f.carol.store))
		if _, err := f.carol.Receive(f.carol.store, c.Message()); !errors.Is(err, ErrOwnMessage) {
			t.Errorf("dropped commit: got %v, want ErrOwnMessage", err)
		}
		r.commit(f.carol, CommitOptions{Proposals: []Proposal{setTerms(ComponentExternalReceivers, s.receivers[:1])}})
		r.commit(f.alice, CommitOptions{})
		r.talk()
		r.check()
		r.checkStores()
	}
}

// semiForged is a SemiPrivateMessage with something wrong.
type semiForged struct {
	content func(*FramedContent)
	signed  func(*AuthenticatedContent)
	keys    func(*messageKeys) // for the external receivers
	edit    func(*SemiPrivateMessage)
	pad     []byte
	after   func(*SemiPrivateMessage)
}

// seal makes a proposal of alice.
func (s *semiRoom) seal(o semiForged) *MLSMessage {
	cs, f, by := testSuite, s.forgery, s.forgery.alice
	prop := appData(0x8001, "+")
	c := FramedContent{GroupID: by.GroupID(), Epoch: by.Epoch(), Sender: Sender{Type: SenderMember, Leaf: by.OwnLeaf()},
		ContentType: ContentProposal, Proposal: &prop}
	if o.content != nil {
		o.content(&c)
	}
	ac, err := signContent(cs, rand.Reader, by.signer, WireFormatSemiPrivateMessage, c, by.state.encoded)
	f.must(err)
	if o.signed != nil {
		o.signed(ac)
	}
	step, err := by.messages.peekNext(by.OwnLeaf(), handshakeRatchet)
	f.must(err)
	k := &messageKeys{key: step.key, nonce: step.nonce, sender: by.OwnLeaf()}
	m := &SemiPrivateMessage{GroupID: c.GroupID, Epoch: c.Epoch, ContentType: c.ContentType, AuthenticatedData: c.AuthenticatedData,
		PartialContextHash: k.partialContextHash(cs), FramedContentTBSHash: ac.tbsHash(cs, by.state.encoded)}
	seal := func() {
		m.Keys = nil
		plain := *k
		if o.keys != nil {
			o.keys(&plain)
		}
		for i := range s.receivers {
			ct, err := cs.EncryptWithLabel(rand.Reader, s.receivers[i].PublicKey, labelSemiPrivate, m.receiverContext(), codec.Marshal(&plain))
			f.must(err)
			m.Keys = append(m.Keys, KeyForExternalReceiver{s.receivers[i].ref(cs), ct})
		}
	}
	seal()
	if o.edit != nil {
		hash := bytes.Clone(m.PartialContextHash)
		if o.edit(m); !bytes.Equal(hash, m.PartialContextHash) {
			seal()
		}
	}
	var w codec.Writer
	ac.marshalPadded(&w, nil)
	w.Raw(o.pad)
	m.Ciphertext, err = cs.aeadSeal(k.key, guardNonce(k.nonce, k.reuseGuard), m.contentAAD(), w.Bytes())
	f.must(err)
	key, nonce := senderDataKey(cs, by.secrets.senderData, m.Ciphertext)
	m.EncryptedSenderData, err = cs.aeadSeal(key, nonce, m.private().senderDataAAD(), codec.Marshal(senderData{leaf: k.sender, generation: step.generation}))
	f.must(err)
	if o.after != nil {
		o.after(m)
	}
	return NewMLSMessage(m)
}

func TestHostileSemiPrivateMessagesAreRefused(t *testing.T) {
	s := newSemiRoom(t, testSuite)
	f := s.forgery
	const semi = sectionSemiPrivate
	for _, v := range []struct {
		rule    string
		section string
		is      error
		judges  judges
		o       semiForged
	}{
		{"partial_context_hash", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.PartialContextHash = flip(m.PartialContextHash) }}},
		{"framed_content_tbs_hash", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.FramedContentTBSHash = flip(m.FramedContentTBSHash) }}},
		{"other external receivers", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.Keys[1].Ref = flip(m.Keys[1].Ref) }}},
		{"this external receiver left out", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.Keys = m.Keys[1:] }}},
		{"external receiver left out", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.Keys = m.Keys[:1] }}},
		{"one external receiver twice", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.Keys[1] = m.Keys[0] }}},
		{"external receiver too many", semi, nil, everyone, semiForged{edit: func(m *SemiPrivateMessage) { m.Keys = append(m.Keys, m.Keys[0]) }}},
		{"another sender for the external receivers", semi, nil, serverOnly, semiForged{keys: func(k *messageKeys) { k.sender = 1 }}},
		{"another nonce for the external receivers", semi, nil, serverOnly, semiForged{keys: func(k *messageKeys) { k.nonce = flip(k.nonce) }}},
		{"another key for the external receivers", "", ErrDecrypt, serverOnly, semiForged{keys: func(k *messageKeys) { k.key = flip(k.key) }}},
		{"short key for the external receivers", "", ErrMalformed, serverOnly, semiForged{keys: func(k *messageKeys) { k.key = k.key[1:] }}},
		{"short nonce for the external receivers", "", ErrMalformed, serverOnly, semiForged{keys: func(k *messageKeys) { k.nonce = k.nonce[1:] }}},
		{"ciphertext", "", ErrDecrypt, everyone, semiForged{after: func(m *SemiPrivateMessage) { m.Ciphertext = flip(m.Ciphertext) }}},
		{"authenticated data", "", ErrDecrypt, everyone, semiForged{after: func(m *SemiPrivateMessage) { m.AuthenticatedData = []byte("x") }}},
		{"padding", "", ErrMalformed, everyone, semiForged{pad: []byte{0, 1, 0}}},
		{"signature", "", ErrSignature, everyone, semiForged{signed: func(ac *AuthenticatedContent) { ac.Signature = flip(ac.Signature) }}},
		{"application data", "", ErrMalformed, everyone, semiForged{content: func(c *FramedContent) {
			c.ContentType, c.Proposal, c.ApplicationData = ContentApplication, nil, []byte("x")
		}}},
		{"another group", "", ErrMalformed, everyone, semiForged{content: func(c *FramedContent) { c.GroupID = []byte("other") }}},
		{"another epoch", "", ErrEpoch, everyone, semiForged{content: func(c *FramedContent) { c.Epoch++ }}},
		{"self_remove", sectionSelfRemove, nil, everyone, semiForged{content: func(c *FramedContent) { p := selfRemove(); c.Proposal = &p }}},
		{"invalid proposal", sectionAppData, nil, everyone, semiForged{content: func(c *FramedContent) { p := appData(0x9999, "x"); c.Proposal = &p }}},
	} {
		t.Run(v.rule, func(t *testing.T) {
			m := s.seal(v.o)
			check := &violation{section: v.section, is: v.is}
			before, stored := whole(f.bob.Group), f.bob.store.clone()
			if _, err := f.bob.Receive(f.bob.store, m); v.judges == everyone {
				check.check(t, "member", err)
				sameState(t, "member", whole(f.bob.Group), before)
				sameState(t, "member's store", f.bob.store.m, stored.m)
			} else if err != nil {
				t.Errorf("member: %v", err) // what only the receivers are given
			}
			server := dumpServer(f.server)
			_, err := f.room.checkProposal(m)
			if v.rule == "this external receiver left out" { // who can't even open it
				check = &violation{is: ErrMalformed}
			}
			check.check(t, "server", err)
			sameState(t, "server", dumpServer(f.server), server)
			f.bob.store = stored
			f.bob.reload(t)
		})
	}
	m := s.seal(semiForged{})
	if _, err := f.room.checkProposal(m); err != nil {
		t.Errorf("unbroken: %v", err)
	}
	if _, err := f.bob.Receive(nil, m); err != nil {
		t.Errorf("unbroken: %v", err)
	}
	if _, err := m.SemiPrivate.Open(testSuite, &s.receivers[0], s.keys[1]); !errors.Is(err, ErrDecrypt) {
		t.Errorf("another receiver's key: got %v, want ErrDecrypt", err)
	}
	if c, err := m.SemiPrivate.Open(testSuite, &s.receivers[1], s.keys[1]); err != nil || c.Content().Proposal.AppDataUpdate == nil {
		t.Errorf("the other receiver: %v", err)
	}
}

// TestServersCheckSemiPrivateCommits: a commit's frame is held to the same rules as a proposal's.
func TestServersCheckSemiPrivateCommits(t *testing.T) {
	s := newSemiRoom(t, testSuite)
	f := s.forgery
	c, err := f.alice.Commit(nil, CommitOptions{})
	f.must(err)
	opened, err := f.room.receive(c.Message().SemiPrivate)
	f.must(err)
	hash := opened.tbsHash
	opened.tbsHash = flip(hash)
	if _, err := f.server.CheckSemiPrivateCommit(opened); !section(err, sectionSemiPrivate) {
		t.Errorf("hash of what is signed: got %v, want a violation of %s", err, sectionSemiPrivate)
	}
	opened.tbsHash = hash
	f.must(second(f.server.CheckSemiPrivateCommit(opened)))
	f.must(f.alice.Drop(nil))
	f.room.commit(f.bob, CommitOptions{Proposals: []Proposal{setTerms(ComponentExternalReceivers, s.receivers[:1])}})
	if _, err := f.server.CheckSemiPrivateCommit(opened); !errors.Is(err, ErrEpoch) {
		t.Errorf("commit of the epoch before: got %v, want ErrEpoch", err)
	}
}

func TestKeysForReceiversAreDecodedStrictly(t *testing.T) {
	s := newSemiRoom(t, testSuite)
	m := s.seal(semiForged{}).SemiPrivate
	plain, err := testSuite.DecryptWithLabel(s.keys[0], labelSemiPrivate, m.receiverContext(), m.Keys[0].Encrypted)
	s.must(err)
	m.Keys[0].Encrypted, err = testSuite.EncryptWithLabel(rand.Reader, s.receivers[0].PublicKey, labelSemiPrivate, m.receiverContext(), append(plain, 0))
	s.must(err)
	if _, err := m.Open(testSuite, &s.receivers[0], s.keys[0]); !errors.Is(err, codec.ErrTrailing) {
		t.Errorf("got %v, want ErrTrailing", err)
	}
}

// A group uses SemiPrivateMessages only if it requires them and names somebody to receive them.
func TestSemiPrivateMessagesNeedTheGroupsConsent(t *testing.T) {
	for name, edit := range map[string]func(f *forgery){
		"no receivers": func(f *forgery) {
			f.room.commit(f.bob, CommitOptions{Proposals: []Proposal{setTerms(ComponentExternalReceivers, ExternalReceivers{})}})
		},
		"not required": func(f *forgery) {
			f.room.commit(f.bob, CommitOptions{Proposals: []Proposal{extensions(f, func(e Extensions) Extensions { return e.Remove(ExtensionRequiredWireFormats) })}})
		},
	} {
		s := newSemiRoom(t, testSuite)
		f := s.forgery
		edit(f)
		check := &violation{section: sectionSemiPrivate}
		_, err := f.alice.Commit(f.alice.store, CommitOptions{})
		check.check(t, name+": committer", err)
		_, err = f.alice.Propose(f.alice.store, nil, appData(0x8001, "x"))
		check.check(t, name+": proposer", err)
		m := s.seal(semiForged{})
		_, err = f.bob.Receive(f.bob.store, m)
		check.check(t, name+": member", err)
		_, err = f.room.checkProposal(m)
		check.check(t, name+": server", err)
		f.alice.cfg.HandshakeFormat = WireFormatPublicMessage
		f.room.commit(f.alice, CommitOptions{})
	}
}

func TestGroupsDoNotBeginWithReceiversWithoutAKey(t *testing.T) {
	bad := ExternalReceivers{{PublicKey: []byte("short"), Credential: BasicCredential([]byte("hub"))}}
	d := AppDataDictionary{}.Set(ComponentExternalReceivers, codec.Marshal(bad))
	_, err := NewGroup(testConfig(), nil, GroupOptions{GroupID: []byte("group"), Suite: testSuite, Credential: BasicCredential([]byte("alice")),
		Signer: newSigner(t, testSuite), Extensions: Extensions{}.Set(ExtensionAppDataDictionary, codec.Marshal(d))})
	(&violation{section: sectionSemiPrivate}).check(t, "founder", err)
}

func TestExternalReceiversAreBounded(t *testing.T) {
	l := make(ExternalReceivers, maxValues+1)
	for i := range l {
		l[i] = ExternalReceiver{PublicKey: []byte{byte(i), byte(i >> 8)}, Credential: BasicCredential([]byte("hub"))}
	}
	if err := codec.Unmarshal(codec.Marshal(l[1:]), new(ExternalReceivers)); err != nil {
		t.Error(err)
	}
	if err := codec.Unmarshal(codec.Marshal(l), new(ExternalReceivers)); err == nil {
		t.Errorf("%d external receivers are taken", len(l))
	}
}
