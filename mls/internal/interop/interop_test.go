package interop

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/internal/interop/api"
	"github.com/parley-mls/parley/mls/internal/interop/api/apiconnect"
)

// serve starts a client and returns a gRPC connection to it.
func serve(t *testing.T) apiconnect.MLSClientClient {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := NewServer()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-done; err != http.ErrServerClosed {
			t.Error(err)
		}
	})
	return apiconnect.NewMLSClientClient(&http.Client{Transport: transport}, "http://"+l.Addr().String(), connect.WithGRPC())
}

// method is a method of the generated client.
type method[Req, Resp any] func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error)

func try[Req, Resp any](m method[Req, Resp], req *Req) (*Resp, error) {
	resp, err := m(context.Background(), connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func do[Req, Resp any](t *testing.T, m method[Req, Resp], req *Req) *Resp {
	t.Helper()
	resp, err := try(m, req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// party is a client under the name by which the group knows it.
type party struct {
	rpc     apiconnect.MLSClientClient
	name    string
	state   uint32
	waiting uint32 // its transaction, or what waits for the successor
	key     []byte // its KeyPackage
}

// scenario is a group of parties at several servers.
type scenario struct {
	*testing.T
	suite   mls.CipherSuite
	encrypt bool
	servers []apiconnect.MLSClientClient
	members []*party
	parties int
}

func (s *scenario) party(name string) *party {
	s.parties++
	return &party{rpc: s.servers[s.parties%len(s.servers)], name: name}
}

func (s *scenario) create(name string) *party {
	s.Helper()
	p := s.party(name)
	p.state = do(s.T, p.rpc.CreateGroup, &api.CreateGroupRequest{GroupId: []byte("group"), CipherSuite: uint32(s.suite),
		EncryptHandshake: s.encrypt, Identity: []byte(name)}).GetStateId()
	s.members = []*party{p}
	return p
}

func (s *scenario) keyPackages(names ...string) []*party {
	s.Helper()
	var list []*party
	for _, n := range names {
		p := s.party(n)
		r := do(s.T, p.rpc.CreateKeyPackage, &api.CreateKeyPackageRequest{CipherSuite: uint32(s.suite), Identity: []byte(n)})
		p.waiting, p.key = r.GetTransactionId(), r.GetKeyPackage()
		if len(r.GetInitPriv()) == 0 || len(r.GetEncryptionPriv()) == 0 || len(r.GetSignaturePriv()) == 0 {
			s.Fatal("no private keys")
		}
		list = append(list, p)
	}
	return list
}

func adds(list []*party) []*api.ProposalDescription {
	var out []*api.ProposalDescription
	for _, p := range list {
		out = append(out, &api.ProposalDescription{ProposalType: []byte("add"), KeyPackage: p.key})
	}
	return out
}

// commit has a member commit, all others apply it, and joiners join; who is removed leaves.
func (s *scenario) commit(by *party, req *api.CommitRequest, joiners []*party, removed ...string) {
	s.Helper()
	req.StateId = by.state
	c := do(s.T, by.rpc.Commit, req)
	if (len(joiners) > 0) != (len(c.GetWelcome()) > 0) || req.GetExternalTree() != (len(c.GetRatchetTree()) > 0) {
		s.Fatal("welcome or tree is missing")
	}
	auth := do(s.T, by.rpc.HandlePendingCommit, &api.HandlePendingCommitRequest{StateId: by.state})
	by.state = auth.GetStateId()
	s.apply(by, req.GetByReference(), c.GetCommit(), auth.GetEpochAuthenticator(), removed...)
	for _, p := range joiners {
		r := do(s.T, p.rpc.JoinGroup, &api.JoinGroupRequest{TransactionId: p.waiting, Welcome: c.GetWelcome(), EncryptHandshake: s.encrypt,
			Identity: []byte(p.name), RatchetTree: c.GetRatchetTree()})
		s.same(p, r.GetEpochAuthenticator(), auth.GetEpochAuthenticator())
		p.state = r.GetStateId()
		s.members = append(s.members, p)
	}
	s.check()
}

func (s *scenario) same(p *party, got, want []byte) {
	s.Helper()
	if len(got) == 0 || !bytes.Equal(got, want) {
		s.Fatalf("%s is in another epoch", p.name)
	}
}

// apply has all members but one apply a commit.
func (s *scenario) apply(by *party, proposals [][]byte, commit, authenticator []byte, removed ...string) {
	s.Helper()
	var stay []*party
	for _, p := range s.members {
		if p == by {
			stay = append(stay, p)
			continue
		}
		r := do(s.T, p.rpc.HandleCommit, &api.HandleCommitRequest{StateId: p.state, Proposal: proposals, Commit: commit})
		p.state = r.GetStateId()
		if slices.Contains(removed, p.name) {
			if len(r.GetEpochAuthenticator()) > 0 {
				s.Fatalf("%s wasn't removed", p.name)
			}
			continue
		}
		s.same(p, r.GetEpochAuthenticator(), authenticator)
		stay = append(stay, p)
	}
	s.members = stay
}

// check compares what the members know, and has one of them send a message to the others.
func (s *scenario) check() {
	s.Helper()
	first := s.members[0]
	auth := do(s.T, first.rpc.StateAuth, &api.StateAuthRequest{StateId: first.state})
	export := &api.ExportRequest{Label: "label", Context: []byte("context"), KeyLength: 32}
	export.StateId = first.state
	want := do(s.T, first.rpc.Export, export).GetExportedSecret()
	for _, p := range s.members {
		s.same(p, do(s.T, p.rpc.StateAuth, &api.StateAuthRequest{StateId: p.state}).GetStateAuthSecret(), auth.GetStateAuthSecret())
		export.StateId = p.state
		if got := do(s.T, p.rpc.Export, export).GetExportedSecret(); len(got) != 32 || !bytes.Equal(got, want) {
			s.Fatalf("%s exports something else", p.name)
		}
	}
	s.say(s.members[len(want)%len(s.members)])
}

func (s *scenario) say(from *party) {
	s.Helper()
	text, aad := []byte("hello from "+from.name), []byte("aad")
	c := do(s.T, from.rpc.Protect, &api.ProtectRequest{StateId: from.state, AuthenticatedData: aad, Plaintext: text})
	for _, p := range s.members {
		if p == from {
			continue
		}
		r := do(s.T, p.rpc.Unprotect, &api.UnprotectRequest{StateId: p.state, Ciphertext: c.GetCiphertext()})
		if !bytes.Equal(r.GetPlaintext(), text) || !bytes.Equal(r.GetAuthenticatedData(), aad) {
			s.Fatalf("%s read %q with %q", p.name, r.GetPlaintext(), r.GetAuthenticatedData())
		}
	}
}

// group makes a group of several.
func (s *scenario) group(names ...string) {
	s.Helper()
	founder := s.create(names[0])
	joiners := s.keyPackages(names[1:]...)
	s.commit(founder, &api.CommitRequest{ByValue: adds(joiners)}, joiners)
}

// free ends a scenario.
func (s *scenario) free() {
	s.Helper()
	for _, p := range s.members {
		do(s.T, p.rpc.Free, &api.FreeRequest{StateId: p.state})
		if _, err := try(p.rpc.StateAuth, &api.StateAuthRequest{StateId: p.state}); connect.CodeOf(err) != connect.CodeNotFound {
			s.Errorf("freed state: got %v", err)
		}
	}
}

func (s *scenario) storePSK(id string) {
	s.Helper()
	for _, p := range s.members {
		do(s.T, p.rpc.StorePSK, &api.StorePSKRequest{StateOrTransactionId: p.state, PskId: []byte(id), PskSecret: []byte("secret " + id)})
	}
}

var emptyExtensions = []*api.Extension{{ExtensionType: 3, ExtensionData: []byte{0, 0, 0}}, {ExtensionType: 5, ExtensionData: []byte{0}}}

func welcomeJoin(s *scenario) {
	a := s.create("alice")
	b := s.keyPackages("bob")
	s.commit(a, &api.CommitRequest{ByValue: adds(b), ForcePath: true}, b)
	c := s.keyPackages("carol", "dave")
	s.commit(b[0], &api.CommitRequest{ByValue: adds(c), ExternalTree: true}, c)
	s.say(c[0])
	e := s.keyPackages("eve")
	p := do(s.T, a.rpc.AddProposal, &api.AddProposalRequest{StateId: a.state, KeyPackage: e[0].key}).GetProposal()
	s.commit(c[1], &api.CommitRequest{ByReference: [][]byte{p}}, e)
}

func application(s *scenario) {
	s.group("alice", "bob", "carol")
	for range 3 {
		for _, p := range s.members {
			s.say(p)
		}
	}
}

func commits(s *scenario) {
	s.group("alice", "bob", "carol", "dave")
	a, b, c := s.members[0], s.members[1], s.members[2]
	s.storePSK("psk")
	s.commit(a, new(api.CommitRequest), nil)
	update := do(s.T, b.rpc.UpdateProposal, &api.UpdateProposalRequest{StateId: b.state}).GetProposal()
	ext := do(s.T, c.rpc.GroupContextExtensionsProposal, &api.GroupContextExtensionsProposalRequest{StateId: c.state, Extensions: emptyExtensions}).GetProposal()
	s.commit(a, &api.CommitRequest{ByReference: [][]byte{update, ext}}, nil)
	psk := do(s.T, b.rpc.ExternalPSKProposal, &api.ExternalPSKProposalRequest{StateId: b.state, PskId: []byte("psk")}).GetProposal()
	resumption := do(s.T, b.rpc.ResumptionPSKProposal, &api.ResumptionPSKProposalRequest{StateId: b.state, EpochId: 2}).GetProposal()
	s.commit(b, &api.CommitRequest{ByReference: [][]byte{psk, resumption}}, nil) // its own
	remove := do(s.T, a.rpc.RemoveProposal, &api.RemoveProposalRequest{StateId: a.state, RemovedId: []byte("dave")}).GetProposal()
	s.commit(c, &api.CommitRequest{ByReference: [][]byte{remove}, ByValue: []*api.ProposalDescription{
		{ProposalType: []byte("externalPSK"), PskId: []byte("psk")}, {ProposalType: []byte("resumptionPSK"), EpochId: 3}}}, nil, "dave")
	e := s.keyPackages("eve")
	s.commit(b, &api.CommitRequest{ByValue: append(adds(e), &api.ProposalDescription{ProposalType: []byte("remove"), RemovedId: []byte("carol")},
		&api.ProposalDescription{ProposalType: []byte("groupContextExtensions"), Extensions: emptyExtensions[:1]})}, e, "carol")
}

// externalJoin lets a party join by what a member gives out.
func (s *scenario) externalJoin(from *party, name string, externalTree, removePrior bool, psks ...*api.PreSharedKey) {
	s.Helper()
	gi := do(s.T, from.rpc.GroupInfo, &api.GroupInfoRequest{StateId: from.state, ExternalTree: externalTree})
	if externalTree != (len(gi.GetRatchetTree()) > 0) {
		s.Fatal("tree at the wrong place")
	}
	p := s.party(name)
	r := do(s.T, p.rpc.ExternalJoin, &api.ExternalJoinRequest{GroupInfo: gi.GetGroupInfo(), RatchetTree: gi.GetRatchetTree(),
		EncryptHandshake: s.encrypt, Identity: []byte(name), RemovePrior: removePrior, Psks: psks})
	p.state = r.GetStateId()
	var removed []string
	if removePrior {
		removed = append(removed, name)
	}
	s.apply(nil, nil, r.GetCommit(), r.GetEpochAuthenticator(), removed...)
	s.members = append(s.members, p)
	s.check()
}

func externalJoin(s *scenario) {
	s.group("alice", "bob")
	s.storePSK("psk")
	s.externalJoin(s.members[0], "carol", false, false, &api.PreSharedKey{PskId: []byte("psk"), PskSecret: []byte("secret psk")})
	s.externalJoin(s.members[2], "dave", true, false)
	s.externalJoin(s.members[1], "dave", true, true)
	s.commit(s.members[3], new(api.CommitRequest), nil)
}

func externalProposals(s *scenario) {
	s.group("alice", "bob", "carol")
	a := s.members[0]
	s.storePSK("psk")
	d := s.party("dave")
	gi := do(s.T, a.rpc.GroupInfo, &api.GroupInfoRequest{StateId: a.state})
	r := do(s.T, d.rpc.NewMemberAddProposal, &api.NewMemberAddProposalRequest{GroupInfo: gi.GetGroupInfo(), Identity: []byte("dave")})
	d.waiting = r.GetTransactionId()
	do(s.T, d.rpc.StorePSK, &api.StorePSKRequest{StateOrTransactionId: d.waiting, PskId: []byte("psk"), PskSecret: []byte("secret psk")})
	s.commit(a, &api.CommitRequest{ByReference: [][]byte{r.GetProposal()}, ByValue: []*api.ProposalDescription{
		{ProposalType: []byte("externalPSK"), PskId: []byte("psk")}}}, []*party{d})

	senders := s.servers[1]
	var signers []uint32
	for _, name := range []string{"one", "two"} {
		e := do(s.T, senders.CreateExternalSigner, &api.CreateExternalSignerRequest{CipherSuite: uint32(s.suite), Identity: []byte(name)})
		p := do(s.T, a.rpc.AddExternalSigner, &api.AddExternalSignerRequest{StateId: a.state, ExternalSender: e.GetExternalSender()}).GetProposal()
		s.commit(s.members[1], &api.CommitRequest{ByReference: [][]byte{p}}, nil)
		signers = append(signers, e.GetSignerId())
	}
	ask := func(i int, d *api.ProposalDescription) []byte {
		s.Helper()
		gi := do(s.T, a.rpc.GroupInfo, &api.GroupInfoRequest{StateId: a.state, ExternalTree: i == 0})
		return do(s.T, senders.ExternalSignerProposal, &api.ExternalSignerProposalRequest{SignerId: signers[i], SignerIndex: uint32(i),
			GroupInfo: gi.GetGroupInfo(), RatchetTree: gi.GetRatchetTree(), Description: d}).GetProposal()
	}
	e := s.keyPackages("eve")
	s.commit(a, &api.CommitRequest{ByReference: [][]byte{ask(0, adds(e)[0]), ask(1, &api.ProposalDescription{ProposalType: []byte("remove"),
		RemovedId: []byte("bob")})}}, e, "bob")
	s.commit(s.members[1], &api.CommitRequest{ByReference: [][]byte{
		ask(1, &api.ProposalDescription{ProposalType: []byte("resumptionPSK"), EpochId: 5})}}, nil)
	s.reinit(a, s.members[1], "next", ask(0, &api.ProposalDescription{ProposalType: []byte("reinit"), GroupId: []byte("next"), CipherSuite: uint32(s.suite)}), false)
}

// reinit commits a ReInit and goes on with the successor.
func (s *scenario) reinit(committer, welcomer *party, id string, proposal []byte, externalTree bool) {
	s.Helper()
	c := do(s.T, committer.rpc.ReInitCommit, &api.CommitRequest{StateId: committer.state, ByReference: [][]byte{proposal}})
	var auth []byte
	var keys [][]byte
	for _, p := range append([]*party{committer}, s.members...) {
		var r *api.HandleReInitCommitResponse
		switch {
		case auth == nil:
			r = do(s.T, p.rpc.HandlePendingReInitCommit, &api.HandlePendingCommitRequest{StateId: p.state})
			auth = r.GetEpochAuthenticator()
		case p == committer:
			continue
		default:
			r = do(s.T, p.rpc.HandleReInitCommit, &api.HandleCommitRequest{StateId: p.state, Proposal: [][]byte{proposal}, Commit: c.GetCommit()})
		}
		s.same(p, r.GetEpochAuthenticator(), auth)
		p.waiting = r.GetReinitId()
		if p != welcomer {
			keys = append(keys, r.GetKeyPackage())
		}
	}
	w := do(s.T, welcomer.rpc.ReInitWelcome, &api.ReInitWelcomeRequest{ReinitId: welcomer.waiting, KeyPackage: keys, ForcePath: externalTree, ExternalTree: externalTree})
	welcomer.state = w.GetStateId()
	for _, p := range s.members {
		if p == welcomer {
			continue
		}
		r := do(s.T, p.rpc.HandleReInitWelcome, &api.HandleReInitWelcomeRequest{ReinitId: p.waiting, Welcome: w.GetWelcome(), RatchetTree: w.GetRatchetTree()})
		s.same(p, r.GetEpochAuthenticator(), w.GetEpochAuthenticator())
		p.state = r.GetStateId()
	}
	s.check()
}

func reinit(s *scenario) {
	s.group("alice", "bob", "carol")
	suites := mls.CipherSuites()
	from := s.suite
	for i, suite := range []mls.CipherSuite{suites[(slices.Index(suites, from)+1)%len(suites)], from} {
		p := s.members[i]
		proposal := do(s.T, p.rpc.ReInitProposal, &api.ReInitProposalRequest{StateId: p.state, CipherSuite: uint32(suite),
			GroupId: fmt.Appendf(nil, "next %d", i), Extensions: emptyExtensions[:i]}).GetProposal()
		s.suite = suite
		s.reinit(s.members[1], s.members[2-i], "next", proposal, i == 1)
		s.commit(s.members[0], new(api.CommitRequest), nil)
	}
}

func branch(s *scenario) {
	s.group("alice", "bob", "carol", "dave")
	for i, externalTree := range []bool{false, true} {
		old := s.members
		by, others := old[i], old[2:]
		var joiners []*party
		for _, o := range others {
			p := &party{rpc: o.rpc, name: o.name}
			k := do(s.T, p.rpc.CreateKeyPackage, &api.CreateKeyPackageRequest{CipherSuite: uint32(s.suite), Identity: []byte(p.name)})
			p.waiting, p.key = k.GetTransactionId(), k.GetKeyPackage()
			joiners = append(joiners, p)
		}
		w := do(s.T, by.rpc.CreateBranch, &api.CreateBranchRequest{StateId: by.state, GroupId: fmt.Appendf(nil, "branch %d", i),
			Extensions: emptyExtensions[:i], KeyPackages: [][]byte{joiners[0].key, joiners[1].key}, ForcePath: externalTree, ExternalTree: externalTree})
		s.members = []*party{{rpc: by.rpc, name: by.name, state: w.GetStateId()}}
		for j, p := range joiners {
			r := do(s.T, p.rpc.HandleBranch, &api.HandleBranchRequest{StateId: others[j].state, TransactionId: p.waiting,
				Welcome: w.GetWelcome(), RatchetTree: w.GetRatchetTree()})
			s.same(p, r.GetEpochAuthenticator(), w.GetEpochAuthenticator())
			p.state = r.GetStateId()
			s.members = append(s.members, p)
		}
		s.check()
		s.commit(s.members[1], new(api.CommitRequest), nil)
		s.free()
		s.members = old
		s.check() // the group that was branched goes on
	}
}

// deep does random things: additions, or resumption keys, which joiners don't have; updates, removes and external joins.
func deep(s *scenario, rnd *rand.Rand, steps int) {
	s.group("member 0", "member 1", "member 2")
	names, epoch := 3, uint64(1)
	for range steps {
		epoch++
		by := s.members[rnd.IntN(len(s.members))]
		if rnd.IntN(5) == 0 {
			s.externalJoin(by, s.members[rnd.IntN(len(s.members))].name, rnd.IntN(2) == 0, true)
			continue
		}
		req := &api.CommitRequest{ForcePath: rnd.IntN(2) == 0, ExternalTree: rnd.IntN(2) == 0}
		var removed []string
		var joiners []*party
		keys := rnd.IntN(3) == 0
		for _, p := range s.members {
			switch n := rnd.IntN(6); {
			case n == 0 && p != by:
				req.ByReference = append(req.ByReference, do(s.T, p.rpc.UpdateProposal, &api.UpdateProposalRequest{StateId: p.state}).GetProposal())
			case n == 1 && p != by && len(removed) == 0 && len(s.members) > 3:
				removed = append(removed, p.name)
				req.ByValue = append(req.ByValue, &api.ProposalDescription{ProposalType: []byte("remove"), RemovedId: []byte(p.name)})
			case n == 2 && keys:
				req.ByReference = append(req.ByReference, do(s.T, p.rpc.ResumptionPSKProposal,
					&api.ResumptionPSKProposalRequest{StateId: p.state, EpochId: epoch - 1}).GetProposal())
			case n == 3 && !keys && len(s.members)+len(joiners) < 7:
				j := s.keyPackages(fmt.Sprintf("member %d", names))
				names++
				joiners = append(joiners, j...)
				req.ByReference = append(req.ByReference, do(s.T, p.rpc.AddProposal, &api.AddProposalRequest{StateId: p.state, KeyPackage: j[0].key}).GetProposal())
			case n == 4 && !keys && len(s.members)+len(joiners) < 7:
				j := s.keyPackages(fmt.Sprintf("member %d", names))
				names++
				joiners = append(joiners, j...)
				req.ByValue = append(req.ByValue, adds(j)...)
			}
		}
		s.commit(by, req, joiners, removed...)
	}
}

// TestScenariosOfTheHarness has our client on all sides: everything in two suites, the shorter scenarios in the others,
// which have public and private handshakes in turn.
func TestScenariosOfTheHarness(t *testing.T) {
	servers := []apiconnect.MLSClientClient{serve(t), serve(t)}
	list := do(t, servers[0].SupportedCiphersuites, new(api.SupportedCiphersuitesRequest)).GetCiphersuites()
	if len(list) != len(mls.CipherSuites()) || do(t, servers[0].Name, new(api.NameRequest)).GetName() == "" {
		t.Fatalf("%d cipher suites", len(list))
	}
	for i, suite := range list {
		for _, encrypt := range []bool{false, true} {
			run := func(name string, f func(*scenario)) {
				t.Run(fmt.Sprintf("%v/%s/private %v", mls.CipherSuite(suite), name, encrypt), func(t *testing.T) {
					s := &scenario{T: t, suite: mls.CipherSuite(suite), encrypt: encrypt, servers: servers}
					f(s)
					s.free()
				})
			}
			if i >= 2 && encrypt == (i%2 == 0) {
				continue
			}
			run("welcome_join", welcomeJoin)
			run("commit", commits)
			run("external_join", externalJoin)
			run("reinit", reinit)
			if i >= 2 {
				continue
			}
			run("application", application)
			run("external_proposals", externalProposals)
			run("branch", branch)
			run("deep_random", func(s *scenario) { deep(s, rand.New(rand.NewPCG(uint64(i), 1)), 20) })
		}
	}
}
