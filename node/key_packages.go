package node

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// maxLastResort is how many claims of a last-resort KeyPackage wait for their Welcomes at a time.
const maxLastResort = 256

// published is what a client has here for others to claim.
type published struct {
	count      int  // unexpired ones for one use
	lastResort bool // there is a last-resort one that nobody has got
}

// publish stores KeyPackages of a client, each for one use or as last resort, and returns how many there are now. A
// last-resort one takes the place of the one before. An invalid one refuses the whole list. Publishing one again that
// was claimed in the meantime doesn't make it available again.
func (n *Node) publish(by submitter, encoded [][]byte, replace bool) (published, error) {
	var have published
	if len(encoded) > 0 {
		if err := n.disk.grow(); err != nil {
			return have, err
		}
	}
	stored, err := n.stored(by.client)
	if err != nil {
		return have, err
	}
	last, err := n.lastResorts(by.client)
	if err != nil {
		return have, err
	}
	changes, expect := make(map[string][]byte), make(map[string][]byte)
	drop := func(k storedKeyPackage) {
		changes[string(key(prefixKeyPackage, by.client, k.ref))] = nil
		if _, ok := last[string(k.ref)]; ok {
			changes[string(key(prefixLastResort, by.client, k.ref))] = nil
		}
	}
	for _, k := range stored {
		used, isLast := last[string(k.ref)]
		switch {
		case replace:
			drop(k)
		case k.expires <= time.Now().Unix():
		case isLast:
			have.lastResort = have.lastResort || !used
		default:
			have.count++
		}
	}
	for i, e := range encoded {
		var kp mls.KeyPackage
		if err := decode(e, &kp); err != nil {
			return have, fmt.Errorf("KeyPackage %d: %w", i, err)
		}
		if err := kp.Validate(time.Now(), n.verifier.ForHub()); err != nil {
			return have, refuse("malformed", "KeyPackage %d: %v", i, err)
		}
		if days := n.cfg.Limits.KeyPackageDays; kp.LeafNode.Lifetime.NotAfter > uint64(time.Now().Add(maxLifetime(days)).Unix()) {
			return have, refuse("notAllowed", "KeyPackage %d is valid for more than %d days", i, days)
		}
		user, client, err := authority.IdentityOf(kp.LeafNode.Credential)
		if err != nil || client != by.client || user != by.user {
			return have, refuse("notAllowed", "KeyPackage %d is of another client", i)
		}
		ref := kp.Ref()
		own := string(refKey(prefixOwnRef, ref))
		known, err := n.store.Get([]byte(own))
		if err != nil {
			return have, err
		}
		if _, twice := expect[own]; known != nil || twice {
			continue
		}
		if kp.LastResort() {
			for _, k := range stored {
				if _, ok := last[string(k.ref)]; ok {
					drop(k)
				}
			}
			stored, last = []storedKeyPackage{{ref: ref}}, map[string]bool{string(ref): false} // what another one in the list replaces
			changes[string(key(prefixLastResort, by.client, ref))] = []byte{0}
			have.lastResort = true
		} else {
			have.count++
		}
		expires := expiry(&kp)
		changes[string(key(prefixKeyPackage, by.client, ref))] = append(be64(uint64(expires)), e...)
		changes[own], expect[own] = codec.Marshal(refRecord{client: by.client, user: by.user, expires: uint64(expires)}), nil
	}
	if have.count > n.cfg.Limits.KeyPackages {
		return have, refuse("busy", "a client may have %d KeyPackages here", n.cfg.Limits.KeyPackages)
	}
	if len(changes) > 0 {
		changes[string(key(prefixDevice, by.user, []byte(by.client)))] = []byte{}
		ok, err := n.store.Commit(changes, expect)
		if err != nil {
			return have, fmt.Errorf("storing KeyPackages: %w", err)
		}
		if !ok {
			return have, refuse("busy", "the same KeyPackages are being published by another request")
		}
	}
	return have, nil
}

func maxLifetime(days int) time.Duration { return time.Duration(days) * 24 * time.Hour }

// lastResorts returns the references of a client's last-resort KeyPackages, and whether each was handed out.
func (n *Node) lastResorts(client mimi.URI) (map[string]bool, error) {
	list := make(map[string]bool)
	err := store.ScanPrefix(n.store, key(prefixLastResort, client), func(k, v []byte) bool {
		list[string(k)] = len(v) == 1 && v[0] == 1
		return true
	})
	return list, err
}

// expiry is when a KeyPackage stops being of use: with its lifetime, or its credential.
func expiry(kp *mls.KeyPackage) int64 {
	end := int64(min(kp.LeafNode.Lifetime.NotAfter, 1<<62))
	if id, err := authority.ParseIdentity(kp.LeafNode.Credential.Certificates); err == nil {
		end = min(end, id.NotAfter.Unix())
	}
	return end
}

type storedKeyPackage struct {
	ref     []byte
	expires int64
	value   []byte // as stored
}

func (n *Node) stored(client mimi.URI) ([]storedKeyPackage, error) {
	var list []storedKeyPackage
	err := store.ScanPrefix(n.store, key(prefixKeyPackage, client), func(k, v []byte) bool {
		if len(v) > 8 {
			list = append(list, storedKeyPackage{slices.Clone(k), int64(binary.BigEndian.Uint64(v)), slices.Clone(v)})
		}
		return true
	})
	return list, err
}

func refKey(prefix string, ref []byte) []byte { return append([]byte(prefix), ref...) }

// refOwner says to whom a Welcome for a KeyPackage goes, nil if the KeyPackage wasn't claimed through this hub.
func (n *Node) refOwner(ref []byte) (*refRecord, error) {
	for _, prefix := range []string{prefixOwnRef, prefixClaimedRef} {
		b, err := n.store.Get(refKey(prefix, ref))
		if err != nil {
			return nil, err
		}
		if b != nil {
			rec := new(refRecord)
			return rec, decodeRecord(b, rec, "KeyPackage reference")
		}
	}
	return nil, nil
}

// keyMaterial claims KeyPackages of a user for a room. A hub asks the user's provider for them and keeps whose they are,
// for the Welcome; the user's provider hands each out once.
func (n *Node) keyMaterial(ctx context.Context, from string, req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	if err := n.checkRequester(req); err != nil {
		return nil, err
	}
	switch {
	case req.Room.Domain() == n.cfg.Domain:
		if from != n.cfg.Domain && from != req.RequestingUser.Domain() {
			return nil, refuse("notAllowed", "%s doesn't speak for %s", from, req.RequestingUser)
		}
		if err := n.mayClaim(req); err != nil {
			return nil, err
		}
		if err := n.claims.allow(n.cfg.Domain, from, req, n.cfg.Limits); err != nil {
			return nil, err
		}
		if req.TargetUser.Domain() == n.cfg.Domain {
			return n.claimFor(req)
		}
		if from == n.cfg.Domain {
			if resp, err := n.takeGranted(req); err != nil || resp != nil {
				return resp, err
			}
		}
		return n.claimFrom(ctx, req)
	case req.TargetUser.Domain() == n.cfg.Domain && from == req.Room.Domain():
		if err := n.claims.allow(n.cfg.Domain, from, req, n.cfg.Limits); err != nil {
			return nil, err
		}
		return n.claimFor(req)
	}
	return nil, refuse("wrongProvider", "this node is neither the hub of %s nor the provider of %s", req.Room, req.TargetUser)
}

// checkRequester verifies the client that asks.
func (n *Node) checkRequester(req *mimi.KeyMaterialRequest) error {
	if req.Room.Kind() != mimi.KindRoom || req.TargetUser.Kind() != mimi.KindUser {
		return refuse("malformed", "a request of key material names a room and a user")
	}
	var suite mls.CipherSuite
	id, err := authority.ParseIdentity(req.Credential.Certificates)
	if err != nil {
		return err
	}
	for _, s := range mls.CipherSuites() {
		if pub, err := s.SignaturePublicKey(id.PublicKey); err == nil && string(pub) == string(req.SignatureKey) {
			suite = s
			break
		}
	}
	if suite == 0 {
		return refuse("malformed", "the request's key isn't its credential's")
	}
	if _, err := n.verifier.VerifyKey(req.Credential.Certificates, suite, req.SignatureKey, authority.PurposeClient); err != nil {
		return err
	}
	if id.User != req.RequestingUser {
		return refuse("notAllowed", "%s doesn't speak for %s", id.Client, req.RequestingUser)
	}
	return req.Verify(suite)
}

// mayClaim checks, at the hub, that the one who asks takes part in the room.
func (n *Node) mayClaim(req *mimi.KeyMaterialRequest) error {
	r, err := n.hostedRoom(req.Room)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	who, err := r.who()
	if err != nil {
		return err
	}
	if !who.role(req.RequestingUser).Claims(req.RequestingUser == req.TargetUser) {
		return refuse("notAllowed", "%s isn't a participant who may add clients of %s", req.RequestingUser, req.TargetUser)
	}
	return nil
}

// claimFrom passes a claim on to the user's provider, and keeps which KeyPackages come from there before it answers.
func (n *Node) claimFrom(ctx context.Context, req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	peer := req.TargetUser.Domain()
	if _, ok := n.trust.Peer(peer); !ok {
		return nil, refuse("unapprovedPeer", "%s hasn't approved %s", n.cfg.Domain, peer)
	}
	if err := n.disk.grow(); err != nil {
		return nil, err // what the peer hands out couldn't be used here
	}
	resp, err := n.federation.KeyMaterial(ctx, peer, req)
	if err != nil {
		return nil, n.unreachable(peer, err)
	}
	changes := make(map[string][]byte)
	for _, c := range resp.Clients {
		if c.KeyPackage != nil {
			user, client, err := authority.IdentityOf(c.KeyPackage.LeafNode.Credential)
			if err != nil || user != req.TargetUser || client != c.Client {
				return nil, refuse("unavailable", "%s answers with a KeyPackage that isn't of %s", peer, req.TargetUser)
			}
			if err := c.KeyPackage.Validate(time.Now(), n.verifier.ForHub()); err != nil {
				return nil, refuse("unavailable", "%s answers with an invalid KeyPackage: %v", peer, err)
			}
			ref := refKey(prefixClaimedRef, c.KeyPackage.Ref())
			if have, err := n.store.Get(ref); err != nil {
				return nil, err
			} else if have != nil && !c.KeyPackage.LastResort() {
				return nil, refuse("unavailable", "%s hands out a KeyPackage of %s for the second time", peer, c.Client)
			}
			changes[string(ref)] = codec.Marshal(refRecord{provider: peer, expires: uint64(expiry(c.KeyPackage))})
		}
	}
	if len(changes) > 0 {
		if _, err := n.store.Commit(changes, nil); err != nil {
			return nil, fmt.Errorf("keeping whose KeyPackages these are: %w", err)
		}
	}
	return resp, nil
}

// claimFor is claim, with the user's consent.
func (n *Node) claimFor(req *mimi.KeyMaterialRequest) (*mimi.KeyMaterialResponse, error) {
	code, err := n.checkConsent(req.RequestingUser, req.TargetUser, req.Room)
	if err != nil {
		return nil, err
	}
	if code != mimi.KeyMaterialSuccess {
		return &mimi.KeyMaterialResponse{Code: code, User: req.TargetUser}, nil
	}
	return n.claim(req, req.Room.Domain())
}

// claim hands out one KeyPackage of each client of a user of this provider, for a room that hub hosts.
func (n *Node) claim(req *mimi.KeyMaterialRequest, hub string) (*mimi.KeyMaterialResponse, error) {
	resp := &mimi.KeyMaterialResponse{User: req.TargetUser}
	var clients []mimi.URI
	if err := store.ScanPrefix(n.store, key(prefixDevice, req.TargetUser), func(k, _ []byte) bool {
		clients = append(clients, mimi.URI(k))
		return true
	}); err != nil {
		return nil, err
	}
	if len(clients) == 0 {
		var err error
		resp.Code, err = n.withoutClients(req.TargetUser)
		return resp, err
	}
	given := 0
	for _, c := range clients {
		ckm, err := n.claimOne(c, req, hub)
		if err != nil {
			return nil, err
		}
		if ckm.KeyPackage != nil {
			given++
		}
		resp.Clients = append(resp.Clients, *ckm)
	}
	switch given {
	case len(clients):
		resp.Code = mimi.KeyMaterialSuccess
	case 0:
		resp.Code = mimi.NoCompatibleMaterial
	default:
		resp.Code = mimi.KeyMaterialPartialSuccess
	}
	return resp, nil
}

// withoutClients is the answer for a user none of whose clients has ever published a KeyPackage, or is left.
func (n *Node) withoutClients(user mimi.URI) (mimi.KeyMaterialUserCode, error) {
	list, err := n.service.List(n.ctx, authority.Filter{User: user})
	if err != nil {
		return 0, err
	}
	code := mimi.UserUnknown
	for _, c := range list {
		switch {
		case !c.Revoked.IsZero():
			code = mimi.UserDeleted
		case time.Now().Before(c.NotAfter):
			return mimi.NoCompatibleMaterial, nil
		}
	}
	return code, nil
}

// claimOne takes a KeyPackage of a client out of the store; it is gone, durably, before anybody gets it. A last-resort one
// is handed out when no other fits, and stays.
func (n *Node) claimOne(client mimi.URI, req *mimi.KeyMaterialRequest, hub string) (*mimi.ClientKeyMaterial, error) {
	list, err := n.stored(client)
	if err != nil {
		return nil, err
	}
	none := &mimi.ClientKeyMaterial{Code: mimi.KeyMaterialExhausted, Client: client}
	var last *mls.KeyPackage
	left := len(list)
	for _, s := range list {
		left--
		var kp mls.KeyPackage
		if err := decodeRecord(s.value[8:], &kp, "KeyPackage"); err != nil {
			return nil, err
		}
		k := string(key(prefixKeyPackage, client, s.ref))
		if s.expires > time.Now().Unix() && !compatible(&kp, req) {
			none.Code, none.Capabilities = mimi.NothingCompatible, &kp.LeafNode.Capabilities
			continue
		}
		if s.expires <= time.Now().Unix() || kp.Validate(time.Now(), n.verifier.ForHub()) != nil {
			if _, err := n.store.Commit(map[string][]byte{k: nil, string(key(prefixLastResort, client, s.ref)): nil}, nil); err != nil {
				return nil, err
			}
			continue
		}
		if kp.LastResort() {
			last = &kp
			continue
		}
		// The Welcome has to come from the hub that claims it, and from nobody who has merely seen the reference.
		own := string(refKey(prefixOwnRef, s.ref))
		claimed := refRecord{client: client, user: req.TargetUser, provider: hub, expires: uint64(s.expires)}
		ok, err := n.store.Commit(map[string][]byte{k: nil, own: codec.Marshal(claimed)}, map[string][]byte{k: s.value})
		if err != nil {
			return nil, fmt.Errorf("claiming a KeyPackage: %w", err)
		}
		if ok {
			if left < lowMark {
				n.listeners.keyPackages(client)
			}
			return &mimi.ClientKeyMaterial{Client: client, KeyPackage: &kp}, nil
		}
	}
	n.listeners.keyPackages(client)
	if last == nil {
		return none, nil
	}
	ok, err := n.claimLast(client, last, hub)
	if err != nil || !ok {
		return none, err
	}
	return &mimi.ClientKeyMaterial{Client: client, KeyPackage: last}, nil
}

// lowMark is how many KeyPackages of a client are left, at most, when it is told of each claim.
const lowMark = 32

// claimLast notes that a last-resort KeyPackage is handed out; false if too many Welcomes for it are to come.
func (n *Node) claimLast(client mimi.URI, kp *mls.KeyPackage, hub string) (bool, error) {
	own := refKey(prefixOwnRef, kp.Ref())
	for range 10 {
		b, err := n.store.Get(own)
		if err != nil {
			return false, err
		}
		var rec refRecord
		if err := decodeRecord(b, &rec, "KeyPackage reference"); err != nil {
			return false, err
		}
		// A hub of this node sends its Welcomes without asking.
		if hub != n.cfg.Domain {
			claims := append(strings.Fields(rec.provider), hub)
			if len(claims) > maxLastResort {
				return false, nil
			}
			rec.provider = strings.Join(claims, " ")
		}
		ok, err := n.store.Commit(map[string][]byte{
			string(own): codec.Marshal(rec), string(key(prefixLastResort, client, kp.Ref())): {1},
		}, map[string][]byte{string(own): b})
		if err != nil || ok {
			return ok, err
		}
	}
	return false, refuse("busy", "the KeyPackages of %s are being claimed by others", client)
}

// compatible says whether a KeyPackage has a suite and the capabilities that a request asks for.
func compatible(kp *mls.KeyPackage, req *mimi.KeyMaterialRequest) bool {
	if !slices.Contains(req.CipherSuites, kp.CipherSuite) {
		return false
	}
	c, required := kp.LeafNode.Capabilities, req.RequiredCapabilities
	for _, e := range required.Extensions {
		if !slices.Contains(c.Extensions, e) && (e < 1 || e > 5) { // types 1 to 5 are everyone's (RFC 9420, Section 7.2)
			return false
		}
	}
	for _, p := range required.Proposals {
		if !slices.Contains(c.Proposals, p) && (p < 1 || p > 7) {
			return false
		}
	}
	for _, t := range required.Credentials {
		if !slices.Contains(c.Credentials, t) {
			return false
		}
	}
	return true
}

// forgetClient deletes what is here for others to add a client with.
func (n *Node) forgetClient(user, client mimi.URI) error {
	list, err := n.stored(client)
	if err != nil {
		return err
	}
	changes := map[string][]byte{string(key(prefixDevice, user, []byte(client))): nil}
	for _, s := range list {
		changes[string(key(prefixKeyPackage, client, s.ref))] = nil
		changes[string(key(prefixLastResort, client, s.ref))] = nil
	}
	_, err = n.store.Commit(changes, nil)
	return err
}
