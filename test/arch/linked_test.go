package arch

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "list the linked packages anew")

const linkedFile = "../../docs/linked-packages.txt"

// TestLinkedPackages makes every package that comes into the binary, or leaves
// it, and every new version of a module a line of the diff under review.
func TestLinkedPackages(t *testing.T) {
	want := linked(t)
	if *update {
		if err := os.WriteFile(linkedFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(linkedFile)
	if err != nil {
		t.Fatal(err)
	}
	if release(got) != release(want) {
		// Another release of Go has other packages inside; ours are compared.
		t.Logf("the list is of %s and this is %s: the standard library is not compared", release(got), release(want))
		got, want = modulesOnly(got), modulesOnly(want)
	}
	if d := cmp.Diff(string(got), string(want)); d != "" {
		t.Errorf("what the agent links differs from docs/linked-packages.txt; look at each line, then run make generate: (-list +linked)\n%s", d)
	}
}

var (
	releaseLine = regexp.MustCompile(`(?m)^# By (go1\.\d+)`)
	stdSection  = regexp.MustCompile(`(?m)^std\n(  .*\n)*`)
)

func release(list []byte) string {
	if m := releaseLine.FindSubmatch(list); m != nil {
		return string(m[1])
	}
	return "no release"
}

func modulesOnly(list []byte) []byte {
	return stdSection.ReplaceAll(releaseLine.ReplaceAll(list, nil), nil)
}

// linked lists the packages that the go command would link, with the settings of
// the Makefile and the Dockerfile, by module.
func linked(t *testing.T) []byte {
	t.Helper()
	in := map[string]map[string][]string{} // module, package, architectures
	arches := []string{"amd64", "arm64"}
	for _, arch := range arches {
		cmd := exec.Command("go", "list", "-deps", "-f",
			"{{if .Standard}}std{{else}}{{.Module.Path}}{{with .Module.Version}} {{.}}{{end}}{{with .Module.Replace}} => {{.Path}} {{.Version}}{{end}}{{end}}\t{{.ImportPath}}",
			module+"cmd/agent")
		cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v\n%s", err, stderr.String())
		}
		for line := range strings.Lines(string(out)) {
			from, pkg, ok := strings.Cut(strings.TrimSpace(line), "\t")
			if !ok {
				t.Fatalf("go list says %q", line)
			}
			if in[from] == nil {
				in[from] = map[string][]string{}
			}
			in[from][pkg] = append(in[from][pkg], arch)
		}
	}
	major, minor, _ := strings.Cut(runtime.Version(), ".")
	minor, _, _ = strings.Cut(minor, ".")
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Every package in the agent's binary, by module and version, on linux/%s.\n", strings.Join(arches, " and linux/"))
	fmt.Fprintf(&b, "# By %s.%s; \"make generate\" writes it, a test holds it.\n", major, minor)
	for _, from := range slices.Sorted(maps.Keys(in)) {
		fmt.Fprintf(&b, "\n%s\n", from)
		for _, pkg := range slices.Sorted(maps.Keys(in[from])) {
			b.WriteString("  " + pkg)
			if on := in[from][pkg]; len(on) < len(arches) {
				b.WriteString(" (" + strings.Join(on, ", ") + ")")
			}
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}
