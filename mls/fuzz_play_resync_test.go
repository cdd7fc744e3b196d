package mls

import (
	"errors"
	"maps"
	"slices"
)

// joined is the epoch in which the member's state began.
func (m *playMember) joined() uint64 { return slices.Min(slices.Collect(maps.Keys(m.history))) }

// resync has a member make an external commit in place of its leaf, and knows when it can't.
func (p *play) resync(g *playGroup, m *playMember) {
	flags := p.next()
	if g.server != nil && g.server.ReInit() != nil {
		return // see join
	}
	info, parent := g.current.info, g.history
	epoch, signers := info.GroupContext.Epoch, len(m.signers)
	o := ResyncOptions{GroupInfo: info, Tree: fresh(p, g.current.tree)}
	if c, s := p.renewal(m); c != nil {
		o.Credential, o.Signer = c, s
	}
	if flags&1 != 0 {
		o.Proposals = append(o.Proposals, sharedPSK())
	}
	if m.at() == g.history {
		if flags&2 != 0 {
			o.Proposals = append(o.Proposals, psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageApplication, GroupID: m.GroupID(), Epoch: epoch}))
		}
		if flags&4 != 0 {
			o.SelfRemoves = m.SelfRemoves()
		}
	}
	there := false
	for _, l := range g.current.tree.Leaves() {
		there = there || l.Credential.Identity[0] == m.name[0]
	}
	var want error
	switch {
	case m.PendingCommit() != nil:
		want = ErrStaged
	case m.used != nil && epoch <= m.used.GroupContext.Epoch, epoch < m.joined():
		want = ErrEpoch
	case !there:
		want = ErrRemoved
	}
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	b, lost := p.batch(m)
	r, err := m.Resync(b, o)
	if !errors.Is(err, want) {
		p.Fatalf("%s resyncs: got %v, want %v", m.name, err, want)
	}
	if err != nil || lost {
		m.signers = m.signers[:signers]
	}
	if err != nil {
		p.unchanged(m, before, stored)
		return
	}
	if lost {
		p.cut(g, m)
		return
	}
	s := &playMessage{m: r.Message(), parent: parent, epoch: epoch, commit: &playCommit{r.GroupInfo(), r.Tree()}}
	for _, e := range r.Info().Proposals {
		if e.Ref != nil {
			s.refs = append(s.refs, e.Ref)
		}
	}
	m.resync, m.used = s, info
	p.checkMember(g, m)
	p.send(g, s)
}

// waiting has a member find that it can do nothing but read while a resync waits, and then perhaps what became of that.
func (p *play) waiting(g *playGroup, m *playMember, client int) {
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	want := ErrResync
	if m.ReInit() != nil {
		want = ErrEnded
	}
	_, err1 := m.Commit(m.store, CommitOptions{})
	_, err2 := m.Propose(m.store, nil, sharedPSK())
	_, err3 := m.Encrypt(m.store, nil, []byte("x"))
	for _, err := range []error{err1, err2, err3} {
		if !errors.Is(err, want) {
			p.Fatalf("%s while a resync waits: %v", m.name, err)
		}
	}
	_, err1 = m.Resync(m.store, ResyncOptions{GroupInfo: g.current.info})
	_, err2 = m.PendingResync().Confirm(m.store)
	if !errors.Is(err1, ErrResync) || !errors.Is(err2, ErrResync) {
		p.Fatalf("%s while a resync waits: %v, %v", m.name, err1, err2)
	}
	p.unchanged(m, before, stored)
	switch p.next() % 4 {
	case 0: // goes on to wait
	case 1: // whatever became of it
		p.dropResync(g, m)
	default:
		p.settleResync(g, m, client)
	}
}

// settleResync tells a member what became of its resync.
func (p *play) settleResync(g *playGroup, m *playMember, client int) {
	s := m.resync
	if !s.ordered && !p.order(g, s) && p.next()%4 != 3 { // or it believes so
		p.dropResync(g, m)
		return
	}
	b, lost := p.batch(m)
	p.must(m.Confirm(b))
	if lost {
		p.cut(g, m)
		return
	}
	p.replaced(g, m, client, after(s.parent, s))
	p.resyncedBefore(m)
}

func (p *play) dropResync(g *playGroup, m *playMember) {
	p.must(m.Drop(m.store))
	m.resync = nil
	p.checkMember(g, m)
	p.resyncedBefore(m)
}

// resyncedBefore has a member try a resync from where the last one was made.
func (p *play) resyncedBefore(m *playMember) {
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	if _, err := m.Resync(m.store, ResyncOptions{GroupInfo: m.used}); !errors.Is(err, ErrEpoch) {
		p.Fatalf("%s resyncs a second time: %v", m.name, err)
	}
	p.unchanged(m, before, stored)
}

// rejoin has a client that was added to a group replace what it has of that, once.
func (p *play) rejoin(g *playGroup, m *playMember, i *playInvite, w *Welcome, tree *RatchetTree) {
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	again := tree
	if tree != nil {
		again = fresh(p, tree)
	}
	b, lost := Batch(m.store), false
	if m.Active() {
		b, lost = p.batch(m)
	}
	err := m.Rejoin(b, i.signer, w, i.kp, i.secrets, tree)
	if i.epoch <= m.joined() {
		if !errors.Is(err, ErrEpoch) {
			p.Fatalf("%s, joined in epoch %d, rejoins in %d: %v", m.name, m.joined(), i.epoch, err)
		}
		p.unchanged(m, before, stored)
		return
	}
	p.must(err)
	if lost {
		p.cut(g, m)
		return
	}
	m.signers = append(m.signers, i.signer)
	p.replaced(g, m, i.client, i.history)
	before, stored = dump(m.Group), maps.Clone(m.store.m)
	if err := m.Rejoin(m.store, i.signer, w, i.kp, i.secrets, again); !errors.Is(err, ErrEpoch) {
		p.Fatalf("%s rejoins a second time: %v", m.name, err)
	}
	p.unchanged(m, before, stored)
}

// replaced notes that a member's state is another one, which began with a commit.
func (p *play) replaced(g *playGroup, m *playMember, client int, history string) {
	p.Helper()
	m.history, m.resync, m.cursor = map[uint64]string{m.Epoch(): history}, nil, -1
	for at, s := range g.log {
		if s.commit != nil && after(s.parent, s) == history {
			m.cursor = at + 1
		}
	}
	g.members[client], g.former[client] = m, nil
	p.checkMember(g, m)
}

// export has a member take the secret of a component: once, the same as others in its epoch, and nobody's of another.
func (p *play) export(g *playGroup, m *playMember) {
	e := playExport{m.at(), ComponentID(0x8000 + p.next()%2)}
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	b, lost := p.batch(m)
	got, err := m.SafeExport(b, e.component)
	if m.taken[e] {
		if !errors.Is(err, ErrExported) {
			p.Fatalf("%s exports the secret of %x twice: %v", m.name, e.component, err)
		}
		p.unchanged(m, before, stored)
		return
	}
	p.must(err)
	if lost {
		p.cut(g, m)
		return
	}
	m.taken[e] = true
	p.checkMember(g, m)
	if other, ok := g.exports[e]; ok && other != string(got) || len(got) != testSuite.HashSize() {
		p.Fatalf("%s exports another secret of %x than others who applied the same commits", m.name, e.component)
	}
	g.exports[e] = string(got)
	if other, ok := g.exporters[string(got)]; ok && other != e {
		p.Fatalf("%s exports the secret of %x for that of %x", m.name, other.component, e.component)
	}
	g.exporters[string(got)] = e
}
