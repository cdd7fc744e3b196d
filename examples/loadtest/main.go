// Command loadtest measures three organisations' nodes, each a process of its own, under the load of their clients, which
// are all in this process, on this machine. Messages carry 1,024 bytes of application data, and every one is durable at
// the hub before it is acknowledged.
//
//	go run ./examples/loadtest                       every workload at small scale
//	go run ./examples/loadtest -u 3,30,100           with so many clients per organisation
//	go run ./examples/loadtest -only saturation -v   one of them; what happens is told on standard error
//	go run ./examples/loadtest -json                 the results as JSON lines
//
// The workloads are in workloads.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
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

// options say how large the workloads are.
type options struct {
	perOrg                []int // clients per organisation, one run each
	rooms                 int
	claims                int
	registered, connected int // clients of the workload scale
	away                  int // messages of the workload away
	rate                  int // messages per second of the latency run
	window                int // messages outstanding per sender
	seconds               time.Duration
	tcp                   bool // devices use HTTP/2 over TCP; else HTTP/3, as those of package client prefer
	verbose               io.Writer
}

func run(args []string, stdout, stderr io.Writer) int {
	var names []string
	for _, w := range workloads {
		names = append(names, w.name)
	}
	flags := flag.NewFlagSet("loadtest", flag.ContinueOnError)
	flags.SetOutput(stderr)
	perOrg := flags.String("u", "3,30", "clients per organisation: a `list`, one run of latency and saturation for each")
	only := flags.String("only", "", "play these workloads, a `list`: "+strings.Join(names, ", "))
	asJSON := flags.Bool("json", false, "print the results as JSON lines")
	verbose := flags.Bool("v", false, "tell on standard error what happens")
	o := options{verbose: io.Discard}
	flags.IntVar(&o.rooms, "rooms", 100, "rooms of the workloads rooms, of 9 clients each, and scale, of 3")
	flags.IntVar(&o.claims, "claims", 2000, "KeyPackages of the workload claims, local and through a hub")
	flags.IntVar(&o.registered, "registered", 1000, "clients of alpha in the workload scale")
	flags.IntVar(&o.connected, "connected", 100, "those of them that are connected")
	flags.IntVar(&o.away, "away", 10_000, "messages that a client and a peer get late in the workload away")
	flags.IntVar(&o.rate, "rate", 50, "messages per second of the workload latency")
	flags.IntVar(&o.window, "window", 64, "messages that a sender of the workload saturation has outstanding")
	flags.DurationVar(&o.seconds, "t", 5*time.Second, "how long messages are sent in a run")
	flags.BoolVar(&o.tcp, "tcp", false, "clients reach their nodes over TCP, but in the workload outage; else over QUIC")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	for _, s := range strings.Split(*perOrg, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 3 || n > 1000 {
			fmt.Fprintf(stderr, "loadtest: -u %q: clients per organisation are 3 to 1000\n", s)
			return 2
		}
		o.perOrg = append(o.perOrg, n)
	}
	if flags.NArg() > 0 || o.rooms < 1 || o.claims < 1 || o.registered < o.connected || o.connected < 0 || o.away < 1 || o.rate < 1 || o.window < 1 || o.seconds < 100*time.Millisecond {
		fmt.Fprintln(stderr, "loadtest: an argument too many, or a number too small; see -h")
		return 2
	}
	chosen := names
	if *only != "" {
		chosen = strings.Split(*only, ",")
		for _, name := range chosen {
			if !slices.Contains(names, name) {
				fmt.Fprintf(stderr, "loadtest: no workload %q: there are %s\n", name, strings.Join(names, ", "))
				return 2
			}
		}
	}
	if *verbose {
		o.verbose = stderr
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r := report{out: stdout, json: *asJSON}
	for _, w := range workloads {
		if !slices.Contains(chosen, w.name) {
			continue
		}
		if err := w.run(ctx, o, &r); err != nil {
			r.end()
			fmt.Fprintf(stderr, "loadtest: %s: %v\n", w.name, err)
			return 1
		}
	}
	r.end()
	return 0
}
