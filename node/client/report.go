package client

import (
	"context"
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// Report is what Room.Report tells of a user.
type Report struct {
	Reason    uint8  // the draft has no codes yet
	Note      string // for the hub's operator
	Anonymous bool   // the hub isn't told who reports; it learns at which provider
	// Messages are of the user, each with the hub's Frank, 64 at most; the hub's operator gets to read them. They prove
	// themselves, so that this works after leaving the room too.
	Messages []Message
}

// Report reports abuse in the room to its hub (draft-ietf-mimi-protocol-06, Section 5.9), and returns when the hub has the
// report durably. The own provider sees it as well. It fails for messages that aren't the user's or have no frank, and with
// ErrNoRight if the reporter's role in the room may not report.
func (r *Room) Report(ctx context.Context, user mimi.URI, what Report) error {
	a := mimi.AbuseReport{ReportingUser: r.c.User(), AllegedAbuser: user, ReasonCode: what.Reason, Note: what.Note}
	if what.Anonymous {
		a.ReportingUser = ""
	}
	r.mu.Lock()
	role := r.roleOf(r.c.User())
	r.mu.Unlock()
	if role != nil && !role.May(mimi.CanReportAbuse) {
		return fmt.Errorf("client: report %s: %w", user, ErrNoRight)
	}
	if len(what.Messages) > mimi.MaxAbusiveMessages {
		return fmt.Errorf("client: report %s: %d messages, at most %d", user, len(what.Messages), mimi.MaxAbusiveMessages)
	}
	for _, m := range what.Messages {
		switch {
		case m.Room != r.uri || m.User != user:
			return fmt.Errorf("client: report %s: message %d is of %s in %s", user, m.Seq, m.User, m.Room)
		case m.Frank == nil:
			return fmt.Errorf("client: report %s: message %d has no frank: %s", user, m.Seq, m.FrankFault)
		}
		a.Messages = append(a.Messages, mimi.AbusiveMessage{Content: m.application, Frank: *m.Frank, AcceptedTimestamp: uint64(m.Time.UnixMilli())})
	}
	if err := r.c.report(ctx, r.uri, codec.Marshal(a)); err != nil {
		return fmt.Errorf("client: report %s: %w", user, err)
	}
	return nil
}

func (c *Client) report(ctx context.Context, room mimi.URI, body []byte) error {
	_, err := call(ctx, c.session, c.session.service.ReportAbuse, &api.MimiRequest{Room: string(room), Body: body})
	return err
}
