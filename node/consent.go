package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// Consent (draft-ietf-mimi-protocol-06, Sections 5.7 and 8): each user's provider keeps what the user was asked and has
// decided, and what the user has asked of others and knows of their decisions. The former is what key material is given
// out by; the latter is for the user to see.
//
// Where the draft leaves a choice: a decision about any room replaces all that the user has decided about the requester;
// one about a room stands beside it and goes first there. A revocation is told to the requester's provider only if it
// takes back a grant, so a denied request and one that nobody has looked at are the same to the requester. Who was denied
// can't ask again. Requests beyond the bounds below are ignored, and the requester's provider isn't told. Consent
// extensions are ignored.

// What is kept at most. A peer that honours its own users' bounds doesn't reach those for peers.
const (
	maxConsents        = 10_000 // records of a user, on either side
	maxOpenRequests    = 256    // that wait for one user's decision
	maxOpenOfProvider  = 64     // of those, by users of one provider
	maxOpenOfRequester = 8      // of those, by one requester
	maxTold            = 1_000  // records of a user that users of one peer have made by deciding without being asked
	maxQueuedConsents  = 10_000 // entries that wait for one peer
	maxGranted         = 64     // KeyPackages in a grant
)

// errIgnored says that an entry is acknowledged and nothing is done about it.
var errIgnored = errors.New("ignored")

// consentKey is the key of a consentRecord of owner's with another user. room may be empty.
func consentKey(prefix string, owner, other, room mimi.URI) []byte {
	return key(prefix, owner, key("", other, []byte(room)))
}

// consentChange is one step in the book of consents. The lock of the book is held from reading to applying.
type consentChange struct {
	n     *Node
	batch store.Batch
	peers map[string]struct{}            // with something new in the outbox
	told  map[mimi.URI]map[string]string // users, with the records that they are to see, by key
}

// changeConsents does one step; it is durable when changeConsents returns nil.
func (n *Node) changeConsents(fill func(*consentChange) error) error {
	c := &consentChange{n: n, peers: make(map[string]struct{}), told: make(map[mimi.URI]map[string]string)}
	n.consentMu.Lock()
	err := fill(c)
	var wait func() error
	if err == nil {
		wait, err = n.store.Apply(&c.batch)
	}
	n.consentMu.Unlock()
	if err == nil {
		err = wait()
	}
	if err != nil {
		return err
	}
	for peer := range c.peers {
		n.consentOut.Wake(peer)
	}
	for user, keys := range c.told {
		n.listeners.consent(user, keys)
	}
	return nil
}

// growConsent refuses what needs space that isn't there. What takes consent back is small, and mustn't wait.
func (n *Node) growConsent(op mimi.ConsentOperation) error {
	if op == mimi.ConsentCancel || op == mimi.ConsentRevoke {
		return nil
	}
	return n.disk.grow()
}

// consentRecord returns a record, an empty one if there is none.
func (n *Node) consentRecord(prefix string, owner, other, room mimi.URI) (rec consentRecord, err error) {
	b, err := n.store.Get(consentKey(prefix, owner, other, room))
	if err == nil && b != nil {
		err = decodeRecord(b, &rec, "consent")
	}
	return rec, err
}

// put writes a record, or deletes an empty one. The owner is told if that changes what there was.
func (c *consentChange) put(prefix string, owner, other, room mimi.URI, before, after consentRecord) {
	k := consentKey(prefix, owner, other, room)
	if after == (consentRecord{}) {
		c.batch.Delete(k)
	} else {
		c.batch.Set(k, codec.Marshal(after))
	}
	if before != after {
		if c.told[owner] == nil {
			c.told[owner] = make(map[string]string)
		}
		c.told[owner][string(k)] = prefix
	}
}

// decide notes a decision. One about any room replaces those about rooms.
func (c *consentChange) decide(prefix string, owner, other, room mimi.URI, decision mimi.ConsentOperation) error {
	before, err := c.n.consentRecord(prefix, owner, other, room)
	if err != nil {
		return err
	}
	after := consentRecord{decision: decision, decided: now()}
	if before.decision == decision && before.asked == 0 {
		after = before
	}
	if room == "" {
		pair := key(prefix, owner, key("", other))
		var bad error
		err := store.ScanPrefix(c.n.store, pair, func(k, v []byte) bool {
			var rec consentRecord
			if bad = decodeRecord(v, &rec, "consent"); bad == nil && len(k) > 0 {
				c.put(prefix, owner, other, mimi.URI(k), rec, consentRecord{})
			}
			return bad == nil
		})
		if err := errors.Join(err, bad); err != nil {
			return err
		}
	}
	c.put(prefix, owner, other, room, before, after)
	return nil
}

// send queues an entry for the provider of one of its users.
func (c *consentChange) send(to mimi.URI, e *mimi.ConsentEntry) error {
	peer := to.Domain()
	if c.n.consentOut.Depth(peer) >= maxQueuedConsents {
		return refuse("busy", "too much waits for %s", peer)
	}
	k, v := c.n.consentOut.Entry(peer, codec.Marshal(e))
	c.batch.Set(k, v)
	c.peers[peer] = struct{}{}
	return nil
}

// countConsents counts a user's records, and those that some function picks.
func (n *Node) countConsents(prefix string, owner mimi.URI, pick func(other, room mimi.URI, rec consentRecord)) (total int, err error) {
	var bad error
	err = store.ScanPrefix(n.store, key(prefix, owner), func(k, v []byte) bool {
		var rec consentRecord
		i := bytes.IndexByte(k, 0)
		if i < 0 {
			bad = fmt.Errorf("%w: key of a consent", errRecord)
			return false
		}
		if bad = decodeRecord(v, &rec, "consent"); bad == nil {
			total++
			pick(mimi.URI(k[:i]), mimi.URI(k[i+1:]), rec)
		}
		return bad == nil
	})
	return total, errors.Join(err, bad)
}

// asked takes a request for consent of a user of this node.
func (c *consentChange) asked(s mimi.ConsentScope) error {
	decision, err := c.n.decision(s.Requester, s.Target, s.Room)
	if err != nil {
		return err
	}
	switch decision {
	case mimi.ConsentRevoke:
		return errIgnored
	case mimi.ConsentGrant: // the requester's provider may have lost it
		if s.Requester.Domain() == c.n.cfg.Domain {
			return c.decide(prefixConsentOf, s.Requester, s.Target, s.Room, mimi.ConsentGrant)
		}
		return c.send(s.Requester, &mimi.ConsentEntry{Operation: mimi.ConsentGrant, Scope: s})
	}
	rec, err := c.n.consentRecord(prefixConsent, s.Target, s.Requester, s.Room)
	if err != nil {
		return err
	}
	before := rec
	if rec.asked == 0 {
		var open, ofProvider, ofRequester int
		total, err := c.n.countConsents(prefixConsent, s.Target, func(requester, _ mimi.URI, rec consentRecord) {
			if rec.asked == 0 {
				return
			}
			open++
			if requester.Domain() == s.Requester.Domain() {
				ofProvider++
			}
			if requester == s.Requester {
				ofRequester++
			}
		})
		if err != nil {
			return err
		}
		if total >= maxConsents || open >= maxOpenRequests || ofProvider >= maxOpenOfProvider || ofRequester >= maxOpenOfRequester {
			return errIgnored
		}
		rec.asked = now()
	}
	c.put(prefixConsent, s.Target, s.Requester, s.Room, before, rec)
	return nil
}

// cancelled takes a request for consent back.
func (c *consentChange) cancelled(prefix string, owner, other, room mimi.URI) error {
	rec, err := c.n.consentRecord(prefix, owner, other, room)
	if err != nil {
		return err
	}
	if rec.asked == 0 {
		return errIgnored
	}
	before := rec
	rec.asked = 0
	c.put(prefix, owner, other, room, before, rec)
	return nil
}

// decision is what a user of this node has decided about a requester and a room, 0 if nothing.
func (n *Node) decision(requester, target, room mimi.URI) (mimi.ConsentOperation, error) {
	for _, r := range slices.Compact([]mimi.URI{room, ""}) {
		rec, err := n.consentRecord(prefixConsent, target, requester, r)
		if err != nil || rec.decision != 0 {
			return rec.decision, err
		}
	}
	return 0, nil
}

// checkConsent says whether key material of a user of this node may be given to a requester, whose signature was
// checked: with KeyMaterialSuccess, or NoConsent or NoConsentForThisRoom. A user's decision stands before the provider's
// policy, and users of one provider need no consent of each other's that isn't taken back.
func (n *Node) checkConsent(requester, target, room mimi.URI) (mimi.KeyMaterialUserCode, error) {
	if requester == target {
		return mimi.KeyMaterialSuccess, nil
	}
	decision, err := n.decision(requester, target, room)
	if err != nil || decision == mimi.ConsentGrant {
		return mimi.KeyMaterialSuccess, err
	}
	if decision == 0 && (n.cfg.Consent == ConsentOpen || requester.Domain() == n.cfg.Domain) {
		return mimi.KeyMaterialSuccess, nil
	}
	// Not in this room, and perhaps in another: a general grant, or that of some room.
	code := mimi.NoConsent
	var bad error
	err = store.ScanPrefix(n.store, key(prefixConsent, target, key("", requester)), func(_, v []byte) bool {
		var rec consentRecord
		if bad = decodeRecord(v, &rec, "consent"); rec.decision == mimi.ConsentGrant {
			code = mimi.NoConsentForThisRoom
		}
		return bad == nil && code == mimi.NoConsent
	})
	return code, errors.Join(err, bad)
}

// consentAction does what a user of this node asks for, with the other side's provider to be told of it.
func (n *Node) consentAction(user mimi.URI, e *mimi.ConsentEntry, withKeyPackages bool) error {
	s := e.Scope
	asks := e.Operation == mimi.ConsentRequest || e.Operation == mimi.ConsentCancel
	self, other := s.Target, s.Requester
	if asks {
		self, other = s.Requester, s.Target
	}
	switch {
	case self != user:
		return refuse("notAllowed", "%s doesn't speak for %s", user, self)
	case other == user:
		return refuse("malformed", "nobody needs consent of his own")
	case len(e.KeyPackages) > 0 || len(e.Extensions) > 0:
		return refuse("malformed", "the node adds KeyPackages, and knows no extension")
	}
	if err := n.growConsent(e.Operation); err != nil {
		return err
	}
	local := other.Domain() == n.cfg.Domain
	if _, ok := n.trust.Peer(other.Domain()); !ok && !local {
		return refuse("unapprovedPeer", "%s hasn't approved %s", n.cfg.Domain, other.Domain())
	}
	if wait := n.consentPace.Take(string(user), 1, slowly(n.cfg.Limits.Consents)); wait > 0 {
		return busy(wait, "%s sends too many requests for consent and decisions", user)
	}
	entry := &mimi.ConsentEntry{Operation: e.Operation, Scope: s}
	if e.Operation == mimi.ConsentGrant && withKeyPackages && !local {
		var err error
		if entry.KeyPackages, err = n.keyPackagesToGrant(s); err != nil {
			return err
		}
	}
	prefix := prefixConsent
	if asks {
		prefix = prefixConsentOf
	}
	err := n.changeConsents(func(c *consentChange) error {
		have, err := n.consentRecord(prefix, self, other, s.Room)
		if err != nil {
			return err
		}
		if have == (consentRecord{}) && e.Operation != mimi.ConsentCancel {
			total, err := n.countConsents(prefix, self, func(mimi.URI, mimi.URI, consentRecord) {})
			if err != nil {
				return err
			}
			if total >= maxConsents {
				return refuse("busy", "%s has %d consents and requests for them", user, total)
			}
		}
		switch e.Operation {
		case mimi.ConsentRequest:
			return c.request(s, have, local)
		case mimi.ConsentCancel:
			if err := c.cancelled(prefixConsentOf, self, other, s.Room); err != nil {
				return err
			}
			if local {
				return c.cancelled(prefixConsent, other, self, s.Room)
			}
			return c.send(other, entry)
		}
		granted, err := n.grantedAny(s)
		if err != nil {
			return err
		}
		if err := c.decide(prefixConsent, self, other, s.Room, e.Operation); err != nil {
			return err
		}
		switch {
		case e.Operation == mimi.ConsentRevoke && !granted:
			return nil
		case local:
			return c.decide(prefixConsentOf, other, self, s.Room, e.Operation)
		}
		return c.send(other, entry)
	})
	if errors.Is(err, errIgnored) {
		return nil
	}
	return err
}

// request notes a request of a user of this node, and sends it on unless that was done before.
func (c *consentChange) request(s mimi.ConsentScope, have consentRecord, local bool) error {
	after := have
	if after.asked == 0 {
		after.asked = now()
	}
	c.put(prefixConsentOf, s.Requester, s.Target, s.Room, have, after)
	if !local {
		if have.asked != 0 {
			return nil
		}
		return c.send(s.Target, &mimi.ConsentEntry{Operation: mimi.ConsentRequest, Scope: s})
	}
	if known, err := c.n.knows(s.Target); err != nil || !known {
		return err
	}
	if err := c.asked(s); err != nil && !errors.Is(err, errIgnored) {
		return err
	}
	return nil
}

// grantedAny says whether the target has granted anything that a decision of that scope replaces or goes before.
func (n *Node) grantedAny(s mimi.ConsentScope) (granted bool, err error) {
	if s.Room != "" {
		d, err := n.decision(s.Requester, s.Target, s.Room)
		return d == mimi.ConsentGrant, err
	}
	var bad error
	err = store.ScanPrefix(n.store, key(prefixConsent, s.Target, key("", s.Requester)), func(_, v []byte) bool {
		var rec consentRecord
		bad = decodeRecord(v, &rec, "consent")
		granted = granted || rec.decision == mimi.ConsentGrant
		return bad == nil && !granted
	})
	return granted, errors.Join(err, bad)
}

// keyPackagesToGrant takes a KeyPackage of each client of the target, for a room of the requester's provider: the hub of
// another one wouldn't know where their Welcomes go.
func (n *Node) keyPackagesToGrant(s mimi.ConsentScope) ([]mls.KeyPackage, error) {
	if s.Room != "" && s.Room.Domain() != s.Requester.Domain() {
		return nil, nil
	}
	resp, err := n.claim(&mimi.KeyMaterialRequest{
		RequestingUser: s.Requester, TargetUser: s.Target, CipherSuites: mls.CipherSuites(),
	}, s.Requester.Domain())
	if err != nil || resp.Code != mimi.KeyMaterialSuccess || len(resp.Clients) > maxGranted {
		return nil, err // none: the requester claims them as others do
	}
	var list []mls.KeyPackage
	for _, c := range resp.Clients {
		list = append(list, *c.KeyPackage)
	}
	return list, nil
}

// requestConsent takes what a user of a peer asks of one of this node, or takes back. What is wrong with it the peer
// learns only as far as it is about the peer itself.
func (n *Node) requestConsent(from string, e *mimi.ConsentEntry) error {
	s := e.Scope
	if err := n.consentFrom(from, s.Requester); err != nil {
		return err
	}
	if err := n.growConsent(e.Operation); err != nil {
		return err
	}
	if known, err := n.knows(s.Target); err != nil || !known {
		return err
	}
	err := n.changeConsents(func(c *consentChange) error {
		if e.Operation == mimi.ConsentCancel {
			return c.cancelled(prefixConsent, s.Target, s.Requester, s.Room)
		}
		return c.asked(s)
	})
	if errors.Is(err, errIgnored) {
		n.log.Info("request for consent ignored", "peer", from, "requester", s.Requester)
		return nil
	}
	return err
}

// consentFrom bounds how much comes from a peer, and from each of its users.
func (n *Node) consentFrom(from string, user mimi.URI) error {
	wait := n.consentPace.Take(from, 1, slowly(consentsOfPeer*n.cfg.Limits.Consents))
	if wait == 0 {
		wait = n.consentPace.Take(string(user), 1, slowly(n.cfg.Limits.Consents))
	}
	if wait > 0 {
		return busy(wait, "%s sends too many requests for consent and decisions", user)
	}
	return nil
}

// consentsOfPeer is how many times as much as one user a peer may send.
const consentsOfPeer = 100

// updateConsent takes what a user of a peer grants one of this node, or revokes. KeyPackages that come with a grant are
// kept for the requester's next claim.
func (n *Node) updateConsent(from string, e *mimi.ConsentEntry) error {
	s := e.Scope
	if err := n.consentFrom(from, s.Target); err != nil {
		return err
	}
	if err := n.growConsent(e.Operation); err != nil {
		return err
	}
	held, err := n.checkGranted(from, e)
	if err != nil {
		return err
	}
	if known, err := n.knows(s.Requester); err != nil || !known {
		return err
	}
	err = n.changeConsents(func(c *consentChange) error {
		told, known := 0, false
		total, err := n.countConsents(prefixConsentOf, s.Requester, func(target, room mimi.URI, rec consentRecord) {
			known = known || target == s.Target && room == s.Room
			if target.Domain() == from && rec.decision != 0 {
				told++
			}
		})
		if err != nil {
			return err
		}
		if !known && (total >= maxConsents || told >= maxTold) {
			return errIgnored
		}
		if err := c.decide(prefixConsentOf, s.Requester, s.Target, s.Room, e.Operation); err != nil {
			return err
		}
		return c.hold(s, e.Operation, held)
	})
	if errors.Is(err, errIgnored) {
		n.log.Info("decision about consent ignored", "peer", from, "target", s.Target)
		return nil
	}
	return err
}

// checkGranted returns the KeyPackages of a grant that are of use here. One that isn't the target's is refused.
func (n *Node) checkGranted(from string, e *mimi.ConsentEntry) ([]mls.KeyPackage, error) {
	if e.Operation != mimi.ConsentGrant || len(e.KeyPackages) == 0 {
		return nil, nil
	}
	if len(e.KeyPackages) > maxGranted || e.Scope.Room != "" && e.Scope.Room.Domain() != n.cfg.Domain {
		return nil, nil
	}
	clients := make(map[mimi.URI]bool)
	for i := range e.KeyPackages {
		kp := &e.KeyPackages[i]
		user, client, err := authority.IdentityOf(kp.LeafNode.Credential)
		if err != nil || user != e.Scope.Target || client.Domain() != from || clients[client] {
			return nil, refuse("malformed", "KeyPackage %d of the grant isn't of another client of %s", i, e.Scope.Target)
		}
		clients[client] = true
		if err := kp.Validate(time.Now(), n.verifier.ForHub()); err != nil {
			return nil, nil // it may have expired on its way
		}
		if have, err := n.refOwner(kp.Ref()); err != nil || have != nil {
			return nil, err // it was here before, and may be used
		}
	}
	return e.KeyPackages, nil
}

// hold keeps the KeyPackages of a grant, in place of those of an earlier decision.
func (c *consentChange) hold(s mimi.ConsentScope, op mimi.ConsentOperation, list []mls.KeyPackage) error {
	if op == mimi.ConsentRevoke || len(list) > 0 {
		k := consentKey(prefixGranted, s.Requester, s.Target, s.Room)
		if s.Room != "" {
			c.batch.Delete(k)
		} else if err := store.ScanPrefix(c.n.store, k, func(room, _ []byte) bool {
			c.batch.Delete(consentKey(prefixGranted, s.Requester, s.Target, mimi.URI(room)))
			return true
		}); err != nil {
			return err
		}
	}
	if len(list) == 0 {
		return nil
	}
	rec := grantedRecord{keyPackages: list}
	for i := range list {
		kp := &list[i]
		c.batch.Set(refKey(prefixClaimedRef, kp.Ref()), codec.Marshal(refRecord{provider: s.Target.Domain(), expires: uint64(expiry(kp))}))
	}
	c.batch.Set(consentKey(prefixGranted, s.Requester, s.Target, s.Room), codec.Marshal(rec))
	return nil
}

// takeGranted hands out the KeyPackages that came with a grant, once; nil if there are none that fit. They are gone from
// the store, durably, before anybody gets them.
func (n *Node) takeGranted(req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	for _, room := range []mimi.URI{req.Room, ""} {
		k := consentKey(prefixGranted, req.RequestingUser, req.TargetUser, room)
		b, err := n.store.Get(k)
		if err != nil {
			return nil, err
		}
		if b == nil {
			continue
		}
		var rec grantedRecord
		if err := decodeRecord(b, &rec, "granted KeyPackages"); err != nil {
			return nil, err
		}
		ok, err := n.store.Commit(map[string][]byte{string(k): nil}, map[string][]byte{string(k): b})
		if err != nil {
			return nil, fmt.Errorf("claiming granted KeyPackages: %w", err)
		}
		if resp := rec.response(n, req); ok && resp != nil {
			return resp, nil
		}
	}
	return nil, nil
}

// response is the answer to a claim, nil unless all KeyPackages are good and fit.
func (v *grantedRecord) response(n *Node, req *mimi.KeyMaterialRequest) *mimi.KeyMaterialResponse {
	resp := &mimi.KeyMaterialResponse{Code: mimi.KeyMaterialSuccess, User: req.TargetUser}
	for i := range v.keyPackages {
		kp := &v.keyPackages[i]
		_, client, err := authority.IdentityOf(kp.LeafNode.Credential)
		if err != nil || !compatible(kp, req) || kp.Validate(time.Now(), n.verifier.ForHub()) != nil {
			return nil
		}
		resp.Clients = append(resp.Clients, mimi.ClientKeyMaterial{Client: client, KeyPackage: kp})
	}
	return resp
}

// loadConsent turns what the outbox of consents has into what is sent.
func (n *Node) loadConsent(ref []byte) (federation.OutboxItem, error) {
	return federation.OutboxItem{Ref: ref, Fanout: ref}, nil
}

// sendConsents delivers entries to a peer, in their order. They have a queue of their own: what a peer takes or not
// doesn't keep its rooms waiting.
func (n *Node) sendConsents(ctx context.Context, peer string, items []federation.OutboxItem) []error {
	return federation.SendRuns(items, func([]federation.OutboxItem) int { return 1 }, func(item []federation.OutboxItem) error {
		var e mimi.ConsentEntry
		if err := decodeRecord(item[0].Fanout, &e, "consent in the outbox"); err != nil {
			return &federation.Error{Status: http.StatusBadRequest, Code: federation.CodeMalformed, Detail: err.Error()}
		}
		err := n.federation.Consent(ctx, peer, &e)
		if errors.Is(err, mimi.ErrNoEndpoint) {
			return &federation.Error{Status: http.StatusNotFound, Code: federation.CodeNotFound, Detail: err.Error()}
		}
		return err
	})
}

// consents lists what a user was asked, has asked, and what was decided.
func (n *Node) consents(user mimi.URI) ([]*api.Consent, error) {
	var list []*api.Consent
	for _, prefix := range []string{prefixConsent, prefixConsentOf} {
		if _, err := n.countConsents(prefix, user, func(other, room mimi.URI, rec consentRecord) {
			list = append(list, rec.api(prefix, user, other, room))
		}); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (v consentRecord) api(prefix string, owner, other, room mimi.URI) *api.Consent {
	c := &api.Consent{Requester: string(other), Target: string(owner), Room: string(room), Asked: v.asked, Decision: uint32(v.decision), Decided: v.decided}
	if prefix == prefixConsentOf {
		c.Requester, c.Target = c.Target, c.Requester
	}
	return c
}

// sendConsents sends what there is of the records of these keys; a deleted one is sent empty.
func (st *stream) sendConsents(keys map[string]string) error {
	for k, prefix := range keys {
		b, err := st.n.store.Get([]byte(k))
		if err != nil {
			return err
		}
		var rec consentRecord
		if b != nil {
			if err := decodeRecord(b, &rec, "consent"); err != nil {
				return err
			}
		}
		parts := strings.SplitN(strings.TrimPrefix(k, prefix), "\x00", 3)
		if len(parts) != 3 {
			return fmt.Errorf("%w: key of a consent", errRecord)
		}
		ev := rec.api(prefix, mimi.URI(parts[0]), mimi.URI(parts[1]), mimi.URI(parts[2]))
		if err := st.add(&api.Event{Event: &api.Event_Consent{Consent: ev}}, 0); err != nil {
			return err
		}
	}
	return nil
}
