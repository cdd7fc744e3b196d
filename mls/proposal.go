package mls

import (
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// ProposalType identifies a proposal (RFC 9420, Section 17.4; draft-ietf-mls-extensions, Section 7.2).
type ProposalType uint16

// The proposal types that this package encodes.
const (
	ProposalAdd                    ProposalType = 1
	ProposalUpdate                 ProposalType = 2
	ProposalRemove                 ProposalType = 3
	ProposalPSK                    ProposalType = 4
	ProposalReInit                 ProposalType = 5
	ProposalExternalInit           ProposalType = 6
	ProposalGroupContextExtensions ProposalType = 7
	ProposalAppDataUpdate          ProposalType = 8
	ProposalAppEphemeral           ProposalType = 9
	ProposalSelfRemove             ProposalType = 10
)

// isDefault says whether every client supports the type without listing it (RFC 9420, Section 7.2).
func (t ProposalType) isDefault() bool {
	return t >= ProposalAdd && t <= ProposalGroupContextExtensions
}

// Proposal is a change that a commit may apply; the field that Type names is set, none for SelfRemove (RFC 9420, Section
// 12.1).
//
//	struct {
//	    ProposalType proposal_type;
//	    select (Proposal.proposal_type) {
//	        case add:                      Add;
//	        case update:                   Update;
//	        case remove:                   Remove;
//	        case psk:                      PreSharedKey;
//	        case reinit:                   ReInit;
//	        case external_init:            ExternalInit;
//	        case group_context_extensions: GroupContextExtensions;
//	        case app_data_update:          AppDataUpdate;
//	        case app_ephemeral:            AppEphemeral;
//	        case self_remove:              struct{};
//	    };
//	} Proposal;
type Proposal struct {
	Type                   ProposalType
	Add                    *Add
	Update                 *Update
	Remove                 *Remove
	PSK                    *PreSharedKey
	ReInit                 *ReInit
	ExternalInit           *ExternalInit
	GroupContextExtensions *GroupContextExtensions
	AppDataUpdate          *AppDataUpdate
	AppEphemeral           *AppEphemeral
}

func (p Proposal) body() codec.Marshaler {
	switch p.Type {
	case ProposalAdd:
		return p.Add
	case ProposalUpdate:
		return p.Update
	case ProposalRemove:
		return p.Remove
	case ProposalPSK:
		return p.PSK
	case ProposalReInit:
		return p.ReInit
	case ProposalExternalInit:
		return p.ExternalInit
	case ProposalGroupContextExtensions:
		return p.GroupContextExtensions
	case ProposalAppDataUpdate:
		return p.AppDataUpdate
	case ProposalAppEphemeral:
		return p.AppEphemeral
	}
	return nil
}

// MarshalMLS implements codec.Marshaler.
func (p Proposal) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(p.Type))
	if b := p.body(); b != nil {
		b.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler. Unknown types are refused with ErrUnsupported: their length is unknown.
func (p *Proposal) UnmarshalMLS(r *codec.Reader) {
	*p = Proposal{Type: ProposalType(r.Uint16())}
	var body codec.Unmarshaler
	switch p.Type {
	case ProposalAdd:
		p.Add = new(Add)
		body = p.Add
	case ProposalUpdate:
		p.Update = new(Update)
		body = p.Update
	case ProposalRemove:
		p.Remove = new(Remove)
		body = p.Remove
	case ProposalPSK:
		p.PSK = new(PreSharedKey)
		body = p.PSK
	case ProposalReInit:
		p.ReInit = new(ReInit)
		body = p.ReInit
	case ProposalExternalInit:
		p.ExternalInit = new(ExternalInit)
		body = p.ExternalInit
	case ProposalGroupContextExtensions:
		p.GroupContextExtensions = new(GroupContextExtensions)
		body = p.GroupContextExtensions
	case ProposalAppDataUpdate:
		p.AppDataUpdate = new(AppDataUpdate)
		body = p.AppDataUpdate
	case ProposalAppEphemeral:
		p.AppEphemeral = new(AppEphemeral)
		body = p.AppEphemeral
	case ProposalSelfRemove:
		return
	default:
		r.Fail(fmt.Errorf("%w: proposal type %d", ErrUnsupported, p.Type))
		return
	}
	body.UnmarshalMLS(r)
}

// Add asks to add a client (RFC 9420, Section 12.1.1).
type Add struct{ KeyPackage KeyPackage }

// MarshalMLS implements codec.Marshaler.
func (p *Add) MarshalMLS(w *codec.Writer) { p.KeyPackage.MarshalMLS(w) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *Add) UnmarshalMLS(r *codec.Reader) { p.KeyPackage.UnmarshalMLS(r) }

// Update asks to replace the sender's leaf (RFC 9420, Section 12.1.2).
type Update struct{ LeafNode LeafNode }

// MarshalMLS implements codec.Marshaler.
func (p *Update) MarshalMLS(w *codec.Writer) { p.LeafNode.MarshalMLS(w) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *Update) UnmarshalMLS(r *codec.Reader) { p.LeafNode.UnmarshalMLS(r) }

// Remove asks to remove a member (RFC 9420, Section 12.1.3).
type Remove struct{ Removed LeafIndex }

// MarshalMLS implements codec.Marshaler.
func (p *Remove) MarshalMLS(w *codec.Writer) { w.Uint32(uint32(p.Removed)) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *Remove) UnmarshalMLS(r *codec.Reader) { p.Removed = LeafIndex(r.Uint32()) }

// PreSharedKey asks to mix a pre-shared key into the next epoch (RFC 9420, Section 12.1.4).
type PreSharedKey struct{ PSK PreSharedKeyID }

// MarshalMLS implements codec.Marshaler.
func (p *PreSharedKey) MarshalMLS(w *codec.Writer) { p.PSK.MarshalMLS(w) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *PreSharedKey) UnmarshalMLS(r *codec.Reader) { p.PSK.UnmarshalMLS(r) }

// ReInit asks to end the group and to make a new one with other parameters (RFC 9420, Section 12.1.5). The GroupID may
// be the ended group's, but a fresh one is better: proposals of external senders are signed for a group's identifier and
// epoch only, so that old ones would fit the new group.
type ReInit struct {
	GroupID     []byte
	Version     ProtocolVersion
	CipherSuite CipherSuite
	Extensions  Extensions
}

// MarshalMLS implements codec.Marshaler.
func (p *ReInit) MarshalMLS(w *codec.Writer) {
	w.Opaque(p.GroupID)
	w.Uint16(uint16(p.Version))
	w.Uint16(uint16(p.CipherSuite))
	p.Extensions.MarshalMLS(w)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *ReInit) UnmarshalMLS(r *codec.Reader) {
	p.GroupID = r.Opaque()
	p.Version = ProtocolVersion(r.Uint16())
	p.CipherSuite = CipherSuite(r.Uint16())
	p.Extensions.UnmarshalMLS(r)
}

// ExternalInit carries the init secret of an external commit (RFC 9420, Section 12.1.6).
type ExternalInit struct{ KEMOutput []byte }

// MarshalMLS implements codec.Marshaler.
func (p *ExternalInit) MarshalMLS(w *codec.Writer) { w.Opaque(p.KEMOutput) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *ExternalInit) UnmarshalMLS(r *codec.Reader) { p.KEMOutput = r.Opaque() }

// GroupContextExtensions asks to replace the GroupContext's extensions (RFC 9420, Section 12.1.7).
type GroupContextExtensions struct{ Extensions Extensions }

// MarshalMLS implements codec.Marshaler.
func (p *GroupContextExtensions) MarshalMLS(w *codec.Writer) { p.Extensions.MarshalMLS(w) }

// UnmarshalMLS implements codec.Unmarshaler.
func (p *GroupContextExtensions) UnmarshalMLS(r *codec.Reader) { p.Extensions.UnmarshalMLS(r) }

// AppDataOp says what an AppDataUpdate does.
type AppDataOp uint8

// The operations of draft-ietf-mls-extensions.
const (
	AppDataOpUpdate AppDataOp = 1
	AppDataOpRemove AppDataOp = 2
)

// AppDataUpdate asks to change a component's data in the GroupContext's app_data_dictionary (draft-ietf-mls-extensions,
// Section 4.7).
//
//	struct {
//	    ComponentID component_id;
//	    AppDataUpdateOperation op;
//	    select (AppDataUpdate.op) {
//	        case update: opaque update<V>;
//	        case remove: struct{};
//	    };
//	} AppDataUpdate;
type AppDataUpdate struct {
	Component ComponentID
	Op        AppDataOp
	Update    []byte
}

// MarshalMLS implements codec.Marshaler.
func (p *AppDataUpdate) MarshalMLS(w *codec.Writer) {
	w.Uint16(uint16(p.Component))
	w.Uint8(uint8(p.Op))
	if p.Op == AppDataOpUpdate {
		w.Opaque(p.Update)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *AppDataUpdate) UnmarshalMLS(r *codec.Reader) {
	*p = AppDataUpdate{Component: ComponentID(r.Uint16()), Op: AppDataOp(r.Uint8())}
	switch p.Op {
	case AppDataOpUpdate:
		p.Update = r.Opaque()
	case AppDataOpRemove:
	default:
		r.Failf("application data operation %d", p.Op)
	}
}

// ProposalOrRef is an entry of a commit: a proposal, or the reference of one sent before (RFC 9420, Section 12.4).
//
//	struct {
//	    ProposalOrRefType type;
//	    select (ProposalOrRef.type) {
//	        case proposal:  Proposal proposal;
//	        case reference: ProposalRef reference;
//	    };
//	} ProposalOrRef;
type ProposalOrRef struct {
	Proposal  *Proposal
	Reference []byte // used if Proposal is nil
}

// MarshalMLS implements codec.Marshaler.
func (p ProposalOrRef) MarshalMLS(w *codec.Writer) {
	if p.Proposal != nil {
		w.Uint8(1)
		p.Proposal.MarshalMLS(w)
		return
	}
	w.Uint8(2)
	w.Opaque(p.Reference)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *ProposalOrRef) UnmarshalMLS(r *codec.Reader) {
	*p = ProposalOrRef{}
	switch t := r.Uint8(); t {
	case 1:
		p.Proposal = new(Proposal)
		p.Proposal.UnmarshalMLS(r)
	case 2:
		p.Reference = r.OpaqueMax(64)
	default:
		r.Failf("ProposalOrRef type %d", t)
	}
}

// Commit starts a new epoch by applying proposals (RFC 9420, Section 12.4).
//
//	struct {
//	    ProposalOrRef proposals<V>;
//	    optional<UpdatePath> path;
//	} Commit;
type Commit struct {
	Proposals []ProposalOrRef
	Path      *UpdatePath
}

// MarshalMLS implements codec.Marshaler.
func (c Commit) MarshalMLS(w *codec.Writer) {
	codec.WriteVector(w, c.Proposals, func(w *codec.Writer, p ProposalOrRef) { p.MarshalMLS(w) })
	w.Optional(c.Path != nil)
	if c.Path != nil {
		c.Path.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler.
func (c *Commit) UnmarshalMLS(r *codec.Reader) {
	*c = Commit{}
	c.Proposals = codec.ReadVector(r, func(r *codec.Reader) (p ProposalOrRef) { p.UnmarshalMLS(r); return p })
	if r.Optional() {
		c.Path = new(UpdatePath)
		c.Path.UnmarshalMLS(r)
	}
}
