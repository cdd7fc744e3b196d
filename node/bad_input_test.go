package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// dump returns the store's contents under the node's own prefix, apart from what bad input can't touch.
func dump(t *testing.T, n *Node) map[string]string {
	t.Helper()
	m := make(map[string]string)
	if err := store.ScanPrefix(n.store, []byte("n/"), func(k, v []byte) bool { m[string(k)] = string(v); return true }); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestBadInputOfClientsIsRefusedAndChangesNothing sends what a broken or hostile client may send, through the API.
func TestBadInputOfClientsIsRefusedAndChangesNothing(t *testing.T) {
	n, laptop, phone, laptops, phones := twoDevices(t)
	eve := newClient(t, n, "eve", "eve-laptop")
	last := laptop.send("something")
	laptops.until(func() bool { return laptop.seq >= last })
	phones.until(func() bool { return phone.seq >= last })
	room := laptop.room
	eve.room = room

	message := laptop.seal("a message")
	fresh := func() *mimi.SubmitMessageRequest { return laptop.seal("fresh") }
	otherGroup := fresh()
	otherGroup.Message.Private.GroupID = []byte("mimi://alpha.example/g/other")
	future := fresh()
	future.Message.Private.Epoch += 5
	foreign := fresh()
	foreign.Sender = "mimi://beta.example/u/bob"
	eves := fresh()
	eves.Sender = eve.user

	commit := func(edit func(*mimi.HandshakeBundle)) []byte {
		t.Helper()
		p, err := laptop.group.Commit(nil, mls.CommitOptions{ForcePath: true})
		if err != nil {
			t.Fatal(err)
		}
		defer laptop.group.Drop(nil)
		req := bundle(p)
		var copied mimi.UpdateRequest
		if err := codec.Unmarshal(codec.Marshal(req), &copied); err != nil {
			t.Fatal(err)
		}
		edit(&copied.Bundle)
		return codec.Marshal(&copied)
	}
	good := commit(func(*mimi.HandshakeBundle) {})
	proposal := func(p mls.Proposal) []byte {
		t.Helper()
		m, err := phone.group.Propose(nil, nil, p)
		if err != nil {
			t.Fatal(err)
		}
		return codec.Marshal(&mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{Message: m}})
	}
	kp, _, err := mls.NewKeyPackage(mls.KeyPackageOptions{Suite: testSuite, Credential: mls.X509Credential(eve.chain), Signer: eve.signer, LeafExtensions: mimi.LeafExtensions()})
	if err != nil {
		t.Fatal(err)
	}
	adding := func() []byte {
		t.Helper()
		p, err := laptop.group.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{
			listUpdate(mimi.ParticipantListUpdate{Added: []mimi.Participant{{User: eve.user, Role: mimi.RoleMember}}}),
			{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		defer laptop.group.Drop(nil)
		req := bundle(p)
		req.Bundle.Welcome = nil
		return codec.Marshal(req)
	}()

	update := func(body []byte) func(*testClient) (string, error) {
		return func(c *testClient) (string, error) {
			resp, err := c.api.Update(t.Context(), connect.NewRequest(&api.MimiRequest{Room: string(room), Body: body}))
			if err != nil {
				return code(err), nil
			}
			var out mimi.UpdateRoomResponse
			err = codec.Unmarshal(resp.Msg.Body, &out)
			return fmt.Sprint("response ", out.Code), err
		}
	}
	submit := func(where string, body []byte) func(*testClient) (string, error) {
		return func(c *testClient) (string, error) {
			resp, err := c.api.SubmitMessage(t.Context(), connect.NewRequest(&api.MimiRequest{Room: where, Body: body}))
			if err != nil {
				return code(err), nil
			}
			var out mimi.SubmitMessageResponse
			err = codec.Unmarshal(resp.Msg.Body, &out)
			return fmt.Sprint("response ", out.Code), err
		}
	}
	encoded := codec.Marshal(message)
	enrol := func(size int) func(*testClient) (string, error) {
		return func(c *testClient) (string, error) {
			_, err := c.enrol.Enrol(t.Context(), connect.NewRequest(&api.EnrolRequest{Token: "x", Csr: make([]byte, size)}))
			return code(err), nil
		}
	}
	before := dump(t, n.Node)
	for _, c := range []struct {
		name string
		by   *testClient
		call func(*testClient) (string, error)
		want string
	}{
		{"enrol: too large", laptop, enrol(maxEnrolment), "tooLarge"},
		{"submit: too large", laptop, submit(string(room), make([]byte, 16<<20)), "tooLarge"},
		{"submit: empty", laptop, submit(string(room), nil), "malformed"},
		{"submit: garbage", laptop, submit(string(room), []byte("garbage")), "malformed"},
		{"submit: truncated", laptop, submit(string(room), encoded[:len(encoded)/2]), "malformed"},
		{"submit: trailing bytes", laptop, submit(string(room), append(bytes.Clone(encoded), 0)), "malformed"},
		{"submit: not a room", laptop, submit("mimi://alpha.example/u/alice", encoded), "malformed"},
		{"submit: not a URI", laptop, submit("http://alpha.example/", encoded), "malformed"},
		{"submit: unknown room", laptop, submit("mimi://alpha.example/r/unknown", encoded), "notFound"},
		{"submit: a room of an unapproved provider", laptop, submit("mimi://nobody.example/r/room", encoded), "unapprovedPeer"},
		{"submit: another group", laptop, submit(string(room), codec.Marshal(otherGroup)), "response notAllowed"},
		{"submit: a future epoch", laptop, submit(string(room), codec.Marshal(future)), "response notAllowed"},
		{"submit: for a user of another provider", laptop, submit(string(room), codec.Marshal(foreign)), "response notAllowed"},
		{"submit: for somebody else", laptop, submit(string(room), codec.Marshal(eves)), "response notAllowed"},
		{"submit: not a participant", eve, submit(string(room), codec.Marshal(eves)), "response notAllowed"},
		{"submit: a handshake", laptop, submit(string(room), good), "malformed"},
		{"update: empty", laptop, update(nil), "malformed"},
		{"update: garbage", laptop, update([]byte("garbage")), "malformed"},
		{"update: truncated", laptop, update(good[:len(good)-1]), "malformed"},
		{"update: trailing bytes", laptop, update(append(bytes.Clone(good), 0)), "malformed"},
		{"update: a message", laptop, update(encoded), "malformed"},
		{"update: bad signature", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.Message.Public.Signature[5] ^= 1 })), "response notAllowed"},
		{"update: an old epoch", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.Message.Public.Content.Epoch-- })), "response wrongEpoch"},
		{"update: a future epoch", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.Message.Public.Content.Epoch++ })), "response wrongEpoch"},
		{"update: another group", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.Message.Public.Content.GroupID[3] ^= 1 })), "response notAllowed"},
		{"update: another confirmation tag", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.Message.Public.ConfirmationTag[0] ^= 1 })), "response notAllowed"},
		{"update: GroupInfo of another epoch", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.GroupInfo.Full.GroupContext.Epoch++ })), "response notAllowed"},
		{"update: GroupInfo with a bad signature", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.GroupInfo.Full.Signature[0] ^= 1 })), "response notAllowed"},
		{"update: GroupInfo without external_pub", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			b.GroupInfo.Full.Extensions = b.GroupInfo.Full.Extensions.Remove(mls.ExtensionExternalPub)
		})), "response notAllowed"},
		{"update: a tree of another epoch", laptop, update(commit(func(b *mimi.HandshakeBundle) { b.RatchetTree = mimi.FullRatchetTree(laptop.group.Tree()) })), "response notAllowed"},
		{"update: a partial GroupInfo with a bad signature", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			b.GroupInfo = mimi.SmallGroupInfo(b.GroupInfo.Full)
			b.GroupInfo.Partial.Signature[0] ^= 1
		})), "response notAllowed"},
		{"update: a partial GroupInfo with another external_pub", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			b.GroupInfo = mimi.SmallGroupInfo(b.GroupInfo.Full)
			b.GroupInfo.Partial.Extensions[0].Data[5] ^= 1
		})), "response notAllowed"},
		{"update: a partial GroupInfo without external_pub", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			b.GroupInfo = mimi.SmallGroupInfo(b.GroupInfo.Full)
			b.GroupInfo.Partial.Extensions = nil
		})), "response notAllowed"},
		{"update: a partial GroupInfo with a ratchet tree", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			b.GroupInfo = mimi.SmallGroupInfo(b.GroupInfo.Full)
			b.GroupInfo.Partial.Presence = mimi.RatchetTreeAdded
		})), "malformed"},
		{"update: a ratchet tree in the GroupInfo", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			gi := b.GroupInfo.Full
			gi.Extensions = gi.Extensions.Set(mls.ExtensionRatchetTree, codec.Marshal(b.RatchetTree.Tree))
		})), "malformed"},
		{"update: a tree at an address", laptop, update(commit(func(b *mimi.HandshakeBundle) {
			b.RatchetTree = mimi.RatchetTreeOption{Representation: mimi.RatchetTreeHTTPSURI, URL: "https://alpha.example/tree"}
		})), "response notAllowed"},
		{"update: nobody for a Welcome", laptop, update(adding), "response notAllowed"},
		{"update: a member proposes an Add", phone, update(proposal(mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}})), "response notAllowed"},
	} {
		refused := refusals(t, n.Node)
		got, err := c.call(c.by)
		if err != nil || got != c.want {
			t.Errorf("%s: %q (%v), want %q", c.name, got, err, c.want)
		}
		if refusals(t, n.Node) != refused+1 {
			t.Errorf("%s: the refusal isn't counted", c.name)
		}
	}
	for k, v := range dump(t, n.Node) {
		if before[k] != v {
			t.Errorf("refused input changed %q", k)
		}
	}
	// The room goes on as if nothing had been.
	last = laptop.send("after all that")
	phones.until(func() bool { return phone.seq >= last })
	laptops.until(func() bool { return laptop.seq >= last })
	if got := phone.texts[len(phone.texts)-1]; got != "after all that" {
		t.Errorf("the phone reads %q", got)
	}
}

// refusals sums the counters of refused requests.
func refusals(t *testing.T, n *Node) int {
	t.Helper()
	families, err := n.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == "parley_refused_total" {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return int(sum)
}

// TestBadInputOfPeersIsRefusedAndChangesNothing calls the provider side as the federation handler does for an
// authenticated peer.
func TestBadInputOfPeersIsRefusedAndChangesNothing(t *testing.T) {
	n, laptop, _, _, _ := twoDevices(t)
	p := provider{n.Node}
	ctx := t.Context()
	const peer = "beta.example"
	theirs := mimi.URI("mimi://beta.example/r/theirs")
	fanout := func(group string) []byte {
		m := laptop.seal("x").Message
		m.Private.GroupID = []byte(group)
		return codec.Marshal(&mimi.FanoutMessage{Timestamp: 1, Message: m})
	}
	request := func(edit func(*mimi.KeyMaterialRequest)) *mimi.KeyMaterialRequest {
		req := &mimi.KeyMaterialRequest{
			RequestingUser: laptop.user, TargetUser: laptop.user, Room: laptop.room, CipherSuites: []mls.CipherSuite{testSuite},
			SignatureKey: must(testSuite.SignaturePublicKey(laptop.signer.Public()))(t), Credential: mls.X509Credential(laptop.chain),
		}
		if err := req.Sign(rand.Reader, testSuite, laptop.signer); err != nil {
			t.Fatal(err)
		}
		edit(req)
		return req
	}
	keyMaterial := func(req *mimi.KeyMaterialRequest) func() error {
		return func() error { _, err := p.KeyMaterial(ctx, peer, req); return err }
	}
	notify := func(room mimi.URI, b []byte) func() error {
		return func() error {
			return p.Notify(ctx, peer, room, []federation.Sequenced{{Seq: 1, Fanout: b}})
		}
	}
	before := dump(t, n.Node)
	for _, c := range []struct {
		name string
		call func() error
		code string
	}{
		{"notify: garbage", notify(theirs, []byte("garbage")), "malformed"},
		{"notify: empty", notify(theirs, nil), "malformed"},
		{"notify: a room of this node", notify(laptop.room, fanout(string(laptop.room.Group()))), "notAllowed"},
		{"notify: a room of a third provider", notify("mimi://gamma.example/r/x", fanout("mimi://gamma.example/g/x")), "notAllowed"},
		{"notify: another room's message", notify(theirs, fanout("mimi://beta.example/g/other")), "notAllowed"},
		{"notify: a room that nobody is in", notify(theirs, fanout(string(theirs.Group()))), "notFound"},
		{"update: unknown room", func() error { _, _, err := p.Update(ctx, peer, "mimi://alpha.example/r/none", nil); return err }, "notFound"},
		{"update: another provider's room", func() error { _, _, err := p.Update(ctx, peer, theirs, nil); return err }, "wrongProvider"},
		{"update: garbage", func() error { _, _, err := p.Update(ctx, peer, laptop.room, []byte{1, 2, 3}); return err }, "malformed"},
		{"submit: garbage", func() error { _, _, err := p.SubmitMessage(ctx, peer, laptop.room, []byte{1, 2, 3}); return err }, "malformed"},
		{"key material: signature", keyMaterial(request(func(r *mimi.KeyMaterialRequest) { r.Signature[3] ^= 1 })), "notAllowed"},
		{"key material: key", keyMaterial(request(func(r *mimi.KeyMaterialRequest) { r.SignatureKey[3] ^= 1 })), "malformed"},
		{"key material: no credential", keyMaterial(request(func(r *mimi.KeyMaterialRequest) { r.Credential = mls.X509Credential(nil) })), "malformed"},
		{"key material: for another provider's user", keyMaterial(request(func(*mimi.KeyMaterialRequest) {})), "notAllowed"},
		{"key material: of a room elsewhere", keyMaterial(request(func(r *mimi.KeyMaterialRequest) {
			r.Room = "mimi://gamma.example/r/x"
			if err := r.Sign(rand.Reader, testSuite, laptop.signer); err != nil {
				t.Fatal(err)
			}
		})), "wrongProvider"},
		{"bundle: garbage", func() error { return p.ReceiveBundle(ctx, peer, []byte("{")) }, "malformed"},
		{"bundle: not approved", func() error { return p.ReceiveBundle(ctx, peer, p.Bundle()) }, "malformed"},
	} {
		var e *federation.Error
		if err := c.call(); !errors.As(err, &e) || e.Code != c.code {
			t.Errorf("%s: %v, want %s", c.name, err, c.code)
		}
	}
	for name, submission := range map[string]*mimi.SubmitMessageRequest{"a user of this provider": laptop.seal("x"), "a stranger": {Message: laptop.seal("y").Message, Sender: "mimi://beta.example/u/bob"}} {
		resp, _, err := p.SubmitMessage(context.Background(), peer, laptop.room, codec.Marshal(submission))
		if err != nil || resp.Code != mimi.SubmitNotAllowed {
			t.Errorf("a peer submits for %s: %+v, %v", name, resp, err)
		}
	}
	after := dump(t, n.Node)
	if len(after) != len(before) {
		t.Errorf("refused input left %d keys, before there were %d", len(after), len(before))
	}
	for k, v := range after {
		if before[k] != v {
			t.Errorf("refused input changed %q", k)
		}
	}
}
