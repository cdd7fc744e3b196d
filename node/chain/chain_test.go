package chain

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/authority/authoritytest"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

const (
	room  = mimi.URI("mimi://alpha.example/r/lunch")
	suite = mls.X25519_AES128GCM_SHA256_Ed25519
)

// wire is a type that encodes by value and decodes by pointer.
type wire interface {
	codec.Marshaler
	codec.Unmarshaler
}

func wires() map[string]wire {
	h := Head{Room: room, Suite: suite, Place: Place{7, 9, Hash{1}}}
	s := Signed{h, []byte("signature")}
	return map[string]wire{
		"link":     &Link{Hash{1}, Hash{2}},
		"head":     &h,
		"signed":   &s,
		"notice":   &Notice{s, Hash{3}, []Hash{{4}, {5}}},
		"claim":    &Claim{h.Place, []byte{}},
		"evidence": &Evidence{First: s, Second: s, Start: Hash{6}, Links: []Link{{}}, Hubs: []mls.ExternalSender{{SignatureKey: []byte("key"), Credential: mls.X509Credential([][]byte{{1}})}}, Bundle: []byte("{}")},
	}
}

func TestEncodingsAreReadBack(t *testing.T) {
	for name, v := range wires() {
		b := codec.Marshal(v)
		again := reflect.New(reflect.TypeOf(v).Elem()).Interface().(wire)
		if err := codec.Unmarshal(b, again); err != nil || !bytes.Equal(codec.Marshal(again), b) {
			t.Errorf("%s: %v, %v", name, again, err)
		}
		if err := codec.Unmarshal(b[:len(b)-1], again); err == nil {
			t.Errorf("%s: cut short, it is read", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, v := range wires() {
		f.Add(codec.Marshal(v))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for name, v := range wires() {
			if codec.Unmarshal(b, v) == nil && !bytes.Equal(codec.Marshal(v), b) {
				t.Errorf("%s: %x encodes as %x", name, b, codec.Marshal(v))
			}
		}
	})
}

func FuzzParseFile(f *testing.F) {
	h := newHub(f, "alpha.example")
	f.Add(h.rewritten(f).File())
	f.Add([]byte("-----BEGIN PARLEY EVIDENCE-----\nAAAA\n-----END PARLEY EVIDENCE-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseFile(b)
		if err != nil {
			return
		}
		if again, err := ParseFile(e.File()); err != nil || !bytes.Equal(again.File(), e.File()) {
			t.Error("what was read is written otherwise")
		}
		_, _ = e.Verify()
	})
}

func TestEveryPartOfAnEntryIsInTheChain(t *testing.T) {
	base := Start(room).Next(1, NewLink([]byte("one"), Hash{1}))
	for name, other := range map[string]Hash{
		"room":    Start("mimi://alpha.example/r/dinner").Next(1, NewLink([]byte("one"), Hash{1})),
		"number":  Start(room).Next(2, NewLink([]byte("one"), Hash{1})),
		"message": Start(room).Next(1, NewLink([]byte("two"), Hash{1})),
		"context": Start(room).Next(1, NewLink([]byte("one"), Hash{2})),
		"before":  base.Next(1, NewLink([]byte("one"), Hash{1})),
	} {
		if other == base {
			t.Errorf("the %s makes no difference", name)
		}
	}
}

func TestANoticeHasAContextForEachCommit(t *testing.T) {
	fanouts := [][]byte{[]byte("message"), []byte("commit"), []byte("message")}
	commit := func(i int) bool { return i == 1 }
	a, b := Hash{1}, Hash{2}
	links := []Link{NewLink(fanouts[0], a), NewLink(fanouts[1], b), NewLink(fanouts[2], b)}
	n := Notice{Signed: Signed{Head: Head{Place: Place{Seq: 9, Chain: Hash{7}.Fold(6, links)}}}, Previous: Hash{7}, Contexts: []Hash{a, b}}
	if got, err := n.Links(fanouts, commit); err != nil || !reflect.DeepEqual(got, links) {
		t.Fatalf("%v, %v", got, err)
	}
	for name, edit := range map[string]func(n *Notice){
		"a context too few":  func(n *Notice) { n.Contexts = n.Contexts[:1] },
		"a context too many": func(n *Notice) { n.Contexts = append(n.Contexts, b) },
		"another context":    func(n *Notice) { n.Contexts = []Hash{b, b} },
		"another start":      func(n *Notice) { n.Previous = Hash{8} },
		"another number":     func(n *Notice) { n.Seq++ },
		"too small a number": func(n *Notice) { n.Seq = 2 },
	} {
		m := n
		m.Contexts = append([]Hash(nil), n.Contexts...)
		edit(&m)
		if _, err := m.Links(fanouts, commit); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// hub is a hub with its authority and no node.
type hub struct {
	authority *authority.Embedded
	signer    crypto.Signer
	sender    mls.ExternalSender
	bundle    []byte
}

func newHub(t testing.TB, domain string) *hub {
	t.Helper()
	dir := t.TempDir()
	authoritytest.Init(t, filepath.Join(dir, "authority"), domain)
	db, err := store.Open(filepath.Join(dir, "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	a, err := authority.Open(filepath.Join(dir, "authority"), db, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(a.Close(), db.Close()); err != nil {
			t.Error(err)
		}
	})
	pub, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.IssueHub(t.Context(), pub)
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{authority: a, signer: private, sender: mls.ExternalSender{SignatureKey: []byte(pub), Credential: mls.X509Credential(chain)}}
	h.refresh(t)
	return h
}

func (h *hub) refresh(t testing.TB) {
	b, err := h.authority.Bundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h.bundle = b.JSON()
}

func (h *hub) sign(t testing.TB, p Place) *Signed {
	t.Helper()
	s, err := Sign(rand.Reader, h.signer, Head{Room: room, Suite: suite, Place: p})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// rewritten is evidence of a hub that has signed entry 2, and then entry 4 of a history with another entry 2.
func (h *hub) rewritten(t testing.TB) *Evidence {
	t.Helper()
	one := Start(room).Next(1, Link{})
	links := []Link{{Message: Hash{3}}, {Message: Hash{4}}}
	start := one.Next(2, Link{Message: Hash{2}})
	e := Contradict(h.sign(t, Place{7, 2, one.Next(2, Link{Message: Hash{1}})}), h.sign(t, Place{7, 4, start.Fold(2, links)}), start, links)
	if e == nil {
		t.Fatal("no evidence")
	}
	e.Hubs, e.Bundle = []mls.ExternalSender{h.sender}, h.bundle
	return e
}

func TestEvidenceIsVerifiedFromItsFileAlone(t *testing.T) {
	h := newHub(t, "alpha.example")
	e, err := ParseFile(h.rewritten(t).File())
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.Verify()
	if err != nil {
		t.Fatal(err)
	}
	if b.Domain() != "alpha.example" || b.Fingerprints()[0] != h.authority.Root() {
		t.Errorf("the bundle of %s, %v", b.Domain(), b.Fingerprints())
	}
	// Both heads at one number need no links.
	at := func(c byte) *Signed { return h.sign(t, Place{7, 5, Hash{c}}) }
	same := Contradict(at(1), at(2), Hash{2}, nil)
	same.Hubs, same.Bundle = []mls.ExternalSender{h.sender}, h.bundle
	if _, err := same.Verify(); err != nil {
		t.Errorf("one number, two chains: %v", err)
	}
	// The hub's provider can't take the word back by revoking the certificate.
	id, err := authority.ParseIdentity(h.sender.Credential.Certificates)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.authority.Revoke(t.Context(), id.Serial, "superseded"); err != nil {
		t.Fatal(err)
	}
	h.refresh(t)
	e.Bundle = h.bundle
	if b, err := e.Verify(); err != nil || b.Revocations() == 0 {
		t.Errorf("after the revocation: %v", err)
	}
}

func TestForgedEvidenceIsRefused(t *testing.T) {
	h, other, beta := newHub(t, "alpha.example"), newHub(t, "alpha.example"), newHub(t, "beta.example")
	one := Start(room).Next(1, Link{})
	for name, forge := range map[string]func(e *Evidence){
		"a head that extends the other": func(e *Evidence) {
			e.First = *h.sign(t, Place{7, 2, e.Start})
		},
		"another incarnation": func(e *Evidence) {
			e.Second = *h.sign(t, Place{8, e.Second.Seq, e.Second.Chain})
		},
		"another room": func(e *Evidence) {
			s, err := Sign(rand.Reader, h.signer, Head{Room: room + "2", Suite: suite, Place: e.Second.Place})
			if err != nil {
				t.Fatal(err)
			}
			e.Second = *s
		},
		"invented links":           func(e *Evidence) { e.Links[0].Message = Hash{9} },
		"an invented start":        func(e *Evidence) { e.Start = one },
		"a link too few":           func(e *Evidence) { e.Links = e.Links[:1] },
		"heads in the other order": func(e *Evidence) { e.First, e.Second = e.Second, e.First },
		"a changed head":           func(e *Evidence) { e.First.Chain[0]++ },
		"a head of another key":    func(e *Evidence) { e.First = *other.sign(t, e.First.Place) },
		"no signature":             func(e *Evidence) { e.Second.Signature = nil },
		"another key, certified by another root": func(e *Evidence) {
			e.First, e.Second, e.Hubs[0] = *other.sign(t, e.First.Place), *other.sign(t, e.Second.Place), other.sender
		},
		"another provider's hub": func(e *Evidence) {
			e.First, e.Second = *beta.sign(t, e.First.Place), *beta.sign(t, e.Second.Place)
			e.Hubs[0], e.Bundle = beta.sender, beta.bundle
		},
		"a key that isn't the certificate's": func(e *Evidence) {
			e.First, e.Second = *other.sign(t, e.First.Place), *other.sign(t, e.Second.Place)
			e.Hubs[0].SignatureKey = other.sender.SignatureKey
		},
		"a forged key beside the hub's": func(e *Evidence) {
			e.First, e.Hubs = *other.sign(t, e.First.Place), append(e.Hubs, other.sender)
		},
		"no key":    func(e *Evidence) { e.Hubs = nil },
		"no bundle": func(e *Evidence) { e.Bundle = nil },
	} {
		e := h.rewritten(t)
		forge(e)
		if _, err := e.Verify(); !errors.Is(err, ErrNoEvidence) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{
		"nothing":      nil,
		"another type": bytes.ReplaceAll(h.rewritten(t).File(), []byte("EVIDENCE"), []byte("NONSENSE")),
		"more behind":  append(h.rewritten(t).File(), "x"...),
		"too large":    make([]byte, maxEvidence*2),
	} {
		if _, err := ParseFile(b); !errors.Is(err, ErrNoEvidence) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
