package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/node/store"
)

// Offline administers the peers of a node that is down, in its store.
type Offline struct {
	store *store.Pebble
	trust *authority.TrustStore
}

// OpenOffline opens the store in a node's data directory. It fails with store.ErrInUse if a process has it open.
func OpenOffline(data string) (*Offline, error) {
	if _, err := os.Stat(AuthorityDir(data)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no node runs in %s and there is no authority there: is it the right directory? (-data)", data)
	}
	s, err := store.Open(StoreDir(data), store.Options{})
	if err != nil {
		return nil, err
	}
	o := &Offline{store: s}
	if err := checkFormat(s); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	embedded, err := authority.Open(AuthorityDir(data), s, nil)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	domain := embedded.Domain()
	if err := embedded.Close(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if o.trust, err = authority.OpenTrust(s, domain); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return o, nil
}

// Close closes the store.
func (o *Offline) Close() error { return o.store.Close() }

// Peers returns the approved peers.
func (o *Offline) Peers(context.Context) ([]PeerStatus, error) {
	list := []PeerStatus{}
	for _, p := range o.trust.Peers() {
		list = append(list, PeerStatus{Domain: p.Domain, Fingerprint: p.Fingerprint, Address: p.Address, Approved: true, Sequence: p.Sequence})
	}
	return list, nil
}

// ApprovePeer approves a provider.
func (o *Offline) ApprovePeer(ctx context.Context, domain string, f authority.Fingerprint, address string) error {
	return o.trust.Approve(ctx, domain, f, address)
}

// RemovePeer takes an approval back.
func (o *Offline) RemovePeer(_ context.Context, domain string) error { return o.trust.Remove(domain) }
