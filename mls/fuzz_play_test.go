package mls

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// FuzzGroups plays a program: operations of several clients in two groups, with a server for each that orders commits
// and may be lied about. In the second group handshakes are encrypted, and the server orders them unseen. Messages are delivered late, never, twice, out of order, to the other group and with a bit
// flipped; operations are cut off before their batch is durable, and groups loaded from their stores. After each step
// whoever applied the same commits agrees, whoever didn't has other secrets, the server agrees with the members, each
// store has what its group needs, what is refused changes nothing, and what is honest and in its place is accepted.
func FuzzGroups(f *testing.F) {
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		program := make([]byte, 40+20*seed)
		for i := range program {
			program[i] = byte(rnd.Uint32())
		}
		f.Add(program)
	}
	f.Fuzz(func(t *testing.T, program []byte) { newPlay(t, program).run() })
}

const (
	playClients = 5
	playGroups  = 2
	playSteps   = 32
)

// play is a run of a program.
type play struct {
	*testing.T
	program []byte
	rnd     *rand.ChaCha8
	groups  []*playGroup
	serial  int // of credentials and keys
}

// playGroup is a group with all messages that were ever sent in it.
type playGroup struct {
	id      int
	server  *PublicGroup // nil: unseen
	store   *memStore
	current *playCommit // that began the server's epoch
	history string      // of the server
	log     []*playMessage
	sent    []*playMessage
	members [playClients]*playMember // nil: not a member, as far as the client knows
	invites []*playInvite
	epochs  map[string]playEpoch // by history
	authors map[string]string    // history by epoch authenticator
}

// playMember is a client in a group. Its history is a hash over the commits that led to its epoch.
type playMember struct {
	*client
	signers []ed25519.PrivateKey
	history map[uint64]string // by epoch, since it joined
	cursor  int               // in the server's log
	read    map[*playMessage]bool
}

func (m *playMember) at() string { return m.history[m.Epoch()] }

// playMessage is a message as its sender made it.
type playMessage struct {
	m       *MLSMessage
	by      *playMember
	parent  string // history of the epoch it was sent in
	text    string // of application messages
	commit  *playCommit
	refs    [][]byte // of a commit's proposals
	epoch   uint64
	ordered bool // by the server
}

// playCommit is what goes with a commit.
type playCommit struct {
	info *GroupInfo
	tree *RatchetTree
}

// playInvite is a Welcome for a client.
type playInvite struct {
	client  int
	welcome *Welcome
	kp      *KeyPackage
	secrets *KeyPackageSecrets
	signer  ed25519.PrivateKey
	tree    *RatchetTree
	history string
	cursor  int
}

type playEpoch struct{ context, authenticator, export, tag string }

func newPlay(t *testing.T, program []byte) *play {
	p := &play{T: t, program: program, rnd: rand.NewChaCha8(sha256.Sum256(program))}
	external, err := testSuite.SignaturePublicKey(p.hub().Public())
	p.must(err)
	for id := range playGroups {
		g := &playGroup{id: id, store: newMemStore(), epochs: make(map[string]playEpoch), authors: make(map[string]string), history: fmt.Sprint("group ", id)}
		signer := p.signer(0, 0)
		c := &client{name: "0", signer: signer, store: newMemStore()}
		c.Group, err = NewGroup(p.config(id), c.store, GroupOptions{GroupID: []byte{byte('A' + id)}, Suite: testSuite, Credential: BasicCredential([]byte("0")),
			Signer: signer, Extensions: Extensions{
				{Type: ExtensionExternalSenders, Data: codec.Marshal(ExternalSenders{{SignatureKey: external, Credential: BasicCredential([]byte("hub"))}})},
				{Type: ExtensionRequiredCapabilities, Data: codec.Marshal(RequiredCapabilities{
					Extensions: []ExtensionType{ExtensionAppDataDictionary}, Proposals: []ProposalType{ProposalAppDataUpdate}})},
			}})
		p.must(err)
		gi, err := c.GroupInfo(true, true)
		p.must(err)
		g.current = &playCommit{gi, c.Tree()}
		if id == 0 {
			g.server, err = NewPublicGroup(publicConfig(), g.store, gi, nil)
			p.must(err)
		}
		g.members[0] = p.member(g, c, signer, g.history)
		p.groups = append(p.groups, g)
		p.checkMember(g, g.members[0])
	}
	return p
}

func (p *play) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *play) config(group int) Config {
	c := testConfig()
	c.Rand = p.rnd
	if group == 1 {
		c.HandshakeFormat = WireFormatPrivateMessage
	}
	return c
}

func (p *play) signer(client, serial int) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte{byte(client), byte(serial), byte(serial >> 8)})
	return ed25519.NewKeyFromSeed(seed[:])
}

func (p *play) hub() ed25519.PrivateKey { return p.signer(255, 0) }

func (p *play) member(g *playGroup, c *client, signer ed25519.PrivateKey, history string) *playMember {
	return &playMember{client: c, signers: []ed25519.PrivateKey{signer}, history: map[uint64]string{c.Epoch(): history},
		cursor: len(g.log), read: make(map[*playMessage]bool)}
}

// next reads the program; past its end it is zeros.
func (p *play) next() int {
	if len(p.program) == 0 {
		return 0
	}
	b := p.program[0]
	p.program = p.program[1:]
	return int(b)
}

func (p *play) run() {
	for range playSteps {
		if len(p.program) == 0 {
			break
		}
		op, who := p.next(), p.next()
		g := p.groups[who%playGroups]
		client := who / playGroups % playClients
		m := g.members[client]
		if m == nil && op%16 < 11 {
			op = 11 + op%2 // a client who isn't there joins
		}
		switch op % 16 {
		case 0, 1:
			p.propose(g, m)
		case 2, 3, 4:
			p.commit(g, m)
		case 5:
			p.settle(g, m)
		case 6, 7:
			p.sync(g, m, 1+p.next()%8)
		case 8:
			p.say(g, m)
		case 9, 10:
			p.deliver(g, m)
		case 11:
			p.accept(g, client)
		case 12:
			p.join(g, client)
		case 13:
			p.restart(g, m)
		case 14:
			p.outsider(g)
		case 15:
			p.tamper(g, m)
		}
		for _, g := range p.groups {
			p.checkServer(g)
		}
	}
	// In the end everyone who follows the server can be brought to its epoch, and reads what is said there.
	for _, g := range p.groups {
		for i := range g.members {
			if m := g.members[i]; m != nil {
				p.sync(g, m, len(g.log))
			}
		}
		for _, m := range g.members {
			if m == nil || m.at() != g.history || len(m.Pending()) > 0 {
				continue
			}
			p.say(g, m)
			for _, to := range g.members {
				if to != nil && to != m && to.at() == g.history {
					p.receive(g, to, g.sent[len(g.sent)-1])
				}
			}
			break
		}
	}
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
	kp, secrets, err := NewKeyPackage(KeyPackageOptions{Rand: p.rnd, Suite: testSuite, Credential: BasicCredential([]byte{byte('0' + client)}), Signer: signer})
	p.must(err)
	return kp, secrets, signer
}

func (p *play) propose(g *playGroup, m *playMember) {
	b, lost := p.batch(m)
	signers := len(m.signers)
	var msg *MLSMessage
	var err error
	switch p.next() % 7 {
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
		msg, err = m.Propose(b, nil, appData(0x8001, "+"))
	case 4:
		msg, err = m.Propose(b, nil, sharedPSK())
	case 5:
		msg, err = m.Propose(b, nil, p.context(m))
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

// send notes a message and offers it to the server, unless that doesn't get it.
func (p *play) send(g *playGroup, s *playMessage) bool {
	p.Helper()
	g.sent = append(g.sent, s)
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
	m := wire(p, s.m).Public
	if s.commit == nil {
		staged, err := g.server.CheckProposal(m)
		if err != nil {
			// Of what the server refuses in its place there is only what doesn't fit a group alone.
			if place && !errors.Is(err, ErrUnsupported) && (m.Content.Sender.Type != SenderExternal) {
				p.Fatalf("server refuses a proposal of %v: %v", m.Content.Proposal.Type, err)
			}
			sameState(p, "server", dumpServer(g.server), before)
			return false
		}
		if !place {
			p.Fatal("server takes a proposal of another epoch")
		}
		p.must(g.server.ApplyProposal(g.store, staged))
	} else {
		staged, err := g.server.CheckCommit(m)
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

func (p *play) commit(g *playGroup, m *playMember) {
	b, lost := p.batch(m)
	flags := p.next()
	o := CommitOptions{ForcePath: flags&1 != 0, SkipPending: flags&6 == 6}
	signers := len(m.signers)
	var invites []*playInvite
	for range flags >> 3 & 3 {
		switch p.next() % 5 {
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
			o.Proposals = append(o.Proposals, sharedPSK())
		case 4:
			if len(invites) > 0 {
				continue // a joiner doesn't have that key
			}
			o.Proposals = append(o.Proposals, psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageApplication, GroupID: m.GroupID(), Epoch: m.Epoch()}))
		}
	}
	if c, s := p.renewal(m); c != nil {
		o.Credential, o.Signer = c, s
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
		i.welcome, i.history = c.Welcome(), after(parent, s)
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
				g.members[i] = nil
			}
		}
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

// sync hands a member the next entries of the server's log.
func (p *play) sync(g *playGroup, m *playMember, n int) {
	for ; n > 0 && m.cursor >= 0 && m.cursor < len(g.log) && m.Active(); n-- {
		s := g.log[m.cursor]
		m.cursor++
		p.receive(g, m, s)
	}
}

// deliver hands a member any message.
func (p *play) deliver(g *playGroup, m *playMember) {
	from := g
	if p.next()%8 == 7 {
		from = p.groups[1-g.id]
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
		if !place || m.read[s] && s.m.Private != nil {
			p.Fatalf("%s takes a proposal of another epoch, or twice: %v", m.name, r.Proposal.Type)
		}
		m.read[s] = !lost
	case *StagedCommit:
		if !place {
			p.Fatalf("%s takes a commit of another epoch", m.name)
		}
		p.unchanged(m, before, stored)
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

// accept has a client join by a Welcome. What it had of the group before is gone.
func (p *play) accept(g *playGroup, client int) {
	for n := len(g.invites) - 1; n >= 0; n-- {
		i := g.invites[n]
		if i.client != client {
			continue
		}
		g.invites = append(g.invites[:n:n], g.invites[n+1:]...)
		c := newClient(client, i.signer)
		var tree *RatchetTree
		var err error
		if i.tree != nil {
			tree = fresh(p, i.tree)
		}
		c.Group, err = JoinGroup(p.config(g.id), c.store, i.signer, wire(p, NewMLSMessage(i.welcome)).Welcome, i.kp, i.secrets, tree)
		p.must(err)
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
	p.serial++
	signer := p.signer(client, p.serial)
	o := ExternalJoinOptions{GroupInfo: g.current.info, Tree: fresh(p, g.current.tree), Credential: BasicCredential([]byte{byte('0' + client)}), Signer: signer}
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
	if g.server == nil {
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
		switch got.(type) {
		case *StagedCommit, *OwnCommit, *ApplicationMessage:
			p.Fatalf("%s accepts a message with bit %d flipped: %T, %v", m.name, bit, got, err)
		}
		p.unchanged(m, before, stored)
	}
	if msg.Public == nil || g.server == nil {
		return
	}
	before := dumpServer(g.server)
	if staged, err := g.server.CheckCommit(msg.Public); err == nil {
		// It can't check the tags; the confirmation tag is in the GroupInfo, too.
		if err := staged.CheckGroupInfo(s.commit.info); err == nil && bytes.Equal(msg.Public.MembershipTag, s.m.Public.MembershipTag) {
			p.Fatalf("server accepts a commit with bit %d flipped", bit)
		}
	}
	if staged, err := g.server.CheckProposal(msg.Public); err == nil && bytes.Equal(msg.Public.MembershipTag, s.m.Public.MembershipTag) {
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
