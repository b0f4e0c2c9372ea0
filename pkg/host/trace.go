package host

import (
	"context"
	"sync"
)

// Trace remembers what was last asked of the host under a context, so that a
// probe that never comes back can be told with the file or socket it hangs on.
type Trace struct {
	mu   sync.Mutex
	last string
}

type traceKey struct{}

// WithTrace returns a context whose host calls are noted in the Trace.
func WithTrace(ctx context.Context) (context.Context, *Trace) {
	t := new(Trace)
	return context.WithValue(ctx, traceKey{}, t), t
}

// Last is the most recent call's object, empty when there was none.
func (t *Trace) Last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

func trace(ctx context.Context, what string) {
	if t, _ := ctx.Value(traceKey{}).(*Trace); t != nil {
		t.mu.Lock()
		t.last = what
		t.mu.Unlock()
	}
}
