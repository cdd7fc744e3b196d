package mls

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
	{"7.3", "update: signature", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		p := f.update(f.carol, nil, nil)
		p.Update.LeafNode.Signature = flip(p.Update.LeafNode.Signature)
		return f.proposal(f.carol, p)
	}},
	{"7.3", "update: signed for another leaf", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		p := f.update(f.carol, nil, nil)
		f.must(p.Update.LeafNode.sign(testSuite, f.alice.cfg.rand(), f.carol.signer, f.carol.GroupID(), 0))
		return f.proposal(f.carol, p)
	}},
	{"7.3", "update: source", everyone, nil, withUpdate(func(l *LeafNode) { l.Source = LeafNodeCommit })},
	{"7.3", "update: encryption key unchanged", everyone, nil, func(f *forgery) *MLSMessage {
		old := f.carol.state.tree.Leaf(f.carol.OwnLeaf()).EncryptionKey
		return f.proposal(f.carol, f.update(f.carol, nil, func(l *LeafNode) { l.EncryptionKey = old }))
	}},
	{"7.2", "update: credential type not listed", everyone, nil, withUpdate(func(l *LeafNode) { l.Capabilities.Credentials = nil })},
	{"7.2", "update: version not listed", everyone, nil, withUpdate(func(l *LeafNode) { l.Capabilities.Versions = nil })},
	{"7.2", "update: suite not listed", everyone, nil, withUpdate(func(l *LeafNode) { l.Capabilities.CipherSuites = nil })},
	{"7.3", "update: extension not listed", everyone, nil, withUpdate(func(l *LeafNode) { l.Extensions = Extensions{{Type: 0xf00d}} })},
	{"7.3", "update: encryption key is not a key", everyone, nil, withUpdate(func(l *LeafNode) { l.EncryptionKey = []byte("short") })},
	{"5.3.1", "update: credential", everyone, nil, withUpdate(func(l *LeafNode) { l.Credential = BasicCredential([]byte("bad carol")) })},
	{"5.3.1", "update: successor names another client", everyone, nil, withUpdate(func(l *LeafNode) { l.Credential = BasicCredential([]byte("eve")) })},
	{"11.1", "update alone: required capability", serverOnly, nil, withUpdate(func(l *LeafNode) { l.Capabilities.Proposals = nil })},
	{"11.1", "committed update: required capability", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.proposal(f.carol, f.update(f.carol, nil, func(l *LeafNode) { l.Capabilities.Proposals = nil }))
		return f.commit(forged{refs: [][]byte{f.slip(m)}})
	}},
	{"7.3", "path: signature", everyone, ErrSignature, withPath(func(p *UpdatePath) { p.LeafNode.Signature = flip(p.LeafNode.Signature) })},
	{"7.3", "path: source", everyone, nil, withLeaf(func(l *LeafNode) { l.Source = LeafNodeUpdate })},
	{"7.3", "path: encryption key unchanged", everyone, nil, func(f *forgery) *MLSMessage {
		old := f.alice.state.tree.Leaf(0).EncryptionKey
		return f.commit(forged{leaf: func(l *LeafNode) { l.EncryptionKey = old }})
	}},
	{"7.2", "path: credential type not listed", everyone, nil, withLeaf(func(l *LeafNode) { l.Capabilities.Credentials = nil })},
	{"7.3", "path: extension not listed", everyone, nil, withLeaf(func(l *LeafNode) { l.Extensions = Extensions{{Type: 0xf00d}} })},
	{"11.1", "path: required capability", everyone, nil, withLeaf(func(l *LeafNode) { l.Capabilities.Extensions = nil })},
	{"5.3.1", "path: credential", everyone, nil, withLeaf(func(l *LeafNode) { l.Credential = BasicCredential([]byte("bad")) })},
	{"5.3.1", "path: successor names another client", everyone, nil, withLeaf(func(l *LeafNode) { l.Credential = BasicCredential([]byte("bob")) })},
	{"7.3", "path: signature key of another member", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.Leaf(1).SignatureKey
		return f.commit(forged{leafKey: f.bob.signer, template: func(l *LeafNode) { l.SignatureKey = key }})
	}},

	{"7.3", "path: encryption key is not a key", everyone, nil, withLeaf(func(l *LeafNode) { l.EncryptionKey = []byte("short") })},

	// KeyPackages.
	{"10.1", "add: suite", everyone, nil, func(f *forgery) *MLSMessage {
		_, kp, _ := keyPackage(f.TB, X25519_CHACHA20POLY1305_SHA256_Ed25519, "new")
		return f.commit(forged{props: []Proposal{add(kp)}, noPath: true})
	}},
	{"10.1", "add: version", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.Version = 2 })},
	{"10.1", "add: init key is the encryption key", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.InitKey = kp.LeafNode.EncryptionKey })},
	{"10.1", "add: init key is not a key", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.InitKey = []byte("short") })},
	{"10.1", "add: signature", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		p := f.keyPackage("new", nil, nil)
		p.Add.KeyPackage.Signature = flip(p.Add.KeyPackage.Signature)
		return f.commit(forged{props: []Proposal{p}, noPath: true})
	}},
	{"7.3", "add: leaf's signature", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		p := f.keyPackage("new", nil, nil)
		p.Add.KeyPackage.LeafNode.Signature = flip(p.Add.KeyPackage.LeafNode.Signature)
		return f.commit(forged{props: []Proposal{p}, noPath: true})
	}},
	{"7.3", "add: source", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Source = LeafNodeUpdate })},
	{"7.2", "add: suite not listed", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Capabilities.CipherSuites = nil })},
	{"7.2", "add: lifetime too long", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Lifetime = Lifetime{0, 1 << 62} })},
	{"7.3", "add: lifetime over", serverOnly, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Lifetime = Lifetime{0, 1} })},
	{"7.3", "add: extension of the leaf not listed", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Extensions = Extensions{{Type: 0xf00d}} })},
	{"11.1", "add: required capability", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Capabilities.Proposals = nil })},
	{"5.3.1", "add: credential", everyone, nil, withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Credential = BasicCredential([]byte("bad")) })},
	{"7.3", "add: credential type that a member doesn't support", everyone, nil, withKeyPackage(func(kp *KeyPackage) {
		kp.LeafNode.Credential = X509Credential([][]byte{{1}})
		kp.LeafNode.Capabilities.Credentials = []CredentialType{CredentialX509}
	})},
	{"7.3", "add: signature key of a member", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.keyPackage("new", f.bob.signer, nil)}, noPath: true})
	}},
	{"7.3", "add: encryption key of a member", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.Leaf(1).EncryptionKey
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, func(kp *KeyPackage) { kp.LeafNode.EncryptionKey = key })}, noPath: true})
	}},
	{"7.3", "add: encryption key of a parent node", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.publicKey(3)
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, func(kp *KeyPackage) { kp.LeafNode.EncryptionKey = key })}, noPath: true})
	}},

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
