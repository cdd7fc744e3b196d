package mls

// commitViolations are rules on commits of members and of those who join by them.
var commitViolations = []violation{
	{"12.4", "empty commit without a path", everyone, nil, func(f *forgery) *MLSMessage { return f.commit(forged{noPath: true}) }},
	{"12.4", "remove without a path", everyone, nil, func(f *forgery) *MLSMessage { return f.commit(forged{noPath: true, props: []Proposal{remove(2)}}) }},
	{"12.4", "self_remove without a path", everyone, nil, withSelfRemoves(forged{noPath: true}, carol)},
	{"12.4", "group_context_extensions without a path", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{noPath: true, props: []Proposal{extensions(f, func(e Extensions) Extensions { return e })}})
	}},
	{"12.4", "reference of an unknown proposal", everyone, nil, func(f *forgery) *MLSMessage { return f.commit(forged{refs: [][]byte{make([]byte, 32)}}) }},
	{"12.4.2", "node of the path missing", everyone, nil, withPath(func(p *UpdatePath) { p.Nodes = p.Nodes[:len(p.Nodes)-1] })},
	{"12.4.2", "node of the path too many", everyone, nil, withPath(func(p *UpdatePath) {
		n := p.Nodes[0]
		n.EncryptionKey = flip(n.EncryptionKey)
		p.Nodes = append(p.Nodes, n)
	})},
	{"7.9.2", "parent hash", everyone, nil, withLeaf(func(l *LeafNode) { l.ParentHash = flip(l.ParentHash) })},
	{"7.9.2", "key of a path's node exchanged", everyone, nil, withPath(func(p *UpdatePath) { p.Nodes[0].EncryptionKey = flip(p.Nodes[0].EncryptionKey) })},
	{"12.4.2", "key of a path's node is in the tree", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.Leaf(1).EncryptionKey
		return f.commit(forged{path: func(p *UpdatePath) { p.Nodes[0].EncryptionKey = key }})
	}},
	{"12.4.2", "key of a path's node is that of the node it replaces", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.publicKey(3)
		return f.commit(forged{path: func(p *UpdatePath) { p.Nodes[len(p.Nodes)-1].EncryptionKey = key }})
	}},
	{"12.4.2", "key of a path's leaf is in the tree", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.bob.state.tree.Leaf(1).EncryptionKey
		return f.commit(forged{leaf: func(l *LeafNode) { l.EncryptionKey = key }})
	}},
	{"12.4.2", "key of a path's node is not a key", everyone, nil, withPath(func(p *UpdatePath) { p.Nodes[0].EncryptionKey = []byte("short") })},
	{"7.6", "encrypted path secret missing", everyone, nil, withPath(func(p *UpdatePath) { p.Nodes[0].Secrets = nil })},
	{"7.6", "encrypted path secret too many", everyone, nil, withPath(func(p *UpdatePath) { p.Nodes[1].Secrets = append(p.Nodes[1].Secrets, p.Nodes[1].Secrets[0]) })},
	{"", "path secret that doesn't decrypt", membersOnly, ErrDecrypt, withPath(func(p *UpdatePath) {
		for i := range p.Nodes {
			for j := range p.Nodes[i].Secrets {
				p.Nodes[i].Secrets[j].Ciphertext = flip(p.Nodes[i].Secrets[j].Ciphertext)
			}
		}
	})},
	{"", "signature", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		return f.commit(forged{signed: func(ac *AuthenticatedContent) { ac.Signature = flip(ac.Signature) }})
	}},
	{"", "signature by another member", everyone, ErrSignature, func(f *forgery) *MLSMessage { return f.commit(forged{signer: f.bob.signer}) }},
	{"6.1", "sender is not a member", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{content: func(c *FramedContent) { c.Sender.Leaf = 77 }})
	}},
	{"", "membership tag", membersOnly, ErrMembershipTag, withFrame(func(m *PublicMessage) { m.MembershipTag = flip(m.MembershipTag) })},
	{"", "confirmation tag", membersOnly, ErrConfirmationTag, func(f *forgery) *MLSMessage {
		by := f.alice
		return f.commit(forged{framed: func(m *PublicMessage) {
			m.ConfirmationTag = flip(m.ConfirmationTag)
			again, err := protectPublic(testSuite, m.authenticated(), by.secrets.membership, by.state.encoded)
			f.must(err)
			*m = *again
		}})
	}},
	{"", "epoch that is past", everyone, ErrEpoch, func(f *forgery) *MLSMessage {
		return f.commit(forged{content: func(c *FramedContent) { c.Epoch-- }})
	}},
	{"", "epoch to come", everyone, ErrEpoch, func(f *forgery) *MLSMessage {
		return f.commit(forged{content: func(c *FramedContent) { c.Epoch++ }})
	}},
	{"", "another group", everyone, ErrMalformed, func(f *forgery) *MLSMessage {
		return f.commit(forged{content: func(c *FramedContent) { c.GroupID = []byte("other") }})
	}},

	// External commits.
	{"12.4.3.2", "no path", everyone, nil, external(forged{noPath: true}, (*forgery).externalInit)},
	{"12.2", "no external_init", everyone, nil, external(forged{})},
	{"12.2", "two external_init", everyone, nil, external(forged{}, (*forgery).externalInit, (*forgery).externalInit)},
	{"12.2", "two removes", everyone, nil, external(forged{}, (*forgery).externalInit, fixed(remove(1)), fixed(remove(2)))},
	{"12.2", "add", everyone, nil, external(forged{}, (*forgery).externalInit, func(f *forgery) Proposal { return f.keyPackage("new", nil, nil) })},
	{"12.2", "group_context_extensions", everyone, nil, external(forged{}, (*forgery).externalInit, func(f *forgery) Proposal {
		return extensions(f, func(e Extensions) Extensions { return e })
	})},
	{"12.1.2", "update", everyone, nil, external(forged{}, (*forgery).externalInit, func(f *forgery) Proposal { return f.update(f.carol, nil, nil) })},
	{"12.2", "reinit", everyone, nil, external(forged{}, (*forgery).externalInit, fixed(reinit(nil)))},
	{"12.1.3", "external commit: remove of a blank leaf", everyone, nil, external(forged{}, (*forgery).externalInit, fixed(remove(9)))},
	{"7.3", "encryption key of the removed leaf", everyone, nil, func(f *forgery) *MLSMessage {
		key := f.carol.state.tree.Leaf(2).EncryptionKey
		return f.commit(forged{external: "carol", leaf: func(l *LeafNode) { l.EncryptionKey = key }, props: []Proposal{f.externalInit(), remove(2)}})
	}},
	{"7.3", "signature key of a member", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{external: "eve", signer: f.bob.signer, props: []Proposal{f.externalInit()}})
	}},
	{"12.4.3.2", "proposal by reference", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.proposal(f.carol, remove(1))
		f.room.propose(m, nil)
		return f.commit(forged{external: "eve", refs: [][]byte{m.Public.authenticated().ref(testSuite)}, props: []Proposal{f.externalInit()}})
	}},
	{"", "signature by another than the path's leaf", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		return f.commit(forged{external: "eve", leafKey: newSigner(f.TB, testSuite), props: []Proposal{f.externalInit()}})
	}},
	{"5.3.1", "remove of another client", everyone, nil, external(forged{}, (*forgery).externalInit, fixed(remove(1)))},
	{"12.2", "client that is a member", everyone, nil, external(forged{external: "bob"}, (*forgery).externalInit)},
	{"5.3.1", "credential", everyone, nil, external(forged{external: "bad"}, (*forgery).externalInit)},
	{"11.1", "required capability", everyone, nil, external(forged{template: func(l *LeafNode) { l.Capabilities.Extensions = nil }}, (*forgery).externalInit)},
	{"8.3", "key encapsulation", membersOnly, nil, external(forged{}, fixed(Proposal{Type: ProposalExternalInit, ExternalInit: &ExternalInit{KEMOutput: []byte("short")}}))},
	{"", "init secret of another key", membersOnly, ErrConfirmationTag, external(forged{}, (*forgery).externalInit)},
}
