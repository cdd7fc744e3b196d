package tsmls

import (
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

func encodedContext(g *mls.PublicGroup) []byte { return codec.Marshal(g.Context()) }

// alone are the suites that ts-mls 1.6.4 can't have: its KemAlgorithm has none of the hybrids of ML-KEM and a NIST curve.
var alone = []mls.CipherSuite{mls.MLKEM768P256_AES128GCM_SHA256_P256, mls.MLKEM768P256_AES256GCM_SHA384_P256,
	mls.MLKEM1024P384_AES256GCM_SHA384_P384}

func TestEverySuiteIsTheSameInBoth(t *testing.T) {
	a, err := startNode(t).call(request{Op: "supported"})
	if err != nil {
		t.Fatal(err)
	}
	for _, cs := range mls.CipherSuites() {
		t.Run(cs.String(), func(t *testing.T) {
			if slices.Contains(alone, cs) && !slices.Contains(a.Suites, uint16(cs)) {
				t.Skip("ts-mls has no KEM of ML-KEM and a NIST curve")
			}
			t.Parallel()
			n := startNode(t)
			for _, creator := range []kind{ours, theirs} {
				r := newRoom(t, n, string(creator)+" creates", creator, options{suite: cs}, nil)
				a := r.members[0]
				b := r.add(a, true, creator.other())[0]
				c := r.add(b, false, creator)[0]
				r.say(a)
				r.say(b)
				d := r.join(creator.other(), a, true)
				for _, p := range []party{c, d} {
					r.propose(p, nil)
				}
				r.commit(b, commitOptions{})
				r.commit(c, commitOptions{proposals: []mls.Proposal{*remove(r.leaf(d))}})
				r.join(creator, b, false)
				r.commit(a, commitOptions{})
				r.say(b)
			}
		})
	}
}

// TestProposalsOfTheExtensionsAreNotOfBoth says what isn't compared, for as long as it is so.
func TestProposalsOfTheExtensionsAreNotOfBoth(t *testing.T) {
	a, err := startNode(t).call(request{Op: "supported"})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]mls.ProposalType{
		"app_data_update": mls.ProposalAppDataUpdate, "app_ephemeral": mls.ProposalAppEphemeral, "self_remove": mls.ProposalSelfRemove,
	} {
		t.Run(name, func(t *testing.T) {
			if slices.Contains(a.Proposals, uint16(p)) {
				t.Fatal("ts-mls has the proposal now: compare it")
			}
			t.Skip("ts-mls has the seven proposals of RFC 9420, and none of draft-ietf-mls-extensions")
		})
	}
}

// eachCreator runs a test in groups of the first suite that we create, and in groups that they do.
func eachCreator(t *testing.T, f func(t *testing.T, n *node, o options, creator kind)) {
	for _, creator := range []kind{ours, theirs} {
		t.Run("created by "+string(creator), func(t *testing.T) {
			t.Parallel()
			f(t, startNode(t), options{suite: mls.X25519_AES128GCM_SHA256_Ed25519}, creator)
		})
	}
}

func TestMembersOfBothAgreeThroughTheLifeOfAGroup(t *testing.T) {
	eachCreator(t, func(t *testing.T, n *node, o options, creator kind) {
		o.x509 = true
		r := newRoom(t, n, "room", creator, o, nil)
		a := r.members[0]
		b := r.add(a, true, creator.other())[0]
		r.talk()
		c := r.add(b, false, creator)[0]
		d := r.add(a, false, creator.other())[0]
		r.talk()
		more := r.add(c, true, creator, creator.other(), creator, creator.other()) // unmerged leaves
		for _, p := range []party{a, b, more[2], more[3], c, d} {
			r.commit(p, commitOptions{aad: []byte("aad")})
		}
		r.talk()

		for _, by := range []party{a, b} {
			for _, p := range []party{c, d} {
				r.propose(p, nil)
			}
			_, kp := r.client(creator)
			r.propose(d, add(kp))
			r.propose(c, remove(r.leaf(more[0])))
			more = more[1:]
			r.commit(by, commitOptions{})
			r.talk()
		}
	})
}
