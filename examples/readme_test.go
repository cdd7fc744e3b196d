// Package examples holds programs that show Parley at work, and the test that the README's commands do what it says.
package examples

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/transport/freeport"
)

// The commands under "Run it by hand" run as they stand, in a copy of the sources; only the ports differ, so that
// nothing that listens on this machine is in the way.
func TestReadmeCommandsRunByHand(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	script.WriteString("set -euo pipefail\n")
	blocks := regexp.MustCompile("(?ms)^```sh byhand\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) < 4 {
		t.Fatalf("the README has %d blocks to run by hand", len(blocks))
	}
	for _, b := range blocks {
		script.WriteString(b[1])
	}

	dir := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum", "node", "authority", "federation", "mls", "transport", "configs", "examples"} {
		if out, err := exec.Command("cp", "-r", filepath.Join("..", name), dir).CombinedOutput(); err != nil {
			t.Fatalf("copy %s: %v: %s", name, err, out)
		}
	}
	text := script.String()
	for _, port := range []string{"7441", "7442", "7443"} {
		address, err := freeport.Address()
		if err != nil {
			t.Fatal(err)
		}
		free := strings.TrimPrefix(address, "127.0.0.1")
		text = strings.ReplaceAll(text, ":"+port, free)
		configs, err := filepath.Glob(filepath.Join(dir, "configs", "*.yaml"))
		if err != nil || len(configs) != 3 {
			t.Fatalf("configs: %v, %v", configs, err)
		}
		for _, c := range configs {
			b, err := os.ReadFile(c)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(c, []byte(strings.ReplaceAll(string(b), ":"+port, free)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}

	// The nodes end with the script: wait for them, so that nothing of it is left behind.
	script.Reset()
	script.WriteString("trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT\n")
	script.WriteString(text)
	cmd := exec.Command("bash", "-c", script.String())
	cmd.Dir = dir
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		for _, org := range []string{"alpha", "beta", "gamma"} {
			log, _ := os.ReadFile(filepath.Join(dir, org+".log"))
			t.Logf("log of %s:\n%s", org, log)
		}
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"noon at the usual place?", "see you there", "beta.example", "gamma.example"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
	for path, want := range map[string]os.FileMode{
		"data/alpha": 0o700, "data/alpha/admin.sock": 0o600, "data/alpha/authority/intermediate.key": 0o600, "alpha.root.key": 0o600, "devices/alice": 0o700,
	} {
		info, err := os.Stat(filepath.Join(dir, path))
		if os.IsNotExist(err) && strings.HasSuffix(path, ".sock") {
			continue // gone with the node
		}
		if err != nil {
			t.Error(err)
		} else if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %v, want %v", path, got, want)
		}
	}
}
