package node

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/transport/pace"
)

// Ephemeral messages, of typing and of what was read, are for who is there. The hub checks them like messages of the log
// and passes them on, to its own clients' streams and to the other providers; nobody writes them anywhere, and what can't
// be passed on at once is lost. The draft has nothing of the kind: the endpoint is one of ours, and peers that don't have
// it are left out. All that is kept is the sender's mark (sent.go), at the sender's own node: the key is used.

const (
	maxWaiting       = 64  // ephemeral messages for a stream
	maxPeerWaiting   = 256 // ephemeral messages for a peer
	ephemeralTimeout = 5 * time.Second
)

// ephemerals are the queues to peers, each with a goroutine while there is something in it. The zero value is ready for
// use.
type ephemerals struct {
	mu     sync.Mutex
	queues map[string][]ephemeral // guarded by mu; by peer
	pace   pace.Limiter[string]   // by user, and by peer
}

// ephemeral is a message on its way.
type ephemeral struct {
	room   mimi.URI
	fanout []byte
}

// paceEphemeral counts an ephemeral message of an own user, or of a peer and the user whom it names.
func (n *Node) paceEphemeral(by submitter, user mimi.URI) error {
	r := func(users int) pace.Rate {
		return pace.Rate{PerSecond: float64(users * n.cfg.Limits.EphemeralPerSecond), Burst: 2 * users * n.cfg.Limits.EphemeralPerSecond}
	}
	var wait time.Duration
	if by.user == "" {
		wait = n.ephemerals.pace.Take(by.domain, 1, r(usersOfPeer))
	}
	if wait == 0 {
		wait = n.ephemerals.pace.Take(string(user), 1, r(1))
	}
	if wait > 0 {
		return busy(wait, "%s sends too many ephemeral messages", user)
	}
	return nil
}

// sendEphemeral takes an ephemeral message of an own client to the room's hub. Its key counts as used, durably, before it
// goes on.
func (n *Node) sendEphemeral(ctx context.Context, by submitter, room mimi.URI, body []byte) error {
	req, err := n.parseEphemeral(by, body)
	if err != nil {
		return err
	}
	mark := markOf(by, req.Message.Private, messageHash(req.Message))
	if mark == nil {
		return refuse("malformed", "an ephemeral message comes with the generation of its key")
	}
	if err := n.paceEphemeral(by, by.user); err != nil {
		return err
	}
	if err := n.note(mark); err != nil {
		return err
	}
	if room.Domain() == n.cfg.Domain {
		return n.spreadEphemeral(by, room, req)
	}
	ctx, cancel := context.WithTimeout(ctx, ephemeralTimeout)
	defer cancel()
	if err := n.federation.Ephemeral(ctx, room.Domain(), room, body); err != nil {
		return n.unreachable(room.Domain(), err)
	}
	return nil
}

// parseEphemeral reads a message that somebody has sent.
func (n *Node) parseEphemeral(by submitter, body []byte) (*mimi.SubmitMessageRequest, error) {
	if len(body) > federation.MaxEphemeral {
		return nil, refuse("tooLarge", "an ephemeral message of %d bytes, at most %d", len(body), federation.MaxEphemeral)
	}
	req := new(mimi.SubmitMessageRequest)
	if err := decode(body, req); err != nil {
		return nil, err
	}
	if m := req.Message; m == nil || m.Private == nil || m.Private.ContentType != mls.ContentApplication {
		return nil, refuse("malformed", "an ephemeral message is a PrivateMessage")
	}
	if string(req.Message.Private.AuthenticatedData) != mimi.EphemeralAAD {
		return nil, refuse("malformed", "the message isn't an ephemeral one")
	}
	if req.Sender.Domain() != by.domain || (by.user != "" && req.Sender != by.user) {
		return nil, refuse("notAllowed", "%s doesn't speak for %s", by.name(), req.Sender)
	}
	return req, nil
}

// orderEphemeral takes an ephemeral message of a peer's user to a room that this node hosts.
func (n *Node) orderEphemeral(by submitter, room mimi.URI, body []byte) error {
	req, err := n.parseEphemeral(by, body)
	if err != nil {
		return err
	}
	if err := n.paceEphemeral(by, req.Sender); err != nil {
		return err
	}
	return n.spreadEphemeral(by, room, req)
}

// spreadEphemeral passes a message on to all who take part in a room that this node hosts.
func (n *Node) spreadEphemeral(by submitter, uri mimi.URI, req *mimi.SubmitMessageRequest) error {
	r, err := n.hostedRoom(uri)
	if err != nil {
		return err
	}
	peers, err := r.mayPass(req)
	if err != nil {
		return err
	}
	fanout := codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: req.Message})
	n.listeners.ephemeral(uri, by.client, fanout)
	for peer := range peers {
		n.queueEphemeral(peer, ephemeral{uri, fanout})
	}
	return nil
}

// mayPass refuses what isn't of a participant, of the room's group and of its current epoch, and returns the other
// providers that take part.
func (r *room) mayPass(req *mimi.SubmitMessageRequest) (map[string]struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.usable(); err != nil {
		return nil, err
	}
	who, err := r.who()
	if err != nil {
		return nil, err
	}
	if !who.role(req.Sender).Active() {
		return nil, refuse("notAllowed", "%s isn't a participant", req.Sender)
	}
	m := req.Message.Private
	if string(m.GroupID) != string(r.group.GroupID()) || m.Epoch != r.group.Epoch() {
		return nil, refuse("notAllowed", "a message of another group or epoch")
	}
	return who.peers, nil
}

// queueEphemeral has a message sent to a peer, unless too many wait.
func (n *Node) queueEphemeral(peer string, e ephemeral) {
	es := &n.ephemerals
	es.mu.Lock()
	defer es.mu.Unlock()
	q, working := es.queues[peer]
	if len(q) >= maxPeerWaiting {
		return
	}
	if es.queues == nil {
		es.queues = make(map[string][]ephemeral)
	}
	es.queues[peer] = append(q, e)
	if !working && !n.background.Go(func() { n.sendEphemerals(peer) }) {
		delete(es.queues, peer)
	}
}

// sendEphemerals sends what waits for a peer, until nothing does. What waits behind a failure is lost too: it would come
// late.
func (n *Node) sendEphemerals(peer string) {
	es := &n.ephemerals
	for {
		es.mu.Lock()
		list := slices.Clone(es.queues[peer])
		if len(list) == 0 {
			delete(es.queues, peer)
			es.mu.Unlock()
			return
		}
		es.queues[peer] = []ephemeral{}
		es.mu.Unlock()
		for _, e := range list {
			ctx, cancel := context.WithTimeout(n.ctx, ephemeralTimeout)
			err := n.federation.Ephemeral(ctx, peer, e.room, e.fanout)
			cancel()
			if err != nil {
				n.log.Debug("ephemeral messages are lost", "peer", peer, "err", err)
				break
			}
		}
	}
}

// hearEphemeral takes a message of a room's hub to the own clients in the room.
func (n *Node) hearEphemeral(from string, uri mimi.URI, body []byte) error {
	if uri.Domain() != from {
		return refuse("notAllowed", "%s isn't the hub of %s", from, uri)
	}
	f := new(mimi.FanoutMessage)
	if err := decode(body, f); err != nil {
		return err
	}
	if err := checkFanout(uri, f); err != nil {
		return err
	}
	if f.Message.Private == nil || string(f.Message.Private.AuthenticatedData) != mimi.EphemeralAAD {
		return refuse("malformed", "the message isn't an ephemeral one")
	}
	if r, err := n.openRoom(uri); err != nil {
		return err
	} else if r == nil {
		return refuse("notFound", "no client of %s is in %s", n.cfg.Domain, uri)
	}
	n.listeners.ephemeral(uri, "", body)
	return nil
}

// ephemeral has the streams of a room pass a message on, but for those of the client that it is from.
func (ls *listeners) ephemeral(room, from mimi.URI, fanout []byte) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byRoom[room] {
		if l.client != from {
			l.tell(func(n *news) {
				if len(n.ephemeral) < maxWaiting {
					n.ephemeral = append(n.ephemeral, ephemeral{room, fanout})
				}
			})
		}
	}
}

// sendEphemerals sends those of rooms that the client is a member of.
func (st *stream) sendEphemerals(list []ephemeral) error {
	for _, e := range list {
		if c := st.cursors[e.room]; c == nil || c.end != 0 {
			continue
		}
		ev := &api.Event{Event: &api.Event_Ephemeral{Ephemeral: &api.Ephemeral{Room: string(e.room), Fanout: e.fanout}}}
		if err := st.add(ev, len(e.fanout)); err != nil {
			return err
		}
	}
	return nil
}
