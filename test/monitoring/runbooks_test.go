package monitoring

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

const runbooks = root + "/docs/runbooks"

// head is the part of a page that the rule of its reason says: all before the
// first section.
func head(p probes.Probe, r finding.Rule) string {
	severities := []string{string(r.Severity)}
	for _, s := range r.Also {
		severities = append(severities, string(s))
	}
	hold := ""
	if r.HoldBefore > 0 || r.HoldClear > 0 {
		hold = fmt.Sprintf(" Told after %s and cleared after %s.", probes.Duration(r.HoldBefore), probes.Duration(r.HoldClear))
	}
	return fmt.Sprintf("# %s\n\n%s\n\n*%s, from the probe %s, in the condition `%s`.%s*\n\n`kubectl -n host-hygiene exec POD -- /agent explain %s` has the evidence.\n\n",
		r.Reason, r.Means, strings.Join(severities, " or "), p.Name(), p.Condition(), hold, p.Name())
}

// Every reason has a page, which begins with what its rule says and goes on with
// what a person needs; every page belongs to a reason or an alert.
func TestRunbooks(t *testing.T) {
	known := map[string]bool{"README.md": true}
	for _, r := range rules(t) {
		known[r.Alert+".md"] = true
	}
	for _, p := range probes.Defaults().List() {
		for _, r := range p.Rules() {
			name := r.Reason + ".md"
			known[name] = true
			file := filepath.Join(runbooks, name)
			text, err := os.ReadFile(file)
			if err != nil {
				t.Errorf("%s needs a page: %v", r.Reason, err)
				continue
			}
			i := strings.Index(string(text), "## ")
			if i < 0 {
				t.Errorf("%s has no section", name)
				continue
			}
			want := head(p, r)
			if *update {
				if err := os.WriteFile(file, []byte(want+string(text[i:])), 0o644); err != nil {
					t.Fatal(err)
				}
				continue
			}
			if d := cmp.Diff(want, string(text[:i])); d != "" {
				t.Errorf("%s: run make generate: (-want +got)\n%s", name, d)
			}
		}
	}
	files, err := filepath.Glob(runbooks + "/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := filepath.Base(f)
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !known[name] {
			t.Errorf("%s belongs to no reason and no alert", name)
		}
		if name == "README.md" {
			continue
		}
		at := 0
		for _, section := range []string{"## Look closer\n", "```console\n", "## Mend it\n", "## When it is harmless\n", "## Settings\n"} {
			i := strings.Index(string(text[at:]), section)
			if i < 0 {
				t.Errorf("%s has no %q after its byte %d", name, strings.TrimSpace(section), at)
				break
			}
			at += i
		}
		for _, link := range links(string(text)) {
			if _, err := os.Stat(filepath.Join(runbooks, link)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// links are the pages a page leads to.
func links(text string) []string {
	var out []string
	for _, part := range strings.Split(text, "](")[1:] {
		if to, _, ok := strings.Cut(part, ")"); ok && !strings.Contains(to, "://") {
			out = append(out, to)
		}
	}
	return out
}
