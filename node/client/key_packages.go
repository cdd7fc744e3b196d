package client

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/store"
)

// ownKeyPackage is a KeyPackage of this client with its private keys.
type ownKeyPackage struct {
	keyPackage mls.KeyPackage
	secrets    mls.KeyPackageSecrets
}

// MarshalMLS implements codec.Marshaler, for the store.
func (k ownKeyPackage) MarshalMLS(w *codec.Writer) {
	k.keyPackage.MarshalMLS(w)
	k.secrets.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (k *ownKeyPackage) UnmarshalMLS(r *codec.Reader) {
	k.keyPackage.UnmarshalMLS(r)
	k.secrets.UnmarshalMLS(r)
}

func keyPackageKey(ref []byte) []byte { return append([]byte(prefixKeyPackage), ref...) }

// leafFormat counts the changes of what mimi.LeafExtensions offers. KeyPackages of another one are replaced: with them
// nobody could add the client to a new room.
const leafFormat = 3

// keptLastResorts is how many last-resort KeyPackages are kept, the published one among them: a Welcome for a former one
// may be on its way.
const keptLastResorts = 8

// publishKeyPackages fills up what the node has to hand out, with a last-resort one if that isn't there or was handed out.
// replace makes all of them new, with the present credential. The private keys are durable before the node has the
// public ones.
func (c *Client) publishKeyPackages(ctx context.Context, replace bool) error {
	c.publish.Lock()
	defer c.publish.Unlock()
	want := c.o.KeyPackages
	offered, err := c.db.Get(keyOffered)
	if err != nil {
		return fmt.Errorf("client: read the key packages: %w", err)
	}
	outdated := len(offered) != 1 || offered[0] != leafFormat
	have, err := call(ctx, c.session, c.session.service.PublishKeyPackages, &api.PublishKeyPackagesRequest{})
	if err != nil {
		return fmt.Errorf("client: ask for the published key packages: %w", err)
	}
	last := true
	if replace = replace || outdated; !replace {
		last = !have.LastResort
		if want -= int(have.Available); !c.few(have) {
			want = 0
		}
		if want <= 0 && !last {
			return nil
		}
	}
	if err := c.dropExpired(); err != nil {
		return err
	}
	c.mu.Lock()
	suite := c.profile.Suite
	c.mu.Unlock()
	req := &api.PublishKeyPackagesRequest{Replace: replace}
	b := new(store.Batch)
	add := func(lastResort bool) error {
		kp, secrets, err := mls.NewKeyPackage(mls.KeyPackageOptions{
			Rand: c.o.Rand, Time: c.o.Time, Suite: suite, Credential: c.credential(), Signer: c.signer,
			Lifetime: c.lifetime(have.MaxLifetime), LeafExtensions: mimi.LeafExtensions(), LastResort: lastResort,
		})
		if err != nil {
			return fmt.Errorf("client: make a key package: %w", err)
		}
		b.Set(keyPackageKey(kp.Ref()), codec.Marshal(ownKeyPackage{*kp, *secrets}))
		req.KeyPackages = append(req.KeyPackages, codec.Marshal(kp))
		return nil
	}
	for range max(want, 0) {
		if err := add(false); err != nil {
			return err
		}
	}
	if last {
		if err := add(true); err != nil {
			return err
		}
	}
	var w waits
	if err := w.apply(c, b); err != nil {
		return err
	}
	if err := w.wait(); err != nil {
		return err
	}
	if _, err := call(ctx, c.session, c.session.service.PublishKeyPackages, req); err != nil {
		return fmt.Errorf("client: publish key packages: %w", err)
	}
	if !outdated {
		return nil
	}
	b = new(store.Batch)
	b.Set(keyOffered, []byte{leafFormat})
	if err := w.apply(c, b); err != nil {
		return err
	}
	return w.wait()
}

// few says whether more KeyPackages should be published.
func (c *Client) few(have *api.PublishKeyPackagesResponse) bool {
	return int(have.Available) <= c.o.KeyPackages/2 || !have.LastResort
}

// dropExpired deletes the private keys of KeyPackages that nobody may use any more, and of the oldest last-resort ones.
func (c *Client) dropExpired() error {
	now := uint64(c.o.Time().Unix())
	b := new(store.Batch)
	type lastResort struct {
		key  []byte
		from uint64
	}
	var last []lastResort
	err := store.ScanPrefix(c.db, []byte(prefixKeyPackage), func(key, value []byte) bool {
		var k ownKeyPackage
		if err := codec.Unmarshal(value, &k); err != nil || k.keyPackage.LeafNode.Lifetime.NotAfter < now {
			b.Delete(keyPackageKey(key))
		} else if k.keyPackage.LastResort() {
			last = append(last, lastResort{keyPackageKey(key), k.keyPackage.LeafNode.Lifetime.NotBefore})
		}
		k.secrets.Erase()
		return true
	})
	if err != nil {
		return fmt.Errorf("client: read the key packages: %w", err)
	}
	slices.SortFunc(last, func(a, b lastResort) int { return cmp.Compare(b.from, a.from) })
	for i := keptLastResorts - 1; i < len(last); i++ {
		b.Delete(last[i].key)
	}
	if b.Len() == 0 {
		return nil
	}
	var w waits
	if err := w.apply(c, b); err != nil {
		return err
	}
	return w.wait()
}

// findKeyPackage returns the KeyPackage of this client that a Welcome is for, nil if there is none.
func (c *Client) findKeyPackage(w *mls.Welcome) (*ownKeyPackage, error) {
	for _, ref := range w.KeyPackageRefs() {
		b, err := c.db.Get(keyPackageKey(ref))
		if err != nil {
			return nil, fmt.Errorf("client: read a key package: %w", err)
		}
		if b == nil {
			continue
		}
		k := new(ownKeyPackage)
		if err := codec.Unmarshal(b, k); err != nil {
			return nil, fmt.Errorf("client: stored key package: %w", err)
		}
		return k, nil
	}
	return nil, nil
}
