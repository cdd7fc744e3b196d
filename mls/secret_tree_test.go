package mls

import (
	"bytes"
	"errors"
	"iter"
	"maps"
	"math"
	"math/rand/v2"
	"testing"
)

func testSecretTree() *secretTree {
	return newSecretTree(testSuite, 8, bytes.Repeat(secret{7}, 32))
}

// use takes a key as the receiver of an authentic message does.
func (s *secretTree) use(t *testing.T, l LeafIndex, g uint32, lim ratchetLimits) (*ratchetStep, error) {
	t.Helper()
	step, err := s.peek(l, applicationRatchet, g, lim)
	if err == nil {
		s.consume(step)
	}
	return step, err
}

func TestMessagesOutOfOrderFindTheirKeys(t *testing.T) {
	sender, receiver := testSecretTree(), testSecretTree()
	var keys []secret
	for g := range uint32(20) {
		got, key, _, err := sender.next(3, applicationRatchet)
		if err != nil || got != g {
			t.Fatalf("generation %d, want %d: %v", got, g, err)
		}
		keys = append(keys, key)
	}
	lim := ratchetLimits{maxForward: 100, maxSkipped: 100}
	for _, g := range rand.New(rand.NewPCG(1, 2)).Perm(20) {
		step, err := receiver.use(t, 3, uint32(g), lim)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "key", step.key, keys[g])
		if _, err := receiver.peek(3, applicationRatchet, uint32(g), lim); !errors.Is(err, ErrGeneration) {
			t.Errorf("generation %d again: got %v, want ErrGeneration", g, err)
		}
	}
	if r := receiver.ratchets[ratchetID{3, applicationRatchet}]; len(r.skipped) != 0 {
		t.Errorf("%d keys left of messages that all arrived", len(r.skipped))
	}
}

func TestSkippedKeysAreBounded(t *testing.T) {
	lim := ratchetLimits{maxForward: 50, maxSkipped: 5}
	s := testSecretTree()
	if _, err := s.use(t, 0, 51, lim); !errors.Is(err, ErrGeneration) {
		t.Errorf("51 ahead of 50 allowed: got %v, want ErrGeneration", err)
	}
	if _, err := s.use(t, 0, 50, lim); err != nil {
		t.Fatal(err)
	}
	if _, err := s.use(t, 0, 44, lim); !errors.Is(err, ErrGeneration) {
		t.Errorf("the oldest skipped key is kept: %v", err)
	}
	if _, err := s.use(t, 0, 53, lim); err != nil {
		t.Fatal(err)
	}
	for g, kept := range map[uint32]bool{45: false, 46: false, 47: true, 49: true, 50: false, 51: true, 52: true, 53: false} {
		if _, err := s.peek(0, applicationRatchet, g, lim); (err == nil) != kept {
			t.Errorf("generation %d: %v, want kept %v", g, err, kept)
		}
	}
	if _, err := s.peek(8, applicationRatchet, 0, lim); err == nil {
		t.Error("key of a leaf beyond the tree")
	}
}

func TestForgedMessageCostsNoKey(t *testing.T) {
	s := testSecretTree()
	s.drain(func(k, v []byte) {}, func(k []byte) {})
	first, err := s.peek(5, applicationRatchet, 3, ratchetLimits{10, 10})
	if err != nil {
		t.Fatal(err)
	}
	s.drain(func(k, v []byte) { t.Errorf("peek wrote %q", k) }, func(k []byte) { t.Errorf("peek deleted %q", k) })
	again, err := s.use(t, 5, 3, ratchetLimits{10, 10})
	if err != nil {
		t.Fatal(err)
	}
	wantBytes(t, "key after a peek", again.key, first.key)
}

func TestStepsTakenFromOneStateBothCount(t *testing.T) {
	s, lim := testSecretTree(), ratchetLimits{10, 10}
	a, err := s.peek(1, applicationRatchet, 2, lim)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.peek(0, applicationRatchet, 1, lim)
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.peek(1, applicationRatchet, 0, lim)
	if err != nil {
		t.Fatal(err)
	}
	s.consume(a)
	s.consume(b)
	s.consume(c)
	for _, step := range []*ratchetStep{a, b, c} {
		if _, err := s.peek(step.leaf, step.kind, step.generation, lim); !errors.Is(err, ErrGeneration) {
			t.Errorf("leaf %d generation %d can be used again: %v", step.leaf, step.generation, err)
		}
	}
	if _, err := s.peek(1, applicationRatchet, 1, lim); err != nil {
		t.Errorf("a key that no step used is gone: %v", err)
	}
}

func TestRatchetEndsAfterItsLastGeneration(t *testing.T) {
	s := testSecretTree()
	if _, _, _, err := s.next(0, applicationRatchet); err != nil {
		t.Fatal(err)
	}
	s.ratchets[ratchetID{0, applicationRatchet}].generation = math.MaxUint32
	if g, _, _, err := s.next(0, applicationRatchet); err != nil || g != math.MaxUint32 {
		t.Fatalf("generation %d: %v", g, err)
	}
	if _, _, _, err := s.next(0, applicationRatchet); !errors.Is(err, ErrGeneration) {
		t.Errorf("past the last generation: got %v, want ErrGeneration", err)
	}
	if _, err := s.peek(0, applicationRatchet, math.MaxUint32, ratchetLimits{10, 10}); !errors.Is(err, ErrGeneration) {
		t.Errorf("last generation again: got %v, want ErrGeneration", err)
	}
}

func TestUsedSecretsLeaveTheTree(t *testing.T) {
	s := testSecretTree()
	root := s.nodes[rootOf(8)]
	if _, _, _, err := s.next(0, handshakeRatchet); err != nil {
		t.Fatal(err)
	}
	for n, sec := range s.nodes {
		if bytes.Equal(sec, root) || n.covers(0) {
			t.Errorf("node %d above a used leaf still has its secret", n)
		}
	}
	if len(s.nodes) != 3 {
		t.Errorf("%d nodes with secrets, want the 3 beside the path", len(s.nodes))
	}
}

func TestSavedSecretTreeIsTheSame(t *testing.T) {
	s, r, lim := testSecretTree(), rand.New(rand.NewPCG(3, 4)), ratchetLimits{8, 4}
	store := make(map[string][]byte)
	pairs := func(m map[string][]byte) iter.Seq2[[]byte, []byte] {
		return func(yield func([]byte, []byte) bool) {
			for k, v := range m {
				if !yield([]byte(k), v) {
					return
				}
			}
		}
	}
	for range 200 {
		l, k := LeafIndex(r.IntN(8)), ratchetKind(r.IntN(2))
		var base uint32
		if at := s.ratchets[ratchetID{l, k}]; at != nil {
			base = at.generation
		}
		if step, err := s.peek(l, k, base+uint32(r.IntN(10))-min(base, uint32(r.IntN(5))), lim); err == nil {
			s.consume(step)
		}
		written := 0
		s.drain(func(k, v []byte) { written++; store[string(k)] = bytes.Clone(v) }, func(k []byte) { written++; delete(store, string(k)) })
		if written > 16 {
			t.Fatalf("one message wrote %d entries", written)
		}
		loaded, err := loadSecretTree(testSuite, 8, pairs(store))
		if err != nil {
			t.Fatal(err)
		}
		again := make(map[string][]byte)
		for _, k := range loaded.keys() {
			again[string(k)] = loaded.entry(string(k))
		}
		if !maps.EqualFunc(store, again, bytes.Equal) {
			t.Fatal("the loaded tree has other entries")
		}
		whole := make(map[string]bool)
		for _, k := range s.keys() {
			whole[string(k)] = true
		}
		if len(whole) != len(store) {
			t.Fatalf("%d keys to delete, %d stored", len(whole), len(store))
		}
	}
	for _, bad := range []map[string][]byte{{"": nil}, {"nxxxx": {1}}, {"x": {1}}, {string(skippedKey(0, 0, 1)): make([]byte, 28)}} {
		if _, err := loadSecretTree(testSuite, 8, pairs(bad)); err == nil {
			t.Errorf("%q loaded", bad)
		}
	}
}

func BenchmarkSecretTree(b *testing.B) {
	b.Run("Next", func(b *testing.B) {
		s := newSecretTree(testSuite, 16384, bytes.Repeat(secret{7}, 32))
		b.ReportAllocs()
		for b.Loop() {
			if _, _, _, err := s.next(3, applicationRatchet); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("FirstOf16384", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s := newSecretTree(testSuite, 16384, bytes.Repeat(secret{7}, 32))
			if _, _, _, err := s.next(3, applicationRatchet); err != nil {
				b.Fatal(err)
			}
		}
	})
}
