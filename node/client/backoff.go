package client

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"connectrpc.com/connect"
)

// maxBusy is the longest time that a method isn't called after the node said that it was called too often.
const maxBusy = 5 * time.Second

// backoff holds calls back of which the node has said that they are too many: of each method by itself, until the node
// wants to hear of it again, and longer from time to time if it still doesn't. The zero value is ready for use.
type backoff struct {
	mu      sync.Mutex
	methods map[string]crowded // guarded by mu; that were refused last
}

// crowded is a method that isn't to be called before a time.
type crowded struct {
	until time.Time
	delay time.Duration
	err   error // the refusal
}

// WrapUnary implements connect.Interceptor.
func (b *backoff) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		method := req.Spec().Procedure
		if err := b.wait(ctx, method); err != nil {
			return nil, err
		}
		res, err := next(ctx, req)
		b.answered(method, err)
		return res, err
	}
}

// WrapStreamingClient implements connect.Interceptor. Run decides when to open a stream anew.
func (b *backoff) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (b *backoff) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// wait waits until a method may be called. It fails at once with the refusal if ctx ends before.
func (b *backoff) wait(ctx context.Context, method string) error {
	b.mu.Lock()
	c, ok := b.methods[method]
	b.mu.Unlock()
	left := time.Until(c.until)
	if !ok || left <= 0 {
		return nil
	}
	left += rand.N(left/2 + 1) // those who wait don't come all at once
	if end, ok := ctx.Deadline(); ok && time.Until(end) < left {
		return c.err
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// answered takes note of the node's answer.
func (b *backoff) answered(method string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if Code(err) != codeBusy {
		delete(b.methods, method)
		return
	}
	if b.methods == nil {
		b.methods = make(map[string]crowded)
	}
	c := b.methods[method]
	c.delay = min(max(2*c.delay, RetryAfter(err), minRetry), maxBusy)
	c.until, c.err = time.Now().Add(c.delay), err
	b.methods[method] = c
}
