package mimi

import (
	"errors"
	"fmt"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// RatchetTreeRepresentation says how a ratchet tree is conveyed (draft-mahy-mls-ratchet-tree-options, Section 3).
type RatchetTreeRepresentation uint8

// The representations of draft-mahy-mls-ratchet-tree-options.
const (
	RatchetTreeFull                RatchetTreeRepresentation = 1 // inline
	RatchetTreeHTTPSURI            RatchetTreeRepresentation = 2 // to be fetched, signed by whoever names the address
	RatchetTreeOutOfBand           RatchetTreeRepresentation = 3 // known from elsewhere
	RatchetTreeDistributionService RatchetTreeRepresentation = 4 // the delivery service has it
)

// RatchetTreeOption is a ratchet tree or where it comes from.
//
//	struct {
//	    RatchetTreeRepresentation representation;
//	    select (representation) {
//	        case full: optional<Node> ratchet_tree<V>;
//	        case httpsUri: opaque ratchet_tree_url<V>; opaque tree_signature<V>;
//	        case outOfBand: opaque tree_signature<V>;
//	        case distributionService: struct {};
//	    };
//	} RatchetTreeOption;
type RatchetTreeOption struct {
	Representation RatchetTreeRepresentation
	Tree           *mls.RatchetTree // full; not validated
	URL            string           // httpsUri
	Signature      []byte           // httpsUri, outOfBand
}

// HubRatchetTree is a tree that the hub has.
func HubRatchetTree() RatchetTreeOption {
	return RatchetTreeOption{Representation: RatchetTreeDistributionService}
}

// FullRatchetTree is a tree inline.
func FullRatchetTree(t *mls.RatchetTree) RatchetTreeOption {
	return RatchetTreeOption{Representation: RatchetTreeFull, Tree: t}
}

// Check says whether the hub has the tree to which a commit leads, or the option has. A tree from elsewhere is the hub's,
// for it follows the handshakes; what its signature is of, draft-mahy-mls-ratchet-tree-options doesn't say. One at an
// address must be of the room's ratchet_tree_source_domains, an extension without a number yet: no room has any.
func (o *RatchetTreeOption) Check(commit *mls.StagedPublic) error {
	switch o.Representation {
	case RatchetTreeFull:
		return commit.CheckTree(o.Tree)
	case RatchetTreeHTTPSURI:
		return fmt.Errorf("mimi: a ratchet tree at %.200q, and the room has no domain for it", o.URL)
	}
	return nil
}

// MarshalMLS implements codec.Marshaler.
func (o RatchetTreeOption) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(o.Representation))
	switch o.Representation {
	case RatchetTreeFull:
		o.Tree.MarshalMLS(w)
	case RatchetTreeHTTPSURI:
		w.Opaque([]byte(o.URL))
		w.Opaque(o.Signature)
	case RatchetTreeOutOfBand:
		w.Opaque(o.Signature)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (o *RatchetTreeOption) UnmarshalMLS(r *codec.Reader) {
	*o = RatchetTreeOption{Representation: RatchetTreeRepresentation(r.Uint8())}
	switch o.Representation {
	case RatchetTreeFull:
		o.Tree = new(mls.RatchetTree)
		o.Tree.UnmarshalMLS(r)
	case RatchetTreeHTTPSURI:
		o.URL = readText(r, MaxText)
		o.Signature = r.Opaque()
	case RatchetTreeOutOfBand:
		o.Signature = r.Opaque()
	case RatchetTreeDistributionService:
	default:
		r.Failf("ratchet tree representation %d", o.Representation)
	}
}

// RatchetTreePresence says how a GroupInfo's ratchet_tree extension differs from what the delivery service has.
type RatchetTreePresence uint8

// The values of draft-mahy-mls-ratchet-tree-options.
const (
	NoRatchetTree      RatchetTreePresence = 0
	RatchetTreePresent RatchetTreePresence = 1
	RatchetTreeRemoved RatchetTreePresence = 2
	RatchetTreeAdded   RatchetTreePresence = 3
)

// PartialGroupInfo is what a delivery service can't compute of a GroupInfo.
//
//	struct {
//	    RatchetTreePresence ratchet_tree_presence;
//	    Extension group_info_extensions<V>; /* without ratchet_tree */
//	    opaque signature<V>;
//	} PartialGroupInfo;
type PartialGroupInfo struct {
	Presence   RatchetTreePresence
	Extensions mls.Extensions
	Signature  []byte
}

// MarshalMLS implements codec.Marshaler.
func (p PartialGroupInfo) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(p.Presence))
	p.Extensions.MarshalMLS(w)
	w.Opaque(p.Signature)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *PartialGroupInfo) UnmarshalMLS(r *codec.Reader) {
	*p = PartialGroupInfo{Presence: RatchetTreePresence(r.Uint8())}
	if p.Presence > RatchetTreeAdded {
		r.Failf("ratchet tree presence %d", p.Presence)
	}
	p.Extensions.UnmarshalMLS(r)
	if _, ok := p.Extensions.Find(mls.ExtensionRatchetTree); ok {
		r.Failf("ratchet_tree in a PartialGroupInfo")
	}
	p.Signature = r.Opaque()
}

// GroupInfoRepresentation says how a GroupInfo is conveyed (draft-ietf-mimi-protocol-06, Section 5.3).
type GroupInfoRepresentation uint8

// The representations of draft-ietf-mimi-protocol-06.
const (
	GroupInfoFull    GroupInfoRepresentation = 1
	GroupInfoPartial GroupInfoRepresentation = 2
)

// GroupInfoOption is a GroupInfo, or the part of it that the hub can't compute; one of its fields is set.
//
//	struct {
//	    GroupInfoRepresentation representation;
//	    select (representation) {
//	        case full:    GroupInfo groupInfo;
//	        case partial: PartialGroupInfo partialGroupInfo;
//	    }
//	} GroupInfoOption;
type GroupInfoOption struct {
	Full    *mls.GroupInfo
	Partial *PartialGroupInfo
}

// FullGroupInfo is a whole GroupInfo.
func FullGroupInfo(gi *mls.GroupInfo) GroupInfoOption { return GroupInfoOption{Full: gi} }

// SmallGroupInfo is the part of a GroupInfo without ratchet tree that a hub can't compute.
func SmallGroupInfo(gi *mls.GroupInfo) GroupInfoOption {
	return GroupInfoOption{Partial: &PartialGroupInfo{Extensions: gi.Extensions, Signature: gi.Signature}}
}

// Of returns the GroupInfo that comes with a commit, of a partial one with what the commit says. It is to be checked with
// the commit's CheckGroupInfo. In MIMI the GroupInfo has no ratchet tree (draft-ietf-mimi-protocol-06, Section 5.3); Of
// fails for one that has, or had in the epoch before.
func (o *GroupInfoOption) Of(commit *mls.StagedPublic) (*mls.GroupInfo, error) {
	gi, presence := o.Full, NoRatchetTree
	if p := o.Partial; p != nil {
		gi, presence = commit.GroupInfo(p.Extensions, p.Signature), p.Presence
	}
	if _, ok := gi.Extensions.Find(mls.ExtensionRatchetTree); ok || presence != NoRatchetTree {
		return nil, errors.New("mimi: the ratchet tree belongs in the RatchetTreeOption, not in the GroupInfo")
	}
	return gi, nil
}

// MarshalMLS implements codec.Marshaler.
func (o GroupInfoOption) MarshalMLS(w *codec.Writer) {
	if o.Partial != nil {
		w.Uint8(uint8(GroupInfoPartial))
		o.Partial.MarshalMLS(w)
		return
	}
	w.Uint8(uint8(GroupInfoFull))
	o.Full.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (o *GroupInfoOption) UnmarshalMLS(r *codec.Reader) {
	*o = GroupInfoOption{}
	switch v := GroupInfoRepresentation(r.Uint8()); v {
	case GroupInfoFull:
		o.Full = new(mls.GroupInfo)
		o.Full.UnmarshalMLS(r)
	case GroupInfoPartial:
		o.Partial = new(PartialGroupInfo)
		o.Partial.UnmarshalMLS(r)
	default:
		r.Failf("group info representation %d", v)
	}
}
