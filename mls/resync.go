package mls

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"maps"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// Forks, and the ways back (RFC 9750, Sections 5.2 and 6.6): members whose epoch authenticators differ don't share a
// group any more. One who finds itself on the wrong side replaces its state, by an external commit that removes its
// former leaf (Resync) or by the Welcome of a commit that removes and adds it (Rejoin).

// CheckAuthenticator compares the epoch authenticator that another member has for an epoch, and that came some other way
// than through the group, with this client's. It fails with ErrFork if they differ and with ErrEpoch if this client
// doesn't have that epoch's, which it keeps as long as past epochs (RFC 9420, Section 8.7).
func (g *Group) CheckAuthenticator(epoch uint64, other []byte) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if !g.view.active {
		return fmt.Errorf("mls: check authenticator: %w", ErrRemoved)
	}
	var own []byte
	if epoch == g.view.state.context.Epoch {
		own = authenticatorHash(g.view.secrets.authenticator)
	} else if e := findPast(&g.cfg, g.view.past, epoch); e != nil {
		own = e.authenticator
	}
	if own == nil {
		return fmt.Errorf("mls: check authenticator: %w: %d", ErrEpoch, epoch)
	}
	if subtle.ConstantTimeCompare(own, authenticatorHash(other)) != 1 {
		return fmt.Errorf("mls: check authenticator: %w: epoch %d", ErrFork, epoch)
	}
	return nil
}

// authenticatorHash is what is kept of the epoch authenticator of a past epoch.
func authenticatorHash(authenticator []byte) []byte {
	h := sha256.Sum256(authenticator)
	return h[:]
}

// entrance is what a group remembers of how this client came in, so that it doesn't come in twice the same way.
type entrance struct {
	redact
	joined uint64       // the epoch that began this state: the group's creation, a Welcome, or an external commit
	tried  uint64       // one more than the highest epoch from which a Resync was made; 0: none
	resync *PendingJoin // the Resync that waits
}

func (e *entrance) save(b Batch) {
	if e.joined == 0 && e.tried == 0 {
		return
	}
	b.Set(key1(keyEntrance), codec.Marshal(e))
}

// MarshalMLS implements codec.Marshaler, for the store.
func (e *entrance) MarshalMLS(w *codec.Writer) {
	w.Uint64(e.joined)
	w.Uint64(e.tried)
	if e.resync != nil {
		w.Raw(codec.Marshal(e.resync))
	}
}

func loadEntrance(cfg Config, b []byte) (e entrance, err error) {
	if b == nil {
		return e, nil
	}
	r := codec.NewReader(b)
	e.joined, e.tried = r.Uint64(), r.Uint64()
	if err := r.Err(); err != nil {
		return e, fmt.Errorf("mls: load state: entrance: %w", err)
	}
	if r.Len() > 0 {
		if e.resync, err = LoadPendingJoin(cfg, nil, r.Rest()); err != nil {
			return e, err
		}
		e.resync.resync = true
	}
	return e, nil
}

// ResyncOptions says how to replace a group's state by an external commit.
type ResyncOptions struct {
	redact
	// GroupInfo is that of the group as the others have it. It must have the key for external commits.
	GroupInfo   *GroupInfo
	Tree        *RatchetTree  // nil if the GroupInfo carries it; belongs to the group from then on
	Credential  *Credential   // nil: the present one
	Signer      crypto.Signer // nil: the present one
	Proposals   []Proposal    // any PreSharedKey, for example to prove the membership, and AppDataUpdate
	SelfRemoves []*MLSMessage // see ExternalJoinOptions
	AAD         []byte
}

// Resync makes an external commit that removes this client's leaf, whatever state that is in, and brings a new one, for a
// client that has forked from the others or lost what it needs to follow them (RFC 9420, Section 12.4.3.2). It is stored,
// and from then on the group doesn't send or move on (ErrResync) until Confirm, which replaces the whole state by the new
// epoch's in one Batch, or Drop, after the commit was refused. A resumption key among the proposals is looked for in this
// state.
//
// It can't be done twice: it fails with ErrResync while one waits, and with ErrEpoch for a GroupInfo that isn't newer
// than the one of the last Resync, also after a Drop, and than the epoch in which this client joined. It fails with
// ErrStaged while an own commit is staged, and with ErrRemoved if the others don't have this client as a member.
func (g *Group) Resync(b Batch, o ResyncOptions) (*PendingJoin, error) {
	g.op.Lock()
	defer g.done()
	p, err := g.resync(o)
	if err != nil {
		return nil, fmt.Errorf("mls: resync: %w", err)
	}
	g.entrance.resync, g.entrance.tried = p, p.Epoch()
	g.entrance.save(g.sealer.seal(orDiscard(b)))
	if o.Signer != nil {
		g.signers[string(p.newLeaf().SignatureKey)] = o.Signer
	}
	return p, nil
}

// PendingResync returns the Resync that waits, nil if there is none. Its commit is confirmed or dropped by the group.
func (g *Group) PendingResync() *PendingJoin {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.view.resync
}

func (g *Group) resync(o ResyncOptions) (*PendingJoin, error) {
	switch ctx := &o.GroupInfo.GroupContext; {
	case !g.active:
		return nil, ErrRemoved
	case g.entrance.resync != nil:
		return nil, fmt.Errorf("%w: another one waits", ErrResync)
	case g.staged != nil:
		return nil, fmt.Errorf("%w: it has to be confirmed or dropped before", ErrStaged)
	case !bytes.Equal(ctx.GroupID, g.state.context.GroupID) || ctx.CipherSuite != g.suite():
		return nil, fmt.Errorf("%w: group info of another group", ErrMalformed)
	case ctx.Epoch < g.entrance.tried || ctx.Epoch < g.entrance.joined:
		return nil, fmt.Errorf("%w: group info of epoch %d was used before or is older than this state", ErrEpoch, ctx.Epoch)
	}
	own := g.state.tree.Leaf(g.own)
	join := ExternalJoinOptions{GroupInfo: o.GroupInfo, Tree: o.Tree, Credential: own.Credential, Signer: o.Signer,
		Capabilities: own.Capabilities.clone(), LeafExtensions: own.Extensions, Proposals: o.Proposals,
		SelfRemoves: o.SelfRemoves, AAD: o.AAD}
	if o.Credential != nil {
		join.Credential = *o.Credential
	}
	if join.Signer == nil {
		s, err := g.signer()
		if err != nil {
			return nil, err
		}
		join.Signer = s
	}
	return externalJoin(g.cfg, join, g)
}

// formerLeaf finds this client's leaf in the tree of the others. That the new leaf may replace it is checked where the
// external commit is.
func (g *Group) formerLeaf(t *RatchetTree) (LeafIndex, error) {
	own := g.state.tree.Leaf(g.own)
	name, err := memberName(g.cfg.Verifier, own)
	if err != nil {
		return 0, err
	}
	var found []LeafIndex
	for i, l := range t.Leaves() {
		n, err := memberName(g.cfg.Verifier, l)
		if err != nil {
			return 0, err
		}
		if n == name {
			found = append(found, i)
		}
	}
	switch len(found) {
	case 0:
		return 0, ErrRemoved
	case 1:
		return found[0], nil
	}
	for _, i := range found { // clients without a name may share a credential
		if bytes.Equal(t.Leaf(i).SignatureKey, own.SignatureKey) {
			return i, nil
		}
	}
	return 0, invalid("12.2", "%d leaves with this client's credential", len(found))
}

func (g *Group) confirmResync(b Batch) error {
	p := g.entrance.resync
	signer := g.signers[string(p.newLeaf().SignatureKey)]
	if signer == nil {
		return ErrSigner
	}
	next, err := p.group(signer)
	if err != nil {
		return err
	}
	g.replace(b, next) // which erases p
	return nil
}

// Rejoin replaces the group's state by the one that a Welcome brings, in one Batch: after a commit of another member has
// removed this client and added it again, in the same commit or later. That is for a client that has forked from the
// others, was removed, or lost what it needs to follow them. The arguments are those of JoinGroup. It fails with ErrEpoch
// for a Welcome to an epoch that isn't after the one in which this client joined, so that none works twice, and with
// ErrMalformed for another group. Whether the group that the Welcome describes is the one that the others have is for
// the application to find out before.
func (g *Group) Rejoin(b Batch, signer crypto.Signer, w *Welcome, kp *KeyPackage, secrets *KeyPackageSecrets, tree *RatchetTree) error {
	g.op.Lock()
	defer g.done()
	next, err := joinGroup(g.cfg, signer, w, kp, secrets, tree, nil)
	if err != nil {
		return fmt.Errorf("mls: rejoin: %w", err)
	}
	ctx := &next.state.context
	if !bytes.Equal(ctx.GroupID, g.state.context.GroupID) {
		return fmt.Errorf("mls: rejoin: %w: welcome to another group", ErrMalformed)
	}
	if ctx.Epoch <= g.entrance.joined {
		return fmt.Errorf("mls: rejoin: %w: welcome to epoch %d, joined in %d", ErrEpoch, ctx.Epoch, g.entrance.joined)
	}
	g.replace(orDiscard(b), next)
	return nil
}

// replace makes the state of next, which has no past, this group's and deletes the former.
func (g *Group) replace(b Batch, next *Group) {
	r := make(replacement)
	if g.active {
		g.deleteMember(r)
	}
	for n := NodeIndex(0); uint32(n) < g.state.tree.nodeWidth(); n++ {
		if !g.state.tree.blank(n) {
			r.Delete(key32(keyNode, uint32(n)))
		}
	}
	r.Delete(key64(keyExtensions, g.state.extEpoch))
	r.Delete(key1(keyReInit))
	g.state, g.own, g.active, g.private, g.secrets = next.state, next.own, true, next.private, next.secrets
	g.messages, g.exports, g.sealer, g.signers = next.messages, next.exports, next.sealer, next.signers
	g.entrance = entrance{joined: next.entrance.joined, tried: g.entrance.tried}
	g.saveAll(r)
	for _, k := range slices.Sorted(maps.Keys(r)) {
		if v := r[k]; v != nil {
			b.Set([]byte(k), v)
		} else {
			b.Delete([]byte(k))
		}
	}
}

// replacement is a Batch for a change that deletes and sets the same keys: what comes last counts, and what is deleted
// is nil.
type replacement map[string][]byte

// Set implements Batch.
func (r replacement) Set(key, value []byte) {
	r[string(key)] = append(make([]byte, 0, len(value)), value...)
}

// Delete implements Batch.
func (r replacement) Delete(key []byte) { r[string(key)] = nil }
