package node

import (
	"fmt"
	"testing"
)

// beta takes nothing for so long that the hub lets go of what waits for it. When it does again it gets the end of the room's
// log, and bob is told that he is behind and enters the room anew.
func TestPeerThatWasAwayForTooLongIsBehind(t *testing.T) {
	alpha, beta, alice, bob, _, bobs := twoNodes(t)
	first := alice.send("first")
	bobs.until(func() bool { return bob.seq >= first })
	alpha.stop()
	alpha.cfg.Limits.PeerQueue = 8
	alpha.start()
	alice.authenticate()
	alices := alice.subscribe()
	if err := beta.removePeer("alpha.example"); err != nil {
		t.Fatal(err)
	}
	var last uint64
	for i := range 40 {
		last = alice.send(fmt.Sprint("while beta takes nothing ", i))
	}
	alices.until(func() bool { return alice.seq >= last })
	eventually(t, func() error {
		s := must(DialAdmin(alpha.cfg.Socket()).Peers(t.Context()))(t)[0]
		if s.Waiting > 10 || s.Dropped < 30 || s.Waiting+s.Dropped < 40 {
			return fmt.Errorf("%d wait, %d were dropped", s.Waiting, s.Dropped)
		}
		return nil
	})
	federate(t, alpha, beta)
	behind := false
	for !behind {
		ev := bobs.next()
		if e := ev.GetEntry(); e != nil && e.Seq > first {
			t.Fatalf("bob gets entry %d after %d", e.Seq, first)
		}
		behind = ev.GetBehind() != nil
	}
	leaf, _ := bob.leafOf(bob.uri)
	joined := bob.externalJoin(removeLeaf(leaf))
	bob.seq = joined - 1
	alices.until(func() bool { return alice.seq >= joined })
	seq := alice.send("welcome back")
	bobs.until(func() bool { return bob.seq >= seq })
	eventually(t, func() error {
		if s := must(DialAdmin(alpha.cfg.Socket()).Peers(t.Context()))(t)[0]; s.Waiting > 0 {
			return fmt.Errorf("%d wait", s.Waiting)
		}
		return nil
	})
}
