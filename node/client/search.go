package client

import (
	"context"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// Search says how others find a user by a field of the user's profile.
type Search uint32

// The ways to be found.
const (
	SearchNot   Search = 0 // not by this field
	SearchExact Search = 1 // by those who know the value
	SearchPart  Search = 2 // by a part of the value
)

// Field is a field of a profile, in the vocabulary of OpenID Connect, such as given_name, or of vCard, such as ORG.
type Field struct {
	Source mimi.FieldSource
	Name   string
	Value  string // not verified by anybody
	Search Search
	Shown  bool // to who finds the user
}

// Profile is what a user is found by, beside the handle, and what is shown then.
type Profile struct {
	Fields []Field
	Hidden bool // the handle doesn't find the user
}

// SetProfile replaces the profile of this client's user. Without one the user is found by the exact handle only.
func (c *Client) SetProfile(ctx context.Context, p Profile) error {
	req := &api.Profile{Hidden: p.Hidden}
	for _, f := range p.Fields {
		req.Fields = append(req.Fields, &api.ProfileField{Source: uint32(f.Source), Name: f.Name, Value: f.Value, Search: uint32(f.Search), Shown: f.Shown})
	}
	if _, err := call(ctx, c.session, c.session.service.SetProfile, req); err != nil {
		return fmt.Errorf("client: set the profile: %w", err)
	}
	return nil
}

// Profile returns the profile of this client's user.
func (c *Client) Profile(ctx context.Context) (Profile, error) {
	res, err := call(ctx, c.session, c.session.service.GetProfile, &api.GetProfileRequest{})
	if err != nil {
		return Profile{}, fmt.Errorf("client: ask for the profile: %w", err)
	}
	p := Profile{Hidden: res.Hidden}
	for _, f := range res.Fields {
		p.Fields = append(p.Fields, Field{mimi.FieldSource(f.Source), f.Name, f.Value, Search(f.Search), f.Shown})
	}
	return p, nil
}

// Search asks a provider for its users that match all elements (draft-ietf-mimi-protocol-06, Section 5.8), and for what
// they show of themselves. It fails with a *Refused of code notFound, ambiguous, forbidden or unsupportedField if the
// provider names nobody.
func (c *Client) Search(ctx context.Context, domain string, elements ...mimi.QueryElement) ([]mimi.UserProfile, error) {
	res, err := call(ctx, c.session, c.session.service.Query, &api.QueryRequest{
		Domain: domain, Body: codec.Marshal(&mimi.IdentifierRequest{Elements: elements}),
	})
	if err != nil {
		return nil, fmt.Errorf("client: search at %s: %w", domain, err)
	}
	var answer mimi.IdentifierResponse
	if err := codec.Unmarshal(res.Body, &answer); err != nil {
		return nil, fmt.Errorf("client: search at %s: the answer: %w", domain, err)
	}
	if answer.Code != mimi.IdentifierSuccess || len(answer.URIs) == 0 {
		return nil, fmt.Errorf("client: search at %s: %w", domain, &Refused{Code: answer.Code.String()})
	}
	var found []mimi.UserProfile
	for _, u := range answer.URIs {
		if u.Domain() != domain {
			return nil, fmt.Errorf("client: search at %s: it answers with %s", domain, u)
		}
		p := mimi.UserProfile{User: u}
		if i := slices.IndexFunc(answer.Profiles, func(p mimi.UserProfile) bool { return p.User == u }); i >= 0 {
			p = answer.Profiles[i]
		}
		found = append(found, p)
	}
	return found, nil
}
