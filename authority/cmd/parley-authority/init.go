package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/term"

	"github.com/parley-mls/parley/authority"
)

func initCommand() command {
	return command{
		name: "init", args: "-domain DOMAIN [-data DIR] [-root-key FILE] [-passphrase-file FILE] [-key-type TYPE]",
		short: "create an authority",
		long: `The root's key is encrypted with a passphrase, asked for unless it is in a file. It is needed only to replace
the intermediate, which issues: with -root-key, keep it away from the node. Prints the root's fingerprint, by which
other providers approve this one.`,
		setup: func(f *flag.FlagSet) func(context.Context, streams, []string) error {
			domain := f.String("domain", "", "the provider's `domain`, such as alpha.example")
			data := dataFlag(f)
			rootKey := f.String("root-key", "", "`file` for the root's encrypted key (default DIR/authority/root.key)")
			passphraseFile := f.String("passphrase-file", "", "`file` whose first line is the passphrase")
			keyType := f.String("key-type", string(authority.KeyP256), "p256, p384, p521 or ed25519, for root and intermediate")
			asJSON := jsonFlag(f)
			return func(ctx context.Context, s streams, args []string) error {
				if err := arity(args, 0, "none"); err != nil {
					return err
				}
				if *domain == "" {
					return usagef("-domain is missing")
				}
				passphrase, err := readPassphrase(s, *passphraseFile)
				if err != nil {
					return err
				}
				dir := authorityDir(*data)
				fingerprint, err := authority.Init(dir, authority.InitOptions{Domain: *domain, Passphrase: passphrase, RootKeyPath: *rootKey,
					KeyType: authority.KeyType(*keyType)})
				if err != nil {
					return err
				}
				key := *rootKey
				if key == "" {
					key = filepath.Join(dir, "root.key")
				}
				if *asJSON {
					return printJSON(s.out, map[string]string{"domain": *domain, "fingerprint": fingerprint.String(), "directory": dir, "root_key": key})
				}
				fmt.Fprintf(s.out, "Created the authority of %s in %s.\n", *domain, dir)
				fmt.Fprintf(s.out, "Root fingerprint: %s\n", fingerprint)
				fmt.Fprintf(s.out, "The root's key is in %s; keep it and its passphrase away from the node.\n", key)
				return nil
			}
		},
	}
}

const maxPassphrase = 4096

// readPassphrase reads the file's first line, or asks at the terminal.
func readPassphrase(s streams, path string) ([]byte, error) {
	if path != "" {
		b, err := readInput(s, path, maxPassphrase)
		if err != nil {
			return nil, fmt.Errorf("passphrase: %w", err)
		}
		line, _, _ := bytes.Cut(b, []byte("\n"))
		return bytes.TrimSuffix(line, []byte("\r")), nil
	}
	in, ok := s.in.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, usagef("there is no terminal to ask for a passphrase: give -passphrase-file")
	}
	ask := func(prompt string) ([]byte, error) {
		fmt.Fprint(s.err, prompt)
		defer fmt.Fprintln(s.err)
		return term.ReadPassword(int(in.Fd()))
	}
	first, err := ask("Passphrase for the root's key: ")
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	second, err := ask("Once more: ")
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	if !bytes.Equal(first, second) {
		return nil, errors.New("the passphrases differ; nothing was done")
	}
	return first, nil
}
