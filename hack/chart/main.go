// Command chart renders a Helm chart with several sets of values, as "helm
// template" would, and lints it with each, by Helm's own library. It is a module
// of its own so that none of its dependencies reaches the product's.
//
//	echo '{"default": {}, "repairs": {"remedies": {"allow": true}}}' | go -C hack/chart run . ../../charts/host-hygiene
//
// Sets of values by name go in, what became of each comes out, both as JSON.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
)

// outcome is one rendering.
type outcome struct {
	// Manifest holds the objects, in the order of their templates' names.
	Manifest string `json:"manifest,omitempty"`
	// Error is what Helm says when it does not render.
	Error string `json:"error,omitempty"`
	// Lint are the warnings and errors of "helm lint".
	Lint []string `json:"lint,omitempty"`
}

// namespace is the release's, which keeps Helm's own record; kubectl's default.
const namespace = "default"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(dirs []string) error {
	if len(dirs) != 1 {
		return fmt.Errorf("want one chart, not %d", len(dirs))
	}
	var cases map[string]map[string]any
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		return fmt.Errorf("sets of values: %w", err)
	}
	outcomes := map[string]outcome{}
	for name, values := range cases {
		var o outcome
		var err error
		if o.Manifest, err = render(dirs[0], values); err != nil {
			o.Error = err.Error()
		}
		for _, m := range lint.All(dirs[0], values, namespace, true).Messages {
			if m.Severity >= support.WarningSev {
				o.Lint = append(o.Lint, m.Error())
			}
		}
		outcomes[name] = o
	}
	return json.NewEncoder(os.Stdout).Encode(outcomes)
}

func render(dir string, values map[string]any) (string, error) {
	c, err := loader.Load(dir) // anew: rendering changes it
	if err != nil {
		return "", err
	}
	release := chartutil.ReleaseOptions{Name: "host-hygiene", Namespace: namespace, IsInstall: true, Revision: 1}
	top, err := chartutil.ToRenderValues(c, values, release, chartutil.DefaultCapabilities)
	if err != nil {
		return "", err
	}
	files, err := engine.Render(c, top)
	if err != nil {
		return "", err
	}
	var docs []string
	for _, t := range c.Templates { // sorted by name when it was loaded
		text := files[path.Join(c.Name(), t.Name)]
		if path.Ext(t.Name) == ".yaml" && strings.TrimSpace(text) != "" {
			docs = append(docs, strings.TrimSpace(text))
		}
	}
	return strings.Join(docs, "\n---\n") + "\n", nil
}
