// Package fuzzproof shows that each fuzzer finds something: a bug is sown into
// the code under it, and it must fail.
package fuzzproof

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"
)

var (
	prove = flag.Bool("prove", false, "sow the bugs and run the fuzzers (make fuzz-proof)")
	only  = flag.String("fuzzer", ".", "of the fuzzers that match")
	// One fuzzer may then find another's bug, so that this is for a first look.
	together = flag.Bool("together", false, "sow all bugs of a package at once and build it once")
	limit    = flag.Duration("limit", time.Minute, "how long a fuzzer may search")
)

const root = "../.."

// bug is sown by replacing a text that stands once in a file.
type bug struct {
	what, file, good, bad string
}

func bugs(t *testing.T) map[string]bug {
	t.Helper()
	ar, err := txtar.ParseFile("testdata/bugs.txt")
	if err != nil {
		t.Fatal(err)
	}
	form := regexp.MustCompile(`(?s)^([^\n]+)\n([^\n]+)\n<<<<\n(.*)\n====\n(.*)\n>>>>\n$`)
	all := map[string]bug{}
	for _, f := range ar.Files {
		m := form.FindSubmatch(f.Data)
		if m == nil {
			t.Fatalf("%s: not WHAT, FILE, <<<<, ====, >>>>", f.Name)
		}
		if _, twice := all[f.Name]; twice {
			t.Errorf("%s has two bugs", f.Name)
		}
		all[f.Name] = bug{string(m[1]), string(m[2]), string(m[3]), string(m[4])}
	}
	return all
}

// fuzzers finds them and the folders of their packages.
func fuzzers(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, top := range []string{"cmd", "pkg"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(name string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(name, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			for _, d := range file.Decls {
				f, ok := d.(*ast.FuncDecl)
				if !ok || f.Recv != nil || !strings.HasPrefix(f.Name.Name, "Fuzz") {
					continue
				}
				if other, twice := found[f.Name.Name]; twice {
					t.Errorf("%s is the name of two fuzzers, in %s and %s", f.Name.Name, other, name)
				}
				dir, err := filepath.Rel(root, filepath.Dir(name))
				if err != nil {
					return err
				}
				found[f.Name.Name] = dir
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func (b bug) sow(t *testing.T, root string) (undo func()) {
	t.Helper()
	name := filepath.Join(root, b.file)
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(data, []byte(b.good)); n != 1 {
		t.Fatalf("%s has the text %d times, want once:\n%s", b.file, n, b.good)
	}
	if err := os.WriteFile(name, bytes.Replace(data, []byte(b.good), []byte(b.bad), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEveryFuzzerHasABug: a fuzzer is added together with a bug it finds, and a
// change of the code it stands in takes the bug along.
func TestEveryFuzzerHasABug(t *testing.T) {
	have, all := fuzzers(t), bugs(t)
	for name, dir := range have {
		if _, ok := all[name]; !ok {
			t.Errorf("%s in %s has no bug in testdata/bugs.txt: sow one, and see it found with make fuzz-proof FUZZER=%s", name, dir, name)
		}
	}
	for name, b := range all {
		if _, ok := have[name]; !ok {
			t.Errorf("there is no fuzzer %s", name)
		}
		data, err := os.ReadFile(filepath.Join(root, b.file))
		if err != nil {
			t.Error(err)
		} else if n := bytes.Count(data, []byte(b.good)); n != 1 || b.good == b.bad {
			t.Errorf("%s: %s has the text %d times, want once:\n%s", name, b.file, n, b.good)
		}
	}
}

// TestFuzzersFindBugs sows each bug into a copy of the tree and has its fuzzer
// look for it: first in the seeds it comes with, which every ordinary test run
// tries, then with the engine, which starts from no other inputs.
func TestFuzzersFindBugs(t *testing.T) {
	if !*prove {
		t.Skip("a build for each fuzzer, minutes altogether: make fuzz-proof")
	}
	choose, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal(err)
	}
	tree := scratch(t)
	have, all := fuzzers(t), bugs(t)
	seeds, engine := 0, 0
	built := map[string]string{}
	sown := func(dir string) (undo func()) {
		var undos []func()
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if b, ok := all[name]; ok && have[name] == dir {
				undos = append(undos, b.sow(t, tree))
			}
		}
		return func() {
			for _, undo := range slices.Backward(undos) {
				undo()
			}
		}
	}
	binaries := t.TempDir()
	for _, name := range slices.Sorted(maps.Keys(have)) {
		b, ok := all[name]
		if !ok || !choose.MatchString(name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(tree, have[name])
			binary := built[have[name]]
			if binary == "" {
				binary = filepath.Join(binaries, name)
				var undo func()
				if *together {
					undo = sown(have[name])
					built[have[name]] = binary
				} else {
					undo = b.sow(t, tree)
				}
				defer undo()
				build := exec.Command("go", "test", "-vet=off", "-c", "-fuzz=.", "-o", binary, "./"+have[name])
				build.Dir = tree
				if out, err := build.CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			run := func(args ...string) (out string, took time.Duration, failed bool) {
				t.Helper()
				ctx, cancel := context.WithTimeout(t.Context(), 2**limit+time.Minute)
				defer cancel()
				cmd := exec.CommandContext(ctx, binary, args...)
				cmd.Dir = dir
				began := time.Now()
				text, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
					t.Fatalf("%v, %v\n%s", err, ctx.Err(), text)
				}
				return string(text), time.Since(began), err != nil
			}
			if out, took, failed := run("-test.run", "^"+name+"$"); failed {
				seeds++
				t.Logf("found by its seeds in %.1f s: %s%s", took.Seconds(), b.what, told(out))
				return
			}
			out, took, failed := run("-test.run", "^$", "-test.fuzz", "^"+name+"$", "-test.fuzztime", limit.String(),
				"-test.parallel", "2", "-test.fuzzcachedir", t.TempDir())
			// The end of the time is told as a failure now and then (go.dev/issue/75804).
			if !failed || !strings.Contains(out, "Failing input written to") {
				t.Fatalf("not found in %s: %s\n%s", *limit, b.what, out)
			}
			engine++
			execs := regexp.MustCompile(`execs: ([0-9]+)`).FindAllStringSubmatch(out, -1)
			n := "0"
			if len(execs) > 0 {
				n = execs[len(execs)-1][1]
			}
			t.Logf("found by the engine in %.1f s (about %s executions): %s%s", took.Seconds(), n, b.what, told(out))
		})
	}
	t.Logf("%d bugs found: %d by seeds, %d by the engine", seeds+engine, seeds, engine)
}

// told is the first line of what a fuzzer said.
func told(out string) string {
	for line := range strings.Lines(out) {
		if line = strings.TrimSpace(line); strings.Contains(line, "_test.go:") || strings.HasPrefix(line, "panic") {
			return fmt.Sprintf("\n%.160s", line)
		}
	}
	return ""
}

// scratch copies the module: a fuzzer writes what it finds beside its test.
func scratch(t *testing.T) string {
	t.Helper()
	tree := t.TempDir()
	for _, part := range []string{"go.mod", "go.sum", "cmd", "pkg", "docs", "examples", "manifests"} {
		src := filepath.Join(root, part)
		st, err := os.Stat(src)
		if err == nil && st.IsDir() {
			err = os.CopyFS(filepath.Join(tree, part), os.DirFS(src))
		} else if err == nil {
			var data []byte
			if data, err = os.ReadFile(src); err == nil {
				err = os.WriteFile(filepath.Join(tree, part), data, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return tree
}
