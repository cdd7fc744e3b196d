package content

import (
	"regexp"
	"slices"
	"strings"

	"github.com/parley-mls/parley/federation/mimi"
)

// Disposition is what a part is for. Values that aren't known are to be treated as Render.
type Disposition uint8

// The registered dispositions (draft-ietf-mimi-content, "MIMI Content Disposition registry").
const (
	Unspecified Disposition = iota
	Render
	Reaction
	Profile
	Inline
	Icon
	Attachment
	Session
	Preview
)

// Cardinality tells the kinds of parts apart.
type Cardinality uint8

// The kinds of parts.
const (
	NullPart Cardinality = iota
	SinglePart
	ExternalPart
	MultiPart
)

// Semantics is how a receiver treats the parts of a MultiPart.
type Semantics uint8

// The semantics of a MultiPart.
const (
	ChooseOne  Semantics = iota // one of the parts
	SingleUnit                  // all of them or, if one isn't understood, none
	ProcessAll                  // as many as possible
)

// Part is a body or a part of one.
//
//	NestedPart = [
//	  disposition: baseDispos / $extDispos / unknownDispos,
//	  language: tstr,
//	  ( NullPart // SinglePart // ExternalPart // MultiPart)
//	]
//
//	NullPart = ( cardinality: nullpart )
//
//	SinglePart = (
//	    cardinality: single,
//	    contentType: tstr,
//	    content: bstr
//	)
//
//	MultiPart = (
//	    cardinality: multi,
//	    partSemantics: chooseOne / singleUnit / processAll,
//	    parts: [2* NestedPart]
//	)
type Part struct {
	Disposition Disposition
	Language    string // language tags (RFC 5646) with commas between them; "" if it isn't said
	Cardinality Cardinality
	ContentType string    // of a SinglePart or ExternalPart: media type with parameters
	Content     []byte    // of a SinglePart
	External    *External // of an ExternalPart
	Semantics   Semantics // of a MultiPart
	Parts       []Part    // of a MultiPart, two or more
}

// External is content that is to be fetched and decrypted.
//
//	ExternalPart = (
//	    cardinality: external,
//	    contentType: tstr,
//	    url: tstr,
//	    expires: uint .size 4,
//	    size: uint .size 8,
//	    encAlg: uint .size 2,
//	    key: bstr,
//	    nonce: bstr,
//	    aad: bstr,
//	    hashAlg: uint .size 1,
//	    contentHash: bstr,
//	    description: tstr,
//	    filename: tstr
//	)
type External struct {
	URL             string
	Expires         uint32 // s since 1970-01-01T00:00:00Z, 0 if it doesn't
	Size            uint64 // bytes, 0 if it isn't said
	EncAlg          uint16 // AEAD (RFC 5116), 0 if it isn't encrypted
	Key, Nonce, AAD []byte
	HashAlg         uint8 // of named information (RFC 6920), 0 if there is no hash
	ContentHash     []byte
	Description     string
	Filename        string
}

// The media types of text that every client reads.
const (
	PlainText = "text/plain;charset=utf-8"
	Markdown  = "text/markdown;variant=GFM-MIMI"
	Bytes     = "application/octet-stream"
)

// Text is a body of text without markup.
func Text(s string) Part { return Single(Render, PlainText, []byte(s)) }

// React is a body that is a reaction, such as an emoji.
func React(s string) Part { return Single(Reaction, PlainText, []byte(s)) }

// Single is a body of that media type.
func Single(d Disposition, contentType string, b []byte) Part {
	return Part{Disposition: d, Cardinality: SinglePart, ContentType: contentType, Content: b}
}

// Walk calls f with every part and its part index, until f returns false (draft-ietf-mimi-content, "Message Bodies").
func (p *Part) Walk(f func(index int, p *Part) bool) {
	index := 0
	p.walk(&index, f)
}

func (p *Part) walk(index *int, f func(int, *Part) bool) bool {
	if !f(*index, p) {
		return false
	}
	for i := range p.Parts {
		*index++
		if !p.Parts[i].walk(index, f) {
			return false
		}
	}
	return true
}

// Text returns what can be shown of a part as text, markup as it is written, and whether that is all of it. Of
// alternatives it takes the first that is text. Control characters in it are the reader's to deal with.
func (p *Part) Text() (text string, all bool) {
	switch p.Cardinality {
	case NullPart:
		return "", true
	case SinglePart:
		if mediaType(p.ContentType) == "text/plain" || mediaType(p.ContentType) == "text/markdown" {
			return string(p.Content), true
		}
		return "", false
	case ExternalPart:
		return p.External.Description, false
	}
	var texts []string
	all = true
	for i := range p.Parts {
		t, whole := p.Parts[i].Text()
		if p.Semantics == ChooseOne && whole {
			return t, true
		}
		if t != "" {
			texts = append(texts, t)
		}
		all = all && whole
	}
	if p.Semantics == SingleUnit && !all {
		return "", false
	}
	return strings.Join(texts, "\n"), all
}

// mediaType is the type of a media type without its parameters.
func mediaType(s string) string {
	t, _, _ := strings.Cut(s, ";")
	return strings.ToLower(strings.TrimSpace(t))
}

var userURI = regexp.MustCompile(`mimi://[a-z0-9.-]+/u/[a-z0-9._-]+`)

// Mentions returns the users that Markdown and HTML in the part link to, each once, in order. Who of them takes part is
// the reader's to check.
func (p *Part) Mentions() []mimi.URI {
	var found []mimi.URI
	p.Walk(func(_ int, p *Part) bool {
		if t := mediaType(p.ContentType); p.Cardinality == SinglePart && (t == "text/markdown" || t == "text/html") {
			for _, s := range userURI.FindAll(p.Content, MaxParts) {
				if u, err := mimi.ParseURI(string(s)); err == nil && !slices.Contains(found, u) {
					found = append(found, u)
				}
			}
		}
		return len(found) < MaxParts
	})
	return found
}
