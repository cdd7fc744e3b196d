package mls

import "github.com/parley-mls/parley/mls/codec"

// componentViolations are rules of draft-ietf-mls-extensions and of draft-mahy-mls-semiprivatemessage.
var componentViolations = []violation{
	{sectionAppData, "dictionary changed by group_context_extensions", everyone, nil, withExtensions(func(e Extensions) Extensions { return e.Remove(ExtensionAppDataDictionary) })},
	{sectionAppData, "dictionary changed in the commit that ends its protection", everyone, nil, withExtensions(func(e Extensions) Extensions {
		return e.Remove(ExtensionAppDataDictionary).Remove(ExtensionRequiredCapabilities)
	})},
	{sectionAppData, "unknown component", everyone, nil, commitOf(appData(0x9999, "x"))},
	{sectionAppData, "removal of a component without data", everyone, nil, commitOf(appRemove(0x8002))},
	{sectionAppData, "removal of a component without data, alone", serverOnly, nil, func(f *forgery) *MLSMessage { return f.proposal(f.carol, appRemove(0x8002)) }},
	{sectionAppData, "update and removal of a component", everyone, nil, commitOf(appData(0x8001, "x"), appRemove(0x8001))},
	{sectionAppData, "two removals of a component", everyone, nil, commitOf(appRemove(0x8001), appRemove(0x8001))},
	{sectionAppData, "update that the component refuses", everyone, nil, commitOf(appData(0x8001, "no"))},
	{sectionEphemeral, "ephemeral data for an unknown component", everyone, nil, commitOf(ephemeral(0x9999, nil))},
	{sectionEphemeral, "ephemeral data for a component that takes none", everyone, nil, commitOf(ephemeral(0x8003, nil))},
	{sectionEphemeral, "ephemeral data that the component refuses", everyone, nil, commitOf(ephemeral(0x8001, []byte("no")))},
	{sectionEphemeral, "ephemeral data that the component refuses, alone", everyone, nil, func(f *forgery) *MLSMessage {
		return f.proposal(f.carol, ephemeral(0x8001, []byte("no")))
	}},
	{sectionEphemeral, "app_ack that isn't one", everyone, nil, commitOf(ephemeral(ComponentAppAck, []byte("x")))},
	{"12.2", "app_ephemeral in a group where a member doesn't support it", everyone, nil, func(f *forgery) *MLSMessage {
		f.withoutProposal(ProposalAppEphemeral)
		return f.commit(forged{props: []Proposal{ephemeral(0x8001, nil)}})
	}},
	{sectionSafeAAD, "authenticated data without the frame", everyone, nil, withAAD("text")},
	{sectionSafeAAD, "no authenticated data, not even a frame", everyone, nil, withAAD("")},
	{sectionSafeAAD, "authenticated data after the frame", everyone, nil, withAAD("\x00more")},
	{sectionSafeAAD, "authenticated data out of order", everyone, nil, withAAD("\x06\x80\x02\x00\x80\x01\x00")},
	{sectionSafeAAD, "authenticated data of a component twice", everyone, nil, withAAD("\x06\x80\x01\x00\x80\x01\x00")},
	{sectionSafeAAD, "proposal: authenticated data without the frame", everyone, nil, withSafeAAD(func(f *forgery) *MLSMessage {
		return f.proposalWith(f.carol, appData(0x8001, "+"), []byte("text"))
	})},
	{sectionSafeAAD, "external sender: authenticated data without the frame", everyone, nil, withSafeAAD(func(f *forgery) *MLSMessage {
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, remove(1))
		f.must(err)
		return m
	})},
	{sectionSafeAAD, "external commit: authenticated data without the frame", everyone, nil, withSafeAAD(external(forged{}, (*forgery).externalInit))},
	{sectionNegotiation, "add: required component", everyone, nil, func(f *forgery) *MLSMessage {
		f.require(ComponentAppComponents, ComponentsList{ComponentSafeAAD})
		return withKeyPackage(func(kp *KeyPackage) { kp.LeafNode.Extensions = nil })(f)
	}},
	{sectionNegotiation, "path: required component", everyone, nil, func(f *forgery) *MLSMessage {
		f.require(ComponentAppComponents, ComponentsList{ComponentSafeAAD})
		return f.commit(forged{leaf: func(l *LeafNode) { l.Extensions = nil }})
	}},
	{sectionNegotiation, "path: dictionary that isn't one", everyone, nil, func(f *forgery) *MLSMessage {
		f.require(ComponentAppComponents, ComponentsList{ComponentSafeAAD})
		return f.commit(forged{leaf: func(l *LeafNode) { l.Extensions = l.Extensions.Set(ExtensionAppDataDictionary, []byte{9}) }})
	}},
	{sectionNegotiation, "required component that a member doesn't have", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{noPath: true, props: []Proposal{setTerms(ComponentAppComponents, ComponentsList{0x8001})}})
	}},
	{sectionNegotiation, "component in authenticated data that a member doesn't understand", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{noPath: true, props: []Proposal{setTerms(ComponentSafeAAD, ComponentsList{0x8001})}})
	}},
	{sectionNegotiation, "required wire format that a member doesn't have", everyone, nil, func(f *forgery) *MLSMessage {
		return f.commit(forged{
			template: func(l *LeafNode) {
				l.Extensions = l.Extensions.Set(ExtensionSupportedWireFormats, codec.Marshal(WireFormats{0xf123}))
			},
			props: []Proposal{extensions(f, func(e Extensions) Extensions {
				return e.Set(ExtensionRequiredWireFormats, codec.Marshal(WireFormats{WireFormatWelcome, 0xf123}))
			})}})
	}},
	{sectionNegotiation, "path: required wire format", everyone, nil, withExtensions(func(e Extensions) Extensions {
		return e.Set(ExtensionRequiredWireFormats, codec.Marshal(WireFormats{0xf123}))
	})},
	{"13.4", "malformed required_wire_formats", everyone, nil, withExtensions(func(e Extensions) Extensions { return e.Set(ExtensionRequiredWireFormats, []byte{1, 2}) })},
	{"13.4", "malformed safe_aad", everyone, nil, commitOf(appData(ComponentSafeAAD, "x"))},
	{"13.4", "malformed app_components", everyone, nil, commitOf(appData(ComponentAppComponents, "x"))},
	{"13.4", "empty list of media types", everyone, nil, commitOf(setTerms(ComponentMediaTypes, MediaTypeList{}))},
	{sectionSemiPrivate, "external receiver's key is not a key", everyone, nil, commitOf(setTerms(ComponentExternalReceivers, ExternalReceivers{{[]byte("short"), BasicCredential(nil)}}))},
	{sectionSemiPrivate, "one external receiver twice", everyone, nil, func(f *forgery) *MLSMessage {
		x := ExternalReceiver{f.bob.Tree().Leaf(1).EncryptionKey, BasicCredential([]byte("hub"))}
		return f.commit(forged{props: []Proposal{setTerms(ComponentExternalReceivers, ExternalReceivers{x, x})}})
	}},
	{"13.4", "external receivers that are none", everyone, nil, commitOf(appData(ComponentExternalReceivers, "x"))},
	{sectionSelfRemove, "self_remove by value", everyone, nil, commitOf(selfRemove())},
	{sectionSelfRemove, "self_remove of the committer", everyone, nil, withSelfRemoves(forged{}, alice)},
	{sectionSelfRemove, "second self_remove of a member", serverOnly, nil, func(f *forgery) *MLSMessage {
		f.room.propose(f.carol.ProposeSelfRemove(f.carol.store))
		return f.proposalWith(f.carol, selfRemove(), []byte("again"))
	}},
	{"12.2", "two self_removes of a leaf", everyone, nil, withSelfRemoves(forged{}, carol, carol)},
	{"12.2", "self_remove and remove of a leaf", everyone, nil, withSelfRemoves(forged{props: []Proposal{remove(2)}}, carol)},
	{"12.2", "update and self_remove of a leaf", everyone, nil, func(f *forgery) *MLSMessage {
		m := f.proposal(f.carol, f.update(f.carol, nil, nil))
		f.room.propose(m, nil)
		return withSelfRemoves(forged{refs: [][]byte{m.Public.authenticated().ref(testSuite)}}, carol)(f)
	}},
	{"12.2", "self_remove in a group where a member doesn't support it", everyone, nil, func(f *forgery) *MLSMessage {
		f.withoutProposal(ProposalSelfRemove)
		return f.proposal(f.carol, selfRemove())
	}},
	{"12.1.8", "self_remove by an external sender", everyone, nil, func(f *forgery) *MLSMessage {
		m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, selfRemove())
		f.must(err)
		return m
	}},
}
