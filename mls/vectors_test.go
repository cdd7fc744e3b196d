package mls

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cloudflare/circl/sign/ed448"

	"github.com/parley-mls/parley/mls/codec"
)

// The published test vectors of MLS. test-vectors.md beside them says what each family verifies.

// hexBytes are bytes that the vectors write in hexadecimal; null stays nil.
type hexBytes []byte

func (h *hexBytes) UnmarshalJSON(b []byte) error {
	var s *string
	if err := json.Unmarshal(b, &s); err != nil || s == nil {
		return err
	}
	v, err := hex.DecodeString(*s)
	*h = v
	if v == nil {
		*h = []byte{}
	}
	return err
}

// loadVectors reads a family, or skips the test if the vectors aren't there.
func loadVectors[T any](t testing.TB, family string) []T {
	t.Helper()
	dir := os.Getenv("MLS_TEST_VECTORS")
	if dir == "" {
		dir = filepath.Join("..", "..", "shared", "mls-vectors")
	}
	b, err := os.ReadFile(filepath.Join(dir, family+".json"))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the vectors are published in mlswg/mls-implementations, folder test-vectors: set MLS_TEST_VECTORS to a copy")
	}
	if err != nil {
		t.Fatal(err)
	}
	var cases []T
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	return cases
}

// vectorSuites are those that have vectors: RFC 9420's.
var vectorSuites = CipherSuites()[:7]

// forSuites runs f for every case of a supported suite, for the first two of each with -short, and fails if there is
// none for one of the suites.
func forSuites[T any](t *testing.T, family string, suites []CipherSuite, suiteOf func(*T) CipherSuite, f func(t *testing.T, c *T)) {
	seen := make(map[CipherSuite]int)
	for i, c := range loadVectors[T](t, family) {
		cs := suiteOf(&c)
		if !cs.Supported() {
			continue
		}
		if seen[cs]++; testing.Short() && seen[cs] > 2 {
			continue
		}
		t.Run(fmt.Sprintf("%d/suite%d", i, uint16(cs)), func(t *testing.T) { f(t, &c) })
	}
	for _, cs := range suites {
		if seen[cs] == 0 {
			t.Errorf("no case of %v", cs)
		}
	}
}

func wantBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got %x, want %x", what, got, want)
	}
}

func decode(t testing.TB, b []byte, u codec.Unmarshaler) {
	t.Helper()
	if err := codec.Unmarshal(b, u); err != nil {
		t.Fatalf("decode %T: %v", u, err)
	}
}

// signerFrom rebuilds a signature key from its encoding in the vectors.
func signerFrom(t testing.TB, cs CipherSuite, priv []byte) crypto.Signer {
	t.Helper()
	switch sig := cs.params().sig.(type) {
	case ecdsaScheme:
		size := (sig.curve.Params().BitSize + 7) / 8
		key, err := ecdsa.ParseRawPrivateKey(sig.curve, append(make([]byte, size-len(priv)), priv...))
		if err != nil {
			t.Fatal(err)
		}
		return key
	case ed25519Scheme:
		return ed25519.NewKeyFromSeed(priv[:ed25519.SeedSize])
	default:
		return ed448.NewKeyFromSeed(priv[:ed448.SeedSize])
	}
}

func TestVectorsTreeMath(t *testing.T) {
	type vector struct {
		NLeaves uint32    `json:"n_leaves"`
		NNodes  uint32    `json:"n_nodes"`
		Root    uint32    `json:"root"`
		Left    []*uint32 `json:"left"`
		Right   []*uint32 `json:"right"`
		Parent  []*uint32 `json:"parent"`
		Sibling []*uint32 `json:"sibling"`
	}
	for _, v := range loadVectors[vector](t, "tree-math") {
		if got := 2*v.NLeaves - 1; got != v.NNodes {
			t.Errorf("%d leaves: %d nodes, want %d", v.NLeaves, got, v.NNodes)
		}
		root := rootOf(v.NLeaves)
		if uint32(root) != v.Root {
			t.Errorf("%d leaves: root %d, want %d", v.NLeaves, root, v.Root)
		}
		check := func(what string, n NodeIndex, want *uint32, defined bool, got func() NodeIndex) {
			if defined != (want != nil) {
				t.Errorf("%d leaves: %s of %d defined: %v", v.NLeaves, what, n, defined)
			} else if defined && uint32(got()) != *want {
				t.Errorf("%d leaves: %s of %d is %d, want %d", v.NLeaves, what, n, got(), *want)
			}
		}
		for n := range NodeIndex(v.NNodes) {
			check("left", n, v.Left[n], !n.isLeaf(), n.left)
			check("right", n, v.Right[n], !n.isLeaf(), n.right)
			check("parent", n, v.Parent[n], n != root, n.parent)
			check("sibling", n, v.Sibling[n], n != root, n.sibling)
		}
	}
}

func TestVectorsCryptoBasics(t *testing.T) {
	type vector struct {
		CipherSuite CipherSuite `json:"cipher_suite"`
		RefHash     struct {
			Label      string
			Value, Out hexBytes
		} `json:"ref_hash"`
		ExpandWithLabel struct {
			Secret  hexBytes
			Label   string
			Context hexBytes
			Length  int
			Out     hexBytes
		} `json:"expand_with_label"`
		DeriveSecret struct {
			Secret hexBytes
			Label  string
			Out    hexBytes
		} `json:"derive_secret"`
		DeriveTreeSecret struct {
			Secret     hexBytes
			Label      string
			Generation uint32
			Length     int
			Out        hexBytes
		} `json:"derive_tree_secret"`
		SignWithLabel struct {
			Priv, Pub, Content hexBytes
			Label              string
			Signature          hexBytes
		} `json:"sign_with_label"`
		EncryptWithLabel struct {
			Priv, Pub          hexBytes
			Label              string
			Context, Plaintext hexBytes
			KEMOutput          hexBytes `json:"kem_output"`
			Ciphertext         hexBytes
		} `json:"encrypt_with_label"`
	}
	forSuites(t, "crypto-basics", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		wantBytes(t, "RefHash", cs.RefHash(v.RefHash.Label, v.RefHash.Value), v.RefHash.Out)
		e := v.ExpandWithLabel
		wantBytes(t, "ExpandWithLabel", cs.expandWithLabel(secret(e.Secret), e.Label, e.Context, e.Length), e.Out)
		wantBytes(t, "DeriveSecret", cs.deriveSecret(secret(v.DeriveSecret.Secret), v.DeriveSecret.Label), v.DeriveSecret.Out)
		d := v.DeriveTreeSecret
		wantBytes(t, "DeriveTreeSecret", cs.deriveTreeSecret(secret(d.Secret), d.Label, d.Generation, d.Length), d.Out)

		s := v.SignWithLabel
		if err := cs.VerifyWithLabel(s.Pub, s.Label, s.Content, s.Signature); err != nil {
			t.Errorf("VerifyWithLabel: %v", err)
		}
		sig, err := cs.SignWithLabel(rand.Reader, signerFrom(t, cs, s.Priv), s.Label, s.Content)
		if err != nil {
			t.Fatal(err)
		}
		if err := cs.VerifyWithLabel(s.Pub, s.Label, s.Content, sig); err != nil {
			t.Errorf("VerifyWithLabel of own signature: %v", err)
		}
		sig[len(sig)-1] ^= 1
		if err := cs.VerifyWithLabel(s.Pub, s.Label, s.Content, sig); !errors.Is(err, ErrSignature) {
			t.Errorf("changed signature: got %v, want ErrSignature", err)
		}

		h := v.EncryptWithLabel
		priv := HPKEPrivateKey(h.Priv)
		got, err := cs.DecryptWithLabel(priv, h.Label, h.Context, HPKECiphertext{h.KEMOutput, h.Ciphertext})
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "DecryptWithLabel", got, h.Plaintext)
		ct, err := cs.EncryptWithLabel(rand.Reader, HPKEPublicKey(h.Pub), h.Label, h.Context, h.Plaintext)
		if err != nil {
			t.Fatal(err)
		}
		if got, err = cs.DecryptWithLabel(priv, h.Label, h.Context, ct); err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "DecryptWithLabel of own ciphertext", got, h.Plaintext)
		if _, err := cs.DecryptWithLabel(priv, h.Label, append(h.Context, 0), ct); !errors.Is(err, ErrDecrypt) {
			t.Errorf("other context: got %v, want ErrDecrypt", err)
		}
	})
}

func TestVectorsDeserialization(t *testing.T) {
	type vector struct {
		Header hexBytes `json:"vlbytes_header"`
		Length int      `json:"length"`
	}
	for _, v := range loadVectors[vector](t, "deserialization") {
		b := make([]byte, len(v.Header)+v.Length) // up to 1 GiB of pages that nothing touches
		copy(b, v.Header)
		r := codec.NewReader(b)
		if got := r.Length(); r.Err() != nil || got != v.Length {
			t.Errorf("%x: got %d and %v, want %d", v.Header, got, r.Err(), v.Length)
		}
		var w codec.Writer
		w.Length(v.Length)
		wantBytes(t, fmt.Sprint("length ", v.Length), w.Bytes(), v.Header)
	}
}

func TestVectorsKeySchedule(t *testing.T) {
	type vector struct {
		CipherSuite       CipherSuite `json:"cipher_suite"`
		GroupID           hexBytes    `json:"group_id"`
		InitialInitSecret hexBytes    `json:"initial_init_secret"`
		Epochs            []struct {
			TreeHash                hexBytes `json:"tree_hash"`
			CommitSecret            hexBytes `json:"commit_secret"`
			PSKSecret               hexBytes `json:"psk_secret"`
			ConfirmedTranscriptHash hexBytes `json:"confirmed_transcript_hash"`
			GroupContext            hexBytes `json:"group_context"`
			JoinerSecret            hexBytes `json:"joiner_secret"`
			WelcomeSecret           hexBytes `json:"welcome_secret"`
			InitSecret              hexBytes `json:"init_secret"`
			SenderDataSecret        hexBytes `json:"sender_data_secret"`
			EncryptionSecret        hexBytes `json:"encryption_secret"`
			ExporterSecret          hexBytes `json:"exporter_secret"`
			EpochAuthenticator      hexBytes `json:"epoch_authenticator"`
			ExternalSecret          hexBytes `json:"external_secret"`
			ConfirmationKey         hexBytes `json:"confirmation_key"`
			MembershipKey           hexBytes `json:"membership_key"`
			ResumptionPSK           hexBytes `json:"resumption_psk"`
			ExternalPub             hexBytes `json:"external_pub"`
			Exporter                struct {
				Label           string
				Context, Secret hexBytes
				Length          int
			}
		}
	}
	forSuites(t, "key-schedule", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs, init := v.CipherSuite, secret(v.InitialInitSecret)
		for i, e := range v.Epochs {
			ctx := codec.Marshal(GroupContext{Version: MLS10, CipherSuite: cs, GroupID: v.GroupID, Epoch: uint64(i),
				TreeHash: e.TreeHash, ConfirmedTranscriptHash: e.ConfirmedTranscriptHash})
			wantBytes(t, "group_context", ctx, e.GroupContext)
			joiner := cs.joinerSecret(init, secret(e.CommitSecret), ctx)
			psk := secret(e.PSKSecret)
			s := cs.epochSecrets(joiner, psk, ctx)
			pub, err := cs.externalPub(s.external)
			if err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "joiner_secret", joiner, e.JoinerSecret)
			wantBytes(t, "welcome_secret", cs.welcomeSecret(joiner, psk), e.WelcomeSecret)
			wantBytes(t, "init_secret", s.init, e.InitSecret)
			wantBytes(t, "sender_data_secret", s.senderData, e.SenderDataSecret)
			wantBytes(t, "encryption_secret", s.encryption, e.EncryptionSecret)
			wantBytes(t, "exporter_secret", s.exporter, e.ExporterSecret)
			wantBytes(t, "epoch_authenticator", s.authenticator, e.EpochAuthenticator)
			wantBytes(t, "external_secret", s.external, e.ExternalSecret)
			wantBytes(t, "confirmation_key", s.confirmation, e.ConfirmationKey)
			wantBytes(t, "membership_key", s.membership, e.MembershipKey)
			wantBytes(t, "resumption_psk", s.resumption, e.ResumptionPSK)
			wantBytes(t, "external_pub", pub, e.ExternalPub)
			wantBytes(t, "exporter", s.export(cs, e.Exporter.Label, e.Exporter.Context, e.Exporter.Length), e.Exporter.Secret)
			init = s.init
		}
	})
}

func TestVectorsPSKSecret(t *testing.T) {
	type vector struct {
		CipherSuite CipherSuite `json:"cipher_suite"`
		PSKs        []struct {
			ID    hexBytes `json:"psk_id"`
			PSK   hexBytes `json:"psk"`
			Nonce hexBytes `json:"psk_nonce"`
		} `json:"psks"`
		PSKSecret hexBytes `json:"psk_secret"`
	}
	forSuites(t, "psk_secret", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		var in []pskInput
		for _, p := range v.PSKs {
			in = append(in, pskInput{id: PreSharedKeyID{Type: PSKExternal, ID: p.ID, Nonce: p.Nonce}, psk: secret(p.PSK)})
		}
		got, err := v.CipherSuite.pskSecret(in)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "psk_secret", got, v.PSKSecret)
	})
}

func TestVectorsSecretTree(t *testing.T) {
	type vector struct {
		CipherSuite CipherSuite `json:"cipher_suite"`
		SenderData  struct {
			Secret     hexBytes `json:"sender_data_secret"`
			Ciphertext hexBytes
			Key, Nonce hexBytes
		} `json:"sender_data"`
		EncryptionSecret hexBytes `json:"encryption_secret"`
		Leaves           [][]struct {
			Generation       uint32
			HandshakeKey     hexBytes `json:"handshake_key"`
			HandshakeNonce   hexBytes `json:"handshake_nonce"`
			ApplicationKey   hexBytes `json:"application_key"`
			ApplicationNonce hexBytes `json:"application_nonce"`
		}
	}
	forSuites(t, "secret-tree", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		key, nonce := senderDataKey(cs, secret(v.SenderData.Secret), v.SenderData.Ciphertext)
		wantBytes(t, "sender_data key", key, v.SenderData.Key)
		wantBytes(t, "sender_data nonce", nonce, v.SenderData.Nonce)
		s := newSecretTree(cs, uint32(len(v.Leaves)), secret(v.EncryptionSecret))
		lim := ratchetLimits{maxForward: 1 << 20, maxSkipped: 10}
		for l, generations := range v.Leaves {
			for _, g := range generations {
				h, err := s.peek(LeafIndex(l), handshakeRatchet, g.Generation, lim)
				if err != nil {
					t.Fatal(err)
				}
				s.consume(h)
				wantBytes(t, "handshake_key", h.key, g.HandshakeKey)
				wantBytes(t, "handshake_nonce", h.nonce, g.HandshakeNonce)
				a, err := s.peek(LeafIndex(l), applicationRatchet, g.Generation, lim)
				if err != nil {
					t.Fatal(err)
				}
				s.consume(a)
				wantBytes(t, "application_key", a.key, g.ApplicationKey)
				wantBytes(t, "application_nonce", a.nonce, g.ApplicationNonce)
			}
		}
	})
}

func TestVectorsTranscriptHashes(t *testing.T) {
	type vector struct {
		CipherSuite          CipherSuite `json:"cipher_suite"`
		ConfirmationKey      hexBytes    `json:"confirmation_key"`
		AuthenticatedContent hexBytes    `json:"authenticated_content"`
		InterimBefore        hexBytes    `json:"interim_transcript_hash_before"`
		ConfirmedAfter       hexBytes    `json:"confirmed_transcript_hash_after"`
		InterimAfter         hexBytes    `json:"interim_transcript_hash_after"`
	}
	forSuites(t, "transcript-hashes", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		var ac AuthenticatedContent
		decode(t, v.AuthenticatedContent, &ac)
		if ac.Content.ContentType != ContentCommit {
			t.Fatalf("content type %d", ac.Content.ContentType)
		}
		wantBytes(t, "authenticated_content", codec.Marshal(ac), v.AuthenticatedContent)
		wantBytes(t, "confirmed", cs.confirmedTranscriptHash(v.InterimBefore, &ac), v.ConfirmedAfter)
		wantBytes(t, "interim", cs.interimTranscriptHash(v.ConfirmedAfter, ac.ConfirmationTag), v.InterimAfter)
		e := epochSecrets{confirmation: secret(v.ConfirmationKey)}
		if err := e.verifyConfirmationTag(cs, v.ConfirmedAfter, ac.ConfirmationTag); err != nil {
			t.Error(err)
		}
		if err := e.verifyConfirmationTag(cs, v.InterimAfter, ac.ConfirmationTag); !errors.Is(err, ErrConfirmationTag) {
			t.Errorf("other transcript: got %v, want ErrConfirmationTag", err)
		}
	})
}

func TestVectorsWelcome(t *testing.T) {
	type vector struct {
		CipherSuite CipherSuite `json:"cipher_suite"`
		InitPriv    hexBytes    `json:"init_priv"`
		SignerPub   hexBytes    `json:"signer_pub"`
		KeyPackage  hexBytes    `json:"key_package"`
		Welcome     hexBytes    `json:"welcome"`
	}
	forSuites(t, "welcome", vectorSuites, func(v *vector) CipherSuite { return v.CipherSuite }, func(t *testing.T, v *vector) {
		cs := v.CipherSuite
		var kp, welcome MLSMessage
		decode(t, v.KeyPackage, &kp)
		decode(t, v.Welcome, &welcome)
		ref := kp.KeyPackage.Ref()
		if !welcome.Welcome.Find(ref) {
			t.Fatal("no secrets for the key package")
		}
		s, err := welcome.Welcome.decryptSecrets(ref, HPKEPrivateKey(v.InitPriv))
		if err != nil {
			t.Fatal(err)
		}
		psk, _ := cs.pskSecret(nil)
		gi, err := welcome.Welcome.decryptGroupInfo(s.JoinerSecret, psk)
		if err != nil {
			t.Fatal(err)
		}
		if err := gi.Verify(v.SignerPub); err != nil {
			t.Error(err)
		}
		e := cs.epochSecrets(s.JoinerSecret, psk, codec.Marshal(gi.GroupContext))
		if err := e.verifyConfirmationTag(cs, gi.GroupContext.ConfirmedTranscriptHash, gi.ConfirmationTag); err != nil {
			t.Error(err)
		}

		again, err := newWelcome(cs, rand.Reader, gi, s.JoinerSecret, psk, []welcomeMember{{kp: kp.KeyPackage, pathSecret: s.PathSecret}}, s.PSKs)
		if err != nil {
			t.Fatal(err)
		}
		s2, err := again.decryptSecrets(ref, HPKEPrivateKey(v.InitPriv))
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "group secrets of own welcome", codec.Marshal(s2), codec.Marshal(s))
	})
}
