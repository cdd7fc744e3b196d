package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
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

// deleteClient deletes a client for its user, as the revocation of all its certificates, which peers learn of by the bundle.
func (n *Node) deleteClient(ctx context.Context, user mimi.URI, name string) error {
	client, err := mimi.ParseURI(name)
	if err != nil || client.Kind() != mimi.KindClient {
		return refuse("malformed", "%.300q is no client", name)
	}
	list, err := n.service.List(ctx, authority.Filter{Client: client})
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(c authority.Certificate) bool { return c.User == user }) { // a name belongs to one user
		return refuse("notFound", "%s has no client %s", user, client)
	}
	if _, err := n.service.Revoke(ctx, string(client), "cessationOfOperation"); err != nil && !errors.Is(err, authority.ErrNotFound) {
		return err // not found: all have expired
	}
	return n.forgetClient(user, client)
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
