package mls

import (
	"fmt"
	mathrand "math/rand/v2"
	"testing"
)

// logged is a Batch that isn't durable before commit.
type logged struct{ changes []entry }

func (l *logged) Set(k, v []byte) {
	l.changes = append(l.changes, entry{append([]byte{}, k...), append([]byte{}, v...)})
}
func (l *logged) Delete(k []byte) {
	l.changes = append(l.changes, entry{append([]byte{}, k...), nil})
}

func (l *logged) commit(s *memStore) {
	for _, c := range l.changes {
		if c.value == nil {
			s.Delete(c.key)
		} else {
			s.Set(c.key, c.value)
		}
	}
	l.changes = nil
}

// TestNoKeyIsUsedTwiceAfterACrash has a member crash at any time between Encrypt and the moment when the message is
// out, and goes on from what was durable. No key and nonce may encrypt two messages that got out (RFC 9420, Section 9.1).
func TestNoKeyIsUsedTwiceAfterACrash(t *testing.T) {
	for _, c := range []struct {
		name  string
		early bool // the message goes out before its batch is durable, which the package forbids
	}{{"durable first", false}, {"out first", true}} {
		t.Run(c.name, func(t *testing.T) {
			random := mathrand.New(mathrand.NewPCG(7, 7))
			r := newRoom(t, testSuite, nil)
			alice := r.members[0]
			bob := r.add(alice, "bob")[0]
			out := make(map[string]int)
			reused := 0
			for i := range 200 {
				next, err := alice.messages.peek(alice.OwnLeaf(), applicationRatchet, alice.Generation(), ratchetLimits{})
				if err != nil {
					t.Fatal(err)
				}
				use := func() {
					if before, ok := out[string(next.key)+string(next.nonce)]; ok {
						reused++
						if !c.early {
							t.Errorf("message %d has the key of message %d", i, before)
						}
					}
					out[string(next.key)+string(next.nonce)] = i
				}
				next.key, next.nonce = append(secret{}, next.key...), append(secret{}, next.nonce...)
				b := new(logged)
				m, err := alice.Encrypt(b, nil, fmt.Append(nil, i))
				if err != nil {
					t.Fatal(err)
				}
				crash := random.IntN(3)
				if c.early {
					use()
				}
				if crash == 0 { // before the batch is durable
					alice.reload(t)
					continue
				}
				b.commit(alice.store)
				if crash == 1 { // before the message is out
					alice.reload(t)
					continue
				}
				if !c.early {
					use()
				}
				if _, err := bob.Receive(bob.store, m); err != nil && !c.early {
					t.Fatalf("message %d: %v", i, err)
				}
				if random.IntN(20) == 0 {
					r.commit(bob, CommitOptions{})
				}
			}
			if c.early && reused == 0 {
				t.Error("no key was used twice: the test sees nothing")
			}
			if !c.early && len(out) < 40 {
				t.Errorf("only %d messages got out", len(out))
			}
		})
	}
}
