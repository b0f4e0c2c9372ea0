package distros

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/host"
)

// distro is what is known of a distribution: testdata/NAME/facts.yaml, beside its
// os-release as it is shipped.
type distro struct {
	dir       string
	osRelease string

	Name string `json:"name"`
	// Sources, by the word the facts refer to them by.
	Sources   map[string]source `json:"sources"`
	OSRelease fact              `json:"osRelease"`
	System    system            `json:"system"`
	Packages  packages          `json:"packages"`
	Time      component         `json:"time"`
	// OtherTime is a daemon that may run instead.
	OtherTime component `json:"otherTime"`
	ISCSI     component `json:"iscsi"`
	Multipath component `json:"multipath"`
	NFS       component `json:"nfs"`
	Updates   component `json:"updates"`
	Kubelet   kubelet   `json:"kubelet"`
	// NotVerified says of a fact what has no source; it does not count.
	NotVerified map[string]string `json:"notVerified"`
}

// source is where a fact can be looked up: a package by its version, a file of a
// public repository at a commit, or a document.
type source struct {
	Package    string `json:"package"`
	Of         string `json:"of"`
	Repository string `json:"repository"`
	Commit     string `json:"commit"`
	Path       string `json:"path"`
	Document   string `json:"document"`
	// Says is what is to be found there, where that is not plain.
	Says string `json:"says"`
}

// names are the sources of a fact: one word or several.
type names []string

func (n *names) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '[' {
		return json.Unmarshal(data, (*[]string)(n))
	}
	*n = names{""}
	return json.Unmarshal(data, &(*n)[0])
}

type fact struct {
	Source names `json:"source"`
}

func (f fact) verified() bool { return len(f.Source) > 0 }

type system struct {
	fact
	Class host.OSClass `json:"class"`
	// Init is the comm of PID 1.
	Init string `json:"init"`
	// Files are what else shows the class.
	Files []string `json:"files"`
	// ReadOnlyRoot and ReadOnlyUsr are the file systems mounted so; Verity: below
	// it is dm-verity.
	ReadOnlyRoot string `json:"readOnlyRoot"`
	ReadOnlyUsr  string `json:"readOnlyUsr"`
	Verity       bool   `json:"verity"`
	// OpenShift: the Machine Config Operator looks after it.
	OpenShift bool `json:"openshift"`
}

type packages struct {
	fact
	// Database is dpkg, rpm or none; Manager is the program that installs, "" where
	// none does.
	Database string `json:"database"`
	Manager  string `json:"manager"`
	// Instead is a word of the way something comes onto a system without one.
	Instead string `json:"instead"`
}

type component struct {
	fact
	// capability is the agent's word for it under require.packages.
	capability string
	// Name is what the agent calls it where it is no package.
	Name string `json:"name"`
	// Package brings it; Shipped: the system comes with it; Extension: a system
	// extension does; BuiltIn: it is part of something else; None: there is none.
	Package   string `json:"package"`
	Shipped   bool   `json:"shipped"`
	Extension bool   `json:"extension"`
	BuiltIn   string `json:"builtIn"`
	None      bool   `json:"none"`
	// Units, the one to enable first.
	Units    []string `json:"units"`
	Programs []string `json:"programs"`
	// Files are what configures it once it is installed, by name.
	Files map[string]string `json:"files"`
	// Process is the daemon's comm.
	Process       string `json:"process"`
	InitiatorName string `json:"initiatorName"`
}

type kubelet struct {
	fact
	// How it comes onto the host.
	How string `json:"how"`
	// Unit is "" where systemd does not run it; Container: it has a root of its own.
	Unit      string   `json:"unit"`
	Container bool     `json:"container"`
	Config    string   `json:"config"`
	RootDir   string   `json:"rootDir"`
	Argv      []string `json:"argv"`
}

// components are those that are asked for by capability, and the updater.
func (d distro) components() []component {
	for name, c := range map[string]*component{"time": &d.Time, "iscsi": &d.ISCSI, "multipath": &d.Multipath, "nfs": &d.NFS} {
		c.capability = name
	}
	return []component{d.Time, d.ISCSI, d.Multipath, d.NFS, d.Updates}
}

// count is how many of the facts have a source.
func (d distro) count() (verified, all int) {
	for _, f := range []fact{d.OSRelease, d.System.fact, d.Packages.fact, d.Time.fact, d.ISCSI.fact, d.Multipath.fact, d.NFS.fact, d.Updates.fact, d.Kubelet.fact} {
		all++
		if f.verified() {
			verified++
		}
	}
	return verified, all
}

// wanted are the distributions the project promises to know.
var wanted = []string{
	"debian", "ubuntu", "rhel", "rocky", "fedora", "rhcos", "rhcos-layered", "sles", "sle-micro",
	"flatcar", "bottlerocket", "talos", "amazon-linux", "azure-linux", "cos",
}

func load(t *testing.T) []distro {
	t.Helper()
	dirs, err := filepath.Glob("testdata/*/facts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(dirs) != len(wanted) {
		t.Errorf("testdata has %d distributions, the list %d", len(dirs), len(wanted))
	}
	var all []distro
	for _, dir := range wanted {
		d := distro{dir: dir}
		data, err := os.ReadFile(filepath.Join("testdata", dir, "facts.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict(data, &d); err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		release, err := os.ReadFile(filepath.Join("testdata", dir, "os-release"))
		if err != nil {
			t.Fatal(err)
		}
		d.osRelease = string(release)
		d.check(t)
		all = append(all, d)
	}
	return all
}

var commitForm = regexp.MustCompile(`^[0-9a-f]{40}$`)

// check holds every fact to having a source, and every source to being one that
// can be looked up.
func (d distro) check(t *testing.T) {
	t.Helper()
	used := map[string]bool{}
	for name, f := range map[string]struct {
		fact
		known bool
	}{
		"osRelease": {d.OSRelease, true}, "system": {d.System.fact, true}, "packages": {d.Packages.fact, true},
		"time": {d.Time.fact, d.Time.known()}, "otherTime": {d.OtherTime.fact, d.OtherTime.known()}, "iscsi": {d.ISCSI.fact, d.ISCSI.known()},
		"multipath": {d.Multipath.fact, d.Multipath.known()}, "nfs": {d.NFS.fact, d.NFS.known()},
		"updates": {d.Updates.fact, d.Updates.known()}, "kubelet": {d.Kubelet.fact, d.Kubelet.How != ""},
	} {
		for _, s := range f.Source {
			if _, ok := d.Sources[s]; !ok {
				t.Errorf("%s: %s names the source %q, which is not listed", d.dir, name, s)
			}
			used[s] = true
		}
		if name == "packages" && d.Packages.Manager == "" && d.Packages.Instead == "" {
			t.Errorf("%s: neither what installs packages nor what is done instead is stated", d.dir)
		}
		if f.known != f.verified() {
			t.Errorf("%s: %s is stated: %t, has a source: %t", d.dir, name, f.known, f.verified())
		}
		if !f.known && name != "otherTime" && d.NotVerified[name] == "" {
			t.Errorf("%s: %s is neither stated nor listed as not verified", d.dir, name)
		}
	}
	for name, s := range d.Sources {
		kinds := 0
		if s.Package != "" && s.Of != "" && len(strings.Fields(s.Package)) == 2 {
			kinds++
		}
		if s.Repository != "" && s.Path != "" && commitForm.MatchString(s.Commit) {
			kinds++
		}
		if s.Document != "" && s.Says != "" && strings.Contains(s.Document, "://") {
			kinds++
		}
		if kinds != 1 {
			t.Errorf("%s: the source %s is no package with its version, no file at a commit and no document with what it says", d.dir, name)
		}
		if !used[name] {
			t.Errorf("%s: nothing refers to the source %s", d.dir, name)
		}
	}
}

func (c component) known() bool {
	return c.Package != "" || c.Name != "" || c.Shipped || c.Extension || c.BuiltIn != "" || c.None
}

// here reports whether it is on the host in the state that is tried.
func (c component) here(installed bool) bool {
	return c.verified() && !c.None && (c.Shipped || c.BuiltIn != "" || installed)
}

// sourcesOf lists every source once, in the order of its name.
func (d distro) sourceNames() []string {
	var list []string
	for name := range d.Sources {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}
