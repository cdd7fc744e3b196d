package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

var searchTypes = map[string]mimi.SearchIdentifierType{
	"handle": mimi.SearchHandle, "nick": mimi.SearchNick, "email": mimi.SearchEmail, "phone": mimi.SearchPhone,
	"name": mimi.SearchPartialName, "any": mimi.SearchWholeProfile,
}

// source says of which vocabulary a name is: the properties of vCard are written in capitals here.
func source(name string) mimi.FieldSource {
	if name == strings.ToUpper(name) {
		return mimi.FieldVCard
	}
	return mimi.FieldOIDCStdClaim
}

func search(ctx context.Context, s *session, args []string) error {
	var elements []mimi.QueryElement
	for _, a := range args[1:] {
		name, value, ok := strings.Cut(a, "=")
		if !ok {
			return errUsage
		}
		e := mimi.QueryElement{Type: searchTypes[name], Value: []byte(value)}
		if e.Type == 0 {
			e.Type, e.Name = mimi.SearchIdentifierType(source(name)), name
		}
		elements = append(elements, e)
	}
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		found, err := c.Search(ctx, args[0], elements...)
		if err != nil {
			return err
		}
		for _, p := range found {
			fmt.Fprintf(s.out, "%s@%s\n", p.User.ID(), p.User.Domain())
			for _, f := range p.Fields {
				fmt.Fprintf(s.out, "  %s: %s\n", printable(f.Name), printable(string(f.Value)))
			}
		}
		return nil
	})
}

var modes = []string{"none", "exact", "part"} // by client.Search

func profile(ctx context.Context, s *session, args []string) error {
	if len(args) == 0 {
		return s.live(ctx, func(ctx context.Context, c *client.Client) error {
			p, err := c.Profile(ctx)
			if err != nil {
				return err
			}
			for _, f := range p.Fields {
				shown := ""
				if f.Shown {
					shown = "+"
				}
				fmt.Fprintf(s.out, "%s=%s %s%s\n", printable(f.Name), printable(f.Value), modes[min(int(f.Search), len(modes)-1)], shown)
			}
			return nil
		})
	}
	name, value, ok := strings.Cut(args[0], "=")
	f := client.Field{Source: source(name), Name: name, Value: value}
	if value != "" {
		if len(args) != 2 {
			return errUsage
		}
		mode, shown := strings.CutSuffix(args[1], "+")
		i := slices.Index(modes, mode)
		if i < 0 {
			return errUsage
		}
		f.Search, f.Shown = client.Search(i), shown
	}
	if !ok {
		return errUsage
	}
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		p, err := c.Profile(ctx)
		if err != nil {
			return err
		}
		p.Fields = slices.DeleteFunc(p.Fields, func(old client.Field) bool { return old.Source == f.Source && old.Name == f.Name })
		if f.Value != "" {
			p.Fields = append(p.Fields, f)
		}
		return c.SetProfile(ctx, p)
	})
}

func consent(ctx context.Context, s *session, args []string) error {
	if len(args) == 1 || len(args) > 1 && !slices.Contains([]string{"ask", "cancel", "grant", "deny"}, args[0]) {
		return errUsage
	}
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		if len(args) == 0 {
			list, err := c.Consents(ctx)
			for _, v := range list {
				s.consent(v)
			}
			return err
		}
		user, err := person(ctx, c, args[1])
		if err != nil {
			return err
		}
		var room mimi.URI
		if len(args) > 2 {
			if room, err = mimi.ParseURI(args[2]); err != nil {
				r, err := find(ctx, c, args[2])
				if err != nil {
					return err
				}
				room = r.URI()
			}
		}
		switch args[0] {
		case "ask":
			return c.RequestConsent(ctx, user, room)
		case "cancel":
			return c.CancelConsent(ctx, user, room)
		case "grant":
			return c.GrantConsent(ctx, user, room, false)
		}
		return c.RevokeConsent(ctx, user, room)
	})
}

// consent prints what is known of a consent.
func (s *session) consent(c client.Consent) {
	state := "nothing is open"
	switch {
	case c.Open():
		state = "asked " + c.Asked.Local().Format("2006-01-02 15:04")
	case c.Decision == mimi.ConsentGrant:
		state = "granted"
	case c.Decision == mimi.ConsentRevoke:
		state = "denied"
	}
	room := "any room"
	if c.Room != "" {
		room = string(c.Room)
	}
	fmt.Fprintf(s.out, "* %s may add %s to %s: %s\n", c.Requester, c.Target, room, state)
}
