package mls

import (
	"bytes"
	"errors"
	"testing"
)

// The tree is written out here from the draft's definition, from the root to one leaf.
func TestExportedSecretsAreTheLeavesOfTheExporterTree(t *testing.T) {
	for _, cs := range CipherSuites() {
		root := bytes.Repeat(secret{7}, cs.HashSize())
		es := cs.epochSecretsFrom(root)
		if want := cs.expandWithLabel(root, "application_export", nil, cs.HashSize()); !bytes.Equal(es.applicationExport, want) {
			t.Errorf("%v: root of the tree", cs)
		}
		tree := newExporterTree(bytes.Clone(es.applicationExport))
		for _, id := range []ComponentID{0x8001, 0, 0xffff, 0x8000, 1} {
			want := es.applicationExport
			for bit := 15; bit >= 0; bit-- {
				side := "left"
				if id>>bit&1 == 1 {
					side = "right"
				}
				want = cs.expandWithLabel(want, "tree", []byte(side), cs.HashSize())
			}
			got, err := tree.take(cs, id, discard{})
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%v: component %x: %v", cs, id, err)
			}
		}
	}
}

func TestSecretsAreExportedOnce(t *testing.T) {
	f := newForgery(t)
	r := f.room
	export := func(c *client, id ComponentID) string {
		t.Helper()
		s, err := c.SafeExport(c.store, id)
		f.must(err)
		return string(s)
	}
	seen := make(map[string]bool)
	for epoch := range 2 {
		for _, id := range []ComponentID{0x8001, 0x8000, 5} {
			want := export(f.alice, id)
			if seen[want] || len(want) != testSuite.HashSize() {
				t.Errorf("epoch %d, component %x: a secret seen before, or of %d bytes", epoch, id, len(want))
			}
			seen[want] = true
			for _, c := range r.members[1:] {
				if export(c, id) != want {
					t.Errorf("%s has another secret", c.name)
				}
			}
		}
		r.checkStores()
		for _, c := range r.members {
			for range 2 {
				if _, err := c.SafeExport(c.store, 0x8001); !errors.Is(err, ErrExported) {
					t.Errorf("%s: got %v, want ErrExported", c.name, err)
				}
				c.reload(t)
			}
		}
		if export(f.bob, 0x8002) != export(f.carol, 0x8002) {
			t.Error("the secrets of another component differ after a restart")
		}
		f.must(f.dave.Reseal(f.dave.store))
		r.checkStores()
		eve := r.join("eve")
		f.must(second(f.alice.Commit(f.alice.store, CommitOptions{Proposals: []Proposal{remove(eve.OwnLeaf())}})))
		f.alice.reload(t) // the staged commit has the next epoch's
		c := f.alice.PendingCommit()
		r.accept(c.Message(), c.GroupInfo(), c.Tree())
		f.must(f.alice.Confirm(f.alice.store))
		r.distribute(c.Message(), f.alice)
		r.checkStores()
	}
	r.commit(f.alice, CommitOptions{Proposals: []Proposal{remove(f.dave.OwnLeaf())}})
	if _, err := f.dave.SafeExport(f.dave.store, 1); !errors.Is(err, ErrRemoved) {
		t.Errorf("former member: got %v, want ErrRemoved", err)
	}
	sameState(t, "dave", unsealed(f.dave.store.m), unsealed(dump(f.dave.Group)))
}
