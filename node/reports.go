package node

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"slices"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// Reports of abuse (draft-ietf-mimi-protocol-06, Section 5.9) come to the hub of the room. What is said to have been sent
// there must be what the hub has franked. Reports are kept for the operator until they are removed, or older than
// retention.

// What is kept at most.
const (
	maxReports         = 10_000
	maxReportBytes     = 256 << 20
	maxUserReports     = 100   // of a user who is named
	maxProviderReports = 2_000 // of a provider's users, named or not
)

// reports counts the reports that are kept, so that a new one costs no search. The zero value is ready for use.
type reports struct {
	mu      sync.Mutex
	counted bool           // guarded by mu; false: count them anew
	bytes   int            // guarded by mu
	total   int            // guarded by mu
	by      map[string]int // guarded by mu; by user, and by provider
}

// count adds a report, or fails if that is too much.
func (rs *reports) count(s store.Store, rec *reportRecord, size int) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if !rs.counted {
		rs.bytes, rs.total, rs.by = 0, 0, make(map[string]int)
		var bad error
		err := store.ScanPrefix(s, []byte(prefixReport), func(_, v []byte) bool {
			var old reportRecord
			if bad = decodeRecord(v, &old, "report"); bad == nil {
				rs.add(&old, len(v))
			}
			return bad == nil
		})
		if err := cmp.Or(err, bad); err != nil {
			return err
		}
		rs.counted = true
	}
	user := string(rec.report.ReportingUser)
	switch {
	case user != "" && rs.by[user] >= maxUserReports:
		return refuse("busy", "%d reports of %s wait for the operator", rs.by[user], user)
	case rs.by[rec.from] >= maxProviderReports:
		return refuse("busy", "%d reports of users of %s wait for the operator", rs.by[rec.from], rec.from)
	case rs.total >= maxReports || rs.bytes+size > maxReportBytes:
		return refuse("busy", "%d reports wait for the operator", rs.total)
	}
	rs.add(rec, size)
	return nil
}

func (rs *reports) add(rec *reportRecord, size int) {
	rs.total++
	rs.bytes += size
	rs.by[rec.from]++
	if u := rec.report.ReportingUser; u != "" {
		rs.by[string(u)]++
	}
}

// recount has them counted anew when the next one comes.
func (rs *reports) recount() {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.counted = false
}

// reportAbuse takes a report about a room that this node hosts. It is durable on return; the same report again changes
// nothing. Forged ones are refused.
func (n *Node) reportAbuse(by submitter, uri mimi.URI, body []byte) error {
	r, err := n.hostedRoom(uri)
	if err != nil {
		return err
	}
	if err := n.disk.grow(); err != nil {
		return err
	}
	if len(body) > federation.MaxReportAbuse {
		return refuse("tooLarge", "a report of %d bytes, at most %d", len(body), federation.MaxReportAbuse)
	}
	rec := &reportRecord{time: now(), from: by.domain}
	if err := decode(body, &rec.report); err != nil {
		return err
	}
	if u := rec.report.ReportingUser; u != "" && (u.Domain() != by.domain || by.user != "" && u != by.user) {
		return refuse("notAllowed", "%s doesn't speak for %s", by.name(), u)
	}
	if err := n.paceReport(by, &rec.report); err != nil {
		return err
	}
	if err := n.checkReport(by, r, &rec.report); err != nil {
		return err
	}
	id := sha256.Sum256(append([]byte(by.domain+"\x00"), body...))
	k := key(prefixReport, uri, id[:])
	if have, err := n.store.Get(k); err != nil || have != nil {
		return err
	}
	value := codec.Marshal(rec)
	if err := n.reports.count(n.store, rec, len(value)); err != nil {
		return err
	}
	ok, err := n.store.Commit(map[string][]byte{string(k): value}, map[string][]byte{string(k): nil})
	if err != nil || !ok {
		n.reports.recount() // it is there already, or not at all
		return err
	}
	n.log.Warn("abuse reported", "room", uri, "abuser", rec.report.AllegedAbuser, "from", by.domain, "messages", len(rec.report.Messages))
	return nil
}

// checkReport refuses messages that this hub hasn't franked as they are reported. Who reports has a role in the room that
// may (draft-ietf-mimi-room-policy-03, Section 8), or takes no part any more and has messages, which prove themselves; a
// peer that names nobody takes part, or has messages.
func (n *Node) checkReport(by submitter, r *room, report *mimi.AbuseReport) error {
	r.mu.Lock()
	err := r.usable()
	if err == nil {
		err = r.mayReport(by, report)
	}
	suite, dictionary := r.group.Suite(), r.group.Dictionary()
	r.mu.Unlock()
	if err != nil || len(report.Messages) == 0 {
		return err
	}
	_, own, err := n.keys.hub(suite)
	if err != nil {
		return err
	}
	for i := range report.Messages {
		m := &report.Messages[i]
		c, err := parseReported(dictionary, m.Content)
		if err != nil {
			return refuse("notAllowed", "message %d: %v", i, err)
		}
		if c.Sender != report.AllegedAbuser || c.Room != r.uri {
			return refuse("notAllowed", "message %d says that it is of %.300q, in %.300q", i, c.Sender, c.Room)
		}
		context := mimi.ServerFrankingContext{Sender: c.Sender, Room: c.Room, AcceptedTimestamp: m.AcceptedTimestamp}
		err = m.Frank.VerifyReported(n.keys.franking[:], mimi.FrankingTag(c.Salt[:], m.Content), context)
		if err == nil {
			err = m.Frank.Verify(suite, own.SignatureKey, context)
		}
		if err != nil {
			return refuse("notAllowed", "message %d isn't one that this hub has franked for that sender, room and time: %v", i, err)
		}
	}
	return nil
}

// mayReport refuses who may not report. r.mu is held.
func (r *room) mayReport(by submitter, report *mimi.AbuseReport) error {
	user := cmp.Or(by.user, report.ReportingUser)
	if user == "" {
		if len(report.Messages) == 0 {
			return r.takesPart(by)
		}
		return nil
	}
	who, err := r.who()
	if err != nil {
		return err
	}
	role := who.role(user)
	if role == nil && len(report.Messages) == 0 || role != nil && !role.May(mimi.CanReportAbuse) {
		return refuse("notAllowed", "%s may not report", user)
	}
	return nil
}

// parseReported reads the message_content of an AbusiveMessage. The franking tag is of the application data, which the
// draft has the hub recompute it from without saying how its framing comes there: so message_content is the application
// data, with the framing that a room of MIMI content has.
func parseReported(room mls.AppDataDictionary, application []byte) (*content.Message, error) {
	data, ok := room.Get(mls.ComponentMediaTypes)
	if !ok {
		return nil, errors.New("the messages of the room aren't franked")
	}
	var types mls.MediaTypeList
	if err := codec.Unmarshal(data, &types); err != nil {
		return nil, err
	}
	var f mls.ApplicationFraming
	if err := codec.Unmarshal(application, &f); err != nil {
		return nil, err
	}
	if f.MediaType.Type == "" {
		f.MediaType = types[0]
	}
	if !f.MediaType.Equal(mimi.ContentType()) {
		return nil, errors.New("not MIMI content")
	}
	return content.Parse(f.Content)
}

// proxyReport takes a client's report to the hub of a room that another node hosts.
func (n *Node) proxyReport(ctx context.Context, by submitter, room mimi.URI, body []byte) error {
	var report mimi.AbuseReport
	if err := decode(body, &report); err != nil {
		return err
	}
	if u := report.ReportingUser; u != "" && u != by.user {
		return refuse("notAllowed", "%s doesn't speak for %s", by.client, u)
	}
	if err := n.paceReport(by, &report); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	if err := n.federation.ReportAbuse(ctx, room.Domain(), room, body); err != nil {
		return n.unreachable(room.Domain(), err)
	}
	return nil
}

// Report is a report of abuse in a room that the node hosts. The messages are as they were sent: the hub had franked them.
type Report struct {
	ID       string            `json:"id"`
	Time     time.Time         `json:"time"`
	Room     mimi.URI          `json:"room"`
	From     string            `json:"from"`               // the reporter's provider
	Reporter mimi.URI          `json:"reporter,omitempty"` // empty if the reporter isn't named
	Abuser   mimi.URI          `json:"abuser"`
	Reason   uint8             `json:"reason"` // the draft has no codes yet
	Note     string            `json:"note,omitempty"`
	Messages []ReportedMessage `json:"messages,omitempty"`
}

// ReportedMessage is a message in a Report.
type ReportedMessage struct {
	Time    time.Time `json:"time"` // when the hub accepted it
	ID      string    `json:"id"`
	Text    string    `json:"text,omitempty"` // what there is to read of it
	Content []byte    `json:"content"`        // MIMI content
}

// listReports returns the reports that are kept, oldest first.
func (n *Node) listReports() ([]Report, error) {
	list := []Report{}
	var bad error
	err := store.ScanPrefix(n.store, []byte(prefixReport), func(k, v []byte) bool {
		var rec reportRecord
		if bad = decodeRecord(v, &rec, "report"); bad != nil {
			return false
		}
		room, id, _ := strings.Cut(string(k), "\x00")
		r := Report{
			ID: hex.EncodeToString([]byte(id)), Time: time.UnixMilli(int64(rec.time)), Room: mimi.URI(room), From: rec.from,
			Reporter: rec.report.ReportingUser, Abuser: rec.report.AllegedAbuser, Reason: rec.report.ReasonCode, Note: rec.report.Note,
		}
		for _, m := range rec.report.Messages {
			r.Messages = append(r.Messages, reported(&m, r.Room))
		}
		list = append(list, r)
		return true
	})
	slices.SortStableFunc(list, func(a, b Report) int { return a.Time.Compare(b.Time) })
	return list, cmp.Or(err, bad)
}

// reported reads what was checked when it came.
func reported(m *mimi.AbusiveMessage, room mimi.URI) ReportedMessage {
	out := ReportedMessage{Time: time.UnixMilli(int64(m.AcceptedTimestamp))}
	var f mls.ApplicationFraming
	if codec.Unmarshal(m.Content, &f) != nil {
		return out
	}
	out.Content = f.Content
	if c, err := content.Parse(f.Content); err == nil {
		out.ID = content.ID(c.Sender, room, f.Content, c.Salt).String()
		out.Text, _ = c.Body.Text()
	}
	return out
}

// removeReport deletes the report of an ID, of which the beginning is enough.
func (n *Node) removeReport(id string) error {
	list, err := n.listReports()
	if err != nil {
		return err
	}
	var found []Report
	for _, r := range list {
		if id != "" && strings.HasPrefix(r.ID, id) {
			found = append(found, r)
		}
	}
	if len(found) != 1 {
		return refuse("notFound", "%d reports begin with %q", len(found), id)
	}
	rest, err := hex.DecodeString(found[0].ID)
	if err != nil {
		return err
	}
	defer n.reports.recount()
	_, err = n.store.Commit(map[string][]byte{string(key(prefixReport, found[0].Room, rest)): nil}, nil)
	return err
}
