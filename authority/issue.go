package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net/url"

	"github.com/smallstep/certificates/authority/provisioner"

	"github.com/parley-mls/parley/federation/mimi"
)

// maxRequest bounds a CSR, in bytes. Key and signature of ML-DSA-87 take 7 KiB.
const maxRequest = 12 << 10

// NewRequest makes a client's CSR, with the user and the client as the only names. The signer is of a cipher suite that
// has certificates (mls.CipherSuite.X509).
func NewRequest(rand io.Reader, user, client mimi.URI, signer crypto.Signer) ([]byte, error) {
	t := &x509.CertificateRequest{Subject: pkix.Name{CommonName: client.ID()}}
	for _, name := range []mimi.URI{user, client} {
		u, err := url.Parse(string(name))
		if err != nil {
			return nil, fmt.Errorf("authority: request: %w: %w", ErrRequest, err)
		}
		t.URIs = append(t.URIs, u)
	}
	der, err := createRequest(rand, t, signer)
	if err != nil {
		return nil, fmt.Errorf("authority: request: %w", err)
	}
	return der, nil
}

// parseRequest checks a client's CSR: exactly a user and a client of the domain, a key of a cipher suite, possession.
// Anything else that a request asks for, a subject or extensions, is left out of the certificate.
func parseRequest(domain string, der []byte) (*x509.CertificateRequest, *subject, error) {
	if len(der) > maxRequest {
		return nil, nil, fmt.Errorf("%w: CSR of %d bytes", ErrRequest, len(der))
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: CSR: %w", ErrRequest, err)
	}
	key, err := subjectKey(csr.RawSubjectPublicKeyInfo, csr.PublicKey)
	if errors.Is(err, ErrMalformed) {
		return nil, nil, fmt.Errorf("%w: CSR: %w", ErrRequest, err)
	}
	if err != nil {
		return nil, nil, err
	}
	if err := checkRequestSignature(csr, key); err != nil {
		return nil, nil, err
	}
	var names []byte
	for _, ext := range csr.Extensions {
		if ext.Id.Equal(oidSubjectAltName) {
			if names != nil {
				return nil, nil, fmt.Errorf("%w: subject alternative names twice", ErrRequest)
			}
			names = ext.Value
		}
	}
	if names == nil {
		return nil, nil, fmt.Errorf("%w: the CSR has no names", ErrName)
	}
	uris, dns, err := parseAltNames(names)
	if errors.Is(err, ErrMalformed) {
		return nil, nil, fmt.Errorf("%w: CSR: %w", ErrRequest, err)
	}
	if err != nil {
		return nil, nil, err
	}
	if len(uris) != 2 || len(dns) != 0 {
		return nil, nil, fmt.Errorf("%w: %d URIs and %d DNS names, not one user and one client", ErrName, len(uris), len(dns))
	}
	s := &subject{purpose: PurposeClient, domain: domain, key: key}
	if s.user, s.client, err = clientNames(uris); err != nil {
		return nil, nil, err
	}
	if s.user.Domain() != domain {
		return nil, nil, fmt.Errorf("%w: %s is not of %s", ErrForeignName, s.user, domain)
	}
	return csr, s, nil
}

// sign has smallstep sign and store a certificate for s. The rows of with are committed together with it; errConflict
// says that one of them wasn't as expected and nothing was done. A certificate that isn't stored is not returned.
func (e *Embedded) sign(ctx context.Context, csr *x509.CertificateRequest, s *subject, with func(serial string) (*issuance, error)) ([][]byte, error) {
	n, err := newSerial(e.rand)
	if err != nil {
		return nil, err
	}
	template, err := s.template(n, e.time(), e.intermediate)
	if err != nil {
		return nil, err
	}
	serial := n.String() // smallstep's form
	p := &issuance{}
	if with != nil {
		if p, err = with(serial); err != nil {
			return nil, err
		}
	}
	defer e.ledger.prepare(serial, p)()
	if mldsaKeyOf(s.key) != nil {
		csr = e.carrier // smallstep verifies again what it can
	}
	chain, err := e.ca.SignWithContext(ctx, csr, provisioner.SignOptions{},
		provisioner.CertificateModifierFunc(func(c *x509.Certificate, _ provisioner.SignOptions) error {
			*c = *template
			return nil
		}))
	if p.conflict {
		return nil, errConflict
	}
	if err != nil {
		return nil, fmt.Errorf("issue: %w", err)
	}
	out := make([][]byte, len(chain))
	for i, c := range chain {
		out[i] = c.Raw
	}
	return out, nil
}

// own returns the changes by which a client belongs to its user and has this certificate, and what they expect.
func (e *Embedded) own(s *subject, serial string) (*issuance, error) {
	key := clientKeys + s.client.ID()
	owner, err := e.store.Get([]byte(key))
	if err != nil {
		return nil, fmt.Errorf("read the owner of %s: %w", s.client, err)
	}
	if owner != nil && string(owner) != string(s.user) {
		return nil, fmt.Errorf("%w: %s", ErrClientTaken, s.client)
	}
	return &issuance{
		changes: map[string][]byte{key: []byte(s.user), indexKeys + s.client.ID() + "/" + serial: {}},
		expect:  map[string][]byte{key: owner},
	}, nil
}

// Issue implements Service.
func (e *Embedded) Issue(ctx context.Context, der []byte) ([][]byte, error) {
	csr, s, err := parseRequest(e.domain, der)
	if err != nil {
		return nil, fmt.Errorf("authority: issue: %w", err)
	}
	chain, err := e.issueClient(ctx, csr, s, nil)
	if err != nil {
		return nil, fmt.Errorf("authority: issue for %s: %w", s.client, err)
	}
	return chain, nil
}

// issueClient issues a client's certificate, tried again when somebody else changed what extra or the client's record
// rest on. extra adds its own changes for the serial number; its error ends the attempts.
func (e *Embedded) issueClient(ctx context.Context, csr *x509.CertificateRequest, s *subject, extra func(p *issuance, serial string) error) ([][]byte, error) {
	for range maxAttempts {
		chain, err := e.sign(ctx, csr, s, func(serial string) (*issuance, error) {
			p, err := e.own(s, serial)
			if err == nil && extra != nil {
				err = extra(p, serial)
			}
			return p, err
		})
		if !errors.Is(err, errConflict) {
			return chain, err
		}
	}
	return nil, errConflict
}

// Renew implements Service. The caller has checked that the requester holds the key of the chain's certificate, by a
// challenge for example: the chain alone is public, and the CSR proves possession of the new key only.
func (e *Embedded) Renew(ctx context.Context, old [][]byte, der []byte) ([][]byte, error) {
	csr, s, err := parseRequest(e.domain, der)
	if err != nil {
		return nil, fmt.Errorf("authority: renew: %w", err)
	}
	id, err := e.verifier.Verify(old, PurposeClient)
	if err != nil {
		return nil, fmt.Errorf("authority: renew %s: %w", s.client, err)
	}
	if id.User != s.user || id.Client != s.client {
		return nil, fmt.Errorf("authority: renew %s: %w: the certificate is for %s", s.client, ErrName, id.Client)
	}
	n, _ := parseSerial(id.Serial)
	revoked := tableKey(revokedTable, n.String())
	chain, err := e.issueClient(ctx, csr, s, func(p *issuance, _ string) error {
		row, err := e.store.Get([]byte(revoked))
		if err != nil {
			return fmt.Errorf("read revocations: %w", err)
		}
		if row != nil {
			return ErrRevoked
		}
		p.expect[revoked] = nil // a revocation that comes between wins
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("authority: renew %s: %w", s.client, err)
	}
	return chain, nil
}

// IssueNode implements Service.
func (e *Embedded) IssueNode(ctx context.Context, pub crypto.PublicKey) ([][]byte, error) {
	chain, err := e.issueOwn(ctx, PurposeNode, pub)
	if err != nil {
		return nil, err
	}
	for _, root := range e.roots {
		if bytes.Equal(root.RawSubject, e.intermediate.RawIssuer) && e.intermediate.CheckSignatureFrom(root) == nil {
			return append(chain, root.Raw), nil
		}
	}
	return nil, errors.New("authority: issue for the node: no root is the intermediate's") // Open has checked
}

// IssueHub implements Service.
func (e *Embedded) IssueHub(ctx context.Context, pub crypto.PublicKey) ([][]byte, error) {
	return e.issueOwn(ctx, PurposeHub, pub)
}

func (e *Embedded) issueOwn(ctx context.Context, p Purpose, pub crypto.PublicKey) ([][]byte, error) {
	if key := mldsaKeyOf(pub); key != nil && p == PurposeHub { // Go's TLS has no ML-DSA for a node
		pub = key
	} else if !signatureKey(pub) {
		return nil, fmt.Errorf("authority: issue for the %v: %w", p, ErrKeyType)
	}
	chain, err := e.sign(ctx, e.carrier, &subject{purpose: p, domain: e.domain, key: pub}, nil)
	if err != nil {
		return nil, fmt.Errorf("authority: issue for the %v: %w", p, err)
	}
	return chain, nil
}
