package mls

import (
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// countingBatch counts the bytes that an operation stores.
type countingBatch struct{ bytes int }

func (c *countingBatch) Set(k, v []byte) { c.bytes += len(k) + len(v) }
func (c *countingBatch) Delete(k []byte) { c.bytes += len(k) }

// benchOp is an operation that is measured: for a kind of group, what to do before each run and how to run it, which
// returns the bytes that it puts on the wire or takes from it.
type benchOp struct {
	name  string
	setup func(tb testing.TB, g *benchGroup) (prepare func(), run func(b Batch) (wire int))
}

func size(m codec.Marshaler) int { return len(codec.Marshal(m)) }

// welcomeSize is the size of what a commit sends to the group and to new members.
func commitSize(c *PendingCommit) int {
	n := size(c.Message())
	if w := c.Welcome(); w != nil {
		n += size(w)
	}
	return n
}

var benchOps = []benchOp{
	{"KeyPackage", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		m := benchMembersOf(tb, g, 1)[0]
		return nil, func(Batch) int {
			kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: g.cs(), Credential: m.cred, Signer: m.signer})
			must(tb, err)
			return size(kp)
		}
	}},
	{"Add", benchAdd(CommitOptions{ForcePath: true})},
	{"AddWithoutPath", benchAdd(CommitOptions{})},
	{"AddAll", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		o := CommitOptions{ForcePath: true}
		for _, m := range benchMembersOf(tb, g, g.n-1) {
			o.Proposals = append(o.Proposals, add(m.kp))
		}
		alone := benchGroupOf(tb, benchKind{1, fullTree, g.x509, g.suite})
		var alice *Group
		return func() {
			alice = alone.member(tb, 0)
			alice.cfg.Verifier = g.auth
		}, func(b Batch) int { return commitSize(commitAndMerge(tb, alice, b, o)) }
	}},
	{"Update", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		alice := g.member(tb, 0)
		return nil, func(b Batch) int { return commitSize(commitAndMerge(tb, alice, b, CommitOptions{})) }
	}},
	{"ProcessUpdate", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		return benchProcess(tb, g, spread(g)...)
	}},
	{"ProcessUpdateNearest", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		return benchProcess(tb, g, 1)
	}},
	{"Follow", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		alice, server := g.member(tb, 0), g.server()
		var c *PendingCommit
		return func() { c = commitAndMerge(tb, alice, nil, CommitOptions{}) }, func(b Batch) int {
			s, err := server.CheckCommit(c.Message().Public)
			must(tb, err)
			must(tb, s.CheckGroupInfo(c.GroupInfo()))
			must(tb, server.Apply(b, s, c.GroupInfo()))
			return 0
		}
	}},
	{"Join", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		j := newBenchJoin(tb, g)
		return nil, func(b Batch) int {
			j.join(tb, b)
			return len(j.tree) + len(j.welcome)
		}
	}},
	{"Send", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		alice, data := g.member(tb, 0), make([]byte, 100)
		return nil, func(b Batch) int {
			m, err := alice.Encrypt(b, nil, data)
			must(tb, err)
			return size(m)
		}
	}},
	{"Receive", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		alice, bob, data := g.member(tb, 0), g.member(tb, LeafIndex(g.n/2)), make([]byte, 100)
		var m *MLSMessage
		return func() {
				var err error
				m, err = alice.Encrypt(nil, nil, data)
				must(tb, err)
			}, func(b Batch) int {
				_, err := bob.Receive(b, m)
				must(tb, err)
				return 0
			}
	}},
	{"Save", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		alice := g.member(tb, 0)
		return nil, func(b Batch) int {
			alice.saveAll(b)
			return 0
		}
	}},
	{"Load", func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		alice, store := g.member(tb, 0), newMemStore()
		alice.messages = newSecretTree(g.cs(), alice.state.tree.Size(), make(secret, g.cs().HashSize()))
		alice.saveAll(store)
		return nil, func(Batch) int {
			_, err := LoadGroup(Config{Verifier: g.auth}, g.signers[0], store.all())
			must(tb, err)
			return 0
		}
	}},
}

func must(tb testing.TB, err error) {
	if err != nil {
		tb.Helper()
		tb.Fatal(err)
	}
}

// benchMembersOf returns n clients that aren't in the group, whose KeyPackages are validated.
func benchMembersOf(tb testing.TB, g *benchGroup, n int) []benchMember {
	members, err := g.newMembers(1<<20, n)
	must(tb, err)
	must(tb, parallel(n, func(i int) error { return members[i].kp.Validate(time.Now(), g.auth) }))
	return members
}

func commitAndMerge(tb testing.TB, g *Group, b Batch, o CommitOptions) *PendingCommit {
	c, err := g.Commit(b, o)
	must(tb, err)
	must(tb, g.Confirm(b))
	return c
}

// benchAdd adds one client to a group that is as it was before each time.
func benchAdd(o CommitOptions) func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
	return func(tb testing.TB, g *benchGroup) (func(), func(Batch) int) {
		o := o
		o.Proposals = []Proposal{add(benchMembersOf(tb, g, 1)[0].kp)}
		counts := g.counts.clone()
		var alice *Group
		var c *PendingCommit
		return func() {
				if c != nil { // take back what merging it counted
					counts.merge(c.evolution.change.negated())
				}
				alice = g.memberWith(tb, 0, counts)
			}, func(b Batch) int {
				c = commitAndMerge(tb, alice, b, o)
				return commitSize(c)
			}
	}
}

func (r *rosterChange) negated() *rosterChange {
	t := tally{-r.members, negated(r.uses), negated(r.credentials), negated(r.extensions), negated(r.proposals)}
	return &rosterChange{t, negated(r.signature), negated(r.encryption), negated(r.identity)}
}

func negated[T comparable, N int | int32](m map[T]N) map[T]N {
	out := make(map[T]N, len(m))
	for k, n := range m {
		out[k] = -n
	}
	return out
}

// spread returns leaves, evenly spread without leaf 0.
func spread(g *benchGroup) []LeafIndex {
	n := min(16, g.n-1)
	leaves := make([]LeafIndex, n)
	for i := range leaves {
		leaves[i] = LeafIndex(1 + (2*i+1)*(g.n-1)/(2*n))
	}
	return leaves
}

// benchProcess has members receive and apply updates, one after the other the same.
func benchProcess(tb testing.TB, g *benchGroup, leaves ...LeafIndex) (func(), func(Batch) int) {
	alice := g.member(tb, 0)
	var members []*Group
	for _, i := range leaves {
		members = append(members, g.member(tb, i))
	}
	var c *PendingCommit
	next := 0
	return func() {
			if next %= len(members); next == 0 {
				c = commitAndMerge(tb, alice, nil, CommitOptions{})
			}
		}, func(b Batch) int {
			m := members[next]
			next++
			r, err := m.Receive(b, c.Message())
			must(tb, err)
			must(tb, m.Apply(b, r.(*StagedCommit)))
			return 0
		}
}

// benchJoin is what a new member gets.
type benchJoin struct {
	benchMember
	group         *benchGroup
	tree, welcome []byte
}

func newBenchJoin(tb testing.TB, g *benchGroup) *benchJoin {
	j := &benchJoin{benchMember: benchMembersOf(tb, g, 1)[0], group: g}
	c, err := g.member(tb, 0).Commit(nil, CommitOptions{Proposals: []Proposal{add(j.kp)}})
	must(tb, err)
	j.tree, j.welcome = codec.Marshal(c.Tree()), codec.Marshal(c.Welcome())
	return j
}

// join joins as a client that has met none of the members.
func (j *benchJoin) join(tb testing.TB, b Batch) *Group {
	tree, err := ParseRatchetTree(j.tree)
	must(tb, err)
	var w Welcome
	must(tb, codec.Unmarshal(j.welcome, &w))
	m, err := JoinGroup(Config{Verifier: j.group.newVerifier()}, b, j.signer, &w, j.kp, j.secrets, tree)
	must(tb, err)
	return m
}

// BenchmarkGroup measures each operation in groups of all sizes. A name is operation/credentials/tree/members; -cpu 1,2 sets
// the cores. TestTable prints the same with the limits that the primitives set.
func BenchmarkGroup(b *testing.B) {
	for _, op := range benchOps {
		for _, k := range benchKinds(testing.Short()) {
			b.Run(op.name+"/"+k.String(), func(b *testing.B) {
				prepare, run := op.setup(b, benchGroupOf(b, k))
				var stored countingBatch
				wire, n := 0, 0
				b.ReportAllocs()
				for b.Loop() {
					if prepare != nil {
						b.StopTimer()
						prepare()
						b.StartTimer()
					}
					wire = run(&stored)
					n++
				}
				if wire > 0 {
					b.ReportMetric(float64(wire), "wire-B/op")
				}
				b.ReportMetric(float64(stored.bytes)/float64(n), "stored-B/op")
			})
		}
	}
}

func benchKinds(short bool) []benchKind {
	sizes := []int{2, 10, 100, 1_000, 10_000}
	if short {
		sizes = sizes[:4]
	}
	var kinds []benchKind
	for _, chains := range []bool{false, true} {
		for _, shape := range []treeShape{fullTree, freshTree} {
			for _, n := range sizes {
				kinds = append(kinds, benchKind{n, shape, chains, 0})
			}
		}
	}
	return kinds
}
