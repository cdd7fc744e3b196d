package mls

import (
	"crypto"
	"fmt"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// countingBatch counts the bytes that an operation stores.
type countingBatch struct{ bytes int }

func (c *countingBatch) Set(k, v []byte) { c.bytes += len(k) + len(v) }
func (c *countingBatch) Delete(k []byte) { c.bytes += len(k) }

func benchConfig() Config { return Config{Verifier: anyCredential{}, Components: testComponents} }

// bigGroup is two members' view of a group of n whose tree has no blank node: everybody committed once, alice last and
// bob before her.
func bigGroup(tb testing.TB, n int) (alice, bob *Group) {
	tt := newTestTree(tb, testSuite, n)
	at := LeafIndex(n / 2)
	for i := 1; i < n; i++ {
		tt.commit(tb, LeafIndex(i))
	}
	tt.commit(tb, at)
	tt.commit(tb, 0)
	ctx := GroupContext{Version: MLS10, CipherSuite: testSuite, GroupID: tt.groupID, TreeHash: tt.Hash(testSuite), ConfirmedTranscriptHash: []byte{}}
	epochSecret, err := testSuite.randomSecret(tt.rand)
	if err != nil {
		tb.Fatal(err)
	}
	view := func(i LeafIndex) *Group {
		es := testSuite.epochSecretsFrom(epochSecret)
		g := &Group{cfg: benchConfig(), own: i, active: true, private: tt.private[i], signers: make(map[string]crypto.Signer),
			state: newPublicState(ctx, fresh(tb, tt.RatchetTree), es.confirmationTag(testSuite, ctx.ConfirmedTranscriptHash))}
		sealers, err := g.cfg.newSealers()
		if err != nil {
			tb.Fatal(err)
		}
		g.start(es, sealers)
		if err := g.AddSigner(tt.signers[i]); err != nil {
			tb.Fatal(err)
		}
		g.saveAll(discard{})
		return g
	}
	return view(0), view(at)
}

func forSizes(b *testing.B, f func(b *testing.B, alice, bob *Group)) {
	for _, n := range []int{2, 10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			alice, bob := bigGroup(b, n)
			b.ReportAllocs()
			f(b, alice, bob)
		})
	}
}

func size(m codec.Marshaler) float64 { return float64(len(codec.Marshal(m))) }

func BenchmarkAdd(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, _ *Group) {
		kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("new")), Signer: newSigner(b, testSuite)})
		if err != nil {
			b.Fatal(err)
		}
		var c *PendingCommit
		for b.Loop() {
			if c, err = alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}}); err != nil {
				b.Fatal(err)
			}
			if err := alice.Drop(nil); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(size(c.Message()), "commit-B")
		b.ReportMetric(size(c.Welcome()), "welcome-B")
	})
}

func BenchmarkUpdate(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, _ *Group) {
		var c *PendingCommit
		var err error
		var stored countingBatch
		n := 0
		for b.Loop() {
			if c, err = alice.Commit(&stored, CommitOptions{}); err != nil {
				b.Fatal(err)
			}
			if err := alice.Confirm(&stored); err != nil {
				b.Fatal(err)
			}
			n++
		}
		b.ReportMetric(size(c.Message()), "commit-B")
		b.ReportMetric(float64(stored.bytes/n), "stored-B/op")
	})
}

func BenchmarkProcessUpdate(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, bob *Group) {
		var stored countingBatch
		n := 0
		for b.Loop() {
			b.StopTimer()
			c, err := alice.Commit(nil, CommitOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if err := alice.Confirm(nil); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			r, err := bob.Receive(&stored, c.Message())
			if err != nil {
				b.Fatal(err)
			}
			if err := bob.Apply(&stored, r.(*StagedCommit)); err != nil {
				b.Fatal(err)
			}
			n++
		}
		b.ReportMetric(float64(stored.bytes/n), "stored-B/op")
	})
}

func BenchmarkJoin(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, _ *Group) {
		signer := newSigner(b, testSuite)
		kp, secrets, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("new")), Signer: signer})
		if err != nil {
			b.Fatal(err)
		}
		c, err := alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})
		if err != nil {
			b.Fatal(err)
		}
		tree := codec.Marshal(c.Tree())
		for b.Loop() {
			t, err := ParseRatchetTree(tree)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := JoinGroup(benchConfig(), nil, signer, c.Welcome(), kp, secrets, t); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(len(tree)), "tree-B")
	})
}

func BenchmarkSend(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, _ *Group) {
		data := make([]byte, 100)
		var m *MLSMessage
		var err error
		var stored countingBatch
		n := 0
		for b.Loop() {
			if m, err = alice.Encrypt(&stored, nil, data); err != nil {
				b.Fatal(err)
			}
			n++
		}
		b.ReportMetric(size(m), "message-B")
		b.ReportMetric(float64(stored.bytes/n), "stored-B/op")
	})
}

func BenchmarkReceive(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, bob *Group) {
		data := make([]byte, 100)
		var stored countingBatch
		n := 0
		for b.Loop() {
			b.StopTimer()
			m, err := alice.Encrypt(nil, nil, data)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if _, err := bob.Receive(&stored, m); err != nil {
				b.Fatal(err)
			}
			n++
		}
		b.ReportMetric(float64(stored.bytes/n), "stored-B/op")
	})
}

// BenchmarkPublicGroup is a server's check and application of an update with its GroupInfo.
func BenchmarkPublicGroup(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, _ *Group) {
		gi, err := alice.GroupInfo(true, true)
		if err != nil {
			b.Fatal(err)
		}
		server, err := NewPublicGroup(PublicConfig{Verifier: anyCredential{}}, nil, gi, nil)
		if err != nil {
			b.Fatal(err)
		}
		var stored countingBatch
		n := 0
		for b.Loop() {
			b.StopTimer()
			c, err := alice.Commit(nil, CommitOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if err := alice.Confirm(nil); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			s, err := server.CheckCommit(c.Message().Public)
			if err != nil {
				b.Fatal(err)
			}
			if err := s.CheckGroupInfo(c.GroupInfo()); err != nil {
				b.Fatal(err)
			}
			if err := server.Apply(&stored, s, c.GroupInfo()); err != nil {
				b.Fatal(err)
			}
			n++
		}
		b.ReportMetric(float64(stored.bytes/n), "stored-B/op")
	})
}

// BenchmarkLoad restores a group from its store.
func BenchmarkLoad(b *testing.B) {
	forSizes(b, func(b *testing.B, alice, _ *Group) {
		store := newMemStore()
		alice.saveAll(store)
		alice.messages = newSecretTree(testSuite, alice.state.tree.Size(), make(secret, 32))
		saveSecrets(store, 0, alice.messages)
		signer, err := alice.signer()
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, err := LoadGroup(benchConfig(), signer, store.all()); err != nil {
				b.Fatal(err)
			}
		}
		n := 0
		for k, v := range store.m {
			n += len(k) + len(v)
		}
		b.ReportMetric(float64(n), "state-B")
	})
}
