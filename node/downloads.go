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
//
// By Oblivious HTTP (Section 5.10.3) they go the same way, in parts: the client's node relays requests that only the hub
// can read, see oblivious.go.

const (
	downloadBuffer   = 64 << 10 // bytes of an asset that are in memory at a time
	maxUserDownloads = 16       // at a time
	partsOfAsset     = 16       // parts of assets count as an asset together
	maxPeerDownloads = 64       // at a time
)

// beginDownload counts a download of parts of assets by a user or peer, who may fetch so many assets at a time and at once.
// release ends it.
func (n *Node) beginDownload(who string, parts, atATime, atOnce int) (release func(), err error) {
	a := n.assets
	if wait := n.downloadPace.Take(who, parts, slowly(partsOfAsset*atOnce)); wait > 0 {
		return nil, busy(wait, "%s fetches too many assets", who)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.downloads[who] >= atATime {
		return nil, refuse("busy", "%s fetches %d assets at a time", who, atATime)
	}
	a.downloads[who]++
	return sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.downloads[who]--; a.downloads[who] == 0 {
			delete(a.downloads, who)
		}
	}), nil
}

// download opens an asset, or a part of one, for a user or peer who doesn't fetch too many.
func (n *Node) download(who string, part federation.Part, atATime, atOnce int, open func() (*federation.Asset, error)) (*federation.Asset, error) {
	parts := partsOfAsset
	if part.Length > 0 {
		parts = 1
	}
	release, err := n.beginDownload(who, parts, atATime, atOnce)
	if err != nil {
		return nil, err
	}
	asset, err := open()
	if err != nil {
		release()
		return nil, err
	}
	return &federation.Asset{Size: asset.Size, Whole: asset.Whole, ReadCloser: &counted{asset, n.ctx, release}}, nil
}

// downloadForPeer opens an asset, or a part of one, for a peer's users.
func (n *Node) downloadForPeer(peer string, part federation.Part, open func() (*federation.Asset, error)) (*federation.Asset, error) {
	return n.download(peer, part, maxPeerDownloads, usersOfPeer*n.cfg.Limits.Downloads, open)
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

// openAsset opens an asset of an own user, or a part of one.
func (n *Node) openAsset(hash [sha256.Size]byte, part federation.Part) (*federation.Asset, error) {
	if part.Length > federation.MaxPart {
		return nil, refuse("tooLarge", "%d bytes of an asset at a time, at most %d", part.Length, federation.MaxPart)
	}
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
	asset := &federation.Asset{Size: info.Size(), Whole: info.Size(), ReadCloser: f}
	if part.Length == 0 {
		return asset, nil
	}
	if part.Offset >= asset.Whole {
		return nil, errors.Join(refuse("malformed", "no %d bytes at %d of the %d of an asset", part.Length, part.Offset, asset.Whole), f.Close())
	}
	if _, err := f.Seek(part.Offset, io.SeekStart); err != nil {
		return nil, errors.Join(fmt.Errorf("opening an asset: %w", err), f.Close())
	}
	asset.Size = min(part.Length, asset.Whole-part.Offset)
	return asset, nil
}

// fetchAsset opens an asset of an own user or fetches it from its provider, which must be an approved peer.
func (n *Node) fetchAsset(ctx context.Context, domain string, hash [sha256.Size]byte, part federation.Part) (*federation.Asset, error) {
	if domain == n.cfg.Domain {
		return n.openAsset(hash, part)
	}
	if _, ok := n.trust.Peer(domain); !ok {
		return nil, refuse("notAllowed", "%s isn't a peer of %s", domain, n.cfg.Domain)
	}
	a, err := n.federation.Asset(ctx, domain, hash, part, n.maxAsset())
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
	return n.downloadForPeer(from, federation.Part{}, func() (*federation.Asset, error) {
		return n.fetchAsset(ctx, domain, hash, federation.Part{})
	})
}

// downloadFor fetches an asset for a client, through the hub of the room unless it is an own user's.
func (n *Node) downloadFor(ctx context.Context, user, room mimi.URI, url string) (*federation.Asset, error) {
	domain, hash, err := federation.ParseAssetURL(url)
	if err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	return n.download(string(user), federation.Part{}, maxUserDownloads, n.cfg.Limits.Downloads, func() (*federation.Asset, error) {
		hub := room.Domain()
		if domain == n.cfg.Domain || hub == n.cfg.Domain {
			return n.fetchAsset(ctx, domain, hash, federation.Part{})
		}
		a, err := n.federation.ProxyDownload(ctx, hub, url, n.maxAsset())
		if err != nil {
			return nil, n.unreachable(hub, err)
		}
		return a, nil
	})
}
