package node

import "testing"

func TestStreamBelowTheCutIsToldOnce(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	var seqs []uint64
	for _, text := range []string{"one", "two", "three"} {
		seqs = append(seqs, alice.send(text))
	}
	bobs.until(func() bool { return bob.seq >= seqs[2] })
	alices.until(func() bool { return alice.seq >= seqs[2] })
	for _, n := range []*testNode{alpha, beta} { // a hole, of entries that never came
		if err := n.store.Delete(key(prefixLog, alice.room, be64(seqs[1]))); err != nil {
			t.Fatal(err)
		}
		n.recent = recent{}
	}
	for _, c := range []*testClient{alice, bob} {
		c.seq, c.texts = seqs[0], nil
		s := c.subscribe()
		behind := 0
		for ev := s.next(); ev.GetLive() == nil; ev = s.next() {
			if ev.GetEntry() != nil {
				t.Errorf("%s gets entry %d after %d", c.uri, ev.GetEntry().Seq, seqs[0])
			}
			if b := ev.GetBehind(); b != nil {
				if behind++; b.Room != string(c.room) || b.Last != seqs[2] {
					t.Errorf("%s: %+v", c.uri, b)
				}
			}
		}
		if behind != 1 {
			t.Errorf("%s was told %d times that it is behind", c.uri, behind)
		}
		if c == bob {
			leaf, _ := bob.leafOf(bob.uri)
			bob.seq = bob.externalJoin(removeLeaf(leaf))
			seq := bob.send("back")
			for ev := s.next(); ev.GetEntry() == nil || ev.GetEntry().Seq != seq; ev = s.next() {
				if ev.GetBehind() != nil || ev.GetEntry() != nil {
					t.Fatalf("bob is in the room again and gets %v", ev)
				}
			}
		}
	}
}
