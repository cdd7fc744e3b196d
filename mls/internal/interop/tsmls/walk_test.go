package tsmls

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls"
)

// TestMembersOfBothAgreeOnARandomWalk has members of both kinds do what comes to their minds. A failure names the seed
// and what was done.
func TestMembersOfBothAgreeOnARandomWalk(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			o := options{suite: mls.X25519_AES128GCM_SHA256_Ed25519, psks: []psk{{[]byte("one"), []byte("a secret")}}}
			creator := []kind{ours, theirs}[seed%2]
			w := &walk{r: newRoom(t, startNode(t), "room", creator, o, nil), rand: rand.New(rand.NewPCG(seed, 0))}
			defer func() {
				if t.Failed() {
					t.Logf("seed %d:\n%s", seed, w.log)
				}
			}()
			w.r.private = func() bool { return w.chance(25) }
			w.r.add(w.r.members[0], true, creator.other(), creator, creator.other())
			for range 30 {
				w.step()
			}
			w.r.talk()
			t.Logf("epoch %d, %d members, %d refused a valid tree", w.r.server.Epoch(), len(w.r.members), w.r.outside)
		})
	}
}

type walk struct {
	r    *room
	rand *rand.Rand
	log  []byte
}

func (w *walk) did(format string, args ...any) {
	w.log = fmt.Appendf(w.log, "%d: "+format+"\n", append([]any{w.r.server.Epoch()}, args...)...)
}

func (w *walk) chance(percent int) bool { return w.rand.IntN(100) < percent }

func (w *walk) kind() kind { return []kind{ours, theirs}[w.rand.IntN(2)] }

// member returns a member that isn't in except.
func (w *walk) member(except ...party) party {
	for {
		p := w.r.members[w.rand.IntN(len(w.r.members))]
		excluded := false
		for _, e := range except {
			excluded = excluded || e == p
		}
		if !excluded {
			return p
		}
	}
}

// first returns the member at leaf 0, which stays. Without members in the left half of the tree the root isn't on the
// filtered direct path of a committer; its commit secret follows from the path secret of the last node that is (RFC
// 9420, Section 12.4.1), but ts-mls makes another.
func (w *walk) first() party {
	for _, p := range w.r.members {
		if w.r.leaf(p) == 0 {
			return p
		}
	}
	return nil
}

func (w *walk) step() {
	r := w.r
	switch n := len(r.members); {
	case w.chance(15):
		from := w.member()
		w.did("%s talks", from.name())
		r.say(from)
	case n < 10 && w.chance(15):
		from, k, tree := w.member(), w.kind(), w.chance(50)
		w.did("%s joins by %s", k, from.name())
		r.join(k, from, tree)
	case n > 2 && w.chance(10):
		p := w.member()
		from := w.member(p)
		w.did("%s replaces itself by %s", p.name(), from.name())
		r.resync(p, from)
	default:
		w.epoch()
	}
}

// epoch has some members propose and one commit, some by reference and some by value.
func (w *walk) epoch() {
	r := w.r
	by := w.member()
	touched := []party{by} // one proposal for a leaf
	var joiners []party
	o := commitOptions{treeInWelcome: w.chance(50)}
	for range w.rand.IntN(4) {
		from := w.member()
		var p *mls.Proposal
		switch n := len(r.members); {
		case w.chance(20):
			p = external("one")
			p.PSK.PSK.Nonce = slices.Repeat([]byte{byte(w.rand.Uint32())}, 32)
		case n < 10 && w.chance(50):
			j, kp := r.client(w.kind())
			joiners = append(joiners, j)
			p = add(kp)
			w.did("add %s", j.name())
		case n > len(touched)+2 && w.chance(50):
			target := w.member(append(touched, w.first())...)
			touched = append(touched, target)
			p = remove(r.leaf(target))
			w.did("remove %s", target.name())
		case len(touched) < n:
			from = w.member(touched...)
			touched = append(touched, from)
			w.did("update %s", from.name())
			r.propose(from, nil)
			continue
		default:
			continue
		}
		if from != by && w.chance(60) {
			w.did("... by %s", from.name())
			r.propose(from, p)
		} else {
			o.proposals = append(o.proposals, *p)
		}
	}
	w.did("commit of %s, %d by value", by.name(), len(o.proposals))
	c := r.commit(by, o)
	if len(joiners) > 0 {
		r.welcome(c, o.treeInWelcome, joiners...)
	}
}
