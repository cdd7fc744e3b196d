package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/chain"
)

func (c *command) evidence(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return misused("evidence needs list, export or verify")
	}
	switch args[0] {
	case "list":
		return c.listEvidence(ctx, args[1:])
	case "export":
		return c.exportEvidence(ctx, args[1:])
	case "verify":
		return c.verifyEvidence(args[1:])
	case "help", "-h", "-help", "--help":
		fmt.Fprint(c.out, usage)
		return nil
	}
	return misused("evidence has no command %q, only list, export and verify", args[0])
}

func (c *command) listEvidence(ctx context.Context, args []string) error {
	if err := parse(c.admin("evidence list", "", "Lists what the node has against hubs that have signed two histories of a room."), args, 0); err != nil {
		return err
	}
	list, err := c.dial().Evidence(ctx)
	if err != nil {
		return c.explain(err)
	}
	if c.json {
		return c.print(list)
	}
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tROOM\tENTRIES SIGNED")
	for _, e := range list {
		fmt.Fprintf(w, "%.12s\t%s\t%d, %d\n", e.ID, e.Room, e.First, e.Second)
	}
	return w.Flush()
}

func (c *command) exportEvidence(ctx context.Context, args []string) error {
	f := c.admin("evidence export", "ID", "Prints evidence as a file that \"parley-node evidence verify\" judges anywhere.")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	list, err := c.dial().Evidence(ctx)
	if err != nil {
		return c.explain(err)
	}
	var found []node.EvidenceStatus
	for _, e := range list {
		if strings.HasPrefix(e.ID, f.Arg(0)) {
			found = append(found, e)
		}
	}
	if len(found) != 1 {
		return fmt.Errorf("%d pieces of evidence begin with %q", len(found), f.Arg(0))
	}
	_, err = c.out.Write(found[0].File)
	return err
}

// maxEvidenceFile is more than any evidence has, in bytes.
const maxEvidenceFile = 16 << 20

func (c *command) verifyEvidence(args []string) error {
	f := c.flags("evidence verify", "FILE", "Judges evidence against a hub, without a node or a network. It proves what it says of the provider whose root\nhas the fingerprint that is printed: get that from somebody other than who gave you the file.")
	var want []authority.Fingerprint
	f.Func("fingerprint", "`SHA-256` of the provider's root in hexadecimal; may be given again, and a root beside those given is refused", func(s string) error {
		w, err := authority.ParseFingerprint(s)
		want = append(want, w)
		return err
	})
	f.BoolVar(&c.json, "json", false, "print JSON")
	if err := parse(f, args, 1); err != nil {
		return err
	}
	file, err := os.Open(f.Arg(0))
	if err != nil {
		return err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxEvidenceFile))
	if err != nil {
		return err
	}
	e, err := chain.ParseFile(b)
	if err != nil {
		return err
	}
	bundle, err := e.Verify()
	if err != nil {
		return err
	}
	roots := bundle.Fingerprints()
	for _, r := range roots { // all of them: the file's author may have put one of another's beside the provider's
		if want != nil && !slices.Contains(want, r) {
			return fmt.Errorf("the evidence stands on the root %s, which isn't one of those given", r)
		}
	}
	if c.json {
		return c.print(map[string]any{
			"room": e.First.Room, "incarnation": e.First.Incarnation, "first": e.First.Seq, "second": e.Second.Seq, "fingerprints": roots,
		})
	}
	fmt.Fprintf(c.out, "The hub of %s has signed two histories of the room.\n", e.First.Room)
	fmt.Fprintf(c.out, "  entry %d, chain %x\n  entry %d, chain %x\n", e.First.Seq, e.First.Chain, e.Second.Seq, e.Second.Chain)
	fmt.Fprintf(c.out, "The second has chain %x at entry %d.\n", e.Start, e.First.Seq)
	for _, r := range roots {
		fmt.Fprintf(c.out, "root of %s: %s\n", bundle.Domain(), r)
	}
	return nil
}
