package mimi

import (
	"errors"
	"strings"
	"testing"
)

func TestURIPartsAreThoseOfTheString(t *testing.T) {
	for _, c := range []struct {
		s, domain, id string
		kind          byte
		group, room   URI
	}{
		{"mimi://a.example", "a.example", "", 0, "", ""},
		{"mimi://a.example/u/alice", "a.example", "alice", 'u', "", ""},
		{"mimi://a.example/d/client-a.1_x", "a.example", "client-a.1_x", 'd', "", ""},
		{"mimi://a.example/r/clubhouse", "a.example", "clubhouse", 'r', "mimi://a.example/g/clubhouse", ""},
		{"mimi://a.example/g/clubhouse", "a.example", "clubhouse", 'g', "", "mimi://a.example/r/clubhouse"},
		{"mimi://a.example/g/clubhouse.12", "a.example", "clubhouse.12", 'g', "", "mimi://a.example/r/clubhouse"},
		{"mimi://a.example/g/v1.beta", "a.example", "v1.beta", 'g', "", "mimi://a.example/r/v1.beta"},
		{"mimi://xn--bcher-kva.example/r/7.x", "xn--bcher-kva.example", "7.x", 'r', "mimi://xn--bcher-kva.example/g/7.x", ""},
		{"mimi://a.example/g/" + strings.Repeat("x", 64) + ".999999999", "a.example", strings.Repeat("x", 64) + ".999999999", 'g', "", URI("mimi://a.example/r/" + strings.Repeat("x", 64))},
	} {
		u, err := ParseURI(c.s)
		if err != nil {
			t.Errorf("%s: %v", c.s, err)
			continue
		}
		if string(u) != c.s || u.Domain() != c.domain || u.Kind() != c.kind || u.ID() != c.id || u.Provider() != URI("mimi://"+c.domain) {
			t.Errorf("%s: domain %q kind %q id %q", c.s, u.Domain(), u.Kind(), u.ID())
		}
		if u.Group() != c.group || u.Room() != c.room {
			t.Errorf("%s: group %q room %q", c.s, u.Group(), u.Room())
		}
	}
}

func TestURIsOfAnotherSpellingAreRefused(t *testing.T) {
	for _, s := range []string{
		"", "mimi:", "mimi://", "mimi:///u/alice", "MIMI://a.example", "https://a.example", "mimi://a.example/",
		"mimi://A.example/u/alice", "mimi://a.example./u/alice", "mimi://.a.example", "mimi://a..example",
		"mimi://a.example:443/u/alice", "mimi://x@a.example/u/alice", "mimi://127.0.0.1/u/alice", "mimi://[::1]/u/alice",
		"mimi://-a.example", "mimi://a-.example", "mimi://ab--c.example", "mimi://bücher.example",
		"mimi://xn--.example", "mimi://a_b.example", "mimi://" + strings.Repeat("a", 64) + ".example",
		"mimi://" + strings.Repeat("a.", 127) + "example",
		"mimi://a.example/u", "mimi://a.example/u/", "mimi://a.example/x/alice", "mimi://a.example//alice",
		"mimi://a.example/u/Alice", "mimi://a.example/u/.alice", "mimi://a.example/u/-a", "mimi://a.example/u/a/b",
		"mimi://a.example/u/a%62", "mimi://a.example/u/a?b", "mimi://a.example/u/a#b", "mimi://a.example/u/a b",
		"mimi://a.example/u/alice\x00", "mimi://a.example/u/é", "mimi://a.example/u/" + strings.Repeat("a", 65),
		"mimi://a.example/r/clubhouse.12", "mimi://a.example/r/1.1", "mimi://a.example/g/.1",
		"mimi://a.example/g/" + strings.Repeat("x", 65) + ".1", " mimi://a.example", "mimi://a.example\n",
	} {
		if u, err := ParseURI(s); err == nil || u != "" || !errors.Is(err, ErrURI) {
			t.Errorf("%q: got %q, %v", s, u, err)
		}
	}
}

func TestRestartedGroupsBelongToTheRoom(t *testing.T) {
	room, err := RoomURI("a.example", "clubhouse")
	if err != nil {
		t.Fatal(err)
	}
	if g := room.Restart(3); g != "mimi://a.example/g/clubhouse.3" || g.Room() != room {
		t.Errorf("third restart is %q of %q", g, g.Room())
	}
	if room.Restart(0) != "" || room.Restart(1_000_000_000) != "" || room.Group().Restart(1) != "" {
		t.Error("a restart that has no name got one")
	}
	if _, err := GroupURI("a.example", "x.1"); err == nil {
		t.Error("a first group was given the name of a restarted one")
	}
}

func FuzzURI(f *testing.F) {
	for _, s := range []string{"mimi://a.example", "mimi://a.example/u/alice", "mimi://a.example/g/r.12", "mimi://a-b.c/r/x.y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		if string(u) != s || len(s) > MaxURI {
			t.Fatalf("%q became %q", s, u)
		}
		again := "mimi://" + u.Domain()
		if u.Kind() != 0 {
			again += "/" + string(u.Kind()) + "/" + u.ID()
		}
		if again != s {
			t.Fatalf("parts of %q give %q", s, again)
		}
		if g := u.Group(); g != "" {
			if p, err := ParseURI(string(g)); err != nil || p.Room() != u {
				t.Fatalf("group %q of room %q: %v, room %q", g, u, err, p.Room())
			}
		}
	})
}
