package federation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/parley-mls/parley/mls/codec"
	"github.com/quic-go/quic-go"
)

// The keys in the store.
const (
	keyIncarnation = "g/incarnation" // uint64, the last one that a record was signed with
	keyRecord      = "g/r/"          // and the domain: the newest Record of an approved peer
	keyAddress     = "g/a/"          // and the domain: where it was last reached
)

const (
	maxSync = 1 << 20 // bytes of a request, an answer or news

	// Records of nodes that aren't approved: of how many the operator can be told, and how many one peer can bring.
	maxUnapproved        = 1024
	maxUnapprovedPerPeer = 128
)

// heardRecord is the record of a node that isn't approved.
type heardRecord struct {
	Record
	from string // the peer that brought it first
}

// recordID names the record of a domain under a root, so that no root's record hides another's:
// SHA-256(domain || 0 || root certificate).
type recordID [sha256.Size]byte

func (r *Record) id() recordID {
	h := sha256.New()
	io.WriteString(h, r.Domain)
	h.Write([]byte{0})
	if len(r.Chain) > 0 {
		h.Write(r.Chain[len(r.Chain)-1])
	}
	return recordID(h.Sum(nil))
}

// syncRequest and syncAnswer compare the records of two nodes. The asking node sends what it has, and its own record
// in full, so that the other can follow what it says about itself from then on.
//
//	struct {
//	    opaque id[32];
//	    uint64 incarnation;
//	} RecordID;
//
//	struct {
//	    RecordID have<V>;        /* ascending */
//	    NodeRecord own;
//	} SyncRequest;
//
//	struct {
//	    NodeRecord newer<V>;     /* what the asking node hasn't */
//	    RecordID wanted<V>;      /* records that the answering node wants as news, ascending */
//	} SyncAnswer;
type syncRequest struct {
	have map[recordID]uint64
	own  Record
}

func (q *syncRequest) MarshalMLS(w *codec.Writer) {
	marshalIDs(w, q.have)
	q.own.MarshalMLS(w)
}

// marshalIDs writes the IDs in ascending order, the only one that is read.
func marshalIDs(w *codec.Writer, ids map[recordID]uint64) {
	order := slices.SortedFunc(maps.Keys(ids), func(a, b recordID) int { return bytes.Compare(a[:], b[:]) })
	codec.WriteVector(w, order, func(w *codec.Writer, id recordID) {
		w.Raw(id[:])
		w.Uint64(ids[id])
	})
}

func unmarshalIDs(r *codec.Reader) map[recordID]uint64 {
	ids := make(map[recordID]uint64)
	var last recordID
	r.Vector(func(r *codec.Reader) {
		var id recordID
		copy(id[:], r.Raw(len(id)))
		if len(ids) > 0 && bytes.Compare(id[:], last[:]) <= 0 {
			r.Failf("record IDs out of order")
		}
		ids[id], last = r.Uint64(), id
	})
	return ids
}

func (q *syncRequest) UnmarshalMLS(r *codec.Reader) {
	q.have = unmarshalIDs(r)
	q.own.UnmarshalMLS(r)
}

type syncAnswer struct {
	newer  []Record
	wanted map[recordID]uint64
}

func (a *syncAnswer) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, a.newer, func(w *codec.Writer, r Record) { r.MarshalMLS(w) })
	marshalIDs(w, a.wanted)
}

func (a *syncAnswer) UnmarshalMLS(r *codec.Reader) {
	*a = syncAnswer{newer: unmarshalRecords(r)}
	a.wanted = unmarshalIDs(r)
}

func unmarshalRecords(r *codec.Reader) []Record {
	return codec.ReadVector(r, func(r *codec.Reader) (rec Record) {
		rec.UnmarshalMLS(r)
		return rec
	})
}

// news are records that their sender has just learnt or was asked for.
//
//	struct {
//	    NodeRecord records<V>;
//	} News;
type news struct{ records []Record }

func (n *news) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, n.records, func(w *codec.Writer, r Record) { r.MarshalMLS(w) })
}

func (n *news) UnmarshalMLS(r *codec.Reader) { n.records = unmarshalRecords(r) }

func readMessage(r io.Reader, m codec.Unmarshaler) error {
	b, err := io.ReadAll(io.LimitReader(r, maxSync+1))
	if err != nil {
		return err
	}
	if len(b) > maxSync {
		return fmt.Errorf("message of more than %d bytes", maxSync)
	}
	return codec.Unmarshal(b, m)
}

// recordsLocked returns the records that this node vouches for: its own and those of the peers it approves.
func (g *Gossip) recordsLocked() []Record {
	all := []Record{g.own}
	for _, p := range g.peers {
		if p.record != nil {
			all = append(all, *p.record)
		}
	}
	return all
}

// haveLocked returns the incarnations of the records held, approved or not.
func (g *Gossip) haveLocked() map[recordID]uint64 {
	have := make(map[recordID]uint64)
	for id, h := range g.unapproved {
		have[id] = h.Incarnation
	}
	for _, r := range g.recordsLocked() {
		have[r.id()] = r.Incarnation
	}
	return have
}

// compare compares records with the peer: it takes what is newer there, and sends what is wanted.
func (l *link) compare() error {
	g := l.g
	g.mu.Lock()
	request := syncRequest{have: g.haveLocked(), own: g.own}
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(l.conn.Context(), streamTime)
	defer cancel()
	s, err := l.openStream(ctx, streamSync)
	if err != nil {
		return err
	}
	defer s.CancelRead(0)
	if _, err := s.Write(codec.Marshal(&request)); err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	var answer syncAnswer
	if err := readMessage(s, &answer); err != nil {
		return fmt.Errorf("comparing records: %w", err)
	}
	for _, r := range answer.newer {
		l.take(r)
	}
	g.mu.Lock()
	var wanted []Record
	for _, r := range g.recordsLocked() {
		if _, ok := answer.wanted[r.id()]; ok {
			wanted = append(wanted, r)
		}
	}
	g.mu.Unlock()
	l.sendNews(wanted)
	return nil
}

// answerSync is the other side of compare.
func (l *link) answerSync(s *quic.Stream) error {
	g := l.g
	var request syncRequest
	if err := readMessage(s, &request); err != nil {
		return fmt.Errorf("comparing records: %w", err)
	}
	if request.own.Domain != l.conn.Domain {
		return fmt.Errorf("%w: own record of %s is %q's", ErrRecord, l.conn.Domain, request.own.Domain)
	}
	l.take(request.own)
	own := map[recordID]uint64{request.own.id(): request.own.Incarnation}
	answer := syncAnswer{wanted: make(map[recordID]uint64)}
	size := 0
	g.mu.Lock()
	for _, r := range g.recordsLocked() {
		if size < maxSync/2 && r.Incarnation > max(request.have[r.id()], own[r.id()]) {
			size += len(codec.Marshal(&r))
			answer.newer = append(answer.newer, r)
		}
	}
	have := g.haveLocked()
	for id, incarnation := range request.have {
		if incarnation > have[id] && len(answer.wanted) < maxUnapproved {
			answer.wanted[id] = incarnation
		}
	}
	g.mu.Unlock()
	_, err := s.Write(codec.Marshal(&answer))
	return err
}

// sendNews sends records to the peer.
func (l *link) sendNews(records []Record) {
	for len(records) > 0 {
		n := min(len(records), maxSync/maxRecord/2)
		batch := records[:n]
		records = records[n:]
		ctx, cancel := context.WithTimeout(l.conn.Context(), streamTime)
		s, err := l.conn.OpenUniStreamSync(ctx)
		cancel()
		if err != nil {
			return
		}
		_ = s.SetWriteDeadline(time.Now().Add(streamTime))
		if _, err := s.Write(append([]byte{streamRecords}, codec.Marshal(&news{records: batch})...)); err != nil {
			return
		}
		_ = s.Close()
	}
}

func (l *link) readNews(s io.Reader) error {
	var kind [1]byte
	if _, err := io.ReadFull(s, kind[:]); err != nil {
		return err
	}
	if kind[0] != streamRecords {
		return fmt.Errorf("stream of kind %d", kind[0])
	}
	var n news
	if err := readMessage(s, &n); err != nil {
		return fmt.Errorf("reading news: %w", err)
	}
	for _, r := range n.records {
		l.take(r)
	}
	return nil
}

// push sends a record to all connected peers but one.
func (g *Gossip) push(r Record, except string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for domain, p := range g.peers {
		if l := p.link(); l != nil && domain != except && domain != r.Domain {
			g.spawnLocked(func() { l.sendNews([]Record{r}) })
		}
	}
}

// take judges a record that the peer sent.
func (l *link) take(r Record) {
	g := l.g
	if !g.isNews(&r) {
		return
	}
	if !l.budget.Allow() {
		g.refuse(l.conn.Domain, errors.New("too many records"))
		return
	}
	if r.Domain == g.cfg.Domain {
		if err := g.outgrow(&r); err != nil {
			g.refuse(l.conn.Domain, err)
		}
		return
	}
	err := r.Verify(g.cfg.Verify)
	switch {
	case err == nil:
		g.adopt(r, l.conn.Domain)
	case errors.Is(err, ErrRecord):
		g.refuse(l.conn.Domain, err)
	default:
		g.keepUnapproved(r, l.conn.Domain)
	}
}

// isNews says whether a record isn't held yet.
func (g *Gossip) isNews(r *Record) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Domain == g.cfg.Domain {
		return r.Incarnation > g.own.Incarnation
	}
	if p := g.peers[r.Domain]; p != nil && p.record != nil && r.Incarnation <= p.record.Incarnation {
		return false
	}
	h := g.unapproved[r.id()]
	return h == nil || r.Incarnation > h.Incarnation
}

// outgrow makes the own incarnation pass that of an own record that comes from before the store was lost or put back.
func (g *Gossip) outgrow(r *Record) error {
	if err := r.CheckConsistent(); err != nil {
		return err
	}
	g.mu.Lock()
	root := g.own.Chain[len(g.own.Chain)-1]
	g.mu.Unlock()
	if !bytes.Equal(root, r.Chain[len(r.Chain)-1]) {
		return fmt.Errorf("%w: another root's record of this node", ErrRecord)
	}
	for {
		seen := g.outgrown.Load()
		if seen >= r.Incarnation || g.outgrown.CompareAndSwap(seen, r.Incarnation) {
			break
		}
	}
	g.filter.exhausted()
	return nil
}

// adopt takes the verified record of an approved peer into use and passes it on.
func (g *Gossip) adopt(r Record, from string) {
	g.mu.Lock()
	p := g.peerLocked(r.Domain)
	if p.record != nil && r.Incarnation <= p.record.Incarnation {
		g.mu.Unlock()
		return
	}
	moved := p.record != nil && p.record.Address != r.Address
	if moved {
		p.good = ""
	}
	p.record = &r
	for k, h := range g.unapproved {
		if h.Domain == r.Domain {
			delete(g.unapproved, k)
		}
	}
	g.filter.approve(r.Domain, r.Incarnation)
	l := p.link()
	if l == nil {
		p.kickLocked()
	} else {
		g.setStateLocked(p, StateAlive)
	}
	g.mu.Unlock()
	if err := g.put(keyRecord+r.Domain, codec.Marshal(&r)); err != nil {
		g.log.Error("record of a peer can't be kept", "peer", r.Domain, "err", err)
	}
	if moved {
		if err := g.put(keyAddress+r.Domain, nil); err != nil {
			g.log.Error("old address of a peer can't be deleted", "peer", r.Domain, "err", err)
		}
	}
	g.push(r, from)
	if l != nil {
		l.join()
	}
}

// keepUnapproved remembers a consistent record of a node that isn't approved, within bounds.
func (g *Gossip) keepUnapproved(r Record, from string) {
	key := r.id()
	g.mu.Lock()
	h := g.unapproved[key]
	if h != nil && r.Incarnation <= h.Incarnation {
		g.mu.Unlock()
		return
	}
	if h == nil {
		brought := 0
		for _, other := range g.unapproved {
			if other.from == from {
				brought++
			}
		}
		if brought >= maxUnapprovedPerPeer || len(g.unapproved) >= maxUnapproved {
			g.mu.Unlock()
			g.refuse(from, errors.New("too many records of nodes that aren't approved"))
			return
		}
		h = &heardRecord{from: from}
		g.unapproved[key] = h
	}
	h.Record = r
	g.mu.Unlock()
	g.cfg.OnUnapproved(r)
}

// loadRecords reads what an earlier run kept. What isn't approved any more is left out.
func (g *Gossip) loadRecords() error {
	var records []Record
	err := g.cfg.Store.Scan([]byte(keyRecord), prefixEnd(keyRecord), func(key, value []byte) bool {
		r, err := ParseRecord(value)
		if err != nil || keyRecord+r.Domain != string(key) {
			g.log.Warn("stored record of a peer is unreadable", "key", string(key), "err", err)
			return true
		}
		records = append(records, r)
		return true
	})
	if err != nil {
		return fmt.Errorf("gossip: reading the records of peers: %w", err)
	}
	for _, r := range records {
		if err := r.Verify(g.cfg.Verify); err != nil {
			g.log.Info("stored record of a peer isn't approved now", "peer", r.Domain, "err", err)
			continue
		}
		g.mu.Lock()
		g.peerLocked(r.Domain).record = &r
		g.mu.Unlock()
		g.filter.approve(r.Domain, r.Incarnation)
	}
	return nil
}

func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// Refresh is called when approvals have changed. It judges the held records again, ends what isn't approved any more,
// and dials whoever isn't connected.
func (g *Gossip) Refresh() {
	seeds := make(map[string]string)
	for _, s := range g.cfg.Seeds() {
		if s.Domain != g.cfg.Domain {
			seeds[s.Domain] = s.Address
		}
	}
	g.mu.Lock()
	var held []Record
	for _, p := range g.peers {
		if p.record != nil {
			held = append(held, *p.record)
		}
	}
	var heard []Record
	for _, h := range g.unapproved {
		heard = append(heard, h.Record)
	}
	g.mu.Unlock()
	refused := make(map[string]bool)
	for _, r := range held {
		refused[r.Domain] = r.Verify(g.cfg.Verify) != nil
	}

	var gone []string
	g.mu.Lock()
	for domain, p := range g.peers {
		if refused[domain] {
			p.record = nil
			g.filter.remove(domain)
			gone = append(gone, keyRecord+domain)
		}
		if _, ok := seeds[domain]; ok || p.record != nil {
			continue
		}
		delete(g.peers, domain)
		gone = append(gone, keyAddress+domain)
		if p.stop != nil {
			p.stop()
		}
		for _, l := range []*link{p.in, p.out} {
			if l != nil {
				_ = l.conn.CloseWithError(codeNotApproved, "no longer approved")
			}
		}
	}
	for domain, address := range seeds {
		p := g.peerLocked(domain)
		if p.seed != address && p.seed != "" && address != "" {
			p.good = "" // the operator knows better
		}
		p.seed = address
	}
	for _, p := range g.peers {
		p.kickLocked()
	}
	g.mu.Unlock()

	g.loadAddresses()
	for _, key := range gone {
		if err := g.put(key, nil); err != nil {
			g.log.Error("record of a removed peer can't be deleted", "err", err)
		}
	}
	for _, r := range heard {
		if r.Verify(g.cfg.Verify) == nil {
			g.adopt(r, "")
		}
	}
	g.cfg.Endpoint.Recheck()
}

// loadAddresses fills in where peers were last reached, as far as the store knows and nobody has found out since.
func (g *Gossip) loadAddresses() {
	g.mu.Lock()
	var unknown []string
	for domain, p := range g.peers {
		if !p.loaded {
			p.loaded = true
			unknown = append(unknown, domain)
		}
	}
	g.mu.Unlock()
	for _, domain := range unknown {
		a, err := g.cfg.Store.Get([]byte(keyAddress + domain))
		if err != nil || checkAddress(string(a)) != nil {
			continue
		}
		g.mu.Lock()
		if p := g.peers[domain]; p != nil && p.good == "" {
			p.good = string(a)
		}
		g.mu.Unlock()
	}
}
