package node

import (
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// room is a room that this node knows: one that it hosts, or one whose log it follows.
//
// A change is checked and applied to the store under mu, in one batch; the wait for the disk comes after mu is
// released, so that changes that queue up share a sync. Whatever leaves the node (answers, events, fan-out) comes
// from entries up to durable only.
type room struct {
	uri    mimi.URI
	hosted bool

	mu     sync.Mutex
	record roomRecord       // guarded by mu
	group  *mls.PublicGroup // guarded by mu; nil unless hosted
	broken error            // guarded by mu; set when memory and store may differ, until the next start
	roster *roster          // guarded by mu; of the group's current epoch, nil if not computed yet
	link   *linkRecord      // guarded by mu; of record.last, nil if there is no chain
	cuts   int              // guarded by mu; how often the log of a room that is followed was cut off
	heads  heads

	durable atomic.Uint64 // the last entry that is on disk
}

// openRoom returns a room, nil if the node doesn't know it.
func (n *Node) openRoom(uri mimi.URI) (*room, error) {
	n.roomsMu.Lock()
	r := n.rooms[uri]
	n.roomsMu.Unlock()
	if r != nil {
		return r, nil
	}
	b, err := n.store.Get(roomKey(uri))
	if err != nil || b == nil {
		return nil, err
	}
	// Whoever loads a room has made nothing of it yet, so that loading it twice at once does no harm.
	r = &room{uri: uri}
	if err := decodeRecord(b, &r.record, "room"); err != nil {
		return nil, err
	}
	if r.hosted = r.record.hosted; r.hosted {
		if r.group, err = mls.LoadPublicGroup(n.publicConfig(), n.groupState(uri)); err != nil {
			return nil, fmt.Errorf("loading the group of %s: %w", uri, err)
		}
	}
	if err := n.loadChain(r); err != nil {
		return nil, fmt.Errorf("loading the chain of %s: %w", uri, err)
	}
	if err := n.barrier(); err != nil {
		return nil, err
	}
	r.durable.Store(r.record.last)
	n.roomsMu.Lock()
	defer n.roomsMu.Unlock()
	if other := n.rooms[uri]; other != nil {
		return other, nil
	}
	n.rooms[uri] = r
	return r, nil
}

// hostedRoom is openRoom for rooms whose hub this node is.
func (n *Node) hostedRoom(uri mimi.URI) (*room, error) {
	if uri.Kind() != 'r' || uri.Domain() != n.cfg.Domain {
		return nil, refuse("wrongProvider", "%s is not hosted here", uri)
	}
	if err := n.settled(); err != nil {
		return nil, err
	}
	r, err := n.openRoom(uri)
	if err != nil {
		return nil, err
	}
	if r == nil || !r.hosted {
		return nil, refuse("notFound", "there is no room %s", uri)
	}
	return r, nil
}

// followRoom makes the node know a room that another one hosts, durably.
func (n *Node) followRoom(uri mimi.URI) (*room, error) {
	r, err := n.openRoom(uri)
	if err != nil || r != nil {
		return r, err
	}
	k := string(roomKey(uri))
	if _, err := n.store.Commit(map[string][]byte{k: codec.Marshal(roomRecord{})}, map[string][]byte{k: nil}); err != nil {
		return nil, fmt.Errorf("beginning to follow %s: %w", uri, err)
	}
	return n.openRoom(uri)
}

// hostedRooms returns the rooms whose hub this node is.
func (n *Node) hostedRooms() ([]mimi.URI, error) {
	var uris []mimi.URI
	var bad error
	err := store.ScanPrefix(n.store, []byte(prefixRoom), func(k, v []byte) bool {
		var rec roomRecord
		if bad = decodeRecord(v, &rec, "room"); bad != nil {
			return false
		}
		if rec.hosted {
			uris = append(uris, mimi.URI(k))
		}
		return true
	})
	if bad != nil {
		err = bad
	}
	return uris, err
}

func roomKey(uri mimi.URI) []byte { return append([]byte(prefixRoom), uri...) }

func (n *Node) groupState(uri mimi.URI) iter.Seq2[[]byte, []byte] {
	return func(yield func(k, v []byte) bool) {
		if err := store.ScanPrefix(n.store, key(prefixGroup, uri), yield); err != nil {
			n.log.Error("reading a group", "room", uri, "err", err)
		}
	}
}

// publicConfig is how this node judges handshakes: by the same rules as the clients, and by the trust of now.
func (n *Node) publicConfig() mls.PublicConfig {
	return mls.PublicConfig{
		Verifier:   n.verifier.ForHub(),
		Components: mimi.Components(),
		Policy:     mimi.RoomPolicy(n.verifier.IdentityOf),
	}
}

// advance notes that entries up to seq are on disk.
func (r *room) advance(seq uint64) {
	for {
		d := r.durable.Load()
		if d >= seq || r.durable.CompareAndSwap(d, seq) {
			return
		}
	}
}

// settle waits until entry seq is on disk, or the last entry if there is no seq yet: a hub may send the Welcome that
// belongs to a commit before the commit. r.mu isn't held.
func (n *Node) settle(r *room, seq uint64) error {
	if r.durable.Load() >= seq {
		return nil
	}
	r.mu.Lock()
	last := r.record.last
	r.mu.Unlock()
	if err := n.barrier(); err != nil {
		return err
	}
	r.advance(min(seq, last))
	return nil
}

// barrier waits until everything that was applied to the store is on disk.
func (n *Node) barrier() error {
	wait, err := n.store.Apply(new(store.Batch))
	if err != nil {
		return err
	}
	return wait()
}

// usable says whether the room can be changed; r.mu is held.
func (r *room) usable() error {
	if r.broken != nil {
		return fmt.Errorf("%s waits for a restart of the node: %w", r.uri, r.broken)
	}
	return nil
}

// roster is who takes part in a hosted room in one epoch.
type roster struct {
	epoch uint64
	list  mimi.ParticipantList
	roles mimi.RoleList
	peers map[string]struct{} // the providers of users and clients, this one excepted; not to be changed
	agent []byte              // the signature key of the franking agent, nil if there is none

	members int    // clients
	renewal uint16 // days in which leaves are to be renewed, 0 if they needn't

	context chain.Hash // of the GroupContext
}

// who returns the room's roster; r.mu is held.
func (r *room) who() (*roster, error) {
	if r.roster != nil && r.roster.epoch == r.group.Epoch() {
		return r.roster, nil
	}
	dictionary := r.group.Dictionary()
	list, err := participantsOf(dictionary)
	if err != nil {
		return nil, err
	}
	roles, err := mimi.RolesOf(dictionary)
	if err != nil {
		return nil, err
	}
	ro := &roster{epoch: r.group.Epoch(), list: list, roles: roles, peers: make(map[string]struct{}), context: chain.ContextOf(r.group.Context())}
	if a, err := mimi.FrankingAgent(dictionary); err != nil {
		return nil, err
	} else if a != nil {
		ro.agent = a.SignatureKey
	}
	if ro.renewal, err = mimi.RenewalDays(dictionary); err != nil {
		return nil, err
	}
	for _, p := range list {
		if roles.Find(p.Role).Active() {
			ro.peers[p.User.Domain()] = struct{}{}
		}
	}
	for m := range r.group.Members() {
		ro.members++
		if user, _, err := authority.IdentityOf(m.Leaf.Credential); err == nil {
			ro.peers[user.Domain()] = struct{}{}
		}
	}
	delete(ro.peers, r.uri.Domain())
	r.roster = ro
	return ro, nil
}

// role returns a user's role, nil if the user isn't in the participant list.
func (ro *roster) role(user mimi.URI) *mimi.Role {
	_, role, ok := ro.list.Find(user)
	if !ok {
		return nil
	}
	return ro.roles.Find(role)
}

func participantsOf(d mls.AppDataDictionary) (mimi.ParticipantList, error) {
	data, ok := d.Get(mimi.ComponentParticipantList)
	if !ok {
		return nil, fmt.Errorf("%w: no participant list", errRecord)
	}
	var l mimi.ParticipantList
	if err := codec.Unmarshal(data, &l); err != nil {
		return nil, fmt.Errorf("decoding the participant list: %w", err)
	}
	return l, nil
}

// members returns where a client is or was a member.
func (n *Node) members(client mimi.URI) (map[mimi.URI]memberRecord, error) {
	found := make(map[mimi.URI]memberRecord)
	var bad error
	err := store.ScanPrefix(n.store, key(prefixMember, client), func(k, v []byte) bool {
		var m memberRecord
		if bad = decodeRecord(v, &m, "membership"); bad != nil {
			return false
		}
		found[mimi.URI(k)] = m
		return true
	})
	if bad != nil {
		err = bad
	}
	return found, err
}

func (n *Node) member(client, room mimi.URI) (*memberRecord, error) {
	b, err := n.store.Get(key(prefixMember, client, []byte(room)))
	if err != nil || b == nil {
		return nil, err
	}
	m := new(memberRecord)
	return m, decodeRecord(b, m, "membership")
}

// setMember notes that a client gets a room's entries from the one after start.
func setMember(b *store.Batch, client, user, room mimi.URI, start uint64) {
	b.Set(key(prefixMember, client, []byte(room)), codec.Marshal(memberRecord{start: start}))
	b.Set(key(prefixUserRoom, user, []byte(room)), nil)
}

func now() uint64 { return uint64(time.Now().UnixMilli()) }
