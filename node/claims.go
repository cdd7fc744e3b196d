package node

import (
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/transport/pace"
)

// claims bounds how many KeyPackages are claimed. A hub needs one of each client of a user for each of its rooms that the
// user is added to; without a bound it, or one of its users, could use up all that a user has. The zero value is ready
// for use.
type claims struct {
	requesters pace.Limiter[mimi.URI]
	pairs      pace.Limiter[claimPair]
}

// claimPair is a user, or the provider of the hub, who claims, and the user whose KeyPackages they are.
type claimPair struct {
	by   string
	user mimi.URI
}

// allow counts a claim, which the requester has signed and the node of from has sent. Own users' claims are counted by
// user only.
func (c *claims) allow(own, from string, req *mimi.KeyMaterialRequest, limits Limits) error {
	if from != own {
		if wait := c.pairs.Take(claimPair{from, req.TargetUser}, 1, slowly(limits.ClaimsPerTarget)); wait > 0 {
			return busy(wait, "%s claims too many KeyPackages of %s", from, req.TargetUser)
		}
	}
	if wait := c.pairs.Take(claimPair{string(req.RequestingUser), req.TargetUser}, 1, slowly(limits.ClaimsPerTarget)); wait > 0 {
		return busy(wait, "%s claims too many KeyPackages of %s", req.RequestingUser, req.TargetUser)
	}
	if wait := c.requesters.Take(req.RequestingUser, 1, slowly(limits.ClaimsPerRequester)); wait > 0 {
		return busy(wait, "%s claims too many KeyPackages", req.RequestingUser)
	}
	return nil
}
