package mls

import (
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// opened returns a store's state without its seals, which is a state too.
func (s *memStore) opened() *memStore {
	out := &memStore{m: unsealed(s.m)}
	for k := range out.m {
		if Erasable([]byte(k)) {
			delete(out.m, k)
		}
	}
	out.m[string(key1(keyHeader))] = "\x00\x01" + out.m[string(key1(keyHeader))]
	return out
}

// editHeader changes the header of an opened state.
func (s *memStore) editHeader(t testing.TB, edit func(*header)) {
	t.Helper()
	h := new(header)
	if err := codec.Unmarshal([]byte(s.m["h"]), h); err != nil {
		t.Fatal(err)
	}
	edit(h)
	s.Set(key1(keyHeader), codec.Marshal(h))
}

// TestStatesSayWhatIsDamaged breaks what loading checks, one thing at a time.
func TestStatesSayWhatIsDamaged(t *testing.T) {
	f := newForgery(t)
	f.room.talk()
	f.room.propose(f.bob.Propose(f.bob.store, nil, sharedPSK()))
	_, kp, _ := keyPackage(t, testSuite, "new")
	f.must(second(f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{add(kp)}})))
	append0 := func(key []byte) func(s *memStore) { return func(s *memStore) { s.m[string(key)] += "\x00" } }
	set := func(key []byte, value string) func(s *memStore) {
		return func(s *memStore) { s.Set(key, []byte(value)) }
	}
	withHeader := func(edit func(*header)) func(s *memStore) {
		return func(s *memStore) { s.editHeader(t, edit) }
	}
	withStaged := func(edit func(c *PendingCommit)) func(s *memStore) {
		return func(s *memStore) {
			c := new(PendingCommit)
			f.must(codec.Unmarshal([]byte(s.m["c"]), c))
			edit(c)
			s.Set(key1(keyStaged), codec.Marshal(c))
		}
	}
	past := f.alice.past[0].context.Epoch
	for _, v := range []struct {
		what   string
		server bool
		damage func(s *memStore)
		want   string
	}{
		{"empty key", false, set(nil, "x"), "empty key"},
		{"kind of entry", false, set([]byte{'?'}, "x"), "state is damaged: key"},
		{"key too short", false, set([]byte{keyNode, 0}, "x"), "state is damaged: key"},
		{"key too long", false, set([]byte{keyPrivate, 0}, "x"), "state is damaged: key"},
		{"format", false, set(key1(keyHeader), "\x00\x63"), "state format 99"},
		{"header", false, append0(key1(keyHeader)), "trailing"},
		{"server's state", false, withHeader(func(h *header) { h.kind = kindPublicGroup }), "not a client's group"},
		{"client's state", true, withHeader(func(h *header) { h.kind, h.secrets, h.active = kindGroup, nil, false }), "not a public group"},
		{"suite", false, withHeader(func(h *header) { h.context.CipherSuite = 0xf00d }), "unsupported"},
		{"extensions of another epoch", false, withHeader(func(h *header) { h.extEpoch = 77 }), "no extensions of epoch 77"},
		{"tree of no leaves", false, withHeader(func(h *header) { h.slots = 0 }), "tree of 0 leaves"},
		{"tree of three leaves", false, withHeader(func(h *header) { h.slots = 3 }), "malformed: tree of 3 leaves"},
		{"tree of too many leaves", false, withHeader(func(h *header) { h.slots = 2 * maxLeafSlots }), "tree of 524288 leaves"},
		{"tree too small", false, withHeader(func(h *header) { h.slots = 2 }), "in a tree of 2 leaves"},
		{"tree too large", false, withHeader(func(h *header) { h.slots = 8 }), "not that of the epoch"},
		{"node", false, append0(key32(keyNode, 0)), "trailing"},
		{"leaf at a parent's place", false, func(s *memStore) { s.Set(key32(keyNode, 1), []byte(s.m[string(key32(keyNode, 0))])) }, "node 1 of type 1"},
		{"leaf of another", false, func(s *memStore) { s.Set(key32(keyNode, 2), []byte(s.m[string(key32(keyNode, 0))])) }, "not that of the epoch"},
		{"private keys", false, append0(key1(keyPrivate)), "trailing"},
		{"private keys of another leaf", false, func(s *memStore) {
			p := f.alice.private.clone()
			p.leaf = 1
			s.Set(key1(keyPrivate), codec.Marshal(p))
		}, "own leaf 0"},
		{"own leaf", false, withHeader(func(h *header) { h.own = 9 }), "own leaf 9"},
		{"own leaf that is blank", false, func(s *memStore) {
			s.editHeader(t, func(h *header) { h.own = 9 })
			p := f.alice.private.clone()
			p.leaf = 9
			s.Set(key1(keyPrivate), codec.Marshal(p))
		}, "own leaf 9"},
		{"pending proposal", false, append0(key32(keyPending, 0)), "trailing"},
		{"extensions", false, append0(key64(keyExtensions, 0)), "trailing"},
		{"secret of no kind", false, set(append(key64(keySecret, past), 'x'), "x"), "load secret tree"},
		{"node beyond the exporter tree", false, set(key32(keyExport, 1<<31), strings.Repeat("x", 32)), "exporter tree"},
		{"key that seals the state", false, set(key1(keyStateSeal), "short"), "sealing key of 5 bytes"},
		{"key that seals an epoch", false, set(key64(keyEpochSeal, 1), "short"), "sealing key of 5 bytes"},
		{"reinit", false, set(key1(keyReInit), "x"), "truncated"},
		{"entrance", false, set(key1(keyEntrance), "\x00"), "truncated"},
		{"sealed header without its key", false, func(s *memStore) { s.m["h"] = f.alice.store.m["h"] }, "the key that seals the state is missing"},
		{"skipped key without its ratchet", false, set(append(key64(keySecret, f.alice.Epoch()), skippedKey(9, 1, 7)...),
			strings.Repeat("x", testSuite.aeadKeySize()+testSuite.aeadNonceSize())), "ratchet of leaf 9 is missing"},
		{"past epoch", false, append0(key64(keyPast, past)), "trailing"},
		{"past epoch of another number", false, func(s *memStore) {
			s.Set(key64(keyPast, 77), []byte(s.m[string(key64(keyPast, past))]))
		}, "epoch 77"},
		{"past epoch without its extensions", false, func(s *memStore) {
			e := *f.alice.past[0]
			e.extEpoch = 77
			s.Set(key64(keyPast, past), codec.Marshal(&e))
		}, "state is damaged: epoch"},
		{"past epoch of another suite", false, func(s *memStore) {
			e := *f.alice.past[0]
			e.context.CipherSuite = X25519_CHACHA20POLY1305_SHA256_Ed25519
			s.Set(key64(keyPast, past), codec.Marshal(&e))
		}, "state is damaged: epoch"},
		{"leaf of a past epoch", false, set(keyLeaf(past, 0), "x"), "truncated"},
		{"staged commit", false, append0(key1(keyStaged)), "trailing"},
		{"staged message that is no commit", false, withStaged(func(c *PendingCommit) { c.message = NewMLSMessage(kp) }), "state is damaged"},
		{"staged proposal", false, withStaged(func(c *PendingCommit) { c.message = f.proposal(f.bob, remove(2)) }), "state is damaged"},
		{"staged commit that leads elsewhere", false, withStaged(func(c *PendingCommit) { c.groupInfo.GroupContext.Epoch++ }), "another epoch"},
		{"staged commit that breaks a rule", false, withStaged(func(c *PendingCommit) {
			c.message = f.commit(forged{props: []Proposal{remove(9)}})
		}), "12.1.3"},
		{"staged commit of an external sender", false, withStaged(func(c *PendingCommit) {
			c.message = f.commit(forged{content: func(c *FramedContent) { c.Sender = Sender{Type: SenderExternal} }})
		}), "6.1"},
		{"group info", true, append0(key1(keyGroupInfo)), "trailing"},
		{"server's tree", true, withHeader(func(h *header) { h.slots = 8 }), "not that of the epoch"},
	} {
		t.Run(v.what, func(t *testing.T) {
			var err error
			if v.server {
				s := f.store.opened()
				f.must(second(LoadPublicGroup(publicConfig(), s.all())))
				v.damage(s)
				_, err = LoadPublicGroup(publicConfig(), s.all())
			} else {
				s := f.alice.store.opened()
				f.must(second(LoadGroup(testConfig(), f.alice.signer, s.all())))
				v.damage(s)
				_, err = LoadGroup(testConfig(), f.alice.signer, s.all())
			}
			if err == nil || !strings.Contains(err.Error(), v.want) {
				t.Errorf("got %v, want %q", err, v.want)
			}
		})
	}
}

// TestStoredJoinsSayWhatIsDamaged is the same for an external commit that waits to be accepted.
func TestStoredJoinsSayWhatIsDamaged(t *testing.T) {
	f := newForgery(t)
	gi, err := f.alice.GroupInfo(true, true)
	f.must(err)
	signer := newSigner(t, testSuite)
	for _, v := range []struct {
		what   string
		damage func(p *PendingJoin)
		bytes  func(b []byte) []byte
		want   string
	}{
		{"nothing", nil, nil, ""},
		{"format", nil, func(b []byte) []byte { b[1] = 99; return b }, "state format 99"},
		{"end", nil, func(b []byte) []byte { return append(b, 0) }, "trailing"},
		{"beginning", nil, func(b []byte) []byte { return b[:1] }, "truncated"},
		{"suite", func(p *PendingJoin) { p.info.GroupContext.CipherSuite = 0xf00d }, nil, "state is damaged"},
		{"tree", func(p *PendingJoin) {
			p.tree = p.tree.clone()
			p.tree.blankPath(0)
		}, nil, "state is damaged"},
		{"own leaf", func(p *PendingJoin) { p.private.leaf = 9 }, nil, "state is damaged"},
	} {
		t.Run(v.what, func(t *testing.T) {
			p, err := ExternalJoin(testConfig(), ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: signer})
			f.must(err)
			if v.damage != nil {
				v.damage(p)
			}
			b := codec.Marshal(p)
			if v.bytes != nil {
				b = v.bytes(b)
			}
			_, err = LoadPendingJoin(testConfig(), signer, b)
			if v.want == "" {
				f.must(err)
			} else if err == nil || !strings.Contains(err.Error(), v.want) {
				t.Errorf("got %v, want %q", err, v.want)
			}
		})
	}
}
