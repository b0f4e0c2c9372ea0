package host

import (
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// keptDirs are directories of devices in sysfs that stay open from pass to pass:
// the way to an attribute, eight directories long, is half of what reading it
// costs, and on a large host thousands are read in every pass. An O_PATH
// descriptor costs the kernel about a kilobyte and keeps no device or module.
//
// A directory of a device that has gone is empty, whatever has its name now, so
// that what is not found in a kept directory is looked for again by its name.
type keptDirs struct {
	mu    sync.Mutex
	open  map[string]*keptDir
	most  int
	swept time.Time
}

type keptDir struct {
	fd    int
	users int
	used  time.Time
	// gone: the last user closes it.
	gone bool
}

const (
	// maxKeptDirs is enough for the disks and sessions of a host with 2,000.
	maxKeptDirs = 4096
	// keptUnused is when the directory of a device nobody asks for is closed.
	keptUnused = 10 * time.Minute
)

// dirOf opens a directory, or takes it from those kept; fresh is true when it was
// opened now. It is given back with leave.
func (r *Root) dirOf(name string) (d *keptDir, fresh bool, err error) {
	k := &r.dirs
	keep := r.sysInMemory && !r.legacy && strings.HasPrefix(name, "/sys/devices/")
	if keep {
		k.mu.Lock()
		if d := k.open[name]; d != nil {
			d.users++
			d.used = time.Now()
			k.mu.Unlock()
			return d, false, nil
		}
		k.mu.Unlock()
	}
	fd, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, false, err
	}
	d = &keptDir{fd: fd, users: 1, gone: true}
	if !keep {
		return d, true, nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sweep()
	if k.open[name] == nil && len(k.open) < k.limit() {
		if k.open == nil {
			k.open = map[string]*keptDir{}
		}
		d.gone, d.used = false, time.Now()
		k.open[name] = d
	}
	return d, true, nil
}

// leave gives a directory back.
func (k *keptDirs) leave(d *keptDir) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d.users--
	d.close()
}

// drop gives up a directory that may be a device's that has gone.
func (k *keptDirs) drop(name string, d *keptDir) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.open[name] == d {
		delete(k.open, name)
	}
	d.gone = true
	d.users--
	d.close()
}

func (d *keptDir) close() {
	if d.gone && d.users == 0 {
		unix.Close(d.fd)
	}
}

// sweep closes what is not used any more; k.mu is held.
func (k *keptDirs) sweep() {
	if time.Since(k.swept) < keptUnused/2 {
		return
	}
	k.swept = time.Now()
	for name, d := range k.open {
		if time.Since(d.used) > keptUnused {
			delete(k.open, name)
			d.gone = true
			d.close()
		}
	}
}

// limit is how many may be kept: a quarter of the descriptors this process may
// have at most.
func (k *keptDirs) limit() int {
	if k.most == 0 {
		var l unix.Rlimit
		k.most = maxKeptDirs
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
			k.most = int(min(l.Cur/4, maxKeptDirs))
		}
	}
	return k.most
}

// closeAll closes what is kept.
func (k *keptDirs) closeAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, d := range k.open {
		delete(k.open, name)
		d.gone = true
		d.close()
	}
	k.most = -1
}
