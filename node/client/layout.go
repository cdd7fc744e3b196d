package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"path/filepath"
	"syscall"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/store"
)

// The keys of a client's store. <room> is the room's URI and a zero byte.
//
//	p                    profile, JSON
//	w                    number of the last Welcome stored, 8 bytes
//	c                    the store's files have secrets in the clear, from before they were sealed, until they are compacted
//	t                    when this client last had everything that its node had, s since 1970, 8 bytes
//	f                    what the published KeyPackages offer: leafFormat, one byte
//	b<domain>            trust bundle of a provider, JSON
//	k<KeyPackageRef>     a KeyPackage of this client and its private keys; sealed, see sealedStore
//	x<due><room><seq>    a message that expires at that time, s since 1970, 8 bytes: the order in which messages go
//	i                    messages are indexed by x, a, u and q, as those of earlier releases aren't yet
//	j<room URI>          an external commit whose answer isn't known; sealed
//	e<room><SHA-256>     evidence against a room's hub, a chain.Evidence, by its hash
//	r<room>h             header of a room
//	r<room>g...          MLS state; what mls.Erasable names is sealed
//	r<room>m<seq>        a message, by its number in the room's log
//	r<room>d<ID>         the number of the message of that ID, 8 bytes
//	r<room>x<seq>        when the message of that number expires, s since 1970, 8 bytes; unread until it is read if it
//	                     counts from then
//	r<room>a<seq><seq>   a message that is shown with another one, the first of the two: an edit, deletion or reaction
//	r<room>u<seq>        the message that the one of that number is shown with, 8 bytes, and 1 if it is in a reaction, else 0
//	r<room>q<ID>         the first message that replaces the one of that ID, which isn't here, 8 bytes
//	r<room>s<SHA-256>    application data of an own ciphertext that isn't in the log yet, by the hash of its MLSMessage
//	r<room>o<number>     a message in the outbox
//	r<room>i             the staged own commit as it is sent
//	r<room>l             the proposals to leave as they are sent
//	r<room>n<seq>        linkRecord: the hash chain at an entry of the log, of the last ones
//	r<room>y<seq>        a Gap: the number of the last entry that was processed before, 8 bytes, by the first that came after
//	r<room>z<time><seq>  a message whose number the hub has given again, by when that was known, ms since 1970
//	r<room>u<user>       a user who has asked to leave, in this epoch or in one that only external commits came after
//	r<room>t<leaf>       when the leaf (4 bytes) was last renewed, s since 1970, 8 bytes; in rooms that ask for it, and as far
//	                     as this client knows
//	r<room>v             hubRecord: how far the hub's signatures of the log were verified
//	r<room>t             historyRecord: what of the log another device of the user can give, and an offer of it
var (
	keyProfile = []byte("p")
	keyWelcome = []byte("w")
	keyCompact = []byte("c")
	keyOffered = []byte("f")
	keyCurrent = []byte("t")
	keyIndexed = []byte("i")
)

const (
	prefixBundle     = "b"
	prefixKeyPackage = "k"
	prefixJoin       = "j"
	prefixRoom       = "r"
	prefixEvidence   = "e"
	prefixDue        = "x"

	roomHeader    = 'h'
	roomGroup     = 'g'
	roomMessage   = 'm'
	roomMessageID = 'd'
	roomExpiry    = 'x'
	roomPart      = 'a'
	roomPlace     = 'u'
	roomStandIn   = 'q'
	roomSealed    = 's'
	roomOutbox    = 'o'
	roomStaged    = 'i'
	roomLeave     = 'l'
	roomLink      = 'n'
	roomHub       = 'v'
	roomLeaver    = 'u'
	roomRenewed   = 't'
	roomGap       = 'y'
	roomLost      = 'z'
	roomHistory   = 't'
)

// storeDir is the store's place below Options.Dir.
const storeDir = "store"

func openStore(o Options) (*sealedStore, error) {
	failed := make(chan error, 1)
	db, err := store.Open(filepath.Join(o.Dir, storeDir), store.Options{
		CacheBytes: 4 << 20, MemTableBytes: 2 << 20, Log: o.Log, BallastBytes: diskReserve / 2, Failed: func(err error) { failed <- err },
	})
	if errors.Is(err, syscall.ENOSPC) {
		err = fmt.Errorf("%w: %w", ErrDiskFull, err)
	}
	if err != nil {
		return nil, fmt.Errorf("client: open the state in %s: %w", o.Dir, err)
	}
	s, err := newSealedStore(db, func(used map[slotRef]bool) (*keyFile, error) { return openKeyFile(o.Dir, o.Rand, used) })
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s.failed = failed
	return s, nil
}

// diskReserve is how many bytes have to be free for the device to change its state.
const diskReserve = 8 << 20

// roomy says whether there is enough space to change the state. What is begun without, might fail halfway.
func (c *Client) roomy() error {
	if free, err := c.free(); err == nil && free < diskReserve {
		return fmt.Errorf("client: %w: %d bytes are free in %s", ErrDiskFull, free, c.o.Dir)
	}
	return nil
}

func roomPrefix(uri mimi.URI) []byte { return []byte(prefixRoom + string(uri) + "\x00") }

func evidencePrefix(uri mimi.URI) []byte { return []byte(prefixEvidence + string(uri) + "\x00") }

// key returns the key of one of the room's entries.
func (r *Room) key(kind byte, rest ...byte) []byte {
	return append(append(roomPrefix(r.uri), kind), rest...)
}

func (r *Room) key64(kind byte, n uint64) []byte {
	return r.key(kind, binary.BigEndian.AppendUint64(nil, n)...)
}

// roomURIs returns the rooms that the store has a header of.
func roomURIs(db store.Store) ([]mimi.URI, error) {
	var uris []mimi.URI
	var bad error
	start := []byte(prefixRoom)
	for {
		var next []byte
		err := db.Scan(start, store.PrefixEnd([]byte(prefixRoom)), func(key, _ []byte) bool {
			i := 0
			for i < len(key) && key[i] != 0 {
				i++
			}
			uri, err := mimi.ParseURI(string(key[len(prefixRoom):i]))
			if err != nil || i == len(key) {
				bad = fmt.Errorf("client: the store has a key %q", key)
				return false
			}
			uris = append(uris, uri)
			next = store.PrefixEnd(roomPrefix(uri))
			return false
		})
		if err != nil || bad != nil || next == nil {
			if err == nil {
				err = bad
			}
			return uris, err
		}
		start = next
	}
}

func loadWelcome(db store.Store) (uint64, error) {
	b, err := db.Get(keyWelcome)
	if err != nil || b == nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("client: the stored number of Welcomes has %d bytes", len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}

// groupState returns the entries of the room's MLS group, all of one moment.
func (r *Room) groupState() (iter.Seq2[[]byte, []byte], error) {
	type entry struct{ key, value []byte }
	var entries []entry
	err := store.ScanPrefix(r.c.db, r.key(roomGroup), func(key, value []byte) bool {
		entries = append(entries, entry{append([]byte(nil), key...), append([]byte(nil), value...)})
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("read the group's state: %w", err)
	}
	return func(yield func([]byte, []byte) bool) {
		for _, e := range entries {
			if !yield(e.key, e.value) {
				return
			}
		}
	}, nil
}

// clearGroup deletes the state of a group that the room had before.
func (r *Room) clearGroup(b *store.Batch) error {
	for _, kind := range []byte{roomGroup, roomStaged, roomLeave, roomLink, roomLeaver, roomRenewed} {
		err := store.ScanPrefix(r.c.db, r.key(kind), func(key, _ []byte) bool {
			b.Delete(r.key(kind, key...))
			return true
		})
		if err != nil {
			return fmt.Errorf("read the former group's state: %w", err)
		}
	}
	return nil
}

// waits collects what has to become durable before anyone is told about it.
type waits []func() error

// apply writes a batch and notes what to wait for. If either fails, what is in memory may be ahead of what a restart
// would find, so the client gives up: a ratchet that goes on from memory and again from the store uses keys twice.
func (w *waits) apply(c *Client, b *store.Batch) error {
	wait, err := c.apply(b)
	if err != nil {
		err = fmt.Errorf("client: write the state: %w", err)
		c.giveUp(err)
		return err
	}
	*w = append(*w, func() error {
		err := wait()
		if err != nil {
			err = fmt.Errorf("client: sync the state: %w", err)
			c.giveUp(err)
		}
		return err
	})
	return nil
}

// wait returns when all of it is durable. No lock may be held.
func (w *waits) wait() error {
	var first error
	for _, f := range *w {
		if err := f(); err != nil && first == nil {
			first = err
		}
	}
	*w = nil
	return first
}
