package main

import (
	"flag"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/test/man"
)

var update = flag.Bool("update", false, "rewrite the manual pages")

// TestManPages: "make generate" writes docs/man.
func TestManPages(t *testing.T) { man.Hold(t, newRoot(os.Stdout), "../../docs/man", *update) }

// TestFlags: kubectl's own flags are here, and the namespace is the agent's.
func TestFlags(t *testing.T) {
	flags := newRoot(os.Stdout).PersistentFlags()
	for _, name := range []string{"kubeconfig", "context", "cluster", "user", "server", "token", "as", "as-group", "request-timeout", "certificate-authority", "insecure-skip-tls-verify", "tls-server-name"} {
		if flags.Lookup(name) == nil {
			t.Errorf("no --%s", name)
		}
	}
	if f := flags.Lookup("namespace"); f.DefValue != "host-hygiene" || f.Shorthand != "n" {
		t.Errorf("--namespace: %+v", f)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"-o", "xml"}, {"--watch", "-o", "json"}, {"explain"}, {"explain", "a", "b", "c"}, {"explain", "a", "-o", "wide"}, {"nonsense"},
		{"upgrade-check", "--skip", "x"}, {"identities", "--parallel", "0"}, {"--kubeconfig", "/does/not/exist"},
	} {
		var out strings.Builder
		cmd := newRoot(&out)
		cmd.SetArgs(args)
		if code := exitCode(cmd.ExecuteContext(t.Context())); code != exitUsage {
			t.Errorf("%v: exit code %d: %s", args, code, out.String())
		}
	}
}

func TestWorse(t *testing.T) {
	for _, tt := range []struct{ a, b, want int }{{0, 0, 0}, {0, 3, 3}, {3, 1, 1}, {1, 3, 1}, {1, 2, 2}, {2, 1, 2}, {0, 137, 137}, {137, 1, 137}} {
		if got := worse(tt.a, tt.b); got != tt.want {
			t.Errorf("worse(%d, %d) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

// TestEndless: a node that never stops talking fills no memory.
func TestEndless(t *testing.T) {
	var b strings.Builder
	w := &atMost{&b, 10}
	if _, err := w.Write([]byte("0123456789")); err != nil {
		t.Error(err)
	}
	if _, err := w.Write([]byte("0")); err == nil || b.Len() != 10 {
		t.Errorf("%v after %d bytes", err, b.Len())
	}
}

// TestKrew: the manifest, once its template is filled in, has every platform of
// hack/build-plugin.sh and the names of its archives.
func TestKrew(t *testing.T) {
	template, err := os.ReadFile("../../.krew.yaml")
	if err != nil {
		t.Fatal(err)
	}
	filled := regexp.MustCompile(`\{\{ ?addURIAndSha "([^"]*)" .TagName \}\}`).ReplaceAllString(string(template), `uri: "$1"`)
	filled = strings.ReplaceAll(filled, "{{ .TagName }}", "v0.1.0")
	var m struct {
		Metadata struct{ Name string }
		Spec     struct {
			ShortDescription string
			Platforms        []struct {
				Selector struct{ MatchLabels struct{ OS, Arch string } }
				URI, Bin string
			}
		}
	}
	if err := yaml.Unmarshal([]byte(filled), &m); err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("../../hack/build-plugin.sh")
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	words := func(name string) []string {
		list := regexp.MustCompile(`for ` + name + ` in ([^;]*);`).FindStringSubmatch(string(script))
		if list == nil {
			t.Fatalf("hack/build-plugin.sh has no loop over %s", name)
		}
		return strings.Fields(list[1])
	}
	for _, system := range words("os") {
		for _, arch := range words("arch") {
			bin := "kubectl-hygiene"
			if system == "windows" {
				bin += ".exe"
			}
			want = append(want, "https://github.com/hosthygiene/agent/releases/download/v0.1.0/kubectl-hygiene_"+system+"_"+arch+".tar.gz "+bin)
		}
	}
	for _, p := range m.Spec.Platforms {
		if !strings.Contains(p.URI, p.Selector.MatchLabels.OS+"_"+p.Selector.MatchLabels.Arch) {
			t.Errorf("%s for %+v", p.URI, p.Selector)
		}
		got = append(got, p.URI+" "+p.Bin)
	}
	if !slices.Equal(got, want) || m.Metadata.Name != "hygiene" {
		t.Errorf("got %v\nwant %v", got, want)
	}
	if n := len(m.Spec.ShortDescription); n == 0 || n > 50 {
		t.Errorf("krew shows 50 characters of the short description, which has %d", n)
	}
}
