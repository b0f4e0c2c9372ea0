package probes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// The two names of a volume that the kubelet and the attach/detach controller
// compute, of Kubernetes 1.36.3 (TestInstallAndRemove has the controller compute
// one).
func TestVolumeNames(t *testing.T) {
	v, ok := parseVolumeName("kubernetes.io/csi/ebs.csi.aws.com^vol-0123456789abcdef0")
	if want := (csiVolume{"ebs.csi.aws.com", "vol-0123456789abcdef0"}); !ok || v != want {
		t.Errorf("%v, %t", v, ok)
	}
	// printf %s%s%s HANDLE DRIVER NODE | sha256sum; printf %s HANDLE | sha256sum
	if got, want := v.attachment("n1"), "csi-d8db562bf10177e702b10c8d07e7281427d72f6277af49829bc4b06a145fd6e1"; got != want {
		t.Errorf("attachment %s, want %s", got, want)
	}
	if got, want := v.stagedIn(), "ebs.csi.aws.com/7f0b2e31ddb1b3a849f76dd4a2ae35279a9d823391976605d7dcd0e593f57812"; got != want {
		t.Errorf("staged in %s, want %s", got, want)
	}
	for _, other := range []string{"", "kubernetes.io/csi/", "kubernetes.io/csi/x", "kubernetes.io/csi/^h", "kubernetes.io/csi/d^", "kubernetes.io/fc/x^y", "flexvolume-acme/old/x"} {
		if v, ok := parseVolumeName(other); ok {
			t.Errorf("%q is %v", other, v)
		}
	}
}

func TestCSIMountAt(t *testing.T) {
	const csi = "/var/lib/kubelet/plugins/kubernetes.io/csi/"
	const pod = "/data/kubelet/pods/f39a9895-89b1-4487-a4ce-f04d831b5508/"
	type is struct {
		Staged, Dir string
		Pod         bool
	}
	for point, want := range map[string]is{
		csi + "d/12ab/globalmount":                    {"d/12ab", "", false},
		csi + "pv/pvc-1/globalmount":                  {"pv/pvc-1", csi + "pv/pvc-1", false},
		csi + "volumeDevices/staging/pvc-1/x":         {"volumeDevices/pvc-1", csi + "volumeDevices/pvc-1/data", false},
		csi + "volumeDevices/publish/pvc-1/8dbb":      {"volumeDevices/pvc-1", csi + "volumeDevices/pvc-1/data", true},
		csi + "volumeDevices/pvc-1/dev/8dbb":          {"volumeDevices/pvc-1", csi + "volumeDevices/pvc-1/data", true},
		pod + "volumes/kubernetes.io~csi/pvc-1/mount": {"", pod + "volumes/kubernetes.io~csi/pvc-1", true},
		pod + "volumes/kubernetes.io~nfs/shared":      {},
		pod + "volume-subpaths/shared/main/0":         {},
		csi + "globalmount":                           {},
		"/mnt/globalmount":                            {},
		csi + "volumeDevices/":                        {},
	} {
		staged, dir, pod := csiMountAt(point)
		if d := cmp.Diff(want, is{staged, dir, pod}); d != "" {
			t.Errorf("%s: %s", point, d)
		}
	}
}

// Names that udev gives disks of several clouds and systems, and the handles of the
// volumes they are.
func TestBearsID(t *testing.T) {
	for _, tt := range []struct {
		link, id string
		want     bool
	}{
		{"nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0", "vol-0123456789abcdef0", true},
		{"wwn-0x6000c29a0b0c0d0e0f00112233445566", "6000C29a-0b0c-0d0e-0f00-112233445566", true},
		{"virtio-0b9b7c0e-7f0a-4a3a-9", "0b9b7c0e-7f0a-4a3a-9d8e-6d7c5b4a3f2e", true},
		{"virtio-0b9b7c0e-7f0a-4a3a", "0b9b7c0e-7f0a-4a3a-9d8e-6d7c5b4a3f2e", false},
		{"scsi-0HC_Volume_12345678", "12345678", true},
		{"scsi-0Google_PersistentDisk_data-7", "data-7", false}, // in too many names
		{"virtio-ROOT", "", false},
	} {
		if got := bearsID(tt.link, tt.id); got != tt.want {
			t.Errorf("%s, volume %q: %t", tt.link, tt.id, got)
		}
	}
}

// kubeletHost is the small host with a kubelet, more mounts and more sections.
func kubeletHost(t *testing.T, mounts, sections string) *hosttest.Host {
	t.Helper()
	const last = "- xfs /dev/sda rw\n"
	text := strings.Replace(strings.Replace(smallHost, "1 systemd\n", "1 systemd\n640 kubelet\n", 1), last, last+mounts, 1)
	return hosttest.Parse(t, text+"-- treebin/proc/640/cmdline --\n/usr/bin/kubelet\\x00\n-- statmount --\n* dev=0:0\n"+sections)
}

// vol_data.json is the kubelet's, but what it says is a driver's choice.
func TestHostileVolumeData(t *testing.T) {
	dir := "/var/lib/kubelet/pods/f39a9895-89b1-4487-a4ce-f04d831b5508/volumes/kubernetes.io~csi/pvc-1"
	host := func(data string) *hosttest.Host {
		return kubeletHost(t, "31 29 0:77 / "+dir+"/mount rw - tmpfs tmpfs rw\n", "-- tree"+dir+"/vol_data.json --\n"+data+"\n")
	}
	for name, data := range map[string]string{"not JSON": "{", "another type": `{"volumeHandle": 1}`, "nothing": "{}", "escapes": `{"driverName":"\u001b[2J","volumeHandle":"\n^"}`} {
		t.Run(name, func(t *testing.T) {
			cluster := fixedCluster{node: Node{Name: "n1", VolumesInUse: []string{"kubernetes.io/csi/d^h"}, VolumesAttached: []string{"kubernetes.io/csi/d^h"}}, t: t}
			in := Input{Host: host(data), Cluster: &cluster, Now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Memory: NewMemory()}
			in.Memory.Begin()
			r, err := DefaultDisks().Check(context.Background(), in)
			// What can not be read may be the volume that seems to be missing.
			unread := name == "not JSON" || name == "another type"
			if unread != (err != nil) || unread != (len(r.Findings) == 0) {
				t.Errorf("%v, %v", r.Findings, err)
			}
		})
	}
}

// fixedCluster has every volume attached.
type fixedCluster struct {
	node  Node
	asked int
	err   error
	t     *testing.T
}

func (c *fixedCluster) Node() (Node, bool) { return c.node, true }
func (c *fixedCluster) Version(context.Context) (string, error) {
	return "", errors.New("not asked for")
}
func (c *fixedCluster) Claim(context.Context, string) (string, error) {
	return "shop/data", nil
}

func (c *fixedCluster) Attachment(context.Context, string) (Attachment, bool, error) {
	c.asked++
	return Attachment{Volume: fmt.Sprintf("pvc-%d", c.asked), Attached: true}, true, c.err
}

// A node that loses all its volumes at once asks for a few in each pass, and for
// none twice.
func TestManyVolumesMissing(t *testing.T) {
	cluster := &fixedCluster{node: Node{Name: "n1"}, t: t}
	for i := range 100 {
		cluster.node.VolumesAttached = append(cluster.node.VolumesAttached, fmt.Sprintf("kubernetes.io/csi/d^h%d", i))
	}
	cluster.node.VolumesInUse = cluster.node.VolumesAttached
	h := kubeletHost(t, "", "")
	in := Input{Host: h, Cluster: cluster, Now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Memory: NewMemory()}
	told := 0
	for pass := range 20 {
		before := cluster.asked
		in.Memory.Begin()
		r, err := DefaultDisks().Check(context.Background(), in)
		if err != nil || len(r.Findings) < told {
			t.Fatalf("pass %d: %d findings, %d before: %v", pass, len(r.Findings), told, err)
		}
		told = len(r.Findings)
		if n := cluster.asked - before; n > mostAsked {
			t.Errorf("pass %d asked %d times", pass, n)
		}
		in.Now = in.Now.Add(time.Minute)
	}
	if told != 100 || cluster.asked != 100 {
		t.Errorf("%d told after %d questions, want 100 and 100", told, cluster.asked)
	}
	in.Memory.Begin()
	r, err := DefaultDisks().Check(context.Background(), in)
	if err != nil {
		t.Fatal(err)
	}
	if f := r.Findings[0]; f.Severity != finding.Warning || f.Reason != "AttachedVolumeMissing" {
		t.Errorf("%v", f)
	}
}

// What was found well is compared again as soon as anything of it changes, and what
// is not well in every pass.
func TestVolumesAreComparedAgain(t *testing.T) {
	dir := "/var/lib/kubelet/pods/f39a9895-89b1-4487-a4ce-f04d831b5508/volumes/kubernetes.io~csi/pvc-1"
	h := kubeletHost(t, "31 29 0:77 / "+dir+"/mount rw - tmpfs tmpfs rw\n",
		"-- dirs --\n/var/lib/kubelet/plugins/kubernetes.io/csi/d\n-- tree"+dir+"/vol_data.json --\n"+`{"driverName":"d","volumeHandle":"h","specVolID":"pvc-1"}`+"\n")
	cluster := &fixedCluster{t: t, node: Node{Name: "n1", VolumesInUse: []string{"kubernetes.io/csi/d^h"}, VolumesAttached: []string{"kubernetes.io/csi/d^h"}}}
	in := Input{Host: h, Cluster: cluster, Now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Memory: NewMemory()}
	pass := func(want ...string) {
		t.Helper()
		in.Now = in.Now.Add(11 * time.Minute)
		in.Memory.Begin()
		r, err := DefaultDisks().Check(context.Background(), in)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range r.Findings {
			got = append(got, f.Reason+" "+f.Subject)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	pass()
	pass()
	// The mount goes, and comes back.
	table := h.Path("/proc/1/mountinfo")
	before, err := os.ReadFile(table)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(table, []byte(strings.Split(string(before), "31 29 0:77")[0]))
	pass("AttachedVolumeMissing pvc-1")
	pass("AttachedVolumeMissing pvc-1")
	write(table, before)
	pass()
	// The cluster's lists change.
	cluster.node.VolumesInUse = nil
	pass()
	cluster.node.VolumesAttached, cluster.node.VolumesInUse = nil, []string{"kubernetes.io/csi/d^h"}
	pass() // its attachment is there: the list is on its way
	cluster.node.VolumesAttached = cluster.node.VolumesInUse
	pass()
	// A folder is left.
	folder := h.Path("/var/lib/kubelet/plugins/kubernetes.io/csi/d/12ab")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	write(folder+"/vol_data.json", []byte(`{"driverName":"d","volumeHandle":"left"}`))
	pass()
	pass("LeftoverDevice /var/lib/kubelet/plugins/kubernetes.io/csi/d/12ab")
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	pass()
}

func FuzzParseVolumeName(f *testing.F) {
	f.Add("kubernetes.io/csi/ebs.csi.aws.com^vol-0123456789abcdef0")
	f.Add("kubernetes.io/csi/d^projects/p^q")
	f.Add("kubernetes.io/csi/^h")
	f.Add("kubernetes.io/csi/d^")
	f.Add("kubernetes.io/fc/50060e801049cfd1^0")
	f.Fuzz(func(t *testing.T, name string) {
		v, ok := parseVolumeName(name)
		if ok != (v != csiVolume{}) || ok && (v.String() != name || v.Driver == "" || v.Handle == "") {
			t.Errorf("%q is %+v, %t", name, v, ok)
		}
	})
}

func FuzzCSIMountAt(f *testing.F) {
	f.Add("/var/lib/kubelet/plugins/kubernetes.io/csi/d/12ab/globalmount")
	f.Add("/var/lib/kubelet/plugins/kubernetes.io/csi/pv/pvc-1/globalmount")
	f.Add("/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/8dbb")
	f.Add("/var/lib/kubelet/pods/f39a9895/volumes/kubernetes.io~csi/pvc-1/mount")
	f.Add("/kubernetes.io/csi/volumeDevices/staging")
	f.Add("/home/u/plugins/kubernetes.io/csi/globalmount")
	f.Fuzz(func(t *testing.T, point string) {
		if path.Clean(point) != point { // the kernel's are
			return
		}
		staged, dir, pod := csiMountAt(point)
		// vol_data.json is looked for near the mount, and nowhere else.
		const near = "/kubernetes.io"
		i := strings.LastIndex(dir, near)
		if pod && dir == "" || dir != "" && (i < 0 || !strings.HasPrefix(point, dir[:i+len(near)])) {
			t.Errorf("%q: staged %q, directory %q, pod %t", point, staged, dir, pod)
		}
	})
}

func FuzzBearsID(f *testing.F) {
	f.Add("nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0", "vol-0123456789abcdef0")
	f.Add("virtio-0b9b7c0e-7f0a-4a3a-9", "0b9b7c0e-7f0a-4a3a-9d8e-6d7c5b4a3f2e")
	f.Add("virtio-ROOT", "--------")
	f.Add("virtio-ROOT", "oot")
	f.Fuzz(func(t *testing.T, link, id string) {
		plain := lettersAndDigits(id)
		if bearsID(link, id) && (len(plain) < 8 || !strings.Contains(lettersAndDigits(link), plain[:8])) {
			t.Errorf("%q bears %q", link, id)
		}
	})
}
