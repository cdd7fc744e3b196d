package node

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// Identifier queries (draft-ietf-mimi-protocol-06, Section 5.8) find users by what they have made searchable. Each user
// has a profile of fields, each of which can be found by its exact value, by a part of it, or not at all, and is shown to
// who finds the user, or not. Without a profile a user is found by the exact handle, and by its user part as nick.
//
// Where the draft leaves something open: fields are matched in the vocabulary in which they are stored, except that email,
// phone and nick look at both. A part is compared without regard to case and has minPart characters at least, in
// partialName and wholeProfile alike; shorter ones, and queries that more than maxFound users match, are answered with
// ambiguous and without results, so that nobody lists the users. wholeProfile finds a field that is searchable by its exact value
// by that only. What a user writes into a profile is not verified.
const (
	minPart  = 3
	maxFound = 20

	maxProfileFields = 32
	maxProfileValue  = 1024 // bytes
)

// The ways in which a profile's field is searchable.
const (
	searchNot   = 0
	searchExact = 1
	searchPart  = 2 // and by the exact value
)

// oidcClaims are the standard claims (OpenID Connect Core 1.0, Section 5.1) that a profile may have: those with text.
var oidcClaims = []string{"name", "given_name", "family_name", "middle_name", "nickname", "preferred_username", "profile", "picture",
	"website", "email", "gender", "birthdate", "zoneinfo", "locale", "phone_number", "address"}

// vcardProperties are the properties (RFC 6350, Section 6) that a profile may have: those about a person, with text.
var vcardProperties = []string{"FN", "N", "NICKNAME", "PHOTO", "BDAY", "ANNIVERSARY", "GENDER", "ADR", "TEL", "EMAIL", "IMPP", "LANG",
	"TZ", "GEO", "TITLE", "ROLE", "ORG", "CATEGORIES", "NOTE", "URL"}

// The fields that the search types without a name of their own look at.
var (
	emailFields = []fieldName{{mimi.FieldOIDCStdClaim, "email"}, {mimi.FieldVCard, "EMAIL"}}
	phoneFields = []fieldName{{mimi.FieldOIDCStdClaim, "phone_number"}, {mimi.FieldVCard, "TEL"}}
	nickFields  = []fieldName{{mimi.FieldOIDCStdClaim, "nickname"}, {mimi.FieldVCard, "NICKNAME"}}
	nameFields  = slices.Concat(nickFields, []fieldName{
		{mimi.FieldOIDCStdClaim, "name"}, {mimi.FieldOIDCStdClaim, "given_name"}, {mimi.FieldOIDCStdClaim, "family_name"},
		{mimi.FieldOIDCStdClaim, "middle_name"}, {mimi.FieldVCard, "FN"}, {mimi.FieldVCard, "N"},
	})
)

// fieldName is the name of a field in its vocabulary.
type fieldName struct {
	source mimi.FieldSource
	name   string
}

// known returns the name as it is stored, false if the vocabulary doesn't have it.
func (f fieldName) known() (fieldName, bool) {
	if f.source == mimi.FieldVCard {
		f.name = strings.ToUpper(f.name) // RFC 6350, Section 3.3
		return f, slices.Contains(vcardProperties, f.name)
	}
	return f, f.source == mimi.FieldOIDCStdClaim && slices.Contains(oidcClaims, f.name)
}

// setProfile replaces a user's profile; it is durable on return.
func (n *Node) setProfile(user mimi.URI, p *profileRecord) error {
	if err := n.disk.grow(); err != nil {
		return err
	}
	if len(p.fields) > maxProfileFields {
		return refuse("tooLarge", "a profile of %d fields, at most %d", len(p.fields), maxProfileFields)
	}
	for i := range p.fields {
		f := &p.fields[i]
		name, ok := fieldName{f.source, f.name}.known()
		switch {
		case !ok:
			return refuse("malformed", "field %d: no profile has %q", i, f.name)
		case f.value == "" || len(f.value) > maxProfileValue:
			return refuse("malformed", "field %d: a value of %d bytes, not 1 to %d", i, len(f.value), maxProfileValue)
		case !utf8.ValidString(f.value) || strings.ContainsFunc(f.value, unicode.IsControl):
			return refuse("malformed", "field %d: the value isn't text on one line", i)
		case f.search > searchPart:
			return refuse("malformed", "field %d: searchable in the way %d", i, f.search)
		}
		f.name = name.name
	}
	n.profileMu.Lock()
	before, err := n.profile(user)
	if err != nil {
		n.profileMu.Unlock()
		return err
	}
	var b store.Batch
	for _, t := range before.terms() {
		b.Delete(termKey(t, user))
	}
	for _, t := range p.terms() {
		b.Set(termKey(t, user), []byte{})
	}
	b.Set(key(prefixProfile, user), codec.Marshal(p))
	wait, err := n.store.Apply(&b)
	n.profileMu.Unlock()
	if err != nil {
		return err
	}
	return wait()
}

// profile returns a user's profile, an empty one if there is none.
func (n *Node) profile(user mimi.URI) (*profileRecord, error) {
	p := new(profileRecord)
	b, err := n.store.Get(key(prefixProfile, user))
	if err != nil || b == nil {
		return p, err
	}
	return p, decodeRecord(b, p, "profile")
}

// term is a field with a value by which it is searchable.
type term struct {
	fieldName
	value string
}

// terms are what the index has of a profile.
func (v *profileRecord) terms() (list []term) {
	for _, f := range v.fields {
		if f.search != searchNot {
			list = append(list, term{fieldName{f.source, f.name}, f.value})
		}
	}
	return list
}

// termKey is the index's key of a term and a user, or the beginning of the term's keys if user is empty.
func termKey(t term, user mimi.URI) []byte {
	h := sha256.Sum256(fmt.Appendf([]byte{byte(t.source)}, "%s\x00%s", t.name, t.value))
	return append(refKey(prefixTerm, h[:]), user...)
}

// condition is a QueryElement, made ready. A user is found if it holds of the user's handle, or of one of the fields.
type condition struct {
	user   mimi.URI    // handle and nick: whose handle it is
	fields []fieldName // that are looked at
	all    bool        // all fields are
	value  string
	part   string // in lower case, if a part of a value will do
}

// matches says whether the condition holds of a user with that profile.
func (q *condition) matches(user mimi.URI, p *profileRecord) bool {
	if q.user == user && !p.hidden {
		return true
	}
	return slices.ContainsFunc(p.fields, func(f profileField) bool {
		switch {
		case f.search == searchNot, !q.all && !slices.Contains(q.fields, fieldName{f.source, f.name}):
			return false
		case q.part == "", q.all && f.search == searchExact:
			return f.value == q.value
		}
		return f.search == searchPart && strings.Contains(strings.ToLower(f.value), q.part)
	})
}

// conditions reads a query. The code is IdentifierSuccess, or why it isn't answered.
func (n *Node) conditions(elements []mimi.QueryElement) ([]condition, mimi.IdentifierQueryCode) {
	var list []condition
	for _, e := range elements {
		q := condition{value: string(e.Value)}
		switch e.Type {
		case mimi.SearchHandle:
			q.user, _ = n.parseHandle(q.value)
		case mimi.SearchNick:
			q.user, _ = mimi.UserURI(n.cfg.Domain, q.value)
			q.fields = nickFields
		case mimi.SearchEmail:
			q.fields = emailFields
		case mimi.SearchPhone:
			q.fields = phoneFields
		case mimi.SearchPartialName:
			q.fields, q.part = nameFields, strings.ToLower(q.value)
		case mimi.SearchWholeProfile:
			q.all, q.part = true, strings.ToLower(q.value)
		case mimi.SearchOIDCStdClaim, mimi.SearchVCardField:
			f, ok := fieldName{mimi.FieldSource(e.Type), e.Name}.known()
			if !ok {
				return nil, mimi.IdentifierUnsupportedField
			}
			q.fields = []fieldName{f}
		default:
			return nil, mimi.IdentifierUnsupportedField
		}
		parts := e.Type == mimi.SearchPartialName || e.Type == mimi.SearchWholeProfile
		if parts && utf8.RuneCountInString(q.value) < minPart {
			return nil, mimi.IdentifierAmbiguous
		}
		list = append(list, q)
	}
	return list, mimi.IdentifierSuccess
}

// identifierQuery finds the users of this provider that match all elements of a query of from's, or of an own user if
// that is the own domain.
func (n *Node) identifierQuery(ctx context.Context, from string, req *mimi.IdentifierRequest) (*mimi.IdentifierResponse, error) {
	if len(req.Elements) == 0 {
		return nil, refuse("malformed", "a query asks for something")
	}
	if from != n.cfg.Domain {
		if n.cfg.Search == SearchOwn {
			return &mimi.IdentifierResponse{Code: mimi.IdentifierForbidden}, nil
		}
		if wait := n.queryPace.Take(from, 1, slowly(queriesOfPeer*n.cfg.Limits.Queries)); wait > 0 {
			return nil, busy(wait, "%s asks too many queries", from)
		}
	}
	list, code := n.conditions(req.Elements)
	if code != mimi.IdentifierSuccess {
		return &mimi.IdentifierResponse{Code: code}, nil
	}
	resp := new(mimi.IdentifierResponse)
	err := n.candidates(ctx, list, func(user mimi.URI) (bool, error) {
		p, err := n.profile(user)
		if err != nil || slices.ContainsFunc(list, func(q condition) bool { return !q.matches(user, p) }) {
			return true, err
		}
		if known, err := n.knows(user); err != nil || !known {
			return true, err
		}
		resp.URIs = append(resp.URIs, user)
		found := mimi.UserProfile{User: user}
		for _, f := range p.fields {
			if f.shown {
				found.Fields = append(found.Fields, mimi.ProfileField{Source: f.source, Name: f.name, Value: []byte(f.value)})
			}
		}
		if len(found.Fields) > 0 {
			resp.Profiles = append(resp.Profiles, found)
		}
		return len(resp.URIs) <= maxFound, nil
	})
	switch {
	case err != nil:
		return nil, err
	case len(resp.URIs) == 0:
		resp.Code = mimi.IdentifierNotFound
	case len(resp.URIs) > maxFound:
		return &mimi.IdentifierResponse{Code: mimi.IdentifierAmbiguous}, nil
	}
	return resp, nil
}

// queriesOfPeer is how many times as much as one user a peer may ask.
const queriesOfPeer = 100

// candidates calls fn with users among whom are all that a query can find, until it returns false: those of a condition
// on an exact value, by the index, or, one query at a time, all who have a profile.
func (n *Node) candidates(ctx context.Context, list []condition, fn func(mimi.URI) (bool, error)) error {
	for _, q := range list {
		if q.part != "" {
			continue
		}
		users := []mimi.URI{}
		if q.user != "" {
			users = append(users, q.user)
		}
		for _, f := range q.fields {
			err := store.ScanPrefix(n.store, termKey(term{f, q.value}, ""), func(k, _ []byte) bool {
				if u := mimi.URI(k); !slices.Contains(users, u) {
					users = append(users, u)
				}
				return len(users) < maxIndexed
			})
			if err != nil {
				return err
			}
		}
		for _, u := range users {
			if more, err := fn(u); err != nil || !more {
				return err
			}
		}
		return nil
	}
	select {
	case n.searching <- struct{}{}:
		defer func() { <-n.searching }()
	case <-ctx.Done():
		return ctx.Err()
	}
	var users []mimi.URI
	var bad error
	err := store.ScanPrefix(n.store, []byte(prefixProfile), func(k, v []byte) bool {
		var p profileRecord
		if bad = decodeRecord(v, &p, "profile"); bad != nil {
			return false
		}
		user := mimi.URI(strings.TrimSuffix(string(k), "\x00"))
		if !slices.ContainsFunc(list, func(q condition) bool { return !q.matches(user, &p) }) {
			users = append(users, user)
		}
		return len(users) < maxIndexed && ctx.Err() == nil
	})
	if err := errors.Join(err, bad, ctx.Err()); err != nil {
		return err
	}
	for _, u := range users {
		if more, err := fn(u); err != nil || !more {
			return err
		}
	}
	return nil
}

// maxIndexed is how many users with the same value are looked at.
const maxIndexed = 1000

// knows says whether a user of this node has a client whose certificate is good.
func (n *Node) knows(user mimi.URI) (bool, error) {
	var clients []mimi.URI
	if err := store.ScanPrefix(n.store, key(prefixDevice, user), func(k, _ []byte) bool {
		clients = append(clients, mimi.URI(k))
		return len(clients) < 10
	}); err != nil {
		return false, err
	}
	// The clients that have published KeyPackages are found without a search.
	for _, f := range append(filters(clients), authority.Filter{User: user}) {
		f.ValidAt = time.Now()
		list, err := n.service.List(n.ctx, f)
		if err != nil || slices.ContainsFunc(list, func(c authority.Certificate) bool { return c.User == user }) {
			return err == nil, err
		}
	}
	return false, nil
}

func filters(clients []mimi.URI) (list []authority.Filter) {
	for _, c := range clients {
		list = append(list, authority.Filter{Client: c})
	}
	return list
}

// parseHandle reads user@domain, with or without the scheme im, or a user's URI.
func (n *Node) parseHandle(s string) (mimi.URI, error) {
	if strings.HasPrefix(s, "mimi://") {
		u, err := mimi.ParseURI(s)
		if err == nil && (u.Kind() != mimi.KindUser || u.Domain() != n.cfg.Domain) {
			err = mimi.ErrURI
		}
		if err != nil {
			return "", err
		}
		return u, nil
	}
	user, domain, ok := strings.Cut(strings.TrimPrefix(s, "im:"), "@")
	if !ok || domain != n.cfg.Domain {
		return "", mimi.ErrURI
	}
	return mimi.UserURI(domain, user)
}
