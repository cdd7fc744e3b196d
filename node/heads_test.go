package node

import (
	"bytes"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

func TestLogsOfTheFirstFormatGetTheirChain(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const ours, empty, theirs = mimi.URI("mimi://alpha.example/r/ours"), mimi.URI("mimi://alpha.example/r/empty"), mimi.URI("mimi://beta.example/r/theirs")
	old := map[string][]byte{
		keyVersion:                              {1},
		string(roomKey(ours)):                   codec.Marshal(roomRecord{hosted: true, last: 2}),
		string(roomKey(empty)):                  codec.Marshal(roomRecord{hosted: true}),
		string(roomKey(theirs)):                 codec.Marshal(roomRecord{last: 1}),
		string(key(prefixLog, ours, be64(1))):   []byte("one"),
		string(key(prefixLog, ours, be64(2))):   []byte("two"),
		string(key(prefixLog, theirs, be64(1))): []byte("one"),
	}
	if _, err := s.Commit(old, nil); err != nil {
		t.Fatal(err)
	}
	want := codec.Marshal(linkRecord{chain: chain.Start(ours).Fold(0, []chain.Link{chain.NewLink([]byte("one"), chain.Hash{}), chain.NewLink([]byte("two"), chain.Hash{})})})
	for range 2 { // the second time as after a crash before the last step
		if err := checkFormat(s); err != nil {
			t.Fatal(err)
		}
		if v := must(s.Get([]byte(keyVersion)))(t); !bytes.Equal(v, []byte{formatVersion}) {
			t.Errorf("the store has format %x", v)
		}
		links := make(map[string][]byte)
		if err := store.ScanPrefix(s, []byte(prefixLink), func(k, v []byte) bool {
			links[prefixLink+string(k)] = bytes.Clone(v)
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if len(links) != 1 || !bytes.Equal(links[string(linkKey(ours, 2))], want) {
			t.Errorf("links %x", links)
		}
		if _, err := s.Commit(map[string][]byte{keyVersion: {1}}, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnIncarnationLastsUntilItIsRenewed(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	first := must(openIncarnation(s))(t)
	if again := must(openIncarnation(s))(t); first == 0 || again != first {
		t.Errorf("incarnation %d, then %d", first, again)
	}
	// A clock that was put back makes no earlier one.
	if _, err := s.Commit(map[string][]byte{keyIncarnation: be64(first + 1<<50)}, nil); err != nil {
		t.Fatal(err)
	}
	if next := must(renewIncarnation(s))(t); next != first+1<<50+1 || must(openIncarnation(s))(t) != next {
		t.Errorf("incarnation %d after %d", next, first+1<<50)
	}
}
