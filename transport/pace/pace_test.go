package pace

import (
	"math"
	"testing"
	"testing/synctest"
	"time"
)

func TestEachHasABurstAndAsMuchAgainLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter[string]
		r := Over(10, 100*time.Second)
		taken := func(who string) (n int) {
			for l.Take(who, 1, r) == 0 {
				n++
			}
			return n
		}
		if n := taken("a"); n != 10 {
			t.Errorf("%d at once, want 10", n)
		}
		if n := taken("b"); n != 10 {
			t.Errorf("another: %d at once, want 10", n)
		}
		if wait := l.Take("a", 1, r); wait != 10*time.Second {
			t.Errorf("the wait is %v, want 10 s", wait)
		}
		if wait := l.Take("a", 5, r); wait != 50*time.Second {
			t.Errorf("the wait for five is %v, want 50 s", wait)
		}
		time.Sleep(30 * time.Second)
		if n := taken("a"); n != 3 {
			t.Errorf("%d after 30 s, want 3", n)
		}
		if wait := l.Take("a", 11, r); wait != math.MaxInt64 {
			t.Errorf("more than the burst after %v", wait)
		}
	})
}

func TestWhatIsChargedIsOwed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter[string]
		r := Rate{PerSecond: 10, Burst: 20}
		if wait := l.Owes("a", r); wait != 0 {
			t.Errorf("owes %v at first", wait)
		}
		l.Charge("a", 20, r)
		if wait := l.Owes("a", r); wait != 0 {
			t.Errorf("owes %v after what may be done at once", wait)
		}
		l.Charge("a", 50, r) // more than a burst
		if wait := l.Owes("a", r); wait != 5*time.Second {
			t.Errorf("owes %v, want 5 s", wait)
		}
		if wait := l.Owes("b", r); wait != 0 {
			t.Errorf("another owes %v", wait)
		}
		time.Sleep(5 * time.Second)
		if wait := l.Owes("a", r); wait != 0 {
			t.Errorf("still owes %v", wait)
		}
	})
}

func TestMemoryIsBoundedWhoeverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Limiter[int]{max: 10}
		r := Over(5, 1000*time.Second)
		l.Take(0, 1, r)
		granted := 0
		for i := range 1000 {
			if l.Take(i, 1, r) == 0 {
				granted++
			}
		}
		if n := l.Len(); n != 10 {
			t.Errorf("%d are kept, want 10", n)
		}
		if granted != 15 {
			t.Errorf("%d were granted something, want the ten that are known and five of the others", granted)
		}
		if wait := l.Take(0, 3, r); wait != 0 {
			t.Errorf("who was known before has to wait %v", wait)
		}
		time.Sleep(1001 * time.Second)
		if l.Take(2000, 1, r); l.Len() != 1 {
			t.Errorf("%d are kept of whom there is nothing to know", l.Len())
		}
	})
}
