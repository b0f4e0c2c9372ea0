// Kubelet-versions writes pkg/probes/kubelet_versions.tsv: which command-line
// flags and feature gates of the kubelet were deprecated, locked and removed in
// which minor version. It reads the source of one release of each minor, as the
// Go module k8s.io/kubernetes holds it:
//
//	for v in v1.24.17 … v1.36.3; do go mod download k8s.io/kubernetes@$v; done
//	go run ./hack/kubelet-versions "$(go env GOMODCACHE)"/k8s.io/kubernetes@v1.* > pkg/probes/kubelet_versions.tsv
//
// Only gates that kubernetes itself defines are told of: those of its libraries
// (apiserver, client-go) come and go from its lists without being removed. What
// the sources do not show is in extra.tsv, each row with its document.
package main

import (
	_ "embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

//go:embed extra.tsv
var extra string

// release is what one release of kubernetes knows.
type release struct {
	tag   string
	minor int
	flags map[string]string // the text of the deprecation; "" for none
	gates map[string]gate
}

type gate struct {
	stage    string
	on       bool
	locked   bool
	borrowed bool // defined by a library
}

func main() {
	log.SetFlags(0)
	var all []release
	for _, dir := range os.Args[1:] {
		_, tag, _ := strings.Cut(filepath.Base(dir), "@")
		minor, err := strconv.Atoi(strings.Split(tag, ".")[1])
		if err != nil {
			log.Fatalf("%s: no version", dir)
		}
		r := release{tag: tag, minor: minor, flags: map[string]string{}, gates: map[string]gate{}}
		r.readFlags(filepath.Join(dir, "cmd/kubelet/app/options"), filepath.Join(dir, "pkg/kubelet/config"))
		r.readGates(filepath.Join(dir, "pkg/features"))
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b release) int { return a.minor - b.minor })
	for i := 1; i < len(all); i++ {
		if all[i].minor != all[i-1].minor+1 {
			log.Fatalf("between %s and %s a minor version is missing", all[i-1].tag, all[i].tag)
		}
	}
	write(all)
}

func files(dir string) []*ast.File {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(names) == 0 {
		log.Fatalf("%s: no source", dir)
	}
	var out []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") || strings.HasSuffix(name, "_windows.go") || strings.HasSuffix(name, "_providerless.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			log.Fatal(err)
		}
		out = append(out, f)
	}
	return out
}

// text evaluates string literals and their sums; what else is in a sum is left out.
func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
			return s
		}
	case *ast.BinaryExpr:
		return text(e.X) + text(e.Y)
	case *ast.CallExpr: // fmt.Sprintf("...", x)
		if len(e.Args) > 0 {
			return text(e.Args[0])
		}
	}
	return ""
}

func kebab(name string) string {
	var b strings.Builder
	for i, c := range name {
		if c >= 'A' && c <= 'Z' && i > 0 {
			b.WriteByte('-')
		}
		b.WriteString(strings.ToLower(string(c)))
	}
	return b.String()
}

// moved are flags that a library of kubernetes defines since some version: they
// left the sources read here and are still there, or are in extra.tsv.
var moved = []string{
	"v", "vmodule", "logging-format", "experimental-logging-sanitization",
	"alsologtostderr", "log-backtrace-at", "log-dir", "log-file", "logtostderr", "stderrthreshold",
}

func normal(flag string) string { return strings.ReplaceAll(flag, "_", "-") }

// readFlags finds the calls that define flags, fs.StringVar(&v, "name", …) and
// the like, and those that mark them deprecated.
func (r *release) readFlags(dirs ...string) {
	deprecated := map[string]string{}
	var sources []*ast.File
	for _, dir := range dirs {
		sources = append(sources, files(dir)...)
	}
	for _, f := range sources {
		byConfig := map[ast.Node]bool{}
		ast.Inspect(f, func(n ast.Node) bool {
			fn, ok := n.(*ast.FuncDecl)
			if ok && fn.Name.Name == "AddKubeletConfigFlags" {
				byConfig[fn] = true
			}
			return true
		})
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				method := ""
				switch f := call.Fun.(type) {
				case *ast.SelectorExpr:
					method = f.Sel.Name
				case *ast.Ident:
					method = f.Name
				}
				at := func(i int) string {
					if i < len(call.Args) {
						return text(call.Args[i])
					}
					return ""
				}
				switch {
				case method == "MarkDeprecated" && at(0) != "":
					deprecated[normal(at(0))] = at(1)
				case method == "register" && len(call.Args) > 2:
					name := at(2)
					if c, ok := call.Args[2].(*ast.SelectorExpr); ok { // a constant of a library, named as its value
						name = kebab(c.Sel.Name)
					}
					if name != "" {
						r.flags[normal(name)] = ""
					}
				case method == "registerDeprecated" && at(2) != "":
					r.flags[normal(at(2))] = at(3) + " "
				case strings.HasSuffix(method, "Var") || strings.HasSuffix(method, "VarP"):
					if name := at(1); name != "" && !strings.Contains(name, " ") {
						r.flags[normal(name)] = ""
						if byConfig[fn] {
							r.flags[normal(name)] = configFile
						}
					}
				}
				return true
			})
		}
	}
	for name, why := range deprecated {
		if _, ok := r.flags[name]; ok {
			r.flags[name] = why + " "
		}
	}
	if len(r.flags) < 30 {
		log.Fatalf("%s: only %d flags", r.tag, len(r.flags))
	}
}

// configFile marks flags that are deprecated only because the configuration file
// has the same.
const configFile = "\x00"

// readGates finds the tables of feature gates: FeatureSpec{…} until 1.30,
// VersionedSpecs{{…}, …} since, of which the last is in force.
func (r *release) readGates(dir string) {
	for _, f := range files(dir) {
		ast.Inspect(f, func(n ast.Node) bool {
			kv, ok := n.(*ast.KeyValueExpr)
			if !ok {
				return true
			}
			name, borrowed := "", false
			switch k := kv.Key.(type) {
			case *ast.Ident:
				name = k.Name
			case *ast.SelectorExpr:
				name, borrowed = k.Sel.Name, true
			}
			spec, ok := kv.Value.(*ast.CompositeLit)
			if name == "" || !ok {
				return true
			}
			for len(spec.Elts) > 0 { // the last of a list
				last, ok := spec.Elts[len(spec.Elts)-1].(*ast.CompositeLit)
				if !ok {
					break
				}
				spec = last
			}
			g := gate{borrowed: borrowed}
			for _, e := range spec.Elts {
				field, ok := e.(*ast.KeyValueExpr)
				if !ok {
					return true
				}
				key, _ := field.Key.(*ast.Ident)
				if key == nil {
					return true
				}
				value := ""
				switch v := field.Value.(type) {
				case *ast.Ident:
					value = v.Name
				case *ast.SelectorExpr:
					value = v.Sel.Name
				}
				switch key.Name {
				case "PreRelease":
					g.stage = value
				case "Default":
					g.on = value == "true"
				case "LockToDefault":
					g.locked = value == "true"
				}
			}
			if g.stage != "" {
				r.gates[name] = g
			}
			return true
		})
	}
	if len(r.gates) < 50 {
		log.Fatalf("%s: only %d gates", dir, len(r.gates))
	}
}

func write(all []release) {
	first, last := all[0], all[len(all)-1]
	fmt.Printf("# Flags and feature gates of the kubelet by minor version 1.N. Generated by hack/kubelet-versions from\n")
	fmt.Printf("# https://github.com/kubernetes/kubernetes, cmd/kubelet/app/options\n# and pkg/kubelet/config (flags), pkg/features (gates), at")
	for _, r := range all {
		fmt.Printf(" %s", r.tag)
	}
	fmt.Printf(".\n# A release not listed there was not looked at. Rows with an address come from that document.\n")
	fmt.Printf("#\n# known\tFIRST\tLAST\n# flag\tNAME\tDEPRECATED\tREMOVED\tWHAT KUBERNETES SAYS\n# gate\tNAME\tLOCKED\tLOCKED TO\tREMOVED\tSTAGE\n")
	fmt.Printf("known\t%d\t%d\n", first.minor, last.minor)

	flags, gates := map[string]bool{}, map[string]bool{}
	for _, r := range all {
		for name := range r.flags {
			flags[name] = true
		}
		for name := range r.gates {
			gates[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		if slices.Contains(moved, name) {
			continue
		}
		deprecated, removed, why := "-", "-", ""
		for i, r := range all {
			if text, ok := r.flags[name]; ok {
				removed = "-"
				switch {
				case text == "" || text == configFile:
					deprecated, why = "-", ""
				case deprecated == "-":
					deprecated = strconv.Itoa(r.minor)
				}
				if t := strings.TrimSpace(text); t != "" && text != configFile {
					why = t
				}
			} else if i > 0 {
				if _, ok := all[i-1].flags[name]; ok {
					removed = strconv.Itoa(r.minor)
				}
			}
		}
		if deprecated == strconv.Itoa(first.minor) {
			deprecated = "<=" + deprecated
		}
		if removed != "-" || deprecated != "-" {
			fmt.Printf("flag\t%s\t%s\t%s\t%s\n", name, deprecated, removed, strings.Join(strings.Fields(why), " "))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(gates)) {
		locked, to, removed, stage, borrowed := "-", "-", "-", "", false
		for i, r := range all {
			if g, ok := r.gates[name]; ok {
				removed, stage = "-", g.stage
				borrowed = borrowed || g.borrowed
				switch {
				case !g.locked:
					locked, to = "-", "-"
				case locked == "-":
					locked, to = strconv.Itoa(r.minor), strconv.FormatBool(g.on)
				}
			} else if i > 0 {
				if _, ok := all[i-1].gates[name]; ok {
					removed = strconv.Itoa(r.minor)
				}
			}
		}
		if borrowed || removed == "-" && locked == "-" {
			continue
		}
		if locked == strconv.Itoa(first.minor) {
			locked = "<=" + locked
		}
		fmt.Printf("gate\t%s\t%s\t%s\t%s\t%s\n", name, locked, to, removed, stage)
	}
	fmt.Print(extra)
}
