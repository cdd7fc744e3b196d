package transport

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"testing"
	"time"
)

// nodeOfClients is a node at one address that can be started again. What is posted is answered, a GET never.
type nodeOfClients struct {
	t       *testing.T
	p       *provider
	address string
	key     string // for stateless resets
	*Endpoint
}

func (n *nodeOfClients) start() {
	n.t.Helper()
	var err error
	n.Endpoint, err = Listen(Config{
		Address: cmp.Or(n.address, "127.0.0.1:0"), Domain: n.p.domain, VerifyPeer: approve().verify,
		Certificate:       func() (*tls.Certificate, error) { return &n.p.cert, nil },
		StatelessResetKey: sha256.Sum256([]byte(n.key)), TokenKey: sha256.Sum256([]byte("token")),
		Clients: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				whoami(w, r)
				return
			}
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.address = n.Addr().String()
	go n.Serve(context.Background())
}

// kill ends the node as if its process were killed: nobody is told. What it holds is released later.
func (n *nodeOfClients) kill() {
	n.udp.Close()
	n.tcp.Close()
	go func(e *Endpoint) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		e.Shutdown(ctx)
	}(n.Endpoint)
}

// listening is a client with a stream open to the node.
func (n *nodeOfClients) listening(keepAlive time.Duration) (rt http.RoundTripper, stream io.Reader) {
	n.t.Helper()
	rt, closer, err := ClientRoundTripper(ClientOptions{
		Address: n.address, Domain: n.p.domain, KeepAlive: keepAlive,
		VerifyServer: func([]*x509.Certificate) error { return nil },
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { closer.Close() })
	req, err := http.NewRequestWithContext(testContext(n.t), http.MethodGet, "https://"+n.p.domain+"/", nil)
	if err != nil {
		n.t.Fatal(err)
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { resp.Body.Close() })
	return rt, resp.Body
}

func newNodeOfClients(t *testing.T) *nodeOfClients {
	n := &nodeOfClients{t: t, p: newProvider(t, "alpha.example")}
	n.start()
	t.Cleanup(func() { n.kill() })
	return n
}

// Most of the time a client only listens, and sends nothing that is as large as what a stateless reset answers.
func TestAClientThatOnlyListensNoticesARestart(t *testing.T) {
	n := newNodeOfClients(t)
	_, stream := n.listening(50 * time.Millisecond)
	time.Sleep(time.Second) // until the search for the path's MTU, whose packets are large, is over
	ended := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(stream)
		ended <- err
	}()
	n.kill()
	n.start()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the stream ended as if it were complete")
		}
	case <-time.After(5 * time.Second):
		t.Error("the client still listens to the process that was killed")
	}
}

// A node that stops says so, and takes no more requests on that connection, which lives as long as something is open on it.
func TestAClientLeavesAConnectionThatTakesNoMoreRequests(t *testing.T) {
	n := newNodeOfClients(t)
	rt, _ := n.listening(time.Minute)
	ctx, cancel := context.WithTimeout(testContext(t), 10*time.Second)
	defer cancel()
	go n.Shutdown(ctx)
	time.Sleep(100 * time.Millisecond) // until the client has heard it
	n.kill()
	n.key = "another" // so that nothing else tells the client
	n.start()
	if _, err := post(ctx, rt, "alpha.example", "x"); err != nil {
		t.Errorf("after the restart: %v", err)
	}
}
