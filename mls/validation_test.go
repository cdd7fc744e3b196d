package mls

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// judges says who can see that a rule is broken.
type judges int

const (
	everyone    judges = iota // members and server
	membersOnly               // public data doesn't show it
	serverOnly                // members don't judge it: clocks and pending proposals differ
)

// violation is a rule with a message that breaks it.
type violation struct {
	section string // of the ValidationError
	rule    string
	judges  judges
	is      error // the sentinel, for rules that have one
	message func(f *forgery) *MLSMessage
}

func commitOf(props ...Proposal) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{props: props}) }
}

func withKeyPackage(edit func(*KeyPackage)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		return f.commit(forged{props: []Proposal{f.keyPackage("new", nil, edit)}, noPath: true})
	}
}

func withRequest(edit func(*KeyPackage)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		signer := newSigner(f.TB, testSuite)
		return f.request(signer, f.keyPackage("new", signer, edit))
	}
}

func withUpdate(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.proposal(f.carol, f.update(f.carol, nil, edit)) }
}

func withLeaf(edit func(*LeafNode)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{leaf: edit}) }
}

func withPath(edit func(*UpdatePath)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{path: edit}) }
}

func withFrame(edit func(*PublicMessage)) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{framed: edit}) }
}

func external(o forged, props ...func(f *forgery) Proposal) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		o := o
		if o.external == "" {
			o.external = "eve"
		}
		o.props = nil
		for _, p := range props {
			o.props = append(o.props, p(f))
		}
		return f.commit(o)
	}
}

func fixed(p Proposal) func(*forgery) Proposal { return func(*forgery) Proposal { return p } }

func psk(id PreSharedKeyID) Proposal {
	return Proposal{Type: ProposalPSK, PSK: &PreSharedKey{PSK: id}}
}

// reinit asks for a group called "next" of the same suite, unless edit changes that.
func reinit(edit func(*ReInit)) Proposal {
	r := &ReInit{GroupID: []byte("next"), Version: MLS10, CipherSuite: testSuite}
	if edit != nil {
		edit(r)
	}
	return Proposal{Type: ProposalReInit, ReInit: r}
}

func extensions(f *forgery, edit func(Extensions) Extensions) Proposal {
	return Proposal{Type: ProposalGroupContextExtensions, GroupContextExtensions: &GroupContextExtensions{Extensions: edit(slices.Clone(f.alice.Context().Extensions))}}
}

func withExtensions(edit func(Extensions) Extensions) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage { return f.commit(forged{props: []Proposal{extensions(f, edit)}}) }
}

func appRemove(id ComponentID) Proposal {
	return Proposal{Type: ProposalAppDataUpdate, AppDataUpdate: &AppDataUpdate{Component: id, Op: AppDataOpRemove}}
}

func selfRemove() Proposal { return Proposal{Type: ProposalSelfRemove} }

// withSelfRemoves commits proposals after the SelfRemoves of some members.
func withSelfRemoves(o forged, by ...func(*forgery) *client) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		o := o
		for i, c := range by {
			o.refs = append(o.refs, f.slip(f.proposalWith(c(f), selfRemove(), []byte{byte(i)})))
		}
		return f.commit(o)
	}
}

// require changes what the GroupContext asks of the members.
func (f *forgery) require(id ComponentID, data codec.Marshaler) {
	f.TB.Helper()
	f.room.commit(f.bob, CommitOptions{Proposals: []Proposal{setTerms(id, data)}})
}

func setTerms(id ComponentID, data codec.Marshaler) Proposal {
	return appData(id, string(codec.Marshal(data)))
}

// withSafeAAD makes a message after all authenticated data has become a SafeAAD.
func withSafeAAD(message func(*forgery) *MLSMessage) func(*forgery) *MLSMessage {
	return func(f *forgery) *MLSMessage {
		f.require(ComponentSafeAAD, ComponentsList{})
		return message(f)
	}
}

func withAAD(aad string) func(*forgery) *MLSMessage {
	return withSafeAAD(func(f *forgery) *MLSMessage {
		return f.commit(forged{content: func(c *FramedContent) { c.AuthenticatedData = []byte(aad) }})
	})
}

// withoutProposal has dave not support a proposal type any more.
func (f *forgery) withoutProposal(t ProposalType) {
	f.TB.Helper()
	c := DefaultCapabilities()
	c.Proposals = slices.DeleteFunc(c.Proposals, func(x ProposalType) bool { return x == t })
	f.room.propose(f.dave.ProposeUpdate(f.dave.store, UpdateOptions{Capabilities: &c}))
	f.room.commit(f.bob, CommitOptions{})
}

func alice(f *forgery) *client { return f.alice }
func carol(f *forgery) *client { return f.carol }

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 1
	return b
}

var violations = []violation{
	// Leaves.
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

	// Proposals and their lists.
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

	// Commits.
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

// slip makes a proposal pending everywhere although the server would have refused it.
func (f *forgery) slip(m *MLSMessage) []byte {
	f.TB.Helper()
	ac := m.Public.authenticated()
	p := PendingProposal{Ref: ac.ref(testSuite), Sender: ac.Content.Sender, Proposal: *ac.Content.Proposal}
	for _, c := range f.members {
		if _, err := c.Receive(c.store, m); err != nil {
			f.TB.Fatal(err)
		}
	}
	f.server.state.addPending(f.store, &pendingEntry{PendingProposal: p})
	return p.Ref
}

// allViolations are the rules on handshake messages of which each has a test here.
func allViolations() []violation {
	return slices.Concat(violations, leafViolations, proposalViolations)
}

func TestBrokenRulesAreRefused(t *testing.T) {
	for _, v := range allViolations() {
		t.Run(v.section+" "+v.rule, func(t *testing.T) {
			f := newForgery(t)
			m := v.message(f)
			var members error
			refused := func(c *client, who string, m *MLSMessage) error {
				before, stored := whole(c.Group), maps.Clone(c.store.m)
				_, err := c.Receive(c.store, m)
				if v.judges == serverOnly {
					if err != nil {
						t.Errorf("%s: %v", who, err)
					}
					return nil
				}
				v.check(t, who, err)
				unchanged(t, who+" in memory", whole(c.Group), before)
				unchanged(t, who+" stored", c.store.m, stored)
				return err
			}
			for _, c := range []*client{f.bob, f.dave} {
				members = refused(c, c.name, m)
			}
			if m.Public == nil { // the server doesn't see it
				return
			}
			if private := f.private(m); private != nil && v.section != "" && v.judges != serverOnly {
				for _, c := range []*client{f.bob, f.dave} {
					sameRule(t, members, refused(c, c.name+", encrypted", private))
				}
			}
			before, stored := whole(f.server), maps.Clone(f.store.m)
			var err error
			if m.Public.Content.ContentType == ContentCommit {
				_, err = f.server.CheckCommit(m.Public)
			} else {
				_, err = f.server.CheckProposal(m.Public)
			}
			switch v.judges {
			case membersOnly:
				if err != nil {
					t.Errorf("server: %v", err)
				}
			case everyone:
				v.check(t, "server", err)
				sameRule(t, members, err)
			default:
				v.check(t, "server", err)
			}
			unchanged(t, "server in memory", whole(f.server), before)
			unchanged(t, "server stored", f.store.m, stored)
		})
	}
}

// sameRule compares the rule that two refusals name, if they name one.
func sameRule(t *testing.T, a, b error) {
	t.Helper()
	var x, y *ValidationError
	if errors.As(a, &x) != errors.As(b, &y) {
		t.Errorf("refused as %v and as %v", a, b)
	} else if x != nil && (x.Section != y.Section || x.Rule != y.Rule) {
		t.Errorf("refused for %s %q and for %s %q", x.Section, x.Rule, y.Section, y.Rule)
	}
}

func (v *violation) check(t *testing.T, who string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s accepts it", who)
		return
	}
	if v.is != nil && !errors.Is(err, v.is) {
		t.Errorf("%s: got %v, want %v", who, err, v.is)
	}
	if v.section == "" {
		if v.is == nil {
			t.Fatal("the row says neither section nor error")
		}
		return
	}
	var ve *ValidationError
	if !errors.As(err, &ve) || ve.Section != v.section {
		t.Errorf("%s: got %v, want a violation of %s", who, err, v.section)
	}
}

// TestUnbrokenMessagesAreAccepted shows that the forger's messages fail for what is broken in them only.
func TestUnbrokenMessagesAreAccepted(t *testing.T) {
	for name, message := range map[string]func(f *forgery) *MLSMessage{
		"commit":   func(f *forgery) *MLSMessage { return f.commit(forged{}) },
		"add":      withKeyPackage(func(*KeyPackage) {}),
		"update":   withUpdate(func(*LeafNode) {}),
		"leaf":     withLeaf(func(*LeafNode) {}),
		"remove":   commitOf(remove(2)),
		"external": func(f *forgery) *MLSMessage { f.join("eve"); return f.commit(forged{}) },
		"external, with a key and data": func(f *forgery) *MLSMessage {
			f.join("eve", sharedPSK(), componentPSK(), appData(0x8001, "+"), ephemeral(0x8001, []byte("x")))
			return f.commit(forged{})
		},
		"external, for a former leaf": func(f *forgery) *MLSMessage {
			f.join("dave#2", remove(f.dave.OwnLeaf()))
			return f.commit(forged{})
		},
		"client replaced": func(f *forgery) *MLSMessage {
			return f.commit(forged{props: []Proposal{remove(2), f.keyPackage("carol", f.carol.signer, nil)}})
		},
		"extensions": withExtensions(func(e Extensions) Extensions {
			return e.Remove(ExtensionExternalSenders)
		}),
		"request to be added": withRequest(func(*KeyPackage) {}),
		"component removed":   commitOf(appRemove(0x8001)),
		"reinit": func(f *forgery) *MLSMessage {
			return f.commit(forged{noPath: true, props: []Proposal{reinit(nil)}})
		},
		"reinit, to a version to come": commitOf(reinit(func(r *ReInit) { r.Version, r.CipherSuite = 2, 0xf00d })),
		"reinit of an external sender": func(f *forgery) *MLSMessage {
			m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, reinit(nil))
			f.must(err)
			return m
		},
		"ephemeral data": func(f *forgery) *MLSMessage {
			return f.commit(forged{noPath: true, props: []Proposal{ephemeral(0x8001, []byte("x"))}})
		},
		"ephemeral data of an external sender": func(f *forgery) *MLSMessage {
			m, err := ExternalProposal(testSuite, f.alice.cfg.rand(), f.hub, 0, f.alice.GroupID(), f.alice.Epoch(), nil, ephemeral(0x8001, nil))
			f.must(err)
			return m
		},
		"self_remove":     withSelfRemoves(forged{}, carol),
		"safe AAD, empty": withAAD("\x00"),
		"safe AAD":        withAAD(string(codec.Marshal(SafeAAD{{0x0a0a, nil}, {0x8001, []byte("x")}}))),
		"safe AAD of a proposal": withSafeAAD(func(f *forgery) *MLSMessage {
			f.join("eve", componentPSK())
			return f.proposalWith(f.carol, appData(0x8001, "+"), []byte{0})
		}),
		"wire formats that all have": withExtensions(func(e Extensions) Extensions {
			return e.Set(ExtensionRequiredWireFormats, codec.Marshal(WireFormats{WireFormatPublicMessage, WireFormatKeyPackage}))
		}),
		"components that all have": commitOf(setTerms(ComponentAppComponents, ComponentsList{ComponentAppComponents, ComponentSafeAAD})),
		// Only who adds somebody or commits sees to it.
		"media types that nobody lists": commitOf(setTerms(ComponentMediaTypes, MediaTypeList{{Type: "text/plain"}})),
	} {
		t.Run(name, func(t *testing.T) {
			f := newForgery(t)
			m := message(f)
			if _, err := f.bob.Receive(f.bob.store, m); err != nil {
				t.Error(err)
			}
			var err error
			if m.Public.Content.ContentType == ContentCommit {
				_, err = f.server.CheckCommit(m.Public)
			} else {
				_, err = f.server.CheckProposal(m.Public)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAppDataUpdateNeedsSupportOfAllWhoStay(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	r.add(alice, "bob")
	old, kp, secrets := keyPackage(t, testSuite, "old client")
	f := &forgery{TB: t, room: r, alice: alice}
	p := f.keyPackage("old client", old.signer, func(k *KeyPackage) {
		k.InitKey, k.LeafNode.EncryptionKey = kp.InitKey, kp.LeafNode.EncryptionKey
		k.LeafNode.Capabilities.Proposals = nil
	})
	c := r.commit(alice, CommitOptions{Proposals: []Proposal{p}, TreeInWelcome: true})
	g, err := JoinGroup(testConfig(), old.store, old.signer, c.Welcome(), &p.Add.KeyPackage, secrets, nil)
	if err != nil {
		t.Fatal(err)
	}
	old.Group = g
	r.members = append(r.members, old)
	_, err = alice.Commit(alice.store, CommitOptions{Proposals: []Proposal{appData(0x8001, "x")}})
	var ve *ValidationError
	if !errors.As(err, &ve) || ve.Section != "12.2" {
		t.Errorf("got %v, want a violation of 12.2", err)
	}
	r.commit(alice, CommitOptions{Proposals: []Proposal{appData(0x8001, "x"), remove(old.OwnLeaf())}})
	r.check()
	r.checkStores()
}

func TestGroupInfoOfACommitIsChecked(t *testing.T) {
	f := newForgery(t)
	c, err := f.alice.Commit(f.alice.store, CommitOptions{})
	f.must(err)
	s, err := f.server.CheckCommit(c.Message().Public)
	f.must(err)
	f.must(s.CheckGroupInfo(c.GroupInfo()))
	full := *c.GroupInfo()
	full.Extensions = full.Extensions.Set(ExtensionRatchetTree, codec.Marshal(c.Tree()))
	f.must(full.sign(f.alice.cfg.rand(), f.alice.signer))
	f.must(s.CheckGroupInfo(&full))
	for _, v := range []struct {
		rule   string
		is     error
		signer *client
		edit   func(gi *GroupInfo)
	}{
		{"context", nil, f.alice, func(gi *GroupInfo) { gi.GroupContext.Epoch++ }},
		{"tree hash", nil, f.alice, func(gi *GroupInfo) { gi.GroupContext.TreeHash = flip(gi.GroupContext.TreeHash) }},
		{"confirmation tag", ErrConfirmationTag, f.alice, func(gi *GroupInfo) { gi.ConfirmationTag = flip(gi.ConfirmationTag) }},
		{"signer", nil, f.bob, func(gi *GroupInfo) { gi.Signer = 1 }},
		{"signature", ErrSignature, f.bob, func(*GroupInfo) {}},
		{"ratchet tree", nil, f.alice, func(gi *GroupInfo) {
			gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, codec.Marshal(f.alice.Tree()))
		}},
		{"ratchet tree that isn't one", nil, f.alice, func(gi *GroupInfo) { gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, []byte{9}) }},
		{"key for external commits", ErrMalformed, f.alice, func(gi *GroupInfo) { gi.Extensions = gi.Extensions.Set(ExtensionExternalPub, []byte{1, 9}) }},
		{"extensions", nil, f.alice, func(gi *GroupInfo) { gi.Extensions = append(gi.Extensions, gi.Extensions[0]) }},
	} {
		gi := *c.GroupInfo()
		gi.Extensions = slices.Clone(gi.Extensions)
		v.edit(&gi)
		f.must(gi.sign(f.alice.cfg.rand(), v.signer.signer))
		if err := s.CheckGroupInfo(&gi); err == nil {
			t.Errorf("%s: accepted", v.rule)
		} else if v.is != nil && !errors.Is(err, v.is) {
			t.Errorf("%s: got %v, want %v", v.rule, err, v.is)
		}
	}
	if err := s.CheckTree(f.server.Tree()); err == nil {
		t.Error("the old tree is accepted as the new one")
	}
	// A commit that was checked before another was applied is stale.
	f.must(f.alice.Drop(f.alice.store))
	f.room.commit(f.bob, CommitOptions{})
	if err := f.server.Apply(f.store, s, c.GroupInfo()); !errors.Is(err, ErrEpoch) {
		t.Errorf("stale commit: got %v, want ErrEpoch", err)
	}
	f.checkStores()
}

// TestPendingProposalsThatDoNotGoTogetherAreLeftOut: a committer takes what is valid together.
func TestPendingProposalsThatDoNotGoTogetherAreLeftOut(t *testing.T) {
	f := newForgery(t)
	r := f.room
	r.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))
	r.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))                                           // supersedes the first
	r.propose(f.dave.ProposeUpdate(f.dave.store, UpdateOptions{}))                                             // superseded by the Remove
	r.propose(f.bob.Propose(f.bob.store, nil, remove(f.dave.OwnLeaf())))                                       //
	r.propose(f.bob.Propose(f.bob.store, nil, remove(f.alice.OwnLeaf())))                                      // not by alice herself
	r.propose(f.bob.Propose(f.bob.store, nil, f.keyPackage("carol", nil, nil)))                                // is a member
	r.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+")))                                           //
	r.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "no")))                                          // the component refuses it
	r.propose(f.alice.ProposeUpdate(f.alice.store, UpdateOptions{}))                                           // her own
	r.propose(f.bob.Propose(f.bob.store, nil, psk(PreSharedKeyID{Type: PSKExternal, ID: []byte("nobody's")}))) // unknown
	c := r.commit(f.alice, CommitOptions{})
	var got []ProposalType
	for _, p := range c.Info().Proposals {
		got = append(got, p.Proposal.Type)
	}
	if want := []ProposalType{ProposalUpdate, ProposalRemove, ProposalAppDataUpdate}; !slices.Equal(got, want) {
		t.Errorf("committed %v, want %v", got, want)
	}
	r.check()
	r.checkStores()
	if len(f.alice.Pending())+len(r.server.Pending()) != 0 {
		t.Error("proposals are pending after the commit")
	}
}

func TestPolicyRefusesCommits(t *testing.T) {
	f := newForgery(t)
	no := errors.New("no removes here")
	policy := func(info *StagedInfo) error {
		if len(info.Removed) > 0 {
			return no
		}
		return nil
	}
	m := f.commit(forged{props: []Proposal{remove(2)}})
	for _, c := range f.members {
		c.cfg.Policy = policy
	}
	f.server.rules.policy = policy
	if _, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{remove(2)}}); !errors.Is(err, no) {
		t.Errorf("committer: got %v", err)
	}
	if _, err := f.bob.Receive(f.bob.store, m); !errors.Is(err, no) {
		t.Errorf("member: got %v", err)
	}
	if _, err := f.server.CheckCommit(m.Public); !errors.Is(err, no) {
		t.Errorf("server: got %v", err)
	}
	// A pending proposal that the policy refuses doesn't keep the others from being committed.
	f.room.propose(f.bob.Propose(f.bob.store, nil, remove(2)))
	f.room.propose(f.bob.Propose(f.bob.store, nil, appData(0x8001, "+")))
	if c := f.room.commit(f.alice, CommitOptions{}); len(c.Info().Proposals) != 1 {
		t.Errorf("%d proposals committed, want 1", len(c.Info().Proposals))
	}
}
