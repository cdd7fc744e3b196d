package mls

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// judges says who can see that a rule is broken.
type judges int

const (
	everyone    judges = iota // members and server
	membersOnly               // public data doesn't show it
	serverOnly                // members don't judge it: clocks and pending proposals differ
)

// violation is a rule with a message that breaks it.
type violation struct {
	section string // of the ValidationError
	rule    string
	judges  judges
	is      error // the sentinel, for rules that have one
	message func(f *forgery) *MLSMessage
}

func commitOf(props ...Proposal) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{props: props}) }
}

func withKeyPackage(edit func(*KeyPackage)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, edit)}, noPath: true})
	}
}

func withRequest(edit func(*KeyPackage)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		signer := newSigner(f.TB, testSuite)
		return f.request(signer, f.keyPackage("new", signer, edit))
	}
}

func withUpdate(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.proposal(f.carol, f.update(f.carol, nil, edit)) }
}

func withLeaf(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{leaf: edit}) }
}

func withPath(edit func(*UpdatePath)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{path: edit}) }
}

func withFrame(edit func(*PublicMessage)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{framed: edit}) }
}

func external(o forged, props ...func(f *forgery) Proposal) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		o := o
		if o.external == "" {
			o.external = "eve"
		}
		o.props = nil
		for _, p := range props {
			o.props = append(o.props, p(f))
		}
		return f.commit(o)
	}
}

func fixed(p Proposal) func(*forgery) Proposal { return func(*forgery) Proposal { return p } }

func psk(id PreSharedKeyID) Proposal {
	return Proposal{Type: ProposalPSK, PSK: &PreSharedKey{PSK: id}}
}

// reinit asks for a group called "next" of the same suite, unless edit changes that.
func reinit(edit func(*ReInit)) Proposal {
	r := &ReInit{GroupID: []byte("next"), Version: MLS10, CipherSuite: testSuite}
	if edit != nil {
		edit(r)
	}
	return Proposal{Type: ProposalReInit, ReInit: r}
}

func extensions(f *forgery, edit func(Extensions) Extensions) Proposal {
	return Proposal{Type: ProposalGroupContextExtensions, GroupContextExtensions: &GroupContextExtensions{Extensions: edit(slices.Clone(f.alice.Context().Extensions))}}
}

func withExtensions(edit func(Extensions) Extensions) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{props: []Proposal{extensions(f, edit)}}) }
}

func appRemove(id ComponentID) Proposal {
	return Proposal{Type: ProposalAppDataUpdate, AppDataUpdate: &AppDataUpdate{Component: id, Op: AppDataOpRemove}}
}

func selfRemove() Proposal { return Proposal{Type: ProposalSelfRemove} }

// withSelfRemoves commits proposals after the SelfRemoves of some members.
func withSelfRemoves(o forged, by ...func(*forgery) *client) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		o := o
		for i, c := range by {
			o.refs = append(o.refs, f.slip(f.proposalWith(c(f), selfRemove(), []byte{byte(i)})))
		}
		return f.commit(o)
	}
}

// require changes what the GroupContext asks of the members.
func (f *forgery) require(id ComponentID, data codec.Marshaler) {
	f.TB.Helper()
	f.room.commit(f.bob, CommitOptions{Proposals: []Proposal{setTerms(id, data)}})
}

func setTerms(id ComponentID, data codec.Marshaler) Proposal {
	return appData(id, string(codec.Marshal(data)))
}

// withSafeAAD makes a message after all authenticated data has become a SafeAAD.
func withSafeAAD(message func(*forgery) *MLSMessage) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		f.require(ComponentSafeAAD, ComponentsList{})
		return message(f)
	}
}

func withAAD(aad string) func(*forgery) *MLSMessage {
	return withSafeAAD(func(f *forgery) *MLSMessage {
		return f.commit(forged{content: func(c *FramedContent) { c.AuthenticatedData = []byte(aad) }})
	})
}

// withoutProposal has dave not support a proposal type any more.
func (f *forgery) withoutProposal(t ProposalType) {
	f.TB.Helper()
	c := DefaultCapabilities()
	c.Proposals = slices.DeleteFunc(c.Proposals, func(x ProposalType) bool { return x == t })
	f.room.propose(f.dave.ProposeUpdate(f.dave.store, UpdateOptions{Capabilities: &c}))
	f.room.commit(f.bob, CommitOptions{})
}

func alice(f *forgery) *client { return f.alice }
func carol(f *forgery) *client { return f.carol }

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 1
	return b
}

// violations are the rules on handshake messages, each with a test here.
var violations = slices.Concat(leafViolations, proposalViolations, componentViolations, commitViolations)

// slip makes a proposal pending everywhere although the server would have refused it.
func (f *forgery) slip(m *MLSMessage) []byte {
	f.TB.Helper()
	ac := m.Public.authenticated()
	p := PendingProposal{Ref: ac.ref(testSuite), Sender: ac.Content.Sender, Proposal: *ac.Content.Proposal}
	for _, c := range f.members {
		if _, err := c.Receive(c.store, m); err != nil {
			f.TB.Fatal(err)
		}
	}
	f.server.state.addPending(f.store, &pendingEntry{PendingProposal: p})
	return p.Ref
}

func TestBrokenRulesAreRefused(t *testing.T) {
	for _, v := range violations {
		t.Run(v.section+" "+v.rule, func(t *testing.T) {
			f := newForgery(t)
			m := v.message(f)
			var members error
			refused := func(c *client, who string, m *MLSMessage) error {
				before, stored := whole(c.Group), maps.Clone(c.store.m)
				_, err := c.Receive(c.store, m)
				if v.judges == serverOnly {
					if err != nil {
						t.Errorf("%s: %v", who, err)
					}
					return nil
				}
				v.check(t, who, err)
				unchanged(t, who+" in memory", whole(c.Group), before)
				unchanged(t, who+" stored", c.store.m, stored)
				return err
			}
			for _, c := range []*client{f.bob, f.dave} {
				members = refused(c, c.name, m)
			}
			if m.Public == nil { // the server doesn't see it
				return
			}
			if private := f.private(m); private != nil && v.section != "" && v.judges != serverOnly {
				for _, c := range []*client{f.bob, f.dave} {
					sameRule(t, members, refused(c, c.name+", encrypted", private))
				}
			}
			before, stored := whole(f.server), maps.Clone(f.store.m)
			var err error
			if m.Public.Content.ContentType == ContentCommit {
				_, err = f.server.CheckCommit(m.Public)
			} else {
				_, err = f.server.CheckProposal(m.Public)
			}
			switch v.judges {
			case membersOnly:
				if err != nil {
					t.Errorf("server: %v", err)
				}
			case everyone:
				v.check(t, "server", err)
				sameRule(t, members, err)
			default:
				v.check(t, "server", err)
			}
			unchanged(t, "server in memory", whole(f.server), before)
			unchanged(t, "server stored", f.store.m, stored)
		})
	}
}

// sameRule compares the rule that two refusals name, if they name one.
func sameRule(t *testing.T, a, b error) {
	t.Helper()
	var x, y *ValidationError
	if errors.As(a, &x) != errors.As(b, &y) {
		t.Errorf("refused as %v and as %v", a, b)
	} else if x != nil && (x.Section != y.Section || x.Rule != y.Rule) {
		t.Errorf("refused for %s %q and for %s %q", x.Section, x.Rule, y.Section, y.Rule)
	}
}

func (v *violation) check(t *testing.T, who string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s accepts it", who)
		return
	}
	if v.is != nil && !errors.Is(err, v.is) {
		t.Errorf("%s: got %v, want %v", who, err, v.is)
	}
	if v.section == "" {
		if v.is == nil {
			t.Fatal("the row says neither section nor error")
		}
		return
	}
	var ve *ValidationError
	if !errors.As(err, &ve) || ve.Section != v.section {
		t.Errorf("%s: got %v, want a violation of %s", who, err, v.section)
	}
}

// TestUnbrokenMessagesAreAccepted shows that the forger's messages fail for what is broken in them only.
func TestUnbrokenMessagesAreAccepted(t *testing.T) {
	for name, message := range map[string]func(f *forgery) *MLSMessage{
		"commit":   func(f *forgery) *MLSMessage { return f.commit(forged{}) },
		"add":      withKeyPackage(func(*KeyPackage) {}),
		"update":   withUpdate(func(*LeafNode) {}),
		"leaf":     withLeaf(func(*LeafNode) {}),
		"remove":   commitOf(remove(2)),
		"external": func(f *forgery) *MLSMessage { f.join("eve"); return f.commit(forged{}) },
		"external, with a key and data": func(f *forgery) *MLSMessage {
			f.join("eve", sharedPSK(), componentPSK(), appData(0x8001, "+"), ephemeral(0x8001, []byte("x")))
			return f.commit(forged{})
		},
		"external, for a former leaf": func(f *forgery) *MLSMessage {
			f.join("dave#2", remove(f.dave.OwnLeaf()))
			return f.commit(forged{})
		},
		"client replaced": func(f *forgery) *MLSMessage {
			return f.commit(forged{props: []Proposal{remove(2), f.keyPackage("carol", f.carol.signer, nil)}})
		},
		"extensions": withExtensions(func(e Extensions) Extensions {
			return e.Remove(ExtensionExternalSenders)
		}),
		"request to be added": withRequest(func(*KeyPackage) {}),
		"component removed":   commitOf(appRemove(0x8001)),
		"reinit": func(f *forgery) *MLSMessage {
			return f.commit(forged{noPath: true, props: []Proposal{reinit(nil)}})
		},
		"reinit, to a version to come": commitOf(reinit(func(r *ReInit) { r.Version, r.CipherSuite = 2, 0xf00d })),
		"reinit of an external sender": func(f *forgery) *MLSMessage {
			m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, reinit(nil))
			f.must(err)
			return m
		},
		"ephemeral data": func(f *forgery) *MLSMessage {
			return f.commit(forged{noPath: true, props: []Proposal{ephemeral(0x8001, []byte("x"))}})
		},
		"ephemeral data of an external sender": func(f *forgery) *MLSMessage {
			m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, ephemeral(0x8001, nil))
			f.must(err)
			return m
		},
		"self_remove":     withSelfRemoves(forged{}, carol),
		"safe AAD, empty": withAAD("\x00"),
		"safe AAD":        withAAD(string(codec.Marshal(SafeAAD{{0x0a0a, nil}, {0x8001, []byte("x")}}))),
		"safe AAD of a proposal": withSafeAAD(func(f *forgery) *MLSMessage {
			f.join("eve", componentPSK())
			return f.proposalWith(f.carol, appData(0x8001, "+"), []byte{0})
		}),
		"wire formats that all have": withExtensions(func(e Extensions) Extensions {
			return e.Set(ExtensionRequiredWireFormats, codec.Marshal(WireFormats{WireFormatPublicMessage, WireFormatKeyPackage}))
		}),
		"components that all have": commitOf(setTerms(ComponentAppComponents, ComponentsList{ComponentAppComponents, ComponentSafeAAD})),
		// Only who adds somebody or commits sees to it.
		"media types that nobody lists": commitOf(setTerms(ComponentMediaTypes, MediaTypeList{{Type: "text/plain"}})),
	} {
		t.Run(name, func(t *testing.T) {
			f := newForgery(t)
			m := message(f)
			if _, err := f.bob.Receive(f.bob.store, m); err != nil {
				t.Error(err)
			}
			var err error
			if m.Public.Content.ContentType == ContentCommit {
				_, err = f.server.CheckCommit(m.Public)
			} else {
				_, err = f.server.CheckProposal(m.Public)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestGroupInfoOfACommitIsChecked(t *testing.T) {
	f := newForgery(t)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{})
	f.must(err)
	s, err := f.server.CheckCommit(c.Message().Public)
	f.must(err)
	f.must(s.CheckGroupInfo(c.GroupInfo()))
	full := *c.GroupInfo()
	full.Extensions = full.Extensions.Set(ExtensionRatchetTree, codec.Marshal(c.Tree()))
	f.must(full.sign(f.alice.cfg.rand(), f.alice.signer))
	f.must(s.CheckGroupInfo(&full))
	for _, v := range []struct {
		rule   string
		is     error
		signer *client
		edit   func(gi *GroupInfo)
	}{
		{"context", nil, f.alice, func(gi *GroupInfo) { gi.GroupContext.Epoch++ }},
		{"tree hash", nil, f.alice, func(gi *GroupInfo) { gi.GroupContext.TreeHash = flip(gi.GroupContext.TreeHash) }},
		{"confirmation tag", ErrConfirmationTag, f.alice, func(gi *GroupInfo) { gi.ConfirmationTag = flip(gi.ConfirmationTag) }},
		{"signer", nil, f.bob, func(gi *GroupInfo) { gi.Signer = 1 }},
		{"signature", ErrSignature, f.bob, func(*GroupInfo) {}},
		{"ratchet tree", nil, f.alice, func(gi *GroupInfo) {
			gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, codec.Marshal(f.alice.Tree()))
		}},
		{"ratchet tree that isn't one", nil, f.alice, func(gi *GroupInfo) { gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, []byte{9}) }},
		{"key for external commits", ErrMalformed, f.alice, func(gi *GroupInfo) { gi.Extensions = gi.Extensions.Set(ExtensionExternalPub, []byte{1, 9}) }},
		{"extensions", nil, f.alice, func(gi *GroupInfo) { gi.Extensions = append(gi.Extensions, gi.Extensions[0]) }},
	} {
		gi := *c.GroupInfo()
		gi.Extensions = slices.Clone(gi.Extensions)
		v.edit(&gi)
		f.must(gi.sign(f.alice.cfg.rand(), v.signer.signer))
		if err := s.CheckGroupInfo(&gi); err == nil {
			t.Errorf("%s: accepted", v.rule)
		} else if v.is != nil && !errors.Is(err, v.is) {
			t.Errorf("%s: got %v, want %v", v.rule, err, v.is)
		}
	}
	if err := s.CheckTree(f.server.Tree()); err == nil {
		t.Error("the old tree is accepted as the new one")
	}
	// A commit that was checked before another was applied is stale.
	f.must(f.alice.Drop(f.alice.store))
	f.room.commit(f.bob, CommitOptions{})
	if err := f.server.Apply(f.store, s, c.GroupInfo()); !errors.Is(err, ErrEpoch) {
		t.Errorf("stale commit: got %v, want ErrEpoch", err)
	}
	f.checkStores()
}

// TestPendingProposalsThatDoNotGoTogetherAreLeftOut: a committer takes what is valid together.
func TestPendingProposalsThatDoNotGoTogetherAreLeftOut(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))
	r.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))                                           // supersedes the first
	r.propose(f.dave.ProposeUpdate(f.dave.store, UpdateOptions{}))                                             // superseded by the Remove
	r.propose(f.bob.Propose(f.bob.store, nil, remove(f.dave.OwnLeaf())))                                       //
	r.propose(f.bob.Propose(f.bob.store, nil, remove(f.alice.OwnLeaf())))                                      // not by alice herself
	r.propose(f.bob.Propose(f.bob.store, nil, f.keyPackage("carol", nil, nil)))                                // is a member
	r.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+")))                                           //
	r.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "no")))                                          // the component refuses it
	r.propose(f.alice.ProposeUpdate(f.alice.store, UpdateOptions{}))                                           // her own
	r.propose(f.bob.Propose(f.bob.store, nil, psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("nobody's")}))) // unknown
	c := r.commit(f.alice, CommitOptions{})
	var got []ProposalType
	for _, p := range c.Info().Proposals {
		got = append(got, p.Proposal.Type)
	}
	if want := []ProposalType{ProposalUpdate, ProposalRemove, ProposalAppDataUpdate}; !slices.Equal(got, want) {
		t.Errorf("committed %v, want %v", got, want)
	}
	r.check()
	r.checkStores()
	if len(f.alice.Pending())+len(r.server.Pending()) != 0 {
		t.Error("proposals are pending after the commit")
	}
}

func TestPolicyRefusesCommits(t *testing.T) {
	f := newForgery(t)
	no := errors.New("no removes here")
	policy := func(info *StagedInfo) error {
		if len(info.Removed) > 0 {
			return no
		}
		return nil
	}
	m := f.commit(forged{props: []Proposal{remove(2)}})
	for _, c := range f.members {
		c.cfg.Policy = policy
	}
	f.server.rules.policy = policy
	if _, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{remove(2)}}); !errors.Is(err, no) {
		t.Errorf("committer: got %v", err)
	}
	if _, err := f.bob.Receive(f.bob.store, m); !errors.Is(err, no) {
		t.Errorf("member: got %v", err)
	}
	if _, err := f.server.CheckCommit(m.Public); !errors.Is(err, no) {
		t.Errorf("server: got %v", err)
	}
	// A pending proposal that the policy refuses doesn't keep the others from being committed.
	f.room.propose(f.bob.Propose(f.bob.store, nil, remove(2)))
	f.room.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+")))
	if c := f.room.commit(f.alice, CommitOptions{}); len(c.Info().Proposals) != 1 {
		t.Errorf("%d proposals committed, want 1", len(c.Info().Proposals))
	}
}
