package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/parley-mls/parley/examples/internal/org"
)

// network is three organisations that approve each other, with their nodes up.
type network struct {
	dir  string
	tcp  bool       // of the devices, see options
	orgs []*org.Org // alpha, which hosts every room, beta, gamma
}

// limits of the nodes: far above what one machine can do, for all clients have one address.
const limits = "limits: {anonymous_per_second: 1000000, requests_per_second: 1000000, bytes_per_second: 268435456, peer_requests_per_second: 1000000, peer_bytes_per_second: 1073741824, rooms: 1000000, address_connections: 1000000}\nlog: {level: error}\n"

func startNetwork(ctx context.Context, tcp bool) (_ *network, err error) {
	dir, err := os.MkdirTemp("", "parley-loadtest-")
	if err != nil {
		return nil, err
	}
	n := &network{dir: dir, tcp: tcp}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	for _, domain := range []string{"alpha.example", "beta.example", "gamma.example"} {
		o := &org.Org{Domain: domain, Dir: filepath.Join(dir, strings.TrimSuffix(domain, ".example"))}
		if err := o.Init(limits); err != nil {
			return nil, err
		}
		n.orgs = append(n.orgs, o)
		if err := o.Start(ctx); err != nil {
			return nil, err
		}
	}
	for _, a := range n.orgs {
		for _, b := range n.orgs {
			if a != b {
				if err := a.Approve(ctx, b, b.Fingerprint, b.Address); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, o := range n.orgs {
		if err := o.WaitPeers(ctx, len(n.orgs)-1, 30*time.Second); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *network) close() {
	for _, o := range n.orgs {
		o.Terminate()
	}
	os.RemoveAll(n.dir)
}

// used is what the three nodes have taken of the machine.
type used struct {
	cpu             time.Duration
	memory, private int64 // bytes resident; without pages of files
}

func (n *network) used() (used, error) {
	var u used
	for _, o := range n.orgs {
		cpu, err := cpuTime(o.PID())
		memory, private, err2 := residentBytes(o.PID())
		if err := errors.Join(err, err2); err != nil {
			return u, err
		}
		u.cpu += cpu
		u.memory += memory
		u.private += private
	}
	return u, nil
}

// enrolling bounds the enrolments at a time.
const enrolling = 8

// devices enrols perOrg users with one device at each organisation; those of alpha come first. tag tells them from
// others.
func (n *network) devices(ctx context.Context, tag string, perOrg int) ([]*device, error) {
	list := make([]*device, perOrg*len(n.orgs))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(enrolling)
	trusts := make([]*trust, len(n.orgs))
	for i := range trusts {
		trusts[i] = newTrust(n.tcp)
	}
	for i := range list {
		o := n.orgs[i/perOrg]
		name := fmt.Sprintf("%s-%d", tag, i%perOrg)
		g.Go(func() (err error) {
			list[i], err = enrol(gctx, o, name, trusts[i/perOrg])
			return err
		})
	}
	if err := g.Wait(); err != nil {
		for _, d := range list {
			d.close()
		}
		return nil, err
	}
	return list, nil
}
