package mls

import (
	"bytes"
	"fmt"

	"github.com/parley-mls/parley/mls/codec"
)

// checkLeaf checks a leaf that comes into the tree at index i by itself (RFC 9420, Section 7.3). old is the leaf that it
// replaces, nil if there is none. checkLeafFits compares it with the group's extensions; what must be unique, and what
// all members must support, is judged by the roster for the commit as a whole.
func (r *rules) checkLeaf(ctx *GroupContext, l, old *LeafNode, source LeafNodeSource, i LeafIndex) error {
	cs := ctx.CipherSuite
	if l.Source != source {
		return invalid("7.3", "leaf node of source %d, want %d", l.Source, source)
	}
	if source != LeafNodeKeyPackage { // a key package's own validation has done these
		if err := l.validateStatic(); err != nil {
			return err
		}
		if !l.Capabilities.supportsSuite(cs) {
			return invalid("7.2", "capabilities of the leaf node do not list the group's cipher suite")
		}
		if err := cs.checkHPKEPublicKey(l.EncryptionKey); err != nil {
			return invalid("7.3", "encryption key", err)
		}
		if !r.replay {
			if err := l.verifySignature(cs, ctx.GroupID, i); err != nil {
				return invalid("7.3", "signature of the leaf node", err)
			}
		}
	}
	if old != nil && bytes.Equal(l.EncryptionKey, old.EncryptionKey) {
		return invalid("7.3", "encryption key is that of the leaf it replaces")
	}
	return r.checkCredential(cs, l, old)
}

// checkLeafFits says whether a leaf supports what the group asks of it.
func checkLeafFits(l *LeafNode, cr *contextRules) error {
	if err := l.Capabilities.supportsRequired(cr.required); err != nil {
		return err
	}
	for _, t := range cr.types {
		if !l.Capabilities.supportsExtension(t) {
			return invalid("13.4", "leaf node does not support extension type %d of the GroupContext", t)
		}
	}
	return cr.terms.checkLeaf(l)
}

// checkCredential has the authentication service judge a credential that is new to the group (RFC 9420,
// Section 5.3.1).
func (r *rules) checkCredential(cs CipherSuite, l, old *LeafNode) error {
	if r.replay {
		return nil
	}
	same := old != nil && l.Credential.Equal(old.Credential)
	if same && bytes.Equal(l.SignatureKey, old.SignatureKey) {
		return nil
	}
	if err := r.verifier.VerifyCredential(l.Credential, l.SignatureKey, cs); err != nil {
		return invalid("5.3.1", "credential of the leaf node", err)
	}
	if old != nil && !same {
		if err := r.verifier.ValidSuccessor(old.Credential, l.Credential); err != nil {
			return invalid("5.3.1", "successor credential", err)
		}
	}
	return nil
}

// checkKeyPackage checks the KeyPackage of an Add by itself (RFC 9420, Section 10.1).
func (r *rules) checkKeyPackage(cs CipherSuite, kp *KeyPackage, verified bool) error {
	if kp.CipherSuite != cs {
		return invalid("10.1", "key package of suite %d, group of suite %d", uint16(kp.CipherSuite), uint16(cs))
	}
	if err := kp.LeafNode.checkLifetimeLength(r.maxLifetime); err != nil {
		return err
	}
	if r.now != nil && !r.replay && !kp.LeafNode.Lifetime.Contains(r.now()) {
		return invalid("7.3", "lifetime of the leaf node does not contain the current time")
	}
	if verified || r.replay {
		return nil
	}
	if !kp.validated() {
		if err := kp.validateTimeless(); err != nil {
			return err
		}
	}
	return r.checkCredential(cs, &kp.LeafNode, nil)
}

// checkProposal checks a proposal by itself, when it arrives or when a commit brings it (RFC 9420, Section 12.1).
func (p *publicState) checkProposal(r *rules, e *resolved) error {
	cr, err := p.contextRules()
	if err != nil {
		return err
	}
	prop := &e.Proposal
	if prop.missing() {
		return fmt.Errorf("%w: proposal type %d without its body", ErrMalformed, prop.Type)
	}
	if e.Sender.Type == SenderExternal {
		switch prop.Type {
		case ProposalUpdate, ProposalExternalInit, ProposalSelfRemove:
			return invalid("12.1.8", "external sender of proposal type %d", prop.Type)
		}
	}
	switch prop.Type {
	case ProposalAdd:
		return r.checkKeyPackage(p.suite(), &prop.Add.KeyPackage, e.verified)
	case ProposalUpdate:
		if e.Sender.Type != SenderMember {
			return invalid("12.1.2", "update of someone who is not a member")
		}
		old := p.tree.Leaf(e.Sender.Leaf)
		if old == nil {
			return invalid("12.1.2", "update of leaf %d, which is blank", e.Sender.Leaf)
		}
		if e.verified {
			return nil
		}
		return r.checkLeaf(&p.context, &prop.Update.LeafNode, old, LeafNodeUpdate, e.Sender.Leaf)
	case ProposalRemove:
		if !p.tree.occupied(prop.Remove.Removed) {
			return invalid("12.1.3", "remove of leaf %d, which is blank", prop.Remove.Removed)
		}
	case ProposalPSK:
		return checkPSK(p.suite(), &prop.PSK.PSK, r.link)
	case ProposalReInit:
		if prop.ReInit.Version < p.context.Version {
			return invalid("12.1.5", "reinit with version %d", prop.ReInit.Version)
		}
		return prop.ReInit.Extensions.validate()
	case ProposalExternalInit:
		if e.Sender.Type != SenderNewMemberCommit {
			return invalid("12.2", "external_init outside of an external commit")
		}
	case ProposalGroupContextExtensions:
		return p.checkExtensions(r, cr, prop.GroupContextExtensions.Extensions)
	case ProposalAppDataUpdate:
		return checkAppData(r, prop.AppDataUpdate)
	case ProposalAppEphemeral:
		return checkEphemeral(r, prop.AppEphemeral)
	case ProposalSelfRemove:
		return p.checkSelfRemove(r, e)
	default:
		return fmt.Errorf("%w: proposal type %d", ErrUnsupported, prop.Type)
	}
	return nil
}

// missing says whether the body that Type names isn't set.
func (p *Proposal) missing() bool {
	switch p.Type {
	case ProposalAdd:
		return p.Add == nil
	case ProposalUpdate:
		return p.Update == nil
	case ProposalRemove:
		return p.Remove == nil
	case ProposalPSK:
		return p.PSK == nil
	case ProposalReInit:
		return p.ReInit == nil
	case ProposalExternalInit:
		return p.ExternalInit == nil
	case ProposalGroupContextExtensions:
		return p.GroupContextExtensions == nil
	case ProposalAppDataUpdate:
		return p.AppDataUpdate == nil
	case ProposalAppEphemeral:
		return p.AppEphemeral == nil
	}
	return false
}

// checkPSK is RFC 9420, Section 12.1.4. link is the usage of the key that links a group which is being made with the one
// that it follows from; 0 otherwise.
func checkPSK(cs CipherSuite, id *PreSharedKeyID, link ResumptionUsage) error {
	if id.linked() && id.Usage != link {
		return invalid("12.1.4", "resumption key for reinitialisation or branching in a commit")
	}
	if len(id.Nonce) != cs.HashSize() {
		return invalid("12.1.4", "nonce of %d bytes", len(id.Nonce))
	}
	return nil
}

// checkExtensions is RFC 9420, Section 12.1.7, without what concerns the members' support, which the roster judges.
func (p *publicState) checkExtensions(r *rules, cr *contextRules, ext Extensions) error {
	next, err := parseContextRules(ext)
	if err != nil {
		return err
	}
	for _, t := range cr.required.Proposals {
		if t != ProposalAppDataUpdate {
			continue
		}
		old, _ := p.context.Extensions.Find(ExtensionAppDataDictionary)
		data, _ := ext.Find(ExtensionAppDataDictionary) // a dictionary is at least its length
		if !bytes.Equal(old, data) {
			return invalidBy(sectionAppData, "app_data_dictionary changed by group_context_extensions")
		}
	}
	if r.replay {
		return nil
	}
	return r.checkSenders(p.suite(), next.senders, cr.senders)
}

// checkSenders has the authentication service judge the external senders that aren't in old at the same place (RFC
// 9420, Section 5.3.1).
func (r *rules) checkSenders(cs CipherSuite, senders, old ExternalSenders) error {
	for i, s := range senders {
		if i < len(old) && s.Credential.Equal(old[i].Credential) && bytes.Equal(s.SignatureKey, old[i].SignatureKey) {
			continue
		}
		if err := r.verifier.VerifyCredential(s.Credential, s.SignatureKey, cs); err != nil {
			return invalid("5.3.1", "credential of external sender %d", i, err)
		}
	}
	return nil
}

func checkAppData(r *rules, u *AppDataUpdate) error {
	if _, ok := r.components[u.Component]; !ok {
		return invalidBy(sectionAppData, "component %d is not known", u.Component)
	}
	if u.Op != AppDataOpUpdate && u.Op != AppDataOpRemove {
		return invalidBy(sectionAppData, "operation %d", u.Op)
	}
	return nil
}

// checkList checks that a commit's proposals go together (RFC 9420, Section 12.2). committer is meant if the commit
// isn't external.
func (p *publicState) checkList(r *rules, list []resolved, committer LeafIndex, external bool) error {
	var (
		touched    = make(map[LeafIndex]bool)
		psks       = make(map[string]bool)
		components = make(map[ComponentID]AppDataOp)
		extensions = 0
		inits      = 0
		removes    = 0
		ephemeral  = false
	)
	check := func(i int) error { return p.checkProposal(r, &list[i]) }
	var adds []int // checked in parallel; what the others need of p may be computed only now
	for i := range list {
		if list[i].Proposal.Type == ProposalAdd {
			adds = append(adds, i)
		} else if err := check(i); err != nil {
			return err
		}
	}
	if _, err := p.contextRules(); err != nil {
		return err
	}
	if err := parallel(len(adds), func(k int) error { return check(adds[k]) }); err != nil {
		return err
	}
	for i := range list {
		e := &list[i]
		prop := &e.Proposal
		if external {
			switch prop.Type {
			case ProposalExternalInit, ProposalRemove, ProposalPSK, ProposalAppDataUpdate, ProposalAppEphemeral, ProposalSelfRemove:
			default:
				return invalid("12.2", "external commit with proposal type %d", prop.Type)
			}
		}
		switch prop.Type {
		case ProposalUpdate:
			if e.Sender.Leaf == committer {
				return invalid("12.2", "update by the committer")
			}
			if touched[e.Sender.Leaf] {
				return invalid("12.2", "two proposals for leaf %d", e.Sender.Leaf)
			}
			touched[e.Sender.Leaf] = true
		case ProposalRemove:
			if !external && prop.Remove.Removed == committer {
				return invalid("12.2", "remove of the committer")
			}
			if touched[prop.Remove.Removed] {
				return invalid("12.2", "two proposals for leaf %d", prop.Remove.Removed)
			}
			touched[prop.Remove.Removed] = true
			removes++
		case ProposalAppEphemeral:
			ephemeral = true
		case ProposalSelfRemove:
			switch {
			case e.Ref == nil:
				return invalidBy(sectionSelfRemove, "self_remove by value")
			case !external && e.Sender.Leaf == committer:
				return invalidBy(sectionSelfRemove, "self_remove of the committer")
			case touched[e.Sender.Leaf]:
				return invalid("12.2", "two proposals for leaf %d", e.Sender.Leaf)
			}
			touched[e.Sender.Leaf] = true
		case ProposalPSK:
			id := string(codec.Marshal(prop.PSK.PSK))
			if psks[id] {
				return invalid("12.2", "two proposals of one pre-shared key")
			}
			psks[id] = true
		case ProposalReInit:
			if len(list) > 1 {
				return invalid("12.2", "reinit together with another proposal")
			}
		case ProposalGroupContextExtensions:
			if extensions++; extensions > 1 {
				return invalid("12.2", "two group_context_extensions proposals")
			}
		case ProposalExternalInit:
			inits++
		case ProposalAppDataUpdate:
			id, op := prop.AppDataUpdate.Component, prop.AppDataUpdate.Op
			if before := components[id]; before != 0 && (before == AppDataOpRemove || op == AppDataOpRemove) {
				return invalidBy(sectionAppData, "removal of component %d beside another proposal for it", id)
			}
			components[id] = op
		}
	}
	switch {
	case external && inits != 1:
		return invalid("12.2", "external commit with %d external_init proposals", inits)
	case external && removes > 1:
		return invalid("12.2", "external commit with %d removes", removes)
	}
	if len(components) > 0 {
		if err := p.checkSupport(r, list, ProposalAppDataUpdate); err != nil {
			return err
		}
	}
	if ephemeral {
		return p.checkSupport(r, list, ProposalAppEphemeral)
	}
	return nil
}

// checkSupport says whether all members who will process the commit support a proposal type that isn't a default one
// (RFC 9420, Sections 12.2 and 13.2).
func (p *publicState) checkSupport(r *rules, list []resolved, t ProposalType) error {
	counts, err := p.roster(r.verifier)
	if err != nil {
		return err
	}
	members, support := counts.members, counts.proposals[t]
	for i := range list {
		if at, ok := list[i].removes(); ok {
			members--
			if p.tree.Leaf(at).Capabilities.supportsProposal(t) {
				support--
			}
		}
	}
	if members != support {
		return invalid("12.2", "proposal type %d is not supported by all members", t)
	}
	return nil
}

// pathRequired says whether a commit of these proposals must have a path (RFC 9420, Section 12.4).
func pathRequired(list []resolved) bool {
	for i := range list {
		switch list[i].Proposal.Type {
		case ProposalUpdate, ProposalRemove, ProposalExternalInit, ProposalGroupContextExtensions, ProposalSelfRemove:
			return true
		}
	}
	return len(list) == 0
}

// checkAlone checks a proposal that is sent by itself more strictly than its receivers may: it must be valid in a
// commit without others. (With others it may be, if group_context_extensions is among them.)
func (p *publicState) checkAlone(r *rules, e *resolved) error {
	if err := p.checkProposal(r, e); err != nil {
		return err
	}
	cr, err := p.contextRules()
	if err != nil {
		return err
	}
	switch prop := &e.Proposal; prop.Type {
	case ProposalAdd:
		return checkLeafFits(&prop.Add.KeyPackage.LeafNode, cr)
	case ProposalUpdate:
		return checkLeafFits(&prop.Update.LeafNode, cr)
	case ProposalAppDataUpdate:
		if _, ok := p.dictionary().Get(prop.AppDataUpdate.Component); !ok && prop.AppDataUpdate.Op == AppDataOpRemove {
			return invalidBy(sectionAppData, "removal of component %d, which has no data", prop.AppDataUpdate.Component)
		}
	case ProposalSelfRemove:
		if p.selfRemoveOf(e.Sender.Leaf) != nil {
			return invalidBy(sectionSelfRemove, "second self_remove of leaf %d in an epoch", e.Sender.Leaf)
		}
	}
	return nil
}
