package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

func TestPackages(t *testing.T) { runCases(t, "packages", DefaultPackages) }

func TestPackagesValidate(t *testing.T) {
	p := DefaultPackages()
	if err := p.Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	p.LockHeldFor = 0
	if got, want := fmt.Sprint(p.Validate()), "lockHeldFor: want more than 0, not 0s"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Every capability must be told by something on every kind of host.
func TestCapabilitiesAreComplete(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range capabilities {
		if seen[c.name] {
			t.Errorf("%s stands twice", c.name)
		}
		seen[c.name] = true
		for _, f := range []family{debianFamily, redHatFamily, azureLinuxFamily, suseFamily, ""} {
			if len(c.in(f)) == 0 {
				t.Errorf("%s has no package in family %q", c.name, f)
			}
			for _, name := range c.in(f) {
				if !validPackageName(name) {
					t.Errorf("%s: %q is no package name", c.name, name)
				}
			}
		}
		if len(c.binaries) == 0 || c.without == "" {
			t.Errorf("%s: no program that proves it, or no consequence", c.name)
		}
	}
	for _, name := range []string{"iscsi", "multipath", "nfs", "time", "rpcbind", "glusterfs", "cifs", "lvm", "nvme", "luks"} {
		if !slices.Contains(Capabilities(), name) {
			t.Errorf("%s is promised and missing", name)
		}
	}
}

func TestFamilyOf(t *testing.T) {
	for _, tt := range []struct {
		os      host.OS
		manager string
		want    family
	}{
		{host.OS{ID: "debian"}, "dpkg", debianFamily},
		{host.OS{ID: "linuxmint", IDLike: []string{"ubuntu", "debian"}}, "dpkg", debianFamily},
		{host.OS{ID: "amzn", IDLike: []string{"fedora"}}, "rpm", redHatFamily},
		{host.OS{ID: "ol", IDLike: []string{"fedora"}}, "rpm", redHatFamily},
		{host.OS{ID: "azurelinux"}, "rpm", azureLinuxFamily},
		{host.OS{ID: "opensuse-leap", IDLike: []string{"suse", "opensuse"}}, "rpm", suseFamily},
		{host.OS{ID: "opensuse-microos"}, "rpm", suseFamily},
		{host.OS{ID: "openEuler"}, "rpm", redHatFamily},
		{host.OS{ID: "homemade"}, "dpkg", debianFamily},
		{host.OS{ID: "talos"}, "", ""},
	} {
		if got := familyOf(tt.os, tt.manager); got != tt.want {
			t.Errorf("%s like %v with %q: got %q, want %q", tt.os.ID, tt.os.IDLike, tt.manager, got, tt.want)
		}
	}
}

// The table is world-readable where the lock files are not. The lines were
// captured in the middle of apt-get install (kernel 6.12).
func TestParseProcLocks(t *testing.T) {
	table := []byte(`1: POSIX  ADVISORY  WRITE 8751 fe:00:17335 0 EOF
2: POSIX  ADVISORY  WRITE 6847 00:19:2379 0 EOF
4: POSIX  ADVISORY  WRITE 442 00:19:927 0 0
5: POSIX  ADVISORY  WRITE 8877 fe:00:18248 0 EOF
6: POSIX  ADVISORY  WRITE 8751 fe:00:18249 0 EOF
6: -> POSIX  ADVISORY  WRITE 9000 fe:00:18250 0 EOF
7: FLOCK  ADVISORY  WRITE 8294 fe:00:18251 0 EOF
8: OFDLCK ADVISORY  WRITE -1 fe:00:18252 0 EOF
9: POSIX  ADVISORY  READ 8887 fe:00:18253 128 128
`)
	vda := host.DevNum{Major: 254}
	for _, tt := range []struct {
		name  string
		dev   host.DevNum
		inode uint64
		want  host.Lock
	}{
		{"apt-get's", vda, 18249, host.Lock{Held: true, PID: 8751}},
		{"dpkg's", vda, 18248, host.Lock{Held: true, PID: 8877}},
		{"another device", host.DevNum{Major: 8}, 18249, host.Lock{}},
		{"one that waits", vda, 18250, host.Lock{}},
		{"flock(2), which dpkg does not heed", vda, 18251, host.Lock{}},
		{"an open file description's", vda, 18252, host.Lock{Held: true, PID: -1}},
		{"a reader's", vda, 18253, host.Lock{}},
		{"btrfs, which shows two anonymous devices", host.DevNum{Minor: 42}, 2379, host.Lock{Held: true, PID: 6847}},
		{"free", vda, 1, host.Lock{}},
	} {
		if got := parseProcLocks(table, tt.dev, tt.inode); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// Without root: the lock files can not be opened, the table tells who holds
// them.
func TestPackagesLockTable(t *testing.T) {
	h := hosttest.Parse(t, `
-- os --
id=debian boot=2026-11-21T11:00:00Z
-- locks --
/var/lib/dpkg/lock-frontend denied
/var/lib/dpkg/lock absent
-- procs --
4334 apt-get start=100
-- tree/var/lib/dpkg/lock-frontend --
-- tree/var/lib/dpkg/status --
Package: x
Status: install ok installed
`)
	st, err := h.Stat(t.Context(), dpkgFrontendLock)
	if err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("1: POSIX  ADVISORY  WRITE 4334 %02x:%02x:%d 0 EOF\n", st.Dev.Major, st.Dev.Minor, st.Inode)
	if err := os.WriteFile(h.Path("/proc/locks"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := DefaultPackages().Check(t.Context(), Input{Host: h, Now: h.Times()[0], Memory: NewMemory()})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Findings) != 1 || r.Findings[0].Reason != packageLockHeld || !strings.HasPrefix(r.Findings[0].Message, "apt-get (PID 4334) has held dpkg's lock for 59m") {
		t.Errorf("findings %v", r.Findings)
	}
}

// countingView counts how often the status file is read.
type countingView struct {
	*hosttest.Host
	reads int
}

func (v *countingView) ReadFile(ctx context.Context, name string) ([]byte, error) {
	if name == dpkgStatus {
		v.reads++
	}
	return v.Host.ReadFile(ctx, name)
}

func TestPackagesReadsAnUnchangedFileOnce(t *testing.T) {
	v := &countingView{Host: hosttest.Parse(t, `
-- os --
id=debian
-- locks --
/var/lib/dpkg/lock-frontend free
/var/lib/dpkg/lock free
-- tree/var/lib/dpkg/status --
Package: open-iscsi
Status: install ok installed
`)}
	m := NewMemory()
	check := func(pkg string) (missing bool) {
		t.Helper()
		m.Begin()
		in := Input{Host: v, Now: v.Times()[0], Memory: m, Require: Require{Packages: []RequiredPackage{{Name: pkg}}}}
		r, err := DefaultPackages().Check(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		return len(r.Findings) > 0
	}
	check("iscsi")
	check("iscsi")
	if v.reads != 1 {
		t.Errorf("an unchanged file was read %d times", v.reads)
	}
	if !check("nfs") || v.reads != 2 {
		t.Errorf("another requirement needs another look: %d reads", v.reads)
	}
	// dpkg writes a new file and renames it over the old one.
	if err := os.WriteFile(v.Path(dpkgStatus+"-new"), []byte("Package: nfs-common\nStatus: install ok installed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(v.Path(dpkgStatus+"-new"), v.Path(dpkgStatus)); err != nil {
		t.Fatal(err)
	}
	if check("nfs") || v.reads != 3 {
		t.Errorf("the new file was not read: %d reads", v.reads)
	}
}

func TestParseDpkgStatusRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"Package: a\nStatus: install ok instal":                   "ends in the middle of a line: the file is truncated",
		"Package: a\nStatus: install ok\n":                        `line 1: package "a" has no valid Status: "install ok"`,
		"Package: a\n\n\nPackage: b\nStatus: install ok weird\n":  `line 4: package "b" has no valid Status: "install ok weird"`,
		"Status: install ok installed\n":                          "line 1: a stanza without Package",
		"Package: a\nno colon here\n":                             "line 2: no field name and colon",
		" continued\n":                                            "line 1: a continuation of nothing",
		"Package: a\nStatus: install ok installed\n\n\x00\x00\n":  "line 4: a NUL byte: the file is damaged",
		"Package: a\n: value\n":                                   "line 2: no field name and colon",
		"Package:\nStatus: install ok installed\n":                "line 1: a stanza without Package",
		"Package: a\nStatus: install ok installed installed\n\n ": "ends in the middle of a line: the file is truncated",
	} {
		_, err := parseAll([]byte(in))
		if fmt.Sprint(err) != want {
			t.Errorf("%q: got %v, want %s", in, err, want)
		}
	}
}

func parseAll(data []byte) ([]dpkgPackage, error) {
	var out []dpkgPackage
	err := parseDpkgStatus(data, false, func(s dpkgStanza) error {
		p, _, err := s.pkg(nil, false)
		out = append(out, p)
		return err
	})
	return out, err
}

func TestReplayDpkgUpdates(t *testing.T) {
	a := func(name, arch, state string) dpkgPackage { return dpkgPackage{name: name, arch: arch, state: state} }
	status := []dpkgPackage{a("libc6", "amd64", "installed"), a("libc6", "i386", "installed"), a("x", "all", "unpacked")}
	got := replayDpkgUpdates(status, []dpkgPackage{a("x", "all", "half-configured"), a("libc6", "i386", "half-installed"), a("x", "all", "installed"), a("new", "all", "unpacked")})
	want := []dpkgPackage{a("libc6", "amd64", "installed"), a("libc6", "i386", "half-installed"), a("x", "all", "installed"), a("new", "all", "unpacked")}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(dpkgPackage{})); d != "" {
		t.Error(d)
	}
	if status[2].state != "unpacked" {
		t.Error("the cached list was changed")
	}
}

// Bytes of rpm 4.18.
func TestParseRPMQuery(t *testing.T) {
	installed, missing, err := parseRPMQuery([]byte("probe-a\t1.0-1\tnoarch\nprobe-a\t2.0-1\tnoarch\npackage foo is not installed\n"), []string{"foo", "probe-a"})
	if err != nil || !slices.Equal(installed, []string{"probe-a"}) || !slices.Equal(missing, []string{"foo"}) {
		t.Errorf("got %v, %v, %v", installed, missing, err)
	}
	if _, _, err := parseRPMQuery([]byte("rpmdb: BDB0113 Thread/process failed\n"), []string{"foo"}); err == nil {
		t.Error("an answer without the name was taken for one")
	}
}

// The first line is worth more than those that follow from it; warnings are not
// complaints.
func TestRPMComplaint(t *testing.T) {
	for in, want := range map[string]string{
		"": "",
		"warning: Converting database from bdb to sqlite backend\n":                            "",
		"error: cannot open Packages database in /var/lib/rpm\n":                               "cannot open Packages database in /var/lib/rpm",
		"warning: x\nerror: rpmdb: BDB0689 page 1 is on free list\nerror: db5 error(-30973)\n": "rpmdb: BDB0689 page 1 is on free list",
	} {
		if got := rpmComplaint([]byte(in)); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

// A tree (--root) can not run rpm: capabilities are proven, plain names are not.
func TestPackagesRPMTree(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"/var/lib/rpm/rpmdb.sqlite": "x", "/usr/sbin/iscsid": "x", "/usr/sbin/iscsiadm": "x",
		"/etc/os-release": "ID=rocky\nID_LIKE=\"rhel centos fedora\"\n", "/usr/bin/dnf": "x",
	} {
		p := dir + name
		if err := os.MkdirAll(p[:strings.LastIndexByte(p, '/')], 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := host.OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	in := Input{Host: tree, Now: time.Now(), Memory: NewMemory(), Require: Require{Packages: []RequiredPackage{{Name: "iscsi"}, {Name: "nfs"}, {Name: "megacli"}}}}
	r, err := DefaultPackages().Check(t.Context(), in)
	if !errors.Is(err, host.ErrNotLive) {
		t.Errorf("error %v, want that rpm can not be asked", err)
	}
	if len(r.Findings) != 1 || r.Findings[0].Subject != "nfs" {
		t.Errorf("findings %v, want nfs alone", r.Findings)
	}
}

func FuzzParseDpkgStatus(f *testing.F) {
	f.Add([]byte("Package: chrony\nStatus: install ok installed\nPriority: optional\nArchitecture: amd64\nVersion: 4.3-2+deb12u3\nReplaces: time-daemon\nProvides: time-daemon, x (= 1.2), y:any\nConffiles:\n /etc/chrony/conf.d/README 3c8199dc2b9ac86e131f83bbaebdd698\nDescription: NTP\n text\n .\n more\n\nPackage: ntpsec\nStatus: deinstall ok config-files\n"))
	f.Add([]byte("Package: slowpre\nStatus: install reinstreq half-installed\nArchitecture: all\nVersion: 1.0\n"))
	f.Add([]byte("package: A\nsTATUS: install ok triggers-awaited\n\n\n"))
	f.Add([]byte("Package: slowpost\nStatus: install ok unpacked\nMaintainer: x <x@x>\nArchitecture: all\nVersion: 1.0\nDescription: test\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := parseAll(data)
		if err != nil {
			return
		}
		if len(all) > bytes.Count(data, []byte("\n")) {
			t.Errorf("%d stanzas in %d lines", len(all), bytes.Count(data, []byte("\n")))
		}
		for _, p := range all {
			if p.name == "" || p.state == "" {
				t.Errorf("a package without name or state: %+v", p)
			}
			if !(dpkgDatabase{packages: all}).has(p.name) {
				t.Errorf("%q was parsed and not found", p.name)
			}
		}
		// The journal replayed over itself changes nothing.
		once := replayDpkgUpdates(nil, all)
		if d := cmp.Diff(once, replayDpkgUpdates(once, once), cmp.AllowUnexported(dpkgPackage{})); d != "" {
			t.Error(d)
		}
	})
}

func (db dpkgDatabase) has(name string) bool {
	_, ok := db.find(name)
	return ok
}

// Whatever lies in updates/, the pass ends with an answer or an error.
func FuzzReadDpkgUpdates(f *testing.F) {
	f.Add("0000", []byte("Package: slowpre\nStatus: install reinstreq half-installed\nArchitecture: all\nVersion: 1.0\n"))
	f.Add("tmp.i", bytes.Repeat([]byte("#padding\n"), 512))
	f.Add("0001", []byte{})
	f.Add("tmp.i", []byte("Package: slowpre\nStatus: install reinstreq half-installed\nArchitecture: all\nVersion: 1.0\n"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		updates, journal, err := readDpkgUpdates(t.Context(), oneFile{name: name, data: data})
		if err == nil && len(updates) == 0 && len(journal) > 0 {
			t.Errorf("entries from no file")
		}
		for _, u := range updates { // dpkg's own are numbered, and others half written
			if strings.Trim(u, "0123456789") != "" {
				t.Errorf("%q was read", u)
			}
		}
	})
}

// oneFile is a host with one file in updates/.
type oneFile struct {
	host.View
	name string
	data []byte
}

func (v oneFile) ReadDir(context.Context, string) ([]string, error) { return []string{v.name}, nil }
func (v oneFile) ReadFileMax(_ context.Context, name string, _ int64) ([]byte, error) {
	if name != dpkgUpdates+"/"+v.name {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
	}
	return v.data, nil
}

func FuzzParseRPMQuery(f *testing.F) {
	f.Add([]byte("probe-a\t1.0-1\tnoarch\npackage foo is not installed\n"))
	f.Add([]byte("package  is not installed\n\t\t\n"))
	f.Fuzz(func(t *testing.T, out []byte) {
		names := []string{"foo", "probe-a"}
		installed, missing, err := parseRPMQuery(out, names)
		if err == nil && len(installed)+len(missing) != len(names) {
			t.Errorf("installed %v, missing %v of %v", installed, missing, names)
		}
	})
}

func FuzzParseProcLocks(f *testing.F) {
	f.Add([]byte("1: POSIX  ADVISORY  WRITE 8751 fe:00:17335 0 EOF\n"))
	f.Add([]byte("1: -> POSIX  ADVISORY  WRITE 8751 fe:00:17335 0 EOF\n1: OFDLCK ADVISORY  WRITE -1 fe:00:17335 0 EOF\n"))
	f.Fuzz(func(t *testing.T, table []byte) {
		if l := parseProcLocks(table, host.DevNum{Major: 254}, 17335); !l.Held && l.PID != 0 {
			t.Errorf("a free lock with a holder: %+v", l)
		} else if l.Held && !bytes.Contains(table, []byte(":17335")) {
			t.Errorf("%+v holds another file's lock", l)
		}
	})
}

// A node with 3,000 packages has a status file of about 4 MB.
func bigStatus() []byte {
	var b bytes.Buffer
	for i := range 3000 {
		fmt.Fprintf(&b, "Package: lib%04d\nStatus: install ok installed\nPriority: optional\nSection: libs\nInstalled-Size: 1246\nMaintainer: Some Team <team+lib%04d@example.org>\nArchitecture: amd64\nMulti-Arch: same\nVersion: 1.2.%d-3+deb13u1\nProvides: lib%04d-abi (= 1.2), virtual-%d\nDepends: libc6 (>= 2.34), libsystemd0, libudev1 (>= 183), liburcu8 (>= 0.13.0)\nConffiles:\n /etc/lib%04d/a.conf 6ec3946b0ec5d4b8383d18803affe52a\nDescription: a library\n%s\n\n",
			i, i, i, i, i%50, i, strings.Repeat(" These tools are in charge of maintaining something and react to events.\n", 9))
	}
	return b.Bytes()
}

func BenchmarkPackages(b *testing.B) {
	status := bigStatus()
	h := hosttest.Parse(b, "-- os --\nid=debian\n-- locks --\n/var/lib/dpkg/lock-frontend free\n/var/lib/dpkg/lock free\n-- tree/var/lib/dpkg/status --\n"+string(status))
	in := Input{Host: h, Now: h.Times()[0], Memory: NewMemory()}
	for _, name := range []string{"iscsi", "multipath", "nfs", "time", "lib0007", "virtual-7"} {
		in.Require.Packages = append(in.Require.Packages, RequiredPackage{Name: name})
	}
	b.Run("changed", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(status)))
		for b.Loop() {
			in.Memory = NewMemory()
			if _, err := DefaultPackages().Check(b.Context(), in); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unchanged", func(b *testing.B) {
		b.ReportAllocs()
		in.Memory = NewMemory()
		for b.Loop() {
			if _, err := DefaultPackages().Check(b.Context(), in); err != nil {
				b.Fatal(err)
			}
		}
	})
}
