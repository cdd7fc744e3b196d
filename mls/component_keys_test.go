package mls

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"
)

func TestComponentsUseKeysApart(t *testing.T) {
	if got, want := componentLabel(0x8001, "op"), "\x0dMLS Component\x80\x01\x02op"; got != want {
		t.Errorf("label %q, want %q", got, want)
	}
	f := newForgery(t)
	cs, leaf := testSuite, f.alice.Tree().Leaf(f.bob.OwnLeaf())
	content, context := []byte("content"), []byte("context")
	sig, err := f.bob.SafeSign(0x8001, "op", content)
	f.must(err)
	f.must(cs.SafeVerifyWithLabel(leaf.SignatureKey, 0x8001, "op", content, sig))
	for what, err := range map[string]error{
		"another component": cs.SafeVerifyWithLabel(leaf.SignatureKey, 0x8002, "op", content, sig),
		"another operation": cs.SafeVerifyWithLabel(leaf.SignatureKey, 0x8001, "po", content, sig),
		"MLS itself":        cs.VerifyWithLabel(leaf.SignatureKey, "op", content, sig),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("signature for %s: got %v, want ErrSignature", what, err)
		}
	}
	ct, err := cs.SafeEncryptWithLabel(rand.Reader, leaf.EncryptionKey, 0x8001, "op", context, content)
	f.must(err)
	plain, err := f.bob.SafeDecrypt(0x8001, "op", context, ct)
	f.must(err)
	if !bytes.Equal(plain, content) {
		t.Errorf("got %q", plain)
	}
	for what, err := range map[string]error{
		"component": second(f.bob.SafeDecrypt(0x8002, "op", context, ct)),
		"operation": second(f.bob.SafeDecrypt(0x8001, "po", context, ct)),
		"context":   second(f.bob.SafeDecrypt(0x8001, "op", nil, ct)),
		"member":    second(f.carol.SafeDecrypt(0x8001, "op", context, ct)),
	} {
		if !errors.Is(err, ErrDecrypt) {
			t.Errorf("another %s: got %v, want ErrDecrypt", what, err)
		}
	}
	f.room.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.bob.OwnLeaf())}})
	if err := second(f.bob.SafeSign(0x8001, "op", content)); !errors.Is(err, ErrRemoved) {
		t.Errorf("former member signs: %v", err)
	}
	if err := second(f.bob.SafeDecrypt(0x8001, "op", context, ct)); !errors.Is(err, ErrRemoved) {
		t.Errorf("former member decrypts: %v", err)
	}
}

func TestComponentsSignOnlyWithASigner(t *testing.T) {
	f := newForgery(t)
	g, err := LoadGroup(testConfig(), nil, f.bob.store.all())
	f.must(err)
	if _, err := g.SafeSign(0x8001, "label", nil); !errors.Is(err, ErrSigner) {
		t.Errorf("got %v, want ErrSigner", err)
	}
}
