package authority

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"

	stepca "github.com/smallstep/certificates/authority"

	"github.com/parley-mls/parley/federation/mimi"
)

const maxReason = 256 // bytes

// reasonCodes are the reasons that have a code in a revocation list (RFC 5280, Section 5.3.1); others are unspecified.
var reasonCodes = map[string]int{
	"keyCompromise": 1, "affiliationChanged": 3, "superseded": 4, "cessationOfOperation": 5, "privilegeWithdrawn": 9,
}

// decimalSerial reads a serial number in smallstep's form.
func decimalSerial(s string) (*big.Int, bool) { return new(big.Int).SetString(s, 10) }

// Revoke implements Service.
func (e *Embedded) Revoke(ctx context.Context, clientOrSerial string, reason string) (*Certificate, error) {
	c, err := e.revoke(ctx, clientOrSerial, reason)
	if err != nil {
		return nil, fmt.Errorf("authority: revoke %.600q: %w", clientOrSerial, err)
	}
	return c, nil
}

func (e *Embedded) revoke(ctx context.Context, name, reason string) (*Certificate, error) {
	if len(reason) > maxReason {
		return nil, fmt.Errorf("%w: reason of %d bytes", ErrRequest, len(reason))
	}
	find, err := e.finder(name)
	if err != nil {
		return nil, err
	}
	// A renewal may come between looking and revoking, so look until nothing valid is left: a revoked certificate
	// can't be renewed.
	var all []Certificate
	for {
		if all, err = find(); err != nil {
			return nil, err
		}
		if len(all) == 0 {
			return nil, ErrNotFound
		}
		left := false
		for _, c := range all {
			if c.Revoked.IsZero() && e.time().Before(c.NotAfter) {
				left = true
				if err := e.revokeOne(ctx, c.Serial, reason); err != nil {
					return nil, err
				}
			}
		}
		if !left {
			break
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	missing, err := e.unlisted(e.bundle.Load())
	if err != nil {
		return nil, err
	}
	if missing {
		if err := e.regenerate(); err != nil {
			return nil, err
		}
	}
	var newest *Certificate
	e.observers.RLock()
	observers := slices.Clone(e.observers.revoke)
	e.observers.RUnlock()
	for i := range all {
		c := &all[i]
		if c.Revoked.IsZero() {
			continue // it had expired before
		}
		for _, fn := range observers {
			fn(c)
		}
		if newest == nil || c.NotBefore.After(newest.NotBefore) {
			newest = c
		}
	}
	if newest == nil {
		return nil, fmt.Errorf("%w: all have expired", ErrNotFound)
	}
	return newest, nil
}

// finder returns what looks for the certificates that name means. For a user, it first withdraws the invitations.
func (e *Embedded) finder(name string) (func() ([]Certificate, error), error) {
	if !strings.Contains(name, ":") {
		n, ok := parseSerial(name)
		if !ok {
			return nil, fmt.Errorf("%w: neither a URI nor a serial number in lower-case hexadecimal", ErrRequest)
		}
		return func() ([]Certificate, error) {
			c, err := e.certificate(n.String())
			if err != nil || c == nil {
				return nil, err
			}
			return []Certificate{*c}, nil
		}, nil
	}
	u, err := mimi.ParseURI(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	switch {
	case u.Domain() != e.domain:
		return nil, fmt.Errorf("%w: %s is not of %s", ErrForeignName, u, e.domain)
	case u.Kind() == mimi.KindClient:
		return func() ([]Certificate, error) { return e.clientCertificates(u.ID()) }, nil
	case u.Kind() == mimi.KindUser:
		if err := e.withdraw(u); err != nil {
			return nil, err
		}
		return func() ([]Certificate, error) { return e.userCertificates(u) }, nil
	}
	return nil, fmt.Errorf("%w: %s is neither a user nor a client", ErrRequest, u)
}

// revokeOne has smallstep revoke one certificate durably.
func (e *Embedded) revokeOne(ctx context.Context, serial, reason string) error {
	n, _ := parseSerial(serial)
	crt, err := e.ledger.GetCertificate(n.String())
	if err != nil {
		return fmt.Errorf("read certificate %s: %w", serial, err)
	}
	// The method in the context lets the list's entry expire with the certificate. MTLS says that no smallstep
	// token authorises this.
	ctx = provisioner.NewContextWithMethod(ctx, provisioner.RevokeMethod)
	err = e.ca.Revoke(ctx, &stepca.RevokeOptions{Serial: n.String(), Reason: reason, ReasonCode: reasonCodes[reason], PassiveOnly: true, MTLS: true, Crt: crt})
	if err == nil {
		return nil
	}
	if revoked, e2 := e.ledger.IsRevoked(n.String()); e2 == nil && revoked {
		return nil // by someone else meanwhile
	}
	return fmt.Errorf("revoke certificate %s: %w", serial, err)
}

// certificate reads what is known of a certificate, nil if it isn't known. The serial number is in decimal.
func (e *Embedded) certificate(serial string) (*Certificate, error) {
	der, err := e.store.Get([]byte(tableKey(certificateTable, serial)))
	if err != nil || der == nil {
		return nil, err
	}
	return e.describe(serial, der)
}

func (e *Embedded) describe(serial string, der []byte) (*Certificate, error) {
	crt, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("stored certificate %s: %w", serial, err)
	}
	id, _, err := identify(crt)
	if err != nil {
		return nil, fmt.Errorf("stored certificate %s: %w", serial, err)
	}
	c := &Certificate{Serial: id.Serial, User: id.User, Client: id.Client, Node: id.Node, NotBefore: id.NotBefore, NotAfter: id.NotAfter}
	row, err := e.store.Get([]byte(tableKey(revokedTable, serial)))
	if err != nil || row == nil {
		return c, err
	}
	var info db.RevokedCertificateInfo
	if err := json.Unmarshal(row, &info); err != nil {
		return nil, fmt.Errorf("stored revocation of %s: %w", serial, err)
	}
	c.Revoked, c.Reason = info.RevokedAt, info.Reason
	return c, nil
}

// clientCertificates reads those of a client id of the domain.
func (e *Embedded) clientCertificates(id string) ([]Certificate, error) {
	var serials []string
	prefix := indexKeys + id + "/"
	err := e.store.Scan([]byte(prefix), prefixEnd(prefix), func(key, _ []byte) bool {
		serials = append(serials, string(key[len(prefix):]))
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("read the certificates of client %s: %w", id, err)
	}
	var out []Certificate
	for _, s := range serials {
		c, err := e.certificate(s)
		if err != nil {
			return nil, err
		}
		if c != nil {
			out = append(out, *c)
		}
	}
	return out, nil
}

func (e *Embedded) userCertificates(user mimi.URI) ([]Certificate, error) {
	var clients []string
	err := e.store.Scan([]byte(clientKeys), prefixEnd(clientKeys), func(key, value []byte) bool {
		if string(value) == string(user) {
			clients = append(clients, string(key[len(clientKeys):]))
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("read the clients of %s: %w", user, err)
	}
	var out []Certificate
	for _, id := range clients {
		certs, err := e.clientCertificates(id)
		if err != nil {
			return nil, err
		}
		out = append(out, certs...)
	}
	return out, nil
}

// withdraw deletes a user's invitations that were not used.
func (e *Embedded) withdraw(user mimi.URI) error {
	return e.deleteTokens(func(rec *tokenRecord) bool { return rec.User == user && rec.Serial == "" })
}

// deleteTokens deletes the invitations that drop picks. One that is used at the same moment stays.
func (e *Embedded) deleteTokens(drop func(*tokenRecord) bool) error {
	rows := make(map[string][]byte)
	err := e.store.Scan([]byte(tokenKeys), prefixEnd(tokenKeys), func(key, value []byte) bool {
		var rec tokenRecord
		if json.Unmarshal(value, &rec) == nil && drop(&rec) {
			rows[string(key)] = bytes.Clone(value)
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("read the invitations: %w", err)
	}
	for key, row := range rows {
		if _, err := e.store.Commit(map[string][]byte{key: nil}, map[string][]byte{key: row}); err != nil {
			return fmt.Errorf("delete an invitation: %w", err)
		}
	}
	return nil
}

// List implements Service.
func (e *Embedded) List(_ context.Context, f Filter) ([]Certificate, error) {
	out, err := e.list(f)
	if err != nil {
		return nil, fmt.Errorf("authority: list: %w", err)
	}
	slices.SortFunc(out, func(a, b Certificate) int {
		if c := a.NotBefore.Compare(b.NotBefore); c != 0 {
			return c
		}
		return strings.Compare(a.Serial, b.Serial)
	})
	return out, nil
}

func (e *Embedded) list(f Filter) ([]Certificate, error) {
	var all []Certificate
	var err error
	switch {
	case f.Serial != "":
		n, ok := parseSerial(f.Serial)
		if !ok {
			return nil, fmt.Errorf("%w: serial number %.100q is not in lower-case hexadecimal", ErrRequest, f.Serial)
		}
		var c *Certificate
		if c, err = e.certificate(n.String()); c != nil {
			all = []Certificate{*c}
		}
	case f.Client != "":
		if err := checkURI(f.Client, mimi.KindClient, e.domain); err != nil {
			return nil, err
		}
		all, err = e.clientCertificates(f.Client.ID())
	case f.User != "": // the clients of a user are found without a look at every certificate
		all, err = e.userCertificates(f.User)
	default:
		err = e.everyCertificate(func(serial string, der []byte) error {
			c, err := e.describe(serial, der)
			if err == nil && f.match(c) {
				all = append(all, *c)
			}
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(c Certificate) bool { return !f.match(&c) }), nil
}

// everyCertificate calls fn with every stored certificate. fn may keep der and may read the store.
func (e *Embedded) everyCertificate(fn func(serial string, der []byte) error) error {
	prefix := tableKey(certificateTable, "")
	start := []byte(prefix)
	for {
		const page = 256
		type row struct {
			serial string
			der    []byte
		}
		var rows []row
		err := e.store.Scan(start, prefixEnd(prefix), func(key, value []byte) bool {
			rows = append(rows, row{string(key[len(prefix):]), bytes.Clone(value)})
			return len(rows) < page
		})
		if err != nil {
			return fmt.Errorf("read the certificates: %w", err)
		}
		for _, r := range rows {
			if err := fn(r.serial, r.der); err != nil {
				return err
			}
		}
		if len(rows) < page {
			return nil
		}
		start = append([]byte(prefix+rows[page-1].serial), 0)
	}
}

// purge forgets certificates, their revocations and invitations that expired longer ago than retention. Which user a
// client belongs to is kept for ever, so that its name is never another's.
func (e *Embedded) purge() error {
	limit := e.time().Add(-retention)
	err := e.everyCertificate(func(serial string, der []byte) error {
		crt, err := x509.ParseCertificate(der)
		if err != nil || !crt.NotAfter.Before(limit) {
			return err
		}
		changes := map[string][]byte{
			tableKey(certificateTable, serial):     nil,
			tableKey(certificateDataTable, serial): nil,
			tableKey(revokedTable, serial):         nil,
		}
		if id, _, err := identify(crt); err == nil && id.Client != "" {
			changes[indexKeys+id.Client.ID()+"/"+serial] = nil
		}
		_, err = e.store.Commit(changes, nil)
		return err
	})
	return errors.Join(err, e.deleteTokens(func(rec *tokenRecord) bool { return rec.Expires.Before(limit) }))
}
