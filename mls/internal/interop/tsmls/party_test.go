package tsmls

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// party is a client of either implementation. What goes in and comes out is what the wire has, MLSMessages and
// ratchet trees in their encodings.
type party interface {
	name() string
	keyPackage(o options) ([]byte, error) // comes first
	create(groupID []byte, ext mls.Extensions) error
	join(welcome, tree []byte) error
	externalJoin(groupInfo, tree []byte, resync bool) (*commit, error)
	lead(from party, groupID []byte, keyPackages [][]byte) (welcome, tree []byte, err error)
	follow(from party, branch bool, welcome, tree []byte) error
	propose(p *mls.Proposal) ([]byte, error)                                            // nil: an Update
	proposeFromOutside(groupInfo []byte, index uint32, p *mls.Proposal) ([]byte, error) // nil: an Add of itself
	commit(o commitOptions) (*commit, error)
	confirm() error
	drop() error
	process(message []byte) (kind string, data []byte, err error)
	send(aad, data []byte) ([]byte, error)
	groupInfo(withTree bool) (info, tree []byte, err error)
	status() (*status, error)
}

type options struct {
	suite          mls.CipherSuite
	identity       string
	extensions     []mls.ExtensionType // further ones in the capabilities
	leafExtensions mls.Extensions
	psks           []psk
	x509           bool // not basic credentials; what the certificates are isn't looked at
	private        bool // proposals and commits of this client, external ones aside
}

type commitOptions struct {
	proposals     []mls.Proposal
	treeInWelcome bool
	aad           []byte
}

func (o *options) credential() mls.Credential {
	if o.x509 {
		return mls.X509Credential([][]byte{[]byte(o.identity), []byte("its issuer")})
	}
	return mls.BasicCredential([]byte(o.identity))
}

// commit is a commit that was made and what goes with it.
type commit struct{ message, welcome, groupInfo, tree []byte }

// status is what members must have in common, and what they have not.
type status struct {
	context, authenticator, exported []byte
	leaf                             mls.LeafIndex
	active                           bool
}

// The kinds of what a message turned out to be.
const (
	application = "application"
	proposal    = "proposal"
	committed   = "commit"
)

// tsClient is a client of ts-mls.
type tsClient struct {
	node    *node
	id      string
	private bool
}

func (c *tsClient) call(op string, r request) (answer, error) {
	c.node.t.Helper()
	r.Op, r.Client = op, c.id
	return c.node.call(r)
}

func (c *tsClient) name() string { return c.id }

func (c *tsClient) keyPackage(o options) ([]byte, error) {
	r := request{Suite: uint16(o.suite), Identity: []byte(o.identity), Certificates: o.credential().Certificates, LeafExtensions: o.leafExtensions, PSKs: o.psks}
	if len(o.extensions) > 0 {
		r.Capabilities = map[string]any{"extensions": o.extensions}
	}
	c.private = o.private
	a, err := c.call("keyPackage", r)
	return a.Message, err
}

func (c *tsClient) create(groupID []byte, ext mls.Extensions) error {
	_, err := c.call("create", request{GroupID: groupID, Extensions: ext})
	return err
}

func (c *tsClient) join(welcome, tree []byte) error {
	_, err := c.call("join", request{Welcome: welcome, Tree: tree})
	return err
}

func (c *tsClient) lead(from party, groupID []byte, keyPackages [][]byte) (welcome, tree []byte, err error) {
	a, err := c.call("lead", request{From: from.name(), GroupID: groupID, KeyPackages: keyPackages})
	return a.Welcome, a.Tree, err
}

func (c *tsClient) follow(from party, branch bool, welcome, tree []byte) error {
	_, err := c.call("follow", request{From: from.name(), Branch: branch, Welcome: welcome, Tree: tree})
	return err
}

func (c *tsClient) externalJoin(groupInfo, tree []byte, resync bool) (*commit, error) {
	a, err := c.call("externalJoin", request{GroupInfo: groupInfo, Tree: tree, Resync: resync})
	return &commit{message: a.Message, groupInfo: a.GroupInfo, tree: a.Tree}, err
}

func (c *tsClient) propose(p *mls.Proposal) ([]byte, error) {
	if p == nil {
		a, err := c.call("update", request{Private: c.private, AAD: []byte("aad")})
		return a.Message, err
	}
	a, err := c.call("propose", request{Proposal: codec.Marshal(p), Private: c.private, AAD: []byte("aad")})
	return a.Message, err
}

func (c *tsClient) proposeFromOutside(groupInfo []byte, _ uint32, p *mls.Proposal) ([]byte, error) {
	r := request{GroupInfo: groupInfo}
	if p != nil {
		r.Proposal = codec.Marshal(p)
	}
	a, err := c.call("proposeFromOutside", r)
	return a.Message, err
}

func (c *tsClient) commit(o commitOptions) (*commit, error) {
	r := request{Private: c.private, TreeInWelcome: o.treeInWelcome, AAD: o.aad}
	for _, p := range o.proposals {
		r.Proposals = append(r.Proposals, codec.Marshal(p))
	}
	a, err := c.call("commit", r)
	return &commit{message: a.Message, welcome: a.Welcome, groupInfo: a.GroupInfo, tree: a.Tree}, err
}

func (c *tsClient) confirm() error {
	_, err := c.call("confirm", request{})
	return err
}

func (c *tsClient) drop() error {
	_, err := c.call("drop", request{})
	return err
}

func (c *tsClient) process(message []byte) (string, []byte, error) {
	a, err := c.call("process", request{Message: message})
	return a.Kind, a.Data, err
}

func (c *tsClient) send(aad, data []byte) ([]byte, error) {
	a, err := c.call("send", request{AAD: aad, Data: data})
	return a.Message, err
}

func (c *tsClient) groupInfo(withTree bool) (info, tree []byte, err error) {
	a, err := c.call("groupInfo", request{WithTree: withTree})
	return a.GroupInfo, a.Tree, err
}

func (c *tsClient) status() (*status, error) {
	a, err := c.call("status", request{})
	return &status{context: a.Context, authenticator: a.Authenticator, exported: a.Exported, leaf: mls.LeafIndex(a.Leaf),
		active: a.Active != "removedFromGroup"}, err
}

// ourClient is a client of this module. Its state is kept in memory.
type ourClient struct {
	*mls.Group
	id      string
	o       options
	config  mls.Config
	signer  crypto.Signer
	kp      *mls.KeyPackage
	secrets *mls.KeyPackageSecrets
	joining *mls.PendingJoin
}

// everyone is an authentication service that believes all.
type everyone struct{}

func (everyone) VerifyCredential(mls.Credential, []byte, mls.CipherSuite) error { return nil }
func (everyone) ValidSuccessor(_, _ mls.Credential) error                       { return nil }

func (everyone) Identity(c mls.Credential) ([]byte, error) {
	if c.Type == mls.CredentialX509 {
		return c.Certificates[0], nil
	}
	return c.Identity, nil
}

func (c *ourClient) name() string { return c.id }

func (c *ourClient) capabilities() mls.Capabilities {
	capabilities := mls.DefaultCapabilities()
	capabilities.Extensions = append(capabilities.Extensions, c.o.extensions...)
	return capabilities
}

func (c *ourClient) keyPackage(o options) ([]byte, error) {
	c.o = o
	c.config = mls.Config{Verifier: everyone{}, NewMemberProposals: true, PSK: func(id mls.PreSharedKeyID) ([]byte, error) {
		for _, p := range o.psks {
			if bytes.Equal(p.ID, id.ID) {
				return p.Secret, nil
			}
		}
		return nil, fmt.Errorf("no PSK %q", id.ID)
	}}
	if o.private {
		c.config.HandshakeFormat = mls.WireFormatPrivateMessage
	}
	var err error
	if c.signer, err = o.suite.GenerateSignatureKey(rand.Reader); err != nil {
		return nil, err
	}
	c.kp, c.secrets, err = mls.NewKeyPackage(mls.KeyPackageOptions{Suite: o.suite, Credential: o.credential(),
		Signer: c.signer, Capabilities: c.capabilities(), LeafExtensions: o.leafExtensions})
	if err != nil {
		return nil, err
	}
	return codec.Marshal(mls.NewMLSMessage(c.kp)), nil
}

func (c *ourClient) create(groupID []byte, ext mls.Extensions) (err error) {
	c.Group, err = mls.NewGroup(c.config, nil, mls.GroupOptions{GroupID: groupID, Suite: c.o.suite,
		Credential: c.o.credential(), Signer: c.signer, Extensions: ext,
		Capabilities: c.capabilities(), LeafExtensions: c.o.leafExtensions})
	return err
}

func parseMessage(b []byte) (*mls.MLSMessage, error) {
	var m mls.MLSMessage
	err := codec.Unmarshal(b, &m)
	return &m, err
}

func parseTree(b []byte) (*mls.RatchetTree, error) {
	if b == nil {
		return nil, nil
	}
	return mls.ParseRatchetTree(b)
}

func (c *ourClient) join(welcome, tree []byte) error {
	m, err := parseMessage(welcome)
	if err != nil {
		return err
	}
	t, err := parseTree(tree)
	if err != nil {
		return err
	}
	c.Group, err = mls.JoinGroup(c.config, nil, c.signer, m.Welcome, c.kp, c.secrets, t)
	return err
}

func (c *ourClient) lead(from party, groupID []byte, keyPackages [][]byte) (welcome, tree []byte, err error) {
	o := mls.LinkOptions{Credential: c.kp.LeafNode.Credential, Signer: c.signer}
	for _, b := range keyPackages {
		m, err := parseMessage(b)
		if err != nil {
			return nil, nil, err
		}
		o.KeyPackages = append(o.KeyPackages, m.KeyPackage)
	}
	var w *mls.Welcome
	if old := from.(*ourClient); groupID != nil {
		c.Group, w, err = old.NewBranch(nil, groupID, nil, o)
	} else {
		c.Group, w, err = old.NewSuccessor(nil, o)
	}
	if err != nil {
		return nil, nil, err
	}
	return codec.Marshal(mls.NewMLSMessage(w)), codec.Marshal(c.Tree()), nil
}

func (c *ourClient) follow(from party, branch bool, welcome, tree []byte) error {
	m, err := parseMessage(welcome)
	if err != nil {
		return err
	}
	t, err := parseTree(tree)
	if err != nil {
		return err
	}
	join := from.(*ourClient).JoinSuccessor
	if branch {
		join = from.(*ourClient).JoinBranch
	}
	c.Group, err = join(nil, c.signer, m.Welcome, c.kp, c.secrets, t)
	return err
}

func (c *ourClient) externalJoin(groupInfo, tree []byte, resync bool) (*commit, error) {
	m, err := parseMessage(groupInfo)
	if err != nil {
		return nil, err
	}
	t, err := parseTree(tree)
	if err != nil {
		return nil, err
	}
	o := mls.ExternalJoinOptions{GroupInfo: m.GroupInfo, Tree: t, Credential: c.o.credential(),
		Signer: c.signer, Capabilities: c.capabilities(), LeafExtensions: c.o.leafExtensions}
	if resync {
		o.Proposals = []mls.Proposal{*remove(c.OwnLeaf())}
	}
	if len(c.o.psks) > 0 {
		o.Proposals = append(o.Proposals, *external(string(c.o.psks[0].ID)))
	}
	if c.joining, err = mls.ExternalJoin(c.config, o); err != nil {
		return nil, err
	}
	return &commit{message: codec.Marshal(c.joining.Message()), groupInfo: codec.Marshal(mls.NewMLSMessage(c.joining.GroupInfo())),
		tree: codec.Marshal(c.joining.Tree())}, nil
}

func (c *ourClient) propose(p *mls.Proposal) ([]byte, error) {
	if p == nil {
		return encoded(c.ProposeUpdate(nil, mls.UpdateOptions{AAD: []byte("aad")}))
	}
	return encoded(c.Propose(nil, []byte("aad"), *p))
}

func (c *ourClient) proposeFromOutside(groupInfo []byte, index uint32, p *mls.Proposal) ([]byte, error) {
	m, err := parseMessage(groupInfo)
	if err != nil {
		return nil, err
	}
	id, epoch := m.GroupInfo.GroupContext.GroupID, m.GroupInfo.GroupContext.Epoch
	if p == nil {
		return encoded(mls.NewMemberProposal(rand.Reader, c.signer, c.kp, id, epoch, nil))
	}
	return encoded(mls.ExternalProposal(c.o.suite, rand.Reader, c.signer, index, id, epoch, nil, *p))
}

func encoded(m *mls.MLSMessage, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return codec.Marshal(m), nil
}

func (c *ourClient) commit(o commitOptions) (*commit, error) {
	p, err := c.Commit(nil, mls.CommitOptions{Proposals: o.proposals, TreeInWelcome: o.treeInWelcome, AAD: o.aad})
	if err != nil {
		return nil, err
	}
	out := &commit{message: codec.Marshal(p.Message()), groupInfo: codec.Marshal(mls.NewMLSMessage(p.GroupInfo())), tree: codec.Marshal(p.Tree())}
	if w := p.Welcome(); w != nil {
		out.welcome = codec.Marshal(mls.NewMLSMessage(w))
	}
	return out, nil
}

func (c *ourClient) confirm() (err error) {
	if c.joining == nil {
		return c.Confirm(nil)
	}
	c.Group, err = c.joining.Confirm(nil)
	c.joining = nil
	return err
}

func (c *ourClient) drop() error { return c.Drop(nil) }

func (c *ourClient) process(message []byte) (string, []byte, error) {
	m, err := parseMessage(message)
	if err != nil {
		return "", nil, err
	}
	got, err := c.Receive(nil, m)
	if err != nil {
		return "", nil, err
	}
	switch got := got.(type) {
	case *mls.ApplicationMessage:
		return application, got.Data, nil
	case *mls.ReceivedProposal:
		return proposal, nil, nil
	case *mls.StagedCommit:
		return committed, nil, c.Apply(nil, got)
	}
	return "", nil, fmt.Errorf("received as %T", got)
}

func (c *ourClient) send(aad, data []byte) ([]byte, error) {
	return encoded(c.Encrypt(nil, aad, data))
}

func (c *ourClient) groupInfo(withTree bool) (info, tree []byte, err error) {
	gi, err := c.GroupInfo(withTree, true)
	if err != nil {
		return nil, nil, err
	}
	return codec.Marshal(mls.NewMLSMessage(gi)), codec.Marshal(c.Tree()), nil
}

func (c *ourClient) status() (*status, error) {
	exported, err := c.Export("interop", []byte("context"), 32)
	return &status{context: codec.Marshal(c.Context()), authenticator: c.EpochAuthenticator(), exported: exported,
		leaf: c.OwnLeaf(), active: c.Active()}, err
}

func add(kp []byte) *mls.Proposal {
	m, err := parseMessage(kp)
	if err != nil {
		panic(err)
	}
	return &mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *m.KeyPackage}}
}

func remove(i mls.LeafIndex) *mls.Proposal {
	return &mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: i}}
}
