package ohttp

import (
	"errors"
	"fmt"
	"strings"

	"github.com/quic-go/quic-go/quicvarint"
)

// ErrMessage: what should be a binary HTTP message isn't one, or more than this package takes.
var ErrMessage = errors.New("ohttp: malformed HTTP message")

const (
	maxFields = 64
	maxField  = 8 << 10 // bytes of a name, a value, or a part of a request's control data
)

// The framing indicators of RFC 9292, Section 3.3.
const (
	knownRequest = iota
	knownResponse
	streamedRequest
	streamedResponse
)

// Field is a field line; names are lower case.
type Field struct{ Name, Value string }

// Request is an HTTP request. Trailers aren't kept.
type Request struct {
	Method, Scheme, Authority, Path string
	Fields                          []Field
	Content                         []byte
}

// Response is a final HTTP response. Informational ones before it, and trailers, aren't kept.
type Response struct {
	Status  int // 200 to 599
	Fields  []Field
	Content []byte
}

// Get returns the value of a field, "" if there isn't exactly one.
func Get(fields []Field, name string) string {
	value, n := "", 0
	for _, f := range fields {
		if f.Name == name {
			value, n = f.Value, n+1
		}
	}
	if n != 1 {
		return ""
	}
	return value
}

// Marshal returns the request as a binary HTTP message of known length (RFC 9292, Section 3.1), padded to a multiple of
// that many bytes.
func (r *Request) Marshal(multiple int) []byte {
	b := []byte{knownRequest}
	for _, s := range []string{r.Method, r.Scheme, r.Authority, r.Path} {
		b = appendString(b, s)
	}
	return pad(appendRest(b, r.Fields, r.Content), multiple)
}

// Marshal returns the response like that of Request.
func (r *Response) Marshal(multiple int) []byte {
	b := quicvarint.Append([]byte{knownResponse}, uint64(r.Status))
	return pad(appendRest(b, r.Fields, r.Content), multiple)
}

func appendString(b []byte, s string) []byte {
	return append(quicvarint.Append(b, uint64(len(s))), s...)
}

func appendRest(b []byte, fields []Field, content []byte) []byte {
	var section []byte
	for _, f := range fields {
		section = appendString(appendString(section, f.Name), f.Value)
	}
	b = append(quicvarint.Append(b, uint64(len(section))), section...)
	b = append(quicvarint.Append(b, uint64(len(content))), content...)
	return append(b, 0) // no trailers
}

func pad(b []byte, multiple int) []byte {
	if rest := len(b) % max(1, multiple); rest > 0 {
		b = append(b, make([]byte, multiple-rest)...)
	}
	return b
}

// reader reads a message; after an error there is nothing more in it.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s", ErrMessage, fmt.Sprintf(format, args...))
	}
	r.b = nil
}

// number reads an integer; at the message's end it is zero, as in one that is truncated (RFC 9292, Section 3.8).
func (r *reader) number() uint64 {
	if len(r.b) == 0 {
		return 0
	}
	v, n, err := quicvarint.Parse(r.b)
	if err != nil {
		r.fail("it is cut off")
		return 0
	}
	r.b = r.b[n:]
	return v
}

// bytes reads what has its length before it.
func (r *reader) bytes(max int) []byte {
	n := r.number()
	if n > uint64(len(r.b)) || n > uint64(max) {
		r.fail("%d bytes where there are %d, and may be %d", n, len(r.b), max)
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

// control reads a part of a request's control data.
func (r *reader) control() string {
	if len(r.b) == 0 {
		r.fail("it is cut off")
	}
	return string(r.bytes(maxField))
}

// fields reads a field section.
func (r *reader) fields(known bool) []Field {
	in := r
	if known {
		in = &reader{b: r.bytes(maxFields * maxField)}
	}
	var list []Field
	for in.err == nil && len(in.b) > 0 {
		name := string(in.bytes(maxField))
		if name == "" {
			if known {
				in.fail("a field without a name")
			}
			break
		}
		if len(in.b) == 0 {
			in.fail("it is cut off")
		}
		f := Field{name, string(in.bytes(maxField))}
		switch {
		case len(list) == maxFields:
			in.fail("more than %d fields", maxFields)
		case strings.ContainsFunc(f.Name, func(c rune) bool { return c <= ' ' || c >= 0x7f || c >= 'A' && c <= 'Z' || c == ':' }),
			strings.ContainsAny(f.Value, "\x00\r\n"):
			in.fail("field %.40q", f.Name)
		}
		list = append(list, f)
	}
	if in.err != nil && r.err == nil {
		r.err, r.b = in.err, nil
	}
	return list
}

// content reads content, and what follows it: trailers, and padding of zeros.
func (r *reader) content(known bool) []byte {
	var content []byte
	if known {
		content = r.bytes(len(r.b))
	} else {
		for r.err == nil && len(r.b) > 0 {
			chunk := r.bytes(len(r.b))
			if len(chunk) == 0 {
				break
			}
			content = append(content, chunk...)
		}
	}
	r.fields(known)
	for _, c := range r.b {
		if c != 0 {
			r.fail("padding that isn't zero")
		}
	}
	return content
}

// ParseRequest reads a request, of known length or not. The error wraps ErrMessage. Content is of b.
func ParseRequest(b []byte) (*Request, error) {
	r := &reader{b: b}
	framing := r.number()
	if len(b) == 0 || framing != knownRequest && framing != streamedRequest {
		return nil, fmt.Errorf("%w: no request", ErrMessage)
	}
	known := framing == knownRequest
	q := &Request{Method: r.control(), Scheme: r.control(), Authority: r.control(), Path: r.control()}
	q.Fields, q.Content = r.fields(known), r.content(known)
	if r.err != nil {
		return nil, r.err
	}
	return q, nil
}

// ParseResponse reads a response like ParseRequest.
func ParseResponse(b []byte) (*Response, error) {
	r := &reader{b: b}
	framing := r.number()
	if framing != knownResponse && framing != streamedResponse {
		return nil, fmt.Errorf("%w: no response", ErrMessage)
	}
	known := framing == knownResponse
	p := new(Response)
	for informational := 0; ; informational++ {
		status := r.number()
		if status >= 100 && status <= 199 && informational < maxFields {
			r.fields(known)
			continue
		}
		if status < 200 || status > 599 {
			r.fail("status %d", status)
		}
		p.Status = int(status)
		break
	}
	p.Fields, p.Content = r.fields(known), r.content(known)
	if r.err != nil {
		return nil, r.err
	}
	return p, nil
}
