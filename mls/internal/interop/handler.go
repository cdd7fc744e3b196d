package interop

import (
	"context"
	"crypto/rand"
	"errors"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/mls/internal/interop/api"
)

// handler has the interface's methods. They run one at a time.
type handler struct{ s *Service }

// call is how a method runs on a Service.
func call[Req, Resp any](h *handler, req *connect.Request[Req], f func(*Service, *Req) (*Resp, error)) (*connect.Response[Resp], error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	resp, err := f(h.s, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

// withState is how a method runs on a state.
func withState[Req, Resp any](h *handler, req *connect.Request[Req], id uint32, f func(*state, *Req) (*Resp, error)) (*connect.Response[Resp], error) {
	return call(h, req, func(s *Service, r *Req) (*Resp, error) {
		st, err := get[*state](s, id)
		if err != nil {
			return nil, err
		}
		return f(st, r)
	})
}

// propose is how a member proposes.
func propose[Req any](h *handler, req *connect.Request[Req], id uint32, f func(*state, *Req) (mls.Proposal, error)) (*connect.Response[api.ProposalResponse], error) {
	return withState(h, req, id, func(st *state, r *Req) (*api.ProposalResponse, error) {
		p, err := f(st, r)
		if err != nil {
			return nil, err
		}
		b, err := st.sent(st.group.Propose(nil, nil, p))
		return &api.ProposalResponse{Proposal: b}, err
	})
}

// describe is propose of a description.
func describe[Req any](h *handler, req *connect.Request[Req], id uint32, d *api.ProposalDescription) (*connect.Response[api.ProposalResponse], error) {
	return propose(h, req, id, func(st *state, _ *Req) (mls.Proposal, error) {
		return proposal(d, st.group.Tree(), st.group.GroupID())
	})
}

func (h *handler) Name(_ context.Context, _ *connect.Request[api.NameRequest]) (*connect.Response[api.NameResponse], error) {
	return connect.NewResponse(&api.NameResponse{Name: "Parley"}), nil
}

func (h *handler) SupportedCiphersuites(_ context.Context, _ *connect.Request[api.SupportedCiphersuitesRequest]) (*connect.Response[api.SupportedCiphersuitesResponse], error) {
	resp := new(api.SupportedCiphersuitesResponse)
	for _, cs := range mls.CipherSuites() {
		resp.Ciphersuites = append(resp.Ciphersuites, uint32(cs))
	}
	return connect.NewResponse(resp), nil
}

func (h *handler) Free(_ context.Context, req *connect.Request[api.FreeRequest]) (*connect.Response[api.FreeResponse], error) {
	return call(h, req, func(s *Service, r *api.FreeRequest) (*api.FreeResponse, error) {
		if _, err := get[any](s, r.GetStateId()); err != nil {
			return nil, err
		}
		delete(s.objects, r.GetStateId())
		return new(api.FreeResponse), nil
	})
}

func (h *handler) CreateGroup(_ context.Context, req *connect.Request[api.CreateGroupRequest]) (*connect.Response[api.CreateGroupResponse], error) {
	return call(h, req, func(s *Service, r *api.CreateGroupRequest) (*api.CreateGroupResponse, error) {
		cs, err := suiteOf(r.GetCipherSuite())
		if err != nil {
			return nil, err
		}
		t, err := newTransaction(cs, r.GetIdentity())
		if err != nil {
			return nil, err
		}
		g, err := mls.NewGroup(config(t.psks, r.GetEncryptHandshake()), nil, mls.GroupOptions{
			GroupID: r.GetGroupId(), Suite: cs, Credential: mls.BasicCredential(r.GetIdentity()), Signer: t.signer,
		})
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.add(t.state(g))
		return &api.CreateGroupResponse{StateId: id}, err
	})
}

func (h *handler) CreateKeyPackage(_ context.Context, req *connect.Request[api.CreateKeyPackageRequest]) (*connect.Response[api.CreateKeyPackageResponse], error) {
	return call(h, req, func(s *Service, r *api.CreateKeyPackageRequest) (*api.CreateKeyPackageResponse, error) {
		cs, err := suiteOf(r.GetCipherSuite())
		if err != nil {
			return nil, err
		}
		t, err := newTransaction(cs, r.GetIdentity())
		if err != nil {
			return nil, err
		}
		id, err := s.add(t)
		return &api.CreateKeyPackageResponse{
			TransactionId: id, KeyPackage: codec.Marshal(mls.NewMLSMessage(t.kp)), InitPriv: t.secrets.InitKey,
			EncryptionPriv: t.secrets.EncryptionKey, SignaturePriv: signaturePrivateKey(t.signer),
		}, err
	})
}

func (h *handler) JoinGroup(_ context.Context, req *connect.Request[api.JoinGroupRequest]) (*connect.Response[api.JoinGroupResponse], error) {
	return call(h, req, func(s *Service, r *api.JoinGroupRequest) (*api.JoinGroupResponse, error) {
		t, err := get[*transaction](s, r.GetTransactionId())
		if err != nil {
			return nil, err
		}
		w, err := welcome(r.GetWelcome())
		if err != nil {
			return nil, err
		}
		tree, err := ratchetTree(r.GetRatchetTree())
		if err != nil {
			return nil, err
		}
		g, err := mls.JoinGroup(config(t.psks, r.GetEncryptHandshake()), nil, t.signer, w, t.kp, t.secrets, tree)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.replace(r.GetTransactionId(), t.state(g))
		return &api.JoinGroupResponse{StateId: id, EpochAuthenticator: g.EpochAuthenticator()}, err
	})
}

func (h *handler) ExternalJoin(_ context.Context, req *connect.Request[api.ExternalJoinRequest]) (*connect.Response[api.ExternalJoinResponse], error) {
	return call(h, req, func(s *Service, r *api.ExternalJoinRequest) (*api.ExternalJoinResponse, error) {
		gi, err := groupInfo(r.GetGroupInfo())
		if err != nil {
			return nil, err
		}
		tree, err := treeOf(gi, r.GetRatchetTree())
		if err != nil {
			return nil, err
		}
		t, err := newTransaction(gi.GroupContext.CipherSuite, r.GetIdentity())
		if err != nil {
			return nil, err
		}
		o := mls.ExternalJoinOptions{GroupInfo: gi, Tree: tree, Credential: mls.BasicCredential(r.GetIdentity()), Signer: t.signer}
		for _, psk := range r.GetPsks() {
			t.psks[string(psk.GetPskId())] = psk.GetPskSecret()
			o.Proposals = append(o.Proposals, pskProposal(mls.PreSharedKeyID{Type: mls.PSKExternal, ID: psk.GetPskId()}))
		}
		if r.GetRemovePrior() {
			p, err := removeProposal(tree, r.GetIdentity())
			if err != nil {
				return nil, err
			}
			o.Proposals = append(o.Proposals, p)
		}
		p, err := mls.ExternalJoin(config(t.psks, r.GetEncryptHandshake()), o)
		if err != nil {
			return nil, bad(err)
		}
		g, err := p.Confirm(nil)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.add(t.state(g))
		return &api.ExternalJoinResponse{StateId: id, Commit: codec.Marshal(p.Message()), EpochAuthenticator: g.EpochAuthenticator()}, err
	})
}

func (h *handler) NewMemberAddProposal(_ context.Context, req *connect.Request[api.NewMemberAddProposalRequest]) (*connect.Response[api.NewMemberAddProposalResponse], error) {
	return call(h, req, func(s *Service, r *api.NewMemberAddProposalRequest) (*api.NewMemberAddProposalResponse, error) {
		gi, err := groupInfo(r.GetGroupInfo())
		if err != nil {
			return nil, err
		}
		ctx := gi.GroupContext
		t, err := newTransaction(ctx.CipherSuite, r.GetIdentity())
		if err != nil {
			return nil, err
		}
		m, err := mls.NewMemberProposal(rand.Reader, t.signer, t.kp, ctx.GroupID, ctx.Epoch, nil)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.add(t)
		return &api.NewMemberAddProposalResponse{
			TransactionId: id, Proposal: codec.Marshal(m), InitPriv: t.secrets.InitKey,
			EncryptionPriv: t.secrets.EncryptionKey, SignaturePriv: signaturePrivateKey(t.signer),
		}, err
	})
}

func (h *handler) GroupInfo(_ context.Context, req *connect.Request[api.GroupInfoRequest]) (*connect.Response[api.GroupInfoResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, r *api.GroupInfoRequest) (*api.GroupInfoResponse, error) {
		gi, err := st.group.GroupInfo(!r.GetExternalTree(), true)
		if err != nil {
			return nil, refused(err)
		}
		return &api.GroupInfoResponse{
			GroupInfo: codec.Marshal(mls.NewMLSMessage(gi)), RatchetTree: marshalTree(st.group.Tree(), r.GetExternalTree()),
		}, nil
	})
}

func (h *handler) StateAuth(_ context.Context, req *connect.Request[api.StateAuthRequest]) (*connect.Response[api.StateAuthResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, _ *api.StateAuthRequest) (*api.StateAuthResponse, error) {
		return &api.StateAuthResponse{StateAuthSecret: st.group.EpochAuthenticator()}, nil
	})
}

func (h *handler) Export(_ context.Context, req *connect.Request[api.ExportRequest]) (*connect.Response[api.ExportResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, r *api.ExportRequest) (*api.ExportResponse, error) {
		b, err := st.group.Export(r.GetLabel(), r.GetContext(), int(r.GetKeyLength()))
		if err != nil {
			return nil, bad(err)
		}
		return &api.ExportResponse{ExportedSecret: b}, nil
	})
}

func (h *handler) Protect(_ context.Context, req *connect.Request[api.ProtectRequest]) (*connect.Response[api.ProtectResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, r *api.ProtectRequest) (*api.ProtectResponse, error) {
		m, err := st.group.Encrypt(nil, r.GetAuthenticatedData(), r.GetPlaintext())
		if err != nil {
			return nil, refused(err)
		}
		return &api.ProtectResponse{Ciphertext: codec.Marshal(m)}, nil
	})
}

func (h *handler) Unprotect(_ context.Context, req *connect.Request[api.UnprotectRequest]) (*connect.Response[api.UnprotectResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, r *api.UnprotectRequest) (*api.UnprotectResponse, error) {
		m, err := message(r.GetCiphertext())
		if err != nil {
			return nil, err
		}
		if m.Private == nil || m.Private.ContentType != mls.ContentApplication {
			return nil, bad(errors.New("not an application message"))
		}
		got, err := st.group.Receive(nil, m)
		if err != nil {
			return nil, bad(err)
		}
		a, ok := got.(*mls.ApplicationMessage)
		if !ok {
			return nil, bad(errors.New("not an application message"))
		}
		return &api.UnprotectResponse{AuthenticatedData: a.AAD, Plaintext: a.Data}, nil
	})
}

func (h *handler) StorePSK(_ context.Context, req *connect.Request[api.StorePSKRequest]) (*connect.Response[api.StorePSKResponse], error) {
	return call(h, req, func(s *Service, r *api.StorePSKRequest) (*api.StorePSKResponse, error) {
		id := r.GetStateOrTransactionId()
		if st, err := get[*state](s, id); err == nil {
			st.psks[string(r.GetPskId())] = r.GetPskSecret()
			return new(api.StorePSKResponse), nil
		}
		t, err := get[*transaction](s, id)
		if err != nil {
			return nil, err
		}
		t.psks[string(r.GetPskId())] = r.GetPskSecret()
		return new(api.StorePSKResponse), nil
	})
}

func (h *handler) AddProposal(_ context.Context, req *connect.Request[api.AddProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return describe(h, req, req.Msg.GetStateId(), &api.ProposalDescription{ProposalType: []byte("add"), KeyPackage: req.Msg.GetKeyPackage()})
}

func (h *handler) UpdateProposal(_ context.Context, req *connect.Request[api.UpdateProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, _ *api.UpdateProposalRequest) (*api.ProposalResponse, error) {
		b, err := st.sent(st.group.ProposeUpdate(nil, mls.UpdateOptions{}))
		return &api.ProposalResponse{Proposal: b}, err
	})
}

func (h *handler) RemoveProposal(_ context.Context, req *connect.Request[api.RemoveProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return describe(h, req, req.Msg.GetStateId(), &api.ProposalDescription{ProposalType: []byte("remove"), RemovedId: req.Msg.GetRemovedId()})
}

func (h *handler) ExternalPSKProposal(_ context.Context, req *connect.Request[api.ExternalPSKProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return describe(h, req, req.Msg.GetStateId(), &api.ProposalDescription{ProposalType: []byte("externalPSK"), PskId: req.Msg.GetPskId()})
}

func (h *handler) ResumptionPSKProposal(_ context.Context, req *connect.Request[api.ResumptionPSKProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return describe(h, req, req.Msg.GetStateId(), &api.ProposalDescription{ProposalType: []byte("resumptionPSK"), EpochId: req.Msg.GetEpochId()})
}

func (h *handler) GroupContextExtensionsProposal(_ context.Context, req *connect.Request[api.GroupContextExtensionsProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return describe(h, req, req.Msg.GetStateId(), &api.ProposalDescription{ProposalType: []byte("groupContextExtensions"), Extensions: req.Msg.GetExtensions()})
}

func (h *handler) ReInitProposal(_ context.Context, req *connect.Request[api.ReInitProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return describe(h, req, req.Msg.GetStateId(), &api.ProposalDescription{ProposalType: []byte("reinit"), GroupId: req.Msg.GetGroupId(),
		CipherSuite: req.Msg.GetCipherSuite(), Extensions: req.Msg.GetExtensions()})
}

func (h *handler) AddExternalSigner(_ context.Context, req *connect.Request[api.AddExternalSignerRequest]) (*connect.Response[api.ProposalResponse], error) {
	return propose(h, req, req.Msg.GetStateId(), func(st *state, r *api.AddExternalSignerRequest) (mls.Proposal, error) {
		var sender mls.ExternalSender
		var senders mls.ExternalSenders
		if err := codec.Unmarshal(r.GetExternalSender(), &sender); err != nil {
			return mls.Proposal{}, bad(err)
		}
		if data, ok := st.group.Extension(mls.ExtensionExternalSenders); ok {
			if err := codec.Unmarshal(data, &senders); err != nil {
				return mls.Proposal{}, bad(err)
			}
		}
		senders = append(senders, sender)
		return extensionsProposal(st.group.Context().Extensions.Set(mls.ExtensionExternalSenders, codec.Marshal(senders))), nil
	})
}

func (h *handler) CreateExternalSigner(_ context.Context, req *connect.Request[api.CreateExternalSignerRequest]) (*connect.Response[api.CreateExternalSignerResponse], error) {
	return call(h, req, func(s *Service, r *api.CreateExternalSignerRequest) (*api.CreateExternalSignerResponse, error) {
		cs, err := suiteOf(r.GetCipherSuite())
		if err != nil {
			return nil, err
		}
		signer, err := cs.GenerateSignatureKey(rand.Reader)
		if err != nil {
			return nil, bad(err)
		}
		key, err := cs.SignaturePublicKey(signer.Public())
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.add(&externalSigner{suite: cs, signer: signer})
		return &api.CreateExternalSignerResponse{SignerId: id, ExternalSender: codec.Marshal(mls.ExternalSender{
			SignatureKey: key, Credential: mls.BasicCredential(r.GetIdentity())})}, err
	})
}

func (h *handler) ExternalSignerProposal(_ context.Context, req *connect.Request[api.ExternalSignerProposalRequest]) (*connect.Response[api.ProposalResponse], error) {
	return call(h, req, func(s *Service, r *api.ExternalSignerProposalRequest) (*api.ProposalResponse, error) {
		e, err := get[*externalSigner](s, r.GetSignerId())
		if err != nil {
			return nil, err
		}
		gi, err := groupInfo(r.GetGroupInfo())
		if err != nil {
			return nil, err
		}
		tree, err := treeOf(gi, r.GetRatchetTree())
		if err != nil {
			return nil, err
		}
		ctx := gi.GroupContext
		p, err := proposal(r.GetDescription(), tree, ctx.GroupID)
		if err != nil {
			return nil, err
		}
		m, err := mls.ExternalProposal(e.suite, rand.Reader, e.signer, r.GetSignerIndex(), ctx.GroupID, ctx.Epoch, nil, p)
		if err != nil {
			return nil, bad(err)
		}
		return &api.ProposalResponse{Proposal: codec.Marshal(m)}, nil
	})
}

func commit(st *state, r *api.CommitRequest) (*api.CommitResponse, error) {
	c, err := st.commit(r)
	if err != nil {
		return nil, err
	}
	return &api.CommitResponse{
		Commit: codec.Marshal(c.Message()), Welcome: marshalWelcome(c.Welcome()), RatchetTree: marshalTree(c.Tree(), r.GetExternalTree()),
	}, nil
}

func (h *handler) Commit(_ context.Context, req *connect.Request[api.CommitRequest]) (*connect.Response[api.CommitResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), commit)
}

func (h *handler) ReInitCommit(_ context.Context, req *connect.Request[api.CommitRequest]) (*connect.Response[api.CommitResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), commit)
}

func (h *handler) HandlePendingCommit(_ context.Context, req *connect.Request[api.HandlePendingCommitRequest]) (*connect.Response[api.HandleCommitResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, r *api.HandlePendingCommitRequest) (*api.HandleCommitResponse, error) {
		if err := st.confirm(); err != nil {
			return nil, err
		}
		return &api.HandleCommitResponse{StateId: r.GetStateId(), EpochAuthenticator: st.group.EpochAuthenticator()}, nil
	})
}

func (h *handler) HandleCommit(_ context.Context, req *connect.Request[api.HandleCommitRequest]) (*connect.Response[api.HandleCommitResponse], error) {
	return withState(h, req, req.Msg.GetStateId(), func(st *state, r *api.HandleCommitRequest) (*api.HandleCommitResponse, error) {
		if err := st.handle(r.GetProposal(), r.GetCommit()); err != nil {
			return nil, err
		}
		return &api.HandleCommitResponse{StateId: r.GetStateId(), EpochAuthenticator: st.group.EpochAuthenticator()}, nil
	})
}

// ended has a state, to which apply applied the commit of a ReInit, wait for the successor in its place.
func ended[Req any](h *handler, req *connect.Request[Req], id uint32, apply func(*state) error) (*connect.Response[api.HandleReInitCommitResponse], error) {
	return call(h, req, func(s *Service, _ *Req) (*api.HandleReInitCommitResponse, error) {
		st, err := get[*state](s, id)
		if err != nil {
			return nil, err
		}
		if err := apply(st); err != nil {
			return nil, err
		}
		next, n, err := s.ended(st)
		if err != nil {
			return nil, err
		}
		delete(s.objects, id)
		return &api.HandleReInitCommitResponse{
			ReinitId: next, KeyPackage: codec.Marshal(mls.NewMLSMessage(n.kp)), EpochAuthenticator: st.group.EpochAuthenticator(),
		}, nil
	})
}

func (h *handler) HandlePendingReInitCommit(_ context.Context, req *connect.Request[api.HandlePendingCommitRequest]) (*connect.Response[api.HandleReInitCommitResponse], error) {
	return ended(h, req, req.Msg.GetStateId(), (*state).confirm)
}

func (h *handler) HandleReInitCommit(_ context.Context, req *connect.Request[api.HandleCommitRequest]) (*connect.Response[api.HandleReInitCommitResponse], error) {
	return ended(h, req, req.Msg.GetStateId(), func(st *state) error {
		return st.handle(req.Msg.GetProposal(), req.Msg.GetCommit())
	})
}

func linkOptions(t *transaction, keyPackages [][]byte, path, externalTree bool) (mls.LinkOptions, error) {
	o := mls.LinkOptions{Credential: mls.BasicCredential(t.identity), Signer: t.signer, ForcePath: path, TreeInWelcome: !externalTree}
	for _, b := range keyPackages {
		kp, err := keyPackage(b)
		if err != nil {
			return o, err
		}
		o.KeyPackages = append(o.KeyPackages, kp)
	}
	return o, nil
}

func (h *handler) ReInitWelcome(_ context.Context, req *connect.Request[api.ReInitWelcomeRequest]) (*connect.Response[api.CreateSubgroupResponse], error) {
	return call(h, req, func(s *Service, r *api.ReInitWelcomeRequest) (*api.CreateSubgroupResponse, error) {
		n, err := get[*successor](s, r.GetReinitId())
		if err != nil {
			return nil, err
		}
		o, err := linkOptions(n.transaction, r.GetKeyPackage(), r.GetForcePath(), r.GetExternalTree())
		if err != nil {
			return nil, err
		}
		g, w, err := n.old.group.NewSuccessor(nil, o)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.replace(r.GetReinitId(), n.state(g))
		return subgroup(id, g, w, r.GetExternalTree()), err
	})
}

func subgroup(id uint32, g *mls.Group, w *mls.Welcome, externalTree bool) *api.CreateSubgroupResponse {
	return &api.CreateSubgroupResponse{
		StateId: id, Welcome: marshalWelcome(w), RatchetTree: marshalTree(g.Tree(), externalTree), EpochAuthenticator: g.EpochAuthenticator(),
	}
}

func (h *handler) HandleReInitWelcome(_ context.Context, req *connect.Request[api.HandleReInitWelcomeRequest]) (*connect.Response[api.JoinGroupResponse], error) {
	return call(h, req, func(s *Service, r *api.HandleReInitWelcomeRequest) (*api.JoinGroupResponse, error) {
		n, err := get[*successor](s, r.GetReinitId())
		if err != nil {
			return nil, err
		}
		w, err := welcome(r.GetWelcome())
		if err != nil {
			return nil, err
		}
		tree, err := ratchetTree(r.GetRatchetTree())
		if err != nil {
			return nil, err
		}
		g, err := n.old.group.JoinSuccessor(nil, n.signer, w, n.kp, n.secrets, tree)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.replace(r.GetReinitId(), n.state(g))
		return &api.JoinGroupResponse{StateId: id, EpochAuthenticator: g.EpochAuthenticator()}, err
	})
}

func (h *handler) CreateBranch(_ context.Context, req *connect.Request[api.CreateBranchRequest]) (*connect.Response[api.CreateSubgroupResponse], error) {
	return call(h, req, func(s *Service, r *api.CreateBranchRequest) (*api.CreateSubgroupResponse, error) {
		st, err := get[*state](s, r.GetStateId())
		if err != nil {
			return nil, err
		}
		ext, err := extensionsOf(r.GetExtensions())
		if err != nil {
			return nil, err
		}
		t := &transaction{identity: st.identity, signer: st.signer, psks: st.psks}
		o, err := linkOptions(t, r.GetKeyPackages(), r.GetForcePath(), r.GetExternalTree())
		if err != nil {
			return nil, err
		}
		g, w, err := st.group.NewBranch(nil, r.GetGroupId(), ext, o)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.add(t.state(g))
		return subgroup(id, g, w, r.GetExternalTree()), err
	})
}

func (h *handler) HandleBranch(_ context.Context, req *connect.Request[api.HandleBranchRequest]) (*connect.Response[api.HandleBranchResponse], error) {
	return call(h, req, func(s *Service, r *api.HandleBranchRequest) (*api.HandleBranchResponse, error) {
		st, err := get[*state](s, r.GetStateId())
		if err != nil {
			return nil, err
		}
		t, err := get[*transaction](s, r.GetTransactionId())
		if err != nil {
			return nil, err
		}
		w, err := welcome(r.GetWelcome())
		if err != nil {
			return nil, err
		}
		tree, err := ratchetTree(r.GetRatchetTree())
		if err != nil {
			return nil, err
		}
		g, err := st.group.JoinBranch(nil, t.signer, w, t.kp, t.secrets, tree)
		if err != nil {
			return nil, bad(err)
		}
		id, err := s.replace(r.GetTransactionId(), t.state(g))
		return &api.HandleBranchResponse{StateId: id, EpochAuthenticator: g.EpochAuthenticator()}, err
	})
}
