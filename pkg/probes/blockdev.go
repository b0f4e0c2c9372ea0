package probes

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hosthygiene/agent/pkg/host"
)

// sectorSize is the unit of every "size" in sysfs, whatever the disk's own is.
const sectorSize = 512

// maxAttribute is the limit of one sysfs attribute or udev record, in bytes.
const maxAttribute = 64 << 10

// blockName is a block device by its kernel names.
type blockName struct {
	// Name is its own, e.g. "sda1"; Disk that of the whole disk, "sda".
	Name, Disk string
}

// dir is its directory in sysfs.
func (b blockName) dir() string {
	if b.Name == b.Disk {
		return "/sys/block/" + b.Disk
	}
	return "/sys/block/" + b.Disk + "/" + b.Name
}

// blockTree reads block devices from sysfs and remembers, for one pass, how
// they lie on each other.
type blockTree struct {
	files host.Files
	names map[host.DevNum]blockName
	below map[string][]string
}

func newBlockTree(files host.Files) *blockTree {
	return &blockTree{files: files, names: map[host.DevNum]blockName{}, below: map[string][]string{}}
}

// byNumber finds a device by its number. fs.ErrNotExist: the kernel has none.
func (t *blockTree) byNumber(ctx context.Context, dev host.DevNum) (blockName, error) {
	if b, ok := t.names[dev]; ok {
		return b, nil
	}
	target, err := t.files.ReadLink(ctx, "/sys/dev/block/"+strconv.Itoa(int(dev.Major))+":"+strconv.Itoa(int(dev.Minor)))
	if err != nil {
		return blockName{}, err
	}
	b := blockNameAt(target)
	t.names[dev] = b
	return b, nil
}

// blockNameAt takes the path of a device in sysfs apart. The directory above a
// partition is its disk; the one above a disk is "block", a controller or a
// subsystem.
func blockNameAt(sysfsPath string) blockName {
	name, parent := path.Base(sysfsPath), path.Base(path.Dir(sysfsPath))
	if isPartitionOf(parent, name) {
		return blockName{name, parent}
	}
	return blockName{name, name}
}

// isPartitionOf follows the kernel's naming (block/partitions/core.c): a "p"
// stands between a disk's name that ends in a digit and the number.
func isPartitionOf(disk, name string) bool {
	rest, ok := strings.CutPrefix(name, disk)
	if !ok || disk == "" || rest == "" {
		return false
	}
	if c := disk[len(disk)-1]; c >= '0' && c <= '9' {
		if rest, ok = strings.CutPrefix(rest, "p"); !ok {
			return false
		}
	}
	_, err := strconv.ParseUint(rest, 10, 32)
	return err == nil
}

// resolve finds the device a path in /dev stands for. fs.ErrNotExist: it stands
// for none.
func (t *blockTree) resolve(ctx context.Context, name string) (host.DevNum, error) {
	st, err := t.files.Stat(ctx, name)
	if err != nil {
		return host.DevNum{}, err
	}
	if st.Mode&fs.ModeDevice != 0 && st.Mode&fs.ModeCharDevice == 0 {
		return st.Rdev, nil
	}
	// A copied tree has files where device nodes were.
	real, err := t.files.RealPath(ctx, name)
	if err != nil {
		return host.DevNum{}, err
	}
	data, err := t.files.ReadFileMax(ctx, "/sys/class/block/"+path.Base(real)+"/dev", maxAttribute)
	if err != nil {
		return host.DevNum{}, err
	}
	var d host.DevNum
	if n, _ := fmt.Sscanf(string(data), "%d:%d", &d.Major, &d.Minor); n != 2 {
		return host.DevNum{}, fmt.Errorf("/sys/class/block/%s/dev: not a device number", path.Base(real))
	}
	return d, nil
}

// attribute reads one sysfs attribute without its newline; a missing one is "".
func (t *blockTree) attribute(ctx context.Context, name string) (string, error) {
	data, err := t.files.ReadFileMax(ctx, name, maxAttribute)
	if err != nil {
		return "", unlessGone(err)
	}
	return string(bytes.TrimRight(data, "\n")), nil
}

// sectors reads the size of a device.
func (t *blockTree) sectors(ctx context.Context, b blockName) (uint64, error) {
	text, err := t.attribute(ctx, b.dir()+"/size")
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s/size: %q is no number", b.dir(), shown(text))
	}
	return n, nil
}

// lineage lists a device and everything it lies on: a partition its disk, a
// device-mapper or md device its members, down to the disks.
func (t *blockTree) lineage(ctx context.Context, b blockName) ([]string, error) {
	if l, ok := t.below[b.Name]; ok {
		return l, nil
	}
	t.below[b.Name] = []string{b.Name} // ends a circle, which no kernel makes but a tree may
	line := []string{b.Name}
	if b.Disk != b.Name {
		line = append(line, b.Disk)
	}
	var errs []error
	if strings.HasPrefix(b.Disk, "dm-") || strings.HasPrefix(b.Disk, "md") || strings.HasPrefix(b.Disk, "bcache") {
		slaves, err := t.files.ReadDir(ctx, "/sys/block/"+b.Disk+"/slaves")
		if err != nil {
			errs = append(errs, unlessGone(err))
		}
		for _, s := range slaves {
			member, err := t.byLink(ctx, "/sys/block/"+b.Disk+"/slaves/"+s)
			if err != nil {
				errs = append(errs, unlessGone(err))
				continue
			}
			under, err := t.lineage(ctx, member)
			errs = append(errs, err)
			line = append(line, under...)
		}
	}
	slices.Sort(line)
	line = slices.Compact(line)
	t.below[b.Name] = line
	return line, errors.Join(errs...)
}

// byLink names the device behind an entry of a slaves or holders directory.
func (t *blockTree) byLink(ctx context.Context, link string) (blockName, error) {
	target, err := t.files.ReadLink(ctx, link)
	if err != nil {
		return blockName{}, err
	}
	return blockNameAt(target), nil
}

// holders lists what lies directly on a disk or on its partitions.
func (t *blockTree) holders(ctx context.Context, disk string) ([]string, error) {
	entries, err := t.files.ReadDir(ctx, "/sys/block/"+disk)
	if err != nil {
		return nil, unlessGone(err)
	}
	dirs := []string{"/sys/block/" + disk + "/holders"}
	for _, e := range entries {
		if isPartitionOf(disk, e) {
			dirs = append(dirs, "/sys/block/"+disk+"/"+e+"/holders")
		}
	}
	var all []string
	for _, dir := range dirs {
		names, err := t.files.ReadDir(ctx, dir)
		if err != nil && !isGone(err) {
			return nil, err
		}
		all = append(all, names...)
	}
	return all, nil
}

// disk is a whole disk that is no construction of others.
type disk struct {
	Name string
	Kind diskKind
	// Link is where /sys/block leads for a SCSI disk; "" when it is no link.
	Link string
	// Unit is the directory of its SCSI device.
	Unit string
	// State is that of the SCSI device (drivers/scsi/scsi_sysfs.c sdev_states).
	State   string
	Sectors uint64
	// Identity is what udev makes stable names from: the wwid of SCSI and
	// NVMe, the serial of virtio; empty when the disk has none.
	Identity string
}

type diskKind int

const (
	otherDisk diskKind = iota
	scsiDisk
	nvmeDisk
	virtioDisk
)

// nvmeNamespace is a namespace as a block device; nvme0c1n1 is one of its paths.
var nvmeNamespace = regexp.MustCompile(`^nvme\d+n\d+$`)

// kindOfDisk tells a disk by its kernel name; ok is false for loop, ram, zram,
// CD, network and stacked devices.
func kindOfDisk(name string) (kind diskKind, ok bool) {
	switch {
	case strings.HasPrefix(name, "sd"):
		return scsiDisk, true
	case nvmeNamespace.MatchString(name):
		return nvmeDisk, true
	case strings.HasPrefix(name, "vd"):
		return virtioDisk, true
	case strings.HasPrefix(name, "xvd"), strings.HasPrefix(name, "hd"), strings.HasPrefix(name, "dasd"):
		return otherDisk, true
	case strings.HasPrefix(name, "mmcblk"):
		return otherDisk, !strings.Contains(name, "boot") && !strings.Contains(name, "rpmb")
	}
	return 0, false
}

// blockDevices is the inventory of one pass.
type blockDevices struct {
	Disks []disk
	// Mapped are the device-mapper's devices, Arrays the names of md's.
	Mapped []host.BlockDevice
	Arrays []string
}

func (d blockDevices) byName(name string) (disk, bool) {
	i, ok := slices.BinarySearchFunc(d.Disks, name, func(d disk, name string) int { return strings.Compare(d.Name, name) })
	if !ok {
		return disk{}, false
	}
	return d.Disks[i], true
}

// inventory lists the disks. A disk that goes meanwhile is left out.
func (t *blockTree) inventory(ctx context.Context, in Input) (blockDevices, error) {
	devices, err := in.Host.BlockDevices(ctx)
	if err != nil {
		return blockDevices{}, fmt.Errorf("disks: %w", err)
	}
	var all blockDevices
	var errs []error
	kept := t.keptDisks(ctx, in.Memory)
	all.Disks = make([]disk, 0, len(devices))
	for _, device := range devices {
		name := device.Name
		kind, ok := kindOfDisk(name)
		switch {
		case strings.HasPrefix(name, "dm-"):
			all.Mapped = append(all.Mapped, device)
			continue
		case strings.HasPrefix(name, "md"):
			all.Arrays = append(all.Arrays, name)
			continue
		case !ok:
			continue
		}
		d := disk{Name: name, Kind: kind}
		if kind == scsiDisk {
			err = t.readSCSIDisk(ctx, &d, device, kept)
			if device.StateErr != nil && !isGone(device.StateErr) {
				errs = append(errs, device.StateErr)
			}
		} else {
			err = t.readDisk(ctx, &d)
		}
		if isGone(err) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("/sys/block/%s/size: %w", name, err))
			continue
		}
		all.Disks = append(all.Disks, d)
	}
	return all, errors.Join(errs...)
}

// readDisk reads the size and, of the kinds that have one, the identity.
func (t *blockTree) readDisk(ctx context.Context, d *disk) error {
	names := []string{"size"}
	switch d.Kind {
	case nvmeDisk:
		names = append(names, "wwid")
	case virtioDisk:
		names = append(names, "serial")
	}
	read := t.files.ReadAttributes(ctx, "/sys/block/"+d.Name, names...)
	// A device that can not be asked for its identity (EINVAL, ENXIO) has none.
	if len(read) > 1 && read[1].Err == nil {
		d.Identity = cleanIdentity(string(read[1].Data))
	}
	return d.takeSize(read[0])
}

func (d *disk) takeSize(read host.Attribute) error {
	if read.Err != nil {
		return read.Err
	}
	var err error
	d.Sectors, err = strconv.ParseUint(string(bytes.TrimSpace(read.Data)), 10, 64)
	return err
}

// readSCSIDisk adds the size to what is known of a SCSI disk.
func (t *blockTree) readSCSIDisk(ctx context.Context, d *disk, s host.BlockDevice, kept map[string]*keptDisk) error {
	d.Link, d.Unit, d.State = s.Link, s.Unit, s.State
	k := kept[d.Name]
	d.Identity = k.clean(s.WWID)
	if k != nil && k.node == s.Node && s.Node != 0 && k.blocks == k.now {
		d.Sectors = k.sectors
		return nil
	}
	size := t.files.ReadAttributes(ctx, s.Unit, "block/"+d.Name+"/size")[0]
	if errors.Is(size.Err, fs.ErrNotExist) { // gone; or a copied tree
		size = t.files.ReadAttributes(ctx, "/sys/block/"+d.Name, "size")[0]
	}
	if err := d.takeSize(size); err != nil {
		return err
	}
	// A disk that grew between the two readings is read again.
	if k != nil && k.now == d.Sectors/2 {
		k.node, k.blocks, k.sectors = s.Node, k.now, d.Sectors
	}
	return nil
}

// keptDisk is what was read of a SCSI disk, by name, on an earlier pass.
// /proc/partitions has the sizes of all of them in one file, but in units of
// 1 KiB: it tells that a size is still the one that was read, and an odd sector
// is not lost. A disk of size 0 does not stand there.
type keptDisk struct {
	// now is the size in /proc/partitions, if listed there.
	now    uint64
	listed bool
	// sectors were read of the device of this node when now was blocks.
	node, blocks, sectors uint64
	// wwid is the attribute as it was read, identity what cleanIdentity made
	// of it.
	wwid, identity string
}

// clean is cleanIdentity for an attribute that hardly ever changes; k may be nil.
func (k *keptDisk) clean(wwid string) string {
	if k == nil {
		return cleanIdentity(wwid)
	}
	if k.wwid != wwid {
		k.wwid, k.identity = wwid, cleanIdentity(wwid)
	}
	return k.identity
}

// keptDisks brings the kept disks up to date; without /proc/partitions there are
// none, and every size is read.
func (t *blockTree) keptDisks(ctx context.Context, m *Memory) map[string]*keptDisk {
	const key = "SCSI disks"
	disks, ok := Kept[map[string]*keptDisk](m, key)
	if !ok {
		disks = map[string]*keptDisk{}
		m.Keep(key, disks)
	}
	for _, k := range disks {
		k.listed = false
	}
	if data, err := t.files.ReadFile(ctx, "/proc/partitions"); err == nil {
		parsePartitions(data, func(name []byte, blocks uint64) {
			k := disks[string(name)]
			if k == nil {
				k = &keptDisk{}
				disks[string(name)] = k
			}
			k.now, k.listed = blocks, true
		})
	}
	maps.DeleteFunc(disks, func(_ string, k *keptDisk) bool { return !k.listed })
	return disks
}

// parsePartitions takes the SCSI disks out of /proc/partitions, "major minor
// #blocks name" (block/genhd.c, show_partition).
func parsePartitions(data []byte, each func(name []byte, blocks uint64)) {
	for line := range bytes.Lines(data) {
		line = bytes.TrimRight(line, " \n")
		cut := bytes.LastIndexByte(line, ' ')
		name := line[cut+1:]
		if cut < 0 || !bytes.HasPrefix(name, []byte("sd")) || name[len(name)-1] <= '9' {
			continue // a partition's name ends in its number
		}
		rest := bytes.TrimRight(line[:cut], " ")
		size := rest[bytes.LastIndexByte(rest, ' ')+1:]
		if n, err := strconv.ParseUint(string(size), 10, 63); err == nil {
			each(name, n)
		}
	}
}

// cleanIdentity drops padding, and identities that say nothing because the
// maker left them blank.
func cleanIdentity(id string) string {
	id = strings.Join(strings.Fields(strings.ToValidUTF8(strings.Trim(id, "\x00 \n"), "?")), " ")
	_, value, ok := strings.Cut(id, ".")
	if !ok {
		value = id
	}
	if strings.Trim(value, "0 ") == "" {
		return ""
	}
	return id
}

// udevRecord is udev's database entry of a device, /run/udev/data/bMAJ:MIN
// (systemd src/libsystemd/sd-device/device-private.c).
type udevRecord struct {
	// Links are the names below /dev the device claims; of several claimants
	// the one with the highest Priority gets the link.
	Links    []string
	Priority int
	// Properties are the E: lines.
	Properties map[string]string
}

func readUdev(ctx context.Context, files host.Files, dev host.DevNum) (udevRecord, error) {
	data, err := files.ReadFileMax(ctx, fmt.Sprintf("/run/udev/data/b%d:%d", dev.Major, dev.Minor), maxAttribute)
	if err != nil {
		return udevRecord{}, err
	}
	return parseUdev(data), nil
}

// parseUdev parses udev's database entry; lines of other kinds are passed over.
func parseUdev(data []byte) udevRecord {
	r := udevRecord{Properties: map[string]string{}}
	for line := range bytes.Lines(data) {
		kind, value, ok := strings.Cut(strings.TrimRight(string(line), "\n"), ":")
		if !ok {
			continue
		}
		switch kind {
		case "S":
			r.Links = append(r.Links, value)
		case "L":
			if n, err := strconv.Atoi(value); err == nil {
				r.Priority = n
			}
		case "E":
			if k, v, ok := strings.Cut(value, "="); ok {
				r.Properties[k] = v
			}
		}
	}
	return r
}

// scsiSerial takes the unit serial number out of VPD page 0x80 (SPC-4 7.8.15).
func scsiSerial(page []byte) string {
	if len(page) < 4 || page[1] != 0x80 {
		return ""
	}
	n := int(binary.BigEndian.Uint16(page[2:4]))
	body := page[4:]
	return strings.TrimSpace(strings.Trim(string(body[:min(n, len(body))]), "\x00"))
}

// relativePort takes the relative target port identifier out of VPD page 0x83
// (SPC-4 7.8.6): the number of the port among those of one SCSI device, so two
// answers with one number never come from two ports of the same device.
func relativePort(page []byte) (port uint16, ok bool) {
	if len(page) < 4 || page[1] != 0x83 {
		return 0, false
	}
	n := int(binary.BigEndian.Uint16(page[2:4]))
	list := page[4:]
	list = list[:min(n, len(list))]
	for len(list) >= 4 {
		length := int(list[3])
		if len(list) < 4+length {
			return 0, false
		}
		const relativeTargetPort = 4
		if list[1]&0x0f == relativeTargetPort && length == 4 {
			return binary.BigEndian.Uint16(list[6:8]), true
		}
		list = list[4+length:]
	}
	return 0, false
}
