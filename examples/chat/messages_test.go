package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/parley-mls/parley/examples/internal/org"
	"github.com/parley-mls/parley/node"
)

func TestMain(m *testing.M) {
	if code, ok := org.Served(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// The commands against a node of its own process: messages are answered, edited, deleted, reacted to and reported, and rooms
// are run by their rules.
func TestMessagesAreAnsweredEditedAndReported(t *testing.T) {
	dir, err := os.MkdirTemp("", "chat") // unix socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o := &org.Org{Domain: "alpha.example", Dir: filepath.Join(dir, "alpha")}
	if err := o.Init(""); err != nil {
		t.Fatal(err)
	}
	if err := o.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Terminate)
	chat := func(who string, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"-dir", filepath.Join(dir, who)}, args...), &out, &errs); code != 0 {
			t.Fatalf("%s: chat %q: %s", who, args, errs.String())
		}
		return strings.TrimSpace(out.String())
	}
	for _, who := range []string{"alice", "bob"} {
		inv, err := o.Invite(t.Context(), who)
		if err != nil {
			t.Fatal(err)
		}
		chat(who, "enrol", inv.String(), who+"-laptop")
	}
	room := chat("alice", "new", "lunch")
	chat("alice", "add", room, "bob@alpha.example")
	id := func(who, n, text string) string {
		t.Helper()
		list := chat(who, "tail", "-n", n, room)
		m := regexp.MustCompile(`#([0-9a-f]{8}) [^\n#]*(#[0-9a-f]{8})?: ` + regexp.QuoteMeta(text)).FindStringSubmatch(list)
		if m == nil {
			t.Fatalf("%s sees no %q in\n%s", who, text, list)
		}
		return m[1]
	}
	chat("alice", "send", room, "nooon?")
	chat("bob", "tail", "-n", "1", room)
	noon := id("bob", "1", "nooon?")
	chat("bob", "reply", room, noon, "yes,", "gladly")
	chat("bob", "react", room, "#"+noon, "\u2764")
	chat("alice", "tail", "-n", "2", room)
	chat("alice", "edit", room, noon, "noon?")
	chat("bob", "send", room, "never mind")
	chat("bob", "delete", room, id("bob", "3", "never mind"))
	for _, who := range []string{"alice", "bob"} {
		list := chat(who, "tail", "-n", "3", room)
		for _, want := range []string{
			`alice@alpha\.example: noon\? \(edited\) \[\x{2764} bob@alpha\.example\]`,
			`bob@alpha\.example replies to #` + noon + `: yes, gladly`,
			`bob@alpha\.example: \(deleted\)`,
		} {
			if !regexp.MustCompile(want).MatchString(list) {
				t.Errorf("%s doesn't see %s in\n%s", who, want, list)
			}
		}
	}
	menu := filepath.Join(dir, "menu.txt")
	if err := os.WriteFile(menu, []byte("soup"), 0o644); err != nil {
		t.Fatal(err)
	}
	chat("bob", "attach", room, menu, "the", "menu")
	saved := filepath.Join(dir, "saved.txt")
	chat("alice", "tail", "-n", "1", room)
	chat("alice", "save", room, id("alice", "1", "the menu [text/plain; charset=utf-8 menu.txt, 20 bytes]"), saved)
	if b, err := os.ReadFile(saved); err != nil || string(b) != "soup" {
		t.Errorf("saved %q, %v", b, err)
	}
	chat("alice", "report", room, id("alice", "4", "yes, gladly"), "too", "glad")
	list, err := node.DialAdmin(o.Socket()).Reports(t.Context())
	if err != nil || len(list) != 1 || list[0].Note != "too glad" || list[0].Messages[0].Text != "yes, gladly" {
		t.Errorf("the operator has %+v, %v", list, err)
	}
	inv, err := o.Invite(t.Context(), "alice")
	if err != nil {
		t.Fatal(err)
	}
	chat("phone", "enrol", inv.String(), "alice-phone")
	chat("phone", "join", room)
	if got := chat("alice", "history", room, "alice-phone", "7"); !strings.Contains(got, "messages for alice-phone") {
		t.Error(got)
	}
	if got := chat("phone", "history", room); !strings.Contains(got, "given by alice-laptop") {
		t.Error(got)
	}
	if list := chat("phone", "tail", "-n", "4", room); !strings.Contains(list, "alice@alpha.example (says alice-laptop): noon? (edited)") {
		t.Errorf("the phone sees\n%s", list)
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"-dir", filepath.Join(dir, "bob"), "edit", room, noon, "midnight"}, &out, &errs); code != 1 || !strings.Contains(errs.String(), "a message of mimi://alpha.example/u/alice") {
		t.Errorf("an edit of another's message: exit %d, %s", code, errs.String())
	}
	if code := run(t.Context(), []string{"-dir", filepath.Join(dir, "bob"), "react", room, "ffffffffffff", "x"}, &out, &errs); code != 1 {
		t.Errorf("a message that isn't there: exit %d", code)
	}

	// A room with rules: people come by links, and are what admins make them.
	club := chat("alice", "new", "-rules", "strict", "club")
	link := chat("alice", "link", "-once", "-for", "1h", club)
	if list := chat("alice", "links", club); !strings.Contains(list, "  ordinary_user, once, until ") {
		t.Errorf("the links are %q", list)
	}
	chat("bob", "join", link)
	if list := chat("alice", "links", club); list != "" {
		t.Errorf("a link that was used is listed: %q", list)
	}
	for _, args := range [][]string{{"rename", club, "mine"}, {"link", club}} {
		if code := run(t.Context(), append([]string{"-dir", filepath.Join(dir, "bob")}, args...), &out, &errs); code != 1 {
			t.Errorf("an ordinary user does %v: exit %d", args, code)
		}
	}
	chat("alice", "role", club, "bob@alpha.example", "group_admin")
	chat("bob", "rename", club, "the", "club")
	chat("bob", "topic", club, "soup")
	chat("bob", "unlink", club, strings.Fields(chat("bob", "link", club) + " " + chat("bob", "links", club))[1])
	for command, want := range map[string]string{
		"members": "mimi://alpha.example/u/bob  group_admin", "rooms": "  the club: soup  (2 people)", "rules": "\ngroup_admin (3): canAddOwnClient",
	} {
		args := []string{command, club}
		if command == "rooms" {
			args = args[:1]
		}
		if list := chat("alice", args...); !strings.Contains(list, want) {
			t.Errorf("%s prints %q", command, list)
		}
	}
}
