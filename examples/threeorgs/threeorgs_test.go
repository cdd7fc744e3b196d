package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/examples/internal/org"
	"github.com/parley-mls/parley/node/client"
)

// The test binary is the example: the nodes that it starts are itself again.
func TestMain(m *testing.M) {
	if code, ok := org.Served(os.Args); ok {
		os.Exit(code)
	}
	if os.Getenv("THREEORGS_PLAY") == "1" {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// perform runs the example as a process of its own and returns its steps and exit code.
func perform(t *testing.T, args ...string) (lines []stepLine, code int) {
	t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"-json"}, args...)...)
	cmd.Env = append(os.Environ(), "THREEORGS_PLAY=1")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	for line := range strings.Lines(stdout.String()) {
		var l stepLine
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%q: %v\n%s", line, err, stderr.String())
		}
		lines = append(lines, l)
	}
	return lines, cmd.ProcessState.ExitCode()
}

func TestThreeOrganisationsShareARoom(t *testing.T) {
	lines, code := perform(t)
	for _, l := range lines {
		t.Logf("%v %s %d ms %s", l.OK, l.Step, l.MS, l.Detail)
	}
	if code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if want := len(steps) + 1; len(lines) != want {
		t.Errorf("%d lines, want %d", len(lines), want)
	}
}

// Each check can fail: with its step sabotaged the example says so, names the step and exits with 1.
func TestEachSabotagedStepIsFound(t *testing.T) {
	for i, s := range steps {
		t.Run(s.name, func(t *testing.T) {
			lines, code := perform(t, "-break", s.name, "-patience", "3s")
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			for j, l := range lines {
				if l.Step == s.name && l.OK {
					t.Errorf("the sabotaged step passed: %s", l.Detail)
				}
				if j < i && !l.OK {
					t.Errorf("step %s failed before the sabotaged one: %s", l.Step, l.Detail)
				}
			}
			if want := i + 2; len(lines) != want {
				t.Fatalf("%d lines, want %d: the steps up to the sabotaged one, and the sum", len(lines), want)
			}
		})
	}
}

func TestUnknownStepIsAUsageError(t *testing.T) {
	if _, code := perform(t, "-break", "nothing"); code != 2 {
		t.Errorf("exit code %d, want 2", code)
	}
}

// With -keep the nodes stay up, and whoever enrols with the invitation that is printed comes into the room.
func TestKeptNetworkTakesInAnotherPerson(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-keep")
	cmd.Env = append(os.Environ(), "THREEORGS_PLAY=1")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(stderr)
	await := func(pattern string) string {
		for lines.Scan() {
			if m := regexp.MustCompile(pattern).FindStringSubmatch(lines.Text()); m != nil {
				return m[len(m)-1]
			}
		}
		t.Fatalf("no line like %s: %v", pattern, lines.Err())
		return ""
	}
	invitation := await(`enrol '(parley:[^']+)'`)
	inv, err := authority.ParseInvitation(invitation)
	if err != nil {
		t.Fatal(err)
	}
	dora, err := client.Enrol(t.Context(), client.Options{Dir: t.TempDir() + "/dora"}, inv, "dora-laptop")
	if err != nil {
		t.Fatal(err)
	}
	defer dora.Close()
	await("alice added dora")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("interrupted: %v", err)
	}
}
