package federation

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func FuzzLog(f *testing.F) {
	f.Add(codec.Marshal(LogRequest{After: 7, Head: []byte("head")}))
	f.Add(codec.Marshal(LogPage{Head: []byte("head"), Entries: []LogEntry{{Seq: 8, Fanout: []byte("entry"), Context: [32]byte{1}}}}))
	f.Add(codec.Marshal(Known{Head: []byte("head"), Bundle: []byte("{}")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var q LogRequest
		if codec.Unmarshal(b, &q) == nil && !bytes.Equal(codec.Marshal(q), b) {
			t.Errorf("request %x encodes as %x", b, codec.Marshal(q))
		}
		var p LogPage
		if codec.Unmarshal(b, &p) == nil && !bytes.Equal(codec.Marshal(p), b) {
			t.Errorf("page %x encodes as %x", b, codec.Marshal(p))
		}
		var k Known
		if codec.Unmarshal(b, &k) == nil && !bytes.Equal(codec.Marshal(k), b) {
			t.Errorf("known %x encodes as %x", b, codec.Marshal(k))
		}
	})
}

func TestPagesOfALogAreBounded(t *testing.T) {
	page := LogPage{Head: []byte("head")}
	for i := range uint64(MaxLogEntries) {
		page.Entries = append(page.Entries, LogEntry{Seq: i + 1, Fanout: []byte{byte(i)}, Context: [32]byte{byte(i)}})
	}
	var again LogPage
	if err := codec.Unmarshal(codec.Marshal(page), &again); err != nil || !reflect.DeepEqual(again, page) {
		t.Errorf("a full page comes back as %d entries, %v", len(again.Entries), err)
	}
	page.Entries = append(page.Entries, LogEntry{})
	for name, v := range map[string]struct {
		encoded []byte
		decoded codec.Unmarshaler
	}{
		"an entry too many":          {codec.Marshal(page), new(LogPage)},
		"a page with a long head":    {codec.Marshal(LogPage{Head: make([]byte, MaxHead+1)}), new(LogPage)},
		"a request with a long head": {codec.Marshal(LogRequest{Head: make([]byte, MaxHead+1)}), new(LogRequest)},
		"a long head":                {codec.Marshal(Known{Head: make([]byte, MaxHead+1)}), new(Known)},
		"a long bundle":              {codec.Marshal(Known{Bundle: make([]byte, MaxBundle+1)}), new(Known)},
	} {
		if err := codec.Unmarshal(v.encoded, v.decoded); err == nil {
			t.Errorf("%s is decoded", name)
		}
	}
}
