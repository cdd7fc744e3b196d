package mls

import (
	"crypto/rand"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func TestVectorsMessageProtection(t *testing.T) {
	type vector struct {
		CipherSuite             CipherSuite `json:"cipher_suite"`
		GroupID                 hexBytes    `json:"group_id"`
		Epoch                   uint64      `json:"epoch"`
		TreeHash                hexBytes    `json:"tree_hash"`
		ConfirmedTranscriptHash hexBytes    `json:"confirmed_transcript_hash"`
		SignaturePriv           hexBytes    `json:"signature_priv"`
		SignaturePub            hexBytes    `json:"signature_pub"`
		EncryptionSecret        hexBytes    `json:"encryption_secret"`
		SenderDataSecret        hexBytes    `json:"sender_data_secret"`
		MembershipKey           hexBytes    `json:"membership_key"`
		Proposal                hexBytes    `json:"proposal"`
		ProposalPub             hexBytes    `json:"proposal_pub"`
		ProposalPriv            hexBytes    `json:"proposal_priv"`
		Commit                  hexBytes    `json:"commit"`
		CommitPub               hexBytes    `json:"commit_pub"`
		CommitPriv              hexBytes    `json:"commit_priv"`
		Application             hexBytes    `json:"application"`
		ApplicationPriv         hexBytes    `json:"application_priv"`
	}
	forSuites(t, "message-protection", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		ctx := codec.Marshal(GroupContext{Version: MLS10, CipherSuite: cs, GroupID: v.GroupID, Epoch: v.Epoch,
			TreeHash: v.TreeHash, ConfirmedTranscriptHash: v.ConfirmedTranscriptHash})
		signer, lim := signerFrom(t, cs, v.SignaturePriv), ratchetLimits{}
		membership, senderDataSecret := secret(v.MembershipKey), secret(v.SenderDataSecret)
		body := func(ac *AuthenticatedContent) []byte {
			switch ac.Content.ContentType {
			case ContentProposal:
				return codec.Marshal(ac.Content.Proposal)
			case ContentCommit:
				return codec.Marshal(ac.Content.Commit)
			}
			return ac.Content.ApplicationData
		}
		openPublic := func(m *PublicMessage, want []byte) *AuthenticatedContent {
			t.Helper()
			if err := m.verifyMembershipTag(cs, membership, ctx); err != nil {
				t.Error(err)
			}
			ac := m.authenticated()
			if err := ac.verifySignature(cs, v.SignaturePub, ctx); err != nil {
				t.Error(err)
			}
			wantBytes(t, "public content", body(ac), want)
			return ac
		}
		openPrivate := func(m *PrivateMessage, want []byte) *AuthenticatedContent {
			t.Helper()
			st := newSecretTree(cs, 2, secret(v.EncryptionSecret))
			ac, step, err := unprotectPrivate(cs, st, senderDataSecret, m, lim)
			if err != nil {
				t.Fatal(err)
			}
			if err := ac.verifySignature(cs, v.SignaturePub, ctx); err != nil {
				t.Error(err)
			}
			st.consume(step)
			if _, _, err := unprotectPrivate(cs, st, senderDataSecret, m, lim); err == nil {
				t.Error("a message decrypts twice")
			}
			wantBytes(t, "private content", body(ac), want)
			return ac
		}
		sign := func(wf WireFormat, from *AuthenticatedContent) *AuthenticatedContent {
			t.Helper()
			c := from.Content
			c.AuthenticatedData = []byte("aad")
			ac, err := signContent(cs, rand.Reader, signer, wf, c, ctx)
			if err != nil {
				t.Fatal(err)
			}
			ac.ConfirmationTag = from.ConfirmationTag
			return ac
		}
		for _, c := range []struct{ raw, pub, priv hexBytes }{
			{v.Proposal, v.ProposalPub, v.ProposalPriv},
			{v.Commit, v.CommitPub, v.CommitPriv},
			{v.Application, nil, v.ApplicationPriv},
		} {
			var m MLSMessage
			decode(t, c.priv, &m)
			wantBytes(t, "private message", codec.Marshal(m), c.priv)
			ac := openPrivate(m.Private, c.raw)
			for _, padding := range []func(int) int{nil, func(n int) int { return n + 100 }} {
				st := newSecretTree(cs, 2, secret(v.EncryptionSecret))
				own, _, err := protectPrivate(cs, rand.Reader, st, senderDataSecret, sign(WireFormatPrivateMessage, ac), padding)
				if err != nil {
					t.Fatal(err)
				}
				openPrivate(own, c.raw)
			}
			if c.pub == nil {
				if _, err := protectPublic(cs, sign(WireFormatPublicMessage, ac), membership, ctx); err == nil {
					t.Error("application data was framed as a PublicMessage")
				}
				continue
			}
			decode(t, c.pub, &m)
			wantBytes(t, "public message", codec.Marshal(m), c.pub)
			ac = openPublic(m.Public, c.raw)
			own, err := protectPublic(cs, sign(WireFormatPublicMessage, ac), membership, ctx)
			if err != nil {
				t.Fatal(err)
			}
			openPublic(own, c.raw)
			own.MembershipTag[0] ^= 1
			if err := own.verifyMembershipTag(cs, membership, ctx); err == nil {
				t.Error("changed membership tag accepted")
			}
		}
	})
}

func TestVectorsMessages(t *testing.T) {
	type vector struct {
		Welcome                hexBytes `json:"mls_welcome"`
		GroupInfo              hexBytes `json:"mls_group_info"`
		KeyPackage             hexBytes `json:"mls_key_package"`
		RatchetTree            hexBytes `json:"ratchet_tree"`
		GroupSecrets           hexBytes `json:"group_secrets"`
		Add                    hexBytes `json:"add_proposal"`
		Update                 hexBytes `json:"update_proposal"`
		Remove                 hexBytes `json:"remove_proposal"`
		PreSharedKey           hexBytes `json:"pre_shared_key_proposal"`
		ReInit                 hexBytes `json:"re_init_proposal"`
		ExternalInit           hexBytes `json:"external_init_proposal"`
		GroupContextExtensions hexBytes `json:"group_context_extensions_proposal"`
		Commit                 hexBytes `json:"commit"`
		PublicApplication      hexBytes `json:"public_message_application"`
		PublicProposal         hexBytes `json:"public_message_proposal"`
		PublicCommit           hexBytes `json:"public_message_commit"`
		PrivateMessage         hexBytes `json:"private_message"`
	}
	for i, v := range loadVectors[vector](t, "messages") {
		for _, c := range []struct {
			what string
			in   hexBytes
			as   interface {
				codec.Marshaler
				codec.Unmarshaler
			}
		}{
			{"mls_welcome", v.Welcome, new(MLSMessage)},
			{"mls_group_info", v.GroupInfo, new(MLSMessage)},
			{"mls_key_package", v.KeyPackage, new(MLSMessage)},
			{"ratchet_tree", v.RatchetTree, new(RatchetTree)},
			{"group_secrets", v.GroupSecrets, new(GroupSecrets)},
			{"add_proposal", v.Add, new(Add)},
			{"update_proposal", v.Update, new(Update)},
			{"remove_proposal", v.Remove, new(Remove)},
			{"pre_shared_key_proposal", v.PreSharedKey, new(PreSharedKey)},
			{"re_init_proposal", v.ReInit, new(ReInit)},
			{"external_init_proposal", v.ExternalInit, new(ExternalInit)},
			{"group_context_extensions_proposal", v.GroupContextExtensions, new(GroupContextExtensions)},
			{"commit", v.Commit, new(Commit)},
			{"public_message_application", v.PublicApplication, new(MLSMessage)},
			{"public_message_proposal", v.PublicProposal, new(MLSMessage)},
			{"public_message_commit", v.PublicCommit, new(MLSMessage)},
			{"private_message", v.PrivateMessage, new(MLSMessage)},
		} {
			if err := codec.Unmarshal(c.in, c.as); err != nil {
				t.Errorf("%d %s: %v", i, c.what, err)
				continue
			}
			if got := codec.Marshal(c.as); string(got) != string(c.in) {
				t.Errorf("%d %s: encoding what was decoded gives %x, want %x", i, c.what, got, c.in)
			}
		}
	}
}
