package client

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// profile is who the device is and where its node is.
type profile struct {
	Format  int             `json:"format"`
	Domain  string          `json:"domain"`
	Address string          `json:"address"` // of the node, host:port
	Root    []byte          `json:"root"`    // fingerprint from the invitation, the anchor of all trust
	User    mimi.URI        `json:"user"`
	Client  mimi.URI        `json:"client"`
	Suite   mls.CipherSuite `json:"suite"`
	Key     secretBytes     `json:"key"`           // PKCS #8
	Chain   [][]byte        `json:"chain"`         // DER, leaf first; empty until the enrolment is done
	CSR     []byte          `json:"csr,omitempty"` // of an enrolment whose answer isn't known: sent again as it is
}

// secretBytes is key material that formatted output and logs don't show.
type secretBytes []byte

func (secretBytes) String() string { return "[redacted]" }

// GoString implements fmt.GoStringer.
func (secretBytes) GoString() string { return "[redacted]" }

const profileFormat = 1

func newProfile(o Options, inv authority.Invitation, id mimi.URI) (profile, error) {
	signer, err := o.Suite.GenerateSignatureKey(o.Rand)
	if err != nil {
		return profile{}, fmt.Errorf("client: generate the signature key: %w", err)
	}
	key, err := authority.MarshalPrivateKey(signer)
	if err != nil {
		return profile{}, fmt.Errorf("client: encode the signature key: %w", err)
	}
	return profile{
		Format: profileFormat, Domain: inv.Domain, Address: inv.Address, Root: inv.Root[:],
		User: inv.User, Client: id, Suite: o.Suite, Key: key,
	}, nil
}

// loadProfile fails with ErrNotEnrolled if there is none.
func loadProfile(db store.Store) (profile, error) {
	b, err := db.Get(keyProfile)
	if err != nil {
		return profile{}, fmt.Errorf("client: read the profile: %w", err)
	}
	if b == nil {
		return profile{}, fmt.Errorf("client: %w", ErrNotEnrolled)
	}
	var p profile
	if err := json.Unmarshal(b, &p); err != nil {
		return profile{}, fmt.Errorf("client: read the profile: %w", err)
	}
	if p.Format != profileFormat {
		return profile{}, fmt.Errorf("client: the state has format %d, this program reads %d", p.Format, profileFormat)
	}
	return p, nil
}

func (p profile) save(db store.Store) error {
	b, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("client: encode the profile: %w", err)
	}
	if _, err := db.Commit(map[string][]byte{string(keyProfile): b}, nil); err != nil {
		return fmt.Errorf("client: write the profile: %w", err)
	}
	return nil
}

func (p profile) signer() (crypto.Signer, error) {
	s, err := authority.ParsePrivateKey(p.Key)
	if err != nil {
		return nil, errors.New("client: the stored signature key is damaged")
	}
	return s, nil
}

func (c *Client) csr(p profile) ([]byte, error) {
	return authority.NewRequest(c.o.Rand, p.User, p.Client, c.signer)
}

// requestCredential exchanges the invitation's token for the credential and the trust bundle.
func (c *Client) requestCredential(ctx context.Context, token string) error {
	if c.profile.CSR == nil {
		csr, err := c.csr(c.profile)
		if err != nil {
			return err
		}
		c.profile.CSR = csr
		if err := c.profile.save(c.db); err != nil {
			return err
		}
	}
	res, err := open1(ctx, c.session.enrolment.Enrol, &api.EnrolRequest{Token: token, Csr: c.profile.CSR})
	if err != nil {
		return err
	}
	if err := c.trust.putOwn(c.db, res.Bundle); err != nil {
		return err
	}
	return c.adopt(res.Chain)
}

// adopt makes a chain that the provider issued the client's credential.
func (c *Client) adopt(chain [][]byte) error {
	c.mu.Lock()
	p := c.profile
	c.mu.Unlock()
	pub, err := p.Suite.SignaturePublicKey(c.signer.Public())
	if err != nil {
		return err
	}
	id, err := c.trust.verifier.VerifyKey(chain, p.Suite, pub, authority.PurposeClient)
	if err != nil {
		return fmt.Errorf("the credential that the provider issued: %w", err)
	}
	if id.User != p.User || id.Client != p.Client {
		return fmt.Errorf("the credential that the provider issued is for %s, %s", id.User, id.Client)
	}
	p.Chain, p.CSR = chain, nil
	if err := p.save(c.db); err != nil {
		return err
	}
	c.mu.Lock()
	c.profile = p
	c.mu.Unlock()
	return nil
}

// renewalDue says whether two thirds of the credential's lifetime are over.
func (c *Client) renewalDue() (bool, error) {
	c.mu.Lock()
	chain := c.profile.Chain
	c.mu.Unlock()
	id, err := authority.ParseIdentity(chain)
	if err != nil {
		return false, err
	}
	return c.o.Time().After(id.NotAfter.Add(-id.NotAfter.Sub(id.NotBefore) / 3)), nil
}

// renew gets a credential with a new lifetime, publishes KeyPackages with it and has the rooms take it over.
func (c *Client) renew(ctx context.Context) error {
	c.mu.Lock()
	p := c.profile
	c.mu.Unlock()
	csr, err := c.csr(p)
	if err != nil {
		return err
	}
	res, err := call(ctx, c.session, c.session.service.Renew, &api.RenewRequest{Csr: csr})
	if err != nil {
		return err
	}
	if err := c.adopt(res.Chain); err != nil {
		return err
	}
	c.log.Info("credential renewed", "client", p.Client)
	c.renewLeaves()
	return c.publishKeyPackages(ctx, true)
}

// DeleteDevice deletes a device of this user, which may be this one: its certificates are revoked, Run ends there with
// ErrRevoked, and the members of its rooms remove it, as their hubs propose.
func (c *Client) DeleteDevice(ctx context.Context, device mimi.URI) error {
	if _, err := call(ctx, c.session, c.session.service.DeleteClient, &api.DeleteClientRequest{Client: string(device)}); err != nil {
		return fmt.Errorf("client: delete %s: %w", device, err)
	}
	return nil
}

// renewalsAtOnce is how many rooms get new keys at a time because their policies ask for it.
const renewalsAtOnce = 16

// renewLeaves has the rooms take the present credential over where the own leaf has another one: after a renewal, if
// what was to follow it got lost in a restart, and after a Welcome for an older KeyPackage. Rooms whose policy asks for it
// get new keys when it is time, those that have waited longest first.
func (c *Client) renewLeaves() {
	cred, now := c.credential(), c.o.Time()
	due := make(map[*Room]time.Time)
	for _, r := range c.Rooms() {
		r.mu.Lock()
		waits := slices.ContainsFunc(r.jobs, func(j *job) bool { return j.renewal }) ||
			r.staged != nil && r.staged.job != nil && r.staged.job.renewal
		if r.usable() == nil && !waits {
			if m, ok := r.group.Member(r.group.OwnLeaf()); ok && !m.Leaf.Credential.Equal(cred) {
				r.renew(r.buildCredential)
			} else if at := r.renewalAt(); !at.IsZero() && !now.Before(at) {
				due[r] = at
			}
		}
		r.mu.Unlock()
	}
	rooms := slices.SortedFunc(maps.Keys(due), func(a, b *Room) int { return due[a].Compare(due[b]) })
	for _, r := range rooms[:min(len(rooms), renewalsAtOnce)] {
		r.mu.Lock()
		r.renew(buildUpdate)
		r.mu.Unlock()
	}
}

// renew has the worker renew the own leaf. mu is held.
func (r *Room) renew(build func(*mls.Group) (mls.CommitOptions, error)) {
	r.jobs = append(r.jobs, &job{build: build, done: make(chan error, 1), renewal: true})
	r.touch()
}

// lifetime is that of a KeyPackage: it ends with the credential, and before the node's longest in seconds, 0 if that
// isn't known.
func (c *Client) lifetime(longest uint64) mls.Lifetime {
	now := c.o.Time()
	l := mls.LifetimeFrom(now, mls.DefaultLifetime)
	if longest > 0 && longest < uint64(mls.MaxLifetime/time.Second) {
		// The node's clock may differ.
		l = mls.LifetimeFrom(now, min(mls.DefaultLifetime, time.Duration(longest)*time.Second-time.Hour))
	}
	if id, err := authority.ParseIdentity(c.credential().Certificates); err == nil {
		if end := uint64(max(0, id.NotAfter.Unix())); end < l.NotAfter {
			l.NotAfter = end
		}
	}
	return l
}

// rpcTimeout bounds one request to the node, and thereby how long an answer that got lost is waited for.
const rpcTimeout = 20 * time.Second
