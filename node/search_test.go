package node

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

func (c *testClient) query(domain string, elements ...mimi.QueryElement) (*mimi.IdentifierResponse, error) {
	resp, err := c.api.Query(c.t.Context(), connect.NewRequest(&api.QueryRequest{
		Domain: domain, Body: codec.Marshal(&mimi.IdentifierRequest{Elements: elements}),
	}))
	if err != nil {
		return nil, err
	}
	out := new(mimi.IdentifierResponse)
	return out, codec.Unmarshal(resp.Msg.Body, out)
}

func (c *testClient) setProfile(p *api.Profile) {
	c.t.Helper()
	must(c.api.SetProfile(c.t.Context(), connect.NewRequest(p)))(c.t)
}

func claim(name, value string, search uint32) *api.ProfileField {
	return &api.ProfileField{Source: uint32(mimi.FieldOIDCStdClaim), Name: name, Value: value, Search: search, Shown: search == searchPart}
}

func property(name, value string, search uint32) *api.ProfileField {
	f := claim(name, value, search)
	f.Source = uint32(mimi.FieldVCard)
	return f
}

func element(t mimi.SearchIdentifierType, value string) mimi.QueryElement {
	return mimi.QueryElement{Type: t, Value: []byte(value)}
}

// TestUsersAreFoundAsTheyWish has the three users of the draft: one who wants to be found, one who is found by exact values, one
// who isn't found.
func TestUsersAreFoundAsTheyWish(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	bob := newClient(t, beta, "bob", "bob-phone")
	xavier, yolanda, zach := newClient(t, alpha, "xavier", "x-phone"), newClient(t, alpha, "yolanda", "y-phone"), newClient(t, alpha, "zach", "z-phone")
	plain := newClient(t, alpha, "plain", "p-phone")
	xavier.setProfile(&api.Profile{Fields: []*api.ProfileField{
		claim("given_name", "Xavier Matthias", searchPart), claim("family_name", "Sales", searchPart), property("org", "Parley Inc", searchPart),
		claim("nickname", "xave", searchExact), claim("birthdate", "1990-01-02", searchNot), claim("email", "x@sales.example", searchExact),
	}})
	yolanda.setProfile(&api.Profile{Fields: []*api.ProfileField{
		claim("given_name", "Yolanda Matali", searchExact), property("EMAIL", "y@alpha.example", searchExact), property("TEL", "+12125551212", searchExact),
		claim("address", "Main Street 1", searchNot),
	}})
	zach.setProfile(&api.Profile{Hidden: true, Fields: []*api.ProfileField{claim("given_name", "Zach Mathew", searchNot)}})
	oidc := func(name, value string) mimi.QueryElement {
		return mimi.QueryElement{Type: mimi.SearchOIDCStdClaim, Name: name, Value: []byte(value)}
	}
	vcard := func(name, value string) mimi.QueryElement {
		return mimi.QueryElement{Type: mimi.SearchVCardField, Name: name, Value: []byte(value)}
	}
	const success, notFound, ambiguous, unsupported = mimi.IdentifierSuccess, mimi.IdentifierNotFound, mimi.IdentifierAmbiguous, mimi.IdentifierUnsupportedField
	for _, c := range []struct {
		name  string
		query []mimi.QueryElement
		code  mimi.IdentifierQueryCode
		found []*testClient
	}{
		{"a handle", []mimi.QueryElement{element(mimi.SearchHandle, "im:yolanda@alpha.example")}, success, []*testClient{yolanda}},
		{"a handle without a profile", []mimi.QueryElement{element(mimi.SearchHandle, "plain@alpha.example")}, success, []*testClient{plain}},
		{"the beginning of a handle", []mimi.QueryElement{element(mimi.SearchHandle, "im:yolan")}, notFound, nil},
		{"another provider's handle", []mimi.QueryElement{element(mimi.SearchHandle, "bob@beta.example")}, notFound, nil},
		{"a hidden handle", []mimi.QueryElement{element(mimi.SearchHandle, "zach@alpha.example")}, notFound, nil},
		{"a hidden nick", []mimi.QueryElement{element(mimi.SearchNick, "zach")}, notFound, nil},
		{"a hidden URI", []mimi.QueryElement{element(mimi.SearchHandle, string(zach.user))}, notFound, nil},
		{"a handle's user part as nick", []mimi.QueryElement{element(mimi.SearchNick, "yolanda")}, success, []*testClient{yolanda}},
		{"a nick", []mimi.QueryElement{element(mimi.SearchNick, "xave")}, success, []*testClient{xavier}},
		{"the beginning of a nick", []mimi.QueryElement{element(mimi.SearchNick, "xav")}, notFound, nil},
		{"an email address", []mimi.QueryElement{element(mimi.SearchEmail, "y@alpha.example")}, success, []*testClient{yolanda}},
		{"of the other vocabulary", []mimi.QueryElement{element(mimi.SearchEmail, "x@sales.example")}, success, []*testClient{xavier}},
		{"the beginning of an address", []mimi.QueryElement{element(mimi.SearchEmail, "y@alpha")}, notFound, nil},
		{"a telephone number", []mimi.QueryElement{element(mimi.SearchPhone, "+12125551212")}, success, []*testClient{yolanda}},
		{"part of a name", []mimi.QueryElement{element(mimi.SearchPartialName, "MATTH")}, success, []*testClient{xavier}},
		{"part of an exact name", []mimi.QueryElement{element(mimi.SearchPartialName, "matali")}, notFound, nil},
		{"part of a field that is no name", []mimi.QueryElement{element(mimi.SearchPartialName, "parley")}, notFound, nil},
		{"too short a part", []mimi.QueryElement{element(mimi.SearchPartialName, "ma")}, ambiguous, nil},
		{"nothing at all", []mimi.QueryElement{element(mimi.SearchWholeProfile, "")}, ambiguous, nil},
		{"anywhere", []mimi.QueryElement{element(mimi.SearchWholeProfile, "parley")}, success, []*testClient{xavier}},
		{"an exact value anywhere", []mimi.QueryElement{element(mimi.SearchWholeProfile, "y@alpha.example")}, success, []*testClient{yolanda}},
		{"part of an exact value anywhere", []mimi.QueryElement{element(mimi.SearchWholeProfile, "@alpha.ex")}, notFound, nil},
		{"what isn't searchable", []mimi.QueryElement{element(mimi.SearchWholeProfile, "1990-01-02")}, notFound, nil},
		{"its claim", []mimi.QueryElement{oidc("birthdate", "1990-01-02")}, notFound, nil},
		{"a claim", []mimi.QueryElement{oidc("given_name", "Yolanda Matali")}, success, []*testClient{yolanda}},
		{"part of a claim", []mimi.QueryElement{oidc("given_name", "Yolanda")}, notFound, nil},
		{"a property", []mimi.QueryElement{vcard("Org", "Parley Inc")}, success, []*testClient{xavier}},
		{"an unknown claim", []mimi.QueryElement{oidc("shoe_size", "44")}, unsupported, nil},
		{"an unknown property", []mimi.QueryElement{vcard("X-SHOE", "44")}, unsupported, nil},
		{"two that one has", []mimi.QueryElement{oidc("family_name", "Sales"), vcard("ORG", "Parley Inc")}, success, []*testClient{xavier}},
		{"a part and an exact one", []mimi.QueryElement{element(mimi.SearchPartialName, "xavier"), vcard("ORG", "Parley Inc")}, success, []*testClient{xavier}},
		{"two that nobody has both of", []mimi.QueryElement{element(mimi.SearchHandle, "yolanda@alpha.example"), vcard("ORG", "Parley Inc")}, notFound, nil},
		{"one that is known and one that isn't", []mimi.QueryElement{element(mimi.SearchHandle, "yolanda@alpha.example"), oidc("shoe_size", "44")}, unsupported, nil},
	} {
		resp, err := bob.query("alpha.example", c.query...)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var want []mimi.URI
		for _, u := range c.found {
			want = append(want, u.user)
		}
		if resp.Code != c.code || !slices.Equal(resp.URIs, want) {
			t.Errorf("%s: %v with %v, want %v with %v", c.name, resp.Code, resp.URIs, c.code, want)
		}
		for _, p := range resp.Profiles {
			for _, f := range p.Fields {
				if p.User != xavier.user || !slices.Contains([]string{"given_name", "family_name", "ORG"}, f.Name) {
					t.Errorf("%s: %s shows %s", c.name, p.User, f.Name)
				}
			}
		}
	}
	if _, err := bob.query("alpha.example"); code(err) != "malformed" {
		t.Errorf("an empty query: %v", err)
	}
	// What is taken out of a profile finds nobody any more.
	yolanda.setProfile(&api.Profile{})
	if resp, err := bob.query("alpha.example", element(mimi.SearchEmail, "y@alpha.example")); err != nil || resp.Code != notFound {
		t.Errorf("by what was taken out: %+v, %v", resp, err)
	}
	if got := storedUnder(t, alpha, prefixTerm); got != 5 {
		t.Errorf("the index has %d entries, want xavier's 5", got)
	}
	// Who is gone isn't found.
	must(alpha.service.Revoke(t.Context(), string(xavier.user), "left"))(t)
	if resp, err := bob.query("alpha.example", element(mimi.SearchNick, "xave")); err != nil || resp.Code != notFound {
		t.Errorf("who is gone: %+v, %v", resp, err)
	}
}

func TestNobodyListsTheUsers(t *testing.T) {
	n := newNode(t, "alpha")
	const queries = 4
	configure := func(search string) {
		n.stop()
		n.cfg.Limits.Queries, n.cfg.Search = queries, search
		n.start()
	}
	configure(SearchOpen)
	alice := newClient(t, n, "alice", "alice-laptop")
	for i := range maxFound + 1 {
		c := newClient(t, n, fmt.Sprintf("user%d", i), fmt.Sprintf("user%d-phone", i))
		c.setProfile(&api.Profile{Fields: []*api.ProfileField{claim("name", fmt.Sprintf("Smith the %d.", i), searchPart), property("ORG", "Parley", searchExact)}})
	}
	for _, e := range []mimi.QueryElement{
		element(mimi.SearchPartialName, "smith"), {Type: mimi.SearchVCardField, Name: "ORG", Value: []byte("Parley")},
	} {
		if resp, err := alice.query("alpha.example", e); err != nil || resp.Code != mimi.IdentifierAmbiguous || len(resp.URIs)+len(resp.Profiles) > 0 {
			t.Errorf("too many: %+v, %v", resp, err)
		}
	}
	if resp, err := alice.query("alpha.example", element(mimi.SearchPartialName, "the 1")); err != nil || resp.Code != mimi.IdentifierSuccess || len(resp.URIs) != 11 {
		t.Errorf("some: %+v, %v", resp, err)
	}
	// Nor by asking for one after the other.
	req := &mimi.IdentifierRequest{Elements: []mimi.QueryElement{element(mimi.SearchHandle, "guess@alpha.example")}}
	asked := func(from string) (times int) {
		for range 2 * queries * queriesOfPeer {
			if _, err := (provider{n.Node}).IdentifierQuery(t.Context(), from, req); err == nil {
				times++
			}
		}
		return times
	}
	if got, want := asked("evil.example"), queries*queriesOfPeer; got < want || got > want+10 {
		t.Errorf("a peer asks %d times, want %d", got, want)
	}
	if got := asked("good.example"); got < queries*queriesOfPeer {
		t.Errorf("another peer asks %d times", got)
	}
	bob := newClient(t, n, "bob", "bob-phone")
	for range queries {
		if _, err := bob.query("alpha.example", req.Elements...); err != nil {
			t.Error(err)
		}
	}
	if _, err := bob.query("alpha.example", req.Elements...); code(err) != "busy" {
		t.Errorf("an own user: %v", err)
	}
	// A provider may keep its users from peers.
	configure(SearchOwn)
	if resp, err := (provider{n.Node}).IdentifierQuery(t.Context(), "third.example", req); err != nil || resp.Code != mimi.IdentifierForbidden {
		t.Errorf("a peer: %+v, %v", resp, err)
	}
}

func TestProfilesAreBounded(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	good := &api.Profile{Fields: []*api.ProfileField{property("org", "Parley", searchPart)}}
	alice.setProfile(good)
	var many []*api.ProfileField
	for range maxProfileFields + 1 {
		many = append(many, claim("name", "Alice", searchExact))
	}
	for _, c := range []struct {
		name   string
		fields []*api.ProfileField
		code   string
	}{
		{"too many fields", many, "tooLarge"},
		{"an unknown claim", []*api.ProfileField{claim("shoe_size", "44", searchExact)}, "malformed"},
		{"a claim in another case", []*api.ProfileField{claim("Name", "Alice", searchExact)}, "malformed"},
		{"an unknown vocabulary", []*api.ProfileField{{Source: 9, Name: "name", Value: "x"}}, "malformed"},
		{"a vocabulary past a byte", []*api.ProfileField{{Source: 263, Name: "name", Value: "x"}}, "malformed"},
		{"no value", []*api.ProfileField{claim("name", "", searchExact)}, "malformed"},
		{"a long value", []*api.ProfileField{claim("name", strings.Repeat("x", maxProfileValue+1), searchExact)}, "malformed"},
		{"a control character", []*api.ProfileField{claim("name", "a\x1b[2J", searchExact)}, "malformed"},
		{"searchable in an unknown way", []*api.ProfileField{claim("name", "Alice", 3)}, "malformed"},
	} {
		if _, err := alice.api.SetProfile(t.Context(), connect.NewRequest(&api.Profile{Fields: c.fields})); code(err) != c.code {
			t.Errorf("%s: %v, want %s", c.name, err, c.code)
		}
	}
	got := must(alice.api.GetProfile(t.Context(), connect.NewRequest(&api.GetProfileRequest{})))(t).Msg
	if len(got.Fields) != 1 || got.Fields[0].Name != "ORG" || got.Fields[0].Value != "Parley" {
		t.Errorf("the profile is %v", got)
	}
}
