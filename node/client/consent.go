package client

import (
	"context"
	"fmt"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// Consent is what is known of one user's consent to being added by another one (draft-ietf-mimi-protocol-06, Section 8).
type Consent struct {
	Requester, Target mimi.URI // the own user is one of them
	Room              mimi.URI // empty: any room
	Asked             time.Time
	// Decision is mimi.ConsentGrant or mimi.ConsentRevoke; 0 if none is known. A target's denial of a request isn't told.
	Decision mimi.ConsentOperation
	Decided  time.Time
}

// Open says whether a request waits for the target's decision.
func (c Consent) Open() bool { return !c.Asked.IsZero() }

// RequestConsent asks a user for consent to be added to a room by this client's user, or to any room if room is empty.
// The answer, if the user gives one, comes as a ConsentChanged.
func (c *Client) RequestConsent(ctx context.Context, target, room mimi.URI) error {
	return c.updateConsent(ctx, mimi.ConsentRequest, mimi.ConsentScope{Requester: c.User(), Target: target, Room: room}, false)
}

// CancelConsent takes a request of the same target and room back.
func (c *Client) CancelConsent(ctx context.Context, target, room mimi.URI) error {
	return c.updateConsent(ctx, mimi.ConsentCancel, mimi.ConsentScope{Requester: c.User(), Target: target, Room: room}, false)
}

// GrantConsent allows a user to add this client's user, with all devices, to a room, or to any room if room is empty.
// With keyPackages, one of each device goes along, for a room that the requester's provider hosts: the requester can add
// them without asking this provider.
func (c *Client) GrantConsent(ctx context.Context, requester, room mimi.URI, keyPackages bool) error {
	return c.updateConsent(ctx, mimi.ConsentGrant, mimi.ConsentScope{Requester: requester, Target: c.User(), Room: room}, keyPackages)
}

// RevokeConsent takes a grant back, or denies a request or what may come: the user gets no KeyPackages for that room, or
// for any if room is empty.
func (c *Client) RevokeConsent(ctx context.Context, requester, room mimi.URI) error {
	return c.updateConsent(ctx, mimi.ConsentRevoke, mimi.ConsentScope{Requester: requester, Target: c.User(), Room: room}, false)
}

func (c *Client) updateConsent(ctx context.Context, op mimi.ConsentOperation, s mimi.ConsentScope, keyPackages bool) error {
	_, err := call(ctx, c.session, c.session.service.UpdateConsent, &api.UpdateConsentRequest{
		Entry: codec.Marshal(&mimi.ConsentEntry{Operation: op, Scope: s}), KeyPackages: keyPackages,
	})
	if err != nil {
		return fmt.Errorf("client: consent of %s for %s: %w", s.Target, s.Requester, err)
	}
	return nil
}

// Consents returns what the own user was asked, has asked, and what was decided. Changes come as ConsentChanged while the
// client is connected.
func (c *Client) Consents(ctx context.Context) ([]Consent, error) {
	res, err := call(ctx, c.session, c.session.service.Consents, &api.ConsentsRequest{})
	if err != nil {
		return nil, fmt.Errorf("client: ask for consents: %w", err)
	}
	var list []Consent
	for _, x := range res.Consents {
		v, err := c.consent(x)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

// consent reads what the node says of a consent.
func (c *Client) consent(x *api.Consent) (Consent, error) {
	v := Consent{Requester: mimi.URI(x.Requester), Target: mimi.URI(x.Target), Room: mimi.URI(x.Room), Decision: mimi.ConsentOperation(x.Decision)}
	// A scope that encodes is one: of two users and a room.
	var s mimi.ConsentScope
	if err := codec.Unmarshal(codec.Marshal(mimi.ConsentScope{Requester: v.Requester, Target: v.Target, Room: v.Room}), &s); err != nil {
		return Consent{}, fmt.Errorf("client: the node's list of consents: %w", err)
	}
	if self := c.User(); v.Requester != self && v.Target != self {
		return Consent{}, fmt.Errorf("client: the node's list of consents has one of %s for %s", v.Target, v.Requester)
	}
	if x.Asked != 0 {
		v.Asked = time.UnixMilli(int64(x.Asked))
	}
	if x.Decided != 0 {
		v.Decided = time.UnixMilli(int64(x.Decided))
	}
	return v, nil
}
