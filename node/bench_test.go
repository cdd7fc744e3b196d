package node

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// BenchmarkHubOrdersMessages measures the hub alone, without a network: checked, numbered and on disk, with and without a
// frank, and with the signed head that goes with the answer. Submitters are as many as -cpu times 16, for the sync is shared.
func BenchmarkHubOrdersMessages(b *testing.B) {
	b.Run("bytes", func(b *testing.B) {
		benchmarkOrder(b, false, func(alice *testClient) *mls.PrivateMessage {
			alice.createRoom()
			return alice.seal(string(make([]byte, 1024))).Message.Private
		})
	})
	b.Run("signed", func(b *testing.B) {
		benchmarkOrder(b, true, func(alice *testClient) *mls.PrivateMessage {
			alice.createRoom()
			return alice.seal(string(make([]byte, 1024))).Message.Private
		})
	})
	b.Run("franked", func(b *testing.B) {
		benchmarkOrder(b, false, func(alice *testClient) *mls.PrivateMessage {
			alice.createFranked()
			_, _, q := alice.sealContent(string(make([]byte, 1024)))
			return q.Message.Private
		})
	})
}

func benchmarkOrder(b *testing.B, heads bool, seal func(alice *testClient) *mls.PrivateMessage) {
	n := newNode(b, "alpha")
	alice := newClient(b, n, "alice", "alice-laptop")
	sealed := seal(alice)
	by := submitter{domain: "alpha.example", user: alice.user, client: alice.uri}
	var next atomic.Uint64
	b.SetParallelism(16)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			m := *sealed // another ciphertext, as far as the hub can see
			m.Ciphertext = append(be64(next.Add(1)), sealed.Ciphertext[8:]...)
			body := codec.Marshal(&mimi.SubmitMessageRequest{Message: mls.NewMLSMessage(&m), Sender: alice.user})
			resp, _, err := n.submitMessage(by, alice.room, body)
			if err != nil || resp.Code != mimi.SubmitAccepted {
				b.Errorf("%+v, %v", resp, err)
				return
			}
			if heads && n.lastHead(alice.room) == nil {
				b.Error("no head")
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "messages/s")
}

// anyone takes every credential, so that a room can be full of one client.
type anyone struct{}

func (anyone) VerifyCredential(mls.Credential, []byte, mls.CipherSuite) error { return nil }
func (anyone) ValidSuccessor(_, _ mls.Credential) error                       { return nil }
func (anyone) Identity(mls.Credential) ([]byte, error)                        { return nil, nil }

// BenchmarkUpdateRequest says how large the request of a commit is that renews a leaf in a room of so many clients, each of a
// user of its own and with a certificate: with all of GroupInfo and ratchet tree, with what the hub can't compute, and the
// commit by itself. All but the committer were just added, which makes the commit as long as it gets.
func BenchmarkUpdateRequest(b *testing.B) {
	alice := newClient(b, newNode(b, "alpha"), "alice", "alice-laptop")
	for _, clients := range []int{100, 1000} {
		b.Run(fmt.Sprint(clients), func(b *testing.B) {
			list := mimi.ParticipantList{{User: alice.user, Role: mimi.RoleAdmin}}
			for i := range clients - 1 {
				list = append(list, mimi.Participant{User: must(mimi.UserURI("alpha.example", fmt.Sprint("user", i)))(b), Role: mimi.RoleMember})
			}
			room := must(mimi.RoomURI("alpha.example", "large"))(b)
			options := mls.KeyPackageOptions{Suite: testSuite, Credential: mls.X509Credential(alice.chain), Signer: alice.signer, LeafExtensions: mimi.LeafExtensions()}
			g := must(mls.NewGroup(mls.Config{Verifier: anyone{}, Components: mimi.Components()}, nil, mls.GroupOptions{
				GroupID: []byte(room.Group()), Suite: testSuite, Credential: options.Credential, Signer: alice.signer, LeafExtensions: options.LeafExtensions,
				Extensions: mls.Extensions{{Type: mls.ExtensionAppDataDictionary, Data: codec.Marshal(mimi.RoomDictionary(list, mimi.RoomMetadata{RoomURI: string(room)}))}},
			}))(b)
			var adds []mls.Proposal
			for range clients - 1 {
				_, options.Signer, _ = ed25519.GenerateKey(rand.Reader)
				kp, _, err := mls.NewKeyPackage(options)
				if err != nil {
					b.Fatal(err)
				}
				adds = append(adds, mls.Proposal{Type: mls.ProposalAdd, Add: &mls.Add{KeyPackage: *kp}})
			}
			must(g.Commit(nil, mls.CommitOptions{Proposals: adds}))(b)
			if err := g.Confirm(nil); err != nil {
				b.Fatal(err)
			}
			p := must(g.Commit(nil, mls.CommitOptions{ForcePath: true}))(b)
			small := mimi.UpdateRequest{Bundle: mimi.HandshakeBundle{
				Message: p.Message(), GroupInfo: mimi.SmallGroupInfo(p.GroupInfo()), RatchetTree: mimi.HubRatchetTree(),
			}}
			for b.Loop() {
				codec.Marshal(small)
			}
			b.ReportMetric(float64(len(codec.Marshal(bundle(p)))), "B/full")
			b.ReportMetric(float64(len(codec.Marshal(small))), "B/small")
			b.ReportMetric(float64(len(codec.Marshal(p.Message()))), "B/commit")
		})
	}
}
