package federation

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestAssetURLsHaveOneForm(t *testing.T) {
	hash := [32]byte{0xab, 31: 0x0c}
	good := AssetURL("beta.example", hash)
	if domain, got, err := ParseAssetURL(good); err != nil || domain != "beta.example" || got != hash {
		t.Errorf("%s: %s, %x, %v", good, domain, got, err)
	}
	name := good[strings.LastIndexByte(good, '/')+1:]
	for _, bad := range []string{
		"", "https://", "http" + strings.TrimPrefix(good, "https"), good + "?x=1", good + "#x", good + "/", good + "00", good[:len(good)-1],
		"https://beta.example:443" + AssetPath + name, "https://user@beta.example" + AssetPath + name, "https://BETA.example" + AssetPath + name,
		"https://127.0.0.1:8080" + AssetPath + name, "https://[::1]" + AssetPath + name, "https://beta.example/x" + AssetPath + name,
		"https://beta.example" + AssetPath + "../../etc/passwd", "https://beta.example" + AssetPath + "%2e%2e/" + name,
		"https://beta.example" + AssetPath + strings.ToUpper(name), "https://beta.example" + BundlePath, "https:///" + AssetPath + name,
		"https://beta.example" + AssetPath + AssetPath + name, "https://beta.example\r\nHost: x" + AssetPath + name, "file://beta.example" + AssetPath + name,
	} {
		if domain, _, err := ParseAssetURL(bad); err == nil {
			t.Errorf("%q is an asset of %s", bad, domain)
		}
	}
}

func TestAssetsAreStreamedWithTheirLength(t *testing.T) {
	h, p, o := newTestHandler()
	c := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) { return inProcess{h, "beta.example"}, nil })
	for _, x := range []struct {
		name string
		open func() (*Asset, error)
		want string
		ends error
	}{
		{"through the hub", func() (*Asset, error) {
			return c.ProxyDownload(t.Context(), "alpha.example", "https://gamma.example/x", 5)
		}, "bytes", nil},
		{"from its provider", func() (*Asset, error) { return c.Asset(t.Context(), "alpha.example", [32]byte{5}, Part{}, 5) }, "bytes", nil},
		{"more than was announced", func() (*Asset, error) { return c.Asset(t.Context(), "alpha.example", [32]byte{2}, Part{}, 5) }, "by", nil},
		{"less than was announced", func() (*Asset, error) { return c.Asset(t.Context(), "alpha.example", [32]byte{9}, Part{}, 9) }, "bytes", io.ErrUnexpectedEOF},
	} {
		a, err := x.open()
		if err != nil {
			t.Errorf("%s: %v", x.name, err)
			continue
		}
		b, err := io.ReadAll(a)
		if string(b) != x.want || !errors.Is(err, x.ends) {
			t.Errorf("%s: %q, %v", x.name, b, err)
		}
		a.Close()
	}
	if a, err := c.Asset(t.Context(), "alpha.example", [32]byte{6}, Part{}, 5); err == nil {
		t.Errorf("%d bytes of at most 5", a.Size)
	}
	if want := "proxyDownload beta.example https://gamma.example/x"; p.calls[0] != want {
		t.Errorf("the hub was asked %q, want %q", p.calls[0], want)
	}
	if want := "directory: proxyDownload: asset: asset: asset: asset:"; strings.Join(o.list, " ") != want {
		t.Errorf("observed %q, want %q", o.list, want)
	}
}

func TestPartsOfAssetsAreThoseThatWereAskedFor(t *testing.T) {
	h, p, _ := newTestHandler()
	var answer func(*http.Response)
	c := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) {
		return changed{inProcess{h, "beta.example"}, &answer}, nil
	})
	part := Part{Offset: 7, Length: 10}
	fetch := func() (*Asset, error) { return c.Asset(t.Context(), "alpha.example", [32]byte{9}, part, 100) }
	a, err := fetch()
	if err != nil || a.Size != 5 || a.Whole != 12 {
		t.Fatalf("%+v, %v", a, err)
	}
	if b, err := io.ReadAll(a); string(b) != "bytes" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	for name, f := range map[string]func(*http.Response){
		"all of it":    func(r *http.Response) { r.StatusCode = 200 },
		"no range":     func(r *http.Response) { r.Header.Del("Content-Range") },
		"another part": func(r *http.Response) { r.Header.Set("Content-Range", "bytes 0-4/12") },
		"less of it":   func(r *http.Response) { r.Header.Set("Content-Range", "bytes 7-11/13") },
		"more of it":   func(r *http.Response) { r.ContentLength = 6 },
		"no end":       func(r *http.Response) { r.Header.Set("Content-Range", "bytes 7-11/*") },
		"trailing":     func(r *http.Response) { r.Header.Set("Content-Range", "bytes 7-11/12 ") },
	} {
		answer = f
		if a, err := fetch(); err == nil {
			t.Errorf("%s: %+v", name, a)
		}
	}
	for _, s := range []string{"", "bytes=", "bytes=1", "bytes=-5", "bytes=5-", "bytes=5-4", "bytes=0-1,3-4", "bytes=00-1", "bytes=0-9223372036854775807", "items=0-1", " bytes=0-1"} {
		if p := ParsePart(s); p != (Part{}) {
			t.Errorf("%q is %+v", s, p)
		}
	}
	if p := ParsePart(part.String()); p != part {
		t.Errorf("%s is %+v", part, p)
	}
	if len(p.calls) != 8 {
		t.Errorf("%d requests", len(p.calls))
	}
}

// changed has the answers changed that come.
type changed struct {
	http.RoundTripper
	answer *func(*http.Response)
}

func (c changed) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.RoundTripper.RoundTrip(r)
	if err == nil && *c.answer != nil {
		(*c.answer)(resp)
	}
	return resp, err
}

// stalled never answers a read until it is closed.
type stalled struct{ ctx context.Context }

func (s stalled) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

func (s stalled) Close() error { return nil }

func (s stalled) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, ContentLength: 5, Body: stalled{r.Context()}}, nil
}

func TestDownloadThatDoesntGetOnEnds(t *testing.T) {
	c := NewClient("beta.example", func(context.Context, string) (http.RoundTripper, error) { return stalled{}, nil })
	a, err := c.Asset(t.Context(), "alpha.example", [32]byte{5}, Part{}, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	a.ReadCloser.(*download).idle.Reset(time.Millisecond)
	if _, err := a.Read(make([]byte, 5)); !Unavailable(err) {
		t.Errorf("read: %v", err)
	}
}
