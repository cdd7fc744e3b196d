package authority

import (
	"bytes"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serveAdmin serves s on a socket in a short path, for those of sockets are bounded.
func serveAdmin(t *testing.T, s Service) string {
	dir, err := os.MkdirTemp("", "parley")
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "admin.sock")
	l, err := net.Listen("unix", socket)
	ok(t, err)
	srv := &http.Server{Handler: AdminHandler(s)}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket
}

func TestServiceOverTheAdminSocket(t *testing.T) {
	f := newFixture(t, "alpha.example")
	c := DialAdmin(serveAdmin(t, f))
	ok(t, c.Ping(t.Context()))
	if c.Domain() != "alpha.example" {
		t.Errorf("domain %q", c.Domain())
	}
	d := newDevice(t, "alpha.example", "alice", "alice-laptop")
	inv, err := c.Invite(t.Context(), d.user, time.Hour)
	ok(t, err)
	if inv.User != d.user || inv.Token == "" || inv.Root != f.Root() {
		t.Errorf("invitation %+v", inv)
	}
	chain, err := c.Enrol(t.Context(), inv.Token, d.csr(t))
	ok(t, err)
	_, err = f.Verifier().VerifyKey(chain, d.suite, d.public(t), PurposeClient)
	ok(t, err)
	chain, err = c.Renew(t.Context(), chain, d.csr(t))
	ok(t, err)
	phone := newDevice(t, "alpha.example", "alice", "alice-phone")
	_, err = c.Issue(t.Context(), phone.csr(t))
	ok(t, err)
	node, err := c.IssueNode(t.Context(), d.key.Public())
	ok(t, err)
	_, err = f.Verifier().Verify(node, PurposeNode)
	ok(t, err)
	hub, err := c.IssueHub(t.Context(), d.key.Public())
	ok(t, err)
	_, err = f.Verifier().Verify(hub, PurposeHub)
	ok(t, err)
	revoked, err := c.Revoke(t.Context(), string(d.client), "lost")
	ok(t, err)
	list, err := c.List(t.Context(), Filter{User: d.user, Revoked: true})
	ok(t, err)
	if len(list) != 2 || revoked.Reason != "lost" {
		t.Errorf("revoked %+v, listed %d", revoked, len(list))
	}
	b, err := c.Bundle(t.Context())
	ok(t, err)
	own, err := f.Bundle(t.Context())
	ok(t, err)
	if !bytes.Equal(b.JSON(), own.JSON()) {
		t.Error("another bundle came over the socket")
	}

	_, err = c.Enrol(t.Context(), inv.Token, phone.csr(t))
	wantErr(t, err, ErrTokenUsed)
	_, err = c.Renew(t.Context(), chain, d.csr(t))
	wantErr(t, err, ErrRevoked)
	_, err = c.Revoke(t.Context(), "mimi://alpha.example/d/nobody", "")
	wantErr(t, err, ErrNotFound)
	_, err = c.Invite(t.Context(), "mimi://beta.example/u/alice", 0)
	wantErr(t, err, ErrForeignName)
	_, err = c.IssueHub(t.Context(), 7)
	wantErr(t, err, ErrKeyType)
}

func TestAdminSocketRefusesBadInput(t *testing.T) {
	f := newFixture(t, "alpha.example")
	socket := serveAdmin(t, f)
	c := DialAdmin(socket)
	for method, bodies := range map[string][]string{
		"invite":    {"", "{", "[]", `{"user":7}`, `{"unknown":1}`, `{} {}`, `{"user":"mimi://alpha.example/d/x"}`, `{"csr":"` + strings.Repeat("A", maxAdminRequest) + `"}`},
		"issueNode": {"{}", `{"key":"AAAA"}`},
		"enrol":     {`{"token":"x"}`},
	} {
		for _, body := range bodies {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://admin"+adminPath+method, strings.NewReader(body))
			ok(t, err)
			resp, err := c.http.Do(r)
			ok(t, err)
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnprocessableEntity {
				t.Errorf("%s %.40s: %s", method, body, resp.Status)
			}
		}
	}
	if _, err := DialAdmin(socket+"x").Invite(t.Context(), "mimi://alpha.example/u/a", 0); err == nil || Code(err) != "" {
		t.Errorf("nobody answers: %v", err)
	}
}

func TestEveryErrorKeepsItsCode(t *testing.T) {
	seen := make(map[string]bool)
	for _, c := range coded {
		if seen[c.code] {
			t.Errorf("code %s twice", c.code)
		}
		seen[c.code] = true
		back := ErrorOfCode(Code(c.err), "a text")
		if !errors.Is(back, c.err) || back.Error() != "a text" {
			t.Errorf("%v came back as %v", c.err, back)
		}
	}
	if Code(errors.New("else")) != "" || ErrorOfCode("", "x").Error() != "x" {
		t.Error("an error without code has one")
	}
}
