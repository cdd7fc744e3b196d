package client

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
)

func TestPeopleAreFoundByTheirProfiles(t *testing.T) {
	p := providers(t, "alpha", "beta")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[1].enrol("bob", "bob-phone")
	profile := Profile{Fields: []Field{
		{Source: mimi.FieldOIDCStdClaim, Name: "given_name", Value: "Robert", Search: SearchPart, Shown: true},
		{Source: mimi.FieldVCard, Name: "EMAIL", Value: "bob@work.example", Search: SearchExact},
	}}
	if err := bob.SetProfile(t.Context(), profile); err != nil {
		t.Fatal(err)
	}
	if got, err := bob.Profile(t.Context()); err != nil || len(got.Fields) != 2 || got.Fields[0] != profile.Fields[0] || got.Fields[1] != profile.Fields[1] {
		t.Errorf("bob's profile is %+v, %v", got, err)
	}
	name := mimi.QueryElement{Type: mimi.SearchPartialName, Value: []byte("bert")}
	found, err := alice.Search(t.Context(), "beta.example", name, mimi.QueryElement{Type: mimi.SearchEmail, Value: []byte("bob@work.example")})
	if err != nil || len(found) != 1 || found[0].User != bob.User() || len(found[0].Fields) != 1 || string(found[0].Fields[0].Value) != "Robert" {
		t.Errorf("found %+v, %v", found, err)
	}
	if err := bob.SetProfile(t.Context(), Profile{Hidden: true}); err != nil {
		t.Fatal(err)
	}
	var refused *Refused
	if found, err := alice.Search(t.Context(), "beta.example", name); !errors.As(err, &refused) || refused.Code != "notFound" {
		t.Errorf("found %+v, %v", found, err)
	}
	if u, err := alice.Find(t.Context(), "bob@beta.example"); err == nil {
		t.Errorf("the hidden handle finds %s", u)
	}
}
