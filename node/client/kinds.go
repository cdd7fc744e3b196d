package client

import (
	"fmt"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/mls"
)

// What a message is, a hub doesn't see: so each client holds senders to what their roles may send
// (draft-ietf-mimi-room-policy-03, Section 8, "Message Capabilities"), by the roles of the epoch in which the message was
// sent. All members find the same, except about a message that one of them hasn't got. Links in a text aren't looked for;
// what a reader may copy, follow or receive isn't judged.

// cast is who has which role in one epoch of a group.
type cast struct {
	group *mls.Group
	epoch uint64
	roles mimi.RoleList
	of    map[mimi.URI]uint32
}

// roleOf returns a user's role in the present epoch, nil if there is none. mu is held.
func (r *Room) roleOf(user mimi.URI) *mimi.Role {
	if c := &r.cast; c.group != r.group || c.epoch != r.group.Epoch() {
		*c = cast{group: r.group, epoch: r.group.Epoch(), of: make(map[mimi.URI]uint32)}
		list, err := participants(r.group)
		if err != nil {
			return nil
		}
		if c.roles, err = mimi.RolesOf(r.group.Dictionary()); err != nil {
			return nil
		}
		for _, p := range list {
			c.of[p.User] = p.Role
		}
	}
	role, ok := r.cast.of[user]
	if !ok {
		return nil
	}
	return r.cast.roles.Find(role)
}

// May says whether this user's role in the room has a capability.
func (r *Room) May(c mimi.Capability) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.roleOf(r.c.User()).May(c)
}

// permits refuses a user's message of a kind that its role doesn't allow; m is nil for bytes. moderates says that it may
// delete what others have sent. mu is held.
func (r *Room) permits(user mimi.URI, m *content.Message) (moderates bool, err error) {
	role := r.roleOf(user)
	needs := func(what string, all ...mimi.Capability) error {
		for _, c := range all {
			if !role.May(c) {
				return fmt.Errorf("%s %s: %w (%v)", user, what, ErrNoRight, c)
			}
		}
		return nil
	}
	switch {
	case m == nil:
		return false, needs("sends a message", mimi.CanSendMessage)
	case !m.Replaces.IsZero():
		return r.permitsChange(role, user, m, needs)
	case m.Reaction():
		return false, needs("reacts", mimi.CanReactToMessage)
	}
	starts := len(m.Topic) > 0
	if !m.InReplyTo.IsZero() {
		if to, ok := r.Find(m.InReplyTo); starts && (!ok || to.Content != nil && string(to.Content.Topic) == string(m.Topic)) {
			return false, needs("replies in a topic", mimi.CanReplyInTopic)
		}
		err = needs("replies", mimi.CanReplyToMessage)
	} else {
		err = needs("sends a message", mimi.CanSendMessage)
	}
	if err == nil && starts {
		err = needs("starts a topic", mimi.CanStartTopic)
	}
	return false, err
}

// permitsChange is permits for edits and deletions. What isn't known here may be older than this device, and counts as the
// sender's own. Others' messages aren't edited (draft-ietf-mimi-content, "Rendering and authorization of edits and deletes").
func (r *Room) permitsChange(role *mimi.Role, user mimi.URI, m *content.Message, needs func(string, ...mimi.Capability) error) (moderates bool, err error) {
	first, known := r.Find(m.Replaces)
	own := !known || first.User == user
	reaction := m.Body.Disposition == content.Reaction
	if known && own && first.Content != nil {
		reaction = first.Content.Body.Disposition == content.Reaction
	}
	if m.Deletes() {
		deletesOwn, deletesOther := mimi.CanDeleteOwnMessage, mimi.CanDeleteOtherMessage
		if reaction {
			deletesOwn, deletesOther = mimi.CanDeleteOwnReaction, mimi.CanDeleteOtherReaction
		}
		moderates = role.May(deletesOther)
		switch {
		case !known && moderates:
			return true, nil
		case own:
			return moderates, needs("deletes", deletesOwn)
		case first.Content != nil && reaction != (first.Content.Body.Disposition == content.Reaction):
			return false, fmt.Errorf("%s deletes a reaction as a message, or a message as one", user)
		}
		return moderates, needs(fmt.Sprintf("deletes a message of %s", first.User), deletesOther)
	}
	switch {
	case !own:
		return false, fmt.Errorf("%s replaces a message of %s: %w", user, first.User, ErrNoRight)
	case reaction:
		return false, needs("edits a reaction", mimi.CanEditReaction)
	}
	if err := needs("edits", mimi.CanEditOwnMessage); err != nil {
		return false, err
	}
	if known && first.Content != nil && string(first.Content.Topic) != string(m.Topic) {
		return false, needs("changes a topic", mimi.CanEditOwnTopic)
	}
	return false, nil
}
