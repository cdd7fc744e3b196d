package ohttp

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The example of RFC 9458, Appendix A.
const (
	exampleKeys     = "002d 01002031e1f05a740102115220e9af918f738674aec95f54db6e04eb705aae8e79815500080001000100010003"
	examplePrivate  = "3c168975674b2fa8e465970b79c8dcf09f1c741626480bd4c6162fc5b6a98e1a"
	exampleRequest  = "00034745540568747470730b6578616d706c652e636f6d012f"
	exampleSealed   = "010020000100014b28f881333e7c164ffc499ad9796f877f4e1051ee6d31bad19dec96c208b4726374e469135906992e1268c594d2a10c695d858c40a026e7965e7d86b83dd440b2c0185204b4d63525"
	exampleNonce    = "c789e7151fcba46158ca84b04464910d"
	exampleResponse = "0140c8"
	exampleAnswer   = "c789e7151fcba46158ca84b04464910d86f9013e404feea014e7be4a441f234f857fbd"
)

func TestExampleOfTheRFC(t *testing.T) {
	public, err := ParseKeys(unhex(t, exampleKeys))
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := ecdh.X25519().NewPrivateKey(unhex(t, examplePrivate))
	if err != nil {
		t.Fatal(err)
	}
	private, err := hpke.NewDHKEMPrivateKey(scalar)
	if err != nil {
		t.Fatal(err)
	}
	g := &Gateway{keys: []*key{{1, private, time.Now()}}}
	if got := g.keys[0].config(); !bytes.Equal(got[2:37], unhex(t, exampleKeys)[2:37]) {
		t.Errorf("the key is published as %x", got)
	}
	request, reply, err := g.Open(unhex(t, exampleSealed))
	if err != nil || !bytes.Equal(request, unhex(t, exampleRequest)) {
		t.Fatalf("the request is %x, %v", request, err)
	}
	q, err := ParseRequest(request)
	if want := (&Request{Method: "GET", Scheme: "https", Authority: "example.com", Path: "/", Content: []byte{}}); err != nil || !reflect.DeepEqual(q, want) {
		t.Errorf("the request is %+v, %v", q, err)
	}
	answer, err := reply.seal(unhex(t, exampleNonce), unhex(t, exampleResponse))
	if err != nil || !bytes.Equal(answer, unhex(t, exampleAnswer)) {
		t.Errorf("the response is sealed as %x, %v", answer, err)
	}
	opened, err := (&Pending{reply.e}).Open(answer)
	if err != nil || !bytes.Equal(opened, unhex(t, exampleResponse)) {
		t.Errorf("the response is opened as %x, %v", opened, err)
	}
	if p, err := ParseResponse(opened); err != nil || p.Status != 200 {
		t.Errorf("the response is %+v, %v", p, err)
	}
	sealed, pending, err := public.Seal([]byte("another"))
	if err != nil {
		t.Fatal(err)
	}
	got, reply, err := g.Open(sealed)
	if err != nil || string(got) != "another" {
		t.Fatalf("a request for the published key: %q, %v", got, err)
	}
	if answer, err = reply.Seal([]byte("yes")); err != nil {
		t.Fatal(err)
	}
	if got, err := pending.Open(answer); err != nil || string(got) != "yes" {
		t.Errorf("its response: %q, %v", got, err)
	}
	answer[20] ^= 1
	for _, bad := range [][]byte{nil, answer[:15], answer, unhex(t, exampleAnswer)} {
		if _, err := pending.Open(bad); !errors.Is(err, ErrResponse) {
			t.Errorf("%x: %v", bad, err)
		}
	}
}

func TestKeysAreTakenForTwoLifetimes(t *testing.T) {
	now := time.Unix(1e9, 0)
	g := &Gateway{Lifetime: time.Hour, Now: func() time.Time { return now }}
	seal := func() []byte {
		list, until, err := g.Keys()
		if err != nil || until.Sub(now) < time.Hour {
			t.Fatalf("until %v, %v", until, err)
		}
		k, err := ParseKeys(list)
		if err != nil {
			t.Fatal(err)
		}
		b, _, err := k.Seal([]byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := seal()
	now = now.Add(59 * time.Minute)
	if again := seal(); again[0] != first[0] {
		t.Error("another key within its lifetime")
	}
	now = now.Add(time.Hour)
	second := seal()
	if second[0] != first[0]+1 {
		t.Errorf("key %d follows key %d", second[0], first[0])
	}
	for _, b := range [][]byte{first, second} {
		if _, _, err := g.Open(b); err != nil {
			t.Errorf("key %d: %v", b[0], err)
		}
	}
	now = now.Add(2 * time.Minute)
	if _, _, err := g.Open(first); !errors.Is(err, ErrKey) {
		t.Errorf("a key that is over: %v", err)
	}
	if _, _, err := g.Open(second); err != nil {
		t.Errorf("the key after it: %v", err)
	}
	changed := bytes.Clone(second)
	changed[len(changed)-1] ^= 1
	second[3] ^= 1
	for _, bad := range [][]byte{nil, second[:38], second, changed} {
		if _, _, err := g.Open(bad); !errors.Is(err, ErrKey) {
			t.Errorf("%x: %v", bad, err)
		}
	}
}

func TestListsOfKeysAreChecked(t *testing.T) {
	good := unhex(t, exampleKeys)
	other := append([]byte{0, 5}, 1, 0, 0x10, 0, 0) // of another KEM
	if k, err := ParseKeys(append(other, good...)); err != nil || k.id != 1 {
		t.Errorf("behind one of another KEM: %v", err)
	}
	for name, bad := range map[string][]byte{
		"nothing": nil, "cut off": good[:len(good)-1], "a byte more": append(bytes.Clone(good), 0), "of another KEM only": other,
		"no suite that is known": unhex(t, "0029 01002031e1f05a740102115220e9af918f738674aec95f54db6e04eb705aae8e797155 0004 0003 0003"),
		"too long":               make([]byte, MaxKeys+1),
	} {
		if _, err := ParseKeys(bad); !errors.Is(err, ErrKeys) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMessagesAreReadAsTheyWereWritten(t *testing.T) {
	q := &Request{Method: "GET", Scheme: "https", Authority: "a.example", Path: "/x", Fields: []Field{{"range", "bytes=0-9"}}, Content: []byte("c")}
	b := q.Marshal(256)
	if got, err := ParseRequest(b); len(b) != 256 || err != nil || !reflect.DeepEqual(got, q) {
		t.Errorf("%d bytes: %+v, %v", len(b), got, err)
	}
	p := &Response{Status: 206, Fields: []Field{{"content-range", "bytes 0-9/10"}, {"x", ""}}, Content: []byte("0123456789")}
	if got, err := ParseResponse(p.Marshal(0)); err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("%+v, %v", got, err)
	}
	if Get(p.Fields, "content-range") != "bytes 0-9/10" || Get(append(p.Fields, Field{"x", "y"}), "x") != "" {
		t.Error("a field isn't found, or one of two is")
	}
	// RFC 9292, Section 3.2: of indeterminate length, with an informational response and trailers.
	got, err := ParseResponse(unhex(t, "03 4066 01 61 01 62 00 40c8 01 61 01 63 00 02 6869 01 21 00 01 74 01 75 00 0000"))
	if want := (&Response{Status: 200, Fields: []Field{{"a", "c"}}, Content: []byte("hi!")}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, bad := range map[string]string{
		"nothing": "", "a response as request": "0140c8", "cut off": "0003474554056874", "no path": "00 03474554 05 6874747073 01 61",
		"a field in capitals": "00 0147 0147 0147 0147 04 01 41 01 62", "a field without a name": "00 0147 0147 0147 0147 02 00 00",
		"a value of two lines": "00 0147 0147 0147 0147 05 01 61 02 620a", "more than there is": "00 0147 0147 0147 0147 00 bfffffff",
		"padding that isn't zero": "00 0147 0147 0147 0147 00 00 00 01", "half a number": "00 40",
	} {
		if q, err := ParseRequest(unhex(t, bad)); !errors.Is(err, ErrMessage) {
			t.Errorf("%s: %+v, %v", name, q, err)
		}
	}
	for name, bad := range map[string]string{"a request": "00", "no status": "01", "status 600": "01 4258", "informational only": "03 4064 00"} {
		if p, err := ParseResponse(unhex(t, bad)); !errors.Is(err, ErrMessage) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(unhex(f, exampleRequest))
	f.Add(unhex(f, exampleResponse))
	f.Add(unhex(f, "03 4066 01 61 01 62 00 40c8 01 61 01 63 00 02 6869 01 21 00 01 74 01 75 00 0000"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if q, err := ParseRequest(b); err == nil {
			again, err := ParseRequest(q.Marshal(16))
			if err != nil || !bytes.Equal(again.Content, q.Content) || !reflect.DeepEqual(again.Fields, q.Fields) || again.Path != q.Path {
				t.Fatalf("%+v becomes %+v, %v", q, again, err)
			}
		}
		if p, err := ParseResponse(b); err == nil {
			again, err := ParseResponse(p.Marshal(16))
			if err != nil || !bytes.Equal(again.Content, p.Content) || !reflect.DeepEqual(again.Fields, p.Fields) || again.Status != p.Status {
				t.Fatalf("%+v becomes %+v, %v", p, again, err)
			}
		}
		_, _ = ParseKeys(b)
		_, _, _ = new(Gateway).Open(b)
	})
}
