package mimi

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// The kinds of MIMI URI (draft-ietf-mimi-protocol-06, Section 3, Table 1). A provider's URI has kind 0.
const (
	KindProvider byte = 0
	KindUser     byte = 'u'
	KindClient   byte = 'd'
	KindRoom     byte = 'r'
	KindGroup    byte = 'g'
)

// Limits of names, in bytes.
const (
	MaxDomain = 253                                    // RFC 1035, Section 2.3.4, without the final dot
	MaxID     = 64                                     // of a user, client or room
	maxGroup  = MaxID + 10                             // a room's id and "." and up to nine digits
	MaxURI    = len(scheme) + MaxDomain + 3 + maxGroup // longest URI that ParseURI accepts
)

const scheme = "mimi://"

// ErrURI is what ParseURI and the constructors wrap.
var ErrURI = errors.New("not a MIMI URI")

// URI is a valid MIMI URI in its only form, so that URIs are equal exactly if their strings are. The zero value
// names nothing. Make URIs with ParseURI and the constructors, not by conversion.
type URI string

// ProviderURI returns mimi://domain.
func ProviderURI(domain string) (URI, error) { return ParseURI(scheme + domain) }

// UserURI returns mimi://domain/u/user.
func UserURI(domain, user string) (URI, error) { return ParseURI(scheme + domain + "/u/" + user) }

// ClientURI returns mimi://domain/d/client.
func ClientURI(domain, client string) (URI, error) { return ParseURI(scheme + domain + "/d/" + client) }

// RoomURI returns mimi://domain/r/room.
func RoomURI(domain, room string) (URI, error) { return ParseURI(scheme + domain + "/r/" + room) }

// GroupURI returns mimi://domain/g/room, the name of the room's first MLS group.
func GroupURI(domain, room string) (URI, error) {
	u, err := RoomURI(domain, room)
	return u.Group(), err
}

// ParseURI accepts mimi://host and mimi://host/k/id and nothing else: the host as ValidDomain has it, the kind k one
// of u, d, r, g, and an id of 1 to 64 of a-z, 0-9, ".", "_" and "-" that starts with a letter or digit. There are no
// ports, user information, queries, fragments or percent-encodings, so there is one spelling of every name.
//
// The id of a room doesn't end in "." and a number: g/room.n is the n-th restart of a room's group.
func ParseURI(s string) (URI, error) {
	if len(s) > MaxURI {
		return "", fmt.Errorf("%w: %d bytes, at most %d", ErrURI, len(s), MaxURI)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return "", fmt.Errorf("%w: %q: scheme isn't mimi", ErrURI, s)
	}
	host, path, hasPath := strings.Cut(rest, "/")
	if err := ValidDomain(host); err != nil {
		return "", fmt.Errorf("%w: %q: %w", ErrURI, s, err)
	}
	if !hasPath {
		return URI(s), nil
	}
	if len(path) < 2 || path[1] != '/' || !strings.ContainsRune("udrg", rune(path[0])) {
		return "", fmt.Errorf("%w: %q: path isn't /u/, /d/, /r/ or /g/ and a name", ErrURI, s)
	}
	kind, id := path[0], path[2:]
	name, restart := splitRestart(id)
	switch {
	case kind == KindRoom && restart:
		return "", fmt.Errorf("%w: %q: a room's name doesn't end in a dot and a number", ErrURI, s)
	case kind == KindGroup:
		id = name
	}
	if !validID(id) {
		return "", fmt.Errorf("%w: %q: the name isn't 1 to %d of a-z, 0-9, '.', '_', '-' after a letter or digit", ErrURI, s, MaxID)
	}
	return URI(s), nil
}

// Domain is the provider's domain, "" for the zero URI.
func (u URI) Domain() string {
	if u == "" {
		return ""
	}
	host, _, _ := strings.Cut(string(u[len(scheme):]), "/")
	return host
}

// Kind tells what is named; 0 is a provider, and also the zero URI.
func (u URI) Kind() byte {
	if n := len(scheme) + len(u.Domain()); len(u) > n {
		return u[n+1]
	}
	return KindProvider
}

// ID is the name without the provider: of a user, client, room or group; "" for a provider.
func (u URI) ID() string {
	if n := len(scheme) + len(u.Domain()); len(u) > n {
		return string(u[n+3:])
	}
	return ""
}

// Provider is the URI of the provider that u belongs to.
func (u URI) Provider() URI {
	if u == "" {
		return ""
	}
	return URI(scheme + u.Domain())
}

// Group is the first MLS group of the room u, the zero URI if u isn't a room.
func (u URI) Group() URI {
	if u.Kind() != KindRoom {
		return ""
	}
	return URI(scheme + u.Domain() + "/g/" + u.ID())
}

// Restart is the group that replaces the room's first group after n restarts, g/room.n. It is the zero URI if u isn't
// a room or n isn't between 1 and 999,999,999.
func (u URI) Restart(n int) URI {
	if u.Kind() != KindRoom || n < 1 || n > 999_999_999 {
		return ""
	}
	return u.Group() + URI("."+strconv.Itoa(n))
}

// Room is the room of the MLS group u, restarted or not; the zero URI if u isn't a group.
func (u URI) Room() URI {
	if u.Kind() != KindGroup {
		return ""
	}
	name, _ := splitRestart(u.ID())
	return URI(scheme + u.Domain() + "/r/" + name)
}

// String returns the URI.
func (u URI) String() string { return string(u) }

// splitRestart takes ".n" off id, where n is a number of up to nine digits that doesn't start with 0.
func splitRestart(id string) (name string, restarted bool) {
	i := strings.LastIndexByte(id, '.')
	if i < 1 {
		return id, false
	}
	n := id[i+1:]
	if len(n) < 1 || len(n) > 9 || n[0] == '0' {
		return id, false
	}
	for _, c := range []byte(n) {
		if c < '0' || c > '9' {
			return id, false
		}
	}
	return id[:i], true
}

func validID(id string) bool {
	if len(id) < 1 || len(id) > MaxID {
		return false
	}
	for i, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case (c == '.' || c == '_' || c == '-') && i > 0:
		default:
			return false
		}
	}
	return true
}

// ValidDomain says why s can't be a provider's domain: a DNS name in lower-case ASCII of labels of letters, digits and
// inner hyphens (RFC 1123, Section 2.1), at most 253 bytes, without a final dot. The last label isn't a number, so
// that no IPv4 address passes. Two hyphens in the third and fourth place are for A-labels only (RFC 5891, Section
// 4.2.3.1).
func ValidDomain(s string) error {
	if s == "" || len(s) > MaxDomain {
		return fmt.Errorf("domain of %d bytes, 1 to %d allowed", len(s), MaxDomain)
	}
	numeric := false
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return fmt.Errorf("domain %q: label of %d bytes, 1 to 63 allowed", s, len(label))
		}
		numeric = true
		for _, c := range []byte(label) {
			switch {
			case c >= '0' && c <= '9':
			case c >= 'a' && c <= 'z', c == '-':
				numeric = false
			default:
				return fmt.Errorf("domain %q: only a-z, 0-9 and '-' are allowed", s)
			}
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("domain %q: label starts or ends with '-'", s)
		}
		if len(label) >= 4 && label[2:4] == "--" && !strings.HasPrefix(label, "xn--") {
			return fmt.Errorf("domain %q: label with reserved hyphens", s)
		}
	}
	if numeric {
		return fmt.Errorf("domain %q: last label is a number", s)
	}
	return nil
}
