package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

// history gives another device of the user what was said in a room, perhaps in the last days only, or takes what another one
// gives.
func history(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, c *client.Client, r *client.Room) error {
		if len(args) == 1 {
			return s.takeHistory(ctx, c, r)
		}
		device, err := mimi.URI(args[1]), error(nil)
		if !strings.HasPrefix(args[1], "mimi://") {
			device, err = mimi.ClientURI(c.User().Domain(), args[1])
		}
		var since time.Time
		if len(args) == 3 {
			days, bad := strconv.ParseUint(args[2], 10, 16)
			if bad != nil {
				return fmt.Errorf("%q isn't a number of days", args[2])
			}
			since = time.Now().AddDate(0, 0, -int(days))
		}
		if err != nil {
			return err
		}
		n, err := r.ShareHistory(ctx, device, since)
		if err != nil {
			return queued(err)
		}
		fmt.Fprintf(s.out, "%d messages for %s, which takes them with \"chat history %s\"\n", n, device.ID(), r.URI().ID())
		return nil
	})
}

// takeHistory waits a little for what may still be on its way.
func (s *session) takeHistory(ctx context.Context, c *client.Client, r *client.Room) error {
	waiting, cancel := context.WithTimeout(ctx, arrival)
	defer cancel()
	events := c.Events()
	for r.HistoryOffer() == "" && waiting.Err() == nil {
		select {
		case <-events:
		case <-waiting.Done():
		}
	}
	from := r.HistoryOffer()
	n, err := r.TakeHistory(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(s.out, "%d messages are new, given by %s\n", n, from.ID())
	return nil
}
