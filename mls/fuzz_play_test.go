package mls

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// FuzzGroups plays a program: operations of several clients in three groups, with a server for each that orders commits
// and may be lied about. In the second group handshakes are encrypted, and the server orders them unseen; in the third
// they are encrypted to the server too, and sometimes to another receiver. Messages are delivered late, never, twice, out
// of order, to another group and with a bit flipped; operations are cut off before their batch is durable, groups loaded
// from their stores, and the states of members replaced. After each step whoever applied the same commits agrees, whoever
// didn't has other secrets, the server agrees with the members, each store has what its group needs, what is refused
// changes nothing, what may be done once isn't done twice, and what is honest and in its place is accepted.
func FuzzGroups(f *testing.F) {
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		program := make([]byte, 40+20*seed)
		for i := range program {
			program[i] = byte(rnd.Uint32())
		}
		f.Add(program)
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if testing.Short() && sha256.Sum256(program)[0]%4 != 0 {
			t.Skip("every fourth with -short")
		}
		newPlay(t, program).run()
	})
}

const (
	playClients = 5
	playGroups  = 3
	playSteps   = 32
)

// The groups, by how their members send handshakes.
const (
	playPublic = iota
	playPrivate
	playSemiPrivate
)

// play is a run of a program.
type play struct {
	*testing.T
	program []byte
	rnd     *rand.ChaCha8
	groups  []*playGroup
	serial  int // of credentials and keys

	receivers ExternalReceivers // the server and another one
	keys      []HPKEPrivateKey
}

// playGroup is a group with all messages that were ever sent in it.
type playGroup struct {
	room      // its server, nil: unseen
	id        int
	current   *playCommit // that began the server's epoch
	history   string      // of the server
	log       []*playMessage
	sent      []*playMessage
	members   [playClients]*playMember // nil: not a member, as far as the client knows
	former    [playClients]*playMember // removed, with what they have left
	invites   []*playInvite
	epochs    map[string]playEpoch  // by history
	authors   map[string]string     // history by epoch authenticator
	exports   map[playExport]string // secrets of components
	exporters map[string]playExport
}

// playMember is a client in a group. Its history is a hash over the commits that led to its epoch.
type playMember struct {
	*client
	signers []ed25519.PrivateKey
	history map[uint64]string // by epoch, since it joined
	cursor  int               // in the server's log
	read    map[*playMessage]bool
	taken   map[playExport]bool
	resync  *playMessage // that waits
	used    *GroupInfo   // of the last resync
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
	epoch   uint64
	cursor  int
	link    int         // how the group follows from another one, if the Welcome is its first
	parent  *playMember // in that group, nil if the client isn't in it
	from    string      // history of that group
}

type playEpoch struct{ context, authenticator, export, tag string }

// playExport is a component in an epoch.
type playExport struct {
	history   string
	component ComponentID
}

func newPlay(t *testing.T, program []byte) *play {
	p := &play{T: t, program: program, rnd: rand.NewChaCha8(sha256.Sum256(program))}
	external, err := testSuite.SignaturePublicKey(p.hub().Public())
	p.must(err)
	for _, name := range []string{"hub", "auditor"} {
		pub, key, err := testSuite.GenerateHPKEKey(p.rnd)
		p.must(err)
		p.receivers, p.keys = append(p.receivers, ExternalReceiver{pub, BasicCredential([]byte(name))}), append(p.keys, key)
	}
	for id := range playGroups {
		signer := p.signer(0, 0)
		c := &client{name: "0", signer: signer, store: newMemStore()}
		ext := Extensions{
			{Type: ExtensionExternalSenders, Data: codec.Marshal(ExternalSenders{{SignatureKey: external, Credential: BasicCredential([]byte("hub"))}})},
			{Type: ExtensionRequiredCapabilities, Data: codec.Marshal(RequiredCapabilities{
				Extensions: []ExtensionType{ExtensionAppDataDictionary}, Proposals: []ProposalType{ProposalAppDataUpdate}})},
		}
		if id == playSemiPrivate {
			ext = append(ext, Extension{ExtensionRequiredWireFormats, codec.Marshal(WireFormats{WireFormatSemiPrivateMessage})},
				Extension{ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary(nil).Set(ComponentExternalReceivers, codec.Marshal(p.receivers[:1+len(program)%2])))})
		}
		c.Group, err = NewGroup(p.config(id), c.store, GroupOptions{GroupID: []byte{byte('A' + id)}, Suite: testSuite,
			Credential: BasicCredential([]byte("0")), Signer: signer, LeafExtensions: playLeaf(), Extensions: ext})
		p.must(err)
		p.groups = append(p.groups, p.group(id, 0, c, signer))
	}
	return p
}

// group is a new group of a client, with its server.
func (p *play) group(id, client int, c *client, signer ed25519.PrivateKey) *playGroup {
	p.Helper()
	p.serial++
	g := &playGroup{id: id, room: room{store: newMemStore()}, epochs: make(map[string]playEpoch), authors: make(map[string]string),
		exports: make(map[playExport]string), exporters: make(map[string]playExport), history: fmt.Sprint("group ", p.serial)}
	g.receive = func(m *SemiPrivateMessage) (*SemiPrivateContent, error) {
		return m.Open(testSuite, &p.receivers[0], p.keys[0])
	}
	gi, err := c.GroupInfo(true, true)
	p.must(err)
	g.current = &playCommit{gi, c.Tree()}
	if id != playPrivate {
		g.server, err = NewPublicGroup(publicConfig(), g.store, gi, nil)
		p.must(err)
	}
	g.members[client] = p.member(g, c, signer, g.history)
	p.checkMember(g, g.members[client])
	return g
}

// The links of groups.
const (
	playSuccessor = 1 + iota
	playBranch
)

func (p *play) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *play) config(group int) Config {
	c := testConfig()
	c.Rand = p.rnd
	c.HandshakeFormat = []WireFormat{WireFormatPublicMessage, WireFormatPrivateMessage, WireFormatSemiPrivateMessage}[group]
	return c
}

// playLeaf are the extensions of all leaves.
func playLeaf() Extensions {
	return Extensions{{ExtensionSupportedWireFormats, codec.Marshal(WireFormats{WireFormatSemiPrivateMessage})}}
}

func (p *play) signer(client, serial int) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte{byte(client), byte(serial), byte(serial >> 8)})
	return ed25519.NewKeyFromSeed(seed[:])
}

func (p *play) hub() ed25519.PrivateKey { return p.signer(255, 0) }

func (p *play) member(g *playGroup, c *client, signer ed25519.PrivateKey, history string) *playMember {
	return &playMember{client: c, signers: []ed25519.PrivateKey{signer}, history: map[uint64]string{c.Epoch(): history},
		cursor: len(g.log), read: make(map[*playMessage]bool), taken: make(map[playExport]bool)}
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
		op %= 19
		if m == nil && (op < 11 || op > 16) {
			op = 11 + op%2 // a client who isn't there joins
		}
		if m != nil && m.resync != nil && (op < 6 || op == 8 || op == 16 || op == 17) {
			p.waiting(g, m, client)
			continue
		}
		if m != nil && m.ReInit() != nil && op != 13 && (op != 17 || m.at() == g.history) {
			p.succeed(g, m, client)
			continue
		}
		switch op {
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
		case 16:
			if m != nil && p.next()%4 == 0 {
				p.follow(g, m, client, playBranch)
			}
		case 17:
			p.resync(g, m)
		case 18:
			p.export(g, m)
		}
		for _, g := range p.groups {
			p.checkServer(g)
		}
	}
	// In the end everyone who follows the server can be brought to its epoch, reads what is said there, and takes the same
	// secret, and so does who comes in.
	for _, g := range p.groups {
		p.gather(g)
		for _, m := range g.members {
			if m == nil || m.at() != g.history || len(m.Pending()) > 0 || m.ReInit() != nil {
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
		for client := range g.members {
			p.accept(g, client)
		}
		p.gather(g)
		for _, m := range g.members {
			if m != nil {
				p.export(g, m)
			}
		}
	}
}

// gather has all members hear what the server ordered.
func (p *play) gather(g *playGroup) {
	for i := range g.members {
		if m := g.members[i]; m != nil {
			if m.resync != nil {
				p.settleResync(g, m, i)
			}
			p.sync(g, m, len(g.log))
		}
	}
}
