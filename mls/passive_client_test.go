package mls

import (
	"bytes"
	"errors"
	"testing"
)

// anyCredential accepts every credential; the vectors' have no authentication service.
type anyCredential struct{}

func (anyCredential) VerifyCredential(Credential, []byte, CipherSuite) error { return nil }
func (anyCredential) ValidSuccessor(_, _ Credential) error                   { return nil }
func (anyCredential) Identity(Credential) ([]byte, error)                    { return nil, nil }

type passiveCase struct {
	CipherSuite  CipherSuite `json:"cipher_suite"`
	ExternalPSKs []struct {
		ID  hexBytes `json:"psk_id"`
		PSK hexBytes `json:"psk"`
	} `json:"external_psks"`
	KeyPackage                hexBytes `json:"key_package"`
	SignaturePriv             hexBytes `json:"signature_priv"`
	EncryptionPriv            hexBytes `json:"encryption_priv"`
	InitPriv                  hexBytes `json:"init_priv"`
	Welcome                   hexBytes `json:"welcome"`
	RatchetTree               hexBytes `json:"ratchet_tree"`
	InitialEpochAuthenticator hexBytes `json:"initial_epoch_authenticator"`
	Epochs                    []struct {
		Proposals          []hexBytes `json:"proposals"`
		Commit             hexBytes   `json:"commit"`
		EpochAuthenticator hexBytes   `json:"epoch_authenticator"`
	} `json:"epochs"`
}

func TestVectorsPassiveClientWelcome(t *testing.T) { passiveClient(t, "passive-client-welcome") }

func TestVectorsPassiveClientHandlingCommit(t *testing.T) {
	passiveClient(t, "passive-client-handling-commit")
}

func TestVectorsPassiveClientRandom(t *testing.T) { passiveClient(t, "passive-client-random") }

// passiveClient follows a group as the vectors' client does, and continues from the store at every epoch.
func passiveClient(t *testing.T, family string) {
	suites := vectorSuites
	if family == "passive-client-random" {
		suites = nil // one case only
	}
	forSuites(t, family, suites, func(c *passiveCase) CipherSuite { return c.CipherSuite }, func(t *testing.T, c *passiveCase) {
		cfg := Config{Verifier: anyCredential{}, MaxPastEpochs: 300, MaxLifetime: -1, PSK: func(id PreSharedKeyID) ([]byte, error) {
			for _, p := range c.ExternalPSKs {
				if id.Type == PSKExternal && bytes.Equal(p.ID, id.ID) {
					return p.PSK, nil
				}
			}
			return nil, errors.New("unknown")
		}}
		var kpm, wm MLSMessage
		decode(t, c.KeyPackage, &kpm)
		decode(t, c.Welcome, &wm)
		var tree *RatchetTree
		if c.RatchetTree != nil {
			var err error
			if tree, err = ParseRatchetTree(c.RatchetTree); err != nil {
				t.Fatal(err)
			}
		}
		signer := signerFrom(t, c.CipherSuite, c.SignaturePriv)
		store := newMemStore()
		secrets := &KeyPackageSecrets{InitKey: scalar(c.CipherSuite, c.InitPriv), EncryptionKey: scalar(c.CipherSuite, c.EncryptionPriv)}
		g, err := JoinGroup(cfg, store, signer, wm.Welcome, kpm.KeyPackage, secrets, tree)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "initial epoch authenticator", g.EpochAuthenticator(), c.InitialEpochAuthenticator)
		for i, e := range c.Epochs {
			for _, p := range e.Proposals {
				var m MLSMessage
				decode(t, p, &m)
				if _, err := g.Receive(store, &m); err != nil {
					t.Fatalf("epoch %d: proposal: %v", i, err)
				}
			}
			var m MLSMessage
			decode(t, e.Commit, &m)
			r, err := g.Receive(store, &m)
			if err != nil {
				t.Fatalf("epoch %d: commit: %v", i, err)
			}
			if err := g.Apply(store, r.(*StagedCommit)); err != nil {
				t.Fatalf("epoch %d: %v", i, err)
			}
			wantBytes(t, "epoch authenticator", g.EpochAuthenticator(), e.EpochAuthenticator)
			if r, err := g.Receive(store, &m); err != nil {
				t.Errorf("epoch %d: commit again: %v", i, err)
			} else if _, ok := r.(*Duplicate); !ok {
				t.Errorf("epoch %d: commit again: %T, want *Duplicate", i, r)
			}
			if g, err = LoadGroup(cfg, signer, store.all()); err != nil {
				t.Fatalf("epoch %d: load: %v", i, err)
			}
		}
	})
}

// scalar restores the leading zeros that the vectors leave out of P-521's private keys.
func scalar(cs CipherSuite, b []byte) HPKEPrivateKey {
	if cs == P521_AES256GCM_SHA512_P521 {
		return append(make(HPKEPrivateKey, 66-len(b)), b...)
	}
	return b
}
