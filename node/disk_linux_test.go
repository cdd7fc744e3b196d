package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/api"
)

// small is the size of the file system that a test gets to fill, in MiB.
const small = 48

// onSmallDisk runs the test in a process of its own, with a file system of its own for its temporary files: a mount
// namespace in which a tmpfs is mounted. It says in which of both processes it is.
func onSmallDisk(t *testing.T) (there bool) {
	const inside = "PARLEY_TEST_SMALL_DISK"
	if dir := os.Getenv(inside); dir != "" {
		err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
		if err == nil {
			err = syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", small))
		}
		if err != nil {
			fmt.Println("SKIP", err)
			t.Skip()
		}
		t.Setenv("TMPDIR", dir)
		return true
	}
	dir, err := os.MkdirTemp("", "small")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dir)
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), inside+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	_, ran := errors.AsType[*exec.ExitError](err)
	switch {
	case err != nil && !ran:
		t.Skipf("no mount namespace to fill a disk in: %v", err)
	case strings.Contains(string(out), "SKIP"):
		t.Skipf("no file system to fill can be mounted here: %s", out)
	case err != nil:
		t.Errorf("%v\n%s", err, out)
	default:
		t.Logf("%s", out)
	}
	return false
}

// fillUp writes a file until only so many bytes are free, or fewer.
func fillUp(t *testing.T, free uint64) (remove func()) {
	t.Helper()
	f, err := os.CreateTemp("", "filler")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	chunk := make([]byte, 64<<10)
	for {
		var s syscall.Statfs_t
		if err := syscall.Statfs(filepath.Dir(f.Name()), &s); err != nil {
			t.Fatal(err)
		}
		if s.Bavail*uint64(s.Bsize) <= free {
			break
		}
		if _, err := f.Write(chunk); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(f.Name()); err != nil {
			t.Error(err)
		}
	}
}

// TestANodeOutlivesItsFullDisk fills a real file system: to the reserve, to the last byte, across a restart, and makes room
// again.
func TestANodeOutlivesItsFullDisk(t *testing.T) {
	if !onSmallDisk(t) {
		return
	}
	n := newNode(t, "alpha")
	n.stop()
	n.cfg.diskFree, n.cfg.Disk = nil, DiskConfig{ReserveMiB: 6, BallastMiB: 4}
	n.start()
	readOnly := func(want bool) {
		t.Helper()
		eventually(t, func() error {
			s, err := DialAdmin(n.cfg.Socket()).Status(t.Context())
			if err == nil && s.ReadOnly != want {
				err = fmt.Errorf("the node is read-only: %v, with %d bytes free", s.ReadOnly, s.DiskFree)
			}
			return err
		})
	}
	alice := newClient(t, n, "alice", "alice-laptop")
	bob := newClient(t, n, "bob", "bob-phone")
	bob.publish(4)
	alice.createRoom()
	alices := alice.subscribe()
	alices.live()
	bobs := bob.subscribe()
	bobs.live()
	seq := alice.commit(alice.adding(bob.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.group != nil })
	alice.uploadAll(make([]byte, 100_000))
	var accepted []string
	send := func(text string) {
		t.Helper()
		alice.send(text)
		accepted = append(accepted, text)
	}
	acknowledge := func(times int) {
		t.Helper()
		for range times {
			if _, err := bob.api.Acknowledge(t.Context(), connect.NewRequest(&api.AcknowledgeRequest{Cursors: []*api.Cursor{{Room: string(bob.room), Seq: bob.seq}}})); err != nil {
				t.Fatalf("acknowledging: %v", err)
			}
		}
	}
	send("before")
	readOnly(false)

	// Somebody else uses up the disk, to the reserve.
	first := fillUp(t, 5<<20)
	readOnly(true)
	waiting := alice.seal("waiting")
	refused := func() {
		t.Helper()
		if _, _, err := alice.submit(waiting); code(err) != "unavailable" {
			t.Errorf("a message while the disk is nearly full: %v", err)
		}
	}
	refused()
	acknowledge(20)
	if resp, err := alice.claim(bob.user); err != nil || resp.Code != mimi.KeyMaterialSuccess {
		t.Errorf("a claim: %+v, %v", resp, err)
	}

	// To the last byte.
	second := fillUp(t, 0)
	acknowledge(200)
	refused()
	n.stop()
	n.start()
	ballast := filepath.Join(StoreDir(n.cfg.Data), "BALLAST")
	if _, err := os.Stat(ballast); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the node was opened on a full disk with the ballast on it: %v", err)
	}
	alice.authenticate()
	bob.authenticate()
	readOnly(true)
	refused()
	acknowledge(20)
	bobs = bob.subscribe()
	bobs.until(func() bool { return slices.Equal(bob.texts, accepted) })

	second()
	first()
	readOnly(false)
	resp, _, err := alice.submit(waiting)
	if err != nil || resp.Code != mimi.SubmitAccepted {
		t.Fatalf("with space again: %+v, %v", resp, err)
	}
	accepted = append(accepted, "waiting")
	send("after")
	bobs.until(func() bool { return len(bob.texts) >= len(accepted) })
	if !slices.Equal(bob.texts, accepted) {
		t.Errorf("bob reads %q, want %q", bob.texts, accepted)
	}
	if info, err := os.Stat(ballast); err != nil || info.Size() != 4<<20 {
		t.Errorf("the ballast isn't back: %v", err)
	}
}
