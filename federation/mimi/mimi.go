// Package mimi has the names and the wire types of MIMI (draft-ietf-mimi-protocol-06): one file per endpoint, the
// participant list and room metadata that members agree on, and the policy that hub and clients check of every
// commit alike.
//
// All types are encoded as package codec has it. Decoding is strict and bounded: what doesn't encode to the same
// bytes again is refused. The package does no I/O.
package mimi
