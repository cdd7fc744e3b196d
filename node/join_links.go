package node

import (
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// Of a room's links, the hub judges what depends on time; the rest is in mimi.RoomPolicy.

// mayJoin refuses what somebody who doesn't take part in the room brings, unless it is an external commit that may change
// that: of a client of its own, in a room that is open to strangers. r.mu is held.
func (n *Node) mayJoin(by submitter, r *room, m *mls.PublicMessage) error {
	c := m.Content.Commit
	if m.Content.Sender.Type != mls.SenderNewMemberCommit || c == nil || c.Path == nil {
		return refuse("notAllowed", "%s doesn't join", by.name())
	}
	if !mimi.OpenToStrangers(r.group.Dictionary()) {
		return refuse("notAllowed", "the room isn't open to strangers")
	}
	user, client, err := n.verifier.IdentityOf(c.Path.LeafNode.Credential)
	if err != nil {
		return err
	}
	if user.Domain() != by.domain || by.client != "" && by.client != client {
		return refuse("notAllowed", "%s can't join for %s", by.name(), client)
	}
	return nil
}

// checkLinks refuses new links that last longer than the room's policy has it.
func (n *Node) checkLinks(r *room, proposals []mls.PendingProposal) error {
	for _, p := range proposals {
		u := p.Proposal.AppDataUpdate
		if u == nil || u.Component != mimi.ComponentJoinLinks || p.Sender.Type != mls.SenderMember {
			continue
		}
		b, ok := r.group.Dictionary().Get(mimi.ComponentJoinLinkPolicy)
		if !ok {
			continue
		}
		var policy mimi.JoinLinkPolicy
		var update mimi.JoinLinksUpdate
		if err := codec.Unmarshal(b, &policy); err != nil {
			return notAllowed(err)
		}
		if err := codec.Unmarshal(u.Update, &update); err != nil {
			return notAllowed(err)
		}
		for _, l := range update.Added {
			if latest := unixNow() + uint64(policy.Expiration); policy.Expiration != 0 && (l.Expires == 0 || l.Expires > latest) {
				return refuse("notAllowed", "a link lasts %d s at most", policy.Expiration)
			}
		}
	}
	return nil
}

// checkLink refuses an external commit by a link that has expired.
func checkLink(info *mls.StagedInfo) error {
	l, err := mimi.UsedLink(info)
	if err != nil {
		return notAllowed(err)
	}
	if l != nil && l.Expired(unixNow()) {
		return refuse("notAllowed", "the link has expired")
	}
	return nil
}

// unixNow is the time in s since 1970.
func unixNow() uint64 { return now() / 1000 }
