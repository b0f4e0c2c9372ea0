package probes

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestKernel(t *testing.T) { runCases(t, "kernel", DefaultKernel) }

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"kernel.pid_max":                      "kernel/pid_max",
		"kernel/pid_max":                      "kernel/pid_max",
		"net.ipv4.conf.enp3s0/200.forwarding": "net/ipv4/conf/enp3s0.200/forwarding",
		"net/ipv4/conf/enp3s0.200/forwarding": "net/ipv4/conf/enp3s0.200/forwarding",
		"net.bridge.bridge-nf-call-iptables":  "net/bridge/bridge-nf-call-iptables",
		"fs.inotify/max.user":                 "fs/inotify.max/user",
		"x":                                   "x",
	} {
		if got := sysctlKey(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestSysctlWant(t *testing.T) {
	for _, tc := range []struct {
		want, got string
		ok        bool
		target    string
	}{
		{"10", "10", true, "10"},
		{" 1  2 ", "1\t2", true, "1 2"},
		{">=10", "10", true, "10"},
		{">= 10", "9", false, "10"},
		{">10", "10", false, "11"},
		{"<10", "9", true, "9"},
		{"<=-1", "-1", true, "-1"},
		{">=9223372036854775808", "18446744073709551615", true, "9223372036854775808"},
		{">=1", "1 2", false, "1"},
		{">=1", "", false, "1"},
		{"bbr", "bbr", true, "bbr"},
	} {
		w := parseSysctlWant(tc.want)
		if w.satisfied(plainSysctl(tc.got)) != tc.ok {
			t.Errorf("%q by %q: not %v", tc.want, tc.got, tc.ok)
		}
		if got := SysctlTarget(tc.want); got != tc.target || !w.satisfied(got) {
			t.Errorf("%q: set to %q, want %q", tc.want, got, tc.target)
		}
	}
}

func TestMeetSysctl(t *testing.T) {
	for _, tc := range []struct {
		a, b, want string
		ok         bool
	}{
		{"1", "1", "1", true},
		{"1", "2", "", false},
		{">=10", ">=20", ">=20", true},
		{"<20", "<10", "<10", true},
		{">=10", "15", "15", true},
		{"5", ">=10", "", false},
		{">=1", "<=9", "", false},
		{">=10", ">= 10", ">=10", true},
	} {
		for range 2 {
			got, ok := MeetSysctl(tc.a, tc.b)
			if ok != tc.ok || ok && parseSysctlWant(got) != parseSysctlWant(tc.want) {
				t.Errorf("%q and %q: %q, %v", tc.a, tc.b, got, ok)
			}
			tc.a, tc.b = tc.b, tc.a
		}
	}
}

func TestSysctlSecretIsRefused(t *testing.T) {
	for _, name := range []string{"net.ipv6.conf.all.stable_secret", "net/ipv6/conf/eth0.1/stable_secret", "kernel", "../x", "kernel.*", "a..b"} {
		if validSysctl(name, "1") == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// The module lists are read again only when they changed or others are asked.
func TestFindModules(t *testing.T) {
	kinds := map[string]moduleKind{}
	wanted := map[string]bool{"dm_multipath": true, "nvme": true, "configfs": true}
	findModules(kinds, []byte("kernel/drivers/md/dm-multipath.ko.xz: kernel/drivers/md/dm-mod.ko.xz\nkernel/drivers/nvme/host/nvme-tcp.ko:\n"), wanted, moduleLoadable)
	findModules(kinds, []byte("kernel/fs/configfs/configfs.ko\nrubbish\n"), wanted, moduleBuiltIn)
	if d := cmp.Diff(map[string]moduleKind{"dm_multipath": moduleLoadable, "configfs": moduleBuiltIn}, kinds); d != "" {
		t.Error(d)
	}
}

// A line that names the key goes before patterns; of patterns the last wins,
// also when an earlier one is repeated.
func TestSysctlConfOrder(t *testing.T) {
	conf := readSysctlConf([]dropin{
		{"1", []byte("net.ipv4.conf.*.rp_filter = 1\nnet.ipv4.conf.eth?.rp_filter = 2\n")},
		{"2", []byte("net.ipv4.conf.*.rp_filter = 0\nnet.ipv4.conf.lo.rp_filter=5\nno equals sign\n=1\n-net.ipv4.conf.wlan0.rp_filter\n")},
	})
	for key, want := range map[string]string{"eth0": "0 2", "lo": "5 2", "wlan0": "", "x/y": ""} {
		s, ok := conf.of("net/ipv4/conf/" + key + "/rp_filter")
		got := ""
		if ok {
			got = fmt.Sprint(s.value, " ", s.source)
		}
		if got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
}

func FuzzParseSysctl(f *testing.F) {
	f.Add([]byte("# c\nkernel.pid_max = 4194304\n-net.ipv4.conf.*.rp_filter=2\n-a.b\n; x\nnet/ipv4/x =\t1 2\n"))
	f.Add([]byte("[= \n==\n-\n--x=\n*.[a"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, s := range parseSysctl(data) {
			if s.key == "" || strings.ContainsAny(s.value, "\n\t") {
				t.Errorf("%+v", s)
			}
		}
		readSysctlConf([]dropin{{"f", data}}).of("net/ipv4/conf/eth0/rp_filter")
	})
}

func FuzzParseModulesLoad(f *testing.F) {
	f.Add([]byte("# c\niscsi_tcp\n dm-multipath \n;x\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, m := range parseModulesLoad(data) {
			if m == "" || m[0] == '#' || strings.Contains(m, "-") {
				t.Errorf("%q", m)
			}
		}
	})
}

func FuzzParseKernelCommandLine(f *testing.F) {
	f.Add([]byte("root=/dev/vda1 modprobe.blacklist=a,b module_blacklist=c modules_load=d sysctl.vm.swappiness=1 sysctl.=\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := parseKernelCommandLine(data)
		for _, list := range []map[string]string{c.forbidden, c.loaded} {
			for name, from := range list {
				_, word, ok := strings.Cut(from, "=")
				if !ok || name != moduleKey(word) || strings.Contains(name, ",") || !bytes.Contains(data, []byte(word)) {
					t.Errorf("%q from %q", name, from)
				}
			}
		}
	})
}

func FuzzSysctlWant(f *testing.F) {
	for _, s := range []string{">=131072", "< -5", "<=7", ">0", "1 2 3", "bbr", ">=", ">9223372036854775807"} {
		f.Add(s, "10")
	}
	f.Fuzz(func(t *testing.T, want, got string) {
		if validSysctl("kernel.x", want) != nil {
			return
		}
		if target := SysctlTarget(want); !parseSysctlWant(want).satisfied(target) {
			t.Errorf("%q is not met by its own target %q", want, target)
		}
		parseSysctlWant(want).satisfied(got)
		if met, ok := MeetSysctl(want, want); !ok || !slices.Equal(strings.Fields(met), strings.Fields(want)) {
			t.Errorf("%q does not meet itself: %q", want, met)
		}
	})
}
