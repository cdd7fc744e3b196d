package interop

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/internal/interop/api"
	"github.com/parley-mls/parley/mls/internal/interop/api/apiconnect"
)

// refusals calls every method that takes an id or bytes with those given, and returns the errors by method. state is of
// a member, tx of a KeyPackage, signer of an external sender, next of who waits for a successor.
func refusals(c apiconnect.MLSClientClient, state, tx, signer, next uint32, b []byte) map[string]error {
	id := []byte("x")
	add := &api.ProposalDescription{ProposalType: []byte("add"), KeyPackage: b}
	errs := make(map[string]error)
	note := func(name string, err error) { errs[name] = err }
	note("JoinGroup", second(try(c.JoinGroup, &api.JoinGroupRequest{TransactionId: tx, Welcome: b, RatchetTree: b})))
	note("Unprotect", second(try(c.Unprotect, &api.UnprotectRequest{StateId: state, Ciphertext: b})))
	note("AddProposal", second(try(c.AddProposal, &api.AddProposalRequest{StateId: state, KeyPackage: b})))
	note("RemoveProposal", second(try(c.RemoveProposal, &api.RemoveProposalRequest{StateId: state, RemovedId: b})))
	note("GroupContextExtensionsProposal", second(try(c.GroupContextExtensionsProposal, &api.GroupContextExtensionsProposalRequest{
		StateId: state, Extensions: []*api.Extension{{ExtensionType: 1 << 16, ExtensionData: b}}})))
	note("AddExternalSigner", second(try(c.AddExternalSigner, &api.AddExternalSignerRequest{StateId: state, ExternalSender: b})))
	note("ReInitProposal", second(try(c.ReInitProposal, &api.ReInitProposalRequest{StateId: state, CipherSuite: 77, GroupId: id})))
	note("Export", second(try(c.Export, &api.ExportRequest{StateId: state, KeyLength: 1 << 31})))
	note("Commit by reference", second(try(c.Commit, &api.CommitRequest{StateId: state, ByReference: [][]byte{b}})))
	note("Commit by value", second(try(c.Commit, &api.CommitRequest{StateId: state, ByValue: []*api.ProposalDescription{add}})))
	note("ReInitCommit", second(try(c.ReInitCommit, &api.CommitRequest{StateId: state, ByValue: []*api.ProposalDescription{{ProposalType: b}}})))
	note("HandleCommit", second(try(c.HandleCommit, &api.HandleCommitRequest{StateId: state, Commit: b})))
	note("HandleCommit with a proposal", second(try(c.HandleCommit, &api.HandleCommitRequest{StateId: state, Proposal: [][]byte{b}})))
	note("HandleReInitCommit", second(try(c.HandleReInitCommit, &api.HandleCommitRequest{StateId: state, Commit: b})))
	note("ReInitWelcome", second(try(c.ReInitWelcome, &api.ReInitWelcomeRequest{ReinitId: next, KeyPackage: [][]byte{b}})))
	note("HandleReInitWelcome", second(try(c.HandleReInitWelcome, &api.HandleReInitWelcomeRequest{ReinitId: next, Welcome: b, RatchetTree: b})))
	note("CreateBranch", second(try(c.CreateBranch, &api.CreateBranchRequest{StateId: state, GroupId: id, KeyPackages: [][]byte{b}})))
	note("HandleBranch", second(try(c.HandleBranch, &api.HandleBranchRequest{StateId: state, TransactionId: tx, Welcome: b, RatchetTree: b})))
	note("ExternalSignerProposal", second(try(c.ExternalSignerProposal, &api.ExternalSignerProposalRequest{SignerId: signer, GroupInfo: b, RatchetTree: b, Description: add})))
	return errs
}

func second[T any](_ T, err error) error { return err }

func TestUnknownIDsAreNotFound(t *testing.T) {
	c := serve(t)
	const id = 1234
	errs := refusals(c, id, id, id, id, nil)
	for what, err := range map[string]error{
		"Free":                      second(try(c.Free, &api.FreeRequest{StateId: id})),
		"GroupInfo":                 second(try(c.GroupInfo, &api.GroupInfoRequest{StateId: id})),
		"StateAuth":                 second(try(c.StateAuth, &api.StateAuthRequest{StateId: id})),
		"Protect":                   second(try(c.Protect, &api.ProtectRequest{StateId: id})),
		"StorePSK":                  second(try(c.StorePSK, &api.StorePSKRequest{StateOrTransactionId: id})),
		"UpdateProposal":            second(try(c.UpdateProposal, &api.UpdateProposalRequest{StateId: id})),
		"ExternalPSKProposal":       second(try(c.ExternalPSKProposal, &api.ExternalPSKProposalRequest{StateId: id})),
		"ResumptionPSKProposal":     second(try(c.ResumptionPSKProposal, &api.ResumptionPSKProposalRequest{StateId: id})),
		"HandlePendingCommit":       second(try(c.HandlePendingCommit, &api.HandlePendingCommitRequest{StateId: id})),
		"HandlePendingReInitCommit": second(try(c.HandlePendingReInitCommit, &api.HandlePendingCommitRequest{StateId: id})),
	} {
		errs[what] = err
	}
	for what, err := range errs {
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("%s: got %v, want not found", what, err)
		}
	}
	// A state isn't a transaction.
	g := do(t, c.CreateGroup, &api.CreateGroupRequest{GroupId: []byte("g"), CipherSuite: 1, Identity: []byte("alice")})
	if _, err := try(c.JoinGroup, &api.JoinGroupRequest{TransactionId: g.GetStateId()}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("got %v, want not found", err)
	}
}

// TestBadInputIsRefused gives all methods bytes that aren't what they should be, random ones and true messages of other
// kinds, cut and changed. The states stay as they are.
func TestBadInputIsRefused(t *testing.T) {
	s := &scenario{T: t, suite: mls.X25519_AES128GCM_SHA256_Ed25519, servers: []apiconnect.MLSClientClient{serve(t)}}
	s.group("alice", "bob")
	a, c := s.members[0], s.servers[0]
	tx := s.keyPackages("eve")[0]
	signer := do(t, c.CreateExternalSigner, &api.CreateExternalSignerRequest{CipherSuite: 1, Identity: []byte("hub")})
	ended := do(t, c.CreateGroup, &api.CreateGroupRequest{GroupId: []byte("old"), CipherSuite: 1, Identity: []byte("alice")}).GetStateId()
	do(t, c.ReInitCommit, &api.CommitRequest{StateId: ended, ByValue: []*api.ProposalDescription{{ProposalType: []byte("reinit"), GroupId: []byte("new"), CipherSuite: 2}}})
	next := do(t, c.HandlePendingReInitCommit, &api.HandlePendingCommitRequest{StateId: ended}).GetReinitId()

	gi := do(t, c.GroupInfo, &api.GroupInfoRequest{StateId: a.state, ExternalTree: true})
	message := do(t, c.Protect, &api.ProtectRequest{StateId: a.state, Plaintext: []byte("x")}).GetCiphertext()
	inputs := [][]byte{nil, {0}, gi.GetGroupInfo(), gi.GetRatchetTree(), message, bytes.Repeat([]byte{0xff}, 100)}
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, b := range inputs[2:5] {
		cut, changed := b[:rnd.IntN(len(b))], bytes.Clone(b)
		changed[rnd.IntN(len(b))] ^= 0x55
		inputs = append(inputs, cut, changed)
	}
	for i, b := range inputs {
		for what, err := range refusals(c, a.state, tx.waiting, signer.GetSignerId(), next, b) {
			if connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%s with input %d: got %v, want an invalid argument", what, i, err)
			}
		}
		for what, err := range map[string]error{
			"ExternalJoin":         second(try(c.ExternalJoin, &api.ExternalJoinRequest{GroupInfo: b, RatchetTree: []byte{1}})),
			"NewMemberAddProposal": second(try(c.NewMemberAddProposal, &api.NewMemberAddProposalRequest{GroupInfo: b[:len(b)/2]})),
		} {
			if connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%s with input %d: got %v, want an invalid argument", what, i, err)
			}
		}
	}
	for what, err := range map[string]error{
		"group of an unknown suite":       second(try(c.CreateGroup, &api.CreateGroupRequest{CipherSuite: 1 << 20})),
		"key package of an unknown suite": second(try(c.CreateKeyPackage, &api.CreateKeyPackageRequest{CipherSuite: 0})),
		"signer of an unknown suite":      second(try(c.CreateExternalSigner, &api.CreateExternalSignerRequest{CipherSuite: 77})),
		"unknown proposal":                second(try(c.Commit, &api.CommitRequest{StateId: a.state, ByValue: []*api.ProposalDescription{nil}})),
		"key that isn't there":            second(try(c.Commit, &api.CommitRequest{StateId: a.state, ByValue: []*api.ProposalDescription{{ProposalType: []byte("externalPSK"), PskId: []byte("x")}}})),
	} {
		if connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: got %v, want an invalid argument", what, err)
		}
	}
	// What doesn't fit the state.
	do(t, c.UpdateProposal, &api.UpdateProposalRequest{StateId: s.members[1].state})
	for what, err := range map[string]error{
		"no commit is staged":              second(try(c.HandlePendingCommit, &api.HandlePendingCommitRequest{StateId: a.state})),
		"no reinit is staged":              second(try(c.HandlePendingReInitCommit, &api.HandlePendingCommitRequest{StateId: a.state})),
		"message with a proposal pending":  second(try(c.Protect, &api.ProtectRequest{StateId: s.members[1].state})),
		"reference of what is an own leaf": ownUpdate(s),
	} {
		if connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("%s: got %v, want a failed precondition", what, err)
		}
	}
	s.commit(a, new(api.CommitRequest), nil)
	s.free()
}

// ownUpdate has a member commit its own Update, which it may not.
func ownUpdate(s *scenario) error {
	b := s.members[1]
	p := do(s.T, b.rpc.UpdateProposal, &api.UpdateProposalRequest{StateId: b.state})
	return second(try(b.rpc.Commit, &api.CommitRequest{StateId: b.state, ByReference: [][]byte{p.GetProposal()}}))
}

// TestStatesAreBounded: what nobody frees ends in an error.
func TestStatesAreBounded(t *testing.T) {
	s := New()
	for range maxObjects {
		if _, err := s.add(new(state)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.add(new(state)); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("got %v, want exhausted", err)
	}
	delete(s.objects, 7)
	s.next = 6
	if id, err := s.add(new(state)); err != nil || id != 7 {
		t.Errorf("id %d, %v", id, err)
	}
}
