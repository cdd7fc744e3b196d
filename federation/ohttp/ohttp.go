// Package ohttp has what MIMI needs of Oblivious HTTP (RFC 9458): the key configurations of a gateway, requests and
// responses in their encapsulation, and the binary HTTP messages (RFC 9292) inside. It does no I/O. A client begins with
// ParseKeys, a gateway is a Gateway, and a relay needs nothing of the package, since it sees ciphertext only.
//
// There is one suite, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-128-GCM, with which the RFC's example is. Messages
// are in memory as a whole: what is large is fetched in parts.
package ohttp

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// The media types of RFC 9458, Section 9.
const (
	KeysType     = "application/ohttp-keys"
	RequestType  = "message/ohttp-req"
	ResponseType = "message/ohttp-res"
)

// KeyProblem is the type of the problem document (RFC 9457) with which a gateway refuses a request that its keys don't
// open (RFC 9458, Section 5.3).
const KeyProblem = "https://iana.org/assignments/http-problem-types#ohttp-key"

// MaxKeys is the size in bytes of the longest list of key configurations that ParseKeys takes.
const MaxKeys = 4 << 10

const (
	kemX25519    = 0x0020
	kdfSHA256    = 0x0001
	aeadAES128   = 0x0001
	publicLength = 32
	headerLength = 7
	secretLength = 16 // max(Nn, Nk), of the exported secret and the response's nonce
)

var (
	// ErrKeys: there is no key configuration that this package can use, or the list doesn't decode.
	ErrKeys = errors.New("ohttp: no usable key configuration")

	// ErrKey: a request is for a key that the gateway hasn't got, or not any more, or doesn't decrypt.
	ErrKey = errors.New("ohttp: the request isn't for a key of this gateway")

	// ErrResponse: a response isn't the one to the request.
	ErrResponse = errors.New("ohttp: the response doesn't decrypt")
)

// header is what precedes an encapsulated request (RFC 9458, Section 4.3).
func header(id byte) []byte { return []byte{id, 0, kemX25519, 0, kdfSHA256, 0, aeadAES128} }

func info(id byte) []byte { return append([]byte("message/bhttp request\x00"), header(id)...) }

// Keys is a key configuration of a gateway, for those who ask it.
type Keys struct {
	id     byte
	public hpke.PublicKey
}

// ParseKeys reads a list of key configurations, of type KeysType (RFC 9458, Section 3.2), and returns the first that this
// package can use. The error wraps ErrKeys.
func ParseKeys(b []byte) (*Keys, error) {
	if len(b) > MaxKeys {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrKeys, len(b), MaxKeys)
	}
	var found *Keys
	for len(b) > 0 {
		if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
			return nil, fmt.Errorf("%w: the list is cut off", ErrKeys)
		}
		n := 2 + int(binary.BigEndian.Uint16(b))
		if k := parseConfig(b[2:n]); k != nil && found == nil {
			found = k
		}
		b = b[n:]
	}
	if found == nil {
		return nil, ErrKeys
	}
	return found, nil
}

// parseConfig reads a key configuration (RFC 9458, Section 3.1); nil if it is of other algorithms, or none.
func parseConfig(b []byte) *Keys {
	const fixed = 1 + 2 + publicLength + 2
	if len(b) < fixed || binary.BigEndian.Uint16(b[1:]) != kemX25519 {
		return nil
	}
	suites := b[fixed:]
	if len(suites) == 0 || len(suites)%4 != 0 || int(binary.BigEndian.Uint16(b[fixed-2:])) != len(suites) {
		return nil
	}
	for s := range slices.Chunk(suites, 4) {
		if binary.BigEndian.Uint16(s) == kdfSHA256 && binary.BigEndian.Uint16(s[2:]) == aeadAES128 {
			public, err := ecdh.X25519().NewPublicKey(b[3 : 3+publicLength])
			if err != nil {
				return nil
			}
			k, err := hpke.NewDHKEMPublicKey(public)
			if err != nil {
				return nil
			}
			return &Keys{b[0], k}
		}
	}
	return nil
}

// exchange derives the secrets of one request's response.
type exchange struct {
	enc    []byte
	secret []byte
}

// aead returns the AEAD and nonce of the response with a nonce of its own (RFC 9458, Section 4.4).
func (e *exchange) aead(nonce []byte) (cipher.AEAD, []byte, error) {
	prk, err := hkdf.Extract(sha256.New, e.secret, slices.Concat(e.enc, nonce))
	if err != nil {
		return nil, nil, err
	}
	key, err := hkdf.Expand(sha256.New, prk, "key", 16)
	if err != nil {
		return nil, nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, nil, err
	}
	n, err := hkdf.Expand(sha256.New, prk, "nonce", aead.NonceSize())
	return aead, n, err
}

const responseLabel = "message/bhttp response"

// Pending is a request that was sent, and opens the response to it.
type Pending struct{ e exchange }

// Seal encapsulates a request. Each is sealed for itself.
func (k *Keys) Seal(request []byte) ([]byte, *Pending, error) {
	enc, sender, err := hpke.NewSender(k.public, hpke.HKDFSHA256(), hpke.AES128GCM(), info(k.id))
	if err != nil {
		return nil, nil, fmt.Errorf("ohttp: seal a request: %w", err)
	}
	ct, err := sender.Seal(nil, request)
	if err != nil {
		return nil, nil, fmt.Errorf("ohttp: seal a request: %w", err)
	}
	secret, err := sender.Export(responseLabel, secretLength)
	if err != nil {
		return nil, nil, fmt.Errorf("ohttp: seal a request: %w", err)
	}
	return slices.Concat(header(k.id), enc, ct), &Pending{exchange{enc, secret}}, nil
}

// Open returns the response in an encapsulated one. The error is ErrResponse.
func (p *Pending) Open(b []byte) ([]byte, error) {
	if len(b) < secretLength {
		return nil, ErrResponse
	}
	aead, nonce, err := p.e.aead(b[:secretLength])
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nonce, b[secretLength:], nil)
	if err != nil {
		return nil, ErrResponse
	}
	return plain, nil
}

// key is a key pair of a gateway.
type key struct {
	id      byte
	private hpke.PrivateKey
	made    time.Time
}

// config is the key configuration, with its length before it as in a list.
func (k *key) config() []byte {
	b := append([]byte{0, 0, k.id, 0, kemX25519}, k.private.PublicKey().Bytes()...)
	b = append(b, 0, 4, 0, kdfSHA256, 0, aeadAES128)
	binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	return b
}

// Gateway has the keys of an oblivious gateway. It makes a new one after every Lifetime, takes requests for the one before
// that long too, and then forgets it; a gateway that starts anew has others. The zero value is ready for use, and so are
// its methods for concurrent use.
type Gateway struct {
	Lifetime time.Duration    // 12 h
	Now      func() time.Time // time.Now

	mu   sync.Mutex
	keys []*key // guarded by mu; the newest first, two at most
}

// current returns the keys as they are now.
func (g *Gateway) current() ([]*key, time.Duration, error) {
	life, now := g.Lifetime, time.Now
	if life <= 0 {
		life = 12 * time.Hour
	}
	if g.Now != nil {
		now = g.Now
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	t := now()
	g.keys = slices.DeleteFunc(g.keys, func(k *key) bool { return t.Sub(k.made) >= 2*life })
	if len(g.keys) == 0 || t.Sub(g.keys[0].made) >= life {
		private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
		if err != nil {
			return nil, 0, fmt.Errorf("ohttp: make a key: %w", err)
		}
		var id [1]byte
		if rand.Read(id[:]); len(g.keys) > 0 {
			id[0] = g.keys[0].id + 1
		}
		g.keys = append([]*key{{id[0], private, t}}, g.keys[:min(1, len(g.keys))]...)
	}
	return slices.Clone(g.keys), life, nil
}

// Keys returns the key configurations, of type KeysType, and until when requests for them are taken.
func (g *Gateway) Keys() (list []byte, until time.Time, err error) {
	keys, life, err := g.current()
	if err != nil {
		return nil, time.Time{}, err
	}
	return keys[0].config(), keys[0].made.Add(2 * life), nil
}

// Reply seals the response to one request.
type Reply struct{ e exchange }

// Open returns the request in an encapsulated one, and what seals the response. The error is ErrKey.
func (g *Gateway) Open(b []byte) ([]byte, *Reply, error) {
	if len(b) < headerLength+publicLength {
		return nil, nil, ErrKey
	}
	keys, _, err := g.current()
	if err != nil {
		return nil, nil, err
	}
	i := slices.IndexFunc(keys, func(k *key) bool { return k.id == b[0] })
	if i < 0 || !bytes.Equal(header(b[0]), b[:headerLength]) {
		return nil, nil, ErrKey
	}
	return keys[i].open(b)
}

func (k *key) open(b []byte) ([]byte, *Reply, error) {
	enc := b[headerLength : headerLength+publicLength]
	r, err := hpke.NewRecipient(enc, k.private, hpke.HKDFSHA256(), hpke.AES128GCM(), info(k.id))
	if err != nil {
		return nil, nil, ErrKey
	}
	request, err := r.Open(nil, b[headerLength+publicLength:])
	if err != nil {
		return nil, nil, ErrKey
	}
	secret, err := r.Export(responseLabel, secretLength)
	if err != nil {
		return nil, nil, fmt.Errorf("ohttp: open a request: %w", err)
	}
	return request, &Reply{exchange{bytes.Clone(enc), secret}}, nil
}

// Seal encapsulates the response.
func (r *Reply) Seal(response []byte) ([]byte, error) {
	var nonce [secretLength]byte
	rand.Read(nonce[:])
	return r.seal(nonce[:], response)
}

func (r *Reply) seal(nonce, response []byte) ([]byte, error) {
	aead, n, err := r.e.aead(nonce)
	if err != nil {
		return nil, fmt.Errorf("ohttp: seal a response: %w", err)
	}
	out := make([]byte, 0, len(nonce)+len(response)+aead.Overhead())
	return aead.Seal(append(out, nonce...), n, response, nil), nil
}
