package mls

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
)

// minParallel is how many signatures or encryptions make goroutines worth their start.
const minParallel = 8

// parallel calls f for 0 to n-1 on at most GOMAXPROCS goroutines and returns the error of the lowest index that
// failed.
func parallel(n int, f func(i int) error) error {
	workers := min(runtime.GOMAXPROCS(0), n/(minParallel/2))
	if workers < 2 {
		for i := range n {
			if err := f(i); err != nil {
				return err
			}
		}
		return nil
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
				if err := f(int(i)); err != nil {
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

// sealAll encrypts to n public keys, in parallel; job says what to whom. The randomness of all is read first and in
// order, so that the same randomness gives the same ciphertexts.
func (cs CipherSuite) sealAll(rand io.Reader, n int, info hpkeInfo, job func(i int) (to HPKEPublicKey, plaintext []byte)) ([]HPKECiphertext, error) {
	_, size := cs.params().seedSizes()
	seeds := make(secret, n*size)
	if _, err := io.ReadFull(rand, seeds); err != nil {
		return nil, fmt.Errorf("mls: read randomness: %w", err)
	}
	out := make([]HPKECiphertext, n)
	err := parallel(n, func(i int) error {
		to, plaintext := job(i)
		ct, err := cs.hpkeSeal(bytes.NewReader(seeds[i*size:][:size]), to, info, plaintext)
		out[i] = ct
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
