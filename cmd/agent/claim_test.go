package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http/httptest"
	"strings"
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
	asked   int
}

func (c *claimed) Claim(_ context.Context, dir string) (*host.Claim, error) {
	if dir != "/var/lib/host-hygiene" {
		return nil, errors.New("another folder: " + dir)
	}
	err := c.answers[min(c.asked, len(c.answers)-1)]
	c.asked++
	if err != nil {
		return nil, err
	}
	return new(host.Claim), nil
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
