package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/parley-mls/parley/node"
)

func (c *command) backup(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "verify" {
		return c.verifyBackup(args[1:])
	}
	f := c.admin("backup", "DIR", "Writes a backup of the running node to a directory that doesn't exist yet.")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	dir, err := filepath.Abs(f.Arg(0))
	if err != nil {
		return err
	}
	b, err := c.dial().Backup(ctx, dir)
	if err != nil {
		return c.explain(err)
	}
	if c.json {
		return c.print(b)
	}
	fmt.Fprintf(c.out, "%s has the state of %s of %s\n", dir, b.Domain, b.Time.Format(time.RFC3339))
	return nil
}

func (c *command) verifyBackup(args []string) error {
	f := c.flags("backup verify", "DIR", "Reads all of a backup: records, logs and their chains, and assets.")
	f.BoolVar(&c.json, "json", false, "print JSON")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	b, err := node.VerifyBackup(f.Arg(0))
	if err != nil {
		return err
	}
	if c.json {
		return c.print(b)
	}
	fmt.Fprintf(c.out, "the backup of %s of %s is whole: %d rooms, %d entries, %d records, %d assets\n",
		b.Domain, b.Time.Format(time.RFC3339), b.Rooms, b.Entries, b.Records, b.Assets)
	return nil
}

func (c *command) restore(args []string) error {
	f := c.admin("restore", "BACKUP", "Makes the data directory, which must be empty or not exist, of a backup. The node that is started there asks its\n"+
		"peers what came after the backup, before it serves anybody. Invitations that weren't used are withdrawn. The former\n"+
		"data directory must not be served any more.")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	b, err := node.Restore(f.Arg(0), c.data)
	if err != nil {
		return err
	}
	if c.json {
		return c.print(b)
	}
	fmt.Fprintf(c.out, "%s has the state of %s of %s: %d rooms, %d entries\n", c.data, b.Domain, b.Time.Format(time.RFC3339), b.Rooms, b.Entries)
	return nil
}
