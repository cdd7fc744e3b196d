package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// Add makes users participants of the room, as ordinary members, and adds all their clients that have a KeyPackage, in one
// commit. Clients of users who are participants already are added if they aren't members. It fails with ErrNoKeyPackages
// if a user has no client that can be added.
func (r *Room) Add(ctx context.Context, users ...mimi.URI) error {
	return r.AddAs(ctx, mimi.RoleMember, users...)
}

// AddAs is Add with another of the room's roles for the new participants.
func (r *Room) AddAs(ctx context.Context, role uint32, users ...mimi.URI) error {
	var found []addition
	for _, u := range users {
		a, err := r.c.claim(ctx, r, u)
		if err != nil {
			return fmt.Errorf("client: add %s to %s: %w", u, r.uri, err)
		}
		found = append(found, a)
	}
	return r.change(ctx, func(g *mls.Group) (mls.CommitOptions, error) { return r.buildAdd(g, role, found) })
}

// Roles returns the room's roles.
func (r *Room) Roles() (mimi.RoleList, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return mimi.RolesOf(r.group.Dictionary())
}

// Rules returns the room's rules as they are now.
func (r *Room) Rules() (mimi.Rules, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return mimi.RulesOf(r.group.Dictionary())
}

// SetRole gives a participant another of the room's roles, by its index; with one that may have no clients in the room, such
// as mimi.RoleBanned, it removes the user's. It does nothing if the user has it.
func (r *Room) SetRole(ctx context.Context, user mimi.URI, role uint32) error {
	return r.change(ctx, func(g *mls.Group) (o mls.CommitOptions, err error) {
		list, err := participants(g)
		if err != nil {
			return o, err
		}
		i, have, ok := list.Find(user)
		switch {
		case !ok:
			return o, fmt.Errorf("client: %s isn't a participant", user)
		case have == role:
			return o, errDone
		}
		roles, err := mimi.RolesOf(g.Dictionary())
		if err != nil {
			return o, err
		}
		if !roles.Find(role).Active() {
			if o.Proposals, err = r.c.removes(g, user); err != nil {
				return o, err
			}
		}
		o.Proposals = append(o.Proposals, participantProposal(mimi.ParticipantListUpdate{Changed: []mimi.RoleChange{{Index: uint32(i), Role: role}}}))
		return o, nil
	})
}

// addition is a user to be added, with the KeyPackages that were claimed.
type addition struct {
	user        mimi.URI
	keyPackages []claimed
}

type claimed struct {
	client     mimi.URI
	keyPackage *mls.KeyPackage
}

func (r *Room) buildAdd(g *mls.Group, role uint32, found []addition) (mls.CommitOptions, error) {
	list, err := participants(g)
	if err != nil {
		return mls.CommitOptions{}, err
	}
	members := make(map[mimi.URI]bool)
	for m := range g.Members() {
		if _, id, err := r.c.identity(m.Leaf); err == nil {
			members[id] = true
		}
	}
	var update mimi.ParticipantListUpdate
	var o mls.CommitOptions
	for _, a := range found {
		if !has(list, a.user) {
			update.Added = append(update.Added, mimi.Participant{User: a.user, Role: role})
		}
		for _, k := range a.keyPackages {
			if !members[k.client] {
				o.Proposals = append(o.Proposals, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *k.keyPackage}})
			}
		}
	}
	if len(update.Added) > 0 {
		o.Proposals = slices.Insert(o.Proposals, 0, participantProposal(update))
	}
	if len(o.Proposals) == 0 {
		return o, errDone
	}
	return o, nil
}

func participantProposal(u mimi.ParticipantListUpdate) mls.Proposal {
	return appData(mimi.ComponentParticipantList, u)
}

func appData(id mls.ComponentID, update codec.Marshaler) mls.Proposal {
	return mls.Proposal{Type: mls.ProposalAppDataUpdate, AppDataUpdate: &mls.AppDataUpdate{
		Component: id, Op: mls.AppDataOpUpdate, Update: codec.Marshal(update),
	}}
}

// ChangeMetadata changes what the room's metadata say, such as its name or its subject.
func (r *Room) ChangeMetadata(ctx context.Context, edit func(m *mimi.RoomMetadata)) error {
	return r.change(ctx, func(g *mls.Group) (o mls.CommitOptions, err error) {
		old, err := mimi.MetadataOf(g.Dictionary())
		if err != nil {
			return o, err
		}
		next := old
		next.Descriptions = slices.Clone(old.Descriptions)
		edit(&next)
		b := codec.Marshal(next)
		if bytes.Equal(b, codec.Marshal(old)) {
			return o, errDone
		}
		o.Proposals = []mls.Proposal{appData(mimi.ComponentRoomMetadata, next)}
		return o, codec.Unmarshal(b, new(mimi.RoomMetadata))
	})
}

// claim claims a KeyPackage for each client of a user through the room's hub, and verifies them: nobody on the way is
// trusted with whose they are.
func (c *Client) claim(ctx context.Context, r *Room, user mimi.URI) (addition, error) {
	a := addition{user: user}
	if user.Kind() != 'u' {
		return a, fmt.Errorf("%q is no user", user)
	}
	r.mu.Lock()
	suite := r.group.Suite()
	var required mls.RequiredCapabilities
	ext, _ := r.group.Extension(mls.ExtensionRequiredCapabilities)
	r.mu.Unlock()
	if ext != nil {
		if err := codec.Unmarshal(ext, &required); err != nil {
			return a, fmt.Errorf("required capabilities: %w", err)
		}
	}
	req := &mimi.KeyMaterialRequest{
		RequestingUser: c.User(), TargetUser: user, Room: r.uri, CipherSuites: []mls.CipherSuite{suite},
		RequiredCapabilities: required, Credential: c.credential(),
	}
	if err := req.Sign(c.o.Rand, suite, c.signer); err != nil {
		return a, fmt.Errorf("sign the request for key packages: %w", err)
	}
	answer, err := call(ctx, c.session, c.session.service.ClaimKeyPackages, &api.MimiRequest{
		Room: string(r.uri), Body: codec.Marshal(req),
	})
	if err != nil {
		return a, fmt.Errorf("claim key packages: %w", err)
	}
	var res mimi.KeyMaterialResponse
	if err := codec.Unmarshal(answer.Body, &res); err != nil {
		return a, fmt.Errorf("answer to the claim of key packages: %w", err)
	}
	if res.User != user {
		return a, fmt.Errorf("asked for key packages of %s, got those of %q", user, res.User)
	}
	if res.Code == mimi.NoConsent || res.Code == mimi.NoConsentForThisRoom {
		return a, fmt.Errorf("%w: the provider answers %v", ErrNoConsent, res.Code)
	}
	for _, m := range res.Clients {
		if m.Code != mimi.ClientKeyMaterialSuccess || m.KeyPackage == nil {
			c.log.Info("client without a key package", "client", m.Client, "code", m.Code)
			continue
		}
		if err := c.judged(ctx, func() error { return c.checkKeyPackage(m.KeyPackage, user, m.Client, suite) }); err != nil {
			return a, fmt.Errorf("key package of %s: %w", m.Client, err)
		}
		if m.Client != c.ID() {
			a.keyPackages = append(a.keyPackages, claimed{m.Client, m.KeyPackage})
		}
	}
	if len(a.keyPackages) == 0 && user != c.User() {
		return a, fmt.Errorf("%w: the provider answers %v", ErrNoKeyPackages, res.Code)
	}
	return a, nil
}

// checkKeyPackage is what RFC 9420, Section 10.1, asks for, and that the credential is good now and names the user.
func (c *Client) checkKeyPackage(kp *mls.KeyPackage, user, id mimi.URI, suite mls.CipherSuite) error {
	if kp.CipherSuite != suite {
		return fmt.Errorf("is of suite %v, not %v", kp.CipherSuite, suite)
	}
	if err := kp.Validate(c.o.Time(), c.trust.verifier.ForHub()); err != nil {
		return err
	}
	owner, device, err := c.identity(&kp.LeafNode)
	if err != nil {
		return err
	}
	if owner != user || device != id {
		return fmt.Errorf("belongs to %s of %s", device, owner)
	}
	return nil
}

// Remove removes a user and all the user's clients from the room, in one commit. It does nothing if the user is no
// participant.
func (r *Room) Remove(ctx context.Context, user mimi.URI) error {
	if user == r.c.User() {
		return r.Leave(ctx)
	}
	return r.change(ctx, func(g *mls.Group) (mls.CommitOptions, error) { return r.c.buildRemove(g, user) })
}

func (c *Client) buildRemove(g *mls.Group, user mimi.URI) (mls.CommitOptions, error) {
	var o mls.CommitOptions
	props, err := c.removal(g, user)
	if err != nil {
		return o, err
	}
	pending := g.Pending()
	for _, p := range props {
		if !slices.ContainsFunc(pending, func(q mls.PendingProposal) bool { return c.sameRemoval(g, p, q, user) }) {
			o.Proposals = append(o.Proposals, p)
		}
	}
	if len(props) == 0 {
		return o, errDone
	}
	return o, nil
}

// sameRemoval says whether the pending proposal q has the effect of p, one of those that remove the user.
func (c *Client) sameRemoval(g *mls.Group, p mls.Proposal, q mls.PendingProposal, user mimi.URI) bool {
	if p.Remove != nil {
		return q.Proposal.Remove != nil && *q.Proposal.Remove == *p.Remove ||
			q.Proposal.Type == mls.ProposalSelfRemove && q.Sender.Leaf == p.Remove.Removed
	}
	u := q.Proposal.AppDataUpdate
	if u == nil || u.Component != mimi.ComponentParticipantList || q.Sender.Type != mls.SenderMember {
		return false
	}
	m, ok := g.Member(q.Sender.Leaf)
	if !ok {
		return false
	}
	sender, _, err := c.identity(m.Leaf)
	var update mimi.ParticipantListUpdate
	return err == nil && sender == user && codec.Unmarshal(u.Update, &update) == nil && len(update.Removed) > 0
}

// removal returns the proposals that remove a user: Removes of all clients and the change of the participant list.
func (c *Client) removal(g *mls.Group, user mimi.URI) ([]mls.Proposal, error) {
	list, err := participants(g)
	if err != nil {
		return nil, err
	}
	props, err := c.removes(g, user)
	if err != nil {
		return nil, err
	}
	if i, _, ok := list.Find(user); ok {
		props = append(props, participantProposal(mimi.ParticipantListUpdate{Removed: []uint32{uint32(i)}}))
	}
	return props, nil
}

// removes returns the Removes of a user's clients.
func (c *Client) removes(g *mls.Group, user mimi.URI) (props []mls.Proposal, err error) {
	for m := range g.Members() {
		u, _, err := c.identity(m.Leaf)
		if err != nil {
			return nil, err
		}
		if u == user {
			props = append(props, mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: m.Index}})
		}
	}
	return props, nil
}

// UpdateKeys replaces this client's keys in the room by fresh ones (RFC 9420, Section 2: post-compromise security).
func (r *Room) UpdateKeys(ctx context.Context) error {
	return r.change(ctx, buildUpdate)
}

func buildUpdate(*mls.Group) (mls.CommitOptions, error) {
	return mls.CommitOptions{ForcePath: true}, nil
}

// buildCredential puts the client's present credential into its leaf.
func (r *Room) buildCredential(g *mls.Group) (mls.CommitOptions, error) {
	cred := r.c.credential()
	m, ok := g.Member(g.OwnLeaf())
	if !ok {
		return mls.CommitOptions{}, errors.New("client: no own leaf")
	}
	if m.Leaf.Credential.Equal(cred) {
		return mls.CommitOptions{}, errDone
	}
	return mls.CommitOptions{Credential: &cred}, nil
}

// CommitPending commits what others have proposed, such as that someone leaves or that the hub wants a revoked client
// removed, without the delay after which a client does it by itself.
func (r *Room) CommitPending(ctx context.Context) error {
	r.mu.Lock()
	none := r.removalPending() || !r.toCommit()
	err := r.usable()
	r.mu.Unlock()
	if none || err != nil {
		return err
	}
	return r.change(ctx, r.buildPending)
}
