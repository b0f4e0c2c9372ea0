package probes

import (
	"slices"
	"strings"

	"github.com/hosthygiene/agent/pkg/host"
)

// A family is a group of distributions that call their packages alike.
type family string

const (
	debianFamily     family = "debian"
	redHatFamily     family = "rhel"
	azureLinuxFamily family = "azurelinux"
	suseFamily       family = "suse"
)

// A capability is something storage or the cluster needs of the host, whatever
// package brings it. This table is the one place where distributions' names
// stand.
type capability struct {
	name string
	// without says what is lost when it is missing.
	without string
	// packages per family, any of which will do; the first is the one to
	// install. "" is for families that are not named.
	packages map[family][]string
	// binaries and units prove it on hosts whose packages can not be asked:
	// every binary ("a|b" is either) and, where systemd is, one of the units.
	binaries []string
	units    []string
	// builtIn tells, by os-release ID, where the host brings it without a
	// binary of its own, and by what.
	builtIn map[string]string
}

// talosKubelet: Talos runs the kubelet in an image that brings the helpers of
// the in-tree volume types (siderolabs/kubelet, Dockerfile); the host has none.
var talosKubelet = map[string]string{"talos": "the kubelet's own image"}

// capabilities by name. Names were compared with what Longhorn's, Trident's and
// HPE's installers ask for on each distribution.
var capabilities = []capability{
	{
		name: "iscsi", without: "volumes over iSCSI can not be attached on this node",
		packages: map[family][]string{"": {"open-iscsi"}, redHatFamily: {"iscsi-initiator-utils"}, azureLinuxFamily: {"iscsi-initiator-utils", "open-iscsi"}},
		binaries: []string{"iscsid", "iscsiadm"}, units: []string{"iscsid.service", "iscsid.socket", "open-iscsi.service"},
	},
	{
		name: "multipath", without: "volumes with several paths have no protection against the loss of one",
		packages: map[family][]string{"": {"multipath-tools"}, redHatFamily: {"device-mapper-multipath"}, azureLinuxFamily: {"device-mapper-multipath"}},
		binaries: []string{"multipathd", "multipath"}, units: []string{"multipathd.service"},
	},
	{
		name: "nfs", without: "NFS volumes can not be mounted on this node",
		packages: map[family][]string{"": {"nfs-utils"}, debianFamily: {"nfs-common"}, suseFamily: {"nfs-client"}},
		// GKE mounts NFS volumes with what it puts beside the kubelet.
		binaries: []string{"mount.nfs"}, builtIn: map[string]string{"talos": talosKubelet["talos"], "cos": "the node image"},
	},
	{
		name: "time", without: "nothing keeps the clock right",
		packages: map[family][]string{
			// time-daemon is the virtual package each of them provides.
			debianFamily: {"chrony", "systemd-timesyncd", "ntpsec", "ntp", "openntpd", "time-daemon"},
			"":           {"chrony", "ntpsec", "ntp", "systemd-timesyncd"},
		},
		binaries: []string{"chronyd|systemd-timesyncd|ntpd"},
		units:    []string{"chronyd.service", "chrony.service", "systemd-timesyncd.service", "ntpd.service", "ntpsec.service", "ntp.service"},
		builtIn:  map[string]string{"talos": "machined"},
	},
	{
		name: "rpcbind", without: "NFS version 3 has no port mapper",
		packages: map[family][]string{"": {"rpcbind"}},
		binaries: []string{"rpcbind"}, units: []string{"rpcbind.service", "rpcbind.socket"},
	},
	{
		name: "glusterfs", without: "GlusterFS volumes can not be mounted on this node",
		packages: map[family][]string{"": {"glusterfs-fuse"}, debianFamily: {"glusterfs-client"}, suseFamily: {"glusterfs"}},
		binaries: []string{"glusterfs", "mount.glusterfs"}, builtIn: talosKubelet,
	},
	{
		name: "cifs", without: "SMB volumes can not be mounted on this node",
		packages: map[family][]string{"": {"cifs-utils"}},
		binaries: []string{"mount.cifs"}, builtIn: talosKubelet,
	},
	{
		name: "ceph-client", without: "Ceph volumes can not be attached by the host's own tools",
		packages: map[family][]string{"": {"ceph-common"}},
		binaries: []string{"rbd", "mount.ceph"}, builtIn: talosKubelet,
	},
	{
		name: "lvm", without: "logical volumes can not be managed or activated on this node",
		packages: map[family][]string{"": {"lvm2"}},
		binaries: []string{"lvm"},
	},
	{
		name: "nvme", without: "NVMe over fabrics volumes can not be connected on this node",
		packages: map[family][]string{"": {"nvme-cli"}},
		binaries: []string{"nvme"},
	},
	{
		name: "luks", without: "encrypted volumes can not be opened on this node",
		packages: map[family][]string{"": {"cryptsetup"}, debianFamily: {"cryptsetup", "cryptsetup-bin"}},
		binaries: []string{"cryptsetup"},
	},
	{
		name: "devicemapper", without: "device-mapper volumes can not be looked at or repaired by hand",
		packages: map[family][]string{"": {"device-mapper"}, debianFamily: {"dmsetup"}},
		binaries: []string{"dmsetup"},
	},
	{
		name: "mdraid", without: "software RAID can not be assembled or repaired on this node",
		packages: map[family][]string{"": {"mdadm"}},
		binaries: []string{"mdadm"},
	},
	{
		name: "xfs", without: "XFS volumes can not be made, checked or grown on this node",
		packages: map[family][]string{"": {"xfsprogs"}},
		binaries: []string{"mkfs.xfs"}, builtIn: talosKubelet,
	},
	{
		name: "ext4", without: "ext4 volumes can not be made, checked or grown on this node",
		packages: map[family][]string{"": {"e2fsprogs"}},
		binaries: []string{"mkfs.ext4"}, builtIn: talosKubelet,
	},
	{
		name: "btrfs", without: "Btrfs volumes can not be made or checked on this node",
		packages: map[family][]string{"": {"btrfs-progs"}, suseFamily: {"btrfsprogs"}},
		binaries: []string{"mkfs.btrfs"},
	},
	{
		name: "sg3", without: "storage drivers that rescan or ask SCSI devices by sg_inq do not work on this node",
		packages: map[family][]string{"": {"sg3_utils"}, debianFamily: {"sg3-utils"}},
		binaries: []string{"sg_inq"},
	},
	{
		name: "lsscsi", without: "storage drivers that list SCSI devices with it do not work on this node",
		packages: map[family][]string{"": {"lsscsi"}},
		binaries: []string{"lsscsi"},
	},
	{
		name: "smart", without: "disks can not be asked for their own verdict on this node",
		packages: map[family][]string{"": {"smartmontools"}},
		binaries: []string{"smartctl"},
	},
}

// Capabilities are the names under require.packages that stand for whatever a
// distribution calls the package; every other name is a package's own.
func Capabilities() []string {
	names := make([]string, len(capabilities))
	for i, c := range capabilities {
		names[i] = c.name
	}
	return names
}

func capabilityNamed(name string) (capability, bool) {
	i := slices.IndexFunc(capabilities, func(c capability) bool { return c.name == name })
	if i < 0 {
		return capability{}, false
	}
	return capabilities[i], true
}

// capabilityOfPackage finds what a package is for, so that a literal name means
// something on hosts without packages.
func capabilityOfPackage(pkg string) (capability, bool) {
	i := slices.IndexFunc(capabilities, func(c capability) bool {
		for _, names := range c.packages {
			if slices.Contains(names, pkg) {
				return true
			}
		}
		return false
	})
	if i < 0 {
		return capability{}, false
	}
	return capabilities[i], true
}

// in returns the package names a family has for the capability.
func (c capability) in(f family) []string {
	if names, ok := c.packages[f]; ok {
		return names
	}
	if names, ok := c.packages[""]; ok {
		return names
	}
	return nil
}

// familyOf follows os-release(5): ID first, then ID_LIKE from near to far. A
// derivative that names no parent is judged by the database it has.
func familyOf(os host.OS, manager string) family {
	for _, id := range osIDs(os) {
		switch id {
		case "debian", "ubuntu":
			return debianFamily
		case "rhel", "centos", "fedora", "rocky", "almalinux", "ol", "amzn", "rhcos":
			return redHatFamily
		case "azurelinux", "azurecontainerlinux", "mariner":
			return azureLinuxFamily
		case "suse", "sles", "opensuse", "sle-micro", "sl-micro":
			return suseFamily
		}
		if strings.HasPrefix(id, "opensuse-") {
			return suseFamily
		}
	}
	switch manager {
	case "dpkg":
		return debianFamily
	case "rpm":
		return redHatFamily
	}
	return ""
}

// osIDs is the os-release ID and what it is like, nearest first.
func osIDs(os host.OS) []string { return append([]string{os.ID}, os.IDLike...) }
