package authority

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func sampleInvitation() Invitation {
	return Invitation{Domain: "alpha.example", Address: "127.0.0.1:7441", Root: Fingerprint{1, 2, 3}, User: "mimi://alpha.example/u/alice",
		Token: "secret-token", Expires: time.Unix(1<<31, 0).UTC()}
}

func TestInvitationIsOneLine(t *testing.T) {
	i := sampleInvitation()
	s := i.String()
	if strings.ContainsAny(s, " \n\t'\"$&;|<>()*?!") || !strings.HasPrefix(s, "parley:") {
		t.Errorf("%q can't be pasted into a shell", s)
	}
	for _, text := range []string{s, "  " + s + "\n"} {
		got, err := ParseInvitation(text)
		ok(t, err)
		if got != i {
			t.Errorf("%+v came back", got)
		}
	}
	var got Invitation
	b, err := json.Marshal(i)
	ok(t, err)
	ok(t, json.Unmarshal(b, &got))
	if got != i {
		t.Errorf("%+v came back", got)
	}
}

func TestParseInvitationRefuses(t *testing.T) {
	s := sampleInvitation().String()
	foreign := sampleInvitation()
	foreign.User = "mimi://beta.example/u/alice"
	client := sampleInvitation()
	client.User = "mimi://alpha.example/d/alice"
	escape := sampleInvitation()
	escape.Address = "\x1b[2Jnode:7441"
	for _, bad := range []string{escape.String(), "", "parley:", "parley:AA", s[1:], s[:len(s)-1], s + "A", s[:20] + "x" + s[21:], strings.Repeat("x", 1<<20), s + s, client.String()} {
		_, err := ParseInvitation(bad)
		wantErr(t, err, ErrRequest)
		if err != nil && len(bad) > 30 && strings.Contains(err.Error(), bad[10:30]) {
			t.Errorf("the error shows the invitation: %v", err)
		}
	}
	_, err := ParseInvitation(foreign.String())
	wantErr(t, err, ErrForeignName)
}

func TestLogsDoNotShowTheToken(t *testing.T) {
	var out bytes.Buffer
	i := sampleInvitation()
	slog.New(slog.NewJSONHandler(&out, nil)).Info("invited", "invitation", i)
	slog.New(slog.NewTextHandler(&out, nil)).Info("invited", "invitation", i)
	if strings.Contains(out.String(), i.Token) || strings.Contains(out.String(), i.String()) || !strings.Contains(out.String(), "alice") {
		t.Errorf("logged %s", out.String())
	}
}

func FuzzParseInvitation(f *testing.F) {
	f.Add(sampleInvitation().String())
	f.Add("parley:AQ")
	f.Fuzz(func(t *testing.T, s string) {
		i, err := ParseInvitation(s)
		if err != nil {
			return
		}
		if again := i.String(); again != strings.TrimSpace(s) {
			t.Errorf("%q came back as %q", s, again)
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	d := newDevice(f, "alpha.example", "alice", "alice-laptop")
	f.Add(d.csr(f))
	f.Add(csrOf(f, d.key, uriName("mimi://alpha.example/u/alice"), dnsName("alpha.example")))
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, s, err := parseRequest("alpha.example", der)
		if err != nil {
			return
		}
		if s.user.Domain() != "alpha.example" || s.user.Kind() != 'u' || s.client.Kind() != 'd' || csr.CheckSignature() != nil {
			t.Errorf("%+v was let through", s)
		}
	})
}

func FuzzChain(f *testing.F) {
	alpha := hierarchyOf(f, "alpha.example")
	v := verifierOf(bundleOf(f, "alpha.example", 1, alpha))
	chain := newForge(f, alpha).chain()
	f.Add(chain[0], chain[1])
	f.Add(chain[1], alpha.root.Raw)
	f.Fuzz(func(t *testing.T, leaf, issuer []byte) {
		given := [][]byte{leaf, issuer}
		id, err := ParseIdentity(given)
		verified, e := v.Verify(given, PurposeClient)
		if e != nil && Code(e) == "" {
			t.Errorf("%v has no code", e)
		}
		if e != nil {
			return
		}
		if err != nil || fmt.Sprint(id.User, id.Client) != fmt.Sprint(verified.User, verified.Client) || id.Domain != "alpha.example" {
			t.Errorf("verified %+v, parsed %+v: %v", verified, id, err)
		}
	})
}
