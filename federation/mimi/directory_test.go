package mimi

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestOwnDirectoryParses(t *testing.T) {
	doc, err := json.Marshal(NewDirectory("a.example"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := ParseDirectory("a.example", doc)
	if err != nil {
		t.Fatal(err)
	}
	if *d != *NewDirectory("a.example") {
		t.Errorf("got %+v", d)
	}
	if _, err := ParseDirectory("b.example", doc); err == nil {
		t.Error("the directory of one provider is taken for another's")
	}
}

func TestVariablesArePercentEncoded(t *testing.T) {
	for _, c := range []struct{ template, value, want string }{
		{"https://a.example/n/{roomId}", "mimi://a.example/r/x_y-z.1", "https://a.example/n/mimi%3A%2F%2Fa.example%2Fr%2Fx_y-z.1"},
		{"https://a.example/{domain}/q", "b.example", "https://a.example/b.example/q"},
		{"https://a.example/{x}", "a b%/é?#", "https://a.example/a%20b%25%2F%C3%A9%3F%23"},
	} {
		if got, err := Expand(c.template, c.value); err != nil || got != c.want {
			t.Errorf("%s: got %s, %v", c.template, got, err)
		}
	}
	if _, err := Expand("", "x"); !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("no template: %v", err)
	}
}

func TestDirectoriesThatLeadElsewhereAreRefused(t *testing.T) {
	for _, doc := range []string{
		``, `[]`, `{"update":1}`, `{} {}`,
		`{"update":"http://a.example/{roomId}"}`,
		`{"update":"https://b.example/{roomId}"}`,
		`{"update":"https://a.example.b.example/{roomId}"}`,
		`{"update":"https://a.example@b.example/{roomId}"}`,
		`{"update":"https://x@a.example/{roomId}"}`,
		`{"update":"https://{roomId}/a.example"}`,
		`{"update":"https://a.example{roomId}"}`,
		`{"update":"https://a.example/update"}`,
		`{"update":"https://a.example/{a}/{b}"}`,
		`{"update":"https://a.example/}{"}`,
		`{"update":"https://a.example/x?q={roomId}"}`,
		`{"update":"https://a.example/{roomId}#f"}`,
		`{"pad":"` + strings.Repeat("x", MaxDirectory) + `"}`,
	} {
		if d, err := ParseDirectory("a.example", []byte(doc)); err == nil {
			t.Errorf("%.80s: got %+v", doc, d)
		}
	}
	if _, err := ParseDirectory("a.example", []byte(`{"update":"https://a.example:8443/{roomId}","new":"x"}`)); err != nil {
		t.Errorf("a port and an unknown member: %v", err)
	}
}

func FuzzDirectory(f *testing.F) {
	f.Add([]byte(`{"update":"https://a.example/{roomId}"}`))
	f.Add([]byte(`{"notify":"https://a.example:1/x/{roomId}/y"}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		d, err := ParseDirectory("a.example", doc)
		if err != nil || d.Update == "" {
			return
		}
		u, err := Expand(d.Update, "mimi://a.example/r/x")
		if err != nil || !strings.HasPrefix(u, "https://a.example") || strings.ContainsAny(u, "{}") {
			t.Fatalf("%q expands to %q, %v", d.Update, u, err)
		}
	})
}
