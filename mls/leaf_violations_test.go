package mls

import (
	"github.com/parley-mls/parley/mls/codec"
)

func withExternalPath(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return external(forged{leaf: edit}, (*forgery).externalInit)
}

func noVersions(l *LeafNode)    { l.Capabilities.Versions = nil }
func noSuites(l *LeafNode)      { l.Capabilities.CipherSuites = nil }
func noCredentials(l *LeafNode) { l.Capabilities.Credentials = nil }
func noProposals(l *LeafNode)   { l.Capabilities.Proposals = nil }
func unlisted(l *LeafNode)      { l.Extensions = Extensions{{Type: 0xf00d}} }
func twice(l *LeafNode)         { l.Extensions = Extensions{{Type: 1}, {Type: 1}} }
func shortKey(l *LeafNode)      { l.EncryptionKey = []byte("short") }

func inKeyPackage(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return withKeyPackage(func(kp *KeyPackage) { edit(&kp.LeafNode) })
}

func inRequest(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return withRequest(func(kp *KeyPackage) { edit(&kp.LeafNode) })
}

// leafViolations are rules on leaves wherever they come from: an Update, an Add, a member's path and the path of an
// external commit.
var leafViolations = []violation{
	{"13.4", "update: extension twice", everyone, nil, withUpdate(twice)},
	{"7.2", "path: version not listed", everyone, nil, withLeaf(noVersions)},
	{"7.2", "path: suite not listed", everyone, nil, withLeaf(noSuites)},
	{"13.4", "path: extension twice", everyone, nil, withLeaf(twice)},
	{"11.1", "path: required proposal", everyone, nil, withLeaf(noProposals)},
	{"7.2", "add: version not listed", everyone, nil, inKeyPackage(noVersions)},
	{"7.2", "add: credential type not listed", everyone, nil, inKeyPackage(noCredentials)},
	{"10.1", "add: encryption key is not a key", everyone, nil, inKeyPackage(shortKey)},
	{"13.4", "add: extension of the leaf twice", everyone, nil, inKeyPackage(twice)},
	{"13.4", "add: extension of the key package twice", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.Extensions = Extensions{{Type: 1}, {Type: 1}} })},
	{"10", "add: extension of the key package not listed", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.Extensions = Extensions{{Type: 0xf00d}} })},
	{"7.2", "add: lifetime that ends before it begins", everyone, nil, inKeyPackage(func(l *LeafNode) { l.Lifetime = Lifetime{2, 1} })},
	{"7.3", "add: lifetime to come", serverOnly, nil, inKeyPackage(func(l *LeafNode) { l.Lifetime = Lifetime{1 << 40, 1<<40 + 1} })},
	{"7.3", "add: two with one signature key", everyone, nil, func(f *forgery) *MLSMessage {
		signer := newSigner(f.TB, testSuite)
		return f.commit(forged{props: []Proposal{f.keyPackage("new", signer, nil), f.keyPackage("newer", signer, nil)}, noPath: true})
	}},
	{"7.3", "add: two with one encryption key", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.keyPackage("x", nil, nil).Add.KeyPackage.LeafNode.EncryptionKey
		same := func(kp *KeyPackage) { kp.LeafNode.EncryptionKey = key }
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, same), f.keyPackage("newer", nil, same)}, noPath: true})
	}},
	{"7.3", "add: without a credential type in use", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, func(kp *KeyPackage) {
			kp.LeafNode.Credential = X509Credential([][]byte{{1}})
			kp.LeafNode.Capabilities.Credentials = []CredentialType{CredentialX509}
		})}, noPath: true})
	}},
	{"10.1", "request to be added: version", everyone, nil, withRequest(func(kp *KeyPackage) { kp.Version = 2 })},
	{"7.2", "request to be added: suite not listed", everyone, nil, inRequest(noSuites)},
	{"7.3", "committed update: signature key of a member", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{refs: [][]byte{f.pend(f.proposal(f.carol, f.update(f.carol, f.bob.signer, func(l *LeafNode) { l.SignatureKey = f.bob.state.tree.Leaf(1).SignatureKey })))}})
	}},
	{"7.3", "committed update: encryption key of a member", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{refs: [][]byte{f.pend(f.proposal(f.carol, f.update(f.carol, nil, func(l *LeafNode) { l.EncryptionKey = f.bob.state.tree.Leaf(1).EncryptionKey })))}})
	}},
	{"12.4", "committed update without a path", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{refs: [][]byte{f.pend(f.proposal(f.carol, f.update(f.carol, nil, nil)))}, noPath: true})
	}},

	{"7.3", "two nodes of a path with one key", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{keys: func(keys []HPKEPublicKey) { keys[1] = keys[0] }})
	}},

	{"7.2", "external commit: version not listed", everyone, nil, withExternalPath(noVersions)},
	{"7.2", "external commit: suite not listed", everyone, nil, withExternalPath(noSuites)},
	{"7.2", "external commit: credential type not listed", everyone, nil, withExternalPath(noCredentials)},
	{"7.3", "external commit: extension not listed", everyone, nil, withExternalPath(unlisted)},
	{"13.4", "external commit: extension twice", everyone, nil, withExternalPath(twice)},
	{"7.3", "external commit: source", everyone, nil, withExternalPath(func(l *LeafNode) { l.Source = LeafNodeKeyPackage })},
	{"7.3", "external commit: encryption key is not a key", everyone, nil, withExternalPath(shortKey)},
	{"7.3", "external commit: signature of the leaf", everyone, ErrSignature, external(forged{path: func(p *UpdatePath) {
		p.LeafNode.Signature = flip(p.LeafNode.Signature)
	}}, (*forgery).externalInit)},
	{"7.9.2", "external commit: parent hash", everyone, nil, withExternalPath(func(l *LeafNode) { l.ParentHash = flip(l.ParentHash) })},
	{"12.4.2", "external commit: encryption key of a member", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.Leaf(1).EncryptionKey
		return withExternalPath(func(l *LeafNode) { l.EncryptionKey = key })(f)
	}},
	{"12.4.2", "external commit: node of the path missing", everyone, nil, external(forged{path: func(p *UpdatePath) {
		p.Nodes = p.Nodes[:len(p.Nodes)-1]
	}}, (*forgery).externalInit)},
	{"7.6", "external commit: encrypted path secret missing", everyone, nil, external(forged{path: func(p *UpdatePath) {
		p.Nodes[0].Secrets = nil
	}}, (*forgery).externalInit)},
}

// proposalViolations are further rules on proposals and their senders.
var proposalViolations = []violation{
	{"", "application data in a public message", everyone, ErrMalformed, func(f *forgery) *MLSMessage {
		m := f.proposal(f.alice, remove(1))
		m.Public.Content = FramedContent{GroupID: f.alice.GroupID(), Epoch: f.alice.Epoch(), Sender: Sender{Type: SenderMember},
			ContentType: ContentApplication, ApplicationData: []byte("x")}
		return m
	}},
	{"6.1", "sender of no type", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.request(newSigner(f.TB, testSuite), remove(1))
		m.Public.Content.Sender = Sender{Type: 9}
		return m
	}},
	{"", "proposal's signature", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		m := f.proposal(f.alice, remove(1))
		m.Public.Signature = flip(m.Public.Signature)
		return f.tagged(f.alice, m)
	}},
	{"", "proposal's membership tag", membersOnly, ErrMembershipTag, func(f *forgery) *MLSMessage {
		m := f.proposal(f.alice, remove(1))
		m.Public.MembershipTag = flip(m.Public.MembershipTag)
		return m
	}},
	{"", "proposal of a past epoch", everyone, ErrEpoch, func(f *forgery) *MLSMessage {
		m := f.proposal(f.alice, remove(1))
		f.room.commit(f.bob, CommitOptions{})
		return m
	}},
	{"12.1.3", "remove of a leaf that is blank, alone", everyone, nil, func(f *forgery) *MLSMessage { return f.proposal(f.alice, remove(9)) }},
	{"12.1.3", "remove of a member that is gone", everyone, nil, func(f *forgery) *MLSMessage {
		f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(1)}})
		f.bob = f.carol
		return f.commit(forged{props: []Proposal{remove(1)}})
	}},
	{"12.1.8", "external_init by an external sender", everyone, nil, func(f *forgery) *MLSMessage {
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, f.externalInit())
		f.must(err)
		return m
	}},
	{"", "proposal of a type that isn't known", everyone, ErrUnsupported, commitOf(Proposal{Type: 0xf00d})},
	{sectionAppData, "dictionary's data changed by group_context_extensions", everyone, nil, withExtensions(func(e Extensions) Extensions {
		return e.Set(ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary{{0x8001, []byte("other")}}))
	})},
	{"5.3.1", "add: credential that names no client", everyone, nil, inKeyPackage(func(l *LeafNode) { l.Credential = BasicCredential([]byte("nameless")) })},
	{sectionSelfRemove, "external commit: self_remove by value", everyone, nil, external(forged{}, (*forgery).externalInit, fixed(selfRemove()))},
	{"12.2", "external_init by a member, alone", everyone, nil, func(f *forgery) *MLSMessage { return f.proposal(f.alice, f.externalInit()) }},
	{"12.1.4", "nonce of a pre-shared key, alone", everyone, nil, func(f *forgery) *MLSMessage {
		return f.proposal(f.alice, psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("shared"), Nonce: make([]byte, 33)}))
	}},
	{"12.4.2", "resumption key of an epoch that isn't kept", membersOnly, nil, commitOf(psk(PreSharedKeyID{
		Type: PSKResumption, Usage: UsageApplication, GroupID: []byte("group"), Epoch: 77}))},
	{"12.4.2", "resumption key of another group", membersOnly, nil, commitOf(psk(PreSharedKeyID{
		Type: PSKResumption, Usage: UsageApplication, GroupID: []byte("other"), Epoch: 1}))},
	{"13.4", "malformed required_capabilities", everyone, nil, withExtensions(func(e Extensions) Extensions { return e.Set(ExtensionRequiredCapabilities, []byte{9}) })},
	{"5.3.1", "credential of an external sender, alone", everyone, nil, func(f *forgery) *MLSMessage {
		return f.proposal(f.alice, extensions(f, func(e Extensions) Extensions {
			return e.Set(ExtensionExternalSenders, codec.Marshal(ExternalSenders{{SignatureKey: []byte("x"), Credential: BasicCredential([]byte("bad"))}}))
		}))
	}},
	{"6.1", "external sender of a group that has none", everyone, nil, func(f *forgery) *MLSMessage {
		f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{extensions(f, func(e Extensions) Extensions { return e.Remove(ExtensionExternalSenders) })}})
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, remove(1))
		f.must(err)
		return m
	}},
}
