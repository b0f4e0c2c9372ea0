package distros

import (
	"context"
	"fmt"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// node is a scripted host whose rpm and locks answer whatever is asked.
type node struct {
	*hosttest.Host
	installed []string
}

// Run implements [host.View] for rpm -q.
func (n node) Run(ctx context.Context, c host.Command) (host.Output, error) {
	line, names, ok := strings.Cut(c.String(), " -- ")
	if !ok || !strings.HasPrefix(line, "/usr/bin/rpm -q ") {
		return n.Host.Run(ctx, c)
	}
	var out host.Output
	var text strings.Builder
	for _, name := range strings.Fields(names) {
		found := false
		for _, p := range n.installed {
			found = found || p == name
		}
		if found && !strings.Contains(line, "INSTALLTIME") {
			fmt.Fprintf(&text, "%s\t1.0-1\tx86_64\n", name)
		} else if !found {
			out.Code++
			fmt.Fprintf(&text, "package %s is not installed\n", name)
		}
	}
	out.Stdout = []byte(text.String())
	return out, nil
}

// LockHolder implements [host.View]: nobody installs anything.
func (n node) LockHolder(context.Context, string) (host.Lock, error) { return host.Lock{}, nil }

// builder collects the sections of a host.
type builder struct{ ar txtar.Archive }

func (b *builder) section(name, text string) {
	b.ar.Files = append(b.ar.Files, txtar.File{Name: name, Data: []byte(text)})
}

func (b *builder) file(name, text string) {
	b.section("tree"+name, text)
}

// host makes the distribution's host: the system itself, and of the components
// those it comes with, or all.
func (d distro) host(t *testing.T, installed, required bool) node {
	t.Helper()
	b := &builder{}
	n := node{}
	var units, links, dirs, procs []string

	// The system.
	b.file("/etc/os-release", d.osRelease)
	procs = append(procs, "1 "+d.System.Init+" ppid=0")
	for _, f := range d.System.Files {
		b.file(f, "")
	}
	if d.System.Init == "systemd" {
		dirs = append(dirs, "/run/systemd/system")
	} else {
		b.section("systemd", "none\n")
	}
	if d.System.OpenShift {
		b.file("/etc/machine-config-daemon/currentconfig", `{"kind":"MachineConfig","spec":{"config":{"ignition":{"version":"3.2.0"}}}}`+"\n")
	}
	const device = "254:1"
	root := "29 1 %s / / %s - %s /dev/vda1 %s\n"
	switch {
	case d.System.ReadOnlyRoot != "":
		b.file("/proc/1/mountinfo", fmt.Sprintf(root, device, "ro,relatime", d.System.ReadOnlyRoot, "ro")+
			"30 29 0:22 / /sys rw - sysfs sysfs rw\n31 29 0:30 / /etc rw - tmpfs tmpfs rw\n"+etc(d))
	case d.System.ReadOnlyUsr != "":
		b.file("/proc/1/mountinfo", fmt.Sprintf(root, device, "rw,relatime", "ext4", "rw")+
			"30 29 254:1 / /usr ro - "+d.System.ReadOnlyUsr+" /dev/vda1 ro\n31 29 0:22 / /sys rw - sysfs sysfs rw\n")
	default:
		b.file("/proc/1/mountinfo", fmt.Sprintf(root, device, "rw,relatime", "ext4", "rw")+"31 29 0:22 / /sys rw - sysfs sysfs rw\n")
	}
	if d.System.Verity {
		b.file("/sys/block/vda/vda1/dm/uuid", "CRYPT-VERITY-1-root\n")
	}

	// Packages.
	if d.Packages.Manager != "" {
		b.file(d.Packages.Manager, "x\n")
	}
	for _, c := range d.components() {
		if c.Package != "" && (installed || c.capability == "time") {
			n.installed = append(n.installed, c.Package)
		}
	}
	switch d.Packages.Database {
	case "dpkg":
		b.file("/usr/bin/dpkg", "x\n")
		var status strings.Builder
		for _, p := range append([]string{"base-files"}, n.installed...) {
			fmt.Fprintf(&status, "Package: %s\nStatus: install ok installed\nVersion: 1.0-1\nArchitecture: amd64\n\n", p)
		}
		b.file("/var/lib/dpkg/status", status.String())
	case "rpm":
		b.file("/usr/bin/rpm", "x\n")
		b.file("/var/lib/rpm/rpmdb.sqlite", "x\n")
	}

	// Components: programs, unit files, and the units as they are after a boot on a
	// node that uses what is required of it.
	for _, c := range d.components() {
		if !c.here(installed) && c.capability != "time" && c.Name == "" {
			continue
		}
		if c.Name == "" || installed {
			for _, p := range c.Programs {
				b.file(p, "x\n")
			}
			for name, text := range c.Files {
				b.file(name, text)
			}
		}
		for i, u := range c.Units {
			b.file("/usr/lib/systemd/system/"+u, "[Unit]\n")
			switch {
			case c.capability == "time" && i == 0:
				units = append(units, u+" mainpid=300")
			case c.Name != "" && i == 0, strings.HasSuffix(u, ".socket") && required:
				units = append(units, u+" sub=listening")
			case c.capability == "iscsi" && u == "iscsid.service" && c.Units[0] == u && required:
				units = append(units, u+" mainpid=400")
				procs = append(procs, "400 iscsid")
			default:
				units = append(units, u+" active=inactive sub=dead file=disabled")
			}
		}
		if c.capability == "iscsi" {
			if len(c.Units) == 0 && required {
				procs = append(procs, "400 iscsid")
			}
			if c.InitiatorName != "" {
				b.file(c.InitiatorName, "InitiatorName=iqn.2016-04.com.open-iscsi:5b1c2d3e4f\n")
			}
		}
	}
	d.timeDaemon(t, b, &procs)
	d.addKubelet(b, &procs, &links, &units)
	kernel(b)

	b.section("units", strings.Join(units, "\n")+"\n*\n")
	b.section("procs", strings.Join(procs, "\n")+"\n")
	b.section("links", strings.Join(append(links, "/sys/dev/block/254:1 -> ../../block/vda/vda1"), "\n")+"\n")
	b.section("dirs", strings.Join(append(dirs, "/sys/block", "/sys/dev/block"), "\n")+"\n")
	n.Host = hosttest.New(t, &b.ar)
	return n
}

// etc is Talos' /etc, part of its image.
func etc(d distro) string {
	if d.dir != "talos" {
		return ""
	}
	return "32 29 254:1 /etc /etc ro - squashfs /dev/vda1 ro\n"
}

// timeDaemon scripts the daemon that keeps the time, in order.
func (d distro) timeDaemon(t *testing.T, b *builder, procs *[]string) {
	b.section("adjtimex", "state=0 status=0x0 maxerror=1.263ms esterror=29us\n")
	steers := func(pid string) {
		b.file("/proc/"+pid+"/status", "Name:\tx\nUid:\t0\t0\t0\t0\nCapEff:\t0000000002000000\n")
		b.file("/proc/"+pid+"/cgroup", "0::/system.slice/time.service\n")
	}
	switch d.Time.Process {
	case "chronyd":
		*procs = append(*procs, "300 chronyd")
		steers("300")
		captured, err := txtar.ParseFile("../../pkg/probes/testdata/time/chrony-synchronised.txtar")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range captured.Files {
			if strings.HasPrefix(f.Name, "socket/") {
				b.section(f.Name, string(f.Data))
			}
		}
	case "systemd-timesyn":
		*procs = append(*procs, "300 systemd-timesyn")
		steers("300")
		b.section("bus/org.freedesktop.timesync1 /org/freedesktop/timesync1 org.freedesktop.timesync1.Manager",
			`{"ServerName":"ntp.example","PollIntervalMaxUSec":2048000000,"NTPMessage":[0,4,4,2,-20,1998,4989,[10,9,8,7],1795262386482022,1795262386482528,1795262386482911,1795262386482829,false,1,0]}`+"\n")
	}
}

// addKubelet runs the kubelet as the distribution does, by what facts say.
func (d distro) addKubelet(b *builder, procs, links, units *[]string) {
	*links = append(*links, "/proc/1/ns/mnt -> mnt:[4026531841]", "/proc/1/ns/net -> net:[4026531840]", "/proc/1/ns/user -> user:[4026531837]")
	k := d.Kubelet
	if !k.verified() {
		return
	}
	*procs = append(*procs, "640 "+path.Base(k.Argv[0])+" threads=14")
	b.section("treebin/proc/640/cmdline", strings.Join(k.Argv, `\x00`)+`\x00`+"\n")
	b.file(k.Config, "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ncgroupDriver: systemd\npodPidsLimit: 1024\n"+
		"systemReserved: {pid: \"1000\", memory: 500Mi}\nkubeReserved: {pid: \"2000\", memory: 500Mi}\nevictionHard: {pid.available: 5%, memory.available: 100Mi}\n")
	if k.Unit != "" {
		*units = append(*units, k.Unit+" mainpid=640")
	}
	namespace := "mnt:[4026531841]"
	if k.Container {
		namespace = "mnt:[4026532999]"
		// An agent in the cluster asks the kubelet itself.
		b.section("kubelet/configz", `{"kubeletconfig":{"cgroupDriver":"systemd","podPidsLimit":1024,"systemReserved":{"pid":"1000","memory":"500Mi"},"kubeReserved":{"pid":"2000","memory":"500Mi"},"evictionHard":{"pid.available":"5%","memory.available":"100Mi"}}}`+"\n")
		// What the container is given of the host is mounted from the same device.
		b.file("/proc/640/mountinfo", "600 1 0:90 / / rw - overlay overlay rw\n601 600 0:40 /kubernetes /etc/kubernetes rw,relatime shared:1 - tmpfs tmpfs rw\n"+
			"602 600 254:1 /lib/kubelet /var/lib/kubelet rw - xfs /dev/vda1 rw\n")
	}
	*links = append(*links, "/proc/640/ns/mnt -> "+namespace, "/proc/640/cwd -> /")
	b.file("/proc/640/cgroup", "0::/system.slice/kubelet.service\n")
	for _, arg := range k.Argv {
		if _, dir, ok := strings.Cut(arg, "--config-dir="); ok {
			b.file(filepath.Join(dir, "10-empty.conf"), "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n")
		}
	}
}

// kernel is what every Linux shows, of a node with nothing to complain of.
func kernel(b *builder) {
	for name, text := range map[string]string{
		"/proc/sys/kernel/osrelease":                  "6.12.0\n",
		"/proc/sys/kernel/random/boot_id":             "b1\n",
		"/proc/stat":                                  "btime 1795200000\n",
		"/proc/cmdline":                               "ro\n",
		"/proc/swaps":                                 "Filename\tType\tSize\tUsed\tPriority\n",
		"/proc/meminfo":                               "MemTotal: 8388608 kB\nMemFree: 512000 kB\n",
		"/proc/vmstat":                                "oom_kill 0\n",
		"/proc/loadavg":                               "0.5 0.9 0.9 1/261 5613\n",
		"/proc/sys/kernel/pid_max":                    "4194304\n",
		"/proc/sys/kernel/threads-max":                "63000\n",
		"/proc/sys/vm/max_map_count":                  "262144\n",
		"/usr/lib/sysctl.d/50-map.conf":               "vm.max_map_count = 262144\n",
		"/etc/modules-load.d/mp.conf":                 "dm_multipath\n",
		"/sys/module/dm_multipath/initstate":          "live\n",
		"/lib/modules/6.12.0/modules.dep":             "kernel/drivers/scsi/iscsi_tcp.ko.xz:\nkernel/drivers/md/dm-multipath.ko.xz:\n",
		"/sys/block/vda/size":                         "20971520\n",
		"/sys/block/vda/dev":                          "254:0\n",
		"/sys/block/vda/vda1/dev":                     "254:1\n",
		"/sys/fs/cgroup/cgroup.controllers":           "cpuset cpu io memory hugetlb pids rdma misc\n",
		"/sys/fs/cgroup/kubepods.slice/pids.current":  "10\n",
		"/sys/fs/cgroup/kubepods.slice/pids.max":      "60000\n",
		"/sys/fs/cgroup/kubepods.slice/memory.events": "oom 0\noom_kill 0\noom_group_kill 0\n",
		"/sys/fs/cgroup/system.slice/memory.events":   "oom 0\noom_kill 0\noom_group_kill 0\n",
	} {
		b.file(name, text)
	}
	b.section("kmsg", "")
	b.section("dm", "")
	b.section("statmount", "* dev=254:1\n")
	b.section("nodes", "/dev/vda b 254:0\n/dev/vda1 b 254:1\n")
}
