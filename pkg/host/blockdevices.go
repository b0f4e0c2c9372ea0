package host

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// BlockDevice is an entry of /sys/block: a whole disk, or what is made of others.
type BlockDevice struct {
	// Name is the kernel's, "sda"; Link is where /sys/block/sda leads, "" in a
	// copied tree in which it is no link.
	Name, Link string
	// Node tells one device from the next that is given its name: the number of
	// the inode of its entry, which is made anew with the device
	// (fs/kernfs/dir.c). 0 in a tree of whose inodes that can not be said.
	Node uint64
	// What follows is of disks of the SCSI layer ("sd"). Unit is the directory
	// of the SCSI device, /sys/devices/.../3:0:0:0, or /sys/block/sda/device
	// where the link does not lead there.
	Unit string
	// State is its state (drivers/scsi/scsi_sysfs.c, sdev_states), "" where it
	// has none or is on its way out; StateErr why it could not be read.
	State    string
	StateErr error
	// WWID is its identity as it stands there, "" of a device that can not be
	// asked for one. An array may put another volume behind a disk that stays,
	// so that it is read in every pass.
	WWID string
}

// SCSI reports whether it is a disk of the SCSI layer.
func (d BlockDevice) SCSI() bool { return strings.HasPrefix(d.Name, "sd") }

// blockTable shares one reading of the block devices among the probes of one
// pass.
type blockTable struct {
	shared[[]BlockDevice]
	mu     sync.Mutex
	before []BlockDevice
}

func (t *blockTable) read(ctx context.Context, r *Root) ([]BlockDevice, error) {
	return t.get(ctx, &r.calls, "the block devices in /sys/block", func() ([]BlockDevice, error) {
		t.mu.Lock()
		before := t.before
		t.mu.Unlock()
		devices, err := r.readBlockDevices(before)
		if err == nil {
			t.mu.Lock()
			t.before = devices
			t.mu.Unlock()
		}
		return devices, err
	})
}

// readBlockDevices lists the devices by name. Of one that was there before only
// what may change is read: where it hangs it does as long as it lives.
func (r *Root) readBlockDevices(before []BlockDevice) ([]BlockDevice, error) {
	const block = "/sys/block"
	dir, err := r.open(block, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: block, Err: err}
	}
	defer unix.Close(dir)
	devices := make([]BlockDevice, 0, len(before)+1)
	var scratch []byte
	if err := eachEntry(dir, &scratch, func(e dirEntry) {
		i, ok := slices.BinarySearchFunc(before, e.name, func(d BlockDevice, name []byte) int {
			switch { // conversions that are only compared cost nothing
			case d.Name < string(name):
				return -1
			case d.Name > string(name):
				return 1
			}
			return 0
		})
		if ok && r.sysInMemory && before[i].Node == e.inode {
			d := before[i]
			d.State, d.StateErr = "", nil
			devices = append(devices, d)
			return
		}
		d := BlockDevice{Name: string(e.name)}
		if r.sysInMemory {
			d.Node = e.inode
		}
		devices = append(devices, d)
	}); err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: block, Err: err}
	}
	for i := range devices {
		d := &devices[i]
		if !d.SCSI() {
			continue
		}
		if d.Unit == "" {
			d.Link, _ = readlinkat(dir, d.Name)
			d.Unit = scsiUnit(d.Name, d.Link)
		}
		err := r.readUnit(d, &scratch)
		if errors.Is(err, fs.ErrNotExist) && d.Link != "" {
			// A copied tree in which "device" leads elsewhere; or it is gone.
			d.Unit, d.Node = scsiUnit(d.Name, ""), 0
			err = r.readUnit(d, &scratch)
		}
		if err != nil {
			d.WWID = ""
			d.StateErr = &fs.PathError{Op: "read", Path: d.Unit + "/state", Err: err}
		}
	}
	slices.SortFunc(devices, func(a, b BlockDevice) int { return cmp.Compare(a.Name, b.Name) })
	return devices, nil
}

// readUnit reads what may change of a SCSI device.
func (r *Root) readUnit(d *BlockDevice, scratch *[]byte) error {
	dir, fresh, err := r.dirOf(d.Unit)
	if err != nil {
		return err
	}
	err = r.stateIn(dir.fd, d, scratch)
	if !fresh && errors.Is(err, fs.ErrNotExist) {
		r.dirs.drop(d.Unit, dir)
		return r.readUnit(d, scratch)
	}
	r.dirs.leave(dir)
	return err
}

func (r *Root) stateIn(dir int, d *BlockDevice, scratch *[]byte) error {
	state, err := r.attributeIn(dir, d.Unit, "state", scratch)
	if err != nil {
		return err
	}
	if string(state) == "running" { // nearly all of them
		d.State = "running"
	} else {
		d.State = string(state)
	}
	// EINVAL, ENXIO, or no such file: it has none.
	wwid, err := r.attributeIn(dir, d.Unit, "wwid", scratch)
	if err != nil {
		wwid = nil
	}
	if d.WWID != string(wwid) {
		d.WWID = string(wwid)
	}
	return nil
}

// attributeIn reads a line; it is valid until scratch is used again.
func (r *Root) attributeIn(dir int, path, name string, scratch *[]byte) ([]byte, error) {
	file := fileName{path, name}
	if data, ok := r.readKept(file, MaxAttribute, scratch); ok {
		return bytes.TrimRight(data, "\n"), nil
	}
	fd, err := r.openBelow(dir, path, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	data, err := fill(fd, MaxAttribute, scratch)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r.keep(file, fd)
	return bytes.TrimRight(data, "\n"), nil
}

// scsiUnit is the directory of a disk's SCSI device, taken from the link in
// /sys/block that leads to the disk. The way there over the disk's own "device"
// link is twice as long, and the length of the way is what reading sysfs costs.
func scsiUnit(name, link string) string {
	for strings.HasPrefix(link, "../") {
		link = link[len("../"):]
	}
	unit, disk, ok := strings.Cut(link, "/block/")
	if ok && disk == name && strings.HasPrefix(unit, "devices/") && isSCSIAddress(path.Base(unit)) {
		return "/sys/" + unit
	}
	return "/sys/block/" + name + "/device"
}

// isSCSIAddress recognises host:channel:target:lun.
func isSCSIAddress(s string) bool {
	return strings.Count(s, ":") == 3 && strings.Trim(s, "0123456789:") == ""
}
