package report

import (
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
)

// Metrics is a Prometheus collector over the latest snapshot. Series are made
// at scrape time from what is true then, so none can go stale.
type Metrics struct {
	version string
	writes  func() map[[2]string]int
	// Remedies counts remedies by action and result; nil for none. It is set
	// before the first scrape.
	Remedies func() map[[2]string]int
	latest   atomic.Pointer[engine.Snapshot]
}

// NewMetrics returns the collector. writes counts API writes by resource and
// outcome; it may be nil.
func NewMetrics(version string, writes func() map[[2]string]int) *Metrics {
	if writes == nil {
		writes = func() map[[2]string]int { return nil }
	}
	return &Metrics{version: version, writes: writes}
}

// Report implements [engine.Reporter].
func (m *Metrics) Report(s engine.Snapshot) { m.latest.Store(&s) }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	descProblem     = desc("hosthygiene_problem", "1 while a finding of this reason and severity is in force and not muted.", "probe", "reason", "severity")
	descStatus      = desc("hosthygiene_probe_status", "1 for the status the probe has: OK, Problem, Unknown or NotApplicable.", "probe", "status")
	descDuration    = desc("hosthygiene_probe_duration_seconds", "How long the probe's last run took.", "probe")
	descRuns        = desc("hosthygiene_probe_runs_total", "Runs of the probe by how they ended: ok, error, timeout or panic.", "probe", "result")
	descLastSuccess = desc("hosthygiene_probe_last_success_timestamp_seconds", "When the probe last ran without an error.", "probe")
	descWrites      = desc("hosthygiene_api_writes_total", "Writes to the API server by resource and outcome.", "resource", "outcome")
	descRemedies    = desc("hosthygiene_remedies_total", "Remedies by action and what became of them: planned, started, applied, staged, confirmed, failed, rolled-back or skipped.", "action", "result")
	descReload      = desc("hosthygiene_config_last_reload_successful", "1 when the config on disk is the one in force.")
	descBuild       = desc("hosthygiene_build_info", "A metric with value 1, labelled with the agent's version.", "version", "goversion")
)

// sampled are the metrics whose values the probes supply.
var sampled = map[string]struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	// labels in the order of desc.
	labels []string
}{
	"hosthygiene_time_offset_seconds":                          sample(prometheus.GaugeValue, "hosthygiene_time_offset_seconds", "The clock's offset from true time by its daemon's account; positive when slow."),
	"hosthygiene_time_error_bound_seconds":                     sample(prometheus.GaugeValue, "hosthygiene_time_error_bound_seconds", "How far off the clock may be at worst."),
	"hosthygiene_multipath_paths":                              sample(prometheus.GaugeValue, "hosthygiene_multipath_paths", "Paths of a multipath map by state; a map named by its WWID stands under wwid- and the start of the SHA-256 of the WWID.", "map", "state"),
	"hosthygiene_iscsi_sessions":                               sample(prometheus.GaugeValue, "hosthygiene_iscsi_sessions", "iSCSI sessions by state.", "state"),
	"hosthygiene_iscsi_initiator_info":                         sample(prometheus.GaugeValue, "hosthygiene_iscsi_initiator_info", "1, labelled with the start of the SHA-256 of the initiator name: two nodes with one hash share a name.", "hash"),
	"hosthygiene_identity_info":                                sample(prometheus.GaugeValue, "hosthygiene_identity_info", "1, labelled with the start of the SHA-256 of a name no other machine may have: two nodes with one hash share it.", "kind", "hash"),
	"hosthygiene_pids":                                         sample(prometheus.GaugeValue, "hosthygiene_pids", "PIDs (threads) by scope: used, limit and reserved.", "scope", "kind"),
	"hosthygiene_oom_kills_total":                              sample(prometheus.CounterValue, "hosthygiene_oom_kills_total", "OOM kills counted by the kernel, by scope.", "scope"),
	"hosthygiene_reboot_required":                              sample(prometheus.GaugeValue, "hosthygiene_reboot_required", "1 while installed updates wait for a reboot."),
	"hosthygiene_updates_last_success_timestamp_seconds":       sample(prometheus.GaugeValue, "hosthygiene_updates_last_success_timestamp_seconds", "When automatic updates last succeeded, where that is known."),
	"hosthygiene_kubelet_certificate_expiry_timestamp_seconds": sample(prometheus.GaugeValue, "hosthygiene_kubelet_certificate_expiry_timestamp_seconds", "When a certificate of the kubelet ends: client or serving.", "certificate"),
	"hosthygiene_package_installed":                            sample(prometheus.GaugeValue, "hosthygiene_package_installed", "1 when the required package, or what it stands for, is installed.", "package"),
}

func sample(kind prometheus.ValueType, name, help string, labels ...string) (s struct {
	desc   *prometheus.Desc
	kind   prometheus.ValueType
	labels []string
}) {
	s.desc, s.kind, s.labels = desc(name, help, labels...), kind, labels
	return s
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descProblem, descStatus, descDuration, descRuns, descLastSuccess, descWrites, descRemedies, descReload, descBuild} {
		ch <- d
	}
	for _, s := range sampled {
		ch <- s.desc
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(descBuild, 1, m.version, runtime.Version())
	for k, n := range m.writes() {
		ch <- prometheus.MustNewConstMetric(descWrites, prometheus.CounterValue, float64(n), k[0], k[1])
	}
	if m.Remedies != nil {
		for k, n := range m.Remedies() {
			ch <- prometheus.MustNewConstMetric(descRemedies, prometheus.CounterValue, float64(n), k[0], k[1])
		}
	}
	s := m.latest.Load()
	if s == nil {
		return
	}
	gauge(descReload, truth(s.ConfigError == nil))
	m.problems(s, gauge)
	told := map[string]bool{}
	for _, r := range s.Reports {
		for _, status := range finding.Statuses() {
			gauge(descStatus, truth(r.Status == status), r.Probe, string(status))
		}
		gauge(descDuration, r.Duration.Seconds(), r.Probe)
		for _, v := range r.Samples {
			m.sample(ch, told, v)
		}
	}
	for k, n := range s.Runs {
		ch <- prometheus.MustNewConstMetric(descRuns, prometheus.CounterValue, float64(n), k.Probe, k.Result)
	}
	for probe, at := range s.LastSuccess {
		gauge(descLastSuccess, float64(at.UnixMilli())/1000, probe)
	}
}

// problems makes a series at 0 for every reason of every active probe, so that
// an alert on a change from 0 to 1 works from the first time on.
func (m *Metrics) problems(s *engine.Snapshot, gauge func(*prometheus.Desc, float64, ...string)) {
	type key struct {
		probe, reason string
		severity      finding.Severity
	}
	value := map[key]float64{}
	for _, p := range s.Probes {
		for _, rule := range p.Rules() {
			severities := append([]finding.Severity{rule.Severity}, rule.Also...)
			if own, ok := s.Config.Severity[rule.Reason]; ok {
				severities = []finding.Severity{own}
			}
			for _, sev := range severities {
				value[key{p.Name(), rule.Reason, sev}] = 0
			}
		}
	}
	for _, r := range s.Reports {
		for _, f := range r.Findings {
			if f.Muted == nil {
				value[key{r.Probe, f.Reason, f.Severity}] = 1
			}
		}
	}
	for k, v := range value {
		gauge(descProblem, v, k.probe, k.reason, string(k.severity))
	}
}

// maxLabel is the longest label value, in bytes.
const maxLabel = 256

// sample makes one series. Two with the same labels, which are cut and escaped
// and so need not be those of one thing, would fail the whole scrape: the first
// is told.
func (m *Metrics) sample(ch chan<- prometheus.Metric, told map[string]bool, v finding.Sample) {
	def, ok := sampled[v.Metric]
	if !ok {
		return // the test of this table against the probes fails before a user sees it
	}
	labels := make([]string, len(def.labels))
	for i, name := range def.labels {
		if at := slices.Index(v.Labels, name); at >= 0 && at+1 < len(v.Labels) {
			labels[i] = clip(oneLine(v.Labels[at+1]), maxLabel)
		}
	}
	key := v.Metric + "\x00" + strings.Join(labels, "\x00")
	if told[key] {
		return
	}
	told[key] = true
	metric, err := prometheus.NewConstMetric(def.desc, def.kind, v.Value, labels...)
	if err != nil {
		metric = prometheus.NewInvalidMetric(def.desc, err)
	}
	ch <- metric
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
