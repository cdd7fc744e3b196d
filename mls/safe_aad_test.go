package mls

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func TestSafeAADFramesAllThatIsAuthenticated(t *testing.T) {
	f := newForgery(t)
	r := f.room
	late, err := f.carol.Encrypt(f.carol.store, []byte("text"), []byte("late"))
	f.must(err)
	if f.alice.SafeAAD() {
		t.Error("a frame that nobody asked for")
	}
	f.require(ComponentSafeAAD, ComponentsList{})
	aad := codec.Marshal(SafeAAD(nil).Set(0x8002, []byte("b")).Set(0x8001, []byte("a")))
	for _, c := range []*client{f.alice, f.bob} {
		if c == f.bob {
			c.reload(t)
		}
		if got, err := c.Receive(c.store, late); err != nil || string(got.(*ApplicationMessage).AAD) != "text" {
			t.Errorf("message of an epoch without frames: %v", err)
		}
		if !c.SafeAAD() {
			t.Error("no frame")
		}
	}
	refused := func(what string, err error) {
		t.Helper()
		var ve *ValidationError
		if !errors.As(err, &ve) || ve.Section != sectionSafeAAD {
			t.Errorf("%s: got %v, want a violation of %s", what, err, sectionSafeAAD)
		}
	}
	text := []byte("text")
	before := dump(f.alice.Group)
	refused("encrypt", second(f.alice.Encrypt(f.alice.store, text, nil)))
	refused("propose", second(f.alice.Propose(f.alice.store, text, appData(0x8001, "+"))))
	refused("commit", second(f.alice.Commit(f.alice.store, CommitOptions{AAD: text})))
	refused("join", second(ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: r.server.GroupInfo(), Tree: fresh(t, r.server.Tree()),
		Credential: BasicCredential([]byte("eve")), Signer: newSigner(t, testSuite), AAD: text})))
	sameState(t, "alice", dump(f.alice.Group), before)

	for _, given := range [][]byte{nil, aad} {
		m, err := f.alice.Encrypt(f.alice.store, given, []byte("x"))
		f.must(err)
		got, err := f.bob.Receive(f.bob.store, wire(t, m))
		f.must(err)
		a, err := ParseSafeAAD(got.(*ApplicationMessage).AAD)
		f.must(err)
		if data, ok := a.Get(0x8001); ok != (given != nil) || ok && string(data) != "a" {
			t.Errorf("item %q", data)
		}
	}
	m := f.encrypt(f.alice, f.sign(f.alice, FramedContent{Sender: Sender{Type: SenderMember, Leaf: f.alice.OwnLeaf()},
		AuthenticatedData: text, ContentType: ContentApplication, ApplicationData: text}))
	stored := f.bob.store.clone()
	refused("receive", second(f.bob.Receive(f.bob.store, m)))
	sameState(t, "bob", f.bob.store.m, stored.m)

	r.propose(f.alice.Propose(f.alice.store, aad, appData(0x8001, "+")))
	r.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))
	r.commit(f.bob, CommitOptions{AAD: aad})
	r.join("eve")
	r.check()
	r.checkStores()
}

func TestWhatIsNoSafeAADIsRefused(t *testing.T) {
	for _, aad := range []string{"", "\x05", "\x04\x00\x01\x02\x00", "\x00x"} {
		if items, err := ParseSafeAAD([]byte(aad)); err == nil {
			t.Errorf("%x is taken for %v", aad, items)
		}
	}
}
