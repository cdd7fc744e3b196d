package mimi

import (
	"crypto"
	"fmt"
	"io"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// gatewayKeysLabel is that of SignWithLabel (RFC 9420, Section 5.1.2).
const gatewayKeysLabel = "ParleyGatewayKeys"

const (
	maxGatewayKeys = 4 << 10
	maxSignature   = 8 << 10 // bytes; that of ML-DSA-87 has 4,627
)

// GatewayKeys are the key configurations of a hub's oblivious gateway (RFC 9458, Section 3), signed with the key that the
// hub has in the external_senders of its rooms, so that the relay that hands them on can't put its own there.
//
//	struct {
//	    opaque hub<V>;
//	    uint64 not_after;
//	    opaque key_configurations<V>;
//	} GatewayKeysTBS;
//
//	struct {
//	    GatewayKeysTBS tbs;
//	    opaque signature<V>; /* SignWithLabel(hub's key, "ParleyGatewayKeys", GatewayKeysTBS) */
//	} GatewayKeys;
type GatewayKeys struct {
	Hub       URI    // of the provider
	NotAfter  uint64 // s since 1970-01-01T00:00:00Z: when the hub has forgotten the keys
	Keys      []byte // application/ohttp-keys
	Signature []byte
}

// MarshalMLS implements codec.Marshaler.
func (k GatewayKeys) MarshalMLS(w *codec.Writer) {
	k.marshalTBS(w)
	w.Opaque(k.Signature)
}

func (k GatewayKeys) marshalTBS(w *codec.Writer) {
	k.Hub.MarshalMLS(w)
	w.Uint64(k.NotAfter)
	w.Opaque(k.Keys)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (k *GatewayKeys) UnmarshalMLS(r *codec.Reader) {
	*k = GatewayKeys{}
	k.Hub.UnmarshalMLS(r)
	k.NotAfter, k.Keys, k.Signature = r.Uint64(), r.OpaqueMax(maxGatewayKeys), r.OpaqueMax(maxSignature)
}

func (k *GatewayKeys) tbs() []byte {
	var w codec.Writer
	k.marshalTBS(&w)
	return w.Bytes()
}

// Sign signs the keys as the hub does for rooms of a suite.
func (k *GatewayKeys) Sign(rand io.Reader, suite mls.CipherSuite, signer crypto.Signer) (err error) {
	k.Signature, err = suite.SignWithLabel(rand, signer, gatewayKeysLabel, k.tbs())
	return err
}

// Verify says whether the keys are those of a hub, now in s since 1970, whose key in rooms of that suite is key. The
// error wraps mls.ErrSignature if the signature is at fault.
func (k *GatewayKeys) Verify(suite mls.CipherSuite, key []byte, hub URI, now uint64) error {
	if k.Hub != hub || now >= k.NotAfter {
		return fmt.Errorf("mimi: keys of the gateway of %s until %d, want those of %s at %d", k.Hub, k.NotAfter, hub, now)
	}
	if err := suite.VerifyWithLabel(key, gatewayKeysLabel, k.tbs(), k.Signature); err != nil {
		return fmt.Errorf("mimi: keys of the gateway of %s: %w", hub, err)
	}
	return nil
}
