package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/mls"
)

// nodeKeys are the node's own keys with their certificates, in files of mode 0600: the TLS key, the keys with which
// the hub signs in MLS groups, one per signature scheme, the secrets of the QUIC port, and that of franking.
type nodeKeys struct {
	dir     string
	service authority.Service
	tls     atomic.Pointer[tls.Certificate]
	hubs    map[string]*hubKey // by scheme; the map doesn't change

	reset, token [32]byte
	franking     [32]byte // hub_key: with it the hub knows its own franks again
}

// hubKey is a key that hosted rooms have in their external_senders. It stays when its certificate is renewed.
type hubKey struct {
	signer crypto.Signer
	chain  atomic.Pointer[[][]byte]
}

// scheme names the signature scheme of a suite, which is part of file names.
func scheme(s mls.CipherSuite) string { return strings.ToLower(s.SignatureScheme()) }

// openKeys reads the keys, makes those that are missing, and has certificates issued where they are missing or due.
func openKeys(ctx context.Context, dir string, suites []mls.CipherSuite, service authority.Service) (*nodeKeys, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of keys: %w", err)
	}
	k := &nodeKeys{dir: dir, service: service, hubs: make(map[string]*hubKey)}
	quic, err := readSecret(filepath.Join(dir, "quic.key"), 64)
	if err != nil {
		return nil, err
	}
	copy(k.reset[:], quic[:32])
	copy(k.token[:], quic[32:])
	franking, err := readSecret(filepath.Join(dir, "franking.key"), len(k.franking))
	if err != nil {
		return nil, err
	}
	copy(k.franking[:], franking)
	for _, s := range suites {
		if k.hubs[scheme(s)] != nil {
			continue
		}
		signer, err := readKey(filepath.Join(dir, "hub-"+scheme(s)+".key"), func() (crypto.Signer, error) {
			return s.GenerateSignatureKey(rand.Reader)
		})
		if err != nil {
			return nil, err
		}
		k.hubs[scheme(s)] = &hubKey{signer: signer}
	}
	return k, k.renew(ctx)
}

// renew has the certificates issued anew that are missing or past two thirds of their lifetime.
func (k *nodeKeys) renew(ctx context.Context) error {
	signer, err := readKey(filepath.Join(k.dir, "node.key"), func() (crypto.Signer, error) {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	})
	if err != nil {
		return err
	}
	chain, err := k.certificate(ctx, "node.crt", signer, k.service.IssueNode)
	if err != nil {
		return fmt.Errorf("the node's certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("the node's certificate: %w", err)
	}
	k.tls.Store(&tls.Certificate{Certificate: chain, PrivateKey: signer, Leaf: leaf})
	for name, h := range k.hubs {
		chain, err := k.certificate(ctx, "hub-"+name+".crt", h.signer, k.service.IssueHub)
		if err != nil {
			return fmt.Errorf("the hub's certificate: %w", err)
		}
		h.chain.Store(&chain)
	}
	return nil
}

// certificate returns the chain in a file, or has a new one issued and puts it there.
func (k *nodeKeys) certificate(ctx context.Context, file string, signer crypto.Signer, issue func(context.Context, crypto.PublicKey) ([][]byte, error)) ([][]byte, error) {
	path := filepath.Join(k.dir, file)
	if chain, ok := readChain(path, signer.Public()); ok {
		return chain, nil
	}
	chain, err := issue(ctx, signer.Public())
	if err != nil {
		return nil, err
	}
	var b []byte
	for _, der := range chain {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return chain, writeFile(path, b)
}

// readChain returns a chain that is for that key and has more than a third of its lifetime left.
func readChain(path string, pub crypto.PublicKey) ([][]byte, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, false
	}
	var chain [][]byte
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		chain = append(chain, block.Bytes)
	}
	if len(chain) == 0 {
		return nil, false
	}
	id, err := authority.ParseIdentity(chain)
	if err != nil {
		return nil, false
	}
	if p, ok := id.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !p.Equal(pub) {
		return nil, false
	}
	due := id.NotBefore.Add(id.NotAfter.Sub(id.NotBefore) * 2 / 3)
	return chain, time.Now().Before(due)
}

// hub returns the key and external sender of rooms of that suite.
func (k *nodeKeys) hub(s mls.CipherSuite) (crypto.Signer, mls.ExternalSender, error) {
	h := k.hubs[scheme(s)]
	if h == nil {
		return nil, mls.ExternalSender{}, refuse("notAllowed", "this node doesn't host rooms of cipher suite %d", s)
	}
	pub, err := s.SignaturePublicKey(h.signer.Public())
	if err != nil {
		return nil, mls.ExternalSender{}, err
	}
	return h.signer, mls.ExternalSender{SignatureKey: pub, Credential: mls.X509Credential(*h.chain.Load())}, nil
}

// readKey reads a private key in PKCS #8, or makes it.
func readKey(path string, generate func() (crypto.Signer, error)) (crypto.Signer, error) {
	b, err := readOrMake(path, func() ([]byte, error) {
		key, err := generate()
		if err != nil {
			return nil, err
		}
		der, err := authority.MarshalPrivateKey(key)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	})
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s is not a key in PEM", path)
	}
	signer, err := authority.ParsePrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return signer, nil
}

// readSecret reads n random bytes, or makes them.
func readSecret(path string, n int) ([]byte, error) {
	b, err := readOrMake(path, func() ([]byte, error) {
		b := make([]byte, n)
		_, err := rand.Read(b)
		return b, err
	})
	if err == nil && len(b) != n {
		err = fmt.Errorf("%s has %d bytes, not %d", path, len(b), n)
	}
	return b, err
}

func readOrMake(path string, generate func() ([]byte, error)) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err == nil {
		return b, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading a key: %w", err)
	}
	if b, err = generate(); err != nil {
		return nil, fmt.Errorf("making %s: %w", path, err)
	}
	return b, writeFile(path, b)
}

// writeFile writes a file of mode 0600 that is either there as a whole, after a crash too, or not.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing %s: %w", path, err), os.Remove(f.Name()))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return errors.Join(d.Sync(), d.Close())
}
