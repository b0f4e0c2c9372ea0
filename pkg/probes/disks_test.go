package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

func TestDisks(t *testing.T) { runCases(t, "disks", DefaultDisks) }

func TestDisksValidate(t *testing.T) {
	p := DefaultDisks()
	if err := p.Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	p.LeftoverAfter, p.ThinPoolWarnAt, p.ThinPoolCriticalAt = 0, 90, 80
	var fields []string
	for _, e := range FieldErrors(p.Validate()) {
		fields = append(fields, e.Field)
	}
	if d := cmp.Diff([]string{"leftoverAfter", "thinPoolWarnAt"}, fields); d != "" {
		t.Error(d)
	}
}

// deniedHost refuses what a user who is not root may not have.
type deniedHost struct {
	host.View
	denied []string
}

func (h deniedHost) refuse(name string) error {
	for _, d := range h.denied {
		if name == d {
			return &fs.PathError{Op: "read", Path: name, Err: fs.ErrPermission}
		}
	}
	return nil
}

func (h deniedHost) ReadFile(ctx context.Context, name string) ([]byte, error) {
	if err := h.refuse(name); err != nil {
		return nil, err
	}
	return h.View.ReadFile(ctx, name)
}

func (h deniedHost) ReadThrough(ctx context.Context, name string, limit int64, each func([]byte)) error {
	if err := h.refuse(name); err != nil {
		return err
	}
	return h.View.ReadThrough(ctx, name, limit, each)
}

func (h deniedHost) StatMount(_ context.Context, name string) (host.MountStat, error) {
	return host.MountStat{}, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrPermission}
}

func checkOnce(t *testing.T, v host.View) (finding.Result, error) {
	t.Helper()
	in := Input{Host: v, Now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Memory: NewMemory()}
	in.Memory.Begin()
	r, err := DefaultDisks().Check(context.Background(), in)
	checkRules(t, DefaultDisks(), r)
	return r, err
}

const smallHost = `
-- os --
kernel=6.12.0
-- procs --
1 systemd
-- units --
*
-- links --
/sys/dev/block/254:0 -> ../../block/vda
/sys/dev/block/8:0 -> ../../block/sda
-- tree/sys/block/vda/size --
20971520
-- tree/sys/block/vda/dev --
254:0
-- tree/sys/block/sda/size --
20971520
-- tree/sys/block/sda/device/state --
running
-- tree/proc/1/mountinfo --
29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 29 8:0 / /data rw,relatime shared:2 - xfs /dev/sda rw
-- tree/sys/fs/ext4/vda/errors_count --
0
`

func TestDisksWithoutRoot(t *testing.T) {
	h := hosttest.Parse(t, smallHost+"-- tree/proc/self/mountinfo --\n29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n")
	r, err := checkOnce(t, deniedHost{h, []string{"/proc/1/mountinfo"}})
	if finding.StatusOf(r, err) != finding.Unknown || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "this process sees") {
		t.Errorf("mount table of PID 1 unreadable: %s, %v", finding.StatusOf(r, err), err)
	}
	if !strings.HasPrefix(r.Summary, "1 mounted block device, 2 disks") {
		t.Errorf("nothing was judged beside the error: %q", r.Summary)
	}

	h = hosttest.Parse(t, smallHost)
	r, err = checkOnce(t, deniedHost{h, nil})
	if finding.StatusOf(r, err) != finding.Unknown || err == nil || !strings.Contains(err.Error(), "1 mount could not be asked") {
		t.Errorf("mount points closed: %s, %v", finding.StatusOf(r, err), err)
	}
}

// A tree has no kernel that could be asked: what files tell is judged, the rest
// is named.
func TestDisksOnATree(t *testing.T) {
	h := hosttest.Parse(t, smallHost+"-- tree/etc/fstab --\n/dev/sdb /data xfs defaults 0 0\n-- tree/sys/class/block/sdb/dev --\n8:16\n-- tree/dev/sdb --\n-- tree/etc/os-release --\nID=debian\n")
	if err := os.MkdirAll(h.Path("/sys/block/sdb"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.Path("/sys/block/sdb/size"), []byte("1000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../block/sdb", h.Path("/sys/dev/block/8:16")); err != nil {
		t.Fatal(err)
	}
	r, err := checkOnce(t, h.Tree)
	if err == nil || !errors.Is(err, host.ErrNotLive) {
		t.Errorf("error %v, want one that says what a tree can not tell", err)
	}
	var reasons []string
	finding.Sort(r.Findings)
	for _, f := range r.Findings {
		reasons = append(reasons, f.Reason+" "+f.Subject)
	}
	if d := cmp.Diff([]string{"MountSourceStale /data", "UnstableDeviceName /dev/sdb"}, reasons); d != "" {
		t.Error(d)
	}
}

// unmountingHost loses a mount between two readings of the table.
type unmountingHost struct {
	host.View
	reads *atomic.Int32
}

func (h unmountingHost) ReadThrough(ctx context.Context, name string, limit int64, each func([]byte)) error {
	data, err := h.View.ReadFile(ctx, name)
	if name == ownMountTable && h.reads.Add(1) > 1 {
		data, _, _ = bytes.Cut(data, []byte("31 29"))
	}
	each(data)
	return err
}

func TestDisksUnmountedMeanwhileIsNotGone(t *testing.T) {
	text := strings.Replace(smallHost, "-- tree/sys/fs/ext4", "31 29 8:16 / /detaching rw - ext4 /dev/sdb rw\n-- tree/sys/fs/ext4", 1) + "-- statmount --\n/data dev=8:0\n"
	r, err := checkOnce(t, unmountingHost{hosttest.Parse(t, text), new(atomic.Int32)})
	if err != nil || len(r.Findings) != 0 {
		t.Errorf("findings %v, error %v", r.Findings, err)
	}
	r, err = checkOnce(t, hosttest.Parse(t, text))
	if err != nil || len(r.Findings) != 1 || r.Findings[0].Reason != "MountedDeviceGone" {
		t.Errorf("still mounted: findings %v, error %v", r.Findings, err)
	}
}

// cancelledHost is one where the pass's time runs out while a mount is asked.
type cancelledHost struct {
	host.View
	cancel context.CancelFunc
}

func (h cancelledHost) StatMount(context.Context, string) (host.MountStat, error) {
	h.cancel()
	return host.MountStat{}, context.Canceled
}

func TestDisksOutOfTimeIsNoFinding(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	in := Input{Host: cancelledHost{hosttest.Parse(t, smallHost), cancel}, Now: time.Now(), Memory: NewMemory()}
	r, err := DefaultDisks().Check(ctx, in)
	if len(r.Findings) != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("findings %v, error %v", r.Findings, err)
	}
}

// The mounts are re-read on old kernels, which can leave one out.
func TestReadMountTableUntilTwoAgree(t *testing.T) {
	for _, c := range []struct {
		kernel string
		want   int32
	}{{"4.18.0-553.el8", 2}, {"5.7.19", 2}, {"5.8.0", 1}, {"6.12.1-amd64", 1}, {"unknown", 1}} {
		h := unmountingHost{hosttest.Parse(t, strings.Replace(smallHost, "kernel=6.12.0", "kernel="+c.kernel, 1)), new(atomic.Int32)}
		if _, err := readMounts(context.Background(), Input{Host: h, Memory: NewMemory()}, mountFilter{}); err != nil {
			t.Fatal(err)
		}
		if n := h.reads.Load(); n != c.want {
			t.Errorf("kernel %s: read %d times, want %d", c.kernel, n, c.want)
		}
	}
}

func TestHideInitiatorNames(t *testing.T) {
	const iqn = "iqn.2003-01.org.linux-iscsi.storage:sn.8675309"
	for in, want := range map[string]string{
		"/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-" + iqn + "-lun-2":                                                "/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-HASH-lun-2",
		"/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-" + iqn + "-lun-2-part1 (ext4 on sdb)":                            "/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-HASH-lun-2-part1 (ext4 on sdb)",
		"/var/lib/kubelet/plugins/kubernetes.io/iscsi/iface-default/10.0.0.1:3260-" + iqn + "-lun-0 is still there": "/var/lib/kubelet/plugins/kubernetes.io/iscsi/iface-default/10.0.0.1:3260-HASH-lun-0 is still there",
		"sda and sdb call themselves " + iqn + ", but":                                                              "sda and sdb call themselves HASH, but",
		"/data (ext4 on sdb)": "/data (ext4 on sdb)",
	} {
		got := hideInitiatorNames(in)
		if strings.Contains(got, "linux-iscsi") || strings.Contains(got, "8675309") {
			t.Errorf("%q still tells the name", got)
		}
		if i := strings.Index(got, "iqn-"); i >= 0 {
			got = got[:i] + "HASH" + got[i+len("iqn-")+12:]
		}
		if got != want {
			t.Errorf("%q\n got %q\nwant %q", in, got, want)
		}
	}
	if hideInitiatorNames(iqn+"a") == hideInitiatorNames(iqn+"b") {
		t.Error("two names, one hash")
	}
}

func TestVolumeAt(t *testing.T) {
	const pods = "/var/lib/k0s/kubelet/pods/8dbb12ff-f4e9"
	for point, want := range map[string]*volume{
		pods + "/volumes/kubernetes.io~csi/pvc-1/mount":                                {Dir: pods + "/volumes/kubernetes.io~csi/pvc-1", Plugin: "csi", Name: "pvc-1", Pod: "8dbb12ff-f4e9"},
		pods + "/volumes/kubernetes.io~nfs/pv-2":                                       {Dir: pods + "/volumes/kubernetes.io~nfs/pv-2", Plugin: "nfs", Name: "pv-2", Pod: "8dbb12ff-f4e9"},
		pods + "/volume-subpaths/pvc-3/app/0":                                          {Name: "pvc-3", Pod: "8dbb12ff-f4e9"},
		"/data/kubelet/plugins/kubernetes.io/csi/x.csi.example/0f3a/globalmount":       {Dir: "/data/kubelet/plugins/kubernetes.io/csi/x.csi.example/0f3a", Plugin: "csi", Global: true},
		"/var/lib/kubelet/plugins/kubernetes.io/csi/pv/pvc-4/globalmount":              {Dir: "/var/lib/kubelet/plugins/kubernetes.io/csi/pv/pvc-4", Plugin: "csi", Name: "pvc-4", Global: true},
		"/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-5/8dbb1": nil,
		"/srv/volumes/kubernetes.io~csi":                                               nil,
		"/srv/volumes/kubernetes.io~csi/pvc-6/mount":                                   nil,
		pods + "/volumes/kubernetes.io~csi/":                                           nil,
		"/":                                                                            nil,
	} {
		got, ok := volumeAt(point)
		if ok != (want != nil) {
			t.Errorf("%s: %v", point, ok)
		} else if ok {
			if d := cmp.Diff(*want, got); d != "" {
				t.Errorf("%s: (-want +got)\n%s", point, d)
			}
		}
	}
}

func TestDeclaredMountLink(t *testing.T) {
	for spec, want := range map[string]string{
		"UUID=0a-1B":              "/dev/disk/by-uuid/0a-1B",
		`LABEL="my disk/1"`:       `/dev/disk/by-label/my\x20disk\x2f1`,
		"LABEL=größe":             "/dev/disk/by-label/größe",
		"LABEL=a\xffb":            `/dev/disk/by-label/a\xffb`,
		"PARTLABEL=x":             "/dev/disk/by-partlabel/x",
		"ID=wwn-0x5":              "/dev/disk/by-id/wwn-0x5",
		"PARTUUID=12/PARTNROFF=1": "PARTUUID=12/PARTNROFF=1",
		"/dev/sda1":               "/dev/sda1",
		"tank/data":               "tank/data",
		"UUID=":                   "UUID=",
	} {
		if got := (declaredMount{Spec: spec}).link(); got != want {
			t.Errorf("%s: %q, want %q", spec, got, want)
		}
	}
}

func TestIsPartitionOf(t *testing.T) {
	for _, c := range []struct {
		disk, name string
		want       bool
	}{
		{"sda", "sda1", true}, {"sda", "sda", false}, {"sda", "sdaa", false}, {"sda", "sdaa1", false},
		{"nvme0n1", "nvme0n1p2", true}, {"nvme0", "nvme0n1", false}, {"nvme0n1", "nvme0n12", false},
		{"mmcblk0", "mmcblk0p1", true}, {"mmcblk0", "mmcblk0boot0", false}, {"block", "sda", false}, {"", "1", false},
		{"md0", "md0p1", true}, {"cciss!c0d0", "cciss!c0d0p1", true},
	} {
		if got := isPartitionOf(c.disk, c.name); got != c.want {
			t.Errorf("%s of %s: %v", c.name, c.disk, got)
		}
	}
}

func TestEvidentlyTwo(t *testing.T) {
	one := diskProof{disk: disk{Name: "sda", Sectors: 100}, Serial: "S", Target: "t1", LUN: "0", Port: 1}
	with := func(change func(*diskProof)) []diskProof {
		two := one
		change(&two)
		return []diskProof{one, two}
	}
	for name, c := range map[string]struct {
		proofs []diskProof
		want   bool
	}{
		"the same path":                         {with(func(*diskProof) {}), false},
		"another port of one array":             {with(func(f *diskProof) { f.Target, f.Port = "t2", 2 }), false},
		"the same port number of two targets":   {with(func(f *diskProof) { f.Target = "t2" }), true},
		"serial":                                {with(func(f *diskProof) { f.Serial = "T" }), true},
		"serial unknown":                        {with(func(f *diskProof) { f.Serial = "" }), false},
		"size, behind another LUN":              {with(func(f *diskProof) { f.Sectors, f.LUN = 200, "1" }), true},
		"size, at one LUN of one target":        {with(func(f *diskProof) { f.Sectors = 200 }), true},
		"FC nodes without port numbers":         {[]diskProof{{disk: disk{Sectors: 1}, Target: "0x1", FC: true}, {disk: disk{Sectors: 1}, Target: "0x2", FC: true}}, false},
		"iSCSI targets without port numbers":    {[]diskProof{{disk: disk{Sectors: 1}, Target: "a"}, {disk: disk{Sectors: 1}, Target: "b"}}, true},
		"local disks of different size":         {[]diskProof{{disk: disk{Sectors: 1}}, {disk: disk{Sectors: 2}}}, true},
		"the pair is not the first two":         {[]diskProof{{disk: disk{Sectors: 1}, Target: "a", Port: 2}, {disk: disk{Sectors: 1}, Target: "a", Port: 1}, {disk: disk{Sectors: 1}, Target: "b", Port: 1}}, true},
		"four ports of one array, four names":   {[]diskProof{{Target: "a", Port: 1}, {Target: "b", Port: 2}, {Target: "c", Port: 3}, {Target: "d", Port: 4}}, false},
		"two sessions to each of two LIO boxes": {[]diskProof{{Target: "a", Port: 1}, {Target: "a", Port: 1}, {Target: "b", Port: 1}, {Target: "b", Port: 1}}, true},
	} {
		if got := evidentlyTwo(c.proofs); (got != "") != c.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// fixture returns the lines of a capture from the real node that begin so.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "disks", "captured", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestParseFilesystemEventsCaptured(t *testing.T) {
	var records []host.KernelRecord
	upTo := func(sequence uint64) filesystemEvents {
		var head []host.KernelRecord
		for _, r := range records {
			if r.Sequence <= sequence {
				head = append(head, r)
			}
		}
		return parseFilesystemEvents(head)
	}
	for line := range bytes.Lines(fixture(t, "kmsg.txt")) {
		r, err := host.ParseKernelRecord(line)
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	for _, c := range []struct {
		sequence       uint64
		device         string
		refused, error bool
	}{
		{1082, "loop0", false, false}, // mounted, remounted ro and rw by hand
		{1083, "loop0", false, true},  // trigger_fs_error
		{1084, "loop0", true, true},   // journal aborted
		{1085, "loop0", true, true},
		{1091, "loop0", false, false}, // mounted again
		{1096, "loop0", false, true},  // errors=continue
		{1100, "loop1", false, false}, // XFS mounted
		{1101, "loop1", true, false},  // shut down by xfs_io
		{1105, "loop1", false, false}, // unmounted
		{1111, "dm-1", true, false},   // ext4 over a dead device
		{1124, "dm-1", true, true},
		{1130, "dm-1", false, false}, // XFS on the same device
		{1141, "dm-1", true, true},
		{1143, "dm-1", false, false},
	} {
		e := upTo(c.sequence)[c.device]
		if (e.refused != "") != c.refused || (e.lastError != "") != c.error {
			t.Errorf("up to record %d, %s: %+v", c.sequence, c.device, e)
		}
	}
}

func TestParseMountsCaptured(t *testing.T) {
	data := fixture(t, "mountinfo.txt")
	mounts, err := parseMounts(data, mountFilter{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range mounts {
		if m.FSType != "devtmpfs" {
			got = append(got, fmt.Sprintf("%d:%d %s %s %s", m.Major, m.Minor, m.Mountpoint, m.FSType, m.Source))
		}
	}
	want := []string{"254:0 / ext4 /dev/disk/by-id/virtio-ROOT", "254:16 /mnt/d ext4 /dev/vdb"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// TestMountTableIsParsedWhenItChanged: an unchanged table is not parsed again.
func TestMountTableIsParsedWhenItChanged(t *testing.T) {
	in := Input{Host: hosttest.Parse(t, smallHost), Memory: NewMemory()}
	read := func(h host.View, filter mountFilter) []*mountinfo.Info {
		t.Helper()
		in.Host = h
		mounts, err := readMountTable(context.Background(), in, ownMountTable, false, filter)
		if err != nil || len(mounts) != 2 {
			t.Fatalf("%v, %v", mounts, err)
		}
		return mounts
	}
	h := hosttest.Parse(t, smallHost)
	first := read(h, mountFilter{})
	if again := read(h, mountFilter{}); again[0] != first[0] {
		t.Error("parsed twice")
	}
	if other := read(h, mountFilter{Points: map[string]bool{"/x": true}}); other[0] == first[0] {
		t.Error("what another filter kept was taken")
	}
	changed := read(hosttest.Parse(t, strings.Replace(smallHost, "xfs /dev/sda rw", "xfs /dev/sda ro", 1)), mountFilter{})
	if changed[1].VFSOptions != "ro" {
		t.Errorf("%+v", changed[1])
	}
}

func FuzzParsePartitions(f *testing.F) {
	f.Add([]byte("major minor  #blocks  name\n\n 254        0   10485760 vda\n   8        0  104857600 sda\n   8        1    1048576 sda1\n  65      160          1 sdaa\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		parsePartitions(data, func(name []byte, blocks uint64) {
			if !bytes.HasPrefix(name, []byte("sd")) || !bytes.Contains(data, name) {
				t.Errorf("%q %d", name, blocks)
			}
		})
	})
}

func FuzzParseFstab(f *testing.F) {
	f.Add([]byte("# /etc/fstab\nUUID=1d2e3f40-0000-4000-8000-000000000001 / ext4 errors=remount-ro 0 1\n/dev/sdb1\t/srv/my\\040disk xfs defaults,nofail 0 2\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n"))
	f.Add([]byte("LABEL=\\ x\\04 \\777 \\0"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, d := range parseFstab(data) {
			if d.Spec == "" || strings.HasPrefix(d.Spec, "#") && !bytes.Contains(data, []byte(`\043`)) || !strings.HasPrefix(d.Source, "/etc/fstab line ") {
				t.Errorf("%+v", d)
			}
			if link := d.link(); d.isDevice() && !strings.HasPrefix(link, "/dev/") {
				t.Errorf("%+v: link %q", d, link)
			}
		}
	})
}

func FuzzParseMountUnit(f *testing.F) {
	f.Add([]byte("[Unit]\nDescription=data\n[Mount]\nWhat=/dev/disk/by-id/scsi-0DATA\nWhere=/data\nType=xfs\nOptions=noatime\n[Install]\nWantedBy=multi-user.target\n"))
	f.Add([]byte("[Mount]\nWhat=a\\\n b\nWhere=relative\n"))
	f.Add([]byte("[Mount]\nWhere=/data\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, ok, err := parseMountUnit(data); ok && (err != nil || d.Spec == "" || !strings.HasPrefix(d.Point, "/")) {
			t.Errorf("%+v, %v", d, err)
		}
	})
}

func FuzzParseMounts(f *testing.F) {
	f.Add(fixture(f, "mountinfo.txt"))
	f.Add([]byte("53 29 254:0 /mnt/src/x//deleted /mnt/b rw,relatime shared:1 - ext4 /dev/disk/by-id/virtio-ROOT rw\n53 29 0:118 / /mnt/sp\\040ace rw shared:124 - tmpfs a\\040b rw,inode64\n"))
	f.Add([]byte("36 35 98:0 /mnt1 /mnt2 rw,noatime - ext3 /dev/root"))
	f.Add([]byte("0 0 0:0 0 0 0 - devtmpfs - ext4 a rw\n0 0 0:0 0 0 0 - devtmpfs  - - - a rw\n0 0 0:0 0 0 0 - - devtmpfs a rw\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		mounts, err := parseMounts(data, mountFilter{})
		byBytes := newMountScan(mountFilter{})
		for i := range data {
			byBytes.take(data[i : i+1])
		}
		if again, errAgain := byBytes.mounts(); !cmp.Equal(mounts, again) || fmt.Sprint(err) != fmt.Sprint(errAgain) {
			t.Errorf("byte by byte %v, %v; at once %v, %v", again, errAgain, mounts, err)
		}
		inTwo := newMountScan(mountFilter{})
		inTwo.take(data[:len(data)/2])
		inTwo.take(data[len(data)/2:])
		if again, errAgain := inTwo.mounts(); !cmp.Equal(mounts, again) || fmt.Sprint(err) != fmt.Sprint(errAgain) {
			t.Errorf("in two pieces %v, %v; at once %v, %v", again, errAgain, mounts, err)
		}
		if err == nil && len(data) == 0 {
			t.Error("an empty table is no table")
		}
		for _, m := range mounts {
			if m.Major == 0 && !isNetworkFS(m.FSType) && m.FSType != "btrfs" && m.FSType != "devtmpfs" {
				t.Errorf("kept %+v", m)
			}
		}
		if n := bytes.Count(data, []byte("\n")); len(mounts) > n {
			t.Errorf("%d mounts in %d lines", len(mounts), n)
		}
	})
}

func FuzzParseExt4Errors(f *testing.F) {
	f.Add("4\n", "1795295258\n", "ext4_journal_check_start\n")
	f.Add("18446744073709551615", "", "")
	f.Add("4\n", "-1\n", "")
	f.Fuzz(func(t *testing.T, count, last, fn string) {
		e, err := parseExt4Errors(count, last, fn)
		if err == nil && !e.Last.IsZero() && e.Last.Unix() < 0 {
			t.Errorf("%+v", e)
		}
	})
}

func FuzzParseUdev(f *testing.F) {
	f.Add([]byte("S:disk/by-id/scsi-36001405\nS:disk/by-path/ip-10.0.0.1:3260-iscsi-x-lun-0\nL:-100\nI:1948256\nE:ID_SERIAL=36001405\nE:DM_UUID=\nG:systemd\nQ:systemd\nV:1\n"))
	f.Add([]byte("S:\nE:a\nL:x\n:\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := parseUdev(data)
		if n := bytes.Count(data, []byte("S:")); len(r.Links) > n {
			t.Errorf("%d links from %d claims", len(r.Links), n)
		}
	})
}

func FuzzParseVolumeData(f *testing.F) {
	f.Add([]byte(`{"attachmentID":"csi-0a","driverName":"iscsi.csi.example","nodeName":"n1","specVolID":"pvc-7d1e","volumeHandle":"array-7/vol-12","volumeLifecycleMode":"Persistent"}`))
	f.Add([]byte(`{"driverName":1}`))
	f.Add([]byte(`{"driverName":"iscsi.csi.example","specVolID":1,"volumeHandle":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, err := parseVolumeData(data); err != nil && d != (volumeData{}) {
			t.Errorf("%+v beside %v", d, err)
		}
	})
}

func FuzzParseThinPool(f *testing.F) {
	f.Add("1 120/4096 140800/163840 - rw discard_passdown queue_if_no_space - 1024")
	f.Add("Fail")
	f.Add("1 1/0 1/1 - ro")
	f.Fuzz(func(t *testing.T, status string) {
		p, err := parseThinPool(status)
		if err == nil && !p.Failed && (p.DataSize == 0 || p.MetadataSize == 0) {
			t.Errorf("%q: %+v", status, p)
		}
	})
}

func FuzzVPDPages(f *testing.F) {
	f.Add([]byte("\x00\x80\x00\x04S2  "))
	f.Add([]byte("\x00\x83\x00\x1c\x01\x03\x00\x10\x60\x01\x40\x5a\xaa\xaa\xaa\xaa\xaa\xaa\xaa\xaa\xaa\xaa\xaa\xaa\x01\x94\x00\x04\x00\x00\x00\x02"))
	f.Fuzz(func(t *testing.T, page []byte) {
		if s := scsiSerial(page); len(s) > len(page) {
			t.Errorf("serial %q", s)
		}
		if _, ok := relativePort(page); ok && len(page) < 12 {
			t.Errorf("a port in %d bytes", len(page))
		}
	})
}

func FuzzFilesystemEventOf(f *testing.F) {
	for line := range bytes.Lines(fixture(f, "kmsg.txt")) {
		_, text, _ := strings.Cut(string(line), ";")
		f.Add(text)
	}
	f.Add("BTRFS info (device sda1 state EA): forced readonly")
	f.Fuzz(func(t *testing.T, text string) {
		if device, _ := filesystemEventOf(text); !strings.Contains(text, device) {
			t.Errorf("%q: device %q", text, device)
		}
		// As the kernel tells of a process that crashed (arch/x86/mm/fault.c), of
		// whose name and file the process has the choice.
		crash := fmt.Sprintf("%s[77]: segfault at 0 ip 0000000000400000 sp 00007ffd error 4 in %s[400000+1000]", text[:min(len(text), maxComm)], text)
		if device, kind := filesystemEventOf(crash); device != "" && kind != noEvent {
			t.Errorf("%q was taken for an event of %q", crash, device)
		}
	})
}

// TestCrashIsNoFilesystemEvent: lines a process can have the kernel write.
func TestCrashIsNoFilesystemEvent(t *testing.T) {
	for _, text := range []string{
		"XFS (sda1)[77]: segfault at 0 ip 0000000000400000 sp 00007ffd error 4 in has been shut down[400000+1000]",
		"XFS (sda1):[77]: segfault at 0 ip 0000000000400000 sp 00007ffd error 4 in Corruption[400000+1000]",
		"BTRFS x[77]: segfault at 0 ip 0000000000400000 sp 00007ffd error 4 in (device sda1): forced readonly[400000+1000]",
		"traps: BTRFS[77] general protection fault ip:400000 sp:7ffd error:0 in (device sda1): forced readonly[400000+1000]",
		"EXT4-fs error ([77]: segfault at 0 ip 0000000000400000 sp 00007ffd error 4 in sda1): x[400000+1000]",
	} {
		if device, kind := filesystemEventOf(text); device != "" && kind != noEvent {
			t.Errorf("%q was taken for an event of %q", text, device)
		}
	}
}

// largeHost answers as a big storage node does what a tree can not.
type largeHost struct{ *host.Tree }

func (largeHost) OS(context.Context) (host.OS, error) {
	return host.OS{Kernel: "6.12.0", BootTime: time.Unix(1795248000, 0)}, nil
}
func (largeHost) StatMount(context.Context, string) (host.MountStat, error) {
	return host.MountStat{}, nil
}

// newLargeHost writes a host with four paths to each multipath map, a volume of
// the kubelet on every map, and as many mounts of containers as make up the
// number asked for.
func newLargeHost(b *testing.B, disks, mounts int) host.View {
	b.Helper()
	var ar txtar.Archive
	ar.Files = append(ar.Files, txtar.File{Name: "procs", Data: []byte("1 systemd\n")})
	var links, table bytes.Buffer
	file := func(name, text string) {
		ar.Files = append(ar.Files, txtar.File{Name: "tree" + name, Data: []byte(text)})
	}
	fmt.Fprintln(&table, "29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw")
	fmt.Fprintln(&links, "/sys/dev/block/254:0 -> ../../devices/virtio0/block/vda")
	file("/sys/block/vda/size", "20971520\n")
	file("/sys/fs/ext4/vda/errors_count", "0\n")
	n := 1
	for i := range disks {
		dm := i / 4
		name := fmt.Sprintf("sd%c%c%c", 'a'+i/676%26, 'a'+i/26%26, 'a'+i%26)
		host := i % 4
		dir := fmt.Sprintf("/sys/devices/platform/host%d/session%d/target%d:0:0/%d:0:0:%d/block/%s", host, host, host, host, dm, name)
		file(dir+"/size", "20971520\n")
		file(dir+"/device/state", "running\n")
		file(dir+"/device/wwid", fmt.Sprintf("naa.6001405%025d\n", dm))
		file(dir+"/device/vpd_pg80", "\x00\x80\x00\x08"+fmt.Sprintf("%08d", dm))
		fmt.Fprintf(&links, "/sys/block/%s -> ../%s\n", name, strings.TrimPrefix(dir, "/sys/"))
		if i%4 == 0 {
			file(fmt.Sprintf("/sys/block/dm-%d/dm/uuid", dm), fmt.Sprintf("mpath-36001405%025d\n", dm))
			file(fmt.Sprintf("/sys/fs/ext4/dm-%d/errors_count", dm), "0\n")
			fmt.Fprintf(&links, "/sys/dev/block/253:%d -> ../../devices/virtual/block/dm-%d\n", dm, dm)
			fmt.Fprintf(&table, "%d 29 253:%d / /var/lib/kubelet/plugins/kubernetes.io/csi/iscsi.csi.example/%064x/globalmount rw,relatime shared:1 - ext4 /dev/mapper/mpath%d rw\n", n+100, dm, dm, dm)
			fmt.Fprintf(&table, "%d 29 253:%d / /var/lib/kubelet/pods/00000000-0000-4000-8000-%012d/volumes/kubernetes.io~csi/pvc-%d/mount rw,relatime shared:1 - ext4 /dev/mapper/mpath%d rw\n", n+101, dm, dm, dm, dm)
			n += 2
		}
	}
	for h := range 4 {
		file(fmt.Sprintf("/sys/class/iscsi_session/session%d/targetname", h), "iqn.2003-01.org.example:a\n")
	}
	for ; n < mounts; n++ {
		if n%2 == 0 {
			fmt.Fprintf(&table, "%d 29 0:%d / /var/lib/kubelet/pods/00000000-0000-4000-8000-%012d/volumes/kubernetes.io~projected/kube-api-access rw,relatime shared:1 - tmpfs tmpfs rw,size=1916496k,inode64,noswap\n", n+100, n, n)
			continue
		}
		fmt.Fprintf(&table, "%d 28 0:%d / /run/containerd/io.containerd.runtime.v2.task/k8s.io/%064x/rootfs rw,relatime shared:1 - overlay overlay rw,lowerdir=%s,upperdir=/var/lib/containerd/fs,workdir=/var/lib/containerd/work\n", n+100, n, n, strings.Repeat("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs:", 6))
	}
	file("/proc/1/mountinfo", table.String())
	ar.Files = append(ar.Files, txtar.File{Name: "links", Data: links.Bytes()})
	return largeHost{hosttest.New(b, &ar).Tree}
}

// BenchmarkDisks shows that a pass grows with the host and no faster.
func BenchmarkDisks(b *testing.B) {
	for _, size := range []struct{ disks, mounts int }{{1000, 2500}, {2000, 5000}, {4000, 10000}} {
		b.Run(fmt.Sprintf("disks=%d/mounts=%d", size.disks, size.mounts), func(b *testing.B) {
			in := Input{Host: newLargeHost(b, size.disks, size.mounts), Now: time.Unix(1795262400, 0), Memory: NewMemory()}
			b.ReportAllocs()
			for b.Loop() {
				in.Memory.Begin()
				r, err := DefaultDisks().Check(context.Background(), in)
				if err != nil || len(r.Findings) > 0 {
					b.Fatalf("%v, %v", r.Findings, err)
				}
			}
		})
	}
}
