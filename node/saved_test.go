package node

import (
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// update writes the saved stores of formatVersion anew. Those of formats that a release has written stay as they are: a
// new format gets a new folder, and this test goes on reading the old ones.
var update = flag.Bool("update", false, "write the saved stores of the present format anew")

// savedStores is the folder with the saved stores of a format.
func savedStores(format int) string { return fmt.Sprintf("testdata/store-v%d", format) }

// writeSavedStores saves the stores of a hub and a follower, with a record of every kind, and what is to be found in them.
func writeSavedStores(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	alice.publish(1)
	alice.publishThese(alice.lastResort())
	alice.setProfile(&api.Profile{Fields: []*api.ProfileField{claim("given_name", "Alice", searchPart)}})
	alice.uploadAll([]byte("an asset"))
	dave := newClient(t, alpha, "dave", "dave-pc")
	dave.createFranked()
	if err := dave.report(dave.room, mimi.AbuseReport{ReportingUser: dave.user, AllegedAbuser: dave.user, Messages: []mimi.AbusiveMessage{dave.abuse("you fool")}}); err != nil {
		t.Fatal(err)
	}
	if err := alice.consent(mimi.ConsentRequest, alice.user, bob.user, ""); err != nil {
		t.Fatal(err)
	}
	if err := bob.consent(mimi.ConsentRequest, bob.user, alice.user, ""); err != nil {
		t.Fatal(err)
	}
	grant := &mimi.ConsentEntry{Operation: mimi.ConsentGrant, Scope: mimi.ConsentScope{Requester: alice.user, Target: bob.user}}
	bob.keyPackages(1)
	grant.KeyPackages = append(grant.KeyPackages, *bob.kps[len(bob.kps)-1])
	if err := (provider{alpha.Node}).UpdateConsent(t.Context(), "beta.example", grant); err != nil {
		t.Fatal(err)
	}
	phone := newClient(t, alpha, "alice", "alice-phone")
	phone.publish(2)
	for _, c := range []*testClient{alice, bob} {
		for generation, text := range []string{"one", "two"} {
			if resp, _, err := c.submitWith(c.seal(text), uint32(generation)); err != nil || resp.Code != mimi.SubmitAccepted {
				t.Fatal(resp, err)
			}
		}
	}
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.seq >= seq })
	for _, c := range []*testClient{alice, bob} {
		must(c.api.Acknowledge(t.Context(), connect.NewRequest(&api.AcknowledgeRequest{Cursors: []*api.Cursor{{Room: string(c.room), Seq: c.seq}}})))(t)
	}
	l := &liar{t: t, alpha: alpha, beta: beta, room: alice.room, incarnation: alpha.incarnation, last: seq}
	l.notified(l.tell(seq, l.chainAt(seq-1).chain, l.invent()))
	beta.stop()
	if err := alice.consent(mimi.ConsentRequest, alice.user, "mimi://beta.example/u/erin", ""); err != nil { // waits for beta
		t.Fatal(err)
	}
	resp := must(alice.claim(alice.user))(t)
	for _, k := range resp.Clients {
		if _, uri, err := alpha.verifier.IdentityOf(k.KeyPackage.LeafNode.Credential); err == nil && uri == phone.uri {
			seq = alice.commit(mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *k.KeyPackage}})
		}
	}
	alices.until(func() bool { return alice.seq >= seq })
	alice.send("last")
	folder := savedStores(formatVersion)
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	for i, n := range []*testNode{alpha, beta} { // in this order: the hub tells beta nothing more
		name := []string{"alpha", "beta"}[i]
		if name == "beta" {
			n.start()
		}
		var log strings.Builder
		r := must(n.openRoom(alice.room))(t)
		fmt.Fprintln(&log, alice.room)
		for seq := uint64(1); seq <= r.record.last; seq++ {
			f := must(n.entry(alice.room, seq))(t)
			fmt.Fprintf(&log, "%x\n", messageHash(f.Message))
		}
		if err := n.trimLogs(time.Now()); err != nil { // notes how far logs are
			t.Fatal(err)
		}
		all := make(map[string][]byte)
		for k, v := range dump(t, n.Node) {
			all["n/"+k] = []byte(v)
		}
		n.stop()
		db := must(store.Open(filepath.Join(folder, name), store.Options{}))(t)
		if _, err := db.Commit(all, nil); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, name+".txt"), []byte(log.String()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStoresOfReleasesAreServed runs a hub and a follower on stores that a release has written, with authorities of now:
// clients get the log from its beginning, and it goes on.
func TestStoresOfReleasesAreServed(t *testing.T) {
	if *update {
		writeSavedStores(t)
	}
	for format := 1; format <= formatVersion; format++ {
		t.Run(fmt.Sprint(format), func(t *testing.T) { testSavedStores(t, format) })
	}
}

func testSavedStores(t *testing.T, format int) {
	kinds := make(map[string]int)
	folder := savedStores(format)
	for _, name := range []string{"alpha", "beta"} {
		b, err := os.ReadFile(filepath.Join(folder, name+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		room, rest, _ := strings.Cut(string(b), "\n")
		log := strings.Fields(rest)
		dir := filepath.Join(t.TempDir(), "store")
		if err := os.CopyFS(dir, os.DirFS(filepath.Join(folder, name))); err != nil {
			t.Fatal(err)
		}
		db := must(store.Open(dir, store.Options{}))(t)
		// What is kept for a while only is there before the node runs.
		for prefix, n := range readRecords(t, db) {
			kinds[prefix] += n
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}

		n := newNodeOn(t, name, func(o store.Options) (*store.Pebble, error) { return store.Open(dir, o) })
		user, device := "alice", "alice-laptop"
		if name == "beta" {
			user, device = "bob", "bob-phone"
		}
		c := newClient(t, n, user, device)
		c.room = mimi.URI(room)
		stream := c.subscribe()
		entry := func() *api.LogEntry {
			for {
				if e := stream.next().GetEntry(); e != nil {
					return e
				}
			}
		}
		member := must(n.member(c.uri, c.room))(t)
		if member == nil {
			t.Fatalf("%s: %s isn't a member", name, c.uri)
		}
		for c.seq = member.start; int(c.seq) < len(log); {
			e := entry()
			var f mimi.FanoutMessage
			if err := codec.Unmarshal(e.Fanout, &f); err != nil {
				t.Fatal(err)
			}
			c.seq++
			if got := hex.EncodeToString(messageHash(f.Message)); e.Seq != c.seq || got != log[c.seq-1] {
				t.Fatalf("%s: entry %d of hash %s, want %d of %s", name, e.Seq, got, c.seq, log[c.seq-1])
			}
		}
		last := must(n.lastSent(c.uri, sha256.Sum256([]byte(c.room.Group()))))(t)
		if last == nil || last.generation != 1 {
			t.Errorf("%s: %s has sent %+v last", name, c.uri, last)
		}
		r := must(n.openRoom(c.room))(t)
		r.mu.Lock()
		record, link := r.record, r.link
		r.mu.Unlock()
		if format > 1 && link == nil {
			t.Errorf("%s: no chain at entry %d", name, record.last)
		}
		if name != "alpha" {
			if h := r.heads.last.Load(); format > 1 && (h == nil || h.Seq != record.last || h.Chain != link.chain) {
				t.Errorf("the hub's head is %+v", h)
			}
			if list := must(n.listEvidence())(t); len(list) != format-1 {
				t.Errorf("evidence %+v", list)
			}
			testTrimmed(t, n, c.room, uint64(len(log)))
			continue
		}
		m := &mls.MLSMessage{Version: mls.MLS10, WireFormat: mls.WireFormatPrivateMessage, Private: &mls.PrivateMessage{
			GroupID: r.group.GroupID(), Epoch: r.group.Epoch(), ContentType: mls.ContentApplication,
			EncryptedSenderData: []byte("a hub can't read it"), Ciphertext: []byte("nor this"),
		}}
		resp, seq, err := c.submit(&mimi.SubmitMessageRequest{Message: m, Sender: c.user})
		if err != nil || resp.Code != mimi.SubmitAccepted || seq != uint64(len(log)+1) {
			t.Errorf("a message: %+v, number %d, %v", resp, seq, err)
		}
		if e := entry(); e.Seq != seq {
			t.Errorf("entry %d after entry %d", e.Seq, len(log))
		}
		testTrimmed(t, n, c.room, seq)
	}
	want := []string{prefixRoom, prefixGroup, prefixLog, prefixAnswer, prefixFanout, prefixWelcome, prefixMember,
		prefixSent, prefixDevice, prefixKeyPackage, prefixOwnRef, prefixUserRoom, prefixOutbox}
	if format > 1 {
		want = append(want, prefixLink, prefixCut, prefixHead, prefixEvidence, prefixHubKey, prefixAcked, prefixLastResort, prefixClaimedRef, prefixReport,
			prefixConsent, prefixConsentOf, prefixGranted, prefixConsentOut, prefixProfile, prefixTerm, prefixAsset, prefixAssetRef)
	}
	for _, p := range want {
		if kinds[p] == 0 {
			t.Errorf("no store has anything under %s", p)
		}
	}
}

// testTrimmed lets the log of a store that a release has written age.
func testTrimmed(t *testing.T, n *testNode, room mimi.URI, last uint64) {
	t.Helper()
	a := ages(t, 2*time.Hour, time.Hour, n)[0]
	a.pass(4 * time.Hour)
	if log := a.log(room); len(log) != 1 || log[0] != last {
		t.Errorf("of %d entries, all of them old, the log has %v", last, log)
	}
}

// readRecords decodes what is a record in a store, and counts all by prefix.
func readRecords(t *testing.T, db store.Store) map[string]int {
	t.Helper()
	kinds := make(map[string]int)
	all := records()
	err := store.ScanPrefix(db, []byte("n/"), func(k, v []byte) bool {
		p := "n/" + string(k[:min(len(k), 2)])
		kinds[p]++
		if r := all[map[string]string{prefixRoom: "room", prefixAnswer: "answer", prefixWelcome: "welcome", prefixMember: "member",
			prefixSent: "sent", prefixOwnRef: "ref", prefixClaimedRef: "ref"}[p]]; r != nil {
			if err := codec.Unmarshal(v, r); err != nil {
				t.Errorf("%s: %v", k, err)
			}
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return kinds
}
