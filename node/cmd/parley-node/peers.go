package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/node"
)

func (c *command) peers(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return misused("peers needs list, approve or remove")
	}
	switch args[0] {
	case "list":
		return c.listPeers(ctx, args[1:])
	case "approve":
		return c.approvePeer(ctx, args[1:])
	case "remove":
		return c.removePeer(ctx, args[1:])
	case "help", "-h", "-help", "--help":
		fmt.Fprint(c.out, usage)
		return nil
	}
	return misused("peers has no command %q, only list, approve and remove", args[0])
}

// peerAdmin is what the peers commands need: a running node, or its store.
type peerAdmin interface {
	Peers(ctx context.Context) ([]node.PeerStatus, error)
	ApprovePeer(ctx context.Context, domain string, f authority.Fingerprint, address string) error
	RemovePeer(ctx context.Context, domain string) error
}

// withPeers runs f with the running node, or with the store if no node answers.
func (c *command) withPeers(f func(peerAdmin) error) error {
	err := f(c.dial())
	if !errors.Is(err, node.ErrNoNode) {
		return err
	}
	offline, err := node.OpenOffline(c.data)
	if err != nil {
		return err
	}
	return errors.Join(f(offline), offline.Close())
}

func (c *command) listPeers(ctx context.Context, args []string) error {
	if err := parse(c.admin("peers list", "", "Lists the approved peers, and nodes that gossip has introduced and nobody has approved."), args, 0); err != nil {
		return err
	}
	return c.withPeers(func(a peerAdmin) error {
		list, err := a.Peers(ctx)
		if err != nil {
			return err
		}
		if c.json {
			return c.print(list)
		}
		w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "DOMAIN\tAPPROVED\tALIVE\tWAITING\tADDRESS\tFINGERPRINT")
		for _, p := range list {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", p.Domain, yes(p.Approved), yes(p.Alive), p.Waiting, p.Address, p.Fingerprint)
		}
		return w.Flush()
	})
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (c *command) approvePeer(ctx context.Context, args []string) error {
	f := c.admin("peers approve", "DOMAIN", "Approves a provider, whose operator has told you its root's fingerprint over a channel that you trust.")
	var fingerprint authority.Fingerprint
	given := false
	f.Func("fingerprint", "`SHA-256` of the peer's root certificate in hexadecimal", func(s string) (err error) {
		fingerprint, err = authority.ParseFingerprint(s)
		given = true
		return err
	})
	address := f.String("address", "", "`host:port` of the peer's node; without it gossip has to find the peer")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	if !given {
		return misused("peers approve needs -fingerprint; the peer's operator gets it with \"parley-authority bundle -fingerprint\"")
	}
	return c.withPeers(func(a peerAdmin) error {
		if err := a.ApprovePeer(ctx, f.Arg(0), fingerprint, *address); err != nil {
			return err
		}
		if c.json {
			return c.print(map[string]string{"approved": f.Arg(0)})
		}
		_, err := fmt.Fprintf(c.out, "approved %s\n", f.Arg(0))
		return err
	})
}

func (c *command) removePeer(ctx context.Context, args []string) error {
	f := c.admin("peers remove", "DOMAIN", "Takes the approval of a provider back.")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	return c.withPeers(func(a peerAdmin) error {
		if err := a.RemovePeer(ctx, f.Arg(0)); err != nil {
			return err
		}
		if c.json {
			return c.print(map[string]string{"removed": f.Arg(0)})
		}
		_, err := fmt.Fprintf(c.out, "removed %s\n", f.Arg(0))
		return err
	})
}
