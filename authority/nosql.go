package authority

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql/database"
)

// The keys below StorePrefix. Tables are smallstep's, with serial numbers in decimal; the rest is ours.
//
//	table/<table>/<key>          smallstep's rows
//	token/<SHA-256, hex>         tokenRecord: an invitation, by the hash of its token
//	client/<client id>           the user that the client belongs to
//	index/<client id>/<serial>   empty: the certificates of a client, serial in decimal
//	bundle                       the trust bundle's document
//	address                      the node's advertised address
const (
	tableKeys  = StorePrefix + "table/"
	tokenKeys  = StorePrefix + "token/"
	clientKeys = StorePrefix + "client/"
	indexKeys  = StorePrefix + "index/"
	bundleKey  = StorePrefix + "bundle"
	addressKey = StorePrefix + "address"
)

// smallstep's tables that are read here directly.
const (
	certificateTable     = "x509_certs"
	certificateDataTable = "x509_certs_data"
	revokedTable         = "revoked_x509_certs"
	listTable            = "x509_crl"
)

func tableKey(table, key string) string { return tableKeys + table + "/" + key }

// prefixEnd returns the end of a Scan of all keys with a prefix that ends in "/".
func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// tables is a nosql database of smallstep's on a Store.
type tables struct{ store Store }

var _ database.DB = tables{}

func rowKey(bucket, key []byte) string { return tableKey(string(bucket), string(key)) }

// Open and Close do nothing: the store is the node's.
func (t tables) Open(string, ...database.Option) error { return nil }
func (t tables) Close() error                          { return nil }

// CreateTable does nothing: a table is a prefix.
func (t tables) CreateTable([]byte) error { return nil }

// Get fails with database.ErrNotFound.
func (t tables) Get(bucket, key []byte) ([]byte, error) {
	v, err := t.store.Get([]byte(rowKey(bucket, key)))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", bucket, err)
	}
	if v == nil {
		return nil, fmt.Errorf("%s: %w", bucket, database.ErrNotFound)
	}
	return v, nil
}

// Set writes a row durably.
func (t tables) Set(bucket, key, value []byte) error {
	return t.commit(map[string][]byte{rowKey(bucket, key): present(value)}, nil)
}

// Del deletes a row durably.
func (t tables) Del(bucket, key []byte) error {
	return t.commit(map[string][]byte{rowKey(bucket, key): nil}, nil)
}

// CmpAndSwap sets a row if it has the old value (nil: if there is none), and returns the row as it is then.
func (t tables) CmpAndSwap(bucket, key, old, new []byte) ([]byte, bool, error) {
	k := rowKey(bucket, key)
	ok, err := t.store.Commit(map[string][]byte{k: present(new)}, map[string][]byte{k: old})
	if err != nil {
		return nil, false, fmt.Errorf("write %s: %w", bucket, err)
	}
	if ok {
		return new, true, nil
	}
	v, err := t.store.Get([]byte(k))
	return v, false, err
}

// List returns a table's rows.
func (t tables) List(bucket []byte) ([]*database.Entry, error) {
	var rows []*database.Entry
	prefix := tableKey(string(bucket), "")
	err := t.store.Scan([]byte(prefix), prefixEnd(prefix), func(key, value []byte) bool {
		rows = append(rows, &database.Entry{Bucket: bucket, Key: bytes.Clone(key[len(prefix):]), Value: bytes.Clone(value)})
		return true
	})
	return rows, err
}

// DeleteTable deletes a table's rows.
func (t tables) DeleteTable(bucket []byte) error {
	rows, err := t.List(bucket)
	if err != nil {
		return err
	}
	changes := make(map[string][]byte, len(rows))
	for _, r := range rows {
		changes[rowKey(bucket, r.Key)] = nil
	}
	return t.commit(changes, nil)
}

// Update makes the changes of a transaction as one step. Of reads and compare-and-swaps smallstep makes no use here.
func (t tables) Update(tx *database.Tx) error {
	changes, expect := make(map[string][]byte), make(map[string][]byte)
	for _, op := range tx.Operations {
		k := rowKey(op.Bucket, op.Key)
		switch op.Cmd {
		case database.CreateTable:
		case database.Set:
			changes[k] = present(op.Value)
		case database.Delete:
			changes[k] = nil
		case database.CmpOrRollback:
			expect[k] = op.Value
		default:
			return fmt.Errorf("%v: %w", op.Cmd, database.ErrOpNotSupported)
		}
	}
	return t.commit(changes, expect)
}

func (t tables) commit(changes, expect map[string][]byte) error {
	ok, err := t.store.Commit(changes, expect)
	if err != nil {
		return err
	}
	if !ok {
		return errConflict
	}
	return nil
}

// present makes an empty value of a nil one, which would delete.
func present(v []byte) []byte {
	if v == nil {
		return []byte{}
	}
	return v
}

// errConflict says that a row wasn't as expected when the batch was committed; nothing was done.
var errConflict = errors.New("the state changed meanwhile")

// ledger is smallstep's database with two steps made one: a certificate is stored in the same batch as what it was
// issued for, and a revocation list in the same batch as the bundle that carries it.
type ledger struct {
	*db.DB
	store      Store
	replaceCRL func(*x509.RevocationList, map[string][]byte) error

	mu      sync.Mutex
	pending map[string]*issuance // by decimal serial number, between preparing and storing; guarded by mu
}

// issuance is what is committed together with a certificate.
type issuance struct {
	changes, expect map[string][]byte
	conflict        bool // the certificate wasn't stored, since a row of expect was otherwise
}

func newLedger(store Store) *ledger {
	return &ledger{DB: &db.DB{DB: tables{store}}, store: store, pending: make(map[string]*issuance)}
}

// prepare announces that the certificate of that serial number is stored with p, and returns what withdraws that.
func (l *ledger) prepare(serial string, p *issuance) (withdraw func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending[serial] = p
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.pending, serial)
	}
}

// StoreCertificateChain is called by smallstep between signing and handing out: it is then that the token is used up.
// A certificate that nothing was prepared for is not stored, and so not handed out.
func (l *ledger) StoreCertificateChain(_ provisioner.Interface, chain ...*x509.Certificate) error {
	serial := chain[0].SerialNumber.String()
	l.mu.Lock()
	p := l.pending[serial]
	l.mu.Unlock()
	if p == nil {
		return fmt.Errorf("certificate %s was not prepared", serial)
	}
	changes := maps.Clone(p.changes)
	if changes == nil {
		changes = make(map[string][]byte)
	}
	changes[tableKey(certificateTable, serial)] = slices.Clone(chain[0].Raw)
	changes[tableKey(certificateDataTable, serial)] = []byte("{}")
	expect := maps.Clone(p.expect)
	if expect == nil {
		expect = make(map[string][]byte)
	}
	expect[tableKey(certificateTable, serial)] = nil
	ok, err := l.store.Commit(changes, expect)
	if err != nil {
		return fmt.Errorf("store certificate %s: %w", serial, err)
	}
	if !ok {
		p.conflict = true
		return errConflict
	}
	return nil
}

// StoreCRL is called by smallstep with a new revocation list.
func (l *ledger) StoreCRL(info *db.CertificateRevocationListInfo) error {
	list, err := x509.ParseRevocationList(info.DER)
	if err != nil {
		return fmt.Errorf("parse the new revocation list: %w", err)
	}
	row, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("encode the new revocation list: %w", err)
	}
	return l.replaceCRL(list, map[string][]byte{tableKey(listTable, "crl"): row})
}
