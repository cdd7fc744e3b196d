// Package pace bounds how much each of many does in time: clients, users, peers, addresses. The memory that it takes is
// bounded as well, whoever comes.
package pace

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	maxKept    = 100_000 // of whom a Limiter knows at a time what they did
	sweepEvery = 10 * time.Second
)

// Rate is how much may be done: Burst at once, and PerSecond more as time goes by.
type Rate struct {
	PerSecond float64
	Burst     int
}

// Over is the Rate of who may do n at once, and n again within d.
func Over(n int, d time.Duration) Rate { return Rate{float64(n) / d.Seconds(), n} }

// Limiter bounds what each of many does. The zero value is ready for use. Those who have done nothing for as long as it
// takes to be where they began are forgotten; if there are more of the others than 100,000, the newcomers have one share
// together. Its methods may be called from several goroutines.
type Limiter[K comparable] struct {
	mu     sync.Mutex
	of     map[K]*rate.Limiter // guarded by mu
	others *rate.Limiter       // guarded by mu; of those for whom there is no place
	swept  time.Time           // guarded by mu
	max    int                 // in tests another bound than maxKept
}

// Take has who do n, and returns 0, or returns how long who has to wait for that. What is more than the burst can't be
// done at all: the wait is as long as a Duration can be.
func (l *Limiter[K]) Take(who K, n int, r Rate) time.Duration {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	got := l.limiter(who, r, now).ReserveN(now, n)
	if !got.OK() {
		return math.MaxInt64
	}
	wait := got.DelayFrom(now)
	if wait > 0 {
		got.CancelAt(now)
	}
	return wait
}

// Charge notes that who has done n, be it more than there was left: Owes says until when.
func (l *Limiter[K]) Charge(who K, n int, r Rate) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.limiter(who, r, now)
	for n > 0 {
		part := min(n, r.Burst)
		own.ReserveN(now, part)
		n -= part
	}
}

// Owes returns how long who has to do nothing for what was charged beyond the rate, 0 if there is nothing.
func (l *Limiter[K]) Owes(who K, r Rate) time.Duration { return l.Take(who, 0, r) }

// limiter returns that of who; mu is held.
func (l *Limiter[K]) limiter(who K, r Rate, now time.Time) *rate.Limiter {
	if l.of == nil {
		l.of = make(map[K]*rate.Limiter)
	}
	if now.Sub(l.swept) > sweepEvery {
		l.swept = now
		for k, one := range l.of {
			if one.TokensAt(now) >= float64(one.Burst()) {
				delete(l.of, k)
			}
		}
	}
	if one := l.of[who]; one != nil {
		return one
	}
	one := rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst)
	if max := l.max; len(l.of) >= maxKept || max > 0 && len(l.of) >= max {
		if l.others == nil {
			l.others = one
		}
		return l.others
	}
	l.of[who] = one
	return one
}

// Len returns of how many is known what they did.
func (l *Limiter[K]) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.of)
}
