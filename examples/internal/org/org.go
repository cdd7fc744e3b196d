// Package org runs organisations for the examples: each with an authority, a node in a process of its own, and a directory.
// The process is the program itself again, so that nothing has to be built before: its main hands the arguments to Served.
package org

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/transport/freeport"
)

// An Org is an organisation: its domain, its directory and its node's process. Domain and Dir are given; the zero value of
// every other field has a default.
type Org struct {
	Domain      string
	Dir         string
	Address     string                // where the node is reached, host:port; if it is empty, Init finds one on loopback
	Listen      string                // host:port that the node binds; empty means Address
	Gossip      string                // profile of the node's gossip; empty means "local"
	Program     string                // path of a parley-node; empty means this program, which calls Served
	Spawn       func(*exec.Cmd) error // starts the node's process; nil means its Start
	Fingerprint authority.Fingerprint // of the authority's root, set by Init

	process *exec.Cmd
	ended   chan error // has the process's end, once
	leash   io.WriteCloser
}

func (o *Org) configPath() string { return filepath.Join(o.Dir, "node.yaml") }

// Socket is the path of the node's admin socket.
func (o *Org) Socket() string { return filepath.Join(o.Dir, "admin.sock") }

// Init creates the organisation's authority and its node's configuration, as parley-authority init and an editor would.
// more is further lines of the configuration, YAML.
func (o *Org) Init(more string) error {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of %s: %w", o.Domain, err)
	}
	passphrase := []byte(rand.Text())
	f, err := authority.Init(filepath.Join(o.Dir, "authority"), authority.InitOptions{Domain: o.Domain, Passphrase: passphrase})
	if err != nil {
		return fmt.Errorf("create the authority of %s: %w", o.Domain, err)
	}
	o.Fingerprint = f
	if o.Address == "" {
		if o.Address, err = freeport.Address(); err != nil {
			return err
		}
	}
	config := fmt.Sprintf("domain: %s\ndata: %s\nlisten: %s\nadvertise: %s\ngossip: %s\n", o.Domain, o.Dir,
		cmp.Or(o.Listen, o.Address), o.Address, cmp.Or(o.Gossip, "local")) + more
	return os.WriteFile(o.configPath(), []byte(config), 0o600)
}

// Start starts the node's process and waits until it answers on its admin socket.
func (o *Org) Start(ctx context.Context) error {
	program := o.Program
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
	}
	logFile, err := os.OpenFile(filepath.Join(o.Dir, "node.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the log of %s: %w", o.Domain, err)
	}
	defer logFile.Close()
	cmd := exec.Command(program, "serve", "-config", o.configPath())
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// The node ends when this pipe does, so that no node outlives a play that crashed. A parley-node doesn't: Spawn's part.
	if o.leash, err = cmd.StdinPipe(); err != nil {
		return fmt.Errorf("start the node of %s: %w", o.Domain, err)
	}
	spawn := o.Spawn
	if spawn == nil {
		spawn = (*exec.Cmd).Start
	}
	if err := spawn(cmd); err != nil {
		return fmt.Errorf("start the node of %s: %w", o.Domain, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	o.process, o.ended = cmd, ended

	deadline := time.After(20 * time.Second)
	for {
		_, err := node.DialAdmin(o.Socket()).Status(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
			o.process = nil
			return fmt.Errorf("the node of %s ended at its start: %s", o.Domain, lastLine(filepath.Join(o.Dir, "node.log")))
		case <-deadline:
			return fmt.Errorf("the node of %s doesn't answer: %w", o.Domain, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// PID is the node's process, 0 while it is down.
func (o *Org) PID() int {
	if o.process == nil {
		return 0
	}
	return o.process.Process.Pid
}

// Kill ends the node with SIGKILL, as a power cut would.
func (o *Org) Kill() error {
	if err := o.process.Process.Kill(); err != nil {
		return fmt.Errorf("kill the node of %s: %w", o.Domain, err)
	}
	<-o.ended
	o.process = nil
	return nil
}

// Terminate ends the node in the ordinary way, and by force after a while.
func (o *Org) Terminate() {
	if o.process == nil {
		return
	}
	o.process.Process.Signal(syscall.SIGTERM)
	select {
	case <-o.ended:
	case <-time.After(10 * time.Second):
		o.process.Process.Kill()
		<-o.ended
	}
	o.process = nil
}

// Approve has the operator approve a peer by the fingerprint of its root; address may be empty if gossip knows it.
func (o *Org) Approve(ctx context.Context, peer *Org, f authority.Fingerprint, address string) error {
	return node.DialAdmin(o.Socket()).ApprovePeer(ctx, peer.Domain, f, address)
}

// WaitPeers waits until the node sees n approved peers alive.
func (o *Org) WaitPeers(ctx context.Context, n int, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		peers, err := node.DialAdmin(o.Socket()).Peers(ctx)
		if err != nil {
			return fmt.Errorf("ask %s for its peers: %w", o.Domain, err)
		}
		alive := 0
		for _, p := range peers {
			if p.Approved && p.Alive {
				alive++
			}
		}
		if alive >= n {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s sees %d of %d peers", o.Domain, alive, n)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Invite makes an invitation for one device of a user.
func (o *Org) Invite(ctx context.Context, user string) (authority.Invitation, error) {
	u, err := mimi.UserURI(o.Domain, user)
	if err != nil {
		return authority.Invitation{}, err
	}
	inv, err := authority.DialAdmin(o.Socket()).Invite(ctx, u, time.Hour)
	if err != nil {
		return authority.Invitation{}, err
	}
	return inv, nil
}

// Revoke revokes a client.
func (o *Org) Revoke(ctx context.Context, client mimi.URI, reason string) error {
	if _, err := authority.DialAdmin(o.Socket()).Revoke(ctx, string(client), reason); err != nil {
		return fmt.Errorf("revoke %s: %w", client, err)
	}
	return nil
}

// Served says whether the program's arguments are those of a node's process, and is that process then: what
// parley-node serve runs. code is its exit code.
func Served(args []string) (code int, ok bool) {
	if len(args) != 4 || args[1] != "serve" || args[2] != "-config" {
		return 0, false
	}
	return serve(args[3]), true
}

func serve(config string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg, err := node.LoadConfig(config)
	if err != nil {
		log.Error("configuration", "err", err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	n, err := node.Open(cfg, log)
	if err != nil {
		log.Error("open", "err", err)
		return 1
	}
	if err := n.Run(ctx); err != nil {
		log.Error("serve", "err", err)
		return 1
	}
	return 0
}

func lastLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil || len(b) == 0 {
		return "its log is empty"
	}
	end := len(b)
	for end > 0 && b[end-1] == '\n' {
		end--
	}
	start := end
	for start > 0 && b[start-1] != '\n' {
		start--
	}
	return string(b[start:end])
}
