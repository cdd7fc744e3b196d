package mls

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"maps"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// send notes a message and offers it to the server, unless that doesn't get it.
func (p *play) send(g *playGroup, s *playMessage) bool {
	p.Helper()
	g.sent = append(g.sent, s)
	if s.by != nil && g.id == playSemiPrivate {
		p.checkReceivers(s)
	}
	if p.next()%8 == 7 {
		return false
	}
	return p.order(g, s)
}

// order offers a proposal or commit to the server.
func (p *play) order(g *playGroup, s *playMessage) bool {
	p.Helper()
	if s.ordered {
		return false
	}
	place := s.parent == g.history
	if g.server == nil {
		if !place {
			return false
		}
		if s.commit != nil {
			g.history, g.current = after(g.history, s), s.commit
		}
		s.ordered = true
		g.log = append(g.log, s)
		return true
	}
	before := dumpServer(g.server)
	m := wire(p, s.m)
	if s.commit == nil {
		staged, err := g.checkProposal(m)
		if err != nil {
			// Of what the server refuses in its place there is only what doesn't fit a group alone.
			external := m.Public != nil && m.Public.Content.Sender.Type == SenderExternal
			if place && !errors.Is(err, ErrUnsupported) && !external {
				p.Fatalf("server refuses a proposal: %v", err)
			}
			sameState(p, "server", dumpServer(g.server), before)
			return false
		}
		if !place {
			p.Fatal("server takes a proposal of another epoch")
		}
		p.must(g.server.ApplyProposal(g.store, staged))
	} else {
		staged, err := g.checkCommit(m)
		if err != nil {
			if place && s.known(g.server.Pending()) {
				p.Fatalf("server refuses a commit: %v", err)
			}
			sameState(p, "server", dumpServer(g.server), before)
			return false
		}
		if !place {
			p.Fatal("server takes a commit of another epoch")
		}
		p.must(staged.CheckGroupInfo(s.commit.info))
		p.must(staged.CheckTree(s.commit.tree))
		p.must(g.server.Apply(g.store, staged, s.commit.info))
		g.history, g.current = after(g.history, s), s.commit
	}
	s.ordered = true
	g.log = append(g.log, s)
	return true
}

// after is the history that a commit leads to.
func after(parent string, s *playMessage) string {
	h := sha256.Sum256(append([]byte(parent), codec.Marshal(s.m)...))
	return string(h[:])
}

// known says whether all proposals that a commit refers to are pending.
func (s *playMessage) known(pending []PendingProposal) bool {
	for _, ref := range s.refs {
		if !slices.ContainsFunc(pending, func(e PendingProposal) bool { return bytes.Equal(e.Ref, ref) }) {
			return false
		}
	}
	return true
}

func (p *play) confirm(g *playGroup, m *playMember, s *playMessage) {
	p.Helper()
	b, lost := p.batch(m)
	p.must(m.Confirm(b))
	if lost {
		p.cut(g, m)
		return
	}
	p.moved(g, m, s)
}

// moved notes that a member applied a commit.
func (p *play) moved(g *playGroup, m *playMember, s *playMessage) {
	p.Helper()
	m.history[m.Epoch()] = after(s.parent, s)
	if s.ordered {
		for i, l := range g.log {
			if l == s {
				m.cursor = i + 1
			}
		}
	}
	p.checkMember(g, m)
	if !m.Active() {
		for i := range g.members {
			if g.members[i] == m {
				g.members[i], g.former[i] = nil, m
			}
		}
	}
}

// sync hands a member the next entries of the server's log.
func (p *play) sync(g *playGroup, m *playMember, n int) {
	for ; n > 0 && m.cursor >= 0 && m.cursor < len(g.log) && m.Active() && m.resync == nil; n-- {
		s := g.log[m.cursor]
		m.cursor++
		p.receive(g, m, s)
	}
}

// deliver hands a member any message.
func (p *play) deliver(g *playGroup, m *playMember) {
	from := g
	if p.next()%8 == 7 {
		from = p.groups[(g.id+1)%playGroups]
	}
	if len(from.sent) == 0 {
		return
	}
	s := from.sent[p.next()%len(from.sent)]
	if from == g {
		p.receive(g, m, s)
		return
	}
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	if _, err := m.Receive(m.store, wire(p, s.m)); err == nil {
		p.Fatal("a message of another group is accepted")
	}
	p.unchanged(m, before, stored)
}

func (p *play) unchanged(m *playMember, before, stored map[string]string) {
	p.Helper()
	sameState(p, m.name+" in memory", dump(m.Group), before)
	if !maps.Equal(m.store.m, stored) {
		p.Fatalf("%s: the store was written to", m.name)
	}
}

// receive hands a member a message of its group and knows what has to become of it.
func (p *play) receive(g *playGroup, m *playMember, s *playMessage) {
	p.Helper()
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	b, lost := p.batch(m)
	place := s.parent == m.at()
	got, err := m.Receive(b, wire(p, s.m))
	if err != nil {
		p.unchanged(m, before, stored)
		switch {
		case s.text != "":
			p.refusedText(m, s, err)
		case place && m.ReInit() != nil && errors.Is(err, ErrEnded):
		case s.commit == nil && place && s.by != m && !(m.read[s] && errors.Is(err, ErrGeneration)):
			p.Fatalf("%s refuses a proposal: %v", m.name, err)
		case s.commit != nil && place && s.by != m && s.known(m.Pending()):
			p.Fatalf("%s refuses a commit: %v", m.name, err)
		}
		return
	}
	switch r := got.(type) {
	case *ApplicationMessage:
		if string(r.Data) != s.text || s.by == m || m.read[s] || m.history[r.Epoch] != s.parent {
			p.Fatalf("%s reads %q of epoch %d, sent was %q", m.name, r.Data, r.Epoch, s.text)
		}
		m.read[s] = !lost
	case *ReceivedProposal:
		if s.by == nil { // its signature doesn't cover the group's state
			place = s.epoch == m.Epoch()
		}
		if !place || m.read[s] && s.m.Public == nil {
			p.Fatalf("%s takes a proposal of another epoch, or twice: %v", m.name, r.Proposal.Type)
		}
		m.read[s] = !lost
	case *StagedCommit:
		if !place {
			p.Fatalf("%s takes a commit of another epoch", m.name)
		}
		p.unchanged(m, before, stored)
		if m.resync != nil {
			if err := m.Apply(b, r); !errors.Is(err, ErrResync) {
				p.Fatalf("%s applies a commit while a resync waits: %v", m.name, err)
			}
			p.unchanged(m, before, stored)
			break
		}
		p.must(m.Apply(b, r))
		if !lost {
			p.moved(g, m, s)
		}
	case *OwnCommit:
		if r.Commit != m.PendingCommit() {
			p.Fatal("another own commit than the one staged")
		}
		p.must(m.Confirm(b))
		if !lost {
			p.moved(g, m, s)
		}
	case *Duplicate:
		if m.history[s.epoch+1] != after(s.parent, s) {
			p.Fatalf("%s takes a commit for one that it applied", m.name)
		}
		p.unchanged(m, before, stored)
	}
	if lost {
		p.cut(g, m)
	} else {
		p.checkMember(g, m)
	}
}

// refusedText says whether an application message may be refused.
func (p *play) refusedText(m *playMember, s *playMessage, err error) {
	p.Helper()
	epoch := s.epoch
	h, was := m.history[epoch]
	switch {
	case s.by == m && was && errors.Is(err, ErrOwnMessage) || m.read[s] && errors.Is(err, ErrGeneration):
	case s.by == m || m.read[s]:
		if epoch+defaultPastEpochs >= m.Epoch() && h == s.parent {
			p.Fatalf("%s, own %v, read %v: %v", m.name, s.by == m, m.read[s], err)
		}
	case h == s.parent && epoch+defaultPastEpochs >= m.Epoch():
		p.Fatalf("%s doesn't read a message of epoch %d in %d: %v", m.name, epoch, m.Epoch(), err)
	}
}

// tamper flips a bit of a message: nobody may act on it.
func (p *play) tamper(g *playGroup, m *playMember) {
	if len(g.sent) == 0 {
		return
	}
	s := g.sent[p.next()%len(g.sent)]
	raw := codec.Marshal(s.m)
	bit := (p.next()<<8 | p.next()) % (8 * len(raw))
	raw[bit/8] ^= 1 << (bit % 8)
	var msg MLSMessage
	if codec.Unmarshal(raw, &msg) != nil {
		return
	}
	if m != nil {
		before, stored := dump(m.Group), maps.Clone(m.store.m)
		got, err := m.Receive(m.store, &msg)
		switch r := got.(type) {
		case *StagedCommit:
			// An external commit has no membership tag, and whom it removes can't know its confirmation tag.
			if s.by == nil && r.Info().SelfRemoved && !bytes.Equal(msg.Public.ConfirmationTag, s.m.Public.ConfirmationTag) {
				break
			}
			p.Fatalf("%s accepts a commit with bit %d flipped", m.name, bit)
		case *OwnCommit, *ApplicationMessage:
			p.Fatalf("%s accepts a message with bit %d flipped: %T, %v", m.name, bit, got, err)
		}
		p.unchanged(m, before, stored)
	}
	// The server can't check the tags, and doesn't see the sender data; the confirmation tag is in the GroupInfo, too.
	var seen bool
	switch {
	case g.server == nil:
		return
	case msg.Public != nil:
		seen = bytes.Equal(msg.Public.MembershipTag, s.m.Public.MembershipTag)
	case msg.SemiPrivate != nil:
		seen = bytes.Equal(msg.SemiPrivate.EncryptedSenderData, s.m.SemiPrivate.EncryptedSenderData)
	default:
		return
	}
	before := dumpServer(g.server)
	if staged, err := g.checkCommit(&msg); err == nil {
		if err := staged.CheckGroupInfo(s.commit.info); err == nil && seen {
			p.Fatalf("server accepts a commit with bit %d flipped", bit)
		}
	}
	if staged, err := g.checkProposal(&msg); err == nil && seen {
		p.Fatalf("server accepts a proposal with bit %d flipped: %v", bit, staged.Proposal())
	}
	sameState(p, "server", dumpServer(g.server), before)
}

// checkMember compares a member with all who were ever in its epoch.
func (p *play) checkMember(g *playGroup, m *playMember) {
	p.Helper()
	sameState(p, m.name+" stored", m.store.m, dump(m.Group))
	if !m.Active() {
		return
	}
	if (m.PendingResync() != nil) != (m.resync != nil) {
		p.Fatalf("%s: a resync waits %v, should %v", m.name, m.PendingResync() != nil, m.resync != nil)
	}
	export, err := m.Export("play", nil, 16)
	p.must(err)
	e := playEpoch{string(codec.Marshal(m.Context())), string(m.EpochAuthenticator()), string(export), string(m.ConfirmationTag())}
	h := m.at()
	if other, ok := g.epochs[h]; ok && other != e {
		p.Fatalf("%s differs from others who applied the same commits", m.name)
	}
	g.epochs[h] = e
	if other, ok := g.authors[e.authenticator]; ok && other != h {
		p.Fatalf("%s has the authenticator of others who applied other commits", m.name)
	}
	g.authors[e.authenticator] = h
	if !bytes.Equal(m.Tree().Hash(testSuite), m.Context().TreeHash) {
		p.Fatalf("%s: tree hash differs from the context's", m.name)
	}
}

func (p *play) checkServer(g *playGroup) {
	p.Helper()
	if g.server == nil {
		return
	}
	sameState(p, "server stored", g.store.m, dumpServer(g.server))
	if e, ok := g.epochs[g.history]; ok && (e.context != string(codec.Marshal(g.server.Context())) || e.tag != string(g.server.ConfirmationTag())) {
		p.Fatal("the server differs from members who applied the same commits")
	}
}

// checkReceivers says whether a message opens for the receivers outside of the sender's group that this names, and for
// nobody else.
func (p *play) checkReceivers(s *playMessage) {
	p.Helper()
	if s.m.SemiPrivate == nil {
		if s.m.Public == nil || s.m.Public.Content.Proposal == nil || s.m.Public.Content.Proposal.Type != ProposalSelfRemove {
			p.Fatalf("%s sends a handshake of wire format %x", s.by.name, s.m.WireFormat)
		}
		return
	}
	named, err := externalReceivers(s.by.Context().Extensions)
	p.must(err)
	for i := range p.receivers {
		in := slices.ContainsFunc(named, func(x ExternalReceiver) bool { return bytes.Equal(x.PublicKey, p.receivers[i].PublicKey) })
		c, err := s.m.SemiPrivate.Open(testSuite, &p.receivers[i], p.keys[i])
		switch {
		case in != (err == nil):
			p.Fatalf("receiver %d, named %v: %v", i, in, err)
		case in && (c.Content().Sender.Leaf != s.by.OwnLeaf() || c.Content().Epoch != s.epoch):
			p.Fatalf("receiver %d opens a message of %v in epoch %d", i, c.Content().Sender, c.Content().Epoch)
		}
		if _, err := s.m.SemiPrivate.Open(testSuite, &p.receivers[i], p.keys[1-i]); err == nil {
			p.Fatalf("receiver %d opens with another's key", i)
		}
	}
}
