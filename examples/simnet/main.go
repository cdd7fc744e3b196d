//go:build linux

// Command simnet runs three organisations in network namespaces, breaks things while their clients talk, and then reads
// every client's view: each acknowledged message exactly once, in the hub's order, the same epoch authenticator
// everywhere, no acknowledged commit undone. It takes root and ip(8).
//
//	go run ./examples/simnet                                   every scenario, half a minute each
//	go run ./examples/simnet -scenario kill -duration 10m      one of them, for longer
//	go run ./examples/simnet -scenario kill -seed 7            what is done is drawn from the seed; when exactly is chance
//
// The nodes are processes of parley-node, and the clients of an organisation are another process, with their stores on
// disk. Every pair of nodes has a relay of UDP packets between them, and every organisation a link that can be taken down:
// network.go. What is done is in scenarios.go, what must hold afterwards in check.go. The exit code is 1 if it doesn't.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/parley-mls/parley/examples/internal/org"
)

func main() {
	os.Exit(command(os.Args, os.Stdout, os.Stderr))
}

// command is this program: the driver, a host of clients, or a node.
func command(args []string, stdout, stderr io.Writer) int {
	if code, ok := org.Served(args); ok {
		return code
	}
	if code, ok := hosted(args); ok {
		return code
	}
	return run(args[1:], stdout, stderr)
}

type options struct {
	duration time.Duration // of each scenario
	seed     uint64
	clients  int // all together
	rooms    int
	rate     float64 // messages per second, all together
	commits  float64 // commits per second, all together
	patience time.Duration
	dir      string
	node     string // path of parley-node; empty: this program
	stepped  bool   // the node's clock can be stepped
	verbose  bool   // logs are at level debug
}

func run(args []string, stdout, stderr io.Writer) int {
	var known []string
	for _, s := range scenarios {
		known = append(known, s.name)
	}
	var o options
	flags := flag.NewFlagSet("simnet", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("scenario", strings.Join(known, ","), "what to play, a `list`")
	flags.DurationVar(&o.duration, "duration", 30*time.Second, "how long each scenario lasts, without what it takes to come to rest")
	flags.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano())%1_000_000, "what is done is drawn from it")
	flags.IntVar(&o.clients, "clients", 9, "clients, a multiple of 3")
	flags.IntVar(&o.rooms, "rooms", 30, "rooms, with everybody in each")
	flags.Float64Var(&o.rate, "rate", 20, "messages per second, of all clients together")
	flags.Float64Var(&o.commits, "commits", 1, "commits per second, of all clients together")
	flags.DurationVar(&o.patience, "patience", time.Minute, "how long healing may take")
	flags.StringVar(&o.dir, "dir", "", "keep all state and logs in this `directory` (default: a temporary one, removed at the end)")
	flags.BoolVar(&o.verbose, "v", false, "have nodes and clients log everything, in -dir")
	program := flags.String("node", "", "`path` of the parley-node to run (default: one that is built; \"self\": this program)")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	wrong := func(format string, args ...any) int {
		fmt.Fprintf(stderr, "simnet: "+format+"\n", args...)
		return 2
	}
	var chosen []scenario
	for _, name := range strings.Split(*only, ",") {
		i := slices.Index(known, name)
		if i < 0 {
			return wrong("no scenario %q: there are %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, scenarios[i])
		o.stepped = o.stepped || name == "clock"
	}
	switch {
	case flags.NArg() > 0:
		return wrong("unexpected argument %q", flags.Arg(0))
	case o.clients < 3 || o.clients%3 != 0 || o.clients > 300:
		return wrong("-clients %d isn't a multiple of 3 from 3 to 300", o.clients)
	case o.rooms < 1 || o.rooms > 1000 || o.duration < time.Second || o.rate < 0 || o.commits < 0 || o.rate > 10_000 || o.commits > 1000:
		return wrong("a number is out of range; see -h")
	case o.stepped && *program != "":
		return wrong("clock takes a node that is built for it: without -node")
	}
	if err := unsupported(); err != nil {
		fmt.Fprintf(stderr, "simnet: %v\n", err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	var mu sync.Mutex
	tell := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(stdout, "%7.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	if o.node = *program; o.node == "self" {
		o.node = ""
	} else if o.node == "" {
		tmp, err := os.MkdirTemp("", "parley-simnet-node-")
		if err != nil {
			fmt.Fprintf(stderr, "simnet: %v\n", err)
			return 1
		}
		defer os.RemoveAll(tmp)
		if o.stepped {
			tell("building a parley-node whose clock can be stepped; the first time that takes minutes")
		}
		if o.node, err = buildNode(ctx, tmp, o.stepped); err != nil {
			fmt.Fprintf(stderr, "simnet: %v\n", err)
			return 1
		}
	}
	w, err := newWorld(ctx, o, tell)
	if err != nil {
		fmt.Fprintf(stderr, "simnet: %v\n", err)
		return 1
	}
	defer w.close()
	tell("3 nodes, %d clients in %d rooms; seed %d", o.clients, o.rooms, o.seed)
	return play(ctx, w, chosen, stdout, stderr)
}

// play plays scenarios one after the other in one world, prints the table, and returns the exit code.
func play(ctx context.Context, w *world, chosen []scenario, stdout, stderr io.Writer) int {
	code := 0
	var t table
	before := w.totals()
	for _, s := range chosen {
		faults, err := w.run(ctx, s)
		if err != nil {
			fmt.Fprintf(stderr, "simnet: %s: %v\n", s.name, err)
			code = 1
			break
		}
		for i, f := range faults {
			if i == maxFaults {
				fmt.Fprintf(stdout, "  and %d more\n", len(faults)-i)
				break
			}
			fmt.Fprintf(stdout, "  FAULT %s\n", f)
		}
		after := w.totals()
		t.add(s.name, w, before, after, len(faults))
		if before = after; len(faults) > 0 {
			code = 1
			break // what follows would only find them again
		}
	}
	t.print(stdout)
	return code
}

// maxFaults bounds how many faults of a scenario are printed.
const maxFaults = 50
