package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Link lets people join a room who aren't in it. Whoever has it can, so it is a secret; formatted as anything but its URL
// it is without its key.
type Link struct {
	room mimi.URI
	key  ed25519.PrivateKey
}

// ErrLink says that something isn't a link.
var ErrLink = errors.New("not a link to a room")

// Room returns the room's name.
func (l Link) Room() mimi.URI { return l.room }

// Key returns the link's public key, by which the room knows it.
func (l Link) Key() ed25519.PublicKey { return l.key.Public().(ed25519.PublicKey) }

// URL returns the link as it is handed on: the room's URI and as its fragment the private key, the seed of 32 bytes in
// base64url.
func (l Link) URL() string {
	return string(l.room) + "#" + base64.RawURLEncoding.EncodeToString(l.key.Seed())
}

// Format implements fmt.Formatter: a link without its key.
func (l Link) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, string(l.room)+"#...") }

// ParseLink reads what URL writes; white space around it doesn't matter. It fails with ErrLink.
func ParseLink(s string) (Link, error) {
	room, fragment, _ := strings.Cut(strings.TrimSpace(s), "#")
	uri, err := mimi.ParseURI(room)
	seed, bad := base64.RawURLEncoding.Strict().DecodeString(fragment)
	if err != nil || bad != nil || uri.Kind() != mimi.KindRoom || len(seed) != ed25519.SeedSize {
		return Link{}, fmt.Errorf("client: %w", ErrLink)
	}
	return Link{uri, ed25519.NewKeyFromSeed(seed)}, nil
}

// LinkOptions says what a new link is for. The zero value is one for anybody, for ever.
type LinkOptions struct {
	Role     uint32        // that it gives; 0: the first that the room's rules have for those who come by a link
	Once     bool          // it is used up by who joins first
	Lifetime time.Duration // 0: as long as the room lets it
}

// CreateLink makes a link to the room, which must have rules (see CreateRoomWith) that let this user and people by links in.
// Only the link that is returned has the key: the room doesn't.
func (r *Room) CreateLink(ctx context.Context, o LinkOptions) (Link, error) {
	_, key, err := ed25519.GenerateKey(r.c.o.Rand)
	if err != nil {
		return Link{}, fmt.Errorf("client: create a link to %s: %w", r.uri, err)
	}
	l := Link{r.uri, key}
	err = r.change(ctx, func(g *mls.Group) (mls.CommitOptions, error) {
		rules, err := mimi.RulesOf(g.Dictionary())
		if err != nil {
			return mls.CommitOptions{}, err
		}
		life := o.Lifetime
		if p := rules.JoinLinks; life == 0 && p != nil {
			life = time.Duration(p.Expiration) * time.Second
		}
		link := mimi.JoinLink{Key: l.Key(), Role: cmp.Or(o.Role, rules.Roles.ByLink()), MultiUser: !o.Once}
		if link.Role == mimi.RoleNone {
			return mls.CommitOptions{}, fmt.Errorf("client: nobody may join %s by a link", r.uri)
		}
		if life > 0 {
			link.Expires = uint64(r.c.o.Time().Add(life).Unix())
		}
		return mls.CommitOptions{Proposals: []mls.Proposal{linksProposal(mimi.JoinLinksUpdate{Added: mimi.JoinLinks{link}})}}, nil
	})
	if err != nil {
		return Link{}, err
	}
	return l, nil
}

// Links returns the links of the room, without what it takes to join.
func (r *Room) Links() (mimi.JoinLinks, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return mimi.JoinLinksOf(r.group.Dictionary())
}

// RevokeLink has the link of a key let nobody in any more. It does nothing if the room hasn't got it.
func (r *Room) RevokeLink(ctx context.Context, key ed25519.PublicKey) error {
	return r.change(ctx, func(g *mls.Group) (o mls.CommitOptions, err error) {
		links, err := mimi.JoinLinksOf(g.Dictionary())
		if err != nil {
			return o, err
		}
		i := slices.IndexFunc(links, func(l mimi.JoinLink) bool { return bytes.Equal(l.Key, key) })
		if i < 0 {
			return o, errDone
		}
		o.Proposals = []mls.Proposal{linksProposal(mimi.JoinLinksUpdate{Removed: []uint32{uint32(i)}})}
		return o, nil
	})
}

// JoinByLink makes the user a participant of the link's room and this client a member, like Join.
func (c *Client) JoinByLink(ctx context.Context, l Link) (*Room, error) {
	return c.join(ctx, l.room, l.key)
}

func linksProposal(u mimi.JoinLinksUpdate) mls.Proposal { return appData(mimi.ComponentJoinLinks, u) }

// joiningCode is what admits this client by the link of a key; nil without a key.
func (c *Client) joiningCode(room mimi.URI, link ed25519.PrivateKey) []byte {
	if link == nil {
		return nil
	}
	return codec.Marshal(mimi.NewJoiningCode(link, room, c.ID()))
}

// admission are the proposals by which this client's user becomes a participant of a room of that GroupContext; none if it
// is one. code is a joining code, nil if there is none.
func (c *Client) admission(context mls.GroupContext, room mimi.URI, code []byte) ([]mls.Proposal, error) {
	var d mls.AppDataDictionary
	data, _ := context.Extensions.Find(mls.ExtensionAppDataDictionary)
	if err := codec.Unmarshal(data, &d); err != nil {
		return nil, fmt.Errorf("app_data_dictionary: %w", err)
	}
	role, err := mimi.RoleOf(d, c.User())
	if err != nil || role != nil {
		return nil, err
	}
	if code == nil {
		index, err := mimi.OpenRole(d, room, c.User(), c.ID())
		if err != nil {
			return nil, err
		}
		return []mls.Proposal{c.enters(index)}, nil
	}
	links, err := mimi.JoinLinksOf(d)
	if err != nil {
		return nil, err
	}
	link, i, err := links.Open(code, room, c.ID())
	if err != nil {
		return nil, err
	}
	all := []mls.Proposal{c.enters(link.Role), {
		Type: mls.ProposalAppEphemeral, AppEphemeral: &mls.AppEphemeral{Component: mimi.ComponentJoinLinks, Data: code},
	}}
	if !link.MultiUser {
		all = append(all, linksProposal(mimi.JoinLinksUpdate{Removed: []uint32{uint32(i)}}))
	}
	return all, nil
}

func (c *Client) enters(role uint32) mls.Proposal {
	return participantProposal(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: c.User(), Role: role}}})
}
