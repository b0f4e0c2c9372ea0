package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// hostSize is how much there is on a generated host.
type hostSize struct {
	processes, mounts int
	// maps of multipath, each of pathsPerMap SCSI disks, each of those in an
	// iSCSI session of its own.
	maps int
	// alone are disks in a session of their own that no map is over.
	alone int
	// pods have two containers each.
	pods     int
	packages int
}

const pathsPerMap = 4

// fullSize is the host the bounds are about.
func fullSize() hostSize {
	return hostSize{processes: 10000, mounts: 5000, maps: 500, pods: 500, packages: 3000}
}

func (s hostSize) times(num, den int) hostSize {
	for _, n := range []*int{&s.processes, &s.mounts, &s.maps, &s.alone, &s.pods, &s.packages} {
		*n = *n * num / den
	}
	return s
}

func (s hostSize) disks() int { return s.maps*pathsPerMap + s.alone }

// largeHost is a host of which all is well. Its files are read as those of a
// real one are, by the same code from a tree on disk; daemons answer over real
// sockets; only what needs a kernel of that size is answered from memory.
type largeHost struct {
	*host.Tree
	dir     string
	size    hostSize
	units   map[string]host.Unit
	maps    []host.DMDevice
	pods    []byte
	configz []byte
	// volumes are the unique names of those of CSI drivers.
	volumes []string
	sockets map[string]string
	asked   asked
	// mapsReply is what multipathd answers to "show maps json".
	mapsReply atomic.Pointer[[]byte]
}

// asked counts what is answered without opening a file.
type asked struct {
	units, dials, ioctls, statfs, kubelet, commands atomic.Int64
}

var _ host.View = (*largeHost)(nil)

const (
	gib       = 1 << 30
	hostMem   = 512 * gib
	pidMax    = 4194304
	reserved  = 100000
	rootUUID  = "9f2c1f6e-7c0a-4b57-8f2e-0d6b1c7d2e11"
	initiator = "iqn.2004-10.com.ubuntu:01:5f1d2c3b4a59"
)

// Process IDs of the daemons.
const (
	pidContainerd = 800 + iota
	pidKubelet
	pidChronyd
	pidMultipathd
	pidIscsid
	pidSSH
	pidKubeProxy
	firstPodPID = 20000
)

// newLargeHost writes the tree and starts the daemons.
func newLargeHost(t testing.TB, size hostSize) *largeHost {
	t.Helper()
	dir := t.TempDir()
	// Memory instead of a disk, as /proc and /sys are memory.
	if d, err := os.MkdirTemp("/dev/shm", "largehost"); err == nil {
		t.Cleanup(func() { os.RemoveAll(d) })
		dir = d
	}
	b := &builder{t: t, dir: dir, made: map[string]bool{}}
	if size.disks() > 10000 {
		b.said = map[string]string{}
	}
	h := &largeHost{dir: dir, size: size, units: map[string]host.Unit{}, sockets: map[string]string{}}
	b.system(h)
	b.storage(h)
	b.podsAndProcesses(h)
	b.mountTable(h)
	b.dpkg(size.packages)
	h.serveMultipathd(t, filepath.Join(dir, "run/multipathd.socket"))
	h.serveChronyd(t)
	h.open(t)
	t.Cleanup(func() { h.Tree.Close() })
	return h
}

// open opens the tree as an agent that starts does: nothing is remembered.
func (h *largeHost) open(t testing.TB) {
	t.Helper()
	if h.Tree != nil {
		h.Tree.Close()
	}
	tree, err := host.OpenTree(h.dir)
	if err != nil {
		t.Fatal(err)
	}
	h.Tree = tree
}

// builder writes files below dir.
type builder struct {
	t    testing.TB
	dir  string
	made map[string]bool
	said map[string]string
}

func (b *builder) mkdir(name string) string {
	full := b.dir + name
	if !b.made[full] {
		if err := os.MkdirAll(full, 0o755); err != nil {
			b.t.Fatal(err)
		}
		b.made[full] = true
	}
	return full
}

func (b *builder) file(name, text string) {
	b.mkdir(path.Dir(name))
	if err := os.WriteFile(b.dir+name, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// attributes writes files of one line each. On the largest hosts those that say
// the same are one file under many names: a hundred thousand disks would take
// gigabytes otherwise.
func (b *builder) attributes(dir string, pairs ...string) {
	b.mkdir(dir)
	for i := 0; i < len(pairs); i += 2 {
		name, text := dir+"/"+pairs[i], pairs[i+1]
		if b.said == nil || len(text) > 20 {
			b.file(name, text+"\n")
			continue
		}
		first, ok := b.said[text]
		if !ok {
			b.file(name, text+"\n")
			b.said[text] = name
		} else if err := os.Link(b.dir+first, b.dir+name); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *builder) link(name, target string) {
	b.mkdir(path.Dir(name))
	if err := os.Symlink(target, b.dir+name); err != nil {
		b.t.Fatal(err)
	}
}

// system writes what every host has once.
func (b *builder) system(h *largeHost) {
	b.file("/etc/os-release", "ID=debian\nVERSION_ID=\"13\"\nNAME=\"Debian GNU/Linux\"\n")
	b.file("/proc/cmdline", "BOOT_IMAGE=/vmlinuz root=UUID=0 ro quiet\n")
	b.file("/proc/sys/kernel/osrelease", "6.12.48+deb13-amd64\n")
	b.file("/proc/sys/kernel/random/boot_id", "4f1c2a3b-5d6e-4f70-8192-a3b4c5d6e7f8\n")
	b.file("/proc/sys/kernel/pid_max", fmt.Sprintln(pidMax))
	b.file("/proc/sys/kernel/threads-max", fmt.Sprintln(2*pidMax))
	b.file("/proc/sys/fs/inotify/max_user_watches", "1048576\n")
	b.file("/proc/sys/fs/inotify/max_user_instances", "8192\n")
	b.file("/proc/stat", fmt.Sprintf("cpu  1 2 3\nbtime %d\n", bootTime.Unix()))
	b.file("/proc/meminfo", fmt.Sprintf("MemTotal: %d kB\n", hostMem>>10))
	b.file("/proc/vmstat", strings.Repeat("nr_something 12345\n", 150)+"oom_kill 0\n")
	b.partitions(h.size.disks())
	b.file("/proc/swaps", "Filename Type Size Used Priority\n")
	b.file("/usr/bin/dpkg", "")
	b.mkdir("/sys/module/iscsi_tcp")
	b.mkdir("/sys/module/dm_multipath")
	b.file("/etc/fstab", "UUID="+rootUUID+" / ext4 errors=remount-ro 0 1\n")
	b.file("/etc/iscsi/initiatorname.iscsi", "InitiatorName="+initiator+"\n")
	b.file("/dev/vda1", "")
	b.link("/dev/disk/by-uuid/"+rootUUID, "../../vda1")

	const vda = "/sys/devices/pci0000:00/0000:00:05.0/virtio2/block/vda"
	b.attributes(vda, "dev", "254:0", "size", "419430400", "removable", "0", "serial", "root-disk-0")
	b.mkdir(vda + "/holders")
	b.attributes(vda+"/vda1", "dev", "254:1", "size", "419428352", "partition", "1")
	b.mkdir(vda + "/vda1/holders")
	b.block(vda, "vda", "254:0")
	b.link("/sys/class/block/vda1", "../.."+strings.TrimPrefix(vda, "/sys")+"/vda1")
	b.link("/sys/dev/block/254:1", "../.."+strings.TrimPrefix(vda, "/sys")+"/vda1")
	b.attributes("/sys/fs/ext4/vda1", "errors_count", "0")
	b.file("/run/udev/data/b254:1", "S:disk/by-uuid/"+rootUUID+"\nE:ID_FS_TYPE=ext4\n")
	b.attributes("/sys/class/ptp/ptp0", "clock_name", "KVM virtual PTP")
	b.updates(h)
}

// updates writes what updates the host by itself.
func (b *builder) updates(h *largeHost) {
	b.file("/etc/apt/apt.conf.d/20auto-upgrades", "APT::Periodic::Update-Package-Lists \"1\";\nAPT::Periodic::Unattended-Upgrade \"1\";\n")
	b.file("/etc/apt/apt.conf.d/50unattended-upgrades", "Unattended-Upgrade::Origins-Pattern {\n"+strings.Repeat("// \"origin=Debian\";\n", 100)+"};\n")
	for i := range 8 {
		b.file(fmt.Sprintf("/etc/apt/apt.conf.d/%02dother", i), "DPkg::Post-Invoke { \"true\"; };\n")
	}
	b.file("/usr/bin/unattended-upgrade", "")
	b.file("/var/lib/apt/periodic/upgrade-stamp", "")
	b.file("/var/lib/apt/periodic/update-stamp", "")
	for _, release := range []string{"6.12.41+deb13-amd64", "6.12.48+deb13-amd64"} {
		b.file("/lib/modules/"+release+"/modules.dep", "")
		b.file("/boot/vmlinuz-"+release, "")
	}
	h.units["apt-daily-upgrade.timer"] = host.Unit{Name: "apt-daily-upgrade.timer", ID: "apt-daily-upgrade.timer", Load: "loaded", Active: "active", Sub: "waiting", FileState: "enabled", ActiveSince: bootTime}
	h.units["apt-daily-upgrade.service"] = host.Unit{Name: "apt-daily-upgrade.service", ID: "apt-daily-upgrade.service", Load: "loaded", Active: "inactive", Sub: "dead", FileState: "static", Result: "success"}
}

// block makes the links to a disk's directory.
func (b *builder) block(dir, name, number string) {
	rel := strings.TrimPrefix(dir, "/sys/")
	b.link("/sys/block/"+name, "../"+rel)
	b.link("/sys/class/block/"+name, "../../"+rel)
	b.link("/sys/dev/block/"+number, "../../"+rel)
}

// partitions writes /proc/partitions: sizes in units of 1 KiB.
func (b *builder) partitions(disks int) {
	var text strings.Builder
	text.WriteString("major minor  #blocks  name\n\n 254        0  209715200 vda\n 254        1  209714176 vda1\n")
	for i := range disks {
		d := diskNumber(i)
		fmt.Fprintf(&text, "%4d  %7d %10d %s\n", d.Major, d.Minor, 209715200/2, diskName(i))
	}
	b.file("/proc/partitions", text.String())
}

// diskName is what the kernel calls the disk (sd_format_disk_name of
// drivers/scsi/sd.c): sda, ..., sdz, sdaa, ...
func diskName(i int) string {
	name := ""
	for i++; i > 0; i = (i - 1) / 26 {
		name = string(rune('a'+(i-1)%26)) + name
	}
	return "sd" + name
}

// diskNumber is its device number (sd_probe): sixteen majors of sixteen disks,
// and beyond 256 disks large minors.
func diskNumber(i int) host.DevNum {
	majors := [16]uint32{8, 65, 66, 67, 68, 69, 70, 71, 128, 129, 130, 131, 132, 133, 134, 135}
	return host.DevNum{Major: majors[i>>4&0xf], Minor: uint32(i&0xf)<<4 | uint32(i)&0xfff00}
}

func number(d host.DevNum) string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

func mapWWID(i int) string { return fmt.Sprintf("36001405%024x", i) }

// storage writes the iSCSI sessions with a disk each, and the multipath maps
// over them: one target a volume, four portals a target, as gluster-block and
// most CSI drivers for LIO have it.
func (b *builder) storage(h *largeHost) {
	for m := range h.size.maps {
		dm, wwid := fmt.Sprintf("dm-%d", m), mapWWID(m)
		dir := "/sys/devices/virtual/block/" + dm
		dmNumber := host.DevNum{Major: 253, Minor: uint32(m)}
		status, table := "2 0 1 0 1 1 A 0 4 2", "1 queue_if_no_path 1 alua 1 1 service-time 0 4 2"
		target := fmt.Sprintf("iqn.2016-12.org.gluster-block:%08x-0000-4000-8000-%012x", m, m)
		b.mkdir(dir + "/slaves")
		for p := range pathsPerMap {
			i := m*pathsPerMap + p
			name, dev := diskName(i), diskNumber(i)
			b.disk(i, name, dev, wwid, target, dm)
			b.link(dir+"/slaves/"+name, fmt.Sprintf("../../../../platform/host%d/session%d/target%d:0:0/%d:0:0:0/block/%s", i+3, i+1, i+3, i+3, name))
			status += fmt.Sprintf(" %s A 0 0 1", number(dev))
			table += fmt.Sprintf(" %s 1 1", number(dev))
		}
		b.attributes(dir, "dev", number(dmNumber), "size", "209715200", "removable", "0")
		b.attributes(dir+"/dm", "uuid", "mpath-"+wwid, "name", "mpath"+strings.TrimPrefix(diskName(m), "sd"), "suspended", "0")
		b.mkdir(dir + "/holders")
		b.block(dir, dm, number(dmNumber))
		if m%2 == 0 {
			b.attributes("/sys/fs/ext4/"+dm, "errors_count", "0")
		}
		b.file(fmt.Sprintf("/run/udev/data/b253:%d", m), fmt.Sprintf("S:disk/by-id/dm-uuid-mpath-%s\nS:disk/by-id/wwn-0x%s\nL:50\nE:DM_UUID=mpath-%s\nE:DM_TYPE=scsi\n", wwid, wwid[1:17], wwid))
		h.maps = append(h.maps, host.DMDevice{
			Name: "mpath" + strings.TrimPrefix(diskName(m), "sd"), UUID: "mpath-" + wwid, Dev: dmNumber, OpenCount: 1,
			Targets: []host.DMTarget{{Length: 209715200, Type: "multipath", Status: status + " ", Table: table + " "}},
		})
	}
	for i := h.size.maps * pathsPerMap; i < h.size.disks(); i++ {
		b.disk(i, diskName(i), diskNumber(i), mapWWID(i), fmt.Sprintf("iqn.2016-12.org.gluster-block:%08x-0000-4000-8000-%012x", i, i), "")
	}
}

// disk writes session i+1 on host i+3 with its only disk.
func (b *builder) disk(i int, name string, dev host.DevNum, wwid, target, dm string) {
	session := fmt.Sprintf("/sys/devices/platform/host%d/session%d", i+3, i+1)
	unit := fmt.Sprintf("%s/target%d:0:0/%d:0:0:0", session, i+3, i+3)
	serial := fmt.Sprintf("%08x-0000-4000-8000-%012x", i/pathsPerMap, i/pathsPerMap)
	b.attributes(unit, "state", "running", "wwid", "naa."+wwid[1:], "vendor", "LIO-ORG ", "model", "block           ", "type", "0")
	// What only a problem would have read is left out of the largest hosts: the
	// file system has so many inodes.
	lean := b.said != nil
	if !lean {
		b.file(unit+"/vpd_pg80", "\x00\x80\x00"+string(rune(len(serial)))+serial)
	}
	disk := unit + "/block/" + name
	b.attributes(disk, "dev", number(dev), "size", "209715200", "removable", "0")
	b.link(disk+"/device", fmt.Sprintf("../../../%d:0:0:0", i+3))
	if dm != "" {
		b.link(disk+"/holders/"+dm, "../../../../../../../../virtual/block/"+dm)
	}
	b.block(disk, name, number(dev))
	if !lean {
		b.file("/run/udev/data/b"+number(dev), fmt.Sprintf("S:disk/by-id/scsi-%s\nS:disk/by-id/wwn-0x%s\nS:disk/by-path/ip-10.70.%d.2:3260-iscsi-%s-lun-0\nE:ID_SERIAL=%s\nE:DM_MULTIPATH_DEVICE_PATH=1\nE:ID_FS_TYPE=mpath_member\n", wwid, wwid[1:17], i%pathsPerMap, target, wwid))
		b.mkdir(disk + "/holders")
	}

	class := fmt.Sprintf("%s/iscsi_session/session%d", session, i+1)
	b.attributes(class, "state", "LOGGED_IN", "initiatorname", initiator, "targetname", target, "recovery_tmo", "5", "ifacename", "default")
	b.link(class+"/device", fmt.Sprintf("../../../session%d", i+1))
	b.link(fmt.Sprintf("/sys/class/iscsi_session/session%d", i+1), "../.."+strings.TrimPrefix(class, "/sys"))
	if lean {
		return
	}
	connection := fmt.Sprintf("%s/connection%d:0/iscsi_connection/connection%d:0", session, i+1, i+1)
	b.attributes(connection, "state", "up", "persistent_address", fmt.Sprintf("10.70.%d.2", i%pathsPerMap), "persistent_port", "3260")
	b.link(fmt.Sprintf("/sys/class/iscsi_connection/connection%d:0", i+1), "../.."+strings.TrimPrefix(connection, "/sys"))
}

var bootTime = time.Unix(1_790_000_000, 0)

// process writes one entry of /proc.
func (b *builder) process(pid, ppid int, comm string, kernel bool, threads int) string {
	dir := fmt.Sprintf("/proc/%d", pid)
	flags, vsize := 4194560, 1_300_000_000
	if kernel {
		flags, vsize = 2129984, 0
	}
	b.file(dir+"/stat", fmt.Sprintf("%d (%s) S %d %d %d 0 -1 %d 12034 0 17 0 1432 521 0 0 20 0 %d 0 %d %d 12345 18446744073709551615 1 1 0 0 0 0 0 4096 17663 0 0 0 17 3 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
		pid, comm, ppid, pid, pid, flags, threads, 1000+pid, vsize))
	return dir
}

// daemon writes a process of a unit.
func (b *builder) daemon(h *largeHost, pid int, comm, unit string, threads, score int, argv ...string) {
	dir := b.process(pid, 1, comm, false, threads)
	b.file(dir+"/comm", comm+"\n")
	b.file(dir+"/cgroup", "0::/system.slice/"+unit+"\n")
	b.file(dir+"/status", fmt.Sprintf("Name:\t%s\nUid:\t0\t0\t0\t0\nThreads:\t%d\nCapInh:\t0000000000000000\nCapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffffff\n", comm, threads))
	b.file(dir+"/cmdline", strings.Join(argv, "\x00")+"\x00")
	b.file(dir+"/oom_score_adj", fmt.Sprintln(score))
	b.file(dir+"/oom_score", "1\n")
	b.link(dir+"/ns/mnt", "mnt:[4026531841]")
	b.link(dir+"/ns/net", "net:[4026531840]")
	b.link(dir+"/fd/0", "/dev/null")
	b.link(dir+"/fd/9", "anon_inode:inotify")
	b.file(dir+"/fdinfo/9", "pos:\t0\nflags:\t02004000\n"+strings.Repeat("inotify wd:2 ino:3e5f sdev:1d mask:fce ignored_mask:0 fhandle-bytes:8\n", 40))
	group := "/sys/fs/cgroup/system.slice/" + unit
	b.attributes(group, "pids.current", fmt.Sprint(threads), "pids.max", "629145", "pids.events", "max 0", "pids.events.local", "max 0", "memory.events", "oom_kill 0")
	h.units[unit] = host.Unit{
		Name: unit, ID: unit, Load: "loaded", Active: "active", Sub: "running", FileState: "enabled", Result: "success",
		MainPID: pid, ControlGroup: "/system.slice/" + unit, OOMScoreAdjust: score, ActiveSince: bootTime,
	}
}

func podUID(p int) string { return fmt.Sprintf("%08x-1c2d-4e3f-8a9b-%012x", p, p) }

func containerName(p, c int) string { return fmt.Sprintf("%060x%04x", p, c) }

// qos of a pod: the classes of the control groups, in turn.
func qosOf(p int) string { return [...]string{"guaranteed", "burstable", "besteffort"}[p%3] }

// cgroupFiles are as many as a control group has beside those that are read:
// they cost those who list its directory.
var cgroupFiles = strings.Fields(`cgroup.controllers cgroup.events cgroup.freeze cgroup.kill cgroup.max.depth cgroup.max.descendants cgroup.pressure
	cgroup.procs cgroup.stat cgroup.subtree_control cgroup.threads cgroup.type cpu.idle cpu.max cpu.max.burst cpu.pressure cpu.stat cpu.stat.local
	cpu.uclamp.max cpu.uclamp.min cpu.weight cpu.weight.nice cpuset.cpus cpuset.cpus.effective cpuset.mems cpuset.mems.effective hugetlb.2MB.current
	hugetlb.2MB.events hugetlb.2MB.max io.max io.pressure io.stat io.weight memory.current memory.events.local memory.high memory.low memory.max
	memory.min memory.numa_stat memory.oom.group memory.peak memory.pressure memory.reclaim memory.stat memory.swap.current memory.swap.events
	memory.swap.high memory.swap.max memory.zswap.current misc.current misc.events misc.max pids.peak rdma.current rdma.max`)

// podsAndProcesses writes the process table and the control groups. Each pod has
// a sandbox and two containers, which share the processes left over.
func (b *builder) podsAndProcesses(h *largeHost) {
	const cgroups = "/sys/fs/cgroup"
	b.file("/proc/1/comm", "systemd\n")
	b.process(1, 0, "systemd", false, 1)
	b.link("/proc/1/ns/mnt", "mnt:[4026531841]")
	b.link("/proc/1/ns/net", "net:[4026531840]")
	b.daemon(h, pidContainerd, "containerd", "containerd.service", 60, -999, "/usr/bin/containerd")
	b.daemon(h, pidKubelet, "kubelet", "kubelet.service", 40, -999, "/usr/bin/kubelet", "--config=/var/lib/kubelet/config.yaml", "--kubeconfig=/etc/kubernetes/kubelet.conf")
	b.daemon(h, pidChronyd, "chronyd", "chrony.service", 1, 0, "/usr/sbin/chronyd", "-F", "1")
	b.daemon(h, pidMultipathd, "multipathd", "multipathd.service", 7, -1000, "/sbin/multipathd", "-d", "-s")
	b.daemon(h, pidIscsid, "iscsid", "iscsid.service", 1, -1000, "/sbin/iscsid")
	b.daemon(h, pidSSH, "sshd", "ssh.service", 1, -1000, "sshd: /usr/sbin/sshd -D [listener]")
	h.units["iscsid.socket"] = host.Unit{Name: "iscsid.socket", ID: "iscsid.socket", Load: "loaded", Active: "active", Sub: "running", FileState: "enabled"}
	b.file("/var/lib/kubelet/config.yaml", fmt.Sprintf("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ncgroupDriver: systemd\nmaxPods: 500\npodPidsLimit: 4096\nsystemReserved: {pid: \"%d\", memory: 4Gi}\nevictionHard: {memory.available: 100Mi, pid.available: 5%%}\n", reserved))

	count, threads := 7, 110
	for pid := 2; pid < 500 && pid < h.size.processes/20; pid++ {
		b.process(pid, 2, fmt.Sprintf("kworker/%d:1", pid), true, 1)
		count, threads = count+1, threads+1
	}
	inPods := 0
	each := (h.size.processes - count - 2*h.size.pods) / (2 * h.size.pods)
	extra := (h.size.processes - count - 2*h.size.pods) % (2 * h.size.pods)
	pid := firstPodPID
	var pods strings.Builder
	pods.WriteString(`{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[`)
	for p := range h.size.pods {
		uid, qos := podUID(p), qosOf(p)
		group, class, score := "/kubepods.slice/", "kubepods-"+qos, map[string]int{"guaranteed": -997, "burstable": 990, "besteffort": 1000}[qos]
		if qos == "guaranteed" {
			class = "kubepods"
		} else {
			group += class + ".slice/"
		}
		group += class + "-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
		b.attributes(cgroups+group, "pids.current", "20", "pids.max", "4096", "pids.events", "max 0", "pids.events.local", "max 0", "memory.events", "oom_kill 0")
		for _, name := range cgroupFiles {
			if err := os.Link(b.dir+"/proc/swaps", b.dir+cgroups+group+"/"+name); err != nil {
				b.t.Fatal(err)
			}
		}
		b.process(pid, 1, "containerd-shim", false, 11)
		pid, count, threads = pid+1, count+1, threads+11
		for c := range 3 { // 0 is the sandbox
			id := containerName(p, c)
			scope := group + "/cri-containerd-" + id + ".scope"
			n, comm, adj := each, "app", score
			if c == 0 {
				n, comm, adj = 1, "pause", -998
			} else if extra > 0 {
				n, extra = n+1, extra-1
			}
			var list strings.Builder
			for i := range n {
				dir := b.process(pid, firstPodPID, comm, false, 3)
				if i == 0 { // nobody looks further into the others
					b.file(dir+"/cgroup", "0::"+scope+"\n")
					b.file(dir+"/oom_score_adj", fmt.Sprintln(adj))
					b.file(dir+"/oom_score", fmt.Sprintln(max(0, 668+adj*2/3)))
				}
				fmt.Fprintln(&list, pid)
				pid, count, threads, inPods = pid+1, count+1, threads+3, inPods+3
			}
			b.file(cgroups+scope+"/cgroup.procs", list.String())
		}
		if p > 0 {
			pods.WriteByte(',')
		}
		podJSON(&pods, p, qos)
	}
	pods.WriteString("]}")
	h.pods = []byte(pods.String())
	if count != h.size.processes {
		b.t.Fatalf("%d processes, want %d", count, h.size.processes)
	}
	b.file("/proc/loadavg", fmt.Sprintf("4.21 3.87 3.60 5/%d %d\n", threads, pid))
	kubepods := []string{"pids.current", fmt.Sprint(inPods), "pids.max", fmt.Sprint(pidMax - reserved), "pids.events", "max 0", "pids.events.local", "max 0", "memory.events", "oom_kill 0"}
	b.attributes(cgroups+"/kubepods.slice", kubepods...)
	for _, qos := range []string{"burstable", "besteffort"} {
		b.attributes(cgroups+"/kubepods.slice/kubepods-"+qos+".slice", "pids.current", "1", "pids.max", "max", "pids.events", "max 0", "memory.events", "oom_kill 0")
	}
	b.attributes(cgroups+"/system.slice", "pids.current", fmt.Sprint(threads-inPods), "pids.max", "max", "pids.events", "max 0", "pids.events.local", "max 0", "memory.events", "oom_kill 0")
	b.file(cgroups+"/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma misc\n")
	h.configz = []byte(fmt.Sprintf(`{"kubeletconfig":{"systemReserved":{"pid":"%d"},"enforceNodeAllocatable":["pods"],"podPidsLimit":4096,"maxPods":500,"oomScoreAdj":-999,"cgroupsPerQOS":true,"cgroupDriver":"systemd","containerRuntimeEndpoint":"unix:///run/containerd/containerd.sock"}}`, reserved))
}

// podJSON writes a pod as the kubelet's /pods has it, with as much beside what
// matters as real ones have.
func podJSON(w *strings.Builder, p int, qos string) {
	resources := map[string]string{
		"guaranteed": `{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1","memory":"1Gi"}}`,
		"burstable":  fmt.Sprintf(`{"requests":{"cpu":"100m","memory":"%d"}}`, hostMem/100),
		"besteffort": `{}`,
	}[qos]
	env := strings.Repeat(`{"name":"SOME_SETTING","value":"https://service.namespace.svc.cluster.local:8443/path"},`, 20)
	fmt.Fprintf(w, `{"metadata":{"name":"app-%d","namespace":"tenant-%d","uid":"%s","generation":1,"annotations":{"kubernetes.io/config.source":"api"}},"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data-%d"}}],"containers":[`, p, p%20, podUID(p), p)
	for c := 1; c <= 2; c++ {
		if c > 1 {
			w.WriteByte(',')
		}
		fmt.Fprintf(w, `{"name":"c%d","image":"registry.example/app:v1","env":[%s{"name":"LAST"}],"resources":%s}`, c, env, resources)
	}
	w.WriteString(`]},"status":{"phase":"Running","containerStatuses":[`)
	for c := 1; c <= 2; c++ {
		if c > 1 {
			w.WriteByte(',')
		}
		fmt.Fprintf(w, `{"name":"c%d","ready":true,"restartCount":0,"containerID":"containerd://%s"}`, c, containerName(p, c))
	}
	w.WriteString(`]}}`)
}

// mountTable writes PID 1's mounts: volumes staged and mounted into pods, NFS,
// and for the most part the file systems of containers.
func (b *builder) mountTable(h *largeHost) {
	var text strings.Builder
	n := 0
	add := func(dev, point, options, tail string) {
		n++
		fmt.Fprintf(&text, "%d 29 %s / %s %s shared:%d - %s\n", 30+n, dev, point, options, n, tail)
	}
	add("254:1", "/", "rw,relatime", "ext4 /dev/vda1 rw,errors=remount-ro")
	add("0:23", "/proc", "rw,nosuid,nodev,noexec,relatime", "proc proc rw")
	add("0:24", "/sys", "rw,nosuid,nodev,noexec,relatime", "sysfs sysfs rw")
	add("0:5", "/dev", "rw,nosuid,relatime", "devtmpfs udev rw,size=65536k,nr_inodes=65536,mode=755")
	add("0:26", "/run", "rw,nosuid,nodev,noexec,relatime", "tmpfs tmpfs rw,size=6553600k,mode=755")
	add("0:27", "/sys/fs/cgroup", "rw,nosuid,nodev,noexec,relatime", "cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot")
	for m := range min(h.size.maps, h.size.mounts/2) {
		dev := fmt.Sprintf("253:%d", m)
		source, fsType := "/dev/mapper/"+h.maps[m].Name, "ext4 %s rw,stripe=16"
		if m%2 == 1 {
			fsType = "xfs %s rw,attr2,inode64,logbufs=8,logbsize=32k,noquota"
		}
		staged := fmt.Sprintf("/var/lib/kubelet/plugins/kubernetes.io/csi/gluster-block.csi.example/%x", sha256.Sum256(fmt.Appendf(nil, "vol-%d", m)))
		pod := fmt.Sprintf("/var/lib/kubelet/pods/%s/volumes/kubernetes.io~csi/pvc-%08x-aaaa-4bbb-8ccc-%012x", podUID(m%h.size.pods), m, m)
		add(dev, staged+"/globalmount", "rw,relatime", fmt.Sprintf(fsType, source))
		add(dev, pod+"/mount", "rw,relatime", fmt.Sprintf(fsType, source))
		data := fmt.Sprintf(`{"attachmentID":"csi-%064x","driverName":"gluster-block.csi.example","nodeName":"n1","specVolID":"pvc-%08x-aaaa-4bbb-8ccc-%012x","volumeHandle":"vol-%d","volumeLifecycleMode":"Persistent"}`, m, m, m, m)
		b.file(staged+"/vol_data.json", data)
		h.volumes = append(h.volumes, fmt.Sprintf("kubernetes.io/csi/gluster-block.csi.example^vol-%d", m))
		b.file(pod+"/vol_data.json", data)
	}
	for i := range h.size.maps / 25 {
		add(fmt.Sprintf("0:%d", 900000+i), fmt.Sprintf("/var/lib/kubelet/pods/%s/volumes/kubernetes.io~nfs/shared-%d", podUID(i), i), "rw,relatime",
			fmt.Sprintf("nfs4 10.0.0.9:/export/%d rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,clientaddr=10.0.0.1,local_lock=none,addr=10.0.0.9", i))
	}
	for p := 0; n < h.size.mounts; p++ {
		if p < h.size.pods {
			add(fmt.Sprintf("0:%d", 100000+p), fmt.Sprintf("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/%s/shm", containerName(p, 0)), "rw,nosuid,nodev,noexec,relatime", "tmpfs shm rw,size=65536k")
			add("0:4", fmt.Sprintf("/run/netns/cni-%08x-0000-4000-8000-%012x", p, p), "rw", "nsfs nsfs rw")
			for c := range 3 {
				if n < h.size.mounts {
					layers := strings.TrimSuffix(strings.Repeat("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1234/fs:", 6), ":")
					add(fmt.Sprintf("0:%d", 200000+3*p+c), fmt.Sprintf("/run/containerd/io.containerd.runtime.v2.task/k8s.io/%s/rootfs", containerName(p, c)), "rw,relatime",
						fmt.Sprintf("overlay overlay rw,lowerdir=%s,upperdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/%d/fs,workdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/%d/work", layers, p, p))
				}
			}
		}
		if n < h.size.mounts {
			add(fmt.Sprintf("0:%d", 400000+p), fmt.Sprintf("/var/lib/kubelet/pods/%s/volumes/kubernetes.io~projected/kube-api-access-%05x", podUID(p%h.size.pods), p), "rw,relatime", "tmpfs tmpfs rw,size=131072k")
		}
	}
	b.file("/proc/1/mountinfo", text.String())
}

// dpkg writes a status file as long as a real one, the required packages in it.
func (b *builder) dpkg(packages int) {
	var text strings.Builder
	for i := range packages {
		name := fmt.Sprintf("lib-package-%d", i)
		switch i {
		case packages / 4:
			name = "open-iscsi"
		case packages / 2:
			name = "multipath-tools"
		case packages - 1:
			name = "chrony"
		}
		fmt.Fprintf(&text, "Package: %s\nStatus: install ok installed\nPriority: optional\nSection: libs\nInstalled-Size: 1234\nMaintainer: Some Team <team@lists.example.org>\nArchitecture: amd64\nMulti-Arch: same\nSource: source-package\nVersion: 1.2.%d-3+deb13u1\nDepends: libc6 (>= 2.38), libgcc-s1 (>= 3.3.1), libstdc++6 (>= 13.1), zlib1g (>= 1:1.1.4), libssl3t64 (>= 3.0.0)\nConffiles:\n /etc/some/package.conf 0123456789abcdef0123456789abcdef\n /etc/default/package 0123456789abcdef0123456789abcdef\nDescription: one of many packages\n%sHomepage: https://example.org/\n\n",
			name, i, strings.Repeat(" A line of the long description, which is about as long as this.\n", 8))
	}
	b.file("/var/lib/dpkg/status", text.String())
	b.mkdir("/var/lib/dpkg/updates")
	b.file("/var/lib/dpkg/lock", "")
	b.file("/var/lib/dpkg/lock-frontend", "")
}

// serveMultipathd answers `show daemon` and `show maps json` on a Unix socket,
// in the words of multipathd 0.11.
func (h *largeHost) serveMultipathd(t testing.TB, socket string) {
	replies := map[string][]byte{
		"show daemon": frame(fmt.Sprintf("pid %d idle\n", pidMultipathd)),
	}
	maps := frame(h.mapsJSON())
	h.mapsReply.Store(&maps)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	h.sockets["/run/multipathd.socket"] = socket
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				buf := make([]byte, 256)
				for {
					if _, err := io.ReadFull(conn, buf[:8]); err != nil {
						return
					}
					n := binary.NativeEndian.Uint64(buf)
					if n > uint64(len(buf)) {
						return
					}
					if _, err := io.ReadFull(conn, buf[:n]); err != nil {
						return
					}
					reply := replies[string(buf[:n-1])]
					if reply == nil {
						reply = *h.mapsReply.Load()
					}
					if _, err := conn.Write(reply); err != nil {
						return
					}
				}
			}()
		}
	}()
}

func frame(body string) []byte {
	return append(append(binary.NativeEndian.AppendUint64(nil, uint64(len(body)+1)), body...), 0)
}

func (h *largeHost) mapsJSON() string {
	var b strings.Builder
	b.WriteString("{\n   \"major_version\": 0,\n   \"minor_version\": 1,\n   \"maps\": [")
	for m, dm := range h.maps {
		if m > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "{\n      \"name\" : %q,\n      \"uuid\" : %q,\n      \"sysfs\" : \"dm-%d\",\n      \"failback\" : \"immediate\",\n      \"queueing\" : \"6 chk\",\n      \"paths\" : 4,\n      \"write_prot\" : \"rw\",\n      \"dm_st\" : \"active\",\n      \"features\" : \"1 queue_if_no_path\",\n      \"hwhandler\" : \"1 alua\",\n      \"action\" : \"\",\n      \"path_faults\" : 0,\n      \"vend\" : \"LIO-ORG\",\n      \"prod\" : \"block\",\n      \"rev\" : \"4.0\",\n      \"switch_grp\" : 0,\n      \"map_loads\" : 1,\n      \"total_q_time\" : 0,\n      \"q_timeouts\" : 0,\n      \"path_groups\": [{\n         \"selector\" : \"service-time 0\",\n         \"pri\" : 50,\n         \"dm_st\" : \"active\",\n         \"marginal_st\" : \"normal\",\n         \"group\" : 1,\n         \"paths\": [",
			dm.Name, strings.TrimPrefix(dm.UUID, "mpath-"), m)
		for p := range pathsPerMap {
			i := m*pathsPerMap + p
			if p > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, "{\n            \"dev\" : %q,\n            \"dev_t\" : %q,\n            \"dm_st\" : \"active\",\n            \"dev_st\" : \"running\",\n            \"chk_st\" : \"ready\",\n            \"checker\" : \"tur\",\n            \"pri\" : 50,\n            \"host_wwnn\" : \"[undef]\",\n            \"target_wwnn\" : \"iqn.2016-12.org.gluster-block:%08x-0000-4000-8000-%012x\",\n            \"host_wwpn\" : \"[undef]\",\n            \"target_wwpn\" : \"[undef]\",\n            \"host_adapter\" : \"10.0.0.1\",\n            \"lun_hex\" : \"0x0000000000000000\",\n            \"marginal_st\" : \"normal\"\n         }",
				diskName(i), number(diskNumber(i)), m, m)
		}
		b.WriteString("]\n      }]\n   }")
	}
	b.WriteString("]\n}\n")
	return b.String()
}

// serveChronyd answers TRACKING, N_SOURCES and SOURCE_DATA over UDP with what
// was seen on the wire of a synchronised chronyd.
func (h *largeHost) serveChronyd(t testing.TB) {
	replies := map[uint16]string{
		33: "060200000021000500000000000000000102030100000000000000000a0002020a0002020000000000000000000000000001000000090000000000006b02026007215edbe2a074b6e14ad93ce695ce9c0a94e7ccf35c375f00ac9e95ecd40855e893280f0c8115e4",
		14: "06020000000e0002000000000000000001020303000000000000000000000001",
		15: "06020000000f000300000000000000000102030400000000000000000a000202000000000000000000000000000100000004000800000000000000ff0000000fe9616610e96cb87bece0e180",
	}
	bytesOf := map[uint16][]byte{}
	for command, text := range replies {
		data, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		bytesOf[command] = data
	}
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	h.sockets["127.0.0.1:323"] = conn.LocalAddr().String()
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if reply := bytesOf[binary.BigEndian.Uint16(buf[4:])]; n >= 28 && reply != nil {
				copy(reply[16:20], buf[8:12])
				conn.WriteToUDPAddrPort(reply, from)
			}
		}
	}()
}

func (h *largeHost) SystemState(context.Context) (string, error) { return "running", nil }

func (h *largeHost) Units(_ context.Context, names ...string) ([]host.Unit, error) {
	h.asked.units.Add(1)
	units := make([]host.Unit, len(names))
	for i, name := range names {
		u, ok := h.units[name]
		if !ok {
			u = host.Unit{Name: name, ID: name, Load: "not-found", Active: "inactive", Sub: "dead"}
		}
		units[i] = u
	}
	return units, nil
}

func (h *largeHost) UnitsMatching(_ context.Context, patterns ...string) ([]host.Unit, error) {
	h.asked.units.Add(1)
	var units []host.Unit
	for name, u := range h.units {
		if slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, name); return ok }) {
			units = append(units, u)
		}
	}
	return units, nil
}

func (h *largeHost) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	h.asked.dials.Add(1)
	real, ok := h.sockets[address]
	if !ok {
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.ErrNotExist}
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, real)
	if deadline, ok := ctx.Deadline(); ok && err == nil {
		conn.SetDeadline(deadline)
	}
	return conn, err
}

func (h *largeHost) Adjtimex(context.Context) (host.Timex, error) {
	return host.Timex{Status: 0x2001, MaxError: 12 * time.Millisecond, EstError: time.Millisecond}, nil
}

func (h *largeHost) PTPOffset(context.Context, string) (time.Duration, time.Duration, error) {
	return 3 * time.Microsecond, 5 * time.Microsecond, nil
}

// DeviceMapper costs a list, and two questions a device.
func (h *largeHost) DeviceMapper(context.Context) ([]host.DMDevice, error) {
	h.asked.ioctls.Add(1 + 2*int64(len(h.maps)))
	return slices.Clone(h.maps), nil
}

func (h *largeHost) StatMount(context.Context, string) (host.MountStat, error) {
	h.asked.statfs.Add(1)
	return host.MountStat{}, nil
}

func (h *largeHost) LockHolder(context.Context, string) (host.Lock, error) { return host.Lock{}, nil }

func (h *largeHost) KernelLog(context.Context) ([]host.KernelRecord, error) { return nil, nil }

func (h *largeHost) Run(_ context.Context, c host.Command) (host.Output, error) {
	h.asked.commands.Add(1)
	return host.Output{}, errors.New("executed " + c.String())
}

// largeCluster is the cluster the host is a node of, with the volumes of the host
// attached to it.
type largeCluster struct{ volumes []string }

func (c largeCluster) Node() (probes.Node, bool) {
	return probes.Node{Name: "n1", KubeletVersion: "v1.36.3", VolumesAttached: c.volumes, VolumesInUse: c.volumes, Conditions: []probes.NodeCondition{{Type: "Ready", Status: "True", Heartbeat: time.Now()}}}, true
}

func (largeCluster) Attachment(context.Context, string) (probes.Attachment, bool, error) {
	return probes.Attachment{}, false, errors.New("asked the API server, though all is well")
}

func (largeCluster) Claim(context.Context, string) (string, error) {
	return "", errors.New("asked the API server, though all is well")
}

func (largeCluster) Version(context.Context) (string, error) { return "v1.36.3", nil }

func (h *largeHost) KubeletAPI(_ context.Context, name string, read func(io.Reader) error) error {
	h.asked.kubelet.Add(1)
	switch name {
	case "/pods":
		return read(bytes.NewReader(h.pods))
	case "/configz":
		return read(bytes.NewReader(h.configz))
	}
	return host.ErrNotConfigured
}
