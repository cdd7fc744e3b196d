package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// The exit codes.
const (
	exitOK      = 0
	exitRefused = 1 // the authority refused, or something failed
	exitUsage   = 2 // the command line is wrong
)

// streams are where a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// command is one subcommand.
type command struct {
	name  string
	args  string // of the usage line
	short string // one line
	long  string // what help adds
	setup func(f *flag.FlagSet) func(ctx context.Context, s streams, args []string) error
}

func commands() []command {
	return []command{initCommand(), inviteCommand(), issueCommand(), inspectCommand(), verifyCommand(), listCommand(), revokeCommand(), bundleCommand()}
}

// usageError is a mistake in the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// run runs one subcommand and returns the exit code.
func run(ctx context.Context, args []string, s streams) int {
	if len(args) == 0 {
		overview(s.err)
		return exitUsage
	}
	name, args := args[0], args[1:]
	if name == "help" || name == "-h" || name == "-help" || name == "--help" {
		if len(args) == 0 || name != "help" {
			overview(s.out)
			return exitOK
		}
		name, args = args[0], []string{"-h"}
	}
	for _, c := range commands() {
		if c.name == name {
			return c.run(ctx, args, s)
		}
	}
	fmt.Fprintf(s.err, "parley-authority: there is no command %q; parley-authority help lists them\n", name)
	return exitUsage
}

func overview(w io.Writer) {
	fmt.Fprint(w, "parley-authority administers a provider's certificates.\n\nUsage: parley-authority COMMAND [flags] [arguments]\n\nCommands:\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-8s %s\n", c.name, c.short)
	}
	fmt.Fprintf(w, "  %-8s %s\n", "help", "show this, or with COMMAND what that does")
	fmt.Fprint(w, "\nIf the provider's node runs, commands go through its admin socket, else to its store.\nExit codes: 0 done, 1 refused or failed, 2 wrong usage.\n")
}

func (c command) run(ctx context.Context, args []string, s streams) int {
	f := flag.NewFlagSet(c.name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	do := c.setup(f)
	switch err := f.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		c.help(f, s.out)
		return exitOK
	case err != nil:
		return c.usage(s, err)
	}
	err := do(ctx, s, f.Args())
	if _, ok := errors.AsType[usageError](err); ok {
		return c.usage(s, err)
	}
	if err != nil {
		fmt.Fprintf(s.err, "parley-authority %s: %v\n", c.name, advise(err))
		return exitRefused
	}
	return exitOK
}

func (c command) usage(s streams, err error) int {
	fmt.Fprintf(s.err, "parley-authority %s: %v\nUsage: parley-authority %s %s\nparley-authority help %s says more\n", c.name, err, c.name, c.args, c.name)
	return exitUsage
}

func (c command) help(f *flag.FlagSet, w io.Writer) {
	fmt.Fprintf(w, "Usage: parley-authority %s %s\n\n%s.\n", c.name, c.args, strings.ToUpper(c.short[:1])+c.short[1:])
	if c.long != "" {
		fmt.Fprintf(w, "%s\n", c.long)
	}
	fmt.Fprint(w, "\nFlags:\n")
	f.SetOutput(w)
	f.PrintDefaults()
}

// dataFlag is the node's data directory.
func dataFlag(f *flag.FlagSet) *string {
	dir := os.Getenv("PARLEY_DATA")
	if dir == "" {
		dir = "data"
	}
	return f.String("data", dir, "the node's data `directory`; the default is $PARLEY_DATA, else ./data")
}

func jsonFlag(f *flag.FlagSet) *bool { return f.Bool("json", false, "print JSON") }

// arity fails unless there are n arguments; what names them.
func arity(args []string, n int, what string) error {
	if len(args) != n {
		return usagef("%d arguments where %s is wanted (flags come first)", len(args), what)
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// readInput reads a file, "-" being standard input, of at most max bytes.
func readInput(s streams, path string, max int64) ([]byte, error) {
	r := s.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, max+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", path, max)
	}
	return b, nil
}
