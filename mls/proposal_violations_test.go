package mls

import "github.com/parley-mls/parley/mls/codec"

// proposalViolations are rules on proposals, on their lists and on who sends them.
var proposalViolations = []violation{
	{"12.2", "add of a client that is a member", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.keyPackage("bob", nil, nil)}, noPath: true})
	}},
	{"12.2", "two adds of a client", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, nil), f.keyPackage("new", nil, nil)}, noPath: true})
	}},
	{"12.2", "update by the committer", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.update(f.alice, nil, nil)}})
	}},
	{"12.2", "remove of the committer", everyone, nil, commitOf(remove(0))},
	{"12.2", "two removes of a leaf", everyone, nil, commitOf(remove(2), remove(2))},
	{"12.2", "update and remove of a leaf", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.proposal(f.carol, f.update(f.carol, nil, nil))
		f.room.propose(m, nil)
		return f.commit(forged{refs: [][]byte{m.Public.authenticated().ref(testSuite)}, props: []Proposal{remove(2)}})
	}},
	{"12.2", "two updates of a leaf", everyone, nil, func(f *forgery) *MLSMessage {
		var refs [][]byte
		for range 2 {
			m := f.proposal(f.carol, f.update(f.carol, nil, nil))
			f.room.propose(m, nil)
			refs = append(refs, m.Public.authenticated().ref(testSuite))
		}
		return f.commit(forged{refs: refs})
	}},
	{"12.1.3", "remove of a blank leaf", everyone, nil, commitOf(remove(9))},
	{"12.1.4", "nonce of a pre-shared key", everyone, nil, commitOf(psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("shared"), Nonce: []byte{1}}))},
	{"12.1.4", "nonce of a component's pre-shared key", everyone, nil, commitOf(psk(PreSharedKeyID{Type: PSKApplication, Component: 0x8001, ID: []byte("shared"), Nonce: []byte{1}}))},
	{"12.4.2", "component's pre-shared key that isn't there", membersOnly, nil, commitOf(psk(PreSharedKeyID{Type: PSKApplication, Component: 0x8002, ID: []byte("shared")}))},
	{"12.1.4", "pre-shared key for reinitialisation", everyone, nil, commitOf(psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageReInit, GroupID: []byte("group")}))},
	{"12.1.4", "pre-shared key for branching", everyone, nil, commitOf(psk(PreSharedKeyID{Type: PSKResumption, Usage: UsageBranch, GroupID: []byte("group")}))},
	{"12.2", "one pre-shared key twice", everyone, nil, func(f *forgery) *MLSMessage {
		p := psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("shared"), Nonce: make([]byte, 32)})
		return f.commit(forged{props: []Proposal{p, p}})
	}},
	{"12.4.2", "pre-shared key that isn't there", membersOnly, nil, commitOf(psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("other")}))},
	{"12.1.5", "reinit with a lower version", everyone, nil, commitOf(reinit(func(r *ReInit) { r.Version = 0 }))},
	{"13.4", "reinit with an extension type twice", everyone, nil, commitOf(reinit(func(r *ReInit) { r.Extensions = Extensions{{Type: 5}, {Type: 5}} }))},
	{"12.2", "reinit beside another proposal", everyone, nil, commitOf(reinit(nil), appData(0x8001, "+"))},
	{"12.2", "another proposal beside reinit", everyone, nil, commitOf(remove(2), reinit(nil))},
	{"12.2", "two reinits", everyone, nil, commitOf(reinit(nil), reinit(nil))},
	{"12.2", "reinit by reference beside another proposal", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.proposal(f.carol, reinit(nil))
		f.room.propose(m, nil)
		return f.commit(forged{refs: [][]byte{m.Public.authenticated().ref(testSuite)}, props: []Proposal{appData(0x8001, "+")}})
	}},
	{"", "commit after a reinit", everyone, ErrEnded, func(f *forgery) *MLSMessage {
		f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
		return f.commit(forged{})
	}},
	{"", "proposal after a reinit", everyone, ErrEnded, func(f *forgery) *MLSMessage {
		f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
		return f.proposal(f.carol, remove(1))
	}},
	{"", "external commit after a reinit", everyone, ErrEnded, func(f *forgery) *MLSMessage {
		f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{reinit(nil)}})
		return f.commit(forged{external: "eve", props: []Proposal{f.externalInit()}})
	}},
	{"12.2", "external_init by a member", everyone, nil, func(f *forgery) *MLSMessage { return f.commit(forged{props: []Proposal{f.externalInit()}}) }},
	{"12.2", "two group_context_extensions", everyone, nil, func(f *forgery) *MLSMessage {
		p := extensions(f, func(e Extensions) Extensions { return e })
		return f.commit(forged{props: []Proposal{p, p}})
	}},
	{"13.4", "extension type twice", everyone, nil, withExtensions(func(e Extensions) Extensions { return append(e, e[0]) })},
	{"12.1.7", "required capability that a member doesn't have", everyone, nil, func(f *forgery) *MLSMessage {
		leaf := f.alice.state.tree.Leaf(0).clone()
		leaf.Capabilities.Extensions = append(leaf.Capabilities.Extensions, 0xf00d)
		return f.commit(forged{template: func(l *LeafNode) { *l = *leaf }, props: []Proposal{extensions(f, func(e Extensions) Extensions {
			return e.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{Extensions: []ExtensionType{0xf00d}}))
		})}})
	}},
	{"12.1.7", "required proposal that a member doesn't have", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{template: func(l *LeafNode) { l.Capabilities.Proposals = append(l.Capabilities.Proposals, 0xf00d) },
			props: []Proposal{extensions(f, func(e Extensions) Extensions {
				return e.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{Proposals: []ProposalType{0xf00d}}))
			})}})
	}},
	{"12.1.7", "required credential that a member doesn't have", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{template: func(l *LeafNode) { l.Capabilities.Credentials = append(l.Capabilities.Credentials, 0xf00d) },
			props: []Proposal{extensions(f, func(e Extensions) Extensions {
				return e.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{Credentials: []CredentialType{0xf00d}}))
			})}})
	}},
	{"11.1", "required credential that the committer doesn't have", everyone, nil, withExtensions(func(e Extensions) Extensions {
		return e.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{Credentials: []CredentialType{0xf00d}}))
	})},
	{"11.1", "add without what the same commit makes required", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{extensions(f, func(e Extensions) Extensions {
			return e.Set(ExtensionRequiredCapabilities, codec.Marshal(RequiredCapabilities{Credentials: []CredentialType{CredentialX509}}))
		}), f.keyPackage("new", nil, func(kp *KeyPackage) { kp.LeafNode.Capabilities.Credentials = []CredentialType{CredentialBasic} })}})
	}},
	{"13.4", "extension that a member doesn't support", everyone, nil, func(f *forgery) *MLSMessage {
		leaf := f.alice.state.tree.Leaf(0).clone()
		leaf.Capabilities.Extensions = append(leaf.Capabilities.Extensions, 0xf00d)
		return f.commit(forged{template: func(l *LeafNode) { *l = *leaf }, props: []Proposal{extensions(f, func(e Extensions) Extensions {
			return e.Set(0xf00d, nil)
		})}})
	}},
	{"13.4", "malformed external_senders", everyone, nil, withExtensions(func(e Extensions) Extensions { return e.Set(ExtensionExternalSenders, []byte{9}) })},
	{"5.3.1", "credential of an external sender", everyone, nil, withExtensions(func(e Extensions) Extensions {
		return e.Set(ExtensionExternalSenders, codec.Marshal(ExternalSenders{{SignatureKey: []byte("x"), Credential: BasicCredential([]byte("bad"))}}))
	})},
	{"12.1.8", "update by an external sender", everyone, nil, func(f *forgery) *MLSMessage {
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, f.update(f.carol, nil, nil))
		f.must(err)
		return m
	}},
	{"6.1", "external sender that the group doesn't have", everyone, nil, func(f *forgery) *MLSMessage {
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 1, f.alice.GroupID(), f.alice.Epoch(), nil, remove(1))
		f.must(err)
		return m
	}},
	{"", "proposal of another than the external sender", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.bob.signer, 0, f.alice.GroupID(), f.alice.Epoch(), nil, remove(1))
		f.must(err)
		return m
	}},
	{"6.1", "commit of an external sender", everyone, nil, withFrame(func(m *PublicMessage) { m.Content.Sender = Sender{Type: SenderExternal} })},
	{"6.1", "commit of a new member who proposes", everyone, nil, withFrame(func(m *PublicMessage) {
		m.Content.Sender = Sender{Type: SenderNewMemberProposal}
	})},
	{"12.4.3.2", "proposal of a new member who commits", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.proposal(f.alice, remove(1))
		m.Public.Content.Sender = Sender{Type: SenderNewMemberCommit}
		return m
	}},
	{"6.1", "remove by a new member", everyone, nil, func(f *forgery) *MLSMessage { return f.request(newSigner(f.TB, testSuite), remove(1)) }},
	{"", "request to be added that another signed", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		return f.request(newSigner(f.TB, testSuite), f.keyPackage("new", nil, nil))
	}},
	{"", "request to be added, signed with the group context", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		signer := newSigner(f.TB, testSuite)
		m := f.request(signer, f.keyPackage("new", signer, nil))
		m.Public.Content.Sender = Sender{Type: SenderMember}
		ac, err := signContent(testSuite, f.alice.cfg.rand(), signer, WireFormatPublicMessage, m.Public.Content, f.alice.state.encoded)
		f.must(err)
		m.Public.Signature, m.Public.Content.Sender = ac.Signature, Sender{Type: SenderNewMemberProposal}
		return m
	}},
	{"10.1", "request to be added: suite", everyone, nil, func(f *forgery) *MLSMessage {
		c, kp, _ := keyPackage(f.TB, X25519_CHACHA20POLY1305_SHA256_Ed25519, "new")
		return f.request(c.signer, add(kp))
	}},
	{"10.1", "request to be added: signature of the key package", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		c, kp, _ := keyPackage(f.TB, testSuite, "new")
		kp.Signature = flip(kp.Signature)
		return f.request(c.signer, add(kp))
	}},
	{"7.3", "request to be added: leaf's signature", everyone, ErrSignature, func(f *forgery) *MLSMessage {
		c, kp, _ := keyPackage(f.TB, testSuite, "new")
		kp.LeafNode.Signature = flip(kp.LeafNode.Signature)
		return f.request(c.signer, add(kp))
	}},
	{"5.3.1", "request to be added: credential", everyone, nil, withRequest(func(kp *KeyPackage) { kp.LeafNode.Credential = BasicCredential([]byte("bad")) })},
	{"7.2", "request to be added: lifetime too long", everyone, nil, withRequest(func(kp *KeyPackage) { kp.LeafNode.Lifetime = Lifetime{0, 1 << 62} })},
	{"7.3", "request to be added: lifetime over", serverOnly, nil, withRequest(func(kp *KeyPackage) { kp.LeafNode.Lifetime = Lifetime{0, 1} })},
	{"11.1", "request to be added: required capability", serverOnly, nil, withRequest(func(kp *KeyPackage) { kp.LeafNode.Capabilities.Proposals = nil })},
	{"11.1", "committed request to be added: required capability", everyone, nil, func(f *forgery) *MLSMessage {
		m := withRequest(func(kp *KeyPackage) { kp.LeafNode.Capabilities.Proposals = nil })(f)
		return f.commit(forged{refs: [][]byte{f.slip(m)}, noPath: true})
	}},
	{"12.2", "committed request of a client that is a member", everyone, nil, func(f *forgery) *MLSMessage {
		signer := newSigner(f.TB, testSuite)
		m := f.request(signer, f.keyPackage("bob", signer, nil))
		return f.commit(forged{refs: [][]byte{f.slip(m)}, noPath: true})
	}},

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
