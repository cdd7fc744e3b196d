package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// A node that was restored from a backup has forgotten what came after it. It begins another incarnation, and before it
// serves anybody it asks its peers (reconcile.go):
//
//   - In a room that it hosts, those who follow the room have the entries, and a head that the node itself has signed in
//     the incarnation before. It takes the entries that lead from its own log to that head, and checks them as it did when
//     it ordered them, but for what varies in time. A follower says nothing about what it can't show; if two of them show
//     different histories, neither is taken.
//   - What no follower has is lost, and so are rooms that were created since. A room goes on from there, in the new
//     incarnation. Followers that have later entries of the old one drop them when new ones come in their place, and
//     clients that have stored any are told to enter the room anew (the event Behind, with a head that shows why). A follower
//     that hears of a later incarnation asks for the head of the log, so that this needn't wait for somebody to write.
//   - GroupInfos aren't passed to followers. Until a member has committed, nobody can join by an external commit after
//     commits that were taken from a follower; clients of this node are asked to commit.
//   - In a room that another node hosts, it asks the hub for the entries after its last one. It takes nothing else of the
//     room before it has them.
//   - A client that has a room of which the node knows nothing any more is told to enter it anew.
//   - KeyPackages of the backup may have been handed out since. All for one use are dropped, and so are those that came
//     with consents; clients publish new ones when they connect. A last-resort one stays, and counts as handed out.
//     Invitations may have been used, and are withdrawn.
//   - Peers have the trust bundle that was published last. What it revokes stays revoked, and the next one comes after it.
//
// A peer that doesn't answer is waited for as long as the configuration says, and one that answers slowly may take that
// long in all. What it would have said is lost if it follows, and is asked for later if it is the hub.
//
// The store that was superseded is fenced off: peers refuse heads of an incarnation before the last that they know
// (watch.go), in a request to notify as in an answer, and give the proof, a head of the later one, to a node that asks. It
// closes its store for ever then.

// errSuperseded says that the store may not be served any more.
var errSuperseded = errors.New("this node was restored elsewhere from a backup, and peers know its successor")

// Restore makes a data directory, which must be empty or not exist, of a backup, which must be whole. The node that is
// started there is another incarnation.
func Restore(backup, data string) (b *Backup, err error) {
	if list, err := os.ReadDir(data); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking into the data directory: %w", err)
	} else if len(list) > 0 {
		return nil, fmt.Errorf("%s isn't empty", data)
	}
	if b, err = VerifyBackup(backup); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b, err = nil, errors.Join(err, os.RemoveAll(data))
		}
	}()
	if err := errors.Join(
		copyTree(StoreDir(backup), StoreDir(data), false),
		copyTree(keysDir(backup), keysDir(data), false),
		copyTree(assetsDir(backup), assetsDir(data), false),
	); err != nil {
		return nil, err
	}
	s, err := store.Open(StoreDir(data), store.Options{})
	if err != nil {
		return nil, err
	}
	if err = checkFormat(s); err == nil {
		err = errors.Join(beginAnew(s), authority.WithdrawInvitations(s))
	}
	if err := errors.Join(err, s.Close()); err != nil {
		return nil, err
	}
	// No node starts without the authority: a copy that isn't finished can't be served.
	whole := AuthorityDir(data)
	if err := errors.Join(copyTree(AuthorityDir(backup), whole+".new", false), syncDirs(data)); err != nil {
		return nil, err
	}
	if err := os.Rename(whole+".new", whole); err != nil {
		return nil, fmt.Errorf("finishing the data directory: %w", err)
	}
	return b, errors.Join(syncDir(data), syncDir(filepath.Dir(filepath.Clean(data))))
}

// beginAnew makes the store of a backup that of a new incarnation, which has to ask its peers yet.
func beginAnew(s store.Store) error {
	old, err := openIncarnation(s)
	if err != nil {
		return err
	}
	var b store.Batch
	last := make(map[string]bool) // ends of the keys of last-resort KeyPackages
	if err := store.ScanPrefix(s, []byte(prefixLastResort), func(k, _ []byte) bool {
		last[string(k)] = true
		b.Set([]byte(prefixLastResort+string(k)), []byte{1})
		return true
	}); err != nil {
		return err
	}
	for _, prefix := range []string{prefixKeyPackage, prefixGranted} {
		if err := store.ScanPrefix(s, []byte(prefix), func(k, _ []byte) bool {
			if prefix != prefixKeyPackage || !last[string(k)] {
				b.Delete([]byte(prefix + string(k)))
			}
			return true
		}); err != nil {
			return err
		}
	}
	b.Set([]byte(keyRestored), be64(old))
	b.Delete([]byte(keySuperseded)) // which doesn't hold for the new incarnation
	wait, err := s.Apply(&b)
	if err != nil {
		return err
	}
	if err := wait(); err != nil {
		return err
	}
	_, err = renewIncarnation(s)
	return err
}

// openRestored finds out whether the store has to be reconciled, or may not be served at all.
func (n *Node) openRestored() error {
	proof, err := n.store.Get([]byte(keySuperseded))
	if err != nil {
		return err
	}
	if proof != nil {
		return errSuperseded
	}
	mark, err := n.store.Get([]byte(keyRestored))
	n.restored.Store(mark != nil)
	n.late.rooms = make(map[mimi.URI]bool)
	return errors.Join(err, store.ScanPrefix(n.store, []byte(prefixLate), func(k, _ []byte) bool {
		n.late.rooms[mimi.URI(k)] = true
		return true
	}))
}

// settled refuses what the node can't do before it has reconciled its rooms with its peers.
func (n *Node) settled() error {
	if n.superseded.Load() {
		return refuse("unavailable", "the node was superseded by one that was restored from a backup")
	}
	if n.restored.Load() {
		return refuse("unavailable", "the node was restored from a backup and is asking its peers what came after")
	}
	return nil
}

func latestKey(domain string) []byte { return append([]byte(prefixLatest), domain...) }

// latestOf returns the head of the last incarnation of a hub that is known, nil if there is none.
func (n *Node) latestOf(domain string) (*chain.Signed, error) {
	b, err := n.store.Get(latestKey(domain))
	if err != nil || b == nil {
		return nil, err
	}
	s := new(chain.Signed)
	return s, decodeRecord(b, s, "last incarnation")
}

// fence keeps a verified head of a hub if it is of a later incarnation than any before, and refuses one of an incarnation
// that has ended.
func (n *Node) fence(s *chain.Signed) error {
	domain := s.Room.Domain()
	n.fences.Lock()
	defer n.fences.Unlock()
	known, ok := n.fenced[domain]
	if !ok {
		last, err := n.latestOf(domain)
		if err != nil {
			return err
		}
		if last != nil {
			known = last.Incarnation
		}
	}
	switch {
	case s.Incarnation < known:
		return refuse("notAllowed", "a head of an incarnation of %s that has ended: it was restored from a backup since", domain)
	case s.Incarnation > known:
		if _, err := n.store.Commit(map[string][]byte{string(latestKey(domain)): codec.Marshal(s)}, nil); err != nil {
			return err
		}
		known = s.Incarnation
	}
	if n.fenced == nil {
		n.fenced = make(map[string]uint64)
	}
	n.fenced[domain] = known
	return nil
}

// checkSuperseded looks at the last head that a peer has of this node. If it is of a later incarnation, the node ends.
func (n *Node) checkSuperseded(peer string, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s := new(chain.Signed)
	if err := decode(b, s); err != nil {
		return err
	}
	if s.Incarnation <= n.incarnation {
		return nil
	}
	if s.Room.Domain() != n.cfg.Domain {
		return refuse("malformed", "%s shows a head of %s", peer, s.Room)
	}
	if err := n.verifyOwn(s.Room, s); err != nil {
		return refuse("malformed", "%s shows a head that this node hasn't signed: %v", peer, err)
	}
	n.log.Error("this node was superseded by one that was restored from a backup", "peer", peer, "incarnation", s.Incarnation)
	if _, err := n.store.Commit(map[string][]byte{keySuperseded: b}, nil); err != nil {
		return err
	}
	n.superseded.Store(true)
	select {
	case n.ends <- errSuperseded:
	default:
	}
	return nil
}
