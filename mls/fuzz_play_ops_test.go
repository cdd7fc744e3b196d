package mls

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// succeed has a member of a group that has ended find that nothing else can be done with it, and make its successor.
func (p *play) succeed(g *playGroup, m *playMember, client int) {
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	_, err1 := m.Commit(m.store, CommitOptions{})
	_, err2 := m.Propose(m.store, nil, sharedPSK())
	_, err3 := m.Encrypt(m.store, nil, []byte("x"))
	for _, err := range []error{err1, err2, err3} {
		if !errors.Is(err, ErrEnded) {
			p.Fatalf("%s in a group that has ended: %v", m.name, err)
		}
	}
	p.unchanged(m, before, stored)
	if m.at() == g.history {
		p.follow(g, m, client, playSuccessor)
	}
}

// follow has a member make a group that follows from g and takes its place.
func (p *play) follow(g *playGroup, m *playMember, client, link int) {
	var invites []*playInvite
	p.serial++
	signer := p.signer(client, p.serial)
	o := LinkOptions{Credential: BasicCredential([]byte(m.name)), Signer: signer, LeafExtensions: playLeaf(),
		TreeInWelcome: true, ForcePath: p.next()%2 == 0}
	for other := range m.Members() {
		c := int(other.Leaf.Credential.Identity[0] - '0')
		if c == client || link == playBranch && p.next()%3 == 0 {
			continue
		}
		kp, secrets, signer := p.keyPackage(c)
		o.KeyPackages = append(o.KeyPackages, kp)
		invites = append(invites, &playInvite{client: c, kp: kp, secrets: secrets, signer: signer, parent: g.members[c]})
	}
	c := newClient(client, signer)
	var w *Welcome
	var err error
	if link == playBranch {
		c.Group, w, err = m.NewBranch(c.store, fmt.Append(nil, "branch ", p.serial), m.Context().Extensions, o)
	} else {
		c.Group, w, err = m.NewSuccessor(c.store, o)
	}
	p.must(err)
	p.checkMember(g, m)
	next := p.group(g.id, client, c, signer)
	for _, i := range invites {
		i.welcome, i.history, i.link, i.from = w, next.history, link, m.at()
	}
	next.invites = invites
	p.groups[g.id] = next
}

// batch returns the store to write to. If the program says so, the operation is cut off: nothing that it wrote becomes
// durable and nothing that it returned gets out, and the caller calls cut afterwards.
func (p *play) batch(m *playMember) (b Batch, lost bool) {
	if p.next()%16 == 15 {
		return m.store.clone(), true
	}
	return m.store, false
}

func (p *play) cut(g *playGroup, m *playMember) {
	p.Helper()
	p.reload(g, m)
	p.checkMember(g, m)
}

func (p *play) reload(g *playGroup, m *playMember) {
	p.Helper()
	loaded, err := LoadGroup(p.config(g.id), m.signers[0], m.store.all())
	p.must(err)
	for _, s := range m.signers[1:] {
		p.must(loaded.AddSigner(s))
	}
	m.Group = loaded
}

// renewal returns a credential and signer that may replace those of the member.
func (p *play) renewal(m *playMember) (*Credential, ed25519.PrivateKey) {
	if p.next()%4 != 3 {
		return nil, nil
	}
	p.serial++
	c := BasicCredential(fmt.Appendf(nil, "%s#%d", m.name, p.serial))
	signer := p.signer(int(m.name[0]-'0'), p.serial)
	m.signers = append(m.signers, signer)
	return &c, signer
}

// leaf picks another member's leaf.
func (p *play) leaf(m *playMember) (LeafIndex, bool) {
	var all []LeafIndex
	for o := range m.Members() {
		if o.Index != m.OwnLeaf() {
			all = append(all, o.Index)
		}
	}
	if len(all) == 0 {
		return 0, false
	}
	return all[p.next()%len(all)], true
}

// absent picks a client that isn't in the group as a member sees it.
func (p *play) absent(members func(func(Member) bool)) (int, bool) {
	first := p.next()
	for i := range playClients {
		c := (first + i) % playClients
		in := false
		for o := range members {
			in = in || int(o.Leaf.Credential.Identity[0]-'0') == c
		}
		if !in {
			return c, true
		}
	}
	return 0, false
}

func (p *play) keyPackage(client int) (*KeyPackage, *KeyPackageSecrets, ed25519.PrivateKey) {
	p.serial++
	signer := p.signer(client, p.serial)
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{Rand: p.rnd, Suite: testSuite, Credential: BasicCredential([]byte{byte('0' + client)}), Signer: signer,
		LeafExtensions: playLeaf()})
	p.must(err)
	return kp, secrets, signer
}

func (p *play) propose(g *playGroup, m *playMember) {
	b, lost := p.batch(m)
	signers := len(m.signers)
	var msg *MLSMessage
	var err error
	switch p.next() % 8 {
	case 0:
		o := UpdateOptions{}
		if c, s := p.renewal(m); c != nil {
			o.Credential, o.Signer = c, s
		}
		msg, err = m.ProposeUpdate(b, o)
	case 1:
		at, ok := p.leaf(m)
		if !ok {
			return
		}
		msg, err = m.Propose(b, nil, remove(at))
	case 2:
		c, ok := p.absent(m.Members())
		if !ok {
			return
		}
		kp, _, _ := p.keyPackage(c) // if it is committed, a member who never comes
		msg, err = m.Propose(b, nil, add(kp))
	case 3:
		update := appData(0x8001, "+")
		if g.id == playSemiPrivate && p.next()%4 != 3 {
			update = p.nameReceivers()
		}
		msg, err = m.Propose(b, nil, update)
	case 4:
		msg, err = m.Propose(b, nil, sharedPSK())
	case 5:
		msg, err = m.Propose(b, nil, p.context(m))
	case 7:
		msg, err = m.Propose(b, nil, p.reinit(m))
	case 6:
		if slices.ContainsFunc(m.Pending(), func(e PendingProposal) bool {
			return e.Proposal.Type == ProposalSelfRemove && e.Sender.Leaf == m.OwnLeaf()
		}) {
			return
		}
		msg, err = m.ProposeSelfRemove(b)
	}
	p.must(err)
	if lost {
		m.signers = m.signers[:signers]
		p.cut(g, m)
		return
	}
	p.checkMember(g, m)
	p.send(g, &playMessage{m: msg, by: m, parent: m.at(), epoch: m.Epoch()})
}

// reinit is a proposal to end the group and go on in another one.
func (p *play) reinit(m *playMember) Proposal {
	p.serial++
	return Proposal{Type: ProposalReInit, ReInit: &ReInit{GroupID: fmt.Append(nil, "successor ", p.serial), Version: MLS10,
		CipherSuite: testSuite, Extensions: m.Context().Extensions}}
}

// nameReceivers is a proposal to name the server alone as a receiver of handshakes, or the other one too.
func (p *play) nameReceivers() Proposal {
	return setTerms(ComponentExternalReceivers, p.receivers[:1+p.next()%2])
}

// context is a group_context_extensions proposal that takes the external senders out, or puts them in again.
func (p *play) context(m *playMember) Proposal {
	ext := m.Context().Extensions
	key, err := testSuite.SignaturePublicKey(p.hub().Public())
	p.must(err)
	if _, ok := ext.Find(ExtensionExternalSenders); ok {
		ext = ext.Remove(ExtensionExternalSenders)
	} else {
		ext = ext.Set(ExtensionExternalSenders, codec.Marshal(ExternalSenders{{SignatureKey: key, Credential: BasicCredential([]byte("hub"))}}))
	}
	return Proposal{Type: ProposalGroupContextExtensions, GroupContextExtensions: &GroupContextExtensions{Extensions: ext}}
}

func (p *play) commit(g *playGroup, m *playMember) {
	b, lost := p.batch(m)
	flags := p.next()
	o := CommitOptions{ForcePath: flags&1 != 0, SkipPending: flags&6 == 6}
	signers := len(m.signers)
	var invites []*playInvite
	for range flags >> 3 & 3 {
		switch p.next() % 6 {
		case 0, 1:
			c, ok := p.absent(m.Members())
			if !ok || len(o.Proposals) > 0 {
				continue
			}
			kp, secrets, signer := p.keyPackage(c)
			o.Proposals = append(o.Proposals, add(kp))
			invites = append(invites, &playInvite{client: c, kp: kp, secrets: secrets, signer: signer})
		case 2:
			at, ok := p.leaf(m)
			if ok && len(o.Proposals) == 0 {
				o.Proposals = append(o.Proposals, remove(at))
			}
		case 3:
			if g.id == playSemiPrivate && len(o.Proposals) == 0 {
				o.Proposals = append(o.Proposals, p.nameReceivers())
				continue
			}
			o.Proposals = append(o.Proposals, sharedPSK())
		case 4:
			if len(invites) > 0 {
				continue // a joiner doesn't have that key
			}
			o.Proposals = append(o.Proposals, psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageApplication, GroupID: m.GroupID(), Epoch: m.Epoch()}))
		case 5: // a member who may come in anew
			at, ok := p.leaf(m)
			if !ok || len(o.Proposals) > 0 {
				continue
			}
			c := int(m.Tree().Leaf(at).Credential.Identity[0] - '0')
			kp, secrets, signer := p.keyPackage(c)
			o.Proposals = append(o.Proposals, remove(at), add(kp))
			invites = append(invites, &playInvite{client: c, kp: kp, secrets: secrets, signer: signer})
		}
	}
	if c, s := p.renewal(m); c != nil {
		o.Credential, o.Signer = c, s
	}
	if len(o.Proposals) == 0 && o.Credential == nil && p.next()%8 == 7 {
		o = CommitOptions{Proposals: []Proposal{p.reinit(m)}, SkipPending: true}
	}
	o.TreeInWelcome = flags&32 != 0
	staged, parent := m.PendingCommit() != nil, m.at()
	c, err := m.Commit(b, o)
	switch {
	case staged != errors.Is(err, ErrStaged):
		p.Fatalf("commit with one staged %v: %v", staged, err)
	case staged:
		m.signers = m.signers[:signers]
		return
	}
	p.must(err)
	if lost {
		m.signers = m.signers[:signers]
		p.cut(g, m)
		return
	}
	p.checkMember(g, m)
	s := &playMessage{m: c.Message(), by: m, parent: parent, epoch: m.Epoch(), commit: &playCommit{c.GroupInfo(), c.Tree()}}
	for _, e := range c.Info().Proposals {
		if e.Ref != nil {
			s.refs = append(s.refs, e.Ref)
		}
	}
	ordered := p.send(g, s)
	for _, i := range invites {
		i.welcome, i.history, i.epoch = c.Welcome(), after(parent, s), c.Epoch()
		if !o.TreeInWelcome {
			i.tree = c.Tree()
		}
		if i.cursor = len(g.log); !ordered {
			i.cursor = -1 // of a fork, as long as the server doesn't accept it
		}
	}
	g.invites = append(g.invites, invites...)
	switch {
	case flags>>6 == 3: // hears the answer later, or takes what another committed
	case ordered || flags>>6 == 2: // or believes the commit to be accepted
		p.confirm(g, m, s)
	default:
		p.must(m.Drop(m.store))
		p.checkMember(g, m)
	}
}

// settle tells a member what became of its staged commit, or makes it forget it.
func (p *play) settle(g *playGroup, m *playMember) {
	c := m.PendingCommit()
	if c == nil {
		return
	}
	for _, s := range g.sent {
		if s.commit == nil || !bytes.Equal(codec.Marshal(s.m), codec.Marshal(c.Message())) {
			continue
		}
		if s.ordered || p.order(g, s) {
			p.confirm(g, m, s)
			return
		}
	}
	p.must(m.Drop(m.store))
	p.checkMember(g, m)
}

func (p *play) say(g *playGroup, m *playMember) {
	b, lost := p.batch(m)
	p.serial++
	text := fmt.Sprint("text ", p.serial)
	pending := len(m.Pending()) > 0
	before, stored := dump(m.Group), maps.Clone(m.store.m)
	msg, err := m.Encrypt(b, nil, []byte(text))
	if pending != errors.Is(err, ErrPending) {
		p.Fatalf("pending %v: %v", pending, err)
	}
	if pending {
		p.unchanged(m, before, stored)
		return
	}
	p.must(err)
	if lost {
		p.cut(g, m)
		return
	}
	p.checkMember(g, m)
	g.sent = append(g.sent, &playMessage{m: msg, by: m, parent: m.at(), epoch: m.Epoch(), text: text})
}

// accept has a client join by a Welcome, which replaces what it had of the group before, or else that is gone.
func (p *play) accept(g *playGroup, client int) {
	for n := len(g.invites) - 1; n >= 0; n-- {
		i := g.invites[n]
		if i.client != client {
			continue
		}
		g.invites = append(g.invites[:n:n], g.invites[n+1:]...)
		c := newClient(client, i.signer)
		w := wire(p, NewMLSMessage(i.welcome)).Welcome
		var tree *RatchetTree
		var err error
		if i.tree != nil {
			tree = fresh(p, i.tree)
		}
		if m := cmp.Or(g.members[client], g.former[client]); m != nil && i.link == 0 && p.next()%2 == 0 {
			p.rejoin(g, m, i, w, tree)
			return
		}
		switch {
		case i.link == playSuccessor && i.parent != nil:
			c.Group, err = i.parent.JoinSuccessor(c.store, i.signer, w, i.kp, i.secrets, tree)
			if ended := i.parent.at() == i.from; ended != (err == nil) {
				p.Fatalf("%s, whose group has ended so %v: %v", i.parent.name, ended, err)
			}
		case i.link == playBranch && i.parent != nil:
			c.Group, err = i.parent.JoinBranch(c.store, i.signer, w, i.kp, i.secrets, tree)
		default:
			c.Group, err = JoinGroup(p.config(g.id), c.store, i.signer, w, i.kp, i.secrets, tree)
			if (err == nil) != (i.link == 0) {
				p.Fatalf("join of a group that follows from another one %v: %v", i.link != 0, err)
			}
		}
		if err != nil {
			return
		}
		m := p.member(g, c, i.signer, i.history)
		m.cursor = i.cursor
		for at, s := range g.log {
			if s.commit != nil && after(s.parent, s) == i.history {
				m.cursor = at + 1
			}
		}
		g.members[client] = m
		p.checkMember(g, m)
		return
	}
}

func newClient(i int, signer ed25519.PrivateKey) *client {
	return &client{name: fmt.Sprint(i), signer: signer, store: newMemStore()}
}

// join has a client join by an external commit, which removes its former leaf.
func (p *play) join(g *playGroup, client int) {
	flags := p.next()
	if g.server != nil && g.server.ReInit() != nil {
		return // a GroupInfo doesn't show that its group has ended; the server doesn't give it out any more
	}
	p.serial++
	signer := p.signer(client, p.serial)
	o := ExternalJoinOptions{GroupInfo: g.current.info, Tree: fresh(p, g.current.tree), Credential: BasicCredential([]byte{byte('0' + client)}), Signer: signer,
		LeafExtensions: playLeaf()}
	for i, l := range g.current.tree.Leaves() {
		if int(l.Credential.Identity[0]-'0') == client {
			o.Proposals = append(o.Proposals, remove(i))
		}
	}
	if flags&1 != 0 {
		o.Proposals = append(o.Proposals, sharedPSK())
	}
	parent := g.history
	j, err := ExternalJoin(p.config(g.id), o)
	p.must(err)
	if flags&2 != 0 {
		j, err = LoadPendingJoin(p.config(g.id), signer, codec.Marshal(j))
		p.must(err)
	}
	s := &playMessage{m: j.Message(), parent: parent, epoch: j.Epoch() - 1, commit: &playCommit{j.GroupInfo(), j.Tree()}}
	if !p.send(g, s) && flags&12 != 12 {
		return
	}
	c := newClient(client, signer)
	c.Group, err = j.Confirm(c.store)
	p.must(err)
	m := p.member(g, c, signer, after(parent, s))
	if !s.ordered {
		m.cursor = -1
	}
	g.members[client] = m
	p.checkMember(g, m)
}

func (p *play) restart(g *playGroup, m *playMember) {
	if m == nil && g.server == nil {
		return
	}
	if g.server != nil && (m == nil || p.next()%4 == 0) {
		before := dumpServer(g.server)
		var err error
		g.server, err = LoadPublicGroup(publicConfig(), g.store.all())
		p.must(err)
		sameState(p, "server", dumpServer(g.server), before)
		return
	}
	before := dump(m.Group)
	p.reload(g, m)
	sameState(p, m.name, dump(m.Group), before)
}

// outsider has the hub, or a client who isn't in the group, propose.
func (p *play) outsider(g *playGroup) {
	if g.server == nil || g.server.ReInit() != nil {
		return
	}
	id, epoch := g.server.GroupID(), g.server.Epoch()
	var msg *MLSMessage
	var err error
	switch p.next() % 2 {
	case 0:
		i := p.next() % int(g.server.Tree().Size())
		msg, err = ExternalProposal(testSuite, p.rnd, p.hub(), 0, id, epoch, nil, remove(LeafIndex(i)))
		_, there := g.server.Member(LeafIndex(i))
		if _, ok := g.server.Extension(ExtensionExternalSenders); !ok || !there {
			return
		}
	case 1:
		c, ok := p.absent(g.server.Members())
		if !ok {
			return
		}
		kp, _, signer := p.keyPackage(c)
		msg, err = NewMemberProposal(p.rnd, signer, kp, id, epoch, nil)
	}
	p.must(err)
	p.send(g, &playMessage{m: msg, parent: g.history, epoch: epoch})
}
