package node

import (
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
)

func TestRecentEntriesAreBoundedAndWithoutGaps(t *testing.T) {
	const room mimi.URI = "mimi://a.example/r/room"
	var rc recent
	rc.add(room, []logged{{3, []byte("three")}, {4, []byte("four")}, {6, []byte("six")}})
	rc.add(room, []logged{{3, []byte("again")}})
	for _, c := range []struct{ from, to, first, n uint64 }{
		{3, 3, 3, 1}, {3, 9, 3, 2}, {4, 6, 4, 1}, {2, 9, 0, 0}, {5, 9, 0, 0}, {6, 6, 6, 1},
	} {
		list := rc.get(room, c.from, c.to)
		if uint64(len(list)) != c.n || c.n > 0 && list[0].seq != c.first {
			t.Errorf("entries %d to %d: %v", c.from, c.to, list)
		}
	}
	if got := rc.get("mimi://a.example/r/other", 3, 4); got != nil {
		t.Errorf("another room has %v", got)
	}
	if got := rc.get(room, 3, 3); string(got[0].fanout) != "three" {
		t.Errorf("entry 3 is %q", got[0].fanout)
	}
	rc.add(room, []logged{{7, make([]byte, maxRecent)}})
	if rc.get(room, 7, 7) != nil {
		t.Error("an entry as large as everything is kept")
	}
	for seq := uint64(10); seq < 1000; seq++ {
		rc.add(room, []logged{{seq, make([]byte, 64<<10)}})
		if rc.bytes > maxRecent || len(rc.order) != len(rc.entries) {
			t.Fatalf("%d bytes, %d entries in order of %d", rc.bytes, len(rc.order), len(rc.entries))
		}
	}
	if rc.get(room, 3, 3) != nil || len(rc.get(room, 990, 2000)) != 10 {
		t.Error("the oldest aren't those that go")
	}
	list := rc.get(room, 1000-maxRecent/(64<<10), 2000)
	if len(list) != maxEventBytes/(64<<10) {
		t.Errorf("a response has %d entries", len(list))
	}
}
