package mls

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

func TestListsOfTypesAreBounded(t *testing.T) {
	for n, ok := range map[int]bool{maxValues: true, maxValues + 1: false} {
		b := codec.Marshal(RequiredCapabilities{Extensions: make([]ExtensionType, n)})
		if err := codec.Unmarshal(b, new(RequiredCapabilities)); (err == nil) != ok {
			t.Errorf("%d types: %v", n, err)
		}
	}
}

func TestDictionaryStaysSorted(t *testing.T) {
	var d AppDataDictionary
	for _, id := range []ComponentID{7, 1, 9, 3, 7} {
		before := codec.Marshal(d)
		next := d.Set(id, []byte{byte(id)})
		wantBytes(t, "the dictionary that Set was called on", codec.Marshal(d), before)
		d = next
		var again AppDataDictionary
		decode(t, codec.Marshal(d), &again)
	}
	if v, ok := d.Get(3); !ok || len(v) != 1 || v[0] != 3 || len(d) != 4 {
		t.Errorf("component 3 of %v: %x %v", d, v, ok)
	}
	if _, ok := d.Get(2); ok {
		t.Error("component 2 found")
	}
	less := d.Remove(7)
	if _, ok := less.Get(7); ok || len(less) != 3 || len(d) != 4 || len(d.Remove(100)) != 4 {
		t.Errorf("removal left %v of %v", less, d)
	}
	for _, b := range [][]byte{{6, 0, 2, 0, 0, 1, 0}, {6, 0, 1, 0, 0, 1, 0}} {
		if err := codec.Unmarshal(b, &d); !errors.Is(err, ErrMalformed) {
			t.Errorf("%x: got %v, want ErrMalformed", b, err)
		}
	}
}

func TestExtensionListsHaveEachTypeOnce(t *testing.T) {
	e := Extensions{{1, []byte("a")}, {2, []byte("b")}}
	set := e.Set(1, []byte("c")).Set(3, nil)
	if v, _ := e.Find(1); string(v) != "a" {
		t.Error("Set changed the list it was called on")
	}
	if v, ok := set.Find(1); !ok || string(v) != "c" || len(set) != 3 || set[0].Type != 1 || set[2].Type != 3 {
		t.Errorf("after Set: %v", set)
	}
	if r := set.Remove(2); len(r) != 2 || len(set) != 3 {
		t.Errorf("after Remove: %v", r)
	}
	if err := codec.Unmarshal(codec.Marshal(Extensions{{1, nil}, {1, nil}}), &e); err == nil {
		t.Error("list with a type twice accepted")
	}
	long := make(Extensions, maxExtensions+1)
	for i := range long {
		long[i].Type = ExtensionType(i)
	}
	if err := codec.Unmarshal(codec.Marshal(long), &e); !errors.Is(err, codec.ErrValue) {
		t.Errorf("%d extensions: got %v, want ErrValue", len(long), err)
	}
}
