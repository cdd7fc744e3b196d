package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/node"
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
			config := "domain: alpha.example\ndata: " + dir + "\nlisten: 127.0.0.1:0\ngossip: local\n"
			return os.WriteFile(filepath.Join(env.WorkDir, "node.yaml"), []byte(config), 0o600)
		},
	})
}
