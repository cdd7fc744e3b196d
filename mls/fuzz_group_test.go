package mls

import (
	"crypto/rand"
	"maps"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// FuzzReceive has an insider send contents at will, well framed: members and server refuse them or apply them, they don't
// panic, and what is refused changes nothing. In a PublicMessage and a SemiPrivateMessage, which is a private one of sender
// type 1, the contents are signed; those of a PrivateMessage come with their signature.
func FuzzReceive(f *testing.F) {
	fixture := newForgery(f)
	for i, v := range violations {
		if testing.Short() && i%4 != 0 { // they have a test
			continue
		}
		m := v.message(newForgery(f))
		if m.Public == nil {
			continue
		}
		c := &m.Public.Content
		var w codec.Writer
		c.marshalBody(&w)
		f.Add(false, byte(c.ContentType), byte(c.Sender.Type), uint32(c.Sender.Leaf), w.Bytes())
		f.Add(true, byte(c.ContentType), byte(SenderMember), uint32(0), w.Bytes())
		marshalAuth(&w, c.ContentType, m.Public.Signature, m.Public.ConfirmationTag)
		w.Uint32(0)
		f.Add(true, byte(c.ContentType), byte(0), uint32(0), w.Bytes())
	}
	ac := fixture.sign(fixture.alice, FramedContent{Sender: Sender{Type: SenderMember}, ContentType: ContentApplication, ApplicationData: []byte("x")})
	var w codec.Writer
	w.Opaque([]byte("x"))
	w.Opaque(ac.Signature)
	f.Add(true, byte(ContentApplication), byte(0), uint32(0), w.Bytes())
	alice, bob := fixture.alice, fixture.bob
	before, stored := dump(bob.Group), maps.Clone(bob.store.m)
	server := dumpServer(fixture.server)
	semi := newSemiFuzz(f)
	f.Fuzz(func(t *testing.T, private bool, contentType, senderType byte, leaf uint32, body []byte) {
		var m *MLSMessage
		if private && SenderType(senderType) == SenderMember {
			semi.receive(t, ContentType(contentType), body)
			return
		}
		if private {
			m = sealed(t, alice, ContentType(contentType), LeafIndex(leaf), body)
		} else {
			c := FramedContent{GroupID: alice.GroupID(), Epoch: alice.Epoch(), ContentType: ContentType(contentType),
				Sender: Sender{Type: SenderType(senderType), Leaf: LeafIndex(leaf), Index: leaf}}
			r := codec.NewReader(body)
			c.unmarshalBody(r)
			if r.Finish() != nil || c.ContentType == ContentApplication {
				return
			}
			ac, err := signContent(testSuite, rand.Reader, alice.signer, WireFormatPublicMessage, c, alice.state.encoded)
			if err != nil {
				t.Fatal(err)
			}
			ac.ConfirmationTag = make([]byte, 32)
			p, err := protectPublic(testSuite, ac, alice.secrets.membership, alice.state.encoded)
			if err != nil {
				t.Fatal(err)
			}
			if c.ContentType == ContentCommit {
				_, _ = fixture.server.CheckCommit(p)
			} else {
				_, _ = fixture.server.CheckProposal(p)
			}
			sameState(t, "server", dumpServer(fixture.server), server)
			m = NewMLSMessage(p)
		}
		if _, err := bob.Receive(bob.store, m); err != nil {
			sameState(t, "bob", dump(bob.Group), before)
			sameState(t, "bob's store", bob.store.m, stored)
			return
		}
		bob.store.m = maps.Clone(stored)
		bob.reload(t)
	})
}

// semiFuzz is a group of SemiPrivateMessages whose state is kept.
type semiFuzz struct {
	*semiRoom
	before, stored, server map[string]string
}

func newSemiFuzz(f *testing.F) *semiFuzz {
	s := &semiFuzz{semiRoom: newSemiRoom(f, testSuite)}
	s.before, s.stored, s.server = dump(s.bob.Group), maps.Clone(s.bob.store.m), dumpServer(s.forgery.server)
	return s
}

// receive has the server and bob receive a content of alice.
func (s *semiFuzz) receive(t *testing.T, typ ContentType, body []byte) {
	t.Helper()
	s.TB = t
	content := FramedContent{ContentType: typ}
	r := codec.NewReader(body)
	content.unmarshalBody(r)
	if r.Finish() != nil {
		return
	}
	m := s.seal(semiForged{
		content: func(c *FramedContent) {
			c.ContentType, c.Proposal, c.Commit, c.ApplicationData = typ, content.Proposal, content.Commit, content.ApplicationData
		},
		signed: func(ac *AuthenticatedContent) {
			if typ == ContentCommit {
				ac.ConfirmationTag = make([]byte, 32)
			}
		},
	})
	if typ == ContentCommit {
		_, _ = s.room.checkCommit(m)
	} else {
		_, _ = s.room.checkProposal(m)
	}
	sameState(t, "server", dumpServer(s.forgery.server), s.server)
	if _, err := s.bob.Receive(s.bob.store, m); err != nil {
		sameState(t, "bob", dump(s.bob.Group), s.before)
		sameState(t, "bob's store", s.bob.store.m, s.stored)
		return
	}
	s.bob.store.m = maps.Clone(s.stored)
	s.bob.reload(t)
}

// sealed encrypts a content with the first key of a leaf, which isn't used up by that.
func sealed(t testing.TB, by *client, typ ContentType, leaf LeafIndex, content []byte) *MLSMessage {
	t.Helper()
	m := &PrivateMessage{GroupID: by.GroupID(), Epoch: by.Epoch(), ContentType: typ}
	step, err := by.messages.peek(leaf, kindOf(typ), 0, ratchetLimits{})
	if err != nil { // a leaf that isn't in the tree
		step = &ratchetStep{key: make(secret, testSuite.aeadKeySize()), nonce: make(secret, testSuite.aeadNonceSize())}
	}
	if m.Ciphertext, err = testSuite.aeadSeal(step.key, step.nonce, m.contentAAD(), content); err != nil {
		t.Fatal(err)
	}
	k, n := senderDataKey(testSuite, by.secrets.senderData, m.Ciphertext)
	if m.EncryptedSenderData, err = testSuite.aeadSeal(k, n, m.senderDataAAD(), codec.Marshal(senderData{leaf: leaf})); err != nil {
		t.Fatal(err)
	}
	return NewMLSMessage(m)
}

// FuzzLoad replaces an entry of a client's and of a server's state, without their seals, or an external commit that was
// stored: what can be known to be damaged is refused, and what is loaded works without panic.
func FuzzLoad(f *testing.F) {
	fixture := newForgery(f)
	alice := fixture.alice
	m := fixture.commit(forged{})
	text, err := fixture.bob.Encrypt(nil, nil, []byte("x"))
	fixture.must(err)
	fixture.must(second(alice.Commit(alice.store, CommitOptions{})))
	resync, err := fixture.carol.Resync(nil, fixture.resyncOptions())
	fixture.must(err)
	gi, err := fixture.bob.GroupInfo(true, true)
	fixture.must(err)
	signer := newSigner(f, testSuite)
	p, err := ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: signer})
	fixture.must(err)
	state := alice.store.opened()
	for k, v := range state.m {
		f.Add(byte(0), []byte(k), []byte(v))
	}
	f.Add(byte(0), key1(keyEntrance), codec.Marshal(&entrance{joined: 1, tried: 3, resync: resync}))
	f.Add(byte(0), key1(keyReInit), codec.Marshal(&ReInit{GroupID: []byte("next"), Version: MLS10, CipherSuite: testSuite}))
	for k, v := range fixture.store.m {
		f.Add(byte(1), []byte(k), []byte(v))
	}
	f.Add(byte(2), []byte{}, codec.Marshal(p))
	f.Fuzz(func(t *testing.T, what byte, k, v []byte) {
		switch what % 3 {
		case 0:
			s := state.clone()
			s.Set(k, v)
			g, err := LoadGroup(testConfig(), alice.signer, s.all())
			if err != nil || !g.Active() {
				return
			}
			_, _ = g.Encrypt(s, nil, []byte("x"))
			_, _ = g.Receive(s, text)
			_, _ = g.SafeExport(s, 0x8001)
			if len(v)%2 == 0 {
				_ = g.Confirm(s)
			}
			_ = g.Drop(s)
			_ = g.Reseal(s)
			_, _ = g.Commit(s, CommitOptions{})
			_ = g.Confirm(s)
		case 1:
			s := fixture.store.clone()
			s.Set(k, v)
			g, err := LoadPublicGroup(publicConfig(), s.all())
			if err != nil {
				return
			}
			if staged, err := g.CheckCommit(m.Public); err == nil {
				_ = g.Apply(s, staged, g.GroupInfo())
			}
		case 2:
			p, err := LoadPendingJoin(testConfig(), signer, v)
			if err != nil {
				return
			}
			once := codec.Marshal(p) // in the format of today, and with the keys in order
			if p, err = LoadPendingJoin(testConfig(), signer, once); err != nil {
				t.Fatalf("decoded, encoded and decoded: %v", err)
			}
			if string(codec.Marshal(p)) != string(once) {
				t.Error("decoded and encoded again gives something else")
			}
			_, _ = p.Confirm(nil)
		}
	})
}
