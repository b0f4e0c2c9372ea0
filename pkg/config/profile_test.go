package config

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/probes"
)

// TestProfiles holds each profile to what it makes a host require, and to being
// usable as it stands: alone, and under profiles of a user's own config.
func TestProfiles(t *testing.T) {
	if len(StorageProfiles()) < 6 {
		t.Fatalf("profiles: %v", StorageProfiles())
	}
	for _, name := range StorageProfiles() {
		t.Run(name, func(t *testing.T) {
			p, err := BuiltinProfile(name)
			if err != nil {
				t.Fatal(err)
			}
			if p.Description == "" || len(p.Sources) == 0 {
				t.Error("it does not say what it is for or where it comes from")
			}
			effective := forNode(t, parseGood(t, "storageProfiles: ["+name+"]\n"), nil)
			text, err := yaml.Marshal(effective.Require)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "testdata/profiles/"+name+".yaml", string(text))

			data, err := os.ReadFile("profiles/" + name + ".yaml")
			if err != nil {
				t.Fatal(err)
			}
			own := forNode(t, parseGood(t, "storageProfiles: [our-own]\nprofiles:\n  our-own:\n    "+strings.ReplaceAll(string(data), "\n", "\n    ")), nil)
			if d := gocmp.Diff(effective.Require, own.Require, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("copied, it requires something else (-embedded +copied)\n%s", d)
			}
		})
	}
	found, err := filepath.Glob("testdata/profiles/*.yaml")
	if err != nil || len(found) != len(StorageProfiles()) {
		t.Errorf("testdata/profiles has %d files for %d profiles (%v)", len(found), len(StorageProfiles()), err)
	}
}

// TestProfileFilesSay: what a profile wants in force stands in the files it
// requires, and nothing else does that another profile could contradict unseen.
func TestProfileFilesSay(t *testing.T) {
	for _, name := range StorageProfiles() {
		p, err := BuiltinProfile(name)
		if err != nil {
			t.Fatal(err)
		}
		var want, got []string
		for key, value := range p.Multipath.Defaults {
			want = append(want, "defaults "+key+" "+value)
		}
		for _, d := range p.Multipath.Devices {
			for key, value := range d.Settings {
				want = append(want, fmt.Sprintf("%s/%s %s %s", d.Vendor, d.Product, key, value))
			}
		}
		for _, f := range p.Files {
			got = append(got, multipathSettings(t, f)...)
		}
		slices.Sort(want)
		slices.Sort(got)
		if d := gocmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s: (-wanted +in its files)\n%s", name, d)
		}
	}
}

// multipathSettings lists what a file says in defaults and in device sections.
func multipathSettings(t *testing.T, f probes.RequiredFile) []string {
	t.Helper()
	var said, device []string
	var at []string
	vendor, product := "", ""
	for line := range strings.Lines(f.Content) {
		line = strings.TrimSpace(line)
		switch key, value, _ := strings.Cut(line, " "); {
		case line == "" || line[0] == '#':
		case value == "{":
			at = append(at, key)
			device, vendor, product = nil, "", ""
		case line == "}":
			if strings.Join(at, " ") == "devices device" {
				if vendor == "" || product == "" {
					t.Errorf("%s: a device section that multipathd drops, without vendor or product", f.Path)
				}
				for _, s := range device {
					said = append(said, vendor+"/"+product+" "+s)
				}
			}
			at = at[:len(at)-1]
		default:
			value = strings.Trim(value, `"`)
			switch where := strings.Join(at, " "); {
			case where == "defaults":
				said = append(said, "defaults "+key+" "+value)
			case where == "devices device" && key == "vendor":
				vendor = value
			case where == "devices device" && key == "product":
				product = value
			case where == "devices device":
				device = append(device, key+" "+value)
			}
		}
	}
	if len(at) > 0 {
		t.Errorf("%s: sections that are not closed: %v", f.Path, at)
	}
	return said
}

// TestProfilesJoinRequire: what the config requires itself comes first, what is
// asked twice once, and the stricter bound wins; nothing that was read changes.
func TestProfilesJoinRequire(t *testing.T) {
	c := parseGood(t, `
storageProfiles: [a, b]
require:
  packages: [lsscsi, {name: nfs, names: {debian: nfs-common}}]
  units: [{name: x.service, enabled: true}, {name: y.service, enabled: false}]
  modules: [dm-multipath]
  sysctls: {kernel.pid_max: ">=100", net/ipv4/ip_forward: "1"}
  files: [{path: /etc/sysctl.d/60-x.conf, content: a, distributions: [debian]}]
profiles:
  a:
    packages: [{name: nfs, names: {rhel: nfs-utils}}, iscsi]
    units: [{name: x.service, active: true}, {name: y.service, active: true}]
    modules: [dm_multipath, iscsi_tcp]
    sysctls: {kernel.pid_max: ">=200", net.ipv4.ip_forward: "1"}
    files: [{path: /etc/sysctl.d/60-x.conf, content: a, mode: "0644", distributions: [rhel]}]
    multipath: {defaults: {find_multipaths: "no"}}
  b:
    sysctls: {kernel.pid_max: "300"}
    files: [{path: /etc/sysctl.d/60-x.conf, content: a, owner: root}]
    multipath: {defaults: {find_multipaths: "off"}}
  unused: {modules: [x]}
`)
	yes, no := true, false
	want := probes.Require{
		Packages: []probes.RequiredPackage{{Name: "lsscsi"}, {Name: "nfs", Names: map[string]string{"debian": "nfs-common", "rhel": "nfs-utils"}}, {Name: "iscsi"}},
		Units:    []probes.RequiredUnit{{Name: "x.service", Enabled: &yes, Active: &yes}, {Name: "y.service", Enabled: &no, Active: &yes}},
		Modules:  []string{"dm-multipath", "iscsi_tcp"},
		Sysctls:  map[string]string{"kernel.pid_max": "300", "net/ipv4/ip_forward": "1"},
		Files:    []probes.RequiredFile{{Path: "/etc/sysctl.d/60-x.conf", Content: "a", Mode: "0644", Owner: "root"}},
	}
	want.Multipath.Defaults = map[string]string{"find_multipaths": "no"}
	for range 2 {
		if d := gocmp.Diff(want, forNode(t, c, nil).Require, cmpopts.EquateEmpty()); d != "" {
			t.Fatalf("(-want +got)\n%s", d)
		}
	}
}

// TestProfilesByNode: each pool has its own, and a node that two overrides
// select with profiles that contradict each other is told so.
func TestProfilesByNode(t *testing.T) {
	c := parseGood(t, `
overrides:
  - nodeSelector: {pool: netapp}
    storageProfiles: [trident-iscsi]
  - nodeSelector: {pool: gluster}
    storageProfiles: [gluster-block]
  - nodeSelector: {tuned: "yes"}
    require: {multipath: {defaults: {find_multipaths: "yes"}}}
`)
	for pool, want := range map[string]string{"netapp": "no", "gluster": "yes", "none": ""} {
		if got := forNode(t, c, map[string]string{"pool": pool}).Require.Multipath.Defaults["find_multipaths"]; got != want {
			t.Errorf("pool %s: find_multipaths %q, want %q", pool, got, want)
		}
	}
	_, err := c.ForNode(map[string]string{"pool": "netapp", "tuned": "yes"})
	const want = "config.yaml:6: overrides[0].storageProfiles[0]: trident-iscsi contradicts require: multipath.defaults.find_multipaths must be no for the one and yes for the other (with the overrides of this node)"
	if err == nil || err.Error() != want {
		t.Errorf("want %s\n not %v", want, err)
	}
}

const profilesFile = "../../docs/profiles.md"

// TestProfilesDocument keeps docs/profiles.md in step with the profiles.
func TestProfilesDocument(t *testing.T) { golden(t, profilesFile, profilesDocument(t)) }

func profilesDocument(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	b.WriteString(`# Storage profiles

A storage profile is what one storage system needs of a node, in the form of the
config's ` + "`require`" + ` section. ` + "`storageProfiles: [gluster-block]`" + ` requires all of it
beside what ` + "`require`" + ` says itself: it is checked always, and repaired where
remedies are allowed to. The files are in [pkg/config/profiles](../pkg/config/profiles),
with a reason beside each setting; this page is generated from them.

Lists are joined, bounds on a sysctl become the stricter one. Two profiles that
contradict each other, or a profile and ` + "`require`" + `, are a mistake in the config that
names both and the key; the agent never picks one. Nodes that serve different
systems take theirs by ` + "`overrides`" + `.

| profile | packages | units | modules | multipath |
|---|---|---|---|---|
`)
	var profiles []Profile
	for _, name := range StorageProfiles() {
		p, err := BuiltinProfile(name)
		if err != nil {
			t.Fatal(err)
		}
		profiles = append(profiles, p)
		var packages, units, multipath []string
		for _, v := range p.Packages {
			packages = append(packages, v.Name)
		}
		for _, v := range p.Units {
			units = append(units, v.Name)
		}
		multipath = append(multipath, settings(p.Multipath.Defaults)...)
		for _, d := range p.Multipath.Devices {
			multipath = append(multipath, d.Vendor+" "+d.Product)
		}
		fmt.Fprintf(&b, "| [%s](#%s) | %s | %s | %s | %s |\n", name, name, list(packages), list(units), list(p.Modules), list(multipath))
	}
	for i, name := range StorageProfiles() {
		p := profiles[i]
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n", name, p.Description)
		for _, d := range p.Multipath.Devices {
			fmt.Fprintf(&b, "- in force for %s %s: `%s`\n", d.Vendor, d.Product, strings.Join(settings(d.Settings), "`, `"))
		}
		for _, f := range p.Files {
			fmt.Fprintf(&b, "- file `%s`", f.Path)
			if f.OnlyIfMissing {
				b.WriteString(", only if missing")
			}
			if len(f.Distributions) > 0 {
				fmt.Fprintf(&b, " (%s and what is like them)", strings.Join(f.Distributions, ", "))
			}
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "- sources: %s\n", strings.Join(p.Sources, "; "))
	}
	b.WriteString(`
## Your own

Copy a file from above under ` + "`profiles`" + ` and give it a name of its own:

` + "```yaml" + `
storageProfiles: [our-array]
profiles:
  our-array:
    description: The array in room 7.
    sources: [https://wiki.example.org/array]
    packages: [iscsi, multipath]
    units: [{name: multipathd.service, enabled: true, active: true}]
    multipath:
      devices:
        # As /sys/block/sdX/device/vendor and model say, not patterns.
        - {vendor: EXAMPLE, product: Array, settings: {no_path_retry: "12"}}
    files:
      - path: /etc/multipath/conf.d/60-our-array.conf
        content: |
          devices {
            device {
              vendor "EXAMPLE"
              product "Array"
              no_path_retry 12
            }
          }
` + "```" + `

What ` + "`multipath`" + ` wants is compared with the configuration multipathd has in force;
a file beside it is what puts it there. A device section needs vendor and
product: multipathd drops one without.

## Where files may be

` + "`require.files`" + ` and profiles may require files in directories of drop-ins only, where
a file of ours replaces nobody's and whose program reads a name that ends so:

`)
	dropins, seeds := probes.FilePlaces()
	for _, d := range dropins {
		fmt.Fprintf(&b, "- `%s`\n", d)
	}
	fmt.Fprintf(&b, "\nand, with `onlyIfMissing: true`, for programs that do not start without it: `%s`.\n", strings.Join(seeds, "`, `"))
	b.WriteString(`Whoever may edit the config can so never have passwd, sudoers, a static pod or a
file with secrets read or written. A file has 64 KiB at most; links are refused.
`)
	return b.String()
}

func settings(m map[string]string) []string {
	var s []string
	for key, value := range m {
		s = append(s, key+" "+value)
	}
	slices.Sort(s)
	return s
}

func list(words []string) string { return cmp.Or(strings.Join(words, ", "), "-") }
