package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// followFiles follows files of a tree; more gives it another list.
func followFiles(t testing.TB, h *Host, files ...FollowedFile) (heard *heard, more func(...FollowedFile)) {
	t.Helper()
	lists := make(chan []FollowedFile, 1)
	lists <- files
	heard = follow(t, func(ctx context.Context, l Listener) error { return h.FollowFiles(ctx, lists, l) })
	return heard, func(files ...FollowedFile) { lists <- files }
}

func TestFollowFiles(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{
		"etc/fstab": "one\n", "etc/other": "", "etc/multipath/conf.d/a.conf": "", "usr/lib/os-release": "ID=x\n",
		"var/lib/dpkg/lock": "", "var/lib/rpm/rpmdb.sqlite": "", "run/keep": "",
	})
	for link, target := range map[string]string{"etc/os-release": "/usr/lib/os-release", "var/run": "/run"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	h := openDir(t, dir)
	const (
		fstab, release, conf, nodes = "/etc/fstab", "/etc/os-release", "/etc/multipath/conf.d/", "/var/lib/iscsi/nodes/"
		reboot, lock                = "/var/run/reboot-required", "/var/lib/dpkg/lock"
		wal                         = "/var/lib/rpm/rpmdb.sqlite-wal"
		db                          = "/var/lib/rpm/rpmdb.sqlite"
	)
	heard, more := followFiles(t, h, FollowedFile{Name: fstab}, FollowedFile{Name: release}, FollowedFile{Name: conf},
		FollowedFile{Name: nodes}, FollowedFile{Name: reboot}, FollowedFile{Name: lock, On: FileReleased},
		FollowedFile{Name: wal, On: FileWritten}, FollowedFile{Name: db})
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) func() {
		return func() {
			t.Helper()
			if err := os.WriteFile(at(name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	heard.hears(t, fstab, write("etc/fstab", "two\n"))
	heard.hears(t, fstab, func() { // as editors and package managers do
		write("etc/.fstab.new", "three\n")()
		do(os.Rename(at("etc/.fstab.new"), at("etc/fstab")))
	})
	heard.hears(t, fstab, func() { do(os.Chmod(at("etc/fstab"), 0o600)) })
	heard.hears(t, fstab, func() { do(os.Remove(at("etc/fstab"))) })
	heard.hears(t, fstab, write("etc/fstab", "four\n"))
	heard.hearsNothing(t, func() {
		write("etc/other", "x")()
		_, err := os.ReadFile(at("etc/fstab"))
		do(err)
	}, fstab, write("etc/fstab", "five\n"))

	// A link is followed inside the root, and may come to lead elsewhere.
	heard.hears(t, release, write("usr/lib/os-release", "ID=y\n"))
	heard.hears(t, release, func() {
		write("etc/os-release.new", "ID=z\n")()
		do(os.Rename(at("etc/os-release.new"), at("etc/os-release")))
	})
	heard.hears(t, release, write("etc/os-release", "ID=w\n"))
	heard.hears(t, reboot, write("run/reboot-required", "*** System restart required ***\n"))

	// A directory: what is in it, itself, and when it appears.
	heard.hears(t, conf, write("etc/multipath/conf.d/b.conf", ""))
	heard.hears(t, conf, func() { do(os.RemoveAll(at("etc/multipath"))) })
	heard.hears(t, conf, func() { do(os.MkdirAll(at("etc/multipath/conf.d"), 0o755)) })
	heard.hears(t, conf, write("etc/multipath/conf.d/c.conf", ""))
	heard.hears(t, nodes, func() { do(os.MkdirAll(at("var/lib/iscsi/nodes"), 0o755)) })
	heard.hears(t, nodes, write("var/lib/iscsi/nodes/iqn.x", ""))

	// A lock counts when it is let go by somebody who could write, an SQLite log
	// when something is written: what mere readers do is nothing.
	heard.hears(t, lock, func() {
		f, err := os.OpenFile(at("var/lib/dpkg/lock"), os.O_RDWR, 0)
		do(err)
		do(f.Close())
	})
	heard.hearsNothing(t, func() {
		_, err := os.ReadFile(at("var/lib/dpkg/lock"))
		do(err)
		f, err := os.OpenFile(at("var/lib/rpm/rpmdb.sqlite"), os.O_RDWR, 0)
		do(err)
		do(f.Close())
		w, err := os.Create(at("var/lib/rpm/rpmdb.sqlite-wal"))
		do(err)
		do(w.Close())
		do(os.Remove(at("var/lib/rpm/rpmdb.sqlite-wal")))
	}, wal, write("var/lib/rpm/rpmdb.sqlite-wal", "a transaction"))

	// Another list: what is not in it any more is not told.
	more(FollowedFile{Name: "/etc/other"})
	heard.hears(t, "/etc/other", func() {
		for range 20 { // until the list is in force
			write("etc/other", "y")()
		}
	})
	heard.hearsNothing(t, write("etc/fstab", "six\n"), "/etc/other", write("etc/other", "z"))
	heard.endsWithContext(t)
}

// A file that is written over is empty for a moment, in which nobody is to look:
// it is told when it is whole, and then only once.
func TestFollowFilesWrittenOver(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/fstab": "one\n"})
	heard, _ := followFiles(t, openDir(t, dir), FollowedFile{Name: "/etc/fstab"})
	const times = 10
	for range times {
		heard.hears(t, "/etc/fstab", func() {
			if err := os.WriteFile(filepath.Join(dir, "etc/fstab"), []byte("two\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		})
		time.Sleep(2 * eventPause)
	}
	// Some may be told twice, on a machine so busy that this one is kept from
	// writing for longer than the pause.
	if n := len(heard.all()); n > times+times/3 {
		t.Errorf("%d changes were told %d times", times, n)
	}
	heard.endsWithContext(t)
}

// An SQLite database that is read as rpm reads its own.
func TestFollowFilesSQLite(t *testing.T) {
	sqlite, err := exec.LookPath("sqlite3")
	if err != nil {
		t.Skip("needs sqlite3")
	}
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"var/lib/rpm/.keep": ""})
	db := filepath.Join(dir, "var/lib/rpm/rpmdb.sqlite")
	sql := func(text string) func() { return func() { command(t, sqlite, db, text) } }
	sql("PRAGMA journal_mode=WAL; CREATE TABLE t(a); INSERT INTO t VALUES(1);")()
	h := openDir(t, dir)
	const name, wal, mark = "/var/lib/rpm/rpmdb.sqlite", "/var/lib/rpm/rpmdb.sqlite-wal", "/var/lib/rpm/mark"
	heard, _ := followFiles(t, h, FollowedFile{Name: name, On: FileWritten}, FollowedFile{Name: wal, On: FileWritten}, FollowedFile{Name: mark})
	heard.hearsNothing(t, func() {
		for range 5 {
			sql("SELECT * FROM t;")()
		}
	}, mark, func() { writeTree(t, dir, map[string]string{mark: ""}) })
	heard.hears(t, wal, sql("INSERT INTO t VALUES(2);"))
	eventually(t, "the database itself", func() bool { return slices.Contains(heard.all(), name) })
}

// rpm -q opens its database for writing, makes a log beside it and removes it: none
// of that may look like a change, or each query would be answered with the next.
func TestFollowFilesAndRPMQueries(t *testing.T) {
	rpm, err := exec.LookPath("rpm")
	if err != nil {
		t.Skip("needs rpm")
	}
	dir := t.TempDir()
	const place = "/usr/lib/sysimage/rpm"
	writeTree(t, dir, map[string]string{place + "/.keep": ""})
	database := []string{"--dbpath", dir + place}
	command(t, rpm, append(database, "--initdb")...)
	var files []FollowedFile
	for _, name := range []string{"rpmdb.sqlite", "rpmdb.sqlite-wal", "Packages.db", "Packages"} {
		files = append(files, FollowedFile{Name: place + "/" + name, On: FileWritten})
	}
	heard, _ := followFiles(t, openDir(t, dir), append(files, FollowedFile{Name: place + "/mark"})...)
	heard.hearsNothing(t, func() {
		for range 3 {
			// It fails, for nothing is installed there.
			out, _ := exec.Command(rpm, append(database, "-q", "bash")...).CombinedOutput()
			if !strings.Contains(string(out), "not installed") {
				t.Fatalf("rpm: %s", out)
			}
		}
	}, place+"/mark", func() { writeTree(t, dir, map[string]string{place + "/mark": ""}) })
}

// What programs write into kernel files is told, though inotify has no events of
// what the kernel itself does there; also after memory was short.
func TestFollowFilesOfTheKernel(t *testing.T) {
	h := openSelf(t)
	sleep := exec.Command("sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleep.Process.Kill(); sleep.Wait() })
	score := filepath.Join("/proc", strconv.Itoa(sleep.Process.Pid), "oom_score_adj")
	const mtu = "/sys/class/net/lo/mtu"
	heard, _ := followFiles(t, h, FollowedFile{Name: score}, FollowedFile{Name: mtu}, FollowedFile{Name: "/sys/class/net/none/mtu"})
	heard.hears(t, score, func() { command(t, "sh", "-c", "echo 7 >"+score) })
	now, err := os.ReadFile(mtu)
	if err != nil {
		t.Fatal(err)
	}
	heard.hearsNothing(t, func() { command(t, "sh", "-c", "cat "+mtu+" "+score) },
		mtu, func() { command(t, "sh", "-c", "echo "+strings.TrimSpace(string(now))+" >"+mtu) })
}

// A control group appears, is limited, goes, and appears again.
func TestFollowFilesOfControlGroups(t *testing.T) {
	h := openSelf(t)
	parent := ""
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/pids"} {
		if _, err := os.Stat(dir + "/cgroup.procs"); err == nil {
			parent = dir
		}
	}
	group := filepath.Join(parent, "hygiene-test-"+strconv.Itoa(os.Getpid()))
	if parent == "" || os.Mkdir(group, 0o755) != nil {
		t.Skip("no control groups of ours here")
	}
	t.Cleanup(func() { unix.Rmdir(group) })
	limit := group + "/cgroup.procs" // there with both versions
	heard, _ := followFiles(t, h, FollowedFile{Name: limit})
	enter := func() { command(t, "sh", "-c", "echo $$ >"+limit) }
	heard.hears(t, limit, enter)
	heard.hears(t, limit, func() { eventually(t, "its end", func() bool { return unix.Rmdir(group) == nil }) })
	heard.hears(t, limit, func() {
		if err := os.Mkdir(group, 0o755); err != nil {
			t.Fatal(err)
		}
	})
	heard.hears(t, limit, enter)
}

// Without a watch left the others go on, and it is said once. The limit is that
// of a user namespace made for it.
func TestFollowFilesWithoutWatches(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"a/file": "", "b/file": ""})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	helper(t, "watches "+dir, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: root, GidMappings: root})
}

func playWatches(dir string) error {
	// The directory of the first file, and none more.
	if err := os.WriteFile("/proc/sys/user/max_inotify_watches", []byte("1"), 0); err != nil {
		return err
	}
	h, err := Open(Options{Root: dir, init: os.Getpid()})
	if err != nil {
		return err
	}
	lists := make(chan []FollowedFile, 2)
	lists <- []FollowedFile{{Name: "/a/file"}, {Name: "/b/file"}}
	lists <- []FollowedFile{{Name: "/a/file"}, {Name: "/b/file"}}
	partly := make(chan error, 8)
	happened := make(chan string, 8)
	listening := make(chan struct{})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	go h.FollowFiles(ctx, lists, Listener{
		Listening: func() { close(listening) }, Partly: func(err error) { partly <- err },
		Happened: func(what string) { happened <- what }, Lost: func() {},
	})
	select {
	case err := <-partly:
		if text := err.Error(); !strings.Contains(text, "/b/file: no inotify watch is left (fs.inotify.max_user_watches)") {
			return fmt.Errorf("said %q", text)
		}
	case <-ctx.Done():
		return errors.New("nothing was said")
	}
	<-listening
	if err := os.WriteFile(filepath.Join(dir, "a/file"), []byte("x"), 0o644); err != nil {
		return err
	}
	select {
	case <-happened:
	case <-ctx.Done():
		return errors.New("the file that has a watch is not heard of")
	}
	if len(lists) > 0 || len(partly) > 0 {
		return errors.New("said twice")
	}
	return ready()
}
