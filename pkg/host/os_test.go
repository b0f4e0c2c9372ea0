package host

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	rootRW     = "29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro\n"
	rootFailed = "29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 ro,errors=remount-ro\n"
	rootRO     = "29 1 254:1 / / ro,relatime shared:1 - btrfs /dev/vda1 ro,subvol=/@\n"
	usrRO      = rootRW + "30 29 253:0 / /usr ro,relatime shared:2 - ext4 /dev/mapper/usr ro,block_validity\n"
)

func TestDetectOS(t *testing.T) {
	for name, tt := range map[string]struct {
		files map[string]string
		class OSClass
		id    string
		why   string
	}{
		"debian":     {map[string]string{"etc/os-release": "ID=debian\nVERSION_ID=\"13\"\n", "proc/1/mountinfo": rootRW}, Mutable, "debian", "ID=debian"},
		"ubuntu":     {map[string]string{"etc/os-release": "NAME=\"Ubuntu\"\nID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\n"}, Mutable, "ubuntu", ""},
		"rhel":       {map[string]string{"etc/os-release": "ID=\"rhel\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"9.6\"\n"}, Mutable, "rhel", ""},
		"rhcos":      {map[string]string{"etc/os-release": "ID=\"rhcos\"\nID_LIKE=\"rhel fedora\"\nVARIANT_ID=coreos\n"}, OSTree, "rhcos", ""},
		"rhcos 4.19": {map[string]string{"etc/os-release": "ID=\"rhel\"\nID_LIKE=\"fedora\"\nVARIANT_ID=coreos\n"}, OSTree, "rhel", "VARIANT_ID=coreos"},
		"fcos":       {map[string]string{"etc/os-release": "ID=fedora\nVARIANT_ID=coreos\n", "run/ostree-booted": ""}, OSTree, "fedora", ""},
		"ostree of a derivative": {map[string]string{"etc/os-release": "ID=endless\nID_LIKE=debian\n", "usr/bin/dpkg": "", "run/ostree-booted": ""},
			OSTree, "endless", "/run/ostree-booted"},
		"sle micro":    {map[string]string{"etc/os-release": "ID=\"sl-micro\"\nID_LIKE=\"suse\"\n"}, Transactional, "sl-micro", ""},
		"sl micro 6.2": {map[string]string{"etc/os-release": "ID=\"sles\"\nVARIANT_ID=\"transactional\"\nID_LIKE=\"suse\"\n"}, Transactional, "sles", "VARIANT_ID=transactional"},
		"immutable sles 16": {map[string]string{"etc/os-release": "ID=sles\n", "usr/sbin/transactional-update": "", "proc/1/mountinfo": rootRO},
			Transactional, "sles", "transactional-update"},
		"sles with transactional-update installed": {map[string]string{"etc/os-release": "ID=sles\n", "usr/sbin/transactional-update": "", "proc/1/mountinfo": rootRW},
			Mutable, "sles", ""},
		"flatcar":      {map[string]string{"etc/os-release": "ID=flatcar\nID_LIKE=coreos\n", "proc/1/mountinfo": usrRO}, Image, "flatcar", ""},
		"cos":          {map[string]string{"etc/os-release": "ID=cos\n"}, Image, "cos", ""},
		"bottlerocket": {map[string]string{"etc/os-release": "ID=bottlerocket\nVARIANT_ID=aws-k8s-1.33\n"}, Image, "bottlerocket", ""},
		"talos":        {map[string]string{"etc/os-release": "ID=talos\n"}, Image, "talos", ""},
		"azure linux":  {map[string]string{"etc/os-release": "ID=azurelinux\nVERSION_ID=\"3.0\"\n"}, Mutable, "azurelinux", ""},
		"azure container linux": {map[string]string{"etc/os-release": "ID=azurelinux\n", "proc/1/mountinfo": usrRO, "sys/dev/block/253:0/dm/uuid": "CRYPT-VERITY-1234-usr\n"},
			Image, "azurelinux", "dm-verity"},
		"azure container linux by name": {map[string]string{"etc/os-release": "ID=azurelinux\nVARIANT_ID=azurecontainerlinux\n"}, Image, "azurelinux", "VARIANT_ID"},
		"azure linux os guard":          {map[string]string{"etc/os-release": "ID=azurelinux\nVARIANT_ID=osguard\n"}, Image, "azurelinux", "VARIANT_ID"},
		"amazon linux 2":                {map[string]string{"etc/os-release": "ID=\"amzn\"\nID_LIKE=\"centos rhel fedora\"\nVERSION_ID=\"2\"\n"}, Mutable, "amzn", ""},
		"amazon linux 2023":             {map[string]string{"etc/os-release": "ID=\"amzn\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"2023\"\n"}, Mutable, "amzn", ""},
		"only usr/lib":                  {map[string]string{"usr/lib/os-release": "ID=debian\n"}, Mutable, "debian", ""},
		"derivative":                    {map[string]string{"etc/os-release": "ID=pop\nID_LIKE=\"ubuntu debian\"\n", "usr/bin/dpkg": ""}, Mutable, "pop", "ID_LIKE"},
		"derivative of an image":        {map[string]string{"etc/os-release": "ID=newcar\nID_LIKE=coreos\n"}, Image, "newcar", "ID_LIKE"},
		"squashfs":                      {map[string]string{"etc/os-release": "ID=homemade\n", "proc/1/mountinfo": "1 0 7:0 / / ro - squashfs /dev/loop0 ro\n"}, Image, "homemade", "squashfs"},
		"unknown":                       {map[string]string{"etc/os-release": "ID=homemade\n", "usr/bin/rpm": ""}, Mutable, "homemade", "package manager"},
		"nothing":                       {map[string]string{"etc/hostname": "x\n"}, Image, "linux", "no package manager"},
		// ext4 gave up on a failing disk: broken, not immutable.
		"failed disk":             {map[string]string{"etc/os-release": "ID=debian\n", "proc/1/mountinfo": rootFailed}, Mutable, "debian", "ID=debian"},
		"read-only usr on debian": {map[string]string{"etc/os-release": "ID=debian\n", "proc/1/mountinfo": usrRO}, Image, "debian", "/usr is mounted read-only"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeTree(t, dir, tt.files)
			tree, err := OpenTree(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer tree.Close()
			o, err := tree.OS(context.Background())
			if err != nil || o.Class != tt.class || o.ID != tt.id || !strings.Contains(o.Why, tt.why) {
				t.Errorf("%+v, %v; want class %s, ID %s, why with %q", o, err, tt.class, tt.id, tt.why)
			}
		})
	}
}

func TestOSOfTheKernel(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{
		"etc/os-release":                 "ID=debian\nVERSION_ID=13\nVARIANT_ID=x\nID_LIKE='a b'\n",
		"proc/sys/kernel/osrelease":      "6.12.1-amd64\n",
		"proc/sys/kernel/random/boot_id": "db2ecf16-568a-410b-88cb-ec4fe92a36bd\n",
		"proc/1/comm":                    "systemd\n",
		"proc/stat":                      "cpu  1 2 3\nintr 4 5\nctxt 6\nbtime 1763762496\nprocesses 7\n",
	})
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	got, err := tree.OS(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := OS{ID: "debian", VariantID: "x", VersionID: "13", IDLike: []string{"a", "b"}, Class: Mutable, Why: "os-release has ID=debian",
		Kernel: "6.12.1-amd64", Init: "systemd", BootID: "db2ecf16-568a-410b-88cb-ec4fe92a36bd", BootTime: time.Unix(1763762496, 0)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOSSaysWhatItCouldNotRead(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/os-release/a-directory": "", "proc/stat": "btime soon\n", "proc/1/comm": "init\n"})
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	o, err := tree.OS(context.Background())
	if !errors.Is(err, ErrNotRegular) || !strings.Contains(err.Error(), `btime "soon"`) || o.Init != "init" {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestParseOSRelease(t *testing.T) {
	got := parseOSRelease([]byte(`# comment
ID=debian
NAME="Debian \"GNU\"/Linux \$5"
ONE='single $x \y'
MIXED=a"b c"'d'\ e
EMPTY=
TRAIL=x # comment
HASH=a#b
  SPACED=yes
CRLF=dos` + "\r" + `
OPEN="never closed
9BAD KEY=x
no assignment
DUP=1
DUP=2
BIN=` + "\xff\x00" + `
END=\`))
	want := map[string]string{"ID": "debian", "NAME": `Debian "GNU"/Linux $5`, "ONE": `single $x \y`, "MIXED": "ab cd e", "EMPTY": "",
		"TRAIL": "x", "HASH": "a#b", "SPACED": "yes", "CRLF": "dos", "DUP": "2", "BIN": "\xff\x00"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzParseOSRelease(f *testing.F) {
	f.Add([]byte("PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"13\"\nID=debian\nHOME_URL=\"https://www.debian.org/\"\n"))
	f.Add([]byte("ID='a\\'b\"\\\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		fields := parseOSRelease(data)
		for _, key := range slices.Collect(maps.Keys(fields)) {
			if key == "" || !strings.Contains(string(data), key+"=") || len(fields[key]) > len(data) {
				t.Errorf("%q gave %q", data, fields)
			}
		}
	})
}

func TestUsrMount(t *testing.T) {
	for name, tt := range map[string]struct {
		in   string
		want usrMountInfo
	}{
		"root":          {rootRW, usrMountInfo{point: "/", dev: "254:1", fsType: "ext4"}},
		"read-only":     {rootRO, usrMountInfo{point: "/", dev: "254:1", fsType: "btrfs", ro: true}},
		"separate":      {usrRO, usrMountInfo{point: "/usr", dev: "253:0", fsType: "ext4", ro: true}},
		"rootfs first":  {"1 1 0:2 / / rw - rootfs rootfs rw\n" + rootRW, usrMountInfo{point: "/", dev: "254:1", fsType: "ext4"}},
		"other points":  {rootRW + "40 29 0:5 / /usr/local ro - tmpfs x ro\n", usrMountInfo{point: "/", dev: "254:1", fsType: "ext4"}},
		"damaged lines": {"x\n1 2 3 - \n" + rootRW + "29 1 254:1 / /usr", usrMountInfo{point: "/", dev: "254:1", fsType: "ext4"}},
		"empty":         {"", usrMountInfo{}},
	} {
		if got := usrMount([]byte(tt.in)); got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}
