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
// All types are encoded as package codec has it. Decoding is strict and bounded: what doesn't encode to the same
// bytes again is refused. The package does no I/O.
package mimi
