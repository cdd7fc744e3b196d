package mls

import (
	"bytes"
	"crypto"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// Groups that follow from another one: the successor of a group that a ReInit ended (RFC 9420, Section 11.2) and
// branches (Section 11.3). A resumption key of the old group goes into the new one, so that only its members can join.

// LinkOptions says who is in a group that follows from another one, and with what leaf this client is (RFC 9420,
// Sections 11.2 and 11.3).
type LinkOptions struct {
	redact
	// KeyPackages are those of the other members, of the new group's suite.
	KeyPackages    []*KeyPackage
	Credential     Credential
	Signer         crypto.Signer
	Capabilities   Capabilities // zero: DefaultCapabilities and random reserved values (RFC 9420, Section 13.5)
	Lifetime       Lifetime     // zero: DefaultLifetime from now
	LeafExtensions Extensions
	// ForcePath gives the commit that adds the others a path, which it doesn't need.
	ForcePath bool
	// TreeInWelcome puts the ratchet tree into the Welcome's GroupInfo.
	TreeInWelcome bool
}

// ReInit returns the proposal that ended the group, nil if the group goes on. Of a group that has ended nothing can be
// made but its successor: what would send or process a message of the last epoch fails with ErrEnded.
func (g *Group) ReInit() *ReInit { return g.public().reinit }

// ReInit returns the proposal that ended the group, nil if the group goes on. No proposal or commit follows it: the
// checks fail with ErrEnded.
func (g *PublicGroup) ReInit() *ReInit { return g.public().reinit }

// NewSuccessor makes the group that the ReInit asked for, in its first epoch of all members, and the Welcome for the
// others, nil if there are none. They are all members of the old group, each by a KeyPackage. b is for the new group's
// state. Any member may do this, so whoever orders the groups' messages decides whose successor it is (by its group
// identifier); others give theirs up and join that one (RFC 9420, Section 11.2). It fails with a ValidationError if no
// ReInit has ended the group or the members aren't those of the old one, and with ErrUnsupported for a ReInit to
// another version than mls10.
func (g *Group) NewSuccessor(b Batch, o LinkOptions) (*Group, *Welcome, error) {
	g.op.Lock()
	defer g.done()
	next, w, err := g.newSuccessor(b, o)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: new successor: %w", err)
	}
	return next, w, nil
}

func (g *Group) newSuccessor(b Batch, o LinkOptions) (*Group, *Welcome, error) {
	l, err := g.successorLink()
	if err != nil {
		return nil, nil, err
	}
	re := g.state.reinit
	if re.Version != MLS10 {
		return nil, nil, fmt.Errorf("%w: protocol version %d", ErrUnsupported, re.Version)
	}
	counts, err := g.state.roster(g.cfg.Verifier)
	if err != nil {
		return nil, nil, err
	}
	if n := len(o.KeyPackages) + 1; n != counts.members {
		return nil, nil, invalid("11.2", "successor with %d members, group had %d", n, counts.members)
	}
	return l.create(b, re.CipherSuite, re.GroupID, re.Extensions, o)
}

// JoinSuccessor joins the group that the ReInit asked for by its Welcome, as JoinGroup does, after it has checked that
// the group is just that and has all members of the old one (RFC 9420, Section 11.2). b is for the new group's state.
func (g *Group) JoinSuccessor(b Batch, signer crypto.Signer, w *Welcome, kp *KeyPackage, secrets *KeyPackageSecrets, tree *RatchetTree) (*Group, error) {
	g.op.Lock()
	defer g.done()
	l, err := g.successorLink()
	if err != nil {
		return nil, fmt.Errorf("mls: join successor: %w", err)
	}
	next, err := joinGroup(g.cfg, signer, w, kp, secrets, tree, l)
	if err != nil {
		return nil, fmt.Errorf("mls: join successor: %w", err)
	}
	next.saveAll(orDiscard(b))
	return next, nil
}

// NewBranch makes a group of some of this group's members, with its version and suite, in its first epoch of all of
// them, and the Welcome for the others, nil if there are none (RFC 9420, Section 11.3). ext are the extensions of its
// GroupContext. b is for the new group's state. This group isn't changed.
func (g *Group) NewBranch(b Batch, groupID []byte, ext Extensions, o LinkOptions) (*Group, *Welcome, error) {
	g.op.Lock()
	defer g.done()
	l, err := g.branchLink()
	if err != nil {
		return nil, nil, fmt.Errorf("mls: new branch: %w", err)
	}
	if err := l.enter(g.Epoch()); err != nil {
		return nil, nil, fmt.Errorf("mls: new branch: %w", err)
	}
	next, w, err := l.create(b, g.suite(), groupID, ext, o)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: new branch: %w", err)
	}
	return next, w, nil
}

// JoinBranch joins a branch of this group by its Welcome, as JoinGroup does, after it has checked that the branch has
// this group's version and suite, and no member who wasn't in this group when the branch was made (RFC 9420, Section
// 11.3). That may have been in a past epoch, if this client was a member in it and MaxPastEpochs keeps it, else it
// fails with ErrEpoch. b is for the new group's state.
func (g *Group) JoinBranch(b Batch, signer crypto.Signer, w *Welcome, kp *KeyPackage, secrets *KeyPackageSecrets, tree *RatchetTree) (*Group, error) {
	g.op.Lock()
	defer g.done()
	l, err := g.branchLink()
	if err != nil {
		return nil, fmt.Errorf("mls: join branch: %w", err)
	}
	next, err := joinGroup(g.cfg, signer, w, kp, secrets, tree, l)
	if err != nil {
		return nil, fmt.Errorf("mls: join branch: %w", err)
	}
	next.saveAll(orDiscard(b))
	return next, nil
}

// link is what a new group has of the one that it follows from.
type link struct {
	redact
	parent  *Group
	usage   ResumptionUsage
	epoch   uint64              // of the resumption key
	members map[string]struct{} // the parent's in that epoch, as memberName has them
}

func (g *Group) successorLink() (*link, error) {
	switch {
	case !g.active:
		return nil, ErrRemoved
	case g.state.reinit == nil:
		return nil, invalid("11.2", "the group has not been ended by a reinit")
	}
	l := &link{parent: g, usage: UsageReInit}
	return l, l.enter(g.Epoch())
}

func (g *Group) branchLink() (*link, error) {
	if err := g.live(); err != nil {
		return nil, err
	}
	return &link{parent: g, usage: UsageBranch}, nil
}

// memberName is what two leaves of one client have in common: how the authentication service names it, or else the
// credential itself.
func memberName(v CredentialVerifier, l *LeafNode) (string, error) {
	id, err := v.Identity(l.Credential)
	if err != nil {
		return "", invalid("5.3.1", "credential names no client", err)
	}
	if id == nil {
		id = codec.Marshal(l.Credential)
	}
	return string(id), nil
}

func memberNames(v CredentialVerifier, slots uint32, leaf func(LeafIndex) *LeafNode) (map[string]struct{}, error) {
	names := make(map[string]struct{})
	for i := range LeafIndex(slots) {
		if l := leaf(i); l != nil {
			name, err := memberName(v, l)
			if err != nil {
				return nil, err
			}
			names[name] = struct{}{}
		}
	}
	return names, nil
}

// enter makes it the link with an epoch of the parent, which has to be at hand.
func (l *link) enter(epoch uint64) error {
	g := l.parent
	slots, leaf := g.state.tree.Size(), g.state.tree.Leaf
	if epoch != g.Epoch() {
		past := g.pastEpoch(epoch)
		if past == nil {
			return fmt.Errorf("%w: no resumption key of epoch %d", ErrEpoch, epoch)
		}
		slots, leaf = past.slots, func(i LeafIndex) *LeafNode { return g.leafAt(past, i) }
	}
	var err error
	l.epoch = epoch
	l.members, err = memberNames(g.cfg.Verifier, slots, leaf)
	return err
}

// linked says whether a key is of the kind that only links groups.
func (id *PreSharedKeyID) linked() bool {
	return id.Type == PSKResumption && id.Usage != UsageApplication
}

// checkWelcome checks the keys that a Welcome names: one of them, and no other of its kind, links the groups (RFC 9420,
// Sections 11.2, 11.3 and 12.4.3.1).
func (l *link) checkWelcome(ids []PreSharedKeyID) error {
	found := 0
	for i := range ids {
		id := &ids[i]
		if !id.linked() {
			continue
		}
		if found++; found > 1 {
			return invalid("12.4.3.1", "two resumption keys of another group")
		}
		if id.Usage != l.usage || !bytes.Equal(id.GroupID, l.parent.GroupID()) {
			return invalid(l.section(), "resumption key of usage %d of a group that this one doesn't follow from", id.Usage)
		}
		if l.usage == UsageReInit && id.Epoch != l.epoch {
			return invalid("11.2", "resumption key of epoch %d, group ended in %d", id.Epoch, l.epoch)
		}
		if err := l.enter(id.Epoch); err != nil {
			return err
		}
	}
	if found == 0 {
		return invalid(l.section(), "welcome without a resumption key of the old group")
	}
	return nil
}

func (l *link) section() string {
	if l.usage == UsageReInit {
		return "11.2"
	}
	return "11.3"
}

// check checks the new group (RFC 9420, Sections 11.2, 11.3 and 12.4.3.1).
func (l *link) check(ctx *GroupContext, tree *RatchetTree) error {
	g := l.parent
	if ctx.Epoch != 1 {
		return invalid(l.section(), "welcome to epoch %d", ctx.Epoch)
	}
	names, err := memberNames(g.cfg.Verifier, tree.Size(), tree.Leaf)
	if err != nil {
		return err
	}
	if l.usage == UsageBranch {
		if bytes.Equal(ctx.GroupID, g.GroupID()) {
			return invalid("12.4.3.1", "branch with the group's own identifier")
		}
		if ctx.Version != g.state.context.Version || ctx.CipherSuite != g.suite() {
			return invalid("11.3", "branch of version %d and suite %d", ctx.Version, uint16(ctx.CipherSuite))
		}
		for name := range names {
			if _, ok := l.members[name]; !ok {
				return invalid("11.3", "branch with a member that the group did not have")
			}
		}
		return nil
	}
	re := g.state.reinit
	if !bytes.Equal(ctx.GroupID, re.GroupID) || ctx.Version != re.Version || ctx.CipherSuite != re.CipherSuite || !ctx.Extensions.Equal(re.Extensions) {
		return invalid("11.2", "group is not the one that the reinit asked for")
	}
	for name := range l.members {
		if _, ok := names[name]; !ok {
			return invalid("11.2", "successor without a member that the group had")
		}
	}
	return nil
}

// create makes the new group and the commit that adds the others.
func (l *link) create(b Batch, cs CipherSuite, groupID []byte, ext Extensions, o LinkOptions) (*Group, *Welcome, error) {
	first, err := NewGroup(l.parent.cfg, nil, GroupOptions{
		GroupID: groupID, Suite: cs, Credential: o.Credential, Signer: o.Signer, Capabilities: o.Capabilities,
		Extensions: ext, Lifetime: o.Lifetime, LeafExtensions: o.LeafExtensions,
	})
	if err != nil {
		return nil, nil, err
	}
	first.link = l
	props := []Proposal{{Type: ProposalPSK, PSK: &PreSharedKey{PSK: PreSharedKeyID{
		Type: PSKResumption, Usage: l.usage, GroupID: l.parent.GroupID(), Epoch: l.epoch}}}}
	for _, kp := range o.KeyPackages {
		props = append(props, Proposal{Type: ProposalAdd, Add: &Add{KeyPackage: *kp}})
	}
	c, err := first.Commit(nil, CommitOptions{Proposals: props, ForcePath: o.ForcePath, TreeInWelcome: o.TreeInWelcome})
	if err != nil {
		return nil, nil, err
	}
	if err := l.check(&c.evolution.context, c.evolution.tree); err != nil {
		return nil, nil, err
	}
	sealers, err := first.cfg.newSealers()
	if err != nil {
		return nil, nil, err
	}
	next := &Group{
		cfg: first.cfg, state: newPublicState(c.evolution.context, c.evolution.tree, c.evolution.tag), own: first.own, active: true,
		private: c.private, signers: first.signers,
	}
	next.start(c.secrets, sealers)
	next.saveAll(orDiscard(b))
	first.secrets.erase()
	first.messages.erase()
	first.exports.drop(discard{})
	first.private.erase(c.private)
	return next, c.welcome, nil
}
