package node

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"sync"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// What a client has sent last. A client whose state was restored from an old copy would encrypt again with keys that it
// has used, and can't know it (RFC 9420, Section 6.3.1). Its own node can: it notes the epoch, generation and hash of
// every application message that the client submits, before the message goes on, and the client asks before it sends.
// Should two copies of a client run at once, the node refuses what comes with a key that isn't after the last one, unless
// it is the same message again. Only the client itself, by its token, moves its mark, and never back.

// mark is the place of a client's message among those that it sent in a group.
type mark struct {
	client mimi.URI
	group  [sha256.Size]byte
	sentRecord
}

// markOf returns nil if the submitter doesn't say which key it used.
func markOf(by submitter, m *mls.PrivateMessage, hash []byte) *mark {
	if by.client == "" || by.generation == nil {
		return nil
	}
	return &mark{by.client, sha256.Sum256(m.GroupID), sentRecord{m.Epoch, *by.generation, hash}}
}

// errKeyUsed refuses a message other than the one that the key belongs to.
var errKeyUsed = refuse("keyUsed", "this client has sent another message with that key, or one with a later key")

// marks are the locks of the marks, by group: held while a mark is read and the next one applied.
type marks [64]sync.Mutex

func (m *marks) lock(k *mark) (unlock func()) {
	mu := &m[int(k.group[0])%len(m)]
	mu.Lock()
	return mu.Unlock
}

func sentKey(client mimi.URI, group [sha256.Size]byte) []byte {
	return key(prefixSent, client, group[:])
}

// lastSent returns the last application message of a client in a group, nil if none is known.
func (n *Node) lastSent(client mimi.URI, group [sha256.Size]byte) (*sentRecord, error) {
	b, err := n.store.Get(sentKey(client, group))
	if err != nil || b == nil {
		return nil, err
	}
	last := new(sentRecord)
	return last, decodeRecord(b, last, "last message")
}

// raise puts a mark, unless it is nil, into a batch. If the error is nil the caller calls unlock once it has applied the
// batch; if it is errKeyUsed nothing was put in, since there is a mark that is as high.
func (n *Node) raise(b *store.Batch, m *mark) (unlock func(), err error) {
	if m == nil {
		return func() {}, nil
	}
	unlock = n.marks.lock(m)
	last, err := n.lastSent(m.client, m.group)
	switch {
	case err != nil:
	case last == nil || last.before(m.epoch, m.generation):
		b.Set(sentKey(m.client, m.group), codec.Marshal(m.sentRecord))
	case last.epoch != m.epoch || last.generation != m.generation || last.hash != nil && !bytes.Equal(last.hash, m.hash):
		err = errKeyUsed
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// note raises a mark by itself. One that is as high or higher is durable when note returns without an error or with
// errKeyUsed.
func (n *Node) note(m *mark) error {
	if m == nil {
		return nil
	}
	var b store.Batch
	unlock, used := n.raise(&b, m)
	if used != nil && !errors.Is(used, errKeyUsed) {
		return used
	}
	wait, err := n.store.Apply(&b) // an empty batch waits for the one that has the mark
	if used == nil {
		unlock()
	}
	if err != nil {
		return err
	}
	if err := wait(); err != nil {
		return err
	}
	return used
}
