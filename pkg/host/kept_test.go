package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// memoryTree opens a tree in memory, as sysfs is: elsewhere inode numbers are
// given again at once, and nothing is kept.
func memoryTree(t *testing.T, files map[string]string) *Tree {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "tree")
	if err != nil {
		t.Skipf("no file system in memory: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	writeTree(t, dir, files)
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	if !tree.sysInMemory {
		t.Skip("/dev/shm is not in memory")
	}
	return tree
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestKeptDirectory(t *testing.T) {
	const unit = "/sys/devices/x/1:0:0:0"
	tree := memoryTree(t, map[string]string{unit[1:] + "/state": "running\n", unit[1:] + "/wwid": "one\n"})
	read := func(names ...string) []Attribute {
		return tree.ReadAttributes(context.Background(), unit, names...)
	}
	before := tree.Opened()
	read("state", "wwid")
	first := tree.Opened() - before
	read("state", "wwid")
	if next := tree.Opened() - before - first; first != 3 || next != 2 {
		t.Errorf("%d files were opened, then %d; want 3 and 2", first, next)
	}

	// In place, as the kernel changes it.
	writeTree(t, tree.Path(), map[string]string{unit[1:] + "/state": "offline\n"})
	if got := read("state"); string(got[0].Data) != "offline\n" {
		t.Errorf("changed: %+v", got)
	}
	// Another device of the same name.
	if err := os.RemoveAll(tree.Path() + unit); err != nil {
		t.Fatal(err)
	}
	if got := read("state"); !errors.Is(got[0].Err, fs.ErrNotExist) {
		t.Errorf("gone: %+v", got)
	}
	writeTree(t, tree.Path(), map[string]string{unit[1:] + "/state": "blocked\n"})
	if got := read("state", "wwid"); string(got[0].Data) != "blocked\n" || !errors.Is(got[1].Err, fs.ErrNotExist) {
		t.Errorf("made anew: %+v", got)
	}
}

func TestKeptDirectoriesAreBounded(t *testing.T) {
	files := map[string]string{}
	for i := range 40 {
		files[fmt.Sprintf("sys/devices/x/%d/state", i)] = "running\n"
	}
	tree := memoryTree(t, files)
	tree.dirs.most = 10
	before := openFiles(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 40 {
				got := tree.ReadAttributes(context.Background(), fmt.Sprintf("/sys/devices/x/%d", i), "state")
				if string(got[0].Data) != "running\n" {
					t.Errorf("%+v", got)
				}
			}
		})
	}
	wg.Wait()
	if n := openFiles(t) - before; n > 10 {
		t.Errorf("%d more files are open, want at most 10", n)
	}
	// What nobody asks for is closed.
	for _, d := range tree.dirs.open {
		d.used = time.Now().Add(-2 * keptUnused)
	}
	tree.dirs.swept = time.Time{}
	tree.ReadAttributes(context.Background(), "/sys/devices/x/39", "state")
	if n := len(tree.dirs.open); n != 1 {
		t.Errorf("%d are kept, want the one that is used", n)
	}
	tree.Close()
	if n := openFiles(t) - before; n > 0 {
		t.Errorf("%d files are open still", n)
	}
}

func TestBlockDevices(t *testing.T) {
	const unit = "/sys/devices/h/3:0:0:0"
	for _, in := range []string{"memory", "disk"} {
		t.Run(in, func(t *testing.T) {
			files := map[string]string{
				unit[1:] + "/state":                 "running\n",
				unit[1:] + "/block/sda/size":        "8\n",
				"sys/devices/v/block/vda/size":      "8\n",
				"sys/block/sdb/device/state":        "blocked\n", // a copied tree
				"sys/devices/h/4:0:0:0/state":       "offline\n",
				"sys/devices/h/4:0:0:0/block/x/dev": "\n",
			}
			var tree *Tree
			if in == "memory" {
				tree = memoryTree(t, files)
			} else {
				dir := t.TempDir()
				writeTree(t, dir, files)
				var err error
				if tree, err = OpenTree(dir); err != nil {
					t.Fatal(err)
				}
				defer tree.Close()
			}
			block := filepath.Join(tree.Path(), "sys/block")
			link := func(name, to string) {
				t.Helper()
				os.Remove(filepath.Join(block, name))
				if err := os.Symlink(to, filepath.Join(block, name)); err != nil {
					t.Fatal(err)
				}
			}
			link("sda", "../devices/h/3:0:0:0/block/sda")
			link("vda", "../devices/v/block/vda")
			want := func(want string) {
				t.Helper()
				devices, err := tree.BlockDevices(AsOf(context.Background(), time.Now()))
				if err != nil {
					t.Fatal(err)
				}
				got := ""
				for _, d := range devices {
					got += fmt.Sprintf("%s %s %s %v;", d.Name, d.Unit, d.State, d.StateErr)
				}
				if got != want {
					t.Errorf("got  %s\nwant %s", got, want)
				}
			}
			const sdb, vda = "sdb /sys/block/sdb/device blocked <nil>;", "vda   <nil>;"
			want("sda " + unit + " running <nil>;" + sdb + vda)
			writeTree(t, tree.Path(), map[string]string{unit[1:] + "/state": "transport-offline\n"})
			want("sda " + unit + " transport-offline <nil>;" + sdb + vda)
			// Another disk takes the name.
			if err := os.MkdirAll(filepath.Join(tree.Path(), "sys/devices/h/4:0:0:0/block/sda"), 0o755); err != nil {
				t.Fatal(err)
			}
			link("sda", "../devices/h/4:0:0:0/block/sda")
			want("sda /sys/devices/h/4:0:0:0 offline <nil>;" + sdb + vda)
			if err := os.Remove(filepath.Join(block, "sda")); err != nil {
				t.Fatal(err)
			}
			want(sdb + vda)
		})
	}
}

// keptTree is the running kernel's own tree.
func keptTree(t *testing.T) *Tree {
	t.Helper()
	tree, err := OpenTree("/")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	if !tree.procfs || tree.legacy {
		t.Skip("no procfs, or no openat2(2)")
	}
	return tree
}

// read returns a file's text and how many files were opened for it.
func (t *Tree) read(test *testing.T, name string) (string, int64) {
	test.Helper()
	before := t.Opened()
	data, err := t.ReadFile(context.Background(), name)
	if err != nil {
		test.Fatal(err)
	}
	return string(data), t.Opened() - before
}

// sleeper starts a process that does nothing until it is stopped.
func sleeper(t *testing.T) (pid int, stop func()) {
	t.Helper()
	process := exec.Command("sleep", "1000")
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() { process.Process.Kill(); process.Wait() })
	t.Cleanup(stop)
	return process.Process.Pid, stop
}

func TestKeptFiles(t *testing.T) {
	tree := keptTree(t)
	pid, stop := sleeper(t)
	file := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	for i, want := range []struct {
		write  string
		opened int64
	}{{"100", 1}, {"200", 1}, {"300", 0}, {"300", 0}, {"7", 0}} {
		if err := os.WriteFile(file, []byte(want.write), 0); err != nil {
			t.Fatal(err)
		}
		if got, opened := tree.read(t, file); got != want.write+"\n" || opened != want.opened {
			t.Errorf("read %d: %q with %d files opened, want %q with %d", i+1, got, opened, want.write, want.opened)
		}
	}
	stop()
	for range 3 {
		if data, err := tree.ReadFile(context.Background(), file); err == nil {
			t.Errorf("of a process that has ended: %q", data)
		}
	}
	if n := len(tree.kept.open); n != 0 {
		t.Errorf("%d files are kept of it", n)
	}

	// What is more than one read, or more than one record.
	var locks []*os.File
	for i := range 100 {
		f, err := os.Create(filepath.Join(t.TempDir(), strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		locks = append(locks, f)
	}
	for _, name := range []string{"/proc/locks", "/proc/1/mountinfo", "/proc/partitions", "/proc/self/status", "/proc/sys/kernel/osrelease"} {
		for range 3 {
			got, _ := tree.read(t, name)
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if name == "/proc/self/status" || name == "/proc/locks" { // may differ in numbers by now
				if strings.Count(got, "\n") != strings.Count(string(want), "\n") {
					t.Errorf("%s: %d bytes, want some %d", name, len(got), len(want))
				}
			} else if got != string(want) {
				t.Errorf("%s: %d bytes, want %d", name, len(got), len(want))
			}
		}
	}
	for _, f := range locks {
		f.Close()
	}
}

// TestKeptFileOfWhatIsMadeAnew: what has the name of something that has gone is
// another, in sysfs, its mounts and procfs.
func TestKeptFileOfWhatIsMadeAnew(t *testing.T) {
	dir := t.TempDir()
	for _, m := range []struct{ at, kind string }{{"proc", "proc"}, {"sys", "sysfs"}, {"sys/fs/cgroup", "cgroup2"}} {
		at := filepath.Join(dir, m.at)
		os.Mkdir(at, 0o755) // below sysfs it is there
		if err := unix.Mount("none", at, m.kind, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			t.Skipf("%s can not be mounted here: %v", m.kind, err)
		}
		t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	const group = "/sys/fs/cgroup/kept-files-test"
	create := func() {
		t.Helper()
		if err := os.Mkdir(dir+group, 0o755); err != nil {
			t.Skipf("no control group can be made here: %v", err)
		}
	}
	remove := func() { unix.Rmdir(dir + group) }
	create()
	defer remove()
	write := func(limit string) {
		t.Helper()
		if err := os.WriteFile(dir+group+"/cgroup.max.depth", []byte(limit), 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, limit := range []string{"1", "2", "3"} {
		write(limit)
		if got, opened := tree.read(t, group+"/cgroup.max.depth"); got != limit+"\n" || (limit == "3") != (opened == 0) {
			t.Errorf("limit %s: %q, %d files opened", limit, got, opened)
		}
	}
	remove()
	if data, err := tree.ReadFile(context.Background(), group+"/cgroup.max.depth"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("gone: %q, %v", data, err)
	}
	create()
	for range 3 {
		if got, _ := tree.read(t, group+"/cgroup.max.depth"); got != "max\n" {
			t.Errorf("made anew: %q", got)
		}
	}
}

func TestKeptFilesAreBounded(t *testing.T) {
	tree := keptTree(t)
	tree.kept.most = 3
	before := openFiles(t)
	for range 3 {
		for _, name := range []string{"loadavg", "meminfo", "stat", "uptime", "vmstat", "partitions", "version"} {
			tree.read(t, "/proc/"+name)
		}
	}
	if n := openFiles(t) - before; n != 3 {
		t.Errorf("%d more files are open, want 3", n)
	}
	tree.Close()
	if n := openFiles(t) - before; n > 0 {
		t.Errorf("%d files are open still", n)
	}
}

// TestWhatIsNotKept: what may hang, pins something, or is a file that has its
// bytes somewhere.
func TestWhatIsNotKept(t *testing.T) {
	tree := keptTree(t)
	tree.sysfs = true
	self := "/proc/" + strconv.Itoa(os.Getpid())
	for _, dir := range []string{"/etc", "/proc/self", self, self + "/task", "/sys/block/md0/md", "/sys/../proc", "/proc/net", "/run", "", "/system"} {
		for _, base := range []string{"mountinfo", "environ", "maps", "vpd_pg83", "cgroup.procs"} {
			if tree.mayKeep(fileName{dir, base}) {
				t.Errorf("%s/%s may be kept", dir, base)
			}
		}
	}
	for _, name := range []string{t.TempDir(), "/dev/null"} {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if writtenAnew(fd) {
			t.Errorf("%s is taken for a file the kernel writes anew", name)
		}
		unix.Close(fd)
	}
}

func TestNamespaceDirectoryIsKept(t *testing.T) {
	tree := keptTree(t)
	pid, stop := sleeper(t)
	read := func() (Link, int64) {
		before := tree.Opened()
		links := tree.ReadLinks(context.Background(), fmt.Sprintf("/proc/%d/ns", pid), []string{"net"})
		return links[0], tree.Opened() - before
	}
	first, _ := read()
	if again, opened := read(); first.Err != nil || again != first || opened != 0 {
		t.Errorf("%+v, then %+v with %d directories opened", first, again, opened)
	}
	stop()
	if l, _ := read(); l.Err == nil {
		t.Errorf("of a process that has ended: %+v", l)
	}
}
