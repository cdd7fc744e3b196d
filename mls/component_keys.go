package mls

import (
	"crypto"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls/codec"
)

// Keys of the group in the hands of components (draft-ietf-mls-extensions, Sections 4.1 to 4.3).

// componentLabel is a ComponentOperationLabel.
//
//	struct {
//	    opaque base_label<V>; /* = "MLS Component" */
//	    ComponentID component_id;
//	    opaque label<V>;
//	} ComponentOperationLabel;
func componentLabel(id ComponentID, label string) string {
	var w codec.Writer
	w.Opaque([]byte("MLS Component"))
	w.Uint16(uint16(id))
	w.Opaque([]byte(label))
	return string(w.Bytes())
}

// SafeEncryptWithLabel is EncryptWithLabel for a component: nothing but SafeDecryptWithLabel for the same one and label
// opens the result (draft-ietf-mls-extensions, Section 4.2). It fails with ErrMalformed for a bad key.
func (cs CipherSuite) SafeEncryptWithLabel(rand io.Reader, publicKey HPKEPublicKey, id ComponentID, label string, context, plaintext []byte) (HPKECiphertext, error) {
	return cs.EncryptWithLabel(rand, publicKey, componentLabel(id, label), context, plaintext)
}

// SafeDecryptWithLabel opens what SafeEncryptWithLabel sealed. id must be that of the component that asks for it. It
// fails with ErrDecrypt.
func (cs CipherSuite) SafeDecryptWithLabel(privateKey HPKEPrivateKey, id ComponentID, label string, context []byte, ct HPKECiphertext) ([]byte, error) {
	return cs.DecryptWithLabel(privateKey, componentLabel(id, label), context, ct)
}

// SafeSignWithLabel is SignWithLabel for a component, whose own id must be given (draft-ietf-mls-extensions, Section
// 4.3).
func (cs CipherSuite) SafeSignWithLabel(rand io.Reader, signer crypto.Signer, id ComponentID, label string, content []byte) ([]byte, error) {
	return cs.SignWithLabel(rand, signer, componentLabel(id, label), content)
}

// SafeVerifyWithLabel checks what SafeSignWithLabel signed for any component. It fails with ErrSignature, or
// ErrMalformed for a bad key.
func (cs CipherSuite) SafeVerifyWithLabel(publicKey []byte, id ComponentID, label string, content, signature []byte) error {
	return cs.VerifyWithLabel(publicKey, componentLabel(id, label), content, signature)
}

// SafeSign signs with the own leaf's signature key. Others check it by SafeVerifyWithLabel with the leaf's key. It
// fails with ErrRemoved for a former member, and with ErrSigner.
func (g *Group) SafeSign(id ComponentID, label string, content []byte) ([]byte, error) {
	g.mu.RLock()
	active, signer, cs := g.view.active, g.view.signer, g.view.state.context.CipherSuite
	g.mu.RUnlock()
	switch {
	case !active:
		return nil, fmt.Errorf("mls: safe sign: %w", ErrRemoved)
	case signer == nil:
		return nil, fmt.Errorf("mls: safe sign: %w", ErrSigner)
	}
	return cs.SafeSignWithLabel(g.cfg.rand(), signer, id, label, content)
}

// SafeDecrypt opens what was sealed to the own leaf's encryption key by SafeEncryptWithLabel. A later leaf has another
// key. It takes turns with the methods that change the group. It fails with ErrDecrypt, and with ErrRemoved for a
// former member.
func (g *Group) SafeDecrypt(id ComponentID, label string, context []byte, ct HPKECiphertext) ([]byte, error) {
	g.op.Lock()
	defer g.done()
	if !g.active {
		return nil, fmt.Errorf("mls: safe decrypt: %w", ErrRemoved)
	}
	plain, err := g.suite().SafeDecryptWithLabel(g.private.keys[g.own.node()], id, label, context, ct)
	if err != nil {
		return nil, fmt.Errorf("mls: safe decrypt: %w", err)
	}
	return plain, nil
}
