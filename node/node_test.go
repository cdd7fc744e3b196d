package node

import (
	"slices"
	"testing"
)

func TestTwoNodesShareARoom(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, bob := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	bob.publish(3)
	bobs := bob.subscribe()
	bobs.live()

	alice.createRoom()
	alices := alice.subscribe()
	alices.live()
	seq := alice.commit(alice.adding(bob.user)...)
	alices.until(func() bool { return alice.seq >= seq })
	bobs.until(func() bool { return bob.group != nil })
	if a, b := alice.group.EpochAuthenticator(), bob.group.EpochAuthenticator(); !slices.Equal(a, b) {
		t.Fatalf("authenticators differ: %x, %x", a, b)
	}

	alice.send("hello bob")
	bob.send("hello alice")
	alices.until(func() bool { return slices.Contains(alice.texts, "hello alice") })
	bobs.until(func() bool { return slices.Contains(bob.texts, "hello bob") })

	seq = bob.commit()
	bobs.until(func() bool { return bob.seq >= seq })
	alices.until(func() bool { return alice.seq >= seq })
	if a, b := alice.group.EpochAuthenticator(), bob.group.EpochAuthenticator(); !slices.Equal(a, b) {
		t.Fatalf("after bob's commit authenticators differ: %x, %x", a, b)
	}
}
