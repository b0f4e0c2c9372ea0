package probes

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/unit"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Disks checks block devices, what is mounted from them, and the names by which
// the host's configuration finds them again after a reboot.
type Disks struct {
	Common
	// LeftoverAfter is how long a device or a staged volume that nothing uses
	// may stay before it is told.
	LeftoverAfter Duration `json:"leftoverAfter,omitempty"`
	// ThinPoolWarnAt and ThinPoolCriticalAt are the shares of a thin pool's
	// data or metadata in use at which it is told.
	ThinPoolWarnAt     Percent `json:"thinPoolWarnAt,omitempty"`
	ThinPoolCriticalAt Percent `json:"thinPoolCriticalAt,omitempty"`
}

// DefaultDisks returns the default settings.
func DefaultDisks() Disks {
	return Disks{
		LeftoverAfter:      Duration(10 * time.Minute),
		ThinPoolWarnAt:     85,
		ThinPoolCriticalAt: 95,
	}
}

// Name implements [Probe].
func (Disks) Name() string { return "disks" }

// Condition implements [Probe].
func (Disks) Condition() string { return ConditionPrefix + "DiskProblem" }

// Wakes implements [Probe]. A file system that fails is in the kernel's log
// alone: neither the mount table nor a uevent tells.
func (Disks) Wakes(Require) Wakes {
	return Wakes{
		Mounts:     true,
		Subsystems: []string{"block", "nvme", "scsi"},
		Files:      followed("/etc/fstab", "/dev/disk/by-id/"),
		UnitFiles:  true, // mount units
		KernelLog: []string{
			"EXT4-fs", "JBD2:", "XFS (", "BTRFS", "Buffer I/O error", "I/O error, dev ", "rejecting I/O to offline device", "device offlined",
			"Disk failure on ", "device-mapper: thin:",
		},
	}
}

// Rules implements [Probe].
func (Disks) Rules() []finding.Rule {
	return []finding.Rule{
		{
			Reason: "RequiredDeviceMissing", Severity: finding.Critical,
			Means:      "A device the configuration requires is not on this host, or is smaller than required.",
			Do:         "Attach the device, or correct the name under require.devices; the names there are stand in /dev/disk.",
			HoldBefore: 10 * time.Second, HoldWhy: "udev takes a link away and puts it back while it handles a change of the device; told at once when no disk here claims the name in udev's records",
		},
		{
			Reason: "RequiredDeviceNotMounted", Severity: finding.Critical,
			Means:      "A required device is there but not mounted where it must be, or with another file system.",
			Do:         "Mount it (systemctl start the mount unit, mount -a) and read the unit's log for why it was not.",
			HoldBefore: 10 * time.Second, HoldWhy: "a device and its mount do not appear in the same instant",
		},
		{
			Reason: "MountedDeviceGone", Severity: finding.Critical,
			Means: "The device below a mounted file system no longer exists; writes are lost even where the kernel accepts them.",
			Do:    "Stop what uses the mount, unmount it, bring the device back and check the file system before mounting it again.",
		},
		{
			Reason: "FilesystemReadOnly", Severity: finding.Critical,
			Means: "After an error a file system refuses writes; mount tables and statvfs may still call it writable.",
			Do:    "Stop what uses it, unmount it, find the cause in the kernel log, run fsck (xfs_repair) and mount it again.",
		},
		{
			Reason: "FilesystemErrors", Severity: finding.Warning,
			Means: "A file system found errors in itself since it was mounted and goes on writing (errors=continue).",
			Do:    "Plan a time to unmount it and run e2fsck -f, which also clears the count; consider errors=remount-ro.",
		},
		{
			Reason: "MountSourceStale", Severity: finding.Warning,
			Means:      "The name by which fstab, a mount unit or the configuration finds a device now leads to another device than the mounted one, or to none.",
			Do:         "Find out which of the two devices is meant before the next reboot or remount picks the named one.",
			HoldBefore: 10 * time.Second, HoldWhy: "udev takes a link away and puts it back while it handles a change of the device",
		},
		{
			Reason: "UnstableDeviceName", Severity: finding.Warning,
			Means: "fstab or a mount unit names a device by the order in which the kernel found it, on a host with more than one disk.",
			Do:    "Write UUID=, or a name from /dev/disk/by-id, in its place (blkid and ls -l /dev/disk/by-id tell them).",
		},
		{
			Reason: "DuplicateDeviceID", Severity: finding.Critical,
			Means:      "Two disks carry one identity although their size, serial number or target shows that they are two; udev and multipath take them for one, and data meant for one is written to the other.",
			Do:         "Give one of the two an identity of its own on the storage system (clones and copied targets need a new serial or wwid). Where two arrays mirror one volume under one identity, mute the finding for it.",
			HoldBefore: time.Minute, HoldWhy: "a volume that grows is rescanned path by path, and its paths differ in size meanwhile",
		},
		{
			Reason: "DeviceOffline", Severity: finding.Critical, Also: []finding.Severity{finding.Warning},
			Means:     "The kernel gave a disk up, or waits for it; a warning while a multipath map still has another way to it, or nothing uses it.",
			Do:        "Look at the path to the disk: cable, switch, target, session; the kernel log says when and why it went.",
			HoldClear: 30 * time.Second, HoldWhy: "a failing path comes and goes",
		},
		{
			Reason: "DeviceMissingFromArray", Severity: finding.Warning,
			Means: "An array lacks a member; depending on its level one more failure loses its data.",
			Do:    "Replace the disk and add it (mdadm --manage /dev/mdX --add), then watch /proc/mdstat.",
		},
		{
			Reason: "ThinPoolNearFull", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
			Means: "A device-mapper thin pool is nearly full, full, or has failed; at full, writes of every volume in it hang or fail.",
			Do:    "Extend the pool (lvextend, for metadata lvextend --poolmetadatasize) or free space in it (fstrim, removing snapshots).",
		},
		{
			Reason: "MountUnresponsive", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
			Means:      "A network or CSI mount does not answer, or answers with an error only; critical when processes are stuck on it or a pod has it.",
			Do:         "Restore the server or the CSI driver behind it; processes stuck on it end when it answers. umount -f or -l helps when it will not.",
			HoldBefore: 30 * time.Second, HoldWhy: "a file server that fails over is silent for some seconds",
		},
		{
			Reason: "LeftoverDevice", Severity: finding.Warning, Also: []finding.Severity{finding.Info},
			Means: "Something a detached volume left behind: a disk that is offline or of size 0 and unused, or a staged volume no pod uses. Information where only the kubelet's record of a staged volume is left, without a mount.",
			Do:    "Make sure the volume is detached, then echo 1 > /sys/block/DISK/device/delete, or unmount the staging path; restarting the kubelet often cleans up the latter.",
		},
		{
			Reason: "MountedVolumeDetached", Severity: finding.Critical,
			Means:      "A volume is mounted here for a pod, and the cluster has no longer attached it to this node: it may be given to another node, and two nodes that write destroy its file system. It follows a forced detachment: a node that was silent, the out-of-service taint, a VolumeAttachment deleted by hand.",
			Do:         "Find out whether another node has the volume (kubectl get volumeattachments). Then stop the pod here (cordon the node, delete the pod) and see that the mount goes; when it does not, restart the kubelet or reboot the node. Check the file system before it is mounted again if both have written.",
			HoldBefore: time.Minute, HoldWhy: "the lists of the Node and the mounts are not of one moment",
		},
		{
			Reason: "AttachedVolumeMissing", Severity: finding.Warning,
			Means:      "The cluster has attached a volume to this node and the kubelet wants it for a pod, but nothing of it is mounted here. The message says whether a disk of its name is here.",
			Do:         "kubectl describe the pod, and read the log of the CSI driver's pod on this node. Where no disk bears the volume's name look at the storage system or hypervisor, the paths to it and the kernel's log, and rescan; deleting the pod has the volume detached and attached again.",
			HoldBefore: 5 * time.Minute, HoldWhy: "making or checking a large file system takes minutes before it is mounted",
		},
		{
			Reason: "LeftoverAttachment", Severity: finding.Info, Also: []finding.Severity{finding.Warning},
			Means: "The cluster keeps a volume attached to this node that neither the kubelet wants nor the host has mounted, for longer than probes.disks.leftoverAfter; it can not move to another node. A warning where the driver says that it can not detach it.",
			Do:    "kubectl describe the VolumeAttachment that the evidence names, and read the log of the driver's controller (external-attacher). Take its finalizer off only when the storage system has the volume detached.",
		},
		{
			Reason: "LeftoverFlexVolume", Severity: finding.Info,
			Means: "The kubelet's plugin directory has a FlexVolume driver of which no pod here has a volume, or a folder without its executable. FlexVolume is deprecated; the kubelet runs what lies there as root.",
			Do:    "Remove the folder when nothing in the cluster uses the driver any more: no PersistentVolume and no pod with flexVolume, and no DaemonSet that installs it again.",
		},
	}
}

// Validate implements [Probe].
func (p Disks) Validate() error {
	errs := []error{positive("leftoverAfter", p.LeftoverAfter)}
	if p.ThinPoolWarnAt <= 0 {
		errs = append(errs, fieldErr("thinPoolWarnAt", "want more than 0%%"))
	}
	if p.ThinPoolWarnAt > p.ThinPoolCriticalAt {
		errs = append(errs, fieldErr("thinPoolWarnAt", "%s is above thinPoolCriticalAt, %s", p.ThinPoolWarnAt, p.ThinPoolCriticalAt))
	}
	return errors.Join(errs...)
}

// passingAfter is how long a device may be in a state that should pass, such as
// "blocked" or "connecting".
const passingAfter = 30 * time.Second

// diskPass is what one pass of the probe knows.
type diskPass struct {
	Disks
	Input
	result   finding.Result
	told     map[finding.Key]bool
	errs     []error
	tree     *blockTree
	devices  blockDevices
	declared []declaredMount
	mounts   mountTable
	// mounted are the mounted block devices, in the order of the mount table.
	mounted []*mountedDevice
	// onDisk is mounted by every device it lies on; see usersOf.
	onDisk map[string][]*mountedDevice
	// required maps disks to the names the configuration requires them by.
	required map[string]string
	// claims maps the names udev has for disks to the disks; see explainMissing.
	claims map[string]claim
	events *filesystemEvents

	// kubeletRoots, csiMounts, node and its lists are read when they are first needed.
	kubeletRoots    []string
	csiMounts       *csiMounts
	node            *Node
	attached, inUse map[csiVolume]bool
	// counted is how many volumes of the Node were held against the mounts.
	counted int
	// answers are those of the API server that this pass needs, asked how often it
	// was asked; failed: that it does not answer is told.
	answers attachmentAnswers
	asked   int
	failed  bool
}

// claim is a disk that says a name in /dev is its own.
type claim struct{ disk, record string }

// mountedDevice is a block device with its mounts.
type mountedDevice struct {
	Dev host.DevNum
	// Name is empty when the device is gone.
	Name   blockName
	Gone   bool
	Mounts []mount
}

func (d *mountedDevice) fsType() string { return d.Mounts[0].FSType }

// superOptions are the options of the file system (mountinfo field 11), the
// same for all its mounts.
func (d *mountedDevice) superOptions() string { return d.Mounts[0].VFSOptions }

// tell adds a finding. Subject and message leave the host, the evidence does
// not, and names of volumes that stand in a pod need not be unique on a node.
func (p *diskPass) tell(f finding.Finding) {
	f.Subject, f.Message = hideInitiatorNames(f.Subject), hideInitiatorNames(f.Message)
	first := f.Subject
	for n := 2; p.told[f.Key()]; n++ {
		f.Subject = first + " (" + strconv.Itoa(n) + ")"
	}
	p.told[f.Key()] = true
	p.result.Add(f)
}

// iscsiName finds iSCSI names, which udev and the kubelet put into paths.
var iscsiName = regexp.MustCompile(`iqn\.\d{4}-\d{2}\.\S+?(-lun-\d+|/|[\s,;)"]|$)`)

// hideInitiatorNames puts the beginning of its hash in the place of an iSCSI name.
func hideInitiatorNames(s string) string {
	if !strings.Contains(s, "iqn.") {
		return s
	}
	return iscsiName.ReplaceAllStringFunc(s, func(found string) string {
		end := iscsiName.FindStringSubmatch(found)[1]
		h := sha256.Sum256([]byte(strings.TrimSuffix(found, end)))
		return "iqn-" + hex.EncodeToString(h[:6]) + end
	})
}

func (p *diskPass) fail(err error) {
	if err != nil {
		p.errs = append(p.errs, err)
	}
}

// Check implements [Probe].
func (p Disks) Check(ctx context.Context, in Input) (finding.Result, error) {
	pass := &diskPass{Disks: p, Input: in, tree: newBlockTree(in.Host), told: map[finding.Key]bool{}, required: map[string]string{}}
	var err error
	pass.devices, err = pass.tree.inventory(ctx, in)
	pass.fail(err)
	pass.declared, err = declaredMounts(ctx, in)
	pass.fail(err)
	pass.mounts, err = readMounts(ctx, in, pass.filter())
	pass.fail(err)
	pass.groupMounts(ctx)

	pass.checkGone(ctx)
	pass.checkRawGone(ctx)
	for _, d := range pass.mounted {
		pass.checkFilesystem(ctx, d)
	}
	asked := pass.checkAnswers(ctx)
	pass.checkRequired(ctx)
	pass.checkSources(ctx)
	pass.checkNames(ctx)
	pass.checkIdentities(ctx)
	pass.checkDisks(ctx)
	pass.checkNVMe(ctx)
	pass.checkArrays(ctx)
	pass.checkThinPools(ctx)
	pass.checkStaged(ctx)
	pass.checkVolumes(ctx)
	pass.checkFlexVolumes(ctx)

	pass.summarise(asked)
	return pass.result, errors.Join(pass.errs...)
}

func (p *diskPass) summarise(asked int) {
	n := len(p.devices.Disks)
	if n == 0 && len(p.mounted) == 0 && asked == 0 && len(p.Require.Devices) == 0 {
		p.result.NotApplicable = true
		p.result.Summary = "no block device here and none required"
		return
	}
	parts := []string{countOf(len(p.mounted), "mounted block device", "mounted block devices"), countOf(n, "disk", "disks")}
	if asked > 0 {
		parts = append(parts, countOf(asked, "network, CSI or XFS mount asked", "network, CSI or XFS mounts asked"))
	}
	if p.counted > 0 {
		parts = append(parts, countOf(p.counted, "attached volume compared", "attached volumes compared"))
	}
	if n := len(p.Require.Devices); n > 0 {
		parts = append(parts, countOf(n, "required device looked for", "required devices looked for"))
		if len(p.result.Findings) == 0 && len(p.errs) == 0 {
			parts[len(parts)-1] = countOf(n, "required device present", "required devices present")
		}
	}
	p.result.Summary = strings.Join(parts, ", ")
}

// filter keeps, besides what is always of interest, whatever is mounted where a
// block device should be.
func (p *diskPass) filter() mountFilter {
	f := mountFilter{Points: map[string]bool{}}
	for _, d := range p.declared {
		if d.isDevice() {
			f.Points[d.Point] = true
		}
	}
	for _, d := range p.Require.Devices {
		if d.MountedAt != "" {
			f.Points[d.MountedAt] = true
		}
	}
	return f
}

// groupMounts gathers the mounts of each block device and looks the device up:
// mountinfo -> maj:min -> sysfs.
func (p *diskPass) groupMounts(ctx context.Context) {
	byDev := map[host.DevNum]*mountedDevice{}
	sources := map[string]host.DevNum{}
	for _, m := range p.mounts.Mounts {
		dev := m.Dev
		if dev.Major == 0 {
			// btrfs has a device number of its own for each subvolume; the
			// source is all that leads to a disk.
			if m.FSType != "btrfs" {
				continue
			}
			var ok bool
			if dev, ok = sources[m.Source]; !ok {
				var err error
				if dev, err = p.tree.resolve(ctx, m.Source); err != nil {
					p.fail(unlessGone(err))
					// Its own number stands for a device that is gone;
					// the root's source may be a name from the initramfs.
					if dev = (host.DevNum{}); isGone(err) && m.Source != "/dev/root" && !strings.HasPrefix(m.Source, "/dev/disk/") {
						dev = m.Dev
					}
				}
				sources[m.Source] = dev
			}
			if dev == (host.DevNum{}) {
				continue
			}
		}
		d := byDev[dev]
		if d == nil {
			d = &mountedDevice{Dev: dev}
			byDev[dev] = d
			p.mounted = append(p.mounted, d)
		}
		d.Mounts = append(d.Mounts, m)
	}
	if len(p.mounted) == 0 {
		return
	}
	if _, err := p.Host.Lstat(ctx, "/sys/dev/block"); err != nil {
		p.fail(fmt.Errorf("mounted devices: %w", err))
		return
	}
	for _, d := range p.mounted {
		if d.Dev.Major == 0 {
			d.Gone = true
			continue
		}
		name, err := p.tree.byNumber(ctx, d.Dev)
		switch {
		case err == nil:
			d.Name = name
		case isGone(err):
			d.Gone = true
		default:
			p.fail(err)
		}
	}
}

// checkGone tells mounts whose device the kernel no longer has. The mount table
// and sysfs are not read in one instant: a volume that is just being detached
// is unmounted first, so what seems gone is looked up in the table again.
func (p *diskPass) checkGone(ctx context.Context) {
	if !slices.ContainsFunc(p.mounted, func(d *mountedDevice) bool { return d.Gone }) {
		return
	}
	again, err := readMounts(ctx, p.Input, mountFilter{})
	if err != nil && len(again.Mounts) == 0 {
		p.fail(err)
		return
	}
	still := map[host.DevNum]bool{}
	for _, m := range again.Mounts {
		still[m.Dev] = true
	}
	for _, d := range p.mounted {
		if !d.Gone || !still[d.Dev] {
			continue
		}
		source := fmt.Sprintf("/sys/dev/block/%d:%d", d.Dev.Major, d.Dev.Minor)
		if d.Dev.Major == 0 {
			source = shown(d.Mounts[0].Source)
		}
		subject, label, evidence := p.describe(ctx, d)
		says, more := p.clusterSaysOfGone(ctx, d)
		evidence = append(evidence, more...)
		p.tell(finding.Finding{
			Reason: "MountedDeviceGone", Severity: finding.Critical, Subject: subject,
			Message: fmt.Sprintf("%s is still mounted but its device is gone from this host: what is written there is lost%s", label, says),
			Evidence: append([]finding.Evidence{
				{Source: source, Observed: "not there", Expected: "the device below the mount"},
				{Source: d.Mounts[0].Table, Observed: mountLine(d.Mounts[0])},
			}, evidence...),
		})
	}
}

// clusterSaysOfGone is what the cluster knows of a volume whose device is gone:
// whether it was detached, or should be here.
func (p *diskPass) clusterSaysOfGone(ctx context.Context, d *mountedDevice) (string, []finding.Evidence) {
	_, v, ok := volumeOf(d.Mounts)
	if !ok || p.Cluster == nil {
		return "", nil
	}
	data, err := readVolumeData(ctx, p.Host, v)
	if err != nil {
		return "", nil
	}
	return p.clusterSays(ctx, csiVolume{data.Driver, data.Handle}, data.PV)
}

// mountLine is a mount as evidence shows it.
func mountLine(m mount) string {
	return shown(fmt.Sprintf("%d:%d %s %s - %s %s %s", m.Dev.Major, m.Dev.Minor, m.Mountpoint, m.Options, m.FSType, m.Source, m.VFSOptions))
}

// describe names a mounted device for an operator: by its PersistentVolume
// where the kubelet mounted it, else by its mount point.
func (p *diskPass) describe(ctx context.Context, d *mountedDevice) (subject, label string, evidence []finding.Evidence) {
	on := d.fsType()
	switch {
	case isNetworkFS(on):
	case d.Name.Name != "":
		on += " on " + p.called(ctx, d.Name.Name)
	default:
		on += " on " + shown(d.Mounts[0].Source)
	}
	m, v, ok := volumeOf(d.Mounts)
	if !ok {
		main := mainMount(d.Mounts)
		return shown(main.Mountpoint), fmt.Sprintf("%s (%s)", shown(main.Mountpoint), on), nil
	}
	what := "volume " + shown(v.Name)
	subject = shown(v.Name)
	if v.Name == "" {
		what, subject = "the volume staged at "+shown(m.Mountpoint), shown(m.Mountpoint)
	}
	data, err := readVolumeData(ctx, p.Host, v)
	switch {
	case err == nil:
		if data.PV != "" && data.Lifecycle != "Ephemeral" {
			what, subject = "PersistentVolume "+shown(data.PV), shown(data.PV)
		}
		if data.Driver != "" {
			on = shown(data.Driver) + ", " + on
		}
		evidence = append(evidence, finding.Evidence{Source: shown(v.Dir + "/vol_data.json"), Observed: "volumeHandle " + shown(data.Handle)})
	case v.Plugin == "csi" && v.Pod != "":
		what = "PersistentVolume " + shown(v.Name)
	}
	if v.Pod != "" {
		evidence = append(evidence, finding.Evidence{Source: m.Table, Observed: "mounted for pod " + shown(v.Pod)})
	}
	return subject, fmt.Sprintf("%s (%s)", what, on), evidence
}

// called gives a device-mapper device its own name, by which people know it.
func (p *diskPass) called(ctx context.Context, name string) string {
	if !strings.HasPrefix(name, "dm-") {
		return name
	}
	own, err := p.tree.attribute(ctx, "/sys/block/"+name+"/dm/name")
	p.fail(err)
	if own == "" {
		return name
	}
	return shown(own)
}

// volumeOf picks the mount that tells most about a volume: a pod's over the
// global one. Directories of a file system that is more than a volume (the
// host's own, with a subPath in it) do not name it.
func volumeOf(mounts []mount) (best mount, v volume, ok bool) {
	for _, m := range mounts {
		if m.Root != "/" && !isNetworkFS(m.FSType) {
			continue
		}
		found, is := volumeAt(m.Mountpoint)
		if !is || found.Dir == "" {
			continue
		}
		better := !ok || v.Global && !found.Global || v.Global == found.Global && m.Mountpoint < best.Mountpoint
		if better {
			best, v, ok = m, found, true
		}
	}
	return best, v, ok
}

// mainMount is the one to name a file system by: the whole of it before a part,
// a host's path before a container's, the shortest.
func mainMount(mounts []mount) mount {
	return slices.MinFunc(mounts, func(a, b mount) int {
		part := func(m mount) int {
			if m.Root == "/" {
				return 0
			}
			return 1
		}
		return cmp.Or(part(a)-part(b), len(a.Mountpoint)-len(b.Mountpoint), strings.Compare(a.Mountpoint, b.Mountpoint))
	})
}

// jobQueued reports whether systemd is about to mount or unmount a path.
func (p *diskPass) jobQueued(ctx context.Context, point string) bool {
	if !path.IsAbs(point) {
		return false
	}
	units, err := p.Host.Units(ctx, unit.UnitNamePathEscape(point)+".mount")
	if err != nil {
		if !errors.Is(err, host.ErrNoSystemd) && !errors.Is(err, host.ErrNotLive) {
			p.fail(fmt.Errorf("mount unit of %s: %w", shown(point), err))
		}
		return false
	}
	return len(units) == 1 && units[0].Job
}

// checkRequired looks for the devices the configuration requires.
func (p *diskPass) checkRequired(ctx context.Context) {
	for _, want := range p.Require.Devices {
		m, err := p.match(ctx, want)
		if err != nil {
			p.fail(fmt.Errorf("required device %s: %w", want.ID, err))
			continue
		}
		for _, f := range slices.Concat(m.good, m.small) {
			p.required[f.Name.Disk] = want.ID
		}
		if len(m.good) < max(want.Count, 1) {
			p.tell(p.requiredMissing(ctx, want, m))
			continue
		}
		if want.MountedAt != "" {
			p.checkMountedAt(ctx, want, m.good)
		}
	}
}

// requiredMatch is what stands behind the name of a required device.
type requiredMatch struct {
	good     []foundDevice
	small    []foundDevice
	dangling []string
	// others is how many names the directory has.
	others int
	dir    string
}

type foundDevice struct {
	Link    string
	Dev     host.DevNum
	Name    blockName
	Sectors uint64
}

// partitionLink ends the names udev gives to partitions.
var partitionLink = regexp.MustCompile(`-part\d+$`)

func (p *diskPass) match(ctx context.Context, want RequiredDevice) (requiredMatch, error) {
	m := requiredMatch{dir: path.Dir(want.ID)}
	links, err := p.expand(ctx, want.ID, &m)
	if err != nil {
		return m, err
	}
	seen := map[host.DevNum]bool{}
	for _, link := range links {
		dev, err := p.tree.resolve(ctx, link)
		if errors.Is(err, fs.ErrNotExist) {
			if _, err := p.Host.Lstat(ctx, link); err == nil {
				m.dangling = append(m.dangling, link)
			}
			continue
		}
		if err != nil {
			return m, err
		}
		if seen[dev] {
			continue
		}
		seen[dev] = true
		name, err := p.tree.byNumber(ctx, dev)
		if isGone(err) { // the node outlived the device
			m.dangling = append(m.dangling, link)
			continue
		}
		if err != nil {
			return m, err
		}
		f := foundDevice{Link: link, Dev: dev, Name: name}
		if want.MinSize != nil {
			if f.Sectors, err = p.tree.sectors(ctx, name); err != nil {
				return m, err
			}
			if f.Sectors < uint64(max(quantityUpTo(*want.MinSize, 1<<62), 0)+sectorSize-1)/sectorSize {
				m.small = append(m.small, f)
				continue
			}
		}
		m.good = append(m.good, f)
	}
	return m, nil
}

// expand lists the names that match a pattern, directory by directory. A
// pattern means whole disks unless it says -part itself.
func (p *diskPass) expand(ctx context.Context, pattern string, m *requiredMatch) ([]string, error) {
	found := []string{"/"}
	for component := range strings.SplitSeq(strings.TrimPrefix(pattern, "/"), "/") {
		if !strings.ContainsAny(component, `*?[\`) {
			for i := range found {
				found[i] = path.Join(found[i], component)
			}
			continue
		}
		var next []string
		for _, dir := range found {
			names, err := p.Host.ReadDir(ctx, dir)
			if err != nil {
				if unlessGone(err) != nil {
					return nil, err
				}
				continue
			}
			m.others += len(names)
			for _, name := range names {
				if ok, _ := path.Match(component, name); ok && (!partitionLink.MatchString(name) || strings.Contains(component, "-part")) {
					next = append(next, path.Join(dir, name))
				}
			}
		}
		found = next
	}
	return found, nil
}

func (p *diskPass) requiredMissing(ctx context.Context, want RequiredDevice, m requiredMatch) finding.Finding {
	count := max(want.Count, 1)
	f := finding.Finding{Reason: "RequiredDeviceMissing", Severity: finding.Critical, Subject: want.ID}
	switch {
	case len(m.small) > 0:
		f.Message = fmt.Sprintf("%s: %s of at least %s required, %d there", want.ID, countOf(count, "device is", "devices are"), want.MinSize, len(m.good))
	case count > 1:
		f.Message = fmt.Sprintf("%s: %d devices are required, %d there", want.ID, count, len(m.good))
	default:
		f.Message = fmt.Sprintf("the required device %s is not on this host", want.ID)
	}
	for _, s := range m.small {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: s.Name.dir() + "/size",
			Observed: strconv.FormatUint(s.Sectors*sectorSize, 10) + " bytes (" + s.Link + ")", Expected: "at least " + want.MinSize.String()})
	}
	for _, d := range m.dangling {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: shown(d), Observed: "the name is there, its device is not"})
	}
	if len(f.Evidence) == 0 {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: m.dir, Observed: fmt.Sprintf("%s under that name", countOf(len(m.good), "device", "devices")), Expected: strconv.Itoa(count)})
	}
	f = p.explainMissing(ctx, want, f)
	// While udev handles a change of a disk its record still claims the name.
	claimed := 0
	for link := range p.claims {
		if ok, _ := path.Match(strings.TrimPrefix(want.ID, "/dev/"), link); ok {
			claimed++
		}
	}
	f.Settled = len(p.claims) > 0 && claimed <= len(m.good) && len(m.small) == 0 && !partitionLink.MatchString(path.Base(want.ID))
	return f
}

// explainMissing adds why a name may be missing although its disk is there.
func (p *diskPass) explainMissing(ctx context.Context, want RequiredDevice, f finding.Finding) finding.Finding {
	if c, ok := p.udevClaims(ctx)[strings.TrimPrefix(want.ID, "/dev/")]; ok {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: c.record,
			Observed: c.disk + " claims the name, but the link is not in /dev", Expected: "a link; udevadm trigger makes it anew"})
	}
	// Azure's two sets of rules name one data disk differently.
	if lun, ok := strings.CutPrefix(want.ID, "/dev/disk/azure/scsi1/lun"); ok {
		other := "/dev/disk/azure/data/by-lun/" + lun
		if _, err := p.tree.resolve(ctx, other); err == nil {
			f.Evidence = append(f.Evidence, finding.Evidence{Source: other, Observed: "there: azure-vm-utils names LUN " + lun + " so"})
		}
	}
	return f
}

// udevClaims reads udev's record of every disk, once, when a name is missing.
// Disks it has none of are passed over: it only explains.
func (p *diskPass) udevClaims(ctx context.Context) map[string]claim {
	if p.claims != nil {
		return p.claims
	}
	p.claims = map[string]claim{}
	for _, d := range p.devices.Disks {
		dev, err := p.numberOf(ctx, d.Name)
		if err != nil {
			continue
		}
		record, err := readUdev(ctx, p.Host, dev)
		if err != nil {
			continue
		}
		for _, link := range record.Links {
			p.claims[link] = claim{d.Name, fmt.Sprintf("/run/udev/data/b%d:%d", dev.Major, dev.Minor)}
		}
	}
	return p.claims
}

func (p *diskPass) numberOf(ctx context.Context, disk string) (host.DevNum, error) {
	text, err := p.tree.attribute(ctx, "/sys/block/"+disk+"/dev")
	if err != nil {
		return host.DevNum{}, err
	}
	var d host.DevNum
	if n, _ := fmt.Sscanf(text, "%d:%d", &d.Major, &d.Minor); n != 2 {
		return host.DevNum{}, fmt.Errorf("/sys/block/%s/dev: not a device number", disk)
	}
	return d, nil
}

// checkMountedAt holds the mount at a required path against the device.
func (p *diskPass) checkMountedAt(ctx context.Context, want RequiredDevice, found []foundDevice) {
	f := finding.Finding{Reason: "RequiredDeviceNotMounted", Severity: finding.Critical, Subject: want.MountedAt}
	m, ok := p.mounts.at(want.MountedAt)
	expected := fmt.Sprintf("%s (%s)", want.ID, found[0].Name.Name)
	switch {
	case !ok:
		if len(p.mounts.Mounts) == 0 && len(p.errs) > 0 { // no mount table, and that is told
			return
		}
		f.Message = fmt.Sprintf("the required device %s (%s) is not mounted at %s: what is written there goes to another file system", want.ID, found[0].Name.Name, want.MountedAt)
		f.Evidence = []finding.Evidence{{Source: ownMountTable, Observed: "nothing mounted at " + want.MountedAt, Expected: expected}}
	case m.FSType == "autofs": // mounted at the first access
		return
	case !p.mountIsOn(ctx, m, found):
		f.Message = fmt.Sprintf("%s holds %s, not the required device %s (%s)", want.MountedAt, p.mountedFrom(ctx, m), want.ID, found[0].Name.Name)
		f.Evidence = []finding.Evidence{{Source: m.Table, Observed: mountLine(m), Expected: expected}}
	case want.FSType != "" && m.FSType != want.FSType:
		f.Message = fmt.Sprintf("%s is %s, not %s as required", want.MountedAt, m.FSType, want.FSType)
		f.Evidence = []finding.Evidence{{Source: m.Table, Observed: mountLine(m), Expected: want.FSType}}
	default:
		return
	}
	if !p.jobQueued(ctx, want.MountedAt) {
		p.tell(f)
	}
}

// mountIsOn reports whether a mount is of one of the devices, or of something
// that lies on it: a partition, a volume of LVM, a map.
func (p *diskPass) mountIsOn(ctx context.Context, m mount, found []foundDevice) bool {
	for _, d := range p.mounted {
		if !slices.ContainsFunc(d.Mounts, func(o mount) bool { return o.Info == m.Info }) {
			continue
		}
		line, err := p.tree.lineage(ctx, d.Name)
		p.fail(err)
		return slices.ContainsFunc(found, func(f foundDevice) bool { return f.Dev == d.Dev || slices.Contains(line, f.Name.Name) })
	}
	return false
}

// mountedFrom is where a mount comes from, in words.
func (p *diskPass) mountedFrom(ctx context.Context, m mount) string {
	if name, err := p.tree.byNumber(ctx, m.Dev); err == nil {
		return name.Name
	}
	return shown(m.FSType + " " + m.Source)
}

// checkSources compares the names fstab, mount units and the configuration give
// to a device with what is mounted. mountinfo never keeps the name that was
// used, except for a root that the initramfs mounted.
func (p *diskPass) checkSources(ctx context.Context) {
	names := slices.Clone(p.declared)
	for _, want := range p.Require.Devices {
		if want.MountedAt != "" && !strings.ContainsAny(want.ID, `*?[\`) {
			names = append(names, declaredMount{Spec: want.ID, Point: want.MountedAt, Source: "require.devices"})
		}
	}
	if root, ok := p.mounts.at("/"); ok && strings.HasPrefix(root.Source, "/dev/disk/") {
		names = append(names, declaredMount{Spec: root.Source, Point: "/", Source: root.Table})
	}
	stale := map[string]*finding.Finding{}
	var order []string
	for _, n := range names {
		if !n.isDevice() {
			continue
		}
		m, ok := p.mounts.at(n.Point)
		if !ok {
			continue
		}
		d := p.deviceOf(m)
		if d == nil || d.Gone || d.Name.Name == "" {
			continue
		}
		observed, message, err := p.compare(ctx, n, d)
		if err != nil {
			p.fail(fmt.Errorf("%s: %w", n.Source, err))
			continue
		}
		if observed == "" {
			continue
		}
		e := finding.Evidence{Source: n.Source, Observed: observed, Expected: d.Name.Name}
		if f := stale[n.Point]; f != nil {
			f.Evidence = append(f.Evidence, e)
			continue
		}
		stale[n.Point] = &finding.Finding{Reason: "MountSourceStale", Severity: finding.Warning, Subject: shown(n.Point), Message: message, Evidence: []finding.Evidence{e}}
		order = append(order, n.Point)
	}
	for _, point := range order {
		if !p.jobQueued(ctx, point) {
			p.tell(*stale[point])
		}
	}
}

// deviceOf finds the mounted device a mount belongs to; nil when it is none.
func (p *diskPass) deviceOf(m mount) *mountedDevice {
	i := slices.IndexFunc(p.mounted, func(d *mountedDevice) bool {
		return slices.ContainsFunc(d.Mounts, func(o mount) bool { return o.Info == m.Info })
	})
	if i < 0 {
		return nil
	}
	return p.mounted[i]
}

// compare resolves a name and says what it leads to if not to the device.
func (p *diskPass) compare(ctx context.Context, n declaredMount, d *mountedDevice) (observed, message string, err error) {
	dev, err := p.tree.resolve(ctx, n.link())
	if errors.Is(err, fs.ErrNotExist) {
		return shown(n.Spec) + " names no device",
			fmt.Sprintf("%s is mounted from %s, but %s, the name %s has for it, leads to no device: the next mount will fail", shown(n.Point), d.Name.Name, shown(n.Spec), inWords(n.Source)), nil
	}
	if err != nil || dev == d.Dev {
		return "", "", err
	}
	named, err := p.tree.byNumber(ctx, dev)
	if err != nil {
		return "", "", unlessGone(err)
	}
	// A path of a multipath map carries the map's name until udev has handled
	// the map, and a btrfs of several disks answers to each of them.
	if d.fsType() == "btrfs" && p.sameBtrfs(ctx, named, d.Name) {
		return "", "", nil
	}
	up, err := p.tree.lineage(ctx, d.Name)
	if err != nil || slices.Contains(up, named.Name) {
		return "", "", err
	}
	down, err := p.tree.lineage(ctx, named)
	if err != nil || slices.Contains(down, d.Name.Name) {
		return "", "", err
	}
	return shown(n.Spec) + " is " + named.Name,
		fmt.Sprintf("%s is mounted from %s, but %s, the name %s has for it, now is %s: the next mount takes another device", shown(n.Point), d.Name.Name, shown(n.Spec), inWords(n.Source), named.Name), nil
}

func inWords(source string) string {
	if source == "require.devices" {
		return "the agent's configuration"
	}
	return source
}

// sameBtrfs reports whether two devices are members of one btrfs.
func (p *diskPass) sameBtrfs(ctx context.Context, a, b blockName) bool {
	systems, err := p.Host.ReadDir(ctx, "/sys/fs/btrfs")
	if err != nil {
		return false
	}
	for _, s := range systems {
		members, err := p.Host.ReadDir(ctx, "/sys/fs/btrfs/"+s+"/devices")
		if err == nil && slices.Contains(members, a.Name) && slices.Contains(members, b.Name) {
			return true
		}
	}
	return false
}

// unstableName matches the names the kernel gives in the order in which it
// finds disks.
var unstableName = regexp.MustCompile(`^/dev/(sd[a-z]+|nvme\d+n\d+p?|xvd[a-z]+|vd[a-z]+|hd[a-z]+)\d*$`)

// checkNames looks for unstable names, where it matters: with a single disk
// there is nothing it could be mistaken for.
func (p *diskPass) checkNames(ctx context.Context) {
	var unstable []declaredMount
	for _, d := range p.declared {
		// noauto: mounted by hand, by somebody who looks.
		if d.isDevice() && unstableName.MatchString(d.Spec) && (!hasOption(d.Options, "noauto") || hasOption(d.Options, "x-systemd.automount")) {
			unstable = append(unstable, d)
		}
	}
	if len(unstable) == 0 {
		return
	}
	fixed := 0
	for _, d := range p.devices.Disks {
		removable, err := p.tree.attribute(ctx, "/sys/block/"+d.Name+"/removable")
		p.fail(err)
		if err == nil && removable != "1" {
			fixed++
		}
	}
	if fixed < 2 {
		return
	}
	told := map[string]int{}
	for _, d := range unstable {
		e := finding.Evidence{Source: d.Source, Observed: shown(d.Spec + " " + d.Point), Expected: "UUID= or a name from /dev/disk/by-id"}
		if i, ok := told[d.Spec]; ok {
			p.result.Findings[i].Evidence = append(p.result.Findings[i].Evidence, e)
			continue
		}
		told[d.Spec] = len(p.result.Findings) // where tell appends it
		p.tell(finding.Finding{
			Reason: "UnstableDeviceName", Severity: finding.Warning, Subject: d.Spec,
			Message:  fmt.Sprintf("%s names %s, which may be another of this host's %d disks after the next reboot", d.Source, d.Spec, fixed),
			Evidence: []finding.Evidence{e},
		})
	}
}
