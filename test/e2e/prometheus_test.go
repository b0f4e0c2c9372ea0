//go:build cluster

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// watcher is a Prometheus that scrapes the node's agent with the alerts that
// users are given.
type watcher struct {
	w       *world
	url     string
	targets string // the file that names them
}

// target is an address of an agent, and the node that it is said to be of.
type target struct{ address, node string }

// scrape is how often the agent is scraped. Alerts that wait do so for pending,
// where users have minutes; nothing else of them is changed.
const (
	scrape  = "2s"
	pending = "2s"
)

// prometheus: a fault on the node becomes an alert and is resolved with it, an
// agent that is gone and two that share an identity are told, and each query of
// the dashboard has an answer.
func (w *world) prometheus(t *testing.T) {
	w.Await(t, "every condition to be healthy", w.healthy)
	began := time.Now()
	took := func(what string) { t.Logf("%5.1f s: %s", time.Since(began).Seconds(), what) }
	p := w.startPrometheus(t)
	took("Prometheus started")
	rigtest.OnFailure(t, func(t *testing.T) { t.Log(p.quiet()) })
	t.Cleanup(func() {
		if _, err := w.TryGuest(w.CleanupContext(t), "systemctl start chrony"); err != nil {
			t.Error(err)
		}
	})
	// The twin is the same agent: what two nodes of one image would show.
	agent := fmt.Sprintf("127.0.0.1:%d", w.Node.MetricsPort())
	here, twin := target{agent, w.Node.Name()}, target{agent, "twin"}
	dead := target{"127.0.0.1:1", "dead"}

	p.scrapes(t, here)
	w.Await(t, "a scrape", func() error { return p.answers(`up == 1 and on () hosthygiene_build_info`) })
	took("scraped")
	w.Await(t, "no alert", p.quiet)
	took("no alert on a node that is well")

	p.scrapes(t, here, twin)
	for _, node := range []string{here.node, twin.node} {
		w.Await(t, "a shared initiator name", p.fires("HostHygieneInitiatorNameShared", "node", node))
		w.Await(t, "a shared machine-id", p.fires("HostHygieneIdentityShared", "node", node, "kind", "machine-id"))
	}
	took("shared identities told")

	fault := time.Now()
	w.Guest(t, "systemctl stop chrony")
	alert := []string{"node", here.node, "reason", "NoTimeDaemon", "severity", "warning"}
	w.Await(t, "the alert", p.fires("HostHygieneTimeProblem", alert...))
	fired := time.Since(fault)
	w.Await(t, "the alert of the fleet", p.fires("HostHygieneProblemOnManyNodes", "reason", "NoTimeDaemon", "severity", "critical"))
	took("fault told, of the node and of the fleet")
	p.dashboard(t)
	took("dashboard asked")
	mended := time.Now()
	w.Guest(t, "systemctl start chrony")
	w.Await(t, "the alert to resolve", func() error {
		all, err := p.alerts()
		if slices.ContainsFunc(all, labelled("HostHygieneTimeProblem", alert...)) {
			return errors.New("it fires")
		}
		return err
	})
	w.Note("alert", fmt.Sprintf("fires %.1f s after the fault, resolves %.1f s after its repair", fired.Seconds(), time.Since(mended).Seconds()))
	took("resolved")

	p.scrapes(t, here, dead)
	w.Await(t, "a dead agent", p.fires("HostHygieneAgentDown", "node", dead.node))
	took("a dead agent told")
	p.scrapes(t, here)
	w.Await(t, "no alert", p.quiet)
	took("no alert again")
	p.scrapes(t)
	w.Await(t, "no agent at all", p.fires("HostHygieneAgentsAbsent"))

	w.Await(t, "every condition to be healthy", w.healthy)
	w.invariants(t)
	w.Spent("Prometheus, " + time.Since(began).Round(time.Second).String())
}

// startPrometheus starts Debian's, without a target.
func (w *world) startPrometheus(t *testing.T) *watcher {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, v any) {
		t.Helper()
		text, err := yaml.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile("../../examples/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct {
			Name  string           `json:"name"`
			Rules []map[string]any `json:"rules"`
		} `json:"groups"`
	}
	if err := yaml.Unmarshal(text, &rules); err != nil {
		t.Fatal(err)
	}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			delete(r, "keep_firing_for")
			if r["for"] != nil {
				r["for"] = pending
			}
		}
	}
	write("alerts.yaml", rules)
	write("prometheus.yaml", map[string]any{
		"global":     map[string]any{"scrape_interval": scrape, "scrape_timeout": scrape, "evaluation_interval": "1s"},
		"rule_files": []string{"alerts.yaml"},
		"scrape_configs": []any{map[string]any{
			"job_name":        "host-hygiene-agent",
			"file_sd_configs": []any{map[string]any{"files": []string{"targets.json"}, "refresh_interval": "1s"}},
		}},
	})

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	p := &watcher{w: w, url: "http://" + address, targets: filepath.Join(dir, "targets.json")}
	p.scrapes(t)
	var log strings.Builder
	cmd := exec.CommandContext(t.Context(), "prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--web.listen-address="+address, "--log.level=warn")
	cmd.Dir, cmd.Stderr = dir, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the test's context has ended
		_ = cmd.Wait() // ended by a signal
		if t.Failed() {
			t.Logf("Prometheus: %s", log.String())
		}
	})
	w.Await(t, "Prometheus", func() error { _, err := p.ask("/api/v1/status/buildinfo"); return err })
	return p
}

// scrapes changes what is scraped.
func (p *watcher) scrapes(t *testing.T, targets ...target) {
	t.Helper()
	groups := []any{}
	for _, to := range targets {
		groups = append(groups, map[string]any{"targets": []string{to.address}, "labels": map[string]string{"node": to.node}})
	}
	text, err := json.Marshal(groups)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.targets+".new", text, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(p.targets+".new", p.targets); err != nil {
		t.Fatal(err)
	}
}

// ask returns the data of an answer of the API.
func (p *watcher) ask(path string) (json.RawMessage, error) {
	client := http.Client{Timeout: 20 * time.Second}
	resp, err := client.Get(p.url + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("%s: %w", resp.Status, err)
	}
	if answer.Status != "success" {
		return nil, errors.New(answer.Error)
	}
	return answer.Data, nil
}

// answers says why a query has no series in its answer.
func (p *watcher) answers(query string) error {
	data, err := p.ask("/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return fmt.Errorf("%s: %w", query, err)
	}
	var answer struct{ Result []json.RawMessage }
	if err := json.Unmarshal(data, &answer); err != nil {
		return err
	}
	if len(answer.Result) == 0 {
		return fmt.Errorf("no answer to %s", query)
	}
	return nil
}

// alerts are the labels of those that fire.
func (p *watcher) alerts() (firing []map[string]string, err error) {
	data, err := p.ask("/api/v1/alerts")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Alerts []struct {
			Labels map[string]string
			State  string
		}
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, err
	}
	for _, a := range answer.Alerts {
		if a.State == "firing" {
			firing = append(firing, a.Labels)
		}
	}
	return firing, nil
}

// labelled says whether an alert is of this name and has these labels.
func labelled(name string, labels ...string) func(map[string]string) bool {
	return func(a map[string]string) bool {
		for i := 0; i < len(labels); i += 2 {
			if a[labels[i]] != labels[i+1] {
				return false
			}
		}
		return a["alertname"] == name
	}
}

func (p *watcher) fires(name string, labels ...string) func() error {
	return func() error {
		all, err := p.alerts()
		if err == nil && !slices.ContainsFunc(all, labelled(name, labels...)) {
			err = fmt.Errorf("%s %q does not fire; what does: %v", name, labels, all)
		}
		return err
	}
}

func (p *watcher) quiet() error {
	all, err := p.alerts()
	if err == nil && len(all) > 0 {
		err = fmt.Errorf("firing: %v", all)
	}
	return err
}

// dashboard runs every query of the dashboard, and those that fill its variables,
// while there is a problem and an identity is shared.
func (p *watcher) dashboard(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile("../../examples/grafana/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	// What this node rightly has none of.
	none := []string{"hosthygiene_package_installed", "hosthygiene_remedies_total"}
	replace := strings.NewReplacer("$__rate_interval", "1m", "$cluster", ".*", "$node", p.w.Node.Name())
	asked := 0
	for _, panel := range board.Panels {
		for _, q := range panel.Targets {
			query := replace.Replace(q.Expr)
			asked++
			if slices.ContainsFunc(none, func(metric string) bool { return strings.Contains(query, metric) }) {
				query = "(" + query + ") or vector(0)" // that it is understood
			}
			p.w.Await(t, "an answer for the panel "+panel.Title, func() error { return p.answers(query) })
		}
	}
	data, err := p.ask("/api/v1/label/node/values?match[]=" + url.QueryEscape(`hosthygiene_build_info{cluster=~".*"}`))
	if err != nil || !strings.Contains(string(data), p.w.Node.Name()) {
		t.Errorf("the nodes to choose from: %s %v", data, err)
	}
	if asked < 20 {
		t.Errorf("the dashboard asks only %d times", asked)
	}
	p.w.Note("dashboard", fmt.Sprintf("%d queries, each with its answer", asked))
}
