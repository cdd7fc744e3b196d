package node

import "testing"

// A client whose stream the stopping node has ended comes again at once; its next stream mustn't keep the node waiting.
func TestAStreamThatBeginsWhileTheNodeStopsIsEnded(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	stream := alice.subscribe()
	stream.live()
	n.listeners.end("", refuse("unavailable", "the node is stopping"))
	if err := stream.ended(); code(err) != "unavailable" {
		t.Errorf("the stream ended with %v", err)
	}
	if err := alice.subscribe().ended(); code(err) != "unavailable" {
		t.Errorf("the next stream ended with %v", err)
	}
}
