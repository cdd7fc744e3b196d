// Parley-node is a provider's node: the delivery service of its rooms, the API of its clients, and its part in the
// federation with other providers' nodes. Run "parley-node help".
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	private()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
