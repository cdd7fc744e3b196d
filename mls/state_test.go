package mls

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// dump is the state that a store must have, computed from the group in memory and not from what operations wrote. It
// isn't sealed.
func dump(g *Group) map[string]string {
	s := newMemStore()
	dumpPublic(s, &g.state)
	s.Set(key1(keyHeader), codec.Marshal(&header{kind: kindGroup, slots: g.state.tree.Size(), context: g.state.context,
		extEpoch: g.state.extEpoch, confirmationTag: g.state.confirmationTag, own: g.own, active: g.active, secrets: g.secrets}))
	g.entrance.save(s)
	if !g.active {
		return s.m
	}
	s.Set(key1(keyPrivate), codec.Marshal(g.private))
	g.exports.save(s)
	g.sealer.save(s, key1(keyStateSeal))
	dumpSecrets(s, g.Epoch(), g.messages)
	for _, e := range g.past {
		s.Set(key64(keyPast, e.context.Epoch), codec.Marshal(e))
		s.Set(key64(keyExtensions, e.extEpoch), codec.Marshal(e.context.Extensions))
		dumpSecrets(s, e.context.Epoch, e.tree)
		for i, l := range e.replaced {
			var enc []byte
			if l != nil {
				enc = codec.Marshal(l)
			}
			s.Set(keyLeaf(e.context.Epoch, i), enc)
		}
	}
	if g.staged != nil {
		s.Set(key1(keyStaged), codec.Marshal(g.staged))
	}
	return s.m
}

func dumpPublic(s *memStore, p *publicState) {
	for n := range p.tree.nodeWidth() {
		if enc := p.tree.encodeNode(NodeIndex(n)); enc != nil {
			s.Set(key32(keyNode, n), enc)
		}
	}
	s.Set(key64(keyExtensions, p.extEpoch), codec.Marshal(p.context.Extensions))
	p.saveReInit(s)
	for _, e := range p.pending {
		s.Set(key32(keyPending, e.number), codec.Marshal(e))
	}
}

func dumpSecrets(s *memStore, epoch uint64, st *secretTree) {
	st.sealer.save(s, key64(keyEpochSeal, epoch))
	for _, k := range st.keys() {
		s.Set(append(key64(keySecret, epoch), k...), st.entry(string(k)))
	}
}

func dumpServer(g *PublicGroup) map[string]string {
	s := newMemStore()
	dumpPublic(s, &g.state)
	s.Set(key1(keyHeader), codec.Marshal(&header{kind: kindPublicGroup, slots: g.state.tree.Size(), context: g.state.context,
		extEpoch: g.state.extEpoch, confirmationTag: g.state.confirmationTag}))
	s.Set(key1(keyGroupInfo), codec.Marshal(g.info))
	return s.m
}

// unsealed returns a state with the seals opened that its keys open, and its header without the format; what isn't
// sealed stays as it is.
func unsealed(m map[string]string) map[string]string {
	out := make(map[string]string, len(m))
	sealers := make(map[string]*sealer)
	for k, v := range m {
		key := m[string(key1(keyStateSeal))]
		if k[0] == keySecret || k[0] == keyPast {
			key = m[string(keyEpochSeal)+k[1:9]]
		}
		if _, ok := sealers[key]; !ok {
			sealers[key], _ = sealerOf(secret(key))
		}
		if s := sealers[key]; s != nil {
			if plain, err := s.open([]byte(k), []byte(v)); err == nil {
				v = string(plain)
			}
		}
		if k[0] == keyHeader {
			v = v[2:]
		}
		out[k] = v
	}
	return out
}

// sameState compares states apart from their formats and seals.
func sameState(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	got, want = unsealed(got), unsealed(want)
	for k, v := range want {
		if g, ok := got[k]; !ok {
			t.Errorf("%s: entry %q is missing", what, k)
		} else if g != v {
			t.Errorf("%s: entry %q is %x, want %x", what, k, g, v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: entry %q is left over", what, k)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// checkKeys has a member decrypt with each private key what is encrypted to the node's public key.
func checkKeys(t testing.TB, c *client) {
	t.Helper()
	cs := c.Suite()
	for n, key := range c.private.keys {
		pub := c.state.tree.publicKey(n)
		if pub == nil {
			t.Fatalf("%s: private key of node %d, which is blank", c.name, n)
		}
		ct, err := cs.EncryptWithLabel(c.cfg.rand(), pub, "test", nil, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cs.DecryptWithLabel(key, "test", nil, ct); err != nil {
			t.Fatalf("%s: private key of node %d is not that of its public key", c.name, n)
		}
	}
}

// checkStores compares every store with its group, and the group with what the store restores.
func (r *room) checkStores() {
	r.t.Helper()
	for _, c := range r.members {
		sameState(r.t, c.name, c.store.m, dump(c.Group))
		g, err := LoadGroup(testConfig(), c.signer, c.store.all())
		if err != nil {
			r.t.Fatalf("%s: %v", c.name, err)
		}
		sameState(r.t, c.name+" loaded", dump(g), c.store.m)
		checkKeys(r.t, c)
	}
	if r.server == nil {
		return
	}
	sameState(r.t, "server", r.store.m, dumpServer(r.server))
	g, err := LoadPublicGroup(publicConfig(), r.store.all())
	if err != nil {
		r.t.Fatalf("server: %v", err)
	}
	sameState(r.t, "server loaded", dumpServer(g), r.store.m)
}

func TestStagedCommitSurvivesRestart(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	r.propose(bob.ProposeUpdate(bob.store, UpdateOptions{}))
	joiner, kp, secrets := keyPackage(t, testSuite, "carol")
	before := dump(alice.Group)
	if _, err := alice.Commit(alice.store, CommitOptions{Proposals: []Proposal{add(kp), sharedPSK(), appData(0x8001, "x")}, TreeInWelcome: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := alice.Commit(alice.store, CommitOptions{}); !errors.Is(err, ErrStaged) {
		t.Errorf("second commit: got %v, want ErrStaged", err)
	}
	staged := alice.store.clone()
	alice.reload(t)
	if err := alice.Drop(alice.store); err != nil {
		t.Fatal(err)
	}
	sameState(t, "dropped", alice.store.m, before)
	sameState(t, "dropped in memory", dump(alice.Group), before)

	alice.store = staged
	alice.reload(t)
	c := alice.PendingCommit()
	if got, err := alice.Receive(alice.store, wire(t, c.Message())); err != nil {
		t.Fatal(err)
	} else if _, ok := got.(*OwnCommit); !ok {
		t.Fatalf("own commit received as %T", got)
	}
	r.accept(c.Message(), c.GroupInfo(), c.Tree())
	if err := alice.Confirm(alice.store); err != nil {
		t.Fatal(err)
	}
	if got, err := alice.Receive(alice.store, wire(t, c.Message())); err != nil {
		t.Fatal(err)
	} else if _, ok := got.(*Duplicate); !ok {
		t.Fatalf("confirmed commit received as %T", got)
	}
	r.distribute(c.Message(), alice)
	g, err := JoinGroup(testConfig(), joiner.store, joiner.signer, wire(t, NewMLSMessage(c.Welcome())).Welcome, kp, secrets, nil)
	if err != nil {
		t.Fatal(err)
	}
	joiner.Group = g
	r.members = append(r.members, joiner)
	r.check()
	r.checkStores()
	r.talk()
	r.checkStores()
	if err := alice.Confirm(alice.store); !errors.Is(err, ErrStaged) {
		t.Errorf("confirm twice: got %v, want ErrStaged", err)
	}
}

func TestNewSignatureKeySurvivesRestart(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	next := newSigner(t, testSuite)
	cred := BasicCredential([]byte("member 0#2"))
	if _, err := alice.Commit(alice.store, CommitOptions{Credential: &cred, Signer: next}); err != nil {
		t.Fatal(err)
	}
	alice.reload(t) // with the old signer
	if _, err := alice.Encrypt(alice.store, nil, []byte("still the old key")); err != nil {
		t.Fatal(err)
	}
	c := alice.PendingCommit()
	r.accept(c.Message(), c.GroupInfo(), c.Tree())
	if err := alice.Confirm(alice.store); err != nil {
		t.Fatal(err)
	}
	r.distribute(c.Message(), alice)
	if _, err := alice.Encrypt(alice.store, nil, []byte("x")); !errors.Is(err, ErrSigner) {
		t.Errorf("got %v, want ErrSigner", err)
	}
	if err := alice.AddSigner(next); err != nil {
		t.Fatal(err)
	}
	alice.signer = next
	r.talk()

	// The same by an Update that somebody else commits.
	bobNext := newSigner(t, testSuite)
	bobCred := BasicCredential([]byte("bob#2"))
	r.propose(bob.ProposeUpdate(bob.store, UpdateOptions{Credential: &bobCred, Signer: bobNext}))
	bob.reload(t)
	if err := bob.AddSigner(bobNext); err != nil {
		t.Fatal(err)
	}
	bob.signer = bobNext
	r.commit(alice, CommitOptions{})
	r.talk()
	r.check()
	r.checkStores()
	if m, _ := alice.Member(bob.OwnLeaf()); string(m.Leaf.Credential.Identity) != "bob#2" {
		t.Errorf("bob's credential is %q", m.Leaf.Credential.Identity)
	}
}

func TestLateMessagesOfPastEpochsDecrypt(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	carol := r.add(alice, "carol")[0]
	type late struct {
		m    *MLSMessage
		leaf []byte
	}
	var sent []late
	for i := range 6 {
		m, err := carol.Encrypt(carol.store, nil, fmt.Appendf(nil, "late %d", i))
		if err != nil {
			t.Fatal(err)
		}
		own, _ := carol.Member(carol.OwnLeaf())
		sent = append(sent, late{m, own.Leaf.EncryptionKey})
		if i == 4 {
			r.commit(bob, CommitOptions{Proposals: []Proposal{remove(carol.OwnLeaf())}})
			break
		}
		r.commit(carol, CommitOptions{}) // replaces carol's leaf
	}
	bob.reload(t)
	if _, err := bob.Receive(bob.store, sent[0].m); !errors.Is(err, ErrEpoch) {
		t.Errorf("message of five epochs ago: got %v, want ErrEpoch", err)
	}
	for i := 4; i >= 1; i-- {
		got, err := bob.Receive(bob.store, sent[i].m)
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		a := got.(*ApplicationMessage)
		if string(a.Data) != fmt.Sprintf("late %d", i) || !bytes.Equal(a.Leaf.EncryptionKey, sent[i].leaf) {
			t.Errorf("message %d: %q by another leaf than at that time", i, a.Data)
		}
		if _, err := bob.Receive(bob.store, sent[i].m); !errors.Is(err, ErrGeneration) {
			t.Errorf("message %d again: got %v, want ErrGeneration", i, err)
		}
	}
	r.checkStores()
}

func TestMessagesOutOfOrderAreReadOnce(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	var sent []*MLSMessage
	for i := range 8 {
		m, err := alice.Encrypt(alice.store, nil, []byte{byte(i)})
		if err != nil {
			t.Fatal(err)
		}
		sent = append(sent, m)
	}
	for _, i := range []int{5, 0, 7, 3, 1, 2, 6, 4} {
		got, err := bob.Receive(bob.store, sent[i])
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if a := got.(*ApplicationMessage); a.Data[0] != byte(i) || a.Generation != uint32(i) {
			t.Errorf("message %d: data %d, generation %d", i, a.Data[0], a.Generation)
		}
		r.checkStores()
		bob.reload(t)
		if _, err := bob.Receive(bob.store, sent[i]); !errors.Is(err, ErrGeneration) {
			t.Errorf("message %d again: got %v, want ErrGeneration", i, err)
		}
	}
	if _, err := alice.Receive(alice.store, sent[0]); !errors.Is(err, ErrOwnMessage) {
		t.Errorf("own message: got %v, want ErrOwnMessage", err)
	}
}

func TestCommitOfAnotherDropsTheOwn(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	if _, err := alice.Commit(alice.store, CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	r.commit(bob, CommitOptions{})
	if alice.PendingCommit() != nil {
		t.Error("own commit is still staged")
	}
	r.check()
	r.checkStores()
}

func TestRemovedMemberKeepsNoSecrets(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob")[0]
	r.add(alice, "carol")
	r.talk()
	if _, err := bob.Commit(bob.store, CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	r.commit(alice, CommitOptions{Proposals: []Proposal{remove(bob.OwnLeaf())}})
	for k := range bob.store.m {
		switch k[0] {
		case keyHeader, keyNode, keyExtensions, keyEntrance:
		default:
			t.Errorf("entry %q is left", k)
		}
	}
	if err := bob.AddSigner(newSigner(t, testSuite)); err != nil {
		t.Error(err)
	}
	bob.reload(t)
	if bob.Active() || bob.Epoch() != alice.Epoch() {
		t.Errorf("active %v in epoch %d", bob.Active(), bob.Epoch())
	}
	for what, err := range map[string]error{
		"encrypt": second(bob.Encrypt(nil, nil, nil)), "propose": second(bob.Propose(nil, nil, remove(0))),
		"update": second(bob.ProposeUpdate(nil, UpdateOptions{})), "commit": second(bob.Commit(nil, CommitOptions{})),
		"export": second(bob.Export("x", nil, 1)), "group info": second(bob.GroupInfo(true, true)),
		"receive": second(bob.Receive(nil, &MLSMessage{})),
	} {
		if !errors.Is(err, ErrRemoved) {
			t.Errorf("%s: got %v, want ErrRemoved", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestDamagedStateIsRefused damages every entry of a state in turn: loading may fail, or succeed if nothing can be
// known to be wrong, but it doesn't panic, and the group that it gives doesn't either.
func TestDamagedStateIsRefused(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	bob := r.add(alice, "bob", "carol")[0]
	r.talk()
	r.propose(bob.ProposeUpdate(bob.store, UpdateOptions{}))
	if _, err := alice.Commit(alice.store, CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	load := func(s *memStore, signer crypto.Signer) {
		g, err := LoadGroup(testConfig(), signer, s.all())
		if err != nil || !g.Active() {
			return
		}
		_, _ = g.Encrypt(nil, nil, []byte("x"))
		_ = g.Drop(nil)
		_, _ = g.Commit(nil, CommitOptions{})
	}
	for k, v := range alice.store.m {
		s := alice.store.clone()
		delete(s.m, k)
		load(s, alice.signer)
		for _, bad := range []string{"", "\x00", v[:len(v)/2], v + "\x00"} {
			s.m[k] = bad
			load(s, alice.signer)
		}
		for i := range min(len(v), 40) {
			b := []byte(v)
			b[i] ^= 0x41
			s.m[k] = string(b)
			load(s, alice.signer)
		}
	}
	for _, k := range []string{"h", "k", "y", "z" + string(key64(keySecret, alice.Epoch())[1:])} {
		s := alice.store.clone()
		delete(s.m, k)
		if _, err := LoadGroup(testConfig(), alice.signer, s.all()); err == nil {
			t.Errorf("state without entry %q was loaded", k)
		}
	}
	for k := range alice.store.m {
		if k[0] != keyNode {
			continue
		}
		s := alice.store.clone()
		delete(s.m, k)
		if _, err := LoadGroup(testConfig(), alice.signer, s.all()); err == nil {
			t.Errorf("state without node %q was loaded", k)
		}
	}
	if _, err := LoadPublicGroup(publicConfig(), alice.store.all()); err == nil {
		t.Error("a client's state was loaded as a server's")
	}
}
