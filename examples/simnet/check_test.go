//go:build linux

package main

import (
	"slices"
	"testing"
)

const guest = "mimi://x.example/d/guest"

// honest is a record of two clients and a guest in a room in which all went well: a's messages 1 and 2 and b's message 1 are entries
// 1, 2 and 4, a's acknowledged commit to epoch 2 is entry 3.
func honest() *record {
	r := newRecord()
	r.acked[name{"a", "r", 1}] = 1
	r.acked[name{"a", "r", 2}] = 2
	r.queued[name{"b", "r", 1}] = true
	for n := range r.acked {
		r.sending[n] = true
	}
	r.sending[name{"b", "r", 1}] = true
	r.commits[place{"a", "r"}] = []uint64{2}
	for _, client := range []string{"a", "b"} {
		p := place{client, "r"}
		r.told[p] = []message{{1, "a", 1}, {2, "a", 2}, {4, "b", 1}}
		r.applied[p] = []commit{{Seq: 3, Epoch: 2, By: "a", Authenticator: []byte("two")}}
		r.views[p] = view{Seq: 4, Epoch: 2, Authenticator: []byte("two"), Member: true, Guests: []string{guest}, Messages: slices.Clone(r.told[p])}
	}
	p := place{guest, "r"} // a member since entry 3, and once before
	r.told[p] = []message{{1, "a", 1}, {4, "b", 1}}
	r.joined[p] = 1
	r.views[p] = view{Seq: 4, Epoch: 2, Authenticator: []byte("two"), Member: true, Messages: slices.Clone(r.told[p])}
	return r
}

func TestTheCheckerFindsNothingWhereAllIsWell(t *testing.T) {
	if faults := check(honest()); len(faults) > 0 {
		t.Error(faults)
	}
}

func TestTheCheckerFindsEachFault(t *testing.T) {
	b := place{"b", "r"}
	change := func(r *record, f func(v *view)) {
		v := r.views[b]
		v.Messages = slices.Clone(v.Messages)
		f(&v)
		r.views[b] = v
	}
	for _, c := range []struct {
		what, want string
		spoil      func(r *record)
	}{
		{"an acknowledged message isn't in a view", lost, func(r *record) {
			change(r, func(v *view) { v.Messages = v.Messages[1:] })
			r.told[b] = nil
		}},
		{"an acknowledged message is in no view", lost, func(r *record) {
			r.acked[name{"a", "r", 3}] = 5
			r.sending[name{"a", "r", 3}] = true
		}},
		{"a message that wasn't acknowledged is in one view only", lost, func(r *record) {
			change(r, func(v *view) { v.Messages = v.Messages[:2] })
			r.told[b] = nil
		}},
		{"a message of the outbox is in no view", lost, func(r *record) {
			r.queued[name{"b", "r", 2}] = true
			r.sending[name{"b", "r", 2}] = true
		}},
		{"a message that was told wasn't kept", lost, func(r *record) {
			for p, v := range r.views {
				v.Messages = v.Messages[:2]
				r.views[p] = v
			}
			delete(r.queued, name{"b", "r", 1})
		}},
		{"a message is twice in a view", duplicated, func(r *record) {
			change(r, func(v *view) { v.Messages = append(v.Messages, message{5, "b", 1}) })
		}},
		{"a message was told twice", duplicated, func(r *record) { r.told[b] = append(r.told[b], r.told[b][2]) }},
		{"a view has the messages in another order", reordered, func(r *record) {
			change(r, func(v *view) { v.Messages[1], v.Messages[2] = message{2, "b", 1}, message{4, "a", 2} })
		}},
		{"the views have another order than was acknowledged", reordered, func(r *record) {
			r.acked[name{"a", "r", 1}], r.acked[name{"a", "r", 2}] = 2, 1
		}},
		{"the hub's order isn't the sender's", reordered, func(r *record) {
			for p, v := range r.views {
				v.Messages = slices.Clone(v.Messages)
				v.Messages[0], v.Messages[1] = message{1, "a", 2}, message{2, "a", 1}
				r.views[p], r.told[p] = v, v.Messages
			}
			r.acked[name{"a", "r", 1}], r.acked[name{"a", "r", 2}] = 2, 1
		}},
		{"messages were told in another order", reordered, func(r *record) {
			r.told[b] = []message{{2, "a", 2}, {1, "a", 1}, {4, "b", 1}}
		}},
		{"nobody sent a message", invented, func(r *record) { delete(r.sending, name{"b", "r", 1}) }},
		{"an acknowledged commit is in nobody's history", undone, func(r *record) {
			r.commits[place{"a", "r"}] = []uint64{2, 2}
		}},
		{"an acknowledged commit is another's in the history", undone, func(r *record) {
			for p, list := range r.applied {
				list[0].By = "b"
				r.applied[p] = list
			}
		}},
		{"a view ends before an acknowledged commit", undone, func(r *record) {
			change(r, func(v *view) { v.Epoch = 1 })
		}},
		{"two clients applied different commits in an epoch", undone, func(r *record) { r.applied[b][0].By = "b" }},
		{"a client went back an epoch", undone, func(r *record) {
			r.applied[b] = append(r.applied[b], commit{Seq: 4, Epoch: 2, By: "a", Authenticator: []byte("two")})
		}},
		{"an epoch has two authenticators", diverged, func(r *record) { r.applied[b][0].Authenticator = []byte("to") }},
		{"two views end with different authenticators", diverged, func(r *record) {
			change(r, func(v *view) { v.Authenticator = []byte("to") })
		}},
		{"two views end in different epochs", diverged, func(r *record) { change(r, func(v *view) { v.Epoch = 3 }) }},
		{"a client has given a room up", frozen, func(r *record) { change(r, func(v *view) { v.Frozen = "it can't follow" }) }},
		{"a message waits for ever", stuck, func(r *record) { change(r, func(v *view) { v.Outbox = 1 }) }},
		{"a client stays behind", stuck, func(r *record) { change(r, func(v *view) { v.Seq = 3 }) }},
		{"a client isn't a member any more", frozen, func(r *record) { change(r, func(v *view) { v.Member = false }) }},
		{"a guest doesn't know of the room", stuck, func(r *record) { delete(r.views, place{guest, "r"}) }},
		{"a guest doesn't know that it was removed", stuck, func(r *record) {
			for p, v := range r.views {
				v.Guests = nil
				r.views[p] = v
			}
		}},
		{"a guest is in another epoch", diverged, func(r *record) {
			p := place{guest, "r"}
			v := r.views[p]
			v.Epoch = 1
			r.views[p] = v
		}},
		{"a guest lacks a message", lost, func(r *record) {
			for _, client := range []string{"a", "b"} {
				p := place{client, "r"}
				v := r.views[p]
				v.Messages, v.Seq = append(v.Messages, message{5, "b", 2}), 5
				r.views[p] = v
			}
			r.sending[name{"b", "r", 2}] = true
		}},
		{"something didn't heal", stuck, func(r *record) { r.late = []string{"it"} }},
		{"a client accuses a hub", accused, func(r *record) { r.accused = []string{"it"} }},
		{"a node has evidence against a hub", accused, func(r *record) { r.evidence = []string{"it"} }},
	} {
		r := honest()
		c.spoil(r)
		faults := check(r)
		if !slices.ContainsFunc(faults, func(f fault) bool { return f.kind == c.want }) {
			t.Errorf("%s: found %v, want one that is %s", c.what, faults, c.want)
		}
	}
}
