package mls

import (
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
)

// minParallel is how many signatures or encryptions make goroutines worth their start.
const minParallel = 8

// parallel calls f for 0 to n-1 on at most GOMAXPROCS goroutines and returns the error of the lowest index that
// failed. rand is handed to f safe for concurrent use; nil if f doesn't use it.
func parallel(n int, rand io.Reader, f func(i int, rand io.Reader) error) error {
	workers := min(runtime.GOMAXPROCS(0), n/(minParallel/2))
	if workers < 2 {
		for i := range n {
			if err := f(i, rand); err != nil {
				return err
			}
		}
		return nil
	}
	if rand != nil {
		rand = &lockedReader{r: rand}
	}
	var (
		next     atomic.Int64
		wg       sync.WaitGroup
		mu       sync.Mutex
		firstErr error
		errIndex = int64(n)
	)
	for range workers {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(n) {
					return
				}
				if err := f(int(i), rand); err != nil {
					mu.Lock()
					if i < errIndex {
						firstErr, errIndex = err, i
					}
					mu.Unlock()
					next.Store(int64(n))
					return
				}
			}
		})
	}
	wg.Wait()
	return firstErr
}

type lockedReader struct {
	mu sync.Mutex
	r  io.Reader
}

func (l *lockedReader) Read(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.r.Read(p)
	if err != nil {
		return n, fmt.Errorf("mls: read randomness: %w", err)
	}
	return n, nil
}
