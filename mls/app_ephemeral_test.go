package mls

import (
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func TestEphemeralDataComesWithItsCommit(t *testing.T) {
	f := newForgery(t)
	ack := codec.Marshal(AppAck{{Sender: 1, First: 0, Last: 3}})
	f.room.propose(f.bob.Propose(f.bob.store, nil, ephemeral(0x8001, []byte("first"))))
	f.room.propose(f.carol.Propose(f.carol.store, nil, appData(0x8001, "+")))
	c, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{ephemeral(ComponentAppAck, ack), ephemeral(0x8001, []byte("second"))}})
	f.must(err)
	if c.Message().Public.Content.Commit.Path != nil {
		t.Error("a path that nobody needs")
	}
	got, err := f.bob.Receive(f.bob.store, c.Message())
	f.must(err)
	s, err := f.server.CheckCommit(c.Message().Public)
	f.must(err)
	for who, info := range map[string]*StagedInfo{"committer": c.Info(), "member": got.(*StagedCommit).Info(), "server": s.Info()} {
		var data []string
		for _, p := range info.Ephemeral {
			data = append(data, string(p.Proposal.AppEphemeral.Data))
		}
		if want := []string{"first", string(ack), "second"}; !slices.Equal(data, want) || len(info.Proposals) != 4 {
			t.Errorf("%s: got %q, want %q", who, data, want)
		}
		if b := info.Ephemeral[0].Sender.Leaf; b != f.bob.OwnLeaf() {
			t.Errorf("%s: data of leaf %d", who, b)
		}
	}
}
