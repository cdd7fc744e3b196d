//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// There are no namespaces of the wall clock (time_namespaces(7) has the monotonic ones only), and a Go program doesn't ask
// libc for the time. So nodes whose clocks can be stepped are built with a package time of which one line is changed:
// Now adds what stands in a file, which is mapped into memory. Their code is otherwise that of every node, and they can't
// tell it from a clock that the administrator sets: timers and intervals go by the monotonic clock as ever.

// A clock is what a node's clock is stepped by.
type clock struct{ file *os.File }

func newClock(path string) (*clock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	c := &clock{f}
	return c, c.step(0)
}

// step has the node's clock differ by d, in whole seconds, from the machine's, at once.
func (c *clock) step(d time.Duration) error {
	_, err := c.file.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(d/time.Second)), 0)
	return err
}

func (c *clock) close() { c.file.Close() }

// stepVariable names the file for the changed package time.
const stepVariable = "PARLEY_SIMNET_CLOCK"

const stepSource = `package time

import (
	"sync/atomic"
	"syscall"
	"unsafe"
)

var step = func() *int64 {
	path, ok := syscall.Getenv("` + stepVariable + `")
	if !ok {
		return new(int64)
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY, 0)
	if err != nil {
		panic("time: " + path + ": " + err.Error())
	}
	b, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("time: " + path + ": " + err.Error())
	}
	return (*int64)(unsafe.Pointer(&b[0]))
}()

func stepped() int64 {
	if step == nil { // before this package is initialised
		return 0
	}
	return atomic.LoadInt64(step)
}
`

const nodePackage = "github.com/parley-mls/parley/node/cmd/parley-node"

// buildNode builds a parley-node in dir; stepped says whether its clock can be stepped.
func buildNode(ctx context.Context, dir string, stepped bool) (path string, err error) {
	path = filepath.Join(dir, "parley-node")
	args := []string{"build", "-o", path}
	if stepped {
		overlay, err := overlayTime(ctx, dir)
		if err != nil {
			return "", err
		}
		args = append(args, "-overlay", overlay)
	}
	if out, err := exec.CommandContext(ctx, "go", append(args, nodePackage)...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build parley-node: %w: %s", err, out)
	}
	return path, nil
}

// overlayTime writes the changed package time, and the file that has the compiler take it (go help build: -overlay).
func overlayTime(ctx context.Context, dir string) (overlay string, err error) {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("ask for GOROOT: %w", err)
	}
	original := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	src, err := os.ReadFile(filepath.Join(original, "time.go"))
	if err != nil {
		return "", err
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if strings.Count(string(src), now) != 1 {
		return "", fmt.Errorf("time.Now of this Go release isn't the one that can be changed")
	}
	changed := strings.Replace(string(src), now, now+"\tsec += stepped()\n", 1)
	replace := make(map[string]string)
	for name, text := range map[string]string{"time.go": changed, "step.go": stepSource} {
		at := filepath.Join(dir, "time_"+name)
		if err := os.WriteFile(at, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(original, name)] = at
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay = filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, b, 0o600)
}

// stepClocks gives every node a clock, before it starts.
func (w *world) stepClocks() error {
	for i, o := range w.orgs {
		path := filepath.Join(w.dir, names[i], "clock")
		c, err := newClock(path)
		if err != nil {
			return err
		}
		w.clocks = append(w.clocks, c)
		site := w.net.sites[i]
		o.Spawn = func(cmd *exec.Cmd) error {
			cmd.Env = append(os.Environ(), stepVariable+"="+path)
			return site.spawn(cmd)
		}
	}
	return nil
}
