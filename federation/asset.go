package federation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// AssetPath, followed by the SHA-256 of an asset in lower-case hexadecimal, is where a node has the assets of its users
// (GET), encrypted by them.
const AssetPath = "/parley/v1/asset/"

const (
	assetBuffer = 64 << 10         // bytes of an asset that are in memory at a time
	assetIdle   = 30 * time.Second // how long an asset may take to get on by a byte
)

// AssetURL is the downloadUrl of an asset. The draft leaves to each provider what its URLs are, and to the hub to know
// which hosts serve its peers' assets (draft-ietf-mimi-protocol-06, Section 5.10.2): here the host is the provider's
// domain, and a URL has one form.
func AssetURL(domain string, hash [sha256.Size]byte) string {
	return "https://" + domain + AssetPath + hex.EncodeToString(hash[:])
}

// ParseAssetURL is the inverse of AssetURL. It refuses whatever AssetURL doesn't write, byte for byte: ports, queries,
// other paths and other hosts than domains.
func ParseAssetURL(s string) (domain string, hash [sha256.Size]byte, err error) {
	rest, ok := strings.CutPrefix(s, "https://")
	domain, name, ok2 := strings.Cut(rest, AssetPath)
	if !ok || !ok2 || mimi.ValidDomain(domain) != nil {
		return "", hash, fmt.Errorf("federation: %.200q isn't the URL of an asset", s)
	}
	hash, err = parseAssetName(name)
	return domain, hash, err
}

func parseAssetName(name string) (hash [sha256.Size]byte, err error) {
	b, err := hex.DecodeString(name)
	if err != nil || len(b) != len(hash) || strings.ToLower(name) != name {
		return hash, fmt.Errorf("federation: %.200q isn't the name of an asset", name)
	}
	return [sha256.Size]byte(b), nil
}

// Asset is what is read of an asset while it comes. Close frees what it needs.
type Asset struct {
	Size int64 // bytes
	io.ReadCloser
}

func (c *call) proxyDownload() (*answer, error) {
	a, err := c.h.provider.ProxyDownload(c.r.Context(), c.from, c.param)
	return streamed(a, err)
}

func (c *call) getAsset() (*answer, error) {
	hash, err := parseAssetName(c.param)
	if err != nil {
		return nil, refusal(CodeNotFound, "the path names no asset")
	}
	a, err := c.h.provider.Asset(c.r.Context(), c.from, hash)
	return streamed(a, err)
}

func streamed(a *Asset, err error) (*answer, error) {
	if err != nil {
		return nil, err
	}
	return &answer{status: http.StatusOK, contentType: contentType, asset: a}, nil
}

// stream writes an asset to a peer that keeps reading. If it ends early, so does the answer, which the peer notices by
// its length.
func (a *Asset) stream(w http.ResponseWriter) error {
	defer a.Close()
	control := http.NewResponseController(w)
	buf := make([]byte, assetBuffer)
	for left := a.Size; left > 0; {
		k, err := a.Read(buf[:min(left, int64(len(buf)))])
		if k > 0 {
			_ = control.SetWriteDeadline(time.Now().Add(assetIdle)) // what can't have one has no peers behind it
			if _, err := w.Write(buf[:k]); err != nil {
				return err
			}
			left -= int64(k)
		}
		if err != nil && left > 0 {
			return err
		}
	}
	return nil
}

// ProxyDownload fetches what downloadURL names through a hub. Of more than max bytes there is an error. The asset is to
// be read without pauses, and nothing proves that it is the right one.
func (c *Client) ProxyDownload(ctx context.Context, hub, downloadURL string, max int64) (*Asset, error) {
	var a *Asset
	err := c.locate(ctx, hub, func(d *mimi.Directory) string { return d.ProxyDownload }, downloadURL, func(url string) (err error) {
		a, err = c.download(ctx, hub, url, max)
		return err
	})
	return a, err
}

// Asset fetches an asset of a peer's user, like ProxyDownload.
func (c *Client) Asset(ctx context.Context, peer string, hash [sha256.Size]byte, max int64) (*Asset, error) {
	return c.download(ctx, peer, AssetURL(peer, hash), max)
}

// download begins to fetch something that is large. It ends with ctx, and if it doesn't get on.
func (c *Client) download(ctx context.Context, peer, url string, max int64) (*Asset, error) {
	ctx, cancel := context.WithCancel(ctx)
	idle := time.AfterFunc(assetIdle, cancel)
	resp, err := c.send(ctx, peer, exchange{method: http.MethodGet, url: url, want: http.StatusOK})
	if err != nil {
		idle.Stop()
		cancel()
		return nil, err
	}
	body := &download{peer: peer, body: resp.Body, left: resp.ContentLength, idle: idle, cancel: cancel}
	if body.left < 0 || body.left > max {
		body.Close()
		return nil, fmt.Errorf("federation: %s answers with %d bytes, want 0 to %d", peer, body.left, max)
	}
	return &Asset{Size: body.left, ReadCloser: body}, nil
}

// download is the body of an answer that has to get on. It has the length that was announced, or an error.
type download struct {
	peer   string
	body   io.ReadCloser
	left   int64
	idle   *time.Timer
	cancel context.CancelFunc
}

// Read implements io.Reader.
func (d *download) Read(p []byte) (int, error) {
	if d.left == 0 {
		return 0, io.EOF
	}
	k, err := d.body.Read(p[:min(int64(len(p)), d.left)])
	if d.left -= int64(k); k > 0 {
		d.idle.Reset(assetIdle)
	}
	switch {
	case d.left == 0:
		return k, nil
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		err = &noAnswer{fmt.Errorf("answer of %s: %w", d.peer, err)}
	}
	return k, err
}

// Close implements io.Closer.
func (d *download) Close() error {
	d.idle.Stop()
	d.cancel()
	return d.body.Close()
}
