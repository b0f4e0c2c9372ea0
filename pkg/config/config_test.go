package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

var update = flag.Bool("update", false, "rewrite what is generated: testdata/bad/*.want, the schema, the example ConfigMap")

// TestMistakes holds every kind of mistake to the exact lines a user sees.
func TestMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases (%v)", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Parse("config.yaml", data)
			var problems Problems
			if c != nil || !errors.As(err, &problems) || len(problems) == 0 {
				t.Fatalf("want no config and its Problems, not %v, %v", c, err)
			}
			golden(t, strings.TrimSuffix(file, ".yaml")+".want", err.Error()+"\n")
		})
	}
}

// golden compares with a file, or writes it with -update.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got; -update accepts it)\n%s", file, d)
	}
}

func parseGood(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("config.yaml", []byte("apiVersion: "+APIVersion+"\nkind: "+Kind+"\n"+text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func forNode(t *testing.T, c *Config, labels map[string]string) AgentConfig {
	t.Helper()
	effective, err := c.ForNode(labels)
	if err != nil {
		t.Fatal(err)
	}
	return effective
}

// TestEveryValueArrives takes the full examples and looks for each value that
// stands in them in what is in force.
func TestEveryValueArrives(t *testing.T) {
	for _, file := range []string{"testdata/good/contract.yaml", "../../examples/config.yaml"} {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Load(file)
			if err != nil {
				t.Fatal(err)
			}
			effective, err := json.Marshal(forNode(t, c, nil))
			if err != nil {
				t.Fatal(err)
			}
			var want, got map[string]any
			if err := errors.Join(yaml.Unmarshal(data, &want), json.Unmarshal(effective, &got)); err != nil {
				t.Fatal(err)
			}
			delete(want, "overrides")
			arrived(t, file, want, got)
		})
	}
}

func arrived(t *testing.T, path string, want, got any) {
	t.Helper()
	switch want := want.(type) {
	case map[string]any:
		m, _ := got.(map[string]any)
		for key, v := range want {
			if _, ok := m[key]; !ok && v != 0.0 { // omitempty drops a zero
				t.Errorf("%s.%s is lost", path, key)
				continue
			}
			arrived(t, path+"."+key, v, m[key])
		}
	case []any:
		l, _ := got.([]any)
		// What storage profiles require comes after the config's own.
		if len(l) < len(want) || len(l) > len(want) && !strings.Contains(path, ".require.") {
			t.Errorf("%s: want %v, not %v", path, want, got)
			return
		}
		for i := range want {
			arrived(t, fmt.Sprintf("%s[%d]", path, i), want[i], l[i])
		}
	case string:
		if m, ok := got.(map[string]any); ok && m["name"] == want { // the short form of a package
			return
		}
		text, _ := got.(string)
		a, errA := time.ParseDuration(want)
		b, errB := time.ParseDuration(text)
		if text != want && (errA != nil || errB != nil || a != b) {
			t.Errorf("%s: want %q, not %v", path, want, got)
		}
	default:
		if want != got && !(want == 0.0 && got == nil) {
			t.Errorf("%s: want %v, not %v", path, want, got)
		}
	}
}

func TestTraps(t *testing.T) {
	c, err := Load("testdata/good/traps.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got := forNode(t, c, nil)
	yes := true
	want := *Default()
	want.Interval = probes.Duration(90 * time.Second)
	want.Report = Report{Conditions: Off, Events: On, ReadyReasons: ReadyReasons{"critical", "NoTimeDaemon"}}
	want.Probes.Time.Enabled, want.Probes.Time.MaxOffset = &yes, probes.Duration(20*time.Millisecond)
	want.Require.Sysctls = map[string]string{"kernel.pid_max": "131072", "vm.swappiness": "10", "net.ipv4.conf.all/arp_ignore": "1"}
	want.Require.Files = []probes.RequiredFile{{Path: "/etc/sysctl.d/x.conf", Mode: "0644", Content: "tabs\tand\nlines\n"}}
	want.Mute = []Mute{{Reason: "NoTimeDaemon", Until: time.Date(2020, 1, 1, 0, 0, 0, 0, time.FixedZone("", 7200)), Because: "no"}}
	want.Severity = map[string]finding.Severity{}
	want.Remedies.Mode = ModePlan
	want.Remedies.MaintenanceWindow = &MaintenanceWindow{From: "22:00", To: "05:30", TimeZone: "Europe/Berlin"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if e := forNode(t, c, map[string]string{"edge": "true"}); e.Remedies.Mode != ModeOff {
		t.Errorf("mode: false became %s", e.Remedies.Mode)
	}
	e := forNode(t, c, map[string]string{"pool": "1", "node-role.kubernetes.io/edge": ""})
	if p := e.Probes.Time; !p.Required || p.MaxOffset != want.Probes.Time.MaxOffset {
		t.Errorf("merging with << gave %+v", p)
	}
}

// TestDefaultsAreGood: what no file says must itself be valid, and the example
// ConfigMap claims to say nothing else.
func TestDefaultsAreGood(t *testing.T) {
	if objections := Default().check(); len(objections) > 0 {
		t.Errorf("the defaults: %v", objections)
	}
	none := forNode(t, &Config{}, map[string]string{"pool": "storage"})
	if d := cmp.Diff(*Default(), none); d != "" {
		t.Errorf("no file (-want +got)\n%s", d)
	}
	bare := forNode(t, parseGood(t, ""), nil)
	if d := cmp.Diff(*Default(), bare); d != "" {
		t.Errorf("a bare file (-want +got)\n%s", d)
	}
	c, err := Load("../../examples/configmap.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(*Default(), forNode(t, c, nil)); d != "" {
		t.Errorf("examples/configmap.yaml (-want +got)\n%s", d)
	}
}

// TestExampleHasEveryKey: examples/config.yaml is where users look a key up.
func TestExampleHasEveryKey(t *testing.T) {
	data, err := os.ReadFile("../../examples/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var example any
	if err := yaml.Unmarshal(data, &example); err != nil {
		t.Fatal(err)
	}
	everyKey(t, "", reflect.TypeFor[document](), []any{example})
	for _, common := range []string{"enabled: false", "required: true", "interval: 5m"} {
		if !bytes.Contains(data, []byte("#   "+common+" ")) {
			t.Errorf("no comment says what %s does to a probe", common)
		}
	}
}

// everyKey looks in any of several values for each key of a type.
func everyKey(t *testing.T, path string, typ reflect.Type, values []any) {
	t.Helper()
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map {
		var inner []any
		for _, v := range values {
			switch v := v.(type) {
			case []any:
				inner = append(inner, v...)
			case map[string]any:
				if typ.Kind() == reflect.Map {
					inner = slices.AppendSeq(inner, maps.Values(v))
				} else {
					inner = append(inner, v)
				}
			}
		}
		values, typ = inner, typ.Elem()
	}
	if path == "overrides" { // the sections stand outside already
		typ = reflect.TypeFor[struct {
			NodeSelector map[string]string `json:"nodeSelector"`
		}]()
	}
	if path == "profiles" { // so do those of require
		typ = reflect.TypeFor[struct {
			Description string   `json:"description"`
			Sources     []string `json:"sources"`
		}]()
	}
	fields := structFields(typ)
	for _, key := range keysOf(fields) {
		if f := typ.FieldByIndex(fields[key][:1]); f.Type == reflect.TypeFor[probes.Common]() {
			continue // told in a comment for all probes
		}
		var found []any
		for _, v := range values {
			if m, ok := v.(map[string]any); ok && m[key] != nil {
				found = append(found, m[key])
			}
		}
		if len(found) == 0 {
			t.Errorf("examples/config.yaml has no %s", below(path, key))
			continue
		}
		everyKey(t, below(path, key), typ.FieldByIndex(fields[key]).Type, found)
	}
}

// TestContractDefaults: where the contract's example gives the settings of a
// probe, the reporting and the limits of remedies, it gives their defaults.
func TestContractDefaults(t *testing.T) {
	c, err := Load("testdata/good/contract.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, want := forNode(t, c, nil), Default()
	if !got.Probes.Time.Required {
		t.Error("the example requires the time probe")
	}
	got.Probes.Time.Required = false
	got.Require, got.StorageProfiles, got.Mute, got.Severity, got.Hold = want.Require, nil, nil, nil, nil
	got.Remedies.Mode, got.Remedies.Allow, got.Remedies.MaintenanceWindow = want.Remedies.Mode, nil, nil
	if d := cmp.Diff(*want, got); d != "" {
		t.Errorf("(-default +example)\n%s", d)
	}
}

// TestYAMLRoundTrip: what explain shows can be saved and used, and means the
// same to a reader of YAML 1.1.
func TestYAMLRoundTrip(t *testing.T) {
	for _, file := range []string{"testdata/good/contract.yaml", "testdata/good/traps.yaml", "../../examples/config.yaml"} {
		c, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		want := forNode(t, c, nil)
		text, err := want.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("again.yaml", text)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if d := cmp.Diff(want, forNode(t, again, nil), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s (-want +got)\n%s\n%s", file, d, text)
		}
		if strings.Contains(string(text), "mode: off") || !strings.HasPrefix(string(text), "apiVersion: ") {
			t.Errorf("%s: bare words or another order:\n%s", file, text)
		}
	}
}

func TestOverrides(t *testing.T) {
	c := parseGood(t, `
interval: 60s
probes: {time: {maxOffset: 50ms, criticalOffset: 1s}}
require:
  modules: [iscsi_tcp, dm_multipath]
  sysctls: {kernel.pid_max: ">=131072", vm.swappiness: "10"}
hold: {NoTimeDaemon: {before: 5s, clear: 6s}}
overrides:
  - nodeSelector: {pool: storage}
    probes: {time: {maxOffset: 10ms}}
    require: {modules: [nvme_tcp], sysctls: {vm.swappiness: "1"}}
    hold: {NoTimeDaemon: {clear: 9s}}
  - nodeSelector: {pool: storage, site: edge}
    interval: 5m
    probes: {time: {maxOffset: 30ms}}
    require:
  - nodeSelector: {site: far}
    require: {modules: []}
`)
	ms := func(n int) probes.Duration { return probes.Duration(time.Duration(n) * time.Millisecond) }
	type view struct {
		Interval, MaxOffset, CriticalOffset probes.Duration
		Modules                             []string
		Sysctls                             map[string]string
		Before, Clear                       time.Duration
	}
	base := view{ms(60000), ms(50), ms(1000), []string{"iscsi_tcp", "dm_multipath"}, map[string]string{"kernel.pid_max": ">=131072", "vm.swappiness": "10"}, 5 * time.Second, 6 * time.Second}
	storage := base
	storage.MaxOffset, storage.Modules, storage.Clear = ms(10), []string{"nvme_tcp"}, 9*time.Second
	storage.Sysctls = map[string]string{"kernel.pid_max": ">=131072", "vm.swappiness": "1"}
	edge := storage
	edge.Interval, edge.MaxOffset = ms(300000), ms(30)
	far := base
	far.Modules = []string{}
	for name, tc := range map[string]struct {
		labels map[string]string
		want   view
	}{
		"no labels":       {nil, base},
		"other labels":    {map[string]string{"pool": "gpu", "site": "edge"}, base},
		"one matches":     {map[string]string{"pool": "storage"}, storage},
		"later wins":      {map[string]string{"pool": "storage", "site": "edge", "x": "y"}, edge},
		"a list can end":  {map[string]string{"site": "far"}, far},
		"labels in part":  {map[string]string{"site": "edge"}, base},
		"value is a part": {map[string]string{"pool": "storage2"}, base},
	} {
		t.Run(name, func(t *testing.T) {
			e := forNode(t, c, tc.labels)
			before, clear := e.HoldFor(finding.Rule{Reason: "NoTimeDaemon"})
			got := view{e.Interval, e.Probes.Time.MaxOffset, e.Probes.Time.CriticalOffset, e.Require.Modules, e.Require.Sysctls, before, clear}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
	if c.Overrides() != 3 {
		t.Errorf("%d overrides", c.Overrides())
	}
}

// TestOverridesTogether: each override is good, both on one node are not.
func TestOverridesTogether(t *testing.T) {
	c := parseGood(t, `
overrides:
  - nodeSelector: {a: "1"}
    probes: {time: {maxOffset: 800ms}}
  - nodeSelector: {b: "1"}
    probes: {time: {criticalOffset: 500ms}}
`)
	for _, one := range []string{"a", "b"} {
		forNode(t, c, map[string]string{one: "1"})
	}
	_, err := c.ForNode(map[string]string{"a": "1", "b": "1"})
	const want = "config.yaml:8: overrides[1].probes.time.criticalOffset: 500ms is below maxOffset 800ms: want at least that (with the overrides of this node)"
	if err == nil || err.Error() != want {
		t.Errorf("want %s\n not %v", want, err)
	}
}

func TestForFindings(t *testing.T) {
	c := forNode(t, parseGood(t, `
report: {readyReasons: [critical, NoTimeDaemon]}
severity: {ClockOffsetHigh: info}
hold: {NoTimeDaemon: {before: 0s}}
mute:
  - {reason: ClockUnsynchronized, subject: chronyd, until: 2026-12-01T00:00:00Z, because: lab}
  - {reason: TimeDaemonConflict}
probes: {time: {interval: 5m}}
`), nil)
	end := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	f := func(reason, subject string, s finding.Severity) finding.Finding {
		return finding.Finding{Reason: reason, Subject: subject, Severity: s}
	}
	for _, tc := range []struct {
		f     finding.Finding
		now   time.Time
		muted bool
	}{
		{f("ClockUnsynchronized", "chronyd", "critical"), end.Add(-1), true},
		{f("ClockUnsynchronized", "chronyd", "critical"), end, false},
		{f("ClockUnsynchronized", "ntpd", "critical"), end.Add(-1), false},
		{f("TimeDaemonConflict", "anything", "warning"), end, true},
		{f("NoTimeDaemon", "", "warning"), end, false},
	} {
		if got := c.Muted(tc.f, tc.now) != nil; got != tc.muted {
			t.Errorf("%v at %v: muted %v", tc.f, tc.now, got)
		}
	}
	muted := f("TimeDaemonConflict", "", "critical")
	muted.Muted = c.Muted(muted, end)
	for _, tc := range []struct {
		f     finding.Finding
		ready bool // counts against it
	}{
		{f("ClockUnsynchronized", "", "critical"), true},
		{f("ClockUnsynchronized", "", "warning"), false},
		{f("NoTimeDaemon", "", "warning"), true},
		{f("NoTimeDaemon", "", "info"), false},
		{muted, false},
	} {
		if got := c.Report.ReadyReasons.Match(tc.f); got != tc.ready {
			t.Errorf("%v counts against Ready: %v", tc.f, got)
		}
	}
	if s := c.SeverityFor(f("ClockOffsetHigh", "", "critical")); s != finding.Info {
		t.Errorf("severity %s", s)
	}
	if s := c.SeverityFor(f("NoTimeDaemon", "", "warning")); s != finding.Warning {
		t.Errorf("severity %s", s)
	}
	before, clear := c.HoldFor(finding.Rule{Reason: "NoTimeDaemon", HoldBefore: time.Minute, HoldClear: time.Hour})
	if before != 0 || clear != time.Hour {
		t.Errorf("hold %v, %v: an explicit 0s must win and a missing key keep the rule's", before, clear)
	}
	if d := c.IntervalFor(c.Probes.Time); d != 5*time.Minute {
		t.Errorf("the time probe's interval is %v", d)
	}
	if d := c.IntervalFor(c.Probes.PIDs); d != time.Minute {
		t.Errorf("the PIDs probe's interval is %v", d)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a directory: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(fifo); err == nil {
		t.Error("a FIFO without a writer is a config")
	}
	big := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(big, bytes.Repeat([]byte("# "), MaxSize), 0o600); err != nil {
		t.Fatal(err)
	}
	want := big + ": more than 256 KiB, which no config needs"
	if _, err := Load(big); err == nil || err.Error() != want {
		t.Errorf("want %s\n not %v", want, err)
	}
}

// TestSum: the same content has the same sum, whatever its name.
func TestSum(t *testing.T) {
	a, b, c := parseGood(t, "interval: 1m"), parseGood(t, "interval: 1m"), parseGood(t, "interval: 2m")
	if a.Sum == "" || a.Sum != b.Sum || a.Sum == c.Sum {
		t.Errorf("sums %q, %q, %q", a.Sum, b.Sum, c.Sum)
	}
}

// TestHostileSizes: what is within the size limit is refused, or taken, without
// much memory and in linear time. The agent lives under 64 MiB.
func TestHostileSizes(t *testing.T) {
	header := "apiVersion: " + APIVersion + "\nkind: " + Kind + "\n"
	fill := func(unit string) string { return strings.Repeat(unit, (MaxSize-200)/len(unit)) }
	numbered := func(format string) string {
		var b strings.Builder
		for i := 0; b.Len() < MaxSize-200; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	modules := ""
	for i := range 15000 {
		modules += fmt.Sprintf("m%d,", i)
	}
	for name, text := range map[string]string{
		"values":          "mute: [" + fill("a,") + "]\n",
		"unknown keys":    numbered("key%d: b\n"),
		"same key":        fill("a: b\n"),
		"one long text":   "mute:\n  - {reason: NoTimeDaemon, because: " + fill("x") + "}\n",
		"one long key":    fill("k") + ": 1\n",
		"open brackets":   "mute: " + fill("["),
		"reasons":         "report: {readyReasons: [" + numbered("R%d, ") + "]}\n",
		"mutes":           "mute:\n" + numbered("  - {reason: R%d}\n"),
		"modules":         "require: {modules: [" + numbered("m%d, ") + "]}\n",
		"packages":        "require: {packages: [" + numbered("-p%d, ") + "]}\n",
		"overrides":       "overrides:\n" + numbered("  - {nodeSelector: {a: n%d}}\n"),
		"profiles":        "storageProfiles: [" + numbered("p%d, ") + "]\n",
		"own profiles":    "profiles: {" + numbered("p%d: {modules: [x]}, ") + "}\n",
		"large profile":   "storageProfiles: [p]\nprofiles: {p: {modules: [" + modules + "]}}\noverrides:\n" + strings.Repeat("  - {nodeSelector: {a: b}}\n", 60),
		"bad base":        "require: {modules: [" + strings.Repeat("m,", 15000) + "]}\noverrides:\n" + strings.Repeat("  - {nodeSelector: {a: b}}\n", 100),
		"large base":      "require: {modules: [" + modules + "]}\noverrides:\n" + strings.Repeat("  - {nodeSelector: {a: b}}\n", 120),
		"too much":        "require: {modules: [" + modules + "]}\noverrides:\n" + strings.Repeat("  - {nodeSelector: {a: b}}\n", 140),
		"nested mappings": "require: " + strings.Repeat("{a: ", maxDepth) + "1" + strings.Repeat("}", maxDepth) + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := Parse("config.yaml", []byte(header+text))
			runtime.ReadMemStats(&after)
			if err != nil && len(err.Error()) > (maxProblems+1)*3*maxText {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			mib := (after.TotalAlloc - before.TotalAlloc) >> 20
			t.Logf("%d MiB allocated", mib)
			if mib > 400 {
				t.Errorf("too dear")
			}
		})
	}
}

func TestBOMAndCRLF(t *testing.T) {
	text := "\ufeffapiVersion: " + APIVersion + "\r\nkind: AgentConfig\r\ninterval: 5m\r\n"
	c, err := Parse("config.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if e := forNode(t, c, nil); e.Interval.D() != 5*time.Minute {
		t.Errorf("interval %s", e.Interval)
	}
}

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/bad/*.yaml", "testdata/good/*.yaml", "../../examples/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("no %s (%v)", pattern, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Add([]byte("apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\ninterval: \"a\\e[2J\\nb\"\n\"c\\e[2J\\nd\": 1\nprobes: {\"e\\0\\e\": {}}\n"))
	f.Add([]byte("apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\ninterval: " + strings.Repeat("long", 200) + "\n" + strings.Repeat("key", 330) + ": 1\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if err != nil {
			var problems Problems
			if !errors.As(err, &problems) || len(problems) == 0 || len(problems) > maxProblems+1 {
				t.Fatalf("%d problems: %v", len(problems), err)
			}
			// All that YAML counts as the end of a line.
			lines := 1
			for _, b := range []string{"\n", "\r", "\u0085", "\u2028", "\u2029"} {
				lines += bytes.Count(data, []byte(b))
			}
			for _, p := range problems {
				if line := p.Error(); !strings.HasPrefix(line, "f:") || strings.ContainsAny(line, "\n\x00\x1b") || p.Text == "" || max(len(p.Field), len(p.Text)) > maxText+len("…") {
					t.Fatalf("a bad line: %q", line)
				}
				if p.Line < 0 || p.Line > lines+1 {
					t.Fatalf("line %d of %d: %v", p.Line, lines, p)
				}
			}
			return
		}
		// What is good stays good when it is written out and read again.
		e, err := c.ForNode(nil)
		if err != nil {
			t.Fatalf("good, but not for a node: %v", err)
		}
		text, err := e.YAML()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse("again", text); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
	})
}

// TestIntervalFor: updates and kubelet look every 15 minutes where the others do
// every minute or two, unless somebody wants to have it otherwise.
func TestIntervalFor(t *testing.T) {
	for _, test := range []struct {
		config        string
		time, kubelet time.Duration
	}{
		{"", time.Minute, 15 * time.Minute},
		{"interval: 3s", 3 * time.Second, 3 * time.Second},
		{"interval: 2m", 2 * time.Minute, 15 * time.Minute},
		{"interval: 1h", time.Hour, time.Hour},
		{"probes: {kubelet: {interval: 90s}, time: {interval: 10s}}", 10 * time.Second, 90 * time.Second},
	} {
		all, err := Parse("config.yaml", []byte("apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\n"+test.config))
		if err != nil {
			t.Fatal(err)
		}
		c, err := all.ForNode(nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.IntervalFor(c.Probes.Time); got != test.time {
			t.Errorf("%q: time %s, want %s", test.config, got, test.time)
		}
		if got := c.IntervalFor(c.Probes.Kubelet); got != test.kubelet {
			t.Errorf("%q: kubelet %s, want %s", test.config, got, test.kubelet)
		}
	}
}
