package host

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Any call into the kernel may never come back: a file system whose server is
// gone, a device that queues for ever, a daemon that is stopped. No context can
// end such a call, so it runs on a goroutine of its own, which is given up when
// the caller's time is over. What was given up is remembered until it comes back:
// nobody asks the same thing again meanwhile, and their number is limited,
// because each holds a thread of the kernel.

// ErrTooManyHanging: so many calls to this host never came back that no further
// ones are made until some do.
var ErrTooManyHanging = errors.New("not asked, because too many calls to this host hang already")

const (
	// maxHanging limits the threads lost to calls that do not come back. Each
	// costs about 24 KiB of memory, most of it kernel stack.
	maxHanging = 64
	// hangsAfter is when a call that some caller gave up counts as hanging for
	// others as well; sooner they wait for it.
	hangsAfter = time.Second
	// defaultLimit bounds calls under a context without a deadline.
	defaultLimit = 10 * time.Second
)

// flights are the calls that are under way, by what they ask.
type flights struct {
	mu      sync.Mutex
	calls   map[string]*flight
	hanging int
}

type flight struct {
	since time.Time
	done  chan struct{}
	value any
	err   error
	late  bool // given up by a caller
	// dropped is set when nobody waits for the value any more.
	dropped bool
}

// share makes a call, or joins it when the same is under way, and returns its
// value; since is when a call that did not come back began. The value belongs to
// several callers and must not be changed.
func share[T any](ctx context.Context, fl *flights, what string, f func() (T, error)) (value T, since time.Time, err error) {
	trace(ctx, what)
	if err := ctx.Err(); err != nil {
		return value, since, fmt.Errorf("%s: not asked: %w", what, err)
	}
	fl.mu.Lock()
	c := fl.calls[what]
	if c != nil && c.late && time.Since(c.since) > hangsAfter {
		fl.mu.Unlock()
		return value, c.since, hangs(what, c.since)
	}
	if c == nil {
		c, err = fl.start(what, func() (any, error) { return f() }, nil)
	}
	fl.mu.Unlock()
	if err != nil {
		return value, since, fmt.Errorf("%s: %w", what, err)
	}
	return wait[T](ctx, fl, what, c, false)
}

// bound makes a call of the caller's own; drop disposes of the value when it
// comes after the caller has left.
func bound[T any](ctx context.Context, fl *flights, what string, drop func(T), f func() (T, error)) (value T, err error) {
	trace(ctx, what)
	if err := ctx.Err(); err != nil {
		return value, fmt.Errorf("%s: not asked: %w", what, err)
	}
	fl.mu.Lock()
	c, err := fl.start("", func() (any, error) { return f() }, func(v any) {
		if drop != nil {
			drop(v.(T))
		}
	})
	fl.mu.Unlock()
	if err != nil {
		return value, fmt.Errorf("%s: %w", what, err)
	}
	value, _, err = wait[T](ctx, fl, what, c, true)
	return value, err
}

// start begins a call; fl.mu is held. An empty key makes a call nobody joins.
func (fl *flights) start(key string, f func() (any, error), drop func(any)) (*flight, error) {
	if fl.hanging >= maxHanging {
		return nil, ErrTooManyHanging
	}
	c := &flight{since: time.Now(), done: make(chan struct{})}
	if key != "" {
		if fl.calls == nil {
			fl.calls = map[string]*flight{}
		}
		fl.calls[key] = c
	}
	go func() {
		value, err := protect(f)
		fl.mu.Lock()
		c.value, c.err = value, err
		if key != "" {
			delete(fl.calls, key)
		}
		if c.late {
			fl.hanging--
		}
		dropped := c.dropped
		close(c.done)
		fl.mu.Unlock()
		if dropped && drop != nil && err == nil {
			drop(value)
		}
	}()
	return c, nil
}

func wait[T any](ctx context.Context, fl *flights, what string, c *flight, own bool) (value T, since time.Time, err error) {
	var limit <-chan time.Time
	if _, ok := ctx.Deadline(); !ok {
		timer := time.NewTimer(defaultLimit)
		defer timer.Stop()
		limit = timer.C
	}
	select {
	case <-c.done:
	case <-ctx.Done():
	case <-limit:
	}
	fl.mu.Lock()
	select {
	case <-c.done:
		fl.mu.Unlock()
		value, _ = c.value.(T)
		return value, since, c.err
	default:
	}
	if !c.late {
		c.late = true
		fl.hanging++
	}
	c.dropped = own
	fl.mu.Unlock()
	if errors.Is(ctx.Err(), context.Canceled) {
		return value, c.since, fmt.Errorf("%s: %w", what, context.Canceled)
	}
	return value, c.since, hangs(what, c.since)
}

func hangs(what string, since time.Time) error {
	return fmt.Errorf("%s: %w, asked %s ago", what, ErrNoReply, time.Since(since).Round(time.Millisecond))
}

// protect turns a panic into an error: the engine's own recovery does not reach
// the goroutines started here.
func protect[T any](f func() (T, error)) (value T, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return f()
}
