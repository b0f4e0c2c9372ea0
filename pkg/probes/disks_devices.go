package probes

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// checkIdentities looks for one identity on disks that are evidently two. That
// alike disks are the paths of one is the multipath probe's concern.
func (p *diskPass) checkIdentities(ctx context.Context) {
	type key struct {
		kind     diskKind
		identity string
	}
	groups := make(map[key][]int, len(p.devices.Disks)) // of indexes
	var order []key
	for i, d := range p.devices.Disks {
		// A path whose device is gone reports size 0.
		if d.Identity == "" || d.Sectors == 0 {
			continue
		}
		k := key{d.Kind, d.Identity}
		if len(groups[k]) == 0 {
			order = append(order, k)
		}
		groups[k] = append(groups[k], i)
	}
	ports := map[string]string{}
	one := settledIn(p.Memory, "disks of one identity", p.Now)
	for _, k := range order {
		group := groups[k]
		if len(group) < 2 {
			continue
		}
		sum := uint64(0)
		for _, at := range group {
			d := p.devices.Disks[at]
			sum = one.sum(sum, d.Name, d.Link) + d.Sectors
		}
		if k.kind == scsiDisk && one.is(k.identity, sum) {
			continue
		}
		proofs := make([]diskProof, len(group))
		for i, at := range group {
			proofs[i] = p.proofOf(ctx, p.devices.Disks[at], ports)
		}
		differs := ""
		if !oneUnit(proofs) { // most hosts end here, without reading more
			p.readPages(ctx, proofs)
			differs = evidentlyTwo(proofs)
		}
		switch {
		case differs != "":
			p.duplicate(ctx, k.identity, differs, proofs)
		case !slices.ContainsFunc(proofs, func(f diskProof) bool { return f.Target == "" }):
			one.remember(k.identity, sum, p.Now)
		}
	}
}

// diskProof is what tells two disks of one identity apart.
type diskProof struct {
	disk
	// Serial is the unit's serial number, see readPages.
	Serial string
	// Target is the iSCSI target, the FC node or the NVMe subsystem; LUN the
	// unit's number there, "" when unknown.
	Target, LUN string
	// Port is the relative target port, 0 when unknown (they count from 1);
	// read only where targets differ.
	Port uint16
	// FC: Target is a node of Fibre Channel, of which an array may have one
	// for every controller.
	FC bool
	// Alone: a disk of this kind has one way to it only.
	Alone bool
}

// proofOf reads what a disk says of itself; what it does not say stays empty.
// ports remembers the targets, of which hundreds of disks share a few.
func (p *diskPass) proofOf(ctx context.Context, d disk, ports map[string]string) diskProof {
	f := diskProof{disk: d}
	dir := "/sys/block/" + d.Name
	switch d.Kind {
	case virtioDisk:
		f.Alone = true
	case nvmeDisk:
		f.Serial, _ = p.tree.attribute(ctx, dir+"/device/serial")
		f.Serial = strings.TrimSpace(f.Serial)
		f.Target, _ = p.tree.attribute(ctx, dir+"/device/subsysnqn")
	case scsiDisk:
		place := scsiTopology(d.Link)
		f.LUN = place.lun
		switch {
		case place.session != "":
			f.Target = p.portName(ctx, "/sys/class/iscsi_session/"+place.session+"/targetname", ports)
		case place.rport != "":
			f.Target, f.FC = p.portName(ctx, "/sys/class/fc_remote_ports/"+place.rport+"/node_name", ports), true
		}
	}
	return f
}

func (p *diskPass) portName(ctx context.Context, file string, ports map[string]string) string {
	name, ok := ports[file]
	if !ok {
		name, _ = p.tree.attribute(ctx, file)
		ports[file] = name
	}
	return name
}

// oneUnit reports whether all are ways to one unit of one target, of one size.
func oneUnit(proofs []diskProof) bool {
	first := proofs[0]
	return first.Target != "" && !slices.ContainsFunc(proofs, func(f diskProof) bool {
		return f.Target != first.Target || f.LUN != first.LUN || f.Sectors != first.Sectors
	})
}

// readPages reads the serial numbers of SCSI disks and, behind several targets,
// their relative target ports.
func (p *diskPass) readPages(ctx context.Context, proofs []diskProof) {
	several := slices.ContainsFunc(proofs, func(f diskProof) bool { return f.Target != proofs[0].Target })
	for i, f := range proofs {
		if f.Kind != scsiDisk {
			continue
		}
		// Not every device has these pages.
		if page, err := p.Host.ReadFileMax(ctx, "/sys/block/"+f.Name+"/device/vpd_pg80", maxAttribute); err == nil {
			proofs[i].Serial = scsiSerial(page)
		}
		if !several {
			continue
		}
		if page, err := p.Host.ReadFileMax(ctx, "/sys/block/"+f.Name+"/device/vpd_pg83", maxAttribute); err == nil {
			proofs[i].Port, _ = relativePort(page)
		}
	}
}

// evidentlyTwo says in what disks of one identity differ that one disk can not
// differ from itself in; "" when nothing proves that they are two.
func evidentlyTwo(proofs []diskProof) string {
	var sizes, serials, targets, units []string // units: with their targets
	for _, f := range proofs {
		sizes = appendNew(sizes, strconv.FormatUint(f.Sectors, 10))
		serials = appendNew(serials, f.Serial)
		targets = appendNew(targets, f.Target)
		units = appendNew(units, f.Target+" "+f.LUN)
	}
	switch {
	case proofs[0].Alone:
		return "each is a disk of its own"
	case len(serials) > 1:
		return "their serial numbers differ"
	case len(sizes) > 1 && len(units) == 1 && proofs[0].Target != "":
		return "their sizes differ (unless a path was not rescanned after the volume had grown)"
	case len(sizes) > 1:
		return "their sizes differ"
	case len(targets) > 1:
		return differentTargets(proofs)
	}
	return ""
}

func appendNew(list []string, s string) []string {
	if s == "" || slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// differentTargets tells two targets that hold a copy each from the ports of one
// array, many of which (VNX, PowerStore, Dorado, VSP) have a target name for
// every port. The ports of one device are numbered, each number once
// (SPC-4 3.1.120): the same number under two names is two devices. Units that
// do not number their ports, as of tgt, have one, and their target name is
// what there is.
func differentTargets(proofs []diskProof) string {
	names := map[uint16][]string{}
	for _, f := range proofs {
		if f.Port == 0 && f.FC {
			continue
		}
		names[f.Port] = appendNew(names[f.Port], f.Target)
		if len(names[f.Port]) > 1 {
			return "their targets differ"
		}
	}
	return ""
}

func (p *diskPass) duplicate(ctx context.Context, identity, differs string, proofs []diskProof) {
	names := make([]string, len(proofs))
	f := finding.Finding{Reason: "DuplicateDeviceID", Severity: finding.Critical, Subject: shown(identity)}
	for i, d := range proofs {
		names[i] = d.Name
		said := fmt.Sprintf("%d bytes", d.Sectors*sectorSize)
		if d.Serial != "" {
			said += ", serial " + shown(d.Serial)
		}
		if d.Target != "" {
			said += ", target " + shown(d.Target)
		}
		if d.LUN != "" {
			said += ", LUN " + d.LUN
		}
		f.Evidence = append(f.Evidence, finding.Evidence{Source: "/sys/block/" + d.Name, Observed: said})
	}
	f.Message = fmt.Sprintf("%s call themselves %s, but %s: data meant for one of them can be written to another", listed(names), shown(identity), differs)
	if link := p.contested(ctx, names); link != "" {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: "/run/udev/data", Observed: "all of them claim /dev/" + shown(link), Expected: "one device for a name"})
	}
	p.tell(f)
}

// listed is "a, b and c".
func listed(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}

// contested finds a name in /dev that all of the disks claim.
func (p *diskPass) contested(ctx context.Context, disks []string) string {
	var shared []string
	for i, name := range disks {
		dev, err := p.numberOf(ctx, name)
		if err != nil {
			return ""
		}
		record, err := readUdev(ctx, p.Host, dev)
		if err != nil {
			return ""
		}
		if i == 0 {
			shared = record.Links
			continue
		}
		shared = slices.DeleteFunc(shared, func(s string) bool { return !slices.Contains(record.Links, s) })
	}
	if len(shared) == 0 {
		return ""
	}
	return shared[0]
}

// checkDisks looks at the state of every SCSI disk: the kernel sends no event
// when it changes.
func (p *diskPass) checkDisks(ctx context.Context) {
	for _, d := range p.devices.Disks {
		if d.Kind != scsiDisk {
			continue
		}
		if d.Link != "" && len(p.result.Follow) < maxFollow {
			p.result.Follow = append(p.result.Follow, d.Unit+"/state")
		}
		lost, passing := scsiStateIsBad(d.State)
		if passing && p.Now.Sub(p.Memory.Since("state "+d.Name+" "+d.State, p.Now)) >= passingAfter {
			lost = true
		}
		if !lost && d.Sectors > 0 {
			continue
		}
		use, err := p.useOf(ctx, d.Name)
		if err != nil {
			p.fail(fmt.Errorf("what uses %s: %w", d.Name, err))
			continue
		}
		switch {
		case use.any() && lost:
			p.offline(ctx, "disk "+d.Name, d.Name, "/sys/block/"+d.Name+"/device/state", d.State, "running", use)
		case !use.any() && !passing:
			p.leftoverDisk(ctx, d, lost)
		}
	}
}

// scsiStateIsBad sorts the states of drivers/scsi/scsi_sysfs.c: lost ones stay
// until somebody acts, passing ones are normal for seconds.
func scsiStateIsBad(state string) (lost, passing bool) {
	switch state {
	case "offline", "transport-offline", "cancel", "deleted":
		return true, false
	case "blocked", "quiesce", "created", "created-blocked":
		return false, true
	}
	return false, false
}

// diskUse is what would suffer without a disk.
type diskUse struct {
	mounted []*mountedDevice
	holders []string
	swap    bool
	// raw is where its node is mounted for a pod, a raw block volume.
	raw     string
	require string
	// otherWay says how everything that uses the disk can still reach its
	// data; empty when something can not.
	otherWay string
}

func (u diskUse) any() bool {
	return len(u.mounted) > 0 || len(u.holders) > 0 || u.swap || u.raw != "" || u.require != ""
}

// useOf finds out who uses a disk; it is asked for the few that look bad.
func (p *diskPass) useOf(ctx context.Context, name string) (diskUse, error) {
	var u diskUse
	var err error
	if u.holders, err = p.tree.holders(ctx, name); err != nil {
		return u, err
	}
	if u.mounted, err = p.usersOf(ctx, name); err != nil {
		return u, err
	}
	for _, m := range p.mounts.Mounts {
		// A raw block volume is the device's node, mounted on a file.
		if m.FSType == "devtmpfs" && m.Root == "/"+name {
			u.raw = m.Mountpoint
		}
	}
	if len(u.mounted) == 0 && len(u.holders) == 0 {
		if u.swap, err = p.isSwap(ctx, name); err != nil {
			return u, err
		}
		u.require = p.required[name]
	}
	var maps []string
	for _, h := range u.holders {
		uuid, err := p.tree.attribute(ctx, "/sys/block/"+h+"/dm/uuid")
		if err != nil {
			return u, err
		}
		alive := false
		if strings.HasPrefix(uuid, "mpath-") {
			if alive, err = p.hasOtherPath(ctx, h, name); err != nil {
				return u, err
			}
		}
		if alive {
			maps = append(maps, p.called(ctx, h))
		}
	}
	if len(maps) > 0 && len(maps) == len(u.holders) {
		u.otherWay = fmt.Sprintf("the multipath map over it, %s, still has another path", listed(maps))
	}
	return u, nil
}

// usersOf lists the mounted devices that lie on a disk.
func (p *diskPass) usersOf(ctx context.Context, disk string) ([]*mountedDevice, error) {
	if p.onDisk == nil {
		p.onDisk = map[string][]*mountedDevice{}
		for _, d := range p.mounted {
			if d.Name.Name == "" {
				continue
			}
			line, err := p.tree.lineage(ctx, d.Name)
			p.fail(err)
			for _, name := range line {
				p.onDisk[name] = append(p.onDisk[name], d)
			}
		}
	}
	return p.onDisk[disk], nil
}

// hasOtherPath reports whether a multipath map has a path besides this one that
// the kernel has not given up.
func (p *diskPass) hasOtherPath(ctx context.Context, mapName, not string) (bool, error) {
	paths, err := p.Host.ReadDir(ctx, "/sys/block/"+mapName+"/slaves")
	if err != nil {
		return false, unlessGone(err)
	}
	for _, name := range paths {
		if d, ok := p.devices.byName(name); ok && name != not && (d.Kind != scsiDisk || d.State == "running") {
			return true, nil
		}
	}
	return false, nil
}

// isSwap looks a disk and its partitions up in /proc/swaps.
func (p *diskPass) isSwap(ctx context.Context, disk string) (bool, error) {
	text, err := p.tree.attribute(ctx, "/proc/swaps")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(text) {
		name, _, _ := strings.Cut(line, " ")
		if base := path.Base(name); base == disk || isPartitionOf(disk, base) {
			return true, nil
		}
	}
	return false, nil
}

func (p *diskPass) offline(ctx context.Context, what, subject, source, state, expected string, use diskUse) {
	f := finding.Finding{
		Reason: "DeviceOffline", Severity: finding.Critical, Subject: subject,
		Evidence: []finding.Evidence{{Source: source, Observed: shown(state), Expected: expected}},
	}
	f.Message = fmt.Sprintf("%s is %s", what, shown(state))
	switch {
	case use.otherWay != "":
		f.Severity = finding.Warning
		f.Message += "; " + use.otherWay
	case len(use.mounted) > 0:
		var labels []string
		for _, d := range use.mounted {
			_, label, evidence := p.describe(ctx, d)
			labels = append(labels, label)
			f.Evidence = append(f.Evidence, evidence...)
		}
		const few = 3
		if len(labels) > few {
			labels = append(labels[:few], fmt.Sprintf("%d more", len(use.mounted)-few))
		}
		f.Message += ": reads and writes fail or hang for " + listed(labels)
	case use.raw != "":
		f.Message += ": reads and writes fail or hang for a raw block volume"
		if name := rawVolume(use.raw); name != "" {
			f.Message += ", " + shown(name)
		}
		f.Evidence = append(f.Evidence, finding.Evidence{Source: ownMountTable, Observed: "its node is mounted at " + shown(use.raw)})
	case use.require != "":
		f.Message += "; the configuration requires it as " + use.require
	case !use.any():
		f.Severity = finding.Warning
		f.Message += "; nothing mounted here lies on it"
	default:
		f.Message += "; it is in use"
		if len(use.holders) > 0 {
			f.Evidence = append(f.Evidence, finding.Evidence{Source: "/sys/block/" + subject + "/holders", Observed: strings.Join(use.holders, ", ")})
		}
	}
	p.tell(f)
}

// leftoverDisk tells a disk that can not be used and is not, once that has
// lasted. Drives without a medium and the placeholders of an array are none.
func (p *diskPass) leftoverDisk(ctx context.Context, d disk, lost bool) {
	removable, err := p.tree.attribute(ctx, "/sys/block/"+d.Name+"/removable")
	if err != nil || removable == "1" {
		p.fail(err)
		return
	}
	// EMC arrays show a LUNZ of no size where no unit is mapped.
	if model, _ := p.tree.attribute(ctx, "/sys/block/"+d.Name+"/device/model"); strings.TrimSpace(model) == "LUNZ" {
		return
	}
	since := p.Memory.Since("leftover "+d.Name, p.Now)
	if p.Now.Sub(since) < p.LeftoverAfter.D() {
		return
	}
	f := finding.Finding{
		Reason: "LeftoverDevice", Severity: finding.Warning, Subject: d.Name,
		Message: fmt.Sprintf("disk %s has size 0 and nothing uses it: it looks like what a detached volume left behind", d.Name),
	}
	if lost {
		f.Message = fmt.Sprintf("disk %s is %s and nothing uses it: it looks like what a detached volume left behind", d.Name, shown(d.State))
	}
	f.Evidence = []finding.Evidence{
		{Source: "/sys/block/" + d.Name + "/device/state", Observed: shown(d.State), Expected: "running"},
		{Source: "/sys/block/" + d.Name + "/size", Observed: strconv.FormatUint(d.Sectors, 10) + " sectors"},
	}
	if d.Identity != "" {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: "/sys/block/" + d.Name + "/device/wwid", Observed: shown(d.Identity)})
	}
	p.tell(f)
}

var (
	nvmeController = regexp.MustCompile(`^nvme\d+$`)
	nvmePath       = regexp.MustCompile(`^(nvme\d+)(c\d+)?(n\d+)$`)
)

// checkNVMe looks at the state of the NVMe controllers (drivers/nvme/host/sysfs.c).
func (p *diskPass) checkNVMe(ctx context.Context) {
	const class = "/sys/class/nvme/"
	names, err := p.Host.ReadDir(ctx, strings.TrimSuffix(class, "/"))
	if err != nil {
		p.fail(unlessGone(err))
		return
	}
	live := map[string]bool{} // by subsystem
	type controller struct{ name, state, subsystem string }
	var bad []controller
	for _, name := range names {
		if !nvmeController.MatchString(name) {
			continue
		}
		state, err := p.tree.attribute(ctx, class+name+"/state")
		if err != nil || state == "" {
			p.fail(err)
			continue
		}
		if state == "live" {
			if len(names) > 1 {
				nqn, _ := p.tree.attribute(ctx, class+name+"/subsysnqn")
				live[nqn] = true
			}
			continue
		}
		nqn, _ := p.tree.attribute(ctx, class+name+"/subsysnqn")
		// A discovery controller has no namespaces and comes and goes.
		if nqn == "nqn.2014-08.org.nvmexpress.discovery" {
			continue
		}
		bad = append(bad, controller{name, state, nqn})
	}
	for _, c := range bad {
		if passing := c.state != "dead"; passing && p.Now.Sub(p.Memory.Since("nvme "+c.name+" "+c.state, p.Now)) < passingAfter {
			continue
		}
		entries, err := p.Host.ReadDir(ctx, class+c.name)
		if err != nil {
			p.fail(unlessGone(err))
			continue
		}
		var use diskUse
		for _, e := range entries {
			if m := nvmePath.FindStringSubmatch(e); m != nil {
				one, err := p.useOf(ctx, m[1]+m[3])
				if err != nil {
					p.fail(err)
					continue
				}
				use.mounted = append(use.mounted, one.mounted...)
				use.holders = append(use.holders, one.holders...)
				use.swap, use.raw = use.swap || one.swap, cmp.Or(use.raw, one.raw)
				use.require = cmp.Or(use.require, one.require)
			}
		}
		if c.subsystem != "" && live[c.subsystem] {
			use.otherWay = "another controller of its subsystem is live"
		}
		p.offline(ctx, "NVMe controller "+c.name, c.name, class+c.name+"/state", c.state, "live", use)
	}
}

// checkArrays looks for md arrays that lack a member (Documentation/admin-guide/md.rst).
func (p *diskPass) checkArrays(ctx context.Context) {
	for _, name := range p.devices.Arrays {
		dir := "/sys/block/" + name + "/md/"
		degraded, err := p.tree.attribute(ctx, dir+"degraded")
		if err != nil {
			p.fail(err)
			continue
		}
		state, err := p.tree.attribute(ctx, dir+"array_state")
		p.fail(err)
		if state == "broken" {
			use, err := p.useOf(ctx, name)
			p.fail(err)
			p.offline(ctx, "array "+name, name, dir+"array_state", state, "active or clean", use)
			continue
		}
		n, err := strconv.Atoi(degraded)
		if err != nil || n == 0 || state == "inactive" || state == "clear" {
			continue
		}
		level, _ := p.tree.attribute(ctx, dir+"level")
		total, _ := p.tree.attribute(ctx, dir+"raid_disks")
		action, _ := p.tree.attribute(ctx, dir+"sync_action")
		f := finding.Finding{
			Reason: "DeviceMissingFromArray", Severity: finding.Warning, Subject: name,
			Message: fmt.Sprintf("array %s (%s) lacks %d of its %s members", name, shown(level), n, shown(total)),
			Evidence: []finding.Evidence{
				{Source: dir + "degraded", Observed: degraded, Expected: "0"},
			},
		}
		if action == "recover" {
			f.Message += " and is being rebuilt"
			f.Evidence = append(f.Evidence, finding.Evidence{Source: dir + "sync_action", Observed: action})
		}
		members, err := p.Host.ReadDir(ctx, strings.TrimSuffix(dir, "/"))
		p.fail(unlessGone(err))
		for _, m := range members {
			if !strings.HasPrefix(m, "dev-") {
				continue
			}
			if state, err := p.tree.attribute(ctx, dir+m+"/state"); err == nil && strings.Contains(state, "faulty") {
				f.Evidence = append(f.Evidence, finding.Evidence{Source: dir + m + "/state", Observed: shown(state), Expected: "in_sync"})
			}
		}
		p.tell(f)
	}
	p.checkBtrfsMembers(ctx)
}

// checkBtrfsMembers looks for a btrfs that was mounted without one of its
// devices (-o degraded), or has lost it since (Linux 5.10,
// Documentation/ABI/testing/sysfs-fs-btrfs).
func (p *diskPass) checkBtrfsMembers(ctx context.Context) {
	const dir = "/sys/fs/btrfs/"
	systems, err := p.Host.ReadDir(ctx, strings.TrimSuffix(dir, "/"))
	if err != nil {
		p.fail(unlessGone(err))
		return
	}
	for _, id := range systems {
		members, err := p.Host.ReadDir(ctx, dir+id+"/devinfo")
		if err != nil {
			p.fail(unlessGone(err)) // "features" has none
			continue
		}
		f := finding.Finding{Reason: "DeviceMissingFromArray", Severity: finding.Warning, Subject: "btrfs " + id}
		for _, m := range members {
			if missing, err := p.tree.attribute(ctx, dir+id+"/devinfo/"+m+"/missing"); err == nil && missing == "1" {
				f.Evidence = append(f.Evidence, finding.Evidence{Source: dir + id + "/devinfo/" + m + "/missing", Observed: "1", Expected: "0"})
			}
		}
		if n := len(f.Evidence); n > 0 {
			f.Message = fmt.Sprintf("btrfs %s lacks %d of its %d devices", id, n, len(members))
			p.tell(f)
		}
	}
}

// checkThinPools asks device-mapper for the fill of thin pools. The ioctl walks
// every device, so it is made only where one may be a pool.
func (p *diskPass) checkThinPools(ctx context.Context) {
	// A device is given its uuid once; until then it has none.
	kept, _ := Kept[map[uint64]bool](p.Memory, "no thin pools")
	next := make(map[uint64]bool, len(kept))
	maybe := false
	for _, d := range p.devices.Mapped {
		if d.Node != 0 && kept[d.Node] {
			next[d.Node] = true
			continue
		}
		uuid, err := p.tree.attribute(ctx, "/sys/block/"+d.Name+"/dm/uuid")
		p.fail(err)
		if err == nil && mayBeThinPool(uuid) {
			maybe = true
			break
		}
		if uuid != "" && d.Node != 0 {
			next[d.Node] = true
		}
	}
	p.Memory.Keep("no thin pools", next)
	if !maybe {
		return
	}
	maps, err := p.Host.DeviceMapper(ctx)
	if err != nil {
		p.fail(fmt.Errorf("thin pools: %w", err))
		return
	}
	for _, m := range maps {
		for _, t := range m.Targets {
			if t.Type == "thin-pool" {
				p.checkThinPool(m, t)
			}
		}
	}
}

// mayBeThinPool goes by the owner's mark at the beginning of a map's UUID; LVM
// marks pools at the end as well.
func mayBeThinPool(uuid string) bool {
	if strings.HasPrefix(uuid, "LVM-") {
		return strings.HasSuffix(uuid, "-tpool")
	}
	for _, owner := range []string{"mpath-", "part", "CRYPT-", "DMRAID-", "Stratis-1-private-", "stratis-1-private-"} {
		if strings.HasPrefix(uuid, owner) {
			return false
		}
	}
	return true
}

// thinPool is the status line of a thin-pool target
// (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
type thinPool struct {
	// Failed: the pool answers nothing but errors.
	Failed                     bool
	UsedMetadata, MetadataSize uint64 // in blocks of 4 KiB
	UsedData, DataSize         uint64 // in blocks of the pool's own size
	// Mode is "rw", "ro" or "out_of_data_space".
	Mode       string
	NeedsCheck bool
	// QueuesWhenFull: writes wait when the pool is full, else they fail.
	QueuesWhenFull bool
}

func parseThinPool(status string) (thinPool, error) {
	f := strings.Fields(status)
	if len(f) == 1 && f[0] == "Fail" {
		return thinPool{Failed: true}, nil
	}
	if len(f) < 5 {
		return thinPool{}, fmt.Errorf("status %q has %d fields, want at least 5", shown(status), len(f))
	}
	var p thinPool
	var err error
	if p.UsedMetadata, p.MetadataSize, err = parseShare(f[1]); err != nil {
		return thinPool{}, fmt.Errorf("metadata: %w", err)
	}
	if p.UsedData, p.DataSize, err = parseShare(f[2]); err != nil {
		return thinPool{}, fmt.Errorf("data: %w", err)
	}
	p.Mode = f[4]
	p.NeedsCheck = slices.Contains(f[5:], "needs_check")
	p.QueuesWhenFull = slices.Contains(f[5:], "queue_if_no_space")
	return p, nil
}

func parseShare(s string) (used, total uint64, err error) {
	a, b, ok := strings.Cut(s, "/")
	used, errA := strconv.ParseUint(a, 10, 64)
	total, errB := strconv.ParseUint(b, 10, 64)
	if !ok || errA != nil || errB != nil || total == 0 {
		return 0, 0, fmt.Errorf("%q is no used/total", shown(s))
	}
	return used, total, nil
}

func (p *diskPass) checkThinPool(m host.DMDevice, t host.DMTarget) {
	pool, err := parseThinPool(t.Status)
	if err != nil {
		p.fail(fmt.Errorf("thin pool %s: %w", shown(m.Name), err))
		return
	}
	f := finding.Finding{Reason: "ThinPoolNearFull", Subject: shown(m.Name), Evidence: []finding.Evidence{
		{Source: "device-mapper status of " + shown(m.Name), Observed: shown(t.Status)},
	}}
	what := "thin pool " + shown(m.Name)
	atFull := "writes to every volume in it fail"
	if pool.QueuesWhenFull {
		atFull = "writes to every volume in it hang"
	}
	data, metadata := 0.0, 0.0
	if !pool.Failed {
		data = 100 * float64(pool.UsedData) / float64(pool.DataSize)
		metadata = 100 * float64(pool.UsedMetadata) / float64(pool.MetadataSize)
	}
	worst := Percent(max(data, metadata))
	switch {
	case pool.Failed:
		f.Severity, f.Message = finding.Critical, what+" has failed: every volume in it gives I/O errors"
	case pool.Mode == "out_of_data_space":
		f.Severity, f.Message = finding.Critical, fmt.Sprintf("%s is full: %s", what, atFull)
	case pool.Mode == "ro" || pool.NeedsCheck:
		f.Severity, f.Message = finding.Critical, what+" has become read-only and needs a check (thin_check)"
	case worst >= p.ThinPoolCriticalAt:
		f.Severity, f.Message = finding.Critical, fmt.Sprintf("%s is nearly full, data %.0f %%, metadata %.0f %%; at 100 %% %s", what, data, metadata, atFull)
	case worst >= p.ThinPoolWarnAt:
		f.Severity, f.Message = finding.Warning, fmt.Sprintf("%s fills up, data %.0f %%, metadata %.0f %%; at 100 %% %s", what, data, metadata, atFull)
	default:
		return
	}
	f.Evidence[0].Expected = "below " + p.ThinPoolWarnAt.String()
	p.tell(f)
}
