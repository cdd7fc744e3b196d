package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
)

const maxInput = 1 << 20

func chainPEM(chain [][]byte) []byte {
	var b bytes.Buffer
	for _, der := range chain {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	return b.Bytes()
}

// parseChain reads certificates in PEM, or one in DER.
func parseChain(data []byte) ([][]byte, error) {
	var chain [][]byte
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			chain = append(chain, block.Bytes)
		}
	}
	if len(chain) > 0 {
		return chain, nil
	}
	if _, err := x509.ParseCertificate(data); err != nil {
		return nil, fmt.Errorf("%w: neither PEM nor DER certificates", authority.ErrMalformed)
	}
	return [][]byte{data}, nil
}

// certificateJSON is what inspect, issue and verify print of a chain.
type certificateJSON struct {
	Domain       string   `json:"domain"`
	User         mimi.URI `json:"user,omitempty"`
	Client       mimi.URI `json:"client,omitempty"`
	Node         bool     `json:"node,omitempty"`
	Serial       string   `json:"serial"`
	NotBefore    string   `json:"not_before"`
	NotAfter     string   `json:"not_after"`
	Fingerprints []string `json:"fingerprints"` // SHA-256 of each certificate of the chain
	PEM          string   `json:"pem,omitempty"`
	Verified     bool     `json:"verified,omitempty"`
}

func describe(chain [][]byte) (*certificateJSON, error) {
	id, err := authority.ParseIdentity(chain)
	if err != nil {
		return nil, err
	}
	c := &certificateJSON{Domain: id.Domain, User: id.User, Client: id.Client, Node: id.Node, Serial: id.Serial,
		NotBefore: id.NotBefore.UTC().Format(time.RFC3339), NotAfter: id.NotAfter.UTC().Format(time.RFC3339)}
	for _, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", authority.ErrMalformed, err)
		}
		c.Fingerprints = append(c.Fingerprints, authority.FingerprintOf(cert).String())
	}
	return c, nil
}

func printChainJSON(w io.Writer, chain [][]byte) error {
	c, err := describe(chain)
	if err != nil {
		return err
	}
	c.PEM = string(chainPEM(chain))
	return printJSON(w, c)
}

func (c *certificateJSON) print(w io.Writer) {
	if c.Node {
		fmt.Fprintf(w, "provider:     %s\n", c.Domain)
	} else {
		fmt.Fprintf(w, "user:         %s\nclient:       %s\n", c.User, c.Client)
	}
	fmt.Fprintf(w, "serial:       %s\nvalid from:   %s\nvalid until:  %s\n", c.Serial, c.NotBefore, c.NotAfter)
	for i, f := range c.Fingerprints {
		fmt.Fprintf(w, "fingerprint:  %s (certificate %d)\n", f, i)
	}
}

func inspectCommand() command {
	return command{
		name: "inspect", args: "FILE | INVITATION",
		short: "show whom a certificate or an invitation names, without judging it",
		long: `FILE has certificates in PEM, leaf first, or one in DER; - is standard input. Of an invitation, the token isn't
shown.`,
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			asJSON := jsonFlag(f)
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 1, "one FILE or INVITATION"); err != nil {
					return err
				}
				if strings.HasPrefix(args[0], "parley:") {
					return inspectInvitation(s, args[0], *asJSON)
				}
				data, err := readInput(s, args[0], maxInput)
				if err != nil {
					return err
				}
				chain, err := parseChain(data)
				if err != nil {
					return err
				}
				c, err := describe(chain)
				if err != nil {
					return err
				}
				if *asJSON {
					return printJSON(s.out, c)
				}
				c.print(s.out)
				return nil
			}
		},
	}
}

func inspectInvitation(s streams, text string, asJSON bool) error {
	i, err := authority.ParseInvitation(text)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(s.out, map[string]any{"domain": i.Domain, "address": i.Address, "root": i.Root, "user": i.User, "expires": i.Expires})
	}
	fmt.Fprintf(s.out, "user:         %s\nprovider:     %s at %s\nroot:         %s\nexpires:      %s\n", i.User, i.Domain, i.Address, i.Root, i.Expires.Format(time.RFC3339))
	return nil
}

// files collects a flag that may be given several times.
type files []string

func (f *files) String() string     { return strings.Join(*f, ",") }
func (f *files) Set(s string) error { *f = append(*f, s); return nil }

func verifyCommand() command {
	return command{
		name: "verify", args: "[-data DIR] [-bundle FILE]... [-purpose PURPOSE] FILE",
		short: "judge a certificate as the network would, now",
		long: `FILE has certificates in PEM, leaf first, or one in DER; - is standard input. They are judged by the own trust
bundle, by those of approved peers if the node doesn't run, and by those of -bundle. With -bundle, -data need not be
there.`,
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			data, asJSON := dataFlag(f), jsonFlag(f)
			var given files
			f.Var(&given, "bundle", "`file` with a provider's trust bundle; may be repeated")
			purpose := f.String("purpose", "client", "what it is presented for: client, node or hub")
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 1, "one FILE"); err != nil {
					return err
				}
				p, ok := map[string]authority.Purpose{"client": authority.PurposeClient, "node": authority.PurposeNode, "hub": authority.PurposeHub}[*purpose]
				if !ok {
					return usagef("-purpose %q is none of client, node, hub", *purpose)
				}
				raw, err := readInput(s, args[0], maxInput)
				if err != nil {
					return err
				}
				chain, err := parseChain(raw)
				if err != nil {
					return err
				}
				bundles, err := readBundles(ctx, s, *data, given)
				if err != nil {
					return err
				}
				v := authority.Verifier{Bundles: func(domain string) *authority.Bundle { return bundles[domain] }}
				if _, err := v.Verify(chain, p); err != nil {
					return err
				}
				c, err := describe(chain)
				if err != nil {
					return err
				}
				c.Verified = true
				if *asJSON {
					return printJSON(s.out, c)
				}
				fmt.Fprintf(s.out, "verified as a %s's certificate\n", *purpose)
				c.print(s.out)
				return nil
			}
		},
	}
}

// readBundles returns the bundles by domain; the given files come before what is known.
func readBundles(ctx context.Context, s streams, data string, given files) (map[string]*authority.Bundle, error) {
	bundles := make(map[string]*authority.Bundle)
	err := with(ctx, data, func(a *service) error {
		own, err := a.Bundle(ctx)
		if err != nil {
			return err
		}
		bundles[own.Domain()] = own
		if a.trust != nil {
			for _, b := range a.trust.Bundles() {
				bundles[b.Domain()] = b
			}
		}
		return nil
	})
	if err != nil && len(given) == 0 {
		return nil, err
	}
	for _, path := range given {
		doc, err := readInput(s, path, authority.MaxBundle)
		if err != nil {
			return nil, err
		}
		b, err := authority.ParseBundle(doc)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		bundles[b.Domain()] = b
	}
	return bundles, nil
}

func bundleCommand() command {
	return command{
		name: "bundle", args: "[-data DIR] [-fingerprint]",
		short: "print the trust bundle that the provider publishes, or its root's fingerprint",
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			data, asJSON := dataFlag(f), jsonFlag(f)
			fingerprint := f.Bool("fingerprint", false, "print only the root's fingerprint, by which others approve this provider")
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 0, "none"); err != nil {
					return err
				}
				return with(ctx, *data, func(a *service) error {
					b, err := a.Bundle(ctx)
					if err != nil {
						return err
					}
					roots := b.Fingerprints()
					switch {
					case len(roots) == 0:
						return errors.New("the bundle has no root")
					case *fingerprint && *asJSON:
						return printJSON(s.out, map[string]any{"domain": b.Domain(), "fingerprint": roots[0], "sequence": b.Sequence()})
					case *fingerprint:
						fmt.Fprintln(s.out, roots[0])
						return nil
					}
					fmt.Fprintf(s.out, "%s\n", b.JSON())
					return nil
				})
			}
		},
	}
}
