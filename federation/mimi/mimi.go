// Package mimi has the names and the wire types of MIMI (draft-ietf-mimi-protocol-06): one file per endpoint, the
// participant list and room metadata that members agree on, and the policy that hub and clients check of every
// commit alike.
//
// # Endpoints
//
// Where each endpoint of the draft is served: the names are those of the directory document, the files those of this module
// and, in the last column, of the test. Package federation has the server and the client of all of them (server.go,
// client.go), and TestClientReachesEveryEndpoint. The gateway is where RFC 9540 has it.
//
//	endpoint         section  implemented                           test
//	directory        5.1      federation/server.go getDirectory     federation/server_test.go TestDirectoryThatLeadsElsewhereIsNotFollowed
//	keyMaterial      5.2      node/key_packages.go keyMaterial      node/key_packages_test.go TestKeyMaterialCodes
//	update           5.3      node/hub.go update                    node/hub_test.go TestOneCommitWinsAnEpoch
//	submitMessage    5.4      node/hub_message.go submitMessage     node/hub_test.go TestRepeatedSubmissionsGetTheFirstAnswer
//	notify           5.5      node/follower.go notify               node/follower_test.go TestRepeatedNotificationsChangeNothing
//	groupInfo        5.6      node/hub_message.go groupInfo         node/follower_test.go TestOnlyParticipantsGetTheGroupInfo
//	requestConsent   5.7      node/consent.go requestConsent        node/consent_test.go TestFloodsOfRequestsForConsentAreBounded
//	updateConsent    5.7      node/consent.go updateConsent         node/consent_test.go TestADenialBindsColleaguesAndIsNotTold
//	identifierQuery  5.8      node/search.go identifierQuery        node/search_test.go TestUsersAreFoundAsTheyWish
//	reportAbuse      5.9      node/reports.go reportAbuse           node/reports_test.go TestForgedReportsAreRefused
//	proxyDownload    5.10.2   node/downloads.go proxyDownload       node/assets_test.go TestAssetsComeThroughTheHubOfTheRoom
//	ohttpGateway     5.10.3   node/oblivious.go oblivious           node/oblivious_test.go TestHubsFetchWhatRelaysCannotSee
//
// # What departs from the draft, and what is chosen where it has a gap
//
// Everywhere: a refusal for which the draft has no response code is an HTTP status with a problem document (RFC 9457, package
// federation). The fields Parley-Seq and Parley-Head are added, which a provider that isn't Parley neither sends nor reads.
//
// Updates (Section 5.3): a handshake is a PublicMessage, since the hub checks what it orders. A commit that comes again gets
// its first answer again. Of the ways to convey a ratchet tree (draft-mahy-mls-ratchet-tree-options) a hub takes all but an
// address, see RatchetTreeOption.Check; and it gives trees inline.
//
// Leaving (Section 3.5): the client that asks proposes a SelfRemove (draft-ietf-mls-extensions) where the draft has a Remove,
// Removes of the user's other clients, and the change of the participant list. A hub takes no commit of a member without all
// of it, and no external commit without the SelfRemoves. What an external commit voids of it the hub proposes anew, the change
// of the list too, which RoomPolicy lets it do.
//
// Removes of the hub (Section 5.5, which leaves open for whom): of clients that were revoked, which is how a provider says
// that a client was deleted, in the trust bundle that it gives to its peers; whose certificates have expired, or whose leaves
// are late by the room's LeafRenewal, and the hub's time of grace is over. A user none of whose clients is left stays a
// participant, to come back with a new one, also where key material is answered with userDeleted. New proposals after an
// external commit are stapled to it, and so the client that joins gets its own commit with them. Members commit what they see a
// reason for, see removal.go of package client.
//
// Messages (Section 5.4): they are accepted in the current epoch only, and one that comes again gets its first answer again,
// also when the epoch is over.
//
// Fanout (Section 5.5): everything that a provider gets of a room has its number in the room's log, and is known again by that;
// only without a number the bytes decide. The sender's provider gets what it has sent itself, like all others. A
// Welcome goes to the providers of those who are added only.
//
// Fanout to a peer that is away for too long: of what waits for it the oldest is dropped (federation.OutboxConfig.Bound), and
// it learns from the numbers that it is behind. One that isn't Parley can't.
//
// Franking (Sections 5.4 and 5.9), where the draft leaves something open: the hub's franking agent is in a room's
// GroupContext from its beginning (FrankedRoom) and no proposal changes it. The franking tag is of the application data,
// with the framing of its media type, and so that the hub can compute it again, that is what an AbusiveMessage has as its
// message_content. A report with messages need not come from a participant, since they prove themselves; but who has a role
// in the room needs canReportAbuse, as far as the hub knows who reports. The reason codes that the draft doesn't define are
// kept as they come.
//
// Messages of a kind that the sender's role may not send (draft-ietf-mimi-room-policy-03, Section 8) are discarded by every
// client that gets them, see kinds.go of package client: a hub sees only whether a role may send anything at all.
//
// Group info (Section 5.6): it is for who could join with it, see MayAsk: clients of participants, and those whom the room's
// roles, a preauthorization or a link let in. Whether there is a joining code is said alike in the request and in what is
// signed of it. A code, opaque in the draft, is a signature with a link's key for one client, and comes again in the external
// commit, so that members check it too (join_links.go). The hub answers notAuthorized for whatever is wrong with one. The
// ratchet tree is inline.
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
// Downloads (Section 5.10): assets are fetched through the hub; there is no direct download. The node's downloads.go has the
// rest. For Oblivious HTTP the draft doesn't say where the hub's gateway is and has its keys, nor what keeps the relay from
// giving clients others: the gateway isn't in the directory but where RFC 9540 has it, and the keys come signed as well, with
// the hub's key in the group (GatewayKeys). It takes requests for a range of an asset only, since what is encapsulated is in
// memory as a whole. A client asks the gateway if the hub has one, and else proxyDownload, as far as the room's asset_policy
// allows both. A message's assets are checked against the policy by who sends it and again by who fetches them; the hub, which
// sees neither, checks the policy itself. Clients upload to their own provider, whatever the policy's location.
//
// History (draft-ietf-mimi-room-policy-03, Section 6.6, which doesn't say how it is shared): a device gives what it has to
// another one of its user, in assets of their provider whose keys are sealed to the other's leaf (HistoryOffer). Users
// don't give it to other users. ShareHistory is what the policy says of it; members keep it, for no hub can see what is in
// a message. A max_time_period of 0 is no history.
//
// Room policies (draft-ietf-mimi-room-policy-03): supported are the components that PolicyComponents has. Status notifications,
// link previews, logging and the operational parameters of its Section 7 but for leaf renewal aren't, nor are rooms that depend
// on another one. A component is changed by who has the capability that RoomPolicy asks for; the draft names few.
//
// Typing and receipts, of which the draft has nothing: PrivateMessages with an Ephemeral go to the hub, and from it to all who
// are connected, by an endpoint of Parley's (federation.EphemeralPath). They are in no log and in no store. A node that was
// restored from a backup asks its peers by two others (federation.LogPath, federation.KnownPath).
//
// All types are encoded as package codec has it. Decoding is strict and bounded: what doesn't encode to the same
// bytes again is refused. The package does no I/O.
package mimi
