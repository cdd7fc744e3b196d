package node

import (
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"
)

func TestAStoppedNodeLeavesNothingRunning(t *testing.T) {
	alpha, _, alice, _, _, _ := twoNodes(t)
	alpha.stop()
	before := runtime.NumGoroutine()
	for range 3 {
		alpha.start()
		alice.authenticate()
		e := alice.subscribe()
		e.live()
		began := time.Now()
		alpha.stop()
		if d := time.Since(began); d > 2*shutdownTimeout {
			t.Errorf("stopping took %v", d)
		}
		if err := e.ended(); code(err) != "unavailable" {
			t.Errorf("the stream ended with %v", err)
		}
	}
	eventually(t, func() error {
		if n := runtime.NumGoroutine(); n > before+10 {
			if os.Getenv("PARLEY_TEST_LOG") != "" {
				pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
			}
			return fmt.Errorf("%d goroutines, before there were %d", n, before)
		}
		return nil
	})
}
