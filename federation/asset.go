package federation

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strconv"
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

// Asset is what is read of an asset while it comes, or of a part of one. Close frees what it needs.
type Asset struct {
	Size  int64 // bytes that come
	Whole int64 // bytes of the whole asset, if a part was asked for
	io.ReadCloser
}

// MaxPart is how many bytes a Part has at most.
const MaxPart = 512 << 10

// Part is which bytes of an asset are asked for, as in the HTTP field Range (RFC 9110, Section 14). The zero value is all of
// it. What the asset hasn't got of a part doesn't come.
type Part struct{ Offset, Length int64 }

// String returns the value of the field Range.
func (p Part) String() string { return fmt.Sprintf("bytes=%d-%d", p.Offset, p.Offset+p.Length-1) }

// ParsePart reads the value of a field Range. Of others than String writes it knows nothing; as RFC 9110 lets a server, it
// takes them for no range at all.
func ParsePart(s string) Part {
	first, last, ok := strings.Cut(strings.TrimPrefix(s, "bytes="), "-")
	from, err := strconv.ParseInt(first, 10, 62)
	to, err2 := strconv.ParseInt(last, 10, 62)
	p := Part{from, to - from + 1}
	if !ok || err != nil || err2 != nil || p.String() != s || p.Length < 1 {
		return Part{}
	}
	return p
}

// ContentRange returns the value of the field Content-Range for what comes of a part.
func (p Part) ContentRange(a *Asset) string {
	return fmt.Sprintf("bytes %d-%d/%d", p.Offset, p.Offset+a.Size-1, a.Whole)
}

// Answers reads a field Content-Range, which must be about this part of an asset, and returns how many bytes come, and
// how many the whole asset has.
func (p Part) Answers(contentRange string) (size, whole int64, err error) {
	_, after, _ := strings.Cut(contentRange, "/")
	if whole, err = strconv.ParseInt(after, 10, 64); err == nil && whole > p.Offset {
		size = min(p.Length, whole-p.Offset)
	}
	if size == 0 || p.ContentRange(&Asset{Size: size, Whole: whole}) != contentRange {
		return 0, 0, fmt.Errorf("federation: asked for %s and got %.100q", p, contentRange)
	}
	return size, whole, nil
}

func (c *call) proxyDownload() (*answer, error) {
	a, err := c.h.provider.ProxyDownload(c.r.Context(), c.from, c.param)
	return streamed(a, Part{}, err)
}

func (c *call) getAsset() (*answer, error) {
	hash, err := parseAssetName(c.param)
	if err != nil {
		return nil, refusal(CodeNotFound, "the path names no asset")
	}
	part := ParsePart(c.r.Header.Get("Range"))
	a, err := c.h.provider.Asset(c.r.Context(), c.from, hash, part)
	return streamed(a, part, err)
}

func streamed(a *Asset, part Part, err error) (*answer, error) {
	if err != nil {
		return nil, err
	}
	if part.Length > 0 {
		return &answer{status: http.StatusPartialContent, contentType: contentType, asset: a, contentRange: part.ContentRange(a)}, nil
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
		a, err = c.download(ctx, hub, url, Part{}, max)
		return err
	})
	return a, err
}

// Asset fetches an asset of a peer's user, or a part of one, like ProxyDownload.
func (c *Client) Asset(ctx context.Context, peer string, hash [sha256.Size]byte, part Part, max int64) (*Asset, error) {
	return c.download(ctx, peer, AssetURL(peer, hash), part, max)
}

// download begins to fetch something that is large. It ends with ctx, and if it doesn't get on.
func (c *Client) download(ctx context.Context, peer, url string, part Part, max int64) (*Asset, error) {
	ctx, cancel := context.WithCancel(ctx)
	idle := time.AfterFunc(assetIdle, cancel)
	x := exchange{method: http.MethodGet, url: url, want: http.StatusOK}
	if part.Length > 0 {
		x.part, x.want = part.String(), http.StatusPartialContent
	}
	resp, err := c.send(ctx, peer, x)
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
	a := &Asset{Size: body.left, ReadCloser: body}
	if part.Length > 0 {
		size, whole, err := part.Answers(resp.Header.Get("Content-Range"))
		if err != nil || size != a.Size {
			body.Close()
			return nil, fmt.Errorf("federation: %s answers with %d bytes: %w", peer, a.Size, cmp.Or(err, io.ErrUnexpectedEOF))
		}
		a.Whole = whole
	}
	return a, nil
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
