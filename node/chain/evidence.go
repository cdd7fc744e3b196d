package chain

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// MaxLinks is how many links there are in an Evidence at most.
const MaxLinks = 4096

// maxEvidence is the size in bytes of the largest Evidence.
const maxEvidence = authority.MaxBundle + 1<<20

// ErrNoEvidence: what is said to be evidence proves nothing.
var ErrNoEvidence = errors.New("this is no evidence")

// Evidence shows that a hub has signed two histories of a room in one incarnation: the chain of Second can be computed
// with Links from Start, which is its value at the number of First, and First has another. Nobody but the hub can have
// signed the heads, and nobody can have found links from another start to the same chain, short of breaking SHA-256.
//
//	struct {
//	    Signed first;
//	    Signed second;
//	    uint8 start[32];
//	    Link links<V>;
//	    ExternalSender hubs<V>;
//	    opaque bundle<V>;
//	} Evidence;
type Evidence struct {
	First, Second Signed
	Start         Hash                 // chain(First.Seq) in the history of Second
	Links         []Link               // of the entries from First.Seq+1 to Second.Seq
	Hubs          []mls.ExternalSender // the hub's key, or the two keys that it signed with
	Bundle        []byte               // the trust bundle of the hub's provider, JSON
}

// Contradict returns what shows that first can't be extended to second, nil if it doesn't: start and links lead from the
// number of first to second. Both heads are verified. The caller adds Hubs and Bundle.
func Contradict(first, second *Signed, start Hash, links []Link) *Evidence {
	e := &Evidence{First: *first, Second: *second, Start: start, Links: links}
	if e.check() != nil {
		return nil
	}
	return e
}

// check says whether the heads contradict one another.
func (e *Evidence) check() error {
	a, b := &e.First, &e.Second
	switch {
	case a.Room != b.Room || a.Suite != b.Suite:
		return fmt.Errorf("chain: %w: the heads are of different rooms", ErrNoEvidence)
	case a.Incarnation != b.Incarnation:
		return fmt.Errorf("chain: %w: the heads are of different incarnations of the node", ErrNoEvidence)
	case b.Seq < a.Seq || b.Seq-a.Seq != uint64(len(e.Links)) || len(e.Links) > MaxLinks:
		return fmt.Errorf("chain: %w: %d links from entry %d to %d", ErrNoEvidence, len(e.Links), a.Seq, b.Seq)
	case e.Start == a.Chain:
		return fmt.Errorf("chain: %w: the second head extends the first", ErrNoEvidence)
	case e.Start.Fold(a.Seq, e.Links) != b.Chain:
		return fmt.Errorf("chain: %w: the links don't lead to the second head", ErrNoEvidence)
	}
	return nil
}

// Verify says whether this proves what it says, with nothing but what is in it: the heads contradict one another, and are
// signed by keys which the roots of the bundle had certified for the hub of the room. It returns the bundle; that its
// roots are the provider's is for the reader to know, by their fingerprints. A certificate that has expired or was
// revoked since counts, or a hub could take its word back. It fails with ErrNoEvidence.
func (e *Evidence) Verify() (*authority.Bundle, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	bundle, err := authority.ParseBundle(e.Bundle)
	if err != nil {
		return nil, fmt.Errorf("chain: %w: %w", ErrNoEvidence, err)
	}
	for _, hub := range e.Hubs {
		if err := e.certified(hub, bundle); err != nil {
			return nil, fmt.Errorf("chain: %w: the hub's credential: %w", ErrNoEvidence, err)
		}
	}
	for _, s := range []*Signed{&e.First, &e.Second} {
		if !slices.ContainsFunc(e.Hubs, func(hub mls.ExternalSender) bool { return s.Verify(hub.SignatureKey) == nil }) {
			return nil, fmt.Errorf("chain: %w: the hub hasn't signed the head %d", ErrNoEvidence, s.Seq)
		}
	}
	return bundle, nil
}

// certified says whether the roots of a bundle have certified a key for the hub of the room.
func (e *Evidence) certified(hub mls.ExternalSender, bundle *authority.Bundle) error {
	id, err := authority.ParseIdentity(hub.Credential.Certificates)
	if err != nil {
		return err
	}
	if id.Domain != e.First.Room.Domain() {
		return fmt.Errorf("it is of %s, the room is of %s", id.Domain, e.First.Room.Domain())
	}
	v := authority.Verifier{
		Bundles: func(domain string) *authority.Bundle {
			if domain != bundle.Domain() {
				return nil
			}
			return bundle
		},
		Time: func() time.Time { return id.NotBefore },
	}
	// That it is revoked is the last thing that is found.
	_, err = v.VerifyKey(hub.Credential.Certificates, e.First.Suite, hub.SignatureKey, authority.PurposeHub)
	if errors.Is(err, authority.ErrRevoked) {
		return nil
	}
	return err
}

// MarshalMLS implements codec.Marshaler.
func (e Evidence) MarshalMLS(w *codec.Writer) {
	e.First.MarshalMLS(w)
	e.Second.MarshalMLS(w)
	w.Raw(e.Start[:])
	codec.WriteVector(w, e.Links, func(w *codec.Writer, l Link) { l.MarshalMLS(w) })
	codec.WriteVector(w, e.Hubs, func(w *codec.Writer, s mls.ExternalSender) { s.MarshalMLS(w) })
	w.Opaque(e.Bundle)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (e *Evidence) UnmarshalMLS(r *codec.Reader) {
	e.First.UnmarshalMLS(r)
	e.Second.UnmarshalMLS(r)
	e.Start = readHash(r)
	e.Links = codec.ReadVector(r, func(r *codec.Reader) (l Link) { l.UnmarshalMLS(r); return l })
	e.Hubs = codec.ReadVector(r, func(r *codec.Reader) (s mls.ExternalSender) { s.UnmarshalMLS(r); return s })
	if len(e.Hubs) > maxHubs {
		r.Failf("%d hubs", len(e.Hubs))
	}
	e.Bundle = r.OpaqueMax(authority.MaxBundle)
}

const maxHubs = 2

const pemType = "PARLEY EVIDENCE"

// File returns the evidence as a file: PEM of the type "PARLEY EVIDENCE".
func (e *Evidence) File() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: codec.Marshal(e)})
}

// ParseFile reads what File returns, with white space around it. It fails with ErrNoEvidence.
func ParseFile(b []byte) (*Evidence, error) {
	if len(b) > maxEvidence*3/2 {
		return nil, fmt.Errorf("chain: %w: %d bytes", ErrNoEvidence, len(b))
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != pemType || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("chain: %w: not one PEM block of the type %q", ErrNoEvidence, pemType)
	}
	e := new(Evidence)
	if err := codec.Unmarshal(block.Bytes, e); err != nil {
		return nil, fmt.Errorf("chain: %w: %w", ErrNoEvidence, err)
	}
	return e, nil
}
