// Package client is the SDK of a Parley device: it enrols with its provider, keeps the device's MLS state in a
// directory, takes part in rooms and delivers their messages in the hub's order, each once.
//
// Enrol makes a device from an invitation, Open opens one that exists. Run connects it and processes what arrives;
// the operations of Client and Room need a running Run, except for those that only read.
//
// The room's log, which the hub orders, is the truth: own commits and messages take effect when they come back in it.
// The nodes, the own one included, are trusted to deliver and not to say who owns a key: KeyPackages, Welcomes and
// messages are verified here (RFC 9420; draft-ietf-mimi-protocol). That everybody in a room is shown the same log is
// compared with what the hub has signed, and inside of the group (package chain); a HubFault says that it isn't so.
package client

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// Options says how a device behaves. Only Dir is required.
type Options struct {
	// Dir is the directory of the device's state, of mode 0700; one process at a time may use it. It holds secrets.
	Dir string
	// Log gets what the device does; nil discards it.
	Log *slog.Logger
	// Suite is the cipher suite of the device's key and of the rooms that it creates; 0 means 1. It counts at
	// enrolment only.
	Suite mls.CipherSuite
	// Time is the clock, nil for time.Now, and Rand the source of randomness, nil for crypto/rand.
	Time func() time.Time
	Rand io.Reader
	// KeyPackages is how many are kept published, so many rooms can the device be added to while it is away; 0
	// means 32.
	KeyPackages int
	// CommitDelay returns how long to wait before committing what others proposed, if nobody else does before. nil
	// means a random time from 0.2 to 2 seconds, so that not all members try at once.
	CommitDelay func() time.Duration
	// TCPOnly keeps the device from using QUIC.
	TCPOnly bool
}

const (
	defaultKeyPackages = 32
	defaultSuite       = mls.X25519_AES128GCM_SHA256_Ed25519
)

func (o *Options) fill() error {
	if o.Dir == "" {
		return errors.New("client: Options.Dir is empty")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Suite == 0 {
		o.Suite = defaultSuite
	}
	if o.Time == nil {
		o.Time = time.Now
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.KeyPackages <= 0 {
		o.KeyPackages = defaultKeyPackages
	}
	if o.CommitDelay == nil {
		o.CommitDelay = func() time.Duration {
			return 200*time.Millisecond + mathrand.N(1800*time.Millisecond)
		}
	}
	return nil
}

// Client is one device of a user. Its methods may be called from several goroutines at once.
type Client struct {
	o       Options
	log     *slog.Logger
	db      *sealedStore
	session *session
	trust   *trust
	events  broadcast
	config  mls.Config

	mu      sync.Mutex
	profile profile            // guarded by mu: the chain changes when it is renewed
	signer  crypto.Signer      // for the profile's key; not replaced
	rooms   map[mimi.URI]*Room // guarded by mu
	welcome uint64             // guarded by mu: the last Welcome stored
	running context.Context    // guarded by mu: of Run, nil if it doesn't run
	restart context.CancelFunc // guarded by mu: ends the present subscription
	current time.Time          // guarded by mu: when this client last had everything that its node had
	live    chan struct{}      // guarded by mu: closed while the subscription is live
	joining map[mimi.URI]bool  // guarded by mu: rooms for which an external commit is being sent
	acks    acks

	expiring chan struct{} // has room for one: when the next message expires may have changed

	apply func(*store.Batch) (wait func() error, err error) // of db
	free  func() (uint64, error)                            // of db
	lost  atomic.Pointer[error]                             // why nothing can be done any more

	workers sync.WaitGroup // one goroutine per room while Run runs
	publish sync.Mutex     // held while KeyPackages are published
}

// Enrol makes a new device of the invited user: it generates the signature key, gets the credential for it and
// publishes KeyPackages. device is the name of the client in its URI, such as "alice-laptop", and must be new at the
// provider. An Enrol that failed may be repeated with the same directory and goes on with the same key.
func Enrol(ctx context.Context, o Options, inv authority.Invitation, device string) (*Client, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	id, err := mimi.ClientURI(inv.Domain, device)
	if err != nil {
		return nil, fmt.Errorf("client: name of the device: %w", err)
	}
	if inv.User.Domain() != inv.Domain || inv.User.Kind() != 'u' {
		return nil, fmt.Errorf("client: the invitation of %s is for %q", inv.Domain, inv.User)
	}
	if inv.Address == "" {
		return nil, errors.New("client: the invitation doesn't say where the node is")
	}
	db, err := openStore(o)
	if err != nil {
		return nil, err
	}
	c, err := enrol(ctx, o, db, inv, id)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if err := errors.Join(c.refreshTrust(ctx), c.publishKeyPackages(ctx, false)); err != nil {
		o.Log.Warn("the first connection of the device failed", "err", err) // Run does it again
	}
	return c, nil
}

func enrol(ctx context.Context, o Options, db *sealedStore, inv authority.Invitation, id mimi.URI) (*Client, error) {
	p, err := loadProfile(db)
	switch {
	case err == nil && len(p.Chain) > 0:
		return nil, fmt.Errorf("client: %w: %s is %s", ErrEnrolled, o.Dir, p.Client)
	case err != nil && !errors.Is(err, ErrNotEnrolled):
		return nil, err
	case err == nil && p.Client == id && p.User == inv.User && p.Suite == o.Suite:
		p.Address, p.Root = inv.Address, inv.Root[:]
	default:
		if p, err = newProfile(o, inv, id); err != nil {
			return nil, err
		}
	}
	if err := p.save(db); err != nil {
		return nil, err
	}
	c, err := newClient(o, db, p)
	if err != nil {
		return nil, err
	}
	if err := c.indexMessages(); err != nil { // of which there are none
		return nil, errors.Join(err, c.session.close())
	}
	if err := c.requestCredential(ctx, inv.Token); err != nil {
		return nil, errors.Join(fmt.Errorf("client: enrol %s: %w", id, err), c.session.close())
	}
	return c, nil
}

// Open opens an enrolled device.
func Open(ctx context.Context, o Options) (*Client, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(o.Dir, storeDir)); err != nil {
		return nil, fmt.Errorf("client: %w: %s", ErrNotEnrolled, o.Dir)
	}
	db, err := openStore(o)
	if err != nil {
		return nil, err
	}
	c, err := open(o, db)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if err := db.purge(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("client: compact the state in %s: %w", o.Dir, err), c.Close())
	}
	return c, nil
}

func open(o Options, db *sealedStore) (*Client, error) {
	p, err := loadProfile(db)
	if err != nil {
		return nil, err
	}
	if len(p.Chain) == 0 {
		return nil, fmt.Errorf("client: %w: the enrolment in %s isn't finished", ErrNotEnrolled, o.Dir)
	}
	c, err := newClient(o, db, p)
	if err != nil {
		return nil, err
	}
	if err := c.load(); err != nil {
		return nil, errors.Join(err, c.session.close())
	}
	return c, nil
}

// newClient puts the parts together.
func newClient(o Options, db *sealedStore, p profile) (*Client, error) {
	signer, err := p.signer()
	if err != nil {
		return nil, err
	}
	t := newTrust(p.Domain, p.Root, o.Time)
	if err := t.load(db); err != nil {
		return nil, err
	}
	c := &Client{
		o: o, log: o.Log, db: db, profile: p, signer: signer, trust: t, rooms: make(map[mimi.URI]*Room), joining: make(map[mimi.URI]bool),
		live: make(chan struct{}), acks: newAcks(), expiring: make(chan struct{}, 1), apply: db.Apply, free: db.Free,
		config: mls.Config{
			Rand: o.Rand, Time: o.Time, Verifier: t.verifier.ForClient(), Components: mimi.Components(),
			Policy: mimi.RoomPolicy(t.verifier.IdentityOf),
		},
	}
	if c.session, err = newSession(c, p); err != nil {
		return nil, err
	}
	return c, nil
}

// load restores the rooms and the other state from the store.
func (c *Client) load() error {
	var err error
	if c.welcome, err = loadWelcome(c.db); err != nil {
		return err
	}
	if c.current, err = loadCurrent(c.db); err != nil {
		return err
	}
	uris, err := roomURIs(c.db)
	if err != nil {
		return err
	}
	for _, uri := range uris {
		r, err := loadRoom(c, uri)
		if err != nil {
			return fmt.Errorf("client: load room %s: %w", uri, err)
		}
		c.rooms[uri] = r
	}
	if err := c.indexMessages(); err != nil {
		return fmt.Errorf("client: index the messages: %w", err)
	}
	if err := c.expire(); err != nil {
		return err
	}
	// All rooms in one step: the state of the first format is sealed by that, and what the last process used is erased.
	b := new(store.Batch)
	for _, r := range c.rooms {
		if err := r.reseal(b); err != nil {
			return err
		}
	}
	if b.Len() == 0 {
		return nil
	}
	var w waits
	if err := w.apply(c, b); err != nil {
		return err
	}
	return w.wait()
}

// giveUp has every later operation on a room fail with err, and Run return it. Locks of rooms may be held.
func (c *Client) giveUp(err error) {
	c.lost.CompareAndSwap(nil, &err)
	c.resubscribe()
}

// gone returns why nothing can be done any more, nil if all is well.
func (c *Client) gone() error {
	if err := c.lost.Load(); err != nil {
		return *err
	}
	return nil
}

// abandon gives up and ends what waits. No lock may be held.
func (c *Client) abandon(err error) {
	c.giveUp(err)
	for _, r := range c.Rooms() {
		r.mu.Lock()
		r.failAll(c.gone())
		r.touch()
		r.mu.Unlock()
	}
}

// Close releases the state; Run must have returned. Operations that still wait fail with ErrClosed, and channels of
// Events are closed.
func (c *Client) Close() error {
	var err error
	if c.gone() == nil {
		err = c.saveHubs()
	}
	c.abandon(fmt.Errorf("client: %w", ErrClosed))
	c.events.close()
	return errors.Join(err, c.session.close(), c.db.Close())
}

// User returns the user whose device this is.
func (c *Client) User() mimi.URI {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.profile.User
}

// ID returns the client's URI.
func (c *Client) ID() mimi.URI {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.profile.Client
}

// credential returns the client's present credential.
func (c *Client) credential() mls.Credential {
	c.mu.Lock()
	defer c.mu.Unlock()
	return mls.X509Credential(c.profile.Chain)
}

// Rooms returns the rooms that this client is or was a member of, ordered by their URIs.
func (c *Client) Rooms() []*Room {
	c.mu.Lock()
	defer c.mu.Unlock()
	rooms := make([]*Room, 0, len(c.rooms))
	for _, uri := range slices.Sorted(maps.Keys(c.rooms)) {
		rooms = append(rooms, c.rooms[uri])
	}
	return rooms
}

// Room returns a room that this client is or was a member of. It fails with ErrUnknownRoom if there is no such room.
func (c *Client) Room(uri mimi.URI) (*Room, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.rooms[uri]; ok {
		return r, nil
	}
	return nil, fmt.Errorf("client: %w: %s", ErrUnknownRoom, uri)
}

// Joinable returns the rooms of the user that this client could join: it isn't a member of them.
func (c *Client) Joinable(ctx context.Context) ([]mimi.URI, error) {
	res, err := call(ctx, c.session, c.session.service.Rooms, &api.RoomsRequest{})
	if err != nil {
		return nil, fmt.Errorf("client: ask for rooms: %w", err)
	}
	var rooms []mimi.URI
	for _, r := range res.Rooms {
		uri, err := mimi.ParseURI(r.Room)
		if err != nil || uri.Kind() != 'r' {
			return nil, fmt.Errorf("client: the node names a room %q", r.Room)
		}
		if known, err := c.Room(uri); err == nil && known.Active() {
			continue
		}
		if !r.Joined {
			rooms = append(rooms, uri)
		}
	}
	return rooms, nil
}

// WaitLive waits until everything that the node had for this client when it connected has been processed.
func (c *Client) WaitLive(ctx context.Context) error {
	c.mu.Lock()
	live := c.live
	c.mu.Unlock()
	select {
	case <-live:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("client: wait for the node: %w", ctx.Err())
	}
}
