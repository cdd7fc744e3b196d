// Package mls is the Messaging Layer Security protocol of RFC 9420 as a library: bytes in, bytes out, without I/O of
// its own. Clients start at NewGroup, JoinGroup and ExternalJoin and keep a Group; servers that order a group's
// handshakes keep a PublicGroup, which checks all that public data shows. A Group writes each change of its state into
// a Batch of the caller's, who makes it durable before a message goes out.
//
// Randomness and time come from Config and the options; their zero values are crypto/rand and time.Now. What goes
// beyond the RFC is of draft-ietf-mls-extensions-10 (all but multi-credentials), draft-ietf-mls-pq-ciphersuites-06 and
// draft-mahy-mls-semiprivatemessage-07.
//
// What was received is decoded, checked and applied in separate steps. Decoding is strict, trees and leaves that were
// decoded aren't changed, and a check that fails leaves no trace.
//
// Secrets are stored sealed. The few entries that Erasable names hold the keys, and need storage that really deletes.
//
// # Operational parameters
//
// What RFC 9750, Section 7 (Operational Requirements), wants defined, and how it is here. "Application" means that this
// package leaves it to its user, or offers what is named.
//
//	Authentication service              application: CredentialVerifier (issue and revocation are outside)
//	Delivery service                    application: PublicGroup checks, one commit an epoch is the server's decision
//	Public state kept by servers        PublicGroup, whose GroupInfo and Tree go to joiners
//	GroupInfo for external joins        GroupInfo of a PendingCommit or Group; who gets it: application
//	Joining on request                  NewMemberProposal, if Config.NewMemberProposals allows it; else application
//	Distribution of pre-shared keys     application: Config.PSK
//	Reports of malformed commits        ValidationError names rule and section; the report itself: application
//
//	Lifetime of a KeyPackage            at most Config.MaxLifetime, default MaxLifetime (400 days), which is also
//	                                    KeyPackage.Validate's bound; made for DefaultLifetime (90 days)
//	Resumption keys of past epochs      as long as the epoch: Config.MaxPastEpochs (4) and MaxPastAge (7 days)
//	Unused keys of a sender             as long as the epoch, the current or a past one; Reseal in long epochs
//	Number of unused keys               Config.MaxSkippedKeys (1000) for each sender, epoch and kind of message
//	                                    (application data or handshake), the oldest go first
//	Steps forward for one message       Config.MaxForward (100,000)
//	Messages that can't be read yet     none is buffered: ErrEpoch, or a ValidationError of Section 12.4 for a commit
//	                                    whose proposals haven't come, and the application may try again; of the
//	                                    epoch's proposals 4096 wait for a commit
//
//	Format of application data          application; content advertisement as in draft-ietf-mls-extensions
//	Additional authenticated data       application: AAD of Encrypt, Propose and CommitOptions
//	Group identifiers                   application: GroupOptions.GroupID, ReInit.GroupID, NewBranch
//	application_id                      application: LeafExtensions; not interpreted
//
//	Acceptable cipher suites            application, from CipherSuites; a group's never changes but by ReInit
//	Mandatory and forbidden extensions  required_capabilities in the GroupContext, checked; more by Config.Policy
//	Handshakes in plaintext             Config.HandshakeFormat, default PublicMessage
//	Which proposals a commit may have   RFC 9420, and more by Config.Policy, which sees senders and changes
//	External senders                    external_senders in the GroupContext, checked; their rights: Config.Policy
//	External joins                      whoever gets a GroupInfo with external_pub; more by Config.Policy
//	When to commit proposals            before application data (ErrPending); by whom: application
//	Same client                         CredentialVerifier: Identity and ValidSuccessor
//	Members that don't update           application: by PublicGroup's Info of each commit, then Remove
//
//	Padding                             Config.Padding, default steps of a quarter of the next power of two, at least 64
//	                                    bytes
//	Reinitialization                    application: a ReInit in CommitOptions.Proposals or Propose, then NewSuccessor
//	Updates of the own leaf             application: CommitOptions.ForcePath or ProposeUpdate
//	Full, partial and empty commits     full, of all pending proposals that go together; CommitOptions.SkipPending,
//	                                    ForcePath
//	required_capabilities in groups     application: GroupOptions.Extensions, none by default
package mls
