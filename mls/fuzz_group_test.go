package mls

import (
	"crypto/rand"
	"maps"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// FuzzReceive has an insider send handshake contents at will, well signed and tagged: members and server refuse them
// or apply them, they don't panic, and what is refused changes nothing.
func FuzzReceive(f *testing.F) {
	fixture := newForgery(f)
	for _, v := range violations {
		m := v.message(newForgery(f))
		c := &m.Public.Content
		var w codec.Writer
		c.marshalBody(&w)
		f.Add(byte(c.ContentType), byte(c.Sender.Type), uint32(c.Sender.Leaf), w.Bytes())
	}
	bob := fixture.bob
	before, stored := dump(bob.Group), maps.Clone(bob.store.m)
	server := dumpServer(fixture.server)
	f.Fuzz(func(t *testing.T, contentType, senderType byte, leaf uint32, body []byte) {
		alice := fixture.alice
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
		m, err := protectPublic(testSuite, ac, alice.secrets.membership, alice.state.encoded)
		if err != nil {
			t.Fatal(err)
		}
		if c.ContentType == ContentCommit {
			_, _ = fixture.server.CheckCommit(m)
		} else {
			_, _ = fixture.server.CheckProposal(m)
		}
		sameState(t, "server", dumpServer(fixture.server), server)
		if _, err := bob.Receive(bob.store, NewMLSMessage(m)); err != nil {
			sameState(t, "bob", dump(bob.Group), before)
			sameState(t, "bob's store", bob.store.m, stored)
			return
		}
		bob.store.m = maps.Clone(stored)
		bob.reload(t)
	})
}

// FuzzLoadGroup replaces an entry of a client's state.
func FuzzLoadGroup(f *testing.F) {
	fixture := newForgery(f)
	alice := fixture.alice
	if _, err := alice.Commit(alice.store, CommitOptions{}); err != nil {
		f.Fatal(err)
	}
	for k, v := range alice.store.m {
		f.Add([]byte(k), []byte(v))
	}
	f.Fuzz(func(t *testing.T, k, v []byte) {
		s := alice.store.clone()
		s.Set(k, v)
		g, err := LoadGroup(testConfig(), alice.signer, s.all())
		if err != nil || !g.Active() {
			return
		}
		_, _ = g.Encrypt(s, nil, []byte("x"))
		_ = g.Drop(s)
		_, _ = g.Commit(s, CommitOptions{})
		_ = g.Confirm(s)
	})
}

// FuzzLoadPublicGroup replaces an entry of a server's state.
func FuzzLoadPublicGroup(f *testing.F) {
	fixture := newForgery(f)
	m := fixture.commit(forged{})
	for k, v := range fixture.store.m {
		f.Add([]byte(k), []byte(v))
	}
	f.Fuzz(func(t *testing.T, k, v []byte) {
		s := fixture.store.clone()
		s.Set(k, v)
		g, err := LoadPublicGroup(publicConfig(), s.all())
		if err != nil {
			return
		}
		if staged, err := g.CheckCommit(m.Public); err == nil {
			_ = g.Apply(s, staged, g.GroupInfo())
		}
	})
}

// FuzzLoadPendingJoin decodes a stored external commit.
func FuzzLoadPendingJoin(f *testing.F) {
	fixture := newForgery(f)
	gi, err := fixture.alice.GroupInfo(true, true)
	if err != nil {
		f.Fatal(err)
	}
	signer := newSigner(f, testSuite)
	p, err := ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: signer})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(codec.Marshal(p))
	f.Fuzz(func(t *testing.T, in []byte) {
		p, err := LoadPendingJoin(testConfig(), signer, in)
		if err != nil {
			return
		}
		if string(codec.Marshal(p)) != string(in) {
			t.Error("decoded and encoded gives something else")
		}
		_, _ = p.Confirm(nil)
	})
}
