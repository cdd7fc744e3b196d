package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

func randomBytes(n int) ([]byte, [sha256.Size]byte) {
	b := make([]byte, n)
	rand.Read(b)
	return b, sha256.Sum256(b)
}

func (c *testClient) upload(hash []byte, size, offset int, data []byte) (*api.UploadAssetResponse, error) {
	resp, err := c.api.UploadAsset(c.t.Context(), connect.NewRequest(&api.UploadAssetRequest{Hash: hash, Size: uint64(size), Offset: uint64(offset), Data: data}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// uploadAll uploads an asset and returns its URL.
func (c *testClient) uploadAll(b []byte) string {
	c.t.Helper()
	hash := sha256.Sum256(b)
	for at := 0; ; {
		resp, err := c.upload(hash[:], len(b), at, b[at:min(at+maxChunk, len(b))])
		if err != nil {
			c.t.Fatal(err)
		}
		if at = int(resp.Offset); resp.Url != "" {
			return resp.Url
		}
	}
}

func (c *testClient) fetch(room mimi.URI, url string) ([]byte, error) {
	s, err := c.api.DownloadAsset(c.t.Context(), connect.NewRequest(&api.DownloadAssetRequest{Room: string(room), Url: url}))
	if err != nil {
		return nil, err
	}
	defer s.Close()
	var b []byte
	for s.Receive() {
		b = append(b, s.Msg().Data...)
	}
	return b, s.Err()
}

// files returns the names of the files of assets and uploads.
func (n *testNode) files() []string {
	n.t.Helper()
	var names []string
	for _, dir := range []string{wholeDir, partialDir} {
		for _, e := range must(os.ReadDir(filepath.Join(n.cfg.Data, dir)))(n.t) {
			if mode := must(e.Info())(n.t).Mode(); mode.Perm() != 0o600 {
				n.t.Errorf("%s has mode %o", e.Name(), mode)
			}
			names = append(names, e.Name())
		}
	}
	return names
}

func (n *testNode) deleteAssetOf(c *testClient, hash [sha256.Size]byte) {
	n.t.Helper()
	must(c.api.DeleteAsset(n.t.Context(), connect.NewRequest(&api.DeleteAssetRequest{Hash: hash[:]})))(n.t)
}

func TestUploadGoesOnAfterTheNodeRestarted(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	b, hash := randomBytes(3*maxChunk - 17)
	if resp := must(alice.upload(hash[:], len(b), 0, b[:maxChunk]))(t); resp.Offset != maxChunk || resp.Url != "" {
		t.Fatalf("the first part: %v", resp)
	}
	n.stop()
	n.start()
	alice.authenticate()
	resp := must(alice.upload(hash[:], len(b), 0, nil))(t)
	if resp.Offset != maxChunk || resp.ExpiresUnix < time.Now().Unix() {
		t.Fatalf("after the restart: %v", resp)
	}
	// What doesn't fit changes nothing.
	if resp := must(alice.upload(hash[:], len(b), 2*maxChunk, b[2*maxChunk:]))(t); resp.Offset != maxChunk || resp.Url != "" {
		t.Fatalf("the third part before the second: %v", resp)
	}
	must(alice.upload(hash[:], len(b), maxChunk, b[maxChunk:2*maxChunk]))(t)
	resp = must(alice.upload(hash[:], len(b), 2*maxChunk, b[2*maxChunk:]))(t)
	if resp.Url != federation.AssetURL("alpha.example", hash) || resp.Offset != uint64(len(b)) {
		t.Fatalf("at the end: %v", resp)
	}
	n.stop()
	n.start()
	alice.authenticate()
	if got, err := alice.fetch("mimi://alpha.example/r/x", resp.Url); err != nil || !bytes.Equal(got, b) {
		t.Errorf("downloaded %d bytes, %v", len(got), err)
	}
	if got := n.files(); len(got) != 1 || got[0] != hex.EncodeToString(hash[:]) {
		t.Errorf("files: %q", got)
	}
}

func TestBadUploadsAreRefused(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.Limits.AssetMiB, n.cfg.Limits.AssetQuotaMiB = 2, 3
	n.start()
	alice := newClient(t, n, "alice", "alice-laptop")
	b, hash := randomBytes(maxChunk)
	small, other := randomBytes(10)
	for _, x := range []struct {
		name string
		hash []byte
		size int
		data []byte
		code string
	}{
		{"a short hash", hash[:31], 10, nil, "malformed"},
		{"a name instead of a hash", []byte("../../../../../../etc/parley.pid"), 10, nil, ""}, // is one, of 32 bytes
		{"no bytes", hash[:], 0, nil, "tooLarge"},
		{"a large asset", hash[:], 2<<20 + 1, nil, "tooLarge"},
		{"a huge asset", hash[:], 1 << 62, nil, "tooLarge"},
		{"a large part", hash[:], 2 << 20, make([]byte, maxChunk+1), "tooLarge"},
		{"more bytes than there are", hash[:], 9, small, "malformed"},
		{"another size than at first", hash[:], 10, small, "malformed"},
		{"bytes of another hash", other[:], maxChunk, b, "malformed"},
	} {
		_, err := alice.upload(x.hash, x.size, 0, x.data)
		if got := code(err); got != x.code || (err == nil) != (x.code == "") {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	if got := n.files(); len(got) > 0 {
		t.Errorf("files: %q", got)
	}
	if resp := must(alice.upload(other[:], len(small), 0, nil))(t); resp.Offset != 0 {
		t.Errorf("of the upload with another hash there are %d bytes", resp.Offset)
	}
}

func TestUsersQuotaBoundsAssetsAndUploads(t *testing.T) {
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.Limits.AssetQuotaMiB = 3
	n.start()
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	whole, first := randomBytes(maxChunk)
	alice.uploadAll(whole)
	_, second := randomBytes(1)
	must(alice.upload(second[:], 2*maxChunk-1, 0, nil))(t) // begun
	_, third := randomBytes(1)
	if _, err := alice.upload(third[:], 2, 0, nil); code(err) != "quotaExceeded" {
		t.Errorf("beyond the quota: %v", err)
	}
	must(alice.upload(third[:], 1, 0, nil))(t)
	must(alice.upload(first[:], len(whole), 0, nil))(t) // takes nothing
	must(bob.upload(third[:], 3*maxChunk, 0, nil))(t)
	n.deleteAssetOf(alice, second)
	must(alice.upload(second[:], 2*maxChunk-1, 0, nil))(t)
}

// Who uploads the same bytes as somebody else neither sees nor ends the other's upload, and the file stays until both
// have given it up.
func TestSameBytesOfTwoUsersAreCounted(t *testing.T) {
	n := newNode(t, "alpha")
	alice, bob := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "bob", "bob-phone")
	b, hash := randomBytes(2000)
	must(alice.upload(hash[:], len(b), 0, b[:1000]))(t)
	if resp := must(bob.upload(hash[:], len(b), 1000, b[1000:]))(t); resp.Offset != 0 {
		t.Fatalf("bob goes on with what alice uploaded: %v", resp)
	}
	n.deleteAssetOf(bob, hash)
	if resp := must(alice.upload(hash[:], len(b), 0, nil))(t); resp.Offset != 1000 {
		t.Fatalf("alice's upload has %d bytes after bob deleted his", resp.Offset)
	}
	url := alice.uploadAll(b)
	if resp := must(bob.upload(hash[:], len(b), 0, nil))(t); resp.Url != "" {
		t.Fatal("bob has an asset of which he has sent nothing")
	}
	if bob.uploadAll(b) != url || len(n.files()) != 1 {
		t.Errorf("files: %q", n.files())
	}
	n.deleteAssetOf(alice, hash)
	if got, err := alice.fetch("mimi://alpha.example/r/x", url); err != nil || !bytes.Equal(got, b) {
		t.Errorf("after one of two has deleted it: %d bytes, %v", len(got), err)
	}
	n.deleteAssetOf(bob, hash)
	if _, err := bob.fetch("mimi://alpha.example/r/x", url); code(err) != "notFound" || len(n.files()) > 0 {
		t.Errorf("after both have deleted it: %v, files %q", err, n.files())
	}
}

func TestAssetsExpire(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	old, hash := randomBytes(100)
	alice.uploadAll(old)
	kept, keptHash := randomBytes(100)
	alice.uploadAll(kept)
	begun, begunHash := randomBytes(100)
	must(alice.upload(begunHash[:], 100, 0, begun[:50]))(t)
	for _, h := range [][sha256.Size]byte{hash, begunHash} {
		k := key(prefixAsset, alice.user, h[:])
		rec := must(n.asset(k))(t)
		rec.expires = uint64(time.Now().Unix()) - 1
		must(n.store.Commit(map[string][]byte{string(k): codec.Marshal(rec)}, nil))(t)
	}
	if err := n.sweep(); err != nil {
		t.Fatal(err)
	}
	if got := n.files(); len(got) != 1 || got[0] != hex.EncodeToString(keptHash[:]) {
		t.Errorf("files: %q", got)
	}
	if err := store.ScanPrefix(n.store, []byte(prefixAssetRef), func(k, _ []byte) bool {
		if !bytes.HasPrefix(k, keptHash[:]) {
			t.Errorf("a reference to %x", k)
		}
		return true
	}); err != nil {
		t.Error(err)
	}
}

func TestWhatACrashLeavesOfAssetsIsDeleted(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	b, hash := randomBytes(100)
	alice.uploadAll(b)
	lost, lostHash := randomBytes(100)
	url := alice.uploadAll(lost)
	begun, begunHash := randomBytes(100)
	must(alice.upload(begunHash[:], 100, 0, begun[:50]))(t)
	want := n.files()
	n.stop()
	if err := os.Remove(filepath.Join(n.cfg.Data, wholeName(lostHash[:]))); err != nil {
		t.Fatal(err)
	}
	nobodys := strings.Repeat("0", 64)
	for _, name := range []string{wholeDir + "/" + nobodys, partialDir + "/" + nobodys, partialDir + "/" + hex.EncodeToString(hash[:])} {
		if err := os.WriteFile(filepath.Join(n.cfg.Data, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	alice.authenticate()
	if got := n.files(); len(got) != len(want)-1 {
		t.Errorf("files %q, before %q", got, want)
	}
	if _, err := alice.fetch("mimi://alpha.example/r/x", url); code(err) != "notFound" {
		t.Errorf("the lost one: %v", err)
	}
	if resp := must(alice.upload(lostHash[:], 100, 0, nil))(t); resp.Offset != 0 || resp.Url != "" {
		t.Errorf("the lost one is there: %v", resp)
	}
	if alice.uploadAll(lost) != url {
		t.Error("the lost one can't be uploaded again")
	}
	if resp := must(alice.upload(begunHash[:], 100, 50, begun[50:]))(t); resp.Url == "" {
		t.Errorf("the one that was begun: %v", resp)
	}
}

func TestAssetsComeThroughTheHubOfTheRoom(t *testing.T) {
	alpha, beta, gamma, delta := newNode(t, "alpha"), newNode(t, "beta"), newNode(t, "gamma"), newNode(t, "delta")
	federate(t, alpha, beta)
	federate(t, alpha, gamma)
	federate(t, gamma, delta) // beta and gamma have nothing to do with each other
	bob, carol := newClient(t, beta, "bob", "bob-phone"), newClient(t, gamma, "carol", "carol-phone")
	b, hash := randomBytes(maxChunk + 100)
	url := bob.uploadAll(b)
	room := mimi.URI("mimi://alpha.example/r/x")
	if got, err := carol.fetch(room, url); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	name := hex.EncodeToString(hash[:])
	for _, x := range []struct{ name, room, url, code string }{
		{"a provider that isn't the hub's peer", "mimi://alpha.example/r/x", federation.AssetURL("delta.example", hash), "notAllowed"},
		{"an unknown provider", "mimi://alpha.example/r/x", federation.AssetURL("omega.example", hash), "notAllowed"},
		{"a hub that doesn't know the provider", "mimi://delta.example/r/x", url, "notAllowed"},
		{"an unknown hub", "mimi://omega.example/r/x", url, "unapprovedPeer"},
		{"no such asset", "mimi://alpha.example/r/x", federation.AssetURL("beta.example", [32]byte{1}), "notFound"},
		{"this machine", "mimi://alpha.example/r/x", "https://127.0.0.1/parley/v1/asset/" + name, "malformed"},
		{"a port", "mimi://alpha.example/r/x", "https://beta.example:22/parley/v1/asset/" + name, "malformed"},
		{"another endpoint", "mimi://alpha.example/r/x", "https://beta.example/parley/v1/bundle", "malformed"},
		{"another file", "mimi://alpha.example/r/x", "https://beta.example/parley/v1/asset/../../store/CURRENT", "malformed"},
		{"an upload", "mimi://beta.example/r/x", "https://beta.example/parley/v1/asset/partial/" + name, "malformed"},
	} {
		if got, err := carol.fetch(mimi.URI(x.room), x.url); code(err) != x.code {
			t.Errorf("%s: %d bytes, %v", x.name, len(got), err)
		}
		// A hub is as strict with peers, whatever their nodes let pass.
		_, err := gamma.federation.ProxyDownload(t.Context(), "alpha.example", x.url, 1<<20)
		if x.room == "mimi://alpha.example/r/x" && (err == nil || !strings.Contains(err.Error(), x.code)) {
			t.Errorf("%s, asked as a node: %v", x.name, err)
		}
	}
	alpha.stop()
	alpha.cfg.Limits.AssetMiB = 1
	alpha.start()
	eventually(t, func() error {
		if _, err := carol.fetch(room, url); err == nil || code(err) == "hubUnreachable" {
			return fmt.Errorf("a hub that passes on 1 MiB: %v", err)
		}
		return nil
	})
	if n := len(alpha.files()) + len(gamma.files()); n > 0 {
		t.Errorf("%d files where the asset passed", n)
	}
}

func TestOneWhoFetchesTooMuchIsRefused(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	b, hash := randomBytes(100)
	alice.uploadAll(b)
	open := func() (*federation.Asset, error) { return n.openAsset(hash, federation.Part{}) }
	peer := provider{n.Node}
	var held []*federation.Asset
	for range maxPeerDownloads {
		held = append(held, must(peer.Asset(context.Background(), "beta.example", hash, federation.Part{}))(t))
	}
	if _, err := peer.ProxyDownload(context.Background(), "beta.example", federation.AssetURL("alpha.example", hash)); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("one too many at a time: %v", err)
	}
	must(peer.Asset(context.Background(), "gamma.example", hash, federation.Part{}))(t).Close() // others don't notice
	for _, a := range held {
		a.Close()
		a.Close() // counts once
	}
	if len(n.assets.downloads) > 0 {
		t.Errorf("under way: %v", n.assets.downloads)
	}
	for range 3 {
		must(n.download("delta.example", federation.Part{}, 3, 3, open))(t).Close()
	}
	if _, err := n.download("delta.example", federation.Part{}, 3, 3, open); err == nil || reason(err).code != "busy" {
		t.Errorf("too many in a row: %v", err)
	}
}
