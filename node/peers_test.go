package node

import (
	"testing"

	"github.com/parley-mls/parley/federation"
)

func TestARequestToNotifyEndsWhereAnEntryIsMissing(t *testing.T) {
	entry := func(seq uint64) federation.OutboxItem {
		return federation.OutboxItem{Ref: outboxEntry("", seq), Seq: seq}
	}
	welcome := func(seq uint64) federation.OutboxItem {
		return federation.OutboxItem{Ref: outboxWelcome("", be64(seq)), Seq: seq}
	}
	for _, c := range []struct {
		items []federation.OutboxItem
		want  int
	}{
		{[]federation.OutboxItem{entry(1)}, 1},
		{[]federation.OutboxItem{entry(3), entry(4), entry(5)}, 3},
		{[]federation.OutboxItem{entry(3), entry(4), entry(6), entry(7)}, 2},
		{[]federation.OutboxItem{welcome(9), entry(3), welcome(3), entry(4), welcome(4)}, 5},
		{[]federation.OutboxItem{welcome(9), entry(3), welcome(3), entry(5)}, 3},
		{[]federation.OutboxItem{welcome(1), welcome(7)}, 2},
	} {
		if got := notifyLength(c.items); got != c.want {
			t.Errorf("%d items: a request has %d, want %d", len(c.items), got, c.want)
		}
	}
}
