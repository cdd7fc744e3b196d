package client

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
)

// Assets are files that go with messages (draft-ietf-mimi-content, "External content"; draft-ietf-mimi-protocol-06,
// Section 5.10). A file is encrypted under a key of its own, uploaded to the own node, and named in a message, which has
// the key and the hash of the ciphertext. The draft doesn't say of what External.Size is the size; here it is what the URL
// leads to, as External.ContentHash is its hash.

const (
	// MaxAsset is the size in bytes of the largest file that is uploaded or fetched. It is in memory as a whole: an AEAD gives
	// nothing away before all of it is authenticated.
	MaxAsset = 100<<20 - gcmOverhead

	gcmOverhead      = 16
	assetChunk       = 1 << 20 // bytes of one request
	aeadAES128GCM    = 1       // RFC 5116, Section 6
	aeadAES256GCM    = 2
	namedSHA256      = 1 // RFC 6920, Section 9.4
	assetRetry       = 200 * time.Millisecond
	assetRetryAtMost = 5 * time.Second
)

// ErrNotAsset: the part of a message names nothing that this client can fetch.
var ErrNotAsset = errors.New("not an asset of a provider")

// Upload encrypts what r has, at most MaxAsset bytes, and uploads it to the own node. It returns the part that a message
// to any room can have (Compose), with content type and file name as given; the file is kept as long as the node's operator
// says. An upload that is interrupted goes on where it was, until ctx ends; another call begins anew, with another key.
func (c *Client) Upload(ctx context.Context, r io.Reader, contentType, filename string) (content.Part, error) {
	p, err := c.upload(ctx, r, contentType, filename)
	if err != nil {
		return content.Part{}, fmt.Errorf("client: upload %q: %w", filename, err)
	}
	return p, nil
}

func (c *Client) upload(ctx context.Context, r io.Reader, contentType, filename string) (content.Part, error) {
	e := &content.External{EncAlg: aeadAES128GCM, Key: make([]byte, 16), Nonce: make([]byte, 12), HashAlg: namedSHA256, Filename: filename}
	for _, b := range [][]byte{e.Key, e.Nonce} {
		if _, err := io.ReadFull(c.o.Rand, b); err != nil {
			return content.Part{}, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(r, MaxAsset+1))
	if err != nil {
		return content.Part{}, err
	}
	if len(b) > MaxAsset {
		return content.Part{}, fmt.Errorf("longer than %d bytes", MaxAsset)
	}
	aead, err := assetAEAD(e)
	if err != nil {
		return content.Part{}, err
	}
	b = aead.Seal(b[:0], e.Nonce, b, nil)
	hash := sha256.Sum256(b)
	e.ContentHash, e.Size = hash[:], uint64(len(b))
	done, err := c.push(ctx, hash, b)
	if err != nil {
		return content.Part{}, err
	}
	domain := c.User().Domain()
	if done.Url != federation.AssetURL(domain, hash) {
		return content.Part{}, fmt.Errorf("%s gives the asset the URL %.200q", domain, done.Url)
	}
	e.URL = done.Url
	if done.ExpiresUnix > 0 && done.ExpiresUnix < 1<<32 {
		e.Expires = uint32(done.ExpiresUnix)
	}
	return content.Part{Disposition: content.Attachment, Cardinality: content.ExternalPart, ContentType: contentType, External: e}, nil
}

// push sends the bytes of an asset until the node has them all.
func (c *Client) push(ctx context.Context, hash [sha256.Size]byte, b []byte) (*api.UploadAssetResponse, error) {
	pause := assetRetry
	for at := uint64(0); ; {
		req := &api.UploadAssetRequest{Hash: hash[:], Size: uint64(len(b)), Offset: at, Data: b[at:min(at+assetChunk, uint64(len(b)))]}
		res, err := call(ctx, c.session, c.session.service.UploadAsset, req)
		switch {
		case err == nil && res.Url != "":
			return res, nil
		case err == nil && res.Offset > uint64(len(b)):
			return nil, fmt.Errorf("the node has %d bytes of %d", res.Offset, len(b))
		case err == nil && res.Offset > at:
			at, pause = res.Offset, assetRetry
			continue
		case err == nil:
			at = res.Offset // it has lost what it had, or takes nothing
		case permanent(err) || Code(err) == "quotaExceeded":
			return nil, err
		}
		c.log.Debug("an upload is interrupted", "offset", at, "of", len(b), "err", err)
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-time.After(pause):
		}
		pause = min(2*pause, assetRetryAtMost)
	}
}

// assetOf is what a part of a message says of its asset.
func assetOf(sender mimi.URI, p *content.Part) (mimi.Asset, error) {
	u, err := url.Parse(p.External.URL)
	if err != nil || u.Scheme != "https" {
		return mimi.Asset{}, fmt.Errorf("%w: URL %.200q", ErrNotAsset, p.External.URL)
	}
	return mimi.Asset{
		Sender: sender, Host: u.Host, MediaType: p.ContentType, Attachment: p.Disposition == content.Attachment, Size: p.External.Size,
	}, nil
}

// mayUpload says whether a message may have the assets that it has in a room with that app_data_dictionary.
func mayUpload(d mls.AppDataDictionary, m *content.Message) (err error) {
	m.Body.Walk(func(_ int, p *content.Part) bool {
		if p.External != nil {
			var a mimi.Asset
			if a, err = assetOf(m.Sender, p); err == nil {
				err = mimi.CheckUpload(d, a)
			}
		}
		return err == nil
	})
	return err
}

// downloadTypes are the ways in which the room lets this client fetch an asset, the preferred one first. Without a policy
// it is the one by which its own node doesn't learn for what.
func (r *Room) downloadTypes(a mimi.Asset) ([]mimi.DownloadType, error) {
	r.mu.Lock()
	d := r.group.Dictionary()
	r.mu.Unlock()
	if err := mimi.CheckDownload(d, a, r.c.User()); err != nil {
		return nil, err
	}
	types := []mimi.DownloadType{mimi.DownloadOblivious, mimi.DownloadHubProxy}
	p, err := mimi.AssetPolicyOf(d)
	if err != nil || p == nil {
		return types, err
	}
	if p.Default == mimi.DownloadHubProxy {
		slices.Reverse(types)
	}
	return slices.DeleteFunc(types, func(t mimi.DownloadType) bool { return !p.Downloads(t) }), nil
}

// Download fetches an asset that a message of the room names, of that sender, through the own node and the room's hub,
// checks and decrypts it, and writes it to a new file of mode 0600. It is there as a whole or not at all. The error wraps
// ErrNotAsset if the part isn't one that Upload makes, a *mimi.PolicyError if the room doesn't allow it, and fs.ErrExist if
// there is a file of that name.
func (r *Room) Download(ctx context.Context, sender mimi.URI, p *content.Part, path string) error {
	b, err := r.fetch(ctx, sender, p)
	if err == nil {
		err = writeNew(path, b)
	}
	if err != nil {
		return fmt.Errorf("client: download to %s: %w", path, err)
	}
	return nil
}

func (r *Room) fetch(ctx context.Context, sender mimi.URI, p *content.Part) ([]byte, error) {
	return openAsset(p, func(url string, size uint64) (b []byte, err error) {
		a, err := assetOf(sender, p)
		if err != nil {
			return nil, err
		}
		types, err := r.downloadTypes(a)
		if err != nil {
			return nil, err
		}
		err = errors.New("the room's policy allows no download that this client can make")
		for _, t := range types {
			if t == mimi.DownloadHubProxy {
				b, err = r.c.pull(ctx, &api.DownloadAssetRequest{Room: string(r.uri), Url: url}, size)
			} else {
				b, err = r.pullOblivious(ctx, url, size)
			}
			if !errors.Is(err, errNoGateway) {
				break
			}
		}
		return b, err
	})
}

// openAsset checks and decrypts what pull gets of an asset.
func openAsset(p *content.Part, pull func(url string, size uint64) ([]byte, error)) ([]byte, error) {
	e := p.External
	if e == nil {
		return nil, ErrNotAsset
	}
	_, hash, err := federation.ParseAssetURL(e.URL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrNotAsset, err)
	case e.HashAlg != namedSHA256 || !bytes.Equal(e.ContentHash, hash[:]):
		return nil, fmt.Errorf("%w: its hash isn't that of its URL", ErrNotAsset)
	case e.Size > MaxAsset+gcmOverhead:
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrNotAsset, MaxAsset)
	}
	aead, err := assetAEAD(e)
	if err != nil {
		return nil, err
	}
	b, err := pull(e.URL, e.Size)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != hash {
		return nil, errors.New("the bytes that came have another hash")
	}
	plain, err := aead.Open(b[:0], e.Nonce, b, e.AAD)
	if err != nil {
		return nil, errors.New("the message has another key than the asset was encrypted with")
	}
	return plain, nil
}

// assetAEAD returns the AEAD of an asset, for which the nonce has the right length.
func assetAEAD(e *content.External) (cipher.AEAD, error) {
	want := map[uint16]int{aeadAES128GCM: 16, aeadAES256GCM: 32}[e.EncAlg]
	if want == 0 || len(e.Key) != want {
		return nil, fmt.Errorf("%w: AEAD %d with a key of %d bytes", ErrNotAsset, e.EncAlg, len(e.Key))
	}
	block, err := aes.NewCipher(e.Key)
	if err != nil {
		return nil, err
	}
	if len(e.Nonce) != 12 {
		return nil, fmt.Errorf("%w: a nonce of %d bytes", ErrNotAsset, len(e.Nonce))
	}
	return cipher.NewGCM(block)
}

// pull fetches the bytes of an asset: as many as the message says, if it says so.
func (c *Client) pull(ctx context.Context, msg *api.DownloadAssetRequest, size uint64) ([]byte, error) {
	token, err := c.session.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	req := connect.NewRequest(msg)
	req.Header().Set("Authorization", "Bearer "+token)
	stream, err := c.session.service.DownloadAsset(ctx, req)
	if err != nil {
		return nil, err
	}
	limit := size
	if size == 0 {
		limit = MaxAsset + gcmOverhead
	}
	var b []byte
	for stream.Receive() {
		data := stream.Msg().Data
		if uint64(len(b)+len(data)) > limit {
			return nil, fmt.Errorf("more than %d bytes came", limit)
		}
		b = append(b, data...)
	}
	if err := stream.Err(); err != nil {
		if connect.CodeOf(err) == connect.CodeUnauthenticated {
			c.session.forget(token)
		}
		return nil, err
	}
	if size != 0 && uint64(len(b)) != size {
		return nil, fmt.Errorf("%d bytes of %d came", len(b), size)
	}
	return b, nil
}

// writeNew writes a file that isn't there yet.
func writeNew(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".download-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Link(f.Name(), path)
}
