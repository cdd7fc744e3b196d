// Package federation is how nodes of different providers find each other and talk.
//
// Gossip keeps track of the peers: each node signs a Record of where it is reached, nodes relay the records of those
// that they approve, and memberlist, behind a filter, says who is alive. It introduces and never authorises, and
// nothing waits for its opinion. The MIMI endpoints (draft-ietf-mimi-protocol) are served by NewHandler and called by
// Client; what must arrive goes through the Outbox.
package federation

// Store is the durable, ordered key-value state that federation needs; the node's store satisfies it. Callers prefix
// their keys.
type Store interface {
	// Get returns a key's value, or nil and no error if there is none.
	Get(key []byte) ([]byte, error)

	// Scan calls fn for the keys in [start, end), ascending, until it returns false. The slices are valid during the
	// call only.
	Scan(start, end []byte, fn func(key, value []byte) bool) error

	// Commit writes changes as one batch, durable on return; a nil value deletes. If a key of expect has another
	// value (nil: if it is present), nothing is done and ok is false.
	Commit(changes, expect map[string][]byte) (ok bool, err error)

	// Delete removes keys, visibly on return; after a crash they may be there again.
	Delete(keys ...[]byte) error
}
