package node

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
)

// Downloads go from the asset's provider through the room's hub and the client's own node (draft-ietf-mimi-protocol-06,
// Section 5.10.2). A hub doesn't know for which room: it fetches assets of its peers and of its own users for every peer,
// from where the federation has the provider, whatever a URL's host resolves to. What passes is neither kept nor known.

const (
	downloadBuffer   = 64 << 10 // bytes of an asset that are in memory at a time
	maxUserDownloads = 16       // at a time
	maxPeerDownloads = 64       // at a time
)

// download opens an asset for a user or peer who doesn't fetch too many.
func (n *Node) download(who string, atATime, atOnce int, open func() (*federation.Asset, error)) (*federation.Asset, error) {
	a := n.assets
	if wait := n.downloadPace.Take(who, 1, slowly(atOnce)); wait > 0 {
		return nil, busy(wait, "%s fetches too many assets", who)
	}
	a.mu.Lock()
	ok := a.downloads[who] < atATime
	if ok {
		a.downloads[who]++
	}
	a.mu.Unlock()
	if !ok {
		return nil, refuse("busy", "%s fetches %d assets at a time", who, atATime)
	}
	release := sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.downloads[who]--; a.downloads[who] == 0 {
			delete(a.downloads, who)
		}
	})
	asset, err := open()
	if err != nil {
		release()
		return nil, err
	}
	return &federation.Asset{Size: asset.Size, ReadCloser: &counted{asset, n.ctx, release}}, nil
}

// counted is a download that is under way. It ends with the node.
type counted struct {
	io.ReadCloser
	ctx     context.Context
	release func()
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, refuse("unavailable", "the node is stopping")
	}
	return c.ReadCloser.Read(p)
}

// Close implements io.Closer.
func (c *counted) Close() error {
	defer c.release()
	return c.ReadCloser.Close()
}

// openAsset opens an asset of an own user.
func (n *Node) openAsset(hash [sha256.Size]byte) (*federation.Asset, error) {
	f, err := n.assets.dir.Open(wholeName(hash[:]))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, refuse("notFound", "there is no such asset, or not any more")
	}
	if err != nil {
		return nil, fmt.Errorf("opening an asset: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening an asset: %w", err), f.Close())
	}
	return &federation.Asset{Size: info.Size(), ReadCloser: f}, nil
}

// fetchAsset opens an asset of an own user or fetches it from its provider, which must be an approved peer.
func (n *Node) fetchAsset(ctx context.Context, domain string, hash [sha256.Size]byte) (*federation.Asset, error) {
	if domain == n.cfg.Domain {
		return n.openAsset(hash)
	}
	if _, ok := n.trust.Peer(domain); !ok {
		return nil, refuse("notAllowed", "%s isn't a peer of %s", domain, n.cfg.Domain)
	}
	a, err := n.federation.Asset(ctx, domain, hash, n.maxAsset())
	if err != nil {
		return nil, n.unreachable(domain, err)
	}
	return a, nil
}

func (n *Node) maxAsset() int64 { return int64(n.cfg.Limits.AssetMiB) << 20 }

// proxyDownload fetches an asset for a peer, as a hub.
func (n *Node) proxyDownload(ctx context.Context, from, url string) (*federation.Asset, error) {
	domain, hash, err := federation.ParseAssetURL(url)
	if err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	return n.download(from, maxPeerDownloads, 100*n.cfg.Limits.Downloads, func() (*federation.Asset, error) {
		return n.fetchAsset(ctx, domain, hash)
	})
}

// downloadFor fetches an asset for a client, through the hub of the room unless it is an own user's.
func (n *Node) downloadFor(ctx context.Context, user, room mimi.URI, url string) (*federation.Asset, error) {
	domain, hash, err := federation.ParseAssetURL(url)
	if err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	return n.download(string(user), maxUserDownloads, n.cfg.Limits.Downloads, func() (*federation.Asset, error) {
		hub := room.Domain()
		if domain == n.cfg.Domain || hub == n.cfg.Domain {
			return n.fetchAsset(ctx, domain, hash)
		}
		a, err := n.federation.ProxyDownload(ctx, hub, url, n.maxAsset())
		if err != nil {
			return nil, n.unreachable(hub, err)
		}
		return a, nil
	})
}
