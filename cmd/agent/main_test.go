package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/pkg/terminal"
	"github.com/hosthygiene/agent/test/man"
)

var update = flag.Bool("update", false, "rewrite the golden outputs")

// agent runs a command line and returns what it printed and its exit code.
func agent(t *testing.T, args ...string) (out string, code int) {
	t.Helper()
	t.Setenv("NODE_NAME", "n1")
	root := newRoot(false)
	var b bytes.Buffer
	root.SetOut(&b)
	root.SetErr(&b)
	root.SetArgs(args)
	err := root.ExecuteContext(context.Background())
	code = exitCode(err)
	if err != nil {
		b.WriteString(err.Error())
	}
	return b.String(), code
}

// tree is a host at rest: everything that needs a running kernel is unknown.
func tree(t *testing.T) string {
	t.Helper()
	return hosttest.Load(t, "testdata/tree.txtar").Path("/")
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestCheckOverATree(t *testing.T) {
	out, code := agent(t, "check", "--root", tree(t), "--config", "testdata/require.yaml")
	if code != exitFinding {
		t.Errorf("exit code %d", code)
	}
	golden(t, "check.txt", out)
}

// TestWatch: through a pipe each pass comes with its time, or as one document more,
// and being interrupted is no failure.
func TestWatch(t *testing.T) {
	for output, want := range map[string]string{
		"table": "2000-01-01T00:00:03Z\nn1   (), kernel , init \n\nPROBE      STATUS        SUMMARY\ntime       OK            fine\n\n" +
			"2000-01-01T00:00:16Z\nn1   (), kernel , init \n\nPROBE      STATUS        SUMMARY\ntime       OK            fine\n\n",
		"yaml": "---\n{}---\n{}",
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithTimeout(t.Context(), 28*time.Second)
			defer stop()
			var b bytes.Buffer
			c := common{root: "/"}
			err := c.watch(ctx, &b, nil, 10*time.Second, output, func(context.Context) (report.HostReport, error) {
				time.Sleep(3 * time.Second)
				return report.HostReport{Node: "n1", Probes: []report.ProbeReport{{Name: "time", Status: finding.OK, Summary: "fine"}}}, nil
			})
			got := b.String()
			if output == "yaml" {
				got = regexp.MustCompile(`(?s)agentVersion.*?\n\n`).ReplaceAllString(got, "{}")
			}
			if err != nil || got != want {
				t.Errorf("%s: %v\n%q, want\n%q", output, err, got, want)
			}
		})
	}
}

// TestInterrupted: half a pass is not shown as if it told of the host.
func TestInterrupted(t *testing.T) {
	t.Setenv("NODE_NAME", "n1")
	ctx, stop := context.WithCancel(t.Context())
	stop()
	for _, args := range [][]string{{"check"}, {"check", "--watch"}, {"explain", "time"}, {"plan"}} {
		var b bytes.Buffer
		root := newRoot(false)
		root.SetOut(&b)
		root.SetArgs(append(args, "--root", tree(t)))
		want := exitUnknown
		if len(args) == 2 && args[1] == "--watch" {
			want = exitOK
		}
		if code := exitCode(root.ExecuteContext(ctx)); code != want || b.Len() > 0 {
			t.Errorf("%v: exit code %d, want %d; printed %q", args, code, want, b.String())
		}
	}
}

// TestColumns: no line of the table is longer than the terminal, but for words
// that are.
func TestColumns(t *testing.T) {
	r := report.HostReport{Node: "n1", Probes: []report.ProbeReport{{
		Name: "disks", Status: finding.Problem, Summary: strings.Repeat("some disks ", 20), Error: strings.Repeat("could not be seen ", 9),
		Findings: []finding.Finding{{Reason: "DeviceOffline", Severity: finding.Critical, Subject: "sda", Message: strings.Repeat("sda is offline ", 12),
			Evidence: []finding.Evidence{{Source: "chronyd sources, UDP 127.0.0.1:323", Observed: strings.Repeat("offline ", 12), Expected: "running"}}}},
	}}}
	for _, columns := range []int{80, 160} {
		var b bytes.Buffer
		if err := r.WriteTable(&b, report.Style{Look: terminal.Look{Columns: columns}, Wide: true}); err != nil {
			t.Fatal(err)
		}
		longest := 0
		for line := range strings.Lines(b.String()) {
			longest = max(longest, len(line)-1)
		}
		if !strings.Contains(b.String(), "[chronyd sources, UDP 127.0.0.1:323]") {
			t.Errorf("the source is broken:\n%s", b.String())
		}
		if longest > columns || longest < columns*3/4 {
			t.Errorf("the longest line of %d columns has %d:\n%s", columns, longest, b.String())
		}
	}
}

func TestCheckFormats(t *testing.T) {
	dir := tree(t)
	out, code := agent(t, "check", "--root", dir, "-o", "json")
	if code != exitUnknown {
		t.Errorf("exit code %d: nothing found, much unknown", code)
	}
	var r report.HostReport
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		t.Fatal(err)
	}
	if r.APIVersion != "hosthygiene.io/v1alpha1" || r.Kind != "HostReport" || r.Node != "n1" || r.Host.OSClass != "mutable" || len(r.Probes) != len(probeNames()) {
		t.Errorf("%+v", r)
	}
	if r.Time.IsZero() || r.Time.Location() != time.UTC {
		t.Errorf("time %s", r.Time)
	}
	out, _ = agent(t, "check", "--root", dir, "-o", "yaml")
	var y report.HostReport
	if err := yaml.UnmarshalStrict([]byte(out), &y); err != nil || len(y.Probes) != len(probeNames()) {
		t.Errorf("%v: %+v", err, y)
	}
	out, _ = agent(t, "check", "--root", dir, "-o", "junit")
	var suite struct {
		Tests  int    `xml:"tests,attr"`
		Errors int    `xml:"errors,attr"`
		Host   string `xml:"hostname,attr"`
		Cases  []struct {
			Name string `xml:"name,attr"`
		} `xml:"testcase"`
	}
	if err := xml.Unmarshal([]byte(out), &suite); err != nil || suite.Tests != len(probeNames()) || len(suite.Cases) != len(probeNames()) || suite.Errors == 0 || suite.Host != "n1" {
		t.Errorf("%v: %+v", err, suite)
	}
}

// TestJUnit: nothing that a probe tells is lost on the way into a pipeline.
func TestJUnit(t *testing.T) {
	info := finding.Finding{Reason: "AutomaticLogin", Severity: finding.Info, Message: "logs in by itself"}
	r := report.HostReport{Node: "n1", Time: time.Date(2026, 11, 22, 4, 0, 0, 0, time.UTC), Probes: []report.ProbeReport{
		{Name: "iscsi", Status: finding.OK, Summary: "1 session", DurationSeconds: 0.25, Findings: []finding.Finding{info}},
		{Name: "disks", Status: finding.Problem, Summary: "2 disks", Error: "thin pools: no permission", Findings: []finding.Finding{
			info, {Reason: "DeviceOffline", Severity: finding.Critical, Subject: "sda", Message: "sda is offline"}}},
		{Name: "time", Status: finding.Unknown, Error: "chronyd: <no reply>"},
		{Name: "oom", Status: finding.NotApplicable, Summary: "no kubelet"},
	}}
	var b bytes.Buffer
	if err := r.WriteJUnit(&b); err != nil {
		t.Fatal(err)
	}
	const want = `<?xml version="1.0" encoding="UTF-8"?>
<testsuite name="host-hygiene n1" tests="4" failures="1" errors="1" skipped="1" time="0.250000" timestamp="2026-11-22T04:00:00" hostname="n1">
  <testcase name="iscsi" classname="host-hygiene" time="0.250000">
    <system-out>1 session
  info AutomaticLogin: logs in by itself</system-out>
  </testcase>
  <testcase name="disks" classname="host-hygiene" time="0.000000">
    <failure type="DeviceOffline" message="critical DeviceOffline sda: sda is offline">  info AutomaticLogin: logs in by itself
  critical DeviceOffline: sda is offline
could not check: thin pools: no permission
</failure>
    <system-out>2 disks</system-out>
  </testcase>
  <testcase name="time" classname="host-hygiene" time="0.000000">
    <error type="CheckFailed" message="chronyd: &lt;no reply&gt;">could not check: chronyd: &lt;no reply&gt;
</error>
  </testcase>
  <testcase name="oom" classname="host-hygiene" time="0.000000">
    <skipped message="no kubelet"></skipped>
    <system-out>no kubelet</system-out>
  </testcase>
</testsuite>
`
	if d := cmp.Diff(want, strings.ReplaceAll(b.String(), "&#xA;", "\n")); d != "" {
		t.Error(d)
	}
}

func TestUsageErrors(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(bad, []byte("apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\nprobes:\n  time:\n    maxOffset: 50\n    maxOfset: 1s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"check", "-o", "xml"}, "-o xml: want table, wide, json, yaml or junit"},
		{[]string{"check", "--watch", "-o", "junit"}, "--watch: a JUnit file holds one pass"},
		{[]string{"check", "--watch", "--every", "0s"}, "--every 0s: want more than 0"},
		{[]string{"chekc"}, `unknown command "chekc" for "agent"`},
		{[]string{"check", "extra"}, `unknown command "extra" for "agent check"`},
		{[]string{"check", "--no-such-flag"}, "unknown flag: --no-such-flag"},
		{[]string{"check", "--root", "/no/such/dir"}, "--root: open /no/such/dir: no such file or directory"},
		{[]string{"check", "--config", bad}, bad + ":6: probes.time.maxOfset: there is no such key: did you mean maxOffset?"},
		{[]string{"check", "--config", "/no/such/file"}, "no such file"},
		{[]string{"explain", "weather"}, `no probe "weather": want one of ` + strings.Join(probeNames(), ", ")},
		{[]string{"explain"}, "accepts 1 arg(s), received 0"},
		{[]string{"validate", bad}, bad + `:5: probes.time.maxOffset: want a duration with a unit, such as 50ms, 10s or 5m, not`},
		{[]string{"run", "--node-name", ""}, "no node name: set NODE_NAME or give --node-name"},
		{[]string{"run", "--root", "/"}, "--root is for a tree at rest; run needs a running host"},
		{[]string{"run", "--node-name", "n1", "--log-format", "xml"}, "--log-format xml: want text or json"},
		{[]string{"cleanup"}, "give one of --all and --wait"},
	} {
		out, code := agent(t, c.args...)
		if code != exitUsage || !strings.Contains(out, c.want) {
			t.Errorf("%q: exit %d, want 2; printed %q, want %q", c.args, code, out, c.want)
		}
	}
}

func TestValidate(t *testing.T) {
	out, code := agent(t, "validate", "../../examples/config.yaml", "../../examples/configmap.yaml")
	if code != exitOK || out != "../../examples/config.yaml: valid\n../../examples/configmap.yaml: valid\n" {
		t.Errorf("exit %d: %s", code, out)
	}
}

func TestExplainShowsSettings(t *testing.T) {
	out, _ := agent(t, "explain", "packages", "--root", tree(t), "--config", "testdata/require.yaml")
	for _, want := range []string{"PackageMissing", "settings in force (testdata/require.yaml)", "lockHeldFor: 20m"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "iscsi") {
		t.Errorf("other probes are shown too:\n%s", out)
	}
}

// Nothing from the host reaches a terminal unescaped, and what a pipe gets has
// no colours.
func TestTableIsPlainAndHarmless(t *testing.T) {
	r := report.HostReport{Node: "n\x1b]0;evil\x07", Probes: []report.ProbeReport{{
		Name: "disks", Status: finding.Problem, Summary: "\x1b[2Jgone", Error: "line one\nline \x1b[31mtwo",
		Findings: []finding.Finding{{Reason: "A", Severity: finding.Critical, Subject: "su\x1bb", Message: "m\x9b31m",
			Evidence: []finding.Evidence{{Source: "/proc/\x07", Observed: "\x1b[1m", Expected: "x\r"}}, Muted: nil}},
	}}}
	for _, style := range []report.Style{{}, {Wide: true}} {
		var b bytes.Buffer
		if err := r.WriteTable(&b, style); err != nil {
			t.Fatal(err)
		}
		if i := strings.IndexFunc(b.String(), func(c rune) bool { return c < ' ' && c != '\n' || c >= 0x7f && c < 0xa0 }); i >= 0 {
			t.Errorf("a control character at %d in %q", i, b.String())
		}
	}
	var b bytes.Buffer
	if err := r.WriteTable(&b, report.Style{Look: terminal.Look{Colour: true}}); err != nil {
		t.Fatal(err)
	}
	if rest := regexp.MustCompile(`\x1b\[[0-9;]*m`).ReplaceAllString(b.String(), ""); strings.Contains(rest, "\x1b") {
		t.Errorf("an escape that is not ours: %q", rest)
	}
}

func TestKubeconfigServerReadsNoSecret(t *testing.T) {
	long := strings.Repeat("QUJD", 2000)
	for name, c := range map[string]struct{ text, want string }{
		"kubeadm":      {"apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: " + long + "\n    server: https://10.0.2.2:26760\n  name: x\n", "https://10.0.2.2:26760"},
		"quoted":       {"clusters:\n- cluster:\n    server: \"https://api.example:6443\"\n", "https://api.example:6443"},
		"first in map": {"clusters:\n- cluster: {}\n- server: https://a:1\n", "https://a:1"},
		"no newline":   {"    server: https://a:1", "https://a:1"},
		"plain http":   {"    server: http://a:1\n", ""},
		"inside junk":  {"data: " + long + "server: https://evil:1\n", ""},
		"empty":        {"", ""},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "kubelet.conf"), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		h, err := host.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		got, err := h.KubeconfigServer("/kubelet.conf")
		if got != c.want || err != nil {
			t.Errorf("%s: got %q %v, want %q", name, got, err, c.want)
		}
		h.Close()
	}
}

// TestManPages: "make generate" writes docs/man.
func TestManPages(t *testing.T) { man.Hold(t, newRoot(false), "../../docs/man", *update) }
