// Package tsmls holds groups in which clients of this module and of ts-mls, an implementation in TypeScript with
// nothing in common with this one, are members together: each side makes what the other must take, and all have to
// agree on every epoch. The test starts ts-mls under Node.js with the script driver.mjs.
package tsmls

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

//go:embed package.json
var packageJSON []byte

//go:embed package-lock.json
var packageLock []byte

//go:embed driver.mjs
var driver string

// absent ends a test that can't run here: a failure where the environment variable CI is set, else skipped.
func absent(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(err)
	}
	t.Skip(err)
}

// packages returns the folder with ts-mls and what it needs in its versions of package-lock.json, which npm installs
// into the user's cache once.
var packages = sync.OnceValues(func() (string, error) {
	version, err := exec.Command("node", "--print", "process.versions.node").Output()
	if err != nil {
		return "", fmt.Errorf("ts-mls needs Node.js 20 or later with npm, see nodejs.org: %w", err)
	}
	major, _, _ := strings.Cut(string(version), ".")
	if n, err := strconv.Atoi(major); err != nil || n < 20 {
		return "", fmt.Errorf("ts-mls needs Node.js 20 or later, see nodejs.org: this is %s", bytes.TrimSpace(version))
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	cache = filepath.Join(cache, "parley")
	dir := filepath.Join(cache, fmt.Sprintf("ts-mls-%x", sha256.Sum256(packageLock))[:23])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "installing-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	for name, b := range map[string][]byte{"package.json": packageJSON, "package-lock.json": packageLock} {
		if err := os.WriteFile(filepath.Join(tmp, name), b, 0o600); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1")
	npm.Dir = tmp
	if out, err := npm.CombinedOutput(); err != nil {
		return "", fmt.Errorf("ts-mls is not in %s yet and can't be fetched: npm ci: %w\n%s", dir, err, out)
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, err := os.Stat(dir); err != nil { // no other process has installed it meanwhile
			return "", err
		}
	}
	return dir, nil
})

// node is a process that runs driver.mjs. It belongs to one test at a time; what later tests find is warm.
type node struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
	log bytes.Buffer // standard error; read after the process has ended
	cmd *exec.Cmd
}

var idle = make(chan *node, 64)

func TestMain(m *testing.M) {
	code := m.Run()
	for len(idle) > 0 {
		(<-idle).end()
	}
	os.Exit(code)
}

func startNode(t *testing.T) *node {
	t.Helper()
	var n *node
	select {
	case n = <-idle:
	default:
		n = newNode(t)
	}
	n.t = t
	t.Cleanup(func() {
		if t.Failed() {
			n.end()
		} else {
			n.call(request{Op: "reset"})
			idle <- n
		}
	})
	return n
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := packages()
	if err != nil {
		absent(t, err)
	}
	n := &node{cmd: exec.Command("node", "--input-type=module", "--eval", driver)}
	n.cmd.Dir = dir // where the script's imports are looked for
	n.cmd.Stderr = &n.log
	if n.in, err = n.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	n.out = bufio.NewReader(out)
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) end() error {
	late := time.AfterFunc(10*time.Second, func() { n.cmd.Process.Kill() })
	defer late.Stop()
	return errors.Join(n.in.Close(), n.cmd.Wait())
}

// request is what the driver is asked, answer what it says. Absent fields are zero.
type request struct {
	Op     string
	Client string `json:",omitempty"`

	Suite          uint16         `json:",omitempty"`
	Identity       []byte         `json:",omitempty"`
	Certificates   [][]byte       `json:",omitempty"`
	Capabilities   map[string]any `json:",omitempty"`
	LeafExtensions any            `json:",omitempty"`
	PSKs           []psk          `json:",omitempty"`

	GroupID    []byte `json:",omitempty"`
	Extensions any    `json:",omitempty"` // mls.Extensions
	Welcome    []byte `json:",omitempty"`
	GroupInfo  []byte `json:",omitempty"`
	Tree       []byte `json:",omitempty"`
	Resync     bool   `json:",omitempty"`

	From        string   `json:",omitempty"`
	KeyPackages [][]byte `json:",omitempty"`
	Branch      bool     `json:",omitempty"`

	Proposal      []byte   `json:",omitempty"`
	Proposals     [][]byte `json:",omitempty"`
	Private       bool     `json:",omitempty"`
	TreeInWelcome bool     `json:",omitempty"`
	WithTree      bool     `json:",omitempty"`
	Message       []byte   `json:",omitempty"`
	Data          []byte   `json:",omitempty"`
	AAD           []byte   `json:",omitempty"`
}

type answer struct {
	Error string

	Suites, Proposals                 []uint16
	Message, Welcome, GroupInfo, Tree []byte
	Kind                              string
	Data                              []byte
	Active                            string
	Leaf                              uint32
	Context, Authenticator, Exported  []byte
}

type psk struct{ ID, Secret []byte }

// tsError is an error of ts-mls.
type tsError string

func (e tsError) Error() string { return "ts-mls: " + string(e) }

func (n *node) call(r request) (answer, error) {
	n.t.Helper()
	b, err := json.Marshal(r)
	if err != nil {
		n.t.Fatal(err)
	}
	late := time.AfterFunc(time.Minute, func() { n.cmd.Process.Kill() })
	defer late.Stop()
	var line []byte
	if _, err = n.in.Write(append(b, '\n')); err == nil {
		line, err = n.out.ReadBytes('\n')
	}
	if err != nil {
		n.t.Fatalf("%s: node: %v\n%s", r.Op, errors.Join(err, n.end()), &n.log)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		n.t.Fatalf("%s: %v: %s", r.Op, err, strconv.Quote(string(line)))
	}
	if a.Error != "" {
		return a, tsError(a.Error)
	}
	return a, nil
}
