package mls

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// MaxLifetime is the longest total lifetime of a KeyPackage that is accepted unless the application sets another (RFC
// 9420, Section 7.2).
const MaxLifetime = 400 * 24 * time.Hour

// DefaultLifetime is that of a KeyPackage whose options name none, from the time when it is made.
const DefaultLifetime = 90 * 24 * time.Hour

// KeyPackage lets others add a client to a group while it is offline (RFC 9420, Section 10).
//
//	struct {
//	    ProtocolVersion version;
//	    CipherSuite cipher_suite;
//	    HPKEPublicKey init_key;
//	    LeafNode leaf_node;
//	    Extension extensions<V>;
//	    opaque signature<V>;
//	} KeyPackage;
type KeyPackage struct {
	Version     ProtocolVersion
	CipherSuite CipherSuite
	InitKey     HPKEPublicKey
	LeafNode    LeafNode
	Extensions  Extensions
	Signature   []byte

	sound []byte // the Ref that it had when Validate found it sound
}

// validated says whether Validate found the KeyPackage sound and it hasn't changed since.
func (kp *KeyPackage) validated() bool { return kp.sound != nil && bytes.Equal(kp.sound, kp.Ref()) }

func (kp *KeyPackage) marshalUnsigned(w *codec.Writer) {
	w.Uint16(uint16(kp.Version))
	w.Uint16(uint16(kp.CipherSuite))
	w.Opaque(kp.InitKey)
	kp.LeafNode.MarshalMLS(w)
	kp.Extensions.MarshalMLS(w)
}

// MarshalMLS implements codec.Marshaler.
func (kp KeyPackage) MarshalMLS(w *codec.Writer) {
	kp.marshalUnsigned(w)
	w.Opaque(kp.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (kp *KeyPackage) UnmarshalMLS(r *codec.Reader) {
	*kp = KeyPackage{Version: ProtocolVersion(r.Uint16()), CipherSuite: CipherSuite(r.Uint16())}
	kp.InitKey = r.Opaque()
	kp.LeafNode.UnmarshalMLS(r)
	kp.Extensions.UnmarshalMLS(r)
	kp.Signature = r.Opaque()
}

// Ref returns the KeyPackageRef by which a Welcome finds the client (RFC 9420, Section 5.2), or nil if the suite
// isn't supported.
func (kp *KeyPackage) Ref() []byte {
	if !kp.CipherSuite.Supported() {
		return nil
	}
	return kp.CipherSuite.refHash("MLS 1.0 KeyPackage Reference", kp.MarshalMLS)
}

const labelKeyPackage = "KeyPackageTBS"

func (kp *KeyPackage) verifySignature() error {
	return kp.CipherSuite.verify(kp.LeafNode.SignatureKey, labelKeyPackage, kp.marshalUnsigned, kp.Signature)
}

// Validate checks a KeyPackage by itself (RFC 9420, Section 10.1): version, suite, leaf, signatures, lifetime (which is
// at most MaxLifetime and contains now), credential with v. It fails with a ValidationError. Whether it fits a group is
// checked when a proposal adds it. Validate notes in the KeyPackage that its signatures are good, so that the commit
// that adds it needn't verify them again unless it was changed.
func (kp *KeyPackage) Validate(now time.Time, v CredentialVerifier) error {
	if !kp.validated() {
		if err := kp.validateTimeless(); err != nil {
			return err
		}
		kp.sound = kp.Ref()
	}
	if err := kp.LeafNode.checkLifetimeLength(MaxLifetime); err != nil {
		return err
	}
	if !kp.LeafNode.Lifetime.Contains(now) {
		return invalid("7.3", "lifetime of the leaf node does not contain the current time")
	}
	if err := v.VerifyCredential(kp.LeafNode.Credential, kp.LeafNode.SignatureKey, kp.CipherSuite); err != nil {
		return invalid("5.3.1", "credential of the key package", err)
	}
	return nil
}

// checkLifetimeLength refuses a total lifetime past longest, which is a rule of the application (RFC 9420, Section 7.2);
// less than 0 means no limit.
func (l *LeafNode) checkLifetimeLength(longest time.Duration) error {
	if l.Source != LeafNodeKeyPackage {
		return nil
	}
	if n := l.Lifetime; n.NotAfter < n.NotBefore || longest >= 0 && n.NotAfter-n.NotBefore > uint64(longest/time.Second) {
		return invalid("7.2", "lifetime of the leaf node longer than %d seconds", longest/time.Second)
	}
	return nil
}

// validateTimeless is Validate without what depends on the time and on the authentication service.
func (kp *KeyPackage) validateTimeless() error {
	l := &kp.LeafNode
	switch {
	case kp.Version != MLS10:
		return invalid("10.1", "key package of version %d", kp.Version)
	case !kp.CipherSuite.Supported():
		return invalid("10.1", "key package of cipher suite %d", uint16(kp.CipherSuite), ErrUnsupported)
	case l.Source != LeafNodeKeyPackage:
		return invalid("7.3", "leaf node of a key package has source %d", l.Source)
	case bytes.Equal(kp.InitKey, l.EncryptionKey):
		return invalid("10.1", "init key and encryption key are equal")
	case !l.Capabilities.supportsSuite(kp.CipherSuite):
		return invalid("7.2", "capabilities of the leaf node do not list the key package's cipher suite")
	}
	if err := l.validateStatic(); err != nil {
		return err
	}
	if err := kp.Extensions.validate(); err != nil {
		return err
	}
	if err := kp.checkExtensions(); err != nil {
		return err
	}
	if err := kp.CipherSuite.checkHPKEPublicKey(kp.InitKey); err != nil {
		return invalid("10.1", "init key", err)
	}
	if err := kp.CipherSuite.checkHPKEPublicKey(l.EncryptionKey); err != nil {
		return invalid("10.1", "encryption key", err)
	}
	if err := l.verifySignature(kp.CipherSuite, nil, 0); err != nil {
		return invalid("7.3", "signature of the leaf node", err)
	}
	if err := kp.verifySignature(); err != nil {
		return invalid("10.1", "signature of the key package", err)
	}
	return nil
}

// checkExtensions checks that the leaf lists the types of the KeyPackage's extensions (RFC 9420, Section 10).
func (kp *KeyPackage) checkExtensions() error {
	for _, e := range kp.Extensions {
		if !kp.LeafNode.Capabilities.supportsExtension(e.Type) {
			return invalid("10", "extension type %d of the key package not listed in its leaf's capabilities", e.Type)
		}
	}
	return nil
}

// KeyPackageOptions says what a new KeyPackage contains.
type KeyPackageOptions struct {
	redact
	Rand           io.Reader        // nil: crypto/rand
	Time           func() time.Time // nil: time.Now; used if Lifetime is zero
	Suite          CipherSuite
	Credential     Credential
	Signer         crypto.Signer
	Capabilities   Capabilities // zero: DefaultCapabilities and random reserved values (RFC 9420, Section 13.5)
	Lifetime       Lifetime     // zero: DefaultLifetime from now
	LeafExtensions Extensions
	Extensions     Extensions
	// LastResort marks the KeyPackage as one that may be used more than once (draft-ietf-mls-extensions, Section 6.4).
	LastResort bool
}

// KeyPackageSecrets are the private keys of a KeyPackage. They are kept until a Welcome uses it or it expires, those of
// a last-resort KeyPackage until it is replaced, where their deletion erases them: see Erasable.
type KeyPackageSecrets struct {
	redact
	InitKey, EncryptionKey HPKEPrivateKey
}

// Erase overwrites the keys in memory, after the last use.
func (s *KeyPackageSecrets) Erase() {
	secret(s.InitKey).erase()
	secret(s.EncryptionKey).erase()
}

// MarshalMLS implements codec.Marshaler, for the client's store.
func (s KeyPackageSecrets) MarshalMLS(w *codec.Writer) {
	w.Opaque(s.InitKey)
	w.Opaque(s.EncryptionKey)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *KeyPackageSecrets) UnmarshalMLS(r *codec.Reader) {
	s.InitKey = r.Opaque()
	s.EncryptionKey = r.Opaque()
}

// NewKeyPackage makes a KeyPackage with fresh keys, signed by o.Signer (RFC 9420, Section 10), and returns their
// private keys. It fails with ErrUnsupported for a suite that isn't, and with a ValidationError if the options
// contradict each other, for example an extension that the capabilities don't list.
func NewKeyPackage(o KeyPackageOptions) (*KeyPackage, *KeyPackageSecrets, error) {
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Time == nil {
		o.Time = time.Now
	}
	if !o.Suite.Supported() {
		return nil, nil, fmt.Errorf("mls: new key package: %w: %v", ErrUnsupported, o.Suite)
	}
	grease := o.Capabilities.isZero()
	if grease {
		c, err := defaultCapabilities(o.Suite).grease(o.Rand)
		if err != nil {
			return nil, nil, err
		}
		o.Capabilities = c
	}
	if o.Lifetime == (Lifetime{}) {
		o.Lifetime = LifetimeFrom(o.Time(), DefaultLifetime)
	}
	signatureKey, err := o.Suite.SignaturePublicKey(o.Signer.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("mls: new key package: %w", err)
	}
	if o.LeafExtensions, err = describeClient(o.Rand, o.Capabilities, o.LeafExtensions, grease); err != nil {
		return nil, nil, fmt.Errorf("mls: new key package: %w", err)
	}
	if o.LastResort {
		if o.Extensions, err = o.Extensions.withComponent(ComponentLastResort, nil); err != nil {
			return nil, nil, fmt.Errorf("mls: new key package: %w", err)
		}
	}
	if grease {
		if o.Extensions, err = greaseDictionary(o.Rand, o.Extensions); err != nil {
			return nil, nil, fmt.Errorf("mls: new key package: %w", err)
		}
	}
	initPub, initPriv, err := o.Suite.GenerateHPKEKey(o.Rand)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: new key package: %w", err)
	}
	encPub, encPriv, err := o.Suite.GenerateHPKEKey(o.Rand)
	if err != nil {
		return nil, nil, fmt.Errorf("mls: new key package: %w", err)
	}
	kp := &KeyPackage{
		Version:     MLS10,
		CipherSuite: o.Suite,
		InitKey:     initPub,
		LeafNode: LeafNode{
			EncryptionKey: encPub,
			SignatureKey:  signatureKey,
			Credential:    o.Credential,
			Capabilities:  o.Capabilities,
			Source:        LeafNodeKeyPackage,
			Lifetime:      o.Lifetime,
			Extensions:    o.LeafExtensions,
		},
		Extensions: o.Extensions,
	}
	if err := kp.LeafNode.validateStatic(); err != nil {
		return nil, nil, err
	}
	if err := kp.checkExtensions(); err != nil {
		return nil, nil, err
	}
	if err := kp.LeafNode.sign(o.Suite, o.Rand, o.Signer, nil, 0); err != nil {
		return nil, nil, err
	}
	if kp.Signature, err = o.Suite.sign(o.Rand, o.Signer, labelKeyPackage, kp.marshalUnsigned); err != nil {
		return nil, nil, fmt.Errorf("mls: sign key package: %w", err)
	}
	return kp, &KeyPackageSecrets{InitKey: initPriv, EncryptionKey: encPriv}, nil
}
