package report

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// TestFeatures holds when the file is written, what stands in it, and that it ends
// by itself: the clock of the bubble begins at 2000-01-01.
func TestFeatures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "host-hygiene")
		var log strings.Builder
		f := NewFeatures(file, slog.New(slog.NewTextHandler(&log, nil)))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { f.Run(ctx); close(ended) }()
		tell := func(s engine.Snapshot) string {
			t.Helper()
			f.Report(s)
			synctest.Wait()
			data, err := os.ReadFile(file)
			if err != nil {
				return err.Error()
			}
			return string(data)
		}
		well := snapshot(finding.Report{Probe: "mp", Summary: "2 of 2 paths"}, finding.Report{Probe: "none", Status: finding.NotApplicable})
		ill := snapshot(finding.Report{Probe: "mp", Findings: []finding.Finding{failed}})

		pending := well
		pending.Complete = false
		if got := tell(pending); !strings.Contains(got, "no such file") {
			t.Errorf("before the first pass has ended:\n%s", got)
		}
		const healthy = "hosthygiene.io/mp=False\nhosthygiene.io/Ready=True\n"
		if got := tell(well); got != "# +expiry-time=2000-01-01T00:15:00Z\n"+healthy {
			t.Errorf("a healthy node:\n%s", got)
		}
		time.Sleep(4 * time.Minute)
		if got := tell(well); !strings.HasPrefix(got, "# +expiry-time=2000-01-01T00:15:00Z\n") {
			t.Errorf("written again with nothing new:\n%s", got)
		}
		if got := tell(ill); got != "# +expiry-time=2000-01-01T00:19:00Z\nhosthygiene.io/mp=True\nhosthygiene.io/Ready=False\n" {
			t.Errorf("a fault:\n%s", got)
		}
		time.Sleep(5 * time.Minute)
		shutdown := well
		shutdown.Quiet = "systemd is shutting down"
		if got := tell(shutdown); !strings.HasPrefix(got, "# +expiry-time=2000-01-01T00:19:00Z\nhosthygiene.io/mp=True\n") {
			t.Errorf("at shutdown:\n%s", got)
		}
		if got := tell(ill); !strings.HasPrefix(got, "# +expiry-time=2000-01-01T00:24:00Z\nhosthygiene.io/mp=True\n") {
			t.Errorf("not renewed before it expires:\n%s", got)
		}
		slow := snapshot(finding.Report{Probe: "mp"})
		slow.Config.Interval = probes.Duration(time.Hour)
		if got := tell(slow); got != "# +expiry-time=2000-01-01T03:09:00Z\n"+healthy {
			t.Errorf("with an interval of an hour:\n%s", got)
		}
		entries, _ := os.ReadDir(filepath.Dir(file))
		if len(entries) != 1 {
			t.Errorf("left beside it: %v", entries)
		}

		off := snapshot(finding.Report{Probe: "mp"})
		off.Config.Report.Conditions = false
		for range 2 {
			if got := tell(off); !strings.Contains(got, "no such file") {
				t.Errorf("with report.conditions off:\n%s", got)
			}
		}
		if got := tell(well); !strings.HasSuffix(got, healthy) {
			t.Errorf("switched on again:\n%s", got)
		}
		if log.Len() != 0 {
			t.Error(log.String())
		}

		if err := os.RemoveAll(filepath.Dir(file)); err != nil {
			t.Fatal(err)
		}
		tell(ill)
		tell(ill)
		if n := strings.Count(log.String(), "is not told"); n != 1 {
			t.Errorf("told %d times that it can not be written:\n%s", n, log.String())
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if got := tell(ill); !strings.Contains(got, "Ready=False") {
			t.Errorf("not tried again:\n%s", got)
		}
		cancel()
		<-ended
		if _, err := os.Stat(file); err != nil {
			t.Errorf("an agent that ends takes its word back before the next one speaks: %v", err)
		}
	})
}
