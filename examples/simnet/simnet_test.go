//go:build linux

package main

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The test binary is the command: the nodes and the hosts of clients that it starts are itself again.
func TestMain(m *testing.M) {
	for _, as := range os.Args[1:min(2, len(os.Args))] {
		if as == "serve" || as == "host" {
			os.Exit(command(os.Args, os.Stdout, os.Stderr))
		}
	}
	os.Exit(m.Run())
}

// namespaces skips a test where there are none, unless they must be there.
func namespaces(t *testing.T) {
	t.Helper()
	if err := unsupported(); err != nil {
		if os.Getenv("CI") != "" && os.Geteuid() == 0 {
			t.Fatal(err)
		}
		t.Skip("no network namespaces: ", err)
	}
}

func TestNothingIsLostInNamespaces(t *testing.T) {
	namespaces(t)
	var stdout, stderr bytes.Buffer
	code := run([]string{
		"-node", "self", "-scenario", "kill,hang,partition,weather,absent,restart", "-duration", "2s",
		"-clients", "3", "-rooms", "3", "-rate", "15", "-seed", "1",
	}, &stdout, &stderr)
	t.Logf("%s", &stdout)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	for _, scenario := range []string{"kill", "hang", "partition", "weather", "absent", "restart"} {
		if !regexp.MustCompile(`(?m)^` + scenario + ` .* 0$`).Match(stdout.Bytes()) {
			t.Errorf("the table has no row of %s without faults", scenario)
		}
	}
}

func TestALinkThatIsDownCutsANodeOff(t *testing.T) {
	namespaces(t)
	n, echo := echoed(t)
	if err := n.sites[0].setLink(false); err != nil {
		t.Fatal(err)
	}
	if echo("down") {
		t.Error("a packet passes a link that is down")
	}
	if err := n.sites[0].setLink(true); err != nil {
		t.Fatal(err)
	}
	passes(t, echo)
}

func TestTheWeatherLosesDelaysAndReorders(t *testing.T) {
	namespaces(t)
	n, echo := echoed(t)
	n.weather(weather{loss: 1})
	if echo("lost") {
		t.Error("a packet passes that is to be lost")
	}
	n.weather(weather{delay: 30 * time.Millisecond})
	if began := time.Now(); !echo("late") || time.Since(began) < 60*time.Millisecond {
		t.Errorf("there and back in %v, want 60 ms", time.Since(began))
	}
	n.weather(weather{})
	r := n.sites[0].relay
	before := r.overtaken.Load()
	n.weather(weather{delay: time.Millisecond, reorder: 1, shuffle: time.Millisecond})
	if !echo("held") || r.overtaken.Load() != before+2 {
		t.Errorf("%d packets were held back, want 2", r.overtaken.Load()-before)
	}
}

// echoed is a network with an echo in place of its first node, and says whether a packet comes back through the relay.
func echoed(t *testing.T) (*network, func(text string) bool) {
	n, err := newNetwork([]string{"alpha", "beta"}, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.close)
	server, err := n.sites[0].listenUDP(n.sites[0].inner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	go func() {
		b := make([]byte, maxPacket)
		for {
			size, from, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			server.WriteToUDPAddrPort(b[:size], from)
		}
	}()
	peer, err := n.sites[1].listenUDP(n.sites[1].inner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	to, err := net.ResolveUDPAddr("udp4", n.sites[0].outer)
	if err != nil {
		t.Fatal(err)
	}
	echo := func(text string) bool {
		peer.WriteToUDP([]byte(text), to)
		peer.SetReadDeadline(time.Now().Add(time.Second))
		b := make([]byte, maxPacket)
		for {
			size, _, err := peer.ReadFromUDP(b)
			if err != nil || string(b[:size]) == text {
				return err == nil
			} // else it is one that came too late
		}
	}
	passes(t, echo)
	return n, echo
}

// passes waits until packets pass: the kernel takes its time with a link that has just come up.
func passes(t *testing.T, echo func(string) bool) {
	t.Helper()
	for range 5 {
		if echo("hello") {
			return
		}
	}
	t.Fatal("nothing passes the relay")
}

// What the scenario clock rests on: a program that is built with the changed package time has the clock that it is given.
func TestAProgramsClockIsStepped(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles package time")
	}
	dir := t.TempDir()
	overlay, err := overlayTime(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := newClock(dir + "/clock")
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.step(-time.Hour); err != nil {
		t.Fatal(err)
	}
	// It imports little, so that little is compiled.
	const source = "package main\n\nimport \"time\"\n\nfunc main() { println(time.Now().Unix()) }\n"
	if err := os.WriteFile(dir+"/main.go", []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-overlay", overlay, "-o", dir+"/clocked", dir+"/main.go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	show := exec.Command(dir + "/clocked")
	show.Env = append(os.Environ(), stepVariable+"="+dir+"/clock")
	out, err := show.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	at, err := time.ParseDuration(strings.TrimSpace(string(out)) + "s")
	if err != nil {
		t.Fatal(err)
	}
	if off := time.Until(time.Unix(int64(at.Seconds()), 0)) + time.Hour; off.Abs() > 10*time.Second {
		t.Errorf("the clock is %v off, want an hour behind", off)
	}
}
