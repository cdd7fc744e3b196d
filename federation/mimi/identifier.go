package mimi

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Limits of fields, in bytes and elements, that decoding enforces beyond what the message's own size bounds.
const (
	MaxDescription  = 1024  // of an UpdateRoomResponse's errorDescription
	MaxText         = 65536 // of a text or an opaque code
	MaxMoreMessages = 4096  // messages in one list
)

// Protocol is the end-to-end protocol of a message (draft-ietf-mimi-protocol-06, Section 5). ProtocolMLS10 is the only
// one; structures with a field for it are encoded with this value, and decoding refuses others.
type Protocol uint8

// ProtocolMLS10 is MLS 1.0.
const ProtocolMLS10 Protocol = 1

// ErrProtocol is what decoding wraps if the protocol isn't MLS 1.0.
var ErrProtocol = errors.New("mimi: protocol isn't MLS 1.0")

func writeProtocol(w *codec.Writer) { w.Uint8(uint8(ProtocolMLS10)) }

func readProtocol(r *codec.Reader) {
	if p := r.Uint8(); r.Err() == nil && Protocol(p) != ProtocolMLS10 {
		r.Fail(fmt.Errorf("%w: %d", ErrProtocol, p))
	}
}

// MarshalMLS implements codec.Marshaler:
//
//	struct { opaque uri<V>; } IdentifierUri;
func (u URI) MarshalMLS(w *codec.Writer) { w.Opaque([]byte(u)) }

// UnmarshalMLS implements codec.Unmarshaler. It refuses what ParseURI refuses.
func (u *URI) UnmarshalMLS(r *codec.Reader) {
	b := r.OpaqueMax(MaxURI)
	if r.Err() != nil {
		return
	}
	parsed, err := ParseURI(string(b))
	if err != nil {
		r.Fail(fmt.Errorf("%w: %w", codec.ErrValue, err))
		return
	}
	*u = parsed
}

// readURI reads a URI of one of the kinds, all kinds if there are none.
func readURI(r *codec.Reader, kinds ...byte) URI {
	var u URI
	u.UnmarshalMLS(r)
	if r.Err() != nil || len(kinds) == 0 {
		return u
	}
	for _, k := range kinds {
		if u.Kind() == k {
			return u
		}
	}
	r.Failf("URI %s of another kind", u)
	return ""
}

// readOptionalURI is readURI where an empty URI is allowed.
func readOptionalURI(r *codec.Reader, kinds ...byte) URI {
	if b := r.Rest(); len(b) > 0 && b[0] == 0 {
		r.Uint8()
		return ""
	}
	return readURI(r, kinds...)
}

// readText reads a vector of valid UTF-8 without nulls.
func readText(r *codec.Reader, max int) string {
	b := r.OpaqueMax(max)
	if r.Err() == nil && (!utf8.Valid(b) || strings.ContainsRune(string(b), 0)) {
		r.Failf("text that isn't UTF-8 or has a null")
		return ""
	}
	return string(b)
}

// readMessages reads MLSMessage<V> of handshake messages of one content type.
func readMessages(r *codec.Reader, content mls.ContentType) []*mls.MLSMessage {
	n := 0
	return codec.ReadVector(r, func(r *codec.Reader) *mls.MLSMessage {
		if n++; n > MaxMoreMessages {
			r.Failf("more than %d messages in a list", MaxMoreMessages)
			return nil
		}
		m := new(mls.MLSMessage)
		m.UnmarshalMLS(r)
		if r.Err() == nil && (m.Public == nil || m.Public.Content.ContentType != content) {
			r.Failf("a message in a list that isn't a PublicMessage of content type %d", content)
		}
		return m
	})
}

func writeMessages(w *codec.Writer, list []*mls.MLSMessage) {
	codec.WriteVector(w, list, func(w *codec.Writer, m *mls.MLSMessage) { m.MarshalMLS(w) })
}

func readCipherSuites(r *codec.Reader) []mls.CipherSuite {
	return codec.ReadVector(r, func(r *codec.Reader) mls.CipherSuite { return mls.CipherSuite(r.Uint16()) })
}

func writeCipherSuites(w *codec.Writer, list []mls.CipherSuite) {
	codec.WriteVector(w, list, func(w *codec.Writer, s mls.CipherSuite) { w.Uint16(uint16(s)) })
}
