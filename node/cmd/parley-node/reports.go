package main

import (
	"context"
	"fmt"
	"time"
)

func (c *command) reports(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return misused("reports needs list or remove")
	}
	switch args[0] {
	case "list":
		return c.listReports(ctx, args[1:])
	case "remove":
		return c.removeReport(ctx, args[1:])
	case "help", "-h", "-help", "--help":
		fmt.Fprint(c.out, usage)
		return nil
	}
	return misused("reports has no command %q, only list and remove", args[0])
}

func (c *command) listReports(ctx context.Context, args []string) error {
	if err := parse(c.admin("reports list", "", "Lists the reports of abuse in rooms that the node hosts. The messages are what was sent: the node knows its stamp on them."), args, 0); err != nil {
		return err
	}
	list, err := c.dial().Reports(ctx)
	if err != nil {
		return err
	}
	if c.json {
		return c.print(list)
	}
	for _, r := range list {
		by := string(r.Reporter)
		if by == "" {
			by = "somebody at " + r.From
		}
		// What people have written is quoted, so that it doesn't steer a terminal.
		fmt.Fprintf(c.out, "%.12s  %s  %s\n  %s reports %s, reason %d: %q\n", r.ID, r.Time.Format(time.RFC3339), r.Room, by, r.Abuser, r.Reason, r.Note)
		for _, m := range r.Messages {
			fmt.Fprintf(c.out, "    %s  %q\n", m.Time.Format(time.RFC3339), m.Text)
		}
	}
	return nil
}

func (c *command) removeReport(ctx context.Context, args []string) error {
	f := c.admin("reports remove", "ID", "Deletes a report.")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	if err := c.dial().RemoveReport(ctx, f.Arg(0)); err != nil {
		return err
	}
	if c.json {
		return c.print(map[string]string{"removed": f.Arg(0)})
	}
	_, err := fmt.Fprintf(c.out, "removed %s\n", f.Arg(0))
	return err
}
