package node

import (
	"bytes"
	"crypto/rand"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
)

// Franking (draft-ietf-mimi-protocol-06, Section 5.4): the hub stamps messages whose sender has put a franking tag into the
// authenticated data, in rooms whose GroupContext names the hub's key as franking agent. That is the key which the room
// has in its external_senders, so that one certificate speaks for both. An agent is there from a room's beginning or not
// at all.

// checkFranking makes sure that a new room's franking agent, if it has one, is this hub, and that tags reach the hub.
func (n *Node) checkFranking(group *mls.PublicGroup) error {
	d := group.Dictionary()
	agent, err := mimi.FrankingAgent(d)
	if err != nil {
		return refuse("malformed", "%v", err)
	}
	if agent == nil {
		return nil
	}
	_, own, err := n.keys.hub(group.Suite())
	if err != nil {
		return err
	}
	if !bytes.Equal(agent.SignatureKey, own.SignatureKey) || !agent.Credential.Equal(own.Credential) {
		return refuse("malformed", "the franking agent isn't this hub")
	}
	if _, ok := d.Get(mls.ComponentSafeAAD); !ok {
		return refuse("malformed", "a room with a franking agent has safe_aad")
	}
	return nil
}

// frank returns the stamp of a message, nil if it gets none: its room or its sender asks for none. r.mu is held.
func (n *Node) frank(r *room, who *roster, m *mls.PrivateMessage, c mimi.ServerFrankingContext) (*mimi.Frank, error) {
	if who.agent == nil {
		return nil, nil
	}
	tag, err := mimi.TagOf(m.AuthenticatedData)
	if err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	if tag == nil {
		return nil, nil
	}
	suite := r.group.Suite()
	signer, own, err := n.keys.hub(suite)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(who.agent, own.SignatureKey) {
		return nil, nil // the hub has lost that key
	}
	return mimi.NewFrank(rand.Reader, suite, signer, n.keys.franking[:], *tag, c)
}
