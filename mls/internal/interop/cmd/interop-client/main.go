// Command interop-client serves our MLS client to the runner of the MLS working group's interoperability harness.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/parley-mls/parley/mls/internal/interop"
)

func main() {
	host := flag.String("host", "localhost", "address to listen on")
	port := flag.Int("port", 50001, "port to listen on; 0 chooses one")
	flag.Parse()
	if err := run(net.JoinHostPort(*host, strconv.Itoa(*port))); err != nil {
		log.Fatal(err)
	}
}

func run(addr string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	log.Printf("listening on %v", l.Addr())
	srv := interop.NewServer()
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // for the call that is running
	defer cancel()
	return srv.Shutdown(ctx)
}
