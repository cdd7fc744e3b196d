package mls

import (
	"bytes"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
)

// caches are fields that hold what can be computed from the others, and are filled when it is first needed or at the end
// of a change.
var caches = map[string]bool{
	"Group.view": true, "PublicGroup.view": true, "publicState.rules": true, "publicState.counts": true,
	"pastEpoch.rules": true, "treePage.owner": true, "RatchetTree.owner": true,
}

// whole returns all that a value refers to, every field and element by its path, without caches. Unlike dump it knows
// nothing of what the fields mean, so that it doesn't overlook one.
func whole(v any) map[string]string {
	out := make(map[string]string)
	walkState(out, "", reflect.ValueOf(v), make(map[uintptr]bool))
	return out
}

func walkState(out map[string]string, path string, v reflect.Value, seen map[uintptr]bool) {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			out[path] = "nil"
			return
		}
		if seen[v.Pointer()] {
			return
		}
		seen[v.Pointer()] = true
		walkState(out, path, v.Elem(), seen)
	case reflect.Interface:
		if v.IsNil() {
			out[path] = "nil"
			return
		}
		walkState(out, path+"("+v.Elem().Type().String()+")", v.Elem(), seen)
	case reflect.Struct:
		t := v.Type()
		if t.PkgPath() != reflect.TypeFor[Group]().PkgPath() {
			return // another package's, not state of a group
		}
		for i := range t.NumField() {
			if name := t.Field(i).Name; !caches[t.Name()+"."+name] {
				walkState(out, path+"."+name, v.Field(i), seen)
			}
		}
	case reflect.Slice, reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			if v.Kind() == reflect.Slice {
				out[path] = string(v.Bytes())
			} else {
				out[path] = fmt.Sprint(v)
			}
			return
		}
		out[path] = fmt.Sprint(v.Len())
		for i := range v.Len() {
			walkState(out, fmt.Sprintf("%s[%d]", path, i), v.Index(i), seen)
		}
	case reflect.Map:
		out[path] = fmt.Sprint(v.Len())
		for it := v.MapRange(); it.Next(); {
			walkState(out, fmt.Sprintf("%s[%v]", path, it.Key()), it.Value(), seen)
		}
	case reflect.Func, reflect.Chan, reflect.UnsafePointer:
	default:
		out[path] = fmt.Sprint(v)
	}
}

// unchanged compares states to the byte.
func unchanged(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if g, ok := got[k]; !ok {
			t.Errorf("%s: %q is gone", what, k)
		} else if g != want[k] {
			t.Errorf("%s: %q is %x and was %x", what, k, g, want[k])
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %q is new", what, k)
		}
	}
	t.FailNow()
}

// TestEveryChangeOfAStateShows: the comparison over which refused messages leave no trace sees each kind of change.
func TestEveryChangeOfAStateShows(t *testing.T) {
	f := newForgery(t)
	f.room.talk()
	f.room.propose(f.bob.ProposeUpdate(f.bob.store, UpdateOptions{}))
	f.must(second(f.alice.Commit(f.alice.store, CommitOptions{})))
	g := f.alice.Group
	for what, change := range map[string]func() (undo func()){
		"epoch":           swap(&g.state.context.Epoch, 77),
		"interim hash":    flipped(&g.state.interim),
		"encoded context": flipped(&g.state.encoded),
		"pending":         swap(&g.state.pending, nil),
		"next number":     swap(&g.state.next, 77),
		"tree":            swap(&g.state.tree, f.bob.staleTree()),
		"private key":     flippedKey(g.private.keys),
		"own leaf":        swap(&g.own, 1),
		"active":          swap(&g.active, false),
		"init secret":     flipped(&g.secrets.init),
		"exporter secret": flipped(&g.secrets.exporter),
		"secret tree":     swap(&g.messages, newSecretTree(testSuite, 4, make(secret, 32))),
		"past epochs":     swap(&g.past, g.past[1:]),
		"staged commit":   swap(&g.staged, nil),
		"signers":         swap(&g.signers, nil),
	} {
		before := whole(g)
		if len(before) < 200 || !maps.Equal(before, whole(g)) {
			t.Fatalf("a state of %d values, or one that is never the same", len(before))
		}
		undo := change()
		if maps.Equal(before, whole(g)) {
			t.Errorf("%s: no difference", what)
		}
		undo()
		if !maps.Equal(before, whole(g)) {
			t.Errorf("%s: the state differs after it was undone", what)
		}
	}
	for k := range f.alice.store.m {
		s := f.alice.store.clone()
		s.m[k] = string(flip(append([]byte(s.m[k]), 0)))
		if maps.Equal(s.m, f.alice.store.m) {
			t.Errorf("entry %q: no difference", k)
		}
	}
}

func (c *client) staleTree() *RatchetTree {
	t := c.state.tree.clone()
	t.blankPath(0)
	return t
}

func swap[T any](p *T, v T) func() func() {
	return func() func() {
		old := *p
		*p = v
		return func() { *p = old }
	}
}

func flipped[T ~[]byte](p *T) func() func() { return swap(p, T(flip(bytes.Clone(*p)))) }

func flippedKey(keys map[NodeIndex]HPKEPrivateKey) func() func() {
	return func() func() {
		old := keys[0]
		keys[0] = flip(old)
		return func() { keys[0] = old }
	}
}
