package node

import (
	"context"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/store"
)

// proxyUpdate takes a client's handshake to the hub of a room that another node hosts. The hub being out of reach is
// the client's to deal with: it keeps the bytes and sends them again.
func (n *Node) proxyUpdate(ctx context.Context, by submitter, room mimi.URI, body []byte) (*mimi.UpdateRoomResponse, uint64, error) {
	if err := n.disk.grow(); err != nil {
		return nil, 0, err
	}
	var req mimi.UpdateRequest
	if err := decode(body, &req); err != nil {
		return nil, 0, err
	}
	m := req.Bundle.Message
	joins := m != nil && m.Public != nil && m.Public.Content.Sender.Type == mls.SenderNewMemberCommit
	if joins {
		if err := n.checkJoiner(by, m.Public); err != nil {
			return nil, 0, err
		}
		if _, ok := n.trust.Peer(room.Domain()); !ok {
			return nil, 0, refuse("unapprovedPeer", "%s hasn't approved %s", n.cfg.Domain, room.Domain())
		}
		// What the hub sends after the commit may be here before its answer is.
		if _, err := n.followRoom(room); err != nil {
			return nil, 0, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	resp, seq, err := n.federation.Update(ctx, room.Domain(), room, body)
	if err != nil {
		return nil, 0, n.unreachable(room.Domain(), err)
	}
	if joins && resp.Code == mimi.UpdateSuccess {
		if err := n.noteJoin(by, room, seq); err != nil {
			return nil, 0, err
		}
	}
	return resp, seq, nil
}

// checkJoiner makes sure that an external commit is the client's own.
func (n *Node) checkJoiner(by submitter, m *mls.PublicMessage) error {
	if m.Content.Commit == nil || m.Content.Commit.Path == nil {
		return refuse("malformed", "an external commit has a path")
	}
	user, client, err := n.verifier.IdentityOf(m.Content.Commit.Path.LeafNode.Credential)
	if err != nil {
		return err
	}
	if client != by.client || user != by.user {
		return refuse("notAllowed", "%s can't join for %s", by.client, client)
	}
	return nil
}

// noteJoin notes, durably, that a client has joined a room by itself, with the commit of number seq.
func (n *Node) noteJoin(by submitter, room mimi.URI, seq uint64) error {
	have, err := n.member(by.client, room)
	if err != nil {
		return err
	}
	if have != nil && have.start >= seq && seq != 0 && have.anew == 0 {
		return nil
	}
	if seq > 0 {
		seq-- // the commit itself is for the client too: it has the hub's proposals with it
	} else {
		r, err := n.openRoom(room)
		if err != nil {
			return err
		}
		if r != nil {
			seq = r.durable.Load()
		}
	}
	var b store.Batch
	setMember(&b, by.client, by.user, room, seq)
	wait, err := n.store.Apply(&b)
	if err != nil {
		return err
	}
	if err := wait(); err != nil {
		return err
	}
	n.listeners.joined(by.client, room)
	return nil
}

// proxyMessage takes a client's message to the hub of a room that another node hosts.
func (n *Node) proxyMessage(ctx context.Context, by submitter, room mimi.URI, body []byte) (*mimi.SubmitMessageResponse, uint64, error) {
	if err := n.disk.grow(); err != nil {
		return nil, 0, err
	}
	var req mimi.SubmitMessageRequest
	if err := decode(body, &req); err != nil {
		return nil, 0, err
	}
	if req.Sender != by.user {
		return n.refuseMessage(by, room, refuse("notAllowed", "%s doesn't speak for %s", by.client, req.Sender))
	}
	if m := req.Message; m != nil && m.Private != nil {
		if err := n.note(markOf(by, m.Private, messageHash(m))); err != nil {
			return nil, 0, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	resp, seq, err := n.federation.SubmitMessage(ctx, room.Domain(), room, body)
	if err != nil {
		return nil, 0, n.unreachable(room.Domain(), err)
	}
	return resp, seq, nil
}
