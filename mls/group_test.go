package mls

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// memStore is a store of one group in memory, and its own batch.
type memStore struct{ m map[string]string }

func newMemStore() *memStore { return &memStore{m: make(map[string]string)} }

func (s *memStore) Set(k, v []byte) { s.m[string(k)] = string(v) }
func (s *memStore) Delete(k []byte) { delete(s.m, string(k)) }

func (s *memStore) clone() *memStore { return &memStore{m: maps.Clone(s.m)} }

func (s *memStore) all() iter.Seq2[[]byte, []byte] {
	return func(yield func(k, v []byte) bool) {
		for _, k := range slices.Sorted(maps.Keys(s.m)) {
			if !yield([]byte(k), []byte(s.m[k])) {
				return
			}
		}
	}
}

// testVerifier accepts basic credentials whose identity doesn't begin with "bad". The client is the identity up to a
// '#': what follows tells successors apart.
type testVerifier struct{}

func (testVerifier) VerifyCredential(c Credential, _ []byte, _ CipherSuite) error {
	if bytes.HasPrefix(c.Identity, []byte("bad")) {
		return errors.New("not certified")
	}
	return nil
}

func (v testVerifier) ValidSuccessor(old, next Credential) error {
	a, _ := v.Identity(old)
	b, _ := v.Identity(next)
	if !bytes.Equal(a, b) {
		return errors.New("another client")
	}
	return nil
}

func (testVerifier) Identity(c Credential) ([]byte, error) {
	if bytes.HasPrefix(c.Identity, []byte("nameless")) {
		return nil, errors.New("names no client")
	}
	id, _, _ := bytes.Cut(c.Identity, []byte("#"))
	return id, nil
}

// appendComponent is a component whose data is what its updates appended; "no" is invalid.
type appendComponent struct{}

func (appendComponent) Update(current []byte, updates [][]byte) ([]byte, error) {
	for _, u := range updates {
		if string(u) == "no" {
			return nil, errors.New("no")
		}
		current = append(current, u...)
	}
	return current, nil
}

// CheckEphemeral implements EphemeralComponent.
func (appendComponent) CheckEphemeral(data []byte) error {
	if string(data) == "no" {
		return errors.New("no")
	}
	return nil
}

var testComponents = map[ComponentID]Component{0x8001: appendComponent{}, 0x8002: appendComponent{},
	0x8003: ReplacingComponent{}, ComponentAppComponents: ReplacingComponent{}, ComponentSafeAAD: ReplacingComponent{},
	ComponentMediaTypes: ReplacingComponent{}, ComponentAppAck: AppAckComponent{}, ComponentExternalReceivers: ReplacingComponent{}}

func testConfig() Config {
	return Config{Verifier: testVerifier{}, Components: testComponents, NewMemberProposals: true, PSK: func(id PreSharedKeyID) ([]byte, error) {
		switch {
		case id.Type == PSKExternal && string(id.ID) == "shared":
			return []byte("a key that all know"), nil
		case id.Type == PSKApplication && id.Component == 0x8001 && string(id.ID) == "shared":
			return []byte("a component's key"), nil
		}
		return nil, errors.New("unknown")
	}}
}

// client is a member of a test's group with its store.
type client struct {
	name   string
	signer crypto.Signer
	store  *memStore
	*Group
}

func newSigner(t testing.TB, cs CipherSuite) crypto.Signer {
	t.Helper()
	s, err := cs.GenerateSignatureKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func create(t testing.TB, cs CipherSuite, name string, ext Extensions) *client {
	t.Helper()
	c := &client{name: name, signer: newSigner(t, cs), store: newMemStore()}
	g, err := NewGroup(testConfig(), c.store, GroupOptions{
		GroupID: []byte("group"), Suite: cs, Credential: BasicCredential([]byte(name)), Signer: c.signer, Extensions: ext,
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Group = g
	return c
}

func keyPackage(t testing.TB, cs CipherSuite, name string) (*client, *KeyPackage, *KeyPackageSecrets) {
	t.Helper()
	return describedKeyPackage(t, cs, name, nil)
}

func describedKeyPackage(t testing.TB, cs CipherSuite, name string, leaf Extensions) (*client, *KeyPackage, *KeyPackageSecrets) {
	t.Helper()
	c := &client{name: name, signer: newSigner(t, cs), store: newMemStore()}
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{Suite: cs, Credential: BasicCredential([]byte(name)), Signer: c.signer, LeafExtensions: leaf})
	if err != nil {
		t.Fatal(err)
	}
	return c, kp, secrets
}

func add(kp *KeyPackage) Proposal { return Proposal{Type: ProposalAdd, Add: &Add{KeyPackage: *kp}} }

func remove(i LeafIndex) Proposal {
	return Proposal{Type: ProposalRemove, Remove: &Remove{Removed: i}}
}

func appData(id ComponentID, update string) Proposal {
	return Proposal{Type: ProposalAppDataUpdate, AppDataUpdate: &AppDataUpdate{Component: id, Op: AppDataOpUpdate, Update: []byte(update)}}
}

func sharedPSK() Proposal {
	return Proposal{Type: ProposalPSK, PSK: &PreSharedKey{PSK: PreSharedKeyID{Type: PSKExternal, ID: []byte("shared")}}}
}

func componentPSK() Proposal {
	return psk(PreSharedKeyID{Type: PSKApplication, Component: 0x8001, ID: []byte("shared")})
}

func ephemeral(id ComponentID, data []byte) Proposal {
	return Proposal{Type: ProposalAppEphemeral, AppEphemeral: &AppEphemeral{Component: id, Data: data}}
}

// wire sends a message through its encoding.
func wire(t testing.TB, m *MLSMessage) *MLSMessage {
	t.Helper()
	var out MLSMessage
	if err := codec.Unmarshal(codec.Marshal(m), &out); err != nil {
		t.Fatal(err)
	}
	return &out
}

// room is a group with the server that orders it; nil if its members send their handshakes as PrivateMessages.
type room struct {
	t       testing.TB
	cs      CipherSuite
	members []*client
	server  *PublicGroup
	store   *memStore // the server's
	leaf    Extensions
	// receive opens SemiPrivateMessages for the server.
	receive func(*SemiPrivateMessage) (*SemiPrivateContent, error)
}

// checkProposal has the server check a proposal in whatever format it can read.
func (r *room) checkProposal(m *MLSMessage) (*StagedProposal, error) {
	if m.SemiPrivate == nil {
		return r.server.CheckProposal(m.Public)
	}
	c, err := r.receive(m.SemiPrivate)
	if err != nil {
		return nil, err
	}
	return r.server.CheckSemiPrivateProposal(c)
}

// checkCommit has the server check a commit in whatever format it can read.
func (r *room) checkCommit(m *MLSMessage) (*StagedPublic, error) {
	if m.SemiPrivate == nil {
		return r.server.CheckCommit(m.Public)
	}
	c, err := r.receive(m.SemiPrivate)
	if err != nil {
		return nil, err
	}
	return r.server.CheckSemiPrivateCommit(c)
}

func publicConfig() PublicConfig {
	return PublicConfig{Verifier: testVerifier{}, Components: testComponents, NewMemberProposals: true}
}

func newRoom(t testing.TB, cs CipherSuite, ext Extensions) *room {
	t.Helper()
	alice := create(t, cs, "member 0", ext)
	gi, err := alice.GroupInfo(true, true)
	if err != nil {
		t.Fatal(err)
	}
	r := &room{t: t, cs: cs, members: []*client{alice}, store: newMemStore()}
	if r.server, err = NewPublicGroup(publicConfig(), r.store, wire(t, NewMLSMessage(gi)).GroupInfo, nil); err != nil {
		t.Fatal(err)
	}
	return r
}

// whispers makes the founder's handshakes, and so those of whom members add, PrivateMessages.
func (r *room) whispers() *room {
	r.members[0].cfg.HandshakeFormat, r.server = WireFormatPrivateMessage, nil
	return r
}

// propose hands a proposal to the server and to all members.
func (r *room) propose(m *MLSMessage, err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
	m = wire(r.t, m)
	if r.server != nil {
		s, err := r.checkProposal(m)
		if err != nil {
			r.t.Fatal(err)
		}
		if err := r.server.ApplyProposal(r.store, s); err != nil {
			r.t.Fatal(err)
		}
	}
	own := 0
	for _, c := range r.members {
		_, err := c.Receive(c.store, wire(r.t, m))
		if m.Public == nil && errors.Is(err, ErrOwnMessage) && own == 0 {
			own++
		} else if err != nil {
			r.t.Fatalf("%s: %v", c.name, err)
		}
	}
}

// accept has the server order a commit.
func (r *room) accept(m *MLSMessage, gi *GroupInfo, tree *RatchetTree) {
	r.t.Helper()
	if r.server == nil {
		return
	}
	s, err := r.checkCommit(wire(r.t, m))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := s.CheckGroupInfo(gi); err != nil {
		r.t.Fatal(err)
	}
	if err := s.CheckTree(tree); err != nil {
		r.t.Fatal(err)
	}
	if err := r.server.Apply(r.store, s, gi); err != nil {
		r.t.Fatal(err)
	}
}

// distribute hands a commit to all members but those in except; who is removed leaves the list.
func (r *room) distribute(m *MLSMessage, except *client) {
	r.t.Helper()
	var stay []*client
	for _, c := range r.members {
		if c != except {
			got, err := c.Receive(c.store, wire(r.t, m))
			if err != nil {
				r.t.Fatalf("%s: %v", c.name, err)
			}
			if err := c.Apply(c.store, got.(*StagedCommit)); err != nil {
				r.t.Fatalf("%s: %v", c.name, err)
			}
		}
		if c.Active() {
			stay = append(stay, c)
		}
	}
	r.members = stay
}

// commit makes, orders and applies a commit.
func (r *room) commit(by *client, o CommitOptions) *PendingCommit {
	r.t.Helper()
	c, err := by.Commit(by.store, o)
	if err != nil {
		r.t.Fatalf("%s: %v", by.name, err)
	}
	r.accept(c.Message(), c.GroupInfo(), c.Tree())
	if err := by.Confirm(by.store); err != nil {
		r.t.Fatal(err)
	}
	r.distribute(c.Message(), by)
	return c
}

// add adds new clients in one commit and lets them join.
func (r *room) add(by *client, names ...string) []*client {
	r.t.Helper()
	var joiners []*client
	var kps []*KeyPackage
	var secrets []*KeyPackageSecrets
	o := CommitOptions{TreeInWelcome: true}
	for _, n := range names {
		c, kp, s := describedKeyPackage(r.t, r.cs, n, r.leaf)
		joiners, kps, secrets = append(joiners, c), append(kps, kp), append(secrets, s)
		o.Proposals = append(o.Proposals, add(kp))
	}
	c := r.commit(by, o)
	w := wire(r.t, NewMLSMessage(c.Welcome())).Welcome
	cfg := testConfig()
	cfg.HandshakeFormat = by.cfg.HandshakeFormat
	for i, j := range joiners {
		g, err := JoinGroup(cfg, j.store, j.signer, w, kps[i], secrets[i], nil)
		if err != nil {
			r.t.Fatalf("%s: %v", j.name, err)
		}
		j.Group = g
		r.members = append(r.members, j)
	}
	return joiners
}

// join lets a client join by external commit.
func (r *room) join(name string, props ...Proposal) *client {
	r.t.Helper()
	c := &client{name: name, signer: newSigner(r.t, r.cs), store: newMemStore()}
	gi, err := r.members[0].GroupInfo(false, true)
	if r.server != nil {
		gi = r.server.GroupInfo()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := testConfig()
	cfg.HandshakeFormat = r.members[0].cfg.HandshakeFormat
	p, err := ExternalJoin(cfg, ExternalJoinOptions{
		GroupInfo: gi, Tree: fresh(r.t, r.members[0].Tree()), Credential: BasicCredential([]byte(name)), Signer: c.signer, Proposals: props,
		SelfRemoves: r.members[0].SelfRemoves(), LeafExtensions: r.leaf,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	if p, err = LoadPendingJoin(cfg, c.signer, codec.Marshal(p)); err != nil {
		r.t.Fatal(err)
	}
	r.accept(p.Message(), p.GroupInfo(), p.Tree())
	if c.Group, err = p.Confirm(c.store); err != nil {
		r.t.Fatal(err)
	}
	r.distribute(p.Message(), nil)
	r.members = append(r.members, c)
	return c
}

// check compares all members and the server.
func (r *room) check() {
	r.t.Helper()
	first := r.members[0]
	want := codec.Marshal(first.Context())
	export, err := first.Export("test", []byte("context"), 32)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.server != nil && (!bytes.Equal(codec.Marshal(r.server.Context()), want) || !bytes.Equal(r.server.ConfirmationTag(), first.ConfirmationTag())) {
		r.t.Fatalf("server at epoch %d disagrees with %s at %d", r.server.Epoch(), first.name, first.Epoch())
	}
	for _, c := range r.members {
		e, err := c.Export("test", []byte("context"), 32)
		if err != nil {
			r.t.Fatal(err)
		}
		if !bytes.Equal(codec.Marshal(c.Context()), want) || !bytes.Equal(c.EpochAuthenticator(), first.EpochAuthenticator()) || !bytes.Equal(e, export) {
			r.t.Fatalf("%s at epoch %d disagrees with %s at %d", c.name, c.Epoch(), first.name, first.Epoch())
		}
		if !bytes.Equal(c.Tree().Hash(r.cs), c.Context().TreeHash) {
			r.t.Fatalf("%s: tree hash differs from the context's", c.name)
		}
	}
	if err := first.Tree().validate(r.cs, first.GroupID(), nil); err != nil {
		r.t.Fatal(err)
	}
}

// talk has everyone send a message that all others read.
func (r *room) talk() {
	r.t.Helper()
	for _, from := range r.members {
		if len(from.Pending()) > 0 {
			// RFC 9420, Section 12.4: what was proposed is committed first.
			if _, err := from.Encrypt(from.store, nil, []byte("too early")); !errors.Is(err, ErrPending) {
				r.t.Fatalf("%s with pending proposals: got %v, want ErrPending", from.name, err)
			}
			continue
		}
		text := fmt.Sprintf("from %s in %d", from.name, from.Epoch())
		m, err := from.Encrypt(from.store, []byte("aad"), []byte(text))
		if err != nil {
			r.t.Fatal(err)
		}
		for _, to := range r.members {
			if to == from {
				continue
			}
			got, err := to.Receive(to.store, wire(r.t, m))
			if err != nil {
				r.t.Fatalf("%s to %s: %v", from.name, to.name, err)
			}
			a := got.(*ApplicationMessage)
			if string(a.Data) != text || string(a.AAD) != "aad" || a.Sender != from.OwnLeaf() || a.Epoch != from.Epoch() {
				r.t.Fatalf("%s to %s: got %q from %d in %d", from.name, to.name, a.Data, a.Sender, a.Epoch)
			}
		}
	}
}

// reload replaces a member by what its store has.
func (c *client) reload(t testing.TB) {
	t.Helper()
	cfg := testConfig()
	if c.Group != nil {
		cfg.HandshakeFormat = c.cfg.HandshakeFormat
	}
	g, err := LoadGroup(cfg, c.signer, c.store.all())
	if err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
	c.Group = g
}

func TestMembersAgreeThroughTheLifeOfAGroup(t *testing.T) {
	for _, cs := range CipherSuites() {
		t.Run(cs.String(), func(t *testing.T) {
			r := newRoom(t, cs, nil)
			alice := r.members[0]
			r.check()
			if testing.Short() && cs == P521_AES256GCM_SHA512_P521 { // slow without assembly
				r.add(alice, "member 1")
				r.commit(alice, CommitOptions{ForcePath: true})
				r.join("late")
				r.check()
				r.talk()
				return
			}
			joined := r.add(alice, "member 1", "member 2", "member 3", "member 4")
			r.check()
			r.talk()
			r.propose(joined[0].ProposeUpdate(joined[0].store, UpdateOptions{}))
			r.propose(joined[1].Propose(joined[1].store, nil, remove(joined[2].OwnLeaf())))
			r.propose(joined[3].Propose(joined[3].store, nil, appData(0x8001, "hello")))
			r.propose(joined[3].Propose(joined[3].store, nil, sharedPSK()))
			r.commit(alice, CommitOptions{})
			if joined[2].Active() {
				t.Error("member 3 is still active")
			}
			if _, err := joined[2].Encrypt(joined[2].store, nil, []byte("x")); !errors.Is(err, ErrRemoved) {
				t.Errorf("removed member encrypts: %v", err)
			}
			r.check()
			r.talk()
			late := r.join("late")
			r.check()
			r.talk()
			if data, _ := late.Dictionary().Get(0x8001); string(data) != "hello" {
				t.Errorf("component data %q", data)
			}
			r.commit(late, CommitOptions{ForcePath: true})
			r.commit(alice, CommitOptions{Proposals: []Proposal{appData(0x8001, " world")}})
			r.checkStores()
			r.join("member 4", remove(joined[3].OwnLeaf()))
			if joined[3].Active() {
				t.Error("the replaced client is still active")
			}
			r.check()
			r.talk()
			for _, c := range r.members {
				c.reload(t)
			}
			r.talk()
			r.commit(r.members[1], CommitOptions{})
			r.check()
			r.checkStores()
		})
	}
}
