package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReadAttributes walks a tree laid out like sysfs: plain attributes, one in
// a directory below, one behind the "device" link, one that is not there, and
// links that must not lead out of the tree.
func TestReadAttributes(t *testing.T) {
	for _, legacy := range []bool{false, true} {
		dir := t.TempDir()
		writeTree(t, dir, map[string]string{
			"sys/devices/host3/3:0:0:0/state":          "running\n",
			"sys/devices/host3/3:0:0:0/wwid":           "naa.6001405\n",
			"sys/devices/host3/3:0:0:0/block/sda/size": "2097152\n",
			"sys/devices/host3/3:0:0:0/block/sda/dm/x": "1\n",
			"outside": "inside the root after all\n",
		})
		for name, target := range map[string]string{
			"sys/devices/host3/3:0:0:0/block/sda/device": "../../../3:0:0:0",
			"sys/devices/host3/3:0:0:0/block/sda/climbs": "../../../../../../../../../../outside",
			"sys/devices/host3/3:0:0:0/block/sda/passwd": "/etc/passwd",
			"sys/sda": "devices/host3/3:0:0:0/block/sda",
		} {
			if err := os.Symlink(target, dir+"/"+name); err != nil {
				t.Fatal(err)
			}
		}
		if err := syscall.Mkfifo(dir+"/sys/devices/host3/3:0:0:0/block/sda/fifo", 0o644); err != nil {
			t.Fatal(err)
		}
		r, err := OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		r.legacy = r.legacy || legacy
		want := []struct {
			name, data string
			err        error
		}{
			{"size", "2097152\n", nil},
			{"device/state", "running\n", nil},
			{"device/wwid", "naa.6001405\n", nil},
			{"dm/x", "1\n", nil},
			{"missing", "", fs.ErrNotExist},
			{"missing/too", "", fs.ErrNotExist},
			{"device/state", "running\n", nil},
			{"climbs", "inside the root after all\n", nil},
			{"passwd", "", fs.ErrNotExist},
			{"fifo", "", ErrNotRegular},
			{"dm", "", ErrNotRegular},
			{"si\x00ze", "", syscall.EINVAL},
		}
		var names []string
		for _, w := range want {
			names = append(names, w.name)
		}
		got := r.ReadAttributes(t.Context(), "/sys/sda", names...)
		for i, w := range want {
			if string(got[i].Data) != w.data || !errors.Is(got[i].Err, w.err) {
				t.Errorf("legacy %v: %q = %q, %v; want %q, %v", legacy, w.name, got[i].Data, got[i].Err, w.data, w.err)
			}
		}
		for _, a := range r.ReadAttributes(t.Context(), "/sys/sdb", "size", "device/state") {
			if !errors.Is(a.Err, fs.ErrNotExist) {
				t.Errorf("legacy %v: of a disk that is gone: %q, %v", legacy, a.Data, a.Err)
			}
		}
		const disk = "/sys/devices/host3/3:0:0:0/block/sda"
		for i, want := range []Link{
			{"../../../3:0:0:0", nil}, {"/etc/passwd", nil}, {"", syscall.EINVAL}, {"", fs.ErrNotExist}, {"", syscall.EINVAL}, {"", syscall.EINVAL},
		} {
			names := []string{"device", "passwd", "size", "missing", "../sda/device", ""}
			if got := r.ReadLinks(t.Context(), disk, names)[i]; got.Target != want.Target || !errors.Is(got.Err, want.Err) {
				t.Errorf("legacy %v: link %q = %q, %v; want %q, %v", legacy, names[i], got.Target, got.Err, want.Target, want.Err)
			}
		}
		if l := r.ReadLinks(t.Context(), "/sys/block", []string{"sda"}); !errors.Is(l[0].Err, fs.ErrNotExist) {
			t.Errorf("legacy %v: in a directory that is gone: %v", legacy, l[0].Err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if a := r.ReadAttributes(ctx, "/sys/sda", "size"); !errors.Is(a[0].Err, context.Canceled) {
			t.Errorf("legacy %v: after the context's end: %v", legacy, a[0].Err)
		}
	}
}

// TestInMemory holds the calls that are not bounded to those that can not hang.
func TestInMemory(t *testing.T) {
	machine, err := OpenRoot("/")
	if err != nil {
		t.Fatal(err)
	}
	defer machine.Close()
	copied, err := OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	for name, want := range map[string]bool{
		"/sys/block/sda/size":              true,
		"/sys/fs/cgroup/a/cgroup.procs":    true,
		"/sys/block/md0/md/array_state":    false,
		"/sys/devices/virtual/block/md127": false,
		"/sys/../mnt/nfs/file":             false,
		"/proc/7/oom_score_adj":            true,
		"/proc/7/cgroup":                   true,
		"/proc/7/stat":                     true,
		"/proc/7/ns":                       true,
		"/proc/vmstat":                     true,
		"/proc/sys/kernel/pid_max":         true,
		"/proc/sys/fs/binfmt_misc/status":  false,
		"/proc/swaps":                      false,
		"/proc/7/cmdline":                  false,
		"/proc/7/environ":                  false,
		"/proc/7/mountinfo":                false,
		"/etc/fstab":                       false,
		"/system/block":                    false,
		"/var/lib/kubelet/vol_data.json":   false,
	} {
		if got := machine.inMemory(fileCall{op: opRead, name: name}); got != want {
			t.Errorf("inMemory(%s) = %v, want %v", name, got, want)
		}
		if copied.inMemory(fileCall{op: opRead, name: name}) {
			t.Errorf("inMemory(%s) in a tree without a sysfs and a procfs", name)
		}
	}
}

func TestReadThrough(t *testing.T) {
	dir := t.TempDir()
	long := strings.Repeat("0123456789abcdef", 4096)
	writeTree(t, dir, map[string]string{"long": long, "empty": ""})
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	var got strings.Builder
	pieces := 0
	read := func(name string, limit int64) error {
		got.Reset()
		pieces = 0
		return tree.ReadThrough(t.Context(), name, limit, func(piece []byte) { got.Write(piece); pieces++ })
	}
	if err := read("/long", int64(len(long))); err != nil || got.String() != long || pieces < 2 {
		t.Errorf("%d bytes in %d pieces, %v", got.Len(), pieces, err)
	}
	if err := read("/empty", 1); err != nil || pieces != 0 {
		t.Errorf("empty: %d pieces, %v", pieces, err)
	}
	if err := read("/long", int64(len(long))-1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too long: %v", err)
	}
	if err := read("/fifo", 1); !errors.Is(err, ErrNotRegular) {
		t.Errorf("a FIFO: %v", err)
	}
	if err := read("/none", 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}
