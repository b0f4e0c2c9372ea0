package probes

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

var update = flag.Bool("update", false, "rewrite the want sections of the probes' cases")

// runCases runs every case in testdata/NAME: a host (package hosttest says what
// the sections mean), the probe's settings in "config", the requirements in
// "require", and what must come out of the last pass in "want".
func runCases[P Probe](t *testing.T, name string, defaults func() P) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", name, "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases in testdata/%s (%v)", name, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			h := hosttest.New(t, ar)
			p := defaults()
			if text, ok := h.Section("config"); ok {
				if err := yaml.UnmarshalStrict([]byte(text), &p); err != nil {
					t.Fatalf("config: %v", err)
				}
			}
			if err := p.Validate(); err != nil {
				t.Fatalf("config: %v", err)
			}
			in := Input{Host: h, Memory: NewMemory()}
			asked := 0
			if _, ok := h.Section("cluster/node"); ok {
				in.Cluster = scriptedCluster{t, h, &asked}
			}
			if text, ok := h.Section("require"); ok {
				if err := yaml.UnmarshalStrict([]byte(text), &in.Require); err != nil {
					t.Fatalf("require: %v", err)
				}
			}
			var got string
			for i, now := range h.Times() {
				if i > 0 {
					h.Pass(i + 1)
				}
				in.Now = now
				in.Memory.Begin()
				r, err := p.Check(context.Background(), in)
				checkRules(t, p, r)
				got = render(r, err)
			}
			if asked > 0 {
				got += fmt.Sprintf("asked the API server %s\n", countOf(asked, "time", "times"))
			}
			want, _ := h.Section("want")
			wantExplained, explains := h.Section("explain")
			explained := wantExplained
			if explains {
				tables, err := any(p).(Explainer).Explain(context.Background(), in)
				explained = renderTables(tables, err)
			}
			if *update && (got != want || explained != wantExplained) {
				setSection(ar, "want", got)
				if explains {
					setSection(ar, "explain", explained)
				}
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(want+wantExplained, got+explained); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func renderTables(tables []Table, err error) string {
	var b strings.Builder
	for _, t := range tables {
		fmt.Fprintf(&b, "%s\n", t.Title)
		for _, row := range append([][]string{t.Header}, t.Rows...) {
			fmt.Fprintf(&b, "  %s\n", strings.Join(row, " | "))
		}
	}
	if err != nil {
		fmt.Fprintf(&b, "error: %v\n", err)
	}
	return b.String()
}

// scriptedCluster answers from two sections of a case: "cluster/node", a Node
// object as far as it is read, or "unknown", and "cluster/version", the version or
// "error TEXT"; "cluster/attachments" and "cluster/claims" map names to an
// Attachment as YAML and a claim, "absent" or "error TEXT". The last line of what
// comes out says how often those were asked for.
type scriptedCluster struct {
	t *testing.T
	h *hosttest.Host
	// asked counts the questions for attachments and claims.
	asked *int
}

func (c scriptedCluster) Node() (Node, bool) {
	text, _ := c.h.Section("cluster/node")
	if strings.TrimSpace(text) == "unknown" {
		return Node{}, false
	}
	var object struct {
		Name            string
		VolumesAttached []string
		VolumesInUse    []string
		KubeletVersion  string
		Conditions      []struct {
			Type, Status string
			Heartbeat    time.Time
		}
	}
	if err := yaml.UnmarshalStrict([]byte(text), &object); err != nil {
		c.t.Fatalf("cluster/node: %v", err)
	}
	node := Node{Name: object.Name, KubeletVersion: object.KubeletVersion, VolumesAttached: object.VolumesAttached, VolumesInUse: object.VolumesInUse}
	for _, cond := range object.Conditions {
		node.Conditions = append(node.Conditions, NodeCondition{cond.Type, cond.Status, cond.Heartbeat})
	}
	return node, true
}

func (c scriptedCluster) Version(context.Context) (string, error) {
	text, ok := c.h.Section("cluster/version")
	if !ok {
		c.t.Error("the probe asked for the API server's version, which the case does not list")
	}
	if msg, bad := strings.CutPrefix(text, "error "); bad || !ok {
		return "", errors.New(strings.TrimSpace(msg))
	}
	return strings.TrimSpace(text), nil
}

// question returns what a case has for a name under "cluster/attachments" or
// "cluster/claims", and counts that it was asked.
func (c scriptedCluster) question(section, name string) (text string, ok bool, err error) {
	answers := map[string]string{}
	all, _ := c.h.Section(section)
	if err := yaml.UnmarshalStrict([]byte(all), &answers); err != nil {
		c.t.Fatalf("%s: %v", section, err)
	}
	text, listed := answers[name]
	if !listed {
		c.t.Errorf("the probe asked for %s, which %s does not list", name, section)
	}
	*c.asked++
	if msg, bad := strings.CutPrefix(text, "error "); bad {
		return "", false, errors.New(msg)
	}
	return text, text != "absent", nil
}

func (c scriptedCluster) Attachment(_ context.Context, name string) (a Attachment, ok bool, err error) {
	text, ok, err := c.question("cluster/attachments", name)
	if !ok {
		return a, false, err
	}
	if err := yaml.UnmarshalStrict([]byte(text), &a); err != nil {
		c.t.Fatalf("cluster/attachments: %v", err)
	}
	return a, true, nil
}

func (c scriptedCluster) Claim(_ context.Context, volume string) (string, error) {
	text, _, err := c.question("cluster/claims", volume)
	return text, err
}

func setSection(ar *txtar.Archive, name, text string) {
	for i, f := range ar.Files {
		if f.Name == name {
			ar.Files[i].Data = []byte(text)
			return
		}
	}
	ar.Files = append(ar.Files, txtar.File{Name: name, Data: []byte(text)})
}

// checkRules holds every finding against the rule that declares it.
func checkRules(t *testing.T, p Probe, r finding.Result) {
	t.Helper()
	rules := map[string]finding.Rule{}
	for _, rule := range p.Rules() {
		rules[rule.Reason] = rule
	}
	seen := map[finding.Key]bool{}
	for _, f := range r.Findings {
		rule, ok := rules[f.Reason]
		switch {
		case !ok:
			t.Errorf("%s is no rule of the probe", f.Reason)
		case f.Severity != rule.Severity && !contains(rule.Also, f.Severity):
			t.Errorf("%s: severity %q is not declared", f.Reason, f.Severity)
		case f.Message == "" || len(f.Evidence) == 0:
			t.Errorf("%s: no message or no evidence", f.Reason)
		case strings.HasSuffix(f.Message, "."):
			t.Errorf("%s: a message is joined with others, so it ends without a full stop: %q", f.Reason, f.Message)
		case f.Remedy != nil && (finding.Kind(f.Remedy.Action) == "" || f.Remedy.Subject == ""):
			t.Errorf("%s: %+v is no remedy a config could allow", f.Reason, *f.Remedy)
		case seen[f.Key()]:
			t.Errorf("%s about %q is told twice", f.Reason, f.Subject)
		}
		seen[f.Key()] = true
	}
}

func contains(list []finding.Severity, s finding.Severity) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}

func render(r finding.Result, err error) string {
	var b strings.Builder
	finding.Sort(r.Findings)
	fmt.Fprintf(&b, "%s", finding.StatusOf(r, err))
	if r.Summary != "" {
		fmt.Fprintf(&b, ": %s", r.Summary)
	}
	b.WriteByte('\n')
	for _, f := range r.Findings {
		fmt.Fprintln(&b, f)
		for _, e := range f.Evidence {
			fmt.Fprintf(&b, "    %s: %s", e.Source, e.Observed)
			if e.Expected != "" {
				fmt.Fprintf(&b, " (expected %s)", e.Expected)
			}
			b.WriteByte('\n')
		}
		if f.Remedy != nil {
			fmt.Fprintf(&b, "    remedy: %s %s\n", f.Remedy.Action, f.Remedy.Subject)
		}
		if f.Settled {
			b.WriteString("    does not pass by itself\n")
		}
	}
	if err != nil {
		var joined interface{ Unwrap() []error }
		errs := []error{err}
		if errors.As(err, &joined) {
			errs = joined.Unwrap()
		}
		for _, e := range errs {
			fmt.Fprintf(&b, "error: %v\n", e)
		}
	}
	for _, s := range r.Samples {
		b.WriteString(s.Metric)
		for i := 0; i+1 < len(s.Labels); i += 2 {
			fmt.Fprintf(&b, " %s=%q", s.Labels[i], s.Labels[i+1])
		}
		fmt.Fprintf(&b, " %v\n", s.Value)
	}
	return b.String()
}
