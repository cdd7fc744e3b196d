package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// Room is a room that this client is or was a member of. Its methods may be called from several goroutines at once.
type Room struct {
	c   *Client
	uri mimi.URI

	mu         sync.Mutex
	group      *mls.Group          // guarded by mu; after a removal the state of the last epoch
	header     header              // guarded by mu
	frozen     error               // guarded by mu
	flags      map[mimi.URI]string // guarded by mu: members whose credentials aren't good at present, by client
	changed    chan struct{}       // guarded by mu: closed and replaced at every change
	fresh      bool                // guarded by mu: the node knows of nothing that was sent after this state; see restored.go
	behind     bool                // guarded by mu: this state is an old copy; the room is frozen and entered anew
	bare       bool                // guarded by mu: the state was never sealed
	agent      agent               // guarded by mu
	cast       cast                // guarded by mu
	gateway    gateway             // guarded by mu
	ledger     ledger              // guarded by mu
	expiration struct {            // guarded by mu: the policy in an epoch of a group
		group  *mls.Group
		epoch  uint64
		policy *mimi.MessageExpiration
	}
	ephemeral struct { // guarded by mu; those sent in an epoch
		epoch uint64
		count int
	}
	anew    *rate.Limiter     // of external commits that nobody asked for
	leavers map[mimi.URI]bool // guarded by mu: users who have asked to leave
	entered uint64            // guarded by mu: the epoch that began with this client's external commit, 0 if that was before the start

	spent bool          // guarded by mu: keys may have been used since the state was last resealed
	wake  chan struct{} // has room for one; tells the worker to look again

	// What the worker has to do; guarded by mu. See work.go.
	staged   *staged
	jobs     []*job
	outbox   []*outgoing
	nextOut  uint64
	leaving  *leaving
	commitAt time.Time // when to commit what others proposed; zero if nothing is pending
	stray    int       // entries out of order since the last one in order
}

// header is the part of a room's state that changes with every entry of the log.
type header struct {
	cursor  uint64 // number of the last entry processed
	left    bool   // this client isn't a member any more
	told    bool   // the node knows that it left
	leaving bool   // the user wants to leave: proposed anew in every epoch until a commit does it
}

const headerFormat = 1

// MarshalMLS implements codec.Marshaler, for the store.
func (h header) MarshalMLS(w *codec.Writer) {
	w.Uint8(headerFormat)
	w.Uint64(h.cursor)
	w.Optional(h.left)
	w.Optional(h.told)
	w.Optional(h.leaving)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (h *header) UnmarshalMLS(r *codec.Reader) {
	if f := r.Uint8(); r.Err() == nil && f != headerFormat {
		r.Failf("room header of format %d", f)
	}
	h.cursor = r.Uint64()
	h.left = r.Optional()
	h.told = r.Optional()
	h.leaving = r.Optional()
}

func newRoom(c *Client, uri mimi.URI) *Room {
	return &Room{
		c: c, uri: uri, anew: rate.NewLimiter(rate.Every(anewInterval), anewBurst), flags: make(map[mimi.URI]string), changed: make(chan struct{}), wake: make(chan struct{}, 1),
	}
}

// loadRoom restores a room from the store.
func loadRoom(c *Client, uri mimi.URI) (*Room, error) {
	r := newRoom(c, uri)
	b, err := c.db.Get(r.key(roomHeader))
	if err != nil {
		return nil, err
	}
	if err := codec.Unmarshal(b, &r.header); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	state, err := r.groupState()
	if err != nil {
		return nil, err
	}
	if r.group, err = mls.LoadGroup(r.c.config, r.c.signer, state); err != nil {
		return nil, err
	}
	r.group.Disregard(r.unfounded)
	if err := r.loadLedger(); err != nil {
		return nil, err
	}
	r.spent, r.bare = true, true
	for key := range state {
		r.bare = r.bare && !mls.Erasable(key)
	}
	if err := r.loadStaged(); err != nil {
		return nil, err
	}
	if err := r.loadOutbox(); err != nil {
		return nil, err
	}
	if err := r.loadLeaving(); err != nil {
		return nil, err
	}
	if err := r.loadLeavers(); err != nil {
		return nil, err
	}
	r.judgeLocked()
	r.schedule()
	return r, nil
}

// copyGroup reads the MLS state from the store: a second copy of the group that the room works with.
func (r *Room) copyGroup() (*mls.Group, error) {
	state, err := r.groupState()
	if err != nil {
		return nil, err
	}
	return mls.LoadGroup(r.c.config, r.c.signer, state)
}

// reseal makes what the store still has of used message keys unreadable; without it that takes until the epoch is
// forgotten. mu is held.
func (r *Room) reseal(b *store.Batch) error {
	if !r.spent || r.usable() != nil {
		return nil
	}
	if err := r.group.Reseal(b.Prefixed(r.key(roomGroup))); err != nil {
		return fmt.Errorf("client: reseal %s: %w", r.uri, err)
	}
	if r.bare {
		b.Set(keyCompact, nil)
	}
	r.spent, r.bare = false, false
	return nil
}

// touch tells everyone who waits that the room has changed. mu is held.
func (r *Room) touch() {
	close(r.changed)
	r.changed = make(chan struct{})
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// await returns when done, called with mu held, is true.
func (r *Room) await(ctx context.Context, done func() bool) error {
	for {
		r.mu.Lock()
		ok, changed := done(), r.changed
		r.mu.Unlock()
		if ok {
			return nil
		}
		if err := r.c.gone(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// usable says why nothing can be done in the room, nil if it can. mu is held.
func (r *Room) usable() error {
	if err := r.c.gone(); err != nil {
		return err
	}
	switch {
	case r.frozen != nil:
		return r.frozen
	case r.header.left || !r.group.Active():
		return fmt.Errorf("client: %w: %s", ErrNotMember, r.uri)
	}
	return nil
}

// URI returns the room's name.
func (r *Room) URI() mimi.URI { return r.uri }

// Active says whether this client is a member.
func (r *Room) Active() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.header.left && r.group.Active()
}

// Frozen returns why the room is frozen, nil if it isn't. A frozen room can be entered anew by Join.
func (r *Room) Frozen() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.frozen
}

// Name returns the room's name for people, as the room's metadata has it.
func (r *Room) Name() string { return r.Metadata().RoomName }

// Metadata returns what is shown of the room, such as its name and its subject.
func (r *Room) Metadata() mimi.RoomMetadata {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, _ := mimi.MetadataOf(r.group.Dictionary()) // no commit leads to others than decode
	return m
}

// Epoch returns the number of the present epoch.
func (r *Room) Epoch() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.group.Epoch()
}

// EpochAuthenticator returns a value that two members have in common only if they agree on the room's state (RFC
// 9420, Section 8.7); nil for a former member.
func (r *Room) EpochAuthenticator() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.group.EpochAuthenticator()
}

// Seq returns the number of the last entry of the room's log that was processed.
func (r *Room) Seq() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.header.cursor
}

// WaitSeq returns when the entry n of the room's log was processed.
func (r *Room) WaitSeq(ctx context.Context, n uint64) error {
	if err := r.await(ctx, func() bool { return r.header.cursor >= n }); err != nil {
		return fmt.Errorf("client: wait for entry %d of %s: %w", n, r.uri, err)
	}
	return nil
}

// WaitEpoch returns when the room is in epoch n or a later one.
func (r *Room) WaitEpoch(ctx context.Context, n uint64) error {
	if err := r.await(ctx, func() bool { return r.group.Epoch() >= n }); err != nil {
		return fmt.Errorf("client: wait for epoch %d of %s: %w", n, r.uri, err)
	}
	return nil
}

// Participant is a user of a room with the clients that are members of its group.
type Participant struct {
	User    mimi.URI
	Role    uint32
	Bots    []mimi.Bot // of the room's policy, that have this role: the user is one of them, or may be
	Clients []Member
}

// Member is a client in a room.
type Member struct {
	Client mimi.URI
	Leaf   mls.LeafIndex
	// Flag says what is wrong with the client's credential at present: "revoked", "expired", "not yet valid",
	// "unknown provider", "untrusted"; "" if it is good. While anyone's is flagged this client sends no messages.
	Flag string
}

// Participants returns who takes part, in the order of the room's participant list.
func (r *Room) Participants() []Participant {
	r.mu.Lock()
	defer r.mu.Unlock()
	list, err := participants(r.group)
	if err != nil {
		return nil
	}
	out := make([]Participant, len(list))
	for i, p := range list {
		out[i] = Participant{User: p.User, Role: p.Role, Bots: mimi.BotsOf(r.group.Dictionary(), p.Role)}
	}
	for m := range r.group.Members() {
		user, id, err := r.c.identity(m.Leaf)
		if err != nil {
			continue
		}
		if i, _, ok := list.Find(user); ok {
			out[i].Clients = append(out[i].Clients, Member{Client: id, Leaf: m.Index, Flag: r.flags[id]})
		}
	}
	return out
}

// identity returns the user and the client that a leaf's credential names.
func (c *Client) identity(l *mls.LeafNode) (user, client mimi.URI, err error) {
	return c.trust.verifier.IdentityOf(l.Credential)
}

func has(list mimi.ParticipantList, user mimi.URI) bool {
	_, _, ok := list.Find(user)
	return ok
}

// participants returns the participant list of a group.
func participants(g *mls.Group) (mimi.ParticipantList, error) {
	b, ok := g.Dictionary().Get(mimi.ComponentParticipantList)
	if !ok {
		return nil, errors.New("the group has no participant list")
	}
	var list mimi.ParticipantList
	if err := codec.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("participant list: %w", err)
	}
	return list, nil
}

// checkRoom judges a group that this client is to join: it belongs to the room, the hub may propose, every member's
// user is a participant. The commits that follow are judged by mimi.RoomPolicy.
func (c *Client) checkRoom(room mimi.URI, g *mls.Group) error {
	if group := mimi.URI(g.GroupID()); !bytes.Equal(g.GroupID(), []byte(room.Group())) {
		parsed, err := mimi.ParseURI(string(group))
		if err != nil || parsed.Kind() != 'g' || parsed.Room() != room {
			return fmt.Errorf("group %q is not of room %s", g.GroupID(), room)
		}
	}
	list, err := participants(g)
	if err != nil {
		return err
	}
	roles, err := mimi.RolesOf(g.Dictionary())
	if err != nil {
		return err
	}
	for m := range g.Members() {
		user, id, err := c.identity(m.Leaf)
		if err != nil {
			return fmt.Errorf("leaf %d: %w", m.Index, err)
		}
		if _, role, ok := list.Find(user); !ok || !roles.Find(role).Active() {
			return fmt.Errorf("%s is a member and its user %s no participant", id, user)
		}
	}
	if self := c.User(); !has(list, self) {
		return fmt.Errorf("%s is no participant", self)
	}
	ext, ok := g.Extension(mls.ExtensionExternalSenders)
	if !ok {
		return errors.New("the hub is no external sender of the group")
	}
	var senders mls.ExternalSenders
	if err := codec.Unmarshal(ext, &senders); err != nil {
		return fmt.Errorf("external senders: %w", err)
	}
	if len(senders) == 0 {
		return errors.New("the hub is no external sender of the group")
	}
	if err := checkHub(room, senders[0].Credential); err != nil {
		return err
	}
	return checkAgent(room, g)
}

// checkHub says whether a credential names the provider that hosts the room. Whether it is good at present is a
// matter of trust and not checked.
func checkHub(room mimi.URI, cred mls.Credential) error {
	id, err := authority.ParseIdentity(cred.Certificates)
	if err != nil {
		return fmt.Errorf("credential of the hub: %w", err)
	}
	if !id.Node || id.Domain != room.Domain() {
		return fmt.Errorf("credential of the hub is for %s", id.Domain)
	}
	return nil
}

// judge looks at the members' credentials anew.
func (r *Room) judge() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.judgeLocked()
	r.schedule()
	r.touch()
}

func (r *Room) judgeLocked() {
	clear(r.flags)
	if !r.group.Active() {
		return
	}
	for m := range r.group.Members() {
		r.judgeLeaf(m.Leaf)
	}
}

func (r *Room) judgeLeaf(l *mls.LeafNode) {
	_, id, err := r.c.identity(l)
	if err != nil {
		return
	}
	if f := r.c.trust.flag(l.Credential); f != "" {
		r.flags[id] = f
	} else {
		delete(r.flags, id)
	}
}

// held says whether messages must wait: proposals are to be committed before (RFC 9420, Section 12.4), or a member
// other than this client isn't trusted at present. mu is held.
func (r *Room) held() bool {
	if r.toCommit() || r.leavePending() {
		return true
	}
	own := r.c.ID()
	for id := range r.flags {
		if id != own {
			return true
		}
	}
	return false
}

// schedule decides when this client commits what is pending. mu is held.
func (r *Room) schedule() {
	switch {
	case !r.group.Active() || r.removalPending() || !r.toCommit():
		r.commitAt = time.Time{}
	case r.commitAt.IsZero():
		r.commitAt = time.Now().Add(r.c.o.CommitDelay())
	}
}

// removalPending says whether a pending proposal removes this client, or one that it made may do so; it can't commit then. mu is held.
func (r *Room) removalPending() bool {
	own := r.group.OwnLeaf()
	return r.leavePending() || slices.ContainsFunc(r.group.Pending(), func(p mls.PendingProposal) bool {
		return p.Proposal.Remove != nil && p.Proposal.Remove.Removed == own && !r.unfounded(p) ||
			p.Proposal.Type == mls.ProposalSelfRemove && p.Sender.Leaf == own
	})
}

// saveHeader puts the header into a batch. mu is held.
func (r *Room) saveHeader(b *store.Batch) { b.Set(r.key(roomHeader), codec.Marshal(r.header)) }
