package probes

import (
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

func TestUpdates(t *testing.T) { runCases(t, "updates", DefaultUpdates) }

// aptConfs are files as packages ship and people write them.
var aptConfs = map[string]struct {
	text string
	want aptConfig
}{
	"20auto-upgrades": {`APT::Periodic::Update-Package-Lists "1";
APT::Periodic::Unattended-Upgrade "1";
`, aptConfig{"apt::periodic::update-package-lists": "1", "apt::periodic::unattended-upgrade": "1"}},
	"50unattended-upgrades": {`// Automatically upgrade packages from these (origin:archive) pairs
Unattended-Upgrade::Allowed-Origins {
        "${distro_id}:${distro_codename}";
        "${distro_id}:${distro_codename}-security";
//      "${distro_id}:${distro_codename}-updates";
};
//Unattended-Upgrade::Mail "";
Unattended-Upgrade::Automatic-Reboot "true";
Unattended-Upgrade::Automatic-Reboot-Time "02:00";
`, aptConfig{"unattended-upgrade::automatic-reboot": "true", "unattended-upgrade::automatic-reboot-time": "02:00"}},
	"nested": {`APT {
  Periodic { // days
    Enable "1"; Unattended-Upgrade
      "7";
  };
  Periodic::AutocleanInterval "0";
};
`, aptConfig{"apt::periodic::enable": "1", "apt::periodic::unattended-upgrade": "7", "apt::periodic::autocleaninterval": "0"}},
	"last wins, whatever the case": {`apt::periodic::unattended-upgrade "1";
APT::PERIODIC::Unattended-Upgrade "0";
`, aptConfig{"apt::periodic::unattended-upgrade": "0"}},
	"cleared": {`APT::Periodic { Enable "1"; Unattended-Upgrade "1"; };
APT::PeriodicX "kept";
#clear APT::Periodic;
`, aptConfig{"apt::periodicx": "kept"}},
	"comments": {`# APT::Periodic::Enable "0";
#clearance APT::Periodic::Enable
/* APT::Periodic::Enable "0";
 */ APT::Periodic::Enable "1"; // "0";
Acquire::http::Proxy "http://proxy:3128/"; # not in the value
`, aptConfig{"apt::periodic::enable": "1", "acquire::http::proxy": "http://proxy:3128/"}},
	"lists": {`DPkg::Post-Invoke { "a; b"; "c"; };
DPkg::Post-Invoke:: "d";
A "b";
`, aptConfig{"a": "b"}},
}

func TestParseAptConf(t *testing.T) {
	for name, tc := range aptConfs {
		got := aptConfig{}
		parseAptConf([]byte(tc.text), got)
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%s (-want +got)\n%s", name, d)
		}
	}
}

// TestAptConfig holds the reader to apt's own, where apt is installed.
func TestAptConfig(t *testing.T) {
	program, err := exec.LookPath("apt-config")
	if err != nil {
		t.Skip("no apt here")
	}
	for name, tc := range aptConfs {
		// apt calls "#clearance" an error; the rest of the files it reads.
		h := hosttest.Parse(t, "-- tree/etc/apt/apt.conf --\n"+strings.ReplaceAll(tc.text, "#clearance", "# clearance"))
		for _, key := range slices.Sorted(maps.Keys(tc.want)) {
			cmd := exec.Command(program, "-c", h.Path("/etc/apt/apt.conf"), "shell", "V", key)
			cmd.Env = []string{"PATH=/usr/bin:/bin", "APT_CONFIG=/dev/null", "LC_ALL=C"}
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if want := "V='" + tc.want[key] + "'\n"; string(out) != want {
				t.Errorf("%s: %s: apt says %q, want %q", name, key, out, want)
			}
		}
	}
}

func TestAptInterval(t *testing.T) {
	for text, want := range map[string]struct {
		every time.Duration
		on    bool
	}{
		"1": {24 * time.Hour, true}, "7": {7 * 24 * time.Hour, true}, "2d": {48 * time.Hour, true}, "12h": {12 * time.Hour, true},
		"90m": {90 * time.Minute, true}, "30s": {30 * time.Second, true}, "always": {0, true},
		"0": {}, "": {}, "-1": {}, "true": {}, "h": {},
	} {
		every, on := aptConfig{"x": text}.interval("x")
		if every != want.every || on != want.on {
			t.Errorf("%q: %s %v, want %+v", text, every, on, want)
		}
	}
}

func TestParseSettings(t *testing.T) {
	for _, tc := range []struct {
		text string
		want map[string]string
	}{
		{"[commands]\n# upgrade_type = x\nupgrade_type = security\napply_updates=yes\n[emitters]\nemit_via = stdio\n",
			map[string]string{"commands.upgrade_type": "security", "commands.apply_updates": "yes", "emitters.emit_via": "stdio"}},
		{"[updates]\nstrategy = \"fleet_lock\" # with airlock\nenabled = true\n[updates.fleet_lock]\nbase_url = \"https://x/\"\n",
			map[string]string{"updates.strategy": "fleet_lock", "updates.enabled": "true", "updates.fleet_lock.base_url": "https://x/"}},
		{"GROUP=stable\nREBOOT_STRATEGY=\"off\"\n", map[string]string{"group": "stable", "reboot_strategy": "off"}},
		{"reboot = never # as it should be\n[broken\n=x\n", map[string]string{"reboot": "never", "": "x"}},
	} {
		if d := cmp.Diff(tc.want, parseSettings([]byte(tc.text))); d != "" {
			t.Errorf("%q (-want +got)\n%s", tc.text, d)
		}
	}
}

func TestKernelFlavour(t *testing.T) {
	for release, want := range map[string]string{
		"6.12.48+deb13-amd64":              "amd64",
		"6.12.48+deb13-cloud-amd64":        "cloud-amd64",
		"6.1.0-28-rt-amd64":                "rt-amd64",
		"6.8.0-45-generic":                 "generic",
		"5.15.0-1071-azure":                "azure",
		"6.8.0-1014-aws":                   "aws",
		"5.14.0-427.13.1.el9_4.x86_64":     "el.x86_64",
		"5.14.0-503.11.1.el9_5.x86_64":     "el.x86_64",
		"5.14.0-427.el9.x86_64+rt":         "el.x86_64+rt",
		"5.15.0-209.161.7.2.el9uek.x86_64": "eluek.x86_64",
		"6.10.3-200.fc40.x86_64":           "fc.x86_64",
		"6.4.0-150600.21-default":          "default",
		"6.1.102-108.177.amzn2023.x86_64":  "amzn.x86_64",
		"6.6.47.1-1.azl3":                  "azl",
		"6.10.0-rc3-custom":                "custom",
		"6.12.1":                           "",
		"":                                 "",
		"-":                                "",
	} {
		if got := kernelFlavour(release); got != want {
			t.Errorf("%s: %q, want %q", release, got, want)
		}
	}
}

// The order is that of rpmvercmp and dpkg --compare-versions where they agree.
func TestCompareKernels(t *testing.T) {
	for _, order := range [][]string{
		{"6.1.0-9-amd64", "6.1.0-28-amd64", "6.1.0-100-amd64", "6.12.48+deb13-amd64", "6.12.57+deb13-amd64"},
		{"5.15.0-1071-azure", "6.8.0-1014-azure"},
		{"5.14.0-427.el9.x86_64", "5.14.0-427.13.1.el9_4.x86_64", "5.14.0-503.11.1.el9_5.x86_64", "6.12.0-55.9.1.el10_0.x86_64"},
		{"6.10.0-rc3-custom", "6.10.0-custom"},
		{"6.12~rc6-amd64", "6.12-amd64", "6.12.1-amd64"},
		{"6.4.0-150600.21-default", "6.4.0-150600.23.25-default"},
	} {
		for i := range order {
			for j := range order {
				got, want := compareKernels(order[i], order[j]), 0
				if i < j {
					want = -1
				} else if i > j {
					want = 1
				}
				if got != want {
					t.Errorf("%s and %s: %d, want %d", order[i], order[j], got, want)
				}
			}
		}
	}
	if compareKernels("6.01", "6.1") != 0 {
		t.Error("a leading zero counts")
	}
}

func FuzzParseAptConf(f *testing.F) {
	for _, tc := range aptConfs {
		f.Add([]byte(tc.text))
	}
	f.Add([]byte("A { B { C \"x"))
	f.Add([]byte("};};}; \"x\" ;;; #clear"))
	f.Fuzz(func(t *testing.T, data []byte) {
		config := aptConfig{}
		parseAptConf(data, config)
		for key := range config {
			if key != strings.ToLower(key) {
				t.Errorf("%q is not in lower case", key)
			}
			config.interval(key)
		}
	})
}

func FuzzParseSettings(f *testing.F) {
	f.Add([]byte("[updates]\nstrategy = \"fleet_lock\" # x\n"))
	f.Add([]byte("a='b\n[\n[]\n=\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for key, value := range parseSettings(data) {
			if strings.ContainsAny(key+value, "\n") {
				t.Errorf("%q = %q", key, value)
			}
		}
	})
}

func FuzzCompareKernels(f *testing.F) {
	f.Add("6.12.48+deb13-amd64", "5.14.0-427.el9.x86_64")
	f.Add("~", "6.10.0-rc3")
	f.Fuzz(func(t *testing.T, a, b string) {
		if compareKernels(a, b) != -compareKernels(b, a) || compareKernels(a, a) != 0 {
			t.Errorf("%q and %q", a, b)
		}
		kernelFlavour(a)
	})
}

func FuzzParseInstallTimes(f *testing.F) {
	f.Add([]byte("glibc\t1763000000\npackage dbus is not installed\n"))
	f.Add([]byte("x\t99999999999999999999\n\t1\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, p := range parseInstallTimes(data) {
			if p.at.Unix() <= 0 {
				t.Errorf("%+v", p)
			}
		}
		parseRebootPackages(data)
	})
}
