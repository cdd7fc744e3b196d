// Package mimi has the names and the wire types of MIMI (draft-ietf-mimi-protocol-06): one file per endpoint, the
// participant list and room metadata that members agree on, and the policy that hub and clients check of every
// commit alike.
//
// Franking (Sections 5.4 and 5.9), where the draft leaves something open: the hub's franking agent is in a room's
// GroupContext from its beginning (FrankedRoom) and no proposal changes it. The franking tag is of the application data,
// with the framing of its media type, and so that the hub can compute it again, that is what an AbusiveMessage has as its
// message_content. A report with messages need not come from a participant, since they prove themselves; the reason codes
// that the draft doesn't define are kept as they come.
//
// Key material (Section 5.2): a request in another protocol than MLS is answered with incompatibleProtocol. A last-resort
// KeyPackage (draft-ietf-mls-extensions) is handed out again when no other fits, against the rule that none is in two
// responses.
//
// Consent (Sections 5.7 and 8): the paths of the two endpoints name the user, as the draft's directory has it; a server
// takes the domain too, as its text has it. A denial is told only if it takes back a grant. KeyPackages that come with a
// grant are for rooms that the requester's provider hosts, since another hub couldn't route their Welcomes. Consent
// extensions are ignored. What a node chooses beyond that is in its consent.go.
//
// Identifier queries (Section 5.8): parts of names have three characters at least, and what more than twenty users match
// is answered with ambiguous. The rest is in the node's search.go.
//
// All types are encoded as package codec has it. Decoding is strict and bounded: what doesn't encode to the same
// bytes again is refused. The package does no I/O.
package mimi
