package examples

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/client"
	"github.com/parley-mls/parley/transport/freeport"
)

// BenchmarkDelivery sends messages of 1 KiB in one room across three nodes: the room is alpha's, the senders are
// everyone's. A message is accepted when the hub has it on disk, and delivered when a client on another node than its
// sender's has decrypted and stored it. Nodes and clients share this process; cpu-µs/delivery is all of it, MLS and
// every fsync included.
func BenchmarkDelivery(b *testing.B) {
	for _, senders := range []int{1, 3, 12} {
		b.Run(fmt.Sprintf("senders=%d", senders), func(b *testing.B) { benchmarkDelivery(b, senders) })
	}
}

func benchmarkDelivery(b *testing.B, senders int) {
	ctx, cancel := context.WithCancel(b.Context())
	var running sync.WaitGroup
	b.Cleanup(func() { cancel(); running.Wait() })
	n := newNetwork(b, ctx, &running, max(1, senders/3))

	sent := make(map[string]time.Time)
	var mu sync.Mutex
	var latencies []time.Duration
	var deliveries atomic.Int64
	var wantDeliveries int64
	done := make(chan struct{})
	for _, c := range n.clients {
		events := c.Events()
		running.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case e := <-events:
					m, ok := e.(client.Message)
					if !ok || m.Client.Domain() == c.ID().Domain() {
						continue
					}
					now := time.Now()
					mu.Lock()
					if at, ok := sent[string(m.Data[:16])]; ok {
						latencies = append(latencies, now.Sub(at))
					}
					mu.Unlock()
					if deliveries.Add(1) == atomic.LoadInt64(&wantDeliveries) {
						close(done)
					}
				}
			}
		})
	}
	perMessage := int64(0) // deliveries of a message: the clients on the two other nodes
	for _, c := range n.clients {
		if c.ID().Domain() != n.clients[0].ID().Domain() {
			perMessage++
		}
	}
	atomic.StoreInt64(&wantDeliveries, perMessage*int64(b.N))

	var rooms []*client.Room
	for _, c := range n.clients[:senders] {
		r, err := c.Room(n.room)
		if err != nil {
			b.Fatal(err)
		}
		rooms = append(rooms, r)
	}
	runtime.GC()
	cpu := cpuTime()
	b.ResetTimer()
	var next atomic.Int64
	var wg sync.WaitGroup
	for _, r := range rooms {
		wg.Go(func() {
			for {
				i := next.Add(1)
				if i > int64(b.N) {
					return
				}
				text := fmt.Appendf(make([]byte, 0, 1024), "%016d", i)[:1024]
				mu.Lock()
				sent[string(text[:16])] = time.Now()
				mu.Unlock()
				if _, err := r.Send(ctx, text); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	accepted := b.Elapsed()
	select {
	case <-done:
	case <-time.After(time.Minute):
		b.Fatalf("%d of %d deliveries", deliveries.Load(), wantDeliveries)
	}
	b.StopTimer()
	used := cpuTime() - cpu
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(latencies)
	b.ReportMetric(float64(b.N)/accepted.Seconds(), "accepted/s")
	b.ReportMetric(float64(wantDeliveries)/b.Elapsed().Seconds(), "deliveries/s")
	b.ReportMetric(float64(latencies[len(latencies)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(latencies[len(latencies)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(used.Microseconds())/float64(wantDeliveries), "cpu-µs/delivery")
}

// A network is three nodes of this process with perOrg clients each, all of them in one room of alpha's. The clients
// take turns: beta, gamma, alpha, beta and so on.
type network struct {
	clients []*client.Client
	room    mimi.URI
}

func newNetwork(tb testing.TB, ctx context.Context, running *sync.WaitGroup, perOrg int) *network {
	dir := tb.TempDir()
	log := slog.New(slog.DiscardHandler)
	type org struct {
		name, socket, address string
		root                  authority.Fingerprint
	}
	var orgs []*org
	for _, name := range []string{"beta", "gamma", "alpha"} {
		address, err := freeport.Address()
		if err != nil {
			tb.Fatal(err)
		}
		o := &org{name: name, address: address}
		data := filepath.Join(dir, name)
		if err := os.MkdirAll(data, 0o700); err != nil {
			tb.Fatal(err)
		}
		root, err := authority.Init(filepath.Join(data, "authority"), authority.InitOptions{Domain: name + ".example", Passphrase: []byte("a passphrase of the benchmark")})
		if err != nil {
			tb.Fatal(err)
		}
		o.root = root
		path := filepath.Join(dir, name+".yaml")
		text := fmt.Sprintf("domain: %s.example\ndata: %s\nlisten: %s\nadvertise: %s\ngossip: local\n", name, data, o.address, o.address)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			tb.Fatal(err)
		}
		cfg, err := node.LoadConfig(path)
		if err != nil {
			tb.Fatal(err)
		}
		nd, err := node.Open(cfg, log)
		if err != nil {
			tb.Fatal(err)
		}
		o.socket = cfg.Socket()
		running.Go(func() { nd.Run(ctx) })
		orgs = append(orgs, o)
	}
	for _, o := range orgs {
		within(tb, func() error { _, err := node.DialAdmin(o.socket).Status(ctx); return err })
		for _, peer := range orgs {
			if peer != o {
				if err := node.DialAdmin(o.socket).ApprovePeer(ctx, peer.name+".example", peer.root, peer.address); err != nil {
					tb.Fatal(err)
				}
			}
		}
	}
	n := &network{}
	var users []mimi.URI
	for i := range perOrg {
		for _, o := range orgs {
			user, err := mimi.UserURI(o.name+".example", fmt.Sprintf("user%d", i))
			if err != nil {
				tb.Fatal(err)
			}
			inv, err := authority.DialAdmin(o.socket).Invite(ctx, user, time.Hour)
			if err != nil {
				tb.Fatal(err)
			}
			device := fmt.Sprintf("user%d-laptop", i)
			c, err := client.Enrol(ctx, client.Options{Dir: filepath.Join(dir, "devices", o.name+device), Log: log}, inv, device)
			if err != nil {
				tb.Fatal(err)
			}
			running.Go(func() { c.Run(ctx); c.Close() })
			n.clients = append(n.clients, c)
			users = append(users, user)
		}
	}
	host := n.clients[2] // alpha's
	for _, o := range orgs[:2] {
		within(tb, func() error { _, err := host.Find(ctx, "user0@"+o.name+".example"); return err })
	}
	room, err := host.CreateRoom(ctx, "benchmark")
	if err != nil {
		tb.Fatal(err)
	}
	if err := room.Add(ctx, slices.DeleteFunc(users, func(u mimi.URI) bool { return u == host.User() })...); err != nil {
		tb.Fatal(err)
	}
	n.room = room.URI()
	for _, c := range n.clients {
		within(tb, func() error {
			r, err := c.Room(n.room)
			if err == nil && r.Epoch() != room.Epoch() {
				err = fmt.Errorf("epoch %d, want %d", r.Epoch(), room.Epoch())
			}
			return err
		})
	}
	return n
}

// within tries until check succeeds, for half a minute.
func within(tb testing.TB, check func() error) {
	tb.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cpuTime is what this process has used, user and system.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
