package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// revoked follows the revocation of a certificate by the own authority, which is durable and in its bundle already:
// the client's tokens, streams and KeyPackages go, peers get the bundle, and the removal of its leaves is proposed.
// What a crash cuts off is made up for at the next start.
func (n *Node) revoked(c *authority.Certificate) {
	n.log.Info("certificate revoked", "client", c.Client, "serial", c.Serial, "reason", c.Reason)
	n.bundleChanged() // first of all: whoever authenticates from here on is judged by it
	if c.Client == "" {
		return
	}
	n.auth.revoke(c.Client)
	valid, err := n.service.List(n.ctx, authority.Filter{Client: c.Client, ValidAt: time.Now()})
	if err != nil {
		n.log.Error("reading the client's certificates", "client", c.Client, "err", err)
	}
	if len(valid) > 0 {
		n.listeners.look(c.Client) // it was one of several; streams that were opened with it end
		return
	}
	n.listeners.end(c.Client, refuse("revoked", "%s was revoked", c.Client))
	if err := n.registerPush(c.Client, ""); err != nil {
		n.log.Error("deleting the push endpoint", "client", c.Client, "err", err)
	}
	if err := n.forgetClient(c.User, c.Client); err != nil {
		n.log.Error("deleting KeyPackages", "client", c.Client, "err", err)
	}
}

// bundleChanged follows a change of the own trust bundle.
func (n *Node) bundleChanged() {
	before := n.ownBundle.Load()
	if err := n.refreshOwn(n.ctx); err != nil {
		n.log.Error("refreshing the own trust bundle", "err", err)
		return
	}
	if before.Sequence() == n.ownBundle.Load().Sequence() {
		n.kickRemovals()
		return
	}
	n.pushBundle()
	n.trustChanged(n.cfg.Domain)
}

// refreshOwn has the node judge by its own authority's present bundle.
func (n *Node) refreshOwn(ctx context.Context) error {
	b, err := n.service.Bundle(ctx)
	if err != nil {
		return fmt.Errorf("reading the own trust bundle: %w", err)
	}
	n.trust.SetOwn(b)
	n.ownBundle.Store(b)
	return nil
}

// trustChanged has everybody judge anew after a provider's bundle has changed.
func (n *Node) trustChanged(domain string) {
	n.listeners.trust(domain)
	n.gossip.Refresh() // also has live connections verified again
	n.kickRemovals()
}

// kickRemovals has proposeAll run soon, and again if it is running.
func (n *Node) kickRemovals() {
	select {
	case n.removals <- struct{}{}:
	default:
	}
}

// proposeAll proposes the removal of revoked clients from every room hosted here.
func (n *Node) proposeAll() error {
	if err := n.disk.grow(); err != nil {
		return err // nobody could commit them either
	}
	uris, err := n.hostedRooms()
	if err != nil {
		return err
	}
	var failed error
	for _, uri := range uris {
		var incomplete error
		r, err := n.hostedRoom(uri)
		if err == nil {
			err = n.run(r, func() (*change, error) {
				who, err := r.who()
				if err != nil {
					return nil, err
				}
				c := n.begin(r, who.peers)
				if err := n.proposeRemoves(c); err != nil {
					incomplete = err // what was proposed before that stands
				}
				if c.batch.Len() == 0 {
					return nil, nil
				}
				return c, nil
			})
		}
		failed = errors.Join(failed, err, incomplete)
	}
	return failed
}

// hubAAD is the authenticated data of the hub's proposals: a SafeAAD, as rooms with franking ask of all handshakes.
var hubAAD = codec.Marshal(mls.SafeAAD{})

// proposeRemoves logs the hub's proposals to remove clients that were revoked and whose removal isn't pending; the
// room's lock is held. After an external commit, which no pending proposal survives, that makes them anew.
func (n *Node) proposeRemoves(c *change) error {
	g := c.r.group
	pending := make(map[mls.LeafIndex]bool)
	for _, p := range g.Pending() {
		if p.Proposal.Remove != nil {
			pending[p.Proposal.Remove.Removed] = true
		}
	}
	for m := range g.Members() {
		if pending[m.Index] || !errors.Is(n.judge(c.r, m.Leaf), authority.ErrRevoked) {
			continue
		}
		signer, _, err := n.keys.hub(g.Suite())
		if err != nil {
			return err
		}
		msg, err := mls.ExternalProposal(g.Suite(), rand.Reader, signer, hubSender, g.GroupID(), g.Epoch(), hubAAD,
			mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: m.Index}})
		if err != nil {
			return fmt.Errorf("proposing to remove leaf %d: %w", m.Index, err)
		}
		staged, err := g.CheckProposal(msg.Public)
		if err != nil {
			return fmt.Errorf("proposing to remove leaf %d: %w", m.Index, err)
		}
		if err := g.ApplyProposal(c.batch.Prefixed(key(prefixGroup, c.r.uri)), staged); err != nil {
			return fmt.Errorf("proposing to remove leaf %d: %w", m.Index, err)
		}
		seq := c.log(codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: msg}))
		c.record.pending = append(c.record.pending[:len(c.record.pending):len(c.record.pending)], seq)
		_, client, _ := authority.IdentityOf(m.Leaf.Credential)
		n.log.Info("removal proposed", "room", c.r.uri, "client", client, "seq", seq)
	}
	return nil
}

// receiveBundle takes the trust bundle of an approved peer.
func (n *Node) receiveBundle(from string, encoded []byte) error {
	b, err := authority.ParseBundle(encoded)
	if err != nil {
		return err
	}
	changed, err := n.trust.PutBundle(from, b)
	if err != nil {
		return err
	}
	if changed {
		n.log.Info("trust bundle changed", "peer", from)
		n.trustChanged(from)
	}
	return nil
}
