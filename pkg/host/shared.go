package host

import (
	"context"
	"sync"
	"time"
)

type asOfKey struct{}

// AsOf returns a context under which what the probes of one pass share is read at
// t or later: t is when the pass began, all probes of it the same, or when
// something happened that the answer must show.
func AsOf(ctx context.Context, t time.Time) context.Context {
	return context.WithValue(ctx, asOfKey{}, t)
}

// sharedFor is how old what is shared may be under a context that does not say.
const sharedFor = time.Second

// shared is something that several probes of a pass ask for and is read once.
type shared[T any] struct {
	mu   sync.Mutex // held for a look only, never while reading
	last reading[T]
}

type reading[T any] struct {
	began time.Time
	value T
}

// get returns the last reading, or reads anew. Who asks while it is being read
// waits for the same reading, as long as his own context allows.
func (s *shared[T]) get(ctx context.Context, calls *flights, what string, read func() (T, error)) (T, error) {
	oldest, ok := ctx.Value(asOfKey{}).(time.Time)
	if !ok {
		oldest = time.Now().Add(-sharedFor)
	}
	s.mu.Lock()
	last := s.last
	s.mu.Unlock()
	for {
		if !last.began.IsZero() && !last.began.Before(oldest) {
			return last.value, nil
		}
		var err error
		last, _, err = share(ctx, calls, what, func() (reading[T], error) {
			r := reading[T]{began: time.Now()}
			var err error
			if r.value, err = read(); err == nil {
				s.mu.Lock()
				s.last = r
				s.mu.Unlock()
			}
			return r, err
		})
		if err != nil {
			return last.value, err
		}
		// The call that was joined may have begun too early.
	}
}
