package node

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// abuse sends content in the client's room, and returns it as a receiver would report it.
func (c *testClient) abuse(text string) mimi.AbusiveMessage {
	c.t.Helper()
	data, _, q := c.sealContent(text)
	resp, _, err := c.submit(q)
	if err != nil || resp.Frank == nil {
		c.t.Fatalf("%+v, %v", resp, err)
	}
	return mimi.AbusiveMessage{Content: data, Frank: *resp.Frank, AcceptedTimestamp: resp.AcceptedTimestamp}
}

func (c *testClient) report(room mimi.URI, a mimi.AbuseReport) error {
	_, err := c.api.ReportAbuse(c.t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(room), Body: codec.Marshal(a)}))
	return err
}

func (n *testNode) reported() []Report {
	n.t.Helper()
	return must(DialAdmin(n.cfg.Socket()).Reports(n.t.Context()))(n.t)
}

// A hub takes reports of what it has franked, from members of other providers and from people who have left, and refuses
// all that differ in anything.
func TestForgedReportsAreRefused(t *testing.T) {
	alpha, beta := newNode(t, "alpha"), newNode(t, "beta")
	federate(t, alpha, beta)
	alice, bob := newClient(t, alpha, "alice", "alice-laptop"), newClient(t, beta, "bob", "bob-phone")
	carol := newClient(t, alpha, "carol", "carol-pc")
	alice.createFranked()
	carol.createFranked()
	good, second, elsewhere := alice.abuse("you fool"), alice.abuse("again"), carol.abuse("elsewhere")
	reframe := func(m mimi.AbusiveMessage, change func(c *content.Message)) mimi.AbusiveMessage {
		var f mls.ApplicationFraming
		if err := codec.Unmarshal(m.Content, &f); err != nil {
			t.Fatal(err)
		}
		c := must(content.Parse(f.Content))(t)
		change(c)
		f.Content = must(c.Encode())(t)
		m.Content = codec.Marshal(f)
		return m
	}
	with := func(change func(m *mimi.AbusiveMessage)) mimi.AbusiveMessage {
		m := good
		m.Frank.Signature = bytes.Clone(m.Frank.Signature)
		change(&m)
		return m
	}
	// Another hub's frank: of beta, for the same claims.
	signer, _, err := beta.keys.hub(testSuite)
	if err != nil {
		t.Fatal(err)
	}
	context := mimi.ServerFrankingContext{Sender: alice.user, Room: alice.room, AcceptedTimestamp: good.AcceptedTimestamp}
	salt := must(parseReported(alice.group.Dictionary(), good.Content))(t).Salt
	theirs := must(mimi.NewFrank(nil, testSuite, signer, beta.keys.franking[:], mimi.FrankingTag(salt[:], good.Content), context))(t)
	// What alice has framed as something that nobody shows.
	hidden := content.New(alice.user, alice.room, content.Text("x"))
	data := codec.Marshal(mls.ApplicationFraming{MediaType: mls.MediaType{Type: "text/x"}, Content: must(hidden.Encode())(t)})
	resp, _, err := alice.submit(&mimi.SubmitMessageRequest{Sender: alice.user,
		Message: must(alice.group.Encrypt(nil, mimi.TaggedAAD(mimi.FrankingTag(hidden.Salt[:], data)), data))(t)})
	if err != nil || resp.Frank == nil {
		t.Fatalf("%+v, %v", resp, err)
	}
	forgeries := []struct {
		name   string
		abuser mimi.URI
		m      mimi.AbusiveMessage
	}{
		{"changed text", alice.user, reframe(good, func(c *content.Message) { c.Body = content.Text("you liar") })},
		{"changed salt", alice.user, reframe(good, func(c *content.Message) { c.Salt[0] ^= 1 })},
		{"changed sender", carol.user, reframe(good, func(c *content.Message) { c.Sender = carol.user })},
		{"another abuser", carol.user, good},
		{"changed room", alice.user, reframe(good, func(c *content.Message) { c.Room = carol.room })},
		{"message of another room", carol.user, elsewhere},
		{"message of another room, moved", carol.user, reframe(elsewhere, func(c *content.Message) { c.Room = alice.room })},
		{"another time", alice.user, with(func(m *mimi.AbusiveMessage) { m.AcceptedTimestamp++ })},
		{"another hub's frank", alice.user, with(func(m *mimi.AbusiveMessage) { m.Frank = *theirs })},
		{"another message's frank", alice.user, with(func(m *mimi.AbusiveMessage) { m.Frank = second.Frank })},
		{"changed server frank", alice.user, with(func(m *mimi.AbusiveMessage) { m.Frank.ServerFrank[31] ^= 1 })},
		{"changed signature", alice.user, with(func(m *mimi.AbusiveMessage) { m.Frank.Signature[0] ^= 1 })},
		{"another suite", alice.user, with(func(m *mimi.AbusiveMessage) { m.Frank.CipherSuite = mls.P256_AES128GCM_SHA256_P256 })},
		{"another media type", alice.user, with(func(m *mimi.AbusiveMessage) {
			m.Content = codec.Marshal(mls.ApplicationFraming{MediaType: mls.MediaType{Type: "text/plain"}, Content: []byte("you fool")})
		})},
		{"another media type, franked", alice.user, mimi.AbusiveMessage{Content: data, Frank: *resp.Frank, AcceptedTimestamp: resp.AcceptedTimestamp}},
		{"no framing", alice.user, with(func(m *mimi.AbusiveMessage) { m.Content = []byte("you fool") })},
		{"no content", alice.user, with(func(m *mimi.AbusiveMessage) {
			m.Content = codec.Marshal(mls.ApplicationFraming{Content: []byte("you fool")})
		})},
	}
	for _, f := range forgeries {
		for by, err := range map[string]error{
			"a client of the hub": carol.report(alice.room, mimi.AbuseReport{ReportingUser: carol.user, AllegedAbuser: f.abuser, Messages: []mimi.AbusiveMessage{f.m}}),
			"a follower's":        bob.report(alice.room, mimi.AbuseReport{AllegedAbuser: f.abuser, Messages: []mimi.AbusiveMessage{good, f.m}}),
		} {
			if code(err) != "notAllowed" {
				t.Errorf("%s by %s: %v", f.name, by, err)
			}
		}
	}
	for what, err := range map[string]error{
		"in another's name":               carol.report(alice.room, mimi.AbuseReport{ReportingUser: alice.user, AllegedAbuser: alice.user, Messages: []mimi.AbusiveMessage{good}}),
		"in another's name, followed":     bob.report(alice.room, mimi.AbuseReport{ReportingUser: alice.user, AllegedAbuser: alice.user, Messages: []mimi.AbusiveMessage{good}}),
		"in a colleague's name":           bob.report(alice.room, mimi.AbuseReport{ReportingUser: "mimi://beta.example/u/dave", AllegedAbuser: alice.user, Messages: []mimi.AbusiveMessage{good}}),
		"without messages, by a stranger": carol.report(alice.room, mimi.AbuseReport{AllegedAbuser: alice.user}),
		"without messages, by a provider": beta.federation.ReportAbuse(t.Context(), "alpha.example", alice.room, codec.Marshal(mimi.AbuseReport{AllegedAbuser: alice.user})),
		"by a peer for another's user": beta.federation.ReportAbuse(t.Context(), "alpha.example", alice.room,
			codec.Marshal(mimi.AbuseReport{ReportingUser: carol.user, AllegedAbuser: alice.user, Messages: []mimi.AbusiveMessage{good}})),
	} {
		if c := code(err); c != "notAllowed" && !strings.Contains(err.Error(), "notAllowed") {
			t.Errorf("%s: %v", what, err)
		}
	}
	alice.commit(listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: carol.user, Role: mimi.RoleBanned}}}))
	if err := carol.report(alice.room, mimi.AbuseReport{AllegedAbuser: alice.user, Messages: []mimi.AbusiveMessage{good}}); code(err) != "notAllowed" {
		t.Errorf("by one whose role may not report: %v", err)
	}
	if got := alpha.reported(); len(got) != 0 {
		t.Fatalf("forged reports are kept: %+v", got)
	}

	report := mimi.AbuseReport{ReportingUser: bob.user, AllegedAbuser: alice.user, ReasonCode: 3, Note: "rude", Messages: []mimi.AbusiveMessage{good, second}}
	for range 2 { // the second time changes nothing
		if err := bob.report(alice.room, report); err != nil {
			t.Fatal(err)
		}
	}
	if err := alice.report(alice.room, mimi.AbuseReport{AllegedAbuser: carol.user, Note: "a participant needs no message"}); err != nil {
		t.Fatal(err)
	}
	alpha.stop()
	alpha.start()
	got := alpha.reported()
	if len(got) != 2 || got[0].Reporter != bob.user || got[0].From != "beta.example" || got[0].Abuser != alice.user || got[0].Room != alice.room ||
		got[0].Reason != 3 || got[0].Note != "rude" || len(got[0].Messages) != 2 || got[0].Messages[0].Text != "you fool" ||
		!got[0].Messages[1].Time.Equal(time.UnixMilli(int64(second.AcceptedTimestamp))) || got[1].Reporter != "" {
		t.Fatalf("after a restart: %+v", got)
	}
	admin := DialAdmin(alpha.cfg.Socket())
	if err := admin.RemoveReport(t.Context(), ""); err == nil {
		t.Error("all reports are removed at once")
	}
	if err := admin.RemoveReport(t.Context(), got[0].ID[:12]); err != nil {
		t.Fatal(err)
	}
	if got := alpha.reported(); len(got) != 1 || got[0].Reporter != "" {
		t.Errorf("after a removal: %+v", got)
	}
}

func TestReportsAreBounded(t *testing.T) {
	n := newNode(t, "alpha")
	alice := newClient(t, n, "alice", "alice-laptop")
	alice.createFranked()
	by := submitter{domain: "alpha.example", user: alice.user, client: alice.uri}
	send := func(reporter mimi.URI, note int) error {
		return n.reportAbuse(by, alice.room, codec.Marshal(mimi.AbuseReport{ReportingUser: reporter, AllegedAbuser: alice.user, Note: string(be64(uint64(note))[7:])}))
	}
	for i := range maxUserReports {
		if err := send(alice.user, i+1); err != nil {
			t.Fatal(err)
		}
	}
	if err := send(alice.user, maxUserReports+1); err == nil || reason(err).code != "busy" {
		t.Errorf("one report more: %v", err)
	}
	if err := send(alice.user, 1); err != nil {
		t.Errorf("one that is there: %v", err)
	}
	if err := send("", 1); err != nil {
		t.Errorf("one without a name: %v", err)
	}
	if err := n.removeReport(must(n.listReports())(t)[0].ID); err != nil {
		t.Fatal(err)
	}
	if err := send(alice.user, maxUserReports+1); err != nil {
		t.Errorf("after a removal: %v", err)
	}
	for what, fill := range map[string]*reports{
		"a provider's": {by: map[string]int{"alpha.example": maxProviderReports}},
		"all":          {total: maxReports},
		"bytes":        {bytes: maxReportBytes},
	} {
		fill.counted = true
		rec := &reportRecord{from: "alpha.example"}
		if err := fill.count(n.store, rec, 1); err == nil || reason(err).code != "busy" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := n.reportAbuse(by, alice.room, make([]byte, federation.MaxReportAbuse+1)); reason(err) == nil || reason(err).code != "tooLarge" {
		t.Errorf("a large report: %v", err)
	}
}
