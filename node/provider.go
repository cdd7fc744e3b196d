package node

import (
	"context"
	"crypto/sha256"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// provider implements federation.Provider: what the node does for its peers. from is the domain that the peer's
// certificate proved.
type provider struct{ n *Node }

var _ federation.Provider = provider{}

// KeyMaterial claims KeyPackages, as a hub or as the user's provider.
func (p provider) KeyMaterial(ctx context.Context, from string, req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	if err := p.n.settled(); err != nil {
		return nil, peerError(err)
	}
	resp, err := p.n.keyMaterial(ctx, from, req)
	return resp, peerError(err)
}

// Update orders a handshake in a room of this hub.
func (p provider) Update(_ context.Context, from string, room mimi.URI, body []byte) (*mimi.UpdateRoomResponse, uint64, error) {
	resp, seq, err := p.n.update(submitter{domain: from}, room, body)
	return resp, seq, peerError(err)
}

// SubmitMessage orders an application message in a room of this hub.
func (p provider) SubmitMessage(_ context.Context, from string, room mimi.URI, body []byte) (*mimi.SubmitMessageResponse, uint64, error) {
	resp, seq, err := p.n.submitMessage(submitter{domain: from}, room, body)
	return resp, seq, peerError(err)
}

// Notify takes what another hub has ordered.
func (p provider) Notify(_ context.Context, from string, room mimi.URI, msgs []federation.Sequenced) error {
	if err := p.n.settled(); err != nil {
		return peerError(err) // what was lost before these comes first
	}
	if err := p.n.catchUp(p.n.ctx, room); err != nil {
		return peerError(err)
	}
	return peerError(p.n.notify(from, room, msgs))
}

// GroupInfo serves those who join by an external commit.
func (p provider) GroupInfo(_ context.Context, from string, room mimi.URI, req *mimi.GroupInfoRequest) (*mimi.GroupInfoResponse, error) {
	if err := p.n.paceInfo(from, usersOfPeer); err != nil {
		return nil, peerError(err)
	}
	resp, err := p.n.groupInfo(room, req)
	return resp, peerError(err)
}

// IdentifierQuery finds users of this provider.
func (p provider) IdentifierQuery(ctx context.Context, from string, req *mimi.IdentifierRequest) (*mimi.IdentifierResponse, error) {
	resp, err := p.n.identifierQuery(ctx, from, req)
	return resp, peerError(err)
}

// ReportAbuse takes a report about a room hosted here.
func (p provider) ReportAbuse(_ context.Context, from string, room mimi.URI, body []byte) error {
	return peerError(p.n.reportAbuse(submitter{domain: from}, room, body))
}

// RequestConsent takes what a user of the peer asks of one of this provider.
func (p provider) RequestConsent(_ context.Context, from string, e *mimi.ConsentEntry) error {
	return peerError(p.n.requestConsent(from, e))
}

// UpdateConsent takes what a user of the peer has decided about one of this provider.
func (p provider) UpdateConsent(_ context.Context, from string, e *mimi.ConsentEntry) error {
	return peerError(p.n.updateConsent(from, e))
}

// ProxyDownload fetches an asset for the peer.
func (p provider) ProxyDownload(ctx context.Context, from, downloadURL string) (*federation.Asset, error) {
	a, err := p.n.proxyDownload(ctx, from, downloadURL)
	return a, peerError(err)
}

// Asset opens an asset of an own user.
func (p provider) Asset(_ context.Context, from string, hash [sha256.Size]byte, part federation.Part) (*federation.Asset, error) {
	a, err := p.n.downloadForPeer(from, part, func() (*federation.Asset, error) { return p.n.openAsset(hash, part) })
	return a, peerError(err)
}

// Oblivious answers a request that the peer relays.
func (p provider) Oblivious(ctx context.Context, from string, request []byte) ([]byte, error) {
	b, err := p.n.oblivious(ctx, from, request)
	return b, peerError(err)
}

// GatewayKeys returns the keys of the oblivious gateway.
func (p provider) GatewayKeys(suite mls.CipherSuite) (*mimi.GatewayKeys, error) {
	keys, err := p.n.gatewayKeys(suite)
	return keys, peerError(err)
}

// Ephemeral passes on what isn't kept.
func (p provider) Ephemeral(_ context.Context, from string, room mimi.URI, body []byte) error {
	if room.Domain() == p.n.cfg.Domain {
		return peerError(p.n.orderEphemeral(submitter{domain: from}, room, body))
	}
	return peerError(p.n.hearEphemeral(from, room, body))
}

// Head returns how far a room hosted here is.
func (p provider) Head(room mimi.URI) []byte { return p.n.lastHead(room) }

// Log tells a peer that was restored from a backup what it has lost.
func (p provider) Log(ctx context.Context, from string, room mimi.URI, req *federation.LogRequest) (*federation.LogPage, error) {
	page, err := p.n.tellLog(ctx, from, room, req)
	return page, peerError(err)
}

// Known returns what is known of a peer.
func (p provider) Known(from string) (*federation.Known, error) {
	known := &federation.Known{Incarnation: p.n.incarnation}
	s, err := p.n.latestOf(from)
	if err != nil {
		return nil, err
	}
	if s != nil {
		known.Head = codec.Marshal(s)
	}
	if b := p.n.trust.Bundle(from); b != nil {
		known.Bundle = b.JSON()
	}
	return known, nil
}

// HubSender returns this hub's key and credential for rooms of a suite.
func (p provider) HubSender(suite mls.CipherSuite) ([]byte, error) {
	_, sender, err := p.n.keys.hub(suite)
	if err != nil {
		return nil, peerError(err)
	}
	return codec.Marshal(sender), nil
}

// Bundle returns the own trust bundle.
func (p provider) Bundle() []byte { return p.n.ownBundle.Load().JSON() }

// ReceiveBundle takes the trust bundle of the peer.
func (p provider) ReceiveBundle(_ context.Context, from string, bundle []byte) error {
	return peerError(p.n.receiveBundle(from, bundle))
}
