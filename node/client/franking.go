package client

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
)

// Franking (draft-ietf-mimi-protocol-06, Section 5.4). In a room with a franking agent every message of this client has a
// franking tag, and a message without a good frank says so: nobody can report it.

// agent is the franking agent of a room's group, nil if it has none. It stays as long as the group.
type agent struct {
	group *mls.Group
	data  *mimi.FrankingAgentData
}

// frankingAgent returns the agent of the present group, which was checked when the group was entered. mu is held.
func (r *Room) frankingAgent() *mimi.FrankingAgentData {
	if r.agent.group != r.group {
		data, err := mimi.FrankingAgent(r.group.Dictionary())
		if err != nil {
			data = nil // mls has taken it as it is, and so did checkRoom
		}
		r.agent = agent{r.group, data}
	}
	return r.agent.data
}

// checkAgent says whether a room's franking agent, if there is one, is the provider that hosts the room.
func checkAgent(room mimi.URI, g *mls.Group) error {
	a, err := mimi.FrankingAgent(g.Dictionary())
	if err != nil || a == nil {
		return err
	}
	if err := checkHub(room, a.Credential); err != nil {
		return err
	}
	id, err := authority.ParseIdentity(a.Credential.Certificates)
	if err != nil {
		return fmt.Errorf("credential of the franking agent: %w", err)
	}
	key, err := g.Suite().SignaturePublicKey(id.PublicKey)
	if err != nil {
		return fmt.Errorf("credential of the franking agent: %w", err)
	}
	if !bytes.Equal(key, a.SignatureKey) {
		return errors.New("the franking agent has another key than its credential")
	}
	return nil
}

// takeFrank verifies the frank that the hub gave to a message, and keeps it with the message or notes what is wrong. mu
// is held.
func (r *Room) takeFrank(m *Message, aad []byte, f *mimi.Frank, timestamp uint64) {
	a := r.frankingAgent()
	if a == nil {
		return
	}
	tag, err := mimi.TagOf(aad)
	switch {
	case err != nil:
	case tag == nil:
		err = errors.New("the sender gave no franking tag")
	default:
		err = r.verifyFrank(a, m, tag, f, timestamp)
	}
	if err != nil {
		m.FrankFault = err.Error()
		return
	}
	m.Frank = f
}

// takeGivenFrank is takeFrank for a message that another device gave, with the frank that it says to have got. Such a
// frank shows that the hub has accepted a message of the sender at that time; that it was this one, the hub alone can say,
// and says when the message is reported. mu is held.
func (r *Room) takeGivenFrank(m *Message, f *mimi.Frank) {
	a := r.frankingAgent()
	if a == nil {
		return
	}
	tag := new(mimi.FrankAAD)
	if m.Content != nil {
		*tag = mimi.FrankingTag(m.Content.Salt[:], m.application)
	}
	if err := r.verifyFrank(a, m, tag, f, uint64(m.Time.UnixMilli())); err != nil {
		m.FrankFault = err.Error()
		return
	}
	m.Frank = f
}

func (r *Room) verifyFrank(a *mimi.FrankingAgentData, m *Message, tag *mimi.FrankAAD, f *mimi.Frank, timestamp uint64) error {
	switch {
	case f == nil:
		return errors.New("the hub gave no frank")
	case m.Content == nil:
		return errors.New("not of a format that can be franked")
	case m.Content.Sender != m.User:
		return fmt.Errorf("the content names %q as its sender", m.Content.Sender)
	case m.Content.Room != r.uri:
		return fmt.Errorf("the content is for the room %q", m.Content.Room)
	case *tag != mimi.FrankingTag(m.Content.Salt[:], m.application):
		return errors.New("the franking tag is of other content")
	}
	return f.Verify(r.group.Suite(), a.SignatureKey, mimi.ServerFrankingContext{Sender: m.User, Room: r.uri, AcceptedTimestamp: timestamp})
}
