package node

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// submitter is who brings something to the hub: a client of this node, or a peer on behalf of one of its own.
type submitter struct {
	domain       string
	user, client mimi.URI // empty for a peer
	generation   *uint32  // of the application message; nil if the client doesn't say, and for a peer
}

// maxHandshake is the largest size in bytes of a commit, or of proposals that come together. What the hub makes of them
// must pass to every follower (federation.MaxNotify) and client: what a follower refused, its clients would never get.
const maxHandshake = 16 << 20

// hubSender is the index of the hub's own entry in the external_senders of every room that it hosts.
const hubSender = 0

// CreateRoom makes this node the hub of a room whose group the client has just created, with itself as only member and
// administrator.
func (n *Node) createRoom(by submitter, uri mimi.URI, info *mls.GroupInfo, tree *mls.RatchetTree) error {
	if uri.Kind() != mimi.KindRoom || uri.Domain() != n.cfg.Domain {
		return refuse("wrongProvider", "%s isn't a room of %s", uri, n.cfg.Domain)
	}
	if err := n.disk.grow(); err != nil {
		return err
	}
	var b store.Batch
	group, err := mls.NewPublicGroup(n.publicConfig(), b.Prefixed(key(prefixGroup, uri)), info, tree)
	if err != nil {
		return refuse("malformed", "the group is invalid: %v", err)
	}
	if err := n.checkNewRoom(by, uri, group); err != nil {
		return err
	}
	roomKey := string(roomKey(uri))
	b.Set([]byte(roomKey), codec.Marshal(roomRecord{hosted: true}))
	setMember(&b, by.client, by.user, uri, 0)
	b.Set(renewedKey(uri, 0), be64(n.uptime.seconds()))
	b.Set(key(prefixCreated, by.user, []byte(uri)), nil)
	changes := make(map[string][]byte, b.Len())
	b.Changes(func(k, v []byte) { changes[string(k)] = v })
	have, err := n.store.Get([]byte(roomKey))
	if err == nil && have == nil {
		err = n.created.add(n.store, by.user, n.cfg.Limits.Rooms)
	}
	if err != nil {
		return err
	}
	ok, err := n.store.Commit(changes, map[string][]byte{roomKey: nil})
	if err != nil || !ok {
		n.created.recount(by.user)
	}
	if err != nil {
		return fmt.Errorf("storing a new room: %w", err)
	}
	if !ok {
		// The same request again, after an answer that was lost, is answered alike.
		r, err := n.hostedRoom(uri)
		if err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.group.Epoch() == 0 && bytes.Equal(codec.Marshal(r.group.GroupInfo()), codec.Marshal(info)) {
			return nil
		}
		return refuse("alreadyExists", "there is a room %s", uri)
	}
	n.listeners.joined(by.client, uri)
	n.log.Info("room created", "room", uri, "by", by.user)
	return nil
}

// checkNewRoom checks what the hub asks of every group of a room from its beginning.
func (n *Node) checkNewRoom(by submitter, uri mimi.URI, group *mls.PublicGroup) error {
	if !slices.Contains(n.cfg.Suites, group.Suite()) {
		return refuse("notAllowed", "this node doesn't host rooms of cipher suite %d", group.Suite())
	}
	if string(group.GroupID()) != string(uri.Group()) {
		return refuse("malformed", "the group's identifier is %q, want %s", group.GroupID(), uri.Group())
	}
	if group.Epoch() != 0 {
		return refuse("malformed", "a new room begins in epoch 0, not %d", group.Epoch())
	}
	if _, ok := group.GroupInfo().ExternalPub(); !ok {
		return refuse("malformed", "the GroupInfo has no external_pub, so that new devices couldn't join")
	}
	members := slices.Collect(group.Members())
	if len(members) != 1 {
		return refuse("notAllowed", "a new room has its creator as only member, not %d", len(members))
	}
	user, client, err := n.verifier.IdentityOf(members[0].Leaf.Credential)
	if err != nil {
		return refuse("malformed", "the creator's credential: %v", err)
	}
	if user != by.user || client != by.client {
		return refuse("notAllowed", "the group's member is %s, the request comes from %s", client, by.client)
	}
	list, err := participantsOf(group.Dictionary())
	if err != nil {
		return refuse("malformed", "%v", err)
	}
	if len(list) != 1 || list[0].User != user {
		return refuse("notAllowed", "a new room has its creator as only participant")
	}
	if err := mimi.CheckNewRoom(group.Dictionary(), uri); err != nil {
		return notAllowed(err)
	}
	if err := checkComponents(group.Dictionary()); err != nil {
		return err
	}
	if err := n.checkExternalSender(group); err != nil {
		return err
	}
	if err := n.checkFranking(group); err != nil {
		return err
	}
	data, ok := group.Extension(mls.ExtensionRequiredCapabilities)
	if !ok {
		return refuse("malformed", "the group has no required_capabilities")
	}
	var required mls.RequiredCapabilities
	if err := decode(data, &required); err != nil {
		return err
	}
	if !slices.Contains(required.Extensions, mls.ExtensionAppDataDictionary) || !slices.Contains(required.Proposals, mls.ProposalAppDataUpdate) {
		return refuse("malformed", "required_capabilities lack app_data_dictionary or app_data_update")
	}
	return nil
}

// checkComponents makes sure that whoever joins must understand the room's state.
func checkComponents(d mls.AppDataDictionary) error {
	data, ok := d.Get(mls.ComponentAppComponents)
	if !ok {
		return refuse("malformed", "the app_data_dictionary has no app_components")
	}
	var required mls.ComponentsList
	if err := codec.Unmarshal(data, &required); err != nil {
		return err
	}
	for _, id := range mimi.RoomComponents() {
		if !slices.Contains(required, id) {
			return refuse("malformed", "app_components lacks component %d", id)
		}
	}
	return nil
}

// checkExternalSender makes sure that this hub can propose removals.
func (n *Node) checkExternalSender(group *mls.PublicGroup) error {
	data, ok := group.Extension(mls.ExtensionExternalSenders)
	if !ok {
		return refuse("malformed", "the group has no external_senders")
	}
	var senders mls.ExternalSenders
	if err := decode(data, &senders); err != nil {
		return err
	}
	_, own, err := n.keys.hub(group.Suite())
	if err != nil {
		return err
	}
	if len(senders) == 0 || !bytes.Equal(senders[hubSender].SignatureKey, own.SignatureKey) || !senders[hubSender].Credential.Equal(own.Credential) {
		return refuse("malformed", "external_senders doesn't begin with this hub")
	}
	return nil
}

// messageHash names a submission for idempotency.
func messageHash(m *mls.MLSMessage) []byte {
	h := sha256.Sum256(codec.Marshal(m))
	return h[:]
}

// answered returns the first answer that a message got, nil if it is new.
func (n *Node) answered(r *room, hash []byte) (*answerRecord, error) {
	k := key(prefixAnswer, r.uri, hash)
	if has, err := n.store.Has(k); err != nil || !has {
		return nil, err // as for nearly all messages
	}
	b, err := n.store.Get(k)
	if err != nil || b == nil {
		return nil, err
	}
	rec := new(answerRecord)
	return rec, decodeRecord(b, rec, "answer")
}

// update orders a handshake: a commit or proposals that are valid, allowed, and of the current epoch. The same message
// again gets its first answer again.
func (n *Node) update(by submitter, uri mimi.URI, body []byte) (*mimi.UpdateRoomResponse, uint64, error) {
	r, err := n.hostedRoom(uri)
	if err != nil {
		return nil, 0, err
	}
	var req mimi.UpdateRequest
	if err := decode(body, &req); err != nil {
		return nil, 0, err
	}
	m := req.Bundle.Message
	if m == nil || m.Public == nil {
		return nil, 0, refuse("malformed", "a handshake is a PublicMessage here")
	}
	size := len(codec.Marshal(m))
	for _, p := range req.Bundle.MoreProposals {
		size += len(codec.Marshal(p))
	}
	if size > maxHandshake {
		return nil, 0, refuse("tooLarge", "a handshake of %d bytes, at most %d", size, maxHandshake)
	}
	hash := messageHash(m)
	var resp *mimi.UpdateRoomResponse
	var seq uint64
	err = n.run(r, func() (*change, error) {
		// The answer comes first: whoever took part then may not any more. It tells nothing that isn't in the log
		// with the message.
		if rec, err := n.answered(r, hash); err != nil {
			return nil, err
		} else if rec != nil {
			resp, seq = new(mimi.UpdateRoomResponse), rec.seq
			return nil, decodeRecord(rec.response, resp, "answer")
		}
		if err := n.disk.grow(); err != nil {
			return nil, err
		}
		if err := r.takesPart(by); err != nil && n.mayJoin(by, r, m.Public) != nil {
			return nil, err
		}
		if m.Public.Content.Epoch != r.group.Epoch() {
			n.metrics.refused.WithLabelValues("update", "wrongEpoch").Inc()
			n.log.Debug("handshake of another epoch", "room", uri, "from", by.domain, "epoch", m.Public.Content.Epoch, "current", r.group.Epoch())
			resp = &mimi.UpdateRoomResponse{
				Code: mimi.UpdateWrongEpoch, Description: "the room is in another epoch", CurrentEpoch: r.group.Epoch(),
			}
			return nil, nil
		}
		var c *change
		var err error
		if m.Public.Content.ContentType == mls.ContentCommit {
			c, seq, err = n.orderCommit(by, r, &req.Bundle)
		} else {
			c, seq, err = n.orderProposals(by, r, &req.Bundle)
		}
		if err != nil {
			return nil, err
		}
		resp = &mimi.UpdateRoomResponse{Code: mimi.UpdateSuccess, AcceptedTimestamp: now()}
		c.answer(hash, seq, resp.AcceptedTimestamp, resp)
		return c, nil
	})
	if refusal, ok := errors.AsType[*refusal](err); ok && refusal.code == "notAllowed" {
		n.metrics.refused.WithLabelValues("update", refusal.code).Inc()
		n.log.Info("handshake refused", "room", uri, "from", by.domain, "client", by.client, "reason", refusal.detail)
		return &mimi.UpdateRoomResponse{Code: mimi.UpdateNotAllowed, Description: clip(refusal.detail)}, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	if seq != 0 {
		// An answer that was found may not have been on disk yet.
		if err := n.settle(r, seq); err != nil {
			return nil, 0, err
		}
	}
	return resp, seq, nil
}

// takesPart refuses who has nothing to do with the room: users that aren't participants, and providers without users or
// clients in it. They learn nothing of it, and cost it no check of a signature. r.mu is held.
func (r *room) takesPart(by submitter) error {
	who, err := r.who()
	if err != nil {
		return err
	}
	if by.user != "" {
		if !who.role(by.user).Active() {
			return refuse("notAllowed", "%s isn't a participant", by.user)
		}
		return nil
	}
	if _, ok := who.peers[by.domain]; !ok {
		return refuse("notAllowed", "%s doesn't take part in the room", by.domain)
	}
	return nil
}

// clip bounds a description for a peer.
func clip(s string) string { return s[:min(len(s), 500)] }

// orderCommit checks a commit and fills the change that makes it the room's next epoch; r.mu is held. Nothing of the
// group has changed if it fails.
func (n *Node) orderCommit(by submitter, r *room, bundle *mimi.HandshakeBundle) (*change, uint64, error) {
	staged, err := r.group.CheckCommit(bundle.Message.Public)
	if err != nil {
		return nil, 0, notAllowed(err)
	}
	info := staged.Info()
	if err := n.checkCommitter(r, info); err != nil {
		return nil, 0, err
	}
	if err := n.checkLinks(r, info.Proposals); err != nil {
		return nil, 0, err
	}
	if err := checkLink(info); err != nil {
		return nil, 0, err
	}
	gi, err := bundle.GroupInfo.Of(staged)
	if err != nil {
		return nil, 0, refuse("malformed", "%v", err)
	}
	if err := staged.CheckGroupInfo(gi); err != nil {
		return nil, 0, notAllowed(err)
	}
	if _, ok := gi.ExternalPub(); !ok {
		return nil, 0, refuse("notAllowed", "the GroupInfo has no external_pub, so that new devices couldn't join")
	}
	if err := bundle.RatchetTree.Check(staged); err != nil {
		return nil, 0, notAllowed(err)
	}
	if err := checkWelcome(info, bundle.Welcome); err != nil {
		return nil, 0, err
	}
	after, err := dictionaryOf(info.After)
	if err != nil {
		return nil, 0, err
	}
	list, err := participantsOf(after)
	if err != nil {
		return nil, 0, notAllowed(err)
	}
	before, err := r.who()
	if err != nil {
		return nil, 0, err
	}
	if err := n.checkPending(r, info, list); err != nil {
		return nil, 0, err
	}
	if err := n.checkNewParticipants(before.list, list); err != nil {
		return nil, 0, err
	}
	if err := n.checkSize(before, info, list); err != nil {
		return nil, 0, err
	}

	// What an external commit voids that is for all to commit, the hub proposes anew.
	var leaving map[mimi.URI]bool
	if info.External {
		if leaving, err = r.leavers(); err != nil {
			return nil, 0, err
		}
	}

	// From here on nothing may fail: the group moves on.
	c := n.begin(r, maps.Clone(before.peers))
	if err := r.group.Apply(c.batch.Prefixed(key(prefixGroup, r.uri)), staged, gi); err != nil {
		return nil, 0, err
	}
	who, err := r.who()
	if err != nil {
		r.broken = err
		return nil, 0, err
	}
	maps.Copy(c.peers, who.peers) // who is removed gets the commit that does it, and nothing after
	c.record.pending = nil
	c.noteRenewed(info)
	time := now()
	seq := c.record.last + 1
	c.welcome(bundle.Welcome, seq, time, r.group.Tree())
	made, err := c.propose(leaving, info.External)
	if err != nil {
		n.log.Error("proposing removals", "room", r.uri, "err", err)
		n.kickRemovals()
	}
	fanout := &mimi.FanoutMessage{Timestamp: time, Message: bundle.Message}
	if info.External {
		fanout.ExternalProposals, made = made, nil
	}
	c.log(codec.Marshal(fanout))
	if len(fanout.ExternalProposals) > 0 {
		c.pend(seq)
	}
	n.noteMembers(c, info, before.list, who.list, seq)
	c.peers = who.peers
	c.logProposals(made)
	n.metrics.accepted.WithLabelValues("commit").Inc()
	n.log.Debug("commit ordered", "room", r.uri, "seq", seq, "epoch", info.Epoch, "from", by.domain)
	return c, seq, nil
}

// checkNewParticipants refuses users of providers that this node hasn't approved. The hub couldn't send them anything,
// and everything would be queued for each such provider for ever.
func (n *Node) checkNewParticipants(before, after mimi.ParticipantList) error {
	known := make(map[string]bool)
	for _, p := range before {
		known[p.User.Domain()] = true
	}
	for _, p := range after {
		domain := p.User.Domain()
		if domain == n.cfg.Domain || known[domain] {
			continue
		}
		if _, ok := n.trust.Peer(domain); !ok {
			return refuse("notAllowed", "%s hasn't approved %s", n.cfg.Domain, domain)
		}
		known[domain] = true
	}
	return nil
}

// checkSize refuses a commit that makes a room larger than it may be.
func (n *Node) checkSize(before *roster, info *mls.StagedInfo, after mimi.ParticipantList) error {
	most := n.cfg.Limits.Members
	if members := before.members + len(info.Added) - len(info.Removed); members > most && len(info.Added) > 0 {
		return refuse("notAllowed", "the room would have %d clients, at most %d", members, most)
	}
	if len(after) > most && len(after) > len(before.list) {
		return refuse("notAllowed", "the room would have %d users, at most %d", len(after), most)
	}
	return nil
}

// notAllowed turns what the checks of a handshake find into the refusal of it.
func notAllowed(err error) error { return refuse("notAllowed", "%v", err) }

func dictionaryOf(context mls.GroupContext) (mls.AppDataDictionary, error) {
	data, ok := context.Extensions.Find(mls.ExtensionAppDataDictionary)
	if !ok {
		return nil, refuse("notAllowed", "the group has no app_data_dictionary")
	}
	var d mls.AppDataDictionary
	err := decode(data, &d)
	return d, err
}

// checkCommitter refuses a commit whose sender is no longer trusted: its leaf in the tree may have been valid when it
// came. A leaf that the commit itself brings has been judged with the commit.
func (n *Node) checkCommitter(r *room, info *mls.StagedInfo) error {
	if info.External {
		return nil
	}
	m, ok := r.group.Member(info.Committer)
	if !ok {
		return refuse("notAllowed", "the committer isn't a member")
	}
	err := n.judge(r, m.Leaf)
	if err == nil || (errors.Is(err, authority.ErrExpired) && info.PathLeaf != nil) {
		return nil
	}
	return refuse("notAllowed", "the committer's credential: %v", err)
}

// judge verifies the certificate of a leaf by the trust of now.
func (n *Node) judge(r *room, leaf *mls.LeafNode) error {
	_, err := n.verifier.VerifyKey(leaf.Credential.Certificates, r.group.Suite(), leaf.SignatureKey, authority.PurposeClient)
	return err
}

// checkWelcome makes sure that those whom a commit adds, and nobody else, can join with the Welcome.
func checkWelcome(info *mls.StagedInfo, w *mls.Welcome) error {
	var added [][]byte
	for _, p := range info.Proposals {
		if p.Proposal.Add != nil {
			added = append(added, p.Proposal.Add.KeyPackage.Ref())
		}
	}
	if len(added) == 0 {
		if w != nil {
			return refuse("notAllowed", "a Welcome, and nobody is added")
		}
		return nil
	}
	if w == nil {
		return refuse("notAllowed", "the commit adds members and has no Welcome")
	}
	refs := w.KeyPackageRefs()
	if w.CipherSuite != info.After.CipherSuite || len(refs) != len(added) {
		return refuse("notAllowed", "the Welcome is not for those whom the commit adds")
	}
	for _, ref := range added {
		if !w.Find(ref) {
			return refuse("notAllowed", "the Welcome leaves out a new member")
		}
	}
	return nil
}

// welcome routes a Welcome: to the queues of local clients, and to the providers of the others, by the KeyPackages that
// were claimed through this hub.
func (c *change) welcome(w *mls.Welcome, seq, time uint64, tree *mls.RatchetTree) {
	if w == nil {
		return
	}
	fanout := codec.Marshal(&mimi.FanoutMessage{
		Timestamp: time, Message: mls.NewMLSMessage(w), RatchetTree: mimi.FullRatchetTree(tree),
	})
	rest := fanoutKey(seq, fanout)
	c.batch.Set(key(prefixFanout, c.r.uri, rest), fanout)
	sent := make(map[string]bool)
	for _, ref := range w.KeyPackageRefs() {
		to, err := c.n.refOwner(ref)
		switch {
		case err != nil || to == nil:
			// The committer got the KeyPackage elsewhere; its client can join by an external commit.
			c.n.log.Warn("Welcome for an unknown KeyPackage", "room", c.r.uri, "err", err)
		case to.client != "":
			c.queueWelcome(to, seq, rest)
		case !sent[to.provider]:
			sent[to.provider] = true
			c.send(to.provider, outboxWelcome(c.r.uri, rest))
		}
	}
}

// noteMembers notes what a commit means for this provider's own users and clients.
func (n *Node) noteMembers(c *change, info *mls.StagedInfo, before, after mimi.ParticipantList, seq uint64) {
	for _, m := range info.Removed {
		_, client, err := n.verifier.IdentityOf(m.Leaf.Credential)
		if err != nil || client.Domain() != n.cfg.Domain {
			continue
		}
		if _, again := c.welcomed[client]; again {
			continue // the commit takes its old leaf out and adds it anew
		}
		rec, err := n.member(client, c.r.uri)
		if err != nil || rec == nil {
			continue
		}
		rec.end = seq
		c.batch.Set(key(prefixMember, client, []byte(c.r.uri)), codec.Marshal(rec))
		c.members[client] = struct{}{}
	}
	if info.External {
		if user, client, err := n.verifier.IdentityOf(info.PathLeaf.Credential); err == nil && client.Domain() == n.cfg.Domain {
			// The commit itself is for the one who joins too: it has the hub's proposals with it.
			setMember(&c.batch, client, user, c.r.uri, seq-1)
			c.members[client], c.joined[client] = struct{}{}, struct{}{}
		}
	}
	for _, p := range before {
		if _, _, ok := after.Find(p.User); !ok && p.User.Domain() == n.cfg.Domain {
			c.batch.Delete(key(prefixUserRoom, p.User, []byte(c.r.uri)))
		}
	}
	for _, p := range after {
		if _, _, ok := before.Find(p.User); !ok && p.User.Domain() == n.cfg.Domain {
			c.batch.Set(key(prefixUserRoom, p.User, []byte(c.r.uri)), nil)
		}
	}
}

// orderProposals checks a list of proposals and fills the change that makes them pending; r.mu is held.
func (n *Node) orderProposals(by submitter, r *room, bundle *mimi.HandshakeBundle) (*change, uint64, error) {
	who, err := r.who()
	if err != nil {
		return nil, 0, err
	}
	var staged []*mls.StagedProposal
	for _, m := range append([]*mls.MLSMessage{bundle.Message}, bundle.MoreProposals...) {
		if m.Public == nil || m.Public.Content.ContentType != mls.ContentProposal {
			return nil, 0, refuse("malformed", "not a proposal in a PublicMessage")
		}
		if m.Public.Content.Sender.Type != mls.SenderMember {
			return nil, 0, refuse("notAllowed", "proposals come from members here")
		}
		s, err := r.group.CheckProposal(m.Public)
		if err != nil {
			return nil, 0, notAllowed(err)
		}
		if err := n.allowProposal(r, s.Proposal(), staged); err != nil {
			return nil, 0, err
		}
		staged = append(staged, s)
	}
	c := n.begin(r, who.peers)
	for _, s := range staged {
		if err := r.group.ApplyProposal(c.batch.Prefixed(key(prefixGroup, r.uri)), s); err != nil {
			r.broken = err // the group in memory may have some of them
			return nil, 0, err
		}
	}
	seq := c.log(codec.Marshal(&mimi.FanoutMessage{Timestamp: now(), Message: bundle.Message, MoreProposals: bundle.MoreProposals}))
	c.pend(seq)
	n.metrics.accepted.WithLabelValues("proposal").Inc()
	n.log.Debug("proposals ordered", "room", r.uri, "seq", seq, "from", by.domain)
	return c, seq, nil
}

// allowProposal refuses proposals by reference which no commit could carry under the room's policy, since pending
// proposals are for everyone to commit.
func (n *Node) allowProposal(r *room, p mls.PendingProposal, before []*mls.StagedProposal) error {
	m, ok := r.group.Member(p.Sender.Leaf)
	if !ok {
		return refuse("notAllowed", "the sender isn't a member")
	}
	if err := n.judge(r, m.Leaf); err != nil {
		return refuse("notAllowed", "the sender's credential: %v", err)
	}
	var next []mls.PendingProposal
	for _, s := range before {
		next = append(next, s.Proposal())
	}
	if err := mimi.CheckPending(n.verifier.IdentityOf, r.group, append(next, p)...); err != nil {
		return notAllowed(err)
	}
	return n.checkLinks(r, []mls.PendingProposal{p})
}
