package main

import (
	"context"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
)

func inviteCommand() command {
	return command{
		name: "invite", args: "[-data DIR] [-ttl DURATION] USER",
		short: "invite a user to enrol one device",
		long: `Prints the invitation as one line, for the user to paste. Whoever has it can enrol as that user, once: send it
over a channel that only the user reads. USER is a name such as alice, or a MIMI URI.`,
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			data, asJSON := dataFlag(f), jsonFlag(f)
			ttl := f.Duration("ttl", 24*time.Hour, "how long the invitation is open, at most 720h")
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 1, "USER"); err != nil {
					return err
				}
				return with(ctx, *data, func(a *service) error {
					user, err := parseName(args[0], mimi.KindUser, a.Domain())
					if err != nil {
						return err
					}
					i, err := a.Invite(ctx, user, *ttl)
					if err != nil {
						return err
					}
					if i.Address == "" {
						fmt.Fprintln(s.err, "The node has never run, so the invitation doesn't say where it is; start it first.")
					}
					if *asJSON {
						return printJSON(s.out, struct {
							Invitation authority.Invitation `json:"invitation"`
							User       mimi.URI             `json:"user"`
							Address    string               `json:"address"`
							Expires    time.Time            `json:"expires"`
						}{i, i.User, i.Address, i.Expires})
					}
					fmt.Fprintln(s.out, i)
					return nil
				})
			}
		},
	}
}

func issueCommand() command {
	return command{
		name: "issue", args: "[-data DIR] [-out FILE] CSR",
		short: "issue a certificate for a CSR, without an invitation",
		long: `CSR is a file with a PKCS #10 request in PEM or DER, or - for standard input. Its names are one user and one
client of the domain, as URIs. Prints the chain in PEM, without the root.`,
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			data, asJSON := dataFlag(f), jsonFlag(f)
			out := f.String("out", "", "`file` for the chain, which must not exist")
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 1, "CSR"); err != nil {
					return err
				}
				csr, err := readInput(s, args[0], maxInput)
				if err != nil {
					return err
				}
				if block, _ := pem.Decode(csr); block != nil {
					csr = block.Bytes
				}
				return with(ctx, *data, func(a *service) error {
					chain, err := a.Issue(ctx, csr)
					if err != nil {
						return err
					}
					text := chainPEM(chain)
					if *out != "" {
						if err := writeNew(*out, text); err != nil {
							return err
						}
					}
					if *asJSON {
						return printChainJSON(s.out, chain)
					}
					if *out == "" {
						_, err = s.out.Write(text)
					}
					return err
				})
			}
		},
	}
}

func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func listCommand() command {
	return command{
		name: "list", args: "[-data DIR] [-user USER] [-client CLIENT] [-valid] [-revoked]",
		short: "list the issued certificates",
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			data, asJSON := dataFlag(f), jsonFlag(f)
			user := f.String("user", "", "only those of this `user`, a name or a URI")
			client := f.String("client", "", "only those of this `client`, a name or a URI")
			valid := f.Bool("valid", false, "only those that are neither expired nor revoked")
			revoked := f.Bool("revoked", false, "only revoked ones")
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 0, "none"); err != nil {
					return err
				}
				return with(ctx, *data, func(a *service) error {
					filter := authority.Filter{Revoked: *revoked}
					var err error
					if *user != "" {
						if filter.User, err = parseName(*user, mimi.KindUser, a.Domain()); err != nil {
							return err
						}
					}
					if *client != "" {
						if filter.Client, err = parseName(*client, mimi.KindClient, a.Domain()); err != nil {
							return err
						}
					}
					if *valid {
						filter.ValidAt = time.Now()
					}
					list, err := a.List(ctx, filter)
					if err != nil {
						return err
					}
					if *asJSON {
						if list == nil {
							list = []authority.Certificate{}
						}
						return printJSON(s.out, list)
					}
					w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
					fmt.Fprintln(w, "SERIAL\tUSER\tCLIENT\tUNTIL\tSTATUS")
					for _, c := range list {
						fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", c.Serial, dash(c.User), dash(c.Client), c.NotAfter.UTC().Format(time.DateOnly), status(c))
					}
					return w.Flush()
				})
			}
		},
	}
}

func dash(u mimi.URI) string {
	if u == "" {
		return "-"
	}
	return string(u)
}

func status(c authority.Certificate) string {
	switch {
	case !c.Revoked.IsZero() && c.Reason != "":
		return fmt.Sprintf("revoked %s: %s", c.Revoked.UTC().Format(time.DateOnly), c.Reason)
	case !c.Revoked.IsZero():
		return "revoked " + c.Revoked.UTC().Format(time.DateOnly)
	case time.Now().After(c.NotAfter):
		return "expired"
	case c.Node:
		return "valid (node)"
	}
	return "valid"
}

func revokeCommand() command {
	return command{
		name: "revoke", args: "[-data DIR] [-reason TEXT] CLIENT | u/USER | SERIAL",
		short: "revoke a client's or user's certificates, or one",
		long: `CLIENT is the name of a client such as alice-laptop (or d/alice-laptop), u/alice is all of a user's clients;
MIMI URIs serve too. A serial number is in lower-case hexadecimal, as list prints it, after "serial:". A running
node tells peers and rooms at once.`,
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			data, asJSON := dataFlag(f), jsonFlag(f)
			reason := f.String("reason", "", "why: any `text`, or keyCompromise, superseded, cessationOfOperation, privilegeWithdrawn")
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 1, "one name or serial number"); err != nil {
					return err
				}
				return with(ctx, *data, func(a *service) error {
					name, err := revokeName(args[0], a.Domain())
					if err != nil {
						return err
					}
					c, err := a.Revoke(ctx, name, *reason)
					if err != nil {
						return err
					}
					if *asJSON {
						return printJSON(s.out, c)
					}
					fmt.Fprintf(s.out, "Revoked %s\n", strings.TrimPrefix(name, "serial:"))
					if !a.running() {
						fmt.Fprintln(s.err, "The node doesn't run: peers and rooms learn of it when it starts.")
					}
					return nil
				})
			}
		},
	}
}

// revokeName turns the forms of the command line into those of the service.
func revokeName(s, domain string) (string, error) {
	if serial, ok := strings.CutPrefix(s, "serial:"); ok {
		return serial, nil
	}
	kind, id := mimi.KindClient, s
	if user, ok := strings.CutPrefix(s, "u/"); ok {
		kind, id = mimi.KindUser, user
	} else if client, ok := strings.CutPrefix(s, "d/"); ok {
		id = client
	} else if u, err := mimi.ParseURI(s); err == nil {
		kind = u.Kind()
	}
	u, err := parseName(id, kind, domain)
	return string(u), err
}
