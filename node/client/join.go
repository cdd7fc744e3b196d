package client

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/chain"
	"github.com/parley-mls/parley/node/store"
)

// CreateRoom creates a room that the own node hosts, with the user as its admin, and adds the user's other devices.
func (c *Client) CreateRoom(ctx context.Context, name string) (*Room, error) {
	return c.CreateRoomWith(ctx, name, nil)
}

// CreateRoomWith is CreateRoom with rules, such as mimi.StrictRoom, which get the URI of the provider that hosts the room.
// The user has the role that they give to the creator. Who is added must have a client of this release or a later one.
func (c *Client) CreateRoomWith(ctx context.Context, name string, rules func(hub mimi.URI) mimi.Rules) (*Room, error) {
	if err := c.roomy(); err != nil {
		return nil, err
	}
	r, err := c.createRoom(ctx, name, rules)
	if err != nil {
		return nil, fmt.Errorf("client: create a room: %w", err)
	}
	own, err := c.claim(ctx, r, c.User())
	if err == nil && len(own.keyPackages) > 0 {
		err = r.change(ctx, func(g *mls.Group) (mls.CommitOptions, error) { return r.buildAdd(g, mimi.RoleNone, []addition{own}) })
	}
	if err != nil { // they can join by themselves
		c.log.Warn("own devices not added", "room", r.uri, "err", err)
	}
	return r, nil
}

func (c *Client) createRoom(ctx context.Context, name string, rules func(hub mimi.URI) mimi.Rules) (*Room, error) {
	c.mu.Lock()
	p := c.profile
	c.mu.Unlock()
	uri, err := mimi.RoomURI(p.Domain, randomID(c.o.Rand))
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, c.session, c.session.service.HubSender, &api.HubSenderRequest{CipherSuite: uint32(p.Suite)})
	if err != nil {
		return nil, fmt.Errorf("ask for the hub's key: %w", err)
	}
	var hub mls.ExternalSender
	if err := codec.Unmarshal(res.ExternalSender, &hub); err != nil {
		return nil, fmt.Errorf("the hub's key: %w", err)
	}
	if err := c.checkHubSender(ctx, uri, p.Suite, hub); err != nil {
		return nil, err
	}
	admin := mimi.Participant{User: p.User, Role: mimi.RoleAdmin}
	given := new(mimi.Rules)
	if rules != nil {
		provider, err := mimi.ProviderURI(p.Domain)
		if err != nil {
			return nil, err
		}
		*given = rules(provider)
		admin.Role = given.Creator
	}
	r := newRoom(c, uri)
	b := new(store.Batch)
	r.group, err = mls.NewGroup(c.config, b.Prefixed(r.key(roomGroup)), mls.GroupOptions{
		GroupID: []byte(uri.Group()), Suite: p.Suite, Credential: c.credential(), Signer: c.signer,
		Lifetime: c.lifetime(0), Extensions: roomExtensions(uri, name, admin, hub, given), LeafExtensions: mimi.LeafExtensions(),
	})
	if err != nil {
		return nil, err
	}
	gi, err := r.group.GroupInfo(false, true)
	if err != nil {
		return nil, err
	}
	r.group.Disregard(r.unfounded)
	r.noteOwnRenewal(b)
	r.saveHeader(b)
	r.ledger.known, r.ledger.chain = true, chain.Start(uri)
	req := &api.CreateRoomRequest{
		Room: string(uri), GroupInfo: codec.Marshal(gi), RatchetTree: codec.Marshal(mimi.FullRatchetTree(r.group.Tree())),
	}
	for delay := minRetry; ; delay *= 2 {
		_, err := call(ctx, c.session, c.session.service.CreateRoom, req)
		if err == nil {
			break
		}
		if permanent(err) || ended(ctx) || delay > 8*minRetry {
			return nil, err
		}
		c.pause(ctx, delay, nil)
	}
	var w waits
	if err := w.apply(c, b); err != nil {
		return nil, err
	}
	if err := w.wait(); err != nil {
		return nil, err
	}
	c.addRoom(r)
	c.events.send([]Event{Joined{Room: uri}})
	return r, nil
}

// roomExtensions is the GroupContext of a new room: what members must support, the hub as external sender 0 and franking
// agent, the participant list and the room's metadata. Messages are MIMI content.
func roomExtensions(uri mimi.URI, name string, admin mimi.Participant, hub mls.ExternalSender, rules *mimi.Rules) mls.Extensions {
	dict := mimi.FrankedRoom(mimi.RoomDictionary(
		mimi.ParticipantList{admin}, mimi.RoomMetadata{RoomURI: string(uri), RoomName: name},
	), mimi.FrankingAgentData(hub))
	if len(rules.Roles) > 0 {
		dict = rules.Dictionary(dict)
	}
	return mls.Extensions{
		{Type: mls.ExtensionRequiredCapabilities, Data: codec.Marshal(mls.RequiredCapabilities{
			Extensions:  []mls.ExtensionType{mls.ExtensionAppDataDictionary},
			Proposals:   []mls.ProposalType{mls.ProposalAppDataUpdate},
			Credentials: []mls.CredentialType{mls.CredentialX509},
		})},
		{Type: mls.ExtensionExternalSenders, Data: codec.Marshal(mls.ExternalSenders{hub})},
		{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(dict)},
	}
}

// checkHubSender says whether a key belongs to the provider that hosts the room.
func (c *Client) checkHubSender(ctx context.Context, room mimi.URI, suite mls.CipherSuite, hub mls.ExternalSender) error {
	var id *authority.Identity
	err := c.judged(ctx, func() (err error) {
		id, err = c.trust.verifier.VerifyKey(hub.Credential.Certificates, suite, hub.SignatureKey, authority.PurposeHub)
		return err
	})
	if err != nil {
		return fmt.Errorf("credential of the hub: %w", err)
	}
	if id.Domain != room.Domain() {
		return fmt.Errorf("credential of the hub is for %s", id.Domain)
	}
	return nil
}

// randomID returns a name of 100 random bits.
func randomID(r io.Reader) string {
	b := make([]byte, 15)
	if _, err := io.ReadFull(r, b); err != nil {
		_, _ = rand.Read(b) // never fails
	}
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b))[:20]
}

// addRoom makes a room known and gives it a worker if Run runs.
func (c *Client) addRoom(r *Room) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rooms[r.uri] = r
	if c.running != nil {
		ctx := c.running
		c.workers.Go(func() { r.work(ctx) })
	}
}

// welcomed processes a Welcome: this client was added to a room. What can't be joined is passed over, since it would
// fail again.
func (c *Client) welcomed(w *waits, number uint64, room string, seq uint64, fanout []byte) ([]Event, error) {
	c.mu.Lock()
	known := number <= c.welcome
	c.mu.Unlock()
	if known {
		return nil, nil
	}
	stored := func() *store.Batch {
		b := new(store.Batch)
		b.Set(keyWelcome, binary.BigEndian.AppendUint64(nil, number))
		return b
	}
	uri, err := mimi.ParseURI(room)
	if err == nil && uri.Kind() != 'r' {
		err = fmt.Errorf("%q is no room", room)
	}
	var events []Event
	if err == nil {
		events, err = c.enter(w, stored(), uri, seq, fanout)
	}
	if err != nil {
		c.log.Warn("welcome refused", "room", room, "number", number, "err", err)
		if err := w.apply(c, stored()); err != nil {
			return nil, err
		}
	}
	c.mu.Lock()
	c.welcome = number
	c.mu.Unlock()
	return events, nil
}

// enter joins a room by a Welcome and writes the batch with it. If it fails it has written nothing. A Welcome to a room
// that this client is in follows a removal whose entry the node doesn't send any more; it must lead to a later epoch.
func (c *Client) enter(w *waits, b *store.Batch, uri mimi.URI, seq uint64, fanout []byte) ([]Event, error) {
	r, err := c.Room(uri)
	fresh := err != nil
	if fresh {
		r = newRoom(c, uri)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	again := !fresh && r.usable() == nil
	if again && seq <= r.header.cursor {
		return nil, errors.New("this client is a member")
	}
	var f mimi.FanoutMessage
	if err := codec.Unmarshal(fanout, &f); err != nil {
		return nil, err
	}
	if f.Message == nil || f.Message.Welcome == nil {
		return nil, errors.New("no Welcome with a ratchet tree")
	}
	kp, err := c.findKeyPackage(f.Message.Welcome)
	if err != nil {
		return nil, err
	}
	if kp == nil {
		return nil, errors.New("it is for no key package of this client")
	}
	defer kp.secrets.Erase()
	tree := f.RatchetTree.Tree
	if tree == nil {
		return nil, errors.New("the Welcome comes without its ratchet tree")
	}
	if err := r.clearGroup(b); err != nil {
		return nil, err
	}
	g, err := mls.JoinGroup(c.config, b.Prefixed(r.key(roomGroup)), c.signer, f.Message.Welcome, &kp.keyPackage, &kp.secrets, tree)
	if err != nil {
		return nil, err
	}
	if err := c.checkRoom(uri, g); err != nil {
		return nil, err
	}
	if err := c.checkMembers(g.Tree()); err != nil {
		return nil, err
	}
	if again && g.Epoch() <= r.group.Epoch() {
		return nil, fmt.Errorf("it leads to epoch %d, this client is in %d", g.Epoch(), r.group.Epoch())
	}
	if !kp.keyPackage.LastResort() {
		b.Delete(keyPackageKey(kp.keyPackage.Ref()))
	}
	if err := r.become(w, b, g, seq); err != nil {
		return nil, err
	}
	if fresh {
		c.addRoom(r)
	}
	events := []Event{Joined{Room: uri}}
	if again {
		events = slices.Insert(events, 0, Event(Removed{Room: uri}))
	}
	return events, nil
}

// checkMembers refuses a group with a member whose certificate isn't from the provider that it names: no hub that checks
// what it accepts has such a group, but a node that forges one does. Members who are expired or revoked, or of a
// provider that isn't known here, are flagged later.
func (c *Client) checkMembers(tree *mls.RatchetTree) error {
	for i, l := range tree.Leaves() {
		_, err := c.trust.verifier.Verify(l.Credential.Certificates, authority.PurposeClient)
		if f := flagOf(err); f == flagDistrust {
			return fmt.Errorf("leaf %d: %w", i, err)
		}
	}
	return nil
}

// become makes g the room's group from the entry after seq on, and writes the batch. mu is held.
func (r *Room) become(w *waits, b *store.Batch, g *mls.Group, seq uint64) error {
	if s := r.staged; s != nil && s.job != nil && !s.hold {
		r.jobs = slices.Insert(r.jobs, 0, s.job)
	}
	if r.leaving != nil {
		r.leaving.finish(fmt.Errorf("client: leave %s: this client entered the room anew", r.uri))
	}
	if err := r.noteGap(b, g, seq); err != nil {
		return err
	}
	r.group, r.header, r.frozen, r.staged, r.leaving, r.stray = g, header{cursor: seq}, nil, nil, nil, 0
	r.fresh, r.behind = false, false
	r.group.Disregard(r.unfounded)
	r.leavers, r.entered = nil, 0
	r.noteOwnRenewal(b)
	r.forgetChain()
	r.saveHeader(b)
	r.commitAt = time.Time{}
	r.judgeLocked()
	r.schedule()
	r.touch()
	return w.apply(r.c, b)
}

// joinAttempts bounds how often an external commit is made anew after other commits won.
const joinAttempts = 16

// Join makes this client a member of a room in which its user is a participant, or may become one by itself under the
// room's rules, by an external commit (RFC 9420, Section 12.4.3.2). If it is a member already, nothing happens; a frozen
// room is entered anew.
func (c *Client) Join(ctx context.Context, room mimi.URI) (*Room, error) {
	return c.join(ctx, room, nil)
}

// join is Join, with the key of a link if there is one.
func (c *Client) join(ctx context.Context, room mimi.URI, link ed25519.PrivateKey) (*Room, error) {
	if err := c.roomy(); err != nil {
		return nil, err
	}
	for !c.beginJoin(room) { // one that a crash interrupted is under way
		c.pause(ctx, minRetry, nil)
		if ended(ctx) {
			return nil, fmt.Errorf("client: join %s: %w", room, ctx.Err())
		}
	}
	defer c.endJoin(room)
	if r, err := c.Room(room); err == nil {
		r.mu.Lock()
		usable := r.usable() == nil
		r.mu.Unlock()
		if usable {
			return r, nil
		}
	}
	refusals := 0
	for range joinAttempts {
		p, err := c.prepareJoin(ctx, room, link)
		if err == nil {
			var r *Room
			if r, err = c.finishJoin(ctx, room, p); err == nil && r != nil {
				return r, nil
			}
		}
		if err != nil {
			// Somebody may have asked to leave since the group info was given.
			if rf, ok := errors.AsType[*Refused](err); !ok || rf.Code != mimi.UpdateNotAllowed.String() || refusals == maxRefusals {
				return nil, fmt.Errorf("client: join %s: %w", room, err)
			}
			refusals++
		}
		c.pause(ctx, time.Duration(10+mathrand.N(90))*time.Millisecond, nil)
	}
	return nil, fmt.Errorf("client: join %s: other commits came first %d times", room, joinAttempts)
}

// beginJoin returns false if an external commit to the room is being sent; if it returns true, endJoin must follow.
func (c *Client) beginJoin(room mimi.URI) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.joining[room] {
		return false
	}
	c.joining[room] = true
	return true
}

func (c *Client) endJoin(room mimi.URI) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.joining, room)
}

// prepareJoin fetches what an external commit needs, verifies it, and stores the commit before it is sent.
func (c *Client) prepareJoin(ctx context.Context, room mimi.URI, link ed25519.PrivateKey) (*mls.PendingJoin, error) {
	c.mu.Lock()
	p := c.profile
	c.mu.Unlock()
	pub, private, err := p.Suite.GenerateHPKEKey(c.o.Rand)
	if err != nil {
		return nil, err
	}
	code := c.joiningCode(room, link)
	req := &mimi.GroupInfoRequest{CipherSuite: p.Suite, Credential: c.credential(), GroupInfoPublicKey: pub, JoiningCode: code}
	if err := req.Sign(c.o.Rand, c.signer); err != nil {
		return nil, fmt.Errorf("sign the request for the group info: %w", err)
	}
	answer, err := call(ctx, c.session, c.session.service.GroupInfo, &api.MimiRequest{Room: string(room), Body: codec.Marshal(req)})
	if err != nil {
		return nil, fmt.Errorf("ask for the group info: %w", err)
	}
	var res mimi.GroupInfoResponse
	if err := codec.Unmarshal(answer.Body, &res); err != nil {
		return nil, fmt.Errorf("group info: %w", err)
	}
	if res.Code != mimi.GroupInfoSuccess {
		return nil, &Refused{Code: res.Code.String()}
	}
	if res.Room != room {
		return nil, fmt.Errorf("group info of %q", res.Room)
	}
	if err := c.checkHubSender(ctx, room, res.CipherSuite, res.HubSender); err != nil {
		return nil, err
	}
	opened, err := res.Open(room, private)
	if err != nil {
		return nil, fmt.Errorf("open the group info: %w", err)
	}
	tree := opened.RatchetTree.Tree
	if tree == nil {
		return nil, errors.New("the hub gives no ratchet tree")
	}
	o := mls.ExternalJoinOptions{
		GroupInfo: opened.GroupInfo, Tree: tree, Credential: c.credential(), Signer: c.signer,
		LeafExtensions: mimi.LeafExtensions(), SelfRemoves: opened.SelfRemoves(),
	}
	for i, l := range tree.Leaves() {
		if _, id, err := c.identity(l); err == nil && id == p.Client {
			o.Proposals = append(o.Proposals, mls.Proposal{Type: mls.ProposalRemove, Remove: &mls.Remove{Removed: i}})
		}
	}
	if len(o.Proposals) == 0 && c.trimmed(room) {
		return nil, errRemoved
	}
	if err := c.judged(ctx, func() error { return c.checkMembers(tree) }); err != nil {
		return nil, err
	}
	enter, err := c.admission(opened.GroupInfo.GroupContext, room, code)
	if err != nil {
		return nil, err
	}
	o.Proposals = append(o.Proposals, enter...)
	pending, err := mls.ExternalJoin(c.config, o)
	if err != nil {
		return nil, err
	}
	b := new(store.Batch)
	b.Set([]byte(prefixJoin+string(room)), codec.Marshal(pending))
	var w waits
	if err := w.apply(c, b); err != nil {
		return nil, err
	}
	return pending, w.wait()
}

// finishJoin sends an external commit until the hub answers. It returns nil if another commit won.
func (c *Client) finishJoin(ctx context.Context, room mimi.URI, p *mls.PendingJoin) (*Room, error) {
	request := updateRequest(p.Message(), nil, p.GroupInfo())
	var res *mimi.UpdateRoomResponse
	var seq uint64
	for delay := minRetry; ; delay = min(2*delay, maxRetry) {
		var err error
		res, seq, err = c.commit(ctx, room, request, func() (*mls.GroupInfo, *mls.RatchetTree) { return p.GroupInfo(), p.Tree() })
		if err == nil {
			break
		}
		if ended(ctx) {
			return nil, err // the answer is looked for at the next start
		}
		if permanent(err) {
			return nil, errors.Join(err, c.forgetJoin(room))
		}
		c.pause(ctx, delay, nil)
	}
	switch res.Code {
	case mimi.UpdateSuccess:
		return c.confirmJoin(room, p, seq)
	case mimi.UpdateWrongEpoch:
		return nil, c.forgetJoin(room)
	}
	return nil, errors.Join(refusedUpdate(res), c.forgetJoin(room))
}

func (c *Client) forgetJoin(room mimi.URI) error {
	var w waits
	b := new(store.Batch)
	b.Delete([]byte(prefixJoin + string(room)))
	if err := w.apply(c, b); err != nil {
		return err
	}
	return w.wait()
}

// confirmJoin makes the room of an external commit that the hub accepted as entry seq.
func (c *Client) confirmJoin(room mimi.URI, p *mls.PendingJoin, seq uint64) (*Room, error) {
	r, err := c.Room(room)
	fresh := err != nil
	if fresh {
		r = newRoom(c, room)
	}
	var w waits
	r.mu.Lock()
	if !fresh && r.usable() == nil && r.group.Epoch() >= p.Epoch() { // a Welcome was faster
		r.mu.Unlock()
		return r, c.forgetJoin(room)
	}
	events := []Event{Joined{Room: room}}
	b := new(store.Batch)
	if !fresh {
		if gap := r.gap(seq); gap != nil {
			b.Set(r.key64(roomGap, gap.Next), binary.BigEndian.AppendUint64(nil, gap.After))
			events = slices.Insert(events, 0, Event(*gap))
			if err := r.setAside(b, gap.Next); err != nil {
				r.mu.Unlock()
				return nil, fmt.Errorf("client: read the messages of %s: %w", room, err)
			}
		}
	}
	b.Delete([]byte(prefixJoin + string(room)))
	err = r.clearGroup(b)
	var g *mls.Group
	if err == nil {
		g, err = p.Confirm(b.Prefixed(r.key(roomGroup)))
	}
	if err == nil {
		err = c.checkRoom(room, g)
	}
	if err == nil {
		err = r.become(&w, b, g, max(seq, 1)-1) // the entry itself may have proposals of the hub with it
		r.entered = g.Epoch()
	}
	r.mu.Unlock()
	if e := w.wait(); err == nil {
		err = e
	}
	if err != nil {
		return nil, err
	}
	if fresh {
		c.addRoom(r)
	}
	c.events.send(events)
	c.resubscribe() // what came for the room before it was known here comes again
	return r, nil
}

// resumeJoins has it found out what became of external commits whose answers a crash lost. It doesn't wait for that,
// which may take until the hub of another provider is back.
func (c *Client) resumeJoins(ctx context.Context) error {
	pending, stored := make(map[mimi.URI]*mls.PendingJoin), make(map[mimi.URI][]byte)
	err := store.ScanPrefix(c.db, []byte(prefixJoin), func(key, value []byte) bool {
		p, err := mls.LoadPendingJoin(c.config, c.signer, value)
		if err != nil {
			c.log.Warn("stored external commit is damaged", "room", string(key), "err", err)
			return true
		}
		pending[mimi.URI(key)], stored[mimi.URI(key)] = p, bytes.Clone(value)
		return true
	})
	if err != nil {
		return fmt.Errorf("client: read external commits: %w", err)
	}
	for room, p := range pending {
		if !c.beginJoin(room) {
			continue
		}
		// A Join that just ended has settled it: confirmed a second time, the group would begin with keys that were used.
		key := []byte(prefixJoin + string(room))
		if now, err := c.db.Get(key); err != nil || !bytes.Equal(now, stored[room]) {
			c.endJoin(room)
			continue
		}
		c.workers.Go(func() {
			defer c.endJoin(room)
			if _, err := c.finishJoin(ctx, room, p); err != nil && !ended(ctx) {
				c.log.Warn("join failed", "room", room, "err", err)
			}
		})
	}
	return nil
}

// Find returns the user of an exact handle such as "bob@beta.example" (MIMI identifierQuery).
func (c *Client) Find(ctx context.Context, handle string) (mimi.URI, error) {
	_, domain, ok := strings.Cut(handle, "@")
	if !ok || mimi.ValidDomain(domain) != nil {
		return "", fmt.Errorf("client: %q is no handle: it has the form user@domain", handle)
	}
	res, err := call(ctx, c.session, c.session.service.Query, &api.QueryRequest{
		Domain: domain,
		Body: codec.Marshal(&mimi.IdentifierRequest{Elements: []mimi.QueryElement{
			{Type: mimi.SearchHandle, Value: []byte(handle)},
		}}),
	})
	if err != nil {
		return "", fmt.Errorf("client: find %s: %w", handle, err)
	}
	var answer mimi.IdentifierResponse
	if err := codec.Unmarshal(res.Body, &answer); err != nil {
		return "", fmt.Errorf("client: find %s: the answer: %w", handle, err)
	}
	if answer.Code != mimi.IdentifierSuccess || len(answer.URIs) != 1 {
		return "", fmt.Errorf("client: find %s: %w", handle, &Refused{Code: answer.Code.String()})
	}
	user := answer.URIs[0]
	if user.Kind() != 'u' || user.Domain() != domain {
		return "", fmt.Errorf("client: find %s: %s answers with %q", handle, domain, user)
	}
	return user, nil
}
