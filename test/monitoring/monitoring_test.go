// Package monitoring holds what operators are given beside the agent (alerts,
// dashboard, runbooks) to what the agent really says.
package monitoring

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
)

var update = flag.Bool("update", false, "write what is made from the alerts and the rules anew")

const (
	root      = "../.."
	alerts    = root + "/examples/alerts.yaml"
	operator  = "manifests/kustomize/overlays/prometheus-operator/prometheusrule.yaml"
	managed   = "examples/grafana/alerts.yaml"
	dashboard = "examples/grafana/dashboard.json"
	repo      = "https://github.com/hosthygiene/agent/blob/main/"
)

type ruleGroups struct {
	Groups []struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	} `json:"groups"`
}

type rule struct {
	Alert         string            `json:"alert"`
	Expr          string            `json:"expr"`
	For           string            `json:"for"`
	KeepFiringFor string            `json:"keep_firing_for"`
	Labels        map[string]string `json:"labels"`
	Annotations   map[string]string `json:"annotations"`
}

func decode[T any](t *testing.T, file string) (v T) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &v); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return v
}

func rules(t *testing.T) []rule {
	t.Helper()
	var all []rule
	for _, g := range decode[ruleGroups](t, alerts).Groups {
		all = append(all, g.Rules...)
	}
	return all
}

func promtool(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("promtool is not installed; make setup installs it")
	}
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// What hack/monitoring makes of the alerts is what stands in the repository.
func TestGeneratedFilesAreCurrent(t *testing.T) {
	abs, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	if *update {
		to = abs
	}
	cmd := exec.Command("go", "-C", filepath.Join(abs, "hack/monitoring"), "run", ".", abs, to)
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{operator, managed, dashboard} {
		want, err := os.ReadFile(filepath.Join(to, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s: run make generate: (-want +got)\n%s", name, d)
		}
	}
}

// The three forms of the alerts say the same, whoever made them.
func TestAlertsAreTheSameEverywhere(t *testing.T) {
	var resource struct {
		Spec ruleGroups `json:"spec"`
	}
	resource = decode[struct {
		Spec ruleGroups `json:"spec"`
	}](t, filepath.Join(root, operator))
	if d := cmp.Diff(decode[ruleGroups](t, alerts), resource.Spec); d != "" {
		t.Errorf("the PrometheusRule: (-alerts +rule)\n%s", d)
	}

	grafana := decode[struct {
		Groups []struct {
			Rules []struct {
				UID, Title, Condition, For, KeepFiringFor string
				Labels, Annotations                       map[string]string
				Data                                      []struct {
					RefID string `json:"refId"`
					Model struct{ Expr, Expression, Type string }
				}
			}
		}
	}](t, filepath.Join(root, managed))
	var got []rule
	for _, g := range grafana.Groups {
		for _, r := range g.Rules {
			// A uid of more than 40 characters is refused (util.IsValidShortUID).
			if len(r.UID) > 40 || r.Data[0].RefID != "query" || r.Condition != r.Data[len(r.Data)-1].RefID {
				t.Errorf("%s: uid %s, condition %s, queries %+v", r.Title, r.UID, r.Condition, r.Data)
			}
			for k, v := range r.Annotations {
				r.Annotations[k] = strings.ReplaceAll(v, "$values.query.Value", "$value")
			}
			for k, v := range r.Labels {
				if strings.Contains(v, "$") {
					t.Errorf("%s: Grafana replaces $ in the label %s by its environment: %s", r.Title, k, v)
				}
			}
			got = append(got, rule{r.Title, r.Data[0].Model.Expr, r.For, r.KeepFiringFor, r.Labels, r.Annotations})
		}
	}
	if d := cmp.Diff(rules(t), got); d != "" {
		t.Errorf("the Grafana-managed rules: (-alerts +grafana)\n%s", d)
	}
}

func TestPromtoolLikesTheAlerts(t *testing.T) {
	promtool(t, "check", "rules", alerts)
	promtool(t, "test", "rules", root+"/examples/alerts_test.yaml")
}

// Debian builds Prometheus without the discovery of Kubernetes; the rest of the
// scrape job is what promtool can judge.
func TestPromtoolLikesTheScrapeJob(t *testing.T) {
	config := decode[map[string]any](t, root+"/examples/prometheus.yaml")
	delete(config["scrape_configs"].([]any)[0].(map[string]any), "kubernetes_sd_configs")
	text, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	rules, err := os.ReadFile(alerts)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"prometheus.yaml": text, "alerts.yaml": rules} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	promtool(t, "check", "config", filepath.Join(dir, "prometheus.yaml"))
}

// Each alert is seen to fire and not to fire by its unit tests.
func TestEveryAlertIsTested(t *testing.T) {
	tests := decode[struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string `json:"alertname"`
				ExpAlerts []any  `json:"exp_alerts"`
			} `json:"alert_rule_test"`
		} `json:"tests"`
	}](t, root+"/examples/alerts_test.yaml")
	fires, rests := map[string]bool{}, map[string]bool{}
	for _, test := range tests.Tests {
		for _, c := range test.AlertRuleTest {
			if len(c.ExpAlerts) > 0 {
				fires[c.Alertname] = true
			} else {
				rests[c.Alertname] = true
			}
		}
	}
	for _, r := range rules(t) {
		if !fires[r.Alert] || !rests[r.Alert] {
			t.Errorf("%s: tested to fire %t, not to fire %t", r.Alert, fires[r.Alert], rests[r.Alert])
		}
	}
}

// Every condition has its alert, and every alert leads to a page.
func TestAlertsAreComplete(t *testing.T) {
	all := rules(t)
	for _, p := range probes.Defaults().List() {
		name := "HostHygiene" + strings.TrimPrefix(p.Condition(), probes.ConditionPrefix)
		i := slices.IndexFunc(all, func(r rule) bool { return r.Alert == name })
		if i < 0 || !strings.Contains(all[i].Expr, `probe="`+p.Name()+`"`) {
			t.Errorf("no alert %s on hosthygiene_problem{probe=%q}", name, p.Name())
		}
	}
	for _, r := range all {
		page, ok := strings.CutPrefix(r.Annotations["runbook_url"], repo)
		if !ok || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s: annotations %q", r.Alert, r.Annotations)
			continue
		}
		if page == "docs/runbooks/{{ $labels.reason }}.md" && strings.Contains(r.Expr, "reason") {
			continue // TestRunbooks has them all
		}
		if _, err := os.Stat(filepath.Join(root, page)); err != nil {
			t.Errorf("%s: %v", r.Alert, err)
		}
	}
}

var ours = regexp.MustCompile(`hosthygiene_\w+`)

// No rule and no panel asks for a metric that the agent does not have.
func TestMetricsExist(t *testing.T) {
	ch := make(chan *prometheus.Desc, 100)
	report.NewMetrics("v1", nil).Describe(ch)
	close(ch)
	var known []string
	for d := range ch {
		known = append(known, ours.FindString(d.String()))
	}
	exprs := panelQueries(t)
	for _, r := range rules(t) {
		exprs = append(exprs, r.Expr)
	}
	for _, e := range exprs {
		for _, name := range ours.FindAllString(e, -1) {
			if !slices.Contains(known, name) {
				t.Errorf("the agent has no metric %s: %s", name, e)
			}
		}
	}
}

// panelQueries are the dashboard's, with something in place of its variables.
func panelQueries(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, dashboard))
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			Type    string
			Targets []struct{ RefID, Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	var all []string
	titles, ids := map[string]bool{}, map[int]bool{0: true}
	for _, p := range board.Panels {
		if ids[p.ID] {
			t.Errorf("the panel %s has no id of its own: %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("the panel %s asks nothing", p.Title)
		}
		titles[p.Title] = true
		for i, q := range p.Targets {
			if q.RefID != string(rune('A'+i)) {
				t.Errorf("the panel %s: query %d is called %q", p.Title, i, q.RefID)
			}
			all = append(all, strings.NewReplacer("$__rate_interval", "5m", "$cluster", ".*", "$node", "n1").Replace(q.Expr))
		}
	}
	for _, want := range []string{"Nodes and probes", "Node $node", "Clock", "Multipath paths", "PIDs in use", "OOM kills"} {
		if !titles[want] {
			t.Errorf("the dashboard has no %s", want)
		}
	}
	return all
}

// Every query of the dashboard is PromQL; that it has an answer, test/e2e sees.
func TestPromtoolLikesThePanels(t *testing.T) {
	type recording struct {
		Record string `json:"record"`
		Expr   string `json:"expr"`
	}
	var list []recording
	for _, q := range panelQueries(t) {
		list = append(list, recording{"panel:query", q + " + " + "0"})
	}
	text, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "panels", "rules": list}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "panels.yaml")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", "--lint=none", file)
}
