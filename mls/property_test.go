package mls

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// TestEveryoneAgreesAfterRandomOperations has random members do random things, with restarts between. All members and
// the server agree after each commit, and each store has exactly what its group needs.
func TestEveryoneAgreesAfterRandomOperations(t *testing.T) {
	for seed, cs := range CipherSuites() {
		steps := 60
		if !slices.Contains([]CipherSuite{X25519_AES128GCM_SHA256_Ed25519, P256_AES128GCM_SHA256_P256, X25519_CHACHA20POLY1305_SHA256_Ed25519}, cs) {
			steps = 15 // slow, above all under the race detector
		}
		if testing.Short() {
			steps /= 2
		}
		t.Run(cs.String(), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(uint64(seed), 1))
			walk(t, cs, rnd, steps, false)
		})
	}
	t.Run("private handshakes", func(t *testing.T) {
		t.Parallel()
		walk(t, testSuite, rand.New(rand.NewPCG(7, 2)), 60, true)
	})
}

func walk(t *testing.T, cs CipherSuite, rnd *rand.Rand, steps int, private bool) {
	external := newSigner(t, cs)
	key, err := cs.SignaturePublicKey(external.Public())
	if err != nil {
		t.Fatal(err)
	}
	var ext Extensions
	ext = ext.Set(ExtensionExternalSenders, codec.Marshal(ExternalSenders{{SignatureKey: key, Credential: BasicCredential([]byte("hub"))}}))
	ext = ext.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{
		Extensions: []ExtensionType{ExtensionAppDataDictionary}, Proposals: []ProposalType{ProposalAppDataUpdate},
	}))
	r := newRoom(t, cs, ext)
	if private {
		r.whispers()
	}
	names := 1
	name := func() string { names++; return fmt.Sprintf("client %d", names) }
	someone := func() *client { return r.members[rnd.IntN(len(r.members))] }
	other := func(c *client) *client {
		for {
			if o := someone(); o != c || len(r.members) == 1 {
				return o
			}
		}
	}
	proposed := make(map[LeafIndex]bool) // leaves with a pending Remove
	for range steps {
		c := someone()
		switch op := rnd.IntN(15); {
		case op < 3 && len(r.members) < 14:
			if len(proposed) > 0 && proposed[c.OwnLeaf()] {
				break
			}
			clear(proposed)
			list := []string{name(), name(), name()}
			r.add(c, list[:1+rnd.IntN(3)]...)
		case op == 3:
			r.propose(c.ProposeUpdate(c.store, UpdateOptions{}))
		case op == 4 && len(r.members) > 3:
			at := other(c).OwnLeaf()
			r.propose(c.Propose(c.store, nil, remove(at)))
			proposed[at] = true
		case op == 5 && len(r.members) > 3:
			at := other(c).OwnLeaf()
			r.propose(ExternalProposal(cs, c.cfg.rand(), external, 0, c.GroupID(), c.Epoch(), nil, remove(at)))
			proposed[at] = true
		case op == 6:
			r.propose(c.Propose(c.store, nil, appData(ComponentID(0x8001+rnd.IntN(2)), fmt.Sprint(rnd.IntN(100)))))
		case op == 7:
			r.propose(c.Propose(c.store, nil, sharedPSK()))
		case op == 8 && len(r.members) < 14:
			newcomer, kp, _ := keyPackage(t, cs, name()) // if committed, a member who never comes
			if rnd.IntN(2) == 0 {
				r.propose(c.Propose(c.store, nil, add(kp)))
			} else {
				r.propose(NewMemberProposal(c.cfg.rand(), newcomer.signer, kp, c.GroupID(), c.Epoch(), nil))
			}
		case op == 9 && len(r.members) < 14:
			clear(proposed)
			r.join(name())
		case op == 10 && len(r.members) > 1:
			clear(proposed)
			r.join(c.name, remove(c.OwnLeaf()))
		case op == 11:
			r.talk()
		case op == 12 && len(r.members) > 3 && c.state.selfRemoveOf(c.OwnLeaf()) == nil:
			r.propose(c.ProposeSelfRemove(c.store))
			proposed[c.OwnLeaf()] = true
		default:
			o := CommitOptions{ForcePath: rnd.IntN(2) == 0, SkipPending: rnd.IntN(4) == 0}
			if rnd.IntN(3) == 0 {
				o.Proposals = append(o.Proposals, Proposal{Type: ProposalPSK, PSK: &PreSharedKey{PSK: PreSharedKeyID{
					Type: PSKResumption, Usage: UsageApplication, GroupID: c.GroupID(), Epoch: c.Epoch()}}})
			}
			clear(proposed)
			r.commit(c, o)
		}
		r.check()
		for _, c := range r.members {
			if rnd.IntN(8) == 0 {
				c.reload(t)
			}
		}
		if r.server != nil && rnd.IntN(8) == 0 {
			if r.server, err = LoadPublicGroup(publicConfig(), r.store.all()); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.checkStores()
	r.commit(r.members[0], CommitOptions{})
	r.talk()
	r.checkStores()
}
