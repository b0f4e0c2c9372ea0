package report

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
)

func metricsSnapshot() engine.Snapshot {
	s := snapshot(
		finding.Report{Probe: "time", Findings: []finding.Finding{{Reason: "ClockOffsetHigh", Severity: finding.Critical, Message: "m"}},
			Samples: []finding.Sample{
				{Metric: "hosthygiene_time_offset_seconds", Value: 3},
				{Metric: "hosthygiene_time_error_bound_seconds", Value: 4},
			}},
		finding.Report{Probe: "multipath", Findings: []finding.Finding{muted}, Samples: []finding.Sample{
			{Metric: "hosthygiene_multipath_paths", Labels: []string{"state", "active", "map", "mpatha"}, Value: 2},
			{Metric: "hosthygiene_multipath_paths", Labels: []string{"map", "mpatha", "state", "failed"}, Value: 0},
		}},
		finding.Report{Probe: "iscsi", Samples: []finding.Sample{
			{Metric: "hosthygiene_iscsi_sessions", Labels: []string{"state", "LOGGED_IN"}, Value: 1},
			{Metric: "hosthygiene_iscsi_initiator_info", Labels: []string{"hash", "0123456789ab"}, Value: 1},
		}},
		finding.Report{Probe: "kernel", Samples: []finding.Sample{{Metric: "hosthygiene_identity_info", Labels: []string{"kind", "machine-id", "hash", "0123456789ab"}, Value: 1}}},
		finding.Report{Probe: "pids", Samples: []finding.Sample{{Metric: "hosthygiene_pids", Labels: []string{"scope", "node", "kind", "used"}, Value: 99}}},
		finding.Report{Probe: "oom", Err: errors.New("x"), Samples: []finding.Sample{{Metric: "hosthygiene_oom_kills_total", Labels: []string{"scope", "node"}, Value: 5}}},
		finding.Report{Probe: "packages", Samples: []finding.Sample{{Metric: "hosthygiene_package_installed", Labels: []string{"package", "iscsi"}, Value: 1}}},
	)
	s.Runs = map[engine.RunKey]int{{Probe: "time", Result: "ok"}: 7}
	s.LastSuccess = map[string]time.Time{"time": time.UnixMilli(1_700_000_000_500)}
	return s
}

func TestMetrics(t *testing.T) {
	m := NewMetrics("v1", func() map[[2]string]int { return map[[2]string]int{{"events", "ok"}: 3} })
	m.Report(metricsSnapshot())
	for _, want := range []string{`
# HELP hosthygiene_probe_status 1 for the status the probe has: OK, Problem, Unknown or NotApplicable.
# TYPE hosthygiene_probe_status gauge
hosthygiene_probe_status{probe="oom",status="Unknown"} 1
`, `
hosthygiene_multipath_paths{map="mpatha",state="active"} 2
`, `
hosthygiene_problem{probe="time",reason="ClockOffsetHigh",severity="critical"} 1
hosthygiene_problem{probe="time",reason="ClockOffsetHigh",severity="warning"} 0
`, `
hosthygiene_problem{probe="multipath",reason="AllPathsFailed",severity="critical"} 0
`, `
hosthygiene_oom_kills_total{scope="node"} 5
hosthygiene_config_last_reload_successful 1
hosthygiene_probe_runs_total{probe="time",result="ok"} 7
hosthygiene_probe_last_success_timestamp_seconds{probe="time"} 1.7000000005e+09
hosthygiene_api_writes_total{outcome="ok",resource="events"} 3
`} {
		text := exposition(t, m)
		for line := range strings.Lines(strings.TrimSpace(want)) {
			if !strings.Contains(text, strings.TrimSpace(line)+"\n") {
				t.Errorf("no %s", line)
			}
		}
	}
	if problems, err := testutil.GatherAndLint(registry(m)); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}

func registry(m *Metrics) *prometheus.Registry {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(m)
	return reg
}

func exposition(t *testing.T, m *Metrics) string {
	t.Helper()
	families, err := registry(m).Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestPromtoolLikesTheMetrics(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed; make setup installs it")
	}
	m := NewMetrics("v1", nil)
	m.Remedies = func() map[[2]string]int { return map[[2]string]int{{"install-package", "failed"}: 0} }
	m.Report(metricsSnapshot())
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(exposition(t, m))
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

// Before the first pass there is little to tell, and that little is told.
func TestMetricsBeforeTheFirstPass(t *testing.T) {
	m := NewMetrics("v1", nil)
	m.Remedies = func() map[[2]string]int { return map[[2]string]int{{"install-package", "failed"}: 2} }
	if text := exposition(t, m); !strings.Contains(text, `hosthygiene_build_info{`) || strings.Contains(text, "hosthygiene_problem") ||
		!strings.Contains(text, `hosthygiene_remedies_total{action="install-package",result="failed"} 2`) {
		t.Errorf("%s", text)
	}
}
