package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// disk is a simulated disk with the directory of a device.
type disk struct {
	fs   *vfs.MemFS
	mu   sync.Mutex
	keys *crashFile // guarded by mu
}

func newDisk() *disk {
	return &disk{fs: vfs.NewCrashableMem(), keys: &crashFile{now: keyFileHeader(), synced: keyFileHeader(), step: func() {}}}
}

func (d *disk) ReadAt(b []byte, at int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.keys.ReadAt(b, at)
}

func (d *disk) WriteAt(b []byte, at int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.keys.WriteAt(b, at)
}

func (d *disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.keys.Sync()
}

func (*disk) Close() error { return nil }

// crash returns what a crash at this moment would leave, with so many percent of what isn't synced. Keys are neither used
// nor erased meanwhile, so that both parts are of one moment.
func (d *disk) crash(unsynced int, random *mathrand.Rand) *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	files := d.keys.images(random)
	file := files[random.IntN(len(files))]
	return &disk{
		fs:   d.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced, RNG: random}),
		keys: &crashFile{now: file, synced: bytes.Clone(file), step: func() {}},
	}
}

func (d *disk) open(t testing.TB) *sealedStore {
	t.Helper()
	db, err := store.OpenFS(d.fs, "/store", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.seal(db)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (d *disk) seal(db *store.Pebble) (*sealedStore, error) {
	return newSealedStore(db, func(used map[slotRef]bool) (*keyFile, error) {
		return loadKeyFile(d, int64(len(d.keys.now)), rand.Reader, used)
	})
}

// enrolOn makes a new device on a simulated disk.
func (p *provider) enrolOn(on *disk, user, name string) *device {
	p.t.Helper()
	d := &device{t: p.t, o: Options{Dir: "/", KeyPackages: 4, Log: testLog(p.t, name)}}
	if err := d.o.fill(); err != nil {
		p.t.Fatal(err)
	}
	id, err := mimi.ClientURI(p.domain, name)
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := enrol(p.t.Context(), d.o, on.open(p.t), p.invite(user), id)
	if err != nil {
		p.t.Fatal(err)
	}
	d.run(c)
	p.t.Cleanup(d.stop)
	if err := d.WaitLive(p.t.Context()); err != nil { // its KeyPackages are published then
		p.t.Fatal(err)
	}
	return d
}

// TestNoKeyIsUsedTwiceAfterACrash crashes a device when a ciphertext is about to leave it, and when the hub has it and
// the device doesn't know yet. What is on the disk then has the same ciphertext and goes on with the next key.
func TestNoKeyIsUsedTwiceAfterACrash(t *testing.T) {
	p := providers(t, "alpha")
	alice := p[0].enrol("alice", "alice-laptop")
	on := newDisk()
	bob := p[0].enrolOn(on, "bob", "bob-phone")
	uri := alice.create(bob.User()).URI()
	agree(t, uri, alice, bob)
	random := mathrand.New(mathrand.NewPCG(3, 4))
	u := &used{t: t, sent: make(map[string]string)}
	var want []string
	say := func(text string) {
		t.Helper()
		bob.say(uri, text)
		want = append(want, "bob-phone: "+text)
		sees(t, uri, want, alice)
	}
	type crashed struct {
		body       []byte
		generation uint32
		on         *disk
	}
	for i := range 12 {
		accepted, unsynced, first := i%2 == 1, []int{0, 50, 100}[i%3], i%4 < 2
		bob.stop()
		c, err := open(bob.o, on.open(t))
		if err != nil {
			t.Fatal(err)
		}
		u.watch(c)
		f, crash := inject(c), make(chan crashed, 1)
		bob.run(c)
		if !first { // of the process: encrypted by the worker, and not by Send
			say(fmt.Sprint("before ", i))
		}
		if i%5 == 4 {
			if err := bob.room(uri).UpdateKeys(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		f.set(func(f *faults) {
			f.submit = func(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
				x := crashed{body: req.Msg.Body, generation: *req.Msg.Generation, on: on.crash(unsynced, random)}
				if accepted {
					if _, err := f.ClientServiceClient.SubmitMessage(ctx, req); err != nil {
						t.Error(err)
					}
					x.on = on.crash(unsynced, random)
				}
				crash <- x
				<-ctx.Done()
				return nil, ctx.Err()
			}
		})
		r := bob.room(uri)
		text := fmt.Sprint("crashed ", i)
		sending := make(chan struct{})
		go func() {
			defer close(sending)
			r.Send(t.Context(), []byte(text))
		}()
		x := <-crash
		bob.stop()
		<-sending

		on = x.on
		if c, err = open(bob.o, on.open(t)); err != nil {
			t.Fatal(err)
		}
		var m mimi.SubmitMessageRequest
		if err := codec.Unmarshal(x.body, &m); err != nil {
			t.Fatal(err)
		}
		epoch := m.Message.Private.Epoch
		if r, err = c.Room(uri); err != nil {
			t.Fatal(err)
		}
		if r.Epoch() != epoch || r.group.Generation() != x.generation+1 {
			t.Errorf("crash %d: goes on with key %d/%d after %d/%d", i, r.Epoch(), r.group.Generation(), epoch, x.generation)
		}
		if o := r.sealedOut(); o == nil && !accepted || o != nil && !bytes.Equal(o.submit, x.body) {
			t.Errorf("crash %d: the ciphertext in the outbox is another one: %+v", i, o)
		}
		u.mu.Lock()
		u.sent[u.pair(epoch, x.generation)] = string(x.body)
		u.mu.Unlock()
		u.watch(c)
		bob.run(c)
		want = append(want, "bob-phone: "+text)
		sees(t, uri, want, alice, bob)
		say(fmt.Sprint("after ", i))
		u.mu.Lock()
		if u.sent[u.pair(epoch, x.generation+1)] == "" {
			t.Errorf("crash %d: the next message didn't use the next key", i)
		}
		u.mu.Unlock()
	}
}
