// Package codec reads and writes the TLS presentation language as MLS uses it: big-endian integers, optional
// values, and vectors whose length is a variable-size integer in the manner of QUIC (RFC 9420, Section 2.1).
// The MIMI drafts use the same encoding.
//
// Types that cross a wire implement Marshaler and Unmarshaler; Marshal and Unmarshal are the entry points.
// Decoding is strict: lengths are in their shortest form, trailing bytes are an error, and a declared length is
// compared with what is there before anything is allocated for it.
package codec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
)

// The errors that decoding wraps.
var (
	// ErrTruncated: the input ends within a value, or before the end of a vector.
	ErrTruncated = errors.New("codec: truncated")
	// ErrTrailing: bytes are left after the last value.
	ErrTrailing = errors.New("codec: trailing bytes")
	// ErrLength: a vector's length isn't in its shortest form, or is more or less than is allowed.
	ErrLength = errors.New("codec: length not in its shortest form or out of range")
	// ErrValue: a value decodes and isn't one that the type has.
	ErrValue = errors.New("codec: value not allowed")
)

// MaxVector is the largest length in bytes that a variable-size vector can have (RFC 9420, Section 2.1.2).
const MaxVector = 1<<30 - 1

// Marshaler appends its encoding to w. It can't fail.
type Marshaler interface{ MarshalMLS(w *Writer) }

// Unmarshaler reads itself from r. Errors stick to r, so an implementation need not look at them between fields.
type Unmarshaler interface{ UnmarshalMLS(r *Reader) }

// Marshal returns the encoding of m.
func Marshal(m Marshaler) []byte { return Encode(m.MarshalMLS) }

// Encode returns what write writes, in a new slice.
func Encode(write func(w *Writer)) []byte {
	w := Scratch()
	defer w.Free()
	write(w)
	return append(make([]byte, 0, len(w.b)), w.b...)
}

// Unmarshal decodes the whole of b into u; bytes left over are an error. Nothing in u aliases b.
func Unmarshal(b []byte, u Unmarshaler) error {
	r := NewReader(b)
	u.UnmarshalMLS(r)
	return r.Finish()
}

// Writer appends encoded values. The zero Writer is ready to use.
type Writer struct{ b []byte }

var scratch = sync.Pool{New: func() any { return &Writer{b: make([]byte, 0, 4096)} }}

// Scratch returns a Writer for an encoding that isn't kept: what is hashed, signed or encrypted.
func Scratch() *Writer { return scratch.Get().(*Writer) }

// maxScratch is how large a buffer is used again.
const maxScratch = 1 << 22

// Free ends the use of a Writer from Scratch. Its bytes, which may be secret, are cleared.
func (w *Writer) Free() {
	clear(w.b)
	if cap(w.b) <= maxScratch {
		w.b = w.b[:0]
		scratch.Put(w)
	}
}

// Bytes returns what was written: the Writer's own buffer, until the next write.
func (w *Writer) Bytes() []byte { return w.b }

// Uint8 writes one byte.
func (w *Writer) Uint8(v uint8) { w.b = append(w.b, v) }

// Uint16 writes two bytes, big-endian.
func (w *Writer) Uint16(v uint16) { w.b = binary.BigEndian.AppendUint16(w.b, v) }

// Uint32 writes four bytes, big-endian.
func (w *Writer) Uint32(v uint32) { w.b = binary.BigEndian.AppendUint32(w.b, v) }

// Uint64 writes eight bytes, big-endian.
func (w *Writer) Uint64(v uint64) { w.b = binary.BigEndian.AppendUint64(w.b, v) }

// Raw writes b as it is: a fixed-size field, or something encoded before.
func (w *Writer) Raw(b []byte) { w.b = append(w.b, b...) }

// String writes s as it is.
func (w *Writer) String(s string) { w.b = append(w.b, s...) }

// Length writes a vector's length. It panics past MaxVector, which no value that fits in a message reaches.
func (w *Writer) Length(n int) { w.b = AppendLength(w.b, n) }

// AppendLength is Length for a slice: it appends one, two or four bytes (RFC 9420, Section 2.1.2).
func AppendLength(b []byte, n int) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n))
	case n < 1<<14:
		return binary.BigEndian.AppendUint16(b, uint16(n)|0x4000)
	case n <= MaxVector:
		return binary.BigEndian.AppendUint32(b, uint32(n)|0x80000000)
	}
	panic("codec: vector longer than 2^30-1 bytes")
}

// Opaque writes opaque<V>.
func (w *Writer) Opaque(b []byte) {
	w.Length(len(b))
	w.b = append(w.b, b...)
}

// Optional writes the presence byte of optional<T>; the caller writes the value after it if present.
func (w *Writer) Optional(present bool) {
	if present {
		w.Uint8(1)
	} else {
		w.Uint8(0)
	}
}

// Vector writes a vector whose elements f writes. The elements are written once and moved if their length needs
// more than one byte.
func (w *Writer) Vector(f func(w *Writer)) {
	start := len(w.b)
	w.b = append(w.b, 0)
	f(w)
	n := len(w.b) - start - 1
	if n < 1<<6 {
		w.b[start] = byte(n)
		return
	}
	var l Writer
	l.Length(n)
	extra := len(l.b) - 1
	w.b = append(w.b, l.b[:extra]...)
	copy(w.b[start+1+extra:], w.b[start+1:start+1+n])
	copy(w.b[start:], l.b)
}

// WriteVector writes the elements of s as a vector.
func WriteVector[T any](w *Writer, s []T, each func(w *Writer, v T)) {
	w.Vector(func(w *Writer) {
		for i := range s {
			each(w, s[i])
		}
	})
}

// Reader consumes encoded values. After the first failure every read returns a zero value, and Err says why.
type Reader struct {
	b     []byte
	err   error
	alias bool
}

// NewReader reads from b, which it doesn't change.
func NewReader(b []byte) *Reader { return &Reader{b: b} }

// NewAliasing is NewReader for a b that won't change: the slices that are read are parts of it.
func NewAliasing(b []byte) *Reader { return &Reader{b: b, alias: true} }

// own returns b, or a copy of it.
func (r *Reader) own(b []byte) []byte {
	if r.alias {
		return b
	}
	return append(make([]byte, 0, len(b)), b...)
}

// Err returns the first failure.
func (r *Reader) Err() error { return r.err }

// Fail records err as the Reader's failure unless there is one already.
func (r *Reader) Fail(err error) {
	if r.err == nil {
		r.err = err
		r.b = nil
	}
}

// Failf is Fail with ErrValue and a reason.
func (r *Reader) Failf(format string, args ...any) {
	r.Fail(fmt.Errorf("%w: %s", ErrValue, fmt.Sprintf(format, args...)))
}

// Finish returns the first failure, or ErrTrailing if bytes are left.
func (r *Reader) Finish() error {
	if r.err == nil && len(r.b) > 0 {
		r.Fail(fmt.Errorf("%w: %d", ErrTrailing, len(r.b)))
	}
	return r.err
}

// Len returns how many bytes are left, also after a failure.
func (r *Reader) Len() int { return len(r.b) }

// Empty says whether no bytes are left, also after a failure.
func (r *Reader) Empty() bool { return len(r.b) == 0 }

// Rest returns the unread bytes without consuming them; they alias the input.
func (r *Reader) Rest() []byte { return r.b }

func (r *Reader) take(n int) []byte {
	if r.err != nil {
		return nil
	}
	if n > len(r.b) {
		r.Fail(fmt.Errorf("%w: %d bytes wanted, %d left", ErrTruncated, n, len(r.b)))
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

// Uint8 reads one byte.
func (r *Reader) Uint8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

// Uint16 reads two bytes.
func (r *Reader) Uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

// Uint32 reads four bytes.
func (r *Reader) Uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// Uint64 reads eight bytes.
func (r *Reader) Uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// Raw reads n bytes into a new slice; for NewAliasing it is a part of the input.
func (r *Reader) Raw(n int) []byte {
	b := r.take(n)
	if b == nil {
		return nil
	}
	return r.own(b)
}

// ViewRaw is Raw whose result is part of the input.
func (r *Reader) ViewRaw(n int) []byte { return r.take(n) }

// Length reads a vector's length in bytes and checks that so much is left. It fails with ErrLength or ErrTruncated.
func (r *Reader) Length() int {
	first := r.take(1)
	if first == nil {
		return 0
	}
	n, prefix := int(first[0]&0x3f), first[0]>>6
	if prefix == 3 {
		r.Fail(fmt.Errorf("%w: prefix 3", ErrLength))
		return 0
	}
	more := r.take(1<<prefix - 1)
	for _, b := range more {
		n = n<<8 | int(b)
	}
	if r.err == nil && (prefix == 1 && n < 1<<6 || prefix == 2 && n < 1<<14) {
		r.Fail(fmt.Errorf("%w: %d in %d bytes", ErrLength, n, 1<<prefix))
	}
	if r.err == nil && n > len(r.b) {
		r.Fail(fmt.Errorf("%w: vector of %d bytes, %d left", ErrTruncated, n, len(r.b)))
	}
	if r.err != nil {
		return 0
	}
	return n
}

// Opaque reads opaque<V> into a new slice (for NewAliasing a part of the input), which is empty and not nil for a
// vector of no bytes.
func (r *Reader) Opaque() []byte {
	b := r.View()
	if r.err != nil {
		return nil
	}
	return r.own(b)
}

// View is Opaque without a copy: the slice is a part of the input.
func (r *Reader) View() []byte { return r.take(r.Length()) }

// OpaqueMax is Opaque that refuses more than max bytes, with ErrLength.
func (r *Reader) OpaqueMax(max int) []byte {
	n := r.Length()
	if n > max {
		r.Fail(fmt.Errorf("%w: %d bytes, %d allowed", ErrLength, n, max))
		return nil
	}
	b := r.take(n)
	if r.err != nil {
		return nil
	}
	return r.own(b)
}

// Optional reads the presence byte of optional<T> (RFC 9420, Section 2.1.1), which is 0 or 1; others fail with
// ErrValue.
func (r *Reader) Optional() bool {
	switch v := r.Uint8(); v {
	case 0:
		return false
	case 1:
		return true
	default:
		r.Failf("presence byte %d", v)
		return false
	}
}

// Vector reads a vector: f is called, on a Reader of just the vector's bytes, until they are consumed. f must
// consume at least one byte each time.
func (r *Reader) Vector(f func(r *Reader)) {
	b := r.take(r.Length())
	if r.err != nil {
		return
	}
	inner := Reader{b: b, alias: r.alias}
	for !inner.Empty() {
		before := len(inner.b)
		f(&inner)
		if inner.err == nil && len(inner.b) == before {
			inner.Fail(fmt.Errorf("%w: element of no bytes", ErrLength))
		}
	}
	if inner.err != nil {
		r.Fail(inner.err)
	}
}

// ReadVector reads a vector of T; nil for one without elements.
func ReadVector[T any](r *Reader, each func(r *Reader) T) []T {
	var s []T
	r.Vector(func(r *Reader) {
		v := each(r)
		if r.err == nil {
			s = append(s, v)
		}
	})
	if r.err != nil {
		return nil
	}
	return s
}
