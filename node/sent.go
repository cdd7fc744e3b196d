package node

import (
	"crypto/sha256"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// What a client has sent last. A client whose state was restored from an old copy would encrypt again with keys that it
// has used, and can't know it (RFC 9420, Section 6.3.1). Its own node can: it notes the epoch and
// generation of every application message that the client submits, before the message goes on, and the client asks
// before it sends. Only the client itself, by its token, moves its mark.

func sentKey(client mimi.URI, group []byte) []byte {
	h := sha256.Sum256(group)
	return key(prefixSent, client, h[:])
}

// lastSent returns the last application message of a client in a group, nil if none is known.
func (n *Node) lastSent(client mimi.URI, group []byte) (*sentRecord, error) {
	b, err := n.store.Get(sentKey(client, group))
	if err != nil || b == nil {
		return nil, err
	}
	last := new(sentRecord)
	return last, decodeRecord(b, last, "last message")
}

// noteSent puts the mark of a client's message into a batch, unless there is a later one.
func (n *Node) noteSent(b *store.Batch, by submitter, m *mls.PrivateMessage) error {
	if by.client == "" || by.generation == nil {
		return nil
	}
	next := sentRecord{epoch: m.Epoch, generation: *by.generation}
	last, err := n.lastSent(by.client, m.GroupID)
	if err != nil {
		return err
	}
	if last != nil && (last.epoch > next.epoch || last.epoch == next.epoch && last.generation >= next.generation) {
		return nil
	}
	b.Set(sentKey(by.client, m.GroupID), codec.Marshal(next))
	return nil
}

// noteSentAlone is noteSent for a message that isn't ordered here. The mark is durable when it returns.
func (n *Node) noteSentAlone(by submitter, m *mls.PrivateMessage) error {
	var b store.Batch
	if err := n.noteSent(&b, by, m); err != nil || b.Len() == 0 {
		return err
	}
	wait, err := n.store.Apply(&b)
	if err != nil {
		return err
	}
	return wait()
}
