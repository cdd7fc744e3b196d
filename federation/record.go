package federation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

// recordLabel sets the signatures of records apart from all others that a node's key makes.
const recordLabel = "Parley 1.0 NodeRecord"

// The bounds of a Record, in bytes and certificates.
const (
	maxDomain      = 253
	maxAddress     = 260
	maxVersion     = 64
	maxCertificate = 8 << 10
	maxChain       = 6
	maxSignature   = 256
	maxRecord      = 16 << 10
)

// Record is a node's own statement of where it is reached, signed with the key of its certificate. Nodes relay the
// records of those that they approve, and everybody judges each one by its own approvals.
//
//	struct {
//	    opaque domain<V>;
//	    opaque address<V>;
//	    uint64 incarnation;
//	    uint64 issued;            /* seconds since the Unix epoch */
//	    opaque version<V>;
//	    opaque chain<V><V>;       /* DER, leaf first, root included */
//	    opaque signature<V>;      /* over NodeRecordTBS */
//	} NodeRecord;
//
//	struct {
//	    opaque label<V> = "Parley 1.0 NodeRecord";
//	    /* domain to chain, as in NodeRecord */
//	} NodeRecordTBS;
type Record struct {
	Domain      string
	Address     string    // the advertised host:port, for UDP and TCP
	Incarnation uint64    // grows with every record that the node signs, restarts included
	Issued      time.Time // in whole seconds
	Version     string    // of the node's software
	Chain       [][]byte  // of the node's certificate: DER, leaf first, root included
	Signature   []byte
}

// ErrRecord is wrapped by the errors of records that are wrong in themselves, whoever judges them.
var ErrRecord = errors.New("invalid node record")

// MarshalMLS implements codec.Marshaler.
func (r *Record) MarshalMLS(w *codec.Writer) {
	r.marshalContent(w)
	w.Opaque(r.Signature)
}

func (r *Record) marshalContent(w *codec.Writer) {
	w.Opaque([]byte(r.Domain))
	w.Opaque([]byte(r.Address))
	w.Uint64(r.Incarnation)
	w.Uint64(uint64(r.Issued.Unix()))
	w.Opaque([]byte(r.Version))
	codec.WriteVector(w, r.Chain, func(w *codec.Writer, c []byte) { w.Opaque(c) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (r *Record) UnmarshalMLS(rd *codec.Reader) {
	*r = Record{}
	r.Domain = string(rd.OpaqueMax(maxDomain))
	r.Address = string(rd.OpaqueMax(maxAddress))
	r.Incarnation = rd.Uint64()
	issued := rd.Uint64()
	if issued > 1<<40 {
		rd.Failf("issued %d seconds after the epoch", issued)
	}
	r.Issued = time.Unix(int64(issued), 0).UTC()
	r.Version = string(rd.OpaqueMax(maxVersion))
	rd.Vector(func(rd *codec.Reader) {
		if len(r.Chain) == maxChain {
			rd.Failf("chain of more than %d certificates", maxChain)
			return
		}
		r.Chain = append(r.Chain, rd.OpaqueMax(maxCertificate))
	})
	r.Signature = rd.OpaqueMax(maxSignature)
}

// ParseRecord decodes a Record of at most 16 KiB. Nothing is verified yet.
func ParseRecord(b []byte) (Record, error) {
	if len(b) > maxRecord {
		return Record{}, fmt.Errorf("%w: %d bytes", ErrRecord, len(b))
	}
	var r Record
	if err := codec.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	return r, nil
}

func (r *Record) tbs() []byte {
	var w codec.Writer
	w.Opaque([]byte(recordLabel))
	r.marshalContent(&w)
	return w.Bytes()
}

// Sign sets the signature, with the private key of the chain's leaf.
func (r *Record) Sign(key crypto.Signer) error {
	digest, opts, err := recordDigest(key.Public(), r.tbs())
	if err != nil {
		return fmt.Errorf("signing the node record: %w", err)
	}
	if r.Signature, err = key.Sign(nil, digest, opts); err != nil {
		return fmt.Errorf("signing the node record: %w", err)
	}
	return nil
}

// recordDigest returns what a key of pub's type signs for content: Ed25519 the content itself, ECDSA its digest in
// the size of the curve.
func recordDigest(pub crypto.PublicKey, content []byte) ([]byte, crypto.SignerOpts, error) {
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		return content, crypto.Hash(0), nil
	case *ecdsa.PublicKey:
		switch bits := pub.Curve.Params().BitSize; {
		case bits <= 256:
			d := sha256.Sum256(content)
			return d[:], crypto.SHA256, nil
		case bits <= 384:
			d := sha512.Sum384(content)
			return d[:], crypto.SHA384, nil
		default:
			d := sha512.Sum512(content)
			return d[:], crypto.SHA512, nil
		}
	}
	return nil, nil, fmt.Errorf("key of type %T", pub)
}

// Verify checks the record in itself (CheckConsistent) and that verify approves its chain for its domain.
func (r *Record) Verify(verify func([]*x509.Certificate) (domain string, err error)) error {
	chain, err := r.consistent()
	if err != nil {
		return err
	}
	domain, err := verify(chain)
	if err != nil {
		return fmt.Errorf("record of %s: %w", r.Domain, err)
	}
	if domain != r.Domain {
		return fmt.Errorf("%w: the chain of %s in a record of %s", ErrRecord, domain, r.Domain)
	}
	return nil
}

// CheckConsistent checks what needs no approval: that the chain is one, its leaf is for the record's domain, and the
// leaf's key signed the record. Validity in time is left to the one who approves.
func (r *Record) CheckConsistent() error {
	_, err := r.consistent()
	return err
}

func (r *Record) consistent() ([]*x509.Certificate, error) {
	if err := checkAddress(r.Address); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	if !validDomain(r.Domain) {
		return nil, fmt.Errorf("%w: domain %q", ErrRecord, r.Domain)
	}
	if r.Incarnation == 0 || len(r.Chain) == 0 || len(r.Chain) > maxChain {
		return nil, fmt.Errorf("%w: incarnation %d, chain of %d", ErrRecord, r.Incarnation, len(r.Chain))
	}
	for _, c := range r.Version {
		if c < ' ' || c > '~' {
			return nil, fmt.Errorf("%w: version %q", ErrRecord, r.Version)
		}
	}
	chain := make([]*x509.Certificate, len(r.Chain))
	for i, der := range r.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %w", ErrRecord, i, err)
		}
		chain[i] = c
	}
	if err := checkRecordSignature(chain[0].PublicKey, r.tbs(), r.Signature); err != nil {
		return nil, err
	}
	if err := chain[0].VerifyHostname(r.Domain); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	for i, c := range chain[:len(chain)-1] {
		if err := c.CheckSignatureFrom(chain[i+1]); err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %w", ErrRecord, i, err)
		}
	}
	return chain, nil
}

func checkRecordSignature(pub crypto.PublicKey, content, sig []byte) error {
	digest, _, err := recordDigest(pub, content)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRecord, err)
	}
	ok := false
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, digest, sig)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, digest, sig)
	}
	if !ok {
		return fmt.Errorf("%w: wrong signature", ErrRecord)
	}
	return nil
}

// checkAddress accepts a host:port that can be dialled.
func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("address %q has no port", address)
	}
	if len(address) > maxAddress || host == "" || strings.ContainsFunc(host, func(c rune) bool { return c <= ' ' || c > '~' || c == '/' }) {
		return fmt.Errorf("address %q has no host", address)
	}
	if ip := net.ParseIP(host); ip != nil && (ip.IsUnspecified() || ip.IsMulticast()) {
		return fmt.Errorf("address %q is of no one host", address)
	}
	return nil
}

// validDomain accepts lower-case names of letters, digits, hyphens and dots: what can stand in a certificate.
func validDomain(s string) bool {
	if len(s) == 0 || len(s) > maxDomain {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.ContainsFunc(label, func(c rune) bool { return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' }) {
			return false
		}
	}
	return true
}
