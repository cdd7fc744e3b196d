package client

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// witness sees all that a device writes: the secrets, and the sealed values that a store which forgets nothing has.
type witness struct {
	t       *testing.T
	mu      sync.Mutex
	secrets map[string]string // what it is, by the secret
	slots   []blob            // sealed under keys of the key file
	group   []blob            // sealed under keys of a group
	keys    map[string][]byte // keys of groups now, by their entry
	files   [][]byte          // contents that the key file had
}

// blob is a sealed value with the key that is authenticated with it.
type blob struct{ key, value []byte }

func open32(key []byte, b blob) ([]byte, bool) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, false
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, false
	}
	plain, err := aead.Open(nil, nil, b.value, b.key)
	return plain, err == nil
}

// follow has the witness see what c writes from now on, and what it has.
func (w *witness) follow(c *Client) {
	var have store.Batch
	if err := c.db.Scan(nil, nil, func(key, value []byte) bool {
		have.Set(key, value)
		return true
	}); err != nil {
		w.t.Fatal(err)
	}
	w.note(c, &have)
	c.apply = func(b *store.Batch) (func() error, error) {
		wait, err := c.db.Apply(b)
		if err == nil {
			w.note(c, b)
		}
		return wait, err
	}
}

func (w *witness) note(c *Client, b *store.Batch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	file, err := os.ReadFile(filepath.Join(c.o.Dir, keyFileName))
	if err != nil {
		w.t.Error(err)
	}
	w.files = append(w.files, file)
	b.Changes(func(key, value []byte) { // the keys of groups first
		if !erasable(key) || key[0] != prefixRoom[0] {
			return
		}
		if delete(w.keys, string(key)); value != nil {
			w.keys[string(key)] = bytes.Clone(value)
			w.secret(value, "key of a group's state")
		}
	})
	b.Changes(func(key, value []byte) {
		if value == nil {
			return
		}
		if erasable(key) {
			raw, err := c.db.Pebble.Get(key)
			if err != nil {
				w.t.Error(err)
			}
			if len(raw) > sealedPrefix {
				w.slots = append(w.slots, blob{bytes.Clone(key), raw[sealedPrefix:]})
			}
		}
		w.entry(key, value)
	})
}

func (w *witness) secret(s []byte, what string) {
	if _, ok := w.secrets[string(s)]; !ok && len(s) >= 12 {
		w.secrets[string(s)] = what
	}
}

// fields notes the opaque fields in which a value ends.
func (w *witness) fields(value []byte, size int, what string) {
	r := codec.NewReader(value[max(0, len(value)-size):])
	for r.Err() == nil && !r.Empty() {
		w.secret(r.Opaque(), what)
	}
}

// entry notes the secrets of an entry; see layout.go, and package mls for what a group's state consists of.
func (w *witness) entry(key, value []byte) {
	switch string(key[:1]) {
	case prefixKeyPackage:
		w.fields(value, 2*33, "private key of a KeyPackage")
		return
	case prefixJoin: // an mls.PendingJoin, whose secrets come last
		r := codec.NewReader(value)
		r.Uint16()
		new(mls.MLSMessage).UnmarshalMLS(r)
		new(mls.GroupInfo).UnmarshalMLS(r)
		new(mls.RatchetTree).UnmarshalMLS(r)
		for range 9 {
			w.secret(r.Opaque(), "secret of an external commit")
		}
		if r.Err() != nil {
			w.t.Errorf("external commit: %v", r.Err())
		}
		return
	case prefixRoom:
	default:
		return
	}
	prefix := key[:bytes.IndexByte(key, 0)+1]
	if key[len(prefix)] != roomGroup || erasable(key) {
		return
	}
	name := key[len(prefix)+1:]
	seal := string(prefix) + string(roomGroup) + "y"
	if name[0] == 's' || name[0] == 'e' {
		seal = string(prefix) + string(roomGroup) + "z" + string(name[1:9])
	}
	b := blob{bytes.Clone(name), bytes.Clone(value)}
	if name[0] == 'h' { // begins with its format in the clear
		b = blob{append(b.key, value[:2]...), b.value[2:]}
	}
	plain, ok := open32(w.keys[seal], b)
	if !ok {
		// Without secrets, because a former member has none: whether it is active, or how it came in.
		former := w.keys[seal] == nil && (name[0] == 'h' && value[len(value)-1] == 0 || name[0] == 'j' && len(value) == 16)
		if strings.ContainsRune("hkcpseaj", rune(name[0])) && !former {
			w.t.Errorf("entry %q isn't sealed under the key of the state", name)
		}
		return
	}
	w.group = append(w.group, b)
	switch name[0] {
	case 'h':
		w.fields(plain, 8*33+1, "secret of an epoch")
	case 'k':
		r := codec.NewReader(plain)
		r.Uint32()
		r.Vector(func(r *codec.Reader) {
			r.Uint32()
			w.secret(r.Opaque(), "private key of a node")
		})
	case 'a':
		w.secret(plain, "secret of a component")
	case 's':
		switch name[9] {
		case 'n':
			w.secret(plain, "secret of the secret tree")
		case 'r':
			w.secret(plain[5:], "ratchet secret")
		case 's':
			w.secret(plain[:16], "key of a message")
		}
	}
}

// attack returns all that the sealed values yield to the keys in contents of the key file.
func (w *witness) attack(files [][]byte) (plain [][]byte) {
	keys := make(map[string]bool)
	for _, f := range files {
		for at := slotSize; at+slotSize <= len(f); at += slotSize {
			keys[string(f[at+8:at+8+keySize])] = true
		}
	}
	groups := make(map[string]bool)
	for _, b := range w.slots {
		for k := range keys {
			if p, ok := open32([]byte(k), b); ok {
				plain = append(plain, p)
				groups[string(p)] = true
			}
		}
	}
	for _, b := range w.group {
		for k := range groups {
			if p, ok := open32([]byte(k), b); ok && len(k) == keySize {
				plain = append(plain, p)
			}
		}
	}
	return plain
}

// found counts by kind the secrets that are in some of the texts, those in except left out.
func (w *witness) found(texts [][]byte, except map[string]bool) map[string]int {
	n := make(map[string]int)
	all := bytes.Join(texts, []byte{0})
	for s, what := range w.secrets {
		if !except[s] && bytes.Contains(all, []byte(s)) {
			n[what]++
		}
	}
	return n
}

// alive returns the secrets that a stopped device still has.
func (w *witness) alive(d *device) map[string]bool {
	c, err := Open(w.t.Context(), d.o)
	if err != nil {
		w.t.Fatal(err)
	}
	now := &witness{t: w.t, secrets: make(map[string]string), keys: make(map[string][]byte)}
	now.follow(c)
	if err := c.Close(); err != nil {
		w.t.Fatal(err)
	}
	all := make(map[string]bool)
	for s := range now.secrets {
		all[s] = true
	}
	return all
}

// TestDeletedSecretsCannotBeReadFromDisk plays two devices through what makes and deletes secrets, and then reads every
// byte that they have on disk, and opens with the keys that are there all that was ever sealed.
func TestDeletedSecretsCannotBeReadFromDisk(t *testing.T) {
	p := providers(t, "alpha")
	alice, bob := p[0].enrol("alice", "alice-laptop"), p[0].enrol("bob", "bob-phone")
	tablet := p[0].enrol("bob", "bob-tablet")
	seen := make(map[*device]*witness)
	reopen := func(d *device) {
		d.stop()
		w := seen[d]
		if w == nil {
			w = &witness{t: t, secrets: make(map[string]string), keys: make(map[string][]byte)}
			seen[d] = w
		}
		c, err := Open(t.Context(), d.o)
		if err != nil {
			t.Fatal(err)
		}
		w.follow(c)
		d.run(c)
	}
	tablet.stop() // joins by itself, with what it has on disk
	reopen(bob)
	// Only the phone is added: the tablet's KeyPackages are for what comes.
	room := alice.create(bob.User())
	uri := room.URI()
	alice.say(uri, "one")
	bob.say(uri, "two")
	reopen(tablet)
	agree(t, uri, alice, bob, tablet)
	if err := room.Remove(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	within(t, func() error {
		if bob.member(uri) || tablet.member(uri) {
			return fmt.Errorf("still members")
		}
		return nil
	})
	if err := room.Add(t.Context(), bob.User()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, tablet)
	own := alice.room(uri)
	for i := range 7 { // more epochs than are kept
		var sealed [][]byte
		for j := range 3 {
			s, err := own.SealMessage(fmt.Append(nil, "message ", i, " ", j))
			if err != nil {
				t.Fatal(err)
			}
			sealed = append(sealed, s)
		}
		for _, j := range []int{2, 0} { // out of order, and one never
			if _, err := alice.SubmitRaw(t.Context(), uri, sealed[j]); err != nil {
				t.Fatal(err)
			}
		}
		bob.say(uri, fmt.Sprint("of bob ", i))
		by := []*device{alice, bob, tablet}[i%3]
		if err := by.room(uri).UpdateKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
		agree(t, uri, alice, bob, tablet)
	}
	if err := tablet.enterAgain(uri); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, tablet)
	if err := own.UpdateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	agree(t, uri, alice, bob, tablet)
	alice.say(uri, "in the last epoch")
	bob.say(uri, "read and used")
	agree(t, uri, alice, bob, tablet)

	for d, w := range seen {
		name := d.ID().ID()
		reopen(d) // what was used within the epoch goes too
		d.stop()
		except := w.alive(d)
		gone := make(map[string]int)
		for s, what := range w.secrets {
			if !except[s] {
				gone[what]++
			}
		}
		want := []string{"private key of a KeyPackage", "key of a group's state", "secret of an epoch", "private key of a node",
			"secret of the secret tree", "ratchet secret", "key of a message"}
		if d == tablet {
			want = append(want, "secret of an external commit")
		}
		for _, what := range want {
			if gone[what] == 0 {
				t.Errorf("%s: no %s was deleted: %v", name, what, gone)
			}
		}
		var files [][]byte
		var file []byte
		err := filepath.WalkDir(d.o.Dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			if filepath.Base(path) == keyFileName {
				file = b
			}
			files = append(files, b)
			return err
		})
		if err != nil || len(files) < 4 {
			t.Fatalf("%d files, %v", len(files), err)
		}
		if n := w.found(files, nil); len(n) > 0 {
			t.Errorf("%s: in the clear on disk: %v", name, n)
		}
		if n := w.found(w.attack([][]byte{file}), except); len(n) > 0 {
			t.Errorf("%s: deleted, and opened with the keys on disk: %v", name, n)
		}
		// The same search finds all of them if no key was ever erased.
		if n := w.found(w.attack(w.files), except); fmt.Sprint(n) != fmt.Sprint(gone) {
			t.Errorf("%s: without erasure %v of %v are found", name, n, gone)
		}
	}
}

// member says whether the device is a member.
func (d *device) member(uri mimi.URI) bool {
	r, err := d.Room(uri)
	return err == nil && r.Active()
}

// enterAgain freezes the room and enters it anew by an external commit.
func (d *device) enterAgain(uri mimi.URI) error {
	r := d.room(uri)
	r.mu.Lock()
	r.frozen = fmt.Errorf("%w: by the test", ErrFrozen)
	r.mu.Unlock()
	_, err := d.Join(d.t.Context(), uri)
	return err
}
