package node

import (
	"errors"
	"slices"
	"time"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/store"
)

// retention is how long the hub knows the answer to a message, so that the same bytes again get it again, and how long
// a Welcome can be fetched.
const retention = 90 * 24 * time.Hour

// sweep deletes what is older than retention, or has expired, and what logs needn't have any more.
func (n *Node) sweep() error {
	oldest := uint64(time.Now().Add(-retention).UnixMilli())
	unix := uint64(time.Now().Unix())
	for _, s := range []struct {
		prefix string
		old    func(r *codec.Reader) bool
	}{
		{prefixAnswer, func(r *codec.Reader) bool {
			var a answerRecord
			a.UnmarshalMLS(r)
			return a.time < oldest
		}},
		{prefixOwnRef, func(r *codec.Reader) bool {
			var ref refRecord
			ref.UnmarshalMLS(r)
			return ref.expires+uint64(retention.Seconds()) < unix
		}},
		{prefixClaimedRef, func(r *codec.Reader) bool {
			var ref refRecord
			ref.UnmarshalMLS(r)
			return ref.expires < unix
		}},
		{prefixGranted, func(r *codec.Reader) bool {
			var g grantedRecord
			g.UnmarshalMLS(r)
			return slices.ContainsFunc(g.keyPackages, func(kp mls.KeyPackage) bool { return uint64(expiry(&kp)) < unix })
		}},
		{prefixFanout, func(r *codec.Reader) bool { return r.Uint64() < oldest }}, // begins with its time in ms
		{prefixReport, func(r *codec.Reader) bool { return r.Uint64() < oldest }}, // so does this
	} {
		if err := n.sweepPrefix(s.prefix, s.old); err != nil {
			return err
		}
	}
	n.reports.recount()
	return errors.Join(n.sweepAssets(), n.trimLogs(time.Now()))
}

// sweepPrefix deletes the entries under a prefix that are old, a thousand at a time.
func (n *Node) sweepPrefix(prefix string, old func(r *codec.Reader) bool) error {
	var b store.Batch
	var failed error
	err := store.ScanPrefix(n.store, []byte(prefix), func(k, v []byte) bool {
		r := codec.NewReader(v)
		if old(r) && r.Err() == nil {
			b.Delete(append([]byte(prefix), k...))
		}
		if b.Len() >= 1000 {
			failed = n.flush(&b)
		}
		return failed == nil
	})
	return errors.Join(err, failed, n.flush(&b))
}
