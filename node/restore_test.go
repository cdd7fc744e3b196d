package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

func TestARestoredNodeGoesOnAsAnotherIncarnation(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	gamma := newNode(t, "gamma")
	federate(t, alpha, beta, gamma)
	carol, dave := newClient(t, gamma, "carol", "carol-laptop"), newClient(t, alpha, "dave", "dave-phone")
	carol.publish(1)
	carols := carol.subscribe()
	carols.live()
	last := dave.lastResort()
	dave.publishThese(last)
	dave.publish(3)
	asset := path.Base(alice.uploadAll([]byte("a picture")))
	seq := alice.commit(alice.adding(carol.user)...)
	carols.until(func() bool { return carol.group != nil })
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	granted := consentKey(prefixGranted, alice.user, bob.user, alice.room)
	if _, err := alpha.store.Commit(map[string][]byte{string(granted): codec.Marshal(grantedRecord{[]mls.KeyPackage{*bob.kps[0]}})}, nil); err != nil {
		t.Fatal(err)
	}
	dir, b := alpha.backUp()
	claimed := must(alice.claim(dave.user))(t).Clients[0].KeyPackage
	if claimed == nil || claimed.LastResort() {
		t.Fatalf("claimed %+v", claimed)
	}
	alpha.stop()
	if err := alices.ended(); err == nil {
		t.Error("the stream of a node that is down goes on")
	}

	data := must(os.MkdirTemp("", "parley"))(t)
	t.Cleanup(func() { os.RemoveAll(data) })
	restored := must(Restore(dir, data))(t)
	if restored.Incarnation != alpha.incarnation || restored.Entries != b.Entries {
		t.Errorf("restored %+v of %+v", restored, b)
	}
	again := must(VerifyBackup(dir))(t)
	if again.Incarnation != b.Incarnation || again.Records != b.Records {
		t.Errorf("the backup has %+v instead of %+v", again, b)
	}
	if _, err := Restore(dir, data); err == nil || !strings.Contains(err.Error(), "isn't empty") {
		t.Errorf("restored over another: %v", err)
	}
	before := alpha.incarnation
	alpha.cfg.Data = data
	alpha.start()
	eventually(t, alpha.settled)
	if alpha.incarnation <= before {
		t.Errorf("incarnation %d after %d", alpha.incarnation, before)
	}
	if got, err := os.ReadFile(filepath.Join(assetsDir(data), asset)); err != nil || string(got) != "a picture" {
		t.Errorf("the asset is %q (%v)", got, err)
	}

	// What may have been handed out isn't a second time, unless it is a last resort, which counts as handed out.
	if n := storedUnder(t, alpha, prefixGranted); n != 0 {
		t.Errorf("%d KeyPackages of others are left", n)
	}
	alice.authenticate()
	dave.authenticate()
	if have := dave.publishThese(); have.Available != 0 || have.LastResort {
		t.Errorf("the restored node has %+v", have)
	}
	resp := must(alice.claim(dave.user))(t)
	if resp.Code != mimi.KeyMaterialSuccess || string(resp.Clients[0].KeyPackage.Ref()) != string(last.Ref()) {
		t.Errorf("claimed %+v", resp)
	}
	dave.publish(1)
	if kp := must(alice.claim(dave.user))(t).Clients[0].KeyPackage; kp == nil || kp.LastResort() || string(kp.Ref()) == string(claimed.Ref()) {
		t.Errorf("after more were published: %+v", kp)
	}

	// Rooms go on, and those who follow them know the incarnation.
	if next := alice.send("after"); next != seq+1 {
		t.Errorf("entry %d follows entry %d", next, seq)
	}
	bobs.until(func() bool { return slices.Contains(bob.texts, "after") })
	carols.until(func() bool { return slices.Contains(carol.texts, "after") })
	for _, n := range []*testNode{beta, gamma} {
		r := must(n.openRoom(alice.room))(t)
		if h := r.heads.last.Load(); h == nil || h.Incarnation != alpha.incarnation || h.Seq != seq+1 {
			t.Errorf("%s has the head %+v", n.cfg.Domain, h)
		}
		if list := must(n.listEvidence())(t); len(list) != 0 {
			t.Errorf("%s has evidence %+v", n.cfg.Domain, list)
		}
	}
}

func TestADamagedBackupIsNotRestored(t *testing.T) {
	n := newNode(t, "alpha")
	dir, _ := n.backUp()
	if err := os.Remove(filepath.Join(dir, backupFile)); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(t.TempDir(), "data")
	if _, err := Restore(dir, data); err == nil || !strings.Contains(err.Error(), "wasn't finished") {
		t.Errorf("a backup that wasn't finished: %v", err)
	}
	dir, _ = n.backUp()
	if err := os.RemoveAll(AuthorityDir(dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(dir, data); err == nil || !strings.Contains(err.Error(), "authority") {
		t.Errorf("a backup without the authority: %v", err)
	}
	if _, err := os.Stat(data); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was left: %v", err)
	}
}

func TestARestoredHubTakesWhatFollowersHave(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	dir, _ := alpha.backUp()
	alice.send("after the backup")
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	seq = alice.send("in the next epoch")
	bobs.until(func() bool { return slices.Contains(bob.texts, "in the next epoch") })
	alpha.stop()
	if err := alices.ended(); err == nil {
		t.Error("the stream of a node that is down goes on")
	}
	want := must(beta.linkAt(alice.room, seq))(t)
	alpha.restore(dir)
	if l := must(alpha.linkAt(alice.room, seq))(t); l == nil || *l != *want {
		t.Errorf("entry %d has the link %v instead of %v", seq, l, want)
	}
	alice.authenticate()
	if next := alice.send("goes on"); next != seq+1 {
		t.Errorf("entry %d follows entry %d", next, seq)
	}
	bobs.until(func() bool { return slices.Contains(bob.texts, "goes on") })
}

func TestAFollowerDropsWhatARestoredHubHasLost(t *testing.T) {
	alpha, beta, alice, bob, _, bobs := twoNodes(t)
	alice.send("before")
	backup, _ := alpha.backUp()
	old := alpha.cfg
	alice.send("lost")
	last := alice.send("lost, too")
	bobs.until(func() bool { return bob.seq >= last })
	before := alpha.incarnation

	// The follower can't be asked: the room goes on without what only it has.
	beta.stop()
	alpha.cfg.restoreFor = time.Millisecond
	alpha.restore(backup)
	if alpha.incarnation <= before {
		t.Errorf("incarnation %d after %d", alpha.incarnation, before)
	}
	alice.connect()
	alice.authenticate()
	seq := alice.send("instead")
	if seq > last {
		t.Fatalf("entry %d isn't one that was given before", seq)
	}
	beta.start()
	eventually(t, func() error {
		if !bytes.Equal(beta.logged(alice.room, seq), alpha.logged(alice.room, seq)) {
			return errors.New("the follower has another entry")
		}
		if d := must(beta.openRoom(alice.room))(t).durable.Load(); d != seq {
			return fmt.Errorf("the follower shows entries up to %d", d)
		}
		return nil
	})
	if beta.logged(alice.room, last) != nil {
		t.Error("the follower has an entry that its hub hasn't")
	}
	if m := must(beta.member(bob.uri, alice.room))(t); m.anew != seq {
		t.Errorf("bob's membership is %+v, entry %d is another one than he has", m, seq)
	}
	bob.authenticate()
	bobs = bob.subscribe()
	for {
		if b := bobs.next().GetBehind(); b != nil {
			if b.Room != string(alice.room) || b.Last != seq {
				t.Errorf("bob is behind: %v", b)
			}
			break
		}
	}

	// The node that was superseded learns of it with the proof, and its store is fenced off.
	successor := alpha.Node
	alpha.stop()
	if successor.incarnation <= before {
		t.Fatal("no successor")
	}
	alpha.cfg = old
	alpha.start()
	if err := alpha.exchange(t.Context(), beta.cfg.Domain); err != nil {
		t.Logf("exchange: %v", err)
	}
	select {
	case err := <-alpha.done:
		if !errors.Is(err, errSuperseded) {
			t.Errorf("the node that was superseded ends with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the node that was superseded goes on")
	}
	alpha.cancel()
	alpha.cancel = nil
	if again, err := Open(alpha.cfg, nil); !errors.Is(err, errSuperseded) {
		t.Errorf("the store that was superseded opens: %v", err)
		again.Close()
	}
}
