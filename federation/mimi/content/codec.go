package content

import (
	"bytes"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/parley-mls/parley/federation/mimi"
)

// cbor is used since it encodes deterministically and bounds what it decodes.
var (
	encoder = must(cbor.CoreDetEncOptions().EncMode())
	decoder = must(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		MaxNestedLevels:  2 * (MaxDepth + 1), // a part is an array in an array
		MaxArrayElements: MaxParts,
		MaxMapPairs:      MaxExtensions,
		MapKeyByteString: cbor.MapKeyByteStringAllowed,
		BignumTag:        cbor.BignumTagForbidden,
		UTF8:             cbor.UTF8RejectInvalid,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // the options are constants
	}
	return v
}

// Encode returns the message's encoding. It fails for what Parse would refuse.
func (m *Message) Encode() ([]byte, error) {
	b, err := m.encode()
	if err != nil {
		return nil, err
	}
	if _, err := Parse(b); err != nil {
		return nil, err
	}
	return b, nil
}

func (m *Message) encode() ([]byte, error) {
	ext := make(map[any]cbor.RawMessage, len(m.Extensions)+2)
	for k, v := range m.Extensions {
		if k.Text != "" {
			ext[k.Text] = v
		} else {
			ext[k.Int] = v
		}
	}
	for k, u := range map[int64]mimi.URI{extensionSender: m.Sender, extensionRoom: m.Room} {
		if _, ok := m.Extensions[ExtensionKey{Int: k}]; ok {
			return nil, malformed("extension %d stands apart", k)
		}
		if u != "" {
			b, err := encoder.Marshal(string(u))
			if err != nil {
				return nil, malformed("%v", err)
			}
			ext[k] = b
		}
	}
	var expires any
	if m.Expires != nil {
		expires = []any{m.Expires.Relative, m.Expires.Time}
	}
	n := 0
	body, err := m.Body.encode(1, &n)
	if err != nil {
		return nil, err
	}
	b, err := encoder.Marshal([]any{m.Salt[:], optional(m.Replaces), octets(m.Topic), expires, optional(m.InReplyTo), ext, body})
	if err != nil {
		return nil, malformed("%v", err)
	}
	return b, nil
}

// octets is a byte string, an empty one for nil.
func octets(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

func optional(id MessageID) any {
	if id.IsZero() {
		return nil
	}
	return id[:]
}

func (p *Part) encode(depth int, n *int) ([]any, error) {
	if *n++; *n > MaxParts || depth > MaxDepth {
		return nil, malformed("more than %d parts, or more than %d levels of them", MaxParts, MaxDepth)
	}
	list := []any{uint8(p.Disposition), p.Language, uint8(p.Cardinality)}
	switch p.Cardinality {
	case NullPart:
		return list, nil
	case SinglePart:
		return append(list, p.ContentType, octets(p.Content)), nil
	case ExternalPart:
		e := p.External
		if e == nil {
			return nil, malformed("an external part without what is external")
		}
		return append(list, p.ContentType, e.URL, e.Expires, e.Size, e.EncAlg, octets(e.Key), octets(e.Nonce), octets(e.AAD),
			e.HashAlg, octets(e.ContentHash), e.Description, e.Filename), nil
	case MultiPart:
		parts := make([]any, len(p.Parts))
		for i := range p.Parts {
			var err error
			if parts[i], err = p.Parts[i].encode(depth+1, n); err != nil {
				return nil, err
			}
		}
		return append(list, uint8(p.Semantics), parts), nil
	}
	return nil, malformed("part of cardinality %d", p.Cardinality)
}

// Parse decodes a message. It fails with ErrMalformed. The message doesn't alias b.
func Parse(b []byte) (*Message, error) {
	if len(b) > MaxSize {
		return nil, malformed("%d bytes, at most %d", len(b), MaxSize)
	}
	list, err := array(b, 7)
	if err != nil {
		return nil, err
	}
	m := new(Message)
	var salt []byte
	var expires *[]cbor.RawMessage
	if err := values(list, &salt, nil, &m.Topic, &expires); err != nil {
		return nil, err
	}
	if len(salt) != len(m.Salt) || len(m.Topic) > MaxTopic {
		return nil, malformed("a salt of %d bytes, or a topic of %d", len(salt), len(m.Topic))
	}
	copy(m.Salt[:], salt)
	if m.Replaces, err = messageID(list[1]); err != nil {
		return nil, err
	}
	if m.InReplyTo, err = messageID(list[4]); err != nil {
		return nil, err
	}
	if expires != nil {
		m.Expires = new(Expiration)
		if len(*expires) != 2 {
			return nil, malformed("an expiration of %d values", len(*expires))
		}
		if err := values(*expires, &m.Expires.Relative, &m.Expires.Time); err != nil {
			return nil, err
		}
	}
	if err := m.parseExtensions(list[5]); err != nil {
		return nil, err
	}
	n := 0
	if m.Body, err = parsePart(list[6], 1, &n); err != nil {
		return nil, err
	}
	again, err := m.encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, malformed("not in deterministic encoding")
	}
	return m, nil
}

// array decodes an array without its elements; of any number of them if want is 0.
func array(b cbor.RawMessage, want int) ([]cbor.RawMessage, error) {
	var list []cbor.RawMessage
	if err := decoder.Unmarshal(b, &list); err != nil {
		return nil, malformed("%v", err)
	}
	if list == nil || want > 0 && len(list) != want {
		return nil, malformed("an array of %d values, not of %d", len(list), want)
	}
	return list, nil
}

// values decodes the elements of an array into pointers; those for which there is nil are left alone.
func values(list []cbor.RawMessage, into ...any) error {
	for i, v := range into {
		if v == nil {
			continue
		}
		if err := decoder.Unmarshal(list[i], v); err != nil {
			return malformed("value %d: %v", i, err)
		}
	}
	return nil
}

func messageID(b cbor.RawMessage) (MessageID, error) {
	var id MessageID
	var p *[]byte
	if err := decoder.Unmarshal(b, &p); err != nil {
		return id, malformed("message ID: %v", err)
	}
	if p == nil {
		return id, nil
	}
	if len(*p) != len(id) || (*p)[0] != hashSHA256 {
		return id, malformed("a message ID of %d bytes, or of an unknown hash", len(*p))
	}
	copy(id[:], *p)
	return id, nil
}

func (m *Message) parseExtensions(b cbor.RawMessage) error {
	var ext map[any]cbor.RawMessage
	if err := decoder.Unmarshal(b, &ext); err != nil {
		return malformed("extensions: %v", err)
	}
	for k, v := range ext {
		var e ExtensionKey
		switch k := k.(type) {
		case string:
			if e.Text = k; len(k) == 0 || len(k) > MaxName {
				return malformed("extension with a name of %d bytes", len(k))
			}
		default:
			var ok bool
			if e.Int, ok = integer(k); !ok {
				return malformed("extension with a key of type %T, or out of range", k)
			}
		}
		if len(v) > MaxExtension {
			return malformed("extension of %d bytes, at most %d", len(v), MaxExtension)
		}
		switch e {
		case ExtensionKey{Int: extensionSender}:
			if err := decoder.Unmarshal(v, (*string)(&m.Sender)); err != nil {
				return malformed("sender: %v", err)
			}
		case ExtensionKey{Int: extensionRoom}:
			if err := decoder.Unmarshal(v, (*string)(&m.Room)); err != nil {
				return malformed("room: %v", err)
			}
		default:
			if err := deterministic(v, 2); err != nil {
				return err
			}
			if m.Extensions == nil {
				m.Extensions = make(map[ExtensionKey][]byte)
			}
			m.Extensions[e] = bytes.Clone(v)
		}
	}
	return nil
}

// integer is a key that is an integer of at most 53 bits.
func integer(k any) (int64, bool) {
	switch k := k.(type) {
	case uint64:
		return int64(k), k <= maxKey
	case int64:
		return k, k >= -maxKey && k <= maxKey
	}
	return 0, false
}

// deterministic checks an extension's value, or a part of it at some depth of the extensions: it is what would be
// encoded again of what it has (draft-ietf-mimi-content, "CBOR Data Model and Encoding Restrictions").
func deterministic(b cbor.RawMessage, depth int) error {
	var v any
	var inner []cbor.RawMessage
	switch b[0] >> 5 {
	case 4:
		if err := decoder.Unmarshal(b, &inner); err != nil {
			return malformed("extension: %v", err)
		}
		v = inner
	case 5:
		var m map[any]cbor.RawMessage
		if err := decoder.Unmarshal(b, &m); err != nil {
			return malformed("extension: %v", err)
		}
		for k, value := range m {
			switch k := k.(type) {
			case string, cbor.ByteString:
			default:
				if _, ok := integer(k); !ok {
					return malformed("map with a key of type %T, or out of range", k)
				}
			}
			inner = append(inner, value)
		}
		v = m
	case 6:
		var t cbor.RawTag
		if err := decoder.Unmarshal(b, &t); err != nil {
			return malformed("extension: %v", err)
		}
		v, inner = t, []cbor.RawMessage{t.Content}
	default:
		if err := decoder.Unmarshal(b, &v); err != nil {
			return malformed("extension: %v", err)
		}
	}
	if b[0]>>5 >= 4 && b[0]>>5 <= 6 && depth > MaxDepth {
		return malformed("extensions nest more than %d levels deep", MaxDepth)
	}
	for _, r := range inner {
		if err := deterministic(r, depth+1); err != nil {
			return err
		}
	}
	again, err := encoder.Marshal(v)
	if err != nil || !bytes.Equal(again, b) {
		return malformed("extension not in deterministic encoding")
	}
	return nil
}

func parsePart(b cbor.RawMessage, depth int, n *int) (Part, error) {
	var p Part
	if *n++; *n > MaxParts || depth > MaxDepth {
		return p, malformed("more than %d parts, or more than %d levels of them", MaxParts, MaxDepth)
	}
	list, err := array(b, 0)
	if err != nil {
		return p, err
	}
	if len(list) < 3 {
		return p, malformed("a part of %d values", len(list))
	}
	if err := values(list, (*uint8)(&p.Disposition), &p.Language, (*uint8)(&p.Cardinality)); err != nil {
		return p, err
	}
	if p.Cardinality > MultiPart || len(list) != [...]int{NullPart: 3, SinglePart: 5, ExternalPart: 15, MultiPart: 5}[p.Cardinality] {
		return p, malformed("a part of cardinality %d with %d values", p.Cardinality, len(list))
	}
	switch list = list[3:]; p.Cardinality {
	case SinglePart:
		err = values(list, &p.ContentType, &p.Content)
	case ExternalPart:
		e := new(External)
		p.External = e
		err = values(list, &p.ContentType, &e.URL, &e.Expires, &e.Size, &e.EncAlg, &e.Key, &e.Nonce, &e.AAD,
			&e.HashAlg, &e.ContentHash, &e.Description, &e.Filename)
	case MultiPart:
		err = p.parseParts(list, depth, n)
	}
	return p, err
}

func (p *Part) parseParts(list []cbor.RawMessage, depth int, n *int) error {
	if err := values(list, (*uint8)(&p.Semantics)); err != nil {
		return err
	}
	if p.Semantics > ProcessAll {
		return malformed("part semantics %d", p.Semantics)
	}
	parts, err := array(list[1], 0)
	if err != nil {
		return err
	}
	if len(parts) < 2 {
		return malformed("a multipart of %d parts", len(parts))
	}
	p.Parts = make([]Part, len(parts))
	for i, b := range parts {
		if p.Parts[i], err = parsePart(b, depth+1, n); err != nil {
			return err
		}
	}
	return nil
}

// Body is the body for a message of bytes that nobody has said the type of: text if they are.
func Body(b []byte) Part {
	if utf8.Valid(b) {
		return Single(Render, PlainText, b)
	}
	return Single(Render, Bytes, b)
}
