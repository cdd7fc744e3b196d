package node

import (
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
