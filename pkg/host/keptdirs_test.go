package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
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
