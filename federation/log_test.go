package federation

import (
	"bytes"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func FuzzLog(f *testing.F) {
	f.Add(codec.Marshal(LogRequest{After: 7, Head: []byte("head")}))
	f.Add(codec.Marshal(LogPage{Head: []byte("head"), Entries: []LogEntry{{Seq: 8, Fanout: []byte("entry"), Context: [32]byte{1}}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var q LogRequest
		if codec.Unmarshal(b, &q) == nil && !bytes.Equal(codec.Marshal(q), b) {
			t.Errorf("request %x encodes as %x", b, codec.Marshal(q))
		}
		var p LogPage
		if codec.Unmarshal(b, &p) == nil && !bytes.Equal(codec.Marshal(p), b) {
			t.Errorf("page %x encodes as %x", b, codec.Marshal(p))
		}
	})
}
