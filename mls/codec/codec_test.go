package codec

import (
	"bytes"
	"errors"
	"testing"
)

func TestLengthTakesItsShortestForm(t *testing.T) {
	for _, c := range []struct {
		n    int
		want []byte
	}{
		{0, []byte{0}}, {37, []byte{0x25}}, {63, []byte{0x3f}}, {64, []byte{0x40, 0x40}},
		{15293, []byte{0x7b, 0xbd}}, {16384, []byte{0x80, 0, 0x40, 0}}, {494878333, []byte{0x9d, 0x7f, 0x3e, 0x7d}},
	} {
		var w Writer
		w.Length(c.n)
		if !bytes.Equal(w.Bytes(), c.want) {
			t.Errorf("%d: got %x, want %x", c.n, w.Bytes(), c.want)
		}
	}
	for _, b := range [][]byte{{0x40, 0x25}, {0x80, 0, 0, 0x25}, {0xc0, 0, 0, 0, 0, 0, 0, 1}} {
		r := NewReader(append(b, make([]byte, 64)...))
		if r.Length(); !errors.Is(r.Err(), ErrLength) {
			t.Errorf("%x: got %v, want ErrLength", b, r.Err())
		}
	}
}

func TestDeclaredLengthIsCheckedBeforeAllocation(t *testing.T) {
	in := []byte{0xbf, 0xff, 0xff, 0xff, 1}
	if n := testing.AllocsPerRun(10, func() {
		r := NewReader(in)
		if r.Opaque() != nil || r.Err() == nil {
			t.Fatal("truncated vector accepted")
		}
	}); n > 12 {
		t.Errorf("%v allocations for a refused vector", n)
	}
	r := NewReader(in)
	if r.Opaque(); !errors.Is(r.Err(), ErrTruncated) {
		t.Errorf("got %v, want ErrTruncated", r.Err())
	}
}

func TestVectorMovesLongContents(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 16383, 16384, 70000} {
		body := bytes.Repeat([]byte{7}, n)
		var a, b Writer
		a.Raw([]byte{1, 2})
		a.Vector(func(w *Writer) { w.Raw(body) })
		a.Uint8(9)
		b.Raw([]byte{1, 2})
		b.Opaque(body)
		b.Uint8(9)
		if !bytes.Equal(a.Bytes(), b.Bytes()) {
			t.Errorf("length %d: vector and opaque differ", n)
		}
	}
}

func TestTrailingBytesAndPresenceBytesAreRefused(t *testing.T) {
	r := NewReader([]byte{1, 2})
	r.Uint8()
	if !errors.Is(r.Finish(), ErrTrailing) {
		t.Errorf("got %v, want ErrTrailing", r.Err())
	}
	r = NewReader([]byte{2})
	r.Optional()
	if !errors.Is(r.Err(), ErrValue) {
		t.Errorf("got %v, want ErrValue", r.Err())
	}
}

func TestWhatIsTooShortOrTooLongIsRefused(t *testing.T) {
	for what, c := range map[string]struct {
		in   string
		read func(r *Reader)
		want error
	}{
		"integer":                 {"\x01\x02\x03", func(r *Reader) { r.Uint32() }, ErrTruncated},
		"nothing":                 {"", func(r *Reader) { r.Uint8() }, ErrTruncated},
		"fixed size":              {"\x01", func(r *Reader) { r.Raw(2) }, ErrTruncated},
		"length of two bytes":     {"\x40", func(r *Reader) { r.Length() }, ErrTruncated},
		"vector":                  {"\x02\x01", func(r *Reader) { r.Length() }, ErrTruncated},
		"bounded vector":          {"\x03abc", func(r *Reader) { r.OpaqueMax(2) }, ErrLength},
		"element":                 {"\x03abc", func(r *Reader) { r.Vector(func(r *Reader) { r.Uint16() }) }, ErrTruncated},
		"element of no bytes":     {"\x01a", func(r *Reader) { r.Vector(func(*Reader) {}) }, ErrLength},
		"element that is refused": {"\x01a", func(r *Reader) { r.Vector(func(r *Reader) { r.Uint8(); r.Failf("no") }) }, ErrValue},
	} {
		r := NewReader([]byte(c.in))
		if c.read(r); !errors.Is(r.Err(), c.want) {
			t.Errorf("%s: got %v, want %v", what, r.Err(), c.want)
		}
	}
	if err := Unmarshal([]byte("a"), refuser{}); !errors.Is(err, ErrValue) {
		t.Errorf("a type that refuses itself: got %v, want ErrValue", err)
	}
}

type refuser struct{}

func (refuser) UnmarshalMLS(r *Reader) { r.Uint8(); r.Failf("no") }

func FuzzReader(f *testing.F) {
	f.Add([]byte{0x40, 0x40, 1, 2, 3})
	f.Add([]byte{3, 1, 2, 3})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(in)
		v := r.Opaque()
		if r.Finish() != nil {
			return
		}
		var w Writer
		w.Opaque(v)
		if !bytes.Equal(w.Bytes(), in) {
			t.Errorf("%x decoded and encoded gives %x", in, w.Bytes())
		}
	})
}
