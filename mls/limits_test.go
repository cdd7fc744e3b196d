package mls

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

func TestNobodyIsAddedToAFullTree(t *testing.T) {
	f := newForgery(t)
	adds, joins := withKeyPackage(func(*KeyPackage) {})(f), external(forged{}, (*forgery).externalInit)(f)
	for _, tree := range []*RatchetTree{f.alice.state.tree, f.bob.state.tree, f.server.state.tree} {
		tree.count = maxLeafSlots
	}
	for what, m := range map[string]*MLSMessage{"add": adds, "external commit": joins} {
		if _, err := f.bob.Receive(f.bob.store, m); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: member: got %v, want ErrUnsupported", what, err)
		}
		if _, err := f.server.CheckCommit(m.Public); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: server: got %v, want ErrUnsupported", what, err)
		}
	}
	_, kp, _ := keyPackage(t, testSuite, "eve")
	if _, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("committer: got %v, want ErrUnsupported", err)
	}
}

func TestNoEpochFollowsTheLast(t *testing.T) {
	f := newForgery(t)
	f.alice.state.context.Epoch = math.MaxUint64
	if _, err := f.alice.Commit(nil, CommitOptions{}); !errors.Is(err, ErrEpoch) {
		t.Errorf("got %v, want ErrEpoch", err)
	}
}

// TestFloodOfProposalsDoesNotStopCommits: half of very many pending proposals can't be committed, and to find
// out which takes work in proportion to their number squared.
func TestFloodOfProposalsDoesNotStopCommits(t *testing.T) {
	f := newForgery(t)
	pend := func(i int, p Proposal) {
		f.alice.state.addPending(discard{}, &pendingEntry{PendingProposal: PendingProposal{
			Ref: []byte{byte(i), byte(i >> 8)}, Sender: Sender{Type: SenderMember, Leaf: f.bob.OwnLeaf()}, Proposal: p}})
	}
	checks := 0
	f.alice.cfg.Policy = func(info *StagedInfo) error { checks += len(info.Proposals); return nil }
	pend(0, remove(f.carol.OwnLeaf()))
	for i := 1; i < maxPending; i++ {
		pend(i, appData(0x8001, []string{"+", "no"}[i%2]))
	}
	c, err := f.alice.Commit(nil, CommitOptions{})
	f.must(err)
	if len(c.Info().Removed) != 1 {
		t.Error("the first proposal isn't committed")
	}
	if checks > 1<<18 {
		t.Errorf("%d proposals tried", checks)
	}
}

func TestPendingProposalsAreBounded(t *testing.T) {
	f := newForgery(t)
	for i := range maxPending {
		e := &pendingEntry{PendingProposal: PendingProposal{Ref: []byte{byte(i), byte(i >> 8)}, Proposal: remove(1)}}
		f.bob.state.addPending(discard{}, e)
		f.server.state.addPending(discard{}, e)
	}
	m := f.proposal(f.alice, remove(1))
	if _, err := f.bob.Receive(nil, m); err == nil {
		t.Error("a member takes one more")
	}
	if _, err := f.server.CheckProposal(m.Public); err == nil {
		t.Error("the server takes one more")
	}
	if _, err := f.bob.Propose(nil, nil, remove(0)); err == nil {
		t.Error("a member proposes one more")
	}
}

// TestFoundersMakeGroupsThatOthersCanJoin: what joiners would refuse can't be created.
func TestFoundersMakeGroupsThatOthersCanJoin(t *testing.T) {
	for rule, edit := range map[string]func(c *Config, o *GroupOptions){
		"credential":         func(_ *Config, o *GroupOptions) { o.Credential = BasicCredential([]byte("bad")) },
		"extension":          func(_ *Config, o *GroupOptions) { o.Extensions = Extensions{{Type: 0xf00d}} },
		"extension twice":    func(_ *Config, o *GroupOptions) { o.Extensions = Extensions{{Type: 5}, {Type: 5}} },
		"leaf's extension":   func(_ *Config, o *GroupOptions) { o.LeafExtensions = Extensions{{Type: 0xf00d}} },
		"lifetime":           func(_ *Config, o *GroupOptions) { o.Lifetime = LifetimeFrom(time.Now(), 2*MaxLifetime) },
		"configured maximum": func(c *Config, _ *GroupOptions) { c.MaxLifetime = time.Hour },
		"external sender": func(_ *Config, o *GroupOptions) {
			o.Extensions = Extensions{{Type: ExtensionExternalSenders, Data: codec.Marshal(ExternalSenders{{Credential: BasicCredential([]byte("bad"))}})}}
		},
		"suite": func(_ *Config, o *GroupOptions) { o.Suite = P256_AES128GCM_SHA256_P256 },
		"name":  func(c *Config, _ *GroupOptions) { c.Verifier = nameless{} },
	} {
		cfg, s := testConfig(), newMemStore()
		o := GroupOptions{GroupID: []byte("group"), Suite: testSuite, Credential: BasicCredential([]byte("a")), Signer: newSigner(t, testSuite)}
		edit(&cfg, &o)
		if _, err := NewGroup(cfg, s, o); err == nil {
			t.Errorf("%s: accepted", rule)
		}
		if len(s.m) > 0 {
			t.Errorf("%s: state was written", rule)
		}
	}
}

// nameless finds no client in any credential.
type nameless struct{ testVerifier }

func (nameless) Identity(Credential) ([]byte, error) { return nil, errors.New("no name") }

func TestKeyPackageExtensionsAreAmongTheCapabilities(t *testing.T) {
	o := KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("a")), Signer: newSigner(t, testSuite), Extensions: Extensions{{Type: 0xf00d}}}
	if _, _, err := NewKeyPackage(o); err == nil {
		t.Error("an extension that isn't listed is accepted")
	}
	o.Capabilities = DefaultCapabilities()
	o.Capabilities.Extensions = append(o.Capabilities.Extensions, 0xf00d)
	if _, _, err := NewKeyPackage(o); err != nil {
		t.Error(err)
	}
}

func TestProposalsWithoutTheirBodyAreRefused(t *testing.T) {
	f := newForgery(t)
	op := Proposal{Type: ProposalAppDataUpdate, AppDataUpdate: &AppDataUpdate{Component: 0x8001}}
	if _, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{op}}); err == nil {
		t.Error("an update of application data without its operation is accepted")
	}
	for typ := ProposalAdd; typ <= ProposalAppDataUpdate; typ++ {
		p := Proposal{Type: typ}
		if _, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{p}}); !errors.Is(err, ErrMalformed) {
			t.Errorf("commit of type %d: got %v, want ErrMalformed", typ, err)
		}
		if _, err := f.alice.Propose(nil, nil, p); !errors.Is(err, ErrMalformed) {
			t.Errorf("proposal of type %d: got %v, want ErrMalformed", typ, err)
		}
		if _, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, p); !errors.Is(err, ErrMalformed) {
			t.Errorf("external proposal of type %d: got %v, want ErrMalformed", typ, err)
		}
	}
}

func TestServersTakeMessagesForWhatTheyAre(t *testing.T) {
	f := newForgery(t)
	commit, proposal := f.commit(forged{}), f.proposal(f.carol, remove(1))
	if _, err := f.server.CheckProposal(commit.Public); !errors.Is(err, ErrMalformed) {
		t.Errorf("a commit as a proposal: got %v, want ErrMalformed", err)
	}
	if _, err := f.server.CheckCommit(proposal.Public); !errors.Is(err, ErrMalformed) {
		t.Errorf("a proposal as a commit: got %v, want ErrMalformed", err)
	}
	s, err := f.server.CheckProposal(proposal.Public)
	f.must(err)
	f.must(f.server.ApplyProposal(f.store, s))
	again, err := f.server.CheckProposal(proposal.Public)
	f.must(err)
	f.must(f.server.ApplyProposal(f.store, again))
	if !again.Known() || len(f.server.Pending()) != 1 {
		t.Errorf("a proposal sent twice: known %v, %d pending", again.Known(), len(f.server.Pending()))
	}
	f.room.commit(f.bob, CommitOptions{})
	if err := f.server.ApplyProposal(f.store, s); !errors.Is(err, ErrEpoch) {
		t.Errorf("a proposal of a past epoch: got %v, want ErrEpoch", err)
	}
}
