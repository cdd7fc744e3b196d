package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node/client"
)

func TestWrongCallsAreUsageErrors(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{
		{}, {"talk"}, {"new"}, {"send", "room"}, {"enrol", "x"}, {"-nope", "rooms"}, {"tail", "-n", "x"}, {"tail", "-n", "3"}, {"search", "beta.example", "bob"}, {"profile", "name=x", "some"}, {"profile", "name"}, {"consent", "bob"}, {"consent", "beg", "bob"}, {"tail", "a", "b"},
		{"new", "-rules", "none", "x"}, {"new", "x", "beta.example"}, {"add", "-role", "x", "room"}, {"role", "room", "bob"}, {"rename", "room"}, {"link", "-for", "x", "room"}, {"link", "-once"},
		{"reply", "room", "id"}, {"edit", "room", "id"}, {"delete", "room"}, {"react", "room", "id"}, {"report", "room"}, {"evidence", "a", "b"}, {"history"}, {"history", "room", "phone", "3", "x"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"-dir", dir}, args...), &out, &errs); code != 2 {
			t.Errorf("chat %q exits with %d, want 2", args, code)
		}
		if !strings.Contains(errs.String(), "COMMAND") || out.Len() > 0 {
			t.Errorf("chat %q prints %q and %q", args, out.String(), errs.String())
		}
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"help"}, &out, &errs); code != 0 || !strings.Contains(out.String(), "enrol INVITATION DEVICE") {
		t.Errorf("help exits with %d and prints %q", code, out.String())
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"rooms"}, "enrol INVITATION DEVICE"},
		{[]string{"enrol", "parley:nonsense", "laptop"}, "invitation"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"-dir", dir}, c.args...), &out, &errs); code != 1 {
			t.Errorf("chat %q exits with %d, want 1", c.args, code)
		}
		if !strings.Contains(errs.String(), c.want) {
			t.Errorf("chat %q says %q", c.args, errs.String())
		}
	}
}

// What a message contains must not steer the reader's terminal.
func TestControlCharactersAreNotPrinted(t *testing.T) {
	if got := printable("a\x1b[31m\nb\u202ec"); strings.ContainsAny(got, "\x1b\n\u202e") {
		t.Errorf("printed %q", got)
	}
	if got := errorText(errors.Join(errors.New("the hub's \x1b[2J words"), errors.New("more"))); got != "the hub's \uFFFD[2J words; more" {
		t.Errorf("printed %q", got)
	}
	var out bytes.Buffer
	s := session{out: &out}
	s.print(client.Message{User: "mimi://alpha.example/u/alice", Flag: "untrusted", Data: []byte("hello")}, false)
	s.show(client.HistoryOffered{Room: "mimi://alpha.example/r/lunch", Client: "mimi://alpha.example/d/al"}, "mimi://alpha.example/r/other")
	if !strings.Contains(out.String(), "alice@alpha.example (untrusted): hello") {
		t.Errorf("printed %q", out.String())
	}
	out.Reset()
	s.print(client.Message{User: "mimi://alpha.example/u/alice", Data: []byte("x"), FrankFault: "the \x1b[2J hub"}, false)
	s.printPost(client.Post{Message: client.Message{User: "mimi://alpha.example/u/alice", Data: []byte("\x1b[2J")},
		Reactions: []client.Message{{User: "mimi://alpha.example/u/bob", Data: []byte("\x1b[2J")}}})
	m := client.Message{User: "mimi://alpha.example/u/alice", Content: content.New("", "", content.Part{Cardinality: content.ExternalPart,
		ContentType: "a/\x1b", External: &content.External{Filename: "\x1b[2J"}})}
	s.print(m, false)
	m.Content.Body = content.Single(content.Render, "image/\x1b", []byte("\x1b"))
	s.print(m, false)
	if got := out.String(); strings.Contains(got, "\x1b") || strings.Count(got, "\uFFFD") != 6 {
		t.Errorf("printed %q", got)
	}
	if got := bots([]mimi.Bot{{Name: "poker"}, {Name: "\x1b[2J"}}); got != "  (bot: poker or \uFFFD[2J)" {
		t.Errorf("printed %q", got)
	}
	if got := printable("näh, 日本"); got != "näh, 日本" {
		t.Errorf("printed %q", got)
	}
}

// Whoever reads a room whose hub lies is told so, and where the proof is.
func TestFaultsOfAHubAreShown(t *testing.T) {
	var out bytes.Buffer
	s := session{out: &out}
	const room = "mimi://alpha.example/r/lunch"
	fault := client.HubFault{Room: room, Seq: 7, Client: "mimi://beta.example/d/bob-phone", Reason: "the hub has signed another log"}
	s.show(fault, "mimi://alpha.example/r/other") // in whatever room it is
	fault.Evidence = []byte("proof")
	s.show(fault, "")
	s.show(client.HubRestored{Room: room, Lost: true}, "")
	s.show(client.Gap{Room: room, After: 7, Next: 12}, "mimi://alpha.example/r/other")
	s.show(client.Gap{Room: room, After: 7, Next: 12}, room)
	for text, n := range map[string]int{
		"* WARNING: what you see of room lunch may not be what others see. The hub has signed another log, as a message of bob-phone shows. The room is hosted by alpha.example.\n": 2,
		"alpha.example has signed both. \"chat evidence\" lists the proof.\n":                                                                                                       1,
		"* this device was away from lunch for too long, and what was said in between isn't here: after entry 7, before 12\n":                                                       1,
		"alpha.example, which hosts lunch, was restored from an older copy, and some":                                                                                               1,
	} {
		if strings.Count(out.String(), text) != n {
			t.Errorf("printed %q, want %q", out.String(), text)
		}
	}
}
