package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
)

func TestAssetsPassFromProviderToProvider(t *testing.T) {
	p := providers(t, "alpha", "beta", "gamma")
	alice, carol := p[0].enrol("alice", "alice-laptop"), p[2].enrol("carol", "carol-pc")
	bob, f := p[1].enrolFaulty("bob", "bob-phone")
	room := alice.create(bob.User(), carol.User())
	uri := room.URI()
	agree(t, uri, alice, bob, carol)

	file := make([]byte, 3*assetChunk+17)
	rand.Read(file)
	requests, restarted := 0, false
	f.set(func(f *faults) {
		f.upload = func() error {
			if requests++; requests == 2 {
				p[1].stop()
				p[1].start()
				restarted = true
			}
			if requests%2 == 0 {
				return connect.NewError(connect.CodeUnavailable, errors.New("the answer is lost"))
			}
			return nil
		}
	})
	part, err := bob.Upload(t.Context(), bytes.NewReader(file), "image/png", "a picture.png")
	if err != nil {
		t.Fatal(err)
	}
	if !restarted || part.External.Expires < uint32(time.Now().Unix()) {
		t.Errorf("restarted %v, expires at %d", restarted, part.External.Expires)
	}
	if _, err := bob.room(uri).SendContent(t.Context(), bob.room(uri).Compose(part)); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*device{alice, bob, carol} {
		within(t, func() error {
			if len(d.texts(uri)) != 1 {
				return errors.New("no message yet")
			}
			return nil
		})
		got := d.last(uri, 1).Content.Body
		path := filepath.Join(t.TempDir(), "got")
		if err := d.room(uri).Download(t.Context(), bob.User(), &got, path); err != nil {
			t.Errorf("%s: %v", d.User(), err)
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(b, file) {
			t.Errorf("%s has %d bytes, %v", d.User(), len(b), err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("the file has mode %v, %v", info.Mode(), err)
		}
		if err := d.room(uri).Download(t.Context(), bob.User(), &got, path); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a file that is there: %v", err)
		}
		if got.External.Filename != "a picture.png" || got.ContentType != "image/png" {
			t.Errorf("%q, %q", got.External.Filename, got.ContentType)
		}
	}

	for what, change := range map[string]func(p *content.Part, e *content.External){
		"no asset":             func(p *content.Part, _ *content.External) { *p = content.Text("text") },
		"another key":          func(_ *content.Part, e *content.External) { e.Key = make([]byte, 16) },
		"another nonce":        func(_ *content.Part, e *content.External) { e.Nonce = make([]byte, 12) },
		"other data":           func(_ *content.Part, e *content.External) { e.AAD = []byte{1} },
		"a short key":          func(_ *content.Part, e *content.External) { e.Key = e.Key[:15] },
		"a key of AES-256":     func(_ *content.Part, e *content.External) { e.EncAlg = aeadAES256GCM },
		"no encryption":        func(_ *content.Part, e *content.External) { e.EncAlg, e.Key, e.Nonce = 0, nil, nil },
		"a short nonce":        func(_ *content.Part, e *content.External) { e.Nonce = e.Nonce[:8] },
		"another hash":         func(_ *content.Part, e *content.External) { e.ContentHash = make([]byte, 32) },
		"another kind of hash": func(_ *content.Part, e *content.External) { e.HashAlg = 7 },
		"a smaller size":       func(_ *content.Part, e *content.External) { e.Size-- },
		"a larger size":        func(_ *content.Part, e *content.External) { e.Size++ },
		"a size beyond bounds": func(_ *content.Part, e *content.External) { e.Size = 1 << 60 },
		"a URL elsewhere":      func(_ *content.Part, e *content.External) { e.URL = "https://127.0.0.1/" },
		"a URL with a port": func(_ *content.Part, e *content.External) {
			e.URL = strings.Replace(e.URL, ".example/", ".example:443/", 1)
		},
		"a URL with a query":    func(_ *content.Part, e *content.External) { e.URL += "?x" },
		"a file":                func(_ *content.Part, e *content.External) { e.URL = "file:///etc/passwd" },
		"an unknown provider":   func(_ *content.Part, e *content.External) { e.URL = strings.Replace(e.URL, "beta", "mallory", 1) },
		"another peer's domain": func(_ *content.Part, e *content.External) { e.URL = strings.Replace(e.URL, "beta", "alpha", 1) },
	} {
		forged, e := part, *part.External
		forged.External = &e
		change(&forged, &e)
		path := filepath.Join(t.TempDir(), "forged")
		if err := carol.room(uri).Download(t.Context(), bob.User(), &forged, path); err == nil {
			t.Errorf("%s: downloaded", what)
		}
		if list, _ := os.ReadDir(filepath.Dir(path)); len(list) != 0 {
			t.Errorf("%s: left %v", what, list)
		}
	}
	if err := carol.room(uri).Download(t.Context(), bob.User(), &part, filepath.Join(t.TempDir(), "no", "directory")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("into a directory that isn't there: %v", err)
	}
}

func TestWhatTheNodeDoesNotTakeIsNotTriedAgain(t *testing.T) {
	p := providers(t, "alpha")
	p[0].stop()
	p[0].config.Limits.AssetMiB = 1
	p[0].start()
	alice := p[0].enrol("alice", "alice-laptop")
	if _, err := alice.Upload(t.Context(), bytes.NewReader(make([]byte, 1<<20)), content.Bytes, "large"); Code(err) != "tooLarge" {
		t.Errorf("an asset that is too large: %v", err)
	}
	if _, err := alice.Upload(t.Context(), bytes.NewReader(make([]byte, 1<<20-gcmOverhead)), content.Bytes, "fits"); err != nil {
		t.Error(err)
	}
	if _, err := alice.Upload(t.Context(), endless{}, content.Bytes, "endless"); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("a file without an end: %v", err)
	}
	p[0].stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := alice.Upload(ctx, strings.NewReader("x"), content.Bytes, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while the node is down: %v", err)
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

func TestNoTwoAssetsHaveTheSameKey(t *testing.T) {
	alice := providers(t, "alpha")[0].enrol("alice", "alice-laptop")
	seen := make(map[string]bool)
	for range 4 {
		p, err := alice.Upload(t.Context(), strings.NewReader("the same"), content.Bytes, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{"key " + string(p.External.Key), "hash " + string(p.External.ContentHash)} {
			if seen[s] {
				t.Errorf("%.4s twice", s)
			}
			seen[s] = true
		}
	}
}

func TestAssetsKeepToTheRoomsPolicy(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	small, err := bob.Upload(t.Context(), bytes.NewReader(make([]byte, 1000)), "image/png", "")
	if err != nil {
		t.Fatal(err)
	}
	large, err := bob.Upload(t.Context(), bytes.NewReader(make([]byte, 2000)), "image/png", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name           string
		policy         mimi.AssetPolicy
		sent, received bool
	}{
		{"by the gateway only", mimi.AssetPolicy{Default: mimi.DownloadOblivious, ForbiddenDownloads: []mimi.DownloadType{mimi.DownloadHubProxy}}, true, true},
		{"by the proxy only", mimi.AssetPolicy{Default: mimi.DownloadHubProxy, Allowed: []mimi.DownloadType{mimi.DownloadHubProxy}}, true, true},
		{"directly only", mimi.AssetPolicy{Allowed: []mimi.DownloadType{mimi.DownloadDirect}}, true, false},
		{"elsewhere", mimi.AssetPolicy{Location: mimi.AssetsLocal, Domains: []mimi.UploadDomains{{Provider: "beta.example", Hosts: []string{"cdn.example"}}}}, false, false},
		{"of another type", mimi.AssetPolicy{PermittedMedia: mls.MediaTypeList{{Type: "image/gif"}}}, false, false},
	} {
		room, err := alice.CreateRoomWith(t.Context(), x.name, func(hub mimi.URI) mimi.Rules {
			rules := mimi.CooperativeRoom(hub)
			x.policy.MaxAttachment = small.External.Size
			rules.Assets = &x.policy
			return rules
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := room.Add(t.Context(), bob.User()); err != nil {
			t.Fatal(err)
		}
		agree(t, room.URI(), alice, bob)
		r := bob.room(room.URI())
		var refused *mimi.PolicyError
		if _, err := r.SendContent(t.Context(), r.Compose(small)); (err == nil) != x.sent || err != nil && !errors.As(err, &refused) {
			t.Errorf("%s: sent: %v", x.name, err)
		}
		if _, err := r.SendContent(t.Context(), r.Compose(large)); !errors.As(err, &refused) {
			t.Errorf("%s: a larger one is sent: %v", x.name, err)
		}
		if _, err := room.fetch(t.Context(), bob.User(), &small); (err == nil) != x.received {
			t.Errorf("%s: received: %v", x.name, err)
		}
		if _, err := room.fetch(t.Context(), bob.User(), &large); !errors.As(err, &refused) {
			t.Errorf("%s: a larger one is received: %v", x.name, err)
		}
	}
}
