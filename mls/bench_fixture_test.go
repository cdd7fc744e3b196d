package mls

import (
	"cmp"
	"crypto"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"testing"
)

// A benchKind is what a group for measurements looks like.
type benchKind struct {
	n     int
	shape treeShape
	x509  bool
	suite CipherSuite // 0: testSuite
}

func (k benchKind) cs() CipherSuite { return cmp.Or(k.suite, testSuite) }

// treeShape is how a tree came about.
type treeShape string

const (
	fullTree     treeShape = "full"     // everybody committed: no parent is blank that could have a key
	freshTree    treeShape = "fresh"    // one commit with a path added all: the parents above leaf 0 have keys
	unmergedTree treeShape = "unmerged" // as fresh, but all came later: they are unmerged at each parent above leaf 0
)

func (k benchKind) String() string {
	cred := "basic"
	if k.x509 {
		cred = "x509"
	}
	if k.suite != 0 {
		cred = k.suite.String() + "/" + cred
	}
	return fmt.Sprintf("%s/%s/%d", cred, k.shape, k.n)
}

// benchGroup is a group all of whose private keys are known, so that any member's view of it can be made.
type benchGroup struct {
	benchKind
	tree        *RatchetTree
	ctx         GroupContext
	epochSecret secret
	signers     []crypto.Signer
	keys        map[NodeIndex]HPKEPrivateKey
	counts      *roster
	auth        CredentialVerifier
}

var benchGroups = struct {
	sync.Mutex
	m map[benchKind]*benchGroup
}{m: make(map[benchKind]*benchGroup)}

// benchGroupOf returns the group of a kind, which is built once in a process.
func benchGroupOf(tb testing.TB, k benchKind) *benchGroup {
	benchGroups.Lock()
	defer benchGroups.Unlock()
	g := benchGroups.m[k]
	if g == nil {
		var err error
		if g, err = buildBenchGroup(k); err != nil {
			tb.Fatal(err)
		}
		benchGroups.m[k] = g
	}
	return g
}

// benchMember is a client for measurements, made from a number so that it is the same each time.
type benchMember struct {
	signer  crypto.Signer
	cred    Credential
	kp      *KeyPackage
	secrets *KeyPackageSecrets
}

func (k benchKind) newMember(number int) (m benchMember, err error) {
	rand := seededRand(uint64(number) + 1<<32)
	if m.signer, err = k.cs().GenerateSignatureKey(rand); err != nil {
		return m, err
	}
	id := fmt.Sprintf("mimi://alpha.example/d/%012d", number)
	m.cred = BasicCredential([]byte(id))
	if k.x509 {
		if m.cred, err = benchIssuer().certify(rand, number, id, m.signer.Public()); err != nil {
			return m, err
		}
	}
	m.kp, m.secrets, err = NewKeyPackage(KeyPackageOptions{Rand: rand, Suite: k.cs(), Credential: m.cred, Signer: m.signer})
	return m, err
}

func (k benchKind) newMembers(from, n int) ([]benchMember, error) {
	members := make([]benchMember, n)
	return members, parallel(n, func(i int) (err error) {
		members[i], err = k.newMember(from + i)
		return err
	})
}

func buildBenchGroup(k benchKind) (*benchGroup, error) {
	g := &benchGroup{benchKind: k, signers: make([]crypto.Signer, k.n), keys: make(map[NodeIndex]HPKEPrivateKey)}
	g.auth = g.newVerifier()
	members, err := k.newMembers(0, k.n)
	if err != nil {
		return nil, err
	}
	if g.tree, err = emptyRatchetTree(slotsFor(uint32(k.n))); err != nil {
		return nil, err
	}
	for i, m := range members {
		g.signers[i] = m.signer
		at := LeafIndex(i)
		g.tree.setLeaf(at, &m.kp.LeafNode)
		g.keys[at.node()] = m.secrets.EncryptionKey
	}
	g.tree.firstBlank = LeafIndex(k.n)
	rand := seededRand(uint64(k.n))
	groupID := []byte("group")
	if err := g.fill(rand, groupID, g.tree.root(), []byte{}, true); err != nil {
		return nil, err
	}
	if g.epochSecret, err = k.cs().randomSecret(rand); err != nil {
		return nil, err
	}
	g.ctx = GroupContext{Version: MLS10, CipherSuite: k.cs(), GroupID: groupID, Epoch: 1, TreeHash: g.tree.Hash(k.cs()),
		ConfirmedTranscriptHash: []byte{}}
	g.tree.clearDirty()
	all, err := rosterOf(g.tree, g.auth)
	if err != nil {
		return nil, err
	}
	g.counts = &roster{tally: newTally()}
	g.counts.merge(all)
	return g, nil
}

// fill gives the parents below and at n keys, as if the leftmost member below had committed last, and signs the leaves.
// parentHash is what n has to carry, lowest says whether leaf 0 is below.
func (g *benchGroup) fill(rand io.Reader, groupID []byte, n NodeIndex, parentHash []byte, spine bool) error {
	if n.isLeaf() {
		l := g.tree.Leaf(n.leaf())
		if l == nil || !spine && g.shape != fullTree {
			return nil
		}
		l = l.clone()
		l.Source, l.Lifetime, l.ParentHash = LeafNodeCommit, Lifetime{}, parentHash
		if err := l.sign(g.cs(), rand, g.signers[n.leaf()], groupID, n.leaf()); err != nil {
			return err
		}
		g.tree.setLeaf(n.leaf(), l)
		return nil
	}
	left, right := n.left(), n.right()
	if g.tree.resolutionEmpty(right) || !spine && g.shape != fullTree {
		return g.fill(rand, groupID, left, parentHash, spine)
	}
	stale := make([]byte, g.cs().HashSize()) // right was updated before n was
	_, _ = rand.Read(stale)
	if err := g.fill(rand, groupID, right, stale, false); err != nil {
		return err
	}
	pub, priv, err := g.cs().GenerateHPKEKey(rand)
	if err != nil {
		return err
	}
	p := &ParentNode{EncryptionKey: pub, ParentHash: parentHash}
	if g.shape == unmergedTree {
		for i := LeafIndex(1); i <= n.last() && int(i) < g.n; i++ {
			if i&(i-1) != 0 { // the others were there, one below each parent's right child
				p.UnmergedLeaves = append(p.UnmergedLeaves, i)
			}
		}
	}
	g.tree.setParent(n, p)
	g.keys[n] = priv
	return g.fill(rand, groupID, left, g.tree.parentHash(g.cs(), p, right), spine)
}

// newVerifier returns a verifier that has seen no credential yet.
func (g *benchGroup) newVerifier() CredentialVerifier {
	if g.x509 {
		return benchIssuer().verifier()
	}
	return benchVerifier{}
}

// view returns the public part of the group with that roster.
func (g *benchGroup) view(counts *roster) (publicState, *epochSecrets) {
	es := g.cs().epochSecretsFrom(g.epochSecret)
	p := newPublicState(g.ctx, g.tree.clone(), es.confirmationTag(g.cs(), g.ctx.ConfirmedTranscriptHash))
	p.counts = counts
	return p, es
}

// member returns a member's view of the group.
func (g *benchGroup) member(tb testing.TB, i LeafIndex) *Group {
	tb.Helper()
	return g.memberWith(tb, i, g.counts.clone())
}

func (g *benchGroup) memberWith(tb testing.TB, i LeafIndex, counts *roster) *Group {
	tb.Helper()
	p, es := g.view(counts)
	m := &Group{cfg: Config{Verifier: g.auth}, own: i, active: true, private: newTreePrivate(i, g.keys[i.node()]),
		signers: make(map[string]crypto.Signer), state: p}
	for n := i.node(); n != g.tree.root(); {
		n = n.parent()
		if p := g.tree.parentNode(n); p != nil && !contains(p.UnmergedLeaves, i) {
			m.private.keys[n] = g.keys[n]
		}
	}
	sealers, err := m.cfg.newSealers()
	must(tb, err)
	m.start(es, sealers)
	must(tb, m.AddSigner(g.signers[i]))
	m.saveEpoch(discard{})
	return m
}

func contains(leaves []LeafIndex, i LeafIndex) bool { return len(within(leaves, i.node())) > 0 }

// server returns a server's view of the group.
func (g *benchGroup) server() *PublicGroup {
	p, _ := g.view(g.counts.clone())
	cfg := PublicConfig{Verifier: g.auth}
	s := &PublicGroup{rules: cfg.rules(), state: p}
	s.publish()
	return s
}

func (r *roster) clone() *roster {
	t := tally{r.members, maps.Clone(r.uses), maps.Clone(r.credentials), maps.Clone(r.extensions), maps.Clone(r.proposals)}
	return &roster{t, slices.Clone(r.signature), slices.Clone(r.encryption), slices.Clone(r.identity)}
}

// benchVerifier takes basic credentials at their word.
type benchVerifier struct{}

func (benchVerifier) VerifyCredential(Credential, []byte, CipherSuite) error { return nil }
func (benchVerifier) ValidSuccessor(_, _ Credential) error                   { return nil }
func (benchVerifier) Identity(c Credential) ([]byte, error)                  { return c.Identity, nil }

// TestBenchGroupsAreValid has every kind of group judged as a joiner judges it, and its members agree after a commit.
func TestBenchGroupsAreValid(t *testing.T) {
	for _, k := range []benchKind{{2, fullTree, false, 0}, {3, fullTree, true, 0}, {10, fullTree, false, 0}, {100, fullTree, false, 0},
		{2, freshTree, false, 0}, {9, freshTree, true, 0}, {100, freshTree, false, 0}, {100, unmergedTree, false, 0}, {13, unmergedTree, false, 0},
		{7, fullTree, true, MLKEM768_AES256GCM_SHA384_MLDSA65}} {
		t.Run(k.String(), func(t *testing.T) {
			g := benchGroupOf(t, k)
			if err := fresh(t, g.tree).validate(g.cs(), g.ctx.GroupID, nil); err != nil {
				t.Fatal(err)
			}
			alice := g.member(t, 0)
			c, err := alice.Commit(nil, CommitOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := alice.Confirm(nil); err != nil {
				t.Fatal(err)
			}
			server := g.server()
			s, err := server.CheckCommit(c.Message().Public)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.CheckGroupInfo(c.GroupInfo()); err != nil {
				t.Fatal(err)
			}
			for i := 1; i < k.n; i += 1 + k.n/5 {
				m := g.member(t, LeafIndex(i))
				r, err := m.Receive(nil, c.Message())
				if err != nil {
					t.Fatal(err)
				}
				if err := m.Apply(nil, r.(*StagedCommit)); err != nil {
					t.Fatal(err)
				}
				if string(m.EpochAuthenticator()) != string(alice.EpochAuthenticator()) {
					t.Errorf("member %d doesn't agree", i)
				}
			}
		})
	}
}
