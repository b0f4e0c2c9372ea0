// Command monitoring writes what is made from examples/alerts.yaml (the
// PrometheusRule of the overlay and the Grafana-managed rules) and the Grafana
// dashboard, below the repository's root. It is a module of its own so that
// Grafana's SDK does not reach the product's.
//
//	go -C hack/monitoring run . ../..
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	alerts    = "examples/alerts.yaml"
	generated = "# From " + alerts + ", by \"make generate\"; change it there.\n"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "monitoring:", err)
		os.Exit(1)
	}
}

// run takes the repository's root, and the folder to write below if it is another.
func run(dirs []string) error {
	if len(dirs) < 1 || len(dirs) > 2 {
		return errors.New("want the repository's root, and where to write if it is not there")
	}
	rules, err := os.ReadFile(filepath.Join(dirs[0], alerts))
	if err != nil {
		return err
	}
	operator, err := prometheusRule(rules)
	if err != nil {
		return err
	}
	managed, err := grafanaRules(rules)
	if err != nil {
		return err
	}
	board, err := dashboardJSON()
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{
		"manifests/kustomize/overlays/prometheus-operator/prometheusrule.yaml": operator,
		"examples/grafana/alerts.yaml":                                         managed,
		"examples/grafana/dashboard.json":                                      board,
	} {
		file := filepath.Join(dirs[len(dirs)-1], name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// prometheusRule is the rule file as a custom resource, comments and all: what
// begins with "groups:" is its spec.
func prometheusRule(rules []byte) ([]byte, error) {
	_, groups, ok := bytes.Cut(rules, []byte("\ngroups:\n"))
	if !ok {
		return nil, fmt.Errorf("%s: no line \"groups:\"", alerts)
	}
	var b strings.Builder
	b.WriteString(generated + `apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: host-hygiene-agent
  namespace: host-hygiene
spec:
  groups:
`)
	for line := range strings.Lines(string(groups)) {
		if strings.TrimSpace(line) != "" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	return []byte(b.String()), nil
}

func indented(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err := e.Encode(v)
	return b.Bytes(), err
}
