package mls

import (
	"bytes"
	"fmt"
	"io"
	"slices"

	"github.com/parley-mls/parley/mls/codec"
)

// EncryptedGroupSecrets are a joiner's GroupSecrets, encrypted to its KeyPackage's init key (RFC 9420, Section
// 12.4.3.1).
type EncryptedGroupSecrets struct {
	NewMember []byte // KeyPackageRef
	Secrets   HPKECiphertext
}

// MarshalMLS implements codec.Marshaler.
func (s EncryptedGroupSecrets) MarshalMLS(w *codec.Writer) {
	w.Opaque(s.NewMember)
	s.Secrets.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *EncryptedGroupSecrets) UnmarshalMLS(r *codec.Reader) {
	s.NewMember = r.OpaqueMax(64)
	s.Secrets.UnmarshalMLS(r)
}

// Welcome tells new members the secrets of the epoch that they join (RFC 9420, Section 12.4.3.1).
//
//	struct {
//	    CipherSuite cipher_suite;
//	    EncryptedGroupSecrets secrets<V>;
//	    opaque encrypted_group_info<V>;
//	} Welcome;
type Welcome struct {
	CipherSuite        CipherSuite
	Secrets            []EncryptedGroupSecrets
	EncryptedGroupInfo []byte
}

// MarshalMLS implements codec.Marshaler.
func (m Welcome) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(m.CipherSuite))
	codec.WriteVector(w, m.Secrets, func(w *codec.Writer, s EncryptedGroupSecrets) { s.MarshalMLS(w) })
	w.Opaque(m.EncryptedGroupInfo)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *Welcome) UnmarshalMLS(r *codec.Reader) {
	m.CipherSuite = CipherSuite(r.Uint16())
	m.Secrets = codec.ReadVector(r, func(r *codec.Reader) (s EncryptedGroupSecrets) { s.UnmarshalMLS(r); return s })
	m.EncryptedGroupInfo = r.Opaque()
}

// Find says whether the Welcome has secrets for the KeyPackage with this reference.
func (m *Welcome) Find(ref []byte) bool { return m.index(ref) >= 0 }

func (m *Welcome) index(ref []byte) int {
	return slices.IndexFunc(m.Secrets, func(s EncryptedGroupSecrets) bool { return bytes.Equal(s.NewMember, ref) })
}

// KeyPackageRefs returns the references of the KeyPackages whose owners the Welcome is for.
func (m *Welcome) KeyPackageRefs() [][]byte {
	refs := make([][]byte, len(m.Secrets))
	for i := range m.Secrets {
		refs[i] = m.Secrets[i].NewMember
	}
	return refs
}

// GroupSecrets is what a joiner needs to compute the epoch (RFC 9420, Section 12.4.3.1).
//
//	struct {
//	    opaque joiner_secret<V>;
//	    optional<PathSecret> path_secret;
//	    PreSharedKeyID psks<V>;
//	} GroupSecrets;
type GroupSecrets struct {
	redact
	JoinerSecret secret
	PathSecret   secret // nil if absent
	PSKs         []PreSharedKeyID
}

// MarshalMLS implements codec.Marshaler.
func (s GroupSecrets) MarshalMLS(w *codec.Writer) {
	w.Opaque(s.JoinerSecret)
	w.Optional(s.PathSecret != nil)
	if s.PathSecret != nil {
		w.Opaque(s.PathSecret)
	}
	codec.WriteVector(w, s.PSKs, func(w *codec.Writer, id PreSharedKeyID) { id.MarshalMLS(w) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (s *GroupSecrets) UnmarshalMLS(r *codec.Reader) {
	*s = GroupSecrets{JoinerSecret: r.Opaque()}
	if r.Optional() {
		s.PathSecret = r.Opaque()
	}
	s.PSKs = codec.ReadVector(r, func(r *codec.Reader) (id PreSharedKeyID) { id.UnmarshalMLS(r); return id })
}

// welcomeMember is whom a Welcome is for; pathSecret is nil for a commit without a path.
type welcomeMember struct {
	redact
	kp         *KeyPackage
	pathSecret secret
}

const labelWelcome = "Welcome"

func welcomeKey(cs CipherSuite, joiner, psk secret) (key, nonce secret) {
	s := cs.welcomeSecret(joiner, psk)
	defer s.erase()
	return cs.expandWithLabel(s, "key", nil, cs.aeadKeySize()), cs.expandWithLabel(s, "nonce", nil, cs.aeadNonceSize())
}

// newWelcome encrypts gi, and to each member the secrets with which to read it.
func newWelcome(cs CipherSuite, rand io.Reader, gi *GroupInfo, joiner, psk secret, members []welcomeMember, psks []PreSharedKeyID) (*Welcome, error) {
	key, nonce := welcomeKey(cs, joiner, psk)
	defer key.erase()
	encrypted, err := cs.aeadSeal(key, nonce, nil, codec.Marshal(gi))
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt group info: %w", err)
	}
	sealed, err := cs.sealAll(rand, len(members), cs.hpkeInfo(labelWelcome, encrypted), func(i int) (HPKEPublicKey, []byte) {
		return members[i].kp.InitKey, codec.Marshal(GroupSecrets{JoinerSecret: joiner, PathSecret: members[i].pathSecret, PSKs: psks})
	})
	if err != nil {
		return nil, fmt.Errorf("mls: encrypt group secrets: %w", err)
	}
	m := &Welcome{CipherSuite: cs, Secrets: make([]EncryptedGroupSecrets, len(members)), EncryptedGroupInfo: encrypted}
	for i := range members {
		m.Secrets[i] = EncryptedGroupSecrets{NewMember: members[i].kp.Ref(), Secrets: sealed[i]}
	}
	return m, nil
}

// decryptSecrets opens the secrets for the KeyPackage with this reference.
func (m *Welcome) decryptSecrets(ref []byte, initKey HPKEPrivateKey) (*GroupSecrets, error) {
	if !m.CipherSuite.Supported() {
		return nil, fmt.Errorf("mls: welcome: %w: %v", ErrUnsupported, m.CipherSuite)
	}
	i := m.index(ref)
	if i < 0 {
		return nil, fmt.Errorf("mls: welcome: %w: not for this key package", ErrMalformed)
	}
	plain, err := m.CipherSuite.DecryptWithLabel(initKey, labelWelcome, m.EncryptedGroupInfo, m.Secrets[i].Secrets)
	if err != nil {
		return nil, fmt.Errorf("mls: welcome: group secrets: %w", err)
	}
	defer clear(plain)
	s := new(GroupSecrets)
	if err := codec.Unmarshal(plain, s); err != nil {
		return nil, fmt.Errorf("mls: welcome: group secrets: %w", err)
	}
	return s, nil
}

// decryptGroupInfo opens the GroupInfo. Its signature isn't verified here: the key is in the tree.
func (m *Welcome) decryptGroupInfo(joiner, psk secret) (*GroupInfo, error) {
	key, nonce := welcomeKey(m.CipherSuite, joiner, psk)
	defer key.erase()
	plain, err := m.CipherSuite.aeadOpen(key, nonce, nil, m.EncryptedGroupInfo)
	if err != nil {
		return nil, fmt.Errorf("mls: welcome: group info: %w", err)
	}
	gi := new(GroupInfo)
	if err := codec.Unmarshal(plain, gi); err != nil {
		return nil, fmt.Errorf("mls: welcome: group info: %w", err)
	}
	return gi, nil
}
