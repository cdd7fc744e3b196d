package content

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

const room = mimi.URI("mimi://example.com/r/engineering_team")

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func id(t testing.TB, s string) MessageID {
	t.Helper()
	v, err := ParseMessageID(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func salt(t testing.TB, s string) [16]byte { return [16]byte(unhex(t, s)) }

// examples are the draft's, built from its text; it states their IDs.
func examples(t testing.TB) map[string]*Message {
	const alice, bob, cathy = mimi.URI("mimi://example.com/u/alice-smith"), mimi.URI("mimi://example.com/u/bob-jones"), mimi.URI("mimi://example.com/u/cathy-washington")
	original := id(t, "017ce54837404c3696e0c747b985cb172716d0ed0a3d249ca63ace7d82a096f4")
	reply := id(t, "015354973c2b65ca937bf1e035ae53a5ab80e947afa43d46920d4202e5cc0b27")
	reaction := id(t, "0158c4288911e50a8f6be3f47746b6682f10fd91bc8c05557aa589a3157aff68")
	return map[string]*Message{
		original.String(): {Salt: salt(t, "5eed9406c2545547ab6f09f20a18b003"), Sender: alice, Room: room,
			Body: Single(Render, Markdown, []byte("Hi everyone, we just shipped release 2.0. __Good  work__!"))},
		reply.String(): {Salt: salt(t, "11a458c73b8dd2cf404db4b378b8fe4d"), InReplyTo: original, Sender: bob, Room: room,
			Body: Single(Render, Markdown, []byte("Right on! _Congratulations_ 'all!"))},
		reaction.String(): {Salt: salt(t, "d37bc0e6a8b4f04e9e6382375f587bf6"), InReplyTo: original, Sender: cathy, Room: room,
			Body: React("\u2764")},
		"018d825adf9f6be00dcafc5704c4102f5022e74219d0b603e4ba7622654042af": {Salt: salt(t, "04f290e215d0f82d1750bfa8b7dc089d"), InReplyTo: original, Sender: cathy, Room: room,
			Body: Single(Render, Markdown, []byte("Kudos to [@Alice Smith](mimi://example.com/u/alice-smith) for making the release happen!"))},
		"011d9efc78d04d4dcf4d82b07d5199bbef37011c1f0c7e004b6111c6dda504b4": {Salt: salt(t, "0a590d73b2c7761c39168be5ebf7f2e6"), Replaces: reply, InReplyTo: original, Sender: bob, Room: room,
			Body: Part{Disposition: Render}},
		"013aadbb8f313253c8930f4e93c6ca54b2ed06d258185bdcec3870534c8a4ec4": {Salt: salt(t, "c5ba86dc9fd272e58ca52ec805b79199"), Replaces: reaction, InReplyTo: original, Sender: cathy, Room: room,
			Body: Part{Disposition: Reaction}},
		"01e59db8173939facc2c8a4a0f0ae8d0c7a11a81239626630c9464a8d6717a03": {Salt: salt(t, "33be993eb39f418f9295afc2ae160d2d"), Expires: &Expiration{Time: 1644390004}, Sender: alice, Room: room,
			Body: Single(Render, Markdown, []byte("__*VPN GOING DOWN*__ I'm rebooting the VPN in ten minutes unless anyone objects."))},
		"0176180c7d19a925021fe446d241134d05c38e0d999cdc0f39c391d2377ed9d1": {Salt: salt(t, "18fac6371e4e53f1aeaf8a013155c166"), Sender: bob, Room: room,
			Body: Part{Disposition: Attachment, Language: "en", Cardinality: ExternalPart, ContentType: "video/mp4", External: &External{
				URL: "https://example.com/storage/8ksB4bSrrRE.mp4", Size: 708234961, EncAlg: 1,
				Key: unhex(t, "21399320958a6f4c745dde670d95e0d8"), Nonce: unhex(t, "c86cf2c33f21527d1dd76f5b"), HashAlg: 1,
				ContentHash: unhex(t, "9ab17a8cf0890baaae7ee016c7312fcc080ba46498389458ee44f0276e783163"),
				Description: "2 hours of key signing video", Filename: "bigfile.mp4",
			}}},
		"01d65918c6c51c8e76546337276ae6f4bfd873d867d5cb57c76bcdca3d999dd7": {Salt: salt(t, "8528dc2d92e4f1944d62042907ab94d0"), Sender: alice, Room: room,
			Body: Part{Disposition: Reaction, Cardinality: MultiPart, Semantics: ProcessAll, Parts: []Part{React("\u2764"), React("\U0001F973"), React("\U0001F91E")}}},
	}
}

func TestMessagesHaveTheIDsThatTheDraftStates(t *testing.T) {
	for want, m := range examples(t) {
		b, err := m.Encode()
		if err != nil {
			t.Fatalf("%s: %v", want, err)
		}
		if got := ID(m.Sender, m.Room, b, m.Salt); got.String() != want {
			t.Errorf("ID %s, want %s", got, want)
		}
		back, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		again, err := back.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: %x, want %x (%v)", want, again, b, err)
		}
		if back.Replaces != m.Replaces || back.InReplyTo != m.InReplyTo || back.Deletes() != m.Deletes() || back.Reaction() != m.Reaction() ||
			!reflect.DeepEqual(back.Expires, m.Expires) || len(back.Body.Parts) != len(m.Body.Parts) {
			t.Errorf("%s: %+v, want %+v", want, back, m)
		}
	}
}

// The draft's files: every message decodes, encodes to the same bytes, and has the ID that its notes state.
func TestPublishedExamples(t *testing.T) {
	dir := os.Getenv("MIMI_CONTENT_EXAMPLES")
	if dir == "" {
		t.Skip("MIMI_CONTENT_EXAMPLES names no directory of the draft's examples")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.cbor"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples in %s: %v", dir, err)
	}
	stated := regexp.MustCompile(`message ID = h'([0-9a-f]+)\n#\s*([0-9a-f]+)'`)
	checked := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		notes, err := os.ReadFile(strings.TrimSuffix(f, ".cbor") + ".edn")
		if err != nil {
			t.Fatal(err)
		}
		want := stated.FindSubmatch(notes)
		if want == nil {
			continue // it isn't a message
		}
		m, err := Parse(b)
		if err != nil {
			t.Errorf("%s: %v", f, err)
			continue
		}
		if got := ID(m.Sender, m.Room, b, m.Salt).String(); got != string(want[1])+string(want[2]) {
			t.Errorf("%s has ID %s, want %s%s", f, got, want[1], want[2])
		}
		checked++
	}
	if checked < 10 {
		t.Errorf("only %d examples have an ID", checked)
	}
}

func TestExtensionsStayAsTheyAre(t *testing.T) {
	m := New("mimi://a.example/u/alice", "mimi://a.example/r/x", Text("hi"))
	m.Extensions = map[ExtensionKey][]byte{
		{Int: 256}:   unhex(t, "82 82 42 1234 d820 6a 687474703a2f2f612e62 82 42 3456 19168b"), // the draft's depth of four
		{Int: -1}:    unhex(t, "f5"),
		{Text: "x"}:  unhex(t, "a2 01 02 4161 f97e00"), // keys of an integer and of bytes, a NaN
		{Text: "yy"}: unhex(t, "c1 1a62036674"),        // a time
	}
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if back.Sender != m.Sender || back.Room != m.Room || !reflect.DeepEqual(back.Extensions, m.Extensions) {
		t.Errorf("%+v, want %+v", back, m)
	}
}

// frame is a message with these extensions and this body around what a test varies.
func frame(ext, body string) string {
	return "87 50" + strings.Repeat("00", 16) + "f6 40 f6 f6" + ext + body
}

const emptyPart = "83016000"

func TestHostileContentIsRefused(t *testing.T) {
	nested := func(n int) string {
		s := emptyPart
		for range n - 1 {
			s = "85 01 60 03 00 82" + s + emptyPart
		}
		return s
	}
	if _, err := Parse(unhex(t, frame("a0", nested(MaxDepth)))); err != nil {
		t.Errorf("the deepest message: %v", err)
	}
	for what, s := range map[string]string{
		"nothing":                       "",
		"no array":                      "a0",
		"null":                          "f6",
		"too few fields":                "86 50" + strings.Repeat("00", 16) + "f6 40 f6 f6 a0",
		"bytes after the end":           frame("a0", emptyPart) + "00",
		"a short salt":                  "87 4f" + strings.Repeat("00", 15) + "f6 40 f6 f6 a0" + emptyPart,
		"a salt of integers":            "87 90" + strings.Repeat("00", 16) + "f6 40 f6 f6 a0" + emptyPart,
		"an ID of an unknown hash":      "87 50" + strings.Repeat("00", 16) + "5820 02" + strings.Repeat("00", 31) + "40 f6 f6 a0" + emptyPart,
		"an ID that is short":           "87 50" + strings.Repeat("00", 16) + "4101 40 f6 f6 a0" + emptyPart,
		"an expiration of 64 bits":      "87 50" + strings.Repeat("00", 16) + "f6 40 82f41b0000000100000000 f6 a0" + emptyPart,
		"an expiration of one value":    "87 50" + strings.Repeat("00", 16) + "f6 40 81f4 f6 a0" + emptyPart,
		"an indefinite array":           "9f 50" + strings.Repeat("00", 16) + "f6 40 f6 f6 a0" + emptyPart + "ff",
		"a topic in a long header":      "87 50" + strings.Repeat("00", 16) + "f6 5800 f6 f6 a0" + emptyPart,
		"a long topic":                  "87 50" + strings.Repeat("00", 16) + "f6 591001" + strings.Repeat("00", MaxTopic+1) + "f6 f6 a0" + emptyPart,
		"a tag around it":               "d9d9f7" + frame("a0", emptyPart),
		"a declared gigabyte":           "87 5a40000000",
		"an array of 2^32":              "9affffffff",
		"extensions that are null":      frame("f6", emptyPart),
		"a key twice":                   frame("a2 03 01 03 02", emptyPart),
		"the sender twice":              frame("a2 01 6161 01 6162", emptyPart),
		"keys out of order":             frame("a2 04 01 03 02", emptyPart),
		"a key with 54 bits":            frame("a1 1b0020000000000000 01", emptyPart),
		"a key that is bytes":           frame("a1 4101 01", emptyPart),
		"a key that is empty":           frame("a1 60 01", emptyPart),
		"a sender that is bytes":        frame("a1 01 4161", emptyPart),
		"a sender that is null":         frame("a1 01 f6", emptyPart),
		"a sender that is empty":        frame("a1 01 60", emptyPart),
		"a bignum":                      frame("a1 03 c24101", emptyPart),
		"an integer in a long header":   frame("a1 03 1801", emptyPart),
		"a float that could be shorter": frame("a1 03 fa3f800000", emptyPart),
		"another NaN":                   frame("a1 03 f97e01", emptyPart),
		"text that isn't UTF-8":         frame("a1 03 61ff", emptyPart),
		"undefined":                     frame("a1 03 f7", emptyPart),
		"a map in a map out of order":   frame("a1 03 a2 02 01 01 01", emptyPart),
		"a map with a key twice":        frame("a1 03 a2 01 01 01 01", emptyPart),
		"a map with a key of an array":  frame("a1 03 a1 80 01", emptyPart),
		"extensions that nest deeply":   frame("a1 03 81 81 81 81 00", emptyPart),
		"an extension that is large":    frame("a1 03 591000"+strings.Repeat("00", 4096), emptyPart),
		"a part of two values":          frame("a0", "820160"),
		"a null part of four values":    frame("a0", "8401600000"),
		"an unknown cardinality":        frame("a0", "83016004"),
		"a disposition of 256":          frame("a0", "8319010060 00"),
		"a disposition that is null":    frame("a0", "83f66000"),
		"a language that is bytes":      frame("a0", "83014000"),
		"a single part without content": frame("a0", "840160016161"),
		"content that is text":          frame("a0", "850160016161 6161"),
		"content of integers":           frame("a0", "850160016161 8101"),
		"unknown semantics":             frame("a0", "8501600303 82"+emptyPart+emptyPart),
		"a multipart of one":            frame("a0", "8501600300 81"+emptyPart),
		"a multipart that is null":      frame("a0", "8501600300 f6"),
		"five levels of parts":          frame("a0", nested(MaxDepth+1)),
		"a hundred levels of parts":     frame("a0", nested(100)),
		"1024 parts in one":             frame("a0", "8501600300 990400"+strings.Repeat(emptyPart, 1024)),
		"2048 parts in three":           frame("a0", "8501600300 82"+strings.Repeat("8501600300 990300"+strings.Repeat(emptyPart, 768), 2)),
	} {
		if m, err := Parse(unhex(t, s)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %+v, %v", what, m, err)
		}
	}
	if _, err := Parse(make([]byte, MaxSize+1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a large message: %v", err)
	}
}

func TestEncodeRefusesWhatParseWould(t *testing.T) {
	for what, m := range map[string]*Message{
		"a large message":                 New("", "", Single(Render, PlainText, make([]byte, MaxSize))),
		"an external part without itself": New("", "", Part{Cardinality: ExternalPart}),
		"a multipart of one":              New("", "", Part{Cardinality: MultiPart, Parts: []Part{Text("x")}}),
		"an extension that isn't CBOR":    {Extensions: map[ExtensionKey][]byte{{Int: 3}: {0xff}}},
		"the sender among extensions":     {Extensions: map[ExtensionKey][]byte{{Int: 1}: {0x61, 'a'}}},
		"text that isn't UTF-8":           New("", "", Part{Language: "\xff"}),
	} {
		if b, err := m.Encode(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %x, %v", what, b, err)
		}
	}
}

func TestExpiryIsWithinAYear(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for _, c := range []struct {
		e  *Expiration
		ok bool
	}{
		{nil, true}, {&Expiration{Time: 1_700_000_060}, true}, {&Expiration{Time: 1_699_000_000}, true}, {&Expiration{true, 3600}, true},
		{&Expiration{Time: 1_600_000_000}, false}, {&Expiration{Time: 1_800_000_000}, false}, {&Expiration{true, 100_000_000}, false},
	} {
		if err := (&Message{Expires: c.e}).CheckExpiry(now); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.e, err)
		}
	}
}

func TestWhatIsShownOfABody(t *testing.T) {
	image := Single(Inline, "image/png", []byte{1})
	html := Single(Render, "text/html;charset=utf-8", []byte(`<a href="mimi://a.example/u/carol">Carol</a>`))
	multi := func(s Semantics, parts ...Part) Part { return Part{Cardinality: MultiPart, Semantics: s, Parts: parts} }
	for what, c := range map[string]struct {
		p    Part
		text string
		all  bool
	}{
		"text":                {Text("hi"), "hi", true},
		"markdown":            {Single(Render, "Text/Markdown; variant=GFM-MIMI", []byte("*hi*")), "*hi*", true},
		"an image":            {image, "", false},
		"nothing":             {Part{}, "", true},
		"alternatives":        {multi(ChooseOne, html, Text("plain"), Text("other")), "plain", true},
		"all of several":      {multi(ProcessAll, Text("one"), image, Text("two")), "one\ntwo", false},
		"a unit with unknown": {multi(SingleUnit, Text("one"), image), "", false},
		"a unit":              {multi(SingleUnit, Text("one"), Text("two")), "one\ntwo", true},
	} {
		if text, all := c.p.Text(); text != c.text || all != c.all {
			t.Errorf("%s: got %q, %v", what, text, all)
		}
	}
	body := multi(ProcessAll, html, Single(Render, Markdown, []byte("<mimi://a.example/u/bob>, [C](mimi://a.example/u/carol), mimi://a.example/r/x")), Text("mimi://a.example/u/dave"))
	if got := body.Mentions(); !slices.Equal(got, []mimi.URI{"mimi://a.example/u/carol", "mimi://a.example/u/bob"}) {
		t.Errorf("mentions %v", got)
	}
	// The indexes of the draft's nested example, two formats of a page in two languages each.
	page := multi(ProcessAll, multi(ChooseOne, html, html), image)
	body = multi(ChooseOne, page, page)
	var images []int
	last := 0
	body.Walk(func(i int, p *Part) bool {
		if last = i; p.ContentType == "image/png" {
			images = append(images, i)
		}
		return true
	})
	if !slices.Equal(images, []int{5, 10}) || last != 10 {
		t.Errorf("images at %v, last part %d", images, last)
	}
}

func FuzzParse(f *testing.F) {
	for _, m := range examples(f) {
		b, err := m.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(unhex(f, frame("a2 03 a1 4161 82 f97e00 d820 6161 62 7878 c1 01", emptyPart)))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		again, err := m.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x encodes to %x, %v", b, again, err)
		}
		m.Body.Text()
		m.Body.Mentions()
	})
}

func BenchmarkParse(b *testing.B) {
	m := New("mimi://a.example/u/alice", "mimi://a.example/r/x", Text(strings.Repeat("x", 1024)))
	enc, err := m.Encode()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(enc); err != nil {
			b.Fatal(err)
		}
	}
}
