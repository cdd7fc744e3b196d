package node

import (
	"slices"
	"sync"

	"github.com/parley-mls/parley/federation/mimi"
)

// maxRecent bounds the bytes of entries in recent, of all rooms together.
const maxRecent = 4 << 20

// logged is an entry of a room's log: a FanoutMessage, which nobody changes.
type logged struct {
	seq    uint64
	fanout []byte
}

// recent holds the entries that came last, of all rooms, so that the streams and peers that wait for them needn't read
// them from the store, each for itself.
type recent struct {
	mu      sync.RWMutex
	entries map[recentKey][]byte // guarded by mu
	order   []recentKey          // guarded by mu; as they came
	bytes   int                  // guarded by mu
}

type recentKey struct {
	room mimi.URI
	seq  uint64
}

// add takes entries that are on disk.
func (rc *recent) add(room mimi.URI, list []logged) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.entries == nil {
		rc.entries = make(map[recentKey][]byte)
	}
	for _, e := range list {
		k := recentKey{room, e.seq}
		if _, ok := rc.entries[k]; ok || len(e.fanout) > maxRecent/16 {
			continue
		}
		rc.entries[k] = e.fanout
		rc.order = append(rc.order, k)
		rc.bytes += len(e.fanout)
	}
	n := 0
	for ; rc.bytes > maxRecent; n++ {
		rc.bytes -= len(rc.entries[rc.order[n]])
		delete(rc.entries, rc.order[n])
	}
	rc.order = rc.order[n:]
}

// forget drops the entries before where logs begin, by room.
func (rc *recent) forget(first map[mimi.URI]uint64) {
	rc.drop(func(k recentKey) bool { return k.seq < first[k.room] })
}

// cut drops the entries of a room after last, in whose place there will be others.
func (rc *recent) cut(room mimi.URI, last uint64) {
	rc.drop(func(k recentKey) bool { return k.room == room && k.seq > last })
}

func (rc *recent) drop(which func(recentKey) bool) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.order = slices.DeleteFunc(rc.order, func(k recentKey) bool {
		drop := which(k)
		if drop {
			rc.bytes -= len(rc.entries[k])
			delete(rc.entries, k)
		}
		return drop
	})
}

// get returns the entries from one number to another, or the first of them as many as go into one response; nil if the
// first isn't there.
func (rc *recent) get(room mimi.URI, from, to uint64) []logged {
	rc.mu.RLock()
	defer rc.mu.RUnlock()
	var list []logged
	size := 0
	for seq := from; seq <= to && len(list) < maxEvents && size < maxEventBytes; seq++ {
		fanout, ok := rc.entries[recentKey{room, seq}]
		if !ok {
			break
		}
		list = append(list, logged{seq, fanout})
		size += len(fanout)
	}
	return list
}
