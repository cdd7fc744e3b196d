package mls

import (
	"crypto"
	"crypto/rand"
	"errors"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// trustAll accepts every credential.
type trustAll struct{ refuse error }

func (v trustAll) VerifyCredential(Credential, []byte, CipherSuite) error { return v.refuse }
func (trustAll) ValidSuccessor(old, new Credential) error                 { return nil }
func (trustAll) Identity(Credential) ([]byte, error)                      { return nil, nil }

func TestNewKeyPackageIsValid(t *testing.T) {
	for _, cs := range CipherSuites() {
		signer, err := cs.GenerateSignatureKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		kp, secrets, err := NewKeyPackage(KeyPackageOptions{Suite: cs, Credential: BasicCredential([]byte("a")), Signer: signer})
		if err != nil {
			t.Fatal(err)
		}
		var again KeyPackage
		decode(t, codec.Marshal(kp), &again)
		if err := again.Validate(time.Now(), trustAll{}); err != nil {
			t.Errorf("%v: %v", cs, err)
		}
		wantBytes(t, "reference", again.Ref(), kp.Ref())
		var kept KeyPackageSecrets
		decode(t, codec.Marshal(secrets), &kept)
		for _, pair := range []struct {
			priv HPKEPrivateKey
			pub  HPKEPublicKey
		}{{kept.InitKey, kp.InitKey}, {kept.EncryptionKey, kp.LeafNode.EncryptionKey}} {
			pub, err := cs.hpkePublicOf(pair.priv)
			if err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "public key of the kept private one", pub, pair.pub)
		}
	}
}

func TestKeyPackageRules(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	const cs = testSuite
	signer, err := cs.GenerateSignatureKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	resign := func(kp *KeyPackage, signer crypto.Signer) {
		if err := kp.LeafNode.sign(cs, rand.Reader, signer, nil, 0); err != nil {
			t.Fatal(err)
		}
		var w codec.Writer
		kp.marshalUnsigned(&w)
		if kp.Signature, err = cs.SignWithLabel(rand.Reader, signer, labelKeyPackage, w.Bytes()); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		what, section string
		change        func(kp *KeyPackage)
		forge         func(kp *KeyPackage) // after signing
		cause         error
	}{
		{what: "other version", section: "10.1", change: func(kp *KeyPackage) { kp.Version = 2 }},
		{what: "unsupported suite", section: "10.1", change: func(kp *KeyPackage) { kp.CipherSuite = 11 }, cause: ErrUnsupported},
		{what: "init key equal to encryption key", section: "10.1", change: func(kp *KeyPackage) { kp.InitKey = kp.LeafNode.EncryptionKey }},
		{what: "init key too short", section: "10.1", change: func(kp *KeyPackage) { kp.InitKey = kp.InitKey[1:] }, cause: ErrMalformed},
		{what: "encryption key too short", section: "10.1", change: func(kp *KeyPackage) { kp.LeafNode.EncryptionKey = kp.LeafNode.EncryptionKey[1:] }, cause: ErrMalformed},
		{what: "leaf from an update", section: "7.3", change: func(kp *KeyPackage) { kp.LeafNode.Source = LeafNodeUpdate }},
		{what: "suite not among the capabilities", section: "7.2", change: func(kp *KeyPackage) { kp.LeafNode.Capabilities.CipherSuites = []CipherSuite{2} }},
		{what: "version not among the capabilities", section: "7.2", change: func(kp *KeyPackage) { kp.LeafNode.Capabilities.Versions = []ProtocolVersion{9} }},
		{what: "credential type not among the capabilities", section: "7.2", change: func(kp *KeyPackage) { kp.LeafNode.Capabilities.Credentials = []CredentialType{CredentialX509} }},
		{what: "extension not among the capabilities", section: "7.3", change: func(kp *KeyPackage) { kp.LeafNode.Extensions = Extensions{{0xff00, nil}} }},
		{what: "leaf extension twice", section: "13.4", change: func(kp *KeyPackage) { kp.LeafNode.Extensions = Extensions{{1, nil}, {1, nil}} }},
		{what: "extension twice", section: "13.4", change: func(kp *KeyPackage) { kp.Extensions = Extensions{{9, nil}, {9, nil}} }},
		{what: "extension not listed by the leaf", section: "10", change: func(kp *KeyPackage) { kp.Extensions = Extensions{{0xf00d, nil}} }},
		{what: "not yet valid", section: "7.3", change: func(kp *KeyPackage) { kp.LeafNode.Lifetime.NotBefore = uint64(now.Unix()) + 1 }},
		{what: "expired", section: "7.3", change: func(kp *KeyPackage) { kp.LeafNode.Lifetime.NotAfter = uint64(now.Unix()) - 1 }},
		{what: "lifetime too long", section: "7.2", change: func(kp *KeyPackage) { kp.LeafNode.Lifetime = Lifetime{0, 1<<64 - 1} }},
		{what: "lifetime ends before it starts", section: "7.2", change: func(kp *KeyPackage) { kp.LeafNode.Lifetime = Lifetime{10, 9} }},
		{what: "changed leaf", section: "7.3", forge: func(kp *KeyPackage) { kp.LeafNode.Credential.Identity = []byte("b") }, cause: ErrSignature},
		{what: "changed key package", section: "10.1", forge: func(kp *KeyPackage) { kp.Extensions = Extensions{{1, nil}} }, cause: ErrSignature},
	} {
		kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: cs, Credential: BasicCredential([]byte("a")), Signer: signer,
			Time: func() time.Time { return now }})
		if err != nil {
			t.Fatal(err)
		}
		if c.change != nil {
			c.change(kp)
			if kp.CipherSuite == cs {
				resign(kp, signer)
			}
		}
		if c.forge != nil {
			c.forge(kp)
		}
		err = kp.Validate(now, trustAll{})
		var v *ValidationError
		if !errors.As(err, &v) || v.Section != c.section || c.cause != nil && !errors.Is(err, c.cause) {
			t.Errorf("%s: got %v, want a ValidationError of section %s", c.what, err, c.section)
		}
	}

	kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: cs, Credential: BasicCredential([]byte("a")), Signer: signer, Time: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	revoked := errors.New("revoked")
	if err := kp.Validate(now, trustAll{refuse: revoked}); !errors.Is(err, revoked) {
		t.Errorf("revoked credential: got %v", err)
	}
}

func TestKeyPackagesCarryReservedValues(t *testing.T) {
	signer, err := testSuite.GenerateSignatureKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential(nil), Signer: signer})
	if err != nil {
		t.Fatal(err)
	}
	c, d := kp.LeafNode.Capabilities, DefaultCapabilities()
	reserved := func(v uint16) bool { return v&0x0f0f == 0x0a0a && v>>8 == v&0xff && v != 0xfafa }
	for what, v := range map[string][]uint16{
		"suites":      {uint16(c.CipherSuites[len(d.CipherSuites)])},
		"extensions":  {uint16(c.Extensions[len(d.Extensions)])},
		"proposals":   {uint16(c.Proposals[len(d.Proposals)])},
		"credentials": {uint16(c.Credentials[len(d.Credentials)])},
	} {
		if len(v) != 1 || !reserved(v[0]) {
			t.Errorf("%s: added %#x, want one reserved value", what, v)
		}
	}
}

func TestLastResortKeyPackagesAreTold(t *testing.T) {
	for _, last := range []bool{true, false} {
		f := newForgery(t)
		signer := newSigner(t, testSuite)
		kp, secrets, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("new")), Signer: signer,
			LastResort: last})
		f.must(err)
		c, err := f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{add(kp)}, TreeInWelcome: true})
		f.must(err)
		s, err := f.server.CheckCommit(wire(t, c.Message()).Public)
		f.must(err)
		if got := s.Info().Proposals[0].Proposal.Add.KeyPackage.LastResort(); got != last {
			t.Errorf("last resort: %v, want %v", got, last)
		}
		for range 2 { // a last resort is used again
			f.must(second(JoinGroup(testConfig(), nil, signer, c.Welcome(), kp, secrets, nil)))
		}
	}
	kp := &KeyPackage{Extensions: Extensions{{ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary{{ComponentLastResort, []byte("x")}})}}}
	if kp.LastResort() {
		t.Error("a mark with data is one")
	}
}

func TestChangedKeyPackageIsValidatedAgain(t *testing.T) {
	r := newRoom(t, testSuite, nil)
	alice := r.members[0]
	kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("new")), Signer: newSigner(t, testSuite)})
	if err != nil {
		t.Fatal(err)
	}
	if err := kp.Validate(time.Now(), testVerifier{}); err != nil {
		t.Fatal(err)
	}
	if !kp.validated() {
		t.Error("validated and not known to be")
	}
	changed := *kp
	changed.LeafNode.Credential = BasicCredential([]byte("other"))
	if _, err := alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(&changed)}}); !errors.Is(err, ErrSignature) {
		t.Errorf("KeyPackage changed after Validate: got %v, want ErrSignature", err)
	}
	if err := changed.Validate(time.Now(), testVerifier{}); !errors.Is(err, ErrSignature) {
		t.Errorf("got %v, want ErrSignature", err)
	}
	if _, err := alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}}); err != nil {
		t.Error(err)
	}
}
