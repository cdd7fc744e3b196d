package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"time"

	"github.com/parley-mls/parley/transport"
)

// Seed is where a peer may be reached: what the operator said when approving it.
type Seed struct {
	Domain  string
	Address string // host:port; empty if only records can tell
}

// State is what gossip makes of a peer. It is a hint: nothing waits for it.
type State string

// The states of a peer.
const (
	StateAlive   State = "alive"
	StateSuspect State = "suspect"
	StateDead    State = "dead"
	StateLeft    State = "left"    // the peer said that it was stopping
	StateUnknown State = "unknown" // never heard of since the start
)

// Member is an approved peer as gossip sees it.
type Member struct {
	Domain  string
	Address string // host:port; empty if not known
	State   State
	Since   time.Time // of the state
}

// GossipConfig configures a Gossip. All fields but Seeds, OnPeer, OnUnapproved, Log, Version and Profile are required.
type GossipConfig struct {
	Endpoint     *transport.Endpoint
	Domain       string                                               // own domain
	Advertise    string                                               // host:port where peers reach this node
	Version      string                                               // of the software, for the own record
	Certificate  func() (*tls.Certificate, error)                     // the node's, with its chain including the root
	Verify       func([]*x509.Certificate) (domain string, err error) // approves a node's chain
	Seeds        func() []Seed                                        // the approved peers
	Store        Store                                                // keys under "g/"
	OnPeer       func(domain, address string, alive bool)             // a peer came (again) or went; must not block
	OnUnapproved func(Record)                                         // a record was heard of a node that isn't approved; must not block
	Log          *slog.Logger
	Profile      string // "lan" (the default), "wan", or "local" for loopback and tests
}

// Gossip keeps nodes that approve each other informed of each other's addresses and liveness.
type Gossip struct{ cfg GossipConfig }

// NewGossip registers gossip with the Endpoint, so it comes before Endpoint.Serve.
func NewGossip(cfg GossipConfig) (*Gossip, error) {
	return &Gossip{cfg: cfg}, errors.New("gossip: under construction")
}

// Run gossips until ctx ends.
func (g *Gossip) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Members returns the approved peers, by domain.
func (g *Gossip) Members() []Member { return nil }

// Address returns the last address of a peer that is known to be good, also from before a restart.
func (g *Gossip) Address(domain string) (string, bool) { return "", false }

// Unapproved returns the newest records of nodes that aren't approved, by domain.
func (g *Gossip) Unapproved() []Record { return nil }

// Refresh is called when approvals have changed.
func (g *Gossip) Refresh() {}
