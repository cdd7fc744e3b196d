// Command parley-authority is the administrator's side of a provider's authentication service: it creates the
// authority, invites users, issues, shows, verifies and revokes certificates, and prints the trust bundle.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
	stop()
	os.Exit(code)
}
