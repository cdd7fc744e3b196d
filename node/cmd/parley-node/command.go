package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/parley-mls/parley/node"
)

const usage = `parley-node is a provider's node.

  parley-node serve -config FILE      run the node until it is told to stop
  parley-node status                  how the node is doing
  parley-node rooms                   the rooms that it hosts
  parley-node peers list              approved peers, and nodes that ask to be
  parley-node peers approve -fingerprint F [-address HOST:PORT] DOMAIN
  parley-node peers remove DOMAIN
  parley-node reports list            reports of abuse in its rooms
  parley-node reports remove ID
  parley-node evidence list           hubs that have signed two histories of a room
  parley-node evidence export ID      the proof, as a file
  parley-node evidence verify [-fingerprint F] FILE
  parley-node backup DIR              a backup of the running node, to a new directory
  parley-node backup verify DIR       whether a backup is whole
  parley-node restore BACKUP          a data directory of a backup, for a node that takes the place of a lost one
  parley-node version
  parley-node help [config]           this text, or the fields of the configuration

Every command has -h. All but serve, restore and the verify commands speak to the running node through its admin socket,
in the node's data directory: -data DIR, else $PARLEY_DATA, else ./data. The peers commands also work while the node is
down. -json prints JSON. Exit status: 0 done, 1 refused or failed, 2 wrong usage.
`

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// usageError is an error of the command line.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }

func misused(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// command is one call of the program.
type command struct {
	out, err io.Writer
	data     string
	json     bool
}

// run runs the command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &command{out: stdout, err: stderr}
	err := c.dispatch(ctx, args)
	var wrong usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "parley-node: %v\nRun \"parley-node help\" for the commands.\n", err)
		return exitUsage
	}
	fmt.Fprintf(stderr, "parley-node: %v\n", err)
	return exitFailed
}

func (c *command) dispatch(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return misused("no command")
	}
	rest := args[1:]
	switch args[0] {
	case "serve":
		return c.serve(ctx, rest)
	case "status":
		return c.status(ctx, rest)
	case "rooms":
		return c.rooms(ctx, rest)
	case "peers":
		return c.peers(ctx, rest)
	case "reports":
		return c.reports(ctx, rest)
	case "evidence":
		return c.evidence(ctx, rest)
	case "backup":
		return c.backup(ctx, rest)
	case "restore":
		return c.restore(rest)
	case "version", "-version", "--version":
		fmt.Fprintln(c.out, "parley-node", node.Version())
		return nil
	case "help", "-h", "-help", "--help":
		if len(rest) > 0 && rest[0] == "config" {
			fmt.Fprint(c.out, node.ConfigHelp)
		} else {
			fmt.Fprint(c.out, usage)
		}
		return nil
	}
	return misused("unknown command %q", args[0])
}

// flags returns a flag set for a command that takes positional arguments as args says.
func (c *command) flags(name, args, purpose string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.Usage = func() {
		f.SetOutput(c.out)
		fmt.Fprintf(c.out, "usage: parley-node %s [flags] %s\n\n%s\n\n", name, args, purpose)
		f.PrintDefaults()
		f.SetOutput(io.Discard)
	}
	return f
}

// admin returns a flag set with the flags of commands that speak to a node.
func (c *command) admin(name, args, purpose string) *flag.FlagSet {
	f := c.flags(name, args, purpose)
	data := os.Getenv("PARLEY_DATA")
	if data == "" {
		data = "data"
	}
	f.StringVar(&c.data, "data", data, "data `directory` of the node")
	f.BoolVar(&c.json, "json", false, "print JSON")
	return f
}

// parse parses flags and checks the number of positional arguments.
func parse(f *flag.FlagSet, args []string, want int) error {
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err}
	}
	if f.NArg() != want {
		return misused("%s takes %d arguments after its flags, not %d", f.Name(), want, f.NArg())
	}
	return nil
}

func (c *command) serve(ctx context.Context, args []string) error {
	f := c.flags("serve", "", "Runs the node until it gets an interrupt or SIGTERM.")
	path := f.String("config", "", "configuration `file`; \"parley-node help config\" explains it")
	if err := parse(f, args, 0); err != nil {
		return err
	}
	if *path == "" {
		return misused("serve needs -config FILE")
	}
	cfg, err := node.LoadConfig(*path)
	if err != nil {
		return err
	}
	n, err := node.Open(cfg, cfg.Log.Logger(c.err))
	if err != nil {
		return err
	}
	return n.Run(ctx)
}

func (c *command) status(ctx context.Context, args []string) error {
	if err := parse(c.admin("status", "", "Says how the running node is doing."), args, 0); err != nil {
		return err
	}
	s, err := c.dial().Status(ctx)
	if err != nil {
		return c.explain(err)
	}
	if c.json {
		return c.print(s)
	}
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "domain\t%s\naddress\t%s\nfingerprint\t%s\nversion\t%s\n", s.Domain, s.Address, s.Fingerprint, s.Version)
	fmt.Fprintf(w, "rooms hosted\t%d\nclients connected\t%d\npeers alive\t%d of %d\nwaiting for peers\t%d\n", s.Rooms, s.Streams, s.Alive, s.Peers, s.Waiting)
	fmt.Fprintf(w, "disk free\t%d MiB\n", s.DiskFree>>20)
	if s.ReadOnly {
		fmt.Fprintf(w, "read-only\tthe disk is nearly full: nothing new is taken\n")
	}
	if s.Restoring {
		fmt.Fprintf(w, "restoring\tpeers are asked what came after the backup, and nobody is served yet\n")
	}
	return w.Flush()
}

func (c *command) rooms(ctx context.Context, args []string) error {
	if err := parse(c.admin("rooms", "", "Lists the rooms that the running node hosts."), args, 0); err != nil {
		return err
	}
	list, err := c.dial().Rooms(ctx)
	if err != nil {
		return c.explain(err)
	}
	if c.json {
		return c.print(list)
	}
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ROOM\tEPOCH\tENTRIES\tUSERS\tCLIENTS\tREMOVALS PENDING")
	for _, r := range list {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\n", r.Room, r.Epoch, r.Last, len(r.Participants), len(r.Clients), len(r.Removals))
	}
	return w.Flush()
}

func (c *command) dial() *node.Admin { return node.DialAdmin(node.AdminSocket(c.data)) }

// explain says what to do about an error.
func (c *command) explain(err error) error {
	if errors.Is(err, node.ErrNoNode) {
		return fmt.Errorf("no node runs in %s; start it with \"parley-node serve\", or say where it is with -data", c.data)
	}
	return err
}

func (c *command) print(v any) error {
	e := json.NewEncoder(c.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
