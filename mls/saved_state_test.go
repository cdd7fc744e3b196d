package mls

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// update writes the saved state of stateFormat anew. The states of formats that a release has written stay as they are:
// a new format gets a new folder, and this test goes on reading the old ones.
var update = flag.Bool("update", false, "write the state of the present format anew")

// savedState is the folder of a format's states.
func savedState(format int) string { return fmt.Sprintf("testdata/state-v%d", format) }

// saved is a folder of states, each a file of keys and values in hexadecimal, and of what goes with them by name.
type saved map[string]*memStore

func (s saved) write(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, store := range s {
		var b bytes.Buffer
		for _, k := range slices.Sorted(maps.Keys(store.m)) {
			b.WriteString(hex.EncodeToString([]byte(k)) + " " + hex.EncodeToString([]byte(store.m[k])) + "\n")
		}
		if err := os.WriteFile(filepath.Join(dir, name+".txt"), b.Bytes(), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

func (s saved) read(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		s[name] = newMemStore()
		lines := bufio.NewScanner(bytes.NewReader(b))
		lines.Buffer(nil, len(b)+1)
		for lines.Scan() {
			k, v, ok := strings.Cut(lines.Text(), " ")
			key, err1 := hex.DecodeString(k)
			value, err2 := hex.DecodeString(v)
			if !ok || err1 != nil || err2 != nil {
				t.Fatalf("%s: damaged line", name)
			}
			s[name].Set(key, value)
		}
		if err := lines.Err(); err != nil {
			t.Fatal(err)
		}
	}
}

// writeSavedState makes a group whose states have an entry of every kind.
func writeSavedState(t *testing.T) {
	s := saved{"more": newMemStore()}
	more := func(name string, m codec.Marshaler) { s["more"].Set([]byte(name), codec.Marshal(m)) }
	f := newForgery(t)
	r, alice, bob := f.room, f.alice, f.bob
	r.talk()
	late, err := alice.Encrypt(alice.store, nil, []byte("late"))
	f.must(err)
	r.commit(alice, CommitOptions{Proposals: []Proposal{remove(f.dave.OwnLeaf()), appData(0x8002, "data")}})
	r.commit(f.carol, CommitOptions{})
	skipped, err := alice.Encrypt(alice.store, nil, []byte("skipped"))
	f.must(err)
	read, err := alice.Encrypt(alice.store, nil, []byte("read"))
	f.must(err)
	f.must(second(bob.Receive(bob.store, read)))
	r.propose(bob.ProposeUpdate(bob.store, UpdateOptions{}))
	r.propose(f.carol.Propose(f.carol.store, nil, sharedPSK()))
	eve := newSigner(t, testSuite)
	join, err := ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: r.server.GroupInfo(), Tree: fresh(t, r.server.Tree()),
		Credential: BasicCredential([]byte("eve")), Signer: eve})
	f.must(err)
	joiner, kp, secrets := keyPackage(t, testSuite, "joiner")
	f.must(second(alice.Commit(alice.store, CommitOptions{Proposals: []Proposal{add(kp)}, TreeInWelcome: true})))

	s["alice"], s["bob"], s["dave"], s["server"] = alice.store, bob.store, f.dave.store, r.store
	s["carol"] = f.carol.store
	more("late", late)
	more("skipped", skipped)
	more("join", join)
	more("key package", kp)
	more("key package secrets", secrets)
	for name, signer := range map[string]crypto.Signer{"alice": alice.signer, "bob": bob.signer, "carol": f.carol.signer,
		"dave": f.dave.signer, "joiner": joiner.signer, "eve": eve} {
		s["more"].Set([]byte("seed "+name), signer.(ed25519.PrivateKey).Seed())
	}
	s["more"].Set([]byte("authenticator"), alice.EpochAuthenticator())

	// Carol's state if she enters anew, and one of a group that has ended; both are of their own.
	s["resync"] = f.carol.store.clone()
	again := &client{name: "carol", signer: f.carol.signer, store: s["resync"]}
	again.reload(t)
	resync, err := again.Resync(again.store, ResyncOptions{GroupInfo: r.server.GroupInfo(), Tree: fresh(t, r.server.Tree())})
	f.must(err)
	more("resync", resync.Message())
	other := newForgery(t)
	other.room.commit(other.alice, CommitOptions{Proposals: []Proposal{{Type: ProposalReInit,
		ReInit: &ReInit{GroupID: []byte("next"), Version: MLS10, CipherSuite: testSuite}}}})
	s["ended"] = other.alice.store
	s["more"].Set([]byte("seed ended"), other.alice.signer.(ed25519.PrivateKey).Seed())
	s.write(t, savedState(stateFormat))
}

// TestStatesOfReleasedFormatsAreRead goes on from states that were saved: nothing that a group needs was lost.
func TestStatesOfReleasedFormatsAreRead(t *testing.T) {
	if *update {
		writeSavedState(t)
	}
	for format := 1; format <= stateFormat; format++ {
		t.Run(savedState(format), func(t *testing.T) { readSavedState(t, format) })
	}
}

func readSavedState(t *testing.T, format int) {
	s := make(saved)
	names := []string{"more", "alice", "bob", "carol", "dave", "server"}
	if format > 1 {
		names = append(names, "resync", "ended")
	}
	open := func() (*room, []byte) {
		s.read(t, savedState(format), names...)
		r := &room{t: t, cs: testSuite, store: s["server"]}
		cfg := publicConfig()
		cfg.IgnoreLifetime = true // of the KeyPackage, which was made with the state
		server, err := LoadPublicGroup(cfg, r.store.all())
		if err != nil {
			t.Fatal(err)
		}
		r.server = server
		for _, name := range []string{"alice", "bob", "carol"} {
			c := &client{name: name, signer: s.signer(name), store: s[name]}
			c.reload(t)
			c.cfg.MaxPastAge = -1 // the state may be older than that
			r.members = append(r.members, c)
		}
		return r, []byte(s["more"].m["authenticator"])
	}
	value := func(name string, u codec.Unmarshaler) {
		t.Helper()
		if err := codec.Unmarshal([]byte(s["more"].m[name]), u); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	r, authenticator := open()
	r.check()
	r.checkStores()
	for _, c := range r.members {
		switch _, err := c.SafeExport(c.store, 0x8001); {
		case format == 1 && !errors.Is(err, ErrUnsupported):
			t.Errorf("secret of an epoch that was saved without them: got %v, want ErrUnsupported", err)
		case format > 1 && err != nil:
			t.Error(err)
		}
	}
	alice, bob := r.members[0], r.members[1] // bob's state is sealed from the next epoch on
	if err := alice.Reseal(alice.store); err != nil {
		t.Fatal(err)
	}
	r.checkStores()
	if !allSealed(alice.store) || allSealed(bob.store) != (format > 1) {
		t.Error("not sealed after Reseal, or before in format 1")
	}
	alice.reload(t)
	if !bytes.Equal(alice.EpochAuthenticator(), authenticator) {
		t.Error("the state of another epoch")
	}
	if n, m := len(bob.Pending()), len(r.server.Pending()); n != 2 || m != 2 {
		t.Errorf("bob has %d pending proposals, the server %d, want 2", n, m)
	}
	for _, name := range []string{"late", "skipped"} {
		m := new(MLSMessage)
		value(name, m)
		got, err := bob.Receive(bob.store, m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if data := got.(*ApplicationMessage).Data; string(data) != name {
			t.Errorf("%s: got %q", name, data)
		}
	}
	r.talk()

	// The staged commit, whose Welcome a stored KeyPackage opens.
	c := alice.PendingCommit()
	if c == nil {
		t.Fatal("no staged commit")
	}
	kp, secrets := new(KeyPackage), new(KeyPackageSecrets)
	value("key package", kp)
	value("key package secrets", secrets)
	r.accept(c.Message(), c.GroupInfo(), c.Tree())
	if err := alice.Confirm(alice.store); err != nil {
		t.Fatal(err)
	}
	r.distribute(c.Message(), alice)
	joiner := &client{name: "joiner", signer: s.signer("joiner"), store: newMemStore()}
	g, err := JoinGroup(testConfig(), joiner.store, joiner.signer, c.Welcome(), kp, secrets, nil)
	if err != nil {
		t.Fatal(err)
	}
	joiner.Group = g
	r.members = append(r.members, joiner)
	r.check()
	r.talk()
	for range defaultPastEpochs {
		r.commit(bob, CommitOptions{})
	}
	if !allSealed(bob.store) {
		t.Error("what isn't sealed is kept")
	}
	r.check()
	r.checkStores()
	if _, err := alice.SafeExport(nil, 0x8001); err != nil {
		t.Error(err)
	}

	// The external commit that waits for the hub instead.
	r, _ = open()
	p, err := LoadPendingJoin(testConfig(), s.signer("eve"), []byte(s["more"].m["join"]))
	if err != nil {
		t.Fatal(err)
	}
	r.accept(p.Message(), p.GroupInfo(), p.Tree())
	eve := &client{name: "eve", signer: s.signer("eve"), store: newMemStore()}
	if eve.Group, err = p.Confirm(eve.store); err != nil {
		t.Fatal(err)
	}
	r.distribute(p.Message(), nil)
	r.members = append(r.members, eve)
	r.check()
	r.talk()
	r.checkStores()

	_, _ = open()
	kinds := make(map[byte]bool)
	for _, store := range s {
		for k := range store.m {
			kinds[k[0]] = true
		}
	}
	for kind := range keyLength {
		if !kinds[kind] && !(format == 1 && slices.Contains([]byte{keyStateSeal, keyEpochSeal, keyExport, keyReInit, keyEntrance}, kind)) {
			t.Errorf("no saved entry of kind %q", kind)
		}
	}
	newer := s["alice"].clone()
	newer.m["h"] = newer.m["h"][:1] + "\x03" + newer.m["h"][2:]
	if _, err := LoadGroup(testConfig(), nil, newer.all()); !errors.Is(err, ErrUnsupported) {
		t.Errorf("state of a format to come: got %v, want ErrUnsupported", err)
	}

	dave := &client{name: "dave", signer: s.signer("dave"), store: s["dave"]}
	dave.reload(t)
	if dave.Active() {
		t.Error("a removed member is active")
	}
	sameState(t, "dave", dump(dave.Group), dave.store.m)
	if format == 1 {
		return
	}
	carol := &client{name: "carol", signer: s.signer("carol"), store: s["resync"]}
	carol.reload(t)
	if p := carol.PendingResync(); p == nil || !bytes.Equal(codec.Marshal(p.Message()), []byte(s["more"].m["resync"])) {
		t.Error("the resync isn't pending any more")
	}
	ended := &client{name: "ended", signer: s.signer("ended"), store: s["ended"]}
	ended.reload(t)
	if re := ended.ReInit(); re == nil || string(re.GroupID) != "next" {
		t.Errorf("the group hasn't ended: %v", re)
	}
}

func (s saved) signer(name string) crypto.Signer {
	return ed25519.NewKeyFromSeed([]byte(s["more"].m["seed "+name]))
}
