package probes

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestUnits(t *testing.T) { runCases(t, "units", DefaultUnits) }

func TestUnitsValidate(t *testing.T) {
	for _, p := range []Units{{MaxRestarts: 0, RestartWindow: Duration(time.Minute)}, {MaxRestarts: 1}} {
		if p.Validate() == nil {
			t.Errorf("%+v is accepted", p)
		}
	}
}

// The history of a unit that restarts for weeks stays as long as one window.
func TestCountRestartsIsBounded(t *testing.T) {
	var seen []restartCount
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for n := range 10_000 {
		now = now.Add(time.Minute)
		seen = countRestarts(seen, now, n, 10*time.Minute)
		if len(seen) > 12 {
			t.Fatalf("%d entries", len(seen))
		}
	}
	if grown := 9_999 - seen[0].n; grown != 11 && grown != 10 {
		t.Errorf("%d restarts in ten minutes at one a minute", grown)
	}
	if seen = countRestarts(seen, now.Add(-time.Hour), 10_000, 10*time.Minute); len(seen) != 1 {
		t.Errorf("a clock that was set back keeps %d entries", len(seen))
	}
}

func TestRequireFilePaths(t *testing.T) {
	for path, want := range map[string]string{
		"/etc/multipath/conf.d/50-lio.conf":                    "",
		"/etc/systemd/system/chrony.service.d/10-ours.conf":    "",
		"/etc/udev/rules.d/99-ours.rules":                      "",
		"/etc/multipath.conf":                                  "is the administrator's",
		"/etc/multipath/conf.d/50-lio":                         "nothing reads",
		"/etc/multipath/conf.d/.conf":                          "nothing reads",
		"/etc/multipath/conf.d/x/50-lio.conf":                  "no file may be required there",
		"/etc/systemd/system/evil.service":                     "no file may be required there",
		"/etc/passwd":                                          "no file may be required there",
		"/etc/sudoers.d/x.conf":                                "no file may be required there",
		"/etc/kubernetes/manifests/x.yaml":                     "no file may be required there",
		"/etc/iscsi/iscsid.conf":                               "no file may be required there",
		"/root/.ssh/authorized_keys":                           "no file may be required there",
		"/etc/sysctl.d/../passwd":                              "want a clean absolute path",
		"/etc/sysctl.d/60-x.conf/":                             "want a clean absolute path",
		"etc/sysctl.d/60-x.conf":                               "want a clean absolute path",
		"/etc/sysctl.d/" + strings.Repeat("x", 1024) + ".conf": "want a clean absolute path",
	} {
		got := validFilePath(RequiredFile{Path: path})
		if got == "" != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if got := validFilePath(RequiredFile{Path: "/etc/multipath.conf", OnlyIfMissing: true}); got != "" {
		t.Errorf("/etc/multipath.conf with onlyIfMissing: %q", got)
	}
	big := Require{Files: []RequiredFile{{Path: "/etc/sysctl.d/x.conf", Content: strings.Repeat("#", maxFileContent+1)}}}
	if err := big.Validate(); err == nil || !strings.Contains(err.Error(), "files[0].content: has 65537 bytes, and 65536 are the most") {
		t.Errorf("a huge file: %v", err)
	}
}

func TestRequiredUnitState(t *testing.T) {
	yes, no := true, false
	for _, tc := range []struct {
		u          RequiredUnit
		run, start bool
	}{
		{RequiredUnit{}, true, false},
		{RequiredUnit{Enabled: &yes}, true, true},
		{RequiredUnit{Enabled: &no}, false, false},
		{RequiredUnit{Enabled: &no, Active: &yes}, true, false},
		{RequiredUnit{Enabled: &yes, Active: &no}, false, true},
	} {
		if tc.u.MustRun() != tc.run || tc.u.MustStart() != tc.start {
			t.Errorf("%+v: run %v, start %v", tc.u, tc.u.MustRun(), tc.u.MustStart())
		}
	}
}

func FuzzParseNameID(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/bash\n_chrony:x:104:107:Chrony daemon,,,:/var/lib/chrony:/usr/sbin/nologin\n"), "_chrony")
	f.Add([]byte("a:b:\n::\na:x:-1\n+::::::\n"), "a")
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		if _, ok := parseNameID(data, name); ok && !slices.Contains(strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' || r == ':' }), name) && !strings.ContainsAny(name, ":\n") && name != "" {
			t.Errorf("%q is not in %q", name, data)
		}
	})
}
