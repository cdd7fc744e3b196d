package node

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// paceRefill is the time in which somebody may do again all that may be done at once.
	paceRefill = 1000 * time.Second
	maxPaced   = 100_000 // who are remembered at a time
)

// pace bounds how often each of many does something. The zero value is ready for use.
type pace[K comparable] struct {
	mu       sync.Mutex
	limiters map[K]*rate.Limiter // guarded by mu; of those who have done it lately
	swept    time.Time           // guarded by mu
}

// allow says whether who may do it now: burst times at once, and as often again in the time of paceRefill.
func (p *pace[K]) allow(who K, burst int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.limiters == nil {
		p.limiters = make(map[K]*rate.Limiter)
	}
	if now := time.Now(); now.Sub(p.swept) > 10*time.Second {
		p.swept = now
		for k, l := range p.limiters {
			if l.Tokens() >= float64(l.Burst()) {
				delete(p.limiters, k)
			}
		}
	}
	l := p.limiters[who]
	if l == nil {
		if len(p.limiters) >= maxPaced {
			return false
		}
		l = rate.NewLimiter(rate.Every(paceRefill/time.Duration(burst)), burst)
		p.limiters[who] = l
	}
	return l.Allow()
}
