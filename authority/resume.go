package authority

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql/database"
)

// maxResume bounds how far a bundle's sequence number may be ahead of the own one: nobody signs it.
const maxResume = 1 << 32

// Resume has the authority go on from a bundle that it published and that its store, which was restored from a backup, knows
// nothing of. Whoever has it isn't believed but for what the own issuers have signed: what that revokes stays revoked, the
// next bundle and revocation list come after it, and what intermediates of later have issued stays good. A sequence number
// that is too high harms nobody. changed says that there is a new bundle. It fails with ErrBundle if the bundle isn't one of
// this authority, or is too far ahead to be.
func (e *Embedded) Resume(_ context.Context, known *Bundle) (changed bool, err error) {
	if err := e.resumable(known); err != nil {
		return false, fmt.Errorf("authority: resume: %w", err)
	}
	own := e.bundle.Load()
	rows, err := e.missed(own, known)
	if err == nil {
		err = e.resumeNumber(known, rows)
	}
	if err != nil {
		return false, fmt.Errorf("authority: resume: %w", err)
	}
	if len(rows) == 0 && !own.listsBehind(known) && (known.sequence < own.sequence || bytes.Equal(known.JSON(), own.JSON())) {
		return false, nil
	}
	err = e.replaceBundle(rows, func(p *bundleParts) {
		p.sequence = max(p.sequence, known.sequence+1)
		for _, c := range known.intermediates {
			if !containsCertificate(p.intermediates, c) && len(p.intermediates) < maxIssuers {
				p.intermediates = append(p.intermediates, c)
			}
		}
		for i, l := range known.lists {
			if !known.issuer(i).Equal(e.intermediate) {
				p.lists = laterList(p.lists, l)
			}
		}
	})
	if err == nil {
		err = e.regenerate()
	}
	if err == nil {
		err = e.announce(rows)
	}
	if err != nil {
		return false, fmt.Errorf("authority: resume: %w", err)
	}
	return true, nil
}

// announce tells observers of the revocations among rows, of certificates that are known here.
func (e *Embedded) announce(rows map[string][]byte) error {
	e.observers.RLock()
	observers := slices.Clone(e.observers.revoke)
	e.observers.RUnlock()
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		serial, ok := strings.CutPrefix(key, tableKey(revokedTable, ""))
		if !ok {
			continue
		}
		c, err := e.certificate(serial)
		if err != nil {
			return err
		}
		for _, fn := range observers {
			if c != nil {
				fn(c)
			}
		}
	}
	return nil
}

// resumable says why a bundle can't be one that this authority has published.
func (e *Embedded) resumable(known *Bundle) error {
	if known.domain != e.domain {
		return fmt.Errorf("%w: it is of %s", ErrBundle, known.domain)
	}
	for _, r := range known.roots {
		if !containsCertificate(e.roots, r) {
			return fmt.Errorf("%w: another root than the own ones", ErrBundle)
		}
	}
	if own := e.bundle.Load(); known.sequence > own.sequence+maxResume {
		return fmt.Errorf("%w: sequence %d, the own one is %d", ErrBundle, known.sequence, own.sequence)
	}
	return nil
}

// missed returns rows for the revocations of a bundle that aren't known here.
func (e *Embedded) missed(own, known *Bundle) (map[string][]byte, error) {
	rows := make(map[string][]byte)
	for _, l := range known.lists {
		for _, r := range l.RevokedCertificateEntries {
			serial := r.SerialNumber.String()
			key := tableKey(revokedTable, serial)
			if have, err := e.store.Get([]byte(key)); err != nil {
				return nil, fmt.Errorf("read the revocation of %s: %w", serial, err)
			} else if have != nil || own.Revoked(serialString(r.SerialNumber)) {
				continue
			}
			// It was valid when it was revoked, and no certificate is valid for longer than a hub's.
			info := &db.RevokedCertificateInfo{
				Serial: serial, ReasonCode: r.ReasonCode, RevokedAt: r.RevocationTime, ExpiresAt: r.RevocationTime.Add(HubLifetime), MTLS: true,
			}
			c, err := e.certificate(serial)
			if err != nil {
				return nil, err
			}
			if c != nil {
				info.ExpiresAt = c.NotAfter
			}
			if rows[key], err = json.Marshal(info); err != nil {
				return nil, fmt.Errorf("encode the revocation of %s: %w", serial, err)
			}
		}
	}
	return rows, nil
}

// resumeNumber has the next revocation list come after those of a bundle.
func (e *Embedded) resumeNumber(known *Bundle, rows map[string][]byte) error {
	info, err := e.ledger.GetCRL()
	if database.IsErrNotFound(err) {
		info, err = new(db.CertificateRevocationListInfo), nil
	}
	if err != nil {
		return fmt.Errorf("read the revocation list: %w", err)
	}
	last := info.Number
	for i, l := range known.lists {
		if !known.issuer(i).Equal(e.intermediate) || l.Number == nil {
			continue
		}
		if !l.Number.IsInt64() || l.Number.Int64() == math.MaxInt64 {
			return fmt.Errorf("%w: revocation list %v", ErrBundle, l.Number)
		}
		last = max(last, l.Number.Int64())
	}
	if last == info.Number {
		return nil
	}
	info.Number = last
	row, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("encode the revocation list: %w", err)
	}
	rows[tableKey(listTable, "crl")] = row
	return nil
}

// listsBehind says whether another bundle has a later list of one of the issuers.
func (b *Bundle) listsBehind(other *Bundle) bool {
	for _, l := range other.lists {
		for _, own := range b.lists {
			if bytes.Equal(own.AuthorityKeyId, l.AuthorityKeyId) && l.Number != nil && (own.Number == nil || own.Number.Cmp(l.Number) < 0) {
				return true
			}
		}
	}
	return false
}

// laterList puts a list in the place of an earlier one of the same issuer.
func laterList(lists []*x509.RevocationList, l *x509.RevocationList) []*x509.RevocationList {
	i := slices.IndexFunc(lists, func(o *x509.RevocationList) bool { return bytes.Equal(o.AuthorityKeyId, l.AuthorityKeyId) })
	switch {
	case i < 0 && len(lists) < maxLists:
		return append(lists, l)
	case i >= 0 && l.Number != nil && (lists[i].Number == nil || l.Number.Cmp(lists[i].Number) > 0):
		lists[i] = l
	}
	return lists
}

// WithdrawInvitations deletes all invitations that weren't used, in a store of which no authority is open: those of a backup
// may have been used since.
func WithdrawInvitations(store Store) error {
	e := &Embedded{store: store}
	if err := e.deleteTokens(func(rec *tokenRecord) bool { return rec.Serial == "" }); err != nil {
		return fmt.Errorf("authority: withdraw invitations: %w", err)
	}
	return nil
}
