package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/authority/authoritytest"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/api/apiconnect"
	"github.com/parley-mls/parley/transport/freeport"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// provider is a real node of this process with its authority.
type provider struct {
	t      testing.TB
	domain string
	config node.Config
	root   authority.Fingerprint
	cancel context.CancelFunc
	ended  chan struct{}
}

// providers starts a node for each name, all of them approving each other.
func providers(t testing.TB, names ...string) []*provider {
	t.Helper()
	return providersSince(t, nil, names...)
}

// providersSince is providers with clocks by which the authorities of some of them are made.
func providersSince(t testing.TB, clocks map[string]func() time.Time, names ...string) []*provider {
	t.Helper()
	var all []*provider
	for _, name := range names {
		p := &provider{t: t, domain: name + ".example"}
		data := filepath.Join(t.TempDir(), name)
		address, err := freeport.Address()
		if err != nil {
			t.Fatal(err)
		}
		if dir := filepath.Join(data, "authority"); clocks[name] == nil {
			p.root = authoritytest.Init(t, dir, p.domain)
		} else if p.root, err = authority.Init(dir, authority.InitOptions{
			Domain: p.domain, Passphrase: []byte("a passphrase for tests"), Time: clocks[name],
		}); err != nil {
			t.Fatal(err)
		}
		p.config = node.Config{Domain: p.domain, Data: data, Listen: address, Advertise: address, Gossip: "local"}
		all = append(all, p)
	}
	for _, p := range all {
		for _, q := range all {
			if p != q {
				p.config.Peers = append(p.config.Peers, node.PeerConfig{Domain: q.domain, Fingerprint: q.root.String(), Address: q.config.Listen})
			}
		}
		p.start()
		t.Cleanup(p.stop)
	}
	for _, p := range all {
		for _, q := range all {
			if p != q {
				within(t, func() error { return p.knows(q.domain) })
			}
		}
	}
	return all
}

// start runs the node.
func (p *provider) start() {
	p.t.Helper()
	level := slog.LevelError
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	n, err := node.Open(p.config, slog.New(slog.NewTextHandler(p.t.Output(), &slog.HandlerOptions{Level: level})).With("node", p.domain))
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel, p.ended = cancel, make(chan struct{})
	go func() {
		defer close(p.ended)
		if err := n.Run(ctx); err != nil && ctx.Err() == nil {
			p.t.Errorf("node of %s: %v", p.domain, err)
		}
	}()
}

// stop ends the node, if it runs.
func (p *provider) stop() {
	p.cancel()
	<-p.ended
}

// knows says why p has no trust bundle of a peer or doesn't see it alive.
func (p *provider) knows(domain string) error {
	peers, err := node.DialAdmin(p.config.Socket()).Peers(p.t.Context())
	if err != nil {
		return err
	}
	for _, s := range peers {
		if s.Domain == domain && s.Alive {
			return nil
		}
	}
	return fmt.Errorf("%s doesn't see %s: %v", p.domain, domain, peers)
}

// device is a client that runs.
type device struct {
	*Client
	t      testing.TB
	o      Options
	cancel context.CancelFunc
	ended  chan error
}

// enrol makes a new device of a user.
func (p *provider) enrol(user, name string) *device { return p.enrolIn(0, user, name) }

// enrolIn makes a new device of that suite.
func (p *provider) enrolIn(suite mls.CipherSuite, user, name string) *device {
	p.t.Helper()
	d := &device{t: p.t, o: Options{
		Suite: suite, Dir: filepath.Join(p.t.TempDir(), name), KeyPackages: 4, Log: testLog(p.t, name),
		CommitDelay: func() time.Duration { return 50 * time.Millisecond },
	}}
	c, err := Enrol(p.t.Context(), d.o, p.invite(user), name)
	if err != nil {
		p.t.Fatalf("enrol %s: %v", name, err)
	}
	d.run(c)
	p.t.Cleanup(d.stop)
	return d
}

func (p *provider) invite(user string) authority.Invitation {
	p.t.Helper()
	uri, err := mimi.UserURI(p.domain, user)
	if err != nil {
		p.t.Fatal(err)
	}
	inv, err := authority.DialAdmin(p.config.Socket()).Invite(p.t.Context(), uri, time.Hour)
	if err != nil {
		p.t.Fatalf("invite %s: %v", user, err)
	}
	return inv
}

func testLog(t testing.TB, name string) *slog.Logger {
	level := slog.LevelError + 4
	if testing.Verbose() {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level})).With("device", name)
}

func (d *device) run(c *Client) {
	d.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel, d.ended = cancel, make(chan error, 1)
	go func() { d.ended <- c.Run(ctx) }()
}

// stop ends the device, if it runs.
func (d *device) stop() {
	if d.cancel == nil {
		return
	}
	d.cancel()
	<-d.ended
	d.cancel = nil
	if err := d.Client.Close(); err != nil {
		d.t.Errorf("close: %v", err)
	}
}

// restart ends the device and opens it again from its directory.
func (d *device) restart() {
	d.t.Helper()
	d.stop()
	c, err := Open(d.t.Context(), d.o)
	if err != nil {
		d.t.Fatalf("open again: %v", err)
	}
	d.run(c)
}

// room waits until the device is in a room.
func (d *device) room(uri mimi.URI) *Room {
	d.t.Helper()
	var r *Room
	within(d.t, func() (err error) {
		if r, err = d.Room(uri); err == nil && !r.Active() {
			err = errors.New("not active")
		}
		return err
	})
	return r
}

// create makes a room with all clients of the users.
func (d *device) create(users ...mimi.URI) *Room {
	d.t.Helper()
	r, err := d.CreateRoom(d.t.Context(), "test")
	if err != nil {
		d.t.Fatal(err)
	}
	if len(users) > 0 {
		if err := r.Add(d.t.Context(), users...); err != nil {
			d.t.Fatal(err)
		}
	}
	return r
}

// say sends a message and waits for the hub.
func (d *device) say(room mimi.URI, text string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	if _, err := d.room(room).Send(ctx, []byte(text)); err != nil {
		d.t.Fatalf("%s sends %q: %v", d.ID(), text, err)
	}
}

func (d *device) texts(room mimi.URI) []string {
	r, err := d.Room(room)
	if err != nil {
		return nil
	}
	var texts []string
	for _, m := range r.Messages() {
		texts = append(texts, m.Client.ID()+": "+string(m.Data))
	}
	return texts
}

// sees waits until the transcript of each device is want.
func sees(t testing.TB, room mimi.URI, want []string, devices ...*device) {
	t.Helper()
	for _, d := range devices {
		within(t, func() error {
			if got := d.texts(room); strings.Join(got, "|") != strings.Join(want, "|") {
				return fmt.Errorf("%s reads %q, want %q", d.ID(), got, want)
			}
			return nil
		})
	}
}

// agree waits until the devices are in one epoch of the room, with these clients as its members.
func agree(t testing.TB, room mimi.URI, devices ...*device) {
	t.Helper()
	within(t, func() error {
		var epoch uint64
		var authenticator []byte
		for i, d := range devices {
			r, err := d.Room(room)
			if err != nil {
				return fmt.Errorf("%s: %w", d.ID(), err)
			}
			if err := r.Frozen(); err != nil {
				return err
			}
			if i == 0 {
				epoch, authenticator = r.Epoch(), r.EpochAuthenticator()
			}
			if r.Epoch() != epoch || !bytes.Equal(r.EpochAuthenticator(), authenticator) {
				return fmt.Errorf("%s is in epoch %d, %s in %d", d.ID(), r.Epoch(), devices[0].ID(), epoch)
			}
			if n := clients(r); n != len(devices) {
				return fmt.Errorf("%s sees %d clients, want %d", d.ID(), n, len(devices))
			}
		}
		return nil
	})
}

func clients(r *Room) int {
	n := 0
	for _, p := range r.Participants() {
		n += len(p.Clients)
	}
	return n
}

// within tries until check succeeds, as long as patience lasts.
func within(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %v", patience, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// faults stands between a client and its node. Each function, if set, decides what becomes of a request.
type faults struct {
	apiconnect.ClientServiceClient
	mu     sync.Mutex
	update func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error)
	submit func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error)
	info   func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error)
	claim  func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error)
	upload func() error // after a request to upload; an error is its answer
	keys   func(*api.GatewayKeysResponse) error
	relay  func(*api.ObliviousResponse)
	asked  bool // for the last message of a group
}

// inject puts faults into a client that doesn't run yet, or whose calls under way don't matter.
func inject(c *Client) *faults {
	f := &faults{ClientServiceClient: c.session.service}
	c.session.service = f
	return f
}

func (f *faults) set(fn func(f *faults)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(f)
}

type unary = func(context.Context, *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error)

func (f *faults) pick(get func() unary, real unary) unary {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fn := get(); fn != nil {
		return fn
	}
	return real
}

func (f *faults) Update(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	return f.pick(func() unary { return f.update }, f.ClientServiceClient.Update)(ctx, req)
}

func (f *faults) SubmitMessage(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	return f.pick(func() unary { return f.submit }, f.ClientServiceClient.SubmitMessage)(ctx, req)
}

func (f *faults) GroupInfo(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	return f.pick(func() unary { return f.info }, f.ClientServiceClient.GroupInfo)(ctx, req)
}

func (f *faults) UploadAsset(ctx context.Context, req *connect.Request[api.UploadAssetRequest]) (*connect.Response[api.UploadAssetResponse], error) {
	res, err := f.ClientServiceClient.UploadAsset(ctx, req)
	f.mu.Lock()
	then := f.upload
	f.mu.Unlock()
	if then != nil {
		if err := then(); err != nil {
			return nil, err
		}
	}
	return res, err
}

func (f *faults) GatewayKeys(ctx context.Context, req *connect.Request[api.GatewayKeysRequest]) (*connect.Response[api.GatewayKeysResponse], error) {
	res, err := f.ClientServiceClient.GatewayKeys(ctx, req)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && f.keys != nil {
		err = f.keys(res.Msg)
	}
	return res, err
}

func (f *faults) Oblivious(ctx context.Context, req *connect.Request[api.ObliviousRequest]) (*connect.Response[api.ObliviousResponse], error) {
	res, err := f.ClientServiceClient.Oblivious(ctx, req)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && f.relay != nil {
		f.relay(res.Msg)
	}
	return res, err
}

func (f *faults) LastSent(ctx context.Context, req *connect.Request[api.LastSentRequest]) (*connect.Response[api.LastSentResponse], error) {
	f.set(func(f *faults) { f.asked = true })
	return f.ClientServiceClient.LastSent(ctx, req)
}

func (f *faults) ClaimKeyPackages(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	return f.pick(func() unary { return f.claim }, f.ClientServiceClient.ClaimKeyPackages)(ctx, req)
}

// enrolFaulty is enrol with faults that can be set.
func (p *provider) enrolFaulty(user, name string) (*device, *faults) {
	p.t.Helper()
	d := p.enrol(user, name)
	d.stop()
	c, err := Open(p.t.Context(), d.o)
	if err != nil {
		p.t.Fatal(err)
	}
	f := inject(c)
	d.run(c)
	return d, f
}

var errUnreachable = connect.NewError(connect.CodeUnavailable, errors.New("out of reach, by the test"))
