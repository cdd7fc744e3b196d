// Package interop drives our MLS client through the interface of the MLS working group's interoperability harness
// (github.com/mlswg/mls-implementations, folder interop): a gRPC service, which the harness's runner calls to have
// several implementations form groups together. The command below cmd serves it.
//
// Its tests have our client on all sides, which shows that the service works, and not that it interoperates: for that,
// the harness's runner is given this service and others.
package interop

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"encoding"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/mls/internal/interop/api"
	"github.com/parley-mls/parley/mls/internal/interop/api/apiconnect"
)

const (
	maxRequest = 64 << 20 // bytes
	maxObjects = 1 << 16  // the runner doesn't free everything
)

// Service implements the interface. Its states are in memory.
type Service struct {
	mu      sync.Mutex
	next    uint32
	objects map[uint32]any // *state, *transaction, *externalSigner, *successor
}

// New returns a Service without states.
func New() *Service { return &Service{objects: make(map[uint32]any)} }

// NewServer returns a server of the Service: gRPC over HTTP/2 without TLS, as the runner calls it.
func NewServer() *http.Server {
	_, h := apiconnect.NewMLSClientHandler(&handler{New()}, connect.WithReadMaxBytes(maxRequest))
	srv := &http.Server{Handler: h, Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	srv.Protocols.SetUnencryptedHTTP2(true)
	return srv
}

// pskStore has a client's external pre-shared keys by identifier.
type pskStore map[string][]byte

// state is a client in a group.
type state struct {
	group    *mls.Group
	identity []byte
	signer   crypto.Signer
	psks     pskStore
	own      map[string]bool // the proposals that it sent
}

// transaction is a KeyPackage that waits for its Welcome.
type transaction struct {
	identity []byte
	signer   crypto.Signer
	kp       *mls.KeyPackage
	secrets  *mls.KeyPackageSecrets
	psks     pskStore
}

type externalSigner struct {
	suite  mls.CipherSuite
	signer crypto.Signer
}

// successor is a client that waits for its group's successor, to which it brings the KeyPackage.
type successor struct {
	old *state
	*transaction
}

func bad(err error) error { return connect.NewError(connect.CodeInvalidArgument, err) }

// refused is for a call that doesn't fit the state that it is for.
func refused(err error) error { return connect.NewError(connect.CodeFailedPrecondition, err) }

func (s *Service) add(o any) (uint32, error) {
	if len(s.objects) >= maxObjects {
		return 0, connect.NewError(connect.CodeResourceExhausted, errors.New("too many states"))
	}
	for {
		s.next++
		if _, taken := s.objects[s.next]; !taken && s.next != 0 {
			s.objects[s.next] = o
			return s.next, nil
		}
	}
}

func get[T any](s *Service, id uint32) (T, error) {
	o, ok := s.objects[id].(T)
	if !ok {
		return o, connect.NewError(connect.CodeNotFound, fmt.Errorf("no %T %d", o, id))
	}
	return o, nil
}

// verifier takes every basic credential for what it says.
type verifier struct{}

func (verifier) VerifyCredential(c mls.Credential, _ []byte, _ mls.CipherSuite) error {
	if c.Type != mls.CredentialBasic {
		return errors.New("not a basic credential")
	}
	return nil
}

func (verifier) ValidSuccessor(old, next mls.Credential) error {
	if !old.Equal(next) {
		return errors.New("another identity")
	}
	return nil
}

func (verifier) Identity(c mls.Credential) ([]byte, error) { return c.Identity, nil }

func config(psks pskStore, encrypt bool) mls.Config {
	cfg := mls.Config{
		Verifier: verifier{}, NewMemberProposals: true,
		MaxLifetime: -1, // others may use longer ones
		PSK: func(id mls.PreSharedKeyID) ([]byte, error) {
			psk, ok := psks[string(id.ID)]
			if id.Type != mls.PSKExternal || !ok {
				return nil, errors.New("no such key")
			}
			return psk, nil
		},
	}
	if encrypt {
		cfg.HandshakeFormat = mls.WireFormatPrivateMessage
	}
	return cfg
}

func suiteOf(n uint32) (mls.CipherSuite, error) {
	cs := mls.CipherSuite(n)
	if n > 1<<16-1 || !cs.Supported() {
		return 0, bad(fmt.Errorf("cipher suite %d is not supported", n))
	}
	return cs, nil
}

// message decodes an MLSMessage.
func message(b []byte) (*mls.MLSMessage, error) {
	m := new(mls.MLSMessage)
	if err := codec.Unmarshal(b, m); err != nil {
		return nil, bad(err)
	}
	return m, nil
}

func keyPackage(b []byte) (*mls.KeyPackage, error) {
	m, err := message(b)
	if err == nil && m.KeyPackage == nil {
		err = bad(errors.New("not a key package"))
	}
	if err != nil {
		return nil, err
	}
	return m.KeyPackage, nil
}

func welcome(b []byte) (*mls.Welcome, error) {
	m, err := message(b)
	if err == nil && m.Welcome == nil {
		err = bad(errors.New("not a welcome"))
	}
	if err != nil {
		return nil, err
	}
	return m.Welcome, nil
}

func groupInfo(b []byte) (*mls.GroupInfo, error) {
	m, err := message(b)
	if err == nil && m.GroupInfo == nil {
		err = bad(errors.New("not a group info"))
	}
	if err != nil {
		return nil, err
	}
	if cs := m.GroupInfo.GroupContext.CipherSuite; !cs.Supported() {
		return nil, bad(fmt.Errorf("cipher suite %d is not supported", cs))
	}
	return m.GroupInfo, nil
}

// ratchetTree decodes a tree, nil if there are no bytes.
func ratchetTree(b []byte) (*mls.RatchetTree, error) {
	if len(b) == 0 {
		return nil, nil
	}
	t, err := mls.ParseRatchetTree(b)
	if err != nil {
		return nil, bad(err)
	}
	return t, nil
}

func extensionsOf(list []*api.Extension) (mls.Extensions, error) {
	var ext mls.Extensions
	for _, e := range list {
		if e.GetExtensionType() > 1<<16-1 {
			return nil, bad(fmt.Errorf("extension type %d", e.GetExtensionType()))
		}
		ext = append(ext, mls.Extension{Type: mls.ExtensionType(e.GetExtensionType()), Data: e.GetExtensionData()})
	}
	return ext, nil
}

func newTransaction(cs mls.CipherSuite, identity []byte) (*transaction, error) {
	signer, err := cs.GenerateSignatureKey(rand.Reader)
	if err != nil {
		return nil, bad(err)
	}
	t := &transaction{identity: identity, signer: signer, psks: make(pskStore)}
	t.kp, t.secrets, err = mls.NewKeyPackage(mls.KeyPackageOptions{
		Suite: cs, Credential: mls.BasicCredential(identity), Signer: signer,
	})
	if err != nil {
		return nil, bad(err)
	}
	return t, nil
}

// signaturePrivateKey is the private key in its scheme's bytes: the seed for EdDSA, the scalar for ECDSA.
func signaturePrivateKey(s crypto.Signer) []byte {
	switch k := s.(type) {
	case ed25519.PrivateKey:
		return k.Seed()
	case *ecdsa.PrivateKey:
		b, err := k.Bytes()
		if err != nil {
			return nil
		}
		return b
	case interface{ Seed() []byte }:
		return k.Seed()
	case encoding.BinaryMarshaler:
		b, _ := k.MarshalBinary()
		return b
	}
	return nil
}

// proposal makes what a description asks for. tree is where a member is looked for, groupID the group of a resumption
// key.
func proposal(d *api.ProposalDescription, tree *mls.RatchetTree, groupID []byte) (mls.Proposal, error) {
	switch string(d.GetProposalType()) {
	case "add":
		kp, err := keyPackage(d.GetKeyPackage())
		if err != nil {
			return mls.Proposal{}, err
		}
		return mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}}, nil
	case "remove":
		return removeProposal(tree, d.GetRemovedId())
	case "externalPSK":
		return pskProposal(mls.PreSharedKeyID{Type: mls.PSKExternal, ID: d.GetPskId()}), nil
	case "resumptionPSK":
		return pskProposal(mls.PreSharedKeyID{Type: mls.PSKResumption, Usage: mls.UsageApplication, GroupID: groupID, Epoch: d.GetEpochId()}), nil
	case "groupContextExtensions":
		ext, err := extensionsOf(d.GetExtensions())
		if err != nil {
			return mls.Proposal{}, err
		}
		return extensionsProposal(ext), nil
	case "reinit":
		ext, err := extensionsOf(d.GetExtensions())
		if err != nil {
			return mls.Proposal{}, err
		}
		cs, err := suiteOf(d.GetCipherSuite())
		if err != nil {
			return mls.Proposal{}, err
		}
		return mls.Proposal{Type: mls.ProposalReInit, ReInit: &mls.ReInit{
			GroupID: d.GetGroupId(), Version: mls.MLS10, CipherSuite: cs, Extensions: ext}}, nil
	}
	return mls.Proposal{}, bad(fmt.Errorf("proposal type %q", d.GetProposalType()))
}

func pskProposal(id mls.PreSharedKeyID) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalPSK, PSK: &mls.PreSharedKey{PSK: id}}
}

func removeProposal(tree *mls.RatchetTree, identity []byte) (mls.Proposal, error) {
	for i, l := range tree.Leaves() {
		if bytes.Equal(l.Credential.Identity, identity) {
			return mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: i}}, nil
		}
	}
	return mls.Proposal{}, bad(errors.New("no member of that identity"))
}

func extensionsProposal(ext mls.Extensions) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalGroupContextExtensions, GroupContextExtensions: &mls.GroupContextExtensions{Extensions: ext}}
}

// join makes a state of a transaction.
func (t *transaction) state(g *mls.Group) *state {
	return &state{group: g, identity: t.identity, signer: t.signer, psks: t.psks, own: make(map[string]bool)}
}

// sent notes an own proposal, and returns its bytes.
func (st *state) sent(m *mls.MLSMessage, err error) ([]byte, error) {
	if err != nil {
		return nil, bad(err)
	}
	b := codec.Marshal(m)
	st.own[string(b)] = true
	return b, nil
}

// takeProposals receives the proposals that are, or will be, committed. Own ones are pending already.
func (st *state) takeProposals(list [][]byte) error {
	for _, b := range list {
		if st.own[string(b)] {
			continue
		}
		m, err := message(b)
		if err != nil {
			return err
		}
		got, err := st.group.Receive(nil, m)
		if err != nil {
			return bad(err)
		}
		if _, ok := got.(*mls.ReceivedProposal); !ok {
			return bad(errors.New("not a proposal"))
		}
	}
	return nil
}

// commit stages a commit of just these proposals.
func (st *state) commit(req *api.CommitRequest) (*mls.PendingCommit, error) {
	if err := st.takeProposals(req.GetByReference()); err != nil {
		return nil, err
	}
	o := mls.CommitOptions{
		ForcePath: req.GetForcePath(), TreeInWelcome: !req.GetExternalTree(), SkipPending: len(req.GetByReference()) == 0,
	}
	for _, d := range req.GetByValue() {
		p, err := proposal(d, st.group.Tree(), st.group.GroupID())
		if err != nil {
			return nil, err
		}
		o.Proposals = append(o.Proposals, p)
	}
	c, err := st.group.Commit(nil, o)
	if errors.Is(err, mls.ErrStaged) {
		return nil, refused(err)
	}
	if err != nil {
		return nil, bad(err)
	}
	var refs [][]byte
	for _, p := range c.Info().Proposals {
		if p.Ref != nil {
			refs = append(refs, p.Ref)
		}
	}
	if len(refs) != len(req.GetByReference()) || len(c.Info().Proposals) != len(refs)+len(o.Proposals) {
		_ = st.group.Drop(nil) // doesn't fail
		return nil, refused(fmt.Errorf("%d proposals can be committed by reference, not %d", len(refs), len(req.GetByReference())))
	}
	return c, nil
}

// confirm applies the staged commit.
func (st *state) confirm() error {
	if err := st.group.Confirm(nil); err != nil {
		return refused(err)
	}
	clear(st.own)
	return nil
}

// handle applies the commit of another.
func (st *state) handle(proposals [][]byte, commit []byte) error {
	if err := st.takeProposals(proposals); err != nil {
		return err
	}
	m, err := message(commit)
	if err != nil {
		return err
	}
	got, err := st.group.Receive(nil, m)
	if err != nil {
		return bad(err)
	}
	staged, ok := got.(*mls.StagedCommit)
	if !ok {
		return bad(errors.New("not a commit of another"))
	}
	if err := st.group.Apply(nil, staged); err != nil {
		return bad(err)
	}
	clear(st.own)
	return nil
}

// ended makes the successor that a state waits for after the commit of a ReInit.
func (s *Service) ended(st *state) (uint32, *successor, error) {
	re := st.group.ReInit()
	if re == nil {
		return 0, nil, refused(errors.New("the commit had no reinit"))
	}
	if !re.CipherSuite.Supported() {
		return 0, nil, refused(fmt.Errorf("cipher suite %d is not supported", uint16(re.CipherSuite)))
	}
	t, err := newTransaction(re.CipherSuite, st.identity)
	if err != nil {
		return 0, nil, err
	}
	t.psks = st.psks
	next := &successor{old: st, transaction: t}
	id, err := s.add(next)
	return id, next, err
}

// replace has a state take the place of an object.
func (s *Service) replace(id uint32, st *state) (uint32, error) {
	delete(s.objects, id)
	return s.add(st)
}

func marshalWelcome(w *mls.Welcome) []byte {
	if w == nil {
		return nil
	}
	return codec.Marshal(mls.NewMLSMessage(w))
}

func marshalTree(t *mls.RatchetTree, wanted bool) []byte {
	if !wanted {
		return nil
	}
	return codec.Marshal(t)
}

// treeOf returns the tree beside a GroupInfo, or the one in it.
func treeOf(gi *mls.GroupInfo, beside []byte) (*mls.RatchetTree, error) {
	tree, err := ratchetTree(beside)
	if err != nil {
		return nil, err
	}
	inside, err := gi.RatchetTree()
	if err != nil {
		return nil, bad(err)
	}
	if tree = cmp.Or(tree, inside); tree == nil {
		return nil, bad(errors.New("no ratchet tree"))
	}
	return tree, nil
}
