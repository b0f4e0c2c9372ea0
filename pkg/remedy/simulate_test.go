package remedy

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	aptUpgrade = "Reading package lists...\nThe following packages will be upgraded:\n  libc6\n1 upgraded, 1 newly installed, 1 to remove and 0 not upgraded.\nRemv ntp [1:4.2.8]\nInst libc6 [2.41-1] (2.41-2 Debian:13.7/stable [amd64])\nInst lsscsi:amd64 (0.32-1 Debian:13.7/stable [amd64])\nConf lsscsi (0.32-1 Debian:13.7/stable [amd64])\n"
	aptRegexp  = "Note, selecting 'libfoo1' for regex 'libfoo.'\n0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.\nInst libfoo1 (1 x [amd64])\n"
	dnfTable   = "Last metadata expiration check: 0:00:01 ago.\nDependencies resolved.\n================\n Package  Architecture  Version  Repository  Size\n================\nInstalling:\n lsscsi   x86_64  0.32-1  baseos  66 k\n a-package-with-a-name-that-is-far-too-long\n          noarch  1.0-1   lab     6 k\n     replacing  old.noarch 1.0-1\nUpgrading:\n glibc    x86_64  2.34-2  baseos  2 M\nInstalling dependencies:\n dep      noarch  1.0-1   lab     6 k\nRemoving dependent packages:\n gone     noarch  1.0-1   @lab    6 k\n\nTransaction Summary\n================\nInstall  3 Packages\nUpgrade  1 Package\nRemove   1 Package\n\nTotal size: 2 M\nOperation aborted.\n"
	tdnfTable  = "\nInstalling:\nlsscsi        x86_64      0.32-1.azl3      azurelinux-base    10.00k\n\nTotal installed size:  10.00k\nError(1032) : Operation aborted.\n"
	zypperXML  = `<?xml version='1.0'?><stream><message type="info">Loading</message><install-summary download-size="1" packages-to-change="3"><to-install><solvable type="package" name="lsscsi" edition="1" arch="x86_64"/></to-install><to-upgrade><solvable type="package" name="glibc" edition="2" edition-old="1"/></to-upgrade><to-remove><solvable type="package" name="old"/></to-remove></install-summary></stream>`
)

func TestSimulations(t *testing.T) {
	for name, test := range map[string]struct {
		m    Manager
		out  string
		want Transaction
	}{
		"apt":        {Apt, aptUpgrade, Transaction{Install: []string{"lsscsi"}, Others: []string{"removal of ntp", "upgrade of libc6"}}},
		"apt regexp": {Apt, aptRegexp, Transaction{Install: []string{"libfoo1"}, Others: []string{"something else than what was named (Note, selecting 'libfoo1' for regex 'libfoo.')"}}},
		"dnf": {Dnf, dnfTable, Transaction{Install: []string{"lsscsi", "a-package-with-a-name-that-is-far-too-long", "dep"},
			Others: []string{"removal of old.noarch 1.0-1", "upgrading of glibc", "removing of gone", "upgrade of 1 Package", "remove of 1 Package"}}},
		"tdnf":   {Tdnf, tdnfTable, Transaction{Install: []string{"lsscsi"}}},
		"zypper": {Zypper, zypperXML, Transaction{Install: []string{"lsscsi"}, Others: []string{"upgrade of glibc", "remove of old"}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := test.m.parseSimulation([]byte(test.out))
			if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
				t.Errorf("%v\n%s", err, diff)
			}
			refused := got.Refusal([]string{"lsscsi"}) != ""
			if refused != (name != "tdnf") {
				t.Errorf("refused %v: %s", refused, got.Refusal([]string{"lsscsi"}))
			}
		})
	}
	for _, m := range []Manager{Apt, Dnf, Yum, Microdnf, Tdnf, Zypper, Transactional, ""} {
		for _, out := range []string{"", "Nothing to do.\n", "<stream></stream>", "\x00\xff"} {
			if _, err := m.parseSimulation([]byte(out)); !errors.Is(err, errNotUnderstood) {
				t.Errorf("%s takes %q for an answer: %v", m, out, err)
			}
		}
	}
	if why := (Transaction{Install: []string{"other"}}).Refusal([]string{"asked"}); !strings.Contains(why, "would not install asked itself") {
		t.Error(why)
	}
}

// FuzzSimulation: no answer makes a parser panic, and what is refused stays
// refused whatever stands before it.
func FuzzSimulation(f *testing.F) {
	for _, out := range []string{aptUpgrade, aptRegexp, dnfTable, tdnfTable, zypperXML, "Inst\nRemv\n", "Installing:\n"} {
		f.Add([]byte(out))
	}
	f.Fuzz(func(t *testing.T, out []byte) {
		for _, m := range []Manager{Apt, Dnf, Zypper} {
			tr, err := m.parseSimulation(out)
			if err != nil {
				continue
			}
			if slices.Contains(tr.Others, "") {
				t.Errorf("%s: an action without words in %q", m, tr.Others)
			}
			if m == Apt {
				after, _ := m.parseSimulation(append(slices.Clone(out), "\nRemv libc6 [1]\n"...))
				if after.Refusal(nil) == "" {
					t.Errorf("a removal after %q is let through", out)
				}
			}
		}
	})
}

func TestMultipathSyntax(t *testing.T) {
	for text, want := range map[string]string{
		"defaults {\n\tfind_multipaths no\n}\n":                                                               "",
		"# x\ndevices {\n device {\n  vendor \"LIO-ORG\"\n  path_selector \"round-robin 0\" # y\n }\n}\n":     "",
		"blacklist {\n devnode \"^sd[a-z0-9]+\"\n}\nblacklist_exceptions {\n property \"(ID_WWN|x{3})\"\n}\n": "",
		"defaults {\n a \"b\n}\n": "line 2: a quote is not closed",
		"defaults {\n":            "the section defaults is not closed",
		"}\n":                     "line 1: a '}' closes nothing",
		"default {\n}\n":          `line 1: there is no section "default"`,
		"a b\n":                   `line 1: "a" stands outside of a section`,
		"defaults {\n a\n}\n":     `line 2: "a" has no value`,
		"defaults {\n a b c\n}\n": `line 2: more than one value for "a": put it in quotes`,
		"":                        "",
	} {
		got := ""
		if err := checkMultipathSyntax([]byte(text)); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	err := "274.755706 | /etc/multipath/conf.d/60-bad.conf line 2, invalid keyword in the defaults section: no_such_keyword\nother\n"
	if got := multipathComplaints([]byte(err), "/etc/multipath/conf.d/60-bad.conf"); len(got) != 1 {
		t.Error(got)
	}
}

func FuzzMultipathSyntax(f *testing.F) {
	f.Add([]byte("devices {\n device {\n  vendor \"LIO-ORG\"\n }\n}\n"))
	f.Add([]byte("a{\"}\"#"))
	f.Fuzz(func(t *testing.T, conf []byte) {
		if checkMultipathSyntax(conf) == nil && checkMultipathSyntax(append(slices.Clone(conf), "\n}\n"...)) == nil {
			t.Errorf("%q is right with one more brace", conf)
		}
	})
}

func FuzzMachineConfig(f *testing.F) {
	f.Add([]byte(`{"kind":"MachineConfig","spec":{"config":{"ignition":{"version":"3.4.0"},"storage":{"files":[{"path":"/a"}]}}}}`))
	f.Add([]byte(`{"kind":"MachineConfig","spec":{"config":{"ignition":{"version":"3.4.0"},"storage":{"files":[{"path":"a"},{"path":"../b"}]}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		files, err := parseMachineConfig(data)
		for name := range files {
			if err != nil || !strings.HasPrefix(name, "/") {
				t.Errorf("%q, %v", name, err)
			}
		}
	})
}

func FuzzDiff(f *testing.F) {
	f.Add("a\nb\n", "a\nc\n")
	f.Fuzz(func(t *testing.T, a, b string) {
		var before, after strings.Builder
		for _, op := range compareLines(splitLines(a), splitLines(b)) {
			if op.kind != '+' {
				before.WriteString(op.text)
			}
			if op.kind != '-' {
				after.WriteString(op.text)
			}
		}
		if before.String() != a || after.String() != b {
			t.Errorf("%q, %q: %q, %q", a, b, before.String(), after.String())
		}
		unifiedDiff("/f", a, b, true)
	})
}
