package node

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// The node's keys in the store. Everything of the node's own begins with "n/"; the authority's, the trust store's and
// gossip's keys are in the same store under prefixes of theirs. URIs contain no zero byte, which ends them in keys;
// numbers are 8 bytes, big-endian, so that keys sort by them.
//
//	n/v                               the format's version, one byte
//	n/t                               the node's incarnation, 8 bytes: one for each store, and each that was restored
//	n/B                               the incarnation before, 8 bytes, while a restored node hasn't reconciled its rooms yet
//	n/B/<room>                        empty: a room of another hub, which has to be asked yet what a restored node has lost
//	n/S                               the head, a chain.Signed, that shows that the store was superseded, and isn't served any more
//	n/N/<domain>                      the first head, a chain.Signed, that is known of a hub's last incarnation
//	n/r/<room>                        roomRecord: what is known of a room, hosted here or not
//	n/g/<room> 00 <mls key>           state of the mls.PublicGroup of a room hosted here
//	n/l/<room> 00 <seq>               log of a room: FanoutMessage of number seq
//	n/L/<room> 00 <seq>               linkRecord: the hash chain at entry seq; none for entries from before format 2, but
//	                                  for the last of them in a room hosted here, nor where another hub keeps no chain
//	n/C/<room>                        cutRecord: the first entry that the log still has, and how old it is; links go with the
//	                                  entries, but for that of the one before the first
//	n/T                               for how long the node has run, in ms, and the time when that was, in ms since 1970,
//	                                  8 bytes each
//	n/j/<room>                        the last signed head, a chain.Signed, of a room that another hub keeps a chain of
//	n/y/<room> 00 <SHA-256>           evidence against the room's hub, a chain.Evidence, by its hash
//	n/z/<domain> 00 <SHA-256>         the key and credential with which a hub signs heads, an ExternalSender, by the key's hash
//	n/i/<room> 00 <SHA-256>           answerRecord: the answer that the MLSMessage of that hash got (hosted rooms);
//	                                  for a hub that numbers nothing, that the FanoutMessage was received
//	n/f/<room> 00 <seq> <SHA-256>     FanoutMessage with a Welcome that belongs to the commit of number seq
//	n/w                               the number of the last Welcome of all
//	n/w/<client> 00 <number>          welcomeRecord: a Welcome that waits for a client; the number is the time in
//	                                  µs since 1970, or one more than the one before
//	n/V                               how long the node has run, in s, 8 bytes
//	n/V/<room> 00 <leaf>              how long it had run when the leaf (4 bytes) was last renewed in the room, which is hosted
//	                                  here, in s, 8 bytes; none for leaves from before, until they are looked at
//	n/c/<client> 00 <room>            memberRecord: the client's membership as far as the node knows
//	n/a/<client> 00 <room>            the last entry that the client said it has stored
//	n/s/<client> 00 <SHA-256>         sentRecord: the last application message that the client submitted in the group with
//	                                  that hash of its identifier
//	n/d/<user> 00 <client>            a client that has published KeyPackages
//	n/k/<client> 00 <KeyPackageRef>   KeyPackage that nobody has claimed, after its expiry (8 bytes, Unix s)
//	n/h/<client> 00 <KeyPackageRef>   a last-resort KeyPackage among those: 1 if it was handed out, else 0, one byte
//	n/K/<KeyPackageRef>               refRecord: the local client whose KeyPackage it is, kept after it was claimed, with the
//	                                  provider whose hub has claimed it
//	n/p/<KeyPackageRef>               refRecord: the provider from which this hub got the KeyPackage for somebody
//	n/U/<client> 00                   where the client is woken when a message waits for it: the URL of a push endpoint
//	n/u/<user> 00 <room>              a room whose participant list has the user, as far as the node knows
//	n/m/<user> 00 <room>              a room that the user has created here; none for rooms from before format 2
//	n/b/<room> 00 <SHA-256>           reportRecord: a report of abuse in a room hosted here, by the hash of the reporter's
//	                                  provider and the AbuseReport
//	n/q/<target> 00 <requester> 00 <room>   consentRecord: what a user was asked and has decided; no room: any room
//	n/Q/<requester> 00 <target> 00 <room>   consentRecord: what a user has asked and was told
//	n/x/<requester> 00 <target> 00 <room>   grantedRecord: KeyPackages that came with a grant and nobody has claimed
//	n/P/<user> 00                     profileRecord: what a user is found by, and shows
//	n/t/<SHA-256><user>               index of profiles: a user with a searchable field, by the hash of its name and value
//	n/A/<user> 00 <SHA-256>           assetRecord: a user's asset, or what is uploaded of it, by the hash of the whole
//	n/R/<SHA-256><user>               index of whole assets by their hashes: who has it; the last one takes the file along
//	n/e/…                             the outbox of ConsentEntries
//	n/o/…                             the outbox
//
// Retention: memberships and rooms are kept, logs as retention.go says. Answers, Welcomes that were taken, reports and
// KeyPackage references are deleted by the sweeper once they are older than retention, or expired; assets after
// Limits.AssetDays. The bytes of assets aren't in the store but in files, see assets.go.
const (
	prefixRoom       = "n/r/"
	prefixGroup      = "n/g/"
	prefixLog        = "n/l/"
	prefixLink       = "n/L/"
	prefixHead       = "n/j/"
	prefixCut        = "n/C/"
	prefixEvidence   = "n/y/"
	prefixHubKey     = "n/z/"
	prefixAnswer     = "n/i/"
	prefixFanout     = "n/f/"
	prefixWelcome    = "n/w/"
	prefixMember     = "n/c/"
	prefixRenewed    = "n/V/"
	prefixAcked      = "n/a/"
	prefixSent       = "n/s/"
	prefixDevice     = "n/d/"
	prefixKeyPackage = "n/k/"
	prefixLastResort = "n/h/"
	prefixOwnRef     = "n/K/"
	prefixClaimedRef = "n/p/"
	prefixUserRoom   = "n/u/"
	prefixCreated    = "n/m/"
	prefixPush       = "n/U/"
	prefixReport     = "n/b/"
	prefixConsent    = "n/q/"
	prefixConsentOf  = "n/Q/"
	prefixGranted    = "n/x/"
	prefixConsentOut = "n/e/"
	prefixProfile    = "n/P/"
	prefixTerm       = "n/t/"
	prefixAsset      = "n/A/"
	prefixAssetRef   = "n/R/"
	prefixOutbox     = "n/o/"
	prefixLatest     = "n/N/"
	prefixLate       = "n/B/"
	keyVersion       = "n/v"
	keyIncarnation   = "n/t"
	keyWelcomes      = "n/w"
	keyServed        = "n/T"
	keyRestored      = "n/B"
	keySuperseded    = "n/S"
	keyUptime        = "n/V"

	formatVersion = 2 // 1 had no chains
)

// checkFormat refuses a store of a later format, brings one of an earlier format to the present one, and marks a new one.
func checkFormat(s store.Store) error {
	have, err := s.Get([]byte(keyVersion))
	if err != nil {
		return err
	}
	switch {
	case have == nil:
	case len(have) != 1 || have[0] < 1 || have[0] > formatVersion:
		return fmt.Errorf("the store has format %x, this program knows %d", have, formatVersion)
	case have[0] == formatVersion:
		return nil
	default:
		// A migration that a crash cuts off is done again.
		if err := chainLogs(s); err != nil {
			return fmt.Errorf("bringing the store to format %d: %w", formatVersion, err)
		}
	}
	_, err = s.Commit(map[string][]byte{keyVersion: {formatVersion}}, map[string][]byte{keyVersion: have})
	return err
}

// key is prefix || a || 00 || rest.
func key(prefix string, a mimi.URI, rest ...[]byte) []byte {
	k := append([]byte(prefix), a...)
	k = append(k, 0)
	return append(k, slices.Concat(rest...)...)
}

func be64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

var errRecord = errors.New("damaged record in the store")

func decodeRecord(b []byte, u codec.Unmarshaler, what string) error {
	if err := codec.Unmarshal(b, u); err != nil {
		return fmt.Errorf("%w: %s: %w", errRecord, what, err)
	}
	return nil
}

// roomRecord is what the node keeps of a room besides its log.
type roomRecord struct {
	hosted bool
	last   uint64 // the number of the log's last entry, 0 if it is empty
	// pending are the numbers of the entries with proposals that are pending in the current epoch (hosted rooms)
	pending []uint64
}

func (r roomRecord) MarshalMLS(w *codec.Writer) {
	w.Optional(r.hosted)
	w.Uint64(r.last)
	codec.WriteVector(w, r.pending, func(w *codec.Writer, n uint64) { w.Uint64(n) })
}

func (r *roomRecord) UnmarshalMLS(rd *codec.Reader) {
	r.hosted = rd.Optional()
	r.last = rd.Uint64()
	r.pending = codec.ReadVector(rd, func(r *codec.Reader) uint64 { return r.Uint64() })
}

// linkRecord is the chain of a room's log at one of its entries.
type linkRecord struct {
	context chain.Hash // of the GroupContext that the entry led to
	chain   chain.Hash
}

func (l linkRecord) MarshalMLS(w *codec.Writer) {
	w.Raw(l.context[:])
	w.Raw(l.chain[:])
}

func (l *linkRecord) UnmarshalMLS(r *codec.Reader) {
	copy(l.context[:], r.Raw(len(l.context)))
	copy(l.chain[:], r.Raw(len(l.chain)))
}

// answerRecord is the first answer to a message that was accepted.
type answerRecord struct {
	seq      uint64
	time     uint64 // ms since 1970, of the acceptance
	response []byte
}

func (a answerRecord) MarshalMLS(w *codec.Writer) {
	w.Uint64(a.seq)
	w.Uint64(a.time)
	w.Opaque(a.response)
}

func (a *answerRecord) UnmarshalMLS(r *codec.Reader) {
	a.seq = r.Uint64()
	a.time = r.Uint64()
	a.response = r.Opaque()
}

// welcomeRecord points to a stored FanoutMessage.
type welcomeRecord struct {
	room   mimi.URI
	seq    uint64
	fanout []byte // the rest of the key under prefixFanout
}

func (v welcomeRecord) MarshalMLS(w *codec.Writer) {
	w.Opaque([]byte(v.room))
	w.Uint64(v.seq)
	w.Opaque(v.fanout)
}

func (v *welcomeRecord) UnmarshalMLS(r *codec.Reader) {
	v.room = mimi.URI(r.Opaque())
	v.seq = r.Uint64()
	v.fanout = r.Opaque()
}

// memberRecord is a client's membership in a room. The client gets the entries after start, up to end if that isn't 0.
type memberRecord struct {
	start uint64
	end   uint64 // the entry that removed the client, 0 while it is a member; known for hosted rooms only
	// anew is the first number that the hub has given again after it was restored, 0 if there is none: a client that has
	// stored that entry has to enter the room anew.
	anew uint64
}

func (m memberRecord) MarshalMLS(w *codec.Writer) {
	w.Uint64(m.start)
	w.Uint64(m.end)
	if m.anew != 0 {
		w.Uint64(m.anew)
	}
}

func (m *memberRecord) UnmarshalMLS(r *codec.Reader) {
	m.start = r.Uint64()
	m.end = r.Uint64()
	m.anew = 0
	if !r.Empty() {
		if m.anew = r.Uint64(); m.anew == 0 {
			r.Failf("membership that is anew from entry 0")
		}
	}
}

// sentRecord is the place of an application message among those of its sender.
type sentRecord struct {
	epoch      uint64
	generation uint32
	hash       []byte // SHA-256 of the MLSMessage; nil if only its key is known
}

// before says whether a key is later than the record's.
func (v *sentRecord) before(epoch uint64, generation uint32) bool {
	return v.epoch < epoch || v.epoch == epoch && v.generation < generation
}

func (v sentRecord) MarshalMLS(w *codec.Writer) {
	w.Uint64(v.epoch)
	w.Uint32(v.generation)
	w.Raw(v.hash)
}

func (v *sentRecord) UnmarshalMLS(r *codec.Reader) {
	v.epoch = r.Uint64()
	v.generation = r.Uint32()
	v.hash = nil
	if !r.Empty() {
		v.hash = r.Raw(sha256.Size)
	}
}

// refRecord says whose KeyPackage a KeyPackageRef names: a client's of this node, which only a hub of provider has
// claimed and may send a Welcome for (nobody if that is empty), or, without client and user, one of another provider's.
// A last-resort KeyPackage may have several providers, separated by spaces: one for each claim without a Welcome yet.
type refRecord struct {
	client, user mimi.URI
	provider     string
	expires      uint64 // Unix s
}

func (v refRecord) MarshalMLS(w *codec.Writer) {
	w.Opaque([]byte(v.client))
	w.Opaque([]byte(v.user))
	w.Opaque([]byte(v.provider))
	w.Uint64(v.expires)
}

func (v *refRecord) UnmarshalMLS(r *codec.Reader) {
	v.client = mimi.URI(r.Opaque())
	v.user = mimi.URI(r.Opaque())
	v.provider = string(r.Opaque())
	v.expires = r.Uint64()
}

// reportRecord is a report of abuse.
type reportRecord struct {
	time   uint64 // ms since 1970
	from   string // the reporter's provider
	report mimi.AbuseReport
}

func (v reportRecord) MarshalMLS(w *codec.Writer) {
	w.Uint64(v.time)
	w.Opaque([]byte(v.from))
	v.report.MarshalMLS(w)
}

func (v *reportRecord) UnmarshalMLS(r *codec.Reader) {
	v.time = r.Uint64()
	v.from = string(r.Opaque())
	v.report.UnmarshalMLS(r)
}

// consentRecord is what is known of one user's consent to another one.
type consentRecord struct {
	asked    uint64                // ms since 1970; 0 if no request is open
	decision mimi.ConsentOperation // ConsentGrant, ConsentRevoke, or 0
	decided  uint64                // ms since 1970, of the decision
}

func (v consentRecord) MarshalMLS(w *codec.Writer) {
	w.Uint64(v.asked)
	w.Uint8(uint8(v.decision))
	w.Uint64(v.decided)
}

func (v *consentRecord) UnmarshalMLS(r *codec.Reader) {
	v.asked = r.Uint64()
	v.decision = mimi.ConsentOperation(r.Uint8())
	v.decided = r.Uint64()
}

// grantedRecord are KeyPackages, one of each client of a user.
type grantedRecord struct{ keyPackages []mls.KeyPackage }

func (v grantedRecord) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, v.keyPackages, func(w *codec.Writer, kp mls.KeyPackage) { kp.MarshalMLS(w) })
}

func (v *grantedRecord) UnmarshalMLS(r *codec.Reader) {
	v.keyPackages = codec.ReadVector(r, func(r *codec.Reader) (kp mls.KeyPackage) {
		kp.UnmarshalMLS(r)
		return kp
	})
}

// profileRecord is a user's profile.
type profileRecord struct {
	hidden bool // the handle finds nobody
	fields []profileField
}

type profileField struct {
	source mimi.FieldSource
	name   string
	value  string
	search uint8 // searchNot, searchExact or searchPart
	shown  bool
}

func (v profileRecord) MarshalMLS(w *codec.Writer) {
	w.Optional(v.hidden)
	codec.WriteVector(w, v.fields, func(w *codec.Writer, f profileField) {
		w.Uint8(uint8(f.source))
		w.Opaque([]byte(f.name))
		w.Opaque([]byte(f.value))
		w.Uint8(f.search)
		w.Optional(f.shown)
	})
}

func (v *profileRecord) UnmarshalMLS(r *codec.Reader) {
	v.hidden = r.Optional()
	v.fields = codec.ReadVector(r, func(r *codec.Reader) profileField {
		return profileField{mimi.FieldSource(r.Uint8()), string(r.Opaque()), string(r.Opaque()), r.Uint8(), r.Optional()}
	})
}

// assetRecord is an asset of a user.
type assetRecord struct {
	whole   bool   // false: it is being uploaded
	size    uint64 // bytes, when it is whole
	offset  uint64 // if it is being uploaded: how many bytes are on disk
	expires uint64 // s since 1970
}

func (v assetRecord) MarshalMLS(w *codec.Writer) {
	w.Optional(v.whole)
	w.Uint64(v.size)
	if !v.whole {
		w.Uint64(v.offset)
	}
	w.Uint64(v.expires)
}

func (v *assetRecord) UnmarshalMLS(r *codec.Reader) {
	v.whole = r.Optional()
	v.size = r.Uint64()
	if v.offset = 0; !v.whole {
		v.offset = r.Uint64()
	}
	v.expires = r.Uint64()
}
