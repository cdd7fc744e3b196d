// Command threeorgs plays a federated network on one machine: three organisations, each with its own node process,
// authority and store, and four people's devices that share one end-to-end encrypted room. Every step is a check.
//
//	go run ./examples/threeorgs            play and print
//	go run ./examples/threeorgs -json      the same as JSON lines
//	go run ./examples/threeorgs -keep      leave the nodes up and say how to join from another terminal
//
// See steps.go for what is played.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/parley-mls/parley/examples/internal/org"
)

func main() {
	if code, ok := org.Served(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	var names []string
	for _, s := range steps {
		names = append(names, s.name)
	}
	flags := flag.NewFlagSet("threeorgs", flag.ContinueOnError)
	flags.SetOutput(stderr)
	asJSON := flags.Bool("json", false, "print the steps as JSON lines")
	keep := flags.Bool("keep", false, "leave the nodes up at the end, until interrupted")
	dir := flags.String("dir", "", "keep all state in this `directory` (default: a temporary one, removed at the end)")
	sabotage := flags.String("break", "", "sabotage one `step`: "+strings.Join(names, ", "))
	verbose := flags.Bool("v", false, "show the log of the devices (those of the nodes are in the directory)")
	patience := flags.Duration("patience", 15*time.Second, "how long a check may wait for what it expects")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "threeorgs: unexpected argument %q\n", flags.Arg(0))
		return 2
	}
	known := *sabotage == ""
	for _, n := range names {
		known = known || n == *sabotage
	}
	if !known {
		fmt.Fprintf(stderr, "threeorgs: no step %q: there are %s\n", *sabotage, strings.Join(names, ", "))
		return 2
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	level := slog.LevelError + 4
	if *verbose {
		level = slog.LevelDebug
	}
	p, err := newPlay(*dir, *sabotage, *patience, slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level})))
	if err != nil {
		fmt.Fprintf(stderr, "threeorgs: %v\n", err)
		return 1
	}
	defer p.close()

	r := report{out: stdout, json: *asJSON}
	for _, s := range steps {
		began := time.Now()
		detail, lines, err := s.run(ctx, p)
		r.step(s.name, time.Since(began), detail, lines, err)
		if err != nil {
			break // what follows builds on it
		}
	}
	ok := r.end()
	if *keep && ok {
		p.keep(ctx, stderr)
	}
	if !ok {
		return 1
	}
	return 0
}
