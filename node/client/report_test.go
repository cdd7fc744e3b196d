package client

import (
	"testing"

	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node"
)

func TestReportsReachTheHubOfTheRoom(t *testing.T) {
	p := providers(t, "alpha", "beta", "gamma")
	alice, bob, carol := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone"), p[2].enrol("carol", "carol-pc")
	room := alice.create(bob.User(), carol.User())
	uri := room.URI()
	agree(t, uri, alice, bob, carol)
	bob.say(uri, "an insult")
	bob.say(uri, "another")
	alice.say(uri, "please")
	insult, another, please := carol.last(uri, 1), carol.last(uri, 2), carol.last(uri, 3)
	r := carol.room(uri)
	refused := func(what, code string, rep Report) {
		t.Helper()
		if err := r.Report(t.Context(), bob.User(), rep); err == nil || Code(err) != code {
			t.Errorf("%s: %v (%q), want %q", what, err, Code(err), code)
		}
	}
	refused("a message of somebody else", "", Report{Messages: []Message{insult, please}})
	unfranked := insult
	unfranked.Frank, unfranked.FrankFault = nil, "the hub gave no frank"
	refused("a message without a frank", "", Report{Messages: []Message{unfranked}})
	refused("many messages", "", Report{Messages: make([]Message, 65)})
	swapped := insult
	swapped.application = another.application
	refused("a message with the content of another", "notAllowed", Report{Messages: []Message{another, swapped}})
	later := insult
	later.Time = later.Time.Add(1e6)
	refused("a message of another time", "notAllowed", Report{Messages: []Message{later}})

	if err := r.Report(t.Context(), bob.User(), Report{Reason: 1, Note: "rude", Messages: []Message{insult, another}}); err != nil {
		t.Fatal(err)
	}
	if err := room.Remove(t.Context(), carol.User()); err != nil { // after being thrown out too
		t.Fatal(err)
	}
	if err := r.Report(t.Context(), bob.User(), Report{Anonymous: true, Messages: []Message{another}}); err != nil {
		t.Fatal(err)
	}
	list, err := node.DialAdmin(p[0].config.Socket()).Reports(t.Context())
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	first, second := list[0], list[1]
	if first.Reporter != carol.User() || first.From != "gamma.example" || first.Abuser != bob.User() || first.Room != uri || first.Note != "rude" ||
		len(first.Messages) != 2 || first.Messages[0].Text != "an insult" || first.Messages[0].ID != insult.ID.String() || !first.Messages[1].Time.Equal(another.Time) {
		t.Errorf("the hub has %+v", first)
	}
	if second.Reporter != "" || second.From != "gamma.example" || len(second.Messages) != 1 {
		t.Errorf("the hub has %+v", second)
	}
	if c, err := content.Parse(first.Messages[1].Content); err != nil || string(c.Body.Content) != "another" {
		t.Errorf("the operator reads %+v, %v", c, err)
	}
	for _, q := range p[1:] {
		if list, err := node.DialAdmin(q.config.Socket()).Reports(t.Context()); err != nil || len(list) != 0 {
			t.Errorf("%s has %+v, %v", q.domain, list, err)
		}
	}
}
