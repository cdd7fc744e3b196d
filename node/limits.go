package node

import (
	"io"
	"math"
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/store"
	"github.com/parley-mls/parley/transport/pace"
)

// What bounds whom. Addresses: the transport counts handshakes and connections, auth what is asked without a token.
// Clients and users: auth counts requests and bytes, and what is in flight; streams, KeyPackages, rooms, claims, consents,
// queries, reports and group infos have limits of their own. Peers: admitPeer and package federation count requests and
// bytes, and what is in flight; each peer has a queue of its own, of references to what is in the logs anyway, with a bound, and the
// transport gives none of them connections of another. Everything that is refused is counted in parley_refused_total, by
// the code "busy".
//
// The limits of the configuration, what they count by, and the tests that reach them:
//
//	requests_per_second       client, user     TestRequestsAndBytesAreCountedByClientAndUser
//	bytes_per_second          client, user     TestRequestsAndBytesAreCountedByClientAndUser
//	bytes_in_flight           client           TestAClientHoldsALimitedAmountOfMemory
//	request_bytes             client           TestRequestsHaveALargestSize
//	streams                   client           TestAClientHasALimitedNumberOfStreams
//	key_packages              client           TestKeyPackagesThatCannotBeUsedAreNotPublished
//	key_package_days          client           TestKeyPackagesAreValidForALimitedTime
//	rooms                     user             TestAUserCreatesALimitedNumberOfRooms
//	members                   room             TestARoomHasALimitedNumberOfMembers
//	claims_per_requester      user             TestNobodyCanUseUpSomebodysKeyPackages
//	claims_per_target         user, peer       TestNobodyCanUseUpSomebodysKeyPackages
//	queries                   user, peer       TestNobodyListsTheUsers
//	consents                  user, peer       TestFloodsOfRequestsForConsentAreBounded
//	reports                   user, peer       TestForgedReportsAreLimited
//	ephemeral_per_second      user, peer       TestEphemeralMessagesAreLimited
//	group_infos               user, peer       TestRequestsForGroupInfosAreLimited
//	asset_mib                 user, peer       TestBadUploadsAreRefused
//	asset_quota_mib           user             TestUsersQuotaBoundsAssetsAndUploads
//	asset_days                user             TestAssetsExpire
//	grace_days                client           TestHubProposesToRemoveWhoIsExpiredOrLate
//	downloads                 user, peer       TestOneWhoRelaysTooMuchIsRefused
//	peer_requests_per_second  peer             TestAFloodingPeerTakesNothingFromOthers
//	peer_bytes_per_second     peer             TestAFloodingPeerTakesNothingFromOthers
//	peer_queue                peer             TestPeerThatWasAwayForTooLongIsBehind
//	connections               node             TestAPeerTakesNoConnectionsFromOthers
//	address_connections       address          TestOneAddressDoesNotTakeAllConnections
//	handshakes_per_second     address          TestAddressesAreProvedUnderLoad
//	anonymous_per_second      address          TestOneAddressTriesLittleWithoutAToken

// slowly is the rate of what is counted over a quarter of an hour.
func slowly(n int) pace.Rate { return pace.Over(n, 1000*time.Second) }

// clientsOfUser is how many times as much as one client all clients of a user may ask together.
const clientsOfUser = 4

func (l Limits) address() pace.Rate {
	return pace.Rate{PerSecond: float64(l.AnonymousPerSecond), Burst: 4 * l.AnonymousPerSecond}
}

func (l Limits) requests(clients int) pace.Rate {
	n := clients * l.RequestsPerSecond
	return pace.Rate{PerSecond: float64(n), Burst: 2 * n}
}

func (l Limits) bytes(clients int) pace.Rate {
	n := clients * l.BytesPerSecond
	return pace.Rate{PerSecond: float64(n), Burst: 2 * n}
}

func (l Limits) peerRequests() pace.Rate {
	return pace.Rate{PerSecond: float64(l.PeerRequestsPerSecond), Burst: 2 * l.PeerRequestsPerSecond}
}

func (l Limits) peerBytes() pace.Rate {
	return pace.Rate{PerSecond: float64(l.PeerBytesPerSecond), Burst: 2 * l.PeerBytesPerSecond}
}

// admit counts a request of a client.
func (a *auth) admit(s *session) error {
	wait := max(a.bytes.Owes(s.client, a.limits.bytes(1)), a.bytes.Owes(s.user, a.limits.bytes(clientsOfUser)))
	if wait > 0 {
		return busy(wait, "more than %d bytes per second", a.limits.BytesPerSecond)
	}
	if wait = a.requests.Take(s.client, 1, a.limits.requests(1)); wait == 0 {
		wait = a.requests.Take(s.user, 1, a.limits.requests(clientsOfUser))
	}
	if wait > 0 {
		return busy(wait, "more than %d requests per second", a.limits.RequestsPerSecond)
	}
	return nil
}

// countedBody is the body of a client's request. It counts what is read, and ends with a refusal if that is too much for
// all of the client's requests at the time.
type countedBody struct {
	io.ReadCloser
	g    gate
	s    *session
	read int64
}

// Read implements io.Reader.
func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.read += int64(n)
	if most := int64(b.g.n.cfg.Limits.BytesInFlight); b.s.inFlight.Add(int64(n)) > most {
		return 0, b.g.n.clientError("unread", b.s, busy(time.Second, "more than %d bytes at a time", most))
	}
	return n, err
}

// release gives back what the request took, and notes how much that was.
func (b *countedBody) release() {
	b.s.inFlight.Add(-b.read)
	a := b.g.n.auth
	n := int(min(b.read, math.MaxInt32))
	a.bytes.Charge(b.s.client, n, a.limits.bytes(1))
	a.bytes.Charge(b.s.user, n, a.limits.bytes(clientsOfUser))
}

// admitPeer counts a request of a peer, and the bytes of its body as far as they are known.
func (n *Node) admitPeer(peer string, bytes int64) error {
	wait := n.peerBytes.Owes(peer, n.cfg.Limits.peerBytes())
	if wait == 0 {
		wait = n.peerRequests.Take(peer, 1, n.cfg.Limits.peerRequests())
	}
	if wait > 0 {
		return peerError(busy(wait, "%s asks too much", peer))
	}
	n.peerBytes.Charge(peer, int(min(bytes, math.MaxInt32)), n.cfg.Limits.peerBytes())
	return nil
}

// usersOfPeer is how many times as much as one user all users of a peer may do together.
const usersOfPeer = 100

// paceReport counts a report of abuse and the messages in it, each of which costs the check of two signatures: of the
// user who brings it, or of the peer and the user whom it names.
func (n *Node) paceReport(by submitter, report *mimi.AbuseReport) error {
	cost, most := 1+len(report.Messages), n.cfg.Limits.Reports
	if cost > most {
		return refuse("tooLarge", "a report of %d messages, at most %d", len(report.Messages), most-1)
	}
	user, wait := by.user, time.Duration(0)
	if by.user == "" {
		user = report.ReportingUser
		wait = n.reportPace.Take(by.domain, cost, slowly(usersOfPeer*most))
	}
	if wait == 0 && user != "" {
		wait = n.reportPace.Take(string(user), cost, slowly(most))
	}
	if wait > 0 {
		return busy(wait, "too many reports of %s", by.name())
	}
	return nil
}

// paceInfo counts a request for what an external commit needs, of an own user or of a peer's users.
func (n *Node) paceInfo(who string, users int) error {
	if wait := n.infoPace.Take(who, 1, slowly(users*n.cfg.Limits.GroupInfos)); wait > 0 {
		return busy(wait, "%s asks for too many group infos", who)
	}
	return nil
}

// createdRooms counts the rooms that users have created here, so that a new one costs no search. The zero value is ready
// for use.
type createdRooms struct {
	mu sync.Mutex
	by map[mimi.URI]int // guarded by mu; of users who have created one lately
}

const maxCreators = 100_000 // whose rooms are kept counted

// add counts a room of a user, or refuses it if there are max of them.
func (c *createdRooms) add(s store.Store, user mimi.URI, max int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.by[user]
	if !ok {
		if err := store.ScanPrefix(s, key(prefixCreated, user), func(_, _ []byte) bool { n++; return true }); err != nil {
			return err
		}
		if c.by == nil || len(c.by) >= maxCreators {
			c.by = make(map[mimi.URI]int)
		}
	}
	if n >= max {
		c.by[user] = n
		return refuse("busy", "%s has created %d rooms, at most %d", user, n, max)
	}
	c.by[user] = n + 1
	return nil
}

// recount has a user's rooms counted anew when the next one comes.
func (c *createdRooms) recount(user mimi.URI) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.by, user)
}
