package node

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
)

// twoDevices is a room of alice's with both of her devices in it.
func twoDevices(t *testing.T) (n *testNode, laptop, phone *testClient, laptops, phones *events) {
	t.Helper()
	n = newNode(t, "alpha")
	laptop, phone = newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "alice", "alice-phone")
	phone.publish(2)
	phones = phone.subscribe()
	phones.live()
	laptop.createRoom()
	laptops = laptop.subscribe()
	laptops.live()
	resp := must(laptop.claim(phone.user))(t)
	seq := laptop.commit(mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *resp.Clients[0].KeyPackage}})
	laptops.until(func() bool { return laptop.seq >= seq })
	phones.until(func() bool { return phone.group != nil })
	return n, laptop, phone, laptops, phones
}

func agree(t *testing.T, clients ...*testClient) {
	t.Helper()
	for _, c := range clients[1:] {
		if c.group.Epoch() != clients[0].group.Epoch() || !slices.Equal(c.group.EpochAuthenticator(), clients[0].group.EpochAuthenticator()) {
			t.Errorf("%s and %s disagree on epoch %d", c.uri, clients[0].uri, c.group.Epoch())
		}
	}
}

func TestHubOrdersMessagesOfOneNode(t *testing.T) {
	_, laptop, phone, laptops, phones := twoDevices(t)
	agree(t, laptop, phone)
	var sent []string
	for i := range 20 {
		from, text := laptop, fmt.Sprint("message ", i)
		if i%2 == 1 {
			from = phone
		}
		from.send(text)
		sent = append(sent, text)
	}
	last := laptop.send("end")
	laptops.until(func() bool { return laptop.seq >= last })
	phones.until(func() bool { return phone.seq >= last })
	var want []string
	for i := 1; i < 20; i += 2 {
		want = append(want, sent[i])
	}
	if !slices.Equal(laptop.texts, want) {
		t.Errorf("the laptop reads %q", laptop.texts)
	}
}

func TestConcurrentMessagesGetDistinctNumbersWithoutGaps(t *testing.T) {
	_, laptop, phone, _, phones := twoDevices(t)
	const n = 40
	sealed := make([]*mimi.SubmitMessageRequest, n)
	for i := range sealed {
		sealed[i] = laptop.seal(fmt.Sprint(i))
	}
	seqs := make([]uint64, n)
	var group sync.WaitGroup
	for i := range sealed {
		group.Go(func() {
			resp, seq, err := laptop.submit(sealed[i])
			if err != nil || resp.Code != mimi.SubmitAccepted {
				t.Errorf("message %d: %v, %v", i, resp, err)
			}
			seqs[i] = seq
		})
	}
	group.Wait()
	start := phone.seq
	phones.until(func() bool { return phone.seq >= start+n })
	slices.Sort(seqs)
	for i, seq := range seqs {
		if seq != start+1+uint64(i) {
			t.Fatalf("the numbers are %v", seqs)
		}
	}
	if len(phone.texts) != n {
		t.Errorf("the phone has %d messages", len(phone.texts))
	}
}

func TestRepeatedSubmissionsGetTheFirstAnswer(t *testing.T) {
	n, laptop, phone, laptops, phones := twoDevices(t)
	message := laptop.seal("once")
	first, seq, err := laptop.submit(message)
	if err != nil {
		t.Fatal(err)
	}
	staged, err := laptop.group.Commit(nil, mls.CommitOptions{ForcePath: true})
	if err != nil {
		t.Fatal(err)
	}
	commit := bundle(staged)
	committed, commitSeq, err := laptop.update(commit)
	if err != nil || committed.Code != mimi.UpdateSuccess {
		t.Fatal(committed, err)
	}
	laptops.until(func() bool { return laptop.seq >= commitSeq })
	later := laptop.commit()
	laptops.until(func() bool { return laptop.seq >= later })
	check := func() {
		t.Helper()
		again, seqAgain, err := laptop.submit(message)
		if err != nil || seqAgain != seq || again.Code != mimi.SubmitAccepted || again.AcceptedTimestamp != first.AcceptedTimestamp {
			t.Errorf("the message again: %+v, %d, %v; first %+v, %d", again, seqAgain, err, first, seq)
		}
		commitAgain, commitSeqAgain, err := laptop.update(commit)
		if err != nil || commitSeqAgain != commitSeq || commitAgain.Code != mimi.UpdateSuccess || commitAgain.AcceptedTimestamp != committed.AcceptedTimestamp {
			t.Errorf("the commit again: %+v, %d, %v", commitAgain, commitSeqAgain, err)
		}
	}
	check()
	phones.until(func() bool { return phone.seq >= later })
	if len(phone.texts) != 1 {
		t.Errorf("the phone reads %q", phone.texts)
	}
	n.stop()
	n.start()
	laptop.authenticate()
	check()
}

func TestOneCommitWinsAnEpoch(t *testing.T) {
	_, laptop, phone, laptops, phones := twoDevices(t)
	epoch := laptop.group.Epoch()
	var requests []*mimi.UpdateRequest
	for _, c := range []*testClient{laptop, phone} {
		p, err := c.group.Commit(nil, mls.CommitOptions{ForcePath: true})
		if err != nil {
			t.Fatal(err)
		}
		requests = append(requests, bundle(p))
	}
	responses := make([]*mimi.UpdateRoomResponse, 2)
	var group sync.WaitGroup
	for i, c := range []*testClient{laptop, phone} {
		group.Go(func() {
			resp, _, err := c.update(requests[i])
			if err != nil {
				t.Error(err)
			}
			responses[i] = resp
		})
	}
	group.Wait()
	codes := []mimi.UpdateResponseCode{responses[0].Code, responses[1].Code}
	slices.Sort(codes)
	if !slices.Equal(codes, []mimi.UpdateResponseCode{mimi.UpdateSuccess, mimi.UpdateWrongEpoch}) {
		t.Fatalf("the answers are %v", codes)
	}
	for _, r := range responses {
		if r.Code == mimi.UpdateWrongEpoch && r.CurrentEpoch != epoch+1 {
			t.Errorf("the loser hears of epoch %d, want %d", r.CurrentEpoch, epoch+1)
		}
	}
	laptops.until(func() bool { return laptop.group.Epoch() > epoch })
	phones.until(func() bool { return phone.group.Epoch() > epoch })
	agree(t, laptop, phone)
}

func TestMessagesOfAnOldEpochAreRefused(t *testing.T) {
	_, laptop, _, laptops, _ := twoDevices(t)
	old := laptop.seal("too late")
	seq := laptop.commit()
	laptops.until(func() bool { return laptop.seq >= seq })
	resp, _, err := laptop.submit(old)
	if err != nil || resp.Code != mimi.SubmitEpochTooOld || resp.CurrentEpoch != laptop.group.Epoch() {
		t.Errorf("a message of the last epoch: %+v, %v", resp, err)
	}
}

func TestRoomsAreCheckedWhenTheyAreCreated(t *testing.T) {
	n := newNode(t, "alpha")
	alice, eve := newClient(t, n, "alice", "alice-laptop"), newClient(t, n, "eve", "eve-laptop")
	room := must(mimi.RoomURI("alpha.example", "lunch"))(t)
	drop := func(e mls.ExtensionType) func(*mls.Extensions) {
		return func(ext *mls.Extensions) { *ext = ext.Remove(e) }
	}
	list := func(l mimi.ParticipantList) func(*mls.Extensions) {
		return func(ext *mls.Extensions) {
			*ext = ext.Set(mls.ExtensionAppDataDictionary, codec.Marshal(mimi.RoomDictionary(l, mimi.RoomMetadata{})))
		}
	}
	for _, c := range []struct {
		name string
		by   *testClient
		room mimi.URI
		edit func(*mls.Extensions)
		code string
	}{
		{"components that members need not support", alice, room, func(ext *mls.Extensions) {
			d := mls.AppDataDictionary(nil).Set(mimi.ComponentParticipantList, codec.Marshal(mimi.ParticipantList{{User: alice.user, Role: mimi.RoleAdmin}}))
			*ext = ext.Set(mls.ExtensionAppDataDictionary, codec.Marshal(d))
		}, "malformed"},
		{"another provider's room", alice, "mimi://beta.example/r/lunch", nil, "wrongProvider"},
		{"not a room", alice, "mimi://alpha.example/u/lunch", nil, "malformed"},
		{"no hub", alice, room, drop(mls.ExtensionExternalSenders), "malformed"},
		{"another hub", alice, room, func(ext *mls.Extensions) {
			pub := must(testSuite.GenerateSignatureKey(rand.Reader))(t).Public()
			other := mls.ExternalSender{
				SignatureKey: must(testSuite.SignaturePublicKey(pub))(t),
				Credential:   mls.X509Credential(must(n.service.IssueHub(t.Context(), pub))(t)),
			}
			*ext = ext.Set(mls.ExtensionExternalSenders, codec.Marshal(mls.ExternalSenders{other}))
		}, "malformed"},
		{"no required capabilities", alice, room, drop(mls.ExtensionRequiredCapabilities), "malformed"},
		{"no participant list", alice, room, drop(mls.ExtensionAppDataDictionary), "malformed"},
		{"somebody else as participant", alice, room, list(mimi.ParticipantList{{User: eve.user, Role: mimi.RoleAdmin}}), "notAllowed"},
		{"no administrator", alice, room, list(mimi.ParticipantList{{User: alice.user, Role: mimi.RoleMember}}), "notAllowed"},
		{"more participants", alice, room, list(mimi.ParticipantList{{User: alice.user, Role: mimi.RoleAdmin}, {User: eve.user, Role: mimi.RoleMember}}), "notAllowed"},
	} {
		group := c.room
		if group.Kind() != mimi.KindRoom {
			group = room
		}
		if got := code(c.by.tryCreate(c.room, c.by.newGroup(group, c.edit))); got != c.code {
			t.Errorf("%s: %q, want %q", c.name, got, c.code)
		}
	}
	g := alice.newGroup(room, nil)
	if got := code(eve.tryCreate(room, g)); got != "notAllowed" {
		t.Errorf("a group of somebody else: %q", got)
	}
	other := must(mimi.RoomURI("alpha.example", "other"))(t)
	if got := code(alice.tryCreate(other, g)); got != "malformed" {
		t.Errorf("a group of another room: %q", got)
	}
	if list := must(alice.api.Rooms(t.Context(), connect.NewRequest(&api.RoomsRequest{})))(t).Msg.Rooms; len(list) != 0 {
		t.Errorf("refused rooms are there: %v", list)
	}
	for range 2 { // the same request again is no error
		if err := alice.tryCreate(room, g); err != nil {
			t.Fatal(err)
		}
	}
	if got := code(alice.tryCreate(room, alice.newGroup(room, nil))); got != "alreadyExists" {
		t.Errorf("a second room of the name: %q", got)
	}
}

// What a hub can compute of a GroupInfo and of the ratchet tree needs not be sent: who joins gets the same as with all of it.
func TestAHubMakesTheGroupInfoFromAPartOfIt(t *testing.T) {
	_, laptop, phone, laptops, phones := twoDevices(t)
	for name, tree := range map[string]mimi.RatchetTreeOption{
		"of the hub":     mimi.HubRatchetTree(),
		"from elsewhere": {Representation: mimi.RatchetTreeOutOfBand, Signature: []byte("somebody's")},
	} {
		p, err := laptop.group.Commit(nil, mls.CommitOptions{ForcePath: true})
		if err != nil {
			t.Fatal(err)
		}
		full, treeHash := codec.Marshal(p.GroupInfo()), p.GroupInfo().GroupContext.TreeHash
		req := bundle(p)
		req.Bundle.GroupInfo, req.Bundle.RatchetTree = mimi.SmallGroupInfo(p.GroupInfo()), tree
		resp, seq, err := laptop.update(req)
		if err != nil || resp.Code != mimi.UpdateSuccess {
			t.Fatalf("a tree %s: %+v, %v", name, resp, err)
		}
		laptops.until(func() bool { return laptop.seq >= seq })
		phones.until(func() bool { return phone.seq >= seq })
		agree(t, laptop, phone)
		_, plain, err := phone.groupInfo()
		if err != nil || !bytes.Equal(codec.Marshal(plain.GroupInfo), full) || !bytes.Equal(plain.RatchetTree.Tree.Hash(testSuite), treeHash) {
			t.Errorf("a tree %s: the hub gives another GroupInfo or tree than the committer made: %v", name, err)
		}
	}
}
