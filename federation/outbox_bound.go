package federation

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// A queue is cut when more waits in it than OutboxConfig.Bound: the shares with the most lose their oldest entries, all to
// the same number, and each keeps its newest. What a peer is sent of a room then begins after a gap, by whose numbers it
// learns that it is behind.

// cutPage is how many entries are read and deleted in one go.
const cutPage = 1024

// cut cuts a queue if it is too long. Its goroutine calls it.
func (o *Outbox) cut(q *queue) error {
	o.mu.Lock()
	over := o.cfg.Bound > 0 && q.depth > max(o.cfg.Bound, q.uncut)
	first, known, next := q.from, q.known, q.next
	for n := range q.missing {
		first = min(first, n)
	}
	known = max(known, q.from)
	o.mu.Unlock()
	if !over {
		return nil
	}
	counts := make(map[string]int)
	var flying []uint64 // handed out, and not in the store yet
	at := first
	if err := o.pages(q, first, next, func(page []stored) error {
		for _, s := range page {
			for at = max(at, known); at < s.number; at++ {
				flying = append(flying, at)
			}
			at = s.number + 1
			if share := o.cfg.Share(s.ref); share != "" {
				counts[share]++
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for at = max(at, known); at < next; at++ {
		flying = append(flying, at)
	}
	o.mu.Lock()
	for _, n := range flying {
		q.missing[n] = struct{}{}
	}
	q.known = next // what is below it and neither there nor missing is gone
	o.mu.Unlock()

	most, dropped := fairShare(counts, o.cfg.Bound-o.cfg.Bound/4), 0
	err := o.pages(q, first, next, func(page []stored) error {
		var keys [][]byte
		var gone []uint64
		for _, s := range page {
			if share := o.cfg.Share(s.ref); counts[share] > most {
				counts[share]--
				keys, gone = append(keys, o.key(q.peer, s.number)), append(gone, s.number)
			}
		}
		if len(keys) == 0 {
			return nil
		}
		if err := o.cfg.Store.Delete(keys...); err != nil {
			return fmt.Errorf("cut the outbox: %w", err)
		}
		dropped += len(gone)
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, n := range gone {
			delete(q.missing, n)
		}
		q.depth = max(0, q.depth-len(gone))
		q.dropped += len(gone)
		return nil
	})
	o.mu.Lock()
	q.uncut = q.depth + o.cfg.Bound/4
	o.mu.Unlock()
	if dropped > 0 {
		o.cfg.Log.Error("too much waits for a peer; the oldest was dropped, and the peer will be behind", "peer", q.peer, "dropped", dropped, "shares", len(counts))
	}
	return err
}

// pages calls f with the entries of a queue from one number to another, in pages.
func (o *Outbox) pages(q *queue, from, to uint64, f func([]stored) error) error {
	for {
		var page []stored
		if err := o.cfg.Store.Scan(o.key(q.peer, from), o.key(q.peer, to), func(key, value []byte) bool {
			page = append(page, stored{binary.BigEndian.Uint64(key[len(key)-8:]), slices.Clone(value)})
			return len(page) < cutPage
		}); err != nil {
			return fmt.Errorf("read the outbox: %w", err)
		}
		if len(page) == 0 {
			return nil
		}
		from = page[len(page)-1].number + 1
		if err := f(page); err != nil {
			return err
		}
		if len(page) < cutPage {
			return nil
		}
	}
}

// fairShare returns how much each may keep, at least 1, so that all together have no more than limit if they can.
func fairShare(counts map[string]int, limit int) int {
	list := make([]int, 0, len(counts))
	for _, n := range counts {
		list = append(list, n)
	}
	slices.Sort(list)
	for i, n := range list {
		if each := limit / (len(list) - i); n > each {
			return max(1, each)
		}
		limit -= n
	}
	return limit + 1<<30 // nobody has too much
}

// Dropped returns how many items of a peer's queue were dropped since the outbox was opened because too many waited.
func (o *Outbox) Dropped(peer string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	if q := o.peers[peer]; q != nil {
		return q.dropped
	}
	return 0
}
