package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// A node that was restored from a backup has forgotten what came after it. It begins another incarnation, and before it
// serves anybody it asks its peers for what they still have of its rooms:
//
//   - In a room that it hosts, those who follow the room have the entries, and a head that the node itself has signed in
//     the incarnation before. It takes the entries that lead from its own log to that head, and checks them as it did when
//     it ordered them, but for what varies in time. A follower says nothing about what it can't show; if two of them show
//     different histories, neither is taken.
//   - What no follower has is lost. The room goes on from there, in the new incarnation. Followers that have later entries
//     of the old one drop them when new ones come in their place, and clients that have stored any are told to enter the
//     room anew (the event Behind).
//   - GroupInfos aren't passed to followers. Until a member has committed, nobody can join by an external commit after
//     commits that were taken from a follower; clients of this node are asked to commit.
//   - In a room that another node hosts, it asks the hub for the entries after its last one.
//   - KeyPackages of the backup may have been handed out since. All for one use are dropped, and so are those that came
//     with consents; clients publish new ones when they connect. A last-resort one counts as handed out.
//
// A peer that doesn't answer is waited for as long as the configuration says. The store that was superseded is fenced off:
// peers refuse heads of an incarnation before the last that they know (watch.go), and give the proof, a head of the later
// one, to a node that asks. It closes its store for ever then.

const (
	pageBytes   = 4 << 20 // of entries in one LogPage; one larger entry goes alone
	askTimeout  = 30 * time.Second
	askInterval = time.Second
)

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
		err = beginAnew(s)
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
	return err
}

// settled refuses what the node can't do before it has reconciled its rooms with its peers.
func (n *Node) settled() error {
	if n.restored.Load() {
		return refuse("unavailable", "the node was restored from a backup and is asking its peers what came after")
	}
	return nil
}

// reconcile asks the peers what came after the backup that the store was restored from, if it was.
func (n *Node) reconcile(ctx context.Context) error {
	if !n.restored.Load() {
		return nil
	}
	n.log.Warn("this node was restored from a backup: asking peers what came after")
	deadline := time.Now().Add(n.cfg.restoreWait())
	var rooms []mimi.URI
	if err := store.ScanPrefix(n.store, []byte(prefixRoom), func(k, _ []byte) bool {
		rooms = append(rooms, mimi.URI(k))
		return true
	}); err != nil {
		return err
	}
	for _, uri := range rooms {
		r, err := n.openRoom(uri)
		if err != nil {
			return err
		}
		if r.hosted {
			err = n.reconcileHosted(ctx, r, deadline)
		} else {
			err = n.reconcileFollowed(ctx, r, deadline)
		}
		if err != nil {
			return fmt.Errorf("reconciling %s: %w", uri, err)
		}
	}
	if _, err := n.store.Commit(map[string][]byte{keyRestored: nil}, nil); err != nil {
		return err
	}
	n.restored.Store(false)
	n.log.Info("reconciled", "rooms", len(rooms))
	return nil
}

// ask asks a peer for a page of a log, again and again until the deadline; nil if it can't or won't say.
func (n *Node) ask(ctx context.Context, peer string, room mimi.URI, req *federation.LogRequest, deadline time.Time) (*federation.LogPage, error) {
	for {
		asking, cancel := context.WithTimeout(ctx, askTimeout)
		page, err := n.federation.Log(asking, peer, room, req)
		cancel()
		if err == nil {
			return page, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !federation.Unavailable(err) || time.Now().Add(askInterval).After(deadline) {
			n.log.Warn("a peer doesn't say what it has of a room", "room", room, "peer", peer, "err", err)
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(askInterval):
		}
	}
}

// history is what a follower shows of a room hosted here: a chain from the own log to a head of the own key.
type history struct {
	peer string
	*chain.Signed
	at map[uint64]chain.Hash // of the ends of its pages
}

// reconcileHosted takes what followers have of a room's log.
func (n *Node) reconcileHosted(ctx context.Context, r *room, deadline time.Time) error {
	r.mu.Lock()
	who, err := r.who()
	last := r.record.last
	r.mu.Unlock()
	if err != nil {
		return err
	}
	own, err := n.head(r, last)
	if rf := reason(err); rf != nil {
		n.log.Warn("a head can't be signed", "room", r.uri, "reason", rf.detail)
		return nil
	}
	if err != nil {
		return err
	}
	var best *history
	for peer := range who.peers {
		h, err := n.history(ctx, r, own, peer, deadline, nil)
		if err != nil {
			return err
		}
		if h == nil {
			continue
		}
		if best == nil || best.Incarnation < h.Incarnation || best.Incarnation == h.Incarnation && best.Seq < h.Seq {
			best, h = h, best
		}
		if h == nil || h.Incarnation < best.Incarnation {
			continue
		}
		// The other one must be on the way to the best one.
		way, err := n.history(ctx, r, own, best.peer, deadline, &h.Seq)
		if err != nil {
			return err
		}
		if way == nil || way.at[h.Seq] != h.Chain {
			n.log.Error("followers have different histories of a room, none is taken", "room", r.uri, "peer", best.peer, "other", h.peer)
			best = nil
			break
		}
	}
	if best != nil && best.Seq > last {
		if err := n.takeHistory(ctx, r, own, best, deadline); err != nil {
			n.log.Error("taking the log of a follower", "room", r.uri, "peer", best.peer, "err", err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil {
		return r.broken
	}
	var b store.Batch
	if err := n.lose(&b, r.uri, r.record.last+1); err != nil {
		return err
	}
	wait, err := n.store.Apply(&b)
	if err != nil {
		return err
	}
	n.log.Info("reconciled a room", "room", r.uri, "entries", last, "taken", r.record.last-last)
	return wait()
}

// history reads through what a follower has beyond the own log; nil if it shows nothing. The chain at stop, if that isn't
// nil, is among those that are returned.
func (n *Node) history(ctx context.Context, r *room, own *head, peer string, deadline time.Time, stop *uint64) (*history, error) {
	l, err := n.linkAt(r.uri, own.Seq)
	if err != nil || l == nil {
		return nil, err
	}
	h := &history{peer: peer, at: map[uint64]chain.Hash{own.Seq: l.chain}}
	seq, at := own.Seq, l.chain
	for {
		page, err := n.ask(ctx, peer, r.uri, &federation.LogRequest{After: seq, Head: own.encoded}, deadline)
		if err != nil || page == nil {
			return nil, err
		}
		if h.Signed == nil {
			s := new(chain.Signed)
			if len(page.Head) == 0 || codec.Unmarshal(page.Head, s) != nil || n.verifyOwn(r.uri, s) != nil || s.Incarnation >= own.Incarnation {
				n.log.Info("a follower has no head of a room", "room", r.uri, "peer", peer)
				return nil, nil
			}
			h.Signed = s
			if s.Seq <= own.Seq {
				return nil, nil // it has nothing that isn't here
			}
		}
		for _, e := range page.Entries {
			if e.Seq != seq+1 || seq >= h.Seq {
				n.log.Warn("a follower's log isn't what was asked for", "room", r.uri, "peer", peer, "seq", e.Seq, "after", seq)
				return nil, nil
			}
			seq, at = e.Seq, at.Next(e.Seq, chain.NewLink(e.Fanout, e.Context))
			if stop != nil && seq == *stop {
				h.at[seq] = at
			}
		}
		h.at[seq] = at
		if seq == h.Seq {
			if at != h.Chain {
				n.log.Warn("a follower's log doesn't lead to the head that it shows", "room", r.uri, "peer", peer, "seq", seq)
				return nil, nil
			}
			return h, nil
		}
		if len(page.Entries) == 0 {
			n.log.Warn("a follower's log ends before the head that it shows", "room", r.uri, "peer", peer, "seq", seq, "head", h.Seq)
			return nil, nil
		}
	}
}

// verifyOwn says whether a head is one that this node has signed for a room.
func (n *Node) verifyOwn(room mimi.URI, s *chain.Signed) error {
	if s.Room != room {
		return refuse("malformed", "a head of another room")
	}
	_, sender, err := n.keys.hub(s.Suite)
	if err != nil {
		return err
	}
	return s.Verify(sender.SignatureKey)
}

// takeHistory fetches a history once more and makes it the room's log.
func (n *Node) takeHistory(ctx context.Context, r *room, own *head, h *history, deadline time.Time) error {
	for seq := own.Seq; seq < h.Seq; {
		page, err := n.ask(ctx, h.peer, r.uri, &federation.LogRequest{After: seq, Head: own.encoded}, deadline)
		if err != nil {
			return err
		}
		if page == nil || len(page.Entries) == 0 {
			return fmt.Errorf("%s doesn't repeat its log after entry %d", h.peer, seq)
		}
		l, err := n.linkAt(r.uri, seq)
		if err != nil {
			return err
		}
		at, next := l.chain, seq
		for _, e := range page.Entries {
			next++
			at = at.Next(next, chain.NewLink(e.Fanout, e.Context))
		}
		if want, ok := h.at[next]; !ok || want != at {
			return fmt.Errorf("%s gives another log than before after entry %d", h.peer, seq)
		}
		for i := range page.Entries {
			seq++
			if err := n.run(r, func() (*change, error) { return n.orderAgain(r, seq, &page.Entries[i]) }); err != nil {
				return fmt.Errorf("entry %d: %w", seq, err)
			}
		}
	}
	return nil
}

// orderAgain fills the change with an entry that this hub has ordered before and lost. r.mu is held.
func (n *Node) orderAgain(r *room, seq uint64, e *federation.LogEntry) (*change, error) {
	if seq != r.record.last+1 {
		return nil, fmt.Errorf("the log ends with entry %d", r.record.last)
	}
	f := new(mimi.FanoutMessage)
	if err := decode(e.Fanout, f); err != nil {
		return nil, err
	}
	if err := checkFanout(r.uri, f); err != nil {
		return nil, err
	}
	before, err := r.who()
	if err != nil {
		return nil, err
	}
	peers := make(map[string]struct{})
	for p := range before.peers {
		peers[p] = struct{}{}
	}
	c := n.begin(r, peers)
	state := c.batch.Prefixed(key(prefixGroup, r.uri))
	var answer codec.Marshaler = &mimi.UpdateRoomResponse{Code: mimi.UpdateSuccess, AcceptedTimestamp: f.Timestamp}
	var info *mls.StagedInfo
	switch m := f.Message; {
	case m.Private != nil:
		answer = &mimi.SubmitMessageResponse{Code: mimi.SubmitAccepted, AcceptedTimestamp: f.Timestamp, Frank: f.Frank}
	case commits(f):
		staged, err := r.group.CheckCommit(m.Public)
		if err != nil {
			return nil, err
		}
		if err := r.group.Apply(state, staged, nil); err != nil {
			return nil, err
		}
		info, c.record.pending = staged.Info(), nil
		after, err := r.who()
		if err != nil {
			r.broken = err
			return nil, err
		}
		for p := range after.peers {
			c.peers[p] = struct{}{}
		}
	}
	if !commits(f) && f.Message.Public != nil || len(f.ExternalProposals) > 0 {
		list := f.ExternalProposals
		if !commits(f) {
			list = append([]*mls.MLSMessage{f.Message}, f.MoreProposals...)
		}
		for _, m := range list {
			if m.Public == nil {
				r.broken = errRecord
				return nil, refuse("malformed", "a proposal that isn't a PublicMessage")
			}
			s, err := r.group.CheckProposal(m.Public)
			if err == nil {
				err = r.group.ApplyProposal(state, s)
			}
			if err != nil {
				r.broken = err // the group in memory may be ahead of the store
				return nil, err
			}
		}
		c.record.pending = append(slices.Clone(c.record.pending), seq)
	}
	c.log(e.Fanout)
	if c.link.context != e.Context {
		r.broken = errRecord
		return nil, errors.New("it leads to another epoch than it did")
	}
	if info != nil {
		after, err := r.who()
		if err != nil {
			return nil, err
		}
		n.noteMembers(c, info, before.list, after.list, seq)
		for _, m := range info.Added {
			user, client, err := n.verifier.IdentityOf(m.Leaf.Credential)
			if err == nil && client.Domain() == n.cfg.Domain {
				setMember(&c.batch, client, user, r.uri, seq) // it may have had its Welcome
			}
		}
	}
	c.answer(messageHash(f.Message), seq, f.Timestamp, answer)
	return c, nil
}

// lose marks the local clients of a room: those who have stored entries from a number on have what isn't in the log.
func (n *Node) lose(b *store.Batch, room mimi.URI, from uint64) error {
	var bad error
	err := store.ScanPrefix(n.store, []byte(prefixMember), func(k, v []byte) bool {
		client, uri, ok := bytes.Cut(k, []byte{0})
		if !ok || string(uri) != string(room) {
			return true
		}
		var m memberRecord
		if bad = decodeRecord(v, &m, "membership"); bad != nil {
			return false
		}
		if m.anew == 0 || from < m.anew {
			m.anew = from
			b.Set(key(prefixMember, mimi.URI(client), uri), codec.Marshal(m))
			b.Delete(key(prefixAcked, mimi.URI(client), uri)) // which may be of entries that are lost
		}
		return true
	})
	return errors.Join(err, bad)
}

// reconcileFollowed asks the hub of a room for the entries after the last one that is here.
func (n *Node) reconcileFollowed(ctx context.Context, r *room, deadline time.Time) error {
	for {
		h := r.heads.last.Load()
		if h == nil {
			return nil // a hub that keeps no chain, or has sent nothing yet
		}
		r.mu.Lock()
		last := r.record.last
		r.mu.Unlock()
		page, err := n.ask(ctx, r.uri.Domain(), r.uri, &federation.LogRequest{After: last, Head: h.encoded}, deadline)
		if err != nil {
			return err
		}
		if page == nil || len(page.Entries) == 0 {
			return nil
		}
		msgs := make([]federation.Sequenced, len(page.Entries))
		for i, e := range page.Entries {
			msgs[i] = federation.Sequenced{Seq: e.Seq, Fanout: e.Fanout}
		}
		msgs[len(msgs)-1].Head = page.Head
		if err := n.notify(r.uri.Domain(), r.uri, msgs); err != nil {
			if reason(err) == nil {
				return err
			}
			n.log.Warn("a hub's log can't be taken", "room", r.uri, "err", err)
			return nil
		}
		if r.durable.Load() == last {
			return nil
		}
	}
}

// tellLog answers a peer that was restored from a backup.
func (n *Node) tellLog(ctx context.Context, from string, uri mimi.URI, req *federation.LogRequest) (*federation.LogPage, error) {
	if req.After >= federation.MaxSeq {
		return nil, refuse("malformed", "no such entry")
	}
	s := new(chain.Signed)
	if err := decode(req.Head, s); err != nil {
		return nil, err
	}
	r, err := n.openRoom(uri)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, refuse("notFound", "there is no room %s", uri)
	}
	page := new(federation.LogPage)
	if r.hosted {
		if err := n.verifyOwn(uri, s); err != nil {
			return nil, refuse("notAllowed", "the head isn't one of %s", n.cfg.Domain)
		}
		r.mu.Lock()
		err := r.takesPart(submitter{domain: from})
		r.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if req.After < s.Seq {
			return nil, refuse("notAllowed", "who has had entry %d needs none before", s.Seq)
		}
	} else {
		if uri.Domain() != from {
			return nil, refuse("notAllowed", "%s isn't the hub of %s", from, uri)
		}
		if err := n.verifyHead(ctx, uri, s); err != nil {
			return nil, err
		}
		if err := n.fence(s); err != nil {
			return nil, err
		}
		if h := r.heads.last.Load(); h != nil {
			page.Head = h.encoded
		}
	}
	size := 0
	var bad error
	if err := n.store.Scan(key(prefixLog, uri, be64(req.After+1)), key(prefixLog, uri, be64(r.durable.Load()+1)), func(k, v []byte) bool {
		seq := binary.BigEndian.Uint64(k[len(k)-8:])
		if seq != req.After+1+uint64(len(page.Entries)) {
			return false
		}
		l, err := n.linkAt(uri, seq)
		if err != nil || l == nil {
			bad = err
			return false
		}
		if size += len(v); size > pageBytes && len(page.Entries) > 0 {
			return false
		}
		page.Entries = append(page.Entries, federation.LogEntry{Seq: seq, Fanout: bytes.Clone(v), Context: l.context})
		return len(page.Entries) < federation.MaxLogEntries
	}); err != nil || bad != nil {
		return nil, errors.Join(err, bad)
	}
	if r.hosted && len(page.Entries) > 0 {
		var fanouts [][]byte
		for _, e := range page.Entries {
			fanouts = append(fanouts, e.Fanout)
		}
		if page.Head, err = n.notice(uri, req.After+1, fanouts); err != nil {
			return nil, err
		}
	}
	return page, nil
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
		return refuse("notAllowed", "a head of an incarnation that has ended")
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

// checkSuperseded asks a peer whether it knows a later incarnation of this node. If it has the proof, the node ends.
func (n *Node) checkSuperseded(ctx context.Context, peer string) error {
	b, err := n.federation.Incarnation(ctx, peer)
	if err != nil || len(b) == 0 {
		return err
	}
	s := new(chain.Signed)
	if err := decode(b, s); err != nil {
		return err
	}
	if s.Incarnation <= n.incarnation {
		return nil
	}
	if err := n.verifyOwn(s.Room, s); err != nil {
		return fmt.Errorf("%s has a head that this node hasn't signed: %w", peer, err)
	}
	if s.Room.Domain() != n.cfg.Domain {
		return fmt.Errorf("%s has a head of %s", peer, s.Room)
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
