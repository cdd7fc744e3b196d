package authority

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls"
)

// rows is a client's or server's store in memory.
type rows map[string][]byte

func (r rows) Set(k, v []byte) { r[string(k)] = bytes.Clone(v) }
func (r rows) Delete(k []byte) { delete(r, string(k)) }

// member is a device in a group.
type member struct {
	*device
	*mls.Group
	rows
	chain [][]byte
}

// certifiedGroup is a group whose members have certificates of a real authority, and the hub that follows it.
type certifiedGroup struct {
	*testing.T
	f       *fixture
	cfg     mls.Config
	server  *mls.PublicGroup
	rows    rows
	members []*member
}

func (g *certifiedGroup) keyPackage(m *member) (*mls.KeyPackage, *mls.KeyPackageSecrets) {
	g.Helper()
	kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: m.suite, Credential: mls.X509Credential(m.chain), Signer: m.key})
	ok(g, err)
	ok(g, kp.Validate(g.f.clock.Now(), g.f.Verifier().ForHub()))
	return kp, secrets
}

// commit has a member's commit accepted by the hub and applied by all others.
func (g *certifiedGroup) commit(by *member, o mls.CommitOptions) *mls.PendingCommit {
	g.Helper()
	c, err := by.Commit(by.rows, o)
	ok(g, err)
	s, err := g.server.CheckCommit(c.Message().Public)
	ok(g, err)
	ok(g, s.CheckGroupInfo(c.GroupInfo()))
	ok(g, g.server.Apply(g.rows, s, c.GroupInfo()))
	ok(g, by.Confirm(by.rows))
	for _, m := range g.members {
		if m != by {
			r, err := m.Receive(m.rows, c.Message())
			ok(g, err)
			ok(g, m.Apply(m.rows, r.(*mls.StagedCommit)))
		}
	}
	g.members = slices.DeleteFunc(g.members, func(m *member) bool { return !m.Active() })
	return c
}

func (g *certifiedGroup) talk() {
	g.Helper()
	for _, from := range g.members {
		sent, err := from.Encrypt(from.rows, nil, []byte("hello of "+from.client))
		ok(g, err)
		for _, to := range g.members {
			if to == from {
				continue
			}
			r, err := to.Receive(to.rows, sent)
			ok(g, err)
			if m, is := r.(*mls.ApplicationMessage); !is || string(m.Data) != "hello of "+string(from.client) {
				g.Errorf("%s receives %+v", to.client, r)
			}
			if !bytes.Equal(from.EpochAuthenticator(), to.EpochAuthenticator()) {
				g.Errorf("%s and %s disagree", from.client, to.client)
			}
		}
	}
}

// TestGroupsOfCertifiedMembers has members add, update with a renewed credential, remove and talk, in all post-quantum
// suites and one other.
func TestGroupsOfCertifiedMembers(t *testing.T) {
	f := newFixture(t, "alpha.example")
	for _, suite := range mls.CipherSuites() {
		if suite < 0xf000 && suite != mls.X25519_AES128GCM_SHA256_Ed25519 {
			continue
		}
		t.Run(suite.String(), func(t *testing.T) {
			g := &certifiedGroup{T: t, f: f, cfg: mls.Config{Verifier: f.Verifier().ForClient()}, rows: rows{}}
			enrolled := func(user string) *member {
				m := &member{device: newDeviceOf(t, "alpha.example", user, fmt.Sprintf("%s-%d", user, suite), suite), rows: rows{}}
				m.chain = f.enrol(t, m.device)
				return m
			}
			alice, bob, carol := enrolled("alice"), enrolled("bob"), enrolled("carol")
			var err error
			alice.Group, err = mls.NewGroup(g.cfg, alice.rows, mls.GroupOptions{GroupID: []byte("g"), Suite: suite, Credential: mls.X509Credential(alice.chain), Signer: alice.key})
			ok(t, err)
			info, err := alice.GroupInfo(true, true)
			ok(t, err)
			g.server, err = mls.NewPublicGroup(mls.PublicConfig{Verifier: f.Verifier().ForHub()}, g.rows, info, nil)
			ok(t, err)
			g.members = []*member{alice}
			var adds []mls.Proposal
			var secrets []*mls.KeyPackageSecrets
			for _, m := range []*member{bob, carol} {
				kp, s := g.keyPackage(m)
				adds, secrets = append(adds, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}), append(secrets, s)
			}
			c := g.commit(alice, mls.CommitOptions{Proposals: adds, TreeInWelcome: true})
			for i, m := range []*member{bob, carol} {
				m.Group, err = mls.JoinGroup(g.cfg, m.rows, m.key, c.Welcome(), &adds[i].Add.KeyPackage, secrets[i], nil)
				ok(t, err)
				g.members = append(g.members, m)
			}
			g.talk()

			// Bob renews his certificate for a new key and commits it; carol proposes an update, which alice commits.
			bob.key, err = suite.GenerateSignatureKey(rand.Reader)
			ok(t, err)
			bob.chain, err = f.Renew(t.Context(), bob.chain, bob.csr(t))
			ok(t, err)
			renewed := mls.X509Credential(bob.chain)
			g.commit(bob, mls.CommitOptions{Credential: &renewed, Signer: bob.key})
			update, err := carol.ProposeUpdate(carol.rows, mls.UpdateOptions{})
			ok(t, err)
			staged, err := g.server.CheckProposal(update.Public)
			ok(t, err)
			ok(t, g.server.ApplyProposal(g.rows, staged))
			for _, m := range []*member{alice, bob} {
				_, err = m.Receive(m.rows, update)
				ok(t, err)
			}
			g.commit(alice, mls.CommitOptions{})
			g.talk()

			// A client with a certificate for another key can't be added, nor one whose certificate was revoked.
			eve := enrolled("eve")
			stolen := &member{device: eve.device, chain: alice.chain, rows: rows{}}
			kp, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: suite, Credential: mls.X509Credential(stolen.chain), Signer: eve.key})
			ok(t, err)
			var invalid *mls.ValidationError
			if _, err := alice.Commit(alice.rows, mls.CommitOptions{Proposals: []mls.Proposal{{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}}}); !errors.As(err, &invalid) || !errors.Is(err, ErrKeyMismatch) {
				t.Errorf("stolen certificate: got %v, want ErrKeyMismatch", err)
			}
			eveKP, _ := g.keyPackage(eve)
			_, err = f.Revoke(t.Context(), string(eve.client), "")
			ok(t, err)
			if err := eveKP.Validate(f.clock.Now(), f.Verifier().ForHub()); !errors.Is(err, ErrRevoked) {
				t.Errorf("revoked certificate: got %v, want ErrRevoked", err)
			}

			g.commit(alice, mls.CommitOptions{Proposals: []mls.Proposal{{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: bob.OwnLeaf()}}}})
			if len(g.members) != 2 || bob.Active() {
				t.Errorf("%d members after a removal", len(g.members))
			}
			g.talk()
		})
	}
}
