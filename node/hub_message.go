package node

import (
	"crypto/rand"
	"errors"
	"slices"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// submitMessage orders an application message of the current epoch. The same message again gets its first answer
// again. Who of the room's members wrote it the hub can't see; it checks that the user who is said to send it takes
// part, and belongs to the provider that brings it.
func (n *Node) submitMessage(by submitter, uri mimi.URI, body []byte) (*mimi.SubmitMessageResponse, uint64, error) {
	r, err := n.hostedRoom(uri)
	if err != nil {
		return nil, 0, err
	}
	if len(body) > federation.MaxSubmitMessage { // for own clients as for peers
		return nil, 0, refuse("tooLarge", "a message of %d bytes, at most %d", len(body), federation.MaxSubmitMessage)
	}
	var req mimi.SubmitMessageRequest
	if err := decode(body, &req); err != nil {
		return nil, 0, err
	}
	m := req.Message
	if m == nil || m.Private == nil || m.Private.ContentType != mls.ContentApplication {
		return nil, 0, refuse("malformed", "an application message is a PrivateMessage")
	}
	if req.Sender.Domain() != by.domain || (by.user != "" && req.Sender != by.user) {
		return n.refuseMessage(by, uri, refuse("notAllowed", "%s doesn't speak for %s", by.name(), req.Sender))
	}
	hash := messageHash(m)
	mark := markOf(by, m.Private, hash)
	var resp *mimi.SubmitMessageResponse
	var seq uint64
	ordered := false
	var full error
	err = n.run(r, func() (*change, error) {
		if rec, err := n.answered(r, hash); err != nil {
			return nil, err
		} else if rec != nil {
			resp, seq = new(mimi.SubmitMessageResponse), rec.seq
			return nil, decodeRecord(rec.response, resp, "answer")
		}
		if full = n.disk.grow(); full != nil {
			return nil, full
		}
		who, err := r.who()
		if err != nil {
			return nil, err
		}
		if role := who.role(req.Sender); !role.Speaks() {
			return nil, refuse("notAllowed", "%s isn't a participant who may send messages", req.Sender)
		}
		if string(m.Private.GroupID) != string(r.group.GroupID()) {
			return nil, refuse("notAllowed", "a message of another group")
		}
		if m.Private.Epoch > r.group.Epoch() {
			return nil, refuse("notAllowed", "epoch %d, the room is in %d", m.Private.Epoch, r.group.Epoch())
		}
		if m.Private.Epoch < r.group.Epoch() {
			n.metrics.refused.WithLabelValues("submitMessage", "epochTooOld").Inc()
			n.log.Debug("message of an old epoch", "room", r.uri, "from", by.domain, "epoch", m.Private.Epoch, "current", r.group.Epoch())
			resp = &mimi.SubmitMessageResponse{Code: mimi.SubmitEpochTooOld, CurrentEpoch: r.group.Epoch()}
			return nil, nil
		}
		time := now()
		frank, err := n.frank(r, who, m.Private, mimi.ServerFrankingContext{Sender: req.Sender, Room: r.uri, AcceptedTimestamp: time})
		if err != nil {
			return nil, err
		}
		c := n.begin(r, who.peers)
		c.mark, ordered = mark, true
		seq = c.log(codec.Marshal(&mimi.FanoutMessage{Timestamp: time, Message: m, Frank: frank}))
		resp = &mimi.SubmitMessageResponse{Code: mimi.SubmitAccepted, AcceptedTimestamp: time, Frank: frank}
		c.answer(hash, seq, time, resp)
		n.metrics.accepted.WithLabelValues("message").Inc()
		return c, nil
	})
	if !ordered && full == nil { // its key is used all the same
		if err := n.note(mark); err != nil && !errors.Is(err, errKeyUsed) {
			return nil, 0, err
		}
	}
	if err != nil {
		return n.refuseMessage(by, uri, err)
	}
	if seq != 0 {
		if err := n.settle(r, seq); err != nil {
			return nil, 0, err
		}
	}
	return resp, seq, nil
}

// refuseMessage says notAllowed where that is what the error means, and passes other errors on.
func (n *Node) refuseMessage(by submitter, uri mimi.URI, err error) (*mimi.SubmitMessageResponse, uint64, error) {
	r := reason(err)
	if r == nil || r.code != "notAllowed" {
		return nil, 0, err
	}
	n.metrics.refused.WithLabelValues("submitMessage", r.code).Inc()
	n.log.Info("message refused", "room", uri, "from", by.domain, "client", by.client, "reason", r.detail)
	return &mimi.SubmitMessageResponse{Code: mimi.SubmitNotAllowed}, 0, nil
}

func (s submitter) name() string {
	if s.client != "" {
		return string(s.client)
	}
	return s.domain
}

// groupInfo gives a client what it needs to join by an external commit: one of a participant, or of who may become one.
func (n *Node) groupInfo(uri mimi.URI, req *mimi.GroupInfoRequest) (*mimi.GroupInfoResponse, error) {
	r, err := n.hostedRoom(uri)
	if err != nil {
		if rf := reason(err); rf != nil && rf.code == "notFound" {
			return &mimi.GroupInfoResponse{Room: uri, Code: mimi.GroupInfoNoSuchRoom}, nil
		}
		return nil, err
	}
	if !req.CipherSuite.Supported() {
		return nil, refuse("malformed", "cipher suite %d is not supported", req.CipherSuite)
	}
	if err := req.Verify(); err != nil {
		return nil, err
	}
	id, err := n.verifier.VerifyKey(req.Credential.Certificates, req.CipherSuite, req.SignatureKey, authority.PurposeClient)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	if err := r.usable(); err != nil {
		r.mu.Unlock()
		return nil, err
	}
	if err := mimi.MayAsk(r.group.Dictionary(), uri, id.User, id.Client, req.JoiningCode, unixNow()); err != nil {
		r.mu.Unlock()
		n.metrics.refused.WithLabelValues("groupInfo", "notAuthorized").Inc()
		n.log.Info("group info refused", "room", uri, "client", id.Client, "reason", err)
		return &mimi.GroupInfoResponse{Room: uri, Code: mimi.GroupInfoNotAuthorized}, nil
	}
	if r.group.GroupInfo() == nil {
		r.mu.Unlock()
		return nil, refuse("unavailable", "the hub was restored and has no GroupInfo before a member has committed")
	}
	last := r.record.last
	pending := slices.Clone(r.record.pending)
	plain := &mimi.GroupInfoRatchetTree{GroupInfo: r.group.GroupInfo(), RatchetTree: mimi.FullRatchetTree(r.group.Tree())}
	r.mu.Unlock()

	if err := n.settle(r, last); err != nil {
		return nil, err
	}
	for _, seq := range pending {
		f, err := n.entry(uri, seq)
		if err != nil {
			return nil, err
		}
		for _, m := range proposalsOf(f) {
			plain.Pending = append(plain.Pending, mimi.PendingProposal{Proposal: m, AcceptedTime: f.Timestamp})
		}
	}
	signer, sender, err := n.keys.hub(req.CipherSuite)
	if err != nil {
		return nil, err
	}
	return mimi.SealGroupInfo(rand.Reader, uri, req, plain, signer, sender)
}

// entry reads an entry of a room's log.
func (n *Node) entry(uri mimi.URI, seq uint64) (*mimi.FanoutMessage, error) {
	b, err := n.store.Get(key(prefixLog, uri, be64(seq)))
	if err != nil {
		return nil, err
	}
	f := new(mimi.FanoutMessage)
	return f, decodeRecord(b, f, "log entry")
}
