package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/quic-go/quic-go"
)

// maxChain bounds the certificates of a peer's chain that VerifyPeer is bothered with.
const maxChain = 8

// handshake is what the TLS checks of an accepted connection found out. It hangs on the connection's context, which
// quic-go hands to crypto/tls, so it is written before the connection is accepted and only read afterwards.
type handshake struct{ domain string }

type handshakeKey struct{}

// serverTLS is the configuration of the QUIC listener. The policy depends on the protocols that the peer offers: one
// between nodes among them makes the handshake mutual, and then only those can be negotiated.
func (e *Endpoint) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetCertificate:     e.certificate,
		GetConfigForClient: e.policy,
		// GetConfigForClient replaces all of this; crypto/tls wants a protocol here nevertheless.
		NextProtos: []string{ALPNHTTP3},
	}
}

func (e *Endpoint) policy(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	mutual := e.mutualProtocols()
	if !slices.ContainsFunc(hello.SupportedProtos, func(p string) bool { return slices.Contains(mutual, p) }) {
		if e.cfg.Clients == nil || slices.Contains(hello.SupportedProtos, ALPNFederation) || slices.Contains(hello.SupportedProtos, ALPNGossip) {
			return nil, fmt.Errorf("transport: no protocol in common with %q", hello.SupportedProtos)
		}
		return &tls.Config{
			MinVersion:             tls.VersionTLS13,
			GetCertificate:         e.certificate,
			NextProtos:             []string{ALPNHTTP3},
			SessionTicketsDisabled: true,
		}, nil
	}
	if hello.ServerName != e.cfg.Domain {
		return nil, fmt.Errorf("transport: peer asks for %q", hello.ServerName)
	}
	info, ok := hello.Context().Value(handshakeKey{}).(*handshake)
	if !ok {
		return nil, errors.New("transport: handshake without context")
	}
	addr := hello.Conn.RemoteAddr()
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: e.certificate,
		NextProtos:     mutual,
		ClientAuth:     tls.RequireAnyClientCert,
		// VerifyConnection, since VerifyPeerCertificate isn't called on resumption; and no resumption, so that a
		// removed peer can't come back on an old ticket.
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			domain, err := e.verify(cs.PeerCertificates)
			if err != nil {
				e.refused.Charge(Network(addr.String()), 1, refusals)
				e.cfg.OnRefused(addr, cs.PeerCertificates, err)
				return err
			}
			info.domain = domain
			return nil
		},
	}, nil
}

// clientTLS is the configuration for dialling domain under alpn. What the check of the peer's certificate says goes
// to verified as well, since alerts travel without their reasons.
func (e *Endpoint) clientTLS(domain, alpn string, verified func(error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: domain,
		NextProtos: []string{alpn},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return e.cfg.Certificate()
		},
		// Peers are approved by the fingerprint of their root, which VerifyPeer checks; no system root is asked.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			got, err := e.verify(cs.PeerCertificates)
			if err == nil && got != domain {
				err = fmt.Errorf("%w: certificate of %s where %s was expected", ErrRefused, got, domain)
			}
			verified(err)
			return err
		},
	}
}

func (e *Endpoint) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return e.cfg.Certificate()
}

// verify checks the chain of a node.
func (e *Endpoint) verify(chain []*x509.Certificate) (string, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return "", fmt.Errorf("%w: a chain of %d certificates", ErrRefused, len(chain))
	}
	domain, err := e.cfg.VerifyPeer(chain)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if domain == "" || domain == e.cfg.Domain {
		return "", fmt.Errorf("%w: a peer of domain %q", ErrRefused, domain)
	}
	return domain, nil
}

// remoteRefusal says whether err is the peer's alert about our certificate: bad_certificate (42) to
// certificate_unknown (46), unknown_ca (48), access_denied (49) and certificate_required (116), as QUIC carries them
// (RFC 9001, Section 4.8).
func remoteRefusal(err error) bool {
	te, ok := errors.AsType[*quic.TransportError](err)
	if !ok || !te.Remote {
		return false
	}
	switch te.ErrorCode {
	case 0x100 + 42, 0x100 + 43, 0x100 + 44, 0x100 + 45, 0x100 + 46, 0x100 + 48, 0x100 + 49, 0x100 + 116:
		return true
	}
	return false
}

// explain adds ErrRefused to the errors of a connection that the peer's check of our certificate ended.
func explain(err error) error {
	if err == nil || errors.Is(err, ErrRefused) {
		return err
	}
	if remoteRefusal(err) {
		return fmt.Errorf("%w by the other side: %w", ErrRefused, err)
	}
	if ae, ok := errors.AsType[*quic.ApplicationError](err); ok && ae.Remote && ae.ErrorCode == codeRevoked {
		return fmt.Errorf("%w by the other side: %w", ErrRefused, err)
	}
	return err
}
