package mimi

import (
	"bytes"
	"crypto/ed25519"
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Joining codes. What a link and a joining code contain is opaque in draft-ietf-mimi-protocol-06, Section 5.6, and
// draft-ietf-mimi-room-policy-03, Section 6.2. Here a link has a key pair of its own: the room's state has the public
// key, people hand on the private one, and the joining code is a signature that admits one client. So neither the hub nor
// members learn what others could join with, and members check what the hub admits.

// JoinLinkPolicy is the join_link_policy component: which links there may be.
//
//	struct {
//	    bool on_request;
//	    Uri join_link;
//	    bool multiuser;
//	    uint32 expiration;
//	} JoinLinkPolicy;
type JoinLinkPolicy struct {
	OnRequest  bool // one link at a time
	RequestURI string
	MultiUser  bool   // links may be for many users
	Expiration uint32 // s that a new link may be valid; 0: without a bound
}

// MarshalMLS implements codec.Marshaler.
func (p JoinLinkPolicy) MarshalMLS(w *codec.Writer) {
	w.Optional(p.OnRequest)
	w.Opaque([]byte(p.RequestURI))
	w.Optional(p.MultiUser)
	w.Uint32(p.Expiration)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *JoinLinkPolicy) UnmarshalMLS(r *codec.Reader) {
	*p = JoinLinkPolicy{OnRequest: r.Optional(), RequestURI: readText(r, MaxText), MultiUser: r.Optional(), Expiration: r.Uint32()}
}

// MaxJoinLinks is how many links a room has at most.
const MaxJoinLinks = 256

// JoinLink is a link's part in the room's state, the draft's opaque join_link.
//
//	struct {
//	    opaque public_key<V>; /* Ed25519 */
//	    uint32 role_index;
//	    bool multiuser;
//	    uint64 expires;
//	} JoinLinkTerms;
type JoinLink struct {
	Key       ed25519.PublicKey
	Role      uint32
	MultiUser bool   // else it is gone once it was used
	Expires   uint64 // s since 1970-01-01T00:00:00Z, by the hub's clock; 0: never
}

// MarshalMLS implements codec.Marshaler.
func (l JoinLink) MarshalMLS(w *codec.Writer) {
	w.Opaque(l.Key)
	w.Uint32(l.Role)
	w.Optional(l.MultiUser)
	w.Uint64(l.Expires)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *JoinLink) UnmarshalMLS(r *codec.Reader) {
	*l = JoinLink{Key: r.OpaqueMax(ed25519.PublicKeySize), Role: r.Uint32(), MultiUser: r.Optional(), Expires: r.Uint64()}
	if r.Err() == nil && (len(l.Key) != ed25519.PublicKeySize || l.Role <= RoleBanned) {
		r.Failf("a link with a key of %d bytes to role %d", len(l.Key), l.Role)
	}
}

// Expired says whether a link is past its time, in s since 1970.
func (l *JoinLink) Expired(now uint64) bool { return l.Expires != 0 && now >= l.Expires }

// JoinLinks is the join_links component: the links of a room.
//
//	struct {
//	    opaque join_link<V>;
//	} JoinLink;
//
//	JoinLink JoinLinksData<V>;
type JoinLinks []JoinLink

// MarshalMLS implements codec.Marshaler.
func (l JoinLinks) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, l, func(w *codec.Writer, link JoinLink) { w.Opaque(codec.Marshal(link)) })
}

// UnmarshalMLS implements codec.Unmarshaler.
func (l *JoinLinks) UnmarshalMLS(r *codec.Reader) {
	*l = readAtMost(r, MaxJoinLinks, func(r *codec.Reader) (link JoinLink) {
		if b := r.OpaqueMax(64); r.Err() == nil {
			if err := codec.Unmarshal(b, &link); err != nil {
				r.Fail(err)
			}
		}
		return link
	})
}

// find returns the index of the link with a key, -1 if there is none.
func (l JoinLinks) find(key []byte) int {
	for i := range l {
		if bytes.Equal(l[i].Key, key) {
			return i
		}
	}
	return -1
}

// JoinLinksOf returns the links of a room with that app_data_dictionary.
func JoinLinksOf(d mls.AppDataDictionary) (JoinLinks, error) {
	var l JoinLinks
	_, err := policyOf(d, ComponentJoinLinks, &l)
	return l, err
}

// JoinLinksUpdate is the content of an AppDataUpdate for the links. Indexes are those of the links before the commit;
// what several updates in one commit remove is removed once.
//
//	struct {
//	    uint32 removedIndices<V>;
//	    JoinLink added_links<V>;
//	} JoinLinksUpdate;
type JoinLinksUpdate struct {
	Removed []uint32
	Added   JoinLinks
}

// MarshalMLS implements codec.Marshaler.
func (u JoinLinksUpdate) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, u.Removed, func(w *codec.Writer, i uint32) { w.Uint32(i) })
	u.Added.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (u *JoinLinksUpdate) UnmarshalMLS(r *codec.Reader) {
	*u = JoinLinksUpdate{Removed: readAtMost(r, MaxJoinLinks, func(r *codec.Reader) uint32 { return r.Uint32() })}
	u.Added.UnmarshalMLS(r)
}

type joinLinksComponent struct{}

// Update implements mls.Component.
func (joinLinksComponent) Update(current []byte, updates [][]byte) ([]byte, error) {
	var links JoinLinks
	if current != nil {
		if err := codec.Unmarshal(current, &links); err != nil {
			return nil, fmt.Errorf("mimi: join links: %w", err)
		}
	}
	gone := make(map[uint32]bool)
	var added JoinLinks
	for _, b := range updates {
		var u JoinLinksUpdate
		if err := codec.Unmarshal(b, &u); err != nil {
			return nil, fmt.Errorf("mimi: join links update: %w", err)
		}
		for _, i := range u.Removed {
			if uint64(i) >= uint64(len(links)) {
				return nil, fmt.Errorf("mimi: join links update: no link %d of %d", i, len(links))
			}
			gone[i] = true
		}
		added = append(added, u.Added...)
	}
	var next JoinLinks
	for i, l := range links {
		if !gone[uint32(i)] {
			next = append(next, l)
		}
	}
	for _, l := range added {
		if next.find(l.Key) >= 0 || len(next) >= MaxJoinLinks {
			return nil, fmt.Errorf("mimi: join links update: a key twice, or more than %d links", MaxJoinLinks)
		}
		next = append(next, l)
	}
	return codec.Marshal(next), nil
}

// CheckEphemeral implements mls.EphemeralComponent: an external commit has the joining code that admits it.
func (joinLinksComponent) CheckEphemeral(data []byte) error {
	return codec.Unmarshal(data, new(JoiningCode))
}

// JoiningCode admits one client to a room by one of the room's links. It is the opaque joiningCode of a GroupInfoRequest,
// and the data of an AppEphemeral proposal for join_links in the external commit.
//
//	struct {
//	    opaque public_key<V>;
//	    opaque signature<V>; /* Ed25519, of JoiningCodeTBS */
//	} JoiningCode;
//
//	struct {
//	    opaque label<V> = "Parley 1.0 JoiningCode";
//	    opaque room<V>;
//	    opaque client<V>;
//	} JoiningCodeTBS;
type JoiningCode struct {
	Key       ed25519.PublicKey
	Signature []byte
}

// MarshalMLS implements codec.Marshaler.
func (c JoiningCode) MarshalMLS(w *codec.Writer) {
	w.Opaque(c.Key)
	w.Opaque(c.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *JoiningCode) UnmarshalMLS(r *codec.Reader) {
	*c = JoiningCode{Key: r.OpaqueMax(ed25519.PublicKeySize), Signature: r.OpaqueMax(ed25519.SignatureSize)}
	if r.Err() == nil && len(c.Key) != ed25519.PublicKeySize {
		r.Failf("a joining code with a key of %d bytes", len(c.Key))
	}
}

// NewJoiningCode makes the code of a client from a link's private key.
func NewJoiningCode(link ed25519.PrivateKey, room, client URI) JoiningCode {
	return JoiningCode{Key: link.Public().(ed25519.PublicKey), Signature: ed25519.Sign(link, joiningCodeTBS(room, client))}
}

func joiningCodeTBS(room, client URI) []byte {
	var w codec.Writer
	w.Opaque([]byte("Parley 1.0 JoiningCode"))
	w.Opaque([]byte(room))
	w.Opaque([]byte(client))
	return w.Bytes()
}

// Open returns the link of a room that a code of a client is for, and its index. It fails with a *PolicyError.
func (l JoinLinks) Open(code []byte, room, client URI) (*JoinLink, int, error) {
	var c JoiningCode
	if err := codec.Unmarshal(code, &c); err != nil {
		return nil, 0, forbidden("joining code: %v", err)
	}
	i := l.find(c.Key)
	if i < 0 || !ed25519.Verify(c.Key, joiningCodeTBS(room, client), c.Signature) {
		return nil, 0, forbidden("%s has no joining code of %s", client, room)
	}
	return &l[i], i, nil
}
