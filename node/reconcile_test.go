package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
)

// replace stops a node and starts one from a backup in its place, which may be asking its peers yet.
func (n *testNode) replace(backup string) {
	n.t.Helper()
	n.stop()
	data := must(os.MkdirTemp("", "parley"))(n.t)
	n.t.Cleanup(func() { os.RemoveAll(data) })
	must(Restore(backup, data))(n.t)
	n.cfg.Data = data
	n.start()
}

// restore is replace, and waits until the node serves.
func (n *testNode) restore(backup string) {
	n.t.Helper()
	n.replace(backup)
	eventually(n.t, n.settled)
}

// logged is an entry of a node's log, nil if there is none.
func (n *testNode) logged(room mimi.URI, seq uint64) []byte {
	n.t.Helper()
	return must(n.store.Get(key(prefixLog, room, be64(seq))))(n.t)
}

// lines is a log that a test reads.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), text)
}

// shows answers a restored hub with part of a log, size entries at a time.
func shows(head *chain.Signed, size int, entries ...federation.LogEntry) func(after uint64) (*federation.LogPage, error) {
	return func(after uint64) (*federation.LogPage, error) {
		page := &federation.LogPage{Head: codec.Marshal(head)}
		for _, e := range entries {
			if e.Seq > after && len(page.Entries) < size {
				page.Entries = append(page.Entries, e)
			}
		}
		return page, nil
	}
}

// TestWhatAFollowerForgesIsNotTaken has a restored hub ask followers under the test's control.
func TestWhatAFollowerForgesIsNotTaken(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	backup, b := alpha.backUp()
	alice.send("one")
	seq := alice.commit()
	alices.until(func() bool { return alice.seq >= seq })
	last := alice.send("two")
	bobs.until(func() bool { return bob.seq >= last })
	r := must(alpha.hostedRoom(alice.room))(t)
	first := uint64(b.Entries)
	page := must(beta.tellLog(t.Context(), alpha.cfg.Domain, alice.room, &federation.LogRequest{After: first, Head: must(alpha.head(r, last))(t).encoded}))(t)
	if uint64(len(page.Entries)) != last-first || len(page.Head) == 0 {
		t.Fatalf("the follower shows %d entries after %d of %d", len(page.Entries), first, last)
	}
	entries := page.Entries
	head := new(chain.Signed)
	if err := codec.Unmarshal(page.Head, head); err != nil {
		t.Fatal(err)
	}
	signer, _, err := alpha.keys.hub(testSuite)
	if err != nil {
		t.Fatal(err)
	}
	signed := func(edit func(h *chain.Head)) *chain.Signed {
		h := head.Head
		edit(&h)
		return must(chain.Sign(rand.Reader, signer, h))(t)
	}
	edited := func(i int, edit func(e *federation.LogEntry)) []federation.LogEntry {
		list := slices.Clone(entries)
		list[i].Fanout = slices.Clone(list[i].Fanout)
		edit(&list[i])
		return list
	}
	another := must(testSuite.GenerateSignatureKey(rand.Reader))(t)
	l := &liar{t: t, alpha: alpha, beta: beta, room: alice.room}
	invented := edited(2, func(e *federation.LogEntry) { e.Fanout = l.invent() })
	before := must(alpha.linkAt(alice.room, last-1))(t)
	other := signed(func(h *chain.Head) {
		h.Chain = before.chain.Next(last, chain.NewLink(invented[2].Fanout, invented[2].Context))
	})

	beta.stop()
	alpha.cfg.restoreFor = time.Millisecond
	alpha.restore(backup)
	r = must(alpha.hostedRoom(alice.room))(t)
	honest := shows(head, 2, entries...)
	type answers = map[string]func(after uint64) (*federation.LogPage, error)
	try := func(name string, peers answers) {
		t.Helper()
		q := &inquiry{n: alpha.Node, left: make(map[string]time.Duration)}
		who := make(map[string]struct{})
		for p := range peers {
			q.left[p], who[p] = 100*time.Millisecond, struct{}{}
		}
		calls := 0
		q.log = func(ctx context.Context, peer string, _ mimi.URI, req *federation.LogRequest) (*federation.LogPage, error) {
			if calls++; calls == 50 {
				t.Errorf("%s: it is asked again and again", name)
			}
			page, err := peers[peer](req.After)
			if page == nil && err == nil {
				<-ctx.Done()
				err = &federation.Error{Status: 503}
			}
			return page, err
		}
		own := must(alpha.head(r, r.durable.Load()))(t)
		best, err := q.best(t.Context(), r, own, who)
		if err != nil && name != "two histories" {
			t.Errorf("%s: %v", name, err)
		}
		if best != nil {
			if err := q.take(t.Context(), r, own, best); err == nil && name != "" {
				t.Errorf("%s: it is taken", name)
			} else if err != nil && name == "" {
				t.Error(err)
			}
		}
		if now := r.durable.Load(); r.broken != nil || name != "" && now != first {
			t.Errorf("%s: the log ends with %d instead of %d (%v)", name, now, first, r.broken)
		}
	}
	calls := 0
	for name, answer := range map[string]func(after uint64) (*federation.LogPage, error){
		"a refusal": func(uint64) (*federation.LogPage, error) { return nil, &federation.Error{Status: 403} },
		"silence":   func(uint64) (*federation.LogPage, error) { return nil, nil },
		"no head":   func(uint64) (*federation.LogPage, error) { return &federation.LogPage{Entries: entries}, nil },
		"a head that can't be read": func(uint64) (*federation.LogPage, error) {
			return &federation.LogPage{Head: []byte("x"), Entries: entries}, nil
		},
		"a head of another key":           shows(must(chain.Sign(rand.Reader, another, head.Head))(t), 9, entries...),
		"a head of another room":          shows(signed(func(h *chain.Head) { h.Room += "2" }), 9, entries...),
		"a changed head":                  shows(&chain.Signed{Head: func() chain.Head { h := head.Head; h.Seq--; return h }(), Signature: head.Signature}, 9, entries[:2]...),
		"a head of the new incarnation":   shows(signed(func(h *chain.Head) { h.Incarnation = alpha.incarnation }), 9, entries...),
		"a changed entry":                 shows(head, 9, invented...),
		"another context":                 shows(head, 9, edited(1, func(e *federation.LogEntry) { e.Context[0]++ })...),
		"a number twice":                  shows(head, 9, edited(1, func(e *federation.LogEntry) { e.Seq-- })...),
		"an entry left out":               shows(head, 9, entries[0], entries[2]),
		"a beginning left out":            shows(head, 9, entries[1:]...),
		"a log that ends before its head": shows(head, 9, entries[:2]...),
		"a log that goes beyond its head": shows(signed(func(h *chain.Head) { h.Seq, h.Chain = last-1, before.chain }), 9, entries...),
		"a log that never ends": func(after uint64) (*federation.LogPage, error) {
			page := &federation.LogPage{Head: codec.Marshal(head)}
			for i := range uint64(2) {
				page.Entries = append(page.Entries, federation.LogEntry{Seq: after + 1 + i, Fanout: l.invent()})
			}
			return page, nil
		},
		"an older head": shows(signed(func(h *chain.Head) { h.Seq = first }), 9, entries...),
		"another log the second time": func(after uint64) (*federation.LogPage, error) {
			if calls++; calls > 2 {
				return shows(head, 2, edited(0, func(e *federation.LogEntry) { e.Fanout = l.invent() })...)(after)
			}
			return honest(after)
		},
		"nothing the second time": func() func(after uint64) (*federation.LogPage, error) {
			calls := 0
			return func(after uint64) (*federation.LogPage, error) {
				if calls++; calls > 2 {
					return shows(head, 9)(after)
				}
				return honest(after)
			}
		}(),
	} {
		try(name, answers{"beta.example": answer})
	}
	try("two histories", answers{"beta.example": honest, "gamma.example": shows(other, 9, invented...)})
	// What a later incarnation has ordered counts, and not what one before had.
	later := signed(func(h *chain.Head) { h.Incarnation, h.Chain = h.Incarnation+1, other.Chain })
	q := &inquiry{n: alpha.Node, left: map[string]time.Duration{"beta.example": time.Second, "gamma.example": time.Second}}
	q.log = func(_ context.Context, peer string, _ mimi.URI, req *federation.LogRequest) (*federation.LogPage, error) {
		if peer == "gamma.example" {
			return shows(later, 9, invented...)(req.After)
		}
		return honest(req.After)
	}
	if best, err := q.best(t.Context(), r, must(alpha.head(r, first))(t), map[string]struct{}{"beta.example": {}, "gamma.example": {}}); err != nil || best == nil || best.peer != "gamma.example" {
		t.Errorf("of two incarnations, %+v is best, %v", best, err)
	}
	// A shorter beginning of the same stands in nobody's way, nor does a follower that lies.
	try("", answers{"beta.example": honest, "gamma.example": shows(signed(func(h *chain.Head) { h.Seq, h.Chain = last-1, before.chain }), 9, entries[:2]...), "delta.example": shows(head, 9, invented...)})
	if now := must(alpha.linkAt(alice.room, last))(t); now == nil || now.chain != head.Chain {
		t.Errorf("the log ends with %d instead of %d", r.durable.Load(), last)
	}
}

func TestARestoredNodeServesNobodyBeforeItHasAsked(t *testing.T) {
	alpha, beta, alice, bob, alices, bobs := twoNodes(t)
	backup, _ := alpha.backUp()
	seq := alice.send("after the backup")
	bobs.until(func() bool { return bob.seq >= seq })
	alices.until(func() bool { return alice.seq >= seq })
	revoked := newClient(t, alpha, "carol", "carol-laptop")
	must(alpha.service.Revoke(t.Context(), string(revoked.uri), "keyCompromise"))(t)
	published := alpha.ownBundle.Load().Sequence()
	eventually(t, func() error {
		if b := beta.trust.Bundle(alpha.cfg.Domain); b.Sequence() != published {
			return fmt.Errorf("beta has sequence %d of %d", b.Sequence(), published)
		}
		return nil
	})
	beta.stop()
	alpha.replace(backup)
	if s := must(DialAdmin(alpha.cfg.Socket()).Status(t.Context()))(t); !s.Restoring {
		t.Errorf("the status is %+v", s)
	}
	alice.connect()
	if err := alice.tryAuthenticate(); code(err) != "unavailable" {
		t.Errorf("a client is served: %v", err)
	}
	p := provider{alpha.Node}
	unavailable := func(what string, err error) {
		t.Helper()
		if e, ok := errors.AsType[*federation.Error](err); !ok || e.Status != 503 {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := p.KeyMaterial(t.Context(), beta.cfg.Domain, &mimi.KeyMaterialRequest{})
	unavailable("KeyPackages", err)
	_, _, err = p.SubmitMessage(t.Context(), beta.cfg.Domain, alice.room, nil)
	unavailable("a message", err)
	_, _, err = p.Update(t.Context(), beta.cfg.Domain, alice.room, nil)
	unavailable("a handshake", err)
	unavailable("a notice", p.Notify(t.Context(), beta.cfg.Domain, "mimi://beta.example/r/x", nil))

	beta.start()
	eventually(t, alpha.settled)
	if alpha.logged(alice.room, seq) == nil {
		t.Error("what the follower has wasn't waited for")
	}
	own := alpha.ownBundle.Load()
	if own.Sequence() <= published {
		t.Errorf("the trust bundle has sequence %d after %d", own.Sequence(), published)
	}
	if _, err := alpha.verifier.Verify(revoked.chain, authority.PurposeClient); !errors.Is(err, authority.ErrRevoked) {
		t.Errorf("a client that was revoked after the backup: %v", err)
	}
	eventually(t, func() error {
		if b := beta.trust.Bundle(alpha.cfg.Domain); b.Sequence() != own.Sequence() {
			return fmt.Errorf("beta has sequence %d of %d", b.Sequence(), own.Sequence())
		}
		return nil
	})
}

func TestARestoredHubServesThoughAFollowerIsSilent(t *testing.T) {
	alpha, beta, alice, _, _, _ := twoNodes(t)
	backup, _ := alpha.backUp()
	beta.stop()
	said := new(lines)
	alpha.log = slog.New(slog.NewTextHandler(said, nil))
	alpha.cfg.restoreFor = 50 * time.Millisecond
	alpha.restore(backup)
	alice.connect()
	alice.authenticate()
	alice.send("it serves")
	if !said.has("a peer can't be asked what came after the backup") || !said.has(beta.cfg.Domain) {
		t.Error("it doesn't say that the follower is silent")
	}
}

// TestARestoredFollowerMissesNothingThoughItsHubIsSilent has the hub come back after the follower has given up waiting.
func TestARestoredFollowerMissesNothingThoughItsHubIsSilent(t *testing.T) {
	alpha, beta, alice, bob, _, bobs := twoNodes(t)
	backup, _ := beta.backUp()
	last := alice.send("after the backup")
	bobs.until(func() bool { return bob.seq >= last })
	eventually(t, func() error {
		if d := alpha.outbox.Depth(beta.cfg.Domain); d != 0 {
			return fmt.Errorf("%d items wait", d)
		}
		return nil
	})
	alpha.stop()
	beta.cfg.restoreFor = time.Millisecond
	beta.restore(backup)
	if beta.logged(alice.room, last) != nil {
		t.Fatal("nothing is missing")
	}
	beta.stop() // it is still to be done after a restart
	beta.start()
	alpha.start()
	alice.connect()
	alice.authenticate()
	next := alice.send("while beta catches up")
	eventually(t, func() error {
		if beta.logged(alice.room, next) == nil {
			return errors.New("beta isn't there yet")
		}
		return nil
	})
	if beta.logged(alice.room, last) == nil {
		t.Error("an entry was passed over")
	}
	eventually(t, func() error {
		if beta.late.has(alice.room) {
			return errors.New("it is asked for again")
		}
		return nil
	})
}

func TestLogsAreToldToWhoHasLostThemOnly(t *testing.T) {
	alpha, beta, alice, bob, _, bobs := twoNodes(t)
	early := alice.send("one")
	seq := alice.send("two")
	bobs.until(func() bool { return bob.seq >= seq })
	r := must(alpha.hostedRoom(alice.room))(t)
	head := must(alpha.head(r, seq))(t)
	forged := *head.Signed
	forged.Signature = slices.Clone(forged.Signature)
	forged.Signature[0]++
	unsigned := codec.Marshal(&forged)
	foreign := codec.Marshal(must(chain.Sign(rand.Reader, must(testSuite.GenerateSignatureKey(rand.Reader))(t), head.Head))(t))
	ended := func() []byte {
		signer, _, _ := alpha.keys.hub(testSuite)
		h := head.Head
		h.Incarnation--
		return codec.Marshal(must(chain.Sign(rand.Reader, signer, h))(t))
	}()
	for _, tt := range []struct {
		what string
		of   *testNode
		from string
		req  federation.LogRequest
		code string
	}{
		{"a stranger asks a follower", beta, "gamma.example", federation.LogRequest{Head: head.encoded}, "notAllowed"},
		{"a stranger asks the hub", alpha, "gamma.example", federation.LogRequest{After: seq, Head: head.encoded}, "notAllowed"},
		{"a hub without a head", beta, "alpha.example", federation.LogRequest{}, "malformed"},
		{"a hub with a changed head", beta, "alpha.example", federation.LogRequest{Head: unsigned}, "malformed"},
		{"a hub of another key", beta, "alpha.example", federation.LogRequest{Head: foreign}, "malformed"},
		{"a hub that was superseded", beta, "alpha.example", federation.LogRequest{Head: ended}, "notAllowed"},
		{"a follower with a head of another key", alpha, "beta.example", federation.LogRequest{After: seq, Head: foreign}, "notAllowed"},
		{"a follower that asks for what it has had", alpha, "beta.example", federation.LogRequest{After: early - 1, Head: head.encoded}, "notAllowed"},
		{"no such number", beta, "alpha.example", federation.LogRequest{After: federation.MaxSeq, Head: head.encoded}, "malformed"},
	} {
		if _, err := tt.of.tellLog(t.Context(), tt.from, alice.room, &tt.req); reason(err) == nil || reason(err).code != tt.code {
			t.Errorf("%s: %v", tt.what, err)
		}
	}
	if page, err := beta.tellLog(t.Context(), "alpha.example", alice.room, &federation.LogRequest{After: early, Head: head.encoded}); err != nil || len(page.Entries) != 1 || page.Entries[0].Seq != seq {
		t.Errorf("the hub is told %+v, %v", page, err)
	}
}

func TestAForgedSuccessorEndsNoNode(t *testing.T) {
	alpha, beta, alice, _, _, _ := twoNodes(t)
	r := must(alpha.hostedRoom(alice.room))(t)
	h := must(alpha.head(r, r.durable.Load()))(t).Head
	h.Incarnation++
	signer, _, err := beta.keys.hub(testSuite)
	if err != nil {
		t.Fatal(err)
	}
	forged := must(chain.Sign(rand.Reader, signer, h))(t)
	h.Room = "mimi://beta.example/r/x"
	foreign := must(chain.Sign(rand.Reader, signer, h))(t)
	for what, proof := range map[string][]byte{
		"a head of another key": codec.Marshal(forged), "a head of another domain": codec.Marshal(foreign), "no head": []byte("x"),
	} {
		if err := alpha.checkSuperseded(beta.cfg.Domain, proof); reason(err) == nil || alpha.superseded.Load() {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestClientsOfAFollowerThatWasNotHeardOfEnterAnew: nobody writes anything after the hub has lost entries.
func TestClientsOfAFollowerThatWasNotHeardOfEnterAnew(t *testing.T) {
	alpha, beta, alice, bob, _, bobs := twoNodes(t)
	kept := alice.send("before")
	bobs.until(func() bool { return bob.seq >= kept })
	backup, _ := alpha.backUp()
	lost := alice.send("lost")
	bobs.until(func() bool { return bob.seq >= lost })
	alpha.cfg.restoreFor = time.Nanosecond
	alpha.restore(backup)
	eventually(t, func() error { return beta.exchange(t.Context(), alpha.cfg.Domain) })
	for {
		if b := bobs.next().GetBehind(); b != nil {
			if b.Last != kept || len(b.Head) == 0 {
				t.Errorf("bob is behind: %v", b)
			}
			break
		}
	}
	if beta.logged(alice.room, lost) != nil || beta.logged(alice.room, kept) == nil {
		t.Error("the follower has another log than its hub")
	}
	if list := must(beta.listEvidence())(t); len(list) != 0 {
		t.Errorf("evidence %+v", list)
	}
}
