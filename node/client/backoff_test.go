package client

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/node/api"
)

func busyError(after time.Duration) error {
	e := connect.NewError(connect.CodeResourceExhausted, errors.New("busy"))
	d, err := connect.NewErrorDetail(&api.ErrorInfo{Code: codeBusy, RetryAfterMs: uint64(after.Milliseconds())})
	if err != nil {
		panic(err)
	}
	e.AddDetail(d)
	return e
}

func TestWhatIsBusyIsLeftAloneForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b backoff
		waited := func(method string) time.Duration {
			began := time.Now()
			if err := b.wait(t.Context(), method); err != nil {
				t.Error(err)
			}
			return time.Since(began)
		}
		b.answered("/a", busyError(2*time.Second))
		if d := waited("/b"); d != 0 {
			t.Errorf("another method waits %v", d)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.wait(short, "/a"); Code(err) != codeBusy || short.Err() != nil {
			t.Errorf("who can't wait gets %v", err)
		}
		if d := waited("/a"); d < 2*time.Second || d > 3*time.Second {
			t.Errorf("it waits %v, want 2 s and a part", d)
		}
		b.answered("/a", busyError(0))
		if d := waited("/a"); d < 4*time.Second {
			t.Errorf("the second time it waits %v, want 4 s", d)
		}
		b.answered("/a", busyError(time.Hour))
		if d := waited("/a"); d > 2*maxBusy {
			t.Errorf("it waits %v", d)
		}
		b.answered("/a", nil)
		if d := waited("/a"); d != 0 {
			t.Errorf("after an answer it waits %v", d)
		}
	})
}

// TestLimitedClientsLoseNothing has devices say more than their node lets them, all at once.
func TestLimitedClientsLoseNothing(t *testing.T) {
	alpha := providers(t, "alpha")[0]
	alice, bob := alpha.enrol("alice", "alice-laptop"), alpha.enrol("bob", "bob-phone")
	room := alice.create(bob.User()).URI()
	within(t, func() error { _, err := bob.Room(room); return err })
	alpha.stop()
	alpha.config.Limits.RequestsPerSecond = 15
	alpha.start()
	var want []string
	for i := range 45 {
		text := fmt.Sprint("message ", i)
		alice.say(room, text)
		want = append(want, "alice-laptop: "+text)
	}
	sees(t, room, want, alice, bob)
}
