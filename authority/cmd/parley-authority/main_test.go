package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/store"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"parley-authority": main,
		"makecsr":          makeCSR,
		"admin":            serveAdmin,
	})
}

// makeCSR FILE NAME... writes a request of a new key for these URIs.
func makeCSR() {
	key, err := mls.X25519_AES128GCM_SHA256_Ed25519.GenerateSignatureKey(rand.Reader)
	check(err)
	t := &x509.CertificateRequest{}
	for _, n := range os.Args[2:] {
		u, err := url.Parse(n)
		check(err)
		t.URIs = append(t.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	check(err)
	check(os.WriteFile(os.Args[1], pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), 0o600))
}

// serveAdmin DATA holds the store and serves the admin socket as a node does, until it is interrupted.
func serveAdmin() {
	st, err := store.Open(storeDir(os.Args[1]), store.Options{})
	check(err)
	e, err := authority.Open(authorityDir(os.Args[1]), st, nil)
	check(err)
	check(e.SetAddress("127.0.0.1:7441"))
	l, err := net.Listen("unix", socketPath(os.Args[1]))
	check(err)
	srv := &http.Server{Handler: authority.AdminHandler(e)}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	context.AfterFunc(ctx, func() { srv.Close() })
	srv.Serve(l)
	check(e.Close())
	check(st.Close())
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func TestCommands(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Setenv("PARLEY_DATA", "")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits CODE ARGS... runs parley-authority in this process and compares its exit code.
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				var out, err bytes.Buffer
				got := run(context.Background(), args[1:], streams{in: strings.NewReader(""), out: &out, err: &err})
				if fmt.Sprint(got) != args[0] || neg {
					ts.Fatalf("exit code %d, want %s\n%s%s", got, args[0], out.String(), err.String())
				}
			},
			// socket FILE waits until a socket is served there.
			"socket": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 400 {
					c, err := net.Dial("unix", ts.MkAbs(args[0]))
					if err == nil {
						c.Close()
						return
					}
					select {
					case <-t.Context().Done():
						ts.Fatalf("%v", err)
					case <-time.After(25 * time.Millisecond):
					}
				}
				ts.Fatalf("nobody serves %s", args[0])
			},
		},
	})
}
