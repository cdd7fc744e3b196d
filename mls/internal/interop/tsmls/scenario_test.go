package tsmls

import (
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// four returns a group of two members of each kind, the creator's first and third.
func four(t *testing.T, n *node, o options, creator kind, ext mls.Extensions) (r *room, a, b, c, d party) {
	t.Helper()
	r = newRoom(t, n, "room", creator, o, ext)
	a = r.members[0]
	b = r.add(a, true, creator.other())[0]
	more := r.add(b, true, creator, creator.other())
	return r, a, b, more[0], more[1]
}

func TestClientsJoinEachOthersGroupsByExternalCommits(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		o.psks = []psk{{[]byte("one"), []byte("a secret that our external commits bring in")}}
		r, a, b, _, _ := four(t, n, o, creator, nil)
		for _, from := range []party{a, b} {
			for _, k := range []kind{ours, theirs} {
				p := r.join(k, from, k == ours)
				r.say(p)
				r.commit(p, commitOptions{})
				r.resync(p, from)
				r.say(from)
				r.commit(from, commitOptions{proposals: []mls.Proposal{*remove(r.leaf(p))}})
			}
		}
		// What was proposed in the epoch is not for the external committer's new one.
		r.propose(b, remove(r.leaf(a)))
		r.join(ours, b, true)
		r.propose(a, nil)
		r.join(theirs, a, true)
		r.talk()
	})
}

func external(id string) *mls.Proposal {
	return &mls.Proposal{Type: mls.ProposalPSK, PSK: &mls.PreSharedKey{PSK: mls.PreSharedKeyID{Type: mls.PSKExternal, ID: []byte(id),
		Nonce: slices.Repeat([]byte{7}, 32)}}}
}

func resumption(groupID []byte, epoch uint64) *mls.Proposal {
	return &mls.Proposal{Type: mls.ProposalPSK, PSK: &mls.PreSharedKey{PSK: mls.PreSharedKeyID{Type: mls.PSKResumption,
		Usage: mls.UsageApplication, GroupID: groupID, Epoch: epoch, Nonce: slices.Repeat([]byte{8}, 32)}}}
}

func TestPreSharedKeysOfBothAreTheSame(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		o.psks = []psk{{[]byte("one"), []byte("first secret")}, {[]byte("two"), []byte("second secret, of another length")}}
		r, a, b, c, d := four(t, n, o, creator, nil)
		for _, p := range []party{a, b} {
			r.commit(p, commitOptions{proposals: []mls.Proposal{*external("one")}})
			r.commit(p, commitOptions{proposals: []mls.Proposal{*external("two"), *external("one")}})
			epoch := r.server.Epoch()
			r.commit(p, commitOptions{proposals: []mls.Proposal{*resumption(r.server.GroupID(), epoch-2), *external("two"),
				*resumption(r.server.GroupID(), epoch)}})
		}
		r.propose(c, external("one"))
		r.propose(d, external("two"))
		r.commit(a, commitOptions{})
		r.propose(c, external("one"))
		r.propose(d, external("two"))
		r.commit(b, commitOptions{})
		// A Welcome that says which keys its readers need.
		for _, p := range []party{a, b} {
			var joiners []party
			o := commitOptions{treeInWelcome: true, proposals: []mls.Proposal{*external("two"), *external("one")}}
			for _, k := range []kind{ours, theirs} {
				j, kp := r.client(k)
				joiners = append(joiners, j)
				o.proposals = append(o.proposals, *add(kp))
			}
			r.welcome(r.commit(p, o), true, joiners...)
		}
		r.talk()
	})
}

func TestGroupContextExtensionsOfBothAreTheSame(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		const custom = 0xf0f0
		o.extensions = []mls.ExtensionType{custom}
		o.leafExtensions = mls.Extensions{{Type: mls.ExtensionApplicationID, Data: []byte("a device")}, {Type: custom, Data: []byte("leaf")}}
		required := func(e ...mls.ExtensionType) []byte {
			return codec.Marshal(mls.RequiredCapabilities{Extensions: e, Credentials: []mls.CredentialType{mls.CredentialBasic}})
		}
		r, a, b, c, d := four(t, n, o, creator, mls.Extensions{{Type: mls.ExtensionRequiredCapabilities, Data: required(custom)}, {Type: custom, Data: []byte("0")}})
		change := func(data string) *mls.Proposal {
			return &mls.Proposal{Type: mls.ProposalGroupContextExtensions, GroupContextExtensions: &mls.GroupContextExtensions{
				Extensions: mls.Extensions{{Type: custom, Data: []byte(data)}, {Type: mls.ExtensionRequiredCapabilities, Data: required()}}}}
		}
		for _, p := range []party{a, b} {
			// A commit of ts-mls has a path because of the Update only, though the extensions require one as well (RFC 9420,
			// Sections 12.4 and 17.4).
			r.propose(c, nil)
			r.commit(p, commitOptions{proposals: []mls.Proposal{*change("by " + p.name())}})
		}
		r.propose(d, nil)
		r.propose(c, change("proposed"))
		r.commit(b, commitOptions{})
		r.propose(c, nil)
		r.propose(d, change("proposed again"))
		r.commit(a, commitOptions{})
		if data, _ := r.server.Extension(custom); string(data) != "proposed again" {
			t.Errorf("extension is %q", data)
		}
		for _, k := range []kind{ours, theirs} {
			r.add(a, true, k)
			r.add(b, false, k)
			r.join(k, c, false)
		}
		r.talk()

		r.options.extensions, r.options.leafExtensions = nil, nil
		for _, p := range []party{a, b} {
			for _, k := range []kind{ours, theirs} {
				_, kp := r.client(k)
				if _, err := p.commit(commitOptions{proposals: []mls.Proposal{*add(kp)}}); err == nil {
					t.Errorf("%s adds a client that lacks an extension of the group", p.name())
				}
			}
		}
	})
}

func TestPrivateHandshakesOfBothAreTheSame(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		o.psks, o.private = []psk{{[]byte("one"), []byte("a secret")}}, true
		r, a, b, c, d := four(t, n, o, creator, nil)
		for _, p := range []party{a, b} {
			r.say(p)
			r.commit(p, commitOptions{aad: []byte("aad")})
			r.propose(c, nil)
			r.propose(d, external("one"))
			r.commit(p, commitOptions{proposals: []mls.Proposal{*resumption(r.server.GroupID(), r.server.Epoch())}})
			_, kp := r.client(ours)
			r.propose(c, add(kp))
			r.propose(d, nil)
			r.join(theirs, d, false)
			r.propose(d, remove(r.leaf(r.members[len(r.members)-1])))
			r.commit(p, commitOptions{})
		}
		r.talk()
	})
}

func TestLateMessagesOfBothAreRead(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		r, a, b, c, _ := four(t, n, o, creator, nil)
		for _, from := range []party{a, b} {
			var late [][]byte
			for range 6 {
				m, err := from.send(nil, []byte("late"))
				r.must(from, "send", err)
				late = append(late, m)
			}
			r.read(from, late[5], "late")
			r.commit(c, commitOptions{})
			r.commit(from, commitOptions{})
			for _, i := range []int{3, 0, 4} {
				r.read(from, late[i], "late")
			}
			r.add(from, true, ours, theirs)
			late = late[:3]
			for _, p := range []party{a, b} {
				if p == from {
					continue
				}
				for _, i := range []int{2, 1} {
					got, data, err := p.process(late[i])
					if r.must(p, "late message", err); got != application || string(data) != "late" {
						t.Fatalf("%s: %s %q", p.name(), got, data)
					}
				}
			}
		}
	})
}

func TestRemovedMembersOfBothReadNothing(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		r, a, b, c, d := four(t, n, o, creator, nil)
		r.commit(a, commitOptions{proposals: []mls.Proposal{*remove(r.leaf(d))}})
		r.talk()
		r.propose(a, remove(r.leaf(c)))
		r.commit(b, commitOptions{})
		r.talk()
		m, err := a.commit(commitOptions{})
		r.must(a, "commit", err)
		for _, p := range r.gone {
			if _, _, err := p.process(m.message); err == nil {
				t.Errorf("%s was removed and processes a commit", p.name())
			}
		}
		r.accept(a, m)
		r.add(a, true, ours, theirs)
		r.commit(b, commitOptions{proposals: []mls.Proposal{*remove(r.leaf(a))}})
		r.talk()
		if len(r.gone) != 3 {
			t.Errorf("%d members were removed, want 3", len(r.gone))
		}
	})
}

func TestCommitsThatLoseAreDropped(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		r, a, b, c, d := four(t, n, o, creator, nil)
		for range 2 {
			for _, p := range []party{a, b, c, d} {
				m, err := p.commit(commitOptions{})
				r.must(p, "commit", err)
				if p == b || p == c {
					r.accept(p, m)
				} else {
					r.must(p, "drop", p.drop())
				}
			}
			r.talk()
		}
	})
}

func TestClientsOfBothAskToBeAdded(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		r, a, b, _, _ := four(t, n, o, creator, nil)
		for _, by := range []party{a, b} {
			for _, k := range []kind{ours, theirs} {
				p, _ := r.client(k)
				r.proposeFromOutside(p, 0, nil)
				r.welcome(r.commit(by, commitOptions{treeInWelcome: true}), true, p)
			}
		}
		r.talk()
	})
}

func TestTheirProposalsAsExternalSenderAreTaken(t *testing.T) {
	n, o := startNode(t), options{suite: mls.X25519_AES128GCM_SHA256_Ed25519}
	outside := &room{t: t, node: n, id: "outside", options: o}
	var senders mls.ExternalSenders
	var outsiders []party
	for _, k := range []kind{ours, theirs} {
		p, kp := outside.client(k)
		m, _ := outside.parse(kp, nil)
		senders = append(senders, mls.ExternalSender{SignatureKey: m.KeyPackage.LeafNode.SignatureKey, Credential: m.KeyPackage.LeafNode.Credential})
		outsiders = append(outsiders, p)
	}
	r := newRoom(t, n, "room", ours, o, mls.Extensions{{Type: mls.ExtensionExternalSenders, Data: codec.Marshal(senders)}})
	victims := r.add(r.members[0], true, ours, ours)
	for i, p := range outsiders {
		_, kp := r.client(ours)
		r.proposeFromOutside(p, uint32(i), add(kp))
		r.proposeFromOutside(p, uint32(i), remove(r.leaf(victims[i])))
		r.commit(r.members[0], commitOptions{})
	}
	if len(r.gone) != 2 || r.server.Tree().Count() != 3 {
		t.Errorf("%d removed, %d members, want 2 and 3", len(r.gone), r.server.Tree().Count())
	}
}

func TestSuccessorsOfBothAreTheSame(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		for i := range 2 {
			r, a, b, c, d := four(t, n, o, creator, nil)
			by := []party{a, b}[i]
			next := o
			next.suite = []mls.CipherSuite{mls.P256_AES128GCM_SHA256_P256, mls.X25519_CHACHA20POLY1305_SHA256_Ed25519}[i]
			end := &mls.Proposal{Type: mls.ProposalReInit, ReInit: &mls.ReInit{GroupID: []byte("another"), Version: mls.MLS10, CipherSuite: next.suite}}
			if i == 0 {
				r.propose(c, end)
				r.commit(by, commitOptions{})
			} else {
				r.commit(by, commitOptions{proposals: []mls.Proposal{*end}})
			}
			for _, p := range r.members {
				if _, err := p.send(nil, []byte("too late")); err == nil {
					t.Errorf("%s sends to a group that has ended", p.name())
				}
			}
			s := r.next([]party{d, c}[i], next, nil)
			s.commit(s.members[1], commitOptions{})
		}
	})
}

func TestBranchesOfBothAreTheSame(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		r, a, b, c, d := four(t, n, o, creator, nil)
		r.next(a, o, []party{a, b, c})
		r.commit(c, commitOptions{})
		s := r.next(b, o, []party{b, c, d})
		s.add(s.members[0], true, ours, theirs)
		s.talk()
		r.talk()
	})
}
