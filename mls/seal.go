package mls

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"io"
)

// Sealed state. A log-structured store keeps what was overwritten or deleted, for a while or for ever, and so do file
// systems and their journals: a secret that was written there can't be taken back. So the secrets of a group's state are
// sealed, and the keys that open them are in a few short entries, the only ones whose deletion has to be real: one for
// the state of the current epoch, replaced when the epoch ends, and one for each epoch's messages, which goes with the
// epoch (RFC 9420, Section 9.2; RFC 9750, Section 8.2.2). A seal is AES-256-GCM with a random nonce before the
// ciphertext; the entry's key is authenticated with it, so that entries can't be put in each other's place.
//
// The key of an epoch's messages opens what the store still has of that epoch's used keys, so that they are gone for
// good only when the epoch is forgotten, or after Reseal.

// sealKeySize is the size in bytes of the keys in the entries for which Erasable is true.
const sealKeySize = 32

// Erasable says whether an entry of a group's state holds a key that seals others. Such an entry is 32 bytes, written
// once an epoch. When it is overwritten or deleted its former value must be gone from the disk: the forward secrecy of
// stored state rests on this and on nothing else. Where the store can't do that, they belong elsewhere, for example in
// a file that is overwritten in place. A new value must be durable before the rest of its Batch is, and an old one is
// erased after that.
func Erasable(key []byte) bool {
	return len(key) == 1 && key[0] == keyStateSeal || len(key) == 9 && key[0] == keyEpochSeal
}

// sealer seals entries under one key. A nil sealer leaves them as they are: state of format 1 isn't sealed.
type sealer struct {
	redact
	key  secret
	aead cipher.AEAD
}

func newSealer(rand io.Reader) (*sealer, error) {
	key := make(secret, sealKeySize)
	if _, err := io.ReadFull(rand, key); err != nil {
		return nil, fmt.Errorf("mls: read randomness: %w", err)
	}
	return sealerOf(key)
}

func sealerOf(key secret) (*sealer, error) {
	if len(key) != sealKeySize {
		return nil, fmt.Errorf("%w: sealing key of %d bytes", errState, len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &sealer{key: key, aead: aead}, nil
}

// seal returns the Batch for values that are secret.
func (s *sealer) seal(b Batch) Batch {
	if s == nil || b == (discard{}) {
		return b
	}
	return sealing{b, s}
}

// sealedHeader is set in the format with which a sealed header begins. The format stays in the clear, so that what a
// later release has sealed is known for that.
const sealedHeader = 1 << 15

func (s *sealer) open(key, value []byte) ([]byte, error) {
	var format []byte
	if len(key) == 1 && key[0] == keyHeader {
		if len(value) < 2 {
			return value, nil // which isn't a header
		}
		f := binary.BigEndian.Uint16(value)
		if !knownFormat(f &^ sealedHeader) {
			return nil, fmt.Errorf("%w: state format %d", ErrUnsupported, f&^sealedHeader)
		}
		switch sealed := f&sealedHeader != 0; {
		case sealed && s == nil:
			return nil, fmt.Errorf("%w: the key that seals the state is missing", errState)
		case !sealed:
			return value, nil
		}
		format = binary.BigEndian.AppendUint16(nil, f&^sealedHeader)
		key, value = append(bytes.Clone(key), value[:2]...), value[2:]
	}
	if s == nil {
		return value, nil
	}
	plain, err := s.aead.Open(format, nil, value, key)
	if err != nil {
		return nil, fmt.Errorf("%w: its seal doesn't open", errState)
	}
	return plain, nil
}

// save writes the key itself.
func (s *sealer) save(b Batch, key []byte) {
	if s != nil {
		b.Set(key, s.key)
	}
}

// erase makes the sealer useless, after the last use.
func (s *sealer) erase() {
	if s != nil {
		s.key.erase()
		s.aead = nil
	}
}

// sealing is a Batch that seals what is set.
type sealing struct {
	Batch
	s *sealer
}

// Set implements Batch.
func (b sealing) Set(key, value []byte) {
	out, aad := make([]byte, 0, len(value)+b.s.aead.Overhead()), key
	if len(key) == 1 && key[0] == keyHeader {
		out = binary.BigEndian.AppendUint16(out, binary.BigEndian.Uint16(value)|sealedHeader)
		aad, value = append(bytes.Clone(key), out...), value[2:]
	}
	b.Batch.Set(key, b.s.aead.Seal(out, nil, value, aad))
}

// epochSealers are the sealers that a new epoch begins with. They are made before the change begins, which can't fail
// then.
type epochSealers struct {
	redact
	state, messages *sealer
}

func (c *Config) newSealers() (epochSealers, error) {
	state, err := newSealer(c.rand())
	if err != nil {
		return epochSealers{}, err
	}
	messages, err := newSealer(c.rand())
	return epochSealers{state: state, messages: messages}, err
}

// Reseal writes all secrets anew under fresh keys and deletes the present ones, so that what a log-structured store
// still has of used keys can't be opened any more: an application calls it from time to time where epochs are long. It
// also seals a state that was loaded from format 1, which otherwise happens with the next epoch. It writes as much as
// there are secrets, and needs no commit.
func (g *Group) Reseal(b Batch) error {
	g.op.Lock()
	defer g.done()
	if !g.active {
		return nil // without secrets
	}
	next, err := g.cfg.newSealers()
	if err != nil {
		return fmt.Errorf("mls: reseal: %w", err)
	}
	past := make([]*sealer, len(g.past))
	for i := range past {
		if past[i], err = newSealer(g.cfg.rand()); err != nil {
			return fmt.Errorf("mls: reseal: %w", err)
		}
	}
	b = orDiscard(b)
	for i, e := range g.past {
		e.tree.reseal(past[i])
		past[i].save(b, key64(keyEpochSeal, e.context.Epoch))
		g.savePast(b, e)
		saveSecrets(b, e.context.Epoch, e.tree)
	}
	g.messages.reseal(next.messages)
	g.sealer.erase()
	g.sealer = next.state
	g.saveEpoch(b)
	for _, e := range g.state.pending {
		g.state.savePending(g.sealer.seal(b), e)
	}
	if g.staged != nil {
		g.saveStaged(b)
	}
	return nil
}

// reseal gives the tree another sealer, under which all of it is to be written.
func (s *secretTree) reseal(next *sealer) {
	for _, k := range s.keys() {
		s.dirty[string(k)] = struct{}{}
	}
	s.sealer.erase()
	s.sealer = next
}

// unseal opens a state's sealed entries and takes them in.
func (e *entries) unseal(sealed []entry) error {
	for _, x := range sealed {
		s := e.stateSeal
		if x.key[0] == keySecret || x.key[0] == keyPast {
			s = e.epochSeals[binary.BigEndian.Uint64(x.key[1:])]
		}
		value, err := s.open(x.key, x.value)
		if err == nil {
			err = e.add(x.key[0], x.key[1:], value)
		}
		if err != nil {
			return fmt.Errorf("mls: load state: entry %x: %w", x.key, err)
		}
	}
	return nil
}
