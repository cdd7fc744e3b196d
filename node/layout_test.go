package node

import (
	"bytes"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// record is what is stored under one of the prefixes.
type record interface {
	codec.Marshaler
	codec.Unmarshaler
}

func records() map[string]record {
	return map[string]record{
		"room":   &roomRecord{hosted: true, last: 7, pending: []uint64{3, 5}},
		"answer": &answerRecord{seq: 7, time: 9, response: []byte("answer")},
		"welcome": &welcomeRecord{
			room: "mimi://alpha.example/r/lunch", seq: 7, fanout: []byte("end of a key"),
		},
		"link":    &linkRecord{context: chain.Hash{1}, chain: chain.Hash{2}},
		"cut":     &cutRecord{first: 7, asOf: 9, expiry: 1, history: 2, stands: []standing{{3, 8}, {4, 9}}},
		"member":  &memberRecord{start: 7, end: 9},
		"behind":  &memberRecord{start: 7, anew: 8},
		"sent":    &sentRecord{epoch: 7, generation: 9, hash: messageHash(new(mls.MLSMessage))},
		"ref":     &refRecord{client: "mimi://alpha.example/d/x", user: "mimi://alpha.example/u/x", provider: "beta.example", expires: 9},
		"consent": &consentRecord{asked: 7, decision: mimi.ConsentGrant, decided: 9},
		"profile": &profileRecord{hidden: true, fields: []profileField{{mimi.FieldVCard, "ORG", "Parley", searchPart, true}}},
		"granted": &grantedRecord{keyPackages: []mls.KeyPackage{}},
	}
}

func FuzzRecords(f *testing.F) {
	for _, r := range records() {
		f.Add(codec.Marshal(r))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for name, r := range records() {
			if codec.Unmarshal(b, r) == nil && !bytes.Equal(codec.Marshal(r), b) {
				t.Errorf("%s: %x encodes as %x", name, b, codec.Marshal(r))
			}
		}
	})
}

func FuzzOutboxReference(f *testing.F) {
	f.Add(outboxEntry("mimi://alpha.example/r/lunch", 7))
	f.Add(outboxWelcome("mimi://alpha.example/r/lunch", fanoutKey(7, []byte("x"))))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, room, seq, rest, err := parseReference(b)
		if err != nil {
			return
		}
		again := outboxEntry(room, seq)
		if kind == outboxKindWelcome {
			again = outboxWelcome(room, rest)
		}
		if !bytes.Equal(again, b) {
			t.Errorf("%x is %x again", b, again)
		}
	})
}

func TestAStoreOfAnotherFormatIsRefused(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 2 {
		if err := checkFormat(s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Commit(map[string][]byte{keyVersion: {formatVersion + 1}}, nil); err != nil {
		t.Fatal(err)
	}
	if err := checkFormat(s); err == nil {
		t.Error("a store of the next format was opened")
	}
}
