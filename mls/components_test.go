package mls

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// A client joins a group only if its leaf lists the components that the group requires (draft-ietf-mls-extensions,
// Section 5).
func TestRequiredComponentsAreAskedOfNewMembers(t *testing.T) {
	list := func(ids ...ComponentID) Extensions {
		d := AppDataDictionary(nil).Set(ComponentAppComponents, codec.Marshal(ComponentsList(ids)))
		return Extensions{{Type: ExtensionAppDataDictionary, Data: codec.Marshal(d)}}
	}
	const cs, required = testSuite, ComponentID(0x8001)
	hub := newSigner(t, cs)
	hubKey, err := cs.SignaturePublicKey(hub.Public())
	if err != nil {
		t.Fatal(err)
	}
	context := append(list(required), Extension{Type: ExtensionExternalSenders, Data: codec.Marshal(ExternalSenders{
		{SignatureKey: hubKey, Credential: BasicCredential([]byte("hub"))},
	})})
	options := GroupOptions{
		GroupID: []byte("group"), Suite: cs, Credential: BasicCredential([]byte("alice")), Signer: newSigner(t, cs), Extensions: context,
	}
	lacks := func(err error) bool {
		var v *ValidationError
		return errors.As(err, &v) && v.Section == sectionNegotiation
	}
	if _, err := NewGroup(testConfig(), nil, options); !lacks(err) {
		t.Errorf("group of a creator without the component: %v", err)
	}
	options.LeafExtensions = list(ComponentAppComponents, required, 0x0a0a)
	g, err := NewGroup(testConfig(), nil, options)
	if err != nil {
		t.Fatal(err)
	}
	gi, err := g.GroupInfo(true, true)
	if err != nil {
		t.Fatal(err)
	}
	server, err := NewPublicGroup(publicConfig(), nil, gi, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		leaf Extensions
		ok   bool
	}{
		{"no list", nil, false},
		{"another component", list(0x8002), false},
		{"the component among others", list(1, required, 0x8002), true},
	} {
		kp, _, err := NewKeyPackage(KeyPackageOptions{
			Suite: cs, Credential: BasicCredential([]byte("bob")), Signer: newSigner(t, cs), LeafExtensions: c.leaf,
		})
		if err != nil {
			t.Fatal(err)
		}
		m, err := ExternalProposal(cs, nil, hub, 0, g.GroupID(), g.Epoch(), nil, add(kp))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := server.CheckProposal(m.Public); c.ok && err != nil || !c.ok && !lacks(err) {
			t.Errorf("%s: the server says %v", c.name, err)
		}
		if _, err := g.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}}); c.ok && err != nil || !c.ok && !lacks(err) {
			t.Errorf("%s: the committer says %v", c.name, err)
		}
	}
}

func TestComponentsBringPreSharedKeys(t *testing.T) {
	f := newForgery(t)
	r := f.room
	sharedID := sharedPSK()
	sharedID.PSK.PSK = PreSharedKeyID{Type: PSKApplication, Component: 0x8001, ID: []byte("shared"), Nonce: make([]byte, testSuite.HashSize())}
	other := sharedPSK()
	other.PSK.PSK.Nonce = make([]byte, testSuite.HashSize())
	joiner, kp, secrets := keyPackage(t, testSuite, "joiner")
	c := r.commit(f.alice, CommitOptions{Proposals: []Proposal{sharedID, other, add(kp)}, TreeInWelcome: true})
	g, err := JoinGroup(testConfig(), joiner.store, joiner.signer, c.Welcome(), kp, secrets, nil)
	f.must(err)
	joiner.Group = g
	r.members = append(r.members, joiner)
	r.check()
	r.join("eve", componentPSK())
	r.check()
	r.talk()
}

func TestAppDataUpdateNeedsSupportOfAllWhoStay(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	r.add(alice, "bob")
	old, kp, secrets := keyPackage(t, testSuite, "old client")
	f := &forgery{TB: t, room: r, alice: alice}
	p := f.keyPackage("old client", old.signer, func(k *KeyPackage) {
		k.InitKey, k.LeafNode.EncryptionKey = kp.InitKey, kp.LeafNode.EncryptionKey
		k.LeafNode.Capabilities.Proposals = nil
	})
	c := r.commit(alice, CommitOptions{Proposals: []Proposal{p}, TreeInWelcome: true})
	g, err := JoinGroup(testConfig(), old.store, old.signer, c.Welcome(), &p.Add.KeyPackage, secrets, nil)
	if err != nil {
		t.Fatal(err)
	}
	old.Group = g
	r.members = append(r.members, old)
	_, err = alice.Commit(alice.store, CommitOptions{Proposals: []Proposal{appData(0x8001, "x")}})
	var ve *ValidationError
	if !errors.As(err, &ve) || ve.Section != "12.2" {
		t.Errorf("got %v, want a violation of 12.2", err)
	}
	r.commit(alice, CommitOptions{Proposals: []Proposal{appData(0x8001, "x"), remove(old.OwnLeaf())}})
	r.check()
	r.checkStores()
}
