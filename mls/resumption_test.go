package mls

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// newKey is what a member brings to a group that follows from another one.
type newKey struct {
	signer  crypto.Signer
	kp      *KeyPackage
	secrets *KeyPackageSecrets
}

func newKeys(t testing.TB, cs CipherSuite, members ...*client) ([]newKey, []*KeyPackage) {
	t.Helper()
	var keys []newKey
	var kps []*KeyPackage
	for _, c := range members {
		n, kp, secrets := keyPackage(t, cs, c.name)
		keys, kps = append(keys, newKey{n.signer, kp, secrets}), append(kps, kp)
	}
	return keys, kps
}

// follow has a member make a group that follows from the room's, and others join it.
func (r *room) follow(cs CipherSuite, by *client, others []*client, path bool, create func(*client, *memStore, LinkOptions) (*Group, *Welcome, error),
	join func(*client, *memStore, newKey, *Welcome) (*Group, error)) *room {
	r.t.Helper()
	keys, kps := newKeys(r.t, cs, others...)
	next := &room{t: r.t, cs: cs, store: newMemStore()}
	maker := &client{name: by.name, signer: newSigner(r.t, cs), store: newMemStore()}
	g, w, err := create(by, maker.store, LinkOptions{KeyPackages: kps, Credential: BasicCredential([]byte(by.name)), Signer: maker.signer,
		ForcePath: path, TreeInWelcome: true})
	if err != nil {
		r.t.Fatal(err)
	}
	maker.Group = g
	next.members = []*client{maker}
	if len(others) > 0 {
		w = wire(r.t, NewMLSMessage(w)).Welcome
	}
	for i, c := range others {
		n := &client{name: c.name, signer: keys[i].signer, store: newMemStore()}
		if n.Group, err = join(c, n.store, keys[i], w); err != nil {
			r.t.Fatalf("%s: %v", c.name, err)
		}
		next.members = append(next.members, n)
	}
	gi, err := g.GroupInfo(true, true)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.server != nil {
		if next.server, err = NewPublicGroup(publicConfig(), next.store, gi, nil); err != nil {
			r.t.Fatal(err)
		}
	}
	next.check()
	next.checkStores()
	next.talk()
	next.commit(next.members[len(next.members)-1], CommitOptions{})
	next.check()
	next.checkStores()
	return next
}

func (r *room) succeed(by *client, path bool) *room {
	r.t.Helper()
	var others []*client
	for _, c := range r.members {
		if c != by {
			others = append(others, c)
		}
	}
	return r.follow(by.ReInit().CipherSuite, by, others, path, func(c *client, s *memStore, o LinkOptions) (*Group, *Welcome, error) {
		return c.NewSuccessor(s, o)
	}, func(c *client, s *memStore, k newKey, w *Welcome) (*Group, error) {
		return c.JoinSuccessor(s, k.signer, w, k.kp, k.secrets, nil)
	})
}

func (r *room) branch(by *client, others ...*client) *room {
	r.t.Helper()
	return r.follow(r.cs, by, others, false, func(c *client, s *memStore, o LinkOptions) (*Group, *Welcome, error) {
		return c.NewBranch(s, append([]byte("branch of "), c.GroupID()...), nil, o)
	}, func(c *client, s *memStore, k newKey, w *Welcome) (*Group, error) {
		return c.JoinBranch(s, k.signer, w, k.kp, k.secrets, nil)
	})
}

func (r *room) reload() {
	r.t.Helper()
	for _, c := range r.members {
		c.reload(r.t)
	}
	if r.server != nil {
		var err error
		if r.server, err = LoadPublicGroup(publicConfig(), r.store.all()); err != nil {
			r.t.Fatal(err)
		}
	}
}

// TestSuccessorsOfEverySuite reinitialises from and to every suite, with restarts at each step.
func TestSuccessorsOfEverySuite(t *testing.T) {
	suites := CipherSuites()
	for i, cs := range suites {
		t.Run(cs.String(), func(t *testing.T) {
			t.Parallel()
			r := newRoom(t, cs, nil)
			r.add(r.members[0], "bob", "carol")
			next := suites[(i+1)%len(suites)]
			ext := Extensions{{Type: ExtensionAppDataDictionary, Data: codec.Marshal(AppDataDictionary{}.Set(0x8001, []byte("x")))}}
			r.commit(r.members[1], CommitOptions{Proposals: []Proposal{reinit(func(r *ReInit) { r.CipherSuite, r.Extensions = next, ext })}})
			r.reload()
			r.check()
			r.checkStores()
			if r.server.ReInit() == nil {
				t.Error("the server doesn't know that the group has ended")
			}
			s := r.succeed(r.members[2], i%2 == 0)
			if g := s.members[0]; g.Suite() != next || string(g.GroupID()) != "next" || !g.Context().Extensions.Equal(ext) {
				t.Errorf("successor %q of %v", g.GroupID(), g.Suite())
			}
		})
	}
}

func TestEndedGroupsAreOnlySucceeded(t *testing.T) {
	f := newForgery(t)
	r := f.room
	late, err := f.alice.Encrypt(f.alice.store, nil, []byte("late"))
	f.must(err)
	r.propose(ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, reinit(nil)))
	forged := f.encrypt(f.carol, f.sign(f.carol, FramedContent{Sender: Sender{Type: SenderMember, Leaf: f.carol.OwnLeaf()},
		ContentType: ContentApplication, ApplicationData: []byte("x")}))
	c := r.commit(f.alice, CommitOptions{})
	if c.Message().Public.Content.Commit.Path != nil {
		t.Error("a reinit gets a path that it doesn't need")
	}
	for i := range 2 {
		for _, c := range r.members {
			for what, err := range map[string]error{
				"encrypt": second(c.Encrypt(c.store, nil, nil)), "propose": second(c.Propose(c.store, nil, remove(0))),
				"update": second(c.ProposeUpdate(c.store, UpdateOptions{})), "commit": second(c.Commit(c.store, CommitOptions{})),
				"self_remove": second(c.ProposeSelfRemove(c.store)), "group info": second(c.GroupInfo(true, true)),
				"branch": third(c.NewBranch(c.store, []byte("branch"), nil, LinkOptions{})),
			} {
				if !errors.Is(err, ErrEnded) {
					t.Errorf("%s: got %v, want ErrEnded", what, err)
				}
			}
			if i == 0 {
				c.reload(t)
			}
		}
		r.checkStores()
	}
	// What was sent before is still read; what somebody sends afterwards isn't.
	got, err := f.bob.Receive(f.bob.store, late)
	f.must(err)
	if a := got.(*ApplicationMessage); string(a.Data) != "late" {
		t.Errorf("late message %q", a.Data)
	}
	f.must(second(f.bob.Receive(f.bob.store, forged)))
	after := f.encrypt(f.carol, f.sign(f.carol, FramedContent{Sender: Sender{Type: SenderMember, Leaf: f.carol.OwnLeaf()},
		ContentType: ContentApplication, ApplicationData: []byte("x")}))
	if _, err := f.bob.Receive(f.bob.store, after); !errors.Is(err, ErrEnded) {
		t.Errorf("message of the last epoch: got %v, want ErrEnded", err)
	}
	if got, err := f.bob.Receive(f.bob.store, c.Message()); err != nil {
		t.Error(err)
	} else if _, ok := got.(*Duplicate); !ok {
		t.Errorf("applied commit received as %T", got)
	}
	if _, err := f.alice.Export("x", nil, 16); err != nil {
		t.Error(err)
	}
}

func third[T, U any](_ T, _ U, err error) error { return err }

func TestDroppedReInitLeavesTheGroupGoingOn(t *testing.T) {
	f := newForgery(t)
	before := dump(f.alice.Group)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{reinit(nil)}})
	f.must(err)
	f.alice.reload(t)
	if f.alice.ReInit() != nil {
		t.Error("a staged reinit ends the group")
	}
	if _, _, err := f.alice.NewSuccessor(nil, LinkOptions{}); err == nil {
		t.Error("a staged reinit has a successor")
	}
	s, err := f.bob.Receive(f.bob.store, c.Message())
	f.must(err)
	f.must(f.alice.Drop(f.alice.store))
	sameState(t, "alice", dump(f.alice.Group), before)
	f.room.commit(f.carol, CommitOptions{})
	if err := f.bob.Apply(f.bob.store, s.(*StagedCommit)); !errors.Is(err, ErrEpoch) {
		t.Errorf("reinit of a past epoch: got %v, want ErrEpoch", err)
	}
	f.talk()
	f.checkStores()
}

// TestReInitWaitsForOtherProposals: a committer prefers others, and takes one of several.
func TestReInitWaitsForOtherProposals(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.propose(f.bob.Propose(f.bob.store, nil, reinit(nil)))
	r.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+")))
	c := r.commit(f.alice, CommitOptions{})
	if list := c.Info().Proposals; len(list) != 1 || list[0].Proposal.AppDataUpdate == nil || f.alice.ReInit() != nil {
		t.Errorf("committed %d proposals", len(list))
	}
	r.propose(f.bob.Propose(f.bob.store, nil, reinit(nil)))
	r.propose(f.carol.Propose(f.carol.store, nil, reinit(func(r *ReInit) { r.GroupID = []byte("other") })))
	c = r.commit(f.alice, CommitOptions{})
	if len(c.Info().Proposals) != 1 || string(f.dave.ReInit().GroupID) != "next" {
		t.Errorf("committed %d proposals", len(c.Info().Proposals))
	}
}

func TestReInitCommittedByValueIsAlone(t *testing.T) {
	f := newForgery(t)
	f.room.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+")))
	c := f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
	if len(c.Info().Proposals) != 1 || f.alice.ReInit() == nil {
		t.Errorf("committed %d proposals", len(c.Info().Proposals))
	}
	if _, err := f.alice.Commit(nil, CommitOptions{}); !errors.Is(err, ErrEnded) {
		t.Errorf("got %v, want ErrEnded", err)
	}
}

func TestReInitOfPrivateHandshakes(t *testing.T) {
	r := newRoom(t, testSuite, nil).whispers()
	r.add(r.members[0], "bob")
	r.propose(r.members[0].Propose(r.members[0].store, nil, reinit(nil)))
	r.commit(r.members[1], CommitOptions{})
	r.reload()
	r.checkStores()
	s := r.succeed(r.members[1], false)
	if s.members[0].cfg.HandshakeFormat != WireFormatPrivateMessage {
		t.Error("the successor's handshakes are public")
	}
}

func TestSuccessorsMayKeepTheIdentifier(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	r.add(r.members[0], "bob")
	same := reinit(func(re *ReInit) { re.GroupID = r.members[0].GroupID() })
	r.propose(r.members[1].Propose(r.members[1].store, nil, same))
	r.commit(r.members[0], CommitOptions{})
	s := r.succeed(r.members[1], false)
	s.propose(s.members[1].Propose(s.members[1].store, nil, same))
	s.commit(s.members[0], CommitOptions{})
	s.succeed(s.members[1], true)
}

func TestGroupsOfOneAreSucceeded(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	r.commit(r.members[0], CommitOptions{Proposals: []Proposal{reinit(nil)}})
	s := r.succeed(r.members[0], false)
	s.add(s.members[0], "bob")
	s.check()
}

func TestBranches(t *testing.T) {
	for _, cs := range CipherSuites() {
		t.Run(cs.String(), func(t *testing.T) {
			if testing.Short() && cs == P521_AES256GCM_SHA512_P521 {
				t.Skip("slow without assembly; its groups have successors")
			}
			t.Parallel()
			r := newRoom(t, cs, nil)
			r.add(r.members[0], "bob", "carol", "dave")
			r.reload()
			b := r.branch(r.members[1], r.members[3], r.members[0])
			if len(b.members) != 3 || bytes.Equal(b.members[0].EpochAuthenticator(), r.members[0].EpochAuthenticator()) {
				t.Errorf("branch of %d members", len(b.members))
			}
			// The group goes on, and branches can be branched.
			r.commit(r.members[2], CommitOptions{})
			r.check()
			r.checkStores()
			b.branch(b.members[2])
		})
	}
}

// TestBranchesOfPastEpochs: who joins may have moved on since the branch was made, and is held to the members of then.
func TestBranchesOfPastEpochs(t *testing.T) {
	f := newForgery(t)
	keys, kps := newKeys(t, testSuite, f.bob, f.carol)
	_, w, err := f.alice.NewBranch(nil, []byte("branch"), nil, LinkOptions{KeyPackages: kps,
		Credential: BasicCredential([]byte(f.alice.name)), Signer: f.alice.signer, TreeInWelcome: true})
	f.must(err)
	join := func(c *client, k newKey) error {
		return second(c.JoinBranch(nil, k.signer, w, k.kp, k.secrets, nil))
	}
	f.room.commit(f.dave, CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf())}})
	f.room.reload()
	f.must(join(f.bob, keys[0]))
	if err := join(f.carol, keys[1]); !errors.Is(err, ErrRemoved) {
		t.Errorf("removed member: got %v, want ErrRemoved", err)
	}
	for range defaultPastEpochs {
		f.room.commit(f.dave, CommitOptions{})
	}
	if err := join(f.bob, keys[0]); !errors.Is(err, ErrEpoch) {
		t.Errorf("epoch that is forgotten: got %v, want ErrEpoch", err)
	}
}

// linkForgery makes a Welcome to a group that follows from alice's, with something wrong, for bob.
type linkForgery struct {
	section string
	rule    string
	branch  bool
	usage   ResumptionUsage // of the key; 0: as it should be
	id      string
	suite   CipherSuite
	ext     Extensions
	members []string // beside alice; nil: as it should be
	keys    func(ids []PreSharedKeyID) []PreSharedKeyID
	late    bool // the welcome to epoch 2
}

var linkForgeries = []linkForgery{
	{section: "11.2", rule: "identifier", id: "other"},
	{section: "11.2", rule: "suite", suite: X25519_CHACHA20POLY1305_SHA256_Ed25519},
	{section: "11.2", rule: "extensions", ext: Extensions{{Type: ExtensionAppDataDictionary, Data: []byte{0}}}},
	{section: "11.2", rule: "epoch", late: true},
	{section: "11.2", rule: "member missing", members: []string{"bob", "carol"}},
	{section: "11.2", rule: "member replaced", members: []string{"bob", "carol", "eve"}},
	{section: "11.2", rule: "no resumption key", keys: func([]PreSharedKeyID) []PreSharedKeyID { return nil }},
	{section: "11.2", rule: "resumption key for the application", usage: UsageApplication},
	{section: "11.2", rule: "resumption key for branching", usage: UsageBranch},
	{section: "11.2", rule: "resumption key of an epoch before", keys: func(ids []PreSharedKeyID) []PreSharedKeyID { ids[0].Epoch--; return ids }},
	{section: "11.2", rule: "resumption key of another group", keys: func(ids []PreSharedKeyID) []PreSharedKeyID { ids[0].GroupID = []byte("x"); return ids }},
	{section: "12.4.3.1", rule: "two resumption keys", keys: func(ids []PreSharedKeyID) []PreSharedKeyID { return append(ids, ids...) }},
	{section: "11.3", rule: "suite", branch: true, suite: X25519_CHACHA20POLY1305_SHA256_Ed25519},
	{section: "11.3", rule: "epoch", branch: true, late: true},
	{section: "11.3", rule: "member of outside", branch: true, members: []string{"bob", "eve"}},
	{section: "12.4.3.1", rule: "identifier", branch: true, id: "group"},
	{section: "11.3", rule: "no resumption key", branch: true, keys: func([]PreSharedKeyID) []PreSharedKeyID { return nil }},
	{section: "11.3", rule: "resumption key for the application", branch: true, usage: UsageApplication},
	{section: "11.3", rule: "resumption key for reinitialisation", branch: true, usage: UsageReInit},
	{section: "11.3", rule: "resumption key of another group", branch: true, keys: func(ids []PreSharedKeyID) []PreSharedKeyID { ids[0].GroupID = []byte("x"); return ids }},
	{section: "", rule: "resumption key of an epoch to come", branch: true, keys: func(ids []PreSharedKeyID) []PreSharedKeyID { ids[0].Epoch += 7; return ids }},
	{section: "12.4.3.1", rule: "two resumption keys", branch: true, keys: func(ids []PreSharedKeyID) []PreSharedKeyID { return append(ids, ids...) }},
}

// welcome makes the Welcome and what bob needs to join by it.
func (v *linkForgery) welcome(f *forgery) (*Welcome, newKey) {
	f.TB.Helper()
	id, cs, usage, members := "next", testSuite, UsageReInit, []string{"bob", "carol", "dave"}
	if v.branch {
		id, usage, members = "branch", UsageBranch, []string{"bob"}
	}
	if v.id != "" {
		id = v.id
	}
	if v.suite != 0 {
		cs = v.suite
	}
	if v.usage != 0 {
		usage = v.usage
	}
	if v.members != nil {
		members = v.members
	}
	cfg := testConfig()
	cfg.PSK = func(id PreSharedKeyID) ([]byte, error) { return f.alice.secrets.resumption, nil }
	signer := newSigner(f.TB, cs)
	g, err := NewGroup(cfg, nil, GroupOptions{GroupID: []byte(id), Suite: cs, Extensions: v.ext,
		Credential: BasicCredential([]byte(f.alice.name)), Signer: signer})
	f.must(err)
	if v.late {
		f.must(second(g.Commit(nil, CommitOptions{})))
		f.must(g.Confirm(nil))
	}
	g.link = &link{parent: f.alice.Group, usage: usage}
	ids := []PreSharedKeyID{{Type: PSKResumption, Usage: usage, GroupID: bytes.Clone(f.alice.GroupID()), Epoch: f.alice.Epoch()}}
	if v.keys != nil {
		ids = v.keys(ids)
	}
	var props []Proposal
	for _, id := range ids {
		props = append(props, psk(id))
	}
	var bob newKey
	for i, name := range members {
		c, kp, secrets := keyPackage(f.TB, cs, name)
		props = append(props, add(kp))
		if i == 0 {
			bob = newKey{c.signer, kp, secrets}
		}
	}
	c, err := g.Commit(nil, CommitOptions{Proposals: props, TreeInWelcome: true})
	f.must(err)
	return c.Welcome(), bob
}

func TestGroupsThatDoNotFollowAreRefused(t *testing.T) {
	for _, v := range append(linkForgeries, linkForgery{rule: "nothing"}, linkForgery{rule: "nothing", branch: true}) {
		t.Run(fmt.Sprint(v.section, " ", v.rule, " branch ", v.branch), func(t *testing.T) {
			f := newForgery(t)
			if !v.branch {
				f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
			}
			w, k := v.welcome(f)
			join := f.bob.JoinSuccessor
			if v.branch {
				join = f.bob.JoinBranch
			}
			before, s := dump(f.bob.Group), newMemStore()
			f.bob.cfg.PSK = func(id PreSharedKeyID) ([]byte, error) { return f.alice.secrets.resumption, nil }
			_, err := join(s, k.signer, w, k.kp, k.secrets, nil)
			var ve *ValidationError
			switch {
			case v.rule == "nothing":
				f.must(err)
				return
			case v.section == "" && !errors.Is(err, ErrEpoch):
				t.Errorf("got %v, want ErrEpoch", err)
			case v.section != "" && (!errors.As(err, &ve) || ve.Section != v.section):
				t.Errorf("got %v, want a violation of %s", err, v.section)
			}
			if len(s.m) > 0 {
				t.Error("state was written")
			}
			sameState(t, "bob", dump(f.bob.Group), before)
		})
	}
}

// TestWelcomesToFollowingGroupsNeedTheOldOne: a join without it refuses them.
func TestWelcomesToFollowingGroupsNeedTheOldOne(t *testing.T) {
	f := newForgery(t)
	for _, v := range []linkForgery{{}, {branch: true}} {
		if !v.branch {
			f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
		}
		w, k := v.welcome(f)
		if _, err := JoinGroup(f.bob.cfg, nil, k.signer, w, k.kp, k.secrets, nil); !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v, want ErrUnsupported", err)
		}
	}
}

func TestGroupsThatWouldNotFollowAreNotMade(t *testing.T) {
	f := newForgery(t)
	options := func(names ...string) LinkOptions {
		o := LinkOptions{Credential: BasicCredential([]byte(f.alice.name)), Signer: f.alice.signer}
		for _, n := range names {
			_, kp, _ := keyPackage(t, testSuite, n)
			o.KeyPackages = append(o.KeyPackages, kp)
		}
		return o
	}
	refused := func(what, section string, g *Group, w *Welcome, err error) {
		t.Helper()
		var ve *ValidationError
		if !errors.As(err, &ve) || ve.Section != section || g != nil || w != nil {
			t.Errorf("%s: got %v, want a violation of %s", what, err, section)
		}
	}
	s := newMemStore()
	successor := func(what, section string, o LinkOptions) {
		t.Helper()
		g, w, err := f.alice.NewSuccessor(s, o)
		refused(what, section, g, w, err)
	}
	branch := func(what, section, id string, o LinkOptions) {
		t.Helper()
		g, w, err := f.alice.NewBranch(s, []byte(id), nil, o)
		refused(what, section, g, w, err)
	}
	other := options("bob")
	_, other.KeyPackages[0], _ = keyPackage(t, X25519_CHACHA20POLY1305_SHA256_Ed25519, "bob")
	me := options("bob")
	me.Credential = BasicCredential([]byte("eve"))
	successor("no reinit", "11.2", options("bob", "carol", "dave"))
	branch("outsider", "11.3", "branch", options("bob", "eve"))
	branch("self as an outsider", "11.3", "branch", me)
	branch("own identifier", "12.4.3.1", "group", options("bob"))
	branch("key package's suite", "10.1", "branch", other)
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
	successor("member missing", "11.2", options("bob", "carol"))
	successor("member too many", "11.2", options("bob", "carol", "dave", "eve"))
	successor("member replaced", "11.2", options("bob", "carol", "eve"))
	successor("member twice", "12.2", options("bob", "carol", "carol"))
	if len(s.m) > 0 {
		t.Error("state was written")
	}
	f.alice.state.reinit = &ReInit{GroupID: []byte("next"), Version: 2, CipherSuite: testSuite}
	if _, _, err := f.alice.NewSuccessor(s, options("bob", "carol", "dave")); !errors.Is(err, ErrUnsupported) {
		t.Errorf("version to come: got %v, want ErrUnsupported", err)
	}
}

// TestMembersWithoutNamesAreTheirCredentials: an authentication service that names no clients.
func TestMembersWithoutNamesAreTheirCredentials(t *testing.T) {
	f := newForgery(t)
	f.alice.cfg.Verifier, f.bob.cfg.Verifier = unnamed{}, unnamed{}
	_, kp, _ := keyPackage(t, testSuite, "bob#2")
	o := LinkOptions{KeyPackages: []*KeyPackage{kp}, Credential: BasicCredential([]byte(f.alice.name)), Signer: f.alice.signer}
	var ve *ValidationError
	if _, _, err := f.alice.NewBranch(nil, []byte("branch"), nil, o); !errors.As(err, &ve) || ve.Section != "11.3" {
		t.Errorf("got %v, want a violation of 11.3", err)
	}
	_, o.KeyPackages[0], _ = keyPackage(t, testSuite, "bob")
	if _, _, err := f.alice.NewBranch(nil, []byte("branch"), nil, o); err != nil {
		t.Error(err)
	}
}

type unnamed struct{ testVerifier }

func (unnamed) Identity(Credential) ([]byte, error) { return nil, nil }

// TestResumptionKeysOfOtherGroups goes into a commit and a Welcome.
func TestResumptionKeysOfOtherGroups(t *testing.T) {
	f := newForgery(t)
	b := f.room.branch(f.alice, f.bob) // a second group of both
	b.members[0].cfg.Group = func(id []byte) *Group { return f.alice.Group }
	b.members[1].cfg.Group = func(id []byte) *Group { return f.bob.Group }
	key := func(epoch uint64) Proposal {
		return psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageApplication, GroupID: f.alice.GroupID(), Epoch: epoch})
	}
	b.commit(b.members[0], CommitOptions{Proposals: []Proposal{key(f.alice.Epoch())}})
	f.room.commit(f.carol, CommitOptions{})
	b.commit(b.members[1], CommitOptions{Proposals: []Proposal{key(f.alice.Epoch() - 1), key(f.alice.Epoch())}})
	b.check()

	joiner, kp, secrets := keyPackage(t, testSuite, "dave")
	c := b.commit(b.members[0], CommitOptions{Proposals: []Proposal{key(f.alice.Epoch()), add(kp)}, TreeInWelcome: true})
	if _, err := JoinGroup(testConfig(), nil, joiner.signer, c.Welcome(), kp, secrets, nil); err == nil {
		t.Error("joined without the key")
	}
	cfg := testConfig()
	cfg.Group = func(id []byte) *Group {
		if !bytes.Equal(id, f.dave.GroupID()) {
			return nil
		}
		return f.dave.Group
	}
	f.must(second(JoinGroup(cfg, nil, joiner.signer, c.Welcome(), kp, secrets, nil)))
	var ve *ValidationError
	for what, p := range map[string]Proposal{"epoch": key(f.alice.Epoch() + 1),
		"group": psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageApplication, GroupID: []byte("nobody's")})} {
		if _, err := b.members[0].Commit(nil, CommitOptions{Proposals: []Proposal{p}}); !errors.As(err, &ve) || ve.Section != "12.4.2" {
			t.Errorf("key of an unknown %s: got %v, want a violation of 12.4.2", what, err)
		}
	}
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.bob.OwnLeaf())}})
	if _, err := b.members[1].Commit(nil, CommitOptions{Proposals: []Proposal{key(f.alice.Epoch())}}); err == nil {
		t.Error("a removed member has the key")
	}
}
