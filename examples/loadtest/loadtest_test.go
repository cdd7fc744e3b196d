package main

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/parley-mls/parley/examples/internal/org"
)

// The test binary is the example: the nodes that it starts are itself again.
func TestMain(m *testing.M) {
	if code, ok := org.Served(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

func TestEveryWorkloadIsMeasured(t *testing.T) {
	var stdout, stderr bytes.Buffer
	code := run([]string{"-json", "-u", "3", "-rooms", "2", "-claims", "10", "-registered", "4", "-connected", "2", "-away", "100",
		"-t", "100ms", "-window", "16"}, &stdout, &stderr)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	got := make(map[string][]string)
	for line := range strings.Lines(stdout.String()) {
		var r result
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if r.Value <= 0 && !strings.Contains(r.Figure, "CPU") && !strings.HasPrefix(r.Figure, "lost") { // CPU comes in ticks
			t.Errorf("%s: %s is %v %s", r.Workload, r.Figure, r.Value, r.Unit)
		}
		got[r.Workload] = append(got[r.Workload], r.Figure)
	}
	for workload, figure := range map[string]string{
		"latency": "decrypted p99 of 30", "saturation": "deliveries/s", "rooms": "deliveries/s", "claims": "claims/s",
		"outage": "its clients have everything after",
		"scale":  "idle CPU of the nodes", "away": "a peer: messages/s", "limits": "synced batches/s",
	} {
		if !slices.Contains(got[workload], figure) {
			t.Errorf("%s has %q, want %q among them", workload, got[workload], figure)
		}
	}
}

func TestATrackerCompletesAMessageOnceEverybodyHasIt(t *testing.T) {
	tr := newTracker(firstMessage, 2, 2, 1, 1)
	<-tr.senders[0]
	var a, b uint64 = firstMessage, firstMessage
	if err := tr.received(firstMessage, &a); err != nil {
		t.Fatal(err)
	}
	if err := tr.answered(firstMessage, 0); err != nil {
		t.Fatal(err)
	}
	if len(tr.senders[0]) != 0 {
		t.Error("the sender may go on before everybody has the message")
	}
	if err := tr.received(firstMessage, &b); err != nil {
		t.Fatal(err)
	}
	if len(tr.senders[0]) != 1 {
		t.Error("the sender may not go on though everybody has the message")
	}
	if err := tr.received(firstMessage+2, &b); err == nil {
		t.Error("a gap is accepted")
	}
}
