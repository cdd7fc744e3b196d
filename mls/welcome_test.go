package mls

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"slices"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// TestForgedWelcomesAreRefused has a committer send Welcomes in which everything but one thing is right (RFC 9420,
// Section 12.4.3.1).
func TestForgedWelcomesAreRefused(t *testing.T) {
	f := newForgery(t)
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.carol.OwnLeaf())}}) // leaves a blank leaf
	joiner, kp, secrets := keyPackage(t, testSuite, "eve")
	_, second, _ := keyPackage(t, testSuite, "other")
	before := f.alice.Context()
	c, err := f.alice.Commit(f.alice.store, CommitOptions{ForcePath: true, Proposals: []Proposal{add(second), add(kp)}})
	f.must(err)
	own, err := findLeaf(c.Tree(), &kp.LeafNode)
	f.must(err)
	// welcome is what a forger decides on.
	type welcome struct {
		info   GroupInfo
		tree   *RatchetTree
		signer crypto.Signer
		path   secret
		psks   []PreSharedKeyID
		joiner secret
		edit   func(*Welcome)
	}
	nonce := make([]byte, testSuite.HashSize())
	shared := PreSharedKeyID{Type: PSKExternal, ID: []byte("shared"), Nonce: nonce}
	for _, v := range []struct {
		section, rule string
		is            error
		edit          func(w *welcome)
	}{
		{"sound", "", nil, func(*welcome) {}},
		{"sound", "with a pre-shared key", nil, func(w *welcome) { w.psks = []PreSharedKeyID{shared} }},
		{"sound", "entries of others around", nil, func(w *welcome) {
			w.edit = func(m *Welcome) {
				other := EncryptedGroupSecrets{NewMember: second.Ref(), Secrets: HPKECiphertext{[]byte{1}, []byte{2}}}
				m.Secrets = []EncryptedGroupSecrets{other, m.Secrets[0], other}
			}
		}},
		{"", "a bad entry before the good one", ErrDecrypt, func(w *welcome) {
			w.edit = func(m *Welcome) {
				bad := m.Secrets[0]
				bad.Secrets.Ciphertext = flip(bad.Secrets.Ciphertext)
				m.Secrets = []EncryptedGroupSecrets{bad, m.Secrets[0]}
			}
		}},
		{"", "no entry", ErrMalformed, func(w *welcome) { w.edit = func(m *Welcome) { m.Secrets = nil } }},
		{"12.4.3.1", "suite of the welcome", nil, func(w *welcome) {
			w.edit = func(m *Welcome) { m.CipherSuite = X25519_CHACHA20POLY1305_SHA256_Ed25519 }
		}},
		{"12.4.3.1", "suite of the group", nil, func(w *welcome) { w.info.GroupContext.CipherSuite = X25519_CHACHA20POLY1305_SHA256_Ed25519 }},
		{"7.5", "path secret", nil, func(w *welcome) { w.path = bytes.Repeat(secret{1}, testSuite.HashSize()) }},
		{"", "confirmation tag", ErrConfirmationTag, func(w *welcome) { w.info.ConfirmationTag = flip(w.info.ConfirmationTag) }},
		{"", "confirmed transcript hash", ErrConfirmationTag, func(w *welcome) {
			w.info.GroupContext.ConfirmedTranscriptHash = flip(w.info.GroupContext.ConfirmedTranscriptHash)
		}},
		{"12.4.3.1", "signed by the joiner", nil, func(w *welcome) { w.info.Signer, w.signer = own, joiner.signer }},
		{"12.4.3.1", "signer beyond the tree", nil, func(w *welcome) { w.info.Signer = 1 << 31 }},
		{"", "signer who isn't it", ErrSignature, func(w *welcome) { w.info.Signer = f.bob.OwnLeaf() }},
		{"12.4.3.1", "tree without the joiner", nil, func(w *welcome) {
			w.info.GroupContext, w.tree = before, f.alice.Tree()
			w.info.Signer, w.signer = f.bob.OwnLeaf(), f.bob.signer
		}},
		{"12.4.3.1", "pre-shared key for branching", ErrUnsupported, func(w *welcome) {
			w.psks = []PreSharedKeyID{{Type: PSKResumption, Usage: UsageBranch, Nonce: nonce}}
		}},
		{"12.4.3.1", "pre-shared key for reinitialisation", ErrUnsupported, func(w *welcome) {
			w.psks = []PreSharedKeyID{{Type: PSKResumption, Usage: UsageReInit, Nonce: nonce}}
		}},
		{"8.4", "nonce of a pre-shared key", nil, func(w *welcome) {
			w.psks = []PreSharedKeyID{{Type: PSKExternal, ID: []byte("shared"), Nonce: []byte{1}}}
		}},
		{"12.4.2", "pre-shared key that isn't there", nil, func(w *welcome) {
			w.psks = []PreSharedKeyID{{Type: PSKExternal, ID: []byte("other"), Nonce: nonce}}
		}},
		{"13.4", "extension that the joiner doesn't support", nil, func(w *welcome) {
			w.info.GroupContext.Extensions = w.info.GroupContext.Extensions.Set(0xf00d, nil)
		}},
		{"sound", "unknown extension of the group info", nil, func(w *welcome) { w.info.Extensions = w.info.Extensions.Set(0x0a0a, []byte("x")) }},
	} {
		t.Run(v.section+" "+v.rule, func(t *testing.T) {
			w := welcome{info: *c.GroupInfo(), tree: c.Tree(), signer: f.alice.signer, joiner: bytes.Repeat(secret{7}, testSuite.HashSize()), edit: func(*Welcome) {}}
			w.info.Extensions = slices.Clone(w.info.Extensions)
			psk := testSuite.zeroSecret()
			keys := func() *epochSecrets {
				return testSuite.epochSecrets(w.joiner, psk, codec.Marshal(w.info.GroupContext))
			}
			w.info.ConfirmationTag = keys().confirmationTag(testSuite, w.info.GroupContext.ConfirmedTranscriptHash)
			tag := w.info.ConfirmationTag
			v.edit(&w)
			if p, err := derivePSK(testConfig(), testSuite, w.psks, nil); err == nil {
				psk = p
			}
			if bytes.Equal(w.info.ConfirmationTag, tag) && v.is != ErrConfirmationTag {
				w.info.ConfirmationTag = keys().confirmationTag(testSuite, w.info.GroupContext.ConfirmedTranscriptHash)
			}
			f.must(w.info.sign(rand.Reader, w.signer))
			m, err := newWelcome(testSuite, rand.Reader, &w.info, w.joiner, psk, []welcomeMember{{kp: kp, pathSecret: w.path}}, w.psks)
			f.must(err)
			w.edit(m)
			s := newMemStore()
			_, err = JoinGroup(testConfig(), s, joiner.signer, wire(t, NewMLSMessage(m)).Welcome, kp, secrets, fresh(t, w.tree))
			if v.section == "sound" {
				f.must(err)
				return
			}
			(&violation{section: v.section, is: v.is}).check(t, "joiner", err)
			if len(s.m) > 0 {
				t.Error("state was written")
			}
		})
	}
}
