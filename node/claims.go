package node

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/parley-mls/parley/federation/mimi"
)

// A provider claims so many KeyPackages of one user's clients at once, and one each claimEvery in the long run. A hub
// needs one for each of its rooms that the user is added to; without a bound it could use up all that a user has.
const (
	claimBurst = 100
	claimEvery = 10 * time.Second
	maxClaims  = 100_000 // pairs of provider and user that are remembered
)

// claims limits how many KeyPackages each other provider claims of each user. The zero value is ready for use.
type claims struct {
	mu       sync.Mutex
	limiters map[claimPair]*rate.Limiter // guarded by mu; of those who have claimed lately
	swept    time.Time                   // guarded by mu
}

type claimPair struct {
	from string
	user mimi.URI
}

// allow counts a claim by a provider, unless that is own, whose clients are limited by themselves.
func (c *claims) allow(own, from string, user mimi.URI) error {
	if from == own {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limiters == nil {
		c.limiters = make(map[claimPair]*rate.Limiter)
	}
	if now := time.Now(); now.Sub(c.swept) > 10*time.Second {
		c.swept = now
		for p, l := range c.limiters {
			if l.Tokens() >= claimBurst {
				delete(c.limiters, p)
			}
		}
	}
	pair := claimPair{from, user}
	l := c.limiters[pair]
	if l == nil {
		if len(c.limiters) >= maxClaims {
			return refuse("busy", "too many claims of KeyPackages")
		}
		l = rate.NewLimiter(rate.Every(claimEvery), claimBurst)
		c.limiters[pair] = l
	}
	if !l.Allow() {
		return refuse("busy", "%s claims too many KeyPackages of %s", from, user)
	}
	return nil
}
