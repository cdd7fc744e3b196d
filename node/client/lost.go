package client

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/parley-mls/parley/node/store"
)

// A hub that was restored from a backup gives numbers of its log again, and with them a client stores messages. What it has
// of these numbers from before is no part of the room any more, and stays apart: but for messages that expire, which go.

// setAside puts the messages from a number on, which the hub gives again, apart. mu is held.
func (r *Room) setAside(b *store.Batch, next uint64) error {
	lost, err := r.between(next, ^uint64(0), 0, nil)
	if err != nil {
		return err
	}
	now := binary.BigEndian.AppendUint64(nil, uint64(max(r.c.o.Time().UnixMilli(), 0)))
	for _, m := range lost {
		due, err := r.due(m.Seq)
		if err != nil {
			return err
		}
		at := r.key64(roomMessage, m.Seq)
		if due == 0 {
			value, err := r.c.db.Get(at)
			if err != nil {
				return err
			}
			b.Set(r.key(roomLost, append(bytes.Clone(now), at[len(at)-8:]...)...), value)
		}
		if err := r.erase(b, m.Seq); err != nil {
			return err
		}
		if m.Content != nil {
			b.Delete(r.key(roomMessageID, m.ID[:]...))
		}
	}
	return nil
}

// Lost returns the messages that this client has and the room's log hasn't any more, for its hub was restored from a backup
// and has given their numbers again. They are in the order in which they were lost, and among those in that of the log.
func (r *Room) Lost() ([]Message, error) {
	var list []Message
	var bad error
	err := store.ScanPrefix(r.c.db, r.key(roomLost), func(key, value []byte) bool {
		if len(key) != 16 {
			return true
		}
		var m Message
		if m, bad = r.message(binary.BigEndian.Uint64(key[8:]), value); bad == nil {
			list = append(list, m)
		}
		return bad == nil
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return nil, fmt.Errorf("client: read the messages that %s has lost: %w", r.uri, err)
	}
	return list, nil
}
