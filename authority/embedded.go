package authority

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	stepca "github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/cas/softcas"
)

// Embedded is the Service that runs in the node, on an embedded smallstep authority. Its state is in the node's store;
// its keys are in a directory that Init made.
type Embedded struct {
	domain       string
	roots        []*x509.Certificate
	intermediate *x509.Certificate

	ca       *stepca.Authority
	ledger   *ledger
	store    Store
	verifier *Verifier // of the own bundle
	carrier  *x509.CertificateRequest
	log      *slog.Logger
	rand     io.Reader
	time     func() time.Time

	bundle atomic.Pointer[Bundle] // the last durable one; set under reload
	reload sync.Mutex

	observers struct {
		sync.RWMutex
		revoke []func(*Certificate)
		bundle []func(*Bundle)
	}

	stop    context.CancelFunc
	stopped sync.WaitGroup
	close   sync.Once
}

var _ Service = (*Embedded)(nil)

// How revocation lists are kept fresh and the store small.
const (
	listLifetime  = 7 * 24 * time.Hour
	maintainEvery = time.Hour
	// retention is how long expired certificates and invitations are remembered.
	retention = 30 * 24 * time.Hour
)

// settings are Open's with what a test replaces.
type settings struct {
	rand io.Reader
	time func() time.Time
}

// Open opens the authority in dir, with its state in store under StorePrefix. The store must outlive it. The error
// is fs.ErrNotExist if there is no authority in dir.
func Open(dir string, store Store, log *slog.Logger) (*Embedded, error) {
	return open(dir, store, log, settings{rand: rand.Reader, time: time.Now})
}

func open(dir string, store Store, log *slog.Logger, set settings) (*Embedded, error) {
	e, err := newEmbedded(dir, store, log, set)
	if err != nil {
		return nil, fmt.Errorf("authority: open %s: %w", dir, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.stop = cancel
	e.stopped.Go(func() { e.maintain(ctx) })
	return e, nil
}

func newEmbedded(dir string, store Store, log *slog.Logger, set settings) (*Embedded, error) {
	f, err := readFiles(dir)
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	e := &Embedded{domain: f.domain, roots: f.roots, intermediate: f.intermediate, store: store, ledger: newLedger(store),
		log: log, rand: set.rand, time: set.time}
	e.ledger.replaceCRL = e.replaceList
	e.verifier = &Verifier{Time: set.time, Bundles: func(domain string) *Bundle {
		if domain != e.domain {
			return nil
		}
		return e.bundle.Load()
	}}
	if e.carrier, err = newCarrier(set.rand); err != nil {
		return nil, err
	}
	cfg := &config.Config{
		DNSNames:        []string{f.domain},
		AuthorityConfig: &config.AuthConfig{Backdate: &provisioner.Duration{Duration: backdate}},
		CRL: &config.CRLConfig{
			CacheDuration: &provisioner.Duration{Duration: listLifetime},
			IDPurl:        "https://" + f.domain + "/parley/v1/bundle",
		},
	}
	e.ca, err = stepca.NewEmbedded(stepca.WithConfig(cfg), stepca.WithX509RootCerts(f.roots...),
		stepca.WithX509IntermediateCerts(f.intermediate),
		stepca.WithX509CAService(certifier{&softcas.SoftCAS{CertificateChain: []*x509.Certificate{f.intermediate}, Signer: f.key}}),
		stepca.WithDatabase(e.ledger), stepca.WithQuietInit(),
		stepca.WithX509Enforcers(provisioner.CertificateEnforcer(exactNames(f.domain))))
	if err != nil {
		return nil, fmt.Errorf("start the certificate authority: %w", err)
	}
	// Lists are made on revocation and by maintain: with this set before, smallstep would make one at every start,
	// and with it a new bundle for all peers.
	cfg.CRL.Enabled = true
	if err := e.initBundle(); err != nil {
		return nil, err
	}
	return e, nil
}

// newCarrier makes the request in which a public key passes through smallstep, which wants every request signed by a key
// that Go knows: a node's or hub's, for which the authority is asked by its own node, and a client's of ML-DSA.
func newCarrier(rand io.Reader) (*x509.CertificateRequest, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand)
	if err != nil {
		return nil, fmt.Errorf("generate a key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make a request: %w", err)
	}
	return x509.ParseCertificateRequest(der)
}

// exactNames is the last check before smallstep signs: every name is of the domain itself.
type exactNames string

// Enforce implements provisioner.CertificateEnforcer.
func (domain exactNames) Enforce(t *x509.Certificate) error {
	for _, n := range t.DNSNames {
		if n != string(domain) {
			return fmt.Errorf("%w: %s", ErrForeignName, n)
		}
	}
	for _, u := range t.URIs {
		if u.Host != string(domain) {
			return fmt.Errorf("%w: %s", ErrForeignName, u)
		}
	}
	if len(t.URIs) == 0 || len(t.EmailAddresses)+len(t.IPAddresses)+len(t.ExtraExtensions) > 0 || t.IsCA {
		return ErrName
	}
	return nil
}

// Close stops the authority; the store stays open. It may be called again.
func (e *Embedded) Close() error {
	var err error
	e.close.Do(func() {
		e.stop()
		e.stopped.Wait()
		err = e.ca.Shutdown()
	})
	return err
}

// Domain implements Service.
func (e *Embedded) Domain() string { return e.domain }

// Root returns the fingerprint of the root, which is what peers approve.
func (e *Embedded) Root() Fingerprint { return FingerprintOf(e.roots[0]) }

// Address returns where the provider's node is reached, as invitations say; empty if it never ran.
func (e *Embedded) Address() (string, error) {
	b, err := e.store.Get([]byte(addressKey))
	return string(b), err
}

// SetAddress sets the host:port at which the provider's node is reached. It is kept, so that invitations made while
// the node is down have it too.
func (e *Embedded) SetAddress(address string) error {
	if len(address) > maxAddress {
		return fmt.Errorf("%w: address of %d bytes", ErrRequest, len(address))
	}
	old, err := e.Address()
	if err != nil || old == address {
		return err
	}
	_, err = e.store.Commit(map[string][]byte{addressKey: []byte(address)}, nil)
	return err
}

// OnRevoke adds fn to what is called with each certificate that was revoked, once that is durable and in the bundle, and
// again when it is revoked again. fn is called in Revoke's goroutine.
func (e *Embedded) OnRevoke(fn func(*Certificate)) {
	e.observers.Lock()
	defer e.observers.Unlock()
	e.observers.revoke = append(e.observers.revoke, fn)
}

// OnBundle adds fn to what is called with every new bundle, once it is durable: after a revocation, and when lists are
// renewed or successors announced.
func (e *Embedded) OnBundle(fn func(*Bundle)) {
	e.observers.Lock()
	defer e.observers.Unlock()
	e.observers.bundle = append(e.observers.bundle, fn)
}

// Verifier returns a verifier that knows this provider only.
func (e *Embedded) Verifier() *Verifier { return e.verifier }

// Bundle implements Service.
func (e *Embedded) Bundle(context.Context) (*Bundle, error) { return e.bundle.Load(), nil }

// Announce replaces the announced successors of the roots: peers will accept a later bundle with these.
func (e *Embedded) Announce(_ context.Context, successors []Fingerprint) error {
	err := e.replaceBundle(nil, func(p *bundleParts) { p.successors = slices.Clone(successors) })
	if err != nil {
		return fmt.Errorf("authority: announce successors: %w", err)
	}
	return nil
}

// initBundle loads the bundle, or makes the next one if there is none or the files have changed.
func (e *Embedded) initBundle() error {
	if err := e.reloadBundle(); err != nil {
		return err
	}
	b := e.bundle.Load()
	if b == nil || !slices.EqualFunc(b.roots, e.roots, (*x509.Certificate).Equal) || !containsCertificate(b.intermediates, e.intermediate) {
		if err := e.replaceBundle(nil, func(*bundleParts) {}); err != nil {
			return fmt.Errorf("make the trust bundle: %w", err)
		}
		b = e.bundle.Load()
	}
	// Revocations that were acknowledged are in the list; others may have been left out by a crash.
	missing, err := e.unlisted(b)
	if err != nil || !missing {
		return err
	}
	return e.regenerate()
}

// unlisted says whether a revoked certificate that hasn't expired is missing from the bundle.
func (e *Embedded) unlisted(b *Bundle) (bool, error) {
	rows, err := e.ledger.GetRevokedCertificates()
	if err != nil {
		return false, fmt.Errorf("read revocations: %w", err)
	}
	for _, r := range *rows {
		n, ok := decimalSerial(r.Serial)
		if ok && e.time().Before(r.ExpiresAt) && !b.Revoked(serialString(n)) {
			return true, nil
		}
	}
	return false, nil
}

// regenerate makes a new revocation list, and with it a new bundle.
func (e *Embedded) regenerate() error {
	if err := e.ca.GenerateCertificateRevocationList(); err != nil {
		return fmt.Errorf("make the revocation list: %w", err)
	}
	return nil
}

// replaceList puts a new list in the bundle; rows are committed with it. Lists of former issuers stay.
func (e *Embedded) replaceList(list *x509.RevocationList, rows map[string][]byte) error {
	return e.replaceBundle(rows, func(p *bundleParts) {
		lists := []*x509.RevocationList{list}
		for _, l := range p.lists {
			if !bytes.Equal(l.AuthorityKeyId, list.AuthorityKeyId) {
				lists = append(lists, l)
			}
		}
		p.lists = lists
	})
}

// replaceBundle commits the next bundle, changed by edit, together with rows.
func (e *Embedded) replaceBundle(rows map[string][]byte, edit func(*bundleParts)) error {
	for range maxAttempts {
		old, err := e.store.Get([]byte(bundleKey))
		if err != nil {
			return err
		}
		p := bundleParts{domain: e.domain, sequence: 1, refresh: DefaultRefresh, roots: e.roots, intermediates: []*x509.Certificate{e.intermediate}}
		if old != nil {
			last, err := ParseBundle(old)
			if err != nil {
				return fmt.Errorf("stored bundle: %w", err)
			}
			p.sequence, p.successors = last.sequence+1, last.successors
			// What a former intermediate issued stays good until it expires.
			for _, c := range last.intermediates {
				if !containsCertificate(p.intermediates, c) && c.NotAfter.After(e.time()) && issuedBy(c, e.roots) && len(p.intermediates) < maxIssuers {
					p.intermediates = append(p.intermediates, c)
				}
			}
			for _, l := range last.lists {
				if _, err := listIssuer(l, slices.Concat(p.intermediates, p.roots)); err == nil {
					p.lists = append(p.lists, l)
				}
			}
		}
		edit(&p)
		b, err := newBundle(p)
		if err != nil {
			return err
		}
		if len(b.JSON()) > MaxBundle {
			return fmt.Errorf("%w: %d bytes", ErrBundle, len(b.JSON()))
		}
		changes := map[string][]byte{bundleKey: b.JSON()}
		for k, v := range rows {
			changes[k] = v
		}
		ok, err := e.store.Commit(changes, map[string][]byte{bundleKey: old})
		if err != nil {
			return err
		}
		if ok {
			if err := e.reloadBundle(); err != nil {
				return err
			}
			e.notifyBundle(b)
			return nil
		}
	}
	return errConflict
}

// reloadBundle reads the stored bundle, so that the one in memory is never older than what was acknowledged.
func (e *Embedded) reloadBundle() error {
	e.reload.Lock()
	defer e.reload.Unlock()
	doc, err := e.store.Get([]byte(bundleKey))
	if err != nil {
		return fmt.Errorf("read the trust bundle: %w", err)
	}
	if doc == nil {
		return nil
	}
	b, err := ParseBundle(doc)
	if err != nil {
		return fmt.Errorf("read the trust bundle: %w", err)
	}
	e.bundle.Store(b)
	return nil
}

func (e *Embedded) notifyBundle(b *Bundle) {
	e.observers.RLock()
	defer e.observers.RUnlock()
	for _, fn := range e.observers.bundle {
		fn(b)
	}
}

func containsCertificate(certs []*x509.Certificate, c *x509.Certificate) bool {
	return slices.ContainsFunc(certs, func(o *x509.Certificate) bool { return o.Equal(c) })
}

// maintain renews the revocation list at half its lifetime, and forgets what expired long ago.
func (e *Embedded) maintain(ctx context.Context) {
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := errors.Join(e.freshen(), e.purge()); err != nil {
			e.log.Error("authority: maintenance", "err", err)
		}
	}
}

func (e *Embedded) freshen() error {
	b := e.bundle.Load()
	for i, l := range b.lists {
		if b.issuer(i).Equal(e.intermediate) && e.time().After(l.ThisUpdate.Add(listLifetime/2)) {
			return e.regenerate()
		}
	}
	return nil
}

// maxAttempts bounds how often a compare-and-swap is tried.
const maxAttempts = 32
