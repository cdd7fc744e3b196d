package mls

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// framingGroup is what two members of an epoch share.
type framingGroup struct {
	*testTree
	ctx        []byte
	membership secret
	senderData secret
	encryption secret
}

func newFramingGroup(t *testing.T) *framingGroup {
	tt := newTestTree(t, testSuite, 2)
	ctx := codec.Marshal(GroupContext{Version: MLS10, CipherSuite: testSuite, GroupID: tt.groupID, Epoch: 4, TreeHash: tt.Hash(testSuite)})
	return &framingGroup{tt, ctx, make(secret, 32), make(secret, 32), make(secret, 32)}
}

func (g *framingGroup) sign(t *testing.T, wf WireFormat, c FramedContent) *AuthenticatedContent {
	t.Helper()
	c.GroupID, c.Epoch = g.groupID, 4
	ac, err := signContent(testSuite, g.rand, g.signers[1], wf, c, g.ctx)
	if err != nil {
		t.Fatal(err)
	}
	return ac
}

func applicationData(data string) FramedContent {
	return FramedContent{Sender: Sender{Type: SenderMember, Leaf: 1}, ContentType: ContentApplication, ApplicationData: []byte(data)}
}

func removeBy(sender Sender) FramedContent {
	return FramedContent{Sender: sender, ContentType: ContentProposal, Proposal: &Proposal{Type: ProposalRemove, Remove: &Remove{0}}}
}

func TestPaddingHidesLengthAndIsZero(t *testing.T) {
	g := newFramingGroup(t)
	lengths := make(map[int]bool)
	for _, data := range []string{"", "a", "somewhat longer"} {
		m, _, err := protectPrivate(testSuite, g.rand, newSecretTree(testSuite, 2, g.encryption), g.senderData,
			g.sign(t, WireFormatPrivateMessage, applicationData(data)), func(int) int { return 256 })
		if err != nil {
			t.Fatal(err)
		}
		lengths[len(m.Ciphertext)] = true
		ac, _, err := unprotectPrivate(testSuite, newSecretTree(testSuite, 2, g.encryption), g.senderData, m, ratchetLimits{})
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "data", ac.Content.ApplicationData, []byte(data))
	}
	if len(lengths) != 1 {
		t.Errorf("padded ciphertexts of lengths %v", lengths)
	}

	// A sender that hides something in the padding.
	ac := g.sign(t, WireFormatPrivateMessage, applicationData("a"))
	var w codec.Writer
	ac.Content.marshalBody(&w)
	marshalAuth(&w, ContentApplication, ac.Signature, nil)
	w.Raw([]byte{0, 0, 1, 0})
	m := &PrivateMessage{GroupID: g.groupID, Epoch: 4, ContentType: ContentApplication}
	_, key, nonce, err := newSecretTree(testSuite, 2, g.encryption).next(1, applicationRatchet)
	if err != nil {
		t.Fatal(err)
	}
	if m.Ciphertext, err = testSuite.aeadSeal(key, nonce, m.contentAAD(), w.Bytes()); err != nil {
		t.Fatal(err)
	}
	k, n := senderDataKey(testSuite, g.senderData, m.Ciphertext)
	if m.EncryptedSenderData, err = testSuite.aeadSeal(k, n, m.senderDataAAD(), codec.Marshal(senderData{leaf: 1})); err != nil {
		t.Fatal(err)
	}
	if _, _, err := unprotectPrivate(testSuite, newSecretTree(testSuite, 2, g.encryption), g.senderData, m, ratchetLimits{}); !errors.Is(err, ErrMalformed) {
		t.Errorf("padding that isn't zero: got %v, want ErrMalformed", err)
	}
}

func TestEveryFieldOfAPrivateMessageIsProtected(t *testing.T) {
	g := newFramingGroup(t)
	c := applicationData("data")
	c.AuthenticatedData = []byte("aad")
	m, _, err := protectPrivate(testSuite, g.rand, newSecretTree(testSuite, 2, g.encryption), g.senderData, g.sign(t, WireFormatPrivateMessage, c), nil)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(m *PrivateMessage){
		"group":              func(m *PrivateMessage) { m.GroupID = []byte("other") },
		"epoch":              func(m *PrivateMessage) { m.Epoch++ },
		"content type":       func(m *PrivateMessage) { m.ContentType = ContentProposal },
		"authenticated data": func(m *PrivateMessage) { m.AuthenticatedData = nil },
		"sender data":        func(m *PrivateMessage) { m.EncryptedSenderData = m.EncryptedSenderData[1:] },
		"ciphertext":         func(m *PrivateMessage) { m.Ciphertext = m.Ciphertext[:len(m.Ciphertext)-1] },
		"empty ciphertext":   func(m *PrivateMessage) { m.Ciphertext = nil },
	} {
		bad := *m
		change(&bad)
		if _, _, err := unprotectPrivate(testSuite, newSecretTree(testSuite, 2, g.encryption), g.senderData, &bad, ratchetLimits{}); !errors.Is(err, ErrDecrypt) {
			t.Errorf("other %s: got %v, want ErrDecrypt", what, err)
		}
	}
}

func TestSignatureCoversWireFormatAndGroupContext(t *testing.T) {
	g := newFramingGroup(t)
	pub := g.Leaf(1).SignatureKey
	ac := g.sign(t, WireFormatPublicMessage, removeBy(Sender{Type: SenderMember, Leaf: 1}))
	if err := ac.verifySignature(testSuite, pub, g.ctx); err != nil {
		t.Fatal(err)
	}
	if err := ac.verifySignature(testSuite, pub, append(g.ctx, 0)); !errors.Is(err, ErrSignature) {
		t.Errorf("other group context: got %v, want ErrSignature", err)
	}
	ac.WireFormat = WireFormatPrivateMessage
	if err := ac.verifySignature(testSuite, pub, g.ctx); !errors.Is(err, ErrSignature) {
		t.Errorf("other wire format: got %v, want ErrSignature", err)
	}
	external := g.sign(t, WireFormatPublicMessage, removeBy(Sender{Type: SenderExternal}))
	if err := external.verifySignature(testSuite, pub, nil); err != nil {
		t.Errorf("an external sender's signature depends on the group context: %v", err)
	}
}

func TestOnlyMembersHaveMembershipTags(t *testing.T) {
	g := newFramingGroup(t)
	for _, typ := range []SenderType{SenderMember, SenderExternal, SenderNewMemberProposal, SenderNewMemberCommit} {
		m, err := protectPublic(testSuite, g.sign(t, WireFormatPublicMessage, removeBy(Sender{Type: typ, Leaf: 1})), g.membership, g.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if (m.MembershipTag != nil) != (typ == SenderMember) {
			t.Errorf("sender type %d: tag %x", typ, m.MembershipTag)
		}
		if err := m.verifyMembershipTag(testSuite, g.membership, g.ctx); err != nil {
			t.Error(err)
		}
		if err := m.verifyMembershipTag(testSuite, append(secret{1}, g.membership[1:]...), g.ctx); typ == SenderMember && !errors.Is(err, ErrMembershipTag) {
			t.Errorf("other key: got %v, want ErrMembershipTag", err)
		}
		if _, _, err := protectPrivate(testSuite, g.rand, newSecretTree(testSuite, 2, g.encryption), g.senderData,
			g.sign(t, WireFormatPrivateMessage, removeBy(Sender{Type: typ, Leaf: 1})), nil); (err == nil) != (typ == SenderMember) {
			t.Errorf("sender type %d encrypts: %v", typ, err)
		}
	}
}

func TestUnknownValuesAreUnsupported(t *testing.T) {
	for what, c := range map[string]struct {
		in []byte
		as codec.Unmarshaler
	}{
		"version":         {[]byte{0, 2, 0, 5}, new(MLSMessage)},
		"wire format":     {[]byte{0, 1, 0, 9}, new(MLSMessage)},
		"proposal type":   {[]byte{0x0a, 0x0a}, new(Proposal)},
		"credential type": {[]byte{0, 9}, new(Credential)},
		"context version": {[]byte{0, 2, 0, 1}, new(GroupContext)},
	} {
		if err := codec.Unmarshal(c.in, c.as); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: got %v, want ErrUnsupported", what, err)
		}
	}
}
