package client

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
)

// What the store gives back encodes to the same bytes, or is refused.
func FuzzRecords(f *testing.F) {
	f.Add(codec.Marshal(header{cursor: 7, leaving: true}))
	f.Add(codec.Marshal(message{User: "mimi://alpha.example/u/alice", Client: "mimi://alpha.example/d/a", Time: time.UnixMilli(1), Data: []byte("x")}))
	f.Add(codec.Marshal(outgoing{text: []byte("x"), submit: []byte("y")}))
	f.Add(codec.Marshal(staged{request: []byte("r"), hold: true}))
	f.Add(codec.Marshal(place{post: 7, reaction: true}))
	f.Add(codec.Marshal(hubRecord{verified: new(chain.Signed), fault: "x", proven: true}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, r := range []interface {
			codec.Marshaler
			codec.Unmarshaler
		}{new(header), new(message), new(outgoing), new(staged), new(ownKeyPackage), new(hubRecord), new(linkRecord), new(place)} {
			if codec.Unmarshal(b, r) == nil && !bytes.Equal(codec.Marshal(r), b) {
				t.Errorf("%T of %x encodes to %x", r, b, codec.Marshal(r))
			}
		}
	})
}

func TestKeyIsNotShown(t *testing.T) {
	p := profile{Key: []byte("the secret")}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if s := fmt.Sprintf(format, p); strings.Contains(s, "secret") || strings.Contains(s, fmt.Sprintf("%x", "the secret")) {
			t.Errorf("%s shows %s", format, s)
		}
	}
}
