package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/report"
)

// claimed answers one claim after the other; the last answer stays.
type claimed struct {
	answers []error
	asked   atomic.Int64
}

// errOrphaned is the answer that the holder has ended and not let go.
var errOrphaned = errors.New("orphaned")

func (c *claimed) Claim(_ context.Context, dir string) (*host.Claim, error) {
	if dir != "/var/lib/host-hygiene" {
		return nil, errors.New("another folder: " + dir)
	}
	err := c.answers[min(int(c.asked.Add(1)), len(c.answers))-1]
	switch err {
	case nil:
		return noClaim(0), nil
	case errOrphaned:
		return noClaim(4711), nil
	}
	return nil, err
}

// noClaim has no descriptor, or closing it would close the test's input.
func noClaim(orphaned int) *host.Claim {
	c := host.NoClaim()
	if c.Orphaned = orphaned; orphaned != 0 {
		c.Despite = "process 4711 has ended"
	}
	return c
}

// A process that was killed holds its claim until the kernel has come round to
// it: who took that for one that hangs would go on beside the next to start.
func TestAKilledAgentIsNoOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &claimed{answers: []error{errOrphaned, errOrphaned, nil}}
		claim, err := claimHost(t.Context(), c, slog.New(slog.DiscardHandler), func(error) {})
		if err != nil || claim.Orphaned != 0 || c.asked.Load() != 3 {
			t.Errorf("%+v, %v, asked %d times", claim, err, c.asked.Load())
		}
		began := time.Now()
		c = &claimed{answers: []error{errOrphaned}}
		claim, err = claimHost(t.Context(), c, slog.New(slog.DiscardHandler), func(error) {})
		if err != nil || claim.Orphaned == 0 || time.Since(began) != orphanAfter {
			t.Errorf("one that hangs: %+v, %v after %s", claim, err, time.Since(began))
		}
	})
}

func TestInherit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := &host.ClaimedError{PID: 4712}
		if err := inherit(t.Context(), &claimed{answers: []error{errOrphaned, errOrphaned, held}}); !errors.As(err, &held) {
			t.Errorf("another agent took it: %v", err)
		}
		ctx, stop := context.WithCancel(t.Context())
		c := &claimed{answers: []error{errOrphaned, errors.New("of the moment"), nil}}
		done := make(chan error, 1)
		go func() { done <- inherit(ctx, c) }()
		time.Sleep(2*claimEvery + claimEvery/2)
		synctest.Wait()
		if c.asked.Load() != 3 {
			t.Errorf("asked %d times", c.asked.Load())
		}
		time.Sleep(time.Hour)
		if c.asked.Load() != 3 {
			t.Errorf("asked %d times, of which the third got it", c.asked.Load())
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A stranger may hold the claim for as long as it likes, and is not looked at each
// second for that.
func TestInheritFromAStranger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &claimed{answers: []error{errOrphaned}}
		done := make(chan error, 1)
		ctx, stop := context.WithCancel(t.Context())
		go func() { done <- inherit(ctx, c) }()
		time.Sleep(orphanAfter + claimEvery/2)
		synctest.Wait()
		if c.asked.Load() != 16 {
			t.Errorf("asked %d times in the first 15 s", c.asked.Load())
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if c.asked.Load() != 16+60 {
			t.Errorf("asked %d times in the ten minutes after", c.asked.Load()-16)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestASecondAgentYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := &host.ClaimedError{Dir: "/var/lib/host-hygiene", PID: 4711}
		c := &claimed{answers: []error{held, held, held, nil}}
		var log bytes.Buffer
		var y yielded
		d := daemon{livenessLimit: time.Minute}
		logger := slog.New(slog.NewTextHandler(&log, nil))
		publisher := report.NewPublisher(nil, "n1", time.Now(), logger, nil)
		health := d.health(engine.New(nil, logger, nil), publisher, &y)
		ask := func(path string) (int, string) {
			w := httptest.NewRecorder()
			health.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
			return w.Code, w.Body.String()
		}
		began := time.Now()
		claim, err := claimHost(t.Context(), c, logger, func(to error) {
			y.to.Store(&to)
			if code, _ := ask("/healthz"); code != 200 {
				t.Errorf("it is not alive while it waits: %d", code)
			}
			if code, body := ask("/readyz"); code != 503 || !strings.Contains(body, "process 4711") {
				t.Errorf("ready while it waits: %d %s", code, body)
			}
		})
		if claim == nil || err != nil || time.Since(began) != 3*time.Second {
			t.Errorf("%v, %v after %s", claim, err, time.Since(began))
		}
		if n := strings.Count(log.String(), "another agent runs on this node"); n != 1 {
			t.Errorf("said %d times: %s", n, log.String())
		}
	})
}

func TestAgentWithoutItsFolder(t *testing.T) {
	c := &claimed{answers: []error{fs.ErrNotExist}}
	_, err := claimHost(t.Context(), c, slog.New(slog.DiscardHandler), func(error) { t.Error("it waits") })
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestAWaitingAgentEnds(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	c := &claimed{answers: []error{&host.ClaimedError{}}}
	if _, err := claimHost(ctx, c, slog.New(slog.DiscardHandler), func(error) { stop() }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
