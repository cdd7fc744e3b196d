package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"parley-node": main})
}

func TestCommands(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			// Paths of unix sockets are short.
			dir, err := os.MkdirTemp("", "parley")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			root, err := authority.Init(node.AuthorityDir(dir), authority.InitOptions{
				Domain: "alpha.example", Passphrase: []byte("correct horse"), RootKeyPath: filepath.Join(dir, "root.key"),
			})
			if err != nil {
				return err
			}
			env.Setenv("PARLEY_DATA", dir)
			env.Setenv("ROOT", root.String())
			if err := writeEvidence(dir, env.WorkDir); err != nil {
				return err
			}
			config := "domain: alpha.example\ndata: " + dir + "\nlisten: 127.0.0.1:0\ngossip: local\n"
			return os.WriteFile(filepath.Join(env.WorkDir, "node.yaml"), []byte(config), 0o600)
		},
	})
}

// writeEvidence writes evidence against the hub of that data directory, and what says the same of an honest one.
func writeEvidence(data, dir string) (err error) {
	db, err := store.Open(filepath.Join(dir, "authority-store"), store.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	a, err := authority.Open(node.AuthorityDir(data), db, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	pub, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	certificates, err := a.IssueHub(context.Background(), pub)
	if err != nil {
		return err
	}
	bundle, err := a.Bundle(context.Background())
	if err != nil {
		return err
	}
	sign := func(seq uint64, h chain.Hash) *chain.Signed {
		head := chain.Head{Room: "mimi://alpha.example/r/lunch", Suite: mls.X25519_AES128GCM_SHA256_Ed25519, Place: chain.Place{Incarnation: 7, Seq: seq, Chain: h}}
		s, e := chain.Sign(rand.Reader, private, head)
		err = errors.Join(err, e)
		return s
	}
	links := []chain.Link{{}}
	e := chain.Contradict(sign(4, chain.Hash{1}), sign(5, chain.Hash{2}.Fold(4, links)), chain.Hash{2}, links)
	if err != nil || e == nil {
		return errors.Join(err, errors.New("no evidence"))
	}
	e.Hubs = []mls.ExternalSender{{SignatureKey: []byte(pub), Credential: mls.X509Credential(certificates)}}
	e.Bundle = bundle.JSON()
	good := e.File()
	e.First.Chain[0]++
	return errors.Join(os.WriteFile(filepath.Join(dir, "evidence.pem"), good, 0o600), os.WriteFile(filepath.Join(dir, "forged.pem"), e.File(), 0o600))
}
